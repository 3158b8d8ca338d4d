"""The keeper: it freezes what does most harm, its looks leave no trace in the training, and it can be resumed."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_models import refused
from conftest import assert_same_bits
from model_folders import png_size
from refusing import REFUSAL, SAFETY, TASK, margins_of, optimizer_of, refusing, train
from steps import take_step
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import refusal_margins
from safefreeze_kernels.attribution.grains import Grains

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]

# ---------------------------------------------------------------------------------------------- what it freezes


@pytest.mark.parametrize("grain", ["row", "unit", "element"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}], ids=["plain", "amsgrad", "maximize"])
def test_what_does_most_harm_stands_still(grain: Any, options: dict[str, Any]) -> None:
    """By hand, from a stock optimizer's moments and a plain backward pass; two rates."""
    model = refusing()
    named = dict(model.named_parameters())
    fast = {name for name in named if "mlp" in name}
    groups = [
        {"params": [(name, p) for name, p in named.items() if (name in fast) == wanted], "lr": lr}
        for wanted, lr in ((True, 3e-3), (False, 1e-3))
    ]
    optimizer = sf.MaskedAdamW(groups, weight_decay=0.01, **options)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=5, grain=grain)
    train(model, optimizer, 5)
    states = {name: optimizer.state[p] for name, p in named.items()}
    model.zero_grad()
    torch.stack(margins_of(model.eval())).mean().backward()
    harm = {}
    for name, p in named.items():
        second = states[name]["max_exp_avg_sq" if "amsgrad" in options else "exp_avg_sq"]
        heading = states[name]["exp_avg"] / (1 - 0.9**5) / ((second / (1 - 0.999**5)).sqrt() + 1e-8)
        harm[name] = heading * p.grad * (1.0 if name in fast else 1 / 3)
    grains = Grains.of(model, grain)
    expected = grains.plan({name: grains.reduce(name, values) for name, values in harm.items()}, 0.2)
    both = (keeper.plan, expected)
    differing = sum((one.dense() ^ other.dense()).sum() for one, other in _side_by_side(*both, named))
    assert differing <= 0.01 * grains.total, "but for rounding"
    assert 0 <= 0.2 - keeper.log[0].frozen < 0.03 and keeper.log[0].step == 5
    assert keeper.log[0].margin == pytest.approx(float(refusal_margins(model, SAFETY).mean()), rel=1e-5)


def _side_by_side(one: sf.FreezePlan, other: sf.FreezePlan, named: dict[str, Tensor]) -> list[tuple[Any, Any]]:
    nothing = {name: sf.FreezeMask(p.shape) for name, p in named.items()}
    return [(one.get(name, mask), other.get(name, mask)) for name, mask in nothing.items()]


@pytest.mark.parametrize("grain", ["row", "element"])
def test_refusals_are_kept(grain: Any) -> None:
    """Against as many at random, and against none."""
    margins = []
    for options in ({}, {"random": True}, None):
        model = refusing()
        optimizer = optimizer_of(model)
        if options is not None:
            sf.RefusalKeeper(model, optimizer, SAFETY, every=2, share=0.3, grain=grain, prompts=6, **options)
        train(model, optimizer, 16)
        margins.append(float(refusal_margins(model, SAFETY).mean()))
    before = float(refusal_margins(refusing(), SAFETY).mean())
    kept, random, none = margins
    assert before > kept > random and before - kept < 0.5 * (before - none), (before, margins)


def test_frozen_bytes_are_proven_in_every_window_and_the_base_throughout() -> None:
    model = refusing()
    name = "model.layers.0.mlp.up_proj.weight"
    base = sf.FreezePlan({name: sf.FreezeMask(model.get_parameter(name).shape, rows=[0, 3, 5])})
    optimizer = optimizer_of(model, freeze=base)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=3, prove=True)
    proof, plans = sf.snapshot(model, base), set()
    for seed in range(5):
        window = sf.snapshot(model, keeper.plan)
        train(model, optimizer, 2, seed)
        window.verify(model)
        train(model, optimizer, 1, seed + 10)
        assert base | keeper.plan == keeper.plan
        plans.add(keeper.plan.fingerprint)
    proof.verify(model)
    assert keeper.base == base and len(plans) == 5 and len(keeper.log) == 5
    frozen = next(name for name in keeper.plan if name.endswith("embed_tokens.weight"))
    with torch.no_grad():
        model.get_parameter(frozen)[keeper.plan[frozen].rows[0]] += 1
    with pytest.raises(sf.FrozenDriftError, match="embed_tokens"):
        train(model, optimizer, 3)


def test_steps_inside_the_backward_pass_are_looked_after_alike() -> None:
    models, keepers = [refusing(), refusing()], []
    for model in models:
        optimizer = optimizer_of(model)
        keepers.append(sf.RefusalKeeper(model, optimizer, SAFETY, every=2))
        torch.manual_seed(0)
        model.train()
        for _ in range(5):
            take_step(model, optimizer, model(input_ids=TASK, labels=TASK).loss, inside=model is models[1])
    assert len(keepers[0].log) == 2 and keepers[0].plan == keepers[1].plan
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q), name


def test_removed_it_looks_no_more() -> None:
    model = refusing()
    optimizer = optimizer_of(model)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=2)
    train(model, optimizer, 2)
    assert keeper.plan
    keeper.remove()
    train(model, optimizer, 4)
    assert not optimizer.plan and len(keeper.log) == 1


def test_any_behaviour_can_be_kept() -> None:
    """Here: what the model says of one row, a scalar; as the refusal margin, row by row, it does the same as that."""
    found = []
    for keep in (None, by_row, lambda model, batch: by_row(model, batch).mean()):
        model = refusing()
        optimizer = optimizer_of(model)
        keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=4, keep=keep)
        train(model, optimizer, 4)
        found.append((keeper.log[0].margin, keeper.plan.fingerprint))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5) and found[1] == found[2]


def by_row(model: nn.Module, batch: Any) -> Tensor:
    first = (batch["labels"] != -100).int().argmax(1) - 1
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[torch.arange(len(first)), first]
    others = logits.clone()
    others[:, REFUSAL] = -math.inf
    return logits[:, REFUSAL] - others.logsumexp(-1)


def test_the_share_is_steered_by_the_margin() -> None:
    """A behaviour that is told what it is worth: 10 to begin with, then below 8, then above."""
    worth = [10.0, 7.9, 5.0, 8.1, 9.0, 20.0]

    def keep(model: nn.Module, batch: Any) -> Tensor:
        weight = model.model.norm.weight
        return weight.sum() * 0.1 + (worth.pop(0) - 0.1 * weight.detach().sum())

    model = refusing()
    optimizer = optimizer_of(model)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=1, share=0.4, keep=keep, steer=0.8, grain="element")
    assert keeper.floor == 8.0
    train(model, optimizer, 5)
    assert [look.share for look in keeper.log] == pytest.approx([0.6, 0.9, 0.6, 0.4, 0.4 / 1.5])
    assert [look.margin for look in keeper.log] == pytest.approx([7.9, 5.0, 8.1, 9.0, 20.0], rel=1e-5)


# ----------------------------------------------------------------------------- no trace of it in the training


@pytest.fixture
def without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks that freeze nothing."""
    monkeypatch.setattr(Grains, "plan", lambda *_, **__: sf.FreezePlan())


def everything(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name}:{key}": value.clone() for key, value in optimizer.state[p].items()}
    return {**found, "random": torch.get_rng_state()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_same_bits(tensor, other[name], name)


def plain(model: nn.Module, optimizer: Any) -> None:
    train(model, optimizer, 6)


def clipped(model: nn.Module, optimizer: Any) -> None:
    torch.manual_seed(0)
    model.train()
    for _ in range(6):
        model(input_ids=TASK, labels=TASK).loss.backward()
        sf.clip_grad_norm_(model, 0.1, optimizer.plan, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()


def accumulated(model: nn.Module, optimizer: Any) -> None:
    """Gradients are never set to zero: what a look left in them would stay."""
    torch.manual_seed(0)
    model.train()
    for step in range(18):
        model(input_ids=TASK[step % 3][None], labels=TASK[step % 3][None]).loss.backward()
        if step % 3 == 2:
            optimizer.step()


def scaled(model: nn.Module, optimizer: Any) -> None:
    """Two steps are skipped."""
    torch.manual_seed(0)
    model.train()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(8):
        scaler.scale(model(input_ids=TASK, labels=TASK).loss).backward()
        if step in (1, 4):
            model.lm_head.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("loop", "options"),
    [
        (plain, {}), (clipped, {}), (accumulated, {}), (scaled, {}), (scaled, {"fused": True}),
        (plain, {"state_dtype": torch.bfloat16}),
    ],
    ids=["plain", "clipped", "accumulated", "scaled", "scaled fused", "bf16 state"],
)  # fmt: skip
@pytest.mark.usefixtures("without_effect")
def test_looks_leave_no_trace(loop: Callable[[nn.Module, Any], None], options: dict[str, Any]) -> None:
    """Bits of weights, state and random numbers; they come after the steps that were taken, every two."""
    runs = []
    for watched in (True, False):
        model = refusing()
        model.model.layers[0].eval()  # a mode of its own
        optimizer = optimizer_of(model, **options)
        keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=2) if watched else None
        loop(model, optimizer)
        if keeper is not None:
            assert [look.step for look in keeper.log] == [2, 4, 6]
        runs.append((everything(model, optimizer), [module.training for module in model.modules()]))
    assert runs[0][1] == runs[1][1]
    same(runs[0][0], runs[1][0])


@pytest.mark.filterwarnings("ignore")
def test_compiled_steps() -> None:
    """It looks after them too, also after one that was traced before there was a keeper."""

    def train_compiled(steps: int) -> None:
        for _ in range(steps):
            model(input_ids=TASK, labels=TASK).loss.backward()
            step()
            optimizer.zero_grad()

    for _ in range(3):  # what a compiler sees change it may take for variable, and not look at again
        model = refusing()
        optimizer = optimizer_of(model)
        step = torch.compile(optimizer.step, backend="eager")
        train_compiled(3)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=2)
    train_compiled(5)
    assert [look.step for look in keeper.log] == [2, 4] and keeper.plan


@pytest.mark.usefixtures("without_effect")
def test_looks_have_random_numbers_of_their_own() -> None:
    runs = []
    for watched in (True, False):
        model = refusing()
        optimizer = optimizer_of(model)
        if watched:
            sf.RefusalKeeper(model, optimizer, SAFETY, every=2, keep=lambda *given: by_row(*given) * torch.rand(1))
        train(model, optimizer, 4)
        runs.append(everything(model, optimizer))
    same(*runs)


@pytest.mark.usefixtures("without_effect")
def test_bf16_with_masters() -> None:
    runs = []
    for watched in (True, False):
        model = refusing().bfloat16()
        optimizer = optimizer_of(model, master="remainder")
        if watched:
            sf.RefusalKeeper(model, optimizer, SAFETY, every=2, grain="element")
        train(model, optimizer, 6)
        runs.append(everything(model, optimizer))
    same(*runs)


def test_a_look_inside_an_accumulation_window_leaves_gradients_alone() -> None:
    model = refusing()
    optimizer = optimizer_of(model)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=100)
    train(model, optimizer, 2)
    model(input_ids=TASK, labels=TASK).loss.backward()
    held = {name: p.grad for name, p in model.named_parameters()}
    copies = {name: grad.clone() for name, grad in held.items()}
    fired: list[str] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
        p.register_hook(lambda _, name=name: fired.append(name))
    keeper.look()
    assert not fired and all(p.grad is held[name] and p.requires_grad for name, p in model.named_parameters())
    same(held, copies)


def test_gradients_are_dropped_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from safefreeze_kernels.attribution import gradients

    lent: dict[str, Tensor] = {}
    held: list[int] = []
    make, reduce = gradients.aliases, Grains.reduce

    def remembered(model: nn.Module) -> dict[str, Tensor]:
        lent.update(make(model))
        return lent

    def counted(self: Grains, name: str, values: Tensor) -> Tensor:
        held.append(sum(alias.grad is not None for alias in lent.values()))
        return reduce(self, name, values)

    monkeypatch.setattr(gradients, "aliases", remembered)
    monkeypatch.setattr(Grains, "reduce", counted)
    model = refusing()
    optimizer = optimizer_of(model)
    sf.RefusalKeeper(model, optimizer, SAFETY, every=1)
    train(model, optimizer, 1)
    assert held == [0] * len(list(model.parameters()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """What is recomputed in the look's backward pass is of the look too."""
    found = []
    for checkpointing in (True, False):
        model = refusing()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            for layer in model.model.layers:  # transformers checkpoints in training alone; others may not
                layer.register_forward_pre_hook(lambda layer, _: setattr(layer, "training", True))
                layer.self_attn.attention_dropout = 0.0
        optimizer = optimizer_of(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "None of the inputs")  # of the margin before training
            keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=1)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.01)
        optimizer.step()
        assert all(bool((p.grad == 0.01).all()) for p in model.parameters())
        found.append(keeper.plan.fingerprint)
    assert found[0] == found[1]


# --------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("before", [False, True], ids=["keeper first", "optimizer first"])
@pytest.mark.parametrize(
    "options",
    [{"grain": "row"}, {"grain": "element", "thawed": "kept"}, {"grain": "unit", "steer": 0.9, "random": True}],
    ids=["row", "element kept", "unit steered random"],
)
def test_a_resumed_run_is_the_same_to_the_bit(options: dict[str, Any], before: bool) -> None:
    """``before``: the optimizer's state is loaded before there is a keeper, so it was saved at the base plan."""
    found = []
    for cuts in ([11], [5, 6]):
        model, saved = refusing(), None
        for number, steps in enumerate(cuts):
            optimizer = optimizer_of(model)
            state = torch.load(io.BytesIO(saved), weights_only=True) if saved else None
            if state and before:
                optimizer.load_state_dict(state["optimizer"])
            keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=2, prompts=3, prove=True, **options)
            if state:
                keeper.load_state_dict(state["keeper"])
                if not before:
                    optimizer.load_state_dict(state["optimizer"])
            for step in range(steps):
                train(model, optimizer, 1, seed=step + sum(cuts[:number]))
            state = {"keeper": keeper.state_dict()}
            with keeper.at_base() if before else contextlib.nullcontext():
                state["optimizer"] = optimizer.state_dict()
                buffer = io.BytesIO()
                torch.save(state, buffer)
            saved = buffer.getvalue()
        looks = [(look.step, look.margin, look.share, look.frozen, look.layers, look.modules) for look in keeper.log]
        found.append((everything(model, optimizer), keeper.plan, looks, keeper.first_margin))
    same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:] and [look[0] for look in found[0][2]] == [2, 4, 6, 8, 10]


def test_bad_states() -> None:
    model = refusing()
    optimizer = optimizer_of(model)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=2)
    train(model, optimizer, 2)
    state, plan = keeper.state_dict(), keeper.plan
    for damage, words in (
        ({"version": 9}, "version 9"), ({"plan": {"a": {}}}, "not the state of a keeper"),
        ({"draw": 3}, "not the state"), ({"log": [{"step": 1}]}, "not the state"),
        ({"base": "0" * 64}, "another base plan, expected the same: pass base="),
        ({"base": None}, "another base plan"),
    ):  # fmt: skip
        refused(words, lambda damage=damage: keeper.load_state_dict({**state, **damage}))
    refused("not the state", lambda: keeper.load_state_dict({}))
    assert keeper.plan == plan and len(keeper.log) == 1


# ------------------------------------------------------------------------------------------------- reporting


def test_what_it_tells(tmp_path: Path) -> None:
    model = refusing()
    optimizer = optimizer_of(model)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=2, steer=0.8)
    refused("no look yet", lambda: keeper.save_picture(tmp_path / "none.png"))
    assert "no look yet" in repr(keeper)
    train(model, optimizer, 6)
    look = keeper.log[-1]
    assert (
        look.seconds > 0 and set(look.layers) == {"0", "1", "-"} and {"q_proj", "lm_head", "norm"} <= set(look.modules)
    )
    total = sum(p.numel() for p in model.parameters())
    assert look.frozen == pytest.approx(sum(mask.frozen_count for mask in keeper.plan.values()) / total)
    assert "row, every 2 steps: margin" in repr(keeper)
    keeper.save_picture(tmp_path / "keeper.png")
    assert png_size(tmp_path / "keeper.png") == (900, 700)
