"""Attribution: finding units, scoring them, labelling them, and the plans that follow."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from safefreeze_kernels.attribution import (
    Family,
    MaskBuilder,
    SetScores,
    UnitLabels,
    UnitLayout,
    UnitScores,
    UnitSelection,
    encode_pairs,
    find_units,
    read_labels,
    register_family,
    score_units,
)
from safefreeze_kernels.attribution.units import FAMILIES, unit_masks
from safefreeze_kernels.masks import FreezePlan

transformers = pytest.importorskip("transformers")

LABEL_FILE = Path(__file__).parents[2] / "shared" / "data" / "llama2-7b-chat-ssah-labels.safetensors"
needs_labels = pytest.mark.skipif(not LABEL_FILE.is_file(), reason="the published label file is not here")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and on busy cores wait seconds for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------- things to test on


def tiny(model_type: str = "llama", **changes: Any) -> nn.Module:
    """A random model: 2 layers, hidden 32, 4 heads of 12 (not hidden / heads), 2 KV heads, 24 channels."""
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.AutoConfig.for_model(model_type, **{**settings, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" not in name:
                param.normal_(0, 0.3)
    return model


def batch_of(rows: list[list[int]], answers: list[int], side: str = "right") -> dict[str, torch.Tensor]:
    """A padded batch; ``answers[i]`` is how many tokens at the end of row i are response."""
    width = max(map(len, rows))
    batch = {key: torch.zeros(len(rows), width, dtype=torch.long) for key in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(rows), width), -100)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        batch["input_ids"][i, place] = torch.tensor(row)
        batch["attention_mask"][i, place] = 1
        batch["labels"][i, place] = torch.tensor([-100] * (len(row) - answer) + row[len(row) - answer :])
    return batch


def some_rows(n: int = 6, seed: int = 3) -> tuple[list[list[int]], list[int]]:
    draw = np.random.default_rng(seed)
    rows = [draw.integers(3, 64, size=draw.integers(5, 12)).tolist() for _ in range(n)]
    return rows, [int(draw.integers(1, len(row) - 1)) for row in rows]


ROWS, ANSWERS = some_rows()
OTHER_ROWS, OTHER_ANSWERS = some_rows(seed=4)
UTILITY = [batch_of(OTHER_ROWS, OTHER_ANSWERS)]


class Toy(nn.Module):
    """A plain module with a Llama's names and known activations: o_proj and down_proj are fed rows of a
    table.

    One layer, 2 heads of one feature, 2 channels, hidden 2; token t feeds ``table[t]`` to both.
    """

    def __init__(self, table: torch.Tensor, readers: torch.Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="llama", num_attention_heads=2)
        layer = nn.ModuleDict({"self_attn": nn.Module(), "mlp": nn.Module()})
        for module, names in (
            ("self_attn", "q_proj k_proj v_proj o_proj"),
            ("mlp", "gate_proj up_proj down_proj"),
        ):
            for name in names.split():
                setattr(layer[module], name, nn.Linear(2, 2, bias=False))
        self.layers = nn.ModuleList([layer])
        self.table = nn.Parameter(table)
        with torch.no_grad():
            layer["self_attn"].o_proj.weight.copy_(readers)
            layer["mlp"].down_proj.weight.copy_(2 * readers)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.table[input_ids]
        layer = self.layers[0]
        return layer["self_attn"].o_proj(hidden) + layer["mlp"].down_proj(hidden)


def toy_layout(n_layers: int = 2, n_heads: int = 4, n_kv_heads: int = 2, d_ff: int = 6, **more: int) -> UnitLayout:
    """A Llama layout with hidden 8 and heads of 2, from shapes alone."""
    size = {"hidden": 8, "head_dim": 2, **more}
    width, kv = n_heads * size["head_dim"], n_kv_heads * size["head_dim"]
    shapes = {
        "self_attn.q_proj": (width, size["hidden"]),
        "self_attn.k_proj": (kv, size["hidden"]),
        "self_attn.v_proj": (kv, size["hidden"]),
        "self_attn.o_proj": (size["hidden"], width),
        "mlp.gate_proj": (d_ff, size["hidden"]),
        "mlp.up_proj": (d_ff, size["hidden"]),
        "mlp.down_proj": (size["hidden"], d_ff),
    }
    names = {f"model.layers.{i}.{name}.weight": shape for i in range(n_layers) for name, shape in shapes.items()}
    return find_units(names, {"model_type": "llama", "num_attention_heads": n_heads})


LLAMA_2_7B = {"n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "d_ff": 11008, "hidden": 4096, "head_dim": 128}


def random_scores(layout: UnitLayout, seed: int = 0) -> UnitScores:
    generator = torch.Generator().manual_seed(seed)

    def one() -> SetScores:
        heads = torch.empty(layout.n_layers, layout.n_heads, layout.head_dim).exponential_(generator=generator)
        channels = torch.empty(layout.n_layers, layout.d_ff).exponential_(generator=generator)
        return SetScores(heads, channels, 10)

    return UnitScores(layout, one(), one())


def scores_from_channels(safety: list[float], utility: list[float]) -> UnitScores:
    """One layer, one head whose score is level (z = 0), and a channel per entry."""
    layout = toy_layout(n_layers=1, n_heads=1, n_kv_heads=1, d_ff=len(safety))
    sets = [SetScores(torch.ones(1, 1, 2), torch.tensor([values])) for values in (safety, utility)]
    return UnitScores(layout, *sets)


def flat(heads: Any, channels: Any) -> np.ndarray:
    return np.concatenate([np.asarray(heads).ravel(), np.asarray(channels).ravel()])


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# -------------------------------------------------------------------------------------------- units: finding


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_family_table_matches_the_model_class(model_type: str) -> None:
    model = tiny(model_type)
    layout = find_units(model)
    assert (layout.n_layers, layout.n_heads, layout.d_ff, layout.hidden_size) == (2, 4, 24, 32)
    assert layout.n_kv_heads == model.config.num_key_value_heads
    assert layout.head_dim == model.model.layers[0].self_attn.head_dim
    real = {name: tuple(param.shape) for name, param in model.named_parameters()}
    assert layout.parameters.items() <= real.items()
    # what is left out holds no units: embeddings, norms, head, biases of output projections
    left = {name for name in real.keys() - layout.parameters.keys() if "norm" not in name}
    assert left <= {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_family_heads_and_channels_are_where_the_table_says(model_type: str) -> None:
    """Zeroing KV head 1's values silences exactly the inputs of o_proj that query heads 2 and 3 own; zeroing
    row 5 of gate and up silences exactly channel 5."""
    model = tiny(model_type)
    layout = find_units(model)
    parameters = dict(model.named_parameters())
    heads = slice(layout.head_dim, 2 * layout.head_dim)
    with torch.no_grad():
        for name in ("self_attn.v_proj.weight", "self_attn.v_proj.bias"):
            if f"model.layers.1.{name}" in parameters:
                parameters[f"model.layers.1.{name}"][heads] = 0
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            parameters[f"model.layers.1.{name}"][5] = 0
    seen: dict[str, torch.Tensor] = {}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        module = model.get_submodule(f"model.layers.1.{name}")
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].detach()}))
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 9, 27, 11, 5]]))
    silent = (seen["self_attn.o_proj"] == 0).all(1).reshape(layout.n_heads, layout.head_dim)
    head_of_kv = torch.arange(layout.n_heads) // layout.group_size
    assert torch.equal(silent.all(1), head_of_kv == 1) and torch.equal(silent.any(1), head_of_kv == 1)
    assert torch.equal((seen["mlp.down_proj"] == 0).all(1)[0].nonzero().flatten(), torch.tensor([5]))


def test_biases_of_producers_are_found_and_biases_of_outputs_are_not() -> None:
    model = tiny("llama", attention_bias=True, mlp_bias=True)
    biases = {name for name in find_units(model).parameters if name.startswith("model.layers.0") and "bias" in name}
    assert {name.split(".")[-2] for name in biases} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert "model.layers.0.self_attn.o_proj.bias" in dict(model.named_parameters())


def test_names_follow_the_wrapper() -> None:
    model = tiny()
    assert "layers.1.mlp.up_proj.weight" in find_units(model.model).parameters
    wrapped = nn.ModuleDict({"a{b}": model})
    found = find_units(wrapped, model.config)
    assert found.parameters.items() <= {name: tuple(p.shape) for name, p in wrapped.named_parameters()}.items()


def test_checkpoint_shapes_and_a_config_dict_are_enough() -> None:
    model = tiny()
    assert find_units(model.state_dict(), model.config.to_dict()) == find_units(model)


def test_layout_survives_json() -> None:
    layout = find_units(tiny("qwen2"))
    assert UnitLayout.from_json(layout.to_json()) == layout
    for text in ("{}", "[]", "no", '{"names": 1}'):
        with pytest.raises(ValueError):
            UnitLayout.from_json(text)


def test_registered_family_works_like_a_built_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("phi")
    with pytest.raises(ValueError, match=r"model_type is 'phi', expected one of .*llama.*register_family\('phi'"):
        find_units(model)
    monkeypatch.delitem(FAMILIES, "phi", raising=False)  # for its clean-up
    llama = FAMILIES["llama"]
    names = {"attention_out": "layers.{layer}.self_attn.dense", "mlp_out": "layers.{layer}.mlp.fc2"}
    family = Family(llama.query, llama.key, llama.value, mlp_in=("layers.{layer}.mlp.fc1",), **names)
    monkeypatch.setitem(FAMILIES, "phi", llama)
    register_family("phi", family)
    scores = score_units(model, [batch_of(ROWS, ANSWERS)], UTILITY)
    plan = MaskBuilder(scores).freeze(share=1.0).build(model)
    plan.check(model)
    assert plan.frozen_fraction == 1.0
    assert "model.layers.0.mlp.fc1.bias" in plan and "model.layers.0.mlp.fc2.bias" not in plan


def test_register_family_refuses_what_cannot_work() -> None:
    llama = FAMILIES["llama"]
    with pytest.raises(TypeError, match="expected a Family"):
        register_family("x", {"query": "q"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mlp_in a tuple"):
        register_family("x", Family(*[llama.query] * 4, "layers.{layer}.up", llama.mlp_out))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'blocks.q' of 'x' has no '{layer}'"):
        register_family("x", Family("blocks.q", *[llama.key] * 3, llama.mlp_in, llama.mlp_out))
    assert "x" not in FAMILIES


def shapes_with(**changes: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, Any] = dict(toy_layout().parameters)
    for name, shape in changes.items():
        shapes[f"model.layers.{name[1]}.{name[3:].replace('__', '.')}.weight"] = shape
    return {name: shape for name, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize(
    ("shapes", "config", "message"),
    [
        (shapes_with(), None, "no config"),
        (shapes_with(), {"num_attention_heads": 4}, "model_type is None"),
        (shapes_with(), {"num_attention_heads": 3}, "num_attention_heads is 3, expected a divisor of 8"),
        (shapes_with(), {"num_attention_heads": None}, "num_attention_heads is None"),
        (
            shapes_with(),
            {"num_attention_heads": 4, "head_dim": 4},
            "head_dim=4, but the parameter shapes say 2",
        ),
        (shapes_with(), {"num_attention_heads": 4, "num_hidden_layers": 3}, "num_hidden_layers=3"),
        (shapes_with(), {"num_attention_heads": 4, "num_key_value_heads": 4}, "num_key_value_heads=4"),
        (
            shapes_with(l0_self_attn__k_proj=(3, 8)),
            {"num_attention_heads": 4},
            "has 3 rows, expected a whole number",
        ),
        (
            shapes_with(l0_self_attn__k_proj=(6, 8)),
            {"num_attention_heads": 4},
            "has 6 rows, expected a whole number",
        ),
        (
            shapes_with(l0_mlp__down_proj=None),
            {"num_attention_heads": 4},
            r"down_proj.weight' has shape \(missing\)",
        ),
        (
            shapes_with(l0_mlp__down_proj=(48,)),
            {"num_attention_heads": 4},
            r"has shape \(48,\), expected a matrix",
        ),
        (
            shapes_with(l1_mlp__up_proj=(9, 8)),
            {"num_attention_heads": 4},
            r"has shape \(9, 8\), expected \(6, 8\)",
        ),
        (
            shapes_with(l1_self_attn__q_proj=None),
            {"num_attention_heads": 4},
            r"q_proj.weight' has shape \(missing\)",
        ),
        (shapes_with(l0_self_attn__o_proj=None), {"num_attention_heads": 4}, "found none parameters named"),
        (
            {**shapes_with(), "other.layers.0.self_attn.o_proj.weight": (8, 8)},
            {"num_attention_heads": 4},
            r"found 2 \('model.', 'other.'\)",
        ),
    ],
)
def test_find_units_says_what_does_not_fit(shapes: dict[str, Any], config: dict[str, Any] | None, message: str) -> None:
    if config is not None and message != "model_type is None":
        config = {"model_type": "llama", **config}
    with pytest.raises(ValueError, match=message):
        find_units(shapes, config)


def test_a_bias_in_one_layer_only_is_refused() -> None:
    shapes = {**shapes_with(), "model.layers.1.mlp.up_proj.bias": (6,)}
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.bias' has shape \(missing\)"):
        find_units(shapes, {"model_type": "llama", "num_attention_heads": 4})


def test_head_cost_is_derived_from_shapes() -> None:
    # Llama-2-7B: a head has 4 pieces of 128 x 4096, a channel 3 of 4096
    assert toy_layout(**LLAMA_2_7B).head_cost == pytest.approx(4 * 128 / 3)
    # Llama-3-8B: q and o of 128, k and v of 128 shared by 4 query heads
    llama3 = {**LLAMA_2_7B, "n_kv_heads": 8, "d_ff": 14336}
    assert toy_layout(**llama3).head_cost == pytest.approx((2 + 2 / 4) * 128 / 3)
    # Qwen2, hidden 32, 4 heads of 12 over 2 KV heads, biases on q, k, v: a head has (12·32 + 12) in q, 12·32
    # in o and half of 2·(12·32 + 12) in k and v = 1176 parameters; a channel has 3·32 = 96
    layout = find_units(tiny("qwen2"))
    assert layout.head_dim == 12 and layout.head_cost == pytest.approx(1176 / 96)


# --------------------------------------------------------------------------------------- units: what freezes


def test_kv_policies_by_hand() -> None:
    """4 heads over 2 KV heads of 2 rows each; freeze one head of the first, both of the second."""
    layout = toy_layout(n_layers=1)
    heads, channels = np.array([[True, False, True, True]]), np.zeros((1, 6), bool)
    rows = {
        kv: unit_masks(layout, heads, channels, "full", kv).get("model.layers.0.self_attn.v_proj.weight")
        for kv in ("any", "all", "never")
    }
    assert rows["any"].rows.tolist() == [0, 1, 2, 3]
    assert rows["all"].rows.tolist() == [2, 3]
    assert rows["never"] is None
    masks = unit_masks(layout, heads, channels, "full", "never")
    assert masks["model.layers.0.self_attn.q_proj.weight"].rows.tolist() == [0, 1, 4, 5, 6, 7]
    assert masks["model.layers.0.self_attn.o_proj.weight"].cols.tolist() == [0, 1, 4, 5, 6, 7]
    assert set(masks) == {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"}


@pytest.mark.parametrize(("preset", "kv"), [("full", "any"), ("full", "never"), ("producer", "all")])
@pytest.mark.parametrize("biases", [False, True])
def test_zeroing_what_a_plan_freezes_removes_the_units(preset: str, kv: str, biases: bool) -> None:
    """Nothing else holds a unit: with its frozen rows and columns zeroed, the model computes what it computes
    with the unit's output cut off. (Only heads 2 and 3 read KV head 1: it can go with them.)
    """
    model = tiny("llama", attention_bias=biases, mlp_bias=biases)
    heads, channels = np.zeros((2, 4), bool), np.zeros((2, 24), bool)
    heads[0, 2:] = True
    channels[:, [1, 7, 8]] = True
    plan = UnitSelection(heads, channels).build(model, preset, kv)
    plan.check(model)
    ids = torch.tensor([[3, 9, 27, 11, 5, 40]])

    def cut(columns: np.ndarray) -> Any:
        live = torch.from_numpy(~columns).float()
        return lambda _, inputs: (inputs[0] * live,)

    handles = [
        model.get_submodule(f"model.layers.{i}.{name}").register_forward_pre_hook(cut(columns[i]))
        for i in range(2)
        for name, columns in (("self_attn.o_proj", heads.repeat(12, axis=1)), ("mlp.down_proj", channels))
    ]
    with torch.no_grad():
        removed = model(input_ids=ids).logits
        for handle in handles:
            handle.remove()
        whole = model(input_ids=ids).logits
        parameters = dict(model.named_parameters())
        for name, mask in plan.items():
            parameters[name][mask.dense()] = 0
        zeroed = model(input_ids=ids).logits
    assert not torch.allclose(removed, whole, atol=1e-3)
    torch.testing.assert_close(zeroed, removed, rtol=1e-5, atol=1e-5)


def test_producer_leaves_output_projections_alone_and_freezes_biases() -> None:
    model = tiny("qwen2")
    heads, channels = np.zeros((2, 4), bool), np.zeros((2, 24), bool)
    heads[1, 1] = channels[0, 3] = True
    plans = {preset: UnitSelection(heads, channels).build(model, preset) for preset in ("producer", "full")}
    attention = [f"model.layers.1.self_attn.{name}" for name in ("q_proj.weight", "q_proj.bias")]
    shared = [f"model.layers.1.self_attn.{n}.{kind}" for n in ("k_proj", "v_proj") for kind in ("weight", "bias")]
    mlp = [f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj")]
    assert set(plans["producer"]) == {*attention, *shared, *mlp}
    outputs = {"model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"}
    assert set(plans["full"]) == set(plans["producer"]) | outputs
    assert all(plans["producer"][name].rows.tolist() == list(range(12, 24)) for name in attention)
    assert all(plans["producer"][name].rows.tolist() == list(range(12)) for name in shared)
    assert all(plans["producer"][name].rows.tolist() == [3] for name in mlp)
    assert plans["producer"].metadata["frozen_heads"] == plans["producer"].metadata["frozen_channels"] == 1
    assert plans["producer"].metadata["preset"] == "producer"


def test_unit_masks_refuses_what_does_not_fit() -> None:
    layout = toy_layout()
    heads, channels = np.zeros((2, 4), bool), np.zeros((2, 6), bool)
    with pytest.raises(ValueError, match="preset is 'half', expected one of 'full', 'producer'"):
        unit_masks(layout, heads, channels, "half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kv is 'some', expected one of 'any', 'all', 'never'"):
        unit_masks(layout, heads, channels, "full", "some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"heads is int64 of shape \(2, 4\), expected bool"):
        unit_masks(layout, heads.astype(np.int64), channels)
    with pytest.raises(ValueError, match=r"channels is bool of shape \(2, 5\), expected bool \(2, 6\)"):
        unit_masks(layout, heads, channels[:, 1:])


# ---------------------------------------------------------------------------------------------------- scores


def expected_scores(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula over all activations at once: variance by torch.var, squared norms by hand."""
    scores = []
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        per_layer = []
        for layer in range(2):
            module = model.get_submodule(f"model.layers.{layer}.{name}")
            rows: list[torch.Tensor] = []
            handle = module.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0]))
            with torch.no_grad():
                for batch in batches:
                    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            handle.remove()
            kept = [
                x[i, t]
                for x, batch in zip(rows, batches, strict=True)
                for i in range(x.shape[0])
                for t in range(x.shape[1] - 1)
                if batch["labels"][i, t + 1] != -100
            ]
            weight = module.weight.detach().double()
            per_layer.append(torch.var(torch.stack(kept).double(), dim=0) * weight.pow(2).sum(0))
        scores.append(torch.stack(per_layer))
    return scores[0], scores[1]


def test_scores_are_the_papers_formula() -> None:
    model = tiny()
    batches = [batch_of(ROWS[:2], ANSWERS[:2]), batch_of(ROWS[2:], ANSWERS[2:])]
    scores = score_units(model, batches, UTILITY)
    features, channels = expected_scores(model, batches)
    torch.testing.assert_close(scores.safety.head_features.reshape(2, 48).double(), features, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(scores.safety.channels.double(), channels, rtol=1e-5, atol=1e-9)
    heads = features.reshape(2, 4, 12).mean(2)
    torch.testing.assert_close(scores.safety.heads.double(), heads, rtol=1e-5, atol=1e-9)
    assert scores.safety.n_positions == sum(ANSWERS) and scores.utility.n_positions == sum(OTHER_ANSWERS)
    assert scores.safety.heads.shape == (2, 4) and scores.safety.channels.shape == (2, 24)
    features, channels = expected_scores(model, UTILITY)
    torch.testing.assert_close(scores.utility.channels.double(), channels, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2], [1, 1, 1, 1, 1, 1]])
def test_scores_do_not_depend_on_batching_or_padding(sizes: list[int], side: str) -> None:
    model = tiny()
    whole = score_units(model, [batch_of([row], [n]) for row, n in zip(ROWS, ANSWERS, strict=True)], UTILITY)
    ends = np.cumsum(sizes)
    split = [batch_of(ROWS[end - n : end], ANSWERS[end - n : end], side) for n, end in zip(sizes, ends, strict=True)]
    scores = score_units(model, iter(split), iter(UTILITY))
    assert scores.safety.n_positions == whole.safety.n_positions
    torch.testing.assert_close(scores.safety.head_features, whole.safety.head_features, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(scores.safety.channels, whole.safety.channels, rtol=2e-4, atol=1e-6)


#: Tokens 0 to 3 feed these rows to both readers; column norms² are 1 and 4 (o_proj), 4 and 16 (down_proj).
TOY_TABLE = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 2.0], [100.0, 100.0]])
TOY_READERS = torch.tensor([[1.0, 0.0], [0.0, 2.0]])


def toy_scores(labels: list[int], positions: str = "predicting", **more: Any) -> SetScores:
    batch = {"input_ids": torch.tensor([[0, 1, 2, 3]]), "labels": torch.tensor([labels]), **more}
    return score_units(Toy(TOY_TABLE, TOY_READERS), [batch], [batch], positions=positions).safety  # type: ignore[arg-type]


def test_positions_by_hand() -> None:
    """Response = tokens 2 and 3. Predicting them: positions 1, 2, rows (3, 0) and (5, 2): variances 2, 2."""
    scores = toy_scores([-100, -100, 2, 3])
    assert scores.n_positions == 2
    assert scores.head_features.flatten().tolist() == [2.0 * 1, 2.0 * 4]
    assert scores.channels.tolist() == [[2.0 * 4, 2.0 * 16]]
    # the response tokens themselves: rows (5, 2) and (100, 100), variances 95²/2 and 98²/2
    scores = toy_scores([-100, -100, 2, 3], "response")
    assert scores.head_features.flatten().tolist() == [95**2 / 2, 4 * 98**2 / 2]
    # all, the last one padded away: rows (1, 0), (3, 0), (5, 2): variances 4 and 4/3; labels do not matter
    scores = toy_scores([-100] * 4, "all", attention_mask=torch.tensor([[1, 1, 1, 0]]))
    assert scores.n_positions == 3
    torch.testing.assert_close(scores.head_features.flatten(), torch.tensor([4.0, 4 * 4 / 3]))


def test_a_response_from_the_first_token_on_has_no_position_before_it() -> None:
    assert toy_scores([0, 1, 2, 3]).n_positions == 3


def test_masked_positions_do_not_count_even_with_labels() -> None:
    labels = [-100, 1, 2, 3]
    assert toy_scores(labels, attention_mask=torch.tensor([[1, 1, 0, 0]])).n_positions == 2


def test_variance_survives_a_large_mean() -> None:
    """Mean 1000, deviations of 0.001: in float32 squares lose them and the mean's own rounding shows."""
    noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
    table = (1000 + 0.001 * noise).float()
    batches = [{"input_ids": ids[None], "labels": ids[None]} for ids in torch.arange(300).split(7)]
    counted = torch.cat([batch["input_ids"][0, :-1] for batch in batches])
    scores = score_units(Toy(table, torch.eye(2)), batches, batches)
    torch.testing.assert_close(
        scores.safety.head_features.flatten().double(),
        torch.var(table[counted].double(), dim=0),
        rtol=1e-5,
        atol=0,
    )


def test_low_precision_activations_are_accumulated_in_high_precision() -> None:
    table = torch.randn(64, 2, generator=torch.Generator().manual_seed(2)).bfloat16()
    ids = torch.arange(64)[None]
    scores = score_units(
        Toy(table, torch.eye(2)).bfloat16(),
        [{"input_ids": ids, "labels": ids}] * 2,
        [{"input_ids": ids, "labels": ids}],
    )
    rows = table[:-1].double().repeat(2, 1)
    torch.testing.assert_close(scores.safety.channels[0].double(), 4 * torch.var(rows, dim=0), rtol=1e-5, atol=0)


def test_modes_and_hooks_are_left_as_found() -> None:
    model = tiny().train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    seen: list[bool] = []
    model.model.layers[1].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    before = hook_count(model)
    weights = {name: param.clone() for name, param in model.named_parameters()}
    score_units(model, [batch_of(ROWS, ANSWERS)], UTILITY)
    assert seen == [False, False]
    assert [module.training for module in model.modules()] == modes and hook_count(model) == before
    assert all(param.grad is None and torch.equal(param, weights[name]) for name, param in model.named_parameters())

    def failing() -> Any:
        yield batch_of(ROWS, ANSWERS)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        score_units(model, failing(), UTILITY)
    assert [module.training for module in model.modules()] == modes and hook_count(model) == before


def test_sets_may_be_generators_and_show_progress(capsys: pytest.CaptureFixture[str]) -> None:
    batch = batch_of(ROWS, ANSWERS)
    quiet = score_units(tiny(), [batch, batch], UTILITY)
    assert capsys.readouterr().err == ""
    loud = score_units(tiny(), (batch for _ in range(2)), iter(UTILITY), progress=True)
    assert torch.equal(quiet.safety.channels, loud.safety.channels)
    bars = capsys.readouterr().err
    assert "scoring safety" in bars and "scoring utility" in bars


def bad_batch(**changes: Any) -> dict[str, Any]:
    batch = {**batch_of(ROWS, ANSWERS), **changes}
    return {key: value for key, value in batch.items() if value is not None}


@pytest.mark.parametrize(
    ("safety", "kind", "message"),
    [
        ([], ValueError, "safety holds no batches"),
        (
            [batch_of(ROWS, [0] * 6)],
            ValueError,
            "safety has 0 counted positions in 1 batches, expected at least 2",
        ),
        ([batch_of(ROWS[:1], [1])], ValueError, "safety has 1 counted positions"),
        (batch_of(ROWS, ANSWERS), TypeError, r"safety is one batch, .* pass \[batch\]"),
        ([torch.ones(2, 3)], TypeError, "batch 0 of safety is a Tensor, expected a mapping"),
        ([bad_batch(), bad_batch(labels=None)], ValueError, "batch 1 of safety has no 'labels'"),
        ([bad_batch(input_ids=None)], ValueError, "batch 0 of safety has no 'input_ids'"),
        ([bad_batch(labels=torch.ones(6, 2))], ValueError, r"labels has shape \(6, 2\) and input_ids \(6, "),
        ([bad_batch(attention_mask=torch.ones(6))], ValueError, r"attention_mask has shape \(6,\)"),
    ],
)
def test_score_units_refuses_bad_sets(safety: Any, kind: type[Exception], message: str) -> None:
    model = tiny()
    with pytest.raises(kind, match=message):
        score_units(model, safety, UTILITY)
    assert hook_count(model) == 0


def test_score_units_refuses_bad_words_and_models() -> None:
    good = [batch_of(ROWS, ANSWERS)]
    with pytest.raises(ValueError, match="method is 'wanda', expected one of 'fluctuation'"):
        score_units(tiny(), good, good, method="wanda")
    with pytest.raises(ValueError, match="positions is 'prompt', expected one of 'predicting', 'response', 'all'"):
        score_units(tiny(), good, good, positions="prompt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        score_units(tiny("gpt2"), good, good)
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.o_proj.weight' is on the meta device"):
        score_units(tiny().to("meta"), good, good)
    used_up = iter(good)
    with pytest.raises(ValueError, match="utility holds no batches"):
        score_units(tiny(), used_up, used_up)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_activations_are_named(value: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[4, 0] = value
    with pytest.raises(ValueError, match=r"input of 'model.layers.1.mlp.down_proj' is NaN or infinite on the safety"):
        score_units(model, [batch_of(ROWS, ANSWERS)], UTILITY)
    assert hook_count(model) == 0


def test_a_layer_that_does_not_run_is_an_error() -> None:
    model = Toy(TOY_TABLE, TOY_READERS)
    model.forward = lambda input_ids: model.layers[0]["mlp"].down_proj(model.table[input_ids])  # type: ignore[method-assign]
    ids = torch.tensor([[0, 1, 2]])
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(ValueError, match=r"'layers.0.self_attn.o_proj' saw 0 positions of the safety set, expected 2"):
        score_units(model, [batch], [batch])
    model.forward = lambda input_ids: model.layers[0]["mlp"].down_proj(model.table[input_ids].flatten(0, 1))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"'layers.0.mlp.down_proj' received \(3, 2\), expected \(1, 3\) positions"):
        score_units(model, [batch], [batch])


def test_scores_survive_a_file(tmp_path: Path) -> None:
    scores = score_units(tiny("qwen2"), [batch_of(ROWS, ANSWERS)], UTILITY)
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    loaded = UnitScores.load(path)
    assert loaded.layout == scores.layout and loaded.method == "fluctuation"
    for mine, theirs in ((scores.safety, loaded.safety), (scores.utility, loaded.utility)):
        assert torch.equal(mine.head_features, theirs.head_features) and torch.equal(mine.channels, theirs.channels)
        assert mine.n_positions == theirs.n_positions
    before, after = (MaskBuilder(s).freeze(cu=0.06).build() for s in (scores, loaded))
    assert before == after
    assert "qwen2" in repr(loaded) and f"{sum(ANSWERS)} safety" in repr(loaded)


def test_score_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    with pytest.raises(FileNotFoundError, match="no file"):
        UnitScores.load(path)
    random_scores(toy_layout()).save(path)
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:40],
        whole[:-1],
        whole.replace(b"safefreeze.unit_scores", b"safefreeze.unit_thores"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a score file this package reads"):
            UnitScores.load(path)
    UnitLabels(torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(1, 3, dtype=torch.uint8)).save(path)
    with pytest.raises(ValueError, match="format None"):
        UnitScores.load(path)


def test_set_scores_are_checked() -> None:
    layout = toy_layout()
    ones = torch.ones
    assert SetScores(ones(2, 4), ones(2, 6)).heads.tolist() == ones(2, 4).tolist()
    with pytest.raises(ValueError, match=r"head_features has shape \(4,\)"):
        SetScores(ones(4), ones(2, 6))
    with pytest.raises(ValueError, match=r"channels \(3, 6\)"):
        SetScores(ones(2, 4), ones(3, 6))
    for bad in (math.nan, math.inf, 1e39):
        channels = ones(2, 6, dtype=torch.float64)
        channels[1, 2] = bad
        with pytest.raises(ValueError, match="channels of layer 1 holds NaN or inf"):
            SetScores(ones(2, 4), channels)
    good = SetScores(ones(2, 4), ones(2, 6))
    with pytest.raises(ValueError, match=r"utility scores heads \(2, 4\) and channels \(2, 7\), expected .*\(2, 6\)"):
        UnitScores(layout, good, SetScores(ones(2, 4), ones(2, 7)))


# ----------------------------------------------------------------------------------------------- calibration

VOCABULARY = "<pad> <bos> <end> <user> <bot> how do i bake rob bread sorry no flour and water \n"
WORDS = VOCABULARY.split(" ")
CHAT = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}{{ m['content'] }}"
    "{{ ' <end> \n ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def word_tokenizer(**settings: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", **settings)


def words_of(ids: torch.Tensor) -> str:
    return " ".join(WORDS[i] for i in ids.tolist())


def test_pairs_go_through_the_chat_template() -> None:
    tokenizer = word_tokenizer(chat_template=CHAT, pad_token="<pad>")
    pairs = [("how do i rob bread", "sorry no"), ("bake", "flour and water"), ("bread", "no")]
    batches = encode_pairs(tokenizer, pairs, batch_size=2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 12), (1, 7)]
    first = batches[0]
    assert words_of(first["input_ids"][0]) == "<user> how do i rob bread <end> \n <bot> sorry no <end>"
    for batch in batches:
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        response = batch["labels"] != -100
        assert torch.equal(batch["labels"][response], batch["input_ids"][response])
    said = [words_of(b["input_ids"][i][b["labels"][i] != -100]) for b in batches for i in range(len(b["labels"]))]
    assert said == ["sorry no <end>", "flour and water <end>", "no <end>"]
    assert first["attention_mask"][1].tolist() == [1] * 9 + [0] * 3
    assert set(first["input_ids"][1, 9:].tolist()) == {0} and set(first["labels"][1, 9:].tolist()) == {-100}


def test_pairs_without_a_template_are_joined() -> None:
    tokenizer = word_tokenizer()
    assert tokenizer.pad_token_id is None
    (batch,) = encode_pairs(tokenizer, [("bake bread ", "flour "), ("rob ", "no ")])
    assert words_of(batch["input_ids"][0]) == "<bos> bake bread flour <end>"
    assert words_of(batch["input_ids"][0][batch["labels"][0] != -100]) == "flour <end>"
    assert words_of(batch["input_ids"][1][batch["labels"][1] != -100]) == "no <end>"
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_pairs_are_cut_to_length_and_checked() -> None:
    tokenizer = word_tokenizer(chat_template=CHAT)
    (batch,) = encode_pairs(tokenizer, [("bake", "flour and water")], max_length=6)
    assert words_of(batch["input_ids"][0]) == "<user> bake <end> \n <bot> flour"
    with pytest.raises(ValueError, match=r"pair 0 has 5 prompt and 2 response tokens, .* within max_length=5"):
        encode_pairs(tokenizer, iter([("bake", "no")]), max_length=5)
    with pytest.raises(ValueError, match="no pairs given"):
        encode_pairs(tokenizer, [])
    for bad in ("ab", ("a",), ("a", 3), ("a", "b", "c")):
        with pytest.raises(TypeError, match=r"pair 0 is .*expected"):
            encode_pairs(tokenizer, [bad])  # type: ignore[list-item]
    for sizes in ({"max_length": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="is 0, expected at least 1"):
            encode_pairs(tokenizer, [("a", "b")], **sizes)


def test_pairs_can_be_scored() -> None:
    tokenizer = word_tokenizer(chat_template=CHAT)
    batches = encode_pairs(tokenizer, [("rob", "sorry no"), ("bake bread", "flour and water")], batch_size=1)
    scores = score_units(tiny(), batches, batches)
    assert scores.safety.n_positions == 3 + 4  # each response and its end of turn
    assert torch.equal(scores.safety.channels, scores.utility.channels)


# ---------------------------------------------------------------------------------------------------- labels


def test_labels_by_hand() -> None:
    """10 channels and one level head that costs 4·2·8 / (3·8) = 2.67 channels: cost 12.67 in all. z-scores
    keep the order of scores; safety and utility below are permutations of each other, so their z-scores use
    one scale.

    diff (S - U) is highest for channel 0 (9-0) and lowest for channel 9 (0-9); sums are 9, 9, ... except
    channels 4 and 5 (1 + 1 and 2 + 2, the lowest) and channel 6 (8 + 8).
    """
    safety = [9.0, 7, 6, 5, 1, 2, 8, 4, 3, 0]
    utility = [0.0, 3, 4, 6, 1, 2, 8, 5, 7, 9]
    builder = MaskBuilder(scores_from_channels(safety, utility), {"RU": 0.16, "SCU": 0.08, "UCU": 0.08})
    # targets: RU 2.03 -> 2 units, SCU and UCU 1.01 -> 1 unit each
    assert builder.labels.channels.tolist() == [[1, 3, 3, 3, 0, 0, 3, 3, 3, 2]]
    assert builder.labels.heads.tolist() == [[3]]
    assert builder.labels.counts() == {"RU": (0, 2), "SCU": (0, 1), "UCU": (0, 1), "CU": (1, 6)}
    assert "SCU 0 heads + 1 channels" in repr(builder.labels)
    # UCU overwrites RU where both want a unit
    builder = MaskBuilder(scores_from_channels(safety, utility), {"RU": 0.16, "SCU": 0.08, "UCU": 0.92})
    assert builder.labels.counts()["RU"] == (0, 0) and builder.labels.counts()["SCU"] == (0, 1)


def test_ties_go_to_the_lowest_index_and_counts_stay_exact() -> None:
    # every diff is 0; odd channels have the high sum
    scores = scores_from_channels([1.0, 2.0] * 10, [1.0, 2.0] * 10)
    ratios = {"RU": 3 / 22.67, "SCU": 2 / 22.67, "UCU": 2 / 22.67}
    builder = MaskBuilder(scores, ratios, head_cost=2.67)
    # all tied at diff 0, heads come first: SCU takes the head (2.67, nearest to 2), UCU the first channels;
    # RU wants channels 0, 2, 4 and loses 0 to UCU
    assert builder.labels.heads.tolist() == [[1]]
    assert builder.labels.channels.tolist()[0] == [2, 2, 0, 3, 0] + [3] * 15
    # CU by sum: the odd channels first, the lowest index first
    frozen = builder.freeze(scu=False, cu=3 / 22.67)
    assert np.flatnonzero(frozen.channels[0]).tolist() == [3, 5, 7]


@pytest.mark.parametrize("head_cost", [None, 5.0])
@pytest.mark.parametrize("ratio", [0.0, 0.003, 0.1, 0.5])
def test_counts_come_nearest_to_the_cost_share(ratio: float, head_cost: float | None) -> None:
    layout = toy_layout(n_layers=3, n_heads=4, d_ff=200)
    builder = MaskBuilder(random_scores(layout), {"RU": ratio, "SCU": ratio, "UCU": 0.0}, head_cost=head_cost)
    cost = head_cost or layout.head_cost
    heads, channels = builder.labels.counts()["SCU"]
    target = ratio * (12 * cost + 600)
    if ratio == 0:
        assert (heads, channels) == (0, 0)
    else:
        # the prefix before and after the last unit are no nearer, and no unit costs more than a head
        assert heads + channels > 0 and abs(heads * cost + channels - target) <= max(cost, 1) / 2 + 1e-9


def test_standardization_is_per_layer_and_apart() -> None:
    """A layer whose scores are a thousand times larger, or attention against MLP, gains nothing by that."""
    layout = toy_layout(n_layers=2, d_ff=50)
    scores = random_scores(layout)
    scale_heads = torch.tensor([3.0, 0.01])[:, None, None]
    scale_channels = torch.tensor([1000.0, 0.5])[:, None]

    def rescaled(one: SetScores) -> SetScores:
        return SetScores(one.head_features * scale_heads, one.channels * scale_channels + 7)

    other = UnitScores(layout, rescaled(scores.safety), rescaled(scores.utility))
    ratios = {"RU": 0.3, "SCU": 0.2, "UCU": 0.2}
    mine, theirs = MaskBuilder(scores, ratios).labels, MaskBuilder(other, ratios).labels
    assert torch.equal(mine.heads, theirs.heads) and torch.equal(mine.channels, theirs.channels)
    assert len(torch.unique(mine.channels)) == 4


def prototype_labels(scores: UnitScores, ratios: tuple[float, float, float]) -> np.ndarray:
    """The prototype's recipe in its own terms: thresholds on descending rankings, nearest cumulative cost."""

    def z(raw: torch.Tensor) -> torch.Tensor:
        return (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True)

    flat_z = []
    for one in (scores.safety, scores.utility):
        squared = one.head_features.double().square()
        heads = z(squared.flatten(1)).reshape(squared.shape).mean(2)
        flat_z.append(torch.cat([heads.flatten(), z(one.channels.double()).flatten()]))
    n_heads = scores.layout.n_layers * scores.layout.n_heads
    total, diff = flat_z[0] + flat_z[1], flat_z[0] - flat_z[1]

    def threshold(values: torch.Tensor, share_above: float) -> torch.Tensor:
        ranked, index = torch.sort(values, descending=True)
        reached = torch.where(index < n_heads, 170, 1).cumsum(0)
        return ranked[(reached - reached[-1] * share_above).abs().argmin()]

    labels = torch.full_like(total, 3)
    labels[total <= threshold(total, 1 - ratios[0])] = 0
    labels[diff >= threshold(diff, ratios[1])] = 1
    labels[diff <= threshold(diff, 1 - ratios[2])] = 2
    return labels.numpy().astype(np.uint8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratios", [(0.1, 0.01, 0.1), (0.3, 0.2, 0.37)])
def test_prototype_recipe_repeats_the_prototype(seed: int, ratios: tuple[float, float, float]) -> None:
    scores = random_scores(toy_layout(n_layers=3, n_heads=6, n_kv_heads=3, d_ff=1000), seed)
    named = dict(zip(("RU", "SCU", "UCU"), ratios, strict=True))
    labels = MaskBuilder(scores, named, recipe="ssah-prototype").labels
    np.testing.assert_array_equal(flat(labels.heads, labels.channels), prototype_labels(scores, ratios))
    paper = MaskBuilder(scores, named).labels
    assert not np.array_equal(flat(paper.heads, paper.channels), flat(labels.heads, labels.channels))


@pytest.mark.parametrize("recipe", ["paper", "ssah-prototype"])
def test_level_scores_are_no_division_by_zero(recipe: Any) -> None:
    layout = toy_layout()
    level = SetScores(torch.full((2, 4, 2), 0.1), torch.full((2, 6), 0.1))
    builder = MaskBuilder(UnitScores(layout, level, level), recipe=recipe)
    assert np.array_equal(builder._rank_values("safety"), np.zeros(20))


def test_builder_refuses_bad_settings() -> None:
    scores = random_scores(toy_layout())
    with pytest.raises(ValueError, match="recipe is 'mine', expected one of 'paper', 'ssah-prototype'"):
        MaskBuilder(scores, recipe="mine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ratios names 'CU', expected 'RU', 'SCU' and 'UCU'"):
        MaskBuilder(scores, {"CU": 0.1})
    for bad in (-0.1, 1.1, math.nan, "a", True):
        with pytest.raises(ValueError, match=r"ratio of RU is .*, expected a fraction from 0 to 1"):
            MaskBuilder(scores, {"RU": bad})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="expected a sum of at most 1"):
        MaskBuilder(scores, {"SCU": 0.6, "UCU": 0.6})
    with pytest.raises(TypeError, match="scores is a dict, expected UnitScores or UnitLabels"):
        MaskBuilder({})  # type: ignore[arg-type]
    for cost in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="head_cost is"):
            MaskBuilder(scores, head_cost=cost)
    with pytest.raises(ValueError, match="ratios given with finished labels"):
        MaskBuilder(MaskBuilder(scores).labels, {"RU": 0.1})


def test_labels_are_checked_and_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.safetensors"
    labels = MaskBuilder(random_scores(toy_layout()), {"RU": 0.3, "SCU": 0.2, "UCU": 0.2}).labels
    labels.save(path)
    loaded = read_labels(path)
    assert torch.equal(loaded.heads, labels.heads) and torch.equal(loaded.channels, labels.channels)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_labels(tmp_path / "none")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a safetensors file with attention_heads and mlp_channels"):
        read_labels(path)
    random_scores(toy_layout()).save(path)
    with pytest.raises(ValueError, match="not a safetensors file with attention_heads and mlp_channels"):
        read_labels(path)
    codes = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"channels has dtype torch.float32, expected integer codes"):
        UnitLabels(codes, codes.float())
    with pytest.raises(ValueError, match="heads holds codes from 0 to 4"):
        UnitLabels(codes + torch.tensor([0, 0, 4]), codes)
    with pytest.raises(ValueError, match=r"heads has shape \(3,\)"):
        UnitLabels(codes[0], codes)
    with pytest.raises(ValueError, match="heads has 1 layers and channels 2"):
        UnitLabels(codes[:1], codes)


# ------------------------------------------------------------------------------------------------- selecting


def builder_with_costs(**ratios: float) -> tuple[MaskBuilder, np.ndarray, np.ndarray]:
    """A builder, its flat labels and the flat costs of units."""
    layout = toy_layout(n_layers=3, n_heads=4, d_ff=300)
    builder = MaskBuilder(random_scores(layout, seed=5), ratios or None)
    costs = np.concatenate([np.full(12, layout.head_cost), np.ones(900)])
    return builder, flat(builder.labels.heads, builder.labels.channels), costs


def chosen(selection: UnitSelection) -> np.ndarray:
    return flat(selection.heads, selection.channels)


def test_freeze_by_label() -> None:
    builder, codes, _ = builder_with_costs()
    assert np.array_equal(chosen(builder.freeze()), codes == 1)
    assert np.array_equal(chosen(builder.freeze(scu=True, cu=True)), (codes == 1) | (codes == 3))
    assert np.array_equal(chosen(builder.freeze(scu=False, cu=True)), codes == 3)
    assert not chosen(builder.freeze(scu=False)).any()
    assert np.array_equal(chosen(builder.train_only("RU")), codes != 0)
    assert np.array_equal(chosen(builder.train_only("SCU")), codes != 1)


@pytest.mark.parametrize("rank", ["sum", "safety", "utility", "diff"])
@pytest.mark.parametrize("share_of", ["units", "cu"])
def test_top_cu_are_the_highest_ranked_up_to_the_share(share_of: Any, rank: Any) -> None:
    builder, codes, costs = builder_with_costs()
    frozen = chosen(builder.freeze(scu=True, cu=0.06, cu_share_of=share_of, cu_rank=rank))
    assert frozen[codes == 1].all() and not frozen[(codes == 0) | (codes == 2)].any()
    of = costs.sum() if share_of == "units" else costs[codes == 3].sum()
    assert abs(costs[frozen & (codes == 3)].sum() - 0.06 * of) <= costs.max() / 2
    values = builder._rank_values(rank)
    assert values[frozen & (codes == 3)].min() >= values[~frozen & (codes == 3)].max()


def test_all_cu_in_three_spellings() -> None:
    builder, codes, costs = builder_with_costs()
    everything = chosen(builder.freeze(cu=True))
    assert np.array_equal(chosen(builder.freeze(cu=1.0, cu_share_of="cu")), everything)
    share = costs[codes == 3].sum() / costs.sum()
    assert np.array_equal(chosen(builder.freeze(cu=share * (1 - 1e-12))), everything)
    with pytest.raises(ValueError, match=r"cu=1.0 asks for 100.0% .*, expected at most 79.*; pass cu=True"):
        builder.freeze(cu=1.0)
    assert np.array_equal(chosen(builder.freeze(cu=0.0)), codes == 1)


def test_a_share_takes_scu_then_cu_then_ucu_then_ru() -> None:
    builder, codes, costs = builder_with_costs()
    previous = np.zeros(codes.size, bool)
    complete = {1: 0.011, 3: 0.80, 2: 0.91, 0: 1.0}  # by then, labels in this order are used up
    order = list(complete)
    for share in (0.0, 0.005, 0.011, 0.4, 0.80, 0.85, 0.91, 0.95, 1.0):
        frozen = chosen(builder.freeze(share=share))
        assert abs(costs[frozen].sum() - share * costs.sum()) <= costs.max() / 2 + 1e-9
        assert (frozen | ~previous).all()  # more share, the same units and more
        for place, code in enumerate(order):
            if frozen[codes == code].any():
                assert all(frozen[codes == earlier].all() for earlier in order[:place])
        previous = frozen
    assert previous.all()
    for rank in ("sum", "safety"):
        some = chosen(builder.freeze(share=0.4, cu_rank=rank))
        values = builder._rank_values(rank)
        assert values[some & (codes == 3)].min() >= values[~some & (codes == 3)].max()
    few = chosen(builder.freeze(share=0.005))
    diff = builder._rank_values("diff")
    assert few.any() and diff[few].min() >= diff[~few].max()


def test_alignment_budget_trains_the_least_useful_units() -> None:
    builder, _, costs = builder_with_costs()
    live = ~chosen(builder.train_only("RU", 0.2))
    utility = builder._rank_values("utility")
    assert abs(costs[live].sum() - 0.2 * costs.sum()) <= costs.max() / 2
    assert utility[live].max() <= utility[~live].min()
    assert not (~chosen(builder.train_only("RU", 0.0))).any()


def test_freeze_refuses_bad_requests() -> None:
    builder, _, _ = builder_with_costs()
    for bad in (-0.1, 1.1, math.nan, "half"):
        with pytest.raises(ValueError, match=r"freeze: cu is .*, expected a fraction from 0 to 1"):
            builder.freeze(cu=bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"freeze: share is .*, expected a fraction from 0 to 1"):
            builder.freeze(share=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="freeze: share is True"):
        builder.freeze(share=True)
    for more in ({"cu": 0.1}, {"cu": True}, {"scu": False}):
        with pytest.raises(ValueError, match="share given with scu or cu"):
            builder.freeze(share=0.5, **more)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cu_share_of is 'all', expected one of 'units', 'cu'"):
        builder.freeze(cu=0.1, cu_share_of="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cu_rank is 'size', expected one of 'sum', 'safety', 'utility', 'diff'"):
        builder.freeze(cu=0.1, cu_rank="size")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="label is 'XU', expected one of 'RU', 'SCU', 'UCU', 'CU'"):
        builder.train_only("XU")
    with pytest.raises(ValueError, match="share given with label 'CU', expected it with 'RU' only"):
        builder.train_only("CU", 0.1)
    with pytest.raises(ValueError, match="train_only: share is 2"):
        builder.train_only("RU", 2)


def test_labels_alone_freeze_whole_labels_only() -> None:
    scored, codes, _ = builder_with_costs()
    builder = MaskBuilder(scored.labels)
    assert np.array_equal(chosen(builder.freeze(cu=True)), (codes == 1) | (codes == 3))
    assert np.array_equal(chosen(builder.train_only("RU")), codes != 0)
    for ask in (
        lambda: builder.freeze(cu=0.06),
        lambda: builder.freeze(share=0.8),
        lambda: builder.train_only("RU", 0.2),
    ):
        with pytest.raises(ValueError, match="labels carry no scores; freeze whole labels"):
            ask()
    with pytest.raises(ValueError, match="labels do not say which model"):
        builder.freeze().build()
    assert builder.freeze(cu=True).build(scored.layout) == scored.freeze(cu=True).build()


def test_build_refuses_another_model() -> None:
    selection = MaskBuilder(random_scores(toy_layout())).freeze(cu=True)
    with pytest.raises(ValueError, match=r"heads \(2, 4\) and channels \(2, 6\), expected \(2, 4\) and \(2, 24\)"):
        selection.build(tiny())
    with pytest.raises(ValueError, match="preset is 'both'"):
        selection.build(preset="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        selection.build(tiny("gpt2"))


def test_from_scores_to_a_plan(tmp_path: Path) -> None:
    model = tiny()
    scores = score_units(model, [batch_of(ROWS, ANSWERS)], UTILITY)
    plan = MaskBuilder(scores).freeze(scu=True, cu=0.06).build(model)
    plan.check(model)
    assert 0 < plan.frozen_fraction < 1
    assert plan.metadata["recipe"] == "paper" and plan.metadata["ratios"] == {
        "RU": 0.1,
        "SCU": 0.01,
        "UCU": 0.1,
    }
    assert plan.metadata["selection"] == {"scu": True, "cu": 0.06, "cu_share_of": "units", "cu_rank": "sum"}
    plan.save(tmp_path / "plan.safetensors")
    assert FreezePlan.load(tmp_path / "plan.safetensors").metadata == plan.metadata
    assert not MaskBuilder(scores).freeze(share=0.0).build(model)
    everything = MaskBuilder(scores).freeze(share=1.0).build(model)
    assert everything.frozen_fraction == 1.0 and set(everything) == set(scores.layout.parameters)


def test_random_control_has_the_same_counts_per_layer() -> None:
    builder, _, _ = builder_with_costs()
    selection = builder.freeze(share=0.3)
    control = selection.random_like(7)
    for mine, theirs in ((selection.heads, control.heads), (selection.channels, control.channels)):
        assert np.array_equal(mine.sum(1), theirs.sum(1))
    assert not np.array_equal(control.channels, selection.channels)
    assert np.array_equal(control.channels, selection.random_like(7).channels)
    assert not np.array_equal(control.channels, selection.random_like(8).channels)
    assert control.build().metadata["random_like"] == 7


def test_selections_are_compared_and_checked() -> None:
    heads = np.zeros((1, 2), bool)
    one, two = (UnitSelection(heads, np.array([row])) for row in ([True, True, False], [False, True, True]))
    assert one.jaccard(two) == 1 / 3 and one.jaccard(one) == 1.0
    assert UnitSelection(heads, np.zeros((1, 3), bool)).jaccard(UnitSelection(heads, np.zeros((1, 3), bool))) == 1.0
    assert repr(one) == "UnitSelection(0 of 2 heads and 2 of 3 channels frozen)"
    with pytest.raises(ValueError, match="jaccard: selections of"):
        one.jaccard(UnitSelection(heads, np.zeros((1, 4), bool)))
    with pytest.raises(TypeError, match="heads has dtype int64, expected bool"):
        UnitSelection(heads.astype(np.int64), heads)
    with pytest.raises(ValueError, match=r"heads has shape \(1, 2\) and channels \(2, 3\)"):
        UnitSelection(heads, np.zeros((2, 3), bool))
    with pytest.raises(ValueError, match="read-only"):
        one.channels[0, 0] = False


# ------------------------------------------------------------------------------------------ published labels


@needs_labels
def test_published_label_counts() -> None:
    counts = read_labels(LABEL_FILE).counts()
    assert counts == {"RU": (0, 52504), "SCU": (4, 4583), "UCU": (34, 46855), "CU": (986, 248314)}


@needs_labels
def test_published_labels_freeze_the_papers_share() -> None:
    """SCU + all CU, preset full: 80.0% of Llama-2-7B's block parameters; 1.29 of 6.48 billion train."""
    layout = toy_layout(**LLAMA_2_7B)
    plan = MaskBuilder(read_labels(LABEL_FILE)).freeze(scu=True, cu=True).build(layout)
    total = sum(math.prod(shape) for shape in layout.parameters.values())
    frozen = sum(mask.frozen_count for mask in plan.values())
    assert round(total / 1e9, 2) == 6.48 and round((total - frozen) / 1e9, 2) == 1.29
    assert round(100 * frozen / total, 1) == 80.0 and set(plan) == set(layout.parameters)


@needs_labels
def test_prototype_costs_reproduce_the_published_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank units so that each published label is together at its end of the ranking; cost 170, the nearest
    prefix and one unit more at the low ends then cut exactly where the published labels do. (RU came out 131
    units short of its share because UCU overwrote them: 52,635 wanted, 52,504 left.)"""
    labels = read_labels(LABEL_FILE)
    codes = flat(labels.heads, labels.channels)
    step = np.linspace(0, 0.1, codes.size)
    diff = np.select([codes == 1, codes == 2], [2.0, -2.0], 0.0) + step
    total = np.where(codes == 0, -2.0, 1.0) + step
    total[np.flatnonzero(codes == 2)[-131:]] = -1.0
    ones = SetScores(torch.ones(32, 32), torch.ones(32, 11008))
    utility = SetScores(torch.ones(32, 32), torch.ones(32, 11008))
    z = {id(ones): (total + diff) / 2, id(utility): (total - diff) / 2}
    monkeypatch.setattr(MaskBuilder, "_standardized", lambda _, one: z[id(one)])
    scores = UnitScores(toy_layout(**LLAMA_2_7B), ones, utility)
    made = MaskBuilder(scores, recipe="ssah-prototype").labels
    assert made.counts() == labels.counts()
    np.testing.assert_array_equal(flat(made.heads, made.channels), codes)


# ------------------------------------------------------------------------------------------------- importing


def test_importing_attribution_does_not_import_transformers() -> None:
    code = "import sys, safefreeze_kernels.attribution; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
