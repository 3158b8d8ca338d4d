"""A calibration set taken in pass by pass: what is counted, kept in a partial file, and added up over ranks."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from .batches import Pass, read_passes
from .files import read_tensors, stamped, write_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_PARTIAL: Final = "safefreeze.partial_scores"


class UnitValues(NamedTuple):
    """One number per unit, higher = matters more: heads ``[layers, heads]`` (for a set's scores they may come feature
    by feature, ``[layers, heads, head_dim]``) and channels ``[layers, d_ff]``."""

    heads: Tensor
    channels: Tensor


#: What a method makes of the totals of both sets: scores on safety, on utility, and one of both where there is one.
Scored = tuple[UnitValues, UnitValues, UnitValues | None]


def zero_totals(device: torch.device, **sizes: int) -> dict[str, Tensor]:
    """Named vectors of zeros to add to: float64, or float32 on mps, which has no float64."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    return {name: torch.zeros(size, dtype=wide, device=device) for name, size in sizes.items()}


class Collector(ABC):
    """What a method gathers from one calibration set, pass by pass."""

    #: rows of the set per pass; None: as they were batched
    rows: int | None = None
    #: whether the set needs labels
    labelled: bool = True
    #: what was gathered so far; all 0: nothing
    totals: dict[str, Tensor]

    @abstractmethod
    def take(self, one: Pass) -> int:
        """Run a pass through the model, add to the totals, and return how many positions counted.

        Afterwards the model and gradient mode are as they were.
        """

    def merge(self, other: Mapping[str, Tensor]) -> None:
        """Take in the totals of other data: then they are those of both parts together."""
        for name, total in self.totals.items():
            total += other[name]

    @abstractmethod
    def complaints(self, word: str, count: Count) -> Iterator[str]:
        """What keeps the totals of the set named ``word`` from being scored."""

    def check(self, word: str, count: Count) -> None:
        """Raise ValueError for totals that cannot be scored."""
        for complaint in self.complaints(word, count):
            raise ValueError(f"score_units: {complaint}")


@dataclass
class Count:
    """How much of a set was counted, and a hash over its rows so far."""

    passes: int = 0
    rows: int = 0
    positions: int = 0
    fingerprint: str = field(default_factory=lambda: hashlib.sha256().hexdigest())


def collect(
    collector: Collector, batches: Iterable[Mapping[str, Tensor]], word: str, partial: Partial, progress: bool
) -> Count:
    """Take a set in, after what the partial file holds of it."""
    done, count, digest = partial.restore(word, collector), Count(), hashlib.sha256()
    for one in read_passes(_watched(batches, word, progress), word, collector.rows, collector.labelled):
        for row in one.digests:
            digest.update(row)
        count.passes, count.rows = count.passes + 1, count.rows + len(one.digests)
        count.fingerprint = digest.hexdigest()
        if count.passes <= done.passes:
            if count.passes == done.passes:
                partial.agree(word, count, done)
                count.positions = done.positions
            continue
        count.positions += collector.take(one)
        if (count.passes - done.passes) % partial.every == 0:
            partial.save(word, collector, count)
    if count.passes < done.passes:
        partial.agree(word, count, done)
    elif count.passes > done.passes:
        partial.save(word, collector, count)
    return count


def _watched(batches: Iterable[Mapping[str, Tensor]], word: str, progress: bool) -> Iterable[Mapping[str, Tensor]]:
    if not progress or isinstance(batches, Mapping):
        return batches
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    bar: Iterable[Mapping[str, Tensor]] = tqdm(batches, desc=f"scoring {word}", unit="batch")
    return bar


class Partial:
    """What was counted so far, in a file that the same call finds again. Without a path: nothing."""

    def __init__(
        self, path: str | os.PathLike[str] | None, every: int, job: Mapping[str, str], group: ProcessGroup | None
    ) -> None:
        self.every, self.header = every, stamped(_PARTIAL, job)
        self.path = None if path is None else Path(path)
        self.tensors: dict[str, Tensor] = {}
        if self.path is None:
            return
        if group is not None:
            rank = f"rank {group.rank()} of {group.size()}"
            self.path = self.path.with_name(f"{self.path.name}.{rank.replace(' ', '-')}")
            self.header["rank"] = rank
        if not self.path.parent.is_dir():
            raise ValueError(f"score_units: resume is {os.fspath(self.path)!r}, expected a file in an existing folder")
        if not self.path.exists():
            return
        try:
            found, self.tensors = read_tensors(self.path, _PARTIAL)
        except ValueError as error:
            raise ValueError(
                f"score_units: resume is {os.fspath(self.path)!r}, which is not a partial score file this package "
                f"reads ({error}); delete it, or pass another path"
            ) from error
        differing = [key for key in self.header if found.get(key) != self.header[key]]
        if differing:
            self._refuse(
                f"another {differing[0]}: {_brief(found.get(differing[0]))}", _brief(self.header[differing[0]])
            )
        self.header = found

    def _refuse(self, got: str, expected: str) -> None:
        raise ValueError(
            f"score_units: resume is {os.fspath(self.path or '')!r}, which was written for {got}, expected {expected}; "
            "delete it, or pass another path"
        )

    def restore(self, word: str, collector: Collector) -> Count:
        """Put what the file holds of a set into its totals."""
        if f"{word}.count" not in self.header:
            return Count()
        for name, tensor in collector.totals.items():
            tensor.copy_(self.tensors[f"{word}.{name}"])
        return Count(**json.loads(self.header[f"{word}.count"]))

    def agree(self, word: str, count: Count, done: Count) -> None:
        """The set must begin with the rows that the file counted, batched alike where batches are passes."""
        if (count.passes, count.rows, count.fingerprint) != (done.passes, done.rows, done.fingerprint):
            self._refuse(
                f"{done.rows} other rows of {word} in {done.passes} passes",
                f"those of the first {count.passes} passes, {count.rows} rows",
            )

    def save(self, word: str, collector: Collector, count: Count) -> None:
        """Write what was counted; a crash leaves the file as it was."""
        if self.path is None:
            return
        self.tensors |= {f"{word}.{name}": tensor.cpu() for name, tensor in collector.totals.items()}
        self.header[f"{word}.count"] = json.dumps(asdict(count))
        write_tensors(self.path, self.tensors, self.header)

    def remove(self) -> None:
        """Delete the file, which the finished scores replace."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _brief(value: str | None) -> str:
    return repr(value if value is None or len(value) < 80 else f"{value[:77]}...")


def merge_ranks(collector: Collector, count: Count, model: str, group: ProcessGroup) -> None:
    """Replace a rank's totals by those of all ranks, added in the order of ranks: the same bits everywhere."""
    import torch.distributed as dist

    ranks, mine = range(group.size()), {name: total.clone() for name, total in collector.totals.items()}
    device = next(iter(mine.values())).device

    def from_rank(rank: int, own: Tensor) -> Tensor:
        tensor = own.clone() if rank == group.rank() else torch.empty_like(own)
        dist.broadcast(tensor, src=dist.get_global_rank(group, rank), group=group)
        return tensor

    about = torch.tensor([count.passes, count.rows, count.positions])
    hashes = torch.tensor([list(bytes.fromhex(text)) for text in (model, count.fingerprint)])
    own = torch.cat([about, hashes.flatten()]).to(device)
    gathered = torch.stack([from_rank(rank, own) for rank in ranks]).cpu()
    models, rows = gathered[:, 3:35], gathered[:, 35:]
    if (models != models[0]).any():
        odd = int((models != models[0]).any(1).nonzero()[0])
        raise ValueError(
            f"score_units: rank {odd} has another model than rank 0, expected the same weights on every rank"
        )
    for total in collector.totals.values():
        total.zero_()
    for rank in ranks:
        collector.merge({name: from_rank(rank, tensor) for name, tensor in mine.items()})
    count.passes, count.rows, count.positions = gathered[:, :3].sum(0).tolist()
    count.fingerprint = hashlib.sha256(rows.to(torch.uint8).numpy().tobytes()).hexdigest()
