"""``python -m benchmarks.live``: what `live_gradients` saves on Llama-shaped blocks with 80% of their units frozen.

For each width two decoder layers, 512 tokens: forward, backward and optimizer of

    live    `live_gradients` + `MaskedAdamW`
    masked  plain autograd + `MaskedAdamW`
    stock   plain autograd + torch's fused AdamW, nothing frozen
    LoRA    peft, r = 32 on all linear layers, torch's fused AdamW

in turns, in an order that changes. Beforehand live gradients are compared with those of plain autograd:
within float32 rounding where live, zero where frozen. Ratios are medians over rounds. Writes results/live-*.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import safefreeze_kernels as sf

from .measure import describe_machine

#: width -> channels of the MLP, heads, KV heads
SHAPES: Final = {576: (1536, 9, 3), 1024: (2816, 16, 16), 2048: (5632, 32, 32), 4096: (11008, 32, 32)}
LAYERS: Final = 2
TOKENS: Final = (2, 256)
RESULTS: Final = Path(__file__).parent / "results"


def build(width: int, share: float) -> tuple[torch.nn.Module, sf.FreezePlan]:
    """Decoder layers, and a plan that freezes ``share`` of their heads and channels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from safefreeze_kernels.attribution import find_units, units_from

    d_ff, n_heads, n_kv = SHAPES[width]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width, intermediate_size=d_ff, num_hidden_layers=LAYERS, num_attention_heads=n_heads,
            num_key_value_heads=n_kv, vocab_size=512, tie_word_embeddings=False,
        )
    )  # fmt: skip
    pick = torch.Generator().manual_seed(1)
    heads, channels = (
        {layer: torch.randperm(n, generator=pick)[: round(share * n)].tolist() for layer in range(LAYERS)}
        for n in (n_heads, d_ff)
    )
    return model, units_from(find_units(model), heads=heads, channels=channels).build(model)


def check(model: torch.nn.Module, plan: sf.FreezePlan, tokens: torch.Tensor) -> None:
    """Raise unless live gradients are plain autograd's where live and zero elsewhere."""
    grads = []
    for live in (False, True):
        handle = sf.live_gradients(model, plan) if live else None
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
        if handle is not None:
            handle.remove()
    for name, plain in grads[0].items():
        found = grads[1][name]
        if name in plan and not torch.equal(plain, found):
            plain = plain.masked_fill(plan[name].dense(), 0.0)
            if found[plan[name].dense()].any():
                raise SystemExit(f"{name}: a frozen gradient is not zero; nothing is timed")
        torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


def measure(width: int, share: float, rounds: int) -> dict[str, Any]:
    """Milliseconds per phase and contender, and ratios."""
    model, plan = build(width, share)
    tokens = torch.randint(0, 512, TOKENS, generator=torch.Generator().manual_seed(2))
    check(model, plan, tokens)
    masked = sf.MaskedAdamW(model.named_parameters(), lr=1e-6, freeze=plan)
    adapted = _with_lora(width, share)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizers = {
        "live": masked,
        "masked": masked,
        "stock": torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
        "LoRA": torch.optim.AdamW(trained, lr=1e-6, fused=True),
    }
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in optimizers}
    for number in range(rounds + 2):
        order = list(optimizers)
        for name in order[number % 4 :] + order[: number % 4]:
            network = adapted if name == "LoRA" else model
            handle = sf.live_gradients(model, plan) if name == "live" else None
            marks = [time.perf_counter()]
            loss = network(input_ids=tokens, labels=tokens).loss
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
            optimizers[name].step()
            marks.append(time.perf_counter())
            network.zero_grad()
            if handle is not None:
                handle.remove()
            if number >= 2:
                times[name].append(tuple(1e3 * (b - a) for a, b in pairwise(marks)))
    found: dict[str, Any] = {
        name: dict(
            zip(
                ("forward", "backward", "step"),
                (_spread(list(phase)) for phase in zip(*rows, strict=True)),
                strict=True,
            )
        )
        for name, rows in times.items()
    }
    for label, one, other, phases in (
        ("backward, live / plain", "live", "masked", slice(1, 2)),
        ("whole step, live / stock", "live", "stock", slice(0, 3)),
        ("whole step, masked / stock", "masked", "stock", slice(0, 3)),
        ("whole step, live / LoRA", "live", "LoRA", slice(0, 3)),
    ):
        pairs = zip(times[one], times[other], strict=True)
        found[label] = _spread([sum(a[phases]) / sum(b[phases]) for a, b in pairs])
    return found


def _with_lora(width: int, share: float) -> torch.nn.Module:
    import peft

    model, _ = build(width, share)
    adapted: torch.nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=32, target_modules="all-linear"))
    return adapted


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, 4), "quartile_1": round(low, 4), "quartile_3": round(high, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 1024, 2048])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.075])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    machine = describe_machine(torch.get_num_threads())
    found = {}
    for width in given.widths:
        for share in given.shares:
            case = found[f"width {width}, {share:.1%} of units frozen"] = measure(width, share, given.rounds)
            print(f"width {width}, {share:.1%} of units frozen")
            for label, at in case.items():
                if "/" in label:
                    print(f"  {label:28} {at['median']:.3f}  ({at['quartile_1']:.3f} to {at['quartile_3']:.3f})")
    report = {
        "cpu": machine.cpu, "cores": machine.cores, "threads": machine.threads, "torch": torch.__version__,
        "layers": LAYERS, "tokens": TOKENS, "rounds": given.rounds, "cases": found,
    }  # fmt: skip
    (RESULTS / f"live-{machine.slug}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
