"""The CUDA backend: its kernels run on the host, and on a GPU where there is one; what its set-up refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from backend_cases import CASES, Case, check, check_far
from other_backends import SUITE, run_suite

from safefreeze_kernels.kernels import backend as kernels
from safefreeze_kernels.kernels import cuda
from safefreeze_kernels.kernels.backend import Backend

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


def test_the_suite_holds_on_the_host(native: Any) -> None:
    run_suite(*SUITE, CONTRACT, least=601, SAFEFREEZE_TEST_BACKEND="cuda-on-host")


def test_random_programs_on_the_host(native: Any) -> None:
    """Beside the other backends, in the same programs."""
    run_suite(MACHINE, least=2, SAFEFREEZE_TEST_BACKEND="cuda-on-host")


@needs_gpu
def test_the_suite_holds_on_a_gpu() -> None:
    run_suite(*SUITE, CONTRACT, least=601, SAFEFREEZE_TEST_BACKEND="cuda")


# ---------------------------------------------------------------------------------------------------------- set-up


def versions_of(driver: int, build: int = 13000) -> Any:
    return SimpleNamespace(driver_version=lambda: driver, runtime_version=lambda: build)


@pytest.mark.parametrize(
    ("native_part", "reason"),
    [
        (versions_of(0), "no NVIDIA driver was found"),
        (versions_of(12080), r"driver is for CUDA 12\.8, older than this build's 13\.0; update the driver"),
        (versions_of(11040, 12060), r"driver is for CUDA 11\.4, older than this build's 12\.6"),
    ],
)
def test_a_driver_that_does_not_do(monkeypatch: pytest.MonkeyPatch, native_part: Any, reason: str) -> None:
    monkeypatch.setattr(cuda, "_native", lambda: native_part)
    with pytest.raises(ImportError, match=reason):
        cuda.load()


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


@pytest.mark.parametrize("size", [0, 1, 8, 3999, 4000, 4001, 31_999, 32_000, 32_001, 100_003])
def test_uploads_of_any_size(native: Any, size: int) -> None:
    """Launch parameters hold 4 KB or 32 KB; more takes more launches."""
    content = np.random.default_rng(size).bytes(size)
    room = np.full(-(-size // 8) * 8 + 8, 0xA5, np.uint8)
    native.upload(0, 0, content, room.ctypes.data)
    assert room[:size].tobytes() == content
    assert (room[-8:] == 0xA5).all(), "memory past the end was written to"
