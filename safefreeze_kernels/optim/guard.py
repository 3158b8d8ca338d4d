"""`guard`: a freeze plan kept under any torch optimizer."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..grads.checks import check_gradient
from ..grads.clip import zero_listed_grads_
from ..grads.reader import GradientReader, writes
from ..kernels.backend import Backend, choose_backend
from ..kernels.parts import compile_frozen
from ..model.flat import in_engine
from ..model.sharding import held, local, local_gradient, local_mask
from ..plan.binding import Model, bind, computed_from, named_tensors
from ..plan.plan import FreezePlan
from ..proof.drift import raise_on_drift
from .checks import check_parameter, checked_plan


class _FrozenWeights:
    """What a plan freezes in a model, of sharded weights in the shards of this rank, with a packed copy of it.

    Weights are found by name at every use: frameworks swap parameter objects, in the model and in the optimizer.
    """

    def __init__(self, plan: FreezePlan, model: Model, optimizer: Optimizer, backend: str) -> None:
        self._model, self._backend_name = model, backend
        bound = bind(plan, named_tensors(model), operation="guard")
        known = _params_of(optimizer)
        for entry in bound:
            _refuse_engine(entry.name, entry.param)
            check_parameter(entry.param, "guard", entry.name)
            if id(entry.param) not in known:
                raise ValueError(f"guard: {entry.name!r} is in the plan and the model but not in the optimizer")
            if (grad := local_gradient(entry.param)) is not None:
                check_gradient(local(entry.param), grad, entry.name, "guard")
        params = [entry.param for entry in bound]
        self._names = [entry.name for entry in bound]
        self._masks = [entry.mask for entry in bound]
        self._held = list(map(held, params))
        self._looks = list(map(_look, params))
        self._work = compile_frozen([local_mask(entry.mask, entry.param) for entry in bound])
        self._gradients = GradientReader(params, self._names)
        self.copy(params)

    def find(self, optimizer: Optimizer | None = None) -> list[Tensor]:
        """The parameters. Raises ValueError if the copy does not fit them, or ``optimizer`` has others."""
        named = dict(named_tensors(self._model))
        lost = next((name for name in self._names if name not in named), None)
        if lost is not None:
            remedy = computed_from(lost, named) or "; guard it under its new name"
            raise ValueError(f"guard: {lost!r} is no longer a parameter of the model{remedy}")
        params = [named[name] for name in self._names]
        for name, p in zip(self._names, params, strict=True):
            _refuse_engine(name, p)
        looks = list(map(_look, params))
        if looks != self._looks:
            for name, p, now, before in zip(self._names, params, looks, self._looks, strict=True):
                check_parameter(p, "guard", name)
                if now[:-1] != before[:-1]:
                    raise ValueError(
                        f"guard: {name!r} is {_described(now)}, expected {_described(before)} as before; guard it anew"
                    )
            self._looks = looks
        known = set(map(id, params)) if optimizer is None else _params_of(optimizer)
        stale = next((name for name, p in zip(self._names, params, strict=True) if id(p) not in known), None)
        if stale is not None:
            raise ValueError(
                f"guard: the model's {stale!r} is not among the parameters that the optimizer holds, as it was: "
                "model or optimizer was given another one (load_state_dict(..., assign=True), a replaced layer, a "
                "removed group), so what is trained is not what is guarded; make the optimizer anew from the model "
                "and guard that"
            )
        return params

    def copy(self, params: list[Tensor]) -> None:
        """Take the present values as the frozen ones."""
        self.packed = self._gathered(params)
        self._seen = _traces(params)

    def check(self, params: list[Tensor]) -> None:
        """Raise FrozenDriftError if frozen weights are not those of the copy, as far as writes leave traces."""
        if _traces(params) != self._seen:
            raise_on_drift(
                "guard", self._names, self._masks, self.packed, self._gathered(params),
                remedy="if they were loaded on purpose, call guard.refresh()", held=self._held,
            )  # fmt: skip

    @torch.no_grad()
    def zero_gradients(self, params: list[Tensor]) -> None:
        zero_listed_grads_(self._backend_name, self._work, self._gradients, params, "guard")

    @torch.no_grad()
    def put_back(self, params: list[Tensor]) -> None:
        """Write the copy into the weights, whoever moved them."""
        shards = [local(p).detach() for p in params]
        targets = [shard.contiguous() for shard in shards]
        self._backend(shards).scatter_(self._work, targets, self.packed)
        for shard, target in zip(shards, targets, strict=True):
            if target.data_ptr() != shard.data_ptr():
                shard.copy_(target)
        torch.autograd.graph.increment_version(params)
        self._seen = _traces(params)

    @torch.no_grad()
    def _gathered(self, params: list[Tensor]) -> list[Tensor]:
        shards = [local(p).detach() for p in params]
        sizes = zip(self._work.packed_sizes, shards, strict=True)
        packed = [torch.empty(size, dtype=shard.dtype, device=shard.device) for size, shard in sizes]
        self._backend(shards).gather(self._work, [shard.contiguous() for shard in shards], packed)
        return packed

    def _backend(self, shards: list[Tensor]) -> Backend:
        devices = {shard.device for shard in shards} or {torch.device("cpu")}
        if len(devices) > 1:
            raise ValueError(
                f"guard: the plan's parameters are on {len(devices)} devices, expected one; guard each part"
            )
        return choose_backend(self._backend_name, devices.pop(), "guard", {shard.dtype for shard in shards})


def _refuse_engine(name: str, param: Tensor) -> None:
    if in_engine(param):
        raise ValueError(
            f"guard: DeepSpeed ZeRO steps {name!r} in flat partitions, and would overwrite what is put back; "
            "use MaskedAdamW or MaskedAdam"
        )


class Guard:
    """Keeps a plan's weights where they are under any `torch.optim.Optimizer`. Made by `guard`."""

    def __init__(self, optimizer: Optimizer, plan: FreezePlan, model: Model, backend: str) -> None:
        # torch hooks a class's step when the first of its optimizers is made; accelerate's wrapper never is
        if not isinstance(optimizer, Optimizer) or not getattr(type(optimizer).step, "hooked", False):
            raise TypeError(
                f"guard: optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer "
                "(unwrap a wrapper first, for example accelerated.optimizer)"
            )
        self.plan = checked_plan(plan, "guard")
        self.model = model if isinstance(model, (torch.nn.Module, Mapping)) else named_tensors(model)
        self._weights = _FrozenWeights(self.plan, self.model, optimizer, backend)
        self.stepping = 0  # steps under way: more than one if a class's step calls that of its base
        self._inside = False  # another method of the optimizer is under way
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        _watch_methods(optimizer)

    def refresh(self) -> None:
        """Take the present values as the frozen ones, after weights were loaded on purpose."""
        self._weights.copy(self._weights.find())

    def remove(self) -> None:
        """Stop guarding. The weights stay as they are and train from now on."""
        for handle in self._handles:
            handle.remove()

    @property
    def nbytes(self) -> int:
        """Memory of the packed copy."""
        return sum(t.numel() * t.element_size() for t in self._weights.packed)

    def put_back(self) -> None:
        """Write the frozen weights back, whoever moved them."""
        self._weights.put_back(self._weights.find())

    @contextlib.contextmanager
    def around(self, optimizer: Optimizer) -> Iterator[None]:
        """What a step gets, for another method of ``optimizer``; nothing for one that a step or a method calls."""
        if self.stepping or self._inside:
            yield
            return
        self._prepared(optimizer)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self.put_back()

    def _prepared(self, optimizer: Optimizer) -> list[Tensor]:
        """The weights, with frozen gradients zeroed. Raises if someone else wrote to them since the last step."""
        params = self._weights.find(optimizer)
        if not self.stepping and not self._inside:
            self._weights.check(params)
        self._weights.zero_gradients(params)
        return params

    def _before(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        params = self._prepared(optimizer)
        self.stepping += 1

        def watched(argument: Any) -> Any:
            """A closure leaves frozen gradients zeroed; what is none stays as it is."""

            def closure() -> Any:
                loss = argument()
                self._weights.zero_gradients(params)
                return loss

            return closure if callable(argument) else argument

        if "closure" in kwargs:
            kwargs = {**kwargs, "closure": watched(kwargs["closure"])}
        return (args[0], *map(watched, args[1:])), kwargs  # args[0] is the optimizer itself

    def _after(self, *_: Any) -> None:
        self.put_back()
        self.stepping = max(self.stepping - 1, 0)


def _params_of(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _look(p: Tensor) -> tuple[Any, ...]:
    """What the packed copy and its list were made for; and the strides, which may change."""
    shard = local(p)
    return p.shape, p.dtype, shard.shape, shard.device, shard.stride() if shard.layout == torch.strided else None


def _described(look: tuple[Any, ...]) -> str:
    shape, dtype, shard, device, _ = look
    return f"{tuple(shape)} {dtype} on {device}" + (f" (this rank: {tuple(shard)})" if shard != shape else "")


def _traces(params: list[Tensor]) -> list[tuple[int, int]]:
    """What changes when someone writes to a parameter, or gives it other memory."""
    return [(writes(p), local(p).data_ptr()) for p in params]


def guards_of(optimizer: Any) -> list[Guard]:
    """The guards in force around ``optimizer``, oldest first."""
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", {})
    return [owner for hook in hooks.values() if isinstance(owner := getattr(hook, "__self__", None), Guard)]


def _watch_methods(optimizer: Optimizer) -> None:
    """Have ``step``, if it raises, and every public method that torch's optimizers do not have call the guards: what
    writes weights beside ``step`` goes by any name (``eval``, ``first_step``, ``swap_weights``)."""
    for name in dir(type(optimizer)):
        method = inspect.getattr_static(type(optimizer), name)
        ordinary = inspect.isroutine(method) and not isinstance(method, (staticmethod, classmethod))
        writes = name == "step" or not (name.startswith("_") or hasattr(Optimizer, name))
        own = vars(optimizer).get(name)
        if ordinary and writes and not hasattr(own, "guarded"):
            # bound as the method is, so that a copy of the optimizer gets one of its own
            setattr(optimizer, name, MethodType(_guarded(name, method, own), optimizer))


def _guarded(name: str, method: Any, own: Any) -> Callable[..., Any]:
    """``name`` of an optimizer with its guards around it. ``own``: what the instance had under the name."""
    around = _failing if name == "step" else _around

    @functools.wraps(method if own is None else own)
    def guarded(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with around(self):
            found = own(*args, **kwargs) if own is not None else getattr(type(self), name)(self, *args, **kwargs)
        if isinstance(found, contextlib._GeneratorContextManager):  # it has not run yet
            return _entered(self, found)
        return found

    guarded.guarded = True  # type: ignore[attr-defined]
    return guarded


@contextlib.contextmanager
def _failing(optimizer: Optimizer) -> Iterator[None]:
    """A step that raises half-way has run no hook after it."""
    try:
        yield
    except BaseException:
        for one in guards_of(optimizer):
            if one.stepping:
                one.stepping = 0
                one.put_back()
        raise


@contextlib.contextmanager
def _around(optimizer: Optimizer) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for one in guards_of(optimizer):
            stack.enter_context(one.around(optimizer))
        yield


@contextlib.contextmanager
def _entered(optimizer: Optimizer, context: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
    """A context manager that a method of an optimizer made: frozen weights are put back when it is entered and left."""
    try:
        with contextlib.ExitStack() as stack:
            with _around(optimizer):
                value = stack.enter_context(context)
            yield value
    finally:  # not looking for drift first: whatever was written, what was swapped in must go out
        for one in guards_of(optimizer):
            one.put_back()


def guard(optimizer: Optimizer, plan: FreezePlan, model: Model, *, backend: str = "auto") -> Guard:
    """Freeze under ANY torch optimizer (SGD, Muon, Lion, 8-bit …): frozen weights are put back after every ``step()``.

    Before each step (and after a closure ran) the frozen gradients are zeroed, so that statistics over whole rows or
    matrices do not see them; after it the frozen bytes are written back from a packed copy taken now. The same happens
    around every other public method that the optimizer's class has and torch's optimizers do not, since some write
    weights too: ``eval()`` and ``train()`` of schedule-free optimizers, SAM's ``first_step()``, a swap of averages. The
    wrapped optimizer still keeps full-size state: `MaskedAdamW` does not, and is faster.

    What functions outside the optimizer write (an average kept beside it, for example) is not seen before the next step
    or `Snapshot.verify`.

    Args:
        optimizer: it must have been made by `torch.optim.Optimizer`'s constructor: unwrap wrappers.
        plan: what is frozen.
        model: a module, a mapping name -> parameter, or (name, parameter) pairs.
        backend: "auto", or one of the names `safefreeze info` lists.

    Returns:
        A `Guard`; ``.remove()`` ends it, ``.refresh()`` accepts weights that were loaded on purpose.

    Raises:
        ValueError: the plan does not fit the model, or names a parameter the optimizer does not have. At a later step:
            the model has another parameter under the name than the optimizer (``load_state_dict(..., assign=True)``),
            or one of another shape, dtype or device.
        FrozenDriftError: at the next step, if someone else changed frozen weights in between. Writes into ``.data``
            leave no trace in autograd's version counters: those are put back without a word.
    """
    return Guard(optimizer, plan, model, backend)
