"""Audits on disk: two checkpoints compared under a plan, without a model, without torch, in constant memory.

`compare` streams base and tuned checkpoint and tells what changed; `attest` writes a statement of it, against which
`check` verifies a tuned checkpoint when the base is no longer at hand.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final, TypeAlias

import numpy as np

from .masks import FreezeMask, FreezePlan, write_atomically

__all__ = ["AuditReport", "Statement", "TensorChanges", "attest", "check", "compare"]

#: Called with how many bytes of the checkpoints were gone through since the last call.
Progress: TypeAlias = Callable[[int], object]
PathLike: TypeAlias = "str | os.PathLike[str]"

_BLOCK: Final = 1 << 20  # bytes of one tensor that are looked at together: two of them stay in a processor's cache
_THREADS: Final = min(4, os.cpu_count() or 1)
_LARGEST_STATEMENT: Final = 16 << 20
_LARGEST_JSON: Final = 256 << 20
_FORMAT: Final = "safefreeze.statement"
_VERSION: Final = 1

# safetensors' dtypes: (bytes, csrc/audit.h's Value, torch's name)
_DTYPES: Final[Mapping[str, tuple[int, int, str]]] = {
    "F32": (4, 0, "torch.float32"), "BF16": (2, 1, "torch.bfloat16"), "F16": (2, 2, "torch.float16"),
    "F64": (8, 6, "torch.float64"), "I64": (8, 6, "torch.int64"), "I32": (4, 5, "torch.int32"),
    "I16": (2, 4, "torch.int16"), "I8": (1, 3, "torch.int8"), "U8": (1, 3, "torch.uint8"), "BOOL": (1, 3, "torch.bool"),
    "U16": (2, 4, "torch.uint16"), "U32": (4, 5, "torch.uint32"), "U64": (8, 6, "torch.uint64"),
    "F8_E4M3": (1, 3, "torch.float8_e4m3fn"), "F8_E5M2": (1, 3, "torch.float8_e5m2"),
}  # fmt: skip
_BF16, _FP16 = 1, 2


# ---------------------------------------------------------------------------------------------------- what is found


@dataclass
class TensorChanges:
    """What became of one tensor.

    Attributes:
        name, shape, dtype: of the tensor; ``dtype`` as safetensors names it, "F32 -> BF16" if it changed.
        frozen, live: how many elements.
        frozen_changed: frozen elements whose bytes differ.
        first_changed: (row, column) of the first of them, and the bytes before and after, as hex.
        live_changed: live elements whose bytes differ.
        strange: of those, how many changed by something that is no finite number, or have no known one (integers,
            float64).
        largest, mean, rms: of |after - before| over live elements that changed by a finite number (mean and root mean
            square are over all live elements; sums are float32 over 256 elements, then float64).
        trouble: why the bytes could not be compared; "": they were.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    frozen: int
    live: int
    frozen_changed: int = 0
    first_changed: tuple[int, int, str, str] | None = None
    live_changed: int = 0
    strange: int = 0
    largest: float = 0.0
    mean: float = 0.0
    rms: float = 0.0
    trouble: str = ""


@dataclass
class AuditReport:
    """What `compare` and `check` found. ``str()`` tells it in lines of 80 columns, but for long names.

    Attributes:
        plan: fingerprint of the plan.
        tensors: of every tensor of the checkpoints (of `check`: of the plan).
        trouble: what else is wrong; the report is then not `ok`.
        notes: what is worth knowing.
        attested: the frozen bytes were compared as a whole, with a statement's digest.
    """

    plan: str
    tensors: list[TensorChanges] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    attested: bool = False

    @property
    def ok(self) -> bool:
        """Whether it is proven that nothing frozen changed."""
        return not self.trouble and not any(t.frozen_changed or (t.frozen and t.trouble) for t in self.tensors)

    @property
    def frozen(self) -> int:
        """Frozen elements that were compared."""
        return sum(t.frozen for t in self.tensors if not t.trouble)

    @property
    def frozen_bytes(self) -> int:
        """Their bytes."""
        return sum(t.frozen * _DTYPES[t.dtype][0] for t in self.tensors if not t.trouble)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        frozen_changed = sum(t.frozen_changed for t in self.tensors)
        lines = [f"plan {self.plan[:12]}"]
        shown = [t for t in self.tensors if t.frozen_changed or t.trouble]
        for one in shown[:20]:
            what = one.trouble
            if one.first_changed is not None:
                row, col, before, after = one.first_changed
                what = f"{one.frozen_changed:,} of {one.frozen:,} frozen elements changed, first at"
                lines += [f"  {one.name}", f"    {what}"]
                what = f"row {row}, column {col}: 0x{before} became 0x{after}"
                lines.append(f"    {what}")
                continue
            lines += [f"  {one.name}", f"    {what}"]
        if len(shown) > 20:
            lines.append(f"  … and {len(shown) - 20} more")
        lines += self.trouble + self.notes
        live = sum(t.live for t in self.tensors)
        if any(t.live_changed for t in self.tensors):
            changed = sum(t.live_changed for t in self.tensors)
            largest = max(self.tensors, key=lambda t: t.largest)
            lines.append(f"live: {changed:,} of {live:,} elements changed, by {largest.largest:.3g} at most")
            lines.append(f"  (in {largest.name})")
        told = (
            f"{self.frozen:,} elements" if self.attested else f"{frozen_changed:,} of {self.frozen:,} elements changed"
        )
        lines.append(f"frozen: {told} ({self.frozen_bytes:,} bytes compared)")
        lines.append("proven: no frozen byte differs" if self.ok else "NOT proven")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ checkpoints


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: ``nbytes`` from ``start`` of ``file``."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype][0]


@dataclass(frozen=True)
class _Checkpoint:
    """The files of a checkpoint and every tensor in them."""

    files: list[Path]
    tensors: dict[str, _Stored]
    stamps: list[tuple[int, int]]

    def unchanged(self, operation: str) -> None:
        """Raise ValueError if a file was written to since it was opened."""
        if _stamps(self.files) != self.stamps:
            raise ValueError(f"{operation}: {os.fspath(self.files[0].parent)!r} was written to meanwhile; start anew")


def _stamps(files: Sequence[Path]) -> list[tuple[int, int]]:
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _located(path: PathLike, operation: str, word: str) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a checkpoint; and, if it is sharded, tensor -> name of its file."""
    given = Path(path)
    if given.is_file():
        return [given], None
    whole, index = given / "model.safetensors", given / "model.safetensors.index.json"
    if whole.is_file() and index.is_file():
        raise ValueError(
            f"{operation}: {word} {os.fspath(path)!r} holds {whole.name} and {index.name}, of which loaders take one "
            "or the other; remove what is not the model"
        )
    if whole.is_file():
        return [whole], None
    if not index.is_file():
        raise FileNotFoundError(
            f"{operation}: {word} is {os.fspath(path)!r}, expected a .safetensors file, or a folder with {whole.name} "
            f"or {index.name}"
        )
    try:
        if index.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"it has {index.stat().st_size:,} bytes")
        homes = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(homes.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{operation}: {word}: {os.fspath(index)!r} cannot be read ({error!r})") from error
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{operation}: {word}: {os.fspath(index)!r} names files outside its folder")
    files = [given / name for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{operation}: {word}: {os.fspath(index)!r} names {file.name!r}, which is not there"
            )
    return files, homes


def _opened(path: PathLike, operation: str, word: str) -> _Checkpoint:
    """A checkpoint's files and tensors. safetensors checks the headers: sizes, offsets, overlaps."""
    from safetensors import SafetensorError, safe_open

    files, homes = _located(path, operation, word)
    found: dict[str, _Stored] = {}
    for file in files:
        try:
            with safe_open(os.fspath(file), framework="np"):
                pass
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(size))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{operation}: {word}: {os.fspath(file)!r} is truncated or no safetensors file ({error})"
            ) from error
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in found:
                raise ValueError(
                    f"{operation}: {word}: {name!r} is in two files, {found[name].file.name} and {file.name}"
                )
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{operation}: {word}: {name!r} has dtype {entry['dtype']}, which is not known here")
            found[name] = _Stored(file, 8 + size + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
    if homes is not None and homes != {name: stored.file.name for name, stored in found.items()}:
        other = {name: stored.file.name for name, stored in found.items()}
        name = min(name for name in {*homes, *other} if homes.get(name) != other.get(name))
        raise ValueError(
            f"{operation}: {word}: the index places {name!r} in {homes.get(name)!r}, it is in {other.get(name)!r}; "
            "save the model anew"
        )
    return _Checkpoint(files, found, _stamps(files))


class _Files(ExitStack):
    """Files that several threads read, each opened once: what the system reads ahead for one serves the others."""

    def __init__(self) -> None:
        super().__init__()
        self._descriptors: dict[Path, int] = {}
        self._lock = Lock()

    def descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
                self.callback(os.close, self._descriptors[file])
            return self._descriptors[file]


class _Reader:
    """Blocks of whole rows of one stored tensor, in a buffer that is used again."""

    def __init__(self, stored: _Stored, mask: FreezeMask, files: _Files) -> None:
        self.stored, (self.rows, self.cols) = stored, mask.matrix_shape
        self.row_bytes = self.cols * _DTYPES[stored.dtype][0]
        self.block = max(1, _BLOCK // max(1, self.row_bytes))
        self._file = files.descriptor(stored.file)
        self._buffer = np.empty(min(self.block, self.rows) * self.row_bytes + 8, np.uint8)

    def read(self, row: int) -> np.ndarray:
        """uint8 [rows, bytes]: up to ``block`` rows from ``row`` on; valid until the next call."""
        count = min(self.block, self.rows - row)
        view = memoryview(self._buffer.data)[: count * self.row_bytes]
        start, done = self.stored.start + row * self.row_bytes, 0
        while done < len(view):
            got = os.preadv(self._file, [view[done:]], start + done)
            if not got:
                raise ValueError(f"{os.fspath(self.stored.file)!r} became shorter while it was read")
            done += got
        return self._buffer[: len(view)].reshape(count, self.row_bytes)


# --------------------------------------------------------------------------------------------------------- comparing


@dataclass
class _Flags:
    """A mask as the comparison takes it: uint8 per row and column; bits of the elements, or None."""

    rows: np.ndarray
    cols: np.ndarray | None
    bits: np.ndarray | None

    @classmethod
    def of(cls, mask: FreezeMask) -> _Flags:
        n_rows, n_cols = mask.matrix_shape
        rows, cols = np.ones(n_rows, np.uint8), np.ones(n_cols, np.uint8)
        rows[mask.live_rows] = 0
        cols[mask.live_cols] = 0
        return cls(rows, cols if cols.any() else None, mask.bits)

    def bits_from(self, element: int, count: int) -> np.ndarray | None:
        """The bits of ``count`` elements from ``element`` on, beginning with a byte, 8 bytes of 0 behind them."""
        if self.bits is None:
            return None
        chosen = np.unpackbits(
            self.bits[element // 8 : (element + count + 7) // 8], count=element % 8 + count, bitorder="little"
        )
        return np.concatenate([np.packbits(chosen[element % 8 :], bitorder="little"), np.zeros(8, np.uint8)])


def _difference(
    before: np.ndarray,
    after: np.ndarray,
    value: int,
    rows: np.ndarray,
    cols: np.ndarray | None,
    bits: np.ndarray | None,
) -> tuple[int, int, int, int, float, float, float]:
    """Twin of ``compare`` in csrc/audit.cpp, for where there is no extension. uint8 [rows, bytes] each."""
    width = next(size for size, code, _ in _DTYPES.values() if code == value)
    old, new = (block.view(f"<u{width}") for block in (before, after))
    differs = old != new
    frozen = np.broadcast_to(rows[:, None] != 0, old.shape).copy()
    if cols is not None:
        frozen |= cols != 0
    if bits is not None:
        frozen |= np.unpackbits(bits, count=old.size, bitorder="little").view(bool).reshape(old.shape)
    still, moved = differs & frozen, differs & ~frozen
    first = int(np.flatnonzero(still)[0]) if still.any() else -1
    live = int(moved.sum())
    if value > _FP16:
        return int(still.sum()), first, live, live, 0.0, 0.0, 0.0
    if value == _BF16:
        floats = [(x[moved].astype(np.uint32) << 16).view(np.float32) for x in (old, new)]
    else:
        floats = [x[moved].view(np.float16 if value == _FP16 else np.float32).astype(np.float32) for x in (old, new)]
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(floats[1] - floats[0])
    finite = apart[np.isfinite(apart)].astype(np.float64)
    largest = float(finite.max()) if finite.size else 0.0
    return (
        int(still.sum()), first, live, live - finite.size, largest, float(finite.sum()), float((finite**2).sum())
    )  # fmt: skip


try:
    from . import _C

    def _compared(
        before: np.ndarray, after: np.ndarray, value: int, rows: np.ndarray, cols: np.ndarray | None,
        bits: np.ndarray | None,
    ) -> tuple[int, int, int, int, float, float, float]:  # fmt: skip
        width = next(size for size, code, _ in _DTYPES.values() if code == value)
        return _C.compare(
            before.ctypes.data, after.ctypes.data, before.shape[0], before.shape[1] // width, value, rows.ctypes.data,
            0 if cols is None else cols.ctypes.data, 0 if bits is None else bits.ctypes.data,
        )  # fmt: skip

except ImportError:
    _compared = _difference


def _changes(
    name: str, base: _Stored, tuned: _Stored, mask: FreezeMask, files: _Files, progress: Progress
) -> TensorChanges:
    """Compare one tensor, block by block."""
    found = TensorChanges(name, base.shape, base.dtype, mask.frozen_count, mask.live_count)
    if base.dtype != tuned.dtype:
        found.dtype = f"{base.dtype} -> {tuned.dtype}"
        found.trouble = f"dtype changed from {base.dtype} to {tuned.dtype}; bytes cannot be compared across dtypes"
        progress(base.nbytes + tuned.nbytes)
        return found
    width, value, _ = _DTYPES[base.dtype]
    flags, total, squares = _Flags.of(mask), 0.0, 0.0
    one, other = _Reader(base, mask, files), _Reader(tuned, mask, files)
    for row in range(0, one.rows if one.cols else 0, one.block):
        before, after = one.read(row), other.read(row)
        n_rows = len(before)
        frozen, first, live, strange, largest, added, squared = _compared(
            before, after, value, flags.rows[row : row + n_rows], flags.cols,
            flags.bits_from(row * one.cols, n_rows * one.cols),
        )  # fmt: skip
        if frozen and found.first_changed is None:
            at = slice(first % one.cols * width, (first % one.cols + 1) * width)
            was, now = (block[first // one.cols, at].tobytes()[::-1].hex() for block in (before, after))
            found.first_changed = (row + first // one.cols, first % one.cols, was, now)
        found.frozen_changed += frozen
        found.live_changed += live
        found.strange += strange
        found.largest = max(found.largest, largest)
        total, squares = total + added, squares + squared
        progress(2 * before.size)
    if mask.live_count:
        found.mean, found.rms = total / mask.live_count, math.sqrt(squares / mask.live_count)
    return found


def _nothing(_: int) -> None:
    pass


def _checked(plan: FreezePlan, stored: Mapping[str, _Stored], operation: str, word: str) -> None:
    if not any(mask.frozen_count for mask in plan.values()):
        raise ValueError(f"{operation}: the plan freezes nothing, so there is nothing to prove; is it the right one?")
    for name, mask in plan.items():
        if name not in stored:
            raise ValueError(
                f"{operation}: the plan names {name!r}, which is not among the {len(stored)} tensors of {word}; is it "
                "a plan for another model? (of tied weights checkpoints hold one name alone: say so with "
                "tied={name: other}, --tied NAME=OTHER)"
            )
        if stored[name].shape != mask.shape:
            raise ValueError(
                f"{operation}: {name!r} of {word} has shape {stored[name].shape}, the plan expects {mask.shape}"
            )


def _told_names(
    plan: FreezePlan, tied: Mapping[str, str] | None, opened: Mapping[str, _Checkpoint], operation: str
) -> tuple[FreezePlan, list[dict[str, _Stored]]]:
    """The plan, and the tensors of each checkpoint (by what it is called in errors), in which the two names of a tied
    weight are one: the plan's. Nothing but ``tied`` tells: a checkpoint's own word for it could be forged."""
    if not isinstance(plan, FreezePlan):
        raise TypeError(f"{operation}: plan is a {type(plan).__name__}, expected a FreezePlan")
    masks, tensors = dict(plan), [dict(one.tensors) for one in opened.values()]
    for pair in (tied or {}).items():
        names = [name for name in sorted(masks) if name in pair] or sorted(pair)
        if len(names) > 1 and names[0] in masks and masks[names[0]] != masks.pop(names[1]):
            both = f"{names[0]!r} and {names[1]!r}"
            raise ValueError(f"{operation}: {both} are tied, but the plan has two different masks for them")
        for word, stored in zip(opened, tensors, strict=True):
            held = [name for name in pair if name in stored]
            if len(held) != 1:
                raise ValueError(
                    f"{operation}: {pair[0]!r} and {pair[1]!r} are said to be tied, so {word} should hold one of them; "
                    + ("it holds both" if held else "it holds neither")
                )
            stored[names[0]] = stored.pop(held[0])
    return FreezePlan(masks), tensors


def _said(tied: Mapping[str, str] | None) -> list[str]:
    """What a report rests on."""
    return [f"{name!r} and {other!r} are one weight: so it was said" for name, other in (tied or {}).items()]


def compare(
    base: PathLike,
    tuned: PathLike,
    plan: FreezePlan,
    *,
    tied: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Compare two checkpoints on disk: did a frozen byte change, and how much did the rest?

    Both are read once, in blocks; a few megabytes are in memory at any time.

    Args:
        base, tuned: a safetensors file, or a folder as Hugging Face saves models to, sharded or not.
        plan: what was frozen.
        tied: name -> other name of the same weight, where checkpoints hold one of the two and the plan, or the other
            checkpoint, uses the other. Does the model that is loaded tie them (``tie_word_embeddings``)? Checkpoints
            cannot prove that.
        progress: called with bytes that were gone through; `total_bytes` says of how many.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a damaged file, a folder whose index contradicts its files, checkpoints the plan or ``tied`` does
            not fit, a plan that freezes nothing.
        TypeError: ``plan`` is something else.
    """
    operation = "audit.compare"
    one, other = _opened(base, operation, "base"), _opened(tuned, operation, "tuned")
    return _compare(one, other, plan, tied, operation, progress)


def _compare(
    base: _Checkpoint,
    tuned: _Checkpoint,
    plan: FreezePlan,
    tied: Mapping[str, str] | None,
    operation: str,
    progress: Progress | None,
) -> AuditReport:
    told, stored = _told_names(plan, tied, {"base": base, "tuned": tuned}, operation)
    for one, word in zip(stored, ("base", "tuned"), strict=True):
        _checked(told, one, operation, word)
    report = AuditReport(plan.fingerprint, notes=_said(tied))
    for one, other, word in ((stored[0], stored[1], "base"), (stored[1], stored[0], "tuned")):
        report.notes += [f"{name!r} is in {word} alone" for name in one if name not in other]
    both = [name for name in stored[0] if name in stored[1]]
    for name in both:
        if stored[0][name].shape != stored[1][name].shape:
            report.notes.append(f"{name!r} has shape {stored[0][name].shape}, then {stored[1][name].shape}")
    both = [name for name in both if stored[0][name].shape == stored[1][name].shape]
    # in the order of the file, or the disk would have to jump about
    jobs = sorted(both, key=lambda name: (stored[0][name].file, stored[0][name].start))
    with _Files() as files, ThreadPoolExecutor(_THREADS) as pool:
        found = dict(
            zip(
                jobs,
                pool.map(
                    lambda name: _changes(
                        name, stored[0][name], stored[1][name], told.get(name) or FreezeMask(stored[0][name].shape),
                        files, progress or _nothing,
                    ),
                    jobs,
                ),
                strict=True,
            )
        )  # fmt: skip
    report.tensors = [found[name] for name in both]
    base.unchanged(operation)
    tuned.unchanged(operation)
    return report


def total_bytes(*checkpoints: PathLike) -> int:
    """Bytes of the files of some checkpoints.

    Raises:
        FileNotFoundError: one is not there.
    """
    return sum(file.stat().st_size for path in checkpoints for file in _located(path, "audit", "checkpoint")[0])


# -------------------------------------------------------------------------------------------------------- statements


def _packed(stored: _Stored, mask: FreezeMask, progress: Progress) -> Iterator[bytes]:
    """The frozen bytes of a tensor in the order of `proof.snapshot`: whole rows, then columns of the other rows, then
    single elements."""
    flags, width = _Flags.of(mask), _DTYPES[stored.dtype][0]
    cols = None if flags.cols is None else np.flatnonzero(flags.cols)
    with _Files() as files:
        reader = _Reader(stored, mask, files)
        for part in ("rows", "cols", "elements"):
            if not {"rows": flags.rows.any(), "cols": cols is not None, "elements": mask.bits is not None}[part]:
                continue
            for row in range(0, reader.rows, reader.block):
                block = reader.read(row)
                frozen = flags.rows[row : row + len(block)] != 0
                if part == "rows":
                    yield block[frozen].tobytes()
                    continue
                matrix = block.view(f"<u{width}")
                if part == "cols":
                    yield matrix[~frozen][:, cols].tobytes()
                else:
                    bits = flags.bits_from(row * reader.cols, matrix.size)
                    assert bits is not None
                    yield matrix.reshape(-1)[
                        np.unpackbits(bits, count=matrix.size, bitorder="little").view(bool)
                    ].tobytes()
    progress(stored.nbytes)


def _frozen_digest(stored: Mapping[str, _Stored], plan: FreezePlan, progress: Progress) -> str:
    """SHA-256 (hex) over names, dtypes and frozen bytes: `proof.Snapshot.digest` of the same weights."""
    digest = hashlib.sha256()
    for name in sorted(plan):
        mask = plan[name]
        digest.update(f"{name}\0{_DTYPES[stored[name].dtype][2]}\0{mask.fingerprint}\0".encode())
        for piece in _packed(stored[name], mask, progress):
            digest.update(piece)
    return digest.hexdigest()


def _file_digests(files: Sequence[Path]) -> dict[str, str]:
    found = {}
    for path in files:
        digest, buffer = hashlib.sha256(), bytearray(_BLOCK)
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(memoryview(buffer)[:size])
        found[path.name] = digest.hexdigest()
    return found


@dataclass(frozen=True)
class Statement:
    """What `attest` vouches for.

    Attributes:
        plan: fingerprint of the plan.
        frozen: SHA-256 (hex) over names, dtypes and frozen bytes, as `snapshot(model, plan).digest`.
        frozen_elements: how many.
        base, tuned: file name -> SHA-256 (hex) of the whole file.
        package: the version that wrote it.
    """

    plan: str
    frozen: str
    frozen_elements: int
    base: dict[str, str]
    tuned: dict[str, str]
    package: str

    def save(self, path: PathLike) -> None:
        """Write as JSON; a crash leaves an older file as it was."""
        content = {"format": _FORMAT, "version": _VERSION, "checksum": self._checksum(), **asdict(self)}
        write_atomically(Path(path), (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    def _checksum(self) -> str:
        """Finds accidents. Forgery it does not."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: PathLike) -> Statement:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no statement, damaged, or of a later version.
        """
        what, source = "Statement.load", Path(path)
        if not source.is_file():
            raise FileNotFoundError(f"{what}: no file {os.fspath(path)!r}")
        if source.stat().st_size > _LARGEST_STATEMENT:
            raise ValueError(f"{what}: {os.fspath(path)!r} has {source.stat().st_size:,} bytes: no statement")
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
            kind, version, checksum = (content.pop(key) for key in ("format", "version", "checksum"))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{what}: {os.fspath(path)!r} is no statement ({error!r})") from error
        if kind != _FORMAT or version != _VERSION:
            raise ValueError(
                f"{what}: {os.fspath(path)!r} is {kind!r} of version {version!r}, this package reads {_FORMAT!r} of "
                f"version {_VERSION}"
            )
        expected = {"plan": str, "frozen": str, "frozen_elements": int, "base": dict, "tuned": dict, "package": str}
        if content.keys() != expected.keys() or any(type(content[key]) is not kind for key, kind in expected.items()):
            raise ValueError(f"{what}: {os.fspath(path)!r} does not hold {', '.join(expected)}; it is damaged")
        found = cls(**content)
        if found._checksum() != checksum:
            raise ValueError(f"{what}: {os.fspath(path)!r} was altered: it does not match its checksum")
        return found


def attest(
    base: PathLike,
    tuned: PathLike,
    plan: FreezePlan,
    path: PathLike | None = None,
    *,
    tied: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Statement:
    """`compare` two checkpoints, and state that no frozen byte differs, for `check`.

    Args:
        base, tuned, plan, tied, progress: as in `compare`.
        path: where to write the statement.

    Raises:
        FrozenBytesChangedError: frozen bytes differ; it carries the report. Nothing is written.
        FileNotFoundError, ValueError, TypeError: as `compare`.
    """
    from . import __version__

    operation = "audit.attest"
    one, other = _opened(base, operation, "base"), _opened(tuned, operation, "tuned")
    report = _compare(one, other, plan, tied, operation, progress)
    if not report.ok:
        raise FrozenBytesChangedError(report)
    told, (stored,) = _told_names(plan, tied, {"tuned": other}, operation)
    digest = _frozen_digest(stored, told, _nothing)
    found = Statement(
        plan.fingerprint, digest, report.frozen, _file_digests(one.files), _file_digests(other.files), __version__
    )
    one.unchanged(operation)
    other.unchanged(operation)
    if path is not None:
        found.save(path)
    return found


class FrozenBytesChangedError(ValueError):
    """Frozen bytes of two checkpoints differ.

    Attributes:
        report: what was found.
    """

    def __init__(self, report: AuditReport) -> None:
        super().__init__(f"audit.attest: frozen bytes differ, nothing was attested\n{report}")
        self.report = report


def check(
    tuned: PathLike,
    plan: FreezePlan,
    statement: Statement,
    *,
    tied: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Verify a tuned checkpoint against a statement, without the base: are its frozen bytes those attested?

    Files with other hashes than those attested (trained further, saved anew) are a note, not a failure.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `compare`.
    """
    operation = "audit.check"
    opened = _opened(tuned, operation, "tuned")
    told, (stored,) = _told_names(plan, tied, {"tuned": opened}, operation)
    _checked(told, stored, operation, "tuned")
    report = AuditReport(plan.fingerprint, notes=_said(tied), attested=True)
    report.tensors = [
        TensorChanges(name, mask.shape, stored[name].dtype, mask.frozen_count, mask.live_count)
        for name, mask in told.items()
    ]
    if plan.fingerprint != statement.plan:
        report.trouble.append(f"the statement is of another plan, {statement.plan[:12]}")
    elif _frozen_digest(stored, told, progress or _nothing) != statement.frozen:
        report.trouble.append("frozen bytes are not those attested (which ones, a comparison with the base would tell)")
    if sorted(_file_digests(opened.files).values()) != sorted(statement.tuned.values()):
        report.notes.append("the files are others than those attested: trained further, or saved anew")
    opened.unchanged(operation)
    return report
