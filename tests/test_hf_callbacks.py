"""ZOCallbacks in the Hugging Face trainer: configured, started, told of every update, asked for values, ended."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import arguments, bert, losses, trainer
from torchmetrics import CatMetric, SumMetric
from torchmetrics.classification import BinaryAccuracy
from transformers import Trainer, TrainerCallback

from zo_lightning.callbacks.base import ZOCallback
from zo_lightning.callbacks.monitor import ZOMonitor
from zo_lightning.callbacks.sparse_mask import SparseMask
from zo_lightning.engine import SPSA, ZOOptimizer
from zo_lightning.hf_integration import ZOTrainer


class Recorder(ZOCallback):
    """Writes down every event."""

    def __init__(self, eps: float | None = None) -> None:
        self.eps, self.events, self.window = eps, [], 0

    def configure(self, options: Any) -> Any:
        return options if self.eps is None else dataclasses.replace(options, eps=self.eps)

    def on_run_start(self, run: Any) -> None:
        self.events.append("start")
        self.run = run

    def on_zo_step(self, run: Any, report: Any) -> None:
        self.window += 1
        self.events.append((report.step, run.step()))

    def metrics(self) -> dict[str, float]:
        window, self.window = self.window, 0
        return {"zo/window": float(window)}

    def on_run_end(self, run: Any) -> None:
        self.events.append("end")


def test_a_callback_configures_the_engine_and_hears_of_every_step(tmp_path: Path) -> None:
    callback = Recorder(eps=1e-2)
    host = trainer(tmp_path, callbacks=[callback], gradient_accumulation_steps=2, per_device_train_batch_size=4, logging_steps=2)
    host.train()
    steps = [event for event in callback.events if isinstance(event, tuple)]
    assert [callback.events[0], callback.events[-1]] == ["start", "end"]
    assert len(callback.events) == 6
    assert [later[0] - earlier[0] for earlier, later in pairwise(steps)] == [1, 1, 1]
    assert host.zo_optimizer.eps == 1e-2
    run = callback.run
    assert (run.optimizer, run.module, run.host, run.folder) == (host.zo_optimizer, host.model, "hf", str(tmp_path))
    assert run.is_rank_zero
    assert run.step() == 4
    assert losses(host, "zo/window") == [2.0, 2.0]


def test_the_run_ends_on_an_exception(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    callback = Recorder()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callbacks=[callback, Stop()]).train()
    assert (callback.events[0], callback.events[-1], len(callback.events)) == ("start", "end", 3)


def test_two_runs_of_one_trainer(tmp_path: Path) -> None:
    callback = Recorder()
    host = trainer(tmp_path, callbacks=[callback], max_steps=1)
    host.train()
    host.train()
    assert [event for event in callback.events if isinstance(event, str)] == ["start", "end"] * 2


def test_auto_find_batch_size_begins_a_new_run_with_a_smaller_batch(tmp_path: Path) -> None:
    callback = Recorder()
    host = trainer(tmp_path, callbacks=[callback], auto_find_batch_size=True, gradient_accumulation_steps=2, max_steps=2)
    original, sizes = host.compute_loss, []

    def crowded(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 4 and sizes.count(sizes[-1]) > 6:  # in the second half of the first window
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return original(model, inputs, *args, **kwargs)

    host.compute_loss = crowded
    host.train()
    attempts = list(dict.fromkeys(sizes))
    assert (attempts[0], attempts[-1]) == (8, 4)
    assert host.state.global_step == 2
    assert host.zo_optimizer.steps == len(attempts) + 1  # one whole step in each attempt that failed: no seed twice
    assert [event for event in callback.events if isinstance(event, str)] == ["start", "end"] * len(attempts)
    assert len(callback.events) == 2 * len(attempts) + host.zo_optimizer.steps


class Measured(ZOTrainer):
    """Counts and measures in all the ways that trainers do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.total, self.accuracy, self.calls = torch.zeros(()), BinaryAccuracy(), 0
        self.parts: dict[str, Any] = {"rows": SumMetric(), "sizes": [[]], "recent": deque(maxlen=2)}

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self.total += loss.detach()
            self.accuracy.update(outputs.logits.argmax(-1), inputs["labels"])
            self.parts["rows"].update(len(inputs["labels"]))
            self.parts["sizes"][0].append(len(inputs["labels"]))
            self.parts["recent"].append(float(loss))
            model.seen.update(inputs["input_ids"].float())
            self.calls += 1
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("weights", ["exact", "copy"])  # exact has one more evaluation, in its first step
def test_what_a_trainer_measures_is_measured_once(weights: str, tmp_path: Path) -> None:
    model = bert(dropout=0.0)
    model.seen = CatMetric()
    callback = Recorder()
    host = trainer(tmp_path, model, Measured, callbacks=[callback], zo_weights=weights, zo_estimator=SPSA(2))
    first: list[float] = []
    callback.on_zo_step = lambda run, report: first.append(report.values[0])  # type: ignore[method-assign]
    host.train()
    assert host.zo_optimizer.forward_passes == 16
    assert host.calls == 4
    assert host.total.item() == pytest.approx(sum(first))
    assert host.parts["rows"].compute() == host.accuracy._update_count * 8 == 32
    assert host.parts["sizes"] == [[8, 8, 8, 8]]
    assert list(host.parts["recent"]) == pytest.approx(first[-2:])
    assert len(model.seen.value) == 4
    assert not {"log", "backward"} & (set(vars(host)) | set(vars(host.accelerator)))


class Counter(Recorder):
    """Keeps the number of steps over a resume."""

    count = 0

    def on_zo_step(self, run: Any, report: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def test_the_state_of_a_callback_is_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[Counter()], save_strategy="steps", save_steps=3).train()
    again = Counter()
    host = trainer(tmp_path, callbacks=[again])
    host.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.count == 4
    state = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert state["zo_callbacks"] == {"Counter": {"count": 3}}


def test_a_configuring_callback_with_a_built_optimizer_is_an_error(tmp_path: Path) -> None:
    model = bert()
    optimizer = ZOOptimizer(model, lr=1e-3)
    host = trainer(tmp_path, model, optimizers=(optimizer, None), callbacks=[Recorder(eps=1e-2)])
    with pytest.raises(ValueError, match="configures the engine"):
        host.train()


def test_the_monitor_reaches_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    host = trainer(tmp_path, callbacks=[ZOMonitor()], report_to="tensorboard", logging_steps=2)
    host.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    charts = {tag.removeprefix("train/zo/") for tag in events.Tags()["scalars"] if "zo/" in tag}
    assert charts >= {"loss_plus", "loss_minus", "projected_grad", "eps", "lr", "forward_passes", "step_seconds"}
    logged = events.Scalars("train/zo/forward_passes")
    assert [point.step for point in logged] == [2, 4]
    assert logged[-1].value == host.zo_optimizer.forward_passes


class Counting(ZOTrainer):
    """A loss of counters of the trainer and of its model, and of no weight."""

    calls = 0

    def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
        self.calls += 1
        model.calls = getattr(model, "calls", 0) + 1
        return super().compute_loss(model, inputs, **options) * 0 + self.calls + model.calls


@pytest.mark.parametrize("weights", ["exact", "copy"])
def test_counters_in_a_loss_are_the_same_in_all_its_evaluations(weights: str, tmp_path: Path) -> None:
    seen: list[tuple[float, ...]] = []
    callback = Recorder()
    callback.on_zo_step = lambda run, report: seen.append(report.values)  # type: ignore[method-assign]
    host = trainer(tmp_path, bert(dropout=0.0), Counting, callbacks=[callback], zo_weights=weights)
    host.train()
    assert seen == [(2.0 * step, 2.0 * step) for step in range(1, 5)]
    assert (host.calls, host.model.calls) == (4, 4)


@pytest.mark.parametrize("kind", [Trainer, ZOTrainer], ids=["Trainer", "ZOTrainer"])
def test_callbacks_say_once_that_backpropagation_has_no_use_for_them(kind: type, tmp_path: Path) -> None:
    told = r'SparseMask does nothing here: training is by backpropagation. Use ZOTrainer, and optim="zo".'
    args = arguments(tmp_path, optim="adamw_torch")
    host = trainer(
        tmp_path,
        kind=functools.partial(kind, optim="adamw_torch") if kind is ZOTrainer else kind,
        args=args,
        callbacks=[SparseMask("small_weights", 0.5)],
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        host.train()
        host.train()
    assert [str(one.message) for one in said if "SparseMask" in str(one.message)] == [told]


def test_callbacks_of_a_forward_only_run_say_nothing(tmp_path: Path) -> None:
    host = trainer(tmp_path, callbacks=[SparseMask("small_weights", 0.5, summary=False)], max_steps=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        host.train()
    assert not [one for one in said if "does nothing" in str(one.message)]
