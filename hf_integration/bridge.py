"""Carries the host's events to the ZOCallbacks: start of a run, every update, values to log, the end of the run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from zo_lightning.callbacks.base import Run, ZOCallback, zo_callbacks
from zo_lightning.engine import ZOOptimizer
from zo_lightning.prompts.heads import say_new_heads

if TYPE_CHECKING:
    from zo_lightning.hf_integration.trainer import ZOTrainerMixin


STATE = "zo_callbacks"


def _listeners(trainer: ZOTrainerMixin) -> list[ZOCallback]:
    return zo_callbacks(trainer.callback_handler.callbacks)


class ZOBridge(TrainerCallback):
    """One per trainer, added by the mixin; the trainer's own callbacks see the host's events as always."""

    def __init__(self, trainer: ZOTrainerMixin) -> None:
        self._trainer = trainer
        self._run: Run | None = None
        self._listeners: list[ZOCallback] = []
        self.resumed = False
        """By itself, not by a path that the user gave."""

    def keep_state(self, optimizer: ZOOptimizer) -> None:
        """Let the callbacks' states travel in the optimizer's, which the host saves and loads."""
        listeners = functools.partial(_listeners, self._trainer)

        def saved(_: Any, state: dict[str, Any]) -> None:
            states = {listener.state_key: listener.state_dict() for listener in listeners()}
            state[STATE] = {key: value for key, value in states.items() if value}

        def loaded(_: Any, state: dict[str, Any]) -> None:
            for listener in listeners():
                if listener.state_key in state.get(STATE, {}):
                    listener.load_state_dict(state[STATE][listener.state_key])

        optimizer.register_state_dict_post_hook(saved)
        optimizer.register_load_state_dict_pre_hook(loaded)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open a run. auto_find_batch_size begins again after an out-of-memory error: the earlier run is closed."""
        self.close()
        trainer = self._trainer
        optimizer = trainer.zo_optimizer
        optimizer.discard()
        # before the first collective of the Trainer, which the rank that ends first would leave the others in
        optimizer.exchange.agree({"the number of steps (max_steps, epochs, rows of the data)": str(state.max_steps)})
        if optimizer.steps == 0 and state.global_step > 0:
            # A checkpoint without optimizer state (save_only_model): the seeds of the first steps are used up.
            optimizer.steps = state.global_step
        self._listeners = _listeners(trainer)
        self._run = Run(
            optimizer=optimizer,
            module=trainer.model,
            host="hf",
            folder=args.output_dir,
            root=args.output_dir,
            is_rank_zero=trainer.is_world_process_zero(),
            step=lambda: int(trainer.state.global_step),
        )
        for listener in self._listeners:
            listener.on_run_start(self._run)
        if self._run.is_rank_zero:
            say_new_heads(trainer.model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the update that the host has just made."""
        report = self._trainer.zo_optimizer.report
        if self._run is not None and report is not None:
            for listener in self._listeners:
                listener.on_zo_step(self._run, report)

    @contextmanager
    def checkpoint(self, path: str) -> Iterator[None]:
        """Around the writing of a checkpoint folder."""
        run = self._run
        if run is None:
            yield
            return
        for listener in self._listeners:
            listener.on_checkpoint_start(run)
        yield
        for listener in self._listeners:
            listener.on_checkpoint_end(run, path)

    def resume(self) -> None:
        """The state of a checkpoint is about to be loaded into the optimizer."""
        if self.resumed:
            for listener in _listeners(self._trainer):
                listener.on_resume(self._trainer.zo_optimizer, str(self._trainer.args.output_dir))

    def checkpoints(self) -> list[str]:
        """Folders to resume from that the callbacks know."""
        args = self._trainer.args
        return [path for listener in _listeners(self._trainer) for path in listener.checkpoints(str(args.output_dir), args.max_steps)]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training ended by itself."""
        if self._run is not None:
            for listener in self._listeners:
                listener.on_run_complete(self._run)

    def metrics(self) -> dict[str, float]:
        """What to add to the host's training log: Python floats, or TensorBoard drops them."""
        optimizer = self._trainer.zo_optimizer
        values: dict[str, float] = {}
        if optimizer.report is not None:
            values["zo/projected_grad"] = float(optimizer.report.projected_grad)
        if optimizer.skipped_steps:
            values["zo/skipped_steps"] = float(optimizer.skipped_steps)
        for listener in self._listeners:
            values.update(listener.metrics())
        return values

    def close(self) -> None:
        """End the run that is open, if one is; called when training ends, by an exception too."""
        run, self._run = self._run, None
        if run is None:
            return
        for listener in self._listeners:
            listener.on_run_end(run)
