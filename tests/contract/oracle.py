"""What the contract compares with.

`Weight` is what `MaskedAdam` and `MaskedAdamW` must do, one element at a time: dense tensors, no work list, nothing
packed. Every element has moments and an age of its own; where frozen, nothing happens. The arithmetic is that of
DESIGN's three lines, in the parameter's float32 (or float64), so the result equals the backends' bit for bit.

`Oracle` is stock `torch.optim` in float64, with the bound of what float32 may add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from conftest import assert_within
from torch import Tensor, nn

from safefreeze_kernels.kernels.reference import (
    decode_largest,
    decode_moments,
    encode_largest,
    encode_moments,
    moment_noise,
)


def rounded_master(master: Tensor) -> Tensor:
    """A float32 master as its bfloat16 parameter: to nearest, ties away from zero."""
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32)).to(torch.int64)  # which may pass 2**31
    return ((bits + 0x8000 >> 16) << 16).to(torch.int32).view(torch.float32).to(torch.bfloat16)


@dataclass
class Weight:
    """One parameter: its values, and what an optimizer knows of it. ``state_dtype`` int8: moments are kept as float32
    of what codes hold; tests/kernels/test_codes.py says what these are."""

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

    @property
    def coded(self) -> bool:
        """Whether its moments are codes."""
        return self.state_dtype == torch.int8 and self.exact == torch.float32

    def step(
        self, grad: Tensor, options: dict[str, float], multiplier: Tensor | None, kind: dict[str, bool],
        number: int = 0,
    ) -> None:  # fmt: skip
        """One update. ``options``: lr, weight_decay; ``kind``: decoupled, amsgrad, capturable (torch's powers);
        ``number``: the parameter's place in the optimizer."""
        dtype, shape = self.exact, self.value.shape
        if self.age is None:
            self.age = torch.zeros(shape, dtype=torch.int64)
            kept = dtype if dtype == torch.float64 or self.coded else self.state_dtype
            self.moments = [torch.zeros(shape, dtype=kept) for _ in range(3)]
        age = self.age + 1
        lr, decay, beta1, beta2 = options["lr"], options["weight_decay"], 0.9, options.get("beta2", 0.999)
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
        with np.errstate(invalid="ignore"):  # numpy's root is correctly rounded, torch's is not
            square_root = torch.from_numpy(np.sqrt(second.double().numpy())).to(dtype)
        kept = rounded(1.0 - lr * decay if kind["decoupled"] else 1.0)
        p = kept * p - step_size * m / (square_root / root + rounded(1e-8))
        if self.coded:
            noise = moment_noise(torch.arange(m.numel()).view(shape), seed=0, step=age, number=number)
            m, v = decode_moments(*encode_moments(m, v, noise))
            largest = decode_largest(encode_largest(largest))
        live = ~self.frozen
        if self.master is not None:
            self.master = torch.where(live, p, self.master)
            p = rounded_master(p)
        self.value = torch.where(live, p.to(self.value.dtype), self.value)
        self.moments = [
            torch.where(live, new.to(old.dtype), old) for new, old in zip((m, v, largest), self.moments, strict=True)
        ]
        self.age = torch.where(live, age, self.age)

    def freeze(self, frozen: Tensor, keep_state: bool = False, thawed: str = "fresh") -> None:
        """``frozen`` takes effect: what is frozen loses moments, age and master, unless they are kept; what is thawed
        loses the first two, unless it goes on with them. (Where nothing was kept there is nothing to lose.)"""
        lost = torch.zeros_like(frozen) if keep_state else frozen
        if self.master is not None:
            self.master = torch.where(lost, self.value.float(), self.master)
        gone = lost | (self.frozen & ~frozen) if thawed == "fresh" else lost
        self.moments = [torch.where(gone, torch.zeros_like(moment), moment) for moment in self.moments]
        self.age = None if self.age is None else torch.where(gone, 0, self.age)
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


U = 2.0**-24  # half a unit in the last place of a float32 in [1, 2): what one rounding may do
U_DOUBLE = 2.0**-52  # of a float64, ours and the oracle's


@dataclass
class Bound:
    """Running error analysis of one tensor: how far float32 Adam(W) may be from exact Adam(W).

    Every quantity carries an absolute bound. One float32 operation adds at most ``U`` times its result; a scalar that
    was rounded to float32 adds another ``U`` where it is used. The counts below cover both spellings of the update,
    ours and torch's (``lerp``, ``addcmul``, ``addcdiv``, a square root that may be one unit off); each is the larger of
    the two, plus one for products of errors. Values stay far from overflow and underflow.
    """

    p: Tensor
    m: Tensor
    v: Tensor
    x: Tensor  # of the amsgrad maximum
    u: float

    @classmethod
    def zero(cls, like: Tensor) -> Bound:
        exact = like.dtype == torch.float64
        return cls(*(torch.zeros(like.shape, dtype=torch.float64) for _ in range(4)), U_DOUBLE if exact else U)

    def advance(
        self, group: Mapping[str, Any], grad: Tensor, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
    ) -> None:
        """After one exact step from ``before`` to ``after`` (p, m, v, x), all in float64."""
        lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
        decay = 1.0 - lr * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0
        l2 = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
        p, m = before["p"].abs(), before["m"].abs()
        step = after["step"].item()
        # loss scale: the multiplier and the product; L2: the coefficient, the product, the sum
        g_bound = l2 * self.p + 4 * self.u * (grad.abs() + l2 * p)
        g = grad.abs() + l2 * p
        # two coefficients, two products, one sum; torch: a difference, a coefficient, a product, a sum
        self.m = beta1 * self.m + (1 - beta1) * g_bound + 4 * self.u * (beta1 * m + (1 - beta1) * (g + m))
        # the square, then as above
        self.v = beta2 * self.v + (1 - beta2) * (2 * g * g_bound + g_bound**2) + 5 * self.u * after["v"]
        self.x = torch.maximum(self.x, self.v)
        second, second_bound = (after["x"], self.x) if group["amsgrad"] else (after["v"], self.v)
        root = second.sqrt()
        # |sqrt(a + e) - sqrt(a)| <= e / sqrt(a), and never more than sqrt(e)
        root_bound = torch.minimum(second_bound / root.clamp_min(1e-300), second_bound.sqrt()) + 2 * self.u * root
        bias2_sqrt = math.sqrt(1.0 - beta2**step)
        denominator = root / bias2_sqrt + eps
        denominator_bound = root_bound / bias2_sqrt + 4 * self.u * denominator
        step_size = lr / (1.0 - beta1**step)
        moved = step_size * after["m"].abs() / denominator
        least = (denominator - denominator_bound).clamp_min(1e-300)
        moved_bound = step_size * self.m / least + moved * denominator_bound / least + 4 * self.u * moved
        self.p = decay * self.p + moved_bound + 4 * self.u * (decay * p + moved)


class Oracle:
    """Stock `torch.optim` in float64 on the live part, with the bound of what float32 may add.

    Where parameters or state are stored in 16 bits, each step starts from what is stored: an error bound cannot be
    carried through a rounding to 8 bits, but one step can be bounded, and its rounding is exact and monotone.
    """

    def __init__(self, kind: type[torch.optim.Optimizer], params: Mapping[str, Tensor], **arguments: Any) -> None:
        self.params = {name: nn.Parameter(p.double()) for name, p in params.items()}
        self.stock = kind(list(self.params.values()), foreach=False, fused=False, **arguments)
        self.bounds = {name: Bound.zero(p) for name, p in params.items()}

    def step(self, grads: Mapping[str, Tensor]) -> None:
        before = {}
        for name, p in self.params.items():
            p.grad = grads[name].double()
            before[name] = self.values(name)
        self.stock.step()
        (group,) = self.stock.param_groups
        for name, bound in self.bounds.items():
            bound.advance(group, grads[name].double(), before[name], self.values(name))

    def values(self, name: str) -> dict[str, Tensor]:
        p = self.params[name]
        state = self.stock.state[p]
        zero = torch.zeros(p.shape, dtype=torch.float64)
        return {
            "p": p.detach().clone(),
            "m": state.get("exp_avg", zero).clone(),
            "v": state.get("exp_avg_sq", zero).clone(),
            "x": state.get("max_exp_avg_sq", zero).clone(),
            "step": state.get("step", torch.zeros(())).clone(),
        }

    def check(self, name: str, live: Tensor, got: Mapping[str, Tensor], what: str) -> None:
        """``got``: parameter and moments as stored. Each must be what rounding makes of a value within the bound."""
        exact = self.values(name)
        for key, value in got.items():
            bound = getattr(self.bounds[name], key)
            low, high = (exact[key] - bound).to(value.dtype), (exact[key] + bound).to(value.dtype)
            assert_within(value, low, high, f"{what}: {key} of {name!r}", where=live)

    def follow(self, name: str, live: Tensor, got: Mapping[str, Tensor]) -> None:
        """Start the next step from the values in ``got``."""
        p = self.params[name]
        state = self.stock.state[p]
        homes = {"p": p.data, "m": state["exp_avg"], "v": state["exp_avg_sq"], "x": state.get("max_exp_avg_sq")}
        for key, value in got.items():
            homes[key].copy_(torch.where(live, value.double(), homes[key]))
            getattr(self.bounds[name], key).zero_()
