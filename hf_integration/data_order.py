"""Resuming with the batches of the uninterrupted run, where the host's checkpoint does not say which they are."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from zo_lightning.engine.generators import Random, generator_states, set_generator_states, set_loader_states
from zo_lightning.engine.messages import say_once

if TYPE_CHECKING:
    from zo_lightning.hf_integration.trainer import ZOTrainerMixin

POSITION = "zo_position"
"""Where the trainer's state, among those of the callbacks, says which batch comes next."""

_DAMAGE = (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class DataOrder(TrainerCallback):
    """One per trainer, added by the mixin. Keeps two things that the host forgets.

    Where the run is: of a loader without a length the host takes all updates for one epoch, and skips that many batches of one.
    What the order of an epoch was drawn from: the generator states at its beginning, which samplers such as that of
    ``train_sampling_strategy="group_by_length"`` and datasets that shuffle in ``__iter__`` read. They are a file beside the host's
    ``rng_state``, one per process. On resume they are put back before the host makes the iterator and skips what was seen; after that the
    host loads those of the moment of the checkpoint.
    """

    def __init__(self, trainer: ZOTrainerMixin) -> None:
        self._trainer = trainer
        self._epoch = self._batches = self._updated = 0
        self._ended = False
        self._start: Random | None = None
        self._saved: dict[str, Any] | None = None
        self._skipped = 0
        self._position: Any = None

    # ---- While the run goes on ----

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The host is about to make the iterator of an epoch."""
        self._epoch, self._ended = self._epoch + 1, False
        self._batches = self._updated = skipped = self._skipped
        self._skipped = 0
        if skipped and self._saved is not None and self._saved["epoch"] == self._epoch:
            set_generator_states(self._saved["start"], self._loaders())
        self._start = generator_states(self._loaders())

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A micro-batch that no update follows yet."""
        self._batches += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update."""
        self._batches += 1
        self._updated = self._batches

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is saved from now on is saved between two epochs."""
        self._ended = True

    def _loaders(self) -> list[Any]:
        return [self._trainer.callback_handler.train_dataloader]

    # ---- In a checkpoint ----

    def tell(self, state: Any) -> None:
        """Write into the trainer's state where to go on: behind the last update, as micro-batches without one are seen again."""
        behind = self._ended and self._batches == self._updated
        state.stateful_callbacks[POSITION] = {"epoch": self._epoch + behind, "batches": 0 if behind else self._updated}

    def _file(self, folder: str) -> Path:
        args = self._trainer.args
        return Path(folder) / (f"zo_data_state_{args.process_index}.pth" if args.world_size > 1 else "zo_data_state.pth")

    def save(self, folder: str) -> None:
        """Write this process's file."""
        saved = {"epoch": self._epoch, "start": self._start, "now": generator_states(self._loaders())["loaders"]}
        torch.save(saved, self._file(folder))

    # ---- On resume ----

    def take(self, state: Any) -> None:
        """Take what `tell` wrote out of the state that the host has loaded."""
        self._position = state.stateful_callbacks.pop(POSITION, None)

    def begin(self, epoch: int, batches: int, checkpoint: str | None, sized: bool) -> tuple[int, int]:
        """A run begins. Returns the first epoch and how many batches of it to skip, which the host counted for `sized` loaders only."""
        position, self._position = self._position, None
        if not sized and position is not None:
            epoch, batches = self._place(position, str(checkpoint))
        self._saved = None if checkpoint is None else self._read(self._file(checkpoint))
        args = self._trainer.args
        if checkpoint is not None and args.dataloader_persistent_workers and args.dataloader_num_workers > 0:
            say_once(
                "hf.persistent_workers",
                "dataloader_persistent_workers=True: the workers keep generators of their own from epoch to epoch, which no checkpoint "
                "has. The batches of this resumed run can differ from those of the uninterrupted one. With "
                "dataloader_persistent_workers=False they are the same.",
            )
        self._epoch, self._skipped, self._start = epoch - 1, batches, None
        return epoch, batches

    def _place(self, position: Any, checkpoint: str) -> tuple[int, int]:
        try:
            epoch, batches = int(position["epoch"]), int(position["batches"])
        except (TypeError, KeyError, ValueError) as error:
            file = Path(checkpoint) / TRAINER_STATE_NAME
            raise ValueError(f"{file} is damaged: {POSITION} is {position!r}. Resume from another checkpoint.") from error
        return epoch, 0 if self._trainer.args.ignore_data_skip else batches

    @staticmethod
    def _read(file: Path) -> dict[str, Any] | None:
        """What `save` wrote; None where an older checkpoint has no file; ``ValueError`` where it is something else."""
        if not file.is_file():
            return None
        try:
            saved = torch.load(file, weights_only=True)
            before = generator_states([])
            try:
                set_generator_states(saved["start"], [])
            finally:
                set_generator_states(before, [])
            return {"epoch": int(saved["epoch"]), "start": saved["start"], "now": list(saved["now"])}
        except _DAMAGE as error:
            raise ValueError(
                f"{file} is damaged: it does not hold the generator states that the order of the batches comes from. Resume from another "
                "checkpoint, or delete this file: the rest of the epoch may then have other batches."
            ) from error

    def host_loaded(self) -> None:
        """The host has put back its generators: before it makes the iterator of a whole epoch, or behind the batches that it skipped."""
        if self._batches == 0:
            set_loader_states(self._saved["now"] if self._saved is not None else [], self._loaders())
            self._start = generator_states(self._loaders())
