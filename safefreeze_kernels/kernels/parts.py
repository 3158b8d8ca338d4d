"""The work list: a plan compiled against tensor shapes into the parts a kernel visits. Geometry alone.

A live list visits what trains; a frozen row or column is simply not in it. A frozen list visits what does not train.
Nothing here knows addresses, dtypes of parameters, or hyper-parameters, so a list lives as long as its plan. Kernels on
the CPU are given it as runs (runs.py), kernels on a GPU as tiles (tiles.py), the reference reads the parts themselves.

Seen from a part, a tensor is a matrix (rows, cols) and has a *packed twin*: optimizer state of what is live (live list;
or as large as the tensor, if the list is compiled so), or a copy of the frozen elements (frozen list).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ..plan.mask import FreezeMask, bits_before, unpack_bits
from .ages import Ages

MOST_AGES: Final = 1 << 16  # of one part: what an index of 16 bits tells apart


@dataclass
class Part:
    """A rectangle of one tensor, or some elements of its rows. ``None`` for an index means all of them.

    Attributes:
        frozen_bits: one bit per element of the tensor; a live list visits elements whose bit is clear, a frozen list
            those whose bit is set. Such a part has no ``cols``.
        gapless: of a part with bits: its packed twin holds what is visited alone, in order. Else the places are those
            of ``packed_rows``.
        born: int64, ascending: the ages of its elements, as `Ages` counts.
        ages: uint8 or uint16, laid out as the packed twin: which of ``born`` each element has. None: they share one.
    """

    tensor: int
    shape: tuple[int, int]
    packed_width: int
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    packed_rows: np.ndarray | None = None
    packed_cols: np.ndarray | None = None
    packed_start: int = 0
    frozen_bits: np.ndarray | None = None
    gapless: bool = False
    born: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    ages: np.ndarray | None = None

    def frozen_flags(self) -> np.ndarray:
        """`frozen_bits` of these rows, written out: bool [rows, cols]."""
        assert self.frozen_bits is not None
        flags = unpack_bits(self.frozen_bits, self.shape)
        return flags if self.rows is None else flags[self.rows]

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
        ages = np.array([part.born.size for part in self.parts], np.int64)
        #: `Part.born` of all parts end to end, the part each belongs to, and where each part's begin.
        self.born = np.concatenate([np.zeros(0, np.int64), *(part.born for part in self.parts)])
        self.part_of_born, self.first_born = np.repeat(np.arange(ages.size), ages), np.cumsum(ages) - ages

    def __reduce__(self) -> Any:
        # Copied and pickled by what it is made of: its forms hold addresses.
        return WorkList, (self.frozen, self.parts, self.packed_sizes)

    def shared(self) -> list[bool]:
        """Of each part: whether other parts visit elements between its own, perhaps in another thread."""
        several = {tensor for tensor, count in Counter(part.tensor for part in self.parts).items() if count > 1}
        mixed = {part.tensor for part in self.parts if part.cols is not None or part.frozen_bits is not None}
        return [part.tensor in several & mixed for part in self.parts]

    def gapless_places(self, part: Part, start: np.ndarray) -> np.ndarray:
        """Places in a gapless twin of what begins with elements ``start``."""
        assert part.frozen_bits is not None
        before = bits_before(part.frozen_bits, start)
        return part.packed_start + (before if self.frozen else start - before)


def compile_live(
    masks: Sequence[FreezeMask], ages: Sequence[Ages | None] | None = None, *, whole_state: bool = False
) -> WorkList:
    """The list of what trains. ``masks[i]`` is tensor ``i``'s; packed twins have ``masks[i].packed_shape`` or, with
    ``whole_state``, the tensors' own shapes: places of what is frozen are then neither read nor written."""
    parts: list[Part] = []
    sizes: list[int] = []
    for tensor, mask in enumerate(masks):
        age = ages[tensor] if ages is not None else None
        age = age if age else None
        single = mask.bits is not None or (age is not None and age.elements is not None)
        parts += (_single_elements if single else _rectangles)(tensor, mask, age, whole_state)
        sizes.append(mask.numel if whole_state else mask.live_count)
    return WorkList(False, parts, sizes)


def _rectangles(tensor: int, mask: FreezeMask, age: Ages | None, whole_state: bool) -> Iterable[Part]:
    """Live rows × live columns, a part for each age."""
    shape = mask.matrix_shape
    rows, cols = mask.live_rows, mask.live_cols
    if not rows.size or not cols.size:
        return
    if mask.frozen_count == 0 and age is None:
        yield Part(tensor, shape, shape[1])
        return
    row_ages, col_ages = (np.zeros(1, np.int64),) * 2 if age is None else (age.rows[rows], age.cols[cols])
    for row_age in np.unique(row_ages):
        row_places = np.arange(rows.size) if age is None else np.flatnonzero(row_ages == row_age)
        for col_age in np.unique(col_ages):
            col_places = np.arange(cols.size) if age is None else np.flatnonzero(col_ages == col_age)
            all_cols, born = col_places.size == shape[1], np.array([max(row_age, col_age)], np.int64)
            here, there = rows[row_places], None if all_cols else cols[col_places]
            if whole_state:
                yield Part(tensor, shape, shape[1], here, there, here, there, born=born)
                continue
            packed_cols = None if col_places.size == cols.size else col_places
            yield Part(tensor, shape, cols.size, here, there, row_places, packed_cols, born=born)


def _single_elements(tensor: int, mask: FreezeMask, age: Ages | None, whole_state: bool) -> Iterable[Part]:
    """Live elements of live rows, whatever their ages: one part, unless there are more than `MOST_AGES`."""
    if not mask.live_count:
        return
    shape, rows, bits = mask.matrix_shape, mask.live_rows, mask.frozen_bits
    picked = None if rows.size == shape[0] else rows
    part = Part(tensor, shape, shape[1], picked, packed_rows=picked, frozen_bits=bits, gapless=not whole_state)
    if age is not None:
        part.born, ages = age.numbered(bits, whole=whole_state)
        if part.born.size > MOST_AGES:
            yield from _too_many_ages(part, age.dense().reshape(-1), ages)
            return
        if part.born.size > 1:
            part.ages = ages.astype(np.uint8) if part.born.size <= 256 else ages
    yield part


def _too_many_ages(part: Part, born: np.ndarray, ages: np.ndarray) -> Iterable[Part]:
    """A part with more than `MOST_AGES`, as parts that list their elements. ``born``: of all."""
    assert part.frozen_bits is not None
    live = np.flatnonzero(~unpack_bits(part.frozen_bits, born.shape))
    places = np.arange(live.size) if part.gapless else live
    group = np.searchsorted(part.born, born[live]) // MOST_AGES
    for number in range(-(-part.born.size // MOST_AGES)):
        some = part.born[number * MOST_AGES :][:MOST_AGES]
        chosen = np.flatnonzero(group == number)
        yield Part(part.tensor, (born.size, 1), 1, live[chosen], None, places[chosen], born=some, ages=ages)


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
            parts.append(Part(tensor, shape, shape[1], packed_start=start, frozen_bits=mask.bits, gapless=True))
    return WorkList(True, parts, [mask.frozen_count for mask in masks])
