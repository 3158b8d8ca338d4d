"""`MaskedAdamW` and `MaskedAdam`, drop-in for `torch.optim`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
import torch.distributed
from torch import Tensor

from ..grads.checks import overlaps_itself
from ..kernels.operands import (
    STORAGE,
    WIDE,
)
from ..plan.plan import FreezePlan


def _check_rounding(what: str, master: str | None, rounding: str, seed: int) -> None:
    for word, got, valid in (
        ("master", master, (None, "remainder")),
        ("rounding", rounding, ("nearest", "stochastic")),
    ):
        if got not in valid:
            raise ValueError(f"{what}: {word} is {got!r}, expected {' or '.join(map(repr, valid))}")
    if master is not None and rounding == "stochastic":
        raise ValueError(f"{what}: rounding is 'stochastic' with masters, which lose nothing; leave out one of the two")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"{what}: seed is {seed!r}, expected an integer from 0 to 2**64 - 1")


def _check_for_foreach(defaults: dict[str, Any]) -> None:
    """What torch refuses of ``foreach=True``, in its words."""
    for word, value in (("lr", defaults["lr"]), *((f"betas[{i}]", beta) for i, beta in enumerate(defaults["betas"]))):
        if isinstance(value, Tensor) and defaults["foreach"] and not defaults["capturable"]:
            raise ValueError(f"{word} as a Tensor is not supported for capturable=False and foreach=True")


def _check_hyper_parameters(group: dict[str, Any]) -> None:
    """Ranges, without NaN and infinity. The words are torch's, which callers and tests match."""
    lr, eps, weight_decay, betas = group["lr"], group["eps"], group["weight_decay"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= lr < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"Invalid epsilon value: {eps}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{index}] must be 1-element")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")


def check_parameter(p: Tensor, what: str, name: str | None = None) -> None:
    label = f"parameter {name!r}" if name else "a parameter"
    if p.layout != torch.strided:
        raise TypeError(f"{what}: {label} has layout {p.layout}, expected a dense (strided) tensor")
    if p.dtype not in (*STORAGE, *WIDE):
        raise TypeError(
            f"{what}: {label} has dtype {p.dtype}, expected float32, bfloat16, float16, float64, complex64 or "
            "complex128; convert it, or keep it out of training with requires_grad_(False)"
        )
    if overlaps_itself(p):
        raise TypeError(f"{what}: {label} overlaps itself in memory (stride {p.stride()}); pass p.clone()")


def _named_by_identity(groups: list[dict[str, Any]]) -> dict[int, tuple[ref[Tensor], str]]:
    """id of a parameter -> itself, weakly, and its name."""
    return {
        id(p): (ref(p), name)
        for group in groups
        for name, p in zip(group.get("param_names", ()), group["params"], strict=False)
    }


def checked_plan(plan: Any, what: str) -> FreezePlan:
    if not isinstance(plan, FreezePlan):
        raise TypeError(f"{what}: freeze is a {type(plan).__name__}, expected a FreezePlan (or None)")
    return plan


def _without_duplicates(params: Any, aliases: dict[str, str]) -> Any:
    """Keep a tied tensor once, under its first name, and remember the other names in ``aliases``."""
    first: dict[int, tuple[str, int]] = {}

    def keep(items: Iterable[Any], group: int) -> list[Any]:
        kept = []
        for item in items:
            if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
                name, tensor = item
                known, home = first.setdefault(id(tensor), (name, group))
                if home != group:
                    raise ValueError(
                        f"some parameters appear in more than one parameter group: {known!r} of group {home} and "
                        f"{name!r} of group {group} are one tensor; give it to one of them"
                    )
                if known != name:
                    aliases[name] = known
                    continue
            kept.append(item)
        return kept

    if isinstance(params, Tensor):
        return params  # torch says what is wrong with it
    groups = list(params)
    if groups and isinstance(groups[0], dict):
        return [
            {**group, "params": keep(group["params"], i)}
            if isinstance(group, dict) and not isinstance(group.get("params"), (Tensor, set, type(None)))
            else group
            for i, group in enumerate(groups)
        ]
    return keep(groups, 0)
