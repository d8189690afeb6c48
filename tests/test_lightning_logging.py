"""What is seen of a step is seen once: logged values, metrics, buffers, lists of the module; and the values of ZOCallbacks are logged."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_models import HOST_WARNINGS, NAMES, Recorder, lightning, lit, loader, loss_of, net, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics import CatMetric, MeanMetric, MetricCollection, MinMaxMetric, SumMetric
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, BinaryPrecision

from zo_lightning import ZOStrategy
from zo_lightning.callbacks import ZOMonitor
from zo_lightning.engine import SPSA, EngineOptions

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]


class Logging(lit()):  # type: ignore[misc]
    """Logs and counts in all the ways that modules do."""

    def __init__(self) -> None:
        super().__init__(net(dropout=0.0))
        self.rows = SumMetric()
        self.numbers = CatMetric()
        self.scores = MetricCollection([BinaryAccuracy(), BinaryPrecision(), BinaryF1Score()])
        self.best = MinMaxMetric(MeanMetric())
        self.loose = {"mean": MeanMetric()}
        self.losses: list[torch.Tensor] = []
        self.nested: dict[str, list[int]] = {"batches": []}
        self.recent: deque[int] = deque(maxlen=3)
        self.calls = 0
        self.total = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = loss_of(self.net, batch)
        target = (batch[1] > 0).int()
        predicted = torch.sigmoid(self.net(batch[0] * 0.01))
        self.rows.update(batch[0].new_ones(len(batch[0])))
        self.numbers(batch[0][:, 0])
        self.scores(predicted, target)
        self.best(loss)
        self.loose["mean"].update(loss)
        self.log("rows", float(len(batch[0])), reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("metric_rows", self.rows, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({f"{name}": metric for name, metric in self.scores.items()}, on_step=False, on_epoch=True)
        self.losses.append(loss)
        self.nested["batches"].append(batch_idx)
        self.recent.append(batch_idx)
        self.calls += 1
        self.total += loss
        if self.logger is not None:
            self.logger.log_metrics({"direct": float(batch_idx)}, step=batch_idx)
        return loss


@pytest.mark.parametrize("weights", ["copy", "exact"])  # exact has one more evaluation, in its first step
def test_everything_is_counted_once(weights: str, tmp_path: Path) -> None:
    module, recorder = Logging(), Recorder()
    strategy = ZOStrategy(weights=weights, estimator=SPSA(2))
    fit = trainer(tmp_path, strategy=strategy, max_epochs=1, callbacks=[recorder])
    fit.fit(module, loader())
    assert strategy.zo_optimizer is not None
    assert strategy.zo_optimizer.forward_passes == 32
    first = [report.values[0] for report in recorder.reports]
    assert fit.callback_metrics["rows"] == fit.callback_metrics["metric_rows"] == 64
    assert torch.equal(module.numbers.compute(), torch.arange(64.0))
    assert len(module.numbers.value) == 8
    assert module.loose["mean"].compute().item() == pytest.approx(sum(first) / 8)
    assert fit.callback_metrics["loss_epoch"].item() == pytest.approx(sum(first) / 8)
    assert fit.callback_metrics["loss_step"].item() == pytest.approx(first[-1])
    assert [float(loss) for loss in module.losses] == pytest.approx(first)
    assert module.nested == {"batches": list(range(8))}
    assert list(module.recent) == [5, 6, 7]
    assert module.calls == 8
    assert module.total.item() == pytest.approx(sum(first))
    assert module.best.compute()["min"].item() == pytest.approx(min(first))


def test_metrics_equal_those_of_a_run_without_training(tmp_path: Path) -> None:
    """lr=0 and a tiny eps: the values are those of the untrained network, for both strategies."""
    results = []
    for strategy in (ZOStrategy(lr=0.0, eps=1e-12), "auto"):
        module = Logging()
        module.configure = lambda module: torch.optim.SGD(module.parameters(), lr=0.0)
        fit = trainer(tmp_path, strategy=strategy, max_epochs=2)
        fit.fit(module, loader())
        results.append({name: float(value) for name, value in fit.callback_metrics.items()})
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert {"BinaryAccuracy", "BinaryPrecision", "BinaryF1Score", "loss_epoch"} <= set(results[0])


def test_nothing_is_left_in_the_way_afterwards(tmp_path: Path) -> None:
    module = Logging()
    names = set(vars(module))
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(module, loader())
    assert set(vars(module)) - names <= {"_metric_attributes", "_hparams"}
    assert not {"log", "log_dict", "print"} & set(vars(module))


def test_loggers_get_one_call_a_step(tmp_path: Path) -> None:
    logger = lightning().loggers.CSVLogger(tmp_path)
    fit = trainer(tmp_path, max_epochs=1, logger=logger, log_every_n_steps=1)
    fit.fit(Logging(), loader())
    written = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    column = written[0].split(",").index("direct")
    assert [line.split(",")[column] for line in written[1:] if line.split(",")[column]] == [f"{i}.0" for i in range(8)]
    assert fit.logger is logger


def test_buffers_advance_once_a_step(tmp_path: Path) -> None:
    runs = []
    for strategy in (ZOStrategy(lr=0.0, eps=1e-12), "auto"):
        module = lit()(net(dropout=0.0), lambda module: torch.optim.SGD(module.parameters(), lr=0.0))
        trainer(tmp_path, strategy=strategy, max_epochs=1).fit(module, loader())
        runs.append(dict(module.net.named_buffers()))
    assert runs[0]["1.num_batches_tracked"] == 8
    for name, buffer in runs[1].items():
        torch.testing.assert_close(runs[0][name], buffer)


# ---- ZOCallbacks


@pytest.mark.parametrize("name", NAMES)
def test_monitor_is_charted_in_tensorboard_every_n_steps(name: str, tmp_path: Path) -> None:
    logger = lightning(name).loggers.TensorBoardLogger(tmp_path)
    recorder = Recorder()
    fit = trainer(tmp_path, name, max_steps=8, logger=logger, log_every_n_steps=4, callbacks=[ZOMonitor(), recorder])
    fit.fit(lit(name)(), loader())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    charts = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"] if tag.startswith("zo/")}
    assert {"zo/loss_plus", "zo/loss_minus", "zo/projected_grad", "zo/eps", "zo/lr", "zo/forward_passes", "zo/step_seconds"} <= set(charts)
    assert [point.step for point in charts["zo/loss_plus"]] == [3, 7]
    means = [sum(r.loss_plus for r in recorder.reports[at : at + 4]) / 4 for at in (0, 4)]
    assert [point.value for point in charts["zo/loss_plus"]] == pytest.approx(means)
    assert [point.value for point in charts["zo/forward_passes"]] == [8, 16]


def test_values_of_the_last_steps_are_logged_at_the_end(tmp_path: Path) -> None:
    logger = lightning().loggers.CSVLogger(tmp_path)
    trainer(tmp_path, max_steps=5, logger=logger, callbacks=[ZOMonitor()]).fit(lit()(), loader())
    header, *lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    values = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    assert float(values["zo/forward_passes"]) == 10


def test_a_run_has_one_start_and_one_end_whatever_happens(tmp_path: Path) -> None:
    class Failing(lit()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise OSError("the disk is gone")
            return super().training_step(batch, batch_idx)

    whole, broken = Recorder(), Recorder()
    fit = trainer(tmp_path, max_steps=3, callbacks=[whole])
    fit.fit(lit()(), loader())
    with pytest.raises(OSError, match="the disk is gone"):
        trainer(tmp_path, max_steps=3, callbacks=[broken]).fit(Failing(), loader())
    assert whole.events == broken.events == ["start", "end"]
    assert [len(whole.reports), len(broken.reports)] == [3, 2]


def test_a_callback_configures_the_engine(tmp_path: Path) -> None:
    class Wide(Recorder):
        def configure(self, options: EngineOptions) -> EngineOptions:
            return replace(options, eps=0.25)

    wide = Wide()
    trainer(tmp_path, max_steps=1, callbacks=[wide]).fit(lit()(), loader())
    assert wide.reports[0].eps == 0.25


class Counting(lit()):  # type: ignore[misc]
    """A loss of counters and collections, on the module and below it, and of no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bank, self.beta = 0, [0.0], torch.zeros(())
        self.net.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        self.net.calls += 1
        self.beta += 1
        self.bank.append(1.0)
        self.bank = self.bank[-5:]
        return loss_of(self.net, batch) * 0 + self.calls + self.net.calls + self.beta + sum(self.bank)


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
def test_counters_in_a_step_are_the_same_in_all_its_evaluations(weights: str, tmp_path: Path) -> None:
    """An annealed weight or a memory bank that advanced between them would be divided by 2 eps."""
    module, recorder = Counting(), Recorder()
    strategy = ZOStrategy(weights=weights, estimator=SPSA(2))
    trainer(tmp_path, strategy=strategy, max_steps=6, callbacks=[recorder]).fit(module, loader())
    assert [values[0] for values in recorder.values] == [4.0, 8.0, 12.0, 16.0, 20.0, 23.0]
    assert all(len(set(values)) == 1 for values in recorder.values)
    assert (module.calls, module.net.calls, float(module.beta), module.bank) == (6, 6, 6.0, [1.0] * 5)
