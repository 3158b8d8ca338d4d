"""Where attention heads and MLP channels live in a model, and which rows and columns belong to a unit.

A *unit* is an attention head or an MLP intermediate channel. How an architecture names and packs the matrices that hold
its units is data: `families`. Everything else (how many heads, how wide) is read off the parameter shapes, which cannot
disagree with the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch

from ..plan.mask import FreezeMask
from .families import FAMILIES, Bank, Family

Preset = Literal["full", "producer"]
KvPolicy = Literal["any", "all", "never"]
Kind = Literal["head", "kv", "channel"]
Side = Literal["out", "in"]
Shape = tuple[int, ...]


# -------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece of a layer's units: the entries of one parameter that belong to one kind of unit. Of the columns of fused
    experts a piece is one expert's block.

    The parameter is seen as a matrix: leading dimensions flatten into rows. All pieces of a layer, `UnitLayout.pieces`,
    together hold every weight of every unit once.

    Args:
        parameter: its full name.
        shape: the parameter's.
        units: what the entries belong to.
        axis: which axis of the matrix the units' entries are on.
        side: ``"out"``: this parameter computes the unit; ``"in"``: it reads it.
        first: number, in its layer, of the first unit of this piece.
        index: int64 ``[units, width]``: the entries on ``axis`` of each of them.
        within: rows the columns are confined to (one expert's block of a fused tensor); None: all.
    """

    parameter: str
    shape: Shape
    units: Kind
    axis: Literal["rows", "cols"]
    side: Side
    first: int
    index: np.ndarray
    within: tuple[int, int] | None

    @property
    def breadth(self) -> int:
        """Elements of the parameter that one entry of ``index`` stands for."""
        if self.axis == "rows":
            return self.shape[-1] if len(self.shape) > 1 else 1
        low, high = self.within or (0, math.prod(self.shape[:-1]))
        return high - low


@dataclass(frozen=True)
class Reader:
    """The matrix that reads units: its input is what activation scores look at.

    Args:
        units: what the input features belong to: feature ``[u*width, (u+1)*width)`` to unit ``first + u``.
        module: the module to hook; for fused experts the one that owns their tensors.
        parameter: name of the weight.
        first, n_units, width: see ``units``.
        transposed: the weight is stored ``[in, out]``.
        expert: index on the first dimension of a fused expert tensor, else None.
    """

    units: Literal["head", "channel"]
    module: str
    parameter: str
    first: int
    n_units: int
    width: int
    transposed: bool
    expert: int | None


class _Sized(NamedTuple):
    """A bank and what the shape of its reader says."""

    bank: Bank
    reader: str  # name of its weight in the layer
    first: int  # number of its first unit in the layer
    experts: int | None
    features: int  # that the reader takes in, of one expert
    hidden: int


@dataclass(frozen=True)
class UnitLayout:
    """The units of one model: dimensions, parameter names and shapes, no weights. Made by `find_units`.

    Args:
        model_type: as in the model's config.
        family: names and packing; ``family.layer`` is complete, with what precedes it in the model's names.
        shapes: name within the layer -> shape of every parameter that holds units; the same in all layers.
        n_layers: layers of the model.
        n_heads, n_kv_heads: query heads and KV heads of a layer.
    """

    model_type: str
    family: Family
    shapes: Mapping[str, Shape]
    n_layers: int
    n_heads: int
    n_kv_heads: int

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self._sized[0].features // self.n_heads

    @property
    def d_ff(self) -> int:
        """Channels of a layer; of all its experts, where it has experts."""
        return sum((one.experts or 1) * one.features for one in self._sized[1:])

    @property
    def hidden_size(self) -> int:
        """Features of the residual stream."""
        return self._sized[0].hidden

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def heads_shape(self) -> tuple[int, int]:
        """``(n_layers, n_heads)``."""
        return self.n_layers, self.n_heads

    @property
    def channels_shape(self) -> tuple[int, int]:
        """``(n_layers, d_ff)``."""
        return self.n_layers, self.d_ff

    @property
    def unit_shapes(self) -> dict[str, tuple[int, int]]:
        """``"heads"`` and ``"channels"`` -> shape of an array with an entry per unit."""
        return {"heads": self.heads_shape, "channels": self.channels_shape}

    @property
    def parameters(self) -> dict[str, Shape]:
        """Name -> shape of every parameter that holds units."""
        return {self._full(name, i): shape for i in range(self.n_layers) for name, shape in self.shapes.items()}

    @property
    def head_cost(self) -> float:
        """Parameters of a head in units of an MLP channel's, a shared KV head split evenly over its query
        heads.

        4·128·4096 / (3·4096) = 170.67 for Llama-2-7B, (2 + 2/4)·128 / 3 = 106.67 for Llama-3-8B.
        """
        totals = {"head": 0, "kv": 0, "channel": 0}
        for piece in self.pieces(0):
            totals[piece.units] += piece.index.size * piece.breadth
        return (totals["head"] + totals["kv"]) / self.n_heads / (totals["channel"] / self.d_ff)

    def pieces(self, layer: int) -> tuple[Piece, ...]:
        """Every place in a layer that holds units: what computes them first, then what reads them."""
        return self._pieces[layer]

    def readers(self, layer: int) -> tuple[Reader, ...]:
        """The matrices of a layer that read units: attention first, then the MLP, expert by expert."""
        return self._readers[layer]

    def shared(self, piece: Piece) -> tuple[Literal["heads", "channels"], slice, int]:
        """Whose a piece's weights are: the kind of unit, which of a layer's, and how many units share each of the
        piece's (query heads, a KV head)."""
        sharing = self.group_size if piece.units == "kv" else 1
        places = slice(piece.first * sharing, (piece.first + len(piece.index)) * sharing)
        return "channels" if piece.units == "channel" else "heads", places, sharing

    def to_json(self) -> str:
        """This layout as a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> UnitLayout:
        """The inverse of `to_json`; raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            family = fields["family"]
            fields["family"] = Family(**{**family, "banks": tuple(Bank(**bank) for bank in family["banks"])})
            fields["shapes"] = {name: tuple(shape) for name, shape in fields["shapes"].items()}
            layout = cls(**fields)
            if not layout._pieces or layout._completed(layout.shapes) != layout:
                raise ValueError(f"{layout} with shapes {layout.shapes}")
        except (TypeError, KeyError, AttributeError, ArithmeticError, ValueError) as error:
            raise ValueError(f"UnitLayout.from_json: not a layout ({error!r})") from error
        return layout

    def __str__(self) -> str:
        shared = f", {self.n_kv_heads} KV heads" if self.n_kv_heads != self.n_heads else ""
        units = f"{self.n_heads} heads{shared} and {self.d_ff} channels"
        return f"{self.model_type}: {self.n_layers} layers of {units}"

    # -- how pieces and readers come about -------------------------------------------------------------------

    def _completed(self, present: Container[str]) -> UnitLayout:
        """This layout with the shapes that producers must have, given the readers'; biases where ``present``."""
        producers: dict[str, Shape] = {}
        for one in self._sized:
            experts = () if one.experts is None else (one.experts,)
            for name, parts in one.bank.producers.items():
                weight, bias = _tensors(name, present)
                features = self._n_features(one, _kinds(parts))
                both = (one.hidden, features) if one.bank.transposed else (features, one.hidden)
                producers[weight] = (*experts, *both)
                if bias in present:
                    producers[bias] = (*experts, features)
        return replace(self, shapes={**producers, **{one.reader: self.shapes[one.reader] for one in self._sized}})

    def _full(self, name: str, layer: int) -> str:
        return f"{self.family.layer.format(layer=layer)}.{name}"

    @cached_property
    def _sized(self) -> tuple[_Sized, ...]:
        sized: list[_Sized] = []
        channels = 0
        for bank in self.family.banks:
            reader, _ = _tensors(bank.reader, self.shapes)
            *lead, hidden, features = self.shapes[reader]
            if bank.transposed:
                hidden, features = features, hidden
            experts = lead[0] if lead else None
            sized.append(_Sized(bank, reader, channels, experts, features, hidden))
            channels += 0 if bank.of_heads else (experts or 1) * features
        return tuple(sized)

    @cached_property
    def _pieces(self) -> tuple[tuple[Piece, ...], ...]:
        sides: tuple[Side, ...] = ("out", "in")
        once = [piece for side in sides for one in self._sized for piece in self._pieces_of(one, side)]
        return tuple(
            tuple(replace(piece, parameter=self._full(piece.parameter, layer)) for piece in once)
            for layer in range(self.n_layers)
        )

    def _pieces_of(self, one: _Sized, side: Side) -> Iterator[Piece]:
        """The pieces of what computes a bank's units, or of what reads them; named within the layer."""
        modules = one.bank.producers if side == "out" else {one.bank.reader: one.bank.units}
        for name, parts in modules.items():
            weight, bias = _tensors(name, self.shapes)
            owned = self._owned(one, _kinds(parts))
            yield from self._placed(one, weight, side, owned, on_rows=one.bank.transposed == (side == "in"))
            if bias in self.shapes:  # of producers: a vector, or a row for each expert
                yield from self._placed(one, bias, side, owned, on_rows=one.experts is None)

    def _width(self, one: _Sized) -> int:
        """Features of a unit."""
        return self.head_dim if one.bank.of_heads else 1

    def _n_features(self, one: _Sized, kinds: tuple[Kind, ...]) -> int:
        """Features of a module (of one expert) that has these parts."""
        kv = self.n_kv_heads * self.head_dim
        return sum(kv if kind == "kv" else one.features for kind in kinds)

    def _owned(self, one: _Sized, kinds: tuple[Kind, ...]) -> dict[Kind, np.ndarray]:
        """Kind of unit -> int64 ``[units, width]``: which features of a module (of one expert) are each unit's."""
        groups = (self.n_kv_heads if one.bank.of_heads else one.features) if one.bank.interleaved else 1
        starts = np.arange(groups)[:, None] * (self._n_features(one, kinds) // groups)
        owned: dict[Kind, np.ndarray] = {}
        for kind in kinds:
            size = self._n_features(one, (kind,)) // groups
            part = (starts + np.arange(size)).reshape(-1, self._width(one))
            owned[kind] = np.concatenate([owned[kind], part], axis=1) if kind in owned else part
            starts = starts + size
        return owned

    def _placed(
        self, one: _Sized, parameter: str, side: Side, owned: Mapping[Kind, np.ndarray], on_rows: bool
    ) -> Iterator[Piece]:
        """The pieces of a parameter that has a module's features on its rows or its columns, expert by expert."""
        shape = self.shapes[parameter]
        height = math.prod(shape[:-1] or shape) // (one.experts or 1)  # rows of one expert
        starts = np.arange(one.experts or 1) * height
        for kind, index in owned.items():
            if on_rows:
                rows = (starts[:, None, None] + index).reshape(-1, index.shape[1])
                yield Piece(parameter, shape, kind, "rows", side, one.first, rows, None)
                continue
            for expert, start in enumerate(starts.tolist()):
                first, block = one.first + expert * len(index), (start, start + height)
                within = None if one.experts is None else block
                yield Piece(parameter, shape, kind, "cols", side, first, index, within)

    @cached_property
    def _readers(self) -> tuple[tuple[Reader, ...], ...]:
        return tuple(
            tuple(reader for one in self._sized for reader in self._readers_of(one, layer))
            for layer in range(self.n_layers)
        )

    def _readers_of(self, one: _Sized, layer: int) -> Iterator[Reader]:
        parameter, width = self._full(one.reader, layer), self._width(one)
        module, n_units = parameter.rpartition(".")[0], one.features // width
        for number in range(one.experts or 1):
            first, expert = one.first + number * n_units, None if one.experts is None else number
            yield Reader(one.bank.units, module, parameter, first, n_units, width, one.bank.transposed, expert)


def _kinds(parts: str) -> tuple[Kind, ...]:
    """The words of a producer's parts; `Bank` has checked them."""
    return cast(tuple[Kind, ...], tuple(parts.split()))


def _tensors(name: str, shapes: Container[str]) -> tuple[str, str]:
    """Weight and bias of what a `Bank` names: a module, or a parameter itself."""
    return (name, f"{name}_bias") if name in shapes else (f"{name}.weight", f"{name}.bias")


# -------------------------------------------------------------------------------------------------- finding


def find_units(model: torch.nn.Module | Mapping[str, Any], config: Any = None) -> UnitLayout:
    """Find where the heads and channels of a model live.

    Args:
        model: a module whose parameters are named like a known family's (transformers models, and anything
            laid out like one; the meta device will do), or a mapping of such names to shapes or tensors.
        config: object or mapping with ``model_type`` and the number of heads; default ``model.config``. Of a
            multi-modal model's config, its ``text_config`` counts. Where there is ``num_key_value_heads``,
            ``head_dim`` or ``num_hidden_layers``, it must agree with the shapes.

    Raises:
        ValueError: no config, an unregistered ``model_type``, parameters missing or not shaped as the
            family's, layers that differ from one another.
    """
    config = getattr(model, "config", None) if config is None else config
    if config is None:
        raise ValueError(
            "find_units: the model has no config, expected model_type and num_attention_heads; pass config="
        )
    model_type, text = _setting(config, "model_type"), _setting(config, "text_config")
    if model_type not in FAMILIES and text is not None:
        config, model_type = text, _setting(text, "model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"find_units: model_type is {model_type!r}, expected one of {', '.join(sorted(FAMILIES))}; say where "
            f"its units are, for instance\n    register_family({model_type!r}, Family('layers.{{layer}}', (\n"
            "        Bank({'self_attn.q_proj': 'head', 'self_attn.k_proj': 'kv', 'self_attn.v_proj': 'kv'}, "
            "'self_attn.o_proj'),\n"
            "        Bank({'mlp.gate_proj': 'channel', 'mlp.up_proj': 'channel'}, 'mlp.down_proj'))))"
        )
    shapes = _shapes(model)
    layout = _measure(FAMILIES[model_type], shapes, config, model_type)
    for name, shape in layout.parameters.items():
        if shapes.get(name) != shape:
            raise ValueError(
                f"find_units: {name!r} has shape {shapes.get(name, '(missing)')}, expected {shape} for {layout}; "
                "layers that differ (dense ones between mixtures of experts), packed (4-bit) weights and unmerged "
                "adapters are not supported"
            )
    return layout


def _shapes(model: torch.nn.Module | Mapping[str, Any]) -> dict[str, Shape]:
    if isinstance(model, torch.nn.Module):
        return {name: tuple(param.shape) for name, param in model.named_parameters(remove_duplicate=False)}
    return {name: tuple(getattr(value, "shape", value)) for name, value in model.items()}


def _setting(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _placed_in(family: Family, shapes: Mapping[str, Shape], model_type: str) -> Family:
    """The family with its ``layer`` completed by what precedes it in this model's names."""
    ending = f"{family.layer.format(layer=0)}.{family.banks[0].reader}.weight"
    prefixes = sorted(name.removesuffix(ending) for name in shapes if f".{name}".endswith(f".{ending}"))
    if len(prefixes) != 1:
        found = f"{len(prefixes)} ({', '.join(map(repr, prefixes))})" if prefixes else "none"
        raise ValueError(
            f"find_units: found {found} parameters named '…{ending}', expected one for model_type "
            f"{model_type!r}; pass the text model alone, merge adapters first (merge_and_unload()), or "
            "register_family with its names"
        )
    # a prefix is text, not a template: braces in it must survive str.format
    return replace(family, layer=prefixes[0].replace("{", "{{").replace("}", "}}") + family.layer)


def _measure(family: Family, shapes: Mapping[str, Shape], config: Any, model_type: str) -> UnitLayout:
    """The layout that layer 0's shapes and the number of heads imply; `find_units` holds every layer to it."""
    family = _placed_in(family, shapes, model_type)
    attention = family.banks[0]
    n_layers = 0
    while f"{family.layer.format(layer=n_layers)}.{attention.reader}.weight" in shapes:
        n_layers += 1
    layers = [family.layer.format(layer=layer) for layer in range(n_layers)]
    named = [name for bank in family.banks for name in (*bank.producers, bank.reader)]
    # what any layer has, every layer must have
    present = {
        tensor
        for name in named
        for tensor in (name, f"{name}_bias", f"{name}.bias")
        if any(f"{layer}.{tensor}" in shapes for layer in layers)
    }

    def weight_in_first_layer(name: str) -> Shape:
        full = f"{layers[0]}.{_tensors(name, present)[0]}"
        shape = shapes.get(full, ())
        if len(shape) != (3 if name in present else 2):
            raise ValueError(
                f"find_units: {full!r} has shape {shapes.get(full, '(missing)')}, expected a matrix [out, in], or "
                "[experts, out, in] of fused experts (in every layer; files may name experts one by one, pass the "
                "module then); unmerged adapters: merge_and_unload() first; other names: register_family"
            )
        return shape

    readers = {_tensors(bank.reader, present)[0]: weight_in_first_layer(bank.reader) for bank in family.banks}
    width = weight_in_first_layer(attention.reader)[0 if attention.transposed else 1]
    n_heads = _setting(config, family.n_heads)
    if not isinstance(n_heads, int) or n_heads < 1 or width % n_heads:
        raise ValueError(
            f"find_units: {family.n_heads} is {n_heads!r}, expected a divisor of {width}, the input features of "
            f"'{layers[0]}.{attention.reader}'"
        )
    head_dim, n_kv_heads = width // n_heads, n_heads
    with_kv = next((name for name, parts in attention.producers.items() if "kv" in _kinds(parts)), None)
    if with_kv is not None:
        kinds = _kinds(attention.producers[with_kv])
        features = weight_in_first_layer(with_kv)[1 if attention.transposed else 0]
        n_kv_heads, rest = divmod(features - kinds.count("head") * width, kinds.count("kv") * head_dim)
        if rest or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"find_units: '{layers[0]}.{with_kv}' has {features} output features, expected a number of KV heads of "
                f"{head_dim} that divides {n_heads}, the query heads"
            )
    measured = {"head_dim": head_dim, "num_key_value_heads": n_kv_heads, "num_hidden_layers": n_layers}
    for key, found in measured.items():
        stated = _setting(config, key)
        if stated is not None and stated != found:
            raise ValueError(f"find_units: the config says {key}={stated}, but the parameter shapes say {found}")
    return UnitLayout(model_type, family, readers, n_layers, n_heads, n_kv_heads)._completed(present)


# ------------------------------------------------------------------------------------------------- freezing


def check_word(operation: str, what: str, given: object, valid: Iterable[str]) -> None:
    """Raise ValueError for a word that is none of the valid ones."""
    if given not in (valid := tuple(valid)):
        raise ValueError(f"{operation}: {what} is {given!r}, expected one of {', '.join(map(repr, valid))}")


def unit_masks(
    layout: UnitLayout, heads: np.ndarray, channels: np.ndarray, preset: Preset = "full", kv: KvPolicy = "any"
) -> dict[str, FreezeMask]:
    """What the given units hold, as one mask per parameter; parameters with nothing frozen are left out.

    Args:
        layout: where units live.
        heads, channels: bool, of the layout's `unit_shapes`, True = frozen.
        preset: ``"producer"`` freezes what computes a unit: its features of q, k, v, gate and up (rows; columns of
            a ``Conv1D``) and their biases. ``"full"`` adds what reads it: columns of the output projections.
            Columns of one expert in a fused tensor become an element mask.
        kv: when a KV head is frozen: if ``"any"`` query head that reads it is frozen (frozen heads then compute
            what they did; live ones may share a KV head that no longer trains), only if ``"all"`` are, or
            ``"never"``: keys and values stay live.

    Raises:
        ValueError: an unknown preset or policy, or shapes that are not the layout's.
    """
    check_word("unit_masks", "preset", preset, get_args(Preset))
    check_word("unit_masks", "kv", kv, get_args(KvPolicy))
    for (word, shape), array in zip(layout.unit_shapes.items(), (heads, channels), strict=True):
        if array.shape != shape or array.dtype != np.bool_:
            raise ValueError(
                f"unit_masks: {word} is {array.dtype} of shape {array.shape}, expected bool {shape} for {layout}"
            )
    grouped = heads.reshape(layout.n_layers, layout.n_kv_heads, layout.group_size)
    by_policy = {"any": grouped.any(2), "all": grouped.all(2), "never": np.zeros(grouped.shape[:2], bool)}
    frozen: dict[Kind, np.ndarray] = {"head": heads, "kv": np.asarray(by_policy[kv]), "channel": channels}
    masks: dict[str, FreezeMask] = {}
    for layer in range(layout.n_layers):
        touched: dict[str, list[tuple[Piece, np.ndarray]]] = {}
        for piece in layout.pieces(layer):
            chosen = frozen[piece.units][layer, piece.first : piece.first + len(piece.index)]
            if chosen.any() and (piece.side == "out" or preset == "full"):
                touched.setdefault(piece.parameter, []).append((piece, piece.index[chosen]))
        masks.update((name, _mask(entries)) for name, entries in touched.items())
    return masks


def _mask(entries: list[tuple[Piece, np.ndarray]]) -> FreezeMask:
    """One mask of all that is frozen in a parameter: entries of its pieces."""
    shape = entries[0][0].shape
    matrix = FreezeMask(shape).matrix_shape
    lines = {axis: np.zeros(size, bool) for axis, size in zip(("rows", "cols"), matrix, strict=True)}
    elements = None
    for piece, index in entries:
        if piece.within is None:
            lines[piece.axis][index] = True
            continue
        if elements is None:
            elements = np.zeros(matrix, bool)
        columns = np.zeros(matrix[1], bool)
        columns[index] = True
        elements[slice(*piece.within)] |= columns
    return FreezeMask(
        shape,
        rows=lines["rows"],
        cols=lines["cols"] if len(shape) > 1 else None,
        elements=None if elements is None else torch.from_numpy(elements).reshape(shape),
    )
