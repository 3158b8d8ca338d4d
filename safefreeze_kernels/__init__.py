"""safefreeze_kernels: fine-tune with safety-critical neurons provably frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from . import attribution, integrations
    from .attribution import MaskBuilder, score_units, score_weights
    from .attribution.watch import RefusalWatch
    from .grads.clip import clip_grad_norm_, zero_frozen_grads_
    from .grads.live import live_gradients
    from .integrations.peft import adapt, merge_
    from .keeping.keeper import RefusalKeeper
    from .measure.check import check
    from .measure.info import info
    from .measure.memory import memory_plan
    from .measure.step import profile_step
    from .optim.adam import MaskedAdam, MaskedAdamW
    from .optim.backward import step_in_backward
    from .optim.guard import guard
    from .plan.mask import FreezeMask
    from .plan.plan import FreezePlan, PlanFileError
    from .proof.drift import FrozenDriftError
    from .proof.snapshot import snapshot

__all__ = [
    "FreezeMask", "FreezePlan", "FrozenDriftError", "MaskBuilder", "MaskedAdam", "MaskedAdamW", "PlanFileError",
    "RefusalKeeper", "RefusalWatch", "adapt", "attribution", "check", "clip_grad_norm_", "guard", "info",
    "integrations", "live_gradients", "memory_plan", "merge_", "profile_step", "score_units", "score_weights",
    "snapshot", "step_in_backward", "zero_frozen_grads_",
]  # fmt: skip

# What is asked for is loaded: an audit needs no torch, and training no attribution.
_HOMES: Final = {
    "__version__": "._version",
    "FreezeMask": ".plan.mask",
    **dict.fromkeys(("FreezePlan", "PlanFileError"), ".plan.plan"),
    **dict.fromkeys(("clip_grad_norm_", "zero_frozen_grads_"), ".grads.clip"),
    "live_gradients": ".grads.live",
    **dict.fromkeys(("adapt", "merge_"), ".integrations.peft"),
    **dict.fromkeys(("MaskedAdam", "MaskedAdamW"), ".optim.adam"),
    "step_in_backward": ".optim.backward",
    "guard": ".optim.guard",
    **dict.fromkeys(("MaskBuilder", "score_units", "score_weights"), ".attribution"),
    "RefusalKeeper": ".keeping.keeper",
    "RefusalWatch": ".attribution.watch",
    "FrozenDriftError": ".proof.drift",
    "snapshot": ".proof.snapshot",
    "check": ".measure.check",
    "info": ".measure.info",
    "memory_plan": ".measure.memory",
    "profile_step": ".measure.step",
}

_MODULES: Final = {"attribution": ".attribution", "audit": ".proof.audit", "integrations": ".integrations"}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return importlib.import_module(_MODULES[name], __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = found  # not asked for again
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
