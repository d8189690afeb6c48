"""TrajectoryLog: every step in a log on disk, and a run that was killed goes on at the very next step."""

from __future__ import annotations

from pathlib import Path

from zo_lightning.callbacks.base import Run, ZOCallback
from zo_lightning.engine.optimizer import ZOOptimizer
from zo_lightning.engine.trajectory.comparing import check_same, newest_checkpoint
from zo_lightning.engine.trajectory.keeper import Trajectory
from zo_lightning.engine.trajectory.writer import Fsync, check_fsync

RESUME = ("auto", True, False)


class TrajectoryLog(ZOCallback):
    """Appends each step (some 60 bytes) to `trajectory.zolog` before it is applied, and continues a run that was killed.

    Start the same script again: the newest complete checkpoint of the host, or else the weights that the run began with, are loaded; the
    steps after them are made again from the log, without their forward passes; training goes on with the next one. The host goes through
    the batches of those steps itself, so that data order, schedules, counters and validations are those of an uninterrupted run, and so
    is the result, bit for bit. Where the evaluations leave something behind (BatchNorm's statistics, logged values), the first one of
    each micro-batch is made again.

    Args:
        folder: of the log; None is the host's own (`output_dir`, `default_root_dir`).
        fsync: when the log is forced to the disk, for a machine that loses power (a killed process loses nothing anyway): "step", an
            integer n (every n steps), or "checkpoint" (also at the beginning and the end).
        resume: "auto" continues a run that was cut off and begins a new log otherwise (the old one keeps another name); True also
            continues a run that had ended by itself (it catches up, and ends or goes on as the script says now), and raises ValueError
            where there is none to continue; False always begins anew.
        save_base: write the trained weights at the beginning, and when something else than a step changed them, as safetensors. Without
            them a run without a checkpoint can only be continued if the script makes the same weights again, and `undo` needs them given.
        evaluate: None makes first evaluations again where they left something behind; True always (for a training step that changes
            Python state), False never.

    Raises ValueError for an option out of range; OSError, before anything is changed, where the log can't be written.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        fsync: Fsync = "checkpoint",
        resume: bool | str = "auto",
        save_base: bool = True,
        evaluate: bool | None = None,
    ) -> None:
        check_fsync(fsync)
        if resume not in RESUME:
            raise ValueError(f"Invalid resume: {resume!r}. Must be one of {', '.join(map(repr, RESUME))}.")
        if evaluate not in (None, True, False):
            raise ValueError(f"Invalid evaluate: {evaluate!r}. Must be None, True or False.")
        self.folder = folder
        self._fsync, self._resume, self._save_base, self._evaluate = fsync, resume, save_base, evaluate
        self._trajectory: Trajectory | None = None

    def _in(self, root: str) -> Path:
        return Path(root if self.folder is None else self.folder)

    def checkpoints(self, root: str, max_steps: int) -> list[str]:
        return [] if self._resume is False else newest_checkpoint(self._in(root), max_steps, ended=self._resume is True)

    def on_resume(self, optimizer: ZOOptimizer, root: str) -> None:
        check_same(optimizer, self._in(root))

    def on_run_start(self, run: Run) -> None:
        if run.rehearsal:
            return
        folder = self._in(run.root)
        self._trajectory = Trajectory(folder, fsync=self._fsync, save_base=self._save_base, traces=self._evaluate)
        self._trajectory.begin(run.optimizer, self._resume)

    def on_checkpoint_start(self, run: Run) -> None:
        if self._trajectory is not None:
            self._trajectory.mark(run.optimizer)

    def on_checkpoint_end(self, run: Run, path: str) -> None:
        if self._trajectory is not None:
            self._trajectory.checkpoint(run.optimizer, path, run.host)

    def on_checkpoint_lost(self, run: Run, path: str) -> None:
        if self._trajectory is not None:
            self._trajectory.lose(run.optimizer, path)

    def on_run_complete(self, run: Run) -> None:
        if self._trajectory is not None:
            self._trajectory.end(run.optimizer)

    def on_run_end(self, run: Run) -> None:
        trajectory, self._trajectory = self._trajectory, None
        if trajectory is not None:
            trajectory.close(run.optimizer)
