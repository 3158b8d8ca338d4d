"""The work list as CPU kernels read it (csrc/work.h): runs, and chunks of them that threads take."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import numpy as np

from ..plan.mask import pack_bits
from .bits import has_room, with_room
from .parts import Part, WorkList, cut

_C: Any = None
with contextlib.suppress(ImportError):
    from .. import _C

# Mirrors of the structs in csrc/work.h.
_PART_FIELDS: Final = (
    "tensor", "cols", "col_bits", "packed_cols", "shared", "frozen_bits", "gapless", "ages", "age_size", "n_ages"
)  # fmt: skip
RUN_PART: Final = np.dtype([(name, "i8") for name in _PART_FIELDS])
RUN: Final = np.dtype([("start", "i8"), ("packed", "i8"), ("count", "i8"), ("age", "i8")])
CHUNK: Final = np.dtype([("part", "i8"), ("begin", "i8"), ("end", "i8")])

CHUNK_ELEMENTS: Final = 32_768  # 128 KB of float32: long enough to stream, short enough to balance
_SPARSEST_BITS: Final = 3


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
        rows = []
        for part, shared in zip(work.parts, work.shared(), strict=True):
            if part.cols is None and part.packed_cols is None and part.frozen_bits is None and part.ages is None:
                rows.append((part.tensor, 0, 0, 0, shared, 0, 0, 0, 0, part.born.size))
                continue
            cols = self._address(part.cols, np.int32)
            # State of the tensor's own shape has its columns in the same places; kernels know that by the address.
            packed_cols = cols if part.packed_cols is part.cols else self._address(part.packed_cols, np.int32)
            age_size = 0 if part.ages is None else part.ages.itemsize
            rows.append((
                part.tensor, cols, self._address(_column_bits(part), None), packed_cols, shared,
                self._address(part.frozen_bits, None), part.gapless, self._address(part.ages, None), age_size,
                part.born.size,
            ))  # fmt: skip
        self.parts = np.array(rows, RUN_PART)
        if _C is None:
            self.runs, self.chunks = lists_of(work)
        else:
            runs, chunks = _C.lists_of([part.listed_rows() for part in work.parts], CHUNK_ELEMENTS)
            self.runs, self.chunks = runs.view(RUN).reshape(-1), chunks.view(CHUNK).reshape(-1)
        for index in [index for index, part in enumerate(work.parts) if part.gapless]:
            of_part = self.chunks[self.chunks["part"] == index]
            runs = self.runs[of_part["begin"][0] : of_part["end"][-1]]
            runs["packed"] = work.gapless_places(work.parts[index], runs["start"])

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(array.nbytes for array in (self.parts, self.runs, self.chunks, *self._keep))

    def _address(self, array: np.ndarray | None, dtype: type | None) -> int:
        if array is None:
            return 0
        if array.itemsize < 4 and not has_room(array):  # bits or ages, of which kernels read words and vectors
            array = with_room(array)
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


def lists_of(work: WorkList) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `RUN`, those of neighbours not longer than a chunk, and of `CHUNK`. csrc/lists.cpp is the faster twin."""
    table, picks = work.runs(), np.array([part.cols is not None for part in work.parts], bool)
    run, offset, count = cut(table.counts, np.where(picks[table.part], np.maximum(table.counts, 1), CHUNK_ELEMENTS))
    runs = np.empty(run.size, RUN)
    runs["start"], runs["packed"] = table.start[run] + offset, table.packed[run] + offset
    runs["count"], runs["age"] = count, table.age[run]
    part, before = table.part[run], np.cumsum(count) - count  # elements
    new_part = np.diff(part, prepend=-1) != 0
    within = before + count - 1 - before[new_part][np.cumsum(new_part) - 1]
    begin = np.flatnonzero(new_part | (np.diff(within // CHUNK_ELEMENTS, prepend=-1) != 0))
    chunks = np.empty(begin.size, CHUNK)
    chunks["part"], chunks["begin"], chunks["end"] = part[begin], begin, np.append(begin[1:], run.size)[: begin.size]
    return runs, chunks
