"""The specification: every operation in eager torch. Slow, exact, meant to be read.

Twin of csrc/arithmetic.h. Results equal the compiled backends' bit for bit because every line below is one IEEE
float32 operation per operator, rounded to nearest (norms are sums and agree to rounding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import AdamWOperands, NormKind, Part, WorkList


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, v_max: Tensor | None, s: Any, *, l2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One element-wise Adam(W) update in float32: new ``p, m, v, v_max``. ``s`` is a row of `kernels.SCALARS`."""
    g = g * s.grad_multiplier
    if l2:
        g = g + s.weight_decay * p
    m = s.beta1 * m + s.one_minus_beta1 * g
    v = s.beta2 * v + s.one_minus_beta2 * (g * g)
    second_moment = v
    if v_max is not None:
        second_moment = v_max = torch.maximum(v_max, v)
    p = s.decay * p - s.step_size * m / (_square_root(second_moment) / v.new_tensor(s.bias2_sqrt) + s.eps)
    return p, m, v, v_max


def _square_root(x: Tensor) -> Tensor:
    # torch's vectorised CPU sqrt is up to one unit off; a double's root rounded to float32 is the correctly rounded one
    return x.double().sqrt().float()


class ReferenceBackend:
    name = "reference"

    def adamw_(
        self, work: WorkList, operands: AdamWOperands, scalars: np.ndarray, scalar_set: np.ndarray,
        *, l2: bool, amsgrad: bool,
    ) -> None:  # fmt: skip
        rows = scalars.view(np.recarray)
        for part, which in zip(work.parts, scalar_set, strict=True):
            grad = operands.grads[part.tensor]
            if grad is None:
                continue
            param = operands.params[part.tensor]
            here, there = _places(part, param.device)
            state = [operands.exp_avgs[part.tensor], operands.exp_avg_sqs[part.tensor]]
            if amsgrad:
                assert operands.max_exp_avg_sqs is not None
                state.append(operands.max_exp_avg_sqs[part.tensor])
            old_p, old_g = _matrix(param, part)[here], _matrix(grad, part)[here]
            old_state = [_packed_matrix(tensor, part)[there] for tensor in state]
            moments = [tensor.float() for tensor in old_state]
            scalar = _Scalars(rows[which])
            p, *new_state = adamw(
                old_p.float(), old_g.float(), moments[0], moments[1], moments[2] if amsgrad else None, scalar, l2=l2
            )
            new_p = p.to(param.dtype)
            live = _chosen_flags(part, work, param.device)
            if live is not None:
                new_p = torch.where(live, new_p, old_p)
                new_state = [
                    None if new is None else torch.where(live, new.to(old.dtype), old)
                    for new, old in zip(new_state[: len(old_state)], old_state, strict=True)
                ]
            _matrix(param, part)[here] = new_p
            for tensor, new in zip(state, new_state, strict=False):
                assert new is not None
                _packed_matrix(tensor, part)[there] = new.to(tensor.dtype)

    def norm(self, work: WorkList, tensors: Sequence[Tensor | None], kind: NormKind) -> float:
        total = 0.0
        for _, chosen in _visited(work, tensors):
            values = chosen.double().abs()
            if kind == "largest_absolute":
                largest = values.max().item() if values.numel() else 0.0
                total = largest if largest > total or largest != largest else total
            else:
                total += (values * values if kind == "sum_of_squares" else values).sum().item()
        return total

    def scale_(self, work: WorkList, tensors: Sequence[Tensor | None], factor: float) -> None:
        factor = float(np.float32(factor))
        self._map(work, tensors, lambda values: (values.float() * factor).to(values.dtype))

    def zero_(self, work: WorkList, tensors: Sequence[Tensor | None]) -> None:
        self._map(work, tensors, torch.zeros_like)

    def _map(self, work: WorkList, tensors: Sequence[Tensor | None], change: Any) -> None:
        for part in work.parts:
            tensor = tensors[part.tensor]
            if tensor is None:
                continue
            here, _ = _places(part, tensor.device)
            old = _matrix(tensor, part)[here]
            chosen = _chosen_flags(part, work, tensor.device)
            new = change(old)
            _matrix(tensor, part)[here] = new if chosen is None else torch.where(chosen, new, old)

    def gather(self, work: WorkList, tensors: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
        for part, chosen in _visited(work, tensors):
            twin = packed[part.tensor]
            if work.frozen:
                twin[part.packed_start : part.packed_start + chosen.numel()] = chosen.reshape(-1)
            else:
                _, there = _places(part, twin.device)
                live = _chosen_flags(part, work, twin.device)
                if live is not None:
                    here, _ = _places(part, twin.device)
                    whole = _matrix(tensors[part.tensor], part)[here]
                    chosen = torch.where(live, whole, torch.zeros_like(whole))
                _packed_matrix(twin, part)[there] = chosen

    def scatter_(self, work: WorkList, tensors: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
        for part in work.parts:
            tensor, twin = tensors[part.tensor], packed[part.tensor]
            here, there = _places(part, tensor.device)
            matrix = _matrix(tensor, part)
            old = matrix[here]
            chosen = _chosen_flags(part, work, tensor.device)
            if not work.frozen:
                new = _packed_matrix(twin, part)[there]
                matrix[here] = new if chosen is None else torch.where(chosen, new, old)
            else:
                count = old.numel() if chosen is None else int(chosen.sum())
                values = twin[part.packed_start : part.packed_start + count]
                if chosen is None:
                    matrix[here] = values.view(old.shape)
                else:
                    old[chosen] = values
                    matrix[here] = old


class _Scalars:
    """Float32 scalars as Python floats, which hold them exactly and keep torch from promoting."""

    def __init__(self, row: Any) -> None:
        for name in row.dtype.names:
            setattr(self, name, float(row[name]))


def _matrix(tensor: Tensor, part: Part) -> Tensor:
    return tensor.detach().view(part.shape)


def _packed_matrix(tensor: Tensor, part: Part) -> Tensor:
    return tensor.detach().view(-1, part.packed_width)


def _index(index: np.ndarray | None, device: torch.device) -> Any:
    return slice(None) if index is None else torch.tensor(index, device=device)


def _places(part: Part, device: torch.device) -> tuple[Any, Any]:
    """Indices of the part in its tensor's matrix and in its packed twin's."""
    places = []
    for rows, cols in ((part.rows, part.cols), (part.packed_rows, part.packed_cols)):
        row, col = _index(rows, device), _index(cols, device)
        places.append((row[:, None], col[None, :]) if rows is not None and cols is not None else (row, col))
    return places[0], places[1]


def _chosen_flags(part: Part, work: WorkList, device: torch.device) -> Tensor | None:
    """Which elements of the part the list visits: bool [rows, cols]; None: all."""
    if part.frozen_bits is None:
        return None
    flags = torch.from_numpy(part.frozen_flags().copy()).to(device)
    return flags if work.frozen else ~flags


def _visited(work: WorkList, tensors: Sequence[Tensor | None]) -> Iterator[tuple[Part, Tensor]]:
    """Each part with the values the list visits."""
    for part in work.parts:
        tensor = tensors[part.tensor]
        if tensor is not None:
            here, _ = _places(part, tensor.device)
            values = _matrix(tensor, part)[here]
            chosen = _chosen_flags(part, work, tensor.device)
            yield part, values if chosen is None else values[chosen]
