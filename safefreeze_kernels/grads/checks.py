"""What kernels take for a gradient, and errors that say what is wrong with others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.operands import STORAGE, dtype_word
from ..model.packed import packing
from ..plan.mask import FreezeMask


def check_gradient(
    p: Tensor, grad: Tensor, name: str, operation: str, dtypes: Sequence[torch.dtype] | None = None
) -> None:
    """Raise if ``grad`` is not what kernels take for a gradient of ``p``. ``dtypes``: what it may have; None: any of
    `STORAGE` where ``p`` is one of them, else that of ``p``."""
    if packing(grad) is not None:
        raise RuntimeError(
            f"{operation}: grad of {name!r} is packed by live_gradients(storage='packed'), expected an ordinary one; "
            "use MaskedAdamW or MaskedAdam, or storage='dense'"
        )
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{operation}: gradient of {name!r} has layout {grad.layout}, expected a dense one; "
            "sparse gradients are not supported (use sparse=False in the embedding)"
        )
    for got, expected, aspect in ((tuple(grad.shape), tuple(p.shape), "shape"), (grad.device, p.device, "device")):
        if got != expected:
            raise ValueError(f"{operation}: grad of {name!r} has {aspect} {got}, expected {expected}")
    if grad.device.type == "meta":
        raise ValueError(
            f"{operation}: grad of {name!r} is on the meta device and holds no values; materialise the model"
        )
    dtypes = dtypes or (STORAGE if p.dtype in STORAGE else (p.dtype,))
    if grad.dtype not in dtypes:
        wanted = " or ".join(map(dtype_word, dtypes))
        raise ValueError(f"{operation}: grad of {name!r} has dtype {grad.dtype}, expected {wanted}")


def check_packing(packed_by: FreezeMask, mask: FreezeMask, name: str, operation: str) -> None:
    """Raise ValueError if a gradient is packed by something else than ``mask``."""
    if packed_by != mask:
        raise ValueError(
            f"{operation}: grad of {name!r} is packed by another plan: {packed_by.live_count:,} of {packed_by.numel:,} "
            f"elements are held, expected {mask.live_count:,}; give live_gradients the same plan"
        )


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements (may) share memory, as in expanded tensors: such a tensor cannot be written to."""
    reach = 0  # how far the dimensions of smaller stride extend; the next one must step over it
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and tensor.numel():
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def settled(tensor: Tensor) -> Tensor:
    """Contiguous, its values in memory: autograd may only note that they are negated or conjugate."""
    if tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj():
        return tensor
    return tensor.resolve_conj().resolve_neg().contiguous()
