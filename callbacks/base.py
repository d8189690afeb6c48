"""The bridge to both hosts: a callback configures the engine and watches its steps; the same object works under either trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from zo_lightning.engine.messages import say_once
from zo_lightning.engine.optimizer import ZOOptimizer
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.report import StepReport


@dataclass(frozen=True)
class Run:
    """What a callback sees of the training that it is a part of."""

    optimizer: ZOOptimizer
    module: nn.Module
    host: str
    """"lightning" or "hf"."""
    folder: str | None
    """Where the host writes its checkpoints and logs, if anywhere."""
    is_rank_zero: bool
    step: Callable[[], int]
    """The host's global step."""
    root: str = "."
    """A folder that is the same for every process of this run: output_dir, default_root_dir."""
    rehearsal: bool = False
    """A few batches to find mistakes in the script (fast_dev_run), of which nothing is to be kept."""


class ZOCallback:
    """Base of the callbacks in `zo_lightning.callbacks`.

    Put an instance into `callbacks=[...]` of a Lightning Trainer with strategy "zo" or of a `ZOTrainer`. The host calls `configure` before
    the optimizer is built, then the `on_run_start`, `on_zo_step` and `on_run_end` of this class. Every hook of the hosts themselves
    resolves to a function that does nothing, so no host need be installed, and neither is imported.
    """

    changes_weights = False
    """Whether `on_run_start` changes the weights that a run begins with; those that do come first, whatever the order of the list."""

    def configure(self, options: EngineOptions) -> EngineOptions:
        """The options to use, usually `dataclasses.replace(options, ...)`."""
        return options

    def on_run_start(self, run: Run) -> None:
        """Training begins; the weights are those of the start or of the resumed checkpoint."""

    def on_zo_step(self, run: Run, report: StepReport) -> None:
        """An update was applied (or skipped, see the report)."""

    def on_checkpoint_start(self, run: Run) -> None:
        """The host is about to write a checkpoint."""

    def on_checkpoint_end(self, run: Run, path: str) -> None:
        """The host has written a complete checkpoint, which training can be resumed from."""

    def on_checkpoint_lost(self, run: Run, path: str) -> None:
        """The host is about to write something to `path` that training can't be resumed from."""

    def on_run_complete(self, run: Run) -> None:
        """Training ended by itself; `on_run_end` follows."""

    def on_run_end(self, run: Run) -> None:
        """Training ended, also by an exception."""

    def checkpoints(self, root: str, max_steps: int) -> list[str]:
        """Checkpoints to resume from where the user names none, the best first; the host takes the first that is complete.

        `max_steps`: where the run will end, -1 without such a limit.
        """
        return []

    def on_resume(self, optimizer: ZOOptimizer, root: str) -> None:
        """A checkpoint that `checkpoints` named is about to be loaded into the optimizer, which still is as the script made it."""

    def metrics(self) -> dict[str, float]:
        """What to log now, by chart name; the host asks whenever it logs."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should keep of this callback."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""

    @property
    def state_key(self) -> str:
        """The name of the callback's state in a Lightning checkpoint."""
        return type(self).__qualname__

    @property
    def _legacy_state_key(self) -> type:
        """Lightning asks every callback for it when it reads a checkpoint."""
        return type(self)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning's own hook: say so where nobody will ask this callback for anything."""
        if not hasattr(trainer.strategy, "zo_optimizer"):
            self._say_idle('Trainer(strategy="zo")')

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Hugging Face's, likewise."""
        if engine_of(optimizer) is None:
            self._say_idle('ZOTrainer, and optim="zo"')

    def _say_idle(self, use: str) -> None:
        name = type(self).__name__
        say_once(f"callback.{name}", f"{name} does nothing here: training is by backpropagation. Use {use}.")

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_") or name in ("setup", "teardown"):
            return _ignore
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _ignore(*args: Any, **kwargs: Any) -> None:
    """A hook of the host that forward-only callbacks have no use for."""


def engine_of(optimizer: Any) -> ZOOptimizer | None:
    """The engine behind a host's wrappers of its optimizer; None where it is another one."""
    while optimizer is not None and not isinstance(optimizer, ZOOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def zo_callbacks(callbacks: Iterable[Any]) -> list[ZOCallback]:
    """Those of a host's callbacks that are ours, in order; first those that change the weights that a run begins with."""
    return sorted((callback for callback in callbacks if isinstance(callback, ZOCallback)), key=lambda one: not one.changes_weights)
