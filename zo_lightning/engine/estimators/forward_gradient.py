"""ForwardGradient: exact derivatives along random directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from zo_lightning.engine.estimators.base import Displacement, Estimator, Term, split
from zo_lightning.engine.messages import check_count


@dataclass(frozen=True)
class ForwardGradient(Estimator):
    """g = 1/n sum_i (z_i' grad L(theta)) z_i, each derivative by one evaluation in forward mode (Baydin et al., arXiv 2202.08587).

    It is SPSA for eps -> 0: unbiased, without rounding of a difference, and eps only says how groups with other eps are moved beside each
    other. An evaluation computes each operation and its derivative, and takes the memory of the tangents of weights and activations. The
    loss needs a derivative: no other objective is possible, nor an operation that PyTorch has no forward-mode derivative for. Attention
    runs as its parts.

    Args:
        queries: n, the directions a step.
        processes: of how many processes with data of their own (parallel="seeds=...") the points are; set by the exchange.

    Raises ValueError for other numbers.
    """

    queries: int = 1
    processes: int = field(default=1, repr=False)

    name = "forward_gradient"
    tangents = True

    def __post_init__(self) -> None:
        check_count("queries", self.queries, "the directions a step")
        check_count("processes", self.processes, "the processes with data of their own")

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        found: list[Displacement] = []
        for process in range(self.processes):
            drawn = range(process * self.queries, (process + 1) * self.queries)
            found += [*(((seeds(i), 1.0),) for i in drawn), ()]
        return found

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        count, width = self.queries * self.processes, self.queries + 1
        return [
            Term(point[0][0], slope / count)
            for own, there in zip(split(points, width), split(values, width), strict=True)
            for point, slope in zip(own[:-1], there[:-1], strict=True)
        ]

    def loss(self, values: Sequence[float]) -> float:
        return sum(values[self.queries :: self.queries + 1]) / self.processes

    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        """(the loss + mean slope, the loss - mean slope): what SPSA would see to first order."""
        loss = self.loss(values)
        slope = sum(v for own in split(values, self.queries + 1) for v in own[:-1]) / (self.queries * self.processes)
        return loss + slope, loss - slope

    def difference(self, values: Sequence[float]) -> float:
        return 2 * max(abs(v) for own in split(values, self.queries + 1) for v in own[:-1])

    def times(self, processes: int) -> ForwardGradient:
        return replace(self, processes=processes)
