"""The keeper on several ranks, as real processes: under DDP and FSDP2 it does what it does in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
from attribution_models import tiny
from conftest import assert_same_bits
from ranks import run_ranks
from refusing import SAFETY, TASK
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import safefreeze_kernels as sf
from safefreeze_kernels.attribution.grains import Grains
from safefreeze_kernels.model.sharding import local

BF16: Final = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def net() -> nn.Module:
    """Rows that neither 2 nor 4 ranks divide, and fewer of keys and values than there are ranks: empty shards."""
    sizes = {"vocab_size": 65, "intermediate_size": 23, "num_key_value_heads": 1, "head_dim": 2}
    return tiny("llama", attention_dropout=0.2, **sizes)


def shard(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """FSDP2, layer by layer."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def hybrid(model: nn.Module) -> nn.Module:
    return shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


WAYS: Final[dict[str, tuple[Callable[[nn.Module], nn.Module], int]]] = {
    "one process": (lambda model: model, 1),
    "DDP on 2": (DistributedDataParallel, 2),
    "FSDP2 on 2": (shard, 2),
    "FSDP2 on 4": (shard, 4),
    "hybrid FSDP2 on 2 x 2": (hybrid, 4),
}


def optimizer_of(model: nn.Module, **options: Any) -> sf.MaskedAdamW:
    return sf.MaskedAdamW(model.named_parameters(), lr=3e-3, weight_decay=0.01, **options)


def train(model: nn.Module, optimizer: sf.MaskedAdamW, steps: range, *, zero: bool = True) -> None:
    """Windows of two micro-batches, of which FSDP2 exchanges the second's gradients alone; clipped; dropout."""
    model.train()
    for step in steps:
        torch.manual_seed(step)
        for last in (False, True):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            rows = TASK[1:] if last else TASK[:2]
            model(input_ids=rows, labels=rows).loss.backward()
        sf.clip_grad_norm_(model, 0.5, optimizer.plan)
        optimizer.step()
        if zero:
            optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p.detach()).clone() for name, p in model.named_parameters()}


def everything(model: nn.Module, optimizer: sf.MaskedAdamW) -> dict[str, Tensor]:
    """Of this rank: weights, gradients, state, random numbers."""
    found = {"random": torch.get_rng_state()}
    for name, p in model.named_parameters():
        found[name] = p.detach().to_local().clone()
        if p.grad is not None:
            found[f"{name}.grad"] = p.grad.to_local().clone()
        found |= {f"{name}:{key}": value.clone() for key, value in optimizer.state[p].items()}
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor, name)


def looks(keeper: sf.RefusalKeeper) -> list[Any]:
    return [(look.step, look.margin, look.share, look.frozen, look.layers, look.modules) for look in keeper.log]


# ---------------------------------------------------------------------------------------------- as one process does


def keep(rank: int, way: str, options: dict[str, Any]) -> tuple[list[str], Any, dict[str, Tensor]]:
    """Trains with three looks; the plan of each, what it logged, and the weights. Frozen bytes are proven."""
    model = WAYS[way][0](net())
    optimizer = optimizer_of(model)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=2, prove=True, **options)
    plans = []
    for step in range(7):
        proof = sf.snapshot(model, keeper.plan)
        train(model, optimizer, range(step, step + 1))
        proof.verify(model)
        plans.append(keeper.plan.fingerprint)
    return plans, [keeper.first_margin, *looks(keeper)], weights(model)


@pytest.mark.parametrize(
    "options",
    [{"grain": "row"}, {"grain": "unit", "steer": 0.9}, {"grain": "element"}, {"grain": "row", "random": True}],
    ids=["row", "unit steered", "element", "random"],
)
def test_the_plans_are_those_of_one_process(options: dict[str, Any]) -> None:
    """One prompt a look, which one rank runs for all: a mean over 2 or 4 ranks of it and zeros is exact."""
    options = {"prompts": 1, **options}
    ((plans, log, expected),) = run_ranks(1, keep, "one process", options)
    assert len(set(plans)) == 4 and len(log) == 4
    for way in list(WAYS)[1:] if "random" not in options and options["grain"] == "row" else ["FSDP2 on 4"]:
        for found_plans, found_log, found in run_ranks(WAYS[way][1], keep, way, options):
            assert found_plans == plans and found_log == log, way
            assert_same(found, expected)


def share(rank: int, way: str, prompts: int) -> tuple[list[int], list[float], sf.FreezePlan]:
    """How many rows each pass of this rank had; and what came of them."""
    ran = []

    def behaviour(model: nn.Module, batch: Any) -> Tensor:
        ran.append(len(batch["input_ids"]))
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return model(**inputs).logits[:, 1, 20]

    model = WAYS[way][0](net())
    optimizer = optimizer_of(model)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=3, prompts=prompts, keep=behaviour)
    train(model, optimizer, range(3))
    return ran, [keeper.first_margin, keeper.log[0].margin], keeper.plan


@pytest.mark.parametrize(("prompts", "shares"), [(6, [1, 2, 1, 2]), (3, [1, 1, 1, 1])])
def test_each_rank_runs_its_share_and_the_mean_is_over_all(prompts: int, shares: list[int]) -> None:
    ((ran, margins, plan),) = run_ranks(1, share, "one process", prompts)
    assert ran == [prompts] * 2
    found = run_ranks(4, share, "FSDP2 on 4", prompts)
    assert [one[0] for one in found] == [[rows] * 2 for rows in shares]
    for _, found_margins, found_plan in found:
        assert found_margins == pytest.approx(margins, rel=1e-4) and found_plan == found[0][2]
        differing = sum(int((plan[name].dense() ^ found_plan[name].dense()).sum()) for name in plan | found_plan)
        assert differing <= 100, "but for rounding: a row or two that are as good as equal"


def of_other_seeds(rank: int) -> list[Any]:
    """Other prompts and other data on each rank."""
    model = DistributedDataParallel(net())
    optimizer = optimizer_of(model)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=2, prompts=2, seed=rank, grain="element")
    for step in range(4):
        rows = TASK[rank : rank + 2].roll(step, 1)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [keeper.first_margin, keeper.plan.fingerprint, *(look.margin for look in keeper.log)]


def test_under_ddp_what_the_first_rank_finds_holds() -> None:
    one, other = run_ranks(2, of_other_seeds)
    assert one == other and len(one) == 4


def scale(rank: int, way: str) -> tuple[list[Any], str]:
    """A step is skipped, since the last rank's gradients are infinite."""
    model = WAYS[way][0](net())
    optimizer = optimizer_of(model)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=2, prompts=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(5):
        scaler.scale(model(input_ids=TASK, labels=TASK).loss).backward()
        if step == 1 and rank == dist.get_world_size() - 1:
            local(model.lm_head.weight.grad).fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return looks(keeper), keeper.plan.fingerprint


def test_steps_that_a_scaler_skips_do_not_count() -> None:
    (expected,) = run_ranks(1, scale, "one process")
    assert [look[0] for look in expected[0]] == [2, 4]
    assert run_ranks(2, scale, "FSDP2 on 2") == [expected, expected]


# ----------------------------------------------------------------------------------- no trace of it in the training


def untouched(
    rank: int, options: dict[str, Any], dtype: torch.dtype, zero: bool, master: str | None
) -> list[dict[str, Tensor]]:
    """What there is after training with looks that freeze nothing, and without."""
    choose, Grains.plan = Grains.plan, lambda *_, **__: sf.FreezePlan()  # type: ignore[method-assign, assignment]
    runs = []
    try:
        for watched in (True, False):
            model = shard(net().to(dtype), **options)
            if "mp_policy" in options:
                model.set_gradient_divide_factor(4.0)  # of the outermost alone
                model.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            optimizer = optimizer_of(model, master=master)
            if watched:
                keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=1, prompts=3)
            train(model, optimizer, range(3), zero=zero)
            runs.append(everything(model, optimizer))
    finally:
        Grains.plan = choose  # type: ignore[method-assign]
    assert len(keeper.log) == 3
    return runs


@pytest.mark.parametrize(
    ("options", "dtype", "zero", "master"),
    [
        ({}, torch.float32, True, None),
        ({}, torch.float32, False, None),
        ({"mp_policy": BF16, "reshard_after_forward": False}, torch.float32, False, None),
        ({}, torch.bfloat16, True, "remainder"),
    ],
    ids=["plain", "never zeroed", "mixed precision", "bf16 with masters"],
)
def test_looks_leave_no_trace(options: dict[str, Any], dtype: torch.dtype, zero: bool, master: str | None) -> None:
    for runs in run_ranks(2, untouched, options, dtype, zero, master):
        assert_same(*runs)


def within(rank: int) -> tuple[str, list[dict[str, Tensor]]]:
    """Looks by hand within an accumulation window: with gradients exchanged, and not. What the latter says, and
    gradients after the window, with looks and without."""
    model = shard(net())
    optimizer = optimizer_of(model)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=100)
    train(model, optimizer, range(2))
    fired: list[str] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    text, found = "", []
    for synced in (True, False):
        for looks in (True, False):
            model.train()
            torch.manual_seed(0)
            for last in (False, True):
                model.set_requires_gradient_sync(synced or last)
                model(input_ids=TASK, labels=TASK).loss.backward()
                if looks and not last:
                    held, fired[:] = {p: p.grad for p in model.parameters()}, []
                    try:
                        keeper.look()
                        assert synced
                    except ValueError as error:
                        text = str(error)
                    assert not fired and all(p.grad is grad for p, grad in held.items())
            found.append({name: p.grad.to_local().clone() for name, p in model.named_parameters()})
            optimizer.zero_grad()
    assert len(fired) == 2 * len(held), "hooks of others are there again"
    return text, found


def test_looks_within_an_accumulation_window() -> None:
    for text, (first, *others) in run_ranks(2, within):
        assert "RefusalKeeper.look: gradients of an accumulation window wait" in text
        assert "after the optimizer's step" in text
        for other in others:
            assert_same(other, first)


def evaluated(rank: int) -> None:
    """A forward pass without a backward pass leaves weights of the outermost module gathered, old after the step."""
    model = shard(net())
    optimizer = optimizer_of(model)
    with torch.no_grad():
        model(input_ids=TASK)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=1, prove=True)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    model(input_ids=TASK, labels=TASK).loss.backward()
    with torch.no_grad():
        model(input_ids=TASK)
    optimizer.step()
    margin = keeper.log[0].margin
    assert all(isinstance(p, DTensor) for p in model.parameters())
    keeper.look()
    assert abs(keeper.log[1].margin - margin) < 1e-5 < 1e-3 < abs(margin - keeper.first_margin)


def test_what_was_gathered_before_a_step_is_not_looked_at() -> None:
    run_ranks(2, evaluated)


def divided(rank: int) -> list[Any]:
    """Two looks from the same state; gradients of a layer are divided by another number at the second."""
    model = shard(net())
    optimizer = optimizer_of(model)
    keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=100, thawed="kept")
    train(model, optimizer, range(2))
    state, found, held = keeper.state_dict(), [], list[int]()
    reduce, shards = Grains.reduce, list(model.parameters())

    def counted(self: Grains, *given: Any) -> Tensor:
        held.append(sum(p.grad is not None for p in shards))
        return reduce(self, *given)

    Grains.reduce = counted  # type: ignore[method-assign]
    try:
        for factor in (None, 64.0):
            keeper.load_state_dict(state)
            if factor:
                model.model.layers[1].set_gradient_divide_factor(factor)
            found.append((keeper.look().margin, keeper.plan))
    finally:
        Grains.reduce = reduce  # type: ignore[method-assign]
    assert held == [0] * 2 * len(shards), "each is dropped before the next comes"
    return found


def test_divisors_that_training_sets_do_not_count() -> None:
    for one, other in run_ranks(2, divided):
        assert one == other and one[1]


# --------------------------------------------------------------------------------------------------------- resume


def resumed(rank: int, options: dict[str, Any]) -> list[tuple[dict[str, Tensor], Any]]:
    """What there is after training in one run, and in two."""
    found = []
    for cuts in ([range(7)], [range(3), range(3, 7)]):
        model, state = shard(net()), None
        for steps in cuts:
            optimizer = optimizer_of(model)
            keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=2, prompts=3, prove=True, **options)
            if state:
                keeper.load_state_dict(state["keeper"])
                optimizer.load_state_dict(state["optimizer"])
            train(model, optimizer, steps)
            state = copy.deepcopy({"keeper": keeper.state_dict(), "optimizer": optimizer.state_dict()})
        assert [look.step for look in keeper.log] == [2, 4, 6]
        found.append((everything(model, optimizer), (keeper.plan, looks(keeper), keeper.first_margin)))
    return found


@pytest.mark.parametrize(
    "options",
    [{"grain": "row"}, {"grain": "element", "thawed": "kept", "random": True}],
    ids=["row", "element kept random"],
)
def test_a_resumed_run_is_the_same_to_the_bit(options: dict[str, Any]) -> None:
    for (first, about), (other, other_about) in run_ranks(2, resumed, options):
        assert_same(other, first)
        assert other_about == about


# ------------------------------------------------------------------------------------------------- what is refused


def parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    styles = {"model.layers.*.mlp.up_proj": ColwiseParallel(), "model.layers.*.mlp.down_proj": RowwiseParallel()}
    return parallelize_module(model, mesh or init_device_mesh("cpu", (2,)), styles)


def both(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    return shard(parallel(model, mesh["tensor"]), mesh["data"])


def in_part(model: nn.Module) -> nn.Module:
    fully_shard(model.model.layers[1], mesh=init_device_mesh("cpu", (2,)))
    return model


def on_two_meshes(model: nn.Module) -> nn.Module:
    fully_shard(model.model.layers[1], mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards")))
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


SPREAD: Final = {
    "tensor parallel": (parallel, "'model.layers.0.mlp.up_proj.weight' (placements (Shard(dim=0),)"),
    "both": (both, "'model.layers.0.mlp.up_proj.weight' (placements"),
    "in part": (in_part, "'model.embed_tokens.weight' is not sharded as expected: each rank holds it whole"),
    "two meshes": (on_two_meshes, "'model.layers.1.self_attn.q_proj.weight' (placements"),
}


def refusal(rank: int, way: str) -> str:
    model = SPREAD[way][0](net())
    optimizer = optimizer_of(model)
    try:
        sf.RefusalKeeper(model, optimizer, SAFETY)
    except ValueError as error:
        assert optimizer.plan is None and not optimizer._optimizer_step_post_hooks
        return str(error)
    return ""


@pytest.mark.parametrize("way", list(SPREAD))
def test_other_ways_to_shard_are_refused_by_name(way: str) -> None:
    for text in run_ranks(2, refusal, way):
        assert text.startswith(f"RefusalKeeper: {SPREAD[way][1]}"), text
        assert "or train with DDP" in text
