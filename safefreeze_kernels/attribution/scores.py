"""How much a unit matters for safety and for utility: scores of heads and channels from two calibration sets."""

from __future__ import annotations

import hashlib
import inspect
import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

import torch
from torch import Tensor

from .activations import FORMULAS, ActivationMoments, Positions, contrast, evaluating, formula_scores
from .batches import read_passes
from .collecting import Collector, Partial, Scored, UnitValues, collect, merge_ranks
from .files import read_tensors, stamped, write_tensors
from .saliency import (
    GradientSums,
    Margin,
    MarginGradients,
    answer_loss,
    decision_ratio,
    gradient_times_activation,
    patching_effect,
    plain_sums,
)
from .units import UnitLayout, check_word, find_units

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


#: The calibration sets.
SETS: Final = ("safety", "utility")
_FORMAT: Final = "safefreeze.unit_scores"
_SAMPLE: Final = 1024  # weights per parameter in a model's fingerprint


@dataclass(frozen=True, repr=False, eq=False)
class SetScores:
    """Raw scores of every unit on one calibration set.

    Args:
        head_features: ``[n_layers, n_heads, head_dim]``, the score of each feature a head hands to the
            attention output projection. A source that scores whole heads passes ``[n_layers, n_heads]``.
        channels: ``[n_layers, d_ff]``.
        n_positions: token positions the scores were computed over.
        fingerprint: sha256 over the set's rows in their order, whatever their batches and padding; "" = not known.

    Both are kept as float32 on the CPU.

    Raises:
        ValueError: wrong number of dimensions, different numbers of layers, NaN or infinite scores.
    """

    head_features: Tensor
    channels: Tensor
    n_positions: int = 0
    fingerprint: str = ""

    def __post_init__(self) -> None:
        features = self.head_features.detach().to("cpu", torch.float32)
        features = (features.unsqueeze(-1) if features.dim() == 2 else features).contiguous()
        channels = self.channels.detach().to("cpu", torch.float32).contiguous()
        if features.dim() != 3 or channels.dim() != 2 or features.shape[0] != channels.shape[0]:
            raise ValueError(
                f"SetScores: head_features has shape {tuple(features.shape)} and channels "
                f"{tuple(channels.shape)}, expected [layers, heads, head_dim] (or [layers, heads]) and "
                "[layers, d_ff]"
            )
        for word, scores in (("head_features", features), ("channels", channels)):
            _check_finite("SetScores", word, scores)
        object.__setattr__(self, "head_features", features)
        object.__setattr__(self, "channels", channels)

    @property
    def heads(self) -> Tensor:
        """Score of each head, ``[n_layers, n_heads]``: the mean over its features."""
        return self.head_features.double().mean(-1).float()


def _check_finite(operation: str, word: str, scores: Tensor) -> None:
    if not torch.isfinite(scores).all():
        layer = int((~torch.isfinite(scores)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{operation}: {word} of layer {layer} holds NaN or inf in float32, expected finite scores")


@dataclass(frozen=True, repr=False, eq=False)
class UnitScores:
    """Safety and utility scores of every unit of one model: what `MaskBuilder` ranks.

    ``safety.heads`` is ``[n_layers, n_heads]``, ``safety.channels`` is ``[n_layers, d_ff]``, and ``utility``
    likewise, all float32.

    Args:
        layout: the model they belong to.
        safety, utility: the scores of each set.
        method: as in `score_units`.
        ranking: where the method makes one score of both sets, that score, float32: ``heads``
            ``[n_layers, n_heads]`` and ``channels`` ``[n_layers, d_ff]``, highest first; else None.
        model_fingerprint: of the weights the scores were made with, see `check`; "" = not known.
        settings: the arguments of the method, as JSON can hold them.

    Raises:
        ValueError: scores that do not have the layout's shapes, a NaN or infinite ranking.
    """

    layout: UnitLayout
    safety: SetScores
    utility: SetScores
    method: str = "fluctuation"
    ranking: UnitValues | None = None
    model_fingerprint: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ranking is not None:
            ranking = UnitValues(*(part.detach().to("cpu", torch.float32).contiguous() for part in self.ranking))
            object.__setattr__(self, "ranking", ranking)
        for word in (*SETS, *(["ranking"] if self.ranking else [])):
            scored = {units: getattr(getattr(self, word), units) for units in self.layout.unit_shapes}
            shapes = {units: tuple(scores.shape) for units, scores in scored.items()}
            if shapes != self.layout.unit_shapes:
                raise ValueError(
                    f"UnitScores: {word} scores heads {shapes['heads']} and channels {shapes['channels']}, expected "
                    f"{self.layout.heads_shape} and {self.layout.channels_shape} for {self.layout}"
                )
            for units, scores in scored.items():
                _check_finite("UnitScores", f"{word} of {units}", scores)

    def __repr__(self) -> str:
        return (
            f"UnitScores({self.layout}; {self.method} over {self.safety.n_positions:,} safety and "
            f"{self.utility.n_positions:,} utility positions)"
        )

    def check(self, model: torch.nn.Module) -> None:
        """Make sure that ``model`` has the weights these scores were made with.

        Compared is a hash over the shapes of all parameters that hold units and 1,024 weights of each, rounded to
        bfloat16: a model cast to another dtype, on another device or inside another wrapper is the same model, one
        that was trained further is not. Of a model on the meta device, and for scores without a fingerprint, only
        the numbers of units are compared.

        Raises:
            ValueError: another model, or an unknown architecture.
        """
        layout = find_units(model)
        if layout.unit_shapes != self.layout.unit_shapes:
            raise ValueError(
                f"UnitScores.check: the model is {layout}, expected {self.layout}, whose units were scored; score "
                "this model, or load the one that was scored"
            )
        weights = _unit_weights(model, layout)
        check_fingerprint("UnitScores.check", self.model_fingerprint, weights)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; a crash leaves an older file as it was."""
        fields = {
            "method": self.method,
            "settings": json.dumps(dict(self.settings)),
            "layout": self.layout.to_json(),
            "model_fingerprint": self.model_fingerprint,
        }
        tensors: dict[str, Tensor] = {}
        for word, scores in ((word, getattr(self, word)) for word in SETS):
            fields |= {f"{word}.n_positions": str(scores.n_positions), f"{word}.fingerprint": scores.fingerprint}
            tensors |= {f"{word}.head_features": scores.head_features, f"{word}.channels": scores.channels}
        if self.ranking is not None:
            tensors |= {f"ranking.{units}": part for units, part in self.ranking._asdict().items()}
        write_tensors(path, tensors, stamped(_FORMAT, fields))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> UnitScores:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: truncated, altered, of another version, or not a score file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"UnitScores.load: no file {os.fspath(path)!r}")
        try:
            header, tensors = read_tensors(path, _FORMAT)
            safety, utility = (
                SetScores(
                    tensors[f"{word}.head_features"],
                    tensors[f"{word}.channels"],
                    int(header[f"{word}.n_positions"]),
                    header[f"{word}.fingerprint"],
                )
                for word in SETS
            )
            ranked = "ranking.heads" in tensors
            ranking = UnitValues(*(tensors[f"ranking.{units}"] for units in UnitValues._fields)) if ranked else None
            return cls(
                UnitLayout.from_json(header["layout"]), safety, utility, header["method"], ranking,
                header["model_fingerprint"], json.loads(header["settings"]),
            )  # fmt: skip
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"UnitScores.load: {os.fspath(path)!r} is not a score file this package reads ({error})"
            ) from error


# ------------------------------------------------------------------------------------------------- methods


class _Job(NamedTuple):
    """What the collectors of a method are made from."""

    model: torch.nn.Module
    layout: UnitLayout
    positions: Positions
    refuse: list[int] | None
    comply: list[int] | None
    rows: int

    def moments(self, _: str) -> ActivationMoments:
        return ActivationMoments(self.model, self.layout, self.positions)

    def products(self, _: str) -> GradientSums:
        return GradientSums(self.model, self.layout, answer_loss, "products", self.rows)

    def squares(self, word: str) -> GradientSums:
        derived = Margin(self.refuse, self.comply) if word == "safety" else answer_loss
        return GradientSums(self.model, self.layout, derived, "squares", self.rows)

    def margins(self, _: str, first: bool = False) -> MarginGradients:
        return MarginGradients(self.model, self.layout, Margin(self.refuse, self.comply), first=first)


class _Method(NamedTuple):
    """How a method collects the set of a name, what it makes of both sets' totals, and which options it has."""

    collector: Callable[[_Job, str], Collector]
    score: Callable[[Any, Any], Scored]
    options: tuple[str, ...]


_TOKENS: Final = ("refuse_token", "comply_token")
_METHODS: Final[dict[str, _Method]] = {
    **{name: _Method(_Job.moments, partial(formula_scores, name), ("positions",)) for name in FORMULAS},
    "activation_contrast": _Method(_Job.moments, contrast, ("positions",)),
    "snip": _Method(_Job.products, plain_sums, ("rows_per_gradient",)),
    "decision_fisher": _Method(_Job.squares, decision_ratio, ("refuse_token", "rows_per_gradient")),
    "gradient_x_activation": _Method(partial(_Job.margins, first=True), gradient_times_activation, _TOKENS),
    "activation_patching": _Method(_Job.margins, patching_effect, _TOKENS),
}

#: The methods of `score_units`.
METHODS: Final = tuple(_METHODS)


def score_units(
    model: torch.nn.Module,
    safety: Iterable[Mapping[str, Tensor]],
    utility: Iterable[Mapping[str, Tensor]],
    method: str = "fluctuation",
    *,
    positions: Positions = "predicting",
    refuse_token: int | Sequence[int] | None = None,
    comply_token: int | Sequence[int] | None = None,
    rows_per_gradient: int = 4,
    resume: str | os.PathLike[str] | None = None,
    every: int = 16,
    group: ProcessGroup | None = None,
    progress: bool = False,
) -> UnitScores:
    """Score every head and channel of ``model`` on a safety and a utility calibration set.

    X is the input of the attention or MLP output projection, W that projection's weight ``[out, in]``, j one of its
    input features; a head has ``head_dim`` of them and scores their mean, a channel is one. n runs over the N
    counted positions of a set. One forward pass per batch, no gradients:

    =========================  ==========================================================================
    ``"fluctuation"``          1/(N-1) · Σ_n (X_nj - mean_j)² · ‖W_:,j‖². SSAH (arXiv 2410.10862); the WIFV
                               of FLAP (arXiv 2312.11983)
    ``"ifv"``                  the same without the weights (FLAP)
    ``"wifn"``                 mean_i |W_ij| · √(1/N · Σ_n X_nj²) (FLAP; up to its constant factor)
    ``"wanda"``                Σ_i |W_ij| · ‖X_:,j‖₂: Wanda (arXiv 2306.11695), summed over a unit's weights in
                               the matrix that reads it. Ranks the units of a layer as ``"wifn"`` does
    ``"activation_contrast"``  |mean over safety - mean over utility| / s, s² the mean of the sets' variances;
                               each set's own score is |mean| / s
    =========================  ==========================================================================

    With gradients, one forward and one backward pass. W_u are the weights of a unit: of a head its query, key and
    value rows with their biases and its output columns (of a KV head that several query heads share, each gets an
    even part of the sum), of a channel its gate and up rows with their biases and its down column. M is the
    log-odds of refusing where a row's first response token is chosen: z_refuse - logsumexp(other tokens). m is M,
    or with ``comply_token`` z_refuse - z_comply. a runs over a unit's features X_nj:

    ===========================  ========================================================================
    ``"snip"``                   Σ over gradients of Σ_{w∈W_u} |w · ∂L/∂w|, L the mean cross-entropy of the response
                                 tokens: SNIP (arXiv 1810.02340), as in Wei et al. (arXiv 2402.05162)
    ``"decision_fisher"``        S / (U + 0.001 · mean U). S = Σ over gradients of Σ_{w∈W_u} (∂ mean M/∂w)² on the
                                 safety set, U the same of L on the utility set
    ``"gradient_x_activation"``  |mean over safety rows - mean over utility rows| of Σ_pos a·∂m/∂a
    ``"activation_patching"``    |mean over rows of Σ_pos (ā - a)·∂m/∂a|, ā the other set's mean: what putting ā in a's
                                 place at every position of the prompt but its first would change in m, to first
                                 order (attribution patching; Syed et al., arXiv 2310.10348). Exact patching
                                 takes a forward pass per unit. It is the safety set's score
    ===========================  ========================================================================

    What is known to protect: in a miniature (a model of 288,000 parameters that was taught to refuse, then fine-tuned
    on harmless rows until it had learnt them), attack success, compared with freezing as many random units, mean
    difference (standard error). Over 20 seeds, with other objects scored than those asked about (examples/study):
    decision Fisher -.06 (.02) at 20% of units frozen and -.10 (.03) at 50%, with utility rows of the new task -.15
    (.04) and -.12 (.04); gradient × activation -.04 (.02) at 20%; SSAH's SCU + all CU -.08 (.03), SCU + 6% CU -.01
    (.01). Freezing the first layers, or half the learning rate, did as well. Before, over up to 9 seeds whose scores
    saw the objects: decision Fisher -.35 (.08) at 20% and at 50%, there -.40 (.08) with utility rows of the new task;
    at 20% activation patching -.30 (.09), gradient × activation -.28 (.06) with m = z_refuse - z_comply; fluctuation
    -.00 (.02) and -.03 (.06). SSAH's published results are on 7B and 8B models. There are no figures for the other
    methods, and nothing is known of the gradient methods on models of that size.

    The model runs in eval mode and is left as it was found: modes, gradients, ``requires_grad`` and hooks. Memory
    does not grow with the sets, and gradients of weights are reduced to units parameter by parameter. Sums are
    float64 (float32 on mps), whatever the model's dtype, but gradients themselves may underflow in float16. Padding
    is moved to the right, so neither its side nor the sizes of batches change a score, but for rounding.

    Args:
        model: a causal language model whose layout `find_units` knows.
        safety, utility: batches: mappings with ``input_ids``, ``labels`` (-100 = not a response token) and,
            where there is padding, ``attention_mask``, all ``[batch, tokens]``; other entries go to the model
            as they are. `encode_pairs` makes them. Any iterable will do; each is read once.
        method: one of `METHODS`, above.
        positions: of methods without gradients, which positions count. ``"predicting"``: those whose next token is a
            response token (``labels[t+1] != -100``). This is where a causal model chooses the response; it includes
            the last prompt token, where refusing or complying is decided, and leaves out the last response token,
            whose output predicts nothing. ``"response"``: the response tokens themselves (``labels[t] !=
            -100``), as in the authors' prototype when it separates prompt and response. ``"all"``: every
            unpadded position, as that prototype does by default. An expert's channels count the tokens routed to it.
        refuse_token: of methods with M or m, the token or tokens a refusal begins with (their probabilities add).
            Default: the first response token of each safety row; where the margin is taken on utility rows too (m),
            all of those together, for which ``safety`` must be a list.
        comply_token: of methods with m, the token or tokens that compliance begins with; default: all others.
        rows_per_gradient: of methods with W_u, over how many rows L or mean M is a mean. Rows are taken in their
            order, across batches; the last gradient may have fewer. With 1, ``"snip"`` is Wei et al.'s.
        resume: file to keep what was counted in. When it is there already, what it holds is not computed again; it
            is deleted once scores are returned. With ``group`` every rank has a file of its own next to it.
        every: passes (batches, or gradients) between two writes of that file.
        group: process group whose ranks each bring their own part of the sets (``torch.distributed.group.WORLD``:
            all); every rank returns the scores of all parts together.
        progress: show a progress bar per set (tqdm).

    Raises:
        ValueError: an unknown method or ``positions``, an option the method does not have, an unknown architecture,
            weights that are not floating point, not in memory or held twice, a set with no batches or too few
            counted positions, a row without prompt or response where one is needed, a batch of the wrong shape, NaN
            or infinite activations or gradients, a ``resume`` file of other weights, data or arguments, ranks with
            different models.
        TypeError: a set that is a single batch, or a batch that is not a mapping.
    """
    options = {
        "positions": positions,
        "refuse_token": refuse_token,
        "comply_token": comply_token,
        "rows_per_gradient": rows_per_gradient,
    }
    _check_options(method, options, every)
    chosen = _METHODS[method]
    layout = find_units(model)
    weights = _unit_weights(model, layout)
    check_weights(weights)
    refuse, comply = token_ids("refuse_token", refuse_token), token_ids("comply_token", comply_token)
    if refuse is None and "comply_token" in chosen.options:
        refuse = _first_tokens(safety, group)
    if refuse and comply and set(refuse) & set(comply):
        raise ValueError(
            f"score_units: {min(set(refuse) & set(comply))} is a refuse_token and a comply_token, expected one of them"
        )
    options |= {"refuse_token": refuse, "comply_token": comply}
    settings = {word: options[word] for word in chosen.options}
    fingerprint = weights_fingerprint(weights)
    job = _Job(model, layout, positions, refuse, comply, rows_per_gradient)
    about = {"method": method, "settings": json.dumps(settings), "layout": layout.to_json(), "model": fingerprint}
    with torch.inference_mode(False), evaluating(model):  # totals of inference mode could not be added to outside it
        collectors = [chosen.collector(job, word) for word in SETS]
        file = Partial(resume, every, about, group)
        counts = [
            collect(collector, batches, word, file, progress)
            for word, collector, batches in zip(SETS, collectors, (safety, utility), strict=True)
        ]
        if group is not None:
            for collector, count in zip(collectors, counts, strict=True):
                merge_ranks(collector, count, fingerprint, group)
        for word, collector, count in zip(SETS, collectors, counts, strict=True):
            if count.passes == 0:
                raise ValueError(
                    f"score_units: {word} holds no batches (an empty or used-up iterable), expected at least one"
                )
            collector.check(word, count)
        safe_values, useful_values, ranking = chosen.score(*collectors)
    safe, useful = (
        SetScores(values.heads, values.channels, count.positions, count.fingerprint)
        for values, count in zip((safe_values, useful_values), counts, strict=True)
    )
    scores = UnitScores(layout, safe, useful, method, ranking, fingerprint, settings)
    file.remove()
    return scores


@torch.no_grad()
def refusal_margins(
    model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]], refuse_token: int | Sequence[int] | None = None
) -> Tensor:
    """The log-odds of refusing where each row's first response token is chosen: z_refuse - logsumexp(other tokens).

    Above 0, the refusal is likelier than everything else together. The model runs in eval mode and is left as it was.

    Args:
        model: a causal language model.
        batches: prompts with a refusal each, as in `score_units`; padding may be on either side.
        refuse_token: the token or tokens a refusal begins with; default: the first response token of each row.

    Returns:
        float32 ``[rows]``, in the order of the rows, on the model's device.

    Raises:
        ValueError: no batches, a row without prompt or response, a token beyond the vocabulary.
    """
    margin = Margin(token_ids("refuse_token", refuse_token), None)
    with evaluating(model):
        found = [margin.of(model, one) for one in read_passes(batches, "safety")]
    if not found:
        raise ValueError("refusal_margins: batches holds none (an empty or used-up iterable), expected at least one")
    return torch.cat(found)


def _check_options(method: str, options: Mapping[str, Any], every: int) -> None:
    check_word("score_units", "method", method, METHODS)
    check_word("score_units", "positions", options["positions"], get_args(Positions))
    for word, number in (("rows_per_gradient", options["rows_per_gradient"]), ("every", every)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"score_units: {word} is {number!r}, expected a whole number of at least 1")
    parameters = inspect.signature(score_units).parameters
    for word, value in options.items():
        if word not in _METHODS[method].options and value != parameters[word].default:
            having = ", ".join(repr(name) for name, other in _METHODS.items() if word in other.options)
            raise ValueError(
                f"score_units: {word} is {value!r}, but {method!r} has no such option, expected it with {having}"
            )


def token_ids(word: str, given: int | Sequence[int] | None) -> list[int] | None:
    if given is None:
        return None
    try:
        tokens = {operator.index(token) for token in (given if isinstance(given, Iterable) else (given,))}
    except TypeError:
        tokens = set()
    if not tokens or min(tokens) < 0:
        raise ValueError(f"score_units: {word} is {given!r}, expected a token id, or several")
    return sorted(tokens)


def _first_tokens(safety: Iterable[Mapping[str, Tensor]], group: ProcessGroup | None) -> list[int]:
    """The tokens that the responses of a set begin with."""
    if not isinstance(safety, Sequence) or group is not None:
        raise ValueError(
            "score_units: refuse_token is not given, expected it where safety is "
            f"{'shared among ranks' if group is not None else 'not a list'}, since the first tokens of its responses "
            "are needed before it is read; pass the token refusals begin with"
        )
    tokens: set[int] = set()
    for one in read_passes(safety, "safety"):
        assert one.labels is not None
        tokens |= set(one.labels.gather(1, one.deciding[:, None] + 1).flatten().tolist())
    if not tokens:
        raise ValueError("score_units: safety holds no batches (an empty list), expected at least one")
    return sorted(tokens)


# ------------------------------------------------------------------------------------------------- weights


def _unit_weights(model: torch.nn.Module, layout: UnitLayout) -> dict[str, Tensor]:
    """Name -> parameter that holds units, in the layout's order."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: parameters[name] for name in layout.parameters}


def check_weights(weights: Mapping[str, Tensor]) -> None:
    names: dict[int, str] = {}
    for name, weight in weights.items():
        if hasattr(weight, "placements"):
            raise ValueError(
                f"score_units: {name!r} is sharded (a DTensor), expected weights that this rank holds whole; score "
                "before sharding"
            )
        if weight.is_meta:
            raise ValueError(f"score_units: {name!r} is on the meta device, expected weights in memory; load them")
        if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"score_units: {name!r} has dtype {weight.dtype}, expected float32, bfloat16 or float16; load the "
                "model without quantization"
            )
        if weight.is_inference():
            raise ValueError(
                f"score_units: {name!r} was made in inference mode, expected an ordinary tensor; load the model "
                "outside torch.inference_mode()"
            )
        if names.setdefault(id(weight), name) != name:
            raise ValueError(
                f"score_units: {names[id(weight)]!r} and {name!r} are one parameter, expected one each; layers that "
                "share their weights are not supported"
            )


def check_fingerprint(operation: str, scored: str, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless ``weights`` have the fingerprint of those that were scored ("" = not known), as far as
    they have values."""
    if scored and not any(weight.is_meta for weight in weights.values()):
        found = weights_fingerprint(weights)
        if found != scored:
            raise ValueError(
                f"{operation}: the model's weights have fingerprint {found[:12]}…, expected {scored[:12]}…, those that "
                "were scored; score this model, or load the one that was scored"
            )


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """sha256 over shapes and a fixed sample of each parameter, rounded to bfloat16 so that casts do not count."""
    digest = hashlib.sha256()
    steps = torch.arange(_SAMPLE) * 2654435761  # a prime: spread over rows and columns whatever their numbers
    for weight in weights.values():
        flat = weight.detach().reshape(-1)
        sample = flat[(steps[: flat.numel()] % flat.numel()).to(flat.device)].to("cpu", torch.bfloat16)
        digest.update(str(tuple(weight.shape)).encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
