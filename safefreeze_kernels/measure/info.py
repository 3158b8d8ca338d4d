"""`info()`: which backend runs here, and why the others do not."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..kernels.backend import backend_states, choose_backend


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
    from .._version import __version__

    states = backend_states()
    backends = {name: f"not here: {state}" if isinstance(state, str) else "runs" for name, state in states.items()}
    backends["reference"] = "runs (eager torch, slow)"
    details: dict[str, str] = {}
    if not isinstance(states["cpu"], str):
        from .. import _C
        from ..kernels.cpu import OPENMP

        backends["cpu"] = f"runs ({_C.isa()}; this processor can: {', '.join(_C.runnable_isas())})"
        details["threads"] = f"{torch.get_num_threads()} (torch.set_num_threads changes it)"
        details["thread team"] = f"torch's own OpenMP, {OPENMP}" if OPENMP else "made per call: torch carries no OpenMP"
    if not isinstance(states["cuda"], str):
        from ..kernels.cuda import versions

        build, driver = versions()
        backends["cuda"] = f"runs (built with CUDA {build}; the driver knows {driver})"
    if not isinstance(states["triton"], str):
        import triton

        backends["triton"] = f"runs (Triton {triton.__version__})"
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        name = torch.cuda.get_device_name(device)
        details[f"GPU {index}"] = f"{name}: 'auto' takes {choose_backend('auto', device, 'info').name!r}"
    return Info(
        versions={
            "safefreeze_kernels": __version__,
            "torch": torch.__version__,
            "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        },
        backends=backends,
        details=details,
    )


def device_name(device: torch.device) -> str:
    """What a GPU or this machine's processor is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]
