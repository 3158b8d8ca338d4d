"""Triton's launches without a GPU: kernels are compiled for one, and a driver notes what it would launch.

``python tests/helpers/triton_driver.py`` times a step with it, on the host that is (benchmarks/NOTES.md). Whoever uses
this does so in a process of its own: the driver stays.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

import safefreeze_kernels as sf
from safefreeze_kernels.kernels.operands import SCALARS, AdamWOperands
from safefreeze_kernels.kernels.parts import compile_live
from safefreeze_kernels.kernels.triton import KERNELS, TritonBackend
from safefreeze_kernels.measure.timing import milliseconds
from safefreeze_kernels.plan.mask import FreezeMask

ARCH: Final = 90


class Driver:
    """What Triton asks of one, to launch on device 0.

    Attributes:
        launched: arguments of each launch: the grid, stream, function, metadata and hooks, then the kernel's own.
    """

    utils = SimpleNamespace(
        load_binary=lambda *_: (None, 1, 32, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 1 << 20}
    )

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append(arguments)


def install() -> Driver:
    """Have Triton launch by it, and our backend take CPU tensors."""
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    TritonBackend.refusal = lambda self, device: ""  # type: ignore[method-assign]
    torch.cuda.is_available = lambda: True
    return driver


def launches() -> list[tuple[int, list[Any]]]:
    """Of each of some steps: how often Triton looked for a kernel by its arguments, and what the last launch took, each
    tensor as its dtype. Every second step has gradients multiplied."""
    driver, looks, found = install(), 0, []
    run = triton.JITFunction.run

    def looked(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal looks
        looks += 1
        return run(self, *args, **kwargs)

    triton.JITFunction.run = looked
    backend, tensors = TritonBackend(), [torch.ones(8, 16) for _ in range(4)]
    operands = AdamWOperands(*([tensor] for tensor in tensors[:3]), grads=tensors[3:])
    work, scalars, sets = compile_live([FreezeMask((8, 16))]), np.zeros(1, SCALARS), np.zeros(1, np.int32)
    for step in range(4):
        multiplier = torch.tensor(2.0) if step % 2 else None
        backend.adamw_(work, operands, scalars, sets, l2=False, amsgrad=False, multiplier=multiplier)
        found.append((looks, list(map(_described, driver.launched[-1]))))
    assert len(driver.launched) == 4, f"{len(driver.launched)} launches in 4 steps"
    return found


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value if isinstance(value, (int, tuple, str, type(None))) else str(type(value))


def specialised() -> list[str]:
    """Arguments for whose values Triton would compile a kernel anew."""
    return [
        f"{name}: {parameter.name}"
        for name, kernel in KERNELS.items()
        for parameter in kernel.params
        if not (parameter.is_constexpr or parameter.do_not_specialize)
    ]


def main() -> None:
    install().launched = SimpleNamespace(append=lambda _: None)  # type: ignore[assignment]
    for n_tensors in (1, 24, 300):
        named = [(f"layers.{i}.weight", torch.nn.Parameter(torch.ones(8, 16))) for i in range(n_tensors)]
        for _, p in named:
            p.grad = torch.ones_like(p)
        plan = sf.FreezePlan({name: sf.FreezeMask((8, 16), rows=[i % 8]) for i, (name, _) in enumerate(named)})
        opt = sf.MaskedAdamW(named, lr=1e-3, freeze=plan, backend="triton")
        times = sorted(milliseconds(opt.step) for _ in range(2000))
        print(f"{n_tensors} tensors: {1000 * times[20]:.0f} µs, median {1000 * times[1000]:.0f}")


if __name__ == "__main__":
    main()
