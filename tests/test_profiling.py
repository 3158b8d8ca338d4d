"""`profile_step` and `safefreeze bench`: what is measured, that the model is put back, and what the figures say.

No test asserts that anything is fast.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_bits, bits, random_normal
from model_folders import fails, png_size, run, save_model
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels import FreezeMask, FreezePlan
from safefreeze_kernels.measure import step as profiling
from safefreeze_kernels.measure.result import PHASES, StepCost, StepProfile
from safefreeze_kernels.measure.step import profile_step
from safefreeze_kernels.measure.timing import Clock, in_order, in_turns, median_interval

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = FreezePlan({"up.weight": FreezeMask((12, 8), rows=[0, 3, 7]), "down.weight": FreezeMask((8, 12), cols=[1])})
FROZEN, TRAINABLE = 3 * 8 + 8, 12 * 8 + 12 + 12 + 12 + 8 * 12 + 8


class Small(nn.Module):
    """All that training may change: weights, running statistics, a buffer it replaces, dropout, a part in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 8)
        self.dropout, self.fixed = nn.Dropout(0.5), nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[tuple[str, Any]] = []

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        self.calls = self.calls + 1 + 0 * np.random.rand() + 0 * random.random()
        hidden = self.dropout(self.norm(self.up(self.fixed(x))))
        loss = (self.down(hidden) - y).square().mean()
        self.seen.append(("loss", loss.item()))
        return SimpleNamespace(loss=loss)


def batch() -> dict[str, Tensor]:
    return {"x": random_normal(1, 5, 8), "y": random_normal(2, 5, 8)}


def own_loss(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model(**given).loss


def profiled(model: nn.Module | None = None, plan: FreezePlan = PLAN, **options: Any) -> StepProfile:
    return profile_step(model or Small(), batch(), plan, **{"steps": 2, "warmup": 1, **options})


def profiled_alone(model: nn.Module, x: Tensor, plan: FreezePlan) -> StepProfile:
    """One step of a model that returns what is to become small."""
    return profile_step(model, x, plan, loss=lambda network, x: network(x).square().mean(), steps=1, warmup=0)


def made(masked: list[float], stock: list[float], **changed: Any) -> StepProfile:
    """A profile whose whole steps took these milliseconds; a tenth of each was the step, and as much the clip."""

    def cost(name: str, times: list[float]) -> StepCost:
        phases = {phase: tuple(t / 10 for t in times) for phase in PHASES}
        return StepCost(name, {**phases, "whole step": tuple(times)}, 80, "float32", 40, 200)

    parts = {"masked": cost("MaskedAdamW", masked), "stock": cost("torch AdamW, fused", stock)}
    return StepProfile(**{**parts, "parameters": 10, "frozen_fraction": 0.1, "peak_is": "", **changed})


# ------------------------------------------------------------------------------------------------ what is measured


def test_every_phase_of_both_is_timed_in_every_round() -> None:
    profile = profiled(steps=3)
    assert profile.rounds == 3
    assert profile.phases == (*PHASES, "clip + step", "whole step")
    for cost in (profile.masked, profile.stock):
        assert sorted(cost.times_ms) == sorted((*PHASES, "whole step"))
        for phase, times in cost.times_ms.items():
            assert len(times) == 3 and min(times) >= 0, phase
        for number, whole in enumerate(cost.times("whole step")):
            parts = sum(cost.times(phase)[number] for phase in PHASES)
            assert 0 < parts <= whole
            assert cost.times("clip + step")[number] == cost.times("clip")[number] + cost.times("step")[number]
    assert (profile.masked.name, profile.stock.name) == ("MaskedAdamW", "torch AdamW, fused")


def test_both_see_the_same_weights_and_random_numbers_in_alternating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, order = Small(), []
    step = profiling._Work.step

    def watched(work: Any, contender: Any) -> Any:
        order.append(contender.name)
        return step(work, contender)

    monkeypatch.setattr(profiling._Work, "step", watched)
    profiled(model, steps=2, warmup=1)
    masked, stock = "MaskedAdamW", "torch AdamW, fused"
    assert order == [masked, masked, stock, stock, stock, masked, masked, stock, stock, masked]
    assert len(set(model.seen)) == 1 < len(model.seen), "a step from other weights, or another dropout"


def test_bytes_are_those_of_the_tensors() -> None:
    profile = profiled()
    for cost, values in ((profile.masked, TRAINABLE - FROZEN), (profile.stock, TRAINABLE)):
        counts = 4 * 6  # a step count per tensor
        assert cost.state_bytes == 2 * 4 * values + counts, cost.name
        assert cost.gradient_bytes == 4 * TRAINABLE
    assert profile.parameters == TRAINABLE
    assert profile.frozen_fraction == pytest.approx(FROZEN / TRAINABLE)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_counts_what_a_step_holds() -> None:
    # 67 MB, so 200 of gradient and state: blocks above 32 MB glibc gives back at once, smaller ones it may keep
    profile = profiled_alone(nn.Linear(4096, 4096, bias=False), torch.ones(1, 4096), FreezePlan())
    if profile.masked.peak_bytes is None:
        pytest.skip("this system lets nobody reset the peak")
    for cost in (profile.masked, profile.stock):
        held = cost.state_bytes + cost.gradient_bytes
        assert held == 3 * 4 * 4096**2 + 4
        assert cost.peak_bytes is not None
        assert 0.8 * held < cost.peak_bytes < 3 * held, cost.name
    assert "resident memory" in profile.peak_is


def test_where_there_is_no_peak_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "restart_peak", lambda device: None)
    profile = profiled()
    assert profile.masked.peak_bytes is profile.stock.peak_bytes is None
    assert "peak: cannot be measured here" in str(profile)


def test_state_of_unlike_dtypes_is_told() -> None:
    """In bfloat16, stock AdamW keeps bfloat16 moments and ours float32 ones: their bytes alone would mislead."""
    plan = FreezePlan({"weight": FreezeMask((4, 4), rows=[1])})
    profile = profiled_alone(nn.Linear(4, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16), plan)
    assert (profile.masked.state_dtypes, profile.stock.state_dtypes) == ("float32", "bfloat16")
    assert "state masked float32, stock bfloat16" in " ".join(str(profile).split())


def test_without_clipping_there_is_no_such_phase() -> None:
    profile = profiled(max_norm=None)
    assert "clip" not in profile.phases and "clip + step" not in profile.phases
    assert "clip" not in profile.masked.times_ms
    assert profile.settings["fused clipping"] is False


def test_accumulation_runs_the_batch_so_often_and_divides_the_loss() -> None:
    model, grads = Small(), []

    class Watching(sf.MaskedAdamW):
        def step(self, closure: Any = None) -> Any:
            grads.append(self.param_groups[0]["params"][-1].grad.clone())
            return super().step(closure)

        step.hooked = True  # type: ignore[attr-defined]

    def build(named: Any) -> Watching:
        return Watching(named, lr=1e-4, freeze=PLAN)

    model.eval()  # irrelevant: profiling trains
    for module in (model.norm, model.dropout):
        module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]  # stays deterministic
    profiled(model, optimizer=build, steps=1, warmup=0, max_norm=None)
    once, passes = grads.pop(), len(model.seen)
    profiled(model, optimizer=build, steps=1, warmup=0, max_norm=None, accumulation=3)
    torch.testing.assert_close(grads[-1], once)
    assert passes == 1 + 3 * 2
    assert len(model.seen) - passes == 1 + 3 * 3 * 2


def test_autocast_covers_the_forward_pass() -> None:
    model, dtypes = Small(), set()
    model.up.register_forward_hook(lambda module, given, output: dtypes.add(output.dtype))
    profile = profiled(model, autocast=torch.bfloat16)
    assert dtypes == {torch.bfloat16}
    assert profile.settings["autocast"] == "bfloat16"


def test_phases_and_the_optimizer_are_named_in_traces() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        profiled()
    names = {event.key for event in trace.key_averages()}
    assert {f"safefreeze: {phase}" for phase in PHASES} <= names
    assert {"safefreeze: MaskedAdamW", "safefreeze: torch AdamW, fused"} <= names
    assert {"Optimizer.step#MaskedAdamW.step", "Optimizer.step#AdamW.step"} <= names


def test_on_a_gpu_events_time_the_phases_and_only_reading_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no GPU: with stand-ins for torch's events, recorded 1, 2, 4, 8 … ms after each other."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.ms = 2.0 ** log.count("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, later: Event) -> float:
            return later.ms - self.ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    clock = Clock(torch.device("cuda", 0))
    for name in ("forward", "backward", "forward"):
        with clock.phase(name):
            pass
    assert log == ["wait", *["record"] * 6]
    assert clock.read() == {"forward": (4 - 2) + (64 - 32), "backward": 16 - 8, "whole step": 64 - 2}
    assert log[-1] == "wait"


# ----------------------------------------------------------------------------------------------- the model's return


def remembered(model: nn.Module) -> dict[str, Any]:
    """Everything of a model and of the random generators, by bytes."""
    return {
        **{f"weight {name}": bits(p).clone() for name, p in model.named_parameters()},
        **{f"buffer {name}": bits(b).clone() for name, b in model.named_buffers()},
        "objects": [id(t) for t in (*model.parameters(), *model.buffers())],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "torch": torch.get_rng_state(), "numpy": str(np.random.get_state()), "python": random.getstate(),
    }  # fmt: skip


def used_model() -> Small:
    """One that has gradients, a part in eval mode, and a -0.0 among its frozen weights."""
    model = Small()
    model.train()
    model.norm.eval()
    with torch.no_grad():
        model.up.weight[7, 2] = -0.0
    own_loss(model, batch()).backward()
    model.up.bias.grad = None
    return model


def assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    after = remembered(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert_same_bits(after[key], value, key)
        else:
            assert after[key] == value, key


def test_the_model_is_put_back_exactly() -> None:
    model = used_model()
    before = remembered(model)
    profiled(model)
    assert_as_before(model, before)


def test_after_errors_too() -> None:
    model, calls = used_model(), []

    def breaks(network: nn.Module, given: dict[str, Tensor]) -> Tensor:
        calls.append(len(calls))
        if len(calls) == 6:
            network.fixed.weight.requires_grad_(True)
            raise KeyboardInterrupt
        return own_loss(network, given)

    before = remembered(model)
    with pytest.raises(KeyboardInterrupt):
        profiled(model, loss=breaks)
    assert len(calls) == 6
    assert_as_before(model, before)


def test_it_runs_where_gradients_are_off_and_leaves_them_off() -> None:
    with torch.no_grad():
        profiled()
        assert not torch.is_grad_enabled()


# ------------------------------------------------------------------------------------------------ other optimizers


def test_an_optimizer_that_moves_frozen_weights_gets_no_times() -> None:
    model = used_model()
    before = remembered(model)
    with pytest.raises(sf.FrozenDriftError, match=r"up\.weight"):
        profiled(model, optimizer=lambda named: torch.optim.AdamW([p for _, p in named]))
    assert_as_before(model, before)


def test_one_that_moves_them_late_gets_none_either() -> None:
    class Late(sf.MaskedAdamW):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.calls += 1
            if self.calls == 3:  # warm-up, and two timed ones
                with torch.no_grad():
                    self.param_groups[0]["params"][0][3, 0] += 1

        step.hooked = True  # type: ignore[attr-defined]

    def build(named: Any) -> Late:
        return Late(named, freeze=PLAN)

    with pytest.raises(sf.FrozenDriftError, match=r"up\.weight"):
        profiled(optimizer=build)
    profiled(optimizer=build, steps=1)


def test_a_guarded_optimizer_is_profiled_as_any() -> None:
    model = Small()

    def build(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD([p for _, p in named], lr=0.1, momentum=0.9)
        sf.guard(optimizer, PLAN, model)
        return optimizer

    profile = profiled(model, optimizer=build)
    assert profile.masked.name == "SGD"
    assert profile.masked.state_bytes == 4 * TRAINABLE
    assert profile.settings["fused clipping"] is False


@pytest.mark.parametrize("fuse", [True, False])
def test_clipping_is_fused_as_asked(fuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    clip = profiling.clip_grad_norm_

    def watched(*args: Any, **options: Any) -> Any:
        given.append(options["optimizer"])
        return clip(*args, **options)

    monkeypatch.setattr(profiling, "clip_grad_norm_", watched)
    profile = profiled(fuse_clipping=fuse)
    assert profile.settings["fused clipping"] is fuse
    assert {isinstance(each, sf.MaskedAdamW) for each in given} == {fuse}


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_tied_weights_may_go_by_either_name(name: str) -> None:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    tied[2].weight = tied[0].weight
    profile = profiled_alone(tied, torch.ones(2, 6), FreezePlan({name: FreezeMask((6, 6), rows=[2])}))
    assert profile.parameters == 36
    assert profile.frozen_fraction == pytest.approx(1 / 6)


# ---------------------------------------------------------------------------------------------- what the figures say


def test_ratios_are_of_the_two_steps_of_a_round() -> None:
    masked, stock = [2.0, 30.0, 1.0, 4.0, 5.0, 6.0, 7.0], [4.0, 50.0, 4.0, 8.0, 10.0, 12.0, 14.0]
    profile = made(masked, stock)
    ratios = sorted(a / b for a, b in zip(masked, stock, strict=True))
    assert profile.ratio() == (statistics.median(ratios), ratios[0], ratios[-1])
    assert profile.masked.time("whole step") == (5.0, 3.0, 6.5)  # NumPy's linear quartiles
    assert profile.ratio("clip + step").median == pytest.approx(0.5)


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    for n in (6, 7, 10, 21, 25):
        held = 0
        for values in draw.standard_exponential((2000, n)):
            low, high = median_interval(values.tolist())
            held += low <= math.log(2) <= high
        assert held > 0.94 * 2000, n
        if n == 25:
            assert held < 0.98 * 2000, "wider than needed"
    for n in range(1, 6):
        assert median_interval([1.0] * n) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("masked", "differs", "busy", "told", "untold"),
    [
        (
            [90, 110, 95, 108, 93, 107, 101, 99], False, False,
            ("clip + step: no difference measured", "whole step: no difference measured"), "faster",
        ),
        ([90, 91, 92, 90, 91, 92, 90, 91], True, False, ("whole step: faster, 0.910 of stock's time",), "slower"),
        ([110, 111, 112, 110, 111, 112, 110, 111], True, False, ("whole step: slower, 1.110",), "faster"),
        ([50] * 5, False, False, ("at least 6",), "faster"),
        ([50, 100, 50, 100, 50, 100, 75, 60], False, True, ("The machine was busy",), "slower"),
    ],
    ids=["noisy", "faster", "slower", "few", "busy"],
)  # fmt: skip
def test_a_difference_smaller_than_the_spread_is_none(
    masked: list[float], differs: bool, busy: bool, told: tuple[str, ...], untold: str
) -> None:
    profile = made(masked, [100] * len(masked))
    assert (profile.differs(), profile.was_busy) == (differs, busy)
    assert all(words in profile.verdict for words in told) and untold not in str(profile)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_each_has_a_turn_in_every_round_and_is_first_as_often_as_any(n: int) -> None:
    contenders = list(range(n))
    rounds = [in_order(contenders, number) for number in range(-2 * n, 2 * n)]
    assert all(sorted(order) == contenders for order in rounds)
    assert [[order[0] for order in rounds].count(who) for who in contenders] == [4] * n
    assert n == 1 or len(set(map(tuple, rounds))) >= 2
    found = in_turns({str(who): lambda who=who: who for who in contenders}, 3, warmup=1)
    assert found == {str(who): [who] * 3 for who in contenders}


def test_a_phase_below_the_clock_s_resolution_has_no_ratio() -> None:
    profile = made([1.0] * 8, [1.0] * 8)
    still = {**profile.stock.times_ms, "zero_grad": (0.0,) * 8}
    profile = dataclasses.replace(profile, stock=dataclasses.replace(profile.stock, times_ms=still))
    assert math.isnan(profile.ratio("zero_grad").median) and not profile.differs("zero_grad")
    row = next(line for line in str(profile).splitlines() if "zero_grad" in line)
    assert row.split()[-2:] == ["-", "-"]


def test_the_table_fits_80_columns_whatever_the_figures() -> None:
    for factor in (1e-3, 1.0, 54321.0):
        profile = made([0.9 * factor, 1.1 * factor] * 4, [factor] * 8, parameters=6_738_415_616)
        text = str(profile)
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text, "a figure was cut"
        for word in ("ms", "quartiles", "MB", *profile.phases, "stock: torch AdamW, fused", "8 rounds"):
            assert word in text


def test_the_profile_tells_where_it_was_measured() -> None:
    profile = profiled()
    text = " ".join(str(profile).split())
    for told in (f"torch {torch.__version__}", "threads 1", "weights float32", f"plan {PLAN.fingerprint[:12]}"):
        assert told in text
    assert profile.machine["device"] and profile.machine["backend"] in ("cpu", "reference", "triton")


def test_json_holds_every_round_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for profile in (profiled(), made([1.0] * 3, [2.0] * 3)):
        profile.to_json(path)
        assert StepProfile.from_json(path) == profile
        written = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert written["median_low_high"]["step"]["masked_ms"] == list(profile.masked.time("step"))
        assert written["verdict"] == profile.verdict


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "safefreeze.step_profile"}', '{"format": "other"}'])
def test_a_file_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json.*holds no step profile"):
        StepProfile.from_json(path)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "profile.png"
    for profile in (made([90, 91] * 4, [100] * 8), made([1.0], [2.0])):
        profile.plot(path)
        width, height = png_size(path)
        assert width > height > 300
    few = dataclasses.replace(profile.stock, peak_bytes=None)
    dataclasses.replace(profile, stock=few).plot(path)


def test_without_matplotlib_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        made([1.0], [1.0]).plot(tmp_path / "profile.png")


# ------------------------------------------------------------------------------------------------------- bad input


def wrong_loss(what: str) -> Callable[[nn.Module, Any], Any]:
    def loss(model: nn.Module, given: dict[str, Tensor]) -> Any:
        found = own_loss(model, given)
        return {
            "vector": found.repeat(3), "constant": found.detach(), "number": found.item(), "nan": found * math.nan,
            "elsewhere": torch.ones((), requires_grad=True) * 2,
        }[what]  # fmt: skip

    return loss


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "batch, a tensor": ({"batch": torch.ones(2)}, TypeError, "batch is a Tensor, expected a mapping.*loss="),
    "batch on another device": (
        {"batch": {"x": torch.ones(2, device="meta")}}, ValueError, r"batch\['x'\] is on meta, expected cpu"
    ),
    "model without a loss": ({"model": nn.Identity(), "batch": {"input": torch.ones(2)}}, ValueError, "requires_grad"),
    "plan, a mapping": ({"plan": {}}, TypeError, "plan is a dict, expected a FreezePlan"),
    "plan of another model": (
        {"plan": FreezePlan({"other": FreezeMask((2,), rows=[0])})}, ValueError, "profile_step.*'other'"
    ),
    "plan of another shape": (
        {"plan": FreezePlan({"up.bias": FreezeMask((3,), rows=[0])})}, ValueError, "profile_step.*'up.bias' has shape"
    ),
    "plan for what does not train": (
        {"plan": FreezePlan({"fixed.weight": FreezeMask((8, 8), rows=[0])})}, ValueError, "requires_grad=False"
    ),
    "loss, a vector": ({"loss": wrong_loss("vector")}, ValueError, r"loss has shape \(3,\), expected a scalar"),
    "loss without a gradient": ({"loss": wrong_loss("constant")}, ValueError, "loss has no gradient"),
    "loss, a number": ({"loss": wrong_loss("number")}, TypeError, "loss is a float, expected a scalar tensor"),
    "loss, NaN": ({"loss": wrong_loss("nan")}, ValueError, "loss is nan, expected a finite number"),
    "loss of something else": ({"loss": wrong_loss("elsewhere")}, ValueError, "no trainable parameter got a gradient"),
    "loss, not callable": ({"loss": 3}, TypeError, "loss is a int, expected a callable"),
    "steps": ({"steps": 0}, ValueError, "steps is 0, expected a whole number from 1 on"),
    "steps, a fraction": ({"steps": 1.5}, ValueError, "steps is 1.5"),
    "warmup": ({"warmup": -1}, ValueError, "warmup is -1, expected a whole number from 0 on"),
    "accumulation": ({"accumulation": 0}, ValueError, "accumulation is 0"),
    "lr": ({"lr": 0.0}, ValueError, "lr is 0.0, expected a learning rate above 0"),
    "lr, NaN": ({"lr": math.nan}, ValueError, "lr is nan"),
    "max_norm": ({"max_norm": 0.0}, ValueError, "max_norm is 0.0, expected a number above 0, or None"),
    "autocast": ({"autocast": torch.float64}, ValueError, "autocast is torch.float64, expected torch.bfloat16"),
    "optimizer of nothing": ({"optimizer": lambda named: None}, TypeError, "optimizer= returned a NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_told_and_changes_nothing(case: str) -> None:
    changed, kind, message = BAD[case]
    model = used_model()
    arguments: dict[str, Any] = {"model": model, "batch": batch(), "plan": PLAN, "steps": 1, **changed}
    before = remembered(model)
    with pytest.raises(kind, match=message):
        profile_step(**arguments)
    assert_as_before(model, before)


def test_a_model_that_returns_no_loss_is_told_what_to_do() -> None:
    class Silent(Small):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(x, y).loss)

    with pytest.raises(ValueError, match=r"returned a SimpleNamespace without a loss.*labels.*loss="):
        profiled(Silent())


def test_a_model_that_does_not_train_is_refused() -> None:
    parts = Small()
    parts.down.to("meta")
    for model, words in (
        (Small().requires_grad_(False), "no parameter of the model has requires_grad=True"),
        (Small().to("meta"), "the model is on meta, expected cpu or cuda"),
        (parts, "parameters are on cpu, meta, expected one device"),
    ):
        with pytest.raises(ValueError, match=words):
            profiled(model, FreezePlan())


# -------------------------------------------------------------------------------------------------- safefreeze bench


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return save_model(tmp_path_factory.mktemp("model"))


def bench(folder: Path, *arguments: object) -> Any:
    return run("bench", "--model", folder, "--length", 16, "--steps", 2, "--warmup", 0, *arguments)


def test_bench_measures_draws_and_writes(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    numbers, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    result = bench(model_folder, "--json", numbers, "--picture", picture)
    assert result.exit_code == 0, (result.output, result.exception)
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "profiling" in result.stderr and "profiling" not in result.stdout
    text = "".join(result.stdout.split())  # long paths go over two lines
    for told in (
        "7.5% of the rows of each block matrix, drawn at random", "batch 2 x 16", "whole step", str(numbers),
        "torch AdamW, fused",
    ):  # fmt: skip
        assert "".join(told.split()) in text
    profile = StepProfile.from_json(numbers)
    assert profile.rounds == 2
    # of every matrix of 3 layers: q 32, k and v 16, o 32, gate and up 24, down 32 rows
    shapes = ((32, 32), (16, 32), (16, 32), (32, 32), (24, 32), (24, 32), (32, 24))
    rows = [round(0.075 * n) * width for n, width in shapes]
    assert profile.frozen_fraction == pytest.approx(3 * sum(rows) / profile.parameters)
    assert png_size(picture)[0] > 300


def test_bench_takes_a_plan_and_dtypes(model_folder: Path, tmp_path: Path) -> None:
    name, plan_file, numbers = "model.layers.1.mlp.up_proj.weight", tmp_path / "plan.safetensors", tmp_path / "b.json"
    plan = FreezePlan({name: FreezeMask((24, 32), rows=[1, 5])})
    plan.save(plan_file)
    options = ("--dtype", "bfloat16", "--accumulation", 2, "--batch-size", 1)
    result = bench(model_folder, "--plan", plan_file, "--json", numbers, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "frozen: plan.safetensors" in " ".join(result.stdout.split())
    profile = StepProfile.from_json(numbers)
    assert profile.settings["plan"] == plan.fingerprint[:12] and profile.settings["accumulation"] == 2
    assert profile.machine["weights"] == "bfloat16"
    assert profile.frozen_fraction == pytest.approx(64 / profile.parameters)


def test_bench_says_in_a_line_what_is_wrong(model_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "plan.safetensors"
    FreezePlan({"other.weight": FreezeMask((2,), rows=[0])}).save(other)
    for arguments, words in (
        (("--plan", other), ("error: profile_step", "'other.weight'")),
        (("--plan", tmp_path / "none"), ("bench: no file",)),
        (("--plan", model_folder / "model.safetensors"), ("expected plan",)),
        (("--plan", other, "--freeze", 0.1), ("--plan and --freeze",)),
        (("--freeze", 1), ("--freeze is 1, expected a share",)),
        (("--steps", 0), ("steps is 0, expected",)),
        (("--length", 1), ("--length is 1, expected at least 2",)),
        (("--length", 257), ("--length is 257, expected at most 256",)),
        (("--batch-size", 0), ("--batch-size is 0",)),
        (("--dtype", "int8"), ("bench: --dtype is 'int8'", "bfloat16")),
        (("--device", "nowhere"), ("bench: --device is 'nowhere'",)),
        (("--json", tmp_path / "no" / "b.json"), ("no folder",)),
    ):
        fails(bench(model_folder, *arguments), *words)
    fails(run("bench", "--model", tmp_path), "config.json")
