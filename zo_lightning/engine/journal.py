"""Who is told of every step before it is applied, and may know steps of an earlier process that was killed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zo_lightning.engine.changed import State, Watch, same
from zo_lightning.engine.messages import tell_once
from zo_lightning.engine.updates import GroupSettings

if TYPE_CHECKING:
    from zo_lightning.engine.masks.rules import Chosen
    from zo_lightning.engine.optimizer import ZOOptimizer


@dataclass(frozen=True)
class StepRecord:
    """What was measured in one step, and with which settings: everything that the update was a function of."""

    step: int
    """`ZOOptimizer.steps` before it."""
    values: tuple[float, ...]
    """One for each point of the estimator, float64; where one is not finite the step was skipped."""
    settings: tuple[GroupSettings, ...]
    """One for each parameter group; lr is the effective one."""
    skipped: bool
    micro_batches: int
    passes: bytes = b""
    """weights="inplace" only, the moves that were made: SESSION, the index of a point, or ORIGIN (residency/inplace.py)."""
    traces: bool = False
    """The first evaluation left something behind (buffers, logged values): who catches up must evaluate it again."""
    idle: int = 0
    """Accumulation windows without any loss that came before, since the last step."""


class Journal(ABC):
    """Attached as `ZOOptimizer.journal`."""

    @abstractmethod
    def recall(self, step: int, updating: bool) -> StepRecord | None:
        """The record of a step that an earlier process made: its values are taken instead of measured ones, and it is not written again.

        Asked before each micro-batch, and, `updating`, before the update.
        """

    @abstractmethod
    def mask(self, optimizer: ZOOptimizer) -> None:
        """A step begins with another mask than the one before; `optimizer.masks` has it."""

    def chosen(self, optimizer: ZOOptimizer) -> Chosen | None:
        """The mask of a step that is made again, where the weights that it was made for are not at hand: it is taken, not made."""
        return None

    @abstractmethod
    def look(self, optimizer: ZOOptimizer, micro_batches: int, updating: bool) -> None:
        """Evaluations or an update begin: were the weights changed by anything but steps? `micro_batches` were evaluated in this step."""

    @abstractmethod
    def append(self, record: StepRecord) -> None:
        """The step is about to be applied. What is raised here leaves it unapplied, and the weights as they were."""

    @abstractmethod
    def remember(self, optimizer: ZOOptimizer) -> None:
        """Evaluations or an update ended: the weights are as they should be."""

    def loaded(self) -> None:  # noqa: B027 (a log compares fingerprints)
        """The optimizer got another state, and the weights may get other values with it."""


class Unrecorded(Journal):
    """Nobody is told. Of weights that others changed, an estimator forgets what it has measured."""

    def __init__(self) -> None:
        self._watch = Watch()
        self._state: State | None = None

    def recall(self, step: int, updating: bool) -> StepRecord | None:
        return None

    def mask(self, optimizer: ZOOptimizer) -> None:
        pass

    def look(self, optimizer: ZOOptimizer, micro_batches: int, updating: bool) -> None:
        if micro_batches or updating or self._state is None or not optimizer.estimator.remembers:
            return
        if not same(self._watch.state(optimizer.residency), self._state):
            tell_once("estimator.changed", f"{optimizer.estimator} begins anew: weights were changed by others since its last step.")
            optimizer.progress.clear()

    def append(self, record: StepRecord) -> None:
        pass

    def loaded(self) -> None:
        self._state = None

    def remember(self, optimizer: ZOOptimizer) -> None:
        if optimizer.estimator.remembers:
            self._state = self._watch.state(optimizer.residency)
