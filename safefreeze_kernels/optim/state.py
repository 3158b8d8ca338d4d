"""An optimizer's state: made, packed by masks, and in and out of state dicts.

What comes in is read with care: whatever is damaged is told by its entry, before anything is changed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..grads.checks import settled
from ..kernels.ages import Ages
from ..kernels.backend import choose_backend
from ..kernels.bits import repack as repack_bits
from ..kernels.operands import CODES, STORAGE, moment_dtype
from ..kernels.parts import compile_live
from ..kernels.reference import decode_largest, decode_moments, encode_largest, encode_moments, from_remainder
from ..model.sharding import is_sharded, local, spread, take
from ..plan.mask import FreezeMask
from .checks import Member, Settings, hyper_parameters

MOMENTS: Final = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
REMAINDER: Final = "master_remainder"
PACKED: Final = (*MOMENTS, REMAINDER)  # the entries of a parameter's state that are packed by its mask
FREEZE: Final = "freeze"  # our own entry of a parameter group, which distributed checkpoint carries along
IN_FORCE: Final = "a plan is in force"  # what it says until a state dict says which: fingerprints take their time

_CODED: Final = "_codes"  # what is appended to the names of moments that are codes, in state dicts
_OF_CODES: Final = {f"{key}{_CODED}": key for key in MOMENTS}
_NEEDED: Final = ("step", "exp_avg", "exp_avg_sq")
_MOST_STEPS: Final = 1 << 24  # float32, in which torch counts, cannot count further
_FLAGS: Final = ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay")

# -------------------------------------------------------------------------------------------------- packed state


def state_dtypes(param: Tensor, settings: Settings, *, amsgrad: bool) -> dict[str, torch.dtype]:
    """The entries of a parameter's state that are packed, with their dtypes."""
    dtypes = dict.fromkeys(MOMENTS[: 3 if amsgrad else 2], moment_dtype(param.dtype, settings.state_dtype))
    if settings.master is not None and param.dtype == torch.bfloat16:
        dtypes[REMAINDER] = torch.int16
    return dtypes


def make_state(state: dict[str, Any], member: Member, settings: Settings, *, amsgrad: bool) -> None:
    """Make what ``state`` of a parameter lacks; check what is there, since a kernel takes its addresses.

    Raises:
        ValueError: an entry has another shape, dtype or device than this parameter's has.
    """
    param, shape = member.param, member.shard_packing.packed_shape
    state.setdefault("step", torch.tensor(0.0, dtype=torch.float32))
    for key, dtype in state_dtypes(param, settings, amsgrad=amsgrad).items():
        if key not in state:
            state[key] = torch.zeros(shape, dtype=dtype, device=member.shard.device)
        moment = state[key]
        for got, expected, aspect in (
            (tuple(moment.shape), shape, "shape"),
            (moment.dtype, dtype, "dtype"),
            (moment.device, param.device, "device"),
        ):
            if got != expected:
                raise ValueError(
                    f"{settings.optimizer}: state {key!r} of {member.name!r} has {aspect} {got}, expected {expected}; "
                    "load foreign state with load_state_dict; after a parameter grew, call set_freeze"
                )
        state[key] = settled(moment)


def repack(moment: Tensor, old: FreezeMask, new: FreezeMask) -> Tensor:
    """State packed under ``old``, packed under ``new``: kept where live in both, else zero."""
    if (old.bits is not None or new.bits is not None) and moment.numel():
        packed = torch.empty(new.packed_shape, dtype=moment.dtype, device=moment.device)
        _repack_elements(moment.contiguous(), old, packed, new)
        return packed
    packed = torch.zeros(new.packed_shape, dtype=moment.dtype, device=moment.device)
    n_rows, n_cols = old.matrix_shape
    places = []
    for was, now, size in ((old.live_rows, new.live_rows, n_rows), (old.live_cols, new.live_cols, n_cols)):
        place = np.full(size, -1)
        place[was] = np.arange(was.size)
        both = np.flatnonzero(place[now] >= 0)
        places.append((torch.from_numpy(both), torch.from_numpy(place[now][both])))
    (rows_to, rows_from), (cols_to, cols_from) = places
    if packed.numel() and rows_to.numel() and cols_to.numel():
        matrix = packed.view(-1, new.live_cols.size)
        source = moment.reshape(-1, old.live_cols.size)
        matrix[rows_to[:, None], cols_to] = source[rows_from[:, None], cols_from]
    return packed


def _repack_elements(moment: Tensor, old: FreezeMask, packed: Tensor, new: FreezeMask) -> None:
    """`repack` between masks of single elements: in one pass on the CPU, else by way of full size, without waiting for
    the device."""
    on_cpu = moment.device.type == "cpu"
    if moment.dtype not in (*STORAGE, torch.int16) and not (moment.dtype == CODES and on_cpu):
        was, now = (torch.from_numpy(np.flatnonzero(~mask.frozen_flags())).to(moment.device) for mask in (old, new))
        whole = torch.zeros(old.numel, dtype=moment.dtype, device=moment.device)
        whole[was] = moment.view(-1)
        packed.view(-1).copy_(whole[now])
        return
    word = torch.bfloat16 if moment.dtype == torch.int16 else moment.dtype  # bytes are moved: their width matters
    source, target = moment.view(word).view(-1), packed.view(word).view(-1)
    if on_cpu:
        plain = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[word.itemsize]
        held, into = (tensor.detach().view(plain).numpy() for tensor in (source, target))
        repack_bits(held, old.frozen_bits, into, new.frozen_bits, old.numel)
        return
    backend = choose_backend("auto", moment.device, "repack", (word,))
    whole = torch.zeros(old.numel, dtype=word, device=moment.device)
    backend.scatter_(compile_live([old]), [whole], [source])
    backend.gather(compile_live([new]), [whole], [target])


def close_gaps(states: Mapping[Tensor, dict[str, Any]], members: Sequence[Member]) -> None:
    """Leave out of ``states``, by `Member.param`, the places that earlier versions kept for frozen single elements."""
    for member in members:
        entries = states.get(member.param, {})
        entries.update({key: _closed(entries[key], member.shard_packing) for key in PACKED if key in entries})


def _closed(moment: Tensor, mask: FreezeMask) -> Tensor:
    """State packed under ``mask``, as it is. Earlier versions kept places for frozen single elements of live rows and
    columns: of such state, these are left out."""
    if mask.bits is None or tuple(moment.shape) == mask.packed_shape:
        return moment
    others = FreezeMask(mask.shape, mask.frozen_rows, mask.frozen_cols if len(mask.shape) > 1 else None)
    return repack(moment, others, mask) if tuple(moment.shape) == others.packed_shape else moment


def unpack(moment: Tensor, mask: FreezeMask) -> Tensor:
    """State packed under ``mask`` in full size, zero where frozen."""
    return repack(moment, mask, FreezeMask(mask.shape)) if mask.frozen_count else moment


def pack(moment: Tensor, mask: FreezeMask) -> Tensor:
    """Full-size state packed under ``mask``."""
    return repack(moment, FreezeMask(mask.shape), mask) if mask.frozen_count else moment


# ------------------------------------------------------------------------------------------------- moments in codes


def decoded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """``state`` of a parameter, moments that are codes as float32."""
    if (first := state.get("exp_avg")) is None or first.dtype != CODES:
        return state
    found = dict(state)
    found["exp_avg"], found["exp_avg_sq"] = decode_moments(first, state["exp_avg_sq"])
    if "max_exp_avg_sq" in state:
        found["max_exp_avg_sq"] = decode_largest(state["max_exp_avg_sq"])
    return found


def encoded(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The codes of float32 ``moments``, each rounded to nearest; of what `decoded` gave they are those it had."""
    first, second = encode_moments(moments["exp_avg"], moments["exp_avg_sq"])
    found = {"exp_avg": first, "exp_avg_sq": second}
    if "max_exp_avg_sq" in moments:
        found["max_exp_avg_sq"] = encode_largest(moments["max_exp_avg_sq"])
    return found


def told_apart(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` of a parameter for a state dict: moments that are codes have names of their own, so that no other
    optimizer takes them for numbers."""
    if (first := state.get("exp_avg")) is None or first.dtype != CODES:
        return state
    return {f"{key}{_CODED}" if key in MOMENTS else key: value for key, value in state.items()}


def _told(state: Any, label: str, what: str) -> Any:
    """What `told_apart` was given."""
    if not isinstance(state, Mapping) or _OF_CODES.keys().isdisjoint(state):
        return state
    found = {key: value for key, value in state.items() if key not in _OF_CODES}
    for key, own in _OF_CODES.items():
        if key in state and own in state:
            raise ValueError(f"{what}: {label} has both {own!r} and {key!r}, expected one of them")
        if key in state:
            found[own] = state[key]
    return found


# ------------------------------------------------------------------------------------------------ state dicts out


@torch.no_grad()
def dense_states(
    states: Mapping[int, dict[str, Any]], members: Sequence[Member], *, live_alone: bool = False
) -> dict[int, dict[str, Any]]:
    """``states``, index of a parameter -> its state, with full-size moments placed as the parameter is, codes as
    float32. ``live_alone``: zero where frozen, whatever is kept there."""

    def dense(moment: Tensor, member: Member) -> Tensor:
        moment = unpack(moment, member.shard_packing)
        if live_alone and member.whole and member.shard_mask.frozen_count:
            moment = moment.masked_fill(member.shard_mask.dense().to(moment.device), 0)
        return spread(moment, member.param)

    return {
        index: {key: dense(value, members[index]) if key in PACKED else value for key, value in decoded(entry).items()}
        for index, entry in states.items()
    }


def plan_note(members: Sequence[Member], ages: Mapping[str, Ages], *, packed: bool) -> str:
    """What a state dict's group tells of the plan of its ``members``, which `read_state_dict` reads. ``packed``:
    whether their moments are. Where frozen ones are kept it is version 2: who knows no such would lose them."""
    masks = {str(i): it.mask.fingerprint for i, it in enumerate(members) if it.mask.frozen_count}
    thawed = {str(i): ages[it.name].encode() for i, it in enumerate(members) if it.name in ages}
    note = {"version": 1, "packed": packed, "masks": masks, "ages": thawed}
    if any(member.whole for member in members):
        note |= {"version": 2, "packed": False, "kept": True}
    return json.dumps(note)


def master_weight(member: Member, state: Mapping[str, Any]) -> Tensor:
    """The float32 weights of a parameter: its master where ``state`` has one, else its values; what float32 does not
    hold is given as it is."""
    shard, mask = member.shard.detach(), member.shard_packing
    weight = shard.float() if shard.dtype in STORAGE else shard
    if (remainder := state.get(REMAINDER)) is not None:
        live = from_remainder(shard, unpack(remainder, mask))
        weight = torch.where(mask.dense().to(shard.device), weight, live)
    return spread(weight, member.param)


# ------------------------------------------------------------------------------------------------- state dicts in


def only_makes_state(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a first step is no training step: distributed checkpoint asks for the state to be made by a step with
    zero gradients and learning rates, and it must count nothing. A warm-up may begin alike; so who asks is looked up,
    at the first step alone."""
    if any(isinstance(group["lr"], float) and group["lr"] != 0 for group in groups):
        return False
    frame: Any = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "torch.distributed.checkpoint.state_dict":
        frame = frame.f_back
    return frame is not None


@dataclass
class Loaded:
    """What a state dict tells beside torch's entries, once it was loaded.

    Attributes:
        ages: by name, of what was thawed or is kept.
        whole: whether state is whole.
    """

    ages: dict[str, Ages]
    whole: bool


@contextmanager
def loading(optimizer: Optimizer, members: Sequence[Member], settings: Settings, how: Converter) -> Iterator[Loaded]:
    """Within, torch's loader of ``optimizer`` takes what ``how``, as `converted` does, makes of a state dict."""
    loaded = Loaded({}, any(member.whole for member in members))

    # The first hook runs after the user's own and hides tensors from torch's casting; the second brings them back.
    def convert(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        return how(given, members, settings, optimizer.param_groups, loaded)

    def unveil(_: Optimizer) -> None:
        for state in optimizer.state.values():
            state.update({key: value.tensor for key, value in state.items() if isinstance(value, Veiled)})

    hooks = [
        optimizer.register_load_state_dict_pre_hook(convert),
        optimizer.register_load_state_dict_post_hook(unveil, prepend=True),
    ]
    try:
        yield loaded
    except RecursionError as error:
        raise ValueError(f"{settings.optimizer}.load_state_dict: the state dict is nested too deeply") from error
    finally:
        for hook in hooks:
            hook.remove()


Converter: TypeAlias = Callable[[Any, Sequence[Member], Settings, Sequence[dict[str, Any]], Loaded], dict[str, Any]]


@dataclass
class Veiled:
    """Carries a tensor through torch's state loader unseen."""

    tensor: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Veiled:
        return self


def converted(
    given: Any, members: Sequence[Member], settings: Settings, groups: Sequence[dict[str, Any]], loaded: Loaded
) -> dict[str, Any]:
    """``given`` with moments packed as those of ``members`` are, or whole if it says so, in this optimizer's dtype,
    veiled; ``loaded`` gets the rest."""
    what = f"{settings.optimizer}.load_state_dict"
    found = read_state_dict(given, what)
    result = dict(given)
    if len(found) != len(members):
        return result  # torch's loader says what differs
    told = {saved.kept for saved in found if saved.noted}
    if len(told) > 1:
        raise ValueError(f"{what}: state of some groups has frozen moments kept, that of others not; it is damaged")
    loaded.whole = told.pop() if told else loaded.whole
    members = [replace(member, whole=loaded.whole) for member in members]
    result["state"] = dict(given["state"])
    # Names are this optimizer's: a checkpoint's must not move the plan to other parameters.
    result["param_groups"] = [
        {**saved, **{key: own[key] for key in ("param_names",) if key in own}}
        for saved, own in zip(given["param_groups"], groups, strict=False)
    ]
    for saved, member in zip(found, members, strict=True):
        if saved.state is not None:
            result["state"][saved.key] = _converted_entry(saved, saved.state, member, settings, what)
        if saved.state is None:
            continue
        if saved.ages is not None:
            try:
                loaded.ages[member.name] = Ages.decode(saved.ages, member.mask, int(saved.state["step"]))
            except ValueError as error:
                raise ValueError(f"{what}: {member.name!r}: {error}") from error
        elif loaded.whole and not saved.noted and member.mask.frozen_count:  # all of it was live until now
            everything = FreezeMask(member.mask.shape)
            loaded.ages[member.name] = Ages.none(everything).after(
                everything, member.mask, int(saved.state["step"]), was_whole=True, whole=True
            )
    return result


def _converted_entry(
    saved: Saved, state: Mapping[str, Any], member: Member, settings: Settings, what: str
) -> dict[str, Any]:
    p, name, mask = member.param, member.name, member.mask
    if saved.noted and saved.mask != (mask.fingerprint if mask.frozen_count else None):
        raise ValueError(
            f"{what}: state of {name!r} was saved under another freeze plan; build the optimizer with the plan it was "
            "saved with (then set_freeze), or save with dense_state_dict(); full-size moments are taken as they are "
            "once 'freeze' is gone from their param_groups"
        )
    if REMAINDER in state and (settings.master is None or p.dtype != torch.bfloat16):
        raise ValueError(
            f"{what}: state of {name!r} holds a float32 master ({REMAINDER}), which this optimizer would lose; build "
            "it with master='remainder' and bfloat16 parameters"
        )
    kept = moment_dtype(p.dtype, settings.state_dtype)
    state = state if kept == CODES else decoded(state)
    packed = saved.packed and saved.mask is not None
    expected = mask.packed_shape if packed else tuple(p.shape)
    entry: dict[str, Any] = {"step": Veiled(torch.tensor(float(state["step"]), dtype=torch.float32))}
    moments: dict[str, Tensor] = {}
    for key, value in state.items():
        if key not in PACKED:
            entry.setdefault(key, value.clone() if isinstance(value, Tensor) else value)
            continue
        if value.is_complex() != p.is_complex():
            raise ValueError(f"{what}: {key} of {name!r} has dtype {value.dtype}, its parameter {p.dtype}")
        moment = _closed(value.detach(), mask) if packed else value.detach()
        if tuple(moment.shape) != expected:
            raise ValueError(f"{what}: {key} of {name!r} has shape {tuple(value.shape)}, expected {expected}")
        if not packed or is_sharded(p):
            moment = pack(take(unpack(moment, mask) if packed else moment, p), member.shard_packing)
        dtype = torch.int16 if key == REMAINDER else torch.float32 if kept == CODES != value.dtype else kept
        moment = moment.to(member.shard.device, dtype).contiguous()
        if dtype == torch.float32 != kept:
            moments[key] = moment
        else:
            entry[key] = Veiled(_owned(moment, value))
    return entry | {key: Veiled(code) for key, code in encoded(moments).items()} if moments else entry


def _owned(tensor: Tensor, given: Tensor) -> Tensor:
    """``tensor``, or a copy of it if it lies in the memory of ``given``: another optimizer's, or a file's."""
    shared = tensor.untyped_storage().data_ptr() == local(given).untyped_storage().data_ptr()
    return tensor.clone() if shared else tensor


# -------------------------------------------------------------------------------------- state dicts, read with care


@dataclass(frozen=True)
class Saved:
    """What a state dict tells of one parameter.

    Attributes:
        key: its number there.
        state: its entries; None: it has none.
        noted: whether the state dict tells of a plan at all.
        mask: fingerprint of the mask it was saved under; None: nothing of it was frozen.
        packed: whether its moments are packed by that mask.
        kept: whether they are there where it freezes, too.
        ages: `Ages.encode` of what was thawed in it; None: nothing was.
        note: all that its group tells of the plan.
    """

    key: Any
    state: Mapping[str, Any] | None
    noted: bool
    mask: str | None
    packed: bool
    kept: bool
    ages: list[str] | None
    note: Mapping[str, Any]


def read_state_dict(given: Any, what: str, *, flat: bool = False) -> list[Saved]:
    """Every parameter of a state dict, checked, in the order of its groups. ``flat``: they are flat partitions.

    Raises:
        ValueError: naming the entry that is missing or is none that an Adam could have saved.
    """
    _expect(isinstance(given, Mapping), what, "the state dict", given, "a dict")
    for key, kind in (("state", Mapping), ("param_groups", list)):
        _expect(isinstance(given.get(key), kind), what, f"entry {key!r}", given.get(key), f"a {kind.__name__.lower()}")
    found: list[Saved] = []
    for index, group in enumerate(given["param_groups"]):
        label = f"param_groups[{index}]"
        _expect(isinstance(group, Mapping), what, label, group, "a dict")
        _check_group(group, label, what)
        keys = group.get("params")
        _expect(isinstance(keys, list), what, f"{label}['params']", keys, "a list of numbers")
        note = read_note(group.get(FREEZE), f"{label}[{FREEZE!r}]", what, len(keys), flat=flat)
        for place, number in enumerate(keys):
            number = number if isinstance(number, (int, str)) else repr(number)  # hashable
            state = _told(given["state"].get(number), f"state[{number!r}]", what)
            if state is not None:
                _check_state(state, f"state[{number!r}]", what)
            mask, ages = (note.get(entry, {}).get(str(place)) for entry in ("masks", "ages"))
            if ages is not None and not state:
                raise ValueError(f"{what}: {label}[{FREEZE!r}] has ages of parameter {number!r}, which has no state")
            packed, kept = note.get("packed", False), note.get("kept", False)
            found.append(Saved(number, state or None, bool(note), mask, packed, kept, ages, note))
    if len({saved.key for saved in found}) < len(found):
        raise ValueError(f"{what}: param_groups name a parameter twice, expected each number once")
    return found


def _expect(right: bool, what: str, label: str, got: Any, expected: str) -> None:
    if not right:
        told = f"{got!r:.60}" if isinstance(got, (str, int, float)) else f"a {type(got).__name__}"
        raise ValueError(f"{what}: {label} is {'missing' if got is None else told}, expected {expected}")


def _check_group(group: Mapping[str, Any], label: str, what: str) -> None:
    for key in ("lr", "betas", "eps", "weight_decay"):
        value = group.get(key)
        numbers = value if key == "betas" and isinstance(value, (list, tuple)) else [value]
        right = all(isinstance(n, (Real, Tensor)) and not isinstance(n, bool) for n in numbers)
        _expect(right and (key != "betas" or len(numbers) == 2), what, f"{label}[{key!r}]", value,
                "two numbers" if key == "betas" else "a number")  # fmt: skip
    for key in _FLAGS:
        _expect(isinstance(group.get(key, False), bool), what, f"{label}[{key!r}]", group.get(key), "True or False")
    try:
        hyper_parameters(group)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{what}: {label}: {error}") from error


def _check_state(state: Any, label: str, what: str) -> None:
    """Raise unless an Adam(W) could have saved this of a parameter."""
    _expect(isinstance(state, Mapping), what, label, state, "a dict")
    for key in _NEEDED if state else ():
        if key not in state:
            raise ValueError(f"{what}: {label} lacks {key!r}, expected the state of an Adam or AdamW")
    for key in PACKED:
        if key in state:
            _check_moment(state[key], f"{label}[{key!r}]", what, whole=key == REMAINDER)
    kinds = {key: str(state[key].dtype) for key in MOMENTS if key in state}
    if len({kind == str(CODES) for kind in kinds.values()}) > 1:
        raise ValueError(f"{what}: {label} has moments of dtypes {kinds}, expected codes (uint8) for all or for none")
    if "step" in state:
        step = state["step"]
        one = isinstance(step, Tensor) and step.numel() == 1 and not step.is_complex() and step.device.type != "meta"
        number = isinstance(step, Real) and not isinstance(step, bool)
        _expect(one or number, what, f"{label}['step']", step, "a number or a one-element tensor")
        count = step.item() if isinstance(step, Tensor) else step
        whole = isinstance(count, int) or (math.isfinite(count) and count == int(count))
        if not whole or not 0 <= count <= _MOST_STEPS:
            raise ValueError(
                f"{what}: {label}['step'] is {count!r:.30}, expected a whole number from 0 to {_MOST_STEPS:,}"
            )


def _check_moment(moment: Any, label: str, what: str, *, whole: bool) -> None:
    _expect(isinstance(moment, Tensor), what, label, moment, "a tensor")
    if moment.layout != torch.strided or moment.device.type == "meta":
        raise ValueError(
            f"{what}: {label} has layout {moment.layout} on {moment.device}, expected a dense tensor of values"
        )
    right = moment.is_floating_point() or moment.is_complex() or moment.dtype == CODES
    right = moment.dtype == torch.int16 if whole else right
    if not right:
        raise ValueError(f"{what}: {label} has dtype {moment.dtype}, expected {'int16' if whole else 'floating point'}")


def read_note(text: Any, label: str, what: str, n_params: int, *, flat: bool = False) -> dict[str, Any]:
    """What a saved group tells of its plan, as `plan_note` wrote it: "packed", "kept", and by places in the group
    "masks" and "ages". Of ``flat`` partitions "kept", and by names "masks" and "ages". Empty: it tells of none."""
    if text is None:
        return {}
    _expect(isinstance(text, str), what, label, text, "the text that state_dict() wrote")
    try:
        note: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: {label} cannot be read ({error}); the state is damaged") from error
    _expect(isinstance(note, dict), what, label, note, "a JSON object")
    version, packed, kept = note.get("version"), note.get("packed"), note.get("kept", False)
    right = isinstance(version, int) and not isinstance(version, bool)
    _expect(right, what, f"{label}: version", version, "1, 2 or 3")
    if version not in (1, 2, 3):
        raise ValueError(f"{what}: {label}: state has version {version}, this package reads 1 to 3; upgrade it")
    if flat != (version == 3):
        places = "DeepSpeed ZeRO's flat partitions", "parameters, without DeepSpeed ZeRO"
        got, expected = places if version == 3 else places[::-1]
        raise ValueError(
            f"{what}: {label}: state was saved of {got}, expected {expected}; load it as it was saved, or weights alone"
        )
    _expect(flat or isinstance(packed, bool), what, f"{label}: packed", packed, "true or false")
    _expect(isinstance(kept, bool) and not (kept and packed), what, f"{label}: kept", kept, "false of packed state")
    for key in ("layouts", "groups") if flat else ():
        _expect(isinstance(note.get(key), list), what, f"{label}: {key}", note.get(key), "a list")
    for key in ("masks", "ages"):
        _expect(isinstance(note.get(key), dict), what, f"{label}: {key}", note.get(key), "a JSON object")
        for place, got in note[key].items():
            if not flat and not (place.isdecimal() and place.isascii() and int(place) < n_params):
                raise ValueError(f"{what}: {label}: {key} names place {place!r:.30}, expected 0 to {n_params - 1}")
            right, expected = isinstance(got, str), "a fingerprint"
            if key == "ages":
                right = isinstance(got, list) and len(got) in (2, 3) and all(isinstance(age, str) for age in got)
                expected = "two or three texts"
            _expect(right, what, f"{label}: {key}[{place!r}]", got, expected)
    return note
