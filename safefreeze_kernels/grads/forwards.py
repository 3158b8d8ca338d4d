"""What stands in for the forward of a layer while its weights have live gradients: `LiveForward`, and who has one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..model.attached import Attached, attach, detach
from ..model.sharding import is_sharded
from ..plan.mask import FreezeMask
from .reader import writes

Storage = Literal["dense", "packed"]
T = TypeVar("T")


class LiveWeight:
    """A weight whose gradient is computed where ``mask`` lets it learn, and held as ``storage`` says."""

    def __init__(self, name: str, mask: FreezeMask, storage: Storage) -> None:
        self.name, self.mask, self.storage = name, mask, storage
        self.packing = mask if storage == "packed" else None
        self.ran = False  # so that the weight's gradient may lack something

    def applies(self, weight: Tensor) -> bool:
        """Whether ``weight`` is to have live gradients now. It is what the layer would compute with, which is no
        parameter if `torch.func.functional_call` lent it."""
        if not (torch.is_grad_enabled() and weight.requires_grad and isinstance(weight, nn.Parameter)):
            return False
        if is_sharded(weight) and self.packing is not None:
            raise RuntimeError(
                f"live_gradients: {self.name!r} was sharded afterwards, and packed gradients are for one device; use "
                "storage='dense'"
            )
        if weight.shape != self.mask.shape:
            raise ValueError(
                f"live_gradients: {self.name!r} has shape {tuple(weight.shape)}, expected {self.mask.shape} as "
                "before; remove it and call it with a plan for the new shape"
            )
        return not is_sharded(weight)


class LiveForward(Attached):
    """The forward of one layer, by which its weights have live gradients.

    Wherever a copy of the layer would have it, the copy has the forward of its class instead, bound to itself.
    """

    attribute = "forward"
    changes: ClassVar[int] = 0  #: how often any was attached or removed

    def __init__(self, layer: nn.Module, weights: Mapping[str, LiveWeight]) -> None:
        self._layer, self.weights, self.removed = weakref.ref(layer), weights, False
        attach(layer, self)
        _forwards[layer] = self
        LiveForward.changes += 1

    def remove(self) -> None:
        """Undo it; if something else wrapped this, what it wraps is an ordinary forward from now on."""
        self.removed = True
        if (layer := self._layer()) is not None:
            detach(layer, self)
            _forwards.pop(layer, None)
            for name, live in self.weights.items():
                weight: Any = getattr(layer, name)
                if live.ran and weight.grad is not None and live.packing is None:  # a packed one tells of itself
                    _incomplete[weight.grad] = live.mask, writes(weight.grad)
        LiveForward.changes += 1

    def __reduce__(self) -> Any:
        return getattr, (self._layer(), "forward")


#: Layers that have live gradients now.
_forwards: weakref.WeakKeyDictionary[nn.Module, LiveForward] = weakref.WeakKeyDictionary()
#: Gradient -> what it lacked when live gradients were removed, and how often it had been written to.
_incomplete: Final = WeakIdKeyDictionary()


def outside_the_graph(function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)``, which a compiler does not follow."""
    # looked up here: at import this would load the compiler
    found: T = torch.compiler.disable(function)(*arguments)  # type: ignore[no-untyped-call]
    return found


outside_the_graph._torchdynamo_disable = True  # type: ignore[attr-defined]


def generation() -> int:
    """A number that has grown whenever live gradients of any model were switched on or off: what was read from
    `forwards` holds as long as it stays."""
    return LiveForward.changes


def forwards() -> dict[int, LiveWeight]:
    """id of a weight -> how live gradients of it are computed now. Asked of the layers, since parameters are swapped
    and copied."""
    return {
        id(layer._parameters.get(name)): live
        for layer, forward in list(_forwards.items())
        for name, live in forward.weights.items()
    }


def lacking(grad: Tensor) -> FreezeMask | None:
    """What ``grad`` lacks, if it was computed under live gradients that were removed since, and is as it was then."""
    if not _incomplete.data:
        return None
    mask, version = _incomplete.get(grad, (None, 0))  # type: ignore[no-untyped-call]
    return mask if version == writes(grad) else None
