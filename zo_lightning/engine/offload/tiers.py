"""Where parcels are at rest: the interface, and CPU memory, pinned where a device computes. Files: `disk.DiskTier`."""

from __future__ import annotations

import mmap
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo_lightning.engine.messages import say_once
from zo_lightning.engine.offload.lanes import Lanes
from zo_lightning.engine.offload.parcels import Parcel
from zo_lightning.engine.offload.stamps import Moment


class Tier(ABC):
    """The bytes of all parcels; `home` gives those of one as tensors of the CPU."""

    undecided = False
    """Whether there are weights of an earlier run, too, and nobody has said yet which to take."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the parcels were in; what parameters still point to stays."""

    @abstractmethod
    def home(self, parcel: Parcel) -> list[Tensor]:
        """The tensors as they are at rest."""

    @abstractmethod
    def write(self, parcel: Parcel, places: Sequence[Tensor], moment: Moment) -> None:
        """Have these values, those of `moment`. OSError where they can't be written; then it has what it had."""

    def settle(self, moment: Moment) -> None:  # noqa: B027
        """The weights at hand are taken, those of `moment`; an earlier run's are gone."""

    def bind(self, moment: Moment) -> None:  # noqa: B027
        """All parcels are those of this moment."""

    def forget(self, parcel: Parcel) -> None:  # noqa: B027
        """It is not needed in memory just now."""


class Pinned:
    """Stretches of CPU memory, whole pages, pinned where `lanes` can; where that fails, copies wait for their end, which is said once."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes, self._possible = lanes, True
        self._ends: list[tuple[Tensor, Callable[[], None]]] = []
        self.close = weakref.finalize(self, _end, self._ends)
        """Not pinned any more; the memory stays as long as a tensor is in it."""
        self.close.atexit = False  # the process gives everything back

    def allocate(self, nbytes: int, total: int) -> Tensor:
        """Uninitialised bytes (uint8), of `total` that will be asked for. MemoryError where there is no room."""
        try:
            memory = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
        except (MemoryError, OSError, RuntimeError) as error:
            raise MemoryError(
                f"weights=Offload(tier='memory'): there is no room for {total / 1e9:.1f} GB of weights in the CPU's memory ({error}). "
                "Use tier='disk' with a folder on a fast disk."
            ) from error
        if self._possible:
            self._pin(memory)
        return memory

    def _pin(self, memory: Tensor) -> None:
        try:
            end = self._lanes.pin(memory)
        except RuntimeError as error:
            self._possible = False
            why = f"weights=Offload(): CPU memory can't be pinned here ({error}), so copies to and from {self._lanes.device} are slower"
            say_once("offload.pin", f"{why}, and nothing is computed meanwhile. Raise the limit of locked memory (ulimit -l).")
        else:
            self._ends += [] if end is None else [(memory, end)]


class MemoryTier(Tier):
    """Each parcel in one stretch of CPU memory, pinned where a device computes. MemoryError where there is not enough."""

    def __init__(self, parcels: Sequence[Parcel], lanes: Lanes) -> None:
        self._memory, self._total = Pinned(lanes), sum(parcel.nbytes for parcel in parcels)
        self._flat: dict[Parcel, Tensor] = {}
        self._homes: dict[Parcel, list[Tensor]] = {}

    def home(self, parcel: Parcel) -> list[Tensor]:
        """The first time, it is taken in: one after the other, so that memory for a second model is never needed."""
        if parcel not in self._homes:
            flat = self._memory.allocate(parcel.nbytes, self._total)
            homes = parcel.views(_stretches(flat))
            for home, p in zip(homes, parcel.tensors, strict=True):
                home.copy_(p.tensor.detach())
            self._flat[parcel], self._homes[parcel] = flat, homes
        return self._homes[parcel]

    def close(self) -> None:
        self._memory.close()
        self._flat.clear()
        self._homes.clear()

    def flat(self, parcel: Parcel) -> Tensor:
        """All bytes of it (uint8)."""
        return self._flat[parcel]

    def write(self, parcel: Parcel, places: Sequence[Tensor], moment: Moment) -> None:
        for home, place in zip(self._homes[parcel], places, strict=True):
            home.copy_(place)


def _end(ends: list[tuple[Tensor, Callable[[], None]]]) -> None:
    for _, end in ends:
        end()
    ends.clear()


def _stretches(flat: Tensor) -> Callable[[int, int], Tensor]:
    """Bytes of it, with a storage of their own, so that a tensor in them is saved by itself."""
    whole = flat.numpy()
    return lambda begin, end: torch.from_numpy(whole[begin:end])
