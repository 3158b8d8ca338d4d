"""The work list as GPU kernels read it (csrc/work.h), Triton's and CUDA's alike: tiles, copied to the device once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from .operands import to_device
from .parts import RunTable, WorkList, cut

TILE_ELEMENTS: Final = 8192  # of a run: what a block of threads takes
# Mirrors of struct Tile and struct TilePart in csrc/work.h. What counts elements of one tile has 32 bits.
TILE: Final = np.dtype(
    [("start", "i8"), ("packed", "i8")] + [(name, "i4") for name in ("tensor", "part", "count", "at", "set", "unused")]
)
_PART_COLUMNS: Final = ("cols", "packed_cols", "frozen_bits", "shared")
TILE_PART: Final = np.dtype([(name, "i8") for name in _PART_COLUMNS])

_LISTED_BELOW: Final = 256  # runs shorter than this on average become a list of elements: they would not fill a block


class Tiles:
    """A work list on one device.

    Attributes:
        host_tiles: rows of `TILE`, on the host.
        parts: rows of `TILE_PART` with addresses on the device, int64 [parts, 4].
        lists: how many of a part's two lists there are: 0 none; 1 ``cols``; 2 ``packed_cols``, and perhaps ``cols``.
        bits: whether any part has frozen bits. They are readable 8 bytes past their end.
        frozen: whether it is a frozen list.
    """

    @classmethod
    def of(cls, work: WorkList, device: torch.device) -> Tiles:
        """The tiles of ``work`` on ``device``, made at first use; they live as long as ``work``."""
        found: Tiles | None = work.forms.get(device)
        if found is None:
            found = work.forms[device] = cls(work, device)
        return found

    def __init__(self, work: WorkList, device: torch.device) -> None:
        self.frozen, self._device = work.frozen, device
        self.host_tiles, parts, lists, bits = _on_host(work)
        self._lists, self._bits = to_device(lists, device), to_device(bits, device)
        for name, base in (("cols", self._lists), ("packed_cols", self._lists), ("frozen_bits", self._bits)):
            parts[name] = np.where(parts[name] < 0, 0, base.data_ptr() + parts[name] * base.element_size())
        self.parts = to_device(parts.view(np.int64).reshape(-1, len(_PART_COLUMNS)), device)
        self.lists = 2 if parts["packed_cols"].any() else int(parts["cols"].any())
        self.bits = bool(parts["frozen_bits"].any())
        self._chosen: dict[bytes, Tensor] = {}
        self._dtypes: list[torch.dtype | None] = [None] * len(work.packed_sizes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tiles:
        return self  # `parts` holds addresses; nothing here changes, but for what is found again

    def of_tensors(self, chosen: np.ndarray) -> Tensor:
        """The tiles of the tensors whose flag in ``chosen``, bool [tensors], is set: int64 [tiles, 5]."""
        key = chosen.tobytes()
        if key not in self._chosen:
            rows = self.host_tiles if chosen.all() else self.host_tiles[chosen[self.host_tiles["tensor"]]]
            self._chosen[key] = to_device(rows.view(np.int64).reshape(-1, TILE.itemsize // 8), self._device)
        return self._chosen[key]

    def by_dtype(self, tensors: Sequence[Tensor | None]) -> Iterator[tuple[torch.dtype, Tensor]]:
        """Each dtype among ``tensors``, and their tiles. A missing tensor keeps the dtype it had: its tiles are there
        too, and its address must be given as 0."""
        dtypes = [
            known if tensor is None else tensor.dtype for tensor, known in zip(tensors, self._dtypes, strict=True)
        ]
        self._dtypes = dtypes
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors if tensor is not None):
            yield dtype, self.of_tensors(np.array([known in (dtype, None) for known in dtypes], bool))


def _on_host(work: WorkList) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tiles; parts, with offsets into what follows, or -1; int32 lists and uint8 bits, each of all parts end to end."""
    lists, bits = [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)]
    tables, list_at = [work.runs().take(slice(0))], [np.zeros(0, np.int64)]
    n_listed = n_bits = 0
    known: dict[
        int, tuple[int, np.ndarray]
    ] = {}  # where an array is: parts of a tensor may share bits, a part its lists
    parts = np.full(len(work.parts), -1, TILE_PART)
    parts["shared"] = work.shared()
    all_runs = work.runs()
    for index, (part, here) in enumerate(zip(work.parts, all_runs.of_parts(len(work.parts)), strict=True)):
        runs, cols, packed_cols = all_runs.take(here), part.cols, part.packed_cols
        at = np.zeros(runs.count.size, np.int64)
        short = runs.count.size > 1 and runs.count.sum() < _LISTED_BELOW * runs.count.size
        if short and not work.gapless(part) and part.shape[0] * part.shape[1] < 2**31:
            runs, at, cols, packed_cols = _listed(runs, cols, packed_cols)
        tables.append(runs)
        list_at.append(at)
        for name, places in (("cols", cols), ("packed_cols", packed_cols)):
            if places is not None:
                if id(places) not in known:
                    known[id(places)] = n_listed, places
                    lists.append(places.astype(np.int32))
                    n_listed += places.size
                parts[name][index] = known[id(places)][0]
        if part.frozen_bits is not None:
            if id(part.frozen_bits) not in known:
                known[id(part.frozen_bits)] = n_bits, part.frozen_bits
                bits += [part.frozen_bits, np.zeros(8, np.uint8)]
                n_bits += part.frozen_bits.size + 8
            parts["frozen_bits"][index] = known[id(part.frozen_bits)][0]
    table = RunTable(*(np.concatenate(columns) for columns in zip(*tables, strict=True)))
    return _tiles(work, table, np.concatenate(list_at), parts), parts, np.concatenate(lists), np.concatenate(bits)


def _tiles(work: WorkList, table: RunTable, list_at: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Rows of `TILE`. ``list_at``: where each run begins in the lists of its part, if that has any."""
    run, offset, count = cut(table.count, TILE_ELEMENTS)
    tiles = np.zeros(run.size, TILE)
    part = table.part[run]
    tiles["tensor"] = np.array([part.tensor for part in work.parts], np.int64)[part] if run.size else 0
    tiles["part"], tiles["count"], tiles["set"] = part, count, table.set[run]
    listed, packed_listed = (parts[name][part] >= 0 for name in ("cols", "packed_cols"))
    tiles["at"] = np.where(listed | packed_listed, list_at[run] + offset, 0)
    tiles["start"] = table.start[run] + np.where(listed, 0, offset)
    tiles["packed"] = table.packed[run] + np.where(packed_listed, 0, offset)
    for index, one in enumerate(work.parts):
        if work.gapless(one):
            here = part == index
            tiles["packed"][here] = work.gapless_places(one, tiles["start"][here])
    return tiles


def _listed(
    runs: RunTable, cols: np.ndarray | None, packed_cols: np.ndarray | None
) -> tuple[RunTable, np.ndarray, np.ndarray, np.ndarray | None]:
    """Runs of one part as a run for each set with a list of its elements, and of their packed places unless these
    follow each other; and where each begins in the lists."""
    runs = runs.take(np.argsort(runs.set, kind="stable"))
    run = np.repeat(np.arange(runs.count.size), runs.count)
    before = np.cumsum(runs.count) - runs.count
    step = np.arange(run.size) - np.repeat(before, runs.count)
    start, packed = runs.start.min(), runs.packed.min()
    elements = (runs.start - start)[run] + (step if cols is None else cols[step])
    places = (runs.packed - packed)[run] + (step if packed_cols is None else packed_cols[step])
    first = np.flatnonzero(np.diff(runs.set, prepend=-1))
    at, in_order = before[first], np.array_equal(places, np.arange(places.size))
    found = RunTable(
        runs.part[first], np.full(first.size, start), packed + (at if in_order else 0 * at),
        np.diff(np.append(at, run.size)), runs.set[first],
    )  # fmt: skip
    if np.array_equal(places, elements):
        places = elements
    return found, at, elements, None if in_order else places
