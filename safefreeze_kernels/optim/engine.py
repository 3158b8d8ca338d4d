"""An engine between an optimizer and its parameters: DeepSpeed's ZeRO steps flat partitions, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..model.flat import Partition
from ..plan.mask import FreezeMask
from .checks import Member, all_params
from .flat import adopt_notes, together
from .launch import LaunchPlans
from .state import Loaded


class Launches:
    """An optimizer's launch plans: one set of them, or one for each of the partitions that an engine puts into its
    groups, kept while it steps the others.

    Attributes:
        now: those for what the groups have now.
    """

    def __init__(self) -> None:
        self.now = LaunchPlans()
        self._by_partition: dict[tuple[int, ...], LaunchPlans] = {}

    def __iter__(self) -> Iterator[LaunchPlans]:
        yield from {id(plans): plans for plans in (self.now, *self._by_partition.values())}.values()

    def look(self, groups: Sequence[dict[str, Any]]) -> None:
        """See what the groups have now."""
        if self._by_partition:
            self.now = self._by_partition.setdefault(_present(groups), LaunchPlans())

    def are_of_partitions(self, groups: Sequence[dict[str, Any]]) -> None:
        """What the groups have now are flat partitions."""
        self._by_partition[_present(groups)] = self.now

    def of(
        self, state: dict[Tensor, dict[str, Any]], groups: Sequence[dict[str, Any]]
    ) -> Mapping[Tensor, dict[str, Any]]:
        """The part of an optimizer's state that belongs to what the groups have now."""
        return {p: state[p] for p in all_params(groups)} if self._by_partition else state


def _present(groups: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    return tuple(map(id, all_params(groups)))


TOO_EARLY: Final = (
    "it was built before deepspeed was imported, so that the engine's norm counted frozen gradients; import deepspeed "
    "first"
)


def refuse_pieces(members: Sequence[Member], operation: str) -> None:
    """Raise ValueError where this rank holds pieces of parameters, not parameters."""
    if any(member.piece is not None for member in members):
        raise ValueError(
            f"{operation}: DeepSpeed ZeRO keeps the float32 weights, and this rank has pieces of them; use "
            "deepspeed.utils.safe_get_full_fp32_param"
        )


def look_at(
    partitions: Sequence[Partition], members: Sequence[Member], masks: Mapping[str, FreezeMask],
    groups: Sequence[dict[str, Any]], state: Mapping[Tensor, Mapping[str, Any]], what: str,
) -> Loaded | None:  # fmt: skip
    """What is looked at before the partitions are stepped for the first time, or again since state was replaced: what
    an engine that loaded them tells (`adopt_notes`), and that its copies leave frozen bytes as they are."""
    _check_copies(partitions, members, what)
    return adopt_notes(groups, masks, state, what)


def _check_copies(partitions: Sequence[Partition], members: Sequence[Member], what: str) -> None:
    """Raise ValueError unless the engine's copies of the partitions into the model, which it makes after every step,
    leave the model's frozen bytes what they are: a NaN's payload may be lost on the way to 16 bits."""
    for partition, some in together(partitions, members):
        for piece, member in zip(partition.pieces, some, strict=True):
            if (mask := member.shard_mask).frozen_count == 0:
                continue
            copy = partition.copy_of(piece).to(member.param.device)
            if copy.dtype == member.param.dtype:
                continue
            frozen = mask.dense().to(copy.device).view(-1)
            now, then = copy[frozen], member.param.detach().reshape(-1)[frozen].to(copy.dtype)
            if not torch.equal(now.view(torch.int16), then.view(torch.int16)):
                raise ValueError(
                    f"{what}: frozen {member.name!r} has values in the model (such as NaN) that DeepSpeed's copies of "
                    f"its float32 partition would change to other bytes of {copy.dtype}; clean them, or use float32"
                )
