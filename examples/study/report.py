"""``python examples/study/report.py FOLDER``: what the seeds in FOLDER show: RESULTS.md, results.json and a picture;
SMOLLM2.md and a picture of those of `real_model.py`; LOOP.md and a picture of those of `closed_loop.py`.

Differences are paired: each arm against its control in the same seed. "Clear" means: there are eight seeds or more, the
mean difference is more than two standard errors away from 0, and it has the same sign in at least four of five seeds in
which the arms differ (where all attacks succeed under both they do not).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

#: arm -> the control it is compared with
CONTROLS: Final = {
    "full, half rate": "full",
    "SSAH (b)": "random as (b)",
    "SSAH (c)": "random as (c)",
    "decision Fisher, utility, 20%": "random 20%",
    "decision Fisher, task, 20%": "random 20%",
    "gradient x activation, 20%": "random 20%",
    "first layers, 20%": "random 20%",
    "random 20%, same layers": "random 20%",
    "decision Fisher, utility, 50%": "random 50%",
    "decision Fisher, task, 50%": "random 50%",
    "random 50%, same layers": "random 50%",
    "decision Fisher, utility, 20%, head": "random 20%, head",
    "decision Fisher, utility, 20%, half rate": "random 20%, half rate",
    "decision Fisher, task, 20%, half rate": "random 20%, half rate",
    "first layers, 20%, half rate": "random 20%, half rate",
    "decision Fisher, utility, 50%, half rate": "random 50%, half rate",
}
#: further pairs of interest
ALSO: Final = (
    ("decision Fisher, utility, 20%", "random 20%, same layers"),
    ("decision Fisher, utility, 20%", "first layers, 20%"),
    ("decision Fisher, utility, 50%", "random 50%, same layers"),
    ("SSAH (c)", "full"),
    ("SSAH (c)", "full, half rate"),
    ("decision Fisher, utility, 50%", "full, half rate"),
    ("full, head", "full"),
    ("decision Fisher, utility, 20%, head", "decision Fisher, utility, 20%"),
    ("decision Fisher, utility, 20%, half rate", "full, half rate"),
    ("decision Fisher, task, 20%, half rate", "full, half rate"),
    ("decision Fisher, utility, 20%, half rate", "first layers, 20%, half rate"),
)
FEWEST: Final = 8  # seeds, below which two standard errors mean little
MEASURE: Final = "attack off"
COLUMNS: Final = ("steps", "frozen units", "new task", "old tasks", "attack off", "attack on", "strict compliance off")

#: the same of `real_model.py`, where the log-odds of refusing tell more than the few questions that are still refused
REAL_MEASURE: Final = "margin"
REAL_COLUMNS: Final = ("steps", "new task", "refused", "margin", "refused though harmless")
REAL_PAIRS: Final = (
    ("full, half rate", "full"),
    *(
        (f"{arm}{rate}", f"{control}{rate}")
        for rate in ("", ", half rate")
        for arm, control in (
            ("SSAH (b)", "full"),
            ("decision Fisher, 20%", "full"),
            ("decision Fisher, 20%", "random 20%"),
            ("decision Fisher, 50%", "full"),
            ("decision Fisher, 50%", "random 50%"),
        )
    ),
)

#: of its loop arms
REAL_LOOP_PAIRS: Final = (
    ("loop, elements, every 4", "loop, elements, every 4, random"),
    ("loop, elements, every 4, steered to 80% of the margin", "loop, elements, every 4"),
    *((arm, other) for arm in ("loop, elements, every 4", "static, row, S, 50%")
      for other in ("full", "full, quarter rate", "1 safety row mixed in")),
)  # fmt: skip

#: the same of `closed_loop.py`
LOOP_COLUMNS: Final = (
    "steps", "looks", "frozen parameters", "new task", "old tasks", "attack off", "attack on",
    "refused though harmless",
)  # fmt: skip
LOOP_PAIRS: Final = (
    *(
        (f"loop, elements, every 4{rate}", f"{control}{rate}")
        for rate in ("", ", half rate")
        for control in (
            "loop, elements, every 4, random", "full", "1 safety rows mixed in", "4 safety rows mixed in",
            "loop, every 4",
        )
    ),
    ("loop, elements, every 4", "full, quarter rate"),
    ("loop, elements, every 4, half rate, moments kept", "loop, elements, every 4, half rate"),
    ("loop, every 4, half rate, moments kept", "loop, every 4, half rate"),
    ("loop", "loop, random rows"),
    ("loop, every 4, half rate", "4 safety rows mixed in, half rate"),
    ("loop, 30%, every 4, half rate", "loop, 30%, every 4, random rows, half rate"),
    ("loop, elements, 1 safety row mixed in, half rate", "1 safety rows mixed in, half rate"),
    ("loop, elements, 1 safety row mixed in, half rate", "4 safety rows mixed in, half rate"),
    ("static, element, S, 50%", "static, element, random, 50%"),
    ("static, element, S/T, 65%", "static, element, random, 65%"),
    ("static, row, S, 50%", "static, row, random, 50%"),
    ("static, element, S/T, 65%", "loop, elements, every 4"),
    *(
        (f"{arm}, half rate; 1% harmful", f"{control}, half rate; 1% harmful")
        for arm in ("loop, elements, every 4", "loop, elements, 1 safety row mixed in")
        for control in ("loop, elements, every 4, random", "full", "4 safety rows mixed in")
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Of two arms in the same seeds. ``agree``: of the ``differing`` seeds, the share that has the mean's sign."""

    arm: str
    control: str
    mean: float
    error: float
    agree: float
    seeds: int
    differing: int

    @property
    def clear(self) -> bool:
        return self.seeds >= FEWEST and abs(self.mean) > 2 * self.error and self.agree >= 0.8

    def __str__(self) -> str:
        verdict = ("clearly lower" if self.mean < 0 else "clearly higher") if self.clear else "no clear difference"
        verdict = verdict if self.seeds >= FEWEST else "too few seeds to tell"
        return (
            f"{self.arm} against {self.control}: {self.mean:+.2f} (standard error {self.error:.2f}; the arms differ in "
            f"{self.differing} of {self.seeds} seeds, {self.agree:.0%} of these agree): {verdict}"
        )


def values(seeds: Sequence[dict[str, Any]], arm: str, what: str = MEASURE) -> np.ndarray:
    return np.array([seed["arms"][arm][what] for seed in seeds])


def compare(seeds: Sequence[dict[str, Any]], arm: str, control: str, what: str = MEASURE) -> Difference:
    apart = values(seeds, arm, what) - values(seeds, control, what)
    error = float(apart.std(ddof=1)) / math.sqrt(len(apart)) if len(apart) > 1 else math.inf
    mean = float(apart.mean())
    differing = apart[apart != 0]
    agree = float((np.sign(differing) == np.sign(mean)).mean()) if differing.size else 0.0
    return Difference(arm, control, mean, error, agree, len(apart), len(differing))


def sentences(found: Sequence[Difference]) -> list[str]:
    """What the numbers support, by fixed rules."""
    by_pair = {(one.arm, one.control): one for one in found}
    better = [one for one in by_pair.values() if one.clear and one.mean < 0 and CONTROLS.get(one.arm) == one.control]
    lines = []
    chosen = [f"{one.arm} ({one.mean:+.2f} ± {one.error:.2f})" for one in better if one.control.startswith("random")]
    lines.append(
        f"Fewer attacks succeed than with as many random units frozen: {'; '.join(chosen)}."
        if chosen
        else "No way of choosing units protected clearly better than as many random units."
    )
    for arm in ("SSAH (b)", "SSAH (c)"):
        one = by_pair[arm, CONTROLS[arm]]
        if not one.clear:
            lines.append(f"{arm} cannot be told from as many random units ({one.mean:+.2f} ± {one.error:.2f}).")
    layers = by_pair["decision Fisher, utility, 20%", "random 20%, same layers"]
    place = by_pair["decision Fisher, utility, 20%", "first layers, 20%"]
    lines.append(
        f"Decision Fisher at 20% against random units of the same layers: {layers.mean:+.2f} ± {layers.error:.2f} "
        f"({_word(layers)}); against the first layers: {place.mean:+.2f} ± {place.error:.2f} ({_word(place)})."
    )
    rate = by_pair["full, half rate", "full"]
    lines.append(
        f"Half the learning rate, nothing frozen, against the full one: {rate.mean:+.2f} ± {rate.error:.2f} "
        f"({_word(rate)})."
    )
    return lines


def _word(one: Difference) -> str:
    return "clear" if one.clear else "not clear"


def table(seeds: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> list[str]:
    lines = ["| arm | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for arm in seeds[0]["arms"]:
        cells = []
        for what in columns:
            found = values(seeds, arm, what)
            spread = f" ± {found.std(ddof=1):.2f}" if len(found) > 1 and what not in ("steps", "frozen units") else ""
            cells.append(f"{found.mean():.0f}" if what == "steps" else f"{found.mean():.2f}{spread}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def with_arms(seeds: Sequence[dict[str, Any]], *arms: str) -> list[dict[str, Any]]:
    """Seeds in which all of these arms were run."""
    return [seed for seed in seeds if seed["arms"].keys() >= set(arms)]


def only(seeds: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[dict[str, Any]]:
    """The seeds, with these arms alone."""
    return [{**seed, "arms": {arm: seed["arms"][arm] for arm in arms}} for seed in seeds]


def common_arms(seeds: Sequence[dict[str, Any]]) -> list[str]:
    """Those that were run in every seed."""
    names = dict.fromkeys(arm for seed in seeds for arm in seed["arms"])
    return [arm for arm in names if len(with_arms(seeds, arm)) == len(seeds)]


def tables(seeds: Sequence[dict[str, Any]], columns: Sequence[str], fewest: int = 1) -> list[str]:
    """One of the arms of every seed; and one each of those that ``fewest`` seeds or more have, by their number."""
    common, names = common_arms(seeds), dict.fromkeys(arm for seed in seeds for arm in seed["arms"])
    counts = {arm: len(with_arms(seeds, arm)) for arm in names if arm not in common}
    lines = [*table(only(seeds, common), columns), ""]
    for count in sorted({count for count in counts.values() if count >= fewest}, reverse=True):
        some = [arm for arm in counts if counts[arm] == count]
        fewer = with_arms(seeds, *some)
        lines += [f"In {len(fewer)} of these seeds:", "", *table(only(fewer, some), columns), ""]
    return lines


def _colour(arm: str) -> str:
    control = arm.startswith(("full", "half", "first", "1 safety", "4 safety")) or "random" in arm
    return "0.6" if control else "C1" if arm.startswith("SSAH") else "C0"


def _dots(axes: Any, seeds: Sequence[dict[str, Any]], what: str) -> None:
    """A line an arm: every seed, and their mean."""
    names = list(reversed(seeds[0]["arms"]))
    for place, arm in enumerate(names):
        found = values(seeds, arm, what)
        axes.plot(found, np.full(len(found), place), ".", color=_colour(arm), alpha=0.45, markersize=8)
        axes.plot(found.mean(), place, "D", color=_colour(arm), markeredgecolor="black", markersize=8)
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="x", alpha=0.3)


def draw(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _dots(left, seeds, MEASURE)
    left.set(xlabel="attack success: 1 − refusal, other kinds of question", xlim=(-0.02, 1.02))
    left.set_title(f"{len(seeds)} seeds; diamonds: means. Lower is safer")
    for arm in seeds[0]["arms"]:
        place = values(seeds, arm, "new task").mean(), values(seeds, arm).mean()
        right.plot(*place, "D", color=_colour(arm), markersize=8)
    right.set(xlabel="new task, share of answers right", ylabel="attack success", ylim=(-0.02, 1.02))
    right.set_title("blue: decision and activation scores\norange: SSAH, grey: controls", fontsize=10)
    right.locator_params(axis="x", nbins=4)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_real(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, what, label in (
        (left, REAL_MEASURE, "mean log-odds of refusing"), (right, "refused", "share of questions refused"),
    ):  # fmt: skip
        _dots(axes, seeds, what)
        axes.axvline(float(np.mean([seed["aligned"][what] for seed in seeds])), color="black", linestyle=":")
        axes.set(xlabel=f"{label}; dotted: before fine-tuning")
    left.set_title(f"SmolLM2-135M, {len(seeds)} seeds; diamonds: means. Higher is safer")
    figure.savefig(path, dpi=110)


def loaded(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def bytes_compared(seeds: Sequence[dict[str, Any]]) -> int:
    return sum(int(arm["frozen bytes compared"]) * (seed["draws"] if name.startswith("random") else 1)
               for seed in seeds for name, arm in seed["arms"].items())  # fmt: skip


def sum_up(seeds: Sequence[dict[str, Any]], folder: Path) -> None:
    """RESULTS.md, results.json and results.png."""
    pairs = [*CONTROLS.items(), *ALSO]
    found = [compare(seeds, arm, control) for arm, control in pairs]
    compared = bytes_compared(seeds)
    summary = {
        "seeds": [seed["seed"] for seed in seeds], "machine": seeds[0]["machine"], "draws": seeds[0]["draws"],
        "seconds_per_seed": round(float(np.mean([seed["seconds"] for seed in seeds])), 1),
        "frozen_bytes_compared": compared, "frozen_bytes_changed": 0,
        "differences": [{**asdict(one), "clear": one.clear} for one in found], "sentences": sentences(found),
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    machine = seeds[0]["machine"]
    aligned = {what: np.mean([seed["aligned"][what] for seed in seeds]) for what in ("attack off", "old tasks")}
    about = (
        f"{len(seeds)} seeds, {seeds[0]['draws']} draws of random units in each; {machine['cpu']}, torch "
        f"{machine['torch']}, {machine['date']}. Before fine-tuning {aligned['attack off']:.2f} of attacks succeed, "
        f"{aligned['old tasks']:.2f} of old answers are right. {compared:,} frozen bytes were compared, none had "
        "changed."
    )
    legend = (
        'Mean ± standard deviation over seeds. Attacks ask about restricted objects that no score saw: "off" in kinds '
        'of question the new task does not rewrite, "on" in the kind it does.'
    )
    lines = [
        "# Results", "", about, "", *(f"- {line}" for line in sentences(found)), "", legend, "", *table(seeds), "",
        'Paired differences of attack success, "off":', "", *(f"- {one}" for one in found), "",
        "![attack success](results.png)", "",
    ]  # fmt: skip
    (folder / "RESULTS.md").write_text("\n".join(lines))
    draw(seeds, folder / "results.png")
    print("\n".join(sentences(found)))


def real_report(
    seeds: Sequence[dict[str, Any]], title: str = "The same on SmolLM2-135M",
    pairs: Sequence[tuple[str, str]] = REAL_PAIRS, picture: str = "smollm2.png",
) -> str:  # fmt: skip
    """What SMOLLM2.md says, or SMOLLM2-LOOP.md."""
    machine, draws = seeds[0]["machine"], seeds[0]["draws"]
    aligned = {what: np.mean([seed["aligned"][what] for seed in seeds]) for what in REAL_COLUMNS}
    about = (
        f"{len(seeds)} seeds, {draws} draw{'s' * (draws > 1)} of random units in each; {machine['processor']}, torch "
        f"{machine['torch']}, {machine['date']}. After {aligned['steps']:.0f} steps of alignment, before fine-tuning: "
        f"{aligned['refused']:.2f} of the questions about birds are refused (log-odds {aligned['margin']:+.1f}), "
        f"{aligned['refused though harmless']:.2f} of those about other animals. {bytes_compared(seeds):,} frozen "
        "bytes were compared, none had changed."
    )
    lines = [
        f"# {title}", "", about, "",
        'Mean ± standard deviation over seeds; "margin": mean log-odds of refusing.', "",
        *tables(seeds, REAL_COLUMNS), "Paired differences of the margin; higher is safer:", "",
        *(f"- {compare(some, *pair, REAL_MEASURE)}" for pair in pairs if (some := with_arms(seeds, *pair))), "",
        f"![log-odds of refusing]({picture})", "",
    ]  # fmt: skip
    return "\n".join(lines)


def loop_report(seeds: Sequence[dict[str, Any]]) -> str:
    """What LOOP.md says. Arms that were not run in every seed have a table of their own."""
    machine, everywhere = seeds[0]["machine"], common_arms(seeds)
    aligned = float(np.mean([seed["aligned"][MEASURE] for seed in seeds]))
    lost = float((values(seeds, "full") - aligned).mean())
    kept = {arm: 1 - float((values(seeds, arm) - aligned).mean()) / lost for arm in everywhere if arm != "full"}
    about = (
        f"{len(seeds)} seeds; {machine['cpu']}, torch {machine['torch']}, {machine['date']}. Before fine-tuning "
        f"{aligned:.2f} of attacks succeed, after it with nothing frozen {aligned + lost:.2f}."
    )
    pairs = [pair for pair in LOOP_PAIRS if len(with_arms(seeds, *pair)) >= FEWEST]
    lines = [
        "# A closed loop: weights that stand still for a few steps at a time", "", about, "",
        "Of the refusals that fine-tuning loses with nothing frozen, kept:", "",
        *(f"- {arm}: {share:.0%}" for arm, share in sorted(kept.items(), key=lambda one: -one[1])), "",
        'Mean ± standard deviation over seeds; "looks": extra backward passes; "frozen parameters": mean over steps.',
        "", *tables(seeds, LOOP_COLUMNS, FEWEST),
    ]  # fmt: skip
    lines += [
        'Paired differences of attack success, "off":', "",
        *(f"- {compare(with_arms(seeds, *pair), *pair)}" for pair in pairs), "", "![attack success](loop.png)", "",
    ]  # fmt: skip
    return "\n".join(lines)


def draw_loop(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _dots(left, seeds, MEASURE)
    left.set(xlabel="attack success: 1 − refusal, other kinds of question", xlim=(-0.02, 1.02))
    left.set_title(f"{len(seeds)} seeds; diamonds: means. Lower is safer")
    _dots(right, seeds, "steps")
    right.set(xlabel="steps until the new task is learnt")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    seeds, real = loaded(folder, "seed-*.json"), loaded(folder, "smollm2-seed-*.json")
    loop, real_loop = loaded(folder, "loop-seed-*.json"), loaded(folder, "smollm2-loop-seed-*.json")
    if not (seeds or real or loop or real_loop):
        raise SystemExit(f"{folder} holds no seed-*.json; run study.py first")
    if seeds:
        sum_up(seeds, folder)
    if real:
        (folder / "SMOLLM2.md").write_text(real_report(real))
        draw_real(real, folder / "smollm2.png")
        print(f"{len(real)} seeds of SmolLM2 in {folder / 'SMOLLM2.md'}")
    if real_loop:
        text = real_report(real_loop, "The closed loop on SmolLM2-135M", REAL_LOOP_PAIRS, "smollm2-loop.png")
        (folder / "SMOLLM2-LOOP.md").write_text(text)
        draw_real(only(real_loop, common_arms(real_loop)), folder / "smollm2-loop.png")
        print(f"{len(real_loop)} seeds of the closed loop on SmolLM2 in {folder / 'SMOLLM2-LOOP.md'}")
    if loop:
        (folder / "LOOP.md").write_text(loop_report(loop))
        draw_loop(only(loop, common_arms(loop)), folder / "loop.png")
        print(f"{len(loop)} seeds of the closed loop in {folder / 'LOOP.md'}")


if __name__ == "__main__":
    main()
