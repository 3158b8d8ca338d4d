"""What instructions of PTX compute, on numpy arrays with an entry per thread: for tests/helpers/ptx_decoder.py."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np

SHARED_WINDOW: Final = np.uint64(1 << 62)  # where generic addresses of shared memory begin
UNSIGNED: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: Final = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_FLOATS: Final = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_NANS: Final = {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}


class FaultError(RuntimeError):
    """A kernel did what it must not, or what is not known here."""


def type_of(name: str) -> np.dtype[Any]:
    """The numpy dtype of a PTX type; pairs of numbers are bits."""
    if name in _FLOATS:
        return np.dtype(_FLOATS[name])
    if name == "pred":
        return np.dtype(bool)
    found = re.fullmatch(r"([usbf]+)(\d+)(x2)?", name)
    if found is None or int(found[2]) not in (8, 16, 32, 64):
        raise KeyError(name)
    width = int(found[2]) // 8 * (2 if found[3] else 1)
    return np.dtype((SIGNED if found[1] == "s" else UNSIGNED)[width])


def bits_of(value: Any) -> Any:
    return value.view(UNSIGNED[value.itemsize])


# ------------------------------------------------------------------------------------------------------- arithmetic


def _hardware_nan(value: Any) -> Any:
    """Every NaN as the one that the hardware computes."""
    wrong = value != value
    if np.any(wrong):
        value = np.where(wrong, np.array(_NANS[value.itemsize], UNSIGNED[value.itemsize]).view(value.dtype), value)
    return value


def computed(of: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: _hardware_nan(of(*values))


def _fma(a: Any, b: Any, c: Any) -> Any:
    """Rounded once. Of float32 the sum in double is rounded to odd before; of doubles the product must be exact."""
    if a.dtype == np.float64:
        if not np.array_equal(a.astype(np.longdouble) * b, a * b, equal_nan=True):
            raise FaultError("fma of doubles whose product is rounded is not known here")
        return a * b + c
    product, other = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + other
    part = total - product
    error = (product - (total - part)) + (other - part)
    words = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (words & 1 == 0)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, words + toward, words).view(np.float64).astype(np.float32)


def _wide(of: Callable[..., Any]) -> Callable[..., Any]:
    """In numbers twice as wide."""

    def run(a: Any, b: Any) -> Any:
        kind = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[a.itemsize * 2]
        return of(a.astype(kind), b.astype(kind))

    return run


def _high(a: Any, b: Any) -> Any:
    product = _wide(operator.mul)(a, b)
    return (product >> product.dtype.type(8 * a.itemsize)).astype(a.dtype)


def _divide(a: Any, b: Any) -> Any:
    if a.dtype.kind == "i":
        raise FaultError("division of signed integers is not known here")
    return np.where(b == 0, np.iinfo(a.dtype).max, a // np.maximum(b, 1).astype(a.dtype)).astype(a.dtype)


def _shift(of: Callable[..., Any], a: Any, by: Any) -> Any:
    width = 8 * a.itemsize
    if a.dtype.kind == "i":
        return of(a, np.minimum(by, width - 1).astype(a.dtype))
    return np.where(by >= width, a.dtype.type(0), of(a, np.minimum(by, width - 1).astype(a.dtype)))


def _extract(a: Any, at: Any, count: Any) -> Any:
    """bfe"""
    width = 8 * a.itemsize
    at, count = np.int64(at) & 255, np.int64(count) & 255
    if np.any(count == 0) or np.any(at + count > width) or np.any(at > width - 1):
        raise FaultError("bfe of bits that are not there is not known here")
    up = (width - at - count).astype(a.dtype)
    return (a << up) >> (width - count).astype(a.dtype)


def _insert(a: Any, b: Any, at: Any, count: Any) -> Any:
    """bfi: the low bits of a, put into b."""
    kind = b.dtype.type
    mask = ((1 << int(count)) - 1) << int(at)
    if int(at) + int(count) > 8 * b.itemsize:
        raise FaultError("bfi past the end is not known here")
    return (b & kind(~mask & ((1 << 8 * b.itemsize) - 1))) | ((a << kind(at)) & kind(mask))


def _permute(a: Any, b: Any, selector: Any) -> Any:
    """prmt: bytes of the pair a, b."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros((), np.uint32)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64))).astype(np.uint8)
        byte = np.where(choice & np.uint32(8), np.where(byte >> np.uint8(7), np.uint8(255), np.uint8(0)), byte)
        result = result | byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _funnel(left: bool, clamp: bool, a: Any, b: Any, by: Any) -> Any:
    """shf: of the 64 bits whose upper half is b."""
    by = np.minimum(by, np.uint32(32)) if clamp else by & np.uint32(31)
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    moved = _shift(operator.lshift, both, by) >> np.uint64(32) if left else both >> by.astype(np.uint64)
    return moved.astype(np.uint32)


def _logic(a: Any, b: Any, c: Any, table: Any) -> Any:
    """lop3: the table's bit for each triple of bits."""
    result = np.zeros((), np.uint32)
    for i in range(8):
        if int(table) >> i & 1:
            result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _reverse(a: Any) -> Any:
    swapped = np.atleast_1d(a).astype(">u4").view(np.uint8).reshape(-1, 4)
    return (
        np.packbits(np.unpackbits(swapped, axis=1)[:, ::-1], axis=1).view(">u4").astype(np.uint32).reshape(np.shape(a))
    )


def pairs_of(of: Callable[..., Any]) -> Callable[..., Any]:
    """Two float32 in 64 bits."""
    return lambda *words: computed(of)(*(np.atleast_1d(w).view(np.float32) for w in words)).view(np.uint64)


COMPARE: Final = {
    "eq": operator.eq, "ne": lambda a, b: (a < b) | (a > b), "lt": operator.lt, "le": operator.le, "gt": operator.gt,
    "ge": operator.ge, "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": operator.ne, "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip
BITWISE: Final = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
REDUCE: Final = {"add": np.add, "min": np.minimum, "max": np.maximum, **BITWISE}

# By opcode without its type: functions of operands that all have that type,
INTEGER: Final[dict[str, Callable[..., Any]]] = {
    **BITWISE, "not": operator.invert, "add": operator.add, "sub": operator.sub, "mul.lo": operator.mul,
    "div": _divide, "neg": lambda a: a.dtype.type(0) - a, "abs": np.abs, "min": np.minimum, "max": np.maximum,
    "mul.wide": _wide(operator.mul), "mul.hi": _high, "mad.lo": lambda a, b, c: a * b + c, "brev": _reverse,
    "prmt": _permute, "lop3": _logic, "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
    **{f"shf.{way}.{how}": partial(_funnel, way == "l", how == "clamp") for way in "lr" for how in ("wrap", "clamp")},
}  # fmt: skip
FLOAT: Final[dict[str, Callable[..., Any]]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div.rn": operator.truediv, "sqrt.rn": np.sqrt,
    "rcp.rn": lambda a: a.dtype.type(1) / a, "fma.rn": _fma, "min": np.fmin, "max": np.fmax,
}  # fmt: skip
FLOAT |= {f"{name}.rn": FLOAT[name] for name in ("add", "sub", "mul")}
SIGNS: Final[dict[str, Callable[..., Any]]] = {"neg": operator.neg, "abs": np.abs}
# and some whose operands are of other types: shift amounts, places of bits.
MIXED: Final[dict[str, tuple[Callable[..., Any], tuple[str, ...]]]] = {
    "shl": (partial(_shift, operator.lshift), ("", "u32")), "shr": (partial(_shift, operator.rshift), ("", "u32")),
    "bfe": (_extract, ("", "u32", "u32")), "bfi": (_insert, ("", "", "u32", "u32")),
    "selp": (lambda a, b, p: np.where(p, a, b), ("", "", "pred")),
    "mad.wide": (lambda a, b, c: _wide(operator.mul)(a, b) + c, ("", "", "wide")),
    "mad.hi": (lambda a, b, c: _high(a, b) + c, ("", "", "")),
}  # fmt: skip


def to_16_bits(value: Any, kind: str, how: str) -> Any:
    """float32 as bf16 or f16; ``how``: rn, or for bf16 rz."""
    if kind == "f16":
        if how != "rn":
            raise KeyError(how)
        return bits_of(_hardware_nan(value.astype(np.float16)))
    words = bits_of(value)
    up = {"rn": np.uint32(0x7FFF) + (words >> np.uint32(16) & np.uint32(1)), "rz": np.uint32(0)}[how]
    return np.where(value != value, np.uint16(0x7FFF), ((words + up) >> np.uint32(16)).astype(np.uint16))


def convert(value: Any, source: str, target: str, how: str) -> Any:
    """cvt: ``value`` of type ``source`` (bits, where it is bf16); ``how``: the rounding, or empty.

    Raises:
        KeyError: that conversion is not known here.
    """
    if target == "bf16" or (target, source) == ("f16", "f32"):
        if source != "f32":
            raise KeyError(source)
        return to_16_bits(value, target, how)
    if source == "bf16":
        if target != "f32":
            raise KeyError(target)
        return (value.astype(np.uint32) << np.uint32(16)).view(np.float32)
    to, of = type_of(target), type_of(source)
    if of.kind == "f" and to.kind != "f":
        rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how](value.astype(np.float64))
        if to.itemsize == 8:
            raise KeyError(target)
        limits = np.iinfo(to)
        return np.where(rounded != rounded, 0, np.clip(rounded, limits.min, limits.max)).astype(to)
    exact = (of.kind != "f" and to.kind != "f") or (of.kind == to.kind == "f" and to.itemsize > of.itemsize)
    if how != ("" if exact else "rn"):
        raise KeyError(how)
    return _hardware_nan(value.astype(to)) if to.kind == "f" else value.astype(to)
