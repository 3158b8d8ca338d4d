"""Proof that frozen weights did not move: `snapshot` their bytes, `verify` them later."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .gradients import Model
from .kernels import choose_backend, compile_frozen
from .kernels.drift import INTEGER_OF_WIDTH, FrozenDriftError, raise_on_drift
from .masks import FreezeMask, FreezePlan, bind, named_tensors

__all__ = ["FrozenDriftError", "Snapshot", "snapshot"]


class Snapshot:
    """The frozen bytes of a model under a plan. Made by `snapshot`."""

    def __init__(self, model: Model, plan: FreezePlan) -> None:
        self.plan = plan
        self._names, params, self._masks = _found(model, plan, "snapshot")
        self._dtypes = [p.dtype for p in params]
        self._bytes = [_frozen_bytes(p, mask) for p, mask in zip(params, self._masks, strict=True)]

    @property
    def nbytes(self) -> int:
        """Memory held: the frozen elements, nothing else."""
        return sum(t.numel() * t.element_size() for t in self._bytes)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over names, dtypes and frozen bytes."""
        digest = hashlib.sha256()
        order = sorted(range(len(self._names)), key=self._names.__getitem__)
        for i in order:
            digest.update(f"{self._names[i]}\0{self._dtypes[i]}\0{self._masks[i].fingerprint}\0".encode())
            digest.update(self._bytes[i].view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def verify(self, model: Model) -> None:
        """Compare byte for byte (-0.0 is not 0.0; a NaN equals the same NaN).

        Raises:
            FrozenDriftError: naming the first tensor, row and column that differ, and both values.
            ValueError: the plan does not fit ``model``.
        """
        _, params, _ = _found(model, self.plan, "verify")
        for i, p in enumerate(params):
            if p.dtype != self._dtypes[i]:
                raise FrozenDriftError(
                    f"verify: {self._names[i]!r} is {p.dtype}, it was {self._dtypes[i]} at the snapshot; "
                    "bytes cannot be compared across dtypes"
                )
            now = _frozen_bytes(p, self._masks[i])
            raise_on_drift("verify", self._names[i : i + 1], self._masks[i : i + 1], self._bytes[i : i + 1], [now])

    def __repr__(self) -> str:
        return f"Snapshot({len(self._names)} tensors, {self.nbytes:,} frozen bytes)"


def snapshot(model: Model, plan: FreezePlan) -> Snapshot:
    """Copy the frozen bytes of ``model`` to host memory, packed: frozen elements only.

    Args:
        model: a module, a mapping name -> tensor (a state dict too), or pairs.
        plan: what is frozen.

    Raises:
        ValueError: the plan does not fit the model.
    """
    return Snapshot(model, plan)


def _found(model: Model, plan: FreezePlan, operation: str) -> tuple[list[str], list[Tensor], list[FreezeMask]]:
    if not isinstance(plan, FreezePlan):
        raise TypeError(f"{operation}: plan is a {type(plan).__name__}, expected a FreezePlan")
    bound = bind(plan, named_tensors(model), operation=operation, require_grad=False)
    return [b.name for b in bound], [b.param for b in bound], [b.mask for b in bound]


@torch.no_grad()
def _frozen_bytes(param: Tensor, mask: FreezeMask) -> Tensor:
    """The frozen elements of a tensor, packed, as integers of its width, on the host. Any dtype."""
    host = param.detach().cpu().contiguous()
    bits = (
        host.view(INTEGER_OF_WIDTH[host.element_size()])
        if host.dim()
        else host.reshape(1).view(INTEGER_OF_WIDTH[host.element_size()])
    )
    if host.element_size() not in (2, 4):
        return bits.reshape(-1)[mask.dense().reshape(-1)]
    # the copy kernels move bytes by width: any 2- or 4-byte dtype may pass as these
    alias = torch.float32 if host.element_size() == 4 else torch.bfloat16
    packed = torch.empty(mask.frozen_count, dtype=bits.dtype)
    choose_backend("auto", host.device, "snapshot").gather(
        compile_frozen([mask]), [bits.view(alias).view(mask.shape)], [packed.view(alias)]
    )
    return packed
