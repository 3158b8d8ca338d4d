"""Plans written as text: ``"model.layers.*.mlp.up_proj.weight[0:64]"``."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .binding import Model, bare_name, named_tensors
from .mask import FreezeMask

_ITEM = r"(?:-?\d+)?:(?:-?\d+)?(?::(?:-?\d+)?)?|-?\d+"
_INDEX = rf"\s*(?:{_ITEM}|\[\s*(?:{_ITEM})(?:\s*,\s*(?:{_ITEM}))*\s*\])\s*"
_PATTERN = re.compile(rf"(?P<name>[^\[\]\s]+)(?:\[(?P<index>{_INDEX}(?:,{_INDEX})*)\])?")


@dataclass(frozen=True)
class Pattern:
    """Which elements of which parameters: a name with ``*`` for any text, and an index as of an array.

    Attributes:
        text: as it was written.
        name: matches a parameter's name, or its name without what wrappers put into it.
        index: per dimension the numbers and slices that are chosen; dimensions left out are taken whole.
    """

    text: str
    name: re.Pattern[str]
    index: tuple[tuple[int | slice, ...], ...]

    @classmethod
    def read(cls, text: str, operation: str) -> Pattern:
        """Raises ValueError: the text is no pattern."""
        found = _PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
        if found is None:
            raise ValueError(
                f"{operation}: pattern {text!r} cannot be read, expected a name, with * for any text, and an index as "
                "of an array: 'up_proj.weight[0:64]' (rows), 'down_proj.weight[:, [3, 17]]' (columns), '*.bias'"
            )
        name = re.compile(".*".join(map(re.escape, found["name"].split("*"))))
        parts = re.findall(rf"\[[^\]]*\]|{_ITEM}", found["index"] or "")
        return cls(text, name, tuple(tuple(map(_item, re.findall(_ITEM, part))) for part in parts))

    def matches(self, name: str) -> bool:
        """Whether a parameter is meant."""
        return any(self.name.fullmatch(given) for given in (name, bare_name(name)))

    def mask(self, name: str, shape: Sequence[int], operation: str) -> FreezeMask:
        """What is chosen of a parameter.

        Raises:
            ValueError: more dimensions are indexed than it has, an index is out of range, or nothing is chosen.
        """
        what = f"{operation}: pattern {self.text!r}, {name!r} of shape {tuple(shape)}"
        if len(self.index) > len(shape):
            raise ValueError(f"{what}: {len(self.index)} dimensions are indexed, expected {len(shape)} at most")
        chosen = [np.ones(size, bool) for size in shape]
        for dim, items in enumerate(self.index):
            chosen[dim][:] = False
            for item in items:
                if isinstance(item, int) and not -shape[dim] <= item < shape[dim]:
                    raise ValueError(f"{what}: index {item} is out of range, expected less than {shape[dim]}")
                chosen[dim][item] = True
            if shape[dim] and not chosen[dim].any():
                raise ValueError(f"{what}: dimension {dim} is left empty, expected a range that holds something")
        if len(shape) < 2:
            return FreezeMask(shape, rows=chosen[0] if chosen else [0])
        rows = functools.reduce(np.multiply.outer, chosen[:-1]).reshape(-1)
        if chosen[-1].all():
            return FreezeMask(shape, rows=rows)
        if rows.all():
            return FreezeMask(shape, cols=chosen[-1])
        return FreezeMask(shape, elements=np.multiply.outer(rows, chosen[-1]).reshape(tuple(shape)))


def _item(text: str) -> int | slice:
    if ":" not in text:
        return int(text)
    return slice(*(int(part) if part else None for part in text.split(":")))


def masks_of(
    model: Model | Mapping[str, Sequence[int]], freeze: Sequence[str], live: Sequence[str]
) -> dict[str, FreezeMask]:
    """The masks of `FreezePlan.of`, which says what is meant and raised; ``live``: its ``train_only``."""
    operation = "FreezePlan.of"
    if bool(freeze) == bool(live):
        raise ValueError(f"{operation}: {len(freeze)} patterns and {len(live)} of train_only given, expected one kind")
    shapes, names = _shapes(model)
    masks: dict[str, FreezeMask] = {}
    for text in freeze or live:
        pattern = Pattern.read(text, operation)
        meant = list(dict.fromkeys(first for name, first in names.items() if pattern.matches(name)))
        if not meant:
            near = difflib.get_close_matches(text.partition("[")[0], names, n=1, cutoff=0.0)
            raise ValueError(
                f"{operation}: pattern {text!r} matches none of {len(names)} parameters, expected the whole name of "
                f"one, with * for any text, such as {', '.join(map(repr, near))}"
            )
        for name in meant:
            mask = pattern.mask(name, shapes[name], operation)
            masks[name] = masks[name] | mask if name in masks else mask
    if live:
        masks = {
            name: FreezeMask(shape, elements=~masks[name].frozen_flags().reshape(tuple(shape)))
            if name in masks
            else FreezeMask(shape, rows=range(FreezeMask(shape).matrix_shape[0]))
            for name, shape in shapes.items()
        }
    return {name: mask for name, mask in masks.items() if mask.frozen_count}


def _shapes(model: Any) -> tuple[dict[str, Sequence[int]], dict[str, str]]:
    """Shape of every parameter, tied ones once; and every name -> the first name of its parameter."""
    if isinstance(model, Mapping) and not any(hasattr(value, "shape") for value in model.values()):
        return dict(model), {name: name for name in model}
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    shapes: dict[str, Sequence[int]] = {}
    for name, tensor in named_tensors(model):
        names[name] = first.setdefault(id(tensor), name)
        shapes.setdefault(names[name], tuple(tensor.shape))
    return shapes, names
