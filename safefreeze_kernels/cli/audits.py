"""``safefreeze verify`` and ``safefreeze attest``: audits of checkpoints on disk, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from .files import check_writable
from .options import PlanFile
from .terminal import byte_bar, foreseen, say

if TYPE_CHECKING:
    from ..proof.report import AuditReport

_Tuned = Annotated[Path, Argument(help="The fine-tuned checkpoint, likewise.")]
_Tied = Annotated[
    list[str] | None,
    Option(metavar="NAME=OTHER", help="Two names of one weight: all that a checkpoint holds count; repeatable."),
]
_Untied = Annotated[
    list[str] | None,
    Option(metavar="NAME", help="A tensor that is no weight of the plan, though of that shape; repeatable."),
]


def verify(
    base: Annotated[
        Path,
        Argument(
            help="The checkpoint that was fine-tuned: a safetensors file or a model folder. Or a statement of attest."
        ),
    ],
    tuned: _Tuned,
    plan: PlanFile,
    report: Annotated[Path | None, Option("--json", help="Write the whole report here.")] = None,
    tied: _Tied = None,
    untied: _Untied = None,
) -> None:
    """Prove from two checkpoints on disk that no frozen byte changed. Exit code 0: proven; 1: not; 2: bad input.

    Needs no model in memory, and no base where a statement is given instead. Of tensors that train it tells how much
    they changed. TUNED may be a folder of PEFT's with an adapter: then that what it adds to frozen weights is zero.
    """
    with foreseen(2):
        from ..plan.plan import FreezePlan
        from ..proof import audit
        from ..proof.adapters import CONFIG_FILE

        check_writable(report)
        frozen, names, others = FreezePlan.load(plan), _pairs(tied), untied or []
        if (tuned / CONFIG_FILE).is_file():
            if _is_text(base):
                raise ValueError("verify: an adapter is compared with its base, expected that instead of a statement")
            _told(audit.compare_adapter(base, tuned, frozen, tied=names, untied=others), report)
            return
        statement = audit.Statement.load(base) if _is_text(base) else None
        read = (base, tuned) if statement is None else (tuned,)
        with byte_bar("verify", audit.total_bytes(*read)) as progress:
            if statement is None:
                found = audit.compare(base, tuned, frozen, tied=names, untied=others, progress=progress)
            else:
                found = audit.check(tuned, frozen, statement, tied=names, untied=others, progress=progress)
        _told(found, report)


def _told(found: AuditReport, report: Path | None) -> None:
    """Show a report, and write it; ends the command with code 1 if nothing is proven."""
    say(str(found))
    if report is not None:
        import json

        from ..plan.files import write_atomically

        write_atomically(report, (json.dumps(found.to_json(), indent=1) + "\n").encode())
        say(f"Report in {report}")
    if not found.ok:
        raise typer.Exit(1)


def attest(
    base: Annotated[Path, Argument(help="The checkpoint that was fine-tuned: a safetensors file or a model folder.")],
    tuned: _Tuned,
    plan: PlanFile,
    output: Annotated[Path, Option("--output", "-o", help="Statement to write.")] = Path("statement.json"),
    tied: _Tied = None,
    untied: _Untied = None,
) -> None:
    """Compare two checkpoints, and state for others that no frozen byte changed; `verify` takes it for the base."""
    with foreseen():
        from ..plan.plan import FreezePlan
        from ..proof import audit

        check_writable(output)
        frozen, names = FreezePlan.load(plan), _pairs(tied)
        with byte_bar("attest", audit.total_bytes(base, tuned)) as progress:
            found = audit.attest(base, tuned, frozen, output, tied=names, untied=untied or [], progress=progress)
        say(f"{found.frozen_elements:,} frozen elements are as they were.\nStatement in {output}")


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
