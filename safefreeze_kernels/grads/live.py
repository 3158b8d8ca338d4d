"""Weight gradients only where the model learns: `live_gradients`.

A linear layer's weight gradient is ``dY.T @ X``. Of a weight with frozen rows only ``dY[:, live].T @ X`` is computed,
of one with frozen columns ``dY.T @ X[:, live]``, and only the live columns of ``X`` are kept for it.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from ..model.attached import Attached, attach, detach
from ..model.packed import PackedGradient, packing
from ..model.sharding import is_sharded
from ..plan.binding import BoundMask, bind, named_tensors
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .reader import writes

Storage = Literal["dense", "packed"]

#: Share of a weight's elements that may be live for it to pay: above, gathering costs more than the smaller product
#: saves. Measured on a CPU (benchmarks/NOTES.md); the same is taken for GPUs, unmeasured.
MOST_LIVE: Final = 0.75
#: Modules beside `torch.nn.Linear` that compute the same: transformers' GPT-2 and Falcon layers, and `fully_shard`'s.
_LINEAR: Final = ("Conv1D", "FalconLinear", "FSDPLinear", "FSDPFalconLinear", "FSDPConv1D")


@dataclass(frozen=True)
class LiveLayer:
    """What `live_gradients` does with one weight of the plan.

    Attributes:
        name: of the weight.
        live: share of its elements whose gradient is computed.
        left_alone: why it has an ordinary gradient; "": it has not.
    """

    name: str
    live: float
    left_alone: str = ""


class LiveGradients:
    """Made by `live_gradients`; `remove` undoes it, and so does leaving a ``with`` block, which can be entered once.

    A copy of it has nothing to undo, as a copy of the model has no live gradients.

    Attributes:
        layers: what became of each weight of the plan.
        storage: of the gradients.
    """

    def __init__(self, model: nn.Module, plan: FreezePlan, most_live: float, storage: Storage) -> None:
        operation = "live_gradients"
        if not isinstance(model, nn.Module):
            raise TypeError(f"{operation}: model is a {type(model).__name__}, expected a torch.nn.Module")
        if not isinstance(plan, FreezePlan):
            raise TypeError(f"{operation}: plan is a {type(plan).__name__}, expected a FreezePlan")
        if not 0.0 <= most_live <= 1.0:
            raise ValueError(f"{operation}: most_live is {most_live}, expected a share from 0 to 1")
        if storage not in get_args(Storage):
            raise ValueError(f"{operation}: storage is {storage!r}, expected 'dense' or 'packed'")
        bound = bind(plan, named_tensors(model), operation=operation, absent=True)
        taken = forwards()
        for entry in bound:
            if storage == "packed" and is_sharded(entry.param):
                raise ValueError(
                    f"{operation}: {entry.name!r} is sharded, and packed gradients are for one device; use "
                    "storage='dense'"
                )
            if id(entry.param) in taken:
                raise ValueError(f"{operation}: {entry.name!r} has live gradients already; remove those first")
        self.storage, self.most_live = storage, most_live
        self.layers: list[LiveLayer] = []
        self._forwards: list[_LiveForward] = []
        self._may_enter = True
        for entry, module, reason in suited(model, bound, most_live):
            live = entry.mask.live_count / entry.mask.numel if entry.mask.numel else 1.0
            self.layers.append(LiveLayer(entry.name, 1.0 if reason else live, reason))
            if module is not None:
                self._forwards.append(_LiveForward(module, entry, storage))

    def remove(self) -> None:
        """The model is as it was; gradients that are there stay, without what was not computed."""
        self._may_enter = False
        while self._forwards:
            self._forwards.pop().remove()

    def summary(self) -> str:
        """A table: weights by what is done with them, and why."""
        done = [layer.live for layer in self.layers if not layer.left_alone]
        left_alone = Counter(layer.left_alone for layer in self.layers if layer.left_alone)
        found = (
            f"{len(done)} of {len(self.layers)} weights have live gradients only ({self.storage}); "
            f"{sum(done) / len(done) if done else 1.0:.1%} of them on average; it pays up to {self.most_live:.0%}"
        )
        return "\n".join([found, *(f"{count} left alone: {reason}" for reason, count in left_alone.items())])

    def __enter__(self) -> LiveGradients:
        if not self._may_enter:
            raise RuntimeError(
                "live_gradients: this handle was entered or removed before, or is a copy, expected a new one; call "
                "live_gradients again"
            )
        self._may_enter = False
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_forwards": [], "_may_enter": False}

    def __repr__(self) -> str:
        return f"LiveGradients({self.summary().splitlines()[0]})"


def live_gradients(
    model: nn.Module, plan: FreezePlan, *, storage: Storage = "dense", most_live: float = MOST_LIVE
) -> LiveGradients:
    """Have linear layers compute their weight gradients only where ``plan`` lets them learn.

    With ``storage="dense"``, ``.grad`` stays an ordinary full gradient, zero where frozen: clipping, accumulation, DDP,
    FSDP2 and any optimizer work as before. With ``"packed"`` it is held only where the weight learns, and takes that
    share of the memory: on one device, for `MaskedAdamW`, `MaskedAdam`, `clip_grad_norm_` and what only scales
    gradients or takes their norm (`torch.nn.utils.clip_grad_norm_`, `torch.amp.GradScaler`). Whatever needs an ordinary
    gradient raises RuntimeError: another optimizer, DDP, arithmetic in a hook. Under `torch.compile` such layers run
    outside the graph.

    Names, state dict and module classes stay as they are. Live values are those of plain autograd, but for the order of
    sums inside smaller matrix products. Parameters that take the place of others later (``to``, ``load_state_dict(...,
    assign=True)``) have live gradients too, tensors that `torch.func.functional_call` lends have not.

    The model alone has them: copies (``copy.deepcopy``, `torch.optim.swa_utils.AveragedModel`, ``pickle``,
    ``torch.save``) are ordinary models, with ordinary gradients of their own.

    Done for `torch.nn.Linear` and transformers' ``Conv1D`` whose mask has whole rows or columns; other weights are left
    alone, as `LiveGradients.summary` tells: single elements, weights that several modules share, those of which too
    much is live to gain anything, and tensor-parallel ones when they run.

    Args:
        model: its modules get a ``forward`` of their own until `LiveGradients.remove`.
        plan: what is frozen; the optimizer must freeze at least that, with packed gradients exactly that.
        storage: "dense" or "packed".
        most_live: weights of which a larger share is live are left alone.

    Returns:
        A handle, also a context manager. Gradients do not support ``create_graph``.

    Raises:
        ValueError: the plan does not fit the model; a weight has live gradients already; packed gradients of a sharded
            model. From the model: a weight has another shape than it had.
    """
    return LiveGradients(model, plan, most_live, storage)


def generation() -> int:
    """A number that has grown whenever live gradients of any model were switched on or off: what was read from
    `check_live_gradients` holds as long as it stays."""
    return _LiveForward.changes


def forwards() -> dict[int, _LiveForward]:
    """id of a weight -> what computes live gradients of it now. Asked of the layers, since parameters are swapped and
    copied."""
    return {id(layer._parameters.get("weight")): forward for layer, forward in list(_forwards.items())}


def check_live_gradients(
    param: Tensor, mask: FreezeMask, name: str, operation: str, found: Mapping[int, _LiveForward]
) -> None:
    """Raise ValueError if ``param`` lacks gradients of elements that ``mask`` does not freeze, or if they are packed by
    another mask; also if it has one that was computed so before live gradients were removed, and is as it was then.
    ``found``: `forwards`."""
    grad: Any = param.grad  # which may have gone from one parameter to another
    lacking, version = mask, 0
    if grad is not None and _incomplete.data:
        lacking, version = _incomplete.get(grad, (mask, 0))  # type: ignore[no-untyped-call]
    if lacking.shape == mask.shape and lacking != mask and version == writes(grad) and (lacking | mask) != mask:
        raise ValueError(
            f"{operation}: grad of {name!r} was computed under live_gradients, without elements that learn now; call "
            "zero_grad() and run the backward pass again"
        )
    forward = found.get(id(param))
    if forward is None or forward.mask == mask:
        return
    if (forward.mask | mask) != mask:
        raise ValueError(
            f"{operation}: {name!r} learns where live_gradients computes no gradient; remove that and call it with the "
            "new plan"
        )
    if forward.storage == "packed":
        raise ValueError(
            f"{operation}: more of {name!r} is frozen than its packed gradient leaves out; remove live_gradients and "
            "call it with the new plan"
        )


def refuse_packed_gradients(params: Sequence[Tensor], names: Sequence[str], operation: str) -> None:
    """Raise ValueError if a parameter has, or will have, a packed gradient: kernels find it where they find packed
    state, and state is whole."""
    found = forwards()
    for param, name in zip(params, names, strict=True) if PackedGradient.seen or found else ():
        forward = found.get(id(param))
        if packing(param.grad) is not None or (forward is not None and forward.storage == "packed"):
            raise ValueError(
                f"{operation}: gradients of {name!r} are packed by its mask, but its state is kept in full; use "
                "live_gradients(storage='dense'), or keep_state=False"
            )


def suited(
    model: nn.Module, bound: Sequence[BoundMask], most_live: float = MOST_LIVE
) -> Iterator[tuple[BoundMask, nn.Module | None, str]]:
    """Each weight of a plan with the module that can have live gradients of it; or with None, and why not."""
    homes: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, p in module._parameters.items():
            homes[id(p)].append((module, name))
    for entry in bound:
        found = homes[id(entry.param)]
        reason = _unsuited(entry, found, most_live)
        yield entry, None if reason else found[0][0], reason


def _unsuited(entry: BoundMask, homes: list[tuple[nn.Module, str]], most_live: float) -> str:
    """Why a weight has no live gradients, or "". ``homes``: the modules it belongs to, and its name in each."""
    if len(homes) != 1:
        return "several modules share the weight"
    ((module, name),) = homes
    kind, mask, replaced = type(module), entry.mask, vars(module).get("forward")
    is_linear = name == "weight" and (kind is nn.Linear or kind.__name__ in _LINEAR)
    removed = isinstance(replaced, _LiveForward) and replaced.removed
    reasons = {
        f"{kind.__name__}.{name} is no linear layer's weight": not is_linear,
        "single elements are frozen": mask.bits is not None,
        "its forward was replaced by something else": replaced is not None and not removed,
        "nothing is frozen": not mask.frozen_count,
        f"more than {most_live:.0%} of it is live": mask.live_count > most_live * mask.numel,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


class _LiveForward(Attached):
    """The forward of one linear layer, by which its weight has live gradients.

    Wherever a copy of the layer would have it, the copy has the forward of its class instead, bound to itself.
    """

    attribute = "forward"
    changes: ClassVar[int] = 0  #: how often any was attached or removed

    def __init__(self, layer: nn.Module, entry: BoundMask, storage: Storage) -> None:
        self.mask, self.storage, self.removed = entry.mask, storage, False
        self._layer, self._name = weakref.ref(layer), entry.name
        self._transposed = type(layer).__name__.endswith("Conv1D")  # its weight is (in, out)
        self._bias_apart = type(layer).__name__.endswith("FalconLinear")  # its bias is added to a rounded product
        self._packing = entry.mask if storage == "packed" else None
        n_rows, n_cols = entry.mask.matrix_shape
        rows, cols = entry.mask.live_rows, entry.mask.live_cols
        self._places = [
            None if index.size == size else torch.from_numpy(index) for index, size in ((rows, n_rows), (cols, n_cols))
        ]
        self._on_device: dict[torch.device, list[Tensor | None]] = {}
        self._ran = False  # so that the weight's gradient may lack something
        attach(layer, self)
        _forwards[layer] = self
        _LiveForward.changes += 1

    def remove(self) -> None:
        """Undo it; if something else wrapped this, what it wraps is an ordinary forward from now on."""
        self.removed = True
        if (layer := self._layer()) is not None:
            detach(layer, self)
            _forwards.pop(layer, None)
            weight: Any = layer.weight
            if self._ran and weight.grad is not None and self.storage == "dense":  # a packed one tells of itself
                _incomplete[weight.grad] = self.mask, writes(weight.grad)
        _LiveForward.changes += 1

    def __reduce__(self) -> Any:
        return getattr, (self._layer(), "forward")

    def __call__(self, *given: Any, **named: Any) -> Tensor:
        layer: Any = self._layer()
        weight = layer.weight
        (x,) = (*given, *named.values())
        if self._is_ordinary(x, weight):
            result: Tensor = type(layer).forward(layer, x)
            return result
        self._ran = True
        if x.device not in self._on_device:
            self._on_device[x.device] = [None if i is None else i.to(x.device) for i in self._places]
        live_rows, live_cols = self._on_device[x.device]
        bias, packing, apart = layer.bias, self._packing, self._bias_apart
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        apply = _LiveLinear.apply if packing is None or not torch.compiler.is_compiling() else _outside_the_graph
        found: Tensor = apply(x, weight, None if apart else bias, live_rows, live_cols, self._transposed, packing)
        return found + bias if apart and bias is not None else found

    def _is_ordinary(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the forward of the layer's class is to run. ``weight``: what the layer would compute with, which is
        no parameter if `torch.func.functional_call` lent it."""
        if self.removed or not (torch.is_grad_enabled() and weight.requires_grad and isinstance(weight, nn.Parameter)):
            return True
        if is_sharded(weight) and self._packing is not None:
            raise RuntimeError(
                f"live_gradients: {self._name!r} was sharded afterwards, and packed gradients are for one device; use "
                "storage='dense'"
            )
        if weight.shape != self.mask.shape:
            raise ValueError(
                f"live_gradients: {self._name!r} has shape {tuple(weight.shape)}, expected {self.mask.shape} as "
                "before; remove it and call it with a plan for the new shape"
            )
        return is_sharded(weight) or is_sharded(x)


#: Layers that have live gradients now.
_forwards: weakref.WeakKeyDictionary[nn.Module, _LiveForward] = weakref.WeakKeyDictionary()
#: Gradient -> what it lacked when live gradients were removed, and how often it had been written to.
_incomplete: Final = WeakIdKeyDictionary()


class _LiveLinear(torch.autograd.Function):
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
        flat = _matrix(grad)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ (weight.t() if transposed else weight).conj()  # of real numbers: themselves
        if ctx.needs_input_grad[1]:
            index = cols if transposed else rows
            live_grad = flat if index is None else flat.index_select(1, index)
            live_x = _matrix(kept).conj()
            product = live_x.t() @ live_grad if transposed else live_grad.t() @ live_x
            of_weight = (
                _placed(product, weight, rows, cols) if ctx.packing is None else PackedGradient(product, ctx.packing)
            )
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        return of_x, of_weight, of_bias, None, None, None, None


def _outside_the_graph(*arguments: Any) -> Any:
    """Compilers do not know packed gradients."""
    return torch.compiler.disable(_LiveLinear.apply)(*arguments)  # type: ignore[no-untyped-call]


_outside_the_graph._torchdynamo_disable = True  # type: ignore[attr-defined]


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _placed(product: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """``product``, live rows × live columns, in a gradient of ``weight`` that is zero elsewhere."""
    dense = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if rows is not None and cols is not None:
        dense[rows[:, None], cols] = product
    elif rows is not None:
        dense.index_copy_(0, rows, product)
    elif cols is not None:
        dense.index_copy_(1, cols, product)
    return dense
