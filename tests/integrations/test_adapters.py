"""A plan under PEFT's adapters: exact through training, saving, resuming and merging; what cannot hold is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import safefreeze_kernels as sf

ROWS, COLS = [1, 3, 8], [0, 5, 6]
STEPS = 50


class Experts(nn.Module):
    """Four matrices in one parameter: [expert, out, in], or [expert, in, out] where ``is_transposed``."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.randn(4, 16, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.is_transposed else self.weight.transpose(1, 2)
        return torch.einsum("ni,eio->no", x[:, : weight.shape[1]], weight)


class Net(nn.Module):
    """One layer to adapt, in front of a head that does not train."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.head.weight.dtype
        inner = self.layer(x if isinstance(self.layer, nn.Embedding) or x.dtype == torch.long else x.to(dtype))
        return torch.tanh(self.head(inner.to(dtype)))


class Kind(NamedTuple):
    """A kind of adapter: the layer, its width, the shape of what the plan freezes, and PEFT's configuration."""

    layer: Callable[[], nn.Module]
    width: int
    shape: tuple[int, ...]
    config: dict[str, Any]
    inputs: Callable[[torch.Generator], Tensor] = lambda draw: torch.randn(6, 16, generator=draw)


def nf4() -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.nn.Linear4bit(16, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")


def words(draw: torch.Generator) -> Tensor:
    return torch.randint(0, 20, (8,), generator=draw)


TARGET = {"target_modules": ["layer"]}
KINDS = {
    "LoRA": Kind(lambda: nn.Linear(16, 24), 24, (24, 16), TARGET),
    "rsLoRA": Kind(lambda: nn.Linear(16, 24), 24, (24, 16), {**TARGET, "use_rslora": True}),
    "DoRA": Kind(lambda: nn.Linear(16, 24), 24, (24, 16), {**TARGET, "use_dora": True}),
    "QLoRA NF4": Kind(nf4, 64, (64, 16), TARGET),
    "embedding": Kind(lambda: nn.Embedding(20, 16), 16, (20, 16), TARGET, words),
    "Conv1D": Kind(lambda: Conv1D(24, 16), 24, (16, 24), {**TARGET, "fan_in_fan_out": True}),
    "DoRA of Conv1D": Kind(lambda: Conv1D(24, 16), 24, (16, 24), {**TARGET, "fan_in_fan_out": True, "use_dora": True}),
    "experts": Kind(lambda: Experts(False), 16, (4, 16, 12), {"target_parameters": ["layer.weight"]}),
    "experts, transposed": Kind(lambda: Experts(True), 12, (4, 16, 12), {"target_parameters": ["layer.weight"]}),
}
LINES: dict[str, dict[str, list[int]]] = {
    "rows": {"rows": ROWS}, "columns": {"cols": COLS}, "both": {"rows": ROWS, "cols": COLS},
}  # fmt: skip
NAME = "layer.weight"


def bare(kind: Kind, dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    net = Net(kind.layer(), kind.width)
    if "4bit" in type(net.layer).__name__:
        net.layer.to("cpu")
        net.layer(torch.randn(2, 16))  # quantises
        net.head.to(dtype)
        return net
    with torch.no_grad():
        next(net.layer.parameters()).view(-1)[::7] = -0.0
    return net.to(dtype)


def adapted(net: Net, kind: Kind, **options: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=8, **{**kind.config, **options}))


def plan_of(kind: Kind, lines: str = "rows") -> sf.FreezePlan:
    return sf.FreezePlan({NAME: sf.FreezeMask(kind.shape, **LINES[lines])})


def train(model: Any, optimizer: sf.MaskedAdamW, plan: sf.FreezePlan, kind: Kind, steps: range) -> None:
    for step in steps:
        for part in range(2):
            x = kind.inputs(torch.Generator().manual_seed(2 * step + part))
            ((model(x) - 0.5) ** 2).mean().backward()
        sf.clip_grad_norm_(model, 1.0, plan)
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: Any, plan: sf.FreezePlan) -> sf.MaskedAdamW:
    return sf.MaskedAdamW(model.named_parameters(), lr=0.05, weight_decay=0.1, freeze=plan)


def delta(model: Any, kind: Kind) -> Tensor:
    layer = model.base_model.model.layer
    found: Tensor = layer.get_delta_weight("default").detach().reshape(kind.shape)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lines", LINES)
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_bytes_stay_through_training_resuming_and_merging(
    kind: str, lines: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    case, plan = KINDS[kind], plan_of(KINDS[kind], lines)
    base = bare(case, dtype)
    model = adapted(copy.deepcopy(base), case)
    if "DoRA" in kind and lines != ("columns" if "Conv1D" in kind else "rows"):
        with pytest.raises(ValueError, match="DoRA, whose magnitudes scale whole outputs, and inputs of it are frozen"):
            sf.adapt(plan, model)
        return
    first = sf.adapt(plan, model)
    optimizer = optimizer_of(model, first)
    train(model, optimizer, first, case, range(STEPS // 2))
    model.save_pretrained(tmp_path)

    resumed = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    second = sf.adapt(plan, resumed)
    assert second == first and not second.changed
    carried_on = optimizer_of(resumed, second)
    carried_on.load_state_dict(optimizer.state_dict())
    train(resumed, carried_on, second, case, range(STEPS // 2, STEPS))
    train(model, optimizer, first, case, range(STEPS // 2, STEPS))
    for name, p in model.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), f"{name} is another after resuming"

    moved, frozen = delta(resumed, case), plan[NAME].dense()
    assert not moved[frozen].any()
    assert (moved[~frozen] != 0).float().mean() > 0.9
    x = case.inputs(torch.Generator().manual_seed(99))
    before, after = (net.layer(x.to(dtype) if x.is_floating_point() else x) for net in (base, resumed.base_model.model))
    if kind in ("LoRA", "rsLoRA", "DoRA", "QLoRA NF4") and lines == "rows":
        assert torch.equal(before[:, ROWS], after[:, ROWS].to(before.dtype))
        assert not torch.equal(before, after.to(before.dtype))
    if kind == "QLoRA NF4":
        with pytest.raises(ValueError, match="is quantised, and merging would round all of it anew"):
            sf.merge_(resumed, second)
        return
    plainly = copy.deepcopy(resumed).merge_and_unload()
    merged = sf.merge_(resumed, second)
    sf.snapshot(base, plan).verify(merged)
    with pytest.raises(sf.FrozenDriftError, match=r"was -0\.0"):
        sf.snapshot(base, plan).verify(plainly)
    for name, p in merged.named_parameters():
        assert torch.equal(p, plainly.get_parameter(name)), name  # -0.0 equals 0.0
    assert (merged.layer.weight != base.layer.weight)[~frozen].float().mean() > 0.5


# --------------------------------------------------------------------------------------------------- what is refused


class Parts(nn.Module):
    """One of each kind of layer that adapters take."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer, self.other = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.conv, self.attention = nn.Conv2d(4, 4, 2), nn.MultiheadAttention(16, 2)
        with torch.no_grad():
            self.layer.weight.view(-1)[::5] = -0.0

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.other(torch.tanh(self.layer(self.words(x))))))
        return found


def lora(*layers: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": [*(layers or ["layer"]), "other"], **options})


def base_parts() -> Parts:
    torch.manual_seed(0)
    return Parts()


def parts(config: Any) -> Any:
    return peft.get_peft_model(base_parts(), config)


def freeze(name: str = NAME, shape: tuple[int, ...] = (16, 16), **lines: Any) -> sf.FreezePlan:
    return sf.FreezePlan({name: sf.FreezeMask(shape, **(lines or {"rows": [1, 3]}))})


def poke(name: str, value: float, *at: int) -> Callable[[Any], None]:
    """Set one element of a parameter."""

    def change(model: Any) -> None:
        with torch.no_grad():
            model.get_parameter(f"base_model.model.{name}")[at] = value

    return change


def share_factor(model: Any) -> None:
    model.base_model.model.other.lora_A.default.weight = model.base_model.model.layer.lora_A.default.weight


def say_loftq(model: Any) -> None:
    model.peft_config["default"].init_lora_weights = "loftq"  # the real one needs scipy


class Refused(NamedTuple):
    """``first``: what is done to the model before. ``alone``: nothing else is in the plan that `adapt` has to set."""

    config: Callable[[], Any]
    plan: sf.FreezePlan
    says: str
    first: Callable[[Any], Any] = lambda model: None
    alone: bool = False


ONE = torch.zeros(16, 16, dtype=torch.bool)
ONE[3, 2] = True
REWRITES = r"initialised with init_lora_weights='{}', which may rewrite the base's weights"
BY_THEMSELVES = r"is adapted by {}, under which rows and columns of a weight do not stand still by themselves"
BIAS = r"the bias '.*{}' trains, and moves output {} of '.*layer\.base_layer\.weight', which the plan freezes"
B = "layer.lora_B.default.weight"
REFUSED = {
    "single elements": Refused(lora, freeze(elements=ONE), "single elements are frozen, expected rows and columns"),
    "of another shape": Refused(lora, freeze(shape=(16, 8)), r"has shape \(16, 16\), the plan expects \(16, 8\)"),
    "of no such name": Refused(lora, freeze("lawyer.weight"), r"names 'lawyer\.weight', which is not among"),
    **{
        how: Refused(lambda how=how: lora(init_lora_weights=how), freeze(), REWRITES.format(how))
        for how in ("pissa", "pissa_niter_2", "olora", "mica")
    },
    "loftq": Refused(lora, freeze(), REWRITES.format("loftq"), say_loftq),
    "orthogonal": Refused(
        lambda: lora(init_lora_weights="orthogonal"), freeze(), rf"{B}' is \S+ in row 1, column 0, expected zero",
        alone=True,
    ),
    "no initialisation": Refused(
        lambda: lora(init_lora_weights=False), freeze(), rf"{B}' is \S+ in row 1, column 0, expected zero",
        alone=True,
    ),
    "VeRA": Refused(
        lambda: peft.VeraConfig(r=4, target_modules=["layer"]), freeze(), BY_THEMSELVES.format(r"vera\.layer\.Linear")
    ),
    "LoHa": Refused(
        lambda: peft.LoHaConfig(r=4, target_modules=["layer"]), freeze(), BY_THEMSELVES.format(r"loha\.layer\.Linear")
    ),
    "AdaLoRA": Refused(
        lambda: peft.AdaLoraConfig(init_r=4, target_modules=["layer"], total_step=9), freeze(),
        BY_THEMSELVES.format(r"adalora\.layer\.SVDLinear"),
    ),
    "Conv2d": Refused(
        lambda: lora("conv"), freeze("conv.weight", (4, 4, 2, 2)),
        BY_THEMSELVES.format(r"lora\.layer\.Conv2d"),
    ),
    "attention": Refused(
        lambda: lora("attention"), freeze("attention.in_proj_weight", (48, 16)),
        BY_THEMSELVES.format(r"lora\.layer\.MultiheadAttention"),
    ),
    "B not zero": Refused(lora, freeze(), rf"{B}' is -0\.25 in row 3, column 2, expected zero", poke(B, -0.25, 3, 2)),
    "A not zero, nor B": Refused(
        lora, freeze(cols=[5]), r"lora_A\.default\.weight' is \S+ in row 0, column 5, expected zero", poke(B, 1.0, 0, 0)
    ),
    "bias='all'": Refused(lambda: lora(bias="all"), freeze(), BIAS.format(r"layer\.base_layer\.bias", 1)),
    "bias='lora_only'": Refused(lambda: lora(bias="lora_only"), freeze(), BIAS.format(r"layer\.base_layer\.bias", 1)),
    "lora_bias": Refused(lambda: lora(lora_bias=True), freeze(), BIAS.format(r"lora_B\.default\.bias", 1)),
    "half of a bias": Refused(
        lambda: lora(bias="all"), freeze() | freeze("layer.bias", (16,), rows=[1]), BIAS.format(r"base_layer\.bias", 3)
    ),
    "a shared factor": Refused(
        lambda: lora(), freeze(cols=[1]) | freeze("other.weight", cols=[2]),
        r"lora_A\.default\.weight' is shared by '.*layer\.base_layer\.weight' and another weight", share_factor,
    ),
    "merged": Refused(lora, freeze(), r"are merged; call unmerge_adapter\(\)", lambda model: model.merge_adapter()),
    "DoRA trained": Refused(
        lambda: lora(use_dora=True), freeze(), "is not the norm of the base's row 3, which the plan freezes",
        poke("layer.lora_magnitude_vector.default.weight", 9.0, 3), True,
    ),
    "DoRA, columns": Refused(
        lambda: lora(use_dora=True), freeze(cols=[1]), "expected outputs alone; use LoRA there", alone=True
    ),
    "DoRA of an embedding": Refused(
        lambda: lora("words", use_dora=True), freeze("words.weight", (20, 16)), "DoraEmbeddingVariant",
        alone=True,
    ),
    "token indices": Refused(
        lambda: lora(trainable_token_indices={"words": [2, 5]}), freeze("words.weight", (20, 16), rows=[0, 5]),
        r"row 5 of '.*words.*' is among trainable_token_indices, and the plan freezes it",
    ),
    "aLoRA": Refused(
        lambda: lora(alora_invocation_tokens=[1, 2]), freeze(), "has a ALoraLinearVariant, expected LoRA"
    ),
    "KaSA": Refused(lambda: lora(kasa_config=peft.KasaConfig()), freeze(), "has a KasaLinearVariant, expected LoRA"),
}  # fmt: skip


def all_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operation", ["adapt", "merge_"])
@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_hold_is_refused_and_nothing_is_changed(how: str, operation: str) -> None:
    case = REFUSED[how]
    model = parts(case.config())
    case.first(model)
    plan, before = case.plan if case.alone else freeze("other.weight", cols=[7]) | case.plan, all_bytes(model)
    with pytest.raises(ValueError, match=f"^adapt: .*{case.says}"):
        sf.adapt(plan, model) if operation == "adapt" else sf.merge_(model, plan)
    assert all_bytes(model) == before
    if not case.alone and isinstance(case.config(), peft.LoraConfig):
        assert sf.adapt(freeze("other.weight", cols=[7]), parts(lora())).changed


def test_arguments_of_another_kind_are_refused() -> None:
    model, plan = parts(lora()), freeze()
    quantised = adapted(bare(KINDS["QLoRA NF4"], torch.float32), KINDS["QLoRA NF4"])
    for operation, kind, says in (
        (lambda: sf.adapt({}, model), TypeError, "adapt: plan is a dict, expected a FreezePlan"),
        (lambda: sf.adapt(plan, {}), TypeError, "adapt: model is a dict, expected a torch.nn.Module with adapters"),
        (lambda: sf.adapt(plan, Parts()), ValueError, "adapt: the model has no adapters; give its plan to"),
        (lambda: sf.merge_(model, {}), TypeError, "merge_: plan is a dict, expected a FreezePlan"),
        (lambda: sf.merge_(Parts(), plan), TypeError, "merge_: model is a Parts, expected a PeftModel"),
        (lambda: sf.merge_(model.base_model.model, plan), TypeError, "merge_: model is a Parts, expected a PeftModel"),
        (
            lambda: sf.merge_(quantised, plan_of(KINDS["QLoRA NF4"], "columns")), ValueError,
            r"merge_: '.*layer\.base_layer\.weight' is quantised, and merging would round all of it anew",
        ),
    ):  # fmt: skip
        before = all_bytes(model), all_bytes(quantised)
        with pytest.raises(kind, match=f"^{says}"):
            operation()
        assert (all_bytes(model), all_bytes(quantised)) == before


# ------------------------------------------------------------------------------------------- what holds all the same


def fit(model: nn.Module, optimizer: sf.MaskedAdamW, steps: int = 5) -> None:
    for step in range(steps):
        ((model(words(torch.Generator().manual_seed(step))) - 0.5) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_merges(model: Any, plan: sf.FreezePlan, **options: Any) -> None:
    """To the base's bytes where the plan freezes, and to others elsewhere in every weight that it names."""
    base = base_parts()
    merged = sf.merge_(model, plan, **options)
    sf.snapshot(base, plan).verify(merged)
    named = {name.replace("_orig_mod.", ""): p for name, p in merged.named_parameters()}
    for name, mask in plan.items():
        live = ~mask.dense()
        assert not live.any() or (named[name] != base.get_parameter(name))[live].any(), f"{name} did not train"


@pytest.mark.parametrize("value", [-1.0, math.inf])
@pytest.mark.parametrize("lines", [{"rows": [1, 3]}, {"cols": [0, 5]}], ids=["rows", "columns"])
def test_merging_leaves_frozen_bytes_whatever_the_factors_hold(lines: dict[str, list[int]], value: float) -> None:
    """-1: the one term of a frozen sum is -0.0, so that it may be; infinity: it would be NaN."""
    plan, model = freeze(**lines), peft.get_peft_model(base_parts(), lora(r=1))
    carried = sf.adapt(plan, model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.fill_(value)
                p[carried[name].dense() if name in carried else slice(0)] = 0.0
    assert_merges(model, plan)


BOTH = freeze(rows=[1, 3], cols=[0, 7])
OF_BIAS = freeze() | freeze("layer.bias", (16,))
WHOLE = torch.zeros(20, 16, dtype=torch.bool)
WHOLE[::3, ::2] = True
BESIDE: dict[str, tuple[Callable[[], Any], sf.FreezePlan]] = {
    "bias='all', planned": (lambda: lora(bias="all"), OF_BIAS),
    "bias='lora_only', planned": (lambda: lora(bias="lora_only"), OF_BIAS),
    "lora_bias, planned": (lambda: lora(lora_bias=True), OF_BIAS),
    "a bias beside columns": (lambda: lora(bias="all"), freeze(cols=[0, 7])),
    "modules_to_save": (lambda: lora(modules_to_save=["head"]), BOTH | freeze("head.weight", (20, 16), cols=[2])),
    "single elements of modules_to_save": (
        lambda: lora(modules_to_save=["head"]), BOTH | freeze("head.weight", (20, 16), elements=WHOLE),
    ),
    "token indices": (
        lambda: lora(trainable_token_indices={"words": [2, 5]}), BOTH | freeze("words.weight", (20, 16), rows=[0, 3]),
    ),
    "ranks of their own": (lambda: lora(rank_pattern={"layer": 2}, alpha_pattern={"layer": 32}), BOTH),
    "an embedding": (lambda: lora("words"), freeze("words.weight", (20, 16), rows=[0, 3], cols=[4])),
    "gaussian": (lambda: lora(init_lora_weights="gaussian"), BOTH),
    "dropout": (lambda: lora(lora_dropout=0.3), BOTH),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe_merge"])
@pytest.mark.parametrize("how", BESIDE)
def test_what_trains_beside_frozen_lines(how: str, safe: bool) -> None:
    config, plan = BESIDE[how]
    model = parts(config())
    fit(model, optimizer_of(model, sf.adapt(plan, model)))
    assert_merges(model, plan, safe_merge=safe)


def test_several_adapters_train_one_after_the_other() -> None:
    """Each under what was adapted once it was set; merged alone or together."""
    plan = BOTH | freeze("words.weight", (20, 16))
    model = parts(lora())
    model.add_adapter("second", lora("layer", "words", r=2))
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        fit(model, optimizer_of(model, sf.adapt(plan, model)))
    alone = copy.deepcopy(model)
    alone.set_adapter("second")
    assert_merges(alone, plan)
    assert_merges(model, plan, adapter_names=["default", "second"])


def test_an_adapter_that_was_set_later_is_found() -> None:
    """The plan of one adapter does not freeze another; merging says so."""
    model = parts(lora())
    model.add_adapter("second", lora())
    optimizer = optimizer_of(model, sf.adapt(BOTH, model))
    model.set_adapter("second")
    fit(model, optimizer)
    with pytest.raises(ValueError, match=r"lora_\w\.second\.weight' is \S+ in row \d, column \d, expected zero"):
        sf.merge_(model, BOTH)


def test_groups_of_lora_plus_over_rslora() -> None:
    model = parts(lora(use_rslora=True))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [pair for pair in named if ("lora_B" in pair[0]) == is_b], "lr": lr, "weight_decay": decay}
        for is_b, lr, decay in ((False, 0.01, 0.1), (True, 0.16, 0.0))
    ]
    fit(model, sf.MaskedAdamW(groups, freeze=sf.adapt(BOTH, model)))
    assert_merges(model, BOTH)


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


WRAPPED: dict[str, Callable[[], Any]] = {
    "compiled, then adapted": lambda: peft.get_peft_model(compiled(base_parts()), lora()),
    "adapted, then compiled": lambda: compiled(parts(lora())),
    "in parallel, then adapted": lambda: peft.get_peft_model(nn.DataParallel(base_parts()), lora()),
    "adapted, then in parallel": lambda: nn.DataParallel(parts(lora())),
    "injected": lambda: peft.inject_adapter_in_model(lora(), base_parts()),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_models(how: str) -> None:
    """A plan keeps the bare model's names, whatever is around it and around what is in it."""
    model = WRAPPED[how]()
    first = sf.adapt(BOTH, model)
    fit(model, optimizer_of(model, first))
    assert sf.adapt(BOTH, model) == first
    inner = model.module if how == "adapted, then in parallel" else model
    if how == "injected":
        assert not inner.layer.get_delta_weight("default")[BOTH[NAME].dense()].any()
    elif how == "in parallel, then adapted":
        merged = sf.merge_(inner, BOTH)
        sf.snapshot(base_parts(), BOTH).verify(merged)
    else:
        assert_merges(inner, BOTH)


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled])
def test_a_wrapper_hides_no_initialisation(wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        sf.adapt(freeze(), wrap(parts(lora(init_lora_weights="pissa"))))


def test_factors_over_the_same_memory_are_refused() -> None:
    """PEFT's own tie of an embedding's and a head's factors: two parameters, of which one may not move the other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    net = LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **shape))
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))
    plan = freeze("model.embed_tokens.weight", (20, 16))
    before = all_bytes(model)
    with pytest.raises(ValueError, match="share storage but are different parameters"):
        sf.adapt(plan, model)
    assert all_bytes(model) == before
