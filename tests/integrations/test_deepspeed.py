"""DeepSpeed's ZeRO-1, 2 and 3 on real engines in real processes: plans by name on flat partitions."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same_bits
from engines import DTYPES, close_engines, config, engine_of, gathered, masters, run_engines, values
from model_folders import run
from safetensors.torch import load_file, save_file
from torch import Tensor
from uneven import Net, frozen, net, plan

import safefreeze_kernels as sf

# looked for, not imported: the processes of other tests shall not have it
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

STEPS: Final = 20
OPTIONS: Final[dict[str, Any]] = {"lr": 1e-2, "weight_decay": 0.1}
STAGES: Final = pytest.mark.parametrize("stage", [1, 2, 3])


@pytest.fixture(scope="module", autouse=True)
def ended_engines() -> Iterator[None]:
    yield
    close_engines()


def batch(step: int, rank: int = 0) -> Tensor:
    return torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(100 * rank + step))


def optimizer_of(model: torch.nn.Module, **options: Any) -> sf.MaskedAdamW:
    """Two groups: what has one dimension does not decay."""
    named = list(model.named_parameters())
    shape = lambda p: getattr(p, "ds_shape", p.shape)  # noqa: E731
    groups = [
        {"params": [(name, p) for name, p in named if len(shape(p)) > 1]},
        {"params": [(name, p) for name, p in named if len(shape(p)) < 2], "weight_decay": 0.0},
    ]
    return sf.MaskedAdamW(groups, **{**OPTIONS, "freeze": plan(), **options})


def train(engine: Any, steps: range, *, accumulate: int = 1, apart: bool = False) -> list[float]:
    """Trains; the engine's norm of every step. ``apart``: ranks have batches of their own."""
    norms = []
    for step in steps:
        for micro in range(accumulate):
            x = batch(accumulate * step + micro, dist.get_rank() if apart else 0)
            engine.backward(engine(x.to(next(engine.module.parameters()).dtype)).float().square().mean())
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return norms


def train_alone(
    steps: range, dtype: str = "float32", accumulate: int = 1, ranks: int = 1, freeze: sf.FreezePlan | None = None
) -> tuple[dict[str, Tensor], list[float]]:
    """The same in one process, without an engine: float32 masters, and the model in another dtype."""
    master, model = net(), net().to(DTYPES[dtype])
    master.load_state_dict(model.state_dict())
    optimizer = optimizer_of(master, freeze=plan() if freeze is None else freeze)
    norms = []
    for step in steps:
        for micro in range(accumulate):
            for rank in range(ranks):
                x = batch(accumulate * step + micro, rank).to(DTYPES[dtype])
                scale = 256.0 if dtype == "float16" else 1.0
                (model(x).float().square().mean() * scale / accumulate / ranks).backward()
        for p, source in zip(master.parameters(), model.parameters(), strict=True):
            p.grad, source.grad = source.grad.float() / scale, None
        norms.append(float(sf.clip_grad_norm_(master, 0.05, optimizer.plan)))
        optimizer.step()
        model.load_state_dict(master.state_dict())
    return {name: p.detach().clone() for name, p in master.named_parameters()}, norms


def assert_trained_alike(
    got: dict[str, Tensor], start: dict[str, Tensor], expected: dict[str, Tensor], steps: int, under: sf.FreezePlan,
    dtype: str = "float32",
) -> None:  # fmt: skip
    """Frozen bytes are those of ``start``. Live values: steps of 1e-2 on gradients that differ in their last bits (sums
    in another order) stay 200 steps of float32 rounding apart; where 16-bit weights then round to their neighbours,
    gradients differ by as much, and masters stay a few such roundings apart."""
    apart = steps * 1e-2 * {"float32": 2**-13, "float16": 2**-8, "bfloat16": 2**-4}[dtype]
    for name, tensor in got.items():
        mask = frozen(name, tensor, under)
        assert_same_bits(tensor, start[name], name, where=mask)
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=apart, msg=lambda m, n=name: f"{n}: {m}")
        assert mask.all() or not torch.equal(tensor, start[name]), f"{name} did not train"


# --------------------------------------------------------------------------------------------------------- the training


def spread_and_train(rank: int, stage: int, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    model = net()
    optimizer = optimizer_of(model)
    engine = engine_of(model, optimizer, stage, dtype, **options)
    start, before = masters(engine), values(engine)
    with gathered(engine) as whole:
        proof = sf.snapshot(whole, plan())
    accumulate = options.get("accumulate", 1)
    norms = train(engine, range(STEPS), accumulate=accumulate, apart=dtype == "float32")
    with gathered(engine) as whole:
        proof.verify(whole)
    held = sum(value.numel() for entry in optimizer.state.values() for key, value in entry.items() if "exp" in key)
    return {
        "start": start, "before": before, "masters": masters(engine), "values": values(engine), "norms": norms,
        "held": held, "padding": sum(flat.numel() for flat in optimizer.state), "skipped": engine.skipped_steps,
    }  # fmt: skip


@STAGES
@pytest.mark.parametrize(
    ("dtype", "world", "options"),
    [
        ("float32", 2, {"accumulate": 2}),
        ("bfloat16", 2, {"sub_group_size": 40}),
        ("float16", 2, {}),
        pytest.param("float32", 4, {"accumulate": 2, "sub_group_size": 20}, marks=pytest.mark.slow),
        pytest.param("bfloat16", 4, {"accumulate": 2}, marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_one_process(stage: int, dtype: str, world: int, options: dict[str, Any]) -> None:
    """20 clipped steps. Where sums in another order would be rounded to 16 bits, all ranks have the same batches."""
    apart = world if dtype == "float32" else 1
    ranks = run_engines(world, spread_and_train, stage, dtype, options)
    expected, norms = train_alone(range(STEPS), dtype, options.get("accumulate", 1), apart)
    for found in ranks:
        assert_trained_alike(found["masters"], found["start"], expected, STEPS, plan(), dtype)
        assert found["norms"] == pytest.approx(norms, rel={"float32": 1e-3, "float16": 1e-2}.get(dtype, 5e-2))
        assert not found["skipped"]
        for name, tensor in found["values"].items():
            assert_same_bits(tensor, found["before"][name], name, where=frozen(name, tensor, plan()))
    live = sum(int((~frozen(name, p, plan())).sum()) for name, p in expected.items())
    held = sum(found["held"] for found in ranks)
    assert 2 * live <= held <= 2 * live + 8 * world, "state is what is live, and padding where nothing is frozen"


# -------------------------------------------------------------------------------------------------- the plan may change


def thawing() -> sf.FreezePlan:
    """Another plan: some of what was frozen thaws, something else freezes."""
    return sf.FreezePlan(
        {"up.weight": sf.FreezeMask((10, 6), rows=[3, 7]), "down.weight": sf.FreezeMask((7, 10), cols=[0, 5])}
    )


def change(rank: int, stage: int, keep: bool, thawed: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    model = net()
    optimizer = optimizer_of(model)
    engine = engine_of(model, optimizer, stage, sub_group_size=40)
    train(engine, range(4))
    optimizer.set_freeze(thawing(), keep_state=keep)
    before = masters(engine)
    train(engine, range(4, 7))
    after = masters(engine)
    optimizer.set_freeze(plan(), keep_state=keep, thawed=thawed)
    train(engine, range(7, 9))
    moved = [int((before[n] != after[n])[frozen(n, after[n], thawing())].sum()) for n in after]
    return masters(engine), after, moved


@STAGES
@pytest.mark.parametrize(("keep", "thawed"), [(False, "fresh"), (True, "kept")])
def test_a_plan_may_change_between_steps(stage: int, keep: bool, thawed: str) -> None:
    model = net()
    optimizer = optimizer_of(model)
    for step in range(9):
        if step in (4, 7):
            optimizer.set_freeze(
                plan() if step == 7 else thawing(), keep_state=keep, thawed=thawed if step == 7 else "fresh"
            )
        model(batch(step)).square().mean().backward()
        sf.clip_grad_norm_(model, 0.05, optimizer.plan)
        optimizer.step()
        optimizer.zero_grad()
    for found, _, moved in run_engines(2, change, stage, keep, thawed):
        assert not any(moved)
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name], p.detach(), rtol=0, atol=9 * 1e-2 * 2**-13, msg=name)


def plans_made(rank: int, stage: int) -> list[int]:
    """How many launch plans there were made after each step."""
    from safefreeze_kernels.optim import adam

    made, make = [], adam.make_launch_plans
    adam.make_launch_plans = lambda *given: made.append(1) or make(*given)
    try:
        model = net()
        engine = engine_of(model, optimizer_of(model), stage, sub_group_size=40)
        return [len(made) for step in range(4) if train(engine, range(step, step + 1))]
    finally:
        adam.make_launch_plans = make


@STAGES
def test_launch_plans_are_kept_while_other_partitions_are_stepped(stage: int) -> None:
    for counts in run_engines(2, plans_made, stage):
        assert counts == [counts[0]] * 4
        assert counts[0] >= 2


# ------------------------------------------------------------------------------------------------------ save and resume


def moments(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [{key: value.clone() for key, value in entry.items()} for entry in optimizer.state.values()]


def save(rank: int, stage: int, dtype: str, folder: str, die: bool, options: dict[str, Any]) -> Any:
    """Trains, thaws some, saves, trains on; what there is at the end."""
    model = net()
    optimizer = optimizer_of(model, **options)
    engine = engine_of(model, optimizer, stage, dtype, sub_group_size=40)
    train(engine, range(4))
    optimizer.set_freeze(thawing())
    train(engine, range(4, 6))
    engine.save_checkpoint(folder, tag="six")
    then = masters(engine)
    train(engine, range(6, 8))
    if die and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(engine, range(8, 10))
    return then, masters(engine), values(engine), moments(optimizer)


def resume(rank: int, stage: int, dtype: str, folder: str, universal: bool, options: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    model = Net()
    optimizer = optimizer_of(model, freeze=thawing(), **options)
    engine = engine_of(model, optimizer, stage, dtype, sub_group_size=40, universal=universal)
    path, _ = engine.load_checkpoint(folder, tag=None if universal else "six")
    assert path is not None
    then = masters(engine)
    train(engine, range(6, 10))
    return then, masters(engine), values(engine), moments(optimizer)


@STAGES
@pytest.mark.parametrize(
    ("dtype", "killed"), [("bfloat16", False), pytest.param("float32", True, marks=pytest.mark.slow)]
)
def test_a_killed_run_resumes_bit_for_bit(stage: int, dtype: str, killed: bool, tmp_path: Path) -> None:
    """New processes take ten seconds: a run that only ends is resumed by the quick tests."""
    expected = run_engines(2, save, stage, dtype, str(tmp_path / "whole"), False, {})
    if killed:
        with pytest.raises((BrokenProcessPool, AssertionError)):
            run_engines(2, save, stage, dtype, str(tmp_path / "killed"), True, {})
    else:
        shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    found = run_engines(2, resume, stage, dtype, str(tmp_path / "killed"), False, {})
    for (_, *whole), (_, *resumed) in zip(expected, found, strict=True):
        for tensors, others in zip([*whole[:2], *whole[2]], [*resumed[:2], *resumed[2]], strict=True):
            assert tensors.keys() == others.keys()
            for name, tensor in tensors.items():
                assert_same_bits(others[name], tensor, name)


def to_universal(folder: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        argparse.Namespace(
            input_folder=str(folder / "six"), output_folder=str(folder / "six_universal"), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip


def convert(rank: int, folder: str) -> str:
    try:
        to_universal(Path(folder))
    except RuntimeError as error:
        return str(error)
    return ""


@STAGES
@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_universal_checkpoint_resumes_on_other_ranks(stage: int, world: int, tmp_path: Path) -> None:
    dense = {"dense_checkpoints": True}
    (then, expected, *_), _ = run_engines(2, save, stage, "float32", str(tmp_path), False, dense)
    assert run_engines(1, convert, str(tmp_path)) == [""]
    for got, found, *_ in run_engines(world, resume, stage, "float32", str(tmp_path), True, dense):
        for name, tensor in then.items():
            assert_same_bits(got[name], tensor, name)
        assert_trained_alike(found, then, expected, 4, thawing())


@STAGES
def test_packed_checkpoints_are_not_taken_for_universal_ones(stage: int, tmp_path: Path) -> None:
    run_engines(2, save, stage, "float32", str(tmp_path), False, {})
    (said,) = run_engines(1, convert, str(tmp_path))
    assert "exceeds dimension size (1)" in said


def to_float32(rank: int, folder: str) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(folder, f"{folder}/tuned", safe_serialization=True, tag="six")


@STAGES
def test_what_zero_to_fp32_writes_is_audited(stage: int, tmp_path: Path) -> None:
    """What two plans froze, one after the other, is proven; what the second one froze had moved before."""
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned" / "model.safetensors"
    run_engines(2, save, stage, "float32", str(tmp_path), False, {})
    run_engines(1, to_float32, str(tmp_path))
    save_file(dict(net().state_dict()), base)
    always = sf.FreezePlan({"up.weight": sf.FreezeMask((10, 6), rows=[3])})
    for freeze, held in ((always, True), (thawing(), False)):
        freeze.save(tmp_path / "plan.safetensors")
        assert (run("verify", base, tuned, tmp_path / "plan.safetensors").exit_code == 0) == held
    assert all(not torch.equal(tensor, load_file(base)[name]) for name, tensor in load_file(tuned).items())


# ------------------------------------------------------------------------------------------ gradients that are not read


def poison(model: torch.nn.Module) -> None:
    """Has every frozen gradient be NaN."""
    for name, p in model.named_parameters():
        if name in plan():
            mask = plan()[name].dense()
            p.register_hook(lambda grad, mask=mask: grad.masked_fill(mask, float("nan")))


def with_nan(rank: int, stage: int, dtype: str, accumulate: int) -> Any:
    found = []
    for poisoned in (False, True):
        model = net()
        if poisoned:
            poison(model)
        optimizer = optimizer_of(model)
        engine = engine_of(model, optimizer, stage, dtype, accumulate=accumulate)
        norms = train(engine, range(4), accumulate=accumulate)
        found.append((masters(engine), norms, engine.skipped_steps, float(engine.loss_scale() or 1)))
    return found


@STAGES
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_nan_in_a_frozen_gradient_changes_nothing(stage: int, dtype: str) -> None:
    """Neither the norm, nor a loss scale, nor whether a step is taken."""
    for (expected, norms, *rest), (found, found_norms, *others) in run_engines(2, with_nan, stage, dtype, 2):
        assert found_norms == norms
        assert others == rest
        for name, tensor in expected.items():
            assert_same_bits(found[name], tensor, name)


def overflow(rank: int, stage: int) -> tuple[int, bool]:
    """An inf in a live gradient still skips the step."""
    model = net()
    model.up.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), float("inf")))
    engine = engine_of(model, optimizer_of(model), stage, "float16")
    before = masters(engine)
    train(engine, range(1))
    return engine.skipped_steps, all(torch.equal(tensor, before[name]) for name, tensor in masters(engine).items())


@STAGES
def test_inf_in_a_live_gradient_skips_the_step(stage: int) -> None:
    assert run_engines(2, overflow, stage) == [(1, True)] * 2


# ---------------------------------------------------------------------------------------------------- other ways to run


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        hidden = checkpoint(lambda y: self.norm(torch.tanh(self.up(y))), x, use_reentrant=False)
        return self.out(torch.tanh(self.down(torch.tanh(hidden))))


def otherwise(rank: int, way: str, stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    import deepspeed

    torch.manual_seed(0)
    if way == "init":  # parameters are spread from the beginning
        with deepspeed.zero.Init(config_dict_or_path={"train_micro_batch_size_per_gpu": 4}):
            model: torch.nn.Module = Net()
    else:
        model = Checkpointed() if way == "checkpointed" else Net()
    zero: dict[str, Any] = {}
    if way == "offload":
        zero = {"offload_optimizer": {"device": "cpu"}}
    live = sf.live_gradients(model, plan(), most_live=1.0) if way == "live" else None
    options = {"zero_force_ds_cpu_optimizer": False} if way == "offload" else {}
    engine = engine_of(model, optimizer_of(model), stage, extra=options, **zero)
    start = masters(engine)
    train(engine, range(5))
    return start, masters(engine), live.summary() if live else ""


@pytest.mark.parametrize(
    ("way", "stage"),
    [("checkpointed", 2), ("checkpointed", 3), ("offload", 1), ("offload", 2), ("offload", 3), ("live", 1), ("live", 3),
     ("init", 3)],
)  # fmt: skip
def test_other_ways_to_run(way: str, stage: int) -> None:
    """Activation checkpointing, offload to the CPU, live gradients, and `deepspeed.zero.Init`."""
    start = {name: p.detach().clone() for name, p in net().named_parameters()}
    expected, _ = train_alone(range(5))
    for before, found, summary in run_engines(2, otherwise, way, stage):
        if way == "init":  # its own random numbers
            for name, tensor in found.items():
                assert_same_bits(tensor, before[name], name, where=frozen(name, tensor, plan()))
                assert not torch.equal(tensor, before[name])
            continue
        if way == "checkpointed":
            for name, tensor in found.items():
                assert_same_bits(tensor, start[name], name, where=frozen(name, tensor, plan()))
            continue
        assert_trained_alike(found, start, expected, 5, plan())
        assert ("2 of 4 weights have live gradients" in summary) == (way == "live")


# ------------------------------------------------------------------------------------------------------ what is refused


class WithWords(Net):
    """Most of its words are never used. Each rank has some."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.words(torch.tensor([1])).sum()


def refusal(rank: int, way: str, stage: int) -> tuple[str, bool]:
    """What is said of it, and whether the weights are as they were."""
    model, mine, dtype, zero = net(), plan(), "float32", dict[str, Any]()
    if way == "another plan" and rank == 1:
        mine = sf.FreezePlan({**mine, "up.bias": sf.FreezeMask((10,), rows=[0])})
    if way == "nan in 16 bits":
        dtype, model = "bfloat16", WithWords().bfloat16()
        mine = sf.FreezePlan({"words.weight": sf.FreezeMask((64, 4), rows=range(2, 64))})
        with torch.no_grad():
            model.words.weight.view(torch.int16)[2:] = 0x7FA5  # a payload of its own
    if way == "round robin":
        zero = {"round_robin_gradients": True}
    optimizer = optimizer_of(model, freeze=mine)
    if way == "built before":
        optimizer._zeroed = None
    engine = engine_of(model, optimizer, stage, dtype, **zero)
    if way == "no mapping":
        _lose_the_mapping(engine, stage)
    if way in ("swap_optimizer", "zenflow"):  # as such an engine says of itself; none can be built without its devices
        setattr(engine.optimizer, way, True)
    before = values(engine)
    try:
        if way in ("clip_grad_norm_", "zero_frozen_grads_"):
            getattr(sf, way)(model, *([1.0] if way == "clip_grad_norm_" else []), plan())
        elif way in ("swap_optimizer", "zenflow"):
            optimizer.step()
        elif way == "guard":
            sf.guard(optimizer, plan(), model)
        elif way == "snapshot":
            sf.snapshot(model, plan())
        elif way == "thaws without live gradients":
            with sf.live_gradients(model, plan(), most_live=1.0):
                optimizer.set_freeze(None)
                train(engine, range(1))
        else:
            train(engine, range(3))
    except (ValueError, RuntimeError) as error:
        same = all(torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in values(engine).items())
        return f"{type(error).__name__}: {error}", same
    return "", False


def _lose_the_mapping(engine: Any, stage: int) -> None:
    """As if the engine were of a version that keeps it elsewhere."""
    for p in engine.module.parameters():
        if stage < 3 and p._hp_mapping is not None:
            del p._hp_mapping.lp_fragment_address
    if stage == 3:
        engine.optimizer.__dict__["places"] = engine.optimizer.__dict__.pop("grad_position")


@pytest.mark.parametrize(
    ("way", "stage", "words"),
    [
        ("another plan", 2, ["MaskedAdamW", "different freeze plans", "rank 0", "rank 1"]),
        ("another plan", 3, ["MaskedAdamW", "different freeze plans", "rank 0", "rank 1"]),
        ("nan in 16 bits", 2, ["MaskedAdamW", "'words.weight'", "bfloat16"]),
        ("nan in 16 bits", 3, ["MaskedAdamW", "'words.weight'", "bfloat16"]),
        ("round robin", 2, ["MaskedAdamW", "another order", "round_robin_gradients"]),
        ("no mapping", 1, ["MaskedAdamW", "lp_fragment_address", "DeepSpeed 0.", "fully_shard"]),
        ("no mapping", 3, ["MaskedAdamW", "grad_position", "DeepSpeed 0.", "fully_shard"]),
        ("swap_optimizer", 3, ["MaskedAdamW", "offload_optimizer to nvme", "offload to the CPU works"]),
        ("zenflow", 3, ["MaskedAdamW", "zenflow", "offload to the CPU works"]),
        ("built before", 2, ["MaskedAdamW", "import deepspeed first"]),
        ("clip_grad_norm_", 2, ["clip_grad_norm_", "gradient_clipping"]),
        ("zero_frozen_grads_", 3, ["zero_frozen_grads_", "before that"]),
        ("guard", 2, ["guard", "flat partitions", "MaskedAdamW"]),
        ("snapshot", 3, ["snapshot", "GatheredParameters"]),
        ("thaws without live gradients", 2, ["learns where live_gradients computes no gradient"]),
    ],
)
def test_refused_before_anything_moved(way: str, stage: int, words: list[str]) -> None:
    for message, same in run_engines(2, refusal, way, stage):
        assert message and same, "took a step"
        for word in words:
            assert word in message


# ------------------------------------------------------------------------------------------------- other people's loops


def language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=35, max_position_embeddings=16,
        )
    )  # fmt: skip


def language_plan() -> sf.FreezePlan:
    mlp = "model.layers.0.mlp"
    return sf.FreezePlan(
        {
            f"{mlp}.up_proj.weight": sf.FreezeMask((24, 16), rows=range(0, 24, 2)),
            f"{mlp}.down_proj.weight": sf.FreezeMask((16, 24), cols=range(0, 24, 2)),
            "lm_head.weight": sf.FreezeMask((35, 16), rows=range(33)),
        }
    )


def batches(rank: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(rank)
    rows = [torch.randint(0, 35, (8,), generator=draw) for _ in range(16)]
    return [{"input_ids": row, "labels": row} for row in rows]


def by_trainer(rank: int, stage: int, folder: str) -> tuple[dict[str, Tensor], list[float], dict[str, Tensor]]:
    """transformers' Trainer with a DeepSpeed config; then once more, resumed from the checkpoint in the middle."""
    from transformers import Trainer, TrainingArguments

    from safefreeze_kernels.integrations.transformers import FreezeCallback, masked_adamw

    found = []
    for resume in (None, f"{folder}/checkpoint-2"):
        _forget_accelerate()
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=2, max_steps=4, save_steps=2, logging_steps=1, use_cpu=True,
            learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.05, report_to=[], disable_tqdm=True,
            deepspeed={
                "zero_optimization": {"stage": stage},
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_clipping": "auto",
            },
        )  # fmt: skip
        trainer = Trainer(
            language_model(), args, train_dataset=batches(),
            optimizer_cls_and_kwargs=masked_adamw(language_plan(), args), callbacks=[FreezeCallback(language_plan())],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        found.append((values(trainer.model_wrapped), norms))
    (whole, norms), (resumed, _) = found
    return whole, norms, resumed


def _forget_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("stage", [2, 3])
def test_transformers_trainer(stage: int, tmp_path: Path) -> None:
    start = {name: p.detach() for name, p in language_model().named_parameters()}
    for whole, norms, resumed in run_engines(2, by_trainer, stage, str(tmp_path)):
        assert len(norms) == 4
        for name, tensor in whole.items():
            mask = frozen(name, tensor, language_plan())
            assert_same_bits(tensor, start[name], name, where=mask)
            assert not torch.equal(tensor, start[name])
            assert_same_bits(resumed[name], tensor, name)


def by_accelerate(rank: int, stage: int) -> tuple[dict[str, Tensor], list[float]]:
    from accelerate import Accelerator, DeepSpeedPlugin

    _forget_accelerate()
    plugin = DeepSpeedPlugin(hf_ds_config=config(stage))
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = net()
    engine, optimizer = accelerator.prepare(model, optimizer_of(model))
    norms = []
    for step in range(4):
        accelerator.backward(engine(batch(step)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        norms.append(float(engine.get_global_grad_norm()))
    return masters(engine), norms


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate(stage: int) -> None:
    expected, norms = train_alone(range(4))
    start = {name: p.detach() for name, p in net().named_parameters()}
    for found, found_norms in run_engines(2, by_accelerate, stage):
        assert_trained_alike(found, start, expected, 4, plan())
        assert found_norms == pytest.approx(norms, rel=1e-3)
