"""RankEquality: every so many steps ranks compare the bits of their weights; one that diverged is named, or healed."""

from __future__ import annotations

from zo_lightning.callbacks.base import Run, ZOCallback
from zo_lightning.engine.parallel import Equality
from zo_lightning.engine.report import StepReport


class RankEquality(ZOCallback):
    """Compares 8 bytes from each rank, a sum of the bits of all trained weights, every `every` steps and at the end of the run.

    Args:
        every: steps from one comparison to the next. It reads all trained weights once.
        heal: make the weights of ranks that differ again from the step log (`TrajectoryLog` with its base file, which these ranks must be
            able to read), with a warning, and go on. False raises `UnequalRanksError` on all ranks; it names those that differ.

    `healed` has (step, ranks) for each time. With one process nothing is compared. Raises ValueError for an option out of range.
    """

    def __init__(self, every: int = 100, heal: bool = False) -> None:
        self._equality = Equality(every, heal)

    @property
    def healed(self) -> list[tuple[int, list[int]]]:
        """(step, ranks) of each time that weights were made again."""
        return self._equality.healed

    def on_zo_step(self, run: Run, report: StepReport) -> None:
        self._equality.stepped(run.optimizer)

    def on_run_complete(self, run: Run) -> None:
        if run.optimizer.steps % self._equality.every:
            self._equality.check(run.optimizer)
