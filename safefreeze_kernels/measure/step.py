"""What a training step costs on the reader's own model and batch: masked against stock AdamW, phase by phase."""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from ..grads.clip import StepsGradients, clip_grad_norm_
from ..kernels.backend import choose_backend
from ..model.sharding import is_sharded
from ..optim.adam import MaskedAdamW
from ..plan.binding import bind, named_tensors
from ..plan.plan import FreezePlan
from ..proof.snapshot import Snapshot, snapshot
from .result import _WHOLE, StepCost, StepProfile, _word

Loss = Callable[[torch.nn.Module, Any], Tensor]
Build = Callable[[list[tuple[str, Any]]], Optimizer]

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

    def build_masked() -> Optimizer:
        return MaskedAdamW(named, **adamw, freeze=plan) if optimizer is None else optimizer(named)

    def clip_live(stepping: Optimizer) -> object:
        fused = stepping if fuse_clipping and isinstance(stepping, StepsGradients) else None
        return clip_grad_norm_(model, max_norm or 0.0, plan, optimizer=fused)

    def clip_stock(_: Optimizer) -> object:
        return torch.nn.utils.clip_grad_norm_(params, max_norm or 0.0)

    clips = (clip_live, clip_stock) if max_norm is not None else (None, None)
    masked = _Contender(build_masked, clips[0])
    stock = _Contender(lambda: torch.optim.AdamW(params, **adamw, fused=True), clips[1], "torch AdamW, fused")
    with _kept(model, device) as kept, _bar(progress, 2 * (2 + warmup + steps) + 1) as tick:
        work = _Work(model, batch, loss or _own_loss, accumulation, device, autocast, kept)
        gradient_bytes = work.try_out(params)
        tick()
        proof = snapshot(model, plan)
        masked.peak_bytes = _peak_of(masked, work, proof, tick)
        stock.peak_bytes = _peak_of(stock, work, None, tick)
        _time_in_turns(masked, stock, work, proof, warmup, steps, tick)
        fused = fuse_clipping and max_norm is not None and isinstance(masked.optimizer, StepsGradients)
        costs = masked.cost(gradient_bytes), stock.cost(gradient_bytes)
    total = sum(p.numel() for p in params)
    return StepProfile(
        masked=costs[0],
        stock=costs[1],
        parameters=total,
        frozen_fraction=sum(entry.mask.frozen_count for entry in bound) / total,
        peak_is=_peak_is(device) if masked.peak_bytes is not None else "",
        settings={
            "plan": plan.fingerprint[:12], "warmup": warmup, "accumulation": accumulation, "max_norm": max_norm,
            "fused clipping": fused, **adamw, "autocast": None if autocast is None else _word(autocast),
        },
        machine={
            "weights": "+".join(sorted({_word(p.dtype) for p in params})),
            "backend": choose_backend("auto", device, _WHAT).name if optimizer is None else None,
            "device": _device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )  # fmt: skip


def _time_in_turns(
    masked: _Contender,
    stock: _Contender,
    work: _Work,
    proof: Snapshot,
    warmup: int,
    steps: int,
    tick: Callable[[], object],
) -> None:
    """Rounds of a step of each, in alternating order. The last masked step is verified."""
    pair = (masked, stock)
    work.kept.rewind_()
    for contender in pair:
        contender.start()
    for number in range(-warmup, steps):
        for contender in pair if number % 2 == 0 else reversed(pair):
            times = work.step(contender)
            if number >= 0:
                for phase, spent in times.items():
                    contender.times_ms.setdefault(phase, []).append(spent)
            if contender is masked and number == steps - 1:
                proof.verify(work.model)  # now: stock's step moves frozen weights
            tick()


def _check_arguments(
    model: Any, plan: Any, lr: float, max_norm: float | None, autocast: torch.dtype | None, **counts: int
) -> None:
    for word, value, kind in (("model", model, torch.nn.Module), ("plan", plan, FreezePlan)):
        if not isinstance(value, kind):
            raise TypeError(f"{_WHAT}: {word} is a {type(value).__name__}, expected a {kind.__name__}")
    for word, count in counts.items():
        least = 0 if word == "warmup" else 1
        if not isinstance(count, int) or count < least:
            raise ValueError(f"{_WHAT}: {word} is {count!r}, expected a whole number from {least} on")
    if not 0 < lr < math.inf:
        raise ValueError(f"{_WHAT}: lr is {lr}, expected a learning rate above 0; the weights are put back afterwards")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"{_WHAT}: max_norm is {max_norm}, expected a number above 0, or None not to clip")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"{_WHAT}: autocast is {autocast}, expected torch.bfloat16, torch.float16 or None")


def _checked_device(model: torch.nn.Module) -> torch.device:
    """The one device of the trainable parameters."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(f"{_WHAT}: no parameter of the model has requires_grad=True, expected some to train")
    for name, p in trainable:
        if is_sharded(p):
            raise ValueError(
                f"{_WHAT}: {name!r} is sharded (DTensor), expected a whole model; profile it on one device"
            )
    devices = sorted({str(p.device) for _, p in trainable})
    if len(devices) > 1:
        raise ValueError(f"{_WHAT}: the model's parameters are on {', '.join(devices)}, expected one device")
    device = trainable[0][1].device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{_WHAT}: the model is on {device}, expected cpu or cuda: only there phases can be timed")
    return device


def _check_batch(batch: Any, device: torch.device) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"{_WHAT}: batch is a {type(batch).__name__}, expected a mapping for model(**batch).loss; for another call "
            "pass loss=, a callable (model, batch) -> scalar"
        )
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(f"{_WHAT}: batch[{name!r}] is on {value.device}, expected {device}, where the model is")


def _own_loss(model: torch.nn.Module, batch: Any) -> Tensor:
    output = model(**batch)
    found: Tensor | None = getattr(output, "loss", None)
    if found is None:
        raise ValueError(
            f"{_WHAT}: model(**batch) returned a {type(output).__name__} without a loss, expected one; put labels into "
            "the batch, or pass loss=, a callable (model, batch) -> scalar"
        )
    return found


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
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"{_WHAT}: optimizer= returned a {type(self.optimizer).__name__}, expected a torch.optim.Optimizer"
            )
        self.name = self.name or type(self.optimizer).__name__

    def cost(self, gradient_bytes: int) -> StepCost:
        values = [value for held in self.optimizer.state.values() for value in held.values()]
        state = [value for value in values if isinstance(value, Tensor)]
        return StepCost(
            name=self.name,
            times_ms={phase: tuple(times) for phase, times in self.times_ms.items()},
            state_bytes=sum(value.nbytes for value in state),
            state_dtypes="+".join(sorted({_word(value.dtype) for value in state if value.dim()})),
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
    kept: _Kept

    def _loss(self) -> Tensor:
        casting = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        with casting:
            return self.loss(self.model, self.batch)

    def try_out(self, params: Sequence[Tensor]) -> int:
        """Check the loss and that it reaches the parameters. Returns the bytes of the gradients."""
        self.kept.rewind_()
        found = self._loss()
        if not isinstance(found, Tensor):
            raise TypeError(f"{_WHAT}: the loss is a {type(found).__name__}, expected a scalar tensor")
        if found.numel() != 1:
            raise ValueError(f"{_WHAT}: the loss has shape {tuple(found.shape)}, expected a scalar; take its mean")
        if not found.requires_grad:
            raise ValueError(f"{_WHAT}: the loss has no gradient, expected one that depends on trainable parameters")
        if not math.isfinite(value := found.item()):
            raise ValueError(f"{_WHAT}: the loss is {value}, expected a finite number; check the batch and the dtype")
        found.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            raise ValueError(f"{_WHAT}: no trainable parameter got a gradient, expected the loss to depend on some")
        for p in params:
            p.grad = None
        return sum(grad.nbytes for grad in grads)

    def step(self, contender: _Contender) -> dict[str, float]:
        """One step from the kept weights. Returns milliseconds per phase."""
        self.kept.rewind_()
        clock = _Clock(self.device)
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


class _Clock:
    """Times the phases of one step: on the CPU by the clock, on a GPU by events, which nothing waits for but `read`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []
        if self._on_gpu:
            torch.cuda.synchronize(device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with record_function(f"safefreeze: {name}"):
            begun = self._now()
            yield
            self._marks.append((name, begun, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Milliseconds per phase, summed over its times, and from the first beginning to the last end."""
        if self._on_gpu:
            self._marks[-1][2].synchronize()
        times: dict[str, float] = {}
        for name, begun, ended in [*self._marks, (_WHOLE, self._marks[0][1], self._marks[-1][2])]:
            spent = begun.elapsed_time(ended) if self._on_gpu else 1e3 * (ended - begun)
            times[name] = times.get(name, 0.0) + spent
        return times


# --------------------------------------------------------------------------------------------------- putting back


class _Kept:
    """All that training changes of a model and of random generators, to be put back exactly."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        params = list(model.parameters())
        self._params = [(p, p.grad, p.requires_grad) for p in params]
        self._values = [(p, p.detach().clone()) for p in params if p.requires_grad]
        self._modes = [(module, module.training) for module in model.modules()]
        # by storage, since a buffer may overlap itself, or be replaced by another
        self._buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
        held = [buffer for _, buffers in self._buffers for buffer in buffers.values() if buffer is not None]
        storages = [buffer.untyped_storage() for buffer in held]
        self._storages = [(storage, storage.clone()) for storage in storages]  # type: ignore[no-untyped-call]
        self._device = device
        self._random = (
            random.getstate(), np.random.get_state(), torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        )  # fmt: skip

    def begin_(self, model: torch.nn.Module) -> None:
        """Training mode, no gradients."""
        model.train()
        for p, _ in self._values:
            p.grad = None

    @torch.no_grad()
    def rewind_(self) -> None:
        """Weights, buffers and random numbers as they were."""
        for p, value in self._values:
            p.copy_(value)
        for module, buffers in self._buffers:
            module._buffers.update(buffers)
        for storage, value in self._storages:
            storage.copy_(value)
        python, numpy, cpu, gpu = self._random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, self._device)

    def restore_(self) -> None:
        """Everything as it was; gradients are the tensors they were."""
        self.rewind_()
        for p, grad, flag in self._params:
            p.grad = grad
            p.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode


@contextmanager
def _kept(model: torch.nn.Module, device: torch.device) -> Iterator[_Kept]:
    """The model may train inside, on its device; afterwards it is as it was before."""
    kept = _Kept(model, device)
    try:
        kept.begin_(model)
        with torch.enable_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield kept
    finally:
        kept.restore_()


# --------------------------------------------------------------------------------------------- memory and machine


def _peak_of(contender: _Contender, work: _Work, proof: Snapshot | None, tick: Callable[[], object]) -> int | None:
    """Most bytes in use during two steps of a new optimizer, beyond those before; the first step makes the state.

    On the CPU this is resident memory. None where the system does not tell it.
    """
    gc.collect()
    work.kept.rewind_()
    contender.start()
    before = _restart_peak(work.device)
    for _ in range(2):
        work.step(contender)
        tick()
    peak = None if before is None else _peak(work.device) - before
    if proof is not None:
        proof.verify(work.model)
    contender.optimizer = None
    return peak


def _restart_peak(device: torch.device) -> int | None:
    """Forget the peak so far. Returns the bytes in use; None where there is no peak to be had."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        # what glibc keeps of freed memory would count as in use before, and hide as much of the peak
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except (OSError, AttributeError, TypeError):  # no Linux, no glibc, or not allowed
        return None


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(entry: str) -> int:
    """Bytes that the kernel tells of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == entry:
            return int(value.split()[0]) << 10
    raise OSError(f"/proc/self/status has no {entry}")


def _peak_is(device: torch.device) -> str:
    if device.type == "cuda":
        return "most memory allocated on the GPU beyond weights and buffers"
    return "growth of the process's resident memory, to within its allocator's reserves"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[], object]]:
    """Yields what to call after each of ``total`` steps."""
    if not shown:
        yield lambda: None
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc="profiling", unit="step") as bar:
        yield bar.update
