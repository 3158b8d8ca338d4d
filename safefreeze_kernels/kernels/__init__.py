"""The operations, and which backend runs them.

Every operation takes a work list and, per tensor of that list, the tensors it works on. Tensors arrive checked:
strided, contiguous, of the list's shapes, dtypes among `STORAGE`, on one device. ``None`` for a gradient means the
tensor is left alone. Backends:

    reference   eager torch, any device: the specification, to be read
    cpu         C++ on CPU tensors (csrc/cpu.cpp), one parallel region per call

The arithmetic is csrc/arithmetic.h and its twin reference.py: the same IEEE float32 operations in the same order, so
backends agree bit for bit.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .tensors import GradientList
from .worklist import Ages, Part, WorkList, compile_frozen, compile_live

__all__ = [
    "SCALARS", "STORAGE", "AdamWOperands", "Ages", "Backend", "BackendUnavailableError", "NormKind", "Part", "WorkList",
    "adamw_scalars", "backend_states", "choose_backend", "compile_frozen", "compile_live",
]  # fmt: skip

STORAGE: Final = (torch.float32, torch.bfloat16, torch.float16)
NormKind = Literal["sum_of_squares", "sum_of_absolutes", "largest_absolute"]

# Mirror of struct Scalars in csrc/arithmetic.h.
SCALARS: Final = np.dtype([
    (name, "f4")
    for name in ("grad_multiplier", "weight_decay", "decay", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2",
                 "step_size", "bias2_sqrt", "eps")
] + [("step", "u4")])  # fmt: skip


def adamw_scalars(
    *,
    lr: Any,
    betas: tuple[Any, Any],
    eps: float,
    weight_decay: float,
    step: Any,
    decoupled: bool,
    maximize: bool = False,
    grad_multiplier: Any = 1.0,
) -> tuple[Any, ...]:
    """A row of `SCALARS`: each hyper-parameter, in double, finished. Rounded to float32 once, when stored.

    ``step`` and what goes with it may be float64 tensors.

    Source of the formulas: Kingma & Ba 2015, algorithm 1 (bias correction folded into ``step_size`` and
    ``bias2_sqrt``); Loshchilov & Hutter 2019, algorithm 2 (``decay``).
    """
    beta1, beta2 = betas
    return (
        -grad_multiplier if maximize else grad_multiplier,
        weight_decay,
        1.0 - lr * weight_decay if decoupled else 1.0,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        lr / (1.0 - beta1**step),
        (1.0 - beta2**step) ** 0.5 if isinstance(step, Tensor) else math.sqrt(1.0 - beta2**step),
        eps,
        step,
    )


@dataclass
class AdamWOperands:
    """Tensors of a masked AdamW step, one entry per tensor of the work list; state is packed."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor] | None = None
    remainders: list[Tensor | None] | None = None  # int16, packed as state is: what bf16 parameters lack of fp32
    numbers: Sequence[int] = ()  # tell tensors apart in the noise of stochastic rounding; () = their places here
    grads: GradientList = field(default_factory=GradientList)
    native: Any = None  # address and dtype tables, kept by the native backend


def host_scalars(scalars: np.ndarray | Tensor) -> np.ndarray:
    """Rows of `SCALARS`, for a backend that runs on the host."""
    return scalars if isinstance(scalars, np.ndarray) else scalars.cpu().numpy().view(SCALARS).reshape(-1)


class Backend(Protocol):
    """What a backend must do. ``work`` is a live list unless said otherwise."""

    name: str

    def adamw_(
        self, work: WorkList, operands: AdamWOperands, scalars: np.ndarray | Tensor, scalar_set: np.ndarray,
        *, l2: bool, amsgrad: bool, stochastic: bool = False, seed: int = 0, skip: Tensor | None = None,
    ) -> None:  # fmt: skip
        """One step. ``scalars``: rows of `SCALARS`; ``scalar_set``: int32, the row each part of the list uses.

        Of capturable optimizers ``scalars`` are the rows' words on the tensors' device, int32 [rows, 11]; and where
        ``skip``, one float32 there, is not 0, everything stays as it is.

        A parameter with a remainder is a float32 master. Others are rounded to nearest, ties to even, or with
        ``stochastic`` up or down at random: Philox on ``seed``, step, tensor number and element.
        """

    def norm(self, work: WorkList, tensors: Sequence[Tensor | None], kind: NormKind) -> float:
        """Sum of squares, sum or maximum of absolute values, over a live or a frozen list, in double."""

    def scale_(self, work: WorkList, tensors: Sequence[Tensor | None], factor: float) -> None:
        """Multiply by ``factor``, rounded to float32."""

    def zero_(self, work: WorkList, tensors: Sequence[Tensor | None]) -> None:
        """Set to zero what the list visits."""

    def gather(self, work: WorkList, tensors: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
        """Copy bytes from tensors to their packed twins."""

    def scatter_(self, work: WorkList, tensors: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
        """Copy bytes back from packed twins."""


class BackendUnavailableError(RuntimeError):
    """An explicitly chosen backend does not run here."""


@functools.cache
def backend_states() -> dict[str, Backend | str]:
    """Every backend: the object that runs it, or the reason why it does not run here."""
    from . import reference

    states: dict[str, Backend | str] = {"reference": reference.ReferenceBackend()}
    try:
        from . import native

        states["cpu"] = native.CpuBackend()
    except ImportError as error:
        states["cpu"] = f"the C++ extension is not built ({error}); install a C++17 compiler and reinstall the package"
    for name in ("triton", "cuda"):
        states[name] = "not part of this version"
    return states


def choose_backend(name: str, device: torch.device, operation: str) -> Backend:
    """The backend for tensors on ``device``. ``"auto"`` takes the fastest that runs; a named one never falls back."""
    states = backend_states()
    if name not in ("auto", *states):
        raise ValueError(f"{operation}: backend is {name!r}, expected one of {', '.join(map(repr, ('auto', *states)))}")
    if device.type == "meta":
        raise ValueError(f"{operation}: tensors are on the meta device and hold no values; materialise the model first")
    if name == "auto":
        compiled = states["cpu"] if device.type == "cpu" else "no compiled backend for this device in this version"
        if isinstance(compiled, str):
            _warn_once(f"{operation}: using the slow 'reference' backend on {device.type} tensors: {compiled}")
        chosen = states["reference"] if isinstance(compiled, str) else compiled
    else:
        chosen = states[name]
    if isinstance(chosen, str):
        raise BackendUnavailableError(f"{operation}: backend {name!r} does not run here: {chosen}")
    if chosen.name == "cpu" and device.type != "cpu":
        raise ValueError(f"{operation}: backend 'cpu' was given tensors on {device}, expected CPU tensors")
    return chosen


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
