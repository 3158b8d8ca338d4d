"""Runs a function on several ranks: real processes, joined by gloo. Starting them is slow, so they are kept."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
import torch.distributed as dist

MOST: Final = 4
_PATIENCE: Final = 30.0  # seconds that a rank waits for another one

# One process for each rank: torch remembers which rank a process is in a mesh, beyond the life of its process group.
_pools: dict[str, list[ProcessPoolExecutor]] = {}


def run_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, pool: str = "", patience: float = 4 * _PATIENCE
) -> list[Any]:
    """``function(rank, *arguments)`` on each of ``world`` ranks; what they return, by rank. ``pool``: which processes;
    those that import what others should not see have a name. ``patience``: seconds until all must be done.

    Raises:
        AssertionError: with the traceback of the first rank that failed, if any did.
        BrokenProcessPool: a rank died.
    """
    processes = _pools.setdefault(pool, [])
    if not processes:
        processes.extend(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(MOST))
        for process in processes:
            atexit.register(process.shutdown, cancel_futures=True)
    with TemporaryDirectory() as folder:
        jobs = [
            process.submit(_rank, rank, world, str(Path(folder) / "store"), function, arguments)
            for rank, process in enumerate(processes[:world])
        ]
        try:
            found = [job.result(timeout=patience) for job in jobs]
        except BrokenProcessPool:
            processes.clear()
            raise
    errors = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(found) if text]
    assert not errors, "\n".join(errors)
    return [value for _, value in found]


def close(pool: str) -> None:
    """End these processes."""
    for process in _pools.pop(pool, []):
        process.shutdown(cancel_futures=True)


def _rank(rank: int, world: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=_PATIENCE)
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of views and of experimental parts
            return "", function(rank, *arguments)
    except Exception:
        return traceback.format_exc(), None
    finally:
        dist.destroy_process_group()
        gc.collect()  # each group of gloo's that something still holds has threads, which look for work all the time
