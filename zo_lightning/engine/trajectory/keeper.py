"""The step log of a run: begun, continued after a kill, written before each step is applied, closed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zo_lightning.engine.changed import State, Watch, same
from zo_lightning.engine.journal import Journal, StepRecord, Unrecorded
from zo_lightning.engine.masks.rules import Chosen
from zo_lightning.engine.messages import say_once
from zo_lightning.engine.offload.stamps import Moment
from zo_lightning.engine.shards import any_sharded, part
from zo_lightning.engine.trajectory.atomic import explained
from zo_lightning.engine.trajectory.comparing import NAME, describe, differs, noted_path
from zo_lightning.engine.trajectory.fingerprint import frozen_fingerprint, trained_fingerprint
from zo_lightning.engine.trajectory.log import Log, read_log
from zo_lightning.engine.trajectory.masks import chosen_of, follow, record_of
from zo_lightning.engine.trajectory.records import LOST, MAX_POINTS, Checkpoint, End, Mark, MaskRecord, Record, Segment
from zo_lightning.engine.trajectory.tiers import Left, bind, go_on, lasting, look, note
from zo_lightning.engine.trajectory.weights import base_of, save_base
from zo_lightning.engine.trajectory.writer import Fsync, LogWriter, first_chain, set_aside

if TYPE_CHECKING:
    from zo_lightning.engine.optimizer import ZOOptimizer

_BASES = 2
"""Base files of later segments that are kept beside the first one."""


class Trajectory(Journal):
    """What `ZOOptimizer.journal` is while a step log is kept in `folder`.

    `begin` decides from the weights, `ZOOptimizer.steps` and what the folder holds whether an earlier process was killed here: then its
    steps are made again from their records (`recall`), and new ones appended behind them.
    """

    def __init__(self, folder: str | os.PathLike[str], *, fsync: Fsync = "checkpoint", save_base: bool = True, traces: bool | None = None):
        self.folder = Path(folder)
        self._fsync, self._save_base, self._traces = fsync, save_base, traces
        self._writer: LogWriter | None = None
        self._ahead: dict[int, StepRecord] = {}
        self._segments: dict[tuple[int, bool], Segment] = {}
        self._masks: dict[int, MaskRecord] = {}
        self._moments: dict[int, int] = {}
        self._left: Left | None = None
        self._given = False
        """Whether the weights at the beginning were those of that step, and not only what the folder of an `Offload` has."""
        self._segment: Segment | None = None
        self._watch = Watch()
        self._state: State | None = None
        self._within = False
        """Whether the weights were changed since the first micro-batch of this step."""
        self._residency: Any = None
        self._standing = ""
        self._bases: list[str] = []
        self._checkpoints: set[str] = set()
        self._making: int | None = None
        self._optimizer: ZOOptimizer | None = None
        self.recalled = 0
        """Steps of an earlier process that were made from their records."""

    @property
    def path(self) -> Path:
        """The log."""
        return self.folder / NAME

    @property
    def behind(self) -> int:
        """Steps of an earlier process that are still to be made again."""
        return len(self._ahead)

    # ---- a run begins

    def begin(self, optimizer: ZOOptimizer, resume: bool | str = "auto") -> None:
        """Open or continue the log for an optimizer that stands at `optimizer.steps`; sets `optimizer.journal`.

        `resume`: "auto" continues a run that was killed, and begins a new log (the old one keeps another name) where there is none to
        continue; True also continues one that ended by itself, and raises ValueError where there is none; False always begins a new one.
        OSError where the folder can't be written, LogError for a damaged log.
        """
        if optimizer.tail.backprop is not None:
            raise ValueError(
                "A step log has the numbers that an update was made of, and those of backprop= are gradients as large as its parameters. "
                "Leave TrajectoryLog (or Trajectory) out and keep the host's checkpoints, from which a run goes on bit for bit, or leave "
                "backprop out."
            )
        points = len(optimizer.estimator.points(lambda query: query)) + len(optimizer.estimator.along) if optimizer.moves else 0
        if points > MAX_POINTS:
            raise ValueError(
                f'A step log of weights="inplace" notes moves between at most {MAX_POINTS} points, and this estimator evaluates {points}. '
                'Use fewer queries, or weights="exact" or "copy".'
            )
        exchange = optimizer.exchange
        first = exchange.rank == 0
        if any_sharded(optimizer.residency.trained):  # all ranks look at the weights together
            log = self._continuable(optimizer, resume, exchange.share(self._known(resume) if first else None))
        else:
            log = exchange.share(self._continuable(optimizer, resume, self._known(resume)) if first else None)
        if log is None:
            self._create(optimizer, first)
        else:
            self._continue(optimizer, log, first)
        self._optimizer, optimizer.journal = optimizer, self
        self.remember(optimizer)

    def _known(self, resume: bool | str) -> Log | None:
        """The log that is there, unless it is not to be gone on with."""
        if resume not in (True, False, "auto"):
            raise ValueError(f"Invalid resume: {resume!r}. Use 'auto', True (only go on), or False (always begin anew).")
        return read_log(self.path) if resume is not False and self.path.exists() else None

    def _continuable(self, optimizer: ZOOptimizer, resume: bool | str, log: Log | None) -> Log | None:
        """The log to go on with, if it can be; its last segments and steps alone are looked at."""
        problem: str | None = "there is no log in it"
        if log is not None:
            problem = self._differs(optimizer, log, ended=resume is True)
            if problem is None:
                return log
        if resume is True:
            raise ValueError(f"resume=True, but the run in {self.folder} can't be continued: {problem}. Use resume='auto' to begin anew.")
        if resume == "auto" and log is not None:
            say_once(f"trajectory.{self.path}", f"A new step log begins in {self.folder}; the old one is kept, because {problem}.")
        return None

    def _differs(self, optimizer: ZOOptimizer, log: Log, ended: bool) -> str | None:
        """Why a log can't be continued at this step; None where it can, and the weights are then those of that run.

        `ended`: steps of a run that ended by itself are made again as well.
        """
        step = optimizer.steps
        if log.end is not None and step < log.end_step and not ended:
            return (
                f"the run of the old one ended by itself after {log.end_step} steps, and this one begins at step {step} (resume=True would "
                "go on with it)"
            )
        problem = differs(optimizer, log)
        if problem is not None:
            return problem
        inplace = optimizer.residency.name == "inplace"
        begins = any(segment.step == step for segment in log.segments)
        if not begins and not inplace and not optimizer.masters.cover(optimizer.residency.trained, whole=optimizer.forward_passes > 0):
            return "the checkpoint came without the optimizer's state, which has the float32 values of 16-bit vectors"
        if not self._stands(optimizer, log):
            if self._left is not None and (self._left.found or self._left.torn):
                raise ValueError(
                    f"The run in {self.folder} has its weights in {self._left.folder}, but can't go on from there: "
                    f"{self._left.problem or 'the tensors that are not streamed are not there'}, the model's weights are not those after "
                    f"{step} steps, and there is no base file. Give the model the weights that the run began with, or begin anew with "
                    "resume=False, which gives up what it has learned."
                )
            return f"the weights are not those of that run after {step} steps, and it has no file of them"
        return None

    def _stands(self, optimizer: ZOOptimizer, log: Log) -> bool:
        """Whether the weights are those of the log at this step, loaded from the file of the first segment that begins here if need be."""
        step = optimizer.steps
        known = {r.fingerprint for r in log.records if isinstance(r, (Segment, Mark, End)) and r.step == step}
        self._standing = _fingerprint(optimizer)
        self._left, self._given = look(optimizer, log), self._standing in known
        if self._given:
            return True
        if self._left is not None and self._left.complete:
            self._standing = next((segment.fingerprint for segment in log.segments if segment.step == step), "")
            return True
        for segment in log.segments:
            if segment.step == step and self._load(optimizer, segment):
                self._standing, self._given = segment.fingerprint, True
                return True
        return False

    def _load(self, optimizer: ZOOptimizer, segment: Segment) -> bool:
        """Give the optimizer the weights that a segment begins with, from its file."""
        loaded, goals = base_of(segment, self.folder), {p.name: p for p in optimizer.residency.trained}
        if loaded is None or goals.keys() != {p.name for p in loaded}:
            return False
        with optimizer.residency.settled(), torch.inference_mode(False), torch.no_grad():
            for source in loaded:
                goal = goals[source.name]
                goal.tensor.copy_(part(source.tensor, goal.region).view(goal.tensor.shape))
        return True

    def _continue(self, optimizer: ZOOptimizer, log: Log, first: bool) -> None:
        step = optimizer.steps
        if any(segment.step == step for segment in log.segments):
            optimizer.forget()
        if first:
            self._writer = LogWriter.open(self.path, fsync=self._fsync)
        elif not any_sharded(optimizer.residency.trained):  # these have looked together
            self._stands(optimizer, log)
        self._segment, self._residency = log.segments[-1], optimizer.residency
        self._bases = [segment.base for segment in log.segments if segment.base is not None]
        self._ahead = {record.step: record for record in log.steps if record.step >= step}
        self._checkpoints = {record.path for record in log.checkpoints}
        self._segments = {(segment.step, segment.within): segment for segment in log.segments if segment.step >= step}
        first_one = self._segments.get((step, False))
        if first_one is not None and first_one.fingerprint == self._standing:
            del self._segments[step, False]
        self._masks = {record.step: record for record in log.masks if record.step in self._ahead}
        self._moments = log.moments
        go_on(optimizer, log, self._left, self._given)
        if self._ahead and first:
            say_once(
                f"trajectory.recall.{self.path}",
                f"The run in {self.folder} was cut off after {log.end_step} steps. It goes on from step {step}: {len(self._ahead)} steps "
                "are made again from their records, without their forward passes.",
            )

    def _create(self, optimizer: ZOOptimizer, first: bool) -> None:
        segment = self._new_segment(optimizer, first)
        if first:
            bind(optimizer, Moment(segment.step, first_chain(segment)))  # before there is a log that would be continued
            set_aside(self.path)
            self._writer = LogWriter.create(self.path, segment, fsync=self._fsync)
        self._begun(optimizer, segment)

    def _new_segment(self, optimizer: ZOOptimizer, first: bool) -> Segment:
        trained = optimizer.residency.trained
        fingerprint = _fingerprint(optimizer)
        frozen = "" if optimizer.module is None else frozen_fingerprint(optimizer.module, trained)
        base = f"base-{optimizer.steps:08d}-{fingerprint[:8]}.safetensors" if self._save_base else None
        if first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise explained(error, f"The folder {self.folder} of the step log could not be made", self.folder) from error
        if base is not None and (first or any_sharded(trained)):
            with optimizer.residency.settled():
                save_base(self.folder / base, trained, writing=first)
        optimizer.forget()  # a replay begins with the weights alone
        return describe(optimizer, fingerprint, frozen, base)

    def _begun(self, optimizer: ZOOptimizer, segment: Segment) -> None:
        """The log has it."""
        self._segment, self._residency = segment, optimizer.residency
        self._bases += [segment.base] if segment.base is not None else []
        self._state = self._watch.state(optimizer.residency)
        if optimizer.masks.number is not None:
            self._note_mask(optimizer)

    # ---- a step

    def chosen(self, optimizer: ZOOptimizer) -> Chosen | None:
        record, residency = self._masks.get(optimizer.steps), lasting(optimizer)
        if record is None or residency is None or self._segment is None or not residency.ahead:
            return None
        return chosen_of(record, self._segment.parameters, self.folder, {p.name: p.tensor.device for p in residency.trained})

    def mask(self, optimizer: ZOOptimizer) -> None:
        if optimizer.steps not in self._ahead:
            self._note_mask(optimizer)
        elif self._segment is not None:
            follow(optimizer, self._masks.get(optimizer.steps), self._segment, self.folder)

    def _note_mask(self, optimizer: ZOOptimizer) -> None:
        if self._writer is not None:
            self._writer.append(record_of(optimizer.masks, optimizer.steps, optimizer.residency.trained, self.folder))

    def recall(self, step: int, updating: bool) -> StepRecord | None:
        record = self._ahead.get(step)
        if self._optimizer is not None:
            self._follow(self._optimizer, updating)
        self._making = None if record is None else step
        return record

    def look(self, optimizer: ZOOptimizer, micro_batches: int, updating: bool) -> None:
        self._follow(optimizer, updating)
        if optimizer.steps in self._ahead:
            if updating:
                note(optimizer, Moment(optimizer.steps + 1, self._moments.get(optimizer.steps + 1)))
            return
        self._within = self._changed_set(optimizer) or self._changed(optimizer) or (self._within and micro_batches > 0)
        if not self._within or (micro_batches and not updating):
            return
        self._within = False
        segment = dataclasses.replace(self._new_segment(optimizer, self._writer is not None), within=micro_batches > 0)
        if self._writer is not None:
            self._writer.append(segment)
            bind(optimizer, Moment(segment.step, self._writer.chain))
        self._begun(optimizer, segment)
        self._forget_bases()

    def _follow(self, optimizer: ZOOptimizer, updating: bool) -> None:
        """Where weights were changed by others between two recorded steps: they have changed again by now, or are loaded."""
        for within in (False, True) if updating else (False,):
            segment = self._segments.pop((optimizer.steps, within), None)
            if segment is not None:
                self._follow_to(optimizer, segment)

    def _follow_to(self, optimizer: ZOOptimizer, segment: Segment) -> None:
        if _fingerprint(optimizer) != segment.fingerprint and not self._load(optimizer, segment):
            raise ValueError(
                f"At step {segment.step} the run in {self.folder} went on from other weights than its steps had led to, and their file "
                f"({segment.base}) is not there, or other parameters are trained here. Resume from a later checkpoint, or begin anew "
                "with resume=False."
            )
        optimizer.forget()
        self._state = self._watch.state(optimizer.residency)

    def _changed_set(self, optimizer: ZOOptimizer) -> bool:
        """Whether other tensors are trained than before."""
        if self._residency is optimizer.residency or self._segment is None:
            return False
        if describe(optimizer, "", "", None).parameters != self._segment.parameters:
            return True
        self._residency = optimizer.residency
        return False

    def _changed(self, optimizer: ZOOptimizer) -> bool:
        if self._state is None or same(self._state, self._watch.state(optimizer.residency)):
            return False
        where = "written as a new base" if self._save_base else "noted; without save_base they can't be loaded again"
        say_once(
            "trajectory.changed",
            f"Before step {optimizer.steps} the trained weights were changed by something else than a step. They are {where}. If this "
            "happens often (clamping, weight averaging), each time costs a copy of the weights.",
        )
        return True

    def _forget_bases(self) -> None:
        """Keep the files of the first and of the newest segments of this log."""
        kept = {self._bases[0], *self._bases[-_BASES:]} if self._bases else set()
        if self._writer is not None:
            for base in set(self._bases) - kept:
                (self.folder / base).unlink(missing_ok=True)

    def append(self, record: StepRecord) -> None:
        if self._writer is not None:
            traces = record.traces or record.idle > 0 if self._traces is None else self._traces  # idle windows have a first one
            self._writer.append(dataclasses.replace(record, traces=traces))
            if self._optimizer is not None:
                note(self._optimizer, Moment(record.step + 1, self._writer.chain))

    def remember(self, optimizer: ZOOptimizer) -> None:
        if self._making is not None:
            del self._ahead[self._making]
            self._making = None
            self.recalled += 1
        if not self._ahead:
            self._state = self._watch.state(optimizer.residency)

    # ---- what the host does

    def mark(self, optimizer: ZOOptimizer) -> None:
        """A checkpoint is about to be written: note the fingerprint of the weights that it will hold."""
        if not self.behind:
            self.look(optimizer, _evaluated(optimizer), updating=False)
        if self._knows(optimizer):
            self._note(Mark(optimizer.steps, _fingerprint(optimizer)))

    def checkpoint(self, optimizer: ZOOptimizer, path: str, host: str) -> None:
        """The host has written a complete checkpoint."""
        if not self.behind:
            noted = noted_path(self.folder, path)
            self._checkpoints.add(noted)
            self._note(Checkpoint(optimizer.steps, noted, host))

    def lose(self, optimizer: ZOOptimizer, path: str) -> None:
        """What the host is about to write to `path` is nothing to resume from: an earlier checkpoint there does not count any more."""
        noted = noted_path(self.folder, path)
        if noted in self._checkpoints:
            self._checkpoints.discard(noted)
            if self._writer is not None:
                self._writer.append(Checkpoint(min(optimizer.steps, self._writer.history.next_step), noted, LOST))

    def end(self, optimizer: ZOOptimizer) -> None:
        """The run ended by itself."""
        if not self.behind:
            self.look(optimizer, _evaluated(optimizer), updating=False)
        if self._knows(optimizer):
            self._note(End(optimizer.steps, _fingerprint(optimizer)))

    def _knows(self, optimizer: ZOOptimizer) -> bool:
        """Whether to take a fingerprint now, for the log; of shards all ranks do, for one of them to write."""
        return not self.behind and (self._writer is not None or any_sharded(optimizer.residency.trained))

    def _note(self, record: Record) -> None:
        if self._writer is not None and record.step == self._writer.history.next_step:
            self._writer.append(record)

    def close(self, optimizer: ZOOptimizer) -> None:
        """Flush and close the log."""
        if optimizer.journal is self:
            optimizer.journal = Unrecorded()
        self._optimizer = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _fingerprint(optimizer: ZOOptimizer) -> str:
    """Of the weights that are trained, with all updates."""
    with optimizer.residency.settled():
        return trained_fingerprint(optimizer.residency.trained)


def _evaluated(optimizer: ZOOptimizer) -> int:
    """Micro-batches that were evaluated since the last update."""
    return 0 if optimizer._window is None else optimizer._window.micro_batches
