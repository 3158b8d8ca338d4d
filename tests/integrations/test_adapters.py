"""A plan under PEFT's adapters: exact through training, saving, resuming and merging; what cannot hold is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import safefreeze_kernels as sf

ROWS, COLS = [1, 3, 8], [0, 5, 6]
STEPS = 50


class Experts(nn.Module):
    """Four matrices in one parameter: [expert, out, in], or [expert, in, out] where ``is_transposed``."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.randn(4, 16, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.is_transposed else self.weight.transpose(1, 2)
        return torch.einsum("ni,eio->no", x[:, : weight.shape[1]], weight)


class Net(nn.Module):
    """One layer to adapt, in front of a head that does not train."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.head.weight.dtype
        inner = self.layer(x if isinstance(self.layer, nn.Embedding) or x.dtype == torch.long else x.to(dtype))
        return torch.tanh(self.head(inner.to(dtype)))


class Kind(NamedTuple):
    """A kind of adapter: the layer, its width, the shape of what the plan freezes, and PEFT's configuration."""

    layer: Callable[[], nn.Module]
    width: int
    shape: tuple[int, ...]
    config: dict[str, Any]
    inputs: Callable[[torch.Generator], Tensor] = lambda draw: torch.randn(6, 16, generator=draw)


def nf4() -> nn.Module:
    import bitsandbytes

    return bitsandbytes.nn.Linear4bit(16, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")


def words(draw: torch.Generator) -> Tensor:
    return torch.randint(0, 20, (8,), generator=draw)


TARGET = {"target_modules": ["layer"]}
KINDS = {
    "LoRA": Kind(lambda: nn.Linear(16, 24), 24, (24, 16), TARGET),
    "rsLoRA": Kind(lambda: nn.Linear(16, 24), 24, (24, 16), {**TARGET, "use_rslora": True}),
    "DoRA": Kind(lambda: nn.Linear(16, 24), 24, (24, 16), {**TARGET, "use_dora": True}),
    "QLoRA NF4": Kind(nf4, 64, (64, 16), TARGET),
    "embedding": Kind(lambda: nn.Embedding(20, 16), 16, (20, 16), TARGET, words),
    "Conv1D": Kind(lambda: Conv1D(24, 16), 24, (16, 24), {**TARGET, "fan_in_fan_out": True}),
    "experts": Kind(lambda: Experts(False), 16, (4, 16, 12), {"target_parameters": ["layer.weight"]}),
    "experts, transposed": Kind(lambda: Experts(True), 12, (4, 16, 12), {"target_parameters": ["layer.weight"]}),
}
LINES: dict[str, dict[str, list[int]]] = {
    "rows": {"rows": ROWS}, "columns": {"cols": COLS}, "both": {"rows": ROWS, "cols": COLS},
}  # fmt: skip
NAME = "layer.weight"


def bare(kind: Kind, dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    net = Net(kind.layer(), kind.width)
    if "4bit" in type(net.layer).__name__:
        net.layer.to("cpu")
        net.layer(torch.randn(2, 16))  # quantises
        net.head.to(dtype)
        return net
    with torch.no_grad():
        next(net.layer.parameters()).view(-1)[::7] = -0.0
    return net.to(dtype)


def adapted(net: Net, kind: Kind, **options: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=8, **{**kind.config, **options}))


def plan_of(kind: Kind, lines: str = "rows") -> sf.FreezePlan:
    return sf.FreezePlan({NAME: sf.FreezeMask(kind.shape, **LINES[lines])})


def train(model: Any, optimizer: sf.MaskedAdamW, plan: sf.FreezePlan, kind: Kind, steps: range) -> None:
    for step in steps:
        for part in range(2):
            x = kind.inputs(torch.Generator().manual_seed(2 * step + part))
            ((model(x) - 0.5) ** 2).mean().backward()
        sf.clip_grad_norm_(model, 1.0, plan)
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: Any, plan: sf.FreezePlan) -> sf.MaskedAdamW:
    return sf.MaskedAdamW(model.named_parameters(), lr=0.05, weight_decay=0.1, freeze=plan)


def delta(model: Any, kind: Kind) -> Tensor:
    layer = model.base_model.model.layer
    found: Tensor = layer.get_delta_weight("default").detach().reshape(kind.shape)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lines", LINES)
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_bytes_stay_through_training_resuming_and_merging(
    kind: str, lines: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    case, plan = KINDS[kind], plan_of(KINDS[kind], lines)
    base = bare(case, dtype)
    model = adapted(copy.deepcopy(base), case)
    if kind == "DoRA" and lines != "rows":
        with pytest.raises(ValueError, match="DoRA, whose magnitudes scale whole rows, and columns of it are frozen"):
            sf.adapt(plan, model)
        return
    first = sf.adapt(plan, model)
    optimizer = optimizer_of(model, first)
    train(model, optimizer, first, case, range(STEPS // 2))
    model.save_pretrained(tmp_path)

    resumed = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    second = sf.adapt(plan, resumed)
    assert second == first and not second.changed
    carried_on = optimizer_of(resumed, second)
    carried_on.load_state_dict(optimizer.state_dict())
    train(resumed, carried_on, second, case, range(STEPS // 2, STEPS))
    train(model, optimizer, first, case, range(STEPS // 2, STEPS))
    for name, p in model.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), f"{name} is another after resuming"

    moved, frozen = delta(resumed, case), plan[NAME].dense()
    assert not moved[frozen].any()
    assert (moved[~frozen] != 0).float().mean() > 0.9
    x = case.inputs(torch.Generator().manual_seed(99))
    before, after = (net.layer(x.to(dtype) if x.is_floating_point() else x) for net in (base, resumed.base_model.model))
    if kind in ("LoRA", "rsLoRA", "DoRA", "QLoRA NF4") and lines == "rows":
        assert torch.equal(before[:, ROWS], after[:, ROWS].to(before.dtype))
        assert not torch.equal(before, after.to(before.dtype))
    if kind == "QLoRA NF4":
        with pytest.raises(ValueError, match="is quantised, and merging would round all of it anew"):
            sf.merge_(resumed, second)
        return
    plainly = copy.deepcopy(resumed).merge_and_unload()
    merged = sf.merge_(resumed, second)
    sf.snapshot(base, plan).verify(merged)
    with pytest.raises(sf.FrozenDriftError, match=r"was -0\.0"):
        sf.snapshot(base, plan).verify(plainly)
    for name, p in merged.named_parameters():
        assert torch.equal(p, plainly.get_parameter(name)), name  # -0.0 equals 0.0
    assert (merged.layer.weight != base.layer.weight)[~frozen].float().mean() > 0.5
