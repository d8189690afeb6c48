"""Where a parcel's bytes are while somebody uses it: the interface, and files that are used where they are mapped."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_lightning.engine.noise import Noise
from zo_lightning.engine.offload.disk import DiskTier
from zo_lightning.engine.offload.due import Due, make_between
from zo_lightning.engine.offload.parcels import Parcel
from zo_lightning.engine.offload.tiers import Tier


@dataclass
class Traffic:
    """What was moved since the run began: bytes of parcels that were used and written, seconds that computing waited for them."""

    read: int = 0
    written: int = 0
    waited: float = 0.0


class Place(ABC):
    """Lends the tensors of parcels, brought up to date. `due` has the changes that each parcel still lacks, and belongs to the caller, too.

    What is lent is at home, or a copy that is read only; a parcel is lent once at a time. Not to be called by two threads at once.
    """

    def __init__(self, tier: Tier, device: torch.device) -> None:
        self.tier, self.device = tier, device
        self.due: dict[Parcel, list[Due]] = {}
        self.traffic = Traffic()

    @abstractmethod
    def begin(self, parcel: Parcel, noise: Noise, watched: bool) -> list[Tensor]:
        """Tensors with all changes, valid for what is computed from now on until `end`. Where it raises, nothing is lent or lost.

        `watched`: it is noted who reads them, so that views of them that outlive `end` must be told from what is lent later.
        """

    @abstractmethod
    def end(self, parcel: Parcel) -> None:
        """What was lent is not used any more."""

    def announce(self, parcels: Sequence[Parcel]) -> None:  # noqa: B027
        """These will follow, in this order."""

    def settle(self) -> None:  # noqa: B027
        """Wait until all that was changed is at home; forget what was fetched ahead. OSError where it can't be written."""


class AtHome(Place):
    """The mapped files themselves: an update is made on the way from the slot to a free one."""

    tier: DiskTier

    def __init__(self, tier: DiskTier, device: torch.device) -> None:
        super().__init__(tier, device)
        self._copies: dict[Parcel, Tensor] = {}
        self._free: dict[int, list[Tensor]] = {}

    def begin(self, parcel: Parcel, noise: Noise, watched: bool) -> list[Tensor]:
        due = self.due.get(parcel)
        if due:
            make_between(parcel, due, self.tier.home(parcel), self.tier.draft(parcel), noise)
            self.tier.commit(parcel, due[-1].moment)
            del self.due[parcel]
            self.traffic.written += parcel.nbytes
        began = time.perf_counter()
        self.tier.fetch(parcel)
        self.traffic.waited += time.perf_counter() - began
        self.traffic.read += parcel.nbytes
        return self.tier.home(parcel) if watched or self.tier.moved_in(parcel) else self._copied(parcel)

    def _copied(self, parcel: Parcel) -> list[Tensor]:
        """Matrix kernels may round differently on memory that is not aligned, as tensors in safetensors files are not."""
        free = self._free.setdefault(parcel.nbytes, [])
        memory = free.pop() if free else torch.empty(parcel.nbytes, dtype=torch.uint8)
        views = parcel.views(lambda begin, end: memory[begin:end])
        for home, view in zip(self.tier.home(parcel), views, strict=True):
            view.copy_(home)
        self.tier.forget(parcel)
        self._copies[parcel] = memory
        return views

    def end(self, parcel: Parcel) -> None:
        memory = self._copies.pop(parcel, None)
        if memory is not None:
            self._free[parcel.nbytes].append(memory)
        self.tier.forget(parcel)

    def announce(self, parcels: Sequence[Parcel]) -> None:
        for parcel in parcels[:1]:
            self.tier.announce(parcel)
