"""What a step minimises instead of the loss: any number that can be computed from what a model answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from zo_lightning.engine.messages import check_number
from zo_lightning.engine.objectives.samples import names_in
from zo_lightning.engine.randomness import host_state

if TYPE_CHECKING:
    from zo_lightning.engine.parallel import Exchange

Scheduled = float | Callable[[int], float]
"""A number, or a function of the step."""
Samples = list[list[Any]]
"""For every point the samples of its micro-batches."""


class Objective(ABC):
    """A number for each point of a step, from what was observed there in all micro-batches of all ranks.

    At step t and every point: value = loss_weight(t) * loss -+ weight(t) * score, with the mean loss of the micro-batches, as always, and
    a score (maximised: -, minimised: +) that is computed once from all samples together, so that F1 of an accumulated or distributed batch
    is that of the whole batch. A step whose value is not finite is skipped, as with a loss.
    """

    name = "score"
    maximize = True
    needs_target = True
    """Whether a host that knows them gives it the targets beside the predictions."""
    loss_weight: Scheduled = 0.0
    weight: Scheduled = 1.0

    @property
    def needs_output(self) -> bool:
        """Whether the closure has to be called at all: `observe` reads what it returns, or the loss counts."""
        return True

    @property
    def asks_module(self) -> bool:
        """Whether `observe` asks the module; if not, it may be called behind the evaluation."""
        return True

    @abstractmethod
    def observe(self, output: Any, module: nn.Module | None, batch: Any) -> Any:
        """The sample of one evaluation, from what the closure returned, or by asking the module, which is perturbed at this moment.

        It is kept until the update and travels between ranks and into checkpoints: tensors on the CPU, numbers, strings, and lists,
        tuples and dicts of them.
        """

    @abstractmethod
    def score(self, samples: Sequence[Any]) -> float:
        """The number of one point, in its own unit. Called on rank 0 alone."""

    def loss_of(self, output: Any) -> Any:
        """The loss in what the closure returned; None skips the micro-batch."""
        if not isinstance(output, Mapping):
            return output
        if "loss" not in output and self.loss_weight == 0.0:
            return 0.0
        if "loss" not in output:
            raise ValueError(
                f"loss_weight={self.loss_weight!r} needs the loss, and the closure returned only {names_in(output)}. Add 'loss', or leave "
                "loss_weight at 0."
            )
        return output["loss"]

    def weights_at(self, step: int) -> tuple[float, float]:
        """(loss_weight, weight) at a step."""
        return scheduled("loss_weight", self.loss_weight, step), scheduled("weight", self.weight, step)

    def values(
        self,
        step: int,
        losses: Sequence[float],
        samples: Sequence[Sequence[Any]],
        begin: Callable[[], None] = lambda: None,
        searching: bool = False,
    ) -> tuple[list[float], list[float]]:
        """(value, score) of every point; `begin` is called before each score. `searching`: the points are those of a line search."""
        scores = []
        for own in samples:
            begin()
            scores.append(self.score(own))
        of_loss, of_score = self.weights_at(step)
        signed = -of_score if self.maximize else of_score
        both = zip(losses, scores, strict=True)
        return [(of_loss * loss if of_loss else 0.0) + (signed * score if signed else 0.0) for loss, score in both], scores


def scheduled(name: str, given: Scheduled, step: int) -> float:
    """The number at a step. ValueError for one that is negative or not finite."""
    value = given(step) if callable(given) else given
    check_number(name, value, ">= 0", lambda x: x >= 0)
    return float(value)


@dataclass(frozen=True)
class Ramp:
    """A number that goes linearly from `start` at step `begin` to `end` at step `begin + steps`, and stays there."""

    start: float
    end: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            check_number(f"Ramp {name}", getattr(self, name), ">= 0", lambda x: x >= 0)
        check_number("Ramp steps", self.steps, ">= 1", lambda x: x >= 1)

    def __call__(self, step: int) -> float:
        done = min(1.0, max(0.0, (step - self.begin) / self.steps))
        return self.start + (self.end - self.start) * done


def measured(
    objective: Objective, exchange: Exchange, step: int, losses: Sequence[float], samples: Samples, seed: int, searching: bool = False
) -> tuple[list[float], list[float]]:
    """(value, score) of every point, from the samples that each rank has of each point; what fails on rank 0 fails on all."""
    ranks = exchange.collect(samples)
    outcome: tuple[Any, str] = (None, "")
    failed: Exception | None = None
    if exchange.rank == 0:
        try:
            count = len(losses)
            where = [(own, exchange.mesh.mine(rank, count)) for rank, own in enumerate(ranks)]
            points = [[sample for own, mine in where if i in mine for sample in own[mine.index(i)]] for i in range(count)]
            if not points[0]:
                raise ValueError("The micro-batches of this step were measured by a run without this objective. Resume between two steps.")
            with host_state(set()) as host:  # metrics that draw (bootstraps) draw the same at every point, and nobody else notices
                outcome = (objective.values(step, losses, points, lambda: host.seed(seed), searching), "")
        except Exception as error:  # the user's metric: all ranks have to stop
            failed, outcome = error, (None, f"{type(error).__name__}: {error}")
    found, why = exchange.share(outcome)
    if failed is not None:
        raise failed
    if why:
        raise RuntimeError(f"The objective failed on rank 0: {why}")
    values, scores = found
    return values, scores
