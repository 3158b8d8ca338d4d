"""When the live elements of a tensor were thawed: their bias correction counts from there."""

from __future__ import annotations

import base64
import contextlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..plan.mask import FreezeMask, padded, unpack_bits

_C: Any = None
with contextlib.suppress(ImportError):
    from .. import _C


@dataclass
class Ages:
    """When the live elements of one tensor were thawed, counted in that tensor's own steps; 0 = live from the start.

    An element is as old as the youngest of its row, its column and itself.
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

    def grown(self, old: FreezeMask, new: FreezeMask) -> Ages:
        """Ages once the tensor of mask ``old`` has grown to the shape of ``new`` (`FreezeMask.grown`)."""
        if old.shape == new.shape:
            return self
        rows, cols = new.matrix_index([np.arange(size) for size in old.shape])
        ages = Ages.none(new)
        ages.rows[rows], ages.cols[cols] = self.rows, self.cols
        if self.elements is not None:
            ages.elements = np.zeros(new.matrix_shape, np.int32)
            ages.elements[np.ix_(rows, cols)] = self.elements
        return ages

    def after(self, old: FreezeMask, new: FreezeMask, step: int) -> Ages:
        """Ages once ``new`` replaces ``old`` after ``step`` steps: what ``new`` thaws is born now."""
        rows, cols, elements = self.rows.copy(), self.cols.copy(), self.elements
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
