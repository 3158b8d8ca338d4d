"""The work list: a plan compiled against tensor shapes into the parts a kernel visits. Geometry alone.

A live list visits what trains; a frozen row or column is simply not in it. A frozen list visits what does not train.
Nothing here knows addresses, dtypes of parameters, or hyper-parameters, so a list lives as long as its plan. Kernels on
the CPU are given it as runs (runs.py), kernels on a GPU as tiles (tiles.py), the reference reads the parts themselves.

Seen from a part, a tensor is a matrix (rows, cols) and has a *packed twin*: optimizer state without the frozen rows and
columns, or state of the tensor's own shape (live list), or a copy of the frozen elements (frozen list).

A *set* is a set of scalars that elements share: those of one tensor that were thawed together. Parts, and runs in them,
name their sets by number; what the scalars are is decided at each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..plan.mask import FreezeMask, bits_before, pack_bits, unpack_bits
from .ages import Ages


@dataclass
class Part:
    """A rectangle of one tensor. ``None`` for an index means all of them. ``born``: when its elements were thawed, in
    steps of the tensor; if rows were at different times, int64 [rows]."""

    tensor: int
    shape: tuple[int, int]
    packed_width: int
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    packed_rows: np.ndarray | None = None
    packed_cols: np.ndarray | None = None
    packed_start: int = 0
    frozen_bits: np.ndarray | None = None  # one bit per element of the tensor
    born: int | np.ndarray = 0

    def frozen_flags(self) -> np.ndarray:
        """`frozen_bits` of this rectangle, written out: bool [rows, cols]."""
        assert self.frozen_bits is not None
        flags = unpack_bits(self.frozen_bits, self.shape)
        flags = flags if self.rows is None else flags[self.rows]
        return flags if self.cols is None else flags[:, self.cols]


class RunTable(NamedTuple):
    """What lies together in memory, part after part, each in memory order; arrays of one entry per run.

    Attributes:
        part: which part it is of.
        start: its first element; of a part with ``cols``, the first element of its row.
        packed: the place of that in the packed twin.
        count: how many elements it has; of a part with ``cols``, how many columns are picked.
        set: of scalars.
    """

    part: np.ndarray
    start: np.ndarray
    packed: np.ndarray
    count: np.ndarray
    set: np.ndarray

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
        #: Of each set, int64: its tensor, and when its elements were thawed.
        self.tensor_of_set = self.born_of_set = np.zeros(0, np.int64)
        #: Of each part: its set, or those of its rows.
        self.set_of_part: list[int | np.ndarray] = []
        tensors, born, n_sets = [], [self.born_of_set], 0
        for part in self.parts:
            if isinstance(part.born, np.ndarray):
                values, which = distinct(part.born)
                self.set_of_part.append(n_sets + which)
            else:
                values = np.array([part.born], np.int64)
                self.set_of_part.append(n_sets)
            tensors.append(values.size)
            born.append(values)
            n_sets += values.size
        self.born_of_set = np.concatenate(born)
        self.tensor_of_set = np.repeat(np.array([part.tensor for part in self.parts], np.int64), tensors)

    def __reduce__(self) -> Any:
        # Copied and pickled by what it is made of: its forms hold addresses.
        return WorkList, (self.frozen, self.parts, self.packed_sizes)

    def runs(self) -> RunTable:
        """The runs of all parts. Rows of a part with ``cols`` are runs of their own."""
        if not self.parts:
            return RunTable(*(np.zeros(0, np.int64) for _ in RunTable._fields))
        rows, places, sets, wide = [], [], [], []
        for part, part_set in zip(self.parts, self.set_of_part, strict=True):
            whole = part.rows is None and part.cols is None and not isinstance(part_set, np.ndarray)
            row = np.arange(1 if whole else part.shape[0]) if part.rows is None else part.rows
            rows.append(row)
            places.append(np.arange(row.size) if part.packed_rows is None else part.packed_rows)
            sets.append(np.broadcast_to(part_set, row.shape))
            # elements of a row of the tensor, of its twin, and of a run that is one row
            width = part.shape[1] * (part.shape[0] if whole else 1)
            wide.append((part.shape[1], part.packed_width, width if part.cols is None else part.cols.size))
        of_part = np.repeat(np.arange(len(rows)), [row.size for row in rows])
        row, place, of_set = np.concatenate(rows), np.concatenate(places), np.concatenate(sets)
        width, packed_width, count = np.array(wide, np.int64).T
        first = np.ones(row.size, bool)
        first[1:] = (
            (np.diff(row) != 1) | (np.diff(place) != 1) | (np.diff(of_set) != 0) | (np.diff(of_part) != 0)
            | np.array([part.cols is not None for part in self.parts])[of_part[1:]]
        )  # fmt: skip
        begin = np.flatnonzero(first)
        part = of_part[begin]
        return RunTable(
            part, row[begin] * width[part],
            np.array([part.packed_start for part in self.parts])[part] + place[begin] * packed_width[part],
            np.diff(np.append(begin, row.size)) * count[part], of_set[begin],
        )  # fmt: skip

    def by_set(self) -> Iterator[tuple[int, Part]]:
        """The parts, each cut into one for each set, with the number of that."""
        for part, of_rows in zip(self.parts, self.set_of_part, strict=True):
            if not isinstance(of_rows, np.ndarray):
                yield of_rows, part
                continue
            rows = np.arange(part.shape[0]) if part.rows is None else part.rows
            places = np.arange(rows.size) if part.packed_rows is None else part.packed_rows
            for number in np.unique(of_rows).tolist():
                some = of_rows == number
                yield (
                    number,
                    replace(part, rows=rows[some], packed_rows=places[some], born=int(self.born_of_set[number])),
                )

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


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`np.unique` with its inverse, of int64 values 0 or more; it counts rather than sorts where that is quicker."""
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if high - low > 4096 + 8 * values.size:
        found, which = np.unique(values, return_inverse=True)
        return found, which.reshape(-1)
    there = np.zeros(high - low + 1, bool)
    there[values - low] = True
    return np.flatnonzero(there) + low, (np.cumsum(there) - 1)[values - low]


def compile_live(
    masks: Sequence[FreezeMask], ages: Sequence[Ages | None] | None = None, *, whole_state: bool = False
) -> WorkList:
    """The list of what trains. ``masks[i]`` is tensor ``i``'s; packed twins have ``masks[i].packed_shape`` or, with
    ``whole_state``, the tensors' own shapes."""
    parts: list[Part] = []
    sizes: list[int] = []
    for tensor, mask in enumerate(masks):
        age = ages[tensor] if ages is not None else None
        live_parts = list(_live_parts(tensor, mask, age if age else None))
        if whole_state:
            for part in live_parts:
                part.packed_width, part.packed_rows, part.packed_cols = part.shape[1], part.rows, part.cols
        sizes.append(mask.numel if whole_state else int(np.prod(mask.packed_shape, dtype=np.int64)))
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
        row_born = age.rows[rows]
        for col_born in np.unique(age.cols[cols]):
            places = np.flatnonzero(age.cols[cols] == col_born)
            some = places.size < width
            yield Part(
                tensor, shape, width, rows, None if places.size == shape[1] else cols[places],
                packed_cols=places if some else None, frozen_bits=mask.bits, born=np.maximum(row_born, col_born),
            )  # fmt: skip
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
