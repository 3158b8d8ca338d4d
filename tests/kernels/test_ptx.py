"""What compilers emit for GPUs, executed without a GPU: the same bits as `cpu`, for CUDA and two versions of Triton.

A quick share of the cases; all of them in ``make torture``. Before that the interpreter itself (tests/helpers/ptx.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from backend_cases import CASES, DTYPES, Case, check, check_far, check_sums
from conftest import assert_same_bits, short
from other_backends import run_suite
from ptx import Counts, FaultError, Memory, Module

from benchmarks import sass, traffic
from safefreeze_kernels.kernels import backend as kernels
from safefreeze_kernels.kernels.backend import Backend
from safefreeze_kernels.kernels.parts import compile_live
from safefreeze_kernels.plan.mask import FreezeMask

ptx_backends = pytest.importorskip("ptx_backends", exc_type=ImportError)

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------ the interpreter

HEAD = """.version 9.0
.target sm_90
.address_size 64
.visible .entry tried(.param .u64 tried_param_0, .param .u64 tried_param_1)
{
  .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %rd<9>; .reg .f64 %fd<9>;
  .shared .align 8 .b8 room[256];
  ld.param.u64 %rd8, [tried_param_0];
  mov.u32 %r8, %tid.x;
  mul.wide.u32 %rd7, %r8, 16;
  add.s64 %rd8, %rd8, %rd7;
  ld.global.v2.u64 {%rd1, %rd2}, [%rd8];
  cvt.u32.u64 %r1, %rd1; cvt.u32.u64 %r2, %rd2;
  mov.b32 %f1, %r1; mov.b32 %f2, %r2;
"""
TAIL = """
  st.global.u64 [%rd8+8], %rd3;
  ret;
}
"""


def tried(body: str, words: np.ndarray, threads: int | None = None, counts: Counts | None = None) -> np.ndarray:
    """``words``: uint64 [threads, 2], %rd1 and %rd2 of each thread (%r1 and %f1 their lower halves). Returns %rd3 of
    each."""
    room = np.zeros(words.size + 8, np.uint64)  # from which memory is taken that begins with a sector
    at = -room.ctypes.data % 64 // 8
    memory = room[at : at + words.size].reshape(words.shape)
    memory[:] = words
    params = [memory.ctypes.data.to_bytes(8, "little"), (0).to_bytes(8, "little")]
    given = Memory([(memory.ctypes.data, memory.nbytes)])
    Module(HEAD + body + TAIL).kernels["tried"].run(1, threads or len(words), params, given, counts)
    return memory[:, 1].copy()


def pairs(*values: tuple[int, int]) -> np.ndarray:
    return np.array(values, np.uint64)


NAN = 0x7FFFFFFF
TO64 = "cvt.u64.u32 %rd3, %r3;"


@pytest.mark.parametrize(
    ("code", "a", "b", "expected"),
    [
        ("add.s32 %r3, %r1, %r2;", 0xFFFFFFFF, 2, 1),
        ("sub.s32 %r3, %r1, 5;", 3, 0, 0xFFFFFFFE),
        ("mul.hi.u32 %r3, %r1, %r2;", 0x80000000, 6, 3),
        ("mul.hi.s32 %r3, %r1, %r2;", 0x80000000, 6, 0xFFFFFFFD),
        ("mad.lo.s32 %r3, %r1, %r2, -1;", 7, 6, 41),
        ("shl.b32 %r3, %r1, %r2;", 3, 31, 0x80000000),
        ("shl.b32 %r3, %r1, %r2;", 3, 32, 0),
        ("shr.u32 %r3, %r1, %r2;", 0x80000000, 40, 0),
        ("shr.s32 %r3, %r1, %r2;", 0x80000000, 40, 0xFFFFFFFF),
        ("bfe.u32 %r3, %r1, 4, 8;", 0x12345F78, 0, 0xF7),
        ("bfe.s32 %r3, %r1, 4, 8;", 0x12345F78, 0, 0xFFFFFFF7),
        ("bfi.b32 %r3, %r1, %r2, 8, 4;", 0xABC, 0x11111111, 0x11111C11),
        ("prmt.b32 %r3, %r1, %r2, 0x7610U;", 0x33221100, 0x77665544, 0x77661100),
        ("prmt.b32 %r3, %r1, %r2, 0x9999U;", 0x33228100, 0, 0xFFFFFFFF),
        ("shf.l.wrap.b32 %r3, %r1, %r2, 8;", 0x11223344, 0x55667788, 0x66778811),
        ("shf.r.clamp.b32 %r3, %r1, %r2, 40;", 0x11223344, 0x55667788, 0x55667788),
        ("lop3.b32 %r3, %r1, %r2, 0xFF, 0xE8;", 0x3C, 0x55, 0x7D),
        ("popc.b32 %r3, %r1;", 0xF00F0001, 0, 9),
        ("brev.b32 %r3, %r1;", 0x00000003, 0, 0xC0000000),
        ("min.s32 %r3, %r1, %r2;", 0xFFFFFFFF, 1, 0xFFFFFFFF),
        ("max.u32 %r3, %r1, %r2;", 0xFFFFFFFF, 1, 0xFFFFFFFF),
        ("neg.s32 %r3, %r1;", 1, 0, 0xFFFFFFFF),
        ("not.b32 %r3, %r1;", 0xF0F0F0F0, 0, 0x0F0F0F0F),
        ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r3, 11, 22, %p1;", 0xFFFFFFFF, 0, 11),
        ("setp.lt.u32 %p1|%p2, %r1, %r2; selp.b32 %r3, 11, 22, %p2;", 0xFFFFFFFF, 0, 11),
        ("setp.eq.s32 %p1, %r1, 0; setp.ne.and.b32 %p2, %r2, 0, !%p1; selp.b32 %r3, 1, 2, %p2;", 5, 5, 1),
        ("mov.u32 %r3, 7; setp.eq.s32 %p1, %r1, 9; @%p1 mov.u32 %r3, 8;", 9, 0, 8),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r3, {%rs2, %rs1};", 0x11112222, 0, 0x22221111),
        ("cvt.u16.u32 %rs1, %r1; cvt.s32.s16 %r3, %rs1;", 0x1FFFE, 0, 0xFFFFFFFE),
        ("{ .reg .b16 low; cvt.u16.u32 low, %r1; cvt.u32.u16 %r3, low; }", 0x1FFFE, 0, 0xFFFE),
        # float32: rounded once, denormals kept, the NaN of the hardware
        ("mul.rn.f32 %f3, %f1, %f2; mov.b32 %r3, %f3;", 0x00800000, 0x3F000000, 0x00400000),
        ("add.rn.f32 %f3, %f1, %f2; mov.b32 %r3, %f3;", 0x3F800000, 0x33800000, 0x3F800000),
        ("div.rn.f32 %f3, %f1, %f2; mov.b32 %r3, %f3;", 0x3F800000, 0x40400000, 0x3EAAAAAB),
        ("sqrt.rn.f32 %f3, %f1; mov.b32 %r3, %f3;", 0xBF800000, 0, NAN),
        ("sub.rn.f32 %f3, %f1, %f2; mov.b32 %r3, %f3;", 0x7FC12345, 0, NAN),
        ("neg.f32 %f3, %f1; mov.b32 %r3, %f3;", 0x7FC12345, 0, 0xFFC12345),
        ("fma.rn.f32 %f3, %f1, %f2, 0fBF800000; mov.b32 %r3, %f3;", 0x3F800001, 0x3F7FFFFF, 0x337FFFFE),
        ("fma.rn.f32 %f3, %f1, %f2, 0f0C000000; mov.b32 %r3, %f3;", 0x3F800800, 0x3F800800, 0x3F801001),
        ("setp.ltu.f32 %p1, %f1, %f2; selp.b32 %r3, 1, 2, %p1;", 0x7FC00000, 0, 1),
        ("setp.lt.f32 %p1, %f1, %f2; selp.b32 %r3, 1, 2, %p1;", 0x7FC00000, 0, 2),
        ("setp.neu.f32 %p1, %f1, %f2; selp.b32 %r3, 1, 2, %p1;", 0x7FC00000, 0, 1),
        ("cvt.rn.bf16x2.f32 %r3, %f1, %f2;", 0x3F808000, 0x3F818000, 0x3F803F82),
        ("cvt.rn.bf16.f32 %rs1, %f1; cvt.u32.u16 %r3, %rs1;", 0xFFC00001, 0, 0x7FFF),
        ("cvt.rn.f16.f32 %rs1, %f1; cvt.u32.u16 %r3, %rs1;", 0x477FF000, 0, 0x7C00),
        ("cvt.rn.f32.u16 %f3, %rs1; mov.b32 %r3, %f3;", 0, 0, 0x4725A500),  # of a register nobody wrote
        ("cvt.rzi.s32.f32 %r3, %f1;", 0xC0200000, 0, 0xFFFFFFFE),
        ("cvt.rni.u32.f32 %r3, %f1;", 0xBF800000, 0, 0),
        ("cvt.f64.f32 %fd1, %f1; mul.rn.f64 %fd1, %fd1, %fd1; cvt.rn.f32.f64 %f3, %fd1; mov.b32 %r3, %f3;",
         0x40400000, 0, 0x41100000),
        ("cvt.f64.f32 %fd1, %f1; fma.rn.f64 %fd1, %fd1, %fd1, %fd1; cvt.rn.f32.f64 %f1, %fd1; mov.b32 %r3, %f1;",
         0x40400000, 0, 0x41400000),
        ("cvt.rn.f16x2.f32 %r3, %f1, %f2;", 0x477FF000, 0xFFC00001, 0x7C007FFF),
        ("st.shared.u32 [room+4], %r1; ld.shared.u8 %r3, [room+5];", 0x11223344, 0, 0x33),
    ],
)  # fmt: skip
def test_an_instruction(code: str, a: int, b: int, expected: int) -> None:
    found = int(tried(f"{code} {TO64}", pairs((a, b)))[0])
    assert found == expected, f"{code} of {a:#x}, {b:#x}: {found:#x}, expected {expected:#x}"


LOOP = """mov.u32 %r3, 0; mov.u32 %r4, 0; L1: setp.ge.u32 %p1, %r4, %r1; @%p1 bra L2; add.s32 %r3, %r3, %r4;
add.s32 %r4, %r4, 1; bra.uni L1; L2: shfl.sync.bfly.b32 %r3, %r3, 0, 31, -1;"""
EXCHANGE = """mov.u32 %r4, room; shl.b32 %r5, %r1, 2; add.s32 %r5, %r4, %r5; st.shared.u32 [%r5], %r1;
xor.b32 %r6, %r1, 32; shl.b32 %r6, %r6, 2; add.s32 %r6, %r4, %r6; ld.shared.u32 %r3, [%r6];"""
LANES = np.stack([np.arange(64, dtype=np.uint64), np.zeros(64, np.uint64)], axis=1)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("shfl.sync.up.b32 %r3, %r1, 3, 0, -1;", lambda i: i - 3 if i % 32 >= 3 else i),
        ("shfl.sync.down.b32 %r3|%p1, %r1, 3, 31, -1; @!%p1 mov.u32 %r3, 99;", lambda i: i + 3 if i % 32 < 29 else 99),
        ("shfl.sync.bfly.b32 %r3, %r1, 16, 31, -1;", lambda i: i ^ 16),
        ("shfl.sync.idx.b32 %r3, %r1, 2, 0x1C1F, -1;", lambda i: i // 4 * 4 + 2),
        ("redux.sync.add.s32 %r3, %r1, -1;", lambda i: sum(range(i // 32 * 32, i // 32 * 32 + 32))),
        ("setp.gt.u32 %p1, %r1, 33; vote.sync.ballot.b32 %r3, %p1, -1;", lambda i: 0 if i < 32 else 0xFFFFFFFC),
        # a loop of as many rounds as the thread's number, then all together again
        (LOOP, lambda i: i * (i - 1) // 2),
        # a value from the next warp, through shared memory
        (EXCHANGE.replace("\n", "bar.sync 0;"), lambda i: i ^ 32),
    ],
    ids=["up", "down", "bfly", "idx", "redux", "ballot", "loop", "shared"],
)  # fmt: skip
def test_threads_together(code: str, expected: Any) -> None:
    found = tried(f"{code} {TO64}", LANES)
    assert found.tolist() == [expected(i) for i in range(64)]


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        (
            "ld.global.u32 %r3, [%rd8+2];",
            r"line 15: ld\.global\.u32 %r3, \[%rd8\+2\]: 4 bytes at an address that is not a",
        ),
        ("ld.global.u64 %rd3, [%rd8+16];", "8 bytes at 0x.*, 1 such, outside all memory"),
        ("ld.shared.u64 %rd3, [room+256];", "outside the shared memory"),
        ("ld.param.u64 %rd3, [tried_param_1+8];", "outside the parameters"),
        (
            "st.global.u64 [%rd8], %rd1; sub.s64 %rd4, %rd8, %rd7; @%p1 st.global.u64 [%rd4], %rd1;",
            "race in global mem",
        ),
        (EXCHANGE, "a race in shared memory: written at line 15 by thread 0, read at line 16 by 32, and no barrier"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 bra L1; bar.sync 0; L1:", "32 threads wait at a barrier"),
        (
            "setp.lt.u32 %p1, %r1, 5; @%p1 bra L1; shfl.sync.up.b32 %r3, %r1, 1, 0, -1; L1:",
            "lanes of the warp have dive",
        ),
        ("mov.u32 %r3, 1;\n ex2.approx.f32 %f3, %f1;", "line 16: ex2.approx.f32 %f3, %f1: this is not known here"),
        ("add.rn.ftz.f32 %f3, %f1, %f2;", "not known here"),
        ("mov.u32 %r3, %clock;", "not known here"),
    ],
)
def test_a_fault(code: str, wrong: str) -> None:
    with pytest.raises(FaultError, match=wrong):
        tried(code, LANES)


def test_requests_sectors_and_instructions_are_counted() -> None:
    """Of two warps: loads of 16 and stores of 8 bytes a thread, 16 apart; and 8 of one thread, out of order."""
    counts = Counts()
    tried("setp.eq.s32 %p1, %r1, 40; @%p1 ld.global.u64 %rd3, [%rd8];", LANES, counts=counts)
    assert (counts.requests, counts.sectors) == (2 + 2 + 1, 2 * 16 + 2 * 16 + 1)
    assert counts.instructions == 2 * (1 + 2 + 1 + 2 + 1 + 1 + 1)  # without moves and the end


# --------------------------------------------------------------------------------------------- what compilers emit

# A few that stand for the others: of Triton's each compiles kernels of its own.
QUICK = CASES[::17]
TRITON_QUICK = ("adamw_ everything bfloat16 missing", "norm everything bfloat16 missing", "scale_ everything float32 ")
OLDER = "older Triton"


def find(*beginnings: str) -> list[Case]:
    return [next(case for case in CASES if str(case).startswith(beginning)) for beginning in beginnings]


@pytest.fixture(scope="module")
def made() -> Iterator[dict[str, Any]]:
    """Backends whose launches are interpreted, by compiler, or why there is none: read and compiled once."""
    found: dict[str, Any] = {}
    yield found
    for backend in found.values():
        if not isinstance(backend, str):
            backend.close()


def make(name: str) -> Any:
    try:
        if name.startswith("cuda"):
            return ptx_backends.PtxCuda(ptx_backends.cuda_ptx(int(name.split()[1])))
        return ptx_backends.PtxTriton(sass.older_triton() if name == OLDER else "")
    except sass.UnavailableError as error:
        return str(error)


@pytest.fixture
def interpreted(request: pytest.FixtureRequest, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The backend, also for whoever asks for it by name."""
    if request.param not in made:
        made[request.param] = make(request.param)
    backend, state = made[request.param], kernels.backend_state
    if isinstance(backend, str):
        pytest.skip(backend)
    monkeypatch.setattr(kernels, "backend_state", lambda name: backend if name == backend.name else state(name))
    return backend


def on(*names: str) -> Any:
    return pytest.mark.parametrize("interpreted", names, indirect=True)


@on("cuda 90")
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_cuda(interpreted: Backend, case: Case) -> None:
    check(interpreted, CPU, case)


@on("Triton")
@pytest.mark.parametrize("case", find(*TRITON_QUICK), ids=str)
def test_triton(interpreted: Backend, case: Case) -> None:
    check(interpreted, CPU, case)


@on("cuda 90")
def test_far_addresses(interpreted: Backend) -> None:
    check_far(interpreted, CPU)


@on("cuda 90")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_every_pattern_is_scaled(interpreted: Backend, dtype: torch.dtype) -> None:
    """Halved, whole and apart; what is rounded to a denormal float16 included."""
    patterns = torch.from_numpy(np.arange(2**16 + 1, dtype=np.uint16).view(np.int16)).view(dtype)
    for offset in (0, 1):
        scaled = patterns.clone()[offset:]
        interpreted.scale_(compile_live([FreezeMask(scaled.shape)]), [scaled], torch.tensor(0.3))
        expected = (patterns[offset:].float() * 0.3).to(dtype)
        assert_same_bits(scaled, expected, f"{short(dtype)} from {offset}", any_nan=True)


@on("cuda 90", "Triton")
def test_sums(interpreted: Backend) -> None:
    for dtype in DTYPES:
        check_sums(interpreted, CPU, dtype)


def checked(backend: Backend, case: Case) -> None:
    try:
        check(backend, CPU, case)
    except FaultError as error:
        pytest.fail(f"{case}: {error}")


@pytest.mark.slow
@on("cuda 80", "cuda 90", "Triton", OLDER)
def test_every_case(interpreted: Any) -> None:
    """All kernels of csrc/cuda.cu run; of Triton's, those that the cases take."""
    for case in CASES:
        checked(interpreted, case)
    check_far(interpreted, CPU)
    if interpreted.name == "cuda":
        uploads(interpreted, 100_003)
        idle = [name for name, kernel in interpreted.kernels.items() if not kernel.used]
        assert not idle, f"of {len(interpreted.kernels)} kernels these never ran: {idle}"


@pytest.mark.slow
@on("cuda 90")
def test_random_programs(interpreted: Backend) -> None:
    """Beside the other backends, in the same programs."""
    run_suite("contract/test_machine.py", least=2, SAFEFREEZE_TEST_BACKEND="cuda-ptx")


def uploads(backend: Any, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    with backend.watching():
        assert backend._upload(None, CPU, content).numpy().tobytes() == content


@on("cuda 90")
@pytest.mark.parametrize("size", [0, 1, 4000, 4001, 32_001])
def test_uploads(interpreted: Any, size: int) -> None:
    uploads(interpreted, size)


@on("cuda 90")
@pytest.mark.parametrize(
    "case", [case for case in traffic.CASES if case.shapes[0][-1] == 4096][:3], ids=lambda c: c.name
)
def test_no_more_is_moved_and_issued_than_recorded(interpreted: Any, case: traffic.Case) -> None:
    """A part of ``make sass``."""
    sectors, instructions, _ = traffic.count(interpreted, case)
    assert traffic.judge(case, "cuda", sectors, instructions) == ""
    assert "expected at most" in traffic.judge(case, "cuda", 2 * sectors, instructions)


# ----------------------------------------------------------------------------------------------------- its mutants


def without_barrier(ptx: str, kernel: str, number: int) -> str:
    """PTX whose kernel, by a part of its name, lacks one of its barriers."""
    first = re.search(rf"\.entry [\w$]*{kernel}", ptx)
    assert first is not None, kernel
    end = ptx.find(".entry", first.end())
    places = [
        m.start() for m in re.finditer(r"bar\.sync", ptx[: end if end > 0 else None]) if m.start() > first.start()
    ]
    assert places
    return ptx[: places[number]] + "//" + ptx[places[number] :]


ADAMW, NORM = "adamw_kernelINS1_4BF16ENS1_3F32ELNS0_8RoundingE0ELb0E", "norm_kernelINS1_3F32ELNS_8NormKindE0E"


@pytest.mark.parametrize(
    ("kernel", "number", "case"),
    # The fourth barrier of a step, the last of `Visited::find`, is there for copies: a step has another behind it. The
    # second of a norm is among threads of one warp, which here run in step; it is a mutant of tests/torture.
    [*((ADAMW, number, "adamw_ half_of_elements bfloat16 packed_grads") for number in (0, 1, 2, 4)),
     (NORM, 0, "norm freeze_none float32")],
)  # fmt: skip
def test_a_barrier_that_is_missing_is_found(kernel: str, number: int, case: str) -> None:
    """Whatever the order in which threads run."""
    try:
        backend = ptx_backends.PtxCuda(without_barrier(ptx_backends.cuda_ptx(), kernel, number))
    except sass.UnavailableError as error:
        pytest.skip(str(error))
    with pytest.raises(FaultError, match="a race in shared memory"):
        check(backend, CPU, *find(case))
