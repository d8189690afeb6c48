"""Estimators: where to evaluate the objective in a step, and what the values mean as terms of a gradient estimate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from zo_lightning.engine.messages import check_count, choose

ADDED = "added"
"""In the metadata of an option's field: it came later, and step logs that were written before do not have it."""
Displacement = tuple[tuple[int, float], ...]
"""A point theta + sum_j m_j eps z(s_j), as pairs (seed s_j, multiple m_j of eps); eps is that of each parameter group."""


class Term(NamedTuple):
    """One direction of the estimate: the slope (change of the objective for one eps along z(seed)), divided by the number of queries.

    A group with scale eps has the gradient estimate g = sum_j (slope_j / eps) z(s_j).
    """

    seed: int
    slope: float


class Estimator(ABC):
    """Two pure functions: `points(seeds)` and `terms(points, values)`."""

    name: str
    clips = True
    """Whether a bound on the projected gradient of each term is of use."""
    along: Sequence[float] = ()
    """Lengths of the step that a line search tries, in units of the whole one; their values come behind those of the points."""

    @abstractmethod
    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        """The displacements to evaluate in this step; `seeds(i)` is the seed of query i."""

    @abstractmethod
    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        """The terms that the values, in the order of `points`, stand for. Values are finite."""

    @abstractmethod
    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        """(mean of the values at +, mean of the values at -), for monitoring."""

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


def centred_ranks(values: Sequence[float]) -> list[float]:
    """rank / (n - 1) - 1/2, from -1/2 for the smallest to 1/2 for the largest; equal values share the mean of their ranks.

    Only the order counts, so that one outlier does not make the step (Salimans et al. 2017, arXiv 1703.03864).
    """
    order, last = sorted(values), len(values) - 1
    return [(bisect_left(order, value) + bisect_right(order, value) - 1 - last) / (2 * max(1, last)) for value in values]


def z_scores(values: Sequence[float]) -> list[float]:
    """(value - mean) / standard deviation over the points of the step; zeros where all are equal (ES at scale, arXiv 2509.24372)."""
    mean = math.fsum(values) / len(values)
    deviation = math.hypot(*(value - mean for value in values)) / math.sqrt(len(values))
    return [(value - mean) / deviation if deviation > 0 else 0.0 for value in values]


FITNESS: dict[str, Callable[[Sequence[float]], Sequence[float]]] = {"values": list, "ranks": centred_ranks, "z-scores": z_scores}
"""What the values of a step are made into before the estimate: themselves, centred ranks, or z-scores."""


@dataclass(frozen=True)
class SPSA(Estimator):
    """Two-sided simultaneous perturbation, averaged over queries (Spall 1992; MeZO, arXiv 2305.17333).

    g = 1/n sum_i (L(theta + eps z_i) - L(theta - eps z_i)) / (2 eps) z_i, with z_i = z(seed of query i): 2n evaluations a step.

    With a `fitness` of "ranks" or "z-scores", L is the centred rank or the z-score of a value among the 2n of the step: steps then have the
    same size whatever unit and spread the objective has. With one query that is the sign of the difference; n of 4 or more is usual.
    """

    queries: int = 1
    fitness: str = field(default="values", metadata={ADDED: True})

    name = "spsa"

    def __post_init__(self) -> None:
        check_count("queries", self.queries, "the number of perturbations a step")
        choose("fitness", self.fitness, FITNESS)

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        drawn = [seeds(i) for i in range(self.queries)]
        return [((seed, sign),) for seed in drawn for sign in (1.0, -1.0)]

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        fitness = FITNESS[self.fitness](values)
        return [Term(points[2 * i][0][0], (fitness[2 * i] - fitness[2 * i + 1]) / (2 * self.queries)) for i in range(self.queries)]

    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        return sum(values[::2]) / self.queries, sum(values[1::2]) / self.queries

    def times(self, processes: int) -> SPSA:
        if self.fitness != "values":
            return super().times(processes)  # type: ignore[return-value]  # it raises
        return replace(self, queries=self.queries * processes)

    def difference(self, values: Sequence[float]) -> float:
        return max(abs(plus - minus) for plus, minus in zip(values[::2], values[1::2], strict=True))


ESTIMATORS: dict[str, object] = {"spsa": SPSA}
