"""What an evaluation beyond the first must not leave behind in the trainer: backward calls, counters, logged values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zo_lightning.engine.undo import nothing, undoing

_DATA = frozenset({"train_dataset", "eval_dataset"})


@contextmanager
def no_backward(accelerator: object) -> Iterator[None]:
    """The host's training step runs whole, except for ``accelerator.backward``."""
    with undoing() as undo:
        undo.bind(accelerator, backward=nothing)
        yield


@contextmanager
def unseen(trainer: Any) -> Iterator[None]:
    """Put back what the host's training step counts (trl: ``num_tokens``, accuracies) and logs, metrics of the model included (`Undo`)."""
    with undoing() as undo:
        undo.metrics(trainer.model)
        undo.attributes(trainer, skip=_DATA)
        undo.bind(trainer, log=nothing)
        yield
