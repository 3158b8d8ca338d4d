"""The direction an optimizer is heading in, against a stock optimizer of each weight's own history."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import safefreeze_kernels as sf
from safefreeze_kernels.optim.direction import direction

SHAPE = (6, 8)
ROWS = sf.FreezeMask(SHAPE, rows=[1, 4])
COLS = sf.FreezeMask(SHAPE, cols=[0, 5])
BOTH = ROWS | COLS
DOTS = sf.FreezeMask(SHAPE, elements=torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.3)
NONE = sf.FreezeMask(SHAPE)


def by_hand(masks: list[sf.FreezeMask], grads: list[Tensor], thawed: str, amsgrad: bool) -> Tensor:
    """m̂ / (√v̂ + eps) where each weight counts its own steps; what thaws ``"fresh"`` begins anew."""
    m, v, most, took = (torch.zeros(SHAPE, dtype=torch.float64) for _ in range(4))
    before = torch.zeros(SHAPE, dtype=torch.bool)
    for mask, grad in zip(masks, grads, strict=True):
        frozen = mask.dense()
        if thawed == "fresh":
            for moment in (m, v, most, took):
                moment[before & ~frozen] = 0
        before, live = frozen, (~frozen).double()
        m += live * 0.1 * (grad.double() - m)
        v += live * 0.001 * (grad.double() ** 2 - v)
        most = torch.where(frozen, most, torch.maximum(most, v))
        took += live
    counted = took.clamp(min=1)
    corrected = (most if amsgrad else v) / (1 - 0.999**counted)
    return m / (1 - 0.9**counted) / (corrected.sqrt() + 1e-8)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("thawed", ["fresh", "kept"])
@pytest.mark.parametrize(
    "plans", [[NONE], [ROWS, NONE], [NONE, ROWS, COLS], [COLS, NONE, COLS], [DOTS, ROWS, DOTS], [ROWS, BOTH, DOTS]],
    ids=["none", "thawed", "rows cols", "cols again", "dots", "mixed"],
)  # fmt: skip
def test_it_counts_each_weights_own_steps(plans: list[sf.FreezeMask], thawed: Any, amsgrad: bool) -> None:
    weight = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = sf.MaskedAdamW([("w", weight)], amsgrad=amsgrad)
    assert direction(optimizer, weight, "w") is None
    masks, grads = [], []
    for mask in plans:
        optimizer.set_freeze(sf.FreezePlan({"w": mask}), keep_state=True, thawed=thawed)
        for _ in range(3):
            masks.append(mask)
            grads.append(torch.randn(SHAPE))
            weight.grad = grads[-1]
            optimizer.step()
    state = {key: value.clone() for key, value in optimizer.state[weight].items()}
    found = direction(optimizer, weight, "w")
    torch.testing.assert_close(found, by_hand(masks, grads, thawed, amsgrad).float(), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, optimizer.state[weight][key]) for key, value in state.items())


@pytest.mark.parametrize("shape", [(5,), (), (2, 3, 4)])
def test_of_any_shape_and_packed(shape: tuple[int, ...]) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape))
    mask = sf.FreezeMask(shape, rows=[0])
    optimizer = sf.MaskedAdamW([("w", weight)], freeze=sf.FreezePlan({"w": mask}))
    weight.grad = torch.full(shape, -2.0)
    optimizer.step()
    found = direction(optimizer, weight, "w")
    torch.testing.assert_close(found, torch.where(mask.dense(), 0.0, -1.0))
