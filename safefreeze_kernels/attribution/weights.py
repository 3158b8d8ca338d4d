"""How much every weight that trains matters: squared gradients, and plans of those that matter most, at any grain."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..plan.binding import bind, named_tensors
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .activations import evaluating
from .batches import Pass
from .collecting import Count, Partial, collect
from .files import read_tensors, stamped, write_tensors
from .grains import Grain, Grains, Within
from .saliency import Logits, Margin, WeightSquares, answer_loss
from .scores import check_fingerprint, check_weights, token_ids, weights_fingerprint
from .units import Shape, UnitLayout, check_word

#: What ranks weights: S, or S over U or T.
Form = Literal["S", "S/U", "S/T"]
#: The methods of `score_weights`.
WEIGHT_METHODS: Final = ("decision_fisher",)

_SETS: Final = ("safety", "utility", "task")
_OVER: Final[dict[Form, str]] = {"S/U": "utility", "S/T": "task"}
_FORMAT: Final = "safefreeze.weight_scores"
_FLOOR: Final = 0.001


@dataclass(frozen=True, repr=False, eq=False)
class SquaredGradients:
    """Sums of squared gradients on one calibration set.

    Args:
        values: name -> sums: float32 of the parameter's shape; of scores by rows float64 ``[lines]``, as `Grains` has
            them; on the CPU.
        mean: of what the gradients are of: the refusal margin of the safety set, the loss per response token of others.
        n_positions: margins or tokens the mean is over.
        fingerprint: sha256 over the set's rows in their order; "" = not known.
    """

    values: Mapping[str, Tensor]
    mean: float = 0.0
    n_positions: int = 0
    fingerprint: str = ""


@dataclass(frozen=True, repr=False, eq=False)
class WeightScores:
    """Squared gradients of every weight that trains: what plans of any grain are made from. See `score_weights`.

    Args:
        shapes: name -> shape of every parameter that trains, in the model's order; of a tied one, its first name.
        safety: S. utility: U. task: T; the latter two where there were such sets.
        grain: ``"element"``: a value for every weight, from which any grain can be chosen; ``"row"``: sums over rows
            (columns of what reads units), for rows and units.
        layout: where units lie, if the model's family is known.
        method, settings: as in `score_weights`.
        model_fingerprint: of the weights that were scored, see `check`; "" = not known.

    Raises:
        ValueError: values of other names or shapes, NaN, infinite, negative or all 0.

    >>> plan = scores.top(0.5, grain="row").build(model)  # doctest: +SKIP
    >>> control = scores.top(0.5, grain="row").random_like(seed=1).build(model)  # doctest: +SKIP
    """

    shapes: Mapping[str, Shape]
    safety: SquaredGradients
    utility: SquaredGradients | None = None
    task: SquaredGradients | None = None
    grain: Literal["element", "row"] = "element"
    layout: UnitLayout | None = None
    method: str = "decision_fisher"
    model_fingerprint: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_word("WeightScores", "grain", self.grain, ("element", "row"))
        grains = self.grains(self.grain)
        object.__setattr__(self, "shapes", grains.shapes)
        for word, one in self.sets.items():
            if set(one.values) != set(grains.shapes):
                odd = min(set(one.values) ^ set(grains.shapes))
                raise ValueError(f"WeightScores: {word} and shapes differ in {odd!r}, expected the same parameters")
            seen = False
            for name, values in one.values.items():
                expected = (grains.lines(name),) if self.grain == "row" else grains.shapes[name]
                if tuple(values.shape) != expected:
                    raise ValueError(
                        f"WeightScores: {word} of {name!r} has shape {tuple(values.shape)}, expected {expected}"
                    )
                low, high = (float(end) for end in values.aminmax())
                if not 0 <= low <= high < math.inf:  # NaN compares as neither
                    raise ValueError(
                        f"WeightScores: {word} of {name!r} holds values from {low} to {high}, expected finite ones "
                        "from 0 up"
                    )
                seen |= high > 0
            if not seen:
                raise ValueError(f"WeightScores: all values of {word} are 0, expected some that tell weights apart")

    @property
    def sets(self) -> dict[str, SquaredGradients]:
        """Those that were scored, by name."""
        return {word: found for word in _SETS if (found := getattr(self, word)) is not None}

    @property
    def total(self) -> int:
        """Weights."""
        return sum(map(math.prod, self.shapes.values()))

    def counted(self, word: str) -> str:
        """How much of a set was scored, in words."""
        return f"{self.sets[word].n_positions:,} {word} {'prompts' if word == 'safety' else 'tokens'}"

    def __repr__(self) -> str:
        over = ", ".join(map(self.counted, self.sets))
        by = "" if self.grain == "element" else " by rows"
        return f"WeightScores({self.total:,} weights of {len(self.shapes)} parameters{by}; {self.method} over {over})"

    # -- values ----------------------------------------------------------------------------------------------

    def form(self, form: Form = "S") -> Mapping[str, Tensor]:
        """What ranks single weights: name -> float32 of the parameter's shape, computed when it is asked for.

        ``"S"`` as it is; ``"S/U"`` and ``"S/T"`` divided by U or T plus 0.001 of its mean over all weights.

        Raises:
            ValueError: a form whose set was not scored, scores by rows.
        """
        below = self._below(form)
        if self.grain != "element":
            raise ValueError("WeightScores.form: these are scores by rows, expected score_weights(…, grain='element')")
        return self.safety.values if below is None else _Ratio(self.safety.values, below.values, self._floor(below))

    def means(self, form: Form = "S", grain: Grain = "row") -> np.ndarray:
        """What ranks rows or units: float64 per group of `Grains`, from the means of S, U and T over its weights.

        Raises:
            ValueError: a form whose set was not scored, grain ``"element"``, ``"unit"`` where no layout is known.
        """
        below, grains = self._below(form), self.grains(grain)

        def of(one: SquaredGradients) -> np.ndarray:
            sums = one.values
            if self.grain == "element":
                sums = {name: grains.reduce(name, values) for name, values in sums.items()}
            return grains.means(sums)

        return of(self.safety) if below is None else of(self.safety) / (of(below) + self._floor(below))

    def grains(self, grain: Grain) -> Grains:
        """The groups these weights are chosen in."""
        return Grains(self.shapes, grain, self.layout)

    def _below(self, form: Form) -> SquaredGradients | None:
        check_word("WeightScores", "form", form, get_args(Form))
        word = _OVER.get(form)
        found: SquaredGradients | None = None if word is None else getattr(self, word)
        if word is not None and found is None:
            raise ValueError(
                f"WeightScores: form is {form!r}, but there is no {word} set among {', '.join(self.sets)}; pass {word} "
                "to score_weights"
            )
        return found

    def _floor(self, below: SquaredGradients) -> float:
        return _FLOOR * sum(float(values.sum(dtype=torch.float64)) for values in below.values.values()) / self.total

    # -- selecting -------------------------------------------------------------------------------------------

    def top(
        self, share: float, *, grain: Grain | None = None, form: Form = "S", within: Within = "model"
    ) -> WeightSelection:
        """Select the weights that rank highest.

        Of single elements exactly ``round(share * all)``; equal ones in the order of parameters and places. Rows and
        units are taken by their mean per weight until the next would exceed the share; of equal ones the earlier.

        Args:
            share: of all weights that train; above 0, 1.0 is all.
            grain: ``"element"``, ``"row"`` or ``"unit"``, see `Grains`. Default: that of the scores.
            form: what ranks: ``"S"``, ``"S/U"`` or ``"S/T"``.
            within: rank all weights of the ``"model"`` together, or take the share of each ``"tensor"`` (of units: of
                each layer's heads, KV heads, channels).

        Raises:
            ValueError: a share, word or form that is not there, elements out of scores by rows.
        """
        return WeightSelection(self, share, self.grain if grain is None else grain, form, within)

    # -- the model and the file ------------------------------------------------------------------------------

    def check(self, model: torch.nn.Module) -> None:
        """Make sure that ``model`` has the weights these scores were made with, as `UnitScores.check` does.

        Raises:
            ValueError: another model.
        """
        masks = {name: FreezeMask(shape) for name, shape in self.shapes.items()}
        bound = bind(masks, named_tensors(model), operation="WeightScores.check", require_grad=False)
        weights = {entry.name: entry.param for entry in bound}
        check_fingerprint("WeightScores.check", self.model_fingerprint, weights)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; a crash leaves an older file as it was."""
        fields = {
            "method": self.method, "settings": json.dumps(dict(self.settings)), "grain": self.grain,
            "shapes": json.dumps(self.shapes), "layout": "" if self.layout is None else self.layout.to_json(),
            "model_fingerprint": self.model_fingerprint,
        }  # fmt: skip
        tensors: dict[str, Tensor] = {}
        for word, one in self.sets.items():
            fields[word] = json.dumps(
                {"mean": one.mean, "n_positions": one.n_positions, "fingerprint": one.fingerprint}
            )
            tensors |= {f"{word}:{name}": values for name, values in one.values.items()}
        write_tensors(path, tensors, stamped(_FORMAT, fields))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WeightScores:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: truncated, altered, of another version, or no file of weight scores.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"WeightScores.load: no file {os.fspath(path)!r}")
        try:
            header, tensors = read_tensors(path, _FORMAT)
            shapes = {name: tuple(shape) for name, shape in json.loads(header["shapes"]).items()}
            sets: dict[str, SquaredGradients] = {}
            for word in _SETS:
                if word in header:
                    values = {name: tensors.pop(f"{word}:{name}") for name in shapes}
                    sets[word] = SquaredGradients(values, **json.loads(header[word]))
            if tensors:
                raise ValueError(f"unexpected tensors {sorted(tensors)[:3]}")
            return cls(
                shapes, **sets, grain=header["grain"], method=header["method"],  # type: ignore[arg-type]
                layout=UnitLayout.from_json(header["layout"]) if header["layout"] else None,
                model_fingerprint=header["model_fingerprint"], settings=json.loads(header["settings"]),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"WeightScores.load: {os.fspath(path)!r} holds no weight scores that this package reads ({error}); "
                "write it anew with score_weights"
            ) from error


class _Ratio(Mapping[str, Tensor]):
    """``above / (below + floor)``, parameter by parameter, as they are asked for."""

    def __init__(self, above: Mapping[str, Tensor], below: Mapping[str, Tensor], floor: float) -> None:
        self._above, self._below, self._floor = above, below, floor

    def __getitem__(self, name: str) -> Tensor:
        least = self._below[name] + self._floor
        return torch.div(self._above[name], least, out=least)

    def __iter__(self) -> Iterator[str]:
        return iter(self._above)

    def __len__(self) -> int:
        return len(self._above)


@dataclass(frozen=True, repr=False, eq=False)
class WeightSelection:
    """Which weights are frozen: those that rank highest, or as many at random. Made by `WeightScores.top`.

    Args:
        scores: of the weights.
        share, grain, form, within: as in `WeightScores.top`.
        seed: at random instead; see `random_like`.
    """

    scores: WeightScores
    share: float
    grain: Grain
    form: Form = "S"
    within: Within = "model"
    seed: int | None = None

    def __post_init__(self) -> None:
        share = self.share
        if isinstance(share, bool) or not isinstance(share, float | np.floating) or not 0 < share <= 1:
            raise ValueError(
                f"top: share is {share!r}, expected a fraction of all {self.scores.total:,} weights, above 0 and at "
                "most 1.0, which is all there are"
            )
        check_word("top", "grain", self.grain, get_args(Grain))
        check_word("top", "within", self.within, get_args(Within))
        if self.grain == "element":
            self.scores.form(self.form)
        else:
            self.scores._below(self.form)
        if self.grain == "unit" and self.scores.layout is None:
            raise ValueError("top: grain is 'unit', but where units lie in this model is not known; take grain 'row'")

    def build(self, model: torch.nn.Module | None = None) -> FreezePlan:
        """The freeze plan of these weights.

        Args:
            model: if given, it must have the weights that were scored.

        Raises:
            ValueError: another model, a share that no group fits into, scores that are all 0 where they are ranked.
        """
        if model is not None:
            self.scores.check(model)
        scores, grains = self.scores, self.scores.grains(self.grain)
        values = scores.form(self.form) if self.grain == "element" else scores.means(self.form, self.grain)
        plan = grains.plan(values, self.share, within=self.within, seed=self.seed)
        if not plan:
            raise ValueError(
                f"top: a share of {self.share:g} of {scores.total:,} weights selects no {self.grain}, expected room "
                "for at least one; to freeze nothing, train without a plan"
            )
        selection = {"top": self.share, "grain": self.grain, "by": self.form, "within": self.within}
        known = {"model": scores.model_fingerprint} | {word: one.fingerprint for word, one in scores.sets.items()}
        about: dict[str, Any] = {"selection": selection} | ({} if self.seed is None else {"random_like": self.seed})
        about |= {"method": scores.method, "scored": {word: text for word, text in known.items() if text}}
        # what is not frozen is part of the picture too, and a plan does not name it
        return FreezePlan(plan, about | {"weights": [[name, list(shape)] for name, shape in scores.shapes.items()]})

    def random_like(self, seed: int) -> WeightSelection:
        """A control: as many rows or elements of the same tensors, at random (of units: of the same kind and layer; of
        vectors: as many of the same size)."""
        return replace(self, seed=int(seed))

    def __str__(self) -> str:
        what = f"highest {self.form}" if self.seed is None else f"random (seed {self.seed})"
        within = "" if self.within == "model" else " in each tensor"
        return f"{self.share:.1%} of {self.scores.total:,} weights by {self.grain}{within}, {what}"

    def __repr__(self) -> str:
        return f"WeightSelection({self})"


# ----------------------------------------------------------------------------------------------------- scoring


def score_weights(
    model: torch.nn.Module,
    safety: Iterable[Mapping[str, Tensor]],
    utility: Iterable[Mapping[str, Tensor]] | None = None,
    task: Iterable[Mapping[str, Tensor]] | None = None,
    *,
    method: str = "decision_fisher",
    grain: Grain = "element",
    refuse_token: int | Sequence[int] | None = None,
    rows_per_gradient: int = 4,
    resume: str | os.PathLike[str] | None = None,
    every: int = 16,
    progress: bool = False,
) -> WeightScores:
    """Score every weight of ``model`` that trains: embedding, norms and output head too, not heads and channels alone.

    ``"decision_fisher"``, as in `score_units`, whose sums over the weights of a unit are the sums of these:

        S = Σ over gradients of (∂ mean M/∂w)² on the safety set, M the log-odds of refusing where a row's first
        response token is chosen: z_refuse - logsumexp(other tokens). U and T the same of L, the mean cross-entropy of
        the response tokens, on the utility set and on the task that is to be learnt.

    Each gradient is of the mean over ``rows_per_gradient`` rows, not of one row, as the diagonal of a Fisher matrix
    would have it (1 gives that). Weights are ranked by S, by S / (U + 0.001 · mean U) or by S / (T + 0.001 · mean T);
    rows and units by the means of S, U and T over their weights.

    What is known to protect, in a miniature (a model of 288,000 parameters, 8 seeds, 4 gradients of 32 rows each;
    examples/study/results/LOOP.md): of the refusals that fine-tuning loses, half of all single weights by S, frozen
    throughout, kept 90% in 166 steps (82 with nothing frozen), 65% by S/T 84% in 132, as many at random 29%. A closed
    loop kept as much or more. On SmolLM2-135M (8 seeds) half of all rows by S kept .88 of refusals, .38 with nothing
    frozen.

    One forward and one backward pass per gradient. Gradients are added up parameter by parameter, as they appear, and
    dropped; so it takes the memory of a float32 copy of the weights for each set, and that of the largest gradient. By
    rows it takes next to none. The model runs in eval mode and is left as it was found. Squares of gradients below
    1e-22 are 0 in float32.

    Args:
        model: a causal language model; what has ``requires_grad=False`` is not scored.
        safety: prompts with refusals, in batches as `score_units` takes them.
        utility: what the model is to go on doing, likewise; for U.
        task: what it is to learn, likewise; for T.
        method: one of `WEIGHT_METHODS`.
        grain: ``"element"`` keeps a value for every weight. ``"row"`` (or ``"unit"``) keeps sums over rows, which make
            the same plans of rows and of units.
        refuse_token: the token or tokens a refusal begins with (their probabilities add). Default: the first response
            token of each safety row.
        rows_per_gradient: over how many rows a mean is taken. Rows are taken in their order, across batches; the last
            gradient may have fewer.
        resume, every, progress: as in `score_units`.

    Raises:
        ValueError: as `score_units`; a model in which nothing trains; gradients that are all 0.
        TypeError: a set that is a single batch, or a batch that is not a mapping.

    Warns:
        UserWarning: the mean margin is below 0: the model does not refuse these prompts. Parameters had no gradient.
    """
    with _in_the_name_of("score_weights"):
        check_word("score_units", "method", method, WEIGHT_METHODS)
        for word, number in (("rows_per_gradient", rows_per_gradient), ("every", every)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"score_units: {word} is {number!r}, expected a whole number of at least 1")
        grains = Grains.of(model, grain)
        named = dict(model.named_parameters())
        weights = {name: named[name] for name in grains.shapes}
        check_weights(weights)
        refuse, fingerprint = token_ids("refuse_token", refuse_token), weights_fingerprint(weights)
        settings = {"refuse_token": refuse, "rows_per_gradient": rows_per_gradient}
        kept: Literal["element", "row"] = "element" if grain == "element" else "row"
        about = {"method": method, "settings": json.dumps(settings), "grain": kept, "model": fingerprint}
        file = Partial(resume, every, about, None)
        sets: dict[str, SquaredGradients] = {}
        with torch.inference_mode(False), evaluating(model):
            for word, batches in zip(_SETS, (safety, utility, task), strict=True):
                if batches is not None:
                    value = Margin(refuse, None) if word == "safety" else answer_loss
                    sets[word] = _squares(model, grains, value, rows_per_gradient, batches, word, file, progress)
    layout = grains.layout if grains.layout is not None or grain != "element" else Grains.of(model, "row").layout
    scores = WeightScores(grains.shapes, **sets, grain=kept, layout=layout, method=method,
                          model_fingerprint=fingerprint, settings=settings)  # fmt: skip
    _warn(scores)
    file.remove()
    return scores


def _squares(
    model: torch.nn.Module, grains: Grains, value: Callable[[Pass, Logits], Tensor], rows: int,
    batches: Iterable[Mapping[str, Tensor]], word: str, file: Partial, progress: bool,
) -> SquaredGradients:  # fmt: skip
    collector = WeightSquares(model, grains, value, rows)
    count: Count = collect(collector, batches, word, file, progress)
    if count.passes == 0:
        raise ValueError(f"score_units: {word} holds no batches (an empty or used-up iterable), expected at least one")
    collector.check(word, count)
    values = {name: collector.totals[name].cpu() for name in grains.shapes}
    return SquaredGradients(values, collector.mean, count.positions, count.fingerprint)


def _warn(scores: WeightScores) -> None:
    """Of what makes scores mean little, in words that say what to do."""
    if scores.safety.mean < 0:
        warnings.warn(
            f"score_weights: the mean refusal margin on the safety set is {scores.safety.mean:.2f}, below 0: the model "
            "does not refuse these prompts, and there is little to keep; pass prompts with its own refusals of them",
            UserWarning, stacklevel=3,
        )  # fmt: skip
    still = [name for name, values in scores.safety.values.items() if not values.any()]
    if still:
        warnings.warn(
            f"score_weights: {len(still)} parameters have no gradient of the margin, {still[0]!r} first: they rank "
            "last; where they take no part in the model's output, call requires_grad_(False)",
            UserWarning, stacklevel=3,
        )  # fmt: skip


@contextmanager
def _in_the_name_of(operation: str) -> Iterator[None]:
    """Errors of what `score_units` does likewise name ``operation``."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if not str(error).startswith("score_units: "):
            raise
        raise type(error)(f"{operation}: {str(error).removeprefix('score_units: ')}") from error
