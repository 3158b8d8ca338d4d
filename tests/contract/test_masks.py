"""`FreezeMask` and `FreezePlan` in memory: what they hold, equality, fingerprints, summary, `check`."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from safefreeze_kernels import FreezeMask, FreezePlan
from safefreeze_kernels.kernels.parts import compile_frozen, compile_live
from safefreeze_kernels.kernels.runs import Runs

quickly = settings(max_examples=150)


class Written(NamedTuple):
    """One way of writing a mask down."""

    shape: tuple[int, ...]
    rows: list[int] | None = None
    cols: list[int] | None = None
    elements: np.ndarray | None = None

    def mask(self) -> FreezeMask:
        elements = None if self.elements is None else torch.from_numpy(self.elements)
        return FreezeMask(self.shape, rows=self.rows, cols=self.cols, elements=elements)

    def oracle(self) -> np.ndarray:
        """The frozen set, element by element, from the definition of rows, columns and elements."""
        frozen = np.zeros(self.shape, bool) if self.elements is None else self.elements.copy()
        for row in self.rows or ():
            if len(self.shape) > 1:
                frozen[np.unravel_index(row, self.shape[:-1])] = True
            elif self.shape:
                frozen[row] = True
            else:
                frozen[()] = True
        for col in self.cols or ():
            frozen[..., col] = True
        return frozen


@st.composite
def written(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> Written:
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        if shape and draw(st.booleans()):  # rows of whole bytes
            shape = (*shape[:-1], draw(st.sampled_from((8, 16))))
    n_rows = math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)

    def some(size: int) -> list[int] | None:
        if not draw(st.booleans()):
            return None
        return [i for i in draw(st.permutations(range(size))) if draw(st.booleans())]

    rows = some(n_rows)
    cols = some(shape[-1]) if len(shape) > 1 else None
    elements = None
    if draw(st.booleans()):
        size = math.prod(shape)
        elements = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool).reshape(shape)
    return Written(shape, rows, cols, elements)


@st.composite
def pairs_of_one_shape(draw: st.DrawFn) -> tuple[Written, Written]:
    first = draw(written())
    return first, draw(written(first.shape))


# ------------------------------------------------------------------------------------------------- what is frozen


@quickly
@given(written())
def test_dense_is_the_union_of_rows_columns_and_elements(w: Written) -> None:
    dense = w.mask().dense()
    assert dense.dtype == torch.bool
    assert tuple(dense.shape) == w.shape
    np.testing.assert_array_equal(dense.numpy(), w.oracle())


@quickly
@given(written())
def test_counts(w: Written) -> None:
    mask, oracle = w.mask(), w.oracle()
    assert mask.shape == w.shape
    assert mask.numel == oracle.size
    assert mask.frozen_count == oracle.sum()
    assert mask.live_count == (~oracle).sum()
    assert mask.frozen_fraction == (oracle.mean() if oracle.size else 0.0)


@quickly
@given(written())
def test_canonical_form_is_whole_rows_whole_columns_and_the_rest(w: Written) -> None:
    mask = w.mask()
    matrix = w.oracle().reshape(mask.matrix_shape)
    full_rows, full_cols = np.flatnonzero(matrix.all(axis=1)), np.flatnonzero(matrix.all(axis=0))
    if matrix.size == 0:
        full_rows = full_cols = np.empty(0)
    elif matrix.all():  # said once: as all rows or as all columns
        assert (len(mask.rows), len(mask.cols)) in ((matrix.shape[0], 0), (0, matrix.shape[1]))
        assert len(w.shape) > 1 or not len(mask.cols), "a vector has rows only"
        full_rows, full_cols = (full_rows, np.empty(0)) if len(mask.rows) else (np.empty(0), full_cols)
    np.testing.assert_array_equal(mask.rows.numpy(), full_rows)
    np.testing.assert_array_equal(mask.cols.numpy(), full_cols)
    assert mask.rows.dtype == mask.cols.dtype == torch.int64
    np.testing.assert_array_equal(mask.live_rows, np.setdiff1d(np.arange(matrix.shape[0]), full_rows))
    np.testing.assert_array_equal(mask.live_cols, np.setdiff1d(np.arange(matrix.shape[1]), full_cols))
    rest = matrix.copy()
    rest[full_rows.astype(int)] = False
    rest[:, full_cols.astype(int)] = False
    if rest.any():
        np.testing.assert_array_equal(mask.elements.numpy(), rest.reshape(w.shape))
        bits = np.unpackbits(mask.bits, bitorder="little")
        np.testing.assert_array_equal(bits[: mask.numel].astype(bool), rest.reshape(-1))
        assert not bits[mask.numel :].any(), "bits past the last element are set"
    else:
        assert mask.elements is None
        assert mask.bits is None


@quickly
@given(written())
@example(Written((3, 8), rows=[0], cols=[1], elements=np.arange(24).reshape(3, 8) > 7))
@example(Written((2, 16), cols=list(range(0, 16, 2)), elements=np.arange(32).reshape(2, 16) % 2 == 1))
def test_a_mask_from_bits_is_that_of_its_bools(w: Written) -> None:
    elements = np.zeros(w.shape, bool) if w.elements is None else w.elements
    bits = np.packbits(elements.reshape(-1), bitorder="little")
    given = bits.copy()
    if bits.size and elements.size % 8:
        given[-1] |= 0xFF << elements.size % 8 & 0xFF  # bits after the last element do not count
    before = given.copy()
    mask = FreezeMask.from_bits(w.shape, given, w.rows, w.cols)
    assert mask == w.mask() and (given == before).all()
    assert np.array_equal(mask.dense().numpy(), w.oracle())


def test_bits_of_another_size_are_refused() -> None:
    for bits in (np.zeros(2, np.uint8), np.zeros(3, np.int8), np.zeros((1, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"from_bits: bits is .*expected uint8 \(3,\)"):
            FreezeMask.from_bits((5, 4), bits)


@quickly
@given(written())
def test_packed_shape_is_live_rows_by_live_columns_or_a_list_of_live_elements(w: Written) -> None:
    mask = w.mask()
    n_live_rows, n_live_cols = len(mask.live_rows), len(mask.live_cols)
    if mask.elements is not None:
        assert mask.packed_shape == (mask.live_count,)
    elif not len(mask.rows) and not len(mask.cols):
        assert mask.packed_shape == w.shape
    elif len(w.shape) < 2:
        assert mask.packed_shape == (n_live_rows,)
    else:
        assert mask.packed_shape == (n_live_rows, n_live_cols)
    assert math.prod(mask.packed_shape) == mask.live_count == int((~w.oracle()).sum())


@quickly
@given(written())
@example(Written((2, 3), rows=[1], cols=[0]))
@example(Written((1, 4), cols=[1, 2]))
@example(Written((4, 1), rows=[1, 2]))
@example(Written((3, 3), rows=[0, 1, 2]))
@example(Written((0, 3), cols=[0, 2]))
def test_the_same_frozen_set_written_differently_is_the_same_mask(w: Written) -> None:
    mask, dense = w.mask(), torch.from_numpy(w.oracle())
    others = {
        "as elements": FreezeMask(w.shape, elements=dense),
        "with elements added": FreezeMask(w.shape, rows=w.rows, cols=w.cols, elements=dense),
        "from its own parts": FreezeMask(
            w.shape, rows=mask.rows, cols=mask.cols if len(w.shape) > 1 else None, elements=mask.elements
        ),
        "pickled": pickle.loads(pickle.dumps(mask)),
        "deep-copied": copy.deepcopy(mask),
        "united with itself": mask | mask,
    }
    for how, other in others.items():
        assert other == mask, how
        assert other.fingerprint == mask.fingerprint, how
        assert hash(other) == hash(mask), how
        assert other.packed_shape == mask.packed_shape, how
        assert repr(other) == repr(mask), how
        np.testing.assert_array_equal(other.dense().numpy(), dense.numpy(), err_msg=how)


def test_every_mask_of_a_small_shape_has_its_own_fingerprint() -> None:
    seen: dict[str, Any] = {}
    for shape in ((6,), (2, 3), (3, 2), (1, 6), (6, 1), (1, 2, 3), (2, 1, 3)):
        for flags in itertools.product((False, True), repeat=6):
            mask = FreezeMask(shape, elements=torch.tensor(flags).reshape(shape))
            where = (shape, flags)
            assert seen.setdefault(mask.fingerprint, where) == where, f"{where} has the fingerprint of another mask"
    assert len(seen) == 7 * 64


@quickly
@given(pairs_of_one_shape())
def test_equality_is_equality_of_the_frozen_sets(pair: tuple[Written, Written]) -> None:
    one, two = pair
    same = bool((one.oracle() == two.oracle()).all())
    assert (one.mask() == two.mask()) is same
    assert (one.mask().fingerprint == two.mask().fingerprint) is same


def test_a_mask_equals_only_masks() -> None:
    mask = FreezeMask((2, 2), rows=[0])
    assert mask != mask.dense()
    assert mask != "mask"
    assert mask != FreezeMask((2, 2, 1), rows=[0, 1])


@quickly
@given(pairs_of_one_shape())
def test_union_of_masks(pair: tuple[Written, Written]) -> None:
    one, two = pair
    union = one.mask() | two.mask()
    np.testing.assert_array_equal(union.dense().numpy(), one.oracle() | two.oracle())
    assert union == two.mask() | one.mask()


def test_union_of_different_shapes_names_both() -> None:
    with pytest.raises(ValueError, match=r"union.*\(2, 3\).*\(3, 2\)"):
        FreezeMask((2, 3)) | FreezeMask((3, 2))
    with pytest.raises(TypeError):
        FreezeMask((2, 3)) | [0]  # type: ignore[operator]


# ----------------------------------------------------------------------------------------------- ranks and sizes


def test_entries_of_a_vector_are_its_rows() -> None:
    mask = FreezeMask((5,), rows=[1, 3])
    assert mask.matrix_shape == (5, 1)
    assert mask.packed_shape == (3,)
    assert mask.dense().tolist() == [False, True, False, True, False]
    with pytest.raises(ValueError, match="cols of a 1-D tensor, expected rows"):
        FreezeMask((5,), cols=[1])


def test_a_scalar_has_one_row() -> None:
    frozen, live = FreezeMask((), rows=[0]), FreezeMask(())
    assert frozen.matrix_shape == (1, 1)
    assert (frozen.frozen_fraction, live.frozen_fraction) == (1.0, 0.0)
    assert (frozen.packed_shape, live.packed_shape) == ((0,), ())
    assert frozen.dense().shape == ()
    assert bool(frozen.dense())
    assert frozen == FreezeMask((), elements=torch.tensor(True))
    with pytest.raises(ValueError, match="cols of a 0-D tensor"):
        FreezeMask((), cols=[0])


def test_leading_dimensions_flatten_into_rows() -> None:
    mask = FreezeMask((2, 3, 4), rows=[4], cols=[1])
    assert mask.matrix_shape == (6, 4)
    assert mask.dense()[1, 1].all()
    assert mask.dense()[..., 1].all()
    assert mask.frozen_count == 4 + 6 - 1


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3), (0, 0)])
def test_a_tensor_without_elements_has_nothing_to_freeze(shape: tuple[int, ...]) -> None:
    mask = FreezeMask(shape, elements=torch.zeros(shape, dtype=torch.bool))
    assert (mask.frozen_count, mask.live_count, mask.frozen_fraction) == (0, 0, 0.0)
    assert mask == FreezeMask(shape)
    assert mask.packed_shape == shape
    n_rows, n_cols = mask.matrix_shape
    everything = FreezeMask(shape, rows=range(n_rows), cols=range(n_cols) if len(shape) > 1 else None)
    assert everything == mask
    assert Runs.of(compile_live([mask])).chunks.size == Runs.of(compile_frozen([mask])).chunks.size == 0


# -------------------------------------------------------------------------------------------- kinds of index lists

_WANTED = FreezeMask((5, 4), rows=[1, 3])


@pytest.mark.parametrize(
    "rows",
    [
        [1, 3],
        [3, 1],
        (1, 3),
        range(1, 4, 2),
        [np.int64(1), np.int32(3)],
        np.array([1, 3]),
        np.array([3, 1], np.uint8),
        np.array([1, 3], np.int32),
        np.array([1, 3], np.uint64),
        np.array([1, 3], ">i4"),
        torch.tensor([1, 3]),
        torch.tensor([3, 1], dtype=torch.int32),
        torch.tensor([1, 3], dtype=torch.uint8),
        torch.arange(4)[1::2],
        [False, True, False, True, False],
        np.array([0, 1, 0, 1, 0], bool),
        torch.tensor([0, 1, 0, 1, 0], dtype=torch.bool),
    ],
    ids=lambda rows: f"{type(rows).__name__}-{getattr(rows, 'dtype', '')}",
)
def test_kinds_of_row_indices(rows: Any) -> None:
    assert FreezeMask((5, 4), rows=rows) == _WANTED


@pytest.mark.parametrize("cols", [[2], (2,), range(2, 3), np.array([2]), torch.tensor([2], dtype=torch.int32)])
def test_kinds_of_column_indices(cols: Any) -> None:
    assert FreezeMask((5, 4), cols=cols) == FreezeMask((5, 4), cols=torch.tensor([0, 0, 1, 0], dtype=torch.bool))


@pytest.mark.parametrize("empty", [None, [], (), range(0), np.empty(0, np.int64), torch.empty(0, dtype=torch.int64)])
def test_empty_index_lists_freeze_nothing(empty: Any) -> None:
    assert FreezeMask((5, 4), rows=empty, cols=empty) == FreezeMask((5, 4))


def test_elements_may_be_an_array_or_a_strided_tensor() -> None:
    flags = torch.arange(12).reshape(4, 3) % 5 == 0
    mask = FreezeMask((3, 4), elements=flags.t())
    assert mask == FreezeMask((3, 4), elements=flags.t().contiguous().numpy())
    assert torch.equal(mask.dense(), flags.t())


# ------------------------------------------------------------------------------------------------- immutability


def test_editing_what_a_mask_returns_does_not_change_it() -> None:
    mask = FreezeMask((4, 5), rows=[1], cols=[2], elements=torch.eye(4, 5, dtype=torch.bool))
    before, dense = mask.fingerprint, mask.dense()
    for tensor in (mask.rows, mask.cols, mask.dense(), mask.elements):
        tensor.fill_(1)
    for array in (mask.live_rows, mask.live_cols):
        array[:] = 0
    with pytest.raises(ValueError, match="read-only"):
        mask.bits[0] = 255
    with pytest.raises(ValueError, match="read-only"):
        pickle.loads(pickle.dumps(mask)).bits[0] = 255
    assert mask.fingerprint == before
    assert torch.equal(mask.dense(), dense)


def test_editing_what_a_mask_was_made_from_does_not_change_it() -> None:
    rows, cols = np.array([1, 2]), torch.tensor([0])
    flags, elements = torch.tensor([True, False, False, False]), torch.eye(4, dtype=torch.bool)
    by_index = FreezeMask((4, 4), rows=rows, cols=cols)
    by_flags = FreezeMask((4, 4), rows=flags, elements=elements)
    prints = by_index.fingerprint, by_flags.fingerprint
    rows[:], cols[:], flags[:], elements[:] = 3, 3, True, True
    assert (by_index.fingerprint, by_flags.fingerprint) == prints
    assert by_index.rows.tolist() == [1, 2]


def test_editing_what_a_plan_was_made_from_does_not_change_it() -> None:
    masks = {"a": FreezeMask((2,), rows=[0])}
    metadata = {"source": ["here"]}
    plan = FreezePlan(masks, metadata)
    masks["b"] = FreezeMask((2,), rows=[1])
    metadata["source"].append("there")
    assert list(plan) == ["a"]
    assert plan.metadata == {"source": ["here"]}


# ------------------------------------------------------------------------------------------------------ the plan


@pytest.fixture
def plan() -> FreezePlan:
    return FreezePlan(
        {
            "up.weight": FreezeMask((4, 6), rows=[1]),
            "down.weight": FreezeMask((6, 4), cols=[0, 3]),
            "up.bias": FreezeMask((4,), rows=[1]),
        },
        {"method": "by hand"},
    )


def test_a_plan_is_a_read_only_mapping(plan: FreezePlan) -> None:
    assert isinstance(plan, Mapping)
    assert len(plan) == 3
    assert list(plan) == list(plan.keys()) == ["up.weight", "down.weight", "up.bias"]
    assert "up.bias" in plan
    assert "down.bias" not in plan
    assert plan["up.bias"] == FreezeMask((4,), rows=[1])
    assert plan.get("down.bias") is None
    assert dict(plan) == dict(plan.items())
    assert list(plan.values()) == [plan[name] for name in plan]
    assert {**plan}.keys() == set(plan)
    with pytest.raises(KeyError, match=r"down\.bias"):
        plan["down.bias"]
    with pytest.raises(TypeError):
        plan["up.bias"] = FreezeMask((4,))  # type: ignore[index]
    with pytest.raises(TypeError):
        del plan["up.bias"]  # type: ignore[attr-defined]
    assert not FreezePlan()
    assert plan


def test_a_plan_takes_pairs_and_any_mapping(plan: FreezePlan) -> None:
    assert FreezePlan(list(plan.items())) == plan
    assert FreezePlan(iter(plan.items())) == plan
    assert FreezePlan(plan) == plan


def test_frozen_fraction_counts_the_named_parameters(plan: FreezePlan) -> None:
    assert plan.frozen_fraction == (6 + 12 + 1) / (24 + 24 + 4)
    assert FreezePlan().frozen_fraction == 0.0
    assert FreezePlan({"empty": FreezeMask((0, 3))}).frozen_fraction == 0.0


def test_plans_are_equal_whatever_the_order_and_the_metadata(plan: FreezePlan) -> None:
    turned = FreezePlan(reversed(list(plan.items())))
    assert turned == plan
    assert turned.fingerprint == plan.fingerprint
    assert hash(turned) == hash(plan)
    assert len({plan, turned}) == 1
    assert plan != dict(plan)


def test_plans_differ_by_name_shape_and_frozen_set(plan: FreezePlan) -> None:
    masks = dict(plan)
    others = {
        "a mask less": {name: mask for name, mask in masks.items() if name != "up.bias"},
        "a mask that freezes nothing more": {**masks, "down.bias": FreezeMask((6,))},
        "another name": {**{n: m for n, m in masks.items() if n != "up.bias"}, "up.bia": masks["up.bias"]},
        "another row": {**masks, "up.weight": FreezeMask((4, 6), rows=[2])},
        "another shape": {**masks, "up.bias": FreezeMask((5,), rows=[1])},
        "masks swapped": {**masks, "up.weight": FreezeMask((4, 6)), "other": masks["up.weight"]},
    }
    prints = {plan.fingerprint}
    for how, changed in others.items():
        other = FreezePlan(changed)
        assert other != plan, how
        prints.add(other.fingerprint)
    assert len(prints) == 1 + len(others)
    a, b = FreezeMask((1,)), FreezeMask((2,))
    assert FreezePlan({"ab": a, "c": b}) != FreezePlan({"a": a, "bc": b})


def test_copies_of_a_plan_are_equal(plan: FreezePlan) -> None:
    for other in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other == plan
        assert other.metadata == plan.metadata
        assert dict(other) == dict(plan)


def test_union_of_plans(plan: FreezePlan) -> None:
    other = FreezePlan(
        {"up.weight": FreezeMask((4, 6), cols=[5]), "norm": FreezeMask((6,), rows=range(6))},
        {"method": "other", "n": 2},
    )
    union = plan | other
    assert set(union) == {*plan, "norm"}
    assert union["up.weight"] == FreezeMask((4, 6), rows=[1], cols=[5])
    assert union["down.weight"] == plan["down.weight"]
    assert union["norm"] == other["norm"]
    assert union == other | plan
    assert union.metadata == {"method": "other", "n": 2}
    assert plan["up.weight"] == FreezeMask((4, 6), rows=[1]), "the union changed its left side"
    with pytest.raises(TypeError):
        plan | dict(other)  # type: ignore[operator]


def test_union_of_plans_for_different_models_names_the_parameter(plan: FreezePlan) -> None:
    with pytest.raises(ValueError, match=r"'up\.weight'.*\(4, 6\).*\(6, 4\).*same model"):
        plan | FreezePlan({"up.weight": FreezeMask((6, 4))})


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"up.weight": torch.ones(2, dtype=torch.bool)}, "'up.weight' is a Tensor, expected .* FreezeMask"),
        ({"up.weight": [1, 2]}, "'up.weight' is a list"),
        ({3: FreezeMask((2,))}, "entry 3"),
    ],
)
def test_a_plan_holds_names_and_masks_only(masks: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FreezePlan(masks)


@pytest.mark.parametrize("metadata", [{"a": {1, 2}}, {"a": float("nan")}, {("a",): 1}, {"a": torch.zeros(2)}, 5])
def test_metadata_is_what_json_can_hold(metadata: Any) -> None:
    with pytest.raises(TypeError, match="FreezePlan: metadata must be what JSON can hold"):
        FreezePlan({}, metadata)


# -------------------------------------------------------------------------------------------------- fingerprints

_PROGRAM = """
import torch
from safefreeze_kernels import FreezeMask, FreezePlan
masks = {
    "up.weight": FreezeMask((4, 6), rows=[1], cols=[2, 5]),
    "down.weight": FreezeMask((6, 4), elements=torch.arange(24).reshape(6, 4) % 5 == 0),
    "bias": FreezeMask((4,), rows=[1]),
    "scale": FreezeMask(()),
}
print(FreezePlan({name: masks[name] for name in sorted(masks, key=hash)}).fingerprint)
"""


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    # Plan files carry it: changing how it is made would make every plan saved before unreadable.
    expected = "584c4ce7e4b81db7675c29032c403b3ba598065ee484024b7c35bbc43cb611c0"
    command = [sys.executable, "-c", _PROGRAM]
    environment = {**os.environ, "PYTHONHASHSEED": "271828"}
    assert (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip() == expected
    )


# ------------------------------------------------------------------------------------------------------- summary

_KINDS = {
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (20, 8),
    "mlp.up_proj": (20, 8),
    "mlp.down_proj": (8, 20),
}


def llama_like(n_layers: int, *, norms: bool) -> FreezePlan:
    masks = {
        f"model.layers.{layer}.{kind}.weight": FreezeMask(shape, rows=range(layer % (shape[0] + 1)))
        for layer in range(n_layers)
        for kind, shape in _KINDS.items()
    }
    if norms:
        for layer in range(n_layers):
            masks[f"model.layers.{layer}.input_layernorm.weight"] = FreezeMask((8,))
            masks[f"model.layers.{layer}.post_attention_layernorm.weight"] = FreezeMask((8,), rows=range(8))
        masks |= {name: FreezeMask((32000, 4096)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        masks["model.norm.weight"] = FreezeMask((8,), rows=[0])
    return FreezePlan(masks)


def cells(summary: str) -> dict[str, list[str]]:
    """Rows of the table by their first cell."""
    rows = [line.split() for line in summary.splitlines()]
    start = next(i for i, row in enumerate(rows) if row[:1] == ["layer"])
    return {row[0]: row[1:] for row in rows[start:-1]}


def test_summary_of_a_llama_like_plan() -> None:
    plan = llama_like(30, norms=False)
    summary = plan.summary()
    assert max(map(len, summary.splitlines())) <= 80, summary
    assert plan.fingerprint[:12] in summary
    table = cells(summary)
    assert table["layer"] == [kind.split(".")[1] for kind in _KINDS] + ["all"]
    assert list(table) == ["layer", *map(str, range(30)), "all"], "layers in another order than the model's"
    for layer in range(30):
        shares = [min(layer % (rows + 1), rows) / rows for rows, _ in _KINDS.values()]
        of_layer = [(s, plan[f"model.layers.{layer}.{kind}.weight"]) for s, kind in zip(shares, _KINDS, strict=True)]
        whole = sum(m.frozen_count for _, m in of_layer) / sum(m.numel for _, m in of_layer)
        assert table[str(layer)] == [f"{share:.1%}" for share in [*shares, whole]], f"layer {layer}"
    by_kind = [
        sum(plan[f"model.layers.{layer}.{kind}.weight"].frozen_fraction for layer in range(30)) / 30 for kind in _KINDS
    ]
    assert table["all"] == [f"{share:.1%}" for share in [*by_kind, plan.frozen_fraction]]
    total = sum(mask.numel for mask in plan.values())
    frozen = sum(mask.frozen_count for mask in plan.values())
    assert f"{len(plan)} parameters, {total:,} elements: {frozen:,} frozen, {total - frozen:,} live" in summary


def test_summary_of_a_whole_model_fits_too() -> None:
    plan = llama_like(30, norms=True)
    summary = plan.summary()
    too_long = [line for line in summary.splitlines() if len(line) > 80]
    assert not too_long, too_long
    assert cells(summary)["all"][-1] == f"{plan.frozen_fraction:.1%}"
    words = " ".join(summary.split())
    assert "5 more kinds of module are counted under all" in words
    assert f"{sum(mask.live_count for mask in plan.values()):,} live" in words


@pytest.mark.parametrize(
    "name",
    [
        "weight",
        "bias",
        "0.weight",
        "0.bias",
        "3.0.1.weight",
        "blocks.weight",
        "h.11.attn.c_attn.bias",
        "heads.all.weight",
        "layer.weight",
        "moe.experts.7.w1",
        "x" * 200 + ".weight",
        "up [0].weight",
        "[bold].weight",
        "[/red].weight",
        "weiß.gewicht",
        "",
    ],
)
def test_summary_of_odd_names(name: str) -> None:
    plan = FreezePlan({name: FreezeMask((2, 4), rows=[0]), "model.norm.weight": FreezeMask((8,), rows=range(8))})
    summary = plan.summary()
    assert max(map(len, summary.splitlines())) <= 80, summary
    assert "75.0%" in summary.splitlines()[-2].split(), f"the total is not 12 of 16:\n{summary}"
    assert summary.endswith("2 parameters, 16 elements: 12 frozen, 4 live")
    kind = name.removesuffix(".weight")
    if kind in ("[bold]", "[/red]", "layer"):
        assert kind in summary.replace("\n", "").split(), f"{kind!r} is missing:\n{summary}"


def test_summary_shows_weights_and_biases_apart() -> None:
    plan = FreezePlan(
        {"model.layers.0.fc.weight": FreezeMask((4, 2)), "model.layers.0.fc.bias": FreezeMask((4,), rows=[0])}
    )
    table = cells(plan.summary())
    assert table["layer"] == ["fc", "fc.bias", "all"]
    assert table["0"] == ["0.0%", "25.0%", "8.3%"]


def test_summary_says_what_is_frozen_whole() -> None:
    whole, part = FreezeMask((4, 2), elements=np.ones((4, 2), bool)), FreezeMask((4, 2), rows=[0, 1, 2])
    assert "1 of 2 parameters is frozen whole" in FreezePlan({"a": whole, "b": part}).summary()
    assert "2 of 2 parameters are frozen whole" in FreezePlan({"a": whole, "b": whole}).summary()
    assert "whole" not in FreezePlan({"b": part, "none": FreezeMask((0, 2))}).summary()


def test_summary_of_nothing() -> None:
    assert FreezePlan().summary().endswith("0 parameters, 0 elements: 0 frozen, 0 live")
    assert "1 parameters, 0 elements" in FreezePlan({"w": FreezeMask((0, 2))}).summary()


def test_repr_says_what_is_frozen() -> None:
    mask = FreezeMask((4, 6), rows=[1], cols=[0], elements=torch.eye(4, 6, dtype=torch.bool))
    assert repr(mask) == "FreezeMask((4, 6), frozen: 1 rows + 1 cols + 2 elements, 45.8%)"
    assert repr(FreezeMask((3,))) == "FreezeMask((3,), frozen: nothing, 0.0%)"
    plan = FreezePlan({"w": mask})
    assert repr(plan) == f"FreezePlan(1 parameters, 45.8% frozen, fingerprint {plan.fingerprint[:12]})"


# --------------------------------------------------------------------------------------------------- check(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.up = nn.Linear(4, 5)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def test_a_plan_that_fits_passes_check() -> None:
    model = Tied()
    plan = FreezePlan({"up.weight": FreezeMask((5, 4), rows=[2]), "up.bias": FreezeMask((5,), rows=[2])})
    assert plan.check(model) is None
    assert plan.check(dict(model.named_parameters())) is None
    assert plan.check(model.named_parameters()) is None
    assert FreezePlan().check(model) is None


def test_check_takes_either_name_of_a_tied_weight() -> None:
    mask = FreezeMask((6, 4), rows=[0])
    for names in (["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]):
        FreezePlan(dict.fromkeys(names, mask)).check(Tied())


def test_check_refuses_two_masks_for_a_tied_weight() -> None:
    plan = FreezePlan({"embed.weight": FreezeMask((6, 4), rows=[0]), "head.weight": FreezeMask((6, 4), rows=[1])})
    with pytest.raises(ValueError, match=r"check: 'embed\.weight' and 'head\.weight' are one tied tensor.*union"):
        plan.check(Tied())


def test_check_names_what_does_not_fit() -> None:
    model = Tied()
    with pytest.raises(ValueError, match=r"check: the plan names 'up\.wieght', which is not .*nearest: 'up\.weight'"):
        FreezePlan({"up.wieght": FreezeMask((5, 4))}).check(model)
    with pytest.raises(ValueError, match=r"check: 'up\.weight' has shape \(5, 4\), the plan expects \(4, 5\)"):
        FreezePlan({"up.weight": FreezeMask((4, 5))}).check(model)
    model.up.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"check: 'up\.weight' has requires_grad=False.*requires_grad_\(True\)"):
        FreezePlan({"up.weight": FreezeMask((5, 4))}).check(model)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        FreezePlan().check([1, 2])  # type: ignore[list-item]


def test_check_refuses_overlapping_parameters() -> None:
    base = torch.zeros(6, 4)
    one, two = nn.Parameter(base[:4]), nn.Parameter(base[2:])
    plan = FreezePlan({"two": FreezeMask((4, 4), rows=[0])})
    with pytest.raises(ValueError, match=r"check: 'one' and 'two' share storage"):
        plan.check({"one": one, "two": two})
    plan.check({"one": nn.Parameter(base[:2]), "two": two})
    FreezePlan({"third": FreezeMask((2,), rows=[0])}).check(
        {"one": one, "two": two, "third": nn.Parameter(torch.ones(2))}
    )


# --------------------------------------------------------------------------------- a plan of the size it is made for

_LABELS = Path(__file__).parents[3] / "shared" / "data" / "llama2-7b-chat-ssah-labels.safetensors"


def frozen_units() -> tuple[np.ndarray, np.ndarray]:
    """Heads [32, 32] and channels [32, 11008] of Llama-2-7B-chat that setting SCU + all CU freezes: 80% of the blocks.

    The published labels where they are at hand, else as many units, scattered.
    """
    if _LABELS.is_file():
        from safetensors.numpy import load_file

        labels = load_file(_LABELS)
        return np.isin(labels["attention_heads"], (1, 3)), np.isin(labels["mlp_channels"], (1, 3))
    rng = np.random.default_rng(0)
    heads, channels = np.zeros(32 * 32, bool), np.zeros(32 * 11008, bool)
    heads[rng.permutation(heads.size)[:990]] = True
    channels[rng.permutation(channels.size)[:252_897]] = True
    return heads.reshape(32, 32), channels.reshape(32, 11008)


def test_a_7b_plan_compiles_into_little_memory() -> None:
    heads, channels = frozen_units()
    assert (int(heads.sum()), int(channels.sum())) == (990, 252_897)
    masks: dict[str, FreezeMask] = {}
    for layer in range(32):
        rows, flags = np.repeat(heads[layer], 128), channels[layer]
        block = f"model.layers.{layer}"
        masks |= {f"{block}.self_attn.{x}_proj.weight": FreezeMask((4096, 4096), rows=rows) for x in "qkv"}
        masks[f"{block}.self_attn.o_proj.weight"] = FreezeMask((4096, 4096), cols=rows)
        masks |= {f"{block}.mlp.{x}_proj.weight": FreezeMask((11008, 4096), rows=flags) for x in ("gate", "up")}
        masks[f"{block}.mlp.down_proj.weight"] = FreezeMask((4096, 11008), cols=flags)
        masks |= {f"{block}.{x}_layernorm.weight": FreezeMask((4096,)) for x in ("input", "post_attention")}
    blocks = FreezePlan({name: mask for name, mask in masks.items() if "norm" not in name})
    assert round(blocks.frozen_fraction, 3) == 0.800
    masks["model.norm.weight"] = FreezeMask((4096,))
    masks |= {name: FreezeMask((32000, 4096)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    plan = FreezePlan(masks)
    assert len(plan) == 291
    assert sum(mask.numel for mask in plan.values()) == 6_738_415_616
    live = Runs.of(compile_live(list(plan.values())))
    assert int(live.runs["count"].sum()) == sum(mask.live_count for mask in plan.values())
    assert live.nbytes < 64e6, f"{live.nbytes / 1e6:.0f} MB"
    frozen = Runs.of(compile_frozen(list(plan.values())))
    assert int(frozen.runs["count"].sum()) == sum(mask.frozen_count for mask in plan.values())
    assert frozen.nbytes < 64e6, f"{frozen.nbytes / 1e6:.0f} MB"
