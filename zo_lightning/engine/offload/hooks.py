"""Hooks that stay behind when a module is copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """A hook of a module; copies of the module, which have their weights in memory, have none."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        self.call(*args)

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any) -> None:
    """The hook of a copy."""
