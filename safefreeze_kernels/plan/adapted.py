"""`AdaptedPlan`: a plan carried from weights to the factors whose product an adapter adds to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .binding import BoundMask, Model, bind, named_tensors
from .mask import FreezeMask, flags_of
from .plan import FreezePlan

if TYPE_CHECKING:
    from torch import Tensor


#: Ways to initialise LoRA's factors (PEFT's ``init_lora_weights``) that leave the weights they adapt as they are;
#: others write into them, or may in a version to come.
PLAIN_INITIALISATIONS: Final = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Factors:
    """Two matrices, B [out, r] and A [r, in], whose product B @ A times a scale is added to a weight [out, in].

    Row i of the product is zero where row i of B is, column j where column j of A is: so a weight keeps a row that B
    has zeros for, and a column that A has zeros for (Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3).

    Attributes:
        a, b: their shapes.
        transposed: the weight is [in, out], as that of an embedding or a Conv1D.
        experts: how many such products are stacked: the weight is [experts, out, in] (or [experts, in, out]), A
            [experts * r, in], and B [out, r * experts], the experts of one rank side by side.
    """

    a: tuple[int, ...]
    b: tuple[int, ...]
    transposed: bool = False
    experts: int = 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the weight, those of all experts below each other."""
        rows, cols = (self.a[1], self.b[0]) if self.transposed else (self.b[0], self.a[1])
        return self.experts * rows, cols

    def masks(self, mask: FreezeMask) -> tuple[FreezeMask, FreezeMask]:
        """What of A and of B stands still, as zeros, so that the frozen rows and columns of the weight do.

        Raises:
            ValueError: single elements are frozen, which no factor has to itself; or the weight has another shape.
        """
        if mask.bits is not None:
            raise ValueError(
                "single elements are frozen, expected rows and columns, since an element of a product depends on whole "
                "rows and columns of its factors; choose the plan at the grain of rows or units"
            )
        if mask.matrix_shape != self.matrix_shape:
            raise ValueError(
                f"the plan has shape {mask.shape}, the factors make {self.matrix_shape[0]} rows and "
                f"{self.matrix_shape[1]} columns"
            )
        # per line of the weight, for one expert or for all of them alike: [experts or 1, lines]
        rows = flags_of(mask.frozen_rows, mask.matrix_shape[0]).reshape(self.experts, -1)
        cols = flags_of(mask.frozen_cols, mask.matrix_shape[1])[None]
        of_a, of_b = (rows, cols) if self.transposed else (cols, rows)
        if self.experts == 1:
            return FreezeMask(self.a, cols=of_a[0]), FreezeMask(self.b, rows=of_b[0])
        rank = self.a[0] // self.experts
        frozen_a = np.broadcast_to(of_a[:, None, :], (self.experts, rank, self.a[1]))
        frozen_b = np.broadcast_to(of_b.T[:, None, :], (self.b[0], rank, self.experts))
        return (
            FreezeMask(self.a, elements=frozen_a.reshape(self.a)),
            FreezeMask(self.b, elements=frozen_b.reshape(self.b)),
        )


class AdaptedPlan(FreezePlan):
    """What stands still of a model with adapters so that what a plan freezes of its weights does. Made by `sf.adapt`.

    A plan like any other, in the names of the parameters that train: optimizers, `guard`, clipping, `snapshot` and the
    callbacks take it. Saved, it is read again as an ordinary `FreezePlan`.

    Attributes:
        base: the plan it was made from, in the names of the weights.
        zero: parameters whose frozen part is zero, and has to stay so.
        standing: weights of ``base`` that nothing trains: neither they nor an adapter of theirs.
        changed: name of a parameter -> how many of its elements were set when it was made: to zero where a product was
            zero anyway, DoRA's magnitudes to the norms of their rows.
    """

    def __init__(
        self,
        masks: Mapping[str, FreezeMask],
        base: FreezePlan,
        *,
        zero: Iterable[str] = (),
        standing: Iterable[str] = (),
        changed: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(masks, {**base.metadata, "adapted_from": base.fingerprint})
        self.base, self.zero, self.standing = base, frozenset(zero), tuple(standing)
        self.changed = dict(changed or {})

    def check(self, model: Model) -> None:
        """As `FreezePlan.check`; and raise ValueError if a factor is not zero where it has to be: the weight it is
        for is not the base's any more, as after loading an adapter that was trained without this plan. Under FSDP2
        all ranks must ask."""
        named = named_tensors(model)
        super().check(named)
        for trouble in self.not_at_zero(bind(self, named, operation="AdaptedPlan.check"), "AdaptedPlan.check"):
            raise ValueError(trouble)

    def not_at_zero(self, bound: Iterable[BoundMask], operation: str) -> Iterator[str]:
        """The error for each factor among ``bound`` that is not zero where it has to be."""
        for entry in bound:
            if self.zero & set(entry.plan_names) and (found := first_nonzero(entry.param, entry.mask)):
                yield not_zero(operation, entry.name, found)

    def summary(self) -> str:
        """The base plan's table, then what it comes to in the adapters; in at most 80 columns."""
        kinds: dict[str, list[int]] = {}
        for name, mask in self.items():
            kind = next((part for part in name.split(".") if part.startswith("lora_")), "weights trained whole")
            counts = kinds.setdefault(kind, [0, 0, 0])
            counts[0] += 1
            counts[1] += mask.frozen_count
            counts[2] += mask.numel
        lines = ["in the parameters that train:"]
        lines += [
            f"  {kind}: {number} tensors, {frozen:,} of {total:,} elements frozen"
            for kind, (number, frozen, total) in kinds.items()
        ]
        if self.changed:
            lines.append(f"{sum(self.changed.values()):,} of them were set, to zeros that change no product of theirs")
        if self.standing:
            lines.append(f"{len(self.standing)} weights of the plan have no adapter and do not train")
        told = [fill(line, 80, subsequent_indent="    ", break_long_words=False) for line in lines]
        return "\n".join([self.base.summary(), "", *told])


def first_nonzero(tensor: Any, mask: FreezeMask) -> tuple[int, int, float] | None:
    """Row, column and value of the first frozen element that is not zero (of either sign); None: all are.

    Of a sharded tensor (DTensor) all ranks must ask: it is gathered, which is little of a factor."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    matrix = whole.detach().reshape(mask.matrix_shape)
    for dim, index in enumerate((mask.rows, mask.cols)):
        if mask.lines(dim) is not None and not matrix.index_select(dim, index.to(matrix.device)).any():
            return None
    wrong = (matrix != 0).cpu().numpy() & mask.frozen_flags()
    if not wrong.any():
        return None
    row, col = divmod(int(wrong.argmax()), wrong.shape[1])
    return row, col, float(matrix[row, col])


def not_zero(operation: str, name: str, found: tuple[int, int, float]) -> str:
    """The error of a factor that is not zero where it has to be."""
    row, col, value = found
    return (
        f"{operation}: {name!r} is {value:.6g} in row {row}, column {col}, expected zero where the plan freezes its "
        "weight: what is frozen there is not the base's any more; adapt the plan before training begins, and go on "
        "only with adapters that were trained under it"
    )
