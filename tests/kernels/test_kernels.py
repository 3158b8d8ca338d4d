"""The operations: the compiled backends against the specification, bit for bit, and the lists they walk."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from backend_cases import NORMS, check_sums
from conftest import BACKENDS, DTYPES, assert_same_bits, bits, from_bits, short, shown
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safefreeze_kernels.kernels import bits as bits_of_masks
from safefreeze_kernels.kernels import reference
from safefreeze_kernels.kernels.ages import Ages
from safefreeze_kernels.kernels.backend import backend_state
from safefreeze_kernels.kernels.operands import SCALARS, AdamWOperands, adamw_scalars
from safefreeze_kernels.kernels.parts import Part, WorkList, compile_frozen, compile_live
from safefreeze_kernels.kernels.runs import CHUNK, CHUNK_ELEMENTS, RUN, Runs, lists_of
from safefreeze_kernels.optim.state import repack
from safefreeze_kernels.plan.mask import FreezeMask, pack_bits, unpack_bits

BY_NAME: dict[str, Any] = {name: backend_state(name) for name in (*BACKENDS, "reference")}
COMPILED = [name for name in BACKENDS if name != "reference"]
WORDS = {2: np.uint16, 4: np.uint32}

needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="of the cpu backend, which is not tested here")
if "cpu" in BACKENDS:
    from safefreeze_kernels import _C
    from safefreeze_kernels.kernels import cpu as native

    ISAS: Sequence[str] = _C.runnable_isas()
else:
    ISAS = ()


@pytest.fixture(autouse=True)
def settings_restored(one_thread: None) -> Iterator[None]:
    """One thread unless a test says otherwise; the instruction set that was chosen before."""
    isa = _C.isa() if ISAS else None
    yield
    if isa is not None:
        _C.choose_isa(isa)


# --------------------------------------------------------------------------------------------------- random inputs


def random_mask(rng: np.random.Generator, shape: tuple[int, ...]) -> FreezeMask:
    """Rows, columns and elements, each there or not, from one in a hundred to all; in runs or scattered."""
    n_rows, n_cols = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)

    def some(size: int) -> np.ndarray:
        share = rng.choice([0.01, 0.1, 0.5, 0.9, 1.0], p=[0.2, 0.3, 0.3, 0.15, 0.05])
        if size and rng.random() < 0.3:  # one run
            start = int(rng.integers(0, size))
            return (np.arange(size) >= start) & (np.arange(size) < start + share * size)
        return rng.random(size) < share

    rows, cols, elements = rng.random(3) < (0.5, 0.5 if len(shape) > 1 else 0.0, 0.4)
    return FreezeMask(
        shape,
        rows=some(n_rows) if rows else None,
        cols=some(n_cols) if cols else None,
        elements=torch.from_numpy(some(math.prod(shape)).reshape(shape)) if elements else None,
    )


def random_ages(rng: np.random.Generator, mask: FreezeMask) -> Ages | None:
    """As after some changes of plan: rows, columns and elements thawed after 0, 1 or 2 steps."""
    if rng.random() < 0.5:
        return None
    n_rows, n_cols = mask.matrix_shape
    by_row, by_col, by_element = rng.random(3) < (0.6, 0.5, 0.3)
    rows, cols = (rng.integers(0, 3 if by else 1, n) for by, n in ((by_row, n_rows), (by_col, n_cols)))
    elements = Ages.of_elements(rng.integers(0, 3, (n_rows, n_cols))) if by_element else Ages.none(mask)
    return replace(elements, rows=rows, cols=cols)


SMALL = ((), (1,), (3,), (70,), (0, 5), (4, 0), (1, 1), (5, 7), (9, 33), (2, 3, 5), (3, 2, 2, 9), (33, 8))
# rows, columns and bits that cross the limits of blocks and chunks, most of them off byte and vector boundaries
LARGE = ((3, 1023), (3, 1025), (2, 2500), (1, 33_000), (40_000,), (33, 1009), (5, 16_411))


def random_case(seed: int, large: bool) -> tuple[list[FreezeMask], list[Ages | None], np.random.Generator]:
    rng = np.random.default_rng(seed)
    menu = LARGE if large else SMALL
    shapes = [menu[i] for i in rng.integers(0, len(menu), 1 if large else int(rng.integers(1, 5)))]
    masks = [random_mask(rng, shape) for shape in shapes]
    return masks, [random_ages(rng, mask) for mask in masks], rng


def tensors_like(rng: np.random.Generator, masks: Sequence[FreezeMask], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Normal values with some NaN, infinities, denormals and signed zeros among them."""
    special = np.array([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-41, 6e-8, 65504.0, 3.4e38], np.float32)
    found = []
    for mask, dtype in zip(masks, dtypes, strict=True):
        values = rng.standard_normal(mask.shape, np.float32)
        values = np.where(rng.random(mask.shape) < 0.02, rng.choice(special, mask.shape), values)
        found.append(torch.from_numpy(np.asarray(values, np.float32)).to(dtype))
    return found


def some_missing(rng: np.random.Generator, tensors: list[Tensor]) -> list[Tensor | None]:
    return [None if rng.random() < 0.15 else tensor for tensor in tensors]


def copies(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.clone() for tensor in tensors]


def dtypes_for(rng: np.random.Generator, masks: Sequence[FreezeMask]) -> list[torch.dtype]:
    return [DTYPES[i] for i in rng.integers(0, 3, len(masks))]


def frozen_flags(masks: Sequence[FreezeMask]) -> list[Tensor]:
    return [mask.dense() for mask in masks]


def examples(count: int) -> Callable[[Any], Any]:
    def decorate(test: Any) -> Any:
        return settings(max_examples=count)(given(seed=st.integers(0, 2**32 - 1), large=st.booleans())(test))

    return decorate


# ------------------------------------------------------------------------------------------------ the lists themselves


def integers_at(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(int(address))).copy()


def visits(
    work: WorkList, masks: Sequence[FreezeMask]
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
    """(chunk, tensor, elements, packed places, when they were born) of every run, as a kernel reads them from the
    arrays."""
    listed = Runs.of(work)
    for chunk_index, chunk in enumerate(listed.chunks):
        part = listed.parts[chunk["part"]]
        mask = masks[part["tensor"]]
        for run in listed.runs[chunk["begin"] : chunk["end"]]:
            start, packed, count = (int(run[key]) for key in ("start", "packed", "count"))
            steps = np.arange(count)
            cols = integers_at(part["cols"], count) if part["cols"] else steps
            packed_cols = integers_at(part["packed_cols"], count) if part["packed_cols"] else steps
            elements, places = start + cols, packed + packed_cols
            if part["frozen_bits"]:
                size = (mask.numel + 7) // 8
                stored = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(part["frozen_bits"])))
                flags = np.unpackbits(stored, count=mask.numel, bitorder="little").view(bool)[elements]
                elements, places = elements[flags == work.frozen], places[flags == work.frozen]
                places = packed + np.arange(elements.size) if part["gapless"] else places
            born = np.full(elements.size, work.first_born[chunk["part"]] + run["age"])
            if part["ages"]:
                width = int(part["age_size"])
                size = width * work.packed_sizes[part["tensor"]]
                stored = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(part["ages"])))
                born += stored.view(f"u{width}")[places]
            yield chunk_index, int(part["tensor"]), elements, places, work.born[born]


@examples(150)
def test_lists_visit_each_element_once_or_never(seed: int, large: bool) -> None:
    masks, ages, _ = random_case(seed, large)
    for work, chosen in (
        (compile_live(masks, ages), [~mask.dense() for mask in masks]),
        (compile_live(masks, ages, whole_state=True), [~mask.dense() for mask in masks]),
        (compile_frozen(masks), [mask.dense() for mask in masks]),
    ):
        times = [np.zeros(mask.numel, np.int64) for mask in masks]
        taken = [np.zeros(size, np.int64) for size in work.packed_sizes]
        in_chunk = np.zeros(len(Runs.of(work).chunks), np.int64)
        for chunk, tensor, elements, places, _ in visits(work, masks):
            assert elements.size == 0 or (elements.min() >= 0 and elements.max() < masks[tensor].numel)
            np.add.at(times[tensor], elements, 1)
            np.add.at(taken[tensor], places, 1)
            in_chunk[chunk] += elements.size
        for tensor, (mask, expected) in enumerate(zip(masks, chosen, strict=True)):
            wrong = np.flatnonzero(times[tensor] != expected.reshape(-1).numpy())
            assert not wrong.size, (
                f"{'frozen' if work.frozen else 'live'} list of {mask}: element {wrong[0]} is visited "
                f"{times[tensor][wrong[0]]} times, expected {int(expected.reshape(-1)[wrong[0]])}"
            )
            assert taken[tensor].max(initial=0) <= 1, f"two elements of {mask} share a packed place"
            size = mask.frozen_count if work.frozen else math.prod(mask.packed_shape)
            assert work.packed_sizes[tensor] in (size, mask.numel)
            if work.packed_sizes[tensor] == size:
                assert taken[tensor].min(initial=1) == 1, f"a packed place of {mask} belongs to no element"
        # every run is in exactly one chunk; a chunk never exceeds what a thread should take by a whole chunk
        runs = sorted(run for chunk in Runs.of(work).chunks for run in range(chunk["begin"], chunk["end"]))
        assert runs == list(range(len(Runs.of(work).runs)))
        longest = max((mask.matrix_shape[1] for mask in masks), default=0)
        assert in_chunk.max(initial=0) <= CHUNK_ELEMENTS + max(longest, CHUNK_ELEMENTS)


@pytest.mark.parametrize("whole_state", [False, True], ids=["packed", "whole"])
@examples(60)
def test_places_follow_the_packed_shape_and_ages_the_elements(whole_state: bool, seed: int, large: bool) -> None:
    """Row-major over what is live (or over the tensor): state can be read by anyone who knows the mask. An element is
    as old as the youngest of its row, its column and itself."""
    masks, ages, _ = random_case(seed, large)
    work = compile_live(masks, ages, whole_state=whole_state)
    expected, births = [], []
    for mask, age in zip(masks, ages, strict=True):
        live = ~mask.dense().reshape(-1).numpy()
        expected.append(np.arange(live.size) if whole_state else np.cumsum(live) - 1)
        born = np.zeros(mask.matrix_shape, np.int64)
        if age is not None:
            born = np.maximum(age.rows[:, None], age.cols[None, :])
            born = born if age.elements is None else np.maximum(born, age.table[age.elements])
        births.append(born.reshape(-1))
    for _, tensor, elements, places, born in visits(work, masks):
        assert np.array_equal(places, expected[tensor][elements]), masks[tensor]
        assert np.array_equal(born, births[tensor][elements]), masks[tensor]
    for part, mask in zip(work.parts, (masks[part.tensor] for part in work.parts), strict=True):
        if mask.bits is not None:
            assert work.tensor_of_part.tolist().count(part.tensor) == 1, "elements of all ages are one part"


@needs_cpu
@examples(150)
def test_the_extension_makes_the_same_lists(seed: int, large: bool) -> None:
    masks, ages, rng = random_case(seed, large)
    for work in (compile_live(masks, ages), compile_live(masks, ages, whole_state=True), compile_frozen(masks)):
        apart = [part.gapless for part in work.parts]  # whose places are found later
        for expected, got in zip(lists_of(work), (Runs.of(work).runs, Runs.of(work).chunks), strict=True):
            for name in expected.dtype.names or ():
                if name != "packed" or not any(apart):
                    assert np.array_equal(got[name], expected[name]), f"{name} of {masks}"
    numbers = rng.integers(0, int(rng.choice([3, 10**6])), int(rng.integers(0, 50)))
    for found, right in zip(_C.distinct(numbers), np.unique(numbers, return_inverse=True), strict=True):
        assert np.array_equal(found, right)


@pytest.mark.parametrize("whole_state", [False, True], ids=["packed", "whole"])
def test_columns_of_many_ages_are_one_part(whole_state: bool) -> None:
    """However often a plan changes, a step reads each row once."""
    mask = FreezeMask((6, 40), cols=range(0, 40, 5))
    ages = Ages.none(mask)
    ages.cols[mask.live_cols] = np.arange(32) % 7
    work = compile_live([mask], [ages], whole_state=whole_state)
    assert len(work.parts) == 1 and work.born.tolist() == list(range(7))


@pytest.mark.parametrize("whole_state", [False, True], ids=["packed", "whole"])
@pytest.mark.parametrize("n_ages", [1, 2, 256, 257, 65_536, 65_537, 65_600])
def test_any_number_of_ages_is_told_apart(n_ages: int, whole_state: bool) -> None:
    mask = FreezeMask((140_000,), rows=range(0, 40, 4))
    ages = np.random.default_rng(n_ages).permutation(140_000) % n_ages * 3
    work = compile_live([mask], [Ages.of_elements(ages[:, None])], whole_state=whole_state)
    live = ~mask.dense().numpy()
    place = np.arange(live.size) if whole_state else np.cumsum(live) - 1
    found = np.full(live.size, -1)
    for _, _, elements, places, born in visits(work, [mask]):
        assert np.array_equal(places, place[elements])
        found[elements] = born
    assert np.array_equal(found, np.where(live, ages, -1))
    if n_ages > 1:  # and by kernels
        scalars = np.zeros(len(work.born), SCALARS)
        scalars["bias2_sqrt"], scalars["eps"], scalars["step_size"] = 1.0, 1.0, work.born + 1
        for name in {"cpu", "reference"}.intersection(BACKENDS):
            param, moments = torch.zeros(mask.shape), [torch.zeros(work.packed_sizes) for _ in range(2)]
            moments[0].fill_(-1.0)  # then the weight is the scalar: -(step_size * -1) / (0 / 1 + 1)
            operands = AdamWOperands([param], *([moment] for moment in moments), grads=[torch.zeros(mask.shape)])
            scalars["beta1"] = 1.0
            BY_NAME[name].adamw_(work, operands, scalars, work.first_born.astype(np.int32), l2=False, amsgrad=False)
            expected = np.where(live, ages + 1, 0).astype(np.float32)
            assert_same_bits(param, torch.from_numpy(expected), name)
    assert len(work.parts) == (1 if n_ages <= 65_536 else 2)


def test_frozen_rows_cost_nothing() -> None:
    """A list grows with the live runs, not with the tensor."""
    frozen = np.ones(100_000, bool)
    frozen[::1000] = False
    listed = Runs.of(compile_live([FreezeMask((100_000, 64), rows=frozen)]))
    assert len(listed.runs) == 100
    assert len(listed.chunks) == 1
    assert len(Runs.of(compile_live([FreezeMask((100, 64), rows=range(100))])).chunks) == 0


def test_long_runs_are_cut_for_threads_to_share() -> None:
    listed = Runs.of(compile_live([FreezeMask((1000, 1000))]))
    assert len(listed.chunks) == -(-1_000_000 // CHUNK_ELEMENTS)


# ------------------------------------------------------------------------------- one backend against plain indexing


@pytest.mark.parametrize("name", BACKENDS)
@examples(60)
def test_zero_and_scale_touch_what_the_list_visits(name: str, seed: int, large: bool) -> None:
    masks, ages, rng = random_case(seed, large)
    given_tensors = some_missing(rng, tensors_like(rng, masks, dtypes_for(rng, masks)))
    for work, chosen in (
        (compile_live(masks, ages), [~flags for flags in frozen_flags(masks)]),
        (compile_frozen(masks), frozen_flags(masks)),
    ):
        zeroed, scaled = copies(given_tensors), copies(given_tensors)
        BY_NAME[name].zero_(work, zeroed)
        if not work.frozen:
            BY_NAME[name].scale_(work, scaled, torch.tensor(0.3))
        for before, flags, zero, scale, mask in zip(given_tensors, chosen, zeroed, scaled, masks, strict=True):
            if before is None:
                continue
            assert_same_bits(zero, torch.where(flags, torch.zeros_like(before), before), f"zero_, {mask}")
            if not work.frozen:
                # the factor is float32, and so is the product
                product = (before.float() * float(np.float32(0.3))).to(before.dtype)
                assert_same_bits(scale, torch.where(flags, product, before), f"scale_, {mask}", any_nan=True)
                assert_same_bits(scale, before, f"scale_, frozen part of {mask}", where=~flags)


@pytest.mark.parametrize("name", BACKENDS)
@examples(60)
def test_gather_and_scatter_move_bytes(name: str, seed: int, large: bool) -> None:
    masks, _, rng = random_case(seed, large)
    dtypes = dtypes_for(rng, masks)
    # any bytes, signalling NaNs and all
    tensors = [
        torch.from_numpy(rng.integers(0, 2 ** (8 * dtype.itemsize), mask.shape, WORDS[dtype.itemsize])).view(dtype)
        for mask, dtype in zip(masks, dtypes, strict=True)
    ]
    for frozen, whole in ((True, False), (False, False), (False, True)):
        work = compile_frozen(masks) if frozen else compile_live(masks, whole_state=whole)
        packed = [torch.full((n,), 7.0, dtype=d) for n, d in zip(work.packed_sizes, dtypes, strict=True)]
        BY_NAME[name].gather(work, tensors, packed)
        for tensor, twin, mask in zip(tensors, packed, masks, strict=True):
            matrix, flags = tensor.reshape(mask.matrix_shape), mask.dense().reshape(mask.matrix_shape)
            rows, cols = flags.all(1), flags.all(0)
            if frozen:  # whole rows, then whole columns of the other rows, then single elements
                single = flags & ~rows[:, None] & ~cols
                expected = [matrix[rows].reshape(-1), matrix[~rows][:, cols].reshape(-1), matrix[single]]
                if not flags.numel() or rows.all():
                    expected = [matrix.reshape(-1)]
                assert_same_bits(twin, torch.cat(expected), f"gather, frozen list of {mask}")
            elif whole:
                expected = torch.where(flags, torch.full_like(matrix, 7.0), matrix)
                assert_same_bits(
                    twin, expected.reshape(-1), f"gather, live list of {mask}, twin as large as the tensor"
                )
            else:
                assert_same_bits(twin, matrix[~flags], f"gather, live list of {mask}")
        others = [torch.full_like(tensor, 3.0) for tensor in tensors]
        BY_NAME[name].scatter_(work, others, packed)
        for tensor, other, mask in zip(tensors, others, masks, strict=True):
            flags = mask.dense() if frozen else ~mask.dense()
            expected = bits(torch.full_like(tensor, 3.0))
            expected[flags] = bits(tensor)[flags]
            assert_same_bits(bits(other), expected, f"scatter_, {'frozen' if frozen else 'live'} list of {mask}")


@needs_cpu
@pytest.mark.parametrize("isa", ISAS)
@examples(60)
def test_state_moves_from_any_mask_to_any_other(isa: str, seed: int, large: bool) -> None:
    _C.choose_isa(isa)
    rng = np.random.default_rng(seed)
    menu = LARGE if large else SMALL
    shape = menu[int(rng.integers(0, len(menu)))]
    old, new = random_mask(rng, shape), random_mask(rng, shape)
    dtypes = (torch.float32, torch.bfloat16, torch.int16, torch.float64, torch.complex64)
    full = torch.from_numpy(np.asarray(rng.integers(1, 1000, old.shape))).to(dtypes[seed % len(dtypes)])
    full[old.dense()] = 0
    got = repack(full[~old.dense()].reshape(old.packed_shape), old, new)
    assert_same_bits(got, full[~new.dense()].reshape(new.packed_shape), f"{full.dtype}, {old} to {new}")


@needs_cpu
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("n_ages", "becoming"), [(None, 1), (1, 200), (30, 60), (40, 300), (256, 256), (257, 70_000), (70_000, 257)]
)
@pytest.mark.parametrize(("numel", "frozen"), [(0, 0.5), (1, 0.5), (71, 0.2), (4096, 1.0), (32_768, 0), (70_001, 0.3)])
def test_ages_of_elements_turn_as_in_numpy(
    numel: int, frozen: float, becoming: int, n_ages: int | None, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _C.choose_isa(isa)
    rng = np.random.default_rng(numel)
    numbers = None if n_ages is None else rng.integers(0, n_ages, numel).astype(bits_of_masks.narrowest(n_ages))
    becomes = rng.integers(0, becoming, (4, n_ages or 1)).astype(np.uint32)
    masks = [pack_bits(rng.random(numel) < frozen) for _ in range(2)]
    given = numbers, *masks, numel, becomes, bits_of_masks.narrowest(becoming)
    torch.set_num_threads(2)
    turned, seen = bits_of_masks.turn(*given)
    torch.set_num_threads(1)
    assert bits_of_masks.has_room(turned)
    for width in (np.uint8, np.uint16, np.uint32):
        source = rng.integers(0, 200, numel).astype(width)[~unpack_bits(masks[0], (numel,))]
        moved = [np.full(int((~unpack_bits(masks[1], (numel,))).sum()), 7, width) for _ in range(2)]
        for target in moved:
            bits_of_masks.repack(source, masks[0], target, masks[1], numel)
            monkeypatch.setattr(bits_of_masks, "_C", None)
        monkeypatch.undo()
        assert np.array_equal(*moved), width
    monkeypatch.setattr(bits_of_masks, "_C", None)
    for got, right in zip((turned, seen), bits_of_masks.turn(*given), strict=True):
        assert got.dtype == right.dtype and np.array_equal(got, right)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("name", BACKENDS)
@examples(60)
def test_norms_count_what_the_list_visits(name: str, kind: Any, seed: int, large: bool) -> None:
    masks, ages, rng = random_case(seed, large)
    tensors = [
        torch.from_numpy(rng.standard_normal(mask.shape, np.float32)).reshape(mask.shape).to(dtype)
        for mask, dtype in zip(masks, dtypes_for(rng, masks), strict=True)
    ]
    for work in (compile_live(masks, ages), compile_frozen(masks)):
        chosen = [mask.dense() == work.frozen for mask in masks]
        for tensor, flags in zip(tensors, chosen, strict=True):
            tensor[~flags] = math.nan  # what the list leaves out must not be read into the sum
        values = torch.cat([t[flags].double() for t, flags in zip(tensors, chosen, strict=True)]).abs()
        if kind == "largest_absolute":
            expected = values.max().item() if values.numel() else 0.0
        else:
            expected = math.fsum((values**2 if kind == "sum_of_squares" else values).tolist())
        got = BY_NAME[name].norm(work, tensors, kind).item()
        # the order of a sum is free: n additions of non-negative doubles, each off by at most 2**-53
        assert got == pytest.approx(expected, rel=max(1, values.numel()) * 2.0**-53, abs=0.0), f"{masks}"
        for tensor, flags in zip(tensors, chosen, strict=True):
            tensor[~flags] = 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("name", BACKENDS)
def test_sums_are_as_exact_as_doubles_make_them(name: str, dtype: torch.dtype) -> None:
    check_sums(BY_NAME[name], torch.device("cpu"), dtype)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("place", [0, 15, 16, 1023, 1024, 32_767, 32_768, 39_999])
def test_norms_find_one_nan_and_one_inf(name: str, kind: Any, place: int) -> None:
    work = compile_live([FreezeMask((40_000,))])
    for value, accepts in ((math.nan, math.isnan), (math.inf, math.isinf), (-math.inf, lambda x: x == math.inf)):
        values = torch.ones(40_000)
        values[place] = value
        assert accepts(BY_NAME[name].norm(work, [values], kind)), f"{value} at {place}"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, 1.5, math.inf, math.nan, 0.0, 0.5])
def test_a_factor_of_one_or_more_changes_nothing(name: str, factor: float) -> None:
    """Clipping never lengthens. A NaN norm is spread, as in torch."""
    values = torch.tensor([3.0, -0.0, math.nan, math.inf, 1e-41])
    scaled = values.clone()
    BY_NAME[name].scale_(compile_live([FreezeMask((5,))]), [scaled], torch.tensor(factor))
    assert_same_bits(scaled, values if factor >= 1.0 else values * factor, f"factor {factor}", any_nan=True)


# ---------------------------------------------------------------------------------------------- the step, bit for bit


class Step:
    """Inputs of one masked step, made from a seed; `run` makes it on a backend and returns everything it wrote.
    ``whole``: whether state is."""

    def __init__(self, seed: int, large: bool, whole: bool = False) -> None:
        self.masks, self.ages, rng = random_case(seed, large)
        self.work, self.whole_state = compile_live(self.masks, self.ages, whole_state=whole), whole
        shapes = [mask.shape if whole else mask.packed_shape for mask in self.masks]
        self.l2, self.amsgrad, decoupled = (bool(flag) for flag in rng.random(3) < 0.5)
        dtypes = dtypes_for(rng, self.masks)
        state_dtypes = [DTYPES[i] for i in rng.integers(0, 2, len(self.masks))]
        self.params = tensors_like(rng, self.masks, dtypes)
        self.grads = some_missing(rng, tensors_like(rng, self.masks, dtypes))
        self.state = []
        for nonnegative in (False, True, True)[: 3 if self.amsgrad else 2]:
            moments = [
                torch.from_numpy(np.asarray(rng.standard_normal(shape, np.float32))).reshape(shape) for shape in shapes
            ]
            self.state.append(
                [(m.abs() if nonnegative else m).to(d) for m, d in zip(moments, state_dtypes, strict=True)]
            )
        self.stochastic, self.seed = bool(rng.random() < 0.5), int(rng.integers(0, 2**63))
        self.numbers = rng.permutation(100)[: len(self.masks)].tolist()
        self.remainders = [
            torch.from_numpy(np.asarray(rng.integers(-(2**15), 2**15, shape, np.int16))).reshape(shape)
            if dtype == torch.bfloat16 and has
            else None
            for shape, dtype, has in zip(shapes, dtypes, rng.random(len(self.masks)) < 0.5, strict=True)
        ]
        sets = [
            adamw_scalars(
                lr=float(rng.choice([0.0, 1e-3, 0.5])), betas=(0.9, 0.999), eps=float(rng.choice([0.0, 1e-8, 1.0])),
                weight_decay=float(rng.choice([0.0, 0.1])), step=int(rng.integers(1, 2000)), decoupled=decoupled,
                maximize=bool(rng.random() < 0.5), grad_multiplier=float(rng.choice([1.0, 1 / 3])),
            )
            for _ in range(8)
        ]  # fmt: skip
        # a row for each age of each part
        self.scalars = np.array(sets, SCALARS)[rng.integers(0, 3, len(self.work.born))]
        self.scalar_set = self.work.first_born.astype(np.int32)

    def run(self, backend: Any, in_place: bool = False, packed: Sequence[bool] = ()) -> list[list[Tensor]]:
        """``packed``: of which tensors the gradients are."""
        params, state, remainders = self.params, self.state, self.remainders
        if not in_place:
            params, state = copies(params), [copies(moments) for moments in state]
            remainders = [r if r is None else r.clone() for r in remainders]
        operands = AdamWOperands(
            params, state[0], state[1], state[2] if self.amsgrad else None, remainders, self.numbers, self.grads,
            packed,
        )  # fmt: skip
        if packed:
            operands.grads = [  # type: ignore[assignment]
                grad if grad is None or not is_packed else self.pack(i)
                for i, (grad, is_packed) in enumerate(zip(self.grads, packed, strict=True))
            ]
        backend.adamw_(
            self.work, operands, self.scalars, self.scalar_set, l2=self.l2, amsgrad=self.amsgrad,
            stochastic=self.stochastic, seed=self.seed,
        )  # fmt: skip
        return [params, [r if r is not None else torch.zeros(0) for r in remainders], *state]

    def pack(self, tensor: int) -> Tensor:
        """What is live of a gradient, laid out as state is; NaN elsewhere, if that has places for it."""
        mask, grad = self.masks[tensor], self.grads[tensor].clone()
        grad[mask.dense()] = math.nan
        return grad if self.whole_state else grad[~mask.dense()].reshape(mask.packed_shape)

    def check(self, got: list[list[Tensor]], expected: list[list[Tensor]], what: str, *, any_nan: bool) -> None:
        for key, ours, theirs in zip(
            ("param", "remainder", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), got, expected, strict=False
        ):
            for a, b, mask in zip(ours, theirs, self.masks, strict=True):
                assert_same_bits(a, b, f"{what}: {key}, {short(a.dtype)}, {mask}", any_nan=any_nan)


@pytest.mark.parametrize("name", BACKENDS)
@examples(60)
def test_the_step_touches_live_elements_with_a_gradient_only(name: str, seed: int, large: bool) -> None:
    step = Step(seed, large)
    params, *_ = step.run(BY_NAME[name])
    for before, after, grad, mask in zip(step.params, params, step.grads, step.masks, strict=True):
        still = torch.ones(mask.shape, dtype=torch.bool) if grad is None else mask.dense()
        assert_same_bits(after, before, f"frozen part of {mask}", where=still)


@pytest.mark.parametrize("name", BACKENDS)
@examples(60)
def test_whole_state_is_not_touched_where_frozen(name: str, seed: int, large: bool) -> None:
    step = Step(seed, large, whole=True)
    _, remainders, *state = step.run(BY_NAME[name])
    for index, mask in enumerate(step.masks):
        held = [(before[index], after[index]) for before, after in zip(step.state, state, strict=True)]
        held += [(step.remainders[index], remainders[index])] if step.remainders[index] is not None else []
        for before, after in held:
            still = torch.ones(mask.shape, dtype=torch.bool) if step.grads[index] is None else mask.dense()
            assert_same_bits(after, before, f"frozen part of the state of {mask}", where=still)


@pytest.mark.parametrize("whole", [False, True], ids=["packed", "whole"])
@pytest.mark.parametrize("name", COMPILED)
@examples(150)
def test_the_compiled_step_is_the_specification(name: str, whole: bool, seed: int, large: bool) -> None:
    step = Step(seed, large, whole)
    step.check(step.run(BY_NAME[name]), step.run(BY_NAME["reference"]), f"{name} against reference", any_nan=True)


# Shares of frozen elements on both sides of every way through a block: nothing but what is live, a few hundred picked
# neighbours, more neighbours than a block holds; one row off every boundary, of 1, 15, 16, 17 and 63 to 65 elements.
@needs_cpu
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("whole", [False, True], ids=["packed", "whole"])
@pytest.mark.parametrize("n_ages", [1, 3, 33, 300])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=short)
def test_single_elements_of_any_density_and_age(isa: str, whole: bool, n_ages: int, dtype: torch.dtype) -> None:
    _C.choose_isa(isa)
    rng = np.random.default_rng(n_ages)
    for share, shape in [
        *((share, (3, 2743)) for share in (0.0005, 0.05, 0.5, 0.9, 0.999)),
        *((0.4, (1, n)) for n in (1, 2, 15, 16, 17, 31, 63, 64, 65, 255, 257)),
    ]:
        mask = FreezeMask(shape, elements=torch.from_numpy(rng.random(shape) < share))
        ages = Ages.of_elements(rng.integers(0, n_ages, shape))
        work = compile_live([mask], [ages], whole_state=whole)
        p, g, m, v, x = (torch.from_numpy(rng.standard_normal(shape, np.float32)) for _ in range(5))
        g[mask.dense()] = math.nan
        scalars = np.array(
            [
                adamw_scalars(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=1 + i, decoupled=True)
                for i in range(len(work.born))
            ],
            SCALARS,
        )
        results = []
        for name in ("cpu", "reference"):
            state = [
                (t if whole else t[~mask.dense()].reshape(mask.packed_shape)).clone() for t in (m, v.abs(), x.abs())
            ]
            param, (first, second, largest) = p.to(dtype), (t.to(dtype) for t in state)
            operands = AdamWOperands([param], [first], [second], [largest], grads=[g.to(dtype)])
            BY_NAME[name].adamw_(work, operands, scalars, work.first_born.astype(np.int32), l2=False, amsgrad=True)
            results.append((param, first, second, largest))
        for what, got, expected in zip(("p", "m", "v", "max"), *results, strict=True):
            assert_same_bits(got, expected, f"{what}, {isa}, {share} of {shape}")
        assert_same_bits(results[0][0], p.to(dtype), f"frozen part, {isa}, {share} of {shape}", where=mask.dense())


@pytest.mark.parametrize("name", BACKENDS)
@examples(60)
def test_packed_gradients_make_the_same_step(name: str, seed: int, large: bool) -> None:
    step = Step(seed, large)
    packed = [(seed >> i) % 3 != 0 for i in range(len(step.masks))]
    found, expected = step.run(BY_NAME[name], packed=packed), step.run(BY_NAME[name])
    step.check(found, expected, f"{name}, packed gradients", any_nan=False)


def plain_step(
    backend: Any, scalars: np.ndarray, p: Tensor, g: Tensor, m: Tensor, v: Tensor, v_max: Tensor | None = None,
    *, l2: bool = False, stochastic: bool = False,
) -> None:  # fmt: skip
    """A step of one tensor of which all is live, with one row of scalars."""
    operands = AdamWOperands([p], [m], [v], None if v_max is None else [v_max], grads=[g])  # type: ignore[arg-type]
    backend.adamw_(
        compile_live([FreezeMask(p.shape)]), operands, scalars, np.zeros(1, np.int32), l2=l2,
        amsgrad=v_max is not None, stochastic=stochastic,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=short)
@pytest.mark.parametrize("l2", [False, True], ids=["", "l2"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_step_is_the_published_formula(name: str, amsgrad: bool, l2: bool, dtype: torch.dtype) -> None:
    """Against the formula in numpy: float32, one rounding per operation, in the order written."""
    rng, n = np.random.default_rng(5), 5000
    f = np.float32
    half = np.float16 if dtype == torch.float16 else np.float32
    p, g, m = (rng.standard_normal(n).astype(half).astype(f) for _ in range(3))
    v, x = (np.abs(rng.standard_normal(n)).astype(f) for _ in range(2))
    scalars = np.array(
        [adamw_scalars(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=7, decoupled=not l2)], SCALARS
    )
    got_p, grad = torch.from_numpy(p.astype(half)), torch.from_numpy(g.astype(half))
    got_m, got_v, got_x = (torch.from_numpy(state.copy()) for state in (m, v, x))
    plain_step(BY_NAME[name], scalars, got_p, grad, got_m, got_v, got_x if amsgrad else None, l2=l2)
    if l2:
        g = g + f(0.1) * p
    m = f(0.9) * m + f(1 - 0.9) * g
    v = f(0.99) * v + f(1 - 0.99) * (g * g)
    second = x = np.maximum(x, v)
    second = second if amsgrad else v
    decay = f(1.0) if l2 else f(1 - 0.01 * 0.1)
    p = decay * p - f(0.01 / (1 - 0.9**7)) * m / (np.sqrt(second) / f(math.sqrt(1 - 0.99**7)) + f(1e-8))
    for what, got, expected in (
        ("p", got_p, p.astype(half)),
        ("m", got_m, m),
        ("v", got_v, v),
        *([("max", got_x, x)] if amsgrad else []),
    ):
        assert_same_bits(got, torch.from_numpy(expected), what)


# ----------------------------------------------------------------------------------------- instruction sets, threads


@needs_cpu
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "baseline"])
@examples(100)
def test_every_instruction_set_gives_the_bits_of_the_baseline(isa: str, seed: int, large: bool) -> None:
    step = Step(seed, large, whole=seed % 3 == 0)
    live, frozen = step.work, compile_frozen(step.masks)
    results = []
    for chosen in ("baseline", isa):
        _C.choose_isa(chosen)
        assert _C.isa() == chosen
        norms = [BY_NAME["cpu"].norm(work, step.params, kind) for work in (live, frozen) for kind in NORMS]
        scaled, zeroed = copies(step.params), copies(step.params)
        BY_NAME["cpu"].scale_(live, scaled, torch.tensor(0.7))
        BY_NAME["cpu"].zero_(live, zeroed)
        results.append((step.run(BY_NAME["cpu"]), norms, scaled, zeroed))
    (base, base_norms, *base_rest), (other, other_norms, *other_rest) = results
    # the instruction that rounds to float16 keeps a NaN's payload, the arithmetic does not
    step.check(other, base, f"{isa} against baseline", any_nan=True)
    np.testing.assert_array_equal(other_norms, base_norms)
    for got, expected in zip(other_rest, base_rest, strict=True):
        for a, b, mask in zip(got, expected, step.masks, strict=True):
            assert_same_bits(a, b, f"{isa} against baseline, {mask}", any_nan=True)


def roots_near_ties(divisor: int) -> np.ndarray:
    """The roots of 24 bits of which one over ``divisor``, an odd integer of 24 bits, nearly ends between two floats."""
    found = []
    for distance in (-3, -1, 1, 3):  # from the tie, in units of half a last place over the divisor
        for width in (24, 25):
            tie = -distance * pow(divisor, -1, 1 << width) % (1 << width)  # odd, twice the quotient
            tie |= 1 << 24
            root = divisor * tie + distance >> width
            if (root >= divisor) == (width == 24) and root >> 23 == 1:
                found.append(root)
    return np.array(found, np.float32)


@needs_cpu
@pytest.mark.parametrize("isa", ISAS)
def test_the_division_by_a_bias_is_rounded_right(isa: str) -> None:
    rng, cases = np.random.default_rng(0), 0
    _C.choose_isa(isa)
    for divisor in rng.integers(1 << 22, 1 << 23, 300) * 2 + 1:
        root = np.ldexp(roots_near_ties(int(divisor)), rng.integers(-60, 20)).astype(np.float32)
        root = np.concatenate([root, np.array([0, np.inf, np.nan], np.float32)])
        bias = np.ldexp(np.float32(divisor), -24 - rng.integers(0, 12)).astype(np.float32)
        for numerator in np.array([1.0, 1.4, 1.99], np.float32):
            p, g, m, v = (torch.zeros(len(root)) for _ in range(4))
            m += float(numerator)
            v += torch.from_numpy(root * root)  # of which the root is `root` again
            scalars = np.array([(1, 0, 0, 1, 0, 1, 0, -1, bias, 0, 1)], SCALARS)
            plain_step(BY_NAME["cpu"], scalars, p, g, m, v)
            with np.errstate(divide="ignore"):
                expected = torch.from_numpy(numerator / (root / bias))
            assert_same_bits(p, expected, f"{isa}, {divisor} under {root}", any_nan=True)
        cases += len(root) - 3
    assert cases > 900


@pytest.mark.skipif("avx2" not in ISAS, reason="a processor with fused multiply-add")
def test_no_divisor_there_is_rounds_wrongly(tmp_path: Path) -> None:
    """All of them, and all roots that could show it; the test above has the real kernels' on a few."""
    root, program = Path(__file__).parents[2], tmp_path / "all_divisors"
    source = root / "tests" / "helpers" / "all_divisors.cpp"
    flags = ["-std=c++17", "-O2", "-mfma", "-ffp-contract=off", f"-I{root / 'csrc'}"]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, str(source), "-o", str(program)], check=True, timeout=120)
    done = subprocess.run([str(program)], check=True, capture_output=True, text=True, timeout=120)
    tried, wrong = map(int, done.stdout.split())
    assert (tried, wrong) == (46_517_418, 0)


@needs_cpu
def test_an_instruction_set_this_processor_lacks_is_refused() -> None:
    before = _C.isa()
    with pytest.raises(ValueError, match="'sse9'"):
        _C.choose_isa("sse9")
    assert _C.isa() == before
    assert "baseline" in ISAS


@needs_cpu
@examples(25)
def test_any_number_of_threads_gives_the_same_bits(seed: int, large: bool) -> None:
    step = Step(seed, large, whole=seed % 3 == 0)
    frozen = compile_frozen(step.masks)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        norms = [BY_NAME["cpu"].norm(work, step.params, "sum_of_squares") for work in (step.work, frozen)]
        packed = [torch.zeros(n, dtype=p.dtype) for n, p in zip(frozen.packed_sizes, step.params, strict=True)]
        BY_NAME["cpu"].gather(frozen, step.params, packed)
        results.append((threads, step.run(BY_NAME["cpu"]), norms, packed))
    torch.set_num_threads(1)
    _, first, first_norms, first_packed = results[0]
    for threads, result, norms, packed in results[1:]:
        step.check(result, first, f"{threads} threads against one", any_nan=False)
        np.testing.assert_array_equal(norms, first_norms)
        for a, b, mask in zip(packed, first_packed, step.masks, strict=True):
            assert_same_bits(a, b, f"gather, {threads} threads against one, {mask}")


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("by", ["rows", "cols", "elements"])
def test_threads_do_not_undo_each_other_where_ages_mix(by: str, dtype: torch.dtype) -> None:
    """Parts of different age interleave in memory. A thread that writes back a neighbour's old value undoes its step;
    with two parts as large as a chunk, two threads walk the same memory at once, and a third of the attempts fails."""
    rng, shape = np.random.default_rng(3), (16, 4096)
    mask = FreezeMask(shape)
    sizes = {"rows": shape[0], "cols": shape[1], "elements": shape}
    born = rng.integers(0, 2, sizes[by])
    ages = Ages.of_elements(born) if by == "elements" else replace(Ages.none(mask), **{by: born})
    work = compile_live([mask], [ages])
    start, grad = (torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype) for _ in range(2))
    scalars = np.array(
        [
            adamw_scalars(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=4 - born, decoupled=True)
            for born in work.born.tolist()
        ],
        SCALARS,
    )
    scalar_set = work.first_born.astype(np.int32)

    def run() -> dict[str, Tensor]:
        p, m, v = start.clone(), torch.zeros(shape), torch.zeros(shape)
        operands = AdamWOperands([p], [m], [v], grads=[grad])
        BY_NAME["cpu"].adamw_(work, operands, scalars, scalar_set, l2=False, amsgrad=False)
        return {"p": p, "m": m, "v": v}

    alone = run()
    torch.set_num_threads(2)
    for attempt in range(60):
        for key, value in run().items():
            assert_same_bits(value, alone[key], f"attempt {attempt}, {key}, two threads against one")


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("operation", ["zero_", "scatter_", "gather"])
def test_threads_do_not_undo_each_other_where_rows_columns_and_elements_mix(operation: str, dtype: torch.dtype) -> None:
    """The parts of a frozen list interleave as well: whole rows, columns of the others, single elements of all."""
    rng, shape = np.random.default_rng(4), (32, 4096)
    mask = FreezeMask(
        shape,
        rows=range(0, 32, 2),
        cols=range(0, 4096, 3) if operation != "zero_" else None,
        elements=torch.from_numpy(rng.random(shape) < 0.3),
    )
    work, frozen = compile_frozen([mask]), mask.dense()
    tensor = torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype)
    packed = torch.zeros(mask.frozen_count, dtype=dtype)
    BY_NAME["cpu"].gather(work, [tensor], [packed])
    torch.set_num_threads(2)
    for attempt in range(60):
        if operation == "gather":
            got, expected = torch.zeros_like(packed), packed
            BY_NAME["cpu"].gather(work, [tensor], [got])
        elif operation == "zero_":
            got, expected = tensor.clone(), torch.where(frozen, torch.zeros_like(tensor), tensor)
            BY_NAME["cpu"].zero_(work, [got])
        else:
            got, expected = torch.ones_like(tensor), torch.where(frozen, tensor, torch.ones_like(tensor))
            BY_NAME["cpu"].scatter_(work, [got], [packed])
        assert_same_bits(got, expected, f"{operation}, attempt {attempt}, two threads")


@needs_cpu
def test_threads_are_as_many_as_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def watched(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            asked.append(arguments[-1])
            function(*arguments)

        return call

    operations = ("adamw", "norm", "scale", "zero", "copy")
    spy = SimpleNamespace(Runs=_C.Runs, **{name: watched(getattr(_C, name)) for name in operations})
    monkeypatch.setattr(native, "_C", spy)
    work, values = compile_live([FreezeMask((4, 4))]), torch.ones(4, 4)
    backend = native.CpuBackend()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        plain_step(backend, np.zeros(1, SCALARS), values.clone(), values, values.clone(), values.clone())
        backend.norm(work, [values], "sum_of_squares")
        backend.scale_(work, [values], torch.tensor(0.5))
        backend.zero_(work, [values.clone()])
        backend.gather(work, [values], [torch.zeros(16)])
        backend.scatter_(work, [values.clone()], [torch.zeros(16)])
        assert asked == [threads] * 6
        asked.clear()


TRAIN_AND_HASH = """
import hashlib, torch
import safefreeze_kernels as sf
torch.set_num_threads(3)
w = torch.nn.Parameter(torch.arange(300_000.0).sin().reshape(300, 1000))
plan = sf.FreezePlan({"w": sf.FreezeMask((300, 1000), rows=range(0, 300, 3), cols=[5])})
opt = sf.MaskedAdamW([("w", w)], lr=0.1, freeze=plan, backend="cpu")
for step in range(3):
    w.grad = (w.detach() * (step + 1)).cos()
    sf.clip_grad_norm_({"w": w}, 1.0, plan)
    opt.step()
digest = hashlib.sha256(w.detach().numpy().tobytes()).hexdigest()
"""
WITHOUT_OPENMP = """
import pathlib
exists = pathlib.Path.exists  # as on a platform that does not say what is loaded
pathlib.Path.exists = lambda self, **kw: str(self) != "/proc/self/maps" and exists(self, **kw)
"""
REPORT = """
from safefreeze_kernels.kernels import cpu as native
print(native.OPENMP, digest)
"""


@needs_cpu
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_one_openmp_runtime_and_threads_of_our_own_where_there_is_none() -> None:
    here: dict[str, Any] = {}
    exec(TRAIN_AND_HASH, here)
    lines = Path("/proc/self/maps").read_text().splitlines()
    loaded = {Path(line.split(maxsplit=5)[5]).name for line in lines if "omp" in line}
    runtimes = [name for name in loaded if name.startswith(("libgomp", "libomp", "libiomp"))]
    if native.OPENMP is not None:
        assert runtimes == [Path(native.OPENMP).name]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_OPENMP + TRAIN_AND_HASH + REPORT], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    borrowed, digest = done.stdout.split()
    assert borrowed == "None"
    assert digest == here["digest"], "threads of our own and torch's give different bits"


# --------------------------------------------------------------------------------------- nothing beyond a tensor's ends

TESTS = Path(__file__).parents[1]
GUARDED = """
import ctypes, mmap, sys
sys.path[:0] = {tests!r}
import torch
import test_kernels
from test_kernels import BY_NAME, ISAS, Step, compile_frozen
_C = getattr(test_kernels, "_C", None)

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
kept = []

def guarded(tensor, at_end):
    "A copy between two pages nobody may touch, up against the last one or the first."
    size = tensor.numel() * tensor.element_size()
    if tensor.numel() == 0:
        return tensor.clone()
    room = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    kept.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + room):
        assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0, ctypes.get_errno()
    offset = PAGE + (room - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.copy_(tensor.reshape(-1)).reshape(tensor.shape)

backend = BY_NAME[{name!r}]
for seed in range({seeds}):
    for isa in ISAS if backend.name == "cpu" else [None]:
        if isa:
            _C.choose_isa(isa)
        step = Step(seed, large=seed % 4 == 0, whole=seed % 3 == 0)
        frozen = compile_frozen(step.masks)
        for at_end in (True, False):
            print(isa, seed, at_end, step.masks, flush=True)
            step.params = [guarded(p, at_end) for p in step.params]
            step.grads = [None if g is None else guarded(g, at_end) for g in step.grads]
            step.state = [[guarded(m, at_end) for m in moments] for moments in step.state]
            step.run(backend, in_place=True)
            for work in (step.work, frozen):
                packed = [torch.zeros(n, dtype=p.dtype) for n, p in zip(work.packed_sizes, step.params)]
                packed = [guarded(t, at_end) for t in packed]
                backend.gather(work, step.params, packed)
                backend.scatter_(work, step.params, packed)
                backend.norm(work, step.params, "sum_of_squares")
                backend.zero_(work, step.params)
            backend.scale_(step.work, step.params, torch.tensor(0.5))
        step.params = step.grads = step.state = packed = None
        kept.clear()
print("done")
"""


@pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs mprotect")
@pytest.mark.parametrize("name", COMPILED)
def test_kernels_touch_nothing_beyond_the_ends_of_a_tensor(name: str) -> None:
    """Vectors are wider than what is left at the end of a row; a page that may not be touched would end the process."""
    program = GUARDED.format(tests=[path for path in sys.path if path.startswith(str(TESTS))], name=name, seeds=60)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    last = done.stdout.splitlines()[-1:] or [done.stderr]
    assert done.returncode == 0, f"exit status {done.returncode} at: {last[0]}\n{done.stderr[-2000:]}"
    assert last == ["done"]


# -------------------------------------------------------------------------------------- conversions, exhaustively

# beta1 = 0 with m = -0.0 makes m the gradient: the sum of -0.0 and anything is that thing, its zero's sign included.
# beta1 = 1, decay = 0, eps = 1 and step_size = -1 with p = g = -0.0 make p the moment: -0.0 - (-m) / (sqrt(0) / 1 + 1).
TAKE_GRADIENT = np.array([(1, 0, 1, 0, 1, 0, 0, 0, 1, 1, 1)], SCALARS)
STORE_MOMENT = np.array([(0, 0, 0, 1, 0, 0, 0, -1, 1, 1, 1)], SCALARS)


def conversion_backends() -> list[Any]:
    compiled = [pytest.param("cpu", isa, id=f"cpu-{isa}") for isa in ISAS]
    return [*(pytest.param(name, "", id=name) for name in BACKENDS if name != "cpu"), *compiled]


def one_step(name: str, isa: str, p: Tensor, g: Tensor, m: Tensor, scalars: np.ndarray) -> None:
    if isa:
        _C.choose_isa(isa)
    plain_step(BY_NAME[name], scalars, p, g, m, torch.zeros_like(m))


def every_stored_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def every_tie(dtype: torch.dtype) -> Tensor:
    """The float32 values half-way between neighbouring finite 16-bit values (the largest and 'one more' included), and
    their own neighbours on both sides."""
    stored = every_stored_value(dtype)
    magnitudes = stored[stored.isfinite() & ~stored.signbit()].double().sort().values
    one_more = 2 * magnitudes[-1] - magnitudes[-2]
    ties = ((magnitudes + torch.cat([magnitudes[1:], one_more[None]])) / 2).float()
    around = bits(ties)[:, None] + torch.tensor([-1, 0, 1], dtype=torch.int32)
    positive = around.reshape(-1).view(torch.float32)
    return torch.cat([positive, -positive])


SPECIAL_FLOATS = (
    0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000,
    0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0x33000000, 0x33000001, 0x32FFFFFF, 0x477FEFFF, 0x477FF000,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize(("name", "isa"), conversion_backends())
def test_every_stored_value_is_read_as_torch_reads_it(name: str, isa: str, dtype: torch.dtype) -> None:
    grads = every_stored_value(dtype)
    moments = torch.full((grads.numel(),), -0.0)
    one_step(name, isa, torch.zeros_like(grads), grads, moments, TAKE_GRADIENT)
    assert_same_bits(moments, grads.float(), f"{short(dtype)} to float32", any_nan=True)
    if dtype == torch.bfloat16:  # as state, too
        moments = torch.full((grads.numel(),), -0.0, dtype=dtype)
        one_step(name, isa, torch.zeros(grads.shape), grads.float(), moments, TAKE_GRADIENT)
        assert_same_bits(moments, grads, "bfloat16 state", any_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize(("name", "isa"), conversion_backends())
def test_every_tie_and_a_million_random_floats_are_rounded_as_torch_rounds_them(
    name: str, isa: str, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(9)
    anything = torch.from_numpy(rng.integers(0, 2**32, 500_000, np.uint32).view(np.float32))
    near = torch.from_numpy((rng.standard_normal(500_000) * 10.0 ** rng.uniform(-9, 6, 500_000)).astype(np.float32))
    special = torch.stack([from_bits(pattern, torch.float32) for pattern in SPECIAL_FLOATS])
    values = torch.cat([every_tie(dtype), special, anything, near])
    expected = values.to(dtype)
    params = torch.full(values.shape, -0.0, dtype=dtype)
    one_step(name, isa, params, torch.full_like(params, -0.0), values.clone(), STORE_MOMENT)
    assert_same_bits(params, expected, f"float32 to {short(dtype)}", any_nan=True)
    if dtype == torch.bfloat16:  # as state, too
        moments = torch.full(values.shape, -0.0, dtype=dtype)
        one_step(name, isa, torch.zeros(values.shape), values, moments, TAKE_GRADIENT)
        assert_same_bits(moments, expected, "float32 to bfloat16 state", any_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(("name", "isa"), conversion_backends())
def test_scaling_every_value_rounds_once(name: str, isa: str, dtype: torch.dtype) -> None:
    if isa:
        _C.choose_isa(isa)
    values = every_stored_value(dtype) if dtype != torch.float32 else every_tie(torch.float16)
    scaled = values.clone()
    BY_NAME[name].scale_(compile_live([FreezeMask(values.shape)]), [scaled], torch.tensor(0.5))
    assert_same_bits(scaled, (values.float() * 0.5).to(dtype), f"{short(dtype)} halved", any_nan=True)


def test_the_rounding_tests_meet_every_case() -> None:
    """What they compare with is right where it is easy to say what right is."""
    ties = every_tie(torch.float16)
    # 0 | 2**-24: the tie is 2**-25, to even: 0; just above: 2**-24. 65504 | 65536: the tie is 65520, up to infinity
    below, tie, above = (ties[i].to(torch.float16).item() for i in range(3))
    assert (below, tie, above) == (0.0, 0.0, 2.0**-24)
    largest = ties[: ties.numel() // 2][-3:]
    assert largest[1].item() == 65520.0
    assert [value.to(torch.float16).item() for value in largest] == [65504.0, math.inf, math.inf]


# ------------------------------------------------------------------------------------------------- both sides agree


@needs_cpu
@pytest.mark.parametrize("struct", ["RunPart", "Chunk", "Run", "AdamWTensor", "Scalars"])
def test_an_extension_of_another_build_is_refused(struct: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a crash later: sizes are compared when the module is imported."""

    def import_again() -> None:
        spec = importlib.util.spec_from_file_location("safefreeze_kernels.kernels._again", native.__file__)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    import_again()
    sizes = _C.STRUCT_SIZES
    assert sizes["Run"] == RUN.itemsize
    assert sizes["Chunk"] == CHUNK.itemsize
    monkeypatch.setattr(_C, "STRUCT_SIZES", {**sizes, struct: sizes[struct] + 8})
    with pytest.raises(ImportError, match="reinstall"):
        import_again()


def test_parts_and_arrays_are_two_views_of_one_list() -> None:
    """The reference backend reads parts, the compiled ones the arrays: the same rectangles in the same order."""
    masks, ages, _ = random_case(1, large=False)
    work = compile_live(masks, ages)
    assert all(isinstance(part, Part) for part in work.parts)
    assert [part.tensor for part in work.parts] == Runs.of(work).parts["tensor"].tolist()
    assert shown(torch.tensor(-0.0)) == "-0.0 (0x80000000)"


# --------------------------------------------------------------------------------- rounding of bf16 and f16 parameters


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 with Python's integers."""
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [b >> 32 ^ counter[1] ^ key[0], b & 0xFFFFFFFF, a >> 32 ^ counter[3] ^ key[1], a & 0xFFFFFFFF]
        key = [key[0] + 0x9E3779B9 & 0xFFFFFFFF, key[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, expected)]
    assert philox(words[0], words[1]) == words[2]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 0x299F31D0A4093822])
def test_noise_is_philox_of_seed_step_tensor_and_element(seed: int) -> None:
    elements = torch.tensor([0, 1, 7, 8, 12345, 2**31 + 5, 2**40 + 3])
    noise = reference.noise_of(elements, seed=seed, step=9, number=4).tolist()
    for element, got in zip(elements.tolist(), noise, strict=True):
        group = element // 8
        words = philox([group & 0xFFFFFFFF, group >> 32, 9, 4], [seed & 0xFFFFFFFF, seed >> 32])
        assert got == words[element % 8 // 2] >> 16 * (element % 2) & 0xFFFF, f"element {element}"


def rounded(name: str, values: Tensor, dtype: torch.dtype, step: int = 1) -> Tensor:
    """``values`` through a step that changes nothing but moves them from the gradient to the parameter, rounded."""
    n = values.numel()
    p, m, v = torch.zeros(n, dtype=dtype), -values.clone(), torch.ones(n)
    scalars = np.array([(0, 0, 0, 1, 0, 1, 0, 1, 1, 0, step)], SCALARS)
    plain_step(BY_NAME[name], scalars, p, torch.zeros(n, dtype=dtype), m, v, stochastic=True)
    return p


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("name", BACKENDS)
def test_stochastic_rounding_is_to_a_neighbour_and_right_on_average(name: str, dtype: torch.dtype) -> None:
    n = 40_000
    for value in (1.0 + 2.0**-12, -3.0001, 1e-3, 6e-8 if dtype == torch.float16 else 1e-30, 65_000.0):
        got = rounded(name, torch.full((n,), value), dtype).double()
        neighbours = sorted(set(got.tolist()))
        assert len(neighbours) == 2 and neighbours[0] < value < neighbours[1], f"{value}: {neighbours}"
        share = (value - neighbours[0]) / (neighbours[1] - neighbours[0])
        found = (got == neighbours[1]).double().mean().item()
        # five standard deviations of a binomial share, and one part in 2**16 that 16 bits of noise cannot tell
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / n) + 2.0**-16, f"{value}: {found} for {share}"
        again = rounded(name, torch.full((n,), value), dtype, step=2).double()
        assert not torch.equal(got, again), "each step has its own noise"
    for value in (0.0, 1.0, -2.0, math.inf, -math.inf, math.nan):  # representable: stays
        exact = torch.full((64,), value)
        assert_same_bits(rounded(name, exact, dtype), exact.to(dtype), f"{value}", any_nan=True)


@needs_cpu
def test_stochastic_float16_equals_the_specification_on_all_exponents() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    words[:70_000] = (words[:70_000] & 0x807FFFFF) | (words[:70_000] % 50 + 95) << 23  # around float16's range
    values = torch.from_numpy(words.view(np.float32).copy())
    for dtype in (torch.float16, torch.bfloat16):
        assert_same_bits(rounded("cpu", values, dtype), rounded("reference", values, dtype), short(dtype), any_nan=True)


def test_a_master_survives_being_split() -> None:
    words = np.random.default_rng(1).integers(0, 2**32, 300_000, np.uint32)
    words[:4] = [0x7F7FFFFF, 0xFF7FFFFF, 0x00008000, 0x80007FFF]
    master = torch.from_numpy(words.view(np.float32).copy())
    p, remainder = reference.to_remainder(master)
    assert_same_bits(reference.from_remainder(p, remainder), master, "split and joined", any_nan=True)
    assert torch.equal(p.isnan(), master.isnan())
    nearest = master.bfloat16()  # ties to even there
    tie = torch.from_numpy(words & 0xFFFF == 0x8000)
    assert_same_bits(p, nearest, "rounded to nearest", where=~tie, any_nan=True)
