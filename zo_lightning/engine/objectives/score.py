"""Metrics of predictions and targets, and numbers that are asked of the module, as objectives."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zo_lightning.engine.messages import check_number, say_once
from zo_lightning.engine.objectives.asked import ask_source
from zo_lightning.engine.objectives.base import Objective, Scheduled
from zo_lightning.engine.objectives.samples import is_empty, joined, kept, names_in, number, restored, short, without

HOSTS_OWN = "compute_metrics"
"""A metric that the host knows."""


class Score(Objective):
    """Maximises (or minimises) a metric of predictions and targets.

    Args:
        metric: a torchmetrics Metric or MetricCollection, of which a copy is used, or a callable (preds, target) -> number. It gets all
            predictions of the step: a Metric by one `update` a micro-batch, a callable once, with micro-batches joined along the first
            dimension. None: what `source` returns is the number, and the mean over micro-batches counts.
        key: which entry of a metric that returns a dict, or index of one that returns a vector.
        maximize: True, False, or None: a Metric's `higher_is_better`, and True for everything else.
        source: where predictions come from. None: what the closure returns, a mapping with "preds" and "target". Else the name of a method
            of the module, called with the batch, or a callable (module, batch); these return such a mapping, a pair, or, without a
            metric, a number.
        preprocess: (preds, target) -> (preds, target), called under each perturbation. What it returns is kept until the update and travels
            between ranks, so it should be small.
        ignore_index: elements of integer targets with this value are left out, and so are their predictions. Scores (N, L, classes) of
            targets (N, L) always become (elements, classes) and (elements,). None: metrics get both as they are.
        shift: whether scores belong to the next token, where the host has a language model; None: it knows most of them by their classes.
        loss_weight, weight: numbers >= 0, or functions of the step such as a `Ramp`.

    Raises TypeError or ValueError for other arguments; in a step, ValueError where there are no predictions, or not one number.
    """

    def __init__(
        self,
        metric: Any = None,
        *,
        key: str | int | None = None,
        maximize: bool | None = None,
        source: str | Callable[[nn.Module, Any], Any] | None = None,
        preprocess: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        ignore_index: int | None = -100,
        shift: bool | None = None,
        loss_weight: Scheduled = 0.0,
        weight: Scheduled = 1.0,
    ) -> None:
        if metric is None and source is None:
            raise ValueError("There is nothing to optimise: give a metric, or a source=callable(module, batch) that returns a number.")
        if metric is not None and not (callable(metric) or is_metric(metric) or is_hosts(metric)):
            raise TypeError(f"metric={metric!r} is neither a torchmetrics Metric nor a callable (preds, target) -> number.")
        if inspect.isclass(metric):
            raise TypeError(f"metric={metric.__name__} is a class. Give an instance: {metric.__name__}(...).")
        if maximize is not None and not isinstance(maximize, bool):
            raise ValueError(f"Invalid maximize: {maximize!r}. Must be True, False, or None (what the metric says).")
        if source is not None and not (isinstance(source, str) or callable(source)):
            raise TypeError(f"source={source!r} is neither the name of a method nor a callable (module, batch).")
        if preprocess is not None and not takes_two(preprocess):
            raise TypeError(f"preprocess={preprocess!r} is not a callable (preds, target) -> (preds, target).")
        for option, value, kinds in (("key", key, (str, int)), ("ignore_index", ignore_index, (int,)), ("shift", shift, (bool,))):
            if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
                allowed = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"Invalid {option}: {value!r}. Must be None or of type {allowed}.")
        for name, given in (("loss_weight", loss_weight), ("weight", weight)):
            if not callable(given):
                check_number(name, given, ">= 0, or a function of the step", lambda x: x >= 0)
        self.metric = fresh(metric) if is_metric(metric) else metric
        self.key, self.source, self.preprocess, self.ignore_index, self.shift = key, source, preprocess, ignore_index, shift
        self.maximize = higher(metric, key) if maximize is None else maximize
        self.loss_weight, self.weight = loss_weight, weight

        of = source if metric is None else metric
        plain = of if isinstance(of, str) else getattr(of, "__name__", None) or type(of).__name__
        self.name = plain if key is None else f"{plain}[{key}]"

    @property
    def asks_module(self) -> bool:
        return self.source is not None

    @property
    def needs_output(self) -> bool:
        return self.source is None or self.loss_weight != 0.0

    def observe(self, output: Any, module: nn.Module | None, batch: Any) -> Any:
        found = output if self.source is None else ask_source(self.source, module, batch)
        if self.metric is None:
            return number(found, self._from())
        preds, target = without(self.ignore_index, *self._pair(found))
        if self.preprocess is not None:
            both = self.preprocess(preds, target)
            if not (isinstance(both, tuple) and len(both) == 2):
                raise ValueError(f"preprocess must return the pair (preds, target), and returned {type(both).__name__}: {short(both)}.")
            preds, target = both
        return tree_map(kept, (preds, target))

    def score(self, samples: Sequence[Any]) -> float:
        if self.metric is None:
            return math.fsum(samples) / len(samples)
        if is_hosts(self.metric):
            raise ValueError(f"{HOSTS_OWN!r} is the Hugging Face Trainer's. Here, give the metric itself.")
        full = [sample for sample in samples if not is_empty(sample)]
        if not full:
            return math.nan  # nothing but padding
        if not is_metric(self.metric):
            preds, target = restored(tuple(joined([sample[i] for sample in full]) for i in (0, 1)))
            self._say_if_alone(preds, target)
            return number(self._chosen(self.metric(preds, target)), self.name)
        try:
            for sample in full:
                self.metric.update(*restored(sample))
            return number(self._chosen(self.metric.compute()), self.name)
        finally:
            self.metric.reset()

    def _say_if_alone(self, preds: Any, target: Any) -> None:
        """A regression's outputs are a column, whose difference to a row of targets is a table of all with all."""
        both = isinstance(preds, Tensor) and isinstance(target, Tensor) and target.is_floating_point()
        if both and len(target) > 1 and preds.shape == (*target.shape, 1):
            say_once(
                f"score.{self.name}.column",
                f"{self.name} gets preds of shape {tuple(preds.shape)} and target of shape {tuple(target.shape)}: preds - target would "
                f"have the shape {tuple(torch.broadcast_shapes(preds.shape, target.shape))}. "
                "preprocess=lambda preds, target: (preds.squeeze(-1), target) makes them alike.",
            )

    def _from(self) -> str:
        return "the closure's output" if self.source is None else f"source {getattr(self.source, '__name__', self.source)!r}"

    def _pair(self, found: Any) -> tuple[Any, Any]:
        if isinstance(found, Mapping) and {"preds", "target"} <= found.keys():
            return found["preds"], found["target"]
        if self.source is not None and isinstance(found, (tuple, list)) and len(found) == 2:
            return found[0], found[1]
        has = f"a mapping with {names_in(found)}" if isinstance(found, Mapping) else type(found).__name__
        where = " there (in Lightning, from training_step), or give source=" if self.source is None else ""
        raise ValueError(
            f"{self.name} needs 'preds' and 'target', and {self._from()} is {has}. Return {{'preds': ..., 'target': ...}}{where}."
        )

    def _chosen(self, result: Any) -> Any:
        if isinstance(result, Mapping):
            if self.key not in result:
                raise ValueError(
                    f"{self.name} returns {names_in(result)}. Choose one: key={next(iter(result), '...')!r}; key is {self.key!r}."
                )
            return result[self.key]
        count = (
            result.numel()
            if isinstance(result, Tensor)
            else len(result)
            if isinstance(result, (list, tuple))
            else getattr(result, "size", 1)
        )
        if count > 1 and not isinstance(self.key, int):
            raise ValueError(f"{self.name} returns {count} numbers. Choose one, key=0, or average them (torchmetrics: average='macro').")
        if count > 1 and isinstance(self.key, int):
            if not -len(result) <= self.key < len(result):
                raise ValueError(f"key={self.key} is not one of the {len(result)} numbers that {self.name} returns.")
            return result[self.key]
        if self.key is not None:
            raise ValueError(f"key={self.key!r} is given, and {self.name} returns one number. Leave key out.")
        return result


def is_hosts(metric: Any) -> bool:
    """Whether it is the metric that the host knows. torchmetrics' objects compare to anything as something true."""
    return isinstance(metric, str) and metric == HOSTS_OWN


def is_metric(metric: Any) -> bool:
    """Whether it has the interface of torchmetrics' Metric and MetricCollection."""
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset"))


def fresh(metric: Any) -> Any:
    """A copy of a metric with nothing in it, on the CPU."""
    own = copy.deepcopy(metric)
    own.reset()
    parts: list[Any] = list(own.modules()) if isinstance(own, nn.Module) else []
    for part in parts:
        if hasattr(part, "sync_on_compute"):
            part.sync_on_compute = part.dist_sync_on_step = part._to_sync = False  # it gets the samples of all ranks, on one of them
    return own.cpu() if parts else own


def higher(metric: Any, key: str | int | None) -> bool:
    """Whether more is better: what a torchmetrics Metric says, or those that it wraps; True for callables. ValueError where nobody says."""
    if not is_metric(metric):
        return True
    collection: list[tuple[str, Any]] = list(metric.items()) if hasattr(metric, "items") else [("", metric)]
    parts = [one for name, one in collection if name == key] or [one for _, one in collection]
    said = {_direction(part) for part in parts}
    if len(said) != 1 or None in said:
        raise ValueError(f"{type(metric).__name__} does not say whether more of it is better. Say maximize=True or maximize=False.")
    return bool(said.pop())


def _direction(metric: Any) -> bool | None:
    """That of a Metric, or, where it has none of its own, what all metrics inside of it say."""
    own = getattr(metric, "higher_is_better", None)
    if own is not None or hasattr(metric, "metric_a"):  # sums and products of metrics have none
        return own
    inside: list[Any] = list(metric.modules()) if isinstance(metric, nn.Module) else []
    said = {part.higher_is_better for part in inside if part is not metric and hasattr(part, "higher_is_better")}
    return said.pop() if len(said) == 1 else None


def takes_two(function: Any) -> bool:
    """Whether it can be called with two arguments, as far as its signature tells."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # builtins have no signature
        pass
    return callable(function)
