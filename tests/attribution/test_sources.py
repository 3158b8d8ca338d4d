"""Attribution: labels, scores and lists made elsewhere, as objects and as our own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_models import (
    CHANNELS,
    CHOSEN,
    FORMS,
    HEADS,
    LISTED,
    NEURON_PLAN,
    NEURONS,
    random_scores,
    refused,
    some_labels,
    tiny,
    toy_layout,
)
from safetensors.torch import save_file

from safefreeze_kernels.attribution import (
    MaskBuilder,
    UnitLayout,
    find_units,
    plan_from_neurons,
    plan_from_weights,
    read_labels,
    scores_from,
    scores_from_weights,
    units_from,
)
from safefreeze_kernels.attribution.units import unit_masks
from safefreeze_kernels.plan.mask import FreezeMask
from safefreeze_kernels.plan.plan import FreezePlan

LAYOUT = toy_layout()  # 2 layers of 4 heads on 2 KV heads, heads of 2, and 6 channels; hidden 8

pytestmark = pytest.mark.usefixtures("one_thread")  # models this small gain nothing from threads


# ------------------------------------------------------------------------------------------------- our files


def test_labels_survive_a_file(tmp_path: Path) -> None:
    labels, path = some_labels(), tmp_path / "labels.safetensors"
    labels.save(path)
    read = read_labels(path)
    assert torch.equal(read.heads, labels.heads) and torch.equal(read.channels, labels.channels)
    whole = path.read_bytes()
    for damaged in (b"", b"PK\x03\x04 cut", whole[:40], whole[:-40]):
        path.write_bytes(damaged)
        refused(r"read_labels: .*labels.safetensors' is not a safetensors file", lambda: read_labels(path))


def test_files_are_checked(tmp_path: Path) -> None:
    """Other projects' files are read by an example, which the message names."""
    scores, table = tmp_path / "scores.safetensors", tmp_path / "labels.csv"
    random_scores(LAYOUT).save(scores)
    table.touch()
    foreign = r"labels.csv' ends in '.csv', expected .safetensors; examples/foreign_formats.py reads .pt, .npy"
    refused(r"holds safety.* expected tensors attention_heads and mlp_channels", lambda: read_labels(scores))
    refused(f"read_labels: .*{foreign}", lambda: read_labels(table))
    refused("ends in '', expected .safetensors; examples/foreign_formats.py", lambda: read_labels(tmp_path))
    refused(f"units_from: .*{foreign}", lambda: units_from(LAYOUT, channels=table))
    refused(f"scores_from: .*{foreign}", lambda: scores_from(LAYOUT, channels=str(table)))
    none = tmp_path / "none.safetensors"
    refused(r"read_labels: no file '.*none.safetensors'", lambda: read_labels(none), FileNotFoundError)
    refused(r"units_from: no file '.*none.s", lambda: units_from(LAYOUT, channels=none), FileNotFoundError)


def test_lists_and_scores_from_our_files(tmp_path: Path) -> None:
    path = tmp_path / "arrays.safetensors"
    save_file({"heads": torch.from_numpy(HEADS), "channels": torch.from_numpy(CHANNELS)}, path)
    ranking = scores_from(LAYOUT, heads=path, channels=str(path))
    np.testing.assert_array_equal(ranking.heads, HEADS)
    np.testing.assert_array_equal(ranking.channels, CHANNELS)
    save_file({"channels": torch.from_numpy(CHOSEN)}, path)
    selection = units_from(LAYOUT, channels=path)
    assert np.array_equal(selection.channels, CHOSEN)
    assert selection.build().metadata["selection"]["units_from"] == {"heads": None, "channels": str(path)}


# -------------------------------------------------------------------------------------------- lists of units


@pytest.mark.parametrize("form", FORMS)
def test_lists_of_units_in_every_form(form: str) -> None:
    selection = units_from(LAYOUT, channels=FORMS[form])
    assert np.argwhere(selection.channels).tolist() == LISTED and not selection.heads.any()
    plan = selection.build()
    assert plan["model.layers.0.mlp.up_proj.weight"] == FreezeMask((6, 8), rows=[3, 5])
    assert plan.metadata["selection"] == {"units_from": {"heads": None, "channels": "given"}}


def test_layers_without_units_are_none() -> None:
    """As TwinBreak saves those it did not look at."""
    some = units_from(LAYOUT, heads=[None, [2]], channels={1: [4]})
    assert np.argwhere(some.heads).tolist() == [[1, 2]] and np.argwhere(some.channels).tolist() == [[1, 4]]


def test_lists_of_units_are_checked() -> None:
    for given, complaint in (
        ({2: [0]}, "channels: layer is 2, expected 0 to 1"),
        ({-1: [0]}, "layer is -1"),
        ({"up": [0]}, "layer is 'up'"),
        ({True: [0]}, "layer is True"),
        ({0: [0], "0": [1]}, "layer 0 is given twice"),
        ({0: [6]}, "channels of layer 0 holds index 6, expected 0 to 5"),
        ({0: [-1]}, "channels of layer 0 holds index -1"),
        ({1: [2, 4, 2]}, "channels of layer 1 holds index 2 more than once"),
        ([[0]], "channels has 1 entries, expected one for each of 2 layers"),
        (np.array([[0, 1], [0, 1]]), "channels of layer 0 holds index 1 more than once"),
        (np.array([[0, 1], [2, 1]]), "layers of the pairs holds index 2, expected 0 to 1"),
        (np.array([[0, 6]]), "channels of layer 0 holds index 6"),
        (np.array([[0, 1, 2]]), r"has shape \(1, 3\), expected \[n, 2\] pairs"),
        (np.ones((2, 5), bool), r"bool of shape \(2, 5\), expected \(2, 6\)"),
        ({0: [], 1: []}, "heads and channels hold no units, expected at least one; was anything detected"),
        ({}, "heads and channels hold no units"),
        ([None, None], "heads and channels hold no units"),
        (np.empty((0, 2), np.int64), "heads and channels hold no units"),
        (None, "neither heads nor channels given"),
    ):
        with pytest.raises(ValueError, match=complaint):
            units_from(LAYOUT, channels=given)
    for given, complaint in (
        ({0: [1.0]}, "channels of layer 0 holds float64, expected integer indices"),
        ({0: torch.tensor([1.0])}, "channels of layer 0 holds float64"),
        ({0: ["1"]}, "channels of layer 0 holds <U1"),
        ({0: 3}, "channels of layer 0 is 3, expected a list of indices"),
        (7, "channels is a int, expected a mapping or list of layers"),
    ):
        with pytest.raises(TypeError, match=complaint):
            units_from(LAYOUT, channels=given)


# ------------------------------------------------------------------------------------------ scores per unit


def captum(rows: np.ndarray) -> list[torch.Tensor]:
    """Per layer ``[batch, tokens, features]`` whose mean over batch and tokens is ``rows``."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(len(rows), 3, 5, rows.shape[1], generator=draw, dtype=torch.float64)
    return list(noise - noise.mean((1, 2), keepdim=True) + torch.from_numpy(rows)[:, None, None])


SCORES: dict[str, tuple[Any, Any]] = {
    "array": (HEADS, CHANNELS),
    "tensor": (torch.from_numpy(HEADS).bfloat16(), torch.from_numpy(CHANNELS).half()),
    "lists": (HEADS.tolist(), CHANNELS.tolist()),
    "layers": ({1: HEADS[1], 0: HEADS[0]}, {"0": torch.from_numpy(CHANNELS[0]), 1: CHANNELS[1]}),
    "head features": (torch.from_numpy(HEADS)[..., None] + torch.tensor([-0.5, 0.5]), CHANNELS),
    "captum": (captum(HEADS), captum(CHANNELS)),
    "captum, features of heads": (captum(HEADS.repeat(2, 1)), captum(CHANNELS)),
}


@pytest.mark.parametrize("form", SCORES)
def test_scores_of_units_in_every_form(form: str) -> None:
    heads, channels = SCORES[form]
    ranking = scores_from(LAYOUT, heads=heads, channels=channels, method="theirs")
    assert ranking.heads is not None and ranking.channels is not None
    np.testing.assert_allclose(ranking.heads, HEADS, atol=1e-12)
    np.testing.assert_allclose(ranking.channels, CHANNELS, atol=1e-12)
    top = MaskBuilder(scores_from(LAYOUT, channels=channels, method="theirs")).top(3)
    assert np.argwhere(top.channels).tolist() == [[1, 3], [1, 4], [1, 5]] and not top.heads.any()
    assert top.build().metadata["method"] == "theirs"


def test_batch_time_and_features_are_reduced() -> None:
    layers = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for reduce, of in (("mean", np.mean), ("sum", np.sum), ("max", np.max)):
        ranking = scores_from(LAYOUT, heads=layers, reduce=reduce)  # type: ignore[arg-type]
        expected = [[of(layer[..., 2 * h : 2 * h + 2].double().numpy()) for h in range(4)] for layer in layers]
        np.testing.assert_allclose(ranking.heads, expected)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduce is 'median', expected one of mean, sum, max"):
        scores_from(LAYOUT, heads=layers, reduce="median")  # type: ignore[arg-type]


def test_scores_of_units_are_checked() -> None:
    nan = CHANNELS.copy()
    nan[1, 2] = np.nan
    for given, complaint in (
        (CHANNELS[:1], r"channels has shape \(1, 6\), expected \(2, 6\)"),
        (CHANNELS.T, r"channels has shape \(6, 2\), expected \(2, 6\)"),
        (np.ones((2, 3, 5, 6)), "go as a list with one tensor per layer"),
        ([CHANNELS[0]], "channels has 1 entries, expected one for each of 2 layers"),
        ({1: CHANNELS[1]}, "channels has no scores of layers 0, expected all 2 layers"),
        ([CHANNELS[0], torch.ones(4, 5)], r"channels of layer 1 has shape \(4, 5\), expected \[…, 6\]"),
        ([CHANNELS[0], torch.ones(0, 6)], r"channels of layer 1 has shape \(0, 6\)"),
        ([CHANNELS[0], 3.0], r"channels of layer 1 has shape \(\)"),
        (nan, "channels holds nan at layer 1, unit 2, expected finite"),
    ):
        with pytest.raises(ValueError, match=complaint):
            scores_from(LAYOUT, channels=given)
    with pytest.raises(ValueError, match=r"heads of layer 0 has shape \(3, 5\), expected \[…, 4 or 8\]"):
        scores_from(LAYOUT, heads=[torch.ones(3, 5)] * 2)
    for given, complaint in (
        (0.5, "channels is a float, expected a mapping or list"),
        (["many", "few"], "channels of layer 0 is a str, expected an array or tensor of scores"),
        ([CHANNELS[0], None], "channels has no scores of layers 1"),
        (np.full((2, 6), "high"), "channels holds <U4, expected numbers"),
    ):
        with pytest.raises((TypeError, ValueError), match=complaint):
            scores_from(LAYOUT, channels=given)
    refused("neither heads nor channels given", lambda: scores_from(LAYOUT))


# ---------------------------------------------------------------------------------------- scores per weight


def random_weights(layout: UnitLayout, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in layout.parameters.items()}


def by_hand(
    layout: UnitLayout, weights: Mapping[str, torch.Tensor], kind: str, layer: int, unit: int
) -> tuple[Any, Any]:
    """The unit's own weights and those of its KV head, found through the masks that would freeze it."""
    units = {"heads": np.zeros(layout.heads_shape, bool), "channels": np.zeros(layout.channels_shape, bool)}
    units[kind][layer, unit] = True
    whole = unit_masks(layout, units["heads"], units["channels"], "full", "any")
    own = unit_masks(layout, units["heads"], units["channels"], "full", "never")
    mine, shared = [], []
    for name, mask in whole.items():
        if name in weights:
            without_kv = own[name].dense() if name in own else torch.zeros(mask.shape, dtype=torch.bool)
            mine.append(weights[name][without_kv])
            shared.append(weights[name][mask.dense() & ~without_kv])
    return torch.cat(mine).double(), torch.cat(shared).double()


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3", "mixtral"])
def test_weights_reduce_to_the_units_they_belong_to(model_type: str, reduce: Any) -> None:
    layout = find_units(family_model(model_type))
    weights = random_weights(layout)
    ranking = scores_from_weights(layout, weights, reduce, method="wanda")
    assert ranking.heads is not None and ranking.channels is not None and ranking.method == "wanda"
    for kind, scores in (("heads", ranking.heads), ("channels", ranking.channels)):
        for layer in range(layout.n_layers):
            for unit in {0, 1, scores.shape[1] // 2, scores.shape[1] - 1}:
                mine, kv = by_hand(layout, weights, kind, layer, unit)
                size = len(mine) + len(kv) / layout.group_size
                total = float(mine.sum() + kv.sum() / layout.group_size)
                highest = float(torch.cat([mine, kv]).max())
                expected = {"sum": total, "mean": total / size, "max": highest}[reduce]
                assert scores[layer, unit] == pytest.approx(expected, abs=1e-4), f"{kind} {layer}, {unit}"
    one_by_one = scores_from_weights(layout, ((name, w.double()) for name, w in reversed(weights.items())), reduce)
    np.testing.assert_allclose(one_by_one.channels, ranking.channels, atol=1e-4)  # type: ignore[arg-type]


def family_model(model_type: str) -> torch.nn.Module:
    changes: dict[str, Any] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "num_key_value_heads": 4, "head_dim": 8},
        "gpt_neox": {"num_key_value_heads": 4, "head_dim": 8},
        "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
        "phi3": {"head_dim": 8},
    }.get(model_type, {})
    return tiny(model_type, **changes)


def test_a_part_of_the_matrices_scores_what_it_holds() -> None:
    """As Wanda's scores of the two readers alone: heads and channels. Of one of them: that kind alone."""
    weights = random_weights(LAYOUT)
    readers = {name: w for name, w in weights.items() if name.endswith(("o_proj.weight", "down_proj.weight"))}
    ranking = scores_from_weights(LAYOUT, readers, "max")
    down = torch.stack([readers[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(2)])
    np.testing.assert_array_equal(ranking.channels, down.double().amax(1))  # type: ignore[arg-type]
    alone = scores_from_weights(LAYOUT, {name: w for name, w in readers.items() if "mlp" in name})
    assert alone.heads is None and alone.channels is not None


def test_scores_of_weights_are_checked() -> None:
    weights = random_weights(LAYOUT)
    first = "model.layers.0.mlp.up_proj.weight"
    nan = weights[first].clone()
    nan[0, 0] = torch.nan
    for given, complaint in (
        ({}, "no scores given"),
        ({**weights, "lm_head.weight": torch.ones(3, 8)}, "'lm_head.weight' holds no units"),
        ([(first, weights[first])] * 2, f"'{first}' is given twice"),
        ({**weights, first: weights[first].T}, rf"'{first}' has shape \(8, 6\), expected \(6, 8\)"),
        ({**weights, first: nan}, f"'{first}' holds NaN or inf"),
        (
            {name: w for name, w in weights.items() if name != first},
            rf"channels of layers 0 and 1 are scored by different parameters \(missing: {first}\)",
        ),
    ):
        with pytest.raises(ValueError, match=complaint):
            scores_from_weights(LAYOUT, given)  # type: ignore[arg-type]
    refused("reduce is 'min'", lambda: scores_from_weights(LAYOUT, weights, "min"))


# -------------------------------------------------------------------------------------------- element masks


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_the_highest_weights_of_each_matrix_freeze_in_exact_numbers(share: float, tmp_path: Path) -> None:
    weights = {name: w.bfloat16() for name, w in random_weights(LAYOUT).items()}  # few values, many ties
    plan = plan_from_weights(weights, share)
    assert set(plan) == set(weights)
    for name, scores in weights.items():
        frozen, count = plan[name].dense(), int(share * scores.numel() + 0.5)
        assert frozen.sum() == count, name
        order = np.argsort(-scores.float().numpy().ravel(), kind="stable")[:count]
        assert np.array_equal(np.flatnonzero(frozen.numpy()), np.sort(order)), name
    plan.save(tmp_path / "plan.safetensors")
    assert FreezePlan.load(tmp_path / "plan.safetensors") == plan
    assert plan.metadata["selection"] == {"top_weights": share, "utility_share": None}


def test_set_difference_of_weights_by_hand() -> None:
    """Wei et al.: the top 3 of 6 for safety are entries 0, 1, 5, of them 5 is in the top 2 for utility (3, 5)."""
    safety, utility = torch.tensor([[9.0, 8, 1], [2, 3, 7]]), torch.tensor([[0.0, 1, 2], [8, 3, 9]])
    plan = plan_from_weights({"w": safety}, 0.5, utility={"w": utility}, utility_share=1 / 3)
    assert np.flatnonzero(plan["w"].dense().numpy()).tolist() == [0, 1]
    with pytest.raises(ValueError, match="no weight is left to freeze"):
        plan_from_weights({"w": safety}, 0.5, utility={"w": safety}, utility_share=0.5)


def test_finished_masks_are_taken_as_they_are() -> None:
    masks = {"w": torch.tensor([[True, False], [True, True]]), "empty": torch.zeros(3, dtype=torch.bool)}
    plan = plan_from_weights(masks)
    assert set(plan) == {"w"} and torch.equal(plan["w"].dense(), masks["w"])
    with pytest.raises(TypeError, match=r"'w' is torch.float32, expected bool masks where no share is given"):
        plan_from_weights({"w": torch.ones(2, 2)})
    refused("no weight is left to freeze", lambda: plan_from_weights({"empty": masks["empty"]}))


def test_element_masks_refuse_bad_requests() -> None:
    scores = {"w": torch.arange(6.0).reshape(2, 3)}
    for bad in (0, 0.0, -0.1, 1.1, float("nan"), True, "half"):
        with pytest.raises(ValueError, match=r"share is .*, expected a fraction above 0, at most 1"):
            plan_from_weights(scores, bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"utility_share is .*, expected a fraction above 0, at most 1"):
            plan_from_weights(scores, 0.5, utility=scores, utility_share=bad)  # type: ignore[arg-type]
    for arguments, complaint in (
        (({}, 0.5), "no parameters given"),
        (({"w": torch.ones(2, 3)}, 0.5), "the weights scores of 'w' are all the same"),
        (({"w": torch.full((2, 3), torch.nan)}, 0.5), "'w' holds NaN or inf"),
    ):
        with pytest.raises(ValueError, match=complaint):
            plan_from_weights(*arguments)
    for options, complaint in (
        ({"utility": scores}, "utility and utility_share go together"),
        ({"utility_share": 0.1}, "utility and utility_share go together"),
        ({"utility": {"v": scores["w"]}, "utility_share": 0.1}, "weights and utility differ in v, w"),
        ({"utility": {"w": scores["w"].T}, "utility_share": 0.1}, r"'w' has shape \(2, 3\) in weights and \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=complaint):
            plan_from_weights(scores, 0.5, **options)  # type: ignore[arg-type]
    refused("utility given without share", lambda: plan_from_weights(scores, utility=scores, utility_share=0.5))


# ------------------------------------------------------------------------------------- single rows, columns


def test_neurons_of_five_mappings() -> None:
    plan = plan_from_neurons(LAYOUT, NEURONS)
    assert plan == NEURON_PLAN and plan.metadata["selection"] == {"neurons_from": "given"}


def test_a_bias_freezes_with_its_row() -> None:
    model = tiny("qwen2")  # biases in q, k and v
    plan = plan_from_neurons(find_units(model), NEURONS)
    plan.check(model)
    assert plan["model.layers.0.self_attn.k_proj.bias"].rows.tolist() == [3]
    assert "model.layers.0.mlp.up_proj.bias" not in plan


def test_neurons_are_checked() -> None:
    for lines, complaint in (
        (NEURONS[:4], "got dict, dict, dict, dict, expected five mappings of layer to indices: ffn_up, ffn_down, q"),
        ([*NEURONS[:4], [1]], "got dict, dict, dict, dict, list, expected five"),
        ("none.txt", "got str, expected five mappings"),
        ([{}] * 5, "no neurons in any line, expected at least one; was anything detected"),
        ([{0: set()}] * 5, "no neurons in any line"),
        ([{2: {0}}, {}, {}, {}, {}], "up_proj: layer is 2, expected 0 to 1"),
        ([{}, {0: {6}}, {}, {}, {}], r"'model.layers.0.mlp.down_proj.weight' holds index 6, expected 0 to 5"),
        # a KV head has fewer rows than the query heads that share it
        ([{}, {}, {}, {0: {4}}, {}], r"'model.layers.0.self_attn.k_proj.weight' holds index 4, expected 0 to 3"),
        ([{0: [1, 1]}, {}, {}, {}, {}], "up_proj.weight' holds index 1 more than once"),
    ):
        with pytest.raises(ValueError, match=complaint):
            plan_from_neurons(LAYOUT, lines)
    with pytest.raises(TypeError, match=r"up_proj.weight' holds float64, expected integer"):
        plan_from_neurons(LAYOUT, [{0: [0.5]}, {}, {}, {}, {}])
    with pytest.raises(ValueError, match="gpt2 has 0 matrices 'up_proj' per layer, expected one"):
        plan_from_neurons(find_units(tiny("gpt2")), NEURONS)
