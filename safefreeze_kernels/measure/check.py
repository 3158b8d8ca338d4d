"""`check`: what a run will train, what stands still and by whom, and what is wrong with either. Reads only."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels.operands import moment_dtype
from ..model.sharding import local, local_mask
from ..optim.adam import MaskedAdam
from ..optim.checks import all_names, all_params
from ..optim.guard import guards_of
from ..optim.rounding import Rounded, rate_of, rounded_away
from ..plan.adapted import AdaptedPlan
from ..plan.binding import BoundMask, Model, bare_name, bind, named_tensors
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan

_MOST_LOST: Final = 0.1  # share of live weights that may be too large for the rate before it is a finding
_WIDTH: Final = 80


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; ``str()`` of it is a screen of 80 columns.

    Attributes:
        counts: what becomes of the model's parameters -> (tensors, elements). The words are "trains", "frozen by the
            plan", "frozen by PEFT", "frozen by requires_grad=False" and "in no optimizer"; a tied weight counts once.
        optimizer: its class, groups and rates; "": none was given.
        plan: the plan in force, or without an optimizer the one given: how much it freezes, and its fingerprint.
        state_bytes: of moments and masters, once there are some; None: not known of this optimizer.
        state_saved: how many more it would be with nothing frozen.
        tied: the names of each weight that has more than one.
        rounding: of each group with bfloat16 or float16 weights, how many the next update cannot change.
        warnings: what is wrong, each with its remedy.
    """

    counts: dict[str, tuple[int, int]]
    optimizer: str = ""
    plan: str = ""
    state_bytes: int | None = None
    state_saved: int | None = None
    tied: list[tuple[str, ...]] = field(default_factory=list)
    rounding: list[Rounded] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.warnings

    def __str__(self) -> str:
        total = sum(elements for _, elements in self.counts.values())
        lines = [f"{'':<30}{'tensors':>9}{'elements':>17}{'share':>9}"]
        for word, (tensors, elements) in self.counts.items():
            if tensors or word == "trains":
                lines.append(f"{word:<30}{tensors:>9,}{elements:>17,}{elements / max(total, 1):>9.2%}")
        facts = (
            ("optimizer", [self.optimizer or "none was given"]),
            ("plan", [self.plan or "none is in force"]),
            ("state", [] if self.state_bytes is None else [self._state()]),
            ("tied", [" = ".join(names) for names in self.tied]),
            ("rounding", [_rounding_line(one) for one in self.rounding]),
        )
        lines += ["", *(_wrapped(f"{word:<11}", line) for word, told in facts for line in told), ""]
        lines += ["Nothing is wrong." if self.ok else f"{_many(len(self.warnings), 'finding')}:"]
        return "\n".join([*lines, *(_wrapped("- ", warning) for warning in self.warnings)])

    def _state(self) -> str:
        held, saved = self.state_bytes or 0, self.state_saved or 0
        less = f", {saved / (held + saved):.1%} less than with nothing frozen" if saved else ""
        return f"{f'{held:,} bytes' if held < 1e6 else f'{held / 1e6:,.1f} MB'}{less}"


def _wrapped(start: str, text: str) -> str:
    indent = " " * len(start)
    return fill(text, _WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)


def _rounding_line(one: Rounded) -> str:
    start = f"group {one.group} ({one.dtype}, lr {one.lr:g}): "
    if math.isnan(one.share):
        return f"{start}not known before a backward pass, or of this optimizer"
    how = "by its state or gradients" if one.measured else "by an update of about lr"
    return f"{start}{one.share:.1%} of {one.elements:,} live elements cannot move ({how}{', sampled' * one.sampled})"


@torch.no_grad()
def check(model: Model, optimizer: Optimizer | None = None, plan: FreezePlan | None = None) -> CheckReport:
    """Look at a model, its optimizer and its plan before they are trained, or in between. Nothing is changed.

    Told are: parameters that train, and by what the others stand still; what trains in no optimizer; what the optimizer
    has that is not the model's; names of the plan that do not fit, that do not train, or that an adapter hides; a plan
    that no optimizer keeps; weights that are tied; and of bfloat16 and float16 weights without masters, how many are so
    large that their next update is rounded away: by the optimizer's state where it has some, else by an update as long
    as the rate, up or down alike. Of tensors of more than 1,048,576 live elements lines at equal distances are looked
    at. More than a tenth is a finding. Under FSDP2 bytes and rounding are of this rank, and all ranks must ask where a
    plan was carried to adapters.

    Args:
        model: a module, as it will be trained: wrapped, sharded, with adapters; a mapping name -> parameter, or pairs.
        optimizer: any torch optimizer; `accelerate`'s wrapper is looked through. None: what the rates do is not known,
            and all that requires gradients counts as trained.
        plan: what should be frozen. None: what the optimizer or its guards freeze.

    Raises:
        TypeError: an argument is something else.
    """
    try:
        named = named_tensors(model)
    except TypeError as error:
        raise TypeError(f"check: model is a {type(model).__name__}, {error}") from None
    while not isinstance(optimizer, MaskedAdam) and isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[union-attr]
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"check: optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer (or None)")
    if plan is not None and not isinstance(plan, FreezePlan):
        raise TypeError(f"check: plan is a {type(plan).__name__}, expected a FreezePlan (or None)")
    return _Examination(named, model, optimizer, plan).report()


class _Examination:
    """What `check` looks at.

    Attributes:
        named: (name, parameter) pairs of the model, with every name of a tied one.
        names: ``id`` of a parameter -> its names.
        params: the parameters, each once, in order.
        held: ``id`` of those that the optimizer has; without one, of all.
        in_force: the plans that something keeps.
        masks: ``id`` of a parameter -> what stands still of it by them.
        warnings: see `CheckReport`.
    """

    def __init__(
        self, named: list[tuple[str, Tensor]], model: Model, optimizer: Optimizer | None, plan: FreezePlan | None
    ) -> None:
        self.named, self.optimizer, self.warnings = named, optimizer, list[str]()
        self.names: dict[int, list[str]] = {}
        for name, p in named:
            self.names.setdefault(id(p), []).append(name)
        self.params = list({id(p): p for _, p in named}.values())
        self.by_peft = _frozen_by_peft(model)
        self.held = set(self.names) if optimizer is None else set(map(id, all_params(optimizer.param_groups)))
        self.in_force, self.masks = self._in_force(plan)
        adapted = [one for one in self.in_force if isinstance(one, AdaptedPlan)]
        self.plan = next((one for one in adapted if plan is not None and one.base == plan), plan)

    def _in_force(self, plan: FreezePlan | None) -> tuple[list[FreezePlan], dict[int, FreezeMask]]:
        """The plans that something keeps, and what they freeze of parameters of the optimizer."""
        optimizer, pairs = self.optimizer, list[tuple[Tensor, FreezeMask]]()
        if optimizer is None:
            plans = [] if plan is None else [plan]
            pairs = [(it.param, it.mask) for one in plans for it in _bound(one, self.named)[0]]
        elif isinstance(optimizer, MaskedAdam):
            plans = [optimizer.plan] if optimizer.plan else []
            groups = optimizer.param_groups
            kept = zip(all_params(groups), all_names(groups), strict=False)
            pairs = [(p, optimizer._masks[name]) for p, name in kept if name in optimizer._masks]
        else:
            guards = guards_of(optimizer)
            plans = [one.plan for one in guards]
            pairs = [(it.param, it.mask) for one in guards for it in _bound(one.plan, named_tensors(one.model))[0]]
        masks: dict[int, FreezeMask] = {}
        for p, mask in pairs:
            if mask.shape == tuple(p.shape) and p.requires_grad and id(p) in self.held:
                masks[id(p)] = masks[id(p)] | mask if id(p) in masks else mask
        return plans, masks

    def report(self) -> CheckReport:
        for plan in {one.fingerprint: one for one in (self.plan, *self.in_force) if one is not None}.values():
            self._check_plan(plan)
        if not self.warnings:
            self._check_force()
        counts = self._counts()
        rounding = [] if self.optimizer is None else rounded_away(self.optimizer, self.masks)
        if self.optimizer is not None:
            self._check_optimizer(self.optimizer)
        if self.params and not counts["trains"][1]:
            self._warn("nothing trains: no live element requires gradients and is in an optimizer")
        for one in rounding:
            self._check_rounding(one)
        held, whole = self._state_bytes()
        return CheckReport(
            counts=counts,
            optimizer=_described(self.optimizer),
            plan=" and ".join(map(_plan_line, self.in_force)),
            state_bytes=held,
            state_saved=None if whole is None or held is None else whole - held,
            tied=[tuple(names) for names in self.names.values() if len(names) > 1],
            rounding=rounding,
            warnings=self.warnings,
        )

    def _warn(self, text: str) -> None:
        self.warnings.append(text)

    def _counts(self) -> dict[str, tuple[int, int]]:
        words = "trains", "frozen by the plan", "frozen by PEFT", "frozen by requires_grad=False", "in no optimizer"
        counts = dict.fromkeys(words, (0, 0))
        for p in self.params:
            size, frozen = math.prod(_shape(p)), 0
            if not p.requires_grad:
                word = words[2] if id(p) in self.by_peft else words[3]
            elif id(p) not in self.held:
                word = words[4]
            else:
                word, frozen = words[0], self.masks[id(p)].frozen_count if id(p) in self.masks else 0
            for key, elements in ((word, size - frozen), (words[1], frozen)):
                if elements:
                    counts[key] = counts[key][0] + 1, counts[key][1] + elements
        return counts

    # -- the plan

    def _check_plan(self, plan: FreezePlan) -> None:
        """What of a plan does not fit the model, or freezes what does not train."""
        bound, reasons = _bound(plan, [(name, _stand_in(p)) for name, p in self.named])
        if reasons:
            many = f" in {len(reasons)} names, the first" if len(reasons) > 1 else ""
            self._warn(f"the plan does not fit{many}: {reasons[0]}")
        params = dict(self.named)
        still = [it for it in bound if not params[it.name].requires_grad]
        hidden = [it.plan_names[0] for it in still if ".base_layer." in it.name]
        others = [it.plan_names[0] for it in still if ".base_layer." not in it.name]
        if hidden:
            self._warn(
                f"{_listed(hidden, 'name')} of the plan: hidden by an adapter, which changes the weight that PEFT "
                "froze; sf.adapt(plan, model) carries the plan to the adapters"
            )
        if others:
            remedy = "sf.adapt(plan, model) leaves out what PEFT froze" if self.by_peft else "call requires_grad_(True)"
            self._warn(
                f"{_listed(others, 'name')} of the plan: requires_grad=False, so that nothing of it trains; take it "
                f"out of the plan, or {remedy}"
            )
        if isinstance(plan, AdaptedPlan):
            self.warnings.extend(plan.not_at_zero(bound, "the plan does not hold"))

    def _check_force(self) -> None:
        """Whether something keeps the plan that was given."""
        if self.plan is None or any(one == self.plan for one in self.in_force):
            return
        missing = extra = 0
        bound = {id(it.param): it.mask for it in _bound(self.plan, self.named)[0]}
        for p in self.params:
            given, kept = (masks.get(id(p)) or FreezeMask(p.shape) for masks in (bound, self.masks))
            if given != kept:
                both = (given | kept).frozen_count
                missing, extra = missing + both - kept.frozen_count, extra + both - given.frozen_count
        if not missing and not extra:
            return
        name = type(self.optimizer).__name__
        if not self.in_force:
            remedy = (
                "set_freeze(plan)" if isinstance(self.optimizer, MaskedAdam) else "sf.guard(optimizer, plan, model)"
            )
            self._warn(
                f"the plan is not in force: {name} was made without it, and moves the {missing:,} elements that it "
                f"freezes; make sf.MaskedAdamW(model.named_parameters(), freeze=plan), or call {remedy}"
            )
        else:
            self._warn(
                f"the plan given is not the one in force: {name} moves {missing:,} elements that it freezes, and "
                f"freezes {extra:,} that it does not; call set_freeze(plan), or guard under this plan"
            )

    # -- the optimizer

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        """Parameters that train in no optimizer, those that are not the model's, and groups that do not move."""
        left = [self.names[id(p)][0] for p in self.params if p.requires_grad and id(p) not in self.held]
        if left:
            self._warn(
                f"{_listed(left, 'parameter')}: gradients are computed, but no optimizer has them, and they do not "
                "train; give them to the optimizer, or call requires_grad_(False)"
            )
        bare = {bare_name(name) for name, _ in self.named}
        groups = optimizer.param_groups
        foreign = [
            name for p, name in zip(all_params(groups), all_names(groups), strict=False) if id(p) not in self.names
        ]
        replaced = [name for name in foreign if bare_name(name) in bare]
        others = [name for name in foreign if bare_name(name) not in bare]
        if replaced:
            self._warn(
                f"{_listed(replaced, 'parameter')} of the optimizer: the model has another tensor of that name, as "
                "after load_state_dict(assign=True), resizing or sharding, and it does not train; make the optimizer "
                "anew from the model"
            )
        if others:
            self._warn(
                f"{_listed(others, 'parameter')} of the optimizer: not among the model's; was a layer replaced after "
                "the optimizer was made, or is it for another model? Make it anew from model.named_parameters()"
            )
        idle = [index for index, group in enumerate(groups) if not rate_of(group) and group["params"]]
        if idle:
            self._warn(f"{_listed([f'group {index}' for index in idle], 'group')}: the rate is 0, and nothing moves")

    def _check_rounding(self, one: Rounded) -> None:
        if not one.share > _MOST_LOST or not one.lr:
            return
        masked = isinstance(self.optimizer, MaskedAdam)
        remedy = "master='remainder' (bfloat16)" if masked else "sf.MaskedAdamW(..., master='remainder') (bfloat16)"
        self._warn(
            f"group {one.group}: {one.share:.1%} of its live {one.dtype} elements are too large for lr {one.lr:g}: an "
            f"update is less than half the distance to the next number, and is rounded away; use {remedy}, "
            f"{'' if masked else 'its '}rounding='stochastic', float32 weights, or a higher rate"
        )

    def _state_bytes(self) -> tuple[int | None, int | None]:
        """Bytes of moments and masters, on this rank: as they will be, and with nothing frozen; of `MaskedAdamW`."""
        optimizer = self.optimizer
        if optimizer is not None and not isinstance(optimizer, MaskedAdam):
            return None, None
        settings = None if optimizer is None else optimizer._settings
        groups: Any = [{"params": self.params}] if optimizer is None else optimizer.param_groups
        held = whole = 0
        for group in groups:
            for p in group["params"]:
                if not p.requires_grad:
                    continue
                kept = torch.float32 if settings is None else settings.state_dtype
                per = (3 if group.get("amsgrad") else 2) * moment_dtype(p.dtype, kept).itemsize
                if settings is not None and settings.master is not None and p.dtype == torch.bfloat16:
                    per += torch.int16.itemsize
                numel = local(p).numel()
                mask = None if optimizer is not None and optimizer._whole else self.masks.get(id(p))
                held += per * (numel if mask is None else local_mask(mask, p).live_count)
                whole += per * numel
        return held, whole


def _bound(plan: FreezePlan, named: Sequence[tuple[str, Tensor]]) -> tuple[list[BoundMask], list[str]]:
    """What of a plan fits, and why the rest does not."""

    def tried(part: Mapping[str, FreezeMask]) -> list[BoundMask] | str:
        try:
            return bind(part, named, operation="check", require_grad=False)
        except ValueError as error:
            return str(error).removeprefix("check: ")

    whole = tried(plan)
    if not isinstance(whole, str):
        return whole, []
    each = [tried({name: mask}) for name, mask in plan.items()]
    bound = [entry for found in each if not isinstance(found, str) for entry in found]
    return bound, [found for found in each if isinstance(found, str)] or [whole]


def _frozen_by_peft(model: Any) -> set[int]:
    """``id`` of the parameters that PEFT froze: all that do not train but those of adapters themselves."""
    # whoever made adapters has imported it
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, torch.nn.Module):
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers and not any(isinstance(module, peft.PeftModel) for module in model.modules()):
        return set()
    bases = {id(p) for layer in layers for p in layer.get_base_layer().parameters()}
    adapters = {id(p) for layer in layers for p in layer.parameters()} - bases
    return {id(p) for p in model.parameters() if not p.requires_grad} - adapters


def _shape(p: Any) -> tuple[int, ...]:
    """Shape of a parameter; of a 4-bit one that of the weight it stands for."""
    return tuple(getattr(getattr(p, "quant_state", None), "shape", p.shape))


def _stand_in(p: Tensor) -> Tensor:
    """What a plan is bound to: of a 4-bit weight a tensor of the shape that it stands for."""
    shape = _shape(p)
    return p if shape == tuple(p.shape) else torch.empty(shape, device="meta")


def _described(optimizer: Optimizer | None) -> str:
    if optimizer is None:
        return ""
    rates = sorted({rate_of(group) for group in optimizer.param_groups})
    options = []
    if isinstance(optimizer, MaskedAdam):
        settings = optimizer._settings
        options = ["float32 masters"] * (settings.master is not None) + ["stochastic rounding"] * (
            settings.rounding == "stochastic"
        )
    guards = len(guards_of(optimizer))
    told = [
        type(optimizer).__name__ + (f" under {_many(guards, 'guard')}" if guards else ""),
        _many(len(optimizer.param_groups), "group"),
        f"lr {' to '.join(f'{rate:g}' for rate in dict.fromkeys((rates[0], rates[-1])))}",
        *options,
    ]
    return ", ".join(told)


def _plan_line(plan: FreezePlan) -> str:
    told = f"{plan.fingerprint[:12]}, {plan.frozen_fraction:.1%} of {_many(len(plan), 'parameter')}"
    return f"{told}, carried to adapters from {plan.base.fingerprint[:12]}" if isinstance(plan, AdaptedPlan) else told


def _many(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _listed(names: Iterable[str], word: str) -> str:
    """How many there are, and the first two."""
    names = list(names)
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{_many(len(names), word)} ({', '.join(map(repr, names[:2]))}{more})"
