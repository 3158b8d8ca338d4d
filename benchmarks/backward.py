"""``python -m benchmarks.backward``: what a step inside the backward pass costs, and what gradients it holds.

SmolLM2-135M in float32, whole training steps (forward, backward, step) in turns: steps after the pass, and steps inside
it, of two copies that must stay the same bit for bit; nothing frozen, and 80% of the rows of every linear layer
with packed gradients. Gradients are counted when each one is complete. Writes results/backward-*.json.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import encode_pairs
from safefreeze_kernels.calibration import load_pairs
from safefreeze_kernels.integrations.transformers import PACKAGED, load_model
from safefreeze_kernels.measure.timing import in_turns, milliseconds
from safefreeze_kernels.model.packed import stored

from .measure import as_entry, case_options, print_case, ratio_entry, save_cases

ROWS: Final = 8


def plan_of(model: nn.Module, share: float) -> sf.FreezePlan | None:
    """A share of the rows of every linear layer, drawn at random."""
    draw, masks = np.random.default_rng(0), {}
    for name, module in model.named_modules():
        if share and isinstance(module, nn.Linear) and name != "lm_head":
            shape = tuple(module.weight.shape)
            masks[f"{name}.weight"] = sf.FreezeMask(shape, rows=draw.random(shape[0]) < share)
    return sf.FreezePlan(masks) if masks else None


def most_gradients(model: nn.Module, train: Callable[[], None]) -> int:
    """Bytes of gradients, at most, whenever one was just complete."""
    most = 0
    params = list(model.parameters())

    def look(_: Tensor) -> None:
        nonlocal most
        there = stored([p.grad for p in params if p.grad is not None])
        most = max(most, sum(grad.nbytes for grad in there))

    with ExitStack() as hooks:
        for p in params:
            hooks.callback(p.register_post_accumulate_grad_hook(look).remove)  # type: ignore[no-untyped-call]
        train()
    return most


def measure(model: nn.Module, batch: dict[str, Tensor], share: float, rounds: int) -> dict[str, Any]:
    """Times of whole training steps, their ratio, and bytes of gradients."""
    plan, calls = plan_of(model, share), {}
    twins = {word: copy.deepcopy(model) for word in ("step after", "step inside")}
    with ExitStack() as live:
        for word, net in twins.items():
            if plan is not None:
                live.enter_context(sf.live_gradients(net, plan, storage="packed"))
            optimizer = sf.MaskedAdamW(net.named_parameters(), lr=1e-5, freeze=plan)

            def after(net: Any = net, optimizer: sf.MaskedAdamW = optimizer) -> None:
                net(**batch, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            def inside(net: Any = net, optimizer: sf.MaskedAdamW = optimizer) -> None:
                loss = net(**batch, use_cache=False).loss
                with sf.step_in_backward(net, optimizer):
                    loss.backward()

            calls[word] = after if word == "step after" else inside
        times = in_turns({word: lambda call=call: milliseconds(call) for word, call in calls.items()}, rounds, warmup=1)
        most = {word: most_gradients(twins[word], call) for word, call in calls.items()}
    for (name, p), q in zip(twins["step after"].named_parameters(), twins["step inside"].parameters(), strict=True):
        if not torch.equal(p.view(torch.int32), q.view(torch.int32)):
            raise SystemExit(f"{name} differs")
    return {
        **{f"{word}, ms": as_entry(spent) for word, spent in times.items()},
        "inside / after": ratio_entry(times["step inside"], times["step after"]),
        **{f"gradients, {word}, MB": as_entry([size / 1e6]) for word, size in most.items()},
    }


def main() -> None:
    given = case_options("backward", __doc__, 7).parse_args()
    torch.set_num_threads(given.threads)
    _, model, tokenizer = load_model(PACKAGED)
    (batch,) = encode_pairs(tokenizer, load_pairs("instructions")[:ROWS], max_length=256, batch_size=ROWS)
    cases = {}
    for share in (0.0, 0.8):
        name = f"{share:.0%} of rows frozen"
        cases[name] = measure(model, batch, share, given.rounds)
        print_case(name, cases[name])
    save_cases("backward", cases, given)


if __name__ == "__main__":
    main()
