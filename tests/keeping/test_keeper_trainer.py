"""The keeper under Trainer: what it keeps, logs and saves; a resumed run is an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attribution_models import batch_of, refused
from conftest import assert_same_bits
from model_folders import png_size
from trainer_run import arguments, dataset, model, plan
from transformers import Trainer

import safefreeze_kernels as sf
from safefreeze_kernels.integrations.transformers import FreezeCallback, KeeperCallback, masked_adamw

pytestmark = pytest.mark.filterwarnings("ignore")

SAFETY = [batch_of([[1, 9, 8, 20, 21], [1, 5, 6, 7, 20], [1, 11, 20, 21]], [2, 1, 2])]


def trainer(folder: Path, freeze: sf.FreezePlan, **options: Any) -> tuple[Trainer, KeeperCallback]:
    keeping = KeeperCallback(SAFETY, every=2, share=0.3, picture=folder / "keeper.png", prove=True, grain="element")
    settings = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, **options}
    run = Trainer(
        model=model(), args=arguments(folder, **settings), train_dataset=dataset(),
        optimizer_cls_and_kwargs=masked_adamw(freeze, lr=1e-2, weight_decay=0.1),
        callbacks=[keeping, FreezeCallback(freeze, raw_norm=True)],
    )  # fmt: skip
    return run, keeping


def looks(keeping: KeeperCallback) -> list[Any]:
    assert keeping.keeper is not None
    return [(look.step, look.margin, look.frozen, look.modules) for look in keeping.keeper.log]


@pytest.mark.parametrize("freeze", [plan(), sf.FreezePlan()], ids=["base", "alone"])
def test_under_trainer(tmp_path: Path, freeze: sf.FreezePlan) -> None:
    """A look is due after optimizer steps, whatever accumulates; resumed within a window, a run is the same."""
    whole, keeping = trainer(tmp_path, freeze)
    whole.train()
    assert [look[0] for look in looks(keeping)] == [2, 4, 6, 8]
    logged = [entry for entry in whole.state.log_history if "keeper_margin" in entry]
    assert [(entry["step"], entry["keeper_margin"], entry["keeper_frozen"]) for entry in logged] == [
        look[:3] for look in looks(keeping)
    ]
    if freeze:  # norms are those of the training, not of a look
        assert all("raw_grad_norm" in entry for entry in whole.state.log_history if "loss" in entry)
    assert png_size(tmp_path / "keeper.png") == (900, 700)
    assert whole.optimizer.optimizer.plan == freeze and not whole.optimizer.optimizer._optimizer_step_post_hooks
    saved = sf.FreezePlan.load(tmp_path / "checkpoint-3" / "refusal_keeper.safetensors")
    assert freeze | saved == saved and saved.metadata["steps"] == 3 and saved.frozen_fraction > 0.2
    parts, resumed = trainer(tmp_path, freeze)
    parts.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert looks(resumed) == looks(keeping)
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert_same_bits(one, other, name)
    (tmp_path / "checkpoint-3" / "refusal_keeper.safetensors").unlink()
    lost, _ = trainer(tmp_path, freeze)
    refused(
        r"training resumes at step 3, but there is no '.*checkpoint-3/refusal_keeper.safetensors'",
        lambda: lost.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")),
    )


def test_it_needs_an_optimizer_that_freezes(tmp_path: Path) -> None:
    run = Trainer(model=model(), args=arguments(tmp_path), train_dataset=dataset(), callbacks=[KeeperCallback(SAFETY)])
    refused("which does not freeze; build it as MaskedAdamW", run.train, TypeError)
