"""The work list as CPU kernels read it (csrc/work.h): runs, and chunks of them that threads take."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ..plan.mask import pack_bits
from .parts import Part, WorkList, cut

# Mirrors of the structs in csrc/work.h.
_PART_FIELDS: Final = (
    "tensor", "cols", "col_bits", "packed_cols", "shared", "frozen_bits", "gapless", "ages", "age_size",
    "n_ages"
)  # fmt: skip
RUN_PART: Final = np.dtype([(name, "i8") for name in _PART_FIELDS])
RUN: Final = np.dtype([("start", "i8"), ("packed", "i8"), ("count", "i8")])
CHUNK: Final = np.dtype([("part", "i8"), ("begin", "i8"), ("end", "i8")])

CHUNK_ELEMENTS: Final = 32_768  # 128 KB of float32: long enough to stream, short enough to balance
_SPARSEST_BITS: Final = 3
_READ_BEYOND: Final = 16  # small integers that kernels may read past the last


class Runs:
    """A work list on the CPU.

    Attributes:
        parts: rows of `RUN_PART`, with addresses of arrays that this object keeps alive.
        runs: rows of `RUN`, part after part.
        chunks: rows of `CHUNK`: neighbouring runs of a part, about `CHUNK_ELEMENTS` elements.
        native: what the extension makes of them, once it has.
    """

    @classmethod
    def of(cls, work: WorkList) -> Runs:
        """The runs of ``work``, made at first use; they live as long as ``work``."""
        found: Runs | None = work.forms.get(cls)
        if found is None:
            found = work.forms[cls] = cls(work)
        return found

    def __init__(self, work: WorkList) -> None:
        self.native: Any = None
        self._keep: list[np.ndarray] = []
        self.parts = np.zeros(len(work.parts), RUN_PART)
        runs, chunks = [np.zeros(0, RUN)], [np.zeros(0, CHUNK)]
        n_runs = 0
        for index, (part, shared) in enumerate(zip(work.parts, work.shared(), strict=True)):
            age_size = 0 if part.ages is None else part.ages.itemsize
            self.parts[index] = (
                part.tensor, self._address(part.cols, np.int32), self._address(_column_bits(part), None),
                self._address(part.packed_cols, np.int32), shared, self._address(part.frozen_bits, None),
                part.gapless, self._address(part.ages, None), age_size, part.born.size,
            )  # fmt: skip
            runs.append(_runs(work, part))
            chunks.append(_chunks(runs[-1]["count"], index, n_runs))
            n_runs += len(runs[-1])
        self.runs, self.chunks = np.concatenate(runs), np.concatenate(chunks)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(array.nbytes for array in (self.parts, self.runs, self.chunks, *self._keep))

    def _address(self, array: np.ndarray | None, dtype: type | None) -> int:
        if array is None:
            return 0
        if array.itemsize < 4:  # bits or ages, of which kernels read words and vectors
            array = np.concatenate([array, np.zeros(_READ_BEYOND, array.dtype)])
        self._keep.append(np.ascontiguousarray(array, dtype))
        return int(self._keep[-1].ctypes.data)


def _column_bits(part: Part) -> np.ndarray | None:
    """The part's columns as bits, for kernels that read whole vectors of neighbours; None where that would mostly read
    frozen columns."""
    if part.cols is None or part.cols.size * _SPARSEST_BITS < part.shape[1]:
        return None
    flags = np.zeros(part.shape[1] + 15, bool)
    flags[part.cols] = True
    return pack_bits(flags)


def _runs(work: WorkList, part: Part) -> np.ndarray:
    """Rows of `RUN`. Those of neighbours are not longer than a chunk."""
    start, packed, count = part.runs()
    if part.cols is None and count.max(initial=0) > CHUNK_ELEMENTS:
        run, offset, count = cut(count, CHUNK_ELEMENTS)
        start, packed = start[run] + offset, packed[run] + offset
    runs = np.empty(start.size, RUN)
    runs["start"], runs["count"] = start, count
    runs["packed"] = work.gapless_places(part, start) if part.gapless else packed
    return runs


def _chunks(count: np.ndarray, part: int, first: int) -> np.ndarray:
    """Rows of `CHUNK` for runs of ``count`` elements, the first of which is run ``first`` of the list."""
    group = (np.cumsum(count) - 1) // CHUNK_ELEMENTS
    begin = np.concatenate([np.zeros(min(count.size, 1), np.int64), np.flatnonzero(np.diff(group)) + 1])
    chunks = np.empty(begin.size, CHUNK)
    chunks["part"], chunks["begin"], chunks["end"] = part, first + begin, first + np.append(begin[1:], count.size)
    return chunks
