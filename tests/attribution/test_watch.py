"""The drift watch: margins are those of the logits, in a plain loop and under Trainer; the floor stops training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_models import batch_of, refused
from model_folders import png_size
from torch import Tensor
from trainer_run import arguments, dataset, model, plan
from transformers import Trainer

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import refusal_margins
from safefreeze_kernels.integrations.transformers import FreezeCallback, RefusalCallback, masked_adamw

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = [[1, 9, 8, 7], [1, 5, 6], [1, 11, 12, 13, 14], [1, 3]]
REFUSAL = [20, 21]


def batches(side: str = "right") -> list[dict[str, Tensor]]:
    rows = [[*prompt, *REFUSAL] for prompt in PROMPTS]
    return [batch_of(rows[:2], [2, 2], side), batch_of(rows[2:], [2, 2], side)]


def by_hand(net: torch.nn.Module, token: int = 20) -> list[float]:
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            logits = net.eval()(input_ids=torch.tensor([prompt])).logits[0, -1].double()
        others = torch.cat([logits[:token], logits[token + 1 :]])
        found.append(float(logits[token] - others.logsumexp(0)))
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_margins_are_those_of_the_logits(side: str) -> None:
    net = model().train()
    found = refusal_margins(net, batches(side))
    assert net.training and found.dtype == torch.float32 and not found.requires_grad
    assert found.tolist() == pytest.approx(by_hand(net), rel=1e-4)
    assert refusal_margins(net, batches(), 30).tolist() == pytest.approx(by_hand(net, 30), rel=1e-4)
    both = refusal_margins(net, batches(), [20, 30]).tolist()
    assert all(two > max(pair) for two, *pair in zip(both, by_hand(net, 20), by_hand(net, 30), strict=True))


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    """Training away from the refusal: the margin falls, and under the floor it says stop."""
    net = model()
    watch = sf.RefusalWatch(batches(), every=2)
    optimizer = sf.MaskedAdamW(net.named_parameters(), lr=1e-2, freeze=plan())
    tokens = torch.tensor([[*prompt, 40, 41] for prompt in (PROMPTS[0], [1, 2, 3, 4])])
    assert watch.look(net, 0)
    for step in range(1, 9):
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert watch.look(net, step)
    assert [look.step for look in watch.history] == [0, 2, 4, 6, 8]
    assert watch.history[-1].margin == pytest.approx(sum(by_hand(net)) / 4, rel=1e-4)
    assert watch.history[-1].lowest == pytest.approx(min(by_hand(net)), rel=1e-4)
    assert watch.history[-1].margin < watch.history[0].margin and watch.history[0].refused == 0.0
    watch.floor = watch.history[-2].margin
    assert not watch.look(net, 9)
    watch.save_picture(tmp_path / "watch.png")
    assert png_size(tmp_path / "watch.png") == (800, 450)
    assert "4 prompts" in repr(watch)


def test_a_margin_that_is_no_number_is_below_any_floor() -> None:
    net = model()
    torch.nn.init.constant_(net.lm_head.weight, math.nan)
    assert not sf.RefusalWatch(batches(), floor=-1e9).look(net, 0)


@pytest.mark.parametrize("floor", [None, 1e9])
def test_under_trainer(tmp_path: Path, floor: float | None) -> None:
    watch = sf.RefusalWatch(batches(), every=3, floor=floor)
    run = Trainer(
        model=model(), args=arguments(tmp_path), train_dataset=dataset(),
        optimizer_cls_and_kwargs=masked_adamw(plan(), lr=1e-2),
        callbacks=[FreezeCallback(plan()), RefusalCallback(watch, tmp_path / "watch.png")],
    )  # fmt: skip
    run.train()
    steps = [0, 3, 6] if floor is None else [0]
    assert [look.step for look in watch.history] == steps
    assert run.state.global_step == (8 if floor is None else 1)
    logged = [entry for entry in run.state.log_history if "refusal_margin" in entry]
    assert [(entry["step"], entry["refusal_margin"]) for entry in logged] == [
        (look.step, look.margin) for look in watch.history
    ]
    assert png_size(tmp_path / "watch.png") == (800, 450)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((iter(batches()),), {}, TypeError, "batches is a list_iterator, expected a list"),
        (([],), {}, ValueError, "batches is empty"),
        ((batches(),), {"every": 0}, ValueError, "every is 0, expected at least 1 step"),
        ((batches(),), {"floor": math.nan}, ValueError, "floor is NaN"),
    ],
)
def test_bad_input(arguments: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    refused(words, lambda: sf.RefusalWatch(*arguments, **options), error)
    refused("nothing was measured yet", lambda: sf.RefusalWatch(batches()).save_picture("nowhere.png"))
    refused("batches holds none", lambda: refusal_margins(model(), []))
    refused("refuse_token is 99", lambda: refusal_margins(model(), batches(), 99))
