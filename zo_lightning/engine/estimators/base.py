"""Estimators: where to evaluate the objective in a step, and what the values mean as terms of a gradient estimate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from zo_lightning.engine.noise import Change
    from zo_lightning.engine.updates import GroupSettings

from zo_lightning.engine.noise import Noise

T = TypeVar("T")
ADDED = "added"
"""In the metadata of an option's field: it came later, and step logs that were written before do not have it."""
Displacement = tuple[tuple[int, float], ...]
"""A point theta + sum_j m_j eps z(s_j), as pairs (seed s_j, multiple m_j of eps); eps is that of each parameter group."""


class Term(NamedTuple):
    """One direction of the estimate: the slope (change of the objective for one eps along z(seed)), divided by the number of queries.

    A group with scale eps has the gradient estimate g = sum_j (slope_j / eps) z(s_j). `curvature` is the second difference along z(seed),
    about eps^2 z'Hz, divided alike, of estimators that measure it.
    """

    seed: int
    slope: float
    curvature: float = 0.0


class Ways(NamedTuple):
    """How points of one weight each are evaluated: whether with recorded features, and how many of a parameter in one evaluation."""

    reuse: bool
    batch: int


class Estimator(ABC):
    """Two pure functions: `points(seeds)` and `terms(points, values)`. Where earlier steps count, its state has others, as many points."""

    name: str
    clips = True
    """Whether a bound on the projected gradient of each term is of use."""
    tangents = False
    """Whether points are directions: the value of one is the derivative of the loss along it, in units of eps; that of () is the loss."""
    along: Sequence[float] = ()
    """Lengths of the step that a line search tries, in units of the whole one; their values come behind those of the points."""
    remembers = False
    """Whether a step depends on earlier ones, and evaluates the weights of then: behind what steps have added to them since."""

    def begin(self) -> EstimatorState:
        """The state of a run that has made no step."""
        return EstimatorState(self)

    noise: Noise | None = None
    """What the seeds of its points are seeds of, where that is no choice."""
    coordinates: Ways | None = None
    """How its points are evaluated where each displaces a single weight, of those that `seeds.coordinates()` lists (coordinates.py)."""

    @abstractmethod
    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        """The displacements to evaluate in this step; `seeds(i)` is the seed of query i."""

    @abstractmethod
    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        """The terms that the values, in the order of `points`, stand for. Values are finite."""

    @abstractmethod
    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        """(mean of the values at +, mean of the values at -), for monitoring."""

    def loss(self, values: Sequence[float]) -> float:
        """The objective at the weights, as far as the values tell."""
        return math.fsum(values) / len(values)

    def difference(self, values: Sequence[float]) -> float:
        """The largest difference that the estimate is made of, in the unit of the values, for monitoring."""
        return max(values) - min(values)

    def times(self, processes: int) -> Estimator:
        """With as many queries for each of some processes, which have data of their own; points of a process are together.

        Raises ValueError where values from other data can't be told apart from those of other points.
        """
        raise ValueError(
            f"{self} compares all points of a step with each other, and processes with seeds and data of their own have different losses "
            'at the same point. Use parallel="data=..." or "perturbation=...", or the estimator SPSA().'
        )


class EstimatorState:
    """What an estimator remembers, a function of the steps so far: whoever has their records, rebuilds it. This one remembers nothing."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator

    @property
    def measures(self) -> bool:
        """Whether the next step moves nothing: its learning rate is 0, and the update rule does not hear of it."""
        return False

    def check(self, settings: Sequence[GroupSettings]) -> None:
        """ValueError, before anything is changed, where a step can't be made with these settings."""

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        """As of `Estimator`, for the next step."""
        return self._estimator.points(seeds)

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        """As of `Estimator`, for the next step."""
        return self._estimator.terms(points, values)

    def remember(self, terms: Sequence[Term], change: Change, settings: Sequence[GroupSettings]) -> None:
        """A step was made: what it was made of, and what it changes."""

    def clear(self) -> None:
        """Forget all: other weights are trained from now on, or a step log begins."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""


def split(each: Sequence[T], width: int) -> list[Sequence[T]]:
    """In parts of a width: what belongs to each process."""
    return [each[at : at + width] for at in range(0, len(each), width)]


def lengths(search: int, shrink: float) -> tuple[float, ...]:
    """1, shrink, ..., shrink**(search - 1), and 0 for staying where it is; none for search=0."""
    return (*(shrink**i for i in range(search)), 0.0) if search else ()
