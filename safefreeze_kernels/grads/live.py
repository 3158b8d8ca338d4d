"""Weight gradients only where the model learns: `live_gradients`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from torch import Tensor, nn

from ..model.packed import PackedGradient, packing
from ..model.sharding import is_sharded
from ..plan.binding import BoundMask, bind, named_tensors
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .experts import ExpertsForward, LiveExperts, is_fused
from .forwards import LiveForward, LiveWeight, Storage, forwards, lacking
from .linear import LinearForward

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
        self._may_enter = True
        homes: dict[nn.Module, list[BoundMask]] = defaultdict(list)
        for entry, module, reason in suited(model, bound, most_live):
            live = entry.mask.live_count / entry.mask.numel if entry.mask.numel else 1.0
            self.layers.append(LiveLayer(entry.name, 1.0 if reason else live, reason))
            if module is not None:
                homes[module].append(entry)
        self._forwards = [_forward(module, entries, storage) for module, entries in homes.items()]

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
    """Have linear layers and fused experts compute their weight gradients only where ``plan`` lets them learn.

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

    Done for `torch.nn.Linear` and transformers' ``Conv1D`` whose mask has whole rows or columns; and for experts in one
    tensor (experts, rows, columns) of which whole rows or columns of each are frozen, whatever way of linear, matmul,
    bmm or grouped_mm their layer computes them by; under `torch.compile` these run outside the graph. Other weights are
    left alone, as `LiveGradients.summary` tells: single elements, weights that several modules share, those of which
    too much is live to gain anything, and tensor-parallel ones when they run.

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
        RuntimeError: from the backward pass: experts were computed in another way, as by kernels of their own.
    """
    return LiveGradients(model, plan, most_live, storage)


def check_live_gradients(
    param: Tensor, mask: FreezeMask, name: str, operation: str, found: Mapping[int, LiveWeight]
) -> None:
    """Raise ValueError if ``param`` lacks gradients of elements that ``mask`` does not freeze, or if they are packed by
    another mask; also if it has one that was computed so before live gradients were removed, and is as it was then.
    ``found``: `forwards`."""
    lacks = None if param.grad is None else lacking(param.grad)  # it may have gone from one parameter to another
    if lacks is not None and lacks.shape == mask.shape and (lacks | mask) != mask:
        raise ValueError(
            f"{operation}: grad of {name!r} was computed under live_gradients, without elements that learn now; call "
            "zero_grad() and run the backward pass again"
        )
    live = found.get(id(param))
    if live is None or live.mask == mask:
        return
    if (live.mask | mask) != mask:
        raise ValueError(
            f"{operation}: {name!r} learns where live_gradients computes no gradient; remove that and call it with the "
            "new plan"
        )
    if live.storage == "packed":
        raise ValueError(
            f"{operation}: more of {name!r} is frozen than its packed gradient leaves out; remove live_gradients and "
            "call it with the new plan"
        )


def refuse_packed_gradients(params: Sequence[Tensor], names: Sequence[str], operation: str) -> None:
    """Raise ValueError if a parameter has, or will have, a packed gradient: kernels find it where they find packed
    state, and state is whole."""
    found = forwards()
    for param, name in zip(params, names, strict=True) if PackedGradient.seen or found else ():
        live = found.get(id(param))
        if packing(param.grad) is not None or (live is not None and live.storage == "packed"):
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
    fused = is_fused(module, entry.param)
    removed = isinstance(replaced, LiveForward) and replaced.removed
    reasons = {
        f"{kind.__name__}.{name} is no linear layer's weight": not is_linear and not fused,
        "single elements are frozen": mask.bits is not None and not (fused and _by_expert(mask)),
        "its forward was replaced by something else": replaced is not None and not removed,
        "nothing is frozen": not mask.frozen_count,
        f"more than {most_live:.0%} of it is live": mask.live_count > most_live * mask.numel,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def _by_expert(mask: FreezeMask) -> bool:
    """Whether of each expert whole rows or columns are frozen: those of one alone are single elements of its tensor."""
    return all(one.bits is None for one in mask.matrices())


def _forward(module: nn.Module, entries: list[BoundMask], storage: Storage) -> LiveForward:
    """Give a module live gradients of what `suited` found it suited for."""
    if is_fused(module, entries[0].param):
        names = {id(p): name for name, p in module._parameters.items()}
        live = {names[id(entry.param)]: LiveExperts(entry.name, entry.mask, storage) for entry in entries}
        return ExpertsForward(module, live)
    (entry,) = entries
    return LinearForward(module, LiveWeight(entry.name, entry.mask, storage))
