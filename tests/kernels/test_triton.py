"""The Triton backend: its kernels interpreted, in a process of their own, and on a GPU where there is one."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
import triton_driver
from backend_cases import CASES, Case, check, check_far
from other_backends import SUITE, run_suite

from benchmarks import sass
from safefreeze_kernels.kernels.backend import Backend, BackendUnavailableError, backend_state, choose_backend
from safefreeze_kernels.kernels.parts import compile_live
from safefreeze_kernels.kernels.tiles import Tiles
from safefreeze_kernels.plan.mask import FreezeMask

triton = pytest.importorskip("triton")

# Read when Triton is imported: one process either interprets or compiles.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DEVICE = CPU if INTERPRETED else GPU
STATE = backend_state("triton")

pytestmark = pytest.mark.usefixtures("one_thread")
GPU_ONLY = f"GPU only: {STATE if isinstance(STATE, str) else 'the kernels are interpreted'}"
runs = pytest.mark.skipif(isinstance(STATE, str), reason=GPU_ONLY)
compiled = pytest.mark.skipif(INTERPRETED or isinstance(STATE, str), reason=GPU_ONLY)
interprets = pytest.mark.skipif(
    triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton 3.6 cannot interpret with NumPy 2.4",
)
#: Interpreted, cases are shared out among processes, each of which a test of the parent starts.
SHARES = 4
OWN = CASES[int(os.environ["SAFEFREEZE_SHARE"]) :: SHARES] if "SAFEFREEZE_SHARE" in os.environ else CASES
not_in_child = pytest.mark.skipif(INTERPRETED, reason="not in the process that interprets")


@pytest.fixture
def backend() -> Backend:
    assert not isinstance(STATE, str)
    return STATE


@runs
@pytest.mark.parametrize("case", OWN, ids=str)
def test_case(backend: Backend, case: Case) -> None:
    check(backend, DEVICE, case)


@runs
def test_far_addresses(backend: Backend) -> None:
    check_far(backend, DEVICE)


@pytest.mark.long
@not_in_child
@interprets
@pytest.mark.parametrize("share", range(SHARES))
def test_interpreted(share: int) -> None:
    run_suite(__file__, least=len(CASES[share::SHARES]) + 1, TRITON_INTERPRET="1", SAFEFREEZE_SHARE=str(share))


@pytest.mark.slow
@not_in_child
@interprets
def test_the_suite_holds_interpreted() -> None:
    run_suite(*SUITE, least=500, TRITON_INTERPRET="1", SAFEFREEZE_TEST_BACKEND="triton")


@pytest.mark.slow
@not_in_child
@interprets
def test_random_programs_interpreted() -> None:
    """Beside the other backends, in the same programs."""
    run_suite("contract/test_machine.py", least=2, TRITON_INTERPRET="1", SAFEFREEZE_TEST_BACKEND="triton")


@pytest.mark.slow
@compiled
def test_the_suite_holds_on_a_gpu() -> None:
    run_suite(*SUITE, least=500, SAFEFREEZE_TEST_BACKEND="triton")


# ----------------------------------------------------------------------------------------------------- who it serves


@runs
def test_devices_it_does_not_take(backend: Backend) -> None:
    assert backend.refusal(DEVICE) == ""
    other = GPU if INTERPRETED else CPU
    assert "takes CPU tensors only" in backend.refusal(other) if INTERPRETED else "GPU" in backend.refusal(other)
    with pytest.raises(ValueError, match=f"backend 'triton' was given tensors on {other}, but it "):
        choose_backend("triton", other, "op")


@not_in_child
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from safefreeze_kernels.kernels import triton

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match=r"no GPU was found .TRITON_INTERPRET=1"):
        triton.TritonBackend()


@pytest.mark.skipif(not isinstance(STATE, str), reason="there is a GPU, or an interpreter")
def test_a_named_backend_does_not_fall_back() -> None:
    with pytest.raises(BackendUnavailableError, match="op: backend 'triton' does not run here: no GPU was found"):
        choose_backend("triton", CPU, "op")


# --------------------------------------------------------------------------------------------------------- launches


@not_in_child
@pytest.mark.parametrize("older", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["installed", "oldest"])
def test_compiled_kernels_are_launched_as_triton_would(older: bool) -> None:
    """By a driver that only notes it: Triton looks for a kernel once for each set of arguments that are None."""
    try:
        folder = sass.older_triton() if older else ""
    except sass.UnavailableError as error:
        pytest.skip(str(error))
    with sass.triton_processes(1, folder) as pool:
        assert pool.submit(triton_driver.specialised).result() == []
        looks, taken = zip(*pool.submit(triton_driver.launches).result(), strict=True)
    assert looks == (1, 2, 2, 2)
    assert taken[0] != taken[1]
    assert taken[:2] == taken[2:]


# ------------------------------------------------------------------------------------------------- lists on devices


def test_a_list_is_copied_once() -> None:
    work = compile_live([FreezeMask((30, 300), rows=[1, 2, 5])])
    assert Tiles.of(work, CPU) is Tiles.of(work, CPU)
    assert Tiles.of(compile_live([FreezeMask((3,))]), CPU) is not Tiles.of(work, CPU)


def test_a_copied_list_finds_its_addresses() -> None:
    """Rows of parts hold addresses: a deep copy shares them with the original, and keeps them alive."""
    work = compile_live([FreezeMask((30, 8), rows=[1, 2, 5])])
    on_device = Tiles.of(work, CPU)
    assert on_device.parts.any(), "expected a list, whose address is kept"
    assert copy.deepcopy(on_device).parts.data_ptr() == on_device.parts.data_ptr()
