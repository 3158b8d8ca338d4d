"""Calibration data: texts to batches, and batches to what goes through a model at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

_IGNORE: Final = -100
_FILL: Final = {"labels": _IGNORE}  # of what is padded; everything else is filled with 0


@dataclass(frozen=True)
class Pass:
    """Rows of one calibration set that go through the model together. Tensors are on the CPU, padding is on the right.

    Args:
        inputs: what the model is called with.
        labels: int64 ``[rows, tokens]``, -100 = not a response token; None where the set has none.
        real: bool ``[rows, tokens]``, False = padding.
        where: which rows of which set these are, for messages.
        digests: hash of each row's content, whatever its padding.
    """

    inputs: dict[str, Any]
    labels: Tensor | None
    real: Tensor
    where: str
    digests: tuple[bytes, ...]

    def on(self, device: torch.device) -> dict[str, Any]:
        """The inputs, moved."""
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in self.inputs.items()}

    @property
    def response(self) -> Tensor:
        """Bool ``[rows, tokens]``: the response tokens."""
        assert self.labels is not None  # read_passes asks for them
        return (self.labels != _IGNORE) & self.real

    @property
    def predicting(self) -> Tensor:
        """Bool ``[rows, tokens]``: positions whose next token is a response token."""
        ahead = torch.zeros_like(self.real)
        ahead[:, :-1] = self.response[:, 1:]
        return ahead & self.real

    @property
    def deciding(self) -> Tensor:
        """Int64 ``[rows]``: the position that predicts a row's first response token.

        Raises:
            ValueError: a row without a response, or with nothing before it.
        """
        response = self.response
        first = response.int().argmax(1)
        for row in torch.nonzero(~response.any(1) | (first == 0)).flatten().tolist():
            lacks = "prompt before its response" if response[row].any() else "response token"
            raise ValueError(
                f"score_units: {self.where} has no {lacks} in row {row}, expected a prompt and a response in "
                "every row; labels are -100 except on response tokens"
            )
        return first - 1

    @property
    def targets(self) -> Tensor:
        """Int64: the response tokens that `predicting` positions predict, in the order of its True entries."""
        assert self.labels is not None
        return self.labels[:, 1:][self.predicting[:, :-1]].long()


def read_passes(
    batches: Iterable[Mapping[str, Tensor]], word: str, rows: int | None = None, labelled: bool = True
) -> Iterator[Pass]:
    """Check batches and move their padding to the right, where it changes nothing a causal model computes.

    Args:
        batches: as `score_units` takes them.
        word: the set's name, for messages.
        rows: regroup the set's rows, in their order, into passes of this many (the last may have fewer), so
            that nothing depends on how they were batched; None: a pass is a batch.
        labelled: whether labels are needed.

    Raises:
        TypeError: a single batch, or a batch that is not a mapping.
        ValueError: missing entries, shapes that do not agree, entries that cannot be regrouped.
    """
    waiting: list[_Row] = []
    first = 0
    for split, rest, where in _read_rows(batches, word, labelled):
        if rows is None:
            yield _join(split, rest, where)
            continue
        _refuse_rest(rest, where)
        waiting += split
        while len(waiting) >= rows:
            yield _join(waiting[:rows], {}, f"{word}, rows from {first}")
            waiting, first = waiting[rows:], first + rows
    if waiting:
        yield _join(waiting, {}, f"{word}, rows from {first}")


class Pool:
    """The rows of a set, to be put together in any number and order, as often as wanted.

    Args:
        batches, word, labelled: as in `read_passes`; read once.
        prompts: keep of each row the prompt and the first token of its response alone.

    Raises:
        TypeError, ValueError: as `read_passes`; no rows; with ``prompts``, a row without prompt or response.
    """

    def __init__(
        self, batches: Iterable[Mapping[str, Tensor]], word: str, *, labelled: bool = True, prompts: bool = False
    ) -> None:
        self._word, self._rows = word, list[_Row]()
        for split, rest, where in _read_rows(batches, word, labelled):
            _refuse_rest(rest, where)
            if prompts:
                ends = (_join(split, {}, where).deciding + 2).tolist()
                split = [
                    ({key: value[:end] for key, value in tokens.items()}, others)
                    for (tokens, others), end in zip(split, ends, strict=True)
                ]
            self._rows += split
        if not self._rows:
            raise ValueError(f"{word} holds no batches (an empty or used-up iterable), expected at least one")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(tokens["input_ids"]) for tokens, _ in self._rows)

    def take(self, chosen: Sequence[int]) -> Pass:
        """Those rows, in that order."""
        return _join([self._rows[i] for i in chosen], {}, f"{self._word}, rows {', '.join(map(str, chosen))}")


# A row of a batch: what has an entry per token, cut to the row's own tokens, and what has one entry per row.
_Row = tuple[dict[str, Tensor], dict[str, Tensor]]


def _read_rows(
    batches: Iterable[Mapping[str, Tensor]], word: str, labelled: bool
) -> Iterator[tuple[list[_Row], dict[str, Any], str]]:
    """The rows of each batch, what belongs to none of them, and which batch it is."""
    if isinstance(batches, Mapping):
        raise TypeError(f"score_units: {word} is one batch, expected an iterable of batches; pass [batch]")
    for number, batch in enumerate(batches):
        where = f"batch {number} of {word}"
        _check(batch, where, labelled)
        yield *_split(batch), where


def _refuse_rest(rest: Mapping[str, Any], where: str) -> None:
    if rest:
        raise ValueError(
            f"score_units: {where} has {', '.join(map(repr, rest))} besides tensors with an entry per row; this "
            "method regroups rows: leave them out"
        )


def _check(batch: Mapping[str, Tensor], where: str, labelled: bool) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"score_units: {where} is a {type(batch).__name__}, expected a mapping with input_ids and labels"
        )
    for key in ("input_ids", "labels") if labelled else ("input_ids",):
        if key not in batch:
            raise ValueError(
                f"score_units: {where} has no {key!r}, expected input_ids and labels (-100 = not a response token)"
            )
    shape = tuple(batch["input_ids"].shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"score_units: {where}: input_ids has shape {shape}, expected [batch, tokens]")
    for key in ("labels", "attention_mask"):
        value = batch.get(key)
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"score_units: {where}: {key} has shape {tuple(value.shape)} and input_ids {shape}, expected the same "
                "[batch, tokens]"
            )


def _split(batch: Mapping[str, Any]) -> tuple[list[_Row], dict[str, Any]]:
    """The rows of a batch, and what belongs to no row."""
    shape = batch["input_ids"].shape
    entries = {key: value.detach().cpu() for key, value in batch.items() if isinstance(value, Tensor)}
    per_token = {key: value for key, value in entries.items() if value.shape[:2] == shape}
    per_row = {key: value for key, value in entries.items() if key not in per_token and value.shape[:1] == shape[:1]}
    mask = per_token.get("attention_mask")
    rows: list[_Row] = []
    for i in range(shape[0]):
        own = slice(None)
        if mask is not None:
            real = mask[i].nonzero().flatten().tolist() or [0]
            own = slice(real[0], real[-1] + 1)
        rows.append(
            (
                {key: value[i, own] for key, value in per_token.items()},
                {key: value[i] for key, value in per_row.items()},
            )
        )
    return rows, {key: value for key, value in batch.items() if key not in per_token and key not in per_row}


def _join(rows: Sequence[_Row], rest: Mapping[str, Any], where: str) -> Pass:
    lengths = torch.tensor([len(tokens["input_ids"]) for tokens, _ in rows])
    width = int(lengths.max())
    real = torch.arange(width) < lengths[:, None]
    keys = [sorted(part) for part in rows[0]]
    for tokens, others in rows:
        if [sorted(tokens), sorted(others)] != keys:
            raise ValueError(
                f"score_units: {where}: some rows have {[*keys[0], *keys[1]]}, others "
                f"{[*sorted(tokens), *sorted(others)]}, expected the same entries in every batch"
            )

    entries: dict[str, Any] = {key: _padded((tokens[key] for tokens, _ in rows), _FILL.get(key, 0)) for key in keys[0]}
    entries |= {key: torch.stack([others[key] for _, others in rows]) for key in keys[1]}
    if "attention_mask" in entries:
        real &= entries["attention_mask"] != 0
    elif not real.all():
        entries["attention_mask"] = real.long()
    labels = entries.pop("labels", None)
    return Pass({**entries, **rest}, labels, real, where, tuple(map(_digest, rows)))


def _padded(rows: Iterable[Tensor], fill: int) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=fill)


def _digest(row: _Row) -> bytes:
    """Hash of a row's content. An attention mask counts only where it hides something inside the row."""
    digest = hashlib.sha256()
    tokens, others = row
    for key, value in sorted({**tokens, **others}.items()):
        if key == "attention_mask" and bool((value != 0).all()):
            continue
        exact = value if value.is_floating_point() else value.long()
        digest.update(f"{key} {exact.dtype} {tuple(exact.shape)}".encode())
        digest.update(exact.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


# --------------------------------------------------------------------------------------------------- texts


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
        ids, start, prompt = _encode_pair(tokenizer, *pair)
        if start < prompt // 2:
            raise ValueError(
                f"encode_pairs: pair {number} begins with {start} of the {prompt} tokens of its prompt alone, expected "
                "all but a few; does the tokenizer truncate at the left? Set its truncation_side to 'right', or drop "
                "the pair"
            )
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


def _encode_pair(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], int, int]:
    """Token ids of prompt and response, where the response starts, and how many tokens the prompt alone has."""
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
    return ids, start, len(before)


def _pad(encoded: Sequence[tuple[list[int], int]], pad: int) -> dict[str, Tensor]:
    ids = [torch.tensor(ids) for ids, _ in encoded]
    responses = [torch.tensor([_IGNORE] * start + ids[start:]) for ids, start in encoded]
    return {
        "input_ids": _padded(ids, pad),
        "attention_mask": _padded(map(torch.ones_like, ids), 0),
        "labels": _padded(responses, _IGNORE),
    }
