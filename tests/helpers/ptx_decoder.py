"""Statements of PTX as functions, for tests/helpers/ptx.py.

Registers hold bits, as unsigned integers of their width; predicates are bool. A `Decoder` makes of a statement a
function of the machine and of the threads that execute it: all (None), or those whose indices it is given.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from ptx_operations import (
    BITWISE,
    COMPARE,
    FLOAT,
    INTEGER,
    MIXED,
    REDUCE,
    SHARED_WINDOW,
    SIGNED,
    SIGNS,
    UNSIGNED,
    FaultError,
    bits_of,
    computed,
    convert,
    pairs_of,
    to_16_bits,
    type_of,
)

Some = Any  # which threads: int64 indices in order, or None: all
Get = Callable[[Any, Some], Any]
Step = Callable[[Any, Some], None]


def _where(some: Some, chosen: Any, machine: Any) -> Some:
    """Those of some threads whose flag is set."""
    if chosen.all():
        return some
    return (machine.all if some is None else some)[chosen]


class Decoder:
    """Makes functions of the statements of one kernel."""

    def __init__(self, kernel: Any, code: Any) -> None:
        self.kernel, self.code = kernel, code
        self.words = code.opcode.split(".")
        self.operands: tuple[str, ...] = code.operands

    def unknown(self, what: str = "this is not known here") -> FaultError:
        return FaultError(f"{self.kernel.name}, line {self.code.line}: {self.code.text}: {what}")

    def step(self) -> Step:
        """
        Raises:
            FaultError: the statement is not known.
        """
        name = self.words[0]
        try:
            made: Step = getattr(self, f"_{name}", self._compute)()
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise self.unknown(f"this is not known here ({error})") from error
        if not self.code.guard or name == "bra":
            return made
        flag = self._flag(self.code.guard)

        def guarded(machine: Any, some: Some) -> None:
            chosen = _where(some, flag(machine, some), machine)
            if chosen is None or chosen.size:
                made(machine, chosen)

        return guarded

    # -------------------------------------------------------------------------------------------------- operands

    def get(self, text: str, kind: str) -> Get:
        """An operand as numbers of a type: of the lower bits, where its register is wider."""
        dtype = type_of(kind)
        if found := self.kernel.register(text):
            number, width = found
            if (kind == "pred") != (width == 0) or dtype.itemsize > max(width, 1):
                raise KeyError(text)
            whole, narrow = UNSIGNED.get(width, bool), width > dtype.itemsize
            unsigned = UNSIGNED[dtype.itemsize]

            def read(machine: Any, some: Some) -> Any:
                values = machine.reg(number, width)
                if some is not None:
                    values = values[some]
                if narrow:
                    values = values.astype(unsigned)
                return values if dtype == whole else values.view(dtype)

            return read
        if text.startswith("%"):
            if kind not in ("u32", "b32"):
                raise KeyError(text)

            def read_special(machine: Any, some: Some) -> Any:
                if text not in machine.special:
                    raise self.unknown(f"{text} is not known here")
                values = machine.special[text]
                return values[some] if some is not None and np.ndim(values) else values

            return read_special
        constant = self._constant(text, dtype)
        return lambda machine, some: constant

    def _constant(self, text: str, dtype: np.dtype[Any]) -> Any:
        if found := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}(?:[0-9a-fA-F]{8})?)", text):
            word = np.array(int(found[1], 16), UNSIGNED[len(found[1]) // 2])
            if word.itemsize != dtype.itemsize:
                raise KeyError(text)
            return word.view(dtype)[()]
        if dtype.kind == "f":
            return dtype.type(float(text))
        if dtype.kind == "b":
            return np.bool_(int(text))
        symbol = self.kernel.symbol(text)
        value = symbol if symbol is not None else int(text.rstrip("U"), 0)
        return np.array(value & ((1 << 8 * dtype.itemsize) - 1), UNSIGNED[dtype.itemsize]).view(dtype)[()]

    def put(self, text: str) -> Callable[[Any, Some, Any], None]:
        """Stores numbers in a register: signed ones with their sign where it is wider."""
        if text == "_":
            return lambda machine, some, values: None
        found = self.kernel.register(text)
        if found is None:
            raise KeyError(text)
        number, width = found

        def write(machine: Any, some: Some, values: Any) -> None:
            if width:
                if values.itemsize != width:
                    if values.itemsize > width or values.dtype.kind == "f":
                        raise self.unknown(f"{values.dtype} in {text}")
                    values = values.astype((SIGNED if values.dtype.kind == "i" else UNSIGNED)[width])
                if values.dtype != UNSIGNED[width]:
                    values = values.view(UNSIGNED[width])
            elif values.dtype != bool:
                raise self.unknown(f"{values.dtype} in {text}")
            held = machine.reg(number, width)
            if some is not None:
                held[some] = values
            elif np.ndim(values) == 0:
                held[:] = values
            else:
                machine.r[number] = values

        return write

    def _flag(self, text: str) -> Get:
        get = self.get(text.lstrip("!"), "pred")
        return (lambda machine, some: ~get(machine, some)) if text.startswith("!") else get

    def _list(self, text: str) -> list[str]:
        return re.findall(r"[^{},\s]+", text)

    def _apply(self, of: Callable[..., Any], kinds: tuple[str, ...]) -> Step:
        put = self.put(self.operands[0])
        gets = [self.get(text, kind) for text, kind in zip(self.operands[1:], kinds, strict=True)]

        def run(machine: Any, some: Some) -> None:
            put(machine, some, of(*[get(machine, some) for get in gets]))

        return run

    # ------------------------------------------------------------------------------------------- by first word

    def _compute(self) -> Step:
        *name, kind = self.words
        if name[-1] in ("sync",):
            raise KeyError(name[-1])
        joined = ".".join(name)
        if joined in MIXED:
            of, kinds = MIXED[joined]
            wide = kind[0] + str(2 * int(kind[1:])) if "wide" in kinds else ""
            return self._apply(of, tuple({"": kind, "wide": wide}.get(other, other) for other in kinds))
        if kind == "f32x2":
            return self._apply(pairs_of(FLOAT[joined]), ("b64",) * (len(self.operands) - 1))
        if kind.startswith("f"):
            of = SIGNS[joined] if joined in SIGNS else computed(FLOAT[joined])
            if joined == "fma.rn" and kind not in ("f32", "f64"):
                raise KeyError(kind)
        else:
            of = INTEGER[joined]
        kinds = (kind,) * (len(self.operands) - 1)
        return self._apply(of, ("b32",) * len(kinds) if joined in ("lop3", "prmt") else kinds)

    def _mov(self) -> Step:
        (_, kind), (to, of) = self.words, self.operands
        if to.startswith("{"):
            parts = self._list(to)
            width = type_of(kind).itemsize // len(parts)
            get, puts = self.get(of, kind), [self.put(part) for part in parts]

            def unpack(machine: Any, some: Some) -> None:
                words = get(machine, some)
                for i, put in enumerate(puts):
                    put(machine, some, (words >> words.dtype.type(8 * width * i)).astype(UNSIGNED[width]))

            return unpack
        if of.startswith("{"):
            parts = self._list(of)
            whole = UNSIGNED[type_of(kind).itemsize]
            width = type_of(kind).itemsize // len(parts)
            gets, put = [self.get(part, f"b{8 * width}") for part in parts], self.put(to)

            def pack(machine: Any, some: Some) -> None:
                words = [g(machine, some).astype(whole) << whole(8 * width * i) for i, g in enumerate(gets)]
                put(machine, some, reduce(operator.or_, words))

            return pack
        return self._apply(lambda a: a.copy(), (kind,))

    def _cvta(self) -> Step:
        """Addresses of global memory are what they are; those of shared memory lie in a window."""
        to, space = "to" in self.words, self.words[-2]
        if space == "global" or space == "param":
            return self._apply(lambda a: a.copy(), ("u64",))
        if space != "shared":
            raise KeyError(space)
        return self._apply(lambda a: a - SHARED_WINDOW if to else a + SHARED_WINDOW, ("u64",))

    def _cvt(self) -> Step:
        *how, target, source = self.words[1:]
        if len(how) > 1 or (how and how[0] not in ("rn", "rz", "rni", "rzi", "rmi", "rpi")):
            raise KeyError(how)
        rounding = how[0] if how else ""
        if target.endswith("x2"):

            def both(high: Any, low: Any) -> Any:
                words = [to_16_bits(v, target[:-2], rounding).astype(np.uint32) for v in (low, high)]
                return words[0] | words[1] << np.uint32(16)

            return self._apply(both, (source, source))
        return self._apply(lambda a: convert(a, source, target, rounding), ("b16" if source == "bf16" else source,))

    def _setp(self) -> Step:
        comparison, *combined, kind = self.words[1:]
        compare = operator.ne if comparison == "ne" and not kind.startswith("f") else COMPARE[comparison]
        puts = [self.put(text) for text in self.operands[0].split("|")]
        one, other = (self.get(text, kind) for text in self.operands[1:3])
        combine, flag = (BITWISE[combined[0]], self._flag(self.operands[3])) if combined else (None, None)

        def run(machine: Any, some: Some) -> None:
            found = np.asarray(compare(one(machine, some), other(machine, some)))
            results = [found, ~found]
            if combine is not None and flag is not None:
                results = [combine(result, flag(machine, some)) for result in results]
            for put, result in zip(puts, results, strict=False):
                put(machine, some, result)

        return run

    # ------------------------------------------------------------------------------------------ memory and control

    def _memory(self) -> tuple[str, str, int, str, Get]:
        """Space ("" for generic), type, how many, the other operand, and the address."""
        words = [word.split("::")[0] for word in self.words[1:]]
        known = ("global", "shared", "param", "const", "local")
        space = next((word for word in words if word in known), "")
        counts = [int(word[1]) for word in words if re.fullmatch(r"v\d", word)]
        ignored = (
            "volatile",
            "weak",
            "relaxed",
            "cta",
            "gpu",
            "sys",
            "ca",
            "cg",
            "cs",
            "lu",
            "cv",
            "wb",
            "wt",
            "nc",
            "L1",
            "L2",
        )
        if any(word not in (*known, *ignored) and not re.fullmatch(r"v\d", word) for word in words[:-1]):
            raise KeyError(words)
        if space in ("const", "local"):
            raise KeyError(space)
        address, other = (self.operands[1], self.operands[0]) if self.words[0] == "ld" else self.operands[:2]
        found = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", address)
        if found is None:
            raise KeyError(address)
        more = np.uint64(int(found[2] or "0", 0) & (2**64 - 1))
        register = self.kernel.register(found[1])
        base = self.get(found[1], "u32" if register and register[1] == 4 else "u64")
        return (
            space,
            words[-1],
            (counts or [1])[0],
            other,
            lambda m, some: np.asarray(base(m, some)).astype(np.uint64) + more,
        )

    def _ld(self) -> Step:
        space, kind, count, into, at = self._memory()
        dtype = type_of(kind)
        puts = [self.put(text) for text in (self._list(into) if into.startswith("{") else [into])]
        if len(puts) != count:
            raise KeyError(into)

        def load(machine: Any, some: Some, where: str, addresses: Any) -> None:
            index, words = machine.access(where, some, addresses, dtype.itemsize, count, False, self.code)
            for i, put in enumerate(puts):
                put(machine, some, words[index + i].view(dtype))

        return self._by_space(space, at, load)

    def _st(self) -> Step:
        space, kind, count, of, at = self._memory()
        dtype = type_of(kind)
        gets = [self.get(text, kind) for text in (self._list(of) if of.startswith("{") else [of])]
        if len(gets) != count:
            raise KeyError(of)

        def store(machine: Any, some: Some, where: str, addresses: Any) -> None:
            index, words = machine.access(where, some, addresses, dtype.itemsize, count, True, self.code)
            for i, get in enumerate(gets):
                words[index + i] = bits_of(np.asarray(get(machine, some)))

        return self._by_space(space, at, store)

    def _by_space(self, space: str, at: Get, access: Callable[[Any, Some, str, Any], None]) -> Step:
        if space:
            return lambda machine, some: access(machine, some, space, at(machine, some))

        def generic(machine: Any, some: Some) -> None:
            addresses = np.broadcast_to(at(machine, some), machine.n if some is None else some.size)
            shared = addresses >= SHARED_WINDOW
            for flags, where, base in ((shared, "shared", SHARED_WINDOW), (~shared, "global", np.uint64(0))):
                if flags.any():
                    access(machine, _where(some, flags, machine), where, addresses[flags] - base)

        return generic

    def _bra(self) -> Step:
        target = self.kernel.labels[self.operands[0]]
        flag = self._flag(self.code.guard) if self.code.guard else None

        def branch(machine: Any, some: Some) -> None:
            threads = machine.all if some is None else some
            if flag is None:
                machine.target = threads[:0], (target, threads)
            else:
                taken = flag(machine, some)
                machine.target = threads[~taken], (target, threads[taken])

        return branch

    def _ret(self) -> Step:
        def leave(machine: Any, some: Some) -> None:
            threads = machine.target[0]
            machine.target = (threads[:0] if some is None else np.setdiff1d(threads, some)), None

        return leave

    _exit = _ret

    def _bar(self) -> Step:
        if self.words[1:] not in (["sync"], ["cta", "sync"]) or self.operands != ("0",) or self.code.guard:
            raise KeyError(self.code.text)

        def wait(machine: Any, some: Some) -> None:
            machine.wait(machine.next, machine.target[0])
            machine.target = machine.all[:0], None

        return wait

    _barrier = _bar

    # ------------------------------------------------------------------------------------------------ among lanes

    def _warps(self, machine: Any, some: Some, mask: Any) -> None:
        """All lanes of each warp must be here."""
        whole = some is None or (
            some.size % 32 == 0 and np.array_equal(some, (some[::32, None] + np.arange(32)).ravel())
        )
        if not whole or np.any(np.asarray(mask) != np.uint32(0xFFFFFFFF)):
            raise self.unknown("lanes of the warp have diverged, or are not meant")

    def _shfl(self) -> Step:
        _, sync, how, _ = self.words
        to, value, lane, clamp, members = self.operands
        puts = [self.put(text) for text in to.split("|")]
        gets = [self.get(text, "b32") for text in (value, lane, clamp, members)]
        if sync != "sync":
            raise KeyError(sync)

        def run(machine: Any, some: Some) -> None:
            values, by, bounds, mask = (get(machine, some) for get in gets)
            self._warps(machine, some, mask)
            me = np.arange(32)
            by, bounds = int(by), int(bounds)  # the same in every lane
            segment, limit = bounds >> 8 & 31, bounds & 31
            last = (me & segment) | (limit & ~segment)
            of = {"up": me - by, "down": me + by, "bfly": me ^ by, "idx": (me & segment) | (by & ~segment)}[how]
            inside = of >= last if how == "up" else of <= last
            results = np.broadcast_to(values, machine.n if some is None else some.size).reshape(-1, 32)
            results = results[:, np.where(inside, of, me)].ravel()
            for put, result in zip(puts, (results, np.tile(inside, results.size // 32)), strict=False):
                put(machine, some, result)

        return run

    def _redux(self) -> Step:
        _, sync, how, kind = self.words
        put, get, members = (
            self.put(self.operands[0]),
            self.get(self.operands[1], kind),
            self.get(self.operands[2], "b32"),
        )
        of = REDUCE[how]
        of = of if isinstance(of, np.ufunc) else getattr(np, f"bitwise_{how}")
        if sync != "sync":
            raise KeyError(sync)

        def run(machine: Any, some: Some) -> None:
            self._warps(machine, some, members(machine, some))
            values = np.broadcast_to(get(machine, some), machine.n if some is None else some.size).reshape(-1, 32)
            put(machine, some, np.repeat(of.reduce(values, axis=1, dtype=values.dtype), 32))

        return run

    def _vote(self) -> Step:
        _, sync, how, _ = self.words
        put, flag, members = self.put(self.operands[0]), self._flag(self.operands[1]), self.get(self.operands[2], "b32")
        if sync != "sync":
            raise KeyError(sync)
        of = {
            "any": lambda f: f.any(1), "all": lambda f: f.all(1), "uni": lambda f: f.all(1) | ~f.any(1),
            "ballot": lambda f: np.packbits(f, axis=1, bitorder="little").view(np.uint32)[:, 0],
        }[how]  # fmt: skip

        def run(machine: Any, some: Some) -> None:
            self._warps(machine, some, members(machine, some))
            put(machine, some, np.repeat(of(flag(machine, some).reshape(-1, 32)), 32))

        return run
