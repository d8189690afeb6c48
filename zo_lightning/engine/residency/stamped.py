"""Changes that wait for their parcel, the moments of a run that its weights are stamped with, and what a killed run has left of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from zo_lightning.engine.noise import Change, Noise
from zo_lightning.engine.offload import DiskTier, InBuffers, Parcel
from zo_lightning.engine.offload.ahead import Ahead, Origin
from zo_lightning.engine.offload.disk import Slot
from zo_lightning.engine.offload.due import Due
from zo_lightning.engine.offload.stamps import Moment
from zo_lightning.engine.offload.tiers import Tier
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.exact import Exact
from zo_lightning.engine.residency.scratch import _without_modes
from zo_lightning.engine.signals import held


class Stamped(Exact):
    """Knows for each parcel the changes that are due, and after which step of which log its weights are."""

    _place: InBuffers
    _parcels: list[Parcel]

    def __init__(self, module: nn.Module, trained: Sequence[Trained], noise: Noise) -> None:
        self._due: dict[Parcel, list[Due]] = {}
        self._moment, self._noted = Moment(0), False
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
        if self._place.tier.undecided:
            self.bind(None)
        super().update(change)
        self._moment = self._moment if self._noted else Moment(self._moment.step + 1)
        due, ahead = Due(change, self.masks, self._moment), self._ahead
        if ahead is not None:
            ahead.remember(due)
        for parcel in self._parcels:
            if any(due.moves(p) for p in parcel.tensors) and not (ahead is not None and ahead.has(parcel, due)):
                self._due.setdefault(parcel, []).append(due)

    def ended(self) -> None:
        super().ended()
        self._noted = False

    @property
    def tier(self) -> Tier:
        """Where the weights are at rest."""
        return self._place.tier

    @property
    def files(self) -> DiskTier:
        """The same, for weights that are in files. TypeError for others."""
        if not isinstance(self.tier, DiskTier):
            raise TypeError(f"These weights are in {type(self.tier).__name__}, not in files.")
        return self.tier

    @property
    def parcels(self) -> Sequence[Parcel]:
        """What is moved together."""
        return self._parcels

    @property
    def ahead(self) -> bool:
        """Whether there are weights of later steps than were made, or made again."""
        return any(self._late(parcel) for parcel in self._parcels)

    def note(self, moment: Moment) -> None:
        """The step log has the step that leads to `moment`, which is now made, or skipped."""
        self._moment, self._noted = moment, True
        if self._ahead is not None and moment.step > self._ahead.last:
            self._ahead = None

    @contextmanager
    def of_any_step(self) -> Iterator[None]:
        before, self._any_step = self._any_step, True
        try:
            yield
        finally:
            self._any_step = before

    def bind(self, moment: Moment | None) -> None:
        """The weights are those of `moment`, all of them; None is a moment that no log knows. What an earlier run has left is gone."""
        with self._turns.turn(), held(), _without_modes(), torch.inference_mode(False), torch.no_grad():
            self.flush()
            self._place.settle()
            self._ahead = None
            self._moment = Moment(0) if moment is None else moment
            self._place.tier.settle(self._moment)
            if moment is not None:
                self._place.tier.bind(moment)
            for parcel in self._parcels:
                self._move_in(parcel)

    def adopt(self, made: Moment, found: Mapping[Parcel, tuple[Slot, Moment]], origin: Origin) -> None:
        """Take what a killed run has left in these slots; other parcels have the weights of `made`, from where steps are made again."""
        with self._turns.turn(), held(), _without_modes(), torch.inference_mode(False), torch.no_grad():
            self._place.settle()
            for parcel, (slot, _) in found.items():
                self.files.take(parcel, slot)
            self._place.tier.settle(made)
            for parcel in self._parcels:
                self._move_in(parcel)
            self._moment = made
            self._ahead = Ahead(made, {parcel: moment.step for parcel, (_, moment) in found.items()}, origin) if found else None

    def _late(self, parcel: Parcel) -> bool:
        return self._ahead is not None and not self._any_step and self._ahead.late(parcel, self._moment.step)

    def _go_back(self, parcel: Parcel) -> None:
        """Somebody reads weights of a step that this parcel is ahead of."""
        ahead = self._ahead
        if ahead is not None:
            self._place.settle()
            weights, due = ahead.back(parcel)
            self._place.tier.write(parcel, weights, ahead.made)
            ahead.returned(parcel)
            self._move_in(parcel)
            if due:
                self._due[parcel] = due
