"""A change of plan: what becomes of an optimizer's state, and of the ages of what it thaws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.ages import Ages, Lines, after_all
from ..kernels.backend import choose_backend
from ..kernels.bits import WAS
from ..kernels.operands import STORAGE
from ..kernels.parts import Part, WorkList
from ..model.sharding import is_sharded
from ..plan.mask import FreezeMask, unpack_bits
from .checks import Member, Settings
from .state import MOMENTS, PACKED, REMAINDER, repack


@dataclass(frozen=True)
class Change:
    """A parameter with state whose mask changes, or how its state is kept.

    Attributes:
        member: as it becomes.
        before: what was frozen of it, in the shape that it had.
        was: the same in its present shape; what was added by growing counts as frozen.
        was_whole: whether its state was.
    """

    member: Member
    before: FreezeMask
    was: FreezeMask
    was_whole: bool

    @property
    def moves(self) -> bool:
        """Whether its state has other places than before."""
        return not (self.was_whole and self.member.whole and self.before is self.was)

    def shards(self, *masks: FreezeMask) -> list[FreezeMask]:
        """Masks of the whole parameter, of its shard."""
        return [mask.shard(self.member.shard_index) for mask in masks]


def changes_of(
    members: Sequence[Member], state: Mapping[Tensor, Mapping[str, Any]], masks: Mapping[str, FreezeMask], what: str,
    *, was_whole: bool,
) -> list[Change]:  # fmt: skip
    """The parameters with state whose mask in ``members`` is another than in ``masks``, by name, which have the shapes
    that parameters had then, or whose state is to be kept in another way.

    Raises:
        ValueError: a parameter shrank, or is sharded and grew.
    """
    found = []
    for member in members:
        p, entries, new, before = member.param, state.get(member.param), member.mask, masks.get(member.name)
        if member.piece is not None:
            before = FreezeMask(new.shape) if before is None else before.matrix()
        elif before is None or not before.frozen_count:  # a parameter that no plan names has state of its own shape
            before = FreezeMask(entries["exp_avg"].shape if entries and not is_sharded(p) else p.shape)
        try:
            if before.shape != new.shape and is_sharded(p):
                raise ValueError("it is sharded")
            was = before if before.shape == new.shape else before.grown(new.shape)
        except ValueError as error:
            raise ValueError(
                f"{what}: {member.name!r} has another shape than before, and its state cannot be carried over "
                f"({error}); build the optimizer anew"
            ) from error
        as_it_is = was is before and was == new and (was_whole == member.whole or not was.frozen_count)
        if entries and not as_it_is:
            found.append(Change(member, before, was, was_whole))
    return found


def ages_after(
    ages: dict[str, Ages], changes: Sequence[Change], state: Mapping[Tensor, Mapping[str, Any]], *, counts_on: bool
) -> dict[str, Ages]:
    """Ages, by name, once ``changes`` are made. ``counts_on``: whether what thaws counts its own steps on."""
    changes = list({change.member.name: change for change in changes}.values())  # pieces of one have the same ages
    if not changes:
        return ages
    found = after_all(
        [
            (Ages.none(change.before) if (known := ages.get(change.member.name)) is None else known).grown(
                change.before, change.was, whole=change.was_whole
            )
            for change in changes
        ],
        [change.was for change in changes],
        [change.member.mask for change in changes],
        _step_counts([state[change.member.param]["step"] for change in changes]),
        was_whole=changes[0].was_whole,
        whole=changes[0].member.whole,
        counts_on=counts_on,
    )
    after = ages | {change.member.name: age for change, age in zip(changes, found, strict=True)}
    return {name: age for name, age in after.items() if age}


def _step_counts(found: list[Tensor]) -> list[int]:
    """As numbers. Those on a device are waited for, once: how many steps a capturable optimizer took rather than
    skipped is known there alone."""
    for device in {count.device for count in found}:
        if device.type != "cpu":
            there = [i for i, count in enumerate(found) if count.device == device]
            for i, count in zip(there, torch.stack([found[i] for i in there]).cpu(), strict=True):
                found[i] = count
    return [int(count.item()) for count in found]


def apply_changes(
    state: Mapping[Tensor, dict[str, Any]], changes: Sequence[Change], settings: Settings, *, counts_on: bool
) -> None:
    """Move state to where the new masks have it: kept where it was and is, else zero. Where state is whole before and
    after, nothing moves. What thaws loses its moments, unless it ``counts_on``."""
    moving = [change for change in changes if change.moves]
    for change, moved in zip(moving, _moved(state, moving, settings, counts_on=counts_on), strict=True):
        state[change.member.param].update(moved)
    if not counts_on:
        whole = [change for change in changes if change.member.whole]
        thawed = _thawed([change.shards(change.was, change.member.mask) for change in whole])
        _zero([state[change.member.param] for change in whole], thawed, settings)


def _thawed(pairs: Sequence[Sequence[FreezeMask]]) -> list[Part]:
    """What the first mask of each pair freezes and the second does not, as parts of a live list."""
    found: list[Part | None] = [None] * len(pairs)
    for axis in (0, 1):
        lines = [
            tuple(mask.lines(axis) for mask in pair) if part is None else (None,)
            for pair, part in zip(pairs, found, strict=True)
        ]
        plain = [i for i, both in enumerate(lines) if all(some is not None for some in both)]
        if plain:
            table = Lines([pairs[i][0].matrix_shape[axis] for i in plain])
            turned = table.turned([lines[i][0] for i in plain], [lines[i][1] for i in plain])
            for i, some in zip(plain, table.chosen(turned == WAS), strict=True):
                shape = pairs[i][0].matrix_shape
                found[i] = Part(i, shape, some.size, cols=some) if axis else Part(i, shape, shape[1], some)
    for i, (was, now) in enumerate(pairs):
        if found[i] is None:
            others = now.frozen_bits | ~was.frozen_bits
            found[i] = Part(i, was.matrix_shape, was.matrix_shape[1], frozen_bits=others)
    return found  # type: ignore[return-value]


def _zero(states: Sequence[dict[str, Any]], parts: Sequence[Part], settings: Settings) -> None:
    """Zero the moments of ``states`` where ``parts`` say, by number."""
    listed = [part for part in parts if (part.rows is None or part.rows.size) and part.packed_width]
    work = WorkList(False, listed, [0] * len(parts))
    for key in MOMENTS if listed else ():
        moments = [entries.get(key) for entries in states]
        plain = [
            moment if moment is not None and moment.dtype in STORAGE and moment.is_contiguous() else None
            for moment in moments
        ]
        for device in {moment.device for moment in plain if moment is not None}:
            there = [moment if moment is not None and moment.device == device else None for moment in plain]
            choose_backend(settings.backend, device, settings.optimizer).zero_(work, there)
        for part in listed:
            moment = moments[part.tensor]
            if moment is not None and plain[part.tensor] is None:
                moment.masked_fill_(torch.from_numpy(_flags(part)).to(moment.device).view(moment.shape), 0)


def _flags(part: Part) -> np.ndarray:
    """What a part of a live list visits: bool, of the shape of its matrix."""
    if part.frozen_bits is not None:
        return ~unpack_bits(part.frozen_bits, part.shape)
    flags = np.zeros(part.shape, bool)
    flags[slice(None) if part.rows is None else part.rows, slice(None) if part.cols is None else part.cols] = True
    return flags


def _moved(
    state: Mapping[Tensor, Mapping[str, Any]], changes: Sequence[Change], settings: Settings, *, counts_on: bool
) -> list[dict[str, Tensor]]:
    """State of each parameter, packed anew."""
    moved: list[dict[str, Tensor]] = [{} for _ in changes]
    routes: dict[torch.device, list[tuple[Tensor, Tensor, Part, Part]]] = {}
    for change, into in zip(changes, moved, strict=True):
        packed_by = FreezeMask(change.before.shape).grown(change.was.shape) if change.was_whole else change.was
        was, source, target = change.shards(change.was, packed_by, change.member.packing)
        # what thaws has a remainder, if any was kept: that is part of its weight
        loses = change.was_whole and not change.member.whole and not counts_on
        parts: dict[bool, tuple[Part, Part]] = {}
        for key in PACKED:
            moment = state[change.member.param].get(key)
            if moment is None:
                continue
            lossy = loses and key != REMAINDER
            plain = moment.dtype in (*STORAGE, torch.int16) and moment.is_contiguous()
            if not plain or any(mask.bits is not None for mask in (was, source, target)):
                into[key] = repack(repack(moment, source, was) if lossy else moment, was if lossy else source, target)
                continue
            if lossy not in parts:
                stays = source | target
                parts[lossy] = _route(source, stays | was if lossy else stays, target)
            into[key] = torch.empty(target.packed_shape, dtype=moment.dtype, device=moment.device)
            pair = (t.view(torch.bfloat16) if key == REMAINDER else t for t in (moment, into[key]))
            routes.setdefault(moment.device, []).append((*pair, *parts[lossy]))  # type: ignore[arg-type]
    for device, found in routes.items():
        sources, targets, taken, others = (list(column) for column in zip(*found, strict=True))
        backend = choose_backend(settings.backend, device, settings.optimizer)
        backend.zero_(_listed(others, targets), targets)
        backend.gather(_listed(taken, targets), sources, targets)
    return moved


def _listed(parts: Sequence[Part], targets: Sequence[Tensor]) -> WorkList:
    """Parts, one for each of ``targets``, as a live list; those of nothing are left out."""
    some = [
        Part(i, part.shape, part.packed_width, part.rows, part.cols, part.packed_rows, part.packed_cols)
        for i, part in enumerate(parts)
        if (part.rows is None or part.rows.size) and (part.cols is None or part.cols.size) and math.prod(part.shape)
    ]
    return WorkList(False, some, [target.numel() for target in targets])


def _route(source: FreezeMask, stays: FreezeMask, target: FreezeMask) -> tuple[Part, Part]:
    """From state packed by ``source`` to state packed by ``target``, what is live in ``stays``. And what of the latter
    has to be zeroed before: its other rows or, where columns move, all of it."""
    (n_rows, rows), (to_rows, packed_rows) = (_places(mask, stays, 0) for mask in (source, target))
    (n_cols, cols), (to_cols, packed_cols) = (_places(mask, stays, 1) for mask in (source, target))
    rest = None
    if cols is None and packed_cols is None:
        others = np.ones(to_rows, bool)
        others[slice(None) if packed_rows is None else packed_rows] = False
        rest = np.flatnonzero(others)
    elif cols is None:
        cols = np.arange(n_cols)
    route = Part(0, (n_rows, n_cols), to_cols, rows, cols, packed_rows, packed_cols)
    return route, Part(0, (to_rows, to_cols), to_cols, rest)


def _places(mask: FreezeMask, stays: FreezeMask, axis: int) -> tuple[int, np.ndarray | None]:
    """How many rows or columns ``mask`` leaves live, and which of them ``stays`` does; None: all."""
    size = mask.matrix_shape[axis]
    frozen, others = (some.frozen_cols if axis else some.frozen_rows for some in (mask, stays))
    if frozen.size == others.size:
        return size - frozen.size, None
    live, left = np.ones(size, bool), np.ones(size, bool)
    live[frozen] = left[others] = False
    return size - frozen.size, np.flatnonzero(left[live])
