"""What the CUDA and the Triton backend share: tables on the device, and one launch per kind of tensor.

Everything is queued on torch's current stream; nothing is waited for.
"""

from __future__ import annotations

import abc
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .operands import AdamWOperands, NormKind
from .parts import WorkList
from .tiles import Tiles, Uploads


class Launch(NamedTuple):
    """What one launch takes: the tensors of one kind. ``rows``: addresses of all tensors, int64, on the device."""

    work: Tiles
    tiles: Tensor
    rows: Tensor
    dtype: torch.dtype
    state: torch.dtype | None = None  # of a step: the moments'
    remainders: bool = False


class StepTables:
    """What stays from step to step: where a set of operands lies, and a launch per kind of tensor, the rows of which
    are those of `ADAMW_TENSOR`."""

    @classmethod
    def of(cls, work: WorkList, operands: AdamWOperands, *, rows: bool) -> StepTables:
        """The tables of ``operands``, made at first use and kept there; ``rows`` as in `Tiles`."""
        if not isinstance(operands.native, cls):
            operands.native = cls(work, operands, rows=rows)
        found: StepTables = operands.native
        for uploads in found._uploads:
            uploads.note_use()
        return found

    def __init__(self, work: WorkList, operands: AdamWOperands, *, rows: bool) -> None:
        device = operands.params[0].device
        tiles, uploads = Tiles.of(work, device, rows=rows), Uploads(device)
        table, self._uploads = uploads.upload(operands.table()), (uploads, tiles.uploads)
        remainders = operands.remainders or [None] * len(operands.params)
        kinds = [
            (p.dtype, m.dtype, remainder is not None)
            for p, m, remainder in zip(operands.params, operands.exp_avgs, remainders, strict=True)
        ]
        self.launches = [
            Launch(tiles, tiles.of_tensors(np.array([kind == other for other in kinds], bool)), table, *kind)
            for kind in dict.fromkeys(kinds)
        ]


class GpuBackend(abc.ABC):
    """All operations as launches, which a backend makes. ``_rows``: its kernels take tiles of rows (`Tiles`)."""

    _rows = False

    @abc.abstractmethod
    def _upload(self, owner: object, device: torch.device, content: bytes) -> Tensor:
        """``content`` on the device, uint8. It must live until its last launch: memory freed after that is not used for
        anything else before the launch ends. ``owner``: the same for uploads that may repeat each other."""

    @abc.abstractmethod
    def _step(
        self, launch: Launch, tables: Sequence[Tensor | None], seed: int, seed_there: Tensor, *,
        rounding: str, l2: bool, amsgrad: bool,
    ) -> None:  # fmt: skip
        """``tables``: addresses of gradients, the first row of scalars of each part, rows of scalars, and ``skip`` and
        ``multiplier`` of `Backend.adamw_`, on the device as ``seed_there`` is."""

    @abc.abstractmethod
    def _run(self, operation: str, launch: Launch, *tensors: Tensor, **options: Any) -> None:
        """``"scale"``, ``"zero"``, ``"copy"``, rows of which are pairs (tensor, packed twin), or ``"norm"``."""

    @abc.abstractmethod
    def _partial_norms(self, n_tiles: int) -> int:
        """How many numbers ``"norm"`` leaves of so many tiles."""

    @abc.abstractmethod
    def _total(self, partial: Tensor, kind: NormKind) -> Tensor:
        """The norm from what launches left of it, float64, 0-dim."""

    def adamw_(
        self, work: WorkList, operands: AdamWOperands, scalars: np.ndarray | Tensor, scalar_set: np.ndarray,
        *, l2: bool, amsgrad: bool, stochastic: bool = False, seed: int = 0, skip: Tensor | None = None,
        multiplier: Tensor | None = None,
    ) -> None:  # fmt: skip
        if not work.parts:
            return
        tables = StepTables.of(work, operands, rows=self._rows)
        contents = [
            addresses(operands.grads), seed.to_bytes(8, "little"), np.ascontiguousarray(scalar_set, np.int32).tobytes(),
            scalars.tobytes() if isinstance(scalars, np.ndarray) else b"",
        ]  # fmt: skip
        uploaded = self._upload(tables, operands.params[0].device, b"".join(contents))
        grads, seed_there, sets, words = uploaded.split_with_sizes([len(content) for content in contents])
        rows = scalars if isinstance(scalars, Tensor) else words.view(torch.int32)
        each_step = (grads.view(torch.int64), sets.view(torch.int32), rows, skip, multiplier)
        for launch in tables.launches:
            rounding = "stochastic" if stochastic and launch.dtype != torch.float32 else "nearest"
            self._step(
                launch, each_step, seed, seed_there.view(torch.int64),
                rounding="remainder" if launch.remainders else rounding, l2=l2, amsgrad=amsgrad,
            )  # fmt: skip

    def norm(self, work: WorkList, tensors: Sequence[Tensor | None], kind: NormKind) -> Tensor:
        partials = []
        for launch in self._launches(work, tensors, tensors):
            count = self._partial_norms(len(launch.tiles))
            partials.append(torch.empty(count, dtype=torch.float64, device=launch.tiles.device))
            self._run("norm", launch, partials[-1], kind=kind)
        if not partials:
            return torch.zeros((), dtype=torch.float64, device=_device(tensors))
        return self._total(torch.cat(partials) if len(partials) > 1 else partials[0], kind)

    def scale_(self, work: WorkList, tensors: Sequence[Tensor | None], factor: Tensor) -> None:
        for launch in self._launches(work, tensors, tensors):
            self._run("scale", launch, factor)

    def zero_(self, work: WorkList, tensors: Sequence[Tensor | None]) -> None:
        for launch in self._launches(work, tensors, tensors):
            self._run("zero", launch)

    def gather(self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        for launch in self._launches(work, tensors, _pairs(tensors, packed)):
            self._run("copy", launch, gather=True)

    def scatter_(self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        for launch in self._launches(work, tensors, _pairs(tensors, packed)):
            self._run("copy", launch, gather=False)

    def _launches(
        self, work: WorkList, tensors: Sequence[Tensor | None], addressed: Sequence[Tensor | None]
    ) -> Iterator[Launch]:
        """One for each dtype of ``tensors``; their rows are the addresses of ``addressed``."""
        device = _device(tensors)
        if device is not None:
            tiles = Tiles.of(work, device, rows=self._rows)
            rows = self._upload(tiles, device, addresses(addressed)).view(torch.int64)
            for dtype, chosen in tiles.by_dtype(tensors):
                if len(chosen):
                    yield Launch(tiles, chosen, rows, dtype)


def addresses(tensors: Sequence[Tensor | None]) -> bytes:
    """int64 [tensors]; 0 for a missing one."""
    tables = getattr(tensors, "tables", None)  # `grads.reader.Gradients` that the extension read know them
    if tables is not None:
        return ctypes.string_at(tables[0], 8 * len(tensors))
    return np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors], np.int64).tobytes()


def _device(tensors: Sequence[Tensor | None]) -> torch.device | None:
    return next((tensor.device for tensor in tensors if tensor is not None), None)


def _pairs(tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> list[Tensor | None]:
    return [tensor for pair in zip(tensors, packed, strict=True) for tensor in pair]
