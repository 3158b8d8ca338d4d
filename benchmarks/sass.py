"""The GPU kernels as machine code: ``python -m benchmarks.sass [--arch 90 …] [--only PATTERN] [--quick]``.

Needs no GPU. Compiles every kernel of kernels/triton.py with the parameters and options it is launched with, by the
installed Triton and by the oldest that is served (requirements/triton-older.txt, fetched into build/); takes the CUDA
kernels out of the built extension, or compiles csrc/cuda.cu where that holds none. Disassembles all and prints a table.
A kernel fails, and with it the command,

    if fewer 16-byte loads or stores are in it than its walk over neighbours needs, for every operand (one of 8 bytes
        where a thread holds no more of an operand),
    if it takes more than `CEILING` registers, or spills any,
    if a multiplication and an addition are fused, or may be.

The last is read off the PTX, where a division is one instruction: in machine code it is a sequence of fused operations,
as IEEE division and square root are made here. PTX in which every operation names its rounding leaves nothing to fuse;
without, it is the assembler's option that counts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

ARCHS: Final = (80, 90, 100)
CEILING: Final = 64  # registers per thread: a multiprocessor then holds 1024 threads
OLDER: Final = Path(__file__).parents[1] / "requirements" / "triton-older.txt"
_SOURCE: Final = Path(__file__).parents[1] / "csrc" / "cuda.cu"
_SIZES: Final = {"fp32": 4, "bf16": 2, "fp16": 2, "32 bits": 4, "16 bits": 2, "codes": 1}


class UnavailableError(RuntimeError):
    """What is needed to compile or to disassemble is not here; the message says what."""


@dataclass(frozen=True)
class Kernel:
    """A kernel with its compile-time parameters. ``loads``, ``stores``: bits of the accesses that its walk over
    neighbours needs, one entry each."""

    backend: str
    name: str
    dtypes: str
    variant: str
    loads: tuple[int, ...]
    stores: tuple[int, ...]
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
        wrong += [
            f"{found.get(width, 0)} {width // 8}-byte {word}, expected {needed.count(width)}"
            for width in sorted(set(needed), reverse=True)
            if found.get(width, 0) < needed.count(width)
        ]
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


def _run(*command: Any, stdin: str | None = None, cwd: str | None = None) -> str:
    words = [str(word) for word in command]
    try:
        found = subprocess.run(words, capture_output=True, text=True, input=stdin, cwd=cwd)
    except FileNotFoundError as error:
        raise UnavailableError(f"{words[0]} was not found") from error
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
    """Multiply-adds, and if the assembler fuses, operations that it may: those that name no rounding. Those of doubles
    are wanted: norms add squares of floats, which are exact in double."""
    fused = len(re.findall(r"\bfma\.(?!rn\.f64)", ptx))
    return fused + (len(re.findall(r"\b(?:mul|add|sub)(?:\.ftz)?\.f(?:32|64|32x2)\b", ptx)) if assembler_fuses else 0)


# ------------------------------------------------------------------------------------------------------------- CUDA

_ROUNDINGS: Final = ("nearest", "stochastic", "remainder")
_NORMS: Final = ("sum_of_squares", "sum_of_absolutes", "largest_absolute")
_DTYPES: Final = {
    "F32": "fp32", "BF16": "bf16", "F16": "fp16", "Codes": "codes", "unsigned int": "32 bits",
    "unsigned short": "16 bits",
}  # fmt: skip


def cuda_codes(archs: Sequence[int] | None = None) -> Iterator[Code]:
    """What became of csrc/cuda.cu.

    Args:
        archs: compute capabilities; None: those of the built extension, or `ARCHS`.

    Raises:
        UnavailableError: the extension lacks one of them and there is no CUDA compiler.
    """
    extension = _extension()
    held = _architectures(extension) if extension else set()
    if extension and held and set(archs or held) <= held:
        yield from read_binary(extension, archs or sorted(held))
        return
    with tempfile.TemporaryDirectory() as folder:
        binary = compile_cuda(_SOURCE, archs or ARCHS, Path(folder))
        yield from read_binary(binary, archs or ARCHS)


def read_binary(binary: Path, archs: Sequence[int], name: Callable[[str], Kernel] | None = None) -> Iterator[Code]:
    """What a binary holds for these architectures; ``name`` tells the kernel from a demangled name."""
    tool, binary = _tool("cuobjdump"), binary.resolve()
    ptx = _entries(_run(tool, "-ptx", binary))
    with tempfile.TemporaryDirectory() as folder:
        _run(tool, "-xelf", "all", binary, cwd=folder)
        for arch in archs:
            (cubin,) = Path(folder).glob(f"*.sm_{arch}.cubin")
            functions = disassemble(cubin)
            readable = _run("c++filt", stdin="\n".join(functions)).splitlines()
            for (mangled, function), signature in zip(functions.items(), readable, strict=True):
                registers, spilled, loads, stores = function
                kernel = (name or cuda_kernel)(signature)
                yield Code(kernel, arch, registers, spilled, loads, stores, count_fused(ptx[mangled]))


def _architectures(binary: Path) -> set[int]:
    """What a binary holds code for; empty where it holds none for GPUs, of which cuobjdump complains."""
    found = subprocess.run([_tool("cuobjdump"), "-lelf", str(binary)], capture_output=True, text=True)
    return {int(arch) for arch in re.findall(r"\.sm_(\d+)\.cubin", found.stdout)}


def compile_cuda(source: Path, archs: Sequence[int], folder: Path, *options: str) -> Path:
    """A fat binary of the source, made as setup.py makes it, with PTX for the first architecture."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise UnavailableError(
            f"the extension holds no CUDA kernels for {', '.join(map(str, archs))}, and nvcc is missing"
        )
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"arch=compute_{archs[0]},code=compute_{archs[0]}")
    binary, flags = folder / "kernels.fatbin", options or ("-fmad=false",)
    chosen = [word for target in targets for word in ("-gencode", target)]
    _run(nvcc, "-fatbin", "-std=c++17", "-O3", *flags, *chosen, source, "-o", binary)
    return binary


def _extension() -> Path | None:
    spec = importlib.util.find_spec("safefreeze_kernels._C")
    return Path(spec.origin) if spec and spec.origin else None


def _entries(ptx: str) -> dict[str, str]:
    """Kernel -> its PTX, with functions that follow it."""
    _, *parts = re.split(r"\.entry (\w+)\(", ptx)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def cuda_kernel(signature: str) -> Kernel:
    """The kernel that a demangled name names."""
    plain = re.sub(r"\([\w:]+\)(?=\d)|safefreeze::|cuda::|\(anonymous namespace\)::", "", signature)
    found = re.match(r"(?:void )?(\w+?)(?:_kernel)?(?:<(.*?)>)?\(", plain)
    if found is None:
        raise ValueError(f"sass: {signature!r} names no kernel")
    name, arguments = found[1], (found[2] or "").split(", ")
    dtypes = [_DTYPES[word] for word in arguments if word in _DTYPES]
    sizes = [_SIZES[dtype] for dtype in dtypes]
    others = [word for word in arguments if word not in _DTYPES]
    if name == "adamw":
        rounding, amsgrad = _ROUNDINGS[int(others[0])], others[1] == "true"
        packed = [sizes[1]] * (3 if amsgrad else 2) + [2] * (rounding == "remainder")
        n = 16 // max(sizes)  # elements a thread takes at once: 16 bytes of the widest operand
        variant = [rounding] * (rounding != "nearest") + ["amsgrad"] * amsgrad
        return _adamw("cuda", dtypes, variant, n, sizes[0], packed)
    kind = _NORMS[int(others[0])] if name in ("norm", "total") else f"{others[0]} bytes" if name == "upload" else ""
    # A thread takes 32 bytes for a norm, and 16 else. `copy` goes either way; `total` and `upload` are short.
    loads = (128, 128) if name == "norm" else (128,) * {"scale": 1, "copy": 2}.get(name, 0)
    stores = (128,) * {"scale": 1, "copy": 2, "zero": 1}.get(name, 0)
    return Kernel("cuda", name, ", ".join(dtypes), kind, loads, stores)


def _accesses_of(n: int, sizes: Iterable[int]) -> tuple[int, ...]:
    """Bits of the widest accesses to ``n`` neighbours of operands of these bytes per element."""
    return tuple(min(128, 8 * n * size) for size in sizes for _ in range(max(n * size // 16, 1)))


def _adamw(
    backend: str, dtypes: Sequence[str], variant: Iterable[str], n: int, param: int, packed: Sequence[int], **more: Any
) -> Kernel:
    """A step that takes ``n`` neighbours at once: loads the gradient too, stores all else that it loads."""
    loads, stores = (_accesses_of(n, sizes) for sizes in ([param, param, *packed], [param, *packed]))
    return Kernel(backend, "adamw", f"{dtypes[0]}, state {dtypes[1]}", ", ".join(variant), loads, stores, **more)


# ----------------------------------------------------------------------------------------------------------- Triton

# Launch arguments, as their tensors' dtypes make them; none is specialised.
_ARGUMENTS: Final = {
    "tiles": "*i64", "parts": "*i64", "tensors": "*i64", "addresses": "*i64", "grads": "*i64", "scalar_set": "*i32",
    "scalars": "*i32", "seed": "*i64", "skip": "*fp32", "multiplier": "*fp32", "partial": "*fp64", "factor": "*fp32",
}  # fmt: skip
# What a work list can make a kernel read besides: picked columns, single elements, places of another age, ages of
# elements.
_LISTS: Final = {
    "": (0, False, False), "columns": (1, False, False), "elements": (0, True, False), "places": (2, False, False),
    "ages": (0, True, True), "all": (2, True, True),
}  # fmt: skip
_SHORT: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_STATES: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "codes"}


def triton_kernels(*, quick: bool = False) -> Iterator[Kernel]:
    """Every kernel × dtypes × variant; ``quick``: a few that stand for the others.

    Raises:
        UnavailableError: Triton is not here.
    """
    try:
        from safefreeze_kernels.kernels import triton
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install triton") from error

    dtypes = (torch.float32, torch.bfloat16) if quick else tuple(_SHORT)
    roundings = {torch.float32: _ROUNDINGS[:1], torch.float16: _ROUNDINGS[:2], torch.bfloat16: _ROUNDINGS}
    for param, state in product(dtypes, _STATES):
        for rounding, amsgrad, name in product(roundings[param], (False, True), _LISTS):
            if quick and (amsgrad or state != torch.float32 or name not in ("", "elements")):
                continue
            lists, bits, ages = _LISTS[name]
            settings = triton.adamw_settings(
                param, state, rounding=rounding, l2=amsgrad, amsgrad=amsgrad, lists=lists, bits=bits, ages=ages
            )  # fmt: skip
            packed = [state.itemsize] * (3 if amsgrad else 2) + [2] * (rounding == "remainder")
            variant = [rounding] * (rounding != "nearest") + ["amsgrad, l2"] * amsgrad + [name] * bool(name)
            shorts, n = (_SHORT[param], _STATES[state]), _per_thread(settings)
            yield _adamw("triton", shorts, variant, n, param.itemsize, packed, settings=by_name(settings))
    for dtype in dtypes:
        for name, (lists, bits, ages) in _LISTS.items():
            if ages and name != "all":  # only a step looks at them
                continue
            if quick and (name or dtype == torch.float32):
                continue
            common = {"dtype": dtype, "lists": lists, "bits": bits}
            live, frozen = ({**common, "FROZEN": frozen} for frozen in (False, True))
            for kernel, variant, settings, loads, stores in (
                *(("norm", kind, triton.settings(**live, KIND=kind), 1, 0) for kind in _NORMS),
                ("scale", "", triton.settings(**live), 1, 1),
                ("zero", "", triton.settings(**frozen), 0, 1),
                ("copy", "gather", triton.settings(**frozen, GATHER=True), 1, 1),
                ("copy", "scatter", triton.settings(**frozen, GATHER=False), 1, 1),
            ):
                words = ", ".join(word for word in (variant, name) if word)
                wide = _accesses_of(_per_thread(settings), [dtype.itemsize])
                yield Kernel("triton", kernel, _SHORT[dtype], words, wide * loads, wide * stores, by_name(settings))


def _per_thread(settings: dict[str, Any]) -> int:
    """Neighbours that a thread has in flight."""
    elements: int = settings["BLOCKS"][1] // (32 * settings["num_warps"])
    return elements


def triton_codes(kernels: Iterable[Kernel], archs: Sequence[int], jobs: int, folder: str = "") -> Iterator[Code]:
    """What becomes of them, in order, architecture by architecture. ``folder``: see `triton_processes`."""
    with triton_processes(jobs, folder) as pool:
        yield from pool.map(
            _compile_triton, *zip(*((kernel, arch) for kernel in kernels for arch in archs), strict=True)
        )


def triton_processes(jobs: int, folder: str = "") -> ProcessPoolExecutor:
    """Fresh processes: where Triton interprets, it does not compile. ``folder``: of another Triton than the installed
    one, as `older_triton` fetches it."""
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_compile_for_real, initargs=(folder,))


def _compile_for_real(folder: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    if folder:
        sys.path.insert(0, folder)


def older_triton() -> str:
    """The folder of the Triton that `OLDER` names, which comes with the oldest torch that is served; fetched at first
    use.

    Raises:
        UnavailableError: it could not be fetched.
    """
    wanted = OLDER.read_text().split("\n")[-2]
    folder = OLDER.parents[1] / "build" / wanted.split(";")[0].replace("==", "-")
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")  # another process may be at it
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command = [*pip, "--target", str(partial), "-r", str(OLDER)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            with contextlib.suppress(OSError):  # it may be there by now
                partial.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():
            raise UnavailableError(f"{wanted} could not be fetched: {done.stderr.strip()[-300:]}")
    return str(folder)


def by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with names for dtypes, which every version of Triton reads."""
    return {name: getattr(value, "name", value) for name, value in settings.items()}


def compile_triton(name: str, settings: dict[str, Any], missing: Sequence[str], arch: int) -> Any:
    """A kernel of kernels/triton.py compiled, without a GPU; ``missing``: arguments that are None."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from safefreeze_kernels.kernels import triton as ours

    function = getattr(ours, f"{name}_kernel")
    settings = {
        key: tl.dtype(value) if key in ("PARAM", "STATE", "DTYPE") else value for key, value in settings.items()
    }
    constants = {key: settings[key] for key in function.arg_names if key in settings}
    constants |= {key: None for key in missing if key in function.arg_names}
    options = {key: value for key, value in settings.items() if key not in constants}
    signature = {key: "constexpr" if key in constants else _ARGUMENTS[key] for key in function.arg_names}
    source = ASTSource(function, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _compile_triton(kernel: Kernel, arch: int) -> Code:
    compiled = compile_triton(kernel.name, kernel.settings, ("skip", "multiplier"), arch)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        (found,) = disassemble(binary).values()
    fused = count_fused(compiled.asm["ptx"], assembler_fuses=compiled.metadata.enable_fp_fusion)
    return Code(kernel, arch, *found, fused)


# ---------------------------------------------------------------------------------------------------------- the table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description="What GPU kernels are compiled to.")
    parser.add_argument("--arch", type=int, nargs="+", help=f"compute capabilities (default: {ARCHS}; CUDA: as built)")
    parser.add_argument("--backend", choices=("cuda", "triton"), help="one of them only")
    parser.add_argument("--only", metavar="PATTERN", default="", help="kernels whose name matches, as in 'cuda adamw'")
    parser.add_argument(
        "--quick", action="store_true", help="of Triton's a few that stand for the others, by the installed one"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    given = parser.parse_args(arguments)
    try:
        given.chosen = re.compile(given.only, re.IGNORECASE)
    except re.error as error:
        parser.error(f"--only {given.only!r} is not a regular expression: {error}")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    given = parse(arguments)
    looked = failed = 0
    missing: list[str] = []
    for backend in ("cuda", "triton", "older"):
        if given.backend not in (None, "triton" if backend == "older" else backend):
            continue
        if backend == "older" and given.quick:
            continue
        try:
            for kernel, codes in groupby(_chosen_codes(backend, given), key=lambda code: code.kernel):
                looked += 1
                failed += _print_row(kernel, list(codes), heading=looked == 1)
        except UnavailableError as error:
            missing.append(f"{backend}: {error}")
    print(f"{looked} kernels, {failed} failed; load, store: 16-byte accesses found/needed; fma: fused or fusable")
    for line in missing:
        print(f"NOT LOOKED AT: {line}")
    return 1 if failed or missing or not looked else 0


def _chosen_codes(backend: str, given: argparse.Namespace) -> Iterator[Code]:
    if backend != "cuda":
        folder = older_triton() if backend == "older" else ""
        named = [replace(kernel, backend=Path(folder).name or "triton") for kernel in triton_kernels(quick=given.quick)]
        kernels = [kernel for kernel in named if given.chosen.search(str(kernel))]
        if kernels:
            yield from triton_codes(kernels, given.arch or ARCHS, given.jobs, folder)
        return
    codes = [code for code in cuda_codes(given.arch) if given.chosen.search(str(code.kernel))]
    order = {kernel: number for number, kernel in enumerate(dict.fromkeys(code.kernel for code in codes))}
    yield from sorted(codes, key=lambda code: (code.kernel.name, order[code.kernel], code.arch))


def _print_row(kernel: Kernel, codes: list[Code], *, heading: bool) -> bool:
    """One kernel on every architecture; whether it fails."""
    if heading:
        print(
            f"{'kernel':<18} {'dtypes':<16} {'variant':<32} {'registers by architecture':<31} {'spill':>5} {'load':>5} "
            f"{'store':>5} {'fma':>3}  verdict"
        )
    name = f"{kernel.backend} {kernel.name}"
    registers = " ".join(f"{code.arch}:{code.registers}" for code in codes)
    loads, stores = (
        f"{min(getattr(code, which).get(128, 0) for code in codes)}/{getattr(kernel, which).count(128)}"
        for which in ("loads", "stores")
    )
    spilled, fused = max(code.spilled for code in codes), max(code.fused for code in codes)
    wrong = [f"sm_{code.arch}: {', '.join(found)}" for code in codes if (found := judge(code))]
    print(
        f"{name:<18} {kernel.dtypes:<16} {kernel.variant:<32} {registers:<31} {spilled:>5} {loads:>5} {stores:>5} "
        f"{fused:>3}  {'; '.join(wrong) or 'ok'}",
        flush=True,
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
