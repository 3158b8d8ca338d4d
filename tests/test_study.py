"""The study's world, arms and rules, on a few steps."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import model_folders
import numpy as np
import pytest
import torch

from safefreeze_kernels.attribution import find_units
from safefreeze_kernels.integrations.transformers import load_model

FOLDER = Path(__file__).parents[1] / "examples" / "study"
sys.path.insert(0, str(FOLDER))

import closed_loop  # noqa: E402
import experiment  # noqa: E402
import real_model  # noqa: E402
import report  # noqa: E402
import world as worlds  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world() -> worlds.World:
    return worlds.World(3)


def test_what_is_kept_apart(world: worlds.World) -> None:
    assert len(set(world.restricted)) == 24 and not set(world.restricted) & set(world.benign)
    assert set(world.tuned) <= set(world.benign) and not set(world.seen_by_scores) & set(world.unseen_by_scores)
    assert not set(world.known) & set(world.unknown)
    exam = experiment.Exam(world)

    def asked(rows: list[worlds.Row]) -> set[tuple[str, ...]]:
        return {tuple(word for word in row.prompt if word.startswith(("verb", "object"))) for row in rows}

    assert not asked(exam.stop) & asked(exam.new)
    for name, rows in exam.restricted.items():
        things = world.unseen_by_scores if "unseen" in name else world.seen_by_scores
        assert {word for row in rows for word in row.prompt if word.startswith("object")} <= set(things), name
    trained = world.lessons(3000, aligned=True, seed=0) + world.new_task(1000, seed=1)
    prompts = {tuple(row.prompt) for row in trained}
    on = [row for name, rows in exam.restricted.items() if name.startswith("on") for row in rows]
    assert not prompts & {tuple(row.prompt) for row in [*exam.stop, *exam.new, *on]}
    refused = [row for row in trained if row.answer == worlds.REFUSAL]
    assert refused and all(set(row.prompt) & set(world.restricted) for row in refused)
    assert worlds.World(3).lessons(50, aligned=True, seed=0) == world.lessons(50, aligned=True, seed=0)


def test_batches_mark_the_answer(world: worlds.World) -> None:
    rows = world.lessons(8, aligned=True, seed=4)
    batch, words = world.batch(rows), {i: word for word, i in world.vocabulary.items()}
    for row, ids, labels in zip(rows, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert [words[i] for i in ids if i] == ["<bos>", *row.prompt, "<asst>", *row.answer, "<eos>"]
        assert [words[i] for i in labels if i != -100] == [*row.answer, "<eos>"]


def test_arms_and_a_run(world: worlds.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of the controls match, and a fine-tune of a few steps proves its freeze."""
    monkeypatch.setattr(experiment, "MOST_STEPS", 4)
    model = experiment.make_model(world)
    experiment.teach(model, world, world.lessons(200, aligned=True, seed=1), 6, 1e-3, 0)
    arms = experiment.arms(model, world, 2)
    sizes = {
        name: {(int(s.heads.sum()), int(s.channels.sum())) for s in arm.selections if s} for name, arm in arms.items()
    }
    assert all(len(found) <= 1 for found in sizes.values())
    for name, control in report.CONTROLS.items():
        if control != "full":
            assert sizes[name] == sizes[control], name
    one, two = arms["random 20%"].selections
    assert one is not None and two is not None
    assert (one.channels != two.channels).any() and one.jaccard(two) < 0.5
    assert arms["random 20%, half rate"] == arms["random 20%"]._replace(rate=0.5)
    (fifth,) = arms["decision Fisher, utility, 20%"].selections
    found = experiment.fine_tune(model, world, experiment.Exam(world), fifth, head=True)
    assert found["steps"] == 4 and 0.1 < found["frozen parameters"] < 0.35 and found["frozen bytes compared"] > 100_000
    assert find_units(model).n_layers == 4 and torch.isfinite(torch.tensor(found["attack off"]))


@pytest.mark.filterwarnings("ignore:RefusalKeeper. the margin is")  # of a model that was taught nothing
@pytest.mark.parametrize("arm", ["loop", "loop, elements, 1 safety row mixed in, half rate", "static, row, S, 50%"])
def test_a_closed_loop_of_a_few_steps(world: worlds.World, monkeypatch: pytest.MonkeyPatch, arm: str) -> None:
    """Every window between looks is proven."""
    monkeypatch.setattr(closed_loop, "MOST_STEPS", 8)
    recipe = closed_loop.ARMS[arm]._replace(every=2, prompts=4)
    model = experiment.make_model(world)
    found = closed_loop.fine_tune(model, world, experiment.Exam(world), recipe)
    steps = round(8 / recipe.rate)
    assert found["steps"] == steps
    assert found["looks"] == (closed_loop.STATIC_BATCHES if recipe.static else steps // 2)
    assert found["frozen parameters"] == pytest.approx(recipe.share * (1 if recipe.static else 1 - 2 / steps), rel=0.05)
    assert torch.isfinite(torch.tensor(found["attack off"]))


def seeds(effect: float, noise: float, count: int = 10) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    names = {*report.CONTROLS, *report.CONTROLS.values(), *(arm for pair in report.ALSO for arm in pair)}
    cells = dict.fromkeys((*report.COLUMNS, "attack off"), 0.5)
    made = []
    for _ in range(count):
        arms = {name: {**cells, "attack off": 0.9 + noise * draw.standard_normal()} for name in sorted(names)}
        arms["decision Fisher, utility, 20%"]["attack off"] = arms["random 20%"]["attack off"] + effect
        made.append({"arms": arms})
    return made


def test_what_counts_as_clear() -> None:
    pair = "decision Fisher, utility, 20%", "random 20%"
    strong = report.compare(seeds(-0.3, 0.0), *pair)
    assert strong.clear and strong.mean == pytest.approx(-0.3) and "clearly lower" in str(strong)
    for few in (1, 7):
        assert not report.compare(seeds(-0.3, 0.0, count=few), *pair).clear
    assert not report.compare(seeds(0.0, 0.1), *pair).clear
    disagreeing = seeds(-0.3, 0.0)
    for seed in disagreeing[:3]:
        seed["arms"][pair[0]]["attack off"] = 0.91
    assert not report.compare(disagreeing, *pair).clear
    every = [report.compare(seeds(-0.3, 0.0), *both) for both in [*report.CONTROLS.items(), *report.ALSO]]
    assert report.sentences(every)[0].endswith("decision Fisher, utility, 20% (-0.30 ± 0.00).")
    none = [report.compare(seeds(0.0, 0.0), *both) for both in [*report.CONTROLS.items(), *report.ALSO]]
    assert report.sentences(none)[0].startswith("No way of choosing units protected clearly better")


def test_a_run_on_a_chat_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of `real_model`, on a model that learns nothing in three steps; what is asked is kept apart."""
    source = model_folders.save_model(tmp_path / "model")
    monkeypatch.setattr(real_model, "load_model", lambda _: load_model(source))
    for name, value in (("ALIGN_STEPS", 3), ("TUNE_STEPS", 3), ("ENOUGH", 2.0)):
        monkeypatch.setattr(real_model, name, value)
    seen: dict[str, list[real_model.Pair]] = {}
    batches, train = real_model.Chat.batches, real_model.train

    def encoded(chat: real_model.Chat, pairs: list[real_model.Pair], size: int = 24) -> list[real_model.Batch]:
        if size == 24:  # questions that decide when to stop, or are reported
            seen.setdefault("asked", []).extend(pairs)
        return batches(chat, pairs, size)

    def trained(model: Any, chat: real_model.Chat, opt: Any, pairs: list[real_model.Pair], *rest: Any) -> int:
        seen.setdefault("trained", []).extend(pairs)
        return train(model, chat, opt, pairs, *rest)

    monkeypatch.setattr(real_model.Chat, "batches", encoded)
    monkeypatch.setattr(real_model, "train", trained)
    setting = real_model.Setting(0, "cpu", lambda _: None)
    arms = real_model.unit_arms(setting, 2)
    known = {"full": {"steps": 1}}
    loops = real_model.loop_arms(setting, known)
    assert loops.pop("full") is known["full"], "an arm that was run before is not run again"
    found = {"seed": 0, "draws": 2, "aligned": setting.aligned, "arms": arms}
    animals = {*real_model.BIRDS, *real_model.OTHERS}

    def about(pairs: list[real_model.Pair]) -> set[str]:
        return {word.strip("?.,") for question, _ in pairs for word in question.split()} & animals

    assert len(animals) == len(real_model.BIRDS) + len(real_model.OTHERS)
    assert len(about(seen["asked"])) == 4 * real_model.SET_APART
    assert about(seen["asked"]) | about(seen["trained"]) == animals
    assert not about(seen["asked"]) & about(seen["trained"])
    assert not {*real_model.STOPPING} & {*real_model.REPORTED, *real_model.TAUGHT}
    assert not {*real_model.REPORTED} & {*real_model.TAUGHT}
    assert {arm for pair in report.REAL_PAIRS for arm in pair} <= found["arms"].keys()
    for name, arm in found["arms"].items():
        assert arm["steps"] == (6 if "half rate" in name else 3) and arm.keys() >= {*report.REAL_COLUMNS}
        assert ("full" in name) == (arm["frozen bytes compared"] == 0), name
        like = name.replace("random", "decision Fisher,")
        assert arm["frozen bytes compared"] == pytest.approx(found["arms"][like]["frozen bytes compared"], rel=0.25)
    text = report.real_report([{**found, "machine": {"processor": "p", "torch": "2", "date": "today"}}])
    assert "| decision Fisher, 50%, half rate | 6 |" in text and "too few seeds to tell" in text
    assert {arm for pair in report.REAL_LOOP_PAIRS for arm in pair} <= {"full", *loops}
    for name, arm in loops.items():
        assert arm["steps"] == (12 if "quarter rate" in name else 3) and arm.keys() >= {*report.REAL_COLUMNS}
        assert ("loop" in name) == ("looks" in arm) and ("static" in name) == (arm["frozen bytes compared"] > 0)


def test_committed_results_are_what_the_seeds_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `report.py` writes of the committed seeds is what is committed."""
    folder = FOLDER / "results"
    for seed in folder.glob("*seed-*.json"):
        shutil.copy(seed, tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    report.main()
    for name in ("RESULTS.md", "SMOLLM2.md", "LOOP.md"):
        assert (tmp_path / name).read_text() == (folder / name).read_text(), name
    made, committed = (json.loads((place / "results.json").read_text()) for place in (tmp_path, folder))
    assert made["sentences"] == committed["sentences"] and len(made["seeds"]) >= 10
    for name in ("results.png", "smollm2.png"):
        assert model_folders.png_size(tmp_path / name) == model_folders.png_size(folder / name), name
