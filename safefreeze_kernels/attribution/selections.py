"""What is known or decided about units: labels, rankings, selections, and how far selections agree.

Labels are SSAH's (Li & Kim, ICLR 2026, arXiv 2410.10862): safety-critical units (SCU), utility-critical units
(UCU), complex units that serve both (CU), redundant units that serve neither (RU).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..plan.plan import FreezePlan
from .files import write_tensors
from .scores import UnitScores
from .units import KvPolicy, Preset, UnitLayout, find_units, unit_masks

#: Label names; a label's code is its place here.
LABELS: Final = ("RU", "SCU", "UCU", "CU")
_POOR: Final = 0.4  # agreement beyond chance; see `Stability`


# --------------------------------------------------------------------------------------- labels and rankings


class PerUnit:
    """Something about every unit: ``heads`` ``[n_layers, n_heads]`` and ``channels`` ``[n_layers, d_ff]``."""

    heads: Any
    channels: Any

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of both, by name."""
        return {"heads": tuple(self.heads.shape), "channels": tuple(self.channels.shape)}

    @property
    def flat(self) -> np.ndarray:
        """Heads of all layers, then channels of all layers."""
        return np.concatenate([np.asarray(part).ravel() for part in (self.heads, self.channels)])

    def _read_only(self, word: str, array: np.ndarray) -> None:
        array.flags.writeable = False
        object.__setattr__(self, word, array)


@dataclass(frozen=True, repr=False, eq=False)
class UnitLabels(PerUnit):
    """The label of every unit: uint8 codes, 0 RU, 1 SCU, 2 UCU, 3 CU.

    Args:
        heads: ``[n_layers, n_heads]``.
        channels: ``[n_layers, d_ff]``.

    Raises:
        TypeError: labels that are not integers.
        ValueError: wrong number of dimensions, different numbers of layers, codes outside 0 to 3.
    """

    heads: Tensor
    channels: Tensor

    def __post_init__(self) -> None:
        for word in ("heads", "channels"):
            labels = torch.as_tensor(getattr(self, word)).detach().cpu()
            if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
                raise TypeError(f"UnitLabels: {word} has dtype {labels.dtype}, expected integer codes 0 to 3")
            if labels.dim() != 2:
                raise ValueError(f"UnitLabels: {word} has shape {tuple(labels.shape)}, expected [layers, units]")
            if labels.numel() and (labels.min() < 0 or labels.max() > 3):
                raise ValueError(
                    f"UnitLabels: {word} holds codes from {int(labels.min())} to {int(labels.max())}, "
                    "expected 0 RU, 1 SCU, 2 UCU, 3 CU"
                )
            object.__setattr__(self, word, labels.to(torch.uint8).contiguous())
        if len(self.heads) != len(self.channels):
            raise ValueError(
                f"UnitLabels: heads has {len(self.heads)} layers and channels {len(self.channels)}, expected as many"
            )

    def counts(self) -> dict[str, tuple[int, int]]:
        """Label -> (heads, channels) that carry it."""
        heads, channels = (torch.bincount(part.flatten(), minlength=4).tolist() for part in (self.heads, self.channels))
        return dict(zip(LABELS, zip(heads, channels, strict=True), strict=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file `read_labels` reads; a crash leaves an older file as it was."""
        write_tensors(path, {"attention_heads": self.heads, "mlp_channels": self.channels})

    def __repr__(self) -> str:
        shares = ", ".join(f"{name} {h} heads + {c} channels" for name, (h, c) in self.counts().items())
        return f"UnitLabels({len(self.heads)} layers: {shares})"


@dataclass(frozen=True, repr=False, eq=False)
class UnitRanking(PerUnit):
    """One finished score per unit, made elsewhere: the highest are frozen first. See `MaskBuilder.top`.

    Args:
        layout: the model the scores belong to.
        heads: ``[n_layers, n_heads]``, or None where the source scores no heads.
        channels: ``[n_layers, d_ff]``, or None where the source scores no channels.
        method: what made the scores; becomes part of a plan's metadata.

    Both are kept as float64 arrays.

    Raises:
        ValueError: neither heads nor channels, shapes that are not the layout's, NaN or infinite scores.
    """

    layout: UnitLayout
    heads: np.ndarray | None = None
    channels: np.ndarray | None = None
    method: str = "foreign"

    def __post_init__(self) -> None:
        if self.heads is None and self.channels is None:
            raise ValueError("UnitRanking: neither heads nor channels given, expected scores of at least one of them")
        for word, shape in self.layout.unit_shapes.items():
            given = getattr(self, word)
            if given is None:
                continue
            scores = np.array(given.detach().cpu().double().numpy() if isinstance(given, Tensor) else given, np.float64)
            if scores.shape != shape:
                raise ValueError(f"UnitRanking: {word} has shape {scores.shape}, expected {shape} for {self.layout}")
            if not np.isfinite(scores).all():
                layer, unit = np.argwhere(~np.isfinite(scores))[0]
                raise ValueError(
                    f"UnitRanking: {word} holds {scores[layer, unit]} at layer {layer}, unit {unit}, expected "
                    "finite scores"
                )
            self._read_only(word, scores)

    @property
    def flat(self) -> np.ndarray:
        """Heads of all layers, then channels of all layers; NaN for those that have no score."""
        shapes = self.layout.unit_shapes.items()
        given = [
            np.full(shape, np.nan) if getattr(self, word) is None else getattr(self, word) for word, shape in shapes
        ]
        return np.concatenate([scores.ravel() for scores in given])

    def __repr__(self) -> str:
        scored = " and ".join(word for word in ("heads", "channels") if getattr(self, word) is not None)
        return f"UnitRanking({self.layout}; {self.method} scores of {scored})"


# ----------------------------------------------------------------------------------------------- selections


@dataclass(frozen=True, repr=False, eq=False)
class UnitSelection(PerUnit):
    """Which units are frozen. Made by `MaskBuilder`, turned into a plan by `build`.

    Selections of one model combine as sets do: ``a | b`` freezes what either freezes, ``a & b`` what both
    do, ``a - b`` what ``a`` freezes and ``b`` does not, ``~a`` every unit ``a`` leaves live.

    Args:
        heads: bool ``[n_layers, n_heads]``, True = frozen.
        channels: bool ``[n_layers, d_ff]``, True = frozen.
        layout: the model they belong to, where known.
        origin: how the selection came about, as JSON can hold it; becomes the plan's metadata.
        scores: where the units were scored on a model, those scores: `build` holds a model to them.

    Raises:
        TypeError: arrays that are not bool.
        ValueError: wrong number of dimensions, different numbers of layers.
    """

    heads: np.ndarray
    channels: np.ndarray
    layout: UnitLayout | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    scores: UnitScores | None = None

    def __post_init__(self) -> None:
        for word in ("heads", "channels"):
            array = np.array(getattr(self, word))
            if array.dtype != np.bool_:
                raise TypeError(f"UnitSelection: {word} has dtype {array.dtype}, expected bool with True = frozen")
            self._read_only(word, array)
        if self.heads.ndim != 2 or self.channels.ndim != 2 or len(self.heads) != len(self.channels):
            raise ValueError(
                f"UnitSelection: heads has shape {self.heads.shape} and channels {self.channels.shape}, "
                "expected [layers, heads] and [layers, d_ff]"
            )

    def build(
        self, model: torch.nn.Module | UnitLayout | None = None, preset: Preset = "full", kv: KvPolicy = "any"
    ) -> FreezePlan:
        """The freeze plan of these units. Embeddings, norms and the output head hold no units: they stay
        live.

        Args:
            model: the model to freeze; where its units were scored here, it must have the weights that were. Or
                its layout from `find_units`, to build for any weights; not needed when the scores came with one.
            preset: ``"full"`` (SSAH's definition of a unit) freezes rows of q, k, v, gate and up with their
                biases, and columns of the output projections; ``"producer"`` the rows and biases alone.
            kv: a KV head shared by several query heads is frozen if ``"any"`` of them is frozen (safety
                first), only if ``"all"`` are, or ``"never"``. A share counts just a head's own part of its KV
                head: ``"any"`` freezes somewhat more than the share asked for, the others somewhat less.

        Raises:
            ValueError: nothing selected, no model where one is needed, a model with other numbers of units or
                other weights than the scored one, an unknown architecture, preset or policy.
        """
        if not self.flat.any():
            raise ValueError(
                "build: the selection holds no unit, expected at least one; to freeze nothing, use no plan"
            )
        layout = model if isinstance(model, UnitLayout) else find_units(model) if model is not None else self.layout
        if layout is None:
            raise ValueError("build: labels do not say which model they belong to; pass the model or its UnitLayout")
        if self.shapes != layout.unit_shapes:
            raise ValueError(
                f"build: the selection has heads {self.heads.shape} and channels {self.channels.shape}, "
                f"expected {layout.heads_shape} and {layout.channels_shape} for {layout}; were the scores "
                "made for this model?"
            )
        if self.scores is not None and isinstance(model, torch.nn.Module):
            self.scores.check(model)
        counts = {"frozen_heads": int(self.heads.sum()), "frozen_channels": int(self.channels.sum())}
        about = {**self.origin, "model_type": layout.model_type, "preset": preset, "kv": kv, **counts}
        return FreezePlan(unit_masks(layout, self.heads, self.channels, preset, kv), about)

    def random_like(self, seed: int) -> UnitSelection:
        """A control: as many heads and channels in every layer, drawn at random from all of that layer's."""
        draw = np.random.default_rng(seed)
        heads, channels = (draw.permuted(array, axis=1) for array in (self.heads, self.channels))
        return replace(self, heads=heads, channels=channels, origin={**self.origin, "random_like": int(seed)})

    def __or__(self, other: UnitSelection) -> UnitSelection:
        return self._combined(other, "union", np.logical_or)

    def __and__(self, other: UnitSelection) -> UnitSelection:
        return self._combined(other, "intersection", np.logical_and)

    def __sub__(self, other: UnitSelection) -> UnitSelection:
        return self._combined(other, "difference", lambda mine, theirs: mine & ~theirs)

    def __invert__(self) -> UnitSelection:
        return replace(self, heads=~self.heads, channels=~self.channels, origin={"all_but": dict(self.origin)})

    def _combined(
        self, other: UnitSelection, word: str, of: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> UnitSelection:
        if not isinstance(other, UnitSelection):
            return NotImplemented
        self._check_same_units(other, word)
        return UnitSelection(
            of(self.heads, other.heads),
            of(self.channels, other.channels),
            self.layout or other.layout,
            {word: [dict(self.origin), dict(other.origin)]},
            self.scores or other.scores,
        )

    def _check_same_units(self, other: UnitSelection, operation: str) -> None:
        if self.shapes != other.shapes:
            raise ValueError(
                f"{operation}: selections of heads {self.heads.shape} and {other.heads.shape}, channels "
                f"{self.channels.shape} and {other.channels.shape}, expected the same"
            )
        if self.layout is not None and other.layout is not None and self.layout != other.layout:
            raise ValueError(f"{operation}: selections for {self.layout} and {other.layout}, expected one model")
        scored = {s.model_fingerprint for s in (self.scores, other.scores) if s is not None and s.model_fingerprint}
        if len(scored) > 1 and operation != "jaccard":
            raise ValueError(f"{operation}: the units were scored on models with other weights, expected one model")

    def jaccard(self, other: UnitSelection) -> float:
        """Units frozen in both / units frozen in either; 1.0 if neither freezes any.

        Compares selections across seeds and calibration sets. Raises ValueError for different numbers of
        units.
        """
        self._check_same_units(other, "jaccard")
        mine, theirs = self.flat, other.flat
        either = int((mine | theirs).sum())
        return int((mine & theirs).sum()) / either if either else 1.0

    def __repr__(self) -> str:
        return (
            f"UnitSelection({self.heads.sum()} of {self.heads.size} heads and {self.channels.sum()} of "
            f"{self.channels.size} channels frozen)"
        )


# ------------------------------------------------------------------------------------------------ stability


@dataclass(frozen=True, eq=False)
class Stability:
    """How far selections made from different seeds or calibration sets agree. Made by `stability`.

    Jaccard overlap alone says little: two random halves of all units overlap by a third. `agreement` sets
    chance to 0 and equality to 1, as Kuncheva's consistency index does (2007); below 0.4, where Fleiss's
    scale calls agreement poor (so used by Nogueira, Sechidis & Brown, JMLR 2018), it is `low`.

    Args:
        names: of the selections.
        jaccard: ``[n, n]``, `UnitSelection.jaccard` of every pair.
        chance: ``[n, n]``, what random selections with the same counts in every layer are expected to overlap.
    """

    names: tuple[str, ...]
    jaccard: np.ndarray
    chance: np.ndarray

    @property
    def mean(self) -> float:
        """Mean Jaccard overlap over all pairs."""
        return float(self.jaccard[self._pairs].mean())

    @property
    def min(self) -> float:
        """Lowest Jaccard overlap of any pair."""
        return float(self.jaccard[self._pairs].min())

    @property
    def expected(self) -> float:
        """Mean overlap expected of random selections with the same counts."""
        return float(self.chance[self._pairs].mean())

    @property
    def agreement(self) -> float:
        """Mean over all pairs of (overlap − chance) / (1 − chance): 0 is chance, 1 is equality."""
        overlap, chance = self.jaccard[self._pairs], self.chance[self._pairs]
        certain = chance >= 1  # then they are equal
        return float(np.where(certain, 1.0, (overlap - chance) / np.where(certain, 1.0, 1 - chance)).mean())

    @property
    def low(self) -> bool:
        """Whether the selections agree too little to be taken for a property of the model."""
        return self.agreement < _POOR

    @property
    def warning(self) -> str | None:
        """What to say where agreement is low, else None."""
        if not self.low:
            return None
        return (
            f"the selections agree little: {self.agreement:.2f} beyond chance, expected {_POOR} or more; another seed "
            "or calibration set would freeze other units; score on more calibration data"
        )

    @property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        return np.triu_indices(len(self.names), 1)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        numbers = {word: getattr(self, word) for word in ("mean", "min", "expected", "agreement", "low")}
        matrices = {"jaccard": self.jaccard.tolist(), "chance": self.chance.tolist()}
        return {"names": list(self.names), **matrices, **numbers}

    def __str__(self) -> str:
        lowest = int(self.jaccard[self._pairs].argmin())
        first, second = (self.names[i[lowest]] for i in self._pairs)
        lines = [
            f"Jaccard overlap of {len(self.names)} selections: {self.mean:.3f} on average",
            f"lowest: {self.min:.3f}, {first} and {second}",
            f"random selections of the same counts: {self.expected:.3f}",
            f"agreement beyond chance: {self.agreement:.3f}",
        ]
        return "\n".join([*lines, f"warning: {self.warning}"] if self.low else lines)


def stability(selections: Sequence[UnitSelection] | Mapping[str, UnitSelection]) -> Stability:
    """Compare selections made from different seeds, calibration halves or methods, pair by pair.

    Args:
        selections: two or more of one model; a mapping gives them names.

    Raises:
        TypeError: something else than selections.
        ValueError: fewer than two, or of models with other numbers of units.

    >>> print(stability({"half 1": builders[0].freeze(), "half 2": builders[1].freeze()}))  # doctest: +SKIP
    """
    if isinstance(selections, Mapping):
        names, chosen = tuple(map(str, selections)), list(selections.values())
    else:
        chosen = list(selections)
        names = tuple(map(str, range(len(chosen))))
    for name, selection in zip(names, chosen, strict=True):
        if not isinstance(selection, UnitSelection):
            raise TypeError(f"stability: selection {name} is a {type(selection).__name__}, expected a UnitSelection")
    if len(chosen) < 2:
        raise ValueError(f"stability: {len(chosen)} selections given, expected at least two to compare")
    jaccard, chance = np.ones((len(chosen), len(chosen))), np.ones((len(chosen), len(chosen)))
    for i, j in combinations(range(len(chosen)), 2):
        jaccard[i, j] = jaccard[j, i] = chosen[i].jaccard(chosen[j])
        chance[i, j] = chance[j, i] = _expected_jaccard(chosen[i], chosen[j])
    return Stability(names, jaccard, chance)


def _expected_jaccard(one: UnitSelection, two: UnitSelection) -> float:
    """Expected intersection over expected union of random draws with these counts per layer, heads and
    channels apart: k and l of n units share k·l/n."""
    both = 0.0
    for mine, theirs in ((one.heads, two.heads), (one.channels, two.channels)):
        both += float((mine.sum(1) * theirs.sum(1)).sum()) / max(mine.shape[1], 1)
    either = int(one.flat.sum()) + int(two.flat.sum()) - both
    return both / either if either else 1.0
