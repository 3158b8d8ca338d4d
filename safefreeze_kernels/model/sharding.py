"""Parameters spread over ranks: `torch.distributed.tensor.DTensor`, as FSDP2, tensor parallelism and both make them.

A rank holds one shard of such a tensor. Which one is known here alone; everything above works on ordinary tensors.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan


def is_sharded(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor (one that every rank holds whole included)."""
    # Whoever made one has imported this; nobody else waits half a second for it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """The shard this rank holds, over the same memory; an ordinary tensor is its own."""
    # what a collective still fills is a subclass; to_local waits for it
    if is_sharded(tensor):
        shard = tensor._local_tensor
        tensor = shard if type(shard) is Tensor else tensor.detach().to_local()
    return tensor  # type: ignore[no-any-return]


def cuts(tensor: Any) -> list[tuple[int, Any]]:
    """The dimensions of the mesh along which ranks hold different things of a sharded tensor, with its placements."""
    return [(dim, placement) for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]


def held(tensor: Any) -> list[np.ndarray] | None:
    """Per dimension, which indices of the whole tensor this rank holds: int64, in the order of `local`. None: all.

    A tensor cut along one dimension by two dimensions of the mesh may be held in several runs (``_StridedShard``).

    Raises:
        ValueError: the ranks hold terms of a sum (``Partial``), not shards.
    """
    if not is_sharded(tensor):
        return None
    mesh, index = tensor.device_mesh, [np.arange(size) for size in tensor.shape]
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank has no part in it
        return [i[:0] for i in index]
    for mesh_dim, placement in cuts(tensor):
        if placement.is_partial():
            raise ValueError(
                f"parameter of shape {tuple(tensor.shape)} has placements {tensor.placements}: its ranks hold terms of "
                "a sum, expected shards or copies; redistribute it"
            )
        runs = _chunks(index[placement.dim], getattr(placement, "split_factor", 1))
        chunks = [_chunks(run, mesh.size(mesh_dim))[coordinate[mesh_dim]] for run in runs]
        index[placement.dim] = np.concatenate(chunks)
    return index


def local_mask(mask: FreezeMask, param: Tensor) -> FreezeMask:
    """The mask of the shard of ``param`` that this rank holds, where ``mask`` is of all of it."""
    return mask.shard(held(param))


def _chunks(index: np.ndarray, n: int) -> list[np.ndarray]:
    """As `torch.chunk` cuts, with empty chunks where it gives fewer than ``n``."""
    size = max(-(-len(index) // n), 1)
    return [index[i * size : (i + 1) * size] for i in range(n)]


def shard_number(tensor: Any) -> int:
    """A number for the shard this rank holds; copies of a shard have the same."""
    number = 0
    if is_sharded(tensor) and (coordinate := tensor.device_mesh.get_coordinate()):
        for mesh_dim, _ in cuts(tensor):
            number = number * tensor.device_mesh.size(mesh_dim) + coordinate[mesh_dim]
    return number


def spread(shard: Tensor, like: Any) -> Tensor:
    """``shard`` as this rank's shard of a tensor placed as ``like`` is; an ordinary ``like``: ``shard`` itself."""
    if not is_sharded(like):
        return shard
    return _placed(shard, like, like.shape)  # type: ignore[no-any-return]


def _placed(shard: Tensor, like: Any, shape: Sequence[int]) -> Any:
    """``shard`` as this rank's of a sharded tensor of this shape, cut as ``like`` is."""
    from torch.distributed.tensor import DTensor

    # Without shape and stride, sizes that do not divide evenly would be guessed from this rank's.
    size, stride = torch.Size(shape), torch.empty(shape, device="meta").stride()
    return DTensor.from_local(shard, like.device_mesh, like.placements, run_check=False, shape=size, stride=stride)


def gathered(shard: Tensor, like: Any) -> Tensor:
    """The whole of what ranks hold a ``shard`` of, cut as ``like`` is, of any dtype; of copies of a shard, any."""
    as_bytes = shard.contiguous().unsqueeze(-1).view(torch.uint8)  # collectives do not know every dtype
    whole = _placed(as_bytes, like, (*like.shape, as_bytes.shape[-1])).full_tensor()
    return whole.view(shard.dtype).squeeze(-1)  # type: ignore[no-any-return]


def take(tensor: Any, like: Any) -> Tensor:
    """This rank's shard of ``tensor``, which has the shape of ``like`` and is whole or placed in any way, as ``like``
    is placed; an ordinary ``like``: all of it."""
    if is_sharded(tensor):
        return local(_placed_as(tensor, like)) if is_sharded(like) else tensor.full_tensor()
    for dim, index in enumerate(held(like) or []):
        if len(index) != tensor.shape[dim]:
            tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
    return tensor  # type: ignore[no-any-return]


def _placed_as(tensor: Any, like: Any) -> Any:
    """One sharded tensor, placed as another is: itself if it is so already."""
    same = tensor.placements == like.placements
    return tensor if same else tensor.redistribute(like.device_mesh, like.placements)


def local_gradient(param: Tensor) -> Tensor | None:
    """This rank's shard of ``param.grad``. Terms of a sum are summed first, and ``param.grad`` becomes the sum."""
    grad = param.grad
    if grad is None or not is_sharded(param) or not is_sharded(grad):
        return grad
    if (placed := _placed_as(grad, param)) is not grad:
        param.grad = placed
    return local(placed)


class LocalGradients:
    """`local_gradient` of many parameters, at every step: what does not change is looked up once."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._specs = [getattr(p, "_spec", None) for p in params]

    def read(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for p, spec in zip(params, self._specs, strict=True):
            grad: Any = p.grad
            if grad is not None and spec is not None:
                # the usual case, without a call; FSDP2 gives parameter and gradient one object
                shard = getattr(grad, "_local_tensor", None)
                same = shard is not None and (grad._spec is spec or grad._spec.placements == spec.placements)
                grad = shard if same and type(shard) is Tensor else local_gradient(p)
            found.append(grad)
        return found


def reduce_groups(tensor: Any) -> tuple[Any, ...]:
    """The process groups whose ranks hold different shards of ``tensor``: a sum over elements is a sum over those."""
    if not is_sharded(tensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(dim) for dim, _ in cuts(tensor) if mesh.size(dim) > 1)


class PlanAgreement:
    """Do all ranks that train the same parameters freeze the same? Nobody waits: ranks leave notes in the store.

    The plans that a rank puts into force for these parameters, one after the other, are numbered. Who is first with a
    number says which plan it is; who then has another one notes the conflict for all to see. A backward pass over
    several ranks has everyone behind their note before anyone steps. Two steps later all must have come to that number.
    """

    # key of a set of parameters -> plans this process had for them, while this process group is the default one
    _histories: ClassVar[dict[str, list[str]]] = {}
    _world: ClassVar[Any] = None

    def __init__(self, parameters: Iterable[tuple[str, Sequence[int]]]) -> None:
        text = "\n".join(f"{name} {tuple(shape)}" for name, shape in parameters)
        self._key: Final = f"safefreeze/{hashlib.sha256(text.encode()).hexdigest()[:32]}"
        self._plan, self._anew = FreezePlan(), False
        self._number = 0
        self._noted_in: Any = None  # the process group that knows of `_plan`
        self.agreed = True  # nothing to look at
        self._looks = 0

    def note(self, plan: FreezePlan, *, anew: bool) -> None:
        """This plan comes into force (``anew``, also if it is the one that was), or is to be compared again."""
        if anew or plan != self._plan:
            self._plan, self._anew, self._noted_in = plan, anew, None
        self.agreed, self._looks = False, 0
        self._leave_note()

    def check(self, operation: str) -> None:
        """Raise ValueError if a rank is known to freeze something else."""
        if not self._leave_note():
            self.agreed = True
            return
        self._looks += 1
        store = _store()
        if self._looks > 1:
            here, all_ = (store.add(f"{self._key}/{number}/ranks", 0) for number in (self._number, 0))
            if here < all_:
                self._note_conflict(f"{all_ - here} of {all_} ranks did not change to {self._plan.fingerprint[:12]}")
            self.agreed = True
        if store.check([f"{self._key}/conflict"]):
            self.agreed = False
            ranks = store.get(f"{self._key}/conflict").decode()
            raise ValueError(
                f"{operation}: ranks have different freeze plans ({ranks}), expected the same on all; load the plan "
                "from one file on every rank (and give parameters of another model names of their own)"
            )

    def _leave_note(self) -> bool:
        """False where there is no other rank."""
        dist = torch.distributed
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return False
        world = dist.group.WORLD
        if PlanAgreement._world is not world:
            PlanAgreement._world, PlanAgreement._histories = world, {}
        if self._noted_in is not world:
            self._noted_in = world
            history = self._histories.setdefault(self._key, [])
            if self._anew or not history or history[-1] != self._plan.fingerprint:
                self._anew = False
                history.append(self._plan.fingerprint)
                self._say(len(history) - 1)
            self._number = len(history) - 1
        return True

    def _say(self, number: int) -> None:
        """That this rank's plan of this number is `_plan`."""
        rank, store, ours = torch.distributed.get_rank(), _store(), self._plan.fingerprint
        first, plan = store.compare_set(f"{self._key}/{number}", "", f"{rank} {ours}").decode().split()
        if plan != ours:
            self._note_conflict(f"rank {first}: {plan[:12]}, rank {rank}: {ours[:12]}")
        store.add(f"{self._key}/{number}/ranks", 1)

    def _note_conflict(self, text: str) -> None:
        _store().set(f"{self._key}/conflict", text)


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()
