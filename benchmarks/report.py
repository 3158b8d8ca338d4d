"""What a run leaves behind: tables, a JSON file, a picture."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console
from rich.table import Table

import safefreeze_kernels as sf

from .cases import FUSED
from .measure import MOST_FOREIGN, MOST_SPREAD, Bench, Machine, Timed, git_commit, save_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH: Final = 80
_STYLE: Final = {"met": "green", "MISSED": "bold red", "noisy": "yellow", "WRONG": "bold red", "skipped": "yellow"}
_MET: Final = {"met": True, "MISSED": False}
# Okabe and Ito's palette: told apart with every common form of colour blindness, and in print
_BLUE, _ORANGE, _GREY, _BLACK = "#0072B2", "#D55E00", "#999999", "#000000"


@dataclass
class Report:
    """Everything a run found, and how it is shown."""

    machine: Machine
    bench: Bench
    settings: dict[str, Any]
    full: bool  # all cases, full size, enough rounds: a result to keep
    steps: Sequence[dict[str, Any]] = ()  # what went before, of `make gpu`

    def verdict(self, timed: Timed) -> str:
        """As `Timed.verdict`; nothing is judged of small tensors, nor where others took too much of the machine."""
        copy = self.bench.bandwidth.gb_per_s.get("copy", math.nan)
        return timed.verdict(copy, judged=not self.settings["quick"], noisy=self._noisy)

    @property
    def _noisy(self) -> bool:
        return not self.machine.gpu and self.bench.quietness.noisy  # a GPU's own times: nobody else uses it

    @property
    def right(self) -> bool:
        """No result was wrong, and every optimizer's state has the bytes it must have."""
        sizes = self.bench.state_bytes.values()
        return not any(timed.wrong for timed in self.bench.timed) and all(held == want for held, want in sizes)

    # -- tables -----------------------------------------------------------------------------------------------

    def print(self, console: Console) -> None:
        """Promises, peers, what bounds each, what is exact, and how quiet the machine was."""
        promised = [timed for timed in self.bench.timed if timed.case.target is not None]
        others = [timed for timed in self.bench.timed if timed.case.target is None]
        if promised:
            console.print(self._ratio_table("Promises: time / torch fused AdamW's on the same tensors", promised))
        if others:
            console.print(self._ratio_table("Peers: likewise, nothing promised", others))
        if any(timed.times_ns for timed in self.bench.timed):
            console.print(self._bound_table())
        for timed in self.bench.timed:
            if timed.trouble:
                console.print(f"{timed.case.name}: {timed.trouble}", style=_STYLE[self.verdict(timed)], markup=False)
        for line in self._remarks():
            console.print(line, markup=False, highlight=False)

    def _ratio_table(self, title: str, rows: list[Timed]) -> Table:
        table = _table(title, "case", "target", "ratio", "95% interval", "minima", "n", "verdict")
        for timed in rows:
            target = "" if timed.case.target is None else f"≤ {timed.case.target:.2f}"
            numbers = ["", "", "", ""]
            if timed.reported:
                ratio, low, high = timed.ratio
                numbers[0] = _short(ratio)
                if timed.times_ns:
                    interval = f"{_short(low)}-{_short(high)}" if math.isfinite(high) else "-"
                    numbers[1:] = interval, _short(timed.ratio_of_minima), str(len(timed.times_ns))
            table.add_row(timed.case.name, target, *numbers, _styled(self.verdict(timed)))
        return table

    def _bound_table(self) -> Table:
        copy, modify = self.bench.bandwidth.gb_per_s.values()
        table = _table(
            f"What bounds it: copy {copy:.1f} GB/s, read-modify-write {modify:.1f} GB/s", "contender", "min ms",
            "median", "MB", "GB/s", "copy", "r-m-w",
        )  # fmt: skip
        for who, times, size in self._contenders():
            median = statistics.median(times)
            traffic = ["", "", "", ""]
            if size is not None:
                speed = size / median
                traffic = [f"{size / 1e6:.0f}", f"{speed:.1f}", f"{speed / copy:.0%}", f"{speed / modify:.0%}"]
            table.add_row(who, f"{min(times) / 1e6:.2f}", f"{median / 1e6:.2f}", *traffic)
        return table

    def _contenders(self) -> list[tuple[str, list[int], int | None]]:
        """Every contender that was timed: name, all its times, bytes it moves. On other tensors than most: they too."""
        most = max((t.case.tensors for t in self.bench.timed), key=lambda tensors: tensors.numel)
        found: dict[str, tuple[list[int], int | None]] = {}
        for timed in self.bench.timed:
            if timed.reported and timed.times_ns:
                prefix = "" if timed.case.tensors == most else f"{timed.case.tensors}: "
                for who, times, size in (
                    (timed.case.contender, timed.times_ns, timed.bytes_moved),
                    (timed.case.against, timed.against_ns, timed.against_bytes),
                ):
                    found.setdefault(f"{prefix}{who}", ([], size))[0].extend(times)
        return [(who, times, size) for who, (times, size) in found.items()]

    def _remarks(self) -> list[str]:
        machine, quiet = self.machine, self.bench.quietness
        share = quiet.foreign_share
        versions = ", ".join(f"{name} {text}" for name, text in _versions().items())
        lines = [
            f"{machine.device}, {machine.cores} cores, {machine.threads} threads; {versions}",
            "ratio: median over the n rounds of the pair's ratio, timed back to back; minima: fastest / fastest",
        ]
        if self.bench.bandwidth.gb_per_s:
            lines.append(
                "GB/s: bytes to be read and written / median. A copy also reads what it overwrites, uncounted, so "
                "a step can pass 100% of it; read-modify-write is the nearer bound"
            )
        if quiet.wall_s:
            taken = "unknown" if share is None else f"{share:.1%}"
            lines.append(
                f"others took {taken} of the machine while timing; load average "
                f"{_spaced(quiet.load_before)} before, {_spaced(quiet.load_after)} after (our own work included)"
            )
        sizes = self.bench.state_bytes
        if sizes:
            wrong = [f"{who}: {held:,}, expected {want:,}" for who, (held, want) in sizes.items() if held != want]
            found = "; ".join(wrong) or "as the live share of a dense one, to the byte"
            lines.append(f"state of {len(sizes)} optimizers: {found}")
        lines += [
            f"{t.case.name}: {t.peaks[0] / 1e9:.3f} GB, torch {t.peaks[1] / 1e9:.3f} GB"
            for t in self.bench.timed if t.peaks is not None
        ]  # fmt: skip
        if self._noisy:
            lines.append(f"NOISY RUN, others took more than {MOST_FOREIGN:.0%}: nothing is judged; run it again alone")
        elif any(self.verdict(timed) == "noisy" for timed in self.bench.timed):
            lines.append(f"noisy: times spread by more than {MOST_SPREAD:.0%} (IQR / median), the target is too near")
        if self.settings["quick"]:
            lines.append("quick run on small tensors: tries the harness, measures nothing")
        return lines

    # -- files ------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> list[Path]:
        """Write ``<cpu>.json`` and ``<cpu>.png``; ``-noisy`` or ``-partial`` is appended where that is what it was."""
        data, picture = self.save_numbers(folder), folder / f"{self._stem}.png"
        return [data, picture] if self.draw(picture) else [data]

    def save_numbers(self, folder: Path) -> Path:
        """Write the numbers alone."""
        path = folder / f"{self._stem}.json"
        save_json(path, self.to_dict())
        return path

    @property
    def _stem(self) -> str:
        return self.machine.slug + ("-partial" if not self.full else "-noisy" if self._noisy else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything, raw times included (nanoseconds, in round order)."""
        quiet, bandwidth = self.bench.quietness, self.bench.bandwidth
        speeds = bandwidth.gb_per_s
        return {
            "schema": 1,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": git_commit(),
            "machine": asdict(self.machine),
            "versions": _versions(),
            "backends": sf.info().backends,
            "settings": self.settings,
            "quietness": {
                "noisy": self._noisy,
                "share_taken_by_others": None if quiet.foreign_share is None else _rounded(quiet.foreign_share),
                "foreign_cpu_s": _rounded(quiet.foreign_s),
                "stolen_cpu_s": _rounded(quiet.stolen_s),
                "timing_wall_s": _rounded(quiet.wall_s),
                "load_before": quiet.load_before,
                "load_after": quiet.load_after,
            },
            "bandwidth_gb_per_s": {what: _rounded(speed) for what, speed in speeds.items()},
            "bandwidth_times_ns": bandwidth.times_ns,
            "cases": [self._case_dict(timed, speeds) for timed in self.bench.timed],
            "state_bytes": {
                who: {"held": held, "expected": expected}
                for who, (held, expected) in self.bench.state_bytes.items()
            },
            **({"steps": list(self.steps)} if self.steps else {}),
        }  # fmt: skip

    def _case_dict(self, timed: Timed, speeds: dict[str, float]) -> dict[str, Any]:
        case, word = timed.case, self.verdict(timed)
        entry: dict[str, Any] = {
            "name": case.name, "tensors": str(case.tensors), "contender": str(case.contender),
            "against": str(case.against), "target": case.target, "met": _MET.get(word), "verdict": word,
            "trouble": timed.trouble,
        }  # fmt: skip
        if timed.reported:
            entry |= {"checked_equal": True, "ratio": _rounded(timed.ratio.median)}
        if timed.peaks is not None:
            entry["peaks"] = timed.peaks
        if timed.reported and timed.times_ns:
            entry |= {
                "ratio_interval_95": [_rounded(x) for x in timed.ratio[1:]],
                "ratio_of_minima": _rounded(timed.ratio_of_minima),
                "spread": _rounded(timed.spread),
                "contender_run": _run_dict(timed.times_ns, timed.bytes_moved, speeds),
                "against_run": _run_dict(timed.against_ns, timed.against_bytes, speeds),
            }
        return entry

    # -- picture ----------------------------------------------------------------------------------------------

    def draw(self, path: Path) -> bool:
        """Ratios as bars against their targets, peers beside ours. Returns whether there was anything to draw."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        shown = [t for t in self.bench.timed if t.reported and t.times_ns]
        promised = [t for t in shown if t.case.target is not None]
        others = [t for t in shown if t.case.target is None and t.case.against == FUSED]
        beside = [
            t for t in promised
            if (t.case.tensors, t.case.against, t.case.contender.weights) == (others[0].case.tensors, FUSED, "fp32")
            and t.case.contender.freeze.kind in ("nothing", "rows")
        ] if others else []  # fmt: skip
        panels = [(promised, True)] * bool(promised) + [(others, False)] * bool(others)
        if not panels:
            return False
        heights = [len(rows) + (0 if with_targets else len(beside)) + 2 for rows, with_targets in panels]
        figure, all_axes = plt.subplots(
            len(panels), 1, figsize=(8.5, 0.33 * sum(heights) + 1.1), height_ratios=heights, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axes, (rows, with_targets) in zip(all_axes[:, 0], panels, strict=True):
            if with_targets:
                self._draw_promises(axes, rows)
            else:
                self._draw_peers(axes, beside + rows, n_ours=len(beside))
        noisy = "; NOISY RUN, not judged" if self._noisy else ""
        small = "; small tensors, not to be judged" if self.settings["quick"] else ""
        kind = "GPU" if self.machine.gpu else "CPU"
        figure.suptitle(f"safefreeze_kernels: AdamW step on a {kind}", fontsize=11, fontweight="bold")
        versions = _versions()
        figure.supxlabel(
            f"{self.machine.device}, {self.machine.threads} threads, torch {versions['torch']}, "
            f"{datetime.now(timezone.utc):%Y-%m-%d}; median of pairwise ratios, 95% interval{noisy}{small}",
            fontsize=8,
        )
        temporary = path.with_suffix(".partial")
        figure.savefig(temporary, dpi=150, format="png")
        plt.close(figure)
        temporary.replace(path)
        return True

    def _draw_promises(self, axes: Axes, rows: list[Timed]) -> None:
        for y, timed in enumerate(rows):
            met = _MET.get(self.verdict(timed))
            colour = _GREY if met is None else _BLUE if met else _ORANGE
            _bar(axes, y, timed, colour, hatch="///" if met is False else None)
            target = timed.case.target
            assert target is not None
            axes.plot([target, target], [y - 0.45, y + 0.45], color=_BLACK, linewidth=2.5, solid_capstyle="butt")
        _name_rows(axes, rows, [timed.case.name for timed in rows])
        axes.set_xlim(0, 1.1 * max(1.0, *(max(timed.ratio.median, timed.case.target or 0) for timed in rows)))
        axes.axvline(1.0, color=_BLACK, linewidth=0.8, linestyle="--", zorder=0)
        axes.set_title(
            "Promises: time / torch fused (or as named)\n"
            "black mark: promised at most   blue: met   hatched orange: missed   grey: not judged",
            fontsize=9, loc="left",
        )  # fmt: skip

    def _draw_peers(self, axes: Axes, rows: list[Timed], n_ours: int) -> None:
        axes.set_xscale("log", base=2)
        for y, timed in enumerate(rows):
            _bar(axes, y, timed, _BLUE if y < n_ours else _GREY, start=1.0)
        _name_rows(axes, rows, [f"ours, {t.case.name}" if y < n_ours else t.case.name for y, t in enumerate(rows)])
        axes.set_xlim(0.8 * min(0.5, *(t.ratio.median for t in rows)), 1.25 * max(2.0, *(t.ratio.median for t in rows)))
        axes.axvline(1.0, color=_BLACK, linewidth=0.8, linestyle="--", zorder=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(
            "Peers: time / torch fused with nothing frozen (log scale; left is faster)\n"
            "blue: our masked step   grey: everything else",
            fontsize=9, loc="left",
        )  # fmt: skip


def _bar(axes: Axes, y: float, timed: Timed, colour: str, hatch: str | None = None, start: float = 0.0) -> None:
    ratio, low, high = timed.ratio
    edge = "white" if hatch else colour
    axes.barh(y, ratio - start, 0.62, left=start, color=colour, hatch=hatch, edgecolor=edge, linewidth=0)
    if math.isfinite(high):
        axes.plot([low, high], [y, y], color=_BLACK, linewidth=1)


def _name_rows(axes: Axes, rows: list[Timed], names: list[str]) -> None:
    """Names to the left, ratios to the right."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for y, timed in enumerate(rows):
        target = "" if timed.case.target is None else f"  (≤ {timed.case.target:.2f})"
        axes.text(
            1.01, y, f"{timed.ratio.median:.3f}{target}", va="center", fontsize=8, transform=axes.get_yaxis_transform()
        )
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


# ------------------------------------------------------------------------------------------------------ details


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), width=WIDTH, title_style="bold")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    return table


def _styled(word: str) -> str:
    return f"[{_STYLE[word]}]{word}[/]" if word in _STYLE else word


def _run_dict(times: list[int], size: int | None, speeds: dict[str, float]) -> dict[str, Any]:
    median = statistics.median(times)
    run: dict[str, Any] = {"min_ms": _rounded(min(times) / 1e6), "median_ms": _rounded(median / 1e6)}
    if size is not None:
        run |= {"bytes_moved": size, "gb_per_s": _rounded(size / median)}
        run |= {f"share_of_{what}": _rounded(size / median / speed) for what, speed in speeds.items()}
    return {**run, "times_ns": times}


def _rounded(x: float) -> float | None:
    return float(f"{x:.5g}") if math.isfinite(x) else None


def _short(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.0f}"


def _spaced(load: tuple[float, ...]) -> str:
    return " ".join(f"{x:.2f}" for x in load) or "unknown"


def _versions() -> dict[str, str]:
    found = {"safefreeze_kernels": sf.__version__, "torch": torch.__version__, "python": platform.python_version()}
    try:
        return {**found, "torch-optimi": version("torch-optimi")}
    except PackageNotFoundError:
        return found
