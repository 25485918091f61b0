"""The layer table of CONTRIBUTING.md, enforced on the syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "marlin_gen"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The modules that may import a library at all; everything else is told to ask them.
ONLY = {
    "jinja2": {"render"},
    "optuna": {"search"},
    "matplotlib": {"report"},
    "typer": {"cli"},
    "rich": {"cli"},
    "ninja": {"compile"},
    "gguf": {"checkpoints"},
    "transformers": {"hf"},
    "tokenizers": {"hf"},
    "safetensors": {"convert"},
}
# Not in the table: the package front, which names public things of every layer, and the standalone compiler command.
OUTSIDE = {"__init__", "__main__", "nvrtc_compile"}


def layer_table() -> dict[str, int]:
    """Module -> layer, read from the table in CONTRIBUTING.md."""
    layers = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        row = re.match(r"\| (\d+) \| ([^|]+) \|", line)
        if row:
            layers.update({name.split("/")[0]: int(row[1]) for name in re.findall(r"`([\w/*]+)`", row[2])})
    return layers


LAYERS = layer_table()
NO_TORCH = {name for name, layer in LAYERS.items() if layer in (0, 1, 2, 4, 5, 6)}  # pure, or only text and files


def module_name(path: Path) -> str:
    """``marlin_gen/families/mma.py`` -> families; ``marlin_gen/env.py`` -> env."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(full dotted name, whether at module level) of every import, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node in tree.body) for alias in node.names)


def test_the_table_is_read() -> None:
    assert LAYERS["env"] == 0 and LAYERS["families"] == 2 and LAYERS["cli"] == 11


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    if name in OUTSIDE:
        return
    assert name in LAYERS, f"{name} is not in the layer table of CONTRIBUTING.md"
    for imported, _ in imports(path):
        if not imported.startswith("marlin_gen."):
            continue
        target = imported.split(".")[1]
        if target != name and target in LAYERS:
            assert LAYERS[target] <= LAYERS[name], f"{name} (layer {LAYERS[name]}) imports {target} ({LAYERS[target]})"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries_stay_in_their_module(path: Path) -> None:
    name = module_name(path)
    for imported, _ in imports(path):
        library = imported.split(".")[0]
        assert name in ONLY.get(library, {name}), f"{name} imports {library}; only {ONLY[library]} may"
        assert not (library == "torch" and name in NO_TORCH), f"{name} imports torch"


def test_two_drivers_do_not_meet() -> None:
    """Tuning and serving share the middle and never import one another."""
    for one, other in (("search", "op"), ("op", "search")):
        for path in MODULES:
            if module_name(path) == one:
                assert not any(i.split(".")[:2] == ["marlin_gen", other] for i, _ in imports(path)), path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_env_reads_the_environment(path: Path) -> None:
    if path.name != "env.py":
        assert not re.search(r"\bos\.(environ|getenv)\b", path.read_text()), "read it through marlin_gen.env"


def test_importing_the_package_is_cheap() -> None:
    """What serving never needs is not loaded by ``import marlin_gen``."""
    code = f"import sys, marlin_gen; print([m for m in {sorted(ONLY)} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
