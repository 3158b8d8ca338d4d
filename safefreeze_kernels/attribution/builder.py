"""From unit scores to what is frozen: the recipes that label and rank units, and the requests that select them.

The recipes are SSAH's (Li & Kim, ICLR 2026, arXiv 2410.10862): its paper's and its authors' prototype's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, Literal, get_args

import numpy as np
import torch

from .scores import SETS, SetScores, UnitScores
from .selections import LABELS, UnitLabels, UnitRanking, UnitSelection
from .units import check_word

Recipe = Literal["paper", "ssah-prototype"]
Rank = Literal["sum", "safety", "utility", "diff", "score"]
ShareOf = Literal["units", "cu"]
Units = Literal["all", "heads", "channels"]

_RU, _SCU, _UCU, _CU = range(4)
_RATIOS: Final = {"RU": 0.1, "SCU": 0.01, "UCU": 0.1}
_PROTOTYPE_HEAD_COST: Final = 170.0  # 512/3 kept in an integer tensor there, whatever the model's shapes


class MaskBuilder:
    """Labels units, ranks them, and selects those to freeze.

    Recipe of the labels (SSAH): scores become z-scores per layer, attention and MLP apart (over the features
    of all heads, then the mean over a head's features; a layer whose scores are all equal gets 0). With zS
    and zU those of the safety and the utility set, all heads and channels of the model are ranked together:
    RU are the lowest zS + zU, SCU the highest zS − zU, UCU the lowest zS − zU, CU the rest; a later label
    overwrites an earlier one, but UCU never an SCU. Ties go to the lowest index, heads before channels.

    Shares are shares of cost, that is of parameters: a channel counts 1, a head as many channels as it has
    parameters for. Of a ranking the prefix is taken whose cost is nearest to the share asked for, at least
    one unit.

    Args:
        scores: `UnitScores`; or what was made elsewhere: `UnitLabels` (whole labels can be frozen), or a
            `UnitRanking` (its top can be frozen).
        ratios: shares of RU, SCU and UCU; what is left out keeps its default (0.1, 0.01, 0.1).
        recipe: ``"paper"`` uses the scores as they are and costs from the model's shapes.
            ``"ssah-prototype"`` repeats what the authors' 2024 prototype does: attention scores squared once
            more, a head costs 170 channels whatever the model, and RU and UCU take one unit past the nearest
            prefix.
        head_cost: overrides the cost of a head.

    Raises:
        TypeError: ``scores`` is none of these.
        ValueError: an unknown recipe or label, ratios outside 0 to 1, over 1 together, or given without
            scores. Whatever needs a ranking raises it for scores that are the same for all units.

    >>> plan = MaskBuilder(scores).freeze(scu=True, cu=0.06).build(model)  # doctest: +SKIP
    """

    def __init__(
        self,
        scores: UnitScores | UnitLabels | UnitRanking,
        ratios: Mapping[str, float] | None = None,
        recipe: Recipe = "paper",
        *,
        head_cost: float | None = None,
    ) -> None:
        if not isinstance(scores, UnitScores | UnitLabels | UnitRanking):
            raise TypeError(
                f"MaskBuilder: scores is a {type(scores).__name__}, expected UnitScores, UnitLabels or UnitRanking; "
                "WeightScores select by themselves: scores.top(0.5, grain='row').build(model)"
            )
        check_word("MaskBuilder", "recipe", recipe, get_args(Recipe))
        if head_cost is not None and not 0 < head_cost < float("inf"):
            raise ValueError(f"MaskBuilder: head_cost is {head_cost!r}, expected channels per head, above 0")
        if ratios is not None and not isinstance(scores, UnitScores):
            raise ValueError(
                f"MaskBuilder: ratios given with finished {type(scores).__name__}, expected them with scores only"
            )
        self.recipe = recipe
        self.scores = scores if isinstance(scores, UnitScores) else None
        self.layout = None if isinstance(scores, UnitLabels) else scores.layout
        self.ratios = _checked_ratios(ratios) if self.scores is not None else dict[str, float]()
        self.head_cost = head_cost
        if head_cost is None and self.layout is not None:
            self.head_cost = _PROTOTYPE_HEAD_COST if recipe == "ssah-prototype" else self.layout.head_cost
        self._source = scores

    @cached_property
    def labels(self) -> UnitLabels:
        """The label of every unit.

        Raises:
            ValueError: a builder of a ranking, or scores that are the same for all units.
        """
        if isinstance(self._source, UnitLabels):
            return self._source
        if isinstance(self._source, UnitRanking):
            raise ValueError(
                "MaskBuilder: labels need a safety and a utility score per unit, but a ranking holds one score; "
                "select with top()"
            )
        return self._label()

    # -- selecting -------------------------------------------------------------------------------------------

    def freeze(
        self,
        *,
        scu: bool = True,
        cu: bool | float = False,
        share: float | None = None,
        cu_share_of: ShareOf = "units",
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
                ``"utility"`` zU; ``"diff"`` zS − zU; ``"score"`` the method's own score.

        Raises:
            ValueError: a share outside 0 to 1, more than all CU, a fraction where only labels are known,
                ``share`` together with ``scu=False`` or ``cu``, an unknown word, a request no unit meets.
        """
        check_word("freeze", "cu_share_of", cu_share_of, get_args(ShareOf))
        check_word("freeze", "cu_rank", cu_rank, get_args(Rank))
        if share is not None:
            if cu is not False or scu is not True:
                raise ValueError("freeze: share given with scu or cu, expected either; share counts both itself")
            wanted = _checked_share("freeze: share", share)
            ranks: dict[int, Rank] = {_SCU: "diff", _CU: cu_rank, _UCU: cu_rank, _RU: cu_rank}
            order = np.concatenate([self._ranked(code, rank, f"share={share}") for code, rank in ranks.items()])
            units = self._prefix(order, wanted * float(self._costs.sum()))
            return self._select("freeze", units, {"share": wanted, "cu_rank": cu_rank})
        units = self._labelled(_SCU) if scu else self._labelled(_SCU)[:0]
        origin: dict[str, Any] = {"scu": bool(scu), "cu": bool(cu)}
        if not isinstance(cu, bool):
            wanted = _checked_share("freeze: cu", cu)
            units = np.concatenate([units, self._first_cu(wanted, cu_share_of, cu_rank)])
            origin |= {"cu": wanted, "cu_share_of": cu_share_of, "cu_rank": cu_rank}
        elif cu:
            units = np.concatenate([units, self._labelled(_CU)])
        return self._select("freeze", units, origin)

    def train_only(
        self, label: str | Sequence[str] = "RU", share: float | None = None, rank: Rank = "utility"
    ) -> UnitSelection:
        """Select everything but the units of one label, or of several: those alone train.

        With ``share``, the redundant units are the lowest ``rank`` up to that share of all units instead:
        SSAH's alignment budget of a base model, ``train_only("RU", 0.2)``, which ranks by utility alone since
        a base model has no safety to keep.

        Raises:
            ValueError: an unknown label or rank, a label no unit carries, labels that every unit carries, a
                share of another label than RU, outside 0 to 1, that leaves no unit to train or none to
                freeze, or where only labels are known.
        """
        labels = (label,) if isinstance(label, str) else tuple(label)
        for name in labels:
            check_word("train_only", "label", name, LABELS)
        check_word("train_only", "rank", rank, get_args(Rank))
        origin: dict[str, Any] = {"train_only": label if isinstance(label, str) else list(labels)}
        live = np.zeros(self._size, bool)
        if share is None:
            live = np.isin(self.labels.flat, [LABELS.index(name) for name in labels])
        elif labels != ("RU",):
            raise ValueError(f"train_only: share given with label {label!r}, expected it with 'RU' only")
        else:
            wanted = _checked_share("train_only: share", share)
            live[self._lowest(self._rank_values(rank, f"share={share}"), np.arange(self._size), wanted)] = True
            origin |= {"share": wanted, "rank": rank}
        if not live.any():
            raise ValueError(
                f"train_only: no unit is left to train ({_shown(origin)}), expected at least one; to freeze every "
                "unit on purpose, use freeze(share=1.0)"
            )
        return self._select("train_only", np.flatnonzero(~live), origin)

    def top(
        self,
        amount: float,
        by: Rank | None = None,
        *,
        units: Units = "all",
        per_layer: bool = False,
        apart: bool = True,
    ) -> UnitSelection:
        """Select the units that rank highest, whatever their label. Ties go to the lowest index.

        Args:
            amount: a float is a share (of cost; the count nearest to it), 1.0 every unit; an int is a count.
            by: what ranks: ``"score"`` the method's own score; ``"diff"`` zS − zU, ``"safety"`` zS,
                ``"utility"`` zU, ``"sum"`` zS + zU. Default: ``"score"`` where there is one, else ``"diff"``.
            units: rank ``"all"`` units that have scores, or only ``"heads"``, or only ``"channels"``.
            per_layer: take the amount in every layer, not over the whole model.
            apart: take the amount of the heads and, apart, of the channels: their own scores need not be on
                one scale. False ranks them together.

        Raises:
            ValueError: an amount no unit meets or more than there are, scores that are the same for all units
                ranked, a ranking that is not known, an unknown word.

        >>> builder.top(0.2)  # a fifth of the heads and a fifth of the channels  # doctest: +SKIP
        >>> builder.top(4, units="heads") | builder.top(200, units="channels")  # doctest: +SKIP
        """
        check_word("top", "units", units, get_args(Units))
        rank = by if by is not None else "diff" if self._own is None else "score"
        check_word("top", "by", rank, get_args(Rank))
        count = isinstance(amount, int | np.integer) and not isinstance(amount, bool)
        amount = int(amount) if count else _checked_share("top: amount", amount)
        if count and amount < 1:
            raise ValueError(f"top: amount is {amount}, expected a count of at least 1 or a share above 0")
        values = self._rank_values(rank, f"top({amount!r})")
        picked = []
        for what, group in self._groups(values, units, per_layer, apart):
            if count and amount > group.size:
                raise ValueError(f"top: amount is {amount} {what}, expected at most {group.size}, which is all")
            order = _descending(values, group)
            share_of = float(self._costs[group].sum())
            picked.append(order[: int(amount)] if count else self._prefix(order, amount * share_of, at_least=0))
        origin = {"top": amount, "by": rank, "units": units, "per_layer": per_layer, "apart": apart}
        return self._select("top", np.concatenate(picked), origin)

    def set_difference(
        self, safety: float, utility: float, *, units: Units = "all", per_layer: bool = True, apart: bool = True
    ) -> UnitSelection:
        """Select the top units for safety that are not among the top ones for utility (Wei et al. 2024,
        arXiv 2402.05162, there for single weights, matrix by matrix).

        Args:
            safety: share (or count) of the units with the highest zS.
            utility: share (or count) of the units with the highest zU to leave out.
            units, per_layer, apart: as in `top`.

        Raises:
            ValueError: as `top`, and where nothing is left.
        """
        where: dict[str, Any] = {"units": units, "per_layer": per_layer, "apart": apart}
        wanted, kept = self.top(safety, "safety", **where), self.top(utility, "utility", **where)
        amounts = {word: top.origin["selection"]["top"] for word, top in zip(SETS, (wanted, kept), strict=True)}
        origin = {"set_difference": amounts, **where}
        return self._select("set_difference", np.flatnonzero((wanted - kept).flat), origin)

    def _first_cu(self, wanted: float, share_of: ShareOf, rank: Rank) -> np.ndarray:
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

    def _groups(
        self, values: np.ndarray, units: Units, per_layer: bool, apart: bool
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(what they are, flat indices) of the units that compete with each other, out of those with scores."""
        heads, channels = np.arange(self._split), np.arange(self._split, self._size)
        kinds = {"heads": heads, "channels": channels}
        if units != "all":
            kinds = {units: kinds[units]}
        kinds = {what: index for what, index in kinds.items() if not np.isnan(values[index]).any()}
        if not kinds:
            raise ValueError(f"top: units is {units!r}, expected a kind of unit that {self._source!r} scores")
        if not apart and len(kinds) > 1:
            kinds = {"units": np.concatenate(list(kinds.values()))}
        for what, index in kinds.items():
            if index.size > 1 and (values[index] == values[index[0]]).all():
                raise ValueError(f"top: the scores of all {what} are the same, expected scores that rank them")
            if not per_layer:
                yield what, index
                continue
            layers = np.concatenate([np.indices(shape)[0].ravel() for shape in self._shapes])[index]
            for layer in range(self._shapes[0][0]):
                yield f"{what} of layer {layer}", index[layers == layer]

    def _select(self, operation: str, units: np.ndarray, origin: Mapping[str, Any]) -> UnitSelection:
        if not units.size:
            raise ValueError(
                f"{operation}: selects no unit ({_shown(origin)}), expected at least one; to freeze nothing, train "
                "without a plan"
            )
        flat = np.zeros(self._size, bool)
        flat[units] = True
        heads, channels = self._unflatten(flat)
        about: dict[str, Any] = {"selection": dict(origin)}
        if self.scores is not None:
            about |= {"recipe": self.recipe, "ratios": self.ratios, "scored": _fingerprints(self.scores)}
        if not isinstance(self._source, UnitLabels):
            about |= {"head_cost": self.head_cost, "method": self._source.method}
        return UnitSelection(heads, channels, self.layout, about, self.scores)

    # -- labelling -------------------------------------------------------------------------------------------

    def _label(self) -> UnitLabels:
        everything = np.arange(self._costs.size)
        total, diff = self._rank_values("sum"), self._rank_values("diff")
        codes = np.full(everything.size, _CU, np.uint8)
        codes[self._lowest(total, everything, self.ratios["RU"])] = _RU
        codes[self._prefix(_descending(diff, everything), self.ratios["SCU"] * self._costs.sum())] = _SCU
        codes[self._lowest(diff, np.flatnonzero(codes != _SCU), self.ratios["UCU"])] = _UCU
        heads, channels = self._unflatten(codes)
        return UnitLabels(torch.from_numpy(heads.copy()), torch.from_numpy(channels.copy()))

    @cached_property
    def _costs(self) -> np.ndarray:
        """Cost of each unit, flat: heads of all layers, then channels of all layers."""
        assert self.head_cost is not None
        return np.concatenate([np.full(self._split, self.head_cost), np.ones(self._size - self._split)])

    @cached_property
    def _z(self) -> tuple[np.ndarray, np.ndarray]:
        """zS and zU of each unit, flat float64."""
        assert self.scores is not None
        both = self._standardized(self.scores.safety), self._standardized(self.scores.utility)
        for word, z in zip(SETS, both, strict=True):
            if not z.any():
                raise ValueError(
                    f"MaskBuilder: the {word} scores of all units of a layer are the same, in every layer, expected "
                    f"scores that rank them; was the {word} set scored?"
                )
        return both

    def _standardized(self, scores: SetScores) -> np.ndarray:
        features = scores.head_features.numpy().astype(np.float64)
        if self.recipe == "ssah-prototype":
            features = features**2
        heads = _z_scores(features.reshape(len(features), -1)).reshape(features.shape).mean(2)
        return np.concatenate([heads.ravel(), _z_scores(scores.channels.numpy().astype(np.float64)).ravel()])

    @cached_property
    def _own(self) -> np.ndarray | None:
        """The method's own score of each unit, flat float64, NaN for kinds it does not score; or None."""
        ranking = self._source if isinstance(self._source, UnitRanking) else None
        if self.scores is not None and self.scores.ranking is not None:
            heads, channels = self.scores.ranking
            ranking = UnitRanking(self.scores.layout, heads.numpy(), channels.numpy(), self.scores.method)
        return None if ranking is None else ranking.flat

    @cached_property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        """``[n_layers, n_heads]``, ``[n_layers, d_ff]``."""
        return tuple((self.layout.unit_shapes if self.layout is not None else self.labels.shapes).values())

    @property
    def _split(self) -> int:
        """Where channels start among the flat units: the number of heads."""
        return int(np.prod(self._shapes[0]))

    @property
    def _size(self) -> int:
        """Number of units."""
        return self._split + int(np.prod(self._shapes[1]))

    def _unflatten(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        heads, channels = self._shapes
        return flat[: self._split].reshape(heads), flat[self._split :].reshape(channels)

    def _labelled(self, code: int) -> np.ndarray:
        """Units of one label, in order of index."""
        return np.flatnonzero(self.labels.flat == code)

    def _rank_values(self, rank: Rank, asked: str = "") -> np.ndarray:
        """What ranks each unit, flat float64; ``asked`` is the request it is for."""
        if isinstance(self._source, UnitLabels):
            raise ValueError(
                f"MaskBuilder: {asked} needs a ranking of units, but labels carry no scores; freeze whole "
                "labels (cu=True), or build from UnitScores"
            )
        if rank == "score":
            if self._own is None:
                raise ValueError(
                    f"MaskBuilder: {asked} by 'score', but {self._source.method!r} gives a safety and a utility "
                    "score, not one score per unit; expected 'diff', 'sum', 'safety' or 'utility'"
                )
            return self._own
        if isinstance(self._source, UnitRanking):
            raise ValueError(
                f"MaskBuilder: {asked} by {rank!r}, but a ranking holds one score per unit, expected by='score'"
            )
        safety, utility = self._z
        values: dict[Rank, np.ndarray] = {
            "sum": safety + utility, "diff": safety - utility, "safety": safety, "utility": utility,
        }  # fmt: skip
        return values[rank]

    def _ranked(self, code: int, rank: Rank, asked: str) -> np.ndarray:
        """Units of one label, highest first."""
        return _descending(self._rank_values(rank, asked), self._labelled(code))

    def _prefix(self, order: np.ndarray, target: float, at_least: int = 1) -> np.ndarray:
        """The start of ``order`` whose cost is nearest to ``target``: ``at_least`` so many units, none for 0."""
        if target <= 0 or not order.size:
            return order[:0]
        reached = np.concatenate([[0.0], np.cumsum(self._costs[order])])[at_least:]
        return order[: int(np.abs(reached - target).argmin()) + at_least]

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


def _fingerprints(scores: UnitScores) -> dict[str, str]:
    """Of the model and of both calibration sets, as far as they are known."""
    known = {"model": scores.model_fingerprint, **{word: getattr(scores, word).fingerprint for word in SETS}}
    return {word: fingerprint for word, fingerprint in known.items() if fingerprint}


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
    # 0.7 + 0.2 + 0.1 and its like may come out a rounding error over 1
    if sum(ratios.values()) > 1 + 1e-9:
        raise ValueError(f"MaskBuilder: ratios are {_shown(ratios)}, expected a sum of at most 1 (CU is the rest)")
    return ratios


def _checked_share(what: str, share: float) -> float:
    if isinstance(share, bool) or not isinstance(share, int | float | np.number) or not 0 <= share <= 1:
        raise ValueError(f"{what} is {share!r}, expected a fraction from 0 to 1")
    return float(share)


def _shown(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in fields.items())
