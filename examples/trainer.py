"""transformers' Trainer: one argument for the optimizer, a callback for the proof."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import safefreeze_kernels as sf
from safefreeze_kernels.integrations.transformers import FreezeCallback, masked_adamw

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
model = LlamaForCausalLM(config)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 256, (64, 16))]
plan = sf.FreezePlan({"model.layers.0.mlp.up_proj.weight": sf.FreezeMask((128, 64), rows=range(32))})

with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=1.0,
        logging_steps=5, save_steps=10, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        optimizer_cls_and_kwargs=masked_adamw(plan, args),  # or masked_adamw(plan, lr=1e-3, weight_decay=0.1)
        callbacks=[FreezeCallback(plan)],  # verifies before every save, leaves plan and proof in the checkpoint
    )
    trainer.train()
    print((Path(folder) / "checkpoint-20" / "freeze_proof.json").read_text())
