"""How setup.py finds the CUDA compiler, what it asks of it, and what it says where there is none."""

from __future__ import annotations

import runpy
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools

SETUP = Path(__file__).parents[1] / "setup.py"
FAKE = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/../said"
case "$1" in
  --dryrun) echo "#$ TOP=$(dirname "$0")/.." >&2;;
  --list-gpu-arch) for arch in 80 86 89 90; do echo "compute_$arch"; done;;
esac
"""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, on a machine without nvcc."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    for name in ("SAFEFREEZE_CUDA", "SAFEFREEZE_CUDA_ARCHS", "SAFEFREEZE_SANITIZE", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: str(path) != "/usr/local/cuda/bin/nvcc" and is_file(path))
    monkeypatch.chdir(SETUP.parent)
    return runpy.run_path(str(SETUP))


@pytest.fixture
def toolkit(build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit, in its usual place, whose compiler notes what it is asked."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart_static.a").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(FAKE)
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(home))
    return home


def cuda_objects(build: dict[str, Any], folder: Path) -> list[str]:
    found: list[str] = build["BuildExtension"].cuda_objects(SimpleNamespace(build_temp=str(folder)))
    return found


def test_without_a_compiler_there_is_no_cuda_part(build: dict[str, Any], tmp_path: Path) -> None:
    assert build["find_nvcc"]() is None
    assert cuda_objects(build, tmp_path) == []


def test_asked_for_a_missing_compiler_is_an_error(
    build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEFREEZE_CUDA", "1")
    with pytest.raises(RuntimeError, match="SAFEFREEZE_CUDA=1, but nvcc was not found; set CUDA_HOME"):
        cuda_objects(build, tmp_path)


def test_it_can_be_left_out(build: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build["find_nvcc"]() == str(toolkit / "bin" / "nvcc")
    monkeypatch.setenv("SAFEFREEZE_CUDA", "0")
    assert build["find_nvcc"]() is None


def test_architectures(build: dict[str, Any], toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEFREEZE_CUDA_ARCHS", "86, 90")
    built, runtime = cuda_objects(build, tmp_path)
    assert built.endswith("cuda.o")
    assert Path(runtime).samefile(toolkit / "lib64" / "libcudart_static.a")
    said = next(line for line in (toolkit / "said").read_text().splitlines() if line.startswith("-c "))
    for code in ("compute_86,code=sm_86", "compute_90,code=sm_90", "compute_86,code=compute_86"):
        assert f"-gencode arch={code}" in said
    assert said.count("-gencode") == 3 and "-fmad=false" in said


def test_architectures_that_the_compiler_does_not_know(
    build: dict[str, Any], toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Those of later GPUs are left out, with a line; the rest is built."""
    assert cuda_objects(build, tmp_path)
    assert "does not know compute capability 100 120: left out" in capsys.readouterr().err
    said = next(line for line in (toolkit / "said").read_text().splitlines() if line.startswith("-c "))
    assert "sm_90" in said and "sm_100" not in said
    monkeypatch.setenv("SAFEFREEZE_CUDA_ARCHS", "100")
    assert cuda_objects(build, tmp_path) == []
    assert "knows none of the architectures 100; it knows compute_80" in capsys.readouterr().err


def test_a_compiler_that_fails_is_said_aloud(
    build: dict[str, Any], toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\nexit 2\n")
    assert cuda_objects(build, tmp_path) == []
    assert "the CUDA kernels were NOT built" in capsys.readouterr().err
    monkeypatch.setenv("SAFEFREEZE_CUDA", "1")
    with pytest.raises(Exception, match="exit status 2"):
        cuda_objects(build, tmp_path)


def test_a_toolkit_without_the_static_runtime(
    build: dict[str, Any], toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (toolkit / "lib64" / "libcudart_static.a").unlink()
    monkeypatch.setenv("SAFEFREEZE_CUDA", "1")
    with pytest.raises(RuntimeError, match=r"libcudart_static\.a was not found in .*install the CUDA runtime"):
        cuda_objects(build, tmp_path)


def test_sources_travel() -> None:
    assert "*.cu *.cuh" in (SETUP.parent / "MANIFEST.in").read_text()
