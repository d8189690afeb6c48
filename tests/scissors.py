"""A run of a host that is cut off at a step, as a kill would."""

from __future__ import annotations

from keeper_tools import CutError

from zo_lightning.callbacks import Run, ZOCallback
from zo_lightning.engine import StepReport

__all__ = ["CutError", "Scissors"]


class Scissors(ZOCallback):
    """Raises `error` after a number of steps of the engine, in every process, and keeps the reports of the steps before."""

    def __init__(self, after: int | None = None, error: type[BaseException] = CutError) -> None:
        self.after, self.error = after, error
        self.reports: list[StepReport] = []

    def on_zo_step(self, run: Run, report: StepReport) -> None:
        self.reports.append(report)
        if run.optimizer.steps == self.after:
            raise self.error
