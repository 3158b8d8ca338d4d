"""Gradients of a frozen model: zero the frozen part, clip by the norm of the live part."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Final, Literal, NamedTuple, Protocol, overload, runtime_checkable

import torch
import torch.distributed
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels.backend import Backend, choose_backend
from ..kernels.operands import STORAGE, GradientList, NormKind
from ..kernels.parts import WorkList, compile_frozen, compile_live
from ..model.sharding import local, local_mask, reduce_groups
from ..plan.binding import Model, bind, named_tensors
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .checks import check_gradient, check_packing, overlaps_itself, settled
from .reader import GradientReader

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


class _Bound:
    """A plan bound to a model: its trainable parameters, those the plan names first, and the lists compiled for them.

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
        self.shapes = [p.shape for p in params]
        self._places = _places(params)
        self.sure = True  # the gradients were of the dtypes and on the device that the reader was made for
        self._params = [weakref.ref(p) for p in params]
        self._modules = (
            [weakref.ref(module) for module in model.modules()] if isinstance(model, torch.nn.Module) else None
        )
        self._contents = self._held(named)
        self.gradients, self.masked_gradients = GradientReader(params), GradientReader(params[: self.n_masked])
        # of a packed gradient, everything that is held is live
        for i, (packing, mask) in enumerate(zip(self.gradients.packings, self.masks, strict=True)):
            if packing is not None:
                check_packing(packing, mask | packing, self.names[i], operation)
                self.masks[i] = FreezeMask(packing.packed_shape)
        self._live: WorkList | None = None
        self._frozen: WorkList | None = None

    def params(self, named: list[tuple[str, Tensor]] | None) -> list[Tensor] | None:
        """The parameters, if the model still holds the same modules and parameters of the same looks.

        ``named``: the pairs of a model that is no module.
        """
        params: list[Any] = [ref() for ref in self._params]
        if self._held(named) != self._contents or any(p is None for p in params):
            return None
        if list(map(_SHAPE, params)) != self.shapes or not all(map(_TRAINS, params[: self.n_masked])):
            return None
        # The lists do not depend on these, and to look at them always would cost a third more.
        if not self.sure and _places(params) != self._places:
            return None
        return params if self.gradients.reads(params) else None

    def _held(self, named: list[tuple[str, Tensor]] | None) -> list[Any] | None:
        """Which parameters and submodules each module holds, by identity, or the pairs; None if a module is gone."""
        if self._modules is None:
            return [item for name, p in named or () for item in (name, id(p))]
        held: list[Any] = []
        for ref in self._modules:
            module = ref()
            if module is None:
                return None
            held += module._parameters.values()
            held += module._modules.values()
        return list(map(id, held))

    @property
    def live(self) -> WorkList:
        """What trains, in all parameters."""
        if self._live is None:
            self._live = compile_live(self.masks)
        return self._live

    @property
    def frozen(self) -> WorkList:
        """What does not, in the first `n_masked` parameters."""
        if self._frozen is None:
            self._frozen = compile_frozen(self.masks[: self.n_masked])
        return self._frozen


_SHAPE: Final = attrgetter("shape")
_TRAINS: Final = attrgetter("requires_grad")
_REMEMBERED: Final = 4
# A module, or the first tensor of what else was given -> its last bindings, newest first. They die with it.
_bindings: Final = WeakIdKeyDictionary()


def _bind(model: Model, plan: FreezePlan | None, operation: str) -> tuple[_Bound, list[Tensor]]:
    """The binding and its parameters. The last ones are remembered: a model trains under one plan, but the parts of one
    may be clipped apart, and clipped by another plan than zeroed."""
    plan = plan if plan is not None else FreezePlan()
    if not isinstance(plan, FreezePlan):
        raise TypeError(f"{operation}: plan is a {type(plan).__name__}, expected a FreezePlan (or None)")
    named = None if isinstance(model, torch.nn.Module) else named_tensors(model)
    owner: Any = model if named is None else named[0][1] if named else None
    remembered: list[_Bound] = _bindings.setdefault(owner, []) if owner is not None else []  # type: ignore[no-untyped-call]
    for known in remembered:
        if known.plan_fingerprint == plan.fingerprint and (params := known.params(named)) is not None:
            return known, params
    bound = _Bound(model, named_tensors(model) if named is None else named, plan, operation)
    params = bound.params(named)
    assert params is not None
    remembered[:] = [bound, *remembered[: _REMEMBERED - 1]]
    return bound, params


def _places(params: list[Tensor]) -> list[Any]:
    return [(p.dtype, p.device) for p in params]


def read_gradients(
    reader: GradientReader,
    params: list[Tensor],
    names: Sequence[str],
    shapes: Sequence[torch.Size],
    operation: str,
    dtypes: Sequence[torch.dtype] | None = None,
) -> GradientList:
    """The gradients of ``params``, checked. ``dtypes``: what each must have; None: as in `check_gradient`."""
    grads = reader.read(params)
    if not grads.plain:
        for grad, p, name, shape, packing in zip(grads, params, names, shapes, reader.packings, strict=True):
            if p.shape != shape:
                raise ValueError(f"{operation}: {name!r} has shape {tuple(p.shape)}, expected {tuple(shape)} as before")
            if grad is not None:
                piece = local(p) if packing is None else p.new_empty((1,)).expand(packing.packed_shape)
                check_gradient(piece, grad, name, operation, None if dtypes is None else (p.dtype,))
    return grads


class _Contiguous:
    """Gradients to be written to. Kernels see contiguous ones: others are copied, and copied back by `finish`."""

    def __init__(self, tensors: GradientList, names: Sequence[str], operation: str) -> None:
        for tensor, name in () if tensors.plain else zip(tensors, names, strict=True):
            if tensor is not None and overlaps_itself(tensor):
                raise ValueError(
                    f"{operation}: grad of {name!r} overlaps itself in memory (stride {tensor.stride()}) and cannot be "
                    "written to; assign its .contiguous() copy"
                )
        self.originals, self.plain = tensors, tensors.plain
        self.tensors = tensors if self.plain else GradientList(t if t is None else settled(t) for t in tensors)

    def finish(self) -> None:
        """The originals hold what was written, and autograd knows."""
        if self.plain:
            torch.autograd.graph.increment_version(self.originals)  # type: ignore[arg-type]
            return
        torch.autograd.graph.increment_version([t for t in self.originals if t is not None])
        for original, used in zip(self.originals, self.tensors, strict=True):
            if original is not None and used is not None and used is not original:
                original.copy_(used)


def _one_backend(name: str, grads: GradientList, operation: str) -> Backend:
    devices = {g.device for g in (grads[:1] if grads.plain else grads) if g is not None}
    if len(devices) > 1:
        raise ValueError(f"{operation}: gradients are on {sorted(map(str, devices))}, expected one device")
    dtypes = STORAGE if grads.plain else {g.dtype for g in grads if g is not None}
    return choose_backend(name, next(iter(devices), torch.device("cpu")), operation, dtypes)


def zero_listed_grads_(
    backend: str,
    work: WorkList,
    reader: GradientReader,
    params: list[Tensor],
    names: Sequence[str],
    shapes: Sequence[torch.Size],
    operation: str,
) -> bool:
    """Zero what a frozen list visits in the gradients of ``params``; whether these were `plain <GradientList>`."""
    ready = _Contiguous(read_gradients(reader, params, names, shapes, operation), names, operation)
    chosen = _one_backend(backend, ready.tensors, operation)
    chosen.zero_(work, ready.tensors)
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
    bound, params = _bind(model, plan, "zero_frozen_grads_")
    n = bound.n_masked
    bound.sure = zero_listed_grads_(
        backend,
        bound.frozen,
        bound.masked_gradients,
        params[:n],
        bound.names[:n],
        bound.shapes[:n],
        "zero_frozen_grads_",
    )


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
    model: Model,
    max_norm: float | Tensor,
    plan: FreezePlan | None = None,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    return_raw: bool = False,
    optimizer: StepsGradients | None = None,
    backend: str = "auto",
) -> Tensor | ClippedNorm:
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
    kind = _NORM_KINDS.get(float(norm_type))
    if kind is None:
        raise ValueError(f"{operation}: norm_type is {norm_type}, expected 2.0, 1.0 or inf")
    if not isinstance(max_norm, (int, float, Tensor)):
        raise TypeError(f"{operation}: max_norm is a {type(max_norm).__name__}, expected a number >= 0")
    if isinstance(max_norm, Tensor) and max_norm.device.type != "cpu":
        max_norm = max_norm.detach().double().reshape(())  # to look at it would be to wait for it
    elif not (max_norm := float(max_norm)) >= 0:
        raise ValueError(f"{operation}: max_norm is {max_norm}, expected a number >= 0")
    if optimizer is not None:
        if not isinstance(optimizer, StepsGradients):
            raise TypeError(
                f"{operation}: optimizer is a {type(optimizer).__name__}, expected a MaskedAdamW or MaskedAdam (unwrap "
                "a wrapper first, for example accelerated.optimizer); for another one, clip without optimizer="
            )
        plan = plan if plan is not None else optimizer.plan
    bound, params = _bind(model, plan, operation)
    if optimizer is not None:
        same = _check_same_gradients(optimizer, params, bound.names, plan or FreezePlan())
    grads = _Contiguous(
        read_gradients(bound.gradients, params, bound.names, bound.shapes, operation), bound.names, operation
    )
    chosen = _one_backend(backend, grads.tensors, operation)
    dtypes = () if grads.plain else {g.dtype for g in grads.tensors if g is not None}
    exact = torch.float64 if {torch.float64, torch.complex128}.intersection(dtypes) else torch.float32
    # On the gradients' device from here on: nothing waits for it.
    device = next((local(p).device for p in params), torch.device("cpu"))
    live = _norm_over_ranks(chosen, bound.live, grads.tensors, kind, bound.groups, device)
    norm = live.sqrt() if kind == "sum_of_squares" else live
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"{operation}: the live gradient norm is {norm.item()}; nothing was clipped")
    raw = norm
    if return_raw:
        n = bound.n_masked
        masked = GradientList(grads.tensors[:n])
        frozen = _norm_over_ranks(chosen, bound.frozen, masked, kind, bound.groups[:n], device)
        both = torch.maximum(live, frozen) if kind == "largest_absolute" else live + frozen
        raw = both.sqrt() if kind == "sum_of_squares" else both
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0).to(exact)  # NaN stays: torch spreads a NaN norm too
    if optimizer is None:
        chosen.scale_(bound.live, grads.tensors, coefficient)
        grads.finish()
    elif any(g is not None for g in grads.tensors):
        optimizer.multiply_gradients_(coefficient, grads.tensors if same and grads.tensors.own else None)
    bound.sure = grads.plain
    return ClippedNorm(norm.to(exact), raw.to(exact)) if return_raw else norm.to(exact)


def _norm_over_ranks(
    backend: Backend, work: WorkList, grads: GradientList, kind: NormKind, groups: Sequence[tuple[Any, ...]],
    device: torch.device,
) -> Tensor:  # fmt: skip
    """`Backend.norm` of gradients of which ranks hold pieces; ``groups``: `sharding.reduce_groups` of each."""
    parts = []
    ways = list(dict.fromkeys(groups))  # in one order on all ranks
    for way in ways:
        alike = (
            grads
            if len(ways) == 1
            else GradientList(g if w == way else None for g, w in zip(grads, groups, strict=True))
        )
        part = backend.norm(work, alike, kind).to(device)
        for group in way:
            # a maximum over ranks may lose a NaN
            largest = kind == "largest_absolute"
            both = torch.stack([part.nan_to_num(nan=0.0, posinf=math.inf), part.isnan().double()]) if largest else part
            torch.distributed.all_reduce(both, getattr(torch.distributed.ReduceOp, "MAX" if largest else "SUM"), group)
            part = torch.where(both[1] > 0, math.nan, both[0]) if largest else both
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    total = torch.stack(parts) if parts else torch.zeros(1, dtype=torch.float64, device=device)
    return total.amax() if kind == "largest_absolute" else total.sum()


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
