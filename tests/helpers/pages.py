"""The documentation's blocks of code, and why some are not run, or elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*$")
RUN_WITH = re.compile(r"<!-- run with (\w+) -->\s*$")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    reason: str  # why it is not run; "": it is
    package: str  # which tests/integrations/test_trainers.py runs it with; "": tests/test_docs.py runs it


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        before = text[: found.start()]
        reason, package = NOT_RUN.search(before), RUN_WITH.search(before)
        line = before.count("\n") + 2
        name = str(page.relative_to(ROOT))
        yield Block(name, line, found[1], found[2], reason[1] if reason else "", package[1] if package else "")


def run_blocks(page: str, namespace: dict[str, Any], package: str = "") -> None:
    """Run a page's Python in order: what is common, or what is run with ``package``."""
    for block in blocks(ROOT / page):
        if (block.language, block.reason, block.package) == ("python", "", package):
            # so that a traceback names the page and the line
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), namespace)
