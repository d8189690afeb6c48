"""Signals held back while weights are not what they seem, and delivered right after."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGBREAK", "SIGINT")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class _Hold:
    """What the main thread holds back: the program's handlers, the signals that came, and whether Ctrl-C goes through just now."""

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}
        self.pending: list[tuple[int, FrameType | None]] = []
        self.interrupted = False
        self.interruptible = False

    def arrive(self, number: int, frame: FrameType | None) -> None:
        """Stands in for every handler."""
        if self.handlers.get(number) is signal.default_int_handler:
            self.interrupted = True
            self.interrupt()
        else:
            self.pending.append((number, frame))

    def interrupt(self) -> None:
        """Raise the KeyboardInterrupt that came, where it can go through."""
        if self.interrupted and self.interruptible:
            self.interrupted = self.interruptible = False  # what cleans up after it is not interrupted again
            raise KeyboardInterrupt

    def install(self) -> None:
        """Take the place of the program's handlers, that of Ctrl-C last."""
        self.pending, self.interrupted = [], False
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self.handlers[number] = handler
                signal.signal(number, self.arrive)

    def remove(self) -> None:
        """Put the program's handlers back, that of Ctrl-C last, for it can raise from then on; call them for what came."""
        handlers, pending = self.handlers, self.pending
        for number, handler in handlers.items():
            if number == signal.SIGINT:
                self.handlers = {}
            signal.signal(number, handler)
        self.handlers = {}
        for number, frame in pending:
            handlers[number](number, frame)
        if self.interrupted:
            raise KeyboardInterrupt


_hold = _Hold()


@contextmanager
def held() -> Iterator[None]:
    """Python's handlers run after the outermost of these blocks instead of inside it, except for Ctrl-C within `interruptible`.

    On another thread than the main one no handler would run inside anyway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
    elif _hold.handlers:
        before, _hold.interruptible = _hold.interruptible, False
        try:
            yield
        finally:
            _hold.interruptible = before
            _hold.interrupt()
    else:
        try:
            _hold.install()
            yield
        finally:
            _hold.remove()


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside `held`: code of the program, in which Ctrl-C raises KeyboardInterrupt at once, as usual."""
    if threading.current_thread() is not threading.main_thread() or not _hold.handlers:
        yield
        return
    _hold.interruptible = True
    try:
        _hold.interrupt()
        yield
    finally:
        _hold.interruptible = False
