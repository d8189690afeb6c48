"""Changes that a parcel still lacks, and how they are made where its weights are just then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from zo_lightning.engine.masks.state import Masks
from zo_lightning.engine.noise import Change, Noise
from zo_lightning.engine.noise.changes import apply_changes, moves
from zo_lightning.engine.noise.members import Members
from zo_lightning.engine.offload.parcels import FROZEN, Parcel
from zo_lightning.engine.offload.stamps import Moment
from zo_lightning.engine.parameters import Trained


class Due:
    """A change that a parcel still lacks, with the masks it was made for."""

    def __init__(self, change: Change, masks: Masks, moment: Moment) -> None:
        self.change, self.masks, self.moment = change, masks.chosen, moment

    def moves(self, p: Trained) -> bool:
        """Whether it changes anything of a tensor."""
        if p.group == FROZEN or not Masks.fixed(self.masks).trains(p.key):
            return False
        return moves(self.change, p.group)

    def mask_of(self, p: Trained) -> Members | None:
        """The mask that it has for a tensor, where that tensor is."""
        mask = Masks.fixed(self.masks).of(p.key)
        return None if mask is None else mask.to(p.tensor.device)

    def make(self, weights: Sequence[Trained], noise: Noise) -> None:
        """Make it, in place."""
        moving = [p for p in weights if self.moves(p)]
        apply_changes(moving, [self.change], noise, {p.key: mask for p in moving if (mask := self.mask_of(p)) is not None})


def make_in(parcel: Parcel, due: Sequence[Due], places: Sequence[Tensor], noise: Noise) -> None:
    """Make all changes where the tensors are."""
    weights = [replace(p, tensor=place) for p, place in zip(parcel.tensors, places, strict=True)]
    for one in due:
        one.make(weights, noise)
