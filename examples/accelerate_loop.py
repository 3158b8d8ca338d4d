"""accelerate: prepare as always; clip with `sf.clip_grad_norm_`, since accelerate's counts frozen gradients."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import safefreeze_kernels as sf

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
model = LlamaForCausalLM(config)
loader = DataLoader(torch.randint(0, 256, (96, 16)), batch_size=4)
plan = sf.FreezePlan({"model.layers.0.mlp.up_proj.weight": sf.FreezeMask((128, 64), rows=range(32))})

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)  # mixed_precision="bf16" works as well
optimizer = sf.MaskedAdamW(model.named_parameters(), lr=1e-3, weight_decay=0.1, freeze=plan)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
proof = sf.snapshot(model, plan)

for number, batch in enumerate(loader):
    with accelerator.accumulate(model):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            norm = sf.clip_grad_norm_(model, 1.0, plan)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if number % 8 == 7:
        print(f"batch {number:2}  loss {loss:.3f}  live gradient norm {norm:.3f}")

proof.verify(model)
print(f"frozen: {proof.nbytes:,} bytes, none moved")
