"""Does a model still refuse while it is fine-tuned? `RefusalWatch` measures it and can say stop."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..plan.files import write_atomically
from .pictures import png
from .scores import refusal_margins


@dataclass(frozen=True)
class RefusalLook:
    """What one look found: of the step it was taken after, over all prompts.

    Attributes:
        step: optimizer steps so far.
        margin: mean log-odds of refusing where the response begins.
        lowest: the lowest of them.
        refused: share of the prompts whose odds of refusing are above one half.
    """

    step: int
    margin: float
    lowest: float
    refused: float


class RefusalWatch:
    """Measures the refusal margin on held-out prompts, `refusal_margins`, at the beginning and every few steps.

    In a loop of your own call `look`; with Trainer pass ``integrations.transformers.RefusalCallback(watch)``. A watch
    tells what happened to these prompts, not that the model is safe: choose prompts that no score and no training row
    saw.

    Args:
        batches: prompts with a refusal each, as `encode_pairs` makes them. Kept, and read at every look.
        every: steps between two looks.
        floor: the mean margin below which training is to stop; None: never.
        refuse_token: the token or tokens a refusal begins with; default: the first response token of each row.

    Raises:
        TypeError: ``batches`` is no list.
        ValueError: no batches; ``every`` below 1; ``floor`` is NaN.
    """

    def __init__(
        self,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        every: int = 50,
        floor: float | None = None,
        refuse_token: int | Sequence[int] | None = None,
    ) -> None:
        what = "RefusalWatch"
        if not isinstance(batches, Sequence):
            raise TypeError(f"{what}: batches is a {type(batches).__name__}, expected a list, since it is read often")
        if not batches:
            raise ValueError(f"{what}: batches is empty, expected at least one")
        if every < 1:
            raise ValueError(f"{what}: every is {every}, expected at least 1 step")
        if floor is not None and math.isnan(floor):
            raise ValueError(f"{what}: floor is NaN, expected a margin (or None)")
        self.batches, self.every, self.floor, self.refuse_token = batches, every, floor, refuse_token
        self.history: list[RefusalLook] = []

    def due(self, step: int) -> bool:
        """Whether a look is to be taken after ``step`` steps."""
        return step % self.every == 0 and not (self.history and self.history[-1].step == step)

    def look(self, model: torch.nn.Module, step: int) -> bool:
        """Measure, if it is `due`. Returns whether training may go on: the margin is not below the floor.

        Raises:
            ValueError: as `refusal_margins`.
        """
        if self.due(step):
            margins = refusal_margins(model, self.batches, self.refuse_token)
            self.history.append(
                RefusalLook(step, float(margins.mean()), float(margins.min()), float((margins > 0).float().mean()))
            )
        last = self.history[-1] if self.history else None
        # a margin that is NaN is not above any floor
        return self.floor is None or last is None or last.margin >= self.floor

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Draw the margin over steps, and the share refused, into a PNG file.

        Raises:
            ValueError: nothing was measured yet.
        """
        if not self.history:
            raise ValueError("RefusalWatch.save_picture: nothing was measured yet; call look first")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        left = figure.subplots()
        steps = [look.step for look in self.history]
        left.plot(steps, [look.margin for look in self.history], "o-", color="C0", label="mean margin")
        left.plot(steps, [look.lowest for look in self.history], ":", color="C0", label="lowest margin")
        if self.floor is not None:
            left.axhline(self.floor, color="C3", linestyle="--", label="floor")
        left.set(xlabel="optimizer steps", ylabel="log-odds of refusing")
        left.grid(alpha=0.3)
        right = left.twinx()
        right.plot(steps, [look.refused for look in self.history], "s-", color="C1", alpha=0.6, label="share refused")
        right.set(ylabel="share of prompts refused", ylim=(-0.03, 1.03))
        lines = [*left.get_lines(), *right.get_lines()]
        left.legend(lines, [str(line.get_label()) for line in lines], loc="best", fontsize=9)
        write_atomically(Path(path), png(figure))

    def __repr__(self) -> str:
        last = self.history[-1] if self.history else "nothing measured yet"
        return f"RefusalWatch({sum(len(b['input_ids']) for b in self.batches)} prompts, {last})"
