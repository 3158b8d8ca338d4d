"""A step inside `torch.compile`: one operation, which calls the optimizer by number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Final
from weakref import WeakMethod, WeakValueDictionary

import torch
from torch import Tensor

from .launch import LaunchPlan

_numbers: Final = count()
_handles: Final[WeakValueDictionary[str, Handle]] = WeakValueDictionary()


class Handle:
    """The number by which a graph, which can hold no objects, calls an optimizer. The optimizer keeps it alive.

    Args:
        plans: its method that returns valid launch plans.
        update: its method that takes a step with given gradients, a list for each launch plan.
    """

    def __init__(
        self, plans: Callable[[], list[LaunchPlan]], update: Callable[[Sequence[Sequence[Tensor]]], None]
    ) -> None:
        # text, since the compiler makes a variable of an integer that changes, and runs one graph for any of them
        self.number = str(next(_numbers))
        self.plans, self.update = WeakMethod(plans), WeakMethod(update)
        _handles[self.number] = self


def traced_step(plans: list[LaunchPlan], number: str, closure: Callable[[], Any] | None) -> Any:
    """A step as `torch.compile` sees it: one operation that writes to parameters and state."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    params, grads, state = [], [], []
    for plan in plans:
        for p in plan.owners:
            if p.grad is None:
                raise RuntimeError("MaskedAdam: in a compiled step every parameter with state must have a gradient")
            params.append(p)
            grads.append(p.grad)
        state.extend(plan.packed_state)
    torch.ops.safefreeze.step_(params, grads, state, [plan.steps for plan in plans], number)
    return loss


@torch.library.custom_op("safefreeze::step_", mutates_args=("params", "state", "steps"))
def _step_op(params: list[Tensor], grads: list[Tensor], state: list[Tensor], steps: list[Tensor], number: str) -> None:
    """Adam(W) on tensors that stand for those of an optimizer: the same, or copies that a compiler made."""
    handle = _handles.get(number)
    methods = None if handle is None else (handle.plans(), handle.update())
    plans_now, update = methods or (None, None)
    plans = [] if plans_now is None else plans_now()  # in case something was moved
    if update is None or [len(params), len(state)] != [
        sum(len(tensors) for tensors in column)
        for column in ([plan.owners for plan in plans], [plan.packed_state for plan in plans])
    ]:
        raise RuntimeError("MaskedAdam: a compiled step was called after its optimizer changed; compile it anew")
    grads_of_plan, pairs = [], []
    for plan, counts in zip(plans, steps, strict=True):
        n, k = len(plan.owners), len(plan.packed_state)
        own, given = (*plan.owners, *plan.packed_state, plan.steps), (*params[:n], *state[:k], counts)
        pairs += [(mine, other) for mine, other in zip(own, given, strict=True) if mine.data_ptr() != other.data_ptr()]
        grads_of_plan.append(grads[:n])
        params, grads, state = params[n:], grads[n:], state[k:]
    for mine, other in pairs:
        mine.copy_(other)
    update(grads_of_plan)
    for mine, other in pairs:
        other.copy_(mine)


@_step_op.register_fake
def _(params: list[Tensor], grads: list[Tensor], state: list[Tensor], steps: list[Tensor], number: str) -> None:
    pass
