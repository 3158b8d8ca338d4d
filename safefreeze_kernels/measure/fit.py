"""`fit`: which settings let a model train within so many bytes, told by a training step that is run on no memory."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..grads.forwards import Storage
from ..grads.live import live_gradients
from ..kernels.operands import dtype_word
from ..model.packed import stored
from ..optim.backward import ENOUGH
from ..plan.plan import FreezePlan
from .memory import GB, Holding, memory_plan

if TYPE_CHECKING:
    from rich.table import Table

STATES: Final = (torch.float32, torch.bfloat16, torch.int8)
_WHAT: Final = "fit"


@dataclass(frozen=True)
class Setting:
    """How a model may be trained.

    Attributes:
        checkpointing: blocks are computed again in the backward pass, instead of keeping what they computed.
        in_backward: `step_in_backward`, so that gradients do not exist all at once.
        state_dtype: of `MaskedAdamW`'s moments.
        storage: of gradients, as `live_gradients` has it; "dense": it is not used.
    """

    checkpointing: bool = False
    in_backward: bool = False
    state_dtype: torch.dtype = torch.float32
    storage: Storage = "dense"

    def lines(self, frozen: bool = True, masters: bool = False) -> str:
        """What sets it, in Python. ``frozen``: there is a plan; ``masters``: of bfloat16 weights."""
        more = ", freeze=plan" if frozen else ""
        more += f", state_dtype={self.state_dtype}" if self.state_dtype != torch.float32 else ""
        more += ', master="remainder"' if masters else ""
        lines = {
            "model.gradient_checkpointing_enable()": self.checkpointing,
            'sf.live_gradients(model, plan, storage="packed")': self.storage == "packed",
            f"optimizer = sf.MaskedAdamW(model.named_parameters(), lr=lr{more})": True,
            "loss = model(**batch, use_cache=False).loss": True,
            "with sf.step_in_backward(model, optimizer):\n    loss.backward()": self.in_backward,
            "loss.backward()\noptimizer.step()\noptimizer.zero_grad()": not self.in_backward,
        }
        return "\n".join(line for line, wanted in lines.items() if wanted)

    def __str__(self) -> str:
        """What differs from an ordinary step, but for the state."""
        words = {
            "packed": self.storage == "packed", "in backward": self.in_backward, "checkpointing": self.checkpointing,
        }  # fmt: skip
        return ", ".join(word for word, wanted in words.items() if wanted) or "ordinary"


@dataclass(frozen=True)
class Fit:
    """What `fit` found.

    Attributes:
        holdings: setting -> bytes at the moment of a step at which most are held, in the order in which settings are to
            be tried: those first that cost least.
        capacity: bytes that may be held.
        unknown: why activations are not counted; "": they are.
    """

    holdings: dict[Setting, Holding]
    capacity: int
    unknown: str = ""

    @property
    def best(self) -> Setting | None:
        """The first setting that fits, if any does."""
        fitting = (setting for setting, held in self.holdings.items() if held.total <= self.capacity)
        return next(fitting, None)

    def table(self) -> Table:
        """GB (10^9 bytes), a line for each way to step; for `rich.print`."""
        from rich.table import Table

        table = Table("GB", box=None, pad_edge=False)
        for heading in ("\ngradients", "\nactivations", *(f"{dtype_word(state)}\nstate" for state in STATES)):
            table.add_column(heading, justify="right")
        before = False
        for way in (setting for setting in self.holdings if setting.state_dtype == STATES[0]):
            if way.checkpointing != before:
                table.add_row()
                table.add_row("with checkpointing")
                before = way.checkpointing
            held = self.holdings[way]
            totals = [self.holdings[replace(way, state_dtype=state)].total for state in STATES]
            table.add_row(
                str(replace(way, checkpointing=False)), f"{held.gradients / GB:.2f}",
                "unknown" if self.unknown else f"{held.activations / GB:.2f}",
                *(f"{total / GB:.2f} {'*' if total <= self.capacity else ' '}" for total in totals),
            )  # fmt: skip
        return table

    def verdict(self) -> str:
        """What fits, in one line."""
        if self.best is None:
            least = min(held.total for held in self.holdings.values())
            return f"nothing fits {self.capacity / GB:.2f} GB: the least is {(least - self.capacity) / GB:.2f} GB more"
        left = self.capacity - self.holdings[self.best].total
        words = f"{self.best}, {dtype_word(self.best.state_dtype)} state"
        return f"* fits {self.capacity / GB:.2f} GB. First: {words}, {left / GB:.2f} GB left"


def fit(
    model: nn.Module,
    batch: Mapping[str, Any],
    plan: FreezePlan | None = None,
    *,
    capacity: int,
    dtype: torch.dtype = torch.bfloat16,
    master: str | None = None,
) -> Fit:
    """Which settings let ``model`` train on ``batch`` within ``capacity`` bytes of one device.

    Parameters, state and masters are counted as `memory_plan` does. Gradients and activations come from a step that is
    run on tensors without memory: forward and backward allocate and free as they would, attention as torch's fused
    kernel keeps it, and the most that was there at once counts. Not counted is what drivers, libraries and allocators
    keep for themselves. Settings are tried in this order: no checkpoints before checkpoints, which cost a second
    forward pass; a step after the backward pass before one inside, which cannot clip by the norm over all; float32
    state before bfloat16 and int8. Packed gradients are always taken where a plan has them, as they save time as well.

    Args:
        model: as it will be trained, maybe on the meta device. It is left as it is.
        batch: what the model is called with, labels included; only shapes and dtypes of tensors count.
        plan: what is frozen; None: nothing.
        capacity: bytes.
        dtype, master: of the weights, as for `memory_plan`.

    Raises:
        TypeError, ValueError: as `memory_plan`; ``capacity`` is no positive number, ``batch`` no mapping.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"{_WHAT}: batch is a {type(batch).__name__}, expected a mapping of the model's arguments")
    if not isinstance(capacity, int) or capacity <= 0:
        raise ValueError(f"{_WHAT}: capacity is {capacity!r}, expected a number of bytes > 0")
    storages: tuple[Storage, ...] = ("dense",) if plan is None or not plan.frozen_fraction else ("packed", "dense")
    checkpoints = (False, True) if getattr(model, "supports_gradient_checkpointing", False) else (False,)
    settings = [Setting(*one) for one in itertools.product(checkpoints, (False, True), STATES, storages)]
    holdings, unknown = {}, ""
    for setting in settings:
        by_device = memory_plan(
            model, plan, dtype=dtype, state_dtype=setting.state_dtype, master=master, storage=setting.storage
        ).masked
        held = sum(by_device.values(), Holding())
        holdings[setting] = replace(held, gradients=0) if setting.in_backward else held
    try:
        counted = {
            setting: _dry_run(model, batch, plan, dtype, setting)
            for setting in settings if setting.state_dtype == STATES[0]
        }  # fmt: skip
    except Exception as error:  # the model's own code on tensors without memory: anything may happen
        unknown = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    else:
        for setting in settings:
            gradients, activations = counted[replace(setting, state_dtype=STATES[0])]
            holdings[setting] = replace(holdings[setting], gradients=gradients, activations=activations)
    return Fit(holdings, capacity, unknown)


def _dry_run(
    model: nn.Module, batch: Mapping[str, Any], plan: FreezePlan | None, dtype: torch.dtype, setting: Setting
) -> tuple[int, int]:
    """Bytes of gradients, and of all else beside parameters and buffers, when most are held in a training step."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = _on_meta(model, dtype)
        if setting.checkpointing:
            enable: Any = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
            enable()
        if setting.storage == "packed" and plan is not None:
            live_gradients(net, plan, storage=setting.storage)
        _to_fake_cpu(net)
        inputs = {name: _fake_cpu(value) if isinstance(value, Tensor) else value for name, value in batch.items()}
        net.train()
        with Held([*net.parameters(), *net.buffers()]) as held:
            for p in net.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(held.waits if setting.in_backward else held.kept)  # type: ignore[no-untyped-call]
            net(**inputs).loss.backward()
    return held.gradients_then, held.most - held.gradients_then


def _on_meta(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``model`` on the meta device, whose weights have ``dtype``; ties are kept."""
    copies: dict[int, Any] = {}
    for p in model.parameters():
        empty = torch.empty(p.shape, dtype=dtype if p.dtype.is_floating_point else p.dtype, device="meta")
        copies[id(p)] = nn.Parameter(empty, p.requires_grad)
    copies |= {id(b): torch.empty(b.shape, dtype=b.dtype, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, copies)


def _to_fake_cpu(net: nn.Module) -> None:
    """Give it, in place, tensors of which torch believes that they are on the CPU: there it chooses fused attention, as
    it does on GPUs."""
    fakes: dict[int, Any] = {id(t): _fake_cpu(t) for t in (*net.parameters(), *net.buffers())}
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fakes[id(t)] for name, t in tensors.items() if t is not None})


def _fake_cpu(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, how many bytes of tensors are held that were made within, and how many at most at once.

    Attributes:
        most: bytes, of tensors' storages, each counted once.
        gradients_then: those among them that were complete gradients of parameters.
    """

    def __init__(self, apart: list[Tensor]) -> None:
        """``apart``: tensors that do not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self.gradients_then = self._now = self._gradients = 0
        self._waiting: list[Tensor] = []
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in apart}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(stored(tensor).untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place not in self._sizes:
            self._sizes[place] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._freed, place)
            if self._now > self.most:
                self.most, self.gradients_then = self._now, self._gradients

    def _freed(self, place: int) -> None:
        self._now -= self._sizes.pop(place)

    def kept(self, param: Tensor) -> None:
        """A parameter's gradient is complete."""
        self._gradients += stored(param.grad).nbytes

    def waits(self, param: Tensor) -> None:
        """A parameter's gradient is complete, and goes when `step_in_backward` drops it."""
        self.kept(param)
        self._waiting.append(param)
        if self._gradients >= ENOUGH:
            for stepped in self._waiting:
                stepped.grad = None
            self._waiting, self._gradients = [], 0
