"""A step inside `torch.compile`: one operation, no graph break, the same bits."""

from __future__ import annotations

from typing import Any, Final

import pytest
import torch
from conftest import assert_same_bits
from torch import Tensor
from torch._dynamo.utils import counters

import safefreeze_kernels as sf

PLAN: Final = sf.FreezePlan(
    {"0.weight": sf.FreezeMask((8, 4), rows=[1, 2]), "2.weight": sf.FreezeMask((1, 8), cols=[0, 5])}
)


def net(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).to(dtype)


def backward(model: torch.nn.Module, step: int) -> None:
    dtype = next(model.parameters()).dtype
    model(batch(step, dtype)).square().mean().backward()


def train(backend: str | None, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    torch._dynamo.reset()
    model = net(dtype)
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, freeze=PLAN, **options)
    proof = sf.snapshot(model, PLAN)
    backward(model, 0)
    optimizer.step()  # makes the state
    optimizer.zero_grad()
    step = optimizer.step if backend is None else torch.compile(optimizer.step, backend=backend, fullgraph=True)
    for number in range(1, 5):
        optimizer.param_groups[0]["lr"] = 1e-2 / number
        backward(model, number)
        sf.clip_grad_norm_(model, 0.1, PLAN, optimizer=optimizer)
        step()
        optimizer.zero_grad()
    proof.verify(model)
    return model, optimizer


@pytest.mark.parametrize(
    ("backend", "dtype", "options"),
    [
        ("eager", torch.float32, {}),
        ("aot_eager", torch.float32, {"amsgrad": True}),
        ("aot_eager", torch.float32, {"capturable": True}),
        ("aot_eager", torch.bfloat16, {"master": "remainder"}),
        ("inductor", torch.float32, {}),
    ],
)
def test_a_compiled_step_has_the_same_bits(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    expected, reference = train(None, dtype, **options)
    counters.clear()
    found, optimizer = train(backend, dtype, **options)
    assert not counters["graph_break"]
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), name)
    for entry, other in zip(optimizer.state.values(), reference.state.values(), strict=True):
        for key, value in other.items():
            assert_same_bits(entry[key], value, key)


def test_a_new_learning_rate_compiles_nothing_anew() -> None:
    counters.clear()
    train("eager")
    assert counters["stats"]["unique_graphs"] <= 2, "one for the first step's versions, one for good"


def test_the_first_step_runs_uncompiled() -> None:
    """State is made in it, which no graph could hold; then the step is compiled."""
    model, expected = net(), net()
    optimizers = [sf.MaskedAdamW(m.named_parameters(), lr=1e-2, freeze=PLAN) for m in (model, expected)]
    torch._dynamo.reset()
    step = torch.compile(optimizers[0].step, backend="eager")
    for number in range(3):
        backward(model, number)
        backward(expected, number)
        step()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), name)


def test_changing_the_plan_between_compiled_steps() -> None:
    model, expected = net(), net()
    optimizers = [sf.MaskedAdamW(m.named_parameters(), lr=1e-2, freeze=PLAN) for m in (model, expected)]
    torch._dynamo.reset()
    steps = [torch.compile(optimizers[0].step, backend="eager"), optimizers[1].step]
    for number in range(6):
        for net_, step, optimizer in zip((model, expected), steps, optimizers, strict=True):
            backward(net_, number)
            step()
            optimizer.zero_grad()
            if number == 3:
                optimizer.set_freeze(sf.FreezePlan({"0.weight": sf.FreezeMask((8, 4), rows=[2, 7])}))
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), name)


def test_the_operation_keeps_torchs_rules() -> None:
    """Schema (what it says it writes to, it writes to, and nothing else), fake kernel, functionalisation."""
    model = net()
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=1e-2, freeze=PLAN)
    backward(model, 0)
    optimizer.step()
    (plan,) = optimizer._launches.now.plans
    grads = [torch.ones_like(p) for p in plan.owners]
    arguments = ([p.detach() for p in plan.owners], grads, plan.packed_state, [plan.steps], optimizer._handle.number)
    torch.library.opcheck(torch.ops.safefreeze.step_.default, arguments)
    with pytest.raises(RuntimeError, match="compile it anew"):
        torch.ops.safefreeze.step_(*arguments[:4], "none")
