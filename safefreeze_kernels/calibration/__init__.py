"""Small prompt/response sets that ship with the package, so that everything can be tried without a download.

``safety`` (requests to refuse, with refusals), ``utility`` (everyday questions, with short answers) and
``instructions`` (answers in one fixed two-line format, to fine-tune on). They are made to try things out; scores
that a decision rests on deserve the user's own, larger sets.
"""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

__all__ = ["NAMES", "load_pairs", "read_pairs"]

#: What `load_pairs` can load.
NAMES: tuple[str, ...] = ("safety", "utility", "instructions")
_EXPECTED = 'lines of {"prompt": "…", "response": "…"}'


def load_pairs(name: str) -> list[tuple[str, str]]:
    """The ``(prompt, response)`` pairs of a shipped set, in file order.

    Raises:
        ValueError: ``name`` is not one of `NAMES`.

    >>> load_pairs("utility")[0]
    ('What is the capital of France?', 'The capital of France is Paris.')
    """
    if name not in NAMES:
        raise ValueError(f"load_pairs: name is {name!r}, expected one of {', '.join(map(repr, NAMES))}")
    file = resources.files(__name__).joinpath(f"{name}.jsonl")
    return _parsed(f"load_pairs: {name!r}", file.read_text(encoding="utf-8"))


def read_pairs(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """The ``(prompt, response)`` pairs of a JSON Lines file with objects ``{"prompt": …, "response": …}``.

    Other fields of a line are left alone, empty lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the line: not JSON, no prompt or response, or one that is not a string; or no pairs at all.
    """
    where = f"read_pairs: {os.fspath(path)!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"read_pairs: no file {os.fspath(path)!r}")
    try:
        return _parsed(where, Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text in UTF-8 ({error}), expected {_EXPECTED}") from error


def _parsed(where: str, text: str) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON strings may hold what splitlines() splits at
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} line {number} is not JSON ({error}), expected {_EXPECTED}") from error
        prompt, response = (row.get("prompt"), row.get("response")) if isinstance(row, dict) else (None, None)
        if not isinstance(prompt, str) or not isinstance(response, str) or not prompt or not response:
            raise ValueError(f"{where} line {number} is {line[:60]!r}, expected {_EXPECTED}")
        pairs.append((prompt, response))
    if not pairs:
        raise ValueError(f"{where} holds no pairs, expected {_EXPECTED}")
    return pairs
