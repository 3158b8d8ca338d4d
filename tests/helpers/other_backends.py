"""Backends for GPUs, made to take the CPU tensors of this suite's tests. ``SAFEFREEZE_TEST_BACKEND`` names one:

cuda-on-host   the CUDA kernels, compiled for the host
cuda-ptx       the CUDA kernels as nvcc emits them, interpreted
triton         the Triton kernels, interpreted (with TRITON_INTERPRET=1) or on a GPU
cuda           the CUDA kernels on a GPU
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safefreeze_kernels.kernels.backend import Backend, backend_state
from safefreeze_kernels.kernels.operands import AdamWOperands
from safefreeze_kernels.kernels.parts import WorkList


def other_backend(name: str) -> Backend:
    """The named backend; raises RuntimeError, with the reason, where it does not run."""
    if name == "cuda-on-host":
        from cuda_on_host import build

        from safefreeze_kernels.kernels.cuda import CudaBackend

        return CudaBackend(build(), "cpu")
    if name == "cuda-ptx":
        from ptx_backends import PtxCuda, cuda_ptx

        return PtxCuda(cuda_ptx())
    state = backend_state(name)
    if isinstance(state, str):
        raise RuntimeError(f"SAFEFREEZE_TEST_BACKEND={name}: {state}")
    return state if not state.refusal(torch.device("cpu")) else OnDevice(state, torch.device("cuda", 0))


TESTS = Path(__file__).parents[1]
# What of the suite takes a backend by name, beside the contract.
SUITE = (
    "kernels/test_kernels.py", "kernels/test_capturable.py",
    *(f"contract/test_{name}.py" for name in ("gradients", "fused_clipping", "guard", "low_precision")),
)  # fmt: skip


def run_suite(*names: str, least: int, **environment: str) -> None:
    """Test files in a process of its own, with ``environment``: ``least`` tests or more must pass, and none fail."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-W", "ignore",
         *(str(TESTS / name) for name in names)],
        env={**os.environ, **environment}, capture_output=True, text=True, cwd=TESTS.parent, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= least, f"expected {least} to pass:\n{done.stdout[-2000:]}"


class OnDevice:
    """Runs a backend on copies of CPU tensors on ``device``."""

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self.name, self._backend, self._device = backend.name, backend, device

    def refusal(self, device: torch.device) -> str:
        return "" if device.type == "cpu" else "this test's adapter takes CPU tensors only"

    def _there(self, tensors: Sequence[Tensor | None] | None) -> list[Tensor | None]:
        return [None if t is None else t.detach().to(self._device) for t in tensors or ()]

    def _map(self, run: Callable[..., Any], *columns: Sequence[Tensor | None]) -> Any:
        """``run`` with copies of the columns of tensors, copied back."""
        copies = [self._there(column) for column in columns]
        result = run(*copies)
        for column, copied in zip(columns, copies, strict=True):
            for tensor, copy in zip(column, copied, strict=True):
                if tensor is not None and copy is not None:
                    tensor.detach().copy_(copy)
        return result.cpu() if isinstance(result, Tensor) else result

    def adamw_(
        self, work: WorkList, operands: AdamWOperands, scalars: np.ndarray | Tensor, scalar_set: np.ndarray,
        *, skip: Tensor | None = None, multiplier: Tensor | None = None, **flags: Any,
    ) -> None:  # fmt: skip
        def step(p: Any, m: Any, v: Any, x: Any, r: Any) -> None:
            grads = self._there(operands.grads)
            there = AdamWOperands(p, m, v, x or None, r or None, operands.numbers, grads)
            (skipped, multiplied) = self._there([skip, multiplier])
            self._backend.adamw_(
                work, there, scalars.to(self._device) if isinstance(scalars, Tensor) else scalars, scalar_set,
                skip=skipped, multiplier=multiplied, **flags,
            )  # fmt: skip

        self._map(
            step, operands.params, operands.exp_avgs, operands.exp_avg_sqs, operands.max_exp_avg_sqs or [],
            operands.remainders or [],
        )  # fmt: skip

    def norm(self, work: WorkList, tensors: Sequence[Tensor | None], kind: Any) -> Tensor:
        result: Tensor = self._map(lambda there: self._backend.norm(work, there, kind), tensors)
        return result

    def scale_(self, work: WorkList, tensors: Sequence[Tensor | None], factor: Tensor) -> None:
        self._map(lambda there: self._backend.scale_(work, there, factor.to(self._device)), tensors)

    def zero_(self, work: WorkList, tensors: Sequence[Tensor | None]) -> None:
        self._map(lambda there: self._backend.zero_(work, there), tensors)

    def gather(self, work: WorkList, tensors: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
        self._map(lambda there, twins: self._backend.gather(work, there, twins), tensors, packed)

    def scatter_(self, work: WorkList, tensors: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
        self._map(lambda there, twins: self._backend.scatter_(work, there, twins), tensors, packed)
