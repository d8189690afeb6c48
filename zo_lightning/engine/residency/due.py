"""Changes that parcels still lack, and parcels that have more of them than the run has made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from zo_lightning.engine.masks.state import Masks
from zo_lightning.engine.noise import Change, Noise
from zo_lightning.engine.noise.changes import apply_changes
from zo_lightning.engine.offload.parcels import FROZEN, Parcel
from zo_lightning.engine.offload.stamps import Place
from zo_lightning.engine.parameters import Trained

Origin = Callable[[], Mapping[str, Tensor]]
"""Gives the weights that a run goes on from, by name."""


class Due:
    """A change that a parcel still lacks, with the masks it was made for."""

    def __init__(self, change: Change, masks: Masks, place: Place) -> None:
        self.change, self.masks, self.place = change, masks.chosen, place

    def moves(self, p: Trained) -> bool:
        """Whether it changes anything of a tensor."""
        if p.group == FROZEN or not Masks.fixed(self.masks).trains(p.key):
            return False
        decay, coefficients = self.change.steps[p.group]
        return decay != 1.0 or any(coefficients)

    def make(self, weights: Sequence[Trained], noise: Noise) -> None:
        """Make it, in place."""
        moving, masks = [p for p in weights if self.moves(p)], Masks.fixed(self.masks)
        apply_changes(moving, [self.change], noise, {p.key: mask for p in moving if (mask := masks.of(p.key)) is not None})


class Ahead:
    """Parcels that a killed run has left with the changes of steps that are only being made again: each as it was stamped.

    Nothing needs to be done for them until those steps are over, unless somebody reads their weights before (validation, a checkpoint):
    then a parcel is taken from the origin, and all changes are made again.
    """

    def __init__(self, made: Place, steps: Mapping[Parcel, int], origin: Origin) -> None:
        self.made = made
        self._steps, self._origin = dict(steps), origin
        self._history: list[Due] = []
        self.last = max(self._steps.values())

    def has(self, parcel: Parcel, due: Due) -> bool:
        """Whether it has this change."""
        return due.place.step <= self._steps.get(parcel, 0)

    def late(self, parcel: Parcel, step: int) -> bool:
        """Whether its weights are those of later steps."""
        return self._steps.get(parcel, step) > step

    def remember(self, due: Due) -> None:
        """A step was made again."""
        self._history.append(due)

    def back(self, parcel: Parcel, drafts: Sequence[Tensor]) -> list[Due]:
        """Write the weights of the origin; the changes that they lack. ValueError where there is no origin any more."""
        origin = self._origin()
        for p, draft in zip(parcel.tensors, drafts, strict=True):
            draft.copy_(origin[p.name])
        return [due for due in self._history if any(due.moves(p) for p in parcel.tensors)]

    def returned(self, parcel: Parcel) -> None:
        """It is no longer ahead."""
        del self._steps[parcel]
