"""Options that several commands have, and those whose words only heavy modules know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from typer import Argument, Option
from typer.core import TyperCommand

from .terminal import fail

Dtype = Annotated[str, Option(help="Of the weights: {words}.")]
Device = Annotated[str | None, Option(help="Default: the GPU where torch finds one, else the CPU.")]
Model = Annotated[
    str | None, Option(help="A model's config file, its folder, or smollm2: what labels and plans are of.")
]
Picture = Annotated[Path | None, Option(help="PNG file to draw it into.")]
PlanFile = Annotated[Path, Argument(help="Plan file.")]


class WordsCommand(TyperCommand):
    """A command some of whose options take one of the words that only heavy modules know.

    They are loaded when help or the command is asked for: ``{words}`` in an option's help stands for them, and any
    other word is an error before work begins.
    """

    bad_input = 1  #: the exit code of such an error

    def format_help(self, ctx: Any, formatter: Any) -> None:
        known = words()
        for option in self.params:
            if option.name in known and (text := getattr(option, "help", None)):
                option.help = text.replace("{words}", ", ".join(known[option.name]))  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        for name, known in words().items():
            for given in listed(ctx.params.get(name)):
                if given not in known:
                    flag = f"--{name.replace('_', '-')}"
                    fail(
                        ValueError(f"{self.name}: {flag} is {given!r}, expected one of {', '.join(known)}"),
                        self.bad_input,
                    )
        return super().invoke(ctx)


class VerdictCommand(WordsCommand):
    """One whose exit code 1 is a verdict."""

    bad_input = 2


def words() -> dict[str, Sequence[str]]:
    """Option -> the words it takes."""
    from ..attribution import LABELS, METHODS, MaskBuilder
    from ..attribution.activations import Positions
    from ..attribution.builder import Rank, Recipe, Units
    from ..attribution.grains import Grain, Within
    from ..attribution.units import KvPolicy, Preset
    from ..attribution.weights import Form
    from ..kernels.operands import STORAGE, dtype_word

    kinds = {
        "positions": Positions, "cu_share_of": get_type_hints(MaskBuilder.freeze)["cu_share_of"], "cu_rank": Rank,
        "by": Rank, "recipe": Recipe, "units": Units, "kv": KvPolicy, "preset": Preset,
        "grain": Grain, "form": Form, "within": Within,
    }  # fmt: skip
    known = {"method": METHODS, "train_only": LABELS, "dtype": [*map(dtype_word, STORAGE)]}
    return known | {name: get_args(kind) for name, kind in kinds.items()}


def listed(given: str | None) -> list[str]:
    """The words of an option that takes several, with commas."""
    return given.split(",") if given else []


def number(flag: str, text: str, expected: str) -> float:
    """A number out of text that may hold something else."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{flag} holds {text!r}, expected {expected}") from None
