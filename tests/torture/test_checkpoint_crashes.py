"""Trainer runs killed while they save, and full disks: what was whole stays whole, what is torn cannot pass for whole.

``freeze_proof.json`` is what a checkpoint gets last, so a folder that has it must hold everything, and right.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_run
from safetensors.torch import load_file

import safefreeze_kernels as sf

FEW, MANY = 12, int(os.environ.get("SAFEFREEZE_KILLS", "1000"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


class Tells(trainer_run.TrainerCallback):  # type: ignore[misc]
    """Writes the number of every step whose save is over. After step ``room_after`` the disk is full."""

    def __init__(self, tell: int, room_after: int | None = None) -> None:
        self.tell, self.room_after = tell, room_after

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        os.write(self.tell, f"{state.global_step}\n".encode())
        if state.global_step == self.room_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def saving(folder: Path, tell: int, room_after: int | None = None) -> None:
    """Train and save after every step, for as long as one is let."""
    run = trainer_run.trainer(folder, save_strategy="steps", save_steps=1, max_steps=500, logging_steps=1000)
    run.add_callback(Tells(tell, room_after))
    run.train()


def whole(checkpoint: Path) -> bool:
    """Whether it has its proof; if so, everything in it is looked at."""
    if not (checkpoint / "freeze_proof.json").exists():
        return False
    proof, plan = json.loads((checkpoint / "freeze_proof.json").read_text()), trainer_run.plan()
    step = int(checkpoint.name.split("-")[1])
    assert proof["step"] == step and proof["plan"] == plan.fingerprint
    assert sf.FreezePlan.load(checkpoint / "freeze_plan.safetensors") == plan
    model = trainer_run.model(seed=9)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    assert [sf.snapshot(model, plan).digest] == proof["frozen_bytes_sha256"]
    assert [sf.snapshot(trainer_run.model(), plan).digest] == proof["frozen_bytes_sha256"], "frozen since the start"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert state and {float(entry["step"]) for entry in state.values()} == {float(step)}
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
    return True


def trial(folder: Path, seconds: float | None, room_after: int | None = None) -> dict[str, Any]:
    """One child; killed after so many seconds from its first save on."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        code = 0
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(quiet, stream)
            saving(folder, tell, room_after)
        except Exception:
            code = 42
        os._exit(code)
    os.close(tell)
    told = os.read(ready, 64)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    while more := os.read(ready, 4096):
        told += more
    status = os.waitpid(child, 0)[1]
    os.close(ready)
    saved = {int(number) for number in told.split()}
    found = {int(path.name.split("-")[1]): whole(path) for path in folder.glob("checkpoint-*")}
    assert saved and all(found.get(step) for step in saved), f"of the saved {sorted(saved)} these are whole: {found}"
    assert all(kept for step, kept in found.items() if step < max(found)), "a checkpoint before the last is torn"
    return {
        "killed": os.WIFSIGNALED(status), "code": os.waitstatus_to_exitcode(status), "whole": sum(found.values()),
        "torn": len(found) - sum(found.values()),
    }  # fmt: skip


def in_a_fresh_process(folder: Path, trials: int) -> dict[str, Any]:
    """pytest's process has threads, and a fork copies only one."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(folder), str(trials)], capture_output=True, text=True,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def many(folder: Path, trials: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    chance, found = random.Random(0), []
    for number in range(trials):
        found.append(trial(folder / str(number), chance.random() * 0.15))
        shutil.rmtree(folder / str(number))
    return {
        "killed": sum(one["killed"] for one in found), "whole": sum(one["whole"] for one in found),
        "torn": sum(one["torn"] for one in found), "full": trial(folder / "full", None, room_after=2),
    }  # fmt: skip


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_a_fresh_process(tmp_path_factory.mktemp("crashes"), FEW)


def test_killed_while_saving(few: dict[str, Any]) -> None:
    assert few["killed"] == FEW and few["whole"] >= FEW


def test_a_full_disk_is_an_error_and_leaves_what_was_saved(few: dict[str, Any]) -> None:
    assert few["full"]["code"] == 42 and few["full"]["whole"] == 2


@pytest.mark.slow
def test_killed_a_thousand_times_while_saving(tmp_path: Path) -> None:
    found = in_a_fresh_process(tmp_path, MANY)
    print(found)
    assert found["killed"] == MANY
    assert found["torn"] > 0, "no kill fell into a save: the test tests nothing"


if __name__ == "__main__":
    print(json.dumps(many(Path(sys.argv[1]), int(sys.argv[2]))))
