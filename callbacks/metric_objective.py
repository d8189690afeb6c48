"""MetricObjective: train on what is really wanted, accuracy, F1 or any other number, under either host."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from zo_lightning.callbacks.base import Run, ZOCallback
from zo_lightning.engine.messages import say_once
from zo_lightning.engine.objectives import Objective, Scheduled, Score, is_hosts
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.report import StepReport

LOOKED_AT = 20
"""Steps after which the share of those without a difference is judged."""
TOO_MANY = 0.5


class OfObjective(ZOCallback):
    """What the callbacks of all objectives do: give the engine its objective, chart the score, count steps without a difference."""

    objective: Objective

    def __init__(self) -> None:
        self._steps = self._equal = 0
        self._waiting = Counter[str]()
        """Since the last time of logging: steps, those without a difference, those with a score."""
        self._sum = 0.0

    def configure(self, options: EngineOptions) -> EngineOptions:
        if options.objective not in (None, self.objective):
            there, here = options.objective.name, self.objective.name
            raise ValueError(f"There are two objectives, {there!r} and {here!r}. Use one; loss_weight= mixes it with the loss.")
        return dataclasses.replace(options, objective=self.objective)

    def on_run_start(self, run: Run) -> None:
        self._steps = self._equal = 0
        self._waiting, self._sum = Counter(), 0.0

    def on_zo_step(self, run: Run, report: StepReport) -> None:
        if not report.skipped:
            self._waiting.update(steps=1, equal=int(report.zero_difference))
        if not report.skipped and report.score is not None:
            self._waiting["scores"] += 1
            self._sum += report.score
        self._steps += not report.skipped
        self._equal += report.zero_difference
        if self._steps >= LOOKED_AT and self._equal > TOO_MANY * self._steps and run.is_rank_zero:
            say_once(
                "objective.equal",
                f"{self.objective.name} had equal values on both sides in {self._equal} of {self._steps} steps, where nothing was learned. "
                "What helps: a larger eps, a larger batch (or accumulation), more queries, or loss_weight= to mix it with the loss.",
            )

    def metrics(self) -> dict[str, float]:
        waiting, total, self._waiting, self._sum = self._waiting, self._sum, Counter(), 0.0
        shown = {"zo/objective": total / waiting["scores"]} if waiting["scores"] else {}
        return {**shown, "zo/equal_values": waiting["equal"] / waiting["steps"]} if waiting["steps"] else shown


class MetricObjective(OfObjective):
    """Maximises (or minimises) a metric instead of the loss: value = loss_weight * loss - weight * metric (+ where it is minimised).

    The metric is computed once a step and point from the predictions of all micro-batches and processes, so that the F1 of an accumulated
    or distributed batch is that of the whole batch. Your metric object keeps its state: a copy is used. Logs `zo/objective`, the metric's
    mean over points and the steps since the last time, and `zo/equal_values`, the share of them in which all points had the same value.

    Where predictions come from: in Hugging Face, the model's logits and the batch's labels, shifted for causal language models, or (metric
    "compute_metrics") what the Trainer's own compute_metrics makes of them; in Lightning, a training_step that returns a dict with "preds"
    and "target" (and "loss" where it counts), or `source`. The arguments are those of `engine.objectives.Score`; moreover:

    Args:
        metric: also "compute_metrics", the Hugging Face Trainer's, with `key` for the entry of its dict.
        tokenizer: for metrics of texts: predictions (ids, or logits, of which the largest is taken) and targets are decoded, special
            tokens left out.

    Objectives of MeZO (arXiv 2305.17333, section 3.3): accuracy and F1.
    """

    def __init__(
        self,
        metric: Any = None,
        *,
        key: str | int | None = None,
        maximize: bool | None = None,
        source: str | Callable[[nn.Module, Any], Any] | None = None,
        preprocess: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        tokenizer: Any = None,
        ignore_index: int | None = -100,
        shift: bool | None = None,
        loss_weight: Scheduled = 0.0,
        weight: Scheduled = 1.0,
    ) -> None:
        super().__init__()
        if tokenizer is not None and preprocess is not None:
            raise ValueError("tokenizer= and preprocess= are both given. Decode in preprocess, or leave it out.")
        if tokenizer is not None and not callable(getattr(tokenizer, "batch_decode", None)):
            raise TypeError(f"tokenizer={tokenizer!r} is not a tokenizer: it has no batch_decode.")
        if tokenizer is not None and is_hosts(metric):
            raise ValueError(f"tokenizer= does nothing for {metric!r}, which decodes by itself. Leave it out.")
        self.objective = Score(
            metric,
            key=key,
            maximize=maximize,
            source=source,
            preprocess=preprocess if tokenizer is None else Decoded(tokenizer, ignore_index),
            ignore_index=ignore_index if tokenizer is None else None,
            shift=shift,
            loss_weight=loss_weight,
            weight=weight,
        )


class Decoded:
    """(preds, target) -> texts."""

    def __init__(self, tokenizer: Any, ignore_index: int | None) -> None:
        self._tokenizer, self._ignored = tokenizer, ignore_index

    def __call__(self, preds: Any, target: Any) -> tuple[list[str], list[str]]:
        ids = preds.argmax(-1) if preds.dim() > target.dim() else preds
        if ids.shape == target.shape and self._ignored is not None:
            ids = ids.masked_fill(target == self._ignored, self._ignored)
        return self._texts(ids), self._texts(target)

    def _texts(self, ids: Any) -> list[str]:
        rows = [[token for token in row if token != self._ignored and token >= 0] for row in ids.tolist()]
        texts: list[str] = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts
