"""The demonstration's last run, if it is asked for: the same plan under LoRA, merged, and proven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..optim.adam import MaskedAdamW
from ..plan.plan import FreezePlan
from ..proof.snapshot import snapshot

FASTER = 10  # adapters begin at nothing: their learning rate is this times that of whole weights


@dataclass(frozen=True)
class LoraRun:
    """What became of a model under LoRA: how many weights have adapters, how many values of all weights differ after
    merging, of what the plan freezes and of the rest, and the loss of each step."""

    rank: int
    weights: int
    frozen_values_changed: int
    live_values_changed: int
    loss: list[float]

    def __str__(self) -> str:
        return (
            f"LoRA of rank {self.rank} on {self.weights} weights, the same plan carried to them (sf.adapt):\n"
            f"  loss {self.loss[0]:.2f} to {self.loss[-1]:.2f} in {len(self.loss)} steps; merged (sf.merge_), "
            f"{self.frozen_values_changed:,} frozen\n  and {self.live_values_changed:,} live values have changed"
        )


def lora_run(
    network: torch.nn.Module,
    plan: FreezePlan,
    rank: int,
    lr: float,
    weight_decay: float,
    train: Callable[[torch.nn.Module, MaskedAdamW], tuple[list[float], list[float]]],
    count_changed: Callable[[torch.nn.Module, dict[str, torch.Tensor], FreezePlan], tuple[int, int]],
) -> LoraRun:
    """Train adapters of all linear layers but the head, and merge them into ``network``.

    Raises:
        ImportError: peft is not installed.
        ValueError: the plan cannot hold under LoRA: it freezes single elements.
        FrozenDriftError: a frozen byte changed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("--lora needs peft: pip install peft") from error
    from ..integrations.peft import adapt, merge_

    start = {name: param.detach().clone() for name, param in network.named_parameters()}
    proof = snapshot(network, plan)
    model = peft.get_peft_model(network, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    adapted = adapt(plan, model)
    weights = sum("lora_A" in name for name, _ in model.named_parameters())
    optimizer = MaskedAdamW(model.named_parameters(), lr=FASTER * lr, weight_decay=weight_decay, freeze=adapted)
    loss, _ = train(model, optimizer)
    merged = merge_(model, adapted).requires_grad_()
    proof.verify(merged)
    return LoraRun(rank, weights, *count_changed(merged, start, plan), loss)
