"""The modules that run at this moment, and what is to be closed when they end, however they end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Set
from contextlib import ExitStack
from types import FrameType

from torch import nn

_CALL = nn.Module._call_impl.__code__


class OpenModules:
    """Those of one thread."""

    def __init__(self) -> None:
        self._entries: list[tuple[nn.Module, ExitStack, FrameType | None]] = []

    def __bool__(self) -> bool:
        return bool(self._entries)

    def entered(self, module: nn.Module, stack: ExitStack, call: FrameType | None = None) -> None:
        """A module begins to run, in this call of it."""
        self._entries.append((module, stack, call))

    def left(self, module: nn.Module) -> None:
        """It ended, and so did all that began after it (what an interrupt left open)."""
        if any(one is module for one, _, _ in self._entries):
            while True:
                one, stack, _ = self._entries.pop()
                stack.close()
                if one is module:
                    break

    def close(self, running: Set[FrameType] = frozenset()) -> None:
        """After an exception: what is still open, innermost first, but for the calls that run."""
        for entry in self._entries[::-1]:
            if entry[2] not in running:
                self._entries.remove(entry)
                entry[1].close()


class Running:
    """Those of all threads."""

    def __init__(self) -> None:
        self._threads: dict[int, OpenModules] = {}

    def entered(self, module: nn.Module, stack: ExitStack) -> None:
        """A module begins to run on this thread; to be called by a hook of it."""
        thread = threading.get_ident()
        self._threads.setdefault(thread, OpenModules()).entered(module, stack, next(_calls(thread), None))

    def left(self, module: nn.Module) -> None:
        """It ended."""
        running = self._threads.get(threading.get_ident())
        if running:
            running.left(module)

    def end_interrupted(self) -> None:
        """Ctrl-C ends forward passes without a word: close what belongs to calls that are in no thread any more."""
        for thread, running in list(self._threads.items()):
            if running:
                running.close(set(_calls(thread)))


def _calls(thread: int) -> Iterator[FrameType]:
    """The calls of modules in which a thread is at this moment, the innermost first."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame
        frame = frame.f_back
