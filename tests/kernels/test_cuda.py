"""The CUDA backend: its kernels run on the host, and on a GPU where there is one; what its set-up refuses."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from backend_cases import CASES, Case, check, check_far
from conftest import assert_same_bits
from other_backends import SUITE, run_suite

from safefreeze_kernels.kernels import backend as kernels
from safefreeze_kernels.kernels import cuda, tiles
from safefreeze_kernels.kernels.backend import Backend, choose_backend
from safefreeze_kernels.kernels.operands import SCALARS, AdamWOperands, adamw_scalars
from safefreeze_kernels.kernels.parts import compile_live
from safefreeze_kernels.kernels.tiles import TILE_ELEMENTS, TILE_PART, Tiles
from safefreeze_kernels.plan.mask import FreezeMask

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GPU_STATE = kernels.backend_state("cuda")
needs_gpu = pytest.mark.skipif(isinstance(GPU_STATE, str), reason=f"GPU only: {GPU_STATE}")
CONTRACT, MACHINE = "contract/test_contract.py", "contract/test_machine.py"


@pytest.fixture(scope="module")
def native() -> Any:
    """The functions of `_C.cuda`, run on the host."""
    cuda_on_host = pytest.importorskip("cuda_on_host")
    if cuda_on_host.COMPILER is None:
        pytest.skip("no C++ compiler was found")
    return cuda_on_host.build()


@pytest.fixture
def on_host(native: Any, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Backend:
    """The backend on CPU tensors, also for whoever asks for it by name."""
    backend, state = cuda.CudaBackend(native, "cpu"), kernels.backend_state
    monkeypatch.setattr(kernels, "backend_state", lambda name: backend if name == "cuda" else state(name))
    return backend


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_host(on_host: Backend, case: Case) -> None:
    check(on_host, CPU, case)


@pytest.mark.parametrize("case", [case for case in CASES if case.layout == "many_tiles"], ids=str)
def test_long_tiles_on_the_host(monkeypatch: pytest.MonkeyPatch, on_host: Backend, case: Case) -> None:
    """As they are where there is more work than in any case."""
    monkeypatch.setattr(tiles, "_SHORTEST", TILE_ELEMENTS)
    check(on_host, CPU, case)


@pytest.mark.parametrize("order", [-1, 1, 2])
@pytest.mark.parametrize("case", CASES[::9], ids=str)
def test_on_the_host_in_another_order(on_host: Backend, native: Any, case: Case, order: int) -> None:
    """Threads run backwards, and in orders drawn from seeds, between one barrier and the next."""
    native.set_order(order)
    try:
        check(on_host, CPU, case)
    finally:
        native.set_order(0)


def test_far_addresses_on_the_host(on_host: Backend) -> None:
    check_far(on_host, CPU)


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu(case: Case) -> None:
    assert not isinstance(GPU_STATE, str)
    check(GPU_STATE, GPU, case)


@needs_gpu
def test_far_addresses_on_a_gpu() -> None:
    assert not isinstance(GPU_STATE, str)
    check_far(GPU_STATE, GPU)


@pytest.mark.long
def test_the_suite_holds_on_the_host(native: Any) -> None:
    run_suite(*SUITE, CONTRACT, least=601, SAFEFREEZE_TEST_BACKEND="cuda-on-host")


@pytest.mark.long
def test_random_programs_on_the_host(native: Any) -> None:
    """Beside the other backends, in the same programs."""
    run_suite(MACHINE, least=2, SAFEFREEZE_TEST_BACKEND="cuda-on-host")


@needs_gpu
def test_the_suite_holds_on_a_gpu() -> None:
    run_suite(*SUITE, CONTRACT, least=601, SAFEFREEZE_TEST_BACKEND="cuda")


# -------------------------------------------------------------------------------------------------------- rounding


def all_patterns(order: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Every pattern once, NaN payloads included, in one order for each number."""
    patterns = np.random.default_rng(order).permutation(2**16).astype(np.uint16)
    return torch.from_numpy(patterns.view(np.int16)).view(dtype)


def many_floats() -> torch.Tensor:
    """Beside each bfloat16 what rounds to it and to its neighbours: ties, the next on either side, and others."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xABCD], np.uint32)
    bits = (np.arange(2**16, dtype=np.uint32)[:, None] << 16 | low).reshape(-1)
    return torch.from_numpy(np.random.default_rng(0).permutation(bits).view(np.float32))


@pytest.mark.parametrize("offset", [0, 1], ids=["whole", "apart"])
@pytest.mark.parametrize(
    ("param", "grad", "betas"),
    [(all_patterns(0), all_patterns(1), (0.9, 0.99)), (all_patterns(0), all_patterns(1), (0.0, 0.0)),
     (torch.ones(2**19), many_floats(), (0.0, 0.9)),
     (all_patterns(0, torch.float16), all_patterns(1, torch.float16), (0.9, 0.99))],
    ids=["bfloat16", "bfloat16, no memory", "float32", "float16"],
)  # fmt: skip
def test_numbers_are_rounded_alike(
    on_host: Backend, offset: int, param: torch.Tensor, grad: torch.Tensor, betas: tuple[float, float]
) -> None:
    """To the same bits as `cpu`, which makes one bfloat16 NaN of all: rounded in pairs by the hardware, NaNs become
    others."""
    work, scalars = compile_live([FreezeMask((grad.numel(),))]), np.zeros(1, SCALARS)
    scalars[0] = adamw_scalars(lr=0.5, betas=betas, eps=1e-8, weight_decay=0.1, step=1, decoupled=True)

    def step(backend: Backend) -> list[torch.Tensor]:
        def at_offset(values: torch.Tensor) -> torch.Tensor:
            return torch.cat([values[:offset], values])[offset:]

        zero = torch.zeros(grad.numel(), dtype=torch.bfloat16)
        moments = [all_patterns(2), all_patterns(3)] if param.dtype == torch.bfloat16 else [zero, zero]
        p, g, m, v = (at_offset(values) for values in (param, grad, *moments))
        operands = AdamWOperands([p], [m], [v])
        operands.grads = [g]  # type: ignore[assignment]
        backend.adamw_(work, operands, scalars, np.zeros(1, np.int32), l2=False, amsgrad=False)
        return [p, m, v]

    for name, got, right in zip("pmv", step(on_host), step(choose_backend("cpu", CPU, "test")), strict=True):
        assert_same_bits(got, right, name, any_nan=got.dtype != torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize(("width", "fill"), [(4096, 0.97), (1024, 0.97), (576, 0.95), (256, 0.97), (24, 0.95)])
def test_short_rows_fill_tiles(monkeypatch: pytest.MonkeyPatch, width: int, fill: float) -> None:
    """80% of the rows frozen, scattered: a block gets nearly as many elements as where nothing is, each once."""
    monkeypatch.setattr(tiles, "_ENOUGH_TILES", 64)
    rows = 3 * 2**20 // width
    frozen = np.random.default_rng(width).random(rows) < 0.8
    mask = FreezeMask((rows, width), rows=frozen)
    form = Tiles.of(compile_live([mask]), CPU, rows=True)
    found = form.host_tiles
    assert found["count"].mean() > fill * TILE_ELEMENTS, f"{len(found)} tiles of {found['count'].mean():.0f} elements"
    assert found["count"].max() <= TILE_ELEMENTS
    assert (found["width"] == width).all()
    assert (found["count"] % width == 0).all()
    first = form.parts[0].numpy().view(TILE_PART)["cols"].item()
    starts = np.ctypeslib.as_array((ctypes.c_int32 * int((~frozen).sum())).from_address(first))
    visited = [
        tile["start"] + starts[tile["at"] + np.arange(tile["count"]) // width] + np.arange(tile["count"]) % width
        for tile in found
    ]
    assert np.array_equal(np.concatenate(visited), np.flatnonzero(np.repeat(~frozen, width)))
    assert np.array_equal(found["packed"], np.cumsum(found["count"]) - found["count"]), "state follows in order"


@pytest.mark.parametrize(("millions", "length"), [(1, 2048), (16, 4096), (25, 6144), (64, 8192)])
def test_little_work_is_cut_into_shorter_tiles(millions: int, length: int) -> None:
    """So that a GPU's last blocks end about together."""
    masks = [FreezeMask((2**10, 2**10))] * millions
    counts = Tiles.of(compile_live(masks), CPU, rows=True).host_tiles["count"]
    assert counts.max() == length
    assert counts.sum() == millions * 2**20


# ---------------------------------------------------------------------------------------------------------- set-up


def versions_of(driver: int, build: int = 13000) -> Any:
    return SimpleNamespace(driver_version=lambda: driver, runtime_version=lambda: build)


@pytest.mark.parametrize(
    ("native_part", "reason"),
    [
        (versions_of(0), "no NVIDIA driver was found"),
        (versions_of(12080), r"driver is for CUDA 12\.8, older than this build's 13\.0; update the driver"),
        (versions_of(12000, 12060), r"driver is for CUDA 12\.0, older than this build's 12\.6; update the driver"),
        (versions_of(11040, 12060), r"driver is for CUDA 11\.4, older than this build's 12\.6"),
    ],
)
def test_a_driver_that_does_not_do(monkeypatch: pytest.MonkeyPatch, native_part: Any, reason: str) -> None:
    monkeypatch.setattr(cuda, "_native", lambda: native_part)
    with pytest.raises(ImportError, match=reason):
        cuda.load()


@pytest.mark.parametrize(("driver", "build"), [(12010, 12060), (13000, 12060), (12000, 12000)])
def test_a_driver_that_does(monkeypatch: pytest.MonkeyPatch, native: Any, driver: int, build: int) -> None:
    """It may be older than the build within a major version, but for 12.0, which takes launch parameters of 4 KB."""
    part = SimpleNamespace(**{**vars(native), **vars(versions_of(driver, build))})
    monkeypatch.setattr(cuda, "_native", lambda: part)
    assert cuda.load().name == "cuda"


def test_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import safefreeze_kernels

    monkeypatch.setattr(safefreeze_kernels, "_C", SimpleNamespace(), raising=False)
    with pytest.raises(ImportError, match=r"no CUDA part; install the CUDA toolkit \(nvcc\)"):
        cuda.load()
    with pytest.raises(ImportError, match="no CUDA part"):
        cuda.versions()


def test_an_extension_of_other_sources(native: Any) -> None:
    for name, value in (("TILE_ELEMENTS", 4096), ("STRUCT_SIZES", {**native.STRUCT_SIZES, "Tile": 24})):
        other = SimpleNamespace(**{**vars(native), name: value})
        with pytest.raises(ImportError, match="built from other sources"):
            cuda.CudaBackend(other)


def test_devices_it_does_not_take(native: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = SimpleNamespace(**{**vars(native), "refusal": lambda index: "no kernel image is available"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    backend = cuda.CudaBackend(refusing)
    assert backend.refusal(CPU) == "it takes cuda tensors only"
    assert backend.refusal(torch.device("cuda", 1)).endswith("do not run on GPU 1: no kernel image is available")


class Stream:
    """Stands for one of torch's, and notes what it waits for."""

    def __init__(self, number: int) -> None:
        self.cuda_stream, self.waited = number, list[int]()

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other.cuda_stream)


def test_tables_are_used_on_other_streams_than_they_were_uploaded_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first use on each other stream waits for uploads, and keeps the memory until that stream is done."""
    first, second, capture = Stream(1), Stream(2), Stream(3)
    current = [first]
    recorded: list[tuple[str, int]] = []

    def upload(array: np.ndarray, device: torch.device) -> Any:
        name = str(array)
        return SimpleNamespace(is_cuda=True, record_stream=lambda stream: recorded.append((name, stream.cuda_stream)))

    monkeypatch.setattr(tiles, "to_device", upload)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] is capture)
    uploads = tiles.Uploads(torch.device("cuda", 0))

    def use(stream: Stream) -> list[tuple[str, int]]:
        current[0] = stream
        recorded.clear()
        uploads.note_use()
        return list(recorded)

    uploads.upload(np.array("a"))
    assert use(first) == [], "its own stream is in order"
    assert (use(second), second.waited) == ([("a", 2)], [1])
    assert (use(second), second.waited) == ([], [1]), "once is enough"
    uploads.upload(np.array("b"))
    assert (use(first), first.waited) == ([("b", 1)], [2]), "a later table came over another stream"
    assert (use(capture), capture.waited) == ([("a", 3), ("b", 3)], []), "a capture may not wait for what is outside it"


@pytest.mark.parametrize("size", [0, 1, 8, 3999, 4000, 4001, 31_999, 32_000, 32_001, 100_003])
def test_uploads_of_any_size(native: Any, size: int) -> None:
    """Launch parameters hold 4 KB or 32 KB; more takes more launches."""
    content = np.random.default_rng(size).bytes(size)
    room = np.full(-(-size // 8) * 8 + 8, 0xA5, np.uint8)
    native.upload(0, 0, content, room.ctypes.data)
    assert room[:size].tobytes() == content
    assert (room[-8:] == 0xA5).all(), "memory past the end was written to"
