"""`check` and ``safefreeze doctor``: every finding has a case that shows it, and a case without; nothing is changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import assert_same_bits, assert_same_state
from model_folders import fails, run, save_model
from torch import nn

import safefreeze_kernels as sf
from safefreeze_kernels.measure.check import CheckReport
from safefreeze_kernels.optim import rounding

pytestmark = pytest.mark.usefixtures("one_thread")

Case = tuple[Any, Any, Any]  # model, optimizer, plan


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = OrderedDict(first=nn.Linear(6, 8), second=nn.Linear(8, 6), head=nn.Linear(6, 8, bias=False))
    return nn.Sequential(layers).to(dtype)


def plan(rows: tuple[int, ...] = (1, 3), name: str = "first.weight", shape: tuple[int, ...] = (8, 6)) -> sf.FreezePlan:
    return sf.FreezePlan({name: sf.FreezeMask(shape, rows=rows)})


def masked(model: nn.Module, freeze: sf.FreezePlan | None = None, **options: Any) -> sf.MaskedAdamW:
    return sf.MaskedAdamW(model.named_parameters(), **{"lr": 1e-3, **options}, freeze=freeze)


def lora(model: nn.Module, **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **{"target_modules": ["first"], **options}))


def tied() -> nn.Module:
    model: Any = net()
    model.head.weight = model.first.weight
    return model


def looked_at(case: Case) -> CheckReport:
    """The report, once it is known that making it changed nothing, and that it is a screen of 80 columns."""
    model, optimizer, _ = case
    params = dict(model.named_parameters())
    before = {name: (p.detach().clone(), p.grad, p._version, p.requires_grad) for name, p in params.items()}
    state, entries = optimizer and copy.deepcopy(optimizer.state_dict()), optimizer and len(optimizer.state)
    random = torch.get_rng_state()
    report = sf.check(*case)
    for name, p in params.items():
        assert_same_bits(p, before[name][0], name)
        assert (id(p.grad), p._version, p.requires_grad) == (id(before[name][1]), *before[name][2:])
    assert torch.equal(random, torch.get_rng_state())
    if optimizer is not None:
        assert_same_state(optimizer.state_dict(), state, "state")
        assert len(optimizer.state) == entries
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) <= 40, text
    assert report.ok == (not report.warnings)
    return report


# ------------------------------------------------------------------------------------------- nothing to be found


def guarded() -> Case:
    model = net()
    sf.guard(optimizer := torch.optim.SGD(model.parameters(), lr=0.1), plan(), model)
    return model, optimizer, plan()


def adapted(**options: Any) -> Case:
    model = lora(net(), **options)
    carried = sf.adapt(plan(), model)
    return model, masked(model, carried), plan()


def simple(optimizer: Callable[..., Any], *args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    model = net(dtype)
    return model, optimizer(model, *args, **options), None


def warming_up() -> Case:
    model, optimizer, _ = simple(masked)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    return model, optimizer, None


SOUND: dict[str, Callable[[], Case]] = {
    "no optimizer": lambda: (net(), None, None),
    "no optimizer, a plan": lambda: (net(), None, plan()),
    "masked": lambda: simple(masked, plan()),
    "the plan twice": lambda: (*simple(masked, plan())[:2], plan()),
    "guard": guarded,
    "adapted": adapted,
    "tied": lambda: (tied(), None, plan()),
    "tied, either name": lambda: (tied(), None, plan(name="head.weight")),
    "stock": lambda: (model := net(), torch.optim.AdamW(model.parameters()), None),
    "rates that a warm-up begins with": warming_up,
    "bfloat16, a high rate": lambda: simple(masked, dtype=torch.bfloat16, lr=1e-2),
    "bfloat16, masters": lambda: simple(masked, dtype=torch.bfloat16, lr=1e-6, master="remainder"),
    "bfloat16, stochastic": lambda: simple(masked, dtype=torch.bfloat16, lr=1e-6, rounding="stochastic"),
}  # fmt: skip


@pytest.mark.parametrize("case", SOUND)
def test_nothing_is_said_of_what_is_right(case: str) -> None:
    report = looked_at(SOUND[case]())
    assert report.ok, report.warnings
    assert str(report).endswith("\nNothing is wrong.")


def test_what_trains_and_what_stands_still_by_whom() -> None:
    model, _, _ = case = adapted(modules_to_save=["second"])
    model.base_model.model.first.lora_A.default.weight.requires_grad_(False)
    report = looked_at(case)
    saved = 8 * 6 + 6
    assert {word: count for word, count in report.counts.items() if count[1]} == {
        "trains": (3, saved + 6 * 2),  # second.weight, second.bias, lora_B
        "frozen by the plan": (1, 2 * 2),
        "frozen by PEFT": (5, 48 + 8 + 48 + saved),  # first, head, the original of second
        "frozen by requires_grad=False": (1, 2 * 6),
    }
    trained, frozen = saved + 6 * 2, 2 * 2
    assert (report.state_bytes, report.state_saved) == (8 * trained, 8 * frozen)
    assert f"carried to adapters from {plan().fingerprint[:12]}" in " ".join(str(report).split())


def test_state_that_is_kept_saves_nothing() -> None:
    model, optimizer, _ = simple(masked, plan(), dtype=torch.bfloat16, master="remainder", amsgrad=True)
    packed = sf.check(model, optimizer)
    optimizer.set_freeze(plan(), keep_state=True)
    whole = sf.check(model, optimizer)
    assert (packed.state_saved, whole.state_saved) == (12 * (3 * 4 + 2), 0)
    assert packed.state_bytes is not None and whole.state_bytes == packed.state_bytes + 12 * 14


def test_tied_weights_are_told_by_all_names_and_count_once() -> None:
    report = looked_at((tied(), None, None))
    assert report.tied == [("first.weight", "head.weight")]
    assert report.counts["trains"] == (4, 48 + 8 + 48 + 6)
    assert "first.weight = head.weight" in str(report)


# ------------------------------------------------------------------------------------------------------ findings


def two_masks() -> Case:
    both = {**plan(), **plan(rows=(2,), name="head.weight")}
    return tied(), None, sf.FreezePlan(both)


def nf4() -> nn.Module:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(16, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    model = nn.Sequential(OrderedDict(first=layer)).to("cpu")
    model(torch.randn(2, 16))  # quantises
    assert model.get_parameter("first.weight").shape != (64, 16)
    return model


def frozen_by_hand() -> Case:
    model: Any = net()
    model.first.weight.requires_grad_(False)
    return model, None, plan()


def moved_factor() -> Case:
    model, optimizer, _ = adapted()
    with torch.no_grad():
        model.base_model.model.first.lora_B.default.weight[3, 1] = 0.5
    return model, optimizer, None


def forgotten() -> Case:
    model = net()
    return model, masked(model[:2], lr=1e-3), None  # type: ignore[index]


def assigned() -> Case:
    model, optimizer, _ = simple(masked)
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    return model, optimizer, None


def rate_zero() -> Case:
    model = net()
    groups = [{"params": [(n, p)], "lr": 0.0 if n == "head.weight" else 1e-3} for n, p in model.named_parameters()]
    return model, sf.MaskedAdamW(groups), None


def for_inference() -> Case:
    return net().requires_grad_(False), None, None


def guarded_otherwise() -> Case:
    model, optimizer, _ = guarded()
    return model, optimizer, plan(rows=(1, 2, 4))


FOUND: dict[str, tuple[Callable[[], Case], tuple[str, ...]]] = {
    "another shape": (
        lambda: (net(), None, sf.FreezePlan({**plan(shape=(9, 6)), **plan(name="nowhere.weight")})),
        ("does not fit in 2 names, the first: 'first.weight' has shape (8, 6), the plan expects (9, 6)",),
    ),
    "no such name": (
        lambda: (*simple(masked)[:2], plan(name="frist.weight")),
        ("does not fit", "'frist.weight', which is not among the 5 parameters", "nearest: 'first.weight'"),
    ),
    "two masks": (two_masks, ("one tied tensor with two different masks",)),
    "hidden by an adapter": (
        lambda: (lora(net()), None, plan()),
        ("1 name ('first.weight') of the plan: hidden by an adapter", "sf.adapt(plan, model)"),
    ),
    "hidden, in 4 bits": (
        lambda: (lora(nf4()), None, plan(name="first.weight", shape=(64, 16))),
        ("1 name ('first.weight') of the plan: hidden by an adapter",),
    ),
    "frozen by PEFT": (
        lambda: (lora(net()), None, plan(name="head.weight")),
        ("1 name ('head.weight') of the plan: requires_grad=False", "sf.adapt(plan, model) leaves out"),
    ),
    "frozen by hand": (frozen_by_hand, ("requires_grad=False", "or call requires_grad_(True)")),
    "a factor that moved": (moved_factor, ("does not hold", "is 0.5 in row 3, column 1, expected zero")),
    "no plan in force": (
        lambda: (*simple(masked)[:2], plan()),
        ("not in force: MaskedAdamW was made without it, and moves the 12 elements", "set_freeze(plan)"),
    ),
    "no guard": (
        lambda: (model := net(), torch.optim.SGD(model.parameters()), plan()),
        ("not in force: SGD was made without it", "sf.guard(optimizer, plan, model)"),
    ),
    "another plan in force": (guarded_otherwise, ("not the one in force", "moves 12 elements", "freezes 6 that")),
    "more in force": (
        lambda: (*simple(masked, plan(rows=(1, 3, 5)))[:2], plan()),
        ("not the one in force: MaskedAdamW moves 0 elements that it freezes, and freezes 6 that it does not",),
    ),
    "in no optimizer": (forgotten, ("1 parameter ('head.weight'): gradients are computed, but no optimizer",)),
    "replaced": (
        assigned,
        ("5 parameters ('first.weight', 'first.bias' and 3 more): gradients", "another tensor of that name"),
    ),
    "another model's": (
        lambda: (net(), masked(nn.ModuleDict({"actor": net()})), None),
        ("5 parameters ('actor.first.weight', 'actor.first.bias' and 3 more) of the optimizer: not among the model's",),
    ),
    "rate 0": (rate_zero, ("1 group ('group 4'): the rate is 0",)),
    "nothing trains": (for_inference, ("nothing trains",)),
    "bfloat16": (
        lambda: simple(masked, dtype=torch.bfloat16, lr=1e-6),
        ("of its live bfloat16 elements are too large for lr 1e-06", "use master='remainder'"),
    ),
    "bfloat16, stock": (
        lambda: (model := net(torch.bfloat16), torch.optim.Adam(model.parameters(), lr=1e-6), None),
        ("too large for lr 1e-06", "use sf.MaskedAdamW(..., master='remainder')"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_findings(case: str) -> None:
    make, words = FOUND[case]
    report = looked_at(make())
    told = " ".join(report.warnings)
    for word in words:
        assert word in told, told
    assert " ".join(words[0].split()) in " ".join(str(report).split())


def test_bad_input() -> None:
    model = net()
    for case, words in (
        ((3, None, None), "check: model is a int, expected a torch.nn.Module"),
        ((model, model, None), "check: optimizer is a Sequential, expected a torch.optim.Optimizer"),
        ((model, None, {}), "check: plan is a dict, expected a FreezePlan"),
    ):
        with pytest.raises(TypeError, match=words):
            sf.check(*case)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ rounding


def stays(model: nn.Module, optimizer: Any, freeze: sf.FreezePlan, signs: tuple[float, ...] = (1.0, -1.0)) -> float:
    """Share of the live elements that one step leaves as they are, on the average of gradients of these ``signs``."""
    same = total = 0
    for sign in signs:
        net, opt = copy.deepcopy((model, optimizer))
        for p in net.parameters():
            p.grad = torch.full_like(p, sign)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        opt.step()
        for name, p in net.named_parameters():
            live = ~freeze[name].dense() if name in freeze else torch.ones_like(p, dtype=torch.bool)
            same, total = same + int((p == before[name])[live].sum()), total + int(live.sum())
    return same / total


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("how", ["rows", "elements"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_share_is_that_of_a_first_step(dtype: torch.dtype, how: str, weight_decay: float) -> None:
    mask = sf.FreezeMask((8, 6), rows=[1, 3], cols=[2])
    if how == "elements":
        mask = sf.FreezeMask((8, 6), elements=torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) < 0.3)
    freeze = sf.FreezePlan({"first.weight": mask})
    shares = []
    for lr in (1e-5, 1e-4, 3e-4, 1e-3):
        model, optimizer, _ = simple(masked, freeze, dtype=dtype, lr=lr, weight_decay=weight_decay)
        (one,) = looked_at((model, optimizer, None)).rounding
        shares.append(one.share)
        assert one.share == pytest.approx(stays(model, optimizer, freeze)), lr
        assert (one.elements, one.sampled, one.measured) == (158 - mask.frozen_count, False, False)
    assert shares[0] > shares[-1] and 0 < shares[1] < 1


def test_state_tells_how_long_updates_are() -> None:
    """Gradients whose sign turns at each step leave short updates, which more weights lose; torch's AdamW alike."""
    model, optimizer, _ = simple(masked, plan(), dtype=torch.bfloat16, lr=4e-4)
    (first,) = sf.check(model, optimizer).rounding
    for step in range(20):
        for p in model.parameters():
            p.grad = torch.full_like(p, (-1.0) ** step)
        optimizer.step()
    (later,) = looked_at((model, optimizer, None)).rounding
    assert later.measured and later.share > first.share + 0.1
    stock = torch.optim.AdamW(model.parameters(), lr=4e-4)
    stock.load_state_dict(optimizer.dense_state_dict())
    (same,) = sf.check(model, stock).rounding
    optimizer.set_freeze(None, keep_state=True)
    (other,) = sf.check(model, optimizer).rounding
    assert same.measured and same.share == pytest.approx(other.share, abs=0.05)


def test_sgd_is_judged_by_its_gradients() -> None:
    model = net(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    report = looked_at((model, optimizer, None))
    assert report.ok and "not known before a backward pass" in " ".join(str(report).split())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    (one,) = looked_at((model, optimizer, None)).rounding
    assert one.measured and one.share == pytest.approx(stays(model, optimizer, sf.FreezePlan(), (1.0,)))


def test_large_tensors_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 256, bias=False).bfloat16()
    optimizer = masked(model, plan(tuple(range(0, 256, 2)), "weight", (256, 64)), lr=1e-4)
    (exact,) = sf.check(model, optimizer).rounding
    monkeypatch.setattr(rounding, "_MOST", 1024)
    (sampled,) = looked_at((model, optimizer, None)).rounding
    assert sampled.sampled and not exact.sampled and sampled.elements == exact.elements == 8192
    assert sampled.share == pytest.approx(exact.share, abs=0.05) and 0.1 < exact.share < 0.9


# ------------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safefreeze_kernels.integrations.transformers import load_model

    place = save_model(tmp_path_factory.mktemp("model"))
    plan(name="model.layers.0.self_attn.q_proj.weight", shape=(32, 32)).save(place / "plan.safetensors")
    plan(name="model.layers.0.nix.weight", shape=(32, 32)).save(place / "other.safetensors")
    model = lora(load_model(place)[1], target_modules=["q_proj"])
    model.save_pretrained(place / "adapter")
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight += 1
    model.save_pretrained(place / "trained")
    return place


def test_doctor_tells_by_its_exit_code(folder: Path) -> None:
    for options, code, words in (
        (("--dtype", "float32"), 0, ("Nothing is wrong",)),
        (("--dtype", "float32", "--plan", folder / "plan.safetensors"), 0, ("frozen by the plan", "Nothing is wrong")),
        (("--lr", "1e-6"), 1, ("too large for lr 1e-06",)),
        (("--dtype", "float32", "--plan", folder / "other.safetensors"), 1, ("1 finding:", "the plan does not fit")),
        (
            ("--dtype", "float32", "--adapter", folder / "adapter", "--plan", folder / "plan.safetensors"),
            0, ("with adapter", "carried to adapters from", "frozen by PEFT", "Nothing is wrong"),
        ),
        (
            ("--dtype", "float32", "--adapter", folder / "trained", "--plan", folder / "plan.safetensors"),
            1, ("adapt:", "expected zero where the plan freezes its weight"),
        ),
    ):  # fmt: skip
        done = run("doctor", "--model", folder, *options)
        assert done.exit_code == code, done.output
        assert max(map(len, done.stdout.splitlines())) <= 80
        for word in (*words, "tied", "lm_head.weight"):
            assert word in " ".join(done.stdout.split()), done.stdout


def test_doctor_refuses_bad_input(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for options, words in (
        (("--model", tmp_path / "nix"), "no config.json"),
        (("--model", folder, "--plan", tmp_path / "nix"), "doctor: no file"),
        (("--model", folder, "--dtype", "bf16"), "doctor: --dtype is 'bf16', expected one of float32, bfloat16"),
        (("--model", folder, "--lr", "-1"), "Invalid learning rate"),
        (("--model", folder, "--adapter", folder), "no adapter_config.json"),
        (("--model", folder, "--adapter", tmp_path), "load_adapter: cannot put the adapter"),
    ):
        done = run("doctor", *options)
        fails(done, "error: ", words)
        assert done.exit_code == 2
