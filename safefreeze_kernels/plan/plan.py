"""`FreezePlan`: what is frozen of a model, and the plan file."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from .binding import Model, bind, named_tensors
from .files import write_atomically
from .mask import FreezeMask, flags_of, pack_bits, unpack_bits
from .patterns import masks_of
from .summary import summarize

_FORMAT: Final = "safefreeze.plan"
_VERSION: Final = 1
_MOST_ELEMENTS: Final = 1 << 40  # of one tensor in a plan file: what a damaged file may claim at most
#: Elements of a tensor whose frozen ones a plan file may list: a mask takes a bit for each, however few are listed, and
#: a small file must not make a reader allocate much.
_MOST_LISTED: Final = 1 << 29
#: What decoding a damaged file may raise.
_DAMAGE: Final = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, MemoryError)


class PlanFileError(ValueError):
    """A plan file is truncated, altered, or not a plan file."""


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

    @classmethod
    def of(
        cls, model: Model | Mapping[str, Sequence[int]], freeze: Iterable[str] = (), *,
        train_only: Iterable[str] | None = None,
    ) -> FreezePlan:  # fmt: skip
        """The plan that patterns describe: ``FreezePlan.of(model, ["*.mlp.up_proj.weight[0:64]", "lm_head.weight"])``.

        A pattern is a parameter's name, in which ``*`` stands for any text, and what is frozen of it as one would index
        an array: ``[0:64]`` rows, ``[:, 3]`` a column, ``[[0:64, 128]]`` several of one dimension, ``[2]`` of stacked
        experts one of them, ``[0:64, 3]`` those rows of that column alone. Without an index all of it.

        Args:
            model: a module, or parameters by name; or name -> shape.
            freeze: patterns; what any of them chooses is frozen.
            train_only: instead of ``freeze``: everything is frozen but what these choose.

        Raises:
            TypeError: a single text instead of a list.
            ValueError: naming the pattern: it cannot be read, matches no parameter, or does not fit one it matches;
                patterns of both kinds, or none.
        """
        if isinstance(freeze, str) or isinstance(train_only, str):
            raise TypeError("FreezePlan.of: a single text was given, expected a list of patterns")
        patterns = {"freeze": list(freeze), "train_only": list(train_only or ())}
        return cls(masks_of(model, *patterns.values()), {"patterns": patterns})

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
        return self._masks == other._masks

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

    def check(self, model: Model) -> None:
        """Raise if this plan does not fit ``model``: a missing name, another shape, tied weights with two masks,
        overlapping storage, or a parameter that does not require gradients (contract 6)."""
        bind(self, named_tensors(model), operation="FreezePlan.check", absent=True)

    def summary(self) -> str:
        """A table: frozen share of each kind of module, layer by layer, in at most 80 columns."""
        return summarize(self, self.fingerprint)

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
            for part, index, size in (("rows", mask.frozen_rows, n_rows), ("cols", mask.frozen_cols, n_cols)):
                if index.size:
                    entry[part], tensors[f"{name}:{part}"] = _encode_index(index, size)
            if mask.bits is not None:
                entry["elements"], tensors[f"{name}:elements"] = _encode_bits(mask.bits, mask.numel)
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
        except (SafetensorError, *_DAMAGE) as error:
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
                    decode = _decode_bits if part == "elements" else _decode_index
                    parts[part] = decode(entry[part], tensors[key], size, key)
            bits = parts.pop("elements", None)
            masks[name] = (
                FreezeMask(mask.shape, **parts) if bits is None else FreezeMask.from_bits(mask.shape, bits, **parts)
            )
        if used != set(tensors):
            raise PlanFileError(f"was altered: unexpected tensors {sorted(set(tensors) - used)}")
        plan = cls(masks, json.loads(header["metadata"]))
        if plan.fingerprint != header.get("fingerprint"):
            raise PlanFileError("was altered: its contents do not match its fingerprint")
        return plan


def _listing(count: int, size: int) -> np.dtype[Any] | None:
    """The dtype in which a list of so many of ``size`` takes fewer bytes than a bit for each; None: the bits do."""
    dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.uint32 if size <= 1 << 32 else np.uint64)
    return dtype if size <= _MOST_LISTED and count * dtype.itemsize < (size + 7) // 8 else None


def _encode_index(index: np.ndarray, size: int) -> tuple[str, np.ndarray]:
    dtype = _listing(index.size, size)
    return ("bits", pack_bits(flags_of(index, size))) if dtype is None else ("index", index.astype(dtype))


def _encode_bits(bits: np.ndarray, size: int) -> tuple[str, np.ndarray]:
    dtype = _listing(int(np.bitwise_count(bits).sum()), size)
    return ("bits", bits) if dtype is None else ("index", np.flatnonzero(unpack_bits(bits, (size,))).astype(dtype))


def _decode_index(coding: str, stored: np.ndarray, size: int, key: str) -> np.ndarray:
    if coding != "index":
        return np.flatnonzero(unpack_bits(_decode_bits(coding, stored, size, key), (size,)))
    if stored.ndim != 1 or stored.dtype not in (np.uint16, np.uint32, np.uint64):
        raise PlanFileError(f"was altered: {key!r} holds {stored.dtype} of shape {stored.shape}")
    return stored.astype(np.int64)


def _decode_bits(coding: str, stored: np.ndarray, size: int, key: str) -> np.ndarray:
    if coding == "index":
        return pack_bits(flags_of(_decode_index(coding, stored, size, key), size))
    if coding != "bits" or stored.dtype != np.uint8 or stored.shape != ((size + 7) // 8,):
        raise PlanFileError(f"was altered: {key!r} holds {stored.dtype} of shape {stored.shape} coded as {coding!r}")
    return stored


def _checksum(header: Mapping[str, str]) -> str:
    fields = {key: value for key, value in header.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
