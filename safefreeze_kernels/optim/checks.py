"""What an optimizer is given, checked: settings, hyper-parameters, parameters, and their names under a plan."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from ..grads.checks import overlaps_itself
from ..kernels.operands import STORAGE, WIDE
from ..model.flat import Partition, Piece, partitions
from ..model.sharding import held, local, shard_number
from ..plan.binding import bare_name, bind, whole_shape
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan

# ----------------------------------------------------------------------------------- settings, hyper-parameters


@dataclass(frozen=True)
class Settings:
    """What `MaskedAdam` has beside torch's hyper-parameters; its docstring says what each is.

    Raises:
        ValueError: one of them is none that it takes. ``optimizer`` is the name of its class, for errors.
    """

    optimizer: str
    backend: str
    state_dtype: torch.dtype
    master: str | None
    rounding: str
    seed: int
    dense_checkpoints: bool

    def __post_init__(self) -> None:
        what, seed = self.optimizer, self.seed
        if self.state_dtype not in (torch.float32, torch.bfloat16, torch.int8):
            raise ValueError(
                f"{what}: state_dtype is {self.state_dtype}, expected torch.float32, torch.bfloat16 or torch.int8"
            )
        valid = {"master": (None, "remainder"), "rounding": ("nearest", "stochastic")}
        for word, values in valid.items():
            if (got := getattr(self, word)) not in values:
                raise ValueError(f"{what}: {word} is {got!r}, expected {' or '.join(map(repr, values))}")
        if self.master is not None and self.rounding == "stochastic":
            raise ValueError(
                f"{what}: rounding is 'stochastic' with masters, which lose nothing; leave out one of the two"
            )
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"{what}: seed is {seed!r}, expected an integer from 0 to 2**64 - 1")


def hyper_parameters(group: Mapping[str, Any]) -> tuple[float, float, float, float, float]:
    """(lr, beta1, beta2, eps, weight_decay) of a parameter group, as numbers.

    Raises:
        ValueError: one is out of range, NaN or infinite. The words are torch's, which callers and tests match.
    """
    lr, eps, weight_decay, betas = _number(group["lr"], "lr"), group["eps"], group["weight_decay"], group["betas"]
    if not 0.0 <= lr < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"Invalid epsilon value: {eps}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    for index, beta in enumerate(betas):
        if not 0.0 <= _number(beta, f"betas[{index}]") < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    return float(lr), float(betas[0]), float(betas[1]), float(eps), float(weight_decay)


def _number(value: Any, name: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element")
    return value.item()


def check_defaults(defaults: Mapping[str, Any], what: str) -> None:
    """Raise what torch raises of options that exclude each other, in its words; ValueError of what is not supported."""
    if defaults["differentiable"]:
        raise ValueError(f"{what}: differentiable=True is not supported; use torch.optim for it")
    if defaults["fused"] and defaults["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    for word, value in (("lr", defaults["lr"]), *((f"betas[{i}]", beta) for i, beta in enumerate(defaults["betas"]))):
        if isinstance(value, Tensor) and defaults["foreach"] and not defaults["capturable"]:
            raise ValueError(f"{word} as a Tensor is not supported for capturable=False and foreach=True")
    hyper_parameters(defaults)


# --------------------------------------------------------------------------------------------------- parameters


def check_parameter(p: Tensor, what: str, name: str | None = None) -> None:
    """Raise TypeError if ``p`` is not what kernels can step."""
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


def check_trained(p: Tensor, settings: Settings, name: str | None = None) -> None:
    """Raise TypeError if ``p`` is not what an optimizer of these settings trains."""
    what, label = settings.optimizer, f"parameter {name!r}" if name else "a parameter"
    check_parameter(p, what, name)
    if settings.master is not None and p.dtype == torch.float16:
        raise TypeError(f"{what}: {label} is float16, expected bfloat16 or float32 with master='remainder'; convert it")
    if settings.state_dtype != torch.float32 and p.dtype == torch.complex64:
        raise TypeError(
            f"{what}: {label} is complex64, whose moments are complex64, but state_dtype is {settings.state_dtype}; "
            "leave state_dtype out, or give it an optimizer of its own"
        )


def checked_plan(plan: Any, what: str) -> FreezePlan:
    if not isinstance(plan, FreezePlan):
        raise TypeError(f"{what}: freeze is a {type(plan).__name__}, expected a FreezePlan (or None)")
    return plan


class Exchanged:
    """Parameters that a model has taken others for: looked for, and told of once. ``what``: the optimizer's name."""

    def __init__(self, what: str) -> None:
        self._what, self._warned = what, False

    def nothing_trains(self, *, refuse: bool) -> None:
        """No parameter has a gradient. RuntimeError, if ``refuse`` and it is the first time."""
        text = f"{self._what}: no parameter has a gradient at this step"
        remedy = (
            "if the model's parameters were replaced after the optimizer was built (load_state_dict(assign=True), "
            "resizing, sharding, wrapping), the optimizer has the old ones: build it afterwards"
        )
        if refuse and not self._warned:
            raise RuntimeError(f"{text}; {remedy}")
        self._warn(f"{text}, and nothing trains; {remedy}")

    def look(self, groups: list[dict[str, Any]], state: Mapping[Tensor, Any], masks: Mapping[str, FreezeMask]) -> None:
        """Look for parameters that train, have no gradient, and to which only an optimizer, in its ``groups`` and its
        ``state``, refers. ValueError if one of ``masks``, by name, freezes something of one."""
        counts = [sys.getrefcount(p) for group in groups for p in group["params"]]
        (alone,) = [sys.getrefcount(p) for p in [torch.empty(0)]]
        lost = [
            name
            for p, name, count in zip(all_params(groups), all_names(groups), counts, strict=False)
            if count <= alone + (p in state) and p.requires_grad and p.grad is None
        ]
        if not lost:
            return
        planned = [name for name in lost if name in masks and masks[name].frozen_count]
        text = (
            f"{self._what}: {(planned or lost)[0]!r} has no gradient, and nothing but this optimizer refers "
            f"to it{f' (and {len(lost) - 1} more)' if len(lost) > 1 else ''}: the model has another parameter in its "
            "place, as after load_state_dict(assign=True), resizing, weight_norm, sharding or wrapping; build the "
            "optimizer afterwards, or give it the new parameter in param_groups and state"
        )
        if planned:
            raise ValueError(text)
        self._warn(text)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, RuntimeWarning, stacklevel=4)


# -------------------------------------------------------------------------------------------- names and masks


def all_params(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


def all_names(groups: list[dict[str, Any]]) -> list[str]:
    """A name per parameter, for errors and for ages: the caller's, or its place among the groups."""
    return [
        name
        for index, group in enumerate(groups)
        for name in group.get("param_names")
        or [f"param_groups[{index}]['params'][{i}]" for i in range(len(group["params"]))]
    ]


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter in an optimizer's groups, or a piece of one in a flat partition.

    Attributes:
        param: as the groups have it, sharded or not; of a piece, the piece.
        name: see `all_names`.
        mask: what is frozen of the whole parameter; of a piece, of its matrix.
        group: index of its group.
        number: tells it, and this rank's shard of it, apart in the noise of stochastic rounding.
        whole: whether its state is of its own shape, with what is frozen in it.
        piece, flat: where it is in which flat tensor; None: it is no piece.
    """

    param: Tensor
    name: str
    mask: FreezeMask
    group: int
    number: int
    whole: bool = False
    piece: Piece | None = None
    flat: Tensor | None = None

    @property
    def owner(self) -> Tensor:
        """What the groups have, with a gradient."""
        return self.param if self.flat is None else self.flat

    def fitted(self, mask: FreezeMask) -> FreezeMask:
        """A mask of the whole parameter, of the matrix if this is a piece of it."""
        return mask if self.piece is None else mask.matrix()

    @property
    def packing(self) -> FreezeMask:
        """What its state is packed by."""
        return FreezeMask(self.mask.shape) if self.whole else self.mask

    @property
    def shard_packing(self) -> FreezeMask:
        """What the shard's state is packed by."""
        return FreezeMask(self.shard_mask.shape) if self.whole else self.shard_mask

    @cached_property
    def shard(self) -> Tensor:
        """What this rank holds of the parameter."""
        return local(self.param)

    @cached_property
    def shard_index(self) -> list[np.ndarray] | None:
        """Per dimension, which indices of the parameter (of its matrix) the shard has; None: all."""
        return held(self.param) if self.piece is None else self.piece.held

    @property
    def shard_mask(self) -> FreezeMask:
        return self.mask.shard(self.shard_index)


class GivenNames:
    """The names that an optimizer's parameters were given by, which tie a plan to them.

    Attributes:
        aliases: every further name of a tied tensor -> its name in the groups.
        flat: id of a flat tensor that was found in the parameters' place -> what lies in it.
    """

    def __init__(self) -> None:
        self.aliases: dict[str, str] = {}
        self.flat: dict[int, Partition] = {}
        self._given: dict[int, tuple[ref[Tensor], str]] = {}  # id of a parameter -> itself, and its name

    def __getstate__(self) -> dict[str, Any]:
        return {"aliases": self.aliases, "flat": {}, "_given": {}}  # a copy has parameters of its own: `note` them

    def note(self, groups: Iterable[dict[str, Any]]) -> None:
        """Remember which name each parameter of ``groups`` has."""
        for group in groups:
            names = group.get("param_names", ())
            for name, p in zip(names, group["params"], strict=False) if len(names) == len(group["params"]) else ():
                self._given[id(p)] = ref(p), name

    def given(self) -> list[tuple[str, Tensor]]:
        """The parameters that were given by name and are still there, wherever an engine keeps their values."""
        return [(name, p) for known, name in self._given.values() if (p := known()) is not None]

    def named(self, groups: list[dict[str, Any]]) -> list[tuple[str, Tensor]]:
        """The parameters that ``groups`` have, or that flat partitions are of."""
        return self.given() if self.flat else list(zip(all_names(groups), all_params(groups), strict=True))

    def partitions(self, groups: Sequence[dict[str, Any]], what: str) -> list[Partition]:
        """The flat partitions in ``groups`` or, if these are empty, all; none: they have the parameters themselves."""
        params = all_params(groups)
        if not self._given or (params and all(id(p) in self._given for p in params)):
            return []
        if not params or not all(id(p) in self.flat for p in params):
            named = self.given()
            found = partitions(dict(named), groups, what)
            if not found:
                return []
            if len(dict(named)) < len(named):
                raise ValueError(f"{what}: two parameters have one name, expected a name for each")
            self.flat = {id(it.tensor): it for it in found} | self.flat
            lost = next((p for p in params if id(p) not in self.flat), None)
            if lost is not None:
                raise ValueError(
                    f"{what}: a parameter of shape {tuple(lost.shape)} was put into a group, and is no partition that "
                    "DeepSpeed knows; take it out"
                )
            params = params or [it.tensor for it in found]
        return [self.flat[id(p)] for p in params]

    def whole(self, members: Sequence[Member]) -> list[tuple[Tensor, FreezeMask, str]]:
        """The parameters that ``members`` are, or are pieces of, each once, with mask and name."""
        given = dict(self.given()) if any(member.piece is not None for member in members) else {}
        found = {member.name: member for member in members}
        return [
            (member.param if member.piece is None else given[member.name], member.mask, member.name)
            for member in (found.values() if given else members)
        ]

    def members(
        self, groups: list[dict[str, Any]], plan: FreezePlan | None, what: str, *, whole: bool = False,
        require_grad: bool = False,
    ) -> list[Member]:  # fmt: skip
        """Every parameter of ``groups`` with its mask under ``plan``: nothing is frozen of what that does not name.

        ``whole``: whether state is. ``require_grad``: for a plan that comes into force; state can be saved after
        ``requires_grad_(False)`` too.

        Raises:
            ValueError: the plan does not fit (contract 6).
        """
        if found := self.partitions(groups, what):
            masks = self._masks(plan, self.given(), what, require_grad)
            return list(self._pieces(found, groups, masks, whole))
        params, names = all_params(groups), all_names(groups)
        if plan:
            self._check(groups, what)
        masks = self._masks(plan, list(zip(names, params, strict=True)) if plan else [], what, require_grad)
        group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
        return [
            Member(
                p,
                name,
                masks.get(id(p)) or FreezeMask(whole_shape(p)),
                group,
                place + len(params) * shard_number(p),
                whole,
            )
            for place, (p, name, group) in enumerate(zip(params, names, group_of, strict=True))
        ]

    def _masks(
        self, plan: FreezePlan | None, named: list[tuple[str, Tensor]], what: str, require_grad: bool
    ) -> dict[int, FreezeMask]:
        """The mask of each parameter among ``named`` that the plan freezes something of, by the parameter's id."""
        by_name = dict(named)
        named = named + [(alias, by_name[name]) for alias, name in self.aliases.items() if name in by_name]
        bound = bind(plan or {}, named, operation=what, require_grad=require_grad, absent=True) if plan else []
        return {id(it.param): it.mask for it in bound}

    def _pieces(
        self, found: Sequence[Partition], groups: Sequence[dict[str, Any]], masks: Mapping[int, FreezeMask], whole: bool
    ) -> Iterator[Member]:
        group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        named = self.given()
        place_of = {name: place for place, (name, _) in enumerate(named)}
        mask_of = {name: (masks.get(id(p)) or FreezeMask(whole_shape(p))).matrix() for name, p in named}
        for partition in found:
            flat, before, nth = partition.tensor, "", 0
            for piece, view in zip(partition.pieces, partition.views, strict=True):
                nth, before = (nth + 1 if piece.name == before else 0), piece.name
                number = 4 * place_of[piece.name] + nth  # a stretch has three pieces at most
                group = group_of.get(id(flat), partition.group)
                yield Member(view, piece.name, mask_of[piece.name], group, number, whole, piece, flat)

    def _check(self, groups: list[dict[str, Any]], what: str) -> None:
        """Raise ValueError where names are missing, or no longer tell of the parameters beside them."""
        for index, group in enumerate(groups):
            names, params = group.get("param_names"), group["params"]
            if names is None:
                raise ValueError(
                    f"{what}: a plan freezes by name, but the parameters were given without names; pass "
                    "model.named_parameters() instead of model.parameters(), or in the groups' 'params' "
                    "(name, parameter) pairs"
                )
            if len(names) != len(params):
                raise ValueError(
                    f"{what}: param_groups[{index}] has {len(params)} parameters and {len(names)} names: parameters "
                    "were taken out or replaced after the optimizer was built; change 'param_names' with them, or "
                    "build it anew. (Where DeepSpeed put flat tensors in their place and does not say what lies where, "
                    "as with fp16 or bf16 and no ZeRO, set zero_optimization.stage to 1, 2 or 3, or train with "
                    "torch.distributed.fsdp.fully_shard (FSDP2) or DDP)"
                )
            for name, p in zip(names, params, strict=True):
                known, given = self._given.get(id(p), (None, name))
                if known is not None and given != name and known() is p and bare_name(given) != bare_name(name):
                    raise ValueError(
                        f"{what}: param_groups[{index}] has {given!r} where its 'param_names' say {name!r}: "
                        "parameters were reordered after the optimizer was built; reorder 'param_names' with them"
                    )

    def without_duplicates(self, params: Any) -> Any:
        """``params``, as given to an optimizer, with a tied tensor once, under its first name; `aliases` has others."""
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
                        self.aliases[name] = known
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


def of_an_earlier_version(state: Mapping[str, Any], optimizer: str) -> dict[str, Any]:
    """What a copy of an optimizer has now, from what one has that was pickled when settings were attributes."""
    fields = ("backend", "state_dtype", "master", "rounding", "seed", "dense_checkpoints")
    names = GivenNames()
    names.aliases = state["_aliases"]
    masks = {"_masks": state["_in_force"]} if "_in_force" in state else {}
    return {"_settings": Settings(optimizer, *(state[f"_{field}"] for field in fields)), "_names": names, **masks}
