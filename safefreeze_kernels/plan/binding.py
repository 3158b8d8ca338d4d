"""Finding the parameters that a plan names, whatever wraps them. Asks tensors only for what all of them have."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from .mask import FreezeMask

if TYPE_CHECKING:  # auditors read plans without torch
    import torch
    from torch import Tensor

Model: TypeAlias = "torch.nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]"


@dataclass(frozen=True)
class BoundMask:
    """A mask and the parameter it was found to name.

    ``name`` is the parameter's, ``plan_names`` what the plan calls it: more than one if it is tied.
    """

    name: str
    param: Tensor
    mask: FreezeMask
    plan_names: list[str]


def named_tensors(model: Model) -> list[tuple[str, Tensor]]:
    """(name, tensor) pairs of a model, with every name of a tied tensor; also takes a mapping or pairs."""
    import torch

    if isinstance(model, torch.nn.Module):
        return list(model.named_parameters(remove_duplicate=False))
    pairs: list[Any] = []
    if isinstance(model, Iterable):
        pairs = list(model.items()) if isinstance(model, Mapping) else list(model)
    if not isinstance(model, Iterable) or not all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], torch.Tensor) for pair in pairs
    ):
        raise TypeError("expected a torch.nn.Module, a mapping name -> tensor, or (name, tensor) pairs")
    return pairs


def bind(
    plan: Mapping[str, FreezeMask],
    named: Sequence[tuple[str, Tensor]],
    *,
    operation: str,
    require_grad: bool = True,
    twins: bool = False,
    absent: bool = False,
) -> list[BoundMask]:
    """Find the parameter of every mask. One entry per tensor, however many names it has. ``twins``: a tied weight may
    come as two tensors over the same bytes, as in a state dict: who only reads does not mind. ``absent``: values may
    be elsewhere, as those of DeepSpeed's ZeRO-3 are between modules.

    Raises:
        ValueError: naming the parameter: missing, one of two of that name, of another shape, tied with two different
            masks, sharing storage with another parameter, or (with ``require_grad``) not requiring gradients.
    """
    by_name = dict(named)
    twice = {name: param for name, param in named if by_name[name] is not param}
    for name, param in named:
        if hasattr(param, "_fsdp_flattened"):
            raise ValueError(
                f"{operation}: {name!r} is part of a flat buffer (FSDP1), in which rows and columns cannot be found; "
                "shard with torch.distributed.fsdp.fully_shard (FSDP2) or DeepSpeed ZeRO, or train with DDP"
            )

    @functools.cache
    def bare_names() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for given in by_name:
            found.setdefault(bare_name(given), []).append(given)
        return found

    bound: dict[int, BoundMask] = {}
    for name, mask in plan.items():
        plan_name = name
        if name not in by_name:
            name = _unwrapped(name, by_name, bare_names(), operation)
        param = by_name[name]
        if name in twice:
            raise ValueError(
                f"{operation}: two different parameters, of shapes {tuple(twice[name].shape)} and "
                f"{tuple(param.shape)}, are both named {name!r}, and the plan cannot mean both; give them distinct "
                "names in the plan and in what is passed, for example ('actor.' + name, parameter) and "
                "('critic.' + name, parameter)"
            )
        entry = bound.setdefault(id(param), BoundMask(name, param, mask, []))
        _refuse_misfit(entry, name, mask, operation, require_grad)
        if not absent and tuple(param.shape) != whole_shape(param):
            raise ValueError(
                f"{operation}: the values of {name!r} are spread over ranks by DeepSpeed ZeRO-3; gather them, on all "
                "ranks: with deepspeed.zero.GatheredParameters(list(model.parameters())): ..."
            )
        entry.plan_names.append(plan_name)
    _refuse_overlap(list(bound.values()), named, operation, twins_allowed=twins)
    return list(bound.values())


def _refuse_misfit(entry: BoundMask, name: str, mask: FreezeMask, operation: str, require_grad: bool) -> None:
    """A mask that does not fit the parameter of this name, or not the mask it has under another name."""
    param = entry.param
    if whole_shape(param) != mask.shape:
        raise ValueError(
            f"{operation}: {name!r} has shape {whole_shape(param)}, the plan expects {mask.shape}; build a plan "
            "for the shape it has (where it grew, an optimizer takes that by set_freeze and keeps its state)"
        )
    if require_grad and not param.requires_grad:
        adapters = "; sf.adapt(plan, model) carries a plan to the adapters of its weights"
        raise ValueError(
            f"{operation}: {name!r} has requires_grad=False, but the plan freezes part of it; it would not train "
            f"at all: take it out of the plan, or call requires_grad_(True){adapters if '.base_layer.' in name else ''}"
        )
    if entry.mask is not mask and entry.mask != mask:
        raise ValueError(
            f"{operation}: {entry.name!r} and {name!r} are one tied tensor with two different masks; "
            "give it one mask, for example the union"
        )


# What wrappers put into the names of parameters: torch's DDP and DataParallel, compile, FSDP1 and checkpointing.
_WRAPPERS: Final = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The same of PEFT: its model, adapted layers, and layers trained whole; what it adds to them keeps its name.
_ADAPTED: Final = re.compile(r"^base_model\.model\.|(?:^|(?<=\.))(?:base_layer|token_adapter|modules_to_save\.\w+)\.")


def whole_shape(param: Any) -> tuple[int, ...]:
    """The shape of a parameter, wherever its values are: of one that ZeRO-3 took away it is another than that of the
    tensor."""
    return tuple(getattr(param, "ds_shape", param.shape))


def bare_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    name = _WRAPPERS.sub("", name)
    return name if "lora_" in name else _ADAPTED.sub("", name)


def _unwrapped(name: str, by_name: Mapping[str, Tensor], bare: Mapping[str, list[str]], operation: str) -> str:
    """The name among ``by_name`` that a plan means by ``name``, wrappers aside. ``bare``: bare name -> those names."""
    matches = bare.get(bare_name(name), [])
    if len({id(by_name[given]) for given in matches}) == 1:
        return matches[0]
    origin = "" if matches else computed_from(name, by_name)
    near = matches or difflib.get_close_matches(name, by_name, n=2)
    raise ValueError(
        f"{operation}: the plan names {name!r}, which "
        + (
            f"may be any of {len(matches)} parameters"
            if matches
            else f"is not among the {len(by_name)} parameters given"
        )
        + (
            origin
            or (f"; nearest: {', '.join(map(repr, near))}" if near else "")
            + "; is it a plan for another model, or in the names of another library? (a tied weight: pass "
            "model.named_parameters(remove_duplicate=False), so that either name is known)"
        )
    )


def computed_from(name: str, given: Iterable[str]) -> str:
    """What to say of a weight that is computed from others among ``given``; empty if it is not."""
    wanted = bare_name(name)
    path, _, leaf = wanted.rpartition(".")
    start = f"{path}." if path else ""
    parts = [
        other
        for other in given
        if (bare := bare_name(other)).startswith(f"{start}parametrizations.{leaf}.original")
        or bare in (f"{wanted}_g", f"{wanted}_v", f"{wanted}_orig")
    ]
    if not parts:
        return ""
    return (
        f": it is computed from {' and '.join(map(repr, parts))} by a parametrization, weight norm, spectral norm or "
        "pruning, and its rows cannot be frozen through them; remove that first "
        "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove …)"
    )


def _own_memory(param: Any) -> Tensor:
    """The tensor that has the memory: of a sharded one (DTensor), the shard this rank holds."""
    memory: Tensor = param.detach().to_local() if hasattr(param, "to_local") else param
    return memory


def _refuse_overlap(
    bound: list[BoundMask], named: Sequence[tuple[str, Tensor]], operation: str, *, twins_allowed: bool
) -> None:
    """Two different parameters over the same bytes: freezing one could not hold while the other trains."""
    import torch

    masked = {id(entry.param) for entry in bound}
    spans: list[tuple[int, int, str, int]] = []
    for identity, (name, param) in {id(param): (name, _own_memory(param)) for name, param in reversed(named)}.items():
        if param.numel() and param.layout == torch.strided and param.device.type != "meta":
            reach = param.numel()
            if not param.is_contiguous():
                reach = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True)) + 1
            start = param.data_ptr()
            spans.append((start, start + reach * param.element_size(), name, identity))
    spans.sort()
    furthest: tuple[int, int, str, int] | None = None
    for span in spans:
        if twins_allowed and furthest and span[:2] == furthest[:2]:
            continue
        if furthest and span[0] < furthest[1] and (span[3] in masked or furthest[3] in masked):
            raise ValueError(
                f"{operation}: {furthest[2]!r} and {span[2]!r} share storage but are different parameters; "
                "a frozen part of one could be moved through the other"
            )
        if furthest is None or span[1] > furthest[1]:
            furthest = span
