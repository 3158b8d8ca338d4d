"""Comparing packed copies of frozen elements, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..kernels.parts import compile_frozen
from ..plan.mask import FreezeMask

INTEGER_OF_WIDTH: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FrozenDriftError(AssertionError):
    """Frozen weights are not the bytes they were."""


def raise_on_drift(
    operation: str,
    names: Sequence[str],
    masks: Sequence[FreezeMask],
    then: Sequence[Tensor],
    now: Sequence[Tensor],
    remedy: str = "",
    held: Sequence[list[np.ndarray] | None] | None = None,
) -> None:
    """Compare packed copies of frozen elements; raise `FrozenDriftError` naming the first that differs.

    ``masks``: of the tensors, whole; ``held``: which part of each was copied (`sharding.held`), None: all.
    """
    for name, mask, part, old, new in zip(names, masks, held or [None] * len(masks), then, now, strict=True):
        differs = (_words(old) != _words(new)).any(dim=1)
        if not differs.any():
            continue
        place = int(differs.nonzero()[0])
        row, col = _coordinates(mask.shard(part), place)
        if part is not None:
            row, col = (int(index[at]) for index, at in zip(mask.matrix_index(part), (row, col), strict=True))
        where = f"row {row}" if len(mask.shape) < 2 else f"row {row}, column {col}"
        raise FrozenDriftError(
            f"{operation}: frozen {name!r} moved at {where}: was {_shown(old, place)}, is {_shown(new, place)} "
            f"({int(differs.sum()):,} of {differs.numel():,} frozen elements differ)"
            + (f"; {remedy}" if remedy else "")
        )


def _coordinates(mask: FreezeMask, place: int) -> tuple[int, int]:
    """(row, column) of an element of the packed copy."""
    n_cols = mask.matrix_shape[1]
    for part in compile_frozen([mask]).parts:
        rows = np.arange(part.shape[0]) if part.rows is None else part.rows
        cols = np.arange(n_cols) if part.cols is None else part.cols
        flags = part.frozen_flags() if part.frozen_bits is not None else None
        count = int(flags.sum()) if flags is not None else rows.size * cols.size
        if place < part.packed_start + count:
            inside = place - part.packed_start
            if flags is not None:
                inside = int(np.flatnonzero(flags.reshape(-1))[inside])
            return int(rows[inside // cols.size]), int(cols[inside % cols.size])
    raise IndexError(place)


def _words(packed: Tensor) -> Tensor:
    """The bytes of each element: one integer, or two of a complex number. [elements, words]."""
    parts = torch.view_as_real(packed) if packed.is_complex() else packed[:, None]
    return parts.view(INTEGER_OF_WIDTH[parts.element_size()])


def _shown(packed: Tensor, place: int) -> str:
    words = _words(packed)
    width = words.element_size()
    bits = "".join(f"{word & ((1 << 8 * width) - 1):0{2 * width}x}" for word in words[place].tolist())
    number = packed.is_floating_point() or packed.is_complex()
    return f"{packed[place].item()!r} (0x{bits})" if number else f"0x{bits}"
