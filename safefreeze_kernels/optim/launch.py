"""`MaskedAdamW` and `MaskedAdam`, drop-in for `torch.optim`."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from ..grads.clip import read_gradients
from ..grads.reader import GradientReader
from ..kernels.ages import Ages
from ..kernels.backend import Backend
from ..kernels.operands import (
    SCALARS,
    SCALARS_DOUBLE,
    AdamWOperands,
    GradientList,
    adamw_scalars,
)
from ..kernels.parts import WorkList
from ..model.sharding import local
from ..plan.mask import FreezeMask
from .checks import _check_hyper_parameters
from .state import MOMENTS, REMAINDER

_SCALAR_ROW: Final = struct.Struct("=10fI")
_SCALAR_ROW_DOUBLE: Final = struct.Struct("=10dI")


class _Launch:
    """One kernel call per step: the tensors of one device and one set of kernel flags, ready to go.

    Everything that does not change from step to step is computed here once.
    """

    on_device = False  # whether step counts and scalars live on the parameters' device

    def __init__(
        self, *, optimizer: str, backend: Backend, work: WorkList, owners: list[Tensor], names: list[str],
        group_of: np.ndarray, states: list[dict[str, Any]], numbers: list[int], amsgrad: bool, l2: bool,
        stochastic: bool, seed: int, double: bool,
    ) -> None:  # fmt: skip
        self.optimizer, self.backend, self.work = optimizer, backend, work
        #: dtype of the arithmetic, and how its scalars are laid out
        self.exact = torch.float64 if double else torch.float32
        self.pack_scalars = (_SCALAR_ROW_DOUBLE if double else _SCALAR_ROW).pack_into
        params = list(map(local, owners))
        self.owners, self.params, self.names = owners, params, names
        self.holders: list[int] = []  # how many references there are to each owner
        self.flags: dict[str, Any] = {"l2": l2, "amsgrad": amsgrad, "stochastic": stochastic, "seed": seed}
        self.group_of_part = group_of[work.tensor_of_part]
        groups, set_of_part = np.unique(self.group_of_part, return_inverse=True)
        self.groups, self.set_of_part = groups.tolist(), set_of_part.astype(np.int32)
        self.ageless = not work.born_of_part.any()
        self.scalars = np.empty(len(self.groups), SCALARS_DOUBLE if double else SCALARS)
        self.scalar_memory = self.scalars.view(np.uint8).data
        self.shapes = [p.shape for p in owners]
        self.dtypes = [p.dtype for p in params]
        self.strided = [i for i, p in enumerate(params) if not p.is_contiguous() or p.is_conj() or p.is_neg()]
        moments = [[state[key] for state in states] for key in MOMENTS[: 3 if amsgrad else 2]]
        remainders = [state.get(REMAINDER) for state in states]
        real_params, *real = (list(map(_real, tensors)) for tensors in (params, *moments))
        self.operands = AdamWOperands(
            real_params, real[0], real[1], real[2] if amsgrad else None,
            remainders if any(r is not None for r in remainders) else None, numbers,
        )  # fmt: skip
        # all that a step writes to beside parameters and counts
        self.moments = [t for tensors in (*moments, remainders) for t in tensors if t is not None]
        self.gradients = GradientReader(owners)
        self.operands.packed_grads = [mask is not None for mask in self.gradients.packings]
        # The step counts are views of one tensor, so that counting is one operation.
        self.steps = torch.tensor([float(state["step"]) for state in states], dtype=torch.float32)
        if self.on_device:
            self.steps = self.steps.to(params[0].device)
        for state, view in zip(states, self.steps.unbind(), strict=True):
            state["step"] = view
        if self.on_device:
            return
        self.counts = self.steps.numpy()
        self.count_bytes = self.counts.view(np.uint8).data
        self.counting: np.ndarray | None = None
        self.uniform_count: int | None = None
        self._note_counts()

    def read_gradients(self) -> GradientList:
        grads = read_gradients(self.gradients, self.owners, self.names, self.shapes, self.optimizer, self.dtypes)
        # Tensors without a gradient are left alone and do not count a step.
        self.counting = None if grads.plain else np.array([g is not None for g in grads], np.float32)
        return grads if grads.plain else GradientList(None if g is None else _real(g).contiguous() for g in grads)

    def prepare(
        self, groups: list[dict[str, Any]], grads: GradientList | None = None
    ) -> tuple[GradientList, Any, np.ndarray]:
        """Everything that can fail, before anything is changed: gradients, scalars, the scalar set of each part.
        ``grads``: to be taken instead of the parameters' own."""
        grads = self.read_gradients() if grads is None else grads
        if grads.plain and self.uniform_count is not None and self.count_bytes == self.expected_bytes:
            # the usual case: all tensors took as many steps, and groups are the only difference
            for row, group in enumerate(self.groups):
                values = _group_scalars(groups[group], self.uniform_count + 1)
                self.pack_scalars(self.scalar_memory, row * self.scalars.itemsize, *values)
            return grads, self.scalars, self.set_of_part
        self.uniform_count = None
        counts = self.counts + (np.float32(1.0) if self.counting is None else self.counting)
        age_of_part = np.maximum(counts[self.work.tensor_of_part].astype(np.int64) - self.work.born_of_part, 1)
        codes, inverse = np.unique(self.group_of_part << 40 | age_of_part, return_inverse=True)
        scalars = np.empty(len(codes), self.scalars.dtype)
        for row, code in enumerate(codes.tolist()):
            scalars[row] = _group_scalars(groups[code >> 40], code & (1 << 40) - 1)
        return grads, scalars, inverse.astype(np.int32)

    def run(
        self, grads: GradientList, scalars: Any, scalar_set: np.ndarray, multiplier: Tensor | None, skip: Tensor | None
    ) -> None:
        if multiplier is not None:
            multiplier = multiplier.to(self.params[0].device, self.exact)
        skip = skip if self.on_device else None  # else the host looked at it
        self.operands.grads = grads
        if self.strided:  # right, not fast: kernels see contiguous tensors only
            for i in self.strided:
                self.operands.params[i] = _real(self.params[i].detach()).contiguous()
            self.operands.native = None
        self.backend.adamw_(
            self.work, self.operands, scalars, scalar_set, **self.flags, skip=skip, multiplier=multiplier
        )
        for i in self.strided:
            if grads[i] is not None:
                new = self.operands.params[i]
                self.params[i].detach().copy_(torch.view_as_complex(new) if self.params[i].is_complex() else new)
        self.operands.grads = GradientList()
        self.count(skip)
        changed = self.owners if grads.plain else [p for p, g in zip(self.owners, grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version(changed)

    def count(self, skip: Tensor | None) -> None:
        """One more step, for tensors that had a gradient; none where ``skip`` is not 0."""
        self.counts += np.float32(1.0) if self.counting is None else self.counting
        self._note_counts()

    def _note_counts(self) -> None:
        """Remember the step counts, so as to see at a glance whether someone else wrote to them."""
        if self.uniform_count is not None:
            self.uniform_count += 1
        elif self.ageless and len(self.counts) and (self.counts == self.counts[0]).all():
            self.uniform_count = int(self.counts[0])
        self.expected_bytes = bytes(self.count_bytes)


class _CapturableLaunch(_Launch):
    """A launch whose step counts and scalars live on the parameters' device, so that the host never waits for it."""

    on_device = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # A set of scalars for each tensor and each age in it: which tensors took a step, only the device knows.
        part = np.stack([self.group_of_part, self.work.tensor_of_part, self.work.born_of_part], axis=1)
        sets, set_of_part = np.unique(part, axis=0, return_inverse=True)
        self.set_of_part = set_of_part.reshape(-1).astype(np.int32)
        self.set_of_group = [(group, np.flatnonzero(sets[:, 0] == group).tolist()) for group in self.groups]
        device = self.steps.device
        self.tensor_of_set = torch.from_numpy(sets[:, 1].copy()).to(device)
        self.born_of_set = torch.from_numpy(sets[:, 2].astype(np.float64)).to(device)
        self.counted: tuple[bytes, Tensor] | None = None

    @torch.no_grad()
    def prepare(
        self, groups: list[dict[str, Any]], grads: GradientList | None = None
    ) -> tuple[GradientList, Any, np.ndarray]:
        grads = self.read_gradients() if grads is None else grads
        ages = (self.steps[self.tensor_of_set].double() + 1.0 - self.born_of_set).clamp(min=1.0)
        rows = [
            _scalars_on_device(groups[group], ages[members[0] : members[-1] + 1], self.exact)
            for group, members in self.set_of_group
        ] or [_scalars_on_device(groups[0], ages, self.exact)]  # nothing is live, so there are no sets
        return grads, torch.cat(rows), self.set_of_part

    def count(self, skip: Tensor | None) -> None:
        one: Any = 1.0 if skip is None else (skip.reshape(()) == 0).float()
        if self.counting is not None:
            key = self.counting.tobytes()
            if self.counted is None or self.counted[0] != key:
                self.counted = key, torch.from_numpy(self.counting).to(self.steps.device)
            one = self.counted[1] * one
        self.steps.add_(one)


def _multiplier(grad_scale: Tensor | None, clip: Tensor | None) -> Tensor | None:
    """What gradients are multiplied by: one IEEE float32 division and one product, the same on every device."""
    if grad_scale is None:
        return clip
    unscale = 1.0 / grad_scale.detach().float().reshape(())
    return unscale if clip is None else unscale * clip.to(unscale.device)


# ------------------------------------------------------------------------------------------------------- checks


def _scalars_on_device(group: dict[str, Any], step: Tensor, exact: torch.dtype) -> Tensor:
    """Words of `SCALARS` rows, int32 [steps, 11] (`SCALARS_DOUBLE`: [steps, 21]), from float64 ``step`` counts; tensors
    in ``group`` are read there."""
    betas = group["betas"]
    known = {"lr": 0.0} if isinstance(group["lr"], Tensor) else {}
    _check_hyper_parameters({**group, **known, "betas": [0.0 if isinstance(b, Tensor) else b for b in betas]})

    def there(value: Any) -> Any:
        return value.to(step.device, torch.float64).reshape(()) if isinstance(value, Tensor) else float(value)

    words = adamw_scalars(
        lr=there(group["lr"]), betas=(there(betas[0]), there(betas[1])), eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]), step=step, decoupled=group["decoupled_weight_decay"],
        maximize=group["maximize"],
    )  # fmt: skip
    # filled there: a number copied from the host would be waited for
    columns = [w.expand_as(step) if isinstance(w, Tensor) else torch.full_like(step, w) for w in words]
    floats = torch.stack(columns[:-1], dim=1).to(exact).view(torch.int32)
    return torch.cat([floats, columns[-1].to(torch.int32)[:, None]], dim=1)


def _flags(group: dict[str, Any]) -> tuple[bool, bool, bool, bool]:
    """What selects a kernel: (decoupled, amsgrad, l2, capturable)."""
    decoupled = group["decoupled_weight_decay"]
    return decoupled, group["amsgrad"], not decoupled and group["weight_decay"] != 0, group["capturable"]


def _group_scalars(group: dict[str, Any], step: int) -> tuple[float, ...]:
    lr, eps, weight_decay = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
    beta1, beta2 = group["betas"]
    beta1, beta2 = float(beta1), float(beta2)
    if not (
        0.0 <= lr < math.inf
        and 0.0 <= eps < math.inf
        and 0.0 <= weight_decay < math.inf
        and 0.0 <= beta1 < 1.0
        and 0.0 <= beta2 < 1.0
    ):
        _check_hyper_parameters(group)
    return adamw_scalars(
        lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, step=step,
        decoupled=group["decoupled_weight_decay"], maximize=group["maximize"],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- complex parameters


def _real(tensor: Tensor) -> Tensor:
    """What kernels see of a tensor, over the same memory: complex numbers as pairs of real ones. Where memory does not
    hold the values (autograd may only note that they are negated or conjugate), a copy."""
    if tensor.is_complex() or tensor.is_neg():
        tensor = tensor.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _kernel_dtypes(params: Iterable[Tensor]) -> set[torch.dtype]:
    """Of what kernels see of parameters."""
    return {torch.float32 if p.dtype == torch.complex64 else p.dtype for p in params}


def _of_real_view(mask: FreezeMask, ages: Ages | None) -> tuple[FreezeMask, Ages | None]:
    """Mask and ages of a complex tensor's real view, a matrix with a pair of columns for each column."""
    n_rows, n_cols = mask.matrix_shape
    elements = None if mask.elements is None else mask.elements.reshape(n_rows, n_cols).repeat_interleave(2, dim=1)
    cols = (mask.cols[:, None] * 2 + torch.arange(2)).reshape(-1)
    real = FreezeMask((n_rows, 2 * n_cols), rows=mask.rows, cols=cols, elements=elements)
    if ages is None:
        return real, None
    born = None if ages.elements is None else ages.elements.repeat(2, axis=1)
    return real, Ages(ages.rows, ages.cols.repeat(2), born)
