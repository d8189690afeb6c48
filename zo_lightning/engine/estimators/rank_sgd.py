"""RankSGD: an estimate of the gradient from nothing but the order of a few points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from zo_lightning.engine.estimators.base import ADDED, Displacement, Estimator, Term, lengths
from zo_lightning.engine.messages import check_count, check_number


@dataclass(frozen=True)
class RankSGD(Estimator):
    """ZO-RankSGD (Tang et al., arXiv 2303.03751): m one-sided points theta + eps z_i, of which only the order counts.

    E has an edge from the better to the worse of any two points of which at least one is among the best k: k (k - 1) / 2 + k (m - k)
    edges. The estimate is the mean of z_worse - z_better over E: the point of rank r < k (0 is the best) has the weight -(m - 1 - 2 r), all
    others have k, and the weights sum to zero. Points of equal value share the mean of the weights of their places.

    A term's slope is its weight / |E|, between -1 and 1 whatever the objective is, and is divided by eps as any slope is:

        theta <- theta - (lr / eps) / |E| sum_i w_i z_i

    So lr is eps times the step size of the paper, whose estimate has no 1 / eps, and a step is about lr / eps**2 perturbations long: as
    long as one with the engine's own lr and eps for weights. `clip` is refused: cut one by one, the weights would not sum to zero.

    With a `search`, lr is the longest step: the same data is evaluated again at theta + a (update of lr), a = 1, shrink, shrink**2, ...,
    and at theta itself, and the best of these is what the step is. All groups need the same lr / eps**2. Weight decay is that of lr.

    Args:
        samples: m >= 2, the evaluations of a step.
        top: k from 1 to m, how many of the best are told apart; None: all of them.
        search: steps that a line search tries, in search + 1 more evaluations; 0: none.
        shrink: of each of them to the one before, between 0 and 1.

    Raises ValueError for other numbers.
    """

    samples: int = 5
    top: int | None = None
    search: int = field(default=0, metadata={ADDED: True})
    shrink: float = field(default=0.5, metadata={ADDED: True})

    name = "rank_sgd"
    clips = False

    def __post_init__(self) -> None:
        check_count("samples", self.samples, "the points that are ranked in a step", least=2)
        if self.top is not None:
            check_count("top", self.top, "how many of the best are told apart, or None for all")
            if self.top > self.samples:
                raise ValueError(f"Invalid top: {self.top}. There are samples={self.samples} points: must be at most that, or None (all).")

        check_count("search", self.search, "the lengths of a step that are tried, or 0 for one without a line search", least=0)
        check_number("shrink", self.shrink, "> 0 and < 1", lambda x: 0 < x < 1)
        if not self.search and self.shrink != type(self).shrink:
            raise ValueError(f"shrink={self.shrink!r} does nothing without a line search. Give search= as well, or leave shrink out.")

    @property
    def along(self) -> tuple[float, ...]:  # type: ignore[override]
        return lengths(self.search, self.shrink)

    @property
    def edges(self) -> int:
        """|E|, the comparisons that count."""
        best = self.samples if self.top is None else self.top
        return best * (best - 1) // 2 + best * (self.samples - best)

    def weights(self, values: Sequence[float]) -> list[float]:
        """How often each point is the worse one in an edge, less how often it is the better one; they sum to zero."""
        best = self.samples if self.top is None else self.top
        of_place = [2 * place - (self.samples - 1) if place < best else best for place in range(self.samples)]
        order = sorted(range(self.samples), key=lambda i: values[i])
        weights = [0.0] * self.samples
        begin = 0
        while begin < self.samples:
            end = begin + 1
            while end < self.samples and values[order[end]] == values[order[begin]]:
                end += 1
            for i in order[begin:end]:
                weights[i] = sum(of_place[begin:end]) / (end - begin)
            begin = end
        return weights

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        return [((seeds(i), 1.0),) for i in range(self.samples)]

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        return [Term(point[0][0], weight / self.edges) for point, weight in zip(points, self.weights(values), strict=True)]

    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        """The mean twice: all points are on one side."""
        mean = math.fsum(values) / len(values)
        return mean, mean
