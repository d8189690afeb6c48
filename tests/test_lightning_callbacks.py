"""Lightning's own callbacks, tuners, schedulers and entry points work on a forward-only run; weights that others change are the weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_models import HOST_WARNINGS, NAMES, Recorder, lightning, lit, loader, loss_of, net, rows, same, state, trainer
from torch import nn
from torch.utils.data import DataLoader

from zo_lightning import ZOOptimizer, ZOStrategy
from zo_lightning.callbacks import SparseMask
from zo_lightning.engine import LowRank, Momentum, OneSided, TorchOptimizer
from zo_lightning.engine.residency import Batched

pytestmark = [pytest.mark.filterwarnings(text) for text in (*HOST_WARNINGS, "ignore:You defined a `validation_step` but have no")]


class Tuned(lit()):  # type: ignore[misc]
    """With a learning rate and a batch size that tuners can set."""

    def __init__(self, lr: float = 0.01, batch_size: int = 8) -> None:
        super().__init__(net(dropout=0.0), lambda module: torch.optim.SGD(module.parameters(), lr=module.lr))
        self.lr, self.batch_size = lr, batch_size
        self.modes: list[tuple[bool, bool]] = []

    def train_dataloader(self) -> Any:
        return loader(self.batch_size)


class Validated(Tuned):
    """With a validation loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        self.log("val_loss", loss_of(self.net, batch), prog_bar=True)


# ---- modes


def test_training_runs_under_no_grad_also_after_inference_mode(tmp_path: Path) -> None:
    """A tensor that was written in inference mode could not be perturbed in place."""
    module = Validated()
    fit = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=1)
    fit.validate(module, loader(32))
    assert set(module.modes) == {(True, False)}
    module.modes.clear()
    fit.fit(module, val_dataloaders=loader(32))
    assert set(module.modes) == {(False, False)}
    assert not any(parameter.is_inference() for parameter in module.parameters())


def test_validation_and_checkpoints_see_the_weights_between_two_steps(tmp_path: Path) -> None:
    pl = lightning()
    seen: list[dict[str, Any]] = []

    class Watch(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            seen.append(state(module))

        def on_validation_start(self, trainer: Any, module: Any) -> None:
            assert not seen or same(state(module), seen[-1])

    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    options = {"val_check_interval": 2, "enable_checkpointing": True, "callbacks": [Watch(), keep]}
    trainer(tmp_path, max_steps=6, **options).fit(Validated(), val_dataloaders=loader(32))
    for step in (3, 6):
        assert same(torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"], seen[step - 1])


# ---- Lightning's callbacks


def test_early_stopping_stops(tmp_path: Path) -> None:
    stop = lightning().callbacks.EarlyStopping("val_loss", patience=1, min_delta=100.0)
    fit = trainer(tmp_path, max_epochs=9, callbacks=[stop])
    fit.fit(Validated(), val_dataloaders=loader(32))
    assert fit.current_epoch == 2


def test_learning_rate_monitor_reads_the_schedule(tmp_path: Path) -> None:
    pl = lightning()

    def configure(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]

    logger = pl.loggers.CSVLogger(tmp_path)
    monitor = pl.callbacks.LearningRateMonitor("step")
    trainer(tmp_path, max_steps=4, logger=logger, log_every_n_steps=1, callbacks=[monitor]).fit(lit()(None, configure), loader())
    header, *lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    column = header.split(",").index("lr-SGD")
    assert [float(line.split(",")[column]) for line in lines if line.split(",")[column]] == [0.01, 0.01, 0.005, 0.005]


@pytest.mark.parametrize("interval", ["epoch", "plateau"])
def test_schedulers_of_an_epoch_and_of_a_metric(interval: str, tmp_path: Path) -> None:
    def configure(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        if interval == "epoch":
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    module, recorder = Validated(), Recorder()
    module.configure = configure
    trainer(tmp_path, max_epochs=3, callbacks=[recorder]).fit(module, val_dataloaders=loader(32))
    factors = (1.0, 0.5, 0.25) if interval == "epoch" else (1.0, 1.0, 0.5)
    assert [report.lr for report in recorder.reports[::8]] == [0.01 * factor for factor in factors]


@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_a_learning_rate_finder_leaves_no_trace(tmp_path: Path) -> None:
    """It trains, restores the weights and sets the rate; the run is that of a module made with that rate."""
    pl = lightning()
    recorder = Recorder()
    finder = pl.callbacks.LearningRateFinder(num_training_steps=30, min_lr=1e-5, max_lr=3e-2, update_attr=True)
    found = Tuned()
    trainer(tmp_path, max_steps=8, callbacks=[finder, recorder]).fit(found)
    assert finder.optimal_lr is not None
    assert found.lr == finder.optimal_lr.suggestion() != 0.01
    plain, fresh = Recorder(), Tuned(lr=found.lr)
    trainer(tmp_path, max_steps=8, callbacks=[plain]).fit(fresh)
    assert [report.lr for report in recorder.reports] == [found.lr] * 8
    assert recorder.values == plain.values  # the finder trains without the callbacks
    assert same(state(found), state(fresh))


@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_a_batch_size_finder_leaves_no_trace(tmp_path: Path) -> None:
    pl = lightning()
    found, fresh = Tuned(batch_size=2), Tuned(batch_size=4)
    finder = pl.callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=2, init_val=2)
    trainer(tmp_path, max_steps=8, callbacks=[finder]).fit(found)
    assert found.batch_size == 4
    trainer(tmp_path, max_steps=8).fit(fresh)
    assert same(state(found), state(fresh))


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_stochastic_weight_averaging_averages_the_weights(weights: str, tmp_path: Path) -> None:
    pl = lightning()
    ends: list[dict[str, Any]] = []

    class Watch(pl.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            ends.append({name: parameter.detach().clone() for name, parameter in module.named_parameters()})

    module = Validated()
    swa = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2, annealing_epochs=1)
    trainer(tmp_path, strategy=ZOStrategy(weights=weights), max_epochs=4, callbacks=[Watch(), swa]).fit(module)
    assert len(ends) == 5  # the last one updates the BatchNorm of the average
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, torch.stack([end[name] for end in ends[:3]]).mean(0))
    assert module.net[1].num_batches_tracked == 8


def test_weight_averaging_swaps_the_weights_for_validation(tmp_path: Path) -> None:
    pl = lightning()
    validated: list[dict[str, Any]] = []

    class Averaged(Validated):
        def on_validation_epoch_start(self) -> None:
            validated.append(state(self.net))

    plain, module = Validated(), Averaged()
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(plain, val_dataloaders=loader(32))
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, callbacks=[average]).fit(module, val_dataloaders=loader(32))
    assert not same(state(module.net), state(plain.net))  # in the end, the average is what the module has
    assert same(validated[-1], state(module.net))
    current = average._average_model
    assert current is not None


def test_weights_changed_by_others_between_steps_are_the_weights(tmp_path: Path) -> None:
    class Reset(lightning().Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, module: Any, output: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                module.net.load_state_dict(net().state_dict())
            if batch_idx == 4:
                module.net[3].weight = nn.Parameter(module.net[3].weight.detach() * 2)  # a new tensor

    module, recorder = Validated(), Recorder()
    module.configure = lambda module: ZOOptimizer(module, lr=0.01)
    trainer(tmp_path, max_steps=4, callbacks=[Reset(), recorder]).fit(module)
    plain = net(dropout=0.0)
    optimizer = ZOOptimizer(plain, lr=0.01)
    optimizer.steps = 3
    optimizer.estimate(lambda: loss_of(plain, list(loader())[3]))
    assert recorder.values[3] == tuple(float(x) for x in optimizer._window.totals)  # type: ignore[union-attr, arg-type]


def test_a_profiler_names_our_step(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_steps=3, profiler="simple")
    fit.fit(Validated())
    assert "[Strategy]ZOStrategy.training_step" in fit.profiler.summary()


# ---- batches


class Empty(DataLoader[Any]):
    """Its third batch has no rows."""

    def __iter__(self) -> Any:
        for index, (x, y) in enumerate(loader()):
            yield (x[:0], y[:0]) if index == 2 else (x, y)


def test_an_empty_batch_is_a_skipped_step(tmp_path: Path) -> None:
    """Its mean loss is not a number."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    module, recorder = lit()(model), Recorder()
    snapshots: list[dict[str, Any]] = []
    module.on_train_batch_start = lambda batch, batch_idx: snapshots.append(state(module))
    trainer(tmp_path, max_steps=5, callbacks=[recorder]).fit(module, Empty(rows(), 8))
    assert [report.skipped for report in recorder.reports] == [False, False, True, False, False]
    assert same(snapshots[3], snapshots[2])
    assert not same(snapshots[4], snapshots[3])
    assert all(torch.isfinite(tensor).all() for tensor in state(module).values())


@pytest.mark.filterwarnings("ignore:Total length of", "ignore:.*returned 0 length")
def test_no_batch_at_all_is_no_step(tmp_path: Path) -> None:
    module = Validated()
    before, recorder = state(module), Recorder()
    trainer(tmp_path, max_epochs=1, callbacks=[recorder]).fit(module, loader(count=0))
    assert same(state(module), before)
    assert recorder.reports == []


# ---- other ways in


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "arguments",
    [
        ["--trainer.strategy=zo_lightning.ZOStrategy", "--trainer.strategy.init_args.eps=0.25", "--trainer.strategy.init_args.lr=0.5"],
        ["--trainer.strategy=zo_lightning.ZOStrategy"],
        ["--trainer.strategy=zo"],
    ],
)
def test_command_line_interface(arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own
    monkeypatch.setattr("sys.argv", ["script.py"])
    cli = lightning(f"{name}.cli").LightningCLI
    common = "--trainer.accelerator=cpu --trainer.max_steps=2 --trainer.logger=false --trainer.enable_progress_bar=false".split()
    common += ["--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false"]
    run = cli(
        type("Fitted", (lit(name),), {"train_dataloader": lambda self: loader()}), args=["fit", "--seed_everything=1", *common, *arguments]
    )
    engine = run.trainer.strategy.zo_optimizer
    assert engine.steps == 2
    assert engine.eps == (0.25 if len(arguments) == 3 else 1e-3)
    assert engine.param_groups[0]["lr"] == (0.5 if len(arguments) == 3 else 0.01)


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [
        ("update", ["class_path=zo_lightning.engine.Momentum", "init_args.window=3"], Momentum(window=3)),
        ("update", ["class_path=zo_lightning.engine.TorchOptimizer", "init_args.optimizer=RMSprop"], TorchOptimizer("RMSprop")),
        ("estimator", ["class_path=zo_lightning.engine.OneSided", "init_args.queries=2"], OneSided(2)),
        ("noise", ["class_path=zo_lightning.engine.LowRank", "init_args.rank=3"], LowRank(3)),
        ("noise", ["low_rank(rank=3)"], LowRank(3)),
        ("weights", ["class_path=zo_lightning.engine.residency.Batched", "init_args.members=4"], Batched(4)),
    ],
)
def test_objects_on_a_command_line(option: str, given: list[str], expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr("sys.argv", ["script.py"])
    own = f"--trainer.strategy.init_args.{option}"
    arguments = [f"{own}.{part}" if "_path=" in part or "init_args" in part else f"{own}={part}" for part in given]
    common = "--trainer.accelerator=cpu --trainer.max_steps=1 --trainer.logger=false --trainer.enable_progress_bar=false".split()
    common += ["--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false", "--trainer.strategy=zo_lightning.ZOStrategy"]
    common += ["--trainer.strategy.init_args.lr=0.001"]
    common += ["--trainer.strategy.init_args.noise=low_rank"] if option == "weights" else []
    run = lightning("lightning.pytorch.cli").LightningCLI(
        type("Fitted", (lit("lightning.pytorch"),), {"train_dataloader": lambda self: loader()}),
        args=["fit", "--seed_everything=1", *common, *arguments],
    )
    engine = run.trainer.strategy.zo_optimizer
    found = {"update": engine.rule, "estimator": engine.estimator, "noise": engine.noise, "weights": engine.weights}
    assert found[option] == expected


def test_fabric_takes_the_engine(tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    models = [net(), net()]
    losses = []
    for model in models:
        optimizer = ZOOptimizer(model, lr=0.01)
        if model is models[0]:
            forward, optimizer = fabric.setup(model, optimizer)
        else:
            forward = model
        losses.append([float(optimizer.step(lambda f=forward, b=batch: loss_of(f, b))) for batch in loader()])
    assert losses[0] == losses[1]
    assert same(state(models[0]), state(models[1]))


# ---- compiled


@pytest.mark.parametrize("what", ["submodule", "used submodule", "module"])
def test_a_compiled_model_is_perturbed(what: str, tmp_path: Path) -> None:
    """Hooks that are added to a compiled module after its first call never run: both losses would be equal."""
    plain, module = lit()(net(dropout=0.0)), lit()(net(dropout=0.0))
    runs = []
    for each in (plain, module):
        recorder = Recorder()
        given = each
        if each is module and what == "module":
            given = torch.compile(each, backend="eager")
        elif each is module:
            each.net = torch.compile(each.net, backend="eager")
            if what == "used submodule":
                with torch.no_grad():
                    each.net.eval()(torch.ones(8, 6))
                each.net.train()
        strategy = ZOStrategy(eps=1e-2, weights="inplace" if each is plain else "auto")
        trainer(tmp_path, strategy=strategy, max_steps=8, callbacks=[recorder]).fit(given, loader())
        runs.append(recorder.reports)
    assert not any(report.zero_difference for report in runs[1])
    for one, other in zip(*runs, strict=True):
        assert one.values == pytest.approx(other.values, rel=1e-5)


def test_exact_weights_of_a_compiled_lightning_module_are_an_error(tmp_path: Path) -> None:
    module = torch.compile(lit()(net()), backend="eager")
    with pytest.raises(lightning().utilities.exceptions.MisconfigurationException, match='Use weights="inplace"'):
        trainer(tmp_path, strategy=ZOStrategy(weights="exact"), max_steps=1).fit(module, loader())


# ---- randomness


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
def test_both_sides_have_one_dropout_mask_and_every_step_another(weights: str, tmp_path: Path) -> None:
    masks: list[Any] = []

    class Masked(lit()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            masks.append(nn.functional.dropout(torch.ones(64), 0.5, self.training).tolist())
            return super().training_step(batch, batch_idx)

    trainer(tmp_path, strategy=ZOStrategy(weights=weights), max_steps=6, accumulate_grad_batches=2, max_epochs=1).fit(Masked(), loader())
    used = masks[1:] if weights == "exact" else masks  # its first step looks which blocks run
    assert used[::2] == used[1::2]
    assert len({tuple(mask) for mask in used}) == len(used) // 2 == 8  # of every micro-batch, too


def test_random_numbers_of_the_host_are_not_used(tmp_path: Path) -> None:
    """Two runs from different host states are equal, and the host's next number is the one it would have been."""
    results = []
    for start in (1, 2):
        torch.manual_seed(start)
        expected = torch.get_rng_state()
        drawn: list[bool] = []
        watch = lightning().callbacks.LambdaCallback(on_train_batch_end=lambda *args, d=drawn: d.append(True))
        module = lit()(net(dropout=0.5))
        before: list[Any] = []
        module.on_train_batch_start = lambda batch, batch_idx, b=before: b.append(torch.get_rng_state())
        trainer(tmp_path, max_steps=6, callbacks=[watch]).fit(module, loader())
        assert all(torch.equal(one, before[0]) for one in before[1:])
        assert expected.shape == before[0].shape
        results.append(state(module))
    assert same(*results)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("strategy", "count"), [("auto", 1), ("zo", 0)])
def test_callbacks_say_once_that_backpropagation_has_no_use_for_them(name: str, strategy: str, count: int, tmp_path: Path) -> None:
    fit = trainer(
        tmp_path, name, strategy=strategy, max_steps=1, max_epochs=-1, callbacks=[SparseMask("small_weights", 0.5, summary=False)]
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit.fit(lit(name)(net()), loader())
        fit.fit(lit(name)(net()), loader())
    told = 'SparseMask does nothing here: training is by backpropagation. Use Trainer(strategy="zo").'
    assert [str(one.message) for one in said if "does nothing here" in str(one.message)] == [told] * count
