"""``python -m benchmarks.integrations``: what a step costs under FSDP2, and what a resume takes in memory.

Two gloo processes with one thread each; `MaskedAdamW` with 7.5% of rows frozen, torch's fused AdamW and torch's
default one take a step in turns, in alternating order, on the same gradients. Beforehand a few masked steps are
compared with those of one process, bit for bit. Writes results/integrations-*.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import multiprocessing

import safefreeze_kernels as sf
from safefreeze_kernels.measure.memory import peak, restart_peak, state_tensors
from safefreeze_kernels.measure.timing import in_turns, milliseconds

from .measure import as_entry, at_least_one, describe_machine, print_entry, ratio_entry, save_result

RANKS: Final = 2
CASES: Final = {"24 tensors of 1024 x 1024": (24, 1024), "300 tensors of 16 x 16": (300, 16)}


def _model(n: int, width: int) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(n)))


def _plan(n: int, width: int, share: float = 0.075) -> sf.FreezePlan:
    rows = torch.randperm(width, generator=torch.Generator().manual_seed(1))[: max(round(share * width), 1)]
    return sf.FreezePlan({f"{i}.weight": sf.FreezeMask((width, width), rows=rows) for i in range(n)})


def _time_step(optimizer: torch.optim.Optimizer) -> float:
    dist.barrier()
    return milliseconds(optimizer.step)


def _rank(rank: int, store: str, rounds: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (RANKS,))
    found: dict[str, Any] = {}
    for case, (n, width) in CASES.items():
        models = [_model(n, width) for _ in range(4)]
        whole = models.pop()
        for model in models:
            fully_shard(model, mesh=mesh)
        for parameters in zip(whole.parameters(), *(model.parameters() for model in models), strict=True):
            parameters[0].grad = torch.randn(width, width)
            for p in parameters[1:]:
                p.grad = distribute_tensor(parameters[0].grad, mesh, p.placements)
        plan = _plan(n, width)
        optimizers = {
            "masked": sf.MaskedAdamW(models[0].named_parameters(), freeze=plan),
            "torch fused": torch.optim.AdamW(models[1].parameters(), fused=True),
            "torch": torch.optim.AdamW(models[2].parameters()),
        }
        reference = sf.MaskedAdamW(whole.named_parameters(), freeze=plan)
        for _ in range(3):
            for optimizer in (*optimizers.values(), reference):
                optimizer.step()
        for p, q in zip(models[0].parameters(), whole.parameters(), strict=True):
            if not torch.equal(p.full_tensor(), q):
                raise SystemExit(f"{case}: the sharded step differs from that of one process; nothing is timed")
        timed = {name: partial(_time_step, optimizer) for name, optimizer in optimizers.items()}
        times = in_turns(timed, rounds)
        found[case] = {name: as_entry(values) for name, values in times.items()} | {
            f"masked / {name}": ratio_entry(times["masked"], times[name]) for name in ("torch fused", "torch")
        }
    if rank == 0:
        Path(f"{store}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _resume(path: str) -> None:
    """In a process of its own: loads state saved by `_save_state`, prints peak and state in bytes."""
    model = _model(128, 1024)
    optimizer = sf.MaskedAdamW(model.named_parameters(), freeze=_plan(128, 1024))
    before = restart_peak(torch.device("cpu")) or 0
    optimizer.load_state_dict(torch.load(path, weights_only=True))
    state = sum(value.nbytes for value in state_tensors(optimizer))
    print(json.dumps({"peak_bytes": peak(torch.device("cpu")) - before, "state_bytes": state}))


def _save_state(path: str) -> None:
    model = _model(128, 1024)
    optimizer = sf.MaskedAdamW(model.named_parameters(), freeze=_plan(128, 1024))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.integrations", description=__doc__)
    parser.add_argument("--rounds", type=at_least_one, default=60)
    parser.add_argument("--output", type=Path, help="folder for the results (default: results/)")
    parser.add_argument("--resume", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--save", metavar="FILE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.resume or given.save:
        _resume(given.resume) if given.resume else _save_state(given.save)
        return
    with TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        multiprocessing.spawn(_rank, (store, given.rounds), nprocs=RANKS)
        found = json.loads(Path(f"{store}.json").read_text())
        state = str(Path(folder) / "state.pt")
        run = [sys.executable, "-m", "benchmarks.integrations"]
        subprocess.run([*run, "--save", state], check=True)
        resumed = subprocess.run([*run, "--resume", state], check=True, capture_output=True, text=True).stdout
    memory = json.loads(resumed.splitlines()[-1])
    for case, entries in found.items():
        print(case)
        for name, entry in entries.items():
            print_entry(f"  {name:22}", entry)
    share = memory["peak_bytes"] / memory["state_bytes"]
    print(f"resume: peak {share:.3f} of the state's {memory['state_bytes']:,} bytes")
    report = {
        "ranks": RANKS, "threads_per_rank": 1, "torch": torch.__version__, "rounds": given.rounds,
        "step_ms_under_fsdp2": found, "resume_of_134M_parameters": memory,
    }  # fmt: skip
    save_result("integrations", describe_machine(1), report, given.output)


if __name__ == "__main__":
    main()
