"""``python -m benchmarks.curves``: what moments of 16 and of 8 bits cost in held-out loss.

SmolLM2-135M in float32, 80% of the rows of every linear layer frozen, packed gradients, is trained on the source text
of Python's standard library: files drawn by the seed, each text seen once. The runs of a seed see the same batches, and
differ in the dtype of the optimizer's state alone. Held-out loss is of files that no run trains on. A round is a
seed. Writes results/curves-*.json after each run, and goes on from there.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels.integrations.transformers import PACKAGED, load_model
from safefreeze_kernels.kernels.operands import dtype_word

from .backward import plan_of
from .measure import at_least_one, case_options, describe_machine, results_folder, save_result

STATES: Final = (torch.float32, torch.bfloat16, torch.int8)
SHARE: Final = 0.8
BATCH, LENGTH = 2, 64
HELD_OUT_FILES, HELD_OUT_BATCHES = 20, 32
LOOK_EVERY: Final = 100
LR, WARM_UP = 2e-4, 20


def texts(seed: int) -> tuple[list[str], list[str]]:
    """The files to train on in an order of their own, and the files to look at, which are the same for all seeds."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    held_out, trained = files[:HELD_OUT_FILES], files[HELD_OUT_FILES:]
    random.Random(seed).shuffle(trained)
    return [[path.read_text(encoding="utf-8", errors="replace") for path in part] for part in (trained, held_out)]  # type: ignore[return-value]


def batches(tokenizer: Any, found: list[str]) -> Iterator[Tensor]:
    """(BATCH, LENGTH) tokens each, none twice."""
    left: list[int] = []
    for text in found:
        left += tokenizer(text)["input_ids"]
        while len(left) >= BATCH * LENGTH:
            yield torch.tensor(left[: BATCH * LENGTH]).view(BATCH, LENGTH)
            del left[: BATCH * LENGTH]


def train(state: torch.dtype, seed: int, steps: int) -> dict[str, Any]:
    """Held-out losses of one run, before it and every `LOOK_EVERY` steps."""
    _, model, tokenizer = load_model(PACKAGED)
    plan = plan_of(model, SHARE)
    assert plan is not None
    proof = sf.snapshot(model, plan)
    trained, held_out = texts(seed)
    looked_at = [tokens for _, tokens in zip(range(HELD_OUT_BATCHES), batches(tokenizer, held_out), strict=False)]
    optimizer = sf.MaskedAdamW(
        model.named_parameters(), lr=LR, weight_decay=0.1, freeze=plan, state_dtype=state, seed=seed
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, (steps - step) / max(steps - WARM_UP, 1))
    )
    sf.live_gradients(model, plan, storage="packed")
    began, losses, curve = time.monotonic(), list[float](), {0: look(model, looked_at)}
    model.train()
    for step, tokens in zip(range(1, steps + 1), batches(tokenizer, trained), strict=False):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        sf.clip_grad_norm_(model, 1.0, plan, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % LOOK_EVERY == 0 or step == steps:
            curve[step] = look(model, looked_at)
    proof.verify(model)
    return {
        "state": dtype_word(state), "seed": seed, "held_out": curve,
        "trained": [round(loss, 5) for loss in losses], "seconds": round(time.monotonic() - began),
    }  # fmt: skip


@torch.no_grad()
def look(model: nn.Module, looked_at: list[Tensor]) -> float:
    """The mean loss of these batches."""
    model.eval()
    found = [model(input_ids=tokens, labels=tokens, use_cache=False).loss.item() for tokens in looked_at]
    model.train()
    return round(statistics.fmean(found), 5)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By state: the last held-out losses of the seeds, and how far they are from float32's of the same seed."""
    last = {(run["state"], run["seed"]): list(run["held_out"].values())[-1] for run in runs}
    found = {}
    for state in dict.fromkeys(state for state, _ in last):
        own = {seed: loss for (word, seed), loss in last.items() if word == state}
        apart = [round(loss - last["float32", seed], 5) for seed, loss in own.items() if ("float32", seed) in last]
        found[state] = {"last_held_out": list(own.values()), "above_float32": apart}
    return found


def main() -> None:
    parser = case_options("curves", __doc__, 3)
    parser.add_argument("--steps", type=at_least_one, default=200)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    machine = describe_machine(given.threads)
    settings = {
        "python": sys.version.split()[0], "torch": torch.__version__, "steps": given.steps, "lr": LR,
        "batch": [BATCH, LENGTH], "frozen_share_of_rows": SHARE,
    }  # fmt: skip
    path = (given.output or results_folder()) / f"curves-{machine.slug}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    runs = before.get("runs", []) if before.get("settings") == settings else []
    for seed in range(given.rounds):
        for state in STATES:
            if not any((run["state"], run["seed"]) == (dtype_word(state), seed) for run in runs):
                runs.append(train(state, seed, given.steps))
                print(f"seed {seed}, {runs[-1]['state']}: {runs[-1]['held_out']}, {runs[-1]['seconds']} s", flush=True)
                save_result(
                    "curves", machine, {"settings": settings, "summary": summary(runs), "runs": runs}, given.output
                )
    for word, ends in summary(runs).items():
        print(f"{word:9} held-out loss {ends['last_held_out']}, above float32 {ends['above_float32']}")


if __name__ == "__main__":
    main()
