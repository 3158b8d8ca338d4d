"""Run the benchmarks: ``python -m benchmarks [--quick] [--only PATTERN] …``.

Prints tables, and writes ``results/<cpu>.json`` and ``.png`` after a full run. Every time that is shown belongs to a
result that was compared with `torch.optim.AdamW(foreach=False, fused=False)` before, and whose frozen bytes were
compared again after. Ends with status 1 if a result was wrong; a missed ratio is a number, not a failure.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .cases import CASES, shrink
from .measure import Bench, at_least_one, describe_machine, results_folder
from .report import WIDTH, Report

FEWEST_ROUNDS: Final = 15  # of a run whose results are kept


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time masked AdamW steps against stock ones, as checked ratios."
    )
    parser.add_argument("--quick", action="store_true", help="small tensors, few rounds: tries the harness only")
    parser.add_argument("--rounds", type=at_least_one, help="timings of every pair (default 60; 6 with --quick)")
    parser.add_argument("--passes", type=at_least_one, help="how often all is built anew (default 3; 1 with --quick)")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name matches this regular expression")
    parser.add_argument("--threads", type=at_least_one, default=2, help="torch threads (default 2)")
    parser.add_argument("--output", type=Path, help="folder for JSON and picture (default: results/ after a full run)")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    given = parser.parse_args(arguments)
    given.rounds = given.rounds or (6 if given.quick else 60)
    given.passes = min(given.passes or (1 if given.quick else 3), given.rounds)
    try:
        given.chosen = re.compile(given.only or "", re.IGNORECASE)
    except re.error as error:
        parser.error(f"--only {given.only!r} is not a regular expression: {error}")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    given = parse(arguments)
    console = Console(width=WIDTH if not sys.stdout.isatty() else None)
    cases = [shrink(case) if given.quick else case for case in CASES if given.chosen.search(case.name)]
    if given.list or not cases:
        console.print("\n".join(case.name for case in CASES), markup=False, highlight=False)
        return 0 if given.list else 2
    torch.set_num_threads(given.threads)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True, refresh_per_second=2,
    )  # fmt: skip
    with progress:
        task = progress.add_task("starting")

        def tick(what: str) -> None:
            progress.update(task, advance=1, description=what[:50])

        bench = Bench(cases, given.rounds, given.passes, tick)
        progress.update(task, total=bench.ticks)
        bench.run()
    settings = {"quick": given.quick, "rounds": given.rounds, "passes": given.passes, "only": given.only}
    full = not given.quick and not given.only and given.rounds >= FEWEST_ROUNDS
    report = Report(describe_machine(given.threads), bench, settings, full)
    report.print(console)
    folder = given.output or (results_folder() if report.full else None)
    for path in report.save(folder) if folder else ():
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return 0 if report.right else 1


if __name__ == "__main__":
    sys.exit(main())
