"""Where an optimizer is heading: the direction of its next update, before the rate."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..kernels.ages import Ages
from ..model.sharding import held, local
from ..plan.mask import FreezeMask
from .adam import MaskedAdam
from .state import decoded, unpack

_CHUNK: Final = 1 << 17  # weights whose own steps are looked at together


@torch.no_grad()
def direction(optimizer: MaskedAdam, param: Tensor, name: str) -> Tensor | None:
    """m̂ / (√v̂ + eps) of each weight, float32 of the parameter's shape; None before its first step. Of a sharded
    parameter: of this rank's shard.

    Both moments are corrected for their bias, by the steps that the weight took since it was thawed. What stands still
    with its moments kept has the direction it had; without, 0. Weight decay is no part of it.

    Args:
        name: of the parameter, in the optimizer.
    """
    state = decoded(optimizer.state.get(param) or {})
    if not state:
        return None
    group = next(group for group in optimizer.param_groups if any(p is param for p in group["params"]))
    whole, ages, step = optimizer._masks[name], optimizer._ages.get(name), int(state["step"].item())
    param, there = local(param), held(param)
    mask, ages = whole.shard(there), (ages and ages.shard(whole, there)) or None
    packing = FreezeMask(mask.shape) if optimizer._whole else mask
    keys = "exp_avg", "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    first, second = (unpack(state[key], packing).reshape(mask.matrix_shape) for key in keys)
    logs = [math.log(beta) if beta else -math.inf for beta in map(float, group["betas"])]
    stands_still = torch.from_numpy(_lines(mask)) if optimizer._whole and mask.frozen_count else None
    found = torch.empty(mask.matrix_shape, dtype=torch.float32, device=param.device)
    height = max(1, _CHUNK // max(1, mask.matrix_shape[1]))
    for start in range(0, len(found), height):
        rows = slice(start, start + height)
        took = torch.tensor([[float(step)]]) if ages is None else _took(ages, rows, step, stands_still)
        took = took.to(param.device).clamp_(min=1)
        bias1, bias2 = ((took * log).expm1_().neg_() for log in logs)
        denominator = torch.sqrt(second[rows].float()).div_(bias2.sqrt_()).add_(group["eps"])
        torch.div(first[rows], denominator, out=found[rows]).div_(bias1)
    return found.reshape(param.shape)


def _took(ages: Ages, rows: slice, step: int, stands_still: Tensor | None) -> Tensor:
    """How many steps weights of some rows took since they were thawed, float32 that spreads to ``[rows, columns]``; of
    what ``stands_still``, moments kept, ages are these numbers."""
    born = torch.from_numpy(ages.dense(rows)).float()
    if stands_still is None:
        return step - born
    return torch.where(stands_still[rows] if len(stands_still) > 1 else stands_still, born, step - born)


def _lines(mask: FreezeMask) -> np.ndarray:
    """What is frozen, bool that spreads to ``[rows, columns]``."""
    if mask.bits is not None or (mask.frozen_rows.size and mask.frozen_cols.size):
        return mask.frozen_flags()
    n_rows, n_cols = mask.matrix_shape
    by_row = not mask.frozen_cols.size
    lines = np.zeros((n_rows, 1) if by_row else (1, n_cols), bool)
    lines.reshape(-1)[mask.frozen_rows if by_row else mask.frozen_cols] = True
    return lines
