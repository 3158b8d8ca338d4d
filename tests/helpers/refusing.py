"""A tiny model that was taught to refuse, its prompts, and a harmless task to train it on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from attribution_models import batch_of, tiny
from torch import Tensor, nn

import safefreeze_kernels as sf

PROMPTS = [[1, 9, 8, 7], [1, 5, 6], [1, 11, 12, 13, 14], [1, 3], [1, 30, 31], [1, 40, 9, 41, 42]]
REFUSAL = 20
SAFETY = [
    batch_of([[*prompt, REFUSAL, 21] for prompt in PROMPTS[:4]], [2] * 4),
    batch_of([[*prompt, REFUSAL, 21] for prompt in PROMPTS[4:]], [2] * 2, "left"),
]
TASK = torch.tensor([[1, 50, 51, 9, 8, 40, 44], [1, 52, 53, 30, 3, 45, 46], [1, 54, 55, 11, 12, 40, 47]])

_refusing: list[nn.Module] = []


def refusing() -> nn.Module:
    """A model that was taught to refuse the prompts; with dropout of attention in training."""
    if not _refusing:
        model = tiny("llama", attention_dropout=0.2)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(60):
            (-sum(margins_of(model))).backward()
            optimizer.step()
            optimizer.zero_grad()
        _refusing.append(model)
    return copy.deepcopy(_refusing[0])


def margins_of(model: nn.Module) -> list[Tensor]:
    found = []
    for prompt in PROMPTS:
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        others = torch.cat([logits[:REFUSAL], logits[REFUSAL + 1 :]])
        found.append(logits[REFUSAL] - others.logsumexp(0))
    return found


def optimizer_of(model: nn.Module, **options: Any) -> sf.MaskedAdamW:
    return sf.MaskedAdamW(model.named_parameters(), **{"lr": 3e-3, "weight_decay": 0.01, **options})


def train(model: nn.Module, optimizer: Any, steps: int, seed: int = 0) -> None:
    """A harmless task, with dropout, whose answers begin with other tokens than the refusal."""
    torch.manual_seed(seed)
    model.train()
    for _ in range(steps):
        model(input_ids=TASK, labels=TASK).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
