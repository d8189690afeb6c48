"""Every way to install, from every place to run: the same modules are found (slow; nothing is downloaded)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging_tools import FOLDERS, copy_tree, environment, homes, in_site, in_tree, install, python, run, sources

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging_matrix")]
COPIED = ("plain", "wheel", "sdist")
EDITABLE = ("editable", "strict")


@dataclass
class Installed:
    """One checkout, installed in one way into an environment of its own."""

    way: str
    tree: Path
    python: Path

    @property
    def homes(self) -> dict[str, Path]:
        return in_site(self.python) if self.way in COPIED else in_tree(self.tree)


def artefact(way: str, tree: Path) -> list[str | Path]:
    """What to hand to ``pip install``."""
    if way in ("wheel", "sdist"):
        run(sys.executable, "-m", "build", f"--{way}", "--no-isolation", "--outdir", tree / "made", cwd=tree)
        return list((tree / "made").iterdir())
    options = {"plain": [], "editable": ["-e"], "strict": ["--config-settings", "editable_mode=strict", "-e"]}
    return [*options[way], tree]


@pytest.fixture(scope="module", params=[*COPIED, *EDITABLE])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp(request.param)
    tree = copy_tree(folder / "checkout")
    interpreter = environment(folder / "venv")
    install(interpreter, *artefact(request.param, tree), cwd=folder)
    return Installed(request.param, tree, interpreter)


def test_from_elsewhere(installed: Installed, tmp_path: Path) -> None:
    assert homes(tmp_path, installed.python) == installed.homes


def test_from_the_root_of_the_repository(installed: Installed) -> None:
    assert homes(installed.tree, installed.python) == in_tree(installed.tree)


def test_pytest_from_the_root_of_the_repository(installed: Installed) -> None:
    case = installed.tree / "test_case.py"
    case.write_text("import zo_lightning.callbacks\n\n\ndef test():\n    assert zo_lightning.callbacks.__file__\n")
    said = run(installed.python, "-m", "pytest", "-p", "no:cacheprovider", case.name, cwd=installed.tree)
    assert "1 passed" in said


def test_from_another_checkout(installed: Installed, tmp_path: Path) -> None:
    other = copy_tree(tmp_path / "other")
    assert homes(other, installed.python) == in_tree(other)


def test_project_with_callbacks_of_its_own(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "__init__.py").write_text("MINE = 1\n")
    (tmp_path / "hf_integration.py").write_text("MINE = 2\n")
    for order in (
        "callbacks, hf_integration, zo_lightning.callbacks",
        "zo_lightning.callbacks, callbacks, hf_integration",
    ):
        assert python(f"import {order}; print(callbacks.MINE, hf_integration.MINE)", tmp_path, installed.python) == "1 2"
    assert homes(tmp_path, installed.python) == installed.homes


def test_nothing_of_ours_stands_outside_the_package(installed: Installed, tmp_path: Path) -> None:
    code = "from importlib.util import find_spec; print(find_spec('callbacks'), find_spec('hf_integration'))"
    assert python(code, tmp_path, installed.python) == "None None"


def test_every_file_is_there(installed: Installed) -> None:
    def place(path: str) -> Path:
        name = max((name for name in FOLDERS if path.startswith(name.replace(".", "/") + "/")), key=len)
        return installed.homes[name] / path[len(name) + 1 :]

    assert [path for path in (*sources(), "zo_lightning/py.typed") if not place(path).is_file()] == []


def test_version_is_the_same_everywhere(installed: Installed, tmp_path: Path) -> None:
    code = "from importlib.metadata import version as v; import zo_lightning as z; print(v(z.__name__), z.__version__)"
    packaged, imported = python(code, tmp_path, installed.python).split()
    assert packaged == imported
