"""`guard`: a freeze plan kept under any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .binding import bind, named_tensors
from .gradients import check_gradient, zero_listed_grads_
from .kernels import Backend, choose_backend, compile_frozen
from .kernels.drift import raise_on_drift
from .kernels.tensors import GradientReader
from .masks import FreezePlan
from .optim import check_parameter, checked_plan
from .sharding import local, local_gradient

__all__ = ["Guard", "guard"]


class Guard:
    """Keeps a plan's weights where they are under any `torch.optim.Optimizer`. Made by `guard`."""

    def __init__(self, optimizer: Optimizer, plan: FreezePlan, model: torch.nn.Module, backend: str) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"guard: optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer "
                "(unwrap a wrapper first, for example accelerated.optimizer)"
            )
        self.plan = checked_plan(plan, "guard")
        self.model = model
        self._backend_name = backend
        bound = bind(self.plan, named_tensors(model), operation="guard")
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for entry in bound:
            if id(entry.param) not in known:
                raise ValueError(f"guard: {entry.name!r} is in the plan and the model but not in the optimizer")
            if entry.param.grad is not None:
                check_gradient(local(entry.param), local_gradient(entry.param), entry.name, "guard")  # type: ignore[arg-type]
        self._names = [entry.name for entry in bound]
        self._masks = [entry.mask for entry in bound]
        self._held = [entry.held for entry in bound]
        self._shapes = [entry.param.shape for entry in bound]
        self._dtypes = [entry.param.dtype for entry in bound]
        self._work = compile_frozen([entry.local_mask for entry in bound])
        self._gradients = GradientReader([entry.param for entry in bound])
        self.refresh()
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def refresh(self) -> None:
        """Take the present values as the frozen ones, after weights were loaded on purpose."""
        params = self._params()
        self._copy = [
            torch.empty(size, dtype=p.dtype, device=local(p).device)
            for size, p in zip(self._work.packed_sizes, params, strict=True)
        ]
        self._gather(params, self._copy)
        self._versions = [p._version for p in params]

    def remove(self) -> None:
        """Stop guarding. The weights stay as they are and train from now on."""
        for handle in self._handles:
            handle.remove()

    @property
    def nbytes(self) -> int:
        """Memory of the packed copy."""
        return sum(t.numel() * t.element_size() for t in self._copy)

    def _params(self) -> list[Tensor]:
        # By name, at every use: frameworks swap parameter objects.
        named = dict(named_tensors(self.model))
        lost = [name for name in self._names if name not in named]
        if lost:
            raise ValueError(f"guard: {lost[0]!r} is no longer a parameter of the model; guard it under its new name")
        params = [named[name] for name in self._names]
        for name, p, shape, dtype in zip(self._names, params, self._shapes, self._dtypes, strict=True):
            check_parameter(p, "guard", name)
            if (p.shape, p.dtype) != (shape, dtype):
                raise ValueError(
                    f"guard: {name!r} is {tuple(p.shape)} {p.dtype}, expected {tuple(shape)} {dtype} "
                    "as before; guard it anew"
                )
        return params

    def _backend(self, params: list[Tensor]) -> Backend:
        devices = {local(p).device for p in params}
        if len(devices) > 1:
            raise ValueError(
                f"guard: the plan's parameters are on {len(devices)} devices, expected one; guard each part"
            )
        return choose_backend(self._backend_name, next(iter(devices), torch.device("cpu")), "guard", set(self._dtypes))

    @torch.no_grad()
    def _gather(self, params: list[Tensor], packed: list[Tensor]) -> None:
        self._backend(params).gather(self._work, [local(p).detach().contiguous() for p in params], packed)

    def _before(self, _: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        params = self._params()
        if [p._version for p in params] != self._versions:
            # Someone else wrote to the weights since the last step. To frozen ones?
            now = [torch.empty_like(t) for t in self._copy]
            self._gather(params, now)
            raise_on_drift(
                "guard", self._names, self._masks, self._copy, now,
                remedy="if they were loaded on purpose, call guard.refresh()", held=self._held,
            )  # fmt: skip
        self._zero_grads(params)

        def watched(closure: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                loss = closure()
                self._zero_grads(params)
                return loss

            return run

        if callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": watched(kwargs["closure"])}
        # args[0] is the optimizer itself
        return (args[0], *(watched(arg) if callable(arg) else arg for arg in args[1:])), kwargs

    @torch.no_grad()
    def _zero_grads(self, params: list[Tensor]) -> None:
        zero_listed_grads_(self._backend_name, self._work, self._gradients, params, self._names, self._shapes, "guard")

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        params = self._params()
        pieces = [local(p).detach() for p in params]
        targets = [piece.contiguous() for piece in pieces]
        self._backend(params).scatter_(self._work, targets, self._copy)
        for piece, target in zip(pieces, targets, strict=True):
            if target.data_ptr() != piece.data_ptr():
                piece.copy_(target)
        torch.autograd.graph.increment_version(params)
        self._versions = [p._version for p in params]


def guard(optimizer: Optimizer, plan: FreezePlan, model: torch.nn.Module, *, backend: str = "auto") -> Guard:
    """Freeze under ANY torch optimizer (SGD, Muon, Lion, 8-bit …): frozen weights are put back after every ``step()``.

    Before each step (and after a closure ran) the frozen gradients are zeroed, so that statistics over whole rows or
    matrices do not see them; after it the frozen bytes are written back from a packed copy taken now. The wrapped
    optimizer still keeps full-size state: `MaskedAdamW` does not, and is faster.

    Returns:
        A `Guard`; ``.remove()`` ends it, ``.refresh()`` accepts weights that were loaded on purpose.

    Raises:
        ValueError: the plan does not fit the model, or names a parameter the optimizer does not have.
        FrozenDriftError: at the next step, if someone else changed frozen weights in between. Writes through ``.data``
            leave no trace in autograd's version counters: those are put back without a word.
    """
    return Guard(optimizer, plan, model, backend)
