"""The contenders of `cases.py` through pytest-benchmark: ``pytest benchmarks --benchmark-only [--quick] [-k …]``.

For statistics and comparisons between runs. Ratios that are to be quoted come from ``python -m benchmarks``, which
interleaves the two contenders of a case; here they run one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from safefreeze_kernels.measure.timing import ColdCaches

from .cases import CASES, Contender, TensorSet, distinct_contenders, shrink
from .contenders import Inputs, Runner, UnavailableError

pytest.importorskip("pytest_benchmark")
_THREADS = 2
_ROUNDS = 10


@pytest.fixture(scope="module")
def caches() -> Iterator[ColdCaches]:
    before = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    yield ColdCaches()
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick", default=False)
    found = distinct_contenders(tuple(shrink(case) if quick else case for case in CASES))
    names = [f"{tensors}: {who}".replace("×", "x") for tensors, who in found]
    metafunc.parametrize(("tensors", "contender"), found, ids=names)


def test_contender(benchmark: Any, caches: ColdCaches, tensors: TensorSet, contender: Contender) -> None:
    inputs = Inputs(tensors, seed=0)
    try:
        runner = Runner(contender, inputs)
        runner.warm_up()
    except UnavailableError as error:
        pytest.skip(f"{contender}: {error}")
    runner.check()
    inputs.forget_stock()
    benchmark.group = str(tensors)
    benchmark.extra_info["bytes_moved"] = runner.bytes_moved
    benchmark.pedantic(runner.run, setup=caches.evict, rounds=_ROUNDS)
    runner.check_frozen()
