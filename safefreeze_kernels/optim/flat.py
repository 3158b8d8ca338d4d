"""State of flat partitions. An engine finds it under its flat tensor, one tensor per moment; the optimizer under each
piece, as views of that.

Where a plan freezes something of a partition, the pieces' packed state lies end to end, in a tensor of shape (1, live
elements): whatever of DeepSpeed would index it as the flat tensor fails, instead of reading other elements. Where
nothing is frozen it has the shape of the flat tensor, with every piece in its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ..kernels.ages import Ages
from ..model.flat import Partition
from ..plan.mask import FreezeMask
from .checks import Member, Settings
from .state import (
    FREEZE,
    IN_FORCE,
    MOMENTS,
    PACKED,
    Loaded,
    Veiled,
    pack,
    read_note,
    read_state_dict,
    state_dtypes,
    unpack,
)

VERSION: Final = 3  # of the note in a state dict: masks and ages by name, of all parameters


class FlatState(dict[Tensor, dict[str, Any]]):
    """State by piece. Made from an optimizer's ``state`` of flat tensors, which `store` brings up to date.

    Args:
        partitions, members: the partitions, and the members of all of them in the order of their pieces.
        state: the optimizer's. Moments in full size, as an engine leaves them after loading, are packed there.

    Raises:
        ValueError: a moment has another shape; state is in 8 bits.
    """

    def __init__(
        self, partitions: Sequence[Partition], members: Sequence[Member], state: dict[Tensor, dict[str, Any]],
        settings: Settings,
    ) -> None:  # fmt: skip
        if settings.state_dtype == torch.int8:
            raise ValueError(
                f"{settings.optimizer}: state_dtype is torch.int8, whose codes DeepSpeed would take for moments, "
                "expected torch.float32 or torch.bfloat16 under its ZeRO"
            )
        super().__init__({member.param: {} for member in members})
        self._state, self._settings = state, settings
        self._forms = [_Form(partition, some) for partition, some in together(partitions, members)]
        for form in self._forms:
            entries = state.get(form.flat) or {}
            for key, value in entries.items():
                if key in PACKED:
                    dtype = state_dtypes(form.flat, settings, amsgrad=True).get(key, value.dtype)
                    entries[key] = form.taken(value, dtype, f"{settings.optimizer}: state {key!r}")
                    self._view(form, key)
            for member in form.members if "step" in entries else ():
                self[member.param]["step"] = entries["step"]

    def _view(self, form: _Form, key: str) -> None:
        for member, view in zip(form.members, form.views(self._state[form.flat][key]), strict=True):
            self[member.param][key] = view

    def allocate(self, *, amsgrad: bool) -> None:
        """Make the moments that are missing."""
        for form in self._forms:
            entries = self._state.setdefault(form.flat, {})
            for key, dtype in state_dtypes(form.flat, self._settings, amsgrad=amsgrad).items():
                if key not in entries:
                    entries[key] = torch.zeros(form.shape, dtype=dtype, device=form.flat.device)
                    self._view(form, key)

    def store(self, members: Sequence[Member] = ()) -> None:
        """Have the flat tensors' state be what the pieces' is: moments that were replaced are joined anew. ``members``:
        the same ones under another plan."""
        if members:
            partitions = [form.partition for form in self._forms]
            self._forms = [_Form(partition, some) for partition, some in together(partitions, members)]
        for form in self._forms:
            first = self[form.members[0].param] if form.members else {}
            for key in [key for key in PACKED if key in first]:
                parts, joint = [self[member.param][key] for member in form.members], self._state[form.flat][key]
                if joint.shape != form.shape or any(
                    part.numel() and part.data_ptr() != view.data_ptr()
                    for part, view in zip(parts, form.views(joint), strict=True)
                ):
                    joint = torch.zeros(form.shape, dtype=parts[0].dtype, device=parts[0].device)
                    for part, view in zip(parts, form.views(joint), strict=True):
                        view.copy_(part)
                    self._state[form.flat][key] = joint
                    self._view(form, key)
            if "step" in first:
                self._state[form.flat]["step"] = first["step"]


class _Form:
    """How the state of one flat tensor lies in memory.

    Attributes:
        partition, flat, members: the tensor, and its pieces.
        shape: of each moment.
    """

    def __init__(self, partition: Partition, members: Sequence[Member]) -> None:
        self.partition, self.flat, self.members = partition, partition.tensor, members
        self.packings = [member.shard_packing for member in members]
        self._packed = any(mask.frozen_count for mask in self.packings)
        sizes = [math.prod(mask.packed_shape) for mask in self.packings]
        self.shape = torch.Size((1, sum(sizes))) if self._packed else self.flat.shape

    def views(self, moment: Tensor) -> list[Tensor]:
        """What a moment of `shape` has of each piece."""
        if not self._packed:
            return [_piece(member, moment) for member in self.members]
        shapes = [mask.packed_shape for mask in self.packings]
        parts = torch.split(moment.view(-1), [math.prod(shape) for shape in shapes]) if shapes else ()
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def taken(self, moment: Tensor, dtype: torch.dtype, what: str) -> Tensor:
        """A moment as it is, if it has this dtype and `shape`; from one in full size, what is live, packed.

        Raises:
            ValueError: it has another shape.
        """
        if moment.shape == self.shape:
            return moment.detach().to(self.flat.device, dtype).contiguous()
        if moment.shape != self.flat.shape:
            raise ValueError(
                f"{what} of a flat partition has shape {tuple(moment.shape)}, expected {tuple(self.shape)}, or "
                f"{tuple(self.flat.shape)} in full size; load a checkpoint of as many ranks and of this plan, or a "
                "universal one"
            )
        packed = torch.empty(self.shape, dtype=dtype, device=self.flat.device)
        for member, mask, view in zip(self.members, self.packings, self.views(packed), strict=True):
            view.copy_(pack(_piece(member, moment.detach()), mask))
        return packed

    def spread(self, moment: Tensor, *, live_alone: bool) -> Tensor:
        """A moment of `shape` in full size, zero where frozen; of whole state, with ``live_alone`` alone."""
        full = torch.zeros(self.flat.shape, dtype=moment.dtype, device=moment.device)
        for member, mask, view in zip(self.members, self.packings, self.views(moment), strict=True):
            target = _piece(member, full)
            target.copy_(unpack(view, mask))
            if live_alone and member.whole and member.shard_mask.frozen_count:
                target.masked_fill_(member.shard_mask.dense().to(full.device), 0)
        return full


def _piece(member: Member, flat: Tensor) -> Tensor:
    assert member.piece is not None
    return member.piece.of(flat.view(-1))


def together(
    partitions: Sequence[Partition], members: Sequence[Member]
) -> Iterator[tuple[Partition, Sequence[Member]]]:
    """Each partition, with the members of it among those of all."""
    start = 0
    for partition in partitions:
        yield partition, members[start : start + len(partition.pieces)]
        start += len(partition.pieces)


# --------------------------------------------------------------------------------------------------- state dicts out


def full_size(
    partitions: Sequence[Partition], states: Mapping[int, dict[str, Any]], members: Sequence[Member],
    *, live_alone: bool = False,
) -> dict[int, dict[str, Any]]:  # fmt: skip
    """``states``, number of a flat tensor -> its state, with moments in its shape, zero where frozen."""
    forms = [_Form(partition, some) for partition, some in together(partitions, members)]
    return {
        number: {
            key: forms[number].spread(value, live_alone=live_alone) if key in PACKED else value
            for key, value in entries.items()
        }
        for number, entries in states.items()
    }


def flat_note(
    partitions: Sequence[Partition], members: Sequence[Member], ages: Mapping[str, Ages],
    groups: Sequence[Mapping[str, Any]],
) -> str:  # fmt: skip
    """What each of ``groups`` in a state dict tells of the plan, and of all of them: DeepSpeed's ZeRO-3 gives the first
    one's entries to all when it loads a universal checkpoint."""
    masks = {it.name: it.mask for it in members}
    note = {
        "version": VERSION,
        "kept": any(member.whole for member in members),
        "masks": {name: mask.fingerprint for name, mask in masks.items() if mask.frozen_count},
        "ages": {name: age.encode() for name, age in ages.items()},
        "layouts": [partition.layout for partition in partitions],
        "groups": [{key: value for key, value in group.items() if _is_plain(key, value)} for group in groups],
    }
    return json.dumps(note)


def _is_plain(key: str, value: Any) -> bool:
    return key not in ("params", FREEZE) and isinstance(value, (bool, int, float, str, list, tuple, type(None)))


# ---------------------------------------------------------------------------------------------------- state dicts in


def told(note: Mapping[str, Any], masks: Mapping[str, FreezeMask], step: int, what: str) -> Loaded:
    """What a note tells beside moments, checked against the plan, which is ``masks`` by name of all parameters.

    Raises:
        ValueError: it was another plan.
    """
    masks = {name: mask.matrix() for name, mask in masks.items()}
    for name, mask in masks.items():
        if note["masks"].get(name) != (mask.fingerprint if mask.frozen_count else None):
            raise ValueError(
                f"{what}: state of {name!r} was saved under another freeze plan; build the optimizer with the plan it "
                "was saved with (then set_freeze)"
            )
    try:
        ages = {name: Ages.decode(text, masks[name], step) for name, text in note["ages"].items() if name in masks}
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    return Loaded(ages, bool(note["kept"]))


def converted(
    partitions: Sequence[Partition], given: Any, members: Sequence[Member], settings: Settings,
    groups: Sequence[Mapping[str, Any]], loaded: Loaded,
) -> dict[str, Any]:  # fmt: skip
    """``given`` with moments packed as those of ``members`` are, veiled; ``loaded`` gets the rest. Tensors that are as
    they should be are taken, not copied, as torch's loader takes them: an engine has no use for them after."""
    what = f"{settings.optimizer}.load_state_dict"
    found, result = read_state_dict(given, what, flat=True), dict(given)
    if len(found) != len(partitions):
        return result  # torch's loader says what differs
    for saved in found:
        if saved.note and saved.state:
            some = told(saved.note, {member.name: member.mask for member in members}, int(saved.state["step"]), what)
            loaded.ages, loaded.whole = some.ages, some.whole
    members = [replace(member, whole=loaded.whole) for member in members]
    result["state"] = dict(given["state"])
    result["param_groups"] = [
        {**saved, **{key: own[key] for key in ("param_names",) if key in own}}
        for saved, own in zip(given["param_groups"], groups, strict=False)
    ]
    for number, (saved, (partition, some_members)) in enumerate(zip(found, together(partitions, members), strict=True)):
        if saved.state is None:
            continue
        form, entry = _Form(partition, some_members), dict[str, Any]()
        layouts = saved.note.get("layouts", [partition.layout] * len(found))
        if len(layouts) != len(found) or layouts[number] != partition.layout:
            raise ValueError(
                f"{what}: flat partition {number} was saved with other parameters in it, or on another number of "
                "ranks; load it as it was saved, or by way of a universal checkpoint (dense_checkpoints=True)"
            )
        dtypes = state_dtypes(partition.tensor, settings, amsgrad=True)
        for key, value in saved.state.items():
            if key in PACKED:
                value = Veiled(form.taken(value, dtypes.get(key, value.dtype), f"{what}: {key!r}"))
            elif key == "step":
                value = Veiled(torch.tensor(float(value), dtype=torch.float32))
            entry[key] = value
        result["state"][saved.key] = entry
    return result


def adopt_notes(
    groups: Sequence[dict[str, Any]], masks: Mapping[str, FreezeMask], state: Mapping[Tensor, Mapping[str, Any]],
    what: str,
) -> Loaded | None:  # fmt: skip
    """What the groups tell since an engine wrote state and groups by itself, as when it loads a universal checkpoint;
    None: they tell of nothing. ``masks``: by name, of all parameters. Groups that were given another's entries get
    their own back.

    Raises:
        ValueError: of another plan, or state is missing.
    """
    found, steps = None, [int(entry["step"]) for entry in state.values() if "step" in entry]
    for index, group in enumerate(groups):
        text = group.get(FREEZE)
        if text in (None, IN_FORCE):
            continue
        label = f"param_groups[{index}][{FREEZE!r}]"
        note = read_note(text, label, what, len(group["params"]), flat=True)
        found = told(note, masks, max(steps, default=0), what)
        if len(note["groups"]) == len(groups):
            group.update(note["groups"][index])
        lost = next((p for p in group["params"] if MOMENTS[0] in (state.get(p) or {}) and group["amsgrad"]), None)
        if lost is not None and MOMENTS[2] not in state[lost]:
            raise ValueError(
                f"{what}: {MOMENTS[2]} was lost on the way, which DeepSpeed's universal checkpoints do not hold; "
                "resume on as many ranks as it was saved on"
            )
    for group in groups if found is not None else ():
        if FREEZE in group:
            group[FREEZE] = IN_FORCE
    return found
