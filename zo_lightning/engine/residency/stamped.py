"""Changes that wait for their parcel, the places of a run that its weights are stamped with, and what a killed run has left of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from zo_lightning.engine.noise import Change, Noise
from zo_lightning.engine.offload import DiskTier, Parcel
from zo_lightning.engine.offload.disk import Slot
from zo_lightning.engine.offload.stamps import Place
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.due import Ahead, Due, Origin
from zo_lightning.engine.residency.exact import Exact
from zo_lightning.engine.residency.scratch import _without_modes
from zo_lightning.engine.signals import held


class Stamped(Exact):
    """Knows for each parcel the changes that are due, and after which step of which log its weights are."""

    _tier: DiskTier
    _parcels: list[Parcel]

    def __init__(self, module: nn.Module, trained: Sequence[Trained], noise: Noise) -> None:
        self._due: dict[Parcel, list[Due]] = {}
        self._place, self._noted = Place(0), False
        self._ahead: Ahead | None = None
        self._any_step = False
        super().__init__(module, trained, noise)

    @abstractmethod
    def flush(self) -> None:
        """Make all changes that are due."""

    @abstractmethod
    def _move_in(self, parcel: Parcel) -> None:
        """Point the parameters to where the tier has them."""

    def update(self, change: Change) -> None:
        if self._tier.undecided:
            self.bind(None)
        super().update(change)
        self._place = self._place if self._noted else Place(self._place.step + 1)
        due, ahead = Due(change, self.masks, self._place), self._ahead
        if ahead is not None:
            ahead.remember(due)
        for parcel in self._parcels:
            if any(due.moves(p) for p in parcel.tensors) and not (ahead is not None and ahead.has(parcel, due)):
                self._due.setdefault(parcel, []).append(due)

    def ended(self) -> None:
        super().ended()
        self._noted = False

    @property
    def tier(self) -> DiskTier:
        """Where the weights are."""
        return self._tier

    @property
    def parcels(self) -> Sequence[Parcel]:
        """What is moved together."""
        return self._parcels

    @property
    def ahead(self) -> bool:
        """Whether there are weights of later steps than were made, or made again."""
        return any(self._late(parcel) for parcel in self._parcels)

    def note(self, place: Place) -> None:
        """The step log has the step that leads to `place`, which is now made, or skipped."""
        self._place, self._noted = place, True
        if self._ahead is not None and place.step > self._ahead.last:
            self._ahead = None

    @contextmanager
    def of_any_step(self) -> Iterator[None]:
        before, self._any_step = self._any_step, True
        try:
            yield
        finally:
            self._any_step = before

    def bind(self, place: Place | None) -> None:
        """The weights are those of `place`, all of them; None is a place that no log knows. What an earlier run has left is gone."""
        with self._turns.turn(), held(), _without_modes(), torch.inference_mode(False), torch.no_grad():
            self.flush()
            self._ahead = None
            self._place = Place(0) if place is None else place
            self._tier.settle(self._place)
            if place is not None:
                self._tier.bind(place)
            for parcel in self._parcels:
                self._move_in(parcel)

    def adopt(self, made: Place, found: Mapping[Parcel, tuple[Slot, Place]], origin: Origin) -> None:
        """Take what a killed run has left in these slots; other parcels have the weights of `made`, from where steps are made again."""
        with self._turns.turn(), held(), _without_modes(), torch.inference_mode(False), torch.no_grad():
            for parcel, (slot, _) in found.items():
                self._tier.take(parcel, slot)
            self._tier.settle(made)
            for parcel in self._parcels:
                self._move_in(parcel)
            self._place = made
            self._ahead = Ahead(made, {parcel: place.step for parcel, (_, place) in found.items()}, origin) if found else None

    def _late(self, parcel: Parcel) -> bool:
        return self._ahead is not None and not self._any_step and self._ahead.late(parcel, self._place.step)

    def _go_back(self, parcel: Parcel) -> None:
        """Somebody reads weights of a step that this parcel is ahead of."""
        ahead = self._ahead
        if ahead is not None:
            due = ahead.back(parcel, self._tier.draft(parcel))
            self._tier.commit(parcel, ahead.made)
            ahead.returned(parcel)
            self._move_in(parcel)
            if due:
                self._due[parcel] = due
