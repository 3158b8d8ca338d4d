"""The one clock, contenders measured in turns, and what their times say: medians, quartiles, intervals.

What is compared is timed back to back, in an order that changes from round to round, so that slow drift of the machine
reaches all alike. The statistic is the median over rounds of the pair's ratio: the two members of a pair saw the same
machine, and a median ignores the rounds in which one of them was interrupted.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import torch
from torch.profiler import record_function

#: From the first phase's beginning to the last one's end, in what `Clock.read` returns.
WHOLE: Final = "whole step"
#: Interquartile range / median above which the machine is taken to have had other work.
MOST_SPREAD: Final = 0.15
_CONFIDENCE: Final = 0.95
_SETTLE_S: Final = 0.01  # longer than idle threads of an OpenMP team keep spinning
_WAIT_CYCLES: Final = 2_000_000  # of a GPU, about a millisecond: longer than the host takes to queue a step
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------- the clock


class Clock:
    """Times the phases of a step: on the CPU by the clock, on a GPU by events, which nothing waits for but `read`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []
        if self._on_gpu:
            torch.cuda.synchronize(device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside; in traces of `torch.profiler` it is a range ``safefreeze: name``."""
        with record_function(f"safefreeze: {name}"):
            begun = self._now()
            yield
            self._marks.append((name, begun, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Milliseconds per phase, summed over its times, and of the `WHOLE`."""
        if self._on_gpu:
            self._marks[-1][2].synchronize()
        times: dict[str, float] = {}
        for name, begun, ended in [*self._marks, (WHOLE, self._marks[0][1], self._marks[-1][2])]:
            spent = begun.elapsed_time(ended) if self._on_gpu else 1e3 * (ended - begun)
            times[name] = times.get(name, 0.0) + spent
        return times


def milliseconds(
    call: Callable[[], object],
    device: str = "cpu",
    *,
    wall: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time one call.

    On a GPU the time is the device's own: the call is queued behind a wait, so that the host's part is over before the
    measured part begins.

    Args:
        wall: on a GPU take the host's time too, until the device is done.
        clock: of the host, in seconds; `time.process_time` leaves out what other processes take.
    """
    if device == "cuda" and not wall:
        events = Clock(torch.device(device))
        torch.cuda._sleep(_WAIT_CYCLES)  # type: ignore[no-untyped-call]
        with events.phase("call"):
            call()
        return events.read()["call"]
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = clock()
    call()
    wait()
    return 1e3 * (clock() - began)


def settle() -> None:
    """Let idle threads of the call before fall asleep."""
    time.sleep(_SETTLE_S)


def last_level_cache() -> int:
    """Bytes of the largest cache; 0 where the system does not say."""
    found = [
        re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max([int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]] for size in found if size], default=0)


class ColdCaches:
    """Brings the processor to the same state before every call: other threads asleep, caches full of something else."""

    def __init__(self) -> None:
        self._other = torch.ones(max(2 * last_level_cache(), 64 << 20) // 4)

    def evict(self) -> None:
        """Settle, then read more than the caches hold. Leaves nothing to be written back."""
        settle()
        self._other.sum()


# ------------------------------------------------------------------------------------------------- taking turns


def in_order(contenders: Sequence[T], number: int) -> list[T]:
    """The order of a round: its first changes every round, and more than two turn round after each has been first."""
    n = len(contenders)
    order = [*contenders[number % n :], *contenders[: number % n]]
    return order[::-1] if n > 2 and number // n % 2 else order


def turns(contenders: Sequence[T], rounds: int, warmup: int = 0) -> Iterator[tuple[int, T]]:
    """Yield (number of the round, contender), each contender once a round; rounds below 0 warm up."""
    for number in range(-warmup, rounds):
        for contender in in_order(contenders, number):
            yield number, contender


def in_turns(measured: Mapping[str, Callable[[], T]], rounds: int, warmup: int = 0) -> dict[str, list[T]]:
    """Call each in every round; returns what the calls found in `rounds` rounds after the warm-up."""
    found: dict[str, list[T]] = {name: [] for name in measured}
    for number, name in turns(list(measured), rounds, warmup):
        value = measured[name]()
        if number >= 0:
            found[name].append(value)
    return found


# ----------------------------------------------------------------------------------------------- what times say


class Spread(NamedTuple):
    """A median, and how far the values behind it lie apart."""

    median: float
    low: float
    high: float


def quartiles(values: Sequence[float]) -> Spread:
    """Median and quartiles, interpolated linearly."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return Spread(median, low, high)


def median_ratio(times: Sequence[float], others: Sequence[float]) -> Spread:
    """The median of the ratios of what was timed in the same round, with its 95% interval (`median_interval`)."""
    if 0 in others:  # below the resolution of the device's clock
        return Spread(math.nan, 0.0, math.inf)
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    return Spread(statistics.median(ratios), *median_interval(ratios))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the median from order statistics; (0, inf) of fewer than 6 values, which have none.

    As many values lie below the true median as heads fall in so many throws of a coin, so the interval leaves out at
    either end as many values as come with a probability of at most 2.5%, by the binomial distribution itself. (Its
    normal approximation leaves out one too many for half of all counts: of 21 values it holds the median 92 times in
    100.)
    """
    n, skip, outside = len(values), 0, 0.0
    while 2 * (outside := outside + math.comb(n, skip) / 2**n) <= 1 - _CONFIDENCE:
        skip += 1
    ordered = sorted(values)
    return (ordered[skip - 1], ordered[n - skip]) if skip else (0.0, math.inf)


def was_busy(times: Sequence[float], most: float = MOST_SPREAD) -> bool:
    """Whether times of the same work vary so much that the machine had other work: their quartiles lie ``most`` of the
    median apart, or more."""
    median, low, high = quartiles(times)
    return high - low > most * median
