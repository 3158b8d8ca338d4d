"""What the test files share: comparison by bytes, the backends that run here, and deterministic runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from safefreeze_kernels.kernels import backend as kernels

settings.register_profile(
    "reproducible", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("reproducible")

# The specification first. A compiled backend that does not run here is left out.
LOCAL = BACKENDS = tuple(name for name in ("reference", "cpu") if not isinstance(kernels.backend_state(name), str))
if "SAFEFREEZE_TEST_BACKEND" in os.environ:  # the same tests on a backend that is made for GPUs
    from other_backends import other_backend

    _chosen, _backend_state = other_backend(os.environ["SAFEFREEZE_TEST_BACKEND"]), kernels.backend_state
    BACKENDS = (_chosen.name,)
    kernels.backend_state = lambda name: _chosen if name == _chosen.name else _backend_state(name)  # type: ignore[assignment]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.complex64, torch.complex128)  # the optimizers take these too
_AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and on busy cores wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def short(dtype: torch.dtype) -> str:
    """A dtype as a test's name shows it."""
    return str(dtype).removeprefix("torch.")


def real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs, in one more dimension; other tensors as they are. Over the same memory."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def pairs(flags: Tensor, like: Tensor) -> Tensor:
    """A flag per element of ``like``, as one per number of its `real` view."""
    return flags[..., None].expand(*flags.shape, 2) if like.is_complex() else flags


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, as integers of its width; of complex ones those of its `real` view."""
    tensor = real(tensor)
    return tensor.detach().contiguous().reshape(-1).view(_AS_BITS[tensor.element_size()]).reshape(tensor.shape)


def from_bits(pattern: int, dtype: torch.dtype) -> Tensor:
    """The 0-dim tensor whose bytes are ``pattern``."""
    width = torch.empty((), dtype=dtype).element_size()
    signed = pattern - (1 << 8 * width) if pattern >> (8 * width - 1) else pattern
    return torch.tensor([signed], dtype=_AS_BITS[width]).view(dtype)[0]


def shown(value: Tensor) -> str:
    """A 0-dim tensor with its bytes."""
    width = real(value).element_size()
    words = (f"{int(word) & ((1 << 8 * width) - 1):0{2 * width}x}" for word in bits(value).reshape(-1))
    return f"{value.item()!r} (0x{''.join(words)})"


def fail_at(wrong: Tensor, how: str, what: str, got: Tensor, *expected: Tensor) -> None:
    """Fail if any flag of ``wrong`` is set, naming the first coordinate, what is there and what should be."""
    if wrong.any():
        first = tuple(int(i) for i in wrong.nonzero()[0])
        pytest.fail(
            f"{what}: {int(wrong.sum())} of {got.numel()} elements {how}, first at {first}: "
            f"got {shown(got[first])}, expected {' to '.join(shown(bound[first]) for bound in expected)}"
        )


def assert_same_bits(
    got: Tensor, expected: Tensor, what: str, *, where: Tensor | None = None, any_nan: bool = False
) -> None:
    """Fail naming the first coordinate that differs and both values with their bytes.

    Args:
        where: bool tensor, the elements to compare; None: all.
        any_nan: a NaN equals any NaN. IEEE 754 leaves the payload of a computed NaN open.
    """
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    differs = bits(got) != bits(expected)
    if got.is_complex():
        differs = differs.any(-1)
    if any_nan and got.is_floating_point():
        differs &= ~(got.isnan() & expected.isnan())
    if where is not None:
        differs &= where
    fail_at(differs, "differ", what, got, expected)


def assert_within(got: Tensor, low: Tensor, high: Tensor, what: str, *, where: Tensor | None = None) -> None:
    """Fail naming the first coordinate outside ``[low, high]``; NaN is inside only where both bounds are NaN."""
    inside = ((got >= low) & (got <= high)) | (got.isnan() & low.isnan() & high.isnan())
    if where is not None:
        inside |= ~where
    fail_at(~inside, "are outside", what, got, low, high)


def assert_same_state(got: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Two state dicts hold the same: tensors by bytes, everything else by equality, and the same keys."""

    def same(a: Any, b: Any, path: str) -> None:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            assert_same_bits(a, b, path)
        elif isinstance(a, Mapping) and isinstance(b, Mapping):
            assert sorted(map(str, a)) == sorted(map(str, b)), f"{path}: keys {list(a)}, expected {list(b)}"
            for key in a:
                same(a[key], b[key], f"{path}[{key!r}]")
        elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            assert len(a) == len(b), f"{path}: {len(a)} entries, expected {len(b)}"
            for index, (one, other) in enumerate(zip(a, b, strict=True)):
                same(one, other, f"{path}[{index}]")
        else:
            assert a == b, f"{path}: got {a!r}, expected {b!r}"

    same(got, expected, what)


def random_normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values from a seed, the same in every process."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32)).to(dtype)


def replay(seed: int) -> Callable[..., Tensor]:
    """A source of normal tensors: ``draw(shape, dtype)``; two sources of one seed give the same sequence."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        if dtype.is_complex:
            return torch.complex(draw(shape, dtype.to_real()), draw(shape, dtype.to_real()))
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).reshape(shape).to(dtype)

    return draw
