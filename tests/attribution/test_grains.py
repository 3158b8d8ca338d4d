"""Which weights are chosen together, and the plans that values of them make."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from attribution_models import tiny
from family_models import NAMED, model_of
from torch import Tensor, nn

from safefreeze_kernels.attribution.grains import Grains
from safefreeze_kernels.attribution.units import find_units, unit_masks
from safefreeze_kernels.plan.mask import FreezeMask
from safefreeze_kernels.plan.plan import FreezePlan

pytestmark = pytest.mark.usefixtures("one_thread")  # models this small gain nothing from threads


def plan_of(grains: Grains, values: dict[str, Tensor], share: float, **options: object) -> FreezePlan:
    reduced = {name: grains.reduce(name, values[name]) for name in grains.shapes}
    return grains.plan(reduced, share, **options)  # type: ignore[arg-type]


def noise(grains: Grains, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in grains.shapes.items()}


def highest(grains: Grains, masks: dict[str, FreezeMask]) -> FreezePlan:
    """The plan of as many weights as the masks freeze, where these are the ones of value 1."""
    values = {
        name: masks[name].dense().float() if name in masks else torch.zeros(shape)
        for name, shape in grains.shapes.items()
    }
    return plan_of(grains, values, sum(mask.frozen_count for mask in masks.values()) / grains.total)


# ------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("case", NAMED)
def test_units_are_those_that_unit_masks_freeze(case: str) -> None:
    model = model_of(case)
    layout, grains = find_units(model), Grains.of(model, "unit")
    heads, channels = np.zeros(layout.heads_shape, bool), np.zeros(layout.channels_shape, bool)
    nothing = np.zeros_like(heads), np.zeros_like(channels)
    heads[1, -1] = True
    channels[0, layout.d_ff // 2] = True
    of_kv = nothing[0].copy()
    of_kv[0, : layout.group_size] = True
    without = unit_masks(layout, of_kv, nothing[1], kv="never")
    shared = {
        name: FreezeMask(
            mask.shape, elements=mask.dense() & ~without[name].dense() if name in without else mask.dense()
        )
        for name, mask in unit_masks(layout, of_kv, nothing[1], kv="all").items()
    }
    assert highest(grains, unit_masks(layout, heads, nothing[1], kv="never")) == FreezePlan(
        unit_masks(layout, heads, nothing[1], kv="never")
    )
    assert highest(grains, unit_masks(layout, nothing[0], channels)) == FreezePlan(
        unit_masks(layout, nothing[0], channels)
    )
    kv = {name: mask for name, mask in shared.items() if mask.frozen_count}
    assert highest(grains, kv) == FreezePlan(kv)


@pytest.mark.parametrize("case", NAMED)
def test_rows_lie_along_the_axis_of_units(case: str) -> None:
    """A channel is a line, or two where gate and up are fused, of each weight, with its bias."""
    model = model_of(case)
    layout, grains = find_units(model), Grains.of(model, "row")
    channels = np.zeros(layout.channels_shape, bool)
    channels[1, 3] = channels[1, layout.d_ff - 1] = True
    masks = unit_masks(layout, np.zeros(layout.heads_shape, bool), channels)
    for name, mask in masks.items():
        if name.endswith("bias"):
            continue
        biases = {name.removesuffix("weight") + "bias", f"{name}_bias"}
        wanted = {name: mask, **{bias: masks[bias] for bias in biases & set(masks)}}
        assert highest(grains, wanted) == FreezePlan(wanted)


@pytest.mark.parametrize("grain", ["row", "unit"])
@pytest.mark.parametrize("case", NAMED)
def test_every_weight_belongs_to_one_group(case: str, grain: str) -> None:
    model = model_of(case)
    grains = Grains.of(model, grain)  # type: ignore[arg-type]
    counted = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    assert set(counted) == set(grains.shapes)
    assert grains.total == grains.sizes.sum() == sum(p.numel() for p in model.parameters())
    reduced = {name: grains.reduce(name, ones) for name, ones in counted.items()}
    assert set(grains.means(reduced)) == {1.0}
    assert grains.plan(reduced, 1.0).frozen_fraction == 1.0


# --------------------------------------------------------------------------------------------------- groups


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 6, bias=False))
    model[3].weight.requires_grad_(False)
    return model


def test_rows_of_a_model_of_unknown_layout() -> None:
    grains = Grains.of(small(), "row")
    assert set(grains.shapes) == {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias"}, "the rest does not train"
    assert grains.sizes.tolist() == [4] * 6 + [5] * 3 + [6], "rows, rows with their bias, a norm"
    assert "unknown layout" in repr(grains)
    values = {name: torch.arange(math.prod(shape)).float().reshape(shape) for name, shape in grains.shapes.items()}
    sums = {name: grains.reduce(name, value.bfloat16()) for name, value in values.items()}
    assert grains.means(sums).tolist() == [1.5, 5.5, 9.5, 13.5, 17.5, 21.5, 6 / 5, 23 / 5, 40 / 5, 1.0]


def test_groups_are_taken_until_the_next_would_be_too_much() -> None:
    grains = Grains.of(small(), "row")
    values = {name: torch.zeros(shape) for name, shape in grains.shapes.items()}
    values["0.weight"][:] = 1.0
    values["2.weight"][:] = values["2.bias"][:] = 2.0
    for share, rows in ((0.2, []), (6 / 45, []), (13 / 45, [0]), (14 / 45, [0, 1]), (15 / 45, [0, 1])):
        plan = plan_of(grains, values, share)
        assert plan["2.weight"].frozen_fraction == plan["2.bias"].frozen_fraction == 1.0
        assert plan["0.weight"].rows.tolist() == rows if rows else "0.weight" not in plan, "the earlier of equal ones"
    assert not plan_of(grains, values, 5 / 45)


def test_tied_weights_are_one() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in Grains.of(model, "row").shapes
    assert Grains.of(model, "element").total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("grain", ["row", "unit", "element"])
def test_a_random_control_freezes_as_many(grain: str) -> None:
    model = tiny("llama")
    grains = Grains.of(model, grain)  # type: ignore[arg-type]
    values = noise(grains)
    plan, *controls = (plan_of(grains, values, 0.3, seed=seed) for seed in (None, 1, 2, (1, 7), 1))
    assert len({control.fingerprint for control in controls}) == 3 and plan not in controls
    assert controls[0] == controls[3]
    for control in controls:
        if grain == "unit":  # of each kind and layer; a query head's weights lie in other parameters than a KV head's
            counted = [
                sum(mask.frozen_count for name, mask in one.items() if "norm" not in name) for one in (plan, control)
            ]
        else:
            counted = [
                {name: mask.frozen_count for name, mask in one.items() if "norm" not in name} for one in (plan, control)
            ]
        assert counted[0] == counted[1]
    assert controls[0].metadata == {"grain": grain, "share": 0.3, "random": 1}


def test_sums_of_rows_that_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safefreeze_kernels.attribution.grains._CHUNK", 40)
    model = model_of("mixtral")
    for grain in ("row", "unit"):
        grains = Grains.of(model, grain)  # type: ignore[arg-type]
        values = noise(grains)
        plan = plan_of(grains, values, 0.4)
        monkeypatch.undo()
        assert plan == plan_of(grains, values, 0.4)


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("grain", ["row", "unit", "element"])
def test_shards_add_up(grain: str, dim: int) -> None:
    """Cut unevenly in three along a dimension, one shard of which may be empty; experts are cut within and between."""
    grains = Grains.of(model_of("mixtral"), grain)  # type: ignore[arg-type]
    for name, values in noise(grains).items():
        size, parts = -(-values.shape[dim] // 3), []
        for part in (slice(0, size), slice(size, 2 * size), slice(2 * size, None)):
            held = [np.arange(size) for size in values.shape]
            held[dim] = held[dim][part]
            found = grains.reduce(name, values[np.ix_(*held)], held)
            parts.append(found.view(*map(len, held)) if grain == "element" else found)
        expected = grains.reduce(name, values)
        found = torch.cat(parts, dim).reshape(-1) if grain == "element" else torch.stack(parts).sum(0)
        torch.testing.assert_close(found, expected, msg=name)


# ------------------------------------------------------------------------------------------------- elements


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, "codes"])
@pytest.mark.parametrize("share", [0.003, 0.2, 0.5, 0.97, 1.0])
def test_elements_are_the_highest_and_the_first_of_equal_ones(
    share: float, dtype: torch.dtype | str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stable sort has them; codes: of what 16 bits of each tell."""
    monkeypatch.setattr("safefreeze_kernels.attribution.grains._CHUNK", chunk)
    grains = Grains({"a": (9, 13), "b": (5,), "c": (2, 3, 4)}, "element")
    values = noise(grains)
    values["a"][::2] = values["a"][::2].round()  # many ties, and some of 0 and -0
    values["c"] *= 1e-20
    if isinstance(dtype, torch.dtype):
        values = {name: value.to(dtype) for name, value in values.items()}
        plan, seen = grains.plan(values, share), values
    else:
        plan = plan_of(grains, values, share)
        high = {name: (value + 0.0).view(torch.int32) & -65536 for name, value in values.items()}
        seen = {name: bits.view(torch.float32) for name, bits in high.items()}
    flat = torch.cat([seen[name].reshape(-1).float() for name in grains.shapes]).numpy()
    wanted = np.zeros(len(flat), bool)
    wanted[np.argsort(-flat, kind="stable")[: round(share * len(flat))]] = True
    found = [plan[name].dense() if name in plan else torch.zeros(shape) for name, shape in grains.shapes.items()]
    assert torch.cat([part.reshape(-1).bool() for part in found]).tolist() == wanted.tolist()


def test_few_elements_are_none() -> None:
    grains = Grains({"a": (3, 3)}, "element")
    assert not grains.plan({"a": torch.randn(3, 3)}, 0.05)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("grain", ["row", "element"])
@pytest.mark.parametrize(
    ("change", "share", "words"),
    [
        ("nan", 0.2, ("'1.weight'", "NaN")),
        ("inf", 0.2, ("'1.weight'", "infinite")),
        ("-inf", 0.2, ("'1.weight'", "infinite")),
        ("zero", 0.2, ("all values are 0",)),
        ("", 0.0, ("share is 0.0",)),
        ("", 1.5, ("share is 1.5",)),
        ("", float("nan"), ("share is nan",)),
        ("gone", 0.2, ("'1.weight'", "every parameter that trains")),
        ("shape", 0.2, ("'1.weight'",)),
    ],
)
def test_bad_values(grain: str, change: str, share: float, words: tuple[str, ...]) -> None:
    grains = Grains.of(small(), grain)  # type: ignore[arg-type]
    values = noise(grains)
    if change in ("nan", "inf", "-inf"):
        values["1.weight"][1, 2] = float(change)
    if change == "zero":
        values = {name: torch.zeros_like(value) for name, value in values.items()}
    reduced = {name: grains.reduce(name, value) for name, value in values.items()}
    if change == "gone":
        del reduced["1.weight"]
    if change == "shape":
        reduced["1.weight"] = reduced["1.weight"][:-1]
    with pytest.raises(ValueError, match="Grains") as caught:
        grains.plan(reduced, share)
    assert all(word in str(caught.value) for word in words), caught.value


def test_bad_grains() -> None:
    with pytest.raises(ValueError, match=r"'column'.*'row', 'unit', 'element'"):
        Grains.of(small(), "column")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"take grain 'row'.*no config"):
        Grains.of(small(), "unit")
    unknown = copy.deepcopy(tiny("llama"))
    unknown.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match=r"(?s)take grain 'row'.*register_family"):
        Grains.of(unknown, "unit")
    with pytest.raises(ValueError, match="no weight"):
        Grains.of(nn.Linear(2, 2).requires_grad_(False))
