"""Time and memory of the mask builder: ``python -m benchmarks.builder [--tries N] [--threads N]``.

Shapes and labels of a 7B model, no weights; its plan compiled to live rows and columns, too, and what importing the
package takes beyond torch. A time is the median of the tries, shown after the result was checked; memory is the peak of
what Python and numpy allocate while it runs, its result included.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from safefreeze_kernels.attribution import (
    MaskBuilder,
    SetScores,
    SquaredGradients,
    UnitLabels,
    UnitLayout,
    UnitScores,
    WeightScores,
    find_units,
    plan_from_weights,
    read_labels,
    scores_from_weights,
)
from safefreeze_kernels.kernels.parts import compile_live
from safefreeze_kernels.kernels.runs import Runs
from safefreeze_kernels.measure.timing import milliseconds
from safefreeze_kernels.plan.mask import FreezeMask
from safefreeze_kernels.plan.plan import FreezePlan

from .measure import at_least_one

#: Unit labels of Llama-2-7B-chat; where this file is absent a pattern of the same counts is generated.
LABELS_FILE: Final = Path(__file__).parents[2] / "shared" / "data" / "llama2-7b-chat-ssah-labels.safetensors"
LLAMA: Final = {"model_type": "llama", "num_attention_heads": 32}
_LAYERS, _HIDDEN, _HEADS, _CHANNELS, _VOCABULARY = 32, 4096, 32, 11008, 32000
# Label code -> heads, channels (published counts of Llama-2-7B-chat), and mean length of a run of equal labels that,
# after shuffling, gives the published 1.35, 1.02 and 1.20 channels. What is left over is CU.
_PATTERN: Final = {0: (0, 52_504, 1.17), 1: (4, 4_583, 1.0), 2: (34, 46_855, 1.04)}
_CU: Final = 3


def llama_7b_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the 291 parameters of Llama-2-7B."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for i in range(_LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (_HIDDEN, _HIDDEN) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj.weight": (_CHANNELS, _HIDDEN) for x in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (_HIDDEN, _CHANNELS)
        shapes |= {f"{layer}.{x}_layernorm.weight": (_HIDDEN,) for x in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (_HIDDEN,), "lm_head.weight": (_VOCABULARY, _HIDDEN)}


def generated_labels(seed: int = 0) -> UnitLabels:
    """As many units of every label as Llama-2-7B-chat has, scattered in runs of the same mean length."""
    draw = np.random.default_rng(seed)
    heads, runs, lengths = [], [], []
    for code, (n_heads, n_channels, mean_run) in _PATTERN.items():
        heads += [code] * n_heads
        n_runs = round(n_channels / mean_run)
        runs.append(np.full(n_runs, code, np.uint8))
        lengths.append(1 + np.bincount(draw.integers(n_runs, size=n_channels - n_runs), minlength=n_runs))
    rest = _LAYERS * _CHANNELS - sum(n_channels for _, n_channels, _ in _PATTERN.values())
    runs.append(np.full(rest, _CU, np.uint8))
    lengths.append(np.ones(rest, np.int64))
    order = draw.permutation(sum(map(len, runs)))
    channels = np.repeat(np.concatenate(runs)[order], np.concatenate(lengths)[order])
    heads += [_CU] * (_LAYERS * _HEADS - len(heads))
    return UnitLabels(
        torch.from_numpy(draw.permutation(np.array(heads, np.uint8)).reshape(_LAYERS, _HEADS)),
        torch.from_numpy(channels.reshape(_LAYERS, _CHANNELS)),
    )


@dataclass(frozen=True)
class Job:
    """Something to measure: ``run``, what makes its result right, and the most it may take (None: for information)."""

    name: str
    run: Callable[[], Any]
    right: Callable[[Any], bool]
    seconds: float | None = None
    megabytes: float | None = None
    timed_itself: bool = False  # the result is the time, in seconds


def jobs(labels_file: Path) -> list[Job]:
    """All measurements."""
    layout = find_units(llama_7b_shapes(), LLAMA)
    total = sum(int(np.prod(shape)) for shape in layout.parameters.values())
    scores = _random_scores(layout)
    n_units = layout.n_layers * (layout.n_heads + layout.d_ff)
    labels = read_labels(labels_file) if labels_file.is_file() else generated_labels()

    def plan() -> FreezePlan:
        known = read_labels(labels_file) if labels_file.is_file() else generated_labels()
        return MaskBuilder(known).freeze(scu=True, cu=True).build(find_units(llama_7b_shapes(), LLAMA))

    def share_is(plan: FreezePlan, share: float) -> bool:
        return abs(sum(mask.frozen_count for mask in plan.values()) / total - share) < 5e-4

    whole = MaskBuilder(labels).freeze(scu=True, cu=True).build(layout, preset="full")
    masks = [whole.get(name) or FreezeMask(shape) for name, shape in llama_7b_shapes().items()]
    weights = {name: torch.randn(shape) for name, shape in layout.parameters.items() if ".layers.0." in name}
    one_layer = find_units({name: tuple(weight.shape) for name, weight in weights.items()}, LLAMA)
    return [
        Job(
            f"plan from {'published' if labels_file.is_file() else 'generated'} labels, SCU + all CU, Llama-2-7B",
            plan, lambda plan: share_is(plan, 0.8), 2.0, 200.0,
        ),
        Job("that plan compiled to what a step visits", lambda: Runs.of(compile_live(masks)), bool, 1.0, 64.0),
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
        Job(
            "top half of 134 M single weights → plan file → loaded", partial(_chosen_and_loaded, _weight_scores(128)),
            lambda plan: sum(mask.frozen_count for mask in plan.values()) == 64 << 20, 3.0,
        ),
        Job("import, beyond import torch", import_seconds, bool, 0.1, timed_itself=True),
    ]  # fmt: skip


def import_seconds() -> float:
    """What importing the package takes in a fresh process that has torch."""
    code = (
        "import time, torch; began = time.perf_counter(); import safefreeze_kernels; print(time.perf_counter() - began)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def _weight_scores(millions: int) -> WeightScores:
    draw = torch.Generator().manual_seed(0)
    values = {f"{i}": torch.empty(1 << 10, 1 << 10).exponential_(generator=draw) for i in range(millions)}
    return WeightScores({name: tuple(value.shape) for name, value in values.items()}, SquaredGradients(values))


def _chosen_and_loaded(scores: WeightScores) -> FreezePlan:
    with TemporaryDirectory() as folder:
        scores.top(0.5).build().save(Path(folder) / "plan.safetensors")
        return FreezePlan.load(Path(folder) / "plan.safetensors")


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


def measure(job: Job, tries: int) -> tuple[float, float | None]:
    """Median seconds and peak megabytes; raises where the result is wrong."""
    if not job.right(job.run()):
        raise SystemExit(f"{job.name}: the result is wrong")
    if job.timed_itself:
        return statistics.median(job.run() for _ in range(tries)), None
    seconds = statistics.median(milliseconds(job.run) / 1e3 for _ in range(tries))
    tracemalloc.start()  # apart: tracing slows
    before = tracemalloc.get_traced_memory()[0]
    job.run()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return seconds, peak / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.builder", description="Time the mask builder.")
    parser.add_argument("--tries", type=at_least_one, default=5, help="timings of each job (default 5)")
    parser.add_argument("--threads", type=at_least_one, default=1, help="torch threads (default 1)")
    parser.add_argument("--labels", type=Path, default=LABELS_FILE, help="unit labels of Llama-2-7B, safetensors")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    table = Table("job", "time", "at most", "peak memory", "at most", box=None)
    kept = True
    for job in jobs(given.labels):
        seconds, megabytes = measure(job, given.tries)
        limits = [(seconds, job.seconds, "s", 3), (megabytes, job.megabytes, "MB", 0)]
        kept &= all(most is None or value is None or value <= most for value, most, _, _ in limits)
        cells = []
        for value, most, unit, digits in limits:
            cells += ["" if value is None else f"{value:.{digits}f} {unit}", "" if most is None else f"{most:g} {unit}"]
        table.add_row(job.name, *cells)
    Console().print(table)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
