"""From unit scores to what is frozen: labels, selections of units, freeze plans.

Labels and their recipe are SSAH's (Li & Kim, ICLR 2026, arXiv 2410.10862): safety-critical units (SCU),
utility-critical units (UCU), complex units that serve both (CU), redundant units that serve neither (RU).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..masks import FreezePlan, write_atomically
from .scores import SetScores, UnitScores
from .units import KvPolicy, Preset, UnitLayout, find_units, unit_masks

__all__ = ["LABELS", "MaskBuilder", "Rank", "Recipe", "UnitLabels", "UnitSelection", "read_labels"]

Recipe = Literal["paper", "ssah-prototype"]
Rank = Literal["sum", "safety", "utility", "diff"]

#: Label names; a label's code is its place here.
LABELS: Final = ("RU", "SCU", "UCU", "CU")
_RU, _SCU, _UCU, _CU = range(4)
_RATIOS: Final = {"RU": 0.1, "SCU": 0.01, "UCU": 0.1}
_PROTOTYPE_HEAD_COST: Final = 170.0  # 512/3 held in an integer tensor there, whatever the model's shapes


@dataclass(frozen=True, repr=False, eq=False)
class UnitLabels:
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
        return {
            name: (int((self.heads == code).sum()), int((self.channels == code).sum()))
            for code, name in enumerate(LABELS)
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file `read_labels` reads; a crash leaves an older file as it was."""
        from safetensors.torch import save

        write_atomically(Path(path), save({"attention_heads": self.heads, "mlp_channels": self.channels}))

    def __repr__(self) -> str:
        shares = ", ".join(f"{name} {h} heads + {c} channels" for name, (h, c) in self.counts().items())
        return f"UnitLabels({len(self.heads)} layers: {shares})"


def read_labels(path: str | os.PathLike[str]) -> UnitLabels:
    """Read unit labels from a safetensors file with ``attention_heads`` and ``mlp_channels``, integer codes.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: not such a file; see `UnitLabels`.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"read_labels: no file {os.fspath(path)!r}")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return UnitLabels(file.get_tensor("attention_heads"), file.get_tensor("mlp_channels"))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"read_labels: {os.fspath(path)!r} is not a safetensors file with attention_heads and "
            f"mlp_channels ({error})"
        ) from error


# ----------------------------------------------------------------------------------------------- selections


@dataclass(frozen=True, repr=False, eq=False)
class UnitSelection:
    """Which units are frozen. Made by `MaskBuilder`, turned into a plan by `build`.

    Args:
        heads: bool ``[n_layers, n_heads]``, True = frozen.
        channels: bool ``[n_layers, d_ff]``, True = frozen.
        layout: the model they belong to, where known.
        origin: how the selection came about, as JSON can hold it; becomes the plan's metadata.

    Raises:
        TypeError: arrays that are not bool.
        ValueError: wrong number of dimensions, different numbers of layers.
    """

    heads: np.ndarray
    channels: np.ndarray
    layout: UnitLayout | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for word in ("heads", "channels"):
            array = np.array(getattr(self, word))
            if array.dtype != np.bool_:
                raise TypeError(f"UnitSelection: {word} has dtype {array.dtype}, expected bool with True = frozen")
            array.flags.writeable = False
            object.__setattr__(self, word, array)
        if self.heads.ndim != 2 or self.channels.ndim != 2 or len(self.heads) != len(self.channels):
            raise ValueError(
                f"UnitSelection: heads has shape {self.heads.shape} and channels {self.channels.shape}, "
                "expected [layers, heads] and [layers, d_ff]"
            )

    def build(
        self,
        model: torch.nn.Module | UnitLayout | None = None,
        preset: Preset = "full",
        kv: KvPolicy = "any",
    ) -> FreezePlan:
        """The freeze plan of these units. Embeddings, norms and the output head hold no units: they stay
        live.

        Args:
            model: the model to freeze, or its layout from `find_units`; not needed when the scores came with
                one.
            preset: ``"full"`` (SSAH's definition of a unit) freezes rows of q, k, v, gate and up with their
                biases, and columns of the output projections; ``"producer"`` the rows and biases alone.
            kv: a KV head shared by several query heads is frozen if ``"any"`` of them is frozen (safety
                first), only if ``"all"`` are, or ``"never"``. A share counts just a head's own part of its KV
                head: ``"any"`` freezes somewhat more than the share asked for, the others somewhat less.

        Raises:
            ValueError: no model where one is needed, a model with other numbers of units, an unknown
                architecture, preset or policy.
        """
        layout = model if isinstance(model, UnitLayout) else find_units(model) if model is not None else self.layout
        if layout is None:
            raise ValueError("build: labels do not say which model they belong to; pass the model or its UnitLayout")
        if (self.heads.shape, self.channels.shape) != (layout.heads_shape, layout.channels_shape):
            raise ValueError(
                f"build: the selection has heads {self.heads.shape} and channels {self.channels.shape}, "
                f"expected {layout.heads_shape} and {layout.channels_shape} for {layout}; were the scores "
                "made for this model?"
            )
        masks = unit_masks(layout, self.heads, self.channels, preset, kv)
        return FreezePlan(
            masks,
            {
                **self.origin,
                "model_type": layout.model_type,
                "preset": preset,
                "kv": kv,
                "frozen_heads": int(self.heads.sum()),
                "frozen_channels": int(self.channels.sum()),
            },
        )

    def random_like(self, seed: int) -> UnitSelection:
        """A control: as many heads and channels in every layer, drawn at random from all of that layer's."""
        draw = np.random.default_rng(seed)
        heads, channels = (draw.permuted(array, axis=1) for array in (self.heads, self.channels))
        return UnitSelection(heads, channels, self.layout, {**self.origin, "random_like": int(seed)})

    def jaccard(self, other: UnitSelection) -> float:
        """Units frozen in both / units frozen in either; 1.0 if neither freezes any.

        Compares selections across seeds and calibration sets. Raises ValueError for different numbers of
        units.
        """
        if (self.heads.shape, self.channels.shape) != (other.heads.shape, other.channels.shape):
            raise ValueError(
                f"jaccard: selections of heads {self.heads.shape} and {other.heads.shape}, channels "
                f"{self.channels.shape} and {other.channels.shape}, expected the same"
            )
        pairs = ((self.heads, other.heads), (self.channels, other.channels))
        either = sum(int((a | b).sum()) for a, b in pairs)
        return sum(int((a & b).sum()) for a, b in pairs) / either if either else 1.0

    def __repr__(self) -> str:
        return (
            f"UnitSelection({self.heads.sum()} of {self.heads.size} heads and {self.channels.sum()} of "
            f"{self.channels.size} channels frozen)"
        )


# -------------------------------------------------------------------------------------------------- builder


class MaskBuilder:
    """Labels units and selects those to freeze.

    Recipe (SSAH): scores become z-scores per layer, attention and MLP apart (over the features of all heads,
    then the mean over a head's features; a layer whose scores are all equal gets 0). With zS and zU those of
    the safety and the utility set, all heads and channels of the model are ranked together: RU are the lowest
    zS + zU, SCU the highest zS − zU, UCU the lowest zS − zU, CU the rest; a later label overwrites an earlier
    one, but UCU never an SCU. Ties go to the lowest index, heads before channels.

    Shares are shares of cost, that is of parameters: a channel counts 1, a head as many channels as it has
    parameters for. Of a ranking the prefix is taken whose cost is nearest to the share asked for, at least
    one unit.

    Args:
        scores: `UnitScores`, or `UnitLabels` that were made elsewhere (with those, only whole labels can be
            frozen).
        ratios: shares of RU, SCU and UCU; what is left out keeps its default (0.1, 0.01, 0.1).
        recipe: ``"paper"`` uses the scores as they are and costs from the model's shapes.
            ``"ssah-prototype"`` repeats what the authors' 2024 prototype does: attention scores squared once
            more, a head costs 170 channels whatever the model, and RU and UCU take one unit past the nearest
            prefix.
        head_cost: overrides the cost of a head.

    Raises:
        TypeError: ``scores`` is neither.
        ValueError: an unknown recipe or label, ratios outside 0 to 1 or given with labels.

    >>> plan = MaskBuilder(scores).freeze(scu=True, cu=0.06).build(model)  # doctest: +SKIP
    """

    def __init__(
        self,
        scores: UnitScores | UnitLabels,
        ratios: Mapping[str, float] | None = None,
        recipe: Recipe = "paper",
        *,
        head_cost: float | None = None,
    ) -> None:
        if recipe not in get_args(Recipe):
            raise ValueError(
                f"MaskBuilder: recipe is {recipe!r}, expected one of {', '.join(map(repr, get_args(Recipe)))}"
            )
        if head_cost is not None and not 0 < head_cost < float("inf"):
            raise ValueError(f"MaskBuilder: head_cost is {head_cost!r}, expected channels per head, above 0")
        self.recipe = recipe
        if isinstance(scores, UnitLabels):
            if ratios is not None:
                raise ValueError("MaskBuilder: ratios given with finished labels, expected them with scores only")
            self.scores, self.layout, self.ratios = None, None, dict[str, float]()
            self.labels, self.head_cost = scores, head_cost
        elif isinstance(scores, UnitScores):
            self.scores, self.layout, self.ratios = scores, scores.layout, _checked_ratios(ratios)
            self.head_cost = head_cost or (
                _PROTOTYPE_HEAD_COST if recipe == "ssah-prototype" else scores.layout.head_cost
            )
            self.labels = self._label()
        else:
            raise TypeError(f"MaskBuilder: scores is a {type(scores).__name__}, expected UnitScores or UnitLabels")

    # -- selecting -------------------------------------------------------------------------------------------

    def freeze(
        self,
        *,
        scu: bool = True,
        cu: bool | float = False,
        share: float | None = None,
        cu_share_of: Literal["units", "cu"] = "units",
        cu_rank: Rank = "sum",
    ) -> UnitSelection:
        """Select the units to freeze: by label, or up to a share.

        Args:
            scu: freeze the SCU.
            cu: True: all CU; a fraction: the first CU in the order of ``cu_rank``, up to that share.
            share: instead of ``scu`` and ``cu``: freeze this share of all units, SCU first (highest zS − zU
                first), then CU, then UCU, then RU, these three in the order of ``cu_rank``. 1.0 is every
                unit.
            cu_share_of: whether ``cu=0.06`` is 6% of all ``"units"`` (so the paper's "7.5%" is about SCU +
                6%) or of the ``"cu"``: the paper does not say. Both are shares of cost.
            cu_rank: highest first: ``"sum"`` zS + zU, since CU matter for both; ``"safety"`` zS;
                ``"utility"`` zU; ``"diff"`` zS − zU.

        Raises:
            ValueError: a share outside 0 to 1, more than all CU, a fraction where only labels are known,
                ``share`` together with ``scu=False`` or ``cu``, an unknown word.
        """
        _check_word("freeze", "cu_share_of", cu_share_of, ("units", "cu"))
        _check_word("freeze", "cu_rank", cu_rank, get_args(Rank))
        if share is not None:
            if cu is not False or scu is not True:
                raise ValueError("freeze: share given with scu or cu, expected either; share counts both itself")
            wanted = _checked_share("freeze: share", share)
            ranks: tuple[tuple[int, Rank], ...] = (
                (_SCU, "diff"),
                (_CU, cu_rank),
                (_UCU, cu_rank),
                (_RU, cu_rank),
            )
            order = np.concatenate([self._ranked(code, rank, f"share={share}") for code, rank in ranks])
            units = self._prefix(order, wanted * float(self._costs.sum()))
            return self._select(units, {"share": wanted, "cu_rank": cu_rank})
        units = self._labelled(_SCU) if scu else self._labelled(_SCU)[:0]
        origin: dict[str, Any] = {"scu": bool(scu), "cu": bool(cu)}
        if not isinstance(cu, bool):
            wanted = _checked_share("freeze: cu", cu)
            units = np.concatenate([units, self._first_cu(wanted, cu_share_of, cu_rank)])
            origin |= {"cu": wanted, "cu_share_of": cu_share_of, "cu_rank": cu_rank}
        elif cu:
            units = np.concatenate([units, self._labelled(_CU)])
        return self._select(units, origin)

    def train_only(self, label: str = "RU", share: float | None = None, rank: Rank = "utility") -> UnitSelection:
        """Select everything but the units of one label: those alone train.

        With ``share``, the redundant units are the lowest ``rank`` up to that share of all units instead:
        SSAH's alignment budget of a base model, ``train_only("RU", 0.2)``, which ranks by utility alone since
        a base model has no safety to keep.

        Raises:
            ValueError: an unknown label or rank, a share for another label than RU, outside 0 to 1, or where
                only labels are known.
        """
        _check_word("train_only", "label", label, LABELS)
        _check_word("train_only", "rank", rank, get_args(Rank))
        origin: dict[str, Any] = {"train_only": label}
        if share is None:
            live = self._labelled(LABELS.index(label))
        elif label != "RU":
            raise ValueError(f"train_only: share given with label {label!r}, expected it with 'RU' only")
        else:
            wanted = _checked_share("train_only: share", share)
            live = self._lowest(self._rank_values(rank, f"share={share}"), np.arange(self._flat_labels.size), wanted)
            origin |= {"share": wanted, "rank": rank}
        return self._select(np.setdiff1d(np.arange(self._flat_labels.size), live), origin)

    def _first_cu(self, wanted: float, share_of: str, rank: Rank) -> np.ndarray:
        if wanted == 0:
            return self._labelled(_CU)[:0]
        order = self._ranked(_CU, rank, f"cu={wanted}")
        total, available = float(self._costs.sum()), float(self._costs[order].sum())
        target = wanted * (available if share_of == "cu" else total)
        if target > available:
            raise ValueError(
                f"freeze: cu={wanted} asks for {wanted:.1%} of the cost of all units, expected at most "
                f"{available / total:.1%}, which is all CU; pass cu=True for all CU, or cu_share_of='cu'"
            )
        return self._prefix(order, target)

    def _select(self, units: np.ndarray, origin: Mapping[str, Any]) -> UnitSelection:
        flat = np.zeros(self._flat_labels.size, bool)
        flat[units] = True
        heads, channels = self._unflatten(flat)
        about: dict[str, Any] = {"selection": dict(origin)}
        if self.scores is not None:
            about |= {"recipe": self.recipe, "ratios": self.ratios, "head_cost": self.head_cost}
            about["method"] = self.scores.method
        return UnitSelection(heads, channels, self.layout, about)

    # -- labelling -------------------------------------------------------------------------------------------

    def _label(self) -> UnitLabels:
        everything = np.arange(self._costs.size)
        total, diff = self._rank_values("sum"), self._rank_values("diff")
        codes = np.full(everything.size, _CU, np.uint8)
        codes[self._lowest(total, everything, self.ratios["RU"])] = _RU
        scu = self._prefix(_descending(diff, everything), self.ratios["SCU"] * self._costs.sum())
        codes[scu] = _SCU
        codes[self._lowest(diff, np.setdiff1d(everything, scu), self.ratios["UCU"])] = _UCU
        heads, channels = self._unflatten(codes)
        return UnitLabels(torch.from_numpy(heads.copy()), torch.from_numpy(channels.copy()))

    @cached_property
    def _costs(self) -> np.ndarray:
        """Cost of each unit, flat: heads of all layers, then channels of all layers."""
        assert self.layout is not None and self.head_cost is not None
        n_heads, n_channels = int(np.prod(self.layout.heads_shape)), int(np.prod(self.layout.channels_shape))
        return np.concatenate([np.full(n_heads, self.head_cost), np.ones(n_channels)])

    @cached_property
    def _z(self) -> tuple[np.ndarray, np.ndarray]:
        """zS and zU of each unit, flat float64."""
        assert self.scores is not None
        return self._standardized(self.scores.safety), self._standardized(self.scores.utility)

    def _standardized(self, scores: SetScores) -> np.ndarray:
        features = scores.head_features.numpy().astype(np.float64)
        if self.recipe == "ssah-prototype":
            features = features**2
        heads = _z_scores(features.reshape(len(features), -1)).reshape(features.shape).mean(2)
        return np.concatenate([heads.ravel(), _z_scores(scores.channels.numpy().astype(np.float64)).ravel()])

    @cached_property
    def _flat_labels(self) -> np.ndarray:
        return np.concatenate([self.labels.heads.numpy().ravel(), self.labels.channels.numpy().ravel()])

    def _unflatten(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        heads = self.layout.heads_shape if self.layout else tuple(self.labels.heads.shape)
        channels = self.layout.channels_shape if self.layout else tuple(self.labels.channels.shape)
        split = int(np.prod(heads))
        return flat[:split].reshape(heads), flat[split:].reshape(channels)

    def _labelled(self, code: int) -> np.ndarray:
        """Units of one label, in order of index."""
        return np.flatnonzero(self._flat_labels == code)

    def _rank_values(self, rank: Rank, asked: str = "") -> np.ndarray:
        if self.scores is None:
            raise ValueError(
                f"MaskBuilder: {asked} needs a ranking of units, but labels carry no scores; freeze whole "
                "labels (cu=True), or build from UnitScores"
            )
        safety, utility = self._z
        values: dict[str, np.ndarray] = {
            "sum": safety + utility,
            "diff": safety - utility,
            "safety": safety,
            "utility": utility,
        }
        return values[rank]

    def _ranked(self, code: int, rank: Rank, asked: str) -> np.ndarray:
        """Units of one label, highest first."""
        return _descending(self._rank_values(rank, asked), self._labelled(code))

    def _prefix(self, order: np.ndarray, target: float) -> np.ndarray:
        """The start of ``order`` whose cost is nearest to ``target``: at least one unit, but none for 0."""
        if target <= 0 or not order.size:
            return order[:0]
        reached = np.cumsum(self._costs[order])
        return order[: int(np.abs(reached - target).argmin()) + 1]

    def _lowest(self, values: np.ndarray, units: np.ndarray, ratio: float) -> np.ndarray:
        """The lowest-valued of ``units``, up to a share ``ratio`` of all units' cost."""
        order: np.ndarray = units[np.argsort(values[units], kind="stable")]
        target = ratio * float(self._costs.sum())
        if self.recipe == "paper" or target <= 0:
            return self._prefix(order, target)
        # The prototype thresholds a descending ranking and keeps what is strictly above: the unit at the
        # threshold goes to the low end too. It searches from the top: of two equally near, the longer prefix.
        reached = np.concatenate([[0.0], np.cumsum(self._costs[order])[:-1]])
        nearest = reached.size - 1 - int(np.abs(reached - target)[::-1].argmin())
        return order[: nearest + 1]


def _descending(values: np.ndarray, units: np.ndarray) -> np.ndarray:
    ordered: np.ndarray = units[np.argsort(-values[units], kind="stable")]
    return ordered


def _z_scores(scores: np.ndarray) -> np.ndarray:
    """Per row: minus the mean, over the sample standard deviation; 0 where all are equal."""
    centred = scores - scores.mean(1, keepdims=True)
    spread = centred.std(1, ddof=1, keepdims=True) if scores.shape[1] > 1 else np.zeros((len(scores), 1))
    # equal scores leave rounding noise, not spread
    flat = scores.max(1, keepdims=True) == scores.min(1, keepdims=True)
    return np.where(flat, 0.0, centred / np.where(flat, 1.0, spread))


def _checked_ratios(given: Mapping[str, float] | None) -> dict[str, float]:
    ratios = {**_RATIOS, **(given or {})}
    if set(ratios) != set(_RATIOS):
        raise ValueError(
            f"MaskBuilder: ratios names {', '.join(map(repr, sorted(set(ratios) - set(_RATIOS))))}, expected "
            "'RU', 'SCU' and 'UCU' (CU is the rest)"
        )
    ratios = {label: _checked_share(f"MaskBuilder: ratio of {label}", ratio) for label, ratio in ratios.items()}
    if ratios["SCU"] + ratios["UCU"] > 1:
        raise ValueError(
            f"MaskBuilder: ratios of SCU and UCU are {ratios['SCU']} and {ratios['UCU']}, expected a sum of at most 1"
        )
    return ratios


def _checked_share(what: str, share: float) -> float:
    if isinstance(share, bool) or not isinstance(share, int | float | np.number) or not 0 <= share <= 1:
        raise ValueError(f"{what} is {share!r}, expected a fraction from 0 to 1")
    return float(share)


def _check_word(operation: str, what: str, given: str, valid: tuple[str, ...]) -> None:
    if given not in valid:
        raise ValueError(f"{operation}: {what} is {given!r}, expected one of {', '.join(map(repr, valid))}")
