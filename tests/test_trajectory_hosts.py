"""Runs of both hosts that are cut off anywhere and begun again with other weights end as if nothing had happened."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import lightning_models
import pytest
import torch
from keeper_tools import equal
from lightning_models import HOST_WARNINGS, NAMES, lightning, lit, loader, loss_of, net
from scissors import CutError, Scissors

from zo_lightning.callbacks import Run, TrajectoryLog, ZOCallback, ZOMonitor
from zo_lightning.engine import StepReport
from zo_lightning.engine.messages import ZOWarning
from zo_lightning.engine.trajectory import read_log, verify
from zo_lightning.strategy import ZOStrategy

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]
pytestmark += [pytest.mark.filterwarnings(r"ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning")]
LOG = "trajectory.zolog"


# ---- Lightning


def module(name: str, seed: int, **options: Any) -> Any:
    """BatchNorm or not, a schedule or a plateau, logged values or not."""
    base: Any = lit(name)
    logs, plateau, dtype = options.get("logs", False), options.get("plateau"), options.get("dtype", torch.float32)

    class Module(base):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = loss_of(self.net, [part.to(dtype) for part in batch])
            if logs:
                self.log("train_loss", loss, on_step=True, on_epoch=True)
            return {"loss": loss, "rows": len(batch[0])} if options.get("output") else loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", loss_of(self.net, [part.to(dtype) for part in batch]).float())

    def configure(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, weight_decay=0.01)
        if plateau:
            schedule: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            return [optimizer], [{"scheduler": schedule, "monitor": plateau}]
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95), "interval": options.get("interval", "step")}
        ]

    model = net()
    with torch.no_grad():
        draw = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return Module(model.to(dtype), configure)


class Counting:
    """Keeps what a callback of the host sees of every batch."""

    def __new__(cls, name: str) -> Any:
        class Callback(lightning(name).Callback):  # type: ignore[misc]
            rows = 0

            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                self.rows += outputs["rows"]

        return Callback()


def fit(folder: Path, cut: int | None = None, seed: int = 1, name: str = NAMES[0], **options: Any) -> dict[str, Any]:
    """An ordinary script; what it ends with."""
    callbacks = [options.pop("log", None) or TrajectoryLog(), Scissors(cut, options.pop("error", CutError)), *options.pop("callbacks", [])]
    every, own = (
        options.pop("save", None),
        {key: options.pop(key) for key in ("interval", "logs", "plateau", "dtype", "output") if key in options},
    )
    strategy = ZOStrategy(**{"eps": 1e-2, **options.pop("zo", {})})
    if monitor := options.pop("monitor", None):
        callbacks.append(lightning(name).callbacks.ModelCheckpoint(monitor=monitor, save_top_k=-1))
    if every:
        callbacks.append(lightning(name).callbacks.ModelCheckpoint(every_n_train_steps=every, save_top_k=-1))
    if options.pop("epochs", False):
        callbacks.append(lightning(name).callbacks.ModelCheckpoint(every_n_epochs=1, save_top_k=-1))
        every = 1
    if over := options.pop("over", None):
        callbacks.append(lightning(name).callbacks.ModelCheckpoint(every_n_train_steps=over, save_last=True))
        every = over
    count = Counting(name) if own.get("output") else None
    limits, path = {"max_epochs": 2, **options.pop("limits", {})}, options.pop("path", None)
    random.seed(0)
    torch.manual_seed(0)
    trained = module(name, seed, **own)
    host = lightning_models.trainer(
        folder, name, strategy=strategy, num_sanity_val_steps=0, callbacks=[*callbacks, *([count] if count else [])],
        enable_checkpointing=bool(every or monitor), **limits, **options,
    )  # fmt: skip
    result: dict[str, Any] = {}
    try:
        host.fit(trained, loader(shuffle=True), loader(16), ckpt_path=path, weights_only=None if path is None else True)
    except CutError:
        result["cut"] = True
    engine = host.strategy.zo_optimizer
    result |= {"weights": lightning_models.state(trained), "zo": engine.state_dict()["zo"], "steps": host.global_step}
    result |= {"epoch": host.current_epoch, "lr": [group["lr"] for group in host.optimizers[0].param_groups]}
    result |= {"metrics": {key: float(value) for key, value in host.callback_metrics.items()}, "rows": count and count.rows}
    return result


LIGHTNING: dict[str, dict[str, Any]] = {
    "plain": {},
    "other namespace": {"name": NAMES[1]},
    "saves": {"save": 3},
    "saves in the other namespace": {"save": 5, "name": NAMES[1]},
    "accumulation": {"save": 3, "accumulate_grad_batches": 3},
    "validations in between": {"val_check_interval": 3, "logs": True, "save": 4},
    "logged values": {"logs": True},
    "a scheduler of epochs": {"interval": "epoch", "save": 3, "limits": {"max_epochs": 3}},
    "a checkpoint at every validation": {"monitor": "val_loss", "interval": "epoch", "limits": {"max_epochs": 4}},
    "a checkpoint at every validation in between": {"monitor": "val_loss", "val_check_interval": 4, "limits": {"max_epochs": 3}},
    "checkpoints at every batch": {"save": 1, "val_check_interval": 4, "interval": "epoch", "limits": {"max_epochs": 3}},
    "plateau of the training loss": {"logs": True, "plateau": "train_loss_epoch", "limits": {"max_epochs": 4}},
    "plateau of the validation": {"plateau": "val_loss", "save": 6, "limits": {"max_epochs": 4}},
    "plateau, a checkpoint at the end of epochs": {"plateau": "val_loss", "epochs": True, "limits": {"max_epochs": 4}},
    "plateau, the same and max_steps": {"plateau": "val_loss", "epochs": True, "limits": {"max_steps": 30, "max_epochs": -1}},
    "a file that is written over": {"over": 2, "interval": "epoch", "plateau": "val_loss", "limits": {"max_epochs": 3}},
    "a dict as output": {"output": True},
    "bf16": {"dtype": torch.bfloat16, "precision": "bf16-true", "save": 4},
    "bf16 in place": {"dtype": torch.bfloat16, "precision": "bf16-true", "zo": {"weights": "inplace"}, "logs": True},
    "in place and accumulation": {"zo": {"weights": "inplace"}, "accumulate_grad_batches": 2, "save": 3},
    "max_steps": {"limits": {"max_epochs": -1, "max_steps": 13}, "save": 5},
}


@pytest.mark.filterwarnings("ignore:.*Trying to infer the `batch_size`", "ignore:Precision bf16-true")
@pytest.mark.parametrize("case", LIGHTNING)
def test_a_fit_that_is_cut_off_ends_as_the_whole_one(case: str, tmp_path: Path) -> None:
    options = LIGHTNING[case]
    whole = fit(tmp_path / "whole", **options)
    steps = whole["zo"]["steps"]
    for cut in random.Random(case).sample(range(1, steps + 1), 3):
        folder = tmp_path / str(cut)
        assert fit(folder, cut, **options)["cut"]
        again = fit(folder, seed=9, **options)
        assert equal(again, whole), (cut, [key for key in whole if not equal(whole[key], again[key])])
        log = read_log(folder / LOG)
        assert (log.end is not None, log.end_step) == (True, steps)


def test_early_stopping_stops_at_the_same_place(tmp_path: Path) -> None:
    def stopping() -> dict[str, Any]:
        stop = lightning().callbacks.EarlyStopping("val_loss", patience=1, min_delta=0.01)
        return {"callbacks": [stop, ZOMonitor()], "limits": {"max_epochs": 8}, "save": 5, "plateau": "val_loss"}

    whole = fit(tmp_path / "whole", **stopping())
    assert 16 <= whole["steps"] < 64
    assert fit(tmp_path / "run", 11, **stopping())["cut"]
    assert equal(fit(tmp_path / "run", seed=9, **stopping()), whole)


def test_control_c_is_a_cut_and_so_is_the_end_of_a_continued_run(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    for after in (3, 9, 16):
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            fit(tmp_path / "run", after, seed=1 if after == 3 else after, error=KeyboardInterrupt)
    again = fit(tmp_path / "run", seed=5)
    assert equal(again, whole)
    assert verify_log(tmp_path / "run")


def verify_log(folder: Path) -> bool:
    """Whether what a log says of itself is true."""
    from zo_lightning.engine.trajectory import load_base

    log = read_log(folder / LOG)
    base = load_base(folder / str(log.segments[-1].base))
    return verify(base, log).ok


def test_a_path_that_the_user_gives_wins(tmp_path: Path) -> None:
    whole = fit(tmp_path / "run", save=3)
    first, *_, last = sorted((tmp_path / "run").glob("checkpoints/*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))
    (tmp_path / "run" / LOG).unlink()
    assert fit(tmp_path / "run", 12, save=3, seed=4)["cut"]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        again = fit(tmp_path / "run", seed=7, path=first, save=3)
    assert any("A new step log begins" in text for text in lightning_models.said(record))
    assert equal(again["weights"], whole["weights"])
    assert read_log(tmp_path / "run" / LOG).segments[0].step == 3
    assert last != first


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", save=3)
    assert fit(tmp_path / "run", 11, save=3)["cut"]
    newest = max((tmp_path / "run").glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert equal(fit(tmp_path / "run", seed=7, save=3), whole)


def test_a_folder_that_was_moved_still_has_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(tmp_path / "whole", save=3)
    monkeypatch.chdir(tmp_path)
    assert fit(Path("run"), 11, save=3)["cut"]
    (tmp_path / "run").rename(tmp_path / "moved")
    (next((tmp_path / "moved").glob("base-*"))).unlink()
    monkeypatch.chdir("/")
    assert equal(fit(tmp_path / "moved", seed=7, save=3), whole)


def test_a_finished_fit_begins_anew_when_it_is_started_again(tmp_path: Path) -> None:
    whole = fit(tmp_path, save=3)
    with pytest.warns(ZOWarning, match="the run of the old one ended by itself after 16 steps"):
        again = fit(tmp_path, save=3)
    assert equal(again, whole)
    assert (tmp_path / "trajectory-001.zolog").exists()


@pytest.mark.parametrize(
    "options", [{}, {"save": 3}, {"save": 3, "val_check_interval": 3, "logs": True}], ids=["plain", "saves", "validations"]
)
@pytest.mark.parametrize("every", [3, 4])
def test_a_finished_fit_is_made_again_where_that_is_asked_for(options: dict[str, Any], every: int, tmp_path: Path) -> None:
    options = {**options, "save": every if "save" in options else None}
    whole = fit(tmp_path, **options)
    again = fit(tmp_path, seed=7, log=TrajectoryLog(resume=True), **options)
    assert equal(again, whole)
    assert len(list(tmp_path.glob("*.zolog"))) == 1


@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 12}], ids=["epochs", "steps"])
def test_a_kill_between_the_last_checkpoint_and_the_end_adds_no_step(limits: dict[str, int], tmp_path: Path) -> None:
    whole = fit(tmp_path, save=4, limits=limits)
    path = tmp_path / LOG
    path.write_bytes(path.read_bytes()[:-3])  # without its last record, which says that the run ended
    assert equal(fit(tmp_path, seed=7, save=4, limits=limits), whole)


@pytest.mark.parametrize("save", [None, 3])
@pytest.mark.parametrize("change", [{"seed": 3}, {"eps": 0.5}, {"lr": 1e-3}, {"noise": "gaussian"}])
def test_options_that_were_changed_are_not_overruled_in_silence(change: dict[str, Any], save: int | None, tmp_path: Path) -> None:
    assert fit(tmp_path, 8, save=save, zo={})["cut"]
    if save:
        with pytest.raises(ValueError, match=r"cut off and has checkpoints.*but it was another one: .*resume=False"):
            fit(tmp_path, save=save, zo=change)
        return
    with pytest.warns(ZOWarning, match="A new step log begins"):
        assert fit(tmp_path, zo=change)["steps"] == 16


def test_a_rehearsal_and_an_evaluation_leave_no_trace(tmp_path: Path) -> None:
    assert fit(tmp_path, 8, save=3)["cut"]
    before = (tmp_path / LOG).read_bytes()
    host = lightning_models.trainer(tmp_path, callbacks=[TrajectoryLog()], fast_dev_run=3)
    host.fit(module(NAMES[0], 5), loader(), loader(16))
    assert (host.global_step, (tmp_path / LOG).read_bytes()) == (3, before)
    host = lightning_models.trainer(tmp_path, callbacks=[TrajectoryLog()])
    host.validate(module(NAMES[0], 5), loader(16), verbose=False)
    assert sorted(path.name for path in tmp_path.glob("*.zolog")) == [LOG]
    assert (tmp_path / LOG).read_bytes() == before


def test_barebones(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"default_root_dir": tmp_path, "callbacks": [TrajectoryLog()]}
        host = lightning().Trainer(strategy="zo", accelerator="cpu", barebones=True, max_steps=4, **given)
        host.fit(module(NAMES[0], 5), loader())
    assert read_log(tmp_path / LOG).end_step == 4


def test_two_fits_of_one_trainer_are_one_log(tmp_path: Path) -> None:
    def twice(folder: Path, seed: int, cut: int | None = None) -> Any:
        trained = module(NAMES[0], seed)
        host = lightning_models.trainer(folder, callbacks=[TrajectoryLog(), Scissors(cut)], max_steps=5, max_epochs=-1)
        host.fit(trained, loader(), loader(16))
        host.fit_loop.epoch_loop.max_steps = 12
        host.fit(trained, loader(), loader(16))
        return trained

    whole = twice(tmp_path / "whole", 1)
    assert read_log(tmp_path / "whole" / LOG).end_step == 12
    with pytest.raises(CutError):
        twice(tmp_path / "run", 1, 9)
    again = twice(tmp_path / "run", 2)
    assert lightning_models.same(lightning_models.state(again), lightning_models.state(whole))


class Rates(ZOCallback):
    """Keeps the learning rate of every step that is made here."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_zo_step(self, run: Run, report: StepReport) -> None:
        self.seen.append(report.lr)


@pytest.mark.parametrize("save", [None, 3], ids=["log alone", "checkpoints"])
def test_a_plateau_that_was_reached_before_the_cut_is_not_forgotten(save: int | None, tmp_path: Path) -> None:
    """ReduceLROnPlateau of a validation metric, once an epoch of 8 steps."""

    def script(folder: Path, cut: int | None = None, seed: int = 1) -> tuple[dict[str, Any], list[float]]:
        rates = Rates()
        result = fit(folder, cut, seed, plateau="val_loss", save=save, limits={"max_epochs": 5}, callbacks=[rates])
        return result, rates.seen

    whole, rates = script(tmp_path / "whole")
    steps = [step for step in range(1, 40) if rates[step] != rates[step - 1]]
    assert len(steps) >= 2  # epochs after which it was reached
    for cut in (steps[0] + 3, steps[-1], steps[-1] + 1):
        folder = tmp_path / str(cut)
        assert script(folder, cut)[0]["cut"]
        again, rest = script(folder, seed=9)
        assert equal(again, whole), [key for key in whole if not equal(whole[key], again[key])]
        assert rest == rates[-len(rest) :]
        assert len(rest) >= 40 - cut
