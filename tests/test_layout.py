"""The shape of the package: imports point down, the public names are there, and a missing extension is survived."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import safefreeze_kernels as sf

PACKAGE = Path(sf.__file__).parent
NAME = "safefreeze_kernels"

# Lower floors first; what shares a floor does not import each other. `_C` is the compiled extension.
FLOORS = (
    ("_C", "_version", "calibration", "plan"),
    ("model",),
    ("kernels", "attribution"),
    ("grads", "proof"),
    ("optim",),
    ("measure", "keeping"),
    ("integrations",),
    ("cli",),
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
ONLY = {"attribution": {"plan"}}  # of all that lies below


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def drawing() -> str:
    """The floors, the highest first, as `docs/architecture.md` shows them."""
    notes = {unit: f"{unit} (imports {', '.join(sorted(below))} only)" for unit, below in ONLY.items()}
    return "\n".join(" · ".join(notes.get(unit, unit) for unit in units) for units in reversed(FLOORS))


def unit_of(path: Path) -> str:
    """The part of the package a file belongs to: a module or a subpackage."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    """A file's module, without the package's name: "plan.mask"; of the package itself, its name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or NAME


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module of this package that is imported, line), late imports and those for the type checker too. The package's
    own names count as `NAME`; a module is written without it: "plan.mask"."""
    package = path.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == NAME:
                    yield alias.name.partition(".")[2] or NAME, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *(node.module.split(".") if node.module else [])]
            if module[:1] == [NAME]:
                for alias in node.names:
                    inner = [*module[1:], alias.name]
                    place = PACKAGE.joinpath(*inner)
                    known = place.is_dir() or place.with_suffix(".py").exists() or inner == ["_C"]
                    yield ".".join(inner if known else module[1:]) or NAME, node.lineno


def test_every_module_has_a_floor() -> None:
    units = {unit_of(path) for path in sources()} - {"__init__"}
    assert units <= set(FLOOR_OF), f"no floor for {sorted(units - set(FLOOR_OF))}"


def test_imports_point_down() -> None:
    """Late ones, and those for the type checker, too."""
    wrong = []
    for path in sources():
        unit, file = unit_of(path), path.relative_to(PACKAGE).as_posix()
        for module, line in imports(path):
            imported = module.partition(".")[0]
            below = FLOOR_OF.get(imported, len(FLOORS)) < FLOOR_OF.get(unit, len(FLOORS))
            if imported != unit and not (below and imported in ONLY.get(unit, {imported})):
                wrong.append(f"{file}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files() -> None:
    graph = {module_of(path): {module for module, _ in imports(path)} for path in sources()}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as circle:
        pytest.fail(" imports ".join(reversed(circle.args[1])))


def test_the_drawing_of_the_architecture_is_this_table() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert f"```text\n{drawing()}\n```" in page, f"docs/architecture.md must show\n{drawing()}"


def test_the_import_reader_sees_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above are worth what this reader finds."""
    package = tmp_path / NAME
    for file in ("plan/mask.py", "kernels/cpu.py", "kernels/gpu.py"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).touch()
    source = package / "kernels" / "gpu.py"
    source.write_text(
        "from .. import _C, __version__\n"
        "from ..plan.mask import FreezeMask\n"
        "from . import cpu\n"
        "import safefreeze_kernels.optim\n"
        "def late():\n    from ..proof.snapshot import snapshot\n"
        "import torch\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", package)
    assert sorted(imports(source), key=lambda found: found[1]) == [
        ("_C", 1), (NAME, 1), ("plan.mask", 2), ("kernels.cpu", 3), ("optim", 4), ("proof.snapshot", 6),
    ]  # fmt: skip
    assert module_of(source) == "kernels.gpu" and module_of(package / "plan" / "__init__.py") == "plan"


def test_the_extension_claims_no_safety_without_the_interpreter_lock() -> None:
    """It borrows references and has no critical sections: on a free-threaded Python it must turn the lock on."""
    assert "mod_gil" not in (PACKAGE.parent / "csrc" / "bindings.cpp").read_text(encoding="utf-8")


def test_no_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "helper", "misc", "common", "tools"}
    assert not [path for path in PACKAGE.rglob("*") if path.stem in drawers]


def test_the_package_itself_only_names_names() -> None:
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.If, ast.Assign, ast.AnnAssign)
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        named = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
        assert named or isinstance(node, allowed), ast.unparse(node)


PUBLIC = {
    "FreezeMask": ("shape", "frozen_fraction", "dense"),
    "FreezePlan": ("save", "load", "check", "summary", "fingerprint", "frozen_fraction", "items", "values", "__or__"),
    "MaskedAdamW": ("step", "set_freeze", "state_dict", "load_state_dict", "dense_state_dict"),
    "MaskedAdam": ("step", "set_freeze", "state_dict", "load_state_dict", "dense_state_dict"),
    "check": (),
    "guard": (),
    "zero_frozen_grads_": (),
    "clip_grad_norm_": (),
    "snapshot": (),
    "RefusalKeeper": ("look", "state_dict", "load_state_dict", "save_picture", "remove"),
    "RefusalWatch": ("look", "due", "save_picture"),
    "FrozenDriftError": (),
    "attribution": ("read_labels",),
    "score_units": (),
    "score_weights": (),
    "MaskBuilder": ("freeze",),
    "info": (),
    "integrations": ("transformers",),
    "profile_step": (),
    "live_gradients": (),
    "memory_plan": (),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name: str) -> None:
    assert name in sf.__all__
    assert not [attribute for attribute in PUBLIC[name] if not hasattr(getattr(sf, name), attribute)]


def test_no_module_hides_a_public_name() -> None:
    """Importing a submodule puts it into the package under its name: ``sf.guard`` was a module then."""
    assert not [name for name in PUBLIC if (PACKAGE / f"{name}.py").exists()]


def test_all_is_true_and_complete() -> None:
    assert len(set(sf.__all__)) == len(sf.__all__)
    assert not [name for name in sf.__all__ if not getattr(sf, name).__doc__], "they say nothing about themselves"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sf.no_such_name


def test_audit_is_found_where_users_import_it_and_needs_no_torch() -> None:
    code = "import sys\nfrom safefreeze_kernels import audit\nanswer = sorted(audit.__all__), 'torch' in sys.modules"
    names = [
        "AuditReport",
        "Statement",
        "TensorChanges",
        "attest",
        "check",
        "compare",
        "compare_adapter",
        "total_bytes",
    ]
    assert in_a_fresh_process(code) == [names, False]


# ----------------------------------------------------------------------------------------------- in a fresh process


def in_a_fresh_process(code: str) -> Any:
    """What ``code`` leaves in ``answer``."""
    program = f"import json\n{code}\nprint(json.dumps(answer))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_loads_only_what_training_needs() -> None:
    answer = in_a_fresh_process(
        """
import sys, torch
before = set(sys.modules)
import safefreeze_kernels as sf
first = {name.partition(".")[0] for name in set(sys.modules) - before}
names = sorted(name for name in sys.modules if name.startswith("safefreeze_kernels"))
assert not torch.cuda.is_initialized()
sf.MaskBuilder
answer = sorted(first), names, "safefreeze_kernels.attribution" in sys.modules
"""
    )
    loaded, own, attribution_on_demand = answer
    heavy = {"transformers", "matplotlib", "rich", "typer", "safetensors", "tqdm", "pandas", "triton", "accelerate"}
    assert not heavy & set(loaded)
    for late in ("attribution", "keeping", "integrations", "cli", "calibration"):
        assert f"{NAME}.{late}" not in own
    assert attribution_on_demand


WITHOUT_THE_EXTENSION = """
import sys, warnings
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "safefreeze_kernels._C":
            raise ImportError("blocked for this test", name=name)
sys.meta_path.insert(0, Blocked())
import torch
import safefreeze_kernels as sf
from safefreeze_kernels.kernels.backend import BackendUnavailableError

answer = {"import": True}
start = torch.arange(12.0).reshape(4, 3)
plan = sf.FreezePlan({"w": sf.FreezeMask((4, 3), rows=[1])})

def train(**arguments):
    w = torch.nn.Parameter(start.clone())
    optimizer = sf.MaskedAdamW([("w", w)], lr=0.1, freeze=plan, **arguments)
    for _ in range(3):
        w.grad = torch.ones_like(w)
        optimizer.step()
    return w.detach()

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    auto = train()
    train()
answer["warnings"] = [f"{w.category.__name__}: {w.message}" for w in caught]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    named = train(backend="reference")
    answer["named"] = len(caught)
answer["same"] = torch.equal(auto, named)
answer["moved"] = (auto != start).any(1).tolist()
try:
    train(backend="cpu")
    answer["cpu"] = "ran"
except BackendUnavailableError as error:
    answer["cpu"] = str(error)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    w = torch.nn.Parameter(start.clone())
    w.grad = torch.ones_like(w)
    answer["norm"] = sf.clip_grad_norm_({"w": w}, 1.0, plan).item()
    sf.snapshot({"w": w}, plan).verify({"w": w})
answer["info"] = sf.info().backends
answer["text"] = str(sf.info())
"""


def test_without_the_extension_everything_works_slowly_and_says_so() -> None:
    answer = in_a_fresh_process(WITHOUT_THE_EXTENSION)
    assert answer["same"]
    assert answer["moved"] == [True, False, True, True]
    assert answer["norm"] == pytest.approx(3.0)  # nine live ones
    assert len(answer["warnings"]) == 1, "once, not at every step"
    (warning,) = answer["warnings"]
    for word in ("RuntimeWarning", "reference", "slow", "blocked for this test", "compiler"):
        assert word in warning
    assert answer["named"] == 0, "asking for the slow one is no reason to warn"
    for said in (answer["cpu"], answer["info"]["cpu"]):
        assert "blocked for this test" in said
        assert "compiler" in said, "the remedy"
    assert "'cpu'" in answer["cpu"]
    assert answer["info"]["reference"].startswith("runs")
    assert answer["info"]["cpu"] in answer["text"]
