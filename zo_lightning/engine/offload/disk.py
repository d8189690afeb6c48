"""The disk tier: each parcel in a slot of its own, and spare slots, so that a write that is cut off never hits what is valid."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from zo_lightning.engine.offload.folders import clear, describe, describes
from zo_lightning.engine.offload.mapped import PAGE, Mapped, forget
from zo_lightning.engine.offload.parcels import Parcel
from zo_lightning.engine.offload.sources import Source, source_of
from zo_lightning.engine.offload.stamps import Moment, Stamp, checksum, decode
from zo_lightning.engine.offload.tiers import Tier
from zo_lightning.engine.offload.transfers import open_direct, pages, rounded, transfer

try:
    import fcntl
except ImportError:  # Windows, where nothing of this is used
    fcntl = None  # type: ignore[assignment]

_START = Moment(0)


class Slot:
    """A file with room for one parcel, whole pages, and behind it a stamp (stamps.py)."""

    def __init__(self, path: Path, nbytes: int, descriptors: list[int], keep: bool) -> None:
        self.path, self.nbytes = path, nbytes
        if not keep:
            path.unlink(missing_ok=True)  # an earlier one may still be mapped
        self._descriptors, self._own = descriptors, len(descriptors)
        descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        os.posix_fallocate(self.descriptor, 0, self.nbytes + PAGE)  # a full disk is an error now, not in the middle of a run
        direct = open_direct(path)
        self._transfers = self._own if direct is None else len(descriptors)
        descriptors += [] if direct is None else [direct]

    @property
    def descriptor(self) -> int:
        """Of the file; no file once the tier is closed, rather than one that has its number then."""
        return self._descriptors[self._own]

    def read(self, memory: Tensor) -> None:
        """All bytes but the stamp, to whole pages of at least their number."""
        transfer(os.preadv, self._descriptors[self._transfers], memory, self.nbytes)

    def write(self, memory: Tensor) -> None:
        """The same the other way round."""
        transfer(os.pwritev, self._descriptors[self._transfers], memory, self.nbytes)

    def stamp(self, stamp: Stamp) -> None:
        """Say what the slot has now."""
        os.pwrite(self.descriptor, stamp.encode().ljust(PAGE, b"\0"), self.nbytes)

    def stamped(self) -> Stamp | None:
        """What it says that it has; None where it says nothing."""
        return decode(os.pread(self.descriptor, PAGE, self.nbytes))


class DiskTier(Tier):
    """Parcels in files of a folder; without a name where it is None, gone with the process. OSError where they can't be made.

    There is room for all parcels and, of each size, one more. What comes from safetensors files stays there until it is first written.

    Where the folder has the files of an earlier run of the same model, they are left alone (`undecided`), and weights where they are, until
    somebody takes what the slots have (`take`) or has the weights written over them (`settle`). `anew`: they are this run's own, of other
    parcels. ValueError for a folder of another model, or that another run uses.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, parcels: Sequence[Parcel], anew: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="zo-offload-") if folder is None else folder)
        self.lasting = folder is not None
        """Whether the files stay behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptors = [_locked(self.folder)]
        self._leave = weakref.finalize(self, _close, descriptors)
        try:
            self._open(parcels, descriptors, anew)
        except BaseException:
            self.close()
            raise
        finally:
            if not self.lasting:
                shutil.rmtree(self.folder, ignore_errors=True)  # open files stay until nobody has them, however the process ends

    def is_in(self, folder: str | os.PathLike[str] | None) -> bool:
        """Whether these are the files of a folder."""
        return folder is not None and self.lasting and self.folder.exists() and self.folder.samefile(Path(folder))

    def close(self) -> None:
        """Leave the folder to others. What is mapped stays so, but slots can't be used any more."""
        self._leave()

    def _open(self, parcels: Sequence[Parcel], descriptors: list[int], anew: bool) -> None:
        self.undecided = not anew and describes(self.folder, parcels)
        if not self.undecided:
            clear(self.folder)
        wanted = Counter(rounded(parcel.nbytes) for parcel in parcels)
        sizes = [size for size, count in sorted(wanted.items()) for _ in range(count + 1)]
        slots = []
        try:
            for number, size in enumerate(sizes):
                slots.append(Slot(self.folder / f"slot-{number:05d}.bin", size, descriptors, self.undecided))
        except OSError as error:
            if self.lasting and not self.undecided:
                clear(self.folder)
            if error.errno == errno.EMFILE:
                what = f"The weights need {2 * len(sizes)} open files (raise the limit, ulimit -n)"
            else:
                what = f"There is no room for {sum(sizes) / 1e6:.1f} MB of weights"
            why = f"{what} in {self.folder}: {error.strerror}"
            raise OSError(error.errno, why) from error
        self._free: dict[int, list[Slot]] = {size: [slot for slot in slots if slot.nbytes == size] for size in wanted}
        self._slots: dict[Parcel, Slot] = {}
        self._maps: dict[Parcel, Mapped] = {}
        self._parcels = list(parcels)
        self._homes: dict[Parcel, list[Tensor]] = {parcel: [p.tensor.detach() for p in parcel.tensors] for parcel in parcels}
        self._sources: dict[Parcel, list[Source | None]] = {parcel: [source_of(p.tensor) for p in parcel.tensors] for parcel in parcels}
        if not self.undecided:
            self.settle()
            describe(self.folder, parcels)

    def settle(self, moment: Moment = _START) -> None:
        """Write what is neither in a slot nor in a safetensors file to a slot; what slots had before is gone."""
        self.undecided = False
        for parcel in self._parcels:
            if parcel not in self._slots and not self._reads_files(parcel):
                self.write(parcel, self._homes[parcel], moment)

    def write(self, parcel: Parcel, places: Sequence[Tensor], moment: Moment) -> None:
        memory = pages(parcel.nbytes)
        _copy(places, parcel, memory)
        self.write_pages(parcel, memory, moment, checksum(memory))

    def read_pages(self, parcel: Parcel, memory: Tensor) -> None:
        """Read it into whole pages (uint8) of at least its size."""
        if parcel in self._slots:
            self._slots[parcel].read(memory)
        else:
            _copy(self._homes[parcel], parcel, memory)
            memory[parcel.nbytes : rounded(parcel.nbytes)].zero_()
            self.forget(parcel)

    def write_pages(self, parcel: Parcel, memory: Tensor, moment: Moment, sums: str) -> None:
        """Whole pages with this checksum are the parcel at `moment` from now on; what it was is kept until a free slot is needed."""
        size = rounded(parcel.nbytes)
        slot = self._free[size][-1]
        slot.write(memory)
        slot.stamp(Stamp(parcel.name, moment, sums))
        self._put(parcel, self._free[size].pop())

    def _reads_files(self, parcel: Parcel) -> bool:
        """Whether its tensors are the safetensors files: nobody has written to them, in memory, since."""
        return all(source is not None and p.tensor._version == 0 for p, source in zip(parcel.tensors, self._sources[parcel], strict=True))

    def left(self) -> Iterator[tuple[Slot, Stamp]]:
        """The slots that say what they have."""
        for slots in self._free.values():
            for slot in slots:
                stamp = slot.stamped()
                if stamp is not None:
                    yield slot, stamp

    def whole(self, slot: Slot, stamp: Stamp) -> bool:
        """Whether the bytes of a slot are those that were stamped."""
        return _checksum(slot) == stamp.checksum

    def take(self, parcel: Parcel, slot: Slot) -> None:
        """What a free slot has is the parcel from now on."""
        self._free[slot.nbytes].remove(slot)
        self._put(parcel, slot)

    def bind(self, moment: Moment) -> None:
        """All parcels that have slots are those of this moment."""
        for parcel, slot in self._slots.items():
            slot.stamp(Stamp(parcel.name, moment, _checksum(slot)))

    def home(self, parcel: Parcel) -> list[Tensor]:
        """The tensors as they are in the file: to be read and written anywhere, at addresses that stay after it was first written."""
        return self._homes[parcel]

    def forget(self, parcel: Parcel) -> None:
        """Take the pages that were used at home out of the process's memory."""
        if parcel in self._maps:
            self._maps[parcel].forget()
        elif self._reads_files(parcel):
            for tensor in self._homes[parcel]:
                forget(tensor)

    def _put(self, parcel: Parcel, slot: Slot) -> None:
        old = self._slots.get(parcel)
        if parcel in self._maps:
            self._maps[parcel].move(slot.descriptor)
        else:
            self._maps[parcel] = Mapped(slot.descriptor, slot.nbytes)
            self._homes[parcel] = parcel.views(self._maps[parcel].stretch)
        self._slots[parcel] = slot
        if old is not None:
            self._free[old.nbytes].append(old)


def _copy(places: Sequence[Tensor], parcel: Parcel, memory: Tensor) -> None:
    for place, view in zip(places, parcel.views(lambda begin, end: memory[begin:end]), strict=True):
        view.copy_(place)


def _checksum(slot: Slot) -> str:
    memory = pages(slot.nbytes)
    slot.read(memory)
    return checksum(memory)


def _locked(folder: Path) -> int:
    """The descriptor of a file that this process alone has locked, until it is closed."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    for tried in (False, True):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if not tried:
                gc.collect()  # of a model that nobody has any more, but for hooks that refer to each other
    os.close(lock)
    raise ValueError(
        f"Another run has its weights in {folder}, or a model of this process that is still there. Give each run a folder of its own."
    )


def _close(descriptors: list[int]) -> None:
    for index, descriptor in enumerate(descriptors):
        os.close(descriptor)
        descriptors[index] = -1
