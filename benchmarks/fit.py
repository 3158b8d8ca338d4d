"""``python -m benchmarks.fit``: what `measure.fit.fit` predicts, beside what training then holds.

SmolLM2-135M in float32 with 80% of its units frozen, in the ways of `benchmarks.finetune`. In each, in a process of its
own, three batches are trained on: predicted for the longest of them; counted, as the bytes of tensors that were there
at once from the second step on; and the process's own peak, less what it held before it had a model. Beside that,
predicted alone: Llama-2-7B in bfloat16, 80% of its units frozen, one sequence of 512 tokens. Writes results/fit-*.json.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import torch

from safefreeze_kernels.integrations.transformers import load_model
from safefreeze_kernels.kernels.operands import dtype_word
from safefreeze_kernels.measure.fit import Held, Setting, fit
from safefreeze_kernels.measure.memory import peak, restart_peak, state_tensors

from .finetune import batches, plan_for, trainer
from .measure import as_entry, case_options, print_case, save_cases

SETTINGS: Final = {
    "masked": Setting(), "packed": Setting(storage="packed"),
    "small": Setting(in_backward=True, state_dtype=torch.int8, storage="packed"),
}  # fmt: skip


def measure(way: str) -> tuple[int, int, int]:
    """Bytes: predicted, counted, of the process."""
    cpu = torch.device("cpu")
    _, model, tokenizer = load_model("smollm2")
    work, plan = batches(tokenizer, 3), plan_for(model)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    longest = {**max(work, key=lambda batch: batch["input_ids"].shape[1]), "use_cache": False}
    predicted = fit(model, longest, plan, capacity=1, dtype=torch.float32).holdings[SETTINGS[way]].total
    train, optimizer = trainer(way, model, plan, 1e-4)
    beside = (restart_peak(cpu) or 0) - weights
    for batch in work:
        train(batch)
    resident = peak(cpu) - beside
    state = sum(t.nbytes for t in state_tensors(optimizer))
    counted = 0
    for batch in work:
        with Held([*model.parameters(), *model.buffers()]) as held:
            train(batch)
        counted = max(counted, weights + state + held.most)
    return predicted, counted, resident


def predicted_of_7b() -> dict[str, dict[str, float]]:
    """GB, for ways to train it on a card of 24 GB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # whose defaults are the shapes of Llama-2-7B
    tokens = torch.zeros(1, 512, dtype=torch.int64)
    batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    holdings = fit(model, batch, plan_for(model), capacity=24 * 10**9).holdings
    settings = (
        Setting(storage="packed", state_dtype=torch.bfloat16), Setting(storage="packed", state_dtype=torch.int8),
        Setting(checkpointing=True, in_backward=True, storage="packed", state_dtype=torch.int8),
    )  # fmt: skip
    return {
        f"{setting}, {dtype_word(setting.state_dtype)} state, GB": as_entry([holdings[setting].total / 1e9])
        for setting in settings
    }


def main() -> None:
    parser = case_options("fit", __doc__, 1)
    parser.add_argument("--way", choices=SETTINGS, help="this one alone, in this process; prints bytes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.way:
        print(*measure(given.way))
        return
    cases = {}
    for way in SETTINGS:
        command = [sys.executable, "-m", "benchmarks.fit", "--way", way, "--threads", str(given.threads)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        sizes = zip(("predicted", "counted", "of the process"), map(int, printed.splitlines()[-1].split()), strict=True)
        cases[way] = {f"{what}, MB": as_entry([size / 1e6]) for what, size in sizes}
        print_case(way, cases[way])
    cases["Llama-2-7B"] = predicted_of_7b()
    print_case("Llama-2-7B", cases["Llama-2-7B"])
    save_cases("fit", cases, given)


if __name__ == "__main__":
    main()
