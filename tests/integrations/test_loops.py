"""Loops of others: accelerate, Lightning, GradScaler, compiled models, PEFT, Adam's helpers in torch. The real ones."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import assert_same_bits
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader
from trainer_run import VOCABULARY, model, plan

import safefreeze_kernels as sf

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS: Final[dict[str, Any]] = {"lr": 1e-2, "weight_decay": 0.1}
UP: Final = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Any:
    """accelerate remembers its first configuration, for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def batches(count: int = 6) -> list[Tensor]:
    tokens = torch.randint(0, VOCABULARY, (count, 2, 8), generator=torch.Generator().manual_seed(1))
    return list(tokens)


def loss_of(net: torch.nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = net(input_ids=batch, labels=batch).loss
    return loss


def optimizer_of(net: torch.nn.Module, **options: Any) -> sf.MaskedAdamW:
    return sf.MaskedAdamW(net.named_parameters(), **{**OPTIONS, "freeze": plan(), **options})


def train(
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: list[Tensor],
    *,
    clip: bool = True,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    clips_inside: sf.MaskedAdamW | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    for batch in steps:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = loss_of(net, batch)
        backward(loss)
        if clip:
            sf.clip_grad_norm_(net, 0.1, plan(), optimizer=clips_inside)
        optimizer.step()
        optimizer.zero_grad()


def plain(steps: list[Tensor], dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The plain loop that others are compared with."""
    net = model()
    train(net, optimizer_of(net), steps, dtype=dtype)
    return net


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    named = dict(expected.named_parameters())
    for name, p in found.named_parameters():
        name = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "").removeprefix("net.")
        assert_same_bits(p.detach(), named[name].detach(), name)


def poison(net: torch.nn.Module, row: int) -> None:
    """An inf in one row of a gradient, at every backward pass."""

    def hook(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[row] = float("inf")
        return grad

    dict(net.named_parameters())[UP].register_hook(hook)


FROZEN_ROW, LIVE_ROW = 0, 1


# ------------------------------------------------------------------------------------------------------- accelerate


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_is_the_plain_loop(precision: str) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    net = model()
    net, optimizer, loader = accelerator.prepare(net, optimizer_of(net), DataLoader(torch.cat(batches()), batch_size=2))
    train(net, optimizer, loader, backward=accelerator.backward)
    expected = plain(batches(), torch.bfloat16 if precision == "bf16" else None)
    assert_same_weights(accelerator.unwrap_model(net), expected)


def test_accelerate_clips_by_the_raw_norm_and_ours_does_not() -> None:
    accelerator = Accelerator(cpu=True)
    net = model()
    net, optimizer = accelerator.prepare(net, optimizer_of(net))
    accelerator.backward(loss_of(net, batches()[0]))
    norms = sf.clip_grad_norm_(net, 1e9, plan(), return_raw=True)
    assert float(accelerator.clip_grad_norm_(net.parameters(), 1e9)) == pytest.approx(float(norms.raw), rel=1e-5)
    assert norms.raw > norms.live * 1.05
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer.*accelerated\.optimizer"):
        sf.clip_grad_norm_(net, 1.0, plan(), optimizer=optimizer)
    sf.clip_grad_norm_(net, 1.0, plan(), optimizer=optimizer.optimizer)
    optimizer.step()


def test_accelerate_accumulates() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    net = model()
    net, optimizer = accelerator.prepare(net, optimizer_of(net))
    for batch in batches():
        with accelerator.accumulate(net):
            accelerator.backward(loss_of(net, batch))
            if accelerator.sync_gradients:
                sf.clip_grad_norm_(net, 0.1, plan())
            optimizer.step()
            optimizer.zero_grad()
    expected = model()
    stepper = optimizer_of(expected)
    for number, batch in enumerate(batches()):
        (loss_of(expected, batch) / 3).backward()
        if number % 3 == 2:
            sf.clip_grad_norm_(expected, 0.1, plan())
            stepper.step()
            stepper.zero_grad()
    assert_same_weights(net, expected)


def test_accelerate_saves_and_resumes(tmp_path: Path) -> None:
    """The state dict goes around at ``prepare`` and through files: packed all the way."""

    def run(steps: list[Tensor], load: bool = False, save: bool = False) -> tuple[torch.nn.Module, Any]:
        accelerator = Accelerator(cpu=True)
        net = model()
        net, optimizer = accelerator.prepare(net, optimizer_of(net))
        if load:
            accelerator.load_state(str(tmp_path))
        train(net, optimizer, steps, backward=accelerator.backward, clips_inside=optimizer.optimizer)
        if save:
            accelerator.save_state(str(tmp_path))
        return net, optimizer.optimizer

    run(batches()[:3], save=True)
    state = torch.load(tmp_path / "optimizer.bin", weights_only=True)["state"]
    assert {tuple(entry["exp_avg"].shape) for entry in state.values()} >= {(32, 32), (24, 32)}
    assert all(entry["exp_avg"].shape != (48, 32) or index != 0 for index, entry in state.items())
    found, optimizer = run(batches()[3:], load=True)
    expected, whole = run(batches())
    assert_same_weights(found, expected)
    for p, q in zip(optimizer.state.values(), whole.state.values(), strict=True):
        assert_same_bits(p["exp_avg_sq"], q["exp_avg_sq"], "exp_avg_sq")
    # prepared when it has state already
    prepared = Accelerator(cpu=True).prepare(optimizer)
    assert {tuple(entry["exp_avg"].shape) for entry in prepared.optimizer.state.values()} >= {(32, 32), (24, 32)}


# -------------------------------------------------------------------------------------------------------- Lightning


class Module(lightning.LightningModule):
    def __init__(self, clip: bool = True, **options: Any) -> None:
        super().__init__()
        self.net, self.clip, self.options = model(), clip, options

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> sf.MaskedAdamW:
        inside = sf.FreezePlan({f"net.{name}": mask for name, mask in plan().items()})
        return sf.MaskedAdamW(self.named_parameters(), **{**OPTIONS, "freeze": inside, **self.options})

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.clip:
            sf.clip_grad_norm_(self.net, 0.1, plan())
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


def fit(
    module: Module, steps: int, folder: Path, resume: Path | None = None, epoch: int = 6, **options: Any
) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.cat(batches(epoch)), batch_size=2), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_is_the_plain_loop(precision: str, tmp_path: Path) -> None:
    module = Module()
    fit(module, 6, tmp_path, precision=precision)
    assert_same_weights(module.net, plain(batches(), torch.bfloat16 if precision == "bf16-mixed" else None))


def test_lightning_accumulates(tmp_path: Path) -> None:
    module = Module()
    proof = sf.snapshot(module.net, plan())
    fit(module, 2, tmp_path, accumulate_grad_batches=3)
    proof.verify(module.net)
    assert {float(entry["step"]) for entry in module.optimizers().optimizer.state.values()} == {2.0}


def test_lightning_clips_by_the_raw_norm_and_freezes_all_the_same(tmp_path: Path) -> None:
    module = Module(clip=False)
    proof = sf.snapshot(module.net, plan())
    fit(module, 3, tmp_path, gradient_clip_val=0.1)
    proof.verify(module.net)


def test_lightning_resumes(tmp_path: Path) -> None:
    """On one batch: where it was in an epoch, Lightning does not restore for a plain DataLoader."""
    first = Module()
    trainer = fit(first, 3, tmp_path, epoch=1)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    resumed, whole = Module(), Module()
    fit(resumed, 6, tmp_path, resume=tmp_path / "three.ckpt", epoch=1)
    fit(whole, 6, tmp_path, epoch=1)
    assert_same_weights(resumed.net, whole.net)


def test_lightning_refuses_its_own_clipping_where_the_step_unscales(tmp_path: Path) -> None:
    """As with torch's fused optimizers: a documented limit of Lightning under float16 AMP."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    module = Module(clip=False, fused=True)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping because it performs unscaling"):
        plugin.clip_gradients(module.configure_optimizers(), 0.1)


# ------------------------------------------------------------------------------------------------------- GradScaler


def scaled(fused: bool, steps: list[Tensor], net: torch.nn.Module, *, zero: bool = True) -> tuple[Any, list[float]]:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    optimizer = optimizer_of(net, fused=fused)
    scales = []
    for batch in steps:
        scaler.scale(loss_of(net, batch)).backward()
        if zero:
            sf.zero_frozen_grads_(net, plan())
        if not fused:
            scaler.unscale_(optimizer)
            sf.clip_grad_norm_(net, 0.1, plan())
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
    return optimizer, scales


def test_grad_scaler_is_the_plain_loop() -> None:
    net = model()
    scaled(False, batches(), net)
    assert_same_weights(net, plain(batches()))  # a scale that is a power of two changes no bit


def test_grad_scaler_fused_is_the_plain_step() -> None:
    net, expected = model(), model()
    scaled(True, batches(), net)
    train(expected, optimizer_of(expected), batches(), clip=False)
    assert_same_weights(net, expected)


@pytest.mark.parametrize("fused", [False, True])
def test_an_inf_skips_the_step_only_where_it_is_live(fused: bool) -> None:
    for row, zero, taken in ((LIVE_ROW, True, False), (FROZEN_ROW, True, True), (FROZEN_ROW, False, False)):
        net = model()
        poison(net, row)
        start = copy.deepcopy(net)
        _, scales = scaled(fused, batches()[:1], net, zero=zero)
        assert scales == [1024.0 if taken else 512.0]
        moved = any(not torch.equal(p, q) for p, q in zip(net.parameters(), start.parameters(), strict=True))
        assert moved == taken
        sf.snapshot(start, plan()).verify(net)


# ---------------------------------------------------------------------------------------------------- torch's wrappers


def compiled(net: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(net, backend="aot_eager")


def in_data_parallel(net: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.DataParallel(net)


def recomputing(net: torch.nn.Module) -> torch.nn.Module:
    for i, layer in enumerate(net.model.layers):
        net.model.layers[i] = checkpoint_wrapper(layer)
    return net


@pytest.mark.parametrize("wrap", [compiled, in_data_parallel, recomputing])
def test_wrapped_models_take_plans_of_the_bare_one(wrap: Callable[[Any], torch.nn.Module]) -> None:
    net = wrap(model())
    assert UP not in dict(net.named_parameters())
    proof = sf.snapshot(net, plan())
    train(net, optimizer_of(net), batches()[:3])
    proof.verify(net)
    expected = plain(batches()[:3])
    for (name, p), q in zip(net.named_parameters(), expected.parameters(), strict=True):
        # a compiled backward pass may sum in another order
        torch.testing.assert_close(p, q, rtol=0, atol=3 * 1e-2 * 2**-10, msg=lambda m, n=name: f"{n}: {m}")


def test_averaged_models_and_ema() -> None:
    net = model()
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = optimizer_of(net)
    for batch in batches()[:3]:
        train(net, optimizer, [batch], clip=False)
        average.update_parameters(net)
    # an average of equal values is that value, to a rounding; the trained model is exact
    frozen = plan()[UP].dense()
    torch.testing.assert_close(average.module.state_dict()[UP][frozen], net.state_dict()[UP][frozen])


# ------------------------------------------------------------------------------------------------------------- PEFT


def adapted(**options: Any) -> Any:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **options)
    torch.manual_seed(2)
    return peft.get_peft_model(model(), config)


def test_a_plan_that_names_what_lora_froze_is_refused() -> None:
    net = adapted()
    for name in (UP, "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"):
        for operation in (optimizer_of, lambda n, freeze: sf.guard(torch.optim.SGD(n.parameters()), freeze, n)):
            with pytest.raises(ValueError, match=r"up_proj\.base_layer\.weight' has requires_grad=False.*not train"):
                operation(net, freeze=sf.FreezePlan({name: plan()[UP]}))
    with pytest.raises(ValueError, match="not among the"):
        sf.MaskedAdamW(
            [(n, p) for n, p in net.named_parameters() if p.requires_grad], freeze=sf.FreezePlan({UP: plan()[UP]})
        )


def test_modules_trained_whole_freeze_beside_lora() -> None:
    net = adapted(modules_to_save=["down_proj"])
    freeze = sf.FreezePlan({"model.layers.0.mlp.down_proj.weight": sf.FreezeMask((32, 48), cols=range(0, 48, 2))})
    optimizer = sf.MaskedAdamW(((n, p) for n, p in net.named_parameters() if p.requires_grad), freeze=freeze, **OPTIONS)
    proof = sf.snapshot(net, freeze)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train(net, optimizer, batches()[:3], clip=False)
    proof.verify(net)
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in net.named_parameters() if p.requires_grad}
    proof.verify(net.merge_and_unload())
