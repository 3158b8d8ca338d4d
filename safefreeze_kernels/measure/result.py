"""What `profile_step` found: its times with their spread, as table, file and picture."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..plan.files import write_atomically
from .memory import as_text
from .timing import WHOLE, Spread, median_ratio, quartiles, was_busy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

#: The parts of a training step, in order. `StepProfile` also knows "clip + step" and "whole step".
PHASES: Final = ("forward", "backward", "clip", "step", "zero_grad")
_UPDATE: Final = "clip + step"
_FORMAT: Final = "safefreeze.step_profile"
_COLOURS: Final = ("#0072B2", "#8C8C8C")  # masked, stock
_SHIFTS: Final = (-0.2, 0.2)  # of the two bars in a row
_BESIDE: Final[dict[str, Any]] = {"textcoords": "offset points", "va": "center"}


@dataclass(frozen=True)
class StepCost:
    """What one optimizer's training step costs."""

    name: str
    #: phase, or "whole step" -> milliseconds in each round; with accumulation, of all its micro-batches together
    times_ms: dict[str, tuple[float, ...]]
    #: the optimizer's tensors, and the dtypes of those that are as large as parameters, "float32" for example
    state_bytes: int
    state_dtypes: str
    gradient_bytes: int
    #: most memory in use beyond what was before the first step (weights); `StepProfile.peak_is` says how it was taken
    peak_bytes: int | None

    def times(self, phase: str) -> tuple[float, ...]:
        """Milliseconds of a phase in each round; also of "clip + step" and of the "whole step"."""
        if phase == _UPDATE:
            parts = [self.times_ms[name] for name in ("clip", "step") if name in self.times_ms]
            return tuple(map(sum, zip(*parts, strict=True)))
        return self.times_ms[phase]

    def time(self, phase: str) -> Spread:
        """Median and quartiles over the rounds, in milliseconds."""
        return quartiles(self.times(phase))


@dataclass(frozen=True)
class StepProfile:
    """What `profile_step` measured. ``print(profile)`` shows the table."""

    masked: StepCost
    stock: StepCost
    parameters: int  # trainable ones
    frozen_fraction: float  # of those
    #: how peak bytes were taken; "" if they were not
    peak_is: str
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """Timed steps of each optimizer."""
        return len(self.masked.times_ms[WHOLE])

    @property
    def phases(self) -> tuple[str, ...]:
        """All that has a time; "clip" is left out where nothing was clipped."""
        timed = tuple(phase for phase in PHASES if phase in self.masked.times_ms)
        return (*timed, *([_UPDATE] if "clip" in timed else []), WHOLE)

    def ratio(self, phase: str = WHOLE) -> Spread:
        """Masked / stock: median over rounds of the ratio of the two steps timed back to back, with its 95% interval.

        The interval is the binomial one, from order statistics. Fewer than 6 rounds have none: it is (0, inf) then.
        """
        return median_ratio(self.masked.times(phase), self.stock.times(phase))

    def differs(self, phase: str = WHOLE) -> bool:
        """Whether a difference was measured: the 95% interval of `ratio` leaves out 1."""
        _, low, high = self.ratio(phase)
        return not low <= 1 <= high

    @property
    def verdict(self) -> str:
        """In words: did the optimizer's part, and the whole step, take more or less, or was no difference measured?"""
        if not math.isfinite(self.ratio().high):
            return f"{self.rounds} rounds tell no difference from noise; measure at least 6."
        told = [self._verdict(phase) for phase in (_UPDATE if "clip" in self.masked.times_ms else "step", WHOLE)]
        if self.was_busy:
            told.append("The machine was busy: quartiles lie far apart. Measure again when it is quiet, or more steps.")
        return "\n".join(told)

    def _verdict(self, phase: str) -> str:
        median, low, high = self.ratio(phase)
        figures = f"{median:.3f} of stock's time, 95% interval {low:.3f} to {high:.3f}"
        if self.differs(phase):
            return f"{phase}: {'faster' if median < 1 else 'slower'}, {figures}"
        return f"{phase}: no difference measured ({figures})"

    @property
    def was_busy(self) -> bool:
        """Whether whole steps vary so much that the machine had other work: their quartiles lie 15% apart."""
        return any(was_busy(cost.times(WHOLE)) for cost in (self.masked, self.stock))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write all that was measured, every round, and a summary of it. Crash-safe: the old file or the new one."""
        summary = {
            phase: {
                "masked_ms": self.masked.time(phase), "stock_ms": self.stock.time(phase),
                "ratio": [value if math.isfinite(value) else None for value in self.ratio(phase)],
            }
            for phase in self.phases
        }  # fmt: skip
        written = {"format": _FORMAT, **asdict(self), "median_low_high": summary, "verdict": self.verdict}
        write_atomically(Path(path), (json.dumps(written, indent=1) + "\n").encode())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> StepProfile:
        """What `to_json` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            read = json.loads(Path(path).read_bytes())
            if read.pop("format") != _FORMAT:
                raise ValueError("of another format")
            for derived in ("median_low_high", "verdict"):
                del read[derived]
            for who in ("masked", "stock"):
                times = {phase: tuple(map(float, times)) for phase, times in read[who].pop("times_ms").items()}
                read[who] = StepCost(times_ms=times, **read[who])
            return cls(**read)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"StepProfile.from_json: {os.fspath(path)!r} holds no step profile ({error}), expected a file that "
                "to_json wrote"
            ) from error

    def table(self) -> Table:
        """For a terminal of 80 columns: times, ratios, bytes, what was measured, and what that says."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=f"{self.masked.name}, {self.frozen_fraction:.1%} of {self.parameters:,} parameters frozen",
            title_justify="left", title_style="bold", caption=f"{self.verdict}\n{self._circumstances()}",
            caption_justify="left", caption_style="", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        )  # fmt: skip
        table.add_column("\nms", no_wrap=True)
        for heading in ("masked\nmedian (quartiles)", "stock\nmedian (quartiles)", "\nratio", "95%\ninterval"):
            table.add_column(heading, justify="right", no_wrap=True)
        for phase in self.phases:
            median, low, high = self.ratio(phase)
            table.add_row(
                phase,
                *(_shown(cost.time(phase)) for cost in (self.masked, self.stock)),
                "-" if math.isnan(median) else f"{median:.2f}",
                f"{low:.2f}-{high:.2f}" if math.isfinite(high) else "-",
            )
            if phase in ("zero_grad", WHOLE):
                table.add_section()
        for word, masked, stock in self._bytes():
            cells = ["-" if count is None else _figure(count / 1e6) for count in (masked, stock)]
            table.add_row(f"{word}, MB", *cells, f"{masked / stock:.2f}" if masked is not None and stock else "-", "")
        return table

    def _bytes(self) -> list[tuple[str, int | None, int | None]]:
        return [
            (word, getattr(self.masked, name), getattr(self.stock, name))
            for word, name in (("state", "state_bytes"), ("gradients", "gradient_bytes"), ("peak", "peak_bytes"))
        ]

    def _circumstances(self) -> str:
        told = [
            f"stock: {self.stock.name}; {self.rounds} rounds",
            f"state masked {self.masked.state_dtypes or 'none'}, stock {self.stock.state_dtypes}",
            *(f"{key} {value}" for key, value in self.settings.items() if value is not None),
            *(f"{key} {value}" for key, value in self.machine.items() if value is not None),
        ]
        return "; ".join(told) + (f"\npeak: {self.peak_is}" if self.peak_is else "\npeak: cannot be measured here")

    def __str__(self) -> str:
        return as_text(self.table())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw times, ratios and bytes into a PNG file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(f"plot: matplotlib is needed ({error}); pip install matplotlib") from error

        figure = Figure(figsize=(12, 6), dpi=100)
        figure.set_layout_engine("constrained", wspace=0.06)
        times, ratios, memory = figure.subplots(1, 3, width_ratios=(2.2, 1.2, 1.6))
        figure.suptitle(
            f"{self.masked.name}, {self.frozen_fraction:.1%} of {self.parameters:,} parameters frozen, "
            f"against {self.stock.name}, nothing frozen",
            fontsize=14,
        )
        self._draw_times(times)
        self._draw_ratios(ratios)
        self._draw_bytes(memory)
        for axes in (times, ratios, memory):
            axes.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        write_atomically(Path(path), buffer.getvalue())

    def _draw_times(self, axes: Axes) -> None:
        spreads = [[cost.time(phase) for phase in self.phases] for cost in (self.masked, self.stock)]
        bars = _draw_pairs(axes, self.phases, [[spread.median for spread in each] for each in spreads])
        for shift, each in zip(_SHIFTS, spreads, strict=True):
            for place, (median, low, high) in enumerate(each):
                axes.plot([low, high], [place + shift] * 2, color="black", lw=1.2, marker="|", ms=5)
                axes.annotate(_figure(median), (max(median, high), place + shift), (5, 0), **_BESIDE)
        axes.set(title=f"median and quartiles of {self.rounds} rounds", xlabel="ms")
        axes.set_xlim(0, 1.2 * max(spread.high for each in spreads for spread in each))
        axes.legend(bars, [self.masked.name, "stock"], frameon=False, handlelength=1, handleheight=1)

    def _draw_ratios(self, axes: Axes) -> None:
        axes.axvline(1, color="#BBBBBB", lw=1, zorder=0)
        for place, phase in enumerate(self.phases):
            median, low, high = self.ratio(phase)
            colour, filled = (_COLOURS[0],) * 2 if self.differs(phase) else ("black", "white")
            if math.isfinite(high):
                axes.plot([low, high], [place] * 2, color=colour, lw=1.5, marker="|", ms=7)
            if not math.isnan(median):
                axes.plot(median, place, "o", ms=7, color=colour, markerfacecolor=filled)
                axes.annotate(f"{median:.2f}", (median, place), (0, 8), textcoords="offset points", ha="center")
        axes.set(title="masked / stock, 95% interval", xlabel="open: no difference measured")
        _name_rows(axes, [""] * len(self.phases))
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.9), max(high, 1.1))

    def _draw_bytes(self, axes: Axes) -> None:
        rows = {word: (masked / 1e6, stock / 1e6) for word, masked, stock in self._bytes() if masked and stock}
        _draw_pairs(axes, list(rows), list(zip(*rows.values(), strict=True)))
        for place, pair in enumerate(rows.values()):
            for shift, value in zip(_SHIFTS, pair, strict=True):
                axes.annotate(_figure(value), (value, place + shift), (5, 0), **_BESIDE)
        axes.set(title="memory beside the weights", xlabel="MB")
        axes.set_xlim(0, 1.25 * max(map(max, rows.values())))


def _draw_pairs(axes: Axes, names: Sequence[str], pairs: Sequence[Sequence[float]]) -> list[Any]:
    """A bar of each of the two optimizers in every row, the first row on top. Returns the bars of each."""
    _name_rows(axes, names)
    return [
        axes.barh([place + shift for place in range(len(values))], values, height=0.38, color=colour)
        for shift, values, colour in zip(_SHIFTS, pairs, _COLOURS, strict=True)
    ]


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _figure(value: float) -> str:
    """Three digits or more, never a power of ten."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def _shown(spread: Spread) -> str:
    median, low, high = map(_figure, spread)
    return f"{median} ({low}-{high})"
