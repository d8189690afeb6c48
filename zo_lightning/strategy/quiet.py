"""What an evaluation beyond the first must not leave behind: logged values, metric states, counters and lists of the module."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

_BOUND = 4096
"""Entries of a dict, set or deque, elements of a tensor: what is larger is data, not a counter."""

_NESTED = 64
"""Items of a list up to which they are looked at, too: a list of lists of outputs."""

_TORCH = frozenset(vars(nn.Module()))
_HOST = frozenset({"_trainer", "_fabric", "_device", "_dtype", "_compiler_ctx"})
Undo = list[Callable[[], Any]]


def nothing(*args: object, **kwargs: object) -> None:
    """Stands in for `self.log` and the like."""


@contextmanager
def quiet(module: nn.Module, trainer: Any, silent_logger: Callable[[], Any]) -> Iterator[None]:
    """Around an evaluation that nobody should notice.

    `self.log`, `self.log_dict`, `self.print` and the loggers are silent. Attributes of the LightningModule are bound again to what they
    were bound to; lists lose what was appended, dicts, sets, deques and small tensors get their contents back. torchmetrics work on copies
    of their tensors (and on shallow copies of their lists) that are dropped in the end. An object of a class of one's own is not followed.
    """
    undo: Undo = []
    seen: set[int] = set()
    loggers = trainer.loggers
    try:
        for metric in _metrics(module):
            _set_aside(metric, undo, seen)
        _remember_attributes(vars(module), undo, seen)
        vars(module).update(log=nothing, log_dict=nothing, print=nothing)
        trainer.loggers = [silent_logger() for _ in loggers]
        yield
    finally:
        trainer.loggers = loggers
        for action in reversed(undo):
            action()


def _metrics(module: nn.Module) -> list[Metric | MetricCollection]:
    """Metrics among the submodules, and in plain lists and dicts of the module itself."""
    loose = [v for value in vars(module).values() for v in _items(value) if isinstance(v, (Metric, MetricCollection))]
    roots = [module, *loose]
    return list({id(m): m for root in roots for m in root.modules() if isinstance(m, (Metric, MetricCollection))}.values())


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict) and len(value) <= _BOUND:
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) and len(value) <= _BOUND else []


def _set_aside(metric: Metric | MetricCollection, undo: Undo, seen: set[int]) -> None:
    attributes = vars(metric)
    states = metric._defaults if isinstance(metric, Metric) else {}
    _remember_attributes(attributes, undo, seen, skip=frozenset(states))
    originals = {name: attributes[name] for name in states if name in attributes}
    undo.append(lambda: attributes.update(originals))
    for name, state in originals.items():
        attributes[name] = state.clone() if isinstance(state, Tensor) else list(state)


def _remember_attributes(attributes: dict[str, Any], undo: Undo, seen: set[int], skip: frozenset[str] = frozenset()) -> None:
    entries = {name: value for name, value in attributes.items() if name not in skip and name not in _TORCH and name not in _HOST}
    undo.append(lambda: _refill(attributes, entries, skip | _TORCH | _HOST))
    for value in entries.values():
        _remember(value, undo, seen)


def _remember(value: Any, undo: Undo, seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict) and len(value) <= _BOUND:
        entries = dict(value)
        undo.append(lambda: _refill(value, entries))
        for entry in entries.values():
            _remember(entry, undo, seen)
    elif isinstance(value, list):
        length = len(value)
        undo.append(lambda: value.__delitem__(slice(length, None)))
        for entry in value if length <= _NESTED else ():
            _remember(entry, undo, seen)
    elif isinstance(value, (set, deque)) and len(value) <= _BOUND:
        kept = list(value)
        undo.append(lambda: _put_back(value, kept))
    elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.numel() <= _BOUND and not value.is_meta:
        copy, version = value.detach().clone(), value._version
        undo.append(lambda: value.detach().copy_(copy) if value._version != version else None)


def _refill(attributes: dict[Any, Any], entries: dict[Any, Any], skip: frozenset[str] = frozenset()) -> None:
    for name in [name for name in attributes if name not in entries and name not in skip]:
        del attributes[name]
    for name, value in entries.items():
        if name not in attributes or attributes[name] is not value:
            attributes[name] = value


def _put_back(container: Any, kept: list[Any]) -> None:
    container.clear()
    (container.extend if isinstance(container, deque) else container.update)(kept)
