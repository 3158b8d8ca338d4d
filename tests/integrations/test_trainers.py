"""docs/how-to/trainers.md with the real trainers. `make trainers` has their packages; without them the tests skip."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from pages import ROOT, blocks, run_blocks
from ranks import run_ranks
from torch import Tensor

import safefreeze_kernels as sf

PAGE: Final = "docs/how-to/trainers.md"
UP, DOWN, QUERY = (f"model.layers.0.{name}.weight" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"))
PLAN: Final = sf.FreezePlan(
    {
        UP: sf.FreezeMask((48, 32), rows=range(0, 48, 4)),
        DOWN: sf.FreezeMask((32, 48), cols=range(0, 48, 4)),
        QUERY: sf.FreezeMask((32, 32), rows=range(8)),  # one of four heads
    }
)


def needs(package: str) -> Any:
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"{package} is not installed; make trainers runs this")


def llama() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def sentences() -> list[list[int]]:
    return torch.randint(3, 60, (8, 9), generator=torch.Generator().manual_seed(0)).tolist()


def started(**names: Any) -> dict[str, Any]:
    """What the page's own functions, and the reader, have when a section begins."""
    model = llama()
    model(input_ids=torch.tensor(sentences()[:2]), labels=torch.tensor(sentences()[:2])).loss.backward()
    namespace: dict[str, Any] = {"model": model, "plan": PLAN}
    run_blocks(PAGE, namespace)
    return {**namespace, **names}


def assert_trained(found: dict[str, Tensor], start: dict[str, Tensor], plan: sf.FreezePlan = PLAN) -> None:
    """What the plan names stayed, to the byte, and everything else moved."""
    for name, mask in plan.items():
        same = (found[name] == start[name]).cpu()
        assert same[mask.dense()].all(), f"{name}: frozen elements moved"
        assert not same[~mask.dense()].all(), f"{name}: nothing trained"


def test_every_section_is_run_here() -> None:
    packages = {block.package for block in blocks(ROOT / PAGE)} - {""}
    assert packages == {"accelerate", "axolotl", "llamafactory", "torchtitan", "torchtune"}


# ---------------------------------------------------------------------------------------------------- accelerate


def sharded(rank: int) -> tuple[dict[str, Tensor], list[str]]:
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from torch.distributed.tensor import DTensor

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    namespace = started()
    rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in sentences()]
    run_blocks(PAGE, namespace, "accelerate")
    model = namespace["train"](accelerator, llama(), PLAN, torch.utils.data.DataLoader(rows, batch_size=2))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return {name: p.full_tensor().detach() for name, p in model.named_parameters() if name in PLAN}


def test_accelerates_fsdp2() -> None:
    found = run_ranks(2, sharded)
    start = llama().state_dict()
    for each in found:
        assert_trained(each, start)
    assert all(torch.equal(found[0][name], found[1][name]) for name in PLAN)


# -------------------------------------------------------------------------------------------------- LLaMA-Factory


@needs("llamafactory")
def test_llamafactory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from model_folders import save_model
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    if importlib.util.find_spec("torchaudio") is None:
        monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    save_model(tmp_path / "model", d_ff=48)
    (tmp_path / "data.json").write_text(
        json.dumps([{"instruction": "Name a colour.", "input": "", "output": "Blue."}] * 8)
    )
    (tmp_path / "dataset_info.json").write_text(json.dumps({"colours": {"file_name": "data.json"}}))
    config = {
        "model_name_or_path": str(tmp_path / "model"), "stage": "sft", "do_train": True, "finetuning_type": "full",
        "dataset": "colours", "dataset_dir": str(tmp_path), "template": "default", "cutoff_len": 32,
        "output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "weight_decay": 0.1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "overwrite_cache": True,
    }  # fmt: skip
    run_blocks(PAGE, started(config=config), "llamafactory")
    models = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "model"))
    assert_trained(*(model.float().state_dict() for model in models))


# -------------------------------------------------------------------------------------------------------- axolotl


@pytest.fixture
def axolotl_trainer(tmp_path: Path) -> Any:
    import transformers
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments
    from datasets import Dataset

    args = AxolotlTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1,
        report_to=[], use_cpu=True, save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_list(
        [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in sentences()]
    )
    return AxolotlTrainer(
        model=llama(), args=args, train_dataset=rows, data_collator=transformers.default_data_collator,
        bench_data_collator=None,
    )  # fmt: skip


@needs("axolotl")
def test_axolotl(axolotl_trainer: Any) -> None:
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    namespace = started()
    run_blocks(PAGE, namespace, "axolotl")
    manager = PluginManager.get_instance()
    manager.plugins["frozen"] = namespace["Frozen"]()
    try:
        manager.post_trainer_create(DictDefault({}), axolotl_trainer)
    finally:
        del manager.plugins["frozen"]
    axolotl_trainer.train()
    assert_trained(axolotl_trainer.model.state_dict(), llama().state_dict())
    assert {group["lr"] for group in axolotl_trainer.optimizer.param_groups} == {0.0}  # as scheduled, from 1e-2
    assert {group["weight_decay"] for group in axolotl_trainer.optimizer.param_groups} == {0.1, 0.0}


@needs("axolotl")
def test_axolotls_hook_for_optimizers_is_never_called(axolotl_trainer: Any) -> None:
    """The page says so; once this fails, it is the better place."""
    from axolotl.integrations.base import BasePlugin, PluginManager

    from safefreeze_kernels.integrations.transformers import FreezeCallback, build_masked_adamw

    class Frozen(BasePlugin):
        def create_optimizer(self, cfg: Any, trainer: Any) -> Any:
            return build_masked_adamw(trainer.model, PLAN, trainer.args)

    manager = PluginManager.get_instance()
    manager.plugins["frozen"] = Frozen()
    axolotl_trainer.add_callback(FreezeCallback(PLAN))
    try:
        with pytest.raises(ValueError, match="optimizer is of type AdamW and does not freeze"):
            axolotl_trainer.train()
    finally:
        del manager.plugins["frozen"]


# ------------------------------------------------------------------------------------------------------ torchtune


def torchtune_recipe() -> Any:
    """The class of a recipe: they are scripts, to be copied."""
    import torchtune

    name = "full_finetune_single_device"
    spec = importlib.util.spec_from_file_location(name, Path(torchtune.__file__).parents[1] / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.FullFinetuneRecipeSingleDevice


def torchtune_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from omegaconf import OmegaConf

    toys = types.ModuleType("toys")
    toys.tokenizer = lambda: types.SimpleNamespace(pad_id=0)  # type: ignore[attr-defined]
    toys.data = lambda tokenizer: [{"tokens": row, "labels": row} for row in sentences()]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toys", toys)
    llama().save_pretrained(folder / "model")
    return OmegaConf.create(
        {
            "output_dir": str(folder / "out"), "device": "cpu", "dtype": "fp32", "seed": 0, "shuffle": False,
            "model": {
                "_component_": "torchtune.models.llama2.llama2", "vocab_size": 64, "num_layers": 2, "num_heads": 4,
                "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 64, "intermediate_dim": 48,
            },
            "tokenizer": {"_component_": "toys.tokenizer"}, "dataset": {"_component_": "toys.data"},
            "checkpointer": {
                "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(folder / "model"),
                "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None,
                "output_dir": str(folder / "out"), "model_type": "LLAMA2",
            },
            "resume_from_checkpoint": False, "batch_size": 2, "epochs": 1, "max_steps_per_epoch": 3,
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2, "weight_decay": 0.1},
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "gradient_accumulation_steps": 1, "optimizer_in_bwd": False, "clip_grad_norm": None, "compile": False,
            "enable_activation_checkpointing": False, "enable_activation_offloading": False,
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(folder / "logs"),
            },
            "log_every_n_steps": 1, "log_peak_memory_stats": False,
            "profiler": {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False},
        }
    )  # fmt: skip


@needs("torchtune")
def test_torchtune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads are permuted on the way in, and back on the way out: the plan is checked in transformers' names."""
    namespace = started(FullFinetuneRecipeSingleDevice=torchtune_recipe())
    run_blocks(PAGE, namespace, "torchtune")
    config = torchtune_config(tmp_path, monkeypatch)
    recipe = namespace["Frozen"](config)
    recipe.setup(config)
    recipe.train()
    recipe.cleanup()
    (out,) = {file.parent for file in (tmp_path / "out").rglob("*.safetensors")}
    report = sf.audit.compare(tmp_path / "model", out, PLAN)
    assert report.ok, report
    from safetensors.torch import load_file

    tensors = [
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in (out, tmp_path / "model")
    ]
    assert_trained(*tensors)


@needs("torchtune")
def test_torchtunes_unnamed_parameters_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchtune.config import instantiate

    config = torchtune_config(tmp_path, monkeypatch)
    model = instantiate(config.model)
    config.optimizer["_component_"] = "safefreeze_kernels.MaskedAdamW"
    with pytest.raises(ValueError, match="given without names; pass model"):
        sf.MaskedAdamW(model.parameters(), lr=1e-2, freeze=PLAN)
    with pytest.raises(ValueError, match="or in the names of another library"):
        sf.MaskedAdamW(model.named_parameters(), lr=1e-2, freeze=PLAN)
    assert instantiate(config.optimizer, model.parameters()).plan is None  # a config alone freezes nothing


# ----------------------------------------------------------------------------------------------------- torchtitan


@needs("torchtitan")
def test_torchtitan() -> None:
    """Its attention has no backward on a CPU: gradients come through embeddings, feed-forward and head."""
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.models.llama3 import model_registry

    spec = model_registry("debugmodel")
    spec.model.layers[:] = spec.model.layers[:1]
    with torch.device("meta"):
        model = spec.model.build()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_states(buffer_device=torch.device("cpu"))
    start = copy.deepcopy(model)
    plan = sf.FreezePlan(
        {UP: sf.FreezeMask((768, 256), rows=range(0, 768, 2)), DOWN: sf.FreezeMask((256, 768), cols=range(0, 768, 2))}
    )
    config = types.SimpleNamespace(optimizer=default_adamw(lr=1e-2))
    namespace = started(spec=spec, config=config, plan=plan)
    run_blocks(PAGE, namespace, "torchtitan")
    optimizers = config.optimizer.build(model_parts=[model])
    tokens = torch.tensor(sentences())
    for _ in range(3):
        hidden = model.tok_embeddings(tokens[:, :-1])
        logits = model.lm_head(model.norm(hidden + model.layers["0"].feed_forward(hidden)))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizers.step()
        optimizers.zero_grad()
    assert_trained(model.state_dict(), start.state_dict(), namespace["own"])
    adapter = namespace["adapter"]
    assert_trained(adapter.to_hf(model.state_dict()), adapter.to_hf(start.state_dict()), plan)
    state = {key: copy.deepcopy(value) for key, value in optimizers.state_dict().items()}
    assert state["state.layers.0.feed_forward.w3.weight.exp_avg"].shape == (384, 256)
    again = config.optimizer.build(model_parts=[start])
    again.load_state_dict(state)
    for key, value in again.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[key])) if isinstance(value, Tensor) else True
    with pytest.raises(
        ValueError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight'.*or in the names of another library"
    ):
        sf.MaskedAdamW(model.named_parameters(), lr=1e-2, freeze=plan)
