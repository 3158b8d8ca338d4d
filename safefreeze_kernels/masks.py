"""What is frozen: `FreezeMask` for one tensor, `FreezePlan` for a model, and the plan file.

Polarity has one direction everywhere: a mask *names what is frozen*; what it does not name is *live*.

Every tensor is seen as a matrix: leading dimensions flatten into rows, the last one is the columns; the entries
of a 1-D tensor are its rows. The frozen part is stored in canonical form (whole rows, whole columns, and single
elements outside both), so two masks that freeze the same elements are equal and have the same fingerprint,
however they were written down.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:  # auditors read plans without torch, which takes as much memory as the audit may
    import torch
    from torch import Tensor

__all__ = ["FreezeMask", "FreezePlan", "PlanFileError", "frozen_counts", "write_atomically"]

Indices: TypeAlias = "Sequence[int] | Tensor | np.ndarray | None"
_FORMAT: Final = "safefreeze.plan"
_VERSION: Final = 1
_MOST_ELEMENTS: Final = 1 << 40  # of one tensor in a plan file: what a damaged file may claim at most
#: Elements of a tensor whose frozen ones a plan file may list: a mask takes a bit for each, however few are listed, and
#: a small file must not make a reader allocate much.
_MOST_LISTED: Final = 1 << 29
_NONE: Final = np.empty(0, np.int64)


class PlanFileError(ValueError):
    """A plan file is truncated, altered, or not a plan file."""


# ------------------------------------------------------------------------------------------------ FreezeMask


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

    __slots__ = ("_bits", "_cols", "_fingerprint", "_rows", "shape")

    def __init__(
        self,
        shape: Sequence[int],
        rows: Indices = None,
        cols: Indices = None,
        elements: Tensor | np.ndarray | None = None,
    ) -> None:
        self.shape: tuple[int, ...] = _checked_shape(shape)
        if cols is not None and len(self.shape) < 2:
            raise ValueError(
                f"FreezeMask: cols of a {len(self.shape)}-D tensor, expected rows; "
                "the entries of a 1-D parameter are its rows"
            )
        n_rows, n_cols = self.matrix_shape
        row_index = _checked_indices(rows, n_rows, "rows")
        col_index = _checked_indices(cols, n_cols, "cols")
        frozen = _checked_elements(elements, self.shape)
        if frozen is not None:
            frozen[row_index] = True
            frozen[:, col_index] = True
            row_index = np.flatnonzero(frozen.all(axis=1))
            col_index = np.flatnonzero(frozen.all(axis=0))
            frozen[row_index] = False
            frozen[:, col_index] = False
        if n_rows * n_cols == 0:
            row_index = col_index = _NONE
        elif row_index.size == n_rows or col_index.size == n_cols:
            row_index, col_index = np.arange(n_rows), _NONE
        bits = np.packbits(frozen.reshape(-1), bitorder="little") if frozen is not None and frozen.any() else None
        self._set(row_index, col_index, bits)

    def _set(self, rows: np.ndarray, cols: np.ndarray, bits: np.ndarray | None) -> None:
        self._rows: np.ndarray = rows
        self._cols: np.ndarray = cols
        self._bits: np.ndarray | None = bits
        self._fingerprint: str | None = None
        for array in (rows, cols, bits):
            if array is not None:
                array.flags.writeable = False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of the matrix this tensor is seen as."""
        if len(self.shape) < 2:
            return math.prod(self.shape), 1
        return math.prod(self.shape[:-1]), self.shape[-1]

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
        if self._bits is None:
            return None
        return _tensor(self._unpack_bits()).reshape(self.shape)

    @property
    def bits(self) -> np.ndarray | None:
        """`elements` as packed bits: uint8, element ``i`` (row-major) is bit ``i % 8`` of byte ``i // 8``."""
        return self._bits

    @property
    def frozen_rows(self) -> np.ndarray:
        """`rows` as a read-only array."""
        return self._rows

    @property
    def frozen_cols(self) -> np.ndarray:
        """`cols` as a read-only array."""
        return self._cols

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
        """Shape of packed optimizer state: ``shape`` itself where no row or column is frozen, else (live rows,
        live columns), or (live entries,) for a 1-D tensor. Frozen single elements keep their place in it."""
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
        live = (n_rows - self._rows.size) * (n_cols - self._cols.size)
        return live - (int(np.bitwise_count(self._bits).sum()) if self._bits is not None else 0)

    @property
    def frozen_fraction(self) -> float:
        """Frozen elements / all elements; 0.0 for a tensor with no elements."""
        return self.frozen_count / self.numel if self.numel else 0.0

    def dense(self) -> Tensor:
        """The mask written out: bool tensor of ``shape``, True = frozen."""
        frozen = self._unpack_bits() if self._bits is not None else np.zeros(self.matrix_shape, bool)
        frozen[self._rows] = True
        frozen[:, self._cols] = True
        return _tensor(frozen).reshape(self.shape)

    def matrix_index(self, held: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the matrix that a piece of the tensor takes; ``held``: per dimension, its indices."""
        if len(self.shape) < 2:
            return (held[0] if held else np.zeros(1, np.int64)), np.zeros(1, np.int64)
        rows = np.ravel_multi_index(np.ix_(*held[:-1]), self.shape[:-1])
        return np.asarray(rows).reshape(-1), held[-1]

    def piece(self, held: Sequence[np.ndarray] | None) -> FreezeMask:
        """The mask of a piece of the tensor (`sharding.held`); None: all of it."""
        if held is None or tuple(map(len, held)) == self.shape:
            return self
        rows, cols = self.matrix_index(held)
        shape = tuple(map(len, held))
        bits = None if self._bits is None else self._unpack_bits()[rows][:, cols].reshape(shape)
        frozen_cols = np.isin(cols, self._cols) if len(shape) > 1 else None
        return FreezeMask(shape, rows=np.isin(rows, self._rows), cols=frozen_cols, elements=bits)

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
            elements[np.ix_(rows, cols)] = self._unpack_bits()
            elements = elements.reshape(new.shape)
        return FreezeMask(new.shape, frozen_rows, frozen_cols if len(new.shape) > 1 else None, elements)

    def _unpack_bits(self) -> np.ndarray:
        assert self._bits is not None
        flat = np.unpackbits(self._bits, count=self.numel, bitorder="little")
        return flat.view(bool).reshape(self.matrix_shape)

    def __or__(self, other: FreezeMask) -> FreezeMask:
        """Freeze what either mask freezes."""
        if not isinstance(other, FreezeMask):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(f"FreezeMask union: shapes {self.shape} and {other.shape} differ, expected the same")
        elements = None
        if self._bits is not None or other._bits is not None:
            elements = self.dense() | other.dense()
        rows = np.union1d(self._rows, other._rows)
        cols = np.union1d(self._cols, other._cols) if len(self.shape) > 1 else None
        return FreezeMask(self.shape, rows=rows, cols=cols, elements=elements)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FreezeMask):
            return NotImplemented
        return self.fingerprint == other.fingerprint

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
        self.shape = state["shape"]
        self._set(state["rows"], state["cols"], state["bits"])

    def __repr__(self) -> str:
        parts = [f"{array.size} {word}" for word, array in (("rows", self._rows), ("cols", self._cols)) if array.size]
        if self._bits is not None:
            parts.append(f"{int(np.bitwise_count(self._bits).sum())} elements")
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


def _tensor(array: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(array)


def _complement(index: np.ndarray, size: int) -> np.ndarray:
    if index.size == 0:
        return np.arange(size)
    live = np.ones(size, bool)
    live[index] = False
    return np.flatnonzero(live)


# ------------------------------------------------------------------------------------------------ FreezePlan


class FreezePlan(Mapping[str, FreezeMask]):
    """What is frozen in a model: parameter name -> `FreezeMask`. Read-only, like a frozen dict.

    Args:
        masks: mapping (or pairs) of parameter names, as in ``model.named_parameters()``, to masks.
        metadata: anything JSON can hold: where the plan came from. Not part of the fingerprint.

    >>> plan = FreezePlan({"up.weight": FreezeMask((4, 6), rows=[1])})
    >>> plan.frozen_fraction
    0.25
    """

    def __init__(
        self,
        masks: Mapping[str, FreezeMask] | Iterable[tuple[str, FreezeMask]] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._masks: dict[str, FreezeMask] = dict(masks)
        for name, mask in self._masks.items():
            if not isinstance(name, str) or not isinstance(mask, FreezeMask):
                raise TypeError(
                    f"FreezePlan: entry {name!r} is a {type(mask).__name__}, expected parameter name -> FreezeMask"
                )
        try:
            self.metadata: dict[str, Any] = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"FreezePlan: metadata must be what JSON can hold ({error})") from None

    def __getitem__(self, name: str) -> FreezeMask:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __or__(self, other: FreezePlan) -> FreezePlan:
        """Freeze what either plan freezes. Metadata of the right-hand plan wins where keys meet."""
        if not isinstance(other, FreezePlan):
            return NotImplemented
        masks = dict(self._masks)
        for name, mask in other.items():
            if name in masks and masks[name].shape != mask.shape:
                raise ValueError(
                    f"FreezePlan union: {name!r} has shape {masks[name].shape} in one plan and {mask.shape} in the "
                    "other, expected plans for the same model"
                )
            masks[name] = masks[name] | mask if name in masks else mask
        return FreezePlan(masks, {**self.metadata, **other.metadata})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FreezePlan):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def frozen_fraction(self) -> float:
        """Frozen elements / all elements, over the parameters the plan names; 0.0 for an empty plan."""
        total = sum(mask.numel for mask in self.values())
        return sum(mask.frozen_count for mask in self.values()) / total if total else 0.0

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of names, shapes and what is frozen: the same in every process, for any insertion order
        and however the masks were written down. Metadata does not count."""
        digest = hashlib.sha256(f"{_FORMAT}/{_VERSION}".encode())
        for name in sorted(self._masks):
            encoded = name.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded + self._masks[name].fingerprint.encode())
        return digest.hexdigest()

    def check(self, model: torch.nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Raise if this plan does not fit ``model``: a missing name, another shape, tied weights with two masks,
        overlapping storage, or a parameter that does not require gradients (contract 6)."""
        from .binding import bind, named_tensors

        bind(self, named_tensors(model), operation="FreezePlan.check")

    def summary(self) -> str:
        """A table: frozen share of each kind of module, layer by layer, in at most 80 columns."""
        return _summarize(self)

    def __repr__(self) -> str:
        return (
            f"FreezePlan({len(self)} parameters, {self.frozen_fraction:.1%} frozen, "
            f"fingerprint {self.fingerprint[:12]})"
        )

    # -- file ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as one safetensors file; a crash or a full disk leaves an older file as it was.

        Rows, columns and elements are bit-packed or written as indices, whichever is smaller. The header carries the
        format, its version, the fingerprint, the metadata and a checksum over all of it.
        """
        from safetensors.numpy import save

        tensors: dict[str, np.ndarray] = {}
        entries: dict[str, Any] = {}
        for name in sorted(self._masks):
            mask = self._masks[name]
            n_rows, n_cols = mask.matrix_shape
            entry: dict[str, Any] = {"shape": list(mask.shape)}
            for part, index, size in (("rows", mask._rows, n_rows), ("cols", mask._cols, n_cols)):
                if index.size:
                    entry[part], tensors[f"{name}:{part}"] = _encode_index(index, size)
            if mask._bits is not None:
                index = np.flatnonzero(mask._unpack_bits().reshape(-1))
                entry["elements"], tensors[f"{name}:elements"] = _encode_index(index, mask.numel)
            entries[name] = entry
        header = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "fingerprint": self.fingerprint,
            "masks": json.dumps(entries, sort_keys=True),
            "metadata": json.dumps(self.metadata, sort_keys=True, allow_nan=False),
        }
        header["checksum"] = _checksum(header)
        write_atomically(Path(path), save(tensors, header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FreezePlan:
        """Read a plan file. Everything is validated before a plan exists.

        Raises:
            FileNotFoundError: no such file.
            PlanFileError: truncated, altered, of a later version, or not a plan file.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"FreezePlan.load: no file {os.fspath(path)!r}")
        try:
            with safe_open(os.fspath(path), framework="np") as file:
                return cls._decode(file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except PlanFileError as error:
            raise PlanFileError(f"FreezePlan.load: {os.fspath(path)!r} {error}") from None
        except (
            SafetensorError,
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            MemoryError,
        ) as error:
            raise PlanFileError(
                f"FreezePlan.load: {os.fspath(path)!r} is truncated or not a plan file ({error})"
            ) from error

    @classmethod
    def _decode(cls, header: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> FreezePlan:
        if header.get("format") != _FORMAT:
            raise PlanFileError(f"has format {header.get('format')!r}, expected {_FORMAT!r}: not a plan file")
        if header.get("version") != str(_VERSION):
            raise PlanFileError(
                f"has version {header.get('version')!r}, this package reads {_VERSION}: upgrade safefreeze-kernels"
            )
        if header.get("checksum") != _checksum(header):
            raise PlanFileError("was altered: its header does not match its checksum")
        masks: dict[str, FreezeMask] = {}
        used: set[str] = set()
        for name, entry in json.loads(header["masks"]).items():
            mask = FreezeMask(entry["shape"])
            n_rows, n_cols = mask.matrix_shape
            if mask.numel > _MOST_ELEMENTS or (entry.get("elements") == "index" and mask.numel > _MOST_LISTED):
                raise PlanFileError(f"was altered: {name!r} has shape {mask.shape}, more than any tensor holds")
            parts: dict[str, Any] = {}
            for part, size in (("rows", n_rows), ("cols", n_cols), ("elements", mask.numel)):
                if part in entry:
                    key = f"{name}:{part}"
                    used.add(key)
                    parts[part] = _decode_index(entry[part], tensors[key], size, key)
            if "elements" in parts:
                dense = np.zeros(mask.numel, bool)
                dense[parts["elements"]] = True
                parts["elements"] = dense.reshape(mask.shape)
            masks[name] = FreezeMask(mask.shape, **parts)
        if used != set(tensors):
            raise PlanFileError(f"was altered: unexpected tensors {sorted(set(tensors) - used)}")
        plan = cls(masks, json.loads(header["metadata"]))
        if plan.fingerprint != header.get("fingerprint"):
            raise PlanFileError("was altered: its contents do not match its fingerprint")
        return plan


def _encode_index(index: np.ndarray, size: int) -> tuple[str, np.ndarray]:
    dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.uint32 if size <= 1 << 32 else np.uint64)
    if size <= _MOST_LISTED and index.size * dtype.itemsize < (size + 7) // 8:
        return "index", index.astype(dtype)
    flags = np.zeros(size, bool)
    flags[index] = True
    return "bits", np.packbits(flags, bitorder="little")


def _decode_index(coding: str, stored: np.ndarray, size: int, key: str) -> np.ndarray:
    if coding == "index":
        if stored.ndim != 1 or stored.dtype not in (np.uint16, np.uint32, np.uint64):
            raise PlanFileError(f"was altered: {key!r} holds {stored.dtype} of shape {stored.shape}")
        return stored.astype(np.int64)
    if coding != "bits" or stored.dtype != np.uint8 or stored.shape != ((size + 7) // 8,):
        raise PlanFileError(f"was altered: {key!r} holds {stored.dtype} of shape {stored.shape} coded as {coding!r}")
    return np.flatnonzero(np.unpackbits(stored, count=size, bitorder="little"))


def _checksum(header: Mapping[str, str]) -> str:
    fields = {key: value for key, value in header.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the target, sync, rename: at any moment the target holds the old bytes or the new, never a mix."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    # An ordinary file, so its mode follows the umask: the system applies it. Asking for it would set it, for a moment
    # and for every thread.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


# ---------------------------------------------------------------------------------------------------- summary

_LAYER = re.compile(r"(?:^|\.)(\d+)\.(?P<rest>.+)$")
_MOST_KINDS: Final = 7


def frozen_counts(plan: FreezePlan) -> dict[tuple[str | None, str | None], tuple[int, int]]:
    """``(layer, kind of module) -> (frozen, all)`` elements; None stands for the total over all of them.

    The layer is the first number in a parameter's name ("-" where there is none), the kind its last part, such as
    ``"q_proj"`` or ``"q_proj.bias"``.
    """
    counts: dict[tuple[str | None, str | None], tuple[int, int]] = {}
    for name, mask in plan.items():
        found = _LAYER.search(name)
        layer, rest = (found.group(1), found.group("rest")) if found else ("-", name)
        parts = rest.removesuffix(".weight").split(".")
        kind = ".".join(parts[-2 if parts[-1] == "bias" else -1 :])
        for key in ((layer, kind), (layer, None), (None, kind), (None, None)):
            frozen, total = counts.get(key, (0, 0))
            counts[key] = frozen + mask.frozen_count, total + mask.numel
    return counts


def _summarize(plan: FreezePlan) -> str:
    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    counts = frozen_counts(plan)
    layers = sorted({row for row, _ in counts if row is not None}, key=lambda row: (row == "-", row.zfill(20)))
    kinds = list(dict.fromkeys(kind for _, kind in counts if kind is not None))
    shown, hidden = kinds[:_MOST_KINDS], max(len(kinds) - _MOST_KINDS, 0)
    table = Table(box=None)
    for heading in ("layer", *shown, "all"):
        table.add_column(Text(heading), justify="right")
    for row in [*layers, None] if layers else []:
        cells = [counts.get((row, column)) for column in (*shown, None)]
        texts = [f"{cell[0] / cell[1]:.1%}" if cell and cell[1] else "" for cell in cells]
        table.add_row("all" if row is None else row, *texts)
    buffer = StringIO()
    console = Console(file=buffer, width=80, color_system=None)
    console.print(f"frozen share, fingerprint {plan.fingerprint[:12]}", highlight=False)
    console.print(table)
    live = sum(mask.live_count for mask in plan.values())
    total = sum(mask.numel for mask in plan.values())
    console.print(
        f"{len(plan)} parameters, {total:,} elements: {total - live:,} frozen, {live:,} live", highlight=False
    )
    if hidden:
        console.print(f"{hidden} more kinds of module are counted under all", highlight=False)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().split("\n"))
