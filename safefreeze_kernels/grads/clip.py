"""Gradients of a frozen model: zero the frozen part, clip by the norm of the live part."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, Final, Literal, NamedTuple, Protocol, overload, runtime_checkable

import torch
import torch.distributed
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels.backend import Backend, choose_backend
from ..kernels.operands import STORAGE, NormKind
from ..kernels.parts import WorkList, compile_frozen, compile_live
from ..model.flat import in_engine
from ..model.sharding import local, local_mask, reduce_groups
from ..plan.binding import Model, bind, named_tensors
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .checks import overlaps_itself, settled
from .reader import GradientReader, Gradients

_NORM_KINDS: Final[dict[float, NormKind]] = {
    1.0: "sum_of_absolutes",
    2.0: "sum_of_squares",
    math.inf: "largest_absolute",
}


class ClippedNorm(NamedTuple):
    """What `clip_grad_norm_` returns with ``return_raw=True``: 0-dim tensors, before clipping."""

    live: Tensor  # norm over live elements: what was clipped by
    raw: Tensor  # norm over all elements, frozen ones included: what torch would have clipped by


@runtime_checkable
class StepsGradients(Protocol):
    """An optimizer that applies a factor to gradients inside its next step: `MaskedAdamW`, `MaskedAdam`."""

    param_groups: list[dict[str, Any]]

    @property
    def plan(self) -> FreezePlan | None: ...

    def multiply_gradients_(self, factor: Tensor, gradients: list[Tensor | None] | None = None) -> None: ...


class _Binding:
    """A plan's names found in a model: its trainable parameters, those the plan names first, and their work lists.

    Refers to modules and parameters weakly, so that remembering a binding keeps no model alive. ``named`` is all there
    is of a model that is no module.
    """

    def __init__(self, model: Model, named: list[tuple[str, Tensor]], plan: FreezePlan, operation: str) -> None:
        entries = bind(plan, named, operation=operation)
        self.plan_fingerprint = plan.fingerprint
        masked = {id(entry.param) for entry in entries}
        rest = {id(p): (name, p) for name, p in reversed(named) if id(p) not in masked}
        self.n_masked = len(entries)
        self.names = [entry.name for entry in entries] + [name for name, _ in rest.values()]
        params = [entry.param for entry in entries] + [p for _, p in rest.values()]
        self.masks = [local_mask(entry.mask, entry.param) for entry in entries] + [
            FreezeMask(local(p).shape) for _, p in rest.values()
        ]
        self.groups = list(map(reduce_groups, params))
        self._shapes = [p.shape for p in params]
        self._places = _places(params)
        self.sure = True  # the gradients were of the dtypes and on the device that the reader was made for
        self._params = [weakref.ref(p) for p in params]
        self._modules = (
            [weakref.ref(module) for module in model.modules()] if isinstance(model, torch.nn.Module) else None
        )
        self._contents = self._contents_now(named)
        self.reader = GradientReader(params, self.names)
        self.masked_reader = GradientReader(params[: self.n_masked], self.names[: self.n_masked])
        self.reader.check_packings(self.masks, operation, exactly=False)
        self.masks = [  # of a packed gradient, everything that is there is live
            mask if packed_by is None else FreezeMask(packed_by.packed_shape)
            for mask, packed_by in zip(self.masks, self.reader.packings, strict=True)
        ]

    def params(self, named: list[tuple[str, Tensor]] | None) -> list[Tensor] | None:
        """The parameters, if the model still holds the same modules and parameters of the same looks.

        ``named``: the pairs of a model that is no module.
        """
        params: list[Any] = [ref() for ref in self._params]
        if self._contents_now(named) != self._contents or any(p is None for p in params):
            return None
        if list(map(_SHAPE, params)) != self._shapes or not all(map(_TRAINS, params[: self.n_masked])):
            return None
        # The lists do not depend on these, and to look at them always would cost a third more.
        if not self.sure and _places(params) != self._places:
            return None
        return params if self.reader.packed_as_before(params) else None

    def _contents_now(self, named: list[tuple[str, Tensor]] | None) -> list[Any] | None:
        """Which parameters and submodules each module has, by identity, or the pairs; None if a module is gone."""
        if self._modules is None:
            return [item for name, p in named or () for item in (name, id(p))]
        contents: list[Any] = []
        for ref in self._modules:
            module = ref()
            if module is None:
                return None
            contents += module._parameters.values()
            contents += module._modules.values()
        return list(map(id, contents))

    @cached_property
    def live(self) -> WorkList:
        """What trains, in all parameters."""
        return compile_live(self.masks)

    @cached_property
    def frozen(self) -> WorkList:
        """What does not, in the first `n_masked` parameters."""
        return compile_frozen(self.masks[: self.n_masked])


_SHAPE: Final = attrgetter("shape")
_TRAINS: Final = attrgetter("requires_grad")
_REMEMBERED: Final = 4
# A module, or the first tensor of what else was given -> its last bindings, newest first. They die with it.
_bindings: Final = WeakIdKeyDictionary()


def _bind(model: Model, plan: FreezePlan | None, operation: str) -> tuple[_Binding, list[Tensor]]:
    """The binding and its parameters. The last ones are remembered: a model trains under one plan, but the parts of one
    may be clipped apart, and clipped by another plan than zeroed."""
    plan = plan if plan is not None else FreezePlan()
    if not isinstance(plan, FreezePlan):
        raise TypeError(f"{operation}: plan is a {type(plan).__name__}, expected a FreezePlan (or None)")
    named = None if isinstance(model, torch.nn.Module) else named_tensors(model)
    owner: Any = model if named is None else named[0][1] if named else None
    remembered: list[_Binding] = _bindings.setdefault(owner, []) if owner is not None else []  # type: ignore[no-untyped-call]
    for known in remembered:
        if known.plan_fingerprint == plan.fingerprint and (params := known.params(named)) is not None:
            _refuse_engine(known.names[:1], params[:1], operation)
            return known, params
    named = named_tensors(model) if named is None else named
    _refuse_engine([name for name, _ in named], [p for _, p in named], operation)
    binding = _Binding(model, named, plan, operation)
    params = binding.params(None if isinstance(model, torch.nn.Module) else named)
    assert params is not None
    remembered[:] = [binding, *remembered[: _REMEMBERED - 1]]
    return binding, params


def _refuse_engine(names: Sequence[str], params: Sequence[Tensor], operation: str) -> None:
    """Raise ValueError if an engine takes gradients away: nothing would be zeroed or clipped, in silence."""
    name = next((name for name, p in zip(names, params, strict=True) if in_engine(p)), None)
    if name is not None:
        raise ValueError(
            f"{operation}: DeepSpeed ZeRO takes away the gradient of {name!r} as soon as it is there; MaskedAdamW "
            "zeroes what is frozen before that, so that the engine's own norm is the live one: set gradient_clipping "
            "in its config, and ask engine.get_global_grad_norm()"
        )


def _places(params: list[Tensor]) -> list[Any]:
    return [(p.dtype, p.device) for p in params]


class _Writable:
    """Gradients to be written to. Kernels see contiguous ones: others are copied, and copied back by `finish`."""

    def __init__(self, reader: GradientReader, params: list[Tensor], operation: str) -> None:
        read = reader.read(params, operation)
        for tensor, name in () if read.plain else zip(read, reader.names, strict=True):
            if tensor is not None and overlaps_itself(tensor):
                raise ValueError(
                    f"{operation}: grad of {name!r} overlaps itself in memory (stride {tensor.stride()}) and cannot be "
                    "written to; assign its .contiguous() copy"
                )
        self._read, self.plain = read, read.plain
        self.grads = read if read.plain else Gradients([t if t is None else settled(t) for t in read])

    def finish(self) -> None:
        """The gradients that were read hold what was written, and autograd knows."""
        torch.autograd.graph.increment_version(
            self._read.tensors if self.plain else [t for t in self._read if t is not None]  # type: ignore[arg-type]
        )
        for original, used in () if self.plain else zip(self._read, self.grads, strict=True):
            if original is not None and used is not None and used is not original:
                original.copy_(used)

    def backend(self, name: str, operation: str) -> Backend:
        """The backend of that name, or the best, for these gradients."""
        devices = {g.device for g in (self.grads[:1] if self.plain else self.grads) if g is not None}
        if len(devices) > 1:
            raise ValueError(f"{operation}: gradients are on {sorted(map(str, devices))}, expected one device")
        dtypes = STORAGE if self.plain else self.dtypes
        return choose_backend(name, next(iter(devices), torch.device("cpu")), operation, dtypes)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of those that are not plain: else they are of `STORAGE`."""
        return set() if self.plain else {g.dtype for g in self.grads if g is not None}


def zero_listed_grads_(
    backend: str, work: WorkList, reader: GradientReader, params: list[Tensor], operation: str
) -> bool:
    """Zero what a frozen list visits in the gradients of ``params``; whether these were plain (`Gradients`)."""
    ready = _Writable(reader, params, operation)
    ready.backend(backend, operation).zero_(work, ready.grads)
    ready.finish()
    return ready.plain


@torch.no_grad()
def zero_frozen_grads_(model: Model, plan: FreezePlan, *, backend: str = "auto") -> None:
    """Set the gradients of frozen elements to zero, in place; visits nothing else.

    This does NOT freeze: with a zero gradient, weight decay and old momentum still move a weight. `MaskedAdamW` and
    `guard` freeze. Parameters without a gradient are left alone.

    Args:
        model: a module, a mapping name -> parameter, or (name, parameter) pairs.
        plan: what is frozen.

    Raises:
        ValueError: the plan does not fit the model.
    """
    operation = "zero_frozen_grads_"
    binding, params = _bind(model, plan, operation)
    masked = params[: binding.n_masked]
    binding.sure = zero_listed_grads_(backend, binding.frozen, binding.masked_reader, masked, operation)


@overload
def clip_grad_norm_(
    model: Model, max_norm: float | Tensor, plan: FreezePlan | None = ..., norm_type: float = ...,
    error_if_nonfinite: bool = ..., *, return_raw: Literal[False] = ..., optimizer: StepsGradients | None = ...,
    backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def clip_grad_norm_(
    model: Model, max_norm: float | Tensor, plan: FreezePlan | None = ..., norm_type: float = ...,
    error_if_nonfinite: bool = ..., *, return_raw: Literal[True], optimizer: StepsGradients | None = ...,
    backend: str = ...,
) -> ClippedNorm: ...  # fmt: skip
@torch.no_grad()
def clip_grad_norm_(
    model: Model, max_norm: float | Tensor, plan: FreezePlan | None = None, norm_type: float = 2.0,
    error_if_nonfinite: bool = False, *, return_raw: bool = False, optimizer: StepsGradients | None = None,
    backend: str = "auto",
) -> Tensor | ClippedNorm:  # fmt: skip
    """`torch.nn.utils.clip_grad_norm_` over live elements only: frozen gradients neither count nor change.

    Live gradients are multiplied by ``min(1, max_norm / (norm + 1e-6))``, as in torch. NaN or inf in a frozen gradient
    has no effect. The norm is accumulated in double. Of sharded parameters it is the norm over all ranks, which must
    all call this.

    Args:
        model: a module, a mapping name -> parameter, or (name, parameter) pairs; all its gradients are clipped, those
            of parameters the plan does not name included.
        max_norm: the largest norm left.
        plan: what is frozen; None: nothing.
        norm_type: 2.0, 1.0 or ``math.inf``.
        error_if_nonfinite: raise if the live norm is NaN or inf.
        return_raw: also return the norm that counts frozen elements (one more pass, over the frozen part).
        optimizer: a `MaskedAdamW` or `MaskedAdam` of exactly these parameters. Gradients are then left as they are and
            the factor is applied inside its next step, which saves reading and writing them once more. The result is
            the same, but for one rounding of 16-bit gradients. The factor belongs to these gradients, the plan and the
            state as they are: whatever changes one of them comes before this call, or the step raises RuntimeError.
            Gradients that are dropped take the factor with them; ``optimizer.zero_grad()`` drops a factor no step took,
            another call replaces it. The plan may be left out: it is the optimizer's.

    Returns:
        The live norm before clipping, a 0-dim float32 tensor on the gradients' device (float64 if there are float64 or
        complex128 ones, as in torch); with ``return_raw`` a `ClippedNorm`. On a GPU nothing waits for it, unless
        ``error_if_nonfinite``.

    Raises:
        ValueError: the plan does not fit the model; gradients on several devices; ``optimizer`` has other parameters or
            another plan than the model.
        TypeError: ``optimizer`` is none of ours.
    """
    operation = "clip_grad_norm_"
    kind, largest = _checked_norm(norm_type, max_norm, operation)
    if optimizer is not None:
        known = _checked_optimizer(optimizer, operation).plan
        plan = known if plan is None else plan
    binding, params = _bind(model, plan, operation)
    same = optimizer is not None and _check_same_gradients(optimizer, params, binding.names, plan or FreezePlan())
    ready = _Writable(binding.reader, params, operation)
    chosen = ready.backend(backend, operation)
    norm, raw = _norms(chosen, binding, params, ready.grads, kind, return_raw)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"{operation}: the live gradient norm is {norm.item()}; nothing was clipped")
    exact = torch.float64 if {torch.float64, torch.complex128} & ready.dtypes else torch.float32
    factor = (largest / (norm + 1e-6)).clamp(max=1.0).to(exact)  # NaN stays: torch spreads a NaN norm too
    if optimizer is None:
        chosen.scale_(binding.live, ready.grads, factor)
        ready.finish()
    elif any(g is not None for g in ready.grads):
        optimizer.multiply_gradients_(factor, ready.grads.tensors if same and ready.grads.own else None)
    binding.sure = ready.plain
    return ClippedNorm(norm.to(exact), raw.to(exact)) if return_raw else norm.to(exact)


def _checked_norm(norm_type: float, max_norm: float | Tensor, operation: str) -> tuple[NormKind, float | Tensor]:
    """Which norm, and the largest one left, as a number or as a 0-dim tensor where it is on a device."""
    kind = _NORM_KINDS.get(float(norm_type))
    if kind is None:
        raise ValueError(f"{operation}: norm_type is {norm_type}, expected 2.0, 1.0 or inf")
    if not isinstance(max_norm, (int, float, Tensor)):
        raise TypeError(f"{operation}: max_norm is a {type(max_norm).__name__}, expected a number >= 0")
    if isinstance(max_norm, Tensor) and max_norm.device.type != "cpu":
        return kind, max_norm.detach().double().reshape(())  # to look at it would be to wait for it
    if not (max_norm := float(max_norm)) >= 0:
        raise ValueError(f"{operation}: max_norm is {max_norm}, expected a number >= 0")
    return kind, max_norm


def _checked_optimizer(optimizer: StepsGradients, operation: str) -> StepsGradients:
    if not isinstance(optimizer, StepsGradients):
        raise TypeError(
            f"{operation}: optimizer is a {type(optimizer).__name__}, expected a MaskedAdamW or MaskedAdam (unwrap a "
            "wrapper first, for example accelerated.optimizer); for another one, clip without optimizer="
        )
    return optimizer


def _norms(
    backend: Backend, binding: _Binding, params: list[Tensor], grads: Gradients, kind: NormKind, with_raw: bool
) -> tuple[Tensor, Tensor]:
    """Norms over the live elements and (``with_raw``, else the same) over all: 0-dim float64 tensors on the gradients'
    device, so that nothing waits for them."""
    device = next((local(p).device for p in params), torch.device("cpu"))
    totals = [_norm_over_ranks(backend, binding.live, grads, kind, binding.groups, device)]
    if with_raw:
        n = binding.n_masked
        frozen = _norm_over_ranks(backend, binding.frozen, grads[:n], kind, binding.groups[:n], device)
        totals.append(torch.maximum(totals[0], frozen) if kind == "largest_absolute" else totals[0] + frozen)
    live, *_, raw = [total.sqrt() if kind == "sum_of_squares" else total for total in (*totals, totals[-1])]
    return live, raw


def _norm_over_ranks(
    backend: Backend, work: WorkList, grads: Sequence[Tensor | None], kind: NormKind,
    groups: Sequence[tuple[Any, ...]], device: torch.device,
) -> Tensor:  # fmt: skip
    """`Backend.norm` of gradients of which ranks have shards; ``groups``: `sharding.reduce_groups` of each."""
    parts = []
    ways = list(dict.fromkeys(groups))  # in one order on all ranks
    largest = kind == "largest_absolute"
    for way in ways:
        alike = grads if len(ways) == 1 else [g if w == way else None for g, w in zip(grads, groups, strict=True)]
        part = backend.norm(work, alike, kind).to(device)
        for group in way:
            # a maximum over ranks may lose a NaN
            both = torch.stack([part.nan_to_num(nan=0.0, posinf=math.inf), part.isnan().double()]) if largest else part
            torch.distributed.all_reduce(both, getattr(torch.distributed.ReduceOp, "MAX" if largest else "SUM"), group)
            part = torch.where(both[1] > 0, math.nan, both[0]) if largest else both
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    total = torch.stack(parts) if parts else torch.zeros(1, dtype=torch.float64, device=device)
    return total.amax() if largest else total.sum()


def _check_same_gradients(
    optimizer: StepsGradients, params: Sequence[Tensor], names: Sequence[str], plan: FreezePlan
) -> bool:
    """Raise unless ``optimizer`` steps exactly these parameters, under the same plan. Returns whether neither has
    others, that do not train: then the gradients of one are those of the other."""
    operation, what = "clip_grad_norm_", type(optimizer).__name__
    if (optimizer.plan or FreezePlan()).fingerprint != plan.fingerprint:
        raise ValueError(
            f"{operation}: optimizer is a {what} with another freeze plan; pass the plan it has, or leave plan out"
        )
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    known = set(map(id, stepped))
    for p, name in zip(params, names, strict=True):
        if p.requires_grad and id(p) not in known:
            raise ValueError(
                f"{operation}: {name!r} is in the model but not in optimizer, and its gradient would stay unclipped; "
                "give it to the optimizer, or clip without optimizer="
            )
    if len(known) > sum(p.requires_grad for p in params):
        raise ValueError(
            f"{operation}: optimizer has {len(known)} parameters, expected the model's {len(params)}: others would be "
            "scaled by a norm that does not count them; pass the model that holds them all, or clip without optimizer="
        )
    return len(params) == len(known) == sum(len(group["params"]) for group in optimizer.param_groups)
