"""The step log of a run: begun, continued after a kill, written before each step is applied, closed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zo_lightning.engine.journal import Journal, StepRecord
from zo_lightning.engine.messages import say_once
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.trajectory.changed import State, same, state_of
from zo_lightning.engine.trajectory.fingerprint import dtype_name, frozen_fingerprint, trained_fingerprint
from zo_lightning.engine.trajectory.log import Log, read_log
from zo_lightning.engine.trajectory.records import MAX_POINTS, Checkpoint, End, Mark, ParameterEntry, Record, Segment
from zo_lightning.engine.trajectory.targets import match
from zo_lightning.engine.trajectory.weights import load_base, save_base
from zo_lightning.engine.trajectory.writer import Fsync, LogWriter

if TYPE_CHECKING:
    from zo_lightning.engine.optimizer import ZOOptimizer

NAME = "trajectory.zolog"
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
        self._segments: dict[int, Segment] = {}
        self._segment: Segment | None = None
        self._state: State | None = None
        self._residency: Any = None
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
        continue; True raises ValueError there; False always begins a new one. OSError where the folder can't be written, LogError for a
        damaged log.
        """
        points = len(optimizer.estimator.points(lambda query: query))
        if optimizer.residency.name == "inplace" and points > MAX_POINTS:
            raise ValueError(
                f'A step log of weights="inplace" notes moves between at most {MAX_POINTS} points, and this estimator evaluates {points}. '
                'Use fewer queries, or weights="exact" or "copy".'
            )
        exchange = optimizer.exchange
        first = exchange.rank == 0
        log = self._continuable(optimizer, resume) if first else None
        log = exchange.share(log)
        if log is None:
            if first:
                self._set_aside()
                self._create(optimizer)
        else:
            self._continue(optimizer, log, first)
        optimizer.journal = self
        self.remember(optimizer)

    def _continuable(self, optimizer: ZOOptimizer, resume: bool | str) -> Log | None:
        """The log to go on with; its last segments and steps alone are looked at."""
        if resume not in (True, False, "auto"):
            raise ValueError(f"Invalid resume: {resume!r}. Use 'auto', True (only go on), or False (always begin anew).")
        problem: str | None = "there is no log in it"
        if resume is not False and self.path.exists():
            log = read_log(self.path)
            problem = self._differs(optimizer, log)
            if problem is None:
                return log
        if resume is True:
            raise ValueError(f"resume=True, but the run in {self.folder} can't be continued: {problem}. Use resume='auto' to begin anew.")
        if resume == "auto" and self.path.exists():
            say_once(f"trajectory.{self.path}", f"A new step log begins in {self.folder}; the old one is kept, because {problem}.")
        return None

    def _differs(self, optimizer: ZOOptimizer, log: Log) -> str | None:
        """Why a log can't be continued at this step; None where it can."""
        step = optimizer.steps
        if log.end is not None and step < log.end_step:
            return f"the run of the old one ended by itself after {log.end_step} steps, and this one begins at step {step}"
        begun = [segment for segment in log.segments if segment.step <= step]
        if not begun or step > log.end_step:
            return f"it holds the steps {log.segments[0].step} to {log.end_step}, and this run begins at step {step}"
        segment, own = begun[-1], describe(optimizer, "", "", None)
        for field in ("seed", "noise", "estimator", "rule", "rounding", "parameters"):
            there, here = getattr(segment, field), getattr(own, field)
            if there != here:
                return f"{field} differs ({_short(there)} there, {_short(here)} now)"
        if segment.residency != own.residency and "inplace" in (segment.residency, own.residency):
            return f"the weights were perturbed with weights={segment.residency!r} there and are with {own.residency!r} now"
        recorded = next((record for record in log.steps if record.step == step), None)
        settings = tuple(optimizer.settings())
        if recorded is not None and recorded.settings != settings:
            return f"step {step} was made with {_short(recorded.settings)} there and would be with {_short(settings)} now"
        if not self._stands(optimizer, log, segment):
            return f"the weights are not those of that run after {step} steps, and it has no file of them"
        return None

    def _stands(self, optimizer: ZOOptimizer, log: Log, segment: Segment) -> bool:
        """Whether the weights are those of the log at this step, loaded from the segment's base file if need be."""
        step, trained = optimizer.steps, optimizer.residency.trained
        known = {r.fingerprint for r in log.records if isinstance(r, (Segment, Mark, End)) and r.step == step}
        if trained_fingerprint(trained) in known:
            return True
        return step == segment.step and self._load(optimizer, segment)

    def _load(self, optimizer: ZOOptimizer, segment: Segment) -> bool:
        """Give the optimizer the weights that a segment begins with, from its file."""
        path = None if segment.base is None else self.folder / segment.base
        if path is None or not path.exists():
            return False
        loaded = match(load_base(path), segment)
        if trained_fingerprint(loaded) != segment.fingerprint:
            return False
        with torch.inference_mode(False), torch.no_grad():
            for source, goal in zip(loaded, optimizer.residency.trained, strict=True):
                goal.tensor.copy_(source.tensor)
        return True

    def _continue(self, optimizer: ZOOptimizer, log: Log, first: bool) -> None:
        step = optimizer.steps
        if first:
            self._writer = LogWriter.open(self.path, fsync=self._fsync)
        else:
            self._stands(optimizer, log, [segment for segment in log.segments if segment.step <= step][-1])
        self._segment = log.segments[-1]
        self._ahead = {record.step: record for record in log.steps if record.step >= step}
        self._segments = {segment.step: segment for segment in log.segments if segment.step > step}
        if self._ahead and first:
            say_once(
                f"trajectory.recall.{self.path}",
                f"The run in {self.folder} was cut off after {log.end_step} steps. It goes on from step {step}: {len(self._ahead)} steps "
                "are made again from their records, without their forward passes.",
            )

    def _set_aside(self) -> None:
        """Give a log that is not continued another name."""
        if self.path.exists():
            number = 1
            while (aside := self.path.with_name(f"trajectory-{number:03d}.zolog")).exists():
                number += 1
            os.rename(self.path, aside)

    def _create(self, optimizer: ZOOptimizer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._writer = LogWriter.create(self.path, self._new_segment(optimizer), fsync=self._fsync)

    def _new_segment(self, optimizer: ZOOptimizer) -> Segment:
        trained = optimizer.residency.trained
        fingerprint = trained_fingerprint(trained)
        frozen = "" if optimizer.module is None else frozen_fingerprint(optimizer.module, trained)
        base = f"base-{optimizer.steps:08d}-{fingerprint[:8]}.safetensors" if self._save_base else None
        if base is not None and not (self.folder / base).exists():
            save_base(self.folder / base, trained)
        self._segment, self._residency = describe(optimizer, fingerprint, frozen, base), optimizer.residency
        return self._segment

    # ---- a step

    def recall(self, step: int) -> StepRecord | None:
        return self._ahead.get(step)

    def look(self, optimizer: ZOOptimizer) -> None:
        if optimizer.steps in self._ahead:
            self._follow(optimizer)
        elif self._writer is not None and (self._changed_set(optimizer) or self._changed(optimizer)):
            segment = self._new_segment(optimizer)
            self._writer.append(segment)
            self._forget_bases()

    def _follow(self, optimizer: ZOOptimizer) -> None:
        """Where weights were changed by others between two recorded steps: they have changed again by now, or are loaded."""
        segment = self._segments.pop(optimizer.steps, None)
        if segment is None or trained_fingerprint(optimizer.residency.trained) == segment.fingerprint:
            return
        if not self._load(optimizer, segment):
            raise ValueError(
                f"At step {segment.step} the run in {self.folder} went on from other weights than its steps had led to, and their file "
                f"({segment.base}) is not there. Resume from a later checkpoint, or begin anew with resume=False."
            )

    def _changed_set(self, optimizer: ZOOptimizer) -> bool:
        """Whether other tensors are trained than before."""
        if self._residency is optimizer.residency or self._segment is None:
            return False
        self._residency = optimizer.residency
        return describe(optimizer, "", "", None).parameters != self._segment.parameters

    def _changed(self, optimizer: ZOOptimizer) -> bool:
        if self._state is None or same(self._state, state_of(optimizer.residency.trained)):
            return False
        where = "written as a new base" if self._save_base else "noted; without save_base they can't be loaded again"
        say_once(
            "trajectory.changed",
            f"Before step {optimizer.steps} the trained weights were changed by something else than a step. They are {where}. If this "
            "happens often (clamping, weight averaging), each time costs a copy of the weights.",
        )
        return True

    def _forget_bases(self) -> None:
        """Keep the files of the first and of the newest segments."""
        bases = sorted(self.folder.glob("base-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        for path in bases[1:-_BASES]:
            path.unlink()

    def append(self, record: StepRecord) -> None:
        if self._writer is not None:
            self._writer.append(record if self._traces is None else dataclasses.replace(record, traces=self._traces))

    def remember(self, optimizer: ZOOptimizer) -> None:
        if self._ahead.pop(optimizer.steps - 1, None) is not None:
            self.recalled += 1
        if self._writer is not None and optimizer.steps not in self._ahead:
            self._state = state_of(optimizer.residency.trained)

    # ---- what the host does

    def mark(self, optimizer: ZOOptimizer) -> None:
        """A checkpoint is about to be written: note the fingerprint of the weights that it will hold."""
        if self._writer is not None and not self.behind:
            self._note(Mark(optimizer.steps, trained_fingerprint(optimizer.residency.trained)))

    def checkpoint(self, optimizer: ZOOptimizer, path: str, host: str) -> None:
        """The host has written a complete checkpoint."""
        if not self.behind:
            self._note(Checkpoint(optimizer.steps, path, host))

    def end(self, optimizer: ZOOptimizer) -> None:
        """The run ended by itself."""
        if self._writer is not None and not self.behind:
            self._note(End(optimizer.steps, trained_fingerprint(optimizer.residency.trained)))

    def _note(self, record: Record) -> None:
        if self._writer is not None and record.step == self._writer.history.next_step:
            self._writer.append(record)

    def close(self, optimizer: ZOOptimizer) -> None:
        """Flush and close the log."""
        if optimizer.journal is self:
            optimizer.journal = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def describe(optimizer: ZOOptimizer, fingerprint: str, frozen: str, base: str | None) -> Segment:
    """The segment that begins with the optimizer as it is now."""
    from zo_lightning import __version__

    residency = optimizer.residency
    device = residency.trained[0].tensor.device
    return Segment(
        step=optimizer.steps,
        seed=optimizer.seed,
        noise=optimizer.noise.name,
        estimator={"name": optimizer.estimator.name, "options": _options(optimizer.estimator)},
        rule={"name": optimizer.rule.name, "options": _options(optimizer.rule)},
        residency=residency.name,
        rounding="stochastic",
        compiled=available(device.type),
        device=str(device),
        versions={"zo_lightning": __version__, "torch": str(torch.__version__)},
        parameters=tuple(ParameterEntry(p.name, tuple(p.tensor.shape), dtype_name(p.tensor.dtype), p.group) for p in residency.trained),
        fingerprint=fingerprint,
        frozen=frozen,
        base=base,
    )


def _options(part: Any) -> dict[str, Any]:
    return dataclasses.asdict(part) if dataclasses.is_dataclass(part) and not isinstance(part, type) else {}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 100 else f"{text[:100]}..."


def newest_checkpoint(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of the checkpoints that the log of a run which did not end by itself names, newest first; none without such a log."""
    path = Path(folder) / NAME
    if not path.exists():
        return []
    log = read_log(path)
    return [] if log.end is not None else [record.path for record in reversed(log.checkpoints)]
