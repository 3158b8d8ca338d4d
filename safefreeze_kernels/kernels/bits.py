"""What is kept of single elements, moved as their frozen bits change: in C++, or in numpy where that is not built."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import numpy as np
import torch

from ..plan.mask import unpack_bits

_C: Any = None
with contextlib.suppress(ImportError):
    from .. import _C

WAS: Final = 1  # bits of what becomes of a line or an element: it was frozen,
NOW: Final = 2  # and it is now
_ROOM: Final = 64  # elements beyond the last that kernels may read


def roomy(size: int, dtype: Any) -> np.ndarray:
    """A new array [size] that kernels may read past its end."""
    return np.empty(size + _ROOM, dtype)[:size]


def with_room(array: np.ndarray) -> np.ndarray:
    """A copy that kernels may read past its end."""
    return np.concatenate([array, np.zeros(_ROOM, array.dtype)])[: array.size]


def has_room(array: np.ndarray) -> bool:
    """Whether kernels may read past its end."""
    owner = array.base
    if not isinstance(owner, np.ndarray) or not array.flags.c_contiguous:
        return False
    end, owned = (some.ctypes.data + some.nbytes for some in (array, owner))
    return bool(owned - end >= _ROOM * array.itemsize)


def narrowest(n_numbers: int) -> Any:
    """The dtype that tells so many numbers apart: uint8, uint16 or uint32."""
    return np.min_scalar_type(max(n_numbers - 1, 0))


def repack(
    source: np.ndarray, old_bits: np.ndarray | None, target: np.ndarray, new_bits: np.ndarray, numel: int
) -> None:
    """What ``source`` holds of the elements whose bit is clear in ``old_bits`` (None: of all ``numel``), moved to
    ``target``, which holds those whose bit is clear in ``new_bits``; what is in both is kept, the rest is 0. Vectors of
    one dtype of 1, 2 or 4 bytes."""
    if old_bits is None:
        old_bits = np.zeros_like(new_bits)
    if _C is None:
        was, now = (~unpack_bits(bits, (numel,)) for bits in (old_bits, new_bits))
        held = np.zeros(numel, source.dtype)
        held[was] = source
        target[:] = held[now]
        return
    at = (array.ctypes.data for array in (source, target))
    _C.repack(old_bits.ctypes.data, new_bits.ctypes.data, numel, *at, source.itemsize, torch.get_num_threads())


def turn(
    numbers: np.ndarray | None, old_bits: np.ndarray, new_bits: np.ndarray, numel: int, becomes: np.ndarray, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of the ``numbers`` of elements as ``new_bits`` replace ``old_bits``.

    Args:
        numbers: unsigned [numel]; None: all are 0.
        becomes: uint32 [4, n]: of an element whose bits were `WAS` and are `NOW`, what its number becomes.
        dtype: of what is returned.

    Returns: the new numbers [numel], which kernels may read past their end, and which entries of ``becomes`` some
    element had: bool [4, n].
    """
    turned, seen = roomy(numel, dtype), np.zeros(becomes.shape, bool)
    if _C is None:
        was, now = (unpack_bits(bits, (numel,)) for bits in (old_bits, new_bits))
        entry = was * WAS + now * NOW, 0 if numbers is None else numbers
        turned[:], seen[entry] = becomes[entry], True
        return turned, seen
    width, at = (1, 0) if numbers is None else (numbers.itemsize, numbers.ctypes.data)
    _C.turn(
        old_bits.ctypes.data, new_bits.ctypes.data, numel, at, turned.ctypes.data, width, turned.itemsize,
        becomes.ctypes.data, seen.ctypes.data, becomes.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return turned, seen
