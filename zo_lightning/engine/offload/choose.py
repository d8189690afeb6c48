"""The option `weights=Offload(...)`, and what it means for a model and a device."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from zo_lightning.engine.messages import choose
from zo_lightning.engine.offload.buffers import InBuffers
from zo_lightning.engine.offload.disk import DiskTier
from zo_lightning.engine.offload.lanes import PageLanes, lanes_of
from zo_lightning.engine.offload.parcels import Parcel
from zo_lightning.engine.offload.routes import Files, Staged, Straight
from zo_lightning.engine.offload.tiers import MemoryTier

TIERS: dict[str, object] = {"auto": None, "disk": DiskTier, "memory": MemoryTier}


@dataclass(frozen=True)
class Offload:
    """Where weights live that do not fit where they are computed with, for `weights=`.

    Args:
        folder: of the files; None: they have no name, and are gone with the process.
        tier: "disk", files; "memory", the CPU's memory, pinned for a GPU (with the CPU as device it saves nothing and is for trying it
            out); "auto", files where a folder is given or the device is the CPU, else memory.
        device: where forward passes run, "cpu" or "cuda"; None: where the model is, or what the host chose.
        lockstep: True: the evaluations of a step take turns at the borders of blocks, on threads, so that a block is read once for all of
            them; False: one after another. None: in lockstep where each is sure to compute what it computes alone, which is said.

    Raises ValueError for another tier or device, and for a folder of tier="memory".
    """

    folder: str | os.PathLike[str] | None = None
    tier: str = "auto"
    device: str | None = None
    lockstep: bool | None = None

    def __post_init__(self) -> None:
        choose("tier", self.tier, TIERS, "nothing else")
        if self.folder is not None:
            object.__setattr__(self, "folder", self._path())
        if self.lockstep not in (True, False, None):
            raise ValueError(f"Offload(lockstep={self.lockstep!r}): it is True, False, or None (where it is safe).")
        if self.tier == "memory" and self.folder is not None:
            raise ValueError(f"Offload(folder={self.folder!r}, tier='memory'): weights in memory have no files. Leave one of the two out.")
        if self.device is not None:
            try:
                kind = torch.device(self.device).type
            except RuntimeError as error:
                raise ValueError(f"Offload(device={self.device!r}) is no device: {str(error).splitlines()[0]}") from error
            if kind not in ("cpu", "cuda"):
                raise ValueError(f"Offload(device={self.device!r}): blocks are streamed to 'cpu' and to 'cuda' devices so far.")
            if kind == "cuda" and not torch.cuda.is_available():
                raise ValueError(f"Offload(device={self.device!r}): torch finds no GPU here. Leave device out, or use 'cpu'.")

    def _path(self) -> str:
        try:
            return os.fsdecode(self.folder)  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"Offload(folder={self.folder!r}) is no path.") from error

    def device_of(self, module: nn.Module) -> torch.device:
        """Where forward passes run. ValueError for a model that lies elsewhere."""
        there = {p.device for p in module.parameters() if not p.is_meta and p.device.type != "cpu"}
        chosen = next(iter(there), torch.device("cpu")) if self.device is None else torch.empty(0, device=self.device).device
        others = there - {chosen}
        if others:
            raise ValueError(
                f"weights=Offload(): forward passes run on {chosen}, and a part of the model is on {others.pop()}. Keep the model on the "
                "CPU: blocks are brought to the device while they run."
            )
        return chosen

    def place(self, parcels: Sequence[Parcel], device: torch.device, anew: bool = False) -> InBuffers:
        """Where the parcels go, with what they have now. OSError or MemoryError where there is no room.

        `anew`: the files that are there are this run's own.
        """
        on_disk = self.folder is not None or device.type == "cpu" if self.tier == "auto" else self.tier == "disk"
        if on_disk and sys.platform != "linux":
            raise ValueError(f"weights=Offload() streams from files on Linux so far; this is {sys.platform}. Use weights='exact'.")
        if on_disk and device.type == "cpu":
            tier = DiskTier(self.folder, parcels, anew)
            return InBuffers(tier, PageLanes(device), Files(tier), max(parcel.nbytes for parcel in parcels))
        return in_buffers(DiskTier(self.folder, parcels, anew) if on_disk else None, parcels, device)


def in_buffers(tier: DiskTier | None, parcels: Sequence[Parcel], device: torch.device) -> InBuffers:
    """Buffers of the device, filled by threads from a tier of files, or straight from memory where `tier` is None."""
    lanes, largest = lanes_of(device), max(parcel.nbytes for parcel in parcels)
    if tier is not None:
        return InBuffers(tier, lanes, Staged(tier, lanes, largest), largest)
    memory = MemoryTier(parcels, lanes)
    return InBuffers(memory, lanes, Straight(memory, lanes), largest)
