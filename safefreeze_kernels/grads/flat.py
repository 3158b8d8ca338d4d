"""Gradients of flat partitions: read as those of their pieces, and rid of what is frozen before an engine sees it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.backend import choose_backend
from ..kernels.operands import DTYPE_CODES, STORAGE
from ..kernels.parts import WorkList, compile_frozen
from ..model.flat import Piece, in_engine
from ..model.packed import packing
from ..plan.mask import FreezeMask
from .checks import check_gradient


class FlatGradients(Sequence[Tensor | None]):
    """The gradient of each piece, as a kernel takes them (`reader.Gradients`): by the addresses in ``tables``. Tensors
    are made for whoever asks for one."""

    plain, own = True, False

    def __init__(self, flats: Sequence[Tensor], pieces: Sequence[tuple[int, Piece]], tables: tuple[int, int]) -> None:
        self._flats, self._pieces, self.tables = flats, pieces, tables

    @property
    def tensors(self) -> list[Tensor | None]:
        return [*self]

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Tensor]:
        return (piece.of(self._flats[number]) for number, piece in self._pieces)

    def __getitem__(self, index: Any) -> Any:
        number, piece = self._pieces[index]
        return piece.of(self._flats[number])


class FlatReader:
    """Reads and checks the gradients of flat tensors, for pieces of them; what it has of `reader.GradientReader` does
    the same.

    Args:
        flats: the flat tensors.
        pieces: for each piece, the number of its flat tensor, and where in it it lies.
    """

    def __init__(self, flats: Sequence[Tensor], pieces: Sequence[tuple[int, Piece]]) -> None:
        self._flats, self._pieces = list(flats), list(pieces)
        self.packed = [False] * len(self._pieces)
        self._number = np.array([number for number, _ in pieces], np.int64)
        self._offset = np.array([piece.offset for _, piece in pieces], np.int64)
        self._addresses, self._codes = np.zeros(len(pieces), np.int64), np.zeros(len(pieces), np.int32)

    def packed_as_before(self, _: Sequence[Tensor]) -> bool:
        return True

    def read(self, _: Sequence[Tensor], operation: str) -> Any:
        """The gradients, all of one dtype and device as their flat tensors are.

        Raises:
            ValueError, RuntimeError: as `check_gradient`, naming ``operation``.
        """
        grads = [flat.grad for flat in self._flats]
        for flat, grad in zip(self._flats, grads, strict=True):
            if grad is not None:
                check_gradient(flat, grad, "a flat partition", operation, (flat.dtype,))
        found = [grad for grad in grads if grad is not None and grad.is_contiguous() and grad.dtype in STORAGE]
        if len(found) < len(grads):
            whole = [None if grad is None else grad.contiguous() for grad in grads]
            return _Some([None if (g := whole[number]) is None else piece.of(g) for number, piece in self._pieces])
        begins = np.array([grad.data_ptr() for grad in found], np.int64)
        sizes = np.array([grad.element_size() for grad in found], np.int64)
        self._addresses[:] = begins[self._number] + self._offset * sizes[self._number]
        self._codes[:] = np.array([DTYPE_CODES[grad.dtype] for grad in found], np.int32)[self._number]
        return FlatGradients(found, self._pieces, (self._addresses.ctypes.data, self._codes.ctypes.data))


class _Some(list[Tensor | None]):
    """Gradients some of which are missing, or of a dtype that compiled kernels do not take."""

    plain = own = False

    @property
    def tensors(self) -> list[Tensor | None]:
        return self


class ZeroedEarly:
    """Zeroes frozen gradients as soon as a backward pass leaves them, of parameters whose gradients an engine takes
    away: its norm, its clipping and its look for inf and NaN then see what is live, whatever the engine is.

    Args:
        named: the parameters.
        masks: what is frozen, by name.
        operation: for whom.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], masks: Mapping[str, FreezeMask], operation: str) -> None:
        self._operation = operation
        self._work: dict[str, WorkList] = {}
        self.freeze(masks)
        for name, p in named:
            if p.requires_grad:
                hook = functools.partial(_call, weakref.WeakMethod(self._zero), name)
                p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def freeze(self, masks: Mapping[str, FreezeMask]) -> None:
        """Zero what ``masks``, by name, freeze from now on."""
        self._masks = {name: mask for name, mask in masks.items() if mask.frozen_count}
        self._work.clear()

    @torch.no_grad()
    def _zero(self, name: str, p: Tensor) -> None:
        mask, grad = self._masks.get(name), p.grad
        if mask is None or grad is None or not in_engine(p) or packing(grad) is not None:
            return
        if name not in self._work:
            self._work[name] = compile_frozen([mask])
        backend = choose_backend("auto", grad.device, self._operation, (grad.dtype,))
        if grad.is_contiguous():
            backend.zero_(self._work[name], [grad])
        else:
            dense = grad.contiguous()
            backend.zero_(self._work[name], [dense])
            grad.copy_(dense)
        torch.autograd.graph.increment_version(grad)


def _call(method: Any, name: str, p: Tensor) -> None:
    if (found := method()) is not None:
        found(name, p)
