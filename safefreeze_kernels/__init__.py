"""safefreeze_kernels: fine-tune with safety-critical neurons provably frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .gradients import clip_grad_norm_, zero_frozen_grads_
from .kernels.report import info
from .live import live_gradients
from .masks import FreezeMask, FreezePlan, PlanFileError
from .optim import MaskedAdam, MaskedAdamW, guard
from .proof import FrozenDriftError, snapshot

if TYPE_CHECKING:
    from . import attribution, integrations
    from .attribution import MaskBuilder, score_units
    from .memory import memory_plan
    from .profiling import profile_step

__version__ = "0.1.0"
__all__ = [
    "FreezeMask", "FreezePlan", "FrozenDriftError", "MaskBuilder", "MaskedAdam", "MaskedAdamW", "PlanFileError",
    "attribution", "clip_grad_norm_", "guard", "info", "integrations", "live_gradients", "memory_plan", "profile_step",
    "score_units", "snapshot", "zero_frozen_grads_",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # loaded when asked for: training needs none of it
    import importlib

    if name == "integrations":
        return importlib.import_module(".integrations", __name__)
    late = {"memory_plan": ".memory", "profile_step": ".profiling"}
    if name in late:
        return getattr(importlib.import_module(late[name], __name__), name)
    if name in ("MaskBuilder", "attribution", "score_units"):
        attribution = importlib.import_module(".attribution", __name__)
        return attribution if name == "attribution" else getattr(attribution, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
