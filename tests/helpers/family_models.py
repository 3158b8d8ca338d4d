"""A tiny model of every family in the registry, and what must be found in it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

HIDDEN, HEADS, LAYERS = 48, 6, 2


@dataclass(frozen=True)
class Case:
    """A tiny model of a family: what its config says beside the common sizes, and what must be found in it."""

    model_type: str
    settings: dict[str, Any]
    n_kv_heads: int = HEADS
    head_dim: int = HIDDEN // HEADS
    d_ff: int = 24
    gates: int = 1  # matrices that compute a channel
    attention_bias: bool = False
    mlp_bias: bool = False
    variant: str = ""


def grouped(model_type: str, head_dim: int = 12, **more: Any) -> Case:
    """A gated model with two query heads to a KV head; ``more`` is for its config."""
    settings = {"intermediate_size": 24, "num_key_value_heads": 3, "head_dim": head_dim, **more}
    return Case(model_type, settings, n_kv_heads=3, head_dim=head_dim, gates=2)


BOTH: Any = {"attention_bias": True, "mlp_bias": True}
MOE: Any = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
CASES = [
    *map(grouped, ("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral")),
    *map(grouped, ("olmo", "olmo2", "olmo3", "qwen3", "smollm3")),
    replace(grouped("llama", **BOTH), variant="-biased", **BOTH),
    *(replace(grouped(model_type), attention_bias=True) for model_type in ("glm", "glm4", "qwen2")),
    *(replace(grouped(model_type), gates=1, **BOTH) for model_type in ("phi", "starcoder2")),
    *(grouped(model_type, head_dim=8) for model_type in ("phi3", "stablelm")),
    *(
        Case(model_type, {"intermediate_size": 24, "embedding_size": HIDDEN}, **BOTH)
        for model_type in ("bert", "camembert", "electra", "roberta", "xlm-roberta")
    ),
    Case("distilbert", {"hidden_dim": 24}, **BOTH),
    Case("modernbert", {"intermediate_size": 24}, gates=2),
    Case("bloom", {}, d_ff=4 * HIDDEN, **BOTH),
    Case("falcon", {"ffn_hidden_size": 24, "multi_query": False, "bias": True}, **BOTH),
    Case("falcon", {"ffn_hidden_size": 24, "multi_query": True}, n_kv_heads=1, variant="-shared"),
    Case(
        "falcon",
        {"ffn_hidden_size": 24, "new_decoder_architecture": True, "num_kv_heads": 3},
        n_kv_heads=3,
        variant="-grouped",
    ),
    Case("gpt2", {"n_inner": 24}, **BOTH),
    Case("gpt_bigcode", {"n_inner": 24, "multi_query": False, "n_head": HEADS}, **BOTH),
    Case("gpt_bigcode", {"n_inner": 24, "multi_query": True}, n_kv_heads=1, variant="-shared", **BOTH),
    Case("gpt_neox", {"intermediate_size": 24}, **BOTH),
    Case("gptj", {"n_inner": 24, "rotary_dim": 4}, mlp_bias=True),
    Case("mpt", {}, d_ff=4 * HIDDEN),
    Case("opt", {"ffn_dim": 24, "word_embed_proj_dim": HIDDEN}, **BOTH),
    replace(grouped("gpt_oss", **MOE), d_ff=4 * 24, **BOTH),
    *(replace(grouped(model_type, 8, **MOE), d_ff=4 * 24) for model_type in ("granitemoe", "mixtral", "olmoe")),
    replace(grouped("qwen2_moe", 8, shared_expert_intermediate_size=14, **MOE), d_ff=4 * 12 + 14, attention_bias=True),
    replace(grouped("qwen3_moe", **MOE), d_ff=4 * 12),
]
NAMED = {case.model_type + case.variant: case for case in CASES}


@functools.cache
def model_of(case: str) -> nn.Module:
    """The case's model with random parameters, biases too. Do not change it."""
    one = NAMED[case]
    sizes = {
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.AutoConfig.for_model(one.model_type, **{**sizes, **one.settings})
    auto = transformers.AutoModelForCausalLM if one.model_type in CAUSAL else transformers.AutoModelForMaskedLM
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" not in name.lower():
                param.normal_(0, 0.3)
    return model
