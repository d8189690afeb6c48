"""Who has the parameters: an evaluation, for which they point to scratch memory, or a thread that reads them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from zo_lightning.engine.messages import say_once

PATIENCE = 60.0
"""Seconds that a thread waits without a word."""

_LONG = (
    f"A thread that reads weights has waited {PATIENCE:.0f} seconds for an evaluation or an update of another one. If it belongs to that "
    "evaluation (a closure that runs the model on a thread and waits for it), it waits for ever: run the model on the closure's thread, or "
    "use weights='exact'."
)


class Turns:
    """A lock that is given in the order of asking, so that neither evaluations nor readers starve; a thread that has it may take it again.

    An RLock would not do: the thread that releases it and asks again at once, as a training loop does, gets it before those that wait.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[object] = deque()
        self._holder: int | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside it, no other thread is inside."""
        me = threading.get_ident()
        if self._holder == me:
            yield
            return
        self._take(me)
        try:
            yield
        finally:
            with self._changed:
                self._holder = None
                self._changed.notify_all()

    def hand_to(self, thread: int) -> None:
        """Who has it lets another thread go on in its place."""
        self._holder = thread

    def _take(self, me: int) -> None:
        ticket = object()
        with self._changed:
            try:
                self._waiting.append(ticket)
                free = lambda: self._holder is None and self._waiting[0] is ticket  # noqa: E731
                if not self._changed.wait_for(free, PATIENCE):
                    say_once("turns", _LONG)
                    self._changed.wait_for(free)
                self._holder = me
            finally:
                if ticket in self._waiting:  # else it was interrupted before it waited
                    self._waiting.remove(ticket)
                self._changed.notify_all()
