"""What ``safefreeze score``, ``build`` and ``inspect`` do with scores of every weight, and with plans from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from ..attribution import WeightScores
    from ..plan.plan import FreezePlan

    Batches = Iterable[Mapping[str, Tensor]]


def score_weights(
    network: Any, name: str, sets: Mapping[str, Batches], output: Path, resume: Path | None, **options: Any
) -> None:
    """Score every weight that trains, write the scores, and tell where they lie."""
    from ..attribution import score_weights as score
    from ..attribution.pictures import weight_table

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = score(
            network, sets["safety"], sets["utility"], sets.get("task"), resume=resume, progress=True, **options
        )
    scores.save(output)
    say(f"{name}: {scores!r}", _told(scores), weight_table(scores, f"{scores.method} scores: where do they lie?"))
    for warning in caught:
        say(str(warning.message), style="yellow")
    form = "" if scores.task is None else " --form S/T"
    say(f"Written to {output}. Next: safefreeze build {output} --top 0.5 --grain {scores.grain}{form}")


def build_weights(
    scores: WeightScores, skeleton: Any, top: float | None, random: int | None, **options: Any
) -> FreezePlan:
    """The plan of the weights that rank highest, told."""
    from ..attribution.pictures import complete_plan, module_table

    if top is None:
        raise ValueError("build: scores of weights need --top, expected a share of all weights, such as --top 0.5")
    selection = scores.top(top, **options)
    if random is not None:
        selection = selection.random_like(random)
    plan = selection.build(skeleton)
    say(
        module_table(complete_plan(plan, scores.shapes), f"frozen: {selection}", everything=True),
        _whole(plan),
    )
    return plan


def show_plan(plan: FreezePlan, name: str, facts: dict[str, Any], layers: bool) -> Callable[[], bytes]:
    """Tell what a plan of all weights freezes, and where that lies; returns what draws it."""
    from ..attribution.pictures import complete_plan, draw_plan, facts_table, module_table

    shapes = {parameter: tuple(shape) for parameter, shape in facts.pop("weights")}
    whole = complete_plan(plan, shapes)
    say(
        facts_table(facts, f"freeze plan {name}"),
        module_table(whole, "frozen of all weights: where do they lie?", everything=True),
        _whole(plan),
    )
    if layers:
        # the first line tells a fingerprint, which is not that of the plan where empty masks were added
        say(whole.summary().partition("\n")[2])
    return partial(draw_plan, whole, f"{name}: {whole.frozen_fraction:.1%} of all weights frozen", everything=True)


def show_scores(scores: WeightScores, name: str) -> Callable[[], bytes]:
    """Tell what scores are of, and where they lie; returns what draws them."""
    from ..attribution.pictures import draw_weights, facts_table, weight_table

    facts = {
        "method": scores.method, **scores.settings, "weights": f"{scores.total:,} in {len(scores.shapes)} parameters",
        "kept": "a value for each weight" if scores.grain == "element" else "sums over rows",
        "units": str(scores.layout or "not known"), "fingerprint of the model": scores.model_fingerprint,
        **{f"{word} set": f"{scores.counted(word)}, {one.fingerprint[:12]}" for word, one in scores.sets.items()},
    }  # fmt: skip
    say(facts_table(facts, f"weight scores {name}"), _told(scores), weight_table(scores, "where do they lie?"))
    return partial(draw_weights, scores, f"{name}: where S lies")


def _told(scores: WeightScores) -> str:
    """What the model does on the sets, by their means."""
    means = [f"mean refusal margin {scores.safety.mean:.2f} (above 0: it refuses)"]
    means += [f"mean loss on {word} {one.mean:.3f}" for word, one in scores.sets.items() if word != "safety"]
    return ", ".join(means)


def _whole(plan: FreezePlan) -> str:
    masks = plan.values()
    rows, cols = (sum(getattr(mask, f"frozen_{part}").size for mask in masks) for part in ("rows", "cols"))
    single = sum(int(mask.elements.sum()) if mask.elements is not None else 0 for mask in masks)
    whole = sum(mask.live_count == 0 for mask in masks)
    return f"{rows:,} rows, {cols:,} columns and {single:,} other elements; {whole} tensors are frozen whole."
