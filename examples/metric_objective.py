"""Train on accuracy itself, without any loss: the demo's classifier of docstrings, in Hugging Face, with forward passes only.

    python examples/metric_objective.py                          # about two minutes on four CPU cores
    python examples/metric_objective.py --metric f1              # macro F1 instead
    python examples/metric_objective.py --loss-weight 1          # accuracy and loss

Trained are biases and norms alone (a mask), which learn most without a gradient. docs/objectives.md has what each objective learned.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing is downloaded

import docstring_topics
import minilm
from demo_docstrings import accuracy, make_task
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import DataCollatorWithPadding

from zo_lightning.callbacks import MetricObjective, SparseMask
from zo_lightning.engine.masks import Where
from zo_lightning.hf_integration import ZOConfig, ZOTrainer

TOPICS = list(docstring_topics.TOPICS)
METRICS: dict[str, Any] = {
    "accuracy": MulticlassAccuracy(num_classes=len(TOPICS), average="micro"),
    "f1": MulticlassF1Score(num_classes=len(TOPICS), average="macro"),
}


def vectors(name: str, tensor: Tensor) -> bool:
    """Biases and norms: 0.14 % of the weights."""
    return tensor.dim() < 2


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Train; print and return the held-out accuracy before and after."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--metric", choices=tuple(METRICS), default="accuracy")
    parser.add_argument("--loss-weight", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--eps", type=float, default=3e-2, help="large, so that some answers change: a metric moves in steps")
    parser.add_argument("--held-out", type=int, metavar="N", help="evaluate on so many held-out texts only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/metric_objective"))
    options = parser.parse_args(arguments)

    model, tokenizer = minilm.load(TOPICS)
    task = make_task(tokenizer, options.held_out)
    objective = MetricObjective(METRICS[options.metric], loss_weight=options.loss_weight)
    config = ZOConfig(
        str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=32,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        zo_eps=options.eps,
        zo_dropout=False,
        zo_seed=options.seed,
        seed=options.seed,
        logging_steps=min(20, options.steps),  # zo/objective: the metric on the batches; zo/equal_values: steps in which no answer changed
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = ZOTrainer(
        model,
        config,
        train_dataset=task.train,
        eval_dataset=task.held_out,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=[objective, SparseMask(Where(vectors))],
    )
    before = float(trainer.evaluate()["eval_accuracy"])
    trainer.train()
    after = float(trainer.evaluate()["eval_accuracy"])
    print(f"held-out accuracy before {before:.1%}, after {after:.1%}, trained on {objective.objective.name} ({options.steps} steps)")
    return before, after


if __name__ == "__main__":
    try:
        main()
    except minilm.ModelError as error:
        sys.exit(str(error))
