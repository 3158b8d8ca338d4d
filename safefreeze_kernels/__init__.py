"""safefreeze_kernels: fine-tune with safety-critical neurons provably frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from . import attribution, integrations
    from .attribution import MaskBuilder, score_units
    from .gradients import clip_grad_norm_, zero_frozen_grads_
    from .guards import guard
    from .kernels.drift import FrozenDriftError
    from .kernels.report import info
    from .live import live_gradients
    from .masks import FreezeMask, FreezePlan, PlanFileError
    from .memory import memory_plan
    from .optim import MaskedAdam, MaskedAdamW
    from .profiling import profile_step
    from .proof import snapshot
    from .watch import RefusalWatch

__version__ = "0.1.0"
__all__ = [
    "FreezeMask", "FreezePlan", "FrozenDriftError", "MaskBuilder", "MaskedAdam", "MaskedAdamW", "PlanFileError",
    "RefusalWatch", "attribution", "clip_grad_norm_", "guard", "info", "integrations", "live_gradients", "memory_plan",
    "profile_step", "score_units", "snapshot", "zero_frozen_grads_",
]  # fmt: skip

# What is asked for is loaded: an audit needs no torch, and training no attribution.
_HOMES: Final = {
    **dict.fromkeys(("FreezeMask", "FreezePlan", "PlanFileError"), ".masks"),
    **dict.fromkeys(("clip_grad_norm_", "zero_frozen_grads_"), ".gradients"),
    **dict.fromkeys(("MaskedAdam", "MaskedAdamW"), ".optim"),
    "guard": ".guards",
    **dict.fromkeys(("MaskBuilder", "score_units"), ".attribution"),
    "FrozenDriftError": ".kernels.drift",
    "info": ".kernels.report",
    "live_gradients": ".live",
    "memory_plan": ".memory",
    "profile_step": ".profiling",
    "snapshot": ".proof",
    "RefusalWatch": ".watch",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in ("attribution", "integrations"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = found  # not asked for again
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
