"""When the live elements of a tensor were thawed: their bias correction counts from there."""

from __future__ import annotations

import base64
import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from ..plan.mask import FreezeMask
from .bits import NOW, WAS, narrowest, repack, roomy, turn

_LIVE: Final = 1  # bits of `Ages.there`
_FROZEN: Final = 2


@dataclass
class Ages:
    """When the live elements of one tensor were thawed, counted in that tensor's own steps; 0 = live from the start.

    An element is as old as the youngest of its row, its column and itself. Of what is frozen while its moments are
    kept, the number is how many steps it took before: thawed, it may count on from there. Else it is 0.
    """

    rows: np.ndarray  # int64 [rows]
    cols: np.ndarray  # int64 [cols]
    elements: np.ndarray | None = None  # unsigned [rows, cols], numbers in `table`; once single elements were thawed
    table: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # ages, ascending
    there: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))  # of each: may live, frozen ones have it

    @classmethod
    def none(cls, mask: FreezeMask) -> Ages:
        return cls.alike(mask.matrix_shape, 0)

    @classmethod
    def alike(cls, shape: tuple[int, int], age: int) -> Ages:
        """The same for all elements of a matrix."""
        return cls(np.full(shape[0], age, np.int64), np.zeros(shape[1], np.int64))

    @classmethod
    def of_elements(cls, ages: np.ndarray) -> Ages:
        """``ages`` of the elements of a matrix: integers [rows, cols], 0 or more."""
        found = np.zeros(int(ages.max(initial=0)) + 1, bool)  # to sort them would take many times longer
        found[ages] = True
        table, numbers = np.flatnonzero(found), np.cumsum(found) - 1
        rows, cols = (np.zeros(size, np.int64) for size in ages.shape)
        return cls(rows, cols, numbers.astype(narrowest(table.size))[ages], table, _anyone(table))

    def dense(self, rows: slice = slice(None)) -> np.ndarray:
        """Of every element of some rows: int64, spreads to [rows, cols]; not to be written to."""
        parts = [self.rows[rows, None]] if self.rows.any() else []
        parts += [self.cols[None]] if self.cols.any() else []
        parts += [] if self.elements is None else [self.table[self.elements[rows]]]
        return functools.reduce(np.maximum, parts, np.zeros((1, 1), np.int64))

    def numbered(self, mask: FreezeMask, *, whole: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """The ages of what is live in ``mask``, int64; and which of them each element has, unsigned: [live elements]
        or, if ``whole``, [elements], where what is frozen has any of them. None: there is but one."""
        ages = self._by_element()
        live = (ages.there & _LIVE) != 0
        if ages.elements is None or live.sum() < 2:
            return ages.table[live], None
        numbers = ages.elements.reshape(-1)
        if not whole:
            numbers, every = roomy(mask.live_count, numbers.dtype), numbers
            repack(every, None, numbers, mask.frozen_bits, mask.numel)
        return np.where(live, ages.table, ages.table[live][0]), numbers

    def _by_element(self) -> Ages:
        """The same, with rows and columns worked into elements. Without ``elements``, all have the first of `table`."""
        if self.elements is not None:
            return Ages.of_elements(self.dense()) if self.rows.any() or self.cols.any() else self
        (rows, of_row), (cols, of_col) = (np.unique(lines, return_inverse=True) for lines in (self.rows, self.cols))
        table, numbers = np.unique(np.maximum.outer(rows, cols), return_inverse=True)
        numbers = numbers.reshape(rows.size, cols.size).astype(narrowest(table.size))
        elements = numbers[of_row[:, None], of_col] if table.size > 1 else None
        return Ages(np.zeros_like(self.rows), np.zeros_like(self.cols), elements, table, _anyone(table))

    def shard(self, mask: FreezeMask, held: list[np.ndarray] | None) -> Ages:
        """Ages in a shard of the tensor (`sharding.held`), whose whole mask is ``mask``."""
        if held is None:
            return self
        rows, cols = mask.matrix_index(held)
        elements = None if self.elements is None else self.elements[rows][:, cols]
        return replace(self, rows=self.rows[rows], cols=self.cols[cols], elements=elements)

    def encode(self) -> list[str]:
        """As text: rows, columns and, if there are any, elements."""
        arrays = [self.rows, self.cols] + ([] if self.elements is None else [self.table[self.elements]])
        return [base64.b64encode(zlib.compress(a.astype("<i8").tobytes())).decode("ascii") for a in arrays]

    @classmethod
    def decode(cls, texts: Sequence[str], mask: FreezeMask, step: int) -> Ages:
        """What `encode` made of the ages of a tensor with this mask, which took ``step`` steps.

        Raises:
            ValueError: it is something else.
        """
        n_rows, n_cols = mask.matrix_shape
        shapes: list[tuple[int, ...]] = [(n_rows,), (n_cols,), (n_rows, n_cols)]
        arrays: list[np.ndarray] = []
        for text, shape in zip(texts, shapes, strict=False):
            size = 8 * math.prod(shape)
            try:  # never more memory than the tensor's shape calls for
                data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
            except (ValueError, TypeError, zlib.error) as error:
                raise ValueError(f"ages of a thawed tensor of shape {mask.shape} are damaged ({error})") from error
            if len(data) != size:
                raise ValueError(f"ages of a thawed tensor hold {len(data)} bytes, expected {size} for {mask.shape}")
            found = np.frombuffer(data, "<i8").reshape(shape)
            arrays.append(found.astype(np.int64))
            if found.size and not 0 <= found.min() <= found.max() <= step:
                raise ValueError(f"ages of a thawed tensor are not within its {step} steps; they are damaged")
        lines = cls(*arrays[:2])
        return lines if len(arrays) < 3 else replace(cls.of_elements(arrays[2]), rows=lines.rows, cols=lines.cols)

    def __bool__(self) -> bool:
        return bool(self.rows.any() or self.cols.any() or self.table[self.there != 0].any())

    def grown(self, old: FreezeMask, new: FreezeMask, *, whole: bool = False) -> Ages:
        """Ages once the tensor of mask ``old`` has grown to the shape of ``new`` (`FreezeMask.grown`). ``whole``: what
        is frozen counts its steps, and what was added took none, whatever those beside it in a row or column did."""
        if old.shape == new.shape:
            return self
        rows, cols = new.matrix_index([np.arange(size) for size in old.shape])
        ages = Ages.none(new)
        longer = [after > before for before, after in zip(old.matrix_shape, new.matrix_shape, strict=True)]
        across = (longer[1] and self.rows.any()) or (longer[0] and self.cols.any())
        elements = None if self.elements is None else self.table[self.elements]
        if whole and across:
            elements = self.dense()
        else:
            ages.rows[rows], ages.cols[cols] = self.rows, self.cols
        if elements is None:
            return ages
        born = np.zeros(new.matrix_shape, np.int64)
        born[np.ix_(rows, cols)] = elements
        return replace(Ages.of_elements(born), rows=ages.rows, cols=ages.cols)

    def after(
        self, old: FreezeMask, new: FreezeMask, step: int, *, was_whole: bool = False, whole: bool = False,
        counts_on: bool = False,
    ) -> Ages:  # fmt: skip
        """Ages once ``new`` replaces ``old`` after ``step`` steps: what ``new`` thaws is born now or, if it
        ``counts_on``, as many steps ago as it took. State is whole, so that frozen moments are kept, or was until now.
        """
        how = {"was_whole": was_whole, "whole": whole, "counts_on": counts_on}
        return after_all([self], [old], [new], [step], **how)[0]

    def _axis(self, old: FreezeMask, new: FreezeMask) -> int | None:
        """Along which lines alone, rows (0) or columns (1), ages differ and masks freeze; None: not along one."""
        for axis, others in ((0, self.cols), (1, self.rows)):
            apart = old.lines(axis) is not None and new.lines(axis) is not None
            if apart and self.elements is None and not others.any():
                return axis
        return None

    def _after(
        self, old: FreezeMask, new: FreezeMask, step: int, was_whole: bool, whole: bool, counts_on: bool
    ) -> Ages:
        """`after`, whatever the masks freeze."""
        if was_whole or whole or self.elements is not None or old.bits is not None:
            return self._turned(old, new, step, was_whole, whole, counts_on)
        rows, cols = self.rows.copy(), self.cols.copy()
        rows[old.frozen_rows] = cols[old.frozen_cols] = 0  # what earlier versions left there
        rows[np.setdiff1d(old.frozen_rows, new.frozen_rows)] = step
        cols[np.setdiff1d(old.frozen_cols, new.frozen_cols)] = step
        return Ages(rows, cols)

    def _turned(
        self, old: FreezeMask, new: FreezeMask, step: int, was_whole: bool, whole: bool, counts_on: bool
    ) -> Ages:
        """`after` of each element by itself: rows and columns may pause at different times."""
        ages, none = self._by_element(), np.zeros_like
        took = ages.table if was_whole else none(ages.table)  # of what was frozen
        ways = {
            0: ages.table, WAS: step - took if counts_on else none(took) + step,
            NOW: step - ages.table if whole else none(took), WAS | NOW: took if whole else none(took),
        }  # fmt: skip
        known = np.stack([(ages.there & (_FROZEN if way & WAS else _LIVE)) != 0 for way in range(4)])
        table, numbers = np.unique(np.stack([ways[way] for way in range(4)])[known], return_inverse=True)
        becomes = np.zeros(known.shape, np.uint32)
        becomes[known] = numbers
        before = None if ages.elements is None else ages.elements.reshape(-1)
        bits = old.frozen_bits, new.frozen_bits
        elements, seen = turn(before, *bits, old.numel, becomes, narrowest(table.size))
        there = np.zeros(table.size, np.uint8)
        for way in range(4):
            there[becomes[way][seen[way]]] |= _FROZEN if way & NOW else _LIVE
        some = np.flatnonzero(there)
        if some.size < 2:  # nothing that differs from element to element need be kept
            return Ages.alike(old.matrix_shape, int(table[some].sum()))
        return replace(ages, elements=elements.reshape(old.matrix_shape), table=table, there=there)


def _anyone(table: np.ndarray) -> np.ndarray:
    """`Ages.there` where it is not known who has which."""
    return np.full(table.size, _LIVE | _FROZEN, np.uint8)


def after_all(
    ages: Sequence[Ages], olds: Sequence[FreezeMask], news: Sequence[FreezeMask], steps: Sequence[int],
    *, was_whole: bool, whole: bool, counts_on: bool,
) -> list[Ages]:  # fmt: skip
    """`Ages.after` of many tensors, those that freeze lines alone at once."""
    axes = [age._axis(old, new) for age, old, new in zip(ages, olds, news, strict=True)]
    found = [
        age if axis is not None else age._after(old, new, step, was_whole, whole, counts_on)
        for age, old, new, step, axis in zip(ages, olds, news, steps, axes, strict=True)
    ]
    plain = [(i, axis) for i, axis in enumerate(axes) if axis is not None]
    if not plain:
        return found
    numbers = [ages[i].cols if axis else ages[i].rows for i, axis in plain]
    lines = Lines([n.size for n in numbers])
    turned = lines.turned([olds[i].lines(axis) for i, axis in plain], [news[i].lines(axis) for i, axis in plain])
    flat, step = np.concatenate(numbers), np.repeat([steps[i] for i, _ in plain], lines.sizes)
    if not was_whole:
        flat[(turned & WAS) != 0] = 0
    # from when a thing was born to how many steps it took, and back, is the same difference
    changed, thawed = np.flatnonzero((turned == WAS) | (turned == NOW)), np.flatnonzero(turned == WAS)
    flat[changed] = step[changed] - flat[changed]
    if not counts_on:
        flat[thawed] = step[thawed]
    if not whole:
        flat[(turned & NOW) != 0] = 0
    for (i, axis), piece in zip(plain, lines.split(flat), strict=True):
        found[i] = Ages(ages[i].rows, piece) if axis else Ages(piece, ages[i].cols)
    return found


class Lines:
    """Rows or columns of many tensors end to end, ``sizes`` of each."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = np.array(sizes, np.int64)
        self.ends = np.cumsum(self.sizes)

    def turned(self, was: Sequence[Any], now: Sequence[Any]) -> np.ndarray:
        """Of each line, whether it `WAS` frozen and is `NOW`: uint8. Given are the frozen lines of each tensor."""
        found = np.zeros(self.ends[-1] if self.ends.size else 0, np.uint8)
        found[self._together(was)] = WAS
        found[self._together(now)] |= NOW
        return found

    def _together(self, lines: Sequence[np.ndarray]) -> np.ndarray:
        found: np.ndarray = np.repeat(self.ends - self.sizes, [some.size for some in lines]) + np.concatenate(lines)
        return found

    def split(self, flat: np.ndarray) -> list[np.ndarray]:
        """What ``flat`` holds of each tensor's lines."""
        return [flat[end - size : end] for end, size in zip(self.ends.tolist(), self.sizes.tolist(), strict=True)]

    def chosen(self, flags: np.ndarray) -> list[np.ndarray]:
        """The lines of each tensor whose flag is set."""
        found, starts = np.flatnonzero(flags), (self.ends - self.sizes).tolist()
        cuts = np.searchsorted(found, self.ends).tolist()
        return [found[a:b] - start for a, b, start in zip([0, *cuts], cuts, starts, strict=False)]
