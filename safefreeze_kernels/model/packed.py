"""Gradients that exist only where a weight learns: `PackedGradient`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..plan.mask import FreezeMask


class PackedGradient(Tensor):
    """A gradient that is zero where ``mask`` freezes; what is live is held alone, as ``packed``.

    Autograd accumulates it, and whatever only scales it or looks at values that are not zero works: norms, ``zero_``,
    casts, `torch.nn.utils.clip_grad_norm_`, `torch.amp.GradScaler`. Anything else raises RuntimeError, and so does the
    step of an optimizer that is none of ours.

    Attributes:
        packed: an ordinary tensor.
        mask: what is frozen. Of single elements what is held has one dimension, the live ones in order.
    """

    #: Whether there ever was one: else nobody need look for them.
    seen: ClassVar[bool] = False

    packed: Tensor
    mask: FreezeMask

    @staticmethod
    def __new__(cls, packed: Tensor, mask: FreezeMask) -> PackedGradient:
        self: PackedGradient = Tensor._make_wrapper_subclass(cls, mask.shape, dtype=packed.dtype, device=packed.device)
        self.packed, self.mask = packed, mask
        if not PackedGradient.seen:
            PackedGradient.seen = True
            register_optimizer_step_pre_hook(refuse_step)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return PackedGradient, (self.packed, self.mask)

    def _set_data(self, other: PackedGradient) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.packed = other.packed

    #: `torch.nn.Module.to` converts a gradient in place by setting this.
    data = property(lambda self: Tensor.data.__get__(self), _set_data)  # type: ignore[attr-defined]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedGradient({tuple(self.shape)}, {self.packed.numel():,} of {self.numel():,} elements held)"

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        """An ordinary gradient of the same values."""
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        dense[~self.mask.dense().to(self.device)] = self.packed.reshape(-1)
        return dense

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        possible = _POSSIBLE.get(func)
        if possible is None or not possible(args):
            # a TypeError would be swallowed by Tensor's arithmetic operators
            raise RuntimeError(f"{func}: {_REFUSAL}")
        result = func(*map(stored, args), **(kwargs or {}))
        if func._schema.is_mutable:
            return args[0] if func._schema.returns else None
        return PackedGradient(result, args[0].mask) if possible in (_alone, _together) else result


def refuse_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """A hook of all optimizers: raise RuntimeError, before anything is changed, if one of torch's own would step with
    packed gradients."""
    if getattr(optimizer, "takes_packed_gradients", False):
        return
    if any(isinstance(p.grad, PackedGradient) for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(f"{type(optimizer).__name__}.step: {_REFUSAL}")


def packing(grad: Tensor | None) -> FreezeMask | None:
    """What ``grad`` is packed by; None: it is an ordinary one, or none."""
    return grad.mask if isinstance(grad, PackedGradient) else None


def stored(thing: Any) -> Any:
    """What is held of a packed gradient, also of those in a list; anything else as it is."""
    if isinstance(thing, PackedGradient):
        return thing.packed
    return [stored(item) for item in thing] if isinstance(thing, (list, tuple)) else thing


_REFUSAL: Final = (
    "a gradient of live_gradients(storage='packed') is held only where the weight learns, and this needs an ordinary "
    "one; use MaskedAdamW or MaskedAdam, or storage='dense'"
)

# What keeps zero zero can be done to what is held alone.


def _alone(args: tuple[Any, ...]) -> bool:
    """With numbers, at most."""
    return isinstance(args[0], PackedGradient) and not any(isinstance(a, Tensor) and a.numel() != 1 for a in args[1:])


def _together(args: tuple[Any, ...]) -> bool:
    """With another that is held in the same places."""
    one, other = args[:2]
    return isinstance(one, PackedGradient) and isinstance(other, PackedGradient) and one.mask == other.mask


def _reduced(args: tuple[Any, ...]) -> bool:
    """To one number, as if zeros were not there: along no dimension, and not to the smallest."""
    return len(args) < 3 and all(order >= 0 for order in args[1:])


def _each(args: tuple[Any, ...]) -> bool:
    """A list of gradients, packed ones and others, each by itself."""
    return all(not isinstance(item, PackedGradient) for a in args[1:] if isinstance(a, (list, tuple)) for item in a)


_aten: Final = torch.ops.aten
_POSSIBLE: Final[dict[Any, Callable[[tuple[Any, ...]], bool]]] = {
    **dict.fromkeys(
        (_aten.detach.default, _aten.clone.default, _aten._to_copy.default, _aten.mul.Tensor, _aten.mul_.Tensor,
         _aten.mul.Scalar, _aten.mul_.Scalar, _aten.div.Tensor, _aten.div_.Tensor, _aten.div.Scalar, _aten.div_.Scalar,
         _aten.neg.default, _aten.abs.default, _aten.isnan.default, _aten.isinf.default, _aten.zero_.default), _alone,
    ),
    **dict.fromkeys((_aten.add.Tensor, _aten.add_.Tensor, _aten.copy_.default), _together),
    **dict.fromkeys((_aten.linalg_vector_norm.default, _aten.sum.default, _aten.any.default), _reduced),
    **dict.fromkeys(
        (_aten._foreach_norm.Scalar, _aten._foreach_mul_.Scalar, _aten._foreach_mul_.Tensor,
         _aten._foreach_zero_.default, _aten._amp_foreach_non_finite_check_and_unscale_.default), _each,
    ),
}  # fmt: skip
