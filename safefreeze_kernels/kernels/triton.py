"""The Triton backend: for GPUs without a CUDA compiler at hand, and for AMD's. One launch per pair of dtypes.

With ``TRITON_INTERPRET=1`` in the environment when this is imported, the kernels are interpreted, on CPU tensors.

The arithmetic is the twin of csrc/arithmetic.h: the same IEEE float32 operations in the same order, hence ``div_rn``,
``sqrt_rn`` and no fused multiply-add (`OPTIONS`). 16-bit storage travels as integers (triton_storage.py); where
a block reads and writes, triton_places.py says.

A program takes one tile (tiles.py). Addresses come from tables in device memory, so one launch serves any number of
tensors. Each kernel walks its tile in one of two ways, chosen when it runs:

    wide    neighbours in memory, both in the tensor and in its twin, each beginning at 16 bytes: 16-byte accesses
    others  anything: picked columns, single elements, rows at odd addresses; an element at a time
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False, disable-error-code=import-untyped
# ruff: noqa: N803, N806, RUF059  # compile-time names are in capitals, as Triton's documentation has them

import contextlib
import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from .gpu import GpuBackend, Launch
from .operands import CODES, SCALARS, NormKind
from .triton_places import (
    chosen_of,
    flags_of,
    held_places,
    part_row,
    places,
    pointer_to,
    share_of,
    size_of,
    tile_age,
    tile_row,
)
from .triton_storage import (
    decode_largest,
    decode_moments,
    encode_largest,
    encode_moments,
    from_remainder,
    moment_noise,
    noise,
    to_float,
    to_remainder,
    to_storage,
)

__all__ = ["INTERPRETED", "TritonBackend"]

THREADS: Final = 128  # of a program
OPTIONS: Final[dict[str, Any]] = (
    {"enable_fp_fusion": False, "num_warps": 2}
    if torch.version.hip
    else {"enable_fp_fusion": False, "num_warps": 4, "maxnreg": 64}
)

# Words of the tables' rows.
_TENSOR_WORDS = tl.constexpr(7)  # struct AdamWTensor in csrc/work.h
_SCALAR_WORDS = tl.constexpr(SCALARS.itemsize // 4)
_STEP = tl.constexpr(SCALARS.names.index("step") if SCALARS.names else 0)


# ------------------------------------------------------------------------------------------------- the arithmetic


# `adamw` of csrc/arithmetic.h in two halves. ``s``: its scalars.


@triton.jit
def moments(p, g, m, v, v_max, s, L2: tl.constexpr, AMSGRAD: tl.constexpr):
    """New ``m, v, v_max`` in float32, and the second moment to divide by."""
    grad_multiplier, weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, bias2_sqrt, eps = s
    g = g * grad_multiplier
    if L2:
        g = g + weight_decay * p
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    second_moment = v
    if AMSGRAD:
        v_max = tl.where((v > v_max) | (v != v), v, v_max)  # keeps NaN, as torch.maximum does
        second_moment = v_max
    return m, v, v_max, second_moment


@triton.jit
def update(p, m, second_moment, s):
    """New ``p`` in float32."""
    grad_multiplier, weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, bias2_sqrt, eps = s
    return decay * p - tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(second_moment), bias2_sqrt) + eps)


# -------------------------------------------------------------------------------------------------------- kernels


@triton.jit(
    do_not_specialize=["tiles", "parts", "tensors", "grads", "scalar_set", "scalars", "skip", "multiplier", "seed"]
)
def adamw_kernel(
    tiles, parts, tensors, grads, scalar_set, scalars, skip, multiplier, seed,
    PARAM: tl.constexpr, STATE: tl.constexpr, ROUNDING: tl.constexpr, L2: tl.constexpr, AMSGRAD: tl.constexpr,
    LISTS: tl.constexpr, BITS: tl.constexpr, AGES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    start, packed, tensor, part, count, at = tile_row(tiles)
    cols, packed_cols, bits, shared, gapless, ages = part_row(parts, part, at, start, packed, LISTS, BITS, AGES)
    row = tensors + tensor.to(tl.int64) * _TENSOR_WORDS
    grad = tl.load(grads + tensor)
    run = grad != 0
    if skip is not None:
        run = run & (tl.load(skip) == 0)
    count = tl.where(run, count, 0)
    p_at = tl.load(row) + start * size_of(PARAM)
    packed_grad = tl.load(row + 6) != 0
    g_at = grad + tl.where(packed_grad, packed, start) * size_of(PARAM)
    m_at = tl.load(row + 1) + packed * size_of(STATE)
    v_at = tl.load(row + 2) + packed * size_of(STATE)
    v_max_at = v_at
    remainder_at = v_at
    if AMSGRAD:
        v_max_at = tl.load(row + 3) + packed * size_of(STATE)
    if ROUNDING == "remainder":
        remainder_at = tl.load(row + 4) + packed * 2
    row_of_scalars = scalars + (tl.load(scalar_set + part) + tile_age(tiles)) * _SCALAR_WORDS
    s = _scalars(row_of_scalars, multiplier)
    obstacles = ((p_at | g_at | m_at | v_at | v_max_at | remainder_at) & 15) | (count & 7) | cols | packed_cols | ages
    if BITS:  # a frozen element's old bytes are stored again, which nobody else may change meanwhile
        obstacles = obstacles | shared | gapless | (start & 7)
    taken = count * 0
    step = tl.load(row_of_scalars + _STEP).to(tl.uint32, bitcast=True)
    if ROUNDING == "stochastic" or STATE == tl.uint8:
        number = (tl.load(row + 5) & 0xFFFFFFFF).to(tl.uint32)
    if ROUNDING == "stochastic":
        obstacles = obstacles | (start & 7)  # eight neighbours share noise
    for WIDE in tl.static_range(2):
        share = share_of(obstacles == 0, count, WIDE)
        for first in range(0, share, BLOCKS[WIDE]):
            here, there, inside = places(first, share, cols, packed_cols, LISTS, WIDE, BLOCKS[WIDE])
            if BITS and not WIDE:
                inside = inside & (flags_of(bits, start, here, first, share, WIDE, BLOCKS[WIDE]) == 0)
                there, taken = held_places(there, gapless, inside, taken)
            own, own_step = s, step
            if AGES and not WIDE:
                own, own_step = _of_age(s, row_of_scalars, ages, there, inside)
            p_ptr = pointer_to(p_at, PARAM, WIDE) + here
            m_ptr = pointer_to(m_at, STATE, WIDE) + there
            v_ptr = pointer_to(v_at, STATE, WIDE) + there
            old_p = tl.load(p_ptr, mask=inside, other=0)
            of_grad = here if WIDE else tl.where(packed_grad, there, here)
            g = tl.load(pointer_to(g_at, PARAM, WIDE) + of_grad, mask=inside, other=0)
            old_m = tl.load(m_ptr, mask=inside, other=0)
            old_v = tl.load(v_ptr, mask=inside, other=0)
            old_v_max = old_v
            if AMSGRAD:
                v_max_ptr = pointer_to(v_max_at, STATE, WIDE) + there
                old_v_max = tl.load(v_max_ptr, mask=inside, other=0)
            if ROUNDING == "remainder":
                remainder_ptr = pointer_to(remainder_at, tl.bfloat16, WIDE) + there
                old_remainder = tl.load(remainder_ptr, mask=inside, other=0)
                p = from_remainder(old_p, old_remainder)
            else:
                p = to_float(old_p, PARAM)
            if STATE == tl.uint8:
                m, v = decode_moments(old_m, old_v)
                v_max = decode_largest(old_v_max)
            else:
                m, v, v_max = to_float(old_m, STATE), to_float(old_v, STATE), to_float(old_v_max, STATE)
            m, v, v_max, second_moment = moments(p, to_float(g, PARAM), m, v, v_max, own, L2, AMSGRAD)
            if BITS and WIDE:
                frozen = flags_of(bits, start, here, first, share, WIDE, BLOCKS[WIDE])
            # Stored now, they leave registers for the divisions.
            if STATE == tl.uint8:
                new_m, new_v = encode_moments(m, v, moment_noise(seed, own_step, number, start, here))
            else:
                new_m = to_storage(m, here, STATE, False)
                new_v = to_storage(v, here, STATE, False)
            if BITS and WIDE:
                new_m = tl.where(frozen, old_m, new_m)
                new_v = tl.where(frozen, old_v, new_v)
            tl.store(m_ptr, new_m, mask=inside)
            tl.store(v_ptr, new_v, mask=inside)
            if AMSGRAD:
                new_v_max = encode_largest(v_max) if STATE == tl.uint8 else to_storage(v_max, here, STATE, False)
                if BITS and WIDE:
                    new_v_max = tl.where(frozen, old_v_max, new_v_max)
                tl.store(v_max_ptr, new_v_max, mask=inside)
            if ROUNDING == "stochastic":
                drawn = noise(seed, own_step, number, start, here, first, WIDE, BLOCKS[WIDE])
            p = update(p, m, second_moment, own)
            if ROUNDING == "remainder":
                new_p, new_remainder = to_remainder(p)
                if BITS and WIDE:
                    new_remainder = tl.where(frozen, old_remainder, new_remainder)
                tl.store(remainder_ptr, new_remainder, mask=inside)
            elif ROUNDING == "stochastic":
                new_p = to_storage(p, drawn, PARAM, True)
            else:
                new_p = to_storage(p, here, PARAM, False)
            if BITS and WIDE:
                new_p = tl.where(frozen, old_p, new_p)
            tl.store(p_ptr, new_p, mask=inside)


@triton.jit
def _scalars(row, multiplier):
    """The float32 words of a row of scalars, as `adamw` takes them."""
    grad_multiplier = tl.load(row).to(tl.float32, bitcast=True)
    if multiplier is not None:
        grad_multiplier = grad_multiplier * tl.load(multiplier)
    return (
        grad_multiplier,
        tl.load(row + 1).to(tl.float32, bitcast=True),
        tl.load(row + 2).to(tl.float32, bitcast=True),
        tl.load(row + 3).to(tl.float32, bitcast=True),
        tl.load(row + 4).to(tl.float32, bitcast=True),
        tl.load(row + 5).to(tl.float32, bitcast=True),
        tl.load(row + 6).to(tl.float32, bitcast=True),
        tl.load(row + 7).to(tl.float32, bitcast=True),
        tl.load(row + 8).to(tl.float32, bitcast=True),
        tl.load(row + 9).to(tl.float32, bitcast=True),
    )


@triton.jit
def _of_age(s, row_of_scalars, ages, there, inside):
    """``s`` with what depends on age of each element; and the elements' steps."""
    grad_multiplier, weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, bias2_sqrt, eps = s
    there = tl.where(inside, there, 0)
    age = tl.load(ages.to(tl.pointer_type(tl.uint16)) + there, mask=there < tl.where(ages != 0, 0x7FFFFFFF, 0), other=0)
    row = row_of_scalars + age.to(tl.int32) * _SCALAR_WORDS
    step_size = tl.load(row + 7).to(tl.float32, bitcast=True)
    bias2_sqrt = tl.load(row + 8).to(tl.float32, bitcast=True)
    own = (
        grad_multiplier, weight_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, bias2_sqrt,
        eps,
    )  # fmt: skip
    return own, tl.load(row + _STEP).to(tl.uint32, bitcast=True)


@triton.jit
def _data(addresses, tensor, start, count, DTYPE: tl.constexpr):
    """Address of a tile's first element, and how many elements it has: none where the tensor is missing."""
    data = tl.load(addresses + tensor)
    return data + start * size_of(DTYPE), tl.where(data != 0, count, 0)


@triton.jit
def _no_total(KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """What the totals of a block begin with: of eight neighbours only one is kept, but for squares, which are added as
    they are made. A float's magnitude orders as its bits do, and every NaN lies above infinity."""
    if WIDE and KIND == "sum_of_squares":
        totals = tl.zeros([BLOCK // 8, 8], tl.float64)
    else:
        totals = tl.zeros([BLOCK // 8 if WIDE else BLOCK], tl.int32 if KIND == "largest_absolute" else tl.float64)
    return totals


@triton.jit(do_not_specialize=["tiles", "parts", "addresses", "partial"])
def norm_kernel(
    tiles, parts, addresses, partial,
    DTYPE: tl.constexpr, KIND: tl.constexpr, FROZEN: tl.constexpr, LISTS: tl.constexpr, BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """One double per tile."""
    start, packed, tensor, part, count, at = tile_row(tiles)
    cols, packed_cols, bits, shared, gapless, ages = part_row(parts, part, at, start, packed, LISTS, BITS, False)
    data_at, count = _data(addresses, tensor, start, count, DTYPE)
    obstacles = (data_at & 15) | (count & 7) | cols
    if BITS:
        obstacles = obstacles | (start & 7)
    result = 0.0
    for WIDE in tl.static_range(2):
        total = _no_total(KIND, WIDE, BLOCKS[WIDE])
        share = share_of(obstacles == 0, count, WIDE)
        for first in range(0, share, BLOCKS[WIDE]):
            here, there, inside = places(first, share, cols, packed_cols, LISTS, WIDE, BLOCKS[WIDE])
            stored = tl.load(pointer_to(data_at, DTYPE, WIDE) + here, mask=inside, other=0)
            if BITS:
                inside = chosen_of(inside, bits, start, here, first, share, FROZEN, WIDE, BLOCKS[WIDE])
            magnitude = tl.where(inside, to_float(stored, DTYPE).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
            value = magnitude.to(tl.float32, bitcast=True).to(tl.float64)
            if KIND == "largest_absolute":
                total = tl.maximum(total, tl.max(magnitude, 1) if WIDE else magnitude)
            elif KIND == "sum_of_squares":
                total = tl.fma(value, value, total)  # the product is exact, so these are the bits of * and +
            else:
                total += tl.sum(value, 1) if WIDE else value
        if KIND == "largest_absolute":
            result += tl.max(total).to(tl.float32, bitcast=True)  # one of the two is 0
        else:
            result += tl.sum(total)
    tl.store(partial + tl.program_id(0), result)


@triton.jit
def _listed(tiles, parts, addresses, DTYPE: tl.constexpr, LISTS: tl.constexpr, BITS: tl.constexpr):
    """A tile of tensors without twins: its first place, how many elements it has, the address of the first, its lists
    and bits as `part_row` has them, and whether parts interleave."""
    start, packed, tensor, part, count, at = tile_row(tiles)
    cols, packed_cols, bits, shared, gapless, ages = part_row(parts, part, at, start, packed, LISTS, BITS, False)
    data_at, count = _data(addresses, tensor, start, count, DTYPE)
    return start, count, data_at, cols, packed_cols, bits, shared


@triton.jit(do_not_specialize=["tiles", "parts", "addresses", "factor"])
def scale_kernel(
    tiles, parts, addresses, factor,
    DTYPE: tl.constexpr, FROZEN: tl.constexpr, LISTS: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    start, count, data_at, cols, packed_cols, bits, shared = _listed(tiles, parts, addresses, DTYPE, LISTS, BITS)
    multiplier = tl.load(factor)
    count = tl.where((multiplier >= 1) == 0, count, 0)  # a multiplier of NaN is not 1 or more
    obstacles = (data_at & 15) | (count & 7) | cols
    if BITS:
        obstacles = obstacles | shared | (start & 7)
    for WIDE in tl.static_range(2):
        share = share_of(obstacles == 0, count, WIDE)
        for first in range(0, share, BLOCKS[WIDE]):
            here, there, inside = places(first, share, cols, packed_cols, LISTS, WIDE, BLOCKS[WIDE])
            if BITS:
                frozen = flags_of(bits, start, here, first, share, WIDE, BLOCKS[WIDE])
                if not WIDE:
                    inside = inside & (frozen == 0)
            pointer = pointer_to(data_at, DTYPE, WIDE) + here
            old = tl.load(pointer, mask=inside, other=0)
            new = to_storage(to_float(old, DTYPE) * multiplier, here, DTYPE, False)
            if BITS and WIDE:
                new = tl.where(frozen, old, new)
            tl.store(pointer, new, mask=inside)


@triton.jit(do_not_specialize=["tiles", "parts", "addresses"])
def zero_kernel(
    tiles, parts, addresses,
    DTYPE: tl.constexpr, FROZEN: tl.constexpr, LISTS: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    start, count, data_at, cols, packed_cols, bits, shared = _listed(tiles, parts, addresses, DTYPE, LISTS, BITS)
    obstacles = (data_at & 15) | (count & 7) | cols | bits
    for WIDE in tl.static_range(2):
        share = share_of(obstacles == 0, count, WIDE)
        for first in range(0, share, BLOCKS[WIDE]):
            here, there, inside = places(first, share, cols, packed_cols, LISTS, WIDE, BLOCKS[WIDE])
            if BITS and not WIDE:
                inside = chosen_of(inside, bits, start, here, first, share, FROZEN, WIDE, BLOCKS[WIDE])
            pointer = pointer_to(data_at, DTYPE, WIDE) + here
            tl.store(pointer, tl.zeros(inside.shape, pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tiles", "parts", "addresses"])
def copy_kernel(
    tiles, parts, addresses,
    DTYPE: tl.constexpr, GATHER: tl.constexpr, FROZEN: tl.constexpr, LISTS: tl.constexpr, BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    start, packed, tensor, part, count, at = tile_row(tiles)
    cols, packed_cols, bits, shared, gapless, ages = part_row(parts, part, at, start, packed, LISTS, BITS, False)
    data_at = tl.load(addresses + tensor * 2) + start * size_of(DTYPE)
    twin_at = tl.load(addresses + tensor * 2 + 1) + packed * size_of(DTYPE)
    obstacles = ((data_at | twin_at) & 15) | (count & 7) | cols | packed_cols | bits
    taken = count * 0
    for WIDE in tl.static_range(2):
        share = share_of(obstacles == 0, count, WIDE)
        for first in range(0, share, BLOCKS[WIDE]):
            here, there, inside = places(first, share, cols, packed_cols, LISTS, WIDE, BLOCKS[WIDE])
            if BITS and not WIDE:
                inside = chosen_of(inside, bits, start, here, first, share, FROZEN, WIDE, BLOCKS[WIDE])
                there, taken = held_places(there, gapless, inside, taken)
            data_ptr = pointer_to(data_at, DTYPE, WIDE) + here
            twin_ptr = pointer_to(twin_at, DTYPE, WIDE) + there
            if GATHER:
                tl.store(twin_ptr, tl.load(data_ptr, mask=inside, other=0), mask=inside)
            else:
                tl.store(data_ptr, tl.load(twin_ptr, mask=inside, other=0), mask=inside)


KERNELS: Final = {
    "adamw": adamw_kernel, "norm": norm_kernel, "scale": scale_kernel, "zero": zero_kernel, "copy": copy_kernel,
}  # fmt: skip
INTERPRETED: Final = not isinstance(adamw_kernel, triton.JITFunction)


# ------------------------------------------------------------------------------------------------ how it is compiled
#
# The memory bus wants some 40 KB on their way to each multiprocessor: four elements per thread, of every operand, are
# enough of that at 64 registers. Of operands 2 bytes wide it takes eight to fill an access. What does not fit into 64
# registers takes fewer.

DTYPES: Final = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, CODES: tl.uint8
}  # fmt: skip


def adamw_settings(
    param: torch.dtype, state: torch.dtype, *, rounding: str, l2: bool, amsgrad: bool, lists: int, bits: bool,
    ages: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compile-time parameters and launch options of `adamw_kernel`."""
    # as many as no Triton and no architecture of `make sass` lacks registers for
    busy = bits or ages or rounding != "nearest"
    most = amsgrad and state == CODES and rounding == "stochastic"
    busiest = most or (rounding == "stochastic" and param == torch.float16)
    halved = busy or lists == 2 or (lists and param == torch.float16)
    aged = ages and (param == torch.float32 or rounding == "remainder")
    narrow = 1 if busiest or aged or (amsgrad and rounding != "stochastic") else 2 if halved else 4
    few = amsgrad or busiest or (busy and state.itemsize <= 2) or (bits and rounding == "remainder")
    wide = 8 if param.itemsize == 2 and not few else 2 if most and (bits or ages) else 4
    return {
        "PARAM": DTYPES[param], "STATE": DTYPES[state], "ROUNDING": rounding, "L2": l2, "AMSGRAD": amsgrad,
        "LISTS": lists, "BITS": bits, "AGES": ages, "BLOCKS": _blocks(narrow, wide), **OPTIONS,
    }  # fmt: skip


def settings(dtype: torch.dtype, *, lists: int, bits: bool, **others: Any) -> dict[str, Any]:
    """Compile-time parameters and launch options of the other kernels, which have one or two operands."""
    wide = 8 if bits and others.get("KIND") == "sum_of_squares" else 32 // dtype.itemsize
    return {
        "DTYPE": DTYPES[dtype], "LISTS": lists, "BITS": bits, "BLOCKS": _blocks(4, wide),
        **others, **OPTIONS,
    }  # fmt: skip


def _blocks(narrow: int, wide: int) -> tuple[int, int]:
    """Elements a program has in flight in either walk, from those of a thread."""
    return narrow * THREADS, wide * THREADS


class Variant:
    """A kernel with compile-time parameters, compiled at its first launch for a device and for tensors of these dtypes.

    From then on the compiled kernel is launched itself: Triton would look it up by each argument's type, which takes it
    longer than the launch. No argument is specialised, so that nothing but its dtype, and whether it is None, counts.
    """

    def __init__(self, kernel: Any, settings: dict[str, Any]) -> None:
        self.kernel, self.settings = kernel, settings
        self._compiled: dict[Any, tuple[Any, ...]] = {}

    @staticmethod
    @functools.cache
    def of(operation: str, *dtypes: torch.dtype, **options: Any) -> "Variant":
        """The kernel of ``operation``, a key of `KERNELS`, as `adamw_settings` or `settings` has it."""
        make = adamw_settings if operation == "adamw" else settings
        return Variant(KERNELS[operation], make(*dtypes, **options))

    def launch(self, n_tiles: int, device: torch.device, tensors: Sequence[Tensor | None]) -> None:
        """Queue it on ``device``, the current one. ``tensors``: all arguments that are not compile-time parameters."""
        key = device, *[None if tensor is None else tensor.dtype for tensor in tensors]
        found = self._compiled.get(key)
        if found is not None:
            compiled, constants = found
            compiled[n_tiles, 1, 1](*tensors, *constants)
            return
        compiled = self.kernel[n_tiles, 1, 1](*tensors, **self.settings)
        if isinstance(compiled, CompiledKernel):  # else it is interpreted, or a hook of Triton's has it otherwise
            names = [name for name in self.kernel.arg_names if name in self.settings]
            self._compiled[key] = compiled, [self.settings[name] for name in names]


# ---------------------------------------------------------------------------------------------------- the backend


class _Table:
    """A small table on the device that follows the host: uploaded anew only where it changed, never waited for."""

    def __init__(self) -> None:
        self._content: bytes | None = None
        self._host: Tensor | None = None
        self._copy: Tensor | None = None
        self._captured: list[Any] = []  # what a CUDA graph copies from, and reads, at every replay

    def upload(self, content: bytes, device: torch.device) -> Tensor:
        """uint8 tensor on the device."""
        if device.type == "cpu":
            return torch.frombuffer(bytearray(content), dtype=torch.uint8)
        capturing = torch.cuda.is_current_stream_capturing()
        if self._copy is not None and content == self._content:
            if capturing:
                self._captured.append(self._copy)
            return self._copy
        source = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if capturing and self._host is not None and self._host.numel() == len(content):
            # No memory can be pinned now, but what was copied before the capture began has been copied.
            host = self._host.copy_(source)
            self._host = None
        else:
            host = source.pin_memory()
        copy = host.to(device, non_blocking=True)
        if capturing:  # nothing has been copied yet
            self._captured.append((host, copy))
        else:
            self._host, self._copy, self._content = host, copy, content
        return copy


class TritonBackend(GpuBackend):
    """Runs on GPU tensors; on CPU tensors if `INTERPRETED`."""

    name = "triton"

    def __init__(self) -> None:
        if not INTERPRETED and not torch.cuda.is_available():
            raise ImportError("no GPU was found (TRITON_INTERPRET=1 in the environment interprets the kernels)")
        self._tables: WeakKeyDictionary[Any, defaultdict[int, _Table]] = WeakKeyDictionary()  # of each stream its own

    def refusal(self, device: torch.device) -> str:
        if INTERPRETED:
            return "" if device.type == "cpu" else "it is interpreted (TRITON_INTERPRET=1) and takes CPU tensors only"
        return "" if device.type == "cuda" else "it takes GPU tensors only"

    def _upload(self, owner: object, device: torch.device, content: bytes) -> Tensor:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return self._tables.setdefault(owner, defaultdict(_Table))[stream].upload(content, device)

    def _step(
        self, launch: Launch, tables: Sequence[Tensor | None], seed: int, seed_there: Tensor, *,
        rounding: str, l2: bool, amsgrad: bool,
    ) -> None:  # fmt: skip
        work, state = launch.work, launch.state
        assert state is not None
        variant = Variant.of(
            "adamw", launch.dtype, state, rounding=rounding, l2=l2, amsgrad=amsgrad, lists=work.lists, bits=work.bits,
            ages=work.ages,
        )  # fmt: skip
        self._launch(variant, launch, *tables, seed_there)

    def _run(self, operation: str, launch: Launch, *tensors: Tensor, **options: Any) -> None:
        work, named = launch.work, {name.upper(): value for name, value in options.items()}
        variant = Variant.of(operation, launch.dtype, lists=work.lists, bits=work.bits, FROZEN=work.frozen, **named)
        self._launch(variant, launch, *tensors)

    def _launch(self, variant: Variant, launch: Launch, *tensors: Tensor | None) -> None:
        tiles = launch.tiles
        if len(tiles):
            with torch.cuda.device(tiles.device) if tiles.device.type == "cuda" else contextlib.nullcontext():
                variant.launch(len(tiles), tiles.device, (tiles, launch.work.parts, launch.rows, *tensors))

    def _partial_norms(self, n_tiles: int) -> int:
        return n_tiles

    def _total(self, partial: Tensor, kind: NormKind) -> Tensor:
        return partial.amax() if kind == "largest_absolute" else partial.sum()


def load() -> TritonBackend:
    """The backend; ImportError: it cannot run here, and why."""
    return TritonBackend()
