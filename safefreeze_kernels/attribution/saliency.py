"""Scores from gradients: of the weights that make up a unit, and of what a unit hands on.

Gradients of weights are reduced to one number per unit as they appear (`gradients`), and dropped. The model itself is
not touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from .activations import Counted, UnitInputs, at_least_float32, model_device, saving_arguments, watched
from .batches import Pass
from .collecting import Collector, Count, Scored, UnitValues, zero_totals
from .gradients import Take, aliases, lent, stream_gradients
from .grains import Grains
from .units import Piece, UnitLayout

_CHUNK: Final = 1 << 22  # elements of a gradient in float32 at a time
_FLOOR: Final = 0.001
_VALUES: Final = "sum and number of values"  # among totals of parameters: no parameter has such a name

#: The logits float32 ``[n, vocabulary]`` of the True positions of a bool ``[rows, tokens]``, in their order.
Logits = Callable[[Tensor], Tensor]


# ------------------------------------------------------------------------------------------- what is derived


def answer_loss(one: Pass, logits: Logits) -> Tensor:
    """Cross-entropy of each response token, ``[response tokens]``."""
    if not one.predicting.any():
        raise ValueError(
            f"score_units: {one.where} has no response tokens after a prompt, expected some in every pass; labels are "
            "-100 except on response tokens"
        )
    found = logits(one.predicting)
    return torch.nn.functional.cross_entropy(found, one.targets.to(found.device), reduction="none")


class Margin:
    """How much refusing outweighs the rest where the first response token is chosen, ``[rows]``.

    M = logsumexp(logits of ``refuse``) - logsumexp(logits of ``comply``). Without ``comply``, all other tokens: the
    log-odds of refusing. Without ``refuse``, a row refuses with the first token of its own response.

    Raises:
        ValueError: tokens beyond the vocabulary.
    """

    def __init__(self, refuse: Sequence[int] | None, comply: Sequence[int] | None) -> None:
        self.refuse, self.comply = refuse, comply

    def __call__(self, one: Pass, logits: Logits) -> Tensor:
        assert one.labels is not None
        deciding = one.deciding
        found = logits(torch.arange(one.real.shape[1]) == deciding[:, None])
        if self.refuse is None:
            tokens = one.labels.gather(1, deciding[:, None] + 1).to(found.device)
            refuse = torch.zeros_like(found, dtype=torch.bool).scatter_(1, tokens, True)
        else:
            refuse = self._among(found, "refuse_token", self.refuse)
        comply = ~refuse if self.comply is None else self._among(found, "comply_token", self.comply)
        never = float("-inf")
        return found.masked_fill(~refuse, never).logsumexp(1) - found.masked_fill(~comply, never).logsumexp(1)

    def of(self, model: torch.nn.Module, one: Pass) -> Tensor:
        """The margins of a pass, float32 ``[rows]``, with the graph that leads to them."""
        return self(one, partial(_logits, model, one))

    @staticmethod
    def _among(logits: Tensor, word: str, tokens: Sequence[int]) -> Tensor:
        if max(tokens) >= logits.shape[1]:
            raise ValueError(f"score_units: {word} is {max(tokens)}, expected a token of the model's {logits.shape[1]}")
        mask = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        mask[list(tokens)] = True
        return mask


def _logits(model: torch.nn.Module, one: Pass, wanted: Tensor) -> Tensor:
    device = model_device(model)
    columns = wanted.any(0).nonzero().squeeze(1)
    arguments = {**one.on(device), **saving_arguments(model, columns.to(device))}
    output = model(**arguments)
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    kept = {wanted.shape[1]: wanted, len(columns): wanted[:, columns]}
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] not in kept:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"score_units: the model's output has logits {shape}, expected [rows, tokens, vocabulary]; pass the causal "
            "language model, with its output head"
        )
    return at_least_float32(logits[kept[logits.shape[1]].to(logits.device)])


# ------------------------------------------------------------------------------------- gradients of weights


class _Target(NamedTuple):
    """Units some reduced entries belong to: ``entries[lines].sum(1)`` goes to ``place`` of ``units``' totals."""

    units: Literal["heads", "channels"]
    place: slice
    lines: Tensor  # int64 [units, width]
    share: int  # heads that share each unit of the index (query heads of a KV head)


class _Block(NamedTuple):
    """A part of a parameter's matrix whose entries are summed along ``axis`` at once."""

    rows: slice
    cols: slice
    axis: int
    targets: list[_Target]


def _blocks(layout: UnitLayout, device: torch.device) -> dict[str, list[_Block]]:
    """Parameter -> its blocks: one, or for columns of fused experts one per expert."""
    found: dict[str, list[_Block]] = {}
    for layer in range(layout.n_layers):
        grouped: dict[tuple[str, str, tuple[int, int] | None], list[Piece]] = {}
        for piece in layout.pieces(layer):
            grouped.setdefault((piece.parameter, piece.axis, piece.within), []).append(piece)
        for (name, axis, within), pieces in grouped.items():
            low = min(int(piece.index.min()) for piece in pieces)
            high = max(int(piece.index.max()) for piece in pieces)
            own, across = slice(low, high + 1), slice(*within) if within else slice(None)
            targets = [_target(layout, piece, layer, low, device) for piece in pieces]
            rows, cols = (own, across) if axis == "rows" else (across, own)
            found.setdefault(name, []).append(_Block(rows, cols, 1 if axis == "rows" else 0, targets))
    return found


def _target(layout: UnitLayout, piece: Piece, layer: int, low: int, device: torch.device) -> _Target:
    units, places, share = layout.shared(piece)
    before = layer * layout.unit_shapes[units][1]  # units of the layers before
    lines = torch.from_numpy(piece.index - low).to(device)
    return _Target(units, slice(before + places.start, before + places.stop), lines, share)


def _squares(_: Tensor, gradient: Tensor) -> Tensor:
    return gradient.square()


def _products(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight * gradient).abs_()


class GradientSums(Collector):
    """Σ over passes of Σ over a unit's weights of g² (``"squares"``) or |w·g| (``"products"``), g = ∂ mean loss / ∂w.

    A head's weights are its query, key and value rows with their biases and its output columns; of a KV head that
    several query heads share, each gets an even part of the sum. A channel's are its gate and up rows with their
    biases and its down column.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layout: UnitLayout,
        loss: Callable[[Pass, Logits], Tensor],
        entries: Literal["squares", "products"],
        rows: int,
    ) -> None:
        self.model, self.layout, self.loss, self.rows = model, layout, loss, rows
        device = model_device(model)
        heads, channels = (a * b for a, b in (layout.heads_shape, layout.channels_shape))
        self.totals = zero_totals(device, heads=heads, channels=channels)
        self._entries = {"squares": _squares, "products": _products}[entries]
        self._blocks = _blocks(layout, device)
        self._reached: set[str] = set()
        self._ran = False

    def take(self, one: Pass) -> int:
        """One forward and one backward pass."""
        _, counted = _stream_mean(self.model, self._blocks, self.loss, one, self._reduce)
        self._ran = True
        return counted

    def _reduce(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        self._reached.add(name)
        for block in self._blocks[name]:
            # a bias is a column where its entries are rows
            shape = (-1, gradient.shape[-1]) if gradient.dim() > 1 or block.axis == 0 else (-1, 1)
            part = [tensor.reshape(shape)[block.rows, block.cols] for tensor in (weight, gradient)]
            chunks = (torch.split(tensor, max(1, _CHUNK // tensor.shape[1])) for tensor in part)
            sums = [
                self._entries(at_least_float32(w), at_least_float32(g)).sum(block.axis)
                for w, g in zip(*chunks, strict=True)
            ]
            totals = self.totals["heads"]
            entries = torch.cat(sums) if block.axis else torch.stack(sums).sum(0, dtype=totals.dtype)
            entries = entries.to(totals)
            for target in block.targets:
                units = entries[target.lines].sum(1).repeat_interleave(target.share) / target.share
                self.totals[target.units][target.place] += units

    def complaints(self, word: str, count: Count) -> Iterator[str]:
        """Every parameter must have had a gradient, and all of them finite ones."""
        if self._ran and (missing := sorted(set(self._blocks) - self._reached)):
            yield _no_gradient(repr(missing[0]), word)
        for units, sums in self.sums._asdict().items():
            finite = torch.isfinite(sums).all(1)
            if not finite.all():
                yield _not_finite(f"gradients of the {units} of layer {int((~finite).nonzero()[0])} are", word)

    @property
    def sums(self) -> UnitValues:
        """Heads ``[layers, heads]`` and channels ``[layers, d_ff]``, float64 on the CPU."""
        shapes = self.layout.unit_shapes.items()
        return UnitValues(*(self.totals[units].cpu().double().reshape(shape) for units, shape in shapes))


def _stream_mean(
    model: torch.nn.Module, names: Iterable[str], value: Callable[[Pass, Logits], Tensor], one: Pass, take: Take
) -> tuple[Tensor, int]:
    """`stream_gradients` of the mean of a pass' values: the mean, and how many values there are."""
    counted = 0

    def mean(model: torch.nn.Module) -> Tensor:
        nonlocal counted
        values = value(one, partial(_logits, model, one))
        counted = len(values)
        return values.mean()

    return stream_gradients(model, names, mean, take), counted


def _no_gradient(what: str, word: str) -> str:
    return f"{what} had no gradient on the {word} set, expected one; every layer must take part in the model's output"


def _not_finite(what: str, word: str) -> str:
    return f"{what} NaN or infinite on the {word} set, expected finite ones; load the model in float32 or bfloat16"


def plain_sums(safety: GradientSums, utility: GradientSums) -> Scored:
    """The sums themselves (SNIP)."""
    return safety.sums, utility.sums, None


def decision_ratio(safety: GradientSums, utility: GradientSums) -> Scored:
    """S / (U + 0.001 · mean U), the mean over all units."""
    needed = utility.sums
    floor = _FLOOR * torch.cat([part.flatten() for part in needed]).mean()
    if not floor > 0:
        raise ValueError(
            "score_units: the utility loss has no gradient in any unit, expected some; does utility hold what the "
            "model is to go on doing?"
        )
    ratio = (part / (u + floor) for part, u in zip(safety.sums, needed, strict=True))
    return safety.sums, needed, UnitValues(*ratio)


class WeightSquares(Collector):
    """Σ over passes of g² of every weight, g = ∂ mean value / ∂w, where a value is a margin or a loss.

    Args:
        grains: of the weights. Of grain ``"element"`` each has a sum, float32 of its parameter's shape; else each line,
            as `Grains.reduce` has it.
        value: what is derived of a pass, one-dimensional.
        rows: per pass.
    """

    def __init__(self, model: torch.nn.Module, grains: Grains, value: Callable[[Pass, Logits], Tensor], rows: int):
        self.model, self.grains, self.value, self.rows = model, grains, value, rows
        places = {name: parameter.device for name, parameter in model.named_parameters()}
        self.totals = {
            name: torch.zeros(shape, device=places[name])
            if grains.grain == "element"
            else grains.nothing(name, places[name])
            for name, shape in grains.shapes.items()
        } | zero_totals(model_device(model), **{_VALUES: 2})

    def take(self, one: Pass) -> int:
        """One forward and one backward pass."""
        found, counted = _stream_mean(self.model, self.grains.shapes, self.value, one, self._add)
        self.totals[_VALUES] += torch.stack([found * counted, torch.full_like(found, counted)])
        return counted

    def _add(self, name: str, _: Tensor, gradient: Tensor) -> None:
        total = self.totals[name]
        if self.grains.grain != "element":
            total += self.grains.reduce(name, at_least_float32(gradient).square_())
            return
        pieces = (torch.split(tensor, _CHUNK) for tensor in (gradient.reshape(-1), total.view(-1)))
        for part, into in zip(*pieces, strict=True):
            wide = part.to(into.dtype)
            into.addcmul_(wide, wide)

    def complaints(self, word: str, count: Count) -> Iterator[str]:
        """Gradients must be finite, and some of them not 0."""
        highest = {name: float(self.totals[name].max()) for name in self.grains.shapes}
        for name, value in highest.items():
            if not math.isfinite(value):
                yield _not_finite(f"gradients of {name!r}, or their squares, are", word)
        if not any(highest.values()):
            yield f"all gradients on the {word} set are 0, expected some that tell weights apart"

    @property
    def mean(self) -> float:
        """Of all values."""
        total, count = self.totals[_VALUES].tolist()
        return float(total / max(count, 1))


# --------------------------------------------------------------------------------- gradients of activations


class MarginGradients(Collector):
    """Per feature a that a unit hands on, over positions up to the deciding one: Σ a·∂m/∂a, Σ ∂m/∂a and Σ a.

    Args:
        margin: m.
        first: leave the rows' first position out. It holds the same token in every row (where there is a chat
            template or a beginning-of-text token), and often activations of a size of their own (Sun et al., 2024,
            arXiv 2402.17762). A prompt of one token counts all the same.
    """

    def __init__(self, model: torch.nn.Module, layout: UnitLayout, margin: Margin, *, first: bool) -> None:
        self.model, self.inputs, self.margin, self.first = model, UnitInputs(layout), margin, first
        size = self.inputs.size
        sizes = {"product": size, "gradient": size, "activation": size, "count": len(self.inputs.readers), "rows": 1}
        self.totals = zero_totals(model_device(model), **sizes)

    def take(self, one: Pass) -> int:
        """One forward pass, and a backward pass that goes no further than to the first reader's input."""
        deciding, place = one.deciding[:, None], torch.arange(one.real.shape[1])
        first = torch.zeros_like(deciding) if self.first else deciding.clamp(max=1)
        counted = Counted((place >= first) & (place <= deciding) & one.real, model_device(self.model))
        counts = [0] * len(self.inputs.readers)

        def run(model: torch.nn.Module) -> Tensor:
            margins = self.margin.of(model, one)
            margins.sum().backward()  # type: ignore[no-untyped-call]
            return margins

        with torch.enable_grad(), watched(self.model, self.inputs, partial(self._see, counted, counts)):
            margins = lent(self.model, aliases(self.model), run)
        self.totals["count"].add_(torch.tensor(counts).to(self.totals["count"].device))
        self.totals["rows"].add_(len(margins))
        return len(margins)

    def _see(
        self, counted: Counted, counts: list[int], number: int, hidden: Tensor, positions: Tensor | None
    ) -> Tensor | None:
        chosen = counted.of(hidden, positions, self.inputs.readers[number][1])
        # nothing before the first reader needs a gradient: the graph starts here
        leaf = None if hidden.requires_grad else hidden.detach().requires_grad_()
        watched_input = hidden if leaf is None else leaf
        values, place = hidden.detach(), self.inputs.places[number]

        def add(gradient: Tensor) -> None:
            a, g = (at_least_float32(x.reshape(-1, x.shape[-1])[chosen]) for x in (values, gradient))
            counts[number] += len(chosen)
            for name, entries in (("product", a * g), ("gradient", g), ("activation", a)):
                total = self.totals[name]
                total[place] += entries.sum(0, dtype=total.dtype).to(total.device)

        watched_input.register_hook(add)  # type: ignore[no-untyped-call]
        return leaf

    def complaints(self, word: str, count: Count) -> Iterator[str]:
        """Every reader must have passed on a gradient, and all of them finite ones."""
        for name, seen in self.inputs.per_module(self.totals["count"]).items():
            if not seen:
                yield _no_gradient(f"the input of {name!r}", word)
        for name in self.inputs.not_finite(self.totals["product"]):
            yield _not_finite(f"the input of {name!r} or its gradient is", word)

    def per_row(self, name: str) -> Tensor:
        """A total over the rows' number, per feature, float64 on the CPU."""
        return self.totals[name].cpu().double() / self.totals["rows"].cpu().double()

    @property
    def mean(self) -> Tensor:
        """Mean of a over its positions; 0 for an expert that no token was routed to."""
        count = self.inputs.per_feature(self.totals["count"].cpu().double())
        return self.totals["activation"].cpu().double() / count.clamp(min=1)

    def of_units(self, features: Tensor) -> UnitValues:
        """Sums over each unit's features."""
        heads, channels = self.inputs.arrange(features)
        return UnitValues(heads.sum(-1), channels)


def _absolute(values: UnitValues) -> UnitValues:
    return UnitValues(values.heads.abs(), values.channels.abs())


def gradient_times_activation(safety: MarginGradients, utility: MarginGradients) -> Scored:
    """|mean over safety rows - mean over utility rows| of Σ_pos a·∂m/∂a; each set's score is its own |mean|."""
    one, other = (seen.of_units(seen.per_row("product")) for seen in (safety, utility))
    difference = UnitValues(one.heads - other.heads, one.channels - other.channels)
    return _absolute(one), _absolute(other), _absolute(difference)


def patching_effect(safety: MarginGradients, utility: MarginGradients) -> Scored:
    """|mean over rows of Σ_pos (ā - a)·∂m/∂a|, ā the other set's mean."""
    one, other = (
        _absolute(seen.of_units(source.mean * seen.per_row("gradient") - seen.per_row("product")))
        for seen, source in ((safety, utility), (utility, safety))
    )
    return one, other, one
