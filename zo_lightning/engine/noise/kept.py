"""What was made lately, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from torch import Tensor


class Kept:
    """Tensors, or tuples of them, by what they are: those that were used last, of at most `limit` bytes together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._found: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, what: Hashable) -> bool:
        return what in self._found

    def get(self, what: Hashable) -> Any:
        """What was put there, if it is still there; None otherwise."""
        with self._lock:
            if what not in self._found:
                return None
            self._found.move_to_end(what)
            return self._found[what][0]

    def put(self, what: Hashable, value: Tensor | tuple[Tensor, ...]) -> None:
        """Keep it, and of the others what there is room for; nothing that is larger than all of it."""
        size = sum(part.numel() * part.element_size() for part in ((value,) if isinstance(value, Tensor) else value))
        with self._lock:
            if size > self.limit or what in self._found:
                return
            self._found[what] = (value, size)
            self.bytes += size
            while self.bytes > self.limit:
                self.bytes -= self._found.popitem(last=False)[1][1]
