"""Curvature: SPSA that also measures how the objective bends along each direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from zo_lightning.engine.estimators.base import Displacement, Estimator, T, Term, split
from zo_lightning.engine.messages import check_count


@dataclass(frozen=True)
class Curvature(Estimator):
    """SPSA's estimate, and the value at the weights, from which a term has its curvature: 2n + 1 evaluations a step.

    g = 1/n sum_i (L(theta + eps z_i) - L(theta - eps z_i)) / (2 eps) z_i, and of each term

        (L(theta + eps z_i) + L(theta - eps z_i) - 2 L(theta)) / n, about eps^2 z_i' H z_i / n,

    which `HiZOO` learns a diagonal of the Hessian H from (arXiv 2402.15173); other update rules have no use for it.

    Args:
        queries: n, the perturbations a step.
        processes: of how many processes with data of their own (parallel="seeds=...") the points are; set by the exchange.

    Raises ValueError for other numbers.
    """

    queries: int = 1
    processes: int = field(default=1, repr=False)

    name = "curvature"

    def __post_init__(self) -> None:
        check_count("queries", self.queries, "the number of perturbations a step")
        check_count("processes", self.processes, "the processes with data of their own")

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        found: list[Displacement] = []
        for process in range(self.processes):
            drawn = [seeds(i) for i in range(process * self.queries, (process + 1) * self.queries)]
            found += [(), *(((seed, sign),) for seed in drawn for sign in (1.0, -1.0))]
        return found

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        count, found = self.queries * self.processes, []
        for own, there in zip(self._split(points), self._split(values), strict=True):
            here = there[0]
            for point, plus, minus in zip(own[1::2], there[1::2], there[2::2], strict=True):
                found.append(Term(point[0][0], (plus - minus) / (2 * count), (plus + minus - 2 * here) / count))
        return found

    def loss(self, values: Sequence[float]) -> float:
        return sum(own[0] for own in self._split(values)) / self.processes

    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        count = self.queries * self.processes
        plus, minus = (sum(v for own in self._split(values) for v in own[first::2]) / count for first in (1, 2))
        return plus, minus

    def difference(self, values: Sequence[float]) -> float:
        return max(abs(plus - minus) for own in self._split(values) for plus, minus in zip(own[1::2], own[2::2], strict=True))

    def times(self, processes: int) -> Curvature:
        return replace(self, processes=processes)

    def _split(self, each: Sequence[T]) -> list[Sequence[T]]:
        """By process."""
        return split(each, 2 * self.queries + 1)
