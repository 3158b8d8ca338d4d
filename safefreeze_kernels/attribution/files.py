"""Tensors with a header of text, in safetensors files: one way out, one way in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ..plan.files import write_atomically

_VERSION: Final = "2"
_DTYPES: Final = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}


def stamped(kind: str, fields: Mapping[str, str]) -> dict[str, str]:
    """The header of a file of a kind, in the version that `read_tensors` takes."""
    return {"format": kind, "version": _VERSION, **fields}


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], header: dict[str, str] | None = None
) -> None:
    """Write one safetensors file, tensor by tensor; a crash leaves an older file as it was."""
    # the library's `save` holds all bytes in memory, next to the tensors; aligned, as it lays them out
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    entries: dict[str, object] = {} if header is None else {"__metadata__": header}
    end = 0
    for name, tensor in ordered.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _DTYPES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for tensor in ordered.values():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    write_atomically(Path(path), parts())


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
