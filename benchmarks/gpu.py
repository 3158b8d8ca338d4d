"""What `make gpu` does on a machine with a GPU: build, measure, test, sanitize, look at machine code.

``python -m benchmarks.gpu`` does all of it in under nine minutes, most valuable first, and ends with status 1 if a step
failed. Each step is a process with a time limit, ended with all it started; a failed one does not keep the later ones
from running, and what was measured is written after every case. A signal that ends this one ends the step too, and
still has all of it reported. ``--part`` runs some parts alone, and ``--device cpu --tiny`` rehearses the order
anywhere. One log, one JSON file and one picture go to benchmarks/results, or where OUT points.

Times are a GPU's own, from events: what is timed is queued behind a wait, so that the host's part is over before it
begins (cases marked "wall" take the host's clock instead). Tables, results and picture are those of
``python -m benchmarks``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

import safefreeze_kernels as sf

from .cases import FUSED, FUSED_BF16, MULTIPLY, ZERO, Case, Contender, Freeze, TensorSet, masked, practice, rows
from .measure import Bench, Machine, Timed, at_least_one, describe_machine, results_folder, save_json
from .report import WIDTH, Report

ROOT: Final = Path(__file__).parents[1]
LARGE: Final = TensorSet(16, (4096, 4096))  # 1.07 GB of float32 weights, rows as wide as those of a 7B model
NARROW: Final = TensorSet(64, (4096, 1024))  # as much in rows as wide as those of a small model
NARROWER: Final = TensorSet(64, (7168, 576))  # and of SmolLM2-135M
SMALL: Final = TensorSet(300, (3500,))
TINY: Final = {
    LARGE: TensorSet(4, (64, 128)), NARROW: TensorSet(4, (64, 32)), NARROWER: TensorSet(4, (64, 18)),
    SMALL: TensorSet(10, (50,)),
}  # fmt: skip
TINY_COPY: Final = 1 << 16
_LIVE: Final = 1 - round(0.8 * 4096) / 4096  # share of a dense state, 80% of the rows frozen

UNFROZEN: Final = masked()


def _triton(freeze: Freeze = UNFROZEN.freeze) -> Contender:
    return Contender("masked, triton backend", freeze)


def _rows(tensors: TensorSet) -> tuple[Case, ...]:
    width = f"rows of {tensors.shape[1]}"
    return (
        Case(f"{width}: nothing frozen / torch fused", tensors, UNFROZEN, FUSED, 1.00, share_target=0.93),
        Case(f"{width}: 7.5% frozen / nothing frozen", tensors, masked(rows(0.075)), UNFROZEN, 0.95),
        Case(f"{width}: 80% frozen / nothing frozen", tensors, masked(rows(0.8)), UNFROZEN, 0.24),
    )


#: Groups of cases, each measured in a process of its own: an error that a device keeps ends one group alone. Shares of
#: rows stand for SSAH's settings: SCU + 6% CU, a random fifth, half of the units, SCU + all CU.
PRIORITY: Final[dict[str, tuple[Case, ...]]] = {
    "rows of 4096": _rows(LARGE),
    "rows of 1024": _rows(NARROW),
    "rows of 576": _rows(NARROWER),
    "bf16": (
        Case("all bf16 / torch bf16", LARGE, masked(weights="bf16", state="bf16"), FUSED_BF16),
        Case("bf16 weights, fp32 state / fp32 fused", LARGE, masked(weights="bf16"), FUSED, share_target=0.93),
    ),
    "around the step": (
        Case(
            "clip + step / torch's", LARGE, Contender("clip + masked step"), Contender("torch clip + fused step"), 0.85
        ),
        Case("300 small tensors, wall / torch fused", SMALL, UNFROZEN, FUSED, 0.60, warm=True),
        Case("zero_frozen_grads_ / mul_", LARGE, ZERO, MULTIPLY, 0.06),
    ),
}
OTHERS: Final[dict[str, tuple[Case, ...]]] = {
    "more shares": (
        Case("20% of rows / nothing frozen", LARGE, masked(rows(0.2)), UNFROZEN, 0.83),
        Case("50% of rows / nothing frozen", LARGE, masked(rows(0.5)), UNFROZEN, 0.54),
        Case("7.5% of elements / nothing frozen", LARGE, masked(Freeze("elements", 0.075)), UNFROZEN, 1.02),
        Case("50% of elements / nothing frozen", LARGE, masked(Freeze("elements", 0.5)), UNFROZEN, 0.80),
        Case("80% of elements / nothing frozen", LARGE, masked(Freeze("elements", 0.8)), UNFROZEN, 0.66),
        Case("80% of columns / nothing frozen", LARGE, masked(Freeze("columns", 0.8)), UNFROZEN),
        Case("peak memory, 80% of rows / torch", LARGE, masked(rows(0.8)), FUSED, 1.02 * _LIVE, peak=True),
        Case("bf16 weights, masters / fp32 fused", LARGE, Contender("masked, masters", weights="bf16"), FUSED),
        Case("8-bit state / fp32 fused", LARGE, masked(state="int8"), FUSED),
        Case("bf16 weights, 8-bit state / bf16 fused", LARGE, masked(weights="bf16", state="int8"), FUSED_BF16),
    ),
    "peers": (
        Case("7.5% of rows / today's practice", LARGE, masked(rows(0.075)), practice(0.075)),
        Case("80% of rows / today's practice", LARGE, masked(rows(0.8)), practice(0.8)),
        Case("torch foreach / torch fused", LARGE, Contender("torch foreach"), FUSED),
        Case("optimi / torch fused", LARGE, Contender("optimi"), FUSED),
        Case("apex / torch fused", LARGE, Contender("apex"), FUSED),
        Case("bitsandbytes / torch fused", LARGE, Contender("bitsandbytes"), FUSED),
    ),
    "Triton": (
        Case("triton / cuda", LARGE, _triton(), UNFROZEN, 1.10),
        Case("triton / cuda, 50% of rows", LARGE, _triton(rows(0.5)), masked(rows(0.5)), 1.10),
    ),
}
GROUPS: Final = {**PRIORITY, **OTHERS}


# ------------------------------------------------------------------------------------------------ all of `make gpu`

WHOLE_S: Final = 530  # from beginning to end
PRIORITY_S: Final = 235  # by when the priority cases are written
PARTS: Final = (
    "build", "smoke", "priority", "exact", "tests", "memcheck", "racecheck", "sass", "live", "triton", "fit", "others"
)  # fmt: skip
_NEED_GPU: Final = {"smoke", "exact", "tests", "memcheck", "racecheck", "triton"}
_LOG_BYTES: Final = 8 << 20
# A command leads a process group, in which a shell waits for the other end of its pipe to close, however this process
# ended, and ends the group.
_GUARDED: Final = ["/bin/sh", "-c", 'exec 3<&0; (read -r _ <&3; kill -9 0) & exec "$@" 3<&- </dev/null', "sh"]


@dataclass(frozen=True)
class Step:
    """A command with a time limit in seconds.

    Attributes:
        part: which of `PARTS` it belongs to.
        at_least: how many tests must pass, of a step that runs tests.
    """

    part: str
    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    at_least: int = 0

    def run(self, log: Log) -> dict[str, Any]:
        """Its outcome in words, seconds, and exit status."""
        log.write(f"--- {self.name}, at most {self.limit:.0f} s\n")
        began = time.monotonic()
        status, told = _run(self.command, {**os.environ, **self.environment}, self.limit, log)
        passed = sum(map(int, re.findall(r"(\d+) passed", told[-2000:])))
        outcome = {0: "ok", 124: "took too long", 127: f"{self.command[0]} was not found"}.get(
            status, f"exit status {status}"
        )
        if status == 0 and passed < self.at_least:
            status, outcome = 1, f"{passed} tests passed, expected {self.at_least} at least"
        seconds = round(time.monotonic() - began, 1)
        log.write(f"--- {self.name}: {outcome} after {seconds} s\n")
        return {"step": self.name, "outcome": outcome, "seconds": seconds, "status": status}


class Log:
    """What steps say: shown, and kept in one file, which stays below 8 MiB."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._left = path.open("w", encoding="utf-8", errors="replace"), _LOG_BYTES

    def write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        kept = text[: self._left]
        self._left -= len(kept.encode("utf-8", errors="replace"))
        self._file.write(kept)
        self._file.flush()


def _run(command: list[str], environment: dict[str, str], limit: float, log: Log) -> tuple[int, str]:
    """Exit status (124: it took longer than ``limit`` and was ended, with all it had started; 127: not found), and what
    it said."""
    try:
        process = subprocess.Popen(
            [*_GUARDED, *command], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError:  # there is no shell
        return 127, ""
    told: list[str] = []

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            told.append(line)
            log.write(line)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        status = process.wait(max(limit, 0.1))
    except subprocess.TimeoutExpired:
        status = 124
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left running holds the GPU, and the pipe
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
        listener.join(5)
    return status, "".join(told)


def sanitizer() -> str:
    """compute-sanitizer: on the path, or in the folder of the toolkit."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    homes += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    places = [home / folder / "compute-sanitizer" for home in homes for folder in ("bin", "compute-sanitizer")]
    return next((str(place) for place in places if place.is_file()), "compute-sanitizer")


def steps(given: argparse.Namespace, arch: str) -> list[Step]:
    """Most valuable first; ``arch``: "90", for example, or "" without a GPU, where what needs one is left out."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
    tiny = ["--tiny"] if given.tiny else []
    measure = [python, "-m", "benchmarks.gpu", "--device", given.device, *tiny]
    measure += ["--rounds", str(given.rounds), "--output", str(given.output), "--group"]
    small = [python, "-m", "benchmarks.gpu", "--small"]
    check = [sanitizer(), "--error-exitcode", "9", "--tool"]
    # the caching allocator would hide what is read past the end of a tensor
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    build = {"SAFEFREEZE_REQUIRE_NATIVE": "1", "SAFEFREEZE_CUDA": "1" if arch else "0", "SAFEFREEZE_CUDA_ARCHS": arch}
    live = ["--device", given.device, "--widths", "576" if given.tiny else "2048", "--shares", "0.8"]
    live += ["--rounds", "2" if given.tiny else "8", "--output", str(given.output)]
    # every combination of what kernels are specialised for would be compiled first: the interpreter's part in the suite
    few = "freeze_rows or MaskedAdamW or guard or zero_frozen_grads_ or clip_grad_norm_"
    all_steps = [
        Step("build", "build", [python, "setup.py", "-q", "build_ext", "--inplace"], 150, build),
        Step("smoke", "smoke", small, 30),
        *(Step("priority", name, [*measure, name], 40) for name in PRIORITY),
        Step("exact", "exactness", [*pytest, "tests/kernels/test_cuda.py", "-k", "gpu"], 60, at_least=20),
        Step("tests", "tests", [*pytest, "tests/kernels/test_gpu.py"], 60, at_least=10),
        Step("memcheck", "memcheck", [*check, "memcheck", *small], 50, uncached),
        Step("racecheck", "racecheck", [*check, "racecheck", *small], 40),
        Step("sass", "machine code", [python, "-m", "benchmarks.sass", "--quick", "--arch", arch or "90"], 40),
        Step("live", "live gradients", [python, "-m", "benchmarks.live", *live], 40),
        Step("triton", "tests, Triton", [*pytest, "tests/kernels/test_triton.py", "-k", few], 60, at_least=5),
        Step("fit", "7B in 24 GB", [python, "-m", "benchmarks.fit", "--card", "--device", given.device, *tiny], 75),
        *(Step("others", name, [*measure, name], 60) for name in OTHERS),
    ]
    chosen = set(given.part or PARTS) - (set() if arch else _NEED_GPU)
    return [step for step in all_steps if step.part in chosen]


def run_all(given: argparse.Namespace) -> int:
    """Returns the exit status."""
    log = Log(given.output / "gpu.log")
    arch = "{}{}".format(*torch.cuda.get_device_capability()) if given.device == "cuda" else ""
    began, done, found = time.monotonic(), list[dict[str, Any]](), dict[str, Any]()
    chosen, ended = steps(given, arch), 0
    for number, step in enumerate(chosen):
        spent = time.monotonic() - began
        left = WHOLE_S - spent
        if step.part == "priority":  # what is left until then is shared by those that follow
            left = (PRIORITY_S - spent) / sum(other.part == "priority" for other in chosen[number:])
        limit = min(step.limit, max(left, 5.0 if step.part == "priority" else 0.0))
        if limit <= 0:
            done.append({"step": step.name, "outcome": "no time was left", "seconds": 0.0, "status": 124})
            continue
        part_file(given.output, step.name).unlink(missing_ok=True)  # of a run that was killed
        try:
            done.append(replace(step, limit=limit).run(log))
        except SystemExit as stop:
            ended = int(str(stop.code))
            outcome = f"stopped by {signal.Signals(ended - 128).name}"
            done.append({"step": step.name, "outcome": outcome, "seconds": 0.0, "status": ended})
        if ended:
            break
        if step.part in ("priority", "others"):
            gather(given, done, found)
    for result in done:
        log.write(f"{result['step']:<16} {result['outcome']} ({result['seconds']} s)\n")
    report = gather(given, done, found)
    if report is not None:
        for path in report.save(given.output):
            log.write(f"wrote {path}\n")
    wrong = (report is not None and not report.right) or any(result["status"] for result in done)
    return ended or int(wrong)


def gather(given: argparse.Namespace, done: list[dict[str, Any]], found: dict[str, Any]) -> Report | None:
    """``found``, the numbers of each group, with what a group just left behind, in one report, whose numbers are
    written, so that there are never more files than of one group; None: nothing yet."""
    parts = {name: path for name in GROUPS if (path := part_file(given.output, name)).exists()}
    found.update({name: json.loads(path.read_text()) for name, path in parts.items()})
    if not found:
        return None
    bench = Bench([case for name in found for case in GROUPS[name]], 1, device="cpu", copy_bytes=TINY_COPY)
    for part in found.values():
        bench.restore(part)
    settings = {"quick": given.tiny, "rounds": given.rounds, "only": ""}
    machine = Machine(**next(iter(found.values()))["machine"])
    full = not given.tiny and found.keys() >= PRIORITY.keys()
    report = Report(machine, bench, settings, full, steps=done)
    report.save_numbers(given.output)
    for path in parts.values():
        path.unlink()
    return report


def part_file(folder: Path, group: str) -> Path:
    """Where a group's numbers are, until all are in one file."""
    return folder / f"gpu-part-{group.replace(' ', '-')}.json"


def small_case() -> None:
    """Every CUDA kernel on a few tiny tensors: what sanitizers look at."""
    shapes = {"w": (37, 64), "v": (5, 200), "b": (33,)}
    plan = sf.FreezePlan({
        "w": sf.FreezeMask((37, 64), rows=range(0, 37, 3), elements=torch.rand(37, 64) < 0.1),
        "v": sf.FreezeMask((5, 200), cols=range(0, 200, 3)),
    })  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        model = torch.nn.ParameterDict({
            name: torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for name, shape in shapes.items()
        })  # fmt: skip
        opt = sf.MaskedAdamW(model.named_parameters(), freeze=plan, backend="cuda", rounding="stochastic")
        stock = torch.optim.SGD(model.parameters(), lr=0.1)
        sf.guard(stock, plan, model, backend="cuda")
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            sf.zero_frozen_grads_(model, plan, backend="cuda")
            sf.clip_grad_norm_(model, 1.0, plan, backend="cuda")
            opt.step()
            stock.step()
    torch.cuda.synchronize()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, help="run these parts alone")
    parser.add_argument("--group", choices=GROUPS, help="only measure this group of cases, in this process")
    parser.add_argument("--small", action="store_true", help="only run the small case that sanitizers look at")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny tensors, few rounds: tries the harness only")
    parser.add_argument("--rounds", type=at_least_one, default=30)
    parser.add_argument("--seconds", type=int, default=40, help="no case of a group begins after this")
    parser.add_argument("--output", type=Path, help="folder for log, JSON and picture")
    given = parser.parse_args(arguments)
    given.output = (given.output or results_folder()).absolute()
    return given


def measure_group(given: argparse.Namespace, console: Console) -> int:
    """Returns the exit status. Numbers are written anew after every case, so that nothing measured is lost."""
    cases = [replace(case, tensors=TINY[case.tensors]) if given.tiny else case for case in GROUPS[given.group]]

    def done(group: list[Timed]) -> None:
        for timed in group:
            ratio = f"{timed.ratio.median:.3f} " if timed.reported else ""
            told = f"{timed.case.name}: {ratio}{report.verdict(timed)} {timed.trouble}"
            console.print(told, markup=False, highlight=False)
        save_json(part_file(given.output, given.group), report.to_dict())

    bench = Bench(
        cases, 6 if given.tiny else given.rounds, device=given.device, copy_bytes=TINY_COPY if given.tiny else None,
        seconds=given.seconds, done=done,
    )  # fmt: skip
    settings = {"quick": given.tiny, "rounds": given.rounds, "only": given.group}
    report = Report(describe_machine(torch.get_num_threads(), given.device), bench, settings, full=False)
    bench.run()
    report.print(console)
    return 0 if report.right else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    given = parse(arguments)
    console = Console(width=WIDTH)
    if given.device == "cuda" and not torch.cuda.is_available():
        console.print(
            "benchmarks.gpu: no GPU was found; --device cpu --tiny rehearses without one",
            markup=False,
        )
        return 2
    if given.small:
        small_case()
        return 0
    return measure_group(given, console) if given.group else run_all(given)


def end_on_signals() -> None:
    """Have signals that end a process raise SystemExit, with the status that shells give it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
