"""Logs for tests: of real runs, and of made-up steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.journal import Journal
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.parameters import Trained, collect
from zo_lightning.engine.trajectory import (
    Checkpoint,
    End,
    LogWriter,
    Mark,
    ParameterEntry,
    Segment,
    Settings,
    StepRecord,
    save_base,
    trained_fingerprint,
)
from zo_lightning.engine.trajectory.records import Record

ROUNDING = "stochastic"


def trained_of(optimizer: ZOOptimizer) -> list[Trained]:
    return collect(optimizer.param_groups, optimizer._names)


def segment_of(optimizer: ZOOptimizer, base: str | None = None, rounding: str = ROUNDING) -> Segment:
    """What the callback would write at the beginning of a run, or where the weights were changed."""
    trained = trained_of(optimizer)
    return Segment(
        step=optimizer.steps,
        seed=optimizer.seed,
        noise=optimizer.noise.name,
        estimator={"name": optimizer.estimator.name, "options": asdict(optimizer.estimator)},  # type: ignore[call-overload]
        rule={"name": optimizer.rule.name, "options": asdict(optimizer.rule)},
        residency=optimizer.residency.name,
        rounding=rounding,
        compiled=available("cpu"),
        device="cpu",
        versions={"torch": torch.__version__, "zo_lightning": "0"},
        parameters=tuple(ParameterEntry(p.name, tuple(p.tensor.shape), str(p.tensor.dtype)[6:], p.group) for p in trained),
        fingerprint=trained_fingerprint(trained),
        base=base,
    )


class Recorder(Journal):
    """Writes a log while a ZOOptimizer steps."""

    def __init__(self, optimizer: ZOOptimizer, path: Path, *, rounding: str = ROUNDING, **options: Any) -> None:
        self.optimizer = optimizer
        base = path.with_suffix(".base.safetensors")
        save_base(base, trained_of(optimizer))
        self.writer = LogWriter.create(path, segment_of(optimizer, base.name, rounding), **options)
        optimizer.journal = self

    def estimate(self, closure: Callable[[], Tensor], weight: float = 1.0) -> None:
        """One micro-batch, on its own."""
        self.optimizer.estimate(closure, weight=weight)

    def step(self, closure: Callable[[], Tensor] | None) -> None:
        """One step, fused if there is a closure, and its record."""
        self.optimizer.step(closure)

    def recall(self, step: int, updating: bool) -> StepRecord | None:
        return None

    def mask(self, optimizer: ZOOptimizer) -> None:
        pass

    def look(self, optimizer: ZOOptimizer, micro_batches: int, updating: bool) -> None:
        pass

    def append(self, record: StepRecord) -> None:
        self.writer.append(record)

    def remember(self, optimizer: ZOOptimizer) -> None:
        pass


def settings(lr: float = 1e-3, groups: int = 2) -> tuple[Settings, ...]:
    return tuple(Settings(lr, 1e-3, 0.0) for _ in range(groups))


def made_up_segment(step: int = 0, groups: int = 2, **changes: Any) -> Segment:
    """A segment of tensors that nobody has."""
    parameters = tuple(ParameterEntry(f"weight.{group}", (3, 4), "float32", group) for group in range(groups))
    options: dict[str, Any] = {
        "seed": 7,
        "noise": "rademacher",
        "estimator": {"name": "spsa", "options": {"queries": 1}},
        "rule": {"name": "sgd", "options": {"clip": None}},
        "residency": "exact",
        "rounding": "stochastic",
        "compiled": True,
        "device": "cpu",
        "versions": {"torch": "2.13.0", "zo_lightning": "0.3"},
        "parameters": parameters,
        "fingerprint": "0" * 64,
    }
    return Segment(step=step, **{**options, **changes})


def made_up_steps(count: int, first: int = 0, groups: int = 2) -> list[StepRecord]:
    """Steps of a schedule that changes lr at every one."""
    return [
        StepRecord(step, (2.0 + step / 7, 2.0 - step / 3), settings(1e-3 / (step + 1), groups), False, 1)
        for step in range(first, first + count)
    ]


F = "ab" * 32


def written(path: Path, records: list[Record]) -> bytes:
    first, *rest = records
    assert isinstance(first, Segment)
    with LogWriter.create(path, first) as writer:
        for record in rest:
            writer.append(record)
    return path.read_bytes()


def small_log() -> list[Record]:
    first, second, third = made_up_steps(3)
    return [
        made_up_segment(parameters=(ParameterEntry("w", (2,), "float32", 1),)),
        first,
        replace(second, settings=first.settings),
        Mark(2, F),
        Checkpoint(2, "checkpoint-2", "hf"),
        replace(third, values=(math.inf, 1.0), skipped=True, traces=True, micro_batches=3),
        End(3, F),
    ]
