"""Flat partitions without an engine: what DeepSpeed's ZeRO-1 and 2 leave at parameters, made by hand."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from conftest import BACKENDS, assert_same_bits
from torch import Tensor, nn

import safefreeze_kernels as sf
from safefreeze_kernels.keeping.ranks import ranks_of
from safefreeze_kernels.model.flat import Stretch

OPTIONS: Final[dict[str, Any]] = {"lr": 1e-2, "weight_decay": 0.1}
WORLD: Final = 3


@pytest.mark.parametrize("shape", [(4, 10), (7,), (2, 3, 5), (), (3, 0), (6, 1)])
def test_pieces_are_the_stretch(shape: tuple[int, ...]) -> None:
    """Every stretch of a tensor, as rectangles: each element once, in order, where it lies."""
    numel, width = math.prod(shape), shape[-1] if len(shape) > 1 else 1
    for start in range(numel + 1):
        for count in range(numel - start + 1):
            found, pieces = [], Stretch("w", shape, start, 100, count).pieces()
            assert 1 <= len(pieces) <= 3
            for piece in pieces:
                rows, cols = piece.held
                elements = [int(row) * width + int(col) for row in rows for col in cols]
                assert piece.shape == (len(rows), len(cols))
                assert not elements or (piece.start, piece.offset) == (elements[0], 100 + elements[0] - start)
                found += elements
            assert found == list(range(start, start + count))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.experts = nn.Parameter(torch.randn(2, 3, 5))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.down = nn.Linear(10, 7, bias=False)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def plan(more: int = 0) -> sf.FreezePlan:
    elements = torch.zeros(7, 10, dtype=torch.bool)
    elements[1, 2 + more] = elements[4, 0] = elements[6] = True
    return sf.FreezePlan(
        {
            "up.weight": sf.FreezeMask((10, 6), rows=[0, 2 + more, 4, 9], cols=[1]),
            "up.bias": sf.FreezeMask((10,), rows=[0, 2 + more, 4, 9]),
            "experts": sf.FreezeMask((2, 3, 5), rows=[1, 4 - more], cols=[2]),
            "down.weight": sf.FreezeMask((7, 10), elements=elements),
        }
    )


def gradients(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=draw) for name, p in net().named_parameters()}


class Rank:
    """One rank of an engine: an optimizer whose only group has a flat partition, and where in it what lies."""

    def __init__(self, rank: int, **options: Any) -> None:
        self.model = net()
        named = list(self.model.named_parameters())
        self.optimizer = sf.MaskedAdamW(named, **{**OPTIONS, "freeze": plan(), **options})
        size = -(-sum(p.numel() for _, p in named) // WORLD)
        self.whole = torch.zeros(WORLD * size)
        self.places, at = {}, 0
        for name, p in named:
            self.whole[at : at + p.numel()] = p.detach().reshape(-1)
            begin, end = max(at, rank * size), min(at + p.numel(), (rank + 1) * size)
            p.data = self.whole[at : at + p.numel()].view(p.shape)  # as an engine has them, one behind the other
            p._hp_mapping = None
            if begin < end:
                whole, part = (SimpleNamespace(start=begin - first, numel=end - begin) for first in (at, rank * size))
                p._hp_mapping = SimpleNamespace(lp_fragment_address=whole, hp_fragment_address=part)
                self.places[name] = (whole.start, part.start, whole.numel)
            at += p.numel()
        self.flat = self.whole[rank * size : (rank + 1) * size].clone().requires_grad_()
        self.optimizer.param_groups[0]["params"] = [self.flat]

    def step(self, step: int) -> None:
        self.flat.grad = torch.zeros_like(self.flat)
        for name, grad in gradients(step).items():
            if name in self.places:
                start, offset, count = self.places[name]
                self.flat.grad[offset : offset + count] = grad.reshape(-1)[start : start + count]
        frozen = self.flat.grad.clone()
        self.optimizer.step()
        assert_same_bits(self.flat.grad, frozen, "gradients are read")

    def stretches(self) -> Iterator[tuple[str, slice, Tensor]]:
        for name, (start, offset, count) in self.places.items():
            yield name, slice(start, start + count), self.flat.detach()[offset : offset + count]


@pytest.fixture(autouse=True)
def engine_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", types.ModuleType("deepspeed"))


def change(optimizer: sf.MaskedAdamW, step: int, keep: bool) -> None:
    """What happens to the plan before a step."""
    if step == 3:
        optimizer.set_freeze(plan(more=1), keep_state=keep)
    if step == 6:
        optimizer.set_freeze(plan(), keep_state=keep, thawed="kept" if keep else "fresh")


def trained(backend: str, keep: bool, **options: Any) -> dict[str, Tensor]:
    model = net()
    optimizer = sf.MaskedAdamW(model.named_parameters(), **{**OPTIONS, "freeze": plan(), **options}, backend=backend)
    for step in range(8):
        change(optimizer, step, keep)
        for name, p in model.named_parameters():
            p.grad = gradients(step)[name]
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"state_dtype": torch.bfloat16}], ids=str)
def test_partitions_are_stepped_as_parameters_are(backend: str, keep: bool, options: dict[str, Any]) -> None:
    """Bit for bit, through changes of plan; and once more through a state dict, packed or in full size."""
    expected = trained(backend, keep, **options)
    held = 0
    for rank in range(WORLD):
        for dense in (False, True):
            one = Rank(rank, backend=backend, dense_checkpoints=dense, **options)
            for step in range(8):
                change(one.optimizer, step, keep)
                if step in (2, 4, 7):
                    saved = copy.deepcopy(one.optimizer.state_dict())
                    flat = one.flat.detach().clone()
                    one = Rank(rank, backend=backend, dense_checkpoints=dense, freeze=one.optimizer.plan, **options)
                    one.flat.data.copy_(flat)
                    one.optimizer.load_state_dict(saved)
                    shape = saved["state"][0]["exp_avg"].shape
                    assert shape == one.flat.shape if dense or (keep and step > 3) else shape[0] == 1
                one.step(step)
            for name, place, values in one.stretches():
                assert_same_bits(values, expected[name].reshape(-1)[place], name)
        held += sum(int((value != 0).sum()) for value in [one.optimizer.state[one.flat]["exp_avg"]])
    assert held, "nothing was trained"


def test_a_checkpoint_of_another_plan_or_partition_is_refused() -> None:
    ranks = [Rank(0), Rank(1), Rank(0, freeze=plan(more=1))]
    ranks[0].step(0)
    saved = ranks[0].optimizer.state_dict()
    for one, words in ((ranks[2], "another freeze plan"), (ranks[1], "other parameters in it")):
        with pytest.raises(ValueError, match=words):
            one.optimizer.load_state_dict(saved)
        assert not one.optimizer.state.get(one.flat)
    plain = sf.MaskedAdamW(net().named_parameters(), freeze=plan())
    with pytest.raises(ValueError, match="saved of DeepSpeed ZeRO's flat partitions"):
        plain.load_state_dict({**saved, "param_groups": [{**saved["param_groups"][0], "params": [0]}]})


def test_a_damaged_mapping_is_refused_before_anything_moved() -> None:
    def moved(one: Rank, kind: str, by: int, count: int) -> None:
        for mapping in [p._hp_mapping for p in one.model.parameters() if p._hp_mapping is not None][:count]:
            getattr(mapping, kind).start += by

    for words, damage in (
        ("another order", lambda one: moved(one, "hp_fragment_address", 1, 1)),
        ("they cannot", lambda one: moved(one, "hp_fragment_address", 10**6, 9)),
        ("which has", lambda one: moved(one, "lp_fragment_address", 10**6, 9)),
        ("hp_fragment_address", lambda one: delattr(one.model.up.weight._hp_mapping, "hp_fragment_address")),
    ):
        one = Rank(0)
        before = one.flat.detach().clone()
        damage(one)
        with pytest.raises(ValueError, match=words):
            one.step(0)
        assert_same_bits(one.flat.detach(), before, words)


def test_what_needs_whole_parameters_says_so() -> None:
    one = Rank(0)
    for words, act in (
        ("safe_get_full_fp32_param", one.optimizer.master_weights),
        ("takes gradients away", lambda: ranks_of(one.model, "RefusalKeeper")),
        ("before that", lambda: sf.zero_frozen_grads_(one.model, plan())),
        ("gradient_clipping", lambda: sf.clip_grad_norm_(one.model, 1.0, plan())),
        ("flat partitions", lambda: sf.guard(torch.optim.SGD([one.flat], lr=1.0), plan(), one.model)),
    ):
        with pytest.raises(ValueError, match=words):
            act()


def test_an_optimizer_built_before_its_engine_was_imported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "deepspeed")
    one = Rank(0)
    before = one.flat.detach().clone()
    with pytest.raises(RuntimeError, match="import deepspeed first"):
        one.step(0)
    assert_same_bits(one.flat.detach(), before, "moved")


def test_state_in_8_bits_is_refused() -> None:
    one = Rank(0, state_dtype=torch.int8)
    before = one.flat.detach().clone()
    with pytest.raises(ValueError, match=r"state_dtype is torch.int8, whose codes DeepSpeed .* expected torch.float32"):
        one.step(0)
    assert_same_bits(one.flat.detach(), before, "moved")


def test_frozen_gradients_are_zeroed_in_the_backward_pass() -> None:
    """And only there, whatever they are; an engine sees the rest."""
    one = Rank(0)
    weight = one.model.up.weight
    (weight * torch.full((10, 6), float("nan")).where(plan()["up.weight"].dense(), 2.0)).sum().backward()
    assert_same_bits(weight.grad, torch.full((10, 6), 2.0).where(~plan()["up.weight"].dense(), 0.0), "up.weight")
    one.optimizer.set_freeze(None)
    weight.grad = None
    weight.sum().backward()
    assert (weight.grad == 1).all()


def test_memory_is_what_is_live() -> None:
    """State of a partition with something frozen has a shape that nothing takes for the partition's."""
    live = sum(p.numel() for p in net().parameters()) - sum(mask.frozen_count for mask in plan().values())
    held = 0
    for rank in range(WORLD):
        one = Rank(rank)
        one.step(0)
        moment = one.optimizer.state[one.flat]["exp_avg"]
        assert moment.dim() == 2
        with pytest.raises(RuntimeError, match="exceeds dimension size"):
            moment.narrow(0, 0, 2)
        held += moment.numel()
    assert held == live
