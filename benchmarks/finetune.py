"""``python -m benchmarks.finetune``: SmolLM2-135M fine-tuned with 80% of its units frozen, start to end.

    small   packed gradients, 8-bit state, `step_in_backward`; clipped tensor by tensor
    packed  `live_gradients(storage="packed")` + `MaskedAdamW`
    live    `live_gradients` + `MaskedAdamW`
    masked  plain autograd + `MaskedAdamW`: the run the others are compared with
    stock   plain autograd + torch's fused AdamW, nothing frozen
    LoRA    peft, r = 32 on all linear layers, torch's fused AdamW

The same batches of the shipped everyday pairs; forward, backward, clip and step. Times are taken in turns in one
process, each from a model of its own; peak memory in a process for each. A run whose losses stray from the masked
run's (the small one has a clip of its own), or that moves a frozen byte, ends without a result. Writes
results/finetune-*.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import encode_pairs, find_units, units_from
from safefreeze_kernels.calibration import load_pairs
from safefreeze_kernels.integrations.transformers import load_model
from safefreeze_kernels.measure.memory import peak, restart_peak
from safefreeze_kernels.measure.timing import in_order, milliseconds

from .measure import as_entry, at_least_one, describe_machine, print_entry, ratio_entry, save_result

WAYS: Final = ("small", "packed", "live", "masked", "stock", "LoRA")
SHARE: Final = 0.8
BATCH: Final = 4
COMPARED: Final = (
    ("small", "stock"), ("packed", "stock"), ("live", "stock"), ("masked", "stock"), ("live", "LoRA"),
    ("packed", "LoRA"), ("small", "packed"), ("small", "LoRA"),
)  # fmt: skip
#: Live gradients are the same sums in another order; over a few dozen steps that moves a loss by less than this.
CLOSE: Final = 2e-3


def plan_for(model: torch.nn.Module) -> sf.FreezePlan:
    """80% of the heads and channels of every layer, drawn once: SCU and all CU of the paper are as many."""
    layout = find_units(model)
    pick = torch.Generator().manual_seed(1)

    def drawn(n: int) -> dict[int, list[int]]:
        return {i: torch.randperm(n, generator=pick)[: round(SHARE * n)].tolist() for i in range(layout.n_layers)}

    return units_from(layout, heads=drawn(layout.n_heads), channels=drawn(layout.d_ff)).build(model)


def batches(tokenizer: Any, count: int) -> list[dict[str, torch.Tensor]]:
    pairs = load_pairs("utility")
    pairs = (pairs * (count * BATCH // len(pairs) + 1))[: count * BATCH]
    return encode_pairs(tokenizer, pairs, max_length=256, batch_size=BATCH)


def trainer(
    way: str, model: torch.nn.Module, plan: sf.FreezePlan, lr: float
) -> tuple[Callable[[dict[str, Any]], float], Any]:
    """What makes one training step of a batch and returns its loss; and the optimizer."""
    if way == "LoRA":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=32, target_modules="all-linear"))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer: Any = (
        torch.optim.AdamW((p for _, p in trained), lr=lr, fused=True)
        if way in ("stock", "LoRA")
        else sf.MaskedAdamW(trained, lr=lr, freeze=plan, state_dtype=torch.int8 if way == "small" else torch.float32)
    )
    if way in ("small", "live", "packed"):
        sf.live_gradients(model, plan, storage="dense" if way == "live" else "packed")
    model.train()

    def train(batch: dict[str, Any]) -> float:
        loss = model(**batch, use_cache=False).loss
        if way == "small":
            with sf.step_in_backward(model, optimizer, max_norm_of_each=1.0):
                loss.backward()
            return float(loss.detach())
        loss.backward()
        if way in ("stock", "LoRA"):
            torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        else:
            sf.clip_grad_norm_(model, 1.0, plan, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return train, optimizer


def measure_times(steps: int, lr: float) -> dict[str, Any]:
    """Seconds per step and losses, by way."""
    _, model, tokenizer = load_model("smollm2")
    plan = plan_for(model)
    models = {way: model if way == WAYS[-1] else copy.deepcopy(model) for way in WAYS}
    proof = sf.snapshot(model, plan)
    trainers = {way: trainer(way, models[way], plan, lr)[0] for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    for number, batch in enumerate(batches(tokenizer, steps)):
        for way in in_order(WAYS, number):

            def train(way: str = way, batch: dict[str, Any] = batch) -> None:
                losses[way].append(trainers[way](batch))

            times[way].append(milliseconds(train) / 1e3)
    apart = {
        way: max(abs(a - b) for a, b in zip(losses[way], losses["masked"], strict=True)) for way in ("packed", "live")
    }
    for way in ("small", "packed", "live", "masked"):
        proof.verify(models[way])
        if apart.get(way, 0) > CLOSE:
            raise SystemExit(f"{way}: a loss is {apart[way]:.2g} away from the masked run's, expected {CLOSE} at most")
    warm = {way: seconds[2:] for way, seconds in times.items()}
    return {
        "parameters": sum(p.numel() for p in models["stock"].parameters()),
        "frozen": sum(mask.frozen_count for mask in plan.values()),
        "seconds_per_step": {way: as_entry(seconds) for way, seconds in warm.items()},
        "ratios": {f"{way} / {other}": ratio_entry(warm[way], warm[other]) for way, other in COMPARED},
        "losses": {way: [round(loss, 5) for loss in found] for way, found in losses.items()},
        "largest_loss_difference_to_masked": apart,
    }


def measure_memory(way: str, lr: float) -> None:
    """In a process of its own: prints the most resident bytes it had, once the model was loaded."""
    _, model, tokenizer = load_model("smollm2")
    work, cpu = batches(tokenizer, 3), torch.device("cpu")
    train, _ = trainer(way, model, plan_for(model), lr)
    restart_peak(cpu)  # loading makes a peak of its own
    for batch in work:
        train(batch)
    print(peak(cpu))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=at_least_one, default=22, help="two more than are looked at, at least 3")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--threads", type=at_least_one, default=2)
    parser.add_argument("--output", type=Path, help="folder for the results (default: results/)")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory_of:
        measure_memory(given.memory_of, given.lr)
        return
    peaks = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.finetune", "--memory-of", way, "--threads", str(given.threads)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[way] = int(printed.splitlines()[-1])
    found = measure_times(given.steps, given.lr)
    for label, entry in found["ratios"].items():
        print_entry(f"step time, {label:15}", entry)
    for way, losses in found["losses"].items():
        seconds = found["seconds_per_step"][way]["median"]
        print(
            f"{way:7} {seconds:.2f} s a step, peak {peaks[way] / 1e9:.2f} GB, loss {losses[0]:.3f} to {losses[-1]:.3f}"
        )
    report = {
        "threads": given.threads, "torch": torch.__version__, "model": "SmolLM2-135M, float32",
        "frozen_share_of_units": SHARE, "batch": BATCH, "steps": given.steps, "lr": given.lr, **found,
        "peak_resident_bytes": peaks,
    }  # fmt: skip
    save_result("finetune", describe_machine(given.threads), report, given.output)


if __name__ == "__main__":
    main()
