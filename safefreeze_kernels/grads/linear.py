"""Live gradients of linear layers.

A linear layer's weight gradient is ``dY.T @ X``. Of a weight with frozen rows only ``dY[:, live].T @ X`` is computed,
of one with frozen columns ``dY.T @ X[:, live]``, and only the live columns of ``X`` are kept for it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..model.packed import PackedGradient
from ..model.sharding import is_sharded
from ..plan.mask import FreezeMask
from .forwards import LiveForward, LiveWeight, outside_the_graph


class LinearForward(LiveForward):
    """The forward of a linear layer whose ``weight`` has live gradients."""

    def __init__(self, layer: nn.Module, live: LiveWeight) -> None:
        self._live = live
        self._transposed = type(layer).__name__.endswith("Conv1D")  # its weight is (in, out)
        self._bias_apart = type(layer).__name__.endswith("FalconLinear")  # its bias is added to a rounded product
        n_rows, n_cols = live.mask.matrix_shape
        rows, cols = live.mask.live_rows, live.mask.live_cols
        self._places = [
            None if index.size == size else torch.from_numpy(index) for index, size in ((rows, n_rows), (cols, n_cols))
        ]
        self._on_device: dict[torch.device, list[Tensor | None]] = {}
        super().__init__(layer, {"weight": live})

    def __call__(self, *given: Any, **named: Any) -> Tensor:
        layer: Any = self._layer()
        weight = layer.weight
        (x,) = (*given, *named.values())
        if self.removed or not self._live.applies(weight) or is_sharded(x):
            result: Tensor = type(layer).forward(layer, x)
            return result
        self._live.ran = True
        if x.device not in self._on_device:
            self._on_device[x.device] = [None if i is None else i.to(x.device) for i in self._places]
        live_rows, live_cols = self._on_device[x.device]
        packing, apart = self._live.packing, self._bias_apart
        x, weight, bias = as_autocast_would(x.device, x, weight, layer.bias)
        apply: Any = LiveLinear.apply
        if packing is not None and torch.compiler.is_compiling():  # compilers do not know packed gradients
            apply = functools.partial(outside_the_graph, apply)
        found: Tensor = apply(x, weight, None if apart else bias, live_rows, live_cols, self._transposed, packing)
        return found + bias if apart and bias is not None else found


class LiveLinear(torch.autograd.Function):
    """``x @ weight.T + bias`` (``x @ weight + bias`` if ``transposed``). Index tensors: live rows and columns of
    ``weight``; None: all. ``packing``: of the weight's gradient; None: it is an ordinary one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None,
        transposed: bool, packing: FreezeMask | None,
    ) -> Tensor:  # fmt: skip
        index = rows if transposed else cols
        kept = x if index is None else x.index_select(-1, index)  # what the weight's gradient needs of it
        ctx.save_for_backward(kept, weight, rows, cols)
        ctx.transposed, ctx.has_bias, ctx.packing = transposed, bias is not None, packing
        return nn.functional.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, rows, cols = ctx.saved_tensors
        transposed = ctx.transposed
        flat = as_matrix(grad)
        of_weight: Tensor | None = None
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ (weight.t() if transposed else weight).conj()  # of real numbers: themselves
        if ctx.needs_input_grad[1]:
            product = live_product(as_matrix(kept), flat, cols if transposed else rows, transposed)
            if ctx.packing is not None:
                of_weight = PackedGradient(product, ctx.packing)
            else:
                of_weight = place(torch.zeros_like(weight, memory_format=torch.contiguous_format), product, rows, cols)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        return of_x, of_weight, of_bias, None, None, None, None


def as_autocast_would(device: torch.device, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors in autocast's dtype, where it is on."""
    if not torch.is_autocast_enabled(device.type):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def live_product(kept: Tensor, grad: Tensor, index: Tensor | None, transposed: bool) -> Tensor:
    """Live rows × live columns of a weight's gradient. ``kept``: what the weight was multiplied with, its live
    features; ``grad``: of the product, a matrix, of which ``index`` are live; None: all. ``transposed``: the weight is
    (in, out)."""
    live_grad = grad if index is None else grad.index_select(1, index)
    live_x = kept.conj()
    return live_x.t() @ live_grad if transposed else live_grad.t() @ live_x


def place(dense: Tensor, product: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """``dense``, a gradient of the whole weight, with ``product``, live rows × live columns, written into it."""
    if rows is not None and cols is not None:
        dense[rows[:, None], cols] = product.to(dense.dtype)
    elif rows is not None:
        dense.index_copy_(0, rows, product.to(dense.dtype))
    elif cols is not None:
        dense.index_copy_(1, cols, product.to(dense.dtype))
    else:
        dense.copy_(product)
    return dense
