"""What GPU kernels move and issue, without a GPU: ``python -m benchmarks.traffic [--only PATTERN] [--output FILE]``.

Compilers' PTX is interpreted (tests/helpers/ptx.py) on cases that have a place in the notes. Counted of each

    sectors moved per sector needed    32-byte sectors that requests of warps touch; needed: the bytes of live elements
    instructions per live element      of PTX, without moves; lanes that idle in an issued instruction count

The command fails where a count is above its limit in `CASES`. A sector that two requests touch counts twice, though a
cache may hold it; what the assembler makes of an instruction is not known here: a division is one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from safefreeze_kernels.kernels.operands import SCALARS, AdamWOperands, adamw_scalars
from safefreeze_kernels.kernels.parts import compile_frozen, compile_live
from safefreeze_kernels.plan.mask import FreezeMask

from .sass import UnavailableError, older_triton

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SECTOR: Final = 32


def _rows(share: float) -> Callable[[tuple[int, ...]], FreezeMask]:
    return lambda shape: FreezeMask(shape, rows=np.flatnonzero(np.random.default_rng(1).random(shape[0]) < share))


def _columns(share: float) -> Callable[[tuple[int, ...]], FreezeMask]:
    return lambda shape: FreezeMask(shape, cols=np.flatnonzero(np.random.default_rng(1).random(shape[1]) < share))


def _elements(share: float) -> Callable[[tuple[int, ...]], FreezeMask]:
    return lambda shape: FreezeMask(shape, elements=torch.from_numpy(np.random.default_rng(1).random(shape) < share))


class Most(NamedTuple):
    """Limits of a case."""

    sectors: float  # per needed sector
    instructions: float  # per live element


@dataclass(frozen=True)
class Case:
    """One operation on some tensors. ``cuda``, ``triton``: what may be counted at most."""

    name: str
    cuda: Most
    triton: Most
    op: str = "step"
    shapes: tuple[tuple[int, ...], ...] = ((48, 4096),)
    mask: Callable[[tuple[int, ...]], FreezeMask] = FreezeMask
    dtype: torch.dtype = BF16
    state: torch.dtype = FP32
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """That a live element needs moved."""
        width = self.dtype.itemsize
        if self.op != "step":
            return width * {"norm": 1, "zero": 1}.get(self.op, 2)
        return 3 * width + 4 * self.state.itemsize + (4 if "remainder" in self.options else 0)


def _width(width: int, cuda: Most, triton: Most) -> Case:
    name = f"step, 80% of rows frozen, width {width}"
    return Case(name, cuda, triton, shapes=((245760 // width, width),), mask=_rows(0.8))


# What was counted when this was last looked at, rounded up: less is welcome, and should be written here.
CASES: Final = (
    Case("step, fp32", Most(1.02, 34), Most(1.02, 21), dtype=FP32),
    Case("step, bf16 + fp32 state", Most(1.03, 38), Most(1.38, 33)),
    Case("step, all bf16", Most(1.04, 37), Most(1.03, 46), state=BF16),
    Case("step, bf16 + remainder", Most(1.02, 53), Most(1.33, 40), options={"remainder": True}),
    Case("step, bf16, stochastic", Most(1.03, 74), Most(1.39, 48), options={"stochastic": True}),
    Case("step, fp16 + fp32 state", Most(1.03, 37), Most(1.38, 75), dtype=FP16),
    Case("step, fp32 + 8-bit state", Most(1.04, 127), Most(1.04, 106), dtype=FP32, state=torch.uint8),
    Case("step, bf16 + 8-bit state", Most(1.05, 131), Most(1.05, 109), state=torch.uint8),
    _width(4096, Most(1.03, 40), Most(1.39, 34)),
    _width(1024, Most(1.04, 43), Most(1.47, 42)),
    _width(576, Most(1.04, 46), Most(1.54, 71)),
    _width(256, Most(1.04, 43), Most(1.73, 130)),
    Case("step, 20% of columns frozen", Most(1.61, 115), Most(1.60, 51), mask=_columns(0.2)),
    Case("step, 10% of elements frozen", Most(1.25, 148), Most(1.28, 105), mask=_elements(0.1)),
    Case("step, half of elements frozen", Most(1.52, 188), Most(1.72, 189), mask=_elements(0.5)),
    Case("step, 300 small tensors", Most(1.18, 87), Most(1.85, 173), shapes=((256,),) * 300),
    Case("norm, fp32", Most(1.23, 19), Most(1.02, 9), "norm", dtype=FP32),
    Case("norm, bf16", Most(1.45, 17), Most(1.04, 10), "norm"),
    Case("scale, bf16", Most(1.29, 12), Most(1.02, 11), "scale"),
    Case("zero, 80% of rows frozen", Most(1.44, 7), Most(1.04, 2), "zero", mask=_rows(0.8)),
    Case("gather, 80% of rows frozen", Most(1.35, 12), Most(1.03, 2), "gather", mask=_rows(0.8)),
)


def count(backend: Any, case: Case) -> tuple[float, float, int]:
    """Sectors per needed sector, instructions per live element, and requests, of one call. ``backend``: of
    tests/helpers/ptx_backends.py."""
    masks = [case.mask(shape) for shape in case.shapes]
    frozen = case.op in ("zero", "gather")
    visited = sum(m.frozen_count if frozen else int(np.prod(m.shape)) - m.frozen_count for m in masks)
    work = compile_frozen(masks) if frozen else compile_live(masks)
    tensors = [torch.ones(mask.shape, dtype=case.dtype) for mask in masks]
    backend.counts.clear()
    if case.op == "step":
        _step(backend, work, masks, tensors, case)
    elif case.op == "norm":
        backend.norm(work, tensors, "sum_of_squares")
    elif case.op == "scale":
        backend.scale_(work, tensors, torch.tensor(0.5))
    elif case.op == "zero":
        backend.zero_(work, tensors)
    else:
        backend.gather(work, tensors, [torch.empty(n, dtype=case.dtype) for n in work.packed_sizes])
    found = [counts for name, counts in backend.counts.items() if not name.startswith("upload")]
    if not found:
        raise RuntimeError(f"traffic: {case.name}: no launch was interpreted")
    needed = visited * case.bytes / SECTOR
    sectors, instructions = sum(c.sectors for c in found), sum(c.instructions for c in found)
    return sectors / needed, instructions * 32 / visited, sum(c.requests for c in found)


def _step(backend: Any, work: Any, masks: list[FreezeMask], params: list[torch.Tensor], case: Case) -> None:
    first, second = ([torch.ones(mask.packed_shape, dtype=case.state) for mask in masks] for _ in range(2))
    remainders: Any = None
    if "remainder" in case.options:
        remainders = [torch.zeros(mask.packed_shape, dtype=torch.int16) for mask in masks]
    operands = AdamWOperands(params, first, second, None, remainders)
    operands.grads = [torch.ones_like(param) for param in params]  # type: ignore[assignment]
    rows = np.zeros(max(len(work.born), 1), SCALARS)
    rows[:] = adamw_scalars(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, step=1, decoupled=True)
    backend.adamw_(
        work, operands, rows, work.first_born.astype(np.int32), l2=False, amsgrad=False,
        stochastic="stochastic" in case.options,
    )  # fmt: skip


def backends() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names, and what makes each."""
    import ptx_backends

    yield "cuda", lambda: ptx_backends.PtxCuda(ptx_backends.cuda_ptx())
    yield "triton", ptx_backends.PtxTriton
    yield "triton-3.6.0", lambda: ptx_backends.PtxTriton(older_triton())


def judge(case: Case, backend: str, sectors: float, instructions: float) -> str:
    """What is above its limit; empty: nothing."""
    most = case.cuda if backend == "cuda" else case.triton
    wrong = [
        f"{value:.2f} {what}, expected at most {limit:.2f}"
        for value, limit, what in zip((sectors, instructions), most, ("sectors", "instructions"), strict=True)
        if value > limit
    ]
    return "; ".join(wrong)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic", description="What GPU kernels move and issue."
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="rows that match, as in '^cuda .*bf16'")
    parser.add_argument("--output", type=Path, help="a file for the table, beside the screen")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = [
        f"{'backend':<13} {'case':<38} {'requests':>9} {'sectors/needed':>15} {'instructions/element':>21}  verdict"
    ]
    failed = 0
    print(lines[0])
    for name, make in backends():
        chosen = [case for case in CASES if re.search(given.only, f"{name} {case.name}")]
        try:
            backend = make() if chosen else None
        except (UnavailableError, ImportError) as error:
            print(f"NOT LOOKED AT: {name}: {error}")
            failed += 1
            continue
        for case in chosen:
            sectors, instructions, requests = count(backend, case)
            wrong = judge(case, name, sectors, instructions)
            failed += bool(wrong)
            row = f"{name:<13} {case.name:<38} {requests:>9} {sectors:>15.3f} {instructions:>21.1f}"
            lines.append(f"{row}  {wrong or 'ok'}")
            print(lines[-1], flush=True)
        if backend is not None:
            backend.close()
    if given.output:
        given.output.write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
