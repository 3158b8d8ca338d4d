"""Every example runs, on a CPU and without a network, and says at its end that nothing frozen moved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
MOST_LINES = 60
# file -> what it prints
INTEGRATIONS = {
    "plain_loop": "none moved",
    "accelerate_loop": "none moved",
    "lightning_module": "none moved",
    "trainer": '"verified": true',
    "sft_trainer": "none moved",
    "fsdp2": "rank 1: 5,376 frozen bytes, none moved",
}
# these run in test_cli, and the last in attribution/test_foreign_formats
ELSEWHERE = {"alignment_budget", "chat_model_own_prompts", "ready_index_lists", "foreign_formats"}


def test_every_example_is_here() -> None:
    files = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert set(files) == set(INTEGRATIONS) | ELSEWHERE
    for name in INTEGRATIONS:
        assert len(files[name].read_text().splitlines()) < MOST_LINES, name


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if name == "fsdp2" else []
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / f"{name}.py")],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert INTEGRATIONS[name] in done.stdout
