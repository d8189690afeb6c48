"""What an evaluation beyond the first must not leave behind: logged values, metric states, counters and lists of the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from zo_lightning.engine.undo import Rerun, Undo, nothing

_HOST = frozenset({"_trainer", "_fabric", "_compiler_ctx"})


def rerun(module: nn.Module) -> Rerun:
    """Attributes of the LightningModule and of its submodules, and their metrics."""
    return Rerun(lambda undo: undo.modules(module, skip=_HOST))


def world(state: Rerun, trainer: Any) -> Callable[[Undo], None]:
    """What `quiet` puts back."""

    def remember(undo: Undo) -> None:
        state.remember(undo)
        undo.bindings(trainer)

    return remember


@contextmanager
def quiet(state: Rerun, module: nn.Module, trainer: Any, silent_logger: Callable[[], Any]) -> Iterator[None]:
    """Around an evaluation that nobody should notice: `self.log`, `self.log_dict`, `self.print` and the loggers are silent, too."""
    with state.hidden() as undo:
        undo.bindings(trainer)
        undo.bind(module, log=nothing, log_dict=nothing, print=nothing)
        trainer.loggers = [silent_logger() for _ in trainer.loggers]
        yield
