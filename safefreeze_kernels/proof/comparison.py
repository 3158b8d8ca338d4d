"""Tensors of two checkpoints compared under a mask, window by window, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from ..plan.mask import FreezeMask
from .checkpoint import DTYPES, Files, Stored, Window, windows
from .report import TensorChanges

try:
    from .. import _C
except ImportError:
    _C = None  # type: ignore[assignment]

#: Called with how many bytes of the checkpoints were gone through since the last call.
Progress: TypeAlias = Callable[[int], object]

#: What is frozen in a window: uint8 per row and per column, and the bits of the elements. None: no column, no element.
Flags: TypeAlias = "tuple[np.ndarray, np.ndarray | None, np.ndarray | None]"

#: Frozen elements that differ, the first of them (-1: none), live ones that differ, those of them whose change is no
#: finite number; the largest |after - before| of the others, their sum, and that of their squares.
Counts: TypeAlias = tuple[int, int, int, int, float, float, float]

_FLOATS: Final[dict[str, Callable[[np.ndarray], np.ndarray]]] = {  # bits -> float32
    "F32": lambda bits: bits.view(np.float32),
    "F16": lambda bits: bits.view(np.float16).astype(np.float32),
    "BF16": lambda bits: (bits.astype(np.uint32) << 16).view(np.float32),
}


class MaskedMatrix:
    """A mask over a tensor as the comparison takes it: a matrix in windows, and what is frozen in each of them.

    The entries of a vector are columns of one row here, so that nothing is held for more than a window at a time.
    """

    def __init__(self, mask: FreezeMask, width: int) -> None:
        self.width, self.bits = width, mask.bits
        self.rows, self.cols = mask.matrix_shape
        self._frozen = mask.frozen_rows, mask.frozen_cols
        if self.cols == 1:
            self.rows, self.cols, self._frozen = 1, self.rows, self._frozen[::-1]

    def windows(self) -> Iterator[Window]:
        return windows(self.rows, self.cols, self.width)

    def flags(self, window: Window) -> Flags:
        rows, cols = self._frozen
        return (
            _flags(rows, window.row, window.rows),
            _flags(cols, window.col, window.cols) if cols.size else None,
            self._bits(window.first, window.rows * window.cols) if self.bits is not None else None,
        )

    def _bits(self, first: int, count: int) -> np.ndarray:
        """Bits of ``count`` elements, beginning with a byte, 8 bytes of 0 behind them."""
        assert self.bits is not None
        chosen = _unpacked(self.bits[first // 8 : (first + count + 7) // 8], first % 8 + count)[first % 8 :]
        return np.concatenate([np.packbits(chosen, bitorder="little"), np.zeros(8, np.uint8)])

    @property
    def parts(self) -> list[str]:
        """What frozen bytes consist of, in the order in which `proof.snapshot` holds them."""
        there = *(index.size for index in self._frozen), self.bits is not None
        return [part for part, found in zip(("rows", "cols", "elements"), there, strict=True) if found]

    def frozen(self, part: str, window: Window, block: np.ndarray) -> bytes:
        """The frozen bytes of one part: whole rows, columns of the other rows, or single elements."""
        rows, cols, bits = self.flags(window)
        matrix: np.ndarray = block.view(f"<u{self.width}")
        if part == "rows":
            return bytes(matrix[rows != 0])
        if part == "cols":
            assert cols is not None
            return bytes(matrix[rows == 0][:, cols != 0])
        assert bits is not None
        return bytes(matrix.reshape(-1)[_unpacked(bits, matrix.size)])


def _flags(index: np.ndarray, start: int, count: int) -> np.ndarray:
    """uint8: which of ``count`` places from ``start`` on are in an ascending index."""
    low, high = np.searchsorted(index, (start, start + count))
    flags = np.zeros(count, np.uint8)
    flags[index[low:high] - start] = 1
    return flags


def _unpacked(bits: np.ndarray, count: int) -> np.ndarray:
    return np.unpackbits(bits, count=count, bitorder="little").view(bool)


def compare_in_numpy(dtype: str, before: np.ndarray, after: np.ndarray, flags: Flags) -> Counts:
    """Twin of ``compare`` in csrc/audit.cpp, for where there is no extension. Blocks are uint8 [rows, bytes]."""
    rows, cols, bits = flags
    old, new = (block.view(f"<u{DTYPES[dtype][0]}") for block in (before, after))
    frozen = np.broadcast_to(rows[:, None] != 0, old.shape).copy()
    if cols is not None:
        frozen |= cols != 0
    if bits is not None:
        frozen |= _unpacked(bits, old.size).reshape(old.shape)
    differs = old != new
    drifted, moved = differs & frozen, differs & ~frozen
    first, live = int(drifted.argmax()) if drifted.any() else -1, int(moved.sum())
    if dtype not in _FLOATS:
        return int(drifted.sum()), first, live, live, 0.0, 0.0, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(_FLOATS[dtype](new[moved]) - _FLOATS[dtype](old[moved]))
    finite = apart[np.isfinite(apart)].astype(np.float64)
    sizes = float(finite.max(initial=0.0)), float(finite.sum()), float((finite**2).sum())
    return int(drifted.sum()), first, live, live - finite.size, *sizes


def compare_in_cpp(dtype: str, before: np.ndarray, after: np.ndarray, flags: Flags) -> Counts:
    width, value, _ = DTYPES[dtype]
    addresses = (0 if each is None else each.ctypes.data for each in flags)
    n_rows, n_cols = before.shape[0], before.shape[1] // width
    return _C.compare(before.ctypes.data, after.ctypes.data, n_rows, n_cols, value, *addresses)


compare_blocks: Final = compare_in_numpy if _C is None else compare_in_cpp


class Pair(NamedTuple):
    """A tensor of the base and one of the tuned checkpoint that should have the same frozen bytes."""

    name: str
    base: Stored
    tuned: Stored
    mask: FreezeMask


def blocks(files: Files, stored: Stored, matrix: MaskedMatrix, digest: Any = None) -> Iterator[tuple[Window, Any]]:
    """A tensor, window by window, each with its bytes (uint8 [rows, bytes]); its frozen bytes go into ``digest``.

    Where a mask has more than one part, the tensor is read once more for each further one: the digest wants them one
    behind the other.
    """
    parts = matrix.parts if digest is not None else []
    for turn, part in enumerate(parts or [""]):
        for window, block in zip(matrix.windows(), files.read(stored, matrix.windows()), strict=True):
            if part:
                digest.update(matrix.frozen(part, window, block))
            if turn == 0:
                yield window, block


def changes(
    pair: Pair, before: Files, after: Files, progress: Progress | None = None, digest: Any = None
) -> TensorChanges:
    """Compare one tensor, block by block; ``digest`` takes the frozen bytes of the tuned one."""
    name, base, tuned, mask = pair
    tell = progress or (lambda _: None)
    found = TensorChanges(name, base.shape, base.dtype, mask.frozen_count, mask.live_count)
    if base.dtype != tuned.dtype:
        found.dtype = f"{base.dtype} -> {tuned.dtype}"
        found.trouble = f"dtype changed from {base.dtype} to {tuned.dtype}; bytes cannot be compared across dtypes"
        tell(base.nbytes + tuned.nbytes)
        return found
    matrix, total, squares = MaskedMatrix(mask, base.width), 0.0, 0.0
    both = blocks(before, base, matrix), blocks(after, tuned, matrix, digest)
    for (window, old), (_, new) in zip(*both, strict=True):
        frozen, first, live, strange, largest, added, squared = compare_blocks(
            base.dtype, old, new, matrix.flags(window)
        )
        if frozen and found.first_changed is None:
            at = slice(first * base.width, (first + 1) * base.width)
            was, now = (block.reshape(-1)[at].tobytes()[::-1].hex() for block in (old, new))
            row, col = divmod(window.first + first, mask.matrix_shape[1])
            found.first_changed = (row, col, was, now)
        found.frozen_changed += frozen
        found.live_changed += live
        found.strange += strange
        found.largest = max(found.largest, largest)
        total, squares = total + added, squares + squared
        tell(2 * old.size)
    if mask.live_count:
        found.mean, found.rms = total / mask.live_count, math.sqrt(squares / mask.live_count)
    return found


def equal(one: Stored, other: Stored, files: Files) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    matrix = MaskedMatrix(FreezeMask(one.shape), one.width)
    both = (blocks(files, stored, matrix) for stored in (one, other))
    return all(np.array_equal(a, b) for (_, a), (_, b) in zip(*both, strict=True))


def varies(stored: Stored, files: Files) -> bool:
    """Whether not all elements of a tensor are the same."""
    first = np.frombuffer(files.head(stored, stored.width), f"<u{stored.width}")
    matrix = MaskedMatrix(FreezeMask(stored.shape), stored.width)
    return any((block.view(first.dtype) != first).any() for _, block in blocks(files, stored, matrix))
