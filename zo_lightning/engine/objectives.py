"""What a step minimises instead of the loss: any number that can be computed from what a model answers."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from zo_lightning.engine.messages import check_number

if TYPE_CHECKING:
    from zo_lightning.engine.parallel import Exchange

HOSTS_OWN = "compute_metrics"
"""A metric that the host knows."""
Scheduled = float | Callable[[int], float]
"""A number, or a function of the step."""
Samples = list[list[Any]]
"""For every point the samples of its micro-batches."""


class Objective(ABC):
    """A number for each point of a step, from what was observed there in all micro-batches of all ranks.

    At step t and every point: value = loss_weight(t) * loss -+ weight(t) * score, with the mean loss of the micro-batches, as always, and
    a score (maximised: -, minimised: +) that is computed once from all samples together, so that F1 of an accumulated or distributed batch
    is that of the whole batch. A step whose value is not finite is skipped, as with a loss.
    """

    name = "score"
    maximize = True
    loss_weight: Scheduled = 0.0
    weight: Scheduled = 1.0

    @property
    def needs_output(self) -> bool:
        """Whether the closure has to be called at all: `observe` reads what it returns, or the loss counts."""
        return True

    @abstractmethod
    def observe(self, output: Any, module: nn.Module | None, batch: Any) -> Any:
        """The sample of one evaluation, from what the closure returned, or by asking the module, which is perturbed at this moment.

        It is kept until the update and travels between ranks and into checkpoints: tensors on the CPU, numbers, strings, and lists,
        tuples and dicts of them.
        """

    @abstractmethod
    def score(self, samples: Sequence[Any]) -> float:
        """The number of one point, in its own unit. Called on rank 0 alone."""

    def loss_of(self, output: Any) -> Any:
        """The loss in what the closure returned; None skips the micro-batch."""
        if not isinstance(output, Mapping):
            return output
        if "loss" not in output and self.loss_weight == 0.0:
            return 0.0
        if "loss" not in output:
            raise ValueError(
                f"loss_weight={self.loss_weight!r} needs the loss, and the closure returned only {_names(output)}. Add 'loss', or leave "
                "loss_weight at 0."
            )
        return output["loss"]

    def values(self, step: int, losses: Sequence[float], samples: Sequence[Sequence[Any]]) -> tuple[list[float], list[float]]:
        """(value, score) of every point."""
        scores = [self.score(own) for own in samples]
        of_loss, of_score = scheduled("loss_weight", self.loss_weight, step), scheduled("weight", self.weight, step)
        signed = -of_score if self.maximize else of_score
        both = zip(losses, scores, strict=True)
        return [(of_loss * loss if of_loss else 0.0) + (signed * score if signed else 0.0) for loss, score in both], scores


def scheduled(name: str, given: Scheduled, step: int) -> float:
    """The number at a step. ValueError for one that is negative or not finite."""
    value = given(step) if callable(given) else given
    check_number(name, value, ">= 0", lambda x: x >= 0)
    return float(value)


@dataclass(frozen=True)
class Ramp:
    """A number that goes linearly from `start` at step `begin` to `end` at step `begin + steps`, and stays there."""

    start: float
    end: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            check_number(f"Ramp {name}", getattr(self, name), ">= 0", lambda x: x >= 0)
        check_number("Ramp steps", self.steps, ">= 1", lambda x: x >= 1)

    def __call__(self, step: int) -> float:
        done = min(1.0, max(0.0, (step - self.begin) / self.steps))
        return self.start + (self.end - self.start) * done


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
        ignore_index: elements of integer targets with this value are left out, and so are their predictions; predictions (..., classes) of
            targets (...) become (elements, classes). None: metrics get both as they are.
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
        if preprocess is not None and not callable(preprocess):
            raise TypeError(f"preprocess={preprocess!r} is not a callable (preds, target) -> (preds, target).")
        for name, given in (("loss_weight", loss_weight), ("weight", weight)):
            if not callable(given):
                check_number(name, given, ">= 0, or a function of the step", lambda x: x >= 0)
        self.metric = fresh(metric) if is_metric(metric) else metric
        self.key, self.source, self.preprocess, self.ignore_index = key, source, preprocess, ignore_index
        self.maximize = higher(metric, key) if maximize is None else maximize
        self.loss_weight, self.weight = loss_weight, weight

        of = source if metric is None else metric
        plain = of if isinstance(of, str) else getattr(of, "__name__", None) or type(of).__name__
        self.name = plain if key is None else f"{plain}[{key}]"

    @property
    def needs_output(self) -> bool:
        return self.source is None or self.loss_weight != 0.0

    def observe(self, output: Any, module: nn.Module | None, batch: Any) -> Any:
        found = output if self.source is None else self._ask(module, batch)
        if self.metric is None:
            return number(found, self._from())
        preds, target = without(self.ignore_index, *self._pair(found))
        if self.preprocess is not None:
            try:
                preds, target = self.preprocess(preds, target)
            except TypeError as error:
                raise TypeError(f"preprocess={self.preprocess!r} must take (preds, target) and return both: {error}") from error
        return tree_map(kept, (preds, target))

    def score(self, samples: Sequence[Any]) -> float:
        if self.metric is None:
            return math.fsum(samples) / len(samples)
        if is_hosts(self.metric):
            raise ValueError(f"{HOSTS_OWN!r} is the Hugging Face Trainer's. Here, give the metric itself.")
        if not is_metric(self.metric):
            preds, target = (joined([sample[i] for sample in samples]) for i in (0, 1))
            return number(self._chosen(self.metric(preds, target)), self.name)
        try:
            for preds, target in samples:
                self.metric.update(preds, target)
            return number(self._chosen(self.metric.compute()), self.name)
        finally:
            self.metric.reset()

    def _from(self) -> str:
        return "the closure's output" if self.source is None else f"source {getattr(self.source, '__name__', self.source)!r}"

    def _ask(self, module: nn.Module | None, batch: Any) -> Any:
        if module is None:
            raise ValueError(f"{self._from()} needs the module. Pass it: ZOOptimizer(module, ...) or ZOOptimizer(params, module=module).")
        if callable(self.source):
            return self.source(module, batch)
        method = getattr(module, str(self.source), None)
        if not callable(method):
            raise ValueError(f"source={self.source!r} is not a method of {type(module).__name__}.")
        return method(batch)

    def _pair(self, found: Any) -> tuple[Any, Any]:
        if isinstance(found, Mapping) and {"preds", "target"} <= found.keys():
            return found["preds"], found["target"]
        if self.source is not None and isinstance(found, tuple) and len(found) == 2:
            return found
        has = f"a mapping with {_names(found)}" if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{self.name} needs 'preds' and 'target', and {self._from()} is {has}. Return {{'preds': ..., 'target': ...}}.")

    def _chosen(self, result: Any) -> Any:
        if isinstance(result, Mapping):
            if self.key not in result:
                raise ValueError(
                    f"{self.name} returns {_names(result)}. Choose one: key={next(iter(result), '...')!r}; key is {self.key!r}."
                )
            return result[self.key]
        many = result.numel() > 1 if isinstance(result, Tensor) else isinstance(result, (list, tuple)) or getattr(result, "ndim", 0) > 0
        if many and not isinstance(self.key, int):
            shape = tuple(result.shape) if hasattr(result, "shape") else (len(result),)
            raise ValueError(f"{self.name} returns {shape} numbers. Choose one, key=0, or average them (torchmetrics: average='macro').")
        if many:
            return result[self.key]
        if self.key is not None:
            raise ValueError(f"key={self.key!r} is given, and {self.name} returns one number. Leave key out.")
        return result


def measured(
    objective: Objective, exchange: Exchange, step: int, losses: Sequence[float], samples: Samples
) -> tuple[list[float], list[float]]:
    """(value, score) of every point, from the samples that each rank has of each point; what fails on rank 0 fails on all."""
    ranks = exchange.gather(samples)
    outcome: tuple[Any, str] = (None, "")
    failed: Exception | None = None
    if exchange.rank == 0:
        try:
            points = [[sample for own in ranks for sample in own[i]] for i in range(len(losses))]
            outcome = (objective.values(step, losses, points), "")
        except Exception as error:  # the user's metric: all ranks have to stop
            failed, outcome = error, (None, f"{type(error).__name__}: {error}")
    found, why = exchange.share(outcome)
    if failed is not None:
        raise failed
    if why:
        raise RuntimeError(f"The objective failed on rank 0: {why}")
    values, scores = found
    return values, scores


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
    """Whether more is better: what a torchmetrics Metric says, else True."""
    of = metric
    if isinstance(metric, Mapping) or hasattr(metric, "items"):
        of = next((one for name, one in metric.items() if name == key), None)
    return getattr(of, "higher_is_better", None) is not False


def without(index: int | None, preds: Any, target: Any) -> tuple[Any, Any]:
    """Predictions and integer targets, of one shape or with classes as last dimension of `preds`, where the target is not `index`."""
    both = isinstance(preds, Tensor) and isinstance(target, Tensor)
    if index is None or not both or target.is_floating_point() or target.dim() < 1 or preds.shape[: target.dim()] != target.shape:
        return preds, target
    valid = target != index
    if target.dim() == 1 and bool(valid.all()):
        return preds, target
    return preds[valid], target[valid]


def kept(value: Any) -> Any:
    """For a sample: tensors on the CPU, in memory of their own."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def joined(parts: Sequence[Any]) -> Any:
    """Micro-batches one after the other: tensors along the first dimension, sequences as one list, and what is inside of mappings."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if first.dim() else torch.stack(list(parts))
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts]) for name in first}
    if isinstance(first, (list, tuple)):
        return [item for part in parts for item in part]
    return list(parts)


def number(value: Any, name: str) -> float:
    """The one real number that something is. ValueError otherwise."""
    if isinstance(value, Real):
        return float(value)
    if (
        hasattr(value, "item")
        and getattr(value, "size", None) is not None
        and (value.numel() if isinstance(value, Tensor) else value.size) == 1
    ):
        return float(value.item())
    raise ValueError(f"{name} must give one number, and gave {type(value).__name__}: {_short(value)}.")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _names(mapping: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, mapping)) or "nothing"
