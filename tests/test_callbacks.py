"""The callback bridge and ZOMonitor, without a host."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from zo_lightning import ZOOptimizer
from zo_lightning.callbacks import Run, ZOCallback, ZOMonitor, zo_callbacks
from zo_lightning.callbacks.monitor import peak_memory
from zo_lightning.engine import EngineOptions, StepReport


def report(**values: Any) -> StepReport:
    fields: dict[str, Any] = {
        "step": 0,
        "values": (1.0, 3.0),
        "loss": 2.0,
        "loss_plus": 1.0,
        "loss_minus": 3.0,
        "projected_grad": -4.0,
        "eps": 0.25,
        "lr": 0.1,
        "forward_passes": 2,
        "skipped": False,
        "zero_difference": False,
        "resolution": 100.0,
        "seconds": 0.5,
    }
    return StepReport(**{**fields, **values})


@pytest.fixture
def run() -> Run:
    net = nn.Linear(2, 1)
    optimizer = ZOOptimizer(net)
    return Run(optimizer, net, "lightning", None, True, lambda: optimizer.steps)


def test_metrics_are_means_over_the_steps_since_the_last_time(run: Run) -> None:
    monitor = ZOMonitor()
    monitor.on_run_start(run)
    monitor.on_zo_step(run, report())
    monitor.on_zo_step(run, report(projected_grad=2.0, loss_plus=2.0, zero_difference=True, forward_passes=4, lr=0.05))
    charts = monitor.metrics()
    assert charts["zo/loss_plus"] == 1.5
    assert charts["zo/loss_minus"] == 3.0
    assert charts["zo/projected_grad"] == -1.0
    assert charts["zo/projected_grad_rms"] == pytest.approx(math.sqrt(10))
    assert charts["zo/zero_difference_share"] == 0.5
    assert charts["zo/forward_passes"] == 4.0
    assert charts["zo/lr"] == 0.05
    assert charts["zo/step_seconds"] == 0.5
    assert all(type(value) is float for value in charts.values())  # the Hugging Face TensorBoard callback drops all else
    assert monitor.metrics() == {}


def test_skipped_steps_do_not_enter_the_means(run: Run) -> None:
    monitor = ZOMonitor()
    monitor.on_run_start(run)
    monitor.on_zo_step(run, report())
    monitor.on_zo_step(run, report(skipped=True, loss_plus=math.inf, loss_minus=math.nan, projected_grad=math.nan))
    charts = monitor.metrics()
    assert charts["zo/skipped_share"] == 0.5
    assert charts["zo/loss_plus"] == 1.0
    monitor.on_zo_step(run, report(skipped=True, loss_plus=math.inf))
    assert "zo/loss_plus" not in monitor.metrics()


def test_a_new_run_starts_with_an_empty_window(run: Run) -> None:
    monitor = ZOMonitor()
    monitor.on_run_start(run)
    monitor.on_zo_step(run, report())
    monitor.on_run_start(run)
    assert monitor.metrics() == {}


def test_monitor_finds_the_device_where_the_first_group_is_empty() -> None:
    net = nn.Linear(2, 1)
    optimizer = ZOOptimizer([{"params": []}, {"params": list(net.parameters())}], module=net)
    monitor = ZOMonitor()
    monitor.on_run_start(Run(optimizer, net, "hf", None, True, lambda: 0))
    monitor.on_zo_step(Run(optimizer, net, "hf", None, True, lambda: 0), report())
    assert monitor.metrics()["zo/peak_memory_gb"] > 0


def test_peak_memory_is_in_bytes() -> None:
    ballast = torch.ones(30_000_000)
    assert peak_memory(torch.device("cpu")) > ballast.nbytes


class Wider(ZOCallback):
    def configure(self, options: EngineOptions) -> EngineOptions:
        return dataclasses.replace(options, eps=0.5)


def test_every_hook_of_the_hosts_resolves_and_nothing_else_does() -> None:
    callback = Wider()
    for hook in ("on_train_batch_start", "on_step_end", "on_a_hook_of_a_later_release", "setup", "teardown"):
        assert getattr(callback, hook)(1, 2, three=3) is None
    with pytest.raises(AttributeError, match="Wider"):
        callback.frobnicate  # noqa: B018


def test_lightning_finds_the_state_keys_that_it_asks_for() -> None:
    assert Wider().state_key == "Wider"
    assert Wider()._legacy_state_key is Wider


def test_callbacks_survive_copy_and_pickle() -> None:
    for again in (copy.deepcopy(Wider()), pickle.loads(pickle.dumps(Wider()))):
        assert again.configure(EngineOptions()).eps == 0.5


def test_only_ours_are_found_in_order() -> None:
    first, second = ZOMonitor(), Wider()
    assert zo_callbacks([object(), first, "x", second]) == [first, second]
