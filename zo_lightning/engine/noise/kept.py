"""What was drawn lately, up to a number of bytes."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T", Tensor, tuple[Tensor, Tensor])


class _Info(NamedTuple):
    """How many results there are, and the bytes of their tensors."""

    entries: int
    bytes: int


class _Kept:
    """The results of a function by its arguments, oldest use first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._found: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            if key not in self._found:
                return None
            self._found.move_to_end(key)
            return self._found[key][0]

    def put(self, key: Any, value: Any) -> None:
        size = sum(part.numel() * part.element_size() for part in ((value,) if isinstance(value, Tensor) else value))
        with self._lock:
            if size > self._limit or key in self._found:
                return
            self._found[key] = (value, size)
            self._bytes += size
            while self._bytes > self._limit:
                self._bytes -= self._found.popitem(last=False)[1][1]

    def info(self) -> _Info:
        with self._lock:
            return _Info(len(self._found), self._bytes)


def kept(limit: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """functools.lru_cache for functions that return tensors: what was used last, up to `limit` bytes; positional arguments alone.

    The returned function has an `info()`: (entries, bytes).
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        memory = _Kept(limit)

        @functools.wraps(function)
        def remembered(*args: P.args, **kwargs: P.kwargs) -> T:
            found: T | None = memory.get(args)
            if found is None:
                found = function(*args, **kwargs)
                memory.put(args, found)
            return found

        remembered.info = memory.info  # type: ignore[attr-defined]
        return remembered

    return decorate
