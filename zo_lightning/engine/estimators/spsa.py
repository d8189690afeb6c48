"""SPSA: differences between two opposite points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from zo_lightning.engine.estimators.base import ADDED, Displacement, Estimator, Term
from zo_lightning.engine.estimators.fitness import FITNESS
from zo_lightning.engine.messages import check_count, choose


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
