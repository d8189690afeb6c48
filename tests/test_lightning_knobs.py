"""Settings that can't work are errors of Lightning's kind, those that do nothing are said once, and a broken run leaves no trace."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_models import HOST_WARNINGS, NAMES, Recorder, lightning, lit, loader, loss_of, net, said, same, state, trainer
from torch import nn

from zo_lightning import ZODDPStrategy, ZOOptimizer, ZOStrategy
from zo_lightning.engine import DivergenceError, Safeguard
from zo_lightning.engine.options import EngineOptions

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]


# ---- errors


class Manual(lit()):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Fetching(lit()):  # type: ignore[misc]
    def training_step(self, dataloader_iter: Any) -> Any:
        return loss_of(self.net, next(dataloader_iter)[0])


def optimizer(make: Any) -> Any:
    return lit()(None, make)


SGD = torch.optim.SGD
ERRORS = {
    "manual optimization": (Manual, {}, "automatic_optimization is False.*return the loss from training_step"),
    "dataloader_iter": (Fetching, {}, r"each forward pass of a step would see another batch.*training_step\(batch, batch_idx\)"),
    "several optimizers": (
        lambda: optimizer(lambda m: [SGD(m.net[0].parameters(), 0.1), SGD(m.net[3].parameters(), 0.1)]),
        {},
        "several optimizers.*return one optimizer, with parameter groups",
    ),
    "LBFGS": (lambda: optimizer(lambda m: torch.optim.LBFGS(m.parameters())), {}, "LBFGS evaluates the loss several times"),
    "maximize": (lambda: optimizer(lambda m: SGD(m.parameters(), 0.1, maximize=True)), {}, r"SGD\(maximize=True\).*Negate the loss"),
    "engine without the module": (
        lambda: optimizer(lambda m: ZOOptimizer(m.parameters())),
        {},
        r"doesn't know the LightningModule. Return ZOOptimizer\(self, ...\)",
    ),
    "options twice": (
        lambda: optimizer(lambda m: ZOOptimizer(m)),
        {"strategy": ZOStrategy(eps=0.1)},
        "options for another one. Set them on the ZOOptimizer",
    ),
    "DeepSpeed precision": (
        lit(),
        {"plugins": lightning().plugins.DeepSpeedPrecision("32-true")},
        r"DeepSpeedPrecision belongs to another strategy.*bf16-mixed",
    ),
}


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_trained_is_an_error(case: str, tmp_path: Path) -> None:
    make, options, message = ERRORS[case]
    module = make()
    before = state(module)
    with pytest.raises(lightning().utilities.exceptions.MisconfigurationException, match=message):
        trainer(tmp_path, max_steps=1, **options).fit(module, loader())
    assert same(state(module), before)


@pytest.mark.parametrize(
    ("given", "message"), [({"devices": 2}, 'has 2. Use Trainer.devices=1., or strategy="zo_ddp"'), ({"num_nodes": 2}, 'strategy="zo_ddp"')]
)
@pytest.mark.parametrize("name", NAMES)
def test_several_devices_name_the_other_strategy(name: str, given: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(lightning(name).utilities.exceptions.MisconfigurationException, match=message):
        trainer(tmp_path, name, **given)


def test_device_of_the_trainer_reaches_a_strategy_made_by_name(tmp_path: Path) -> None:
    assert trainer(tmp_path).strategy.root_device == torch.device("cpu")
    strategy = ZOStrategy()
    strategy.accelerator = lightning().accelerators.CUDAAccelerator()
    strategy.parallel_devices = [torch.device("cuda", 3)]
    assert strategy.root_device == torch.device("cuda", 3)
    assert ZOStrategy(device="cuda:1").parallel_devices == [torch.device("cuda", 1)]


@pytest.mark.parametrize("cls", [ZOStrategy, ZODDPStrategy])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, "Invalid eps: 0. Must be a finite number > 0"),
        ({"lr": -1.0}, "Invalid lr"),
        ({"noise": "uniform"}, "noise='uniform' is not known.*'rademacher', 'gaussian'"),
        ({"weights": "none"}, "weights='none' is not known"),
        ({"safeguard": "panic"}, "safeguard='panic' is not known"),
        ({"estimator": "fd"}, "estimator='fd' is not known"),
    ],
)
def test_options_are_checked_when_they_are_given(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


@pytest.mark.parametrize("cls", [ZOStrategy, ZODDPStrategy])
def test_options_and_defaults_are_those_of_the_engine(cls: Any) -> None:
    """Spelt out in both signatures, because command lines are made from them."""
    taken = inspect.signature(cls).parameters.values()
    options = {p.name: p.default for p in taken if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert options == {field.name: field.default for field in dataclasses.fields(EngineOptions)}
    assert list(options) == [field.name for field in dataclasses.fields(EngineOptions)]


def test_nothing_to_train(tmp_path: Path) -> None:
    module = lit()()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="There is no trainable parameter"):
        trainer(tmp_path, max_steps=1).fit(module, loader())


def test_a_diverging_run_is_stopped(tmp_path: Path) -> None:
    module = lit()(None, lambda module: torch.optim.SGD(module.parameters(), lr=3.0))
    with pytest.raises(DivergenceError, match=r"lr=3\. Usual is"):
        trainer(tmp_path, strategy=ZOStrategy(safeguard=Safeguard(window=4)), max_steps=60).fit(module, loader())


def test_non_finite_losses_are_skipped_and_then_an_error(tmp_path: Path) -> None:
    class Broken(lit()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx > 1 else 1.0)

    module, recorder = Broken(), Recorder()
    with pytest.raises(FloatingPointError, match="not finite in 3 steps in a row"):
        trainer(tmp_path, strategy=ZOStrategy(max_nonfinite=3), max_steps=9, callbacks=[recorder]).fit(module, loader())
    assert [report.skipped for report in recorder.reports] == [False, False, True, True]


# ---- said once


class Reading(lit()):  # type: ignore[misc]
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients = [parameter.grad for parameter in self.parameters()]

    def backward(self, loss: Any) -> None:
        raise AssertionError("there is nothing to go back through")


class Watching(lightning().Callback):  # type: ignore[misc]
    def on_after_backward(self, trainer: Any, module: Any) -> None:
        """Would look at gradients."""


class Checkpointed(nn.Sequential):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.is_gradient_checkpointing = True

    is_gradient_checkpointing = False

    def gradient_checkpointing_disable(self) -> None:
        self.is_gradient_checkpointing = False


IDLE = {
    "clip": (lit(), {"gradient_clip_val": 0.5}, [r"gradient_clip_val=0.5\) does nothing.*ZOStrategy\(clip"]),
    "clip by value": (
        lit(),
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
        [r"gradient_clip_val=0.5\) does nothing.*ZOStrategy\(clip"],
    ),
    "anomaly": (lit(), {"detect_anomaly": True}, [r"detect_anomaly=True\) does nothing"]),
    "hooks": (
        Reading,
        {"callbacks": [Watching()]},
        ["Reading.backward is never called", "Reading.on_before_optimizer_step, Watching.on_after_backward is called, but every"],
    ),
    "checkpointing": (lambda: lit()(Checkpointed(*net())), {}, ["gradient_checkpointing is switched off"]),
    "optimizer": (
        lambda: optimizer(lambda m: torch.optim.Adam(m.parameters(), lr=3e-4, weight_decay=0.1)),
        {},
        [r"lr=0.0003 and weight_decay=0.1 are Adam's.*usual lr of forward-only training is 1e-4 to 1e-2.*Adam's betas, eps do nothing"],
    ),
    "momentum": (
        lambda: optimizer(lambda m: SGD(m.parameters(), lr=3e-4, momentum=0.9, nesterov=True)),
        {"strategy": ZOStrategy(lr=0.01)},
        ["^SGD's momentum, nesterov do nothing"],
    ),
    "nothing to say": (lambda: optimizer(lambda m: SGD(m.parameters(), lr=3e-4)), {"strategy": ZOStrategy(lr=0.01)}, []),
}


@pytest.mark.filterwarnings("ignore:You have turned on `Trainer.detect_anomaly")
@pytest.mark.parametrize("case", IDLE)
def test_what_does_nothing_is_said_once(case: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    make, options, expected = IDLE[case]
    for _ in range(2):
        trainer(tmp_path, max_steps=2, **options).fit(make(), loader())
    texts = [text for text in said(recwarn) if not text.startswith("lr=0.01 are SGD's")]
    assert len(texts) == len(expected)
    assert all(re.search(pattern, text) for pattern, text in zip(expected, texts, strict=True))


@pytest.mark.filterwarnings("ignore:Reading")
def test_gradients_are_none_in_the_hooks_that_read_them(tmp_path: Path) -> None:
    module = Reading()
    trainer(tmp_path, max_steps=1).fit(module, loader())
    assert module.gradients
    assert all(gradient is None for gradient in module.gradients)


# ---- interruptions


class Interrupted(lit()):  # type: ignore[misc]
    """Does something in the middle of the forward pass of one evaluation."""

    def __init__(self, at: int, act: Any) -> None:
        super().__init__(net(dropout=0.0))
        self.at, self.act = at, act
        self.snapshots: list[dict[str, torch.Tensor]] = []
        counter = self.net[2].register_forward_pre_hook(self.before)
        assert counter is not None
        self.passes = itertools.count(1)  # which is not put back between the evaluations, as a number would be

    def before(self, module: nn.Module, args: Any) -> None:
        if next(self.passes) == self.at:
            self.act(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.snapshots.append(state(self))


@pytest.fixture
def handlers() -> Iterator[None]:
    """Lightning ignores SIGINT for good after a KeyboardInterrupt."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def fail(module: Any) -> None:
    raise OSError("no data")


def interrupt(module: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
@pytest.mark.parametrize("act", [fail, interrupt])
def test_a_run_broken_between_two_evaluations_leaves_the_weights(act: Any, weights: str, tmp_path: Path, handlers: None) -> None:
    extra = 1 if weights == "exact" else 0  # the probe of the first step
    module = Interrupted(at=6 + extra, act=act)  # second evaluation of the third step
    fit = trainer(tmp_path, strategy=ZOStrategy(weights=weights), max_steps=8)
    with pytest.raises((OSError, SystemExit)):
        fit.fit(module, loader())
    assert len(module.snapshots) == 3
    for name, parameter in module.named_parameters():
        before = module.snapshots[-1][name]
        if weights == "inplace":
            torch.testing.assert_close(parameter, before, rtol=0, atol=1e-6)
        else:
            assert torch.equal(parameter, before)
    assert not {"log", "log_dict", "print"} & set(vars(module))
    assert fit.loggers == []
    assert "on_run_start" not in vars(fit.fit_loop.epoch_loop)


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
def test_a_checkpoint_from_a_signal_handler_has_unperturbed_weights(weights: str, tmp_path: Path, handlers: None) -> None:
    """As SLURM's requeue signal does it, in the middle of a forward pass."""
    path = tmp_path / "signal.ckpt"
    signal.signal(signal.SIGUSR1, lambda number, frame: fit.save_checkpoint(path))
    module = Interrupted(at=4, act=lambda module: os.kill(os.getpid(), signal.SIGUSR1))
    fit = trainer(tmp_path, strategy=ZOStrategy(weights=weights), max_steps=3)
    fit.fit(module, loader())
    saved = torch.load(path, weights_only=True)["state_dict"]
    step = int(torch.load(path, weights_only=True)["global_step"])
    for name, _ in module.named_parameters():
        torch.testing.assert_close(saved[name], module.snapshots[step][name], rtol=0, atol=1e-6 if weights == "inplace" else 0)
