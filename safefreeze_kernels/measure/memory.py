"""What training holds in memory: told before anything is allocated (`memory_plan`), and as it is measured."""

from __future__ import annotations

import ctypes
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import torch

from ..grads.forwards import Storage
from ..grads.live import suited
from ..kernels.operands import STORAGE, moment_dtype
from ..model.sharding import held, local
from ..plan.binding import bind, named_tensors
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan

if TYPE_CHECKING:
    from rich.table import Table

GB: Final = 10**9


@dataclass(frozen=True)
class Holding:
    """Bytes that training holds on one device."""

    parameters: int = 0  # buffers included
    gradients: int = 0
    state: int = 0
    masters: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def __add__(self, other: Holding) -> Holding:
        return Holding(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class MemoryPlan:
    """What `memory_plan` found.

    Attributes:
        masked: device -> bytes under `MaskedAdamW`.
        stock: device -> bytes under `torch.optim.AdamW` with nothing frozen, whose state has the weights' dtype.
        capacity: bytes of each device, if given.
    """

    masked: dict[str, Holding]
    stock: dict[str, Holding]
    capacity: int | None = None

    @property
    def fits(self) -> bool | None:
        """Whether each device holds what falls to it; None: no capacity was given."""
        return None if self.capacity is None else all(h.total <= self.capacity for h in self.masked.values())

    def table(self) -> Table:
        """GB (10^9 bytes) by device; for `rich.print`."""
        from rich.table import Table

        table = Table("GB", box=None, pad_edge=False)
        holdings = []
        for device, own in self.masked.items():
            for word, holding in (("masked", own), ("stock", self.stock[device])):
                holdings.append(holding)
                table.add_column(word if len(self.masked) == 1 else f"{device} {word}", justify="right")
        for name in [*(f.name for f in fields(Holding)), "total"]:
            values = [getattr(holding, name) for holding in holdings]
            if any(values):
                table.add_row(name, *(f"{value / GB:.3f}" for value in values), end_section=name == "activations")
        return table

    def verdict(self) -> str:
        """One line per device: whether it fits, and by how much."""
        lines = []
        for device, holding in self.masked.items() if self.capacity is not None else ():
            left = (self.capacity or 0) - holding.total
            word = f"fits, {left / GB:.2f} GB left" if left >= 0 else f"does not fit, {-left / GB:.2f} GB too much"
            lines.append(f"{device}: {word} of {(self.capacity or 0) / GB:.2f}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join(filter(None, (as_text(self.table()), self.verdict())))


def as_text(table: Table) -> str:
    """A table as plain text, 80 columns wide."""
    from io import StringIO

    from rich.console import Console

    buffer = StringIO()
    Console(file=buffer, width=80, color_system=None).print(table, highlight=False)
    return "\n".join(map(str.rstrip, buffer.getvalue().splitlines()))


def memory_plan(
    model: torch.nn.Module,
    plan: FreezePlan | None = None,
    *,
    dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
    amsgrad: bool = False,
    master: str | None = None,
    keep_state: bool = False,
    storage: Storage = "dense",
    activation_bytes: int = 0,
    capacity: int | None = None,
) -> MemoryPlan:
    """Predict the bytes of parameters, gradients, optimizer state and masters that training holds, by device.

    Nothing is allocated: the model may be on the meta device, as `integrations.transformers.load_skeleton` makes it
    from a config. Tied weights count once; of sharded parameters what this rank holds. Not counted: activations, unless
    you say how many bytes they take, and what libraries and allocators keep for themselves.

    Args:
        model: as it will be trained; parameters with ``requires_grad=False`` have no gradient and no state.
        plan: what is frozen; None: nothing.
        dtype: of the weights and gradients, if not those the parameters have.
        state_dtype, amsgrad, master: as `MaskedAdamW` will have them.
        keep_state: as `set_freeze` will have it: frozen weights then have state, too.
        storage: of gradients, as `live_gradients` will have it: "packed" ones exist only where the weights of linear
            layers and fused experts learn.
        activation_bytes: to be added on every device.
        capacity: bytes of a device; `MemoryPlan.fits` then tells whether it is enough.

    Raises:
        TypeError: ``model`` or ``plan`` is something else.
        ValueError: the plan does not fit the model; an argument out of range.
    """
    operation = "memory_plan"
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{operation}: model is a {type(model).__name__}, expected a torch.nn.Module")
    if plan is not None and not isinstance(plan, FreezePlan):
        raise TypeError(f"{operation}: plan is a {type(plan).__name__}, expected a FreezePlan (or None)")
    dtypes, storages = (*STORAGE, torch.float64), get_args(Storage)
    for word, value, right, expected in (
        ("dtype", dtype, dtype is None or dtype in dtypes, "float32, bfloat16, float16 or float64"),
        (
            "state_dtype",
            state_dtype,
            state_dtype in (*dtypes[:2], torch.int8),
            "torch.float32, torch.bfloat16 or torch.int8",
        ),
        ("master", master, master in (None, "remainder"), "None or 'remainder'"),
        ("activation_bytes", activation_bytes, activation_bytes >= 0, "a number of bytes >= 0"),
        ("capacity", capacity, capacity is None or capacity >= 0, "a number of bytes >= 0"),
        ("storage", storage, storage in storages, "'dense' or 'packed'"),
        ("keep_state", keep_state, not keep_state or storage == "dense", "False where gradients are packed"),
    ):
        if not right:
            shown = repr(value) if isinstance(value, str) else value
            raise ValueError(f"{operation}: {word} is {shown}, expected {expected}")
    bound = bind(plan or FreezePlan(), named_tensors(model), operation=operation)
    masks = {id(entry.param): entry.mask for entry in bound}
    packed = {
        id(entry.param) for entry, module, _ in suited(model, bound) if module is not None and storage == "packed"
    }
    moments = 3 if amsgrad else 2
    masked: dict[str, Holding] = {}
    stock: dict[str, Holding] = {}

    def add(holdings: dict[str, Holding], device: str, **amounts: int) -> None:
        holdings[device] = holdings.get(device, Holding(activations=activation_bytes)) + Holding(**amounts)

    for p in model.parameters():
        shard, device = local(p), str(local(p).device)
        kept = dtype if dtype is not None and p.dtype.is_floating_point else p.dtype
        own = shard.numel() * kept.itemsize
        for holdings in (masked, stock):
            add(holdings, device, parameters=own)
        if p.requires_grad:
            mask = masks.get(id(p), FreezeMask(p.shape)).shard(held(p))
            live = math.prod(mask.packed_shape)
            with_state = mask.numel if keep_state else live
            step = torch.float32.itemsize  # torch's count of the parameter's steps
            add(
                masked, device, gradients=live * kept.itemsize if id(p) in packed else own,
                state=moments * with_state * moment_dtype(kept, state_dtype).itemsize + step,
                masters=2 * with_state if master is not None and kept == torch.bfloat16 else 0,
            )  # fmt: skip
            add(stock, device, gradients=own, state=moments * own + step)
    for buffer in {id(buffer): buffer for buffer in model.buffers()}.values():
        for holdings in (masked, stock):
            add(holdings, str(buffer.device), parameters=buffer.nbytes)
    return MemoryPlan(masked, stock, capacity)


# ------------------------------------------------------------------------------------------------------ measured


def state_tensors(optimizer: Any) -> list[torch.Tensor]:
    """Every tensor of an optimizer's state."""
    values = [value for entry in optimizer.state.values() for value in entry.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def restart_peak(device: torch.device) -> int | None:
    """Forget the peak so far. Returns the bytes in use (on the CPU resident ones); None where none can be had."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        # what glibc keeps of freed memory would count as in use before, and hide as much of the peak
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except (OSError, AttributeError, TypeError):  # no Linux, no glibc, or not allowed
        return None


def peak(device: torch.device) -> int:
    """Most bytes in use since `restart_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(entry: str) -> int:
    """Bytes that the kernel tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = [line.split()[1] for line in lines if line.startswith(f"{entry}:")]
    if not found:
        raise OSError(f"/proc/self/status has no {entry}")
    return int(found[0]) << 10
