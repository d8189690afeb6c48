"""A run that was killed and is started again without a checkpoint's path: its newest complete checkpoint is loaded."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from typing import Any

from zo_lightning.callbacks.base import zo_callbacks


def resume_by_itself(trainer: Any, broadcast: Callable[[Any], Any]) -> None:
    """Let the Trainer load the first complete checkpoint that a callback knows, where it would load none."""
    connector = trainer._checkpoint_connector
    restore = connector._restore_modules_and_callbacks

    def restore_or_resume(path: Any = None, *args: Any) -> None:
        del connector._restore_modules_and_callbacks
        restore(path or broadcast(_newest(trainer)), *args)

    connector._restore_modules_and_callbacks = restore_or_resume


def _newest(trainer: Any) -> str | None:
    found = [path for callback in zo_callbacks(trainer.callbacks) for path in callback.checkpoints(trainer.default_root_dir)]
    return next((path for path in found if _complete(path)), None)


def _complete(path: str) -> bool:
    """A file that was cut off has no zip directory at its end; a folder (sharded) is complete with its metadata."""
    return zipfile.is_zipfile(path) if os.path.isfile(path) else os.path.isfile(os.path.join(path, ".metadata"))
