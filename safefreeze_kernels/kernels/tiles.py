"""The work list as GPU kernels read it, Triton's and CUDA's alike: cut into tiles, and copied to the device once."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from .operands import AdamWOperands
from .parts import WorkList

Rounding = Literal["nearest", "stochastic", "remainder"]

TILE_ELEMENTS: Final = 8192  # of a run: what a block of threads takes
# Mirrors of struct Tile and struct TilePart in csrc/work.h. What counts elements of one tile has 32 bits.
TILE: Final = np.dtype(
    [("start", "i8"), ("packed", "i8"), ("tensor", "i4"), ("part", "i4"), ("count", "i4"), ("at", "i4")]
)
_PART_COLUMNS: Final = ("cols", "packed_cols", "frozen_bits", "shared")
TILE_PART: Final = np.dtype([(name, "i8") for name in _PART_COLUMNS])

_LISTED_BELOW: Final = 256  # runs shorter than this on average become a list of elements: they would not fill a block


class DeviceList:
    """A work list on one device.

    Attributes:
        host_tiles: rows of `TILE`, on the host.
        parts: rows of `TILE_PART` with addresses on the device, int64 [parts, 4].
        lists: how many of a part's two lists there are: 0 none; 1 ``cols``; 2 ``packed_cols``, and perhaps ``cols``.
        bits: whether any part has frozen bits. They are readable 8 bytes past their end.
    """

    @classmethod
    def of(cls, work: WorkList, device: torch.device) -> DeviceList:
        """The copy of ``work`` on ``device``, made at first use; it lives as long as ``work``."""
        found: DeviceList | None = work.copies.get(device)
        if found is None:
            found = work.copies[device] = cls(work, device)
        return found

    def __init__(self, work: WorkList, device: torch.device) -> None:
        self._device = device
        self.host_tiles, parts, lists, bits = _compiled(work)
        self._lists, self._bits = torch.from_numpy(lists).to(device), torch.from_numpy(bits).to(device)
        for name, base in (("cols", self._lists), ("packed_cols", self._lists), ("frozen_bits", self._bits)):
            parts[name] = np.where(parts[name] < 0, 0, base.data_ptr() + parts[name] * base.element_size())
        self.parts = torch.from_numpy(parts.view(np.int64).reshape(-1, len(_PART_COLUMNS))).to(device)
        self.lists = 2 if parts["packed_cols"].any() else int(parts["cols"].any())
        self.bits = bool(parts["frozen_bits"].any())
        self._tiles: dict[bytes, Tensor] = {}
        self._dtypes: list[torch.dtype | None] = [None] * len(work.packed_sizes)

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceList:
        return self  # `parts` holds addresses; nothing here changes, but for what is found again

    def tiles(self, chosen: np.ndarray) -> Tensor:
        """The tiles of the tensors whose flag in ``chosen``, bool [tensors], is set: int64 [tiles, 4]."""
        key = chosen.tobytes()
        if key not in self._tiles:
            rows = self.host_tiles if chosen.all() else self.host_tiles[chosen[self.host_tiles["tensor"]]]
            self._tiles[key] = torch.from_numpy(rows.view(np.int64).reshape(-1, TILE.itemsize // 8)).to(self._device)
        return self._tiles[key]

    def by_dtype(self, tensors: Sequence[Tensor | None]) -> Iterator[tuple[torch.dtype, Tensor]]:
        """Each dtype among ``tensors``, and their tiles. A missing tensor keeps the dtype it had: its tiles are there
        too, and its address must be given as 0."""
        dtypes = [
            known if tensor is None else tensor.dtype for tensor, known in zip(tensors, self._dtypes, strict=True)
        ]
        self._dtypes = dtypes
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors if tensor is not None):
            yield dtype, self.tiles(np.array([known in (dtype, None) for known in dtypes], bool))


@dataclass(frozen=True)
class AdamWLaunch:
    """What one launch of a step takes: the tensors of one kind."""

    param: torch.dtype
    state: torch.dtype
    remainders: bool
    tiles: Tensor

    def rounding(self, stochastic: bool) -> Rounding:
        """How the parameters are rounded."""
        if self.remainders:
            return "remainder"
        return "stochastic" if stochastic and self.param != torch.float32 else "nearest"


class AdamWTables:
    """What stays from step to step: where a set of operands lies, and what each launch takes.

    Attributes:
        list: the work list on the operands' device.
        tensors: rows of `ADAMW_TENSOR`, int64 [tensors, 7], on the device.
        launches: one per kind of tensor.
    """

    @classmethod
    def of(cls, work: WorkList, operands: AdamWOperands) -> AdamWTables:
        """The tables of ``operands``, made at first use and kept there."""
        if not isinstance(operands.native, cls):
            operands.native = cls(work, operands)
        found: AdamWTables = operands.native
        return found

    def __init__(self, work: WorkList, operands: AdamWOperands) -> None:
        device, n = operands.params[0].device, len(operands.params)
        self.list = DeviceList.of(work, device)
        self.tensors = torch.from_numpy(operands.table()).to(device)
        remainders = operands.remainders or [None] * n
        kinds = [
            (p.dtype, m.dtype, remainder is not None)
            for p, m, remainder in zip(operands.params, operands.exp_avgs, remainders, strict=True)
        ]
        self.launches = [
            AdamWLaunch(*kind, self.list.tiles(np.array([kind == other for other in kinds], bool)))
            for kind in dict.fromkeys(kinds)
        ]


def addresses(tensors: Sequence[Tensor | None]) -> bytes:
    """int64 [tensors]; 0 for a missing one."""
    tables = getattr(tensors, "tables", None)  # `grads.reader.Gradients` that the extension read know them
    if tables is not None:
        return ctypes.string_at(tables[0], 8 * len(tensors))
    return np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors], np.int64).tobytes()


def device_of(tensors: Sequence[Tensor | None]) -> torch.device | None:
    return next((tensor.device for tensor in tensors if tensor is not None), None)


def _compiled(work: WorkList) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tiles; parts, with offsets into what follows, or -1; int32 lists and uint8 bits, each of all parts end to end."""
    tiles, lists, bits = [np.zeros(0, TILE)], [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)]
    n_listed = n_bits = 0
    bits_of: dict[int, int] = {}  # parts of a tensor may share them
    parts = np.full(len(work.parts), -1, TILE_PART)
    parts["shared"] = work.segments["shared"]
    part_of_run = np.repeat(work.pieces["segment"], work.pieces["end"] - work.pieces["begin"])
    bounds = np.searchsorted(part_of_run, np.arange(len(work.parts) + 1))
    for index, part in enumerate(work.parts):
        runs = work.runs[bounds[index] : bounds[index + 1]]
        start, packed, count = runs["start"], runs["packed"], runs["count"]
        cols, packed_cols, frozen_bits = part.cols, part.packed_cols, part.frozen_bits
        gapless = work.frozen and frozen_bits is not None  # in the twin
        short = len(runs) > 1 and count.sum() < _LISTED_BELOW * len(runs)
        if short and not gapless and part.shape[0] * part.shape[1] < 2**31:
            start, packed, count, cols, packed_cols = _listed(start, packed, count, cols, packed_cols)
        for name, places in (("cols", cols), ("packed_cols", packed_cols)):
            if places is not None:
                parts[name][index] = n_listed
                lists.append(places.astype(np.int32))
                n_listed += places.size
        if frozen_bits is not None:
            if id(frozen_bits) not in bits_of:
                bits_of[id(frozen_bits)] = n_bits
                bits += [frozen_bits, np.zeros(8, np.uint8)]
                n_bits += frozen_bits.size + 8
            parts["frozen_bits"][index] = bits_of[id(frozen_bits)]
        cuts = -(-count // TILE_ELEMENTS)
        run = np.repeat(np.arange(count.size), cuts)
        offset = (np.arange(run.size) - np.repeat(np.cumsum(cuts) - cuts, cuts)) * TILE_ELEMENTS
        cut = np.zeros(run.size, TILE)
        cut["tensor"], cut["part"] = part.tensor, index
        cut["count"] = np.minimum(count[run] - offset, TILE_ELEMENTS)
        cut["at"] = 0 if cols is None and packed_cols is None else offset
        cut["start"] = start[run] + (offset if cols is None else 0)
        cut["packed"] = packed[run] + (offset if packed_cols is None else 0)
        if gapless:
            assert frozen_bits is not None
            before = np.concatenate([[0], np.cumsum(np.bitwise_count(frozen_bits), dtype=np.int64)])
            cut["packed"] = packed[run] + before[cut["start"] // 8] - before[start[run] // 8]
        tiles.append(cut)
    return np.concatenate(tiles), parts, np.concatenate(lists), np.concatenate(bits)


def _listed(
    start: np.ndarray, packed: np.ndarray, count: np.ndarray, cols: np.ndarray | None, packed_cols: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Runs as one run with a list of its elements, and of their packed places unless these follow each other."""
    run = np.repeat(np.arange(count.size), count)
    step = np.arange(run.size) - np.repeat(np.cumsum(count) - count, count)
    elements = (start - start[0])[run] + (step if cols is None else cols[step])
    places = (packed - packed[0])[run] + (step if packed_cols is None else packed_cols[step])
    in_order = np.array_equal(places, np.arange(places.size))
    return start[:1], packed[:1], count.sum(keepdims=True), elements, None if in_order else places
