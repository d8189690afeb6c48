"""Appending to a step log: whole records or nothing, by one process at a time."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from zo_lightning.engine.signals import held
from zo_lightning.engine.trajectory.atomic import explained, flush_folder, temporary_name
from zo_lightning.engine.trajectory.encoding import encode
from zo_lightning.engine.trajectory.frames import FIRST_CHAIN, MAGIC, Torn, pack
from zo_lightning.engine.trajectory.log import History, Paths, scan
from zo_lightning.engine.trajectory.records import Checkpoint, End, Record, Segment

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Fsync = str | int
"""When records are forced to the disk: "step", an integer n (every n steps), or "checkpoint". A killed process never loses one."""


class LogWriter:
    """Appends records to the log at `path`; made by `create` and `open`, closed by `close` or at the end of a with block.

    A record that can't be written whole is taken back, so that the file is a valid log at any time and the writer can be used again.
    """

    def __init__(self, path: Path, number: int, fsync: Fsync) -> None:
        self.path = path
        self.history = History()
        self.torn_bytes = 0
        """What `open` cut off."""
        self._number = number
        self._fsync = fsync
        self._end, self._chain = len(MAGIC), FIRST_CHAIN
        self._clean = True
        self._unsynced = 0
        _open_writers.add(self)

    @classmethod
    def create(cls, path: Paths, segment: Segment, *, fsync: Fsync = "checkpoint") -> LogWriter:
        """A new log that begins with `segment`. FileExistsError where there is one, OSError where none can be written."""
        target = Path(path)
        check_fsync(fsync)
        frame, chain = pack(*encode(segment, ()), FIRST_CHAIN)
        temporary = temporary_name(target)
        number = -1
        try:
            number = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
            _lock(number, target)
            _write(number, MAGIC + frame)
            os.fsync(number)
            _take_name(temporary, target)
            flush_folder(target.parent)
        except FileExistsError as error:
            _give_up(number, temporary)
            message = "There is a log already; go on with it (LogWriter.open) or take another name"
            raise FileExistsError(error.errno, message, str(target)) from error
        except OSError as error:
            _give_up(number, temporary)
            raise explained(error, f"The step log {target} could not be created", target) from error
        except BaseException:
            _give_up(number, temporary)
            raise
        writer = cls(target, number, fsync)
        writer.history.add(segment)
        writer._end, writer._chain = len(MAGIC) + len(frame), chain
        return writer

    @classmethod
    def open(cls, path: Paths, *, fsync: Fsync = "checkpoint") -> LogWriter:
        """Go on with a log; a torn last record is cut off. LogError for other damage, BlockingIOError where another process appends."""
        target = Path(path)
        check_fsync(fsync)
        try:
            number = os.open(target, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise explained(error, f"The step log {target} could not be opened", target) from error
        writer = cls(target, number, fsync)
        try:
            _lock(number, target)
            writer._catch_up()
        except BaseException:
            writer.close()
            raise
        return writer

    def _catch_up(self) -> None:
        for entry in scan(self.path, self.history):
            if isinstance(entry, Torn):
                self.torn_bytes = entry.size - entry.begin
                os.ftruncate(self._number, self._end)
                os.fsync(self._number)
            else:
                self._end, self._chain = entry.end, entry.chain

    def append(self, record: Record) -> None:
        """Write one record. ValueError for one that can't come next, OSError (and no change of the file) where it can't be written."""
        if self._number < 0:
            raise ValueError(f"The step log {self.path} is closed. Open it again with LogWriter.open.")
        frame, chain = pack(*encode(record, self.history.settings), self._chain)
        self.history.admit(record)
        with held():
            try:
                if not self._clean:
                    self._take_back()
                self._clean = False
                _write(self._number, frame)
                self._sync_after(record)
            except OSError as error:
                with suppress(OSError):  # then before the next append
                    self._take_back()
                what = f"Step {record.step} was not written to the step log {self.path}, which ends before it"
                raise explained(error, what, self.path) from error
            self._clean = True
            self._end, self._chain = self._end + len(frame), chain
            self.history.add(record)

    def _take_back(self) -> None:
        """Cut off what an append that failed has left."""
        os.ftruncate(self._number, self._end)
        self._clean = True

    def _sync_after(self, record: Record) -> None:
        self._unsynced += 1
        every = {"step": 1, "checkpoint": None}[self._fsync] if isinstance(self._fsync, str) else self._fsync
        if isinstance(record, (Segment, Checkpoint, End)) or (every is not None and self._unsynced >= every):
            self.sync()

    @property
    def chain(self) -> int:
        """The chain after the last record."""
        return self._chain

    def sync(self) -> None:
        """Wait until everything that was appended is on the disk. OSError where it does not get there."""
        os.fsync(self._number)
        self._unsynced = 0

    def close(self) -> None:
        """Flush and close; the log can be opened again, by anybody."""
        number, self._number = self._number, -1
        if number < 0:
            return
        try:
            if self._unsynced:
                os.fsync(number)
        finally:
            if fcntl is not None:
                fcntl.flock(number, fcntl.LOCK_UN)  # a forked process may still have the file open
            os.close(number)

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def first_chain(segment: Segment) -> int:
    """The chain of a log that begins with `segment`."""
    return pack(*encode(segment, ()), FIRST_CHAIN)[1]


def check_fsync(fsync: Fsync) -> None:
    """Raise ValueError for what is no policy."""
    if fsync not in ("step", "checkpoint") and (not isinstance(fsync, int) or isinstance(fsync, bool) or fsync < 1):
        raise ValueError(f"Invalid fsync: {fsync!r}. Must be 'step', 'checkpoint', or an integer >= 1 (every so many steps).")


def _write(number: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(number, view) :]


def _lock(number: int, path: Path) -> None:
    """Advisory, for as long as the file is open."""
    if fcntl is None:
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = (
            "Another run appends to this step log. Wait until it has ended (one of this process: close its log, as in "
            "`finally: log.close(optimizer)`), or give this run a folder of its own"
        )
        raise BlockingIOError(error.errno, message, str(path)) from error
    except OSError:  # a file system without locks
        return


@contextmanager
def unused(path: Path) -> Iterator[None]:
    """Inside it nobody appends to the log at `path`. BlockingIOError where a process does."""
    if fcntl is None:  # and an open file keeps its name
        yield
        return
    number = os.open(path, os.O_RDWR)
    try:
        _lock(number, path)
        yield
    finally:
        os.close(number)


def set_aside(path: Path) -> None:
    """Give a log that is not continued another name, unless a process still appends to it."""
    if path.exists():
        number = 1
        while (aside := path.with_name(f"{path.stem}-{number:03d}{path.suffix}")).exists():
            number += 1
        with unused(path):
            os.rename(path, aside)


def _take_name(temporary: Path, target: Path) -> None:
    """Rename, but never over a file that is there."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(target)) from None
        os.replace(temporary, target)
    else:
        temporary.unlink()


def _give_up(number: int, temporary: Path) -> None:
    if number >= 0:
        os.close(number)
    with suppress(OSError):
        temporary.unlink()


_open_writers: weakref.WeakSet[LogWriter] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked process (a DataLoader's worker) must not keep the lock of a run that was killed: close its copies."""
    for writer in list(_open_writers):
        number, writer._number = writer._number, -1
        if number >= 0:
            os.close(number)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
