"""Outputs that an objective gets by asking the module itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn


def ask_source(source: str | Callable[[nn.Module, Any], Any], module: nn.Module | None, batch: Any) -> Any:
    """What a method of the module makes of the batch, or a callable of (module, batch). ValueError where one of them is missing."""
    what = f"source {getattr(source, '__name__', source)!r}"
    if module is None:
        raise ValueError(f"{what} needs the module. Pass it: ZOOptimizer(module, ...) or ZOOptimizer(params, module=module).")
    if batch is None:
        raise ValueError(f"{what} is asked for the batch, and there is none. Pass it: step(closure, batch=batch).")
    batch = copy.copy(batch)  # whatever a source takes out of it is there at the next point
    if callable(source):
        return source(module, batch)
    method = getattr(module, source, None)
    if not callable(method):
        raise ValueError(f"source={source!r} is not a method of {type(module).__name__}.")
    return method(batch)
