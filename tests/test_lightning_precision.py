"""Precision plugins keep their casts and their autocast; what they do for gradients has nothing to act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_models import HOST_WARNINGS, NAMES, Recorder, lightning, lit, loader, loss_of, net, said, state, trainer

from zo_lightning import ZOOptimizer, ZOStrategy

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]


class Watching(lit()):  # type: ignore[misc]
    """Notes what a forward pass sees."""

    def __init__(self) -> None:
        super().__init__(net(dropout=0.0))
        self.seen: list[tuple[Any, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self.net(x)
        loss = torch.nn.functional.mse_loss(out.float(), y.float())
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self.seen.append((self.net[0].weight.dtype, x.dtype, out.dtype, autocast))
        return loss


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PRECISIONS = {
    "32-true": (F32, F32, F32, None),
    "64-true": (F64, F64, F64, None),
    "bf16-true": (BF16, BF16, BF16, None),
    "16-true": (F16, F16, F16, None),
    "bf16-mixed": (F32, F32, BF16, BF16),
}


@pytest.mark.filterwarnings("ignore:.*is not supported by the model summary")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains_as_it_computes(precision: str, name: str, tmp_path: Path) -> None:
    module, recorder = Watching(), Recorder()
    strategy = ZOStrategy(lr=0.01, eps=0.05)
    if name != NAMES[0]:
        module = type("Other", (lit(name),), {key: vars(Watching)[key] for key in ("training_step",)})(net(dropout=0.0))
        module.seen = []
    trainer(tmp_path, name, strategy=strategy, precision=precision, max_steps=8, callbacks=[recorder]).fit(module, loader())
    assert set(module.seen) == {PRECISIONS[precision]}
    assert len(recorder.reports) == 8
    assert not any(report.skipped or report.zero_difference for report in recorder.reports)
    start = state(net().to(PRECISIONS[precision][0]))
    assert not any(torch.equal(start[key], tensor) for key, tensor in state(module.net).items() if key.endswith("weight"))


def test_mixed_precision_sees_both_sides_of_the_step(tmp_path: Path) -> None:
    """Autocast caches the cast weights of a region: the second forward would see those of the first."""
    runs = []
    for host in (True, False):
        model, recorder = net(dropout=0.0), Recorder()
        if host:
            module = lit()(model)
            trainer(tmp_path, precision="bf16-mixed", max_steps=8, callbacks=[recorder]).fit(module, loader())
            runs.append((recorder.values, state(model)))
        else:
            optimizer, values = ZOOptimizer(model, lr=0.01), []
            for batch in loader():
                with torch.autocast("cpu", torch.bfloat16):
                    optimizer.estimate(lambda model=model, batch=batch: loss_of(model, batch))
                optimizer.apply()
                assert optimizer.report is not None
                values.append(optimizer.report.values)
            runs.append((values, state(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][key]) for key, tensor in runs[0][1].items())
    assert any(plus != minus for plus, minus in runs[0][0])


@pytest.mark.filterwarnings("ignore:lr=0.01 are SGD's")
def test_the_loss_scaler_of_16_mixed_is_left_out(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    plugin = lightning().plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    module, recorder = Watching(), Recorder()
    fit = trainer(tmp_path, plugins=plugin, max_steps=4, callbacks=[recorder])
    fit.fit(module, loader())
    assert {seen[3] for seen in module.seen} == {F16}
    assert all(0 < report.loss < 10 for report in recorder.reports)  # not 1024 times it
    assert plugin.scaler.get_scale() == 1024.0
    assert sum("loss scaler of 16-mixed precision does nothing" in text for text in said(recwarn)) == 1
