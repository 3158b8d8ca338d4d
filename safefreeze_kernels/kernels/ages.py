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
        for axis, numbers, others in ((0, self.rows, self.cols), (1, self.cols, self.rows)):
            was, now = old.lines(axis), new.lines(axis)
            if was is None or now is None or self.elements is not None or others.any():
                continue
            stopped, thawed = turned(was, now, numbers.size)
            numbers = numbers.copy()
            if not was_whole:
                numbers[was] = 0
            # from when a thing was born to how many steps it took, and back, is the same difference
            numbers[stopped] = step - numbers[stopped]
            numbers[thawed] = step - numbers[thawed] if counts_on else step
            if not whole:
                numbers[now] = 0
            return Ages(others, numbers) if axis else Ages(numbers, others)
        if was_whole or whole:  # rows and columns pause at different times: each element has its own count
            frozen, freezes = old.frozen_flags(), new.frozen_flags()
            born = np.maximum(self.rows[:, None], self.cols[None, :])  # of which one is 0 where something is kept
            born = born if self.elements is None else np.maximum(born, self.elements)
            born = born if was_whole else np.where(frozen, 0, born)
            born = np.where(frozen != freezes, step - born, born)
            if not counts_on:
                born[frozen & ~freezes] = step
            if not whole:
                born[freezes] = 0
            return Ages(np.zeros_like(self.rows), np.zeros_like(self.cols), born)
        rows, cols, elements = self.rows.copy(), self.cols.copy(), self.elements
        rows[old.frozen_rows] = cols[old.frozen_cols] = 0  # what earlier versions left there
        rows[np.setdiff1d(old.frozen_rows, new.frozen_rows)] = step
        cols[np.setdiff1d(old.frozen_cols, new.frozen_cols)] = step
        flags = old.frozen_elements
        if flags is not None:
            elements = np.zeros(old.matrix_shape, np.int64) if elements is None else elements.copy()
            elements[flags & ~new.frozen_flags()] = step
        return Ages(rows, cols, elements)


def turned(was: np.ndarray, now: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of ``size`` lines, those frozen ``now`` alone, and those that ``was`` frozen alone."""
    lines = np.zeros(size, np.int8)
    lines[was] = 1
    lines[now] += 2
    return np.flatnonzero(lines == 2), np.flatnonzero(lines == 1)
