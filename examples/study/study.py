"""``python examples/study/study.py``: does freezing units keep a small model refusing? See README.md.

One JSON file a seed, written when the seed is done; seeds whose file is there are not run again. `report.py` sums up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from experiment import DRAWS, run_seed
from tqdm import tqdm

import safefreeze_kernels as sf


def seeds_of(text: str) -> list[int]:
    """ "0-9" or "0,3,5"."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seeds_of, default=[0], help='"0-9" or "0,3" (default: 0)')
    parser.add_argument("--draws", type=int, default=DRAWS, help=f"draws of random units (default: {DRAWS})")
    parser.add_argument("--output", type=Path, default=Path("build/study"), help="folder of the results")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # so small a model gains nothing from more
    for seed in given.seeds:
        path = given.output / f"seed-{seed:02}.json"
        if path.exists():
            print(f"{path} is there already")
            continue
        with tqdm(total=28, desc=f"seed {seed}", unit="stage") as bar:

            def tell(what: str, bar: tqdm = bar) -> None:
                bar.update()
                bar.set_postfix_str(what)

            result = run_seed(seed, given.draws, tell)
        result["machine"] = {
            "cpu": f"{cpu_name()}, 1 thread", "torch": torch.__version__, "package": sf.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.rename(path)


if __name__ == "__main__":
    main()
