"""Which weights of a model are chosen together, and the plan that values of them make.

A *grain* says how fine weights are chosen: whole units, rows, or single elements. What is chosen together is a group.
Values come parameter by parameter, are reduced to what a choice needs, and may be dropped: at no time need those of
the whole model exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..plan.mask import FreezeMask, pack_bits
from ..plan.plan import FreezePlan
from .units import Piece, Shape, UnitLayout, check_word, find_units

Grain = Literal["row", "unit", "element"]
Within = Literal["model", "tensor"]

_CHUNK: Final = 1 << 18  # elements that are looked at together
_CODES: Final = 1 << 16
_INFINITE: Final = 0x7F80  # the code of inf; that of -inf is its complement


class _Lines(NamedTuple):
    """How a parameter's matrix falls into lines, each of which belongs to a group: its rows, or the columns of each of
    its ``blocks`` of rows (fused experts have one each)."""

    axis: Literal["rows", "cols"]
    blocks: int
    groups: np.ndarray  # int64 [lines], block after block


class Grains:
    """The groups of weights in which a model's weights are chosen.

    ==============  ====================================================================================================
    ``"row"``       A row of a matrix. Where a matrix reads heads or channels (o, down), a column; stored transposed,
                    the other way round: always the axis along which units lie. A bias entry goes with its row. What has
                    one dimension and no rows (norms, biases of what reads units) is a group as a whole, module by
                    module.
    ``"unit"``      A query head, a KV head (which grouped query heads share), a channel: across their matrices. All
                    else as in ``"row"``: rows of embedding and head, norms as a whole.
    ``"element"``   Each weight by itself.
    ==============  ====================================================================================================

    Groups are numbered in the order of the parameters, and in it by their first line; a tied weight counts once, under
    the first of its names. Of a model whose layout `find_units` does not know, all matrices go by rows.

    Args:
        shapes: name -> shape of each parameter, in the model's order.
        grain: see above.
        layout: where the units lie; None: not known.

    Raises:
        ValueError: an unknown grain, no parameters, grain ``"unit"`` without a layout.

    >>> grains = Grains.of(model, "row")  # doctest: +SKIP
    >>> sums = {name: grains.reduce(name, p.grad.square()) for name, p in model.named_parameters()}  # doctest: +SKIP
    >>> plan = grains.plan(sums, share=0.2)  # doctest: +SKIP
    """

    def __init__(self, shapes: Mapping[str, Shape], grain: Grain = "row", layout: UnitLayout | None = None) -> None:
        check_word("Grains", "grain", grain, get_args(Grain))
        if not any(map(math.prod, shapes.values())):
            raise ValueError("Grains: shapes names no weight, expected parameters that train")
        if grain == "unit" and layout is None:
            raise ValueError("Grains: grain is 'unit', expected a layout with it; or take grain 'row'")
        self.grain, self.layout = grain, layout
        self.shapes: dict[str, Shape] = {name: tuple(shape) for name, shape in shapes.items() if math.prod(shape)}
        #: weights of all groups
        self.total: int = sum(map(math.prod, self.shapes.values()))
        self._lines: dict[str, _Lines] = {}
        self._families: list[tuple[str, int]] = []  # (whose groups they are, how many), in the order of groups
        if grain != "element":
            self._number()

    @classmethod
    def of(cls, model: torch.nn.Module, grain: Grain = "row", only: Container[str] | None = None) -> Grains:
        """The groups of every parameter that requires gradients; ``only``: of those with these names.

        Raises:
            ValueError: an unknown grain, nothing that trains, or grain ``"unit"`` where `find_units` does not know the
                model; it is told why, and what to do.
        """
        named = ((name, p) for name, p in model.named_parameters() if only is None or name in only)
        shapes = {name: tuple(p.shape) for name, p in named if p.requires_grad}
        layout = None
        if grain != "element":
            wrapped = getattr(model, "module", model)
            try:
                layout = find_units(model, getattr(model, "config", getattr(wrapped, "config", None)))
            except ValueError as error:
                if grain == "unit":
                    raise ValueError(
                        f"Grains: grain is 'unit', expected a model whose units are known; take grain 'row' ({error})"
                    ) from error
        return cls(shapes, grain, layout)

    # -- how groups come about -------------------------------------------------------------------------------

    def _number(self) -> None:
        """Give every line of every parameter its group."""
        pieces: dict[str, list[tuple[int, Piece]]] = {}
        for layer in range(self.layout.n_layers if self.layout else 0):
            for piece in self.layout.pieces(layer):  # type: ignore[union-attr]
                pieces.setdefault(piece.parameter, []).append((layer, piece))
        known: dict[tuple[str, ...], int] = {}  # what has a number of groups -> the first of them
        homes = {name: self._weight_of(name, pieces) for name in self.shapes}
        for name in sorted(self.shapes, key=lambda name: homes[name] is not None):  # those that join others, later
            held, home = pieces.get(name, []), homes[name]
            axis, blocks, lines = self._cut(name, held)
            if held and self.grain == "unit":
                groups = self._of_units(known, held, blocks, lines)
            elif home is not None:
                groups = self._lines[home].groups
            elif len(self.shapes[name]) < 2:
                groups = np.full(lines, self._first(known, ("vectors", name.rpartition(".")[0]), 1))
            else:
                groups = self._first(known, (name,), lines) + np.arange(lines)
            self._lines[name] = _Lines(axis, blocks, groups)
        self._of_line = np.concatenate([self._lines[name].groups for name in self.shapes])
        breadths = [math.prod(self.shapes[name]) // len(self._lines[name].groups) for name in self.shapes]
        weights = np.repeat(breadths, [len(self._lines[name].groups) for name in self.shapes])
        count = sum(number for _, number in self._families)
        #: int64: weights of each group
        self.sizes = np.bincount(self._of_line, weights, count).astype(np.int64)

    def _cut(self, name: str, held: Sequence[tuple[int, Piece]]) -> tuple[Literal["rows", "cols"], int, int]:
        """Axis, blocks and number of a parameter's lines."""
        rows, cols = FreezeMask(self.shapes[name]).matrix_shape
        if not held or held[0][1].axis == "rows":
            return "rows", 1, rows
        blocks = len({piece.within for _, piece in held})
        return "cols", blocks, blocks * cols

    def _weight_of(self, name: str, pieces: Mapping[str, list[tuple[int, Piece]]]) -> str | None:
        """The weight to whose lines a bias adds an entry each; None: it is no bias, or has no such."""
        module, _, leaf = name.rpartition(".")
        if "bias" not in leaf:
            return None
        for other in (leaf.replace("bias", "weight"), leaf.removesuffix("_bias")):
            weight = f"{module}.{other}" if module else other
            held = pieces.get(weight, [])
            if weight != name and len(self.shapes.get(weight, ())) > 1 and all(p.side == "out" for _, p in held):
                lines = self._cut(weight, held)[2]
                return weight if lines == math.prod(self.shapes[name]) else None
        return None

    def _first(self, known: dict[tuple[str, ...], int], key: tuple[str, ...], count: int) -> int:
        """The first of ``count`` groups that go by a key; they are made when it is new."""
        if key not in known:
            known[key] = sum(number for _, number in self._families)
            self._families.append(("vectors" if key[0] == "vectors" else " ".join(key), count))
        return known[key]

    def _of_units(
        self, known: dict[tuple[str, ...], int], held: Sequence[tuple[int, Piece]], blocks: int, lines: int
    ) -> np.ndarray:
        layout, groups = self.layout, np.full(lines, -1)
        assert layout is not None
        counts = {"head": layout.n_heads, "kv": layout.n_kv_heads, "channel": layout.d_ff}
        for layer, piece in held:
            first = self._first(known, (piece.units, str(layer)), counts[piece.units]) + piece.first
            block = 0 if piece.within is None else piece.within[0] // (piece.within[1] - piece.within[0])
            groups[piece.index + block * (lines // blocks)] = first + np.arange(len(piece.index))[:, None]
        return groups

    # -- values ----------------------------------------------------------------------------------------------

    def reduce(self, name: str, values: Tensor, held: Sequence[np.ndarray] | None = None) -> Tensor:
        """What a choice needs of a parameter's values, of its shape and any floating dtype; on their device.

        Args:
            held: where values are of a shard: per dimension, which indices of the parameter they are of.

        Returns:
            Sums per line, float64 (float32 on mps); of grain ``"element"`` a code of 16 bits per weight, int16: values
            are told apart to 1 part in 128. Of a shard: its part of each line's sum; or the codes of its own weights.
        """
        if self.grain == "element":
            return _codes(values.detach().reshape(-1))
        axis, blocks, groups = self._lines[name]
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        whole = FreezeMask(self.shapes[name])
        rows, cols = map(np.arange, whole.matrix_shape) if held is None else whole.matrix_index(held)
        heights = np.bincount(rows // (whole.matrix_shape[0] // blocks), minlength=blocks).tolist()
        matrix = values.detach().reshape(len(rows), len(cols))
        sums = [matrix.new_zeros(0, dtype=wide)]
        for block in torch.split(matrix, heights):  # a copy in float64 of a few rows at a time
            parts = torch.split(block, max(1, _CHUNK // max(1, block.shape[1])))
            if axis == "rows":
                sums += [part.sum(1, dtype=wide) for part in parts]
            else:
                sums.append(torch.stack([part.sum(0, dtype=wide) for part in parts]).sum(0))
        found = torch.cat(sums)
        if held is None:
            return found
        lines = rows if axis == "rows" else (np.arange(blocks)[:, None] * whole.matrix_shape[1] + cols).reshape(-1)
        spread = found.new_zeros(len(groups))
        spread[torch.from_numpy(lines).to(spread.device)] = found
        return spread

    def nothing(self, name: str, device: torch.device) -> Tensor:
        """What `reduce` makes of zeros."""
        return self.reduce(name, torch.zeros(1, device=device).expand(self.shapes[name]))

    def lines(self, name: str) -> int:
        """How many sums `reduce` makes of a parameter."""
        return math.prod(self.shapes[name]) if self.grain == "element" else len(self._lines[name].groups)

    def means(self, reduced: Mapping[str, Tensor]) -> np.ndarray:
        """Mean value per weight of each group, float64; 0 for a group none of whose weights train.

        Args:
            reduced: what `reduce` made of each parameter (sums over several passes, or ranks, may be added up).

        Raises:
            ValueError: grain ``"element"``; NaN or infinite values.
        """
        if self.grain == "element":
            raise ValueError("Grains.means: grain is 'element', expected 'row' or 'unit'; values are means already")
        for name, lines in self._lines.items():
            if reduced[name].shape != (len(lines.groups),):
                raise ValueError(
                    f"Grains: values of {name!r} are {tuple(reduced[name].shape)}, expected ({len(lines.groups)},); "
                    "pass what reduce returns"
                )
        device = next(iter(reduced.values())).device
        flat = torch.cat([reduced[name].to(device) for name in self.shapes]).double().cpu().numpy()
        if not np.isfinite(flat).all():
            line, place = int(np.flatnonzero(~np.isfinite(flat))[0]), 0
            for name, lines in self._lines.items():
                if line < (place := place + len(lines.groups)):
                    raise _not_finite(name)
        sums: np.ndarray = np.bincount(self._of_line, flat, len(self.sizes))
        return sums / np.maximum(self.sizes, 1)

    # -- plans -----------------------------------------------------------------------------------------------

    def plan(
        self,
        reduced: Mapping[str, Tensor] | np.ndarray,
        share: float,
        *,
        within: Within = "model",
        seed: int | Sequence[int] | None = None,
    ) -> FreezePlan:
        """Freeze the groups whose values are highest on average, up to a share of all weights.

        Groups are taken in descending order of their mean per weight, the earlier of two equal ones first, until the
        next would exceed ``share``. Of elements exactly ``round(share * all)`` are taken.

        Args:
            reduced: what `reduce` made of each parameter; of grain ``"element"`` also the values themselves, which are
                then told apart as float32 (each is asked for three times, and need not be kept); of other grains also
                what `means` made of it.
            share: above 0, at most 1.
            within: take the share of the whole ``"model"``, or of each ``"tensor"`` by itself (of units: of the heads,
                KV heads and channels of each layer; of vectors: of all of them).
            seed: freeze as many at random instead: in each parameter (in each layer, of units; of vectors, among those
                of the same size) as many as would have been.

        Raises:
            ValueError: a share out of range; values that are NaN, infinite, or all 0 where they are ranked.
        """
        check_word("Grains.plan", "within", within, get_args(Within))
        if isinstance(share, bool) or not isinstance(share, int | float | np.number) or not 0 < share <= 1:
            raise ValueError(f"Grains.plan: share is {share!r}, expected a fraction above 0, at most 1")
        draw = None if seed is None else np.random.default_rng(seed)
        if isinstance(reduced, np.ndarray):
            masks = self._groups(reduced, share, within, draw)
        elif missing := [name for name in self.shapes if name not in reduced]:
            raise ValueError(f"Grains.plan: no values of {missing[0]!r}, expected those of every parameter that trains")
        elif self.grain == "element":
            masks = self._elements(reduced, share, within, draw)
        else:
            masks = self._groups(self.means(reduced), share, within, draw)
        about: dict[str, Any] = {"grain": self.grain, "share": share}
        return FreezePlan(masks, about if seed is None else {**about, "random": seed})

    def _groups(
        self, means: np.ndarray, share: float, within: Within, draw: np.random.Generator | None
    ) -> dict[str, FreezeMask]:
        words, counts = zip(*self._families, strict=True)
        families = np.repeat(np.unique(words, return_inverse=True)[1], counts)
        if not means.any():
            raise _all_zero()
        chosen = np.zeros(len(means), bool)
        for members in _kinds(families if within == "tensor" else np.zeros_like(families)):
            if not means[members].any():
                raise _all_zero(words[np.searchsorted(np.cumsum(counts), members[0], "right")])
            order = members[np.argsort(-means[members], kind="stable")]
            most = share * self.sizes[members].sum() * (1 + 1e-12)
            chosen[order[np.cumsum(self.sizes[order]) <= most]] = True
        if draw is not None:
            alike = np.unique(np.stack([families, self.sizes]), axis=1, return_inverse=True)[1].reshape(-1)
            for members in _kinds(alike):
                chosen[members] = draw.permutation(chosen[members])
        return {name: mask for name in self.shapes if (mask := self._mask(name, chosen)).frozen_count}

    def _mask(self, name: str, chosen: np.ndarray) -> FreezeMask:
        shape, (axis, blocks, groups) = self.shapes[name], self._lines[name]
        lines = chosen[groups]
        if axis == "rows":
            return FreezeMask(shape, rows=lines)
        if blocks == 1:
            return FreezeMask(shape, cols=lines)
        cols = len(groups) // blocks
        height = math.prod(shape) // len(groups)
        spread = np.broadcast_to(lines.reshape(blocks, 1, cols), (blocks, height, cols))
        return FreezeMask(shape, elements=spread.reshape(shape))

    def _elements(
        self, values: Mapping[str, Tensor], share: float, within: Within, draw: np.random.Generator | None
    ) -> dict[str, FreezeMask]:
        def read(name: str) -> Tensor:
            found, size = values[name], math.prod(self.shapes[name])
            if found.numel() != size:
                raise ValueError(
                    f"Grains.plan: values of {name!r} are {tuple(found.shape)}, expected one for each weight of "
                    f"{self.shapes[name]}"
                )
            return found.detach().reshape(-1)

        masks = {}
        for names in [[name] for name in self.shapes] if within == "tensor" else [list(self.shapes)]:
            count = round(share * sum(math.prod(self.shapes[name]) for name in names))
            cut, equal = _cut(read, names, count)
            for name in names if count else ():
                flags, equal = _above(read(name), cut, equal)
                if draw is not None:
                    draw.shuffle(flags)
                if flags.any():
                    masks[name] = FreezeMask.from_bits(self.shapes[name], pack_bits(flags))
        return masks

    def __repr__(self) -> str:
        what = "" if self.grain == "element" else f" in {len(self.sizes)} groups"
        known = " of unknown layout" if self.layout is None and self.grain == "row" else ""
        return f"Grains({self.grain}: {self.total} weights{what}{known})"


def _kinds(of: np.ndarray) -> list[np.ndarray]:
    """The places of each kind of number, in ascending order of the number."""
    order = np.argsort(of, kind="stable")
    return np.split(order, np.cumsum(np.bincount(of))[:-1])


# ----------------------------------------------------------------------------------------- the highest elements


def _keys(values: Tensor) -> Tensor:
    """Int32 that compare as float32 values do, 0 and -0 alike; codes are their own."""
    if values.dtype == torch.int16:
        return values
    bits = values.float().view(torch.int32)
    if not bits.numel() or bits.min() >= 0:  # nothing below 0, and no -0: they compare as they are
        return bits
    bits = (values.float() + 0.0).view(torch.int32)
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def _codes(values: Tensor) -> Tensor:
    """The upper 16 bits of the keys."""
    codes = torch.empty(values.shape, dtype=torch.int16, device=values.device)
    for part, into in zip(torch.split(values, _CHUNK), torch.split(codes, _CHUNK), strict=True):
        into.copy_(_keys(part) >> 16)
    return codes


def _cut(read: Callable[[str], Tensor], names: Sequence[str], count: int) -> tuple[int, int]:
    """The key above which elements are chosen, and how many of those that have it; found by counting, not sorting.

    Raises:
        ValueError: NaN, infinite or only zero values.
    """
    coded = True
    seen = np.zeros(_CODES, np.int64)
    for name in names:
        part = read(name)
        coded &= part.dtype == torch.int16
        own = np.zeros(_CODES, np.int64)
        for keys in _split_keys(part):
            own += _counts((keys if keys.dtype == torch.int16 else keys >> 16).int() + _CODES // 2)
        if own[_CODES // 2 + _INFINITE :].any() or own[: _CODES // 2 - _INFINITE].any():
            raise _not_finite(name)
        seen += own
    if seen[_CODES // 2] == seen.sum():  # what is smaller than any number a code tells from 0 counts as 0
        raise _all_zero("" if len(names) > 1 else names[0])
    code, equal = _from_the_top(seen, count)
    code -= _CODES // 2
    if coded:
        return code, equal
    seen = np.zeros(_CODES, np.int64)
    for name in names:
        for keys in _split_keys(read(name)):
            seen += _counts(keys[keys >> 16 == code] & (_CODES - 1))
    low, equal = _from_the_top(seen, equal)
    return code * _CODES + low, equal


def _split_keys(part: Tensor) -> Iterator[Tensor]:
    return map(_keys, torch.split(part, _CHUNK))


def _counts(numbers: Tensor) -> np.ndarray:
    counts: np.ndarray = torch.bincount(numbers, minlength=_CODES).cpu().numpy()
    return counts


def _from_the_top(seen: np.ndarray, count: int) -> tuple[int, int]:
    """The number at which ``count`` are reached from the highest down, and how many of those that have it count."""
    reached = np.cumsum(seen[::-1])
    place = int(np.searchsorted(reached, count))
    number = len(seen) - 1 - place
    return number, count - int(reached[place] - seen[number])


def _above(values: Tensor, cut: int, equal: int) -> tuple[np.ndarray, int]:
    """Which values are above the cut, with the first ``equal`` of those that are at it; and how many of these are left
    for what comes next."""
    flags = np.empty(len(values), bool)
    place = 0
    for keys in _split_keys(values):
        chosen = keys > cut
        if equal:
            at = (keys == cut).nonzero().reshape(-1)[:equal]
            chosen[at] = True
            equal -= len(at)
        flags[place : place + len(keys)] = chosen.cpu().numpy()
        place += len(keys)
    return flags, equal


def _not_finite(name: str) -> ValueError:
    return ValueError(f"Grains: values of {name!r} are NaN or infinite, expected finite ones")


def _all_zero(where: str = "") -> ValueError:
    values = f"all values of {where!r}" if where else "all values"
    remedy = "; rank within the model" if where else ""
    return ValueError(f"Grains: {values} are 0, expected some that tell weights apart{remedy}")
