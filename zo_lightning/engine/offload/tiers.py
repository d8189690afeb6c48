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


class Tier(ABC):
    """The bytes of all parcels; `home` gives those of one as tensors of the CPU."""

    close: Callable[[], object]
    """Give back what the parcels were in; what parameters still point to stays."""

    @abstractmethod
    def home(self, parcel: Parcel) -> list[Tensor]:
        """The tensors as they are at rest."""

    @abstractmethod
    def write(self, parcel: Parcel, places: Sequence[Tensor], step: int) -> None:
        """Have these values, those after `step` steps. OSError where they can't be written; then it has what it had."""

    def fetch(self, parcel: Parcel) -> None:  # noqa: B027
        """Wait until it is in memory."""

    def forget(self, parcel: Parcel) -> None:  # noqa: B027
        """It is not needed in memory just now."""


class MemoryTier(Tier):
    """Each parcel in one stretch of CPU memory, whole pages. MemoryError where there is not enough.

    Where `lanes` can pin memory, the stretches are pinned; where that fails, copies wait for their end, which is said once.
    """

    def __init__(self, parcels: Sequence[Parcel], lanes: Lanes) -> None:
        self._flat: dict[Parcel, Tensor] = {}
        self._homes: dict[Parcel, list[Tensor]] = {}
        ends: list[Callable[[], None]] = []
        self.close = weakref.finalize(self, _end, ends, self._flat)
        self.close.atexit = False  # the process gives everything back
        self.pinned = True
        total = sum(parcel.nbytes for parcel in parcels)
        for parcel in parcels:
            flat = _allocated(parcel.nbytes, total)
            self._pin(flat, lanes, ends)
            self._flat[parcel] = flat
            self._homes[parcel] = parcel.views(_stretches(flat))
            self.write(parcel, [p.tensor.detach() for p in parcel.tensors], 0)

    def _pin(self, flat: Tensor, lanes: Lanes, ends: list[Callable[[], None]]) -> None:
        if not self.pinned:
            return
        try:
            end = lanes.pin(flat)
        except RuntimeError as error:
            self.pinned = False
            why = f"weights=Offload(): CPU memory can't be pinned here ({error}), so copies to and from {lanes.device} are slower"
            say_once("offload.pin", f"{why}, and nothing is computed meanwhile. Raise the limit of locked memory (ulimit -l).")
        else:
            ends += [] if end is None else [end]

    def home(self, parcel: Parcel) -> list[Tensor]:
        return self._homes[parcel]

    def flat(self, parcel: Parcel) -> Tensor:
        """All bytes of it (uint8)."""
        return self._flat[parcel]

    def write(self, parcel: Parcel, places: Sequence[Tensor], step: int) -> None:
        for home, place in zip(self._homes[parcel], places, strict=True):
            home.copy_(place)


def _allocated(nbytes: int, total: int) -> Tensor:
    try:
        return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
    except (MemoryError, OSError, RuntimeError) as error:
        raise MemoryError(
            f"weights=Offload(tier='memory'): there is no room for {total / 1e9:.1f} GB of weights in the CPU's memory ({error}). "
            "Use tier='disk' with a folder on a fast disk."
        ) from error


def _stretches(flat: Tensor) -> Callable[[int, int], Tensor]:
    """Bytes of it, with a storage of their own, so that a tensor in them is saved by itself."""
    whole = flat.numpy()
    return lambda begin, end: torch.from_numpy(whole[begin:end])


def _end(ends: list[Callable[[], None]], flat: dict[Parcel, Tensor]) -> None:
    for end in ends:
        end()
    flat.clear()
