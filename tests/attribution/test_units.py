"""Where heads and channels live, and the masks that follow: for every family, on a tiny model of its class."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from attribution_models import ANSWERS, LLAMA_2_7B, ROWS, UTILITY, batch_of, refused, tiny, toy_layout
from family_models import CASES, HEADS, HIDDEN, LAYERS, NAMED, model_of
from torch import nn

from safefreeze_kernels.attribution import (
    Bank,
    Family,
    MaskBuilder,
    UnitLayout,
    UnitSelection,
    find_units,
    register_family,
    score_units,
)
from safefreeze_kernels.attribution.families import FAMILIES
from safefreeze_kernels.attribution.units import unit_masks

pytestmark = pytest.mark.usefixtures("one_thread")  # models this small gain nothing from threads


# ------------------------------------------------------------------------------------------------- families


def test_every_family_has_a_case() -> None:
    assert {case.model_type for case in CASES} == set(FAMILIES) and len(NAMED) == len(CASES)


@pytest.mark.parametrize("case", NAMED)
def test_family_is_measured(case: str) -> None:
    one, model = NAMED[case], model_of(case)
    layout = find_units(model)
    found = (layout.n_layers, layout.n_heads, layout.n_kv_heads, layout.head_dim, layout.d_ff, layout.hidden_size)
    assert found == (LAYERS, HEADS, one.n_kv_heads, one.head_dim, one.d_ff, HIDDEN)
    head = one.head_dim * (2 * HIDDEN + one.attention_bias)
    kv = one.n_kv_heads / HEADS * 2 * one.head_dim * (HIDDEN + one.attention_bias)
    channel = one.gates * (HIDDEN + one.mlp_bias) + HIDDEN
    assert layout.head_cost == pytest.approx((head + kv) / channel)


@pytest.mark.parametrize("case", NAMED)
def test_family_is_found_however_it_is_given(case: str) -> None:
    model = model_of(case)
    layout = find_units(model)
    assert UnitLayout.from_json(layout.to_json()) == layout
    assert find_units(model.state_dict(), model.config.to_dict()) == layout
    assert find_units(copy.deepcopy(model).to("meta")) == layout
    wrapped = nn.ModuleDict({"a{b}": model})
    assert find_units(wrapped, model.config).parameters == {
        f"a{{b}}.{name}": shape for name, shape in layout.parameters.items()
    }
    bare = find_units(model.base_model)
    assert set(bare.parameters) <= {name for name, _ in model.base_model.named_parameters()}


@pytest.mark.parametrize("case", NAMED)
def test_units_partition_the_parameters(case: str) -> None:
    """Every element of a parameter that holds units belongs to exactly one, and what is left out holds none."""
    model = model_of(case)
    layout = find_units(model)
    owners = {name: np.zeros(shape, int) for name, shape in layout.parameters.items()}
    for layer in range(LAYERS):
        seen = {"head": 0, "kv": 0, "channel": 0}
        for piece in layout.pieces(layer):
            matrix = owners[piece.parameter].reshape(-1, piece.shape[-1] if len(piece.shape) > 1 else 1)
            block = matrix[slice(*(piece.within or (None,)))]
            np.add.at(block if piece.axis == "rows" else block.T, piece.index.ravel(), 1)
            assert piece.index.size * piece.breadth == block.size or piece.within is None
            seen[piece.units] = max(seen[piece.units], piece.first + len(piece.index))
        assert seen == {"head": HEADS, "kv": NAMED[case].n_kv_heads, "channel": layout.d_ff}
    for name, count in owners.items():
        assert (count == 1).all(), f"{name}: elements with {np.unique(count)} owners, expected one"
    left = {name for name, _ in model.named_parameters() if ".1." in name and name not in owners}
    readers = [reader.parameter.removesuffix(".weight") for reader in layout.readers(1)]
    biases = {f"{name}{end}" for name in readers for end in (".bias", "_bias")}
    live = re.compile(r"norm|\.ln_|router|sinks|mlp\.gate\.weight|shared_expert_gate", re.IGNORECASE)
    assert {name for name in left - biases if not live.search(name)} == set()


def selected(layout: UnitLayout, preset: str) -> tuple[np.ndarray, np.ndarray]:
    """First and last unit and some between. For "producer" all heads of a KV head or none: a head's value rows
    alone silence it, and those may be shared."""
    draw = np.random.default_rng(5)
    heads, channels = np.zeros(layout.heads_shape, bool), np.zeros(layout.channels_shape, bool)
    if preset == "producer":
        heads[0, : layout.group_size] = heads[1, -layout.group_size :] = True
    else:
        heads[0, [0, 1, 3]] = heads[1, [2, HEADS - 1]] = True
    for row in channels:
        row[[0, -1, *draw.choice(layout.d_ff, layout.d_ff // 4, replace=False)]] = True
    return heads, channels


def remove(model: nn.Module, layout: UnitLayout, heads: np.ndarray, channels: np.ndarray) -> ExitStack:
    """Cut units off where they are read, parameters as they are, until the stack is closed."""
    stack = ExitStack()
    for layer in range(layout.n_layers):
        experts: dict[str, list[np.ndarray]] = {}
        for reader in layout.readers(layer):
            units = (heads if reader.units == "head" else channels)[layer, reader.first : reader.first + reader.n_units]
            if reader.expert is not None:
                experts.setdefault(reader.module, []).append(units)
                continue
            live = torch.from_numpy(~units.repeat(reader.width)).float()
            hook = lambda _, inputs, live=live: (inputs[0] * live,)  # noqa: E731
            stack.callback(model.get_submodule(reader.module).register_forward_pre_hook(hook).remove)
        for name, rows in experts.items():
            module = model.get_submodule(name)
            module.forward = mixture(module, torch.from_numpy(~np.stack(rows)).float())
            stack.callback(delattr, module, "forward")
    return stack


def mixture(experts: Any, live: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The fused experts' forward pass over again, with channels multiplied by ``live`` [experts, channels]."""

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert, mask in enumerate(live):
            if hasattr(experts, "gate_up_proj_bias"):  # gpt_oss
                both = hidden @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                done = (experts._apply_gate(both) * mask) @ experts.down_proj[expert] + experts.down_proj_bias[expert]
            else:
                gate, up = (hidden @ experts.gate_up_proj[expert].T).split(len(mask), dim=1)
                done = (experts.act_fn(gate) * up * mask) @ experts.down_proj[expert].T
            out += done * (weights * (chosen == expert)).sum(1, keepdim=True)
        return out

    return forward


@pytest.mark.parametrize("preset", ["full", "producer"])
@pytest.mark.parametrize("case", NAMED)
def test_zeroing_what_a_plan_freezes_removes_the_units(case: str, preset: Any) -> None:
    """With its frozen elements zeroed, the model computes what it computes with the units cut off.

    A wrong row or column would silence a live unit; as many are frozen as the units have. OLMo 2, OLMo 3 and OLMoE
    normalise queries and keys over all heads at once; that norm, which no unit owns, is taken out.
    """
    one, model = NAMED[case], copy.deepcopy(model_of(case))
    for name, module in list(model.named_modules()):
        if name.endswith(("q_norm", "k_norm")) and module.weight.numel() > one.head_dim:
            model.set_submodule(name, nn.Identity())
    layout = find_units(model)
    heads, channels = selected(layout, preset)
    kv = "any" if preset == "producer" else "all"
    plan = UnitSelection(heads, channels).build(model, preset, kv)
    plan.check(model)

    ids = torch.tensor([[3, 9, 27, 11, 5, 40], [60, 2, 33, 8, 8, 21]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with remove(model, layout, np.zeros_like(heads), np.zeros_like(channels)):
            torch.testing.assert_close(model(input_ids=ids).logits, whole, rtol=1e-4, atol=1e-4)
        with remove(model, layout, heads, channels):
            removed = model(input_ids=ids).logits
        parameters = dict(model.named_parameters())
        for name, mask in plan.items():
            parameters[name][mask.dense()] = 0
        zeroed = model(input_ids=ids).logits
    assert not torch.allclose(removed, whole, atol=1e-2), "the units have no effect: nothing is tested"
    torch.testing.assert_close(zeroed, removed, rtol=1e-4, atol=1e-4)

    kv_heads = heads.reshape(LAYERS, one.n_kv_heads, -1).all(2).sum()
    reads = preset == "full"
    assert sum(mask.frozen_count for mask in plan.values()) == (
        heads.sum() * one.head_dim * (HIDDEN + one.attention_bias + reads * HIDDEN)
        + kv_heads * 2 * one.head_dim * (HIDDEN + one.attention_bias)
        + channels.sum() * (one.gates * (HIDDEN + one.mlp_bias) + reads * HIDDEN)
    )


@pytest.mark.parametrize("case", NAMED)
def test_readers_take_in_every_unit_once(case: str) -> None:
    model = model_of(case)
    layout = find_units(model)
    for layer in range(LAYERS):
        units: dict[str, list[int]] = {"head": [], "channel": []}
        for reader in layout.readers(layer):
            weight = model.get_parameter(reader.parameter)
            assert any(weight is param for param in model.get_submodule(reader.module).parameters(recurse=False))
            matrix = weight if reader.expert is None else weight[reader.expert]
            features = reader.n_units * reader.width
            assert matrix.shape == ((features, HIDDEN) if reader.transposed else (HIDDEN, features))
            units[reader.units] += range(reader.first, reader.first + reader.n_units)
        assert units == {"head": list(range(HEADS)), "channel": list(range(layout.d_ff))}


# -------------------------------------------------------------------------------------------------- finding


def test_biases_of_producers_are_found_and_biases_of_outputs_are_not() -> None:
    model = tiny("llama", attention_bias=True, mlp_bias=True)
    biases = {name for name in find_units(model).parameters if name.startswith("model.layers.0") and "bias" in name}
    assert {name.split(".")[-2] for name in biases} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert "model.layers.0.self_attn.o_proj.bias" in dict(model.named_parameters())


def test_layout_from_json_refuses_what_is_not_one() -> None:
    good = find_units(model_of("llama")).to_json()
    altered = (
        good.replace('"mlp.up_proj.weight"', '"mlp.up.weight"'),
        good.replace('"kv"', '"channel"'),
        good.replace('"n_heads": 6', '"n_heads": 0'),
        good.replace('"n_layers": 2', '"n_layers": 0'),
        good.replace('"n_kv_heads": 3', '"n_kv_heads": 2'),
        good.replace("[24, 48]", "[25, 48]"),
    )
    for text in ("{}", "[]", "no", '{"names": 1}', *altered):
        with pytest.raises(ValueError):
            UnitLayout.from_json(text)


def test_the_language_model_of_a_multi_modal_one() -> None:
    text = model_of("gemma3_text")
    names = {name.replace("model.", "model.language_model.", 1): p.shape for name, p in text.named_parameters()}
    names["model.vision_tower.encoder.layers.0.self_attn.out_proj.weight"] = (8, 8)
    layout = find_units(names, {"model_type": "gemma3", "text_config": text.config.to_dict()})
    assert layout.model_type == "gemma3_text" and layout.heads_shape == (LAYERS, HEADS)
    assert "model.language_model.layers.1.mlp.up_proj.weight" in layout.parameters


def test_mixtures_of_experts_with_dense_layers_are_refused() -> None:
    for dense in range(LAYERS):
        model = tiny(
            "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, mlp_only_layers=[dense]
        )
        with pytest.raises(ValueError, match=rf"layers.{dense}.mlp.experts.\w+' has shape \(missing\)"):
            find_units(model)


def test_files_that_name_experts_one_by_one_are_refused() -> None:
    shapes = {name: tuple(param.shape) for name, param in model_of("mixtral").named_parameters()}
    on_disk = {name.replace("mlp.experts.", "block_sparse_moe.experts.0."): shape for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"down_proj.weight' has shape \(missing\).*files may name experts one by one"):
        find_units(on_disk, model_of("mixtral").config)


def test_registered_family_works_like_a_built_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("phi")
    family = FAMILIES["phi"]
    monkeypatch.delitem(FAMILIES, "phi")
    refused(r"model_type is 'phi', expected one of .*llama", lambda: find_units(model))
    register_family("phi", Family("layers.{layer}", copy.deepcopy(family.banks)))
    scores = score_units(model, [batch_of(ROWS, ANSWERS)], UTILITY)
    plan = MaskBuilder(scores).freeze(share=1.0).build(model)
    plan.check(model)
    assert plan.frozen_fraction == 1.0
    assert "model.layers.0.mlp.fc1.bias" in plan and "model.layers.0.mlp.fc2.bias" not in plan


def test_the_example_for_an_unknown_architecture_is_code_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(model.config, "model_type", "mine")
    monkeypatch.setitem(FAMILIES, "mine", FAMILIES["llama"])
    del FAMILIES["mine"]  # so that it is removed again afterwards
    with pytest.raises(ValueError, match="model_type is 'mine'") as caught:
        find_units(model)
    exec(str(caught.value).partition("for instance")[2].strip())
    assert FAMILIES["mine"] == FAMILIES["llama"] and find_units(model).model_type == "mine"


def test_families_that_cannot_work_are_refused() -> None:
    heads, mlp = FAMILIES["llama"].banks
    refused(r"family of 'x' is .*, expected a Family", lambda: register_family("x", {"query": "q"}), TypeError)
    assert "x" not in FAMILIES
    refused("producers is 'q' and reader 'o', expected a mapping", lambda: Bank("q", "o"), TypeError)
    refused("expected a mapping of names to what they hold, and a name", lambda: Bank({"q": ("head",)}, "o"), TypeError)
    for producers in (
        {},
        {"q": "query"},
        {"q": "head channel"},
        {"q": "head", "up": "channel"},
        {"k": "kv"},
        {"q": ""},
    ):
        with pytest.raises(ValueError, match="expected names of modules that hold 'head' and 'kv' parts, or 'channel'"):
            Bank(producers, "o")
    refused(r"layer is 'blocks', expected '{layer}' in it", lambda: Family("blocks", (heads, mlp)))
    refused("expected a tuple of Bank", lambda: Family("layers.{layer}", [heads, mlp]), TypeError)
    for banks in ((heads,), (mlp,), (mlp, heads), (heads, heads, mlp), (heads, mlp, heads), ()):
        with pytest.raises(ValueError, match="expected heads first and then channels"):
            Family("layers.{layer}", banks)


def shapes_with(changes: Mapping[str, tuple[int, ...] | None]) -> dict[str, tuple[int, ...]]:
    """The toy layout's, with some weights of others (None: missing)."""
    shapes: dict[str, Any] = dict(toy_layout().parameters)
    for name, shape in changes.items():
        shapes[f"{'model.layers.' if name[0].isdigit() else ''}{name}.weight"] = shape
    return {name: shape for name, shape in shapes.items() if shape is not None}


LLAMA: Any = {"model_type": "llama", "num_attention_heads": 4}
ODD = "output features, expected a number of KV heads of 2"


@pytest.mark.parametrize(
    ("shapes", "config", "message"),
    [
        ({}, None, "no config"),
        ({}, {"num_attention_heads": 4}, "model_type is None"),
        ({}, {**LLAMA, "num_attention_heads": 3}, "num_attention_heads is 3, expected a divisor of 8"),
        ({}, {**LLAMA, "num_attention_heads": None}, "num_attention_heads is None"),
        ({}, {**LLAMA, "head_dim": 4}, "head_dim=4, but the parameter shapes say 2"),
        ({}, {**LLAMA, "num_hidden_layers": 3}, "num_hidden_layers=3"),
        ({}, {**LLAMA, "num_key_value_heads": 4}, "num_key_value_heads=4"),
        ({"0.self_attn.k_proj": (3, 8)}, LLAMA, f"k_proj' has 3 {ODD}"),
        ({"0.self_attn.k_proj": (6, 8)}, LLAMA, f"k_proj' has 6 {ODD}"),
        ({"0.mlp.down_proj": None}, LLAMA, r"down_proj.weight' has shape \(missing\)"),
        ({"0.mlp.down_proj": (48,)}, LLAMA, r"has shape \(48,\), expected a matrix"),
        ({"1.mlp.up_proj": (9, 8)}, LLAMA, r"has shape \(9, 8\), expected \(6, 8\)"),
        ({"1.self_attn.q_proj": None}, LLAMA, r"q_proj.weight' has shape \(missing\)"),
        ({"0.self_attn.o_proj": None}, LLAMA, "found none parameters named"),
        ({"other.layers.0.self_attn.o_proj": (8, 8)}, LLAMA, r"found 2 \('model.', 'other.'\)"),
    ],
)
def test_find_units_says_what_does_not_fit(shapes: dict[str, Any], config: dict[str, Any] | None, message: str) -> None:
    refused(message, lambda: find_units(shapes_with(shapes), config))


def test_a_bias_in_one_layer_only_is_refused() -> None:
    shapes = {**toy_layout().parameters, "model.layers.1.mlp.up_proj.bias": (6,)}
    refused(r"layers.0.mlp.up_proj.bias' has shape \(missing\)", lambda: find_units(shapes, LLAMA))


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


# -------------------------------------------------------------------------------------------- what freezes


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


def test_columns_of_one_expert_stay_in_its_block() -> None:
    """4 experts of 24 channels in one tensor [4, 48, 24]: all of expert 2, and the last channel of expert 0."""
    layout = find_units(model_of("mixtral"))
    heads, channels = np.zeros(layout.heads_shape, bool), np.zeros(layout.channels_shape, bool)
    channels[1, 48:72] = channels[1, 23] = True
    masks = unit_masks(layout, heads, channels)
    assert list(masks) == [f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    produced, read = masks.values()
    assert produced.rows.tolist() == [23, 24 + 23, *range(2 * 48, 3 * 48)] and produced.elements is None
    assert read.rows.tolist() == list(range(2 * HIDDEN, 3 * HIDDEN)) and read.cols.tolist() == []
    assert read.elements is not None
    assert read.elements.nonzero().tolist() == [[0, row, 23] for row in range(HIDDEN)]


def test_unit_masks_refuses_what_does_not_fit() -> None:
    layout = toy_layout()
    heads, channels = np.zeros((2, 4), bool), np.zeros((2, 6), bool)
    refused("preset is 'half', expected one of 'full', 'producer'", lambda: unit_masks(layout, heads, channels, "half"))
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
