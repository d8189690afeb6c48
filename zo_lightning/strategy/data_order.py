"""Resuming: a plain DataLoader begins its epoch over in Lightning; here it goes on where the checkpoint was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from zo_lightning.engine.generators import Random, generator_states, set_generator_states

Say = Callable[[str, str], None]


@runtime_checkable
class Stateful(Protocol):
    """A loader that Lightning resumes by itself, such as torchdata's StatefulDataLoader."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class DataOrder:
    """Records the generator states that an epoch's order of batches comes from, and goes back to them on resume.

    Samplers draw their order when the iterator is made and when its first batch is fetched, from torch's, Python's or numpy's global
    generator or from the `generator=` of the loader. So the states at both moments and at the moment of the checkpoint are saved. On resume
    the iterator is made anew from the first, the seen batches are fetched and dropped, and the generators go on as they were.
    """

    def __init__(self, trainer: Any, say: Say) -> None:
        self._trainer = trainer
        self._say = say
        self._made: Random | None = None
        self._fetched: Random | None = None
        self._fresh = True
        self._saved: dict[str, Any] | None = None
        self._resuming = False
        self._in_epoch_end = False

    @property
    def _loop(self) -> Any:
        return self._trainer.fit_loop.epoch_loop

    def _loaders(self) -> list[Any]:
        combined = self._trainer.fit_loop._combined_loader
        return [] if combined is None else list(combined.flattened)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        now = generator_states(self._loaders())
        return {"made": self._made, "fetched": self._fetched, "fresh": self._fresh, "now": now, "batches": self._batches()}

    def load(self, saved: dict[str, Any] | None) -> None:
        """The run goes on from a checkpoint; None where it holds no state of ours."""
        self._saved, self._resuming = saved, True
        fit = self._trainer.fit_loop
        batch, epoch = self._loop.batch_progress, fit.epoch_progress.current
        if fit._iteration_based_training() and batch.current.completed and not batch.is_last_batch and epoch.completed == epoch.ready:
            self._count(-1, "processed", "completed")  # max_steps ended the run, and Lightning counted the epoch that it cut short
        self._in_epoch_end = epoch.ready == epoch.processed == epoch.completed + 1
        if fit._iteration_based_training() and self._in_epoch_end:
            self._count(1, "completed")  # or Lightning runs the hooks of the end of the epoch once more

    def _count(self, more: int, *names: str) -> None:
        """Change the epochs that are counted."""
        progress = self._trainer.fit_loop.epoch_progress
        for count in (progress.current, progress.total):
            for name in names:
                setattr(count, name, getattr(count, name) + more)

    def finish_epoch(self) -> None:
        """Training begins. A checkpoint of the end of an epoch was written before the schedulers that look at metrics made their step."""
        if self._in_epoch_end:
            self._in_epoch_end = False
            self._loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)

    def loader_ready(self, loader: Any) -> None:
        """The fit loop is about to make the iterator of its first epoch."""
        self._made, self._fetched = generator_states(self._loaders()), None
        self._fresh = _workers(loader) is None

    def attach(self) -> None:
        """Be told when an epoch begins. Between that and its first fetch nothing of the user's runs."""
        if self._resuming and self._saved is not None:
            set_generator_states(self._saved["now"], self._loaders())
        self.detach()
        inner = self._loop.on_run_start
        self._loop.on_run_start = lambda fetcher: self._epoch(fetcher, inner)

    def detach(self) -> None:
        """Leave the loop as it was."""
        vars(self._loop).pop("on_run_start", None)

    def _epoch(self, fetcher: Any, inner: Callable[[Any], None]) -> None:
        resuming, self._resuming = self._resuming, False
        saved, self._saved = self._saved, None
        ended = self._loop.restarted_on_train_batch_end and self._loop.batch_progress.is_last_batch
        if ended:
            self._loop.batch_progress.reset_on_run()  # Lightning forgets to where it doesn't know the length of an epoch
        if resuming and self._ended_before():
            self._loop._restarting = False
            self._loop.reset()
        seen = int(self._loop.batch_progress.current.ready)
        if resuming and (saved is not None or seen):
            self._go_on(fetcher, seen, saved)
            inner(fetcher)
            if ended:
                self._loop._restarting = False  # or Lightning validates before the first batch
            self._trainer.fit_loop._restarting = False  # or the schedulers of epochs are not stepped when this one ends
            return
        remakes = self._trainer.current_epoch > 0 and not self._trainer.fit_loop.is_resuming and not self._loop.restarting
        if remakes or self._made is None:
            self._made, self._fresh = generator_states(self._loaders()), False
        inner(fetcher)
        self._fetched = generator_states(self._loaders())

    def _ended_before(self) -> bool:
        """The run ended with the epoch, by max_steps: Lightning would go on in the old epoch, under the number of the next."""
        fit, loop = self._trainer.fit_loop, self._loop
        counted = not (fit.restarted_mid_epoch or fit.restarted_on_epoch_end)
        return bool(loop.restarted_on_last and loop.batch_progress.is_last_batch and counted)

    def _go_on(self, fetcher: Any, seen: int, saved: dict[str, Any] | None) -> None:
        """Bring the iterator to where the checkpoint was written, or say why not."""
        loaders = self._loaders()
        stateful = [isinstance(loader, Stateful) for loader in loaders]
        problem = self._problem(seen, saved, stateful)
        if problem is not None:
            self._say("lightning.data_order", f"{problem} {_ORDER}")
        if saved is None:
            return
        if self._trainer.current_epoch > 0 and any(_workers(loader) is not None for loader in loaders):
            self._say("lightning.persistent_workers", _WORKERS)
        if not seen:
            begun = saved["made"] is not None and saved["fetched"] is None  # written between the iterator and its first batch
            set_generator_states(saved["made"] if begun else None, loaders)
            self._made = generator_states(loaders)
            if not (begun and any(stateful)):
                iter(fetcher)
            set_generator_states(saved["now"] if begun else None, loaders)
            self._fetched = generator_states(loaders)
            return
        self._made, self._fetched, self._fresh = saved["made"], saved["fetched"], saved.get("fresh", True)
        if problem is None and not any(stateful):
            set_generator_states(self._made, loaders)
            if self._fresh:  # new workers are seeded from the generator, those that live on are not
                for loader in loaders:
                    if _workers(loader) is not None:
                        loader._iterator = None
            iter(fetcher)
            set_generator_states(self._fetched, loaders)
            self._drop(fetcher, seen)
        set_generator_states(saved["now"], loaders)

    def _problem(self, seen: int, saved: dict[str, Any] | None, stateful: list[bool]) -> str | None:
        if not seen or all(stateful):
            return None
        if any(stateful):
            return "Some of the training loaders keep their own state and some do not, so that they can't be brought to the same batch."
        if saved is None or saved["fetched"] is None:
            return "The checkpoint was not written by a forward-only run and does not say in which order the data came."
        if saved["batches"] != self._batches():
            return f"An epoch has {self._batches()} batches now and had {saved['batches']} when the checkpoint was written."
        return None

    def _batches(self) -> int | None:
        batches = self._trainer.fit_loop.max_batches
        return None if batches == float("inf") else int(batches)

    def _drop(self, fetcher: Any, seen: int) -> None:
        for _ in range(seen):
            try:
                next(fetcher)
            except StopIteration:
                self._say("lightning.data_order", f"The training data ended before the {seen} batches of the checkpoint. {_ORDER}")
                iter(fetcher)
                return
        fetcher.fetched -= seen  # the loop adds what it has seen by itself


def _workers(loader: Any) -> Any:
    """The iterator that a loader with persistent workers keeps, where it has made one."""
    return getattr(loader, "_iterator", None)


_WORKERS = (
    "persistent_workers=True: the batches are those of the uninterrupted run, but what the workers draw at random themselves begins anew. "
    "With persistent_workers=False each epoch seeds them, and a resumed run has the same numbers."
)
_ORDER = "The resumed epoch begins with its first batch again, and its batches differ from those of the uninterrupted run."
