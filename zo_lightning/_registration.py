"""Registers "zo" and "zo_ddp" with Lightning when it is imported, before or after this package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


class RegisteringLoader(Loader):
    """The loader of a Lightning namespace, which registers the strategies once the namespace is complete."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        register(module.__name__)


class LightningFinder(MetaPathFinder):
    """Finds the Lightning namespaces as the other finders do, and gives them a ``RegisteringLoader``."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in NAMESPACES:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = RegisteringLoader(spec.loader)
                return spec
        return None


def register(namespace: str) -> None:
    """Make "zo" and "zo_ddp" names that ``Trainer(strategy=...)`` of ``namespace`` accepts."""
    import_module("zo_lightning.strategy").register(namespace)


def install() -> None:
    """Register now with each namespace that is imported already, and later with each that will be."""
    sys.meta_path.insert(0, LightningFinder())
    for namespace in NAMESPACES:
        if sys.modules.get(namespace) is not None:
            import_module(namespace)  # waits for another thread that is in the middle of importing it
            register(namespace)
