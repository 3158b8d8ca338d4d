"""Scores, labels and plans to look at: tables for a terminal, pictures for a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from ..plan.summary import frozen_counts, module_of
from .scores import UnitScores
from .selections import LABELS, Stability, UnitLabels, UnitSelection
from .units import Shape, UnitLayout
from .weights import WeightScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table


# Okabe and Ito's palette: told apart with any colour vision, and in grey
COLOURS: Final = {"SCU": "#D55E00", "CU": "#0072B2", "UCU": "#E69F00", "RU": "#999999", "frozen": "#0072B2"}
_MEANING: Final = {"SCU": "safety-critical", "CU": "complex", "UCU": "utility-critical", "RU": "redundant"}
_DPI: Final = 100


# ------------------------------------------------------------------------------------------------------- counting


def frozen_units(plan: FreezePlan, layout: UnitLayout) -> UnitSelection:
    """The units a plan freezes: those with all that computes them frozen, in every matrix that does.

    KV heads do not count: several heads share one, and whether it freezes is a policy of the plan.
    """
    frozen = {"head": np.ones(layout.heads_shape, bool), "channel": np.ones(layout.channels_shape, bool)}
    for layer in range(layout.n_layers):
        for piece in layout.pieces(layer):
            if piece.side == "in" or piece.units == "kv":
                continue
            mask = plan.get(piece.parameter, FreezeMask(piece.shape))
            matrix = mask.dense().reshape(mask.matrix_shape).numpy()
            within = matrix[slice(*piece.within or (None,))]
            entries = np.logical_and.reduce(within, axis=1 if piece.axis == "rows" else 0)
            frozen[piece.units][layer, piece.first : piece.first + len(piece.index)] &= entries[piece.index].all(1)
    return UnitSelection(frozen["head"], frozen["channel"], layout)


def complete_plan(plan: FreezePlan, among: UnitLayout | Mapping[str, Shape]) -> FreezePlan:
    """The same plan, with an empty mask for what has nothing frozen: then shares are of all of it.

    Args:
        plan: of some parameters.
        among: all that count: those that hold units, or name -> shape.

    Raises:
        ValueError: a plan for parameters of other shapes.
    """
    shapes = among.parameters if isinstance(among, UnitLayout) else among
    return FreezePlan({name: FreezeMask(shape) for name, shape in shapes.items()}) | plan


def shares_by_layer(
    selection: UnitSelection, labels: UnitLabels
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """For heads and for channels: label -> share of each layer's units selected under that label, ``[n_layers]``."""
    heads, channels = (
        {label: (chosen & (codes.numpy() == LABELS.index(label))).mean(1) for label in _MEANING}
        for chosen, codes in ((selection.heads, labels.heads), (selection.channels, labels.channels))
    )
    return heads, channels


# --------------------------------------------------------------------------------------------------------- tables


def label_table(
    labels: UnitLabels, layout: UnitLayout | None = None, selection: UnitSelection | None = None, title: str = ""
) -> Table:
    """Heads and channels of each label, and their share of all units.

    Args:
        labels: of every unit.
        layout: adds the share of the block parameters (those that hold units), with a shared KV head split evenly
            over its query heads.
        selection: counts what is frozen, out of what carries the label, instead of all that does.
    """
    chosen = selection or _everything(labels)
    table = _table(title, "label", "heads", "channels", "% of units", *(["% of block\nparameters"] if layout else []))
    cost = np.array([layout.head_cost if layout else 1.0, 1.0])
    sizes = np.array([labels.heads.numel(), labels.channels.numel()])

    def row(name: str, counts: np.ndarray, among: np.ndarray) -> None:
        cells = [f"{n:,} of {of:,}" if selection else f"{n:,}" for n, of in zip(counts, among, strict=True)]
        shares = [counts.sum() / sizes.sum(), *([counts @ cost / (sizes @ cost)] if layout else [])]
        table.add_row(name, *cells, *(f"{100 * share:.2f}" for share in shares), style=COLOURS.get(name))

    pairs = ((chosen.heads, labels.heads.numpy()), (chosen.channels, labels.channels.numpy()))
    for name in _MEANING:
        kept = [(of_kind & (codes == LABELS.index(name))).sum() for of_kind, codes in pairs]
        row(name, np.array(kept), np.array(labels.counts()[name]))
    table.add_section()
    row("all", np.array([chosen.heads.sum(), chosen.channels.sum()]), sizes)
    return table


def _everything(labels: UnitLabels) -> UnitSelection:
    return UnitSelection(np.ones(labels.heads.shape, bool), np.ones(labels.channels.shape, bool))


def module_table(plan: FreezePlan, title: str = "", *, everything: bool = False) -> Table:
    """Frozen parameters of each kind of module over all layers, of those the plan names; see `complete_plan`.

    ``everything``: the plan is one of all weights: norms are told together, and where among the modules what is frozen
    lies.
    """
    counts = frozen_counts(plan, norms_together=everything)
    table = _table(title, "module", "parameters", "frozen", "%", *(["% of all\nfrozen"] if everything else []))
    all_frozen, _ = counts.get((None, None), (0, 0))
    rows = [(kind, cell) for (layer, kind), cell in counts.items() if layer is None and kind is not None]
    for kind, (frozen, total) in [*rows, ("all", counts.get((None, None), (0, 0)))]:
        cells = [f"{total:,}", f"{frozen:,}", f"{100 * frozen / max(total, 1):.2f}"]
        table.add_row(kind, *cells, *([f"{100 * frozen / max(all_frozen, 1):.2f}"] if everything else []))
    table.rows[-2].end_section = True
    return table


def weight_table(scores: WeightScores, title: str = "") -> Table:
    """Which part of S, U and T each kind of module holds, and how much S one of its weights has, the mean being 1."""
    letters = {"safety": "S", "utility": "U", "task": "T"}
    sums = {word: _sums_by_module(scores, word) for word in scores.sets}
    sizes: dict[str, int] = {}
    for name, shape in scores.shapes.items():
        kind = module_of(name, shape, norms_together=True)[1]
        sizes[kind] = sizes.get(kind, 0) + int(np.prod(shape))
    by_kind = {
        word: {kind: sum(value for (_, other), value in cells.items() if other == kind) for kind in sizes}
        for word, cells in sums.items()
    }
    table = _table(title, "module", "weights", *(f"{letters[word]}, %" for word in sums), "S of a weight,\nmean 1")
    totals = {word: sum(values.values()) for word, values in by_kind.items()}
    for kind, size in sizes.items():
        mean = by_kind["safety"][kind] / size / (totals["safety"] / scores.total)
        cells = [f"{100 * values[kind] / totals[word]:.2f}" for word, values in by_kind.items()]
        table.add_row(kind, f"{size:,}", *cells, f"{mean:.3g}")
    table.rows[-1].end_section = True
    table.add_row("all", f"{scores.total:,}", *["100.00"] * len(sums), "1")
    return table


def _sums_by_module(scores: WeightScores, word: str) -> dict[tuple[str, str], float]:
    """``(layer, kind of module)`` -> sum of a set's squared gradients."""
    found: dict[tuple[str, str], float] = {}
    for name, values in scores.sets[word].values.items():
        key = module_of(name, scores.shapes[name], norms_together=True)
        found[key] = found.get(key, 0.0) + float(values.sum(dtype=torch.float64))
    return found


def score_table(scores: UnitScores, title: str = "") -> Table:
    """Smallest, median and largest score of heads and channels on each set, and how alike the sets rank them."""
    table = _table(title, "units", "set", "lowest", "median", "highest", "safety and utility,\nrank correlation")
    for units in ("heads", "channels"):
        safety, utility = (getattr(each, units).flatten() for each in (scores.safety, scores.utility))
        alike = f"{_rank_correlation(safety.numpy(), utility.numpy()):.3f}"
        for word, values in (("safety", safety), ("utility", utility)):
            cells = [f"{value:.3g}" for value in (values.min(), values.median(), values.max())]
            table.add_row(units if word == "safety" else "", word, *cells, alike if word == "safety" else "")
    return table


def stability_table(reports: Mapping[str, Sequence[Stability]], title: str = "") -> Table:
    """How far selections agree: a row per name, each the mean over its reports."""
    table = _table(title, "selected", "overlap\n(Jaccard)", "overlap\nby chance", "agreement\nbeyond chance")
    for name, found in reports.items():
        means = (np.mean([getattr(report, word) for report in found]) for word in ("mean", "expected", "agreement"))
        table.add_row(name, *(f"{mean:.3f}" for mean in means))
    return table


def facts_table(facts: Mapping[str, Any], title: str = "") -> Table:
    """What a file says about itself, a row per fact; nested facts are told as ``outer.inner``."""
    from rich.text import Text

    table = _table(title, "", "")
    table.show_header = False
    table.columns[1].justify = "left"
    table.columns[1].no_wrap = False

    def tell(facts: Mapping[str, Any], prefix: str) -> None:
        for key, value in facts.items():
            if isinstance(value, Mapping):
                tell(value, f"{prefix}{key}.")
            else:
                table.add_row(f"{prefix}{key}", Text(f"{value:g}" if isinstance(value, float) else str(value)))

    tell(facts, "")
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    # as wide as its title, or the title would be folded
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        min_width=min(80, len(title)),
    )
    table.add_column(first, no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, ties in order of index; NaN if there is one unit only."""
    ranks = (np.argsort(np.argsort(values, kind="stable")) for values in (a, b))
    x, y = (np.asarray(rank - rank.mean()) for rank in ranks)
    return float(x @ y / (x @ x)) if a.size > 1 else float("nan")


# ------------------------------------------------------------------------------------------------------- pictures


def draw_units(labels: UnitLabels, title: str, scores: UnitScores | None = None) -> bytes:
    """PNG: the label of every unit, layer by layer, and the share of each label; with scores, safety against utility.

    No channel is left out or averaged: one is at least a pixel, and the channels of a layer fill several lines
    where they do not fit on one.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    n_layers, n_channels = labels.channels.shape
    lines = -(-n_channels // 1000)
    length = -(-n_channels // lines)
    line = max(1, -(-18 // lines))  # pixels
    heads = _unit_image(labels.heads.numpy(), 1, max(3, min(18, 320 // labels.heads.shape[1])), lines * line)
    channels = _unit_image(labels.channels.numpy(), lines, max(1, 900 // length), line)
    # all in pixels, so that a channel is exactly a whole number of them
    margin, gap, top, below, bars, scatter = 60, 50, 104, 60, 240, 480 if scores is not None else 0
    width = 2 * margin + heads.shape[1] + channels.shape[1] + bars + 2 * gap
    height = top + channels.shape[0] + below + scatter
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)

    def place(left: int, upper: int, wide: int, high: int) -> Axes:
        return figure.add_axes((left / width, 1 - (upper + high) / height, wide / width, high / height))

    panels, left = [], margin
    for image, units in ((heads, labels.heads.shape[1]), (channels, length)):
        panels.append(place(left, top, image.shape[1], image.shape[0]))
        panels[-1].imshow(image, interpolation="none", aspect="auto", extent=(-0.5, units - 0.5, n_layers - 0.5, -0.5))
        left += image.shape[1] + gap
    panels.append(place(left, top, bars, channels.shape[0]))
    panels[0].set(xlabel="head", ylabel="layer")
    panels[0].set_title(f"{labels.heads.shape[1]} heads", loc="left")
    panels[1].set(xlabel=f"channel, {lines} lines of {length:,}" if lines > 1 else "channel")
    panels[1].set_title(f"{n_channels:,} MLP channels", loc="left")
    _draw_shares(panels[2], labels)
    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[1:]:
        panel.yaxis.set_ticklabels([])

    counts = {label: sum(pair) for label, pair in labels.counts().items()}
    figure.text(margin / width, 1 - 30 / height, title, fontsize=14)
    figure.legend(
        handles=[
            Patch(color=COLOURS[label], label=f"{label}, {meaning}: {counts[label] / sum(counts.values()):.1%}")
            for label, meaning in _MEANING.items()
        ],
        loc="upper left", bbox_to_anchor=(margin / width, 1 - 44 / height), ncols=4, frameon=False,
        borderaxespad=0, borderpad=0, handlelength=1, handleheight=1,
    )  # fmt: skip
    if scores is not None:
        wide = (width - 2 * margin - 120) // 2
        below_bars = top + channels.shape[0] + below + 40
        for number, units_word in enumerate(labels.shapes):
            axes = place(margin + 30 + number * (wide + 90), below_bars, wide, scatter - 90)
            _draw_scatter(axes, labels, scores, units_word)
    return png(figure)


def _draw_shares(axes: Axes, labels: UnitLabels) -> None:
    """Bars of each layer's channels by label."""
    n_layers = len(labels.channels)
    start = np.zeros(n_layers)
    for label, share in shares_by_layer(_everything(labels), labels)[1].items():
        axes.barh(range(n_layers), 100 * share, left=start, color=COLOURS[label], height=0.9)
        start += 100 * share
    axes.set(xlabel="% of the layer's channels", xlim=(0, 100), ylim=(n_layers - 0.5, -0.5))
    axes.set_title("channels by label", loc="left")


def _unit_image(codes: np.ndarray, lines: int, across: int, down: int) -> np.ndarray:
    """RGB image of units in their labels' colours: ``lines`` lines per layer, units of ``across`` × ``down`` pixels."""
    from matplotlib.colors import to_rgb

    n_layers, n_units = codes.shape
    length = -(-n_units // lines)
    palette = np.array([*(to_rgb(COLOURS[label]) for label in LABELS), (1.0, 1.0, 1.0)])
    padded = np.full((n_layers, lines * length), len(LABELS))
    padded[:, :n_units] = codes
    cells = palette[padded].reshape(n_layers, lines, length, 3).repeat(across, 2).repeat(down, 1)
    if across > 4:
        cells[:, :, across - 1 :: across] = 1.0  # a white line between units that are large enough for it
    bands = np.ones((n_layers, lines * down + 2, length * across, 3))
    bands[:, 1:-1] = cells
    return bands.reshape(-1, length * across, 3)


def _draw_scatter(axes: Axes, labels: UnitLabels, scores: UnitScores, units: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    codes = getattr(labels, units).flatten().numpy()
    x, y = (getattr(each, units).flatten().double().numpy() for each in (scores.utility, scores.safety))
    size = float(np.clip(20_000 / codes.size, 1.0, 20.0))
    for label in ("CU", "RU", "UCU", "SCU"):  # the rarest on top
        here = codes == LABELS.index(label)
        axes.scatter(x[here], y[here], s=size * (2 if label == "SCU" else 1), color=COLOURS[label], linewidths=0)
    for values, axis, scale in ((x, axes.xaxis, axes.set_xscale), (y, axes.yaxis, axes.set_yscale)):
        if values.min() <= 0:
            scale("symlog", linthresh=max(float(np.quantile(np.abs(values), 0.1)), 1e-30))
            continue
        scale("log")
        if values.max() < 100 * values.min():
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    low, high = min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color="#BBBBBB", lw=0.8, zorder=0, scalex=False, scaley=False)
    axes.set(xlabel=f"{scores.method} on the utility set", ylabel=f"{scores.method} on the safety set")
    axes.set_title(f"scores of {units}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def draw_plan(plan: FreezePlan, title: str, *, everything: bool = False) -> bytes:
    """PNG: the frozen share of each kind of module in each layer, and of each layer as a whole, of the parameters the
    plan names; see `complete_plan`. ``everything``: as in `module_table`."""
    counts = frozen_counts(plan, norms_together=everything)
    shares = {key: 100 * frozen / total for key, (frozen, total) in counts.items() if total and key[0] is not None}
    among = "of all weights" if everything else "of these modules"
    return _draw_modules(shares, title, "frozen, % of each module", f"frozen, % {among} in each layer")


def draw_weights(scores: WeightScores, title: str) -> bytes:
    """PNG: how much S the weights of each kind of module in each layer have, the mean over all being 1, and which part
    of all S each layer holds."""
    sums, sizes = _sums_by_module(scores, "safety"), dict[tuple[str, str], int]()
    for name, shape in scores.shapes.items():
        key = module_of(name, shape, norms_together=True)
        sizes[key] = sizes.get(key, 0) + int(np.prod(shape))
    total = sum(sums.values())
    cells: dict[tuple[str | None, str | None], float] = {}
    for (layer, kind), value in sums.items():
        cells[layer, kind] = value / sizes[layer, kind] / (total / scores.total)
        cells[layer, None] = cells.get((layer, None), 0.0) + 100 * value / total
    return _draw_modules(
        cells, title, "S of a weight, the mean being 1", "% of all S in each layer", most=10.0, digits="{:.2g}"
    )


def _draw_modules(
    values: Mapping[tuple[str | None, str | None], float],
    title: str,
    heading: str,
    whole_heading: str,
    most: float = float("inf"),
    digits: str = "{:.1f}",
) -> bytes:
    """PNG: a value for each layer and kind of module, and beside it one for each layer (kind None). ``most``: where the
    colours end; ``digits``: how values are written that are not 0 or 100."""
    from matplotlib.figure import Figure

    layers = sorted({row for row, _ in values if row is not None}, key=lambda row: (row == "-", row.zfill(20)))
    kinds = list(dict.fromkeys(kind for _, kind in values if kind is not None))
    nothing = float("nan")
    grid = np.array([[values.get((layer, kind), nothing) for kind in kinds] for layer in layers])
    grid = grid.reshape(len(layers), len(kinds))
    figure = Figure(figsize=(max(8.5, 4.5 + 0.9 * len(kinds)), max(3.5, 1.8 + 0.24 * len(layers))), dpi=_DPI)
    figure.set_layout_engine("constrained", wspace=0.04)
    figure.suptitle(title, fontsize=14)
    modules, whole = figure.subplots(1, 2, sharey=True, width_ratios=(max(2.0, 0.5 * len(kinds)), 1.6))
    most = min(most, max(1.0, float(np.nanmax(grid, initial=0.0))))
    modules.pcolormesh(grid, cmap="Blues", vmin=0, vmax=most, edgecolors="white", linewidth=1)
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            colour = "white" if value > 0.6 * most else "black"
            text = digits.format(value) if 0 < value < 100 else f"{value:.0f}"
            modules.text(column + 0.5, row + 0.5, text, color=colour, fontsize=8, ha="center", va="center")
    modules.set(ylabel="layer", ylim=(len(layers), 0))
    modules.set_xticks(np.arange(len(kinds)) + 0.5, kinds, rotation=30, ha="right")
    step = max(1, -(-len(layers) // 16))
    modules.set_yticks(np.arange(0, len(layers), step) + 0.5, ["none" if row == "-" else row for row in layers[::step]])
    modules.set_title(heading, loc="left")
    modules.spines[:].set_visible(False)
    bars = [values.get((layer, None), nothing) for layer in layers]
    whole.barh(np.arange(len(layers)) + 0.5, bars, color=COLOURS["frozen"])
    whole.set_title(whole_heading, loc="left", fontsize="medium")
    whole.spines[["top", "right"]].set_visible(False)
    return png(figure)


def draw_layers(axes: Axes, values: Mapping[str, np.ndarray], title: str, unit: str, least: float) -> None:
    """Stacked bars over layers, a colour per label; ``least``: what the vertical axis spans at least."""
    bottom = np.zeros(len(next(iter(values.values()))))
    for label, value in values.items():
        if value.any():
            axes.bar(range(len(value)), value, bottom=bottom, color=COLOURS[label], label=label)
            bottom = bottom + value
    axes.set(title=title, xlabel="layer", ylabel=unit, xlim=(-0.7, len(bottom) - 0.3))
    axes.set_ylim(0, 1.25 * max(least, bottom.max()))  # the rest is for the legend
    if bottom.any():
        axes.legend(frameon=False, ncols=4, loc="upper left")
    else:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center")


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
