"""Timing: interleaved pairs, cold caches, robust statistics, copy bandwidth, and how quiet the machine was.

A case's two contenders are timed back to back, in alternating order, and every case takes its turn in every round, in
an order drawn anew. So slow drift of the machine reaches all alike, and within a pair it cancels. The statistic is the
**median over rounds of the pair's ratio**: the two members of a pair saw the same machine, and a median ignores the
rounds in which one of them was interrupted. Its 95% interval is the binomial one, from order statistics. The ratio of
the two minima stands beside it: interruptions only ever add time, so the minima are what a silent machine would show;
where the two disagree the machine was not quiet. All is built anew in every pass, so that one lucky or unlucky
placement in memory does not decide.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from .cases import Case, Contender, TensorSet
from .contenders import Inputs, ResultDiffersError, Runner, UnavailableError

__all__ = ["Bandwidth", "Bench", "Machine", "Quietness", "Stopwatch", "Timed", "describe_machine", "quartiles"]

MOST_FOREIGN: Final = 0.05  # share of the machine's time others may take before a run is not judged
MOST_SPREAD: Final = 0.15  # interquartile range / median of times, above which a case too near its target is not judged
_SETTLE_S: Final = 0.01  # longer than idle threads of an OpenMP team keep spinning
_COPY_BYTES: Final = 256 << 20
Tick = Callable[[str], None]
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

    @property
    def slug(self) -> str:
        """The processor's name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", self.cpu.lower())).strip("-") or "unknown-cpu"


def describe_machine(threads: int) -> Machine:
    """Read what the system says about itself."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return Machine(
        cpu=(names or [platform.processor() or platform.machine()])[0].strip(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=threads,
        cache_bytes=_last_level_cache(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        environment={
            key: value for key, value in sorted(os.environ.items())
            if key.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "SAFEFREEZE_")) or key == "THP_MEM_ALLOC_ENABLE"
        },
    )  # fmt: skip


def _last_level_cache() -> int:
    """Bytes; 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes)


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
    _began: tuple[float, float, float, float] | None = None

    def __enter__(self) -> Quietness:
        if not self.load_before:
            self.load_before = _load()
        self._began = _clocks()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._began is not None
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
    """Times one call at a time, each from the same state: other threads asleep, caches full of something else."""

    def __init__(self, machine: Machine) -> None:
        self._cold = torch.ones(max(2 * machine.cache_bytes, 64 << 20) // 4)

    def evict(self) -> None:
        """Let idle threads fall asleep, then read more than the caches hold. Leaves nothing to be written back."""
        time.sleep(_SETTLE_S)
        self._cold.sum()

    def time(self, call: Callable[[], Any], warm: bool = False) -> int:
        """Nanoseconds of one call; ``warm``: of the second of two."""
        self.evict()
        if warm:
            call()
        began = time.perf_counter_ns()
        call()
        return time.perf_counter_ns() - began


class Bandwidth:
    """Copy and read-modify-write of a large tensor, timed in the same rounds as everything else.

    Bytes are counted as read + written. A copy also makes the processor read what it overwrites, which is not counted:
    the read-modify-write figure is nearer to what an optimizer step can reach.
    """

    def __init__(self) -> None:
        self._source = torch.ones(_COPY_BYTES // 4)
        self._target = torch.ones(_COPY_BYTES // 4)
        self.times_ns: dict[str, list[int]] = {"copy": [], "read_modify_write": []}

    def measure(self, stopwatch: Stopwatch) -> None:
        """One timing of each."""
        self.times_ns["copy"].append(stopwatch.time(lambda: self._target.copy_(self._source)))
        self.times_ns["read_modify_write"].append(stopwatch.time(lambda: self._target.add_(1.0)))

    def gb_per_s(self, what: str) -> float:
        """From the median time."""
        return 2 * _COPY_BYTES / statistics.median(self.times_ns[what])


# ------------------------------------------------------------------------------------------------- many timings


@dataclass
class Timed:
    """A case and its times, in pairs. ``trouble`` says why there are none, or why they do not count."""

    case: Case
    times_ns: list[int] = field(default_factory=list)
    against_ns: list[int] = field(default_factory=list)
    bytes_moved: int | None = None
    against_bytes: int | None = None
    trouble: str = ""
    wrong: bool = False

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.times_ns, self.against_ns, strict=True)]

    @property
    def ratio(self) -> float:
        """Median over rounds of contender / against."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of that median (binomial; the extremes where there are too few rounds for one)."""
        ordered = sorted(self.ratios)
        skip = max(math.floor((len(ordered) - 1.96 * math.sqrt(len(ordered))) / 2), 0)
        return ordered[skip], ordered[-1 - skip]

    @property
    def ratio_of_minima(self) -> float:
        return min(self.times_ns) / min(self.against_ns)

    @property
    def spread(self) -> float:
        """The larger of the two contenders' interquartile range / median."""
        return max(_spread(self.times_ns), _spread(self.against_ns))

    @property
    def noisy(self) -> bool:
        """Whether times spread so much, and the target lies so near, that another run might end otherwise."""
        low, high = self.interval
        return self.spread > MOST_SPREAD and self.case.target is not None and low <= self.case.target <= high

    @property
    def reported(self) -> bool:
        """Whether there are times of checked results."""
        return bool(self.times_ns) and not self.wrong


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """As results hold them."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, 4), "quartile_1": round(low, 4), "quartile_3": round(high, 4)}


def _spread(times: Sequence[int]) -> float:
    if len(times) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


class Bench:
    """Runs cases: builds, warms up, checks, times in interleaved rounds, checks again.

    Args:
        rounds: timings of every pair, spread over the passes.
        passes: how often everything is built anew.
        tick: called with a word on what is going on, `ticks` times in all.
    """

    def __init__(self, cases: Sequence[Case], machine: Machine, rounds: int, passes: int, tick: Tick) -> None:
        self.timed = [Timed(case) for case in cases]
        self.bandwidth = Bandwidth()
        self.quietness = Quietness()
        self.state_bytes: dict[str, tuple[int, int]] = {}
        self._stopwatch = Stopwatch(machine)
        self._rounds_of_pass = [rounds * (i + 1) // passes - rounds * i // passes for i in range(passes)]
        self._tick = tick

    @property
    def ticks(self) -> int:
        """An upper bound of the number of calls of ``tick``."""
        per_pass = len({(t.case.tensors, who) for t in self.timed for who in (t.case.contender, t.case.against)})
        return sum(per_pass + rounds * len(self.timed) for rounds in self._rounds_of_pass)

    def run(self) -> None:
        """Fill in `timed`, `bandwidth`, `quietness` and `state_bytes`."""
        for number, rounds in enumerate(self._rounds_of_pass):
            for tensors in dict.fromkeys(timed.case.tensors for timed in self.timed):
                self._run_group(tensors, rounds, seed=number)

    def _run_group(self, tensors: TensorSet, rounds: int, seed: int) -> None:
        group = [t for t in self.timed if t.case.tensors == tensors and not t.trouble and _rounds_left(t)]
        gc.collect()  # what the group before held
        runners = self._prepared(group, Inputs(tensors, seed))
        order = random.Random(seed)
        gc.disable()
        try:
            with self.quietness:
                for number in range(rounds):
                    self.bandwidth.measure(self._stopwatch)
                    for timed in order.sample(group, len(group)):
                        if not timed.trouble and _rounds_left(timed):
                            self._time_pair(timed, runners, contender_first=number % 2 == 0)
                        self._tick(timed.case.name)
        finally:
            gc.enable()
        for who, runner in runners.items():
            _attempt(runner.check_frozen, group, who)

    def _prepared(self, group: list[Timed], inputs: Inputs) -> dict[Contender, Runner]:
        runners: dict[Contender, Runner] = {}
        for who in dict.fromkeys(who for t in group for who in (t.case.against, t.case.contender)):
            self._tick(f"preparing and checking {who}")
            runner = _attempt(partial(_checked_runner, who, inputs), group, who)
            if runner is None:
                continue
            runners[who] = runner
            if runner.state_bytes is not None:
                self.state_bytes[f"{inputs.tensors}: {who}"] = runner.state_bytes
        inputs.forget_stock()
        for timed in group:
            if not timed.trouble:
                timed.bytes_moved = runners[timed.case.contender].bytes_moved
                timed.against_bytes = runners[timed.case.against].bytes_moved
        return runners

    def _time_pair(self, timed: Timed, runners: dict[Contender, Runner], contender_first: bool) -> None:
        pair = [(timed.times_ns, timed.case.contender), (timed.against_ns, timed.case.against)]
        for times, who in pair if contender_first else reversed(pair):
            times.append(self._stopwatch.time(runners[who].run, timed.case.warm))


def _rounds_left(timed: Timed) -> bool:
    return timed.case.most_rounds is None or len(timed.times_ns) < timed.case.most_rounds


def _checked_runner(who: Contender, inputs: Inputs) -> Runner:
    runner = Runner(who, inputs)
    runner.warm_up()
    runner.check()
    return runner


def _attempt(act: Callable[[], T], group: Sequence[Timed], who: Contender) -> T | None:
    """``act()``; if that shows ``who`` to be wrong or not available, its cases in ``group`` are marked."""
    try:
        return act()
    except (UnavailableError, ResultDiffersError) as error:
        for timed in group:
            if who in (timed.case.contender, timed.case.against):
                timed.trouble, timed.wrong = str(error), isinstance(error, ResultDiffersError)
        return None
