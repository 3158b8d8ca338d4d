"""When the live elements of a tensor were thawed: their bias correction counts from there."""

from __future__ import annotations

import base64
import contextlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..plan.mask import FreezeMask, padded, unpack_bits

_C: Any = None
with contextlib.suppress(ImportError):
    from .. import _C


@dataclass
class Ages:
    """When the live elements of one tensor were thawed, counted in that tensor's own steps; 0 = live from the start.

    An element is as old as the youngest of its row, its column and itself. Of what is frozen while its moments are
    kept, the number is how many steps it took before: thawed, it may count on from there. Else it is 0.
    """

    rows: np.ndarray  # int64 [rows]
    cols: np.ndarray  # int64 [cols]
    elements: np.ndarray | None = None  # int32 [rows, cols]; only once single elements were thawed

    @classmethod
    def none(cls, mask: FreezeMask) -> Ages:
        n_rows, n_cols = mask.matrix_shape
        return cls(np.zeros(n_rows, np.int64), np.zeros(n_cols, np.int64))

    def dense(self) -> np.ndarray:
        """Of every element: int32 [rows, cols]; not to be written to."""
        if self.elements is not None and not self.rows.any() and not self.cols.any():
            return np.ascontiguousarray(self.elements, np.int32)
        born: np.ndarray = np.maximum(self.rows.astype(np.int32)[:, None], self.cols.astype(np.int32)[None, :])
        return born if self.elements is None else np.maximum(born, self.elements.astype(np.int32, copy=False))

    def numbered(self, frozen_bits: np.ndarray, *, whole: bool) -> tuple[np.ndarray, np.ndarray]:
        """The different ages of the elements whose bit is clear, int64, ascending; and which of them each has, modulo
        2**16: uint16 [such elements], or [elements] with others at 0 if ``whole``."""
        born = self.dense().reshape(-1)
        there = np.zeros(int(born.max()) + 1, np.uint8)  # to sort them would take many times longer
        live, bits = np.zeros(0, bool), padded(frozen_bits)
        if _C is None:
            live = ~unpack_bits(frozen_bits, born.shape)
            there[born[live]] = 1
        else:
            _C.number_ages(born.ctypes.data, bits.ctypes.data, born.size, there.ctypes.data, 0, 0, False)
        number = (np.cumsum(there, dtype=np.int64) - 1).astype(np.uint16)
        size = born.size - int(np.bitwise_count(frozen_bits).sum())
        numbers = np.zeros(born.size if whole else size, np.uint16)
        if _C is None:
            numbers[live if whole else slice(None)] = number[born[live]]
        else:
            at = (array.ctypes.data for array in (number, numbers))
            _C.number_ages(born.ctypes.data, bits.ctypes.data, born.size, 0, *at, whole)
        return np.flatnonzero(there), numbers

    def shard(self, mask: FreezeMask, held: list[np.ndarray] | None) -> Ages:
        """Ages in a shard of the tensor (`sharding.held`), whose whole mask is ``mask``."""
        if held is None:
            return self
        rows, cols = mask.matrix_index(held)
        elements = None if self.elements is None else self.elements[rows][:, cols]
        return Ages(self.rows[rows], self.cols[cols], elements)

    def encode(self) -> list[str]:
        """As text: rows, columns and, if there are any, elements."""
        arrays = [self.rows, self.cols] + ([] if self.elements is None else [self.elements])
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
            arrays.append(found.astype(np.int64 if len(arrays) < 2 else np.int32))
            if found.size and not 0 <= found.min() <= found.max() <= step:
                raise ValueError(f"ages of a thawed tensor are not within its {step} steps; they are damaged")
        return cls(*arrays)

    def __bool__(self) -> bool:
        return bool(self.rows.any() or self.cols.any() or (self.elements is not None and self.elements.any()))

    def grown(self, old: FreezeMask, new: FreezeMask, *, whole: bool = False) -> Ages:
        """Ages once the tensor of mask ``old`` has grown to the shape of ``new`` (`FreezeMask.grown`). ``whole``: what
        is frozen counts its steps, and what was added took none, whatever those beside it in a row or column did."""
        if old.shape == new.shape:
            return self
        rows, cols = new.matrix_index([np.arange(size) for size in old.shape])
        ages = Ages.none(new)
        longer = [after > before for before, after in zip(old.matrix_shape, new.matrix_shape, strict=True)]
        across = (longer[1] and self.rows.any()) or (longer[0] and self.cols.any())
        elements = self.elements
        if whole and across:
            elements = self.dense()
        else:
            ages.rows[rows], ages.cols[cols] = self.rows, self.cols
        if elements is not None:
            ages.elements = np.zeros(new.matrix_shape, np.int32)
            ages.elements[np.ix_(rows, cols)] = elements
        return ages

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
        if was_whole or whole:  # rows and columns pause at different times: each element has its own count
            frozen, freezes = old.frozen_flags(), new.frozen_flags()
            born, now = self.dense().copy(), np.int32(step)  # of rows and columns one is 0 where something is kept
            if not was_whole:
                np.copyto(born, np.int32(0), where=frozen)
            np.subtract(now, born, out=born, where=frozen != freezes)
            if not counts_on:
                np.copyto(born, now, where=frozen & ~freezes)
            if not whole:
                np.copyto(born, np.int32(0), where=freezes)
            return Ages(np.zeros_like(self.rows), np.zeros_like(self.cols), born)
        rows, cols, elements = self.rows.copy(), self.cols.copy(), self.elements
        rows[old.frozen_rows] = cols[old.frozen_cols] = 0  # what earlier versions left there
        rows[np.setdiff1d(old.frozen_rows, new.frozen_rows)] = step
        cols[np.setdiff1d(old.frozen_cols, new.frozen_cols)] = step
        if old.bits is not None:
            thawed = unpack_bits(old.bits & ~new.frozen_bits, old.matrix_shape)
            if elements is None:
                elements = thawed * np.int32(step)
            else:
                elements = elements.astype(np.int32)
                np.copyto(elements, np.int32(step), where=thawed)
        return Ages(rows, cols, elements)


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


WAS: Final = 1  # bits of what `Lines.turned` tells of a line: it was frozen,
NOW: Final = 2  # and it is now


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
