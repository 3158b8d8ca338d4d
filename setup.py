"""Builds safefreeze_kernels._C: C++17 and pybind11 only. It neither includes nor links torch, so it needs no torch to
build, and one build serves every torch version.

Without a working C++ compiler the build says so and goes on: the pure-Python backends still work. Where nvcc is found,
the CUDA kernels are built too, their runtime linked statically: the result imports where there is no driver. Variables:

    SAFEFREEZE_REQUIRE_NATIVE=1   no C++ compiler is an error
    SAFEFREEZE_CUDA=0 | 1         leave the CUDA kernels out | it is an error if they cannot be built
    SAFEFREEZE_CUDA_ARCHS         compute capabilities to build for, "80 86 89 90 100 120" unless said otherwise; code
                                  for the first is also kept in a form that drivers translate for all later ones
    SAFEFREEZE_SANITIZE=1         AddressSanitizer and UBSan, without CUDA; =thread: ThreadSanitizer
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

X86 = platform.machine().lower() in ("x86_64", "amd64")
SANITIZE = {"": "", "0": "", "1": "address,undefined", "thread": "thread"}.get(
    os.environ.get("SAFEFREEZE_SANITIZE", "")
)
if SANITIZE is None:
    raise SystemExit(f"SAFEFREEZE_SANITIZE={os.environ['SAFEFREEZE_SANITIZE']}: expected 1 or thread")
# No contraction into fused multiply-add, no value-changing shortcuts: every backend must produce the same bits.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
         "-Wall", "-Wextra"]  # fmt: skip
SANITIZERS = (
    [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"] if SANITIZE else []
)
# These are compiled once for each instruction set; the processor decides at run time.
PER_ISA = ["csrc/cpu.cpp", "csrc/moves.cpp", "csrc/audit.cpp"]
ISAS = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c",
                      "-mprefer-vector-width=512"]  # fmt: skip


def find_nvcc():
    """Path of the CUDA compiler; None: build without CUDA."""
    wanted = os.environ.get("SAFEFREEZE_CUDA", "")
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    found = [Path(home, "bin", "nvcc") for home in homes if home] + [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    nvcc = next((str(path) for path in found if path and Path(path).is_file()), None)
    if wanted == "1" and nvcc is None:
        raise RuntimeError("SAFEFREEZE_CUDA=1, but nvcc was not found; set CUDA_HOME")
    return None if wanted == "0" or SANITIZE else nvcc


def known_archs(nvcc, wanted):
    """Those of ``wanted`` that this compiler knows: an older one knows no newer GPU."""
    said = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    known = [arch for arch in wanted if f"compute_{arch.rstrip('af')}" in said]
    if not known:
        raise RuntimeError(f"{nvcc} knows none of the architectures {' '.join(wanted)}; it knows {' '.join(said)}")
    if len(known) < len(wanted):
        left_out = " ".join(arch for arch in wanted if arch not in known)
        print(f"safefreeze_kernels: {nvcc} does not know compute capability {left_out}: left out.", file=sys.stderr)
    return known


def compile_cuda(nvcc, folder):
    """Object file of csrc/cuda.cu, and the static CUDA runtime it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    archs = known_archs(nvcc, os.environ.get("SAFEFREEZE_CUDA_ARCHS", "80 86 89 90 100 120").replace(",", " ").split())
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"arch=compute_{archs[0]},code=compute_{archs[0]}")
    output = folder / "cuda.o"
    command = [nvcc, "-c", "csrc/cuda.cu", "-o", str(output), "-std=c++17", "-O3", "-fmad=false", "--threads", "2",
               "-Xcompiler", "-fPIC,-fvisibility=hidden"]  # fmt: skip
    command += [word for target in targets for word in ("-gencode", target)]
    subprocess.run(command, check=True)
    listed = subprocess.run([nvcc, "--dryrun", *command[1:]], check=True, capture_output=True, text=True).stderr
    top = next(line.split("=", 1)[1].strip() for line in listed.splitlines() if line.startswith("#$ TOP="))
    folders = [Path(top, "lib64"), Path(top, "lib"), *Path(top).glob(f"targets/{platform.machine()}*/lib")]
    runtime = next((path for where in folders if (path := where / "libcudart_static.a").is_file()), None)
    if runtime is None:
        raise RuntimeError(f"libcudart_static.a was not found in {top}; install the CUDA runtime's development files")
    return [str(output), str(runtime)]


class BuildExtension(build_ext):
    def build_extension(self, extension):
        self.force = True  # all sources are compiled, perhaps for other targets than last time: link them
        macros = [("SAFEFREEZE_X86", "1")] if X86 else []
        cuda = self.cuda_objects()
        if cuda:
            macros.append(("SAFEFREEZE_CUDA", "1"))
            extension.sources.append("csrc/bindings_cuda.cpp")
        flags = FLAGS + SANITIZERS
        jobs = [(source, isa, isa_flags) for source in PER_ISA for isa, isa_flags in ISAS.items()]  # long ones first
        jobs += [(source, "", []) for source in extension.sources]

        def compile_one(job):
            source, isa, isa_flags = job
            return self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp) / (isa or "common")),
                macros=macros + ([("SAFEFREEZE_ISA", isa)] if isa else []),
                include_dirs=extension.include_dirs,
                extra_postargs=flags + isa_flags,
            )

        try:
            with ThreadPoolExecutor() as pool:
                extension.extra_objects = [o for objects in pool.map(compile_one, jobs) for o in objects] + cuda
            extension.sources = []
            extension.extra_link_args = (SANITIZERS[:1] or ["-Wl,-s"]) if os.name == "posix" else []
            extension.libraries = ["dl", "pthread", "rt"] if sys.platform.startswith("linux") else []
            super().build_extension(extension)
        except Exception as error:
            if os.environ.get("SAFEFREEZE_REQUIRE_NATIVE") == "1":
                raise
            print(
                f"safefreeze_kernels: the C++ extension was NOT built ({error}).\n"
                "  The package works without it, through the slow 'reference' backend; `safefreeze info` says so.\n"
                "  Remedy: install a C++17 compiler and reinstall.",
                file=sys.stderr,
            )

    def cuda_objects(self):
        """What to link for CUDA; nothing, said aloud, where it cannot be built and need not be."""
        try:
            nvcc = find_nvcc()
            return compile_cuda(nvcc, Path(self.build_temp) / "cuda") if nvcc else []
        except Exception as error:
            if os.environ.get("SAFEFREEZE_CUDA") == "1":
                raise
            print(f"safefreeze_kernels: the CUDA kernels were NOT built ({error}).", file=sys.stderr)
            return []


extension = Pybind11Extension(
    "safefreeze_kernels._C",
    ["csrc/bindings.cpp", "csrc/lists.cpp", "csrc/tensors.cpp", "csrc/threads.cpp"],
    include_dirs=["csrc"],
    cxx_std=17,  # said, not tried out: the trial would end the build where there is no compiler
    depends=sorted(str(path) for path in Path("csrc").iterdir()),
)
extension.optional = os.environ.get("SAFEFREEZE_REQUIRE_NATIVE") != "1"
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
