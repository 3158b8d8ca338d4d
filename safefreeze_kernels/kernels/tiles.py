"""The work list as GPU kernels read it (csrc/work.h), Triton's and CUDA's alike: tiles, copied to the device once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from .operands import to_device
from .parts import Part, RunTable, WorkList, cut

TILE_ELEMENTS: Final = 8192  # what a block of threads takes at most
# Where there is less work, tiles are shorter, so that the last blocks end about together: no shorter than what a block
# loads at once, and as many as a large GPU holds at once eight times over.
_SHORTEST: Final = 2048
_ENOUGH_TILES: Final = 4096
# Mirrors of struct Tile and struct TilePart in csrc/work.h. What counts elements of one tile has 32 bits.
TILE: Final = np.dtype(
    [("start", "i8"), ("packed", "i8")] + [(name, "i4") for name in ("tensor", "part", "count", "at", "age", "width")]
)
_PART_COLUMNS: Final = ("cols", "packed_cols", "frozen_bits", "shared", "gapless", "ages")
TILE_PART: Final = np.dtype([(name, "i8") for name in _PART_COLUMNS])

_LISTED_BELOW: Final = 256  # runs shorter than this on average become a list: they would not fill a block


class Tiles:
    """A work list on one device.

    ``rows``: whether the backend's kernels take several rows to a tile, as pieces of a width (`Tile` in csrc/work.h);
    else a list has single elements, runs of ``_LISTED_BELOW`` elements are tiles of their own, and tiles are as long as
    they may be.

    Attributes:
        host_tiles: rows of `TILE`, on the host.
        parts: rows of `TILE_PART` with addresses on the device, int64 [parts, 6].
        lists: how many of a part's two lists there are: 0 none; 1 ``cols``; 2 ``packed_cols``, and perhaps ``cols``.
        bits: whether any part has frozen bits. They are readable 8 bytes past their end. No such part has lists.
        ages: whether elements of any part differ in age.
        frozen: whether it is a frozen list.
        uploads: what of this lies on the device.
    """

    @classmethod
    def of(cls, work: WorkList, device: torch.device, *, rows: bool = False) -> Tiles:
        """The tiles of ``work`` on ``device``, made at first use; they live as long as ``work``."""
        found: Tiles | None = work.forms.get((device, rows))
        if found is None:
            found = work.forms[device, rows] = cls(work, device, rows=rows)
        found.uploads.note_use()
        return found

    def __init__(self, work: WorkList, device: torch.device, *, rows: bool = False) -> None:
        self.frozen, self.uploads = work.frozen, Uploads(device)
        self.host_tiles, parts, lists, bits, ages = _on_host(work, rows)
        self._lists, self._bits, self._ages = map(self.uploads.upload, (lists, bits, ages))
        bases = {"cols": self._lists, "packed_cols": self._lists, "frozen_bits": self._bits, "ages": self._ages}
        for name, base in bases.items():
            parts[name] = np.where(parts[name] < 0, 0, base.data_ptr() + parts[name] * base.element_size())
        self.parts = self.uploads.upload(parts.view(np.int64).reshape(-1, len(_PART_COLUMNS)))
        self.lists = 2 if parts["packed_cols"].any() else int(parts["cols"].any())
        self.bits, self.ages = bool(parts["frozen_bits"].any()), bool(parts["ages"].any())
        self._chosen: dict[bytes, Tensor] = {}
        self._dtypes: list[torch.dtype | None] = [None] * len(work.packed_sizes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tiles:
        return self  # `parts` holds addresses; nothing here changes, but for what is found again

    def of_tensors(self, chosen: np.ndarray) -> Tensor:
        """The tiles of the tensors whose flag in ``chosen``, bool [tensors], is set: int64 [tiles, 5]."""
        key = chosen.tobytes()
        if key not in self._chosen:
            rows = self.host_tiles if chosen.all() else self.host_tiles[chosen[self.host_tiles["tensor"]]]
            self._chosen[key] = self.uploads.upload(rows.view(np.int64).reshape(-1, TILE.itemsize // 8))
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


class Uploads:
    """Tables on a device, which launches on several streams may read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: list[tuple[Tensor, Any]] = []  # with torch's current stream then
        self._noted: set[int] = set()

    def upload(self, array: np.ndarray) -> Tensor:
        table = to_device(array, self._device)
        if table.is_cuda:
            self._made.append((table, torch.cuda.current_stream(self._device)))
            self._noted.clear()
        return table

    def note_use(self) -> None:
        """Torch's current stream reads the tables next: it waits until they were uploaded, and their memory serves
        nothing else before it has read them."""
        if not self._made:
            return
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream in self._noted:
            return
        self._noted.add(stream.cuda_stream)
        # A capture may not wait for what it does not capture; what begins one has waited for the whole device.
        capturing = torch.cuda.is_current_stream_capturing()
        for table, made_on in self._made:
            if made_on != stream:
                if not capturing:
                    stream.wait_stream(made_on)
                table.record_stream(stream)


class _Kept:
    """Arrays end to end, each once: parts may share bits, a part its two lists. ``room``: zeros after each."""

    def __init__(self, dtype: type, room: int = 0) -> None:
        self._dtype, self._size = dtype, 0
        self._room: np.ndarray = np.zeros(room, dtype)
        self._pieces: list[np.ndarray] = [np.zeros(0, dtype)]
        self._known: dict[int, tuple[int, np.ndarray]] = {}

    def place(self, values: np.ndarray) -> int:
        """Where they begin."""
        if id(values) not in self._known:
            self._known[id(values)] = self._size, values  # which lives, so that nothing else has its id
            self._pieces += [values.astype(self._dtype), self._room]
            self._size += values.size + self._room.size
        return self._known[id(values)][0]

    def all(self) -> np.ndarray:
        return np.concatenate(self._pieces)


def _on_host(work: WorkList, in_rows: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tiles; parts, with offsets into what follows, or -1; int32 lists, uint8 bits and int16 ages, each of all parts
    end to end."""
    lists, bits, ages = _Kept(np.int32), _Kept(np.uint8, 8), _Kept(np.int16)
    all_runs = work.runs()
    tables, list_at = [all_runs.take(slice(0))], [np.zeros(0, np.int64)]
    parts, widths = np.full(len(work.parts), -1, TILE_PART), np.zeros(len(work.parts), np.int64)
    parts["shared"], parts["gapless"] = work.shared(), [part.gapless for part in work.parts]
    for index, (part, here) in enumerate(zip(work.parts, all_runs.of_parts(len(work.parts)), strict=True)):
        runs, cols, packed_cols, some_bits = all_runs.take(here), part.cols, part.packed_cols, part.frozen_bits
        at, width = np.zeros(runs.counts.size, np.int64), 1 if cols is not None or packed_cols is not None else 0
        piece = _piece(part, runs, in_rows)
        if piece:
            runs, at, cols, packed_cols = _listed(work, part, runs, piece)
            some_bits, width = None, piece
        tables.append(runs)
        list_at.append(at)
        widths[index] = width
        for name, values, kept in (
            ("cols", cols, lists), ("packed_cols", packed_cols, lists), ("frozen_bits", some_bits, bits),
            ("ages", part.ages, ages),
        ):  # fmt: skip
            if values is not None:
                parts[name][index] = kept.place(values)
    table = RunTable(*(np.concatenate(columns) for columns in zip(*tables, strict=True)))
    longest = min(max(int(table.counts.sum()) // _ENOUGH_TILES // 1024 * 1024, _SHORTEST), TILE_ELEMENTS)
    longest = longest if in_rows else TILE_ELEMENTS
    tiles = _tiles(work, table, np.concatenate(list_at), parts, widths, longest)
    return tiles, parts, lists.all(), bits.all(), ages.all()


def _piece(part: Part, runs: RunTable, in_rows: bool) -> int:
    """Elements of the pieces that a part is to be listed in; 0: its runs stay as they are."""
    n_rows, n_cols = part.shape
    mean = runs.counts.sum() / max(runs.counts.size, 1)
    if runs.counts.size < 2 or n_rows * n_cols >= 2**31:
        return 0
    lists = part.cols, part.packed_cols, part.frozen_bits, part.ages
    if in_rows and part.packed_width == n_cols <= TILE_ELEMENTS // 2 and all(indices is None for indices in lists):
        # Rows of other widths are not aligned: as many elements apart are taken from long runs.
        return n_cols if mean < (_LISTED_BELOW if n_cols % 8 else TILE_ELEMENTS) else 0
    return int(mean < _LISTED_BELOW)


def _tiles(
    work: WorkList, table: RunTable, list_at: np.ndarray, parts: np.ndarray, widths: np.ndarray, longest: int
) -> np.ndarray:
    """Rows of `TILE`. ``list_at``: where each run begins in the lists of its part, if that has any; ``widths``: of the
    pieces of each part; ``longest``: elements of a tile, or one piece."""
    width = np.maximum(widths, 1)[table.part]
    run, offset, count = cut(table.counts, np.maximum(longest // width, 1) * width)
    tiles = np.zeros(run.size, TILE)
    part = table.part[run]
    tiles["tensor"] = np.array([part.tensor for part in work.parts], np.int64)[part] if run.size else 0
    tiles["part"], tiles["count"], tiles["age"], tiles["width"] = part, count, table.age[run], widths[part]
    listed, packed_listed = (parts[name][part] >= 0 for name in ("cols", "packed_cols"))
    tiles["at"] = np.where(listed | packed_listed, list_at[run] + offset // width[run], 0)
    tiles["start"] = table.start[run] + np.where(listed, 0, offset)
    tiles["packed"] = table.packed[run] + np.where(packed_listed, 0, offset)
    for index, one in enumerate(work.parts):
        if one.gapless and parts["frozen_bits"][index] >= 0:
            here = part == index
            tiles["packed"][here] = work.gapless_places(one, tiles["start"][here])
    return tiles


def _listed(
    work: WorkList, part: Part, runs: RunTable, width: int
) -> tuple[RunTable, np.ndarray, np.ndarray, np.ndarray | None]:  # fmt: skip
    """Runs of one part as a run for each age with a list of its pieces of ``width`` elements, and of their packed
    places unless these follow each other; and where each begins in the lists. Of a live list with bits, single elements
    whose bit is clear."""
    runs = runs.take(np.argsort(runs.age, kind="stable"))
    if part.gapless:
        runs = runs._replace(packed=work.gapless_places(part, runs.start))
    pieces = runs.counts // width
    run = np.repeat(np.arange(pieces.size), pieces)
    before = np.cumsum(pieces) - pieces
    step = np.arange(run.size) - np.repeat(before, pieces)
    start, packed = runs.start.min(), runs.packed.min()
    elements = (runs.start - start)[run] + (step * width if part.cols is None else part.cols[step])
    places = (runs.packed - packed)[run] + (step * width if part.packed_cols is None else part.packed_cols[step])
    if part.frozen_bits is not None:  # its rows share an age
        here = start + elements
        live = np.flatnonzero(part.frozen_bits[here >> 3] >> (here & 7).astype(np.uint8) & 1 == 0)
        elements, places = elements[live], np.arange(live.size) if part.gapless else places[live]
    first = np.flatnonzero(np.diff(runs.age, prepend=-1))
    at, in_order = before[first], np.array_equal(places, np.arange(places.size) * width)
    found = RunTable(
        runs.part[first], np.full(first.size, start), packed + (at * width if in_order else 0 * at),
        np.diff(np.append(at, elements.size)) * width, runs.age[first],
    )  # fmt: skip
    if np.array_equal(places, elements):
        places = elements
    return found, at, elements, None if in_order else places
