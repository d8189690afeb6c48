"""Coordinatewise: finite differences along every trained weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zo_lightning.engine.estimators.base import Displacement, Estimator, Term, Ways
from zo_lightning.engine.messages import check_count, check_flag
from zo_lightning.engine.noise import Basis

if TYPE_CHECKING:
    from zo_lightning.engine.coordinates import Queries


@dataclass(frozen=True)
class Coordinatewise(Estimator):
    """g_i = (L(theta + eps e_i) - L(theta)) / eps for each of the d trained weights, and 0 for all others: d + 1 evaluations a step.

    `central` takes (L(theta + eps e_i) - L(theta - eps e_i)) / (2 eps) and 2d evaluations: a bias of O(eps**2) instead of O(eps). There is
    no randomness. It is Kiefer and Wolfowitz 1952, and the CGE of DeepZero (arXiv 2310.02025), which runs it within a pruning mask: d is
    the number of the mask's elements, at most 65534 (32767 central). Only the element is written, whatever `weights` is, and its bits are
    put back; 16-bit weights are rounded stochastically there, and eps should be some of their spacings.

    With `reuse` the forward restarts where the displaced weight is first read: in one more evaluation a micro-batch the outputs of module
    calls are recorded, and those that ended before return what they returned then. Values have the same bits as without; the first
    reused evaluation of each parameter is made both ways, and reuse ends with a message where they differ. It takes the memory of the
    outputs of all modules, about what backpropagation keeps. Compiled modules are not reused, nor calls with users' hooks, with
    side effects on tensors or attributes, or with outputs that are no tensors and containers of them.

    `batch` displaces so many elements of one parameter in one evaluation, by torch.vmap: k copies of this parameter, and of activations
    from there on. Values then differ by rounding from those of one at a time, more than bits. Where an operation can't do it, evaluations
    are made one at a time, with a message.

    Args:
        central: whether differences are central.
        reuse: whether module outputs that a displaced weight can't change are computed once a micro-batch.
        batch: how many points of one parameter are evaluated together.

    Raises ValueError for other values; a step raises it where more weights are trained than it can have points.
    """

    central: bool = False
    reuse: bool = True
    batch: int = 1

    name = "coordinatewise"
    noise = Basis()

    def __post_init__(self) -> None:
        check_flag("central", self.central)
        check_flag("reuse", self.reuse)
        check_count("batch", self.batch, "the points that are evaluated together")

    @property
    def coordinates(self) -> Ways:  # type: ignore[override]
        """With recorded features, and in batches, as the options say."""
        return Ways(self.reuse, self.batch)

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        queries: Queries = seeds  # type: ignore[assignment]
        if self.central:
            return [((seed, side),) for seed in queries.coordinates(2) for side in (1.0, -1.0)]
        return [(), *(((seed, 1.0),) for seed in queries.coordinates(1))]

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        if self.central:
            sides = zip(points[::2], values[::2], values[1::2], strict=True)
            return [Term(point[0][0], (plus - minus) / 2) for point, plus, minus in sides]
        return [Term(point[0][0], value - values[0]) for point, value in zip(points[1:], values[1:], strict=True)]

    def loss(self, values: Sequence[float]) -> float:
        return super().loss(values) if self.central else values[0]

    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        """(mean over the displaced points, mean of what they are compared with)."""
        plus, minus = (values[::2], values[1::2]) if self.central else (values[1:], values[:1])
        return sum(plus) / len(plus), sum(minus) / len(minus)

    def difference(self, values: Sequence[float]) -> float:
        if self.central:
            return max(abs(plus - minus) for plus, minus in zip(values[::2], values[1::2], strict=True))
        return max(abs(value - values[0]) for value in values[1:])

    def times(self, processes: int) -> Coordinatewise:
        raise ValueError(
            f'{self} has the same points on all processes, and nothing that other seeds would change. Use parallel="data=...", or '
            '"perturbation=...", which shares the points out.'
        )
