"""Undoes what an evaluation that nobody should notice did to Python state: attributes, containers, small tensors, torchmetrics."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from zo_lightning.engine.places import Act, Bag, Items, Place, Table, Tail, Value

BOUND = 4096
"""Entries of a dict, set or deque, elements of a tensor: what is larger is data, not a counter."""

_NESTED = 64
"""Items of a list up to which they are looked at, too: a list of lists of outputs."""

TORCH = frozenset(vars(nn.Module()))


def nothing(*args: object, **kwargs: object) -> None:
    """Stands in for a method that logs, prints or goes backward."""


class Undo:
    """Remembers state and puts it back, last remembered first.

    Attributes are bound again to what they were bound to; lists, dicts, sets, deques and small tensors get their contents back, nested ones
    too; long lists lose what was appended. torchmetrics work on copies of their tensors (and on shallow copies of their lists) that are
    dropped in the end, or are left out. Objects of other classes are not followed.
    """

    def __init__(self, metrics: bool = True) -> None:
        self._with_metrics = metrics
        self._places: list[Place] = []
        self._where = ""
        self._seen: set[int] = set()
        library = sys.modules.get("torchmetrics")  # who has metrics has imported it
        self._metric: Any = getattr(library, "Metric", ())
        self._kinds: tuple[Any, ...] = () if library is None else (self._metric, getattr(library, "MetricCollection", ()))
        self._followed = (dict, list, tuple, set, deque, Tensor, *self._kinds)

    def attributes(self, owner: object, skip: frozenset[str] = frozenset()) -> None:
        """Remember the attributes of an object, and what they hold except for those in `skip` and the tables of an nn.Module."""
        for name, value in self.bindings(owner).entries.items():
            if isinstance(value, self._followed) and name not in skip and name not in TORCH:
                self._where = f"{type(owner).__name__}.{name}"
                self._contents(value)

    def bindings(self, owner: object) -> Table:
        """Remember what the attributes of an object are bound to, and nothing of what they hold."""
        self._where = f"an attribute of {type(owner).__name__}"
        table = Table(vars(owner))
        self._keep(table)
        return table

    def modules(self, root: nn.Module, skip: frozenset[str] = frozenset()) -> None:
        """Remember the attributes of every module under `root` but metrics, and let metrics go on with copies."""
        inside: set[nn.Module] = set()
        for module in root.modules():
            if isinstance(module, self._kinds):
                inside.update(module.modules())
            elif module not in inside:
                self.attributes(module, skip)
        self.metrics(root)

    def metrics(self, root: nn.Module) -> None:
        """Let the torchmetrics among the modules of `root` go on with copies of their states."""
        for metric in root.modules() if self._kinds and self._with_metrics else ():
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
        self._keep(Act(back))

    def again(self) -> None:
        """Put everything back, and keep it remembered."""
        for place in reversed(self._places):
            place.put_back()

    def undo(self) -> None:
        """Put everything back."""
        while self._places:
            self._places.pop().put_back()

    def _keep(self, place: Place) -> None:
        place.where = self._where
        self._places.append(place)

    def _contents(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, self._kinds):
            self.metrics(value)
            return
        self._seen.add(id(value))
        if isinstance(value, dict) and len(value) <= BOUND:
            self._keep(Table(value))
            for entry in list(value.values()):
                self._contents(entry)
        elif isinstance(value, (list, tuple)):
            if isinstance(value, list):
                self._keep(Items(value) if len(value) <= BOUND else Tail(value, len(value)))
            for entry in value if len(value) <= _NESTED else ():
                self._contents(entry)
        elif isinstance(value, (set, deque)) and len(value) <= BOUND:
            self._keep(Bag(value))
        elif isinstance(value, Tensor):
            self._tensor(value)

    def _tensor(self, value: Tensor) -> None:
        if not (isinstance(value, nn.Parameter) or value.is_meta or value.is_inference() or value.numel() > BOUND):
            self._keep(Value(value))


class Rerun:
    """Lets every evaluation of a micro-batch begin with the Python state that the first one began with, and end with what that one left.

    Otherwise a counter in a training step would make two evaluations differ by more than their weights. `remember` tells an `Undo` what
    the state is.
    """

    def __init__(self, remember: Callable[[Undo], None]) -> None:
        self._remember = remember
        self._start = Undo(metrics=False)
        self._hidden = False

    def closure(self, evaluate: Callable[[], Any]) -> Callable[[], Any]:
        """`evaluate`, which notes the state that it begins with unless it is inside `hidden`."""

        def run() -> Any:
            if not self._hidden:
                self._start = Undo(metrics=False)
                self._remember(self._start)
            return evaluate()

        return run

    def remember(self, undo: Undo) -> None:
        """Tell an `Undo` what the state is."""
        self._remember(undo)

    @contextmanager
    def hidden(self) -> Iterator[Undo]:
        """Around an evaluation that nobody should notice."""
        with undoing() as undo:
            self._remember(undo)
            self._start.again()
            self._hidden = True
            try:
                yield undo
            finally:
                self._hidden = False


@contextmanager
def undoing() -> Iterator[Undo]:
    """An `Undo` that puts everything back at the end, whatever happened."""
    undo = Undo()
    try:
        yield undo
    finally:
        undo.undo()
