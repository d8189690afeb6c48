"""Steps made again from their records: bit for bit what training did, without a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from zo_lightning.engine.coordinates import Queries
from zo_lightning.engine.estimators import ESTIMATORS, Displacement, Estimator
from zo_lightning.engine.journal import StepRecord
from zo_lightning.engine.line_search import at_best
from zo_lightning.engine.masks import Masks
from zo_lightning.engine.masks.rules import Chosen
from zo_lightning.engine.messages import say_once
from zo_lightning.engine.noise import Change, Noise, apply_changes
from zo_lightning.engine.noise.changes import apply_through, moves
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.progress import Progress
from zo_lightning.engine.recall import points_of
from zo_lightning.engine.residency import InPlace, Masters
from zo_lightning.engine.seeds import rounding_seed
from zo_lightning.engine.signals import held
from zo_lightning.engine.trajectory.records import Options, Segment
from zo_lightning.engine.updates import RULES, UpdateRule

if TYPE_CHECKING:
    from zo_lightning.engine.optimizer import ZOOptimizer

BATCH = 256
"""Updates that are applied in one go."""


class Stepper:
    """Applies the records of one segment to its tensors."""

    def __init__(self, segment: Segment, trained: Sequence[Trained], noise: Noise) -> None:
        self._segment, self._trained = segment, trained
        self._masks = Masks()
        self._estimator: Estimator = build("estimator", ESTIMATORS, segment.estimator)
        self._rule: UpdateRule = build("update rule", RULES, segment.rule)
        self._masters = Masters(every=self._rule.dense)  # which a segment begins from the weights
        self._progress = Progress(self._estimator, self._rule)
        self._progress.train({p.key for p in trained})
        self._noise = self._progress.noise(noise)
        if not noise.exact:
            say_if_not_equal(segment, trained)

    def apply(self, records: Sequence[StepRecord]) -> None:
        """Make these steps, in batches that signals do not interrupt."""
        with torch.inference_mode(False), torch.no_grad():
            size = BATCH if self._estimator.coordinates is None else 1  # whose points may depend on the weights, by their mask
            for begin in range(0, len(records), size):
                batch = records[begin : begin + size]
                with held():
                    if self._segment.residency == "inplace":
                        self._in_place(batch)
                    else:
                        self._on_base(batch)

    def mask(self, chosen: Chosen) -> None:
        """From now on these elements are trained."""
        self._progress.clear()
        self._masks = Masks.fixed(chosen)

    def hand_over(self, optimizer: ZOOptimizer) -> None:
        """Let a live optimizer go on from here: with these masters of 16-bit vectors and this mask."""
        optimizer.masters.load_state_dict(self._masters.state_dict())
        optimizer.progress.load_state_dict(self._progress.state_dict())
        if self._masks.chosen is not None:
            optimizer.masks.take(self._masks.chosen)

    def _points(self, record: StepRecord) -> list[Displacement]:
        points = self._progress.points(Queries(self._noise, self._segment.seed, record.step, self._trained, self._masks))
        expected = len(points) + len(self._estimator.along)
        if expected != len(record.values):
            raise ValueError(
                f"Step {record.step} of the step log has {len(record.values)} values; its estimator evaluates {expected} points."
            )
        return points

    def _change(self, record: StepRecord) -> Change:
        points, values = self._points(record), record.values
        terms = self._progress.terms(points, values[: len(points)])
        made = at_best(self._estimator.along, terms, values[len(points) :])
        rounding = rounding_seed(self._segment.seed, record.step) if self._segment.rounding == "stochastic" else None
        return self._progress.change(made, record.settings, rounding)

    def _on_base(self, records: Sequence[StepRecord]) -> None:
        changes = [self._change(record) for record in records if not record.skipped]
        moving = [p for p in self._trained if self._masks.trains(p.key)]
        masks = {p.key: mask for p in moving if (mask := self._masks.of(p.key)) is not None}
        if self._rule.dense:
            for change in changes:
                apply_through(self._masters.instead_of([p for p in moving if moves(change, p.group)]), change, self._noise, masks)
                self._masters.write_back()
        elif self._segment.rounding == "nearest":
            apply_changes(moving, changes, self._noise, masks)
        else:
            apply_changes(self._masters.instead_of(moving), changes, self._noise, masks)
            self._masters.write_back()

    def _in_place(self, records: Sequence[StepRecord]) -> None:
        residency = InPlace(None, self._trained, self._noise)
        residency.masks = self._masks
        for record in records:
            points = points_of(record, self._estimator, self._rule, self._points(record))
            residency.reenact(record.passes, points, [group.eps for group in record.settings])
            if not record.skipped:
                change = self._change(record)
                residency.update(change)
            residency.ended()


def build(what: str, table: Mapping[str, object], part: Options) -> Any:
    """An estimator or a rule from its name and options. ValueError where this release does not know them."""
    name, options = part["name"], part["options"]
    if name not in table:
        raise ValueError(f"The step log was made with the {what} {name!r}. This release knows {', '.join(map(repr, table))}.")
    kind: Callable[..., Any] = table[name]  # type: ignore[assignment]
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"The step log gives the {what} {name!r} the option {unknown[0]!r}, which this release does not know ({known}).")
    return kind(**options)


def say_if_not_equal(segment: Segment, trained: Sequence[Trained]) -> None:
    """Gaussian noise takes logarithms and sines, whose last bits differ between kernels."""
    device = trained[0].tensor.device.type
    here = {"compiled kernels": available(device), "device": device, "torch": torch.__version__}
    there = {"compiled kernels": segment.compiled, "device": segment.device.split(":")[0], "torch": segment.versions.get("torch")}
    differing = [f"{name} {there[name]} in the log, {here[name]} here" for name in here if here[name] != there[name]]
    if differing:
        say_once(
            "replay.bits",
            f"{segment.noise} noise is the same here up to its last bits only ({'; '.join(differing)}), so replayed weights can differ "
            "from the trained ones by rounding. Replay where the run was made for equal bits; Rademacher noise is equal everywhere.",
        )
