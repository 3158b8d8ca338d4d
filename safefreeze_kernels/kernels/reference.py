"""The specification: every operation in eager torch. Slow, exact, meant to be read.

Twin of csrc/arithmetic.h. Results equal the compiled backends' bit for bit because every line below is one IEEE
float32 operation per operator, rounded to nearest (norms are sums and agree to rounding). Float64 parameters, which no
compiled backend takes, go through the same lines in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from .operands import CODES, AdamWOperands, NormKind, host_scalars
from .parts import Part, WorkList


def adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, v_max: Tensor | None, s: Any, *, l2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One element-wise Adam(W) update in float32, or in float64 if the operands are: new ``p, m, v, v_max``. ``s``: see
    `_Scalars`."""
    g = g * s.grad_multiplier
    if l2:
        g = g + s.weight_decay * p
    m = s.beta1 * m + s.one_minus_beta1 * g
    v = s.beta2 * v + s.one_minus_beta2 * (g * g)
    second_moment = v
    if v_max is not None:
        second_moment = v_max = torch.maximum(v_max, v)
    p = s.decay * p - s.step_size * m / (_square_root(second_moment) / s.bias2_sqrt + s.eps)
    return p, m, v, v_max


def from_remainder(p: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master whose upper half, rounded to nearest, is the bfloat16 ``p``; zero and infinity that were
    written from outside have none with some remainders, and are their own masters."""
    stored, lower = p.view(torch.int16).int(), remainder.int() & 0xFFFF
    master = (stored - (lower >> 15) << 16 | lower).view(torch.float32)
    return torch.where(master.isnan(), (stored << 16).view(torch.float32), master)


def to_remainder(master: Tensor) -> tuple[Tensor, Tensor]:
    """``master`` as bfloat16, ties away from zero, and the remainder: its lower 16 bits."""
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32))
    return _low_half(bits + 0x8000 >> 16).view(torch.bfloat16), _low_half(bits)


def _low_half(bits: Tensor) -> Tensor:
    """The lower 16 bits of each int32, as int16; adding 0x8000 wraps around, as it must."""
    return (bits << 16 >> 16).to(torch.int16)


def round_stochastically(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """Float32 ``x`` rounded up or down to bfloat16 or float16, by 16-bit ``noise`` (int32) below the last bit kept."""
    bits = x.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = torch.where(x.isnan(), 0x7FC0, bits + noise >> 16)
        return _low_half(rounded).view(dtype)
    sign, magnitude = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
    normal = magnitude - (112 << 23) + (noise >> 3) >> 13
    exponent = magnitude >> 23
    shift = (126 - exponent).clamp(min=1).where(exponent >= 102, 31)
    significand = (magnitude & 0x007FFFFF | 0x00800000).where(exponent >= 102, 0)
    below = torch.where(shift > 16, noise << (shift - 16).clamp(min=0), noise >> (16 - shift).clamp(min=0))
    subnormal = significand + below.where(exponent >= 102, 0) >> shift
    rounded = torch.where(magnitude < 113 << 23, subnormal, normal).clamp(max=0x7C00)
    rounded = torch.where(magnitude >= 0x47800000, 0x7C00, rounded)
    rounded = torch.where(magnitude > 0x7F800000, 0x7E00, rounded)
    return _low_half(rounded | sign).view(dtype)


def noise_of(elements: Tensor, *, seed: int, step: int | Tensor, number: int) -> Tensor:
    """16 random bits (int32) for each element index of a tensor: Philox4x32-10, as in csrc/arithmetic.h. ``step``: of
    all elements, or of each."""
    group = elements >> 3
    word0, word1 = group & _WORD, group >> 32
    word2, word3 = torch.zeros_like(group) + step, torch.full_like(group, number)
    key0, key1 = seed & _WORD, seed >> 32
    for _ in range(10):
        product0, product1 = word0 * 0xD2511F53, word2 * 0xCD9E8D57  # int64 wraps, and keeps the right 64 bits
        word0, word1, word2, word3 = (
            (product1 >> 32 & _WORD) ^ word1 ^ key0,
            product1 & _WORD,
            (product0 >> 32 & _WORD) ^ word3 ^ key1,
            product0 & _WORD,
        )
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    words = torch.stack([word0, word1, word2, word3])
    word = words.gather(0, (elements >> 1 & 3)[None])[0]
    return (word >> 16 * (elements & 1) & 0xFFFF).int()


# Moments in 8 bits each: csrc/arithmetic.h says what the bits are. Words are int64 here.

TO_NEAREST: Final = 0x80080000


def decode_moments(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 ``m, v`` from the two bytes (uint8) of each element."""
    one = first.long()
    code, size = second.long() << 1 | one >> 7, one & 63
    bits = ((code + 128) << 21).where(code != 0, 0)
    v = _floats(torch.where(code > 509, 0x7F800000 + ((code - 510) << 22), bits))
    exponent, even = (code >> 3) + 76, torch.where(size < 8, 8, 0)
    value = _floats((size + even << 20) + (exponent << 23)) - _floats((exponent + 1 << 23).where(even != 0, 0))
    bits = torch.where(size > 61, 0x7F800000 + ((size - 62) << 22), _words(value))
    return _floats(bits | (one & 64) << 25), v


def encode_moments(m: Tensor, v: Tensor, noise: Tensor | int = TO_NEAREST) -> tuple[Tensor, Tensor]:
    """The two bytes (uint8) of float32 moments. ``noise``: int64 holding 32 random bits; default: to nearest."""
    v_bits, m_bits = _words(v), _words(m)
    m_size = m_bits & 0x7FFFFFFF
    code = ((v_bits + (noise >> 11) >> 21) - 128).clamp(1, 509).where(v_bits != 0, 0)
    code = torch.where(v_bits > 0x7F7FFFFF, 510 + (v_bits > 0x7F800000).long(), code)
    in_units = _floats(m_size) * _floats(174 - (code >> 3) << 23)
    even = torch.where(in_units < 0.125, 8, 0)
    size = ((_words(in_units + _floats(torch.where(even != 0, 0x3E000000, 0))) + (noise & 0xFFFFF)) >> 20) - 984 - even
    size = torch.where(m_size > 0x7F7FFFFF, 62 + (m_size > 0x7F800000).long(), size.clamp(max=61))
    sign = (m_bits >> 25 & 64).where(m_size <= 0x7F800000, 0)
    return ((code & 1) << 7 | sign | size).to(torch.uint8), (code >> 1).to(torch.uint8)


def decode_largest(code: Tensor) -> Tensor:
    """Float32 from the code (uint8) of the largest second moment so far."""
    word = code.long()
    bits = ((word + 64) << 22).where(word != 0, 0)
    return _floats(torch.where(word > 253, 0x7F800000 + ((word - 254) << 22), bits))


def encode_largest(value: Tensor) -> Tensor:
    """The code (uint8) of the largest second moment so far, to nearest."""
    bits = _words(value)
    code = ((bits + 0x200000 >> 22) - 64).clamp(1, 253).where(bits != 0, 0)
    return torch.where(bits > 0x7F7FFFFF, 254 + (bits > 0x7F800000).long(), code).to(torch.uint8)


def moment_noise(elements: Tensor, *, seed: int, step: int | Tensor, number: int) -> Tensor:
    """32 random bits (int64) for each element index of a tensor. ``step``: of all elements, or of each."""
    key = torch.tensor(seed & _WORD, device=elements.device)
    for more in (seed >> 32, number, step):
        key = _mix(key) + more & _WORD
    return (_mix(key) + (elements & _WORD) + (elements >> 32) * 0x9E3779B9 & _WORD) * 0x9E39E377 & _WORD


def _mix(x: Tensor) -> Tensor:
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD  # int64 wraps, and keeps the right 32 bits
    return x ^ x >> 16


def _words(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.int32).long() & _WORD


def _floats(words: Tensor) -> Tensor:
    return words.to(torch.int32).view(torch.float32)  # narrowing keeps the lower bits


def _square_root(x: Tensor) -> Tensor:
    # torch's vectorised CPU sqrt is up to one unit off; a double's root rounded to float32 is the correctly rounded one
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


_WORD: Final = 0xFFFFFFFF


class ReferenceBackend:
    name = "reference"

    def refusal(self, device: torch.device) -> str:
        return ""

    def adamw_(
        self, work: WorkList, operands: AdamWOperands, scalars: np.ndarray | Tensor, scalar_set: np.ndarray,
        *, l2: bool, amsgrad: bool, stochastic: bool = False, seed: int = 0, skip: Tensor | None = None,
        multiplier: Tensor | None = None,
    ) -> None:  # fmt: skip
        if skip is not None and skip.item() != 0:
            return
        rows = host_scalars(scalars, multiplier).view(np.recarray)
        moments = [operands.exp_avgs, operands.exp_avg_sqs, *([operands.max_exp_avg_sqs] if amsgrad else [])]
        trained = [None if g is None else p for p, g in zip(operands.params, operands.grads, strict=True)]
        for visit in _visits(work, trained):
            part, here = visit.part, visit.here
            param, own = operands.params[part.tensor], _Scalars(visit, rows, scalar_set)
            state = [tensors[part.tensor] for tensors in moments]  # type: ignore[index]
            old_p = visit.matrix[here]
            grad = operands.grads[part.tensor]
            assert grad is not None
            old_g = visit.packed(grad) if operands.grad_is_packed(part.tensor) else _matrix(grad, part)[here]
            old_state = [visit.packed(tensor) for tensor in state]
            exact = torch.float64 if param.dtype == torch.float64 else torch.float32
            coded = old_state[0].dtype == CODES
            if coded:
                m, v, *v_max = (*decode_moments(*old_state[:2]), *map(decode_largest, old_state[2:]))
            else:
                m, v, *v_max = (tensor.to(exact) for tensor in old_state)
            remainder = operands.remainders[part.tensor] if operands.remainders is not None else None
            master = old_p.to(exact)
            if remainder is not None:
                state.append(remainder)
                old_state.append(visit.packed(remainder))
                master = from_remainder(old_p, old_state[-1])
            p, m, v, new_v_max = adamw(master, old_g.to(exact), m, v, v_max[0] if amsgrad else None, own, l2=l2)
            rounds = remainder is None and stochastic and param.dtype != exact
            if coded or rounds:
                elements = torch.arange(param.numel(), device=param.device).view(part.shape)[here]
                number = operands.numbers[part.tensor] if operands.numbers else part.tensor
            if coded:
                noise = moment_noise(elements, seed=seed, step=own.step, number=number)
                new_state = [*encode_moments(m, v, noise), *([] if new_v_max is None else [encode_largest(new_v_max)])]
            else:
                moved = zip((m, v, new_v_max), old_state, strict=False)
                new_state = [t.to(old.dtype) for t, old in moved if t is not None]
            if remainder is not None:
                new_p, new_remainder = to_remainder(p)
                new_state.append(new_remainder)
            elif rounds:
                noise = noise_of(elements, seed=seed, step=own.step, number=number)
                new_p = round_stochastically(p, param.dtype, noise)
            else:
                new_p = p.to(param.dtype)
            visit.matrix[here] = visit.blend(new_p, old_p)
            for tensor, new in zip(state, new_state, strict=True):
                visit.put_packed(tensor, new)

    def norm(self, work: WorkList, tensors: Sequence[Tensor | None], kind: NormKind) -> Tensor:
        device = next((tensor.device for tensor in tensors if tensor is not None), None)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for visit in _visits(work, tensors):
            chosen = visit.values()
            values = chosen.to(torch.complex128 if chosen.is_complex() else torch.float64).abs()
            if kind != "largest_absolute":
                total = total + (values * values if kind == "sum_of_squares" else values).sum()
            elif values.numel():
                total = torch.maximum(total, values.max())
        return total

    def scale_(self, work: WorkList, tensors: Sequence[Tensor | None], factor: Tensor) -> None:
        if not (value := factor.item()) >= 1.0:
            for visit in _visits(work, tensors):
                old = visit.matrix[visit.here]
                visit.matrix[visit.here] = visit.blend(_scaled(old, value), old)

    def zero_(self, work: WorkList, tensors: Sequence[Tensor | None]) -> None:
        for visit in _visits(work, tensors):
            old = visit.matrix[visit.here]
            visit.matrix[visit.here] = visit.blend(torch.zeros_like(old), old)

    def gather(self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        for visit in _visits(work, tensors):
            visit.put_packed(packed[visit.part.tensor], visit.matrix[visit.here])

    def scatter_(self, work: WorkList, tensors: Sequence[Tensor | None], packed: Sequence[Tensor]) -> None:
        for visit in _visits(work, tensors):
            old = visit.matrix[visit.here]
            visit.matrix[visit.here] = visit.blend(visit.packed(packed[visit.part.tensor]), old)


class _Visit:
    """What a part of a list has of one age of rows, seen from a tensor: its ``matrix``, the places ``here`` in that,
    and which of them the list visits: ``chosen``, bool [rows, cols]; None: all."""

    def __init__(self, index: int, age: int, part: Part, frozen: bool, tensor: Tensor) -> None:
        self.index, self.age, self.part, self.matrix = index, age, part, _matrix(tensor, part)
        self.here = _places(part.rows, part.cols, tensor.device)
        self._there = _places(part.packed_rows, part.packed_cols, tensor.device)
        self.chosen: Tensor | None = None
        if part.frozen_bits is not None:
            flags = torch.from_numpy(part.frozen_flags()).to(tensor.device)
            self.chosen = flags if frozen else ~flags

    def values(self) -> Tensor:
        """What the list visits."""
        values = self.matrix[self.here]
        return values if self.chosen is None else values[self.chosen]

    def blend(self, new: Tensor, old: Tensor) -> Tensor:
        """``new`` where the list visits, else ``old``."""
        return new if self.chosen is None else torch.where(self.chosen, new, old)

    def packed(self, twin: Tensor) -> Tensor:
        """What ``twin`` holds for ``here``; 0 for what the list does not visit."""
        if not self.part.gapless:
            return self._in_twin(twin)[self._there]
        found = twin.new_zeros(self.chosen.shape)  # type: ignore[union-attr]
        found[self.chosen] = self._in_twin(twin)
        return found

    def put_packed(self, twin: Tensor, new: Tensor) -> None:
        """Have ``twin`` hold ``new`` of what the list visits; the rest stays as it is."""
        if self.part.gapless:
            self._in_twin(twin)[:] = new[self.chosen]
        else:
            self._in_twin(twin)[self._there] = self.blend(new, self.packed(twin))

    def _in_twin(self, twin: Tensor) -> Tensor:
        """The part's share of a packed twin: its matrix or, of a gapless one, its elements."""
        twin, part = twin.detach().view(-1), self.part
        if part.gapless:
            assert self.chosen is not None
            return twin[part.packed_start :][: int(self.chosen.sum())]
        n_rows = part.shape[0] if part.rows is None else part.rows.size
        end = None if part.packed_rows is not None else part.packed_start + n_rows * part.packed_width
        return twin[part.packed_start : end].view(-1, part.packed_width)


def _visits(work: WorkList, tensors: Sequence[Tensor | None]) -> Iterator[_Visit]:
    for index, age, part in work.by_age():
        tensor = tensors[part.tensor]
        if tensor is not None:
            yield _Visit(index, age, part, work.frozen, tensor)


def _scaled(values: Tensor, factor: float) -> Tensor:
    """Product, computed in float32 or, of float64 and complex128, in float64. Parts of a complex number are scaled each
    by itself: a product of complex numbers would spread an infinity."""
    if values.is_complex():
        return torch.view_as_complex(torch.view_as_real(values) * factor)
    return values * factor if values.dtype == torch.float64 else (values.float() * factor).to(values.dtype)


_OF_AGE: Final = ("step_size", "bias2_sqrt")


class _Scalars:
    """The scalars of a visit's elements, as Python floats, which hold them exactly and keep torch from promoting; what
    depends on age as tensors (a Python float's reciprocal might be multiplied by), [rows, cols] where ages differ."""

    step: Tensor

    def __init__(self, visit: _Visit, rows: np.ndarray, scalar_set: np.ndarray) -> None:
        part, first = visit.part, int(scalar_set[visit.index]) + visit.age
        row = rows[first]
        for name in row.dtype.names:
            setattr(self, name, float(row[name]))
        own = np.asarray(first)
        if part.ages is not None:
            ages = visit.packed(torch.from_numpy(part.ages.astype(np.int64)).to(visit.matrix.device))
            own = first + ages.cpu().numpy()
        for name, values in (*((name, rows[name]) for name in _OF_AGE), ("step", rows["step"].astype(np.int64))):
            setattr(self, name, torch.from_numpy(np.asarray(values[own])).to(visit.matrix.device))


def _matrix(tensor: Tensor, part: Part) -> Tensor:
    return tensor.detach().view(part.shape)


def _places(rows: np.ndarray | None, cols: np.ndarray | None, device: torch.device) -> Any:
    """Where rows meet columns in a matrix, as an index."""
    row, col = (slice(None) if index is None else torch.tensor(index, device=device) for index in (rows, cols))
    return (row[:, None], col[None, :]) if rows is not None and cols is not None else (row, col)  # type: ignore[index]


def load() -> ReferenceBackend:
    """The backend, which runs everywhere."""
    return ReferenceBackend()
