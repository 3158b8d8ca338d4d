"""Contenders made real: tensors, one callable to time, and the check that its result is right.

The oracle is `torch.optim.AdamW(foreach=False, fused=False)` in float32, with weights and state rounded to their
storage type after every step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

import safefreeze_kernels as sf
from safefreeze_kernels.measure.memory import state_tensors
from safefreeze_kernels.measure.practice import mask_gradients, mask_step_restore

from .cases import NOTHING, Contender, Freeze, Storage, TensorSet

DTYPES: Final[dict[Storage, torch.dtype]] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
HYPER: Final[dict[str, Any]] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
CHECKED_STEPS: Final = 3  # also the warm-up; more than one, so that a wrong state shows in the weights
LINE: Final = 64  # bytes that move together between memory and cache
SINGLE_PASS: Final = ("masked", "masked, triton backend", "masked, masters", "torch fused")
WRITE_GRADIENTS: Final = ("mask + step + restore", "zero_frozen_grads_", "grad.mul_(mask)")
T = TypeVar("T")
_AS_BITS: Final = {2: torch.int16, 4: torch.int32}


class ResultDiffersError(AssertionError):
    """A contender's result is not what it must be; its time is not reported."""


class UnavailableError(RuntimeError):
    """A contender that does not run here; the message says why."""


# ---------------------------------------------------------------------------------------------------- inputs


class Inputs:
    """What all contenders on one `TensorSet` share: starting weights, gradients, masks, and the oracle's results."""

    def __init__(self, tensors: TensorSet, seed: int, device: str = "cpu") -> None:
        self.tensors = tensors
        self._seed = seed
        self._device = torch.device(device)
        #: asked for by name: with "auto" one that is missing would be replaced unseen
        self.backend = self._device.type
        self.names = [f"layers.{i}.weight" for i in range(tensors.count)]
        self._cache: dict[Any, Any] = {}

    def _draw(self, salt: int, scale: float, storage: Storage) -> list[Tensor]:
        generator = torch.Generator(self._device).manual_seed(1000 * self._seed + salt)
        return [
            (torch.randn(self.tensors.shape, generator=generator, device=self._device) * scale).to(DTYPES[storage])
            for _ in range(self.tensors.count)
        ]

    def _cached(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = make()
        found: T = self._cache[key]
        return found

    def start(self, storage: Storage) -> list[Tensor]:
        """Starting weights; not to be written to."""
        return self._cached(("start", storage), lambda: self._draw(0, 0.02, storage))

    def gradients(self, storage: Storage) -> list[Tensor]:
        """Gradients; not to be written to, every contender that only reads them shares these."""
        return self._cached(("gradients", storage), lambda: self._draw(1, 0.01, storage))

    def masks(self, freeze: Freeze) -> list[sf.FreezeMask]:
        """One mask per tensor."""
        return self._cached(("masks", freeze), lambda: self._draw_masks(freeze))

    def plan(self, freeze: Freeze) -> sf.FreezePlan:
        """The masks by name; empty where nothing is frozen."""
        return sf.FreezePlan(
            {} if freeze == NOTHING else dict(zip(self.names, self.masks(freeze), strict=True)),
        )

    def _draw_masks(self, freeze: Freeze) -> list[sf.FreezeMask]:
        draw, shape = np.random.default_rng(self._seed), self.tensors.shape

        def one() -> sf.FreezeMask:
            if freeze.kind == "nothing":
                return sf.FreezeMask(shape)
            if freeze.kind == "elements":
                return sf.FreezeMask(shape, elements=torch.from_numpy(draw.random(shape) < freeze.share))
            word, n = ("rows", shape[0]) if freeze.kind == "rows" else ("cols", shape[-1])
            return sf.FreezeMask(shape, **{word: draw.choice(n, round(freeze.share * n), replace=False)})

        return [one() for _ in range(self.tensors.count)]

    def stock(self, weights: Storage, state: Storage) -> list[Tensor]:
        """Weights after `CHECKED_STEPS` steps of the oracle, float32."""
        return self._cached(("stock", weights, state), lambda: self._run_stock(weights, state))

    def _run_stock(self, weights: Storage, state: Storage) -> list[Tensor]:
        params = [Parameter(start.float().clone()) for start in self.start(weights)]
        for p, grad in zip(params, self.gradients(weights), strict=True):
            p.grad = grad.float()
        optimizer = torch.optim.AdamW(params, **HYPER, foreach=False, fused=False)
        for _ in range(CHECKED_STEPS):
            optimizer.step()
            for p in params:
                p.data.copy_(p.data.to(DTYPES[weights]))
                for key in ("exp_avg", "exp_avg_sq") if state != "int8" else ():
                    moment = optimizer.state[p][key]
                    moment.copy_(moment.to(DTYPES[state]))
        return [p.detach() for p in params]

    def forget_stock(self) -> None:
        """Release the oracle's results, which only checks need."""
        for key in [key for key in self._cache if key[0] == "stock"]:
            del self._cache[key]


# --------------------------------------------------------------------------------------------------- runners


class Runner:
    """A contender on its own weights: `run` is what is timed.

    Raises:
        UnavailableError: the contender does not run here.
    """

    def __init__(self, contender: Contender, inputs: Inputs) -> None:
        self.contender, self.inputs = contender, inputs
        self.backend = inputs.backend
        self.masks = inputs.masks(contender.freeze)
        self.optimizer: Any = None
        self.params = [Parameter(start.clone()) for start in inputs.start(contender.weights)]
        writes_gradients = contender.method in WRITE_GRADIENTS
        for p, grad in zip(self.params, inputs.gradients(contender.weights), strict=True):
            p.grad = grad.clone() if writes_gradients else grad
        self.grads = [p.grad for p in self.params if p.grad is not None]
        self.named = dict(zip(inputs.names, self.params, strict=True))
        self.plan = inputs.plan(contender.freeze)
        self.run: Callable[[], Any] = BUILDERS[contender.method](self)

    def warm_up(self) -> None:
        """Take the steps that `check` looks at."""
        try:
            for _ in range(CHECKED_STEPS):
                self.run()
        except Exception as error:
            if self.contender.method != "torch.compile":
                raise
            reason = str(error).strip().splitlines() or [""]
            raise UnavailableError(f"{type(error).__name__}: {reason[0]}") from error

    def check(self) -> None:
        """After `warm_up`: frozen bytes unchanged, live elements those of the oracle.

        Raises:
            ResultDiffersError: naming tensor, element and both values.
        """
        self.check_frozen()
        if self.optimizer is None:
            return
        for i, want in enumerate(self.inputs.stock(self.contender.weights, self.contender.state)):
            wrong = ~((self.params[i].detach().float() - want).abs() <= _tolerance(want, self.contender))
            if self.masks[i].frozen_count:
                wrong &= ~self.masks[i].dense().to(wrong.device)
            self._report(wrong, i, self.params[i].detach(), want, "live weight")

    def check_frozen(self) -> None:
        """Frozen bytes are those of the start; of what only masks gradients: those are zero where frozen.

        Raises:
            ResultDiffersError: naming tensor, element and both values.
        """
        weights = self.contender.weights
        for i, (mask, start) in enumerate(zip(self.masks, self.inputs.start(weights), strict=True)):
            frozen = mask.dense().to(start.device)
            if self.optimizer is None:
                want = self.inputs.gradients(weights)[i].masked_fill(frozen, 0.0)
                self._report(self.grads[i].ne(want), i, self.grads[i], want, "gradient")
            elif mask.frozen_count:
                now, bits = self.params[i].detach(), _AS_BITS[start.element_size()]
                self._report((now.view(bits) != start.view(bits)) & frozen, i, now, start, "frozen weight")

    def _report(self, wrong: Tensor, i: int, got: Tensor, want: Tensor, what: str) -> None:
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            raise ResultDiffersError(
                f"{self.contender}: {what} {self.inputs.names[i]}{list(place)} is {got[place].item()!r}, expected "
                f"{want[place].item()!r} ({int(wrong.sum()):,} of {wrong.numel():,} elements of this tensor differ)"
            )

    @cached_property
    def bytes_moved(self) -> int | None:
        """Bytes one call has to read and write, in whole cache lines; None for methods of many passes."""
        method = self.contender.method
        n, frozen = self.inputs.tensors.numel, sum(mask.frozen_count for mask in self.masks)
        weight, state = (DTYPES[s].itemsize for s in (self.contender.weights, self.contender.state))
        multiply = 3 * weight * n  # gradient in, mask in, gradient out
        if method == "zero_frozen_grads_":
            return weight * frozen
        if method == "grad.mul_(mask)":
            return multiply
        if method == "mask + step + restore":
            return multiply + (3 * weight + 4 * state) * n + 2 * weight * frozen
        if method not in SINGLE_PASS:
            return None
        # weights in and out, gradients in: whole lines; both moments (and masters' lower halves) in and out: packed
        total = 3 * sum(_live_line_bytes(mask, weight) for mask in self.masks)
        packed = sum(int(np.prod(mask.packed_shape)) for mask in self.masks)
        total += (4 * state + (4 if method == "masked, masters" else 0)) * packed
        return total + sum(mask.bits.nbytes for mask in self.masks if mask.bits is not None)

    @property
    def state_bytes(self) -> tuple[int, int] | None:
        """Optimizer state held, and what the live fraction of a dense state is."""
        if self.contender.method != "masked" or self.optimizer is None:
            return None
        held = sum(value.nbytes for value in state_tensors(self.optimizer) if value.dim())
        dense = 2 * DTYPES[self.contender.state].itemsize
        return held, dense * sum(mask.live_count for mask in self.masks)


def _tolerance(want: Tensor, contender: Contender) -> Tensor:
    """How far two right results may be apart after `CHECKED_STEPS` steps.

    Per step: arithmetic is float32, and with its unit roundoff ``u`` rounds the weight four times at most and the
    update, which is about ``lr``, some thirty times on its way through moments, root and quotient. Low-precision
    storage can then round two neighbouring results apart: a weight by one place, which is ``2 u`` of that type, the
    update by a place in either moment. Compiled by torch, bias corrections are float32 too, and 1 - beta2^step loses a
    factor of 1 / (1 - beta2) there. Of 8-bit state a place is a quarter.
    """
    u = torch.finfo(torch.float32).eps / 2
    place: dict[Storage, float] = {"fp32": 0.0, "bf16": torch.finfo(torch.bfloat16).eps, "int8": 0.25}
    reach = want.abs() + 2 * CHECKED_STEPS * HYPER["lr"]
    update = 32 * u + 2 * place[contender.state]
    if contender.method == "bitsandbytes AdamW8bit":
        update = 8.0  # its blocks are coarse for small v; further goes no step of an Adam
    if contender.method == "torch.compile":
        update += 2 * u / (1 - HYPER["betas"][1])
    tolerance: Tensor = CHECKED_STEPS * ((4 * u + place[contender.weights]) * reach + update * HYPER["lr"])
    return tolerance


def _live_line_bytes(mask: sf.FreezeMask, itemsize: int) -> int:
    """Bytes of the cache lines that hold live rows × live columns, rows taken to start on a line."""
    n_cols = mask.matrix_shape[1]
    live_rows, live_cols = mask.live_rows.size, mask.live_cols
    if live_cols.size == n_cols:
        return live_rows * n_cols * itemsize
    return live_rows * np.unique(live_cols * itemsize // LINE).size * LINE


# ------------------------------------------------------------------------------------------------- the methods


def _masked(runner: Runner, backend: str = "", master: str | None = None) -> Callable[[], Any]:
    runner.optimizer = sf.MaskedAdamW(
        runner.named.items(), **HYPER, freeze=runner.plan, backend=backend or runner.backend,
        state_dtype=DTYPES[runner.contender.state], master=master,
    )  # fmt: skip
    return runner.optimizer.step


def _torch(runner: Runner, **flags: Any) -> Callable[[], Any]:
    runner.optimizer = torch.optim.AdamW(runner.params, **{**HYPER, **flags})
    return runner.optimizer.step


def _compiled(runner: Runner) -> Callable[[], Any]:
    import logging

    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # no pool of helpers that would run beside what is timed
    torch._logging.set_logs(all=logging.ERROR)  # type: ignore[attr-defined]
    step = _torch(runner, lr=torch.tensor(HYPER["lr"]))  # as torch's documentation advises
    return torch.compile(lambda: step())


def _clip_and_step(runner: Runner, ours: bool) -> Callable[[], Any]:
    """Clipping to a norm nothing reaches, so that the result is that of a step alone; what is done is the same."""
    limit, step = 1e9, _masked(runner) if ours else _torch(runner, fused=True)
    model = _model(runner.named)

    def run() -> None:
        if ours:
            sf.clip_grad_norm_(model, limit, runner.plan, optimizer=runner.optimizer, backend=runner.backend)
        else:
            torch.nn.utils.clip_grad_norm_(runner.params, limit)
        step()

    return run


def _peer(runner: Runner, module: str, name: str, **flags: Any) -> Callable[[], Any]:
    try:
        optimizer = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UnavailableError(str(error)) from error
    runner.optimizer = optimizer(runner.params, **HYPER, **flags)
    return runner.optimizer.step


def _multiply(runner: Runner) -> Callable[[], Any]:
    actions = mask_gradients(runner.named, runner.plan, [])

    def run() -> None:
        for action in actions:
            action()

    return run


def _zero(runner: Runner) -> Callable[[], Any]:
    model, plan = _model(runner.named), runner.plan
    return lambda: sf.zero_frozen_grads_(model, plan, backend=runner.backend)


def _model(named: Mapping[str, Parameter]) -> torch.nn.Module:
    """A module whose parameters have these dotted names."""
    model = torch.nn.Module()
    for name, p in named.items():
        *path, last = name.split(".")
        home = model
        for part in path:
            if not hasattr(home, part):
                home.add_module(part, torch.nn.Module())
            home = home.get_submodule(part)
        home.register_parameter(last, p)
    return model


BUILDERS: Final[dict[str, Callable[[Runner], Callable[[], Any]]]] = {
    "masked": _masked,
    "masked, reference backend": lambda runner: _masked(runner, backend="reference"),
    "torch fused": lambda runner: _torch(runner, fused=True),
    "torch foreach": lambda runner: _torch(runner, foreach=True),
    "torch for-loop": lambda runner: _torch(runner, foreach=False, fused=False),
    "torch.compile": _compiled,
    "masked, triton backend": lambda runner: _masked(runner, backend="triton"),
    "masked, masters": lambda runner: _masked(runner, master="remainder"),
    "clip + masked step": lambda runner: _clip_and_step(runner, ours=True),
    "torch clip + fused step": lambda runner: _clip_and_step(runner, ours=False),
    "optimi": lambda runner: _peer(runner, "optimi", "AdamW"),
    "apex": lambda runner: _peer(runner, "apex.optimizers", "FusedAdam", adam_w_mode=True),
    "bitsandbytes": lambda runner: _peer(runner, "bitsandbytes.optim", "AdamW", optim_bits=32),
    "bitsandbytes AdamW8bit": lambda runner: _peer(runner, "bitsandbytes.optim", "AdamW8bit"),
    "mask + step + restore": lambda runner: mask_step_restore(
        _torch(runner, fused=True), runner.named, runner.plan, dense=True
    )[0],
    "zero_frozen_grads_": _zero,
    "grad.mul_(mask)": _multiply,
}
