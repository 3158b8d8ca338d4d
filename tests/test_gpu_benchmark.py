"""`make gpu`'s harness, tried without a GPU: what it checks, writes, refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.cases import FUSED, Case, TensorSet
from benchmarks.contenders import Runner
from benchmarks.measure import Timed, git_commit

pytestmark = pytest.mark.usefixtures("one_thread")


ROWS = "rows of 1024"


def run(folder: Path, group: str) -> tuple[int, dict[str, Any]]:
    """Exit status of a group's run, and what it wrote."""
    status = gpu.main(["--group", group, "--device", "cpu", "--tiny", "--output", str(folder)])
    found: dict[str, Any] = json.loads(gpu.part_file(folder, group).read_text())
    return status, found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a group left behind."""
    folder = tmp_path_factory.mktemp("measured")
    run(folder, ROWS)
    return gpu.part_file(folder, ROWS)


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(tmp_path, "more shares")
    assert status == 0
    rows = {row["name"]: row for row in found["cases"]}
    assert rows.keys() == {case.name for case in gpu.GROUPS["more shares"]}
    for name, row in rows.items():
        if name.startswith("peak"):
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
    shown = capsys.readouterr().out
    assert "20% of rows / nothing frozen" in shown
    assert max(map(len, shown.splitlines())) <= 96


def test_groups_end_in_one_report(tmp_path: Path, measured: Path) -> None:
    """Whatever ran until a run was killed is in it; nothing is lost on the way from a process to the report."""
    given = gpu.parse(["--device", "cpu", "--tiny", "--output", str(tmp_path)])
    parts: dict[str, Any] = {}
    assert gpu.gather(given, [], parts) is None
    for leave in (lambda: shutil.copy(measured, tmp_path), lambda: run(tmp_path, "Triton")):
        leave()
        report = gpu.gather(given, [{"step": "build", "status": 0}], parts)
        assert not list(tmp_path.glob("gpu-part*")), "few files may come back from a borrowed machine"
    assert report is not None
    (path,) = tmp_path.glob("*-partial.json")
    found = json.loads(path.read_text())
    assert found["steps"] == [{"step": "build", "status": 0}]
    kept = [{**row, "verdict": None} for row in found["cases"]]
    for case in kept:  # shares of a copy are of all groups' copies
        for side in ("contender_run", "against_run"):
            case[side] = {key: value for key, value in case.get(side, {}).items() if not key.startswith("share_of")}
    for row in (row for part in parts.values() for row in part["cases"]):
        same = next(case for case in kept if case["name"] == row["name"])
        for side in ("contender_run", "against_run"):
            assert {key: row.get(side, {}).get(key) for key in same[side]} == same[side]
        assert (row["trouble"], row.get("ratio")) == (same["trouble"], same.get("ratio"))
    assert report.save(tmp_path)[1].stat().st_size > 5000


@pytest.mark.parametrize("when", ["check", "check_frozen"])
def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    right = getattr(Runner, when)

    def sabotaged(self: Runner) -> None:
        if self.contender.freeze.share == 0.075:
            with torch.no_grad():
                self.params[1][self.masks[1].rows] += 1.0
        right(self)

    monkeypatch.setattr(Runner, when, sabotaged)
    status, found = run(tmp_path, ROWS)
    assert status == 1
    right_one, row, _ = found["cases"]
    assert right_one["verdict"] == "-"
    assert row["verdict"] == "WRONG"
    assert "ratio" not in row
    assert "layers.1.weight" in row["trouble"]


def test_any_error_of_a_case_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Runner.warm_up

    def broken(self: Runner) -> None:
        if self.contender.freeze.share == 0.075:
            raise KeyError("something nobody thought of")
        plain(self)

    monkeypatch.setattr(Runner, "warm_up", broken)
    status, found = run(tmp_path, ROWS)
    assert status == 1
    assert ["something nobody" in row["trouble"] for row in found["cases"]] == [False, True, False]
    assert ["ratio" in row for row in found["cases"]] == [True, False, True]


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


@pytest.mark.parametrize(
    ("command", "limit", "at_least", "status", "outcome"),
    [
        ("raise SystemExit(3)", 20, 0, 3, "exit status 3"),
        ("import time; print('begun', flush=True); time.sleep(30)", 5, 0, 124, "took too long"),
        ("", 20, 0, 127, "no-such-tool-anywhere was not found"),
        ("import os; raise SystemExit(os.environ['A'] != 'b')", 20, 0, 0, "ok"),
        ("print('7 passed, 2 skipped in 1s')", 20, 7, 0, "ok"),
        ("print('7 passed, 2 skipped in 1s')", 20, 8, 1, "7 tests passed, expected 8 at least"),
    ],
)
def test_what_a_step_says(
    tmp_path: Path, command: str, limit: float, at_least: int, status: int, outcome: str
) -> None:  # fmt: skip
    called = [sys.executable, "-S", "-c", command] if command else ["no-such-tool-anywhere"]
    done = gpu.Step("build", "a step", called, limit, {"A": "b"}, at_least).run(gpu.Log(tmp_path / "deep" / "log"))
    assert (done["status"], done["outcome"]) == (status, outcome)
    kept = (tmp_path / "deep" / "log").read_text()
    assert outcome in kept
    assert ("begun" in kept) == (status == 124)


def test_what_a_step_started_ends_with_it(tmp_path: Path) -> None:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    step = gpu.Step("build", "a step", [sys.executable, "-c", command], 3)
    assert step.run(gpu.Log(tmp_path / "log"))["status"] == 124
    until(lambda: not runs((tmp_path / "log").read_text().splitlines()[1]))  # a signal takes its time


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_ended_in_mid_way(
    tmp_path: Path, measured: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:  # fmt: skip
    """What was found is on disk, what was started ends too, and the status tells."""
    found = json.loads(measured.read_text())
    hangs = "sleep 60 & echo of $$ $! begun; wait"
    chosen = [
        gpu.Step("priority", ROWS, ["cp", str(measured), str(tmp_path)], 20),
        gpu.Step("tests", "hangs", ["sh", "-c", hangs], 50),
        gpu.Step("tests", "never comes", ["true"], 20),
    ]
    monkeypatch.setattr(gpu, "steps", lambda *_: chosen)
    given = gpu.parse(["--device", "cpu", "--tiny", "--output", str(tmp_path)])
    pid = os.fork()
    if pid == 0:  # nothing of pytest's goes on here
        status = -1
        try:
            gpu.end_on_signals()
            status = gpu.run_all(given)
        finally:
            os._exit(status)
    log = tmp_path / "gpu.log"
    until(lambda: log.exists() and "begun" in log.read_text())
    os.kill(pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    told, (partial,) = log.read_text(), tmp_path.glob("*-partial.json")
    saved = json.loads(partial.read_text())
    assert [row["name"] for row in saved["cases"]] == [row["name"] for row in found["cases"]]
    started = next(line for line in told.splitlines() if line.endswith("begun")).split()[1:-1]
    until(lambda: not any(map(runs, started)))
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert [step["outcome"] for step in saved["steps"]] == ["ok", f"stopped by {number.name}"]
        assert f"stopped by {number.name}" in told


def until(holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("not within ten seconds")


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_git_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


def test_a_log_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_LOG_BYTES", 10)
    log = gpu.Log(tmp_path / "log")
    log.write("12345678")
    log.write("abcdefgh")
    assert (tmp_path / "log").read_text() == "12345678ab"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no GPU was found" in capsys.readouterr().out


def test_the_order() -> None:
    """Most valuable first, and every part; without a GPU what needs one is left out."""
    given = gpu.parse([])
    assert tuple(dict.fromkeys(step.part for step in gpu.steps(given, "90"))) == gpu.PARTS
    rehearsed = gpu.steps(gpu.parse(["--device", "cpu", "--tiny"]), "")
    assert {step.part for step in rehearsed} == {"build", "priority", "sass", "live", "fit", "others"}
    assert [step.name for step in gpu.steps(gpu.parse(["--part", "memcheck", "build"]), "90")] == ["build", "memcheck"]
    (check,) = gpu.steps(gpu.parse(["--part", "memcheck"]), "90")
    assert check.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_time_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long each step takes: priority cases end in time, and the whole does."""
    clock = 0.0
    began: dict[str, tuple[float, float]] = {}

    def slow(self: gpu.Step, log: gpu.Log) -> dict[str, Any]:
        nonlocal clock
        began[self.name] = clock, self.limit
        clock += self.limit
        return {"step": self.name, "outcome": "took too long", "seconds": self.limit, "status": 124}

    monkeypatch.setattr(gpu.Step, "run", slow)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock)
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 1
    assert clock <= gpu.WHOLE_S
    last = list(gpu.PRIORITY)[-1]
    assert sum(began[last]) <= gpu.PRIORITY_S
