"""What `make gpu` does on a machine with a GPU: build, test, sanitize, look at machine code, measure, write results.

``python -m benchmarks.gpu`` does all of it in under nine minutes and ends with status 1 if a step failed. Steps have
time limits, and a failed one does not keep the later ones from running. ``--measure`` only measures; with
``--device cpu --tiny`` that tries the harness anywhere. Results go to benchmarks/results, or where OUT points.

Times are a GPU's own, from events: what is timed is queued behind a wait, so that the host's part is over before it
begins (cases marked "wall" take the host's clock instead). A case's two contenders take turns; its ratio is the median
over rounds of the pair's, with the binomial 95% interval. Every result is checked before it is timed, frozen bytes once
more after. Bandwidth is that of a copy in the same rounds, bytes read + written.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

import safefreeze_kernels as sf
from safefreeze_kernels.kernels.backend import BackendUnavailableError

from .cases import FUSED, NOTHING, Case, Contender, Freeze, Storage, TensorSet, rows
from .contenders import CHECKED_STEPS, Inputs, ResultDiffersError, Runner, UnavailableError
from .measure import Timed

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = Path(__file__).parent / "results"
WIDTH: Final = 96
WAIT_CYCLES: Final = 2_000_000  # about a millisecond: longer than the host takes to queue a step
LARGE: Final = TensorSet(16, (4096, 4096))  # 1.07 GB of float32 weights, rows as wide as those of a 7B model
SMALL: Final = TensorSet(300, (3500,))
TINY: Final = {LARGE: TensorSet(4, (64, 128)), SMALL: TensorSet(10, (50,))}
PEAK_SHARE: Final = 0.8


def _masked(freeze: Freeze = NOTHING, weights: Storage = "fp32", state: Storage = "fp32") -> Contender:
    return Contender("masked", freeze, weights, state)


def _triton(freeze: Freeze = NOTHING) -> Contender:
    return Contender("masked, triton backend", freeze)


def _practice(share: float) -> Contender:
    return Contender("mask + step + restore", rows(share))


UNFROZEN: Final = _masked()
ZERO: Final = Contender("zero_frozen_grads_", rows(0.075))
MULTIPLY: Final = Contender("grad.mul_(mask)", rows(0.075))
FUSED_BF16: Final = Contender("torch fused", weights="bf16", state="bf16")
# Shares of rows stand for SSAH's settings: SCU + 6% CU, a random fifth, half of the units, SCU + all CU.
CASES: Final[tuple[Case, ...]] = (
    Case("nothing frozen / torch fused", LARGE, UNFROZEN, FUSED, 1.00),
    Case("7.5% of rows / nothing frozen", LARGE, _masked(rows(0.075)), UNFROZEN, 0.95),
    Case("20% of rows / nothing frozen", LARGE, _masked(rows(0.2)), UNFROZEN, 0.83),
    Case("50% of rows / nothing frozen", LARGE, _masked(rows(0.5)), UNFROZEN, 0.54),
    Case("80% of rows / nothing frozen", LARGE, _masked(rows(0.8)), UNFROZEN, 0.24),
    Case("7.5% of elements / nothing frozen", LARGE, _masked(Freeze("elements", 0.075)), UNFROZEN, 1.02),
    Case("clip + step / torch's", LARGE, Contender("clip + masked step"), Contender("torch clip + fused step"), 0.85),
    Case("zero_frozen_grads_ / mul_", LARGE, ZERO, MULTIPLY, 0.06),
    Case("300 small tensors, wall / torch fused", SMALL, UNFROZEN, FUSED, 0.60, warm=True),
    Case("triton / cuda", LARGE, _triton(), UNFROZEN, 1.10),
    Case("triton / cuda, 50% of rows", LARGE, _triton(rows(0.5)), _masked(rows(0.5)), 1.10),
    # nothing promised but a share of the copy (SHARES), and the peers
    Case("bf16 weights, fp32 state / fp32 fused", LARGE, _masked(weights="bf16"), FUSED),
    Case("bf16 weights, masters / fp32 fused", LARGE, Contender("masked, masters", weights="bf16"), FUSED),
    Case("all bf16 / torch bf16", LARGE, _masked(weights="bf16", state="bf16"), FUSED_BF16),
    Case("80% of columns / nothing frozen", LARGE, _masked(Freeze("columns", 0.8)), UNFROZEN),
    Case("7.5% of rows / today's practice", LARGE, _masked(rows(0.075)), _practice(0.075)),
    Case("80% of rows / today's practice", LARGE, _masked(rows(0.8)), _practice(0.8)),
    Case("torch foreach / torch fused", LARGE, Contender("torch foreach"), FUSED),
    Case("optimi / torch fused", LARGE, Contender("optimi"), FUSED),
    Case("apex / torch fused", LARGE, Contender("apex"), FUSED),
    Case("bitsandbytes / torch fused", LARGE, Contender("bitsandbytes"), FUSED),
)
SHARES: Final = {"nothing frozen / torch fused": 0.93, "bf16 weights, fp32 state / fp32 fused": 0.93}


# ----------------------------------------------------------------------------------------------------- timing


class Clock:
    """Milliseconds of one call on a device."""

    def __init__(self, device: str) -> None:
        self._device = device

    def time(self, call: Callable[[], Any], wall: bool = False) -> float:
        """``wall``: by the host's clock, until the device is done."""
        if self._device == "cuda" and not wall:
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(WAIT_CYCLES)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return float(begin.elapsed_time(end))
        self._synchronize()
        began = time.perf_counter()
        call()
        self._synchronize()
        return 1e3 * (time.perf_counter() - began)

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


@dataclass
class Row:
    """What was found of a case. ``trouble``: why there are no numbers."""

    case: str
    target: float | None
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    ms: float = math.nan
    against_ms: float = math.nan
    gb_per_s: float = math.nan
    share_of_copy: float = math.nan
    share_target: float | None = None
    rounds: int = 0
    trouble: str = ""
    wrong: bool = False
    detail: str = ""
    judged: bool = True

    @property
    def verdict(self) -> str:
        """met, MISSED, WRONG, skipped, - (not judged), or nothing where there is no target."""
        if self.trouble:
            return "WRONG" if self.wrong else "skipped"
        if not self.judged:
            return "-"
        if self.target is None and self.share_target is None:
            return ""
        kept = self.target is None or self.ratio <= self.target
        return "met" if kept and (self.share_target is None or self.share_of_copy >= self.share_target) else "MISSED"


def measure(case: Case, device: str, rounds: int, copy_bytes: int) -> Row:
    """Build, check, time in turns, check again."""
    row = Row(case.name, case.target, share_target=SHARES.get(case.name))
    clock, timed, copies = Clock(device), Timed(case), []
    inputs = Inputs(case.tensors, 0, device)
    runners: dict[Contender, Runner] = {}
    try:
        for who in (case.against, case.contender):
            runners[who] = Runner(who, inputs)
            runners[who].warm_up()
            runners[who].check()
        inputs.forget_stock()
        source, target = (torch.ones(copy_bytes // 4, device=device) for _ in range(2))
        for number in range(rounds):
            copies.append(clock.time(lambda: target.copy_(source)))
            pair = [(timed.times_ns, case.contender), (timed.against_ns, case.against)]
            for times, who in pair if number % 2 else reversed(pair):
                times.append(round(1e6 * clock.time(runners[who].run, wall=case.warm)))
        for runner in runners.values():
            runner.check_frozen()
    except (UnavailableError, BackendUnavailableError) as error:
        row.trouble = str(error)
        return row
    except (ResultDiffersError, RuntimeError) as error:
        row.trouble, row.wrong = str(error), True
        return row
    row.ratio, (row.low, row.high), row.rounds = timed.ratio, timed.interval, rounds
    row.ms, row.against_ms = (statistics.median(times) / 1e6 for times in (timed.times_ns, timed.against_ns))
    moved = runners[case.contender].bytes_moved
    if moved is not None and not case.warm:
        row.gb_per_s = moved / row.ms / 1e6
        row.share_of_copy = row.gb_per_s * statistics.median(copies) * 1e6 / (2 * copy_bytes)
    return row


def measure_peak(device: str, tensors: TensorSet) -> Row:
    """Peak memory of the first steps beyond weights and gradients, `PEAK_SHARE` of the rows frozen, over torch's. The
    live share of the state predicts it."""
    row = Row(f"peak memory, {PEAK_SHARE:.0%} of rows / torch", None)
    if device == "cpu":
        row.trouble = "needs a GPU's memory statistics"
        return row
    peaks = []
    for who in (_masked(rows(PEAK_SHARE)), FUSED):
        inputs = Inputs(tensors, 0, device)
        runner = Runner(who, inputs)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(CHECKED_STEPS):
            runner.run()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del runner, inputs
    row.ratio, row.detail = peaks[0] / peaks[1], f"{peaks[0] / 1e9:.3f} GB, torch {peaks[1] / 1e9:.3f} GB"
    row.target = 1.02 * (1 - round(PEAK_SHARE * tensors.shape[0]) / tensors.shape[0])
    return row


# ----------------------------------------------------------------------------------------------------- results


def describe(device: str) -> dict[str, Any]:
    """Machine, versions, date."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backends": sf.info().backends,
    }
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        if shutil.which("nvidia-smi"):
            found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def save(folder: Path, machine: dict[str, Any], found: Sequence[Row], steps: Sequence[dict[str, Any]]) -> Path:
    """Write ``<device>.json`` anew; called after every case, so that nothing measured is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-") + ".json")
    cases = [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(row).items()}
        | {"verdict": row.verdict}
        for row in found
    ]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"machine": machine, "steps": list(steps), "cases": cases}, indent=1) + "\n")
    partial.replace(path)
    return path


def table(found: Sequence[Row], machine: dict[str, Any]) -> Table:
    """The cases and what was found."""
    title = f"{machine['device']}, torch {machine['torch']}"
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    shown.add_column("case", no_wrap=True, max_width=38)
    for name in ("target", "ratio", "ms", "GB/s", "of copy", "verdict"):
        shown.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    styles = {"met": "green", "MISSED": "bold red", "WRONG": "bold red", "skipped": "yellow"}
    for row in found:
        target = "" if row.target is None else f"{row.target:.2f}"
        values = ((row.ratio, ".3f"), (row.ms, ".3f"), (row.gb_per_s, ".0f"), (row.share_of_copy, ".0%"))
        numbers = ["" if math.isnan(value) else f"{value:{form}}" for value, form in values]
        style = styles.get(row.verdict)
        shown.add_row(row.case, target, *numbers, f"[{style}]{row.verdict}[/]" if style else row.verdict)
    return shown


def draw(found: Sequence[Row], machine: dict[str, Any], path: Path) -> None:
    """Ratios with their intervals and targets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in found if not math.isnan(row.ms)]
    if not timed:
        return
    figure, axes = pyplot.subplots(figsize=(8, 0.36 * len(timed) + 1.2), layout="constrained")
    places = range(len(timed))
    axes.barh(places, [row.ratio for row in timed], color="#0072B2", height=0.6)
    around = [[row.ratio - row.low for row in timed], [row.high - row.ratio for row in timed]]
    axes.errorbar([row.ratio for row in timed], places, xerr=around, fmt="none", ecolor="#000000", capsize=2)
    limit = min(max(max(row.high, row.target or 0) for row in timed), 4.0)  # one wild case must not hide the others
    ends = [min(max(row.high, row.target or 0), limit) for row in timed]
    for place, row, end in zip(places, timed, ends, strict=True):
        if row.target is not None:
            axes.plot([row.target] * 2, [place - 0.4, place + 0.4], color="#D55E00", linewidth=2)
        share = "" if math.isnan(row.share_of_copy) else f", {row.share_of_copy:.0%} of a copy"
        axes.annotate(f" {row.ratio:.2f}{share}", (end, place), va="center", fontsize=8)
    axes.set_yticks(places, [row.case for row in timed], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * limit)
    axes.set_xlabel("time / the other's (orange: target)")
    axes.set_title(f"{machine['device']}, torch {machine['torch']}, {machine['date'][:10]}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------------ all of `make gpu`


@dataclass
class Step:
    """A command with a time limit in seconds."""

    name: str
    command: list[str]
    limit: int
    environment: dict[str, str]

    def run(self, console: Console) -> dict[str, Any]:
        """Its outcome in words, seconds, and exit status."""
        console.print(f"--- {self.name}, at most {self.limit} s", markup=False, highlight=False)
        began, environment = time.monotonic(), {**os.environ, **self.environment}
        if shutil.which(self.command[0]) is None:
            status, outcome = 127, f"{self.command[0]} was not found"
        else:
            try:
                status = subprocess.run(self.command, cwd=ROOT, env=environment, timeout=self.limit).returncode
                outcome = "ok" if status == 0 else f"exit status {status}"
            except subprocess.TimeoutExpired:
                status, outcome = 124, "took too long"
        seconds = round(time.monotonic() - began, 1)
        console.print(f"--- {self.name}: {outcome} after {seconds} s", markup=False, highlight=False)
        return {"step": self.name, "outcome": outcome, "seconds": seconds, "status": status}


def steps() -> Iterator[Step]:
    """Everything before measuring."""
    major, minor = torch.cuda.get_device_capability()
    python, arch = sys.executable, f"{major}{minor}"
    pytest = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    small = [python, "-m", "benchmarks.gpu", "--small"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    build = {"SAFEFREEZE_CUDA": "1", "SAFEFREEZE_REQUIRE_NATIVE": "1", "SAFEFREEZE_CUDA_ARCHS": arch}
    yield Step("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 60, build)
    yield Step(
        "tests, CUDA", [*pytest, "tests/kernels/test_gpu.py", "tests/kernels/test_cuda.py", "-k", "gpu"], 110, {}
    )
    # every combination of what kernels are specialised for would be compiled first: the interpreter's part in the suite
    few = "freeze_rows or MaskedAdamW or guard or zero_frozen_grads_ or clip_grad_norm_"
    yield Step("tests, Triton", [*pytest, "tests/kernels/test_triton.py", "-k", few], 60, {})
    yield Step("memcheck", [*sanitizer, "memcheck", *small], 40, {})
    yield Step("racecheck", [*sanitizer, "racecheck", *small], 30, {})
    yield Step("machine code", [python, "-m", "benchmarks.sass", "--quick", "--arch", arch], 30, {})
    live = ["--device", "cuda", "--widths", "2048", "--shares", "0.8", "--rounds", "8"]
    yield Step("live gradients", [python, "-m", "benchmarks.live", *live], 30, {})


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
    parser.add_argument("--measure", action="store_true", help="only measure")
    parser.add_argument("--small", action="store_true", help="only run the small case that sanitizers look at")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny tensors, few rounds: tries the harness only")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name matches")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=int, default=140, help="no case begins after this")
    parser.add_argument("--output", type=Path, default=None, help="folder for JSON and picture")
    return parser.parse_args(arguments)


def measure_all(given: argparse.Namespace, console: Console) -> int:
    """Returns the exit status."""
    done = json.loads(os.environ.get("SAFEFREEZE_GPU_STEPS", "[]"))  # what went before, for the record
    machine, found, began = describe(given.device), [], time.monotonic()
    folder = given.output or (Path(os.environ["OUT"]) if "OUT" in os.environ else RESULTS)
    path = None
    rounds, copy_bytes = (4, 1 << 16) if given.tiny else (given.rounds, 1 << 30)
    large = TINY[LARGE] if given.tiny else LARGE
    tasks: list[tuple[str, Callable[[], Row]]] = [
        (case.name, lambda case=case: measure(case, given.device, rounds, copy_bytes))  # type: ignore[misc]
        for case in (replace(case, tensors=TINY[case.tensors]) if given.tiny else case for case in CASES)
    ]
    tasks.insert(9, ("peak memory", lambda: measure_peak(given.device, large)))
    for name, task in tasks:
        if not re.search(given.only, name):
            continue
        late = time.monotonic() - began > given.seconds
        found.append(Row(name, None, trouble="no time was left") if late else task())
        row = found[-1]
        row.judged = not given.tiny
        console.print(f"{row.case}: {row.ratio:.3f} {row.verdict}", markup=False, highlight=False)
        gc.collect()
        if given.device == "cuda":
            torch.cuda.empty_cache()
        path = save(folder, machine, found, done)
    console.print(table(found, machine))
    for row in found:
        if row.trouble or row.detail:
            console.print(f"{row.case}: {row.trouble or row.detail}", markup=False, highlight=False)
    if path is not None:
        draw(found, machine, path.with_suffix(".png"))
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return 1 if any(row.wrong for row in found) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    given = parse(arguments)
    console = Console(width=WIDTH)
    if given.device == "cuda" and not torch.cuda.is_available():
        console.print(
            "benchmarks.gpu: no GPU was found; --measure --device cpu --tiny tries the harness without one",
            markup=False,
        )
        return 2
    if given.small:
        small_case()
        return 0
    if given.measure:
        return measure_all(given, console)
    done = [step.run(console) for step in steps()]
    # measured in a process of its own, which imports what was just built
    passed_on = sys.argv[1:] if arguments is None else arguments
    command = [sys.executable, "-m", "benchmarks.gpu", "--measure", *passed_on]
    done.append(Step("measure", command, given.seconds + 40, {"SAFEFREEZE_GPU_STEPS": json.dumps(done)}).run(console))
    for step in done:
        console.print(f"{step['step']:<14} {step['outcome']} ({step['seconds']} s)", markup=False, highlight=False)
    return int(any(step["status"] for step in done))


if __name__ == "__main__":
    sys.exit(main())
