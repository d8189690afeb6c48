"""Finds zo_lightning.callbacks and zo_lightning.hf_integration in a checkout, where they stand beside zo_lightning."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent


class SourceFinder(MetaPathFinder):
    """Maps ``zo_lightning.<folder>`` to ``<root>/<folder>``; an installed copy has no need of it.

    Extending ``zo_lightning.__path__`` by the root would be shorter, but ``pkgutil.walk_packages`` then finds
    zo_lightning inside zo_lightning without end.
    """

    def __init__(self, root: Path) -> None:
        self.folders = {f"zo_lightning.{name}": root / name for name in ("callbacks", "hf_integration")}

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        folder = self.folders.get(fullname)
        if folder is None:
            return None
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def install(package: Path = PACKAGE) -> SourceFinder | None:
    """Put the finder into ``sys.meta_path`` if ``package`` is the zo_lightning folder of a checkout.

    It stands first: an editable install of another checkout has a finder for these two names as well.
    """
    project = package.parent / "pyproject.toml"
    if (package / "callbacks").exists() or not project.is_file():
        return None
    if 'name = "zo-lightning"' not in project.read_text(encoding="utf-8"):
        return None
    finder = SourceFinder(package.parent)
    sys.meta_path.insert(0, finder)
    return finder
