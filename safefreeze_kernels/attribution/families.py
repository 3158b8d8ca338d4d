"""How 41 architectures name and pack the matrices that hold heads and channels: a table of `Family` entries.

Sizes are not in it. How many heads, how wide, which biases: all that is read off a model's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal


@dataclass(frozen=True)
class Bank:
    """A bank of units: the modules that compute them and the one that reads them (SSAH's f(x) = B·σ(A·x)).

    Args:
        producers: module name -> what its output features are, in order, as a sequence of ``head`` (all query
            heads), ``kv`` (all key or value heads) and ``channel`` (all channels): ``"head"`` for a query
            projection, ``"head kv kv"`` for one that holds query, key and value, ``"channel channel"`` for a
            fused gate and up. Key and value may have fewer heads (grouped-query attention: query head ``h``
            reads KV head ``h // (n_heads // n_kv_heads)``). A bias belongs to the units as its rows do; it is
            found where there is one.
        reader: module whose input features are the units: the attention or MLP output projection. Its bias
            belongs to no unit.
        interleaved: the parts of a fused producer alternate, KV head by KV head (with as many KV as query
            heads: q, k and v of head 0, then of head 1, …) or channel by channel.
        transposed: weights are stored ``[in, out]`` (transformers' ``Conv1D``).

    Names are relative to the layer. One that is a parameter itself, not a module with a ``weight``, is taken
    as such; if it has three dimensions the first one counts experts: all their channels are units, expert by
    expert.

    Raises:
        TypeError: names that are not strings.
        ValueError: no producers, unknown parts, heads and channels in one bank.
    """

    producers: Mapping[str, str]
    reader: str
    interleaved: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        named = [*self.producers, *self.producers.values()] if isinstance(self.producers, Mapping) else [None]
        if not all(isinstance(word, str) for word in (*named, self.reader)):
            raise TypeError(
                f"Bank: producers is {self.producers!r} and reader {self.reader!r}, expected a mapping of names to "
                "what they hold, and a name"
            )
        kinds = [set(parts.split()) for parts in self.producers.values()]
        heads = all(parts <= {"head", "kv"} for parts in kinds) and any("head" in parts for parts in kinds)
        if not (heads or (kinds and all(parts == {"channel"} for parts in kinds))):
            raise ValueError(
                f"Bank: producers is {dict(self.producers)!r}, expected names of modules that hold 'head' and 'kv' "
                "parts, or 'channel' parts"
            )

    @property
    def units(self) -> Literal["head", "channel"]:
        """What the units are."""
        return "channel" if "channel" in " ".join(self.producers.values()) else "head"

    @property
    def of_heads(self) -> bool:
        """Whether the units are heads; else they are channels."""
        return self.units == "head"


@dataclass(frozen=True)
class Family:
    """How the layers of an architecture name and pack the matrices that hold units.

    Args:
        layer: a layer's name with ``{layer}`` for its number. What precedes it in a real parameter name
            (``model.``, a wrapper's prefix) is found, so leave it out.
        banks: the bank of heads, then one or more of channels; channels are numbered bank after bank.
        n_heads: the config's key for the number of query heads.

    Raises:
        TypeError: ``banks`` is not a tuple of `Bank`.
        ValueError: no ``{layer}`` in ``layer``; banks other than one of heads, then channels.
    """

    layer: str
    banks: tuple[Bank, ...]
    n_heads: str = "num_attention_heads"

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str) or "{layer}" not in self.layer:
            raise ValueError(f"Family: layer is {self.layer!r}, expected '{{layer}}' in it, as in 'layers.{{layer}}'")
        if not isinstance(self.banks, tuple) or not all(isinstance(bank, Bank) for bank in self.banks):
            raise TypeError(f"Family: banks is {self.banks!r}, expected a tuple of Bank")
        units = [f"{bank.units}s" for bank in self.banks]
        if units[:2] != ["heads", "channels"] or units.count("heads") > 1:
            raise ValueError(f"Family: banks hold {units}, expected heads first and then channels")


# ------------------------------------------------------------------------------------------------- the table


def _heads(at: str, query: str, key: str, value: str, reader: str) -> Bank:
    return Bank({f"{at}.{query}": "head", f"{at}.{key}": "kv", f"{at}.{value}": "kv"}, f"{at}.{reader}")


def _fused_heads(producer: str, reader: str, **packing: Any) -> Bank:
    return Bank({producer: "head kv kv"}, reader, **packing)


def _mlp(producer: str, reader: str, **packing: Any) -> Bank:
    return Bank({producer: "channel"}, reader, **packing)


def _gated(at: str) -> Bank:
    return Bank({f"{at}.gate_proj": "channel", f"{at}.up_proj": "channel"}, f"{at}.down_proj")


def _fused_gated(at: str, **packing: Any) -> Bank:
    return Bank({f"{at}.gate_up_proj": "channel channel"}, f"{at}.down_proj", **packing)


_QKVO: Final = _heads("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA: Final = (_QKVO, _gated("mlp"))
_EXPERTS: Final = (_QKVO, _fused_gated("mlp.experts"))
_NEOX_MLP: Final = _mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_CONV1D: Final = {"transposed": True}

# Model types (``config.model_type``), the layers' names, the banks with the module names of transformers 5, and the
# config's key for the number of query heads where it is not num_attention_heads.
_TABLE: Final[tuple[tuple[str, str, tuple[Bank, ...], str | None], ...]] = (
    ("cohere cohere2 gemma gemma2 gemma3_text granite llama mistral", "layers", _LLAMA, None),
    ("olmo olmo2 olmo3 qwen2 qwen3 smollm3 stablelm", "layers", _LLAMA, None),
    ("glm glm4", "layers", (_QKVO, _fused_gated("mlp")), None),
    ("mixtral olmoe qwen3_moe", "layers", _EXPERTS, None),
    ("qwen2_moe", "layers", (*_EXPERTS, _gated("mlp.shared_expert")), None),
    ("granitemoe", "layers", (_QKVO, _fused_gated("block_sparse_moe.experts")), None),
    ("gpt_oss", "layers", (_QKVO, _fused_gated("mlp.experts", interleaved=True, transposed=True)), None),
    ("starcoder2", "layers", (_QKVO, _mlp("mlp.c_fc", "mlp.c_proj")), None),
    ("phi", "layers", (_heads("self_attn", "q_proj", "k_proj", "v_proj", "dense"), _mlp("mlp.fc1", "mlp.fc2")), None),
    ("phi3", "layers", (_fused_heads("self_attn.qkv_proj", "self_attn.o_proj"), _fused_gated("mlp")), None),
    ("gpt_neox", "layers",
     (_fused_heads("attention.query_key_value", "attention.dense", interleaved=True), _NEOX_MLP), None),
    ("falcon", "h",
     (_fused_heads("self_attention.query_key_value", "self_attention.dense", interleaved=True), _NEOX_MLP), None),
    ("bloom", "h",
     (_fused_heads("self_attention.query_key_value", "self_attention.dense", interleaved=True), _NEOX_MLP), "n_head"),
    ("gpt2", "h",
     (_fused_heads("attn.c_attn", "attn.c_proj", **_CONV1D), _mlp("mlp.c_fc", "mlp.c_proj", **_CONV1D)), "n_head"),
    ("gpt_bigcode", "h",
     (_fused_heads("attn.c_attn", "attn.c_proj", interleaved=True), _mlp("mlp.c_fc", "mlp.c_proj")), "n_head"),
    ("gptj", "h",
     (_heads("attn", "q_proj", "k_proj", "v_proj", "out_proj"), _mlp("mlp.fc_in", "mlp.fc_out")), "n_head"),
    ("mpt", "blocks",
     (_fused_heads("attn.Wqkv", "attn.out_proj"), _mlp("ffn.up_proj", "ffn.down_proj")), "n_heads"),
    ("opt", "decoder.layers",
     (_heads("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"), _mlp("fc1", "fc2")), None),
    ("modernbert", "layers",
     (_fused_heads("attn.Wqkv", "attn.Wo"), Bank({"mlp.Wi": "channel channel"}, "mlp.Wo")), None),
    ("distilbert", "transformer.layer",
     (_heads("attention", "q_lin", "k_lin", "v_lin", "out_lin"), _mlp("ffn.lin1", "ffn.lin2")), "n_heads"),
    ("bert camembert electra roberta xlm-roberta", "encoder.layer",
     (_heads("attention", "self.query", "self.key", "self.value", "output.dense"),
      _mlp("intermediate.dense", "output.dense")), None),
)  # fmt: skip

#: Model type -> family. The tests prove each entry on a model of its class. Norms, routers and gpt_oss's attention
#: sinks hold no units. OLMo 2, OLMo 3 and OLMoE normalise queries and keys over all heads together: there what a head
#: computes also depends on the rows of the others.
FAMILIES: Final[dict[str, Family]] = {
    model_type: Family(f"{layers}.{{layer}}", banks, n_heads or "num_attention_heads")
    for model_types, layers, banks, n_heads in _TABLE
    for model_type in model_types.split()
}


def register_family(model_type: str, family: Family) -> None:
    """Teach `find_units` an architecture: ``model_type`` as in the model's config, and where its units are.

    Raises:
        TypeError: ``family`` is not a `Family`.

    >>> register_family("phi", Family("layers.{layer}", (
    ...     Bank({"self_attn.q_proj": "head", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"}, "self_attn.dense"),
    ...     Bank({"mlp.fc1": "channel"}, "mlp.fc2"))))
    """
    if not isinstance(family, Family):
        raise TypeError(f"register_family: family of {model_type!r} is {family!r}, expected a Family")
    FAMILIES[model_type] = family
