"""The demonstration's runs: what is frozen in each, and what they make of the log-odds of refusing."""

from __future__ import annotations

import warnings
from typing import Any, Final

import numpy as np
import torch

from ..attribution import encode_pairs, refusal_margins
from ..calibration import load_pairs
from ..keeping.keeper import RefusalKeeper
from ..optim.adam import MaskedAdam
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan

#: What is frozen: the plan throughout and a fifth of all weights for four steps at a time; as much at random; nothing.
FROZEN, AT_RANDOM, UNFROZEN = "plan + keeper", "random", "nothing"
_HELD_OUT_EVERY: Final = 3
_PROMPTS: Final = 16  # of a look, and of a batch


class Refusals:
    """The shipped prompts with refusals: two thirds for the keeper, the rest to report."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        pairs = load_pairs("safety")
        held_out = pairs[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
        self._seen, self._held_out = (
            encode_pairs(tokenizer, some, max_length=max_length, batch_size=_PROMPTS)
            for some in ([pair for pair in pairs if pair not in held_out], held_out)
        )

    def margin(self, network: torch.nn.Module) -> float:
        """Mean log-odds of refusing, of prompts that no keeper sees."""
        return float(refusal_margins(network, self._held_out).mean())

    def keeper(self, network: torch.nn.Module, optimizer: MaskedAdam, run: str, seed: int) -> RefusalKeeper | None:
        """What freezes beside the plan of a run, which ends with its optimizer; None: nothing."""
        if run == UNFROZEN:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a small model may refuse little to begin with: it is shown
            return RefusalKeeper(
                network, optimizer, self._seen, every=4, share=0.2, grain="element", prompts=_PROMPTS, prove=True,
                random=run == AT_RANDOM, seed=seed,
            )  # fmt: skip


def plan_of_run(plan: FreezePlan, run: str, seed: int) -> FreezePlan:
    """What a run freezes throughout; at random: as many rows, columns and elements of each tensor as ``plan``."""
    if run == UNFROZEN:
        return FreezePlan()
    if run == FROZEN:
        return plan
    draw, masks = np.random.default_rng(seed), {}
    for name, mask in plan.items():
        n_rows, n_cols = mask.matrix_shape
        rows, cols = draw.permutation(n_rows)[: len(mask.rows)], draw.permutation(n_cols)[: len(mask.cols)]
        elements = None
        if mask.elements is not None:
            elements = draw.permutation(mask.elements.numpy().reshape(-1)).reshape(mask.shape)
        masks[name] = FreezeMask(mask.shape, rows, cols if len(mask.shape) > 1 else None, elements)
    return FreezePlan(masks)
