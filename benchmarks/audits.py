"""``python -m benchmarks.audits``: what `safefreeze verify` of two checkpoints costs, beside reading both files once.

Two versions of SmolLM2-135M, 80% of their units frozen, every live weight changed; from disk (dropped from the page
cache before every round) and from the page cache. Reading is one thread, 1 MB at a time. The whole command is timed
too, in a process of its own, with its peak memory. Every verdict is looked at. Writes results/audits-*.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import UnitSelection, find_units
from safefreeze_kernels.integrations.transformers import load_model
from safefreeze_kernels.measure.timing import in_turns, milliseconds
from safefreeze_kernels.proof import audit

from .measure import as_entry, at_least_one, describe_machine, print_entry, ratio_entry, save_result

FROZEN: Final = 0.8
DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}
# argv: base, tuned, plan. Prints the process's peak last.
COMMAND: Final = (
    "import sys\n"
    "from safefreeze_kernels.cli import app\n"
    "try:\n"
    "    app(['verify', *sys.argv[1:]])\n"
    "except SystemExit as end:\n"
    "    assert not end.code, end.code\n"
    "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
)


def _checkpoints(folder: Path, dtype: torch.dtype) -> tuple[Path, Path, Path]:
    """Base, tuned, and the plan they were trained under."""
    _, model, _ = load_model("smollm2", dtype)
    layout, draw = find_units(model), np.random.default_rng(0)
    heads, channels = (draw.random(shape) < FROZEN for shape in (layout.heads_shape, layout.channels_shape))
    plan = UnitSelection(heads, channels, layout).build(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = {
        name: torch.where(plan[name].dense(), p, p * 1.5 + 0.01) if name in plan else p * 1.5 + 0.01
        for name, p in before.items()
    }
    paths = folder / "base.safetensors", folder / "tuned.safetensors", folder / "plan.safetensors"
    save_file(before, paths[0])
    save_file(after, paths[1])
    plan.save(paths[2])
    return paths


def _read(*paths: Path) -> None:
    buffer = bytearray(1 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _drop(*paths: Path) -> None:
    """Out of the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _measure(base: Path, tuned: Path, plan_file: Path, rounds: int) -> dict[str, Any]:
    plan = sf.FreezePlan.load(plan_file)
    peaks: list[int] = []

    def compare() -> None:
        report = audit.compare(base, tuned, plan)
        assert report.ok and all(t.live_changed >= 0.99 * t.live for t in report.tensors)

    def verify() -> None:
        command = [sys.executable, "-c", COMMAND, base, tuned, plan_file]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "proven: no frozen byte differs" in done.stdout
        peaks.append(int(done.stdout.split()[-1]) << 10)

    def seconds(call: Callable[[], None], from_disk: bool) -> float:
        if from_disk:
            _drop(base, tuned)
        return milliseconds(call) / 1e3

    calls = {"read": partial(_read, base, tuned), "compare": compare, "verify": verify}
    found: dict[str, Any] = {"bytes": base.stat().st_size + tuned.stat().st_size}
    for place in ("disk", "page cache"):
        timed = {name: partial(seconds, call, place == "disk") for name, call in calls.items()}
        times = in_turns(timed, rounds, warmup=1)
        found[f"from {place}"] = {f"{name}_s": as_entry(values) for name, values in times.items()} | {
            f"{name} / read": ratio_entry(times[name], times["read"]) for name in ("compare", "verify")
        }
    return {**found, "verify_peak_bytes": max(peaks)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audits", description=__doc__)
    parser.add_argument("--rounds", type=at_least_one, default=11)
    parser.add_argument("--output", type=Path, help="folder for the results (default: results/)")
    given = parser.parse_args()
    found = {}
    for name, dtype in DTYPES.items():
        with TemporaryDirectory(dir=Path.cwd()) as folder:
            found[name] = _measure(*_checkpoints(Path(folder), dtype), given.rounds)
    for name, entries in found.items():
        size, peak = entries["bytes"] >> 20, entries["verify_peak_bytes"] >> 20
        print(f"{name}: {size} MB in two files; verify's peak {peak} MB")
        for place in ("from disk", "from page cache"):
            for what, entry in entries[place].items():
                print_entry(f"  {place:16} {what:16}", entry)
    report = {
        "date": time.strftime("%Y-%m-%d"), "rounds": given.rounds, "frozen_units": FROZEN, "checkpoints": found
    }  # fmt: skip
    save_result("audits", describe_machine(torch.get_num_threads()), report, given.output)


if __name__ == "__main__":
    main()
