"""`step_in_backward`: the bits of an ordinary step, and gradients that never exist all at once."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BACKENDS, assert_same_bits
from steps import take_step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import safefreeze_kernels as sf
from safefreeze_kernels.optim import backward
from safefreeze_kernels.optim.launch import LaunchPlan

pytestmark = pytest.mark.usefixtures("one_thread")
over_backends = pytest.mark.parametrize("backend", BACKENDS)


class Net(nn.Module):
    """An embedding tied to the head, two layers of which the second may be computed again in the backward pass, and
    one that is never used."""

    def __init__(self, dtype: torch.dtype = torch.float32, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.first, self.second = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.norm, self.head, self.idle = nn.LayerNorm(8), nn.Linear(8, 11, bias=False), nn.Linear(3, 3)
        self.head.weight = self.words.weight
        self.again = again
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.words(tokens)))
        x = checkpoint(self.second, x, use_reentrant=False) if self.again else self.second(x)
        found: Tensor = self.head(self.norm(x))
        return found


def plan(shift: int = 0) -> sf.FreezePlan:
    singles = torch.zeros(8, 24, dtype=torch.bool)
    singles.view(-1)[shift::3] = True
    return sf.FreezePlan({
        "words.weight": sf.FreezeMask((11, 8), rows=[0 + shift, 4]),
        "first.weight": sf.FreezeMask((24, 8), rows=[1, 2, 9 + shift], cols=[3]),
        "second.weight": sf.FreezeMask((8, 24), elements=singles),
    })  # fmt: skip


def loss(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(11, (4, 3), generator=torch.Generator().manual_seed(step))
    return model(tokens).float().square().mean()


def ordinary(model: nn.Module, optimizer: sf.MaskedAdamW, step: int, **_: Any) -> None:
    take_step(model, optimizer, loss(model, step), inside=False)


def inside(model: nn.Module, optimizer: sf.MaskedAdamW, step: int, **options: Any) -> None:
    with sf.step_in_backward(model, optimizer, **options):
        loss(model, step).backward()
    left = [name for name, p in model.named_parameters() if p.grad is not None]
    assert not left, f"gradients are left of {left}"


def pair(dtype: torch.dtype = torch.float32, again: bool = False, **settings: Any) -> list[tuple[Net, sf.MaskedAdamW]]:
    settings = {"lr": 0.05, "weight_decay": 0.1, "freeze": plan(), **settings}
    models = [Net(dtype, again) for _ in range(2)]
    return [(model, sf.MaskedAdamW(model.named_parameters(), **settings)) for model in models]


def assert_same(one: tuple[Net, sf.MaskedAdamW], other: tuple[Net, sf.MaskedAdamW], what: str) -> None:
    """Weights and state, bit for bit."""
    for (name, p), q in zip(one[0].named_parameters(), other[0].parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), f"{what}: {name}")
        state, expected = one[1].state.get(p, {}), other[1].state.get(q, {})
        assert state.keys() == expected.keys(), f"{what}: state of {name}"
        for key, value in state.items():
            assert_same_bits(value, expected[key], f"{what}: {key} of {name}")


SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "amsgrad, maximize, capturable": {"amsgrad": True, "maximize": True, "capturable": True},
    "masters": {"dtype": torch.bfloat16, "master": "remainder"},
    "stochastic rounding": {"dtype": torch.bfloat16, "rounding": "stochastic", "state_dtype": torch.bfloat16},
    "8 bits": {"state_dtype": torch.int8},
    "computed again": {"again": True},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@over_backends
def test_the_bits_are_those_of_an_ordinary_step(backend: str, settings: dict[str, Any]) -> None:
    one, other = pair(**settings, backend=backend)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for _, optimizer in (one, other)]
    for step in range(5):
        inside(*one, step)
        ordinary(*other, step)
        assert_same(one, other, f"step {step}")
        for schedule in schedules:
            schedule.step()


def test_a_plan_that_changes_where_state_is_kept() -> None:
    """State stays where it is then, and tells nothing of the change."""
    one, other = pair()
    for step in range(6):
        for _, optimizer in (one, other):
            optimizer.set_freeze(plan(step % 2), keep_state=True)
        inside(*one, step)
        ordinary(*other, step)
        assert_same(one, other, f"step {step}")


@pytest.mark.parametrize("keep_state", [False, True], ids=["packed", "kept"])
def test_plans_change_and_both_kinds_of_step_take_turns(keep_state: bool) -> None:
    one, other = pair()
    for step in range(9):
        if step in (3, 6):
            for _, optimizer in (one, other):
                optimizer.set_freeze(plan(step // 3), keep_state=keep_state)
        (ordinary if step % 4 == 3 else inside)(*one, step)
        ordinary(*other, step)
        assert_same(one, other, f"step {step}")


def test_what_trains_may_change_between_blocks() -> None:
    """The norm is in no plan, so it may be put aside: its weights and state wait."""
    one, other = pair()
    for step in range(6):
        for model, _ in (one, other):
            model.norm.requires_grad_(step % 3 != 1)
        inside(*one, step)
        ordinary(*other, step)
        assert_same(one, other, f"step {step}")


def test_passes_before_the_block_are_part_of_its_step() -> None:
    one, other = pair()
    for step in range(4):
        for model, optimizer in (one, other):
            loss(model, 100 + step).backward()
            if step == 1:  # the last pass does not reach it
                model.idle(torch.ones(2, 3)).sum().backward()
            (inside if model is one[0] else ordinary)(model, optimizer, step)
        assert_same(one, other, f"step {step}")


def test_it_goes_on_from_a_state_dict() -> None:
    one, other = pair()
    inside(*one, 0)
    ordinary(*other, 0)
    resumed = copy.deepcopy(one[0])
    optimizer = sf.MaskedAdamW(resumed.named_parameters(), lr=1.0, freeze=plan())
    optimizer.load_state_dict(copy.deepcopy(one[1].state_dict()))
    for step in (1, 2):
        inside(resumed, optimizer, step)
        ordinary(*other, step)
    assert_same((resumed, optimizer), other, "resumed")


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_with_gradients_only_where_the_model_learns(storage: Any) -> None:
    one, other = pair()
    with sf.live_gradients(one[0], plan(), storage=storage, most_live=1.0):
        with sf.live_gradients(other[0], plan(), storage=storage, most_live=1.0):
            for step in range(3):
                inside(*one, step)
                ordinary(*other, step)
                assert_same(one, other, f"step {step}")
        inside(*one, 3)
    ordinary(*other, 3)


def test_each_gradient_is_clipped_by_itself() -> None:
    one, other = pair()
    largest = 0.01
    for step in range(3):
        inside(*one, step, max_norm_of_each=largest)
        loss(other[0], step).backward()
        for name, p in other[0].named_parameters():
            sf.clip_grad_norm_({name: p}, largest, sf.FreezePlan({k: m for k, m in plan().items() if k == name}))
        other[1].step()
        other[1].zero_grad()
        assert_same(one, other, f"step {step}")


@pytest.mark.parametrize("enough", [1, 3 * 4 * (16 * 16 + 16)], ids=["each", "three layers"])
def test_gradients_do_not_exist_all_at_once(monkeypatch: pytest.MonkeyPatch, enough: int) -> None:
    monkeypatch.setattr(backward, "ENOUGH", enough)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.Tanh())))
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1)
    there: list[int] = []

    def look(*_: Any) -> None:
        there.append(sum(p.grad.numel() for p in model.parameters() if p.grad is not None))

    for layer in model:
        layer.register_full_backward_hook(look)
    with sf.step_in_backward(model, optimizer):
        model(torch.ones(2, 16, requires_grad=True)).sum().backward()
    assert len(there) == 12
    most = max(1, enough // 4 // (16 * 16 + 16)) * (16 * 16 + 16)
    assert max(there) <= most, f"elements of gradients, layer by layer: {there}"
    assert all(p.grad is None for p in model.parameters())


def test_small_parameters_are_stepped_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where passes reach other parameters in turn: a plan made for some of them does not go on with old counts."""
    model, twin = (nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"}) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    optimizers = [sf.MaskedAdamW(net.named_parameters(), lr=0.1) for net in (model, twin)]
    launches, run = list[int](), LaunchPlan.run

    def counted(plan: LaunchPlan, *arguments: Any) -> Any:
        launches.append(len(plan.members))
        return run(plan, *arguments)

    for names in ("abc", "ab", "abc", "c", "abc", "abc"):
        losses = [sum(net[name](torch.ones(4)).square().sum() for name in names) for net in (model, twin)]
        monkeypatch.setattr(LaunchPlan, "run", counted)
        take_step(model, optimizers[0], losses[0], inside=True)
        monkeypatch.setattr(LaunchPlan, "run", run)
        take_step(twin, optimizers[1], losses[1], inside=False)
        assert_same((model, optimizers[0]), (twin, optimizers[1]), names)
    assert launches == [6, 4, 6, 2, 6, 6]


def test_hooks_of_the_step_run_around_the_pass() -> None:
    model, optimizer = pair()[0]
    seen: list[str] = []
    # where DeepSpeed was imported, the optimizer has some of its own
    hooks = dict(model.first.weight._post_accumulate_grad_hooks or {})
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    with sf.step_in_backward(model, optimizer):
        seen.append("pass")
        loss(model, 0).backward()
    assert seen == ["before", "pass", "after"]
    with pytest.raises(KeyError), sf.step_in_backward(model, optimizer):
        raise KeyError
    assert seen == ["before", "pass", "after", "before"]
    inside(model, optimizer, 1)
    assert dict(model.first.weight._post_accumulate_grad_hooks or {}) == hooks, "hooks are left behind"


def twice(model: Net, optimizer: sf.MaskedAdamW) -> None:
    with sf.step_in_backward(model, optimizer):
        loss(model, 0).backward()
        loss(model, 1).backward()


def nested(model: Net, optimizer: sf.MaskedAdamW) -> None:
    with sf.step_in_backward(model, optimizer), sf.step_in_backward(model, optimizer):
        pass


def clipped(model: Net, optimizer: sf.MaskedAdamW) -> None:
    loss(model, 0).backward()
    sf.clip_grad_norm_(model, 1.0, optimizer=optimizer)
    inside(model, optimizer, 0)


def in_an_engine(model: Net, optimizer: sf.MaskedAdamW) -> None:
    model.first.weight._hp_mapping = None  # as DeepSpeed's ZeRO leaves it
    try:
        inside(model, optimizer, 0)
    finally:
        del model.first.weight._hp_mapping


BAD: dict[str, tuple[Callable[[Net, Any], Any], type[Exception], str]] = {
    "no model": (lambda m, o: inside(None, o, 0), TypeError, "model is a NoneType, expected a torch.nn.Module"),
    "no optimizer of ours": (
        lambda m, o: inside(m, torch.optim.AdamW(m.parameters()), 0), TypeError,
        r"optimizer is a AdamW, expected a MaskedAdamW or MaskedAdam \(unwrap a wrapper",
    ),
    "another model": (lambda m, o: inside(Net(), o, 0), ValueError, "optimizer has no parameter of model"),
    "a negative norm": (
        lambda m, o: inside(m, o, 0, max_norm_of_each=-1.0), ValueError, "max_norm_of_each is -1.0, expected a number",
    ),
    "no norm": (
        lambda m, o: inside(m, o, 0, max_norm_of_each=float("nan")), ValueError, "max_norm_of_each is nan, expected",
    ),
    "a factor that waits": (clipped, RuntimeError, r"a clip factor waits .* call zero_grad\(\).* max_norm_of_each"),
    "DeepSpeed": (in_an_engine, RuntimeError, "parameters are sharded, or DeepSpeed takes their gradients, expected"),
    "nested": (nested, RuntimeError, "a block of this optimizer is open already; leave it first"),
    "two passes": (twice, RuntimeError, "'.*' has a second gradient since the block was entered, expected one"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input(call: Callable[[Net, Any], Any], error: type[Exception], words: str) -> None:
    (model, optimizer), (twin, other) = pair()
    with pytest.raises(error, match=re.compile(f"step_in_backward: {words}", re.DOTALL)):
        call(model, optimizer)
    if call is twice:
        ordinary(twin, other, 0)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), f"{name} was changed")
    optimizer.zero_grad()
    inside(model, optimizer, 2)  # and it can be used again


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = pair()[0]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    with pytest.raises(RuntimeError, match=r"there are 2 processes, and their gradients are put together only after"):
        inside(model, optimizer, 0)
