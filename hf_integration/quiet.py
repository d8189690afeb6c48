"""What an evaluation beyond the first must not leave behind in the trainer: backward calls, counters, logged values."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

_BOUND = 4096  # entries; a longer dict or deque is a dataset, not a set of counters
_DATA = ("train_dataset", "eval_dataset")
_ABSENT = object()


def _nothing(*args: object, **kwargs: object) -> None:
    return None


@contextlib.contextmanager
def shadowed(owner: object, name: str, value: Any) -> Iterator[None]:
    """Give `owner` an attribute of its own for a while, over the class's method or an earlier attribute."""
    attributes = vars(owner)
    before = attributes.get(name, _ABSENT)
    attributes[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            attributes.pop(name, None)
        else:
            attributes[name] = before


def no_backward(accelerator: object) -> contextlib.AbstractContextManager[None]:
    """The host's training step runs whole, except for ``accelerator.backward``."""
    return shadowed(accelerator, "backward", _nothing)


@contextlib.contextmanager
def unseen(trainer: object) -> Iterator[None]:
    """Put back what the host's training step counts (trl: ``num_tokens``, accuracies) and logs.

    Every attribute of `trainer` is bound again to what it was bound to; lists lose what was appended, dicts and deques
    get their entries back, nested ones too. A tensor or an object that was changed in place is not followed.
    """
    undo: list[Callable[[], None]] = []
    attributes = vars(trainer)
    _remember(attributes, undo, skip=_DATA)
    attributes["log"] = _nothing
    try:
        yield
    finally:
        for action in reversed(undo):
            action()


def _remember(value: Any, undo: list[Callable[[], None]], skip: tuple[str, ...] = (), seen: set[int] | None = None) -> None:
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict) and len(value) <= _BOUND:
        entries = dict(value)
        undo.append(lambda: _refill(value, entries))
        for key, entry in entries.items():
            if key not in skip:
                _remember(entry, undo, (), seen)
    elif isinstance(value, list):
        length = len(value)
        undo.append(lambda: value.__delitem__(slice(length, None)))
    elif isinstance(value, deque) and len(value) <= _BOUND:
        items = tuple(value)
        undo.append(lambda: _refill_deque(value, items))


def _refill(value: dict[Any, Any], entries: dict[Any, Any]) -> None:
    for key in [key for key in value if key not in entries]:
        del value[key]
    for key, entry in entries.items():
        if value.get(key, _ABSENT) is not entry:
            value[key] = entry


def _refill_deque(value: deque[Any], items: tuple[Any, ...]) -> None:
    value.clear()
    value.extend(items)
