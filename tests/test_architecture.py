"""Who may import whom (lazy imports included), and files and functions small enough to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "vlmamba"
FILES = sorted(SOURCE.rglob("*.py"))

# Package -> what of ours it may import, besides itself. `cli` may import everything.
ALLOWED = {
    "ops": set(),
    "models": {"ops"},
    "data": {"models.processor"},
    "training": {"models", "data"},
    "evaluation": {"models.processor"},
    "inference": {"models", "ops"},
    "serving": {"inference", "models.images"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Our own modules that a file imports anywhere, names relative to `vlmamba`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("vlmamba.") for name in names if name.startswith("vlmamba.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports(path: Path) -> None:
    package = module_of(path).split(".")[0]
    if package not in ALLOWED:
        return
    for name in imports_of(path):
        own = name.split(".")[0] == package or name == "__version__"
        allowed = any(name == other or name.startswith(other + ".") for other in ALLOWED[package])
        assert own or allowed, f"{path.name} imports vlmamba.{name}; {package} may import {sorted(ALLOWED[package])}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_size(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} does not say what it is for"
    assert text.count("\n") <= (700 if path.name.startswith("triton") else 500), f"{path} is too long"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not path.name.startswith("triton"):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 75, f"{path}: {node.name} has {length} lines"
