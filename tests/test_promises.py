"""What is promised beyond ratios: exact state bytes, a 7B plan compiled in a second, a quick import, little host time.

Interruptions only ever add time, so the least of several times is held against a limit that leaves room for slow
machines; what wall time or a rival decides is run by `make torture` alone.
"""

from __future__ import annotations

import time
import tracemalloc
from functools import partial

import pytest
import torch
from torch.nn import Parameter

import safefreeze_kernels as sf
from benchmarks.builder import LABELS_FILE, LLAMA, generated_labels, import_seconds, llama_7b_shapes
from benchmarks.cases import NOTHING, Contender, Freeze, TensorSet, rows
from benchmarks.contenders import Inputs, Runner
from safefreeze_kernels.attribution import find_units, read_labels
from safefreeze_kernels.kernels.parts import compile_live
from safefreeze_kernels.kernels.runs import Runs
from safefreeze_kernels.measure.timing import in_turns, milliseconds

pytestmark = pytest.mark.usefixtures("one_thread")


FREEZES = [NOTHING, rows(0.075), rows(0.8), Freeze("columns", 0.8), Freeze("elements", 0.1)]


@pytest.mark.parametrize("freeze", FREEZES, ids=str)
@pytest.mark.parametrize(("weights", "state"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
def test_state_is_the_live_share_of_a_dense_one_to_the_byte(freeze: Freeze, weights: str, state: str) -> None:
    """Single elements keep their place."""
    runner = Runner(Contender("masked", freeze, weights, state), Inputs(TensorSet(3, (40, 64)), seed=0))  # type: ignore[arg-type]
    runner.warm_up()
    runner.check()
    assert runner.state_bytes is not None
    held, expected = runner.state_bytes
    assert held == expected > 0


@pytest.mark.parametrize("published", [False, True])
def test_a_plan_for_7b_is_compiled_in_a_second_and_64_mb(published: bool) -> None:
    if published and not LABELS_FILE.is_file():
        pytest.skip("the published labels are not at hand")
    labels = read_labels(LABELS_FILE) if published else generated_labels()
    shapes = llama_7b_shapes()
    plan = sf.MaskBuilder(labels).freeze(scu=True, cu=True).build(find_units(shapes, LLAMA), preset="full")
    assert 0.79 < sum(m.frozen_count for m in plan.values()) / sum(m.numel for m in plan.values()) < 0.81
    masks = [plan.get(name) or sf.FreezeMask(shape) for name, shape in shapes.items()]
    spent = [milliseconds(lambda: Runs.of(compile_live(masks)), clock=time.process_time) for _ in range(3)]
    assert min(spent) <= 1000
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work = Runs.of(compile_live(masks))
        most = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    # C++ made the lists themselves, which Python's count leaves out, in vectors with room for up to as many again
    assert most + 2 * work.nbytes <= 64e6


@pytest.mark.slow
def test_importing_takes_a_tenth_of_a_second_beyond_torch() -> None:
    assert any(import_seconds() <= 0.1 for _ in range(3))


@pytest.mark.slow
def test_the_host_takes_half_of_torch_s_time_for_300_small_tensors() -> None:
    """A step whose arithmetic is nothing; about 0.2 ms, and torch's fused one 1."""
    shape = (4, 4)
    named = [(f"layers.{i}.weight", Parameter(torch.ones(shape))) for i in range(300)]
    for _, p in named:
        p.grad = torch.ones(shape)
    plan = sf.FreezePlan({name: sf.FreezeMask(shape, rows=[i % 4]) for i, (name, _) in enumerate(named)})
    ours = sf.MaskedAdamW(named, lr=1e-3, freeze=plan)
    stock = torch.optim.AdamW([p for _, p in named], lr=1e-3, fused=True)
    steps = {"ours": ours.step, "torch": stock.step}
    times = in_turns(
        {name: partial(milliseconds, step, clock=time.thread_time) for name, step in steps.items()}, 60, warmup=3
    )
    assert min(times["ours"]) <= 0.5 * min(times["torch"]), (min(times["ours"]), min(times["torch"]))
