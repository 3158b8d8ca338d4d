"""What a keeper refuses, by name, and when."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from attribution_models import batch_of, refused, tiny
from refusing import SAFETY, optimizer_of, refusing, train

import safefreeze_kernels as sf
from safefreeze_kernels.keeping import keeper as keeping

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every is 0, expected a whole number of at least 1"),
        ({"every": 2.0}, "every is 2.0"),
        ({"prompts": 0}, "prompts is 0"),
        ({"share": 0.0}, "share is 0.0, expected a fraction between 0 and 1"),
        ({"share": 1.0}, "share is 1.0"),
        ({"share": math.nan}, "share is nan"),
        ({"steer": 1.2}, "steer is 1.2"),
        ({"thawed": "old"}, "thawed is 'old', expected one of 'fresh', 'kept'"),
        ({"grain": "layer"}, "grain is 'layer'"),
        ({"keep": lambda model, batch: 1.0}, "keep returned float, expected a scalar tensor or one value per row"),
        ({"keep": lambda model, batch: model.lm_head.weight}, r"keep returned torch.float32 \(64, 32\)"),
        ({"keep": lambda model, batch: torch.tensor(math.nan)}, "the margin is nan at step 0"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    model = refusing()
    optimizer = optimizer_of(model)
    refused(words, lambda: sf.RefusalKeeper(model, optimizer, SAFETY, **options))
    assert optimizer.plan is None and not optimizer._optimizer_step_post_hooks


def test_bad_sets() -> None:
    model = refusing()
    optimizer = optimizer_of(model)

    def keep(batches: Any) -> sf.RefusalKeeper:
        return sf.RefusalKeeper(model, optimizer, batches)

    refused("safety_batches is one batch", lambda: keep(SAFETY[0]), TypeError)
    refused("safety_batches holds no batches", lambda: keep([]))
    refused("safety_batches has no response token in row 0", lambda: keep([batch_of([[1, 2, 3]], [0])]))
    refused("has no 'labels'", lambda: keep([{"input_ids": torch.tensor([[1, 2]])}]))
    model.config.max_position_embeddings = 5
    refused("a row of 6 tokens, expected at most 5", lambda: keep(SAFETY))
    model.config.max_position_embeddings = 6
    keep(SAFETY).remove()
    unaligned = tiny("llama")
    with pytest.warns(UserWarning, match=r"the margin is -\d+\.\d\d on average before training, below 0"):
        sf.RefusalKeeper(unaligned, optimizer_of(unaligned), SAFETY)


def test_bad_optimizers() -> None:
    model = refusing()
    refused(
        "optimizer is a AdamW, which does not freeze; build it as MaskedAdamW",
        lambda: sf.RefusalKeeper(model, torch.optim.AdamW(model.parameters()), SAFETY), TypeError,
    )  # fmt: skip
    refused(
        "optimizer has none of the 21 parameters of the model",
        lambda: sf.RefusalKeeper(model, optimizer_of(copy.deepcopy(model)), SAFETY),
    )
    refused(
        "parameters have no names, expected model.named_parameters()",
        lambda: sf.RefusalKeeper(model, sf.MaskedAdamW(model.parameters()), SAFETY),
    )
    refused("model is a dict", lambda: sf.RefusalKeeper({}, optimizer_of(model), SAFETY), TypeError)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (lambda model, batch: (model.lm_head.weight * 0).sum(), "the margin is flat: its gradient is 0"),
        (lambda model, batch: torch.tensor(1.0), "keep returned a value without a graph"),
        (
            lambda model, batch: (model.lm_head.weight * 0).sqrt().sum(),
            "values of 'lm_head.weight' are NaN or infinite",
        ),
    ],
)
def test_margins_that_tell_nothing(keep: Any, words: str) -> None:
    """Said by the step after which the look was due; what is frozen stays as it was."""
    model = refusing()
    optimizer = optimizer_of(model)
    values = [torch.tensor(1.0)]
    keeper = sf.RefusalKeeper(
        model, optimizer, SAFETY, every=2, keep=lambda *given: values.pop() if values else keep(*given)
    )
    train(model, optimizer, 1)
    refused(words, lambda: train(model, optimizer, 1))
    assert not keeper.plan and not keeper.log


def test_a_margin_that_diverges() -> None:
    model = refusing()
    optimizer = optimizer_of(model)
    sf.RefusalKeeper(model, optimizer, SAFETY, every=2)
    train(model, optimizer, 1)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    refused(
        "the margin is nan at step 2, expected a number; has training diverged?", lambda: train(model, optimizer, 1)
    )


def test_wrappers_are_seen_through() -> None:
    """accelerate's optimizer, DataParallel, `torch.compile`."""
    model = refusing()
    inner = optimizer_of(model)
    wrapped = type("Accelerated", (), {"optimizer": inner})()
    compiled = torch.compile(model, backend="eager")
    keeper = sf.RefusalKeeper(torch.nn.DataParallel(compiled), wrapped, SAFETY)
    assert keeper.model is model and keeper.optimizer is inner and keeping._bare_model(model) is model


def test_packed_gradients_are_refused_when_it_is_built() -> None:
    model = refusing()
    name = "model.layers.0.mlp.up_proj.weight"
    base = sf.FreezePlan({name: sf.FreezeMask(model.get_parameter(name).shape, rows=range(20))})
    optimizer = optimizer_of(model, freeze=base)
    with sf.live_gradients(model, base, storage="packed"), warnings.catch_warnings():
        refused("live_gradients", lambda: sf.RefusalKeeper(model, optimizer, SAFETY))
    with sf.live_gradients(model, base):
        keeper = sf.RefusalKeeper(model, optimizer, SAFETY, every=2)
        train(model, optimizer, 4)
    assert len(keeper.log) == 2
