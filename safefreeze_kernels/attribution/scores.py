"""How much a unit matters for safety and for utility: scores of heads and channels from two calibration sets.

The method is SSAH's (Li & Kim, ICLR 2026, arXiv 2410.10862): how far a unit's activation fluctuates over
response tokens, weighted by how strongly the next matrix reads it.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from ..masks import write_atomically
from .units import UnitLayout, find_units

__all__ = ["Positions", "SetScores", "UnitScores", "encode_pairs", "score_units"]

Positions = Literal["predicting", "response", "all"]
_METHODS: Final = ("fluctuation",)
_FORMAT: Final = "safefreeze.unit_scores"
_VERSION: Final = "1"
_IGNORE: Final = -100


@dataclass(frozen=True, repr=False, eq=False)
class SetScores:
    """Raw scores of every unit on one calibration set.

    Args:
        head_features: ``[n_layers, n_heads, head_dim]``, the score of each feature a head hands to the
            attention output projection. A source that scores whole heads passes ``[n_layers, n_heads]``.
        channels: ``[n_layers, d_ff]``.
        n_positions: token positions the scores were computed over.

    Both are kept as float32 on the CPU.

    Raises:
        ValueError: wrong number of dimensions, different numbers of layers, NaN or infinite scores.
    """

    head_features: Tensor
    channels: Tensor
    n_positions: int = 0

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
            if not torch.isfinite(scores).all():
                layer = int((~torch.isfinite(scores)).flatten(1).any(1).nonzero()[0])
                raise ValueError(
                    f"SetScores: {word} of layer {layer} holds NaN or inf in float32, expected finite scores"
                )
        object.__setattr__(self, "head_features", features)
        object.__setattr__(self, "channels", channels)

    @property
    def heads(self) -> Tensor:
        """Score of each head, ``[n_layers, n_heads]``: the mean over its features."""
        return self.head_features.double().mean(-1).float()


@dataclass(frozen=True, repr=False, eq=False)
class UnitScores:
    """Safety and utility scores of every unit of one model: what `MaskBuilder` ranks.

    ``safety.heads`` is ``[n_layers, n_heads]``, ``safety.channels`` is ``[n_layers, d_ff]``, and ``utility``
    likewise, all float32. ``layout`` says which model they belong to.

    Raises:
        ValueError: scores that do not have the layout's shapes.
    """

    layout: UnitLayout
    safety: SetScores
    utility: SetScores
    method: str = "fluctuation"

    def __post_init__(self) -> None:
        for word, scores in (("safety", self.safety), ("utility", self.utility)):
            heads, channels = tuple(scores.head_features.shape[:2]), tuple(scores.channels.shape)
            if heads != self.layout.heads_shape or channels != self.layout.channels_shape:
                raise ValueError(
                    f"UnitScores: {word} scores heads {heads} and channels {channels}, expected "
                    f"{self.layout.heads_shape} and {self.layout.channels_shape} for {self.layout}"
                )

    def __repr__(self) -> str:
        return (
            f"UnitScores({self.layout}; {self.method} over {self.safety.n_positions:,} safety and "
            f"{self.utility.n_positions:,} utility positions)"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; a crash leaves an older file as it was."""
        from safetensors.torch import save

        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "method": self.method,
            "layout": self.layout.to_json(),
        }
        tensors: dict[str, Tensor] = {}
        for word, scores in (("safety", self.safety), ("utility", self.utility)):
            header[f"{word}.n_positions"] = str(scores.n_positions)
            tensors[f"{word}.head_features"] = scores.head_features
            tensors[f"{word}.channels"] = scores.channels
        write_atomically(Path(path), save(tensors, header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> UnitScores:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: truncated, altered, of another version, or not a score file.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"UnitScores.load: no file {os.fspath(path)!r}")
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                header = file.metadata() or {}
                if (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
                    raise ValueError(
                        f"format {header.get('format')!r} version {header.get('version')!r}, expected "
                        f"{_FORMAT!r} version {_VERSION!r}"
                    )
                sets = {
                    word: SetScores(
                        file.get_tensor(f"{word}.head_features"),
                        file.get_tensor(f"{word}.channels"),
                        int(header[f"{word}.n_positions"]),
                    )
                    for word in ("safety", "utility")
                }
                layout = UnitLayout.from_json(header["layout"])
                return cls(layout, sets["safety"], sets["utility"], header["method"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"UnitScores.load: {os.fspath(path)!r} is not a score file this package reads ({error})"
            ) from error


# ------------------------------------------------------------------------------------------------- scoring


def score_units(
    model: torch.nn.Module,
    safety: Iterable[Mapping[str, Tensor]],
    utility: Iterable[Mapping[str, Tensor]],
    method: str = "fluctuation",
    *,
    positions: Positions = "predicting",
    progress: bool = False,
) -> UnitScores:
    """Score every head and channel of ``model`` on a safety and a utility calibration set.

    ``method="fluctuation"`` (SSAH, arXiv 2410.10862; the WIFV metric of FLAP): with X the input of the
    attention or MLP output projection, B that projection's weight, and n over the N counted positions of a
    set,

        I_j = 1/(N-1) · Σ_n (X_nj - mean_j)² · ‖B_:,j‖²

    One forward pass per batch and no gradients; memory does not grow with the sets. The model runs in eval
    mode, and every module is left in the mode it was found in.

    Args:
        model: a causal language model whose layout `find_units` knows.
        safety, utility: batches: mappings with ``input_ids``, ``labels`` (-100 = not a response token) and,
            where there is padding, ``attention_mask``, all ``[batch, tokens]``; other entries go to the model
            as they are. `encode_pairs` makes them. Any iterable will do; each is read once.
        method: ``"fluctuation"``.
        positions: which positions count. ``"predicting"``: those whose next token is a response token
            (``labels[t+1] != -100``). This is where a causal model chooses the response; it includes the last
            prompt token, where refusing or complying is decided, and leaves out the last response token,
            whose output predicts nothing. ``"response"``: the response tokens themselves (``labels[t] !=
            -100``), as in the authors' prototype when it separates prompt and response. ``"all"``: every
            unpadded position, as that prototype does by default.
        progress: show a progress bar per set (tqdm).

    Raises:
        ValueError: unknown ``method`` or ``positions``, an unknown architecture, a set with no batches or
            fewer than two counted positions, a batch of the wrong shape, NaN or infinite activations.
        TypeError: a set that is a single batch, or a batch that is not a mapping.
    """
    if method not in _METHODS:
        raise ValueError(f"score_units: method is {method!r}, expected one of {', '.join(map(repr, _METHODS))}")
    if positions not in get_args(Positions):
        raise ValueError(
            f"score_units: positions is {positions!r}, expected one of {', '.join(map(repr, get_args(Positions)))}"
        )
    layout = find_units(model)
    norms = {name: _squared_column_norms(module, name) for name, module in _readers(model, layout)}
    with _evaluating(model), torch.no_grad():
        sets = [
            _score_set(model, layout, norms, batches, word, positions, progress)
            for word, batches in (("safety", safety), ("utility", utility))
        ]
    return UnitScores(layout, sets[0], sets[1], method)


def _readers(model: torch.nn.Module, layout: UnitLayout) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules that read units: attention and MLP output projection of each layer in turn."""
    for layer in range(layout.n_layers):
        for template in (layout.names.attention_out, layout.names.mlp_out):
            name = template.format(layer=layer)
            yield name, model.get_submodule(name)


def _squared_column_norms(module: torch.nn.Module, name: str) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        raise ValueError(f"score_units: '{name}.weight' is on the meta device, expected weights in memory; load them")
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=0, dtype=torch.float32)
    return norms.cpu().double().square()


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module's own mode, since some may have been in eval mode on purpose."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Moments:
    """Streaming mean and sum of squared deviations per feature (Chan, Golub & LeVeque 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """Take in ``rows`` ``[n, features]``: float32 deviations from the batch's mean, float64 sums."""
        n = rows.shape[0]
        if n == 0:
            return
        wide = torch.float32 if rows.device.type == "mps" else torch.float64  # mps has no float64
        mean = rows.mean(0, dtype=wide)
        centre = mean.float()
        squares = (rows.float() - centre).square_().sum(0, dtype=wide) - n * (mean - centre).square()
        delta = mean - self.mean
        total = self.count + n
        self.mean = self.mean + delta * (n / total)
        self.squares = self.squares + squares + delta.square() * (self.count * n / total)
        self.count = total

    def variance(self) -> Tensor:
        """Unbiased variance per feature, float64 on the CPU."""
        assert isinstance(self.squares, Tensor) and self.count > 1
        return self.squares.double().cpu() / (self.count - 1)


def _score_set(
    model: torch.nn.Module,
    layout: UnitLayout,
    norms: Mapping[str, Tensor],
    batches: Iterable[Mapping[str, Tensor]],
    word: str,
    positions: Positions,
    progress: bool,
) -> SetScores:
    if isinstance(batches, Mapping):
        raise TypeError(f"score_units: {word} is one batch, expected an iterable of batches; pass [batch]")
    moments = {name: _Moments() for name in norms}
    device = next(model.parameters()).device
    extra = _saving_arguments(model)
    n_batches = n_positions = 0
    counted = torch.empty(0)

    def observe(name: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def hook(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            hidden = inputs[0]
            if hidden.shape[:-1] != counted.shape:
                raise ValueError(
                    f"score_units: {name!r} received {tuple(hidden.shape)}, expected {tuple(counted.shape)} positions"
                )
            rows = hidden.reshape(-1, hidden.shape[-1])
            moments[name].add(rows.index_select(0, chosen.to(rows.device)))

        return hook

    with ExitStack() as hooks:
        for name, module in _readers(model, layout):
            hooks.callback(module.register_forward_pre_hook(observe(name)).remove)
        for batch in _watched(batches, word, progress):
            counted = _counted_positions(batch, word, n_batches, positions)
            chosen = counted.flatten().nonzero().squeeze(1).to(device)
            n_batches += 1
            n_positions += len(chosen)
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            model(**{key: v.to(device) if isinstance(v, Tensor) else v for key, v in inputs.items()}, **extra)
    if n_batches == 0:
        raise ValueError(f"score_units: {word} holds no batches (an empty or used-up iterable), expected at least one")
    if n_positions < 2:
        raise ValueError(
            f"score_units: {word} has {n_positions} counted positions in {n_batches} batches, expected at "
            "least 2; labels must hold response tokens, not -100 everywhere"
        )
    for name, seen in moments.items():
        if seen.count != n_positions:
            raise ValueError(
                f"score_units: {name!r} saw {seen.count} positions of the {word} set, expected "
                f"{n_positions}; the model must run every layer once per forward pass"
            )
    variances = {name: seen.variance() for name, seen in moments.items()}
    for name, variance in variances.items():
        if not torch.isfinite(variance).all():
            raise ValueError(
                f"score_units: the input of {name!r} is NaN or infinite on the {word} set, expected finite "
                "activations; check the weights, or load the model in float32 or bfloat16"
            )
    scores = [
        torch.stack([variances[name] * norms[name] for name in names])
        for names in (
            [template.format(layer=layer) for layer in range(layout.n_layers)]
            for template in (layout.names.attention_out, layout.names.mlp_out)
        )
    ]
    return SetScores(scores[0].reshape(*layout.heads_shape, layout.head_dim), scores[1], n_positions)


def _saving_arguments(model: torch.nn.Module) -> dict[str, Any]:
    """Forward arguments, where the model has them, that spare a cache and logits nobody reads."""
    known = inspect.signature(model.forward).parameters
    return {key: value for key, value in (("use_cache", False), ("logits_to_keep", 1)) if key in known}


def _watched(batches: Iterable[Mapping[str, Tensor]], word: str, progress: bool) -> Iterable[Mapping[str, Tensor]]:
    if not progress:
        return batches
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    bar: Iterable[Mapping[str, Tensor]] = tqdm(batches, desc=f"scoring {word}", unit="batch")
    return bar


def _counted_positions(batch: Mapping[str, Tensor], word: str, number: int, positions: Positions) -> Tensor:
    """Bool ``[batch, tokens]`` on the CPU: the positions whose activations enter the score."""
    where = f"score_units: batch {number} of {word}"
    if not isinstance(batch, Mapping):
        raise TypeError(f"{where} is a {type(batch).__name__}, expected a mapping with input_ids and labels")
    for key in ("input_ids",) if positions == "all" else ("input_ids", "labels"):
        if key not in batch:
            raise ValueError(f"{where} has no {key!r}, expected input_ids and labels (-100 = not a response token)")
    shape = tuple(batch["input_ids"].shape)
    real = batch.get("attention_mask")
    for key, value in (("labels", batch.get("labels")), ("attention_mask", real)):
        if value is not None and (tuple(value.shape) != shape or len(shape) != 2):
            raise ValueError(
                f"{where}: {key} has shape {tuple(value.shape)} and input_ids {shape}, expected the same "
                "[batch, tokens]"
            )
    counted = torch.ones(shape, dtype=torch.bool)
    if positions != "all":
        response = batch["labels"].cpu() != _IGNORE
        counted = response
        if positions == "predicting":
            counted = torch.zeros_like(response)
            counted[:, :-1] = response[:, 1:]
    return counted if real is None else counted & (real.cpu() != 0)


# --------------------------------------------------------------------------------------------- calibration


def encode_pairs(
    tokenizer: Any, pairs: Iterable[tuple[str, str]], *, max_length: int = 512, batch_size: int = 8
) -> list[dict[str, Tensor]]:
    """Turn (prompt, response) texts into batches for `score_units`.

    Where the tokenizer has a chat template, a pair becomes one user and one assistant turn, and the response
    ends with the template's end of turn. Otherwise prompt, response and end-of-text token are simply joined:
    end the prompt with the separator your model expects. Whatever comes after what the model is prompted with
    counts as response; a token that straddles the border counts as response.

    Args:
        tokenizer: a transformers tokenizer.
        pairs: prompts and responses, in the order they are to keep.
        max_length: tokens per pair; longer responses are cut at the end.
        batch_size: pairs per batch; a batch is as wide as its longest pair, padded on the right.

    Returns:
        Batches of int64 ``input_ids``, ``attention_mask`` and ``labels`` (-100 except on response tokens),
        each ``[pairs, tokens]``.

    Raises:
        ValueError: no pairs, a prompt that leaves no room for its response, sizes that are not positive.
        TypeError: an entry that is not two strings.
    """
    for word, size in (("max_length", max_length), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"encode_pairs: {word} is {size}, expected at least 1")
    encoded = []
    for number, pair in enumerate(pairs):
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise TypeError(f"encode_pairs: pair {number} is {pair!r}, expected (prompt, response), two strings")
        ids, start = _encode_pair(tokenizer, *pair)
        if start >= min(len(ids), max_length):
            raise ValueError(
                f"encode_pairs: pair {number} has {start} prompt and {len(ids) - start} response tokens, "
                f"expected a response token within max_length={max_length}; raise max_length or drop the pair"
            )
        encoded.append((ids[:max_length], start))
    if not encoded:
        raise ValueError("encode_pairs: no pairs given, expected at least one (prompt, response)")
    # any id will do: padding is masked out
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return [_pad(encoded[i : i + batch_size], pad) for i in range(0, len(encoded), batch_size)]


def _encode_pair(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], int]:
    """Token ids of prompt and response, and where the response starts."""
    templated = bool(getattr(tokenizer, "chat_template", None))
    if templated:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        # white space a template puts after the end of the turn is never the model's to write
        bare = whole.rstrip()
        whole = bare if any(bare.endswith(token) for token in tokenizer.all_special_tokens) else whole
    else:
        asked, whole = prompt, prompt + response + (tokenizer.eos_token or "")
    before, ids = (list(tokenizer(text, add_special_tokens=not templated)["input_ids"]) for text in (asked, whole))
    start = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
    return ids, start


def _pad(encoded: Sequence[tuple[list[int], int]], pad: int) -> dict[str, Tensor]:
    width = max(len(ids) for ids, _ in encoded)
    input_ids = torch.full((len(encoded), width), pad)
    labels = torch.full_like(input_ids, _IGNORE)
    attention_mask = torch.zeros_like(input_ids)
    for row, (ids, start) in enumerate(encoded):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, start : len(ids)] = input_ids[row, start : len(ids)]
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
