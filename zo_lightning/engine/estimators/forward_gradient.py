"""ForwardGradient: exact derivatives along random directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zo_lightning.engine.estimators.base import Displacement, Term
from zo_lightning.engine.estimators.blocks import InBlocks


@dataclass(frozen=True)
class ForwardGradient(InBlocks):
    """g = 1/n sum_i (z_i' grad L(theta)) z_i, each derivative by one evaluation in forward mode (Baydin et al., arXiv 2202.08587).

    It is SPSA for eps -> 0 where the loss is what its derivative says (not behind `.detach()`, as in straight-through estimators, where it
    is autograd's gradient): unbiased, without rounding of a difference, and eps only says how groups with other eps are moved beside each
    other. An evaluation computes each operation and its derivative, and takes the memory of the tangents of weights and activations. The
    loss needs a derivative: no other objective is possible, nor an operation that PyTorch has no forward-mode derivative for. Attention
    runs as its parts.

    Args:
        queries: n, the directions a step.

    Raises ValueError for other numbers.
    """

    name = "forward_gradient"
    tangents = True

    @property
    def width(self) -> int:
        return self.queries + 1

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        found: list[Displacement] = []
        for process in range(self.processes):
            found += [*(((seeds(i), 1.0),) for i in self.of(process)), ()]
        return found

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        return [
            Term(point[0][0], slope / self.count)
            for own, there in zip(self.blocks(points), self.blocks(values), strict=True)
            for point, slope in zip(own[:-1], there[:-1], strict=True)
        ]

    def loss(self, values: Sequence[float]) -> float:
        return sum(values[self.queries :: self.width]) / self.processes

    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        """(the loss + mean slope, the loss - mean slope): what SPSA would see to first order."""
        loss = self.loss(values)
        slope = sum(v for own in self.blocks(values) for v in own[:-1]) / self.count
        return loss + slope, loss - slope

    def difference(self, values: Sequence[float]) -> float:
        return 2 * max(abs(v) for own in self.blocks(values) for v in own[:-1])
