"""Where attention heads and MLP channels live in a model, and which rows and columns belong to a unit.

A *unit* is an attention head or an MLP intermediate channel. Architectures differ in module names only, so
names are data: one `Family` per naming scheme, keyed by ``config.model_type``. Everything else (how many
heads, how wide) is read off the parameter shapes, which cannot disagree with the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal, get_args

import numpy as np
import torch

from ..masks import FreezeMask

__all__ = [
    "FAMILIES",
    "Family",
    "KvPolicy",
    "Preset",
    "UnitLayout",
    "find_units",
    "register_family",
    "unit_masks",
]

Preset = Literal["full", "producer"]
KvPolicy = Literal["any", "all", "never"]


@dataclass(frozen=True)
class Family:
    """Names of the linear modules that hold units, as templates with ``{layer}`` for the layer number.

    Each module has a weight ``[out, in]`` as `torch.nn.Linear`; a bias is found where there is one. What
    precedes the template in a real parameter name (``model.``, a wrapper's prefix) is found too, so leave it
    out.

    Args:
        query, key, value: head ``h`` is rows ``h*head_dim`` up to ``(h+1)*head_dim``; key and value may have
            fewer heads (grouped-query attention: query head ``h`` reads KV head ``h // (n_heads //
            n_kv_heads)``).
        attention_out: head ``h`` is the same range of *columns*; its input is what attention scores are read
            from.
        mlp_in: one or more modules in which channel ``j`` is row ``j`` (gate and up, or a single one).
        mlp_out: channel ``j`` is column ``j``; its input is what channel scores are read from.
    """

    query: str
    key: str
    value: str
    attention_out: str
    mlp_in: tuple[str, ...]
    mlp_out: str

    @property
    def modules(self) -> tuple[str, ...]:
        """All templates, in the order of a forward pass."""
        return (self.query, self.key, self.value, self.attention_out, *self.mlp_in, self.mlp_out)


_LLAMA: Final = Family(
    query="layers.{layer}.self_attn.q_proj",
    key="layers.{layer}.self_attn.k_proj",
    value="layers.{layer}.self_attn.v_proj",
    attention_out="layers.{layer}.self_attn.o_proj",
    mlp_in=("layers.{layer}.mlp.gate_proj", "layers.{layer}.mlp.up_proj"),
    mlp_out="layers.{layer}.mlp.down_proj",
)

#: ``config.model_type`` -> names. Only families whose names and head order the tests check on a real model.
FAMILIES: dict[str, Family] = {
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
}


def register_family(model_type: str, family: Family) -> None:
    """Teach `find_units` an architecture: ``model_type`` as in the model's config, and its module names.

    Raises:
        TypeError: ``family`` is not a `Family`, or its ``mlp_in`` is not a tuple of names.
        ValueError: a name without ``{layer}``.

    >>> register_family("phi", Family(
    ...     query="layers.{layer}.self_attn.q_proj", key="layers.{layer}.self_attn.k_proj",
    ...     value="layers.{layer}.self_attn.v_proj", attention_out="layers.{layer}.self_attn.dense",
    ...     mlp_in=("layers.{layer}.mlp.fc1",), mlp_out="layers.{layer}.mlp.fc2"))
    """
    if not isinstance(family, Family) or not isinstance(family.mlp_in, tuple) or not family.mlp_in:
        raise TypeError(f"register_family: family of {model_type!r} is {family!r}, expected a Family, mlp_in a tuple")
    for template in family.modules:
        if "{layer}" not in template:
            raise ValueError(f"register_family: name {template!r} of {model_type!r} has no '{{layer}}' in it")
    FAMILIES[model_type] = family


@dataclass(frozen=True)
class UnitLayout:
    """The units of one model: dimensions and parameter names. Shapes only, no weights.

    ``names`` are complete templates here (prefix included); ``biased`` lists those of them that have a bias
    whose entries belong to units. The bias of an output projection belongs to no unit.
    """

    model_type: str
    names: Family
    biased: tuple[str, ...]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    hidden_size: int

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
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter that holds units."""
        return {name: shape for layer in range(self.n_layers) for name, shape, _, _ in self._pieces(layer)}

    @property
    def head_cost(self) -> float:
        """Parameters of a head in units of an MLP channel's, a shared KV head split evenly over its query
        heads.

        4·128·4096 / (3·4096) = 170.67 for Llama-2-7B, (2 + 2/4)·128 / 3 = 106.67 for Llama-3-8B.
        """
        totals = {"head": 0, "kv": 0, "channel": 0}
        for _, shape, kind, _ in self._pieces(0):
            totals[kind] += int(np.prod(shape))
        return (totals["head"] + totals["kv"]) / self.n_heads / (totals["channel"] / self.d_ff)

    def _pieces(self, layer: int) -> Iterator[tuple[str, tuple[int, ...], str, str]]:
        """(parameter, shape, which units it holds, whether units are its "rows" or "cols") of one layer."""
        heads, kv, hidden = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, self.hidden_size
        producers = [
            (self.names.query, heads, "head"),
            (self.names.key, kv, "kv"),
            (self.names.value, kv, "kv"),
        ]
        producers += [(template, self.d_ff, "channel") for template in self.names.mlp_in]
        for template, rows, kind in producers:
            module = template.format(layer=layer)
            yield f"{module}.weight", (rows, hidden), kind, "rows"
            if template in self.biased:
                yield f"{module}.bias", (rows,), kind, "rows"
        yield f"{self.names.attention_out.format(layer=layer)}.weight", (hidden, heads), "head", "cols"
        yield f"{self.names.mlp_out.format(layer=layer)}.weight", (hidden, self.d_ff), "channel", "cols"

    def to_json(self) -> str:
        """This layout as a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> UnitLayout:
        """The inverse of `to_json`; raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            names = fields["names"]
            fields["names"] = Family(**{**names, "mlp_in": tuple(names["mlp_in"])})
            fields["biased"] = tuple(fields["biased"])
            return cls(**fields)
        except (TypeError, KeyError) as error:
            raise ValueError(f"UnitLayout.from_json: not a layout ({error!r})") from error

    def __str__(self) -> str:
        shared = f", {self.n_kv_heads} KV heads" if self.n_kv_heads != self.n_heads else ""
        units = f"{self.n_heads} heads{shared} and {self.d_ff} channels"
        return f"{self.model_type}: {self.n_layers} layers of {units}"


def find_units(model: torch.nn.Module | Mapping[str, Any], config: Any = None) -> UnitLayout:
    """Find where the heads and channels of a model live.

    Args:
        model: a module whose parameters are named like a known family's (transformers models, and anything
            laid out like one), or a mapping of parameter names to shapes or tensors (a checkpoint's header).
        config: object or mapping with ``model_type`` and ``num_attention_heads``; default ``model.config``.
            Where it has ``num_key_value_heads``, ``head_dim`` or ``num_hidden_layers``, they must agree with
            the shapes.

    Raises:
        ValueError: no config, an unregistered ``model_type``, parameters missing or not shaped as the
            family's.
    """
    config = getattr(model, "config", None) if config is None else config
    if config is None:
        raise ValueError(
            "find_units: the model has no config, expected model_type and num_attention_heads; pass config="
        )
    model_type = _setting(config, "model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"find_units: model_type is {model_type!r}, expected one of {', '.join(sorted(FAMILIES))}; if "
            "its query, key, value and MLP projections are separate linear modules, name them once: "
            f"register_family({model_type!r}, Family(query='layers.{{layer}}.self_attn.q_proj', key=…, "
            "value=…, attention_out=…, mlp_in=(…,), mlp_out=…))"
        )
    shapes = _shapes(model)
    names = _with_prefix(FAMILIES[model_type], shapes, model_type)
    layout = _measure(names, shapes, config, model_type)
    for layer in range(layout.n_layers):
        for name, shape, _, _ in layout._pieces(layer):
            if shapes.get(name) != shape:
                raise ValueError(
                    f"find_units: {name!r} has shape {shapes.get(name, '(missing)')}, expected {shape} for "
                    f"{layout}; layers of different width, packed (4-bit) weights and unmerged adapters are "
                    "not supported"
                )
    return layout


def _shapes(model: torch.nn.Module | Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    if isinstance(model, torch.nn.Module):
        return {name: tuple(param.shape) for name, param in model.named_parameters(remove_duplicate=False)}
    return {name: tuple(getattr(value, "shape", value)) for name, value in model.items()}


def _setting(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _with_prefix(family: Family, shapes: Mapping[str, tuple[int, ...]], model_type: str) -> Family:
    ending = f"{family.attention_out.format(layer=0)}.weight"
    prefixes = sorted(name.removesuffix(ending) for name in shapes if f".{name}".endswith(f".{ending}"))
    if len(prefixes) != 1:
        found = f"{len(prefixes)} ({', '.join(map(repr, prefixes))})" if prefixes else "none"
        raise ValueError(
            f"find_units: found {found} parameters named '…{ending}', expected one for model_type "
            f"{model_type!r}; pass the text model alone, merge adapters first (merge_and_unload()), or "
            "register_family with its names"
        )
    # a prefix is text, not a template: braces in it must survive str.format
    prefix = prefixes[0].replace("{", "{{").replace("}", "}}")
    return replace(
        family,
        mlp_in=tuple(prefix + name for name in family.mlp_in),
        **{role: prefix + getattr(family, role) for role in ("query", "key", "value", "attention_out", "mlp_out")},
    )


def _measure(names: Family, shapes: Mapping[str, tuple[int, ...]], config: Any, model_type: str) -> UnitLayout:
    """Dimensions from layer 0's shapes and the number of heads; `find_units` holds every layer to them."""

    def shape(template: str) -> tuple[int, ...]:
        name = f"{template.format(layer=0)}.weight"
        if len(shapes.get(name, ())) != 2:
            raise ValueError(
                f"find_units: {name!r} has shape {shapes.get(name, '(missing)')}, expected a matrix [out, "
                "in]; unmerged adapters: merge_and_unload() first; other names: register_family"
            )
        return shapes[name]

    n_layers = 0
    while f"{names.attention_out.format(layer=n_layers)}.weight" in shapes:
        n_layers += 1
    hidden_size, width = shape(names.attention_out)
    n_heads = _setting(config, "num_attention_heads")
    if not isinstance(n_heads, int) or n_heads < 1 or width % n_heads:
        raise ValueError(
            f"find_units: num_attention_heads is {n_heads!r}, expected a divisor of {width}, the columns of "
            f"'{names.attention_out.format(layer=0)}.weight'"
        )
    head_dim = width // n_heads
    n_kv_heads, rest = divmod(shape(names.key)[0], head_dim)
    if rest or not n_kv_heads or n_heads % n_kv_heads:
        raise ValueError(
            f"find_units: '{names.key.format(layer=0)}.weight' has {shape(names.key)[0]} rows, expected a "
            f"whole number of {head_dim}-row heads that divides {n_heads}"
        )
    for key, found in (
        ("head_dim", head_dim),
        ("num_key_value_heads", n_kv_heads),
        ("num_hidden_layers", n_layers),
    ):
        stated = _setting(config, key)
        if stated is not None and stated != found:
            raise ValueError(f"find_units: the config says {key}={stated}, but the parameter shapes say {found}")
    return UnitLayout(
        model_type=model_type,
        names=names,
        biased=tuple(
            template
            for template in (names.query, names.key, names.value, *names.mlp_in)
            if any(f"{template.format(layer=layer)}.bias" in shapes for layer in range(n_layers))
        ),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=shape(names.mlp_out)[1],
        hidden_size=hidden_size,
    )


def unit_masks(
    layout: UnitLayout,
    heads: np.ndarray,
    channels: np.ndarray,
    preset: Preset = "full",
    kv: KvPolicy = "any",
) -> dict[str, FreezeMask]:
    """Rows and columns of the given units, as one mask per parameter; parameters with nothing frozen are left
    out.

    Args:
        layout: where units live.
        heads, channels: bool ``[n_layers, n_heads]`` and ``[n_layers, d_ff]``, True = frozen.
        preset: ``"producer"`` freezes what computes a unit: rows of q, k, v, gate and up, and their biases.
            ``"full"`` adds what reads it: columns of the output projections.
        kv: when a KV head that several query heads share is frozen: if ``"any"`` of them is frozen (the
            frozen heads then compute what they did; live heads lose a KV head), only if ``"all"`` are, or
            ``"never"``.

    Raises:
        ValueError: an unknown preset or policy, or shapes that are not the layout's.
    """
    for word, given, valid in (("preset", preset, get_args(Preset)), ("kv", kv, get_args(KvPolicy))):
        if given not in valid:
            raise ValueError(f"unit_masks: {word} is {given!r}, expected one of {', '.join(map(repr, valid))}")
    for word, array, shape in (
        ("heads", heads, layout.heads_shape),
        ("channels", channels, layout.channels_shape),
    ):
        if array.shape != shape or array.dtype != np.bool_:
            raise ValueError(
                f"unit_masks: {word} is {array.dtype} of shape {array.shape}, expected bool {shape} for {layout}"
            )
    grouped = heads.reshape(layout.n_layers, layout.n_kv_heads, layout.group_size)
    kv_heads = {"any": grouped.any(2), "all": grouped.all(2), "never": np.zeros(grouped.shape[:2], bool)}[kv]
    frozen = {
        "head": heads.repeat(layout.head_dim, axis=1),
        "kv": kv_heads.repeat(layout.head_dim, axis=1),
        "channel": channels,
    }
    masks: dict[str, FreezeMask] = {}
    for layer in range(layout.n_layers):
        for name, size, kind, axis in layout._pieces(layer):
            index = frozen[kind][layer]
            if index.any() and (axis == "rows" or preset == "full"):
                masks[name] = FreezeMask(size, **{axis: index})
    return masks
