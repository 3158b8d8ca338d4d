"""The GPU kernels as machine code: ``python -m benchmarks.sass [--arch 90 …] [--only PATTERN] [--quick]``.

Needs no GPU. Compiles every kernel of kernels/triton.py with the parameters and options it is launched with; takes the
CUDA kernels out of the built extension, or compiles csrc/cuda.cu where that holds none. Disassembles both and prints a
table. A kernel fails, and with it the command,

    if fewer 16-byte loads or stores are in it than its walk over neighbours needs, for every operand,
    if it takes more than `CEILING` registers, or spills any,
    if a multiplication and an addition are fused, or may be.

The last is read off the PTX, where a division is one instruction: in machine code it is a sequence of fused operations,
as IEEE division and square root are made here. PTX in which every operation names its rounding leaves nothing to fuse;
without, it is the assembler's option that counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

__all__ = ["CEILING", "Code", "Kernel", "UnavailableError", "cuda_codes", "judge", "triton_codes", "triton_kernels"]

ARCHS: Final = (80, 90, 100)
CEILING: Final = 64  # registers per thread: a multiprocessor then holds 1024 threads
THREADS: Final = 256  # of a block of csrc/cuda.cu
_REPOSITORY: Final = Path(__file__).parents[1]
_SOURCE: Final = _REPOSITORY / "csrc" / "cuda.cu"
_SIZES: Final = {"fp32": 4, "bf16": 2, "fp16": 2, "32 bits": 4, "16 bits": 2}


class UnavailableError(RuntimeError):
    """What is needed to compile or to disassemble is not here; the message says what."""


@dataclass(frozen=True)
class Kernel:
    """A kernel with its compile-time parameters, and the 16-byte accesses that its walk over neighbours needs."""

    backend: str
    name: str
    dtypes: str
    variant: str
    loads: int
    stores: int
    settings: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # Triton's

    def __str__(self) -> str:
        return ", ".join(word for word in (f"{self.backend} {self.name}", self.dtypes, self.variant) if word)


class Code(NamedTuple):
    """What became of a kernel on one architecture."""

    kernel: Kernel
    arch: int
    registers: int
    spilled: int  # bytes of stack, and instructions that use it
    loads: dict[int, int]  # bits of an access to global memory -> such instructions
    stores: dict[int, int]
    fused: int  # multiply-adds in the PTX, and operations that the assembler may fuse


def judge(code: Code) -> list[str]:
    """What is wrong with it; nothing if it passes."""
    kernel, wrong = code.kernel, []
    for word, found, needed in (("loads", code.loads, kernel.loads), ("stores", code.stores, kernel.stores)):
        if found.get(128, 0) < needed:
            wrong.append(f"{found.get(128, 0)} 16-byte {word}, expected {needed}")
    if code.registers > CEILING:
        wrong.append(f"{code.registers} registers, expected at most {CEILING}")
    if code.spilled:
        wrong.append(f"{code.spilled} spills")
    if code.fused:
        wrong.append(f"{code.fused} operations fused, or that may be")
    return wrong


# ------------------------------------------------------------------------------------------------- reading binaries


def _tool(name: str) -> str:
    """Path of a tool of CUDA's: Triton's wheel brings some."""
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else Path()
    found = shutil.which(name, path=str(folder)) or shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise UnavailableError(f"{name} was found neither in the Triton wheel nor on the PATH")
    return found


def _run(*command: Any, stdin: str | None = None) -> str:
    words = [str(word) for word in command]
    found = subprocess.run(words, capture_output=True, text=True, input=stdin)
    if found.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{found.stderr.strip()}")
    return found.stdout


class Function(NamedTuple):
    """A kernel as a binary holds it."""

    registers: int
    spilled: int
    loads: dict[int, int]
    stores: dict[int, int]


def disassemble(cubin: Path) -> dict[str, Function]:
    """Every kernel of a binary by its (mangled) name."""
    tool = _tool("cuobjdump")
    return read_functions(_run(tool, "-res-usage", cubin), _run(tool, "-sass", cubin))


def read_functions(usage: str, sass: str) -> dict[str, Function]:
    """What ``cuobjdump -res-usage`` and ``cuobjdump -sass`` say of one architecture."""
    resources = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    _, *parts = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)
    bodies = dict(zip(parts[::2], parts[1::2], strict=True))
    if not resources or {name for name, *_ in resources} != set(bodies):
        raise ValueError(f"sass: cuobjdump tells resources of {len(resources)} kernels and shows {len(bodies)}")
    functions = {}
    for name, registers, stack, local in resources:
        body = bodies[name]
        spilled = int(stack) + int(local) + len(re.findall(r"\b(?:LDL|STL)\b", body))
        functions[name] = Function(int(registers), spilled, _accesses(body, "LDG"), _accesses(body, "STG"))
    return functions


def _accesses(sass: str, opcode: str) -> dict[int, int]:
    """Bits per thread of each access to global memory -> how many such instructions."""
    widths: Counter[int] = Counter()
    for suffixes in re.findall(rf"\b{opcode}((?:\.\w+)*)", sass):
        sizes = re.findall(r"\.[US]?(8|16|64|128|256)(?!\w)", suffixes)
        widths[int(sizes[0]) if sizes else 32] += 1
    return dict(widths)


def count_fused(ptx: str, *, assembler_fuses: bool = True) -> int:
    """Multiply-adds, and if the assembler fuses, operations that it may: those that name no rounding."""
    fused = len(re.findall(r"\bfma\.", ptx))
    return fused + (len(re.findall(r"\b(?:mul|add|sub)(?:\.ftz)?\.f(?:32|64|32x2)\b", ptx)) if assembler_fuses else 0)
