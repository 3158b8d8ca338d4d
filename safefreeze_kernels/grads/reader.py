"""Many tensors looked at in one call: has one of them moved, and where are the gradients?

Both are asked at every step, of thousands of tensors, when a backward pass has just emptied the caches. The answer
comes from csrc/tensors.cpp; the classes here are its twins for where there is no extension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..kernels.operands import GradientList
from ..model.packed import PackedGradient, packing
from ..model.sharding import LocalGradients, is_sharded, local
from ..plan.mask import FreezeMask

_STORAGE: Final = frozenset((torch.float32, torch.bfloat16, torch.float16))

_C: Any = None
try:
    from .. import _C

    _C.Gradients(Tensor, [])  # a torch without DLPack's C exchange says so here
except (ImportError, RuntimeError):
    _C = None


class Whereabouts:
    """Where the tensors of an optimizer's state lie, and whether they still do.

    Args:
        state: parameter -> dict with tensors among its values. They are kept alive, so that no address comes twice.
    """

    def __init__(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        self._objects = list(_walk(state))
        self._places = list(map(_place, self._objects))

    def hold(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether ``state`` holds the same objects in the same order, no tensor moved, none with other strides."""
        objects = list(_walk(state))
        return list(map(id, objects)) == list(map(id, self._objects)) and list(map(_place, objects)) == self._places


def _walk(state: Mapping[Tensor, dict[str, Any]]) -> Any:
    for param, entries in state.items():
        yield param
        yield entries
        for item in entries.items() if isinstance(entries, dict) else ():
            yield from item


def _place(item: Any) -> tuple[int, bool] | None:
    return (item.data_ptr(), item.is_contiguous()) if isinstance(item, Tensor) else None


def whereabouts(state: Mapping[Tensor, dict[str, Any]]) -> Whereabouts:
    """`Whereabouts`, in the extension where there is one."""
    return Whereabouts(state) if _C is None else _C.Whereabouts(Tensor, state)


def trace(tensors: list[Tensor | None]) -> int:
    """A number for these very tensors, in any order, and for how often each was written to, as far as autograd knows.
    As long as they are kept, no others have it. Numbers of two lists add up, modulo 2**64, to that of both."""
    if _C is not None:
        return int(_C.trace(tensors))
    return sum(hash((id(tensor), writes(tensor))) for tensor in tensors if tensor is not None) % 2**64


def writes(tensor: Tensor) -> int:
    """How often ``tensor`` was written to, as far as autograd knows: of inference tensors it does not."""
    return 0 if tensor.is_inference() else tensor._version


class _Holder:
    """What the extension takes for a parameter: something with a gradient."""

    grad: Tensor | None = None


class GradientReader:
    """Reads the gradients of parameters that look like ``params``: of sharded ones the piece this rank holds, of packed
    ones what they hold. Keeps no reference to them.

    Attributes:
        packings: what each gradient is packed by, as `reads` wants it to stay; None: it is an ordinary one.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.packings: list[FreezeMask | None] = [packing(p.grad) for p in params]
        plain = not any(map(is_sharded, params)) and not any(self.packings)
        self._inner = None if plain else LocalGradients(params)
        self._holders = [_Holder() for _ in params] if self._inner else []
        pieces = [
            local(p) if mask is None else p.new_empty((1,)).expand(mask.packed_shape)
            for p, mask in zip(params, self.packings, strict=True)
        ]
        self._one_device = len({p.device for p in pieces}) == 1
        self._single = [i for i, p in enumerate(pieces) if p.numel() == 1]
        self._native = None if _C is None else _C.Gradients(Tensor, pieces)
        self._looks = [] if self._native else list(map(_look, pieces))

    def reads(self, params: Sequence[Tensor]) -> bool:
        """Whether the gradients of ``params`` are packed, or not, as they were."""
        return not PackedGradient.seen or all(
            p.grad is None or packing(p.grad) == mask for p, mask in zip(params, self.packings, strict=True)
        )

    def read(self, params: list[Tensor]) -> GradientList:
        """The gradients of ``params``, which are as many as the reader was made for."""
        owners: list[Any] = params
        if self._inner is not None:
            owners = self._holders
            for holder, grad in zip(owners, self._inner.read(params), strict=True):
                holder.grad = grad.packed if isinstance(grad, PackedGradient) else grad
        if self._native is None:
            grads = GradientList(p.grad for p in owners)
            grads.plain = self._one_device and all(
                grad is not None and _look(grad) == look and grad.is_contiguous() and grad.dtype in _STORAGE
                for grad, look in zip(grads, self._looks, strict=True)
            )
        else:
            grads = GradientList(owners)  # to be overwritten one by one
            grads.plain = self._native.read(owners, grads) and self._one_device
            grads.tables = self._native.tables if grads.plain else None
        # Autograd may only note that values are negated; of contiguous ones it does so with single numbers alone.
        if grads.plain and any(grads[i].is_neg() for i in self._single):  # type: ignore[union-attr]
            grads.plain, grads.tables = False, None
        grads.own = grads.plain and self._inner is None
        for holder in self._holders:
            holder.grad = None  # nobody's but the caller's
        return grads


def _look(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout
