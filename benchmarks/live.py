"""``python -m benchmarks.live``: what `live_gradients` saves on Llama-shaped blocks with 80% of their units frozen.

For each width two decoder layers, 512 tokens: forward, backward and optimizer of

    live    `live_gradients` + `MaskedAdamW`
    packed  `live_gradients(storage="packed")` + `MaskedAdamW`
    masked  plain autograd + `MaskedAdamW`
    stock   plain autograd + torch's fused AdamW, nothing frozen
    LoRA    peft, r = 32 on all linear layers, torch's fused AdamW

in turns, in an order that changes. Beforehand live gradients are compared with those of plain autograd:
within float32 rounding where live, zero where frozen. Ratios are medians over rounds. And the crossover: one linear
layer with more and more of its rows or columns live, against plain autograd. Writes results/live-*.json.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import find_units, units_from
from safefreeze_kernels.measure.timing import WHOLE, Clock, in_turns, median_ratio, milliseconds

from .measure import as_entry, at_least_one, describe_machine, print_entry, ratio_entry, save_result

#: width -> channels of the MLP, heads, KV heads
SHAPES: Final = {576: (1536, 9, 3), 1024: (2816, 16, 16), 2048: (5632, 32, 32), 4096: (11008, 32, 32)}
LAYERS: Final = 2
TOKENS: Final = (2, 256)
#: contender, beside which, phase
COMPARED: Final = {
    "backward, live / plain": ("live", "masked", "backward"),
    "backward, packed / plain": ("packed", "masked", "backward"),
    "whole step, live / stock": ("live", "stock", WHOLE),
    "whole step, packed / stock": ("packed", "stock", WHOLE),
    "whole step, masked / stock": ("masked", "stock", WHOLE),
    "whole step, live / LoRA": ("live", "LoRA", WHOLE),
    "whole step, packed / LoRA": ("packed", "LoRA", WHOLE),
}


def build(width: int, share: float, device: str) -> tuple[torch.nn.Module, sf.FreezePlan]:
    """Decoder layers, and a plan that freezes ``share`` of their heads and channels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    d_ff, n_heads, n_kv = SHAPES[width]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width, intermediate_size=d_ff, num_hidden_layers=LAYERS, num_attention_heads=n_heads,
            num_key_value_heads=n_kv, vocab_size=512, tie_word_embeddings=False,
        )
    ).to(device)  # fmt: skip
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
            frozen = plan[name].dense().to(plain.device)
            plain = plain.masked_fill(frozen, 0.0)
            if found[frozen].any():
                raise SystemExit(f"{name}: a frozen gradient is not zero; nothing is timed")
        torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


def measure(width: int, share: float, rounds: int, device: str) -> dict[str, Any]:
    """Milliseconds per phase and contender, and ratios."""
    model, plan = build(width, share, device)
    tokens = torch.randint(0, 512, TOKENS, generator=torch.Generator().manual_seed(2)).to(device)
    check(model, plan, tokens)
    masked = sf.MaskedAdamW(model.named_parameters(), lr=1e-6, freeze=plan)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "live": masked,
        "masked": masked,
        "packed": sf.MaskedAdamW(model.named_parameters(), lr=1e-6, freeze=plan),
        "stock": torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
    }
    adapted = _with_lora(width, share, device)
    if adapted is not None:
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizers["LoRA"] = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step(name: str) -> dict[str, float]:
        network = adapted if name == "LoRA" and adapted is not None else model
        storage: Any = "packed" if name == "packed" else "dense"
        handle = sf.live_gradients(model, plan, storage=storage) if name in ("live", "packed") else None
        clock = Clock(torch.device(device))
        with clock.phase("forward"):
            loss = network(input_ids=tokens, labels=tokens).loss
        with clock.phase("backward"):
            loss.backward()
        with clock.phase("step"):
            optimizers[name].step()
        times = clock.read()
        network.zero_grad()
        if handle is not None:
            handle.remove()
        return times

    found = in_turns({name: partial(step, name) for name in optimizers}, rounds, warmup=2)

    def times(name: str, phase: str) -> list[float]:
        return [each[phase] for each in found[name]]

    return {
        name: {phase: as_entry(times(name, phase)) for phase in ("forward", "backward", "step")} for name in found
    } | {
        label: ratio_entry(times(one, phase), times(other, phase))
        for label, (one, other, phase) in COMPARED.items()
        if other in found
    }


def crossover(width: int, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Forward and backward of a linear layer with live gradients, as a share of plain autograd's time: "rows" and
    "columns", by how much of them is live."""
    plain = torch.nn.Linear(width, width, bias=False, device=device)
    x = torch.randn(TOKENS[0] * TOKENS[1], width, requires_grad=True, device=device)
    grad = torch.randn(TOKENS[0] * TOKENS[1], width, device=device)

    def timed(layer: torch.nn.Module) -> float:
        layer.zero_grad()
        x.grad = None
        return milliseconds(lambda: layer(x).backward(grad), device, wall=True)

    found: dict[str, dict[str, float]] = {"rows": {}, "columns": {}}
    for axis, shares in found.items():
        for live in (0.2, 0.4, 0.6, 0.7, 0.75, 0.8, 0.9):
            frozen = torch.randperm(width)[: round((1 - live) * width)]
            mask = sf.FreezeMask((width, width), **{"rows" if axis == "rows" else "cols": frozen})
            layer = torch.nn.Linear(width, width, bias=False, device=device)
            sf.live_gradients(layer, sf.FreezePlan({"weight": mask}), most_live=1.0)
            times = in_turns({"live": partial(timed, layer), "plain": partial(timed, plain)}, rounds, warmup=2)
            shares[f"{live:.0%}"] = round(median_ratio(times["live"], times["plain"]).median, 3)
    return found


def _with_lora(width: int, share: float, device: str) -> torch.nn.Module | None:
    """None where peft is not installed."""
    try:
        import peft
    except ImportError:
        return None
    model, _ = build(width, share, device)
    adapted: torch.nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=32, target_modules="all-linear"))
    return adapted


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 1024, 2048])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.075])
    parser.add_argument("--rounds", type=at_least_one, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="folder for the results (default: results/)")
    given = parser.parse_args()
    machine = describe_machine(torch.get_num_threads(), given.device)
    found = {}
    crossovers = {f"width {width}": crossover(width, 3 * given.rounds, given.device) for width in given.widths}
    for label, axes in crossovers.items():
        for axis, shares in axes.items():
            print(f"{label}, {axis} live:", *(f"{live} {ratio:.2f}" for live, ratio in shares.items()))
    for width in given.widths:
        for share in given.shares:
            case = found[f"width {width}, {share:.1%} of units frozen"] = measure(
                width, share, given.rounds, given.device
            )
            print(f"width {width}, {share:.1%} of units frozen")
            for label, at in case.items():
                if "/" in label:
                    print_entry(f"  {label:28}", at)
    report = {
        "device": machine.slug, "threads": machine.threads, "torch": torch.__version__,
        "layers": LAYERS, "tokens": TOKENS, "rounds": given.rounds, "cases": found, "crossover": crossovers,
    }  # fmt: skip
    save_result("live", machine, report, given.output)


if __name__ == "__main__":
    main()
