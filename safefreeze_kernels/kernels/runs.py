"""The work list as CPU kernels read it (csrc/work.h): runs, and chunks of them that threads take."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ..plan.mask import pack_bits
from .parts import Part, RunTable, WorkList, cut

# Mirrors of the structs in csrc/work.h.
RUN_PART: Final = np.dtype(
    [(name, "i8") for name in ("tensor", "cols", "col_bits", "packed_cols", "shared", "frozen_bits")]
)
RUN: Final = np.dtype([("start", "i8"), ("packed", "i8"), ("count", "i8"), ("set", "i8")])
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
        self.parts = np.zeros(len(work.parts), RUN_PART)
        for index, (part, shared) in enumerate(zip(work.parts, work.shared(), strict=True)):
            cols = self._address(part.cols, np.int32)
            # State of the tensor's own shape has its columns in the same places; kernels know that by the address.
            same = part.packed_cols is part.cols
            self.parts[index] = (
                part.tensor, cols, self._address(_column_bits(part), np.uint8),
                cols if same else self._address(part.packed_cols, np.int32), shared,
                self._address(part.frozen_bits, np.uint8),
            )  # fmt: skip
        table = _short(work, work.runs())
        self.chunks = _chunks(table)
        self.runs = np.empty(table.start.size, RUN)
        for name in RUN.names or ():
            self.runs[name] = getattr(table, name)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return sum(array.nbytes for array in (self.parts, self.runs, self.chunks, *self._keep))

    def _address(self, array: np.ndarray | None, dtype: type) -> int:
        if array is None:
            return 0
        if dtype is np.uint8:  # kernels read words of eight bytes
            array = np.concatenate([array, np.zeros(8, np.uint8)])
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


def _short(work: WorkList, table: RunTable) -> RunTable:
    """Runs, those of neighbours cut so that none is longer than a chunk; and their places in a gapless twin."""
    picks = np.array([part.cols is not None for part in work.parts], bool)
    if (table.count > CHUNK_ELEMENTS).any():
        longest = np.where(picks[table.part], np.maximum(table.count, 1), CHUNK_ELEMENTS)
        run, offset, count = cut(table.count, longest)
        table = table.take(run)
        table = table._replace(start=table.start + offset, packed=table.packed + offset, count=count)
    for part, here in zip(work.parts, table.of_parts(len(work.parts)), strict=True):
        if work.gapless(part):
            table.packed[here] = work.gapless_places(part, table.start[here])
    return table


def _chunks(table: RunTable) -> np.ndarray:
    """Rows of `CHUNK`."""
    before = np.cumsum(table.count) - table.count  # elements
    new_part = np.diff(table.part, prepend=-1) != 0
    within = before + table.count - 1 - before[new_part][np.cumsum(new_part) - 1]
    begin = np.flatnonzero(new_part | (np.diff(within // CHUNK_ELEMENTS, prepend=-1) != 0))
    chunks = np.empty(begin.size, CHUNK)
    chunks["part"], chunks["begin"] = table.part[begin], begin
    chunks["end"] = np.append(begin[1:], table.count.size)[: begin.size]
    return chunks
