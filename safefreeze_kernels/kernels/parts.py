"""The work list: a plan compiled against tensor shapes into the parts a kernel visits. Geometry alone.

A live list visits what trains; a frozen row or column is simply not in it. A frozen list visits what does not train.
Nothing here knows addresses, dtypes of parameters, or hyper-parameters, so a list lives as long as its plan. Kernels on
the CPU are given it as runs (runs.py), kernels on a GPU as tiles (tiles.py), the reference reads the parts themselves.

Seen from a part, a tensor is a matrix (rows, cols) and has a *packed twin*: optimizer state without the frozen rows and
columns (live list), or a copy of the frozen elements (frozen list).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..plan.mask import FreezeMask, bits_before, pack_bits, unpack_bits
from .ages import Ages


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
        flags = unpack_bits(self.frozen_bits, self.shape)
        flags = flags if self.rows is None else flags[self.rows]
        return flags if self.cols is None else flags[:, self.cols]

    def runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What lies together in memory, in memory order: the first element of each run, its place in the packed twin,
        and how many elements there are. A part with ``cols`` has a run for each row, which begins with the row and
        counts the columns picked from it."""
        n_rows, n_cols = self.shape
        if self.rows is None and self.cols is None:
            return np.zeros(1, np.int64), np.full(1, self.packed_start), np.full(1, n_rows * n_cols)
        rows = np.arange(n_rows) if self.rows is None else self.rows
        places = np.arange(rows.size) if self.packed_rows is None else self.packed_rows
        if self.cols is None:
            breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(places) != 1)) + 1
            first = np.concatenate([np.zeros(1, np.int64), breaks])
            rows, places, count = rows[first], places[first], np.diff(np.append(first, rows.size)) * n_cols
        else:
            count = np.full(rows.size, self.cols.size)
        start, packed = rows * n_cols, self.packed_start + places * self.packed_width
        return start, packed, count


def cut(count: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of ``count`` elements, cut where they are longer than ``longest``: the run that each slice is of, how many
    elements of it come before, and how many the slice has."""
    slices = -(-count // longest)
    run = np.repeat(np.arange(count.size), slices)
    offset = (np.arange(run.size) - np.repeat(np.cumsum(slices) - slices, slices)) * longest
    return run, offset, np.minimum(count[run] - offset, longest)


@dataclass
class WorkList:
    """Parts, and the number of elements in the packed twin of each tensor."""

    frozen: bool
    parts: list[Part]
    packed_sizes: list[int]
    #: What backends made of the list, under keys of their own; it lives as long as the list does.
    forms: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.tensor_of_part = np.array([part.tensor for part in self.parts], np.int64)
        self.born_of_part = np.array([part.born for part in self.parts], np.int64)

    def __reduce__(self) -> Any:
        # Copied and pickled by what it is made of: its forms hold addresses.
        return WorkList, (self.frozen, self.parts, self.packed_sizes)

    def shared(self) -> list[bool]:
        """Of each part: whether other parts visit elements between its own, perhaps in another thread."""
        several = {tensor for tensor, count in Counter(part.tensor for part in self.parts).items() if count > 1}
        mixed = {part.tensor for part in self.parts if part.cols is not None or part.frozen_bits is not None}
        return [part.tensor in several & mixed for part in self.parts]

    def gapless(self, part: Part) -> bool:
        """Whether the packed twin holds only the part's elements whose bit is set."""
        return self.frozen and part.frozen_bits is not None

    def gapless_places(self, part: Part, start: np.ndarray) -> np.ndarray:
        """Places in such a twin of what begins with elements ``start``, multiples of 8."""
        assert part.frozen_bits is not None
        return part.packed_start + bits_before(part.frozen_bits, start)


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
        frozen = mask.frozen_flags()
        for value in np.unique(born[~frozen]):
            others = pack_bits(frozen | (born != value))
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
