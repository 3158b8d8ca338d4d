"""The work list: a plan compiled against tensor shapes into the pieces a kernel visits.

A live list visits what trains; a frozen row or column is simply not in it. A frozen list visits what does not train.
Nothing here knows addresses, dtypes of parameters, or hyper-parameters, so a list lives as long as its plan.

Seen from a part, a tensor is a matrix (rows, cols) and has a *packed twin*: optimizer state without the frozen rows and
columns (live list), or a copy of the frozen elements (frozen list).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ..plan.mask import FreezeMask
from .ages import Ages

# Mirrors of the structs in csrc/work.h.
SEGMENT: Final = np.dtype(
    [(name, "i8") for name in ("tensor", "cols", "col_bits", "packed_cols", "shared", "frozen_bits")]
)
RUN: Final = np.dtype([("start", "i8"), ("packed", "i8"), ("count", "i8")])
PIECE: Final = np.dtype([("segment", "i8"), ("begin", "i8"), ("end", "i8")])

_PIECE_ELEMENTS: Final = 32_768  # 128 KB of float32: long enough to stream, short enough to balance
_SPARSEST_BITS: Final = 3


@dataclass
class Part:
    """A rectangle of one tensor whose elements share an age. ``None`` for an index means all of them."""

    tensor: int
    shape: tuple[int, int]
    packed_width: int
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    packed_rows: np.ndarray | None = None
    packed_cols: np.ndarray | None = None
    packed_start: int = 0
    frozen_bits: np.ndarray | None = None  # one bit per element of the tensor
    born: int = 0

    def frozen_flags(self) -> np.ndarray:
        """`frozen_bits` of this rectangle, written out: bool [rows, cols]."""
        assert self.frozen_bits is not None
        n_rows, n_cols = self.shape
        flat = np.unpackbits(self.frozen_bits, count=n_rows * n_cols, bitorder="little").view(bool)
        flags = flat.reshape(self.shape)
        flags = flags if self.rows is None else flags[self.rows]
        return flags if self.cols is None else flags[:, self.cols]


@dataclass
class WorkList:
    """Parts in the form each backend wants: `parts` to read, the arrays to run.

    ``packed_sizes[i]`` is the number of elements in the packed twin of tensor ``i``.
    """

    frozen: bool
    parts: list[Part]
    packed_sizes: list[int]
    segments: np.ndarray = field(init=False)
    runs: np.ndarray = field(init=False)
    pieces: np.ndarray = field(init=False)
    native: Any = None  # the extension's view of the arrays, made at first use
    copies: dict[Any, Any] = field(default_factory=dict)  # device -> the list as GPU kernels read it

    def __post_init__(self) -> None:
        self._keep: list[np.ndarray] = []  # what the addresses in `segments` point to
        segments = np.zeros(len(self.parts), SEGMENT)
        runs: list[np.ndarray] = []
        pieces: list[np.ndarray] = []
        n_runs = 0
        parts_of = Counter(part.tensor for part in self.parts)
        shared = {
            part.tensor
            for part in self.parts
            if parts_of[part.tensor] > 1 and (part.cols is not None or part.frozen_bits is not None)
        }
        for index, part in enumerate(self.parts):
            segments[index] = (
                part.tensor,
                self._address(part.cols, np.int32),
                self._address(_column_bits(part), np.uint8),
                self._address(part.packed_cols, np.int32),
                part.tensor in shared,
                self._address(part.frozen_bits, np.uint8),
            )
            part_runs = _runs(part, compressed=self.frozen and part.frozen_bits is not None)
            part_pieces = _pieces(part_runs["count"], index)
            part_pieces["begin"] += n_runs
            part_pieces["end"] += n_runs
            n_runs += len(part_runs)
            runs.append(part_runs)
            pieces.append(part_pieces)
        self.segments = segments
        self.runs = np.concatenate(runs) if runs else np.zeros(0, RUN)
        self.pieces = np.concatenate(pieces) if pieces else np.zeros(0, PIECE)
        self.tensor_of_part = segments["tensor"].copy()
        self.born_of_part = np.array([part.born for part in self.parts], np.int64)

    def __reduce__(self) -> Any:
        # Copied and pickled by what it is made of: `segments` hold addresses of this list's own arrays.
        return WorkList, (self.frozen, self.parts, self.packed_sizes)

    def _address(self, array: np.ndarray | None, dtype: type) -> int:
        if array is None:
            return 0
        if dtype is np.uint8:  # kernels read words of eight bytes
            array = np.concatenate([array, np.zeros(8, np.uint8)])
        kept: np.ndarray = np.ascontiguousarray(array, dtype)
        self._keep.append(kept)
        return int(kept.ctypes.data)

    @property
    def nbytes(self) -> int:
        """Memory of the compiled arrays."""
        return self.segments.nbytes + self.runs.nbytes + self.pieces.nbytes + sum(a.nbytes for a in self._keep)


def compile_live(masks: Sequence[FreezeMask], ages: Sequence[Ages | None] | None = None) -> WorkList:
    """The list of what trains. ``masks[i]`` is tensor ``i``'s; packed twins have ``masks[i].packed_shape``."""
    parts: list[Part] = []
    sizes: list[int] = []
    for tensor, mask in enumerate(masks):
        age = ages[tensor] if ages is not None else None
        live_parts = list(_live_parts(tensor, mask, age if age else None))
        sizes.append(int(np.prod(mask.packed_shape, dtype=np.int64)))
        parts += live_parts
    return WorkList(False, parts, sizes)


def _live_parts(tensor: int, mask: FreezeMask, age: Ages | None) -> Iterable[Part]:
    shape = mask.matrix_shape
    if shape[0] * shape[1] == 0:
        return
    if mask.frozen_count == 0 and age is None:
        yield Part(tensor, shape, shape[1])
        return
    rows, cols = mask.live_rows, mask.live_cols
    if not rows.size or not cols.size:
        return
    all_cols = cols.size == shape[1]
    width = cols.size
    if age is None:
        yield Part(tensor, shape, width, rows, None if all_cols else cols, frozen_bits=mask.bits)
    elif age.elements is None:
        for row_age in np.unique(age.rows[rows]):
            row_places = np.flatnonzero(age.rows[rows] == row_age)
            for col_age in np.unique(age.cols[cols]):
                col_places = np.flatnonzero(age.cols[cols] == col_age)
                yield Part(
                    tensor,
                    shape,
                    width,
                    rows[row_places],
                    None if col_places.size == shape[1] else cols[col_places],
                    row_places,
                    None if col_places.size == width else col_places,
                    frozen_bits=mask.bits,
                    born=int(max(row_age, col_age)),
                )
    else:
        born = np.maximum(np.maximum(age.rows[:, None], age.cols[None, :]), age.elements)
        frozen = mask.dense().numpy().reshape(shape)
        for value in np.unique(born[~frozen]):
            others = np.packbits((frozen | (born != value)).reshape(-1), bitorder="little")
            yield Part(tensor, shape, width, rows, None if all_cols else cols, frozen_bits=others, born=int(value))


def compile_frozen(masks: Sequence[FreezeMask]) -> WorkList:
    """The list of what is frozen; a packed twin holds exactly ``masks[i].frozen_count`` elements: whole rows, then the
    frozen columns of the other rows, then single elements."""
    parts: list[Part] = []
    for tensor, mask in enumerate(masks):
        shape = mask.matrix_shape
        rows, cols = mask.frozen_rows, mask.frozen_cols
        start = 0
        if rows.size:
            parts.append(Part(tensor, shape, shape[1], rows))
            start = rows.size * shape[1]
        if cols.size:
            live_rows = mask.live_rows
            parts.append(Part(tensor, shape, cols.size, live_rows, cols, packed_start=start))
            start += live_rows.size * cols.size
        if mask.bits is not None:
            parts.append(Part(tensor, shape, shape[1], packed_start=start, frozen_bits=mask.bits))
    return WorkList(True, parts, [mask.frozen_count for mask in masks])


def _column_bits(part: Part) -> np.ndarray | None:
    """The part's columns as bits, for kernels that read whole vectors of neighbours; None where that would mostly read
    frozen columns."""
    if part.cols is None or part.cols.size * _SPARSEST_BITS < part.shape[1]:
        return None
    flags = np.zeros(part.shape[1] + 15, bool)
    flags[part.cols] = True
    return np.packbits(flags, bitorder="little")


def _runs(part: Part, *, compressed: bool) -> np.ndarray:
    """Runs of a part, in memory order. ``compressed``: the twin holds only elements whose bit is set."""
    n_rows, n_cols = part.shape
    if part.rows is None and part.cols is None:
        start, packed, count = np.zeros(1, np.int64), np.full(1, part.packed_start), np.full(1, n_rows * n_cols)
    else:
        rows = np.arange(n_rows) if part.rows is None else part.rows
        places = np.arange(rows.size) if part.packed_rows is None else part.packed_rows
        if part.cols is None:
            breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(places) != 1)) + 1
            first = np.concatenate([np.zeros(1, np.int64), breaks])
            length = np.diff(np.append(first, rows.size))
            rows, places, count = rows[first], places[first], length * n_cols
        else:
            count = np.full(rows.size, part.cols.size)
        start, packed = rows * n_cols, part.packed_start + places * part.packed_width
    if part.cols is None:
        start, packed, count = _cut(start, packed, count)
    if compressed:
        assert part.frozen_bits is not None
        # Cuts fall on whole bytes of the bits, so the elements chosen before each are a running sum over bytes.
        before = np.concatenate([[0], np.cumsum(np.bitwise_count(part.frozen_bits), dtype=np.int64)])
        packed = part.packed_start + before[start // 8]
    runs = np.empty(start.size, RUN)
    runs["start"], runs["packed"], runs["count"] = start, packed, count
    return runs


def _cut(start: np.ndarray, packed: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut runs longer than a piece."""
    if not count.size or count.max() <= _PIECE_ELEMENTS:
        return start, packed, count
    cuts = -(-count // _PIECE_ELEMENTS)
    owner = np.repeat(np.arange(count.size), cuts)
    offset = (np.arange(owner.size) - np.repeat(np.cumsum(cuts) - cuts, cuts)) * _PIECE_ELEMENTS
    return start[owner] + offset, packed[owner] + offset, np.minimum(count[owner] - offset, _PIECE_ELEMENTS)


def _pieces(count: np.ndarray, segment: int) -> np.ndarray:
    """Group neighbouring runs into pieces of about `_PIECE_ELEMENTS` elements."""
    if not count.size:
        return np.zeros(0, PIECE)
    if count.size == 1:
        return np.array([(segment, 0, 1)], PIECE)
    group = (np.cumsum(count) - 1) // _PIECE_ELEMENTS
    begin = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1])
    pieces = np.empty(begin.size, PIECE)
    pieces["segment"], pieces["begin"], pieces["end"] = segment, begin, np.append(begin[1:], count.size)
    return pieces
