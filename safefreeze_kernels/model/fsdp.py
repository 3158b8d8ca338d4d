"""FSDP2 (`fully_shard`): a backward pass beside the training, through the sharded model itself.

FSDP2 puts tensors of its own in the parameters' place while a module runs, so no others can be lent to it. Its
gradients appear in ``.grad`` of the sharded parameters, one by one: there they are taken, and what was there before is
put back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .sharding import cuts, is_sharded, local


def fsdp_modules(model: torch.nn.Module) -> dict[str, Any]:
    """The modules that `fully_shard` was called on, by name."""
    module = sys.modules.get("torch.distributed.fsdp")  # whoever called it has imported this
    kind = getattr(module, "FSDPModule", ())
    return {name: child for name, child in model.named_modules() if isinstance(child, kind)}


def reshard(model: torch.nn.Module) -> None:
    """Have the model's parameters be the sharded ones, which a forward pass without a backward pass leaves otherwise:
    what was gathered before a step is old after it."""
    for module in fsdp_modules(model).values():
        module.reshard()


def fsdp_mesh(model: torch.nn.Module, operation: str) -> Any:
    """The mesh over whose ranks FSDP2 cuts the parameters; None: no parameter is sharded.

    Raises:
        ValueError: parameters that are sharded in another way, or not all over the same ranks, or some that train and
            are not.
    """
    within, named = fsdp_modules(model), list[tuple[str, Any]](model.named_parameters())
    named.sort(key=lambda pair: not is_sharded(pair[1]))
    first, mesh = next(((name, p.device_mesh) for name, p in named if is_sharded(p)), ("", None))
    for name, p in named if mesh is not None else ():
        wrong = ""
        if not is_sharded(p):
            wrong = "each rank holds it whole" if p.requires_grad else ""
        elif not any(not module or name.startswith(f"{module}.") for module in within):
            wrong = "it was not cut by fully_shard"
        elif [type(placement).__name__ for _, placement in cuts(p)] != ["Shard"]:
            wrong = "FSDP2 cuts along one dimension of a mesh, and copies along others"
        elif p.device_mesh != mesh:
            wrong = f"the mesh of {first!r} is {mesh}"
        if wrong:
            where = f" (placements {p.placements} on {p.device_mesh})" if is_sharded(p) else ""
            raise ValueError(
                f"{operation}: {name!r}{where} is not sharded as expected: {wrong}; expected every parameter that "
                "trains to be sharded by FSDP2 over the same ranks: fully_shard the whole model on one mesh, without "
                "tensor parallelism, or train with DDP"
            )
    return mesh


def stream_shards(
    model: torch.nn.Module,
    names: Iterable[str],
    value: Callable[[torch.nn.Module], Tensor],
    take: Callable[[str, Tensor, Tensor], None],
    operation: str,
) -> Tensor:
    """As `stream_gradients`, of a model that FSDP2 shards: one forward and one backward pass on every rank of the mesh.

    ``take`` is given this rank's shards. A gradient is the mean over the ranks' values, whatever divisor was set.
    ``.grad`` and hooks of the parameters are put aside meanwhile, without a copy.

    Raises:
        ValueError: within an accumulation window whose gradients were not exchanged yet; nothing was changed.
    """
    wanted = set(names)
    named: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}

    def taken(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if (name := named[parameter]) in wanted:
            take(name, local(parameter.detach()), local(gradient))

    with ExitStack() as stack:
        for module in fsdp_modules(model).values():
            stack.enter_context(_exchanging(module, operation))
        for parameter in named:
            stack.enter_context(_lending_grad(parameter, taken))
        stack.enter_context(torch.enable_grad())
        found = value(model)
        found.backward()  # type: ignore[no-untyped-call]
        return found.detach()


@contextmanager
def _lending_grad(parameter: Tensor, hook: Callable[[Tensor], None]) -> Iterator[None]:
    """Within, the parameter has no gradient, and ``hook`` alone sees those that come."""
    gradient, parameter.grad = parameter.grad, None
    before = dict(parameter._post_accumulate_grad_hooks or {})
    (parameter._post_accumulate_grad_hooks or {}).clear()
    parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        parameter.grad = gradient
        hooks = parameter._post_accumulate_grad_hooks
        hooks.clear()
        hooks.update(before)


@contextmanager
def _exchanging(module: Any, operation: str) -> Iterator[None]:
    """Within, a backward pass exchanges gradients and takes their mean, whatever was set for training.

    Raises:
        ValueError: gradients wait there to be exchanged, and would be mixed with others.
    """
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [state._fsdp_param_group] if groups is None else groups
    settings: dict[str, Any] = {"reduce_grads": True, "all_reduce_grads": True, "gradient_divide_factor": None}
    before = []
    for group in filter(None, groups):
        held = [getattr(p, "_unsharded_param", None) for p in group.fsdp_params]
        waiting = [p.unsharded_accumulated_grad for p in group.fsdp_params] + [getattr(p, "grad", None) for p in held]
        if any(grad is not None for grad in (*waiting, group._partial_reduce_output)):
            raise ValueError(
                f"{operation}: gradients of an accumulation window wait to be exchanged between ranks "
                "(set_requires_gradient_sync(False)), and others would mix with them; call it after the optimizer's "
                "step"
            )
        before.append((group, {key: getattr(group, key) for key in settings}))
    last = state._state_ctx.is_last_backward
    try:
        for group, _ in before:
            _set(group, settings)
        state._state_ctx.is_last_backward = True
        yield
    finally:
        state._state_ctx.is_last_backward = last
        for group, values in before:
            _set(group, values)


def _set(thing: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(thing, name, value)
