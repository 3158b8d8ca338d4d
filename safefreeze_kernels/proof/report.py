"""What an audit found, tensor by tensor, and how it is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from textwrap import fill
from typing import Any

from .checkpoint import DTYPES


@dataclass
class TensorChanges:
    """What became of one tensor.

    Attributes:
        name, shape, dtype: of the tensor; ``dtype`` as safetensors names it, "F32 -> BF16" if it changed.
        frozen, live: how many elements.
        frozen_changed: frozen elements whose bytes differ.
        first_changed: (row, column) of the first of them, and the bytes before and after, as hex.
        live_changed: live elements whose bytes differ.
        strange: of those, how many changed by something that is no finite number, or have no known one (integers,
            float64).
        largest, mean, rms: of |after - before| over live elements that changed by a finite number (mean and root mean
            square are over all live elements; sums are float32 over 256 elements, then float64).
        trouble: why the bytes could not be compared; "": they were.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    frozen: int
    live: int
    frozen_changed: int = 0
    first_changed: tuple[int, int, str, str] | None = None
    live_changed: int = 0
    strange: int = 0
    largest: float = 0.0
    mean: float = 0.0
    rms: float = 0.0
    trouble: str = ""

    @property
    def unproven(self) -> bool:
        """Whether frozen bytes changed, or could not be compared."""
        return bool(self.frozen_changed or (self.frozen and self.trouble))

    def __str__(self) -> str:
        if self.first_changed is None:
            return f"  {self.name}\n    {self.trouble}"
        row, col, before, after = self.first_changed
        return (
            f"  {self.name}\n    {self.frozen_changed:,} of {self.frozen:,} frozen elements changed, first at\n"
            f"    row {row}, column {col}: 0x{before} became 0x{after}"
        )


@dataclass
class AuditReport:
    """What `compare` and `check` found. ``str()`` tells it in lines of 80 columns, but for long names.

    Attributes:
        plan: fingerprint of the plan.
        tensors: of every tensor that both checkpoints hold (of `check`: that the plan names), and of every further name
            under which one of them holds a weight of the plan.
        uncompared: tensors outside the plan that were not compared, and why. `ok` says nothing about them.
        trouble: what else is wrong; the report is then not `ok`.
        notes: what is worth knowing.
        attested: the frozen bytes were compared as a whole, with a statement's digest.
    """

    plan: str
    tensors: list[TensorChanges] = field(default_factory=list)
    uncompared: dict[str, str] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    attested: bool = False

    def add(self, found: Iterable[TensorChanges]) -> None:
        """Take in what was found of some tensors."""
        self.tensors += found
        self.uncompared |= {one.name: one.trouble for one in self.tensors if one.trouble and not one.frozen}

    @property
    def ok(self) -> bool:
        """Whether it is proven that nothing frozen changed: no frozen byte of a weight of the plan, under any name."""
        return not self.trouble and not any(t.unproven for t in self.tensors)

    @property
    def frozen(self) -> int:
        """Frozen elements that were compared."""
        return sum(t.frozen for t in self.tensors if not t.trouble)

    @property
    def frozen_bytes(self) -> int:
        """Their bytes."""
        return sum(t.frozen * DTYPES[t.dtype][0] for t in self.tensors if not t.trouble)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"plan {self.plan[:12]}", *_few([str(t) for t in self.tensors if t.unproven])]
        for texts in (self.trouble, self.notes):
            lines += _few([fill(line, 80, subsequent_indent="  ", break_long_words=False) for line in texts])
        outside = f"{len(self.uncompared):,} tensor{'s' * (len(self.uncompared) > 1)} outside the plan"
        if self.uncompared:
            lines.append(f"not compared: {outside}")
            if not self.attested:  # of a single checkpoint they are all the others
                lines += _few([f"  {name}\n    {why}" for name, why in self.uncompared.items()])
        if changed := sum(t.live_changed for t in self.tensors):
            most, live = max(self.tensors, key=lambda t: t.largest), sum(t.live for t in self.tensors)
            lines.append(f"live: {changed:,} of {live:,} elements changed, by {most.largest:.3g} at most")
            lines.append(f"  (in {most.name})")
        moved = sum(t.frozen_changed for t in self.tensors)
        told = f"{self.frozen:,} elements" if self.attested else f"{moved:,} of {self.frozen:,} elements changed"
        lines.append(f"frozen: {told} ({self.frozen_bytes:,} bytes compared)")
        but = f" ({outside}: not compared)" if self.uncompared else ""
        lines.append(f"proven: no frozen byte differs{but}" if self.ok else "NOT proven")
        return "\n".join(lines)


def _few(lines: list[str]) -> list[str]:
    return lines[:20] + ([f"  … and {len(lines) - 20} more"] if len(lines) > 20 else [])
