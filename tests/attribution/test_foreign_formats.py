"""Files of other projects, read by examples/foreign_formats.py: every form, and nothing that a file could run."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_models import (
    CHANNELS,
    FORMS,
    HEADS,
    LABEL_FILE,
    LISTED,
    NEURON_PLAN,
    NEURONS,
    PAIRS,
    needs_labels,
    random_scores,
    refused,
    some_labels,
    toy_layout,
)
from safetensors.torch import save_file

from safefreeze_kernels.attribution import LABELS, MaskBuilder, UnitLabels, read_labels

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import foreign_formats as foreign

pytestmark = pytest.mark.usefixtures("one_thread")  # models this small gain nothing from threads

LAYOUT = toy_layout()


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


def as_table(labels: UnitLabels, names: bool) -> str:
    lines = ["layer,unit,kind,label"]
    for kind, codes in (("head", labels.heads), ("channel", labels.channels)):
        for layer, unit in np.ndindex(*codes.shape):
            code = int(codes[layer, unit])
            lines.append(f"{layer},{unit},{kind},{LABELS[code] if names else code}")
    return "\n".join(lines) + "\n"


def as_prototype(folder: Path, labels: UnitLabels) -> Path:
    folder.mkdir(exist_ok=True)
    saved(folder / "atten_attr.pt", labels.heads.float())
    saved(folder / "mlp_attr.pt", labels.channels.float())
    return folder


def label_files(folder: Path, labels: UnitLabels) -> dict[str, Path]:
    """The same labels in every form that is read."""
    prototype = as_prototype(folder / "attribution", labels)
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
        read = foreign.labels(path)
        assert torch.equal(read.heads, labels.heads) and torch.equal(read.channels, labels.channels), form
        assert read.heads.dtype == torch.uint8, form


def test_the_prototypes_labels_of_a_base_model_tell_redundant_units_from_the_rest(tmp_path: Path) -> None:
    """Its utility-only run saves bools, True = kept. As codes they would call all kept units safety-critical."""
    kept = torch.tensor([[True, False, True]])
    saved(tmp_path / "atten_attr.pt", kept)
    saved(tmp_path / "mlp_attr.pt", ~kept)
    labels = foreign.labels(tmp_path)
    assert labels.heads.tolist() == [[3, 0, 3]] and labels.channels.tolist() == [[0, 3, 0]]
    assert MaskBuilder(labels).train_only("RU").heads.tolist() == kept.tolist()


def test_the_script_writes_labels_the_package_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, ours = some_labels(), tmp_path / "ours.safetensors"
    source = as_prototype(tmp_path / "attribution", labels)
    monkeypatch.setattr(sys, "argv", ["foreign_formats.py", str(source), str(ours)])
    runpy.run_path(foreign.__file__, run_name="__main__")
    assert read_labels(ours).counts() == labels.counts()


def test_label_files_are_checked(tmp_path: Path) -> None:
    files, half = label_files(tmp_path, some_labels()), torch.full((1, 1), 0.5)

    def pair(name: str, heads: Any, channels: Any) -> Callable[[], UnitLabels]:
        path = saved(tmp_path / name, {"attention_heads": heads, "mlp_channels": channels})
        return lambda: foreign.labels(path)

    refused(r"no file '.*none.pt'", lambda: foreign.labels(tmp_path / "none.pt"), FileNotFoundError)
    refused(r"no file '.*atten_attr.pt'", lambda: foreign.labels(tmp_path), FileNotFoundError)
    for name in ("ours", "one file of tensors"):
        files[name].write_bytes(files[name].read_bytes()[:-40])
    one, sheet = saved(tmp_path / "one.pt", torch.zeros(2, 4)), write(tmp_path / "labels.xlsx", "")
    refused("holds Tensor, expected tensors attention_heads", lambda: foreign.labels(one))
    refused(r"ends in '.xlsx', expected .safetensors, .pt, .npy", lambda: foreign.labels(sheet))
    refused("labels.safetensors' is not a safetensors file", lambda: foreign.labels(files["ours"]))
    refused("labels.pt' is truncated or not a torch.save", lambda: foreign.labels(files["one file of tensors"]))
    refused("channels holds codes from 4 to 4", pair("four.pt", torch.ones(1, 1), torch.full((1, 1), 4.0)))
    refused(r"heads has dtype torch.float32, expected int", pair("half.pt", half, torch.ones(1, 1)), TypeError)
    refused("heads is a dict, expected a tensor of codes", pair("dicts.pt", {0: [1]}, {0: [1]}), TypeError)


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
            foreign.labels(write(tmp_path / "labels.csv", "\n".join(change)))


@needs_labels
def test_the_published_labels_survive_the_prototypes_format(tmp_path: Path) -> None:
    labels = read_labels(LABEL_FILE)
    assert foreign.labels(as_prototype(tmp_path, labels)).counts() == labels.counts()


# -------------------------------------------------------------------------------------------- lists of units

FILES: dict[str, Callable[[Path], Any]] = {
    "lists.json": lambda path: path.write_text('{"0": [3, 5], "1": [0]}'),
    "both.json": lambda path: path.write_text('{"heads": {"0": [1]}, "channels": {"0": [3, 5], "1": [0]}}'),
    "sets.txt": lambda path: path.write_text("{0: {3, 5}, 1: {0}}\n"),
    "twinbreak.pt": lambda path: torch.save([torch.tensor([3, 5], dtype=torch.int32), torch.tensor([0])], path),
    "pairs.npy": lambda path: array_file(path, PAIRS),
    "both.npz": lambda path: np.savez(path, heads=np.array([[0, 1]]), channels=PAIRS),
    "mask.safetensors": lambda path: save_file({"channels": FORMS["a bool tensor"]}, path),
    "units.csv": lambda path: path.write_text("layer,unit\n0,3\n0,5\n1,0\n"),
    "kinds.csv": lambda path: path.write_text("Layer,Unit,Kind\n0,3,channel\n1,2,head\n0,5,channels\n1,0,channel\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_lists_of_units_in_every_file(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    selection = foreign.units(LAYOUT, channels=tmp_path / name)
    assert np.argwhere(selection.channels).tolist() == LISTED and not selection.heads.any()
    assert selection.build().metadata["selection"]["units_from"]["channels"] == str(tmp_path / name)


def test_heads_and_channels_come_from_one_file(tmp_path: Path) -> None:
    for name in ("kinds.csv", "both.npz", "both.json"):
        FILES[name](tmp_path / name)
        both = foreign.units(LAYOUT, heads=str(tmp_path / name), channels=tmp_path / name)
        assert both.heads.sum() == 1 and both.channels.sum() == 3


def test_files_of_lists_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "scores.csv", "layer,unit,score\n0,1,0.5\n")
    with pytest.raises(ValueError, match="has a score or label per unit; read it with scores or labels"):
        foreign.units(LAYOUT, channels=path)
    refused(r"no file 'none\.json'", lambda: foreign.units(LAYOUT, channels="none.json"), FileNotFoundError)


# ------------------------------------------------------------------------------------------ scores per unit


def score_table(kind: str | None = None) -> str:
    scores = {"head": HEADS, "channel": CHANNELS}
    lines = ["layer,unit,score,kind"]
    for word in [kind] if kind else scores:
        lines += [f"{i},{j},{scores[word][i, j]},{word}" for i, j in np.ndindex(*scores[word].shape)]
    return "\n".join(lines)


def thu_keg(scores: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Change scores, neurons by rank, then mean and standard deviation under both models."""
    change = torch.from_numpy(scores)
    order = change.flatten().argsort(descending=True)
    return (change, torch.stack([order // 6, order % 6], 1), *(torch.randn(2, 6) for _ in range(4)))


SCORE_FILES: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "npy": lambda folder: (array_file(folder / "h.npy", HEADS), array_file(folder / "c.npy", CHANNELS)),
    "csv": lambda folder: (write(folder / "both.csv", score_table()),) * 2,
    "pt": lambda folder: (saved(folder / "h.pt", torch.from_numpy(HEADS)), array_file(folder / "c.npy", CHANNELS)),
    "thu-keg": lambda folder: (array_file(folder / "h.npy", HEADS), saved(folder / "s.pt", thu_keg(CHANNELS))),
}


@pytest.mark.parametrize("form", SCORE_FILES)
def test_scores_of_units_in_every_file(form: str, tmp_path: Path) -> None:
    heads, channels = SCORE_FILES[form](tmp_path)
    ranking = foreign.scores(LAYOUT, heads=heads, channels=channels, method="theirs")
    np.testing.assert_array_equal(ranking.heads, HEADS)
    np.testing.assert_array_equal(ranking.channels, CHANNELS)
    top = MaskBuilder(foreign.scores(LAYOUT, channels=channels, method="theirs")).top(3)
    assert np.argwhere(top.channels).tolist() == [[1, 3], [1, 4], [1, 5]] and not top.heads.any()
    assert top.build().metadata["method"] == "theirs"


def test_score_files_are_checked(tmp_path: Path) -> None:
    table = score_table("channel")
    for name, content, complaint in (
        ("few.csv", "layer,unit,score\n0,1,0.5\n", "1 lines for 2 x 6 channels, expected each unit once"),
        ("one.csv", table.rsplit("\n", 1)[0], "channel 5 of layer 1 is nowhere in the table"),
        ("name.csv", table.replace("3.0", "SCU"), "could not convert .* 'SCU'"),
        ("no.csv", "layer,unit\n0,1\n", "columns layer, unit, expected layer, score, unit"),
        ("out.csv", "layer,unit,score\n0,6,1\n", r"hold no layer and unit \(0, 6\)"),
        ("nan.csv", table.replace("3.0", "nan"), "holds nan at layer 0, unit 3"),
    ):
        with pytest.raises(ValueError, match=complaint):
            foreign.scores(LAYOUT, channels=write(tmp_path / name, content))
    # THU-KEG leaves out the last layer: say so, do not shift or pad
    with pytest.raises(ValueError, match=r"channels has shape \(1, 6\), expected \(2, 6\)"):
        foreign.scores(LAYOUT, channels=saved(tmp_path / "short.pt", thu_keg(np.ones((1, 6)))))


# --------------------------------------------------------------------------------------------- files alone


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A file that needs code names it and says what to do; nothing of it runs."""
    np.save(tmp_path / "objects.npy", np.array([Code()], object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", channels=np.array([Code()], object))
    numpy_inside = saved(tmp_path / "numpy.pt", [np.arange(3), np.arange(2)])
    for path, code in (
        (saved(tmp_path / "code.pt", {0: Code()}), r"test_foreign_formats\.Code"),
        (numpy_inside, r"numpy\..*_reconstruct"),
        (tmp_path / "objects.npy", "pickle"),
        (tmp_path / "objects.npz", "pickle"),
    ):
        for read in (foreign.units, foreign.scores):
            with pytest.raises(ValueError, match=rf"{path.name}' .*{code}.* which could run anything"):
                read(LAYOUT, channels=path)
    refused(r"needs pickle code to load", lambda: foreign.labels(saved(tmp_path / "atten_attr.pt", Code())))


def test_nothing_is_evaluated(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    code = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    for text in (code, f"{{0: [{code}]}}", "[" * 100_000, "{0: ", "", "\x00"):
        with pytest.raises(ValueError, match=r"expected a JSON value or a Python literal"):
            foreign.units(LAYOUT, channels=write(tmp_path / "code.txt", text))
        with pytest.raises(ValueError, match=r"expected (a JSON value or a Python literal|five mappings)"):
            foreign.neurons(LAYOUT, write(tmp_path / "code.txt", "\n".join([text] * 5)))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["a.pt", "a.npy", "a.npz", "a.safetensors", "a.json", "a.txt", "a.csv"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04junk", b"PK\x03\x04 cut", b"\xff\xfe\x00"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_broken_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (foreign.units, foreign.scores):
        with pytest.raises(ValueError, match=name):
            read(LAYOUT, channels=tmp_path / name)


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
            foreign.units(LAYOUT, channels=tmp_path / name)
            refused -= 1
    assert refused


# ------------------------------------------------------------------------------------- single rows, columns


def test_neurons_of_five_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "neurons.txt", "\n".join(map(str, NEURONS)) + "\n\n")
    assert foreign.neurons(LAYOUT, path) == NEURON_PLAN
    assert foreign.neurons(LAYOUT, path).metadata == {
        "selection": {"neurons_from": str(path)}, "model_type": "llama",
    }  # fmt: skip
    lists = [{str(layer): sorted(found) for layer, found in line.items()} for line in NEURONS]
    assert foreign.neurons(LAYOUT, write(path, "\n".join(map(json.dumps, lists)))) == NEURON_PLAN
    for lines, complaint in (
        (NEURONS[:4], "got dict, dict, dict, dict, expected five mappings"),
        ([{0: set()}] * 5, "no neurons in any line"),
        ([{2: {0}}, {}, {}, {}, {}], "up_proj: layer is 2, expected 0 to 1"),
        ([{}, {}, {}, {0: {4}}, {}], r"k_proj.weight' holds index 4, expected 0 to 3"),
        ([{0: [1, 1]}, {}, {}, {}, {}], "up_proj.weight' holds index 1 more than once"),
    ):
        with pytest.raises(ValueError, match=complaint):
            foreign.neurons(LAYOUT, write(path, "\n".join(map(str, lines))))
    refused(r"no file 'none\.txt'", lambda: foreign.neurons(LAYOUT, "none.txt"), FileNotFoundError)


def test_scores_are_no_labels(tmp_path: Path) -> None:
    random_scores(LAYOUT).save(tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match=r"holds safety.* expected tensors attention_heads and mlp_channels"):
        foreign.labels(tmp_path / "scores.safetensors")
