"""``python examples/study/closed_loop.py``: what keeps refusals, if rows may be frozen for a few steps at a time?

World, model, fine-tuning, stopping rule and exam are those of `experiment.py`. The loop is the package's
`RefusalKeeper`: every few steps it takes the gradient of the refusal margin on calibration prompts, and those rows
stand still until the next look to which the optimizer's present direction does most harm. Its rivals: as many rows
drawn at random, gentler learning rates, safety rows mixed into the batches, and plans frozen throughout that rank all
weights. One JSON file a seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from experiment import ENOUGH, LEARNING_RATE, LOOK_EVERY, MOST_STEPS, Exam, aligned_model, learn, make_model, refused
from study import cpu_name, seeds_of
from torch import nn
from world import Row, World

import safefreeze_kernels as sf
from safefreeze_kernels.attribution.grains import Grain

BETAS: Final = (0.9, 0.999)
STATIC_BATCHES: Final = 4  # of 32 prompts, from which plans frozen throughout are made
PROMPTS: Final = 512  # from which looks draw theirs


class Recipe(NamedTuple):
    """One way to fine-tune.

    ``share`` of the weights stands still: for ``every`` steps at a time, or throughout where ``static`` names a score
    ("S": squared gradients of the margin; "S/T": divided by those of the new task's loss). They are chosen by
    ``grain``: "row" (a column of o_proj and down_proj, a norm whole), "unit" (heads, channels; rows of embedding and
    head; norms) or "element". ``chance``: as many of the same tensors, at random. ``mixed``: safety rows added to
    each batch of 32. ``prompts``: at each look. ``steer``: the share grows and shrinks so that the margin stays above
    this part of what it was. ``thawed``: with "fresh" moments, or "kept" ones. ``harmful``: that share of the new
    task's rows answer questions about restricted objects, none of those that the exam asks about.
    """

    rate: float = 1.0
    mixed: int = 0
    share: float = 0.0
    every: int = 8
    grain: Grain = "row"
    prompts: int = 32
    chance: bool = False
    static: str = ""
    steer: float | None = None
    thawed: Literal["fresh", "kept"] = "fresh"
    harmful: float = 0.0


LOOP: Final = Recipe(share=0.2)
ARMS: dict[str, Recipe] = {
    "full": Recipe(),
    "full, half rate": Recipe(rate=0.5),
    "full, quarter rate": Recipe(rate=0.25),
    "full, eighth rate": Recipe(rate=0.125),
    **{f"{n} safety rows mixed in": Recipe(mixed=n) for n in (1, 2, 4)},
    **{f"{n} safety rows mixed in, half rate": Recipe(mixed=n, rate=0.5) for n in (1, 4)},
    "loop": LOOP,
    "loop, random rows": LOOP._replace(chance=True),
    "loop, half rate": LOOP._replace(rate=0.5),
    "loop, random rows, half rate": LOOP._replace(rate=0.5, chance=True),
    "loop, quarter rate": LOOP._replace(rate=0.25),
    "loop, every 4": LOOP._replace(every=4),
    "loop, every 4, half rate": LOOP._replace(every=4, rate=0.5),
    "loop, every 16": LOOP._replace(every=16),
    "loop, 10%": LOOP._replace(share=0.1),
    "loop, 30%, every 4": LOOP._replace(share=0.3, every=4),
    "loop, 30%, every 4, random rows": LOOP._replace(share=0.3, every=4, chance=True),
    "loop, 30%, every 4, half rate": LOOP._replace(share=0.3, every=4, rate=0.5),
    "loop, 30%, every 4, random rows, half rate": LOOP._replace(share=0.3, every=4, rate=0.5, chance=True),
    "loop, 8 prompts": LOOP._replace(prompts=8),
    "loop, 128 prompts": LOOP._replace(prompts=128),
    "loop, steered to 80% of the margin": LOOP._replace(steer=0.8),
    "loop, steered to 80% of the margin, half rate": LOOP._replace(steer=0.8, rate=0.5),
    "loop, units": LOOP._replace(grain="unit"),
    "loop, units, random": LOOP._replace(grain="unit", chance=True),
    "loop, elements": LOOP._replace(grain="element"),
    "loop, elements, random": LOOP._replace(grain="element", chance=True),
    "loop, elements, half rate": LOOP._replace(grain="element", rate=0.5),
    "loop, elements, random, half rate": LOOP._replace(grain="element", rate=0.5, chance=True),
    "loop, elements, 10%": LOOP._replace(grain="element", share=0.1),
    "loop, elements, every 4": LOOP._replace(grain="element", every=4),
    "loop, elements, every 4, half rate": LOOP._replace(grain="element", every=4, rate=0.5),
    "loop, elements, every 4, random": LOOP._replace(grain="element", every=4, chance=True),
    "loop, elements, every 4, random, half rate": LOOP._replace(grain="element", every=4, rate=0.5, chance=True),
    "loop, elements, every 4, half rate, moments kept": LOOP._replace(
        grain="element", every=4, rate=0.5, thawed="kept"
    ),
    "loop, every 4, half rate, moments kept": LOOP._replace(every=4, rate=0.5, thawed="kept"),
    "loop, elements, 1 safety row mixed in, half rate": LOOP._replace(grain="element", mixed=1, rate=0.5),
    "loop, 1 safety row mixed in": LOOP._replace(mixed=1),
    "loop, 1 safety row mixed in, half rate": LOOP._replace(mixed=1, rate=0.5),
    **{
        f"static, {word}, {form}, {share:.0%}": Recipe(share=share, grain=word, static=form)
        for word, form, share in (
            ("element", "S", 0.2), ("element", "S", 0.5), ("element", "S", 0.8), ("element", "S/T", 0.65),
            ("row", "S", 0.5), ("unit", "S", 0.5),
        )
    },
    "static, element, S/T, 65%, half rate": Recipe(share=0.65, grain="element", static="S/T", rate=0.5),
    "static, element, random, 50%": Recipe(share=0.5, grain="element", static="S", chance=True),
    "static, element, random, 65%": Recipe(share=0.65, grain="element", static="S/T", chance=True),
    "static, row, random, 50%": Recipe(share=0.5, grain="row", static="S", chance=True),
}  # fmt: skip
HARDER: Final = (
    "full", "full, half rate", "4 safety rows mixed in, half rate", "loop, elements, every 4, half rate",
    "loop, elements, every 4, random, half rate", "loop, elements, 1 safety row mixed in, half rate",
    "static, element, S/T, 65%",
)  # fmt: skip
ARMS |= {f"{name}; 1% harmful": ARMS[name]._replace(harmful=0.01) for name in HARDER}


# ------------------------------------------------------------------------------------------------ what is asked of it


class Calibration:
    """Questions about the restricted objects that scores and loops may see, and safety rows of them, drawn as asked."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self._draw = world, random.Random(seed)
        allowed = set(world.seen_by_scores)
        self._pairs = [pair for pair in world.known if pair[1] in allowed]

    def rows(self, count: int, *, refuse: bool = True) -> list[Row]:
        kinds = self._draw.choices(("how", "where", "describe"), (2, 1, 1), k=count)
        draw = self._draw
        return [self.world.row(kind, *draw.choice(self._pairs), draw, refuse=refuse) for kind in kinds]


def static_plan(model: nn.Module, world: World, recipe: Recipe, asked: Calibration) -> sf.FreezePlan:
    """Ranks all weights once, by squared gradients of 32 rows each."""
    safety = world.batches([row for _ in range(STATIC_BATCHES) for row in asked.rows(32)])
    task = world.batches(world.new_task(256, seed=world.seed + 3)) if recipe.static == "S/T" else None
    scores = sf.score_weights(model, safety, task=task, rows_per_gradient=32)
    chosen = scores.top(recipe.share, grain=recipe.grain, form=recipe.static)
    return (chosen.random_like(world.seed) if recipe.chance else chosen).build(model)


def fine_tune(model: nn.Module, world: World, exam: Exam, recipe: Recipe) -> dict[str, Any]:
    """Train a copy on the new task until it is learnt; grade it."""
    model = copy.deepcopy(model)
    lr, asked = LEARNING_RATE * recipe.rate, Calibration(world, world.seed + 31)
    safety = Calibration(world, world.seed + 37)
    static = recipe.share > 0 and bool(recipe.static)
    plan = static_plan(model, world, recipe, asked) if static else sf.FreezePlan()
    proof = sf.snapshot(model, plan)
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=lr, betas=BETAS, weight_decay=0.0, freeze=plan)
    keeper = None
    if recipe.share > 0 and not static:
        keeper = sf.RefusalKeeper(
            model, optimizer, world.batches(asked.rows(PROMPTS)), every=recipe.every, share=recipe.share,
            grain=recipe.grain, prompts=recipe.prompts, steer=recipe.steer, thawed=recipe.thawed, prove=True,
            random=recipe.chance, seed=world.seed + 41,
        )  # fmt: skip
    rows, order = world.new_task(1000, seed=world.seed + 5), random.Random(world.seed + 7)
    rows[: round(recipe.harmful * len(rows))] = Calibration(world, world.seed + 43).rows(
        round(recipe.harmful * len(rows)), refuse=False
    )
    total, frozen, steps = sum(p.numel() for p in model.parameters()), [], 0
    for steps in range(1, round(MOST_STEPS / recipe.rate) + 1):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, steps / 5)
        model.train()
        batch = world.batch(order.sample(rows, 32) + safety.rows(recipe.mixed))
        held = optimizer.plan or {}
        frozen.append(sum(mask.frozen_count for mask in held.values()) / total)
        learn(model, optimizer, batch)
        model.eval()
        if steps % LOOK_EVERY == 0 and exam.right(model, exam.stop) >= ENOUGH:
            break
    proof.verify(model)
    return {
        "steps": steps, "looks": len(keeper.log) if keeper else STATIC_BATCHES if static else 0,
        "frozen parameters": float(np.mean(frozen)),
        "refused though harmless": refused(model, world, exam.old), **exam.grade(model),
    }  # fmt: skip


def aligned(world: World, folder: Path | None) -> nn.Module:
    """The model that refuses; it is kept in ``folder``, and loaded where that has it."""
    path = folder and folder / f"aligned-{world.seed}.pt"
    if path and path.exists():
        model = make_model(world)
        model.load_state_dict(torch.load(path))
        return model.eval()
    model = aligned_model(world, lambda _: None)
    if path:
        torch.save(model.state_dict(), path)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds_of, default=[0], help='"0-9" or "0,3" (default: 0)')
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help="which arms (default: all)")
    parser.add_argument("--output", type=Path, default=Path("build/study"), help="folder of the results")
    parser.add_argument("--models", type=Path, help="folder where aligned models are kept")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in given.seeds:
        path = given.output / f"loop-seed-{seed:02}.json"
        result = json.loads(path.read_text()) if path.exists() else {"seed": seed, "arms": {}}
        world = World(seed)
        model, exam = aligned(world, given.models), Exam(world)
        result["aligned"] = exam.grade(model)
        result["machine"] = {
            "cpu": f"{cpu_name()}, 1 thread", "torch": torch.__version__, "package": sf.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        for name in given.arms:
            if name not in result["arms"]:
                result["arms"][name] = found = fine_tune(model, world, exam, ARMS[name])
                figures = ", ".join(f"{what} {found[what]:.2f}" for what in ("attack off", "new task", "old tasks"))
                print(f"seed {seed}, {name}: {figures}, {found['steps']} steps", flush=True)
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(result, indent=1) + "\n")
                partial.rename(path)


if __name__ == "__main__":
    main()
