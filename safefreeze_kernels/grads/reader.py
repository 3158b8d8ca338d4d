"""Many tensors looked at in one call: has one of them moved, and which are the gradients?

Both are asked at every step, of thousands of tensors, when a backward pass has just emptied the caches. The answer
comes from csrc/tensors.cpp; the classes here are its twins for where there is no extension. Whether gradients are
packed, and by what, is for everybody above asked here: see `GradientReader.packings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..kernels.operands import STORAGE
from ..model.packed import PackedGradient, packing
from ..model.sharding import LocalGradients, is_sharded, local
from ..plan.mask import FreezeMask
from .checks import check_gradient, check_packing

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
        """Whether ``state`` has the same objects in the same order, no tensor moved, none with other strides."""
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


@dataclass(eq=False)
class Gradients(Sequence[Tensor | None]):
    """The gradient of each parameter, as a kernel takes them.

    Attributes:
        tensors: the gradients; None where a parameter has none.
        plain: all are there, contiguous, on one device, and of the shape and dtype their parameters had.
        own: plain, and the very objects that the parameters have for gradients.
        tables: addresses of an int64 table of their addresses and of an int32 table of their dtypes, if known. They
            belong to the reader and are overwritten when it reads again.
    """

    tensors: list[Tensor | None]
    plain: bool = False
    own: bool = False
    tables: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter(self.tensors)

    def __getitem__(self, index: Any) -> Any:
        return self.tensors[index]


class _Holder:
    """What the extension takes for a parameter: something with a gradient."""

    grad: Tensor | None = None


class GradientReader:
    """Reads and checks the gradients of parameters that look like ``params``: of sharded ones the shard this rank has,
    of packed ones what is held in memory. Keeps no reference to them.

    Args:
        params: the parameters, with gradients or without.
        names: of the parameters, for errors.
        same_dtype: whether a gradient must have its parameter's dtype; else see `check_gradient`.

    Attributes:
        packings: what each gradient is packed by, and has to stay packed by; None: it is an ordinary one.
    """

    def __init__(self, params: Sequence[Tensor], names: Sequence[str], *, same_dtype: bool = False) -> None:
        self.packings: list[FreezeMask | None] = [packing(p.grad) for p in params]
        self.names, self._same_dtype = names, same_dtype
        self._shapes = [p.shape for p in params]
        as_they_are = not any(map(is_sharded, params)) and not any(self.packings)
        self._inner = None if as_they_are else LocalGradients(params)
        self._holders = [_Holder() for _ in params] if self._inner else []
        expected = list(map(_like_gradient, params, self.packings))
        self._one_device = len({p.device for p in expected}) == 1
        self._single = [i for i, p in enumerate(expected) if p.numel() == 1]
        self._native = None if _C is None else _C.Gradients(Tensor, expected)
        self._expected = [] if self._native else list(map(_metadata, expected))

    @property
    def packed(self) -> list[bool]:
        """Of which parameters the gradient is packed, as optimizer state is."""
        return [mask is not None for mask in self.packings]

    def packed_as_before(self, params: Sequence[Tensor]) -> bool:
        """Whether the gradients of ``params`` that are there are packed, or ordinary, as `packings` says."""
        return not PackedGradient.seen or all(
            p.grad is None or packing(p.grad) == mask for p, mask in zip(params, self.packings, strict=True)
        )

    def check_packings(self, masks: Sequence[FreezeMask], operation: str, *, exactly: bool) -> None:
        """Raise ValueError if a gradient is packed by something else than its mask or, where that need not be
        ``exactly`` so, lacks what its mask does not freeze."""
        for name, found, mask in zip(self.names, self.packings, masks, strict=True):
            if found is not None:
                check_packing(found, mask if exactly else mask | found, name, operation)

    def read(self, params: list[Tensor], operation: str) -> Gradients:
        """The gradients of ``params``, which are as many as the reader was made for.

        Raises:
            ValueError, RuntimeError: as `check_gradient`, naming ``operation``.
        """
        owners: list[Any] = params
        if self._inner is not None:
            owners = self._holders
            for holder, grad in zip(owners, self._inner.read(params), strict=True):
                holder.grad = grad.packed if isinstance(grad, PackedGradient) else grad
        if self._native is None:
            tensors = [p.grad for p in owners]
            plain = all(map(self._is_plain, tensors, self._expected))
        else:
            tensors = list(owners)  # to be overwritten one by one
            plain = self._native.read(owners, tensors)
        # Autograd may only note that values are negated; of contiguous ones it does so with single numbers alone.
        plain = plain and self._one_device and not any(tensors[i].is_neg() for i in self._single)
        for holder in self._holders:
            holder.grad = None  # nobody's but the caller's
        if plain:
            tables = None if self._native is None else self._native.tables
            return Gradients(tensors, plain=True, own=self._inner is None, tables=tables)
        for grad, p, name, shape, mask in zip(tensors, params, self.names, self._shapes, self.packings, strict=True):
            if p.shape != shape:
                raise ValueError(f"{operation}: {name!r} has shape {tuple(p.shape)}, expected {tuple(shape)} as before")
            if grad is not None:
                dtypes = (p.dtype,) if self._same_dtype else None
                check_gradient(_like_gradient(p, mask), grad, name, operation, dtypes)
        return Gradients(tensors)

    @staticmethod
    def _is_plain(grad: Tensor | None, expected: tuple[Any, ...]) -> bool:
        return grad is not None and _metadata(grad) == expected and grad.is_contiguous() and grad.dtype in STORAGE


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout


def _like_gradient(param: Tensor, packed_by: FreezeMask | None) -> Tensor:
    """What looks as a gradient of ``param`` does to a kernel; of a packed one the shape is that of live rows × live
    columns."""
    return local(param) if packed_by is None else param.new_empty((1,)).expand(packed_by.packed_shape)
