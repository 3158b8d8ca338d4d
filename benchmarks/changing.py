"""``python -m benchmarks.changing``: what it costs that a plan changes every few steps, and what a keeper does.

SmolLM2-135M in float32. At every change a fifth of the rows, or of the single elements, is drawn anew. What a change
takes is `set_freeze`, and what the step after it takes longer than the next one, since lists are made there. That next
step is timed beside the step of an optimizer that was built under the same plan. ``--keeper``: four training steps of
32 rows, the last of which a `RefusalKeeper` looks after, beside four without one. Writes results/changing-*.json.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, get_args

import numpy as np
import torch
from torch.nn import Parameter

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import encode_pairs
from safefreeze_kernels.attribution.grains import Grain
from safefreeze_kernels.calibration import load_pairs
from safefreeze_kernels.integrations.transformers import PACKAGED, load_model
from safefreeze_kernels.measure.timing import in_turns, milliseconds

from .measure import as_entry, case_options, print_case, ratio_entry, save_cases

SHARE: Final = 0.2
EVERY, ROWS = 4, 32  # steps of a window; rows of a batch, and prompts of a look
Params = Mapping[str, Parameter]


def rows_plan(params: Params, draw: np.random.Generator) -> sf.FreezePlan:
    """A fifth of the rows of every parameter."""
    return sf.FreezePlan({name: sf.FreezeMask(p.shape, rows=draw.random(len(p)) < SHARE) for name, p in params.items()})


def elements_plan(params: Params, draw: np.random.Generator) -> sf.FreezePlan:
    """A fifth of the elements of every parameter."""
    return sf.FreezePlan(
        {
            name: sf.FreezeMask(p.shape, elements=draw.random(p.shape, dtype=np.float32) < SHARE)
            for name, p in params.items()
        }
    )


PLANS: Final[Mapping[str, Callable[[Params, np.random.Generator], sf.FreezePlan]]] = {
    "rows": rows_plan, "elements": elements_plan,
}  # fmt: skip


def copies(params: Params) -> dict[str, Parameter]:
    """Parameters of their own, with the same gradients."""
    found = {name: Parameter(p.detach().clone()) for name, p in params.items()}
    for name, p in found.items():
        p.grad = params[name].grad
    return found


def measure(params: Params, kind: str, keep_state: bool, rounds: int) -> dict[str, Any]:
    """Times of one kind of plan, in one mode of `set_freeze`."""
    draw, plans = np.random.default_rng(0), PLANS[kind]
    changing = sf.MaskedAdamW(copies(params).items(), lr=1e-4)
    changing.step()
    times: dict[str, list[float]] = {name: [] for name in ("set_freeze", "first step", "step", "step, never changed")}
    for number in range(-1, rounds):
        plan = plans(params, draw)
        still = sf.MaskedAdamW(copies(params).items(), lr=1e-4, freeze=plan)
        if keep_state:
            still.set_freeze(plan, keep_state=True)
        still.step()
        calls = {
            "set_freeze": lambda plan=plan: changing.set_freeze(plan, keep_state=keep_state),
            "first step": changing.step, "step": changing.step, "step, never changed": still.step,
        }  # fmt: skip
        for name, call in calls.items():
            spent = milliseconds(call)
            if number >= 0:
                times[name].append(spent)
    step = times["step, never changed"]
    change = [a + b - c for a, b, c in zip(times["set_freeze"], times["first step"], times["step"], strict=True)]
    found: dict[str, Any] = {f"{name}, ms": as_entry(values) for name, values in times.items()}
    found["change / step"] = ratio_entry(change, step)
    found["step after / step, never changed"] = ratio_entry(times["step"], step)
    return found


def measure_keeper(grain: Grain, rounds: int) -> dict[str, Any]:
    """Seconds of windows of `EVERY` training steps, with a keeper and without; and of its looks."""
    models: dict[str, Any] = {}
    for word in ("keeper", "none"):
        _, models[word], tokenizer = load_model(PACKAGED)
    (batch,) = encode_pairs(tokenizer, load_pairs("instructions")[:ROWS], max_length=256, batch_size=ROWS)
    safety = encode_pairs(tokenizer, load_pairs("safety"), max_length=256, batch_size=ROWS)
    optimizers = {word: sf.MaskedAdamW(model.named_parameters(), lr=1e-5) for word, model in models.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # so small a model refuses little
        keeper = sf.RefusalKeeper(
            models["keeper"], optimizers["keeper"], safety, every=EVERY, grain=grain, prompts=ROWS
        )

    def window(word: str) -> float:
        def train() -> None:
            for _ in range(EVERY):
                models[word](**batch, use_cache=False).loss.backward()
                sf.clip_grad_norm_(models[word], 1.0, optimizer=optimizers[word])
                optimizers[word].step()
                optimizers[word].zero_grad()

        return milliseconds(train) / 1e3

    times = in_turns({word: partial(window, word) for word in models}, rounds, warmup=1)
    looks = [look.seconds for look in keeper.log]
    return {
        **{f"window, {word}, s": as_entry(values) for word, values in times.items()}, "look, s": as_entry(looks[1:]),
        "with keeper / without": ratio_entry(times["keeper"], times["none"]),
    }  # fmt: skip


def main() -> None:
    parser = case_options("changing", __doc__, 7)
    parser.add_argument(
        "--keeper", choices=get_args(Grain), nargs="+", default=[], help="measure a keeper of this grain"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cases = {}
    for grain in given.keeper:
        name = f"keeper, {grain}"
        cases[name] = measure_keeper(grain, given.rounds)
        print_case(name, cases[name])
    if given.keeper:
        save_cases("keeper", cases, given)
        return
    _, model, _ = load_model(PACKAGED)
    params = dict(model.named_parameters())
    draw = torch.Generator().manual_seed(0)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=draw)
    for kind in PLANS:
        for mode in ("packed", "kept"):
            name = f"{kind}, state {mode}"
            cases[name] = measure(params, kind, mode == "kept", given.rounds)
            print_case(name, cases[name])
    save_cases("changing", cases, given)


if __name__ == "__main__":
    main()
