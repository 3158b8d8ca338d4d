"""Promises that are not ratios: exact state bytes, compiling a 7B plan, import time, host overhead."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.nn import Parameter

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import UnitLabels, find_units, read_labels
from safefreeze_kernels.kernels.parts import compile_live
from safefreeze_kernels.kernels.runs import Runs

__all__ = [
    "CLAIMS", "LABELS_FILE", "STATE", "Claim", "generated_labels", "llama_7b_shapes", "measure_claims", "state_claim",
]  # fmt: skip

#: Unit labels of Llama-2-7B-chat; where this file is absent a pattern of the same counts is generated.
LABELS_FILE: Final = Path(__file__).parents[2] / "shared" / "data" / "llama2-7b-chat-ssah-labels.safetensors"
STATE: Final = "state bytes off live share × dense"
_REPOSITORY: Final = Path(__file__).parents[1]

_LAYERS, _HIDDEN, _HEADS, _CHANNELS, _VOCABULARY = 32, 4096, 32, 11008, 32000
# Label code -> heads, channels (published counts of Llama-2-7B-chat), and mean length of a run of equal labels that,
# after shuffling, gives the published 1.35, 1.02 and 1.20 channels. What is left over is CU.
_PATTERN: Final = {0: (0, 52_504, 1.17), 1: (4, 4_583, 1.0), 2: (34, 46_855, 1.04)}
_CU: Final = 3


@dataclass(frozen=True)
class Claim:
    """A promise and what was found. ``target`` is the largest value that keeps it; None: for comparison only."""

    name: str
    value: float
    unit: str
    target: float | None
    detail: str = ""
    timed: bool = True  # whether a busy machine changes the value

    @property
    def kept(self) -> bool | None:
        """Whether the promise is kept; None where there is none."""
        return None if self.target is None else self.value <= self.target


def measure_claims(chosen: Callable[[str], Any], labels: Path = LABELS_FILE, tries: int = 7) -> list[Claim]:
    """Measure the `CLAIMS` whose name ``chosen`` accepts. State bytes come with the timed cases (`state_claim`)."""
    return [claim for name, measure in CLAIMS.items() if chosen(name) for claim in measure(labels, tries)]


def state_claim(held_and_expected: Mapping[str, tuple[int, int]]) -> Claim:
    """State is the live fraction of a dense state, to the byte, for every masked contender that ran."""
    wrong = [f"{who}: {held:,}, expected {want:,}" for who, (held, want) in held_and_expected.items() if held != want]
    detail = "; ".join(wrong) or f"largest of {len(held_and_expected)} optimizers; single elements keep their place"
    off = max((abs(held - want) for held, want in held_and_expected.values()), default=0)
    return Claim(STATE, off, "bytes", 0, detail, timed=False)


# ------------------------------------------------------------------------------------------------ the 7B plan


def llama_7b_shapes() -> dict[str, tuple[int, ...]]:
    """Name -> shape of the 291 parameters of Llama-2-7B."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for i in range(_LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (_HIDDEN, _HIDDEN) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj.weight": (_CHANNELS, _HIDDEN) for x in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (_HIDDEN, _CHANNELS)
        shapes |= {f"{layer}.{x}_layernorm.weight": (_HIDDEN,) for x in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (_HIDDEN,), "lm_head.weight": (_VOCABULARY, _HIDDEN)}


def generated_labels(seed: int = 0) -> UnitLabels:
    """As many units of every label as Llama-2-7B-chat has, scattered in runs of the same mean length."""
    draw = np.random.default_rng(seed)
    heads, runs, lengths = [], [], []
    for code, (n_heads, n_channels, mean_run) in _PATTERN.items():
        heads += [code] * n_heads
        n_runs = round(n_channels / mean_run)
        runs.append(np.full(n_runs, code, np.uint8))
        lengths.append(1 + np.bincount(draw.integers(n_runs, size=n_channels - n_runs), minlength=n_runs))
    rest = _LAYERS * _CHANNELS - sum(n_channels for _, n_channels, _ in _PATTERN.values())
    runs.append(np.full(rest, _CU, np.uint8))
    lengths.append(np.ones(rest, np.int64))
    order = draw.permutation(sum(map(len, runs)))
    channels = np.repeat(np.concatenate(runs)[order], np.concatenate(lengths)[order])
    heads += [_CU] * (_LAYERS * _HEADS - len(heads))
    return UnitLabels(
        torch.from_numpy(draw.permutation(np.array(heads, np.uint8)).reshape(_LAYERS, _HEADS)),
        torch.from_numpy(channels.reshape(_LAYERS, _CHANNELS)),
    )


def _plan_claims(labels_file: Path, tries: int) -> Iterator[Claim]:
    real = labels_file.is_file()
    labels = read_labels(labels_file) if real else generated_labels()
    shapes = llama_7b_shapes()
    layout = find_units(shapes, {"model_type": "llama", "num_attention_heads": _HEADS})
    plan = sf.MaskBuilder(labels).freeze(scu=True, cu=True).build(layout, preset="full")
    masks = [plan.get(name) or sf.FreezeMask(shape) for name, shape in shapes.items()]
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        Runs.of(compile_live(masks))
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work = Runs.of(compile_live(masks))
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    block = sum(mask.frozen_count for mask in plan.values()) / sum(mask.numel for mask in plan.values())
    detail = (
        f"{len(masks)} tensors, {sum(mask.numel for mask in masks) / 1e9:.2f} billion weights, {block:.1%} of the "
        f"blocks frozen, {'published' if real else 'generated'} labels, {len(work.runs):,} runs"
    )
    yield Claim("7B plan: compile time", statistics.median(seconds), "s", 1.0, f"median of {tries}; {detail}")
    yield Claim(
        "7B plan: peak memory", peak / 1e6, "MB", 64.0,
        f"tracemalloc peak while compiling, result included; {work.nbytes / 1e6:.1f} MB stay", timed=False,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- import, overhead

_IMPORT: Final = """
import time, torch
began = time.perf_counter()
import safefreeze_kernels
print(time.perf_counter() - began)
"""


def _import_claims(_labels_file: Path, tries: int) -> Iterator[Claim]:
    def once() -> float:
        found = subprocess.run(
            [sys.executable, "-c", _IMPORT], cwd=_REPOSITORY, capture_output=True, text=True, check=True
        )
        return 1e3 * float(found.stdout.split()[-1])

    once()  # compiles to bytecode, fills the page cache
    times = [once() for _ in range(tries)]
    yield Claim(
        "import, beyond import torch", statistics.median(times), "ms", 100.0,
        f"median of {tries} fresh processes, min {min(times):.0f} ms",
    )  # fmt: skip


def _overhead_claims(_labels_file: Path, tries: int) -> Iterator[Claim]:
    """Time of a step whose arithmetic is nothing: 300 tensors of 16 elements, a row of each frozen."""
    count, shape, calls = 300, (4, 4), 20 * tries
    named = [(f"layers.{i}.weight", Parameter(torch.ones(shape))) for i in range(count)]
    for _, p in named:
        p.grad = torch.ones(shape)
    plan = sf.FreezePlan({name: sf.FreezeMask(shape, rows=[i % 4]) for i, (name, _) in enumerate(named)})
    params = [p for _, p in named]
    for name, target, optimizer in (
        ("host overhead of step()", 0.2, sf.MaskedAdamW(named, lr=1e-3, freeze=plan)),
        ("torch fused, the same tensors", None, torch.optim.AdamW(params, lr=1e-3, fused=True)),
    ):
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            optimizer.step()
            times.append(1e3 * (time.perf_counter() - began))
        warm = times[calls // 4 :]
        yield Claim(
            name, statistics.median(warm), "ms", target,
            f"{count} tensors of {shape[0] * shape[1]} elements, median of {len(warm)} calls, min {min(warm):.3f} ms",
        )  # fmt: skip


CLAIMS: Final[dict[str, Callable[[Path, int], Iterator[Claim]]]] = {
    "7B plan": _plan_claims,
    "import": _import_claims,
    "host overhead": _overhead_claims,
}
