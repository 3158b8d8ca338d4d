"""What a run leaves behind: tables, a JSON file, a picture."""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import subprocess
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
from .claims import Claim
from .measure import MOST_FOREIGN, MOST_SPREAD, Bench, Machine, Timed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Report"]

WIDTH: Final = 80
_STYLE: Final = {"met": "green", "MISSED": "bold red", "noisy": "yellow", "WRONG": "bold red", "skipped": "yellow"}
# Okabe and Ito's palette: told apart with every common form of colour blindness, and in print
_BLUE, _ORANGE, _GREY, _BLACK = "#0072B2", "#D55E00", "#999999", "#000000"


@dataclass
class Report:
    """Everything a run found, and how it is shown."""

    machine: Machine
    bench: Bench
    claims: list[Claim]
    settings: dict[str, Any]
    full: bool  # all cases, full size, enough rounds: a result to keep

    # -- verdicts ---------------------------------------------------------------------------------------------

    def verdict(self, timed: Timed) -> str:
        """met, MISSED, noisy (not judged), WRONG, skipped, or nothing where there is no target."""
        if not timed.reported:
            return "WRONG" if timed.wrong else "skipped"
        if timed.case.target is None:
            return ""
        if self.settings["quick"]:
            return "-"
        if self.bench.quietness.noisy or timed.noisy:
            return "noisy"
        return "met" if timed.ratio <= timed.case.target else "MISSED"

    def claim_verdict(self, claim: Claim) -> str:
        """As `verdict`."""
        if claim.kept is None:
            return ""
        if claim.timed and self.bench.quietness.noisy:
            return "noisy"
        return "met" if claim.kept else "MISSED"

    @property
    def right(self) -> bool:
        """No result was wrong, and what is exact on any machine holds."""
        return not any(timed.wrong for timed in self.bench.timed) and all(
            claim.kept is not False for claim in self.claims if not claim.timed
        )

    # -- tables -----------------------------------------------------------------------------------------------

    def print(self, console: Console) -> None:
        """Promises, peers, what bounds each, what is exact, and how quiet the machine was."""
        promised = [timed for timed in self.bench.timed if timed.case.target is not None]
        others = [timed for timed in self.bench.timed if timed.case.target is None]
        if promised:
            console.print(self._ratio_table("Promises: time / torch fused AdamW's on the same tensors", promised))
        if others:
            console.print(self._ratio_table("Peers: likewise, nothing promised", others))
        if any(timed.reported for timed in self.bench.timed):
            console.print(self._bound_table())
        if self.claims:
            console.print(self._claim_table())
        for claim in self.claims:
            console.print(f"{claim.name}: {claim.detail}", markup=False, highlight=False)
        for timed in self.bench.timed:
            if timed.trouble:
                console.print(f"{timed.case.name}: {timed.trouble}", style=_STYLE[self.verdict(timed)], markup=False)
        for line in self._remarks():
            console.print(line, markup=False, highlight=False)

    def _ratio_table(self, title: str, rows: list[Timed]) -> Table:
        table = _table(title, "case", "target", "ratio", "95% interval", "minima", "n", "verdict")
        for timed in rows:
            target = "" if timed.case.target is None else f"≤ {timed.case.target:.2f}"
            word = self.verdict(timed)
            numbers = ["", "", "", ""]
            if timed.reported:
                low, high = timed.interval
                numbers = [
                    _short(timed.ratio), f"{_short(low)}-{_short(high)}", _short(timed.ratio_of_minima),
                    str(len(timed.times_ns)),
                ]  # fmt: skip
            table.add_row(timed.case.name, target, *numbers, _styled(word))
        return table

    def _bound_table(self) -> Table:
        copy, modify = (self.bench.bandwidth.gb_per_s(what) for what in ("copy", "read_modify_write"))
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
            if timed.reported:
                prefix = "" if timed.case.tensors == most else f"{timed.case.tensors}: "
                for who, times, size in (
                    (timed.case.contender, timed.times_ns, timed.bytes_moved),
                    (timed.case.against, timed.against_ns, timed.against_bytes),
                ):
                    found.setdefault(f"{prefix}{who}", ([], size))[0].extend(times)
        return [(who, times, size) for who, (times, size) in found.items()]

    def _claim_table(self) -> Table:
        table = _table("Beyond ratios", "promise", "target", "found", "verdict")
        for claim in self.claims:
            target = "" if claim.target is None else f"≤ {claim.target:g} {claim.unit}"
            table.add_row(claim.name, target, f"{claim.value:.3g} {claim.unit}", _styled(self.claim_verdict(claim)))
        return table

    def _remarks(self) -> list[str]:
        machine, quiet = self.machine, self.bench.quietness
        share = quiet.foreign_share
        versions = ", ".join(f"{name} {text}" for name, text in _versions().items())
        lines = [
            f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads; {versions}",
            "ratio: median over the n rounds of the pair's ratio, timed back to back; minima: fastest / fastest",
        ]
        if self.bench.bandwidth.times_ns["copy"]:
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
        if quiet.noisy:
            lines.append(f"NOISY RUN, others took more than {MOST_FOREIGN:.0%}: nothing is judged; run it again alone")
        elif any(self.verdict(timed) == "noisy" for timed in self.bench.timed):
            lines.append(f"noisy: times spread by more than {MOST_SPREAD:.0%} (IQR / median), the target is too near")
        if self.settings["quick"]:
            lines.append("quick run on small tensors: tries the harness, measures nothing")
        return lines

    # -- files ------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> list[Path]:
        """Write ``<cpu>.json`` and ``<cpu>.png``; ``-noisy`` or ``-partial`` is appended where that is what it was."""
        stem = self.machine.slug
        stem += "-partial" if not self.full else "-noisy" if self.bench.quietness.noisy else ""
        folder.mkdir(parents=True, exist_ok=True)
        data, picture = folder / f"{stem}.json", folder / f"{stem}.png"
        temporary = data.with_suffix(".json.partial")
        temporary.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(data)
        written = [data]
        if any(timed.reported for timed in self.bench.timed):
            self.draw(picture)
            written.append(picture)
        return written

    def to_dict(self) -> dict[str, Any]:
        """Everything, raw times included (nanoseconds, in round order)."""
        quiet, bandwidth = self.bench.quietness, self.bench.bandwidth
        timed_at_all = bool(bandwidth.times_ns["copy"])
        speeds = {what: bandwidth.gb_per_s(what) for what in bandwidth.times_ns} if timed_at_all else {}
        return {
            "schema": 1,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": _git_commit(),
            "machine": asdict(self.machine),
            "versions": _versions(),
            "backends": sf.info().backends,
            "settings": self.settings,
            "quietness": {
                "noisy": quiet.noisy,
                "share_taken_by_others": _rounded(quiet.foreign_share),
                "foreign_cpu_s": _rounded(quiet.foreign_s),
                "stolen_cpu_s": _rounded(quiet.stolen_s),
                "timing_wall_s": _rounded(quiet.wall_s),
                "load_before": quiet.load_before,
                "load_after": quiet.load_after,
            },
            "bandwidth_gb_per_s": {what: _rounded(speed) for what, speed in speeds.items()},
            "bandwidth_times_ns": bandwidth.times_ns,
            "cases": [self._case_dict(timed, speeds) for timed in self.bench.timed],
            "claims": [
                {
                    "name": claim.name.strip(), "value": claim.value, "unit": claim.unit, "target": claim.target,
                    "verdict": self.claim_verdict(claim), "how": claim.detail,
                }
                for claim in self.claims
            ],
            "state_bytes": {
                who: {"held": held, "expected": expected}
                for who, (held, expected) in self.bench.state_bytes.items()
            },
        }  # fmt: skip

    def _case_dict(self, timed: Timed, speeds: dict[str, float]) -> dict[str, Any]:
        case, word = timed.case, self.verdict(timed)
        entry: dict[str, Any] = {
            "name": case.name,
            "tensors": str(case.tensors),
            "contender": str(case.contender),
            "against": str(case.against),
            "target": case.target,
            "met": {"met": True, "MISSED": False}.get(word),
            "verdict": word,
            "trouble": timed.trouble,
        }
        if timed.reported:
            entry |= {
                "checked_equal": True,
                "ratio": _rounded(timed.ratio),
                "ratio_interval_95": [_rounded(x) for x in timed.interval],
                "ratio_of_minima": _rounded(timed.ratio_of_minima),
                "spread": _rounded(timed.spread),
                "contender_run": _run_dict(timed.times_ns, timed.bytes_moved, speeds),
                "against_run": _run_dict(timed.against_ns, timed.against_bytes, speeds),
            }
        return entry

    # -- picture ----------------------------------------------------------------------------------------------

    def draw(self, path: Path) -> None:
        """Ratios as bars against their targets, peers beside ours."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        promised = [t for t in self.bench.timed if t.reported and t.case.target is not None]
        others = [t for t in self.bench.timed if t.reported and t.case.target is None and t.case.against == FUSED]
        beside = [
            t for t in promised
            if (t.case.tensors, t.case.against, t.case.contender.weights) == (others[0].case.tensors, FUSED, "fp32")
            and t.case.contender.freeze.kind in ("nothing", "rows")
        ] if others else []  # fmt: skip
        panels = [(promised, True)] * bool(promised) + [(others, False)] * bool(others)
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
        noisy = "; NOISY RUN, not judged" if self.bench.quietness.noisy else ""
        small = "; small tensors, not to be judged" if self.settings["quick"] else ""
        figure.suptitle("safefreeze_kernels: AdamW step on a CPU", fontsize=11, fontweight="bold")
        versions = _versions()
        figure.supxlabel(
            f"{self.machine.cpu}, {self.machine.threads} threads, torch {versions['torch']}, "
            f"{datetime.now(timezone.utc):%Y-%m-%d}; median of pairwise ratios, 95% interval{noisy}{small}",
            fontsize=8,
        )
        temporary = path.with_suffix(".partial")
        figure.savefig(temporary, dpi=150, format="png")
        plt.close(figure)
        temporary.replace(path)

    def _draw_promises(self, axes: Axes, rows: list[Timed]) -> None:
        for y, timed in enumerate(rows):
            met = {"met": True, "MISSED": False}.get(self.verdict(timed))
            colour = _GREY if met is None else _BLUE if met else _ORANGE
            _bar(axes, y, timed, colour, hatch="///" if met is False else None)
            target = timed.case.target
            assert target is not None
            axes.plot([target, target], [y - 0.45, y + 0.45], color=_BLACK, linewidth=2.5, solid_capstyle="butt")
        _name_rows(axes, rows, [timed.case.name for timed in rows])
        axes.set_xlim(0, 1.1 * max(1.0, *(max(timed.ratio, timed.case.target or 0) for timed in rows)))
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
        axes.set_xlim(0.8 * min(0.5, *(t.ratio for t in rows)), 1.25 * max(2.0, *(t.ratio for t in rows)))
        axes.axvline(1.0, color=_BLACK, linewidth=0.8, linestyle="--", zorder=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(
            "Peers: time / torch fused with nothing frozen (log scale; left is faster)\n"
            "blue: our masked step   grey: everything else",
            fontsize=9, loc="left",
        )  # fmt: skip


def _bar(axes: Axes, y: float, timed: Timed, colour: str, hatch: str | None = None, start: float = 0.0) -> None:
    low, high = timed.interval
    edge = "white" if hatch else colour
    axes.barh(y, timed.ratio - start, 0.62, left=start, color=colour, hatch=hatch, edgecolor=edge, linewidth=0)
    axes.plot([low, high], [y, y], color=_BLACK, linewidth=1)


def _name_rows(axes: Axes, rows: list[Timed], names: list[str]) -> None:
    """Names to the left, ratios to the right."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for y, timed in enumerate(rows):
        target = "" if timed.case.target is None else f"  (≤ {timed.case.target:.2f})"
        axes.text(1.01, y, f"{timed.ratio:.3f}{target}", va="center", fontsize=8, transform=axes.get_yaxis_transform())
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


def _rounded(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.5g}")


def _short(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.0f}"


def _spaced(load: tuple[float, ...]) -> str:
    return " ".join(f"{x:.2f}" for x in load) or "unknown"


def _versions() -> dict[str, str]:
    found = {"safefreeze_kernels": sf.__version__, "torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(PackageNotFoundError):
        found["torch-optimi"] = version("torch-optimi")
    return found


def _git_commit() -> str | None:
    """The commit that was measured, ``-dirty`` appended where files differ from it; None outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
