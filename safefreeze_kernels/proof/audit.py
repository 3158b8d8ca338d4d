"""Audits on disk: two checkpoints compared under a plan, without a model, without torch, in constant memory.

`compare` tells what changed. `attest` states for those who have not the base that nothing frozen did, and `check`
verifies a tuned checkpoint against such a statement.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from .._version import __version__
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .adapters import compare_adapter
from .checkpoint import DTYPES, Files, PathLike, Stored, located
from .comparison import MaskedMatrix, Pair, Progress, blocks, changes
from .names import Weights
from .report import AuditReport, TensorChanges
from .statement import Statement

__all__ = [
    "AuditReport", "Statement", "TensorChanges", "attest", "check", "compare", "compare_adapter",
    "total_bytes",
]  # fmt: skip

_THREADS: Final = min(4, os.cpu_count() or 1)


class FrozenBytesChangedError(ValueError):
    """Frozen bytes of two checkpoints differ, or were not all compared.

    Attributes:
        report: what was found.
    """

    def __init__(self, report: AuditReport) -> None:
        super().__init__(f"audit.attest: frozen bytes are not proven equal, nothing was attested\n{report}")
        self.report = report


def compare(
    base: PathLike,
    tuned: PathLike,
    plan: FreezePlan,
    *,
    tied: Mapping[str, str] | None = None,
    untied: Collection[str] = (),
    progress: Progress | None = None,
) -> AuditReport:
    """Compare two checkpoints on disk: did a frozen byte change, and how much did the rest?

    Both are read once, in blocks; a few megabytes are in memory at any time, beside the plan.

    A weight is compared under every name it goes by: those of ``tied``, and tensors outside the plan that are, byte for
    byte, copies of a weight of the plan in the base (or in the tuned checkpoint, if the base has no such tensor).
    Tensors that one checkpoint alone holds, or whose shape or dtype changed, are `AuditReport.uncompared`. Where one
    that a single checkpoint holds has the shape of a weight the plan freezes, a loader might find that weight there:
    then nothing is proven.

    Args:
        base, tuned: a safetensors file, or a folder as Hugging Face saves models to, sharded or not.
        plan: what was frozen.
        tied: name -> other name of the same weight, where checkpoints hold one of the two or both. Does the model that
            is loaded tie them (``tie_word_embeddings``)? Checkpoints cannot prove that.
        untied: names of tensors that are no weight of the plan under another name, though they look like it.
        progress: called with bytes that were gone through; `total_bytes` says of how many.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a damaged file, a folder whose index contradicts its files, checkpoints that the plan, ``tied`` or
            ``untied`` does not fit, a plan that freezes nothing.
        TypeError: ``plan`` or ``untied`` is something else.
    """
    weights = Weights("audit.compare", plan, tied, untied, base=base, tuned=tuned)
    report, pairs, _ = _prepared(weights, plan)
    # in the order of the file, or the disk would have to jump about
    pairs.sort(key=lambda pair: (pair.base.file, pair.base.start))
    with Files() as files, ThreadPoolExecutor(_THREADS) as pool:
        report.add(pool.map(lambda pair: changes(pair, files, files, progress), pairs))
    weights.unchanged()
    return report


def _prepared(weights: Weights, plan: FreezePlan) -> tuple[AuditReport, list[Pair], dict[str, str]]:
    """A report to fill, what is to be compared for it, and `Weights.lookalikes`."""
    with Files() as files:
        report = AuditReport(plan.fingerprint, notes=weights.notes(files))
        beside = weights.lookalikes(files)
    report.notes += weights.take_copies(beside)
    pairs = []
    for pair in weights.pairs():
        if pair.base.shape == pair.tuned.shape:
            pairs.append(pair)
        else:
            report.uncompared[pair.name] = f"has shape {pair.base.shape}, then {pair.tuned.shape}"
    (base, tuned), known = weights.stored.values(), weights.known
    for word, tensors, others in (("base", base, tuned), ("tuned", tuned, base)):
        for name in sorted(tensors.keys() - others.keys() - known):
            report.uncompared[name] = f"is in {word} alone"
            if name in beside and name not in weights.untied:
                report.trouble.append(_unknown(name, f"is in {word} alone"))
    return report, pairs, beside


def _unknown(name: str, why: str) -> str:
    return (
        f"{name!r} {why}, and has the shape of a weight the plan freezes: is it one, under another name? say so with "
        "tied (--tied NAME=OTHER), or with untied (--untied NAME) that it is none"
    )


def attest(
    base: PathLike,
    tuned: PathLike,
    plan: FreezePlan,
    path: PathLike | None = None,
    *,
    tied: Mapping[str, str] | None = None,
    untied: Collection[str] = (),
    progress: Progress | None = None,
) -> Statement:
    """`compare` two checkpoints, and state that no frozen byte differs, for `check`.

    The bytes that are compared are those that are hashed: both checkpoints are read once, but for tensors that a file
    holds in another order than that of their names, and for masks of more than one part (rows, columns, elements).

    Args:
        base, tuned, plan, tied, untied, progress: as in `compare`.
        path: where to write the statement.

    Raises:
        FrozenBytesChangedError: it is not proven that no frozen byte differs; it carries the report, and nothing is
            written.
        FileNotFoundError, ValueError, TypeError: as `compare`.
    """
    weights = Weights("audit.attest", plan, tied, untied, base=base, tuned=tuned)
    report, pairs, beside = _prepared(weights, plan)
    digest = hashlib.sha256()
    with Files(hashed=True) as before, Files(hashed=True) as after:
        for pair in sorted(pairs, key=lambda pair: pair.name):
            planned = pair.name in weights.plan
            if planned:
                digest.update(_heading(pair.name, pair.tuned, pair.mask))
            report.add([changes(pair, before, after, progress, digest if planned else None)])
        if not report.ok:
            raise FrozenBytesChangedError(report)
        hashes = before.digests(weights.checkpoints["base"]), after.digests(weights.checkpoints["tuned"])
    frozen = sum(mask.frozen_count for mask in weights.plan.values())
    found = Statement(plan.fingerprint, digest.hexdigest(), frozen, *hashes, beside, __version__)
    weights.unchanged()
    if path is not None:
        found.save(path)
    return found


def _heading(name: str, stored: Stored, mask: FreezeMask) -> bytes:
    """What stands before a tensor's frozen bytes in their digest, which is `proof.Snapshot.digest` of the same weights:
    SHA-256, tensors in the order of their names."""
    return f"{name}\0{DTYPES[stored.dtype][2]}\0{mask.fingerprint}\0".encode()


def check(
    tuned: PathLike,
    plan: FreezePlan,
    statement: Statement,
    *,
    tied: Mapping[str, str] | None = None,
    untied: Collection[str] = (),
    progress: Progress | None = None,
) -> AuditReport:
    """Verify a tuned checkpoint against a statement, without the base: are its frozen bytes those attested?

    Further names of a weight must hold the same frozen bytes: those of ``tied``, copies the statement knows of, and
    copies found here. A tensor of the shape of a weight the plan freezes that is none of these, and that the statement
    does not know, could be one too: then nothing is proven.

    Files with other hashes than those attested (trained further, saved anew) are a note, not a failure.

    Args:
        tuned, plan, tied, untied, progress: as in `compare`.
        statement: what `attest` returned, or `Statement.load`.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `compare`.
    """
    weights = Weights("audit.check", plan, tied, untied, tuned=tuned)
    report = AuditReport(plan.fingerprint, attested=True)
    if plan.fingerprint != statement.plan:
        report.trouble.append(f"the statement is of another plan, {statement.plan[:12]}")
        return report
    _take_names(weights, statement, report)
    digest = hashlib.sha256()
    with Files(hashed=True) as files:
        for name, mask in sorted(weights.plan.items()):
            held = weights.tensor(name, "tuned")
            digest.update(_heading(name, held, mask))
            for _, block in blocks(files, held, MaskedMatrix(mask, held.width), digest):
                if progress is not None:
                    progress(block.size)
            report.tensors.append(TensorChanges(name, mask.shape, held.dtype, mask.frozen_count, mask.live_count))
        hashes = files.digests(weights.checkpoints["tuned"])
    report.tensors += _between_names(weights)
    if digest.hexdigest() != statement.frozen:
        report.trouble.append("frozen bytes are not those attested (which ones, a comparison with the base would tell)")
    if sorted(hashes.values()) != sorted(statement.tuned.values()):
        report.notes.append("the files are others than those attested: trained further, or saved anew")
    weights.unchanged()
    return report


def _take_names(weights: Weights, statement: Statement, report: AuditReport) -> None:
    """Take the names that statement and checkpoint know for a weight; the report tells of those that are unclear."""
    stored = weights.stored["tuned"]
    with Files() as files:
        report.notes += weights.notes(files)
        beside = {**weights.lookalikes(files), **statement.names}
    copies = {}
    for name in beside.keys() & stored.keys() - weights.known - weights.untied:
        mask = weights.plan.get(beside[name])
        if mask is not None and mask.shape == stored[name].shape:
            copies[name] = beside[name]
        elif beside[name] or name not in statement.names:
            report.trouble.append(_unknown(name, "is not known to the statement"))
    report.notes += weights.take_copies(copies)
    report.uncompared = dict.fromkeys(sorted(stored.keys() - weights.known), "is outside the plan")


def _between_names(weights: Weights) -> list[TensorChanges]:
    """What differs between a weight of the tuned checkpoint and itself under its other names."""
    stored, found = weights.stored["tuned"], []
    with Files() as files:
        for name in weights.names.keys() & weights.plan.keys():
            first, *others = weights.held(name, "tuned")
            for other in others:
                between = changes(Pair(other, stored[first], stored[other], weights.plan[name]), files, files)
                # how far its live elements are from the other's is no training
                found.append(replace(between, live_changed=0, strange=0, largest=0.0, mean=0.0, rms=0.0))
    return found


def total_bytes(*checkpoints: PathLike) -> int:
    """Bytes of the files of some checkpoints.

    Raises:
        FileNotFoundError: one is not there.
    """
    return sum(file.stat().st_size for path in checkpoints for file in located(path, "audit: checkpoint")[0])
