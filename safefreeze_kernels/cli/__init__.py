"""The console script ``safefreeze``: its commands, a file per group, which parse, call, and turn foreseen errors into
one line and an exit code.

Heavy imports stay inside the commands: ``--help`` and mistyped options must answer at once.
"""

from __future__ import annotations

import typer

from . import audits, measuring, plans
from .options import VerdictCommand, WordsCommand

app = typer.Typer(
    name="safefreeze",
    help="Freeze safety-critical neurons while fine-tuning, and prove that they did not change.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command, kind in (
    (measuring.info, None), (plans.score, WordsCommand), (plans.build, WordsCommand), (plans.inspect, None),
    (audits.verify, None), (audits.attest, None), (measuring.bench, WordsCommand),
    (measuring.plan_memory, WordsCommand), (measuring.fit, VerdictCommand), (measuring.doctor, VerdictCommand),
    (measuring.demo, None),
):  # fmt: skip
    app.command(cls=kind)(command)
app.command("plan")(plans.write_plan)


def main() -> None:
    """Entry point of the console script."""
    app()
