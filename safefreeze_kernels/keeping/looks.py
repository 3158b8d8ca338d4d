"""What a keeper found and did at each look, as a record and as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ..attribution.pictures import png
from ..plan.files import write_atomically
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from ..plan.summary import frozen_counts

_MOST_KINDS: Final = 16


@dataclass(frozen=True)
class KeeperLook:
    """One look of a `RefusalKeeper`.

    Attributes:
        step: optimizer steps so far.
        margin: what is kept, on average over the rows of this look.
        share: of the weights that train, what the look chose to stand still.
        frozen: of the weights that train, what stands still until the next look, the base plan included.
        layers: number of a layer ("-": what is in none) -> its frozen share.
        modules: kind of module, such as ``"q_proj"`` -> the frozen share of all of its kind.
        seconds: that the look took.
    """

    step: int
    margin: float
    share: float
    frozen: float
    layers: dict[str, float]
    modules: dict[str, float]
    seconds: float

    @classmethod
    def of(
        cls, plan: FreezePlan, shapes: Mapping[str, tuple[int, ...]], *, step: int, margin: float, share: float,
        seconds: float,
    ) -> KeeperLook:  # fmt: skip
        """A look that froze ``plan`` of a model whose parameters that train have these shapes."""
        whole = {name: plan.get(name) or FreezeMask(shape) for name, shape in shapes.items()}
        shares = {place: frozen / total for place, (frozen, total) in frozen_counts(whole).items()}
        layers = {layer: found for (layer, kind), found in shares.items() if layer is not None and kind is None}
        kinds = {kind: found for (layer, kind), found in shares.items() if layer is None and kind is not None}
        return cls(step, margin, share, shares[None, None], layers, kinds, seconds)


def save_picture(looks: Sequence[KeeperLook], first: float, floor: float | None, path: str | os.PathLike[str]) -> None:
    """Draw the margin and the frozen share over steps, and where it lay, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [look.step for look in looks]
    above.plot([0, *steps], [first, *(look.margin for look in looks)], "o-", ms=3, color="C0", label="margin")
    if floor is not None:
        above.axhline(floor, color="C3", linestyle="--", label="to be kept")
    above.set(ylabel="what is kept (margin)")
    above.grid(alpha=0.3)
    right = above.twinx()
    right.step([*steps], [look.frozen for look in looks], where="post", color="C1", label="frozen")
    right.set(ylabel="share of weights that stands still", ylim=(-0.03, 1.03))
    lines = [*above.get_lines(), *right.get_lines()]
    above.legend(lines, [str(line.get_label()) for line in lines], loc="best", fontsize=9)
    kinds = sorted(looks[-1].modules, key=lambda kind: -sum(look.modules[kind] for look in looks))[:_MOST_KINDS]
    shares = np.array([[look.modules[kind] for look in looks] for kind in kinds])
    edges = np.array([*steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1])
    image = below.pcolormesh(edges, np.arange(len(kinds) + 1), shares, vmin=0, vmax=1, cmap="Blues")
    below.set(xlabel="optimizer steps", yticks=np.arange(len(kinds)) + 0.5, yticklabels=kinds)
    below.invert_yaxis()
    figure.colorbar(image, ax=below, label="frozen share")
    write_atomically(Path(path), png(figure))
