"""Places where Python keeps state: what each held at a moment, whether it holds that still, and a way to put it back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from operator import eq, is_
from typing import Any

import torch
from torch import Tensor


class Place(ABC):
    """What one place held when this object was made."""

    rewound = False
    """Whether every evaluation finds it as the first one did anyway, as buffers."""

    fixed = False
    """Whether it can only be looked at, and not be put back."""

    where = ""
    """What it belongs to, in words."""

    @abstractmethod
    def changed(self) -> bool:
        """Whether it holds something else now."""

    @abstractmethod
    def now(self) -> Place:
        """The same place with what it holds now."""

    @abstractmethod
    def put_back(self) -> None:
        """Let it hold that again."""


class Table(Place):
    """Names and what they are bound to: an object's attributes, or a dict."""

    def __init__(self, table: dict[Any, Any]) -> None:
        self.table, self.entries = table, dict(table)

    def changed(self) -> bool:
        now, then = self.table, self.entries
        return len(now) != len(then) or not all(map(is_, now.values(), then.values())) or not all(map(eq, now, then))

    def now(self) -> Place:
        return type(self)(self.table)

    def put_back(self) -> None:
        if not self.changed():
            return  # as most are not: nothing was bound, added or removed
        table, entries = self.table, self.entries
        for name in [name for name in table if name not in entries]:
            del table[name]
        for name, value in entries.items():
            if name not in table or table[name] is not value:
                table[name] = value


class Items(Place):
    """The items of a list."""

    def __init__(self, value: list[Any]) -> None:
        self.value, self.items = value, list(value)

    def changed(self) -> bool:
        return len(self.value) != len(self.items) or not all(map(is_, self.value, self.items))

    def now(self) -> Place:
        return Items(self.value)

    def put_back(self) -> None:
        if self.changed():
            self.value[:] = self.items


class Tail(Place):
    """What was appended to a long list after its first items."""

    def __init__(self, value: list[Any], length: int, tail: tuple[Any, ...] = ()) -> None:
        self.value, self.length, self.tail = value, length, tail

    def changed(self) -> bool:
        return len(self.value) != self.length + len(self.tail)

    def now(self) -> Place:
        return Tail(self.value, self.length, tuple(self.value[self.length :]))

    def put_back(self) -> None:
        self.value[self.length :] = self.tail


class Bag(Place):
    """The members of a set or a deque."""

    def __init__(self, value: Any) -> None:
        self.value, self.members = value, list(value)

    def changed(self) -> bool:
        if isinstance(self.value, set):  # whose order tells nothing
            return self.value != set(self.members)
        return len(self.value) != len(self.members) or not all(map(is_, self.value, self.members))

    def now(self) -> Place:
        return Bag(self.value)

    def put_back(self) -> None:
        self.value.clear()
        (self.value.extend if isinstance(self.value, deque) else self.value.update)(self.members)


class Value(Place):
    """The elements of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.copy, self.version = tensor, tensor.detach().clone(), tensor._version

    def changed(self) -> bool:
        return self.tensor._version != self.version and not torch.equal(self.tensor.detach(), self.copy)

    def now(self) -> Place:
        return type(self)(self.tensor)

    def put_back(self) -> None:
        if self.changed():
            self.tensor.detach().copy_(self.copy)
            self.version = self.tensor._version


class Large(Place):
    """A tensor that is too large to be copied."""

    fixed = True

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def changed(self) -> bool:
        return self.tensor._version != self.version

    def now(self) -> Place:
        return Large(self.tensor)

    def put_back(self) -> None:
        pass


class Setting(Place):
    """What a function returns and another one sets: a setting of the process, the state of a generator."""

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], Any], equal: Callable[[Any, Any], bool] = is_) -> None:
        self._get, self._put, self._equal, self.value = get, put, equal, get()

    def changed(self) -> bool:
        return not self._equal(self._get(), self.value)

    def now(self) -> Place:
        return Setting(self._get, self._put, self._equal)

    def put_back(self) -> None:
        if self.changed():
            self._put(self.value)


class Bound(Table):
    """The buffers of a module."""

    rewound = True


class Written(Value):
    """The elements of a buffer, which native kernels write without counting a version."""

    rewound = True

    def changed(self) -> bool:
        return not torch.equal(self.tensor, self.copy)


class Act(Place):
    """Something to be done to put a state back that nobody can look at."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action

    def changed(self) -> bool:
        return False

    def now(self) -> Place:
        return self

    def put_back(self) -> None:
        self.action()
