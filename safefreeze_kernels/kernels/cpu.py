"""The CPU backend: hands addresses to the extension. All checks were made before."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from .operands import ADAMW_TENSOR, DTYPE_CODES, NORM_CODES, SCALARS, AdamWOperands, NormKind, host_scalars
from .parts import WorkList
from .runs import CHUNK, RUN, RUN_PART, Runs

try:
    from .. import _C
except ImportError as error:
    message = f"the C++ extension is not built ({error}); install a C++17 compiler and reinstall the package"
    raise ImportError(message) from error

_mirrors = {"RunPart": RUN_PART, "Chunk": CHUNK, "Run": RUN, "AdamWTensor": ADAMW_TENSOR, "Scalars": SCALARS}
if {name: dtype.itemsize for name, dtype in _mirrors.items()} != _C.STRUCT_SIZES:
    raise ImportError("the extension was built from other sources than this package; reinstall safefreeze-kernels")


def _loaded_openmp() -> str | None:
    """Path of the OpenMP runtime torch has loaded: its team is borrowed, so the process keeps one set of threads."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if "omp" in line}
    found = sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp")))
    return next((path for path in found if _C.borrow_openmp(path)), None)


OPENMP: Final = _loaded_openmp()
if "SAFEFREEZE_CPU_ISA" in os.environ:
    _C.choose_isa(os.environ["SAFEFREEZE_CPU_ISA"])


# Plain arrays rather than numpy's: after a backward pass everything is cold, and they take a quarter of the way.
def _addresses(tensors: Sequence[Tensor | None]) -> array[int]:
    try:
        return array("q", map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:  # a missing gradient
        return array("q", [0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def _codes(tensors: Sequence[Tensor | None]) -> array[int]:
    return array("i", [0 if tensor is None else DTYPE_CODES[tensor.dtype] for tensor in tensors])


def _tables(tensors: Sequence[Tensor | None]) -> tuple[int, int, Any]:
    """Addresses of the tensors' tables of addresses and dtypes, and what keeps these alive."""
    known = getattr(tensors, "tables", None)
    if known is not None:
        return (*known, tensors)
    addresses, codes = _addresses(tensors), _codes(tensors)
    return _address(addresses), _address(codes), (addresses, codes)


def _address(values: array[int]) -> int:
    return values.buffer_info()[0]


def _native(work: WorkList) -> _C.Runs:
    """The list as the extension reads it."""
    runs = Runs.of(work)
    native: _C.Runs | None = runs.native
    if native is None:
        native = runs.native = _C.Runs(
            runs.parts.ctypes.data, runs.chunks.ctypes.data, runs.runs.ctypes.data, len(runs.chunks), work.frozen
        )
    return native


class CpuBackend:
    name = "cpu"

    def refusal(self, device: torch.device) -> str:
        return "" if device.type == "cpu" else "it takes CPU tensors only"

    def adamw_(
        self, work: WorkList, operands: AdamWOperands, scalars: np.ndarray | Tensor, scalar_set: np.ndarray,
        *, l2: bool, amsgrad: bool, stochastic: bool = False, seed: int = 0, skip: Tensor | None = None,
        multiplier: Tensor | None = None,
    ) -> None:  # fmt: skip
        if operands.native is None:
            table = operands.table()
            codes = _codes(operands.params), _codes(operands.exp_avgs)
            # the addresses are of what stands behind them in this tuple
            operands.native = table.ctypes.data, _address(codes[0]), _address(codes[1]), table, codes
        if skip is not None and skip.item() != 0:
            return
        scalars = host_scalars(scalars, multiplier)
        grads_at, _, _keep = _tables(operands.grads)
        tensors_at, param_dtype_at, state_dtype_at, *_ = operands.native
        _C.adamw(
            _native(work), tensors_at, grads_at, param_dtype_at, state_dtype_at, scalar_set.ctypes.data,
            scalars.ctypes.data, l2, amsgrad, stochastic, seed, torch.get_num_threads(),
        )  # fmt: skip

    def norm(self, work: WorkList, tensors: Sequence[Tensor | None], kind: NormKind) -> Tensor:
        tensors_at, dtype_at, _keep = _tables(tensors)
        partial = np.zeros(len(Runs.of(work).chunks), np.float64)
        _C.norm(_native(work), tensors_at, dtype_at, NORM_CODES[kind], partial.ctypes.data, torch.get_num_threads())
        result = partial.max(initial=0.0) if kind == "largest_absolute" else partial.sum()
        return torch.tensor(float(result), dtype=torch.float64)

    def scale_(self, work: WorkList, tensors: Sequence[Tensor | None], factor: Tensor) -> None:
        if not (value := factor.item()) >= 1.0:
            tensors_at, dtype_at, _keep = _tables(tensors)
            _C.scale(_native(work), tensors_at, dtype_at, value, torch.get_num_threads())

    def zero_(self, work: WorkList, tensors: Sequence[Tensor | None]) -> None:
        tensors_at, dtype_at, _keep = _tables(tensors)
        _C.zero(_native(work), tensors_at, dtype_at, torch.get_num_threads())

    def gather(self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        _copy(work, tensors, packed, gather=True)

    def scatter_(self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        _copy(work, tensors, packed, gather=False)


def _copy(work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor], *, gather: bool) -> None:
    table, dtypes = np.stack([_addresses(tensors), _addresses(packed)], axis=1), _codes(tensors)
    _C.copy(_native(work), table.ctypes.data, _address(dtypes), gather, torch.get_num_threads())


def load() -> CpuBackend:
    """The backend; importing this module raises ImportError where it cannot run."""
    return CpuBackend()
