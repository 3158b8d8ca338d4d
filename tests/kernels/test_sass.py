"""The machine code of the GPU kernels: 16-byte accesses, no spills, at most 64 registers, nothing fused; no GPU needed.

A quick part of ``make sass``, which looks at every kernel on every architecture.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import sass
from benchmarks.sass import Code, Kernel, UnavailableError

ARCH = 90

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function good:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:569 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function bad:
  REG:72 STACK:8 SHARED:3072 LOCAL:0 CONSTANT[0]:569 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
TEXT = """
	code for sm_90
		Function : good
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0000000402048981 */
        /*0020*/                   LDG.E R8, desc[UR4][R2.64+0x10] ;          /* 0x0000000402088981 */
        /*0030*/                   LDG.E.U16 R9, desc[UR4][R2.64+0x14] ;      /* 0x0000000402098981 */
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;           /* 0x0000000402008986 */
		Function : bad
        /*0000*/                   LDG.E.64 R4, desc[UR4][R2.64] ;            /* 0x0000000402048981 */
        /*0010*/                   STL.64 [R1], R4 ;                          /* 0x0000000401007387 */
        /*0020*/                   LDL.64 R4, [R1] ;                          /* 0x0000000001047983 */
        /*0030*/                   STG.E.EF.U8 desc[UR4][R2.64], R4 ;         /* 0x0000000402008986 */
"""
WANTED = Kernel("cuda", "scale", "fp32", "", (128,), (128,))


def code(kernel: Kernel, name: str, ptx: str = "") -> Code:
    registers, spilled, loads, stores = sass.read_functions(USAGE, TEXT)[name]
    return Code(kernel, ARCH, registers, spilled, loads, stores, sass.count_fused(ptx))


# ------------------------------------------------------------------------------------------------------ known text


def test_accesses_registers_and_spills_are_read_off_the_listing() -> None:
    found = sass.read_functions(USAGE, TEXT)
    assert found["good"] == (40, 0, {128: 1, 32: 1, 16: 1}, {128: 1})
    assert found["bad"] == (72, 8 + 2, {64: 1}, {8: 1})


def test_a_listing_without_its_resources_is_refused() -> None:
    with pytest.raises(ValueError, match="1 kernels and shows 2"):
        sass.read_functions(USAGE.split(" Function bad")[0], TEXT)


def test_what_passes_passes_and_every_fault_is_named() -> None:
    assert sass.judge(code(WANTED, "good")) == []
    assert sass.judge(code(WANTED, "bad", "fma.rn.f32 %f1, %f2, %f3, %f4;")) == [
        "0 16-byte loads, expected 1",
        "0 16-byte stores, expected 1",
        "72 registers, expected at most 64",
        "10 spills",
        "1 operations fused, or that may be",
    ]


def test_narrower_operands_need_their_own_accesses() -> None:
    assert sass.judge(code(replace(WANTED, loads=(128, 64)), "good")) == ["0 8-byte loads, expected 1"]


def test_fusing_is_read_off_the_ptx() -> None:
    rounded = "mul.rn.f32 %f3, %f1, %f2;\nadd.rn.f32 %f4, %f3, %f1;\ndiv.rn.f32 %f5, %f4, %f1;\nmul.lo.s32 %r1, %r2, 3;"
    bare = "mul.f32 %f3, %f1, %f2;\nadd.ftz.f32 %f4, %f3, %f1;"
    assert sass.count_fused(rounded) == 0
    assert sass.count_fused(bare) == 2, "an operation without a rounding may be fused by the assembler"
    assert sass.count_fused(bare, assembler_fuses=False) == 0
    assert sass.count_fused("fma.rn.f32 %f1, %f2, %f3, %f4;", assembler_fuses=False) == 1
    assert sass.count_fused("fma.rn.f64 %fd1, %fd2, %fd3, %fd4;") == 0, "of doubles it is exact where it is used"


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        (
            "adamw_kernel<{0}BF16, {0}F32, (safefreeze::cuda::Rounding)2, true>(safefreeze::cuda::AdamWTiles)",
            Kernel(
                "cuda",
                "adamw",
                "bf16, state fp32",
                "remainder, amsgrad",
                (64, 64, 128, 128, 128, 64),
                (64, 128, 128, 128, 64),
            ),
        ),
        (
            "norm_kernel<{0}F32, (safefreeze::NormKind)1>(safefreeze::Tiles, safefreeze::DenseTensor const*, double*)",
            Kernel("cuda", "norm", "fp32", "sum_of_absolutes", (128, 128), ()),
        ),
        (
            "zero_kernel<unsigned short>(safefreeze::Tiles, safefreeze::DenseTensor const*)",
            Kernel("cuda", "zero", "16 bits", "", (), (128,)),
        ),
    ],
    ids=["adamw", "norm", "zero"],
)
def test_names_tell_what_a_kernel_must_access(signature: str, expected: Kernel) -> None:
    home = "safefreeze::cuda::(anonymous namespace)::"
    assert sass.cuda_kernel(f"void {home}{signature.format(home)}") == expected


# ---------------------------------------------------------------------------------------------------- real kernels


@pytest.fixture
def kernels() -> list[Kernel]:
    """Triton's, a few that stand for the others."""
    try:
        return list(sass.triton_kernels(quick=True))
    except UnavailableError as error:
        pytest.skip(str(error))


def test_triton_kernels_pass_and_the_same_ones_compiled_carelessly_fail(kernels: list[Kernel]) -> None:
    picked = [
        next(kernel for kernel in kernels if str(kernel) == name)
        for name in ("triton adamw, fp32, state fp32", "triton adamw, bf16, state fp32, remainder", "triton zero, bf16")
    ]
    careless = [
        replace(picked[0], settings={**picked[0].settings, "enable_fp_fusion": True}),
        replace(picked[1], settings={**picked[1].settings, "maxnreg": 24}),
        replace(picked[2], settings={**picked[2].settings, "BLOCKS": (512, 128)}),  # an element to a thread
    ]
    codes = list(sass.triton_codes([*picked, *careless], [ARCH], jobs=1))
    for found in codes[:3]:
        assert sass.judge(found) == [], f"{found.kernel} on sm_{found.arch}"
    fused, spilled, narrow = (sass.judge(found) for found in codes[3:])
    assert any("fused" in fault for fault in fused), fused
    assert any("spills" in fault for fault in spilled), spilled
    assert any("16-byte stores" in fault for fault in narrow), narrow


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True], ids=["installed", "oldest"])
def test_every_triton_kernel_passes(older: bool) -> None:
    """By the installed Triton and by the oldest that is served."""
    try:
        kernels, folder = list(sass.triton_kernels()), sass.older_triton() if older else ""
    except UnavailableError as error:
        pytest.skip(str(error))
    codes = list(sass.triton_codes(kernels, [ARCH], os.cpu_count() or 1, folder))
    wrong = {str(found.kernel): faults for found in codes if (faults := sass.judge(found))}
    assert not wrong, f"{len(wrong)} of {len(codes)}: {wrong}"


def test_every_cuda_kernel_passes() -> None:
    try:
        codes = list(sass.cuda_codes())
    except UnavailableError as error:
        pytest.skip(str(error))
    assert {found.kernel.name for found in codes} >= {"adamw", "norm", "scale", "zero", "copy"}
    wrong = {f"{found.kernel} on sm_{found.arch}": faults for found in codes if (faults := sass.judge(found))}
    assert not wrong


def test_cuda_source_compiled_carelessly_fails(tmp_path: Path) -> None:
    source = tmp_path / "careless.cu"
    source.write_text("""
        __global__ void scale_kernel(float* x, const float* y, float factor) {
          const int i = blockIdx.x * blockDim.x + threadIdx.x;
          x[i] = x[i] * factor + y[i];
        }
    """)
    wanted = Kernel("cuda", "scale", "fp32", "", (128,), (128,))
    for options, fuses in (((), False), (("-fmad=true",), True)):
        try:
            binary = sass.compile_cuda(source, [ARCH], tmp_path, *options)
        except UnavailableError as error:
            pytest.skip(str(error))
        (found,) = sass.read_binary(binary, [ARCH], lambda _: wanted)
        faults = sass.judge(found)
        assert "0 16-byte loads, expected 1" in faults, faults
        assert any("fused" in fault for fault in faults) == fuses, f"{options}: {faults}"
