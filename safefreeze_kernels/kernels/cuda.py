"""The CUDA backend: csrc/cuda.cu on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .gpu import GpuBackend, Launch
from .operands import DTYPE_CODES, NORM_CODES, SCALARS, NormKind
from .tiles import TILE, TILE_ELEMENTS, TILE_PART

__all__ = ["CudaBackend", "load", "versions"]

_LARGE_LAUNCHES: Final = 12010  # from this version on builds use them (`upload` in csrc/cuda.cu)
_ROUNDINGS: Final = {"nearest": 0, "stochastic": 1, "remainder": 2}


class CudaBackend(GpuBackend):
    """``native``: `_C.cuda`, or the same kernels compiled for the host (tests/helpers/cuda_on_host), on CPU tensors."""

    name = "cuda"
    _rows = True

    def __init__(self, native: Any, device_type: str = "cuda") -> None:
        self._native, self._device_type = native, device_type
        self._refusals: dict[int, str] = {}  # by index of the device
        expected = {"Tile": TILE.itemsize, "TilePart": TILE_PART.itemsize, "Scalars": SCALARS.itemsize}
        if native.TILE_ELEMENTS != TILE_ELEMENTS or not expected.items() <= native.STRUCT_SIZES.items():
            raise ImportError("the extension was built from other sources than this package; reinstall it")

    def refusal(self, device: torch.device) -> str:
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

    def _upload(self, owner: object, device: torch.device, content: bytes) -> Tensor:
        there = torch.empty(-(-len(content) // 8) * 8, dtype=torch.uint8, device=device)  # whole words are written
        self._native.upload(*_queue(device), content, there.data_ptr())
        return there[: len(content)]

    def _step(
        self, launch: Launch, tables: Sequence[Tensor | None], seed: int, seed_there: Tensor, *,
        rounding: str, l2: bool, amsgrad: bool,
    ) -> None:  # fmt: skip
        at = [0 if table is None else table.data_ptr() for table in (launch.rows, *tables)]
        codes = DTYPE_CODES[launch.dtype], DTYPE_CODES[launch.state], _ROUNDINGS[rounding]  # type: ignore[index]
        self._native.adamw(self._queued(launch), *at, *codes, l2, amsgrad, seed)

    def _run(self, operation: str, launch: Launch, *tensors: Tensor, **options: Any) -> None:
        words = (NORM_CODES[value] if name == "kind" else value for name, value in options.items())
        at = (tensor.data_ptr() for tensor in tensors)
        call = getattr(self._native, operation)
        call(self._queued(launch), launch.rows.data_ptr(), DTYPE_CODES[launch.dtype], *words, *at)

    def _partial_norms(self, n_tiles: int) -> int:
        count: int = self._native.norm_blocks(n_tiles)
        return count

    def _total(self, partial: Tensor, kind: NormKind) -> Tensor:
        result = torch.zeros((), dtype=torch.float64, device=partial.device)
        at, to = partial.data_ptr(), result.data_ptr()
        self._native.total(*_queue(partial.device), at, len(partial), NORM_CODES[kind], to)
        return result

    def _queued(self, launch: Launch) -> Any:
        work, tiles = launch.work, launch.tiles
        at = tiles.data_ptr(), len(tiles), work.parts.data_ptr()
        return self._native.Launch(*_queue(tiles.device), *at, work.frozen)


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
    # Versions of one major number understand each other's binaries; 12.0 knows no launch parameters of 32 KB.
    if driver // 1000 < build // 1000 or driver < _LARGE_LAUNCHES <= build:
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
