"""When the live elements of a tensor were thawed: their bias correction counts from there."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..plan.mask import FreezeMask


@dataclass
class Ages:
    """When the live elements of one tensor were thawed, counted in that tensor's own steps; 0 = live from the start.

    An element is as old as the youngest of its row, its column and itself. Of what is frozen while its moments are
    kept, the number is how many steps it took before: thawed, it may count on from there. Else it is 0.
    """

    rows: np.ndarray  # int64 [rows]
    cols: np.ndarray  # int64 [cols]
    elements: np.ndarray | None = None  # int64 [rows, cols]; only once single elements were thawed

    @classmethod
    def none(cls, mask: FreezeMask) -> Ages:
        n_rows, n_cols = mask.matrix_shape
        return cls(np.zeros(n_rows, np.int64), np.zeros(n_cols, np.int64))

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
        arrays = []
        for text, shape in zip(texts, shapes, strict=False):
            size = 8 * math.prod(shape)
            try:  # never more memory than the tensor's shape calls for
                data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
            except (ValueError, TypeError, zlib.error) as error:
                raise ValueError(f"ages of a thawed tensor of shape {mask.shape} are damaged ({error})") from error
            if len(data) != size:
                raise ValueError(f"ages of a thawed tensor hold {len(data)} bytes, expected {size} for {mask.shape}")
            arrays.append(np.frombuffer(data, "<i8").astype(np.int64).reshape(shape))
            if arrays[-1].size and not 0 <= arrays[-1].min() <= arrays[-1].max() <= step:
                raise ValueError(f"ages of a thawed tensor are not within its {step} steps; they are damaged")
        return cls(*arrays)

    def __bool__(self) -> bool:
        return bool(self.rows.any() or self.cols.any() or (self.elements is not None and self.elements.any()))

    def grown(self, old: FreezeMask, new: FreezeMask) -> Ages:
        """Ages once the tensor of mask ``old`` has grown to the shape of ``new`` (`FreezeMask.grown`)."""
        if old.shape == new.shape:
            return self
        rows, cols = new.matrix_index([np.arange(size) for size in old.shape])
        ages = Ages.none(new)
        ages.rows[rows], ages.cols[cols] = self.rows, self.cols
        if self.elements is not None:
            ages.elements = np.zeros(new.matrix_shape, np.int64)
            ages.elements[np.ix_(rows, cols)] = self.elements
        return ages

    def after(
        self, old: FreezeMask, new: FreezeMask, step: int, *, was_whole: bool = False, whole: bool = False,
        counts_on: bool = False,
    ) -> Ages:  # fmt: skip
        """Ages once ``new`` replaces ``old`` after ``step`` steps: what ``new`` thaws is born now or, if it
        ``counts_on``, as many steps ago as it took. State is whole, so that frozen moments are kept, or was until now.
        """
        for axis, numbers in enumerate((self.rows, self.cols)):
            other = (self.cols, self.rows)[axis]
            was, now = (_lines(mask, axis) for mask in (old, new))
            if was is not None and now is not None and self.elements is None and not other.any():
                changed = _changed(numbers, was, now, step, was_whole=was_whole, whole=whole, counts_on=counts_on)
                return Ages(other.copy(), changed) if axis else Ages(changed, other.copy())
        if was_whole or whole:  # rows and columns pause at different times: each element has its own count
            flags = old.frozen_flags()
            born = np.maximum(self.rows[:, None], self.cols[None, :])  # of which one is 0 where something is kept
            born = born if self.elements is None else np.maximum(born, self.elements)
            found = Ages.none(new)
            found.elements = _changed(
                born, flags, new.frozen_flags(), step, was_whole=was_whole, whole=whole, counts_on=counts_on
            )
            return found
        rows, cols, elements = self.rows.copy(), self.cols.copy(), self.elements
        rows[old.frozen_rows] = cols[old.frozen_cols] = 0  # what earlier versions left there
        rows[np.setdiff1d(old.frozen_rows, new.frozen_rows)] = step
        cols[np.setdiff1d(old.frozen_cols, new.frozen_cols)] = step
        flags = old.frozen_elements
        if flags is not None:
            elements = np.zeros(old.matrix_shape, np.int64) if elements is None else elements.copy()
            elements[flags & ~new.frozen_flags()] = step
        return Ages(rows, cols, elements)


def _lines(mask: FreezeMask, axis: int) -> np.ndarray | None:
    """Which rows (``axis`` 0) or columns are frozen, bool; None: something else is frozen too."""
    size, across = mask.matrix_shape[axis], mask.matrix_shape[1 - axis]
    lines, others = (mask.frozen_rows, mask.frozen_cols)[:: 1 - 2 * axis]
    everything = others.size == across and size > 0
    if mask.bits is not None or (others.size and not everything):
        return None
    frozen = np.full(size, everything)
    frozen[lines] = True
    return frozen


def _changed(
    numbers: np.ndarray, was: np.ndarray, now: np.ndarray, step: int, *, was_whole: bool, whole: bool, counts_on: bool
) -> np.ndarray:
    """`Ages` of lines or elements of which ``was`` were frozen and ``now`` are. From when a thing was born to how many
    steps it took, and back, is the same difference."""
    numbers = numbers if was_whole else np.where(was, 0, numbers)
    numbers = np.where(was != now, step - numbers, numbers)
    if not counts_on:
        numbers[was & ~now] = step
    if not whole:
        numbers[now] = 0
    return numbers
