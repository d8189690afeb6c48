"""Copies of the source tree, environments to install them into, and what a fresh interpreter finds there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"zo_lightning": "zo_lightning", "zo_lightning.callbacks": "callbacks"}
FOLDERS |= {"zo_lightning.hf_integration": "hf_integration"}
WHERE = """
import importlib.util, json
names = {names}
print(json.dumps({{name: importlib.util.find_spec(name).origin for name in names}}))
"""


def sources() -> dict[str, Path]:
    """Every Python file of the package: its path once installed, and where it stands in the repository."""
    found = {}
    for name, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            found[f"{name.replace('.', '/')}/{file.relative_to(ROOT / folder).as_posix()}"] = file
    return found


def copy_tree(target: Path) -> Path:
    """A checkout with nothing but what a build reads."""
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The standard output of a command, which must succeed; nothing is downloaded."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | {"PIP_NO_INDEX": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def python(code: str, cwd: Path = ROOT, interpreter: str | Path = sys.executable) -> str:
    """What ``code`` prints in a fresh interpreter started in ``cwd``."""
    return run(interpreter, "-c", code, cwd=cwd).strip()


def environment(folder: Path) -> Path:
    """The interpreter of a new environment that sees this one's packages, but not its editable installs."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(interpreter: Path, *what: str | Path, cwd: Path) -> None:
    """``pip install`` into the environment of ``interpreter``, without dependencies, offline."""
    options = ("--no-deps", "--no-build-isolation", "--ignore-installed", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", *options, *what, cwd=cwd)


def homes(cwd: Path, interpreter: str | Path = sys.executable) -> dict[str, Path]:
    """The folders that the package and its two mapped parts are imported from."""
    found = json.loads(python(WHERE.format(names=sorted(FOLDERS)), cwd, interpreter))
    return {name: Path(origin).resolve().parent for name, origin in found.items()}


def in_tree(tree: Path) -> dict[str, Path]:
    """What ``homes`` says when everything comes from a checkout."""
    return {name: tree.resolve() / folder for name, folder in FOLDERS.items()}


def in_site(interpreter: Path) -> dict[str, Path]:
    """What ``homes`` says when everything comes from an installed copy."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(python(code, interpreter.parent, interpreter)).resolve()
    return {name: site / name.replace(".", "/") for name in FOLDERS}
