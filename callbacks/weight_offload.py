"""WeightOffload: train models that do not fit where they are computed, their weights streamed there, under either host."""

from __future__ import annotations

import dataclasses
import os

from zo_lightning.callbacks.base import Run, ZOCallback
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.report import StepReport
from zo_lightning.engine.residency import Offload, Offloaded, Traffic


class WeightOffload(ZOCallback):
    """Keeps the matrices of the model in files or in the CPU's memory, and a few blocks of them where forward passes run.

    Losses and weights are those of `weights="exact"`, bit for bit. The update of a step is made when its block is used the next time, on
    the way to the next perturbation, and written back; evaluation, checkpoints, state dicts, exceptions and the end of the run find weights
    with all updates. Code of your own that reads or writes weights between two steps does so inside `with optimizer.settled():`.
    Vectors stay on the host's device, and so do adapters, where what is trained is less than a twentieth of the model; the host does not
    bring the model there.

    Logs, as `zo/offload/...` over the steps since the last log: gigabytes read and written a step, seconds waited for blocks a step, and
    the share of the time that was not waited (`overlap`); `lockstep` is 1 where the last step was made so.

    Args:
        folder: of the files, on a fast disk with room for the model and a block; None: they have no name, and are gone with the process.
        tier: "disk", "memory" (of the CPU, pinned), or "auto": files where a folder is given or the host's device is the CPU, else memory.
        lockstep: True: the evaluations of a step take turns at the borders of blocks, on threads, so that a block is read once for all of
            them; False: one after another. None: in lockstep where each is sure to compute what it computes alone, which is said.

    Raises ValueError for a model without matrices, a compiled one or one on another device, for a folder that another run uses, and beside
    another `weights=` option; OSError where the files can't be made, MemoryError where there is no room in memory.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, tier: str = "auto", lockstep: bool | None = None) -> None:
        self.offload = Offload(None if folder is None else os.fspath(folder), tier, lockstep=lockstep)
        self._run: Run | None = None
        self._seconds = 0.0
        self._last = (0, Traffic())

    def configure(self, options: EngineOptions) -> EngineOptions:
        if options.weights not in ("auto", "exact", self.offload):
            raise ValueError(f"weights={options.weights!r} beside WeightOffload, which streams exact weights. Leave weights= out.")
        return dataclasses.replace(options, weights=self.offload)

    def on_run_start(self, run: Run) -> None:
        self._run = run
        self._last = (run.optimizer.steps, dataclasses.replace(self._traffic(run)))

    def on_run_end(self, run: Run) -> None:
        self._run = None
        residency = run.optimizer.residency
        if isinstance(residency, Offloaded) and residency.ahead:
            return  # cut off while steps of a killed run are made again: its files are best left as they are
        with run.optimizer.settled():
            pass

    def on_zo_step(self, run: Run, report: StepReport) -> None:
        self._seconds += report.seconds

    @staticmethod
    def _traffic(run: Run) -> Traffic:
        residency = run.optimizer.residency
        return residency.traffic if isinstance(residency, Offloaded) else Traffic()

    def metrics(self) -> dict[str, float]:
        run = self._run
        if run is None or run.optimizer.steps == self._last[0]:
            return {}
        (steps, before), now = self._last, dataclasses.replace(self._traffic(run))
        self._last = (run.optimizer.steps, now)
        made, seconds, self._seconds = run.optimizer.steps - steps, self._seconds, 0.0
        waited = now.waited - before.waited
        return {
            "zo/offload/gb_read": (now.read - before.read) / made / 1e9,
            "zo/offload/gb_written": (now.written - before.written) / made / 1e9,
            "zo/offload/seconds_waited": waited / made,
            "zo/offload/overlap": 1 - waited / max(seconds, waited, 1e-9),
            "zo/offload/lockstep": float(run.optimizer.lockstep),
        }
