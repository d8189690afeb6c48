"""What a step needs of other processes; one process has all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.engine.estimators import Estimator
from zo_lightning.engine.parallel.mesh import Mesh


class Exchange:
    """One process: values are what this process measured.

    `rank` is the process, `stream` which data it sees: processes of one stream have the same batches and the same dropout masks.
    """

    rank = 0
    world_size = 1
    stream = 0
    mesh = Mesh()
    moved = False
    """Whether evaluations of the last step changed buffers on any rank."""

    def widened(self, estimator: Estimator) -> Estimator:
        """The estimator of all processes together. ValueError where it can't be shared out."""
        return estimator

    def mine(self, points: int) -> range:
        """Which of the points of a step this process evaluates."""
        return range(points)

    def values(self, totals: Sequence[Tensor] | None, points: int, moved: bool = False, seen: int = 0) -> list[float] | None:
        """One value a point, the same on every rank, from the losses at the points that are `mine`; None where no rank has any.

        `moved`: whether evaluations changed buffers here. `seen`: a number of the data, below 2**53; processes that share points have to
        have the same. ValueError where they have not.
        """
        return None if totals is None else torch.stack([total.to(totals[0].device) for total in totals]).tolist()

    def align(self, module: nn.Module | None) -> None:
        """Give processes that see the same data the buffers of the one with the first point."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of a one-dimensional float64 tensor."""
        return values

    def averaged(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        """The sum over ranks of each tensor over `count`: in float64 and in the order of ranks, so that all have the same bits."""
        return [tensor / count for tensor in tensors]

    def everywhere(self, number: float) -> list[float]:
        """The number of each rank, in their order, on all of them."""
        return [number]

    def share(self, value: Any) -> Any:
        """What rank 0 has, on every rank."""
        return value

    def collect(self, value: Any) -> list[Any]:
        """What each rank has, in their order, on rank 0; an empty list on the others."""
        return [value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is raised inside on one rank stops all of them."""
        yield

    def fail(self, error: BaseException) -> None:
        """The run ends here by an exception; the others are told."""

    def agree(self, description: dict[str, str]) -> None:
        """ValueError that names the rank and what differs, where ranks do not describe themselves alike."""

    def leave(self) -> None:
        """The run ends here; ranks that have not come to its end are told."""
