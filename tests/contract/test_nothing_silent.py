"""What changes between the steps of a training script, behind an optimizer's back: taken as it is, or an error that
says what changed. Each of these once went by without a word (or crashed, or said something else)."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BACKENDS, assert_same_bits, bits, random_normal
from ranks import run_ranks
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels.kernels import reference
from safefreeze_kernels.kernels.backend import choose_backend
from safefreeze_kernels.kernels.parts import compile_live
from safefreeze_kernels.kernels.runs import Runs

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [0, 3]
MORE = nn.Parameter(torch.ones(2))
PLAN = sf.FreezePlan({"weight": sf.FreezeMask((6, 5), rows=ROWS)})


def layer(seed: int = 0) -> nn.Linear:
    linear = nn.Linear(5, 6)
    with torch.no_grad():
        linear.weight.copy_(random_normal(seed, 6, 5))
        linear.bias.copy_(random_normal(seed + 1, 6))
    return linear


def give(model: nn.Module, seed: int) -> None:
    for number, p in enumerate(model.parameters()):
        p.grad = random_normal(100 * seed + number, *p.shape, dtype=p.dtype)


def trained(model: nn.Module, steps: int = 2, **options: Any) -> sf.MaskedAdamW:
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=PLAN, **options)
    for seed in range(steps):
        give(model, seed)
        optimizer.step()
    return optimizer


def step_both(*runs: tuple[nn.Module, Any], seed: int) -> None:
    for model, optimizer in runs:
        give(model, seed)
        optimizer.step()


def two_layers(plan: bool = True) -> tuple[nn.ModuleDict, sf.MaskedAdamW]:
    """Two of `layer`, of which the plan freezes rows of the first's weight."""
    model = nn.ModuleDict({"a": layer(), "b": layer()})
    freeze = sf.FreezePlan({"a.weight": PLAN["weight"]} if plan else {})
    return model, sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=freeze)


@contextmanager
def refused(model: nn.Module, kind: type[Exception], match: str) -> Iterator[Any]:
    """The block raises, also for a warning of ours, and leaves the weights as they are."""
    before = [bits(p).clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(kind, match=match) as caught:
            yield caught
    assert all(torch.equal(bits(p), old) for p, old in zip(model.parameters(), before, strict=True))


# -- clip factors that wait for the step -----------------------------------------------------------------------------

LATER: dict[str, Callable[[nn.Module, sf.MaskedAdamW], Any]] = {
    "the plan changed": lambda model, opt: opt.set_freeze(None),
    "state was loaded": lambda model, opt: opt.load_state_dict(copy.deepcopy(opt.state_dict())),
    "a parameter group was added": lambda model, opt: opt.add_param_group(
        {"params": [("x", nn.Parameter(torch.ones(2)))]}
    ),
    "gradients changed": lambda model, opt: model.bias.grad.add_(1.0),
    "gradients changed in part": lambda model, opt: setattr(model.weight, "grad", torch.ones(6, 5)),
    "gradients changed by loss scaling": lambda model, opt: [p.grad.mul_(0.5) for p in model.parameters()],
}


@pytest.mark.parametrize("what", LATER)
def test_a_clip_factor_does_not_outlive_what_it_was_computed_from(what: str) -> None:
    model = layer()
    optimizer = trained(model)
    give(model, 7)
    sf.clip_grad_norm_(model, 0.1, PLAN, optimizer=optimizer)
    LATER[what](model, optimizer)
    with refused(model, RuntimeError, r"MaskedAdamW: a clip factor .* clip_grad_norm_") as caught:
        optimizer.step()
    assert what.split(" in ")[0].split(" by ")[0] in str(caught.value)
    optimizer.zero_grad()  # the remedy
    step_both((model, optimizer), seed=8)


@pytest.mark.parametrize("skip", ["model.zero_grad()", "new gradients"])
def test_a_clip_factor_goes_with_its_gradients(skip: str) -> None:
    """As after a batch with a NaN, which scripts skip."""
    model, other = layer(), layer()
    optimizer, expected = trained(model), trained(other)
    give(model, 7)
    model.weight.grad[1, 1] = math.nan
    sf.clip_grad_norm_(model, 1.0, PLAN, optimizer=optimizer)
    if skip == "model.zero_grad()":
        model.zero_grad()
    step_both((model, optimizer), (other, expected), seed=8)
    assert_same_bits(model.weight.detach(), other.weight.detach(), "the step after a skipped batch")


def test_a_clip_factor_needs_gradients() -> None:
    model = layer()
    optimizer = trained(model)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"multiply_gradients_: no parameter has a gradient"):
        optimizer.multiply_gradients_(torch.tensor(0.5))
    assert sf.clip_grad_norm_(model, 1.0, PLAN, optimizer=optimizer) == 0  # as in torch


def test_gradients_that_others_left_do_not_disturb_a_clip_factor() -> None:
    model = nn.ModuleDict({"a": layer(), "b": layer()})
    give(model, 0)
    model["b"].requires_grad_(False)
    optimizer = sf.MaskedAdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=0.1)
    sf.clip_grad_norm_(model, 1.0, optimizer=optimizer)
    optimizer.step()


def test_gradients_of_inference_mode_are_clipped_inside_the_step() -> None:
    model = layer()
    optimizer = trained(model)
    with torch.inference_mode():
        give(model, 3)
    sf.clip_grad_norm_(model, 1.0, PLAN, optimizer=optimizer)
    optimizer.step()


# -- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["another optimizer", "a memory-mapped file"])
def test_a_load_owns_its_tensors(source: str, tmp_path: Path) -> None:
    model, other = layer(), layer()
    optimizer, expected = trained(model), trained(other)
    state = optimizer.state_dict()
    if source != "another optimizer":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", mmap=True, weights_only=True)
    twin = copy.deepcopy(model)
    loaded = sf.MaskedAdamW(twin.named_parameters(), lr=0.1, freeze=PLAN)
    loaded.load_state_dict(state)
    given = {t.untyped_storage().data_ptr() for e in state["state"].values() for t in e.values()}
    own = {t.untyped_storage().data_ptr() for e in loaded.state.values() for t in e.values()}
    assert not given & own, "memory that is not the optimizer's own"
    step_both((twin, loaded), seed=5)
    step_both((model, optimizer), (other, expected), seed=6)
    assert_same_bits(model.weight.detach(), other.weight.detach(), "a step after another optimizer's")


@pytest.mark.parametrize("gradient", ["zeros", "normal"])
def test_a_warm_up_from_rate_0_counts_as_in_torch(gradient: str) -> None:
    model, stock_model = layer(), layer()
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1)
    stock = torch.optim.AdamW(stock_model.parameters(), lr=0.1, foreach=False, fused=False)
    for rate in (0.0, 0.02, 0.04):
        for each, opt in ((model, optimizer), (stock_model, stock)):
            give(each, int(rate * 100))
            for p in each.parameters() if rate == 0.0 and gradient == "zeros" else ():
                p.grad.zero_()
            opt.param_groups[0]["lr"] = rate
            opt.step()
    assert optimizer.state[model.weight]["step"] == stock.state[stock_model.weight]["step"]
    torch.testing.assert_close(model.weight, stock_model.weight, rtol=0, atol=1e-6)


def test_the_step_by_which_distributed_checkpoint_makes_state_counts_nothing() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, expected = layer(), layer()
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=PLAN, dense_checkpoints=True)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state[model.weight]["step"] == 0
    other = trained(expected)
    for seed in range(2):
        step_both((model, optimizer), seed=seed)
    assert other.state[expected.weight]["step"] == optimizer.state[model.weight]["step"]
    assert_same_bits(model.weight.detach(), expected.weight.detach(), "training after the state was made")


@pytest.mark.parametrize(
    "number", [lambda x: x, float, lambda x: torch.tensor(x).numpy()[()]], ids=["own", "float", "numpy"]
)
def test_what_schedulers_and_frameworks_write_is_loaded(number: Callable[[float], Any]) -> None:
    model = layer()
    optimizer = trained(model)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = number(0.25)
    state["state"][0]["step"] = number(2.0)
    optimizer.load_state_dict(state)
    give(model, 4)
    optimizer.step()
    assert optimizer.state[model.weight]["step"] == 3


def test_an_optimizer_pickled_by_an_earlier_version_goes_on() -> None:
    model, other = layer(), layer()
    optimizer, expected = trained(model), trained(other)
    state = optimizer.__getstate__()
    settings, names, _ = (state.pop(key) for key in ("_settings", "_names", "_masks"))
    state |= {f"_{key}": value for key, value in vars(settings).items() if key != "optimizer"}
    state["_aliases"] = names.aliases
    restored = sf.MaskedAdamW.__new__(sf.MaskedAdamW)
    restored.__setstate__(state)
    for each, opt in ((model, restored), (other, expected)):
        opt.set_freeze(sf.FreezePlan({"weight": sf.FreezeMask((6, 5), rows=[0])}))
        give(each, 5)
        opt.step()
    assert_same_bits(model.weight.detach(), other.weight.detach(), "a thaw and a step")


@pytest.mark.parametrize("act", ["load_state_dict", "set_freeze"])
def test_state_that_was_replaced_is_let_go(act: str) -> None:
    model = layer()
    optimizer = trained(model)
    gone = weakref.ref(optimizer.state[model.weight]["exp_avg"])
    if act == "set_freeze":
        optimizer.set_freeze(None)
    else:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert gone() is None


# -- parameters ------------------------------------------------------------------------------------------------------


def reassigned(model: nn.Module) -> None:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def replaced(model: nn.Module) -> None:
    model.weight = nn.Parameter(model.weight.detach().clone())


def normalised(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model)


@pytest.mark.parametrize("swap", [reassigned, replaced, normalised])
@pytest.mark.parametrize("planned", [True, False])
def test_a_parameter_that_another_took_the_place_of_is_told_at_the_first_step(
    swap: Callable[[nn.Module], None], planned: bool
) -> None:
    model = layer()
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=PLAN if planned else None)
    swap(model)
    model(torch.ones(2, 5)).sum().backward()
    with refused(model, ValueError if planned else RuntimeWarning, r"'weight' has no gradient.*afterwards"):
        optimizer.step()


@pytest.mark.parametrize("planned", [True, False])
def test_a_parameter_replaced_in_mid_run_is_told(planned: bool) -> None:
    model, optimizer = two_layers(planned)
    for seed in range(2):
        step_both((model, optimizer), seed=seed)
        optimizer.zero_grad()
    replaced(model["a"])
    give(model, 2)
    with refused(model, ValueError if planned else RuntimeWarning, r"'a\.weight' has no gradient.*param_groups"):
        optimizer.step()


def test_a_parameter_replaced_after_it_was_idle_is_told() -> None:
    model, optimizer = two_layers()
    for used in (model, model["b"], model):
        optimizer.zero_grad()
        give(used, 0)
        optimizer.step()
    optimizer.zero_grad()
    replaced(model["a"])
    give(model, 2)
    with pytest.raises(ValueError, match=r"'a\.weight' has no gradient"):
        optimizer.step()


def test_a_parameter_without_a_gradient_in_one_step_is_no_news() -> None:
    model, optimizer = two_layers()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for used in (model, model["b"], model, model["b"], model["a"]):
            optimizer.zero_grad()
            give(used, 0)
            optimizer.step()
    assert [int(optimizer.state[model[name].weight]["step"]) for name in "ab"] == [3, 4]


def test_steps_that_train_nothing_are_told_once() -> None:
    model = layer()
    optimizer = trained(model)
    optimizer.zero_grad()
    _held = list(model.parameters())  # by someone else than the optimizer, so that nobody knows they were replaced
    reassigned(model)
    model(torch.ones(2, 5)).sum().backward()
    with pytest.warns(RuntimeWarning, match=r"no parameter has a gradient.*load_state_dict\(assign=True\)") as told:
        for _ in range(3):
            optimizer.step()
    assert len(told) == 1


def test_parameters_nobody_gave_a_gradient_yet_are_no_news() -> None:
    model = nn.ModuleDict({"used": layer(), "idle": layer()})
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1)
    give(model["used"], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        optimizer.step()


def test_parameters_out_of_order_are_told() -> None:
    model = nn.ModuleDict({"a": nn.Linear(5, 6, bias=False), "b": nn.Linear(5, 6, bias=False)})
    plan = sf.FreezePlan({"a.weight": PLAN["weight"]})
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=plan)
    optimizer.param_groups[0]["params"].reverse()
    give(model, 0)
    with pytest.raises(ValueError, match=r"param_groups\[0\] has 'b.weight' where .* 'a.weight': .* reordered"):
        optimizer.step()
    optimizer.param_groups[0]["param_names"].reverse()  # the remedy
    kept = bits(model["a"].weight)[ROWS].clone()
    optimizer.step()
    assert torch.equal(bits(model["a"].weight)[ROWS], kept)


def test_parameters_taken_out_are_told() -> None:
    model = layer()
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=PLAN)
    del optimizer.param_groups[0]["params"][1]
    give(model, 0)
    with pytest.raises(ValueError, match=r"param_groups\[0\] has 1 parameters and 2 names: .* taken out"):
        optimizer.step()


@pytest.mark.parametrize("when", ["before the first step", "after it"])
def test_storage_tied_later_is_told(when: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(5, 6, bias=False), "b": nn.Linear(5, 6, bias=False)})
    plan = sf.FreezePlan({"a.weight": PLAN["weight"]})
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=plan)
    give(model, 0)
    if when == "after it":
        optimizer.step()
    model["b"].weight.data = model["a"].weight.data
    with refused(model, ValueError, r"'a\.weight' and 'b\.weight' share storage"):
        optimizer.step()


def test_a_name_that_two_parameters_have_is_refused_when_it_comes() -> None:
    actor, critic = layer(0), layer(1)
    pairs = [*actor.named_parameters(), *critic.named_parameters()]
    with pytest.raises(ValueError, match="both named 'weight'"):
        sf.MaskedAdamW(pairs, lr=0.1, freeze=PLAN)
    with pytest.raises(ValueError, match="both named 'weight'"):
        sf.MaskedAdamW([{"params": pairs[:2]}, {"params": pairs[2:]}], lr=0.1, freeze=PLAN)
    optimizer = sf.MaskedAdamW(actor.named_parameters(), lr=0.1, freeze=PLAN)
    with pytest.raises(ValueError, match="both named 'weight'"):
        optimizer.add_param_group({"params": list(critic.named_parameters())})
    assert len(optimizer.param_groups) == 1
    sf.MaskedAdamW([*actor.named_parameters(), ("critic.weight", critic.weight)], lr=0.1, freeze=PLAN)


def test_groups_without_names_are_told_how_to_have_them() -> None:
    model = layer()
    with pytest.raises(ValueError, match=r"without names.*in the groups' 'params' \(name, parameter\) pairs"):
        sf.MaskedAdamW([{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}], freeze=PLAN)


# -- grown parameters ------------------------------------------------------------------------------------------------

GROWN = {
    "rows": ((6, 5), (8, 5)), "columns": ((6, 5), (6, 7)), "both": ((6, 5), (7, 9)), "a vector": ((6,), (9,)),
    "an inner dimension": ((2, 3, 4), (2, 5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("which", ["the same", "another"])
@pytest.mark.parametrize("where", GROWN)
@pytest.mark.parametrize("planned", [True, False])
def test_a_grown_parameter_keeps_its_state_and_grows_young(where: str, planned: bool, which: str) -> None:
    """Old elements go on as if nothing had grown; what was added starts as a fresh AdamW element."""
    old_shape, shape = GROWN[where]
    old = tuple(map(slice, old_shape))
    start, more = random_normal(0, *old_shape), random_normal(1, *shape)
    small, large = (sf.FreezePlan({"p": sf.FreezeMask(s, rows=[1])} if planned else {}) for s in (old_shape, shape))

    def make(value: Tensor, plan: sf.FreezePlan) -> tuple[nn.Parameter, sf.MaskedAdamW]:
        p = nn.Parameter(value.clone())
        return p, sf.MaskedAdamW([("p", p)], lr=0.1, weight_decay=0.1, freeze=plan)

    p, optimizer = make(start, small)
    whole, never_grown = make(start, small)
    for seed in (2, 3):
        for q, opt in ((p, optimizer), (whole, never_grown)):
            q.grad = random_normal(seed, *old_shape)
            opt.step()
    grown = more.clone()
    grown[old] = p.detach()
    if which == "the same":
        p.data = grown
    else:
        new = nn.Parameter(grown)
        optimizer.param_groups[0]["params"][0], optimizer.state[new] = new, optimizer.state.pop(p)
        p = new
    p.grad = random_normal(4, *shape)
    with pytest.raises(ValueError, match=r"'p'.*set_freeze"):
        optimizer.step()
    optimizer.set_freeze(large)
    young, young_only = make(grown, large)
    for seed in (4, 5):
        g = random_normal(seed, *shape)
        for q, opt, value in ((p, optimizer, g), (whole, never_grown, g[old]), (young, young_only, g)):
            q.grad = value.clone()
            opt.step()
    added = torch.ones(shape, dtype=torch.bool)
    added[old] = False
    # A frozen row of a tensor whose rows moved apart is another row of the matrix now; leave rows of either out.
    frozen = large["p"].dense() if planned else torch.zeros(shape, dtype=torch.bool)
    both = ~frozen[old] & ~(small["p"].dense() if planned else torch.zeros(old_shape, dtype=torch.bool))
    assert_same_bits(p.detach()[old], whole.detach(), "what was there", where=both)
    assert_same_bits(p.detach(), young.detach(), "what was added", where=added & ~frozen)
    assert_same_bits(p.detach(), grown, "what is frozen", where=frozen)


def test_a_parameter_that_shrank_is_refused() -> None:
    model = layer()
    optimizer = trained(model)
    model.weight.data, model.weight.grad = model.weight.data[:4].clone(), None
    with pytest.raises(ValueError, match=r"'weight' has another shape .* no dimension to shrink.*build the optimizer"):
        optimizer.set_freeze(sf.FreezePlan({"weight": sf.FreezeMask((4, 5), rows=[0])}))
    assert optimizer.plan == PLAN


# -- masters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_written_from_outside_is_taken_as_written(backend: str) -> None:
    """Every bfloat16 that somebody may write, with remainders of every kind left from before."""
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).reshape(256, 256)
    for left in (0, 1, 0x7FFF, -0x8000, -0x7FFF, -1):
        p = nn.Parameter(weight.clone())
        optimizer = sf.MaskedAdamW([("p", p)], lr=0.0, weight_decay=0.0, master="remainder", backend=backend)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.state[p]["master_remainder"].fill_(left)
        p.data.copy_(weight)
        masters = optimizer.master_weights()["p"]
        assert not (masters.isnan() & ~weight.isnan()).any(), "a remainder made a NaN"
        optimizer.step()
        finite = weight.isfinite()
        assert_same_bits(p.detach(), weight, f"weights over remainders {left}", where=finite)


# -- work lists, ranks, graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda work: pickle.loads(pickle.dumps(work))], ids=["copy", "pickle"])
def test_a_copied_work_list_has_arrays_of_its_own(how: Callable[[Any], Any]) -> None:
    """Its addresses are those of its own arrays, also if the original is gone before it first runs."""

    def addresses(of: Any) -> set[int]:
        return {
            int(a)
            for field in ("cols", "col_bits", "packed_cols", "frozen_bits")
            for a in Runs.of(of).parts[field]
            if a
        }

    mask = sf.FreezeMask((6, 40), rows=[1], cols=range(0, 40, 2), elements=random_normal(0, 6, 40) > 1)
    work = compile_live([mask])
    twin = how(work)
    theirs = addresses(work)
    mine = addresses(twin)
    assert len(mine) == len(theirs) > 0 and not mine & theirs
    del work
    x = random_normal(1, 6, 40)
    found, expected = x.clone(), x.clone()
    for backend, values in (("cpu" if "cpu" in BACKENDS else "reference", found), ("reference", expected)):
        choose_backend(backend, torch.device("cpu"), "test").scale_(twin, [values], torch.tensor(0.5))
    assert_same_bits(found, expected, "scaled by a copied list")
    assert_same_bits(found, x, "frozen", where=mask.dense())


def loads_before_training(rank: int, change: str) -> str:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(5, 6, bias=False))
    plan = sf.FreezePlan({"weight": sf.FreezeMask((6, 5), rows=[rank if change != "one has no plan" else 0])})
    given = None if change == "one has no plan" and rank == 1 else plan
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=given)
    if change == "load":
        stock = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(2, 5)).sum().backward()
        stock.step()
        optimizer.load_state_dict(stock.state_dict())
    elif change == "pickle":
        optimizer = pickle.loads(pickle.dumps(optimizer))
        optimizer.param_groups[0]["params"][0] = model.module.weight
    elif change == "add a group":
        optimizer.add_param_group({"params": [("more", nn.Parameter(torch.zeros(2)))]})
    try:
        for _ in range(2):  # who leads hears of the others at its second step
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
    except ValueError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("change", ["nothing", "load", "pickle", "add a group", "one has no plan"])
def test_ranks_compare_plans_whatever_happened_before_the_first_step(change: str) -> None:
    for found in run_ranks(2, loads_before_training, change):
        assert "different freeze plans" in found


def test_a_step_recorded_in_a_graph_without_capturable_is_torchs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layer()
    optimizer = trained(model)

    class Stream:
        def is_capturing(self) -> bool:
            return True

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: Stream())
    for name, answer in (("is_available", True), ("is_current_stream_capturing", True)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with refused(model, RuntimeError, r"(?i)capture.*capturable"):
        optimizer.step()


def test_live_gradients_of_another_plan_are_told_at_any_step() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    few, more = (sf.FreezePlan({"0.weight": sf.FreezeMask((16, 16), rows=range(n))}) for n in (8, 12))
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1, weight_decay=0.1, freeze=few)
    x = random_normal(0, 4, 16)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    kept = bits(model[0].weight).clone()
    with sf.live_gradients(model, more):
        model(x).square().sum().backward()
        with pytest.raises(ValueError, match="learns where live_gradients computes no gradient"):
            optimizer.step()
    with pytest.raises(ValueError, match=r"0\.weight.*live_gradients"):  # the gradients are those still
        optimizer.step()
    assert torch.equal(bits(model[0].weight), kept)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert (model[0].weight[8:] != kept.view(torch.float32)[8:]).all()


def test_the_reference_knows_that_zeros_have_no_master_below() -> None:
    zeros = torch.tensor([0.0, -0.0], dtype=torch.bfloat16)
    for left in (-0x8000, -1):
        assert_same_bits(
            reference.from_remainder(zeros, torch.full((2,), left, dtype=torch.int16)),
            zeros.float(),
            "masters of zeros",
        )
