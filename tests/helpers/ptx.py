"""A SIMT interpreter of PTX: runs what compilers emit for NVIDIA GPUs, on host memory, without a GPU.

All threads of some blocks are the lanes of numpy arrays. Threads that diverge wait for those behind them (the lowest
program counter runs first) and meet again at labels. What a GPU leaves to chance, or would not report, is a
`FaultError` here, which names the kernel and the line:

    an access outside the memory that the caller declared, or at an address that is not a multiple of its width,
    two threads that write to the same global memory in one launch,
    two warps that access the same shared memory, one of them writing, with no barrier between,
    a barrier that some threads of a block never reach, a shuffle among lanes that have diverged,
    an instruction that is not known.

Shared memory and registers begin with a pattern that is not zero. A computed NaN is the one that the hardware makes.
Counted are requests to global memory (of a warp), the 32-byte sectors they touch, and instructions that warps issue,
without the moves that the assembler takes away. What is not modelled: time, caches, the assembler.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from ptx_decoder import Decoder, Some, Step
from ptx_operations import UNSIGNED, FaultError, type_of

WARP: Final = 32
SECTOR: Final = 32  # bytes
POISON: Final = 0xA5
_TYPES: Final = tuple(f"{kind}{bits}" for kind in "busf" for bits in (8, 16, 32, 64))
_THREADS: Final = 16384  # of blocks that run side by side


class Memory:
    """Global memory: ranges of this process's own, which the caller declares and keeps alive."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        """``ranges``: pairs (address, bytes); those without bytes are left out."""
        merged: list[list[int]] = []
        for first, size in sorted(pair for pair in ranges if pair[1]):
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], first + size)
            else:
                merged.append([first, first + size])
        table = np.array(merged or [[64, 64]], np.uint64)
        self._starts, self._ends = table[:, 0].copy(), table[:, 1].copy()
        self._base = np.uint64(int(self._starts[0]) // 64 * 64)
        size = (int(self._ends[-1]) - int(self._base) + 63) // 64 * 64
        bytes_ = np.frombuffer((ctypes.c_uint8 * size).from_address(int(self._base)), np.uint8)
        self._views = {width: bytes_.view(dtype) for width, dtype in UNSIGNED.items()}

    def check(self, addresses: np.ndarray, width: int) -> str:
        """What is wrong with accesses of ``width`` bytes; empty: nothing."""
        row = np.searchsorted(self._starts, addresses, "right") - 1
        outside = (row < 0) | (addresses + np.uint64(width) > self._ends[row])
        if outside.any():
            return f"{width} bytes at {int(addresses[outside][0]):#x}, {int(outside.sum())} such, outside all memory"
        return ""

    def words(self, addresses: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Words of ``width`` bytes: which ones are at these addresses, and all."""
        return (addresses - self._base) // np.uint64(width), self._views[width]


@dataclass
class Counts:
    """What launches did. ``instructions``: of warps; ``threads``: that were launched."""

    requests: int = 0
    sectors: int = 0
    instructions: int = 0
    threads: int = 0


class _Log:
    """Accesses of one launch to one kind of memory."""

    def __init__(self) -> None:
        self._entries: list[tuple[np.ndarray, np.ndarray, int, bool, int]] = []

    def add(self, places: np.ndarray, threads: np.ndarray, width: int, store: bool, line: int) -> None:
        self._entries.append((places, threads, width, store, line))

    def traffic(self) -> tuple[int, int]:
        """Requests and sectors."""
        if not self._entries:
            return 0, 0
        sizes = [len(entry[0]) for entry in self._entries]
        sectors = np.concatenate([entry[0] for entry in self._entries]) // np.uint64(SECTOR)
        warps = np.concatenate([entry[1] for entry in self._entries]) // WARP
        number = np.repeat(np.arange(len(sizes)), sizes) * (int(warps.max()) + 1) + warps
        order = np.lexsort((sectors, number))
        number, sectors = number[order], sectors[order]
        new = np.diff(number) != 0
        return 1 + int(new.sum()), 1 + int((new | (np.diff(sectors) != 0)).sum())

    def race(self, group: int) -> str:
        """Two accesses of the same memory, one of them writing, by different groups of threads; empty: none. Global
        memory may be read while it is written (``group`` 1): kernels read what they do not use."""
        unit = 1 if any(entry[2] == 1 and entry[3] for entry in self._entries) else 2
        stores = self._units([entry for entry in self._entries if entry[3]], unit)
        loads = self._units([entry for entry in self._entries if not entry[3] and group > 1], unit)
        units, who, lines = stores[0], stores[1] // group, stores[2]
        again = np.flatnonzero((units[1:] == units[:-1]) & (who[1:] != who[:-1])) if units.size else units
        if group > 1:  # in shared memory Triton has threads that hold the same value write it together
            again = again[lines[again] != lines[again + 1]]
        if again.size:
            i = int(again[0])
            return f"written at line {lines[i]} by thread {stores[1][i]}, at line {lines[i + 1]} by {stores[1][i + 1]}"
        if units.size and loads[0].size:
            at = np.minimum(np.searchsorted(units, loads[0]), units.size - 1)
            met = np.flatnonzero((units[at] == loads[0]) & (who[at] != loads[1] // group))
            if met.size:
                i, j = int(met[0]), int(at[met[0]])
                return (
                    f"written at line {lines[j]} by thread {stores[1][j]}, read at line {loads[2][i]} by {loads[1][i]}"
                )
        return ""

    @staticmethod
    def _units(entries: Sequence[tuple[np.ndarray, np.ndarray, int, bool, int]], unit: int) -> tuple[np.ndarray, ...]:
        """Bytes, or pairs of them (``unit`` 2), in order, with the thread and the line of each access."""
        found = [
            ((places // np.uint64(unit))[:, None] + np.arange(max(width // unit, 1), dtype=np.uint64), threads, line)
            for places, threads, width, _, line in entries
        ]
        if not found:
            return (np.zeros(0, np.uint64),) * 3
        units = np.concatenate([units.ravel() for units, _, _ in found])
        who = np.concatenate([np.repeat(threads, units.shape[1]) for units, threads, _ in found])
        lines = np.concatenate([np.full(units.size, line) for units, _, line in found])
        order = np.lexsort((who, units))
        return units[order], who[order], lines[order]


# ------------------------------------------------------------------------------------------------------- reading PTX


@dataclass(frozen=True)
class _Statement:
    line: int
    text: str
    guard: str  # a predicate, perhaps negated; or empty
    opcode: str
    operands: tuple[str, ...]


class Module:
    """The kernels of a PTX file, by name."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text.split("\n\t.section")[0])
        text = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
        self.kernels: dict[str, Kernel] = {}
        starts = [match.start() for match in re.finditer(r"(?:\.visible\s+|\.weak\s+)?\.entry\b", text)]
        shared = _shared(text[: starts[0]] if starts else text)
        for first, last in zip(starts, [*starts[1:], len(text)], strict=True):
            kernel = Kernel(text[first:last], text.count("\n", 0, first) + 1, shared)
            self.kernels[kernel.name] = kernel


def _shared(text: str) -> dict[str, tuple[int, int]]:
    """Names of shared variables -> alignment and bytes; 0: as many as the launch says."""
    found = re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b(\d+)\s+([\w$]+)(?:\[(\d*)\])?", text)
    return {name: (int(align), int(size or 0) * int(bits) // 8) for align, bits, name, size in found}


def _statements(body: str, line: int) -> Iterator[tuple[str, Any]]:
    """``("label", name)``, ``("registers", (type, names))`` and ``("code", statement)``, in order."""
    scopes = 0
    renamed: list[dict[str, str]] = [{}]  # in each pair of braces: its registers, under names that are theirs alone
    for chunk in re.split(r"(?<=;)", body):
        here = line + chunk[: len(chunk) - len(chunk.lstrip())].count("\n")
        line += chunk.count("\n")
        text = chunk.strip().rstrip(";").strip()
        while found := re.match(r"([{}])\s*|([\w$]+):\s+|\.(?:maxntid|reqntid|maxnreg|minnctapersm)\b[^\n{]*\s*", text):
            if found[1] == "{":
                scopes += 1
                renamed.append({})
            elif found[1]:
                renamed.pop()
            elif found[2]:
                yield "label", found[2]
            here += found[0].count("\n")
            text = text[found.end() :]
        if not text or text.startswith((".pragma", ".shared")):
            continue
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            for name in re.split(r"\s*,\s*", names):
                own = f"{name}@{scopes}" if len(renamed) > 2 else name  # the first braces are the body's
                renamed[-1][name] = own
                yield "registers", (kind[1:], own)
            continue
        for names in renamed[2:]:
            for name, other in names.items():
                text = re.sub(rf"(?<![\w%$]){re.escape(name)}(?![\w@])", other, text)
        guard, opcode, rest = re.fullmatch(r"(?:@(!?[%\w@]+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        operands = tuple(re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest))
        yield "code", _Statement(here, " ".join(text.split()), guard or "", opcode, operands)


class Kernel:
    """One entry of a module. Statements are decoded when their block is first run."""

    def __init__(self, text: str, line: int, shared: dict[str, tuple[int, int]]) -> None:
        head, body = text.split("{", 1)
        named = re.search(r"\.entry\s+([\w$]+)", head)
        assert named is not None
        self.name = named[1]
        self.params: dict[str, tuple[int, int]] = {}  # name -> offset, bytes
        self._lines = line + head.count("\n")
        at = 0
        for declared in re.findall(r"\.param\s+([^,)]*)", head):
            words = declared.split()
            width = type_of(next(w for w in words if w[1:] in _TYPES)[1:]).itemsize
            align = int(words[words.index(".align") + 1]) if ".align" in words and ".ptr" not in words else width
            name, count = re.fullmatch(r"([\w$]+)(?:\[(\d+)\])?", words[-1]).groups()  # type: ignore[union-attr]
            at = -(-at // align) * align
            self.params[name] = at, width * int(count or 1)
            at += self.params[name][1]
        self.param_bytes = at
        self._shared: dict[str, int] = {}
        at = 16
        for name, (align, size) in sorted({**shared, **_shared(body)}.items(), key=lambda item: item[1][1] == 0):
            if re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", body):
                at = -(-at // align) * align
                self._shared[name] = at
                at += size
        self.shared_bytes = at
        self.registers: dict[str, tuple[int, int]] = {}  # name -> number, bytes (0: a predicate)
        self._ranges: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self._body = "{" + body
        self.blocks: list[list[_Statement]] = []  # read when it is first run
        self.decoded: list[tuple[list[Step], int] | None] = []
        self.used: set[str] = set()  # opcodes of blocks that ran

    def read(self) -> None:
        """Its blocks, none of them decoded."""
        self.blocks = [[]]
        for kind, what in _statements(self._body, self._lines):
            if kind == "label":
                if self.blocks[-1]:
                    self.blocks.append([])
                self.labels[what] = len(self.blocks) - 1
            elif kind == "registers":
                width = type_of(what[0]).itemsize if what[0] != "pred" else 0
                if found := re.fullmatch(r"(%\w+)<(\d+)>", what[1]):
                    self._ranges[found[1]] = width
                else:
                    self.registers[what[1]] = len(self.registers), width
            else:
                self.blocks[-1].append(what)
                if what.opcode.split(".")[0] in ("bra", "ret", "exit", "bar", "barrier"):
                    self.blocks.append([])
        self.decoded = [None] * len(self.blocks)

    def register(self, name: str) -> tuple[int, int] | None:
        if name not in self.registers:
            family = re.fullmatch(r"(%[a-z]+)\d+", name)
            if family is None or family[1] not in self._ranges:
                return None
            self.registers[name] = len(self.registers), self._ranges[family[1]]
        return self.registers[name]

    def symbol(self, name: str) -> int | None:
        """An address in shared memory, or of a parameter."""
        return self._shared[name] if name in self._shared else self.params.get(name, (None,))[0]

    def run(
        self, grid: int, threads: int, params: Sequence[bytes], memory: Memory, counts: Counts | None = None,
        *, shared: int = 0,
    ) -> None:  # fmt: skip
        """A launch of ``grid`` blocks of ``threads``. ``params``: the bytes of each; ``shared``: bytes of shared
        memory that the launch asks for.

        Raises:
            FaultError: the kernel did what it must not, or what is not known here.
        """
        if [len(value) for value in params] != [size for _, size in self.params.values()]:
            sizes = [size for _, size in self.params.values()]
            raise FaultError(f"{self.name}: parameters of {[len(p) for p in params]} bytes, expected {sizes}")
        if not self.blocks:
            self.read()
        block = bytearray(-(-self.param_bytes // 16) * 16)
        for (at, size), value in zip(self.params.values(), params, strict=True):
            block[at : at + size] = value
        log, counts = _Log(), counts if counts is not None else Counts()
        side_by_side = max(_THREADS // threads, 1)
        for first in range(0, grid, side_by_side):
            blocks = min(side_by_side, grid - first)
            machine = _Machine(self, first, blocks, grid, threads, bytes(block), memory, shared, log)
            with np.errstate(all="ignore"):
                machine.run()
            counts.instructions += machine.issued
            if race := machine.shared_log.race(WARP):
                raise FaultError(f"{self.name}: a race in shared memory: {race}, and no barrier between")
        if race := log.race(1):
            raise FaultError(f"{self.name}: a race in global memory: {race}")
        requests, sectors = log.traffic()
        counts.requests, counts.sectors = counts.requests + requests, counts.sectors + sectors
        counts.threads += grid * threads


# ------------------------------------------------------------------------------------------------------- running it


class _Machine:
    """Blocks ``first`` and following, from launch to end."""

    def __init__(
        self, kernel: Kernel, first: int, blocks: int, grid: int, threads: int, params: bytes, memory: Memory,
        shared: int, log: _Log,
    ) -> None:  # fmt: skip
        self.kernel, self.memory, self.log, self.shared_log = kernel, memory, log, _Log()
        self.n, self.per_block, self.issued = blocks * threads, threads, 0
        self.all = np.arange(self.n)
        self.block, self.offset = self.all // threads, first * threads
        tid, width = (self.all % threads).astype(np.uint32), np.uint32
        self.special = {
            "%tid.x": tid, "%ctaid.x": (self.block + first).astype(width), "%laneid": tid % width(WARP),
            "%warpid": tid // width(WARP), "%ntid.x": width(threads), "%nctaid.x": width(grid),
            **{f"%{of}.{axis}": width(of[0] == "n") for of in ("tid", "ctaid", "ntid", "nctaid") for axis in "yz"},
        }  # fmt: skip
        self.r: list[Any] = []
        self.params = {w: np.frombuffer(params, dtype) for w, dtype in UNSIGNED.items()}
        self.stride = -(-(kernel.shared_bytes + shared) // 16) * 16
        self.shared = {8: np.full(blocks * self.stride // 8, int.from_bytes(bytes([POISON] * 8), "little"), np.uint64)}
        self.shared |= {w: self.shared[8].view(dtype) for w, dtype in UNSIGNED.items() if w < 8}
        self.epoch = np.zeros(blocks, np.int64)  # barriers that each block has passed
        self.groups: dict[int, Some] = {0: self.all}
        self.waiting: dict[int, np.ndarray] = {}

    def reg(self, number: int, width: int) -> np.ndarray:
        if number >= len(self.r):
            self.r += [None] * (number + 1 - len(self.r))
        if self.r[number] is None:
            self.r[number] = (
                np.full(self.n, int.from_bytes(bytes([POISON] * width), "little"), UNSIGNED[width])
                if width
                else np.ones(self.n, bool)
            )
        found: np.ndarray = self.r[number]
        return found

    def run(self) -> None:
        kernel = self.kernel
        while self.groups:
            at = min(self.groups)
            threads = self.groups.pop(at)
            if at >= len(kernel.blocks):
                raise FaultError(f"{kernel.name}: ran past the end")
            some = None if threads.size == self.n else threads
            decoded = kernel.decoded[at]
            if decoded is None:
                decoded = kernel.decoded[at] = _decode(kernel, at)
            steps, issued = decoded
            warps = threads // WARP
            self.issued += issued * (1 + int(np.count_nonzero(np.diff(warps))))
            self.next, self.target = at + 1, (threads, None)
            for step in steps:
                step(self, some)
            stay, leave = self.target
            if leave is not None:
                self.join(leave[0], leave[1])
            self.join(self.next, stay)
        if self.waiting:
            at, threads = next(iter(self.waiting.items()))
            raise FaultError(
                f"{kernel.name}: {threads.size} threads wait at a barrier (block {at}) that others never reach"
            )

    def join(self, at: int, threads: np.ndarray) -> None:
        """Threads that go on at a block of the program."""
        if threads.size:
            there = self.groups.get(at)
            self.groups[at] = threads if there is None else np.sort(np.concatenate([there, threads]))

    def wait(self, at: int, threads: np.ndarray) -> None:
        """At the barrier before a block of the program; those whose whole block is there go on."""
        if at in self.waiting:
            threads = np.sort(np.concatenate([self.waiting.pop(at), threads]))
        here = np.bincount(self.block[threads], minlength=self.epoch.size) == self.per_block
        gone = here[self.block[threads]]
        self.epoch[here] += 1
        self.join(at, threads[gone])
        if not gone.all():
            self.waiting[at] = threads[~gone]

    def access(
        self, space: str, some: Some, at: np.ndarray, width: int, count: int, store: bool, code: _Statement
    ) -> Any:
        """Where ``count`` words of ``width`` bytes lie: (indices of words, words)."""
        at = np.broadcast_to(np.asarray(at, np.uint64), (self.n if some is None else some.size,))
        threads, size = self.all if some is None else some, width * count
        if (at % np.uint64(size)).any():
            raise self.fault(code, f"{size} bytes at an address that is not a multiple of {size}")
        if space == "param":
            if int(at.max(initial=0)) + size > self.params[1].size or store:
                raise self.fault(code, "outside the parameters")
            return at // np.uint64(width), self.params[width]
        if space == "shared":
            if int(at.max(initial=0)) + size > self.stride or int(at.min(initial=16)) < 16:
                raise self.fault(code, "outside the shared memory")
            at = at + (self.block[threads] * self.stride).astype(np.uint64)
            epoch = self.epoch[self.block[threads]].astype(np.uint64) << np.uint64(32)
            self.shared_log.add(at + epoch, threads, size, store, code.line)
            return at // np.uint64(width), self.shared[width]
        if wrong := self.memory.check(at, size):
            raise self.fault(code, wrong)
        self.log.add(at, threads + self.offset, size, store, code.line)
        return self.memory.words(at, width)

    def fault(self, code: _Statement, what: str) -> FaultError:
        return FaultError(f"{self.kernel.name}, line {code.line}: {code.text}: {what}")


_FREE: Final = ("mov", "cvta", "ret", "exit")  # what the assembler takes away, or does once


def _decode(kernel: Kernel, at: int) -> tuple[list[Step], int]:
    """A block as functions, and how many instructions it counts for."""
    code = kernel.blocks[at]
    kernel.used |= {statement.opcode for statement in code}
    steps = [Decoder(kernel, statement).step() for statement in code]
    return steps, sum(statement.opcode.split(".")[0] not in _FREE for statement in code)
