"""What `make gpu` does on a machine with a GPU: build, test, sanitize, look at machine code, measure, write results.

``python -m benchmarks.gpu`` does all of it in under nine minutes and ends with status 1 if a step failed. Steps have
time limits, and a failed one does not keep the later ones from running. ``--measure`` only measures; with
``--device cpu --tiny`` that tries the harness anywhere. Results go to benchmarks/results, or where OUT points.

Times are a GPU's own, from events: what is timed is queued behind a wait, so that the host's part is over before it
begins (cases marked "wall" take the host's clock instead). Tables, results and picture are those of
``python -m benchmarks``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

import safefreeze_kernels as sf

from .cases import FUSED, FUSED_BF16, MULTIPLY, ZERO, Case, Contender, Freeze, TensorSet, masked, practice, rows
from .measure import RESULTS, Bench, Timed, at_least_one, describe_machine
from .report import WIDTH, Report

ROOT: Final = Path(__file__).parents[1]
LARGE: Final = TensorSet(16, (4096, 4096))  # 1.07 GB of float32 weights, rows as wide as those of a 7B model
SMALL: Final = TensorSet(300, (3500,))
TINY: Final = {LARGE: TensorSet(4, (64, 128)), SMALL: TensorSet(10, (50,))}
TINY_COPY: Final = 1 << 16
_LIVE: Final = 1 - round(0.8 * 4096) / 4096  # share of a dense state, 80% of the rows frozen

UNFROZEN: Final = masked()


def _triton(freeze: Freeze = UNFROZEN.freeze) -> Contender:
    return Contender("masked, triton backend", freeze)


# Shares of rows stand for SSAH's settings: SCU + 6% CU, a random fifth, half of the units, SCU + all CU.
CASES: Final[tuple[Case, ...]] = (
    Case("nothing frozen / torch fused", LARGE, UNFROZEN, FUSED, 1.00, share_target=0.93),
    Case("7.5% of rows / nothing frozen", LARGE, masked(rows(0.075)), UNFROZEN, 0.95),
    Case("20% of rows / nothing frozen", LARGE, masked(rows(0.2)), UNFROZEN, 0.83),
    Case("50% of rows / nothing frozen", LARGE, masked(rows(0.5)), UNFROZEN, 0.54),
    Case("80% of rows / nothing frozen", LARGE, masked(rows(0.8)), UNFROZEN, 0.24),
    Case("7.5% of elements / nothing frozen", LARGE, masked(Freeze("elements", 0.075)), UNFROZEN, 1.02),
    Case("clip + step / torch's", LARGE, Contender("clip + masked step"), Contender("torch clip + fused step"), 0.85),
    Case("zero_frozen_grads_ / mul_", LARGE, ZERO, MULTIPLY, 0.06),
    Case("300 small tensors, wall / torch fused", SMALL, UNFROZEN, FUSED, 0.60, warm=True),
    Case("peak memory, 80% of rows / torch", LARGE, masked(rows(0.8)), FUSED, 1.02 * _LIVE, peak=True),
    Case("triton / cuda", LARGE, _triton(), UNFROZEN, 1.10),
    Case("triton / cuda, 50% of rows", LARGE, _triton(rows(0.5)), masked(rows(0.5)), 1.10),
    # nothing promised but a share of the copy , and the peers
    Case("bf16 weights, fp32 state / fp32 fused", LARGE, masked(weights="bf16"), FUSED, share_target=0.93),
    Case("bf16 weights, masters / fp32 fused", LARGE, Contender("masked, masters", weights="bf16"), FUSED),
    Case("all bf16 / torch bf16", LARGE, masked(weights="bf16", state="bf16"), FUSED_BF16),
    Case("80% of columns / nothing frozen", LARGE, masked(Freeze("columns", 0.8)), UNFROZEN),
    Case("7.5% of rows / today's practice", LARGE, masked(rows(0.075)), practice(0.075)),
    Case("80% of rows / today's practice", LARGE, masked(rows(0.8)), practice(0.8)),
    Case("torch foreach / torch fused", LARGE, Contender("torch foreach"), FUSED),
    Case("optimi / torch fused", LARGE, Contender("optimi"), FUSED),
    Case("apex / torch fused", LARGE, Contender("apex"), FUSED),
    Case("bitsandbytes / torch fused", LARGE, Contender("bitsandbytes"), FUSED),
)


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
    parser.add_argument("--rounds", type=at_least_one, default=30)
    parser.add_argument("--seconds", type=int, default=140, help="no case begins after this")
    parser.add_argument("--output", type=Path, default=None, help="folder for JSON and picture")
    return parser.parse_args(arguments)


def measure_all(given: argparse.Namespace, console: Console) -> int:
    """Returns the exit status. Results are written anew after every case, so that nothing measured is lost."""
    steps = json.loads(os.environ.get("SAFEFREEZE_GPU_STEPS", "[]"))  # what went before, for the record
    folder = given.output or (Path(os.environ["OUT"]) if "OUT" in os.environ else RESULTS)
    machine = describe_machine(torch.get_num_threads(), given.device)
    cases = [replace(case, tensors=TINY[case.tensors]) if given.tiny else case for case in CASES]

    def done(group: list[Timed]) -> None:
        for timed in group:
            ratio = f"{timed.ratio.median:.3f} " if timed.reported else ""
            console.print(f"{timed.case.name}: {ratio}{report.verdict(timed)}", markup=False, highlight=False)
        report.save_numbers(folder)

    bench = Bench(
        [case for case in cases if re.search(given.only, case.name)], 6 if given.tiny else given.rounds,
        device=given.device, copy_bytes=TINY_COPY if given.tiny else None, seconds=given.seconds, done=done,
    )  # fmt: skip
    settings = {"quick": given.tiny, "rounds": given.rounds, "only": given.only}
    report = Report(machine, bench, settings, full=not given.tiny and not given.only, steps=steps)
    bench.run()
    report.print(console)
    for path in report.save(folder) if bench.timed else ():
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return 0 if report.right else 1


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
