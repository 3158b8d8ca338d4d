"""The CUDA backend: its kernels run on the host, and on a GPU where there is one; what its set-up refuses."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from backend_cases import CASES, Case, check, check_far
from other_backends import SUITE, run_suite

from safefreeze_kernels.kernels import backend as kernels
from safefreeze_kernels.kernels import cuda, tiles
from safefreeze_kernels.kernels.backend import Backend
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


def test_the_suite_holds_on_the_host(native: Any) -> None:
    run_suite(*SUITE, CONTRACT, least=601, SAFEFREEZE_TEST_BACKEND="cuda-on-host")


def test_random_programs_on_the_host(native: Any) -> None:
    """Beside the other backends, in the same programs."""
    run_suite(MACHINE, least=2, SAFEFREEZE_TEST_BACKEND="cuda-on-host")


@needs_gpu
def test_the_suite_holds_on_a_gpu() -> None:
    run_suite(*SUITE, CONTRACT, least=601, SAFEFREEZE_TEST_BACKEND="cuda")


# ----------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize(("width", "fill"), [(4096, 0.97), (1024, 0.97), (576, 0.95), (256, 0.97), (24, 0.95)])
def test_short_rows_fill_tiles(width: int, fill: float) -> None:
    """80% of the rows frozen, scattered: a block gets nearly as many elements as where nothing is, each once."""
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
