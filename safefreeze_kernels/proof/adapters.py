"""The audit of saved adapters (PEFT's folders): is what they add to frozen weights exactly zero?"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..plan.adapted import PLAIN_INITIALISATIONS, Factors
from ..plan.binding import bare_name
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .checkpoint import Files, PathLike, Stored, opened
from .comparison import MaskedMatrix, Pair, blocks, changes
from .names import Weights
from .report import AuditReport, TensorChanges

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
_OPERATION: Final = "audit.compare_adapter"
_FACTOR: Final = re.compile(r"(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.weight)?")


def compare_adapter(
    base: PathLike,
    adapter: PathLike,
    plan: FreezePlan,
    *,
    tied: Mapping[str, str] | None = None,
    untied: Collection[str] = (),
) -> AuditReport:
    """Is what a saved adapter adds to frozen weights of its base exactly zero? The base's weights are not read.

    Of LoRA's factors the lines that make the frozen rows and columns have to be zero (`Factors`); weights that the
    adapter holds whole are compared with the base's byte by byte; weights without an adapter are the base's.

    Args:
        base: as in `compare`; of it names and shapes are read, and weights that the adapter holds whole.
        adapter: a folder as PEFT's ``save_pretrained`` writes it.
        plan: what was frozen, in the base's names.
        tied, untied: as in `compare`.

    Returns:
        The report; it is not ``ok`` where something is not zero, or cannot be told from the files: then its ``trouble``
        says so, and what can (the merged checkpoint can always be compared).

    Raises:
        FileNotFoundError: no checkpoint, or no adapter there.
        ValueError: a damaged file; an adapter that is not LoRA; checkpoints that the plan does not fit.
    """
    folder = Path(adapter)
    config = _config(folder)
    weights = Weights(_OPERATION, plan, tied, untied, base=base)
    held = opened(folder / WEIGHTS_FILE, f"{_OPERATION}: adapter")
    report = AuditReport(plan.fingerprint)
    how = config.get("init_lora_weights", True)
    if how not in PLAIN_INITIALISATIONS:
        report.trouble.append(
            f"the adapter was initialised with init_lora_weights={how!r}, which may rewrite the base's weights; merge "
            "it, and compare what comes of it"
        )
    home = {name: weight for weight, names in weights.names.items() for name in names}
    with Files() as files:
        report.notes += weights.notes(files)
        found = _Adapter(held.tensors, home, config, weights.plan, files)
        for name, mask in weights.plan.items():
            stored, whole = weights.tensor(name, "base"), found.parts.get(name, {}).get("whole")
            told = TensorChanges(name, mask.shape, stored.dtype, mask.frozen_count, mask.live_count)
            if whole is not None and whole.shape == stored.shape:
                told = changes(Pair(name, stored, whole, mask), files, files)
            elif whole is not None:
                told.trouble = f"has shape {stored.shape} in the base, and {whole.shape} in the adapter"
            report.tensors.append(told)
            report.trouble += found.troubles(name, mask)
        known = weights.known | weights.stored["base"].keys() | weights.untied
        report.trouble += found.unknown(known)
        adapted, total = len(weights.plan.keys() & found.parts.keys()), len(weights.plan)
        report.notes.append(f"the adapter has something for {adapted} of {total} weights of the plan; others stand")
    weights.unchanged()
    return report


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    for needed in (file, folder / WEIGHTS_FILE):
        if not needed.is_file():
            raise FileNotFoundError(f"{_OPERATION}: adapter is {os.fspath(folder)!r}, which holds no {needed.name}")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{_OPERATION}: {os.fspath(file)!r} cannot be read ({error!r})") from error
    if kind != "LORA":
        raise ValueError(
            f"{_OPERATION}: {os.fspath(folder)!r} is of type {kind!r}, expected 'LORA'; merge it, and compare"
        )
    return config


class _Adapter:
    """What a saved adapter holds, by the weight or bias that it is for.

    Attributes:
        parts: name in the base -> "A", "B", "embedding" (its A, once more), "magnitude" (of DoRA), "added" (to a bias),
            "whole" (trained itself, or of no known kind).
    """

    def __init__(
        self, tensors: Mapping[str, Stored], home: Mapping[str, str], config: Mapping[str, Any], plan: FreezePlan,
        files: Files,
    ) -> None:  # fmt: skip
        self._config, self._plan, self._files = config, plan, files
        self.parts: dict[str, dict[str, Stored]] = {}
        for key, stored in tensors.items():
            name = key.removeprefix("base_model.model.")
            module, split, kind = name.partition(".lora_")
            factor = _FACTOR.fullmatch(kind) if split else None
            part = factor["factor"] if factor else "added" if kind == "B.bias" else "whole"
            if kind.startswith("magnitude_vector"):
                part = "magnitude"
            # what is of no known kind stays under its own name
            weight = bare_name(name if part == "whole" else f"{module}.{'bias' if part == 'added' else 'weight'}")
            parts = self.parts.setdefault(home.get(weight, weight), {})
            parts[part] = stored
            if factor and factor["embedding"] and part == "A":
                parts["embedding"] = stored

    def troubles(self, name: str, mask: FreezeMask) -> Iterator[str]:
        """What of a weight, or of a bias, is not proven to stand still."""
        parts = self.parts.get(name, {})
        if "added" in parts:
            yield from self._nonzero(f"what is added to {name!r}", parts["added"], FreezeMask(mask.shape, mask.rows))
        if any(name.endswith(target) for target in self._config.get("target_parameters") or ()):
            yield f"{name!r} is adapted by target_parameters; merge the adapter, and compare what comes of it"
            return
        if not parts.keys() & {"A", "B", "magnitude"}:
            return
        if "A" not in parts or "B" not in parts:
            yield f"{name!r} has {' and '.join(sorted(parts))} in the adapter, expected both factors, A and B"
            return
        try:
            masks = self._factors(parts, mask.matrix_shape).masks(mask)
        except ValueError as error:
            yield f"{name!r}: {error}"
            return
        for factor, frozen in zip(("A", "B"), masks, strict=True):
            yield from self._nonzero(f"factor {factor} of {name!r}", parts[factor], frozen)
        if "magnitude" in parts and mask.frozen_count:
            yield f"{name!r} has DoRA, whose magnitudes scale its rows; merge the adapter, and compare what comes of it"
        bias = name.removesuffix("weight") + "bias"
        planned = self._plan[bias].frozen_rows if bias in self._plan else np.empty(0, np.int64)
        left = np.setdiff1d(masks[1].frozen_rows, planned)
        if left.size and self.parts.get(bias):
            yield f"{bias!r} is trained, and moves output {left[0]} of {name!r}, which the plan freezes"

    def unknown(self, known: Collection[str]) -> Iterator[str]:
        """What the adapter holds under a name that the base does not have, and that might move a weight of the plan."""
        frozen = {mask.matrix_shape: name for name, mask in self._plan.items() if mask.frozen_count}
        layers = tuple(f"{name.rpartition('.')[0]}." for name, mask in self._plan.items() if mask.frozen_count)
        for name in sorted(self.parts.keys() - known):
            if name.startswith(layers):
                yield (
                    f"{name!r} is of a layer whose weight the plan freezes, and not of a kind known here; merge "
                    "the adapter, and compare what comes of it"
                )
                continue
            parts = self.parts[name]
            shapes = [parts["whole"].shape] if "whole" in parts else []
            if "A" in parts and "B" in parts:
                shapes = [(parts["B"].shape[0], parts["A"].shape[1]), (parts["A"].shape[1], parts["B"].shape[0])]
            for shape in shapes:
                if shape in frozen:
                    yield (
                        f"{name!r} is adapted, not in the base, and has the shape of {frozen[shape]!r}: is it that "
                        "weight, under another name? say so with tied (--tied NAME=OTHER), or with untied (--untied "
                        "NAME) that it is none"
                    )
                    break

    def _factors(self, parts: Mapping[str, Stored], shape: tuple[int, int]) -> Factors:
        """As the weight's shape says, and for a square one what the adapter's configuration says."""
        a, b = (parts[factor].shape for factor in ("A", "B"))
        transposed = "embedding" in parts or bool(self._config.get("fan_in_fan_out"))
        if "embedding" not in parts and Factors(a, b, transposed).matrix_shape != shape:
            transposed = not transposed
        return Factors(a, b, transposed)

    def _nonzero(self, what: str, stored: Stored, mask: FreezeMask) -> Iterator[str]:
        """The first frozen element of a stored tensor that is not zero, of either sign."""
        matrix = MaskedMatrix(mask, stored.width)
        for window, block in blocks(self._files, stored, matrix):
            magnitude = (block.view(f"<u{stored.width}") << 1) != 0  # all bits but the sign
            rows, cols, _ = matrix.flags(window)
            frozen = (rows[:, None] != 0) | (cols != 0 if cols is not None else False)
            if (wrong := magnitude & frozen).any():
                row, col = divmod(window.first + int(wrong.argmax()), mask.matrix_shape[1])
                yield f"{what} is not zero in row {row}, column {col}, so that it moves what the plan freezes"
                return
