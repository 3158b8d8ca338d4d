"""``python -m benchmarks.adapters``: what freezing under LoRA costs, adapters of rank 16 on all linear layers.

SmolLM2-135M in float32, and two layers of Llama-2-7B, with 20 and 80% of each layer's outputs frozen (rows of q, k, v,
gate, up; columns of o, down): a step beside torch's fused AdamW on the same adapters, with nothing frozen; `merge_`
beside PEFT's own merge, in turns. And seconds of `adapt` for a plan of Llama-2-7B's shapes. Results are checked before
they are timed. Writes results/adapters-*.json.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import peft
import torch
from torch import nn

import safefreeze_kernels as sf
from safefreeze_kernels.integrations.transformers import PACKAGED, load_model
from safefreeze_kernels.measure.timing import in_turns, milliseconds

from .measure import as_entry, case_options, print_case, ratio_entry, save_cases

LAYERS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
LLAMA_2_7B: Final = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
SHARES: Final = (0.2, 0.8)
RANK: Final = 16


def plan_of(shapes: Mapping[str, Sequence[int]], share: float) -> sf.FreezePlan:
    """A share of the lines of every linear layer of blocks, drawn at random: rows, and of o and down columns."""
    draw, masks = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        kind = name.split(".")[-2]
        if kind in LAYERS:
            axis = 1 if kind in ("o_proj", "down_proj") else 0
            masks[name] = sf.FreezeMask(shape, **{("rows", "cols")[axis]: draw.random(shape[axis]) < share})
    return sf.FreezePlan(masks)


def adapted(model: nn.Module) -> Any:
    """The model with adapters; of one on the meta device they alone have memory."""
    made = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=list(LAYERS)))
    for module in made.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.requires_grad and weight.is_meta:
            module.weight = nn.Parameter(torch.zeros(weight.shape))
    return made


def shapes_of(model: nn.Module) -> dict[str, Sequence[int]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def llama(vocabulary: int, **shape: int) -> nn.Module:
    """Of Llama-2-7B's shapes, but for some."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **(LLAMA_2_7B | shape)))


def seconds_of_adapt(rounds: int) -> list[float]:
    """`adapt` for the 224 linear layers of Llama-2-7B, 80% of their outputs frozen."""
    with torch.device("meta"):
        bare = llama(32000)
    plan = plan_of(shapes_of(bare), 0.8)
    model = adapted(bare)
    return [milliseconds(lambda: sf.adapt(plan, model)) / 1e3 for _ in range(rounds)]


def two_layers() -> nn.Module:
    """Of Llama-2-7B, with hardly any vocabulary: 405 million weights."""
    return llama(100, num_hidden_layers=2)


def measure(base: nn.Module, share: float, rounds: int) -> dict[str, Any]:
    """Times of a step and of a merge, and their ratios to torch's and PEFT's."""
    plan = plan_of(shapes_of(base), share)
    model = adapted(copy.deepcopy(base))
    carried = sf.adapt(plan, model)
    twin = copy.deepcopy(model)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for word, net in (("sf.MaskedAdamW", model), ("torch fused", twin)):
        named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        draw = torch.Generator().manual_seed(0)
        for _, p in named:
            p.grad = torch.randn(p.shape, generator=draw)
        optimizers[word] = (
            sf.MaskedAdamW(named, lr=1e-4, freeze=carried)
            if net is model
            else torch.optim.AdamW([p for _, p in named], lr=1e-4, fused=True)
        )
    steps = in_turns(
        {word: lambda one=one: milliseconds(one.step) for word, one in optimizers.items()}, rounds, warmup=3
    )
    carried.check(model)
    merges: dict[str, list[float]] = {"sf.merge_": [], "PEFT": []}
    for number in range(-1, max(rounds // 4, 5)):
        for word in merges if number % 2 else reversed(merges):
            net = copy.deepcopy(model)
            spent = milliseconds(net.merge_and_unload if word == "PEFT" else lambda net=net: sf.merge_(net, carried))
            if number >= 0:
                merges[word].append(spent)
    sf.snapshot(base, plan).verify(sf.merge_(model, carried))
    return {
        **{f"step, {word}, ms": as_entry(times) for word, times in steps.items()},
        "step / torch fused": ratio_entry(steps["sf.MaskedAdamW"], steps["torch fused"]),
        **{f"merge, {word}, ms": as_entry(times) for word, times in merges.items()},
        "merge_ / PEFT": ratio_entry(merges["sf.merge_"], merges["PEFT"]),
    }


def main() -> None:
    given = case_options("adapters", __doc__, 40).parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", category=UserWarning)  # PEFT's, of adapters on the meta device
    cases = {"Llama-2-7B": {"adapt, s": as_entry(seconds_of_adapt(5))}}
    print_case(*next(iter(cases.items())))
    for word, make in {"SmolLM2": lambda: load_model(PACKAGED)[1], "2 layers of 7B": two_layers}.items():
        base = make()
        for share in SHARES:
            name = f"{word}, {share:.0%} frozen"
            cases[name] = measure(base, share, given.rounds)
            print_case(name, cases[name])
    save_cases("adapters", cases, given)


if __name__ == "__main__":
    main()
