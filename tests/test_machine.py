"""Random training programs: whatever is done in whatever order, frozen bytes stay, and backends agree bit for bit.

A program is any sequence of what a training script may do: accumulate, clip (in both ways), step, skip, change the
plan, save and load, copy, change dtype. It runs on every backend here at once. Frozen gradients hold NaN and worse
throughout.
"""

from __future__ import annotations

import copy
import io
import math
import os
from typing import Any, Final

import numpy as np
import pytest
import torch
from conftest import BACKENDS as CHOSEN
from conftest import LOCAL, assert_same_bits, bits
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import safefreeze_kernels as sf

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS: Final = tuple(dict.fromkeys((*LOCAL, *CHOSEN)))
SHAPES: Final = {"matrix": (7, 9), "wide": (3, 40), "vector": (6,), "cube": (2, 3, 4)}
SEEDS: Final = st.integers(0, 2**16)
RARE: Final = np.array([math.nan, math.inf, -math.inf, -0.0, 1e-41, 6e-8, 65519.0, -3e38], np.float32)
KINDS: Final = (
    (torch.float32, {}), (torch.float32, {"amsgrad": True}), (torch.float32, {"capturable": True}),
    (torch.float32, {"state_dtype": torch.bfloat16}), (torch.float16, {}), (torch.bfloat16, {}),
    (torch.bfloat16, {"master": "remainder"}), (torch.bfloat16, {"rounding": "stochastic"}),
)  # fmt: skip


def values(rng: np.random.Generator, shape: tuple[int, ...], rare: float) -> Tensor:
    drawn = rng.standard_normal(shape).astype(np.float32)
    return torch.from_numpy(np.where(rng.random(shape) < rare, rng.choice(RARE, shape), drawn).astype(np.float32))


class Training(RuleBasedStateMachine):
    """The same program on each backend; `params` and `optimizers` by backend."""

    programs = 0
    steps = 0

    @initialize(kind=st.sampled_from(KINDS), adam=st.booleans(), seed=SEEDS)
    def begin(self, kind: tuple[torch.dtype, dict[str, Any]], adam: bool, seed: int) -> None:
        Training.programs += 1
        self.dtype, self.options = kind
        self.make = sf.MaskedAdam if adam else sf.MaskedAdamW
        self.settings = {"lr": 1e-2, "weight_decay": 0.1, **self.options}
        self.plan = sf.FreezePlan()
        rng = np.random.default_rng(seed)
        start = {name: values(rng, shape, 0.1).to(self.dtype) for name, shape in SHAPES.items()}
        self.params = {b: {name: nn.Parameter(p.clone()) for name, p in start.items()} for b in BACKENDS}
        self.optimizers = {b: self.fresh(b) for b in BACKENDS}
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.remember()

    def fresh(self, backend: str) -> Any:
        return self.make(self.params[backend].items(), freeze=self.plan, backend=backend, **self.settings)

    def frozen(self, name: str) -> Tensor:
        return self.plan[name].dense() if name in self.plan else torch.zeros(SHAPES[name], dtype=torch.bool)

    def remember(self) -> None:
        """What is frozen from now on has these bytes. (A live NaN may be another NaN on another backend.)"""
        self.kept = {b: {name: p.detach().clone() for name, p in params.items()} for b, params in self.params.items()}

    # -- what a training script does ------------------------------------------------------------------------------

    @rule(seed=SEEDS, missing=st.booleans(), rare=st.sampled_from([0.0, 0.0, 0.02]))
    def learn(self, seed: int, missing: bool, rare: float) -> None:
        """Gradients, added to those that are there; anything at all where frozen."""
        rng = np.random.default_rng(seed)
        for name, shape in SHAPES.items():
            grad = values(rng, shape, rare)
            grad[self.frozen(name)] = torch.from_numpy(rng.choice(RARE, shape).astype(np.float32))[self.frozen(name)]
            if missing and rng.random() < 0.3:
                continue
            for b in BACKENDS:
                p, new = self.params[b][name], grad.to(self.dtype)
                p.grad = new.clone() if p.grad is None else p.grad + new

    @precondition(lambda self: any(p.grad is not None for p in self.params[BACKENDS[0]].values()))
    @rule(largest=st.sampled_from([0.05, 1.0, 1e9]), inside=st.booleans())
    def clip(self, largest: float, inside: bool) -> None:
        first, *others = BACKENDS
        params, optimizer = self.params[first], self.optimizers[first]
        live = [p.grad[~self.frozen(n)].double() for n, p in params.items() if p.grad is not None]
        exact = math.sqrt(math.fsum((torch.cat(live) ** 2).tolist())) if live else 0.0
        expected = torch.tensor(exact, dtype=torch.float64).float().item()  # which overflows where the norm does
        norm = sf.clip_grad_norm_(
            params, largest, self.plan, optimizer=optimizer if inside else None, backend=first
        ).item()  # fmt: skip
        if math.isfinite(expected):
            assert norm == pytest.approx(expected, rel=1e-6), "norm of live gradients"
        else:
            assert not math.isfinite(norm)
        for b in others:  # norms of backends agree to rounding alone, so the factor is the first's
            if inside:
                self.optimizers[b].multiply_gradients_(optimizer._pending.factor)
            else:
                for name, p in params.items():
                    self.params[b][name].grad = None if p.grad is None else p.grad.clone()

    @rule(skipped=st.sampled_from([False, False, False, True]), scale=st.sampled_from([None, 8.0]))
    def step(self, skipped: bool, scale: float | None) -> None:
        Training.steps += 1
        for optimizer in self.optimizers.values():
            optimizer.found_inf = torch.tensor(float(skipped))
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
            optimizer.step()
            if skipped:
                for p, old in zip(optimizer.param_groups[0]["params"], before, strict=True):
                    assert_same_bits(p.detach(), old, "a skipped step")

    @rule(seed=SEEDS, count=st.integers(1, 4), skipped=st.sampled_from([False, False, True]))
    def train(self, seed: int, count: int, skipped: bool) -> None:
        for number in range(count):
            self.learn(seed + number, number == 1, 0.0)
            self.step(skipped and number == 2, None)
            self.forget(True)

    @rule(set_to_none=st.booleans())
    def forget(self, set_to_none: bool) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    @rule()
    def zero_frozen(self) -> None:
        for b, params in self.params.items():
            before = {n: p.grad.clone() for n, p in params.items() if p.grad is not None}
            sf.zero_frozen_grads_(params, self.plan, backend=b)
            for name, old in before.items():
                now, still = params[name].grad, self.frozen(name)
                assert_same_bits(now, torch.zeros_like(now), f"frozen gradient of {name}", where=still)
                assert_same_bits(now, old, f"live gradient of {name}", where=~still)

    @rule(seed=SEEDS, way=st.sampled_from(["new", "more", "none"]))
    def freeze(self, seed: int, way: str) -> None:
        rng = np.random.default_rng(seed)
        masks = {}
        for name, shape in SHAPES.items():
            rows, cols = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (shape[0], 0)
            share = rng.choice([0.1, 0.5, 1.0], p=[0.5, 0.4, 0.1])
            masks[name] = sf.FreezeMask(
                shape,
                rows=rng.random(rows) < share if rng.random() < 0.6 else None,
                cols=rng.random(cols) < share if cols and rng.random() < 0.4 else None,
                elements=rng.random(shape) < share if rng.random() < 0.3 else None,
            )
        chosen = {name: mask for name, mask in masks.items() if way != "none" and rng.random() < 0.7}
        self.plan = self.plan | sf.FreezePlan(chosen) if way == "more" else sf.FreezePlan(chosen)
        for optimizer in self.optimizers.values():
            optimizer.set_freeze(self.plan)
        self.remember()

    @rule()
    def save_and_load(self) -> None:
        for b in BACKENDS:
            file = io.BytesIO()
            torch.save((self.optimizers[b].state_dict(), self.params[b]), file)
            file.seek(0)
            state, params = torch.load(file, weights_only=True)
            grads = {name: p.grad for name, p in self.params[b].items()}
            self.params[b] = params
            for name, p in params.items():
                p.grad = grads[name]
            self.optimizers[b] = self.fresh(b)
            self.optimizers[b].load_state_dict(state)

    @rule()
    def duplicate(self) -> None:
        for b in BACKENDS:
            grads = {name: p.grad for name, p in self.params[b].items()}
            self.params[b], self.optimizers[b] = copy.deepcopy((self.params[b], self.optimizers[b]))
            for name, p in self.params[b].items():
                p.grad = grads[name]

    @precondition(lambda self: "master" not in self.options)
    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def change_dtype(self, dtype: torch.dtype) -> None:
        """As ``model.to(dtype)``: the same parameter objects, other data. Frozen values are then the converted ones."""
        self.dtype = dtype
        for params in self.params.values():
            for p in params.values():
                p.grad = None
                p.data = p.data.to(dtype)
        self.remember()

    @rule(lr=st.sampled_from([0.0, 1e-3, 0.1]), decay=st.sampled_from([0.0, 0.1, 1.0]))
    def change_hyper_parameters(self, lr: float, decay: float) -> None:
        self.settings |= {"lr": lr, "weight_decay": decay}
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0].update(lr=lr, weight_decay=decay)

    # -- what holds after each of them ------------------------------------------------------------------------------

    @invariant()
    def frozen_bytes_are_as_they_were(self) -> None:
        for b, params in self.params.items():
            for name, p in params.items():
                assert_same_bits(p.detach(), self.kept[b][name], f"{b}: frozen part of {name}", where=self.frozen(name))

    @invariant()
    def backends_agree(self) -> None:
        first, *others = BACKENDS
        for b in others:
            for name, p in self.params[first].items():
                assert_same_bits(self.params[b][name].detach(), p.detach(), f"{b}: {name}", any_nan=True)

    @invariant()
    def frozen_rows_and_columns_have_no_state(self) -> None:
        for b, optimizer in self.optimizers.items():
            for name, p in self.params[b].items():
                shape = self.plan[name].packed_shape if name in self.plan else tuple(p.shape)
                for key, value in optimizer.state.get(p, {}).items():
                    if key != "step":
                        assert tuple(value.shape) == shape, f"{b}: {key} of {name}"


def run(programs: int, operations: int) -> tuple[int, int]:
    before = Training.programs, Training.steps
    run_state_machine_as_test(
        Training,
        settings=settings(
            max_examples=programs, stateful_step_count=operations, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
        ),
    )  # fmt: skip
    return Training.programs - before[0], Training.steps - before[1]


def test_frozen_bytes_outlive_any_program() -> None:
    programs, steps = run(250, 25)
    assert programs >= 250 and steps > 1000


@pytest.mark.slow
def test_frozen_bytes_outlive_ten_thousand_programs() -> None:
    programs, steps = run(int(os.environ.get("SAFEFREEZE_PROGRAMS", "10000")), 40)
    print(f"{programs:,} programs, {steps:,} steps on {', '.join(BACKENDS)}")
    assert programs >= int(os.environ.get("SAFEFREEZE_PROGRAMS", "10000"))


def test_the_machine_sees_a_byte_that_moves() -> None:
    """The test above is worth what its invariants notice."""
    machine = Training()
    machine.begin(KINDS[0], False, 0)
    machine.freeze(3, "new")
    name = next(name for name, mask in machine.plan.items() if mask.frozen_count)
    machine.frozen_bytes_are_as_they_were()
    place = tuple(machine.frozen(name).nonzero()[0].tolist())
    with torch.no_grad():
        bits(machine.params[BACKENDS[-1]][name])  # a copy for odd layouts, else a view
        machine.params[BACKENDS[-1]][name].view(torch.int32)[place] ^= 1
    with pytest.raises(pytest.fail.Exception, match="frozen part of"):
        machine.frozen_bytes_are_as_they_were()
