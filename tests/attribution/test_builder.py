"""Attribution: labels, selections, plans."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from attribution_models import (
    LABEL_FILE,
    LLAMA_2_7B,
    SAFETY,
    UTILITY,
    flat,
    needs_labels,
    random_scores,
    refused,
    scores_from_channels,
    tiny,
    toy_layout,
)

from safefreeze_kernels.attribution import (
    LABELS,
    MaskBuilder,
    SetScores,
    UnitLabels,
    UnitRanking,
    UnitScores,
    UnitSelection,
    find_units,
    read_labels,
    score_units,
    stability,
)
from safefreeze_kernels.plan.plan import FreezePlan

pytestmark = pytest.mark.usefixtures("one_thread")  # models this small gain nothing from threads


def on_meta(**settings: Any) -> torch.nn.Module:
    """A real Llama without weights."""
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


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
    builder = MaskBuilder(scores_from_channels(safety, utility), {"RU": 0.16, "SCU": 0.08, "UCU": 0.76})
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
def test_level_scores_rank_nothing(recipe: Any) -> None:
    """Level in one layer: z is 0 there, no division by zero. Level in every layer: an error, not index order."""
    layout = toy_layout()
    level = SetScores(torch.full((2, 4, 2), 0.1), torch.full((2, 6), 0.1))
    spread = random_scores(layout).safety
    half = SetScores(*(torch.cat([a[:1], b[1:]]) for a, b in (
        (level.head_features, spread.head_features), (level.channels, spread.channels),
    )))  # fmt: skip
    values = MaskBuilder(UnitScores(layout, half, spread), recipe=recipe)._rank_values("safety")
    heads, channels = values[:8].reshape(2, 4), values[8:].reshape(2, 6)
    assert not heads[0].any() and not channels[0].any() and heads[1].all() and channels[1].all()
    for word, sets in (("safety", (level, spread)), ("utility", (spread, level))):
        builder = MaskBuilder(UnitScores(layout, *sets), recipe=recipe)
        for ask in (builder.freeze, lambda b=builder: b.top(0.5), lambda b=builder: b.labels):
            with pytest.raises(ValueError, match=f"the {word} scores of all units of a layer are the same"):
                ask()


def test_builder_refuses_bad_settings() -> None:
    scores = random_scores(toy_layout())
    refused("recipe is 'mine', expected one of 'paper', 'ssah-prototype'", lambda: MaskBuilder(scores, recipe="mine"))
    refused("ratios names 'CU', expected 'RU', 'SCU' and 'UCU'", lambda: MaskBuilder(scores, {"CU": 0.1}))
    for bad in (-0.1, 1.1, math.nan, "a", True):
        with pytest.raises(ValueError, match=r"ratio of RU is .*, expected a fraction from 0 to 1"):
            MaskBuilder(scores, {"RU": bad})  # type: ignore[dict-item]
    for over in ({"SCU": 0.6, "UCU": 0.6}, {"RU": 0.5, "SCU": 0.3, "UCU": 0.3}, {"RU": 0.9}):
        with pytest.raises(ValueError, match=r"ratios are RU=.*, SCU=.*, UCU=.*, expected a sum of at most 1"):
            MaskBuilder(scores, over)
    MaskBuilder(scores, {"RU": 0.7, "SCU": 0.2, "UCU": 0.1})  # 0.7 + 0.2 + 0.1 is not 1.0 in floating point
    refused("scores is a dict, expected UnitScores, UnitLabels or UnitRanking", lambda: MaskBuilder({}), TypeError)
    for cost in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="head_cost is"):
            MaskBuilder(scores, head_cost=cost)
    refused("ratios given with finished UnitLabels", lambda: MaskBuilder(MaskBuilder(scores).labels, {"RU": 0.1}))


def test_labels_are_checked() -> None:
    codes = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"channels has dtype torch.float32, expected integer codes"):
        UnitLabels(codes, codes.float())
    refused("heads holds codes from 0 to 4", lambda: UnitLabels(codes + torch.tensor([0, 0, 4]), codes))
    refused(r"heads has shape \(3,\)", lambda: UnitLabels(codes[0], codes))
    refused("heads has 1 layers and channels 2", lambda: UnitLabels(codes[:1], codes))


# ------------------------------------------------------------------------------------------------- selecting


def builder_with_costs(**ratios: float) -> tuple[MaskBuilder, np.ndarray, np.ndarray]:
    """A builder, its flat labels and the flat costs of units."""
    layout = toy_layout(n_layers=3, n_heads=4, d_ff=300)
    builder = MaskBuilder(random_scores(layout, seed=5), ratios or None)
    costs = np.concatenate([np.full(12, layout.head_cost), np.ones(900)])
    return builder, flat(builder.labels.heads, builder.labels.channels), costs


def chosen(selection: UnitSelection) -> np.ndarray:
    return selection.flat


def test_freeze_by_label() -> None:
    builder, codes, _ = builder_with_costs()
    assert np.array_equal(chosen(builder.freeze()), codes == 1)
    assert np.array_equal(chosen(builder.freeze(scu=True, cu=True)), (codes == 1) | (codes == 3))
    assert np.array_equal(chosen(builder.freeze(scu=False, cu=True)), codes == 3)
    assert np.array_equal(chosen(builder.train_only("RU")), codes != 0)
    assert np.array_equal(chosen(builder.train_only(["RU", "UCU"])), (codes == 1) | (codes == 3))
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
    refused(r"cu=1.0 asks for 100.0% .*, expected at most 79.*; pass cu=True", lambda: builder.freeze(cu=1.0))
    assert np.array_equal(chosen(builder.freeze(cu=0.0)), codes == 1)


def test_a_share_takes_scu_then_cu_then_ucu_then_ru() -> None:
    builder, codes, costs = builder_with_costs()
    previous = np.zeros(codes.size, bool)
    complete = {1: 0.011, 3: 0.80, 2: 0.91, 0: 1.0}  # by then, labels in this order are used up
    order = list(complete)
    for share in (0.005, 0.011, 0.4, 0.80, 0.85, 0.91, 0.95, 1.0):
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


def test_freeze_refuses_bad_requests() -> None:
    builder, _, _ = builder_with_costs()
    for bad in (-0.1, 1.1, math.nan, "half"):
        with pytest.raises(ValueError, match=r"freeze: cu is .*, expected a fraction from 0 to 1"):
            builder.freeze(cu=bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"freeze: share is .*, expected a fraction from 0 to 1"):
            builder.freeze(share=bad)  # type: ignore[arg-type]
    refused("freeze: share is True", lambda: builder.freeze(share=True))
    for more in ({"cu": 0.1}, {"cu": True}, {"scu": False}):
        with pytest.raises(ValueError, match="share given with scu or cu"):
            builder.freeze(share=0.5, **more)  # type: ignore[arg-type]
    refused("cu_share_of is 'all', expected one of 'units', 'cu'", lambda: builder.freeze(cu=0.1, cu_share_of="all"))
    with pytest.raises(ValueError, match="cu_rank is 'size', expected one of 'sum', 'safety', 'utility', 'diff'"):
        builder.freeze(cu=0.1, cu_rank="size")  # type: ignore[arg-type]
    refused("label is 'XU', expected one of 'RU', 'SCU', 'UCU', 'CU'", lambda: builder.train_only("XU"))
    refused("share given with label 'CU', expected it with 'RU' only", lambda: builder.train_only("CU", 0.1))
    with pytest.raises(ValueError, match=r"share given with label .'RU', 'UCU'., expected it with 'RU' only"):
        builder.train_only(["RU", "UCU"], 0.1)
    refused("train_only: share is 2", lambda: builder.train_only("RU", 2))


def test_nothing_and_everything() -> None:
    """A request no unit meets is an error: an empty plan would freeze nothing without a word. Every unit can be
    frozen on purpose, and only then."""
    builder, _, _ = builder_with_costs()
    for nothing in (
        lambda: builder.freeze(scu=False),
        lambda: builder.freeze(scu=False, cu=0.0),
        lambda: builder.freeze(share=0.0),
        lambda: builder.top(0.0),
        lambda: builder.top(1e-9),
        lambda: builder.set_difference(0.1, 1.0),
        lambda: builder.train_only("RU", 1.0),
        lambda: builder.train_only(["RU", "SCU", "UCU", "CU"]),
        lambda: builder_with_costs(SCU=0.0)[0].freeze(),
    ):
        with pytest.raises(ValueError, match=r"(freeze|top|set_difference|train_only): selects no unit .*expected at"):
            nothing()
    for nothing in (lambda: builder.train_only("RU", 0.0), lambda: builder_with_costs(RU=0.0)[0].train_only("RU")):
        with pytest.raises(ValueError, match=r"no unit is left to train .*; to freeze every unit on purpose, use fr"):
            nothing()
    some = builder.freeze()
    refused("build: the selection holds no unit", lambda: (some - some).build())
    for everything in (builder.freeze(share=1.0), builder.top(1.0), builder.top(1.0, per_layer=True), some | ~some):
        assert chosen(everything).all() and everything.build().frozen_fraction == 1.0


# --------------------------------------------------------------------------------------------------- ranking


@pytest.mark.parametrize("by", ["diff", "sum", "safety", "utility"])
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_top_units_rank_highest_in_exact_numbers(by: Any, per_layer: bool, apart: bool) -> None:
    builder, _, costs = builder_with_costs()
    values, kinds = builder._rank_values(by), np.arange(912) >= 12
    layers = np.concatenate([np.repeat(np.arange(3), 4), np.repeat(np.arange(3), 300)])
    groups = [
        (layers == layer if per_layer else layers >= 0) & (kinds == kind if apart else True)
        for layer in (range(3) if per_layer else [0])
        for kind in ((False, True) if apart else [None])
    ]
    counted = chosen(builder.top(3, by, per_layer=per_layer, apart=apart))
    shared = chosen(builder.top(0.3, by, per_layer=per_layer, apart=apart))
    for group in groups:
        assert counted[group].sum() == 3
        nearest = costs.max() / 2 if not apart else costs[group].max() / 2
        assert abs(costs[group & shared].sum() - 0.3 * costs[group].sum()) <= nearest
        for frozen in (counted, shared):
            assert values[group & frozen].min() >= values[group & ~frozen].max()
    assert counted.sum() == 3 * len(groups)


def test_top_of_one_kind_and_of_ties() -> None:
    builder, _, _ = builder_with_costs()
    heads, channels = builder.top(2, units="heads"), builder.top(7, units="channels")
    assert (heads.heads.sum(), heads.channels.sum()) == (2, 0)
    assert (channels.heads.sum(), channels.channels.sum()) == (0, 7)
    assert np.array_equal(chosen(heads | channels), chosen(builder.top(2, units="heads")) | chosen(channels))
    tied = UnitRanking(toy_layout(n_layers=1), channels=np.array([[1.0, 2, 2, 2, 1, 0]]))
    for amount in (2, 2 / 6):
        assert np.flatnonzero(MaskBuilder(tied).top(amount).channels).tolist() == [1, 2]
    assert np.flatnonzero(MaskBuilder(tied).top(4).channels).tolist() == [0, 1, 2, 3]


def test_a_ranking_is_selected_by_its_own_score() -> None:
    layout = toy_layout()
    heads, channels = np.arange(8.0).reshape(2, 4), -np.arange(12.0).reshape(2, 6)
    both = MaskBuilder(UnitRanking(layout, torch.from_numpy(heads), channels, "ours"))
    top = both.top(0.25)
    assert np.flatnonzero(top.heads).tolist() == [6, 7] and np.flatnonzero(top.channels).tolist() == [0, 1, 2]
    plan = top.build()
    assert plan.metadata["method"] == "ours" and plan.metadata["selection"]["by"] == "score"
    together = both.top(3, apart=False)
    assert np.flatnonzero(together.heads).tolist() == [5, 6, 7] and not together.channels.any()
    alone = MaskBuilder(UnitRanking(layout, channels=channels))
    assert not alone.top(0.25).heads.any() and np.flatnonzero(alone.top(0.25).channels).tolist() == [0, 1, 2]
    assert "scores of channels" in repr(UnitRanking(layout, channels=channels))
    refused(r"units is 'heads', expected a kind of unit that UnitRanking.* scores", lambda: alone.top(1, units="heads"))
    for ask in (alone.freeze, alone.train_only, lambda: alone.labels):
        with pytest.raises(ValueError, match=r"labels need a safety and a utility score per unit.*select with top\(\)"):
            ask()
    refused("by 'diff', but a ranking holds one score per unit", lambda: alone.top(1, by="diff"))
    refused("ratios given with finished UnitRanking", lambda: MaskBuilder(UnitRanking(layout, heads), {"RU": 0.1}))
    with pytest.raises(ValueError, match="'fluctuation' gives a safety and a utility score, not one score"):
        MaskBuilder(random_scores(layout)).top(0.1, by="score")


def test_rankings_are_checked() -> None:
    layout = toy_layout()
    refused("neither heads nor channels given", lambda: UnitRanking(layout))
    with pytest.raises(ValueError, match=r"channels has shape \(2, 5\), expected \(2, 6\) for llama"):
        UnitRanking(layout, channels=np.ones((2, 5)))
    for bad in (math.nan, math.inf):
        scores = torch.ones(2, 4)
        scores[1, 2] = bad
        with pytest.raises(ValueError, match=f"heads holds {bad} at layer 1, unit 2, expected finite"):
            UnitRanking(layout, heads=scores)  # type: ignore[arg-type]
    constant = UnitRanking(layout, np.arange(8.0).reshape(2, 4), np.full((2, 6), 3.0))
    assert MaskBuilder(constant).top(1, units="heads").heads[1, 3]
    refused("the scores of all channels are the same", lambda: MaskBuilder(constant).top(0.5))


def test_top_refuses_bad_requests() -> None:
    builder, _, _ = builder_with_costs()
    for bad in (-0.5, 1.5, math.nan, "all", True, None):
        with pytest.raises(ValueError, match=r"top: amount is .*, expected a fraction from 0 to 1"):
            builder.top(bad)  # type: ignore[arg-type]
    for bad in (0, -3):
        with pytest.raises(ValueError, match=f"top: amount is {bad}, expected a count of at least 1"):
            builder.top(bad)
    refused("top: amount is 13 heads, expected at most 12, which is all", lambda: builder.top(13))
    refused("top: amount is 5 heads of layer 0, expected at most 4", lambda: builder.top(5, per_layer=True))
    with pytest.raises(ValueError, match="by is 'size', expected one of 'sum', 'safety', 'utility', 'diff', 'score'"):
        builder.top(0.1, by="size")  # type: ignore[arg-type]
    refused("units is 'rows', expected one of 'all', 'heads', 'channels'", lambda: builder.top(0.1, units="rows"))


def test_set_difference_by_hand() -> None:
    """Top 4 for safety are channels 0, 1, 2, 6; top 3 for utility are 6, 8, 9: what is left is 0, 1, 2."""
    scores = scores_from_channels([9.0, 7, 6, 5, 1, 2, 8, 4, 3, 0], [0.0, 3, 4, 6, 1, 2, 8, 5, 7, 9])
    left = MaskBuilder(scores).set_difference(np.int64(4), 3, units="channels")  # numpy's numbers fit into a plan file
    assert np.flatnonzero(left.channels).tolist() == [0, 1, 2] and not left.heads.any()
    where = {"units": "channels", "per_layer": True, "apart": True}
    assert left.build().metadata["selection"] == {"set_difference": {"safety": 4, "utility": 3}, **where}
    builder, _, _ = builder_with_costs()
    for per_layer in (True, False):
        mine = builder.set_difference(0.2, 0.3, per_layer=per_layer)
        parts = (builder.top(q, by, per_layer=per_layer) for q, by in ((0.2, "safety"), (0.3, "utility")))  # type: ignore[arg-type]
        safety, utility = map(chosen, parts)
        assert np.array_equal(chosen(mine), safety & ~utility) and 0 < chosen(mine).sum() < safety.sum()


# ------------------------------------------------------------------------------------- labels, sets, models


def test_labels_alone_freeze_whole_labels_only() -> None:
    scored, codes, _ = builder_with_costs()
    builder = MaskBuilder(scored.labels)
    assert np.array_equal(chosen(builder.freeze(cu=True)), (codes == 1) | (codes == 3))
    assert np.array_equal(chosen(builder.train_only("RU")), codes != 0)
    for ask in (
        lambda: builder.freeze(cu=0.06),
        lambda: builder.freeze(share=0.8),
        lambda: builder.train_only("RU", 0.2),
        lambda: builder.top(0.2, by="safety"),
    ):
        with pytest.raises(ValueError, match="labels carry no scores; freeze whole labels"):
            ask()
    refused("labels do not say which model", lambda: builder.freeze().build())
    assert builder.freeze(cu=True).build(scored.layout) == scored.freeze(cu=True).build()


def test_build_refuses_another_model() -> None:
    selection = MaskBuilder(random_scores(toy_layout())).freeze(cu=True)
    refused(r"heads \(2, 4\) and channels \(2, 6\), expected \(2, 4\) and \(2, 24\)", lambda: selection.build(tiny()))
    refused("preset is 'both'", lambda: selection.build(preset="both"))


def test_from_scores_to_a_plan(tmp_path: Path) -> None:
    model = tiny()
    scores = score_units(model, SAFETY, UTILITY)
    plan = MaskBuilder(scores).freeze(scu=True, cu=0.06).build(model)
    plan.check(model)
    assert 0 < plan.frozen_fraction < 1
    assert plan.metadata["recipe"] == "paper" and plan.metadata["ratios"] == {"RU": 0.1, "SCU": 0.01, "UCU": 0.1}
    assert plan.metadata["selection"] == {"scu": True, "cu": 0.06, "cu_share_of": "units", "cu_rank": "sum"}
    plan.save(tmp_path / "plan.safetensors")
    assert FreezePlan.load(tmp_path / "plan.safetensors").metadata == plan.metadata
    everything = MaskBuilder(scores).freeze(share=1.0).build(model)
    assert everything.frozen_fraction == 1.0 and set(everything) == set(scores.layout.parameters)


def test_a_plan_is_built_for_the_weights_that_were_scored() -> None:
    model, other = tiny(), tiny()
    scores = score_units(model, SAFETY, UTILITY)
    selections = [MaskBuilder(scores).freeze(cu=True), MaskBuilder(scores).top(0.5)]
    selections += [selections[0] - selections[1], ~selections[0], selections[1].random_like(0)]
    with torch.no_grad():
        other.get_parameter("model.layers.1.mlp.up_proj.weight").add_(0.1)
    bare = on_meta(**model.config.to_dict())
    for selection in selections:
        plan = selection.build(model)
        with pytest.raises(ValueError, match=r"the model's weights have fingerprint .*; score this model, or load the"):
            selection.build(other)
        # without weights, or with the layout alone, there is nothing to compare
        assert selection.build(bare) == selection.build(find_units(other)) == selection.build() == plan
    assert selections[0].build(model).metadata["scored"]["model"] == scores.model_fingerprint
    with pytest.raises(ValueError, match="union: the units were scored on models with other weights"):
        selections[0] | MaskBuilder(score_units(other, SAFETY, UTILITY)).freeze()
    # foreign labels say nothing about weights
    MaskBuilder(MaskBuilder(scores).labels).freeze().build(other)


def test_decision_fisher_is_selected_by_its_own_score() -> None:
    model = tiny()
    scores = score_units(model, SAFETY, UTILITY, "decision_fisher", refuse_token=5)
    assert scores.ranking is not None
    builder = MaskBuilder(scores)
    top = builder.top(0.25)
    for chosen_units, ranked in ((top.heads, scores.ranking.heads), (top.channels, scores.ranking.channels)):
        best = ranked.flatten().argsort(descending=True, stable=True)[: chosen_units.sum()]
        assert np.array_equal(np.flatnonzero(chosen_units), best.sort().values.numpy())
    assert (top.heads.sum(), top.channels.sum()) == (2, 12)
    metadata = top.build(model).metadata
    assert metadata["method"] == "decision_fisher" and metadata["selection"]["by"] == "score"
    assert builder.labels.counts()["SCU"] and builder.top(0.25, by="diff").heads.sum() == 2
    assert builder.freeze(scu=False, cu=0.1, cu_rank="score").build(model)


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
    refused("jaccard: selections of", lambda: one.jaccard(UnitSelection(heads, np.zeros((1, 4), bool))))
    refused("heads has dtype int64, expected bool", lambda: UnitSelection(heads.astype(np.int64), heads), TypeError)
    refused(r"heads has shape \(1, 2\) and channels \(2, 3\)", lambda: UnitSelection(heads, np.zeros((2, 3), bool)))
    with pytest.raises(ValueError, match="read-only"):
        one.channels[0, 0] = False


def test_selections_combine_as_sets() -> None:
    builder, codes, _ = builder_with_costs()
    cu, scu = builder.freeze(scu=False, cu=True), builder.freeze()
    low = builder.top(0.6, by="utility")
    for combined, expected in (
        (scu | cu, (codes == 1) | (codes == 3)),
        (cu & low, (codes == 3) & chosen(low)),
        (cu - low, (codes == 3) & ~chosen(low)),
        (~cu, codes != 3),
    ):
        assert np.array_equal(chosen(combined), expected) and combined.layout == builder.layout
    plan = (scu | cu).build()
    assert plan == builder.freeze(cu=True).build()
    parts = [part["selection"] for part in plan.metadata["union"]]
    assert parts == [{"scu": True, "cu": False}, {"scu": False, "cu": True}]
    assert (~cu).build().metadata["all_but"]["selection"] == {"scu": False, "cu": True}
    # a layout known to one of them is known to both together
    assert (MaskBuilder(builder.labels).freeze() | cu).build() == plan
    with pytest.raises(ValueError, match=r"union: selections of heads \(3, 4\) and \(2, 4\)"):
        scu | MaskBuilder(random_scores(toy_layout())).freeze()
    twin = MaskBuilder(random_scores(toy_layout(n_layers=3, n_heads=4, d_ff=300, hidden=16)), None)
    refused(r"difference: selections for llama.* and llama.*, expected one model", lambda: scu - twin.freeze())
    refused("unsupported operand", lambda: scu | {1, 2}, TypeError)


# ------------------------------------------------------------------------------------------------- stability


def test_stability_by_hand() -> None:
    """Of 4 channels each freezes 2. Pairs share 2, 1 and 1 of them: Jaccard 1, 1/3, 1/3. Random pairs share
    2·2/4 = 1 on average, an overlap of 1/3: beyond chance the pairs agree by 1, 0 and 0."""
    heads = np.zeros((1, 2), bool)
    rows = ([1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0])
    selections = [UnitSelection(heads, np.array([row], bool)) for row in rows]
    report = stability(dict(zip(("a", "b", "c"), selections, strict=True)))
    np.testing.assert_allclose(report.jaccard, [[1, 1, 1 / 3], [1, 1, 1 / 3], [1 / 3, 1 / 3, 1]])
    np.testing.assert_allclose(report.chance, [[1, 1 / 3, 1 / 3], [1 / 3, 1, 1 / 3], [1 / 3, 1 / 3, 1]])
    assert (report.mean, report.min, report.expected) == pytest.approx((5 / 9, 1 / 3, 1 / 3))
    assert report.agreement == pytest.approx(1 / 3) and report.low
    assert "lowest: 0.333, a and c" in str(report) and "warning: the selections agree little: 0.33" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["names"] == ["a", "b", "c"]
    same = stability(selections[:2])
    assert (same.agreement, same.low, same.warning) == (1.0, False, None) and "warning" not in str(same)
    everything = UnitSelection(~heads, np.ones((1, 4), bool))
    assert stability([everything, everything]).agreement == 1.0


def test_chance_is_what_random_selections_overlap() -> None:
    builder, _, _ = builder_with_costs()
    for selection in (builder.freeze(), builder.freeze(cu=True), builder.top(0.5)):
        controls = [selection.random_like(seed) for seed in range(12)]
        report = stability(controls)
        assert report.mean == pytest.approx(report.expected, abs=0.006)
        assert report.low and abs(report.agreement) < 0.01
        assert stability([selection, selection]).agreement == 1.0
    # where most units are frozen, chance alone overlaps widely
    assert stability([builder.freeze(cu=True)] * 2).expected > 0.6


def test_stability_refuses_what_it_cannot_compare() -> None:
    one, other = (MaskBuilder(random_scores(toy_layout(n_layers=n))).freeze(share=0.5) for n in (2, 3))
    refused("1 selections given, expected at least two", lambda: stability([one]))
    refused("selection 1 is a ndarray, expected a UnitSelection", lambda: stability([one, one.heads]), TypeError)
    refused("jaccard: selections of heads", lambda: stability([one, other]))


# ------------------------------------------------------------------------------------------ published labels


@needs_labels
def test_published_label_counts() -> None:
    counts = read_labels(LABEL_FILE).counts()
    assert counts == {"RU": (0, 52504), "SCU": (4, 4583), "UCU": (34, 46855), "CU": (986, 248314)}


@needs_labels
def test_published_labels_make_the_published_plan() -> None:
    """SSAH's check table for Llama-2-7B-chat, to the last unit; SCU + all CU freeze 80.0% of the block parameters:
    1.29 of 6.48 billion train."""
    model = on_meta()  # transformers' defaults are Llama-2-7B
    layout, builder = find_units(model), MaskBuilder(read_labels(LABEL_FILE))
    total = sum(math.prod(shape) for shape in layout.parameters.values())
    table = {}
    for label in LABELS:
        selection = ~builder.train_only(label)
        counts = int(selection.heads.sum()), int(selection.channels.sum())
        frozen = sum(mask.frozen_count for mask in selection.build(model).values()) if any(counts) else 0
        share = 100 * sum(counts) / (selection.heads.size + selection.channels.size)
        table[label] = (*counts, round(share, 3 if label == "SCU" else 2), round(100 * frozen / total, 2))
    assert table == {
        "SCU": (4, 4583, 1.298, 1.00),
        "UCU": (34, 46855, 13.27, 9.99),
        "CU": (986, 248314, 70.57, 79.05),
        "RU": (0, 52504, 14.86, 9.96),
    }
    plan = builder.freeze(scu=True, cu=True).build(model)
    plan.check(model)
    frozen = sum(mask.frozen_count for mask in plan.values())
    assert round(total / 1e9, 2) == 6.48 and round((total - frozen) / 1e9, 2) == 1.29
    assert round(100 * frozen / total, 1) == 80.0 and set(plan) == set(layout.parameters)
    assert plan.metadata["frozen_heads"] == 990 and plan.metadata["frozen_channels"] == 252897
    producer = builder.freeze(scu=True, cu=True).build(model, preset="producer")
    assert sum(mask.frozen_count for mask in producer.values()) == 990 * 3 * 128 * 4096 + 252897 * 2 * 4096


def test_llama_3_8b_shares_kv_heads_as_each_policy_says() -> None:
    """Grouped-query attention: 32 query heads on 8 KV heads. Labels drawn in the published proportions; everything is
    counted again by hand."""
    model = on_meta(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    layout = find_units(model)
    assert round(layout.head_cost, 2) == 106.67 and layout.head_dim == 128
    draw = np.random.default_rng(0)
    shares = [0.1486, 0.013, 0.1327, 0.7057]  # RU, SCU, UCU, CU
    codes = [draw.choice(4, shape, p=shares) for shape in (layout.heads_shape, layout.channels_shape)]
    selection = MaskBuilder(UnitLabels(*map(torch.from_numpy, codes))).freeze(scu=True, cu=True)
    frozen = [np.isin(code, (1, 3)) for code in codes]
    assert np.array_equal(selection.heads, frozen[0]) and np.array_equal(selection.channels, frozen[1])
    groups = frozen[0].reshape(32, 8, 4)
    heads, channels, plans = frozen[0].sum(1), frozen[1].sum(1), {}
    for kv, kv_heads in (("any", groups.any(2)), ("all", groups.all(2)), ("never", np.zeros((32, 8), bool))):
        full, producer = (selection.build(model, preset, kv) for preset in ("full", "producer"))  # type: ignore[arg-type]
        full.check(model)
        plans[kv] = full
        for layer in range(32):
            name, k = f"model.layers.{layer}", int(kv_heads[layer].sum())
            assert full[f"{name}.self_attn.q_proj.weight"].rows.numel() == 128 * heads[layer]
            for matrix in ("k_proj", "v_proj"):
                mask = full.get(f"{name}.self_attn.{matrix}.weight")
                assert (0 if mask is None else mask.rows.numel()) == 128 * k
            assert full[f"{name}.self_attn.o_proj.weight"].cols.numel() == 128 * heads[layer]
            for matrix in ("gate_proj", "up_proj"):
                assert full[f"{name}.mlp.{matrix}.weight"].rows.numel() == channels[layer]
            assert full[f"{name}.mlp.down_proj.weight"].cols.numel() == channels[layer]
        rows = 128 * 4096 * (int(heads.sum()) + 2 * int(kv_heads.sum())) + 2 * 4096 * int(channels.sum())
        assert sum(mask.frozen_count for mask in producer.values()) == rows
        readers = 4096 * (128 * int(heads.sum()) + int(channels.sum()))
        assert sum(mask.frozen_count for mask in full.values()) == rows + readers
        assert full | producer == full and all(full[name] == mask for name, mask in producer.items())
    # the policies nest, and the parameters they add are KV rows alone
    assert plans["any"] | plans["all"] == plans["any"] and plans["all"] | plans["never"] == plans["all"]
    assert len({plan.fingerprint for plan in plans.values()}) == 3
    # a share of the cost is that share of the block parameters where whole groups freeze
    everything = UnitSelection(np.ones_like(frozen[0]), np.ones_like(frozen[1]), layout).build(model)
    assert everything.frozen_fraction == 1.0


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
