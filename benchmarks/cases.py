"""What is timed. A case is data: two contenders on the same tensors, and the ratio that is promised."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

Storage = Literal["fp32", "bf16", "int8"]  # the last of state alone


@dataclass(frozen=True)
class TensorSet:
    """Parameters of one shape."""

    count: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of all of them."""
        return self.count * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.count:,} × {'×'.join(map(str, self.shape))}"


@dataclass(frozen=True)
class Freeze:
    """A pattern: this share of rows, columns or single elements, scattered; another draw for every tensor."""

    kind: Literal["nothing", "rows", "columns", "elements"] = "nothing"
    share: float = 0.0

    def __str__(self) -> str:
        return "nothing frozen" if self.kind == "nothing" else f"{100 * self.share:.3g}% of {self.kind}"


NOTHING: Final = Freeze()


def rows(share: float) -> Freeze:
    """This share of the rows."""
    return Freeze("rows", share)


@dataclass(frozen=True)
class Contender:
    """One way to do the work: a method, what is frozen, how weights (with gradients) and state are stored."""

    method: str  # a key of `contenders.BUILDERS`
    freeze: Freeze = NOTHING
    weights: Storage = "fp32"
    state: Storage = "fp32"

    def __str__(self) -> str:
        storage = "" if self.weights == self.state == "fp32" else f", {self.weights}/{self.state}"
        return f"{self.method}{storage}" if self.freeze == NOTHING else f"{self.method}, {self.freeze}{storage}"


@dataclass(frozen=True)
class Case:
    """``contender``'s time as a multiple of ``against``'s, on the same tensors.

    ``target`` is the largest ratio that keeps the promise, ``share_target`` the least share of a copy's bandwidth;
    without either the case is there to be looked at. ``most_rounds`` caps the rounds of what is slow to run or to
    prepare. ``warm``: the call just before was the same, so that what the host looks up, and small tensors themselves,
    may still be in cache; on a GPU the host's time is taken. ``peak``: not the times are compared but the most memory
    that first steps take.
    """

    name: str
    tensors: TensorSet
    contender: Contender
    against: Contender
    target: float | None = None
    most_rounds: int | None = None
    warm: bool = False
    share_target: float | None = None
    peak: bool = False


LARGE: Final = TensorSet(24, (1024, 1024))  # 400 MB of weights, gradients and state: no cache holds it
SMALL: Final = TensorSet(4096, (1024,))
TINY: Final = TensorSet(300, (4, 4))  # a step whose arithmetic is nothing

FUSED: Final = Contender("torch fused")
FUSED_BF16: Final = Contender("torch fused", weights="bf16", state="bf16")
BITS_8: Final = Contender("bitsandbytes AdamW8bit", weights="bf16", state="int8")


ZERO: Final = Contender("zero_frozen_grads_", rows(0.075))
MULTIPLY: Final = Contender("grad.mul_(mask)", rows(0.075))


def masked(freeze: Freeze = NOTHING, weights: Storage = "fp32", state: Storage = "fp32") -> Contender:
    """`MaskedAdamW`."""
    return Contender("masked", freeze, weights, state)


def practice(share: float) -> Contender:
    """Today's: mask gradients, step, put this share of frozen rows back."""
    return Contender("mask + step + restore", rows(share))


CASES: Final[tuple[Case, ...]] = (
    # what is promised
    Case("nothing frozen", LARGE, masked(), FUSED, 1.00),
    Case("7.5% of rows frozen", LARGE, masked(rows(0.075)), FUSED, 0.95),
    Case("20% of rows frozen", LARGE, masked(rows(0.2)), FUSED, 0.83),
    Case("50% of rows frozen", LARGE, masked(rows(0.5)), FUSED, 0.54),
    Case("80% of rows frozen", LARGE, masked(rows(0.8)), FUSED, 0.24),
    Case("80% of columns frozen", LARGE, masked(Freeze("columns", 0.8)), FUSED, 0.45),
    Case("7.5% of elements frozen", LARGE, masked(Freeze("elements", 0.075)), FUSED, 1.02),
    Case("50% of elements frozen", LARGE, masked(Freeze("elements", 0.5)), FUSED, 0.80),
    Case("80% of elements frozen", LARGE, masked(Freeze("elements", 0.8)), FUSED, 0.66),
    Case("4,096 small tensors", SMALL, masked(), FUSED, 0.25),
    Case("4,096 small tensors, warm", SMALL, masked(), FUSED, 0.25, warm=True),
    Case("300 tiny tensors, warm: the host", TINY, masked(rows(0.25)), FUSED, 0.25, warm=True),
    Case("bf16 weights, fp32 state", LARGE, masked(weights="bf16"), FUSED, 0.85),
    Case("all bf16 / torch bf16", LARGE, masked(weights="bf16", state="bf16"), FUSED_BF16, 0.75),
    Case("8-bit state", LARGE, masked(state="int8"), FUSED, 0.75),
    Case("8-bit state, 80% of rows frozen", LARGE, masked(rows(0.8), state="int8"), FUSED, 0.20),
    Case("bf16 weights, 8-bit state / bitsandbytes", LARGE, masked(weights="bf16", state="int8"), BITS_8, 0.80, 10),
    Case("7.5% rows / today's practice", LARGE, masked(rows(0.075)), practice(0.075), 0.55),
    Case("zero_frozen_grads_ / mul_", LARGE, ZERO, MULTIPLY, 0.08),
    Case("zero_frozen_grads_ / mul_, warm", LARGE, ZERO, MULTIPLY, 0.08, warm=True),
    # today's practice (mask gradients, step, put frozen rows back) where more is frozen, and the peers
    Case("50% rows / today's practice", LARGE, masked(rows(0.5)), practice(0.5)),
    Case("80% rows / today's practice", LARGE, masked(rows(0.8)), practice(0.8)),
    Case("torch foreach", LARGE, Contender("torch foreach"), FUSED),
    Case("torch for-loop", LARGE, Contender("torch for-loop"), FUSED),
    Case("torch.compile", LARGE, Contender("torch.compile"), FUSED, most_rounds=10),
    Case("optimi", LARGE, Contender("optimi"), FUSED),
    Case("today's practice, 7.5% rows", LARGE, practice(0.075), FUSED),
    Case("today's practice, 50% rows", LARGE, practice(0.5), FUSED),
    Case("today's practice, 80% rows", LARGE, practice(0.8), FUSED),
    Case("our reference backend", LARGE, Contender("masked, reference backend"), FUSED, most_rounds=3),
)


def shrink(case: Case) -> Case:
    """The same case on tensors small enough to try the harness; its ratios mean nothing."""
    count, shape = case.tensors.count, case.tensors.shape
    tensors = TensorSet(max(count // 16, 4), tuple(min(n, 256) for n in shape))
    return replace(case, tensors=tensors)


def distinct_contenders(cases: tuple[Case, ...] = CASES) -> list[tuple[TensorSet, Contender]]:
    """Every contender once, with its tensors, in order of appearance."""
    return list(dict.fromkeys((case.tensors, who) for case in cases for who in (case.against, case.contender)))
