"""The demo's task in a plain loop, for benchmarks that compare what runs learn: MiniLM on docstring topics, lr decaying linearly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

from zo_lightning import ZOOptimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import demo_docstrings
import docstring_topics
import minilm


class Docstrings:
    """A freshly loaded model, the task's texts, and batches in an order that follows from the seed alone."""

    def __init__(self, seed: int, batch: int, dtype: torch.dtype = torch.float32) -> None:
        model, tokenizer = minilm.load(list(docstring_topics.TOPICS))
        self.model: nn.Module = model.to(dtype).train()
        self.task, self.collate = demo_docstrings.make_task(tokenizer), DataCollatorWithPadding(tokenizer)
        self._batch, self._order = batch, list[int]()
        self._draw = torch.Generator().manual_seed(seed)

    def batch(self) -> Any:
        """The next texts of an epoch; what is left of it when it is too short is left out."""
        if len(self._order) < self._batch:
            self._order = torch.randperm(len(self.task.train), generator=self._draw).tolist()
        rows, self._order = self._order[: self._batch], self._order[self._batch :]
        return self.collate([self.task.train[row] for row in rows])

    def loss(self, batch: Any) -> Tensor:
        """The loss on a batch."""
        value: Tensor = self.model(**batch)["loss"]
        return value

    def accuracy(self) -> float:
        """Share of the held-out texts whose topic is found."""
        self.model.eval()
        found = accuracy(self.model, self.collate, self.task.held_out)
        self.model.train()
        return found


def accuracy(model: nn.Module, collate: Any, rows: list[dict[str, Any]]) -> float:
    """Share of the texts whose largest logit is their topic's."""
    found, labels = answers(model, collate, rows)
    return int((found == labels).sum()) / len(rows)


@torch.no_grad()
def answers(model: nn.Module, collate: Any, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """(topic with the largest logit, topic) of every text."""
    found, labels = [], []
    for at in range(0, len(rows), 64):
        batch = collate([dict(row) for row in rows[at : at + 64]])
        labels.append(batch.pop("labels"))
        found.append(model(**batch)["logits"].argmax(-1))
    return torch.cat(found), torch.cat(labels)


def train(
    run: Docstrings,
    optimizer: ZOOptimizer,
    steps: int,
    after: Callable[[int], None] = lambda step: None,
    output: Callable[[Any], Any] | None = None,
) -> None:
    """`steps` steps, the learning rate of every group decaying from what it is to 0; `after(steps made)`.

    `output(batch)` is what the closure returns, the loss unless given.
    """
    evaluate = run.loss if output is None else output
    lr = [float(group["lr"]) for group in optimizer.param_groups]
    for step in range(steps):
        for group, first in zip(optimizer.param_groups, lr, strict=True):
            group["lr"] = first * (1 - step / steps)
        batch = run.batch()
        optimizer.step(lambda batch=batch: evaluate(batch))  # type: ignore[misc]
        after(step + 1)
