"""Moments in 8 bits: what the codes hold, how far they are off, and what comes of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from backend_cases import CASES, CPU, INT8, Case, check
from conftest import LOCAL, assert_same_bits
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels.kernels.backend import choose_backend
from safefreeze_kernels.kernels.reference import (
    decode_largest,
    decode_moments,
    encode_largest,
    encode_moments,
    moment_noise,
)

ALL = torch.arange(2**16)
FIRST, SECOND = (ALL & 255).to(torch.uint8), (ALL >> 8).to(torch.uint8)
NAN, INF = math.nan, math.inf


def meaning(first: int, second: int) -> tuple[float, float]:
    """m and v, as csrc/arithmetic.h says in words."""
    code, size = second * 2 + first // 128, first % 64
    v = {0: 0.0, 510: INF, 511: NAN}.get(code, (1 + code % 4 / 4) * 2.0 ** (code // 4 - 95))
    unit = 2.0 ** (code // 8 - 47)
    m = {62: INF, 63: NAN}.get(size, unit / 64 * (size if size < 16 else (8 + size % 8) * 2 ** (size // 8 - 1)))
    return -m if first & 64 else m, v


def test_codes_mean_what_they_say() -> None:
    m, v = decode_moments(FIRST, SECOND)
    expected = torch.tensor([meaning(*pair) for pair in zip(FIRST.tolist(), SECOND.tolist(), strict=True)])
    assert_same_bits(m, expected[:, 0], "m", any_nan=True)
    assert_same_bits(v, expected[:, 1], "v", any_nan=True)
    normal = (v > 0) & v.isfinite()
    units = torch.tensor([2.0 ** (code // 8 - 47) for code in (SECOND.long() * 2 + FIRST.long() // 128).tolist()])
    ratio = units[normal] / v[normal].sqrt()
    assert ratio.min() >= 0.5**0.5 and ratio.max() <= 2**0.5, "a unit is about the root of v"


@pytest.mark.parametrize("noise", ["to nearest", "noisy"])
def test_what_codes_hold_is_kept(noise: str) -> None:
    """So that a state dict in float32 loses nothing, and what nothing changes does not wander."""
    drawn = moment_noise(ALL, seed=1, step=2, number=3)
    coded = encode_moments(*decode_moments(FIRST, SECOND), *([drawn] if noise == "noisy" else []))
    sign_of_nan = (FIRST & 63 == 63) & (FIRST & 64 != 0)
    assert torch.equal(coded[0], torch.where(sign_of_nan, FIRST & 191, FIRST)) and torch.equal(coded[1], SECOND)
    largest = torch.arange(256).to(torch.uint8)
    assert torch.equal(encode_largest(decode_largest(largest)), largest)


def drawn_moments(n: int = 20_000) -> tuple[Tensor, Tensor]:
    """Of every order of magnitude that v has, and ratios that Adam makes."""
    rng = np.random.default_rng(0)
    v = 2.0 ** rng.uniform(-94, 32, n)
    m = np.sqrt(v) * rng.choice([-1.0, 1.0], n) * 2.0 ** rng.uniform(-8, math.log2(7.27), n)
    return torch.from_numpy(m.astype(np.float32)), torch.from_numpy(v.astype(np.float32))


def test_the_error_to_nearest_is_bounded() -> None:
    m, v = drawn_moments()
    got_m, got_v = decode_moments(*encode_moments(m, v))
    assert ((got_v - v).abs() <= v / 8).all()
    assert ((got_m - m).abs() <= torch.maximum(m.abs() / 16, v.sqrt() * 2**0.5 / 128 * 1.07)).all()
    x = decode_largest(encode_largest(v))
    assert ((x - v).abs() <= v / 4).all()


def test_stochastic_rounding_is_right_on_average_and_never_makes_zero_of_v() -> None:
    m, v = (each[:8] for each in drawn_moments())
    n = 40_000
    mean = torch.zeros(2, 8, dtype=torch.float64)
    for step in range(5):
        noise = moment_noise(torch.arange(8 * n).view(n, 8), seed=5, step=step, number=0)
        got = torch.stack(decode_moments(*encode_moments(m.expand(n, 8), v.expand(n, 8), noise)))
        mean += got.double().mean(1) / 5
    for got, true, bound in zip(mean, (m, v), (v.sqrt() + m.abs(), v), strict=True):
        assert ((got - true).abs() <= 0.003 * bound).all(), "four standard deviations"
    tiny = torch.tensor([1e-38, 1e-45, 1e-30]).expand(100, 3)
    _, kept = decode_moments(
        *encode_moments(tiny, tiny, moment_noise(ALL[:300].view(100, 3), seed=0, step=1, number=0))
    )
    assert (kept > 0).all()


def test_noise_of_an_element_is_uniform_and_of_seeds_steps_and_tensors_independent() -> None:
    steps = torch.arange(1 << 14)

    def drawn(seed: int = 1, later: int = 0, number: int = 1) -> tuple[Tensor, Tensor]:
        noise = moment_noise(torch.full_like(steps, 5), seed=seed, step=steps + later, number=number)
        return (noise >> 11).double() / 2**21 - 0.5, (noise & 0xFFFFF).double() / 2**20 - 0.5  # v's, m's

    of_v, of_m = drawn()
    for own in (of_v, of_m):
        assert (torch.histc(own, 64, -0.5, 0.5) - 256).abs().max() <= 5 * 16
    others = [*drawn(seed=2), *drawn(seed=1 + 2**32), *drawn(later=1), *drawn(number=2)]
    for one, other in ((of_v, of_m), *((own, other) for own in (of_v, of_m) for other in others)):
        assert (one * other).mean().abs() * 12 <= 5 / 128, "uncorrelated"


def test_noise_of_neighbours_is_spread_evenly() -> None:
    noise = moment_noise(torch.arange(1 << 12), seed=1, step=1, number=1)
    for bits, width in ((noise >> 11, 21), (noise & 0xFFFFF, 20)):
        around = bits.sort().values
        gaps = torch.cat([around.diff(), around[:1] + 2**width - around[-1:]])
        assert gaps.max() <= 2 * 2**width / len(bits), "no gap twice as wide as the others"
    assert (noise != moment_noise(torch.arange(1 << 12) + 2**32, seed=1, step=1, number=1)).all()


def loss_after(state_dtype: torch.dtype, steps: int, gradient: Any, start: Tensor, **options: Any) -> float:
    p = nn.Parameter(start.clone())
    optimizer = sf.MaskedAdamW([("p", p)], weight_decay=0.0, state_dtype=state_dtype, **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = options["lr"] * (1 - step / steps)
        p.grad = gradient(p.detach(), step)
        optimizer.step()
        assert (p.detach() - start).abs().max() <= 1.5 * options["lr"] * 7.3 * (step + 1), "it exploded"
    return float(p.detach().double().square().mean())


def test_a_convex_problem_is_solved_as_well() -> None:
    """A noisy quadratic of known minimum 0, curvatures over 12 binades: within 10% of float32 state's loss."""
    rng = np.random.default_rng(1)
    scale = torch.from_numpy(2.0 ** rng.uniform(-12, 0, 2000)).float()
    noise = torch.from_numpy(rng.standard_normal((300, 2000), np.float32))

    def gradient(p: Tensor, step: int) -> Tensor:
        return scale * (p + 0.3 * noise[step])

    exact, coded = (
        loss_after(dtype, 300, gradient, torch.ones(2000), lr=0.02) for dtype in (torch.float32, torch.int8)
    )
    assert coded <= 1.1 * exact, (coded, exact)


def test_sparse_gradients_with_tiny_second_moments_do_no_harm() -> None:
    """Neighbours 60 binades apart in v, one gradient in twenty not zero: within 15% of float32 state's loss."""
    rng = np.random.default_rng(2)
    scale = torch.from_numpy(2.0 ** rng.uniform(-20, 10, 2000)).float()
    there = torch.from_numpy(rng.random((300, 2000)) < 0.05)

    def gradient(p: Tensor, step: int) -> Tensor:
        return scale * p * there[step]

    exact, coded = (
        loss_after(dtype, 300, gradient, torch.ones(2000), lr=0.02, eps=1e-12) for dtype in (torch.float32, torch.int8)
    )
    assert coded <= 1.15 * exact, (coded, exact)


@pytest.mark.parametrize("backend", LOCAL)
def test_nan_and_inf_stay_visible(backend: str) -> None:
    p = nn.Parameter(torch.ones(40))
    optimizer = sf.MaskedAdamW([("p", p)], state_dtype=torch.int8, backend=backend)
    for bad in (True, False):
        p.grad = torch.ones(40)
        if bad:
            p.grad[3], p.grad[5] = NAN, INF
        optimizer.step()
    entry = optimizer.dense_state_dict()["state"][0]
    assert entry["exp_avg"][3].isnan() and entry["exp_avg_sq"][3].isnan() and p[3].isnan()
    assert entry["exp_avg"][5].isinf() and entry["exp_avg_sq"][5].isinf() and p[5].isnan()
    assert p.isnan().sum() == 2


@pytest.mark.parametrize("case", [case for case in CASES if case.options.get("state") == INT8][::3], ids=str)
def test_the_reference_has_the_bits_of_the_others(case: Case) -> None:
    check(choose_backend("reference", CPU, "test"), CPU, case)


def trained(steps: int = 3, **options: Any) -> tuple[nn.Parameter, Any]:
    p = nn.Parameter(torch.from_numpy(np.random.default_rng(0).standard_normal((12, 10), np.float32)))
    optimizer = sf.MaskedAdamW([("p", p)], **options)
    for step in range(steps):
        p.grad = torch.from_numpy(np.random.default_rng(step + 1).standard_normal((12, 10), np.float32))
        optimizer.step()
    return p, optimizer


ROWS = sf.FreezePlan({"p": sf.FreezeMask((12, 10), rows=[0, 4])})


def test_stock_state_comes_in_to_nearest_and_goes_out_exactly() -> None:
    coded = {"state_dtype": torch.int8, "amsgrad": True}
    p, optimizer = trained(freeze=ROWS, **coded)
    dense = optimizer.dense_state_dict()
    assert {value.dtype for value in dense["state"][0].values()} == {torch.float32}
    stock = torch.optim.AdamW([p], amsgrad=True)
    stock.load_state_dict(copy.deepcopy(dense))
    stock.step()
    again = trained(0, freeze=ROWS, **coded)[1]
    again.load_state_dict(dense)
    for key, value in optimizer.state[p].items():
        (other,) = (entry[key] for entry in again.state.values())
        assert_same_bits(other, value, key)
    wider = trained(0, freeze=ROWS, amsgrad=True)[1]
    wider.load_state_dict(optimizer.state_dict())
    (entry,) = wider.state.values()
    live = ~ROWS["p"].dense()
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert_same_bits(entry[key].view(-1), dense["state"][0][key][live], f"{key} in float32")


@pytest.mark.parametrize("fused", [False, True])
def test_stock_adamw_does_not_take_codes_for_numbers(fused: bool) -> None:
    p, optimizer = trained(state_dtype=torch.int8)
    stock = torch.optim.AdamW([p], fused=fused)
    stock.load_state_dict(optimizer.state_dict())
    before, p.grad = p.detach().clone(), torch.ones_like(p)
    with pytest.raises(KeyError, match="exp_avg"):
        stock.step()
    assert_same_bits(p, before, "p")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda state: state.update(exp_avg_sq_codes=state["exp_avg_sq_codes"].float()),
            "has moments of dtypes .* codes",
        ),
        (lambda state: state.update(exp_avg=state["exp_avg_codes"].float()), "has both 'exp_avg' and 'exp_avg_codes'"),
        (lambda state: state.pop("exp_avg_codes"), "lacks 'exp_avg'"),
    ],
)
def test_codes_beside_float_moments_are_damage(damage: Callable[[dict[str, Any]], object], words: str) -> None:
    _, optimizer = trained(state_dtype=torch.int8)
    given = copy.deepcopy(optimizer.state_dict())
    damage(given["state"][0])
    with pytest.raises(ValueError, match=rf"state\[0\] {words}"):
        optimizer.load_state_dict(given)


def test_a_change_of_plan_moves_bytes_alone() -> None:
    """Of rows, columns and single elements: what stays live keeps its codes, what thaws has none."""
    elements = torch.arange(120).view(12, 10) % 7 == 2
    plans = [sf.FreezePlan({"p": sf.FreezeMask((12, 10), **given)}) for given in (
        {"rows": [0, 4]}, {"rows": [4, 5], "cols": [3]}, {"elements": elements}, {"cols": [2, 3]}, {"rows": [1]},
    )]  # fmt: skip
    p, optimizer = trained(freeze=plans[0], state_dtype=torch.int8)
    for before, after in pairwise(plans):
        codes = {}
        for key in ("exp_avg", "exp_avg_sq"):
            codes[key] = torch.zeros(12, 10, dtype=torch.uint8)
            codes[key][~before["p"].dense()] = optimizer.state[p][key].view(-1)
        optimizer.set_freeze(after)
        for key, was in codes.items():
            assert_same_bits(optimizer.state[p][key].view(-1), was[~after["p"].dense()], key)
