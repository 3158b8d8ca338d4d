"""Where an optimizer is heading: the direction of its next update, before the rate."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..kernels.ages import Ages
from .adam import MaskedAdam
from .state import unpack


@torch.no_grad()
def direction(optimizer: MaskedAdam, param: Tensor, name: str) -> Tensor | None:
    """m̂ / (√v̂ + eps) of each weight, of the parameter's shape, a tensor of its own; None before its first step.

    Both moments are corrected for their bias, counted from when the weight was thawed. What has no state, since a plan
    froze it, has 0. Weight decay is no part of it.
    """
    state = optimizer.state.get(param)
    if not state:
        return None
    group = next(group for group in optimizer.param_groups if any(p is param for p in group["params"]))
    mask, ages = optimizer._masks[name], optimizer._ages.get(name)
    first, second = (unpack(state[key], mask) for key in ("exp_avg", "exp_avg_sq"))
    if group["amsgrad"]:
        second = unpack(state["max_exp_avg_sq"], mask)
    corrections = [_corrections(float(beta), state["step"].item(), ages, param) for beta in group["betas"]]
    below = second.float().sqrt().div_(corrections[1].sqrt()).add_(group["eps"])
    return torch.div(first, below, out=below).div_(corrections[0])


def _corrections(beta: float, step: float, ages: Ages | None, param: Tensor) -> Tensor:
    """1 - beta ** (steps since the thaw), float32 that spreads to the parameter's shape."""
    if ages is None or beta == 0:
        return torch.tensor(1 - beta**step, dtype=torch.float32, device=param.device)
    born = np.maximum(ages.rows[:, None], ages.cols if ages.cols.any() else 0)
    born = born if ages.elements is None else np.maximum(born, ages.elements)
    lived = torch.from_numpy(step - born).to(param.device, torch.float32).clamp_(min=1)
    by_row = param.dim() > 1 and lived.shape[1] == 1
    return lived.mul_(math.log(beta)).expm1_().neg_().reshape((*param.shape[:-1], 1) if by_row else param.shape)
