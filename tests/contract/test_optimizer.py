"""Drop-in for `torch.optim`: what code written for AdamW and Adam does, with and without a plan."""

from __future__ import annotations

import builtins
import copy
import doctest
import io
import math
import pickle
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DTYPES, WIDE, assert_same_bits, assert_same_state, replay, short
from torch import Tensor, nn

import safefreeze_kernels as sf

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [
    pytest.param(sf.MaskedAdamW, torch.optim.AdamW, id="AdamW"),
    pytest.param(sf.MaskedAdam, torch.optim.Adam, id="Adam"),
]
STOCK_IS_ONE_LOOP = {"foreach": False, "fused": False}
# Ours and torch's spelling of the update differ in the last places. test_contract.py derives how much, per element; for
# whole runs of a few steps at learning rates up to 0.1, as here, 1e-5 is above what it derives and far below a mistake.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Net(nn.Module):
    """Two layers, a norm and a scalar: 2-D, 1-D and 0-dim parameters."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draw = replay(seed)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))
        for p in self.parameters():
            p.data = draw(tuple(p.shape)) * 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))) * self.scale


PLAN = sf.FreezePlan(
    {
        "up.weight": sf.FreezeMask((8, 6), rows=[1, 4, 5]),
        "up.bias": sf.FreezeMask((8,), rows=[1, 4, 5]),
        "down.weight": sf.FreezeMask((3, 8), cols=[1, 4, 5], elements=torch.eye(3, 8, dtype=torch.bool)),
    }
)


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    draw = replay(seed)
    return [(draw((5, 6)), draw((5, 3))) for _ in range(count)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_weights(model: nn.Module, other: nn.Module, what: str) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), f"{what}: {name!r}")


def assert_close_weights(model: nn.Module, other: nn.Module, what: str) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **CLOSE, msg=lambda text, name=name: f"{what}: {name!r}: {text}")


def trained(steps: int, kind: Any = sf.MaskedAdamW, **arguments: Any) -> tuple[Net, Any]:
    """A net and its optimizer, after that many steps."""
    model = Net()
    optimizer = kind(model.named_parameters(), **arguments)
    train(model, optimizer, batches(steps))
    return model, optimizer


def against_stock(start: Tensor, grads: Iterable[Tensor], **arguments: Any) -> tuple[nn.Parameter, Any]:
    """A parameter that starts as ``start`` and its optimizer, after steps with ``grads``: where stock's comes too."""
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = sf.MaskedAdamW([("w", ours)], lr=0.1, **arguments)
    reference = torch.optim.AdamW([theirs], lr=0.1, **STOCK_IS_ONE_LOOP)
    for grad in grads:
        ours.grad = theirs.grad = grad
        optimizer.step(), reference.step()
    torch.testing.assert_close(ours, theirs, **CLOSE)
    return ours, optimizer


class Pair:
    """Two nets that start alike and train alike, each with its optimizer: ``model`` and what it is compared with."""

    def __init__(self, ours: Any = sf.MaskedAdamW, stock: Any = sf.MaskedAdamW, **arguments: Any) -> None:
        self.model, self.other = Net(), Net()
        self.optimizer = ours(self.model.named_parameters(), **arguments)
        one_loop = STOCK_IS_ONE_LOOP if stock in (torch.optim.AdamW, torch.optim.Adam) else {}
        self.reference = stock(self.other.named_parameters(), **arguments, **one_loop)

    def __iter__(self) -> Iterator[tuple[Net, Any]]:
        return iter(((self.model, self.optimizer), (self.other, self.reference)))

    def train(self, steps: int, seed: int = 1) -> None:
        for model, optimizer in self:
            train(model, optimizer, batches(steps, seed))

    def assert_close(self, what: str) -> None:
        assert_close_weights(self.model, self.other, what)

    def assert_same(self, what: str) -> None:
        assert_same_weights(self.model, self.other, what)


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through a file, read as a Trainer reads it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------------------------- torch's own cases

# In a process of its own: importing torch's test helpers changes torch (global flags, compiler settings).
LIST_CASES = """
import pickle, sys, types, unittest
try:
    import expecttest
except ModuleNotFoundError:  # wanted by the helpers, not by the cases
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase, assert_expected_inline=None)
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db
found = {}
for info in optim_db:
    if info.optim_cls in (torch.optim.AdamW, torch.optim.Adam):
        inputs = [(case.desc, case.kwargs) for case in info.optim_inputs_func(device="cpu")]
        errors = [
            (case.optimizer_error_input.params, case.optimizer_error_input.kwargs,
             case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR, case.error_type.__name__, case.error_regex)
            for case in info.optim_error_inputs_func("cpu", torch.float32)
        ]
        found[info.optim_cls.__name__] = inputs, errors
pickle.dump(found, sys.stdout.buffer)
"""


@pytest.fixture(scope="module")
def torch_cases() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LIST_CASES], capture_output=True, timeout=300)
    if done.returncode:
        pytest.skip(f"this torch does not list its cases: {done.stderr.decode()[-300:]}")
    return pickle.loads(done.stdout)


@pytest.mark.parametrize("plan", [None, sf.FreezePlan()], ids=["no_plan", "empty_plan"])
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_torchs_own_cases(ours: Any, stock: Any, plan: Any, torch_cases: dict[str, Any]) -> None:
    inputs, _ = torch_cases[stock.__name__]
    assert len(inputs) >= 5
    for description, arguments in inputs:
        model, other = Net(), Net()
        optimizer = ours(model.named_parameters(), **arguments, freeze=plan)
        reference = stock(other.parameters(), **arguments, **STOCK_IS_ONE_LOOP)
        losses, expected = train(model, optimizer, batches(10)), train(other, reference, batches(10))
        assert_close_weights(model, other, description)
        assert losses == pytest.approx(expected, rel=1e-5), description
        assert_state_close(optimizer, reference, description)


def assert_state_close(optimizer: torch.optim.Optimizer, reference: torch.optim.Optimizer, what: str) -> None:
    state, expected = optimizer.state_dict()["state"], reference.state_dict()["state"]
    assert state.keys() == expected.keys(), what
    for index, entry in expected.items():
        assert state[index].keys() == entry.keys(), what
        for key, value in entry.items():
            torch.testing.assert_close(
                state[index][key], value, **CLOSE, msg=lambda text, at=(index, key): f"{what}: {at}: {text}"
            )


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_torchs_own_errors(ours: Any, stock: Any, torch_cases: dict[str, Any]) -> None:
    _, errors = torch_cases[stock.__name__]
    assert len(errors) >= 10
    silent = []
    for params, arguments, at_construction, error, regex in errors:
        kind = getattr(builtins, error)
        params = params if params is not None else [nn.Parameter(torch.ones(2, 3))]
        assert at_construction
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            try:
                with pytest.raises(kind, match=regex):
                    ours(params, **arguments)
            except pytest.fail.Exception:
                silent.append(f"{arguments}, {params}: no {error} {regex!r}")
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize("kind", [sf.MaskedAdamW, sf.MaskedAdam])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": -1.0}, "learning rate: -1.0"),
        ({"lr": math.nan}, "learning rate: nan"),
        ({"eps": math.nan}, "epsilon"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"betas": (0.9, math.nan)}, "beta parameter at index 1"),
        ({"differentiable": True}, "differentiable"),
        ({"state_dtype": torch.float16}, "state_dtype"),
    ],
)
def test_settings_out_of_range_are_refused_when_given(kind: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind([nn.Parameter(torch.ones(1))], **arguments)


@pytest.mark.parametrize(("key", "value"), [("lr", math.nan), ("lr", -1.0), ("eps", -1.0), ("weight_decay", math.nan)])
def test_settings_that_became_invalid_are_refused_before_the_step_changes_anything(key: str, value: float) -> None:
    model = Net()
    groups = [{"params": [("a", model.up.weight)]}, {"params": [("b", model.down.weight)]}]
    optimizer = sf.MaskedAdamW(groups)
    train(model, optimizer, batches(2))
    optimizer.param_groups[1][key] = value
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=f"{value}"):
        optimizer.step()
    assert_same_weights(model, before, "after a refused step")
    assert_same_state(optimizer.state_dict()["state"], state, "after a refused step")


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"'fpga'.*'reference'.*'cpu'"):
        sf.MaskedAdamW([p], backend="fpga").step()
    assert_same_bits(p.detach(), torch.ones(2), "parameter")


# -------------------------------------------------------------------------------- groups, settings, closures, hooks


def grouped(model: Net, names: bool) -> list[dict[str, Any]]:
    def of(module: nn.Module, prefix: str) -> list[Any]:
        named = [(f"{prefix}.{name}", p) for name, p in module.named_parameters()]
        return named if names else [p for _, p in named]

    return [
        {"params": of(model.up, "up"), "lr": 0.05, "weight_decay": 0.0},
        {"params": of(model.down, "down"), "betas": (0.5, 0.9), "eps": 1e-4},
        {"params": [("scale", model.scale)] if names else [model.scale], "amsgrad": True, "maximize": True},
    ]


@pytest.mark.parametrize("names", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_groups_keep_their_own_settings(ours: Any, stock: Any, names: bool) -> None:
    model, other = Net(), Net()
    optimizer = ours(grouped(model, names), lr=0.01, weight_decay=0.1)
    reference = stock(grouped(other, names), lr=0.01, weight_decay=0.1, **STOCK_IS_ONE_LOOP)
    train(model, optimizer, batches(5)), train(other, reference, batches(5))
    assert_close_weights(model, other, "three groups")
    assert_state_close(optimizer, reference, "three groups")


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_a_group_can_be_added_later(ours: Any, stock: Any) -> None:
    model, other = Net(), Net()
    optimizer, reference = ours(model.up.parameters()), stock(other.up.parameters(), **STOCK_IS_ONE_LOOP)
    train(model, optimizer, batches(3)), train(other, reference, batches(3))
    optimizer.add_param_group({"params": list(model.down.parameters()), "lr": 0.1})
    reference.add_param_group({"params": list(other.down.parameters()), "lr": 0.1})
    train(model, optimizer, batches(3, seed=2)), train(other, reference, batches(3, seed=2))
    assert_close_weights(model, other, "with a group added")
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.1]


def test_a_group_that_is_refused_leaves_the_others() -> None:
    model = Net()
    optimizer = sf.MaskedAdamW(model.up.parameters())
    with pytest.raises(TypeError, match="complex32"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2).to(torch.complex32))]})
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group(list(model.down.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learning rate"):
        optimizer.add_param_group({"params": list(model.down.parameters()), "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, batches(1))


@pytest.mark.parametrize("change", ["lr", "weight_decay", "betas", "eps", "amsgrad", "maximize"])
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_settings_changed_between_steps_take_effect(ours: Any, stock: Any, change: str) -> None:
    values = {"lr": 0.1, "weight_decay": 0.5, "betas": (0.3, 0.5), "eps": 0.1, "amsgrad": False, "maximize": True}
    pair = Pair(ours, stock, amsgrad=change == "amsgrad", weight_decay=0.0)
    pair.train(2)
    for _, optimizer in pair:
        optimizer.param_groups[0][change] = values[change]
    pair.train(3, seed=2)
    pair.assert_close(f"after {change} changed")


@pytest.mark.parametrize("tensors", ["lr", "betas", "both"])
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_tensor_settings(ours: Any, stock: Any, tensors: str) -> None:
    arguments: dict[str, Any] = {}
    if tensors != "betas":
        arguments["lr"] = torch.tensor(0.01)
    if tensors != "lr":
        arguments["betas"] = (torch.tensor(0.8), torch.tensor(0.95))
    pair = Pair(ours, stock, **arguments)
    pair.train(3)
    if tensors != "betas":  # a tensor is changed in place
        for _, optimizer in pair:
            optimizer.param_groups[0]["lr"].fill_(0.1)
    pair.train(3, seed=2)
    pair.assert_close(tensors)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one_cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8),
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=8),
    "lambda": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1)),
    "plateau": lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=1e9),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_schedulers_drive_it(ours: Any, stock: Any, name: str) -> None:
    pair, rates = Pair(ours, stock, lr=0.05), []
    for model, optimizer in pair:
        scheduler = SCHEDULERS[name](optimizer)
        for batch in batches(8):
            train(model, optimizer, [batch])
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step(*([1.0] if name == "plateau" else []))
    assert rates[:8] == rates[8:] and len(set(rates)) > 1
    pair.assert_close(name)


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_closures_run_first_with_gradients_on_and_their_loss_is_returned(ours: Any, stock: Any) -> None:
    pair = Pair(ours, stock)
    (x, y), *_ = batches(1)
    for net, each in pair:

        def closure(net: nn.Module = net, each: Any = each) -> Tensor:
            assert torch.is_grad_enabled()
            each.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            return loss

        first = each.step(closure)
        assert isinstance(first, Tensor)
        with torch.no_grad():
            assert each.step(closure=closure) < first
    pair.assert_close("after two closures")
    assert pair.optimizer.step() is None


def test_hooks_run_once_each_in_order() -> None:
    model = Net()
    optimizer = sf.MaskedAdamW(model.parameters())
    calls: list[str] = []
    hooks = [f"{what}_{when}" for what in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")]
    for hook in hooks:
        getattr(optimizer, f"register_{hook}_hook")(lambda *_, hook=hook: calls.append(hook))
    train(model, optimizer, batches(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == hooks


def test_load_hooks_see_and_may_replace_what_is_loaded() -> None:
    model, optimizer = trained(2, freeze=PLAN)
    state = optimizer.state_dict()
    fresh = sf.MaskedAdamW(model.named_parameters(), freeze=PLAN)

    def five_steps(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        entries = {index: {**entry, "step": torch.tensor(5.0)} for index, entry in given["state"].items()}
        return {**given, "state": entries}

    seen: list[Any] = []
    fresh.register_load_state_dict_pre_hook(five_steps)
    fresh.register_load_state_dict_post_hook(lambda opt: seen.extend(opt.state[model.up.weight].values()))
    fresh.load_state_dict(state)
    assert fresh.state[model.up.weight]["step"].item() == 5.0
    assert all(isinstance(value, Tensor) for value in seen), "a hook saw something else than tensors"


def test_the_profiler_names_the_step() -> None:
    for kind in (sf.MaskedAdamW, sf.MaskedAdam):
        model = Net()
        optimizer = kind(model.parameters())
        with torch.autograd.profiler.profile() as profile:
            train(model, optimizer, batches(1))
        names = [event.name for event in profile.function_events if event.name.startswith("Optimizer.step#")]
        assert names == [f"Optimizer.step#{kind.__name__}.step"]


def test_zero_grad_and_repr_are_torchs() -> None:
    model, optimizer = trained(1, lr=0.25)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    expected = repr(torch.optim.AdamW(model.named_parameters(), lr=0.25)).replace("AdamW", "MaskedAdamW", 1)
    assert repr(optimizer) == expected


def test_the_example_of_its_docstring_runs() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(sf.MaskedAdamW, globs={})
    assert len(example.examples) == 9 and not doctest.DocTestRunner().run(example).failed


def test_an_optimizer_is_a_torch_optimizer() -> None:
    optimizer = sf.MaskedAdamW(Net().parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    group = torch.optim.AdamW(Net().parameters()).param_groups[0]
    assert len(group) == 12
    assert optimizer.param_groups[0].keys() == group.keys()
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        k: v for k, v in group.items() if k != "params"
    }
    assert sf.MaskedAdam(Net().parameters()).defaults == torch.optim.Adam(Net().parameters()).defaults


# ---------------------------------------------------------------------------------------------- copies and checkpoints


def test_state_can_be_saved_and_loaded_when_training_is_over() -> None:
    """``model.requires_grad_(False)`` before the last checkpoint is written must not lose it."""
    model, optimizer = trained(2, freeze=PLAN)
    before, dense = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.dense_state_dict())
    model.requires_grad_(False)
    assert_same_state(optimizer.state_dict(), before, "packed")
    assert_same_state(optimizer.dense_state_dict(), dense, "dense")
    optimizer.load_state_dict(before)
    assert_same_state(optimizer.state_dict(), before, "loaded")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_alone(how: str) -> None:
    model, optimizer = trained(3, lr=0.05, freeze=PLAN, state_dtype=torch.bfloat16)
    optimizer.set_freeze(sf.FreezePlan({"up.weight": sf.FreezeMask((8, 6), rows=[1])}))  # ages, too
    train(model, optimizer, batches(2))
    pair = (model, optimizer)
    twin, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert copied.plan == optimizer.plan
    before = copy.deepcopy(model)
    train(twin, copied, batches(3, seed=5))
    assert_same_weights(model, before, "the original moved with its copy")
    train(model, optimizer, batches(3, seed=5))
    assert_same_weights(twin, model, f"{how} against the original")
    assert_same_state(copied.state_dict(), optimizer.state_dict(), f"{how} against the original")


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_stock_goes_on_from_our_state_and_we_from_its(ours: Any, stock: Any, amsgrad: bool) -> None:
    arguments = {"lr": 0.02, "weight_decay": 0.1, "amsgrad": amsgrad}
    model, optimizer = trained(3, ours, **arguments)
    as_stock, as_ours = copy.deepcopy(model), copy.deepcopy(model)
    reference = stock(as_stock.parameters(), **arguments, **STOCK_IS_ONE_LOOP)
    reference.load_state_dict(saved(optimizer.state_dict()))
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    for group in reference.param_groups:  # loading takes the saved settings: forloop again
        group.update(STOCK_IS_ONE_LOOP)
    train(as_stock, reference, batches(3, seed=4))
    back = ours(as_ours.named_parameters(), **arguments)
    back.load_state_dict(saved(reference.state_dict()))
    assert_state_close(back, reference, "loaded from stock")
    as_ours.load_state_dict(as_stock.state_dict())
    train(as_ours, back, batches(3, seed=6))
    train(as_stock, reference, batches(3, seed=6))
    assert_close_weights(as_ours, as_stock, "to stock and back")


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_a_stock_checkpoint_is_packed_to_the_plan(ours: Any, stock: Any) -> None:
    other, reference = trained(3, stock, lr=0.02, **STOCK_IS_ONE_LOOP)
    model = copy.deepcopy(other)
    optimizer = ours(model.named_parameters(), lr=0.02, freeze=PLAN)
    optimizer.load_state_dict(saved(reference.state_dict()))
    assert optimizer.state[model.up.weight]["exp_avg"].shape == (5, 6)
    proof = sf.snapshot(model, PLAN)
    dense = optimizer.dense_state_dict()["state"]
    for index, (name, p) in enumerate(model.named_parameters()):
        frozen = PLAN[name].dense() if name in PLAN else torch.zeros(p.shape, dtype=torch.bool)
        for key in ("exp_avg", "exp_avg_sq"):
            expected = reference.state_dict()["state"][index][key].masked_fill(frozen, 0.0)
            assert_same_bits(dense[index][key], expected, f"{key} of {name!r}")
    train(model, optimizer, batches(2, seed=3))
    proof.verify(model)


@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_dense_state_goes_to_stock(ours: Any, stock: Any) -> None:
    """A frozen run finished without us: live elements go on as they would have."""
    model, optimizer = trained(3, ours, lr=0.02, freeze=PLAN)
    other = copy.deepcopy(model)
    reference = stock(other.parameters(), lr=0.02, **STOCK_IS_ONE_LOOP)
    reference.load_state_dict(saved(optimizer.dense_state_dict()))
    for group in reference.param_groups:
        group.update(STOCK_IS_ONE_LOOP)
    optimizer.zero_grad()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        p.grad = replay(8)(tuple(p.shape))
        q.grad = p.grad.clone()
        assert reference.state[q]["exp_avg"].shape == q.shape, name
    optimizer.step()
    reference.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        live = ~PLAN[name].dense() if name in PLAN else torch.ones(p.shape, dtype=torch.bool)
        torch.testing.assert_close(p[live], q[live], **CLOSE)


def test_old_checkpoints_lack_keys_and_count_steps_in_python_numbers() -> None:
    model, optimizer = trained(3, lr=0.02, weight_decay=0.1)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        flags = "maximize foreach capturable differentiable fused amsgrad decoupled_weight_decay"
        for key in (*flags.split(), "param_names"):
            del group[key]
    for entry in old["state"].values():
        entry["step"] = int(entry["step"].item())
    twin = copy.deepcopy(model)
    resumed = sf.MaskedAdamW(twin.named_parameters())
    resumed.load_state_dict(old)
    assert resumed.param_groups[0].keys() == optimizer.param_groups[0].keys()
    train(model, optimizer, batches(2, seed=3)), train(twin, resumed, batches(2, seed=3))
    assert_same_weights(twin, model, "from an old checkpoint")


def test_an_adam_checkpoint_stays_decoupled_in_adamw_as_in_torch() -> None:
    answers = []
    for kind, source in ((torch.optim.AdamW, torch.optim.Adam), (sf.MaskedAdamW, sf.MaskedAdam)):
        model, adam = trained(1, source)
        adamw = kind(model.parameters())
        adamw.load_state_dict(adam.state_dict())
        answers.append(adamw.param_groups[0]["decoupled_weight_decay"])
    assert answers == [True, True]


@pytest.mark.parametrize("changed", [False, True], ids=["one_plan", "after_set_freeze"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(backend: str, dtype: torch.dtype, changed: bool) -> None:
    def optimizer_for(model: nn.Module, plan: sf.FreezePlan) -> Any:
        return sf.MaskedAdamW(model.named_parameters(), lr=0.05, freeze=plan, amsgrad=True, backend=backend)

    later = sf.FreezePlan(
        {"up.weight": sf.FreezeMask((8, 6), rows=[2, 4]), "down.weight": sf.FreezeMask((3, 8), cols=[0])}
    )
    model = Net().to(dtype)
    data = [(x.to(dtype), y.to(dtype)) for x, y in batches(9)]
    optimizer = optimizer_for(model, PLAN)
    train(model, optimizer, data[:3])
    if changed:
        optimizer.set_freeze(later)
        train(model, optimizer, data[3:6])
    resumed_model = copy.deepcopy(model)
    checkpoint = saved(optimizer.state_dict())
    resumed = optimizer_for(resumed_model, later if changed else PLAN)
    resumed.load_state_dict(checkpoint)
    assert_same_state(resumed.state_dict(), optimizer.state_dict(), "right after loading")
    train(model, optimizer, data[6:]), train(resumed_model, resumed, data[6:])
    assert_same_weights(resumed_model, model, "resumed against uninterrupted")
    assert_same_state(resumed.state_dict(), optimizer.state_dict(), "resumed against uninterrupted")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_moments_keep_their_dtype_through_a_checkpoint(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """torch's loader casts them to the parameter's dtype."""
    model = Net().to(dtype)
    optimizer = sf.MaskedAdamW(model.named_parameters(), freeze=PLAN, state_dtype=state_dtype)
    train(model, optimizer, [(x.to(dtype), y.to(dtype)) for x, y in batches(1)])
    fresh = sf.MaskedAdamW(model.named_parameters(), freeze=PLAN, state_dtype=state_dtype)
    fresh.load_state_dict(saved(optimizer.state_dict()))
    kept = torch.uint8 if state_dtype == torch.int8 else state_dtype
    for entry in fresh.state.values():
        assert {key: value.dtype for key, value in entry.items()} == {
            "step": torch.float32, **dict.fromkeys(("exp_avg", "exp_avg_sq"), kept),
        }  # fmt: skip
    assert_same_state(fresh.state_dict(), optimizer.state_dict(), "loaded")


OTHER_PLANS = {
    "other_rows": sf.FreezePlan({**PLAN, "up.weight": sf.FreezeMask((8, 6), rows=[0, 4, 5])}),
    "more_rows": sf.FreezePlan({**PLAN, "up.weight": sf.FreezeMask((8, 6), rows=[1, 4, 5, 6])}),
    "other_elements": sf.FreezePlan({**PLAN, "down.weight": sf.FreezeMask((3, 8), cols=[1, 4, 5])}),
    "none": None,
}


@pytest.mark.parametrize("other", OTHER_PLANS)
def test_state_packed_under_another_plan_is_refused_and_nothing_changes(other: str) -> None:
    model, optimizer = trained(2, lr=0.3, freeze=PLAN)
    receiver = sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=OTHER_PLANS[other])
    train(model, receiver, batches(1))
    before = copy.deepcopy(receiver.state_dict())
    name = "down.weight" if other == "other_elements" else "up.weight"
    with pytest.raises(ValueError, match=name):
        receiver.load_state_dict(saved(optimizer.state_dict()))
    assert_same_state(receiver.state_dict(), before, "after a refused load")
    train(model, receiver, batches(1))


def with_gaps(moment: Tensor, mask: sf.FreezeMask) -> Tensor:
    """State of live rows × live columns, in which frozen single elements have a place: as earlier versions had it."""
    whole = torch.zeros(mask.shape, dtype=moment.dtype)
    whole[~mask.dense()] = moment
    return whole[torch.from_numpy(mask.live_rows)][:, torch.from_numpy(mask.live_cols)]


@pytest.mark.parametrize("how", ["state dict", "pickle"])
@pytest.mark.parametrize("master", [None, "remainder"])
def test_state_of_an_earlier_version_with_places_for_single_elements_is_read(how: str, master: str | None) -> None:
    model, name = Net().bfloat16(), "down.weight"
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.3, freeze=PLAN, master=master)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    expected, mask = copy.deepcopy(optimizer.state_dict()), PLAN[name]
    entry = optimizer.state[model.down.weight]
    assert entry["exp_avg"].shape == (mask.live_count,)
    entry.update({key: with_gaps(value, mask) for key, value in entry.items() if key != "step"})
    assert entry["exp_avg"].shape == (3, 5)
    if how == "pickle":
        fresh = pickle.loads(pickle.dumps(optimizer))
    else:
        fresh = sf.MaskedAdamW(model.named_parameters(), lr=0.3, freeze=PLAN, master=master)
        fresh.load_state_dict(saved(optimizer.state_dict()))
    assert_same_state(fresh.state_dict(), expected, how)


def later_version(state: dict[str, Any]) -> None:
    group = state["param_groups"][0]
    group["freeze"] = group["freeze"].replace('"version": 1', '"version": 99')


SPOILT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "groups": lambda state: state.update(param_groups=state["param_groups"] * 2),
    "size": lambda state: state["param_groups"][0]["params"].pop(),
    "shape": lambda state: state["state"][0].update(exp_avg=torch.zeros(2, 2)),
    "version": later_version,
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(what: str) -> None:
    model, optimizer = trained(2, freeze=PLAN)
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(state)
    SPOILT[what](state)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)
    assert_same_state(optimizer.state_dict(), before, "after a refused load")
    train(model, optimizer, batches(1))


def test_names_in_a_checkpoint_do_not_move_the_plan() -> None:
    """torch's loader takes the names a checkpoint carries; a plan freezes by name. A checkpoint of a wrapped model, or
    one whose parameters were listed in another order, must not make the plan freeze something else."""
    draw = replay(9)
    start = {"a": draw((4, 3)), "b": draw((4, 3))}
    plan = sf.FreezePlan({"a": sf.FreezeMask((4, 3), rows=[0, 1])})
    other = sf.MaskedAdamW([(name, nn.Parameter(start[name].clone())) for name in ("b", "a")], freeze=None)
    for group in other.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    other.step()
    checkpoint = saved(other.state_dict())
    params = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = sf.MaskedAdamW(params.items(), lr=0.1, freeze=plan)
    optimizer.load_state_dict(checkpoint)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b"]
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {name: (p.detach() != start[name]).any(1).tolist() for name, p in params.items()}
    assert moved == {"a": [False, False, True, True], "b": [True, True, True, True]}
    wrapped = copy.deepcopy(checkpoint)
    wrapped["param_groups"][0]["param_names"] = ["module.a", "module.b"]
    optimizer.load_state_dict(wrapped)
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["a", "b"]


# ------------------------------------------------------------------------------------------ what users do to the state


@pytest.mark.parametrize("how", ["clear", "replace", "delete_one"])
def test_a_state_that_was_thrown_away_starts_again(how: str) -> None:
    model, optimizer = trained(3, lr=0.05)
    other = copy.deepcopy(model)
    reference = sf.MaskedAdamW(other.parameters(), lr=0.05)
    if how == "delete_one":
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        del optimizer.state[model.up.weight]
        reference.state[other.up.weight] = {}
    elif how == "clear":
        optimizer.state.clear()
    else:
        optimizer.state = defaultdict(dict)
    train(model, optimizer, batches(2, seed=3)), train(other, reference, batches(2, seed=3))
    assert_same_weights(model, other, f"after {how}")
    assert optimizer.state[model.up.weight]["step"].item() == 2.0


# as by hand, and as offloading code brings moments back
ZEROED: dict[str, Callable[[Tensor], Any]] = {
    "in place": Tensor.zero_,
    "through data": lambda value: setattr(value, "data", torch.zeros_like(value)),
}


@pytest.mark.parametrize("how", ZEROED)
def test_moments_and_steps_edited_or_replaced_count(how: str) -> None:
    model, optimizer = trained(3, lr=0.05)
    other = copy.deepcopy(model)
    for entry in optimizer.state.values():
        for value in entry.values():
            ZEROED[how](value)
    train(model, optimizer, batches(2, seed=3))
    train(other, sf.MaskedAdamW(other.parameters(), lr=0.05), batches(2, seed=3))
    assert_same_weights(model, other, f"moments zeroed {how}")
    assert all(entry["exp_avg"].any() for entry in optimizer.state.values())


SPOILT_MOMENTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    # in a wider memory: a walk past its end breaks nothing else
    "wrong_shape": lambda state: state.update(exp_avg=torch.zeros(1000)[:4].view(2, 2)),
    "wrong_dtype": lambda state: state.update(exp_avg_sq=state["exp_avg_sq"].double()),
    "mixed_dtypes": lambda state: state.update(exp_avg=state["exp_avg"].bfloat16()),
    "wrong_layout": lambda state: state.update(exp_avg=state["exp_avg"].t().contiguous().t()),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", SPOILT_MOMENTS)
def test_moments_put_there_by_hand_are_checked(what: str, backend: str) -> None:
    """Kernels take addresses: a moment that does not fit must be an error (or made to fit), never read as it lies."""
    model, optimizer = trained(2, lr=0.05, backend=backend)
    other, reference = copy.deepcopy((model, optimizer))
    SPOILT_MOMENTS[what](optimizer.state[model.up.weight])
    try:
        train(model, optimizer, batches(1, seed=3))
    except (ValueError, TypeError) as error:
        assert "up.weight" in str(error)
        return
    assert what != "wrong_shape"
    train(other, reference, batches(1, seed=3))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):  # moments may have been rounded to bfloat16
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


# ----------------------------------------------------------------------------------------------- gradient scaling


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_grad_scaler(ours: Any, stock: Any, fused: bool) -> None:
    """A power-of-two scale is exact, so the scaled run is the plain one; an overflow skips a step, halves the scale."""
    model, other = Net(), Net()
    optimizer = ours(model.named_parameters(), lr=0.05, fused=fused or None)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is fused
    reference = stock(other.parameters(), lr=0.05, **STOCK_IS_ONE_LOOP)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, (x, y) in enumerate(batches(6)):
        optimizer.zero_grad()
        scaler.scale((model(x) - y).square().mean()).backward()
        if step == 3:
            model.up.bias.grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if step != 3:
            train(other, reference, [(x, y)])
        assert not hasattr(optimizer, "grad_scale")
    assert scaler.get_scale() == 2.0**9
    assert_close_weights(model, other, "scaled against plain")
    assert optimizer.state[model.up.weight]["step"].item() == 5.0


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_grad_scaler_takes_the_step_once_frozen_gradients_are_zeroed(fused: bool) -> None:
    """The scaler looks for infinities in whole gradients, frozen parts included, before any optimizer is asked."""
    model = Net()
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.05, freeze=PLAN, fused=fused or None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    (x, y), *_ = batches(1)
    scaler.scale((model(x) - y).square().mean()).backward()
    model.up.weight.grad[1] = math.inf
    sf.zero_frozen_grads_(model, PLAN)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert optimizer.state[model.up.weight]["step"].item() == 1.0


def test_grad_scaler_with_clipping_between() -> None:
    model, other = Net(), Net()
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.05, fused=True)
    reference = torch.optim.AdamW(other.parameters(), lr=0.05, **STOCK_IS_ONE_LOOP)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x, y in batches(4):
        optimizer.zero_grad(), reference.zero_grad()
        scaler.scale((model(x) - y).square().mean()).backward()
        scaler.unscale_(optimizer)
        sf.clip_grad_norm_(model, 0.1)
        scaler.step(optimizer)
        scaler.update()
        (other(x) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        reference.step()
    assert_close_weights(model, other, "scaled and clipped")


def test_a_preset_scale_clips_in_the_step() -> None:
    """``grad_scale = 1 / coefficient`` folds clipping into the step."""
    pair = Pair(lr=0.05)
    for p, q in zip(pair.model.parameters(), pair.other.parameters(), strict=True):
        p.grad = replay(3)(tuple(p.shape))
        q.grad = p.grad * 0.25
    pair.optimizer.grad_scale = torch.tensor(4.0)
    for _, optimizer in pair:
        optimizer.step()
    pair.assert_same("scale of 4")


# ---------------------------------------------------------------------------------------------- gradients that are None


@pytest.mark.parametrize("plan", [None, PLAN], ids=["no_plan", "plan"])
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_gradients_that_never_come_come_later_or_stop(ours: Any, stock: Any, plan: Any) -> None:
    present = {  # at which of the steps each parameter has a gradient
        "scale": (), "up.weight": (0, 1, 2, 3, 4, 5), "up.bias": (3, 4, 5), "down.weight": (0, 1), "down.bias": (1, 4),
    }  # fmt: skip
    model, other = Net(), Net()
    start = copy.deepcopy(model)
    optimizer = ours(model.named_parameters(), lr=0.05, freeze=plan)
    reference = stock(other.parameters(), lr=0.05, **STOCK_IS_ONE_LOOP)
    draw = replay(5)
    for step in range(6):
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            grad = draw(tuple(p.shape))
            p.grad = grad if step in present[name] else None
            q.grad = None if p.grad is None else grad.clone()
        optimizer.step()
        reference.step()
    for (name, p), q, old in zip(model.named_parameters(), other.parameters(), start.parameters(), strict=True):
        live = ~plan[name].dense() if plan and name in plan else torch.ones(p.shape, dtype=torch.bool)
        torch.testing.assert_close(p[live], q[live], **CLOSE)
        assert_same_bits(p.detach(), old.detach(), f"frozen part of {name!r}", where=~live)
        steps = optimizer.state[p]["step"].item() if optimizer.state.get(p) else 0
        assert steps == len(present[name]), name
    assert not optimizer.state.get(model.scale), "state for a parameter that never had a gradient"


def test_a_first_step_without_any_gradient_does_not_stop_later_ones() -> None:
    """Some schedulers' warm-ups call ``step()`` before the first backward."""
    pair = Pair(lr=0.05)
    pair.optimizer.step()
    pair.optimizer.step()
    pair.train(2)
    pair.assert_same("two empty steps first")
    assert (pair.model.up.weight != Net().up.weight).any()


def test_a_step_with_zero_gradients_and_no_learning_rate_moves_nothing() -> None:
    """How distributed checkpointing makes an optimizer create its state."""
    model = Net()
    model.up.weight.data[0, 0] = -0.0
    before = copy.deepcopy(model)
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.0, weight_decay=0.1, freeze=PLAN)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_weights(model, before, "after a step that should only create state")
    assert all("exp_avg" in optimizer.state[p] for p in model.parameters())


# ------------------------------------------------------------------------------------------- shapes, strides, storage


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (1, 1, 1), (2, 0, 2)], ids=str)
def test_tensors_of_no_and_of_one_element(shape: tuple[int, ...], backend: str) -> None:
    ours, theirs = (nn.Parameter(torch.full(shape, 0.5)) for _ in range(2))
    frozen = nn.Parameter(torch.full(shape, 0.5))
    n_rows = math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)
    plan = sf.FreezePlan({"frozen": sf.FreezeMask(shape, rows=range(n_rows))})
    optimizer = sf.MaskedAdamW([("w", ours), ("frozen", frozen)], lr=0.1, freeze=plan, backend=backend)
    reference = torch.optim.AdamW([theirs], lr=0.1, **STOCK_IS_ONE_LOOP)
    for _ in range(2):
        for p in (ours, theirs, frozen):
            p.grad = torch.ones(shape)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert_same_bits(frozen.detach(), torch.full(shape, 0.5), "frozen")
    assert optimizer.state[ours]["exp_avg"].shape == shape
    fresh = sf.MaskedAdamW([("w", ours), ("frozen", frozen)], freeze=plan)
    fresh.load_state_dict(saved(optimizer.state_dict()))
    assert_same_state(fresh.state_dict(), optimizer.state_dict(), "loaded")
    optimizer.set_freeze(None)
    optimizer.step()


# name -> (a parameter's values made from a contiguous tensor of 4 x 3 x 2 x 6 elements)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.reshape(24, 6).t(),
    "sliced_columns": lambda t: t.reshape(24, 6)[:, 1:4],
    "every_other_row": lambda t: t.reshape(24, 6)[::2],
    "last_of_three": lambda t: t.reshape(48, 3)[..., 2],
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(2, 0, 3, 1),
}


@pytest.mark.parametrize("of", ["param", "grad", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, backend: str, of: str) -> None:
    """torch's fused CPU AdamW is silently wrong here: it writes neighbours and mixes strides up."""
    draw = replay(6)
    storage = draw((4, 3, 2, 6))
    view = LAYOUTS[layout](storage.clone())
    if of == "grad":
        view = view.contiguous()
    param = nn.Parameter(view)
    assert param.is_contiguous() == (of == "grad")
    neighbours = param.detach().untyped_storage()
    before = torch.tensor([], dtype=torch.float32).set_(neighbours).clone()
    theirs = nn.Parameter(param.detach().clone())
    matrix_rows = param.numel() // param.shape[-1] if param.dim() > 1 else param.numel()
    mask = sf.FreezeMask(param.shape, rows=range(0, matrix_rows, 3))
    old = param.detach().clone()
    optimizer = sf.MaskedAdamW([("w", param)], lr=0.1, freeze=sf.FreezePlan({"w": mask}), backend=backend)
    reference = torch.optim.AdamW([theirs], lr=0.1, **STOCK_IS_ONE_LOOP)
    for _ in range(3):
        grad = LAYOUTS[layout](draw((4, 3, 2, 6)))
        param.grad = grad if of != "param" else grad.contiguous()
        theirs.grad = grad.clone()
        optimizer.step()
        reference.step()
    live = ~mask.dense()
    torch.testing.assert_close(param[live], theirs[live], **CLOSE)
    assert_same_bits(param.detach(), old, "frozen rows", where=~live)
    # memory the parameter does not cover
    after = torch.tensor([], dtype=torch.float32).set_(neighbours)
    covered = torch.zeros_like(before)
    covered.as_strided(param.shape, param.stride(), param.storage_offset()).fill_(1.0)
    assert_same_bits(after, before, "storage around the parameter", where=covered == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradients(backend: str) -> None:
    grads = (torch.tensor(2.0).expand(4, 3), torch.tensor([1.0, 2.0, 3.0]).expand(4, 3))
    against_stock(torch.ones(4, 3), grads, backend=backend)


@pytest.mark.parametrize(
    "overlapping",
    [torch.zeros(3).expand(4, 3), torch.zeros(2, 100)[:, :1].expand(2, 3), torch.zeros(9).unfold(0, 3, 1)],
    ids=["expanded_rows", "expanded_columns", "sliding_window"],
)
def test_parameters_that_overlap_themselves_are_refused(overlapping: Tensor) -> None:
    with pytest.raises(TypeError, match="overlaps itself"):
        sf.MaskedAdamW([nn.Parameter(overlapping)])


REPLACED: dict[str, Callable[[Tensor], Tensor]] = {
    "by a copy": torch.clone,
    "by transposed memory": lambda t: t.t().contiguous().t(),
    "by a view": lambda t: t.clone().as_strided(t.shape, t.stride()),
}


@pytest.mark.parametrize("how", REPLACED)
def test_parameters_may_be_replaced_through_data(how: str) -> None:
    pair = Pair(lr=0.05, freeze=PLAN)
    pair.train(3)
    weight = pair.model.down.weight if how == "by a view" else pair.model.up.weight
    weight.data = REPLACED[how](weight.data)
    pair.train(3, seed=2)
    pair.assert_close(how)  # a product of transposed memory is rounded otherwise


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_strides_over_the_same_memory_are_noticed(backend: str) -> None:
    """A square weight transposed in place keeps its address, its shape and its number of elements."""
    draw = replay(4)
    start, grads = draw((6, 6)), [draw((6, 6)) for _ in range(2)]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = sf.MaskedAdamW([ours], lr=0.1, backend=backend)
    reference = torch.optim.AdamW([theirs], lr=0.1, **STOCK_IS_ONE_LOOP)
    for step, grad in enumerate(grads):
        if step:
            ours.data, theirs.data = ours.data.t(), theirs.data.t()
        ours.grad, theirs.grad = grad, grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("size", [2, 12], ids=["cut", "grown"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_of_another_size_is_an_error_not_a_walk_past_its_end(backend: str, size: int) -> None:
    """A vocabulary cut to size keeps its address: kernels must not go on with the old shape."""

    def memory(value: float) -> Tensor:
        return torch.full((12, 4), value)  # wider than any of the tensors: a walk past their ends is seen, not fatal

    weights, moments = memory(1.0), {"exp_avg": memory(0.0), "exp_avg_sq": memory(0.0)}
    param = nn.Parameter(weights[:8])
    optimizer = sf.MaskedAdamW([("embed.weight", param)], lr=0.1, backend=backend)
    param.grad = memory(1.0)[:8]
    optimizer.step()
    for key, wide in moments.items():
        wide[:8] = optimizer.state[param][key]
        optimizer.state[param][key] = wide[:8]
    optimizer.step()
    param.grad = None
    param.data = weights[:size]
    param.grad = memory(1.0)[:size]
    before = {"weights": weights.clone(), **{key: wide.clone() for key, wide in moments.items()}}
    with pytest.raises((ValueError, RuntimeError), match=r"embed\.weight"):
        optimizer.step()
    for key, wide in {"weights": weights, **moments}.items():
        assert_same_bits(wide, before[key], f"{key} and the memory around it")


@pytest.mark.parametrize("first", ["up", "down"])
def test_tied_weights_train_once_under_either_name(first: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.up.weight.data = replay(2)((4, 4))
            self.down.weight = self.up.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(x)))

    model, other = Tied(), Tied()
    named = list(model.named_parameters(remove_duplicate=False))
    optimizer = sf.MaskedAdamW(named if first == "up" else named[::-1], lr=0.05)
    assert len(optimizer.param_groups[0]["params"]) == 1
    reference = torch.optim.AdamW(other.parameters(), lr=0.05, **STOCK_IS_ONE_LOOP)
    draw = replay(3)
    data = [(draw((5, 4)), draw((5, 4))) for _ in range(3)]
    train(model, optimizer, data), train(other, reference, data)
    assert_close_weights(model, other, "tied")
    for name in ("up.weight", "down.weight"):
        optimizer.set_freeze(sf.FreezePlan({name: sf.FreezeMask((4, 4), rows=[2])}))
        before = model.up.weight.detach().clone()
        train(model, optimizer, data)
        assert (model.up.weight != before).any(1).tolist() == [True, True, False, True], name
        copied = copy.deepcopy(optimizer)  # aliases, too
        copied.set_freeze(sf.FreezePlan({"down.weight": sf.FreezeMask((4, 4), rows=[1])}))


# ------------------------------------------------------------------------------------- float64, complex, and the rest


class Parameters(nn.Module):
    """Parameters of the shapes of `Net`, each of its own dtype."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        draw = replay(21)
        for i, (name, p) in enumerate(Net().named_parameters()):
            value = nn.Parameter(draw(tuple(p.shape), dtypes[i % len(dtypes)]))
            self.register_parameter(name.replace(".", "_"), value)

    def take_gradients(self, seed: int) -> None:
        draw = replay(seed)
        for p in self.parameters():
            p.grad = draw(tuple(p.shape), p.dtype)


WIDE_PLAN = sf.FreezePlan({name.replace(".", "_"): mask for name, mask in PLAN.items()})
ALL_KINDS = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True, "maximize": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in WIDE), ALL_KINDS], ids=lambda d: "+".join(map(short, d)))
@pytest.mark.parametrize(("ours", "stock"), PAIRS)
def test_float64_and_complex_parameters_train_as_in_torch(
    ours: Any, stock: Any, dtypes: tuple[torch.dtype, ...], arguments: dict[str, Any]
) -> None:
    model, other = Parameters(*dtypes), Parameters(*dtypes)
    on_device = {key: arguments[key] for key in arguments if key != "capturable"}  # stock's takes no CPU tensors
    settings = {"lr": 0.1, "weight_decay": 0.1}
    optimizer = ours(model.named_parameters(), **settings, **arguments)
    reference = stock(other.parameters(), **settings, **on_device, **STOCK_IS_ONE_LOOP)
    for step in range(4):
        model.take_gradients(step), other.take_gradients(step)
        optimizer.step(), reference.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        close = {"rtol": 1e-13, "atol": 1e-14} if p.dtype in (torch.float64, torch.complex128) else CLOSE
        torch.testing.assert_close(p, q, **close, msg=lambda text, name=name: f"{name}: {text}")
        for key, value in reference.state[q].items():
            assert optimizer.state[p][key].dtype == value.dtype, (name, key)
            torch.testing.assert_close(optimizer.state[p][key], value, **close)


@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in WIDE), ALL_KINDS], ids=lambda d: "+".join(map(short, d)))
def test_float64_and_complex_state_travels(dtypes: tuple[torch.dtype, ...]) -> None:
    """Through files, packed, to stock and back, copied, and thawed on the way."""

    def optimizer_for(model: nn.Module) -> Any:
        return sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=WIDE_PLAN)

    model = Parameters(*dtypes)
    proof, optimizer = sf.snapshot(model, WIDE_PLAN), optimizer_for(model)
    for step in range(2):
        model.take_gradients(step)
        optimizer.step()
    proof.verify(model)
    up = optimizer.state[model.up_weight]["exp_avg"]
    assert up.shape == (5, 6) and up.dtype == model.up_weight.dtype
    reference = torch.optim.AdamW(copy.deepcopy(model).parameters(), lr=0.1, **STOCK_IS_ONE_LOOP)
    reference.load_state_dict(saved(optimizer.dense_state_dict()))
    for state in (optimizer.state_dict(), optimizer.dense_state_dict(), reference.state_dict()):
        twin = copy.deepcopy(model)
        resumed = optimizer_for(twin)
        resumed.load_state_dict(saved(state))
        assert_same_state(resumed.state_dict()["state"], optimizer.state_dict()["state"], "loaded")
    twin, resumed = copy.deepcopy((model, optimizer))
    for each, net in ((optimizer, model), (resumed, twin)):
        net.take_gradients(5)
        each.step()
        each.set_freeze(sf.FreezePlan({"up_weight": sf.FreezeMask((8, 6), rows=[4], cols=[0])}))
        net.take_gradients(6)
        each.step()
    assert_same_weights(model, twin, "copied")


def test_float64_arithmetic_is_said_to_be_slow_once() -> None:
    from safefreeze_kernels.kernels.backend import _warn_once

    _warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"'reference' backend for float64, which no compiled kernel takes") as said:
        for _ in range(2):
            sf.MaskedAdamW([nn.Parameter(torch.ones(2, dtype=torch.float64))])
    assert len(said) == 1


def test_masters_are_given_for_what_float32_holds() -> None:
    model = Parameters(torch.bfloat16, *ALL_KINDS)
    quantised = nn.Parameter(torch.arange(6, dtype=torch.uint8), requires_grad=False)
    optimizer = sf.MaskedAdamW([*model.named_parameters(), ("q", quantised)], master="remainder")
    model.take_gradients(1)
    optimizer.step()
    weights = optimizer.master_weights()
    for name, p in model.named_parameters():
        assert weights[name].dtype == (torch.float32 if p.dtype == torch.bfloat16 else p.dtype)
    assert_same_bits(weights["q"], quantised.detach(), "a quantised weight")


@pytest.mark.parametrize("how", ["conjugate", "conjugate_gradient"])
def test_lazily_conjugate_tensors(how: str) -> None:
    """Autograd may hand out complex numbers whose memory holds their conjugates."""
    draw = replay(23)
    start, grad = draw((4, 3), torch.complex64), draw((4, 3), torch.complex64)
    results = []
    for kind in (sf.MaskedAdamW, torch.optim.AdamW):
        p = nn.Parameter(start.clone().conj() if how == "conjugate" else start.clone())
        assert p.is_conj() == (how == "conjugate")
        p.grad = grad.clone() if how == "conjugate" else grad.clone().conj()
        if kind is torch.optim.AdamW:  # which cannot take such
            p, given = nn.Parameter(p.detach().resolve_conj()), p.grad.resolve_conj()
            p.grad = given
        optimizer = kind([p], lr=0.1)
        optimizer.step(), optimizer.step()
        results.append(p.detach().resolve_conj())
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_only_noted_to_be_negated(backend: str) -> None:
    """Of the imaginary part of a conjugate, autograd keeps the memory and notes the sign."""
    ours, theirs = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    optimizer = sf.MaskedAdamW([ours], lr=0.1, backend=backend)
    reference = torch.optim.AdamW([theirs], lr=0.1, **STOCK_IS_ONE_LOOP)
    for _ in range(2):
        for p, each in ((ours, optimizer), (theirs, reference)):
            each.zero_grad()
            z = torch.complex(torch.tensor(1.0), p).conj() * torch.complex(torch.tensor(1.0), torch.tensor(2.0))
            z.real.backward()
            assert p.grad.is_neg()
            if each is optimizer:
                sf.clip_grad_norm_({"p": p}, 1.0, backend=backend)
            else:  # torch clips no such gradient
                p.grad = p.grad.resolve_neg().clamp(max=1.0)
            each.step()
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_parameter_that_is_only_noted_to_be_negated() -> None:
    imaginary = torch.complex(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).conj().imag
    ours, theirs = nn.Parameter(imaginary), nn.Parameter(imaginary.resolve_neg().clone())
    assert ours.is_neg() and ours[0] == -1.0
    for p, kind in ((ours, sf.MaskedAdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind([p], lr=0.1)
        p.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step(), optimizer.step()
    torch.testing.assert_close(ours.detach().resolve_neg(), theirs.detach(), **CLOSE)


def test_all_parameters_of_a_quantised_model_may_be_passed() -> None:
    """As code for stock AdamW passes them: packed 4-bit weights, scales and indices do not train."""
    model = nn.Module()
    model.adapter = nn.Parameter(replay(3)((6, 4)))
    plan = sf.FreezePlan({"adapter": sf.FreezeMask((6, 4), rows=[1])})
    others = {
        "packed": torch.arange(24, dtype=torch.uint8), "scales": torch.ones(3, dtype=torch.float64),
        "order": torch.arange(5), "low": torch.ones(4).to(torch.float8_e4m3fn), "sparse": torch.eye(3).to_sparse(),
        "spread": torch.ones(1, 4).expand(6, 4),
    }  # fmt: skip
    for name, value in others.items():
        model.register_parameter(name, nn.Parameter(value, requires_grad=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is slow: what does not train is not looked at
        optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=plan, backend=BACKENDS[-1])
    guard = sf.guard(torch.optim.SGD([model.adapter], lr=0.1), plan, model)
    proof = sf.snapshot(model, plan)
    for step in range(3):
        model.adapter.grad = replay(step)((6, 4))
        sf.zero_frozen_grads_(model, plan)
        sf.clip_grad_norm_(model, 1.0, optimizer=optimizer)
        optimizer.step()
    proof.verify(model)
    guard.remove()
    fresh = sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=plan)
    fresh.load_state_dict(saved(optimizer.state_dict()))
    assert_same_state(fresh.state_dict()["state"], optimizer.state_dict()["state"], "loaded")
    assert list(optimizer.dense_state_dict()["state"]) == [0]
    optimizer.set_freeze(None)
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.arange(3), requires_grad=False))]})
    model.scales.requires_grad_().grad = torch.ones(3, dtype=torch.float64)
    fresh.step()
    assert (model.scales < 1.0).all(), "what began to train later"


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=short)
def test_torchs_default_dtype_changes_nothing(default: torch.dtype) -> None:
    results = []
    for dtype in (torch.float32, default):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = Parameters(*ALL_KINDS)
            optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=WIDE_PLAN, amsgrad=True)
            for step in range(3):
                model.take_gradients(step)
                sf.clip_grad_norm_(model, 1.0, WIDE_PLAN)
                optimizer.step()
        finally:
            torch.set_default_dtype(before)
        results.append(model)
    assert_same_weights(*results, f"{default} as default")


def test_gradients_are_not_written_to() -> None:
    model = Parameters(*ALL_KINDS)
    optimizer = sf.MaskedAdamW(model.named_parameters(), weight_decay=0.1, maximize=True)
    model.take_gradients(1)
    before = [(p.grad, p.grad.clone(), p.grad._version) for p in model.parameters()]
    optimizer.step(), optimizer.step()
    for (grad, value, version), p in zip(before, model.parameters(), strict=True):
        assert p.grad is grad and grad._version == version
        assert_same_bits(grad, value, "gradient")


# ------------------------------------------------------------------------------------------------------------- autograd


def test_the_step_bumps_version_counters_as_torch_does() -> None:
    counts = []
    for kind in (sf.MaskedAdamW, torch.optim.AdamW):
        model, optimizer = trained(1, kind)
        before = {name: p._version for name, p in model.named_parameters()}
        model.scale.grad = None
        optimizer.step()
        counts.append({name: p._version > before[name] for name, p in model.named_parameters()})
    ours, stock = counts
    assert ours == stock
    assert ours["up.weight"]
    assert not ours["scale"], "a parameter without a gradient was not written"


def test_autograd_notices_that_a_saved_weight_was_stepped() -> None:
    model = Net()
    optimizer = sf.MaskedAdamW(model.parameters(), lr=0.1)
    (x, y), *_ = batches(1)
    loss = (model(x.requires_grad_()) - y).square().mean()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_steps_under_every_grad_mode(mode: Any) -> None:
    pair = Pair(lr=0.05, freeze=PLAN)
    for x, y in batches(3):
        for net, each in pair:
            each.zero_grad()
            (net(x) - y).square().mean().backward()
        with mode():
            pair.optimizer.step()
        pair.reference.step()
    pair.assert_same(mode.__name__)
    assert all(p.requires_grad for p in pair.model.parameters())


# --------------------------------------------------------------------------------------------------- what it refuses


def meta_layer() -> nn.Linear:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


def odd(value: Tensor) -> list[tuple[str, Tensor]]:
    return [*Net().named_parameters(), ("odd", nn.Parameter(value))]


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "complex32": (lambda: sf.MaskedAdamW(odd(torch.ones(2, 2).to(torch.complex32))), TypeError, "complex32.*float32"),
    "float8": (lambda: sf.MaskedAdamW(odd(torch.ones(2, 2).to(torch.float8_e4m3fn))), TypeError,
               "float8_e4m3fn.*float32"),
    "sparse": (lambda: sf.MaskedAdamW(odd(torch.eye(3).to_sparse())), TypeError, "sparse"),
    "meta": (lambda: sf.MaskedAdamW(meta_layer().named_parameters()).step(), ValueError, "weight.*meta"),
    "meta, fused": (lambda: sf.MaskedAdamW(meta_layer().parameters(), fused=True).step(), RuntimeError,
                    "`fused=True` requires all the params to be floating point Tensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_kernels_do_not_take_is_refused(what: str) -> None:
    run, kind, match = REFUSED[what]
    with pytest.raises(kind, match=match):
        run()


def test_a_parameter_that_changed_to_another_dtype_is_refused_by_name() -> None:
    model, optimizer = trained(1)
    model.double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"'scale'.*float64"):
        optimizer.step()


def test_sparse_gradients_are_refused_by_name() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = sf.MaskedAdamW([("embed.weight", embedding.weight)])
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"embed\.weight.*sparse"):
        optimizer.step()
    assert_same_bits(embedding.weight.detach(), before, "embedding")
    assert not optimizer.state_dict()["state"]


def test_a_model_can_be_materialised_after_the_optimizer_was_made() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    plan = sf.FreezePlan({"weight": sf.FreezeMask((4, 4), rows=[1])})
    model = model.to_empty(device="cpu")
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.1, freeze=plan)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert (model.weight != 1.0).any(1).tolist() == [True, False, True, True]
