"""Carries the events of a run to the ZOCallbacks: its start, every update, values to log, its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zo_lightning.callbacks.base import Run, ZOCallback, zo_callbacks
from zo_lightning.engine.optimizer import ZOOptimizer
from zo_lightning.engine.report import StepReport


class Events:
    """One run of the fit loop."""

    def __init__(self, trainer: Any, optimizer: ZOOptimizer) -> None:
        self._trainer = trainer
        self._listeners: list[ZOCallback] = zo_callbacks(trainer.callbacks)
        self._open = True
        self._run = Run(
            optimizer=optimizer,
            module=trainer.lightning_module,
            host="lightning",
            folder=trainer.log_dir or trainer.default_root_dir,
            root=trainer.default_root_dir,
            rehearsal=bool(trainer.fast_dev_run),
            is_rank_zero=trainer.is_global_zero,
            step=lambda: int(trainer.global_step),
        )
        for listener in self._listeners:
            listener.on_run_start(self._run)

    def step(self, report: StepReport) -> None:
        """An update was made; the loggers get what the callbacks measured whenever the Trainer logs."""
        for listener in self._listeners:
            listener.on_zo_step(self._run, report)
        if self._trainer._logger_connector.should_update_logs or self._trainer.fast_dev_run:
            self.log()

    def log(self) -> None:
        """Hand the callbacks' values to the Trainer's loggers, at the step that it logs its own at."""
        values: dict[str, float] = {}
        for listener in self._listeners:
            values.update(listener.metrics())
        if values:
            self._trainer._logger_connector.log_metrics(values)

    @contextmanager
    def checkpoint(self, path: str) -> Iterator[None]:
        """Around the writing of a checkpoint that training can be resumed from."""
        for listener in self._listeners:
            listener.on_checkpoint_start(self._run)
        yield
        for listener in self._listeners:
            listener.on_checkpoint_end(self._run, path)

    def lose(self, path: str) -> None:
        """What is written to `path` now is nothing to resume from, whatever was there before."""
        for listener in self._listeners:
            listener.on_checkpoint_lost(self._run, path)

    def complete(self) -> None:
        """Training ended by itself."""
        for listener in self._listeners:
            listener.on_run_complete(self._run)

    def close(self) -> None:
        """The run is over; only the first call counts."""
        if self._open:
            self._open = False
            for listener in self._listeners:
                listener.on_run_end(self._run)
