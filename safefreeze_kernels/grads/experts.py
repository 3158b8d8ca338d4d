"""Live gradients of mixtures of experts whose weights are fused: one tensor (experts, rows, columns).

How such a weight is multiplied is left to the layer: a loop over experts, `torch._grouped_mm`, a batched product. While
the layer's own forward runs, it finds a stand-in (`_Fused`) in the place of each weight, which does what a tensor does,
but has products of activations with experts computed as `_LiveProduct`: forward as the layer asked for it, backward
expert by expert, where it learns. The products' gradients meet in one node, `_Gather`, which makes the weight's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..model.packed import PackedGradient
from ..model.sharding import is_sharded
from ..plan.mask import FreezeMask
from .forwards import LiveForward, LiveWeight, outside_the_graph
from .linear import as_autocast_would, as_matrix, live_product, place

#: A slice, or indices, of the rows of activations that an expert is given.
Span = Any


def is_fused(module: nn.Module, weight: Tensor) -> bool:
    """Whether ``weight`` is that of all experts of ``module``. Convolutions have three dimensions, too."""
    name = type(module).__name__.lower()
    return weight.dim() == 3 and weight.is_floating_point() and ("expert" in name or "moe" in name)


@dataclass(frozen=True)
class _Places:
    """Where one expert learns: index arrays of rows and columns; None: all. And how many those are."""

    rows: np.ndarray | None
    cols: np.ndarray | None
    n_rows: int
    n_cols: int

    @classmethod
    def of(cls, mask: FreezeMask) -> _Places:
        rows, cols = mask.live_rows, mask.live_cols
        whole_rows, whole_cols = rows.size == mask.shape[0], cols.size == mask.shape[1]
        return cls(None if whole_rows else rows, None if whole_cols else cols, rows.size, cols.size)


class LiveExperts(LiveWeight):
    """A fused weight; its mask freezes rows and columns of each expert."""

    def __init__(self, name: str, mask: FreezeMask, storage: Any) -> None:
        super().__init__(name, mask, storage)
        self.places = [_Places.of(each) for each in mask.matrices()]
        self._on_device: dict[torch.device, list[tuple[Tensor | None, Tensor | None]]] = {}

    def index(self, device: torch.device) -> list[tuple[Tensor | None, Tensor | None]]:
        """Rows and columns of each expert, as tensors."""
        if device not in self._on_device:
            self._on_device[device] = [
                (_on(each.rows, device), _on(each.cols, device)) if each.n_rows * each.n_cols else (None, None)
                for each in self.places
            ]
        return self._on_device[device]

    def assembled(self, products: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight's gradient, of live rows × live columns of each expert's; None: the expert was given nothing."""
        if self.packing is not None:
            flat = torch.zeros(self.mask.live_count, dtype=dtype, device=device)
            start = 0
            for each, product in zip(self.places, products, strict=True):
                end = start + each.n_rows * each.n_cols
                if product is not None:
                    flat[start:end] = product.reshape(-1)
                start = end
            return PackedGradient(flat.view(self.mask.packed_shape), self.packing)
        dense = torch.zeros(self.mask.shape, dtype=dtype, device=device)
        for one, product, index in zip(dense, products, self.index(device), strict=True):
            if product is not None and product.numel():
                place(one, product, *index)
        return dense


def _on(index: np.ndarray | None, device: torch.device) -> Tensor | None:
    return None if index is None else torch.from_numpy(index).to(device)


class ExpertsForward(LiveForward):
    """The forward of a layer of experts, some of whose weights have live gradients."""

    weights: dict[str, LiveExperts]

    def __call__(self, *given: Any, **named: Any) -> Any:
        layer: Any = self._layer()
        forward = type(layer).forward
        live = {name: one for name, one in self.weights.items() if one.applies(getattr(layer, name))}
        if self.removed or not live or any(map(is_sharded, (*given, *named.values()))):
            return forward(layer, *given, **named)
        if torch.compiler.is_compiling():  # compilers would have to follow stand-ins through whatever the layer does
            return outside_the_graph(_run, forward, layer, live, given, named)
        return _run(forward, layer, live, given, named)


def _run(
    forward: Callable[..., Any], layer: Any, live: dict[str, LiveExperts], given: Any, named: dict[str, Any]
) -> Any:
    """``forward`` of ``layer``, with stand-ins for weights: attributes are found before parameters."""
    attributes = vars(layer)
    counts: dict[int, tuple[Tensor, list[int]]] = {}
    uses = [_Use(one, getattr(layer, name), type(layer).__name__, counts) for name, one in live.items()]
    try:
        for name, use in zip(live, uses, strict=True):
            attributes[name] = use.stand_in()
        return forward(layer, *given, **named)
    finally:
        for name in live:
            attributes.pop(name, None)


# ------------------------------------------------------------------------------------------------------ stand-ins


class _Use:
    """A weight, in one run of its layer's forward. ``counts``: what was read of offsets in that run."""

    def __init__(
        self, live: LiveExperts, weight: Tensor, owner: str, counts: dict[int, tuple[Tensor, list[int]]]
    ) -> None:
        self.live, self.weight, self.owner = live, weight, owner
        self._targets: tuple[Tensor, ...] = ()
        self._counts = counts

    def stand_in(self) -> _Fused:
        alias = self.weight.view_as(self.weight)
        alias.register_hook(self._refuse)  # type: ignore[no-untyped-call]
        return _Fused.of(alias, self, None, False)

    def _refuse(self, grad: Tensor) -> None:
        """What was not computed as a live product flows back through the stand-in."""
        raise RuntimeError(
            f"live_gradients: {self.owner} computes with {self.live.name!r} otherwise than by linear, matmul, bmm or "
            "grouped_mm of its experts, so its whole gradient would be computed; set_experts_implementation('eager') "
            "or 'grouped_mm' where transformers has them, or take the weight out of the plan given to live_gradients"
        )

    def targets(self) -> tuple[Tensor, ...]:
        """What gradients of the experts flow to: a tensor for each, of live rows × live columns, without memory."""
        if not self._targets:
            self.live.ran = True
            self._targets = _Gather.apply(self.weight, self.live)  # type: ignore[no-untyped-call]
        return self._targets

    def spans(self, offsets: Tensor) -> list[tuple[int, Span]]:
        """Experts with their rows of activations that are sorted by expert. The device is waited for once a run."""
        if id(offsets) not in self._counts:
            self._counts[id(offsets)] = offsets, offsets.tolist()
        ends = self._counts[id(offsets)][1]
        begins = [0, *ends[:-1]]
        return [(e, slice(begin, end)) for e, (begin, end) in enumerate(zip(begins, ends, strict=True)) if end > begin]


class _Fused(Tensor):
    """A fused weight, or a part of it, as the forward of its layer sees it: a tensor, but for products with it.

    Attributes:
        use: of the weight.
        picked: which experts: None: all; an int: one, a matrix; a tensor: several, in that order.
        flipped: whether rows and columns are exchanged.
    """

    use: _Use
    picked: int | Tensor | None
    flipped: bool

    @staticmethod
    def of(plain: Tensor, use: _Use, picked: int | Tensor | None, flipped: bool) -> _Fused:
        self: _Fused = plain.as_subclass(_Fused)
        self.use, self.picked, self.flipped = use, picked, flipped
        return self

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "input" in kwargs:
            args = kwargs.pop("input"), *args
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
        with torch._C.DisableTorchFunctionSubclass():
            if name in _KEEPING and isinstance(args[0], _Fused):
                return _Fused.of(func(*args, **kwargs), args[0].use, args[0].picked, args[0].flipped)
            change = _CHANGING.get(name)
            if change is not None and (made := change(args, func(*args, **kwargs))) is not None:
                return made
            product = _PRODUCTS.get(name)
            if product is not None and (found := product(func, *args, **kwargs)) is not None:
                return found
            return func(*args, **kwargs)


#: What gives the same in another dtype or layout.
_KEEPING: Final = frozenset(("to", "type", "type_as", "float", "half", "bfloat16", "contiguous"))


def _chosen(args: tuple[Any, ...], found: Tensor) -> _Fused | None:
    """``weight[index]``: one expert, or several."""
    whole, index = args
    if whole.picked is not None or whole.flipped:
        return None
    if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and index.dtype != torch.bool):
        return _Fused.of(found, whole.use, int(index) % whole.shape[0], False)
    if isinstance(index, Tensor) and index.dim() == 1 and index.dtype != torch.bool:
        return _Fused.of(found, whole.use, index, False)
    return None


def _turned(args: tuple[Any, ...], found: Tensor) -> _Fused | None:
    """Rows and columns exchanged."""
    whole, *dims = args
    last = {whole.dim() - 2, whole.dim() - 1}
    if whole.dim() < 2 or (dims and {dim % whole.dim() for dim in dims} != last) or (not dims and whole.dim() != 2):
        return None
    return _Fused.of(found, whole.use, whole.picked, not whole.flipped)


_CHANGING: Final[dict[str, Callable[[tuple[Any, ...], Tensor], _Fused | None]]] = {
    "__getitem__": _chosen,
    "transpose": _turned,
    "swapaxes": _turned,
    "t": _turned,
    "T": _turned,
    "mT": lambda args, found: _turned((args[0], -2, -1), found),
}


# ------------------------------------------------------------------------------------------------------- products
# Each gives None for what it does not know; then torch computes it with the alias, whose hook tells of it.


def _linear(func: Any, x: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if not _plain(x) or not isinstance(weight, _Fused) or not isinstance(weight.picked, int):
        return None
    return _product(weight, x, lambda a, w, b: func(a, w, b), [(weight.picked, slice(None))], weight.flipped, bias)


def _matmul(func: Any, x: Any, other: Any, **options: Any) -> Tensor | None:
    if not _plain(x) or not isinstance(other, _Fused) or options:
        return None
    if isinstance(other.picked, int):
        return _product(other, x, lambda a, w, _: func(a, w), [(other.picked, slice(None))], not other.flipped)
    return _bmm(func, x, other) if x.dim() == other.dim() == 3 and x.shape[0] == other.shape[0] else None


def _bmm(func: Any, x: Any, mat2: Any, **options: Any) -> Tensor | None:
    """Activations of all experts; or one row for each of the experts picked, on either side of the weights."""
    if options:
        return None
    if _plain(x) and isinstance(mat2, _Fused):
        if mat2.picked is None:
            spans = [(e, e) for e in range(mat2.shape[0])]
            return _product(mat2, x, lambda a, w, _: func(a, w), spans, not mat2.flipped)
        if isinstance(mat2.picked, Tensor) and x.shape[1] == 1:
            spans = _sorted_by_expert(mat2.picked)
            return _product(mat2, x[:, 0], lambda a, w, _: func(a[:, None], w), spans, not mat2.flipped)
    if isinstance(x, _Fused) and _plain(mat2) and isinstance(x.picked, Tensor) and mat2.shape[2] == 1:
        spans = _sorted_by_expert(x.picked)
        return _product(x, mat2[..., 0], lambda a, w, _: func(w, a[..., None]), spans, x.flipped)
    return None


def _grouped(func: Any, x: Any, weight: Any, offs: Tensor | None = None, **options: Any) -> Tensor | None:
    known = _plain(x) and isinstance(weight, _Fused) and weight.picked is None and x.dim() == 2
    if not known or offs is None or any(option is not None for option in options.values()):
        return None
    spans = weight.use.spans(offs)
    compute = lambda a, w, _: func(a, w, offs=offs)  # noqa: E731
    return _product(weight, x, compute, spans, not weight.flipped, cast=False)


_PRODUCTS: Final[dict[str, Callable[..., Tensor | None]]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "mm"), _matmul),
    "bmm": _bmm,
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
}


def _plain(thing: Any) -> bool:
    return isinstance(thing, Tensor) and not isinstance(thing, _Fused)


def _sorted_by_expert(picked: Tensor) -> list[tuple[int, Span]]:
    order = torch.argsort(picked, stable=True)
    counts: list[int] = torch.bincount(picked).tolist()
    return [(e, rows) for e, rows in enumerate(torch.split(order, counts)) if rows.numel()]


def _product(
    weight: _Fused, x: Tensor, compute: Callable[..., Tensor], spans: list[tuple[int, Span]], transposed: bool,
    bias: Tensor | None = None, *, cast: bool = True,
) -> Tensor:  # fmt: skip
    """``compute(x, weight, bias)`` with live gradients.

    Args:
        x: activations, the last dimension of which the weight takes.
        spans: experts, each with its rows of ``x``.
        transposed: whether the experts, as they are stored, are (in, out).
        cast: whether autocast would cast ``x`` and the weight.
    """
    used: Any = weight.detach().as_subclass(Tensor)
    if cast:
        x, used, bias = as_autocast_would(x.device, x, used, bias)
    use = weight.use
    call = _Call(use.live, compute, spans, transposed, isinstance(weight.picked, Tensor))
    targets = use.targets()
    apply: Any = _LiveProduct.apply
    found: Tensor = apply(x, use.weight.detach(), used, bias, call, *(targets[e] for e, _ in spans))
    return found


@dataclass(frozen=True)
class _Call:
    """What `_LiveProduct` is to do: see `_product`. ``one_by_one``: the gradient of activations is computed expert by
    expert, since the weights they were multiplied with are copies."""

    live: LiveExperts
    compute: Callable[..., Tensor]
    spans: list[tuple[int, Span]]
    transposed: bool
    one_by_one: bool

    def learning(self) -> Iterator[tuple[int, int, Span]]:
        """Of the spans those of experts that are not wholly frozen, numbered."""
        places = self.live.places
        return ((n, e, span) for n, (e, span) in enumerate(self.spans) if places[e].n_rows * places[e].n_cols)


class _LiveProduct(torch.autograd.Function):
    """``compute(x, used, bias)``. ``weight``: what ``used`` is made of, (experts, rows, columns). ``targets``: what the
    gradient of the expert of each span goes to."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, used: Tensor, bias: Tensor | None, call: _Call, *targets: Tensor
    ) -> Tensor:
        inputs = 0 if call.transposed else 1
        index = call.live.index(x.device)
        learning = [(span, index[e][inputs]) for _, e, span in call.learning()]
        whole = bool(learning) and all(live is None for _, live in learning)
        # what gradients of the weight need of it: otherwise expert by expert
        kept = [x] if whole else [x[span] if i is None else x[span].index_select(-1, i) for span, i in learning]
        ctx.save_for_backward(weight, *kept)
        ctx.call, ctx.whole, ctx.has_bias = call, whole, bias is not None
        ctx.x_shape, ctx.is_one = x.shape, used.dim() == 2
        return call.compute(x, used, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        call = ctx.call
        grad = grad.reshape(len(grad), -1) if call.one_by_one else grad
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _of_activations(ctx, grad, weight)
        products: list[Tensor | None] = [None] * len(call.spans)
        index, outputs = call.live.index(grad.device), 1 if call.transposed else 0
        for i, (n, e, span) in enumerate(call.learning()):
            x = as_matrix(kept[0][span] if ctx.whole else kept[i])
            products[n] = live_product(x, as_matrix(grad[span]), index[e][outputs], call.transposed)
        if ctx.has_bias and ctx.needs_input_grad[3]:
            of_bias = as_matrix(grad).sum(0)
        return of_x, None, None, of_bias, None, *products


def _of_activations(ctx: Any, grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of what was multiplied with the experts: by the very operation, with weights turned."""
    call = ctx.call
    back = weight.mT if call.transposed else weight  # experts as (out, in)
    if call.one_by_one:
        of_x = grad.new_empty(ctx.x_shape)
        for e, rows in call.spans:
            of_x[rows] = grad[rows] @ back[e].to(grad.dtype)
    elif ctx.is_one:
        of_x = grad @ back[call.spans[0][0]].to(grad.dtype)
    else:
        of_x = call.compute(grad.contiguous(), back.to(grad.dtype), None)
    return of_x


class _Gather(torch.autograd.Function):
    """A weight, as what gradients of its experts flow to: once all of them are there, the weight's is made."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, live: LiveExperts) -> tuple[Tensor, ...]:
        ctx.live, ctx.like = live, (weight.dtype, weight.device)
        ctx.set_materialize_grads(False)
        return tuple(weight.new_empty(()).expand(each.n_rows, each.n_cols) for each in live.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *products: Tensor | None) -> tuple[Tensor, None]:
        return ctx.live.assembled(products, *ctx.like), None
