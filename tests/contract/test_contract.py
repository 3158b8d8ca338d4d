"""The freeze contract, item by item; a test's number is the item it holds.

For every frozen element, whatever the backend, the dtype, the options and the history:

1. after any number of steps its bytes are those it had when it was frozen;
2. its gradient is never read: NaN or inf there changes nothing anywhere, the clip norm included;
3. no optimizer state exists for it (element masks excepted), and it takes no share of the global norm;
4. a live element gets the update stock Adam(W) would give it, and the backends agree bit for bit;
5. changing the plan mid-run: a newly frozen row stops at once, a thawed row starts as a fresh one;
6. nothing fails silently: a plan that does not fit is an error that names the parameter.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    BACKENDS,
    DTYPES,
    WIDE,
    assert_same_bits,
    assert_same_state,
    assert_within,
    bits,
    pairs,
    real,
    replay,
    short,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import U_DOUBLE, Oracle, U, Weight
from torch import Tensor, nn
from zoo import (
    DOUBLE,
    DTYPE_PAIRS,
    MASKS,
    PLAN,
    WIDE_PAIRS,
    Zoo,
    dense_state,
    frozen_flags,
    handling,
    kept_in,
    named_pairs,
    poisoned,
    scattered,
    stepping,
)  # fmt: skip

import safefreeze_kernels as sf

pytestmark = pytest.mark.usefixtures("one_thread")

# ---------------------------------------------------------------------------------------- 1 and 4: bytes and values


@dataclass(frozen=True)
class Case:
    """Options of a run: a row of the table."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    adam: bool = False  # the L2 form
    scale: float | None = None  # loss scale handed to the step
    max_norm: float | None = None
    skipped: tuple[int, ...] = ()  # steps with found_inf set

    def optimizer(self, masked: bool) -> Any:
        if masked:
            return sf.MaskedAdam if self.adam else sf.MaskedAdamW
        return torch.optim.Adam if self.adam else torch.optim.AdamW


CASES = [
    Case("plain", {"weight_decay": 0.0}),
    Case("decay", {"weight_decay": 0.1}),
    Case("large_lr", {"lr": 0.3, "weight_decay": 1.0, "betas": (0.5, 0.9), "eps": 1e-3}),
    Case("amsgrad", {"weight_decay": 0.1, "amsgrad": True}),
    Case("maximize", {"weight_decay": 0.1, "maximize": True}),
    Case("no_momentum", {"betas": (0.0, 0.0)}),
    Case("loss_scale", {"weight_decay": 0.1}, scale=1024.0),
    Case("found_inf", {"weight_decay": 0.1}, scale=1024.0, skipped=(0, 2)),
    Case("clipping", {"weight_decay": 0.1}, max_norm=1.0),
    Case("adam", adam=True),
    Case("adam_l2", {"weight_decay": 0.1}, adam=True),
    Case("adam_l2_amsgrad_maximize", {"weight_decay": 0.1, "amsgrad": True, "maximize": True}, adam=True),
]


def make_optimizer(case: Case, named: Any, **more: Any) -> Any:
    return case.optimizer(masked=True)(named, **{"lr": 1e-2, **case.arguments}, **more)


def run_case(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    *,
    steps: int,
    names: Iterable[str] | None = None,
) -> None:
    """The table's runner: frozen bytes after every step, live elements against the oracle."""
    zoo = Zoo(dtype)
    params = {name: p for name, p in zoo.named_parameters() if names is None or name in names}
    plan = sf.FreezePlan({name: mask for name, mask in MASKS.items() if name in params})
    frozen = {name: frozen_flags(name, tuple(p.shape)) for name, p in params.items()}
    at_start = {name: p.detach().clone() for name, p in params.items()}
    stepped_by, kept = stepping(backend, dtype), kept_in(state_dtype)
    optimizer = make_optimizer(case, params.items(), freeze=plan, backend=stepped_by, **kept)
    clean = {name: torch.where(frozen[name], torch.zeros_like(p), p.detach()) for name, p in params.items()}
    arguments = {"lr": 1e-2, **case.arguments}
    oracle = Oracle(case.optimizer(masked=False), {name: real(p) for name, p in clean.items()}, **arguments)
    stock = None
    if dtype == state_dtype == torch.float32:
        stock_params = {name: nn.Parameter(p.clone()) for name, p in clean.items()}
        stock = case.optimizer(masked=False)(list(stock_params.values()), foreach=False, fused=False, **arguments)
    draw = replay(11)
    for step in range(steps):
        grads = {name: draw(tuple(p.shape), dtype) * (case.scale or 1.0) for name, p in params.items()}
        for name, p in params.items():
            p.grad = poisoned(grads[name], frozen[name])
        if case.max_norm is not None:
            sf.clip_grad_norm_(params, case.max_norm, plan, backend=handling(backend, dtype))
            grads = {name: p.grad.clone() for name, p in params.items()}
        if case.scale is not None:
            optimizer.grad_scale = torch.tensor(case.scale)
            optimizer.found_inf = torch.tensor(float(step in case.skipped))
        optimizer.step()
        if step not in case.skipped:
            live_grads = {
                name: torch.where(frozen[name], torch.zeros_like(g), g) / (case.scale or 1.0)
                for name, g in grads.items()
            }
            oracle.step({name: real(grad) for name, grad in live_grads.items()})
            if stock is not None:
                for name, p in stock_params.items():
                    p.grad = live_grads[name]
                stock.step()
        state = dense_state(optimizer, params)
        for name, p in params.items():
            what = f"{case.name}, step {step}"
            live = pairs(~frozen[name], p)
            assert_same_bits(p.detach(), at_start[name], f"{what}: frozen {name!r}", where=frozen[name])
            got = {key: real(value) for key, value in {"p": p.detach(), **state.get(name, {})}.items()}
            assert len(got) == (1 if step in case.skipped and not state else 4 if case.arguments.get("amsgrad") else 3)
            oracle.check(name, live, got, what)
            if stock is not None:
                exact, bound = oracle.values(name)["p"], oracle.bounds[name].p
                theirs = stock_params[name].detach()
                assert_within(theirs, (exact - bound).float(), (exact + bound).float(), f"{what}: stock {name!r}")
                # so ours and theirs are at most two bounds apart; and the bound says something, ill-conditioned
                # elements (a gradient near zero) aside
                tight = bound <= 1e-4 * (exact.abs() + arguments["lr"] * (step + 1))
                assert tight.double().mean() > 0.8 or not tight.numel(), f"{what}: a bound that says nothing, {name!r}"
            if step not in case.skipped:
                stored = {key: value for key, value in got.items() if value.dtype != torch.float32}
                oracle.follow(name, live, stored)


@pytest.mark.parametrize(("dtype", "state_dtype"), named_pairs(DTYPE_PAIRS + WIDE_PAIRS))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_1_and_4_frozen_bytes_hold_and_live_elements_follow_torch(
    case: Case, backend: str, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    run_case(case, backend, dtype, state_dtype, steps=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_1_and_4_hold_for_a_thousand_steps_with_decay(backend: str) -> None:
    names = ("rows_and_columns", "rows_columns_elements") if backend != "reference" else ("rows_columns_elements",)
    run_case(Case("decay", {"weight_decay": 0.1}), backend, torch.float32, torch.float32, steps=1000, names=names)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="of the cpu backend, which is not tested here")
@pytest.mark.parametrize(("dtype", "state_dtype"), named_pairs(DTYPE_PAIRS + WIDE_PAIRS[1:2]))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_4_backends_agree_bit_for_bit(case: Case, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    final: dict[str, tuple[Zoo, Any]] = {}
    for backend in BACKENDS:
        zoo, draw, kept = Zoo(dtype), replay(13), kept_in(state_dtype)
        optimizer = make_optimizer(case, zoo.named_parameters(), freeze=PLAN, backend=backend, **kept)
        for _ in range(3):
            for name, p in zoo.named_parameters():
                p.grad = poisoned(draw(tuple(p.shape), dtype) * (case.scale or 1.0), frozen_flags(name, tuple(p.shape)))
            if case.scale is not None:
                optimizer.grad_scale = torch.tensor(case.scale)
            if case.max_norm is not None:  # by one backend: norms agree to rounding only
                sf.clip_grad_norm_(zoo, case.max_norm, PLAN, backend="reference")
            optimizer.step()
        final[backend] = zoo, optimizer
    (zoo, optimizer), (other_zoo, other) = final["reference"], final["cpu"]
    for (name, p), q in zip(zoo.named_parameters(), other_zoo.parameters(), strict=True):
        assert_same_bits(q.detach(), p.detach(), f"{name!r}, cpu against reference")
    assert_same_state(other.state_dict()["state"], optimizer.state_dict()["state"], "state, cpu against reference")


# ----------------------------------------------------------------------------------------- 1: under other optimizers

OTHERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd_momentum_decay": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd_nesterov": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.5),
    "adam_amsgrad": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.5),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "masked_adamw_itself": lambda params: sf.MaskedAdamW(params, lr=0.1),
}


@pytest.mark.parametrize("dtype", DTYPES + WIDE, ids=short)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("other", OTHERS)
def test_1_guard_freezes_under_any_optimizer(other: str, backend: str, dtype: torch.dtype) -> None:
    zoo = Zoo(dtype)
    at_start = copy.deepcopy(zoo)
    params = [p for p in zoo.parameters() if p.numel()]
    optimizer = OTHERS[other](zoo.parameters())
    guard = sf.guard(optimizer, PLAN, zoo, backend=handling(backend, dtype))
    draw = replay(17)
    for step in range(3):
        for name, p in zoo.named_parameters():
            p.grad = poisoned(draw(tuple(p.shape), dtype), frozen_flags(name, tuple(p.shape)))
        optimizer.step()
        for (name, p), old in zip(zoo.named_parameters(), at_start.parameters(), strict=True):
            frozen = frozen_flags(name, tuple(p.shape))
            assert_same_bits(p.detach(), old.detach(), f"{other}, step {step}: frozen {name!r}", where=frozen)
            assert bool((p == old).logical_and(~frozen).logical_not().any()) or frozen.all(), f"{name!r} did not train"
    guard.remove()
    # the test can fail: without the guard the same optimizer moves frozen weights
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    rows = zoo.get_parameter("rows")
    moved = bits(rows) != bits(at_start.get_parameter("rows"))
    assert bool(moved[pairs(MASKS["rows"].dense(), rows)].any())


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_2_guard_hides_frozen_gradients_that_a_closure_makes(how: str) -> None:
    """LBFGS multiplies whole gradients: what it sees in a frozen row would turn every live one."""
    plan = sf.FreezePlan({"weight": sf.FreezeMask((4, 3), rows=[1, 2])})
    layer = nn.Linear(3, 4, bias=False)
    seen: list[Tensor] = []

    class Watching(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            closure()
            seen.append(layer.weight.grad.clone())

    optimizer = Watching(layer.parameters())
    guard = sf.guard(optimizer, plan, layer)

    def closure() -> None:
        layer.weight.grad = torch.ones(4, 3)

    optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
    guard.remove()
    expected = torch.tensor([1.0, 0.0, 0.0, 1.0])[:, None].expand(4, 3)
    assert_same_bits(seen[0], expected, f"gradient after a {how} closure")


# --------------------------------------------------------------------------------------------- 2: gradients not read


@pytest.mark.parametrize(("dtype", "state_dtype"), named_pairs([DTYPE_PAIRS[0], DTYPE_PAIRS[3], *WIDE_PAIRS]))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name in ("decay", "amsgrad", "loss_scale", "clipping", "adam_l2")],
    ids=lambda case: case.name,
)
def test_2_frozen_gradients_change_nothing_anywhere(
    case: Case, backend: str, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    final = []
    for poison in (True, False):
        zoo, draw, norms = Zoo(dtype), replay(19), []
        by, kept = stepping(backend, dtype), kept_in(state_dtype)
        optimizer = make_optimizer(case, zoo.named_parameters(), freeze=PLAN, backend=by, **kept)
        for _ in range(3):
            for name, p in zoo.named_parameters():
                frozen = frozen_flags(name, tuple(p.shape))
                grad = draw(tuple(p.shape), dtype)
                p.grad = poisoned(grad, frozen) if poison else torch.where(frozen, torch.zeros_like(grad), grad)
            before = {name: p.grad.clone() for name, p in zoo.named_parameters()}
            norms.append(sf.clip_grad_norm_(zoo, case.max_norm or 1e9, PLAN, backend=handling(backend, dtype)))
            for name, p in zoo.named_parameters():
                frozen = frozen_flags(name, tuple(p.shape))
                assert_same_bits(p.grad, before[name], f"frozen gradient of {name!r} after clipping", where=frozen)
            if case.scale is not None:
                optimizer.grad_scale = torch.tensor(case.scale)
            optimizer.step()
        final.append((zoo, optimizer, norms))
    (zoo, optimizer, norms), (clean_zoo, clean, clean_norms) = final
    for (name, p), q in zip(zoo.named_parameters(), clean_zoo.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), f"{name!r}, NaN against 0 in frozen gradients")
    assert_same_state(optimizer.state_dict(), clean.state_dict(), "state, NaN against 0 in frozen gradients")
    assert [norm.item() for norm in norms] == [norm.item() for norm in clean_norms]
    assert all(math.isfinite(norm) for norm in norms)


@pytest.mark.parametrize("kind", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES + WIDE, ids=short)
@pytest.mark.parametrize("backend", BACKENDS)
def test_3_the_norm_counts_live_elements_only(backend: str, dtype: torch.dtype, kind: float) -> None:
    zoo, draw = Zoo(dtype), replay(23)
    live, everything = [], []
    for name, p in zoo.named_parameters():
        p.grad = draw(tuple(p.shape), dtype)
        exact = p.grad.to(torch.complex128 if dtype.is_complex else torch.float64)
        live.append(exact[~frozen_flags(name, tuple(p.shape))])
        everything.append(exact.reshape(-1))
    expected = torch.linalg.vector_norm(torch.cat(live), kind).item()
    raw = torch.linalg.vector_norm(torch.cat(everything), kind).item()
    assert expected < raw or kind == math.inf
    before = {name: p.grad.clone() for name, p in zoo.named_parameters()}
    limit = expected / 3
    by, u = handling(backend, dtype), 64 * U_DOUBLE if dtype in DOUBLE else U
    norms = sf.clip_grad_norm_(zoo, limit, PLAN, norm_type=kind, return_raw=True, backend=by)
    # accumulated in double, so only the rounding of the result to float32 is left
    assert norms.live.item() == pytest.approx(expected, rel=u)
    assert norms.raw.item() == pytest.approx(raw, rel=u)
    assert norms.live.dtype == (torch.float64 if dtype in DOUBLE else torch.float32)
    assert norms.live.dim() == 0
    factor = limit / (expected + 1e-6)
    for name, p in zoo.named_parameters():
        frozen = frozen_flags(name, tuple(p.shape))
        assert_same_bits(p.grad, before[name], f"frozen gradient of {name!r}", where=frozen)
        got, exact, live_places = real(p.grad), real(before[name]).double() * factor, pairs(~frozen, p)
        bound = 3 * u * exact.abs()  # the norm, the factor and the product, each rounded once
        low, high = (exact - bound).to(got.dtype), (exact + bound).to(got.dtype)
        assert_within(got, low, high, f"gradient of {name!r}", where=live_places)


@pytest.mark.parametrize("backend", BACKENDS)
def test_3_a_small_norm_is_clipped_as_torch_clips_it(backend: str) -> None:
    """torch divides by the norm plus 1e-6, which shows once the norm is as small as that."""
    masked, stock = (nn.Parameter(torch.zeros(4, 3)) for _ in range(2))
    masked.grad = torch.full((4, 3), 1e-6)
    stock.grad = masked.grad.clone().index_fill(0, torch.tensor([1]), 0.0)
    torch.nn.utils.clip_grad_norm_([stock], 1e-6)
    sf.clip_grad_norm_({"w": masked}, 1e-6, sf.FreezePlan({"w": sf.FreezeMask((4, 3), rows=[1])}), backend=backend)
    torch.testing.assert_close(masked.grad[[0, 2, 3]], stock.grad[[0, 2, 3]], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_2_a_live_nan_does_reach_the_norm_and_error_if_nonfinite_changes_nothing(backend: str) -> None:
    zoo = Zoo(torch.float32)
    for p in zoo.parameters():
        p.grad = torch.ones_like(p)
    zoo.get_parameter("rows").grad[1, 0] = math.nan
    before = {name: p.grad.clone() for name, p in zoo.named_parameters()}
    with pytest.raises(RuntimeError, match="nan"):
        sf.clip_grad_norm_(zoo, 1.0, PLAN, error_if_nonfinite=True, backend=backend)
    for name, p in zoo.named_parameters():
        assert_same_bits(p.grad, before[name], f"gradient of {name!r}")
    assert math.isnan(sf.clip_grad_norm_(zoo, 1.0, PLAN, backend=backend))


@pytest.mark.parametrize("change", ["parameter_added", "tie_undone"])
def test_3_clipping_sees_parameters_that_came_after_its_first_call(change: str) -> None:
    """What an adapter added, or a weight untied, after the first step trains must be clipped as well."""
    model = nn.Module()
    model.register_parameter("first", nn.Parameter(torch.zeros(3, 2)))
    model.head = nn.Module()
    model.head.register_parameter("weight", model.first if change == "tie_undone" else nn.Parameter(torch.zeros(2)))
    plan = sf.FreezePlan({"head.weight": sf.FreezeMask(tuple(model.head.weight.shape), rows=[0])})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    sf.clip_grad_norm_(model, 1e9, plan)
    if change == "parameter_added":
        model.register_parameter("adapter", nn.Parameter(torch.zeros(4, 4)))
    else:
        model.first = nn.Parameter(torch.zeros(3, 2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    total = sum(p.numel() for p in model.parameters()) - plan["head.weight"].frozen_count
    assert sf.clip_grad_norm_(model, 1e9, plan).item() == pytest.approx(math.sqrt(total), rel=U)


@pytest.mark.parametrize("dtype", DTYPES + WIDE, ids=short)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_frozen_grads_zeroes_exactly_the_frozen_part(backend: str, dtype: torch.dtype) -> None:
    zoo, draw = Zoo(dtype), replay(29)
    expected = {}
    for name, p in zoo.named_parameters():
        frozen = frozen_flags(name, tuple(p.shape))
        grad = draw(tuple(p.shape), dtype)
        p.grad = poisoned(grad, frozen)
        expected[name] = torch.where(frozen, torch.zeros_like(grad), grad)
    sf.zero_frozen_grads_(zoo, PLAN, backend=handling(backend, dtype))
    for name, p in zoo.named_parameters():
        assert_same_bits(p.grad, expected[name], f"gradient of {name!r}")


# ------------------------------------------------------------------------------------------------------- 3: the state


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=short)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("name", MASKS)
def test_3_state_exists_for_what_is_live_only(name: str, amsgrad: bool, state_dtype: torch.dtype) -> None:
    mask = MASKS[name]
    param = nn.Parameter(torch.zeros(mask.shape))
    param.grad = torch.ones_like(param)
    optimizer = sf.MaskedAdamW(
        [(name, param)], freeze=sf.FreezePlan({name: mask}), amsgrad=amsgrad, state_dtype=state_dtype
    )
    optimizer.step()
    live = int((~mask.dense()).sum())
    moments = {key: value for key, value in optimizer.state[param].items() if key != "step"}
    assert len(moments) == (3 if amsgrad else 2)
    for key, value in moments.items():
        assert value.dtype == (torch.uint8 if state_dtype == torch.int8 else state_dtype)
        assert value.untyped_storage().nbytes() == live * state_dtype.itemsize, key
        assert value.all(), f"{key}: a place that is no live element's"


def test_3_state_shrinks_when_more_is_frozen_and_grows_when_less_is() -> None:
    param = nn.Parameter(torch.zeros(10, 8))
    optimizer = sf.MaskedAdamW([("w", param)])
    for mask, rows in ((None, 10), (sf.FreezeMask((10, 8), rows=range(7)), 3), (None, 10)):
        optimizer.set_freeze(sf.FreezePlan({"w": mask}) if mask is not None else None)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.state[param]["exp_avg"].untyped_storage().nbytes() == rows * 8 * 4


# ------------------------------------------------------------------------------ what people do today does not freeze


@dataclass(frozen=True)
class Habit:
    """A usual way to 'freeze' rows under stock AdamW: what it does to gradients before each step."""

    name: str
    weight_decay: float
    mask_gradients: Callable[[Tensor, Tensor], Tensor]
    momentum_first: bool = False  # train everything once, then begin to freeze
    poison: bool = False


HABITS = [
    Habit("zeroed_gradients_drift_with_decay", 0.1, lambda g, frozen: g.masked_fill(frozen[:, None], 0.0)),
    Habit("old_momentum_moves_on", 0.0, lambda g, frozen: g.masked_fill(frozen[:, None], 0.0), momentum_first=True),
    Habit("nan_times_zero_is_nan", 0.0, lambda g, frozen: g * (~frozen)[:, None], poison=True),
]


@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.name)
def test_1_holds_where_masking_gradients_does_not(habit: Habit) -> None:
    start, draw = replay(31)((6, 5)), replay(37)
    frozen = torch.tensor([True, False, True, False, False, True])
    plan = sf.FreezePlan({"w": sf.FreezeMask((6, 5), rows=frozen)})
    stock_w, masked_w = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    stock = torch.optim.AdamW([stock_w], lr=1e-2, weight_decay=habit.weight_decay, foreach=False)
    masked = sf.MaskedAdamW(
        [("w", masked_w)], lr=1e-2, weight_decay=habit.weight_decay, freeze=None if habit.momentum_first else plan
    )
    if habit.momentum_first:
        stock_w.grad = draw((6, 5))
        masked_w.grad = stock_w.grad.clone()
        stock.step()
        masked.step()
        masked.set_freeze(plan)
    stock_then, masked_then = stock_w.detach().clone(), masked_w.detach().clone()
    for _ in range(10):
        grad = draw((6, 5))
        if habit.poison:
            grad[frozen] = math.nan
        stock_w.grad, masked_w.grad = habit.mask_gradients(grad, frozen), grad
        stock.step()
        masked.step()
    assert bool((stock_w[frozen] != stock_then[frozen]).all()), "the habit froze after all: this test shows nothing"
    assert_same_bits(masked_w.detach(), masked_then, "frozen rows", where=frozen[:, None].expand(6, 5))


def test_3_the_stock_clip_norm_counts_frozen_rows() -> None:
    grad = torch.tensor([[3.0, 0.0], [0.0, 1e4]])
    stock, masked = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    stock.grad, masked.grad = grad.clone(), grad.clone()
    torch.nn.utils.clip_grad_norm_([stock], 3.0)
    sf.clip_grad_norm_({"w": masked}, 3.0, sf.FreezePlan({"w": sf.FreezeMask((2, 2), rows=[1])}))
    assert stock.grad[0, 0] < 1e-3  # the frozen row took it all
    assert masked.grad[0, 0].item() == pytest.approx(3.0, rel=1e-6)


# -------------------------------------------------------------------------------------------- 5: changing the plan

BEFORE_AND_AFTER = {
    "rows": (sf.FreezeMask((8, 6), rows=[1, 4, 5]), sf.FreezeMask((8, 6), rows=[5])),
    "all_rows": (sf.FreezeMask((8, 6), rows=range(8)), sf.FreezeMask((8, 6))),
    "columns": (sf.FreezeMask((8, 6), cols=[0, 3]), sf.FreezeMask((8, 6), cols=[3])),
    "elements": (sf.FreezeMask((8, 6), elements=scattered((8, 6), 0.4, 41)), sf.FreezeMask((8, 6))),
    "rows_to_columns": (sf.FreezeMask((8, 6), rows=[0, 7]), sf.FreezeMask((8, 6), cols=[2, 5])),
    "rows_to_elements": (
        sf.FreezeMask((8, 6), rows=[0, 7]),
        sf.FreezeMask((8, 6), elements=scattered((8, 6), 0.3, 43)),
    ),
    "mix": (
        sf.FreezeMask((8, 6), rows=[1], cols=[2], elements=scattered((8, 6), 0.3, 47)),
        sf.FreezeMask((8, 6), rows=[2], cols=[3], elements=scattered((8, 6), 0.3, 53)),
    ),
    "vector": (sf.FreezeMask((9,), rows=[0, 4, 8]), sf.FreezeMask((9,), rows=[4])),
    "cube": (sf.FreezeMask((2, 3, 4), rows=[0, 5], cols=[1]), sf.FreezeMask((2, 3, 4), rows=[5], cols=[0])),
}


@pytest.mark.parametrize("dtype", DTYPES + WIDE, ids=short)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", BEFORE_AND_AFTER)
def test_5_frozen_stops_thawed_starts_fresh_and_live_goes_on(change: str, backend: str, dtype: torch.dtype) -> None:
    old, new = BEFORE_AND_AFTER[change]
    was, now = old.dense(), new.dense()
    draw = replay(59)
    arguments = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True, "backend": stepping(backend, dtype)}
    param = nn.Parameter(draw(old.shape, dtype))
    undisturbed = nn.Parameter(param.detach().clone())
    optimizer = sf.MaskedAdamW([("w", param)], freeze=sf.FreezePlan({"w": old}), **arguments)
    without_plan = sf.MaskedAdamW([undisturbed], **arguments)
    for _ in range(5):
        param.grad = draw(old.shape, dtype)
        undisturbed.grad = param.grad.clone()
        optimizer.step()
        without_plan.step()
    optimizer.set_freeze(sf.FreezePlan({"w": new}))
    at_change = param.detach().clone()
    fresh = nn.Parameter(at_change.clone())
    newborn = sf.MaskedAdamW([fresh], **arguments)
    for step in range(4):
        param.grad = draw(old.shape, dtype)
        undisturbed.grad, fresh.grad = param.grad.clone(), param.grad.clone()
        for each in (optimizer, without_plan, newborn):
            each.step()
        what = f"{change}, {step + 1} steps after the change"
        assert_same_bits(param.detach(), at_change, f"{what}: frozen", where=now)
        assert_same_bits(param.detach(), undisturbed.detach(), f"{what}: live throughout", where=~was & ~now)
        assert_same_bits(param.detach(), fresh.detach(), f"{what}: thawed, against a fresh optimizer", where=was & ~now)


SHAPES = {"matrix": (7, 9), "vector": (6,), "cube": (2, 3, 4)}


def random_mask(rng: np.random.Generator, shape: tuple[int, ...]) -> sf.FreezeMask:
    n_rows, n_cols = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (shape[0], 1)
    chosen = rng.random(3) < (0.6, 0.4 if len(shape) > 1 else 0.0, 0.4)
    share = rng.choice([0.1, 0.5, 1.0], p=[0.5, 0.4, 0.1])
    return sf.FreezeMask(
        shape,
        rows=rng.random(n_rows) < share if chosen[0] else None,
        cols=rng.random(n_cols) < share if chosen[1] else None,
        elements=torch.from_numpy(rng.random(shape) < share) if chosen[2] else None,
    )


OPERATIONS = ("step", "step", "step", "freeze", "freeze_more", "thaw", "save_and_load", "copy", "lr", "decay", "skip")


def run_program(program: list[tuple[str, int]], backend: str, dtype: torch.dtype, options: Mapping[str, Any]) -> None:
    """Carry out a program on an optimizer and, element by element, on the model above; compare after each operation."""
    draw = replay(61)
    params = {name: nn.Parameter(draw(shape, dtype)) for name, shape in SHAPES.items()}
    values = {name: real(p.detach()).clone() for name, p in params.items()}
    oracles = {name: Weight(value, torch.zeros(value.shape, dtype=torch.bool)) for name, value in values.items()}
    sign, oracle_kind = torch.tensor(-1.0 if options["maximize"] else 1.0), {**options, "capturable": False}
    kind = sf.MaskedAdamW if options["decoupled"] else sf.MaskedAdam
    arguments = {
        "lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "amsgrad": options["amsgrad"],
        "maximize": options["maximize"], "backend": stepping(backend, dtype),
    }  # fmt: skip
    plan = sf.FreezePlan()
    optimizer = kind(params.items(), freeze=plan, **arguments)
    lr, decay = 1e-2, 0.1
    for place, (operation, seed) in enumerate(program):
        what = f"operation {place} ({operation}, {seed}) of {program}"
        rng = np.random.default_rng(seed)
        if operation in ("step", "skip"):
            for p in params.values():
                shape = real(p.detach()).shape
                grad = torch.from_numpy(rng.standard_normal(shape)).to(dtype.to_real())
                p.grad = None if rng.random() < 0.2 else torch.view_as_complex(grad) if dtype.is_complex else grad
            optimizer.found_inf = torch.tensor(float(operation == "skip"))
            optimizer.step()
            for name, p in params.items():
                if p.grad is not None and operation == "step":
                    rates = {"lr": lr, "weight_decay": decay, "beta2": 0.99}
                    oracles[name].step(real(p.grad), rates, sign, oracle_kind)
        elif operation in ("freeze", "freeze_more", "thaw"):
            masks = {name: random_mask(rng, shape) for name, shape in SHAPES.items() if rng.random() < 0.7}
            if operation == "thaw":  # whatever of the present plan the new one does not name
                masks = {
                    name: sf.FreezeMask(mask.shape, elements=mask.dense() & ~masks[name].dense())
                    for name, mask in plan.items()
                    if name in masks
                }
            plan = plan | sf.FreezePlan(masks) if operation == "freeze_more" else sf.FreezePlan(masks)
            optimizer.set_freeze(plan)
            for name, oracle in oracles.items():
                frozen = plan[name].dense() if name in plan else torch.zeros(SHAPES[name], dtype=torch.bool)
                oracle.freeze(pairs(frozen, params[name]))
        elif operation == "save_and_load":
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = kind(params.items(), freeze=plan, **arguments)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        elif operation == "copy":
            params, optimizer = copy.deepcopy((params, optimizer))
        elif operation == "lr":
            lr = float(rng.choice([0.0, 1e-3, 0.1]))
            optimizer.param_groups[0]["lr"] = lr
        elif operation == "decay":
            decay = float(rng.choice([0.0, 0.1, 1.0]))
            optimizer.param_groups[0]["weight_decay"] = decay
        state = dense_state(optimizer, params)
        for name, p in params.items():
            oracle = oracles[name]
            assert_same_bits(real(p.detach()), oracle.value, f"{what}: {name!r}")
            for key, value in state.get(name, {}).items():
                assert_same_bits(real(value), oracle.moments["mvx".index(key)], f"{what}: {key} of {name!r}")


PROGRAMS = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**16)), min_size=4, max_size=14)
OPTIONS = st.fixed_dictionaries({"decoupled": st.booleans(), "amsgrad": st.booleans(), "maximize": st.booleans()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *WIDE], ids=short)
@pytest.mark.parametrize("backend", BACKENDS)
def test_5_any_history_equals_the_element_by_element_model(backend: str, dtype: torch.dtype) -> None:
    @settings(max_examples=25 if backend == "reference" or dtype in DOUBLE else 120)
    @given(program=PROGRAMS, options=OPTIONS)
    def hold(program: list[tuple[str, int]], options: dict[str, bool]) -> None:
        run_program(program, backend, dtype, options)

    hold()


def test_5_ages_start_again_when_the_state_is_cleared() -> None:
    """``optimizer.state.clear()`` is how some training recipes start over: every row is fresh then, thawed ones too."""
    draw = replay(67)
    param = nn.Parameter(draw((4, 3)))
    optimizer = sf.MaskedAdamW([("w", param)], freeze=sf.FreezePlan({"w": sf.FreezeMask((4, 3), rows=[1])}))
    for _ in range(6):
        param.grad = draw((4, 3))
        optimizer.step()
    optimizer.set_freeze(None)
    param.grad = draw((4, 3))
    optimizer.step()
    optimizer.state.clear()
    fresh = nn.Parameter(param.detach().clone())
    newborn = sf.MaskedAdamW([fresh])
    for step in range(3):
        param.grad = draw((4, 3))
        fresh.grad = param.grad.clone()
        optimizer.step()
        newborn.step()
        assert_same_bits(param.detach(), fresh.detach(), f"{step + 1} steps after clearing the state")


def test_5_a_plan_that_does_not_fit_leaves_the_old_one_in_force() -> None:
    draw = replay(71)
    param = nn.Parameter(draw((4, 3)))
    plan = sf.FreezePlan({"w": sf.FreezeMask((4, 3), rows=[1])})
    optimizer = sf.MaskedAdamW([("w", param)], freeze=plan)
    param.grad = draw((4, 3))
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="'w'"):
        optimizer.set_freeze(sf.FreezePlan({"w": sf.FreezeMask((3, 4), rows=[1])}))
    assert optimizer.plan is plan
    assert_same_state(optimizer.state_dict(), before, "state after a refused plan")
    frozen = param.detach()[1].clone()
    optimizer.step()
    assert_same_bits(param.detach()[1], frozen, "row frozen by the old plan")


# -------------------------------------------------------------------------------------- 6: nothing fails silently


class Pair(nn.Module):
    """Two layers of one shape, so that they can be tied."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 4, bias=False)
        self.down = nn.Linear(6, 4, bias=False)


def misnamed() -> tuple[nn.Module, sf.FreezePlan]:
    return Pair(), sf.FreezePlan({"upp.weight": sf.FreezeMask((4, 6), rows=[1])})


def misshapen() -> tuple[nn.Module, sf.FreezePlan]:
    return Pair(), sf.FreezePlan({"up.weight": sf.FreezeMask((6, 4), rows=[1])})


def tied_twice() -> tuple[nn.Module, sf.FreezePlan]:
    model = Pair()
    model.down.weight = model.up.weight
    masks = {"up.weight": sf.FreezeMask((4, 6), rows=[1]), "down.weight": sf.FreezeMask((4, 6), rows=[2])}
    return model, sf.FreezePlan(masks)


def not_training() -> tuple[nn.Module, sf.FreezePlan]:
    model = Pair()
    model.up.weight.requires_grad_(False)
    return model, sf.FreezePlan({"up.weight": sf.FreezeMask((4, 6), rows=[1])})


def sharing_storage() -> tuple[nn.Module, sf.FreezePlan]:
    model = Pair()
    model.down.weight = nn.Parameter(model.up.weight.detach().view(4, 6))
    return model, sf.FreezePlan({"up.weight": sf.FreezeMask((4, 6), rows=[1])})


def with_gradients(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


FAULTS = {  # what is wrong, and the names the error must carry
    misnamed: ("upp.weight", "up.weight"),
    misshapen: ("up.weight", r"\(4, 6\)", r"\(6, 4\)"),
    tied_twice: ("up.weight", "down.weight"),
    not_training: ("up.weight", "requires_grad"),
    sharing_storage: ("up.weight", "down.weight"),
}
ENTRANCES: dict[str, Callable[[nn.Module, sf.FreezePlan], Any]] = {
    "MaskedAdamW": lambda model, plan: sf.MaskedAdamW(model.named_parameters(remove_duplicate=False), freeze=plan),
    "MaskedAdam": lambda model, plan: sf.MaskedAdam(model.named_parameters(remove_duplicate=False), freeze=plan),
    "set_freeze": lambda model, plan: sf.MaskedAdamW(model.named_parameters(remove_duplicate=False)).set_freeze(plan),
    "guard": lambda model, plan: sf.guard(torch.optim.SGD(model.parameters(), lr=0.1), plan, model),
    "zero_frozen_grads_": lambda model, plan: sf.zero_frozen_grads_(with_gradients(model), plan),
    "clip_grad_norm_": lambda model, plan: sf.clip_grad_norm_(with_gradients(model), 1.0, plan),
    "FreezePlan.check": lambda model, plan: plan.check(model),
    "snapshot": lambda model, plan: sf.snapshot(model, plan),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_6_a_plan_that_does_not_fit_is_an_error_that_names_it(
    fault: Callable[[], tuple[nn.Module, sf.FreezePlan]], entrance: str
) -> None:
    model, plan = fault()
    # a proof needs no training, and may read the same bytes under two names, as in a state dict of tied weights
    if fault in (not_training, sharing_storage) and entrance == "snapshot":
        ENTRANCES[entrance](model, plan)
        return
    with pytest.raises(ValueError) as caught:
        ENTRANCES[entrance](model, plan)
    for name in FAULTS[fault]:
        assert caught.match(name)


def test_6_a_plan_needs_names() -> None:
    layer = nn.Linear(6, 4)
    plan = sf.FreezePlan({"weight": sf.FreezeMask((4, 6), rows=[1])})
    with pytest.raises(ValueError, match="named_parameters"):
        sf.MaskedAdamW(layer.parameters(), freeze=plan)
    with pytest.raises(ValueError, match="named_parameters"):
        sf.MaskedAdamW(layer.parameters()).set_freeze(plan)


def test_6_a_tied_weight_is_reached_under_either_name() -> None:
    for name in ("up.weight", "down.weight"):
        model = Pair()
        model.down.weight = model.up.weight
        plan = sf.FreezePlan({name: sf.FreezeMask((4, 6), rows=[1])})
        at_start = model.up.weight.detach().clone()
        optimizer = sf.MaskedAdamW(model.named_parameters(remove_duplicate=False), lr=0.1, freeze=plan)
        with_gradients(model)
        optimizer.step()
        changed = (model.up.weight != at_start).any(1).tolist()
        assert changed == [True, False, True, True], f"under the name {name!r}"


def test_6_a_tied_weight_under_its_other_name_is_an_error_when_that_name_is_not_given() -> None:
    model = Pair()
    model.down.weight = model.up.weight
    plan = sf.FreezePlan({"down.weight": sf.FreezeMask((4, 6), rows=[1])})
    with pytest.raises(ValueError, match=r"down\.weight.*remove_duplicate=False"):
        sf.MaskedAdamW(model.named_parameters(), freeze=plan)


@pytest.mark.parametrize("not_a_plan", [{"weight": [1]}, "plan.safetensors", sf.FreezeMask((4, 6), rows=[1])])
@pytest.mark.parametrize("entrance", [name for name in ENTRANCES if name != "FreezePlan.check"])
def test_6_something_else_than_a_plan_is_a_type_error(entrance: str, not_a_plan: Any) -> None:
    with pytest.raises(TypeError, match="FreezePlan"):
        ENTRANCES[entrance](Pair(), not_a_plan)


def test_6_one_tensor_in_two_groups_is_an_error_that_names_it() -> None:
    """Sorted by name into two groups, a tied weight would silently take the settings of the first."""
    model = Pair()
    model.down.weight = model.up.weight
    bias = nn.Parameter(torch.zeros(2))
    groups = [
        {"params": [("up.weight", model.up.weight)], "weight_decay": 0.0},
        {"params": [("down.weight", model.down.weight), ("bias", bias)], "weight_decay": 0.1},
    ]
    with pytest.raises(ValueError, match=r"more than one parameter group|up\.weight.*down\.weight"):
        sf.MaskedAdamW(groups)
    with pytest.raises(ValueError, match=r"more than one parameter group|up\.weight.*down\.weight"):
        sf.MaskedAdamW([groups[0], {**groups[1], "params": groups[1]["params"][:1]}])


def test_6_guard_refuses_a_plan_for_parameters_the_optimizer_does_not_have() -> None:
    model = Pair()
    plan = sf.FreezePlan({"up.weight": sf.FreezeMask((4, 6), rows=[1])})
    with pytest.raises(ValueError, match=r"up\.weight.*not in the optimizer"):
        sf.guard(torch.optim.SGD([model.down.weight], lr=0.1), plan, model)


def change_shape(p: nn.Parameter) -> None:
    p.data = torch.zeros(6, 4)


def change_dtype(p: nn.Parameter) -> None:
    p.data = p.data.bfloat16()


def sparse_gradient(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p).to_sparse()


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (change_shape, ValueError, ("up.weight", r"\(6, 4\)", r"\(4, 6\)")),
        (change_dtype, ValueError, ("up.weight", "bfloat16", "float32")),
        (sparse_gradient, RuntimeError, ("up.weight", "sparse")),
    ],
    ids=["shape", "dtype", "sparse"],
)
@pytest.mark.parametrize("warm", [False, True], ids=["first_step", "later_step"])
def test_6_a_gradient_that_does_not_fit_is_refused_before_anything_changes(
    spoil: Callable[[nn.Parameter], None], error: type[Exception], words: tuple[str, ...], warm: bool
) -> None:
    model = with_gradients(Pair())
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1)
    if warm:
        optimizer.step()
    spoil(model.up.weight)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error) as caught:
        optimizer.step()
    for word in words:
        assert caught.match(word)
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), f"{name!r} after a refused step")
    assert_same_state(optimizer.state_dict(), state, "state after a refused step")
