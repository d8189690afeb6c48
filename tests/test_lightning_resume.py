"""A resumed run is the uninterrupted one bit for bit: at epoch borders, at mid-epoch, inside an accumulation window."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_models import HOST_WARNINGS, NAMES, Recorder, lightning, lit, loader, loss_of, net, rows, said, same, state, trainer
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from zo_lightning import ZOOptimizer

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
    "persistent workers": lambda: loader(shuffle=True, num_workers=1, persistent_workers=True),
    "generator": own_generator,
    "weighted": weighted,
    "iterable": lambda: DataLoader(Stream(), 8),
    "two loaders": lambda: {"a": loader(shuffle=True), "b": loader(4, shuffle=True)},
    "stateful": lambda: StatefulDataLoader(rows(), 8, shuffle=True),
}
PLACES = {"first epoch": {"batches": 5}, "second epoch": {"batches": 11}, "last batch": {"batches": 8}, "border": {"epoch": 0}}


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers", "ignore:.*AdamW's.*:UserWarning", "ignore:'set_vital'")
@pytest.mark.filterwarnings("ignore:persistent_workers=True.*what the workers draw")
@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 24}])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", LOADERS)
def test_resume_is_the_uninterrupted_run(kind: str, place: str, limit: dict[str, int], tmp_path: Path) -> None:
    whole, rest = resumed(LOADERS[kind], tmp_path, PLACES[place], **limit)
    assert rest.seen == whole.seen
    assert same(state(rest), state(whole))


@pytest.mark.filterwarnings("ignore:.*AdamW's.*:UserWarning")
@pytest.mark.parametrize("limit", [{"max_steps": 24}, {"max_steps": 24, "max_epochs": 3}])
@pytest.mark.parametrize("steps", [8, 5])
def test_a_run_that_max_steps_ended_is_extended(steps: int, limit: dict[str, int], tmp_path: Path) -> None:
    runs = []
    for path, stop in ((None, limit), (None, {"max_steps": steps}), (tmp_path / "ended.ckpt", limit)):
        seed(1 if path is None else 99)
        runs.append(Noting())
        epochs: list[int] = []
        watch = lightning().callbacks.LambdaCallback(on_train_batch_start=lambda trainer, *a, e=epochs: e.append(trainer.current_epoch))
        fit = trainer(tmp_path, callbacks=[watch], **stop)
        fit.fit(runs[-1], loader(shuffle=True), ckpt_path=path)
        if stop is not limit:
            fit.save_checkpoint(tmp_path / "ended.ckpt")
    assert runs[2].seen == runs[0].seen[steps:]
    assert same(state(runs[2]), state(runs[0]))
    assert epochs == ([0] * 8 + [1] * 8 + [2] * 8)[steps:]  # not one more, for the epoch that was cut short


@pytest.mark.filterwarnings("ignore:.*AdamW's.*:UserWarning")
@pytest.mark.parametrize("batches", [2, 5, 8])
def test_resume_inside_an_accumulation_window(batches: int, tmp_path: Path) -> None:
    whole, rest = resumed(LOADERS["shuffled"], tmp_path, {"batches": batches}, max_epochs=2, accumulate_grad_batches=3)
    assert rest.seen == whole.seen
    assert same(state(rest), state(whole))


class Early(Saving):
    """Writes the checkpoint before the first batch."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 0:
            self.save(trainer, module)


@pytest.mark.filterwarnings("ignore:.*AdamW's.*:UserWarning")
@pytest.mark.parametrize("kind", ["shuffled", "workers", "stateful"])
@pytest.mark.filterwarnings("ignore:'set_vital'")
def test_resume_before_the_first_batch(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "Saving", Early)
    whole, rest = resumed(LOADERS[kind], tmp_path, {}, max_epochs=1)
    assert len(rest.seen) == 8
    assert rest.seen == whole.seen


@pytest.mark.filterwarnings("ignore:.*AdamW's.*:UserWarning")
def test_resume_from_a_model_checkpoint_with_validation_in_between(tmp_path: Path) -> None:
    pl = lightning()

    class Validated(Noting):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", loss_of(self.net, batch))

    modules = []
    for path in (None, tmp_path / "step=6.ckpt"):
        seed(1 if path is None else 99)
        keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
        fit = trainer(tmp_path, max_epochs=2, val_check_interval=4, enable_checkpointing=True, callbacks=[keep])
        modules.append(Validated())
        fit.fit(modules[-1], loader(shuffle=True), loader(16), ckpt_path=path)
    assert modules[1].seen == modules[0].seen[6:]
    assert same(state(modules[1]), state(modules[0]))


@pytest.mark.filterwarnings("ignore:.*AdamW's.*:UserWarning")
@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 24}])
def test_the_end_of_an_epoch_comes_once(limit: dict[str, int], tmp_path: Path) -> None:
    class Trace(lightning().Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[tuple[str, int, int]] = []

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.seen.append(("start", trainer.current_epoch, trainer.global_step))

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.seen.append(("end", trainer.current_epoch, trainer.global_step))

    whole, rest = Trace(), Trace()
    trainer(tmp_path, callbacks=[whole, Saving(tmp_path / "run.ckpt", epoch=0)], **limit).fit(Noting(), loader())
    trainer(tmp_path, callbacks=[rest], **limit).fit(Noting(), loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert whole.seen[:2] == [("start", 0, 0), ("end", 0, 8)]
    assert rest.seen == whole.seen[2:]


@pytest.mark.filterwarnings("ignore:.*AdamW's.*:UserWarning")
def test_a_run_with_nothing_left_to_do_has_the_metrics_of_its_end(tmp_path: Path) -> None:
    class Validated(Noting):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", loss_of(self.net, batch))

    whole = trainer(tmp_path, max_epochs=2, callbacks=[Saving(tmp_path / "last.ckpt", epoch=1)])
    whole.fit(Validated(), loader(), loader(16))
    again = trainer(tmp_path, max_epochs=2)
    again.fit(Validated(), loader(), loader(16), ckpt_path=tmp_path / "last.ckpt")
    assert again.global_step == 16
    assert again.callback_metrics == whole.callback_metrics != {}


@pytest.mark.filterwarnings("ignore:.*AdamW's.*:UserWarning")
def test_checkpoints_of_one_namespace_resume_in_the_other(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.ckpt" for name in NAMES}
    whole = {}
    for name in NAMES:
        module = lit(name)()
        trainer(tmp_path, name, max_steps=16, callbacks=[lightning(name).Callback()]).fit(module, loader())
        whole[name] = state(module)
        half = trainer(tmp_path, name, max_steps=5)
        half.fit(lit(name)(), loader())
        half.save_checkpoint(paths[name])
    for name, other in (NAMES, NAMES[::-1]):
        module = lit(name)()
        trainer(tmp_path, name, max_steps=16).fit(module, loader(), ckpt_path=paths[other])
        assert same(state(module), whole[name])


def test_an_optimizer_of_the_user_resumes(tmp_path: Path) -> None:
    def make() -> Any:
        return lit()(None, lambda module: ZOOptimizer(module, lr=0.01))

    whole = make()
    trainer(tmp_path, max_steps=12).fit(whole, loader())
    fit = trainer(tmp_path, max_steps=7)
    fit.fit(make(), loader())
    fit.save_checkpoint(tmp_path / "half.ckpt")
    rest = make()
    trainer(tmp_path, max_steps=12).fit(rest, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(state(rest), state(whole))


def test_checkpoint_holds_nothing_but_plain_types_and_no_moments(tmp_path: Path) -> None:
    module = lit()(None, lambda module: torch.optim.SGD(module.parameters(), lr=0.01))
    fit = trainer(tmp_path, max_steps=3)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "all.ckpt")
    fit.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "all.ckpt", weights_only=True)
    assert saved["zo_lightning"]["engine"]["zo"]["steps"] == 3
    assert saved["optimizer_states"][0]["state"] == {}
    assert "zo_lightning" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)


def first_order(tmp_path: Path, batches: int) -> Path:
    """A checkpoint of a run with gradients."""
    fit = trainer(tmp_path, strategy="auto", max_steps=batches)
    fit.fit(lit()(None, lambda module: torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)), loader())
    fit.save_checkpoint(tmp_path / "first.ckpt")
    return tmp_path / "first.ckpt"


@pytest.mark.parametrize("batches", [8, 5])
def test_a_first_order_checkpoint_goes_on_without_its_moments(batches: int, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = first_order(tmp_path, batches)
    module, recorder = lit()(None, lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9)), Recorder()
    fit = trainer(tmp_path, max_steps=12, callbacks=[recorder])
    fit.fit(module, loader(), ckpt_path=path)
    assert recorder.reports[0].step == batches
    assert not fit.optimizers[0].state
    unknown = [text for text in said(recwarn) if "was not written by a forward-only run" in text]
    assert len(unknown) == (batches == 5)


CHANGED = {
    "another batch size": (lambda: loader(4), "An epoch has 16 batches now and had 8"),
    "less data": (lambda: DataLoader(Short(), 8), "The training data ended before the 5 batches of the checkpoint"),
    "one stateful loader of two": (lambda: [StatefulDataLoader(rows(), 8), loader()], "Some of the training loaders keep their own state"),
}


class Short(IterableDataset[Any]):
    length = 64

    def __iter__(self) -> Iterator[Any]:
        return iter([rows()[index] for index in range(self.length)])


@pytest.mark.filterwarnings("ignore:'set_vital'", "ignore:.*AdamW's.*:UserWarning", "ignore:Could not load the state")
@pytest.mark.parametrize("case", CHANGED)
def test_data_that_cannot_be_brought_to_the_same_batch_is_said(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    make, message = CHANGED[case]
    fit = trainer(tmp_path, max_steps=5)
    fit.fit(Pairs(), make() if "batch size" not in case else loader())
    fit.save_checkpoint(tmp_path / "run.ckpt")
    monkeypatch.setattr(Short, "length", 24)
    rest = Pairs()
    trainer(tmp_path, max_steps=8).fit(rest, make(), ckpt_path=tmp_path / "run.ckpt")
    texts = said(recwarn)
    assert sum(message in text and "begins with its first batch again" in text for text in texts) == 1
    assert len(rest.seen) == 3


class Pairs(Noting):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0] if isinstance(batch[0], list) else batch, batch_idx)
