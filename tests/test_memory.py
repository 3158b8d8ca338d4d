"""`memory_plan` and `fit` predict, to the byte, what tensors training then holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from model_folders import fails, run, save_model
from steps import take_step
from torch import nn
from trainer_run import VOCABULARY, model, plan

import safefreeze_kernels as sf
from safefreeze_kernels.measure.fit import STATES, Held, Setting, fit
from safefreeze_kernels.model.packed import stored

OPTIONS: Final[list[dict[str, Any]]] = [
    {},
    {"amsgrad": True},
    {"state_dtype": torch.bfloat16},
    {"state_dtype": torch.int8, "amsgrad": True, "dtype": torch.bfloat16},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float64, "state_dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "master": "remainder"},
    {"keep_state": True},
    {"keep_state": True, "dtype": torch.bfloat16, "master": "remainder", "amsgrad": True},
    {"storage": "packed"},
    {"storage": "packed", "dtype": torch.bfloat16, "master": "remainder"},
]


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("freeze", [None, plan()], ids=["nothing", "plan"])
def test_it_is_what_training_holds(options: dict[str, Any], freeze: sf.FreezePlan | None) -> None:
    predicted = sf.memory_plan(model(), freeze, **options).masked["cpu"]
    dtype = options.get("dtype", torch.float32)
    net = model().to(dtype)
    net.model.embed_tokens.weight.data = net.model.embed_tokens.weight.data.clone()
    rest = {key: value for key, value in options.items() if key not in ("dtype", "storage", "keep_state")}
    if options.get("storage") and freeze is not None:
        sf.live_gradients(net, freeze, storage="packed")
    optimizer = sf.MaskedAdamW(net.named_parameters(), freeze=freeze, **rest)
    if "keep_state" in options:
        optimizer.set_freeze(freeze, keep_state=True)
    tokens = torch.randint(0, VOCABULARY, (2, 8))
    net(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    held = [(key, value) for entry in optimizer.state.values() for key, value in entry.items()]
    grads = stored([p.grad for p in net.parameters()])
    assert predicted.gradients == size(grads)
    packed = any(grad.shape != p.shape for grad, p in zip(grads, net.parameters(), strict=True))
    assert packed == ("storage" in options and freeze is not None)
    assert predicted.state == size(value for key, value in held if key != "master_remainder")
    assert predicted.masters == size(value for key, value in held if key == "master_remainder")
    buffers = size(b for b in model().buffers())  # rotary frequencies stay float32
    assert predicted.parameters == size(net.parameters()) + buffers


def test_a_fifth_of_the_bytes_at_80_percent() -> None:
    """Gradient, state and masters of packed gradients, against AdamW with float32 state (and masters)."""
    net = nn.Linear(40, 100, bias=False)
    freeze = sf.FreezePlan({"weight": sf.FreezeMask((100, 40), rows=range(80))})
    step = 4
    for dtype, master, stock_bytes in ((torch.float32, None, 4 + 8), (torch.bfloat16, "remainder", 2 + 8 + 4)):
        held = sf.memory_plan(net, freeze, dtype=dtype, master=master, storage="packed").masked["cpu"]
        assert held.gradients + held.state + held.masters - step <= 0.2 * stock_bytes * 4000


def test_complex_moments_are_counted_as_they_are_held() -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.ones(6, 4, dtype=torch.complex64))
    freeze = sf.FreezePlan({"weight": sf.FreezeMask((6, 4), rows=[0])})
    optimizer = sf.MaskedAdamW(net.named_parameters(), freeze=freeze)
    net.weight.grad = torch.ones_like(net.weight)
    optimizer.step()
    assert sf.memory_plan(net, freeze).masked["cpu"].state == size(optimizer.state[net.weight].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_single_elements_have_no_state(dtype: torch.dtype) -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.ones(6, 4, dtype=dtype))
    freeze = sf.FreezePlan({"weight": sf.FreezeMask((6, 4), rows=[0], elements=torch.eye(6, 4, dtype=torch.bool))})
    master = "remainder" if dtype == torch.bfloat16 else None
    optimizer = sf.MaskedAdamW(net.named_parameters(), freeze=freeze, master=master)
    net.weight.grad = torch.ones_like(net.weight)
    optimizer.step()
    held = sf.memory_plan(net, freeze, master=master).masked["cpu"]
    assert held.state + held.masters == size(optimizer.state[net.weight].values())
    assert optimizer.state[net.weight]["exp_avg"].numel() == 24 - 4 - 3


def test_stock_is_what_torch_holds() -> None:
    net = model()
    predicted = sf.memory_plan(net).stock["cpu"]
    optimizer = torch.optim.AdamW(net.parameters())
    net(input_ids=torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, 4, dtype=torch.int64)).loss.backward()
    optimizer.step()
    assert predicted.state == size(value for entry in optimizer.state.values() for value in entry.values())


def test_parameters_that_do_not_train_and_other_devices() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False, device="meta"))
    net[0].weight.requires_grad_(False)
    predicted = sf.memory_plan(net, activation_bytes=100)
    assert predicted.masked["cpu"].total == 64 + 100 and predicted.masked["cpu"].gradients == 0
    assert predicted.masked["meta"].total == 64 + 64 + 128 + 4 + 100
    assert "cpu masked" in str(predicted) and "meta stock" in str(predicted)


def test_fits() -> None:
    net = nn.Linear(4, 4, bias=False)
    assert sf.memory_plan(net).fits is None
    enough, short = (sf.memory_plan(net, capacity=capacity) for capacity in (260, 259))
    assert enough.fits is True and "fits, 0.00 GB left" in str(enough)
    assert short.fits is False and "does not fit" in str(short)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (("x",), {}, TypeError, "model is a str, expected a torch.nn.Module"),
        ((nn.Linear(2, 2), {}), {}, TypeError, "plan is a dict, expected a FreezePlan"),
        ((nn.Linear(2, 2), plan()), {}, ValueError, "not among the 2 parameters"),
        ((nn.Linear(2, 2),), {"dtype": torch.int8}, ValueError, "dtype is torch.int8"),
        ((nn.Linear(2, 2),), {"state_dtype": torch.float16}, ValueError, "state_dtype is torch.float16"),
        ((nn.Linear(2, 2),), {"master": "yes"}, ValueError, "master is 'yes'"),
        ((nn.Linear(2, 2),), {"storage": "sparse"}, ValueError, "storage is 'sparse'"),
        (
            (nn.Linear(2, 2),),
            {"storage": "packed", "keep_state": True},
            ValueError,
            "keep_state is True, expected False",
        ),
        ((nn.Linear(2, 2),), {"capacity": -1}, ValueError, "capacity is -1"),
    ],
)
def test_bad_input(arguments: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words.replace(".", r"\.")):
        sf.memory_plan(*arguments, **options)


def test_command(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    done = run("plan-memory", "--model", folder / "config.json", "--dtype", "bfloat16", "--masters", "--capacity", 1)
    assert done.exit_code == 0, done.output
    for word in ("masked", "stock", "parameters", "masters", "total", "activations are not counted", "fits, "):
        assert word in done.output
    short = run("plan-memory", "--model", folder, "--capacity", 0.0001)
    assert short.exit_code == 1 and "does not fit" in short.output
    fails(run("plan-memory", "--model", folder, "--state-dtype", "int16"), "state_dtype", "int16")
    fails(run("plan-memory", "--model", tmp_path / "nowhere"), "config.json")


TOKENS: Final = {name: torch.zeros(2, 16, dtype=torch.int64) for name in ("input_ids", "labels")}


def skeleton() -> nn.Module:
    with torch.device("meta"):  # moved there later, tied weights would be two
        return model()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("freeze", [None, plan()], ids=["nothing", "plan"])
def test_a_dry_run_holds_what_a_step_holds(freeze: sf.FreezePlan | None, dtype: torch.dtype) -> None:
    found = fit(skeleton(), TOKENS, freeze, capacity=10**9, dtype=dtype)
    assert not found.unknown
    settings = [Setting(c, b, s, storage) for c in (False, True) for b in (False, True) for s in STATES
                for storage in (("packed", "dense") if freeze is not None else ("dense",))]  # fmt: skip
    assert list(found.holdings) == settings
    for setting in (setting for setting in settings if setting.state_dtype == torch.int8):
        net = model().to(dtype).train()
        if setting.checkpointing:
            net.gradient_checkpointing_enable()
        if setting.storage == "packed":
            sf.live_gradients(net, freeze, storage="packed")
        optimizer = sf.MaskedAdamW(net.named_parameters(), freeze=freeze, state_dtype=torch.int8)

        take_step(net, optimizer, net(**TOKENS).loss, inside=setting.in_backward)  # from now on there is state
        with Held([*net.parameters(), *net.buffers()]) as held:
            take_step(net, optimizer, net(**TOKENS).loss, inside=setting.in_backward)
        one = found.holdings[setting]
        assert one.state == sf.memory_plan(net, freeze, state_dtype=torch.int8).masked["cpu"].state, setting
        predicted = one.gradients + one.activations
        assert held.most <= predicted <= (1.1 * held.most if setting.checkpointing else held.most), setting


def test_what_fits_first() -> None:
    every = fit(skeleton(), TOKENS, plan(), capacity=10**9)
    assert every.best == Setting(storage="packed") and "First: packed, float32 state" in every.verdict()
    totals = {setting: held.total for setting, held in every.holdings.items()}
    for capacity in (max(totals.values()), sorted(totals.values())[3], min(totals.values())):
        found = replace(every, capacity=capacity)
        assert found.best == next(setting for setting, total in totals.items() if total <= capacity)
        assert str(found.verdict()).startswith("* fits 0.00 GB")
    short = replace(every, capacity=min(totals.values()) - 1)
    assert short.best is None and "nothing fits" in short.verdict()
    assert totals[Setting(True, True, torch.int8, "packed")] < totals[Setting(storage="packed")] < totals[Setting()]


@pytest.mark.parametrize("setting", [Setting(storage="packed"), Setting(True, True, torch.int8, "dense")], ids=str)
def test_the_lines_it_tells_run(setting: Setting) -> None:
    before, net = model(), model()
    exec(setting.lines(), {"sf": sf, "torch": torch, "model": net, "plan": plan(), "batch": TOKENS, "lr": 1e-3})
    sf.snapshot(before, plan()).verify(net)
    assert not torch.equal(before.model.norm.weight, net.model.norm.weight)
    assert all(p.grad is None for p in net.parameters())


def test_a_model_that_does_not_run_without_memory() -> None:
    class Looks(nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x * float(x.sum()))

    found = fit(Looks(4, 4), {"x": torch.ones(2, 4)}, capacity=10**9)
    assert "DataDependentOutputException" in found.unknown
    assert found.holdings[Setting()].gradients == 40 and found.holdings[Setting()].activations == 0


def test_what_does_not_train_and_several_devices() -> None:
    net = model()
    net.model.layers[0].requires_grad_(False)
    found = fit(net, TOKENS, capacity=10**9, dtype=torch.float32)
    assert not found.unknown
    assert found.holdings[Setting()].state == sf.memory_plan(net).masked["cpu"].state
    apart = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False, device="meta"))
    assert fit(apart, {}, capacity=10**9, dtype=torch.float32).holdings[Setting()].parameters == 2 * 64


def test_fit_refuses_a_batch_that_is_none() -> None:
    with pytest.raises(TypeError, match="fit: batch is a Tensor, expected a mapping"):
        fit(nn.Linear(2, 2), torch.ones(2, 2), capacity=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("capacity", [0, -1, 2.5])
def test_fit_refuses_a_capacity_that_is_none(capacity: Any) -> None:
    with pytest.raises(ValueError, match=r"fit: capacity is .*, expected a number of bytes > 0"):
        fit(nn.Linear(2, 2), {}, capacity=capacity)


def test_fit_command(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    done = run("fit", "--model", folder, "--gb", 1, "--tokens", 16)
    assert done.exit_code == 0, done.output
    for words in ("batch 1 x 16 tokens; frozen: nothing", "ordinary", "in backward", "with checkpointing", "* fits"):
        assert words in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "optimizer = sf.MaskedAdamW(model.named_parameters(), lr=lr)" in done.output
    short = run("fit", "--model", folder, "--gb", 0.00001, "--tokens", 16)
    assert short.exit_code == 1 and "nothing fits 0.00 GB" in short.output
    for model_, gb, tokens, words in (
        (folder, 0, 16, "capacity is 0"), (folder, 1, 1, "fit: --tokens is 1"), (tmp_path / "no", 1, 16, "config.json"),
    ):  # fmt: skip
        bad = run("fit", "--model", model_, "--gb", gb, "--tokens", tokens)
        fails(bad, words)
        assert bad.exit_code == 2
