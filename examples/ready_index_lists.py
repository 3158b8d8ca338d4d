"""Index lists you already have, from a paper's repository or a detector of your own: lists -> plan -> optimizer.

    python examples/ready_index_lists.py

The model is a small random Llama; with your own, load it and keep the rest.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import find_units, units_from

HEADS = {0: [1], 2: [0, 3]}  # layer -> attention heads
CHANNELS = {0: [3, 17, 40], 1: [5, 6, 7], 2: [62]}  # layer -> MLP channels


def main() -> sf.FreezePlan:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    # whole units: a head is its rows of q, k, v and its columns of o; a channel its rows of gate, up and column of down
    plan = units_from(find_units(model), heads=HEADS, channels=CHANNELS).build(model)
    # single rows, columns or elements of any parameter join in
    table = model.get_input_embeddings().weight
    plan |= sf.FreezePlan({"model.embed_tokens.weight": sf.FreezeMask(table.shape, rows=[0, 1, 2])})
    print(plan.summary())

    proof = sf.snapshot(model, plan)
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=1e-3, weight_decay=0.1, freeze=plan)
    tokens = torch.randint(0, 100, (4, 16))
    for step in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    proof.verify(model)
    print("frozen bytes are equal")
    return plan


if __name__ == "__main__":
    main()
