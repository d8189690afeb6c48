"""Signals held back while weights are being written, and delivered right after."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGBREAK")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


@contextmanager
def held(interrupt: bool = True) -> Iterator[None]:
    """Python's handlers run after the block instead of inside it; elsewhere than on the main thread none would run inside anyway.

    With interrupt=False, Ctrl-C raises KeyboardInterrupt at once, as usual; only handlers of the program's own are held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Any] = {}
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler) and (interrupt or handler is not signal.default_int_handler):
            handlers[number] = handler
            signal.signal(number, lambda n, frame: pending.append((n, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in pending:
            handlers[number](number, frame)
