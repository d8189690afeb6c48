"""WeightOffload: train models that do not fit into memory, their weights streamed from files, under either host."""

from __future__ import annotations

import dataclasses
import os

from zo_lightning.callbacks.base import Run, ZOCallback
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.residency import Offload, Offloaded, Traffic


class WeightOffload(ZOCallback):
    """Keeps the matrices of the model in files, and a few blocks of them in memory: forward passes read each block before it runs.

    Losses and weights are those of `weights="exact"`, bit for bit. The update of a step is made when its block is read the next time, on
    the way to the next perturbation, and written back; evaluation, checkpoints, state dicts, exceptions and the end of the run find weights
    with all updates. Code of your own that reads or writes weights between two steps does so inside `with optimizer.settled():`.
    Vectors stay in memory, and adapters, where what is trained is less than a twentieth of the model.

    Logs, as `zo/offload/...` over the steps since the last log: gigabytes read and written a step, seconds waited for the disk a step.

    Args:
        folder: of the files, on a fast disk with room for the model and a block; None makes a temporary one, removed in the end. A run
            that was killed and has a `TrajectoryLog` goes on from what it left there.

    Raises ValueError for a model without matrices, a compiled one or one on a GPU, for a folder that another run uses or that has the files
    of another model, and beside another `weights=` option; OSError where the files can't be made.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.offload = Offload(None if folder is None else os.fspath(folder))
        self._run: Run | None = None
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
        made = run.optimizer.steps - steps
        return {
            "zo/offload/gb_read": (now.read - before.read) / made / 1e9,
            "zo/offload/gb_written": (now.written - before.written) / made / 1e9,
            "zo/offload/seconds_waited": (now.waited - before.waited) / made,
        }
