"""Low-precision parameters done right: float32 masters as remainders, and stochastic rounding."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS, assert_same_bits
from torch import Tensor

import safefreeze_kernels as sf

SHAPE = (24, 20)
ROWS, COLS = [0, 3, 4, 23], [1, 19]
PLAN = sf.FreezePlan({"w": sf.FreezeMask(SHAPE, rows=ROWS, cols=COLS), "b": sf.FreezeMask((50,), rows=range(5))})


def start(dtype: torch.dtype) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    shapes = {"w": SHAPE, "b": (50,), "v": (8, 3)}
    values = {name: torch.from_numpy(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    return {name: torch.nn.Parameter(value.bfloat16().to(dtype)) for name, value in values.items()}


def give_gradients(params: dict[str, Tensor], step: int) -> None:
    """Of bfloat16 values, so that any dtype of the parameters has the same."""
    rng = np.random.default_rng(step)
    for p in params.values():
        p.grad = torch.from_numpy(rng.standard_normal(p.shape, np.float32)).bfloat16().to(p.dtype)


def train(params: dict[str, Tensor], opt: Any, first: int, last: int, grad_scale: float | None = None) -> None:
    for step in range(first, last):
        give_gradients(params, step)
        if grad_scale is not None:
            opt.grad_scale = torch.tensor(grad_scale)
        opt.step()


SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-4, "weight_decay": 0.1},
    "amsgrad, maximize": {"lr": 1e-4, "amsgrad": True, "maximize": True},
    "bf16 state": {"lr": 1e-4, "state_dtype": torch.bfloat16},
    "8-bit state": {"lr": 1e-4, "state_dtype": torch.int8},
    "8-bit state, amsgrad": {"lr": 1e-4, "state_dtype": torch.int8, "amsgrad": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masters_train_as_float32_parameters_do(backend: str, setting: str) -> None:
    low, high = start(torch.bfloat16), start(torch.float32)
    options = {"freeze": PLAN, "backend": backend, **SETTINGS[setting]}
    ours = sf.MaskedAdamW(low.items(), master="remainder", **options)
    full = sf.MaskedAdamW(high.items(), **options)
    frozen = {name: p.detach().clone() for name, p in low.items()}
    for params, opt in ((low, ours), (high, full)):
        train(params, opt, 0, 60, grad_scale=3.0)
    masters = ours.master_weights()
    moved = 0
    for name, p in low.items():
        assert_same_bits(masters[name], high[name].detach(), f"master of {name}")
        mask = PLAN[name].dense() if name in PLAN else torch.zeros(p.shape, dtype=torch.bool)
        assert_same_bits(p.detach(), frozen[name], f"frozen part of {name}", where=mask)
        error = (p.detach().float() - masters[name]).abs()
        assert (error <= masters[name].abs() * 2.0**-8).all(), "the parameter is its master, rounded"
        moved += int((masters[name] != p.detach().float()).sum())
        kept = ours.state[p]["master_remainder"]
        assert kept.dtype == torch.int16 and kept.shape == ours.state[p]["exp_avg"].shape
    assert moved > 100, "the masters hold more than the parameters"


def test_without_masters_small_updates_are_lost() -> None:
    """Why masters: at this learning rate nearest rounding undoes every step, decay included."""
    params = {"w": torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))}
    lost, kept = copy.deepcopy(params), copy.deepcopy(params)
    for each, master in ((lost, None), (kept, "remainder")):
        opt = sf.MaskedAdamW(each.items(), lr=1e-4, weight_decay=0.1, master=master)
        for _ in range(100):
            each["w"].grad = torch.ones(64, dtype=torch.bfloat16)
            opt.step()
    assert torch.equal(lost["w"], params["w"])
    assert kept["w"].float().mean().item() == pytest.approx(1 - 100 * 1e-4 * 1.1, abs=2e-3)


def test_float32_parameters_need_no_master() -> None:
    params = start(torch.float32)
    opt = sf.MaskedAdamW(params.items(), master="remainder")
    train(params, opt, 0, 2)
    assert all("master_remainder" not in state for state in opt.state.values())
    assert_same_bits(opt.master_weights()["w"], params["w"].detach(), "w")


@pytest.mark.parametrize(
    "setting",
    [{"master": "remainder"}, {"rounding": "stochastic", "seed": 7}]
    + [{**more, "state_dtype": torch.int8} for more in ({}, {"master": "remainder", "amsgrad": True}, {"seed": 2**40})],
    ids=["master", "sr", "8 bits", "8 bits, master", "8 bits, seed"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(setting: dict[str, Any]) -> None:
    def build(params: dict[str, Tensor]) -> sf.MaskedAdamW:
        return sf.MaskedAdamW(params.items(), lr=1e-3, freeze=PLAN, **setting)

    whole = start(torch.bfloat16)
    train(whole, build(whole), 0, 8)
    part = start(torch.bfloat16)
    opt = build(part)
    train(part, opt, 0, 5)
    file = io.BytesIO()
    torch.save({"model": {n: p.detach() for n, p in part.items()}, "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    rest = {name: torch.nn.Parameter(value) for name, value in saved["model"].items()}
    opt = build(rest)
    opt.load_state_dict(saved["opt"])
    train(rest, opt, 5, 8)
    for name, p in whole.items():
        assert_same_bits(rest[name].detach(), p.detach(), name)


def test_thawed_rows_start_with_the_parameter_as_master_and_frozen_ones_keep_their_bytes() -> None:
    params = start(torch.bfloat16)
    opt = sf.MaskedAdamW(params.items(), lr=1e-3, master="remainder", freeze=PLAN)
    train(params, opt, 0, 5)
    before, masters = params["w"].detach().clone(), opt.master_weights()["w"]
    other = sf.FreezePlan({"w": sf.FreezeMask(SHAPE, rows=[3, 7])})  # 0, 4, 23 and the columns thaw, 7 freezes
    opt.set_freeze(other)
    now = opt.master_weights()["w"]
    live_before = ~PLAN["w"].dense()
    live_now = ~other["w"].dense()
    assert_same_bits(now, masters, "live in both", where=live_before & live_now)
    assert_same_bits(now, before.float(), "thawed", where=~live_before & live_now)
    train(params, opt, 5, 8)
    assert_same_bits(params["w"].detach(), before, "frozen", where=~live_now)


def test_a_state_with_masters_is_not_silently_cut() -> None:
    params = start(torch.bfloat16)
    opt = sf.MaskedAdamW(params.items(), master="remainder")
    train(params, opt, 0, 2)
    plain = sf.MaskedAdamW(start(torch.bfloat16).items())
    with pytest.raises(ValueError, match=r"state of 'w' holds a float32 master .* build it with master='remainder'"):
        plain.load_state_dict(opt.state_dict())
    assert not plain.state
    dense = opt.dense_state_dict()
    assert all("master_remainder" not in state for state in dense["state"].values())
    stock = torch.optim.AdamW(start(torch.bfloat16).values())
    stock.load_state_dict(dense)
    opt.load_state_dict(dense)  # masters start anew from the parameters
    train(params, opt, 2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_follows_float32_on_average(backend: str, dtype: torch.dtype) -> None:
    """A drift of 2e-5 per step, far below half a unit in the last place, arrives: mean over 4,096 elements."""
    p = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
    opt = sf.MaskedAdamW([("p", p)], lr=2e-5, weight_decay=0.0, rounding="stochastic", seed=3, backend=backend)
    for _ in range(40):
        p.grad = torch.ones_like(p)
        opt.step()
    drift = 1 - p.detach().double().mean().item()
    # in float32 40 * 2e-5; a step up or down has a spread of at most one unit, 40 of them add up
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert abs(drift - 8e-4) < 5 * (40 * 8e-4 / 40 * unit / 4096) ** 0.5 + 2.0**-16


def test_noise_does_not_depend_on_the_plan_or_on_threads() -> None:
    results = []
    for plan, threads in ((None, 1), (PLAN, 1), (PLAN, 2)):
        params = start(torch.bfloat16)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        train(params, sf.MaskedAdamW(params.items(), lr=1e-3, rounding="stochastic", freeze=plan), 0, 4)
        torch.set_num_threads(before)
        results.append(params)
    for name in results[0]:
        live = ~PLAN[name].dense() if name in PLAN else torch.ones(results[0][name].shape, dtype=torch.bool)
        for other in results[1:]:
            assert_same_bits(other[name].detach(), results[0][name].detach(), f"live part of {name}", where=live)


def test_seeds_and_tensors_have_their_own_noise() -> None:
    def run(seed: int) -> list[Tensor]:
        params = [torch.nn.Parameter(torch.full((512,), 1.003, dtype=torch.bfloat16)) for _ in range(2)]
        opt = sf.MaskedAdamW(params, lr=1e-3, rounding="stochastic", seed=seed)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        return [p.detach() for p in params]

    one, two = run(0), run(1)
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], two[0])
    assert torch.equal(one[0], run(0)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"master": "float32"}, "master is 'float32', expected None or 'remainder'"),
        ({"rounding": "up"}, "rounding is 'up', expected 'nearest' or 'stochastic'"),
        ({"master": "remainder", "rounding": "stochastic"}, "leave out one of the two"),
        ({"seed": -1}, "seed is -1, expected an integer from 0"),
        ({"seed": True}, "seed is True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.MaskedAdamW(start(torch.bfloat16).items(), **settings)


def test_float16_has_no_masters() -> None:
    with pytest.raises(
        TypeError, match="parameter 'w' is float16, expected bfloat16 or float32 with master='remainder'"
    ):
        sf.MaskedAdamW(start(torch.float16).items(), master="remainder")
