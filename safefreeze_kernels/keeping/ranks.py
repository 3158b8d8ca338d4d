"""What several processes do together when a keeper looks: which prompts each runs, and how they come to one plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from ..attribution.gradients import Take, stream_gradients
from ..attribution.grains import Grains
from ..model.flat import in_engine
from ..model.fsdp import fsdp_mesh, stream_shards
from ..model.sharding import cuts, gathered, held, is_sharded, local


class Ranks(Protocol):
    """The processes that look at one model together."""

    def share(self, rows: list[int]) -> tuple[list[int], float]:
        """Which of these rows this rank runs, at least one; and how much the mean over them counts."""

    def stream(
        self, model: torch.nn.Module, names: Iterable[str], value: Callable[[torch.nn.Module], Tensor], take: Take
    ) -> Tensor:
        """As `stream_gradients`; of what this rank holds."""

    def reduce(self, grains: Grains, name: str, parameter: Tensor, values: Tensor | None) -> Tensor:
        """What a choice needs of the values of what this rank holds of a parameter; None: they are 0."""

    def agreed(self, numbers: Sequence[Tensor], reduced: Mapping[str, Tensor]) -> tuple[list[float], Any]:
        """Scalars and what `reduce` made of each parameter, the same to the bit on every rank, of the whole model."""


def ranks_of(model: torch.nn.Module, operation: str) -> Ranks:
    """Those that train ``model``.

    Raises:
        ValueError: it is sharded in another way than by FSDP2.
    """
    if any(map(in_engine, model.parameters())):
        raise ValueError(
            f"{operation}: DeepSpeed ZeRO takes gradients away as soon as they are there, and a look needs them; train "
            "with torch.distributed.fsdp.fully_shard (FSDP2) or DDP"
        )
    mesh = fsdp_mesh(model, operation)
    return Whole() if mesh is None else Sharded(model, mesh)


class Whole:
    """Each rank holds the whole model, or there is one alone: all run all rows, and what the first finds holds."""

    def share(self, rows: list[int]) -> tuple[list[int], float]:
        return rows, 1.0

    def stream(
        self, model: torch.nn.Module, names: Iterable[str], value: Callable[[torch.nn.Module], Tensor], take: Take
    ) -> Tensor:
        return stream_gradients(model, names, value, take)

    def reduce(self, grains: Grains, name: str, parameter: Tensor, values: Tensor | None) -> Tensor:
        return grains.nothing(name, parameter.device) if values is None else grains.reduce(name, values)

    def agreed(self, numbers: Sequence[Tensor], reduced: Mapping[str, Tensor]) -> tuple[list[float], Any]:
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for tensor in (*numbers, *reduced.values()):
                dist.broadcast(tensor.view(torch.uint8) if tensor.dim() else tensor, src=0)
        return [float(number) for number in numbers], reduced


class Sharded:
    """FSDP2: each rank runs its share of the rows, and sees the gradients of its shards, means over all rows."""

    def __init__(self, model: torch.nn.Module, mesh: Any) -> None:
        self._mesh = mesh
        self._parameters = dict(model.named_parameters())
        self._device = torch.device(mesh.device_type)  # where its collectives work
        cut = {dim for dim, _ in cuts(next(p for p in self._parameters.values() if is_sharded(p)))}
        #: groups of ranks that hold different shards, and copies of the same ones
        self._cut = [mesh.get_group(dim) for dim in range(mesh.ndim) if dim in cut]
        self._copies = [mesh.get_group(dim) for dim in range(mesh.ndim) if dim not in cut]

    def share(self, rows: list[int]) -> tuple[list[int], float]:
        number, size = int(np.ravel_multi_index(self._mesh.get_coordinate(), self._mesh.shape)), self._mesh.size()
        mine = rows[len(rows) * number // size : len(rows) * (number + 1) // size]
        # who has none runs one all the same: the others wait for its part of the parameters
        return mine or rows[:1], size * len(mine) / len(rows)

    def stream(
        self, model: torch.nn.Module, names: Iterable[str], value: Callable[[torch.nn.Module], Tensor], take: Take
    ) -> Tensor:
        return stream_shards(model, names, value, take, "RefusalKeeper.look")

    def reduce(self, grains: Grains, name: str, parameter: Tensor, values: Tensor | None) -> Tensor:
        shard = local(parameter)
        if values is None:
            values = torch.zeros(1, device=shard.device).expand(shard.shape)
        found = grains.reduce(name, values, held(parameter))
        return found.view(shard.shape) if grains.grain == "element" else found

    def agreed(self, numbers: Sequence[Tensor], reduced: Mapping[str, Tensor]) -> tuple[list[float], Any]:
        dist = torch.distributed
        both = torch.stack([number.detach().double() for number in numbers]).to(self._device)
        for group in (*self._cut, *self._copies):
            dist.all_reduce(both, group=group)
        found = (both / self._mesh.size()).tolist()
        if not reduced or next(iter(reduced.values())).dtype == torch.int16:
            for part in reduced.values():
                self._same_on_copies(part)
            return found, _Gathered(reduced, self._parameters)
        lines = torch.cat(list(reduced.values())).to(self._device)
        for group in self._cut:
            dist.all_reduce(lines, group=group)
        self._same_on_copies(lines)
        parts = torch.split(lines, [part.numel() for part in reduced.values()])
        return found, dict(zip(reduced, parts, strict=True))

    def _same_on_copies(self, tensor: Tensor) -> None:
        """As the first of the ranks that hold the same shards has it."""
        for group in self._copies:
            torch.distributed.broadcast(tensor.view(torch.uint8), group=group, group_src=0)


class _Gathered(Mapping[str, Tensor]):
    """Codes of all weights of a parameter, gathered from the ranks whenever they are asked for, and not kept: all ranks
    ask for the same, in the same order."""

    def __init__(self, shards: Mapping[str, Tensor], parameters: Mapping[str, Any]) -> None:
        self._shards, self._parameters = shards, parameters

    def __getitem__(self, name: str) -> Tensor:
        return gathered(self._shards[name], self._parameters[name])

    def __contains__(self, name: object) -> bool:
        return name in self._shards

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)
