"""The names a weight goes by in checkpoints: the plan's, those it is tied to, and those of copies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .checkpoint import Files, PathLike, Stored, opened
from .comparison import Pair, equal, varies

_HEAD: Final = 4096  # bytes by which tensors that may be copies are told apart


class Weights:
    """The weights of a plan, and the names each goes by in the checkpoints.

    Attributes:
        plan: has each weight once, under the first of the plan's names for it.
        names: of every weight that has more than one name, plan or not: that name -> all of them.
        untied: what was said not to be one of them.
        checkpoints: word for a checkpoint ("base", "tuned") -> what was opened.
        stored: the same word -> its tensors.
    """

    def __init__(
        self,
        operation: str,
        plan: FreezePlan,
        tied: Mapping[str, str] | None,
        untied: Collection[str],
        **paths: PathLike,
    ) -> None:
        self._operation = operation
        if not isinstance(plan, FreezePlan):
            raise TypeError(f"{operation}: plan is a {type(plan).__name__}, expected a FreezePlan")
        if isinstance(untied, str):
            raise TypeError(f"{operation}: untied is the text {untied!r}, expected a list of names")
        self.checkpoints = {word: opened(path, f"{operation}: {word}") for word, path in paths.items()}
        self.stored = {word: checkpoint.tensors for word, checkpoint in self.checkpoints.items()}
        masks, self.names = dict(plan), {}
        for group in _joined(tied or {}):
            said = f"{operation}: {_listed(group)} are"
            for word, stored in self.stored.items():
                if not group & stored.keys():
                    raise ValueError(f"{said} said to be tied, so {word} should hold one of them; it holds none")
            planned = sorted(group & masks.keys())
            if any(masks[name] != masks[planned[0]] for name in planned):
                raise ValueError(f"{said} tied, but the plan has two different masks for them")
            self.names[planned[0] if planned else min(group)] = group
            for name in planned[1:]:
                del masks[name]
        self.plan = FreezePlan(masks)
        self._check_plan()
        for name in untied:
            if not any(name in stored for stored in self.stored.values()):
                raise ValueError(f"{operation}: untied names {name!r}, which is not among the tensors of a checkpoint")
            if name in plan or any(name in group for group in self.names.values()):
                raise ValueError(f"{operation}: untied names {name!r}, which the plan or tied names too")
        self.untied = set(untied)

    def _check_plan(self) -> None:
        if not any(mask.frozen_count for mask in self.plan.values()):
            raise ValueError(
                f"{self._operation}: the plan freezes nothing, so there is nothing to prove; is it the right one?"
            )
        for word, stored in self.stored.items():
            for name, mask in self.plan.items():
                held = self.held(name, word)
                if not held:
                    raise ValueError(
                        f"{self._operation}: the plan names {name!r}, which is not among the {len(stored)} tensors of "
                        f"{word}; is it a plan for another model? (of tied weights a checkpoint may hold another name: "
                        "say so with tied={name: other}, --tied NAME=OTHER)"
                    )
                for other in held:
                    if stored[other].shape != mask.shape:
                        raise ValueError(
                            f"{self._operation}: {other!r} of {word} has shape {stored[other].shape}, the plan expects "
                            f"{mask.shape}"
                        )

    def unchanged(self) -> None:
        """Raise ValueError if a file was written to since it was opened."""
        for checkpoint in self.checkpoints.values():
            checkpoint.unchanged(self._operation)

    def held(self, name: str, word: str) -> list[str]:
        """The names under which a checkpoint holds a weight, its first one first."""
        held = self.names.get(name, {name}) & self.stored[word].keys()
        return sorted(held, key=lambda other: (other != name, other))

    def tensor(self, name: str, word: str) -> Stored:
        """A weight in a checkpoint, by its first name there."""
        return self.stored[word][self.held(name, word)[0]]

    @property
    def known(self) -> set[str]:
        """Every name of every weight of the plan, and of those that ``tied`` names."""
        return self.plan.keys() | set().union(*self.names.values())

    def pairs(self) -> list[Pair]:
        """What is to be compared of base and tuned; of a weight every name that one of them holds it under."""
        base, tuned = self.stored.values()
        found = []
        for name in {**self.plan, **self.names}:
            usual = self.tensor(name, "base"), self.tensor(name, "tuned")
            mask = self.plan.get(name) or FreezeMask(usual[0].shape)
            found.append(Pair(name, *usual, mask))
            for other in sorted({*self.held(name, "base"), *self.held(name, "tuned")}):
                both = base.get(other, usual[0]), tuned.get(other, usual[1])
                if both != usual:
                    found.append(Pair(other, *both, mask))
        rest = (base.keys() & tuned.keys()) - self.known
        return found + [Pair(name, base[name], tuned[name], FreezeMask(base[name].shape)) for name in rest]

    def lookalikes(self, files: Files) -> dict[str, str]:
        """Tensors outside the plan that have the shape of a weight it freezes, so that a loader might find it there.

        Returns:
            name -> the weight of which it is a copy, in the base where that holds it; "" if it is none.
        """
        frozen = {name: mask.shape for name, mask in self.plan.items() if mask.frozen_count}
        found: dict[str, str] = {}
        for word, tensors in self.stored.items():
            # what the base has is not looked for again
            names = {n for n in tensors.keys() - self.known - found.keys() if tensors[n].shape in frozen.values()}
            found |= dict.fromkeys(names, "")
            names -= self.untied
            sought = {tensors[name].shape for name in names}
            alike: dict[tuple[Any, ...], list[str]] = {}
            for weight, shape in frozen.items():
                if shape in sought:
                    alike.setdefault(_look(self.tensor(weight, word), files), []).append(weight)
            for name in names:
                alone = sum(name in others for others in self.stored.values()) == 1
                for weight in alike.get(_look(tensors[name], files), ()):
                    held = self.tensor(weight, word)
                    # two biases that begin as zeros, and are compared each with its own, are not one for that
                    if (alone or varies(held, files)) and equal(held, tensors[name], files):
                        found[name] = weight
                        break
        return dict(sorted(found.items()))

    def take_copies(self, found: Mapping[str, str]) -> list[str]:
        """Take copies for further names of what they are copies of; returns the notes that say so."""
        copies = {name: weight for name, weight in found.items() if weight}
        for name, weight in copies.items():
            self.names.setdefault(weight, {weight}).add(name)
        return [f"{n!r} is taken for {w!r} under another name, of which it is or was a copy" for n, w in copies.items()]

    def notes(self, files: Files) -> list[str]:
        """What a report rests on. Names said to be one weight that a checkpoint contradicts are told."""
        notes = []
        for name, group in self.names.items():
            notes.append(f"{_listed(group)} are one weight: so it was said")
            for word, stored in self.stored.items():
                first, *others = self.held(name, word)
                unlike = [other for other in others if not equal(stored[first], stored[other], files)]
                notes += [f"  but {other!r} and {first!r} are not equal in {word}" for other in unlike]
        return notes + [f"{name!r} is no weight of the plan: so it was said" for name in sorted(self.untied)]


def _look(stored: Stored, files: Files) -> tuple[str, tuple[int, ...], bytes]:
    """What copies have in common, at the price of one read."""
    return stored.dtype, stored.shape, files.head(stored, _HEAD)


def _listed(names: Collection[str]) -> str:
    return " and ".join(map(repr, sorted(names)))


def _joined(tied: Mapping[str, str]) -> list[set[str]]:
    """Names of each weight, out of pairs of them."""
    groups: list[set[str]] = []
    for pair in tied.items():
        joined = set(pair).union(*(group for group in groups if group & set(pair)))
        groups = [group for group in groups if not group & joined] + [joined]
    return groups
