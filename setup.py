"""Builds safefreeze_kernels._C: C++17 and pybind11 only. It neither includes nor links torch, so it needs no torch to
build, and one build serves every torch version.

Without a working C++ compiler the build says so and goes on: the pure-Python backends still work.
SAFEFREEZE_REQUIRE_NATIVE=1 makes that an error; SAFEFREEZE_SANITIZE=1 builds with AddressSanitizer and UBSan.
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

X86 = platform.machine().lower() in ("x86_64", "amd64")
SANITIZE = os.environ.get("SAFEFREEZE_SANITIZE") == "1"
# No contraction into fused multiply-add, no value-changing shortcuts: every backend must produce the same bits.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
         "-Wall", "-Wextra"]  # fmt: skip
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
# csrc/cpu.cpp is compiled once for each; the processor decides at run time.
ISAS = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mprefer-vector-width=512"]


class BuildExtension(build_ext):
    def build_extension(self, extension):
        macros = [("SAFEFREEZE_X86", "1")] if X86 else []
        flags = FLAGS + (SANITIZERS if SANITIZE else [])
        jobs = [(source, "", []) for source in extension.sources]
        jobs += [("csrc/cpu.cpp", isa, isa_flags) for isa, isa_flags in ISAS.items()]

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
                extension.extra_objects = [o for objects in pool.map(compile_one, jobs) for o in objects]
            extension.sources = []
            extension.extra_link_args = (SANITIZERS[:1] if SANITIZE else ["-Wl,-s"]) if os.name == "posix" else []
            extension.libraries = ["dl", "pthread"] if sys.platform.startswith("linux") else []
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


extension = Pybind11Extension(
    "safefreeze_kernels._C",
    ["csrc/bindings.cpp", "csrc/threads.cpp", "csrc/tensors.cpp"],
    include_dirs=["csrc"],
    cxx_std=17,  # said, not tried out: the trial would end the build where there is no compiler
    depends=sorted(str(path) for path in Path("csrc").iterdir()),
)
extension.optional = os.environ.get("SAFEFREEZE_REQUIRE_NATIVE") != "1"
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
