"""`set_freeze(plan, keep_state=True)`: what stands still keeps its moments, and may go on from there (contract 5).

`test_machine.py` does this in random programs; here is what each part of the promise means, by hand.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pytest
import torch
from conftest import LOCAL, assert_same_bits, assert_same_state, random_normal
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels.kernels.runs import Runs

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

SHAPE: Final = (6, 9)
#: What stands still, plan after plan.
PLANS: Final[dict[str, list[dict[str, Any]]]] = {
    "rows": [{"rows": [0, 3]}, {"rows": [3, 4]}, {}, {"rows": range(6)}, {"rows": [1]}],
    "cols": [{"cols": [2, 8]}, {"cols": [2, 3]}, {"cols": []}, {"cols": range(9)}, {"cols": [0]}],
    "elements": [{"elements": torch.arange(54).view(SHAPE) % k == 1} for k in (3, 4, 2, 5, 3)],
    "rows, then columns": [{"rows": [0, 3]}, {"cols": [2, 8]}, {"rows": [3], "cols": [2]}, {}, {"cols": [2]}],
    "rows within columns": [{"cols": [1, 2]}, {"rows": [0], "cols": [1, 2]}, {"cols": [2]}, {"rows": [0]}, {}],
}
LR: Final = {"lr": 0.05, "weight_decay": 0.1}


def plan_of(**frozen: Any) -> sf.FreezePlan:
    return sf.FreezePlan({"w": sf.FreezeMask(SHAPE, **frozen)})


def moments_of(optimizer: Any, p: Tensor) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in optimizer.state[p].items() if key != "step"}


def trained(
    plans: Sequence[dict[str, Any]], steps: int = 2, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[nn.Parameter, Any]:
    """A weight and its optimizer after ``steps`` steps under each of ``plans``, all of them with state kept."""
    thawed = settings.pop("thawed", "fresh")
    w = nn.Parameter(random_normal(0, *SHAPE, dtype=dtype))
    optimizer = sf.MaskedAdamW([("w", w)], **LR, **settings)
    learn(w, optimizer, 100)
    for number, frozen in enumerate(plans):
        optimizer.set_freeze(plan_of(**frozen), keep_state=True, thawed=thawed)
        for step in range(steps):
            learn(w, optimizer, 10 * number + step)
    return w, optimizer


def learn(w: nn.Parameter, optimizer: Any, seed: int) -> None:
    """A step; NaN where it is frozen."""
    grad = random_normal(seed + 1, *SHAPE, dtype=w.dtype)
    if optimizer.plan:
        grad[optimizer.plan["w"].dense()] = math.nan
    w.grad = grad
    optimizer.step()


@pytest.mark.parametrize("backend", LOCAL)
@pytest.mark.parametrize("thawed", ["fresh", "kept"])
@pytest.mark.parametrize("plans", PLANS.values(), ids=PLANS)
def test_each_element_trains_as_if_alone(plans: list[dict[str, Any]], thawed: str, backend: str) -> None:
    """Each element against one that an optimizer of its own steps only when it is live; fresh: a new one each time."""
    w, optimizer = trained(plans, thawed=thawed, backend=backend)
    values, before = [nn.Parameter(v.clone()) for v in random_normal(0, *SHAPE).view(-1)], None
    make = lambda v: sf.MaskedAdamW([v], **LR, backend=backend)  # noqa: E731
    own = [make(v) for v in values]
    for number, frozen in [(None, {}), *enumerate(plans)]:
        live = ~sf.FreezeMask(SHAPE, **frozen).dense().view(-1)
        for i in np.flatnonzero(live & ~before) if before is not None and thawed == "fresh" else ():
            own[i] = make(values[i])
        before = live
        for step in range(1 if number is None else 2):
            grad = random_normal((100 if number is None else 10 * number + step) + 1, *SHAPE).view(-1)
            for i in np.flatnonzero(live):
                values[i].grad = grad[i].clone()
                own[i].step()
    assert_same_bits(w.detach().view(-1), torch.stack([v.detach() for v in values]), f"{thawed}, {backend}")
    held = optimizer.state[w]["exp_avg"].view(-1)
    for i in np.flatnonzero(before):
        assert_same_bits(held[i], own[i].state[values[i]]["exp_avg"], f"exp_avg of element {i}")


@pytest.mark.parametrize("backend", LOCAL)
@pytest.mark.parametrize("frozen", [plans[0] for plans in PLANS.values()], ids=PLANS)
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"amsgrad": True}),
        (torch.bfloat16, {"master": "remainder"}),
        (torch.complex64, {}),
        (torch.float32, {"state_dtype": torch.int8, "amsgrad": True}),
    ],
)
def test_what_stands_still_is_neither_read_nor_written(
    dtype: torch.dtype, settings: dict[str, Any], frozen: dict[str, Any], backend: str
) -> None:
    if backend != "reference" and dtype.is_complex:
        backend = "auto"
    w, optimizer = trained([frozen], dtype=dtype, backend=backend, **settings)
    twin, other = trained([frozen], dtype=dtype, backend=backend, **settings)
    still = optimizer.plan["w"].dense()
    for value in moments_of(optimizer, w):
        poison = optimizer.state[w][value]
        poison[still] = 7 if value == "master_remainder" else 255 if poison.dtype == torch.uint8 else math.nan
    before = moments_of(optimizer, w)
    for step in range(3):
        learn(w, optimizer, step)
        learn(twin, other, step)
    assert_same_bits(w.detach(), twin.detach(), "a weight whose paused moments are NaN")
    for key, value in moments_of(optimizer, w).items():
        assert value.shape == w.shape
        assert_same_bits(value, before[key], f"paused part of {key}", where=still)


@pytest.mark.parametrize("plans", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": torch.bfloat16, "master": "remainder"},
        {"amsgrad": True, "state_dtype": torch.bfloat16},
        {"amsgrad": True, "state_dtype": torch.int8},
    ],
)
def test_converting_is_exact(settings: dict[str, Any], plans: list[dict[str, Any]]) -> None:
    """From kept to packed what is frozen is dropped, from packed to kept zeros come there; what is live stays."""
    w, optimizer = trained(plans[:2], thawed="kept", **settings)
    plan, still, before = optimizer.plan, optimizer.plan["w"].dense(), moments_of(optimizer, w)
    optimizer.set_freeze(plan)
    packed = moments_of(optimizer, w)
    assert {tuple(value.shape) for value in packed.values()} == {plan["w"].packed_shape}
    optimizer.set_freeze(plan, keep_state=True)
    for key, value in moments_of(optimizer, w).items():
        assert_same_bits(value, torch.where(still, torch.zeros_like(value), before[key]), key)
    optimizer.set_freeze(plan, keep_state=False)
    for key, value in moments_of(optimizer, w).items():
        assert_same_bits(value, packed[key], f"{key}, packed again")


def test_from_packed_to_kept_what_stops_keeps_its_moments() -> None:
    w = nn.Parameter(random_normal(0, *SHAPE))
    optimizer = sf.MaskedAdamW([("w", w)], **LR, freeze=plan_of(rows=[0]))
    learn(w, optimizer, 0)
    before = optimizer.state[w]["exp_avg"].clone()
    optimizer.set_freeze(plan_of(rows=[1]), keep_state=True)
    assert_same_bits(optimizer.state[w]["exp_avg"][1:], before, "rows that had state")
    assert not optimizer.state[w]["exp_avg"][0].any(), "a row that was never live has zeros"


def test_from_kept_to_packed_what_thaws_may_go_on() -> None:
    for thawed in ("fresh", "kept"):
        w, optimizer = trained([{"rows": [0, 3]}], dtype=torch.bfloat16, master="remainder")
        before = moments_of(optimizer, w)
        optimizer.set_freeze(plan_of(rows=[3]), thawed=thawed)
        now = moments_of(optimizer, w)
        went_on = before["exp_avg"][0] if thawed == "kept" else torch.zeros(9)
        assert_same_bits(now["exp_avg"][0], went_on, thawed)
        assert_same_bits(now["exp_avg"][1:], before["exp_avg"][[1, 2, 4, 5]], "what was live")
        assert_same_bits(now["master_remainder"], before["master_remainder"][[0, 1, 2, 4, 5]], "part of the weight")


def test_a_fresh_row_keeps_its_master() -> None:
    w, optimizer = trained([{"rows": [0, 3]}], dtype=torch.bfloat16, master="remainder")
    master = optimizer.master_weights()["w"]
    assert (master != w.detach().float())[0].any(), "the test needs a master that its weight is rounded from"
    optimizer.set_freeze(None, keep_state=True)
    assert_same_bits(optimizer.master_weights()["w"], master, "masters")
    assert not optimizer.state[w]["exp_avg"][0].any()


def test_what_was_added_and_frozen_goes_on_from_nothing() -> None:
    """Of a weight that grew by a column, whose rows have ages of their own."""
    w, optimizer = trained([{"rows": [0, 3]}, {"rows": [3]}], thawed="kept")
    w.grad, w.data = None, torch.cat([w.detach(), torch.ones(6, 1)], dim=1)
    optimizer.set_freeze(sf.FreezePlan({"w": sf.FreezeMask((6, 10), cols=[9])}), keep_state=True, thawed="kept")
    w.grad = torch.ones(6, 10)
    optimizer.step()
    optimizer.set_freeze(None, keep_state=True, thawed="kept")
    fresh = nn.Parameter(torch.ones(6))
    newborn = sf.MaskedAdamW([fresh], **LR)
    w.grad, fresh.grad = random_normal(1, 6, 10), random_normal(1, 6, 10)[:, 9].clone()
    optimizer.step()
    newborn.step()
    assert_same_bits(w.detach()[:, 9], fresh.detach(), "the column that was added")


# ------------------------------------------------------------------------------------------------------ state dicts


@pytest.mark.parametrize("plans", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("how", ["the same plan", "packed", "kept", "another mode and plan"])
def test_it_resumes_bit_for_bit(how: str, plans: list[dict[str, Any]], tmp_path: Any) -> None:
    w, optimizer = trained(plans[:4], thawed="kept")
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = nn.Parameter(w.detach().clone())
    resumed = sf.MaskedAdamW([("w", again)], **LR, freeze=optimizer.plan if how == "the same plan" else None)
    if how == "another mode and plan":
        learn(again, resumed, 5)
        resumed.set_freeze(plan_of(rows=[2]), keep_state=True)
        with torch.no_grad():
            again.copy_(w)
    if how != "the same plan":
        resumed.set_freeze(optimizer.plan, keep_state=how == "kept")
    resumed.load_state_dict(saved)
    assert_same_state(resumed.state_dict(), optimizer.state_dict(), "loaded")
    for number in range(4):  # the paused go on, where they were
        if number % 2:
            for each in (optimizer, resumed):
                each.set_freeze(plan_of(**plans[number]), keep_state=True, thawed="kept")
        learn(w, optimizer, 50 + number)
        learn(again, resumed, 50 + number)
    assert_same_bits(again.detach(), w.detach(), "weights after it resumed")
    assert_same_state(resumed.state_dict(), optimizer.state_dict(), "and trained")


def test_packed_state_makes_it_packed_again() -> None:
    """How state is kept comes from the state dict."""
    w = nn.Parameter(random_normal(0, *SHAPE))
    packed = sf.MaskedAdamW([("w", w)], **LR, freeze=plan_of(rows=[0]))
    learn(w, packed, 0)
    w2, kept = trained([{"rows": [0]}])
    kept.load_state_dict(packed.state_dict())
    assert kept.state[w2]["exp_avg"].shape == (5, 9)
    assert_same_state(kept.state_dict(), packed.state_dict(), "loaded")


def test_stock_state_is_loaded_as_live_until_now() -> None:
    w = nn.Parameter(random_normal(0, *SHAPE))
    stock = torch.optim.AdamW([w], lr=0.05)
    for seed in range(3):
        w.grad = random_normal(seed, *SHAPE)
        stock.step()
    twin = nn.Parameter(w.detach().clone())
    optimizer = sf.MaskedAdamW([("w", twin)], lr=0.05)
    optimizer.set_freeze(plan_of(rows=[0]), keep_state=True)
    optimizer.load_state_dict(stock.state_dict())
    assert_same_bits(optimizer.state[twin]["exp_avg"], stock.state[w]["exp_avg"], "moments, paused ones too")
    learn(twin, optimizer, 9)
    optimizer.set_freeze(None, keep_state=True, thawed="kept")
    learn(twin, optimizer, 10)
    w.grad = random_normal(11, *SHAPE)
    stock.step()  # row 0 took as many steps here
    torch.testing.assert_close(twin.detach()[0], w.detach()[0], rtol=1e-6, atol=1e-7)


def test_for_stock_adamw_the_paused_have_no_moments() -> None:
    w, optimizer = trained([{"rows": [0, 3]}])
    dense = optimizer.dense_state_dict()
    assert not dense["state"][0]["exp_avg"][[0, 3]].any() and optimizer.state[w]["exp_avg"][[0, 3]].any()
    assert_same_bits(dense["state"][0]["exp_avg"][[1, 2]], optimizer.state[w]["exp_avg"][[1, 2]], "live rows")
    stock = torch.optim.AdamW([w], **LR)
    stock.load_state_dict(dense)
    stock.step()


def test_earlier_versions_would_refuse_it() -> None:
    _, optimizer = trained([{"rows": [0, 3]}])
    (group,) = optimizer.state_dict()["param_groups"]
    assert '"version": 2' in group["freeze"]
    optimizer.set_freeze(plan_of(rows=[0]))
    (group,) = optimizer.state_dict()["param_groups"]
    assert '"version": 1' in group["freeze"] and "kept" not in group["freeze"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_alike(how: Any) -> None:
    w, optimizer = trained([{"rows": [0, 3]}], thawed="kept")
    twin, other = how((w, optimizer))
    for each in (optimizer, other):
        each.set_freeze(plan_of(rows=[1]), keep_state=True, thawed="kept")
    for seed in range(2):
        learn(w, optimizer, seed)
        learn(twin, other, seed)
    assert_same_bits(twin.detach(), w.detach(), "a copy")


# ------------------------------------------------------------------------------------------------------ what it costs


def test_only_work_lists_are_made_anew() -> None:
    w, optimizer = trained([{"rows": [0, 3]}])
    plans, moments = optimizer._launches.now.plans, optimizer.state[w]["exp_avg"]
    optimizer.set_freeze(plan_of(rows=[1]), keep_state=True)
    learn(w, optimizer, 0)
    assert optimizer._launches.now.plans is plans and optimizer.state[w]["exp_avg"] is moments


@pytest.mark.parametrize("thawed", ["fresh", "kept"])
def test_a_hundred_changes_leave_no_more_to_do_than_one(thawed: Any) -> None:
    """Rows of many ages lie in the same chunks, and have one part."""
    shape, rng = (2048, 64), np.random.default_rng(0)
    w = nn.Parameter(random_normal(0, *shape))
    optimizer = sf.MaskedAdamW([("w", w)], **LR)
    w.grad = random_normal(1, *shape)
    optimizer.step()

    def chunks() -> int:
        (plan,) = optimizer._launches.now.plans
        assert len(plan._work.parts) == 1
        return len(Runs.of(plan._work).chunks)

    found = []
    for _ in range(100):
        rows = rng.random(2048) < 0.2
        optimizer.set_freeze(sf.FreezePlan({"w": sf.FreezeMask(shape, rows=rows)}), keep_state=True, thawed=thawed)
        optimizer.step()
        found.append(chunks())
    assert max(found) <= found[0] + 1
    (plan,) = optimizer._launches.now.plans
    assert len(plan._work.born) > 10, "the test needs rows of many ages"


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("error", "arguments", "told"),
    [
        (TypeError, {"keep_state": 1}, "keep_state is 1, expected True or False"),
        (TypeError, {"keep_state": None}, "keep_state is None"),
        (ValueError, {"thawed": "old"}, "thawed is 'old', expected 'fresh' or 'kept'"),
        (ValueError, {"thawed": None}, "thawed is None"),
        (ValueError, {"plan": sf.FreezePlan({"w": sf.FreezeMask((5, 9))})}, "shape"),
        (ValueError, {"plan": sf.FreezePlan({"v": sf.FreezeMask(SHAPE)})}, "'v'"),
    ],
)
@pytest.mark.parametrize("keep_state", [False, True])
def test_bad_input_leaves_everything_as_it_was(
    keep_state: bool, error: type[Exception], arguments: dict[str, Any], told: str
) -> None:
    _, optimizer = trained([{"rows": [0, 3]}])
    before, plan = copy.deepcopy(optimizer.state_dict()), optimizer.plan
    with pytest.raises(error, match=told):
        optimizer.set_freeze(**{"plan": plan_of(rows=[1]), "keep_state": keep_state, **arguments})
    assert optimizer.plan == plan
    assert_same_state(optimizer.state_dict(), before, "state")


def test_packed_gradients_are_refused() -> None:
    layer = nn.Linear(9, 6, bias=False)
    plan = sf.FreezePlan({"weight": sf.FreezeMask(SHAPE, rows=range(4))})
    optimizer = sf.MaskedAdamW(layer.named_parameters(), **LR, freeze=plan)
    with sf.live_gradients(layer, plan, storage="packed"):
        layer(torch.ones(2, 9)).sum().backward()
        optimizer.step()
        with pytest.raises(ValueError, match=r"gradients of 'weight' are packed.*storage='dense'"):
            optimizer.set_freeze(plan, keep_state=True)
        assert optimizer.state[layer.weight]["exp_avg"].shape == (2, 9)
        optimizer.step()
    layer.weight.grad = None
    optimizer.set_freeze(plan, keep_state=True)
    before = layer.weight.detach().clone()
    with sf.live_gradients(layer, plan, storage="packed"):
        layer(torch.ones(2, 9)).sum().backward()
        with pytest.raises(ValueError, match=r"gradients of 'weight' are packed.*keep_state=False"):
            optimizer.step()
    assert_same_bits(layer.weight.detach(), before, "the weight")
