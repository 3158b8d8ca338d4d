"""Attribution: labels, scores and lists made elsewhere."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_models import LABEL_FILE, needs_labels, random_scores, tiny, toy_layout
from safetensors.torch import save_file

from safefreeze_kernels.attribution import (
    LABELS,
    MaskBuilder,
    UnitLabels,
    UnitLayout,
    find_units,
    plan_from_neurons,
    plan_from_weights,
    read_labels,
    scores_from,
    scores_from_weights,
    units_from,
)
from safefreeze_kernels.attribution.units import unit_masks
from safefreeze_kernels.plan.mask import FreezeMask
from safefreeze_kernels.plan.plan import FreezePlan

LAYOUT = toy_layout()  # 2 layers of 4 heads on 2 KV heads, heads of 2, and 6 channels; hidden 8
HEADS = np.arange(8.0).reshape(2, 4)
CHANNELS = np.arange(12.0).reshape(2, 6)


pytestmark = pytest.mark.usefixtures("one_thread")  # models this small gain nothing from threads


class Code:
    """What only pickle can load."""


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def array_file(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


# --------------------------------------------------------------------------------------------------- labels


def some_labels() -> UnitLabels:
    return MaskBuilder(random_scores(LAYOUT), {"RU": 0.3, "SCU": 0.2, "UCU": 0.2}).labels


def as_table(labels: UnitLabels, names: bool) -> str:
    lines = ["layer,unit,kind,label"]
    for kind, codes in (("head", labels.heads), ("channel", labels.channels)):
        lines += [
            f"{layer},{unit},{kind},{LABELS[codes[layer, unit]] if names else int(codes[layer, unit])}"
            for layer, unit in np.ndindex(*codes.shape)
        ]
    return "\n".join(lines) + "\n"


def label_files(folder: Path, labels: UnitLabels) -> dict[str, Path]:
    """The same labels in every form that is read."""
    prototype = folder / "attribution"
    prototype.mkdir()
    saved(prototype / "atten_attr.pt", labels.heads.float())
    saved(prototype / "mlp_attr.pt", labels.channels.float())
    labels.save(folder / "labels.safetensors")
    both = {"attention_heads": labels.heads.float(), "mlp_channels": labels.channels.long()}
    return {
        "ours": folder / "labels.safetensors",
        "prototype's folder": prototype,
        "either of its files": prototype / "mlp_attr.pt",
        "one file of tensors": saved(folder / "labels.pt", both),
        "table of names": write(folder / "names.csv", as_table(labels, names=True)),
        "table of codes": write(folder / "codes.csv", as_table(labels, names=False)),
    }


def test_labels_are_the_same_from_every_file(tmp_path: Path) -> None:
    labels = some_labels()
    for form, path in label_files(tmp_path, labels).items():
        read = read_labels(path)
        assert torch.equal(read.heads, labels.heads) and torch.equal(read.channels, labels.channels), form
        assert read.heads.dtype == torch.uint8, form


def test_the_prototypes_labels_of_a_base_model_tell_redundant_units_from_the_rest(tmp_path: Path) -> None:
    """Its utility-only run saves bools, True = kept. As codes they would call all kept units safety-critical."""
    kept = torch.tensor([[True, False, True]])
    saved(tmp_path / "atten_attr.pt", kept)
    saved(tmp_path / "mlp_attr.pt", ~kept)
    labels = read_labels(tmp_path)
    assert labels.heads.tolist() == [[3, 0, 3]] and labels.channels.tolist() == [[0, 3, 0]]
    assert MaskBuilder(labels).train_only("RU").heads.tolist() == kept.tolist()


def test_label_files_are_checked(tmp_path: Path) -> None:
    files = label_files(tmp_path, some_labels())
    with pytest.raises(FileNotFoundError, match=r"read_labels: no file '.*none.pt'"):
        read_labels(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"no file '.*atten_attr.pt'"):
        read_labels(tmp_path)
    random_scores(LAYOUT).save(tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match=r"holds safety.* expected tensors attention_heads and mlp_channels"):
        read_labels(tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match="holds Tensor, expected tensors attention_heads"):
        read_labels(saved(tmp_path / "one.pt", torch.zeros(2, 4)))
    with pytest.raises(ValueError, match=r"ends in '.xlsx', expected .safetensors, .pt, .npy"):
        read_labels(write(tmp_path / "labels.xlsx", ""))
    for name in ("ours", "one file of tensors"):
        path = files[name]
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(
            ValueError, match=rf"{path.name}' is (not a safetensors|truncated or not a torch.save) file"
        ):
            read_labels(path)
    with pytest.raises(TypeError, match=r"heads has dtype torch.float32, expected integer codes"):
        read_labels(
            saved(tmp_path / "half.pt", {"attention_heads": torch.full((1, 1), 0.5), "mlp_channels": torch.ones(1, 1)})
        )
    with pytest.raises(TypeError, match="heads is a dict, expected a tensor of codes"):
        read_labels(saved(tmp_path / "dicts.pt", {"attention_heads": {0: [1]}, "mlp_channels": {0: [1]}}))
    with pytest.raises(ValueError, match="channels holds codes from 4 to 4"):
        read_labels(
            saved(tmp_path / "four.pt", {"attention_heads": torch.ones(1, 1), "mlp_channels": torch.full((1, 1), 4.0)})
        )


def test_label_tables_are_checked(tmp_path: Path) -> None:
    lines = as_table(some_labels(), names=True).splitlines()
    for change, complaint in (
        (lines[:3] + lines[4:], "head 2 of layer 0 is nowhere in the table"),
        ([*lines, lines[-1]], "channel 5 of layer 1 is more than once in the table"),
        ([*lines, "0,-1,head,RU"], r"heads of \(2, 4\) hold no layer and unit \(0, -1\)"),
        ([*lines, "0,0,neuron,RU"], "line 22 has kind 'neuron', expected head or channel"),
        ([*lines, "0,0,head,XU"], "line 22 is .*'XU'.*, expected numbers"),
        ([*lines, "0,x,head,RU"], "line 22 is .*, expected numbers"),
        ([line for line in lines if "head" not in line], "labels no heads, expected every unit"),
        (lines[:1], "has no lines, expected a header and a line per unit"),
        ([*lines, "999999999,0,head,RU"], "9 lines for 1000000000 x 4 heads, expected each unit once"),
        (["layer,unit,label", "0,0,RU"], "has columns layer, unit, label, expected layer, unit, kind and label"),
    ):
        with pytest.raises(ValueError, match=complaint):
            read_labels(write(tmp_path / "labels.csv", "\n".join(change)))


@needs_labels
def test_the_published_labels_survive_the_prototypes_format(tmp_path: Path) -> None:
    labels = read_labels(LABEL_FILE)
    saved(tmp_path / "atten_attr.pt", labels.heads.float())
    saved(tmp_path / "mlp_attr.pt", labels.channels.float())
    assert read_labels(tmp_path).counts() == labels.counts()


# -------------------------------------------------------------------------------------------- lists of units

# the same channels, (0, 3), (0, 5), (1, 0), in every form; of layer 1 alone in some
PAIRS = [[0, 3], [1, 0], [0, 5]]
FORMS: dict[str, Any] = {
    "lists by layer": {0: [5, 3], 1: [0]},
    "sets by layer": {0: {3, 5}, 1: {0}},
    "layers as text": {"0": (3, 5), "1": [0]},
    "a list of layers": [[3, 5], [0]],
    "tensors": [torch.tensor([5, 3], dtype=torch.int32), torch.tensor([0])],
    "arrays": {0: np.array([3, 5]), np.int64(1): np.array([0], np.uint8)},
    "bool vectors": [np.isin(np.arange(6), [3, 5]), torch.arange(6) == 0],
    "pairs": np.array(PAIRS),
    "a tensor of pairs": torch.tensor(PAIRS),
    "a bool array": np.array([[0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]], bool),
    "a bool tensor": torch.tensor([[0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]]) == 1,
    "named": {"channels": {0: [3, 5], 1: [0]}},
}
FILES: dict[str, Callable[[Path], Any]] = {
    "lists.json": lambda path: path.write_text('{"0": [3, 5], "1": [0]}'),
    "both.json": lambda path: path.write_text('{"heads": {"0": [1]}, "channels": {"0": [3, 5], "1": [0]}}'),
    "sets.txt": lambda path: path.write_text("{0: {3, 5}, 1: {0}}\n"),
    "twinbreak.pt": lambda path: torch.save([torch.tensor([3, 5], dtype=torch.int32), torch.tensor([0])], path),
    "pairs.npy": lambda path: array_file(path, np.array(PAIRS)),
    "both.npz": lambda path: np.savez(path, heads=np.array([[0, 1]]), channels=np.array(PAIRS)),
    "mask.safetensors": lambda path: save_file({"channels": FORMS["a bool tensor"].contiguous()}, path),
    "units.csv": lambda path: path.write_text("layer,unit\n0,3\n0,5\n1,0\n"),
    "kinds.csv": lambda path: path.write_text("Layer,Unit,Kind\n0,3,channel\n1,2,head\n0,5,channels\n1,0,channel\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_lists_of_units_in_every_form(form: str) -> None:
    selection = units_from(LAYOUT, channels=FORMS[form])
    assert np.argwhere(selection.channels).tolist() == [[0, 3], [0, 5], [1, 0]] and not selection.heads.any()
    plan = selection.build()
    assert plan["model.layers.0.mlp.up_proj.weight"] == FreezeMask((6, 8), rows=[3, 5])
    assert plan.metadata["selection"] == {"units_from": {"heads": None, "channels": "given"}}


@pytest.mark.parametrize("name", FILES)
def test_lists_of_units_in_every_file(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    selection = units_from(LAYOUT, channels=tmp_path / name)
    assert np.argwhere(selection.channels).tolist() == [[0, 3], [0, 5], [1, 0]] and not selection.heads.any()
    assert selection.build().metadata["selection"]["units_from"]["channels"] == str(tmp_path / name)


def test_heads_and_channels_come_from_one_file_or_two(tmp_path: Path) -> None:
    for name in ("kinds.csv", "both.npz", "both.json"):
        FILES[name](tmp_path / name)
        both = units_from(LAYOUT, heads=str(tmp_path / name), channels=tmp_path / name)
        assert both.heads.sum() == 1 and both.channels.sum() == 3
    # layers without units are None, as TwinBreak saves those it did not look at
    some = units_from(LAYOUT, heads=[None, [2]], channels={1: [4]})
    assert np.argwhere(some.heads).tolist() == [[1, 2]] and np.argwhere(some.channels).tolist() == [[1, 4]]


def test_lists_of_units_are_checked(tmp_path: Path) -> None:
    for given, complaint in (
        ({2: [0]}, "channels: layer is 2, expected 0 to 1"),
        ({-1: [0]}, "layer is -1"),
        ({"up": [0]}, "layer is 'up'"),
        ({True: [0]}, "layer is True"),
        ({0: [0], "0": [1]}, "layer 0 is given twice"),
        ({0: [6]}, "channels of layer 0 holds index 6, expected 0 to 5"),
        ({0: [-1]}, "channels of layer 0 holds index -1"),
        ({1: [2, 4, 2]}, "channels of layer 1 holds index 2 more than once"),
        ([[0]], "channels has 1 entries, expected one for each of 2 layers"),
        (np.array([[0, 1], [0, 1]]), "channels of layer 0 holds index 1 more than once"),
        (np.array([[0, 1], [2, 1]]), "layers of the pairs holds index 2, expected 0 to 1"),
        (np.array([[0, 6]]), "channels of layer 0 holds index 6"),
        (np.array([[0, 1, 2]]), r"has shape \(1, 3\), expected \[n, 2\] pairs"),
        (np.ones((2, 5), bool), r"bool of shape \(2, 5\), expected \(2, 6\)"),
        ({0: [], 1: []}, "heads and channels hold no units, expected at least one; was anything detected"),
        ({}, "heads and channels hold no units"),
        ([None, None], "heads and channels hold no units"),
        (np.empty((0, 2), np.int64), "heads and channels hold no units"),
    ):
        with pytest.raises(ValueError, match=complaint):
            units_from(LAYOUT, channels=given)
    for given, complaint in (
        ({0: [1.0]}, "channels of layer 0 holds float64, expected integer indices"),
        ({0: torch.tensor([1.0])}, "channels of layer 0 holds float64"),
        ({0: ["1"]}, "channels of layer 0 holds <U1"),
        ({0: 3}, "channels of layer 0 is 3, expected a list of indices"),
        (7, "channels is a int, expected a mapping or list of layers"),
    ):
        with pytest.raises(TypeError, match=complaint):
            units_from(LAYOUT, channels=given)
    with pytest.raises(ValueError, match="neither heads nor channels given"):
        units_from(LAYOUT)
    with pytest.raises(ValueError, match="has a score or label per unit; read it with scores_from or read_labels"):
        units_from(LAYOUT, channels=write(tmp_path / "scores.csv", "layer,unit,score\n0,1,0.5\n"))
    with pytest.raises(FileNotFoundError, match=r"units_from: no file 'none\.json'"):
        units_from(LAYOUT, channels="none.json")


# ------------------------------------------------------------------------------------------ scores per unit


def captum(rows: np.ndarray) -> list[torch.Tensor]:
    """Per layer ``[batch, tokens, features]`` whose mean over batch and tokens is ``rows``."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(len(rows), 3, 5, rows.shape[1], generator=draw, dtype=torch.float64)
    return list(noise - noise.mean((1, 2), keepdim=True) + torch.from_numpy(rows)[:, None, None])


def score_table(kind: str | None = None) -> str:
    scores = {"head": HEADS, "channel": CHANNELS}
    lines = ["layer,unit,score,kind"]
    for word in [kind] if kind else scores:
        lines += [f"{i},{j},{scores[word][i, j]},{word}" for i, j in np.ndindex(*scores[word].shape)]
    return "\n".join(lines)


def thu_keg(scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Change scores, neurons by rank, then mean and standard deviation under both models."""
    order = scores.flatten().argsort(descending=True)
    return (scores, torch.stack([order // 6, order % 6], 1), *(torch.randn(2, 6) for _ in range(4)))


@pytest.mark.parametrize(
    "form",
    {
        "array": lambda _: (HEADS, CHANNELS),
        "tensor": lambda _: (torch.from_numpy(HEADS).bfloat16(), torch.from_numpy(CHANNELS).half()),
        "lists": lambda _: (HEADS.tolist(), CHANNELS.tolist()),
        "layers": lambda _: ({1: HEADS[1], 0: HEADS[0]}, {"0": torch.from_numpy(CHANNELS[0]), 1: CHANNELS[1]}),
        "head features": lambda _: (torch.from_numpy(HEADS)[..., None] + torch.tensor([-0.5, 0.5]), CHANNELS),
        "captum": lambda _: (captum(HEADS), captum(CHANNELS)),
        "captum, features of heads": lambda _: (captum(HEADS.repeat(2, 1)), captum(CHANNELS)),
        "npy": lambda folder: (array_file(folder / "h.npy", HEADS), array_file(folder / "c.npy", CHANNELS)),
        "csv": lambda folder: (write(folder / "both.csv", score_table()),) * 2,
        "pt": lambda folder: (saved(folder / "h.pt", torch.from_numpy(HEADS)), torch.from_numpy(CHANNELS)),
        "thu-keg": lambda folder: (HEADS, saved(folder / "scores.pt", thu_keg(torch.from_numpy(CHANNELS)))),
    }.items(),
    ids=lambda form: form[0],
)  # fmt: skip
def test_scores_of_units_in_every_form(form: tuple[str, Callable[[Path], Any]], tmp_path: Path) -> None:
    heads, channels = form[1](tmp_path)
    ranking = scores_from(LAYOUT, heads=heads, channels=channels, method="theirs")
    assert ranking.heads is not None and ranking.channels is not None
    np.testing.assert_allclose(ranking.heads, HEADS, atol=1e-12)
    np.testing.assert_allclose(ranking.channels, CHANNELS, atol=1e-12)
    top = MaskBuilder(scores_from(LAYOUT, channels=channels, method="theirs")).top(3)
    assert np.argwhere(top.channels).tolist() == [[1, 3], [1, 4], [1, 5]] and not top.heads.any()
    assert top.build().metadata["method"] == "theirs"


def test_batch_time_and_features_are_reduced() -> None:
    layers = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for reduce, of in (("mean", np.mean), ("sum", np.sum), ("max", np.max)):
        ranking = scores_from(LAYOUT, heads=layers, reduce=reduce)  # type: ignore[arg-type]
        expected = [[of(layer[..., 2 * h : 2 * h + 2].double().numpy()) for h in range(4)] for layer in layers]
        np.testing.assert_allclose(ranking.heads, expected)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduce is 'median', expected one of mean, sum, max"):
        scores_from(LAYOUT, heads=layers, reduce="median")  # type: ignore[arg-type]


def test_scores_of_units_are_checked(tmp_path: Path) -> None:
    nan = CHANNELS.copy()
    nan[1, 2] = np.nan
    for given, complaint in (
        (CHANNELS[:1], r"channels has shape \(1, 6\), expected \(2, 6\)"),
        (CHANNELS.T, r"channels has shape \(6, 2\), expected \(2, 6\)"),
        (np.ones((2, 3, 5, 6)), "go as a list with one tensor per layer"),
        ([CHANNELS[0]], "channels has 1 entries, expected one for each of 2 layers"),
        ({1: CHANNELS[1]}, "channels has no scores of layers 0, expected all 2 layers"),
        ([CHANNELS[0], torch.ones(4, 5)], r"channels of layer 1 has shape \(4, 5\), expected \[…, 6\]"),
        ([CHANNELS[0], torch.ones(0, 6)], r"channels of layer 1 has shape \(0, 6\)"),
        ([CHANNELS[0], 3.0], r"channels of layer 1 has shape \(\)"),
        (nan, "channels holds nan at layer 1, unit 2, expected finite"),
        (
            write(tmp_path / "few.csv", "layer,unit,score\n0,1,0.5\n"),
            "1 lines for 2 x 6 channels, expected each unit once",
        ),
        (
            write(tmp_path / "one.csv", score_table("channel").rsplit("\n", 1)[0]),
            "channel 5 of layer 1 is nowhere in the table",
        ),
        (write(tmp_path / "name.csv", score_table("channel").replace("3.0", "SCU")), "could not convert .* 'SCU'"),
        (write(tmp_path / "no.csv", "layer,unit\n0,1\n"), "columns layer, unit, expected layer, score, unit"),
        (write(tmp_path / "out.csv", "layer,unit,score\n0,6,1\n"), r"hold no layer and unit \(0, 6\)"),
        (write(tmp_path / "nan.csv", score_table("channel").replace("3.0", "nan")), "holds nan at layer 0, unit 3"),
    ):
        with pytest.raises(ValueError, match=complaint):
            scores_from(LAYOUT, channels=given)
    with pytest.raises(ValueError, match=r"heads of layer 0 has shape \(3, 5\), expected \[…, 4 or 8\]"):
        scores_from(LAYOUT, heads=[torch.ones(3, 5)] * 2)
    for given, complaint in (
        (0.5, "channels is a float, expected a mapping or list"),
        (["many", "few"], "channels of layer 0 is a str, expected an array or tensor of scores"),
        ([CHANNELS[0], None], "channels has no scores of layers 1"),
        (np.full((2, 6), "high"), "channels holds <U4, expected numbers"),
    ):
        with pytest.raises((TypeError, ValueError), match=complaint):
            scores_from(LAYOUT, channels=given)
    with pytest.raises(ValueError, match="neither heads nor channels given"):
        scores_from(LAYOUT)
    # THU-KEG leaves out the last layer: say so, do not shift or pad
    with pytest.raises(ValueError, match=r"channels has shape \(1, 6\), expected \(2, 6\)"):
        scores_from(LAYOUT, channels=saved(tmp_path / "short.pt", thu_keg(torch.ones(1, 6))))


# --------------------------------------------------------------------------------------------- files alone


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A file that needs code names it and says what to do; nothing of it runs."""
    np.save(tmp_path / "objects.npy", np.array([Code()], object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", channels=np.array([Code()], object))
    numpy_inside = saved(tmp_path / "numpy.pt", [np.arange(3), np.arange(2)])
    for path, code in (
        (saved(tmp_path / "code.pt", {0: Code()}), r"test_sources\.Code"),
        (numpy_inside, r"numpy\..*_reconstruct"),
        (tmp_path / "objects.npy", "pickle"),
        (tmp_path / "objects.npz", "pickle"),
    ):
        for read in (units_from, scores_from):
            with pytest.raises(ValueError, match=rf"{path.name}' .*{code}.* which could run anything"):
                read(LAYOUT, channels=path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"read_labels: .*needs pickle code to load"):
        read_labels(saved(tmp_path / "atten_attr.pt", Code()))


def test_nothing_is_evaluated(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    code = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    for text in (code, f"{{0: [{code}]}}", "[" * 100_000, "{0: ", "", "\x00"):
        with pytest.raises(ValueError, match=r"units_from: .*expected a JSON value or a Python literal"):
            units_from(LAYOUT, channels=write(tmp_path / "code.txt", text))
        with pytest.raises(ValueError, match=r"plan_from_neurons: "):
            plan_from_neurons(LAYOUT, write(tmp_path / "code.txt", "\n".join([text] * 5)))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["a.pt", "a.npy", "a.npz", "a.safetensors", "a.json", "a.txt", "a.csv"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04junk", b"PK\x03\x04 cut", b"\xff\xfe\x00"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_broken_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (units_from, scores_from):
        with pytest.raises(ValueError, match=name):
            read(LAYOUT, channels=tmp_path / name)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["twinbreak.pt", "old.pt", "both.npz", "pairs.npy", "mask.safetensors", "lists.json"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_load_or_are_refused(name: str, tmp_path: Path) -> None:
    if name == "old.pt":
        torch.save(FORMS["tensors"], tmp_path / name, _use_new_zipfile_serialization=False)
    else:
        FILES[name](tmp_path / name)
    whole, draw = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in draw.integers(len(whole), size=3):
            damaged[place] = draw.integers(256)
        (tmp_path / name).write_bytes(damaged)
        with contextlib.suppress(ValueError, TypeError):
            refused += 1
            units_from(LAYOUT, channels=tmp_path / name)
            refused -= 1
    assert refused


# ---------------------------------------------------------------------------------------- scores per weight


def random_weights(layout: UnitLayout, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in layout.parameters.items()}


def by_hand(
    layout: UnitLayout, weights: Mapping[str, torch.Tensor], kind: str, layer: int, unit: int
) -> tuple[Any, Any]:
    """The unit's own weights and those of its KV head, found through the masks that would freeze it."""
    units = {"heads": np.zeros(layout.heads_shape, bool), "channels": np.zeros(layout.channels_shape, bool)}
    units[kind][layer, unit] = True
    whole = unit_masks(layout, units["heads"], units["channels"], "full", "any")
    own = unit_masks(layout, units["heads"], units["channels"], "full", "never")
    mine, shared = [], []
    for name, mask in whole.items():
        if name in weights:
            without_kv = own[name].dense() if name in own else torch.zeros(mask.shape, dtype=torch.bool)
            mine.append(weights[name][without_kv])
            shared.append(weights[name][mask.dense() & ~without_kv])
    return torch.cat(mine).double(), torch.cat(shared).double()


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3", "mixtral"])
def test_weights_reduce_to_the_units_they_belong_to(model_type: str, reduce: Any) -> None:
    layout = find_units(family_model(model_type))
    weights = random_weights(layout)
    ranking = scores_from_weights(layout, weights, reduce, method="wanda")
    assert ranking.heads is not None and ranking.channels is not None and ranking.method == "wanda"
    for kind, scores in (("heads", ranking.heads), ("channels", ranking.channels)):
        for layer in range(layout.n_layers):
            for unit in {0, 1, scores.shape[1] // 2, scores.shape[1] - 1}:
                mine, kv = by_hand(layout, weights, kind, layer, unit)
                size = len(mine) + len(kv) / layout.group_size
                total = float(mine.sum() + kv.sum() / layout.group_size)
                highest = float(torch.cat([mine, kv]).max())
                expected = {"sum": total, "mean": total / size, "max": highest}[reduce]
                assert scores[layer, unit] == pytest.approx(expected, abs=1e-4), f"{kind} {layer}, {unit}"
    one_by_one = scores_from_weights(layout, ((name, w.double()) for name, w in reversed(weights.items())), reduce)
    np.testing.assert_allclose(one_by_one.channels, ranking.channels, atol=1e-4)  # type: ignore[arg-type]


def family_model(model_type: str) -> torch.nn.Module:
    changes: dict[str, Any] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "num_key_value_heads": 4, "head_dim": 8},
        "gpt_neox": {"num_key_value_heads": 4, "head_dim": 8},
        "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
        "phi3": {"head_dim": 8},
    }.get(model_type, {})
    return tiny(model_type, **changes)


def test_a_part_of_the_matrices_scores_what_it_holds() -> None:
    """As Wanda's scores of the two readers alone: heads and channels. Of one of them: that kind alone."""
    weights = random_weights(LAYOUT)
    readers = {name: w for name, w in weights.items() if name.endswith(("o_proj.weight", "down_proj.weight"))}
    ranking = scores_from_weights(LAYOUT, readers, "max")
    down = torch.stack([readers[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(2)])
    np.testing.assert_array_equal(ranking.channels, down.double().amax(1))  # type: ignore[arg-type]
    alone = scores_from_weights(LAYOUT, {name: w for name, w in readers.items() if "mlp" in name})
    assert alone.heads is None and alone.channels is not None


def test_scores_of_weights_are_checked() -> None:
    weights = random_weights(LAYOUT)
    first = "model.layers.0.mlp.up_proj.weight"
    nan = weights[first].clone()
    nan[0, 0] = torch.nan
    for given, complaint in (
        ({}, "no scores given"),
        ({**weights, "lm_head.weight": torch.ones(3, 8)}, "'lm_head.weight' holds no units"),
        ([(first, weights[first])] * 2, f"'{first}' is given twice"),
        ({**weights, first: weights[first].T}, rf"'{first}' has shape \(8, 6\), expected \(6, 8\)"),
        ({**weights, first: nan}, f"'{first}' holds NaN or inf"),
        (
            {name: w for name, w in weights.items() if name != first},
            rf"channels of layers 0 and 1 are scored by different parameters \(missing: {first}\)",
        ),
    ):
        with pytest.raises(ValueError, match=complaint):
            scores_from_weights(LAYOUT, given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduce is 'min'"):
        scores_from_weights(LAYOUT, weights, "min")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- element masks


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_the_highest_weights_of_each_matrix_freeze_in_exact_numbers(share: float, tmp_path: Path) -> None:
    weights = {name: w.bfloat16() for name, w in random_weights(LAYOUT).items()}  # few values, many ties
    plan = plan_from_weights(weights, share)
    assert set(plan) == set(weights)
    for name, scores in weights.items():
        frozen, count = plan[name].dense(), int(share * scores.numel() + 0.5)
        assert frozen.sum() == count, name
        order = np.argsort(-scores.float().numpy().ravel(), kind="stable")[:count]
        assert np.array_equal(np.flatnonzero(frozen.numpy()), np.sort(order)), name
    plan.save(tmp_path / "plan.safetensors")
    assert FreezePlan.load(tmp_path / "plan.safetensors") == plan
    assert plan.metadata["selection"] == {"top_weights": share, "utility_share": None}


def test_set_difference_of_weights_by_hand() -> None:
    """Wei et al.: the top 3 of 6 for safety are entries 0, 1, 5, of them 5 is in the top 2 for utility (3, 5)."""
    safety, utility = torch.tensor([[9.0, 8, 1], [2, 3, 7]]), torch.tensor([[0.0, 1, 2], [8, 3, 9]])
    plan = plan_from_weights({"w": safety}, 0.5, utility={"w": utility}, utility_share=1 / 3)
    assert np.flatnonzero(plan["w"].dense().numpy()).tolist() == [0, 1]
    with pytest.raises(ValueError, match="no weight is left to freeze"):
        plan_from_weights({"w": safety}, 0.5, utility={"w": safety}, utility_share=0.5)


def test_finished_masks_are_taken_as_they_are() -> None:
    masks = {"w": torch.tensor([[True, False], [True, True]]), "empty": torch.zeros(3, dtype=torch.bool)}
    plan = plan_from_weights(masks)
    assert set(plan) == {"w"} and torch.equal(plan["w"].dense(), masks["w"])
    with pytest.raises(TypeError, match=r"'w' is torch.float32, expected bool masks where no share is given"):
        plan_from_weights({"w": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="no weight is left to freeze"):
        plan_from_weights({"empty": masks["empty"]})


def test_element_masks_refuse_bad_requests() -> None:
    scores = {"w": torch.arange(6.0).reshape(2, 3)}
    for bad in (0, 0.0, -0.1, 1.1, float("nan"), True, "half"):
        with pytest.raises(ValueError, match=r"share is .*, expected a fraction above 0, at most 1"):
            plan_from_weights(scores, bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"utility_share is .*, expected a fraction above 0, at most 1"):
            plan_from_weights(scores, 0.5, utility=scores, utility_share=bad)  # type: ignore[arg-type]
    for arguments, complaint in (
        (({}, 0.5), "no parameters given"),
        (({"w": torch.ones(2, 3)}, 0.5), "the weights scores of 'w' are all the same"),
        (({"w": torch.full((2, 3), torch.nan)}, 0.5), "'w' holds NaN or inf"),
    ):
        with pytest.raises(ValueError, match=complaint):
            plan_from_weights(*arguments)
    for options, complaint in (
        ({"utility": scores}, "utility and utility_share go together"),
        ({"utility_share": 0.1}, "utility and utility_share go together"),
        ({"utility": {"v": scores["w"]}, "utility_share": 0.1}, "weights and utility differ in v, w"),
        ({"utility": {"w": scores["w"].T}, "utility_share": 0.1}, r"'w' has shape \(2, 3\) in weights and \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=complaint):
            plan_from_weights(scores, 0.5, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="utility given without share"):
        plan_from_weights(scores, utility=scores, utility_share=0.5)


# ------------------------------------------------------------------------------------- single rows, columns

# ffn_up, ffn_down, q, k, v, as the published detector prints them
NEURONS = [{0: {1, 4}, 1: set()}, {0: set(), 1: {0, 5}}, {0: {7}, 1: {0}}, {0: {3}, 1: set()}, {0: set(), 1: set()}]


def test_neurons_of_five_lines(tmp_path: Path) -> None:
    expected = FreezePlan({
        "model.layers.0.mlp.up_proj.weight": FreezeMask((6, 8), rows=[1, 4]),
        "model.layers.1.mlp.down_proj.weight": FreezeMask((8, 6), cols=[0, 5]),
        "model.layers.0.self_attn.q_proj.weight": FreezeMask((8, 8), rows=[7]),
        "model.layers.1.self_attn.q_proj.weight": FreezeMask((8, 8), rows=[0]),
        "model.layers.0.self_attn.k_proj.weight": FreezeMask((4, 8), rows=[3]),
    })  # fmt: skip
    path = write(tmp_path / "neurons.txt", "\n".join(map(str, NEURONS)) + "\n\n")
    assert plan_from_neurons(LAYOUT, path) == expected
    lists = [{str(layer): sorted(found) for layer, found in line.items()} for line in NEURONS]
    assert plan_from_neurons(LAYOUT, write(path, "\n".join(map(json.dumps, lists)))) == expected
    assert plan_from_neurons(LAYOUT, NEURONS) == expected
    assert plan_from_neurons(LAYOUT, path).metadata["selection"] == {"neurons_from": str(path)}


def test_a_bias_freezes_with_its_row() -> None:
    model = tiny("qwen2")  # biases in q, k and v
    plan = plan_from_neurons(find_units(model), NEURONS)
    plan.check(model)
    assert plan["model.layers.0.self_attn.k_proj.bias"].rows.tolist() == [3]
    assert "model.layers.0.mlp.up_proj.bias" not in plan


def test_neuron_files_are_checked(tmp_path: Path) -> None:
    for lines, complaint in (
        (NEURONS[:4], "got dict, dict, dict, dict, expected five mappings of layer to indices: ffn_up, ffn_down, q"),
        ([*NEURONS[:4], [1]], "got dict, dict, dict, dict, list, expected five"),
        ([{}] * 5, "no neurons in any line, expected at least one; was anything detected"),
        ([{0: set()}] * 5, "no neurons in any line"),
        ([{2: {0}}, {}, {}, {}, {}], "up_proj: layer is 2, expected 0 to 1"),
        ([{}, {0: {6}}, {}, {}, {}], r"'model.layers.0.mlp.down_proj.weight' holds index 6, expected 0 to 5"),
        # a KV head has fewer rows than the query heads that share it
        ([{}, {}, {}, {0: {4}}, {}], r"'model.layers.0.self_attn.k_proj.weight' holds index 4, expected 0 to 3"),
        ([{0: [1, 1]}, {}, {}, {}, {}], "up_proj.weight' holds index 1 more than once"),
    ):
        with pytest.raises(ValueError, match=complaint):
            plan_from_neurons(LAYOUT, lines)
        if all(isinstance(line, dict) for line in lines):
            with pytest.raises(ValueError, match=complaint):
                plan_from_neurons(LAYOUT, write(tmp_path / "neurons.txt", "\n".join(map(str, lines))))
    with pytest.raises(TypeError, match=r"up_proj.weight' holds float64, expected integer"):
        plan_from_neurons(LAYOUT, [{0: [0.5]}, {}, {}, {}, {}])
    with pytest.raises(ValueError, match="gpt2 has 0 matrices 'up_proj' per layer, expected one"):
        plan_from_neurons(find_units(family_model("gpt2")), NEURONS)
    with pytest.raises(FileNotFoundError, match=r"plan_from_neurons: no file 'none\.txt'"):
        plan_from_neurons(LAYOUT, "none.txt")
