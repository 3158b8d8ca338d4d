"""Launch plans: what a step needs of the tensors of one set of dtypes, prepared once.

A step asks each plan to `LaunchPlan.prepare` (gradients are read, hyper-parameters become scalars; what can fail, fails
here) and then to `LaunchPlan.run` (the backend's kernel, and the step counts).
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..grads.flat import FlatReader
from ..grads.forwards import generation
from ..grads.reader import GradientReader, Gradients, Whereabouts, trace, whereabouts
from ..kernels.ages import Ages
from ..kernels.backend import Backend, choose_backend
from ..kernels.operands import SCALARS, SCALARS_DOUBLE, AdamWOperands, adamw_scalars, to_device
from ..kernels.parts import WorkList, compile_live, distinct
from ..plan.mask import FreezeMask
from .checks import Member, Settings, check_trained, hyper_parameters
from .flat import FlatState
from .state import MOMENTS, REMAINDER, make_state

_SCALAR_ROW: Final = struct.Struct("=10fI")
_SCALAR_ROW_DOUBLE: Final = struct.Struct("=10dI")


class Kind(NamedTuple):
    """What the parameters of one launch plan share: what selects a kernel, and where it runs."""

    decoupled: bool
    amsgrad: bool
    l2: bool
    on_device: bool  # `counts_on_device`
    device: torch.device
    double: bool  # the arithmetic is float64


class Prepared(NamedTuple):
    """What `LaunchPlan.prepare` found for one step."""

    grads: Gradients
    scalars: Any  # rows of `SCALARS` or `SCALARS_DOUBLE`, on the host or on the device
    scalar_set: np.ndarray  # int32: the first row of each part of the work list


class LaunchPlan:
    """One kernel call per step, for the parameters of one `Kind`. What does not change from step to step is computed
    here once; step counts and scalars are the host's.

    Attributes:
        owners: the parameters, as the groups have them.
        members: the same, with their masks.
        packed_state: all that a step writes to beside parameters and step counts.
        steps: the step counts, float32 [parameters]; each parameter's ``state["step"]`` is a view of one.
        packed_gradients: whether some gradients are packed.
    """

    on_device = False  # whether step counts and scalars live on the parameters' device

    def __init__(
        self, kind: Kind, settings: Settings, backend: Backend, reader: GradientReader | FlatReader,
        members: Sequence[Member], ages: Mapping[str, Ages], state: Mapping[Tensor, dict[str, Any]],
    ) -> None:  # fmt: skip
        self._operation, self._backend, self._reader = settings.optimizer, backend, reader
        self._flags: dict[str, Any] = {
            "l2": kind.l2, "amsgrad": kind.amsgrad, "stochastic": settings.rounding == "stochastic",
            "seed": settings.seed,
        }  # fmt: skip
        self._exact = torch.float64 if kind.double else torch.float32
        self.owners = [member.param for member in members]
        self._shards = [member.shard for member in members]
        self._strided = [i for i, p in enumerate(self._shards) if not p.is_contiguous() or p.is_conj() or p.is_neg()]
        states = [state[p] for p in self.owners]
        moments = [[entry[key] for entry in states] for key in MOMENTS[: 3 if kind.amsgrad else 2]]
        remainders = [entry.get(REMAINDER) for entry in states]
        self.packed_state = [t for tensors in (*moments, remainders) for t in tensors if t is not None]
        real_params, *real = (list(map(_real, tensors)) for tensors in (self._shards, *moments))
        self._operands = AdamWOperands(
            real_params, real[0], real[1], real[2] if kind.amsgrad else None,
            remainders if any(r is not None for r in remainders) else None, [member.number for member in members],
        )  # fmt: skip
        self._operands.packed_grads = reader.packed
        self.packed_gradients = any(reader.packed)
        # The step counts are views of one tensor, so that counting is one operation.
        counts = torch.tensor([float(entry["step"]) for entry in states], dtype=torch.float32)
        self.steps = counts.to(kind.device) if self.on_device else counts
        for entry, view in zip(states, self.steps.unbind(), strict=True):
            entry["step"] = view
        self._counting: np.ndarray | None = None  # float32 [parameters]: 1 where this step counts; None: everywhere
        self.relist(members, ages)

    def relist(self, members: Sequence[Member], ages: Mapping[str, Ages]) -> None:
        """Take the masks of ``members``, in the order of `owners`, and ages by name; all else is as it was."""
        self.members = list(members)
        self._work = _work_list(members, ages)
        self._operands.native = None  # on a GPU, tables know the work list
        self._assign_scalars(np.array([member.group for member in members], np.int64))
        self._start_counting()

    def _assign_scalars(self, group_of_tensor: np.ndarray) -> None:
        """The different rows of scalars while all tensors took as many steps: a row for each group and time at which
        something was thawed."""
        work = self._work
        self._group_of_born = group_of_tensor[work.tensor_of_part[work.part_of_born]]
        codes, self._row_of_born = distinct(self._group_of_born << 40 | work.born)
        self._rows = [(code >> 40, code & (1 << 40) - 1) for code in codes.tolist()]
        self._first_row = work.first_born.astype(np.int32)
        double = self._exact == torch.float64
        self._scalars = np.empty(len(self._rows), SCALARS_DOUBLE if double else SCALARS)
        self._scalar_memory = self._scalars.view(np.uint8).data
        self._pack_scalars = (_SCALAR_ROW_DOUBLE if double else _SCALAR_ROW).pack_into
        # one age to a part: parts of a group share a row
        self._ageless = len(work.born) == len(work.parts)

    def _start_counting(self) -> None:
        self._counts = self.steps.numpy()
        self._count_bytes = self._counts.view(np.uint8).data
        self._uniform_count: int | None = None  # that of all parameters
        self._note_counts()

    def packed_as_before(self) -> bool:
        return self._reader.packed_as_before(self.owners)

    def prepare(self, groups: list[dict[str, Any]], given: Sequence[Tensor] | None = None) -> Prepared:
        """Everything that can fail, before anything is changed. ``given``: gradients to be taken instead of the
        parameters' own."""
        grads = self._gradients(given)
        if grads.plain and self._uniform_count is not None and self._count_bytes == self._expected_bytes:
            # the usual case: all parameters took as many steps
            count, scalars = self._uniform_count + 1, _HostScalars(groups)
            for row, (group, born) in enumerate(self._rows):
                values = scalars.row(group, max(count - born, 1))
                self._pack_scalars(self._scalar_memory, row * self._scalars.itemsize, *values)
            return self._prepared(grads, self._scalars, self._row_of_born)
        self._uniform_count = None
        counts = self._counts + (np.float32(1.0) if self._counting is None else self._counting)
        counts_of_born = counts[self._work.tensor_of_part[self._work.part_of_born]].astype(np.int64)
        codes, row_of_born = distinct(self._group_of_born << 40 | np.maximum(counts_of_born - self._work.born, 1))
        rows, scalars = np.empty(len(codes), self._scalars.dtype), _HostScalars(groups)
        for row, code in enumerate(codes.tolist()):
            rows[row] = scalars.row(code >> 40, code & (1 << 40) - 1)
        return self._prepared(grads, rows, row_of_born)

    def _prepared(self, grads: Gradients, rows: np.ndarray, row_of_born: np.ndarray) -> Prepared:
        """``rows`` of scalars, and which of them each of `WorkList.born` has."""
        if self._ageless:
            return Prepared(grads, rows, row_of_born.astype(np.int32))
        return Prepared(grads, rows[row_of_born], self._first_row)

    def _gradients(self, given: Sequence[Tensor] | None) -> Gradients:
        """Those of this step as kernels take them; a parameter without one is left alone and does not count a step."""
        grads = self._reader.read(self.owners, self._operation) if given is None else Gradients(list(given))
        self._counting = None
        if not grads.plain:
            grads = Gradients([None if g is None else _real(g).contiguous() for g in grads])
            self._counting = np.array([g is not None for g in grads], np.float32)
        return grads

    def run(self, prepared: Prepared, multiplier: Tensor | None, skip: Tensor | None) -> None:
        """The kernel, with gradients multiplied by ``multiplier``; nothing is done where ``skip`` is not 0."""
        grads, scalars, scalar_set = prepared
        if multiplier is not None:
            multiplier = multiplier.to(self._shards[0].device, self._exact)
        if skip is not None:  # unless the host looked at it
            skip = skip.detach().to(self._shards[0].device, torch.float32) if self.on_device else None
        self._operands.grads = grads
        if self._strided:  # right, not fast: kernels see contiguous tensors only
            for i in self._strided:
                self._operands.params[i] = _real(self._shards[i].detach()).contiguous()
            self._operands.native = None
        self._backend.adamw_(
            self._work, self._operands, scalars, scalar_set, **self._flags, skip=skip, multiplier=multiplier
        )
        for i in self._strided:
            if grads[i] is not None:
                new = self._operands.params[i]
                self._shards[i].detach().copy_(torch.view_as_complex(new) if self._shards[i].is_complex() else new)
        self._operands.grads = ()
        self._count(skip)
        changed = self.owners if grads.plain else [p for p, g in zip(self.owners, grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version(changed)

    def _count(self, skip: Tensor | None) -> None:
        """One more step, for parameters that had a gradient; none where ``skip`` is not 0."""
        self._counts += np.float32(1.0) if self._counting is None else self._counting
        self._note_counts()

    def _note_counts(self) -> None:
        """Remember the step counts, so as to see at a glance whether someone else wrote to them."""
        if self._uniform_count is not None:
            self._uniform_count += 1
        elif len(self._counts) and (self._counts == self._counts[0]).all():
            self._uniform_count = int(self._counts[0])
        self._expected_bytes = bytes(self._count_bytes)

    def note_references(self) -> None:
        """Remember how many references there are to each parameter; the caller has none."""
        self._references = self._references_now()

    def may_have_lost_a_parameter(self, grads: Gradients) -> bool:
        """Whether a parameter has no gradient, and fewer refer to it than when they were counted."""
        return not grads.plain and any(
            gradient is None and now < before
            for gradient, now, before in zip(grads, self._references_now(), self._references, strict=True)
        )

    def _references_now(self) -> list[int]:
        return [sys.getrefcount(p) for p in self.owners]


class DevicePlan(LaunchPlan):
    """A launch plan whose step counts and scalars live on the parameters' device: the host never waits for it."""

    on_device = True

    def _start_counting(self) -> None:
        # Which parameters took a step, only the device knows: each age of each part has its own row of scalars. They
        # lie by groups, and the ages of a part together.
        order = np.argsort(self._group_of_born, kind="stable")
        self._first_row = np.argsort(order)[self._work.first_born].astype(np.int32)
        groups, sizes = np.unique(self._group_of_born, return_counts=True)
        self._rows_of_group = list(zip(groups.tolist(), sizes.tolist(), strict=True))
        device, tensor_of_born = self.steps.device, self._work.tensor_of_part[self._work.part_of_born]
        self._tensor_of_row = to_device(tensor_of_born[order], device)
        self._born_of_row = to_device(self._work.born[order].astype(np.float64), device)
        self._counted: tuple[bytes, Tensor] | None = None

    @torch.no_grad()
    def prepare(self, groups: list[dict[str, Any]], given: Sequence[Tensor] | None = None) -> Prepared:
        grads = self._gradients(given)
        ages = (self.steps[self._tensor_of_row].double() + 1.0 - self._born_of_row).clamp(min=1.0)
        sizes = [n for _, n in self._rows_of_group]
        rows = [
            _scalars_on_device(groups[group], some, self._exact)
            for (group, _), some in zip(self._rows_of_group, torch.split(ages, sizes), strict=False)
        ] or [_scalars_on_device(groups[0], ages, self._exact)]  # nothing is live
        return Prepared(grads, torch.cat(rows), self._first_row)

    def _count(self, skip: Tensor | None) -> None:
        one: Any = 1.0 if skip is None else (skip.reshape(()) == 0).float()
        if self._counting is not None:
            key = self._counting.tobytes()
            if self._counted is None or self._counted[0] != key:
                self._counted = key, torch.from_numpy(self._counting).to(self.steps.device)
            one = self._counted[1] * one
        self.steps.add_(one)


# ----------------------------------------------------------------------------------------- made, and kept while valid


def make_launch_plans(
    groups: list[dict[str, Any]], members: Sequence[Member], ages: dict[str, Ages],
    state: Mapping[Tensor, dict[str, Any]], settings: Settings,
) -> list[LaunchPlan]:  # fmt: skip
    """A launch plan per `Kind` among the parameters that have a gradient or state. State that is missing is made, once
    everything was found in order. ``state``: of `Member.param`.

    Raises:
        TypeError, ValueError, RuntimeError: a parameter or a gradient is none that kernels take; no backend runs here.
    """
    kinds: dict[Kind, list[Member]] = {}
    for member in members:
        p = member.param
        if member.owner.grad is not None or state.get(p):
            check_trained(p, settings, member.name)
            double = p.dtype in (torch.float64, torch.complex128)
            group, device = groups[member.group], member.shard.device
            kind = Kind(*_flags(group), counts_on_device(group, device), device, double)
            kinds.setdefault(kind, []).append(member)
    ready = [(kind, alike, *_checked(kind, alike, groups, settings)) for kind, alike in kinds.items()]
    for kind, alike, *_ in ready:
        for member in alike:
            if not state[member.param]:
                ages.pop(member.name, None)  # without state everything is equally young
        if isinstance(state, FlatState):
            state.allocate(amsgrad=kind.amsgrad)
        for member in alike:
            make_state(state[member.param], member, settings, amsgrad=kind.amsgrad)
    return [
        (DevicePlan if kind.on_device else LaunchPlan)(kind, settings, backend, reader, alike, ages, state)
        for kind, alike, backend, reader in ready
    ]


def _checked(
    kind: Kind, members: Sequence[Member], groups: list[dict[str, Any]], settings: Settings
) -> tuple[Backend, GradientReader | FlatReader]:
    """The backend of a launch plan, and what reads its gradients, which were read once."""
    if kind.device.type == "meta" and any(groups[member.group]["fused"] for member in members):
        raise RuntimeError(  # torch's words, in torch's error: callers match them
            "`fused=True` requires all the params to be floating point Tensors of supported devices, but "
            f"{members[0].name!r} is on the meta device and holds no values; materialise the model first"
        )
    params = [member.param for member in members]
    reader: GradientReader | FlatReader
    if all(member.piece is None for member in members):
        reader = GradientReader(params, [member.name for member in members], same_dtype=True)
        reader.check_packings([member.mask for member in members], settings.optimizer, exactly=True)
    else:
        flats = {id(member.owner): member.owner for member in members}
        number = {key: i for i, key in enumerate(flats)}
        pieces = [(number[id(member.owner)], member.piece) for member in members if member.piece is not None]
        reader = FlatReader(list(flats.values()), pieces)
    reader.read(params, settings.optimizer)
    return choose_backend(settings.backend, kind.device, settings.optimizer, kernel_dtypes(params)), reader


class LaunchPlans:
    """An optimizer's launch plans, and their cache key: what must be as it was for them to be valid.

    Attributes:
        plans: the launch plans; none before the first step.
        traceable: whether `torch.compile` can take a step into its graph: the state is there, nothing is sharded.
        on_device: `all_count_on_device` of the groups, while the plans are valid.
        stale: whether masks changed, and nothing else, so that work lists have to be made anew.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.plans: list[LaunchPlan] = []
        self.traceable = self.on_device = False
        self.stale = False
        self._key: Any = None
        self._whereabouts: Whereabouts | None = None
        self._sharded = False
        self._waiting: list[Tensor] = []  # parameters that never had a gradient, and so are in no plan

    def valid(self, groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether parameters, their state and the way their gradients are packed are as they were."""
        return (
            self._whereabouts is not None
            and self._key == _cache_key(groups)
            and self._whereabouts.hold(self._by_shard(state))
            and not any(p.grad is not None for p in self._waiting)
            and all(plan.packed_as_before() for plan in self.plans)
        )

    def keep(
        self, plans: list[LaunchPlan], groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]],
        *, sharded: bool,
    ) -> None:  # fmt: skip
        """Take ``plans``, just made for what is there now."""
        self.plans, self._sharded = plans, sharded
        self._key, self._whereabouts = _cache_key(groups), whereabouts(self._by_shard(state))
        self._waiting = [p for group in groups for p in group["params"] if p.grad is None and not state.get(p)]
        self.on_device = all_count_on_device(groups)
        self.traceable = bool(plans) and not sharded and not any(plan.packed_gradients for plan in plans)
        self.stale = False

    def members(self, masks: Mapping[str, FreezeMask]) -> list[Member]:
        """The parameters of all launch plans, one after the other, with other masks, by name."""
        return [replace(it, mask=it.fitted(masks[it.name])) for plan in self.plans for it in plan.members]

    def relist(self, members: Sequence[Member], ages: Mapping[str, Ages]) -> None:
        """Make the work lists anew, for what `members` gave and ages by name."""
        rest = iter(members)
        for plan in self.plans:
            plan.relist(list(islice(rest, len(plan.owners))), ages)
        self.stale = False

    def _by_shard(self, state: Mapping[Tensor, dict[str, Any]]) -> Mapping[Tensor, dict[str, Any]]:
        """``state`` by what this rank holds of the parameters: what kernels take the addresses of."""
        return {getattr(p, "_local_tensor", p): entries for p, entries in state.items()} if self._sharded else state


def _cache_key(groups: list[dict[str, Any]]) -> Any:
    flags = ("capturable", "fused")
    return generation(), [
        (_flags(group), *(group[flag] for flag in flags), list(map(id, group["params"]))) for group in groups
    ]


# ---------------------------------------------------------------------------------------------------- clip factor


class PendingFactor:
    """What the next step multiplies gradients by, if anything, and which gradients these are. They are kept until then,
    so that no other can be taken for one of them.

    Attributes:
        factor: a one-element tensor; None: there is nothing to multiply by.
        invalid: what changed, so that the factor is none for these gradients any more; "": nothing.
    """

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        self.factor: Tensor | None = None
        self.invalid = ""
        self._gradients: list[Tensor | None] = []

    def put(self, factor: Tensor, gradients: list[Tensor | None]) -> None:
        self.factor, self.invalid, self._gradients = factor, "", gradients
        self._trace = trace(gradients)

    def now(self, groups: list[dict[str, Any]], what: str, read: Sequence[Gradients] = ()) -> Tensor | None:
        """The factor, if gradients are as they were; None if none of them is there any more. ``read``: the gradients of
        all parameters in ``groups``, if they were just read.

        Raises:
            RuntimeError: some of them changed, or something else did that the factor depends on.
        """
        if self.factor is None:
            return None
        why, present = self.invalid, [grads.tensors for grads in read if grads.own]
        if len(present) < max(len(read), 1):
            present = [[p.grad for group in groups for p in group["params"]]]
        if sum(map(trace, present)) % 2**64 != self._trace:
            known = {id(g) for g in self._gradients if g is not None}
            if known.isdisjoint(id(g) for each in present for g in each):
                return None
            why = "gradients changed"
        if why:
            raise RuntimeError(
                f"{what}: a clip factor waits for this step, but since it was computed {why}; call clip_grad_norm_ "
                "after that (or zero_grad() of this optimizer, which drops the factor)"
            )
        return self.factor


def multiplier(grad_scale: Tensor | None, clip: Tensor | None) -> Tensor | None:
    """What gradients are multiplied by: one IEEE float32 division and one product, the same on every device."""
    if grad_scale is None:
        return clip
    unscale = 1.0 / grad_scale.detach().float().reshape(())
    return unscale if clip is None else unscale * clip.to(unscale.device)


# -------------------------------------------------------------------------------------------------------- scalars


def counts_on_device(group: dict[str, Any], device: torch.device) -> bool:
    """Whether the steps of the group's parameters on ``device`` are counted there: as in torch, of a capturable group
    and, on a GPU, of a fused one, so that nobody waits to hear whether a loss scale was too large."""
    return bool(group["capturable"] or (group["fused"] and device.type == "cuda"))


def all_count_on_device(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether `counts_on_device` of every parameter, so that the host need not look for a found inf."""
    return all(counts_on_device(group, p.device) for group in groups for p in group["params"])


def _flags(group: dict[str, Any]) -> tuple[bool, bool, bool]:
    """The first fields of `Kind`."""
    decoupled = group["decoupled_weight_decay"]
    return decoupled, group["amsgrad"], not decoupled and group["weight_decay"] != 0


class _HostScalars:
    """Rows of `SCALARS` at one step, from parameter groups, which are looked at once."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._groups = groups
        self._numbers: dict[int, tuple[float, ...]] = {}

    def row(self, group: int, step: int) -> tuple[float, ...]:
        """For what took ``step`` steps with this one."""
        if group not in self._numbers:
            self._numbers[group] = hyper_parameters(self._groups[group])
        return _finished(self._groups[group], self._numbers[group], step)


def _scalars_on_device(group: dict[str, Any], step: Tensor, exact: torch.dtype) -> Tensor:
    """Words of `SCALARS` rows, int32 [steps, 11] (`SCALARS_DOUBLE`: [steps, 21]), from float64 ``step`` counts; tensors
    in ``group`` are read there."""
    given = (group["lr"], *group["betas"])
    lr, *betas = (0.0 if isinstance(value, Tensor) else value for value in given)
    numbers = hyper_parameters({**group, "lr": lr, "betas": betas})
    there = [
        value.to(step.device, torch.float64).reshape(()) if isinstance(value, Tensor) else number
        for value, number in zip(given, numbers, strict=False)
    ]
    words = _finished(group, (*there, *numbers[3:]), step)
    # filled there: a number copied from the host would be waited for
    columns = [w.expand_as(step) if isinstance(w, Tensor) else torch.full_like(step, w) for w in words]
    floats = torch.stack(columns[:-1], dim=1).to(exact).view(torch.int32)
    return torch.cat([floats, columns[-1].to(torch.int32)[:, None]], dim=1)


def _finished(group: dict[str, Any], numbers: Sequence[Any], step: Any) -> tuple[Any, ...]:
    """`adamw_scalars` of a group whose `hyper_parameters` are ``numbers``."""
    lr, beta1, beta2, eps, weight_decay = numbers
    return adamw_scalars(
        lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, step=step,
        decoupled=group["decoupled_weight_decay"], maximize=group["maximize"],
    )  # fmt: skip


# ----------------------------------------------------------------------------------- work list, complex parameters


def _work_list(members: Sequence[Member], ages: Mapping[str, Ages]) -> WorkList:
    """What is live in the shards of ``members``; of complex ones in their real view, as kernels see them."""
    masks: list[FreezeMask] = []
    aged: list[Ages | None] = []
    for member in members:
        mask, age = member.shard_mask, ages.get(member.name)
        age = None if age is None else age.shard(member.mask, member.shard_index)
        if member.param.is_complex():  # a matrix with a pair of columns for each column
            n_rows, n_cols = mask.matrix_shape
            bits = None if mask.elements is None else mask.elements.reshape(n_rows, n_cols).repeat_interleave(2, dim=1)
            cols = (mask.cols[:, None] * 2 + torch.arange(2)).reshape(-1)
            mask = FreezeMask((n_rows, 2 * n_cols), rows=mask.rows, cols=cols, elements=bits)
            if age is not None:
                born = None if age.elements is None else age.elements.repeat(2, axis=1)
                age = replace(age, cols=age.cols.repeat(2), elements=born)
        masks.append(mask)
        aged.append(age)
    return compile_live(masks, aged, whole_state=any(member.whole for member in members))


def _real(tensor: Tensor) -> Tensor:
    """What kernels see of a tensor, over the same memory: complex numbers as pairs of real ones. Where memory does not
    hold the values (autograd may only note that they are negated or conjugate), a copy."""
    if tensor.is_complex() or tensor.is_neg():
        tensor = tensor.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def kernel_dtypes(params: Iterable[Tensor]) -> set[torch.dtype]:
    """Of what kernels see of parameters."""
    return {torch.float32 if p.dtype == torch.complex64 else p.dtype for p in params}
