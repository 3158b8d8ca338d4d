"""Tensors with a header of text, in safetensors files: one way out, one way in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from ..plan.files import write_atomically

_VERSION: Final = "2"


def stamped(kind: str, fields: Mapping[str, str]) -> dict[str, str]:
    """The header of a file of a kind, in the version that `read_tensors` takes."""
    return {"format": kind, "version": _VERSION, **fields}


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], header: dict[str, str] | None = None
) -> None:
    """Write one safetensors file; a crash leaves an older file as it was."""
    from safetensors.torch import save

    write_atomically(Path(path), save(tensors, header))


def read_tensors(path: str | os.PathLike[str], kind: str | None = None) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a file.

    Raises:
        ValueError: truncated, no safetensors file; with ``kind``, one of another kind or version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = file.metadata() or {}
            if kind is not None and (header.get("format"), header.get("version")) != (kind, _VERSION):
                raise ValueError(
                    f"format {header.get('format')!r} version {header.get('version')!r}, expected {kind!r} version "
                    f"{_VERSION!r}"
                )
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error
