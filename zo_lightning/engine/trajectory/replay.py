"""A base and a log are the model: `replay` goes on from where the weights stand, `verify` checks on the way, `undo` goes back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.estimators import ESTIMATORS
from zo_lightning.engine.journal import StepRecord
from zo_lightning.engine.messages import say_once
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.signals import held
from zo_lightning.engine.trajectory.fingerprint import frozen_fingerprint, trained_fingerprint
from zo_lightning.engine.trajectory.log import Log, read_log
from zo_lightning.engine.trajectory.masks import chosen_of
from zo_lightning.engine.trajectory.records import Checkpoint, End, Mark, MaskRecord, ParameterEntry, Segment
from zo_lightning.engine.trajectory.steps import Stepper
from zo_lightning.engine.trajectory.targets import Target, match, module_of, noise_of
from zo_lightning.engine.trajectory.weights import load_base
from zo_lightning.engine.updates import RULES

if TYPE_CHECKING:
    from zo_lightning.engine.optimizer import ZOOptimizer

Source = Log | str | os.PathLike[str]
Base = Mapping[str, Tensor] | str | os.PathLike[str]


@dataclass(frozen=True)
class Verification:
    """How far the weights could be followed, how many fingerprints agreed, and the first thing that did not."""

    step: int
    checked: int
    problem: str | None
    torn: str = ""
    """What is wrong with the log's last record, which is then none of those that were followed."""

    @property
    def ok(self) -> bool:
        return self.problem is None


class Anchor(NamedTuple):
    """A place of the log whose weights are known by fingerprint: behind record number `place`, after `step` steps."""

    place: int
    step: int
    fingerprint: str
    segment: Segment


def replay(target: Target, log: Source, to_step: int | None = None) -> int:
    """Apply the steps that the log has after the weights' state, up to `to_step` (all of them for None); returns the step reached.

    `target` is a module, a ZOOptimizer or a table of tensors, in place. Only weights are changed: not `ZOOptimizer.steps`, nor buffers.
    Weights that were changed by others between two steps are loaded from the log's base file. Raises ValueError, and changes nothing,
    where a parameter is missing or differs, where the weights are in none of the states that the log knows, or are past `to_step`;
    ValueError that names the step reached where the log can't be followed further; LogError for a damaged log.
    """
    log = _read(log)
    end = end_of(log, to_step)
    start = locate(target, log, end)
    return _Follow(target, log, checking=False).run(start, end).step


def verify(target: Target, log: Source, to_step: int | None = None) -> Verification:
    """`replay`, with every fingerprint of the log compared on the way. The weights end where the first one disagrees."""
    log = _read(log)
    end = end_of(log, to_step)
    return replace(_Follow(target, log, checking=True).run(locate(target, log, end), end), torn=log.torn)


def undo(target: Target, log: Source, to_step: int, base: Base | None = None) -> int:
    """Go back to the state after `to_step` steps: load a base (tensors, a safetensors file; None: one that the log has) and replay.

    Raises ValueError, and changes nothing, where there is no base, or it is in none of the log's states up to `to_step`.
    """
    log = _read(log)
    follow, start = _from_base(target, log, end := end_of(log, to_step), base)
    return follow.run(start, end).step


def heal(optimizer: ZOOptimizer, log: Source) -> None:
    """Give a running optimizer what its run should have after `optimizer.steps` steps: weights, float32 masters, and the mask.

    From a base that the log has, as of `undo`. Raises ValueError, and changes nothing, where there is none, and what `replay` does.
    """
    log = _read(log)
    end = end_of(log, optimizer.steps)
    with optimizer.residency.settled():
        follow, start = _from_base(optimizer, log, end, None)
        follow.run(start, end)
        follow.hand_over(optimizer)
    optimizer.journal.remember(optimizer)


def _from_base(target: Target, log: Log, end: int, base: Base | None) -> tuple[_Follow, Anchor]:
    """With the weights of a base, and where it stands in the log."""
    if base is None:
        base = _own_base(log, end)
    tensors = dict(base) if isinstance(base, Mapping) else load_base(base)
    start = locate(tensors, log, end)
    _copy(match(tensors, start.segment), match(target, start.segment))
    return _Follow(target, log, checking=False), start


def locate(target: Target, log: Log, end: int) -> Anchor:
    """The last place of the log, up to step `end`, where weights were what they are in `target`. ValueError where there is none."""
    found: list[Anchor] = []
    here: dict[tuple[ParameterEntry, ...], str] = {}
    problem: ValueError | None = None
    anchors = _anchors(log)
    known = ""
    for anchor in anchors:
        if isinstance(log.records[anchor.place], Segment):
            parameters = anchor.segment.parameters
            if parameters not in here:  # once, for it reads all weights
                try:
                    here[parameters] = trained_fingerprint(match(target, anchor.segment))
                except ValueError as error:
                    here[parameters] = ""
                    problem = problem or error
            known = here[parameters]
        if known == anchor.fingerprint and (anchor.step == end or begins(anchor, log)):
            found.append(anchor)
    if not found:
        if problem is not None:
            raise problem
        bases = ", ".join(f"step {a.step} ({a.segment.base or 'no file'})" for a in anchors if isinstance(log.records[a.place], Segment))
        raise ValueError(
            f"The weights are in none of the states that {log.path} can be replayed from. Load the weights of one of its bases first: "
            f"{bases}; or of a checkpoint at step {', '.join(str(a.step) for a in anchors[-5:])}."
        )
    fitting = [anchor for anchor in found if anchor.step <= end]
    if not fitting:
        raise ValueError(f"The weights are those after {found[0].step} steps, past to_step={end}. Go back with undo, from a base.")
    return fitting[-1]


def begins(anchor: Anchor, log: Log) -> bool:
    """Whether steps can be made from an anchor by its weights alone: within a segment, 16-bit tensors have float32 masters beside them, and
    an update rule or an estimator may remember earlier steps.
    """
    segment = anchor.segment
    rule, estimator = RULES.get(segment.rule["name"]), ESTIMATORS.get(segment.estimator["name"])
    masters = segment.rounding == "stochastic" and segment.residency != "inplace"
    of_more = any(part is not None and part.remembers for part in (rule, estimator))
    of_more = of_more or (masters and any(entry_has_master(entry, rule is not None and rule.dense) for entry in segment.parameters))
    return isinstance(log.records[anchor.place], Segment) or not of_more


def entry_has_master(entry: ParameterEntry, every: bool) -> bool:
    """`residency.masters.Masters.has`, for a parameter of a log."""
    return (every or len(entry.shape) < 2) and entry.dtype in ("float16", "bfloat16")


class _Follow:
    """Goes through the records, with the tensors of the current segment."""

    def __init__(self, target: Target, log: Log, checking: bool) -> None:
        self._target, self._log, self._checking = target, log, checking
        self._trained: list[Trained] = []
        self._segment = log.segments[0]
        self._checked = 0
        self._within: int | None = None
        self._stepper: Stepper | None = None

    def run(self, start: Anchor, end: int) -> Verification:
        """From an anchor to step `end`."""
        stepper = self._enter(start.segment)
        self._mask_at(start, stepper)
        if isinstance(self._log.records[start.place], Segment):
            self._say_if_frozen_differs(start.segment)
        step, waiting = start.step, list[StepRecord]()
        for record in self._log.records[start.place + 1 :]:
            if isinstance(record, StepRecord):
                if record.step >= end:
                    break
                waiting.append(replace(record, passes=b"") if self._within == record.step else record)
                step = record.step + 1
            elif isinstance(record, MaskRecord):
                if record.step >= end:
                    break
                stepper.apply(waiting)
                waiting.clear()
                self._next_mask(stepper, record)
            elif isinstance(record, Segment) or (self._checking and isinstance(record, (Mark, End))):
                if record.step > end:
                    break
                stepper.apply(waiting)
                waiting.clear()
                problem = self._compare(record, step)
                if problem is not None:
                    return Verification(step, self._checked, problem)
                if isinstance(record, Segment):
                    stepper, step = self._enter(record), record.step
        stepper.apply(waiting)
        return Verification(step, self._checked, None)

    def _mask(self, stepper: Stepper, record: MaskRecord) -> None:
        devices = {p.name: p.tensor.device for p in self._trained}
        stepper.mask(chosen_of(record, self._segment.parameters, self._log.path.parent, devices))

    def _next_mask(self, stepper: Stepper, record: MaskRecord) -> None:
        """The mask of the step that comes next, behind those that were made."""
        try:
            self._mask(stepper, record)
        except ValueError as error:
            raise ValueError(f"{error} The weights are now those after {record.step} steps.") from error

    def _mask_at(self, start: Anchor, stepper: Stepper) -> None:
        """The mask that holds at an anchor."""
        for record in self._log.records[start.place :: -1]:
            if isinstance(record, Segment):
                return
            if isinstance(record, MaskRecord):
                self._mask(stepper, record)
                return

    def _enter(self, segment: Segment) -> Stepper:
        self._within = segment.step if segment.within else None  # whose moves its weights have made already
        self._segment, self._trained = segment, match(self._target, segment)
        self._stepper = Stepper(segment, self._trained, noise_of(self._target, segment))
        return self._stepper

    def hand_over(self, optimizer: ZOOptimizer) -> None:
        """What the last segment has beside its weights."""
        if self._stepper is not None:
            self._stepper.hand_over(optimizer)

    def _say_if_frozen_differs(self, segment: Segment) -> None:
        """Where a segment begins; later on, buffers have moved."""
        module = module_of(self._target)
        if segment.frozen and module is not None and frozen_fingerprint(module, self._trained) != segment.frozen:
            say_once(
                "replay.frozen",
                "What the step log does not train (frozen parameters, buffers) is not here what it was at the log's base: the replayed "
                "weights are the same, the model around them is another. Load the same pretrained model; buffers come from a checkpoint.",
            )

    def _compare(self, record: Segment | Mark | End, step: int) -> str | None:
        """Check the fingerprint; a segment whose weights came from elsewhere is entered through its base file."""
        trained = match(self._target, record) if isinstance(record, Segment) else self._trained
        if trained_fingerprint(trained) == record.fingerprint:
            self._checked += 1
            return None
        if not isinstance(record, Segment):
            return f"after {record.step} steps the weights are not those that the log has a fingerprint of"
        path = None if record.base is None else self._log.path.with_name(record.base)
        if path is not None and os.path.isfile(path):
            tensors = load_base(path)
            loaded = match(tensors, record)
            if trained_fingerprint(loaded) == record.fingerprint:
                _copy(loaded, trained)
                self._checked += 1
                return None
        raise ValueError(
            f"At step {record.step} the run went on from other weights than its steps had led to, and their file "
            f"({path or 'none was written'}) is not there or not the right one. The weights are now those after {step} steps. "
            f"To go further, load the weights that the run had at step {record.step} and replay from there."
        )


def _anchors(log: Log) -> list[Anchor]:
    anchors: list[Anchor] = []
    segment: Segment | None = None
    for index, record in enumerate(log.records):
        if isinstance(record, Segment):
            segment = record
        if segment is not None and isinstance(record, (Segment, Mark, End)):
            anchors.append(Anchor(index, record.step, record.fingerprint, segment))
    return anchors


def _own_base(log: Log, end: int) -> os.PathLike[str]:
    named = [segment for segment in log.segments if segment.step <= end and segment.base is not None]
    for segment in reversed(named):
        path = log.path.with_name(str(segment.base))
        if os.path.isfile(path):
            return path
    missing = f"its base files ({', '.join(str(segment.base) for segment in named)}) are not beside it" if named else "it has no base file"
    raise ValueError(
        f"To go back to step {end}, the weights from before are needed, and {log.path} has none: {missing}. "
        "Pass base= (tensors or a safetensors file with the weights at the log's beginning)."
    )


@torch.no_grad()
def _copy(loaded: Sequence[Trained], trained: Sequence[Trained]) -> None:
    with torch.inference_mode(False), held():
        for source, goal in zip(loaded, trained, strict=True):
            goal.tensor.copy_(source.tensor)


def _read(log: Source) -> Log:
    return log if isinstance(log, Log) else read_log(log, keep=lambda record: not isinstance(record, Checkpoint))


def end_of(log: Log, to_step: int | None) -> int:
    """The step to go to: the last one for None. ValueError for one whose state the log does not know."""
    if to_step is None:
        return log.end_step
    first = log.segments[0].step
    known = any(record.step + isinstance(record, StepRecord) == to_step for record in log.records)
    if isinstance(to_step, bool) or not isinstance(to_step, int) or not known:
        raise ValueError(f"Invalid to_step: {to_step!r}. {log.path} knows the states after {first} to {log.end_step} steps.")
    return to_step
