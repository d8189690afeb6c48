"""A run that was killed and is started again without a checkpoint's path: its newest complete checkpoint is loaded."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from typing import Any

from zo_lightning.callbacks.base import zo_callbacks


def resume_by_itself(trainer: Any, broadcast: Callable[[Any], Any], found: Callable[[], None]) -> None:
    """Let the Trainer load the first complete checkpoint that a callback knows, where it would load none; `found` is told of one."""
    connector = trainer._checkpoint_connector
    restore = connector._restore_modules_and_callbacks

    def restore_or_resume(path: Any = None, *args: Any) -> None:
        del connector._restore_modules_and_callbacks
        if not path and not trainer.fast_dev_run:
            path = broadcast(_newest(trainer) if trainer.is_global_zero else None)
            if path:
                found()
        restore(path, *args)

    connector._restore_modules_and_callbacks = restore_or_resume


def loses_nothing(trainer: Any) -> bool:
    """Whether Lightning goes on from a checkpoint that is written now as if nothing had happened.

    It does not run the end of an epoch (validation, hooks, schedulers) after a checkpoint that a callback wrote behind the last batch, and
    it forgets what was logged for the mean of an epoch.
    """
    fit = trainer.fit_loop
    batch, epoch = fit.epoch_loop.batch_progress, fit.epoch_progress.current
    if epoch.processed == epoch.ready:
        return True
    if batch.is_last_batch and batch.current.completed < batch.current.processed:
        return False
    return not any(result.meta.on_epoch for result in fit.epoch_loop._results.values())


def _newest(trainer: Any) -> str | None:
    root, limit = trainer.default_root_dir, trainer.max_steps
    found = [path for callback in zo_callbacks(trainer.callbacks) for path in callback.checkpoints(root, limit)]
    return next((path for path in found if _complete(path)), None)


def _complete(path: str) -> bool:
    """A file that was cut off has no zip directory at its end; a folder (sharded) is complete with its metadata."""
    return zipfile.is_zipfile(path) if os.path.isfile(path) else os.path.isfile(os.path.join(path, ".metadata"))
