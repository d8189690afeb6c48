"""Imports point one way, as docs/architecture.md says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "zo_lightning"
HOSTS = {"strategy", "hf_integration"}
MAY: dict[str, set[str]] = {
    "zo_lightning/engine": {"engine"},
    "callbacks": {"callbacks", "engine", "extras"},
    "zo_lightning/quantized": {"quantized", "engine", "extras"},
    "zo_lightning/prompts": {"prompts", "engine", "extras"},
}
"""What the modules of a folder import of the package, by its first name, at their beginning."""


def imported(path: Path, everywhere: bool) -> Iterator[str]:
    """The package's modules that a file imports: at its beginning, or also inside of functions."""
    tree = ast.parse(path.read_text())
    inside = {id(child) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if not everywhere and id(node) in inside:
            continue
        names = (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [n.name for n in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        yield from (name for name in names if name.split(".")[0] == PACKAGE)


@pytest.mark.parametrize("folder", MAY)
def test_a_folder_imports_what_it_may(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        first = {[*name.split("."), ""][1] for name in imported(path, everywhere=False)}
        assert first <= MAY[folder], path
        assert not HOSTS & {[*name.split("."), ""][1] for name in imported(path, everywhere=True)}, path


def test_of_prompts_the_hosts_import_the_advice_alone() -> None:
    for folder in ("zo_lightning/strategy", "hf_integration"):
        found = {name for path in (ROOT / folder).rglob("*.py") for name in imported(path, everywhere=True) if "prompts" in name}
        assert found == {"zo_lightning.prompts.heads"}
