"""What `MaskedAdam` and `MaskedAdamW` must do, one element at a time: dense tensors, no plan compiled, nothing packed.

Every element has moments and an age of its own; where frozen, nothing happens. The arithmetic is that of DESIGN's three
lines, in the parameter's float32 (or float64), so the result is equal bit for bit to the backends'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


def rounded_master(master: Tensor) -> Tensor:
    """A float32 master as its bfloat16 parameter: to nearest, ties away from zero."""
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32)).to(torch.int64)  # which may pass 2**31
    return ((bits + 0x8000 >> 16) << 16).to(torch.int32).view(torch.float32).to(torch.bfloat16)


@dataclass
class Weight:
    """One parameter: its values, and what an optimizer knows of it."""

    value: Tensor
    frozen: Tensor  # bool
    state_dtype: torch.dtype = torch.float32
    master: Tensor | None = None  # float32; of a bfloat16 parameter that has one
    moments: list[Tensor] = field(default_factory=list)  # exp_avg, exp_avg_sq, max_exp_avg_sq
    age: Tensor | None = None  # steps each element took; None: there is no state yet

    @property
    def exact(self) -> torch.dtype:
        """What is computed in."""
        return torch.float64 if self.value.dtype == torch.float64 else torch.float32

    def step(self, grad: Tensor, options: dict[str, float], multiplier: Tensor | None, kind: dict[str, bool]) -> None:
        """One update. ``options``: lr, weight_decay; ``kind``: decoupled, amsgrad, capturable (powers are torch's)."""
        dtype, shape = self.exact, self.value.shape
        if self.age is None:
            self.age = torch.zeros(shape, dtype=torch.int64)
            kept = dtype if dtype == torch.float64 else self.state_dtype
            self.moments = [torch.zeros(shape, dtype=kept) for _ in range(3)]
        age = self.age + 1
        lr, decay, beta1, beta2 = options["lr"], options["weight_decay"], 0.9, 0.999
        step_size, root = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        for t in age.unique().tolist():
            count = torch.tensor(float(t), dtype=torch.float64) if kind["capturable"] else t
            step_size[age == t] = float(lr / (1.0 - beta1**count))
            root[age == t] = math.sqrt(1.0 - beta2**count)
        factor = 1.0 if multiplier is None else multiplier.double().item()

        def rounded(number: float) -> float:
            return number if dtype == torch.float64 else float(np.float32(number))

        p = (self.value if self.master is None else self.master).to(dtype)
        g = grad.to(dtype) * rounded(factor)
        if not kind["decoupled"] and decay != 0:
            g = g + rounded(decay) * p
        m, v, largest = (moment.to(dtype) for moment in self.moments)
        m = rounded(beta1) * m + rounded(1.0 - beta1) * g
        v = rounded(beta2) * v + rounded(1.0 - beta2) * (g * g)
        second = v
        if kind["amsgrad"]:
            second = largest = torch.maximum(largest, v)
        square_root = second.double().sqrt().to(dtype)
        kept = rounded(1.0 - lr * decay if kind["decoupled"] else 1.0)
        p = kept * p - step_size * m / (square_root / root + rounded(1e-8))
        live = ~self.frozen
        if self.master is not None:
            self.master = torch.where(live, p, self.master)
            p = rounded_master(p)
        self.value = torch.where(live, p.to(self.value.dtype), self.value)
        self.moments = [
            torch.where(live, new.to(old.dtype), old) for new, old in zip((m, v, largest), self.moments, strict=True)
        ]
        self.age = torch.where(live, age, self.age)

    def freeze(self, frozen: Tensor) -> None:
        """``frozen`` takes effect: whatever is frozen or was loses its moments and its age."""
        gone = frozen | self.frozen
        self.moments = [torch.where(gone, torch.zeros_like(moment), moment) for moment in self.moments]
        self.age = None if self.age is None else torch.where(gone, 0, self.age)
        if self.master is not None:  # what a master has beyond its weight goes too
            self.master = torch.where(gone, self.value.float(), self.master)
        self.frozen = frozen

    def rewrite(self, value: Tensor, master: Tensor | None) -> None:
        """Someone wrote to the weight."""
        self.value, self.master = value.clone(), None if master is None else master.clone()

    def grow(self, value: Tensor) -> None:
        """The parameter grew at the end of its dimensions, to ``value``; what was added is young."""
        old = tuple(map(slice, self.value.shape))

        def grown(tensor: Tensor, more: Tensor) -> Tensor:
            more = more.clone()
            more[old] = tensor
            return more

        self.moments = [grown(m, torch.zeros(value.shape, dtype=m.dtype)) for m in self.moments]
        self.age = None if self.age is None else grown(self.age, torch.zeros(value.shape, dtype=torch.int64))
        self.frozen = grown(self.frozen, torch.zeros(value.shape, dtype=torch.bool))
        self.master = None if self.master is None else grown(self.master, value.float())
        self.value = value.clone()
