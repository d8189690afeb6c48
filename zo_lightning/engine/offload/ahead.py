"""Parcels that have more changes than the run has made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from zo_lightning.engine.offload.due import Due
from zo_lightning.engine.offload.parcels import Parcel
from zo_lightning.engine.offload.stamps import Moment

Origin = Callable[[], Mapping[str, Tensor]]
"""Gives the weights that a run goes on from, by name."""


class Ahead:
    """Parcels that a killed run has left with the changes of steps that are only being made again: each as it was stamped.

    Nothing needs to be done for them until those steps are over, unless somebody reads their weights before (validation, a checkpoint):
    then a parcel is taken from the origin, and all changes are made again.
    """

    def __init__(self, made: Moment, steps: Mapping[Parcel, int], origin: Origin) -> None:
        self.made = made
        self._steps, self._origin = dict(steps), origin
        self._history: list[Due] = []
        self.last = max(self._steps.values())

    def has(self, parcel: Parcel, due: Due) -> bool:
        """Whether it has this change."""
        return due.moment.step <= self._steps.get(parcel, 0)

    def late(self, parcel: Parcel, step: int) -> bool:
        """Whether its weights are those of later steps."""
        return self._steps.get(parcel, step) > step

    def remember(self, due: Due) -> None:
        """A step was made again."""
        self._history.append(due)

    def back(self, parcel: Parcel) -> tuple[list[Tensor], list[Due]]:
        """The weights of the origin, and the changes that they lack. ValueError where there is no origin any more."""
        origin = self._origin()
        return [origin[p.name] for p in parcel.tensors], [due for due in self._history if any(due.moves(p) for p in parcel.tensors)]

    def returned(self, parcel: Parcel) -> None:
        """It is no longer ahead."""
        del self._steps[parcel]
