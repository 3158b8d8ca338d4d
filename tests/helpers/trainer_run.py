"""A tiny model, data and Trainer, for the tests; as a script, a run that can be killed and resumed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import safefreeze_kernels as sf
from safefreeze_kernels.integrations.transformers import FreezeCallback, masked_adamw

VOCABULARY = 64


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCABULARY, max_position_embeddings=32, tie_word_embeddings=True,
        )
    )  # fmt: skip


def plan() -> sf.FreezePlan:
    return sf.FreezePlan(
        {
            "model.layers.0.mlp.up_proj.weight": sf.FreezeMask((48, 32), rows=range(0, 48, 3)),
            "model.layers.0.mlp.down_proj.weight": sf.FreezeMask((32, 48), cols=range(0, 48, 3)),
            "model.layers.1.self_attn.q_proj.weight": sf.FreezeMask((32, 32), rows=range(8)),
            "model.embed_tokens.weight": sf.FreezeMask((VOCABULARY, 32), rows=range(0, VOCABULARY, 2)),
        }
    )


def dataset(rows: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (rows, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 2, "max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 3, "max_grad_norm": 0.1,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**settings, **options})


class Slow(TrainerCallback):  # type: ignore[misc]
    """So that a kill lands between steps."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))


def trainer(folder: Path | str, *, freeze: sf.FreezePlan | None = None, **options: Any) -> Trainer:
    freeze = freeze or plan()
    return Trainer(
        model=model(),
        args=arguments(folder, **options),
        train_dataset=dataset(),
        optimizer_cls_and_kwargs=masked_adamw(freeze, lr=1e-2, weight_decay=0.1),
        callbacks=[FreezeCallback(freeze), Slow()],
    )


if __name__ == "__main__":
    folder, resume = Path(sys.argv[1]), sys.argv[2] == "resume"
    run = trainer(folder, save_strategy="steps", save_steps=2, max_steps=10, warmup_steps=3, save_total_limit=3)
    run.train(resume_from_checkpoint=resume or None)
    torch.save({"weights": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, folder / "end.partial")
    (folder / "end.partial").rename(folder / "end.pt")
