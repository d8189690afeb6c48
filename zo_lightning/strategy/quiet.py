"""What an evaluation beyond the first must not leave behind: logged values, metric states, counters and lists of the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from zo_lightning.engine.undo import nothing, undoing

_HOST = frozenset({"_trainer", "_fabric", "_compiler_ctx"})


@contextmanager
def quiet(module: nn.Module, trainer: Any, silent_logger: Callable[[], Any]) -> Iterator[None]:
    """Around an evaluation that nobody should notice.

    `self.log`, `self.log_dict`, `self.print` and the loggers are silent; attributes of the LightningModule and metrics among its submodules
    come back as they were (`Undo`).
    """
    loggers = trainer.loggers
    with undoing() as undo:
        undo.also(lambda: setattr(trainer, "loggers", loggers))
        undo.metrics(module)
        undo.attributes(module, skip=_HOST)
        undo.bind(module, log=nothing, log_dict=nothing, print=nothing)
        trainer.loggers = [silent_logger() for _ in loggers]
        yield
