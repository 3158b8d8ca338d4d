"""Looking at many tensors at once: the compiled lookers and their Python twins see the same."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from safefreeze_kernels.grads import reader as tensors
from safefreeze_kernels.grads.reader import GradientReader, Whereabouts, whereabouts

State = dict[Tensor, dict[str, Any]]


@pytest.fixture(params=["compiled", "python"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "python":
        monkeypatch.setattr(tensors, "_C", None)
    elif tensors._C is None:
        pytest.skip("the extension is not built")
    return bool(request.param == "compiled")


def a_state(n: int = 20) -> State:
    params = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(n)]
    return {p: {"step": torch.zeros(()), "exp_avg": torch.zeros(3, 4), "note": "not a tensor"} for p in params}


def first(state: State) -> Tensor:
    return next(iter(state))


def rename_entry(state: State) -> None:
    entries = state[list(state)[-1]]
    entries["comment"] = entries.pop("note")


CHANGES: dict[str, Callable[[State], Any]] = {
    "replace_moment": lambda state: state[first(state)].update(exp_avg=torch.zeros(3, 4)),
    "move_moment": lambda state: setattr(state[first(state)]["exp_avg"], "data", torch.zeros(3, 4)),
    "move_param": lambda state: setattr(list(state)[-1], "data", torch.zeros(3, 4)),
    "transpose_param": lambda state: setattr(first(state), "data", first(state).data.view(4, 3).t()),
    "move_step": lambda state: setattr(state[list(state)[7]]["step"], "data", torch.ones(())),
    "drop_param": lambda state: state.pop(list(state)[-1]),
    "add_param": lambda state: state.update({torch.nn.Parameter(torch.zeros(2)): {}}),
    "replace_dict": lambda state: state.update({first(state): dict(state[first(state)])}),
    "drop_entry": lambda state: state[list(state)[-1]].pop("note"),
    "rename_entry": rename_entry,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_moved_is_seen(compiled: bool, change: str) -> None:
    state = a_state()
    found = whereabouts(state)
    assert isinstance(found, Whereabouts) != compiled
    assert found.hold(state) and found.hold(state)
    CHANGES[change](state)
    assert not found.hold(state)
    assert whereabouts(state).hold(state)


def test_values_and_gradients_may_change(compiled: bool) -> None:
    state = a_state()
    found = whereabouts(state)
    for p, entries in state.items():
        entries["step"] += 1
        entries["exp_avg"].mul_(2)
        p.grad = torch.ones(3, 4)
        p.data.add_(1)
    assert found.hold(state)


def test_an_entry_that_is_no_dict_is_a_change(compiled: bool) -> None:
    state = a_state()
    found = whereabouts(state)
    state[first(state)] = None  # type: ignore[assignment]
    assert not found.hold(state)


def a_reader(params: list[Tensor]) -> GradientReader:
    return GradientReader(params, [f"p{i}" for i in range(len(params))])


def test_nothing_leaks() -> None:
    state = a_state(2)
    p = first(state)
    p.grad = torch.ones(3, 4)
    watched = [p, state[p], state[p]["exp_avg"], p.grad]
    before = [sys.getrefcount(item) for item in watched]
    for _ in range(5):
        found, reader = whereabouts(state), a_reader(list(state))
        found.hold(state)
        reader.read(list(state), "test")
        del found, reader
    gc.collect()
    assert [sys.getrefcount(item) for item in watched] == before


def params_with_gradients(*shapes: tuple[int, ...]) -> list[Tensor]:
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


SHAPES = ((3, 4), (), (5,), (2, 3, 4), (0, 3), (1, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_gradients_are_read(compiled: bool, dtype: torch.dtype) -> None:
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in params_with_gradients(*SHAPES)]
    reader = a_reader(params)
    for _ in range(2):  # new gradients each time, as after zero_grad
        for p in params:
            p.grad = torch.randn_like(p)
        grads = reader.read(params, "test")
        assert grads.plain and all(grad is p.grad for grad, p in zip(grads, params, strict=True))
        assert (grads.tables is not None) == compiled
    if grads.tables is not None:
        import ctypes

        addresses = (ctypes.c_int64 * len(params)).from_address(grads.tables[0])
        codes = (ctypes.c_int32 * len(params)).from_address(grads.tables[1])
        assert list(addresses) == [p.grad.data_ptr() for p in params if p.grad is not None]
        assert set(codes) == {{torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype]}


def replaced(p: Tensor, data: Tensor | None, grad: Tensor | None) -> None:
    p.grad = None
    p.data = p.data if data is None else data
    p.grad = grad


ODD: dict[str, tuple[Callable[[Tensor], None], str]] = {  # and what the refusal says, if it is one
    "no_gradient": (lambda p: replaced(p, None, None), ""),
    "other_dtype": (lambda p: replaced(p, p.data.bfloat16(), torch.ones(3, 4, dtype=torch.bfloat16)), ""),
    "strided": (lambda p: replaced(p, None, torch.ones(4, 3).t()), ""),
    "sparse": (lambda p: replaced(p, None, torch.ones(3, 4).to_sparse()), "'p1' has layout"),
    "other_shape": (lambda p: replaced(p, torch.zeros(4, 3), torch.zeros(4, 3)), "'p1' has shape"),
}


@pytest.mark.parametrize("what", ODD)
def test_other_gradients_are_not_plain(compiled: bool, what: str) -> None:
    params = params_with_gradients((2, 2), (3, 4), (5,))
    reader = a_reader(params)
    assert reader.read(params, "test").plain
    change, refusal = ODD[what]
    change(params[1])
    with pytest.raises((RuntimeError, ValueError), match=f"test: .*{refusal}") if refusal else nullcontext():
        grads = reader.read(params, "test")
        assert not grads.plain and grads.tables is None
        assert all(grad is p.grad for grad, p in zip(grads, params, strict=True))


def test_float64_is_never_plain(compiled: bool) -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    assert not a_reader([p]).read([p], "test").plain
