"""`safefreeze verify BASE ADAPTER PLAN`: what a saved adapter adds to frozen weights is exactly zero, or it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model_folders import fails, run
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import safefreeze_kernels as sf
from safefreeze_kernels.proof import audit
from safefreeze_kernels.proof.adapters import CONFIG_FILE

UP, DOWN, Q = (f"model.layers.0.{n}.weight" for n in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"))
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = [1, 5, 8]


def base(tie: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=20, tie_word_embeddings=tie, attention_bias=True,
        )
    )  # fmt: skip


def plan() -> sf.FreezePlan:
    return sf.FreezePlan(
        {
            UP: sf.FreezeMask((24, 16), rows=ROWS), DOWN: sf.FreezeMask((16, 24), rows=[0], cols=ROWS),
            Q: sf.FreezeMask((16, 16), rows=ROWS), EMBED: sf.FreezeMask((20, 16), rows=ROWS, cols=[2]),
            HEAD: sf.FreezeMask((20, 16), rows=ROWS),
        }
    )  # fmt: skip


TARGETS = ["up_proj", "down_proj", "embed_tokens"]


def trained(folder: Path, freeze: sf.FreezePlan | None = None, **options: Any) -> tuple[Path, Path]:
    """A base and an adapter trained under the plan, saved; ``options`` of `peft.LoraConfig`."""
    net, freeze = base(), freeze or plan()
    net.save_pretrained(folder / "base")
    model = peft.get_peft_model(net, peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, **options}))
    adapted = sf.adapt(freeze, model)
    optimizer = sf.MaskedAdamW(model.named_parameters(), lr=0.05, weight_decay=0.1, freeze=adapted)
    tokens = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter"


def edited(adapter: Path, key: str, row: int, col: int, value: float = 0.5) -> None:
    """Write one element of a tensor of the adapter."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    (name,) = [name for name in tensors if name.endswith(key)]
    tensors[name].view(len(tensors[name]), -1)[row, col] = value
    save_file(tensors, adapter / "adapter_model.safetensors")


def test_an_adapter_that_was_trained_under_the_plan_is_proven(tmp_path: Path) -> None:
    report = audit.compare_adapter(*trained(tmp_path), plan())
    assert report.ok, str(report)
    assert report.frozen == sum(mask.frozen_count for mask in plan().values())
    assert "the adapter has something for 3 of 5 weights of the plan" in str(report)


@pytest.mark.parametrize(
    ("key", "row", "col", "told"),
    [
        ("up_proj.lora_B.weight", 5, 2, f"factor B of '{UP}' is not zero in row 5, column 2"),
        ("down_proj.lora_B.weight", 0, 0, f"factor B of '{DOWN}' is not zero in row 0, column 0"),
        ("down_proj.lora_A.weight", 3, 8, f"factor A of '{DOWN}' is not zero in row 3, column 8"),
        ("lora_embedding_A", 1, 5, f"factor A of '{EMBED}' is not zero in row 1, column 5"),
        ("lora_embedding_B", 2, 3, f"factor B of '{EMBED}' is not zero in row 2, column 3"),
    ],
)
@pytest.mark.parametrize("value", [0.5, 1e-45, float("nan")])
def test_what_is_not_zero_is_told(key: str, row: int, col: int, told: str, value: float, tmp_path: Path) -> None:
    folders = trained(tmp_path)
    edited(folders[1], key, row, col, value)
    report = audit.compare_adapter(*folders, plan())
    assert not report.ok
    assert report.trouble == [f"{told}, so that it moves what the plan freezes"]


def test_minus_zero_is_zero_and_live_lines_may_be_anything(tmp_path: Path) -> None:
    folders = trained(tmp_path)
    edited(folders[1], "up_proj.lora_B.weight", 5, 2, -0.0)
    edited(folders[1], "up_proj.lora_B.weight", 6, 2)
    assert audit.compare_adapter(*folders, plan()).ok


def test_weights_trained_whole_are_compared_with_the_base(tmp_path: Path) -> None:
    folders = trained(tmp_path, modules_to_save=["lm_head"])
    report = audit.compare_adapter(*folders, plan())
    assert report.ok, str(report)
    assert next(t for t in report.tensors if t.name == HEAD).live_changed > 200
    edited(folders[1], "lm_head.weight", 5, 2)
    told = audit.compare_adapter(*folders, plan())
    assert not told.ok
    assert "row 5, column 2" in str(told)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"lora_bias": True}], ids=["bias", "lora_bias"])
def test_a_bias_beside_frozen_rows(options: dict[str, Any], tmp_path: Path) -> None:
    bias = Q.replace("weight", "bias")
    freeze = sf.FreezePlan({Q: plan()[Q], bias: sf.FreezeMask((16,), rows=ROWS)})
    folders = trained(tmp_path, freeze, target_modules=["q_proj"], **options)
    assert audit.compare_adapter(*folders, freeze).ok
    report = audit.compare_adapter(*folders, sf.FreezePlan({Q: plan()[Q]}))
    assert report.trouble == [f"{bias!r} is trained, and moves output 1 of {Q!r}, which the plan freezes"]


def test_what_cannot_be_told_from_the_files(tmp_path: Path) -> None:
    folders = trained(tmp_path / "dora", sf.FreezePlan({UP: plan()[UP]}), target_modules=["up_proj"], use_dora=True)
    assert "has DoRA, whose magnitudes scale its rows" in str(audit.compare_adapter(*folders, plan()))
    folders = trained(tmp_path / "lora")
    config = json.loads((folders[1] / CONFIG_FILE).read_text())
    for change, told in (
        ({"init_lora_weights": "pissa"}, "may rewrite the base's weights; merge it"),
        ({"target_parameters": ["mlp.up_proj.weight"]}, "is adapted by target_parameters; merge the adapter"),
    ):
        (folders[1] / CONFIG_FILE).write_text(json.dumps({**config, **change}))
        report = audit.compare_adapter(*folders, plan())
        assert not report.ok
        assert told in " ".join(str(report).split())


def test_what_an_adapter_holds_and_is_not_known_is_not_proven(tmp_path: Path) -> None:
    folders = trained(tmp_path)
    file = folders[1] / "adapter_model.safetensors"
    held = load_file(file)
    up, embed = "base_model.model.model.layers.0.mlp.up_proj", "base_model.model.model.embed_tokens"
    for change, told in (
        ({f"{up}.lora_A.weight": None}, f"{UP!r} has B in the adapter, expected both factors, A and B"),
        ({f"{up}.lora_C.weight": torch.zeros(2)}, "'model.layers.0.mlp.up_proj.lora_C.weight' is of a layer whose"),
        ({f"{embed}.token_adapter.trainable_tokens_delta": torch.ones(1, 16)}, "trainable_tokens_delta' is of a layer"),
        ({"base_model.model.lm_head.weight": torch.zeros(22, 16)}, "has shape (20, 16) in the base, and (22, 16) in"),
    ):
        save_file({name: value for name, value in {**held, **change}.items() if value is not None}, file)
        report = audit.compare_adapter(*folders, plan())
        assert not report.ok
        assert told in " ".join(str(report).split())
    save_file(held, file)
    assert audit.compare_adapter(*folders, plan()).ok


def test_rows_trained_apart_are_not_proven(tmp_path: Path) -> None:
    """Tokens of PEFT's ``trainable_token_indices`` replace rows of the embedding."""
    freeze = sf.FreezePlan({EMBED: sf.FreezeMask((20, 16), rows=ROWS)})
    folders = trained(tmp_path, freeze, target_modules=["up_proj"], trainable_token_indices={"embed_tokens": [2]})
    report = audit.compare_adapter(*folders, freeze)
    assert not report.ok and "not of a kind known here" in report.trouble[0]


def test_a_tied_weight_is_asked_for(tmp_path: Path) -> None:
    """The base holds the embedding alone; what an adapter adds to the head goes into the same weight."""
    net = base(tie=True)
    net.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    freeze = sf.FreezePlan({EMBED: sf.FreezeMask((20, 16), rows=ROWS)})
    folders = tmp_path / "base", tmp_path / "adapter"
    report = audit.compare_adapter(*folders, freeze)
    assert f"{HEAD!r} is adapted, not in the base, and has the shape of {EMBED!r}" in report.trouble[0]
    assert audit.compare_adapter(*folders, freeze, untied=[]).ok is False
    assert audit.compare_adapter(*folders, freeze, tied={EMBED: HEAD}).ok
    edited(folders[1], "lm_head.lora_B.weight", 8, 0)
    assert not audit.compare_adapter(*folders, freeze, tied={EMBED: HEAD}).ok


def test_the_command(tmp_path: Path) -> None:
    folders = trained(tmp_path)
    plan().save(tmp_path / "plan")
    done = run("verify", *folders, tmp_path / "plan", "--json", tmp_path / "report")
    assert done.exit_code == 0, done.output
    assert "proven: no frozen byte differs" in done.output
    assert json.loads((tmp_path / "report").read_text())["ok"]
    edited(folders[1], "up_proj.lora_B.weight", 5, 2)
    done = run("verify", *folders, tmp_path / "plan")
    assert done.exit_code == 1
    assert "NOT proven" in done.output
    (folders[1] / "adapter_model.safetensors").unlink()
    fails(run("verify", *folders, tmp_path / "plan"), "which holds no adapter_model.safetensors")


@pytest.mark.parametrize(("text", "told"), [("{", "cannot be read"), ('{"peft_type": "VERA"}', "expected 'LORA'")])
def test_other_configurations_are_refused(text: str, told: str, tmp_path: Path) -> None:
    folders = trained(tmp_path)
    (folders[1] / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=told):
        audit.compare_adapter(*folders, plan())
