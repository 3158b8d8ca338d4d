"""Audits on disk: two checkpoints compared under a plan, without a model, without torch, in constant memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from textwrap import fill
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .checkpoint import DTYPES, Checkpoint, Files, PathLike, Stored, Window, located, opened, windows

#: Called with how many bytes of the checkpoints were gone through since the last call.
Progress: TypeAlias = Callable[[int], object]

_THREADS: Final = min(4, os.cpu_count() or 1)
_BF16, _FP16 = 1, 2  # csrc/audit.h's Value
_HEAD: Final = 4096  # bytes by which tensors that may be copies are told apart


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
        tensors: of every tensor that both checkpoints hold (of `check`: that the plan names), and of every further name
            under which one of them holds a weight of the plan.
        uncompared: tensors outside the plan that were not compared, and why. `ok` says nothing about them.
        trouble: what else is wrong; the report is then not `ok`.
        notes: what is worth knowing.
        attested: the frozen bytes were compared as a whole, with a statement's digest.
    """

    plan: str
    tensors: list[TensorChanges] = field(default_factory=list)
    uncompared: dict[str, str] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    attested: bool = False

    @property
    def ok(self) -> bool:
        """Whether it is proven that nothing frozen changed: no frozen byte of a weight of the plan, under any name."""
        return not self.trouble and not any(t.frozen_changed or (t.frozen and t.trouble) for t in self.tensors)

    @property
    def frozen(self) -> int:
        """Frozen elements that were compared."""
        return sum(t.frozen for t in self.tensors if not t.trouble)

    @property
    def frozen_bytes(self) -> int:
        """Their bytes."""
        return sum(t.frozen * DTYPES[t.dtype][0] for t in self.tensors if not t.trouble)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        frozen_changed = sum(t.frozen_changed for t in self.tensors)
        lines = [f"plan {self.plan[:12]}"]
        shown: list[str] = []
        for one in self.tensors:
            if one.first_changed is not None:
                row, col, before, after = one.first_changed
                shown.append(
                    f"  {one.name}\n    {one.frozen_changed:,} of {one.frozen:,} frozen elements changed, first at\n"
                    f"    row {row}, column {col}: 0x{before} became 0x{after}"
                )
            elif one.frozen and one.trouble:
                shown.append(f"  {one.name}\n    {one.trouble}")
        lines += _few(shown)
        for texts in (self.trouble, self.notes):
            lines += _few([fill(line, 80, subsequent_indent="  ", break_long_words=False) for line in texts])
        count = f"{len(self.uncompared):,} tensor{'s' * (len(self.uncompared) > 1)}"
        if self.uncompared:
            lines.append(f"not compared: {count} outside the plan")
            if not self.attested:  # of a single checkpoint they are all the others
                lines += _few([f"  {name}\n    {why}" for name, why in self.uncompared.items()])
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
        but = f" ({count} outside the plan: not compared)" if self.uncompared else ""
        lines.append(f"proven: no frozen byte differs{but}" if self.ok else "NOT proven")
        return "\n".join(lines)


def _few(lines: list[str]) -> list[str]:
    return lines[:20] + ([f"  … and {len(lines) - 20} more"] if len(lines) > 20 else [])


# --------------------------------------------------------------------------------------------------------- comparing


class _Matrix:
    """A mask over a tensor as the comparison takes it: a matrix in windows, and what is frozen in each of them.

    The entries of a vector are columns of one row here, so that nothing is held for more than a window at a time.
    """

    def __init__(self, mask: FreezeMask, width: int) -> None:
        self.width, self.bits = width, mask.bits
        self.rows, self.cols = mask.matrix_shape
        self._frozen = mask.frozen_rows, mask.frozen_cols
        if self.cols == 1:
            self.rows, self.cols, self._frozen = 1, self.rows, self._frozen[::-1]
        self._all_cols: np.ndarray | None = None

    def windows(self) -> Iterator[Window]:
        return windows(self.rows, self.cols, self.width)

    def flags(self, window: Window) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """uint8 per row and per column, and the bits of the elements; None: no column, no element is frozen."""
        rows, cols = self._frozen
        return (
            _flags(rows, window.row, window.rows),
            self._cols(window) if cols.size else None,
            self._bits(window) if self.bits is not None else None,
        )

    def _cols(self, window: Window) -> np.ndarray:
        if window.cols < self.cols:
            return _flags(self._frozen[1], window.col, window.cols)
        if self._all_cols is None:
            self._all_cols = _flags(self._frozen[1], 0, self.cols)
        return self._all_cols

    def _bits(self, window: Window) -> np.ndarray:
        """Bits of the window's elements, beginning with a byte, 8 bytes of 0 behind them."""
        assert self.bits is not None
        first, count = window.first, window.rows * window.cols
        chosen = np.unpackbits(
            self.bits[first // 8 : (first + count + 7) // 8], count=first % 8 + count, bitorder="little"
        )
        return np.concatenate([np.packbits(chosen[first % 8 :], bitorder="little"), np.zeros(8, np.uint8)])

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
            chosen: np.ndarray = matrix[rows != 0]
        elif part == "cols":
            assert cols is not None
            chosen = matrix[rows == 0][:, cols != 0]
        else:
            assert bits is not None
            chosen = matrix.reshape(-1)[np.unpackbits(bits, count=matrix.size, bitorder="little").view(bool)]
        return chosen.tobytes()


def _flags(index: np.ndarray, start: int, count: int) -> np.ndarray:
    """uint8: which of ``count`` places from ``start`` on are in an ascending index."""
    low, high = np.searchsorted(index, (start, start + count))
    flags = np.zeros(count, np.uint8)
    flags[index[low:high] - start] = 1
    return flags


def _difference(
    before: np.ndarray,
    after: np.ndarray,
    value: int,
    rows: np.ndarray,
    cols: np.ndarray | None,
    bits: np.ndarray | None,
) -> tuple[int, int, int, int, float, float, float]:
    """Twin of ``compare`` in csrc/audit.cpp, for where there is no extension. uint8 [rows, bytes] each."""
    width = next(size for size, code, _ in DTYPES.values() if code == value)
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
    from .. import _C

    def _compared(
        before: np.ndarray, after: np.ndarray, value: int, rows: np.ndarray, cols: np.ndarray | None,
        bits: np.ndarray | None,
    ) -> tuple[int, int, int, int, float, float, float]:  # fmt: skip
        width = next(size for size, code, _ in DTYPES.values() if code == value)
        return _C.compare(
            before.ctypes.data, after.ctypes.data, before.shape[0], before.shape[1] // width, value, rows.ctypes.data,
            0 if cols is None else cols.ctypes.data, 0 if bits is None else bits.ctypes.data,
        )  # fmt: skip

except ImportError:
    _compared = _difference


class _Pair(NamedTuple):
    """A tensor of the base and one of the tuned checkpoint that should have the same frozen bytes."""

    name: str
    base: Stored
    tuned: Stored
    mask: FreezeMask


def _blocks(files: Files, stored: Stored, matrix: _Matrix, digest: Any = None) -> Iterator[tuple[Window, np.ndarray]]:
    """A tensor, window by window; its frozen bytes go into ``digest``.

    Where a mask has more than one part, the tensor is read once more for each further one: the digest wants them one
    behind the other.
    """
    parts = matrix.parts if digest is not None else []
    for window, block in zip(matrix.windows(), files.read(stored, matrix.windows()), strict=True):
        for part in parts[:1]:
            digest.update(matrix.frozen(part, window, block))
        yield window, block
    for part in parts[1:]:
        for window, block in zip(matrix.windows(), files.read(stored, matrix.windows()), strict=True):
            digest.update(matrix.frozen(part, window, block))


def _changes(pair: _Pair, files: tuple[Files, Files], progress: Progress, digest: Any = None) -> TensorChanges:
    """Compare one tensor, block by block; ``digest`` takes the frozen bytes of the tuned one."""
    name, base, tuned, mask = pair
    found = TensorChanges(name, base.shape, base.dtype, mask.frozen_count, mask.live_count)
    if base.dtype != tuned.dtype:
        found.dtype = f"{base.dtype} -> {tuned.dtype}"
        found.trouble = f"dtype changed from {base.dtype} to {tuned.dtype}; bytes cannot be compared across dtypes"
        progress(base.nbytes + tuned.nbytes)
        return found
    width, value, _ = DTYPES[base.dtype]
    matrix, total, squares = _Matrix(mask, width), 0.0, 0.0
    both = _blocks(files[0], base, matrix), _blocks(files[1], tuned, matrix, digest)
    for (window, before), (_, after) in zip(*both, strict=True):
        frozen, first, live, strange, largest, added, squared = _compared(before, after, value, *matrix.flags(window))
        if frozen and found.first_changed is None:
            at = slice(first * width, (first + 1) * width)
            was, now = (block.reshape(-1)[at].tobytes()[::-1].hex() for block in (before, after))
            row, col = divmod(window.first + first, mask.matrix_shape[1])
            found.first_changed = (row, col, was, now)
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


# ------------------------------------------------------------------------------------------------------------- names


class _Weights:
    """The weights of a plan, and the names each goes by in the checkpoints.

    Attributes:
        plan: has each weight once, under the first of the plan's names for it.
        names: of every weight that has more than one name, plan or not: that name -> all of them.
        untied: what was said not to be one of them.
        stored: word for a checkpoint -> its tensors.
    """

    def __init__(
        self,
        plan: FreezePlan,
        tied: Mapping[str, str] | None,
        untied: Collection[str],
        opened: Mapping[str, Checkpoint],
        operation: str,
    ) -> None:
        if not isinstance(plan, FreezePlan):
            raise TypeError(f"{operation}: plan is a {type(plan).__name__}, expected a FreezePlan")
        if isinstance(untied, str):
            raise TypeError(f"{operation}: untied is the text {untied!r}, expected a list of names")
        self.stored = {word: checkpoint.tensors for word, checkpoint in opened.items()}
        masks, self.names = dict(plan), {}
        for group in _joined(tied or {}):
            said = " and ".join(map(repr, sorted(group)))
            for word, stored in self.stored.items():
                if not group & stored.keys():
                    raise ValueError(
                        f"{operation}: {said} are said to be tied, so {word} should hold one of them; it holds none"
                    )
            planned = sorted(group & masks.keys())
            if any(masks[name] != masks[planned[0]] for name in planned):
                raise ValueError(f"{operation}: {said} are tied, but the plan has two different masks for them")
            self.names[planned[0] if planned else min(group)] = group
            for name in planned[1:]:
                del masks[name]
        self.plan = FreezePlan(masks)
        self._check(operation)
        for name in untied:
            if not any(name in stored for stored in self.stored.values()):
                raise ValueError(f"{operation}: untied names {name!r}, which is not among the tensors of a checkpoint")
            if name in plan or any(name in group for group in self.names.values()):
                raise ValueError(f"{operation}: untied names {name!r}, which the plan or tied names too")
        self.untied = set(untied)

    def _check(self, operation: str) -> None:
        if not any(mask.frozen_count for mask in self.plan.values()):
            raise ValueError(
                f"{operation}: the plan freezes nothing, so there is nothing to prove; is it the right one?"
            )
        for word, stored in self.stored.items():
            for name, mask in self.plan.items():
                held = self.held(name, word)
                if not held:
                    raise ValueError(
                        f"{operation}: the plan names {name!r}, which is not among the {len(stored)} tensors of "
                        f"{word}; is it a plan for another model? (of tied weights a checkpoint may hold another name: "
                        "say so with tied={name: other}, --tied NAME=OTHER)"
                    )
                for other in held:
                    if stored[other].shape != mask.shape:
                        raise ValueError(
                            f"{operation}: {other!r} of {word} has shape {stored[other].shape}, the plan expects "
                            f"{mask.shape}"
                        )

    def held(self, name: str, word: str) -> list[str]:
        """The names under which a checkpoint holds a weight, its first one first."""
        held = self.names.get(name, {name}) & self.stored[word].keys()
        return sorted(held, key=lambda other: (other != name, other))

    def tensor(self, name: str, word: str) -> Stored:
        """A weight in a checkpoint, by its first name there."""
        return self.stored[word][self.held(name, word)[0]]

    @property
    def known(self) -> set[str]:
        """Every name of every weight of the plan, and of those that ``tied`` names."""
        return {*self.plan, *(name for group in self.names.values() for name in group)}

    def pairs(self) -> list[_Pair]:
        """What is to be compared of base and tuned; of a weight every name that one of them holds it under."""
        base, tuned = self.stored.values()
        found = []
        for name in {**self.plan, **self.names}:
            usual = self.tensor(name, "base"), self.tensor(name, "tuned")
            mask = self.plan.get(name) or FreezeMask(usual[0].shape)
            found.append(_Pair(name, *usual, mask))
            for other in sorted({*self.held(name, "base"), *self.held(name, "tuned")}):
                both = base.get(other, usual[0]), tuned.get(other, usual[1])
                if both != usual:
                    found.append(_Pair(other, *both, mask))
        rest = (base.keys() & tuned.keys()) - self.known
        return found + [_Pair(name, base[name], tuned[name], FreezeMask(base[name].shape)) for name in rest]

    def beside(self, files: Files) -> dict[str, str]:
        """Tensors outside the plan that have the shape of a weight it freezes, so that a loader might find it there.

        Returns:
            name -> the weight of which it is a copy, in the base where that holds it; "" if it is none.
        """
        shapes = {mask.shape for mask in self.plan.values() if mask.frozen_count}
        found: dict[str, str] = {}
        for word, tensors in self.stored.items():
            # what the base has is not looked for again
            look = {name for name in tensors.keys() - self.known - found.keys() if tensors[name].shape in shapes}
            found |= dict.fromkeys(look, "")
            look -= self.untied
            sought = {tensors[name].shape for name in look}
            alike: dict[tuple[Any, ...], list[str]] = {}
            for weight, mask in self.plan.items():
                if mask.frozen_count and mask.shape in sought:
                    alike.setdefault(self._looks(self.tensor(weight, word), files), []).append(weight)
            for name in look:
                alone = sum(name in others for others in self.stored.values()) == 1
                for weight in alike.get(self._looks(tensors[name], files), ()):
                    held = self.tensor(weight, word)
                    # two biases that begin as zeros, and are compared each with its own, are not one for that
                    if (alone or _varies(held, files)) and _equal(held, tensors[name], files):
                        found[name] = weight
                        break
        return dict(sorted(found.items()))

    @staticmethod
    def _looks(stored: Stored, files: Files) -> tuple[str, tuple[int, ...], bytes]:
        """What copies have in common, at the price of one read."""
        return stored.dtype, stored.shape, files.head(stored, _HEAD)

    def copied(self, beside: Mapping[str, str]) -> list[str]:
        """Take copies for further names of what they are copies of; returns the notes that say so."""
        notes = []
        for name, weight in beside.items():
            if weight:
                self.names.setdefault(weight, {weight}).add(name)
                notes.append(f"{name!r} is taken for {weight!r} under another name, of which it is or was a copy")
        return notes

    def said(self, files: Files) -> list[str]:
        """What a report rests on. Names said to be one weight that a checkpoint contradicts are told."""
        notes = []
        for name, group in self.names.items():
            notes.append(f"{' and '.join(map(repr, sorted(group)))} are one weight: so it was said")
            for word, stored in self.stored.items():
                held = self.held(name, word)
                notes += [
                    f"  but {other!r} and {held[0]!r} are not equal in {word}"
                    for other in held[1:]
                    if not _equal(stored[held[0]], stored[other], files)
                ]
        return notes + [f"{name!r} is no weight of the plan: so it was said" for name in sorted(self.untied)]


def _joined(tied: Mapping[str, str]) -> list[set[str]]:
    """Names of each weight, out of pairs of them."""
    groups: list[set[str]] = []
    for pair in tied.items():
        joined = set(pair).union(*(group for group in groups if group & set(pair)))
        groups = [group for group in groups if not group & joined] + [joined]
    return groups


def _equal(one: Stored, other: Stored, files: Files) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    matrix = _Matrix(FreezeMask(one.shape), one.width)
    blocks = (files.read(stored, matrix.windows()) for stored in (one, other))
    return all(np.array_equal(a, b) for a, b in zip(*blocks, strict=True))


def _varies(stored: Stored, files: Files) -> bool:
    """Whether not all elements are the same."""
    first = files.head(stored, stored.width)
    matrix = _Matrix(FreezeMask(stored.shape), stored.width)
    return any(
        (block.view(f"<u{stored.width}") != np.frombuffer(first, f"<u{stored.width}")).any()
        for block in files.read(stored, matrix.windows())
    )


# ---------------------------------------------------------------------------------------------------------- comparing


def compare(
    base: PathLike,
    tuned: PathLike,
    plan: FreezePlan,
    *,
    tied: Mapping[str, str] | None = None,
    untied: Collection[str] = (),
    progress: Progress | None = None,
) -> AuditReport:
    """Compare two checkpoints on disk: did a frozen byte change, and how much did the rest?

    Both are read once, in blocks; a few megabytes are in memory at any time, beside the plan.

    A weight is compared under every name it goes by: those of ``tied``, and tensors outside the plan that are, byte for
    byte, copies of a weight of the plan in the base (or in the tuned checkpoint, if the base has no such tensor).
    Tensors that one checkpoint alone holds, or whose shape or dtype changed, are `AuditReport.uncompared`. Where one
    that a single checkpoint holds has the shape of a weight the plan freezes, a loader might find that weight there:
    then nothing is proven.

    Args:
        base, tuned: a safetensors file, or a folder as Hugging Face saves models to, sharded or not.
        plan: what was frozen.
        tied: name -> other name of the same weight, where checkpoints hold one of the two or both. Does the model that
            is loaded tie them (``tie_word_embeddings``)? Checkpoints cannot prove that.
        untied: names of tensors that are no weight of the plan under another name, though they look like it.
        progress: called with bytes that were gone through; `total_bytes` says of how many.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a damaged file, a folder whose index contradicts its files, checkpoints that the plan, ``tied`` or
            ``untied`` does not fit, a plan that freezes nothing.
        TypeError: ``plan`` or ``untied`` is something else.
    """
    operation = "audit.compare"
    one, other = opened(base, operation, "base"), opened(tuned, operation, "tuned")
    weights = _Weights(plan, tied, untied, {"base": one, "tuned": other}, operation)
    report, pairs, _ = _prepared(weights, plan)
    # in the order of the file, or the disk would have to jump about
    pairs.sort(key=lambda pair: (pair.base.file, pair.base.start))
    with Files() as files, ThreadPoolExecutor(_THREADS) as pool:
        _fill(report, pool.map(lambda pair: _changes(pair, (files, files), progress or _nothing), pairs))
    one.unchanged(operation)
    other.unchanged(operation)
    return report


def _prepared(weights: _Weights, plan: FreezePlan) -> tuple[AuditReport, list[_Pair], dict[str, str]]:
    """A report to fill, what is to be compared for it, and `_Weights.beside`."""
    with Files() as files:
        report = AuditReport(plan.fingerprint, notes=weights.said(files))
        beside = weights.beside(files)
    report.notes += weights.copied(beside)
    pairs = []
    for pair in weights.pairs():
        if pair.base.shape == pair.tuned.shape:
            pairs.append(pair)
        else:
            report.uncompared[pair.name] = f"has shape {pair.base.shape}, then {pair.tuned.shape}"
    (base, tuned), known = weights.stored.values(), weights.known
    for word, tensors, others in (("base", base, tuned), ("tuned", tuned, base)):
        for name in sorted(tensors.keys() - others.keys() - known):
            report.uncompared[name] = f"is in {word} alone"
            if name in beside and name not in weights.untied:
                report.trouble.append(_unknown(name, f"is in {word} alone"))
    return report, pairs, beside


def _unknown(name: str, why: str) -> str:
    return (
        f"{name!r} {why}, and has the shape of a weight the plan freezes: is it one, under another name? say so with "
        "tied (--tied NAME=OTHER), or with untied (--untied NAME) that it is none"
    )


def _fill(report: AuditReport, found: Iterable[TensorChanges]) -> None:
    report.tensors += found
    report.uncompared |= {one.name: one.trouble for one in report.tensors if one.trouble and not one.frozen}


def total_bytes(*checkpoints: PathLike) -> int:
    """Bytes of the files of some checkpoints.

    Raises:
        FileNotFoundError: one is not there.
    """
    return sum(file.stat().st_size for path in checkpoints for file in located(path, "audit", "checkpoint")[0])
