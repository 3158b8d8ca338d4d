"""README and documentation are true: every Python block runs, every command exists, every name is documented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from model_folders import run, save_model
from pages import ROOT, blocks, run_blocks

import safefreeze_kernels as sf

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_NOT_RUN = 2
BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = sorted({block.page for block in BLOCKS if block.language == "python"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a folder, with scores, labels and a plan made by the commands of the README."""
    place = tmp_path_factory.mktemp("docs")
    save_model(place / "model", d_ff=48)
    for arguments in (
        ["score", place / "model", "--output", place / "scores.safetensors", "--max-length", 32],
        ["build", place / "scores.safetensors", "--cu", 0.06, "--output", place / "plan.safetensors"],
    ):
        done = run(*arguments)
        assert done.exit_code == 0, done.output
    scores = sf.attribution.UnitScores.load(place / "scores.safetensors")
    sf.MaskBuilder(scores).labels.save(place / "labels.safetensors")
    return place


@pytest.fixture
def namespace(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a reader has when a page begins."""
    from safefreeze_kernels.integrations.transformers import load_model

    for name in ("scores", "plan", "labels"):
        (tmp_path / f"{name}.safetensors").write_bytes((folder / f"{name}.safetensors").read_bytes())
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    _, model, tokenizer = load_model(folder / "model")
    tokens = torch.randint(0, model.config.vocab_size, (8, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    pairs = [("How do I pick a lock?", "I cannot help with that."), ("Name a colour.", "Blue, I think.")]
    encoded = sf.attribution.encode_pairs(tokenizer, pairs)
    plan = sf.FreezePlan(
        {
            "model.layers.0.mlp.up_proj.weight": sf.FreezeMask((48, 32), rows=range(0, 48, 4)),
            "model.layers.0.mlp.down_proj.weight": sf.FreezeMask((32, 48), cols=range(0, 48, 4)),
        }
    )
    model.train()(**next(iter(loader))).loss.backward()
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    return {
        "model": model, "tokenizer": tokenizer, "plan": plan, "mask": masks, "dataset": rows,
        "dataloader": loader, "batch": next(iter(loader)), "safety_batches": encoded, "utility_batches": encoded,
        "safety_pairs": pairs, "utility_pairs": pairs, "torch": torch,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PYTHON)
def test_code_runs_as_it_is_printed(page: str, namespace: dict[str, Any]) -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    run_blocks(page, namespace)


def test_what_is_not_run_says_why() -> None:
    skipped = [f"{block.page}:{block.line}: {block.reason}" for block in BLOCKS if block.reason]
    assert len(skipped) <= MOST_NOT_RUN, skipped


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for block in BLOCKS if block.language == "bash" for line in block.code.splitlines()]
    inline = [code for page in PAGES for code in re.findall(r"`((?:make|safefreeze) [^`\n]+)`", page.read_text())]
    helps: dict[str, str] = {}
    for line in [line.split("  #")[0].strip() for line in (*lines, *inline)]:
        program, command, *rest = line.split()
        if program == "make":
            assert command in targets, line
        elif program == "safefreeze":
            if command not in helps:
                done = run(command, "--help")
                assert done.exit_code == 0, line
                helps[command] = done.output
            for word in rest:
                assert not word.startswith("--") or word in helps[command], f"{line}: no {word}"
        else:
            assert line in {"pip install ."}, f"{line}: not known"


def test_links_and_files_exist() -> None:
    package = ROOT / "safefreeze_kernels"
    places = [path for path in (*package.iterdir(), *ROOT.iterdir()) if path.is_dir()]
    folders = "|".join(path.name for path in places if path.name != "build")
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for name in re.findall(rf"`((?:{folders})/[\w./]*)`", text):
            assert (ROOT / name).exists() or (package / name).exists(), f"{page.name}: {name}"


def test_every_public_name_is_in_the_reference() -> None:
    reference = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    for name in sf.__all__:
        assert f"safefreeze_kernels.{name}" in reference, name


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "set_freeze" in (tmp_path / "reference" / "optimizers" / "index.html").read_text()
