"""`safefreeze score`, `build` and `inspect` from end to end on a tiny random model, and the scripts in examples/."""

from __future__ import annotations

import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_models import LABEL_FILE, needs_labels, random_scores, tiny, toy_layout
from model_folders import fails, png_size, run, save_model

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import (
    LABELS,
    METHODS,
    UnitLabels,
    UnitScores,
    UnitSelection,
    WeightScores,
    encode_pairs,
    find_units,
    stability,
)  # fmt: skip
from safefreeze_kernels.attribution.pictures import complete_plan, draw_units, frozen_units
from safefreeze_kernels.calibration import load_pairs, read_pairs
from safefreeze_kernels.cli import plans
from safefreeze_kernels.integrations.transformers import load_model, load_skeleton

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")

Loaded = tuple[torch.nn.Module, Any]  # a model and its tokenizer
Scored = tuple[Path, str]  # a score file, and what the command printed that wrote it
EXAMPLES = Path(__file__).parents[1] / "examples"
LLAMA_2_7B_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Loaded:
    return load_model(model_folder)[1:]


@pytest.fixture(scope="module")
def scored(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """A score file written by the command, and what the command printed."""
    path = tmp_path_factory.mktemp("scored") / "scores.safetensors"
    return path, succeeds("score", model_folder, "--output", path)


def succeeds(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert max(map(len, result.stdout.splitlines())) <= 80, "does not fit a terminal"
    return result.stdout


def cells(text: str, first: str) -> list[list[str]]:
    """The rows of tables in ``text`` that begin with ``first``, cell by cell."""
    rows = [line.split("  ") for line in text.splitlines()]
    stripped = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return [row[1:] for row in stripped if len(row) > 1 and row[0] == first]


def built(scores: Path, folder: Path, *options: object) -> tuple[Path, str]:
    """The plan that the command builds from scores, and what it printed."""
    path = folder / "plan.safetensors"
    return path, succeeds("build", scores, "-o", path, *options)


def labels_of(scores: Path, path: Path) -> UnitLabels:
    """The labels that follow from a score file, saved."""
    labels = sf.MaskBuilder(UnitScores.load(scores)).labels
    labels.save(path)
    return labels


def batches(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[dict[str, torch.Tensor]]:
    return encode_pairs(tokenizer, pairs, batch_size=8)


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------- score


def test_from_text_to_plan_to_training(scored: Scored, model_folder: Path, tmp_path: Path) -> None:
    plan, _ = built(scored[0], tmp_path, "--cu", 0.06)
    run_it = "demo", "--model", model_folder, "--plan", plan, "--steps", 2, "--repeats", 1
    text = succeeds(*run_it, "--output", tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert "Frozen bytes are equal" in text and numbers["frozen_values_changed"] == 0 < numbers["live_values_changed"]
    made = sf.FreezePlan.load(plan)
    assert numbers["fingerprint"] == made.fingerprint
    assert numbers["frozen_values"] == sum(mask.frozen_count for mask in made.values())


def test_score_writes_what_score_units_returns(scored: Scored, model: Loaded) -> None:
    network, tokenizer = model
    path, text = scored
    mine = UnitScores.load(path)
    sets = [batches(tokenizer, load_pairs(name)) for name in ("safety", "utility")]
    expected = sf.score_units(network, *sets)
    for word in ("safety", "utility"):
        for part in ("head_features", "channels"):
            assert torch.equal(getattr(getattr(mine, word), part), getattr(getattr(expected, word), part)), word
    mine.check(network)
    assert "fluctuation scores" in text and str(mine.layout) in " ".join(text.split())
    heads = mine.safety.heads
    assert cells(text, "heads")[0][:4] == ["safety", *(f"{v:.3g}" for v in (heads.min(), heads.median(), heads.max()))]


def test_score_takes_own_sets_and_options(model_folder: Path, model: Loaded, tmp_path: Path) -> None:
    network, tokenizer = model
    pairs = {name: load_pairs(name)[:5] for name in ("safety", "utility")}
    files = {name: write_pairs(tmp_path / name, some) for name, some in pairs.items()}
    out = tmp_path / "scores.safetensors"
    text = succeeds(
        "score", model_folder, "-o", out, "--safety", files["safety"], "--utility", files["utility"],
        "--method", "decision_fisher", "--batch-size", 3, "--max-length", 64,
    )  # fmt: skip
    sets = [encode_pairs(tokenizer, some, batch_size=3, max_length=64) for some in pairs.values()]
    expected = sf.score_units(network, *sets, method="decision_fisher")
    mine = UnitScores.load(out)
    assert "--top 0.2" in text, "its own score is not what labels are made of"
    assert mine.method == "decision_fisher" and mine.ranking is not None and expected.ranking is not None
    assert torch.equal(mine.ranking.channels, expected.ranking.channels)
    assert mine.safety.n_positions == expected.safety.n_positions


def test_score_goes_on_from_a_partial_file(scored: Scored, model_folder: Path, model: Loaded, tmp_path: Path) -> None:
    network, tokenizer = model
    out = tmp_path / "scores.safetensors"
    partial = tmp_path / "scores.safetensors.partial"

    def breaking():  # type: ignore[no-untyped-def]
        yield from batches(tokenizer, load_pairs("utility"))[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sf.score_units(network, batches(tokenizer, load_pairs("safety")), breaking(), resume=partial, every=1)
    assert partial.exists()
    succeeds("score", model_folder, "-o", out, "--resume")
    assert not partial.exists()
    whole, resumed = UnitScores.load(scored[0]), UnitScores.load(out)
    assert torch.equal(whole.utility.channels, resumed.utility.channels)
    assert torch.equal(whole.safety.channels, resumed.safety.channels)


def test_score_compares_halves_of_the_sets(model_folder: Path, model: Loaded, tmp_path: Path) -> None:
    network, tokenizer = model
    pairs = [load_pairs(name)[:7] for name in ("safety", "utility")]
    files = [write_pairs(tmp_path / str(number), some) for number, some in enumerate(pairs)]
    where = ["--safety", files[0], "--utility", files[1], "-o", tmp_path / "s.safetensors"]
    result = run("score", model_folder, *where, "--halves", "--seeds", 2)
    assert result.exit_code == 0, result.output
    overlaps = []
    for seed in (0, 1):
        halves = list(plans.halved(pairs, seed))
        for both, whole in zip(zip(*halves, strict=True), pairs, strict=True):
            assert sorted([*both[0], *both[1]]) == sorted(whole) and abs(len(both[0]) - len(both[1])) <= 1
            assert all(half == [pair for pair in whole if pair in half] for half in both), "order within is kept"
        made = [sf.score_units(network, *(batches(tokenizer, part) for part in half)) for half in halves]
        overlaps.append(stability([sf.MaskBuilder(scores).freeze(cu=0.06) for scores in made]).mean)
    assert cells(result.stdout, "SCU + 6% CU")[0][0] == f"{np.mean(overlaps):.3f}"
    assert list(plans.halved(pairs, 0)) != list(plans.halved(pairs, 1))


def test_low_stability_is_warned_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    one, two = (random_scores(toy_layout(d_ff=400), seed) for seed in (0, 1))
    plans.show_stability([[one, one]])
    alike = capsys.readouterr().out
    plans.show_stability([[one, two]])
    unlike = capsys.readouterr().out
    assert "agree little" not in alike and cells(alike, "SCU")[0] == ["1.000", cells(alike, "SCU")[0][1], "1.000"]
    assert unlike.count("agree little") == 3, "once for each selection"


# ---------------------------------------------------------------------------------------------------------- build


@pytest.mark.parametrize(
    ("options", "of_builder", "of_plan"),
    [
        ("", lambda b: b.freeze(), {}),
        ("--cu 0.3 --cu-share-of cu --cu-rank safety",
         lambda b: b.freeze(cu=0.3, cu_share_of="cu", cu_rank="safety"), {}),
        ("--no-scu --cu all --preset producer --kv never",
         lambda b: b.freeze(scu=False, cu=True), {"preset": "producer", "kv": "never"}),
        ("--share 0.4 --kv all", lambda b: b.freeze(share=0.4), {"kv": "all"}),
        ("--train-only RU --share 0.2", lambda b: b.train_only("RU", 0.2), {}),
        ("--train-only RU,UCU", lambda b: b.train_only(("RU", "UCU")), {}),
        ("--top 0.2 --by diff --together", lambda b: b.top(0.2, "diff", apart=False), {}),
        ("--top 2 --units channels --per-layer", lambda b: b.top(2, units="channels", per_layer=True), {}),
        ("--cu 0.2 --random 3", lambda b: b.freeze(cu=0.2).random_like(3), {}),
    ],
)  # fmt: skip
def test_build_makes_and_tells_the_plan(
    scored: Scored, model_folder: Path, tmp_path: Path, options: str, of_builder: Any, of_plan: dict[str, Any]
) -> None:
    path, text = built(scored[0], tmp_path, *options.split())
    plan, scores = sf.FreezePlan.load(path), UnitScores.load(scored[0])
    builder = sf.MaskBuilder(scores)
    selection = of_builder(builder)
    assert plan == selection.build(**of_plan)

    layout, labels = scores.layout, builder.labels
    cost = layout.n_layers * (layout.n_heads * layout.head_cost + layout.d_ff)
    for label in (*LABELS, "all"):
        kinds = [(selection.heads, labels.heads.numpy()), (selection.channels, labels.channels.numpy())]
        of = [codes == LABELS.index(label) if label != "all" else codes < 9 for _, codes in kinds]
        frozen = [int((chosen & these).sum()) for (chosen, _), these in zip(kinds, of, strict=True)]
        assert cells(text, label)[0] == [
            *(f"{some:,} of {these.sum():,}" for some, these in zip(frozen, of, strict=True)),
            f"{100 * sum(frozen) / (labels.heads.numel() + labels.channels.numel()):.2f}",
            f"{100 * (frozen[0] * layout.head_cost + frozen[1]) / cost:.2f}",
        ], label
    for module in ("q_proj", "k_proj", "down_proj"):
        names = [name for name in layout.parameters if module in name]
        total = sum(int(np.prod(layout.parameters[name])) for name in names)
        count = sum(plan[name].frozen_count for name in names if name in plan)
        assert cells(text, module) == [[f"{total:,}", f"{count:,}", f"{100 * count / total:.2f}"]]
    total = sum(int(np.prod(shape)) for shape in layout.parameters.values())
    count = sum(mask.frozen_count for mask in plan.values())
    assert cells(text, "all")[1] == [f"{total:,}", f"{count:,}", f"{100 * count / total:.2f}"]


def test_build_takes_recipe_and_ratios(scored: Scored, tmp_path: Path) -> None:
    path, _ = built(scored[0], tmp_path, "--recipe", "ssah-prototype", "--ratios", "SCU=0.2, RU=0.3")
    builder = sf.MaskBuilder(UnitScores.load(scored[0]), {"SCU": 0.2, "RU": 0.3}, "ssah-prototype")
    assert sf.FreezePlan.load(path) == builder.freeze().build()


@needs_labels
def test_build_from_published_labels_and_a_config_alone(tmp_path: Path) -> None:
    """The check table of SSAH.md, on the meta device."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_2_7B_CONFIG))
    plan = tmp_path / "plan.safetensors"
    text = succeeds("build", LABEL_FILE, "--model", config, "--cu", "all", "-o", plan)
    assert cells(text, "SCU") == [["4 of 4", "4,583 of 4,583", "1.30", "1.00"]]
    assert cells(text, "CU") == [["986 of 986", "248,314 of 248,314", "70.57", "79.05"]]
    assert cells(text, "UCU") == [["0 of 34", "0 of 46,855", "0.00", "0.00"]]
    assert cells(text, "all")[1][0] == "6,476,005,376" and cells(text, "all")[1][2] == "80.05"
    text = succeeds("inspect", LABEL_FILE, "--model", config)
    assert cells(text, "UCU") == [["34", "46,855", "13.27", "9.99"]]
    assert cells(text, "RU") == [["0", "52,504", "14.86", "9.96"]]


# ---------------------------------------------------------------------------------------------- scores of weights


@pytest.fixture(scope="module")
def weighed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """Scores of every weight written by the command, with a task, and what the command printed."""
    folder = tmp_path_factory.mktemp("weighed")
    task = write_pairs(folder / "task", load_pairs("utility")[:4])
    path = folder / "weights.safetensors"
    return path, succeeds("score", model_folder, "--grain", "element", "--task", task, "-o", path)


def test_score_writes_what_score_weights_returns(weighed: Scored, model: Loaded) -> None:
    network, tokenizer = model
    path, text = weighed
    sets = [batches(tokenizer, load_pairs(name)) for name in ("safety", "utility")]
    with pytest.warns(UserWarning, match="mean refusal margin"):
        expected = sf.score_weights(network, *sets, batches(tokenizer, load_pairs("utility")[:4]))
    mine = WeightScores.load(path)
    for word, one in expected.sets.items():
        for name, value in one.values.items():  # a model's memory lies elsewhere each time, which may round otherwise
            torch.testing.assert_close(mine.sets[word].values[name], value, rtol=1e-4, atol=1e-12)
    total = sum(float(value.sum()) for value in expected.safety.values.values())
    q_proj = sum(float(v.sum()) for name, v in expected.safety.values.items() if "q_proj" in name)
    assert cells(text, "q_proj")[0][:2] == ["3,072", f"{100 * q_proj / total:.2f}"]
    assert "below 0: the model does not refuse these prompts" in " ".join(text.split())
    assert "--top 0.5 --grain element --form S/T" in " ".join(text.split())


@pytest.mark.parametrize(
    ("options", "of_scores"),
    [
        ("--top 0.3", lambda s: s.top(0.3)),
        ("--top 0.3 --grain row --form S/T", lambda s: s.top(0.3, grain="row", form="S/T")),
        ("--top 0.3 --grain unit --within tensor", lambda s: s.top(0.3, grain="unit", within="tensor")),
        ("--top 1.0 --form S/U --random 3", lambda s: s.top(1.0, form="S/U").random_like(3)),
    ],
)
def test_plans_of_weights_are_built_and_told(
    weighed: Scored, model_folder: Path, tmp_path: Path, options: str, of_scores: Any
) -> None:
    path, text = built(weighed[0], tmp_path, *options.split(), "--model", model_folder)
    plan, scores = sf.FreezePlan.load(path), WeightScores.load(weighed[0])
    assert plan == of_scores(scores).build()
    whole = complete_plan(plan, scores.shapes)
    frozen = sum(mask.frozen_count for mask in plan.values())
    inspected = succeeds("inspect", path, "--layers", "--picture", tmp_path / "plan.png")
    for told in (text, inspected):
        for module, part in (("q_proj", "q_proj"), ("embed_tokens", "embed"), ("norms", "norm"), ("all", "")):
            some = [mask for name, mask in whole.items() if part in name]
            count, total = sum(mask.frozen_count for mask in some), sum(mask.numel for mask in some)
            shares = [f"{100 * count / of:.2f}" for of in (total, frozen)]
            assert cells(told, module)[0] == [f"{total:,}", f"{count:,}", *shares], module
        whole_ones = sum(mask.live_count == 0 for mask in plan.values())
        assert f"{whole_ones} tensors are frozen whole" in " ".join(told.split())
    modules = [line.split()[0] for line in inspected.splitlines() if "_proj" in line][:3]
    assert modules == ["q_proj", "k_proj", "v_proj"], "in the model's order"
    for line in whole.summary().splitlines()[1:]:
        assert line in inspected, "layer by layer"
    assert min(png_size(tmp_path / "plan.png")) > 300


def test_scores_by_rows_are_small_and_told(weighed: Scored, model_folder: Path, tmp_path: Path) -> None:
    path, picture = tmp_path / "rows.safetensors", tmp_path / "rows.png"
    text = succeeds("score", model_folder, "--grain", "unit", "-o", path)
    assert path.stat().st_size < weighed[0].stat().st_size / 4
    plan, _ = built(path, tmp_path, "--top", 0.4, "--grain", "unit")
    assert sf.FreezePlan.load(plan) == WeightScores.load(weighed[0]).top(0.4, grain="unit").build()
    told = succeeds("inspect", path, "--picture", picture)
    assert cells(told, "kept") == [["sums over rows"]] and cells(told, "embed_tokens") == cells(text, "embed_tokens")
    assert min(png_size(picture)) > 300


# -------------------------------------------------------------------------------------------------------- inspect


def test_a_plan_is_written_from_names_and_ranges(model_folder: Path, tmp_path: Path) -> None:
    path, patterns = tmp_path / "plan", ["*.mlp.up_proj.weight[:6]", "*.1.mlp.down_proj.weight[:, [0, 5]]"]
    told = succeeds("plan", *patterns, "--model", model_folder, "--output", path)
    assert ["0", "25.0%", "25.0%"] in [line.split() for line in told.splitlines()]
    assert sf.FreezePlan.load(path) == sf.FreezePlan.of(load_skeleton(model_folder), patterns)
    told = succeeds("plan", "--train-only", "*.q_proj.weight[0]", "--model", model_folder, "--output", path)
    assert "96 live" in told
    fails(run("plan", "up_proj.weight", "--model", model_folder), "pattern 'up_proj.weight' matches none of")
    fails(run("plan", "*[0]", "--model", tmp_path / "none"), "none")


def test_inspect_tells_a_plan(scored: Scored, tmp_path: Path) -> None:
    (path, _), picture = built(scored[0], tmp_path, "--cu", 0.2), tmp_path / "plan.png"
    text = succeeds("inspect", path, "--layers", "--picture", picture)
    plan, layout = sf.FreezePlan.load(path), UnitScores.load(scored[0]).layout
    whole = complete_plan(plan, layout)
    assert f"freeze plan {path.name}" in text and plan.fingerprint[:40] in text
    assert cells(text, "selection.cu") == [["0.2"]] and cells(text, "kv") == [["any"]]
    assert [word for word in ("unit_layout", "shapes") if cells(text, word)] == [], "for programs, not for readers"
    total = sum(mask.numel for mask in whole.values())
    assert total == sum(int(np.prod(shape)) for shape in layout.parameters.values())
    assert cells(text, "all")[0][0] == f"{total:,}"
    for line in whole.summary().splitlines()[1:]:
        assert line in text, "layer by layer"
    assert min(png_size(picture)) > 300


def test_inspect_tells_a_plan_written_by_hand(tmp_path: Path) -> None:
    """No layers, no layout: shares of what the plan names."""
    path, picture = tmp_path / "hand.safetensors", tmp_path / "hand.png"
    sf.FreezePlan({"head.weight": sf.FreezeMask((4, 6), rows=[1])}, {"note": "[by hand]"}).save(path)
    text = succeeds("inspect", path, "--picture", picture)
    assert cells(text, "head") == [["24", "6", "25.00"]] and cells(text, "note") == [["[by hand]"]]
    assert "the parameters the plan names" in text and min(png_size(picture)) > 300


def test_inspect_tells_scores(scored: Scored, tmp_path: Path) -> None:
    picture = tmp_path / "scores.png"
    text = succeeds("inspect", scored[0], "--picture", picture)
    scores = UnitScores.load(scored[0])
    for label, (heads, channels) in sf.MaskBuilder(scores).labels.counts().items():
        assert cells(text, label)[0][:2] == [str(heads), str(channels)]
    assert cells(text, "method") == [["fluctuation"]] and cells(text, "positions") == [["predicting"]]
    assert f"{scores.safety.n_positions:,} positions" in text
    assert min(png_size(picture)) > 700


def test_inspect_tells_labels(scored: Scored, model_folder: Path, tmp_path: Path) -> None:
    labels = labels_of(scored[0], tmp_path / "labels.safetensors")
    for more, columns in (((), 3), (("--model", model_folder), 4)):
        text = succeeds("inspect", tmp_path / "labels.safetensors", *more)
        assert "unit labels" in text
        for label, (heads, channels) in labels.counts().items():
            assert cells(text, label)[0][:2] == [str(heads), str(channels)] and len(cells(text, label)[0]) == columns


# ------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(("d_ff", "lines", "across"), [(24, 1, 37), (1536, 2, 1)])
def test_every_channel_is_whole_pixels_in_its_colour(d_ff: int, lines: int, across: int) -> None:
    """Counting pixels of the picture counts channels: none is left out, averaged or drawn larger than another."""
    from matplotlib.image import imread

    draw = np.random.default_rng(0)
    heads = torch.full((3, 4), LABELS.index("CU"))
    before = draw.integers(0, 4, (3, d_ff))
    after = before.copy()
    after[1, [2, 5]] = (before[1, [2, 5]] + 1) % 4
    images = [
        imread(io.BytesIO(draw_units(UnitLabels(heads, torch.from_numpy(codes)), "labels")))
        for codes in (before, after)
    ]
    assert images[0].shape == images[1].shape
    # left of the bars, below the legend, whose shares change too
    map_only = (images[0] != images[1]).any(2)[104:, : 60 + 72 + 50 + -(-d_ff // lines) * across]
    rows, columns = np.nonzero(map_only)
    down, coloured = 18 // lines, across - (across > 4)  # wide ones have a white line between them
    assert map_only.sum() == 2 * coloured * down
    assert set(np.bincount(columns)[np.unique(columns)]) == {down} and len(np.unique(columns)) == 2 * coloured
    left = 60 + 72 + 50
    assert set((columns - left) // across) == {2, 5}
    assert set(rows // (lines * down + 2)) == {1}, "layer 1"


@pytest.mark.parametrize("preset", ["full", "producer"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "gpt_neox", "mixtral"])
def test_units_are_read_back_from_a_plan(model_type: str, preset: Any) -> None:
    layout = find_units(tiny(model_type))
    draw = np.random.default_rng(1)
    selection = UnitSelection(draw.random(layout.heads_shape) < 0.4, draw.random(layout.channels_shape) < 0.3)
    plan = selection.build(layout, preset)
    found = frozen_units(plan, layout)
    assert np.array_equal(found.heads, selection.heads) and np.array_equal(found.channels, selection.channels)


def test_a_plan_for_less_than_a_unit_freezes_no_unit() -> None:
    layout = toy_layout()
    name, shape = next((name, shape) for name, shape in layout.parameters.items() if "up_proj" in name)
    found = frozen_units(sf.FreezePlan({name: sf.FreezeMask(shape, rows=[0, 1])}), layout)
    assert not found.heads.any() and not found.channels.any()


# ----------------------------------------------------------------------------------------------- models and pairs


def test_a_skeleton_has_the_names_and_shapes_of_the_model(model_folder: Path, model: Loaded) -> None:
    expected = {name: param.shape for name, param in model[0].named_parameters()}
    for source in (model_folder, model_folder / "config.json"):
        skeleton = load_skeleton(source)
        assert {name: param.shape for name, param in skeleton.named_parameters()} == expected
        assert all(param.is_meta for param in skeleton.parameters())


SMALL_CONFIG = {
    **LLAMA_2_7B_CONFIG, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 9,
}  # fmt: skip


@pytest.mark.parametrize("name", ["my.json", "config-of-mine", "bert.json", "config.json.bak"])
def test_a_config_has_any_name(scored: Scored, model_folder: Path, tmp_path: Path, name: str) -> None:
    config, plan, labels = tmp_path / name, tmp_path / "plan", tmp_path / "labels.safetensors"
    config.write_bytes((model_folder / "config.json").read_bytes())
    labels_of(scored[0], labels)
    succeeds("build", labels, "--model", config, "-o", plan)
    assert sf.FreezePlan.load(plan) == sf.MaskBuilder(UnitScores.load(scored[0])).freeze().build()
    assert "frozen parameters of llama" in succeeds("inspect", plan, "--model", config)
    succeeds("plan-memory", "--model", config, "--plan", plan)
    fails(run("score", config), f"{name}' is a file, expected a local Hugging Face model folder")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is no JSON"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "holds a list and no model_type"),
        (b'{"version": 1, "added_tokens": []}', "holds keys version, added_tokens and no model_type"),
        (b'{"model_type": 5}', "no model_type"),
        (b'{"model_type": "nothing"}', "does not recognize this architecture"),
        (b'{"model_type": "own", "auto_map": {"AutoConfig": "config.Own"}}', "trust_remote_code"),
        ({**SMALL_CONFIG, "hidden_size": "16"}, "hidden_size"),
        ({**SMALL_CONFIG, "num_attention_heads": 0}, "ZeroDivisionError"),
        ({**SMALL_CONFIG, "architectures": 5}, "not iterable"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_files_are_no_configs(tmp_path: Path, content: Any, told: str) -> None:
    """The name of one tells the library nothing, as of bert.json it would: what is in it counts."""
    folder = tmp_path / "bert"
    folder.mkdir()
    for file in (tmp_path / "bert.json", folder / "config.json"):
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        result = run("plan-memory", "--model", file)
        fails(result, "bert", told, "error: load_")
    fails(run("plan-memory", "--model", folder), "bert", told)


def test_a_config_may_name_any_class(tmp_path: Path) -> None:
    for architectures in (["AutoConfig"], ["nothing"], [7], [], None, "LlamaForCausalLM"):
        (tmp_path / "my.json").write_text(json.dumps({**SMALL_CONFIG, "architectures": architectures}))
        assert type(load_skeleton(tmp_path / "my.json")).__name__ == "LlamaForCausalLM"


def test_pairs_are_read_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = ['{"prompt": "a\u2028b", "response": "c", "source": 1}', "", '{"response": "ö", "prompt": "d"}']
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    assert read_pairs(path) == [("a\u2028b", "c"), ("d", "ö")]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no pairs"),
        (b'{"prompt": "a", "response": "b"}\nnothing', "line 2 is not JSON"),
        (b'{"prompt": "a"}', 'line 1 is \'{"prompt": "a"}\''),
        (b'{"prompt": "a", "response": ""}', "line 1 is"),
        (b'["a", "b"]', "line 1 is"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
    ],
)
def test_other_files_are_no_pairs(model_folder: Path, tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "pairs").write_bytes(content)
    with pytest.raises(ValueError, match=r'expected lines of \{"prompt": "…", "response": "…"\}') as raised:
        read_pairs(tmp_path / "pairs")
    assert told in str(raised.value)


# --------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def files(scored: Scored, weighed: Scored, model_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """A file of every kind, for commands that want another."""
    made = {"scores": scored[0], "weights": weighed[0], "model": model_folder, "out": tmp_path / "out.safetensors"}
    for name in ("labels", "plan", "text", "other"):
        made[name] = tmp_path / f"{name}.safetensors"
    labels_of(scored[0], made["labels"])
    sf.FreezePlan({"head.weight": sf.FreezeMask((4, 6), rows=[1])}).save(made["plan"])
    made["text"].write_text("nothing")
    UnitLabels(torch.ones(2, 4, dtype=torch.uint8), torch.ones(2, 6, dtype=torch.uint8)).save(made["other"])
    return made


@pytest.mark.parametrize(
    ("command", "told"),
    [
        # missing files
        ("score nowhere", "no config.json"),
        ("score {model} --safety nowhere -o {out}", "no file 'nowhere'"),
        ("build nowhere -o {out}", "build: no file 'nowhere'"),
        ("inspect nowhere", "inspect: no file 'nowhere'"),
        # files of another kind
        ("build {plan} -o {out}", "is a plan file, expected scores or labels"),
        ("build {text} -o {out}", "is none of scores, labels"),
        ("inspect {text}", "is none of plan, scores, labels"),
        ("inspect {model}/model.safetensors", "is none of plan, scores, labels"),
        ("inspect {model}", "is none of plan, scores, labels"),
        ("score {model} --safety {labels} -o {out}", "is not text in UTF-8"),
        # what labels and scores cannot do
        ("build {labels} -o {out}", "labels do not say which model they belong to, expected --model"),
        ("build {labels} --model {model} --cu 0.06 -o {out}", "cu=0.06 needs a ranking of units"),
        ("build {labels} --model {model} --ratios SCU=0.1 -o {out}", "ratios given with finished UnitLabels"),
        ("build {scores} --top 0.2 --by score -o {out}", "gives a safety and a utility score"),
        # what scores of units and of weights have each
        ("score {model} --task {text} -o {out}", "--task goes with scores of weights, expected --grain too"),
        ("score {model} --grain row --halves -o {out}", "expected them without --grain"),
        ("score {model} --grain row --method snip -o {out}", "method is 'snip', expected one of 'decision_fisher'"),
        ("score {model} --grain column -o {out}", "--grain is 'column', expected one of row, unit, element"),
        ("build {scores} --grain row --top 0.2 -o {out}", "--grain goes with scores of weights"),
        ("build {weights} --top 0.2 --by diff -o {out}", "--by goes with scores of units"),
        ("build {weights} --top 0.2 --kv all -o {out}", "--kv goes with scores of units"),
        ("build {weights} -o {out}", "scores of weights need --top"),
        ("build {weights} --top 200 -o {out}", "share is 200, expected a fraction of all 41,952 weights"),
        ("build {weights} --top 1.5 -o {out}", "share is 1.5"),
        ("build {weights} --top 0.2 --form S/V -o {out}", "--form is 'S/V', expected one of S, S/U, S/T"),
        # another model
        ("build {other} --model {model} -o {out}", "were the scores made for this model?"),
        ("demo --model {model} --plan {plan}", "does not fit the model"),
        # outputs
        ("score {model} -o nowhere/scores", "no folder 'nowhere'"),
        ("build {scores} -o {model}", "it is a folder"),
        ("inspect {scores} --picture nowhere/a.png", "no folder 'nowhere'"),
        # words and numbers
        ("score {model} --method guess -o {out}", "--method is 'guess', expected one of fluctuation"),
        ("score {model} --positions last -o {out}", "--positions is 'last', expected one of predicting"),
        ("score {model} --method snip --positions all -o {out}", "'snip' has no such option"),
        ("score {model} --dtype int4 -o {out}", "--dtype is 'int4', expected one of float32"),
        ("score {model} --device moon -o {out}", "--device is 'moon'"),
        ("score {model} --seeds 0 -o {out}", "--seeds is 0"),
        ("score {model} --batch-size 0 -o {out}", "batch_size is 0"),
        ("score {model} --max-length 4 -o {out}", "raise max_length or drop the pair"),
        ("build {scores} --recipe own -o {out}", "--recipe is 'own', expected one of paper, ssah-prototype"),
        ("build {scores} --train-only RU,all -o {out}", "--train-only is 'all', expected one of RU"),
        ("build {scores} --cu some -o {out}", "--cu holds 'some', expected all"),
        ("build {scores} --top few -o {out}", "--top holds 'few', expected a share"),
        ("build {scores} --ratios 0.1 -o {out}", "--ratios holds '', expected shares of labels"),
        ("build {scores} --ratios XU=0.1 -o {out}", "ratios names 'XU'"),
        ("build {scores} --cu all --top 0.2 -o {out}", "expected those of one way"),
        ("build {scores} --top 0.2 --share 0.2 -o {out}", "expected those of one way"),
        ("build {scores} --train-only RU --no-scu -o {out}", "expected those of one way"),
        ("build {scores} --by diff -o {out}", "expected --top too"),
        ("build {scores} --no-scu -o {out}", "selects no unit"),
    ],
)
def test_a_foreseen_error_is_one_line(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*command.format(**files).split())
    fails(result, told)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert told in line
    assert not files["out"].exists()


def test_a_plan_of_another_model_is_told(scored: Scored, tmp_path: Path) -> None:
    plan, _ = built(scored[0], tmp_path)
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    fails(run("inspect", plan, "--model", tmp_path), "expected plans for the same model")


# ----------------------------------------------------------------------------------------------------------- help


def test_help_lists_the_words_there_are() -> None:
    for command, lists in (
        ("score", (", ".join(METHODS), "predicting, response, all", "row, unit, element")),
        ("build", ("RU, SCU, UCU, CU", "paper, ssah-prototype", "any, all, never", "full, producer")),
    ):
        text = " ".join(run(command, "--help").output.replace("│", "").split())
        assert "{words}" not in text and not [words for words in lists if words not in text]
    for command in ("score", "build", "inspect"):
        assert f" {command} " in run("--help").output


# ------------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("name", ["chat_model_own_prompts", "alignment_budget", "ready_index_lists"])
def test_an_example_runs(
    name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) < 60
    monkeypatch.setattr(sys, "argv", [str(script)] if name == "ready_index_lists" else [str(script), str(model_folder)])
    made = runpy.run_path(str(script), run_name="__main__")
    assert made["main"].__annotations__["return"] is sf.FreezePlan
    assert "step 2: loss" in capsys.readouterr().out
