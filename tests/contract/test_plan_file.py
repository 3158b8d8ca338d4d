"""The plan file: round trips, damage, crashes in the middle of a save, full disks."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from safefreeze_kernels import FreezeMask, FreezePlan, PlanFileError
from safefreeze_kernels.plan import plan as plan_module

quickly = settings(
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example overwrites the last one's file
)


@st.composite
def masks(draw: st.DrawFn) -> FreezeMask:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    dense = torch.zeros(shape, dtype=torch.bool)
    size = dense.numel()
    if draw(st.booleans()):
        dense = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=torch.bool)
        dense = dense.reshape(shape)
    mask = FreezeMask(shape, elements=dense)
    n_rows, n_cols = mask.matrix_shape
    rows = [i for i in range(n_rows) if draw(st.booleans())] if draw(st.booleans()) else None
    cols = [i for i in range(n_cols) if draw(st.booleans())] if len(shape) > 1 and draw(st.booleans()) else None
    return mask | FreezeMask(shape, rows=rows, cols=cols)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
plans = st.builds(
    FreezePlan,
    st.dictionaries(st.text(max_size=8), masks(), max_size=4),
    st.dictionaries(st.text(max_size=5), json_values, max_size=3),
)


def a_plan() -> FreezePlan:
    """Small, with every coding: rows as indices, columns and elements as bits, and a mask of nothing."""
    return FreezePlan(
        {
            "up.weight": FreezeMask((300, 4), rows=[1, 299], cols=[2]),
            "down.weight": FreezeMask((4, 6), elements=torch.arange(24).reshape(4, 6) % 5 == 0),
            "bias": FreezeMask((3,)),
        },
        {"method": "by hand", "n": [1, 2.5, None]},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.safetensors"


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def assert_same(got: FreezePlan, expected: FreezePlan, what: str = "") -> None:
    assert got == expected, what
    assert dict(got) == dict(expected), what
    assert got.metadata == expected.metadata, what


# ---------------------------------------------------------------------------------------------------- round trips


@quickly
@given(plans)
def test_round_trip(path: Path, plan: FreezePlan) -> None:
    plan.save(path)
    assert_same(FreezePlan.load(path), plan)


def test_round_trip_under_odd_names(path: Path) -> None:
    names = ["", ":", "a", "a:rows", "a:rows:rows", "__metadata__", "a.b/c", "ключ", "\n\0", '"', "up [0]"]
    plan = FreezePlan({name: FreezeMask((4, 3), rows=[i % 4], cols=[i % 3]) for i, name in enumerate(names)})
    plan.save(path)
    assert_same(FreezePlan.load(path), plan)


def test_paths_may_be_text_and_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a_plan().save("plan of mine")
    assert_same(FreezePlan.load("plan of mine"), a_plan())
    assert files(tmp_path) == ["plan of mine"]


def test_a_file_of_version_1_stays_readable(path: Path) -> None:
    path.write_bytes(
        zlib.decompress(
            base64.b64decode(
                """
                eNp1kVFymzAURZNOFtAlqPqtxoOQkIB99MtmPE/oKTABwQCOm3r810V0uZWwO4njKV8P9O7h6t4/Xx7W50T3+x4XsLDAfk/LE33F
                aW4HT0vKKaM9zC9zmE87alqYd7QkYZwbGDHOW1GdGdlROxz95ojtc7NcV7DDHv2yKqI2TnHzXSoZURf1YbzV1kN3p5uG4/Vb6y3+
                /AwTScKIrM7n4Nm1/hmncWr9EpxrV+RZ7aB2hTCpFdZkCqWrBaThCFKTJxy0NWhlJrWQzvBUgXRcaWcztBE4TD1E1gwO3YT4Czdj
                Bz7mc83uElF4awZ7tf5GGvD2YtSvJjkj6SZjxB+6ropO6wbrl/nQB3VhuEkSDbU2yqCKRpwyteVWWVWkeaatszoteA1cu0QAhm0h
                hDThXjyR9MzecyxjWrFMu7yNGOg/uAq/W+Oi5TatGF0LH5ybcQmb24SF8NjHHst/Dd5w8g8YcY+RTFc3RmKV/wXwe4BmeSiRkMeH
                74/ffn99+gvmlNDM
                """
            )
        )
    )
    assert_same(FreezePlan.load(path), a_plan())


def test_the_file_is_a_safetensors_file_with_a_header_that_can_be_checked(path: Path) -> None:
    a_plan().save(path)
    header, tensors = parts(path)
    assert header["format"] == "safefreeze.plan"
    assert header["version"] == "1"
    assert header["fingerprint"] == a_plan().fingerprint
    assert header["checksum"] == checksum(header)
    assert json.loads(header["metadata"]) == a_plan().metadata
    assert set(json.loads(header["masks"])) == set(a_plan())
    assert set(tensors) == {"up.weight:rows", "up.weight:cols", "down.weight:elements"}


def square(size: int) -> tuple[int, int]:
    n_rows = next(n for n in range(int(size**0.5), 0, -1) if size % n == 0)
    return n_rows, size // n_rows


@pytest.mark.parametrize("part", ["rows", "cols", "elements"])
@pytest.mark.parametrize(
    ("size", "frozen"),
    [
        (100_000, [7]),
        (100_000, range(0, 100_000, 2)),
        (65_536, range(4_095)),
        (65_536, range(4_096)),
        (8, [0]),
        (16, [8]),
    ],
    ids=["one of many", "half", "just smaller as indices", "just as small as bits", "eight", "sixteen"],
)
def test_indices_or_bits_whichever_is_smaller(path: Path, part: str, size: int, frozen: Any) -> None:
    as_indices, as_bits = len(frozen) * (2 if size <= 2**16 else 4), size // 8
    shape = {"rows": (size, 2), "cols": (2, size), "elements": square(size)}[part]
    flags = torch.zeros(size, dtype=torch.bool)
    flags[list(frozen)] = True
    if part == "elements":  # scattered, so that they do not make up whole rows or columns
        flags = flags[torch.randperm(size, generator=torch.Generator().manual_seed(0))].reshape(shape)
    plan = FreezePlan({"w": FreezeMask(shape, **{part: flags})})
    FreezePlan({"w": FreezeMask(shape)}).save(path)
    header_size = path.stat().st_size
    plan.save(path)
    _, tensors = parts(path)
    assert list(tensors) == [f"w:{part}"]
    assert tensors[f"w:{part}"].nbytes == min(as_indices, as_bits)
    assert path.stat().st_size < header_size + min(as_indices, as_bits) + 150
    assert_same(FreezePlan.load(path), plan)


def test_metadata_is_kept_as_json_keeps_it(path: Path) -> None:
    metadata = {
        "text": 'ß\0"\\',
        "nested": {"list": [1, 2.5, -0.0, None, True]},
        "big": 2**70,
        "tuple": (1, 2),
        3: "key",
    }
    plan = FreezePlan({}, metadata)
    plan.save(path)
    assert FreezePlan.load(path).metadata == json.loads(json.dumps(metadata))
    assert str(FreezePlan.load(path).metadata["nested"]["list"][2]) == "-0.0"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes"], ids=repr)
def test_metadata_json_cannot_hold_is_refused_before_the_file_is_touched(path: Path, value: Any) -> None:
    a_plan().save(path)
    before = path.read_bytes()
    plan = a_plan()
    plan.metadata["value"] = value
    with pytest.raises((TypeError, ValueError), match="JSON"):
        plan.save(path)
    assert path.read_bytes() == before
    assert files(path.parent) == [path.name]


# --------------------------------------------------------------------------------------------------------- damage


def refused(path: Path, match: str) -> None:
    with pytest.raises(PlanFileError, match=match):
        FreezePlan.load(path)


def loads_the_same_or_fails(path: Path, what: str) -> None:
    """The one law of damaged files."""
    try:
        got = FreezePlan.load(path)
    except PlanFileError as error:
        assert str(path) in str(error), what
    except BaseException as error:  # a panic of a reader is no Exception
        pytest.fail(f"{what}: {type(error).__name__} instead of a PlanFileError: {error}")
    else:
        assert_same(got, a_plan(), f"{what}: loaded as another plan")


def damaged(path: Path, patterns: Iterator[int] | range | tuple[int, ...]) -> None:
    a_plan().save(path)
    good = path.read_bytes()
    for place in range(len(good)):
        for pattern in patterns:
            bad = bytearray(good)
            bad[place] ^= pattern
            path.write_bytes(bad)
            loads_the_same_or_fails(path, f"byte {place} {good[place]:#04x} -> {bad[place]:#04x}")


def test_a_flipped_bit_of_any_byte_is_seen(path: Path) -> None:
    damaged(path, (0x01, 0x20, 0x80))


@pytest.mark.slow
def test_every_changed_byte_is_seen(path: Path) -> None:
    damaged(path, range(1, 256))


def test_every_truncation_is_seen(path: Path) -> None:
    a_plan().save(path)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(PlanFileError):
            FreezePlan.load(path)
            pytest.fail(f"{length} of {len(good)} bytes were taken for a plan")


@pytest.mark.parametrize("tail", [b"\0", b"x" * 100])
def test_bytes_added_at_the_end_are_seen(path: Path, tail: bytes) -> None:
    a_plan().save(path)
    path.write_bytes(path.read_bytes() + tail)
    refused(path, "truncated or not a plan file")


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\0",
        b"\0" * 8,
        b"\xff" * 100,
        b"not a plan\n" * 50,
        b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2**62).to_bytes(8, "little") + b"{}",
        b"PK\x03\x04" + b"\0" * 60,
        np.random.default_rng(0).bytes(1000),
    ],
    ids=lambda junk: f"{junk[:10]!r}x{len(junk)}",
)
def test_junk_is_not_a_plan(path: Path, junk: bytes) -> None:
    path.write_bytes(junk)
    refused(path, r"FreezePlan\.load: .*not a plan file")


def test_a_plan_file_error_is_a_value_error_that_names_the_file(path: Path) -> None:
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match=path.name):
        FreezePlan.load(str(path))


def test_missing_files_and_directories(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"FreezePlan\.load: no file .*{path.name}"):
        FreezePlan.load(path)
    with pytest.raises(FileNotFoundError, match=r"FreezePlan\.load: no file"):
        FreezePlan.load(path.parent)


def test_weights_are_not_a_plan(path: Path) -> None:
    safetensors.torch.save_file({"up.weight": torch.zeros(2, 2)}, path)
    refused(path, r"format None, expected 'safefreeze\.plan': not a plan file")
    safetensors.torch.save_file({"up.weight": torch.zeros(2, 2)}, path, {"format": "pt"})
    refused(path, r"format 'pt', expected 'safefreeze\.plan': not a plan file")


# ------------------------------------------------------------------------------------------ files made up on purpose

Header = dict[str, str]
Tensors = dict[str, np.ndarray]


def parts(path: Path) -> tuple[Header, Tensors]:
    with safe_open(path, framework="np") as file:
        return dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def checksum(header: Header) -> str:
    fields = {key: value for key, value in header.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def make_up(
    path: Path, change: Callable[[dict[str, Any], Tensors, Header], Any], *, fingerprint: str | None = None
) -> None:
    """A file whose checksum is right: `a_plan` after ``change(masks, tensors, header)``."""
    a_plan().save(path)
    header, tensors = parts(path)
    entries = json.loads(header["masks"])
    changed = change(entries, tensors, header)
    header["masks"] = json.dumps(entries if changed is None else changed)
    if fingerprint is not None:
        header["fingerprint"] = fingerprint
    header["checksum"] = checksum(header)
    path.write_bytes(safetensors.numpy.save(tensors, header))


def test_a_later_version_says_upgrade(path: Path) -> None:
    make_up(path, lambda masks, tensors, header: header.update(version="2"))
    refused(path, "has version '2', this package reads 1: upgrade safefreeze-kernels")


def test_an_altered_header_fails_its_checksum(path: Path) -> None:
    a_plan().save(path)
    header, tensors = parts(path)
    for key in set(header) - {"format", "version"}:
        for value in (header[key] + " ", ""):
            path.write_bytes(safetensors.numpy.save(tensors, {**header, key: value}))
            refused(path, "altered: its header does not match its checksum")
        path.write_bytes(safetensors.numpy.save(tensors, {k: v for k, v in header.items() if k != key}))
        refused(path, "altered")


def test_altered_contents_fail_the_fingerprint(path: Path) -> None:
    changes = {
        "another row": lambda masks, tensors, header: tensors["up.weight:rows"].__setitem__(0, 2),
        "another element": lambda masks, tensors, header: tensors["down.weight:elements"].__setitem__(0, 2),
        "another name": lambda masks, tensors, header: masks.update(bia=masks.pop("bias")),
        "another shape": lambda masks, tensors, header: masks.update(bias={"shape": [4]}),
        "a mask more": lambda masks, tensors, header: masks.update(other={"shape": [4]}),
        "a mask less": lambda masks, tensors, header: masks.pop("bias") and None,
    }
    for what, change in changes.items():
        make_up(path, lambda *args, change=change: change(*args) and None)
        with pytest.raises(PlanFileError, match="altered: its contents do not match its fingerprint"):
            FreezePlan.load(path)
            pytest.fail(what)


def _rows(array: Any) -> Callable[[dict[str, Any], Tensors, Header], None]:
    return lambda masks, tensors, header: tensors.update({"up.weight:rows": np.asarray(array)})


def _elements(index: np.ndarray) -> Callable[[dict[str, Any], Tensors, Header], None]:
    def change(masks: dict[str, Any], tensors: Tensors, header: Header) -> None:
        masks["down.weight"]["elements"] = "index"
        tensors["down.weight:elements"] = index

    return change


def _entry(**fields: Any) -> Callable[[dict[str, Any], Tensors, Header], None]:
    def change(masks: dict[str, Any], tensors: Tensors, header: Header) -> None:
        masks["up.weight"] = {key: value for key, value in {**masks["up.weight"], **fields}.items() if value is not ...}

    return change


@pytest.mark.parametrize(
    "change",
    {
        "index out of range": _rows(np.array([1, 300], np.uint16)),
        "index twice": _rows(np.array([1, 1], np.uint16)),
        "index beyond int64": _rows(np.array([1, 2**64 - 1], np.uint64)),
        "signed indices": _rows(np.array([1, 299], np.int16)),
        "float indices": _rows(np.array([1, 299], np.float16)),
        "bool indices": _rows(np.array([True, False])),
        "indices in two dimensions": _rows(np.array([[1, 299]], np.uint16)),
        "scalar index": _rows(np.array(1, np.uint16)),
        "no tensor": lambda masks, tensors, header: tensors.pop("up.weight:rows") is None or None,
        "a tensor too many": lambda masks, tensors, header: tensors.update(extra=np.zeros(3, np.uint8)),
        "an entry less": _entry(rows=...),
        "bits too few": lambda masks, tensors, header: tensors.update({"down.weight:elements": np.zeros(2, np.uint8)}),
        "element out of range": _elements(np.array([1, 24], np.uint16)),
        "elements in two dimensions": _elements(np.array([[1, 2]], np.uint16)),
        "bits too many": lambda masks, tensors, header: tensors.update({"down.weight:elements": np.zeros(4, np.uint8)}),
        "unknown coding": _entry(rows="zip"),
        "coding of another type": _entry(rows={"index": 1}),
        "no shape": _entry(shape=...),
        "shape of text": _entry(shape="300, 4"),
        "fractional shape": _entry(shape=[300.5, 4]),
        "negative shape": _entry(shape=[-300, -4]),
        "infinite shape": _entry(shape=[float("inf"), 4]),
        "shape not a number": _entry(shape=[float("nan"), 4]),
        "nested shape": _entry(shape=[[300], 4]),
        "shape null": _entry(shape=None),
        "columns of a vector": _entry(shape=[1200]),
        "masks are a list": lambda masks, tensors, header: [1, 2],
        "masks are a number": lambda masks, tensors, header: 5,
        "an entry is null": lambda masks, tensors, header: {"up.weight": None},
        "metadata is no JSON": lambda masks, tensors, header: header.update(metadata="{"),
        "metadata is a list": lambda masks, tensors, header: header.update(metadata="[1]"),
        "metadata is NaN": lambda masks, tensors, header: header.update(metadata='{"a": NaN}'),
        "metadata is deep": lambda masks, tensors, header: header.update(metadata="[" * 100_000),
        "metadata is a long number": lambda masks, tensors, header: header.update(metadata="9" * 5000),
        "no metadata": lambda masks, tensors, header: header.pop("metadata") and None,
    }.items(),
    ids=lambda item: item[0],
)
def test_a_file_that_makes_no_sense_is_refused(path: Path, change: Any) -> None:
    make_up(path, change[1])
    refused(path, path.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_dtypes_numpy_does_not_know_are_refused(path: Path, dtype: torch.dtype) -> None:
    a_plan().save(path)
    header, tensors = parts(path)
    odd = {key: torch.from_numpy(array.astype(np.int64)) for key, array in tensors.items()}
    odd["up.weight:rows"] = odd["up.weight:rows"].to(dtype)
    path.write_bytes(safetensors.torch.save(odd, header))
    refused(path, path.name)


@pytest.mark.parametrize(
    ("shape", "part", "index"),
    [
        ([10**18, 4], "rows", [0, 10**18 - 1]),
        ([10**18, 4], "cols", [1]),
        ([4, 10**18], "cols", [10**18 - 1]),
        ([10**18, 1], "cols", [0]),
        ([10**18, 2], "cols", [0, 1]),
        ([1, 10**18], "rows", [0]),
        ([10**9, 10**9], "elements", [5]),
        ([2**40, 2**40], "elements", [5]),
        ([2**62, 2**62], "rows", [0]),
        ([10**400, 3], "cols", [0, 1, 2]),
        ([0, 10**18], "rows", []),
        ([10**18], "rows", [3]),
        ([10**18] * 20, "cols", [3]),
    ],
    ids=str,
)
def test_absurd_shapes_allocate_nothing(path: Path, shape: list[int], part: str, index: list[int]) -> None:
    try:  # with the right fingerprint where such a mask can be made
        mask = FreezeMask(shape, **{part: index}) if part != "elements" else FreezeMask(shape)
        fingerprint = FreezePlan({"w": mask}).fingerprint
    except (MemoryError, ValueError, OverflowError):
        fingerprint = a_plan().fingerprint

    def change(masks: dict[str, Any], tensors: Tensors, header: Header) -> dict[str, Any]:
        tensors.clear()
        tensors[f"w:{part}"] = np.array(index, np.uint64)
        return {"w": {"shape": shape, part: "index"}}

    make_up(path, change, fingerprint=fingerprint)
    tracemalloc.start()
    try:
        loaded = FreezePlan.load(path)
    except PlanFileError as error:
        assert path.name in str(error)
    else:
        assert loaded.fingerprint == fingerprint
        assert loaded["w"].shape == tuple(shape)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6, f"loading it took {peak / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------- failing saves


class _FailingWrites:
    """A file whose second half does not fit on the disk."""

    def __init__(self, file: Any, error: BaseException) -> None:
        self.file, self.error = file, error

    def __enter__(self) -> _FailingWrites:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        raise self.error


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error"), KeyboardInterrupt()],
    ids=["full", "broken", "interrupted"],
)
def test_a_save_that_fails_leaves_the_older_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    a_plan().save(path)
    before = path.read_bytes()
    other = FreezePlan({"other": FreezeMask((4,), rows=[1])})

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        if call == "write":
            real = os.fdopen
            patch.setattr(os, "fdopen", lambda *args, **kwargs: _FailingWrites(real(*args, **kwargs), error))
        else:
            for home in (os, Path):  # whichever of the two spellings is used
                if hasattr(home, call):
                    patch.setattr(home, call, fail)
        with pytest.raises(type(error)):
            other.save(path)
    assert path.read_bytes() == before
    assert files(path.parent) == [path.name], "a part of the new file was left"
    other.save(path)
    assert_same(FreezePlan.load(path), other)


def test_bytes_reach_the_disk_before_the_name_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_plan().save(path)
    older, calls = path.read_bytes(), []
    real_fsync = os.fsync

    def fsync(handle: int) -> None:
        calls.append(("fsync", os.fstat(handle).st_size, path.read_bytes() == older))
        real_fsync(handle)

    def recorded(real: Callable[..., Any]) -> Callable[..., Any]:
        def replace(source: Any, target: Any) -> Any:
            call = ("replace", Path(source).stat().st_size, path.read_bytes() == older)
            if calls[-1:] != [call]:  # Path.replace calls os.replace
                calls.append(call)
            return real(source, target)

        return replace

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", recorded(os.replace))
    monkeypatch.setattr(Path, "replace", recorded(Path.replace))
    FreezePlan({"other": FreezeMask((4,), rows=[1])}).save(path)
    size = path.stat().st_size
    assert calls[:2] == [("fsync", size, True), ("replace", size, True)]
    assert [name for name, *_ in calls[2:]] == (["fsync"] if hasattr(os, "O_DIRECTORY") else []), "of the directory"


def test_saving_where_nothing_can_be_written(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        a_plan().save(path.parent / "no such folder" / "plan.safetensors")
    path.write_text("a file")
    with pytest.raises(NotADirectoryError):
        a_plan().save(path / "plan.safetensors")
    folder = path.parent / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match="folder"):
        a_plan().save(folder)
    assert files(path.parent) == ["folder", path.name]
    assert files(folder) == []
    assert path.read_text() == "a file"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_saving_into_a_folder_without_permission(path: Path) -> None:
    a_plan().save(path)
    before = path.read_bytes()
    path.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            FreezePlan().save(path)
    finally:
        path.parent.chmod(0o700)
    assert path.read_bytes() == before
    assert files(path.parent) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o000, 0o666)])
def test_the_umask_is_respected(path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        a_plan().save(path)
        assert os.umask(umask) == umask, "saving changed the umask"
        assert path.stat().st_mode & 0o777 == mode
        a_plan().save(path)
        assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX systems")
def test_saving_does_not_touch_the_umask(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's: what another thread writes meanwhile would be open to everybody."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was set, if only for a moment"))
    a_plan().save(path)
    assert path.is_file()


# ------------------------------------------------------------------------------------------------ killed processes

_CRASHES = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import numpy as np
import torch
from safefreeze_kernels import FreezeMask, FreezePlan

folder, trials = sys.argv[1], int(sys.argv[2])
path = os.path.join(folder, "plan.safetensors")
rng = np.random.default_rng(0)
older, newer, third = (
    FreezePlan({"w": FreezeMask((700, 900), elements=torch.from_numpy(rng.random((700, 900)) < 0.5))}, {"age": age})
    for age in ("older", "newer", "third")
)
plans = {plan.fingerprint: plan for plan in (older, newer, third)}

def state():
    plan = FreezePlan.load(path)
    assert plans[plan.fingerprint].metadata == plan.metadata
    return plan.metadata["age"]

def clean():
    for name in os.listdir(folder):
        os.unlink(os.path.join(folder, name))

def in_a_child(action):
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child

def ending(child):
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

def dying(real, after):
    def call(*args, **kwargs):
        if after:
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    return call

result = {"at calls": {}, "at random": []}

# 1. killed just before or after a call of the operating system
for call in ("open", "fsync", "replace"):
    for after in (False, True):
        clean()
        older.save(path)
        def save():
            for home in (os, Path):  # whichever of the two spellings is used
                if home is os or call == "replace":
                    setattr(home, call, dying(getattr(home, call), after))
            newer.save(path)
        how = ending(in_a_child(save))
        result["at calls"][f"{'after' if after else 'before'} {call}"] = [how, state()]

# 2. killed at any moment of a loop of saves
begun = time.perf_counter()
newer.save(path)
duration = time.perf_counter() - begun
chance = random.Random(0)
for _ in range(trials):
    clean()
    older.save(path)
    ready, tell = os.pipe()
    def save():
        os.write(tell, b"!")
        while True:
            newer.save(path)
            third.save(path)
    child = in_a_child(save)
    os.read(ready, 1)
    time.sleep(chance.random() * 3 * duration)
    os.kill(child, signal.SIGKILL)
    how = ending(child)
    result["at random"].append([how, state()])
    os.close(ready), os.close(tell)

# 3. a file that may not grow: the error of a full disk, from the real system calls
clean()
older.save(path)
def save():
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) // 2,) * 2)
    try:
        newer.save(path)
    except OSError as error:
        os._exit(42)
result["limited"] = [ending(in_a_child(save)), state(), os.listdir(folder)]
print(json.dumps(result))
"""


def crashes(folder: Path, trials: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _CRASHES, str(folder), str(trials)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return crashes(tmp_path_factory.mktemp("crashes"), trials=30)


@needs_fork
def test_a_process_killed_at_a_system_call_leaves_the_older_file_or_the_newer(crashed: dict[str, Any]) -> None:
    assert crashed["at calls"] == {
        "before open": ["killed", "older"],
        "after open": ["killed", "older"],
        "before fsync": ["killed", "older"],
        "after fsync": ["killed", "older"],
        "before replace": ["killed", "older"],
        "after replace": ["killed", "newer"],
    }


def assert_whole(endings: list[list[str]], trials: int) -> None:
    # the file was loaded after each: a torn one would have ended the program with an error
    assert [how for how, _ in endings] == ["killed"] * trials
    assert {age for _, age in endings} <= {"older", "newer", "third"}


@needs_fork
def test_a_process_killed_at_any_moment_leaves_a_whole_file(crashed: dict[str, Any]) -> None:
    assert_whole(crashed["at random"], 30)


@pytest.mark.slow
@needs_fork
def test_a_process_killed_at_any_of_many_moments_leaves_a_whole_file(tmp_path: Path) -> None:
    endings = crashes(tmp_path, trials=1000)["at random"]
    assert_whole(endings, 1000)
    assert len({age for _, age in endings}) > 1, "no kill fell between two saves: the test tests nothing"


@needs_fork
def test_a_file_that_may_not_grow_leaves_the_older_one_and_nothing_else(crashed: dict[str, Any]) -> None:
    assert crashed["limited"] == [42, "older", ["plan.safetensors"]]


def crafted(path: Path, shape: list[int], part: str, coding: str, stored: np.ndarray) -> None:
    """A file with a right checksum and a wrong fingerprint: everything but the contents is as it should be."""
    header = {
        "format": "safefreeze.plan", "version": "1", "fingerprint": "0" * 64, "metadata": "{}",
        "masks": json.dumps({"w": {"shape": shape, part: coding}}),
    }  # fmt: skip
    header["checksum"] = plan_module._checksum(header)
    path.write_bytes(safetensors.numpy.save({f"w:{part}": stored}, header))


@pytest.mark.parametrize("shape", [[1 << 20, 1 << 12], [1 << 30], [1 << 40], [1 << 50, 1 << 50], [3, 1 << 62]])
@pytest.mark.parametrize("part", ["rows", "cols", "elements"])
def test_a_small_file_does_not_make_much_memory(path: Path, shape: list[int], part: str) -> None:
    """What a mask of 2**29 elements takes at most, whatever a crafted file claims; much less for rows and columns."""
    crafted(path, shape, part, "index", np.array([1], np.uint64))
    tracemalloc.start()
    try:
        with pytest.raises(PlanFileError):
            FreezePlan.load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20, f"{peak:,} bytes for a file of {path.stat().st_size}"


def test_elements_of_a_large_tensor_are_not_listed(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """So that a plan that was saved loads."""
    monkeypatch.setattr(plan_module, "_MOST_LISTED", 100)
    elements = torch.zeros(20, 20, dtype=torch.bool)
    elements[3, 4] = True
    plan = FreezePlan({"w": FreezeMask((20, 20), elements=elements)})
    plan.save(path)
    assert FreezePlan.load(path) == plan and FreezePlan.load(path).fingerprint == plan.fingerprint
