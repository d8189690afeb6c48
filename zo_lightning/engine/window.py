"""What was measured since the last update: the points of the step, and one value each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zo_lightning.engine.estimators import Displacement

if TYPE_CHECKING:
    from zo_lightning.engine.evaluation import Task


class Window:
    """One accumulation window: every micro-batch is evaluated at the same points, with the eps of its beginning."""

    def __init__(self, points: list[Displacement], eps: list[float], mine: range) -> None:
        self.points = points
        self.mine = mine
        """Indices of those that this process evaluates."""
        self.eps = eps
        """Of each parameter group."""
        self.totals: list[Tensor] | None = None
        self.gradients: list[Tensor] = []
        """Of the last layers that are trained by backpropagation, summed over micro-batches and over the points here."""
        self.samples: list[list[Any]] = [[] for _ in mine]
        """What an objective observed at each point, here."""
        self.micro_batches = 0
        self.seen = 0
        """A number of the batches, where other processes evaluate other points of them."""
        self.seconds = 0.0
        self.again: list[tuple[Task, float]] = []
        """Where a line search will evaluate them once more: the micro-batches and their weights."""
        self.whole = True
        """Whether `again` would have all of them: a checkpoint and a copy have none."""
        self.moved = False
        """Whether the evaluations changed buffers."""
        self.traces = False
        """Whether the first evaluations left something behind: buffers, logged values."""

    @property
    def own(self) -> list[Displacement]:
        """The points that this process evaluates."""
        return [self.points[index] for index in self.mine]

    def add(self, losses: list[Tensor], weight: float, samples: list[Any], gradients: Sequence[Tensor] = ()) -> None:
        """Add weight * loss of every point, its sample where there is an objective, and weight * `gradients`, which are given away."""
        for gradient in gradients:
            gradient.mul_(weight)
        self.gradients = (
            [b.add_(a.to(b.device)) for a, b in zip(self.gradients, gradients, strict=True)] if self.gradients else list(gradients)
        )
        for own, sample in zip(self.samples, samples, strict=False):
            own.append(sample)
        scaled = [loss * weight for loss in losses]
        self.totals = scaled if self.totals is None else [a.to(b.device) + b for a, b in zip(self.totals, scaled, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """A checkpoint in the middle of an accumulation keeps what was measured so far."""
        totals = None if self.totals is None else torch.stack(self.totals).tolist()
        plain = {
            "points": len(self.points),
            "eps": list(self.eps),
            "micro_batches": self.micro_batches,
            "totals": totals,
        }
        if self.gradients:
            plain["gradients"] = [gradient.clone() for gradient in self.gradients]
        return {**plain, "samples": [list(own) for own in self.samples]} if any(self.samples) else plain

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "again": [], "whole": self.totals is None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. ValueError where another estimator measured it."""
        if state["points"] != len(self.points):
            raise ValueError(
                f"The state was saved inside an accumulation window of {state['points']} evaluations, and this estimator makes "
                f"{len(self.points)}. Resume with the same estimator (queries), or from a state saved between two steps."
            )
        self.whole = state["totals"] is None
        self.eps, self.micro_batches = list(state["eps"]), state["micro_batches"]
        self.samples = [list(own) for own in state.get("samples", self.samples)]
        self.gradients = [gradient.clone() for gradient in state.get("gradients", ())]
        self.totals = None if state["totals"] is None else [torch.tensor(x, dtype=torch.float64) for x in state["totals"]]
