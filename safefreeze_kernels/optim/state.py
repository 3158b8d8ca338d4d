"""State dicts of optimizers, read with care: whatever is damaged is told by its entry, before anything is changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from ..model.sharding import local
from ..plan.mask import FreezeMask

MOMENTS: Final = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
REMAINDER: Final = "master_remainder"
FREEZE: Final = "freeze"  # our own entry of a parameter group, which distributed checkpoint carries along

_NEEDED: Final = ("step", "exp_avg", "exp_avg_sq")
_MOST_STEPS: Final = 1 << 24  # float32, in which torch counts, cannot count further
_FLAGS: Final = ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay")


@dataclass(frozen=True)
class Saved:
    """What a state dict tells of one parameter.

    Attributes:
        key: its number there.
        state: its entries; None: it has none.
        noted: whether the state dict tells of a plan at all.
        mask: fingerprint of the mask it was saved under; None: nothing of it was frozen.
        packed: whether its moments are packed by that mask.
        ages: `Ages.encode` of what was thawed in it; None: nothing was.
    """

    key: Any
    state: Mapping[str, Any] | None
    noted: bool
    mask: str | None
    packed: bool
    ages: list[str] | None


def read_state_dict(given: Any, what: str, check_group: Callable[[dict[str, Any]], None]) -> list[Saved]:
    """Every parameter of a state dict, checked, in the order of its groups. ``check_group`` raises where a
    hyper-parameter is out of range.

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
        _check_hyper_parameters(group, label, what, check_group)
        keys = group.get("params")
        _expect(isinstance(keys, list), what, f"{label}['params']", keys, "a list of numbers")
        note = _Note.read(group.get(FREEZE), f"{label}[{FREEZE!r}]", what, len(keys))
        for place, key in enumerate(map(_hashable, keys)):
            state = given["state"].get(key)
            if state is not None:
                _check_state(state, f"state[{key!r}]", what)
            ages = note.ages.get(str(place))
            if ages is not None and not state:
                raise ValueError(f"{what}: {label}[{FREEZE!r}] has ages of parameter {key!r}, which has no state")
            found.append(Saved(key, state or None, note.noted, note.masks.get(str(place)), note.packed, ages))
    if len({saved.key for saved in found}) < len(found):
        raise ValueError(f"{what}: param_groups name a parameter twice, expected each number once")
    return found


def _expect(right: bool, what: str, label: str, got: Any, expected: str) -> None:
    if not right:
        told = f"{got!r:.60}" if isinstance(got, (str, int, float)) else f"a {type(got).__name__}"
        raise ValueError(f"{what}: {label} is {'missing' if got is None else told}, expected {expected}")


def _hashable(key: Any) -> Any:
    return key if isinstance(key, (int, str)) else repr(key)


def _check_hyper_parameters(
    group: Mapping[str, Any], label: str, what: str, check_group: Callable[[dict[str, Any]], None]
) -> None:
    for key in ("lr", "betas", "eps", "weight_decay"):
        value = group.get(key)
        numbers = value if key == "betas" and isinstance(value, (list, tuple)) else [value]
        right = all(isinstance(n, (Real, Tensor)) and not isinstance(n, bool) for n in numbers)
        _expect(right and (key != "betas" or len(numbers) == 2), what, f"{label}[{key!r}]", value,
                "two numbers" if key == "betas" else "a number")  # fmt: skip
    for key in _FLAGS:
        _expect(isinstance(group.get(key, False), bool), what, f"{label}[{key!r}]", group.get(key), "True or False")
    try:
        check_group(dict(group))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{what}: {label}: {error}") from error


def _check_state(state: Any, label: str, what: str) -> None:
    """Raise unless an Adam(W) could have saved this of a parameter."""
    _expect(isinstance(state, Mapping), what, label, state, "a dict")
    for key in _NEEDED if state else ():
        if key not in state:
            raise ValueError(f"{what}: {label} lacks {key!r}, expected the state of an Adam or AdamW")
    for key in (*MOMENTS, REMAINDER):
        if key in state:
            _check_moment(state[key], f"{label}[{key!r}]", what, whole=key == REMAINDER)
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
    right = moment.dtype == torch.int16 if whole else moment.is_floating_point() or moment.is_complex()
    if not right:
        raise ValueError(f"{what}: {label} has dtype {moment.dtype}, expected {'int16' if whole else 'floating point'}")


@dataclass(frozen=True)
class _Note:
    """What a saved group tells of its plan, as `MaskedAdam.state_dict` wrote it. Keys are places in the group."""

    noted: bool
    packed: bool
    masks: Mapping[str, str]
    ages: Mapping[str, list[str]]

    @classmethod
    def read(cls, text: Any, label: str, what: str, n_params: int) -> _Note:
        if text is None:
            return cls(False, False, {}, {})
        _expect(isinstance(text, str), what, label, text, "the text that state_dict() wrote")
        try:
            note = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what}: {label} cannot be read ({error}); the state is damaged") from error
        _expect(isinstance(note, dict), what, label, note, "a JSON object")
        version = note.get("version")
        _expect(isinstance(version, int) and not isinstance(version, bool), what, f"{label}: version", version, "1")
        if version != 1:
            raise ValueError(f"{what}: {label}: state has version {version}, this package reads 1; upgrade it")
        packed = note.get("packed")
        _expect(isinstance(packed, bool), what, f"{label}: packed", packed, "true or false")
        for key in ("masks", "ages"):
            _expect(isinstance(note.get(key), dict), what, f"{label}: {key}", note.get(key), "a JSON object")
            for place in note[key]:
                if not (place.isdecimal() and place.isascii() and int(place) < n_params):
                    raise ValueError(f"{what}: {label}: {key} names place {place!r:.30}, expected 0 to {n_params - 1}")
        for place, mask in note["masks"].items():
            _expect(isinstance(mask, str), what, f"{label}: masks[{place!r}]", mask, "a fingerprint")
        for place, ages in note["ages"].items():
            right = isinstance(ages, list) and len(ages) in (2, 3) and all(isinstance(age, str) for age in ages)
            _expect(right, what, f"{label}: ages[{place!r}]", ages, "two or three texts")
        return cls(True, packed, note["masks"], note["ages"])


# ----------------------------------------------------------------------------------------------- packed state


def _owned(tensor: Tensor, given: Tensor) -> Tensor:
    """``tensor``, or a copy of it if it lies in the memory of ``given``: another optimizer's, or a file's."""
    shared = tensor.untyped_storage().data_ptr() == local(given).untyped_storage().data_ptr()
    return tensor.clone() if shared else tensor


def _repack(moment: Tensor, old: FreezeMask, new: FreezeMask) -> Tensor:
    """State packed under ``old``, packed under ``new``: kept where live in both, else zero."""
    n_rows, n_cols = old.matrix_shape
    packed = torch.zeros(new.packed_shape, dtype=moment.dtype, device=moment.device)
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
        for mask in (old, new):
            if mask.elements is not None:
                frozen = mask.elements.reshape(n_rows, n_cols)[new.live_rows][:, new.live_cols]
                matrix[frozen] = 0
    return packed
