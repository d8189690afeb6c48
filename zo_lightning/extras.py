"""Says which extra to install where an optional package is missing."""

from __future__ import annotations

from importlib.util import find_spec


def require(extra: str, *packages: str) -> None:
    """Raise ``ModuleNotFoundError`` with the pip command if one of the top-level ``packages`` is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        command = f"pip install 'zo-lightning[{extra}]'"
        raise ModuleNotFoundError(f"This needs {' and '.join(missing)}: {command}", name=missing[0])
