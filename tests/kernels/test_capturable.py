"""Capturable steps: counts, scalars and flags on the device, and the same bits as a step that computes them here."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS, assert_same_bits
from torch import Tensor

import safefreeze_kernels as sf
from safefreeze_kernels.optim import adam
from safefreeze_kernels.optim.launch import counts_on_device

SHAPES = {"w": (12, 10), "b": (10,), "e": (7, 3)}
PLAN = sf.FreezePlan({"w": sf.FreezeMask((12, 10), rows=[0, 5], cols=[9])})


def build(backend: str, capturable: bool, **settings: Any) -> tuple[dict[str, Tensor], sf.MaskedAdamW]:
    rng = np.random.default_rng(0)
    params: dict[str, Tensor] = {
        name: torch.nn.Parameter(torch.from_numpy(rng.standard_normal(shape, np.float32)))
        for name, shape in SHAPES.items()
    }
    groups = [
        {"params": [("w", params["w"])], "weight_decay": 0.1},
        {"params": [("b", params["b"]), ("e", params["e"])], "weight_decay": 0.0, "betas": (0.8, 0.99)},
    ]
    opt = sf.MaskedAdamW(groups, lr=1e-2, freeze=PLAN, backend=backend, capturable=capturable, **settings)
    return params, opt


def give_gradients(params: dict[str, Tensor], step: int, without: tuple[str, ...] = ()) -> None:
    rng = np.random.default_rng(step)
    for name, p in params.items():
        grad = torch.from_numpy(rng.standard_normal(p.shape, np.float32))
        p.grad = None if name in without else grad


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True, "maximize": True}], ids=["adamw", "amsgrad, maximize"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_capturable_steps_equal_ordinary_ones(backend: str, settings: dict[str, Any]) -> None:
    """Schedules, loss scales, skipped steps, missing gradients and a changed plan included."""
    runs = [build(backend, capturable, **settings) for capturable in (False, True)]
    for step in range(12):
        for params, opt in runs:
            give_gradients(params, step, without=("e",) if step in (3, 4) else ())
            opt.grad_scale = torch.tensor([2.0**step]) if step % 2 else None
            opt.found_inf = torch.tensor([float(step in (2, 7))])
            lr = 1e-2 / (step + 1)
            for group in opt.param_groups:
                group["lr"] = torch.tensor(lr, dtype=torch.float64) if group["capturable"] else lr
            if step == 6:
                opt.set_freeze(sf.FreezePlan({"w": sf.FreezeMask((12, 10), rows=[1])}))
            opt.step()
    (ordinary, stock), (captured, opt) = runs
    for name in SHAPES:
        assert_same_bits(captured[name].detach(), ordinary[name].detach(), name)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            ours, theirs = (o.state[p][key] for o, p in ((opt, captured[name]), (stock, ordinary[name])))
            assert_same_bits(ours, theirs, f"{key} of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_found_inf_changes_nothing_and_counts_nothing(backend: str, dtype: torch.dtype) -> None:
    """Kernels read float32; a flag of another dtype, or on another device, is brought to them."""
    params, opt = build(backend, True)
    give_gradients(params, 0)
    opt.step()
    before = copy.deepcopy([dict(opt.state[p]) for p in params.values()]), [p.detach().clone() for p in params.values()]
    for p in params.values():
        assert p.grad is not None
        p.grad.fill_(torch.nan)
    opt.found_inf = torch.tensor(1.0, dtype=dtype)
    opt.step()
    for p, state, value in zip(params.values(), *before, strict=True):
        assert_same_bits(p.detach(), value, "param")
        for key, old in state.items():
            assert_same_bits(opt.state[p][key], old, key)


def test_the_flag_is_kept_by_state_dicts_and_may_change_between_steps() -> None:
    params, opt = build("auto", True)
    other, ordinary = build("auto", False)
    for step in range(4):
        for each, o in ((params, opt), (other, ordinary)):
            give_gradients(each, step)
            o.step()
        if step == 1:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            assert all(group["capturable"] for group in opt.param_groups)
        if step == 2:
            for group in opt.param_groups:
                group["capturable"] = False
    for name in SHAPES:
        assert_same_bits(params[name].detach(), other[name].detach(), name)


def test_who_looks_for_a_found_inf_is_decided_once_for_valid_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    params, opt = build("auto", True)
    give_gradients(params, 0)
    opt.step()
    before = [p.detach().clone() for p in params.values()]
    opt.found_inf = torch.tensor(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(adam, "all_count_on_device", None)  # it goes through all parameters
        opt.step()
    for group in opt.param_groups:
        group["capturable"] = False  # now nobody but the host looks
    opt.step()
    for p, value in zip(params.values(), before, strict=True):
        assert_same_bits(p.detach(), value, "param")


def test_a_scalar_out_of_range_is_refused_and_nothing_counted() -> None:
    params, opt = build("auto", True)
    give_gradients(params, 0)
    opt.param_groups[1]["eps"] = float("nan")
    before = params["w"].detach().clone()
    with pytest.raises(ValueError, match="Invalid epsilon value: nan"):
        opt.step()
    assert_same_bits(params["w"].detach(), before, "w")
    assert all(state["step"].item() == 0 for state in opt.state.values())


@pytest.mark.parametrize(
    ("capturable", "fused", "device", "there"),
    [
        (False, None, "cuda", False), (False, True, "cuda", True), (True, None, "cuda", True),
        (False, True, "cpu", False), (True, None, "cpu", True), (False, True, "meta", False),
    ],
)  # fmt: skip
def test_where_steps_are_counted(capturable: bool, fused: bool | None, device: str, there: bool) -> None:
    """Of a fused optimizer on the GPU, as torch's: with a `GradScaler` nobody waits there."""
    assert counts_on_device({"capturable": capturable, "fused": fused}, torch.device(device)) is there
