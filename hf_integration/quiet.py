"""What an evaluation beyond the first must not leave behind in the trainer: backward calls, counters, logged values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zo_lightning.engine.undo import Rerun, Undo, nothing

_DATA = frozenset({"train_dataset", "eval_dataset"})


class NoBackward:
    """The host's training step runs whole, except for ``accelerator.backward``.

    Evaluations that take turns, block by block, are inside at the same time: the last one that leaves puts everything back.
    """

    def __init__(self) -> None:
        self._undo = Undo()
        self._inside = 0
        self.loss: Any = None
        """What the step would have called backward on; it returns it detached, which has no derivative any more."""

    @contextmanager
    def __call__(self, accelerator: object) -> Iterator[None]:
        """Around one evaluation."""
        if not self._inside:
            self._undo.bind(accelerator, backward=self._hear)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._undo.undo()

    def _hear(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        self.loss = loss

    def take(self) -> Any:
        """The loss of the last step."""
        loss, self.loss = self.loss, None
        return loss


def rerun(trainer: Any) -> Rerun:
    """What a trainer counts (trl: ``num_tokens``, accuracies), attributes of the modules of its model, and their metrics."""

    def remember(undo: Undo) -> None:
        undo.modules(trainer.model)
        undo.attributes(trainer, skip=_DATA)

    return Rerun(remember)


@contextmanager
def unseen(state: Rerun, trainer: Any) -> Iterator[None]:
    """Around an evaluation that nobody should notice; ``log`` is silent, too."""
    with state.hidden() as undo:
        undo.bind(trainer, log=nothing)
        yield
