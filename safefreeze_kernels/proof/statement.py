"""A statement of what an audit found, as a file, for when the base is no longer at hand."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ..plan.files import write_atomically
from .checkpoint import PathLike

_LARGEST: Final = 16 << 20
_FORMAT: Final = "safefreeze.statement"
_VERSION: Final = 2
_TEXTS: Final = ("base", "tuned", "names")  # of a statement's fields those that map names to text
_TYPES: Final = {"plan": str, "frozen": str, "frozen_elements": int, **dict.fromkeys(_TEXTS, dict), "package": str}


@dataclass(frozen=True)
class Statement:
    """What `attest` vouches for.

    Attributes:
        plan: fingerprint of the plan.
        frozen: SHA-256 (hex) over names, dtypes and frozen bytes, as `snapshot(model, plan).digest`.
        frozen_elements: how many.
        base, tuned: file name -> SHA-256 (hex) of the whole file.
        names: of each tensor outside the plan that has the shape of a weight it freezes, the weight of which it was
            found to be a copy, and compared as such; "" if it is none.
        package: the version that wrote it.
    """

    plan: str
    frozen: str
    frozen_elements: int
    base: dict[str, str]
    tuned: dict[str, str]
    names: dict[str, str]
    package: str

    def save(self, path: PathLike) -> None:
        """Write as JSON; a crash leaves an older file as it was."""
        content = {"format": _FORMAT, "version": _VERSION, "checksum": self._checksum(), **asdict(self)}
        write_atomically(Path(path), (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    def _checksum(self) -> str:
        """Finds accidents. Forgery it does not."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, path: PathLike) -> Statement:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no statement, damaged, or of a later version.
        """
        source, what = Path(path), f"Statement.load: {os.fspath(path)!r}"
        if not source.is_file():
            raise FileNotFoundError(f"Statement.load: no file {os.fspath(path)!r}")
        if source.stat().st_size > _LARGEST:
            raise ValueError(f"{what} has {source.stat().st_size:,} bytes: no statement")
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
            kind, version, checksum = (content.pop(key) for key in ("format", "version", "checksum"))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{what} is no statement ({error!r})") from error
        if kind != _FORMAT or version != _VERSION:
            expected = f"this package reads {_FORMAT!r} of version {_VERSION}"
            raise ValueError(f"{what} is {kind!r} of version {version!r}, {expected}")
        if {key: type(value) for key, value in content.items()} != _TYPES or not all(
            isinstance(value, str) for key in _TEXTS for value in content[key].values()
        ):
            raise ValueError(f"{what} does not hold {', '.join(_TYPES)}; it is damaged")
        found = cls(**content)
        if found._checksum() != checksum:
            raise ValueError(f"{what} was altered: it does not match its checksum")
        return found
