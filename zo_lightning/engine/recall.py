"""Catching up with a run that was killed: its steps are made from their records, with at most one evaluation instead of all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from zo_lightning.engine.estimators import Displacement, Estimator
from zo_lightning.engine.evaluation import Evaluator, Task
from zo_lightning.engine.journal import StepRecord
from zo_lightning.engine.line_search import candidates
from zo_lightning.engine.messages import say_once
from zo_lightning.engine.report import Estimate
from zo_lightning.engine.residency import InPlace, Residency
from zo_lightning.engine.updates import GroupSettings, UpdateRule
from zo_lightning.engine.window import Window


def estimate(record: StepRecord, estimator: Estimator, evaluator: Evaluator, task: Task, window: Window, weight: float) -> Estimate:
    """What `ZOOptimizer.estimate` returns for a micro-batch of a recorded step: its share of the recorded loss.

    Where the evaluations of that step left traces (buffers, logged values), the first one is made again, for its traces.
    """
    before = evaluator.count
    measured = estimator.loss(record.values[: len(record.values) - len(estimator.along)])
    loss = torch.tensor(measured / record.micro_batches, dtype=torch.float64)
    output = (loss / weight).float() if weight else loss.float()
    window.micro_batches += 1
    residency = task.residency
    if isinstance(residency, InPlace):
        residency = _SameMoves(residency, record, task.points)
        if not record.traces:
            with residency.session():  # here, and not all before the update: others may change the weights between micro-batches
                pass
    if record.traces:
        evaluated = evaluator.evaluate(task._replace(residency=residency, points=task.points[:1], eps=eps_of(record)))
        if not evaluated.losses:
            return Estimate(None, None)
        output = evaluated.output
    evaluator.count = before + task.evaluations
    return Estimate(output, loss)


class _SameMoves(Residency):
    """The first evaluation alone, and yet every move that the micro-batch made: the roundings of one are where the next begins."""

    name = "inplace"

    def __init__(self, inner: InPlace, record: StepRecord, points: Sequence[Displacement]) -> None:
        super().__init__(inner.module, inner.trained, inner.noise)
        self._inner, self._record, self._points = inner, record, points
        self.masks = inner.masks

    @contextmanager
    def session(self) -> Iterator[None]:
        with self._inner.session():
            yield
            for code in self._record.passes[self._inner.moves :]:
                if code >= len(self._points):
                    break
                with self._inner.at(self._points[code], eps_of(self._record)):
                    pass

    def at(self, point: Displacement, eps: Sequence[float]) -> AbstractContextManager[None]:
        return self._inner.at(point, eps)


def points_of(record: StepRecord, estimator: Estimator, rule: UpdateRule, points: Sequence[Displacement]) -> list[Displacement]:
    """All that `passes` can name: those of the estimate, and behind them those that a line search tried."""
    values = record.values[: len(points)]
    if not estimator.along or not all(math.isfinite(value) for value in values):
        return list(points)
    return [*points, *candidates(estimator.along, estimator.terms(points, values), rule, record.settings)]


def eps_of(record: StepRecord) -> list[float]:
    """The perturbation scale of each group."""
    return [group.eps for group in record.settings]


def compare(record: StepRecord, now: list[GroupSettings]) -> None:
    """Say once where the settings of this run are not those of the recorded step, which are used."""
    if tuple(now) != record.settings:
        say_once(
            "recall.settings",
            f"Step {record.step} was made by an earlier process with {list(record.settings)}, and this run has {now}. The step is "
            "made as it was; what this run has holds from the first new step on.",
        )
