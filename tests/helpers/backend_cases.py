"""What every GPU backend must do, as data: `CASES`, and `check`, which compares a backend with `cpu` bit for bit.

The kernels run wherever they can: interpreted, compiled for the host, or on a GPU. Nothing here is special to one.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DTYPES, assert_same_bits, bits, short
from torch import Tensor

import safefreeze_kernels as sf
from safefreeze_kernels.kernels.ages import Ages
from safefreeze_kernels.kernels.backend import Backend, choose_backend
from safefreeze_kernels.kernels.operands import SCALARS, AdamWOperands, adamw_scalars
from safefreeze_kernels.kernels.parts import Part, WorkList, compile_frozen, compile_live
from safefreeze_kernels.kernels.tiles import TILE_ELEMENTS
from safefreeze_kernels.plan.mask import FreezeMask
from safefreeze_kernels.plan.plan import FreezePlan

FP32, BF16, FP16 = DTYPES
INT8 = torch.int8  # of state: codes
CPU = torch.device("cpu")
GUARD = 64  # bytes on either side of every tensor that nobody may touch
GUARD_BYTE = 0xA5
NORMS = ("sum_of_squares", "sum_of_absolutes", "largest_absolute")


# ---------------------------------------------------------------------------------------------------------- masks

Layout = list[tuple[FreezeMask, Ages | None]]


def scattered(
    shape: tuple[int, ...], rows: bool = False, cols: bool = False, elements: bool = False, half: bool = False
) -> FreezeMask:
    """About a third of the rows or columns, alone and in pairs; a tenth, or half, of the elements."""
    n_rows, n_cols = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)
    rng = np.random.default_rng(n_rows * 1000 + n_cols)
    return FreezeMask(
        shape,
        rows=np.flatnonzero(np.arange(n_rows) % 7 % 3 == 1) if rows else None,
        cols=np.flatnonzero(np.arange(n_cols) % 11 % 4 == 2) if cols else None,
        elements=torch.from_numpy(rng.random(shape) < (0.5 if half else 0.1)) if elements or half else None,
    )


def thawed(shape: tuple[int, ...], **frozen: bool) -> tuple[FreezeMask, Ages]:
    """What is left of ``frozen`` after two changes of plan: the first thaws half of it, the second the rest."""
    whole = scattered(shape, **frozen)
    half = FreezeMask(
        shape,
        rows=whole.rows[::2] if frozen.get("rows") else None,
        cols=whole.cols[::2] if frozen.get("cols") else None,
        elements=whole.elements & (torch.arange(whole.numel).view(shape) % 2 == 0)
        if whole.elements is not None
        else None,
    )
    last = FreezeMask(shape, rows=[0]) if len(shape) > 1 else FreezeMask(shape)
    return last, Ages.none(whole).after(whole, half, 1).after(half, last, 3)


def ageless(*masks: FreezeMask) -> Layout:
    return [(mask, None) for mask in masks]


# Rows shorter than 256 elements become a list of elements, longer ones tiles of their own: both are here each time, and
# both widths at which 16-byte accesses are possible and widths at which they are not.
LAYOUTS: Mapping[str, Layout] = {
    "freeze_none": ageless(*(FreezeMask(shape) for shape in ((), (3,), (40,), (7, 33), (2, 3, 5), (4, 160)))),
    "freeze_rows": ageless(*(scattered(shape, rows=True) for shape in ((30,), (9, 24), (20, 22), (7, 320), (5, 257)))),
    "freeze_cols": ageless(*(scattered(shape, cols=True) for shape in ((9, 40), (3, 450), (2, 2, 21)))),
    "freeze_rows_and_cols": ageless(*(scattered(shape, rows=True, cols=True) for shape in ((9, 40), (5, 450)))),
    "freeze_elements": ageless(*(scattered(shape, elements=True) for shape in ((5,), (8, 24), (3, 330), (9, 33)))),
    "freeze_rows_and_elements": ageless(
        *(scattered(shape, rows=True, elements=True) for shape in ((9, 24), (5, 320), (4, 257))),
        # aligned addresses, in the middle of a byte of the bits
        FreezeMask((5, 260), rows=[0], elements=scattered((5, 260), elements=True).elements),
    ),
    "freeze_cols_and_elements": ageless(*(scattered(shape, cols=True, elements=True) for shape in ((9, 24), (2, 450)))),
    "thawed_rows": [thawed((9, 24), rows=True), thawed((7, 320), rows=True), thawed((30,), rows=True)],
    "thawed_cols": [thawed((9, 24), cols=True), thawed((3, 900), cols=True), thawed((5, 33), rows=True, cols=True)],
    "half_of_elements": ageless(*(scattered(shape, half=True) for shape in ((40,), (9, 33), (5, 1100), (2, 9001)))),
    "thawed_elements": [
        thawed((9, 24), elements=True), thawed((3, 330), elements=True), thawed((5, 33), cols=True, elements=True)
    ],
    "freeze_all": ageless(
        FreezeMask((4, 8), rows=range(4)), FreezeMask((3, 9), elements=torch.ones(3, 9, dtype=torch.bool)),
        FreezeMask((5, 2), cols=range(2)),
    ),
    "empty": ageless(*(FreezeMask(shape) for shape in ((0,), (0, 5), (4, 0)))),
    "many_tiles": [
        (FreezeMask((TILE_ELEMENTS + 9,)), None), (scattered((2, TILE_ELEMENTS + 8), rows=True), None),
        (scattered((2, TILE_ELEMENTS // 2 + 200), elements=True), None), thawed((60, 220), cols=True),
        (scattered((40, 576), rows=True), None), thawed((70, 264), rows=True),  # several rows to a tile
    ],
    "everything": [
        (FreezeMask((50,)), None), (scattered((5, 257), rows=True), None), (scattered((4, 330), cols=True), None),
        (scattered((9, 40), rows=True, elements=True), None), thawed((9, 24), rows=True, cols=True),
        (FreezeMask((0, 4)), None), (scattered((6, 8), rows=True, cols=True), None),
    ],
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One call of one operation on one list of tensors.

    ``frozen``: over the frozen list. ``missing``: every third gradient is not there. ``offset``: elements of (tensor,
    gradient, packed twins) before the first, so that addresses are odd ones.
    """

    op: str
    layout: str
    dtype: torch.dtype = FP32
    frozen: bool = False
    missing: bool = False
    offset: tuple[int, int, int] = (0, 0, 0)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        marks = [self.op, self.layout, short(self.dtype)]
        marks += ["frozen list"] * self.frozen + ["missing"] * self.missing
        marks += [f"offset {self.offset}"] * any(self.offset)
        return " ".join([*marks, *(f"{key}={shown_option(value)}" for key, value in self.options.items())])


def shown_option(value: Any) -> str:
    return short(value) if isinstance(value, torch.dtype) else str(value)


def _cases() -> Iterator[Case]:
    remainder, stochastic = {"rounding": "remainder"}, {"rounding": "stochastic"}
    for layout in LAYOUTS:
        for dtype in DTYPES:
            yield Case("adamw_", layout, dtype)
            yield Case("adamw_", layout, dtype, options={"whole_state": True})
            yield Case("scale_", layout, dtype, options={"factor": 0.3})
            yield Case("norm", layout, dtype, options={"kind": "sum_of_squares"})
        yield Case("adamw_", layout, BF16, options=remainder)
        yield Case("adamw_", layout, BF16, options=stochastic)
        yield Case("adamw_", layout, BF16, options={"packed_grads": True, "state": FP32})
        yield Case("adamw_", layout, BF16, options={**stochastic, "whole_state": True})
        yield Case("adamw_", layout, FP32, options={"amsgrad": True, "state": BF16})
        yield Case("adamw_", layout, BF16, options={"whole_state": True, "state": BF16, **remainder})
        for dtype, options in ((FP32, {}), (BF16, stochastic), (BF16, {"whole_state": True, **remainder})):
            yield Case("adamw_", layout, dtype, options={**options, "state": INT8})
        yield Case("norm", layout, BF16, frozen=True, options={"kind": "sum_of_squares"})
        yield Case("norm", layout, FP32, options={"kind": "sum_of_absolutes"})
        yield Case("norm", layout, FP16, frozen=True, options={"kind": "largest_absolute"})
        for dtype in (FP32, BF16):  # bytes: only the width matters
            yield Case("zero_", layout, dtype, frozen=True)
            yield Case("gather", layout, dtype, options={"whole_state": True})
            yield Case("scatter_", layout, dtype, options={"whole_state": True})
            for frozen in (True, False):
                yield Case("gather", layout, dtype, frozen=frozen)
                yield Case("scatter_", layout, dtype, frozen=frozen)
    for dtype in DTYPES:
        for state in (FP32, BF16):
            yield Case("adamw_", "everything", dtype, options={"state": state, "amsgrad": True, "l2": True})
        yield Case("adamw_", "freeze_elements", dtype, options={"state": BF16})
        yield Case("adamw_", "freeze_elements", dtype, options={"state": BF16, "whole_state": True, "special": True})
        yield Case("adamw_", "everything", dtype, missing=True, options={"state": BF16})
        yield Case("zero_", "everything", dtype, missing=True)
        yield Case("scale_", "everything", dtype, missing=True, options={"factor": -0.75})
        for kind in NORMS:
            yield Case("norm", "everything", dtype, missing=True, options={"kind": kind})
            yield Case("norm", "everything", dtype, options={"kind": kind, "special": True})
        for offset in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 5, 7)):
            yield Case("adamw_", "everything", dtype, offset=offset)
            yield Case("adamw_", "everything", dtype, offset=offset, options={"packed_grads": True})
            yield Case("gather", "everything", dtype, frozen=True, offset=offset)
            yield Case("scatter_", "everything", dtype, offset=offset)
            yield Case("adamw_", "everything", dtype, offset=offset, options={"whole_state": True, "amsgrad": True})
        yield Case("zero_", "everything", dtype, offset=(0, 1, 0))
        yield Case("scale_", "everything", dtype, offset=(0, 1, 0), options={"factor": 0.5})
        yield Case("norm", "everything", dtype, offset=(0, 1, 0), options={"kind": "sum_of_squares"})
        yield Case("adamw_", "everything", dtype, options={"maximize": True, "special": True})
        for factor in (1.0, 1.5, math.inf, math.nan, 0.0):
            yield Case("scale_", "everything", dtype, options={"factor": factor, "special": True})
    for dtype in DTYPES:
        coded = {"state": INT8, "amsgrad": True}
        yield Case("adamw_", "everything", dtype, options={**coded, "l2": True, "special": True})
        yield Case("adamw_", "everything", dtype, missing=True, options={**coded, "seed": 2**63 + 5})
        yield Case("adamw_", "everything", dtype, offset=(1, 3, 5), options={**coded, "packed_grads": True})
        yield Case("adamw_", "everything", dtype, offset=(0, 0, 4), options={**coded, "on_device": True, "skip": 0.0})
    for dtype, rounding in ((BF16, remainder), (BF16, stochastic), (FP16, stochastic)):
        for state, amsgrad in itertools.product((FP32, BF16, INT8), (False, True)):
            yield Case("adamw_", "everything", dtype, options={**rounding, "state": state, "amsgrad": amsgrad})
    for options in (
        {"l2": True}, {"skip": 0.0}, {"skip": 1.0}, {"skip": math.nan}, {"multiplier": 0.37}, {"multiplier": math.nan},
        {"on_device": True}, {"on_device": True, "skip": 0.0, "multiplier": 3.0, "amsgrad": True},
    ):  # fmt: skip
        yield Case("adamw_", "everything", FP32, options=options)
        yield Case("adamw_", "everything", BF16, options={**remainder, **options})
    for rounding in (remainder, stochastic):
        yield Case("adamw_", "everything", BF16, offset=(1, 3, 5), options=rounding)
        yield Case("adamw_", "everything", BF16, missing=True, options={**rounding, "state": BF16})
        yield Case("adamw_", "everything", BF16, options={**rounding, "amsgrad": True, "l2": True, "special": True})
        yield Case("adamw_", "freeze_elements", BF16, options={**rounding, "amsgrad": True})
    yield Case("adamw_", "everything", BF16, options={**stochastic, "seed": 2**63 + 5, "on_device": True})
    for options in ({}, {"amsgrad": True}, {"master": "remainder"}, {"rounding": "stochastic"}, {"capturable": True}):
        yield Case("MaskedAdamW", "", BF16, options=options)
        for thawed in ("fresh", "kept"):
            yield Case("MaskedAdamW", "", BF16, options={**options, "thawed": thawed})
    yield Case("MaskedAdamW", "", FP32, options={"state_dtype": BF16})
    for options in ({}, {"amsgrad": True}, {"capturable": True}):
        yield Case("MaskedAdamW", "", FP32, options={**options, "state_dtype": INT8, "thawed": "fresh"})
    for dtype in DTYPES:
        yield Case("guard", "", dtype)
        yield Case("zero_frozen_grads_", "", dtype)
        for norm_type in (2.0, 1.0, math.inf):
            yield Case("clip_grad_norm_", "", dtype, options={"norm_type": norm_type})


CASES: Sequence[Case] = tuple(_cases())


# ----------------------------------------------------------------------------------------------------- one runner


def check(backend: Backend, device: torch.device, case: Case) -> None:
    """Fail, naming the tensor, its first wrong element and both values, unless ``backend`` does what `cpu` does.

    Norms are sums: they agree to rounding, and are the same bits from run to run. A computed NaN equals any NaN.
    """
    what = f"{backend.name}: {case}"
    run = _on_surface if case.op in SURFACE else _on_list
    expected = run(choose_backend("cpu", CPU, "check"), CPU, case)
    got = run(backend, device, case)
    if case.op in ("norm", "clip_grad_norm_"):
        value, right = got.tensors.pop("norm"), expected.tensors.pop("norm")
        torch.testing.assert_close(
            value.double(), right.double(), rtol=1e-12 if case.op == "norm" else 1e-7, atol=0.0, equal_nan=True,
            msg=lambda message: f"{what}: {message}",
        )  # fmt: skip
        again = run(backend, device, case).tensors["norm"]
        assert_same_bits(again, value, f"{what}: norm, run again", any_nan=True)
    computed = case.op not in ("zero_", "gather", "scatter_", "zero_frozen_grads_")
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in got.tensors.items():
        assert_same_bits(tensor, expected.tensors[name], f"{what}: {name}", any_nan=computed)
        if name in got.frozen:
            where = got.frozen[name]
            assert_same_bits(tensor, expected.tensors[name], f"{what}: frozen part of {name}", where=where)
    for name, memory in got.around.items():
        assert bool((memory == GUARD_BYTE).all()), f"{what}: memory beside {name} was written to"


@dataclass
class Outcome:
    """Copies on the CPU: tensors by name; which elements of them were frozen; the bytes beside them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    around: dict[str, Tensor] = field(default_factory=dict)


class Memory:
    """Gives out tensors between guard bytes, and looks at them again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.given: dict[str, tuple[Tensor, Tensor, int]] = {}

    def holding(self, name: str, content: Tensor, offset: int) -> Tensor:
        """A copy of ``content``, ``offset`` elements behind an address that is a multiple of 64."""
        width = content.element_size()
        first, size = GUARD + offset * width, content.numel() * width
        memory = torch.full((first + size + GUARD,), GUARD_BYTE, dtype=torch.uint8, device=self.device)
        tensor = memory[first : first + size].view(content.dtype).view(content.shape)
        self.given[name] = tensor.copy_(content), memory, first
        return tensor

    def outcome(self) -> Outcome:
        found = Outcome()
        for name, (tensor, memory, first) in self.given.items():
            found.tensors[name] = tensor.cpu().clone()
            size = tensor.numel() * tensor.element_size()
            found.around[name] = torch.cat([memory[:first], memory[first + size :]]).cpu()
        return found


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, special: bool = False) -> Tensor:
    """Normal values; ``special``: with NaN, infinities, denormals, signed zeros and large ones among them."""
    drawn = rng.standard_normal(shape, np.float32)
    if special:
        rare = np.array([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-41, 6e-8, -65519.0, 3.4e38], np.float32)
        drawn = np.where(rng.random(shape) < 0.1, rng.choice(rare, shape), drawn)
    return torch.from_numpy(np.asarray(drawn, np.float32)).to(dtype)


def _on_list(backend: Backend, device: torch.device, case: Case) -> Outcome:
    """Runs one operation of the contract, on tensors drawn from the case's name."""
    options = dict(case.options)
    special, whole = options.pop("special", False), options.get("whole_state", False)
    rng = np.random.default_rng(sum(map(ord, str(case))))
    memory = Memory(device)
    masks, ages = zip(*LAYOUTS[case.layout], strict=True)
    work = compile_frozen(masks) if case.frozen else compile_live(masks, ages, whole_state=whole)
    shapes = [mask.shape if whole else mask.packed_shape for mask in masks]
    at_tensor, at_grad, at_packed = case.offset
    packings = ["packed_grads" in options and i % 3 != 1 for i in range(len(masks))]  # not of all tensors

    def given(kind: str, shape: Sequence[int], index: int, offset: int, dtype: torch.dtype, **kwargs: Any) -> Tensor:
        return memory.holding(f"{kind} {index}", values(rng, tuple(shape), dtype, **kwargs), offset)

    def grads() -> list[Tensor | None]:
        drawn = [
            given("gradient", shape, i, at_grad, case.dtype, special=special)
            for i, shape in enumerate(
                shape if is_packed else mask.shape
                for shape, mask, is_packed in zip(shapes, masks, packings, strict=True)
            )
        ]
        for grad, mask, is_packed in zip(drawn, masks, packings, strict=True):
            if is_packed:
                continue
            if case.op in ("adamw_", "scale_") or (case.op == "norm" and not case.frozen):
                grad[mask.dense().to(device)] = math.nan  # must not be read
        return [None if case.missing and i % 3 == 1 else grad for i, grad in enumerate(drawn)]

    if case.op == "adamw_":
        options["packed_grads"] = packings
        _adamw(backend, work, masks, shapes, given, grads(), case, options, rng, memory)
    elif case.op == "norm":
        norm = backend.norm(work, grads(), **options)
    elif case.op == "scale_":
        backend.scale_(work, grads(), torch.tensor(options["factor"], dtype=torch.float32, device=device))
    elif case.op == "zero_":
        backend.zero_(work, grads())
    else:
        tensors = [given("tensor", mask.shape, i, at_tensor, case.dtype, special=True) for i, mask in enumerate(masks)]
        packed = [given("twin", (n,), i, at_packed, case.dtype, special=True) for i, n in enumerate(work.packed_sizes)]
        (backend.gather if case.op == "gather" else backend.scatter_)(work, tensors, packed)
    found = memory.outcome()
    if case.op == "norm":
        found.tensors["norm"] = torch.as_tensor(norm, dtype=torch.float64).cpu()
    kind = {"adamw_": "tensor", "scale_": "gradient"}.get(case.op)
    found.frozen = {f"{kind} {i}": mask.dense() for i, mask in enumerate(masks)} if kind else {}
    return found


def _adamw(
    backend: Backend, work: WorkList, masks: Sequence[FreezeMask], shapes: Sequence[tuple[int, ...]],
    given: Callable[..., Tensor], grads: list[Tensor | None], case: Case, options: dict[str, Any],
    rng: np.random.Generator, memory: Memory,
) -> None:  # fmt: skip
    at_tensor, _, at_packed = case.offset
    state, rounding = options.get("state", FP32), options.get("rounding", "nearest")
    amsgrad, l2 = options.get("amsgrad", False), options.get("l2", False)
    shapes = [mask.shape if options.get("whole_state") else mask.packed_shape for mask in masks]
    params = [given("tensor", mask.shape, i, at_tensor, case.dtype, special=True) for i, mask in enumerate(masks)]
    device = params[0].device

    def moments(kind: str, dtype: torch.dtype) -> list[Tensor]:
        if dtype != INT8:
            return [given(kind, shape, i, at_packed, dtype) for i, shape in enumerate(shapes)]
        codes = [np.asarray(rng.integers(0, 256, shape, np.uint8)) for shape in shapes]  # every one, NaN and inf too
        return [memory.holding(f"{kind} {i}", torch.from_numpy(drawn), at_packed) for i, drawn in enumerate(codes)]

    first, second = moments("exp_avg", state), moments("exp_avg_sq", state)
    largest = moments("max_exp_avg_sq", state) if amsgrad else None
    for tensor in [*second, *(largest or [])] if state != INT8 else ():
        tensor.abs_()
    remainders: list[Tensor | None] | None = None
    if rounding == "remainder":
        remainders = []
        for i, shape in enumerate(shapes):
            remainder = given("remainder", shape, i, at_packed, torch.int16)
            drawn = rng.integers(-(2**15), 2**15, shape, np.int16)
            remainders.append(remainder.copy_(torch.from_numpy(np.asarray(drawn))))
    # Parts and their ages take turns with three sets of scalars.
    rows = np.zeros(3, SCALARS)
    for i, step in enumerate((1, 2, 70)):
        rows[i] = adamw_scalars(
            lr=0.01 * (i + 1), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1 * i, step=step, decoupled=not l2,
            maximize=options.get("maximize", False), grad_multiplier=0.5,
        )  # fmt: skip
    rows = rows[np.arange(max(len(work.born), 1)) % 3]
    scalars = (
        torch.from_numpy(rows.view(np.int32).reshape(len(rows), -1)).to(device) if "on_device" in options else rows
    )
    on_device = {
        key: torch.tensor([options[key]], dtype=torch.float32, device=device)
        for key in ("skip", "multiplier")
        if key in options
    }
    operands = AdamWOperands(params, first, second, largest, remainders, [3 * i + 1 for i in range(len(masks))])
    operands.grads, operands.packed_grads = grads, options["packed_grads"]  # type: ignore[assignment]
    backend.adamw_(
        work, operands, scalars, work.first_born.astype(np.int32), l2=l2, amsgrad=amsgrad,
        stochastic=rounding == "stochastic", seed=options.get("seed", 1234), **on_device,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- through the public API


class Model(torch.nn.Module):
    """Parameters only: one per kind of mask, and one that no plan names."""

    shapes = ((9, 40), (7, 33), (5, 264), (21,), (6, 8))

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        rng = np.random.default_rng(5)
        for i, shape in enumerate(self.shapes):
            self.register_parameter(f"p{i}", torch.nn.Parameter(values(rng, shape, dtype).to(device)))

    def learn(self, seed: int, frozen: FreezePlan | None = None) -> None:
        """New gradients; NaN where ``frozen``."""
        rng = np.random.default_rng(seed)
        for name, p in self.named_parameters():
            grad = values(rng, tuple(p.shape), p.dtype)
            if frozen is not None and name in frozen:
                grad[frozen[name].dense()] = math.nan
            p.grad = grad.to(p.device)


def _plans() -> tuple[FreezePlan, FreezePlan]:
    rows, cols, elements, some = ({key: True} for key in ("rows", "cols", "elements", "rows"))
    shapes = Model.shapes
    first = {"p0": scattered(shapes[0], **rows), "p1": scattered(shapes[1], **elements),
             "p2": scattered(shapes[2], **cols), "p3": scattered(shapes[3], **some)}  # fmt: skip
    second = {"p0": scattered(shapes[0], **cols), "p2": scattered(shapes[2], **rows), "p3": first["p3"]}
    return FreezePlan(first), FreezePlan(second)


def _train(model: Model, backend: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Three steps, a change of plan, two steps; with ``thawed`` state is kept, and the plan changes at every step."""
    first, second = _plans()
    change = {key: value for key, value in options.items() if key == "thawed"}
    rest = {key: value for key, value in options.items() if key != "thawed"}
    optimizer = sf.MaskedAdamW(
        model.named_parameters(), lr=0.01, weight_decay=0.1, freeze=first, backend=backend, **rest
    )  # fmt: skip
    for step in range(5):
        plan = (first, second, FreezePlan())[step % 3] if change else first if step < 3 else second
        if change:
            optimizer.set_freeze(plan, keep_state=True, **change)
        elif step == 3:
            optimizer.set_freeze(second)
        model.learn(step, plan)
        sf.clip_grad_norm_(model, 5.0, plan, backend=backend)
        optimizer.step()
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{key} of {names[p]}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def _guard(model: Model, backend: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    plan = _plans()[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    sf.guard(optimizer, plan, model, backend=backend)
    for step in range(3):
        model.learn(step)
        optimizer.step()
    for name, p in model.named_parameters():
        frozen = plan[name].dense().to(p.device) if name in plan else torch.zeros_like(p, dtype=torch.bool)
        assert_same_bits(p.detach(), before[name], f"guard: frozen part of {name}", where=frozen)
        assert bool((bits(p) != bits(before[name])).any()), f"guard: {name} does not train"
        p.data.zero_()  # torch's own steps differ from device to device
    return {}


def _zero(model: Model, backend: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    plan = _plans()[0]
    model.learn(0, plan)
    sf.zero_frozen_grads_(model, plan, backend=backend)
    return {}


def _clip(model: Model, backend: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    plan = _plans()[0]
    model.learn(0, plan)
    norm = sf.clip_grad_norm_(model, 0.1, plan, backend=backend, **options)
    assert norm.shape == () and norm.dtype == torch.float32 and norm.device == model.p0.device
    return {"norm": norm}


SURFACE: Mapping[str, Callable[[Model, str, Mapping[str, Any]], dict[str, Tensor]]] = {
    "MaskedAdamW": _train, "guard": _guard, "zero_frozen_grads_": _zero, "clip_grad_norm_": _clip
}  # fmt: skip


def _on_surface(backend: Backend, device: torch.device, case: Case) -> Outcome:
    model = Model(case.dtype, device)
    tensors = SURFACE[case.op](model, backend.name, case.options)
    for name, p in model.named_parameters():
        tensors[name] = p
        if p.grad is not None:
            tensors[f"gradient of {name}"] = p.grad
    return Outcome({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()})


# ---------------------------------------------------------------------------------------------------- far addresses


# Values whose sums floats cannot hold, and doubles can.  By dtype: the largest and the smallest.
_UP_TO = {FP32: 3.4e38, BF16: 3.3e38, FP16: 65504.0}
_FROM = {FP32: 1.5e-45, BF16: 1e-40, FP16: 6e-8}
SUMS: Mapping[str, Callable[[np.random.Generator, torch.dtype, int], np.ndarray]] = {
    "spread": lambda rng, dtype, n: 10.0 ** rng.uniform(-20, 18, n),
    "largest": lambda rng, dtype, n: np.full(n, _UP_TO[dtype]),
    "large and small": lambda rng, dtype, n: np.where(rng.random(n) < 0.01, _UP_TO[dtype], 1e-3),
    "smallest": lambda rng, dtype, n: np.full(n, _FROM[dtype]),
    "denormals": lambda rng, dtype, n: rng.uniform(1, 50, n) * _FROM[dtype],
    "denormals and others": lambda rng, dtype, n: np.where(rng.random(n) < 0.5, 7 * _FROM[dtype], 1e-30),
    "one denormal": lambda rng, dtype, n: np.where(np.arange(n) == n // 2, 3 * _FROM[dtype], 0.0),
    "zeros": lambda rng, dtype, n: np.zeros(n),
    "negative": lambda rng, dtype, n: -rng.random(n),
}


def check_sums(backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Fail, naming values and norm, unless norms of `SUMS` are exact but for additions in double, taken whole or apart:
    of n values, n - 1 additions of what is not negative, each off by at most 2**-53 of the sum."""
    for (name, draw), n, offset in itertools.product(SUMS.items(), (5000, 40), (0, 1)):
        drawn = np.clip(draw(np.random.default_rng(n), dtype, n), -_UP_TO[dtype], _UP_TO[dtype])
        stored = torch.from_numpy(np.concatenate([drawn[:offset], drawn])).to(dtype)[offset:]
        exact = stored.double().abs()
        for kind in NORMS:
            got = float(backend.norm(compile_live([FreezeMask((n,))]), [stored.to(device)], kind))
            right = {
                "sum_of_squares": math.fsum((exact * exact).tolist()), "sum_of_absolutes": math.fsum(exact.tolist()),
                "largest_absolute": exact.max().item(),
            }[kind]  # fmt: skip
            assert got == pytest.approx(right, rel=n * 2.0**-53, abs=0.0), (
                f"{backend.name}: {kind} of {n} {short(dtype)}, {name}, at offset {offset}"
            )


def check_far(backend: Backend, device: torch.device) -> None:
    """Elements beyond 2^31, of a tensor and of its packed twins: as many as there are live ones are ever touched.

    On the CPU the memory in between is only reserved. A GPU must have it.
    """
    shape = (2**21 + 8, 1024)
    windows = (slice(0, 4), slice(2**21, 2**21 + 8))  # rows that are looked at
    rows, packed_rows = np.array([1, 3, 2**21 + 2, 2**21 + 5]), np.array([0, 2, 2**21 + 1, 2**21 + 3])
    cols, packed_cols = np.arange(3, 1024, 9), np.arange(1, 1024, 9)
    whole = Part(0, shape, 1024, rows, packed_rows=packed_rows)
    picked = Part(0, shape, 1024, rows + 1, cols, packed_rows + 1, packed_cols)
    work = WorkList(False, [whole, picked], [math.prod(shape)])
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 2.2 * 5 * 2 * math.prod(shape):
        pytest.skip("offsets beyond 2^31 take 48 GB of GPU memory")

    def run(backend: Backend, device: torch.device) -> dict[str, Tensor]:
        rng = np.random.default_rng(0)
        tensors = []
        for _ in range(5):
            tensor = _reserved(math.prod(shape), device).view(shape)
            for window in windows:
                tensor[window] = values(rng, tuple(tensor[window].shape), BF16).abs().to(device)
            tensors.append(tensor)
        param, grad, first, second, twin = tensors
        operands = AdamWOperands([param], [first], [second])
        operands.grads = [grad]  # type: ignore[assignment]
        scalars = np.zeros(1, SCALARS)
        scalars[0] = adamw_scalars(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=2, decoupled=True)
        sets = np.zeros(2, np.int32)
        backend.adamw_(work, operands, scalars, sets, l2=False, amsgrad=False, stochastic=True, seed=1)
        norm = torch.as_tensor(backend.norm(work, [param], "sum_of_squares"))
        backend.gather(work, [param], [twin])
        backend.zero_(work, [param])
        backend.scale_(work, [grad], torch.tensor(0.5, device=device))
        backend.scatter_(work, [grad], [second])
        names = ("tensor", "gradient", "exp_avg", "exp_avg_sq", "twin")
        found = {
            f"{name}, rows from {window.start}": tensor[window].cpu()
            for name, tensor in zip(names, tensors, strict=True)
            for window in windows
        }
        return {**found, "norm": norm.cpu().double().float()}

    expected, got = run(choose_backend("cpu", CPU, "check"), CPU), run(backend, device)
    for name, tensor in expected.items():
        assert_same_bits(got[name], tensor, f"{backend.name}, far addresses: {name}")


def _reserved(count: int, device: torch.device) -> Tensor:
    """bfloat16 elements, zero or anything."""
    if device.type != "cpu":
        return torch.empty(count, dtype=BF16, device=device)
    no_reserve = 0x4000  # MAP_NORESERVE; Python names it since 3.13
    pages = mmap.mmap(-1, 2 * count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=BF16)
