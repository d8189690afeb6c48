"""Undoes what an evaluation that nobody should notice did to Python state: attributes, containers, small tensors, torchmetrics."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_BOUND = 4096
"""Entries of a dict, set or deque, elements of a tensor: what is larger is data, not a counter."""

_NESTED = 64
"""Items of a list up to which they are looked at, too: a list of lists of outputs."""

_TORCH = frozenset(vars(nn.Module()))


def nothing(*args: object, **kwargs: object) -> None:
    """Stands in for a method that logs, prints or goes backward."""


class Undo:
    """Remembers state and puts it back, last remembered first.

    Attributes are bound again to what they were bound to; lists lose what was appended; dicts, sets, deques and small tensors get their
    contents back, nested ones too. torchmetrics work on copies of their tensors (and on shallow copies of their lists) that are dropped in
    the end. Objects of other classes are not followed.
    """

    def __init__(self) -> None:
        self._actions: list[Callable[[], Any]] = []
        self._seen: set[int] = set()
        library = sys.modules.get("torchmetrics")  # who has metrics has imported it
        self._metric: Any = getattr(library, "Metric", ())
        self._kinds: tuple[Any, ...] = () if library is None else (self._metric, getattr(library, "MetricCollection", ()))

    def attributes(self, owner: object, skip: frozenset[str] = frozenset()) -> None:
        """Remember the attributes of an object, and what they hold except for those in `skip` and the tables of an nn.Module."""
        attributes = vars(owner)
        entries = dict(attributes)
        self.also(lambda: _refill(attributes, entries))
        for name, value in entries.items():
            if name not in skip and name not in _TORCH:
                self._contents(value)

    def metrics(self, root: nn.Module) -> None:
        """Let the torchmetrics among the modules of `root` go on with copies of their states."""
        for metric in root.modules() if self._kinds else ():
            if isinstance(metric, self._kinds) and id(metric) not in self._seen:
                self._seen.add(id(metric))
                states = metric._defaults if isinstance(metric, self._metric) else {}
                self.attributes(metric, frozenset(states))
                for name in states.keys() & vars(metric).keys():
                    state = vars(metric)[name]
                    vars(metric)[name] = state.clone() if isinstance(state, Tensor) else list(state)

    def bind(self, owner: object, **values: Any) -> None:
        """Give an object attributes of its own for a while, over the methods of its class or earlier attributes."""
        attributes = vars(owner)
        before = {name: attributes[name] for name in values if name in attributes}

        def back() -> None:
            for name in values:
                del attributes[name]
            attributes.update(before)

        attributes.update(values)
        self.also(back)

    def also(self, action: Callable[[], Any]) -> None:
        """Do this as well."""
        self._actions.append(action)

    def undo(self) -> None:
        """Put everything back."""
        while self._actions:
            self._actions.pop()()

    def _contents(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, self._kinds):
            self.metrics(value)
            return
        self._seen.add(id(value))
        if isinstance(value, dict) and len(value) <= _BOUND:
            entries = dict(value)
            self.also(lambda: _refill(value, entries))
            for entry in entries.values():
                self._contents(entry)
        elif isinstance(value, (list, tuple)):
            length = len(value)
            if isinstance(value, list):
                self.also(lambda: value.__delitem__(slice(length, None)))
            for entry in value if length <= _NESTED else ():
                self._contents(entry)
        elif isinstance(value, (set, deque)) and len(value) <= _BOUND:
            kept = list(value)
            self.also(lambda: _put_back(value, kept))
        elif isinstance(value, Tensor):
            self._tensor(value)

    def _tensor(self, value: Tensor) -> None:
        if not (isinstance(value, nn.Parameter) or value.is_meta or value.is_inference() or value.numel() > _BOUND):
            copy, version = value.detach().clone(), value._version
            self.also(lambda: value.detach().copy_(copy) if value._version != version else None)


@contextmanager
def undoing() -> Iterator[Undo]:
    """An `Undo` that puts everything back at the end, whatever happened."""
    undo = Undo()
    try:
        yield undo
    finally:
        undo.undo()


def _refill(table: dict[Any, Any], entries: dict[Any, Any]) -> None:
    for name in [name for name in table if name not in entries]:
        del table[name]
    for name, value in entries.items():
        if name not in table or table[name] is not value:
            table[name] = value


def _put_back(container: Any, kept: list[Any]) -> None:
    container.clear()
    (container.extend if isinstance(container, deque) else container.update)(kept)
