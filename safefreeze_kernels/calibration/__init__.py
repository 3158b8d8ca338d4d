"""Small prompt/response sets that ship with the package, so that everything can be tried without a download.

``safety`` (requests to refuse, with refusals), ``utility`` (everyday questions, with short answers) and
``instructions`` (answers in one fixed two-line format, to fine-tune on). They are made to try things out; scores
that a decision rests on deserve the user's own, larger sets.
"""

from __future__ import annotations

import json
from importlib import resources

__all__ = ["NAMES", "load_pairs"]

#: What `load_pairs` can load.
NAMES: tuple[str, ...] = ("safety", "utility", "instructions")


def load_pairs(name: str) -> list[tuple[str, str]]:
    """The ``(prompt, response)`` pairs of a shipped set, in file order.

    Raises:
        ValueError: ``name`` is not one of `NAMES`.

    >>> load_pairs("utility")[0]
    ('What is the capital of France?', 'The capital of France is Paris.')
    """
    if name not in NAMES:
        raise ValueError(f"load_pairs: name is {name!r}, expected one of {', '.join(map(repr, NAMES))}")
    text = resources.files(__name__).joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [(row["prompt"], row["response"]) for row in rows]
