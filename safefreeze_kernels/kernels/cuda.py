"""The CUDA backend: csrc/cuda.cu on NVIDIA GPUs. Queued on torch's current stream; nothing is waited for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from .operands import SCALARS, AdamWOperands, NormKind
from .parts import WorkList
from .tiles import TILE, TILE_ELEMENTS, TILE_PART, AdamWTables, DeviceList, addresses, device_of

__all__ = ["CudaBackend", "load", "versions"]

_CODES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NORMS: Final = {"sum_of_squares": 0, "sum_of_absolutes": 1, "largest_absolute": 2}
_ROUNDINGS: Final = {"nearest": 0, "stochastic": 1, "remainder": 2}


class CudaBackend:
    """``native``: `_C.cuda`, or the same kernels compiled for the host (tests/cuda_on_host), which take CPU tensors."""

    name = "cuda"

    def __init__(self, native: Any, device_type: str = "cuda") -> None:
        self._native, self._device_type = native, device_type
        self._refusals: dict[int, str] = {}  # by index of the device
        expected = {"Tile": TILE.itemsize, "TilePart": TILE_PART.itemsize, "Scalars": SCALARS.itemsize}
        if native.TILE_ELEMENTS != TILE_ELEMENTS or not expected.items() <= native.STRUCT_SIZES.items():
            raise ImportError("the extension was built from other sources than this package; reinstall it")

    def refusal(self, device: torch.device) -> str:
        """Why tensors on ``device`` are not taken; "": they are."""
        if device.type != self._device_type:
            return f"it takes {self._device_type} tensors only"
        if device.type != "cuda":
            return ""
        index = device.index or 0
        if index not in self._refusals:
            reason = self._native.refusal(index)
            on = f"the kernels of this build do not run on {torch.cuda.get_device_name(index)}"
            self._refusals[index] = f"{on}: {reason}" if reason else ""
        return self._refusals[index]

    def adamw_(
        self, work: WorkList, operands: AdamWOperands, scalars: np.ndarray | Tensor, scalar_set: np.ndarray,
        *, l2: bool, amsgrad: bool, stochastic: bool = False, seed: int = 0, skip: Tensor | None = None,
        multiplier: Tensor | None = None,
    ) -> None:  # fmt: skip
        if not work.parts:
            return
        tables: AdamWTables = AdamWTables.of(work, operands)
        # What travels at every step: gradient addresses, and rows of scalars with which part takes which.
        on_host = isinstance(scalars, np.ndarray)
        there, grads, sets, words = self._upload(
            operands.params[0].device,
            addresses(operands.grads),
            np.ascontiguousarray(scalar_set, np.int32).tobytes(),
            scalars.tobytes() if isinstance(scalars, np.ndarray) else b"",
        )
        words = words if on_host else scalars.data_ptr()  # type: ignore[union-attr]
        for kind in tables.launches:
            self._native.adamw(
                self._launch(work, tables.list, kind.tiles), tables.tensors.data_ptr(), grads, sets, words,
                0 if skip is None else skip.data_ptr(), 0 if multiplier is None else multiplier.data_ptr(),
                _CODES[kind.param], _CODES[kind.state], _ROUNDINGS[kind.rounding(stochastic)], l2, amsgrad, seed,
            )  # fmt: skip
        del there

    def norm(self, work: WorkList, tensors: Sequence[Tensor | None], kind: NormKind) -> Tensor:
        device = device_of(tensors)
        result = torch.zeros((), dtype=torch.float64, device=device)
        launches = list(self._launches(work, tensors, tensors))
        if not launches:
            return result
        counts = [self._native.norm_blocks(n_tiles) for _, _, n_tiles, _ in launches]
        partial = torch.empty(sum(counts), dtype=torch.float64, device=device)
        done = 0
        for (launch, dtype, _, table), count in zip(launches, counts, strict=True):
            self._native.norm(launch, table.data_ptr(), dtype, _NORMS[kind], partial[done:].data_ptr())
            done += count
        self._native.total(*_queue(result.device), partial.data_ptr(), done, _NORMS[kind], result.data_ptr())
        return result

    def scale_(self, work: WorkList, tensors: Sequence[Tensor | None], factor: Tensor) -> None:
        for launch, dtype, _, table in self._launches(work, tensors, tensors):
            self._native.scale(launch, table.data_ptr(), dtype, factor.data_ptr())

    def zero_(self, work: WorkList, tensors: Sequence[Tensor | None]) -> None:
        for launch, dtype, _, table in self._launches(work, tensors, tensors):
            self._native.zero(launch, table.data_ptr(), dtype)

    def gather(self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        self._copy(work, tensors, packed, gather=True)

    def scatter_(self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        self._copy(work, tensors, packed, gather=False)

    def _copy(
        self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor], *, gather: bool
    ) -> None:
        pairs = [tensor for pair in zip(tensors, packed, strict=True) for tensor in pair]
        for launch, dtype, _, table in self._launches(work, tensors, pairs):
            self._native.copy(launch, table.data_ptr(), dtype, gather)

    def _launches(
        self, work: WorkList, tensors: Sequence[Tensor | None], addressed: Sequence[Tensor | None]
    ) -> Iterator[tuple[Any, int, int, Tensor]]:
        """Per dtype of ``tensors``: the launch, the dtype's code, how many tiles, the addresses of ``addressed``."""
        device = device_of(tensors)
        if device is None:
            return
        on_device = DeviceList.of(work, device)
        table, _ = self._upload(device, addresses(addressed))
        for dtype, tiles in on_device.by_dtype(tensors):
            if len(tiles):
                yield self._launch(work, on_device, tiles), _CODES[dtype], len(tiles), table

    def _launch(self, work: WorkList, on_device: DeviceList, tiles: Tensor) -> Any:
        return self._native.Launch(
            *_queue(tiles.device), tiles.data_ptr(), len(tiles), on_device.parts.data_ptr(), work.frozen
        )

    def _upload(self, device: torch.device, *contents: bytes) -> tuple[Any, ...]:
        """A tensor on the device that holds ``contents``, and the address of each. It must live until its last launch:
        memory freed after that is not used for anything else before the launch ends."""
        sizes = [-(-len(content) // 8) * 8 for content in contents]
        there = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        whole = b"".join(content.ljust(size, b"\0") for content, size in zip(contents, sizes, strict=True))
        self._native.upload(*_queue(device), whole, there.data_ptr())
        starts = there.data_ptr() + np.cumsum([0, *sizes[:-1]])
        return (there, *starts.tolist())


def _queue(device: torch.device) -> tuple[int, int]:
    """Index of the device, and torch's current stream on it."""
    if device.type != "cuda":
        return 0, 0
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def load() -> CudaBackend:
    """The backend of this build. Makes use of no device, so that forking stays possible.

    Raises:
        ImportError: it cannot run here, and why.
    """
    native = _native()
    driver, build = native.driver_version(), native.runtime_version()
    if driver == 0:
        raise ImportError("no NVIDIA driver was found")
    # Versions of one major number understand each other's binaries.
    if driver // 1000 < build // 1000:
        raise ImportError(
            f"the NVIDIA driver is for CUDA {_version(driver)}, older than this build's {_version(build)}; update the "
            "driver, or build the package with an older CUDA toolkit"
        )
    return CudaBackend(native)


def versions() -> tuple[str, str]:
    """The CUDA version this was built with, and the newest the driver knows ("none" without a driver).

    Raises:
        ImportError: this build has no CUDA part.
    """
    native = _native()
    driver = native.driver_version()
    return _version(native.runtime_version()), _version(driver) if driver else "none"


def _native() -> Any:
    try:
        from .. import _C

        return _C.cuda
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "this build has no CUDA part; install the CUDA toolkit (nvcc) and reinstall with SAFEFREEZE_CUDA=1"
        ) from error


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
