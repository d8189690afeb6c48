"""Estimators: where to evaluate the objective in a step, and what the values mean as terms of a gradient estimate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zo_lightning.engine.messages import check_count

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

    @abstractmethod
    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        """The displacements to evaluate in this step; `seeds(i)` is the seed of query i."""

    @abstractmethod
    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        """The terms that the values, in the order of `points`, stand for. Values are finite."""

    @abstractmethod
    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        """(mean of the values at +, mean of the values at -), for monitoring."""


@dataclass(frozen=True)
class SPSA(Estimator):
    """Two-sided simultaneous perturbation, averaged over queries (Spall 1992; MeZO, arXiv 2305.17333).

    g = 1/n sum_i (L(theta + eps z_i) - L(theta - eps z_i)) / (2 eps) z_i, with z_i = z(seed of query i): 2n evaluations a step.
    """

    queries: int = 1

    name = "spsa"

    def __post_init__(self) -> None:
        check_count("queries", self.queries, "the number of perturbations a step")

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        drawn = [seeds(i) for i in range(self.queries)]
        return [((seed, sign),) for seed in drawn for sign in (1.0, -1.0)]

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        return [Term(points[2 * i][0][0], (values[2 * i] - values[2 * i + 1]) / (2 * self.queries)) for i in range(self.queries)]

    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        return sum(values[::2]) / self.queries, sum(values[1::2]) / self.queries


ESTIMATORS: dict[str, object] = {"spsa": SPSA}
