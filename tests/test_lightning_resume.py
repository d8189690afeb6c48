"""A resumed run is the uninterrupted one bit for bit: at epoch borders, at mid-epoch, inside an accumulation window."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_models import HOST_WARNINGS, Recorder, lightning, lit, loader, loss_of, net, rows, same, state, trainer
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


class Noting(lit()):  # type: ignore[misc]
    """Notes which rows it saw; has a scheduler and a dataset-independent use of the host's random numbers."""

    def __init__(self) -> None:
        super().__init__(net(), self.schedule)
        self.seen: list[list[float]] = []

    def schedule(self, module: Any) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97), "interval": "step"}]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batches = list(batch.values()) if isinstance(batch, dict) else [batch]
        self.seen.append([float(x) for part in batches for x in part[0][:, 0]])
        return sum(loss_of(self.net, part) for part in batches)


class Saving(lightning().Callback):  # type: ignore[misc]
    """Writes a checkpoint after a number of batches, or at the end of an epoch, and notes the batches up to there."""

    def __init__(self, path: Path, batches: int | None = None, epoch: int | None = None) -> None:
        self.path, self.batches, self.epoch, self.count = path, batches, epoch, 0
        self.seen = 0

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.count += 1
        if self.count == self.batches:
            self.save(trainer, module)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.save(trainer, module)

    def save(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(self.path)
        self.seen = len(module.seen)


def resumed(make: Any, tmp_path: Path, at: dict[str, int], **options: Any) -> tuple[Noting, Noting]:
    """The module of an uninterrupted run, and that of a run which resumes from its checkpoint with other generator states."""
    seed(1)
    whole, recorder = Noting(), Recorder()
    saving = Saving(tmp_path / "run.ckpt", **at)
    trainer(tmp_path, callbacks=[saving, recorder], **options).fit(whole, make())
    seed(99)
    rest, again = Noting(), Recorder()
    torch.rand(17)
    trainer(tmp_path, callbacks=[again], **options).fit(rest, make(), ckpt_path=saving.path, weights_only=True)
    whole.seen = whole.seen[saving.seen :]
    assert again.values == recorder.values[-len(again.values) :]
    assert [report.lr for report in again.reports] == [report.lr for report in recorder.reports][-len(again.values) :]
    return whole, rest


class Stream(IterableDataset[Any]):
    """Rows without a length, shuffled by numpy."""

    def __iter__(self) -> Iterator[Any]:
        data = rows()
        for index in np.random.permutation(len(data)):
            yield data[int(index)]


def weighted() -> Any:
    return loader(sampler=WeightedRandomSampler(torch.arange(64.0), 64))


def own_generator() -> Any:
    return loader(shuffle=True, generator=torch.Generator().manual_seed(5))


LOADERS = {
    "in order": loader,
    "shuffled": lambda: loader(shuffle=True),
    "workers": lambda: loader(shuffle=True, num_workers=2),
    "generator": own_generator,
    "weighted": weighted,
    "iterable": lambda: DataLoader(Stream(), 8),
    "two loaders": lambda: {"a": loader(shuffle=True), "b": loader(4, shuffle=True)},
    "stateful": lambda: StatefulDataLoader(rows(), 8, shuffle=True),
}
PLACES = {"first epoch": {"batches": 5}, "second epoch": {"batches": 11}, "last batch": {"batches": 8}, "border": {"epoch": 0}}


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers", "ignore:.*AdamW's.*:UserWarning", "ignore:'set_vital'")
@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 24}])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", LOADERS)
def test_resume_is_the_uninterrupted_run(kind: str, place: str, limit: dict[str, int], tmp_path: Path) -> None:
    whole, rest = resumed(LOADERS[kind], tmp_path, PLACES[place], **limit)
    assert rest.seen == whole.seen
    assert same(state(rest), state(whole))
