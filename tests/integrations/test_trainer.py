"""transformers' Trainer and TRL's trainers, the real ones, on a tiny model."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_run
from conftest import assert_same_bits
from ranks import run_ranks
from torch import Tensor
from trainer_run import arguments, dataset, model, plan, trainer
from transformers import Trainer

import safefreeze_kernels as sf
from safefreeze_kernels.integrations.transformers import FreezeCallback, build_masked_adamw, masked_adamw

pytestmark = pytest.mark.filterwarnings("ignore")
LR = {"lr": 1e-2, "weight_decay": 0.1}


def groups_of(net: torch.nn.Module) -> list[dict[str, Any]]:
    """Trainer's two groups, by hand."""
    named = list(net.named_parameters())
    norms = [(name, p) for name, p in named if "norm" in name]
    return [{"params": [pair for pair in named if "norm" not in pair[0]]}, {"params": norms, "weight_decay": 0.0}]


def by_hand(batches: list[list[dict[str, Tensor]]], steps: int, max_norm: float = 0.1) -> tuple[Any, list[float]]:
    """The same training as a plain loop; the live norms."""
    net = model()
    optimizer = sf.MaskedAdamW(groups_of(net), freeze=plan(), **LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (steps - step) / steps))
    norms = []
    for rows in batches:
        net(**batch_of(rows)).loss.backward()
        norms.append(float(sf.clip_grad_norm_(net, max_norm, plan())))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return net, norms


class Recording(Trainer):
    """Keeps the batches it trains on."""

    def training_step(self, net: Any, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
        self.__dict__.setdefault("batches", []).append(
            [{key: value[i] for key, value in inputs.items()} for i in range(len(inputs["input_ids"]))]
        )
        return super().training_step(net, inputs, *rest)


def recording(folder: Path, callbacks: tuple[Any, ...] = (), **options: Any) -> Recording:
    return Recording(
        model=model(),
        args=arguments(folder, **options),
        train_dataset=dataset(),
        optimizer_cls_and_kwargs=masked_adamw(plan(), **LR),
        callbacks=[FreezeCallback(plan(), raw_norm=True), *callbacks],
    )


def assert_close(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Eight steps of 1e-2 whose clip coefficients differ in the last bits of float32 (torch sums norms in float32)."""
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=8 * 1e-2 * 2**-10, msg=lambda m, n=name: f"{n}: {m}")


def copies(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def logged(run: Trainer, excess: float = 1.05) -> list[float]:
    """The norms that a run logged; it logged raw ones with them, which are larger by a factor."""
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert all(entry["raw_grad_norm"] > entry["grad_norm"] * excess for entry in entries)
    assert {entry["frozen_share"] for entry in entries} == {round(plan().frozen_fraction, 6)}
    return [entry["grad_norm"] for entry in entries]


def batch_of(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def test_a_copy_of_the_model_zeroes_nothing() -> None:
    """As a reference model is made, after the optimizer: its backward zeroed the original's gradients, and it could not
    be pickled."""
    net, batch = model(), batch_of(dataset())
    optimizer = build_masked_adamw(net, plan(), **LR)
    found = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert not found._forward_hooks and vars(found).keys() == vars(model()).keys()
    assert b"safefreeze" not in pickle.dumps(net)
    net(**batch).loss.backward()
    name, mask = next(iter(plan().items()))
    frozen, weight = mask.dense(), net.get_parameter(name)
    assert not weight.grad[frozen].any()
    weight.grad.fill_(1.0)
    found(**batch).loss.backward()
    assert_same_bits(weight.grad, torch.ones_like(weight), "the original's gradient")
    assert found.get_parameter(name).grad[frozen].any()
    del optimizer
    gc.collect()
    assert not net._forward_hooks and vars(net).keys() == vars(model()).keys()


@pytest.mark.parametrize("first", ["live gradients", "optimizer"])
def test_a_layer_that_has_both_loses_each_by_itself(first: str) -> None:
    """Live gradients and the optimizer's hook on one module."""
    net = torch.nn.Linear(4, 4)
    rows = sf.FreezePlan({"weight": sf.FreezeMask((4, 4), rows=range(3))})
    attributes = vars(net).keys() - {"_forward_hooks"}
    optimizer, live = build_masked_adamw(net, rows, **LR), sf.live_gradients(net, rows)
    for last in (False, True):
        if (first == "live gradients") != last:
            live.remove()
        else:
            del optimizer
            gc.collect()
        found = copy.deepcopy(net)
        assert not found._forward_hooks and vars(found).keys() - {"_forward_hooks"} == attributes
    assert not net._forward_hooks and vars(net).keys() - {"_forward_hooks"} == attributes


def test_training_is_a_plain_loop_with_live_clipping(tmp_path: Path) -> None:
    run = recording(tmp_path)
    proof = sf.snapshot(run.model, plan())
    run.train()
    proof.verify(run.model)
    expected, norms = by_hand(run.batches, 8)
    assert_close(run.model, expected)
    assert logged(run) == pytest.approx(norms, rel=1e-4)


def test_groups_names_and_decay_are_trainers(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.create_optimizer()
    decaying = run.get_decay_parameter_names(run.model)
    first, second = run.optimizer.param_groups
    assert set(first["param_names"]) <= set(decaying) and first["weight_decay"] == 0.1
    assert second["weight_decay"] == 0.0 and all("norm" in name for name in second["param_names"])
    named = dict(run.model.named_parameters())
    assert sorted(first["param_names"] + second["param_names"]) == sorted(named)
    assert all(named[name] is p for g in (first, second) for name, p in zip(g["param_names"], g["params"], strict=True))


def test_hyper_parameters_from_the_arguments(tmp_path: Path) -> None:
    args = arguments(tmp_path, learning_rate=3e-4, weight_decay=0.05, adam_beta2=0.95, adam_epsilon=1e-6)
    _, options = masked_adamw(plan(), args, weight_decay=0.2)
    assert {**options, "plan": 0} == {"plan": 0, "lr": 3e-4, "weight_decay": 0.2, "betas": (0.9, 0.95), "eps": 1e-6}
    with pytest.raises(TypeError, match=r"lr is missing.*TrainingArguments"):
        masked_adamw(plan())


def test_a_plan_from_a_file(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.safetensors")
    _, options = masked_adamw(tmp_path / "plan.safetensors", lr=1e-3)
    assert options["plan"] == plan() and FreezeCallback(tmp_path / "plan.safetensors").plan == plan()


def test_accumulation_sees_every_batch(tmp_path: Path) -> None:
    run = recording(tmp_path, gradient_accumulation_steps=2, max_steps=4)
    run.train()
    pairs = [a + b for a, b in zip(run.batches[::2], run.batches[1::2], strict=True)]
    expected, norms = by_hand(pairs, 4)
    assert_close(run.model, expected)
    assert logged(run) == pytest.approx(norms, rel=1e-4)


class Poison(trainer_run.TrainerCallback):  # type: ignore[misc]
    """Puts a NaN into a frozen gradient during every backward pass."""

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        weight = kwargs["model"].model.layers[0].mlp.up_proj.weight

        def poison(grad: Tensor) -> Tensor:
            grad = grad.clone()
            grad[0] = float("nan")
            return grad

        weight.register_hook(poison)


def test_a_nan_in_a_frozen_gradient_changes_nothing(tmp_path: Path) -> None:
    clean, poisoned = recording(tmp_path), recording(tmp_path, (Poison(),))
    for run in (clean, poisoned):
        run.train()
    for (name, p), q in zip(poisoned.model.named_parameters(), clean.model.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach(), name)


@pytest.mark.parametrize("options", [{"bf16": True}, {"max_grad_norm": 0.0}, {"gradient_checkpointing": True}])
def test_other_settings_of_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    run = recording(tmp_path, max_steps=3, **options)
    start = copies(run.model)
    run.train()
    sf.snapshot(start, plan()).verify(run.model)
    assert all(not torch.equal(p, start[name]) for name, p in run.model.named_parameters())
    expected = by_hand(run.batches[:1], 3)[1][0]
    assert logged(run)[0] == pytest.approx(expected, rel=0.03 if "bf16" in options else 1e-4)


def test_a_backward_pass_that_failed_is_forgotten() -> None:
    net, batch = model(), batch_of(dataset()[:2])
    optimizer = build_masked_adamw(net, plan(), **LR)

    def fail(grad: Tensor) -> Tensor:
        raise RuntimeError("out of memory, say")

    handle = net.model.layers[0].mlp.up_proj.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        net(**batch).loss.backward()
    handle.remove()
    optimizer.zero_grad()
    net(**batch).loss.backward()
    live, raw = sf.clip_grad_norm_(net, 1e9, plan(), return_raw=True)
    assert live == raw, "frozen gradients were not zeroed"


def test_the_hook_goes_with_the_optimizer(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.create_optimizer()
    net = run.model
    assert len(net._forward_hooks) == 1
    del run
    gc.collect()
    assert not net._forward_hooks


def gradients_on_ranks(rank: int, way: str) -> tuple[float, float, dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    net = model()
    if way == "FSDP2":
        for layer in (*net.model.layers, net):
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = build_masked_adamw(net, plan(), **LR)
    run = DistributedDataParallel(net) if way == "DDP" else net
    run(**batch_of(dataset()[4 * rank : 4 * rank + 4])).loss.backward()
    del optimizer
    live, raw = sf.clip_grad_norm_(net, 1e9, plan(), return_raw=True)
    whole = {n: p.grad.full_tensor() if way == "FSDP2" else p.grad for n, p in net.named_parameters()}
    return float(live), float(raw), whole


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_frozen_gradients_are_zero_after_ranks_have_averaged(way: str) -> None:
    net = model()
    net(**batch_of(dataset()[:8])).loss.backward()
    for live, raw, grads in run_ranks(2, gradients_on_ranks, way):
        assert live == raw
        for name, p in net.named_parameters():
            mask = plan()[name].dense() if name in plan() else torch.zeros(p.shape, dtype=torch.bool)
            torch.testing.assert_close(grads[name], p.grad.masked_fill(mask, 0.0), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------- checkpoints and proof


def test_plan_and_proof_lie_beside_each_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    run.train()
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        proof = json.loads((folder / "freeze_proof.json").read_text())
        assert sf.FreezePlan.load(folder / "freeze_plan.safetensors") == plan()
        assert proof["step"] == step and proof["verified"] and proof["plan"] == plan().fingerprint
        assert proof["frozen_bytes_sha256"] == [sf.snapshot(model(), plan()).digest]
        assert proof["frozen_elements"] == sum(mask.frozen_count for mask in plan().values())
        state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        kept = sum(value.numel() for entry in state.values() for value in entry.values() if value.ndim)
        live = sum(p.numel() - (plan()[n].frozen_count if n in plan() else 0) for n, p in model().named_parameters())
        assert kept == 2 * live, "state is not packed"


class Drift(trainer_run.TrainerCallback):  # type: ignore[misc]
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            kwargs["model"].model.layers[1].self_attn.q_proj.weight[3, 4] += 1e-3


def test_drift_stops_the_save(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    run.add_callback(Drift())
    with pytest.raises(sf.FrozenDriftError, match=r"layers\.1\.self_attn\.q_proj\.weight.*row 3, column 4"):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def start(folder: Path, how: str, pause: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", trainer_run.__file__, str(folder), how],
        env={**os.environ, "STEP_SECONDS": str(pause), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(run: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    output, _ = run.communicate(timeout=180)
    assert run.returncode == 0, output[-4000:]
    found: dict[str, Any] = torch.load(folder / "end.pt", weights_only=True)
    return found


@pytest.mark.long
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(whole, "new")
    run = start(killed, "new", pause=0.4)
    for _ in range(1200):
        if (killed / "checkpoint-4" / "freeze_proof.json").exists() or run.poll() is not None:
            break
        time.sleep(0.1)
    time.sleep(0.6)  # in the middle of the next steps
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL and not (killed / "end.pt").exists()
    found, expected = finished(start(killed, "resume"), killed), finished(uninterrupted, whole)
    for name, tensor in expected["weights"].items():
        assert_same_bits(found["weights"][name], tensor, name)
    assert found["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for index, entry in expected["optimizer"]["state"].items():
        for key, value in entry.items():
            assert_same_bits(found["optimizer"]["state"][index][key], value, f"{key} of {index}")


def test_resuming_under_another_plan_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    other = sf.FreezePlan({**plan(), "model.embed_tokens.weight": sf.FreezeMask((64, 32), rows=[5, 6])})
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' was saved under another freeze plan"):
        trainer(tmp_path, freeze=other, max_steps=4).train(resume_from_checkpoint=True)


# --------------------------------------------------------------------------------------------------- what is refused


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    def run(freeze: sf.FreezePlan, net: torch.nn.Module, **options: Any) -> None:
        Trainer(
            model=net, args=arguments(tmp_path), train_dataset=dataset(),
            optimizer_cls_and_kwargs=masked_adamw(freeze, **LR), **options,
        ).train()  # fmt: skip

    with pytest.raises(ValueError, match=r"'lm_heed\.weight'.*nearest: 'lm_head\.weight'"):
        run(sf.FreezePlan({"lm_heed.weight": sf.FreezeMask((64, 32))}), model())
    frozen = model()
    frozen.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"up_proj\.weight' has requires_grad=False"):
        run(plan(), frozen)
    with pytest.raises(ValueError, match="another plan"):
        run(plan(), model(), callbacks=[FreezeCallback(OTHER)])
    net = model()
    with pytest.raises(ValueError, match="raw_norm needs an optimizer made by masked_adamw"):
        with_optimizer(tmp_path, net, guarded_sgd(net, plan()), raw_norm=True).train()


def test_a_trainer_with_groups_of_its_own_is_told() -> None:
    """As for ``embedding_learning_rate``: it makes the class it was given from groups, not from the model."""
    factory, options = masked_adamw(plan(), lr=1e-3)
    with pytest.raises(TypeError, match=r"masked_adamw: the trainer makes the optimizer of groups of its own, with \["):
        factory(groups_of(model()), **options)


def with_optimizer(folder: Path, net: Any, optimizer: torch.optim.Optimizer | None, **options: Any) -> Trainer:
    """A Trainer with a callback whose optimizer is someone else's business."""
    return Trainer(
        model=net, args=arguments(folder, max_steps=3), train_dataset=dataset(), optimizers=(optimizer, None),
        callbacks=[FreezeCallback(plan(), **options)],
    )  # fmt: skip


OTHER = sf.FreezePlan({"model.norm.weight": sf.FreezeMask((32,), rows=[0])})


def guarded_sgd(net: Any, *plans: sf.FreezePlan, remove: bool = False) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, weight_decay=0.1)
    for freeze in plans:
        watch = sf.guard(optimizer, freeze, net)
        if remove:
            watch.remove()
    return optimizer


DOES_NOT, OTHERWISE = "does not freeze.*masked_adamw.*guard", "freezes by another plan"
BESIDE: dict[str, tuple[Any, str]] = {
    "Trainer's own": (lambda net: None, DOES_NOT),
    "SGD": (lambda net: torch.optim.SGD(net.parameters(), lr=1e-2), DOES_NOT),
    "MaskedAdam without a plan": (lambda net: sf.MaskedAdam(net.named_parameters(), lr=1e-2), DOES_NOT),
    "a guard that was removed": (lambda net: guarded_sgd(net, plan(), remove=True), DOES_NOT),
    "MaskedAdam by another plan": (lambda net: sf.MaskedAdam(net.named_parameters(), freeze=OTHER), OTHERWISE),
    "guard by another plan": (lambda net: guarded_sgd(net, OTHER), OTHERWISE),
    "MaskedAdam": (lambda net: sf.MaskedAdam(net.named_parameters(), lr=1e-2, freeze=plan()), ""),
    "guard": (lambda net: guarded_sgd(net, plan()), ""),
    "two guards": (
        lambda net: guarded_sgd(
            net, *(sf.FreezePlan({n: mask for n, mask in plan().items() if ("embed" in n) == it}) for it in (0, 1))
        ),
        "",
    ),
    "one of two guards": (lambda net: guarded_sgd(net, plan(), OTHER), ""),
}


@pytest.mark.parametrize("how", BESIDE)
def test_a_callback_beside_an_optimizer_of_someone_else(how: str, tmp_path: Path) -> None:
    """One that does not freeze was found by the proof, at the last step of a run that had to be thrown away."""
    make, refused = BESIDE[how]
    net = model()
    proof = sf.snapshot(net, plan())
    run = with_optimizer(tmp_path, net, make(net))
    if refused:
        with pytest.raises(ValueError, match=f"FreezeCallback: .*{refused}"):
            run.train()
        assert run.state.global_step == 0
    else:
        run.train()
        proof.verify(net)


def test_a_callback_may_prove_what_does_not_train_anyway(tmp_path: Path) -> None:
    """As the base of a model of which only adapters train."""
    net = model()
    for name in plan():
        net.get_parameter(name).requires_grad_(False)
    run = with_optimizer(tmp_path, net, None)
    run.train()
    assert run.state.global_step == 3


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    """``optimizers=`` takes ours too; without `masked_adamw`, Trainer clips by the raw norm."""
    net = model()
    proof = sf.snapshot(net, plan())
    run = with_optimizer(tmp_path, net, sf.MaskedAdamW(groups_of(net), freeze=plan(), **LR))
    run.train()
    proof.verify(run.model)


# ------------------------------------------------------------------------------------------------------------- TRL


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, trainer_run.VOCABULARY)}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def trl_run(kind: str, folder: Path, net: Any, **options: Any) -> Any:
    import trl
    from datasets import Dataset

    rows: dict[str, list[str]] = {
        "SFT": {"text": ["w3 w4 w5 w6", "w7 w8 w9 w10", "w4 w4 w4 w5", "w30 w31 w32"]},
        "DPO": {"prompt": ["w3 w4", "w5 w6"], "chosen": [" w7 w8", " w9"], "rejected": [" w10", " w11 w12"]},
    }[kind]  # type: ignore[assignment]
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, report_to=[], use_cpu=True, bf16=False,
        save_strategy="steps", save_steps=3, logging_steps=1, disable_tqdm=True, max_grad_norm=0.1, max_length=16,
        learning_rate=1e-2,
    )  # fmt: skip
    return getattr(trl, f"{kind}Trainer")(
        model=net, args=config, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer(),
        callbacks=[FreezeCallback(plan(), raw_norm=True)],
        **{name: make(config) if name != "peft_config" else make for name, make in options.items()},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl(kind: str, tmp_path: Path) -> None:
    net = model()
    ours: dict[str, Any] = (
        {"optimizer_cls_and_kwargs": lambda config: masked_adamw(plan(), config)}
        if kind == "SFT"
        else {
            "optimizers": lambda config: (build_masked_adamw(net, plan(), config), None),
            "ref_model": lambda _: model(),
        }
    )
    run = trl_run(kind, tmp_path, net, **ours)
    begin = copies(run.model)
    run.train()
    sf.snapshot(begin, plan()).verify(run.model)
    assert any(not torch.equal(p, begin[name]) for name, p in run.model.named_parameters())
    assert (tmp_path / "checkpoint-3" / "freeze_proof.json").exists()
    assert logged(run, 1.01)


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_makes_adapters_and_the_plan_is_carried_to_them(kind: str, tmp_path: Path) -> None:
    """The base's plan is all that is given; what the checkpoint merges to has the base's frozen bytes."""
    from peft import LoraConfig, PeftModel

    lora = LoraConfig(r=4, target_modules=["up_proj", "down_proj", "q_proj", "embed_tokens"])
    ours: dict[str, Any] = {"peft_config": lora}
    if kind == "SFT":
        ours["optimizer_cls_and_kwargs"] = lambda config: masked_adamw(plan(), config, adapt=True)
    run = trl_run(kind, tmp_path, model(), **ours)
    if kind == "DPO":  # takes no class of optimizer, but lets one be given once it has made the adapters
        run.optimizer = build_masked_adamw(run.model, plan(), run.args, adapt=True)
    run.train()
    assert logged(run, 1.001)
    saved = tmp_path / "checkpoint-3"
    assert sf.FreezePlan.load(saved / "base_plan.safetensors") == plan()
    tuned = PeftModel.from_pretrained(model(), saved)
    assert sf.FreezePlan.load(saved / "freeze_plan.safetensors").keys() <= dict(tuned.named_parameters()).keys()
    merged = sf.merge_(tuned, plan())
    sf.snapshot(model(), plan()).verify(merged)
    moved = [name for name, p in model().named_parameters() if not torch.equal(p, merged.get_parameter(name))]
    assert set(plan()) <= set(moved)


def test_adapters_of_another_training_are_refused(tmp_path: Path) -> None:
    """Loaded after the optimizer was made, they are not at zero where the plan freezes."""
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(model(), LoraConfig(r=4, target_modules=["up_proj"]))
    up = sf.FreezePlan({name: mask for name, mask in plan().items() if "up_proj" in name})
    run = Trainer(
        model=net, args=arguments(tmp_path), train_dataset=dataset(),
        optimizers=(build_masked_adamw(net, up, lr=1e-2, adapt=True), None), callbacks=[FreezeCallback(up)],
    )  # fmt: skip
    with torch.no_grad():
        net.get_parameter("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight")[3, 1] = 0.5
    with pytest.raises(ValueError, match=r"lora_B.default.weight' is 0.5 in row 3, column 1, expected zero"):
        run.train()
