"""Proof that frozen weights did not move: `snapshot` their bytes, `verify` them later."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..kernels.backend import choose_backend
from ..kernels.parts import compile_frozen
from ..model.sharding import held, local, local_mask
from ..plan.binding import BoundMask, Model, bind, named_tensors
from ..plan.plan import FreezePlan
from .drift import INTEGER_OF_WIDTH, FrozenDriftError, raise_on_drift


class Snapshot:
    """The frozen bytes of a model under a plan. Made by `snapshot`."""

    def __init__(self, model: Model, plan: FreezePlan) -> None:
        self.plan = plan
        bound = _found(model, plan, "snapshot")
        self._names = [min(entry.plan_names) for entry in bound]
        self._masks = [local_mask(entry.mask, entry.param) for entry in bound]
        self._bytes = [_frozen_bytes(entry) for entry in bound]
        # every name of the plan, tied ones too -> its place in the lists
        self._place = {name: i for i, entry in enumerate(bound) for name in entry.plan_names}

    @property
    def nbytes(self) -> int:
        """Memory held: the frozen elements, nothing else."""
        return sum(t.numel() * t.element_size() for t in self._bytes)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over names, dtypes and frozen bytes."""
        digest = hashlib.sha256()
        entries = zip(self._names, self._masks, self._bytes, strict=True)
        for name, mask, frozen in sorted(entries, key=lambda entry: entry[0]):
            digest.update(f"{name}\0{frozen.dtype}\0{mask.fingerprint}\0".encode())
            digest.update(frozen.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def verify(self, model: Model) -> None:
        """Compare byte for byte (-0.0 is not 0.0; a NaN equals the same NaN).

        Raises:
            FrozenDriftError: naming the first tensor, row and column that differ, and both values.
            ValueError: the plan does not fit ``model``.
        """
        for entry in _found(model, self.plan, "verify"):
            place = self._place[entry.plan_names[0]]
            then = self._bytes[place]
            if entry.param.dtype != then.dtype:
                raise FrozenDriftError(
                    f"verify: {entry.name!r} is {entry.param.dtype}, it was {then.dtype} at the snapshot; bytes cannot "
                    "be compared across dtypes"
                )
            if local_mask(entry.mask, entry.param) != self._masks[place]:
                raise ValueError(
                    f"verify: this rank holds another part of {entry.name!r} than at the snapshot; take the snapshot "
                    "after the model was sharded"
                )
            now = _frozen_bytes(entry)
            raise_on_drift("verify", [entry.name], [entry.mask], [then], [now], held=[held(entry.param)])

    def __repr__(self) -> str:
        return f"Snapshot({len(self._names)} tensors, {self.nbytes:,} frozen bytes)"


def snapshot(model: Model, plan: FreezePlan) -> Snapshot:
    """Copy the frozen bytes of ``model`` to host memory, packed: frozen elements only.

    Of sharded parameters (FSDP2, tensor parallel) each rank copies and verifies what it holds.

    Args:
        model: a module, a mapping name -> tensor (a state dict too), or pairs.
        plan: what is frozen.

    Raises:
        ValueError: the plan does not fit the model.
    """
    return Snapshot(model, plan)


def _found(model: Model, plan: FreezePlan, operation: str) -> list[BoundMask]:
    if not isinstance(plan, FreezePlan):
        raise TypeError(f"{operation}: plan is a {type(plan).__name__}, expected a FreezePlan")
    return bind(plan, named_tensors(model), operation=operation, require_grad=False, twins=True)


@torch.no_grad()
def _frozen_bytes(entry: BoundMask) -> Tensor:
    """The frozen elements that this rank holds of a tensor, packed, on the host. Any dtype."""
    param, mask = local(entry.param), local_mask(entry.mask, entry.param)
    host = param.detach().cpu().resolve_conj().resolve_neg().contiguous()
    flat = host.view(-1).view(INTEGER_OF_WIDTH.get(host.element_size(), host.dtype))
    packed = torch.empty(mask.frozen_count, dtype=flat.dtype)
    # compiled kernels copy by width: any 2- or 4-byte dtype may pass as these
    alias = {2: torch.bfloat16, 4: torch.float32}.get(host.element_size())
    backend = choose_backend("auto" if alias else "reference", host.device, "snapshot")
    source, target = (flat.view(alias), packed.view(alias)) if alias else (flat, packed)
    backend.gather(compile_frozen([mask]), [source.view(mask.shape)], [target])
    return packed.view(param.dtype)
