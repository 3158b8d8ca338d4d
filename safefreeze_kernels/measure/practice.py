"""Today's practice, which masked steps are measured against: mask the gradients, step, put the frozen values back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..plan.plan import FreezePlan

Actions = list[Callable[[], object]]


def mask_gradients(params: Mapping[str, Tensor], plan: FreezePlan, kept: list[Tensor]) -> Actions:
    """What multiplies each gradient by a dense mask of its own dtype, as most people write it; masks go to ``kept``."""
    actions: Actions = []
    for name, mask in plan.items():
        grad = _gradient(params[name])
        kept.append((~mask.dense()).to(grad))
        actions.append(partial(grad.mul_, kept[-1]))
    return actions


def mask_step_restore(
    step: Callable[[], object], params: Mapping[str, Tensor], plan: FreezePlan, *, dense: bool
) -> tuple[Callable[[], None], list[Tensor]]:
    """The practice around ``step``: without putting values back, weight decay and old momentum move them.

    Args:
        params: name -> parameter, each with the gradient it will always have.
        dense: mask gradients as most people do, by dense masks; False: done well, by indexed writes.

    Returns:
        What takes a step, and the tensors it keeps for freezing: indices, masks, and copies of the frozen values.
    """
    kept: list[Tensor] = []
    before = mask_gradients(params, plan, kept) if dense else []
    after: Actions = []
    for name, mask in plan.items():
        value = params[name].detach().view(mask.matrix_shape)
        grad = _gradient(params[name]).view(mask.matrix_shape)
        for dim, places in ((0, mask.rows), (1, mask.cols)):
            if places.numel():
                index = places.to(value.device)
                kept += [index, value.index_select(dim, index)]
                after.append(partial(value.index_copy_, dim, *kept[-2:]))
                if not dense:
                    before.append(partial(grad.index_fill_, dim, index, 0.0))
        if mask.elements is not None:
            chosen = mask.elements.view(mask.matrix_shape).to(value.device)
            kept += [chosen, value[chosen]]
            after.append(partial(value.masked_scatter_, *kept[-2:]))
            if not dense:
                before.append(partial(grad.masked_fill_, chosen, 0.0))

    @torch.no_grad()
    def run() -> None:
        for action in before:
            action()
        step()
        for action in after:
            action()

    return run, kept


def _gradient(param: Tensor) -> Tensor:
    if param.grad is None:
        raise ValueError("mask_step_restore: a parameter has no gradient, expected one")
    return param.grad
