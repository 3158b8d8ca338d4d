"""A change of plan: what becomes of an optimizer's state, and of the ages of what it thaws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.ages import Ages
from ..kernels.backend import choose_backend
from ..kernels.operands import STORAGE
from ..kernels.parts import Part, WorkList, compile_frozen
from ..model.sharding import is_sharded
from ..plan.mask import FreezeMask
from .checks import Member, Settings
from .state import MOMENTS, PACKED, REMAINDER, repack


@dataclass(frozen=True)
class Change:
    """A parameter with state whose mask changes, or how its state is kept.

    Attributes:
        member: as it becomes.
        was: what was frozen of it, in its present shape; what was added by growing counts as frozen.
        packed_by: what its state is packed by until now, in its present shape.
        ages: as they become.
    """

    member: Member
    was: FreezeMask
    packed_by: FreezeMask
    ages: Ages

    def shards(self, *masks: FreezeMask) -> list[FreezeMask]:
        return [mask.shard(self.member.shard_index) for mask in masks]


def changes_of(
    members: Sequence[Member], state: Mapping[Tensor, Mapping[str, Any]], masks: Mapping[str, FreezeMask],
    ages: Mapping[str, Ages], what: str, *, was_whole: bool, counts_on: bool,
) -> list[Change]:  # fmt: skip
    """What becomes of state and ages once the masks of ``members`` take the place of ``masks``, by name, which have the
    shapes that parameters had then. ``counts_on``: whether what thaws goes on with the moments that were kept.

    Raises:
        ValueError: a parameter shrank, or is sharded and grew.
    """
    found: list[tuple[Member, FreezeMask, FreezeMask]] = []
    for member in members:
        p, entries, new, before = member.param, state.get(member.param), member.mask, masks.get(member.name)
        if before is None or not before.frozen_count:  # a parameter that no plan names has state of its own shape
            before = FreezeMask(entries["exp_avg"].shape if entries and not is_sharded(p) else p.shape)
        try:
            if before.shape != new.shape and is_sharded(p):
                raise ValueError("it is sharded")
            was = before.grown(new.shape)
        except ValueError as error:
            raise ValueError(
                f"{what}: {member.name!r} has another shape than before, and its state cannot be carried over "
                f"({error}); build the optimizer anew"
            ) from error
        as_it_is = was is before and was == new and (was_whole == member.whole or not was.frozen_count)
        if entries and not as_it_is:
            found.append((member, before, was))
    changes = []
    for (member, before, was), step in zip(found, _step_counts(state[m.param]["step"] for m, *_ in found), strict=True):
        grown = ages.get(member.name, Ages.none(before)).grown(before, was)
        became = grown.after(was, member.mask, step, was_whole=was_whole, whole=member.whole, counts_on=counts_on)
        packed_by = FreezeMask(before.shape).grown(was.shape) if was_whole else was
        changes.append(Change(member, was, packed_by, became))
    return changes


def _step_counts(counts: Iterable[Tensor]) -> list[int]:
    """As numbers. Those on a device are waited for, once: how many steps a capturable optimizer took rather than
    skipped is known there alone."""
    found = list(counts)
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
    moving = [change for change in changes if not (change.member.whole and not change.packed_by.frozen_count)]
    for change, moved in zip(moving, _moved(state, moving, settings, counts_on=counts_on), strict=True):
        state[change.member.param].update(moved)
    if not counts_on:
        whole = [change for change in changes if change.member.whole]
        thawed = [_difference(*change.shards(change.was, change.member.mask)) for change in whole]
        _zero([state[change.member.param] for change in whole], thawed, settings)


def _difference(one: FreezeMask, other: FreezeMask) -> FreezeMask:
    """What ``one`` freezes and ``other`` does not."""
    rows_alone, cols_alone = (
        all(mask.bits is None and not lines.size for mask, lines in ((one, first), (other, second)))
        for first, second in ((one.frozen_cols, other.frozen_cols), (one.frozen_rows, other.frozen_rows))
    )
    if rows_alone or cols_alone:
        lines = np.zeros(one.matrix_shape[0 if rows_alone else 1], bool)
        lines[one.frozen_rows if rows_alone else one.frozen_cols] = True
        lines[other.frozen_rows if rows_alone else other.frozen_cols] = False
        return FreezeMask(one.shape, rows=lines) if rows_alone else FreezeMask(one.shape, cols=lines)
    return FreezeMask(one.shape, elements=(one.frozen_flags() & ~other.frozen_flags()).reshape(one.shape))


def _zero(states: Sequence[dict[str, Any]], masks: Sequence[FreezeMask], settings: Settings) -> None:
    """Zero what ``masks`` name, in the moments of ``states``."""
    chosen = [i for i, mask in enumerate(masks) if mask.frozen_count]
    for device in {states[i]["exp_avg"].device for i in chosen}:
        there = [i for i in chosen if states[i]["exp_avg"].device == device]
        work = compile_frozen([masks[i] for i in there])
        for key in MOMENTS:
            moments = [states[i].get(key) for i in there]
            plain = [moment is not None and moment.dtype in STORAGE and moment.is_contiguous() for moment in moments]
            if any(plain):
                backend = choose_backend(settings.backend, device, settings.optimizer)
                backend.zero_(work, [moment if able else None for moment, able in zip(moments, plain, strict=True)])
            for i, moment, able in zip(there, moments, plain, strict=True):
                if moment is not None and not able:
                    moment.masked_fill_(masks[i].dense().to(device), 0)


def _moved(
    state: Mapping[Tensor, Mapping[str, Any]], changes: Sequence[Change], settings: Settings, *, counts_on: bool
) -> list[dict[str, Tensor]]:
    """State of each parameter, packed anew."""
    moved: list[dict[str, Tensor]] = [{} for _ in changes]
    launches: dict[torch.device, list[tuple[Tensor, Tensor, Part]]] = {}
    for change, into in zip(changes, moved, strict=True):
        was, source, target = change.shards(change.was, change.packed_by, change.member.packing)
        for key in PACKED:
            moment = state[change.member.param].get(key)
            if moment is None:
                continue
            # what thaws has a remainder, if any was kept: that is part of its weight
            stays = source | target if change.member.whole or counts_on or key == REMAINDER else source | target | was
            plain = moment.dtype in (*STORAGE, torch.int16) and moment.is_contiguous()
            if not plain or any(mask.bits is not None for mask in (source, stays, target)):
                into[key] = repack(repack(moment, source, stays), stays, target)
                continue
            into[key] = torch.zeros(target.packed_shape, dtype=moment.dtype, device=moment.device)
            if stays.live_count:
                one, other = (t.view(torch.bfloat16) if key == REMAINDER else t for t in (moment, into[key]))
                launches.setdefault(moment.device, []).append((one, other, _route(source, stays, target)))
    for device, routes in launches.items():
        sources, targets, parts = (list(column) for column in zip(*routes, strict=True))
        work = WorkList(False, [replace(part, tensor=i) for i, part in enumerate(parts)], [t.numel() for t in targets])
        choose_backend(settings.backend, device, settings.optimizer).gather(work, sources, targets)
    return moved


def _route(source: FreezeMask, stays: FreezeMask, target: FreezeMask) -> Part:
    """From state packed by ``source`` to state packed by ``target``, what is live in ``stays``."""
    rows, packed_rows = (np.searchsorted(mask.live_rows, stays.live_rows) for mask in (source, target))
    cols, packed_cols = (np.searchsorted(mask.live_cols, stays.live_cols) for mask in (source, target))
    shape, width = (source.live_rows.size, source.live_cols.size), target.live_cols.size
    if cols.size == shape[1] == width:
        return Part(0, shape, width, rows, packed_rows=packed_rows)
    return Part(0, shape, width, rows, cols, packed_rows, packed_cols)
