"""`make gpu`'s harness, tried without a GPU: what it checks, writes, refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import gpu
from benchmarks.cases import FUSED, Case, TensorSet
from benchmarks.contenders import Runner
from benchmarks.measure import Timed

pytestmark = pytest.mark.usefixtures("one_thread")


def run(folder: Path, only: str) -> tuple[int, dict[str, Any]]:
    status = gpu.main(["--measure", "--device", "cpu", "--tiny", "--only", only, "--output", str(folder)])
    (written,) = folder.glob("*.json")
    found: dict[str, Any] = json.loads(written.read_text())
    return status, found


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(tmp_path, "7.5% of (rows|elements)|clip|zero_frozen|masters|triton / cuda$|peak")
    assert status == 0
    rows = {row["name"]: row for row in found["cases"]}
    assert len(rows) == 8
    for name, row in rows.items():
        if name.startswith(("triton", "peak")):
            assert row["verdict"] == "skipped"
            assert row["trouble"]
            assert "ratio" not in row
        else:
            assert row["verdict"] == "-", "tiny tensors are not judged"
            assert row["ratio"] > 0
            low, high = row["ratio_interval_95"]
            assert low <= row["ratio"] <= high
            assert len(row["contender_run"]["times_ns"]) == len(row["against_run"]["times_ns"]) == 6
    assert {"machine", "date", "commit", "versions", "backends"} <= found.keys()
    assert next(tmp_path.glob("*.png")).stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "7.5% of rows / nothing frozen" in shown
    assert max(len(line) for line in shown.splitlines() if not line.startswith("wrote ")) <= 96


@pytest.mark.parametrize("when", ["check", "check_frozen"])
def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    right = getattr(Runner, when)

    def sabotaged(self: Runner) -> None:
        if self.contender.freeze.kind == "rows":
            with torch.no_grad():
                self.params[1][self.masks[1].rows] += 1.0
        right(self)

    monkeypatch.setattr(Runner, when, sabotaged)
    status, found = run(tmp_path, "7.5% of rows / nothing")
    assert status == 1
    (row,) = found["cases"]
    assert row["verdict"] == "WRONG"
    assert "ratio" not in row
    assert "layers.1.weight" in row["trouble"]


@pytest.mark.parametrize(
    ("ratio", "target", "share", "verdict"),
    [
        (0.9, 0.9, 0.93, "met"),
        (0.91, 0.9, None, "MISSED"),
        (0.5, None, 0.92, "MISSED"),
        (math.nan, 0.9, None, "MISSED"),
        (0.5, None, None, ""),
        (None, 0.9, None, "skipped"),
    ],
)
def test_verdicts(ratio: float | None, target: float | None, share: float | None, verdict: str) -> None:
    """``share``: of the copy's 1,000 GB/s, where 0.93 is wanted."""
    case = Case("a", TensorSet(1, (1,)), FUSED, FUSED, target, share_target=share and 0.93)
    timed = Timed(case, bytes_moved=round(1e6 * (share or 0)))
    if ratio is None:
        timed.trouble = "no"
    else:
        timed.times_ns, timed.against_ns = [1000] * 6, [0 if math.isnan(ratio) else 1000 / ratio] * 6
    assert timed.verdict(1000.0) == verdict
    assert timed.verdict(1000.0, judged=False) == ("skipped" if ratio is None else "-")


def test_steps_have_limits_and_do_not_stop_each_other() -> None:
    console = Console(quiet=True)
    python = [sys.executable, "-c"]
    for command, limit, status, outcome in (
        ([*python, "raise SystemExit(3)"], 20, 3, "exit status 3"),
        ([*python, "import time; time.sleep(30)"], 1, 124, "took too long"),
        (["no-such-tool-anywhere"], 5, 127, "no-such-tool-anywhere was not found"),
        ([*python, "import os; raise SystemExit(os.environ['A'] != 'b')"], 20, 0, "ok"),
    ):
        done = gpu.Step("step", command, limit, {"A": "b"}).run(console)
        assert (done["status"], done["outcome"]) == (status, outcome)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no GPU was found" in capsys.readouterr().out


def test_the_whole_takes_less_than_nine_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert sum(step.limit for step in gpu.steps()) + gpu.parse([]).seconds + 40 <= 9 * 60
