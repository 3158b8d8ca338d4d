"""What the contract is held on: a tensor for every kind of mask, every dtype, and bytes that arithmetic would move."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DTYPES, WIDE, bits, from_bits, pairs, real, replay, short
from torch import Tensor, nn

import safefreeze_kernels as sf

DTYPE_PAIRS = [(p, s) for p in DTYPES for s in (torch.float32, torch.bfloat16)]
WIDE_PAIRS = [(dtype, dtype) for dtype in WIDE]  # whose moments are like themselves
DOUBLE = (torch.float64, torch.complex128)


def named_pairs(dtypes: Iterable[tuple[torch.dtype, torch.dtype]]) -> list[Any]:
    return [pytest.param(p, s, id=f"{short(p)}-{short(s)}_state") for p, s in dtypes]


def stepping(backend: str, dtype: torch.dtype) -> str:
    """Who is asked for the step: compiled backends compute in float32 and leave float64 to the reference."""
    return "auto" if dtype in DOUBLE else backend


def handling(backend: str, dtype: torch.dtype) -> str:
    """Who is asked for everything else, in which complex numbers stay what they are."""
    return "auto" if dtype in WIDE else backend


def kept_in(state_dtype: torch.dtype) -> dict[str, torch.dtype]:
    return {} if state_dtype in WIDE else {"state_dtype": state_dtype}


def scattered(shape: tuple[int, ...], share: float, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape) < share)


MASKS: dict[str, sf.FreezeMask] = {
    "rows": sf.FreezeMask((37, 19), rows=[0, 3, 4, 11, 36]),
    "columns": sf.FreezeMask((23, 41), cols=[0, 7, 8, 40]),
    "most_columns": sf.FreezeMask((5, 60), cols=[c for c in range(60) if c not in (3, 30, 59)]),
    "rows_and_columns": sf.FreezeMask((29, 31), rows=[0, 1, 28], cols=[5, 6, 30]),
    "elements": sf.FreezeMask((17, 13), elements=scattered((17, 13), 0.3, 1)),
    "rows_columns_elements": sf.FreezeMask((19, 21), rows=[2, 18], cols=[0, 9], elements=scattered((19, 21), 0.2, 2)),
    "all": sf.FreezeMask((5, 7), rows=range(5)),
    "all_as_elements": sf.FreezeMask((4, 3), elements=torch.ones(4, 3, dtype=torch.bool)),
    "nothing": sf.FreezeMask((9, 11)),
    "vector_rows": sf.FreezeMask((53,), rows=[0, 2, 3, 52]),
    "vector_elements": sf.FreezeMask((43,), elements=scattered((43,), 0.4, 3)),
    "three_dimensions": sf.FreezeMask((3, 5, 7), rows=[0, 6, 14], cols=[2]),
    "four_dimensions": sf.FreezeMask((4, 3, 2, 5), rows=[1, 23], cols=[4], elements=scattered((4, 3, 2, 5), 0.2, 4)),
    "scalar": sf.FreezeMask((), rows=[0]),
    "empty": sf.FreezeMask((0, 4)),
    # more than one 1,024-element block of the compiled backends per row
    "wide": sf.FreezeMask((3, 2500), rows=[1], cols=range(0, 2500, 3)),
    "wide_elements": sf.FreezeMask((2, 1500), elements=scattered((2, 1500), 0.5, 5)),
}
PLAN = sf.FreezePlan(MASKS)
NOT_IN_PLAN = {"beside_the_plan": (12, 6), "live_scalar": ()}

# Bytes that arithmetic would not leave alone: -0.0, quiet and signalling NaNs with payloads, denormals, infinities, the
# largest value.
SPECIAL = {
    torch.float32: (
        0x80000000, 0x7FC00001, 0x7F800001, 0xFFC12345, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7F7FFFFF,
    ),
    torch.bfloat16: (0x8000, 0x7FC1, 0x7F81, 0xFFE5, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7F7F),
    torch.float16: (0x8000, 0x7E01, 0x7C01, 0xFE25, 0x0001, 0x83FF, 0x7C00, 0xFC00, 0x7BFF),
    torch.float64: (
        0x8 << 60, 0x7FF8 << 48 | 1, 0x7FF << 52 | 1, 0xFFF8123456789ABC, 1, 0x800FFFFFFFFFFFFF, 0x7FF << 52,
        0xFFF << 52, 0x7FEFFFFFFFFFFFFF,
    ),
}  # fmt: skip
SPECIAL |= {torch.complex64: SPECIAL[torch.float32], torch.complex128: SPECIAL[torch.float64]}


class Zoo(nn.Module):
    """A parameter for every kind of mask, special bytes where it is frozen, and parameters no plan names."""

    def __init__(self, dtype: torch.dtype, *, special: bool = True) -> None:
        super().__init__()
        draw = replay(7)
        for name, shape in {**{name: mask.shape for name, mask in MASKS.items()}, **NOT_IN_PLAN}.items():
            values = draw(shape, dtype)
            if special and name in MASKS:
                plant(values, MASKS[name], SPECIAL[dtype])
            self.register_parameter(name, nn.Parameter(values))


def plant(values: Tensor, mask: sf.FreezeMask, patterns: Iterable[int]) -> None:
    """Write ``patterns``, over and over, to the frozen elements."""
    frozen = pairs(mask.dense(), values)
    values = real(values)
    palette = torch.stack([from_bits(pattern, values.dtype) for pattern in patterns])
    as_bits, palette = bits(values), bits(palette)
    as_bits[frozen] = palette.repeat(int(frozen.sum()) // len(palette) + 1)[: int(frozen.sum())]
    values.copy_(as_bits.view(values.dtype))
    assert torch.equal(bits(values), as_bits)  # a copy keeps bytes; if not, every test below would be void


def frozen_flags(name: str, shape: tuple[int, ...]) -> Tensor:
    return MASKS[name].dense() if name in MASKS else torch.zeros(shape, dtype=torch.bool)


def poisoned(grad: Tensor, frozen: Tensor) -> Tensor:
    """``grad`` with NaN, infinities and the largest value where frozen."""
    values = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(grad.dtype).max], dtype=grad.dtype)
    poison = values[torch.arange(grad.numel()) % 4].reshape(grad.shape)
    return torch.where(frozen, poison, grad)


def dense_state(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Full-size moments by parameter name and by the short names above."""
    state = optimizer.dense_state_dict()["state"]
    letters = {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "x"}
    return {
        name: {letter: state[i][key] for key, letter in letters.items() if key in state[i]}
        for i, name in enumerate(names)
        if i in state
    }
