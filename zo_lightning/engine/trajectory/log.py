"""Reading a step log: what it holds, what must be true of the order of its records, what is said about damage."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from zo_lightning.engine.journal import StepRecord
from zo_lightning.engine.noise import Basis
from zo_lightning.engine.trajectory.columns import is_export
from zo_lightning.engine.trajectory.encoding import decode
from zo_lightning.engine.trajectory.frames import MAGIC, Damage, LogError, Torn, frames
from zo_lightning.engine.trajectory.records import Checkpoint, End, MaskRecord, Record, Segment
from zo_lightning.engine.updates import GroupSettings

Paths = str | os.PathLike[str]

_LOOK = 4096
"""Bytes that tell an export from other files."""


@dataclass
class History:
    """What the records so far say about the next one: steps follow each other without a gap, except where a segment begins."""

    segment: Segment | None = None
    next_step: int = 0
    settings: tuple[GroupSettings, ...] = ()
    points: int | None = None
    groups: int = 0

    def admit(self, record: Record) -> None:
        """Raise ValueError for a record that can't come next."""
        if isinstance(record, Segment):
            if record.step < self.next_step:
                raise ValueError(f"a segment begins at step {record.step}, but the steps before {self.next_step} are recorded already")
        elif self.segment is None:
            raise ValueError("a log begins with a segment")
        elif isinstance(record, StepRecord):
            self._admit_step(record, self.segment)
        elif isinstance(record, MaskRecord) and len(record.entries) != len(self.segment.parameters):
            raise ValueError(f"a mask has {len(record.entries)} entries, and the segment {len(self.segment.parameters)} parameters")
        elif record.step != self.next_step and not (isinstance(record, Checkpoint) and record.step < self.next_step):
            raise ValueError(f"{type(record).__name__} of step {record.step} comes where {self.next_step} steps are recorded")

    def _admit_step(self, record: StepRecord, segment: Segment) -> None:
        if record.step != self.next_step:
            raise ValueError(f"step {record.step} comes where step {self.next_step} is next: a log only goes on, without gaps")
        changing = segment.noise == Basis.name  # a point for each element of a mask, of which there may be more or less
        if self.points not in (None, len(record.values)) and not changing:
            raise ValueError(f"a step has {len(record.values)} values, those before it have {self.points}")
        if len(record.settings) < self.groups:
            raise ValueError(f"a step has settings of {len(record.settings)} groups; the parameters are in more")
        if record.passes and segment.residency != "inplace":
            raise ValueError(f'a step has passes over weights that are perturbed with weights="{segment.residency}"')

    def add(self, record: Record) -> None:
        """Take in a record that was admitted."""
        if isinstance(record, Segment):
            self.segment, self.next_step, self.settings, self.points = record, record.step, (), None
            self.groups = 1 + max(entry.group for entry in record.parameters)
        elif isinstance(record, StepRecord):
            self.next_step, self.settings, self.points = record.step + 1, record.settings, len(record.values)


@dataclass
class Log:
    """What a file holds. `torn_bytes` at its end are a last record that is incomplete or damaged, and not among the records."""

    path: Path
    records: list[Record]
    torn_bytes: int = 0
    end_step: int = 0
    """How many steps had been made at the end."""
    moments: dict[int, int] = field(default_factory=dict)
    """By the number of steps made, since the last segment began, the chain of the log then."""
    torn: str = ""
    """What is wrong with the last record, and that it is cut off; "" for a whole log."""
    _end: End | None = field(default=None, repr=False)

    @property
    def segments(self) -> list[Segment]:
        return [record for record in self.records if isinstance(record, Segment)]

    @property
    def steps(self) -> list[StepRecord]:
        return [record for record in self.records if isinstance(record, StepRecord)]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return [record for record in self.records if isinstance(record, Checkpoint)]

    @property
    def masks(self) -> list[MaskRecord]:
        return [record for record in self.records if isinstance(record, MaskRecord)]

    @property
    def end(self) -> End | None:
        """Where the run ended by itself and no step came after it."""
        return self._end


class Entry(NamedTuple):
    """A record, where its frame ends, and the chain after it."""

    record: Record
    end: int
    chain: int


def read_log(path: Paths, *, keep: Callable[[Record], bool] | None = None) -> Log:
    """Read a whole log; records for which `keep` is false are checked and then dropped.

    Raises LogError for damage (but for a torn last record, which is reported), OSError where the file can't be read.
    """
    log = Log(Path(path), [])
    history = History()
    for entry in scan(log.path, history):
        if isinstance(entry, Torn):
            log.torn_bytes = entry.size - entry.begin
            log.torn = (
                f"the last record ({log.torn_bytes} bytes at byte {entry.begin}) is left out, because {entry.problem}: a write that was "
                "interrupted, or damage. It is cut off when the run goes on"
            )
            break
        if keep is None or keep(entry.record):
            log.records.append(entry.record)
        if isinstance(entry.record, (StepRecord, Segment, End)):
            log._end = entry.record if isinstance(entry.record, End) else None
        if isinstance(entry.record, Segment):
            log.moments = {entry.record.step: entry.chain}
        elif isinstance(entry.record, StepRecord):
            log.moments[entry.record.step + 1] = entry.chain
    log.end_step = history.next_step
    return log


def scan(path: Path, history: History) -> Iterator[Entry | Torn]:
    """The records of a file, which `history` takes in; `Torn` is the last thing, if it comes."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(len(MAGIC))
        if magic[:-1] != MAGIC[:-1]:
            if is_export(magic + file.read(_LOOK)):
                raise LogError(
                    f"{path} is an export (the steps of a log, for sharing), not the log itself. Give its path to `apply`, which makes its "
                    "steps on a model with the base weights, or to `load`, which reads them (both in zo_lightning.engine.trajectory)."
                )
            raise LogError(f"{path} is not a step log: it does not begin like one. Give the path of a log.")
        if magic != MAGIC:
            raise LogError(
                f"{path} is a step log of version {magic[-1:].hex()}; this release reads {MAGIC[-1:].hex()}. Use the release it is of."
            )
        for index, frame in enumerate(frames(file, size)):
            if isinstance(frame, (Torn, Damage)):
                if isinstance(frame, Damage) or history.segment is None:
                    problem = frame.problem if isinstance(frame, Damage) else "the first record is not complete"
                    raise _damaged(path, index, frame.begin, problem, history)
                yield frame
                return
            try:
                record = decode(frame.kind, frame.flags, frame.payload, history.settings)
                history.admit(record)
            except ValueError as error:
                raise _damaged(path, index, frame.begin, str(error), history) from error
            history.add(record)
            yield Entry(record, frame.end, frame.chain)
        if history.segment is None:
            raise _damaged(path, 0, size, "there is no record", history)


def _damaged(path: Path, index: int, begin: int, problem: str, history: History) -> LogError:
    if history.segment is None:
        advice = "Nothing of it can be used: begin a new log."
    else:
        advice = (
            f"What comes before, up to step {history.next_step}, is intact: go back to a backup, or give up the rest with "
            f"`truncate -s {begin} {path}` on a copy."
        )
    return LogError(f"{path} is damaged at byte {begin} (record {index}): {problem}. {advice}")
