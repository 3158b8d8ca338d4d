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

``--mixture``: a mixture of experts instead, two layers of eight experts, two for each token, without LoRA, computed by
transformers' ways; 80% of the channels of all experts are frozen, or six of eight experts whole. Writes
results/experts-*.json.
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
#: width -> channels of an expert
EXPERT_CHANNELS: Final = {512: 1024, 1024: 1024}
EXPERTS: Final = 8
FROZEN_EXPERTS: Final = 6
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


def build_mixture(width: int, way: str, whole: bool, device: str) -> tuple[torch.nn.Module, sf.FreezePlan]:
    """Decoder layers with experts that are computed in ``way``, and a plan that freezes channels of all of them, or
    ``whole`` experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    d_ff = EXPERT_CHANNELS[width]
    model: Any = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=width, intermediate_size=d_ff, num_hidden_layers=LAYERS, num_attention_heads=8,
            num_key_value_heads=8, vocab_size=512, num_local_experts=EXPERTS, num_experts_per_tok=2,
            tie_word_embeddings=False,
        )
    ).to(device)  # fmt: skip
    model.set_experts_implementation(way)
    pick = torch.Generator().manual_seed(1)
    some = range(FROZEN_EXPERTS * d_ff), torch.randperm(EXPERTS * d_ff, generator=pick)[: round(0.8 * EXPERTS * d_ff)]
    channels = {layer: list(map(int, some[0 if whole else 1])) for layer in range(LAYERS)}
    return model, units_from(find_units(model), heads={}, channels=channels).build(model)


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


def measure(
    model: torch.nn.Module, plan: sf.FreezePlan, adapted: torch.nn.Module | None, rounds: int, device: str
) -> dict[str, Any]:
    """Milliseconds per phase and contender, and ratios. ``adapted``: the model with LoRA, or None."""
    tokens = torch.randint(0, 512, TOKENS, generator=torch.Generator().manual_seed(2)).to(device)
    check(model, plan, tokens)
    masked = sf.MaskedAdamW(model.named_parameters(), lr=1e-6, freeze=plan)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "live": masked,
        "masked": masked,
        "packed": sf.MaskedAdamW(model.named_parameters(), lr=1e-6, freeze=plan),
        "stock": torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
    }
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


def _shown(label: str, case: dict[str, Any]) -> dict[str, Any]:
    print(label)
    for name, at in case.items():
        if "/" in name:
            print_entry(f"  {name:28}", at)
    return case


def _mixtures(widths: list[int], rounds: int, device: str) -> dict[str, Any]:
    found = {}
    for width in widths:
        for way in ("grouped_mm", "eager"):
            for whole in (False, True):
                what = f"{FROZEN_EXPERTS} of {EXPERTS} experts" if whole else "80% of channels"
                model, plan = build_mixture(width, way, whole, device)
                label = f"width {width}, {way}, {what} frozen"
                found[label] = _shown(label, measure(model, plan, None, rounds, device))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 1024, 2048])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.075])
    parser.add_argument("--rounds", type=at_least_one, default=15)
    parser.add_argument("--mixture", action="store_true", help="a mixture of experts instead")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="folder for the results (default: results/)")
    given = parser.parse_args()
    machine = describe_machine(torch.get_num_threads(), given.device)
    if given.mixture:
        found = _mixtures(given.widths, given.rounds, given.device)
        report = {
            "device": machine.slug, "threads": machine.threads, "torch": torch.__version__, "layers": LAYERS,
            "experts": EXPERTS, "tokens": TOKENS, "rounds": given.rounds, "cases": found,
        }  # fmt: skip
        save_result("experts", machine, report, given.output)
        return
    found = {}
    crossovers = {f"width {width}": crossover(width, 3 * given.rounds, given.device) for width in given.widths}
    for label, axes in crossovers.items():
        for axis, shares in axes.items():
            print(f"{label}, {axis} live:", *(f"{live} {ratio:.2f}" for live, ratio in shares.items()))
    for width in given.widths:
        for share in given.shares:
            label = f"width {width}, {share:.1%} of units frozen"
            model, plan = build(width, share, given.device)
            adapted = _with_lora(width, share, given.device)
            found[label] = _shown(label, measure(model, plan, adapted, given.rounds, given.device))
    report = {
        "device": machine.slug, "threads": machine.threads, "torch": torch.__version__,
        "layers": LAYERS, "tokens": TOKENS, "rounds": given.rounds, "cases": found, "crossover": crossovers,
    }  # fmt: skip
    save_result("live", machine, report, given.output)


if __name__ == "__main__":
    main()
