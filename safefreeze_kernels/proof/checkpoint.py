"""A checkpoint on disk as a stream: where its tensors lie, and their bytes in blocks, hashed on the way if asked to."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final, NamedTuple, TypeAlias

import numpy as np

PathLike: TypeAlias = "str | os.PathLike[str]"

BLOCK: Final = 1 << 20  # bytes of one tensor that are looked at together: two of them stay in a processor's cache
_LARGEST_JSON: Final = 256 << 20

# safetensors' dtypes: (bytes, csrc/audit.h's Value, torch's name)
DTYPES: Final[Mapping[str, tuple[int, int, str]]] = {
    "F32": (4, 0, "torch.float32"), "BF16": (2, 1, "torch.bfloat16"), "F16": (2, 2, "torch.float16"),
    "F64": (8, 6, "torch.float64"), "I64": (8, 6, "torch.int64"), "I32": (4, 5, "torch.int32"),
    "I16": (2, 4, "torch.int16"), "I8": (1, 3, "torch.int8"), "U8": (1, 3, "torch.uint8"), "BOOL": (1, 3, "torch.bool"),
    "U16": (2, 4, "torch.uint16"), "U32": (4, 5, "torch.uint32"), "U64": (8, 6, "torch.uint64"),
    "F8_E4M3": (1, 3, "torch.float8_e4m3fn"), "F8_E5M2": (1, 3, "torch.float8_e5m2"), "C64": (8, 6, "torch.complex64"),
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: ``nbytes`` from ``start`` of ``file``."""

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype][0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.width


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint and every tensor in them."""

    files: list[Path]
    tensors: dict[str, Stored]
    stamps: list[tuple[int, int]]

    def unchanged(self, operation: str) -> None:
        """Raise ValueError if a file was written to since it was opened."""
        if _stamps(self.files) != self.stamps:
            raise ValueError(f"{operation}: {os.fspath(self.files[0].parent)!r} was written to meanwhile; start anew")


def _stamps(files: Sequence[Path]) -> list[tuple[int, int]]:
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def located(path: PathLike, what: str) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a checkpoint; and, if it is sharded, tensor -> name of its file.

    ``what`` begins every error: the operation, and its word for the checkpoint.
    """
    given, shown = Path(path), f"{what} is {os.fspath(path)!r}"
    if given.is_file():
        return [given], None
    whole, index = given / "model.safetensors", given / "model.safetensors.index.json"
    if whole.is_file():
        if index.is_file():
            raise ValueError(
                f"{shown}, which holds {whole.name} and {index.name}, of which loaders take one or the other; remove "
                "what is not the model"
            )
        return [whole], None
    if not index.is_file():
        raise FileNotFoundError(f"{shown}, expected a .safetensors file, or a folder with {whole.name} or {index.name}")
    shown = f"{what}: {os.fspath(index)!r}"
    try:
        if index.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"it has {index.stat().st_size:,} bytes")
        homes = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(homes.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{shown} cannot be read ({error!r})") from error
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{shown} names files outside its folder")
    for name in names:
        if not (given / name).is_file():
            raise FileNotFoundError(f"{shown} names {name!r}, which is not there")
    return [given / name for name in names], homes


def opened(path: PathLike, what: str) -> Checkpoint:
    """A checkpoint's files and tensors. ``what`` begins every error."""
    files, homes = located(path, what)
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in _tensors(file, what):
            if name in found:
                raise ValueError(f"{what}: {name!r} is in two files, {found[name].file.name} and {file.name}")
            found[name] = stored
    held = {name: stored.file.name for name, stored in found.items()}
    if homes is not None and homes != held:
        name = min(name for name in {*homes, *held} if homes.get(name) != held.get(name))
        where = f"the index places {name!r} in {homes.get(name)!r}, it is in {held.get(name)!r}"
        raise ValueError(f"{what}: {where}; save the model anew")
    return Checkpoint(files, found, _stamps(files))


def _tensors(file: Path, what: str) -> Iterator[tuple[str, Stored]]:
    """What a file holds. safetensors checks its header: sizes, offsets, overlaps."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(file), framework="np"), file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{what}: {os.fspath(file)!r} is truncated or no safetensors file ({error})") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{what}: {name!r} has dtype {entry['dtype']}, which is not known here")
        yield name, Stored(file, 8 + size + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))


# ----------------------------------------------------------------------------------------------------------- reading


class Window(NamedTuple):
    """Elements of a matrix that lie next to each other: whole rows, or some of one row.

    ``first`` is the first of them, counted row by row.
    """

    first: int
    row: int
    rows: int
    col: int
    cols: int


def windows(rows: int, cols: int, width: int) -> Iterator[Window]:
    """A matrix ``[rows, cols]`` of elements of ``width`` bytes, cut into windows of at most `BLOCK` bytes."""
    wide = max(1, BLOCK // width)
    high = max(1, wide // max(1, cols))
    for row in range(0, rows if cols else 0, high):
        for col in range(0, cols, wide):
            yield Window(row * cols + col, row, min(high, rows - row), col, min(wide, cols - col))


class Files(ExitStack):
    """Files that several threads read, each opened once: what the system reads ahead for one serves the others.

    Args:
        hashed: also take the SHA-256 of every file, from the blocks that are read; one thread may read then.
    """

    def __init__(self, *, hashed: bool = False) -> None:
        super().__init__()
        self._descriptors: dict[Path, int] = {}
        self._hashes: dict[Path, _Hash] = {}
        self._lock = Lock()
        self.callback(self._close)
        self._hashing = self.enter_context(ThreadPoolExecutor(1)) if hashed else None

    def _close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]

    def read(self, stored: Stored, parts: Iterable[Window]) -> Iterator[np.ndarray]:
        """uint8 [rows, bytes] of each window of a tensor seen as a matrix; each is valid until the next is asked for.

        Raises:
            ValueError: the file became shorter meanwhile.
        """
        descriptor, width = self._descriptor(stored.file), stored.width
        buffer = np.empty(min(max(BLOCK, width), stored.nbytes), np.uint8)
        for window in parts:
            block, start = buffer[: window.rows * window.cols * width], stored.start + window.first * width
            _read(descriptor, stored.file, start, block)
            hashing = None
            if self._hashing is not None:
                hashing = self._hashing.submit(self._hash(stored.file).take, start, block)
            yield block.reshape(window.rows, window.cols * width)
            if hashing is not None:
                hashing.result()  # before the buffer is used again

    def head(self, stored: Stored, most: int) -> bytes:
        """The first ``most`` bytes of a tensor, or all it has."""
        block = np.empty(min(most, stored.nbytes), np.uint8)
        _read(self._descriptor(stored.file), stored.file, stored.start, block)
        return block.tobytes()

    def _hash(self, file: Path) -> _Hash:
        if file not in self._hashes:
            self._hashes[file] = _Hash(file, self._descriptor(file))
        return self._hashes[file]

    def digests(self, checkpoint: Checkpoint) -> dict[str, str]:
        """File name -> SHA-256 (hex) of the whole file, of all files of a checkpoint; what was not read is read."""
        assert self._hashing is not None
        ends: dict[str, Future[str]] = {
            file.name: self._hashing.submit(self._hash(file).end, size)
            for file, (size, _) in zip(checkpoint.files, checkpoint.stamps, strict=True)
        }
        return {name: end.result() for name, end in ends.items()}


class _Hash:
    """SHA-256 of a file that somebody else reads.

    Blocks of theirs that come in the order of the file are hashed as they come; the rest is read here. So whatever
    the order, the hash is right; in the order of the file every byte is read once.
    """

    def __init__(self, file: Path, descriptor: int) -> None:
        self._file, self._descriptor, self._digest, self._done = file, descriptor, hashlib.sha256(), 0

    def take(self, start: int, block: np.ndarray) -> None:
        """``block`` was read from ``start`` on."""
        self._read_to(start)
        rest = block[max(0, self._done - start) :]
        self._digest.update(rest.data)
        self._done += len(rest)

    def end(self, size: int) -> str:
        """The digest (hex) of the file's ``size`` bytes."""
        self._read_to(size)
        return self._digest.hexdigest()

    def _read_to(self, end: int) -> None:
        buffer = np.empty(min(BLOCK, max(0, end - self._done)), np.uint8)
        while self._done < end:
            block = buffer[: end - self._done]
            _read(self._descriptor, self._file, self._done, block)
            self._digest.update(block.data)
            self._done += len(block)


def _read(descriptor: int, file: Path, start: int, into: np.ndarray) -> None:
    view, done = memoryview(into.data), 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], start + done)
        if not got:
            raise ValueError(f"{os.fspath(file)!r} became shorter while it was read")
        done += got
