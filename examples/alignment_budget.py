"""An alignment budget: align a base model by training only its 20% most redundant units (SSAH, arXiv 2410.10862).

    python examples/alignment_budget.py [MODEL_FOLDER]

Pass the folder of a base model. Without one SmolLM2-135M-Instruct stands in for it, so that the example runs.
"""

import sys

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import encode_pairs
from safefreeze_kernels.calibration import load_pairs
from safefreeze_kernels.integrations.transformers import load_model


def main(source: str = "smollm2") -> sf.FreezePlan:
    name, model, tokenizer = load_model(source)

    # a base model has no safety to keep: units are ranked by utility alone, and the safety scores are not looked at
    utility = encode_pairs(tokenizer, load_pairs("utility")[:16], batch_size=8)
    scores = sf.score_units(model, utility, utility)
    plan = sf.MaskBuilder(scores).train_only("RU", 0.2).build(model)

    # what holds no units is the user's choice: here embeddings, norms and output head do not train either
    for parameter, tensor in model.named_parameters():
        tensor.requires_grad_(parameter in scores.layout.parameters)
    learning = [(parameter, tensor) for parameter, tensor in model.named_parameters() if tensor.requires_grad]
    proof = sf.snapshot(model, plan)
    optimizer = sf.MaskedAdamW(learning, lr=1e-4, freeze=plan)

    refusals = encode_pairs(tokenizer, load_pairs("safety")[:12], batch_size=4)
    model.train()
    for step, batch in enumerate(refusals):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        sf.clip_grad_norm_(learning, 1.0, plan)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    proof.verify(model)

    total = sum(tensor.numel() for tensor in model.parameters())
    live = sum(tensor.numel() for _, tensor in learning) - sum(mask.frozen_count for mask in plan.values())
    print(f"{name}: {live:,} of {total:,} parameters trained ({live / total:.1%}); the frozen ones did not move")
    return plan


if __name__ == "__main__":
    main(*sys.argv[1:2])
