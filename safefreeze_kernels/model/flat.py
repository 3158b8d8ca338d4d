"""Parameters as stretches of one-dimensional tensors: what DeepSpeed's ZeRO gives an optimizer in their place.

A *flat partition* is such a tensor. Each stretch of it is one of a flattened parameter; a parameter may have none in
it, and lie on other ranks alone. Which is which the engine knows, and is asked here. Everything above sees *pieces*:
rectangles of the parameters' matrices, which are treated as shards are.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from torch import Tensor

from ..plan.binding import whole_shape


@dataclass(frozen=True)
class Stretch:
    """``count`` elements of a parameter, from element ``start`` on, that lie in a flat tensor from ``offset`` on.

    Attributes:
        name, shape: of the parameter, whole.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    offset: int
    count: int

    def pieces(self) -> list[Piece]:
        """What it is of the parameter's matrix: the end of a row, whole rows, the beginning of one. One piece at least,
        so that a parameter is known on every rank."""
        width = self.shape[-1] if len(self.shape) > 1 else 1
        end, found = self.start + self.count, []
        first, last = -(-self.start // width) if width else 0, end // width if width else 0
        if first > last:  # within one row
            first = last = end // width + 1
        for start, stop in ((self.start, min(first * width, end)), (first * width, last * width), (last * width, end)):
            if start < stop:
                row, col = divmod(start, width)
                rows, cols = (1, stop - start) if col or stop - start < width else ((stop - start) // width, width)
                held = [np.arange(row, row + rows), np.arange(col, col + cols)]
                found.append(Piece(self.name, held, start, self.offset + start - self.start, (rows, cols)))
        return found or [Piece(self.name, [np.arange(0), np.arange(width)], 0, self.offset, (0, width))]


@dataclass(frozen=True, eq=False)
class Piece:
    """A rectangle of the matrix that a parameter is seen as, as it lies in a flat tensor.

    Attributes:
        name: of the parameter.
        held: the rows and the columns of it.
        start: its first element in the flattened parameter.
        offset: the place of that in the flat tensor.
        shape: of the rectangle.
    """

    name: str
    held: list[np.ndarray]
    start: int
    offset: int
    shape: tuple[int, int]

    def of(self, flat: Tensor) -> Tensor:
        """The piece of a flat tensor, over the same memory."""
        return flat.narrow(0, self.offset, math.prod(self.shape)).view(self.shape)


class Partition:
    """A flat tensor that an optimizer has, and its pieces.

    Attributes:
        tensor: the flat tensor.
        group: index of its parameter group.
        layout: a digest of which stretch lies where.
    """

    def __init__(
        self, tensor: Tensor, stretches: Sequence[Stretch], group: int, copies: Mapping[str, tuple[Tensor, int]]
    ) -> None:
        self.tensor, self.group, self._copies = tensor, group, copies
        self.pieces = [piece for stretch in stretches for piece in stretch.pieces()]
        self.layout = hashlib.sha256(repr(list(stretches)).encode()).hexdigest()[:16]
        self._views: list[Tensor] = []
        self._seen: Any = None  # where the tensor lay then

    @property
    def views(self) -> list[Tensor]:
        """Each piece of the tensor: the same objects, as long as the tensor lies where it did."""
        flat = self.tensor.detach()
        if self._seen != (seen := (flat.data_ptr(), flat.dtype, flat.device)):
            self._views, self._seen = [piece.of(flat) for piece in self.pieces], seen
        return self._views

    def copy_of(self, piece: Piece) -> Tensor:
        """The model's own values of a piece, of the model's dtype, which the engine writes after each step."""
        copy, begin = self._copies[piece.name]
        flat = copy.detach().reshape(-1)
        return flat.narrow(0, piece.start - begin if math.prod(piece.shape) else 0, math.prod(piece.shape))


_ZERO_12: Final = "_hp_mapping"  # what stages 1 and 2 leave at parameters; None: nothing of it is on this rank
_ZERO_3: Final = "_z3_optimizer"  # and stage 3, once its engine is made; before, partitioned parameters have a ds_id


def in_engine(param: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO steps ``param`` in flat partitions, and takes its gradient away."""
    return hasattr(param, _ZERO_12) or hasattr(param, _ZERO_3)


@contextmanager
def gathered(params: Iterable[Tensor]) -> Iterator[None]:
    """Within, those of ``params`` that ZeRO-3 took away are whole; every rank must enter."""
    apart = [p for p in params if tuple(p.shape) != whole_shape(p)]
    if not apart:
        yield
        return
    with importlib.import_module("deepspeed").zero.GatheredParameters(apart):
        yield


def partitions(named: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]], operation: str) -> list[Partition]:
    """The flat partitions on this rank of the parameters ``named`` that an optimizer was given; none: they are in none.

    ``groups``: the optimizer's, with what the engine put in the parameters' place. Stage 3 leaves them empty between
    steps; all its partitions are found.

    Raises:
        ValueError: the engine does not say where parameters lie, or keeps them where they cannot be stepped.
    """
    if any(hasattr(p, _ZERO_3) for p in named.values()):
        return list(_of_stage_3(named, operation))
    if any(hasattr(p, _ZERO_12) for p in named.values()):
        return list(_of_stages_1_and_2(named, groups, operation))
    return []


def _of_stages_1_and_2(
    named: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]], operation: str
) -> Iterator[Partition]:
    """One flat tensor for each group."""
    for index, group in enumerate(groups):
        inside = [(name, named[name]) for name in group["param_names"] if hasattr(named.get(name), _ZERO_12)]
        if len(group["params"]) != 1 or not inside:
            raise ValueError(
                f"{operation}: group {index} has {len(group['params'])} parameters, of which DeepSpeed maps "
                f"{len(inside)}, expected one flat partition{_remedy()}"
            )
        (flat,) = group["params"]
        found, begins, copies = [], set(), {}
        for name, p in inside:
            copies[name] = (p, 0)
            mapping: Any = getattr(p, _ZERO_12)
            if mapping is None:
                found.append(Stretch(name, tuple(p.shape), 0, 0, 0))
                continue
            try:
                whole, part = mapping.lp_fragment_address, mapping.hp_fragment_address
                stretch = Stretch(name, tuple(p.shape), int(whole.start), int(part.start), int(whole.numel))
            except AttributeError as error:
                raise ValueError(f"{operation}: DeepSpeed's mapping of {name!r} has {error}{_remedy()}") from error
            found.append(stretch)
            # all 16-bit parameters of a group lie in one tensor, of which this partition is a stretch
            begins.add((p.untyped_storage().data_ptr(), p.storage_offset() + stretch.start - stretch.offset))
        if len(begins) > 1:
            raise ValueError(
                f"{operation}: the parameters of group {index} lie in another order than DeepSpeed's mapping says, as "
                "with round_robin_gradients; set it to false in zero_optimization"
            )
        yield _checked(Partition(flat, found, index, copies), found, operation)


def _of_stage_3(named: Mapping[str, Tensor], operation: str) -> Iterator[Partition]:
    """A flat tensor for each sub-group of a group."""
    engines = {id(getattr(p, _ZERO_3, None)): getattr(p, _ZERO_3, None) for p in named.values() if p.requires_grad}
    if len(engines) != 1 or None in engines.values():
        raise ValueError(
            f"{operation}: some parameters are stepped by one DeepSpeed engine and some by none or another, expected "
            "one for all; give each engine an optimizer of its own"
        )
    engine: Any = next(iter(engines.values()))
    name_of = {id(p): name for name, p in named.items()}
    for word, why in (("swap_optimizer", "offload_optimizer to nvme"), ("zenflow", "zenflow")):
        if getattr(engine, word, False):
            raise ValueError(
                f"{operation}: {why} steps partitions that are not in memory, or in other processes, expected them "
                "here; offload to the CPU works (zero_force_ds_cpu_optimizer: false)"
            )
    try:
        for index, flat in enumerate(engine.fp32_partitioned_groups_flat):
            found, copies = [], {}
            for p in engine.fp16_groups[index]:
                name = name_of.get(id(p))
                if name is None:
                    raise ValueError(f"{operation}: DeepSpeed steps a parameter that the optimizer was not given")
                _, offset, _ = engine.grad_position[engine.get_param_id(p)]
                size = p.ds_tensor.ds_numel
                start = min(size * engine._get_param_partition_rank(p), p.ds_numel)
                count = min(size, p.ds_numel - start)
                found.append(Stretch(name, tuple(p.ds_shape), start, offset, count))
                copies[name] = (p.ds_tensor, start)
            yield _checked(Partition(flat, found, engine.sub_group_to_group_id[index], copies), found, operation)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{operation}: DeepSpeed's ZeRO-3 optimizer has no {error}{_remedy()}") from error


def _checked(partition: Partition, stretches: Sequence[Stretch], operation: str) -> Partition:
    """Raise ValueError unless stretches lie one behind the other in the tensor, and within their parameters."""
    end, flat = 0, partition.tensor
    for it in stretches:
        if it.count and not end <= it.offset <= it.offset + it.count <= flat.numel():
            raise ValueError(
                f"{operation}: DeepSpeed says that {it.count} elements of {it.name!r} lie from {it.offset} on in a "
                f"flat partition of {flat.numel()}, behind what ends at {end}; they cannot{_remedy()}"
            )
        if it.start + it.count > math.prod(it.shape):
            raise ValueError(
                f"{operation}: DeepSpeed says that a partition has elements {it.start} to {it.start + it.count} of "
                f"{it.name!r}, which has {math.prod(it.shape)}{_remedy()}"
            )
        end = it.offset + it.count if it.count else end
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(f"{operation}: a flat partition has shape {tuple(flat.shape)}, expected one dimension")
    return partition


def _remedy() -> str:
    version = getattr(sys.modules.get("deepspeed"), "__version__", "?")
    return (
        f"; DeepSpeed {version} may be another than those this package knows (0.19.8 is tried): shard with "
        "torch.distributed.fsdp.fully_shard (FSDP2), or train with DDP"
    )
