"""The operations, and which backend runs them.

Every operation takes a work list and, per tensor of that list, the tensors it works on. Tensors arrive checked:
strided, contiguous, of the list's shapes, dtypes among `STORAGE`, on one device; the reference takes `WIDE` too.
``None`` for a tensor means it is left alone. Backends:

    reference   eager torch, any device: the specification, to be read
    cpu         C++ on CPU tensors (csrc/cpu.cpp), one parallel region per call
    cuda        CUDA on NVIDIA GPUs (csrc/cuda.cu), one launch per pair of dtypes
    triton      the same where there is no CUDA compiler, and on AMD GPUs

The arithmetic is csrc/arithmetic.h and its twins reference.py and triton.py: the same IEEE float32 operations in the
same order, so backends agree bit for bit. Float64 parameters are computed in float64, by the reference alone. A step of
complex ones is given their real views. On a GPU everything runs on torch's current stream and nothing waits for it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from .operands import STORAGE, WIDE, AdamWOperands, NormKind, dtype_word
from .parts import WorkList

#: Their names, which are those of their modules here. ``load`` of each gives it, or raises ImportError with the reason.
BACKENDS: Final = ("reference", "cpu", "cuda", "triton")


class Backend(Protocol):
    """What a backend must do. ``work`` is a live list unless said otherwise."""

    name: str

    def refusal(self, device: torch.device) -> str:
        """Why tensors on ``device`` are not taken; "": they are."""

    def adamw_(
        self, work: WorkList, operands: AdamWOperands, scalars: np.ndarray | Tensor, scalar_set: np.ndarray,
        *, l2: bool, amsgrad: bool, stochastic: bool = False, seed: int = 0, skip: Tensor | None = None,
        multiplier: Tensor | None = None,
    ) -> None:  # fmt: skip
        """One step. ``scalars``: rows of `SCALARS`; ``scalar_set``: int32, the first row of each part of the list, that
        of its first age (`Part.born`). What is of another age of the part (`Part.row_ages`, `Part.ages`) takes a row so
        much further on; of single elements, what depends on age alone.

        Of capturable optimizers ``scalars`` are the rows' words on the tensors' device, int32 [rows, 11]; and where
        ``skip``, one float32 there, is not 0, everything stays as it is. ``multiplier``, one float32 there, multiplies
        each ``grad_multiplier``. Of float64 parameters (all or none) scalars are `SCALARS_DOUBLE`, 21 words a row, and
        ``multiplier`` is float64.

        A parameter with a remainder is a float32 master. Others are rounded to nearest, ties to even, or with
        ``stochastic`` up or down at random: Philox on ``seed``, step, tensor number and element.
        """

    def norm(self, work: WorkList, tensors: Sequence[Tensor | None], kind: NormKind) -> Tensor:
        """Sum of squares, sum or maximum of absolute values, over a live or a frozen list: float64, 0-dim, on their
        device, the same from run to run. Of a complex number it is the modulus."""

    def scale_(self, work: WorkList, tensors: Sequence[Tensor | None], factor: Tensor) -> None:
        """Multiply by ``factor``, one float32 on their device (float64 where they are `WIDE`). Where it is 1 or more,
        everything stays as it is."""

    def zero_(self, work: WorkList, tensors: Sequence[Tensor | None]) -> None:
        """Set to zero what the list visits."""

    def gather(self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        """Copy bytes from tensors to their packed twins."""

    def scatter_(self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        """Copy bytes back from packed twins."""


class _ByDtype:
    """Everything but steps, on tensors of mixed dtypes: `STORAGE` by a fast backend, `WIDE` by the reference."""

    def __init__(self, fast: Backend, reference: Backend) -> None:
        self.name = f"{fast.name} and {reference.name}"
        self._backends = ((fast, STORAGE), (reference, WIDE))

    def _shares(self, tensors: Sequence[Tensor | None]) -> list[tuple[Backend, list[Tensor | None]]]:
        return [
            (backend, [tensor if tensor is not None and tensor.dtype in dtypes else None for tensor in tensors])
            for backend, dtypes in self._backends
        ]

    def refusal(self, device: torch.device) -> str:
        return self._backends[0][0].refusal(device)

    def adamw_(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("steps of float32 and of float64 parameters are separate calls")

    def norm(self, work: WorkList, tensors: Sequence[Tensor | None], kind: NormKind) -> Tensor:
        first, second = (backend.norm(work, share, kind) for backend, share in self._shares(tensors))
        return torch.maximum(first, second) if kind == "largest_absolute" else first + second

    def scale_(self, work: WorkList, tensors: Sequence[Tensor | None], factor: Tensor) -> None:
        (fast, narrow), (reference, wide) = self._shares(tensors)
        fast.scale_(work, narrow, factor.float())
        reference.scale_(work, wide, factor)

    def zero_(self, work: WorkList, tensors: Sequence[Tensor | None]) -> None:
        for backend, share in self._shares(tensors):
            backend.zero_(work, share)

    def gather(self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        for backend, share in self._shares(tensors):
            backend.gather(work, share, packed)

    def scatter_(self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        for backend, share in self._shares(tensors):
            backend.scatter_(work, share, packed)


class BackendUnavailableError(RuntimeError):
    """An explicitly chosen backend does not run here."""


@functools.cache
def backend_state(name: str) -> Backend | str:
    """The backend, or the reason why it does not run here. Imports no other; makes use of no device."""
    try:
        backend: Backend = importlib.import_module(f".{name}", __package__).load()
    except ImportError as error:
        return str(error)
    return backend


def backend_states() -> dict[str, Backend | str]:
    """`backend_state` of every backend."""
    return {name: backend_state(name) for name in BACKENDS}


def choose_backend(name: str, device: torch.device, operation: str, dtypes: Iterable[torch.dtype] = STORAGE) -> Backend:
    """The backend for tensors on ``device``, of ``dtypes``. ``"auto"`` takes the fastest that runs, and the reference
    for `WIDE` ones; a named one never falls back.

    Raises:
        ValueError: there is no such backend, or it takes no tensors on this device or of these dtypes.
        BackendUnavailableError: it does not run here.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(
            f"{operation}: backend is {name!r}, expected one of {', '.join(map(repr, ('auto', *BACKENDS)))}"
        )
    given = set(dtypes)
    wide = sorted(map(dtype_word, given.intersection(WIDE)))
    if device.type == "meta":
        raise ValueError(f"{operation}: tensors are on the meta device and hold no values; materialise the model first")
    if name != "auto":
        chosen = backend_state(name)
        if isinstance(chosen, str):
            raise BackendUnavailableError(f"{operation}: backend {name!r} does not run here: {chosen}")
        if refusal := chosen.refusal(device):
            raise ValueError(f"{operation}: backend {name!r} was given tensors on {device}, but {refusal}")
        if wide and name != "reference":
            raise ValueError(
                f"{operation}: backend {name!r} was given {wide[0]} tensors, but compiled kernels take float32, "
                "bfloat16 and float16; use backend='auto' (the reference then takes those), or convert them"
            )
        return chosen
    chosen, reasons = _fastest(device)
    if chosen.name == "reference":
        _warn_once(f"{operation}: using the slow 'reference' backend on {device.type} tensors: {reasons}")
    elif wide:
        kinds = " and ".join(wide)
        _warn_once(f"{operation}: using the slow 'reference' backend for {kinds}, which no compiled kernel takes")
        return _reference() if len(wide) == len(given) else _ByDtype(chosen, _reference())
    return chosen


@functools.cache
def _fastest(device: torch.device) -> tuple[Backend, str]:
    """The fastest backend that takes tensors on ``device``, and why faster ones do not."""
    reasons: list[str] = []
    for name in ("cpu",) if device.type == "cpu" else ("cuda", "triton"):
        state = backend_state(name)
        reason = state if isinstance(state, str) else state.refusal(device)
        if not isinstance(state, str) and not reason:
            return state, "; ".join(reasons)
        reasons.append(f"{name}: {reason}")
    return _reference(), "; ".join(reasons)


def _reference() -> Backend:
    reference = backend_state("reference")
    assert not isinstance(reference, str)
    return reference


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
