"""Scores from activations: streaming moments of what units hand to the matrices that read them.

One forward pass per calibration set, no gradients, and memory that does not grow with the sets. The formulas are
FLAP's (An et al., AAAI 2024, arXiv 2312.11983; its WIFV is SSAH's score, arXiv 2410.10862) and Wanda's (Sun et al.,
ICLR 2024, arXiv 2306.11695).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .batches import Pass
from .collecting import Collector, Count, Scored, UnitValues, zero_totals
from .units import Reader, UnitLayout

Positions = Literal["predicting", "response", "all"]


# ------------------------------------------------------------------------------------------- unit inputs


class UnitInputs:
    """The input features of all matrices of a model that read units, end to end in one vector."""

    def __init__(self, layout: UnitLayout) -> None:
        self.layout = layout
        self.readers: list[tuple[int, Reader]] = [
            (layer, reader) for layer in range(layout.n_layers) for reader in layout.readers(layer)
        ]
        self.widths = [reader.n_units * reader.width for _, reader in self.readers]
        ends = torch.tensor(self.widths).cumsum(0).tolist()
        self.places = [slice(end - width, end) for end, width in zip(ends, self.widths, strict=True)]
        self.size = sum(self.widths)

    def arrange(self, flat: Tensor) -> UnitValues:
        """Numbers per feature as heads ``[layers, heads, head_dim]`` and channels ``[layers, d_ff]``."""
        layout = self.layout
        values = {
            "head": flat.new_zeros(layout.n_layers, layout.n_heads * layout.head_dim),
            "channel": flat.new_zeros(layout.channels_shape),
        }
        for (layer, reader), place in zip(self.readers, self.places, strict=True):
            first = reader.first * reader.width
            values[reader.units][layer, first : first + reader.n_units * reader.width] = flat[place]
        return UnitValues(values["head"].reshape(*layout.heads_shape, layout.head_dim), values["channel"])

    def over_weights(self, model: torch.nn.Module, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """``reduce`` of each reading matrix ``[out, in]`` to ``[in]``, end to end, float64 on the CPU."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        parts = []
        for _, reader in self.readers:
            weight = parameters[reader.parameter].detach()
            weight = weight if reader.expert is None else weight[reader.expert]
            parts.append(reduce(weight.T if reader.transposed else weight).cpu().double())
        return torch.cat(parts)

    def per_feature(self, counts: Tensor) -> Tensor:
        """A count per reader as one per feature."""
        return counts.repeat_interleave(torch.tensor(self.widths, device=counts.device), output_size=self.size)

    def per_module(self, counts: Tensor) -> dict[str, int]:
        """A count per reader as the sum over each module's readers: of experts, all of them."""
        found = dict.fromkeys((reader.module for _, reader in self.readers), 0)
        for (_, reader), count in zip(self.readers, counts.tolist(), strict=True):
            found[reader.module] += int(count)
        return found

    def not_finite(self, values: Tensor) -> Iterator[str]:
        """The modules whose inputs' features have NaN or inf among their numbers."""
        finite = torch.isfinite(values).cpu()
        return (
            reader.module
            for (_, reader), place in zip(self.readers, self.places, strict=True)
            if not finite[place].all()
        )


class Counted:
    """The positions of a pass that count, of bool ``[rows, tokens]``."""

    def __init__(self, counted: Tensor, device: torch.device) -> None:
        self.shape, self.flat = tuple(counted.shape), counted.flatten()
        self.places = self.flat.nonzero().squeeze(1).to(device)  # here, so that no hook waits for a device
        self.flat = self.flat.to(device)

    def of(self, hidden: Tensor, positions: Tensor | None, reader: Reader) -> Tensor:
        """Int64: which rows of a reader's flattened input count, of those that `See` is shown.

        Raises:
            ValueError: an input of other positions than the pass's.
        """
        if positions is not None:
            return self.flat.to(hidden.device)[positions].nonzero().squeeze(1)
        if hidden.shape[:-1].numel() != len(self.flat):
            raise ValueError(
                f"score_units: {reader.module!r} received {tuple(hidden.shape)}, expected {self.shape} positions"
            )
        return self.places.to(hidden.device)


#: ``see(reader's number, its input [..., features], positions)``; ``positions`` says which of the pass's flattened
#: positions the input's rows are, None = all in order. What it returns, if anything, is read instead.
See = Callable[[int, Tensor, Tensor | None], Tensor | None]


@contextmanager
def watched(model: torch.nn.Module, inputs: UnitInputs, see: See) -> Iterator[None]:
    """Show ``see`` the input of every matrix that reads units, whenever the model runs.

    Fused experts have no module of their own whose input could be hooked. Their module runs transformers' own loop
    over experts meanwhile (``experts_implementation="eager"``), and the calls it makes are watched: each expert reads
    the rows that were routed to it.
    """
    experts: dict[str, list[int]] = {}
    with ExitStack() as stack:

        def hook(number: int) -> Callable[[torch.nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
            def seen(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
                replaced = see(number, arguments[0], None)
                return None if replaced is None else (replaced, *arguments[1:])

            return seen

        for number, (_, reader) in enumerate(inputs.readers):
            if reader.expert is None:
                module = model.get_submodule(reader.module)
                stack.callback(module.register_forward_pre_hook(hook(number)).remove)
            else:
                experts.setdefault(reader.module, []).append(number)
        if experts:
            stack.enter_context(_watched_experts(model, inputs, experts, see))
        yield


@contextmanager
def _watched_experts(
    model: torch.nn.Module, inputs: UnitInputs, experts: Mapping[str, list[int]], see: See
) -> Iterator[None]:
    addresses: dict[int, int] = {}
    mode = _ExpertInputs(addresses, see)
    with ExitStack() as stack:
        for name, numbers in experts.items():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(mode.enter_module, with_kwargs=True).remove)
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_experts_implementation"):
                before = config._experts_implementation
                stack.callback(setattr, config, "_experts_implementation", before)
                config._experts_implementation = "eager"
            for number in numbers:
                _, reader = inputs.readers[number]
                assert reader.expert is not None
                addresses[model.get_parameter(reader.parameter)[reader.expert].data_ptr()] = number
        stack.enter_context(mode)
        yield


_PRODUCTS: Final = (torch.nn.functional.linear, Tensor.__matmul__, Tensor.matmul, torch.matmul)


class _ExpertInputs(TorchFunctionMode):
    """Sees ``hidden[tokens]`` and then a product with ``down_proj[expert]`` inside a module of experts."""

    def __init__(self, addresses: Mapping[int, int], see: See) -> None:
        super().__init__()
        self.addresses, self.see = addresses, see
        self.hidden: Tensor | None = None
        self.tokens: Any = None

    def enter_module(self, _: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.hidden = arguments[0] if arguments else named["hidden_states"]
        self.tokens = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__ and args[0] is self.hidden:
            self.tokens = args[1]
        elif func in _PRODUCTS and len(args) > 1 and (address := args[1].data_ptr()) in self.addresses:
            number = self.addresses[address]
            if not isinstance(self.tokens, Tensor) or self.tokens.shape != args[0].shape[:-1]:
                raise ValueError(
                    "score_units: cannot tell which tokens an expert reads, expected transformers' loop over experts "
                    "(hidden_states[token_idx], then a product); use a method of gradients of weights"
                )
            replaced = self.see(number, args[0], self.tokens)
            args = args if replaced is None else (replaced, *args[1:])
        return func(*args, **(kwargs or {}))


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or a float32 copy of one in lower precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def model_device(model: torch.nn.Module) -> torch.device:
    """Where the inputs of a model go."""
    return next(model.parameters()).device


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module's own mode, since some may have been in eval mode on purpose."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def saving_arguments(model: torch.nn.Module, logits: int | Tensor) -> dict[str, Any]:
    """Forward arguments, where the model has them, that spare a cache and logits nobody reads."""
    known = inspect.signature(model.forward).parameters
    return {key: value for key, value in (("use_cache", False), ("logits_to_keep", logits)) if key in known}


# ------------------------------------------------------------------------------------------------ moments


class ActivationMoments(Collector):
    """Streaming mean and sum of squared deviations of every feature that a unit hands on, over the counted positions of
    a set, and how many of these each reader saw. An expert's channels are counted over the tokens routed to it.
    """

    def __init__(self, model: torch.nn.Module, layout: UnitLayout, positions: Positions) -> None:
        self.model, self.inputs, self.positions = model, UnitInputs(layout), positions
        self.labelled = positions != "all"
        self.totals = self._nothing()

    def _nothing(self) -> dict[str, Tensor]:
        size = self.inputs.size
        return zero_totals(model_device(self.model), count=len(self.inputs.readers), mean=size, squares=size)

    def merge(self, other: Mapping[str, Tensor]) -> None:
        """Chan, Golub & LeVeque (1979): exact up to rounding, whatever the sizes of the parts."""
        mine, added = self.totals["count"], other["count"]
        total = mine + added
        share = added / total.clamp(min=1)
        share, weight = (self.inputs.per_feature(counts) for counts in (share, mine * share))
        delta = other["mean"] - self.totals["mean"]
        self.totals["mean"].add_(delta * share)
        self.totals["squares"].add_(other["squares"] + delta.square() * weight)
        mine.copy_(total)

    def take(self, one: Pass) -> int:
        """One forward pass, without gradients."""
        counted: Tensor = one.real if self.positions == "all" else getattr(one, self.positions)
        n = int(counted.sum())
        if n == 0:
            return 0
        device = model_device(self.model)
        seen, counts = self._nothing(), [0] * len(self.inputs.readers)
        see = partial(self._see, seen, counts, Counted(counted, device))
        with torch.no_grad(), watched(self.model, self.inputs, see):
            self.model(**one.on(device), **saving_arguments(self.model, 1))
        seen["count"].copy_(torch.tensor(counts))
        self.merge(seen)
        return n

    def _see(
        self, seen: dict[str, Tensor], counts: list[int], counted: Counted, number: int, hidden: Tensor,
        positions: Tensor | None,
    ) -> None:  # fmt: skip
        """Deviations in float32 from the pass's mean, sums in float64."""
        reader = self.inputs.readers[number][1]
        if counts[number]:
            raise ValueError(
                f"score_units: {reader.module!r} ran twice in one forward pass, expected once; layers that share their "
                "weights are not supported"
            )
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, counted.of(hidden, positions, reader))
        counts[number] = len(rows)
        if len(rows) == 0:
            return
        place, wide = self.inputs.places[number], seen["mean"].dtype
        mean, rows = rows.mean(0, dtype=wide), at_least_float32(rows)
        centre = mean.to(rows.dtype)
        squares = (rows - centre).square_().sum(0, dtype=wide)
        seen["mean"][place] = mean
        seen["squares"][place] = squares - len(rows) * (mean - centre).square()  # what rounding the centre added

    def complaints(self, word: str, count: Count) -> Iterator[str]:
        """Every reader must have seen every counted position, and finite activations."""
        if count.positions < 2:
            yield (
                f"{word} has {count.positions} counted positions in {count.passes} batches, expected at least 2; "
                "labels must hold response tokens, not -100 everywhere"
            )
        routed = {reader.module for _, reader in self.inputs.readers if reader.expert is not None}
        for name, seen in self.inputs.per_module(self.totals["count"]).items():
            if seen != count.positions and not (name in routed and seen):
                yield (
                    f"{name!r} saw {seen} positions of the {word} set, expected {count.positions}; the model must run "
                    "every layer once per forward pass"
                )
        for name in self.inputs.not_finite(self.totals["squares"]):
            yield (
                f"the input of {name!r} is NaN or infinite on the {word} set, expected finite activations; check the "
                "weights, or load the model in float32 or bfloat16"
            )

    # -- what the moments say, per feature, float64 on the CPU -----------------------------------------------

    @property
    def count(self) -> Tensor:
        """Positions counted."""
        return self.inputs.per_feature(self.totals["count"].cpu().double())

    @property
    def mean(self) -> Tensor:
        """Mean activation."""
        return self.totals["mean"].cpu().double()

    @property
    def variance(self) -> Tensor:
        """Unbiased variance; 0 where an expert saw fewer than two tokens."""
        return self.totals["squares"].cpu().double().clamp(min=0) / (self.count - 1).clamp(min=1)

    @property
    def energy(self) -> Tensor:
        """Sum of squares: the squared ‖X‖₂ of Wanda and FLAP."""
        return self.totals["squares"].cpu().double().clamp(min=0) + self.count * self.mean.square()


def _squared_norm(weight: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32)
    return norm.cpu().double().square()


def _absolute_sum(weight: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(weight, 1, dim=0, dtype=torch.float32)
    return norm


#: method -> (what of the activations, times what of the matrix that reads them), per feature
FORMULAS: Final[dict[str, tuple[Callable[[ActivationMoments], Tensor], Callable[[Tensor], Tensor] | None]]] = {
    "fluctuation": (lambda seen: seen.variance, _squared_norm),
    "ifv": (lambda seen: seen.variance, None),
    "wifn": (
        lambda seen: (seen.energy / seen.count.clamp(min=1)).sqrt(),
        lambda weight: _absolute_sum(weight) / len(weight),
    ),
    "wanda": (lambda seen: seen.energy.sqrt(), _absolute_sum),
}


def formula_scores(method: str, safety: ActivationMoments, utility: ActivationMoments) -> Scored:
    """The score of each feature on each set."""
    of_activations, of_weights = FORMULAS[method]
    inputs = safety.inputs
    factor = inputs.over_weights(safety.model, of_weights) if of_weights else torch.ones(inputs.size).double()
    one, other = (inputs.arrange(of_activations(seen) * factor) for seen in (safety, utility))
    return one, other, None


def contrast(safety: ActivationMoments, utility: ActivationMoments) -> Scored:
    """|mean_S - mean_U| / s with s² = (var_S + var_U) / 2; each set's score is |mean| / s.

    s is kept above a millionth of the larger |mean|, what float32 can tell from 0; a feature that is always 0 scores
    0.
    """
    means = [seen.mean for seen in (safety, utility)]
    size = torch.maximum(means[0].abs(), means[1].abs())
    spread = ((safety.variance + utility.variance) / 2).sqrt().maximum(1e-6 * size)
    values = [
        safety.inputs.arrange(torch.where(spread > 0, value.abs() / spread, 0.0))
        for value in (*means, means[0] - means[1])
    ]
    return values[0], values[1], UnitValues(values[2].heads.mean(-1), values[2].channels)
