"""Curvature: SPSA that also measures how the objective bends along each direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zo_lightning.engine.estimators.base import Displacement, Term
from zo_lightning.engine.estimators.blocks import InBlocks


@dataclass(frozen=True)
class Curvature(InBlocks):
    """SPSA's estimate, and the value at the weights, from which a term has its curvature: 2n + 1 evaluations a step.

    g = 1/n sum_i (L(theta + eps z_i) - L(theta - eps z_i)) / (2 eps) z_i, and of each term

        (L(theta + eps z_i) + L(theta - eps z_i) - 2 L(theta)) / n, about eps^2 z_i' H z_i / n,

    which `HiZOO` learns a diagonal of the Hessian H from (arXiv 2402.15173); other update rules have no use for it.

    Args:
        queries: n, the perturbations a step.

    Raises ValueError for other numbers.
    """

    name = "curvature"

    @property
    def width(self) -> int:
        return 2 * self.queries + 1

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        found: list[Displacement] = []
        for process in range(self.processes):
            drawn = [seeds(i) for i in self.of(process)]
            found += [(), *(((seed, sign),) for seed in drawn for sign in (1.0, -1.0))]
        return found

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        found = []
        for own, there in zip(self.blocks(points), self.blocks(values), strict=True):
            here = there[0]
            for point, plus, minus in zip(own[1::2], there[1::2], there[2::2], strict=True):
                found.append(Term(point[0][0], (plus - minus) / (2 * self.count), (plus + minus - 2 * here) / self.count))
        return found

    def loss(self, values: Sequence[float]) -> float:
        return sum(own[0] for own in self.blocks(values)) / self.processes

    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        plus, minus = (sum(v for own in self.blocks(values) for v in own[first::2]) / self.count for first in (1, 2))
        return plus, minus

    def difference(self, values: Sequence[float]) -> float:
        return max(abs(plus - minus) for own in self.blocks(values) for plus, minus in zip(own[1::2], own[2::2], strict=True))
