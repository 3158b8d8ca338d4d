"""What a training step costs on the reader's own model and batch: masked against stock AdamW, phase by phase."""

from __future__ import annotations

import gc
import math
import platform
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from ..grads.clip import StepsGradients, clip_grad_norm_
from ..kernels.backend import choose_backend
from ..kernels.operands import dtype_word
from ..model.sharding import is_sharded
from ..optim.adam import MaskedAdamW
from ..plan.binding import bind, named_tensors
from ..plan.plan import FreezePlan
from ..proof.snapshot import Snapshot, snapshot
from .info import device_name
from .memory import peak, restart_peak, state_tensors
from .result import StepCost, StepProfile
from .timing import Clock, turns

Loss = Callable[[torch.nn.Module, Any], Tensor]
Build = Callable[[list[tuple[str, Any]]], Optimizer]
Tick = Callable[[], object]

_WHAT: Final = "profile_step"


# ------------------------------------------------------------------------------------------------------ profiling


def profile_step(
    model: torch.nn.Module,
    batch: Any,
    plan: FreezePlan,
    *,
    loss: Loss | None = None,
    optimizer: Build | None = None,
    lr: float = 1e-4,
    weight_decay: float = 0.1,
    max_norm: float | None = 1.0,
    fuse_clipping: bool = True,
    steps: int = 10,
    warmup: int = 2,
    accumulation: int = 1,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> StepProfile:
    """Time a training step under the plan, and one of stock AdamW with nothing frozen, in turns on the same model.

    In each round both take a step, back to back and in alternating order, from the same weights and random numbers:
    what drifts in the machine reaches both alike. Frozen bytes are verified before the timing and after the last masked
    step; no times are reported if one changed. On a GPU phases are timed by events, and nothing waits between them.

    The model is put back exactly, after errors too: weights, buffers, gradients, ``requires_grad``, training mode, and
    the random numbers of torch, NumPy and Python. Beside what training takes, that needs memory for a copy of the
    trainable weights and of the buffers on their device, for the frozen bytes on the host, and for the state of both
    optimizers at once; gradients the model has stay where they are. Peak memory is taken before, from each optimizer
    alone; that resets the peak statistics of the process, or of torch on a GPU. In traces of `torch.profiler` phases
    are ranges named ``safefreeze: forward`` and so on.

    Args:
        model: on the CPU or on one CUDA device, as it is trained (compiled, too); runs in training mode.
        batch: what ``loss`` takes. Without ``loss`` a mapping of arguments, labels included, on the model's device.
        plan: what is frozen.
        loss: ``loss(model, batch)`` returns the scalar to minimize. Default: ``model(**batch).loss``.
        optimizer: builds the masked optimizer from the trainable ``model.named_parameters()``, for example
            ``lambda named: sf.MaskedAdamW(named, lr=1e-4, state_dtype=torch.bfloat16, freeze=plan)``. Default:
            `MaskedAdamW` with ``lr`` and ``weight_decay``, as stock AdamW has them.
        max_norm: clip to this norm; None: do not clip.
        fuse_clipping: call `clip_grad_norm_` with ``optimizer=`` where the optimizer can take it: the factor is then
            applied in the step, and only the sum "clip + step" compares with stock's.
        steps: timed steps of each; an interval takes 6.
        warmup: steps of each before, beside the two whose memory is measured.
        accumulation: micro-batches per step; each is ``batch``, its loss divided by their number.
        autocast: forward under `torch.autocast` with this dtype. There is no loss scaling.
        progress: show a progress bar (tqdm).

    Raises:
        ValueError, TypeError: an argument out of range, a plan that does not fit, a loss that is no finite scalar with
            a gradient.
        FrozenDriftError: a frozen byte changed.
    """
    _check_arguments(model, plan, lr, max_norm, autocast, steps=steps, warmup=warmup, accumulation=accumulation)
    device = _checked_device(model)
    if loss is None:
        _check_batch(batch, device)
    elif not callable(loss):
        raise TypeError(f"{_WHAT}: loss is a {type(loss).__name__}, expected a callable (model, batch) -> scalar")
    bound = bind(plan, named_tensors(model), operation=_WHAT)
    params = [p for p in model.parameters() if p.requires_grad]
    adamw: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}

    # the plan may use any name of a tied tensor; a caller's optimizer gets what it would in training
    every_name = named_tensors(model) if optimizer is None else model.named_parameters()
    named = [(name, p) for name, p in every_name if p.requires_grad]
    build = optimizer or (lambda named: MaskedAdamW(named, **adamw, freeze=plan))

    def clip_live(stepping: Optimizer) -> object:
        fused = stepping if fuse_clipping and isinstance(stepping, StepsGradients) else None
        return clip_grad_norm_(model, max_norm or 0.0, plan, optimizer=fused)

    def clip_stock(_: Optimizer) -> object:
        return torch.nn.utils.clip_grad_norm_(params, max_norm or 0.0)

    clips = (clip_live, clip_stock) if max_norm is not None else (None, None)
    masked = _Contender(lambda: build(named), clips[0])
    stock = _Contender(lambda: torch.optim.AdamW(params, **adamw, fused=True), clips[1], "torch AdamW, fused")
    with _kept(model, device) as rewind, _bar(progress, 2 * (2 + warmup + steps) + 1) as tick:
        work = _Work(model, batch, loss or _own_loss, accumulation, device, autocast, rewind)
        gradient_bytes = work.try_out(params)
        tick()
        proof = snapshot(model, plan)
        for contender in (masked, stock):
            contender.peak_bytes = _peak_of(contender, work, tick)
            if contender is masked:
                proof.verify(model)
        _time_in_turns(masked, stock, work, proof, warmup, steps, tick)
        fused = fuse_clipping and max_norm is not None and isinstance(masked.optimizer, StepsGradients)
        costs = masked.cost(gradient_bytes), stock.cost(gradient_bytes)
    total = sum(p.numel() for p in params)
    return StepProfile(
        masked=costs[0],
        stock=costs[1],
        parameters=total,
        frozen_fraction=sum(entry.mask.frozen_count for entry in bound) / total,
        peak_is="" if masked.peak_bytes is None else _PEAK_IS[device.type],
        settings={
            "plan": plan.fingerprint[:12], "warmup": warmup, "accumulation": accumulation, "max_norm": max_norm,
            "fused clipping": fused, **adamw, "autocast": None if autocast is None else dtype_word(autocast),
        },
        machine={
            "weights": "+".join(sorted({dtype_word(p.dtype) for p in params})),
            "backend": choose_backend("auto", device, _WHAT).name if optimizer is None else None,
            "device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )  # fmt: skip


_PEAK_IS: Final = {
    "cuda": "most memory allocated on the GPU beyond weights and buffers",
    "cpu": "growth of the process's resident memory, to within its allocator's reserves",
}


def _time_in_turns(
    masked: _Contender, stock: _Contender, work: _Work, proof: Snapshot, warmup: int, steps: int, tick: Tick
) -> None:
    """Rounds of a step of each, in alternating order. The last masked step is verified."""
    work.rewind()
    for contender in (masked, stock):
        contender.start()
    for number, contender in turns((masked, stock), steps, warmup):
        times = work.step(contender)
        if number >= 0:
            for phase, spent in times.items():
                contender.times_ms.setdefault(phase, []).append(spent)
        if contender is masked and number == steps - 1:
            proof.verify(work.model)  # now: stock's step moves frozen weights
        tick()


def _peak_of(contender: _Contender, work: _Work, tick: Tick) -> int | None:
    """Most bytes in use during two steps of a new optimizer, beyond those before; the first step makes the state.

    On the CPU this is resident memory. None where the system does not tell it.
    """
    gc.collect()
    work.rewind()
    contender.start()
    before = restart_peak(work.device)
    for _ in range(2):
        work.step(contender)
        tick()
    most = None if before is None else peak(work.device) - before
    contender.optimizer = None
    return most


# --------------------------------------------------------------------------------------------------------- checks


def _refuse(wrong: object, message: str, error: type[Exception] = ValueError) -> None:
    if wrong:
        raise error(f"{_WHAT}: {message}")


def _check_arguments(
    model: Any, plan: Any, lr: float, max_norm: float | None, autocast: torch.dtype | None, **counts: int
) -> None:
    for word, value, kind in (("model", model, torch.nn.Module), ("plan", plan, FreezePlan)):
        message = f"{word} is a {type(value).__name__}, expected a {kind.__name__}"
        _refuse(not isinstance(value, kind), message, TypeError)
    for word, count in counts.items():
        least = 0 if word == "warmup" else 1
        wrong = not isinstance(count, int) or count < least
        _refuse(wrong, f"{word} is {count!r}, expected a whole number from {least} on")
    _refuse(not 0 < lr < math.inf, f"lr is {lr}, expected a learning rate above 0; the weights are put back afterwards")
    wrong = max_norm is not None and not max_norm > 0
    _refuse(wrong, f"max_norm is {max_norm}, expected a number above 0, or None not to clip")
    wrong = autocast not in (None, torch.bfloat16, torch.float16)
    _refuse(wrong, f"autocast is {autocast}, expected torch.bfloat16, torch.float16 or None")


def _checked_device(model: torch.nn.Module) -> torch.device:
    """The one device of the trainable parameters."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _refuse(not trainable, "no parameter of the model has requires_grad=True, expected some to train")
    for name, p in trainable.items():
        _refuse(is_sharded(p), f"{name!r} is sharded (DTensor), expected a whole model; profile it on one device")
    devices = sorted({str(p.device) for p in trainable.values()})
    _refuse(len(devices) > 1, f"the model's parameters are on {', '.join(devices)}, expected one device")
    device = next(iter(trainable.values())).device
    wrong = device.type not in _PEAK_IS
    _refuse(wrong, f"the model is on {device}, expected cpu or cuda: only there phases can be timed")
    return device


def _check_batch(batch: Any, device: torch.device) -> None:
    remedy = "for another call pass loss=, a callable (model, batch) -> scalar"
    message = f"batch is a {type(batch).__name__}, expected a mapping for model(**batch).loss; {remedy}"
    _refuse(not isinstance(batch, Mapping), message, TypeError)
    for name, value in batch.items():
        if isinstance(value, Tensor):
            message = f"batch[{name!r}] is on {value.device}, expected {device}, where the model is"
            _refuse(value.device != device, message)


def _own_loss(model: torch.nn.Module, batch: Any) -> Tensor:
    output = model(**batch)
    found: Any = getattr(output, "loss", None)
    remedy = "put labels into the batch, or pass loss=, a callable (model, batch) -> scalar"
    message = f"model(**batch) returned a {type(output).__name__} without a loss, expected one; {remedy}"
    _refuse(found is None, message)
    return found  # type: ignore[no-any-return]


# ----------------------------------------------------------------------------------------------------- contenders


@dataclass
class _Contender:
    """An optimizer, how it is built and clipped for, and what was measured of it."""

    build: Callable[[], Optimizer]
    clip: Callable[[Optimizer], object] | None
    name: str = ""  # default: the optimizer's type
    optimizer: Any = None
    times_ms: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None

    def start(self) -> None:
        """Build the optimizer, without state."""
        self.optimizer = self.build()
        kind = type(self.optimizer).__name__
        wrong = not isinstance(self.optimizer, Optimizer)
        _refuse(wrong, f"optimizer= returned a {kind}, expected a torch.optim.Optimizer", TypeError)
        self.name = self.name or kind

    def cost(self, gradient_bytes: int) -> StepCost:
        state = state_tensors(self.optimizer)
        return StepCost(
            name=self.name,
            times_ms={phase: tuple(times) for phase, times in self.times_ms.items()},
            state_bytes=sum(value.nbytes for value in state),
            state_dtypes="+".join(sorted({dtype_word(value.dtype) for value in state if value.dim()})),
            gradient_bytes=gradient_bytes,
            peak_bytes=self.peak_bytes,
        )


@dataclass(frozen=True)
class _Work:
    """A training step of any contender."""

    model: torch.nn.Module
    batch: Any
    loss: Loss
    accumulation: int
    device: torch.device
    autocast: torch.dtype | None
    rewind: Callable[[], None]

    def _loss(self) -> Tensor:
        with nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast):
            return self.loss(self.model, self.batch)

    def try_out(self, params: Sequence[Tensor]) -> int:
        """Check the loss and that it reaches the parameters. Returns the bytes of the gradients."""
        self.rewind()
        found = self._loss()
        kind = type(found).__name__
        _refuse(not isinstance(found, Tensor), f"the loss is a {kind}, expected a scalar tensor", TypeError)
        shape = tuple(found.shape)
        _refuse(found.numel() != 1, f"the loss has shape {shape}, expected a scalar; take its mean")
        wrong = not found.requires_grad
        _refuse(wrong, "the loss has no gradient, expected one that depends on trainable parameters")
        wrong = not math.isfinite(value := found.item())
        _refuse(wrong, f"the loss is {value}, expected a finite number; check the batch and the dtype")
        found.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in params if p.grad is not None]
        _refuse(not grads, "no trainable parameter got a gradient, expected the loss to depend on some")
        for p in params:
            p.grad = None
        return sum(grad.nbytes for grad in grads)

    def step(self, contender: _Contender) -> dict[str, float]:
        """One step from the kept weights. Returns milliseconds per phase."""
        self.rewind()
        clock = Clock(self.device)
        with record_function(f"safefreeze: {contender.name}"):
            for _ in range(self.accumulation):
                with clock.phase("forward"):
                    found = self._loss() / self.accumulation if self.accumulation > 1 else self._loss()
                with clock.phase("backward"):
                    found.backward()  # type: ignore[no-untyped-call]
                del found
            if contender.clip is not None:
                with clock.phase("clip"):
                    contender.clip(contender.optimizer)
            with clock.phase("step"):
                contender.optimizer.step()
            with clock.phase("zero_grad"):
                contender.optimizer.zero_grad()
        return clock.read()


# --------------------------------------------------------------------------------------------------- putting back


@contextmanager
def _kept(model: torch.nn.Module, device: torch.device) -> Iterator[Callable[[], None]]:
    """The model may train inside, on its device; afterwards it and the random generators are exactly as before.

    Yields what makes weights, buffers and random numbers as they were. Gradients are the tensors they were afterwards.
    """
    params = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    values = [(p, p.detach().clone()) for p, _, trains in params if trains]
    modes = [(module, module.training) for module in model.modules()]
    # by storage, since a buffer may overlap itself, or be replaced by another
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    storages = [b.untyped_storage() for _, own in buffers for b in own.values() if b is not None]
    contents = [(storage, storage.clone()) for storage in storages]  # type: ignore[no-untyped-call]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @torch.no_grad()
    def rewind() -> None:
        for p, value in values:
            p.copy_(value)
        for module, own in buffers:
            module._buffers.update(own)
        for storage, content in contents:
            storage.copy_(content)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)

    try:
        model.train()
        for p, _ in values:
            p.grad = None
        with torch.enable_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield rewind
    finally:
        rewind()
        for p, grad, trains in params:
            p.grad = grad
            p.requires_grad_(trains)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Tick]:
    """Yields what to call after each of ``total`` steps."""
    if not shown:
        yield lambda: None
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc="profiling", unit="step") as bar:
        yield bar.update
