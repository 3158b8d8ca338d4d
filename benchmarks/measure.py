"""Cases timed in pairs: built, checked, timed in turns, checked again; what they ran on, and how quiet it was.

A case's two contenders are timed back to back with cold caches, in alternating order, and every case takes its turn in
every round, in an order drawn anew. Beside the median ratio of `safefreeze_kernels.measure.timing` stands the ratio of
the two minima: interruptions only ever add time, so the minima are what a silent machine would show; where the two
disagree the machine was not quiet. All is built anew in every pass, so that one lucky or unlucky placement in memory
does not decide.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from safefreeze_kernels.kernels.backend import BackendUnavailableError
from safefreeze_kernels.measure.info import device_name
from safefreeze_kernels.measure.memory import peak, restart_peak
from safefreeze_kernels.measure.timing import (
    MOST_SPREAD,
    ColdCaches,
    Spread,
    in_order,
    last_level_cache,
    median_ratio,
    milliseconds,
    quartiles,
    was_busy,
)

from .cases import Case, Contender
from .contenders import CHECKED_STEPS, Inputs, Runner, UnavailableError

__all__ = ["MOST_FOREIGN", "MOST_SPREAD", "Bandwidth", "Bench", "Machine", "Quietness", "Timed", "describe_machine"]

RESULTS: Final = Path(__file__).parent / "results"
MOST_FOREIGN: Final = 0.05  # share of the machine's time others may take before a run is not judged
COPY_BYTES: Final = {"cpu": 256 << 20, "cuda": 1 << 30}
Tick = Callable[[str], object]
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------- the machine


@dataclass(frozen=True)
class Machine:
    """What the numbers were measured on."""

    cpu: str
    cores: int
    threads: int
    cache_bytes: int
    memory_bytes: int
    system: str
    environment: dict[str, str]
    gpu: dict[str, Any] = field(default_factory=dict)  # empty: the CPU was measured

    @property
    def device(self) -> str:
        """The name of what was measured."""
        return str(self.gpu.get("device", self.cpu))

    @property
    def slug(self) -> str:
        """That name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", self.device.lower())).strip("-") or "unknown-cpu"


def describe_machine(threads: int, device: str = "cpu") -> Machine:
    """Read what the system says about itself."""
    return Machine(
        cpu=device_name(torch.device("cpu")),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=threads,
        cache_bytes=last_level_cache(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        environment={
            key: value for key, value in sorted(os.environ.items())
            if key.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "SAFEFREEZE_")) or key == "THP_MEM_ALLOC_ENABLE"
        },
        gpu=_describe_gpu() if device == "cuda" else {},
    )  # fmt: skip


def _describe_gpu() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else None
    return {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
        "nvidia_smi": told,
    }


@dataclass
class Quietness:
    """How much of the machine others took while timing: other processes, and the hypervisor."""

    wall_s: float = 0.0
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    foreign_s: float = 0.0
    stolen_s: float = 0.0
    known: bool = True
    load_before: tuple[float, ...] = ()
    load_after: tuple[float, ...] = ()
    _began: tuple[float, float, float, float] = (0.0,) * 4

    def __enter__(self) -> Quietness:
        self.load_before = self.load_before or _load()
        self._began = _clocks()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, stolen, own = (now - then for now, then in zip(_clocks(), self._began, strict=True))
        self.wall_s += wall
        self.foreign_s += max(busy - own, 0.0)
        self.stolen_s += stolen
        self.known &= not math.isnan(busy)
        self.load_after = _load()

    @property
    def foreign_share(self) -> float | None:
        """Share of all cores' time that others took; None where the system does not say."""
        if not self.known or not self.wall_s:
            return None
        return (self.foreign_s + self.stolen_s) / (self.wall_s * self.cores)

    @property
    def noisy(self) -> bool:
        """Whether others took more than `MOST_FOREIGN`. Where that is unknown the load average decides."""
        share = self.foreign_share
        if share is None:
            return bool(self.load_before) and self.load_before[0] > 0.25 * self.cores
        return share > MOST_FOREIGN


def _load() -> tuple[float, ...]:
    return os.getloadavg() if hasattr(os, "getloadavg") else ()


def _clocks() -> tuple[float, float, float, float]:
    """Seconds: wall; all processes on all cores; stolen by a hypervisor; this process and its finished children."""
    busy = stolen = math.nan
    stat = Path("/proc/stat")
    if stat.exists():
        # user nice system idle iowait irq softirq steal …
        ticks = [int(n) / os.sysconf("SC_CLK_TCK") for n in stat.read_text().split("\n", 1)[0].split()[1:9]]
        busy, stolen = sum(ticks[:3]) + sum(ticks[5:7]), ticks[7]
    return time.monotonic(), busy, stolen, sum(os.times()[:4])


# --------------------------------------------------------------------------------------------------- one timing


class Stopwatch:
    """Nanoseconds of one call at a time; on the CPU each with cold caches."""

    def __init__(self, device: str = "cpu") -> None:
        self._device, self._caches = device, ColdCaches() if device == "cpu" else None

    def time(self, call: Callable[[], Any], warm: bool = False) -> int:
        """``warm``: of the second of two calls; on a GPU by the host's clock."""
        if self._caches is not None:
            self._caches.evict()
        if warm:
            call()
        return round(1e6 * milliseconds(call, self._device, wall=warm))


class Bandwidth:
    """Copy and read-modify-write of a large tensor, timed in the same rounds as everything else.

    Bytes are counted as read + written. A copy also makes a processor read what it overwrites, which is not counted:
    the read-modify-write figure is nearer to what an optimizer step can reach.
    """

    def __init__(self, device: str, n_bytes: int) -> None:
        source, target = (torch.ones(n_bytes // 4, device=device) for _ in range(2))
        self._bytes = n_bytes
        self._calls = {"copy": lambda: target.copy_(source), "read_modify_write": lambda: target.add_(1.0)}
        self.times_ns: dict[str, list[int]] = {what: [] for what in self._calls}

    def measure(self, stopwatch: Stopwatch) -> None:
        """One timing of each."""
        for what, call in self._calls.items():
            self.times_ns[what].append(stopwatch.time(call))

    @property
    def gb_per_s(self) -> dict[str, float]:
        """From the median times; empty where nothing was timed."""
        return {what: 2 * self._bytes / statistics.median(times) for what, times in self.times_ns.items() if times}


# ------------------------------------------------------------------------------------------------- many timings


@dataclass
class Timed:
    """A case and its times, in pairs. ``trouble`` says why there are none, or why they do not count."""

    case: Case
    times_ns: list[int] = field(default_factory=list)
    against_ns: list[int] = field(default_factory=list)
    bytes_moved: int | None = None
    against_bytes: int | None = None
    peaks: tuple[int, int] | None = None  # bytes, of a case that compares peaks
    trouble: str = ""
    wrong: bool = False

    @property
    def ratio(self) -> Spread:
        """Contender / against with its 95% interval: median over rounds, or of the peaks."""
        if self.peaks is not None:
            return Spread(*[self.peaks[0] / self.peaks[1]] * 3)
        return median_ratio(self.times_ns, self.against_ns)

    @property
    def ratio_of_minima(self) -> float:
        return min(self.times_ns) / min(self.against_ns)

    @property
    def spread(self) -> float:
        """The larger of the two contenders' interquartile range / median."""
        spreads = [quartiles(times) for times in (self.times_ns, self.against_ns)]
        return max((high - low) / median for median, low, high in spreads)

    @property
    def noisy(self) -> bool:
        """Whether times spread so much, and the target lies so near, that another run might end otherwise."""
        if self.case.target is None or self.peaks is not None:
            return False
        _, low, high = self.ratio
        return any(map(was_busy, (self.times_ns, self.against_ns))) and low <= self.case.target <= high

    @property
    def reported(self) -> bool:
        """Whether there are figures of checked results."""
        return bool(self.times_ns or self.peaks) and not self.wrong

    def verdict(self, copy_gb_per_s: float = math.nan, *, judged: bool = True, noisy: bool = False) -> str:
        """met, MISSED, noisy, WRONG, skipped, - (not judged), or nothing where there is no target."""
        case = self.case
        if not self.reported:
            return "WRONG" if self.wrong else "skipped"
        if not judged:
            return "-"
        if case.target is None and case.share_target is None:
            return ""
        if noisy or self.noisy:
            return "noisy"
        kept = case.target is None or self.ratio.median <= case.target
        if case.share_target is not None:
            speed = (self.bytes_moved or 0) / statistics.median(self.times_ns)
            kept &= speed >= case.share_target * copy_gb_per_s
        return "met" if kept else "MISSED"


class Bench:
    """Runs cases: builds, warms up, checks, times in interleaved rounds, checks again.

    Args:
        rounds: timings of every pair, spread over the passes.
        passes: how often everything is built anew.
        tick: called with a word on what is going on, `ticks` times in all.
        device: on a GPU every case is built alone, as its memory holds no more.
        seconds: nothing begins later than this.
        done: called with the cases that were just timed.
    """

    def __init__(
        self, cases: Sequence[Case], rounds: int, passes: int = 1, tick: Tick = lambda what: None, device: str = "cpu",
        copy_bytes: int | None = None, seconds: float = math.inf, done: Callable[[list[Timed]], object] = len,
    ) -> None:  # fmt: skip
        self.timed = [Timed(case) for case in cases]
        self.bandwidth = Bandwidth(device, copy_bytes or COPY_BYTES[device])
        self.quietness = Quietness()
        self.state_bytes: dict[str, tuple[int, int]] = {}
        self._stopwatch = Stopwatch(device)
        self._rounds_of_pass = [rounds * (i + 1) // passes - rounds * i // passes for i in range(passes)]
        self._tick, self._device, self._seconds, self._done = tick, device, seconds, done

    @property
    def ticks(self) -> int:
        """An upper bound of the number of calls of ``tick``."""
        per_pass = len({(t.case.tensors, who) for t in self.timed for who in (t.case.contender, t.case.against)})
        return sum(per_pass + rounds * len(self.timed) for rounds in self._rounds_of_pass)

    def run(self) -> None:
        """Fill in `timed`, `bandwidth`, `quietness` and `state_bytes`."""
        began = time.monotonic()
        for number, rounds in enumerate(self._rounds_of_pass):
            for group in self._groups():
                group = [t for t in group if not t.trouble and _rounds_left(t)]
                if not group:
                    continue
                if time.monotonic() - began > self._seconds:
                    for timed in group:
                        timed.trouble = "no time was left"
                else:
                    run = self._run_peak if group[0].case.peak else self._run_group
                    _attempt(partial(run, group, rounds, seed=number), group)
                self._done(group)

    def restore(self, found: dict[str, Any]) -> None:
        """Take what another process measured, as `Report.to_dict` wrote it."""
        by_name = {timed.case.name: timed for timed in self.timed}
        for entry in found["cases"]:
            timed = by_name[entry["name"]]
            timed.trouble, timed.wrong = entry["trouble"], entry["verdict"] == "WRONG"
            timed.peaks = tuple(entry["peaks"]) if "peaks" in entry else None
            for side, times, size in (
                ("contender_run", "times_ns", "bytes_moved"),
                ("against_run", "against_ns", "against_bytes"),
            ):
                run = entry.get(side, {"times_ns": []})
                setattr(timed, times, run["times_ns"])
                setattr(timed, size, run.get("bytes_moved"))
        for what, times in found["bandwidth_times_ns"].items():
            self.bandwidth.times_ns[what] += times
        self.state_bytes |= {who: (size["held"], size["expected"]) for who, size in found["state_bytes"].items()}

    def _groups(self) -> list[list[Timed]]:
        """What is built at once."""
        if self._device == "cuda":
            return [[timed] for timed in self.timed]
        keys = dict.fromkeys((timed.case.tensors, timed.case.peak) for timed in self.timed)
        return [[timed for timed in self.timed if (timed.case.tensors, timed.case.peak) == key] for key in keys]

    def _run_group(self, group: list[Timed], rounds: int, seed: int) -> None:
        gc.collect()  # what the group before held
        if self._device == "cuda":
            torch.cuda.empty_cache()
        runners = self._prepared(group, seed)
        order = random.Random(seed)
        gc.disable()
        try:
            with self.quietness:
                for number in range(rounds):
                    self.bandwidth.measure(self._stopwatch)
                    for timed in order.sample(group, len(group)):
                        if not timed.trouble and _rounds_left(timed):
                            self._time_pair(timed, runners, number)
                        self._tick(timed.case.name)
        finally:
            gc.enable()
        for who, runner in runners.items():
            _attempt(runner.check_frozen, group, who)

    def _prepared(self, group: list[Timed], seed: int) -> dict[Contender, Runner]:
        runners: dict[Contender, Runner] = {}
        inputs = Inputs(group[0].case.tensors, seed, self._device)
        for who in dict.fromkeys(who for t in group for who in (t.case.against, t.case.contender)):
            self._tick(f"preparing and checking {who}")
            runner = _attempt(partial(_checked_runner, who, inputs), group, who)
            if runner is not None:
                runners[who] = runner
                if runner.state_bytes is not None:
                    self.state_bytes[f"{inputs.tensors}: {who}"] = runner.state_bytes
        inputs.forget_stock()
        for timed in group:
            if not timed.trouble:
                timed.bytes_moved = runners[timed.case.contender].bytes_moved
                timed.against_bytes = runners[timed.case.against].bytes_moved
        return runners

    def _time_pair(self, timed: Timed, runners: dict[Contender, Runner], number: int) -> None:
        pair = [(timed.times_ns, timed.case.contender), (timed.against_ns, timed.case.against)]
        for times, who in in_order(pair, number):
            times.append(self._stopwatch.time(runners[who].run, timed.case.warm))

    def _run_peak(self, group: list[Timed], rounds: int, seed: int) -> None:
        """Peak memory of the first steps beyond weights and gradients."""
        if self._device == "cpu":
            raise UnavailableError("needs a GPU's memory statistics")
        device = torch.device(self._device)
        for timed in group:
            peaks = []
            for who in (timed.case.contender, timed.case.against):
                runner = Runner(who, Inputs(timed.case.tensors, seed, self._device))
                gc.collect()
                before = restart_peak(device) or 0
                for _ in range(CHECKED_STEPS):
                    runner.run()
                torch.cuda.synchronize()
                peaks.append(peak(device) - before)
                del runner
            timed.peaks = peaks[0], peaks[1]


def _rounds_left(timed: Timed) -> bool:
    return timed.case.most_rounds is None or len(timed.times_ns) < timed.case.most_rounds


def _checked_runner(who: Contender, inputs: Inputs) -> Runner:
    runner = Runner(who, inputs)
    runner.warm_up()
    runner.check()
    return runner


def _attempt(act: Callable[[], T], group: Sequence[Timed], who: Contender | None = None) -> T | None:
    """``act()``; if that shows ``who`` to be wrong or not available, its cases in ``group`` are marked; None: all."""
    try:
        return act()
    except Exception as error:  # whatever it is, the other cases are measured
        for timed in group:
            if who in (None, timed.case.contender, timed.case.against):
                timed.trouble = str(error) or type(error).__name__
                timed.wrong = not isinstance(error, UnavailableError | BackendUnavailableError)
        return None


# ----------------------------------------------------------------------- what the benchmarks of one subject share


def at_least_one(text: str) -> int:
    """For `argparse`: a whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} was given, expected at least 1")
    return int(text)


def as_entry(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles as results hold them."""
    median, low, high = quartiles(values)
    return {"median": round(median, 4), "quartile_1": round(low, 4), "quartile_3": round(high, 4)}


def ratio_entry(times: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """`as_entry` of the ratios of what was timed in the same round."""
    return as_entry([a / b for a, b in zip(times, others, strict=True)])


def print_entry(label: str, entry: dict[str, float]) -> None:
    """One line: median and quartiles."""
    print(f"{label} {entry['median']:8.3f}  ({entry['quartile_1']:.3f} to {entry['quartile_3']:.3f})")


def case_options(kind: str, what: str | None, rounds: int) -> argparse.ArgumentParser:
    """The command line of ``python -m benchmarks.KIND``: rounds (by default so many), threads and folder."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{kind}", description=what)
    parser.add_argument("--rounds", type=at_least_one, default=rounds)
    parser.add_argument("--threads", type=at_least_one, default=2, help="torch threads (default 2)")
    parser.add_argument("--output", type=Path, help="folder for the results (default: results/)")
    return parser


def print_case(name: str, found: dict[str, dict[str, float]]) -> None:
    """A line for each entry."""
    for what, entry in found.items():
        print_entry(f"{name:24} {what:34}", entry)


def save_cases(kind: str, cases: dict[str, Any], given: argparse.Namespace) -> None:
    """`save_result` of cases, measured as `case_options` said."""
    report = {"date": time.strftime("%Y-%m-%d"), "threads": given.threads, "rounds": given.rounds, "cases": cases}
    save_result(kind, describe_machine(given.threads), report, given.output)


def results_folder() -> Path:
    """Where results go unless told otherwise: the folder that OUT names, or results/."""
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS


def save_json(path: Path, found: Any) -> None:
    """The old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.partial")
    temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def save_result(kind: str, machine: Machine, found: dict[str, Any], folder: Path | None = None) -> None:
    """Write ``kind-machine.json`` to ``folder`` (default: `results_folder`), the machine first."""
    path = (folder or results_folder()) / f"{kind}-{machine.slug}.json"
    save_json(path, {"cpu": machine.cpu, "cores": machine.cores, **found})
    print(f"Written to {path}")


def git_commit() -> str | None:
    """The commit that was measured, ``-dirty`` appended where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, cwd=RESULTS, capture_output=True, text=True, check=True).stdout.strip()
    return None
