"""Runs of a grid in processes, kept in a JSON file, and what one run has to show on its way."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import transformers
from learning import Docstrings, train
from measure import write


class Followed(NamedTuple):
    """A run: what was measured on held-out texts at its start and on its way, and whether it came to its end."""

    start: Any
    curve: list[Any]
    seconds_per_step: float
    ended: bool


class _GivenUpError(Exception):
    pass


def follow(
    task: Docstrings,
    optimizer: Any,
    steps: int,
    every: int,
    measure: Callable[[], Any],
    lost: Callable[[Any, Any], bool],
    after: Callable[[int], None] = lambda step: None,
    output: Callable[[Any], Any] | None = None,
) -> Followed:
    """Train, and `measure` every so many steps and at the end; a run for which `lost(start, now)` holds is given up.

    `after(steps made)` is called after each step, `output(batch)` is what the closure returns, the loss unless given.
    """
    curve: list[Any] = []
    seconds: list[float] = []
    start, began = measure(), time.perf_counter()

    def look(step: int) -> None:
        nonlocal began
        seconds.append(time.perf_counter() - began)
        after(step)
        if step % every == 0 or step == steps:
            curve.append(measure())
            if lost(start, curve[-1]):
                raise _GivenUpError
        began = time.perf_counter()

    ended = False
    with contextlib.suppress(_GivenUpError, FloatingPointError):
        train(task, optimizer, steps, look, output)
        ended = True
    return Followed(start, curve, round(statistics.median(seconds), 4), ended)


class Grid:
    """Makes jobs, NamedTuples whose fields each run's dict repeats, `count` at a time with `threads` each, and writes after every one.

    Runs that the file has are kept and not made again, so that grids and seeds can be widened and a run that was cut off goes on; `kept`
    are other entries of the file that stay.
    """

    def __init__(
        self,
        learn: Callable[[Any], dict[str, Any]],
        summary: Callable[[list[dict[str, Any]]], Any],
        path: Path | None,
        result: dict[str, Any],
        count: int = 1,
        threads: int = 1,
        kept: Sequence[str] = (),
    ) -> None:
        self._learn, self._summary, self._path = learn, summary, path
        self.result: dict[str, Any] = {**result, "runs": []}
        if path is not None and path.exists():
            self.result |= {name: value for name, value in json.loads(path.read_text()).items() if name in ("runs", *kept)}
        self.runs: list[dict[str, Any]] = self.result["runs"]
        self._pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=prepare, initargs=(threads,))

    def __enter__(self) -> Self:
        self._pool.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.__exit__(*error)
        self.result["summary"] = self._summary(self.runs)
        if error == (None, None, None):
            write(self._path, self.result)

    def make(self, jobs: Iterable[Any]) -> None:
        """Those of them that are not there yet."""

        def is_known(job: Any) -> bool:
            return any(all(run.get(name) == value for name, value in job._asdict().items()) for run in self.runs)

        for done in as_completed([self._pool.submit(self._learn, job) for job in jobs if not is_known(job)]):
            self.runs.append(done.result())
            print(self.runs[-1], flush=True)
            write(self._path, {**self.result, "summary": self._summary(self.runs)})


def prepare(threads: int) -> None:
    """What a process does first."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
