"""Which weights an optimizer cannot move: bfloat16 or float16 ones whose next update is lost when it is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels.operands import dtype_word
from ..model.sharding import local, local_mask
from ..plan.mask import FreezeMask
from .adam import MaskedAdam
from .checks import all_names
from .direction import direction

_MOST: Final = 1 << 20  # elements of one tensor that are looked at; of larger ones, lines at equal distances


@dataclass(frozen=True)
class Rounded:
    """How many live weights of one group and dtype their next update leaves as they are.

    Attributes:
        group: index of the parameter group.
        lr: its rate; where a schedule warms it up, that to which it does.
        dtype: "bfloat16" or "float16".
        elements: live weights of it, of sharded ones those on this rank.
        share: how many of them stay; NaN: it cannot be said, since how long the optimizer's updates are is not known.
        sampled: whether large tensors were looked at in part.
        measured: whether the update is that of the optimizer's state or of gradients, not the one to expect of an Adam:
            as long as the rate, up or down.
    """

    group: int
    lr: float
    dtype: str
    elements: int
    share: float
    sampled: bool
    measured: bool


def rate_of(group: Mapping[str, Any]) -> float:
    """The rate of a group, or the one to which a schedule warms it up, if that is higher."""
    return max(float(group["lr"]), float(group.get("initial_lr", 0.0)))


@torch.no_grad()
def rounded_away(optimizer: Optimizer, masks: Mapping[int, FreezeMask]) -> list[Rounded]:
    """For each group, how many of its live bfloat16 and float16 weights the next update leaves where they are.

    None where masters keep what is rounded away, or where rounding is stochastic. Reads only; takes memory for three
    float32 copies of the largest tensor that `MaskedAdam` has state of.

    Args:
        masks: ``id`` of a parameter -> what is frozen of it; of others nothing is.
    """
    names = iter(all_names(optimizer.param_groups))
    settings = optimizer._settings if isinstance(optimizer, MaskedAdam) else None
    found: dict[tuple[int, torch.dtype], list[_Look]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for p, name in zip(group["params"], names, strict=False):
            exact = settings is not None and (
                settings.rounding == "stochastic" or (settings.master is not None and p.dtype == torch.bfloat16)
            )
            halves = p.dtype in (torch.bfloat16, torch.float16) and p.layout == torch.strided and not p.is_meta
            if p.requires_grad and halves and not exact:
                mask = local_mask(masks.get(id(p)) or FreezeMask(p.shape), p)
                if mask.live_count:
                    found.setdefault((index, p.dtype), []).append(_look(optimizer, group, p, name, mask))
    reports = []
    for (index, dtype), looks in found.items():
        live = sum(look.live for look in looks)
        share = sum(look.live * look.share for look in looks) / live
        rate, sampled = rate_of(optimizer.param_groups[index]), any(look.sampled for look in looks)
        measured = all(look.measured for look in looks)
        reports.append(Rounded(index, rate, dtype_word(dtype), live, share, sampled, measured))
    return reports


@dataclass(frozen=True)
class _Look:
    """What was seen of one tensor: as in `Rounded`."""

    live: int
    share: float
    sampled: bool
    measured: bool


def _look(optimizer: Optimizer, group: dict[str, Any], p: Tensor, name: str, mask: FreezeMask) -> _Look:
    rows, cols = mask.live_rows, mask.live_cols
    height = max(_MOST // max(cols.size, 1), 1)
    places = _Places(_spaced(rows, height), _spaced(cols, _MOST), mask)
    sampled = places.rows.size < rows.size or places.cols.size < cols.size
    headings, measured = _headings(optimizer, group, p, name, places)
    weights, lr = places.of(local(p)), rate_of(group)
    decay = 1.0 - lr * float(group.get("weight_decay", 0.0)) if group.get("decoupled_weight_decay", True) else 1.0
    shares = [
        float(places.chosen((decay * weights.float() - lr * heading).to(p.dtype) == weights).float().mean())
        for heading in headings
    ]
    return _Look(mask.live_count, float(np.mean(shares)) if shares else float("nan"), sampled, measured)


def _spaced(index: np.ndarray, most: int) -> np.ndarray:
    return index if index.size <= most else index[np.linspace(0, index.size - 1, most).astype(np.int64)]


class _Places:
    """Live rows and columns of a tensor that are looked at, and which single elements of them are frozen."""

    def __init__(self, rows: np.ndarray, cols: np.ndarray, mask: FreezeMask) -> None:
        self.rows, self.cols, self._mask = rows, cols, mask

    def of(self, tensor: Tensor) -> Tensor:
        """What is at them in a tensor of the mask's shape: [rows, columns]."""
        matrix = tensor.detach().reshape(self._mask.matrix_shape)
        for dim, index in enumerate((self.rows, self.cols)):
            if index.size < matrix.shape[dim]:
                matrix = matrix.index_select(dim, torch.from_numpy(index).to(matrix.device))
        return matrix

    def chosen(self, values: Tensor) -> Tensor:
        """Of [rows, columns], what belongs to live elements."""
        bits = self._mask.bits
        if bits is None:
            return values
        place = self.rows[:, None] * self._mask.matrix_shape[1] + self.cols
        frozen = bits[place >> 3] >> (place & 7).astype(np.uint8) & 1
        return values[torch.from_numpy(frozen == 0).to(values.device)]


def _headings(
    optimizer: Optimizer, group: Mapping[str, Any], p: Tensor, name: str, places: _Places
) -> tuple[list[Tensor | float], bool]:
    """Where weights are heading, before the rate: the optimizer's own direction, or those that are equally likely; none
    where it cannot be said. And whether it is the optimizer's own."""
    state = optimizer.state.get(p, {})
    if isinstance(optimizer, MaskedAdam):
        own = direction(optimizer, p, name)
        if own is not None:
            return [places.of(own)], True
    elif isinstance(optimizer, torch.optim.Adam) and "exp_avg_sq" in state:
        return [_adam_direction(state, group, places)], True
    elif isinstance(optimizer, torch.optim.SGD):
        buffer = state.get("momentum_buffer")
        source = p.grad if buffer is None else buffer
        if source is None:
            return [], False
        heading = places.of(local(source)).float()
        return [-heading if buffer is None and group["maximize"] else heading], True
    # what has two betas steps by about its rate, as Adam's first steps do (|m| = sqrt(v)), and Lion's always
    return ([1.0, -1.0] if "betas" in group else []), False


def _adam_direction(state: Mapping[str, Any], group: Mapping[str, Any], places: _Places) -> Tensor:
    first = places.of(local(state["exp_avg"])).float()
    second = places.of(local(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])).float()
    bias1, bias2 = (1.0 - float(beta) ** max(float(state["step"]), 1.0) for beta in group["betas"])
    heading: Tensor = first / bias1 / ((second / bias2).sqrt() + group["eps"])
    return heading
