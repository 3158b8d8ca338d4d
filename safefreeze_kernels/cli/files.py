"""What commands read and write: plans, scores and labels, models, and whether an output can be written."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from ..attribution import UnitLabels, UnitScores, WeightScores
    from ..plan.plan import FreezePlan


def read(path: Path, operation: str, of: Sequence[str]) -> FreezePlan | UnitScores | WeightScores | UnitLabels:
    """What a file holds: a plan, scores or labels, out of those that ``operation`` takes."""
    from ..attribution import UnitScores, WeightScores, read_labels
    from ..plan.plan import FreezePlan

    if not path.exists():
        raise FileNotFoundError(f"{operation}: no file {str(path)!r}")
    kinds: dict[str, tuple[str, Callable[[Path], FreezePlan | UnitScores | WeightScores | UnitLabels]]] = {
        "safefreeze.plan": ("plan", FreezePlan.load),
        "safefreeze.unit_scores": ("scores", UnitScores.load),
        "safefreeze.weight_scores": ("scores", WeightScores.load),
    }
    kind, reader = kinds.get(_format(path), ("labels", read_labels))
    if kind not in of:
        raise ValueError(f"{operation}: {str(path)!r} is a {kind} file, expected {' or '.join(of)}")
    try:
        return reader(path)
    except (OSError, ValueError, TypeError) as error:
        if kind != "labels":
            raise
        raise ValueError(f"{operation}: {str(path)!r} is none of {', '.join(of)} ({error})") from error


def read_plan(path: Path | None, operation: str) -> FreezePlan | None:
    """The plan of an option that need not be given."""
    return None if path is None else cast("FreezePlan", read(path, operation, of=("plan",)))


def _format(path: Path) -> str:
    """The format a safetensors file says it has, else nothing."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return ""
    try:
        with safe_open(path, framework="np") as file:
            return str((file.metadata() or {}).get("format", ""))
    except SafetensorError:
        return ""


def check_writable(*paths: Path | None) -> None:
    """An output that cannot be written should fail before the work, not after it."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise IsADirectoryError(f"cannot write {str(path)!r}: it is a folder, expected a file name")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"cannot write {str(path)!r}: no folder {str(path.parent)!r}")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"cannot write {str(path)!r}: folder {str(path.parent)!r} is read-only")


def load_on_device(model: str, dtype: str, device: str | None, operation: str) -> tuple[str, Any, Any]:
    """A model's name, the model in this dtype on this device (None: a GPU, or else the CPU), and its tokenizer."""
    import torch
    from rich.console import Console

    from ..integrations.transformers import load_model

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{operation}: --device is {chosen!r}, expected a device torch runs on here ({reason})"
        ) from error
    with Console().status(f"Loading {model}"):
        name, network, tokenizer = load_model(model, getattr(torch, dtype))
        return name, network.to(place), tokenizer
