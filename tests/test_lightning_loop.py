"""An unchanged LightningModule trains with strategy="zo", as the plain loop does, in both namespaces."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_models import HOST_WARNINGS, NAMES, Recorder, lightning, lit, loader, loss_of, net, same, state, trainer
from torch import nn

from zo_lightning import ZODDPStrategy, ZOOptimizer, ZOStrategy
from zo_lightning.engine import SPSA

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]


# ---- the same run as the plain loop


def plain_run(model: nn.Module, steps: int, **options: Any) -> tuple[list[tuple[float, ...]], dict[str, Any]]:
    optimizer = ZOOptimizer(model, **options)
    values = []
    data = list(loader())
    for step in range(steps):
        batch = data[step % len(data)]
        optimizer.estimate(lambda batch=batch: loss_of(model, batch))
        optimizer.apply()
        assert optimizer.report is not None
        values.append(optimizer.report.values)
    return values, state(model)


@pytest.fixture(scope="module")
def fifty_steps() -> tuple[list[tuple[float, ...]], dict[str, Any]]:
    return plain_run(net(), 50, lr=0.01)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", ["zo", "object"])
def test_fifty_steps_are_those_of_the_plain_loop(name: str, strategy: str, fifty_steps: Any, tmp_path: Path) -> None:
    module, recorder = lit(name)(), Recorder()
    given = "zo" if strategy == "zo" else ZOStrategy()
    trainer(tmp_path, name, strategy=given, max_steps=50, callbacks=[recorder]).fit(module, loader())
    assert recorder.values == fifty_steps[0]
    assert same(state(module.net), fifty_steps[1])


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
def test_every_option_reaches_the_engine(weights: str, tmp_path: Path) -> None:
    options = {"eps": 1e-2, "seed": 3, "noise": "gaussian", "estimator": SPSA(2), "weights": weights, "dropout": False, "clip": 0.5}
    expected, weights_after = plain_run(net(), 8, lr=0.02, weight_decay=0.1, **options)
    module, recorder = lit()(), Recorder()
    strategy = ZOStrategy(lr=0.02, weight_decay=0.1, **options)  # type: ignore[arg-type]
    trainer(tmp_path, strategy=strategy, max_steps=8, callbacks=[recorder]).fit(module, loader())
    assert recorder.values == expected
    assert same(state(module.net), weights_after)


def test_weights_that_the_module_uses_outside_its_layers_are_perturbed_in_exact_mode(tmp_path: Path) -> None:
    class Scaled(lit()):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(net(dropout=0.0))
            self.scale = nn.Parameter(torch.ones(6))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss_of(self.net, [batch[0] * self.scale, batch[1]])

    modules = []
    for weights in ("exact", "copy"):
        modules.append(Scaled())
        trainer(tmp_path, strategy=ZOStrategy(weights=weights), max_steps=4).fit(modules[-1], loader())
    assert not torch.equal(modules[0].scale, torch.ones(6))
    assert same(state(modules[0]), state(modules[1]))


# ---- one object for both class trees


def test_one_object_serves_both_namespaces_in_turn(fifty_steps: Any, tmp_path: Path) -> None:
    strategy = ZOStrategy()
    for name in (*NAMES, NAMES[0]):
        module = lit(name)()
        used = trainer(tmp_path, name, strategy=strategy, max_steps=50).strategy
        assert isinstance(used, lightning(name).strategies.SingleDeviceStrategy)
        fit = trainer(tmp_path, name, strategy=strategy, max_steps=50)
        fit.fit(module, loader())
        assert same(state(module.net), fifty_steps[1])


@pytest.mark.parametrize("cls", [ZOStrategy, ZODDPStrategy])
@pytest.mark.parametrize("name", NAMES)
def test_classes_are_strategies_of_both_namespaces(cls: type, name: str) -> None:
    base = lightning(name).strategies.Strategy
    assert issubclass(cls, base)
    assert isinstance(cls(), base)
    assert cls.__name__.lower() in {n.rpartition(".")[2] for n in lightning(name).strategies.StrategyRegistry.available_strategies()}


def test_subclasses_stay_subclasses_and_survive_pickling(tmp_path: Path) -> None:
    for strategy in (Louder(eps=1e-2), trainer(tmp_path, strategy=Louder(eps=1e-2)).strategy):
        copy = pickle.loads(pickle.dumps(strategy))
        assert type(copy) is type(strategy)
        assert isinstance(copy, Louder)
        assert copy.greeting() == "hello 0.01"


class Louder(ZOStrategy):
    def greeting(self) -> str:
        return f"hello {self._zo_options.eps}"


def test_bare_class_path_is_a_name(tmp_path: Path) -> None:
    assert isinstance(trainer(tmp_path, strategy="zo_lightning.ZOStrategy").strategy, ZOStrategy)


# ---- what training_step returns


class Returning:
    """Makes modules whose training_step returns the loss in some form."""

    def __new__(cls, form: Any) -> Any:
        class Module(lit()):  # type: ignore[misc]
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return form(loss_of(self.net, batch), batch_idx)

        return Module(net(dropout=0.0))


def test_dict_is_handed_on_whole(tmp_path: Path) -> None:
    outputs: list[Any] = []

    class Watch(lightning().Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, module: Any, output: Any, batch: Any, batch_idx: int) -> None:
            outputs.append(output)

    modules = [Returning(lambda loss, i: {"loss": loss, "extra": i}), Returning(lambda loss, i: loss)]
    for module in modules:
        trainer(tmp_path, max_steps=3, callbacks=[Watch()]).fit(module, loader())
    assert [sorted(output) for output in outputs] == [["extra", "loss"]] * 3 + [["loss"]] * 3
    assert [float(o["loss"]) for o in outputs[:3]] == [float(o["loss"]) for o in outputs[3:]]
    assert same(state(modules[0]), state(modules[1]))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_none_skips_the_micro_batch(tmp_path: Path) -> None:
    recorder = Recorder()
    module = Returning(lambda loss, i: None if i in (1, 2, 3, 5) else loss)
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, callbacks=[recorder]).fit(module, loader())
    plain = net(dropout=0.0)
    optimizer = ZOOptimizer(plain, lr=0.01)
    for window in ((0,), (4,), (6, 7)):
        for index in window:
            optimizer.estimate(lambda index=index: loss_of(plain, list(loader())[index]), weight=0.5)
        optimizer.apply()
    assert [report.step for report in recorder.reports] == [0, 1, 2]  # the second window had nothing in it
    trained = {name: tensor for name, tensor in state(module.net).items() if not name.startswith("1.")}
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in trained.items())


@pytest.mark.parametrize(
    ("form", "error", "message"),
    [
        (lambda loss, i: {"los": loss}, "MisconfigurationException", "the 'loss' key needs to be present"),
        (lambda loss, i: [loss], "MisconfigurationException", "must return a Tensor, a dict, or None"),
        (lambda loss, i: loss.expand(3), "ValueError", r"shape \(3,\)"),
    ],
)
def test_what_is_no_loss_is_an_error_and_leaves_the_weights(form: Any, error: str, message: str, tmp_path: Path) -> None:
    module = Returning(form)
    before = state(module)
    with pytest.raises(Exception, match=message) as caught:
        trainer(tmp_path, max_steps=2).fit(module, loader())
    assert type(caught.value).__name__ == error
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.named_parameters())


# ---- accumulation


def test_four_times_four_is_one_times_sixteen(tmp_path: Path) -> None:
    runs = []
    for accumulate in (4, 1):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        model.load_state_dict({name: torch.linspace(-1, 1, t.numel()).double().view_as(t) for name, t in model.state_dict().items()})
        module, recorder = lit()(model), Recorder()
        fit = trainer(tmp_path, max_epochs=5, accumulate_grad_batches=accumulate, callbacks=[recorder])
        fit.fit(module, loader(16 // accumulate, dtype=torch.float64))
        assert fit.global_step == 20
        runs.append((recorder, state(module)))
    for one, other in zip(*(recorder.reports for recorder, _ in runs), strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-9)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(tensor, runs[1][1][name], rtol=0, atol=1e-9)
        assert not torch.equal(tensor, torch.linspace(-1, 1, tensor.numel()).double().view_as(tensor))


def test_last_window_of_an_epoch_is_divided_as_lightning_does(tmp_path: Path) -> None:
    module, recorder = lit()(net(dropout=0.0)), Recorder()
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=3, callbacks=[recorder]).fit(module, loader())
    whole, rest = recorder.reports[1].loss, recorder.reports[2].loss  # 3 of 3 batches, 2 of 3
    assert len(recorder.reports) == 3
    assert rest == pytest.approx(whole * 2 / 3, rel=0.35)


def test_a_step_that_the_module_refuses_leaves_nothing_behind(tmp_path: Path) -> None:
    class Every(lit()):  # type: ignore[misc]
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            if batch_idx % 2:
                super().optimizer_step(epoch, batch_idx, optimizer, closure)
            else:
                closure()

    module, recorder = Every(net(dropout=0.0)), Recorder()
    trainer(tmp_path, max_epochs=1, callbacks=[recorder]).fit(module, loader())
    assert len(recorder.reports) == 4
    assert max(report.loss for report in recorder.reports) < 1.3  # one batch each, as zero_grad would have left it


# ---- the user's optimizer


def test_lr_scheduler_and_groups_are_used_at_each_step(tmp_path: Path) -> None:
    def configure(module: Any) -> Any:
        groups = [
            {"params": module.net[0].parameters(), "weight_decay": 0.5},
            {"params": [p for part in module.net[1:] for p in part.parameters()], "lr": 0.04},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}}

    module, recorder = lit()(net(dropout=0.0), configure), Recorder()
    with pytest.warns(UserWarning, match=r"lr=0.02, 0.04 and weight_decay=0.5, 0 are AdamW's.*AdamW's betas, eps do nothing"):
        trainer(tmp_path, max_steps=4, callbacks=[recorder]).fit(module, loader())
    plain = net(dropout=0.0)
    optimizer = ZOOptimizer([{"params": plain[0].parameters(), "weight_decay": 0.5}, {"params": plain[1:].parameters()}], module=plain)
    for batch, scale in zip(loader(), (1, 1, 0.1, 0.1), strict=False):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.02 * scale, 0.04 * scale
        optimizer.estimate(lambda batch=batch: loss_of(plain, batch))
        optimizer.apply()
    assert [report.lr for report in recorder.reports] == pytest.approx([0.02, 0.02, 0.002, 0.002])
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], tensor)


def test_lr_of_the_strategy_replaces_the_users_and_is_scheduled(tmp_path: Path) -> None:
    def configure(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=100.0)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 2) / 2)
        return [optimizer], [{"scheduler": warm_up, "interval": "step"}]

    recorder = Recorder()
    trainer(tmp_path, strategy=ZOStrategy(lr=0.03), max_steps=4, callbacks=[recorder]).fit(lit()(None, configure), loader())
    assert [report.lr for report in recorder.reports] == pytest.approx([0.0, 0.015, 0.03, 0.03])


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` returned `None`")
def test_no_optimizer_trains_the_parameters_of_the_module(tmp_path: Path) -> None:
    module = lit()(None, lambda module: None)
    before = state(module)
    with pytest.warns(UserWarning, match="returned None: all parameters of the module are trained, with lr=1e-06"):
        trainer(tmp_path, max_steps=3).fit(module, loader())
    assert not any(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    trainer(tmp_path, strategy=ZOStrategy(lr=0.01), max_steps=50).fit(module := lit()(None, lambda module: None), loader())
    assert same(state(module.net), plain_run(net(), 50, lr=0.01)[1])


def test_zo_optimizer_of_the_user_is_the_engine(fifty_steps: Any, tmp_path: Path) -> None:
    module, recorder = lit()(None, lambda module: ZOOptimizer(module, lr=0.01)), Recorder()
    fit = trainer(tmp_path, max_steps=50, callbacks=[recorder])
    fit.fit(module, loader())
    assert fit.strategy.zo_optimizer is fit.optimizers[0]
    assert recorder.values == fifty_steps[0]
    assert same(state(module.net), fifty_steps[1])


def test_stray_gradients_are_not_applied(fifty_steps: Any, tmp_path: Path) -> None:
    class Stray(lit()):  # type: ignore[misc]
        def on_before_zero_grad(self, optimizer: Any) -> None:
            for parameter in self.parameters():
                parameter.grad = torch.ones_like(parameter)

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

    module = Stray(None, lambda module: torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.5))
    with pytest.warns(UserWarning, match="AdamW's"):
        trainer(tmp_path, strategy=ZOStrategy(weight_decay=0.0), max_steps=50).fit(module, loader())
    assert same(state(module.net), fifty_steps[1])


def test_parameter_groups_added_while_training_are_trained(tmp_path: Path) -> None:
    pl = lightning()

    class Unfreeze(pl.callbacks.BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net[:3], train_bn=False)

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net[:3], optimizer, lr=0.005, train_bn=True)

    class Watch(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            states.append(state(module))

    def configure(module: Any) -> Any:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01)

    module = lit()(None, configure)
    states = [state(module)]
    fit = trainer(tmp_path, max_epochs=2, callbacks=[Unfreeze(), Watch()])
    fit.fit(module, loader())
    changed = [{name for name, _ in module.named_parameters() if not torch.equal(a[name], b[name])} for a, b in pairwise(states)]
    assert changed[0] == {"net.3.weight", "net.3.bias"}
    assert {"net.0.weight", "net.2.0.0.weight", "net.3.weight"} <= changed[1]
    assert [group["lr"] for group in fit.strategy.zo_optimizer.param_groups] == [0.01, 0.005]


# ---- hooks


def test_hooks_are_called_as_often_as_with_gradients(tmp_path: Path) -> None:
    hooks = [
        "on_before_zero_grad",
        "optimizer_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "configure_gradient_clipping",
        "optimizer_step",
        "lr_scheduler_step",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_train_epoch_end",
    ]
    calls: dict[str, Counter[str]] = {"zo": Counter(), "auto": Counter()}

    def counted(hook: str, strategy: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[strategy][hook] += 1
            return getattr(super(cls, self), hook)(*args, **kwargs)

        return method

    def configure(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.001)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    for strategy in calls:
        cls = type("Hooked", (lit(),), {hook: counted(hook, strategy) for hook in hooks})
        fit = trainer(tmp_path, strategy=strategy, max_epochs=2, accumulate_grad_batches=3)
        if strategy == "zo":
            with pytest.warns(UserWarning, match=r"Hooked.on_after_backward, .*every parameter's .grad is None"):
                fit.fit(cls(None, configure), loader())
        else:
            fit.fit(cls(None, configure), loader())
        assert fit.global_step == 6
    assert calls["zo"] == calls["auto"]
    assert set(calls["zo"]) == set(hooks)
