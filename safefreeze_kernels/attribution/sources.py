"""Labels, scores and index lists made elsewhere, made ours.

What a source holds decides what it becomes. Labels of units become `UnitLabels`, lists of units a `UnitSelection`, one
score per unit a `UnitRanking`; scores of single weights are reduced to units or become a plan of element masks, lists
of single rows and columns become a plan.

A source is an object (lists, mappings, arrays, tensors) or a ``.safetensors`` file of tensors. Other projects' files
(``.pt``, ``.npy``, ``.csv``, printed lists) are read by ``examples/foreign_formats.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from ..plan.mask import FreezeMask
from ..plan.plan import FreezePlan
from .files import read_tensors
from .selections import UnitLabels, UnitRanking, UnitSelection
from .units import Piece, UnitLayout

Reduce = Literal["mean", "sum", "max"]
Source: TypeAlias = "str | os.PathLike[str] | Mapping[Any, Any] | Sequence[Any] | np.ndarray | Tensor"

#: What SN-Tune's detector prints, in its order: the matrix, and whether a neuron is one of its rows or columns.
_NEURON_LINES: Final = (
    ("up_proj", "rows"),
    ("down_proj", "cols"),
    ("q_proj", "rows"),
    ("k_proj", "rows"),
    ("v_proj", "rows"),
)


# --------------------------------------------------------------------------------------------------- labels


def read_labels(path: str | os.PathLike[str]) -> UnitLabels:
    """Read the label of every unit: codes 0 RU, 1 SCU, 2 UCU, 3 CU, ``[layers, heads]`` and ``[layers, d_ff]``.

    Args:
        path: a ``.safetensors`` file with tensors ``attention_heads`` and ``mlp_channels``, what `UnitLabels.save`
            writes.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: not such a file, other codes; see `UnitLabels`.
    """
    tensors = _load("read_labels", Path(path))
    if not {"attention_heads", "mlp_channels"} <= set(tensors):
        raise ValueError(
            f"read_labels: {os.fspath(path)!r} holds {_few(tensors)}, expected tensors attention_heads and mlp_channels"
        )
    return UnitLabels(tensors["attention_heads"], tensors["mlp_channels"])


# -------------------------------------------------------------------------------------------- lists of units


def units_from(layout: UnitLayout, *, heads: Source | None = None, channels: Source | None = None) -> UnitSelection:
    """Select the units a list names, as detectors of safety neurons publish them.

    Args:
        layout: the model, from `find_units`.
        heads, channels: the units of each kind to freeze, numbered within their layer; None for none. Either
            takes ``{layer: indices}``; a list with the indices (or None) of every layer, as TwinBreak saves; an
            integer array ``[n, 2]`` of (layer, unit) pairs, as THU-KEG's ranks are; a bool array ``[layers,
            units]``; or a ``.safetensors`` file with such an array, named heads or channels.

    Raises:
        FileNotFoundError: no such file.
        TypeError: something else, or indices that are not integers.
        ValueError: no units at all, a layer or unit the model does not have, a unit given twice.

    >>> units_from(layout, channels={0: [3, 17], 5: [1]}).build(model)  # doctest: +SKIP
    """
    given = _given("units_from", heads=heads, channels=channels)
    shapes = layout.unit_shapes
    chosen = {word: np.zeros(shape, bool) for word, shape in shapes.items()}
    chosen |= {word: _listed(word, source, shapes[word]) for word, source in given.items()}
    if not any(units.any() for units in chosen.values()):
        raise ValueError("units_from: heads and channels hold no units, expected at least one; was anything detected?")
    names = {word: None if word not in given else _named(given[word]) for word in shapes}
    return UnitSelection(chosen["heads"], chosen["channels"], layout, {"selection": {"units_from": names}})


def _listed(word: str, source: Source, shape: tuple[int, int]) -> np.ndarray:
    """Bool ``shape``, True where ``source`` lists the unit."""
    where = f"units_from: {word}"
    content = _content("units_from", source, word)
    chosen = np.zeros(shape, bool)
    if isinstance(content, np.ndarray) and content.dtype == np.bool_:
        if content.shape != shape:
            raise ValueError(f"{where} is bool of shape {content.shape}, expected {shape}")
        return content
    if isinstance(content, np.ndarray):
        if content.ndim != 2 or content.shape[1] != 2:
            raise ValueError(
                f"{where} has shape {content.shape}, expected [n, 2] pairs of layer and unit; or a list with the "
                "indices of every layer"
            )
        layers = _indices(f"{where}: layers of the pairs", np.unique(content[:, 0]), shape[0])
        content = {layer: content[content[:, 0] == layer, 1] for layer in layers.tolist()}
    for layer, given in _by_layer(where, content, shape[0]).items():
        if given is not None:
            chosen[layer, _indices(f"{where} of layer {layer}", given, shape[1])] = True
    return chosen


# ------------------------------------------------------------------------------------------ scores per unit


def scores_from(
    layout: UnitLayout,
    *,
    heads: Source | None = None,
    channels: Source | None = None,
    reduce: Reduce = "mean",
    method: str = "foreign",
) -> UnitRanking:
    """Take one score per unit from arrays; the highest are frozen first.

    Args:
        layout: the model, from `find_units`.
        heads, channels: scores of each kind, None where there are none. Either takes an array ``[layers,
            units]``; for every layer (a list, or ``{layer: tensor}``) an attribution shaped like the layer's
            output, ``[…, features]``, as Captum returns it (``[batch, tokens, features]``); or a ``.safetensors`` file
            with such an array, named heads or channels. A head's features are those it hands to the output projection:
            ``[layers, heads, head_dim]``, or ``heads · head_dim`` of them per layer.
        reduce: how batch, time and a head's features become one number: their ``"mean"``, ``"sum"`` or
            ``"max"``. Signed attributions cancel in a mean or sum; pass ``.abs()`` where they should not.
        method: name of the method, for plans' metadata.

    Raises:
        FileNotFoundError: no such file.
        TypeError: something else.
        ValueError: no scores, layers or units missing or given twice, NaN or infinite scores.

    >>> MaskBuilder(scores_from(layout, channels=change_scores)).top(0.05)  # doctest: +SKIP
    """
    _check_reduce("scores_from", reduce)
    given = _given("scores_from", heads=heads, channels=channels)
    scores = {
        word: _scored(word, source, layout.unit_shapes[word], layout.head_dim, reduce) for word, source in given.items()
    }
    return UnitRanking(layout, scores.get("heads"), scores.get("channels"), method)


def _scored(word: str, source: Source, shape: tuple[int, int], head_dim: int, reduce: Reduce) -> np.ndarray:
    """Float64 ``shape``."""
    where = f"scores_from: {word}"
    content = _content("scores_from", source, word)
    if isinstance(content, np.ndarray):
        if content.dtype.kind not in "biuf":
            raise TypeError(f"{where} holds {content.dtype}, expected numbers")
        if content.shape == shape:
            return content.astype(np.float64)
        if content.shape != (*shape, head_dim) or word != "heads":
            raise ValueError(
                f"{where} has shape {content.shape}, expected {shape}; attributions shaped like a layer's output go as "
                "a list with one tensor per layer"
            )
        return _reduced(torch.from_numpy(content.astype(np.float64)), 2, reduce).numpy()
    layers = _by_layer(where, content, shape[0])
    missing = [layer for layer in range(shape[0]) if layers.get(layer) is None]
    if missing:
        raise ValueError(f"{where} has no scores of layers {_few(missing)}, expected all {shape[0]} layers")
    widths = (shape[1], shape[1] * head_dim) if word == "heads" else (shape[1],)
    rows = []
    for layer in range(shape[0]):
        try:
            scores = torch.as_tensor(layers[layer]).detach().cpu().double()
        except (TypeError, ValueError, RuntimeError):
            kind = type(layers[layer]).__name__
            raise TypeError(f"{where} of layer {layer} is a {kind}, expected an array or tensor of scores") from None
        if not scores.dim() or scores.shape[-1] not in widths or not scores.numel():
            raise ValueError(
                f"{where} of layer {layer} has shape {tuple(scores.shape)}, expected […, "
                f"{' or '.join(map(str, widths))}]"
            )
        rows.append(_reduced(scores.reshape(-1, shape[1], scores.shape[-1] // shape[1]), (0, 2), reduce).numpy())
    return np.stack(rows)


# ---------------------------------------------------------------------------------------- scores per weight


def scores_from_weights(
    layout: UnitLayout,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    reduce: Reduce = "mean",
    method: str = "foreign",
) -> UnitRanking:
    """Reduce scores of single weights (Wanda's, SNIP's) to one score per unit.

    A unit's score is the sum, mean or maximum over all its weights in the matrices given: rows of q, k, v, gate and
    up, columns of the output projections, biases if given. A KV head that several query heads share counts for each
    of them, in sums and means by an equal share.

    Args:
        layout: the model, from `find_units`.
        weights: parameter name -> scores of that parameter's shape; pairs are read one by one, so that not all need
            be in memory. The same parameters in every layer; a kind of unit none of them holds gets no score.
        reduce: ``"mean"``, ``"sum"`` or ``"max"``. Sums favour heads over channels by their size.
        method: name of the method, for plans' metadata.

    Raises:
        ValueError: no scores, a parameter that holds no units or is given twice, another shape, NaN or infinite
            scores, a layer that lacks a parameter another one has.
    """
    _check_reduce("scores_from_weights", reduce)
    pieces: dict[str, tuple[int, list[Piece]]] = {}
    for layer in range(layout.n_layers):
        for piece in layout.pieces(layer):
            pieces.setdefault(piece.parameter, (layer, []))[1].append(piece)
    shapes = layout.unit_shapes.items()
    totals = {units: np.full(shape, -np.inf if reduce == "max" else 0.0) for units, shape in shapes}
    counts = {units: np.zeros(shape) for units, shape in shapes}  # of weights
    add = np.maximum if reduce == "max" else np.add
    seen: set[str] = set()
    for name, scores in weights.items() if isinstance(weights, Mapping) else weights:
        if name not in pieces or name in seen:
            problem = "is given twice" if name in seen else "holds no units"
            raise ValueError(f"scores_from_weights: {name!r} {problem}, expected each parameter of {layout} once")
        seen.add(name)
        layer, its_pieces = pieces[name]
        matrix = _score_matrix("scores_from_weights", name, scores, its_pieces[0].shape)
        for piece in its_pieces:
            units, places, sharing = layout.shared(piece)
            score, size = _of_units(piece, matrix, reduce)
            score = score if reduce == "max" else score / sharing
            totals[units][layer, places] = add(totals[units][layer, places], score.repeat(sharing))
            counts[units][layer, places] += size / sharing
    if not seen:
        raise ValueError("scores_from_weights: no scores given, expected a matrix per parameter")
    for word, count in counts.items():
        if (count != count[0, 0]).any():
            layer = int(np.argwhere(count != count[0, 0])[0, 0])
            missing = sorted(name for name, (place, _) in pieces.items() if place in (0, layer) and name not in seen)
            raise ValueError(
                f"scores_from_weights: {word} of layers 0 and {layer} are scored by different parameters (missing: "
                f"{_few(missing)}), expected the same ones for all"
            )
        if reduce == "mean" and count.any():
            totals[word] /= count
    scored = {word: total for word, total in totals.items() if counts[word].any()}
    return UnitRanking(layout, scored.get("heads"), scored.get("channels"), method)


def _of_units(piece: Piece, matrix: Tensor, reduce: Reduce) -> tuple[np.ndarray, int]:
    """Sum or maximum over each unit's weights in a piece (float64), and how many weights these are."""
    part = matrix if piece.axis == "rows" else matrix.T
    part = part if piece.within is None else part[:, slice(*piece.within)]
    entries = _reduced(part, 1, "max" if reduce == "max" else "sum").double().numpy()[piece.index]
    return entries.max(1) if reduce == "max" else entries.sum(1), piece.index.shape[1] * part.shape[1]


def plan_from_weights(
    weights: Mapping[str, Tensor],
    share: float | None = None,
    *,
    utility: Mapping[str, Tensor] | None = None,
    utility_share: float | None = None,
) -> FreezePlan:
    """Freeze single weights: the highest-scored share of every matrix, as element masks.

    With ``utility``, those that are also among the top ``utility_share`` of the utility scores stay live: the set
    difference of Wei et al. (2024, arXiv 2402.05162), matrix by matrix. Counts are exact (nearest to the share); ties
    go to the lowest index.

    Args:
        weights: parameter name -> scores of that parameter's shape; with ``share=None``, bool masks made elsewhere,
            True = frozen.
        share: of each matrix to freeze, above 0 and up to 1.
        utility: scores of the same parameters on a utility set.
        utility_share: of each matrix to keep live, between 0 and 1.

    Raises:
        TypeError: masks that are not bool.
        ValueError: no parameters, shares outside their range or one without its scores, other names or shapes in
            ``utility``, NaN, infinite or constant scores, nothing left to freeze.
    """
    _check_request(weights, share, utility, utility_share)
    masks: dict[str, FreezeMask] = {}
    for name, scores in weights.items():
        if share is None:
            if scores.dtype != torch.bool:
                raise TypeError(
                    f"plan_from_weights: {name!r} is {scores.dtype}, expected bool masks where no share is given"
                )
            frozen = scores.detach().cpu().numpy()
        else:
            frozen = _highest(name, scores, share, "weights")
        if utility is not None and utility_share is not None:
            if utility[name].shape != scores.shape:
                raise ValueError(
                    f"plan_from_weights: {name!r} has shape {tuple(scores.shape)} in weights and "
                    f"{tuple(utility[name].shape)} in utility, expected the same"
                )
            frozen &= ~_highest(name, utility[name], utility_share, "utility")
        if frozen.any():
            masks[name] = FreezeMask(tuple(scores.shape), elements=torch.from_numpy(frozen))
    if not masks:
        raise ValueError(
            "plan_from_weights: no weight is left to freeze, expected a larger share or a smaller utility_share"
        )
    about = {"masks": "given"} if share is None else {"top_weights": share, "utility_share": utility_share}
    return FreezePlan(masks, {"selection": about})


def _check_request(
    weights: Mapping[str, Tensor],
    share: float | None,
    utility: Mapping[str, Tensor] | None,
    utility_share: float | None,
) -> None:
    if not weights:
        raise ValueError("plan_from_weights: no parameters given, expected a matrix of scores per parameter")
    if share is None and (utility is not None or utility_share is not None):
        raise ValueError("plan_from_weights: utility given without share, expected the share to freeze first")
    if (utility is None) != (utility_share is None):
        raise ValueError("plan_from_weights: utility and utility_share go together, expected both or neither")
    for word, given in (("share", share), ("utility_share", utility_share)):
        number = isinstance(given, float | int) and not isinstance(given, bool)
        if given is not None and not (number and 0 < given <= 1):
            raise ValueError(f"plan_from_weights: {word} is {given!r}, expected a fraction above 0, at most 1")
    if utility is not None and set(utility) != set(weights):
        raise ValueError(
            f"plan_from_weights: weights and utility differ in {_few(sorted(set(utility) ^ set(weights)))}, expected "
            "the same parameters"
        )


def _highest(name: str, scores: Tensor, share: float, word: str) -> np.ndarray:
    """Bool of the scores' shape: the highest ones, exactly as many as comes nearest to the share."""
    values = _score_matrix("plan_from_weights", name, scores, tuple(scores.shape)).numpy().ravel()
    count = int(share * values.size + 0.5)
    chosen = np.zeros(values.size, bool)
    if values.size > 1 and values.min() == values.max():
        raise ValueError(
            f"plan_from_weights: the {word} scores of {name!r} are all the same, expected scores that rank"
        )
    if count:
        threshold = np.partition(values, values.size - count)[values.size - count]
        chosen = values > threshold
        tied = np.flatnonzero(values == threshold)
        chosen[tied[: count - int(chosen.sum())]] = True
    return chosen.reshape(tuple(scores.shape))


def _score_matrix(operation: str, name: str, scores: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scores as a matrix (leading dimensions are rows, an entry of a vector is a row), in float32 or float64."""
    if tuple(scores.shape) != shape:
        raise ValueError(f"{operation}: {name!r} has shape {tuple(scores.shape)}, expected {shape}")
    scores = scores.detach().cpu()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    # of finite values only an overflowing sum is not finite, and a sum is read forty times faster
    if not scores.sum().isfinite() and not scores.isfinite().all():
        raise ValueError(f"{operation}: {name!r} holds NaN or inf, expected finite scores")
    return scores.reshape(-1, shape[-1]) if len(shape) > 1 else scores.reshape(-1, 1)


def _reduced(scores: Tensor, dim: int | tuple[int, ...], reduce: Reduce) -> Tensor:
    if reduce == "max":
        return scores.amax(dim)
    return (scores.sum if reduce == "sum" else scores.mean)(dim)


# ------------------------------------------------------------------------------------- single rows, columns


def plan_from_neurons(layout: UnitLayout, source: Sequence[Mapping[Any, Any]]) -> FreezePlan:
    """Freeze the neurons of SN-Tune's detector: single rows and columns of single matrices, not units.

    It prints five lines in a fixed order, each ``{layer: indices}``: neurons of ``ffn_up`` (rows of up_proj),
    ``ffn_down`` (columns of down_proj), ``q``, ``k`` and ``v`` (rows of q_proj, k_proj, v_proj). The neurons listed
    are what freezes; a bias entry freezes with its row.

    Args:
        layout: the model, from `find_units`.
        source: the five mappings.

    Raises:
        TypeError: indices that are not integers.
        ValueError: not five mappings, a layer or neuron the model does not have, a neuron given twice, no neurons at
            all, an architecture that has no such matrices.
    """
    lines: Sequence[Any] = source if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    if len(lines) != len(_NEURON_LINES) or not all(isinstance(line, Mapping) for line in lines):
        raise ValueError(
            f"plan_from_neurons: got {_few(type(line).__name__ for line in lines)}, expected five mappings of layer to "
            "indices: ffn_up, ffn_down, q, k, v"
        )
    shapes = layout.parameters
    masks: dict[str, FreezeMask] = {}
    for (matrix, axis), line in zip(_NEURON_LINES, lines, strict=True):
        for layer, given in _by_layer(f"plan_from_neurons: {matrix}", line, layout.n_layers).items():
            of_layer = dict.fromkeys(piece.parameter for piece in layout.pieces(layer))
            names = [name for name in of_layer if name.endswith(f".{matrix}.weight")]
            if len(names) != 1:
                raise ValueError(
                    f"plan_from_neurons: {layout.model_type} has {len(names)} matrices {matrix!r} per layer, expected "
                    "one; the file's neurons are rows and columns of q_proj, k_proj, v_proj, up_proj and down_proj"
                )
            shape = shapes[names[0]]
            index = _indices(f"plan_from_neurons: {names[0]!r}", given, shape[0 if axis == "rows" else 1])
            if not index.size:
                continue
            masks[names[0]] = FreezeMask(shape, rows=index) if axis == "rows" else FreezeMask(shape, cols=index)
            bias = names[0].removesuffix("weight") + "bias"
            if axis == "rows" and bias in shapes:
                masks[bias] = FreezeMask(shapes[bias], rows=index)
    if not masks:
        raise ValueError("plan_from_neurons: no neurons in any line, expected at least one; was anything detected?")
    return FreezePlan(masks, {"selection": {"neurons_from": "given"}, "model_type": layout.model_type})


# -------------------------------------------------------------------------------------------- what is listed


def _given(operation: str, **sources: Source | None) -> dict[str, Source]:
    """The sources that are given, at least one."""
    given = {word: source for word, source in sources.items() if source is not None}
    if not given:
        raise ValueError(f"{operation}: neither heads nor channels given, expected at least one of them")
    return given


def _content(operation: str, source: Source, word: str) -> Any:
    """What ``source`` holds of one kind of unit; a tensor as an array."""
    content: Any = _load(operation, Path(source)) if isinstance(source, str | os.PathLike) else source
    if isinstance(content, Mapping) and word in content:
        content = content[word]
    return _as_array(content)


def _as_array(content: Any) -> Any:
    """A tensor as an array (floats as float64: numpy has no bfloat16); anything else as it is."""
    if not isinstance(content, Tensor):
        return content
    content = content.detach().cpu()
    return (content.double() if content.is_floating_point() else content).numpy()


def _by_layer(where: str, content: Any, n_layers: int) -> dict[int, Any]:
    """``{layer: what is given for it}`` of a mapping or of a list with an entry per layer."""
    if isinstance(content, Mapping):
        layers: dict[int, Any] = {}
        for key, given in content.items():
            layer = int(key) if isinstance(key, int | np.integer) or (isinstance(key, str) and key.isdigit()) else -1
            if isinstance(key, bool) or not 0 <= layer < n_layers:
                raise ValueError(f"{where}: layer is {key!r}, expected 0 to {n_layers - 1}")
            if layer in layers:
                raise ValueError(f"{where}: layer {layer} is given twice, expected once")
            layers[layer] = given
        return layers
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        if len(content) != n_layers:
            raise ValueError(f"{where} has {len(content)} entries, expected one for each of {n_layers} layers")
        return dict(enumerate(content))
    raise TypeError(f"{where} is a {type(content).__name__}, expected a mapping or list of layers, or an array")


def _indices(where: str, given: Any, size: int) -> np.ndarray:
    """Ascending int64 indices below ``size``, each once; a bool vector of ``size`` stands for its True entries."""
    given = _as_array(given)
    array = np.asarray(sorted(given) if isinstance(given, set | frozenset) else given)
    if array.ndim != 1:
        raise TypeError(f"{where} is {given!r:.40}, expected a list of indices")
    if array.dtype == np.bool_ and array.size == size:
        return np.flatnonzero(array)
    if not array.size:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{where} holds {array.dtype}, expected integer indices")
    if array.min() < 0 or array.max() >= size:
        wrong = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"{where} holds index {wrong}, expected 0 to {size - 1}")
    index, times = np.unique(array.astype(np.int64), return_counts=True)
    if (times > 1).any():
        raise ValueError(f"{where} holds index {index[times > 1][0]} more than once, expected each once")
    return index


def _named(source: Source) -> str:
    """Where a source came from, for a plan's metadata: a file's name, else "given"."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "given"


def _check_reduce(operation: str, reduce: str) -> None:
    if reduce not in get_args(Reduce):
        raise ValueError(f"{operation}: reduce is {reduce!r}, expected one of {_few(get_args(Reduce))}")


def _few(items: Iterable[Any]) -> str:
    listed = [str(item) for item in items]
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "") or "nothing"


def _load(operation: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file."""
    if not path.exists():
        raise FileNotFoundError(f"{operation}: no file {os.fspath(path)!r}")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{operation}: {os.fspath(path)!r} ends in {path.suffix!r}, expected .safetensors; "
            "examples/foreign_formats.py reads .pt, .npy, .npz, .csv, .json and .txt"
        )
    try:
        return read_tensors(path)[1]
    except ValueError as error:
        raise ValueError(f"{operation}: {os.fspath(path)!r} is not a safetensors file ({error})") from error
