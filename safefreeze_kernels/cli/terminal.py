"""What commands show on a terminal: text, progress, and foreseen errors as one line and an exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer


def say(*shown: object, style: str | None = None) -> None:
    """Print text as it is, wrapped to the terminal, and tables."""
    from rich.console import Console

    for one in shown:
        Console().print(one, style=style, highlight=False, markup=not isinstance(one, str))


@contextmanager
def byte_bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Yields what to call with the number of bytes done; a bar on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, advance=done)


@contextmanager
def foreseen(code: int = 1) -> Iterator[None]:
    """What a user can act on ends as one line; programming errors keep their traceback."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        fail(error, code)


def fail(error: Exception, code: int = 1) -> NoReturn:
    """End the command with the error in one line."""
    typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
    raise typer.Exit(code)
