"""Small models, batches, layouts and scores to test attribution on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from safefreeze_kernels.attribution import (
    MaskBuilder,
    SetScores,
    UnitLabels,
    UnitLayout,
    UnitScores,
    find_units,
    score_units,
)
from safefreeze_kernels.plan.mask import FreezeMask
from safefreeze_kernels.plan.plan import FreezePlan

LABEL_FILE = Path(__file__).parents[3] / "shared" / "data" / "llama2-7b-chat-ssah-labels.safetensors"
needs_labels = pytest.mark.skipif(not LABEL_FILE.is_file(), reason="the published label file is not here")


#: What a config needs beside `tiny`'s common settings for the units named there, and experts of 8 channels.
_SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 24, "head_dim": None, "num_key_value_heads": None},
    "gpt_neox": {"head_dim": None, "num_key_value_heads": None},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 32, "head_dim": None, "num_key_value_heads": None},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 8},
    "qwen2_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 10,
    },
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 8},
}


def tiny(model_type: str = "llama", **changes: Any) -> nn.Module:
    """A random model: 2 layers, hidden 32, 4 heads of 12 (not hidden / heads), 2 KV heads, 24 channels.

    Families without grouped queries have 4 heads of 8.
    """
    import transformers  # here, so that processes which need no such model start quickly

    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    settings |= _SETTINGS.get(model_type, {}) | changes
    given = {key: value for key, value in settings.items() if value is not None}
    config = transformers.AutoConfig.for_model(model_type, **given)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" not in name:
                param.normal_(0, 0.3)
    return model


def batch_of(rows: list[list[int]], answers: list[int], side: str = "right") -> dict[str, torch.Tensor]:
    """A padded batch; ``answers[i]`` is how many tokens at the end of row i are response."""
    width = max(map(len, rows))
    batch = {key: torch.zeros(len(rows), width, dtype=torch.long) for key in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(rows), width), -100)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        batch["input_ids"][i, place] = torch.tensor(row)
        batch["attention_mask"][i, place] = 1
        batch["labels"][i, place] = torch.tensor([-100] * (len(row) - answer) + row[len(row) - answer :])
    return batch


def some_rows(n: int = 6, seed: int = 3) -> tuple[list[list[int]], list[int]]:
    draw = np.random.default_rng(seed)
    rows = [draw.integers(3, 64, size=draw.integers(5, 12)).tolist() for _ in range(n)]
    return rows, [int(draw.integers(1, len(row) - 1)) for row in rows]


ROWS, ANSWERS = some_rows()
OTHER_ROWS, OTHER_ANSWERS = some_rows(seed=4)
SAFETY = [batch_of(ROWS, ANSWERS)]
UTILITY = [batch_of(OTHER_ROWS, OTHER_ANSWERS)]


class Toy(nn.Module):
    """A plain module with a Llama's names and known activations: o_proj and down_proj are fed rows of a
    table.

    One layer, 2 heads of one feature, 2 channels, hidden 2; token t feeds ``table[t]`` to both.
    """

    def __init__(self, table: torch.Tensor, readers: torch.Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="llama", num_attention_heads=2)
        layer = nn.ModuleDict({"self_attn": nn.Module(), "mlp": nn.Module()})
        for module, names in (("self_attn", "q_proj k_proj v_proj o_proj"), ("mlp", "gate_proj up_proj down_proj")):
            for name in names.split():
                setattr(layer[module], name, nn.Linear(2, 2, bias=False))
        self.layers = nn.ModuleList([layer])
        self.table = nn.Parameter(table)
        with torch.no_grad():
            layer["self_attn"].o_proj.weight.copy_(readers)
            layer["mlp"].down_proj.weight.copy_(2 * readers)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.table[input_ids]
        layer = self.layers[0]
        return layer["self_attn"].o_proj(hidden) + layer["mlp"].down_proj(hidden)


class ToyLM(nn.Module):
    """A plain causal language model with a Llama's names, for tests that need no attention: tokens do not mix.

    2 layers, 4 heads of 3 with 2 KV heads, 5 channels, hidden 6, 16 tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="llama", num_attention_heads=4)
        draw = torch.Generator().manual_seed(0)
        sizes = {"q_proj": (12, 6), "k_proj": (6, 6), "v_proj": (6, 6), "o_proj": (6, 12)}
        sizes |= {"gate_proj": (5, 6), "up_proj": (5, 6), "down_proj": (6, 5)}
        self.layers = nn.ModuleList()
        for _ in range(2):
            layer = nn.ModuleDict({"self_attn": nn.Module(), "mlp": nn.Module()})
            for number, (name, (rows, cols)) in enumerate(sizes.items()):
                linear = nn.Linear(cols, rows, bias=False)
                linear.weight = nn.Parameter(torch.randn(rows, cols, generator=draw))
                setattr(layer["self_attn" if number < 4 else "mlp"], name, linear)
            self.layers.append(layer)
        self.table = nn.Parameter(torch.randn(16, 6, generator=draw))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.table[input_ids]
        for layer in self.layers:
            heads, mlp = layer["self_attn"], layer["mlp"]
            shared = (heads.k_proj(hidden).sigmoid() * heads.v_proj(hidden)).unflatten(-1, (2, 3))
            hidden = hidden + heads.o_proj(heads.q_proj(hidden) * shared.repeat_interleave(2, -2).flatten(-2))
            hidden = hidden + mlp.down_proj(mlp.gate_proj(hidden).sigmoid() * mlp.up_proj(hidden))
        return hidden @ self.table.T


def toy_batches(sizes: list[int], seed: int) -> list[dict[str, torch.Tensor]]:
    """Batches of these sizes for `ToyLM`; the rows depend on the seed alone."""
    draw = np.random.default_rng(seed)
    rows = [draw.integers(0, 16, size=draw.integers(4, 8)).tolist() for _ in range(sum(sizes))]
    ends = np.cumsum(sizes).tolist()
    return [batch_of(rows[end - n : end], [2] * n) for n, end in zip(sizes, ends, strict=True)]


def score_part(rank: int, ranks: int, methods: list[str], folder: str) -> None:
    """One of several processes, each with its own part of the toy batches: scores to ``folder``/method-rank."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    safety, utility = (toy_batches([4, 4, 3, 1], seed) for seed in (1, 2))
    parts = ([4, 4], [3, 1]) if ranks == 2 else ([4, 4, 3, 1],)
    first = sum(len(part) for part in parts[:rank])
    own = slice(first, first + len(parts[rank]))
    for method in methods:
        token = {"refuse_token": 3} if method == "activation_patching" else {}
        scores = score_units(ToyLM(), safety[own], utility[own], method, group=dist.group.WORLD, **token)  # type: ignore[arg-type]
        scores.save(f"{folder}/{method}-{rank}")
    dist.destroy_process_group()


def toy_layout(n_layers: int = 2, n_heads: int = 4, n_kv_heads: int = 2, d_ff: int = 6, **more: int) -> UnitLayout:
    """A Llama layout with hidden 8 and heads of 2, from shapes alone."""
    size = {"hidden": 8, "head_dim": 2, **more}
    width, kv = n_heads * size["head_dim"], n_kv_heads * size["head_dim"]
    shapes = {
        "self_attn.q_proj": (width, size["hidden"]),
        "self_attn.k_proj": (kv, size["hidden"]),
        "self_attn.v_proj": (kv, size["hidden"]),
        "self_attn.o_proj": (size["hidden"], width),
        "mlp.gate_proj": (d_ff, size["hidden"]),
        "mlp.up_proj": (d_ff, size["hidden"]),
        "mlp.down_proj": (size["hidden"], d_ff),
    }
    names = {f"model.layers.{i}.{name}.weight": shape for i in range(n_layers) for name, shape in shapes.items()}
    return find_units(names, {"model_type": "llama", "num_attention_heads": n_heads})


def split_batches(sizes: list[int], side: str = "right") -> list[dict[str, torch.Tensor]]:
    """The safety set in batches of these sizes."""
    ends = np.cumsum(sizes).tolist()
    return [batch_of(ROWS[end - n : end], ANSWERS[end - n : end], side) for n, end in zip(sizes, ends, strict=True)]


def refused(message: str, call: Callable[[], Any], error: type[Exception] = ValueError) -> None:
    """The call raises the error, in words that match."""
    with pytest.raises(error, match=message):
        call()


#: What sources made elsewhere hold, for `toy_layout`: scores, and the same channels in every form.
HEADS = np.arange(8.0).reshape(2, 4)
CHANNELS = np.arange(12.0).reshape(2, 6)
LISTED = [[0, 3], [0, 5], [1, 0]]
PAIRS = np.array([[0, 3], [1, 0], [0, 5]])
CHOSEN = np.array([[0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]], bool)
FORMS: dict[str, Any] = {
    "lists by layer": {0: [5, 3], 1: [0]},
    "sets by layer": {0: {3, 5}, 1: {0}},
    "layers as text": {"0": (3, 5), "1": [0]},
    "a list of layers": [[3, 5], [0]],
    "tensors": [torch.tensor([5, 3], dtype=torch.int32), torch.tensor([0])],
    "arrays": {0: np.array([3, 5]), np.int64(1): np.array([0], np.uint8)},
    "bool vectors": [np.isin(np.arange(6), [3, 5]), torch.arange(6) == 0],
    "pairs": PAIRS,
    "a tensor of pairs": torch.tensor(PAIRS),
    "a bool array": CHOSEN,
    "a bool tensor": torch.tensor(CHOSEN),
    "named": {"channels": {0: [3, 5], 1: [0]}},
}
#: SN-Tune's ffn_up, ffn_down, q, k, v, as the published detector prints them, and the plan they make
NEURONS = [{0: {1, 4}, 1: set()}, {0: set(), 1: {0, 5}}, {0: {7}, 1: {0}}, {0: {3}, 1: set()}, {0: set(), 1: set()}]
NEURON_PLAN = FreezePlan({
    "model.layers.0.mlp.up_proj.weight": FreezeMask((6, 8), rows=[1, 4]),
    "model.layers.1.mlp.down_proj.weight": FreezeMask((8, 6), cols=[0, 5]),
    "model.layers.0.self_attn.q_proj.weight": FreezeMask((8, 8), rows=[7]),
    "model.layers.1.self_attn.q_proj.weight": FreezeMask((8, 8), rows=[0]),
    "model.layers.0.self_attn.k_proj.weight": FreezeMask((4, 8), rows=[3]),
})  # fmt: skip


LLAMA_2_7B = {"n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "d_ff": 11008, "hidden": 4096, "head_dim": 128}


def random_scores(layout: UnitLayout, seed: int = 0) -> UnitScores:
    generator = torch.Generator().manual_seed(seed)

    def one() -> SetScores:
        heads = torch.empty(layout.n_layers, layout.n_heads, layout.head_dim).exponential_(generator=generator)
        channels = torch.empty(layout.n_layers, layout.d_ff).exponential_(generator=generator)
        return SetScores(heads, channels, 10)

    return UnitScores(layout, one(), one())


def some_labels() -> UnitLabels:
    """All four labels on `toy_layout`."""
    return MaskBuilder(random_scores(toy_layout()), {"RU": 0.3, "SCU": 0.2, "UCU": 0.2}).labels


def scores_from_channels(safety: list[float], utility: list[float]) -> UnitScores:
    """One layer, one head whose score is level (z = 0), and a channel per entry."""
    layout = toy_layout(n_layers=1, n_heads=1, n_kv_heads=1, d_ff=len(safety))
    sets = [SetScores(torch.ones(1, 1, 2), torch.tensor([values])) for values in (safety, utility)]
    return UnitScores(layout, *sets)


def flat(heads: Any, channels: Any) -> np.ndarray:
    return np.concatenate([np.asarray(heads).ravel(), np.asarray(channels).ravel()])


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that scoring a model must leave as it was."""
    experts = {
        name: module.config._experts_implementation
        for name, module in model.named_modules()
        if hasattr(getattr(module, "config", None), "_experts_implementation")
    }
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": hook_count(model),
        "hooks of parameters": [
            (len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ())) for p in model.parameters()
        ],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "parameters": [(id(p), p._version) for p in model.parameters()],
        "weights": [p.detach().clone().numpy().tobytes() for p in model.parameters()],
        "gradients": [(id(p.grad), None if p.grad is None else p.grad.sum().item()) for p in model.parameters()],
        "experts": experts,
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }
