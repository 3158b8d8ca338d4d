"""The work list: a plan compiled against tensor shapes into the parts a kernel visits. Geometry alone.

A live list visits what trains; a frozen row or column is simply not in it. A frozen list visits what does not train.
Nothing here knows addresses, dtypes of parameters, or hyper-parameters, so a list lives as long as its plan. Kernels on
the CPU are given it as runs (runs.py), kernels on a GPU as tiles (tiles.py), the reference reads the parts themselves.

Seen from a part, a tensor is a matrix (rows, cols) and has a *packed twin*: optimizer state of what is live (live list;
or as large as the tensor, if the list is compiled so), or a copy of the frozen elements (frozen list).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import numpy as np

from ..plan.mask import FreezeMask, bits_before, unpack_bits
from .ages import Ages

_C: Any = None
with contextlib.suppress(ImportError):
    from .. import _C

MOST_AGES: Final = 1 << 16  # of one part: what an index of 16 bits tells apart
_MOST_COLUMN_AGES: Final = 2  # that are parts of their own


@dataclass
class Part:
    """A rectangle of one tensor, or some elements of its rows. ``None`` for an index means all of them.

    Attributes:
        frozen_bits: one bit per element of the tensor; a live list visits elements whose bit is clear, a frozen list
            those whose bit is set. Such a part has no ``cols``.
        gapless: of a part with bits: its packed twin holds what is visited alone, in order. Else the places are those
            of ``packed_rows``.
        born: int64, ascending: the ages of its elements, as `Ages` counts.
        row_ages: int64 [rows], which of ``born`` each row has. None: they share one.
        ages: uint8 or uint16, laid out as the packed twin: which of ``born`` each element has. None: as ``row_ages``
            says.
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
    row_ages: np.ndarray | None = None
    ages: np.ndarray | None = None

    def frozen_flags(self) -> np.ndarray:
        """`frozen_bits` of these rows, written out: bool [rows, cols]."""
        assert self.frozen_bits is not None
        flags = unpack_bits(self.frozen_bits, self.shape)
        return flags if self.rows is None else flags[self.rows]

    def listed_rows(self) -> tuple[Any, ...]:
        """What its runs are made of: rows, those of the twin and their ages (None: 0, 1, 2 ..., the first age); how
        many there are; elements of a row of the tensor, of one of the twin, those before the twin's first, and those of
        a row that are visited; and whether rows are runs of their own."""
        n_rows, n_cols = self.shape
        twin = self.packed_width, self.packed_start
        if all(index is None for index in (self.rows, self.cols, self.packed_rows, self.row_ages)):
            return None, None, None, 1, n_cols, *twin, n_rows * n_cols, False  # one row, as it lies in memory
        count = n_cols if self.cols is None else self.cols.size
        rows = n_rows if self.rows is None else self.rows.size
        return self.rows, self.packed_rows, self.row_ages, rows, n_cols, *twin, count, self.cols is not None


class RunTable(NamedTuple):
    """What lies together in memory, part after part, each in memory order; arrays of one entry per run.

    Attributes:
        part: which part it is of.
        start: its first element; of a part with ``cols``, the first element of its row.
        packed: the place of that in the packed twin.
        counts: how many elements it has; of a part with ``cols``, how many columns are picked.
        age: which of the ages of its part it has.
    """

    part: np.ndarray
    start: np.ndarray
    packed: np.ndarray
    counts: np.ndarray
    age: np.ndarray

    def take(self, chosen: np.ndarray | slice) -> RunTable:
        return RunTable(*(column[chosen] for column in self))

    def of_parts(self, n_parts: int) -> list[slice]:
        """Where the runs of each part are."""
        ends = np.searchsorted(self.part, np.arange(n_parts + 1)).tolist()
        return list(map(slice, ends[:-1], ends[1:]))


def cut(count: np.ndarray, longest: int | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of ``count`` elements, cut where they are longer than ``longest``: the run that each slice is of, how many
    elements of it come before, and how many the slice has."""
    slices = -(-count // longest)
    run = np.repeat(np.arange(count.size), slices)
    longest = np.broadcast_to(longest, count.shape)[run]
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

    def runs(self) -> RunTable:
        """The runs of all parts. Rows of a part with ``cols`` are runs of their own."""
        found = [np.zeros((5, 0), np.int64)]
        for index, part in enumerate(self.parts):
            rows, places, ages, n_rows, width, packed_width, packed_start, count, apart = part.listed_rows()
            row = np.arange(n_rows) if rows is None else rows
            place = np.arange(n_rows) if places is None else places
            age = np.zeros(n_rows, np.int64) if ages is None else ages
            first = np.ones(n_rows, bool)
            first[1:] = apart | (np.diff(row) != 1) | (np.diff(place) != 1) | (np.diff(age) != 0)
            begin = np.flatnonzero(first)
            counts = np.diff(np.append(begin, n_rows)) * count
            start, packed = row[begin] * width, packed_start + place[begin] * packed_width
            found.append(np.stack([np.full(begin.size, index), start, packed, counts, age[begin]]))
        return RunTable(*np.concatenate(found, axis=1))

    def by_age(self) -> Iterator[tuple[int, int, Part]]:
        """The parts, each cut into one for each age: the number of the part, that of the age, and the piece."""
        for index, part in enumerate(self.parts):
            if part.row_ages is None:
                yield index, 0, part
                continue
            rows = np.arange(part.shape[0]) if part.rows is None else part.rows
            places = np.arange(rows.size) if part.packed_rows is None else part.packed_rows
            for age in range(part.born.size):
                some = part.row_ages == age
                yield index, age, replace(part, rows=rows[some], packed_rows=places[some], row_ages=None)

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


def distinct(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ones of int64 numbers, ascending, and which of them each is."""
    if _C is not None:
        found: tuple[np.ndarray, np.ndarray] = _C.distinct(numbers)
        return found
    values, which = np.unique(numbers, return_inverse=True)
    return values, which.reshape(-1)


def live_rows(mask: FreezeMask, ages: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The rows that are not frozen; of the ages of rows those that these have, and which of them each has."""
    if _C is not None:
        found: tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
        found = _C.live_rows(mask.frozen_rows, mask.matrix_shape[0], ages)
        return found
    rows = mask.live_rows
    return (rows, None, None) if ages is None else (rows, *distinct(ages[rows]))


def compile_live(
    masks: Sequence[FreezeMask], ages: Sequence[Ages | None] | None = None, *, whole_state: bool = False
) -> WorkList:
    """The list of what trains. ``masks[i]`` is tensor ``i``'s; packed twins have ``masks[i].packed_shape`` or, with
    ``whole_state``, the tensors' own shapes: places of what is frozen are then neither read nor written."""
    parts: list[Part] = []
    sizes: list[int] = []
    for tensor, mask in enumerate(masks):
        age = ages[tensor] if ages is not None else None
        parts += (_single_elements if _differ_singly(mask, age) else _rectangles)(tensor, mask, age, whole_state)
        sizes.append(mask.numel if whole_state else mask.live_count)
    return WorkList(False, parts, sizes)


def _differ_singly(mask: FreezeMask, age: Ages | None) -> bool:
    """Whether single elements are frozen or differ in age, or columns do in so many ways that a part for each would
    read every row many times."""
    if age is None or mask.bits is not None:
        return mask.bits is not None
    return age.elements is not None or (
        bool(age.cols.any()) and distinct(age.cols[mask.live_cols])[0].size > _MOST_COLUMN_AGES
    )


def _rectangles(tensor: int, mask: FreezeMask, age: Ages | None, whole_state: bool) -> Iterable[Part]:
    """Live rows × live columns: a part for each age of columns, whose rows may differ in age."""
    shape = mask.matrix_shape
    rows, born, row_ages = live_rows(mask, None if age is None else age.rows)
    width = shape[1] - mask.frozen_cols.size
    if not rows.size or not width:
        return
    if age is None and rows.size == shape[0] and width == shape[1]:
        yield Part(tensor, shape, shape[1])
        return
    cols = mask.live_cols if width < shape[1] else None
    col_ages = None if age is None or not age.cols.any() else age.cols[mask.live_cols]
    for col_born in (0,) if col_ages is None else np.unique(col_ages):
        some, packed_cols = cols, None
        if col_ages is not None:
            places = np.flatnonzero(col_ages == col_born)
            some = None if places.size == shape[1] else mask.live_cols[places]
            packed_cols = places if places.size < width else None
        twin = (shape[1], rows, some, rows, some) if whole_state else (width, rows, some, None, packed_cols)
        part = Part(tensor, shape, *twin)
        if born is not None and row_ages is not None:
            part.born, merged = (born, None) if col_born == 0 else distinct(np.maximum(born, col_born))
            part.row_ages = row_ages if merged is None else merged[row_ages]
            if part.born.size < 2:
                part.row_ages = None
        yield part


def _single_elements(tensor: int, mask: FreezeMask, age: Ages | None, whole_state: bool) -> Iterable[Part]:
    """Live elements of live rows, whatever their ages: one part, unless there are more than `MOST_AGES`."""
    if not mask.live_count:
        return
    shape, rows, bits = mask.matrix_shape, mask.live_rows, mask.frozen_bits
    picked = None if rows.size == shape[0] else rows
    part = Part(tensor, shape, shape[1], picked, packed_rows=picked, frozen_bits=bits, gapless=not whole_state)
    if age is not None:
        part.born, part.ages = age.numbered(mask, whole=whole_state)
        if part.born.size > MOST_AGES:
            yield from _too_many_ages(part)
            return
    yield part


def _too_many_ages(part: Part) -> Iterable[Part]:
    """A part with more than `MOST_AGES`, as parts that list their elements."""
    assert part.frozen_bits is not None and part.ages is not None
    live = np.flatnonzero(~unpack_bits(part.frozen_bits, part.shape).reshape(-1))
    places = np.arange(live.size) if part.gapless else live
    group, ages = part.ages[places] // MOST_AGES, (part.ages % MOST_AGES).astype(np.uint16)
    for number in range(-(-part.born.size // MOST_AGES)):
        some, chosen = part.born[number * MOST_AGES :][:MOST_AGES], np.flatnonzero(group == number)
        if chosen.size:
            shape = part.shape[0] * part.shape[1], 1
            yield Part(part.tensor, shape, 1, live[chosen], None, places[chosen], born=some, ages=ages)


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
