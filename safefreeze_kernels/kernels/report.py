"""`info()`: which backend runs here, and why the others do not."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field

import torch

from . import backend_states

__all__ = ["Info", "info"]


@dataclass(frozen=True)
class Info:
    """What `info` returns; ``str()`` of it is a table."""

    versions: dict[str, str]
    backends: dict[str, str]  # name -> "runs …" or why it does not
    details: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            *self.versions.items(),
            *((f"backend {name}", text) for name, text in self.backends.items()),
            *self.details.items(),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def info() -> Info:
    """Versions, backends and threads, as plain text a bug report can carry."""
    from .. import __version__

    states = backend_states()
    backends = {
        name: state if isinstance(state, str) else "runs" if name != "reference" else "runs (eager torch, slow)"
        for name, state in states.items()
    }
    details: dict[str, str] = {}
    if not isinstance(states["cpu"], str):
        from .. import _C
        from .native import OPENMP

        backends["cpu"] = f"runs ({_C.isa()}; this processor can: {', '.join(_C.runnable_isas())})"
        details["threads"] = f"{torch.get_num_threads()} (torch.set_num_threads changes it)"
        details["thread team"] = f"torch's own OpenMP, {OPENMP}" if OPENMP else "made per call: torch carries no OpenMP"
    return Info(
        versions={
            "safefreeze_kernels": __version__,
            "torch": torch.__version__,
            "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        },
        backends=backends,
        details=details,
    )
