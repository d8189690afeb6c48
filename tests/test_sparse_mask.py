"""SparseMask under both hosts: the engine's own steps, charts, refreshes across a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning_models
import pytest
import torch
from keeper_tools import equal
from lightning_models import HOST_WARNINGS, NAMES, lit, loader, loss_of, net
from scissors import CutError, Scissors

from zo_lightning.callbacks import Run, SparseMask, TrajectoryLog, ZOCallback
from zo_lightning.engine import StepReport, ZOOptimizer
from zo_lightning.engine.masks import Mask, PrincipalWeights, Sensitive, Where
from zo_lightning.engine.masks.report import MANY, Share, charts
from zo_lightning.engine.options import EngineOptions
from zo_lightning.strategy import ZOStrategy

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]
pytestmark += [pytest.mark.filterwarnings(r"ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning")]


class Watch(ZOCallback):
    """Keeps a mask's charts and the learning rates."""

    def __init__(self, mask: SparseMask) -> None:
        self.mask, self.charts, self.rates = mask, list[dict[str, float]](), list[float]()

    def on_zo_step(self, run: Run, report: StepReport) -> None:
        self.charts.append(self.mask.metrics())
        self.rates.append(report.lr)


def fit(folder: Path, mask: SparseMask, *more: Any, name: str = NAMES[0], seed: int = 0, path: Path | None = None) -> Any:
    torch.manual_seed(seed)
    module = lit(name)(net(), lambda m: torch.optim.SGD(m.parameters(), lr=0.01, weight_decay=0.1))
    if seed:
        with torch.no_grad():
            for weight in module.parameters():
                weight.normal_()
    torch.manual_seed(0)
    host = lightning_models.trainer(
        folder,
        name,
        strategy=ZOStrategy(weights="exact", eps=1e-2),
        max_epochs=2,
        callbacks=[mask, *more],
        enable_checkpointing=any("ModelCheckpoint" in type(one).__name__ for one in more),
    )
    try:
        host.fit(module, loader(shuffle=True), ckpt_path=path)
    except CutError:
        return None
    return module


@pytest.mark.parametrize("name", NAMES)
def test_lightning_makes_the_engines_masked_steps(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"density": 0.3, "refresh": 5}
    torch.manual_seed(0)
    plain = net()
    optimizer = ZOOptimizer(plain, lr=0.01, weight_decay=0.1, eps=1e-2, weights="exact", mask=Mask("small_weights", **given))
    watch = Watch(SparseMask("small_weights", **given))
    module = fit(tmp_path, watch.mask, watch, name=name)  # type: ignore[arg-type]
    torch.manual_seed(0)
    batches = loader(shuffle=True)
    for _ in range(2):
        for batch in batches:
            optimizer.step(lambda batch=batch: loss_of(plain, batch))
    assert equal(dict(module.net.state_dict()), dict(plain.state_dict()))
    made = [charts for charts in watch.charts if charts]
    assert [i for i, charts in enumerate(watch.charts) if charts] == [0, 5, 10, 15]
    assert made[0]["zo/mask/density"] == pytest.approx(0.3, abs=0.02)
    assert "zo/mask/overlap" not in made[0]
    assert 0.5 < made[1]["zo/mask/overlap"] <= 1
    assert all(f"zo/mask/density/{key}" in made[0] for key, _ in plain.named_parameters())
    printed = capsys.readouterr().err
    assert "Mask SmallWeights()" in printed
    assert printed.count("layer ") == 1


@pytest.mark.parametrize("name", NAMES)
def test_lightning_measures_as_the_engine_does(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    plain = net()
    mask = Mask(Sensitive(steps=3), 0.3, refresh=7)
    optimizer = ZOOptimizer(plain, lr=0.01, weight_decay=0.1, eps=1e-2, weights="exact", mask=mask)
    watch = Watch(SparseMask(Sensitive(steps=3), 0.3, refresh=7))
    module = fit(tmp_path, watch.mask, watch, name=name)  # type: ignore[arg-type]
    torch.manual_seed(0)
    batches, rates = loader(shuffle=True), []
    for _ in range(2):
        for batch in batches:
            optimizer.step(lambda batch=batch: loss_of(plain, batch))
            rates.append(optimizer.report.lr)  # type: ignore[union-attr]
    assert equal(dict(module.net.state_dict()), dict(plain.state_dict()))
    assert [rate > 0 for rate in rates] == [step % 7 > 2 for step in range(16)]
    assert watch.rates == rates
    made = {step: charts for step, charts in enumerate(watch.charts) if charts}
    assert list(made) == [3, 10]  # the masks, and not the steps that measure for them
    assert [made[step]["zo/mask/density"] for step in (3, 10)] == [pytest.approx(0.3, abs=0.02)] * 2
    assert "zo/mask/overlap" not in made[3]
    assert 0 < made[10]["zo/mask/overlap"] < 1
    printed = capsys.readouterr().err
    assert "Mask Sensitive(losses=None, steps=3)" in printed
    assert printed.count("layer ") == 1
    assert "28.44%" in printed  # of the mask, not of the steps that measure


@pytest.mark.parametrize("step", [2, 3, 8, 10])
def test_a_checkpoint_of_steps_that_measure_goes_on(step: int, tmp_path: Path) -> None:
    """Without a step log, what was measured is in the checkpoint alone."""

    def saved() -> Any:
        return lightning_models.lightning().callbacks.ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")

    def mask() -> SparseMask:
        return SparseMask(Sensitive(steps=3), 0.3, refresh=7, summary=False)

    watch, again = Watch(mask()), Watch(mask())
    whole = fit(tmp_path / "whole", watch.mask, watch, saved())  # type: ignore[arg-type]
    path = next((tmp_path / "whole").rglob(f"step={step}.ckpt"))
    module = fit(tmp_path / "again", again.mask, again, saved(), seed=7, path=path)  # type: ignore[arg-type]
    assert equal(module.state_dict(), whole.state_dict())
    assert again.charts == watch.charts[step:]
    assert again.rates == watch.rates[step:]


KILLED: dict[str, Any] = {
    "small": lambda: SparseMask("small_weights", 0.3, refresh=5, summary=False),
    "measured": lambda: SparseMask(Sensitive(steps=3), 0.3, refresh=5, summary=False),
    "low rank": lambda: SparseMask(PrincipalWeights(2, vectors="rest"), 0.3, refresh=5, summary=False),
}


@pytest.mark.parametrize("cut", [4, 5, 6, 12])
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("kind", KILLED)
def test_a_run_that_is_killed_at_a_refresh_goes_on(kind: str, cut: int, save: bool, tmp_path: Path) -> None:
    mask = KILLED[kind]

    def more() -> list[Any]:
        kind = lightning_models.lightning().callbacks.ModelCheckpoint
        return [TrajectoryLog(), *([kind(every_n_train_steps=4, save_top_k=-1)] if save else [])]

    whole = fit(tmp_path / "whole", mask(), *more())
    assert fit(tmp_path / "run", mask(), *more(), Scissors(cut)) is None
    again = fit(tmp_path / "run", mask(), *more(), seed=7)
    assert equal(again.state_dict(), whole.state_dict())


def test_another_mask_does_not_go_on(tmp_path: Path) -> None:
    assert fit(tmp_path, SparseMask("small_weights", 0.3, summary=False), TrajectoryLog(), Scissors(4)) is None
    with pytest.raises(ValueError, match=r"At step 0 the mask is not the one that the run in .* one of the rule 'small_weights' there"):
        fit(tmp_path, SparseMask("small_weights", 0.4, summary=False), TrajectoryLog())


def test_charts_of_layers_can_be_switched_off(tmp_path: Path) -> None:
    watch = Watch(SparseMask("random", 0.3, refresh=5, summary=False, layers=False))
    fit(tmp_path, watch.mask, watch)  # type: ignore[arg-type]
    assert watch.charts[0].keys() == {"zo/mask/density"}
    assert watch.charts[5].keys() == {"zo/mask/density", "zo/mask/overlap"}


def test_two_masks_are_refused() -> None:
    options = SparseMask("random", 0.5).configure(EngineOptions())
    with pytest.raises(ValueError, match="There are two masks"):
        SparseMask("random", 0.4).configure(options)


def test_a_pattern_that_fits_nothing_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    watch = Scissors()
    with pytest.raises(ValueError, match="exclude: the pattern 'bais' fits no trained layer"):
        fit(tmp_path, SparseMask("random", 0.5, exclude="bais"), watch)
    assert not watch.reports


def test_the_users_own_mask(tmp_path: Path) -> None:
    mask = SparseMask(Where(lambda name, tensor: tensor.dim() > 1), summary=False)
    module = fit(tmp_path, mask)
    torch.manual_seed(0)
    start = dict(net().named_parameters())
    assert all(torch.equal(start[key], value) is (value.dim() == 1) for key, value in module.net.named_parameters())


def test_charts_of_many_layers_are_of_their_blocks() -> None:
    """Shares of a block are those of its layers by their weights; overlaps by their trained weights."""
    found = [
        Share("layer.0.a", 100, 50, 0.5),
        Share("layer.0.b", 300, 30, 1.0),
        Share("layer.1.a", 100, 0, None),
        Share("head", 10, 10, 0.2),
    ]
    by_layer = charts(found, None)
    assert by_layer["zo/mask/density/layer.0.b"] == 0.1
    assert "zo/mask/overlap/layer.1.a" not in by_layer
    many = charts(found + [Share(f"more.{i}.x", 1, 1, 1.0) for i in range(MANY)], None)
    assert many["zo/mask/density/layer.0"] == 0.2
    assert many["zo/mask/overlap/layer.0"] == pytest.approx((25 + 30) / 80)
    assert many["zo/mask/density/head"] == 1.0
    assert many["zo/mask/overlap"] == pytest.approx((25 + 30 + 2 + MANY) / (90 + MANY))
    assert charts(found, False).keys() == {"zo/mask/density", "zo/mask/overlap"}
    assert "zo/mask/density/layer.0.a" in charts(found * MANY, True)
    with pytest.raises(ValueError, match="Invalid layers: 3"):
        SparseMask("random", 0.5, layers=3)  # type: ignore[arg-type]
