"""The work list as GPU kernels read it (csrc/work.h), Triton's and CUDA's alike: tiles, copied to the device once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from .parts import Part, WorkList, cut

TILE_ELEMENTS: Final = 8192  # of a run: what a block of threads takes
# Mirrors of struct Tile and struct TilePart in csrc/work.h. What counts elements of one tile has 32 bits.
TILE: Final = np.dtype(
    [("start", "i8"), ("packed", "i8"), ("tensor", "i4"), ("part", "i4"), ("count", "i4"), ("at", "i4")]
)
_PART_COLUMNS: Final = ("cols", "packed_cols", "frozen_bits", "shared", "gapless", "ages")
TILE_PART: Final = np.dtype([(name, "i8") for name in _PART_COLUMNS])

_LISTED_BELOW: Final = 256  # runs shorter than this on average become a list of elements: they would not fill a block


class Tiles:
    """A work list on one device.

    Attributes:
        host_tiles: rows of `TILE`, on the host.
        parts: rows of `TILE_PART` with addresses on the device, int64 [parts, 6].
        lists: how many of a part's two lists there are: 0 none; 1 ``cols``; 2 ``packed_cols``, and perhaps ``cols``.
        bits: whether any part has frozen bits. They are readable 8 bytes past their end. No such part has lists.
        ages: whether elements of any part differ in age.
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
        self.host_tiles, parts, lists, bits, ages = _on_host(work)
        self._lists, self._bits, self._ages = (torch.from_numpy(found).to(device) for found in (lists, bits, ages))
        bases = {"cols": self._lists, "packed_cols": self._lists, "frozen_bits": self._bits, "ages": self._ages}
        for name, base in bases.items():
            parts[name] = np.where(parts[name] < 0, 0, base.data_ptr() + parts[name] * base.element_size())
        self.parts = torch.from_numpy(parts.view(np.int64).reshape(-1, len(_PART_COLUMNS))).to(device)
        self.lists = 2 if parts["packed_cols"].any() else int(parts["cols"].any())
        self.bits, self.ages = bool(parts["frozen_bits"].any()), bool(parts["ages"].any())
        self._chosen: dict[bytes, Tensor] = {}
        self._dtypes: list[torch.dtype | None] = [None] * len(work.packed_sizes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tiles:
        return self  # `parts` holds addresses; nothing here changes, but for what is found again

    def of_tensors(self, chosen: np.ndarray) -> Tensor:
        """The tiles of the tensors whose flag in ``chosen``, bool [tensors], is set: int64 [tiles, 4]."""
        key = chosen.tobytes()
        if key not in self._chosen:
            rows = self.host_tiles if chosen.all() else self.host_tiles[chosen[self.host_tiles["tensor"]]]
            self._chosen[key] = torch.from_numpy(rows.view(np.int64).reshape(-1, TILE.itemsize // 8)).to(self._device)
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


def _on_host(work: WorkList) -> tuple[np.ndarray, ...]:
    """Tiles; parts, with offsets into what follows, or -1; int32 lists, uint8 bits and int16 ages, each of all parts
    end to end."""
    tiles = [np.zeros(0, TILE)]
    lists, bits, ages = [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)], [np.zeros(0, np.int16)]
    sizes = {id(kept): 0 for kept in (lists, bits, ages)}
    parts = np.full(len(work.parts), -1, TILE_PART)
    parts["shared"], parts["gapless"] = work.shared(), [part.gapless for part in work.parts]
    for index, part in enumerate(work.parts):
        part_tiles, cols, packed_cols, some_bits = _tiles(work, part, index)
        tiles.append(part_tiles)
        for name, values, kept in (
            ("cols", cols, lists), ("packed_cols", packed_cols, lists), ("frozen_bits", some_bits, bits),
            ("ages", part.ages, ages),
        ):  # fmt: skip
            if values is not None:
                parts[name][index] = sizes[id(kept)]
                room = np.zeros(8 if kept is bits else 0, kept[0].dtype)
                kept += [values.astype(kept[0].dtype), room]
                sizes[id(kept)] += values.size + room.size
    return np.concatenate(tiles), parts, *(np.concatenate(kept) for kept in (lists, bits, ages))


def _tiles(work: WorkList, part: Part, index: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, Any]:
    """Rows of `TILE`; and the part's lists of columns and of packed columns and its bits, if its tiles have them."""
    start, packed, count = part.runs()
    cols, packed_cols, bits = part.cols, part.packed_cols, part.frozen_bits
    gapless = part.gapless and bits is not None
    short = len(count) > 1 and count.sum() < _LISTED_BELOW * len(count)
    if short and part.shape[0] * part.shape[1] < 2**31:
        packed = work.gapless_places(part, start) if gapless else packed
        start, packed, count, cols, packed_cols = _listed(start, packed, count, cols, packed_cols, bits, gapless)
        bits = None
    run, offset, count = cut(count, TILE_ELEMENTS)
    tiles = np.zeros(run.size, TILE)
    tiles["tensor"], tiles["part"], tiles["count"] = part.tensor, index, count
    tiles["at"] = 0 if cols is None and packed_cols is None else offset
    tiles["start"] = start[run] + (offset if cols is None else 0)
    if gapless and bits is not None:
        tiles["packed"] = work.gapless_places(part, tiles["start"])
    else:
        tiles["packed"] = packed[run] + (offset if packed_cols is None else 0)
    return tiles, cols, packed_cols, bits


def _listed(
    start: np.ndarray, packed: np.ndarray, count: np.ndarray, cols: np.ndarray | None, packed_cols: np.ndarray | None,
    bits: np.ndarray | None, gapless: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:  # fmt: skip
    """Runs as one run with a list of its elements, and of their packed places unless these follow each other. Of a live
    list with bits, those whose bit is clear."""
    run = np.repeat(np.arange(count.size), count)
    step = np.arange(run.size) - np.repeat(np.cumsum(count) - count, count)
    elements = (start - start[0])[run] + (step if cols is None else cols[step])
    places = (packed - packed[0])[run] + (step if packed_cols is None else packed_cols[step])
    if bits is not None:
        here = start[0] + elements
        live = np.flatnonzero(bits[here >> 3] >> (here & 7).astype(np.uint8) & 1 == 0)
        elements, places = elements[live], np.arange(live.size) if gapless else places[live]
    in_order = np.array_equal(places, np.arange(places.size))
    return start[:1], packed[:1], np.array([elements.size]), elements, None if in_order else places
