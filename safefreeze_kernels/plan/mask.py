"""`FreezeMask`: what is frozen of one tensor.

Polarity has one direction everywhere: a mask *names what is frozen*; what it does not name is *live*.

Every tensor is seen as a matrix: leading dimensions flatten into rows, the last one is the columns; the entries
of a 1-D tensor are its rows. The frozen part is stored in canonical form (whole rows, whole columns, and single
elements outside both), so two masks that freeze the same elements are equal and have the same fingerprint,
however they were written down.

Inside the package masks speak numpy; only `rows`, `cols`, `elements` and `dense` give tensors.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:  # auditors read plans without torch, which takes as much memory as the audit may
    from torch import Tensor

Indices: TypeAlias = "Sequence[int] | Tensor | np.ndarray | None"
_NONE: Final = np.empty(0, np.int64)


class FreezeMask:
    """The frozen part of one tensor: the union of whole rows, whole columns and single elements.

    Args:
        shape: shape of the tensor. Leading dimensions flatten into rows, the last one is the columns; a 1-D
            tensor has one row per entry, a 0-dim tensor one row.
        rows: frozen rows, as indices (a list, an integer tensor or array) or as a bool vector with True = frozen.
        cols: frozen columns, likewise; not for tensors with fewer than two dimensions.
        elements: bool tensor of ``shape``, True = frozen. Kept as one bit per element.

    Raises:
        TypeError: indices that are not integers or bools.
        ValueError: indices out of range or given twice, a bool vector of the wrong length, columns of a 1-D tensor.

    >>> FreezeMask((4, 6), rows=[1, 3]).frozen_fraction
    0.5
    """

    __slots__ = ("_bits", "_cols", "_fingerprint", "_rows", "_singles", "matrix_shape", "shape")

    #: ``(rows, columns)`` of the matrix this tensor is seen as.
    matrix_shape: tuple[int, int]

    def __init__(
        self,
        shape: Sequence[int],
        rows: Indices = None,
        cols: Indices = None,
        elements: Tensor | np.ndarray | None = None,
    ) -> None:
        self._shape(_checked_shape(shape))
        if cols is not None and len(self.shape) < 2:
            raise ValueError(
                f"FreezeMask: cols of a {len(self.shape)}-D tensor, expected rows; "
                "the entries of a 1-D parameter are its rows"
            )
        n_rows, n_cols = self.matrix_shape
        row_index = _checked_indices(rows, n_rows, "rows")
        col_index = _checked_indices(cols, n_cols, "cols")
        frozen = _checked_elements(elements, self.shape)
        self._settle(row_index, col_index, None if frozen is None else pack_bits(frozen))

    @classmethod
    def from_bits(
        cls, shape: Sequence[int], bits: np.ndarray, rows: Indices = None, cols: Indices = None
    ) -> FreezeMask:
        """The mask whose elements come as bits: eight times as fast as from bools, where rows fill whole bytes.

        Args:
            shape, rows, cols: as in the class.
            bits: as `FreezeMask.bits`: uint8, one bit per element. Copied; bits after the last element do not count.

        Raises:
            ValueError: another dtype or number of bytes; what the class raises.
        """
        mask = cls(shape, rows, cols)
        size = (mask.numel + 7) // 8
        if bits.dtype != np.uint8 or bits.shape != (size,):
            raise ValueError(f"FreezeMask.from_bits: bits is {bits.dtype} {bits.shape}, expected uint8 ({size},)")
        mask._settle(mask._rows, mask._cols, bits.copy())
        return mask

    def _settle(self, rows: np.ndarray, cols: np.ndarray, bits: np.ndarray | None) -> None:
        """Keep what is frozen in canonical form; ``bits`` may be changed."""
        n_rows, n_cols = self.matrix_shape
        if n_rows * n_cols == 0:
            rows, cols, bits = _NONE, _NONE, None
        elif bits is not None:
            rows, cols, bits = _canonical(rows, cols, bits, self.matrix_shape)
        if n_rows * n_cols and (rows.size == n_rows or cols.size == n_cols):
            rows, cols = np.arange(n_rows), _NONE
        self._set(rows, cols, bits)

    def _shape(self, shape: tuple[int, ...]) -> None:
        self.shape: tuple[int, ...] = shape
        self.matrix_shape = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)

    def _set(self, rows: np.ndarray, cols: np.ndarray, bits: np.ndarray | None) -> None:
        self._rows: np.ndarray = rows
        self._cols: np.ndarray = cols
        self._bits: np.ndarray | None = bits
        self._fingerprint: str | None = None
        self._singles: int | None = None
        for array in (rows, cols, bits):
            if array is not None:
                array.flags.writeable = False

    @property
    def rows(self) -> Tensor:
        """Frozen rows: int64 indices, ascending."""
        return _tensor(self._rows.copy())

    @property
    def cols(self) -> Tensor:
        """Frozen columns: int64 indices, ascending."""
        return _tensor(self._cols.copy())

    @property
    def elements(self) -> Tensor | None:
        """Elements frozen beyond the frozen rows and columns: bool tensor of ``shape``, or None."""
        frozen = self.frozen_elements
        return None if frozen is None else _tensor(frozen.reshape(self.shape))

    def dense(self) -> Tensor:
        """The mask written out: bool tensor of ``shape``, True = frozen."""
        return _tensor(self.frozen_flags().reshape(self.shape))

    @property
    def frozen_rows(self) -> np.ndarray:
        """`rows` as a read-only array."""
        return self._rows

    @property
    def frozen_cols(self) -> np.ndarray:
        """`cols` as a read-only array."""
        return self._cols

    def lines(self, axis: int) -> np.ndarray | None:
        """Frozen rows (``axis`` 0) or columns, as a read-only array; None: something else is frozen, too."""
        if self._bits is not None:
            return None
        if axis == 0:
            return None if self._cols.size else self._rows
        if self._rows.size == self.matrix_shape[0] > 0:
            return np.arange(self.matrix_shape[1])  # everything
        return None if self._rows.size else self._cols

    @property
    def bits(self) -> np.ndarray | None:
        """`elements` as packed bits: uint8, element ``i`` (row-major) is bit ``i % 8`` of byte ``i // 8``."""
        return self._bits

    @property
    def frozen_bits(self) -> np.ndarray:
        """`dense` as packed bits, as `bits` are."""
        if self._bits is not None and not self._rows.size and not self._cols.size:
            return self._bits
        return pack_bits(self.frozen_flags())

    @property
    def frozen_elements(self) -> np.ndarray | None:
        """`elements` as a new bool array of `matrix_shape`, or None."""
        return None if self._bits is None else unpack_bits(self._bits, self.matrix_shape)

    def frozen_flags(self) -> np.ndarray:
        """`dense` as a new bool array of `matrix_shape`."""
        frozen = self.frozen_elements
        frozen = np.zeros(self.matrix_shape, bool) if frozen is None else frozen
        frozen[self._rows] = True
        frozen[:, self._cols] = True
        return frozen

    @property
    def live_rows(self) -> np.ndarray:
        """Rows that are not frozen: int64 indices, ascending."""
        return _complement(self._rows, self.matrix_shape[0])

    @property
    def live_cols(self) -> np.ndarray:
        """Columns that are not frozen: int64 indices, ascending."""
        return _complement(self._cols, self.matrix_shape[1])

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of packed optimizer state: (live elements,), row-major, where single elements are frozen; else
        ``shape`` itself where no row or column is, and (live rows, live columns), or (live entries,) for a 1-D tensor,
        where some are."""
        if self._bits is not None:
            return (self.live_count,)
        if not self._rows.size and not self._cols.size:
            return self.shape
        live_rows = self.matrix_shape[0] - self._rows.size
        return (live_rows,) if len(self.shape) < 2 else (live_rows, self.matrix_shape[1] - self._cols.size)

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def frozen_count(self) -> int:
        """Frozen elements."""
        return self.numel - self.live_count

    @property
    def live_count(self) -> int:
        """Elements that train."""
        n_rows, n_cols = self.matrix_shape
        return (n_rows - self._rows.size) * (n_cols - self._cols.size) - self._single_count

    @property
    def _single_count(self) -> int:
        if self._singles is None:
            self._singles = 0 if self._bits is None else int(np.bitwise_count(self._bits).sum())
        return self._singles

    @property
    def frozen_fraction(self) -> float:
        """Frozen elements / all elements; 0.0 for a tensor with no elements."""
        return self.frozen_count / self.numel if self.numel else 0.0

    def matrix_index(self, held: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the matrix that a shard of the tensor takes; ``held``: per dimension, its indices."""
        if len(self.shape) < 2:
            return (held[0] if held else np.zeros(1, np.int64)), np.zeros(1, np.int64)
        rows = np.ravel_multi_index(np.ix_(*held[:-1]), self.shape[:-1])
        return np.asarray(rows).reshape(-1), held[-1]

    def matrices(self) -> Iterator[FreezeMask]:
        """The mask of each matrix of a tensor of three dimensions, in order. A column that is frozen in some of them
        alone is single elements in this mask, and a column in theirs."""
        n, *shape = self.shape
        size = math.prod(shape)
        firsts = np.searchsorted(self._rows, np.arange(n + 1) * shape[0])
        for i in range(n):
            rows = self._rows[firsts[i] : firsts[i + 1]] - i * shape[0]
            if self._bits is None:
                yield FreezeMask(shape, rows, self._cols)
                continue
            begin, end = i * size, (i + 1) * size
            bits = self._bits[begin // 8 : (end + 7) // 8]
            if begin % 8:
                bits = pack_bits(unpack_bits(bits, (bits.size * 8,))[begin % 8 :][:size])
            yield FreezeMask.from_bits(shape, bits, rows, self._cols)

    def shard(self, held: Sequence[np.ndarray] | None) -> FreezeMask:
        """The mask of a shard of the tensor (`sharding.held`); None: all of it."""
        if held is None or tuple(map(len, held)) == self.shape:
            return self
        rows, cols = self.matrix_index(held)
        shape = tuple(map(len, held))
        elements = None if self._bits is None else self.frozen_elements[rows][:, cols].reshape(shape)  # type: ignore[index]
        frozen_cols = np.isin(cols, self._cols) if len(shape) > 1 else None
        return FreezeMask(shape, rows=np.isin(rows, self._rows), cols=frozen_cols, elements=elements)

    def matrix(self) -> FreezeMask:
        """The mask of the matrix that the tensor is seen as; of a matrix, itself."""
        if len(self.shape) == 2:
            return self
        mask = FreezeMask.__new__(FreezeMask)
        mask._shape(self.matrix_shape)
        mask._set(self._rows, self._cols, self._bits)
        return mask

    def grown(self, shape: Sequence[int]) -> FreezeMask:
        """The mask of the tensor once it has grown to ``shape``, at the end of its dimensions: what was added is
        frozen, so that packed state stays as it is.

        Raises:
            ValueError: ``shape`` is smaller somewhere, or has other dimensions.
        """
        new = FreezeMask(shape)
        if new.shape == self.shape:
            return self
        if len(new.shape) != len(self.shape) or any(n < old for n, old in zip(new.shape, self.shape, strict=True)):
            raise ValueError(f"shape {new.shape} is not {self.shape} grown, expected no dimension to shrink")
        rows, cols = new.matrix_index([np.arange(size) for size in self.shape])  # where the old ones are now
        frozen_rows, frozen_cols = np.ones(new.matrix_shape[0], bool), np.ones(new.matrix_shape[1], bool)
        frozen_rows[rows[self.live_rows]] = False
        frozen_cols[cols[self.live_cols]] = False
        elements = None
        if self._bits is not None:
            elements = np.zeros(new.matrix_shape, bool)
            elements[np.ix_(rows, cols)] = self.frozen_elements
            elements = elements.reshape(new.shape)
        return FreezeMask(new.shape, frozen_rows, frozen_cols if len(new.shape) > 1 else None, elements)

    def __or__(self, other: FreezeMask) -> FreezeMask:
        """Freeze what either mask freezes."""
        if not isinstance(other, FreezeMask):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(f"FreezeMask union: shapes {self.shape} and {other.shape} differ, expected the same")
        if not other._rows.size and not other._cols.size and other._bits is None:
            return self
        elements = None
        if self._bits is not None or other._bits is not None:
            elements = (self.frozen_flags() | other.frozen_flags()).reshape(self.shape)
        rows = _union(self._rows, other._rows, self.matrix_shape[0])
        cols = _union(self._cols, other._cols, self.matrix_shape[1]) if len(self.shape) > 1 else None
        return FreezeMask(self.shape, rows=rows, cols=cols, elements=elements)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FreezeMask):
            return NotImplemented
        return (
            self.shape == other.shape
            and _same(self._rows, other._rows)
            and _same(self._cols, other._cols)
            and _same(self._bits, other._bits)
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the shape and of what is frozen."""
        if self._fingerprint is None:
            self._fingerprint = self._hash()
        return self._fingerprint

    def _hash(self) -> str:
        digest = hashlib.sha256(repr(self.shape).encode())
        for tag, array in ((b"rows", self._rows), (b"cols", self._cols), (b"elements", self._bits)):
            data = b"" if array is None else array.astype(array.dtype.newbyteorder("<")).tobytes()
            digest.update(tag + len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "rows": self._rows, "cols": self._cols, "bits": self._bits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shape(state["shape"])
        self._set(state["rows"], state["cols"], state["bits"])

    def __repr__(self) -> str:
        parts = [f"{array.size} {word}" for word, array in (("rows", self._rows), ("cols", self._cols)) if array.size]
        if self._bits is not None:
            parts.append(f"{self._single_count} elements")
        return f"FreezeMask({self.shape}, frozen: {' + '.join(parts) or 'nothing'}, {self.frozen_fraction:.1%})"


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        checked = tuple(int(n) for n in shape)
        exact = all(a == b for a, b in zip(checked, shape, strict=True))
    except (TypeError, ValueError, OverflowError):
        exact, checked = False, ()
    if not exact or any(n < 0 for n in checked):
        raise ValueError(f"FreezeMask: shape is {shape!r}, expected a sequence of sizes such as (rows, columns)")
    return checked


def _checked_indices(given: Indices, size: int, what: str) -> np.ndarray:
    """Ascending int64 indices below ``size``; copies, so that a caller's later edits do not reach the mask."""
    if given is None:
        return _NONE.copy()
    try:
        array = _as_array(given)
    except ValueError:  # lists of unequal lengths
        raise ValueError(f"FreezeMask: {what} is {given!r}, expected a 1-D list, tensor or array") from None
    if not isinstance(array, np.ndarray):
        raise TypeError(f"FreezeMask: {what} has dtype {array}, expected integer indices or a bool vector")
    if array.ndim != 1:
        raise ValueError(f"FreezeMask: {what} has {array.ndim} dimensions, expected a 1-D list, tensor or array")
    if array.dtype == np.bool_:
        if array.size != size:
            raise ValueError(f"FreezeMask: {what} is a bool vector of {array.size} entries, expected {size}")
        return np.flatnonzero(array)
    if array.size == 0:
        return _NONE.copy()
    if array.dtype.kind not in "iu":
        raise TypeError(f"FreezeMask: {what} has dtype {array.dtype}, expected integer indices or a bool vector")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= size:
        raise ValueError(
            f"FreezeMask: {what} holds index {low if low < 0 else high}, expected indices from 0 to {size - 1}"
        )
    index = np.sort(array.astype(np.int64))
    twice = index[1:][index[1:] == index[:-1]]
    if twice.size:
        raise ValueError(f"FreezeMask: {what} holds index {twice[0]} more than once, expected each row or column once")
    return index


def _checked_elements(elements: Tensor | np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if elements is None:
        return None
    frozen = _as_array(elements)
    if not isinstance(frozen, np.ndarray) or frozen.dtype != np.bool_:
        dtype = frozen.dtype if isinstance(frozen, np.ndarray) else frozen
        raise TypeError(f"FreezeMask: elements has dtype {dtype}, expected bool with True = frozen")
    if frozen.shape != shape:
        raise ValueError(f"FreezeMask: elements has shape {frozen.shape}, expected {shape}")
    n_cols = shape[-1] if len(shape) > 1 else 1
    n_rows = math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)
    return np.array(frozen).reshape(n_rows, n_cols)


def _as_array(given: Any) -> Any:
    """``given`` as an array; for a tensor whose dtype numpy lacks (no indices anyway), that dtype."""
    torch: Any = sys.modules.get("torch")  # whoever made a tensor has imported it
    if torch is None or not isinstance(given, torch.Tensor):
        return np.asarray(given)
    if given.dtype != torch.bool and (given.is_floating_point() or given.is_complex()):
        return given.dtype
    return given.detach().cpu().numpy()


def _canonical(
    rows: np.ndarray, cols: np.ndarray, bits: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Whole rows and whole columns among what is frozen, and the bits of the rest, or None."""
    n_rows, n_cols = shape
    bytewise = n_cols % 8 == 0
    lines = bits.reshape(n_rows, -1) if bytewise else unpack_bits(bits, shape)
    if rows.size:
        lines[rows] = 255 if bytewise else True
    if cols.size:
        flags = flags_of(cols, n_cols)
        lines |= pack_bits(flags) if bytewise else flags
    full = np.bitwise_and.reduce(lines, axis=1)
    rows = np.flatnonzero(full == 255 if bytewise else full)
    across = np.bitwise_and.reduce(lines, axis=0)
    if across.any():
        cols = np.flatnonzero(unpack_bits(across, (n_cols,)) if bytewise else across)
        lines &= ~across
    else:
        cols = _NONE
    if rows.size:
        lines[rows] = 0
    if not lines.any():
        return rows, cols, None
    return rows, cols, bits if bytewise else pack_bits(lines)


def flags_of(index: np.ndarray, size: int) -> np.ndarray:
    """A new bool array of which those of an index are set."""
    flags = np.zeros(size, bool)
    flags[index] = True
    return flags


def pack_bits(flags: np.ndarray) -> np.ndarray:
    """Flags of any shape as bits: uint8, flag ``i`` (row-major) is bit ``i % 8`` of byte ``i // 8``."""
    return np.packbits(flags.reshape(-1), bitorder="little")


def unpack_bits(bits: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """What `pack_bits` made bits of: a new bool array of ``shape``."""
    return np.unpackbits(bits, count=math.prod(shape), bitorder="little").view(bool).reshape(shape)


def bits_before(bits: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How many bits are set before each of ``places``: int64."""
    words = np.concatenate([bits, np.zeros(-bits.size % 8 + 8, np.uint8)]).view("<u8")
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bitwise_count(words), dtype=np.int64)])
    lower = (np.uint64(1) << (places % 64).astype(np.uint64)) - np.uint64(1)
    found: np.ndarray = before[places // 64] + np.bitwise_count(words[places // 64] & lower)
    return found


def _tensor(array: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(array)


def _union(one: np.ndarray, other: np.ndarray, size: int) -> np.ndarray:
    if not one.size or not other.size:
        return one if one.size else other
    lines = np.zeros(size, bool)
    lines[one] = lines[other] = True
    return lines


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None or one.size != other.size:
        return one is other
    return one is other or bool((one == other).all())


def _complement(index: np.ndarray, size: int) -> np.ndarray:
    if index.size == 0:
        return np.arange(size)
    live = np.ones(size, bool)
    live[index] = False
    return np.flatnonzero(live)
