"""Training on several ranks, as real processes: DDP, FSDP2, tensor parallel, distributed checkpoint."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import assert_same_bits
from ranks import run_ranks
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from uneven import Net, frozen, net, plan

import safefreeze_kernels as sf
from safefreeze_kernels.model.sharding import spread, take

STEPS: Final = 20
OPTIONS: Final[dict[str, Any]] = {"lr": 1e-2, "weight_decay": 0.1}


def batch(step: int, rank: int = 0) -> Tensor:
    return torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(100 * rank + step))


def optimizer_of(model: torch.nn.Module, **options: Any) -> sf.MaskedAdamW:
    return sf.MaskedAdamW(model.named_parameters(), **{**OPTIONS, "freeze": plan(), **options})


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(STEPS), *, rank: int = 0
) -> list[float]:
    """Trains, clipping hard; the live norm of every step."""
    norms = []
    for step in steps:
        model(batch(step, rank)).square().mean().backward()
        norms.append(float(sf.clip_grad_norm_(model, 0.05, plan())))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Names without wrappers, whole tensors."""
    return {name.removeprefix("module."): whole(p.detach()).clone() for name, p in model.named_parameters()}


def moments(optimizer: sf.MaskedAdamW) -> dict[str, Tensor]:
    state = optimizer.dense_state_dict()["state"]
    return {f"{index} {key}": whole(value).clone() for index, entry in state.items() for key, value in entry.items()}


def said(function: Callable[[], Any]) -> str:
    """What it raises; nothing, if it does not."""
    try:
        function()
    except (ValueError, RuntimeError, sf.FrozenDriftError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def steps_of(optimizer: torch.optim.Optimizer) -> set[float]:
    return {float(entry["step"]) for entry in optimizer.state.values()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor, name)


def assert_trained_alike(got: dict[str, Tensor], start: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Frozen bytes are those of ``start``. Live values: 20 steps of 1e-2 on gradients that differ in their last bits
    (sums in another order) stay 200 steps of float32 rounding apart: 20 * 1e-2 * 2**-13."""
    for name, tensor in got.items():
        mask = frozen(name, tensor)
        assert_same_bits(tensor, start[name], name, where=mask)
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=STEPS * 1e-2 * 2**-13, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert mask.all() or not torch.equal(tensor, start[name]), f"{name} did not train"


# ------------------------------------------------------------------------------------------------- ways to spread


def shard(model: Net, mesh: Any = None, **options: Any) -> Net:
    """FSDP2, layer by layer."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.up, model.norm, model.down, model.out, model):
        fully_shard(layer, mesh=mesh, **options)
    return model


def shard_columns(model: Net) -> Net:
    """FSDP2 that cuts along the last dimension where there are two."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    # an uneven cut along columns is not supported by FSDP2 itself
    place = lambda p: Shard(1 if p.ndim == 2 and p.shape[1] % dist.get_world_size() == 0 else 0)  # noqa: E731
    return fully_shard(model, mesh=mesh, shard_placement_fn=place)


def hybrid(model: Net) -> Net:
    """FSDP2 whose shards are copied once more."""
    return shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


def tensor_parallel(model: Net, mesh: Any = None) -> Net:
    """Weights cut along rows and columns. ``norm`` runs on a sequence that is cut: its gradients arrive as terms of a
    sum."""
    styles = {
        "up": ColwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "down": RowwiseParallel(input_layouts=Shard(1)),
    }
    return parallelize_module(model, mesh or init_device_mesh("cpu", (dist.get_world_size(),)), styles)


def both(model: Net) -> Net:
    """Tensor parallel in pairs, each sharded over two: some rows of a shard lie apart (``_StridedShard``)."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return shard(tensor_parallel(model, mesh["tensor"]), mesh["data"])


def ddp(model: Net) -> DistributedDataParallel:
    return DistributedDataParallel(model)


WAYS: Final[dict[str, tuple[Callable[[Net], torch.nn.Module], int]]] = {
    "one process": (lambda model: model, 1),
    "DDP on 2": (ddp, 2),
    "FSDP2 on 2": (shard, 2),
    "FSDP2 on 4": (shard, 4),
    "FSDP2 by columns on 2": (shard_columns, 2),
    "hybrid FSDP2 on 2 x 2": (hybrid, 4),
    "tensor parallel on 2": (tensor_parallel, 2),
    "tensor parallel on 4": (tensor_parallel, 4),
    "FSDP2 and tensor parallel on 2 x 2": (both, 4),
}
WAY: Final = pytest.mark.parametrize("way", list(WAYS)[1:])


def spread_and_train(rank: int, way: str) -> tuple[dict[str, Tensor], list[float], dict[str, Tensor], int]:
    model = WAYS[way][0](net())
    proof = sf.snapshot(model, plan())
    optimizer = optimizer_of(model)
    norms = train(model, optimizer)
    proof.verify(model)
    held = sum(value.numel() for entry in optimizer.state.values() for value in entry.values() if value.ndim)
    return weights(model), norms, moments(optimizer), held


@WAY
def test_training_is_that_of_one_process(way: str) -> None:
    start = weights(net())
    ((expected, norms, expected_moments, _),) = run_ranks(1, spread_and_train, "one process")
    ranks = run_ranks(WAYS[way][1], spread_and_train, way)
    for got, got_norms, got_moments, _ in ranks:
        assert_trained_alike(got, start, expected)
        assert got_norms == pytest.approx(norms, rel=1e-3)
        assert got_moments.keys() == expected_moments.keys()
        for name, moment in expected_moments.items():
            torch.testing.assert_close(got_moments[name], moment, rtol=1e-2, atol=1e-5)
    if way.startswith("FSDP2 on"):
        # gradients are sums in the same order; state is what is live, spread over the ranks
        assert_same(ranks[0][0], expected)
        live = sum(int((~frozen(name, p)).sum()) for name, p in start.items())
        assert sum(held for *_, held in ranks) == 2 * live


def other_batches(rank: int) -> tuple[dict[str, Tensor], list[float]]:
    model = ddp(net())
    norms = train(model, optimizer_of(model), rank=rank)
    return weights(model), norms


def test_ddp_averages_over_other_batches() -> None:
    start = weights(net())
    model = net()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        (sum(model(batch(step, rank)).square().mean() for rank in range(2)) / 2).backward()
        sf.clip_grad_norm_(model, 0.05, plan())
        optimizer.step()
        optimizer.zero_grad()
    (first, norms), (second, same) = run_ranks(2, other_batches)
    assert norms == same
    assert_same(second, first)
    assert_trained_alike(first, start, weights(model))


# ------------------------------------------------------------------------------------------------------ the norm


def norms_of(rank: int, way: str) -> dict[str, Any]:
    model = WAYS[way][0](net())
    model(batch(0)).square().mean().backward()
    found: dict[str, Any] = {}
    for norm_type in (1.0, 2.0, float("inf")):
        live, raw = sf.clip_grad_norm_(model, 1e9, plan(), norm_type, return_raw=True)
        found[f"{norm_type}"] = float(live), float(raw)
    # a NaN in a frozen place, held by one rank, is nobody's concern; one in a live place everybody's
    param = next(p for name, p in model.named_parameters() if name.endswith("up.weight"))
    for name, row in (("frozen NaN", 0), ("live NaN", 1)):
        grad = whole(param.grad).clone()
        grad[row, 0] = float("nan")
        param.grad = spread(take(grad, param), param)
        found[name] = [float(sf.clip_grad_norm_(model, 1e9, plan(), kind)) for kind in (1.0, 2.0, float("inf"))]
    return found


@pytest.mark.parametrize("way", ["DDP on 2", "FSDP2 on 4", "FSDP2 and tensor parallel on 2 x 2"])
def test_norms_count_every_live_element_once(way: str) -> None:
    model = net()
    model(batch(0)).square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    live = [g[~plan()[n].dense()] if n in plan() else g for n, g in grads.items()]
    ranks = run_ranks(WAYS[way][1], norms_of, way)
    assert all(repr(found) == repr(ranks[0]) for found in ranks), "ranks differ"
    for norm_type in (1.0, 2.0, float("inf")):
        expected = [
            float(torch.linalg.vector_norm(torch.cat([t.reshape(-1) for t in tensors]), norm_type))
            for tensors in (live, grads.values())
        ]
        assert ranks[0][f"{norm_type}"] == pytest.approx(expected, rel=1e-5)
    assert all(value > 0 for value in ranks[0]["frozen NaN"])
    assert all(value != value for value in ranks[0]["live NaN"])


# --------------------------------------------------------------------------------------------- distributed checkpoint


def save(rank: int, way: str, folder: str, flat: bool, options: dict[str, Any]) -> tuple[Any, Any]:
    """Trains 5 steps, saves, trains 5 more: weights and moments at both points."""
    model = WAYS[way][0](net())
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, range(5))
    dcp.save(checkpoint(model, optimizer, flat), checkpoint_id=folder)
    then = weights(model), moments(optimizer)
    train(model, optimizer, range(5, 10))
    return then, (weights(model), moments(optimizer))


def checkpoint(model: torch.nn.Module, optimizer: torch.optim.Optimizer, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def restore(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: str, flat: bool) -> None:
    found = checkpoint(model, optimizer, flat)
    dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(model, found["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(model, optimizer, found["optimizer"], options=options)


def load(rank: int, way: str, folder: str, flat: bool, options: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(1)
    model = WAYS[way][0](Net())
    optimizer = optimizer_of(model, **options)
    restore(model, optimizer, folder, flat)
    then = weights(model), moments(optimizer)
    train(model, optimizer, range(5, 10))
    return then, (weights(model), moments(optimizer))


def load_into_stock(rank: int, way: str, folder: str, flat: bool) -> dict[str, Tensor]:
    model = WAYS[way][0](Net())
    optimizer = torch.optim.AdamW(model.named_parameters(), **OPTIONS)
    restore(model, optimizer, folder, flat)
    state = optimizer.state_dict()["state"]
    return {f"{index} {key}": whole(value) for index, entry in state.items() for key, value in entry.items()}


DENSE: Final = {"dense_checkpoints": True}


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("saver", "loader", "options"),
    [
        ("FSDP2 on 4", "FSDP2 on 2", {}),
        ("FSDP2 on 2", "FSDP2 and tensor parallel on 2 x 2", {}),
        ("FSDP2 and tensor parallel on 2 x 2", "FSDP2 on 4", {}),
        ("DDP on 2", "DDP on 2", {}),
        ("DDP on 2", "FSDP2 on 4", DENSE),
        ("FSDP2 on 4", "DDP on 2", DENSE),
        ("FSDP2 on 2", "FSDP2 on 2", {"state_dtype": torch.int8}),
        ("FSDP2 on 2", "DDP on 2", {**DENSE, "state_dtype": torch.int8}),
    ],
)
def test_checkpoints_move_between_layouts(
    saver: str, loader: str, options: dict[str, Any], flat: bool, tmp_path: Path
) -> None:
    (then, later), *_ = run_ranks(WAYS[saver][1], save, saver, str(tmp_path), flat, options)
    for got, got_later in run_ranks(WAYS[loader][1], load, loader, str(tmp_path), flat, options):
        for expected, found in zip(then, got, strict=True):
            assert_same(found, expected)
        if saver == loader:
            assert_same(got_later[1], later[1])
        if "state_dtype" not in options or saver == loader:  # the noise of codes depends on the shard
            assert_trained_alike(got_later[0], then[0], later[0])
    if options or saver != "DDP on 2":
        for found in run_ranks(2, load_into_stock, "FSDP2 on 2", str(tmp_path), flat):
            assert_same(found, then[1])


def load_otherwise(rank: int, folder: str, flat: bool) -> str:
    """Under a plan that freezes as many other rows, so that all shapes are the same."""
    model = ddp(net())
    other = {**plan(), "up.bias": sf.FreezeMask((10,), rows=[1, 2, 5, 6])}
    return said(lambda: restore(model, optimizer_of(model, freeze=sf.FreezePlan(other)), folder, flat))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_checkpoint_of_another_plan_is_refused(flat: bool, tmp_path: Path) -> None:
    run_ranks(2, save, "DDP on 2", str(tmp_path), flat, {})
    for message in run_ranks(2, load_otherwise, str(tmp_path), flat):
        for word in ("load_state_dict", "'module.up.bias'", "another freeze plan", "dense_state_dict"):
            assert word in message


def pause(rank: int, folder: str, thawed: str) -> tuple[dict[str, Tensor], str]:
    """Training under plans that pause rows and columns, on one rank or sharded; saved and loaded in between."""
    spread = shard if dist.get_world_size() > 1 else lambda model: model
    model = spread(net())
    optimizer = optimizer_of(model)
    for number, (rows, cols) in enumerate((([0, 3], [1]), ([3, 9], [1, 8]), ([], [8]))):
        masks = {"up.weight": sf.FreezeMask((10, 6), rows=rows), "down.weight": sf.FreezeMask((7, 10), cols=cols)}
        optimizer.set_freeze(sf.FreezePlan(masks), keep_state=True, thawed=thawed)
        train(model, optimizer, range(3 * number, 3 * number + 3))
        if number == 1 and dist.get_world_size() > 1:
            dcp.save(checkpoint(model, optimizer, flat=False), checkpoint_id=folder)
            model = spread(net())
            optimizer = optimizer_of(model, freeze=sf.FreezePlan(masks))
            restore(model, optimizer, folder, flat=False)
    return weights(model), str(optimizer.state_dict()["param_groups"][0]["freeze"])


@pytest.mark.parametrize("thawed", ["fresh", "kept"])
def test_what_is_paused_travels(thawed: str, tmp_path: Path) -> None:
    ((expected, _),) = run_ranks(1, pause, str(tmp_path), thawed)
    for found, note in run_ranks(2, pause, str(tmp_path), thawed):
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=STEPS * 1e-2 * 2**-13, msg=name)
        assert '"kept": true' in note


def thaw(rank: int, folder: str) -> tuple[Any, Any]:
    """Trains 5 steps, thaws some, trains 3; saves, loads into a new optimizer; both train on."""
    model = shard(net())
    optimizer = optimizer_of(model)
    train(model, optimizer, range(5))
    thawed = sf.FreezePlan({"up.weight": sf.FreezeMask((10, 6), rows=[3, 7])})
    optimizer.set_freeze(thawed)
    train(model, optimizer, range(5, 8))
    dcp.save(checkpoint(model, optimizer, flat=False), checkpoint_id=folder)
    other = shard(net())
    resumed = optimizer_of(other, freeze=thawed)
    restore(other, resumed, folder, flat=False)
    train(model, optimizer, range(8, 12))
    train(other, resumed, range(8, 12))
    return weights(model), weights(other)


def test_ages_of_thawed_rows_travel(tmp_path: Path) -> None:
    for expected, found in run_ranks(2, thaw, str(tmp_path)):
        assert_same(found, expected)


def make_state(rank: int, way: str) -> tuple[dict[str, Tensor], set[float]]:
    model = WAYS[way][0](net())
    optimizer = optimizer_of(model)
    get_optimizer_state_dict(model, optimizer)
    return weights(model), steps_of(optimizer)


@pytest.mark.parametrize("way", ["DDP on 2", "FSDP2 on 4"])
def test_making_state_for_a_checkpoint_moves_and_counts_nothing(way: str) -> None:
    for found, steps in run_ranks(WAYS[way][1], make_state, way):
        assert steps == {0.0}
        assert_same(found, weights(net()))


def warm_up_from_zero(rank: int) -> tuple[dict[str, Tensor], set[float]]:
    """A first training step with a learning rate of zero, where all gradients of one rank happen to be zero."""
    model = shard(net())
    optimizer = optimizer_of(model, lr=0.0)
    model(batch(0)).square().mean().backward()
    if rank == 1:
        for p in model.parameters():
            p.grad.to_local().zero_()
    optimizer.step()
    return weights(model), steps_of(optimizer)


def test_a_warm_up_from_zero_counts_on_every_rank() -> None:
    for found, steps in run_ranks(2, warm_up_from_zero):
        assert steps == {1.0}
        assert_same(found, weights(net()))


def die_in_save(rank: int, folder: str) -> None:
    model = shard(net())
    optimizer = optimizer_of(model)
    train(model, optimizer, range(5))
    dcp.save(checkpoint(model, optimizer, flat=False), checkpoint_id=f"{folder}/5")
    train(model, optimizer, range(5, 10))
    if rank == 1:
        from torch.distributed.checkpoint import FileSystemWriter

        FileSystemWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    dcp.save(checkpoint(model, optimizer, flat=False), checkpoint_id=f"{folder}/10")


def test_a_rank_that_dies_in_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    with pytest.raises((BrokenProcessPool, AssertionError)):
        run_ranks(2, die_in_save, str(tmp_path))
    (tmp_path / "other").mkdir()
    (expected, _), *_ = run_ranks(2, save, "FSDP2 on 2", str(tmp_path / "other"), False, {})
    (found, _), *_ = run_ranks(4, load, "FSDP2 on 4", str(tmp_path / "5"), False, {})
    for got, tensors in zip(found, expected, strict=True):
        assert_same(got, tensors)


def exchange(rank: int) -> dict[str, Tensor]:
    """As accelerate does for FSDP2: the optimizer exists, the model is sharded, groups get the new parameters."""
    model = net()
    optimizer = optimizer_of(model)
    shard(model)
    named = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [named[name] for name in group["param_names"]]
    proof = sf.snapshot(model, plan())
    train(model, optimizer)
    proof.verify(model)
    return weights(model)


def test_parameters_may_be_exchanged_under_their_names() -> None:
    ((expected, *_),) = run_ranks(1, spread_and_train, "one process")
    for found in run_ranks(2, exchange):
        assert_same(found, expected)


# ----------------------------------------------------------------------------------------------------- what is refused


def refusal(rank: int, way: str) -> tuple[str, bool]:
    """What the first step says, and whether weights are as they were."""
    model = {
        "another plan": lambda: ddp(net()),
        "another plan, sharded": lambda: shard(net()),
        "built before": lambda: net(),
        "FSDP1": lambda: FullyShardedDataParallel(net(), device_id=torch.device("cpu")),
        "FSDP1 with original parameters": lambda: FullyShardedDataParallel(
            net(), device_id=torch.device("cpu"), use_orig_params=True
        ),
    }[way]()
    mine = plan()
    if way.startswith("another plan") and rank == 1:
        mine = sf.FreezePlan({**mine, "up.bias": sf.FreezeMask((10,), rows=[0])})
    try:
        optimizer = optimizer_of(model, freeze=mine)
        if way == "built before":
            shard(model)
        start = weights(model)
        model(batch(0)).square().mean().backward()
        optimizer.step()
    except (ValueError, RuntimeError) as error:
        same = "FSDP1" in way or all(torch.equal(tensor, start[name]) for name, tensor in weights(model).items())
        return f"{type(error).__name__}: {error}", same
    return "", False


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("another plan", ["ValueError: MaskedAdamW", "different freeze plans", "rank 0", "rank 1", "from one file"]),
        ("another plan, sharded", ["ValueError: MaskedAdamW", "different freeze plans", "rank 0", "rank 1"]),
        ("built before", ["ValueError: MaskedAdamW", "'up.weight' has no gradient", "sharding", "afterwards"]),
        ("FSDP1", ["ValueError: MaskedAdamW", "_flat_param", "FSDP1", "fully_shard"]),
        ("FSDP1 with original parameters", ["ValueError: MaskedAdamW", "up.weight", "FSDP1", "fully_shard"]),
    ],
)
def test_refused_before_anything_changed(way: str, words: list[str]) -> None:
    for message, same in run_ranks(2, refusal, way):
        assert message and same, "took a step"
        for word in words:
            assert word in message


def clip_fsdp1(rank: int) -> str:
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    model(batch(0)).square().mean().backward()
    return said(lambda: sf.clip_grad_norm_(model, 1.0))


def test_the_norm_of_fsdp1_is_refused() -> None:
    assert all("clip_grad_norm_" in message and "FSDP1" in message for message in run_ranks(2, clip_fsdp1))


def test_flat_tensors_without_a_mapping_are_refused() -> None:
    """DeepSpeed without ZeRO puts one flat tensor in place of a group's 16-bit parameters, and says no more."""
    optimizer = optimizer_of(net())
    for group in optimizer.param_groups:
        group["params"] = [torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in group["params"]]))]
        group["params"][0].grad = torch.ones_like(group["params"][0])
    with pytest.raises(ValueError, match=r"flat tensors.*zero_optimization.*fully_shard"):
        optimizer.step()


# --------------------------------------------------------------------------------------- other parts of the package


def others(rank: int) -> dict[str, Any]:
    """`guard`, `zero_frozen_grads_`, `snapshot`, low precision and mixed precision on sharded parameters."""
    found: dict[str, Any] = {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    models = [shard(net(), mp_policy=policy) for _ in range(2)]
    proof = sf.snapshot(models[0], plan())
    train(models[0], optimizer_of(models[0]))
    stock = torch.optim.AdamW(models[1].named_parameters(), **OPTIONS)
    guard = sf.guard(stock, plan(), models[1])
    train(models[1], stock)
    for model in models:
        proof.verify(model)
    found["mixed"] = [weights(model) for model in models]
    with torch.no_grad():
        models[1].up.weight.mul_(2)
    for p in models[1].parameters():
        p.grad = torch.zeros_like(p)
    found["verify"], found["guard"] = said(lambda: proof.verify(models[1])), said(stock.step)
    guard.remove()

    model = net()
    stock = torch.optim.SGD(model.parameters(), lr=0.1)
    sf.guard(stock, plan(), model)
    shard(model)  # and the optimizer's parameters are exchanged, as accelerate does
    stock.param_groups[0]["params"] = list(model.parameters())
    found["sharded later"] = said(stock.step)

    model = shard(net())
    model(batch(0)).square().mean().backward()
    before = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
    sf.zero_frozen_grads_(model, plan())
    found["gradients"] = before, {name: whole(p.grad) for name, p in model.named_parameters()}

    model = shard(net().bfloat16())
    for master, rounding in (("remainder", "nearest"), (None, "stochastic")):
        optimizer = optimizer_of(model, master=master, rounding=rounding)
        proof = sf.snapshot(model, plan())
        for step in range(3):
            model(batch(step).bfloat16()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        proof.verify(model)
        restored = optimizer_of(model, master=master, rounding=rounding)
        restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        pair = [{n: whole(w) for n, w in o.master_weights().items()} for o in (optimizer, restored)]
        found[f"masters, {rounding}"] = pair
    return found


def test_the_rest_on_sharded_parameters() -> None:
    for found in run_ranks(2, others):
        ours, guarded = found["mixed"]
        assert_trained_alike(ours, weights(net()), guarded)
        assert "FrozenDriftError: verify: frozen 'up.weight' moved at row" in found["verify"]
        assert "FrozenDriftError: guard: frozen 'up.weight' moved at row" in found["guard"] and "was" in found["guard"]
        assert "(this rank: " in found["sharded later"] and "guard it anew" in found["sharded later"]
        before, after = found["gradients"]
        assert_same(after, {name: grad.masked_fill(frozen(name, grad), 0.0) for name, grad in before.items()})
        for rounding in ("nearest", "stochastic"):
            first, second = found[f"masters, {rounding}"]
            assert_same(second, first)


def test_drift_names_the_row_of_the_whole_tensor() -> None:
    messages = run_ranks(2, others)[1]["verify"]  # the second rank holds rows 5 to 9; of these, 9 is frozen
    assert "row 9," in messages or "row 5, column 1" in messages


def names_in_a_plan(rank: int) -> list[str]:
    """Plans made for the bare model, and plans with the wrapped names."""
    found = []
    wrong = sf.FreezePlan({"down.wight": sf.FreezeMask((7, 10))})
    for model in (ddp(net()), torch.compile(net(), backend="eager")):
        prefix = "module." if isinstance(model, DistributedDataParallel) else "_orig_mod."
        for given in (plan(), sf.FreezePlan({prefix + name: mask for name, mask in plan().items()})):
            optimizer = sf.MaskedAdamW(model.named_parameters(), freeze=given)
            proof = sf.snapshot(model, given)
            model(batch(0)).square().mean().backward()
            sf.zero_frozen_grads_(model, given)
            optimizer.step()
            proof.verify(model)
        bare = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
        sf.snapshot(bare, given).verify(bare)
        found.append(said(lambda model=model: sf.MaskedAdamW(model.named_parameters(), freeze=wrong)))
    return found


def test_names_of_wrappers_are_understood() -> None:
    for ddp_error, compile_error in run_ranks(2, names_in_a_plan):
        assert "'down.wight'" in ddp_error and "'module.down.weight'" in ddp_error
        assert "'_orig_mod.down.weight'" in compile_error


# -------------------------------------------------------------------------------------------------- new words alone

OLD, WORDS = 33, 35  # rows of the embedding before it grew, and since


def language_model(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=WORDS, max_position_embeddings=16, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def new_words(rank: int, tied: bool, adapters: bool) -> dict[str, Tensor]:
    """Only the new rows train, whole or by adapters; a plan is carried to these before they are sharded."""
    import peft

    model = language_model(tied)
    ends = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    freeze = sf.FreezePlan({f"{name}.weight": sf.FreezeMask((WORDS, 16), rows=range(OLD)) for name in ends})
    if adapters:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[name.split(".")[-1] for name in ends]))
        freeze = sf.adapt(freeze, model)
    else:
        for name, p in model.named_parameters():
            p.requires_grad_(name in freeze)
    for module in [*(m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"), model]:
        fully_shard(module)
    optimizer = sf.MaskedAdamW(model.named_parameters(), freeze=freeze, **OPTIONS)
    for step in range(3):
        tokens = torch.randint(0, WORDS, (2, 6), generator=torch.Generator().manual_seed(10 * rank + step))
        tokens[:, ::2] = torch.arange(OLD, WORDS).repeat(2)[:3]
        model(input_ids=tokens, labels=tokens).loss.backward()
        sf.clip_grad_norm_(model, 0.5, freeze)
        optimizer.step()
        optimizer.zero_grad()
    if adapters:
        freeze.check(model)
    return weights(model)


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_only_new_rows_train_under_fsdp2(tied: bool, adapters: bool) -> None:
    """33 old rows of 35 in two shards of 18 and 17: the first has no new one."""
    found, _ = run_ranks(2, new_words, tied, adapters)
    before = {name: p.detach() for name, p in language_model(tied).named_parameters()}
    if adapters:
        moved = {name: values for name, values in found.items() if "lora_" in name}
        assert len(moved) == (2 if tied else 4)
        for name, values in moved.items():
            rows = {"lora_embedding_A": values.T, "lm_head.lora_B": values}
            of_words = next((part for key, part in rows.items() if key in name), None)
            if of_words is not None:
                assert not of_words[:OLD].any(), name
                assert of_words[OLD:].all(), name
        found = {name.replace("base_layer.", "").removeprefix("base_model.model."): p for name, p in found.items()}
    for name, values in before.items():
        ends = not adapters and ("embed_tokens" in name or "lm_head" in name)
        assert_same_bits(found[name][:OLD], values[:OLD], name)
        assert torch.equal(found[name][OLD:], values[OLD:]) != ends, name
