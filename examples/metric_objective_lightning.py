"""Train on macro F1 itself, without any loss: handwritten digits in Lightning, with forward passes only.

python examples/metric_objective_lightning.py      # about a minute on two CPU cores
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
from lightning_digits import Batch, Classifier, Digits
from torch import Tensor
from torchmetrics.classification import MulticlassF1Score

import zo_lightning
from zo_lightning.callbacks import MetricObjective


class F1Classifier(Classifier):
    """The digits' network: a training step that says what it answers, and computes no loss, and F1 of the held-out digits."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__(lr)
        self.val_f1 = MulticlassF1Score(num_classes=10, average="macro")

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        x, y = batch
        return {"preds": self(x), "target": y}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        x, y = batch
        self.val_f1(self(x), y)
        self.log("val_f1", self.val_f1, prog_bar=True)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Train, print and return the macro F1 on the held-out digits before and after."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--eps", type=float, default=1e-2)
    options = parser.parse_args(arguments)
    L.seed_everything(0)
    model, digits = F1Classifier(options.lr), Digits()
    f1: Any = MetricObjective(MulticlassF1Score(num_classes=10, average="macro"))
    trainer = L.Trainer(
        strategy=zo_lightning.ZOStrategy(eps=options.eps),
        callbacks=[f1],
        max_epochs=options.epochs,
        check_val_every_n_epoch=options.epochs,
        logger=False,
        enable_checkpointing=False,
    )
    before = float(trainer.validate(model, digits, verbose=False)[0]["val_f1"])
    trainer.fit(model, digits)
    after = float(trainer.validate(model, digits, verbose=False)[0]["val_f1"])
    print(f"held-out macro F1 before {before:.1%}, after {after:.1%}")
    return before, after


if __name__ == "__main__":
    main()
