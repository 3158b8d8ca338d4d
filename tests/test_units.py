"""Attribution: where heads and channels live, and the masks that follow."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from attribution_models import ANSWERS, LLAMA_2_7B, ROWS, UTILITY, batch_of, tiny, toy_layout
from torch import nn

from safefreeze_kernels.attribution import (
    Family,
    MaskBuilder,
    UnitLayout,
    UnitSelection,
    find_units,
    register_family,
    score_units,
)
from safefreeze_kernels.attribution.units import FAMILIES, unit_masks


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and on busy cores wait seconds for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


# ------------------------------------------------------------------------------------------------- importing


def test_importing_attribution_does_not_import_transformers() -> None:
    code = "import sys, safefreeze_kernels.attribution; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
