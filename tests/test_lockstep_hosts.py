"""Evaluations that take turns, under both hosts: what is logged, counted and measured is that of weights="exact"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from engine_models import same, snapshot
from hf_tools import bert, losses, texts, trainer
from lightning_models import HOST_WARNINGS, NAMES, lightning, lit, loader, net
from lightning_models import trainer as lightning_trainer
from torch import Tensor, nn

from zo_lightning.callbacks import WeightOffload
from zo_lightning.strategy import ZOStrategy

pytestmark = [
    pytest.mark.filterwarnings(text) for text in (*HOST_WARNINGS, "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
]


def busy(name: str) -> Any:
    class Busy(lit(name)):  # type: ignore[misc]
        """Counts, logs, measures, and looks at activations that a hook kept."""

        def __init__(self) -> None:
            super().__init__(net())
            self.error = torchmetrics.MeanSquaredError()
            self.worst = torchmetrics.MaxMetric()
            self.calls, self.history, self.kept = 0, [], {}
            self.net[2][0].register_forward_hook(self.keep)

        def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.kept["first"] = output
            self.features = output.abs().mean()

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.calls += 1
            x, y = batch
            out = self.net(x / x.norm(dim=1, keepdim=True))
            loss = nn.functional.mse_loss(out, y) + 0.1 * self.features + 0.1 * self.kept.pop("first").square().mean()
            self.error.update(out, y)
            self.worst.update(loss)
            self.history.append(float(loss))
            self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log_dict({"error": self.error, "worst": self.worst}, on_step=True, on_epoch=True)
            return loss

    return Busy


def run(name: str, folder: Path, offloaded: bool, **options: Any) -> tuple[Any, list[Any], int]:
    base = lightning(name).loggers.CSVLogger
    rows: list[Any] = []

    class Logger(base):  # type: ignore[misc, valid-type]
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            ours = {key: value for key, value in metrics.items() if not key.startswith("zo/")}
            if ours.keys() - {"epoch"}:
                rows.append((step, ours))

    torch.manual_seed(0)
    module, passes = busy(name)(), [0]
    module.net.register_forward_pre_hook(lambda *args: passes.__setitem__(0, passes[0] + 1))
    strategy = ZOStrategy(weights="auto" if offloaded else "exact", eps=1e-2)
    host = lightning_trainer(
        folder,
        name,
        strategy=strategy,
        logger=Logger(folder),
        callbacks=[WeightOffload()] if offloaded else [],
        max_epochs=2,
        log_every_n_steps=1,
        **options,
    )
    host.fit(module, loader(shuffle=True))
    assert strategy.zo_optimizer.lockstep is offloaded
    return module, rows, passes[0]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_lightning_sees_the_same(name: str, accumulate: int, tmp_path: Path) -> None:
    exact, rows, passes = run(name, tmp_path / "exact", False, accumulate_grad_batches=accumulate)
    streamed, others, again = run(name, tmp_path / "streamed", True, accumulate_grad_batches=accumulate)
    assert any("loss_step" in row for _, row in rows)
    assert any({"loss_epoch", "error_epoch", "worst_epoch"} <= row.keys() for _, row in rows)
    assert others == rows
    assert again == passes
    assert streamed.calls == exact.calls
    assert streamed.history == exact.history
    assert same(snapshot(streamed), snapshot(exact))


class Hides(nn.Module):
    """A classifier that keeps what it saw in itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bert()
        self.config = self.inner.config
        self.calls = 0
        self.inner.bert.encoder.layer[0].register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen = (output[0] if isinstance(output, tuple) else output).std()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        self.calls += 1
        out = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        out.loss = out.loss + 0.1 * self.seen
        return out


def test_hugging_face_sees_the_same(tmp_path: Path) -> None:
    found = []
    for offloaded in (False, True):
        model = Hides()
        more: dict[str, Any] = {"callbacks": [WeightOffload()]} if offloaded else {"zo_weights": "exact"}
        host = trainer(tmp_path / str(offloaded), model, data=texts(), max_steps=6, logging_steps=1, **more)
        host.train()
        found.append((losses(host), model.calls, snapshot(model)))
        assert host.zo_optimizer.lockstep is offloaded
    assert found[0][:2] == found[1][:2]
    assert same(found[0][2], found[1][2])
