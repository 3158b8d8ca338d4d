"""`snapshot` and `verify`: a single frozen bit that moved is found and named; a live one is nobody's business."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_bits, from_bits, short, shown
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from safefreeze_kernels import FreezeMask, FreezePlan, FrozenDriftError, snapshot
from safefreeze_kernels.proof.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLS = 5, 19
_DIAGONAL = torch.eye(ROWS, COLS, dtype=torch.bool)
MASKS: dict[str, FreezeMask] = {
    "everything": FreezeMask((ROWS, COLS), rows=range(ROWS)),
    "rows": FreezeMask((ROWS, COLS), rows=[0, 3]),
    "columns": FreezeMask((ROWS, COLS), cols=[2, 18]),
    "rows and columns": FreezeMask((ROWS, COLS), rows=[1, 4], cols=[0, 9]),
    "elements": FreezeMask((ROWS, COLS), elements=_DIAGONAL),
    "all three": FreezeMask((ROWS, COLS), rows=[2], cols=[1, 10], elements=_DIAGONAL),
    "a vector's entries": FreezeMask((COLS,), rows=[0, 7, 18]),
    "a scalar": FreezeMask((), rows=[0]),
    "three dimensions": FreezeMask((2, 3, 4), rows=[5], cols=[2]),
}
DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.float8_e4m3fn, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip
over_masks = pytest.mark.parametrize("kind", MASKS)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=short)


def tensor_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bytes the dtype can hold, NaNs and -0.0 among them."""
    width = torch.empty((), dtype=dtype).element_size()
    raw = np.random.default_rng(seed).integers(0, 256, (int(np.prod(shape)), width), np.uint8)
    flat = torch.from_numpy(raw & 1 if dtype is torch.bool else raw)
    return flat.view(dtype).reshape(shape)


def flip(tensor: Tensor, place: int, bit: int = 0) -> None:
    """Flip one bit of the element at ``place``, row-major, in place."""
    raw = tensor.view(-1).view(torch.uint8)
    raw[place * tensor.element_size() + bit // 8] ^= 1 << bit % 8


def matrix_place(mask: FreezeMask, place: int) -> str:
    """How an error names the element at ``place``."""
    row, col = divmod(place, mask.matrix_shape[1])
    return f"row {row}:" if len(mask.shape) < 2 else f"row {row}, column {col}:"


def drift(proof: Snapshot, model: Any, words: str | None = None) -> str:
    """The message of the drift that a proof must find."""
    with pytest.raises(FrozenDriftError, match=words) as caught:
        proof.verify(model)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ what is found


@over_masks
@over_dtypes
def test_every_frozen_bit_counts_and_no_live_one(kind: str, dtype: torch.dtype) -> None:
    mask = MASKS[kind]
    tensors = {"other": tensor_of((3, 3), dtype, 1), "w": tensor_of(mask.shape, dtype)}
    plan = FreezePlan({"w": mask, "other": FreezeMask((3, 3), cols=[1])})
    proof = snapshot(tensors, plan)
    proof.verify(tensors)
    frozen = mask.dense().reshape(-1)
    width = tensors["w"].element_size()
    for place in range(mask.numel):
        bit = 0 if dtype is torch.bool else (place * 7) % (8 * width)
        before = tensors["w"].clone().reshape(-1)[place]
        flip(tensors["w"], place, bit)
        after = tensors["w"].reshape(-1)[place]
        if frozen[place]:
            message = drift(proof, tensors)
            assert "'w'" in message, message
            assert matrix_place(mask, place) in message, f"element {place}: {message}"
            assert f"1 of {mask.frozen_count} frozen elements" in message, message
            expected = [re.findall(r"0x[0-9a-f]+", shown(value))[0] for value in (before, after)]
            assert re.findall(r"0x[0-9a-f]+", message) == expected, message
        else:
            proof.verify(tensors)
        flip(tensors["w"], place, bit)
    proof.verify(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=short)
def test_the_message_can_be_read(dtype: torch.dtype) -> None:
    tensors = {"model.up.weight": torch.full((4, 6), 0.5, dtype=dtype)}
    proof = snapshot(tensors, FreezePlan({"model.up.weight": FreezeMask((4, 6), rows=[1], cols=[3])}))
    tensors["model.up.weight"][2, 3] = 0.75
    tensors["model.up.weight"][3, 3] = -2.0
    message = drift(proof, tensors)
    for words in ("verify", "'model.up.weight'", "row 2, column 3", "was 0.5 ", "is 0.75 ", "2 of 9 frozen elements"):
        assert words in message, f"{message!r} does not say {words!r}"


def test_several_tensors_that_moved_are_reported_by_the_first() -> None:
    tensors = {name: torch.zeros(3, 3) for name in "abc"}
    proof = snapshot(tensors, FreezePlan({name: FreezeMask((3, 3), rows=[2]) for name in "abc"}))
    tensors["c"][2, 0] = 1.0
    drift(proof, tensors, "'c' moved at row 2, column 0")
    tensors["b"][2, 1] = 1.0
    drift(proof, tensors, "'b' moved at row 2, column 1")


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        (0.0, -0.0, False),
        (-0.0, 0.0, False),
        (-0.0, -0.0, True),
        (0x7FC00000, 0x7FC00000, True),
        (0x7FC00000, 0x7FC00001, False),
        (0x7FC00000, 0xFFC00000, False),
        (0x7FA12345, 0x7FA12345, True),
        (float("inf"), float("-inf"), False),
    ],
    ids=str,
)
def test_values_compare_by_their_bytes(then: float, now: float, same: bool) -> None:
    def value(given: float) -> Tensor:
        return from_bits(given, torch.float32) if isinstance(given, int) else torch.tensor(given)

    tensors = {"w": torch.zeros(2, 2)}
    tensors["w"][1, 1] = value(then)
    proof = snapshot(tensors, FreezePlan({"w": FreezeMask((2, 2), rows=[1])}))
    tensors["w"][1, 1] = value(now)
    if same:
        proof.verify(tensors)
    else:
        drift(proof, tensors, "row 1, column 1")


@settings(max_examples=60)
@given(data=st.data())
def test_random_masks_and_random_flips(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=3), label="shape"))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]), label="dtype")
    size = int(np.prod(shape))
    dense = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=torch.bool)
    mask = FreezeMask(shape, elements=dense.reshape(shape))
    tensors = {"w": tensor_of(shape, dtype)}
    proof = snapshot(tensors, FreezePlan({"w": mask}))
    flipped = data.draw(st.sets(st.integers(0, size - 1), max_size=3), label="flipped")
    for place in flipped:
        flip(tensors["w"], place)
    moved = {place for place in flipped if dense[place]}
    if not moved:
        proof.verify(tensors)
        return
    message = drift(proof, tensors)
    assert any(matrix_place(mask, place) in message for place in moved), f"moved {moved}: {message}"
    assert f"{len(moved)} of {mask.frozen_count} frozen elements" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_large_tensors(dtype: torch.dtype) -> None:
    shape = (310, 401)  # more elements than a thread takes at a time
    generator = torch.Generator().manual_seed(0)
    mask = FreezeMask(shape, rows=[0, 309], cols=[5, 400], elements=torch.rand(shape, generator=generator) < 0.5)
    tensors = {"w": tensor_of(shape, dtype)}
    proof = snapshot(tensors, FreezePlan({"w": mask}))
    frozen = mask.dense().reshape(-1).nonzero().flatten()
    for place in [*frozen[:: len(frozen) // 9].tolist(), int(frozen[-1])]:
        flip(tensors["w"], place)
        drift(proof, tensors, matrix_place(mask, place))
        flip(tensors["w"], place)
    proof.verify(tensors)


# ------------------------------------------------------------------------------------------------ what it is given


class Net(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 4)
        self.up = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.embed.weight


NET_PLAN = FreezePlan({"up.weight": FreezeMask((5, 4), rows=[1]), "embed.weight": FreezeMask((6, 4), cols=[0])})

FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda model: model,
    "parameters by name": lambda model: dict(model.named_parameters()),
    "pairs": lambda model: list(model.named_parameters()),
    "generator": lambda model: model.named_parameters(),
    "state dict": lambda model: model.state_dict(),
    "state dict as loaded from disk": lambda model: {name: t.clone() for name, t in model.state_dict().items()},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("then", FORMS)
@pytest.mark.parametrize("now", FORMS)
def test_modules_mappings_state_dicts_and_pairs_can_be_compared(then: str, now: str, tied: bool) -> None:
    model = Net(tied=tied)
    proof = snapshot(FORMS[then](model), NET_PLAN)
    proof.verify(FORMS[now](model))
    with torch.no_grad():
        model.up.weight[0] += 1.0
        model.embed.weight[:, 1] += 1.0
    proof.verify(FORMS[now](model))
    with torch.no_grad():
        model.embed.weight[3, 0] += 1.0
    drift(proof, FORMS[now](model), r"'embed\.weight' moved at row 3, column 0")


@pytest.mark.parametrize("form", FORMS)
def test_a_tied_weight_named_twice_is_found_untied(form: str) -> None:
    model = Net(tied=True)
    mask = FreezeMask((6, 4), rows=[2])
    plan = FreezePlan({"embed.weight": mask, "head.weight": mask, "up.bias": FreezeMask((5,), rows=[0])})
    then = FORMS[form](model)
    if form in ("parameters by name", "pairs", "generator"):  # these leave the second name out
        then = model.named_parameters(remove_duplicate=False)
    proof = snapshot(then, plan)
    if form == "module":
        assert proof.nbytes == (4 + 1) * 4, "one tensor, one copy"
    proof.verify(model)
    proof.verify(model.state_dict())
    untied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    proof.verify(untied)
    for name in ("embed.weight", "head.weight"):
        moved = {**untied, name: untied[name] + 1.0}
        drift(proof, moved, rf"'{re.escape(name)}' moved at row 2, column 0")
    untied["up.bias"][0] += 1.0
    drift(proof, untied, r"'up\.bias' moved at row 0:")


def test_frozen_and_strided_tensors_are_read_as_they_are() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    mask = FreezeMask((6, 4), rows=[2], cols=[3])
    plan = FreezePlan({"w": mask})
    for strided in (base.t(), torch.stack([base.t(), -base.t()], dim=-1)[..., 0]):
        assert not strided.is_contiguous()
        parameter = nn.Parameter(strided, requires_grad=False)
        proof = snapshot({"w": parameter}, plan)
        proof.verify({"w": strided.contiguous()})
        moved = strided.contiguous()
        moved[5, 3] += 1.0
        drift(proof, {"w": moved}, "row 5, column 3")


def test_a_snapshot_is_a_copy() -> None:
    for dtype in (torch.float32, torch.uint8, torch.float64):
        tensors = {"w": torch.zeros(3, 3, dtype=dtype)}
        proof = snapshot(tensors, FreezePlan({"w": FreezeMask((3, 3), rows=range(3))}))
        digest = proof.digest
        tensors["w"].add_(1)
        assert proof.digest == digest
        drift(proof, tensors)


def test_a_snapshot_changes_nothing() -> None:
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    snapshot(model, NET_PLAN).verify(model)
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name], name)


def test_another_dtype_is_drift() -> None:
    model = Net()
    proof = snapshot(model, NET_PLAN)
    drift(proof, model.bfloat16(), r"verify: '(embed|up)\.weight' is torch\.bfloat16, it was torch\.float32")
    same_width = {name: tensor.clone() for name, tensor in Net().state_dict().items()}
    same_width["up.weight"] = same_width["up.weight"].view(torch.int32)
    drift(proof, same_width, r"'up\.weight' is torch\.int32, it was torch\.float32")


def test_a_model_that_does_not_fit() -> None:
    proof = snapshot(Net(), NET_PLAN)
    state = Net().state_dict()
    with pytest.raises(ValueError, match=r"verify: 'up\.weight' has shape \(4, 5\), the plan expects \(5, 4\)"):
        proof.verify({**state, "up.weight": torch.zeros(4, 5)})
    del state["up.weight"]
    with pytest.raises(ValueError, match=r"verify: the plan names 'up\.weight', which is not among"):
        proof.verify(state)


# ------------------------------------------------------------------------------------------------ size and digest


@over_masks
@over_dtypes
def test_it_holds_the_frozen_bytes_and_nothing_else(kind: str, dtype: torch.dtype) -> None:
    tensor = tensor_of(MASKS[kind].shape, dtype)
    proof = snapshot({"w": tensor}, FreezePlan({"w": MASKS[kind]}))
    assert proof.nbytes == MASKS[kind].frozen_count * tensor.element_size()
    assert f"{proof.nbytes:,} frozen bytes" in repr(proof)


def test_a_plan_of_nothing_holds_nothing() -> None:
    for plan in (FreezePlan(), FreezePlan({"w": FreezeMask((3, 3))}), FreezePlan({"empty": FreezeMask((0, 2))})):
        proof = snapshot({"w": torch.zeros(3, 3), "empty": torch.zeros(0, 2)}, plan)
        assert proof.nbytes == 0
        proof.verify({"w": torch.ones(3, 3), "empty": torch.zeros(0, 2)})


@over_masks
@over_dtypes
def test_the_digest_follows_every_frozen_byte_and_no_live_one(kind: str, dtype: torch.dtype) -> None:
    mask = MASKS[kind]
    plan = FreezePlan({"w": mask})
    tensor = tensor_of(mask.shape, dtype)
    digest = snapshot({"w": tensor}, plan).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    frozen = mask.dense().reshape(-1)
    for place in range(mask.numel):
        flip(tensor, place)
        assert (snapshot({"w": tensor}, plan).digest != digest) is bool(frozen[place]), f"element {place}"
        flip(tensor, place)
    assert snapshot({"w": tensor}, plan).digest == digest


def test_the_digest_follows_names_dtypes_and_plan_but_not_their_order() -> None:
    one, two = torch.arange(6.0).reshape(2, 3), torch.arange(6.0, 12.0).reshape(2, 3)
    mask = FreezeMask((2, 3), rows=[0])
    plan = FreezePlan({"a": mask, "b": mask})
    digest = snapshot({"a": one, "b": two}, plan).digest
    assert snapshot({"b": two, "a": one}, FreezePlan({"b": mask, "a": mask})).digest == digest
    others = {
        "swapped": snapshot({"a": two, "b": one}, plan),
        "renamed": snapshot({"a": one, "c": two}, FreezePlan({"a": mask, "c": mask})),
        "another dtype": snapshot({"a": one, "b": two.view(torch.int32)}, plan),
        "another plan": snapshot({"a": one, "b": two}, FreezePlan({"a": mask, "b": FreezeMask((2, 3), cols=[0])})),
        "one less": snapshot({"a": one}, FreezePlan({"a": mask})),
    }
    digests = {how: proof.digest for how, proof in others.items()}
    assert digest not in digests.values(), digests
    assert len(set(digests.values())) == len(digests), digests


_PROGRAM = """
import torch
from safefreeze_kernels import FreezeMask, FreezePlan, snapshot
tensors = {
    "b": torch.arange(24.0).reshape(4, 6),
    "a": torch.arange(24).reshape(6, 4).to(torch.bfloat16),
    "c": torch.arange(6, dtype=torch.float64),
}
masks = {
    "a": FreezeMask((6, 4), rows=[1], cols=[2]),
    "b": FreezeMask((4, 6), rows=[0], cols=[5], elements=torch.arange(24).reshape(4, 6) % 5 == 0),
    "c": FreezeMask((6,), rows=[5]),
}
print(snapshot(tensors, FreezePlan({name: masks[name] for name in sorted(masks, key=hash)})).digest)
"""


def test_the_digest_is_the_same_in_every_process() -> None:
    # A digest written down with a release must still be that of the same weights later.
    expected = "553a09ec3b3e0e58e580ab0fd9b3ae1becac007bae5de94d24a2c6b897a99f6a"
    command = [sys.executable, "-c", _PROGRAM]
    environment = {**os.environ, "PYTHONHASHSEED": "314159"}
    assert (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip() == expected
    )
