"""A model that ranks cannot share out evenly, and a plan for it."""

from __future__ import annotations

import torch
from torch import Tensor

import safefreeze_kernels as sf


class Net(torch.nn.Module):
    """Rows and columns that neither 2 nor 4 ranks divide, and a tensor of one row: of some, ranks hold nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(6, 10)
        self.norm = torch.nn.LayerNorm(10)
        self.down = torch.nn.Linear(10, 7)
        self.out = torch.nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.down(self.norm(torch.tanh(self.up(x))))))


def plan() -> sf.FreezePlan:
    elements = torch.zeros(7, 10, dtype=torch.bool)
    elements[1, 2] = elements[4, 0] = elements[6] = True
    return sf.FreezePlan(
        {
            "up.weight": sf.FreezeMask((10, 6), rows=[0, 3, 4, 9], cols=[1]),
            "up.bias": sf.FreezeMask((10,), rows=[0, 3, 4, 9]),
            "down.weight": sf.FreezeMask((7, 10), elements=elements),
            "out.weight": sf.FreezeMask((1, 7), cols=[2, 3]),
        }
    )


def frozen(name: str, like: Tensor, under: sf.FreezePlan | None = None) -> Tensor:
    """What ``under`` (default: `plan`) freezes of a tensor."""
    under = plan() if under is None else under
    return under[name].dense() if name in under else torch.zeros(like.shape, dtype=torch.bool)


def net() -> Net:
    torch.manual_seed(0)
    return Net()
