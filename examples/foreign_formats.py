"""Labels, unit lists and scores in the files other projects publish, read into what the package takes.

    python examples/foreign_formats.py attribution/ labels.safetensors     # then: safefreeze build labels.safetensors

Read are ``.pt`` (``torch.save``), ``.npy``, ``.npz``, ``.csv``, ``.json`` and ``.txt`` (a JSON value or a Python
literal), and ``.safetensors``. Nothing is unpickled, nothing is evaluated: a file cannot run anything. Copy what you
need.

- `labels`: the SSAH prototype's ``attribution`` folder, a file of two tensors, a table. Becomes `UnitLabels`.
- `units`: lists of heads or channels (TwinBreak's, THU-KEG's ranks, tables). Becomes a `UnitSelection`.
- `scores`: one score per head or channel (THU-KEG's, tables). Becomes a `UnitRanking`, for ``MaskBuilder(…).top``.
- `neurons`: SN-Tune's five printed lines. Becomes a `FreezePlan`.
"""

import ast
import csv
import json
import pickle
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import safefreeze_kernels as sf
from safefreeze_kernels.attribution import (
    LABELS,
    UnitLabels,
    UnitLayout,
    UnitRanking,
    UnitSelection,
    plan_from_neurons,
    read_labels,
    scores_from,
    units_from,
)

PROTOTYPE = ("atten_attr", "mlp_attr")
LABEL_NAMES = (("attention_heads", "mlp_channels"), PROTOTYPE)


class Table(list[dict[str, str]]):
    """Lines of a ``.csv``, at least one; names of columns in lower case."""


def labels(path: str | Path) -> UnitLabels:
    """Labels of every unit. A table has the columns layer, unit, kind (head or channel) and label (name or code)."""
    path = Path(path)
    if path.is_dir() or path.stem in PROTOTYPE:  # float32 codes, in two files
        folder = path if path.is_dir() else path.parent
        both = [load(folder / f"{name}.pt") for name in PROTOTYPE]
    elif path.suffix == ".csv":
        both = [table_labels(load(path), word, path) for word in ("heads", "channels")]
    elif path.suffix == ".safetensors":
        return read_labels(path)
    else:
        content = load(path)
        held = list(content) if isinstance(content, Mapping) else [type(content).__name__]
        names = next((names for names in LABEL_NAMES if set(names) <= set(held)), None)
        if names is None:
            raise ValueError(
                f"{path} holds {', '.join(map(str, held))}, expected tensors attention_heads and mlp_channels"
            )
        both = [content[name] for name in names]
    return UnitLabels(*(codes(word, found) for word, found in zip(("heads", "channels"), both, strict=True)))


def codes(word: str, given: Any) -> torch.Tensor:
    """Integer codes, where labels are whole numbers kept as floats, or bools: of a base model the prototype keeps True
    for what is not redundant (RU), which reads as CU."""
    if not isinstance(given, torch.Tensor | np.ndarray):
        raise TypeError(f"{word} is a {type(given).__name__}, expected a tensor of codes")
    given = torch.as_tensor(given)
    if given.dtype == torch.bool:
        return torch.where(given, LABELS.index("CU"), LABELS.index("RU"))
    whole = given.is_floating_point() and bool((given == given.round()).all())
    return given.to(torch.int64) if whole else given


def units(layout: UnitLayout, **files: str | Path) -> UnitSelection:
    """``heads=`` and ``channels=``: files that list units. A table has the columns layer and unit, and kind where it
    lists both kinds."""
    found = {}
    for word, path in files.items():
        content = load(path)
        if isinstance(content, Table):
            if {"score", "label"} & set(content[0]):
                raise ValueError(f"{path} has a score or label per unit; read it with scores or labels")
            content = lines_of(content, word, None, path)[0]
        found[word] = content
    selection = units_from(layout, **found)
    return replace(selection, origin={"selection": {"units_from": {word: str(path) for word, path in files.items()}}})


def scores(layout: UnitLayout, **files: Any) -> UnitRanking:
    """``heads=`` and ``channels=``: files with a score per unit. A table has the columns layer, unit and score, and
    kind where it scores both kinds. Further arguments as `scores_from` takes them."""
    for word, shape in layout.unit_shapes.items():
        if word not in files:
            continue
        content = load(files[word])
        if isinstance(content, Table):
            content = filled(word, *lines_of(content, word, "score", files[word]), shape, files[word])
        elif isinstance(content, tuple) and len(content) == 6:
            # THU-KEG: change scores, ranks, and mean and standard deviation of both models' activations
            content = content[0]
        files[word] = content
    return scores_from(layout, **files)


def neurons(layout: UnitLayout, path: str | Path) -> sf.FreezePlan:
    """The plan of SN-Tune's neuron file: five lines, each ``{layer: indices}``; see `plan_from_neurons`."""
    lines = [literal(Path(path), line) for line in text(Path(path)).splitlines() if line.strip()]
    plan = plan_from_neurons(layout, lines)
    return sf.FreezePlan(plan, {**plan.metadata, "selection": {"neurons_from": str(path)}})


# ------------------------------------------------------------------------------------------------------------- tables


def table_labels(rows: Table, word: str, path: Path) -> np.ndarray:
    if not {"layer", "unit", "kind", "label"} <= set(rows[0]):
        raise ValueError(f"{path} has columns {', '.join(rows[0])}, expected layer, unit, kind and label")
    pairs, values = lines_of(rows, word, "label", path)
    if not pairs.size:
        raise ValueError(f"{path} labels no {word}, expected every unit")
    return filled(word, pairs, values, (int(pairs[:, 0].max()) + 1, int(pairs[:, 1].max()) + 1), path)


def lines_of(rows: Table, word: str, column: str | None, path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Int64 (layer, unit) pairs and the values of ``column`` of a table's lines about one kind of unit."""
    needed = {"layer", "unit", *([column] if column else [])}
    if not needed <= set(rows[0]):
        raise ValueError(f"{path}: columns {', '.join(rows[0])}, expected {', '.join(sorted(needed))} (and kind)")
    pairs, values = [], []
    for number, row in enumerate(rows, start=2):
        kind = (row.get("kind") or word).strip().lower()
        if kind not in ("head", "heads", "channel", "channels"):
            raise ValueError(f"{path}: line {number} has kind {kind!r}, expected head or channel")
        if kind.rstrip("s") != word.rstrip("s"):
            continue
        try:
            pairs.append((int(row["layer"]), int(row["unit"])))
            value = (row[column] if column else "0").strip()
            values.append(LABELS.index(value) if column == "label" and value in LABELS else float(value))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: line {number} is {dict(row)!r}, expected numbers ({error})") from None
    return np.array(pairs, np.int64).reshape(-1, 2), np.array(values, np.float64)


def filled(word: str, pairs: np.ndarray, values: np.ndarray, shape: tuple[int, int], path: str | Path) -> np.ndarray:
    """The values as an array ``shape``: every unit exactly once."""
    outside = ((pairs < 0) | (pairs >= shape)).any(1)
    if outside.any():
        raise ValueError(f"{path}: {word} of {shape} hold no layer and unit {tuple(pairs[outside][0].tolist())}")
    if 2 * len(pairs) < shape[0] * shape[1]:  # before memory is taken for whatever numbers a file may name
        raise ValueError(f"{path}: {len(pairs)} lines for {shape[0]} x {shape[1]} {word}, expected each unit once")
    times = np.zeros(shape, np.int64)
    np.add.at(times, tuple(pairs.T), 1)
    if (times != 1).any():
        layer, unit = np.argwhere(times != 1)[0].tolist()
        found = "more than once" if times[layer, unit] else "nowhere"
        raise ValueError(
            f"{path}: {word[:-1]} {unit} of layer {layer} is {found} in the table, expected each unit once"
        )
    array = np.empty(shape)
    array[tuple(pairs.T)] = values
    return array


# -------------------------------------------------------------------------------------------------------------- files


def load(path: str | Path) -> Any:
    """What a file holds, by its ending: tensors, arrays, containers, a `Table`; the path itself where it is ours."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    if path.suffix == ".safetensors":
        return path
    if path.suffix == ".pt":
        return load_torch(path)
    if path.suffix in (".npy", ".npz"):
        return load_numpy(path)
    if path.suffix in (".json", ".txt"):
        return literal(path, text(path))
    if path.suffix != ".csv":
        endings = ".safetensors, .pt, .npy, .npz, .csv, .json or .txt"
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}, expected {endings}")
    rows = list(csv.DictReader(text(path).splitlines()))
    if not rows:
        raise ValueError(f"{str(path)!r} has no lines, expected a header and a line per unit")
    return Table({(key or "").strip().lower(): value for key, value in row.items()} for row in rows)


def load_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        code = found.group(1) if found else "pickled objects"
        raise ValueError(
            f"{str(path)!r} needs pickle code to load ({code}), which could run anything, expected tensors, numbers "
            "and containers only; where you trust it, load it there and save its tensors with safetensors"
        ) from None
    except Exception as error:  # damage surfaces as whatever the reader trips over, assertions included
        raise ValueError(f"{str(path)!r} is truncated or not a torch.save file ({error})") from error


def load_numpy(path: Path) -> Any:
    try:
        content = np.load(path, allow_pickle=False)
        return content if isinstance(content, np.ndarray) else {key: content[key] for key in content.files}
    except Exception as error:  # as above
        code = "; it needs pickle code to load, which could run anything: save plain arrays"
        hint = code if "pickle" in str(error) else ""
        raise ValueError(f"{str(path)!r} is not a file of plain arrays ({error}){hint}") from error


def text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not a text file ({error})") from error


def literal(path: Path, content: str) -> Any:
    """A JSON value or a Python literal (with sets); never evaluated."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(content.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} holds {content.strip()[:40]!r}, expected a JSON value or a Python literal ({error})"
        ) from None


if __name__ == "__main__":
    found = labels(sys.argv[1])
    found.save(sys.argv[2])
    print(found)
