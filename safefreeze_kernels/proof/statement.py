"""A statement of what an audit found, for when the base is no longer at hand.

`attest` writes it, `check` verifies a tuned checkpoint against it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from ..plan.files import write_atomically
from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .audit import (
    AuditReport,
    Progress,
    TensorChanges,
    _blocks,
    _changes,
    _fill,
    _Matrix,
    _nothing,
    _Pair,
    _prepared,
    _unknown,
    _Weights,
)
from .checkpoint import DTYPES, Files, PathLike, Stored, opened

_LARGEST_STATEMENT: Final = 16 << 20
_FORMAT: Final = "safefreeze.statement"
_VERSION: Final = 2


def _titled(name: str, stored: Stored, mask: FreezeMask) -> bytes:
    """What stands before a tensor's frozen bytes in their digest, which is `proof.Snapshot.digest` of the same weights:
    SHA-256, tensors in the order of their names."""
    return f"{name}\0{DTYPES[stored.dtype][2]}\0{mask.fingerprint}\0".encode()


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
        what, source = "Statement.load", Path(path)
        if not source.is_file():
            raise FileNotFoundError(f"{what}: no file {os.fspath(path)!r}")
        if source.stat().st_size > _LARGEST_STATEMENT:
            raise ValueError(f"{what}: {os.fspath(path)!r} has {source.stat().st_size:,} bytes: no statement")
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
            kind, version, checksum = (content.pop(key) for key in ("format", "version", "checksum"))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{what}: {os.fspath(path)!r} is no statement ({error!r})") from error
        if kind != _FORMAT or version != _VERSION:
            raise ValueError(
                f"{what}: {os.fspath(path)!r} is {kind!r} of version {version!r}, this package reads {_FORMAT!r} of "
                f"version {_VERSION}"
            )
        texts = dict.fromkeys(("base", "tuned", "names"), dict)
        expected = {"plan": str, "frozen": str, "frozen_elements": int, **texts, "package": str}
        if (
            content.keys() != expected.keys()
            or any(type(content[key]) is not kind for key, kind in expected.items())
            or not all(isinstance(value, str) for key in texts for value in content[key].values())
        ):
            raise ValueError(f"{what}: {os.fspath(path)!r} does not hold {', '.join(expected)}; it is damaged")
        found = cls(**content)
        if found._checksum() != checksum:
            raise ValueError(f"{what}: {os.fspath(path)!r} was altered: it does not match its checksum")
        return found


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
    from .._version import __version__

    operation = "audit.attest"
    one, other = opened(base, operation, "base"), opened(tuned, operation, "tuned")
    weights = _Weights(plan, tied, untied, {"base": one, "tuned": other}, operation)
    report, pairs, beside = _prepared(weights, plan)
    digest = hashlib.sha256()
    with Files(hashed=True) as before, Files(hashed=True) as after:
        for pair in sorted(pairs, key=lambda pair: pair.name):
            into = None
            if pair.name in weights.plan:
                into = digest
                into.update(_titled(pair.name, pair.tuned, pair.mask))
            report.tensors.append(_changes(pair, (before, after), progress or _nothing, into))
        _fill(report, ())
        if not report.ok:
            raise FrozenBytesChangedError(report)
        hashes = before.digests(one), after.digests(other)
    frozen = sum(mask.frozen_count for mask in weights.plan.values())
    found = Statement(plan.fingerprint, digest.hexdigest(), frozen, *hashes, beside, __version__)
    one.unchanged(operation)
    other.unchanged(operation)
    if path is not None:
        found.save(path)
    return found


class FrozenBytesChangedError(ValueError):
    """Frozen bytes of two checkpoints differ, or were not all compared.

    Attributes:
        report: what was found.
    """

    def __init__(self, report: AuditReport) -> None:
        super().__init__(f"audit.attest: frozen bytes are not proven equal, nothing was attested\n{report}")
        self.report = report


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
    operation = "audit.check"
    checkpoint = opened(tuned, operation, "tuned")
    weights = _Weights(plan, tied, untied, {"tuned": checkpoint}, operation)
    report = AuditReport(plan.fingerprint, attested=True)
    if plan.fingerprint != statement.plan:
        report.trouble.append(f"the statement is of another plan, {statement.plan[:12]}")
        return report
    stored, digest = checkpoint.tensors, hashlib.sha256()
    with Files() as files:
        report.notes += weights.said(files)
        beside = {**weights.beside(files), **statement.names}
    copies = {}
    for name in beside.keys() & stored.keys() - weights.known - weights.untied:
        mask = weights.plan.get(beside[name])
        if mask is not None and mask.shape == stored[name].shape:
            copies[name] = beside[name]
        elif beside[name] or name not in statement.names:
            report.trouble.append(_unknown(name, "is not known to the statement"))
    report.notes += weights.copied(copies)
    report.uncompared = dict.fromkeys(sorted(stored.keys() - weights.known), "is outside the plan")
    with Files(hashed=True) as files:
        for name, mask in sorted(weights.plan.items()):
            held = weights.tensor(name, "tuned")
            digest.update(_titled(name, held, mask))
            for _, block in _blocks(files, held, _Matrix(mask, held.width), digest):
                (progress or _nothing)(block.size)
            report.tensors.append(TensorChanges(name, mask.shape, held.dtype, mask.frozen_count, mask.live_count))
        hashes = files.digests(checkpoint)
    with Files() as files:
        for name in weights.names.keys() & weights.plan.keys():
            first, *others = weights.held(name, "tuned")
            for other in others:
                pair = _Pair(other, stored[first], stored[other], weights.plan[name])
                found = _changes(pair, (files, files), _nothing)
                # how far its live elements are from the other's is no training
                report.tensors.append(replace(found, live_changed=0, strange=0, largest=0.0, mean=0.0, rms=0.0))
    if digest.hexdigest() != statement.frozen:
        report.trouble.append("frozen bytes are not those attested (which ones, a comparison with the base would tell)")
    if sorted(hashes.values()) != sorted(statement.tuned.values()):
        report.notes.append("the files are others than those attested: trained further, or saved anew")
    checkpoint.unchanged(operation)
    return report
