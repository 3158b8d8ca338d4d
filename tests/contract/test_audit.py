"""Audits of checkpoints on disk: what is found, what is refused, and that it agrees with `snapshot` and with numpy."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from conftest import DTYPES, short
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import fails, run
from safetensors.torch import save_file
from torch import Tensor

import safefreeze_kernels as sf
from safefreeze_kernels import audit
from safefreeze_kernels.proof import checkpoint, comparison
from safefreeze_kernels.proof.audit import FrozenBytesChangedError, Statement, attest, check, compare

Weights = dict[str, Tensor]
PLAN: Final = sf.FreezePlan(
    {
        "a.rows": sf.FreezeMask((40, 12), rows=range(0, 40, 3)),
        "b.cols": sf.FreezeMask((9, 30), cols=range(1, 30, 4)),
        "c.both": sf.FreezeMask((16, 16), rows=[0, 5, 6], cols=[3, 15]),
        "d.bits": sf.FreezeMask(
            (7, 33), rows=[2], elements=torch.rand(7, 33, generator=torch.Generator().manual_seed(0)) < 0.2
        ),
        "f.one": sf.FreezeMask((21,), rows=[0, 20]),
    }
)
SHAPES: Final = {**{name: mask.shape for name, mask in PLAN.items()}, "e.free": (5, 4)}


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in sorted(SHAPES.items())}


def trained(before: Weights, plan: sf.FreezePlan = PLAN) -> Weights:
    """Live values moved by 0.25 exactly, as far as the dtype goes."""
    return {n: torch.where(plan[n].dense(), w, w + 0.25) if n in plan else w + 0.25 for n, w in before.items()}


def moved(name: str, *place: int) -> Weights:
    """Trained, and one frozen value changed."""
    after = trained(weights())
    after[name][place] += 1.0
    return after


def changed(report: audit.AuditReport) -> audit.TensorChanges:
    """The one tensor that has frozen bytes that changed."""
    (found,) = [t for t in report.tensors if t.frozen_changed]
    return found


def refused(words: str, *arguments: Any, error: type[Exception] = ValueError, **options: Any) -> None:
    with pytest.raises(error, match=words):
        compare(*arguments, **options)


def save(folder: Path, tensors: Weights, shards: int = 1) -> Path:
    """As Hugging Face does."""
    folder.mkdir(parents=True)
    tensors = {name: t.clone() for name, t in tensors.items()}  # one tensor under two names is no file
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    home = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(home.values()):
        save_file({name: t for name, t in tensors.items() if home[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    before = weights()
    return save(tmp_path / "base", before), save(tmp_path / "tuned", trained(before))


# ----------------------------------------------------------------------------------------------------- comparing


@pytest.mark.parametrize("shards", [(1, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_training_that_froze(tmp_path: Path, dtype: torch.dtype, shards: tuple[int, int]) -> None:
    before = weights(dtype)
    after = trained(before)
    seen: list[int] = []
    base, tuned = save(tmp_path / "base", before, shards[0]), save(tmp_path / "tuned", after, shards[1])
    report = compare(base, tuned, PLAN, progress=seen.append)
    assert report.ok and report.plan == PLAN.fingerprint and not report.trouble and not report.notes
    assert [t.name for t in report.tensors] == (sorted(SHAPES) if shards[0] == 1 else [t.name for t in report.tensors])
    assert report.frozen == sum(mask.frozen_count for mask in PLAN.values())
    for found in report.tensors:
        mask = PLAN.get(found.name) or sf.FreezeMask(SHAPES[found.name])
        apart = (after[found.name].float() - before[found.name].float())[~mask.dense()].double()
        assert (found.frozen, found.live, found.frozen_changed) == (mask.frozen_count, mask.live_count, 0)
        assert found.live_changed == mask.live_count and found.strange == 0
        assert found.largest == apart.abs().max()
        # float32 sums of 16 terms or fewer, none negative
        assert found.mean == pytest.approx(apart.abs().mean().item(), rel=16 * 2**-24)
        assert found.rms == pytest.approx(apart.square().mean().sqrt().item(), rel=16 * 2**-24)
    data = sum(2 * t.numel() * t.element_size() for t in before.values())
    assert sum(seen) == data <= audit.total_bytes(base, tuned)
    assert "proven: no frozen byte differs" in str(report)


SABOTAGE: Final[dict[str, tuple[str, tuple[int, int], Any, Any]]] = {
    "a row": ("a.rows", (39, 11), 0.5, 0.75),
    "a column": ("b.cols", (8, 29), 0.5, 0.75),
    "a row of both": ("c.both", (6, 8), 0.5, 0.75),
    "a column of both": ("c.both", (15, 15), 0.5, 0.75),
    "the sign of zero": ("a.rows", (0, 0), 0.0, -0.0),
    "another NaN": ("a.rows", (3, 4), 0x7FC00000, 0x7FC00001),
    "one bit": ("a.rows", (36, 1), 0x3F800000, 0x3F800001),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_one_frozen_element_is_found(tmp_path: Path, what: str) -> None:
    name, (row, col), was, now = SABOTAGE[what]
    before = weights()
    after = trained(before)
    for tensors, value in ((before, was), (after, now)):
        if isinstance(value, int):
            tensors[name].view(torch.int32)[row, col] = value
        else:
            tensors[name][row, col] = value
    report = compare(save(tmp_path / "a", before), save(tmp_path / "b", after), PLAN)
    assert not report.ok
    found = changed(report)
    expected = [struct.pack(">i" if isinstance(v, int) else ">f", v).hex() for v in (was, now)]
    assert (found.name, found.frozen_changed, found.first_changed) == (name, 1, (row, col, *expected))
    for word in (name, f"row {row}, column {col}", f"0x{expected[0]} became 0x{expected[1]}", "NOT proven"):
        assert word in str(report)
    assert max(map(len, str(report).splitlines())) <= 80
    assert json.loads(json.dumps(report.to_json()))["ok"] is False


@pytest.mark.parametrize("size", [200, 40], ids=["one or two rows", "a third of a row"])
def test_single_frozen_elements_and_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Whatever block an element is in, the place told is its own."""
    monkeypatch.setattr(checkpoint, "BLOCK", size)
    before = weights()
    base = save(tmp_path / "base", before)
    for number, (row, col) in enumerate(PLAN["d.bits"].dense().nonzero().tolist()):
        after = trained(before)
        after["d.bits"][row, col] += 1.0
        report = compare(base, save(tmp_path / f"tuned {number}", after), PLAN)
        found = changed(report)
        assert found.first_changed is not None and found.first_changed[:2] == (row, col) and found.frozen_changed == 1


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_extension_counts_as_numpy_does(seed: int) -> None:
    if comparison._C is None:
        pytest.skip("no extension here")
    draw = np.random.default_rng(seed)
    dtype = list(checkpoint.DTYPES)[draw.integers(0, len(checkpoint.DTYPES))]
    width = checkpoint.DTYPES[dtype][0]
    n_rows, n_cols = draw.integers(1, 9), draw.integers(1, 2100 if draw.random() < 0.2 else 40)
    before = draw.integers(0, 256, (n_rows, n_cols * width), np.uint8)
    after = np.where(
        draw.random(before.shape) < draw.choice([0.0, 0.02, 0.6]), draw.integers(0, 256, before.shape), before
    )
    after = np.ascontiguousarray(after, np.uint8)
    if dtype == "F32" and draw.random() < 0.7:  # weights as they are, and a small change of some
        weights = draw.standard_normal((n_rows, n_cols)).astype(np.float32)
        changed = weights + np.float32(0.01) * (draw.random(weights.shape) < draw.choice([0.02, 0.6, 1.0]))
        before, after = weights.view(np.uint8), changed.astype(np.float32).view(np.uint8)
    rows, cols = ((draw.random(n) < 0.4).astype(np.uint8) for n in (n_rows, n_cols))
    bits = np.packbits(draw.random(n_rows * n_cols) < 0.3, bitorder="little")
    bits = np.concatenate([bits, np.zeros(8, np.uint8)])
    flags = rows, cols if draw.random() < 0.5 else None, bits if draw.random() < 0.5 else None
    *expected, largest_, total_, squares_ = comparison.compare_in_numpy(dtype, before, after, flags)
    best = comparison._C.isa()
    try:
        for isa in comparison._C.runnable_isas():
            comparison._C.choose_isa(isa)
            *counts, largest, total, squares = comparison.compare_in_cpp(dtype, before, after, flags)
            assert counts == expected and largest == largest_, isa
            # float32 sums of 16 terms or fewer, none negative; squares that float32 loses are below 1e-25 together
            assert total == pytest.approx(total_, rel=2**-20), isa
            assert squares == pytest.approx(squares_, rel=2**-20, abs=1e-25), isa
    finally:
        comparison._C.choose_isa(best)


def test_live_changes_that_are_no_numbers(tmp_path: Path) -> None:
    before = weights()
    after = {name: w.clone() for name, w in before.items()}
    after["e.free"][0, :3] = torch.tensor([float("nan"), float("inf"), 5.0])
    report = compare(save(tmp_path / "a", before), save(tmp_path / "b", after), PLAN)
    (found,) = [t for t in report.tensors if t.live_changed]
    assert report.ok and (found.live_changed, found.strange) == (3, 2)
    assert found.largest == abs(5.0 - float(before["e.free"][0, 2]))


def test_other_dtypes_shapes_and_names(tmp_path: Path) -> None:
    before = weights()
    after = trained(before)
    after["a.rows"] = after["a.rows"].bfloat16()
    report = compare(save(tmp_path / "a", before), save(tmp_path / "b", after), PLAN)
    assert not report.ok and "F32 to BF16; bytes cannot be compared across dtypes" in str(report)
    after = trained(before)
    after |= {"e.free": torch.zeros(6, 4), "new": torch.ones(3)}
    report = compare(save(tmp_path / "c", before), save(tmp_path / "d", after), PLAN)
    assert (
        report.ok
        and "new\n    is in tuned alone" in str(report)
        and "e.free\n    has shape (5, 4), then (6, 4)" in str(report)
    )
    after = trained(before) | {"e.free": after["e.free"][:5].bfloat16()}
    report = compare(tmp_path / "c", save(tmp_path / "g", after), PLAN)
    assert report.ok and report.to_json()["uncompared"].keys() == {"e.free"} and "from F32 to BF16" in str(report)
    assert str(report).endswith("proven: no frozen byte differs (1 tensor outside the plan: not compared)")
    integers = {**before, "steps": torch.arange(5)}
    more = {**integers, "steps": torch.arange(5) + 1}
    (found,) = [
        t
        for t in compare(save(tmp_path / "e", integers), save(tmp_path / "f", more), PLAN).tensors
        if t.name == "steps"
    ]
    assert (found.live_changed, found.strange, found.largest) == (5, 5, 0.0)


# ---------------------------------------------------------------------------------------------------- statements


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_the_digest_is_that_of_a_snapshot(tmp_path: Path, dtype: torch.dtype) -> None:
    before = weights(dtype)
    statement = attest(save(tmp_path / "a", before), save(tmp_path / "b", trained(before), 3), PLAN)
    assert statement.frozen == sf.snapshot(before, PLAN).digest
    assert statement.plan == PLAN.fingerprint and len(statement.tuned) == 3
    assert statement.frozen_elements == sum(mask.frozen_count for mask in PLAN.values())


def test_a_statement_stands_for_the_base(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    path = tmp_path / "statement.json"
    statement = attest(*pair, PLAN, path)
    assert Statement.load(path) == statement and path.stat().st_size < 2000
    again = check(pair[1], PLAN, statement)
    assert again.ok and not again.notes
    further = trained(weights())
    further["a.rows"][1] += 1.0
    found = check(save(tmp_path / "further", further), PLAN, statement)
    assert found.ok and "others than those attested" in str(found)
    further["a.rows"][0, 0] += 1.0
    found = check(save(tmp_path / "moved", further), PLAN, statement)
    assert "0 of" not in str(found)
    assert not found.ok and "not those attested" in str(found) and "NOT proven" in str(found)
    other = sf.FreezePlan({"a.rows": PLAN["a.rows"]})
    assert "the statement is of another plan" in str(check(pair[1], other, statement))


def test_nothing_is_attested_of_changed_bytes(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    with pytest.raises(FrozenBytesChangedError, match="nothing was attested") as caught:
        attest(pair[0], save(tmp_path / "moved", moved("f.one", 20)), PLAN, tmp_path / "statement.json")
    assert not caught.value.report.ok and not (tmp_path / "statement.json").exists()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "{", "null", '{"format": "safefreeze.statement", "version": 2}', "[" * 100_000,
     '{"format": "x", "version": 1}', '{"format": "safefreeze.statement", "version": 1, "plan": 3}'],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_damaged_statements(tmp_path: Path, content: str) -> None:
    (tmp_path / "statement.json").write_text(content)
    unreadable(tmp_path / "statement.json", r"Statement.load: .*statement.json")


def unreadable(path: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Statement.load(path)


def test_an_altered_statement_is_seen(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    path = tmp_path / "statement.json"
    attest(*pair, PLAN, path)
    content = json.loads(path.read_text())
    for change in ({"frozen_elements": 10**9}, {"base": {"x": "5"}}, {"package": ""}):
        path.write_text(json.dumps(content | change))
        unreadable(path, "does not match its checksum")


def test_a_huge_statement_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "statement.json"
    path.touch()
    os.truncate(path, 1 << 40)
    unreadable(path, r"has 1,099,511,627,776 bytes")


# ------------------------------------------------------------------------------------------------------- bad input


def _header(entries: dict[str, Any], data: int = 64, size: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(data)


def _entry(shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


DAMAGED: Final[dict[str, bytes]] = {
    "empty": b"",
    "short": b"\x05\0\0",
    "no JSON": struct.pack("<Q", 8) + b"notjson!",
    "a header longer than the file": _header({"a": _entry([4, 4], 0, 64)}, size=1 << 40),
    "offsets beyond the file": _header({"a": _entry([4, 8], 0, 128)}),
    "overlapping": _header({"a": _entry([4, 2], 0, 32), "b": _entry([4, 2], 16, 48)}),
    "a shape that offsets contradict": _header({"a": _entry([4, 4], 0, 32), "b": _entry([4, 2], 32, 64)}),
    "backwards": _header({"a": _entry([4, 4], 64, 0)}),
    "a huge shape": _header({"a": _entry([1 << 40, 1 << 40], 0, 64)}),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files(tmp_path: Path, pair: tuple[Path, Path], what: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(DAMAGED[what])
    for arguments in ((path, pair[1]), (pair[0], path)):
        refused(r"bad.safetensors' is truncated or no safetensors file", *arguments, PLAN)


def test_a_truncated_checkpoint(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    whole = (pair[1] / "model.safetensors").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        refused("truncated", pair[0], tmp_path / "cut.safetensors", PLAN)


def test_what_does_not_fit(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    for name, mask, words in (
        ("x", sf.FreezeMask((3,), rows=[0]), "names 'x', which is not among the 6 tensors of base"),
        (
            "a.rows",
            sf.FreezeMask((4, 4), rows=[0]),
            r"'a.rows' of base has shape \(40, 12\), the plan expects \(4, 4\)",
        ),
        ("a.rows", sf.FreezeMask((40, 12)), "freezes nothing, so there is nothing to prove"),
    ):
        refused(words, *pair, sf.FreezePlan({name: mask}))
    refused("freezes nothing, so there is nothing to prove", *pair, sf.FreezePlan())
    refused("plan is a dict", *pair, {}, error=TypeError)
    nowhere = tmp_path / "nowhere"
    refused(r"base is .*nowhere', expected a .safetensors file", nowhere, pair[1], PLAN, error=FileNotFoundError)


MASK: Final = sf.FreezeMask((9, 6), rows=[1, 7])
TIED: Final = {"head": "embed"}
BEFORE: Final = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
AFTER: Final = torch.where(MASK.dense(), BEFORE, BEFORE + 0.25)
MOVED: Final = AFTER + (torch.arange(54).reshape(9, 6) == 44)  # row 7, column 2: a frozen one
OTHER: Final = torch.arange(54.0).reshape(9, 6)


def test_tied_weights(tmp_path: Path) -> None:
    """Checkpoints hold one of two names, and not always the same one; a plan may use either, or both."""
    base = save(tmp_path / "base", {"embed": BEFORE, "other": torch.ones(3)})
    tuned = save(tmp_path / "tuned", {"head": AFTER, "other": torch.ones(3)})
    for names in (["embed"], ["head"], ["head", "embed"]):
        plan = sf.FreezePlan(dict.fromkeys(names, MASK))
        refused(r"'(embed|head)', which is not among .*--tied NAME=OTHER", base, tuned, plan)
        for tied in ({"head": "embed"}, {"embed": "head"}):
            report = compare(base, tuned, plan, tied=tied)
            assert report.ok and report.frozen == 12 and report.plan == plan.fingerprint
            assert len(report.notes) == 1 and "are one weight: so it was said" in report.notes[0]
            assert [t.name for t in report.tensors if t.live_changed] == [min(names)]
            statement = attest(base, tuned, plan, tmp_path / "s.json", tied=tied)
            assert statement.frozen == sf.snapshot({"embed": BEFORE, "head": BEFORE}, plan).digest
            assert check(tuned, plan, statement, tied=tied).ok
    assert not compare(base, save(tmp_path / "moved", {"head": MOVED}), plan, tied=tied).ok
    refused("so base should hold one of them; it holds none", base, tuned, plan, tied={"haed": "embd"})
    refused(
        "'embed' and 'head' are tied, but the plan has two different masks",
        base,
        tuned,
        plan | sf.FreezePlan({"head": sf.FreezeMask((9, 6), rows=[2])}),
        tied=tied,
    )
    plan.save(tmp_path / "plan")
    given = base, tuned, tmp_path / "plan", "--tied", "head=embed"
    assert run("attest", *given, "-o", tmp_path / "s.json").exit_code == run("verify", *given).exit_code == 0
    assert run("verify", tmp_path / "s.json", *given[1:]).exit_code == 0
    for wrong in ("head", "=embed", "head="):
        fails(run("verify", *given[:3], "--tied", wrong), f"--tied is '{wrong}', expected NAME=OTHER")


# base; tuned; what a report says without being told that the names are tied, then being told; a word of either report
NAMES: Final[dict[str, tuple[Weights, Weights, bool, bool, str]]] = {
    "a copy in tuned": ({"embed": BEFORE}, {"embed": AFTER, "head": AFTER}, True, True, "another name"),
    "a drifted one in tuned": ({"embed": BEFORE}, {"embed": AFTER, "head": MOVED}, False, False, "'head' is in tuned"),
    "drifted under the plan's name": ({"embed": BEFORE}, {"embed": MOVED, "head": AFTER}, False, False, "row 7, col"),
    "trained apart in tuned": ({"embed": BEFORE}, {"embed": AFTER, "head": BEFORE}, False, True, "not equal in tuned"),
    "copies in both": ({"embed": BEFORE, "head": BEFORE}, {"embed": AFTER, "head": AFTER}, True, True, "another name"),
    "a copy that drifts": ({"embed": BEFORE, "head": BEFORE}, {"embed": AFTER, "head": MOVED}, False, False, "row 7"),
    "a copy in base": ({"embed": BEFORE, "head": BEFORE}, {"embed": AFTER}, True, True, "another name"),
    "another one in base": ({"embed": BEFORE, "head": MOVED}, {"embed": AFTER}, False, False, "'head' is in base"),
    "weights of their own": ({"embed": BEFORE, "head": OTHER}, {"embed": AFTER, "head": OTHER + 1}, True, False, "row"),
}  # fmt: skip


@pytest.mark.parametrize("what", NAMES)
def test_a_weight_is_compared_under_each_of_its_names(tmp_path: Path, what: str) -> None:
    """A loader may find a weight under a name that the plan does not know."""
    before, after, alone, told, word = NAMES[what]
    plan = sf.FreezePlan({"embed": MASK})
    base, tuned = save(tmp_path / "base", before), save(tmp_path / "tuned", after)
    untold, said = compare(base, tuned, plan), compare(base, tuned, plan, tied=TIED)
    assert (untold.ok, said.ok) == (alone, told)
    assert word in str(untold) + str(said)
    for report, tied in ((untold, None), (said, TIED)):
        compared = {t.name for t in report.tensors}
        assert compared | report.uncompared.keys() == {*before, *after} and not compared & report.uncompared.keys()
        assert json.loads(json.dumps(report.to_json()))["uncompared"] == report.uncompared
        if not report.ok:
            with pytest.raises(FrozenBytesChangedError, match="nothing was attested"):
                attest(base, tuned, plan, tied=tied)
            continue
        statement = attest(base, tuned, plan, tied=tied)
        assert statement.frozen == sf.snapshot({"embed": BEFORE}, plan).digest and statement.frozen_elements == 12
        assert check(tuned, plan, statement, tied=tied).ok


def test_what_looks_like_a_weight_of_the_plan(tmp_path: Path) -> None:
    """It is told, and said to be none where it is none: `untied`."""
    plan, file = sf.FreezePlan({"embed": MASK}), tmp_path / "plan"
    plan.save(file)
    base = save(tmp_path / "base", {"embed": BEFORE, "norm": torch.ones(6)})
    tuned = save(tmp_path / "tuned", {"embed": AFTER, "norm": torch.ones(6), "layers.1": OTHER, "bias": torch.ones(9)})
    report = compare(base, tuned, plan)
    assert not report.ok and len(report.trouble) == 1 and "'layers.1' is in tuned alone" in report.trouble[0]
    assert report.uncompared == {"bias": "is in tuned alone", "layers.1": "is in tuned alone"}
    fails(run("verify", base, tuned, file), "--tied NAME=OTHER", "--untied NAME", "NOT proven")
    fails(run("attest", base, tuned, file, "-o", tmp_path / "s"), "nothing was attested")
    report = compare(base, tuned, plan, untied=["layers.1"])
    assert (
        report.ok
        and "(2 tensors outside the plan: not compared)" in str(report)
        and "'layers.1' is no weight of the plan" in str(report)
    )
    assert run("attest", base, tuned, file, "-o", tmp_path / "s", "--untied", "layers.1").exit_code == 0
    done = run("verify", tmp_path / "s", tuned, file)
    assert done.exit_code == 0 and "(3 tensors outside the plan: not compared)" in done.output, (
        "what is attested need not be said again"
    )
    assert run("verify", base, tuned, file, "--untied", "layers.1").exit_code == 0
    for wrong, words in (
        ("layer.1", "which is not among the tensors of a checkpoint"),
        ("embed", "which the plan or tied"),
    ):
        fails(run("verify", base, tuned, file, "--untied", wrong), f"untied names '{wrong}', {words}")
    refused(r"untied is the text 'layers.1', expected a list", base, tuned, plan, untied="layers.1", error=TypeError)


def test_weights_that_are_still_one_constant_are_no_copies(tmp_path: Path) -> None:
    """Zeros are equal to zeros; that does not make two biases one."""
    zeros, plan = torch.zeros(9), sf.FreezePlan({"q.bias": sf.FreezeMask((9,), rows=[3])})
    base = save(tmp_path / "base", {"q.bias": zeros, "k.bias": zeros.clone()})
    report = compare(base, save(tmp_path / "tuned", {"q.bias": zeros, "k.bias": zeros + 1}), plan)
    assert report.ok and not report.notes and not report.uncompared
    report = compare(base, save(tmp_path / "more", {"q.bias": zeros, "k.bias": zeros, "v.bias": zeros}), plan)
    assert report.ok and {t.name for t in report.tensors} == {"q.bias", "k.bias", "v.bias"}


def test_a_weight_of_three_names(tmp_path: Path) -> None:
    plan, tied = sf.FreezePlan({"head": MASK}), {"head": "embed", "decoder": "embed"}
    base = save(tmp_path / "base", {"embed": BEFORE})
    tuned = save(tmp_path / "tuned", {"decoder": AFTER, "embed": AFTER})
    report = compare(base, tuned, plan, tied=tied)
    assert report.ok and [t.name for t in report.tensors] == ["head", "embed"]
    moved = compare(base, save(tmp_path / "moved", {"decoder": AFTER, "embed": MOVED}), plan, tied=tied)
    assert [t.name for t in moved.tensors if t.frozen_changed] == ["embed"]


def test_a_statement_knows_names(tmp_path: Path) -> None:
    """Without the base too, no name of a weight may hold other frozen bytes."""
    plan = sf.FreezePlan({"embed": MASK})
    base = save(tmp_path / "base", {"embed": BEFORE, "head": BEFORE, "up": OTHER})
    statement = attest(base, save(tmp_path / "tuned", {"embed": AFTER, "head": AFTER, "up": OTHER}), plan)
    assert statement.names == {"head": "embed", "up": ""}
    found = {
        "further": ({"embed": AFTER, "head": AFTER + MASK.dense().logical_not(), "up": OTHER + 1}, ""),
        "drifted": ({"embed": AFTER, "head": MOVED, "up": OTHER}, "row 7, column 2"),
        "another dtype": ({"embed": AFTER, "head": AFTER.bfloat16()}, "cannot be compared across dtypes"),
        "another shape": ({"embed": AFTER, "head": AFTER[:8].clone()}, "'head' is not known to the statement"),
        "a new name": ({"embed": AFTER, "model.embed": MOVED}, "'model.embed' is not known to the statement"),
        "a new copy": ({"embed": AFTER, "model.embed": AFTER}, ""),
        "fewer": ({"embed": AFTER}, ""),
    }
    for what, (held, word) in found.items():
        report = check(save(tmp_path / what, held), plan, statement)
        assert report.ok == (not word) and word in str(report), what
        assert not any(t.live_changed for t in report.tensors), "what is between two names is no training"
    both = save(tmp_path / "tied", {"embed": AFTER, "head": MOVED})
    assert not check(both, plan, attest(base, tmp_path / "fewer", plan, untied=["up"]), tied=TIED).ok


# ---------------------------------------------------------------------------------------------------------- reading


def _sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A file of zeros that takes no place on the disk."""
    entries, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        entries[name] = _entry(list(shape), at, at + size)
        at += size
    path.write_bytes(_header(entries, 0))
    os.truncate(path, path.stat().st_size + at)
    return path


def test_rows_of_any_length_take_no_more_memory(tmp_path: Path) -> None:
    """Blocks are cut inside of rows: a tensor may be a vector, or one row."""
    shapes: dict[str, tuple[int, ...]] = {"a": (1, 1 << 23), "b": (1 << 23,), "c": (2, 1 << 22)}
    files = [_sparse(tmp_path / f"{word}.safetensors", shapes) for word in ("base", "tuned")]
    masks = {
        "a": sf.FreezeMask(shapes["a"], cols=[5, 1 << 22]), "b": sf.FreezeMask(shapes["b"], rows=[0, 8_000_000]),
        "c": sf.FreezeMask(shapes["c"], rows=[1], cols=[7]),
    }  # fmt: skip
    plan = sf.FreezePlan(masks)
    tracemalloc.start()
    try:
        statement = attest(*files, plan)
        assert check(files[1], plan, statement).ok and compare(*files, plan).ok
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20, f"{peak >> 20} MB"
    start = files[1].stat().st_size - 3 * (4 << 23)
    for element, (name, row, col) in {
        1 << 22: ("a", 0, 1 << 22), (1 << 23) + 8_000_000: ("b", 8_000_000, 0), (5 << 22) + 9: ("c", 1, 9),
    }.items():  # fmt: skip
        with files[1].open("r+b") as file:
            file.seek(start + 4 * element)
            file.write(b"\1")
            file.flush()
            found = changed(compare(*files, plan))
            file.seek(start + 4 * element)
            file.write(b"\0")
        assert found.first_changed == (row, col, "00000000", "00000001") and found.name == name


def test_shapes_of_all_sizes(tmp_path: Path) -> None:
    empty = {
        "": torch.tensor(3.0),
        "no rows": torch.zeros(0, 5),
        "no columns": torch.zeros(5, 0),
        "4-D": OTHER.reshape(3, 3, 2, 3),
    }
    plan = sf.FreezePlan({"": sf.FreezeMask((), rows=[0]), "4-D": sf.FreezeMask((3, 3, 2, 3), rows=[17])})
    base = save(tmp_path / "base", empty)
    assert compare(base, base, plan).frozen == 4
    moved = {**empty, "": torch.tensor(4.0)}
    found = changed(compare(base, save(tmp_path / "tuned", moved), plan))
    assert found.name == "" and found.first_changed == (0, 0, "40400000", "40800000")
    entries = {"w": _entry([2, 2], 0, 16), "none": _entry([1 << 60, 0], 16, 16)}
    (tmp_path / "x.safetensors").write_bytes(_header(entries, 16))
    plan = sf.FreezePlan({"w": sf.FreezeMask((2, 2), rows=[0])})
    assert compare(tmp_path / "x.safetensors", tmp_path / "x.safetensors", plan).ok


LAYOUTS: Final[dict[str, tuple[int, int, Callable[[str], torch.dtype]]]] = {
    "one file": (1, 1, lambda _: torch.float32),
    "shards": (3, 3, lambda _: torch.float32),
    "other shards": (1, 3, lambda _: torch.float32),
    "mixed dtypes": (2, 2, lambda name: torch.float16 if name < "c" else torch.float32),
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_what_is_hashed_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """And what is attested are the files' own hashes, in whatever order their tensors are looked at."""
    shards, others, dtype = LAYOUTS[what]
    plan = sf.FreezePlan({name: mask for name, mask in PLAN.items() if name in ("a.rows", "b.cols", "f.one")})
    before = {name: w.to(dtype(name)) for name, w in weights().items()}
    base, tuned = save(tmp_path / "a", before, shards), save(tmp_path / "b", trained(before, plan), others)
    monkeypatch.setattr(checkpoint, "BLOCK", 100)
    read: list[int] = []
    real = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        got = real(descriptor, buffers, offset)
        read.append(got)
        return got

    monkeypatch.setattr(os, "preadv", counted)
    statement = attest(base, tuned, plan)
    once = audit.total_bytes(base, tuned)
    assert sum(read) == once if what != "mixed dtypes" else once < sum(read) < 2 * once
    for folder, told in ((base, statement.base), (tuned, statement.tuned)):
        assert told == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}
    assert statement.frozen == sf.snapshot(before, plan).digest
    read.clear()
    report = check(tuned, plan, statement)
    assert report.ok and not report.notes
    assert sum(read) == audit.total_bytes(tuned) or what == "mixed dtypes"


def test_folders_that_contradict_themselves(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """What is audited must be what is loaded."""
    folder = save(tmp_path / "sharded", weights(), 2)
    index = folder / "model.safetensors.index.json"
    right = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(right.values()))
    for homes, words in (
        ({**right, "a.rows": second if right["a.rows"] == first else first}, "the index places 'a.rows' in"),
        ({name: home for name, home in right.items() if name != "e.free"}, "the index places 'e.free' in None"),
        ({**right, "more": first}, "the index places 'more' in .*, it is in None"),
        ({"a": "../x"}, "outside its folder"),
        ({"a": 3}, "outside its folder"),
    ):
        index.write_text(json.dumps({"weight_map": homes}))
        refused(words, folder, pair[1], PLAN)
    for content in ("{", "[]", '{"weight_map": 3}', "[" * 100_000):
        index.write_text(content)
        refused(r"index.json' cannot be read", folder, pair[1], PLAN)
    index.write_text(json.dumps({"weight_map": {**right, "more": "missing.safetensors"}}))
    refused(r"names 'missing.safetensors', which is not there", folder, pair[1], PLAN, error=FileNotFoundError)
    index.write_text(json.dumps({"weight_map": right}))
    (folder / "model.safetensors").write_bytes((pair[0] / "model.safetensors").read_bytes())
    refused("of which loaders take one or the other", folder, pair[1], PLAN)
    (folder / "model.safetensors").unlink()
    (folder / second).write_bytes((folder / first).read_bytes())
    refused("is in two files", folder, pair[1], PLAN)


def test_a_file_that_changes_meanwhile(pair: tuple[Path, Path]) -> None:
    def write(_: int) -> None:
        os.utime(pair[1] / "model.safetensors", ns=(1, 1))

    refused("was written to meanwhile", *pair, PLAN, progress=write)


# ------------------------------------------------------------------------------------------------------ the commands


def test_commands(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    plan, statement, report = tmp_path / "plan.safetensors", tmp_path / "s.json", tmp_path / "report.json"
    PLAN.save(plan)
    done = run("verify", *pair, plan, "--json", report)
    assert done.exit_code == 0 and "proven: no frozen byte differs" in done.output, done.output
    assert json.loads(report.read_text())["ok"] is True
    done = run("attest", *pair, plan, "-o", statement)
    assert done.exit_code == 0 and "frozen elements are as they were" in done.output
    assert run("verify", statement, pair[1], plan).exit_code == 0
    for file, other in ((statement, "statement"), (pair[0] / "model.safetensors", "model.st")):
        named = tmp_path / other  # what is in a file decides, not its name
        named.write_bytes(file.read_bytes())
        assert run("verify", named, pair[1], plan).exit_code == 0
    folder = save(tmp_path / "moved", moved("c.both", 5, 5))
    for base in (pair[0], statement):
        done = run("verify", base, folder, plan)
        assert done.exit_code == 1 and "NOT proven" in done.output and "Traceback" not in done.output
        assert max(map(len, done.output.splitlines())) <= 80
    fails(run("attest", pair[0], folder, plan, "-o", tmp_path / "no.json"), "nothing was attested")
    fails(run("verify", tmp_path / "nowhere", pair[1], plan), "expected a .safetensors file")
    fails(run("verify", *pair, statement), "not a plan file")
    assert run("verify", *pair, statement).exit_code == 2
    for command in (("verify", *pair, plan, "--json"), ("attest", *pair, plan, "-o")):
        fails(run(*command, tmp_path / "no" / "x.json"), "no folder")


def test_it_needs_no_torch_and_little_memory(tmp_path: Path) -> None:
    """64 MB of weights, without torch, below 100 MB. (A process's own count of its peak begins with its parent's.)"""
    if not Path("/proc/self/status").exists():
        pytest.skip("nothing here tells the peak of a process")
    wide = {"w": torch.zeros(4096, 4096)}
    mask = sf.FreezeMask((4096, 4096), rows=range(0, 4096, 2))
    sf.FreezePlan({"w": mask}).save(tmp_path / "plan")
    base, tuned = save(tmp_path / "a", wide), save(tmp_path / "b", {"w": torch.where(mask.dense(), 0.0, 1.0)})
    code = (
        "import sys\n"
        "from safefreeze_kernels import FreezePlan, audit\n"
        "report = audit.compare(*sys.argv[1:3], FreezePlan.load(sys.argv[3]))\n"
        "assert report.ok and report.tensors[0].live_changed == 2048 * 4096\n"
        "assert 'torch' not in sys.modules\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    command = [sys.executable, "-c", code, base, tuned, tmp_path / "plan"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 << 10, f"{int(done.stdout) >> 10} MB"
