"""Evaluations that take turns: where they hand over, and what one of them used that others are going to use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from zo_lightning.engine.baton import Baton
from zo_lightning.engine.offload import Parcel
from zo_lightning.engine.offload.hooks import Hook


class Borders:
    """Each call of a module that uses parcels begins at a border; `used` is what `with` uses parcels by."""

    def __init__(self, used: Callable[[Sequence[Parcel]], AbstractContextManager[None]]) -> None:
        self._used = used
        self._baton: Baton | None = None
        self._waiting: dict[int, ExitStack] = {}
        """By border: what an evaluation used behind it and others are going to use."""
        self._last = 0

    @contextmanager
    def between(self, modules: Iterable[nn.Module], baton: Baton) -> Iterator[None]:
        """Around evaluations of which one runs at a time: they hand over where one of these modules begins."""

        def border(module: nn.Module, args: Any) -> None:
            if baton.runs():
                self._last = baton.border()

        before = Hook(torch.compiler.disable(border))
        with ExitStack() as stack:
            stack.callback(self._end)
            for module in modules:
                stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
            self._baton = baton
            yield

    def _end(self) -> None:
        self._baton = None
        while self._waiting:
            self._waiting.popitem()[1].close()

    def keep(self, parcels: Sequence[Parcel]) -> None:
        """What is used behind the last border stays until the last evaluation has begun to use it."""
        if self._baton is None or not self._baton.runs():
            return
        if not self._baton.awaited(self._last):
            others = self._waiting.pop(self._last, None)
            if others is not None:
                others.close()
        elif self._last not in self._waiting:
            self._waiting[self._last] = ExitStack()
            self._waiting[self._last].enter_context(self._used(parcels))
