"""``python -m benchmarks.fit``: what `measure.fit.fit` predicts, beside what training then holds.

SmolLM2-135M in float32 with 80% of its units frozen, in the ways of `benchmarks.finetune`. In each, in a process of its
own, three batches are trained on: predicted for the longest of them; counted, as the bytes of tensors that were there
at once from the second step on; and the process's own peak, less what it held before it had a model. Beside that,
predicted alone: Llama-2-7B in bfloat16, 80% of its units frozen, one sequence of 512 tokens. Writes results/fit-*.json.

``--card``: that model, with weights drawn at random, is trained on a GPU whose allocator gives this process 24 GB, and
what it takes is printed beside what was predicted. ``--device cpu --tiny`` rehearses it, without the limit.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any, Final

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
SMALLEST: Final = Setting(checkpointing=True, in_backward=True, storage="packed", state_dtype=torch.int8)
CARD: Final = 24 * 10**9


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


def llama(device: str, tiny: bool = False) -> tuple[Any, dict[str, Any]]:
    """A model of the shapes of Llama-2-7B in bfloat16, with weights drawn at random; and a batch."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**small, vocab_size=256) if tiny else LlamaConfig()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tokens = torch.randint(config.vocab_size, (1, 512))
    return model, {"input_ids": tokens, "labels": tokens}


def predicted_of_7b() -> dict[str, dict[str, float]]:
    """GB, for ways to train it on a card of 24 GB."""
    model, batch = llama("meta")
    holdings = fit(model, {**batch, "use_cache": False}, plan_for(model), capacity=CARD).holdings
    settings = (
        Setting(storage="packed", state_dtype=torch.bfloat16), Setting(storage="packed", state_dtype=torch.int8),
        SMALLEST,
    )  # fmt: skip
    return {
        f"{setting}, {dtype_word(setting.state_dtype)} state, GB": as_entry([holdings[setting].total / 1e9])
        for setting in settings
    }


def train_on_a_card(device: str, tiny: bool) -> None:
    """Three steps of `llama` in the least memory; an error if it does not fit."""
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(min(CARD / torch.cuda.get_device_properties(0).total_memory, 1.0))
    model, batch = llama("meta", tiny)
    plan = plan_for(model)
    predicted = fit(model, {**batch, "use_cache": False}, plan, capacity=CARD).holdings[SMALLEST].total
    model, batch = llama(device, tiny)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    train, optimizer = trainer("small", model, plan, 1e-5)
    for number in range(3):
        began = time.monotonic()
        loss = train(batch)  # which waits for the loss
        print(f"step {number + 1}: loss {loss:.4f}, {time.monotonic() - began:.2f} s")
    found = [f"predicted {predicted / 1e9:.3f} GB"]
    if on_gpu:
        found.append(f"tensors took {torch.cuda.max_memory_allocated() / 1e9:.3f}")
        found.append(f"the allocator {torch.cuda.max_memory_reserved() / 1e9:.3f} of {CARD / 1e9:.0f}")
    state = sum(t.nbytes for t in state_tensors(optimizer))
    print(f"{', '.join(found)}; state {state / 1e9:.3f} GB, {torch.cuda.get_device_name() if on_gpu else device}")


def main() -> None:
    parser = case_options("fit", __doc__, 1)
    parser.add_argument("--way", choices=SETTINGS, help="this one alone, in this process; prints bytes")
    parser.add_argument("--card", action="store_true", help="train a model of 7B within 24 GB; prints what it takes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of --card")
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead, for --card: tries the harness only")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.card:
        train_on_a_card(given.device, given.tiny)
        return
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
