"""How much of a plan's layers and kinds of module is frozen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from .mask import FreezeMask

_LAYER: Final = re.compile(r"(?:^|\.)(\d+)\.(?P<rest>.+)$")
_MOST_KINDS: Final = 7


def module_of(name: str, shape: Sequence[int], *, norms_together: bool = False) -> tuple[str, str]:
    """Layer and kind of module of a parameter.

    The layer is the first number in its name ("-" where there is none), the kind its last part, such as ``"q_proj"`` or
    ``"q_proj.bias"``; with ``norms_together``, ``"norms"`` for every vector that is no bias.
    """
    found = _LAYER.search(name)
    layer, rest = (found.group(1), found.group("rest")) if found else ("-", name)
    parts = rest.removesuffix(".weight").split(".")
    kind = ".".join(parts[-2 if parts[-1] == "bias" else -1 :])
    return layer, "norms" if norms_together and len(shape) == 1 and "bias" not in kind else kind


def frozen_counts(
    plan: Mapping[str, FreezeMask], *, norms_together: bool = False
) -> dict[tuple[str | None, str | None], tuple[int, int]]:
    """``(layer, kind of module) -> (frozen, all)`` elements; None stands for the total over all of them.

    Layers and kinds are those of `module_of`.
    """
    counts: dict[tuple[str | None, str | None], tuple[int, int]] = {}
    for name, mask in plan.items():
        layer, kind = module_of(name, mask.shape, norms_together=norms_together)
        for key in ((layer, kind), (layer, None), (None, kind), (None, None)):
            frozen, total = counts.get(key, (0, 0))
            counts[key] = frozen + mask.frozen_count, total + mask.numel
    return counts


def summarize(plan: Mapping[str, FreezeMask], fingerprint: str) -> str:
    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    counts = frozen_counts(plan)
    layers = sorted({row for row, _ in counts if row is not None}, key=lambda row: (row == "-", row.zfill(20)))
    kinds = list(dict.fromkeys(kind for _, kind in counts if kind is not None))
    kinds.sort(key=lambda kind: all(row in ("-", None) for row, other in counts if other == kind))  # layers' come first
    shown, hidden = kinds[:_MOST_KINDS], max(len(kinds) - _MOST_KINDS, 0)
    table = Table(box=None)
    for heading in ("layer", *shown, "all"):
        table.add_column(Text(heading), justify="right")
    for row in [*layers, None] if layers else []:
        cells = [counts.get((row, column)) for column in (*shown, None)]
        texts = [f"{cell[0] / cell[1]:.1%}" if cell and cell[1] else "" for cell in cells]
        table.add_row("all" if row is None else row, *texts)
    buffer = StringIO()
    console = Console(file=buffer, width=80, color_system=None)
    console.print(f"frozen share, fingerprint {fingerprint[:12]}", highlight=False)
    whole = sum(mask.numel > 0 and mask.live_count == 0 for mask in plan.values())
    if whole:
        console.print(
            f"{whole} of {len(plan)} parameters {'is' if whole == 1 else 'are'} frozen whole", highlight=False
        )
    console.print(table)
    live = sum(mask.live_count for mask in plan.values())
    total = sum(mask.numel for mask in plan.values())
    console.print(
        f"{len(plan)} parameters, {total:,} elements: {total - live:,} frozen, {live:,} live", highlight=False
    )
    if hidden:
        console.print(f"{hidden} more kinds of module are counted under all", highlight=False)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().split("\n"))
