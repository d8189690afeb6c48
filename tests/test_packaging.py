"""The package as it is built, installed and imported: names, dependencies, extras, registration."""

from __future__ import annotations

import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging_tools import ROOT, copy_tree, homes, in_tree, python, run, sources

from zo_lightning import _sources
from zo_lightning.extras import require

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
HOSTS = ("lightning", "pytorch_lightning", "transformers", "accelerate")
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({names}));"


def pins() -> dict[str, str]:
    """Package -> version in constraints.txt, in its order."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def required(requirement: Requirement, found: dict[str, list[Requirement]]) -> None:
    """Collect ``requirement`` and, through what is installed, all that it requires."""
    known = found.setdefault(canonicalize_name(requirement.name), [])
    if any(str(each) == str(requirement) for each in known):
        return
    known.append(requirement)
    for line in metadata.requires(requirement.name) or []:
        each = Requirement(line)
        if each.marker is None or any(each.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
            required(each, found)


def test_every_folder_with_code_is_a_listed_package() -> None:
    folders = {str(Path(name).parent).replace("/", ".") for name in sources()}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders
    assert all(f"{folder.replace('.', '/')}/__init__.py" in sources() for folder in folders)


def test_constraints_pin_exactly_what_the_extras_require() -> None:
    found: dict[str, list[Requirement]] = {}
    direct = [*PROJECT["project"]["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    for line in direct:
        if not line.startswith("zo-lightning["):
            required(Requirement(line), found)
    assert set(pins()) == set(found)
    wrong = [str(r) for name, each in found.items() for r in each if not r.specifier.contains(pins()[name], True)]
    assert wrong == []
    assert next(iter(pins())) == "torch"


def test_wheel_holds_every_file_under_the_package_and_nothing_beside_it(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "wheels", cwd=tree)
    (wheel,) = (tree / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licensed = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        text = archive.read(licensed[0]).decode()
    assert names == {*sources(), "zo_lightning/py.typed"}
    assert "Apache License" in text


def test_import_is_light() -> None:
    code = f"import sys, zo_lightning; print([m for m in ('torch', 'numpy', *{HOSTS}) if m in sys.modules])"
    assert python(code) == "[]"


def test_works_without_any_host() -> None:
    code = WITHOUT.format(names=HOSTS) + "import zo_lightning.callbacks; print(zo_lightning.ZOOptimizer.__module__)"
    assert python(code) == "zo_lightning.engine.optimizer"


def test_hugging_face_part_works_without_lightning() -> None:
    code = WITHOUT.format(names=HOSTS[:2]) + "import zo_lightning.hf_integration as hf; print(hf.ZOTrainer.__name__)"
    assert python(code) == "ZOTrainer"


@pytest.mark.parametrize(
    ("statement", "extra"),
    [
        ("zo_lightning.ZOStrategy", "lightning"),
        ("import zo_lightning.strategy", "lightning"),
        ("import zo_lightning.hf_integration", "hf"),
    ],
)
def test_missing_extra_names_the_command(statement: str, extra: str) -> None:
    code = WITHOUT.format(names=HOSTS) + f"import zo_lightning\ntry: {statement}\nexcept ImportError as e: print(e)"
    assert f"pip install 'zo-lightning[{extra}]'" in python(code)


def test_require_names_what_is_missing_only() -> None:
    require("hf", "torch")
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_package: pip install 'zo-lightning\[hf\]'"):
        require("hf", "torch", "no_such_package")


def test_unknown_name_is_an_attribute_error() -> None:
    import zo_lightning

    assert not hasattr(zo_lightning, "ZOStrategies")
    assert set(zo_lightning.__all__) <= set(dir(zo_lightning))


# ---- registration with a Lightning that is a few stub files


STUBS = """
import sys, types
stub = types.ModuleType("zo_lightning.strategy")
stub.calls = []
def register(namespace):
    complete = getattr(sys.modules[namespace], "Trainer", None) is not None
    stub.calls.append((namespace, complete))
stub.register = register
sys.modules["zo_lightning.strategy"] = stub
"""


@pytest.fixture
def lightning_stubs(tmp_path: Path) -> Path:
    """A folder with two packages that look like Lightning from outside."""
    for folder in ("lightning", "lightning/pytorch", "pytorch_lightning"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("Trainer = object\n")
    (tmp_path / "lightning" / "__init__.py").write_text("import lightning.pytorch\n")
    (tmp_path / "stubs.py").write_text(STUBS + f"sys.path.append({str(ROOT)!r})\n")
    return tmp_path


@pytest.mark.parametrize("order", ["import zo_lightning, {}", "import {}, zo_lightning"])
@pytest.mark.parametrize(
    ("name", "namespace"),
    [
        ("lightning", "lightning.pytorch"),
        ("lightning.pytorch", "lightning.pytorch"),
        ("pytorch_lightning", "pytorch_lightning"),
    ],
)
def test_registers_once_in_either_order(lightning_stubs: Path, order: str, name: str, namespace: str) -> None:
    code = f"import stubs\n{order.format(name)}\nimport {name}\nprint(stubs.stub.calls)"
    assert python(code, lightning_stubs) == str([(namespace, True)])


def test_registers_again_after_a_reload_and_leaves_the_loader_as_it_was(lightning_stubs: Path) -> None:
    code = """
import importlib, inspect, stubs, zo_lightning, pytorch_lightning as pl
importlib.reload(zo_lightning)
importlib.reload(pl)
loaders = {type(pl.__loader__).__name__, type(pl.__spec__.loader).__name__}
print(loaders, inspect.getsource(pl).strip(), set(stubs.stub.calls))
"""
    expected = "{'SourceFileLoader'} Trainer = object {('pytorch_lightning', True)}"
    assert python(code, lightning_stubs) == expected


def test_looking_for_lightning_does_not_import_or_register(lightning_stubs: Path) -> None:
    code = """
import stubs, zo_lightning
from importlib.util import find_spec
spec = find_spec("pytorch_lightning")
print(spec.loader.is_package("pytorch_lightning"), spec.origin.endswith("__init__.py"), stubs.stub.calls)
"""
    assert python(code, lightning_stubs) == "True True []"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import zo_lightning, {} as pl", "import {} as pl, zo_lightning"])
@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_real_trainers_know_the_name(order: str, namespace: str, tmp_path: Path) -> None:
    code = f"""
{order.format(namespace)}
trainer = pl.Trainer(strategy="zo", accelerator="cpu", logger=False, enable_checkpointing=False)
print(isinstance(trainer.strategy, pl.strategies.Strategy), isinstance(trainer.strategy, zo_lightning.ZOStrategy))
"""
    assert python(f"import sys; sys.path.append({str(ROOT)!r})\n{code}", tmp_path) == "True True"


# ---- an uninstalled checkout


def test_uninstalled_checkout_finds_its_own_folders(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "checkout")
    assert homes(tree) == in_tree(tree)


def test_modules_of_an_uninstalled_checkout_can_be_walked(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "checkout")
    walk = "pkgutil.walk_packages(z.__path__, 'zo_lightning.')"
    names = python(f"import pkgutil, zo_lightning as z; print(*(m.name for m in {walk}))", tree).split()
    assert "zo_lightning.engine.noise" in names
    assert len(names) == len(set(names))
    assert not any("zo_lightning" in name.removeprefix("zo_lightning.") for name in names)


@pytest.mark.parametrize(
    ("project", "has_callbacks", "expected"),
    [('name = "zo-lightning"', False, True), ('name = "theirs"', False, False), ('name = "zo-lightning"', True, False)],
)
def test_finder_is_for_checkouts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: str, has_callbacks: bool, expected: bool
) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    package = tmp_path / "zo_lightning"
    package.mkdir()
    assert _sources.install(package) is None
    (tmp_path / "pyproject.toml").write_text(f"[project]\n{project}\n")
    if has_callbacks:
        (package / "callbacks").mkdir()
    finder = _sources.install(package)
    assert (finder is not None) == expected
    assert len(sys.meta_path) == expected
    if finder is not None:
        spec = finder.find_spec("zo_lightning.callbacks", None)
        assert spec is not None
        assert spec.origin == str(tmp_path / "callbacks" / "__init__.py")
        assert finder.find_spec("callbacks", None) is None
