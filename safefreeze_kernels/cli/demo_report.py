"""What the demonstration found: one report, as a picture and as text."""

from __future__ import annotations

import io
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from ..attribution import UnitLayout
from ..attribution.pictures import COLOURS, draw_layers
from ..measure.timing import was_busy
from ..plan.plan import FreezePlan
from .demo_lora import LoraRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BUSY: Final = 0.5  # quartiles this far apart, of the median: what is told are minima, which less than that spares


@dataclass(frozen=True)
class Timing:
    """What one way of stepping costs: milliseconds of each timed step, and bytes it keeps between steps."""

    name: str
    frozen_fraction: float
    step_ms: list[float]
    state_bytes: int
    #: kept for freezing alone: indices of, and copies of, frozen values
    extra_bytes: int

    @property
    def min_ms(self) -> float:
        """Fastest step."""
        return min(self.step_ms)

    @property
    def median_ms(self) -> float:
        """Median step."""
        return statistics.median(self.step_ms)


@dataclass
class DemoReport:
    """What a run found. Losses are in nats per response token, `seconds` is wall time per stage, and `refusal_margin`
    the mean log-odds of refusing held-out prompts, before training and after each run."""

    model: str
    parameters: int
    plan: str
    fingerprint: str
    frozen_fraction_of_blocks: float
    frozen_fraction: float
    frozen_values: int
    frozen_values_changed: int
    live_values: int
    live_values_changed: int
    training_loss: list[float]
    live_norms: list[float]
    loss_before: dict[str, float]
    loss_after: dict[str, float]
    sample: dict[str, str]
    refusal_margin: dict[str, float]
    timings: list[Timing]
    settings: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    lora: LoraRun | None = None

    @property
    def was_busy(self) -> bool:
        """Whether the machine had other work while steps were timed: they vary too much to be compared."""
        return any(was_busy(timing.step_ms, _BUSY) for timing in self.timings)


@dataclass(frozen=True)
class Plans:
    """The plan to train with, what to call it, and what the picture needs to know about it."""

    plan: FreezePlan
    title: str
    layout: UnitLayout
    #: label -> share of each layer's heads and channels frozen under that label, 0 to 1, ``[n_layers]``
    heads: dict[str, np.ndarray]
    channels: dict[str, np.ndarray]
    #: a plan that freezes much more, timed for comparison
    larger: FreezePlan | None = None


def draw(plans: Plans, report: DemoReport) -> bytes:
    """PNG: what is frozen in each layer, how the loss fell, what a step costs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 7), dpi=120)
    figure.set_layout_engine("constrained", hspace=0.08, wspace=0.06)
    channels, loss, heads, cost = figure.subplots(2, 2, width_ratios=(1.2, 1)).flat
    figure.suptitle(
        f"{report.model}: {report.plan} frozen, {report.frozen_fraction_of_blocks:.1%} of the block parameters\n",
        fontsize=14,
    )
    layout = plans.layout
    shares = {label: 100 * share for label, share in plans.channels.items()}
    draw_layers(channels, shares, f"MLP channels ({layout.d_ff:,} per layer)", "frozen, % of the layer's", 1.0)
    counts = {label: layout.n_heads * share for label, share in plans.heads.items()}
    draw_layers(heads, counts, f"attention heads ({layout.n_heads} per layer)", "frozen, number", 2.0)
    _draw_loss(loss, report)
    _draw_cost(cost, report)
    for axis in (channels.xaxis, heads.xaxis, heads.yaxis, loss.xaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    for axes in (channels, loss, heads, cost):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_loss(axes: Axes, report: DemoReport) -> None:
    steps = len(report.training_loss)
    axes.plot(range(1, steps + 1), report.training_loss, "o-", ms=4, color=COLOURS["CU"], label="training batch")
    before, after = report.loss_before["held-out"], report.loss_after["held-out"]
    axes.plot([0, steps], [before, after], "D", ms=8, color=COLOURS["SCU"], label="held-out, before and after")
    for x, value in ((0, before), (steps, after)):
        axes.annotate(f"{value:.2f}", (x, value), (0, 9), textcoords="offset points", ha="center", color="#A04000")
    axes.set(title="loss while fine-tuning", xlabel="step", ylabel="nats per response token")
    axes.set_xlim(-0.06 * steps, 1.06 * steps)
    axes.set_ylim(0, 1.3 * max(*report.training_loss, before, after))
    axes.legend(frameon=False, loc="upper right", ncols=2)


def _draw_cost(axes: Axes, report: DemoReport) -> None:
    for place, timing in enumerate(report.timings):
        colour = COLOURS["frozen"] if timing.name.startswith("sf.") else "#8C8C8C"
        axes.barh(place, timing.min_ms, height=0.42, color=colour)
        frozen = f", {timing.frozen_fraction:.1%} of all values frozen" if timing.frozen_fraction else ""
        axes.annotate(timing.name + frozen, (0, place - 0.27), (2, 0), textcoords="offset points", va="bottom")
        note = f"{timing.min_ms:,.1f} ms, state {_megabytes(timing.state_bytes)}"
        axes.annotate(note, (timing.min_ms, place), (5, 0), textcoords="offset points", va="center")
    busy = " (busy machine)" if report.was_busy else ""
    axes.set(title=f"one optimizer step, fastest of {report.settings['repeats']}{busy}", xlabel="ms", yticks=[])
    axes.set_xlim(0, 1.8 * max(timing.min_ms for timing in report.timings))  # the rest is for the notes
    axes.set_ylim(len(report.timings) - 0.6, -0.75)
    axes.spines["left"].set_visible(False)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def show(console: Console, report: DemoReport, folder: Path) -> None:
    table = Table(
        title=f"{report.model}, {report.parameters / 1e6:,.1f} M parameters; "
        f"backend {report.settings['backend']}, {report.settings['threads']} threads\n"
        f"plan: {report.plan}, {report.frozen_fraction_of_blocks:.1%} of the block parameters",
        caption=(
            "\n".join(
                f"loss, {word} examples: {report.loss_before[word]:.2f} before fine-tuning, {after:.2f} after"
                for word, after in report.loss_after.items()
            )
            + f"\nvalues changed: {report.frozen_values_changed:,} of {report.frozen_values:,} frozen, "
            f"{report.live_values_changed:,} of {report.live_values:,} live"
        ),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("optimizer", no_wrap=True)
    for heading in ("frozen\nof all", "step, ms\nmin / median", "optimizer\nstate", "saved\ncopies"):
        table.add_column(heading, justify="right", no_wrap=True)
    for timing in report.timings:
        table.add_row(
            timing.name,
            f"{timing.frozen_fraction:.1%}" if timing.frozen_fraction else "-",
            f"{timing.min_ms:,.1f} / {timing.median_ms:,.1f}",
            _megabytes(timing.state_bytes),
            _megabytes(timing.extra_bytes) if timing.extra_bytes else "-",
        )
    console.print()
    console.print(table)
    if report.was_busy:
        console.print(
            "The machine was busy (medians far above minima): times say little, run again when it is quiet.",
            style="yellow",
            highlight=False,
        )
    console.print()
    console.print(_margins(report))
    if report.lora is not None:
        console.print(f"\n{report.lora}", highlight=False)
    console.print(f"\n{report.sample['prompt']}", style="bold", highlight=False, markup=False)
    for when in ("before", "after"):
        answer = " ".join(report.sample[when].split())
        console.print(f"  {when + ':':<7} {answer}", highlight=False, markup=False, overflow="ellipsis", no_wrap=True)
    console.print(f"\nFrozen bytes are equal (plan {report.fingerprint[:12]}). Written to {folder}:", highlight=False)
    console.print("  plan.safetensors  demo.png  demo.json", highlight=False)


def _margins(report: DemoReport) -> Table:
    table = Table(
        title="mean log-odds of refusing, prompts held out", title_justify="left",
        caption=(
            "plan + keeper: the plan throughout, and for four\nsteps at a time the fifth of all weights that would\n"
            "harm refusals most; random: as many in each tensor"
        ),
        caption_justify="left",
    )  # fmt: skip
    table.add_column("frozen while fine-tuning", no_wrap=True)
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = report.refusal_margin["before"]
    for run, after in report.refusal_margin.items():
        if run != "before":
            table.add_row(run, f"{before:+.2f}", f"{after:+.2f}", f"{after - before:+.2f}")
    return table
