"""What a step is given: tensors, and its hyper-parameters as finished scalars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

STORAGE: Final = (torch.float32, torch.bfloat16, torch.float16)
WIDE: Final = (torch.float64, torch.complex64, torch.complex128)  # of which the reference alone takes tensors
NormKind = Literal["sum_of_squares", "sum_of_absolutes", "largest_absolute"]

# Mirrors of enum DType and enum NormKind in csrc/work.h.
CODES: Final = torch.uint8  # what moments of 8 bits are kept as: codes, as `reference.decode_moments` reads them
DTYPE_CODES: Final = {dtype: code for code, dtype in enumerate((*STORAGE, CODES))}
NORM_CODES: Final = {kind: code for code, kind in enumerate(get_args(NormKind))}

# Mirror of struct Scalars in csrc/arithmetic.h.
SCALARS: Final = np.dtype([
    (name, "f4")
    for name in ("grad_multiplier", "weight_decay", "decay", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2",
                 "step_size", "bias2_sqrt", "eps")
] + [("step", "u4")])  # fmt: skip
# The same for float64 parameters.
SCALARS_DOUBLE: Final = np.dtype([(name, "f8" if name != "step" else "u4") for name in SCALARS.names or ()])
# Mirror of struct AdamWTensor in csrc/work.h.
ADAMW_TENSOR: Final = np.dtype([
    (name, "i8")
    for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "remainder", "number", "packed_grad")
])  # fmt: skip


def dtype_word(dtype: torch.dtype) -> str:
    """As messages, tables and command lines have it: "float32"."""
    return str(dtype).removeprefix("torch.")


def adamw_scalars(
    *,
    lr: Any,
    betas: tuple[Any, Any],
    eps: float,
    weight_decay: float,
    step: Any,
    decoupled: bool,
    maximize: bool = False,
    grad_multiplier: Any = 1.0,
) -> tuple[Any, ...]:
    """A row of `SCALARS` or `SCALARS_DOUBLE`: each hyper-parameter, in double, finished. Rounded once, when stored.

    ``step`` and what goes with it may be float64 tensors.

    Source of the formulas: Kingma & Ba 2015, algorithm 1 (bias correction folded into ``step_size`` and
    ``bias2_sqrt``); Loshchilov & Hutter 2019, algorithm 2 (``decay``).
    """
    beta1, beta2 = betas
    return (
        -grad_multiplier if maximize else grad_multiplier,
        weight_decay,
        1.0 - lr * weight_decay if decoupled else 1.0,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        lr / (1.0 - beta1**step),
        (1.0 - beta2**step) ** 0.5 if isinstance(step, Tensor) else math.sqrt(1.0 - beta2**step),
        eps,
        step,
    )


@dataclass
class AdamWOperands:
    """Tensors of a masked AdamW step, one entry per tensor of the work list; state is packed."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor] | None = None
    remainders: list[Tensor | None] | None = None  # int16, packed as state is: what bf16 parameters lack of fp32
    numbers: Sequence[int] = ()  # tell tensors apart in the noise of stochastic rounding; () = their places here
    grads: Sequence[Tensor | None] = ()
    packed_grads: Sequence[bool] = ()  # of which tensors the gradient is packed, as state is; () = of none
    native: Any = None  # address and dtype tables, kept by the compiled backend that ran last

    def table(self) -> np.ndarray:
        """Rows of `ADAMW_TENSOR`, one per tensor: int64 [tensors, 7]."""
        table = np.zeros((len(self.params), ADAMW_TENSOR.itemsize // 8), np.int64)
        columns = (self.params, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs, self.remainders)
        for column, tensors in enumerate(columns):
            if tensors is not None:
                table[:, column] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        table[:, 5] = self.numbers or range(len(table))
        table[:, 6] = [self.grad_is_packed(tensor) for tensor in range(len(table))]
        return table

    def grad_is_packed(self, tensor: int) -> bool:
        """Whether the gradient of a tensor is packed, as its state is."""
        return bool(self.packed_grads) and self.packed_grads[tensor]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """``array`` there; nobody waits for the device. On the CPU it is over the same memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def host_scalars(scalars: np.ndarray | Tensor, multiplier: Tensor | None = None) -> np.ndarray:
    """Rows of `SCALARS` or `SCALARS_DOUBLE`, for a backend that runs on the host, ``multiplier`` worked in."""
    if not isinstance(scalars, np.ndarray):
        row = next(row for row in (SCALARS, SCALARS_DOUBLE) if row.itemsize == 4 * scalars.shape[1])
        scalars = scalars.cpu().numpy().view(row).reshape(-1)
    if multiplier is not None:
        scalars = scalars.copy()
        column = scalars["grad_multiplier"]
        column *= column.dtype.type(multiplier.item())
    return scalars


def moment_dtype(param: torch.dtype, state_dtype: torch.dtype) -> torch.dtype:
    """Dtype of the moments of a parameter: ``state_dtype`` speaks of `STORAGE`, int8 meaning `CODES`; `WIDE` ones have
    moments like themselves, as in torch."""
    return param if param in WIDE else CODES if state_dtype == torch.int8 else state_dtype
