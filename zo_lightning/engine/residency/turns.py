"""Who has the parameters: an evaluation, for which they point to scratch memory, or a thread that reads them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


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
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._holder is None and self._waiting[0] is ticket)
                self._holder = me
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
