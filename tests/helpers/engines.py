"""DeepSpeed on CPU ranks: real engines in processes of their own, with a model small enough to see."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from ranks import close, run_ranks
from torch import Tensor

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_engines(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`run_ranks`, in processes that import DeepSpeed before anything else. Those of four ranks are others than those
    of two: where one process once had a ZeRO-3 engine and another had none, ZeRO-2 on both adds up wrong gradients,
    torch's own AdamW included (0.19.8)."""
    return run_ranks(world, _on_rank, function, world, arguments, pool=_pool(world), patience=300.0)


def close_engines() -> None:
    """End the processes: DeepSpeed keeps the groups of every engine there was, and their threads never sleep."""
    for world in (2, 4):
        close(_pool(world))


def _pool(world: int) -> str:
    return f"engines {max(world, 2)}"


def _on_rank(rank: int, function: Callable[..., Any], world: int, arguments: tuple[Any, ...]) -> Any:
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # As if there were no compiler: its one operation for CPU ranks takes a minute to build, and sums what gloo sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # it remembers process groups of the call before, and takes no float16 on a CPU, which torch does
    comm.cdb = groups._WORLD_GROUP = groups.mesh_device = None
    Init.param_id = 0  # and numbers on, which ranks must agree in
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0  # type: ignore[index]
    get_accelerator().is_fp16_supported = lambda: True
    try:
        return function(rank, *arguments)
    finally:
        deepspeed.utils.groups._WORLD_GROUP = None


def config(
    stage: int, dtype: str = "float32", *, clip: float = 0.05, accumulate: int = 1, universal: bool = False,
    extra: dict[str, Any] | None = None, **zero: Any,
) -> dict[str, Any]:  # fmt: skip
    """What an engine is configured by. ``zero``: of ``zero_optimization``; ``extra``: beside it."""
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, **zero},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
        **(extra or {}),
    }
    if dtype == "bfloat16":
        found["bf16"] = {"enabled": True}
    if dtype == "float16":
        found["fp16"] = {"enabled": True, "initial_scale_power": 8}
    return found


def engine_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *given: Any, **options: Any) -> Any:
    """An engine with the `config` that ``given`` and ``options`` say."""
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=optimizer, config=config(*given, **options))[0]


@contextmanager
def gathered(engine: Any) -> Iterator[torch.nn.Module]:
    """The engine's model, with whole parameters."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        yield engine.module


def values(engine: Any) -> dict[str, Tensor]:
    """Whole parameters, in the model's dtype."""
    with gathered(engine) as model:
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def masters(engine: Any) -> dict[str, Tensor]:
    """Whole parameters, in float32."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}
