"""Several jobs that take turns: each on a thread of its own, one at a time, switched where the jobs say."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from zo_lightning.engine.signals import held


class Stopped(BaseException):
    """Raised in a job at its border when an earlier one failed."""


class Baton:
    """Whoever has it runs. At a border, a job goes on when the earlier jobs have crossed this border and the later ones the one before.

    `switch(old, new)` is called when job `old` hands over to job `new`, by the thread that hands over; None is no job.
    """

    def __init__(self, switch: Callable[[int | None, int | None], None], crew: Executor) -> None:
        self._switch, self._crew = switch, crew
        self._changed = threading.Condition()
        self._holder: int | None = None
        self._crossed: list[int] = []
        self._ended: list[bool] = []
        self._failed: list[BaseException | None] = []
        self.threads: list[int | None] = []
        """The identities of the threads of the jobs that began."""

    def run(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        """What the jobs return. Job 0 runs on this thread, which waits for the others in the end; they run on threads of the crew, which
        has as many to spare.

        Raises what the first job raised that failed; those after it are stopped, those before it end.
        """
        count = len(jobs)
        self._crossed, self._ended, self._failed = [0] * count, [False] * count, [None] * count
        self.threads = [threading.get_ident(), *[None] * (count - 1)]
        results: list[Any] = [None] * count
        others = [self._start(number, jobs[number], results) for number in range(1, count)]
        self._holder = 0
        self._switch(None, 0)
        try:
            self._do(0, jobs[0], results)
        finally:
            with held():
                self._end(0)
                self._wait(None)
                for other in others:
                    other.result()
        error = next((error for error in self._failed if error is not None), None)
        if error is not None:
            raise error
        return results

    def border(self) -> int:
        """Called by the job that runs: how many borders it crossed before. Others run meanwhile, where it is their turn. Raises Stopped."""
        me = self.threads.index(threading.get_ident())
        while (other := self._first_behind(me)) is not None:
            with held():
                self._give(me, other)
            self._check(me)
        self._crossed[me] += 1
        return self._crossed[me] - 1

    def runs(self) -> bool:
        """Whether this thread is the one that has it."""
        return self._holder is not None and self.threads[self._holder] == threading.get_ident()

    def awaited(self, border: int) -> bool:
        """Whether a job has yet to cross this border."""
        return any(count <= border for count, ended in zip(self._crossed, self._ended, strict=True) if not ended)

    def _first_behind(self, me: int) -> int | None:
        mine = self._crossed[me]
        for number, (count, ended) in enumerate(zip(self._crossed, self._ended, strict=True)):
            if not ended and (count <= mine if number < me else count < mine):
                return number
        return None

    def _check(self, me: int) -> None:
        if any(error is not None for error in self._failed[:me]):
            raise Stopped

    def _start(self, number: int, job: Callable[[], Any], results: list[Any]) -> Future[None]:
        def body() -> None:
            with self._changed:
                self.threads[number] = threading.get_ident()
                self._changed.notify_all()
            self._wait(number)
            self._do(number, job, results)
            self._end(number)

        return self._crew.submit(contextvars.copy_context().run, body)

    def _do(self, number: int, job: Callable[[], Any], results: list[Any]) -> None:
        try:
            self._check(number)
            results[number] = job()
        except Stopped:  # the error is that of the earlier job
            pass
        except BaseException as error:
            self._failed[number] = error

    def _end(self, me: int) -> None:
        """The job is over: the next one that is not gets the baton, or, at last, `run`."""
        self._ended[me] = True
        left = [number for number, ended in enumerate(self._ended) if not ended]
        self._pass(me, left[0] if left else None)

    def _give(self, me: int, other: int) -> None:
        self._pass(me, other)
        self._wait(me)

    def _pass(self, me: int, other: int | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: other is None or self.threads[other] is not None)  # it may have only just been started
        self._switch(me, other)
        with self._changed:
            self._holder = other
            self._changed.notify_all()

    def _wait(self, number: int | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._holder == number)
