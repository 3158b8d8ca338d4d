"""The CUDA and the Triton backend on CPU tensors, their launches run by the interpreter of PTX (ptx.py).

What runs is what compilers emit: `nvcc -ptx` of csrc/cuda.cu, with the flags of setup.py, and Triton's ``asm["ptx"]``.
Host code is the backend's own; csrc/cuda.cu's, which chooses kernels, is compiled for the host (cuda_on_host).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any, Final
from weakref import WeakKeyDictionary

import cuda_on_host
import torch
from ptx import Counts, Kernel, Memory, Module
from torch import Tensor

from benchmarks import sass
from safefreeze_kernels.kernels.cuda import CudaBackend
from safefreeze_kernels.kernels.gpu import GpuBackend, Launch
from safefreeze_kernels.kernels.triton import TritonBackend

ROOT: Final = Path(__file__).parents[2]
KEPT: Final = ROOT / "build" / "ptx"  # what was compiled, by a hash of what it was made from
ARCH: Final = 90


class Watched(GpuBackend):
    """Knows all memory that launches of an operation may touch: its tensors, and the tables made for it.

    Attributes:
        counts: what launches did, by kernel.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Counts] = {}
        self._given: list[Tensor | None] = []
        self._lock = RLock()

    def refusal(self, device: torch.device) -> str:
        return "" if device.type == "cpu" else "it takes CPU tensors only"

    @contextmanager
    def watching(self, *columns: Sequence[Tensor | None] | None) -> Iterator[None]:
        """An operation on these tensors: one at a time."""
        with self._lock:
            self._given = [tensor for column in columns for tensor in column or ()]
            yield

    def adamw_(self, work: Any, operands: Any, scalars: Any, scalar_set: Any, **options: Any) -> None:
        with self.watching(
            operands.params, operands.exp_avgs, operands.exp_avg_sqs, operands.max_exp_avg_sqs, operands.remainders,
            operands.grads, [scalars] if isinstance(scalars, Tensor) else None,
        ):  # fmt: skip
            super().adamw_(work, operands, scalars, scalar_set, **options)

    def norm(self, work: Any, tensors: Sequence[Tensor | None], kind: Any) -> Tensor:
        with self.watching(tensors):
            return super().norm(work, tensors, kind)

    def scale_(self, work: Any, tensors: Sequence[Tensor | None], factor: Tensor) -> None:
        with self.watching(tensors):
            super().scale_(work, tensors, factor)

    def zero_(self, work: Any, tensors: Sequence[Tensor | None]) -> None:
        with self.watching(tensors):
            super().zero_(work, tensors)

    def gather(self, work: Any, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        with self.watching(tensors, packed):
            super().gather(work, tensors, packed)

    def scatter_(self, work: Any, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        with self.watching(tensors, packed):
            super().scatter_(work, tensors, packed)

    def _upload(self, owner: object, device: torch.device, content: bytes) -> Tensor:
        uploaded = super()._upload(owner, device, content)  # type: ignore[safe-super]
        self._given.append(uploaded)
        return uploaded

    def _step(
        self, launch: Launch, tables: Sequence[Tensor | None], seed: int, seed_there: Tensor, **options: Any
    ) -> None:
        self._reach(launch, *tables, seed_there)
        super()._step(launch, tables, seed, seed_there, **options)  # type: ignore[safe-super]

    def _run(self, operation: str, launch: Launch, *tensors: Tensor, **options: Any) -> None:
        self._reach(launch, *tensors)
        super()._run(operation, launch, *tensors, **options)  # type: ignore[safe-super]

    def _reach(self, launch: Launch, *tensors: Tensor | None) -> None:
        work = launch.work
        self._given += [launch.tiles, launch.rows, work.parts, work._lists, work._bits, work._ages, *tensors]

    def memory(self, *more: tuple[int, int]) -> Memory:
        given = {(t.data_ptr(), t.numel() * t.element_size()) for t in self._given if t is not None}
        return Memory([*given, *more])

    def count(self, name: str) -> Counts:
        return self.counts.setdefault(name, Counts())

    def close(self) -> None:
        """Ends the process that compiles, if there is one."""


# ------------------------------------------------------------------------------------------------------------- CUDA


def kept(make: Callable[[], str], *inputs: Any) -> str:
    """A text that is made anew where what it was made from changed."""
    path = KEPT / hashlib.sha256(repr(inputs).encode()).hexdigest()[:24]
    if not path.exists():
        text = make()
        KEPT.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")  # another process may be at it
        partial.write_text(text)
        partial.rename(path)
    return path.read_text()


def cuda_ptx(arch: int = ARCH) -> str:
    """What nvcc emits for csrc/cuda.cu.

    Raises:
        UnavailableError: there is no nvcc.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise sass.UnavailableError("nvcc was not found")
    sources = [path.read_bytes() for path in sorted((ROOT / "csrc").iterdir())]
    command = [nvcc, "-ptx", f"-arch=compute_{arch}", "-std=c++17", "-O3", "-fmad=false", ROOT / "csrc/cuda.cu"]

    def run() -> str:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "cuda.ptx"
            subprocess.run([*command, "-o", output], check=True, capture_output=True)
            return output.read_text()

    return kept(run, command, sources)


def short_name(signature: str) -> str:
    """``"adamw_kernel<BF16, F32, 0, false>"`` of a demangled name."""
    plain = re.sub(r"\([\w:]+\)(?=\d)|safefreeze::|cuda::|\(anonymous namespace\)::|^void ", "", signature)
    return re.sub(r"\(.*", "", plain)


class PtxCuda(Watched, CudaBackend):
    """The CUDA backend."""

    def __init__(self, ptx: str) -> None:
        Watched.__init__(self)
        if cuda_on_host.COMPILER is None:
            raise sass.UnavailableError("no C++ compiler was found")
        native = cuda_on_host.build()
        CudaBackend.__init__(self, native, "cpu")
        module = Module(ptx)
        readable = subprocess.run(
            ["c++filt"], input="\n".join(module.kernels), capture_output=True, text=True, check=True
        )
        self.kernels: Mapping[str, Kernel] = dict(
            zip(map(short_name, readable.stdout.splitlines()), module.kernels.values(), strict=True)
        )
        self._names = {at: short_name(name) for at, name in native.KERNELS.items()}

    @contextmanager
    def watching(self, *columns: Sequence[Tensor | None] | None) -> Iterator[None]:
        """Launches of the library compiled for the host come here meanwhile."""
        with super().watching(*columns):
            self._native.set_launcher(self._launch)
            try:
                yield
            finally:
                self._native.set_launcher(None)

    refusal = Watched.refusal

    def _launch(self, place: int, blocks: int, threads: int, params: Sequence[bytes]) -> None:
        name, words = self._names[place], [int.from_bytes(value[:8], "little") for value in params]
        own: list[tuple[int, int]] = []
        if name.startswith("upload"):
            own = [(words[1], 8 * words[2])]
        elif name.startswith("total"):
            own = [(words[0], 8 * words[1]), (words[2], 8)]
        self.kernels[name].run(blocks, threads, params, self.memory(*own), self.count(name))


# ----------------------------------------------------------------------------------------------------------- Triton


def _compiled(name: str, settings: dict[str, Any], missing: tuple[str, ...], arch: int) -> str:
    found = sass.compile_triton(name, settings, missing, arch)
    return json.dumps([found.asm["ptx"], found.metadata.num_warps, found.metadata.shared])


class PtxTriton(Watched, TritonBackend):
    """The Triton backend. ``folder``: of another Triton than the installed one."""

    def __init__(self, folder: str = "", change: Callable[[str], str] = str) -> None:
        Watched.__init__(self)
        import triton

        self._folder, self._version = folder, Path(folder).name if folder else triton.__version__
        self.change = change  # of PTX, before it is read
        here = ROOT / "safefreeze_kernels" / "kernels"
        self._sources = [
            path.read_bytes() for path in sorted([*here.glob("triton*.py"), here / "tiles.py", here / "operands.py"])
        ]
        self._tables = WeakKeyDictionary()
        self.kernels: dict[str, tuple[Kernel, int, int]] = {}
        self._pool: Any = None

    refusal = Watched.refusal
    _upload = Watched._upload

    def _launch(self, variant: Any, launch: Launch, *tensors: Tensor | None) -> None:
        tiles, kernel = launch.tiles, variant.kernel
        if not len(tiles):
            return
        name, settings = kernel.__name__.removesuffix("_kernel"), sass.by_name(variant.settings)
        arguments = dict(zip(kernel.arg_names, (tiles, launch.work.parts, launch.rows, *tensors), strict=False))
        missing = tuple(key for key, value in arguments.items() if value is None)
        compiled, warps, shared = self._kernel(name, settings, missing)
        params = [value.data_ptr().to_bytes(8, "little") for value in arguments.values() if value is not None]
        params += [bytes(size) for _, size in list(compiled.params.values())[len(params) :]]  # scratch memory: none
        compiled.run(len(tiles), 32 * warps, params, self.memory(), self.count(compiled.name), shared=shared)

    def _kernel(self, name: str, settings: dict[str, Any], missing: tuple[str, ...]) -> tuple[Kernel, int, int]:
        key = repr((name, settings, missing))
        if key not in self.kernels:
            text, warps, shared = json.loads(
                kept(lambda: self._compile(name, settings, missing), key, self._version, self._sources, ARCH)
            )
            (kernel,) = Module(self.change(text)).kernels.values()
            self.kernels[key] = kernel, warps, shared
        return self.kernels[key]

    def _compile(self, name: str, settings: dict[str, Any], missing: tuple[str, ...]) -> str:
        if self._pool is None:
            self._pool = sass.triton_processes(1, self._folder)
        text: str = self._pool.submit(_compiled, name, settings, missing, ARCH).result()
        return text

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
