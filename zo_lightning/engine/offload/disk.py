"""The disk tier: each parcel in a slot of its own, and spare slots, so that a write that is cut off never hits what is valid."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zo_lightning.engine.offload.mapped import PAGE, Mapped
from zo_lightning.engine.offload.parcels import Parcel

VERSION = 1
_PIECE = 1 << 26
"""Bytes of one read or write; the system takes at most 2 GiB at a time."""


class Slot:
    """A file with room for one parcel, and behind it a stamp: which parcel, after how many steps, and the checksum."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, -(-nbytes // PAGE) * PAGE
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(self.descriptor, 0, self.nbytes + PAGE)  # a full disk is an error now, not in the middle of a run

    def read(self, memory: Tensor) -> None:
        """Fill `memory` (uint8) from the beginning of the file."""
        view = memoryview(memory.numpy())
        for at in range(0, len(view), _PIECE):
            piece = view[at : at + _PIECE]
            if os.preadv(self.descriptor, [piece], at) != len(piece):
                raise OSError(f"{self.path} is shorter than it was made; its weights are lost.")

    def write(self, memory: Tensor, stamp: dict[str, Any]) -> None:
        """The weights, then the stamp."""
        view = memoryview(memory.numpy())
        checksum = 0
        for at in range(0, len(view), _PIECE):
            piece = view[at : at + _PIECE]
            checksum = zlib.crc32(piece, checksum)
            if os.pwritev(self.descriptor, [piece], at) != len(piece):
                raise OSError(f"{self.path} could not be written as a whole. Is the disk full?")
        text = json.dumps({**stamp, "checksum": checksum}).encode()
        os.pwrite(self.descriptor, text.ljust(PAGE, b"\0"), self.nbytes)


class DiskTier:
    """Parcels in files of a folder, which is a temporary one where it is None. OSError where they can't be made."""

    def __init__(self, folder: str | os.PathLike[str] | None, parcels: Sequence[Parcel]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="zo-offload-") if folder is None else folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._lock = _locked(self.folder)
        self._spare: dict[int, Slot] = {}
        self._slots: dict[Parcel, Slot] = {}
        self._homes: dict[Parcel, Mapped] = {}
        for size in {_rounded(parcel) for parcel in parcels}:
            self._spare[size] = Slot(self.folder / f"spare-{size}.bin", size)
        for number, parcel in enumerate(parcels):
            self._slots[parcel] = slot = Slot(self.folder / f"slot-{number:05d}.bin", _rounded(parcel))
            self._homes[parcel] = Mapped(slot.descriptor, slot.nbytes)
        weakref.finalize(self, _close, [slot.descriptor for slot in [*self._slots.values(), *self._spare.values()]])
        _describe(self.folder, parcels)

    def home(self, parcel: Parcel) -> list[Tensor]:
        """The tensors as they are in the file: to be read and written anywhere, at addresses that stay."""
        return parcel.views(self._homes[parcel].stretch)

    def forget(self, parcel: Parcel) -> None:
        """Take the pages that were used at home out of the process's memory."""
        self._homes[parcel].forget()

    def read(self, parcel: Parcel, memory: Tensor) -> None:
        """The parcel's bytes. Blocks."""
        self._slots[parcel].read(memory[: parcel.nbytes])

    def write(self, parcel: Parcel, memory: Tensor, step: int) -> None:
        """The parcel's bytes after `step` steps, into the spare slot, which is its own from then on. Blocks."""
        spare, old = self._spare[_rounded(parcel)], self._slots[parcel]
        spare.write(memory[: parcel.nbytes], {"version": VERSION, "parcel": parcel.name, "step": step})
        self._homes[parcel].move(spare.descriptor)
        self._slots[parcel], self._spare[_rounded(parcel)] = spare, old


def _rounded(parcel: Parcel) -> int:
    return -(-parcel.nbytes // PAGE) * PAGE


def _locked(folder: Path) -> Any:
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"Another run has its weights in {folder}. Give each run a folder of its own.") from None
    return lock


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _describe(folder: Path, parcels: Sequence[Parcel]) -> None:
    entries = [
        {
            "name": parcel.name,
            "bytes": parcel.nbytes,
            "tensors": [
                {"name": p.name, "dtype": str(p.tensor.dtype)[6:], "shape": list(p.tensor.shape), "offset": offset}
                for p, offset in zip(parcel.tensors, parcel.offsets, strict=True)
            ],
        }
        for parcel in parcels
    ]
    (folder / "tier.json").write_text(json.dumps({"version": VERSION, "parcels": entries}, indent=1))
