"""csrc/cuda.cu compiled for the host: its kernels, run block by block on CPU tensors."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SOURCES = (ROOT / "csrc/cuda.cu", ROOT / "csrc/bindings_cuda.cpp", HERE / "module.cpp")
COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def build() -> Any:
    """The module with the functions of `safefreeze_kernels._C.cuda`; compiled where sources changed, some 10 s. Beside
    them ``set_order`` and ``set_launcher``, of which module.cpp tells, and ``KERNELS``: place in the library -> name.
    With SAFEFREEZE_SANITIZE=1 a misaligned access ends the process.
    """
    assert COMPILER is not None, "cuda_on_host: no C++ compiler was found"
    inputs = sorted([*(ROOT / "csrc").iterdir(), *HERE.glob("*.[ch]*")])
    sanitized = os.environ.get("SAFEFREEZE_SANITIZE") == "1"
    flags = ["-fsanitize=alignment", "-fno-sanitize-recover=all"] if sanitized else []
    key = hashlib.sha256(b"".join([repr(flags).encode(), *(path.read_bytes() for path in inputs)])).hexdigest()[:16]
    folder = ROOT / "build" / "cuda_on_host" / key
    library = folder / f"cuda_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one compiles
        if not library.exists():
            partial = library.with_suffix(".partial")
            include = [HERE, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
            subprocess.run(
                [COMPILER, "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC",
                 "-fvisibility=hidden", "-shared", *flags, "-o", partial, *(f"-I{path}" for path in include),
                 "-x", "c++", *SOURCES],
                check=True,
            )  # fmt: skip
            partial.rename(library)
    spec = importlib.util.spec_from_file_location("cuda_on_host", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.KERNELS = {at: name for at, _, kind, name in _symbols(library) if kind == "t" and "_kernel" in name}
    module.set_shared([(at, size) for at, size, kind, name in _symbols(library) if kind == "b" and ")::" in name])
    assert module.KERNELS
    return module


def _symbols(library: Path) -> list[tuple[int, int, str, str]]:
    """Place, bytes, kind and readable name of what the kernels' namespace holds."""
    listed = subprocess.run(["nm", "-C", "-S", library], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^(\w+) (\w+) (\w) (.*safefreeze::cuda::\(anonymous namespace\)::.*)$", listed, re.MULTILINE)
    return [(int(at, 16), int(size, 16), kind, name) for at, size, kind, name in found]
