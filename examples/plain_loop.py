"""A loop of your own: freeze neurons, clip by the norm of what trains, prove that nothing frozen moved."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import safefreeze_kernels as sf

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
model = LlamaForCausalLM(config)
tokens = torch.randint(0, 256, (40, 4, 16))

# Every fourth MLP channel of both layers: its rows of gate and up, its column of down.
channels = range(0, 128, 4)
plan = sf.FreezePlan(
    {
        f"model.layers.{i}.mlp.{name}_proj.weight": sf.FreezeMask((128, 64), rows=channels)
        for i in range(2)
        for name in ("gate", "up")
    }
    | {f"model.layers.{i}.mlp.down_proj.weight": sf.FreezeMask((64, 128), cols=channels) for i in range(2)}
)
optimizer = sf.MaskedAdamW(model.named_parameters(), lr=1e-3, weight_decay=0.1, freeze=plan)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=len(tokens))
proof = sf.snapshot(model, plan)

for step, batch in enumerate(tokens):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    norm = sf.clip_grad_norm_(model, 1.0, plan, optimizer=optimizer)  # applied inside the step
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step:2}  loss {loss:.3f}  live gradient norm {norm:.3f}")

proof.verify(model)  # raises FrozenDriftError if a byte moved
print(f"frozen: {plan.frozen_fraction:.1%} of the MLPs, {proof.nbytes:,} bytes, none moved")
