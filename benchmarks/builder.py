"""Time and memory of the mask builder: ``python -m benchmarks.builder [--tries N] [--threads N]``.

Shapes and labels of a 7B model, no weights. A time is the median of the tries, shown after the result was checked;
memory is the peak of what Python and numpy allocate while it runs, its result included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from safefreeze_kernels.attribution import (
    MaskBuilder,
    SetScores,
    UnitLabels,
    UnitLayout,
    UnitScores,
    find_units,
    plan_from_weights,
    read_labels,
    scores_from_weights,
)
from safefreeze_kernels.plan.plan import FreezePlan

from .claims import LABELS_FILE, generated_labels, llama_7b_shapes

_MB: Final = 1e6


@dataclass(frozen=True)
class Job:
    """Something to measure: ``run``, what makes its result right, and the most it may take (None: for information)."""

    name: str
    run: Callable[[], Any]
    right: Callable[[Any], bool]
    seconds: float | None = None
    megabytes: float | None = None


def jobs(labels_file: Path) -> list[Job]:
    """All measurements."""
    layout = find_units(llama_7b_shapes(), {"model_type": "llama", "num_attention_heads": 32})
    total = sum(int(np.prod(shape)) for shape in layout.parameters.values())
    scores = _random_scores(layout)
    n_units = layout.n_layers * (layout.n_heads + layout.d_ff)

    def labels() -> UnitLabels:
        return read_labels(labels_file) if labels_file.is_file() else generated_labels()

    def plan() -> FreezePlan:
        shapes = llama_7b_shapes()
        known = find_units(shapes, {"model_type": "llama", "num_attention_heads": 32})
        return MaskBuilder(labels()).freeze(scu=True, cu=True).build(known)

    def share_is(plan: FreezePlan, share: float) -> bool:
        return abs(sum(mask.frozen_count for mask in plan.values()) / total - share) < 5e-4

    weights = {name: torch.randn(shape) for name, shape in layout.parameters.items() if ".layers.0." in name}
    one_layer = find_units(
        {name: tuple(weight.shape) for name, weight in weights.items()},
        {"model_type": "llama", "num_attention_heads": 32},
    )
    return [
        Job(
            f"plan from {'published' if labels_file.is_file() else 'generated'} labels, SCU + all CU, Llama-2-7B",
            plan, lambda plan: share_is(plan, 0.8), 2.0, 200.0,
        ),
        Job(
            f"labels of {n_units:,} units from scores", lambda: MaskBuilder(scores).labels,
            lambda labels: sum(map(sum, labels.counts().values())) == n_units, 0.5,
        ),
        Job(
            f"top fifth of {n_units:,} units", lambda: MaskBuilder(scores).top(0.2),
            lambda top: (top.heads.sum(), top.channels.sum()) == (round(0.2 * 1024), round(0.2 * 352_256)), 0.5,
        ),
        Job(
            "plan from scores, 40% of the units, Llama-2-7B",
            lambda: MaskBuilder(scores).freeze(share=0.4).build(), lambda plan: share_is(plan, 0.4), 2.0, 200.0,
        ),
        Job(
            "weight scores of one layer to units", lambda: scores_from_weights(one_layer, weights),
            lambda ranking: np.isfinite(ranking.heads).all() and np.isfinite(ranking.channels).all(),
        ),
        Job(
            "weight scores of one layer to element masks, top 5%", lambda: plan_from_weights(weights, 0.05),
            lambda plan: all(mask.frozen_count == int(0.05 * mask.numel + 0.5) for mask in plan.values()),
        ),
    ]  # fmt: skip


def _random_scores(layout: UnitLayout) -> UnitScores:
    draw = torch.Generator().manual_seed(0)
    sets = [
        SetScores(
            torch.empty(*layout.heads_shape, layout.head_dim).exponential_(generator=draw),
            torch.empty(layout.channels_shape).exponential_(generator=draw),
        )
        for _ in range(2)
    ]
    return UnitScores(layout, *sets)


def measure(job: Job, tries: int) -> tuple[float, float]:
    """Median seconds and peak megabytes; raises where the result is wrong."""
    if not job.right(job.run()):
        raise SystemExit(f"{job.name}: the result is wrong")
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        job.run()
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()  # apart: tracing slows
    before = tracemalloc.get_traced_memory()[0]
    job.run()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return statistics.median(seconds), peak / _MB


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.builder", description="Time the mask builder.")
    parser.add_argument("--tries", type=int, default=5, help="timings of each job (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--labels", type=Path, default=LABELS_FILE, help="unit labels of Llama-2-7B, safetensors")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    table = Table("job", "time", "at most", "peak memory", "at most", box=None)
    kept = True
    for job in jobs(given.labels):
        seconds, megabytes = measure(job, given.tries)
        limits = [(seconds, job.seconds, "s", 3), (megabytes, job.megabytes, "MB", 0)]
        kept &= all(most is None or value <= most for value, most, _, _ in limits)
        cells = []
        for value, most, unit, digits in limits:
            cells += [f"{value:.{digits}f} {unit}", "" if most is None else f"{most:g} {unit}"]
        table.add_row(job.name, *cells)
    Console().print(table)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
