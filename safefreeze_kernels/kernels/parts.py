"""The work list: a plan compiled against tensor shapes into the parts a kernel visits. Geometry alone.

A live list visits what trains; a frozen row or column is simply not in it. A frozen list visits what does not train.
Nothing here knows addresses, dtypes of parameters, or hyper-parameters, so a list lives as long as its plan. Kernels on
the CPU are given it as runs (runs.py), kernels on a GPU as tiles (tiles.py), the reference reads the parts themselves.

Seen from a part, a tensor is a matrix (rows, cols) and has a *packed twin*: optimizer state without the frozen rows and
columns, or state of the tensor's own shape (live list), or a copy of the frozen elements (frozen list).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..plan.mask import FreezeMask, bits_before, pack_bits, unpack_bits
from .ages import Ages

_C: Any = None
with contextlib.suppress(ImportError):
    from .. import _C


@dataclass
class Part:
    """A rectangle of one tensor. ``None`` for an index means all of them.

    Attributes:
        born: int64, ascending: the ages of its elements, as `Ages` counts.
        row_ages: int64 [rows], which of ``born`` each row has. None: they share one.
    """

    tensor: int
    shape: tuple[int, int]
    packed_width: int
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    packed_rows: np.ndarray | None = None
    packed_cols: np.ndarray | None = None
    packed_start: int = 0
    frozen_bits: np.ndarray | None = None  # one bit per element of the tensor
    born: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    row_ages: np.ndarray | None = None

    def frozen_flags(self) -> np.ndarray:
        """`frozen_bits` of this rectangle, written out: bool [rows, cols]."""
        assert self.frozen_bits is not None
        flags = unpack_bits(self.frozen_bits, self.shape)
        flags = flags if self.rows is None else flags[self.rows]
        return flags if self.cols is None else flags[:, self.cols]

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

    def gapless(self, part: Part) -> bool:
        """Whether the packed twin holds only the part's elements whose bit is set."""
        return self.frozen and part.frozen_bits is not None

    def gapless_places(self, part: Part, start: np.ndarray) -> np.ndarray:
        """Places in such a twin of what begins with elements ``start``, multiples of 8."""
        assert part.frozen_bits is not None
        return part.packed_start + bits_before(part.frozen_bits, start)


def distinct(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ones of int64 numbers, ascending, and which of them each is."""
    if _C is not None:
        found: tuple[np.ndarray, np.ndarray] = _C.distinct(numbers)
        return found
    values, which = np.unique(numbers, return_inverse=True)
    return values, which.reshape(-1)


def compile_live(
    masks: Sequence[FreezeMask], ages: Sequence[Ages | None] | None = None, *, whole_state: bool = False
) -> WorkList:
    """The list of what trains. ``masks[i]`` is tensor ``i``'s; packed twins have ``masks[i].packed_shape`` or, with
    ``whole_state``, the tensors' own shapes."""
    parts: list[Part] = []
    sizes: list[int] = []
    for tensor, mask in enumerate(masks):
        age = ages[tensor] if ages is not None else None
        live_parts = list(_live_parts(tensor, mask, age))
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
    rows, width = mask.live_rows, shape[1] - mask.frozen_cols.size
    if not rows.size or not width:
        return
    cols = mask.live_cols if width < shape[1] else None
    if age is None:
        yield Part(tensor, shape, width, rows, cols, frozen_bits=mask.bits)
    elif age.elements is None:
        row_born = age.rows[rows]
        if not age.cols.any():
            born, row_ages = distinct(row_born)
            yield Part(
                tensor, shape, width, rows, cols, frozen_bits=mask.bits, born=born,
                row_ages=row_ages if born.size > 1 else None,
            )  # fmt: skip
            return
        cols = mask.live_cols
        for col_born in np.unique(age.cols[cols]):
            places = np.flatnonzero(age.cols[cols] == col_born)
            born, row_ages = distinct(np.maximum(row_born, col_born))
            yield Part(
                tensor, shape, width, rows, None if places.size == shape[1] else cols[places],
                packed_cols=places if places.size < width else None, frozen_bits=mask.bits, born=born,
                row_ages=row_ages if born.size > 1 else None,
            )  # fmt: skip
    else:
        born = np.maximum(np.maximum(age.rows[:, None], age.cols[None, :]), age.elements)
        frozen = mask.frozen_flags()
        for value in np.unique(born[~frozen]):
            others = pack_bits(frozen | (born != value))
            yield Part(
                tensor,
                shape,
                width,
                rows,
                cols,
                frozen_bits=others,
                born=np.array([value], np.int64),
            )


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
