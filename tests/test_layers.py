"""The house of docs/design.md, held to by reading every import in the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CELLAR = {"config", "rundir", "errors", "atomic", "assets", "interrupts", "metrics", "stats", "checkpoint", "schedules"}
CELLAR |= {"adam", "dist"}
KERNELS = {"saelab_kernels"}
SAE, MODELS = KERNELS | CELLAR, KERNELS | CELLAR
ACTIVATIONS = CELLAR | {"models"}
TRAIN = CELLAR | KERNELS | {"sae", "models", "activations"}
INTERP = TRAIN
ALIGN = CELLAR | KERNELS | {"models", "activations"}  # makes models and knows no SAE
EVALS = TRAIN | {"train", "interp"}
FEATURES = EVALS | {"evals", "align"}  # align for its critics, who also judge explanations

#: room -> the rooms it may import
FLOORS = {
    **dict.fromkeys(CELLAR, CELLAR),
    "saelab_kernels": set(),
    "sae": SAE,
    "models": MODELS,
    "activations": ACTIVATIONS,
    "train": TRAIN,
    "interp": INTERP,
    "align": ALIGN,
    "evals": EVALS,
    "features": FEATURES,
    "cli": FEATURES | {"features", "align"},
    "__init__": FEATURES | {"features", "align"},
    "__main__": {"cli"},
}
THIRD_PARTY_OF_KERNELS = {"torch", "triton", "numpy"}
HEAVY = {"torch", "transformer_lens", "transformers", "datasets", "streamlit", "safetensors", "pyarrow", "scipy"}
SOURCES = sorted([*ROOT.glob("saelab/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("apps/**/*.py")])


def imported(path: Path, *, only_at_import_time: bool = False) -> set[str]:
    """Full names of the modules that a file imports; with ``only_at_import_time`` not those inside functions."""
    tree = ast.parse(path.read_text("utf-8"))
    names = set()
    for node in _statements(tree) if only_at_import_time else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _statements(tree: ast.Module) -> list[ast.stmt]:
    """Module-level statements, those under ``if`` and ``try`` included, but not ``if TYPE_CHECKING``."""
    found: list[ast.stmt] = []
    stack: list[ast.stmt] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        found.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            stack += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


def room(module: str) -> str | None:
    """The room of one of our modules: saelab.sae.io -> sae."""
    parts = module.split(".")
    if parts[0] in ("saelab_kernels", "saelab_explorer"):
        return parts[0]
    if parts[0] != "saelab":
        return None
    return parts[1] if len(parts) > 1 else "__init__"


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1]


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if room_of(p) != "saelab_explorer"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_go_downwards_only(path: Path):
    """The explorer, which imports public names only, is held to that in tests/apps."""
    here = room_of(path)
    ours = {room(name) for name in imported(path)} - {None, here}
    # "from saelab import rundir" names both the package and the module: the package itself imports nothing heavy.
    # "from saelab import load_sae" names no room, and so may not be written below the front door.
    ours -= {"__init__"}
    assert ours <= FLOORS[here], f"{path} in {here} may not import {sorted(ours - FLOORS[here])}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_need_torch_triton_and_numpy_only(path: Path):
    import sys

    outside = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names - {"saelab_kernels"}
    assert outside <= THIRD_PARTY_OF_KERNELS, f"{path} imports {sorted(outside - THIRD_PARTY_OF_KERNELS)}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("saelab/cli/*.py")), ids=lambda p: p.name)
def test_the_command_line_imports_nothing_heavy_before_a_verb_runs(path: Path):
    names = imported(path, only_at_import_time=True)
    assert not {name.split(".")[0] for name in names} & HEAVY
    assert {room(name) for name in names} - {None} <= {
        "cli",
        "errors",
        "__init__",
        "atomic",
        "rundir",
        "config",
        "metrics",
    }


def test_shelves_are_not_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "apps" / "__init__.py").exists()


def test_every_module_says_what_it_is():
    silent = [str(p.relative_to(ROOT)) for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text("utf-8")))]
    assert not silent


def test_nothing_reads_or_writes_pickle():
    for path in SOURCES:
        tree = ast.parse(path.read_text("utf-8"))
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        if path == ROOT / "saelab" / "sae" / "formats" / "pt.py":  # other tools' files, read without their code
            loads = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
            assert all("weights_only=True" in ast.unparse(load) for load in loads)
            calls -= {"torch.load", "torch.save"}
        assert not calls & {"torch.load", "torch.save", "pickle.load", "pickle.dump", "pickle.loads", "eval"}, path
        assert not imported(path) & {"pickle", "dill", "joblib", "cloudpickle"}, path
