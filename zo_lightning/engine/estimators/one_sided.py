"""OneSided: differences to the value where the weights are, which all queries of a step share."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zo_lightning.engine.estimators.base import Displacement, Term
from zo_lightning.engine.estimators.blocks import InBlocks
from zo_lightning.engine.messages import check_count, check_flag


@dataclass(frozen=True)
class OneSided(InBlocks):
    """One point a query, and the weights as they are: n + 1 evaluations a step, where SPSA takes 2n for as many directions.

    g = 1/n sum_i (L(theta + eps z_i) - L(theta)) / eps z_i, with z_i = z(seed of query i).

    The bias is O(eps**2), as that of SPSA, for the noises are symmetric. The curvature along z, eps / 2 z' H z, which cancels between
    opposite points, stays in every difference and adds to the variance: a smaller eps than SPSA's is of use, and so are more queries.

    `normalized` divides by sigma, the standard deviation of the n values (n - 1 degrees of freedom), as FZOO does (arXiv 2506.09034):
    steps then have the same size whatever the gradient is, as normalised gradient steps, for sigma is about eps |grad L|. A term's slope is

        (L(theta + eps z_i) - L(theta)) / (n sigma)

    and is divided by eps as any slope is, so that lr is eps times the step size of the paper. Equal values make no step: sigma is 0 then.

    Args:
        queries: n, the perturbations a step; at least 2 where `normalized`. FZOO uses 8.
        normalized: whether the estimate is divided by sigma.

    Raises ValueError for other numbers.
    """

    normalized: bool = False

    name = "one_sided"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("normalized", self.normalized)
        if self.normalized:
            check_count("queries", self.queries, "the perturbations a step, which need a standard deviation", least=2)

    @property
    def width(self) -> int:
        return self.queries + 1

    @property
    def clips(self) -> bool:  # type: ignore[override]
        """A bound is of use for slopes alone: normalised ones are small by construction."""
        return not self.normalized

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        found: list[Displacement] = []
        for process in range(self.processes):
            found += [(), *(((seeds(i), 1.0),) for i in self.of(process))]
        return found

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        found = []
        for own, there in zip(self.blocks(points), self.blocks(values), strict=True):
            here, others = there[0], there[1:]
            sigma = statistics.stdev(others) if self.normalized else 1.0
            for point, value in zip(own[1:], others, strict=True):
                slope = (value - here) / (self.count * sigma) if sigma > 0 else 0.0
                found.append(Term(point[0][0], slope))
        return found

    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        """(mean over the points, mean of the values where the weights are)."""
        blocks = self.blocks(values)
        there = sum(v for own in blocks for v in own[1:]) / self.count
        return there, sum(own[0] for own in blocks) / self.processes

    def difference(self, values: Sequence[float]) -> float:
        return max(abs(value - own[0]) for own in self.blocks(values) for value in own[1:])
