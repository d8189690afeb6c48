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
from zo_lightning.engine.randomness import host_state

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

    def weights_at(self, step: int) -> tuple[float, float]:
        """(loss_weight, weight) at a step."""
        return scheduled("loss_weight", self.loss_weight, step), scheduled("weight", self.weight, step)

    def values(
        self, step: int, losses: Sequence[float], samples: Sequence[Sequence[Any]], begin: Callable[[], None] = lambda: None
    ) -> tuple[list[float], list[float]]:
        """(value, score) of every point; `begin` is called before each score."""
        scores = []
        for own in samples:
            begin()
            scores.append(self.score(own))
        of_loss, of_score = self.weights_at(step)
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
    def needs_output(self) -> bool:
        return self.source is None or self.loss_weight != 0.0

    def observe(self, output: Any, module: nn.Module | None, batch: Any) -> Any:
        found = output if self.source is None else self._ask(module, batch)
        if self.metric is None:
            return number(found, self._from())
        preds, target = without(self.ignore_index, *self._pair(found))
        if self.preprocess is not None:
            both = self.preprocess(preds, target)
            if not (isinstance(both, tuple) and len(both) == 2):
                raise ValueError(f"preprocess must return the pair (preds, target), and returned {type(both).__name__}: {_short(both)}.")
            preds, target = both
        return tree_map(kept, (preds, target))

    def score(self, samples: Sequence[Any]) -> float:
        if self.metric is None:
            return math.fsum(samples) / len(samples)
        if is_hosts(self.metric):
            raise ValueError(f"{HOSTS_OWN!r} is the Hugging Face Trainer's. Here, give the metric itself.")
        full = [sample for sample in samples if not _empty(sample)]
        if not full:
            return math.nan  # nothing but padding
        if not is_metric(self.metric):
            preds, target = restored(tuple(joined([sample[i] for sample in full]) for i in (0, 1)))
            return number(self._chosen(self.metric(preds, target)), self.name)
        try:
            for sample in full:
                self.metric.update(*restored(sample))
            return number(self._chosen(self.metric.compute()), self.name)
        finally:
            self.metric.reset()

    def _from(self) -> str:
        return "the closure's output" if self.source is None else f"source {getattr(self.source, '__name__', self.source)!r}"

    def _ask(self, module: nn.Module | None, batch: Any) -> Any:
        if module is None:
            raise ValueError(f"{self._from()} needs the module. Pass it: ZOOptimizer(module, ...) or ZOOptimizer(params, module=module).")
        if batch is None:
            raise ValueError(f"{self._from()} is asked for the batch, and there is none. Pass it: step(closure, batch=batch).")
        batch = copy.copy(batch)  # whatever a source takes out of it is there at the next point
        if callable(self.source):
            return self.source(module, batch)
        method = getattr(module, str(self.source), None)
        if not callable(method):
            raise ValueError(f"source={self.source!r} is not a method of {type(module).__name__}.")
        return method(batch)

    def _pair(self, found: Any) -> tuple[Any, Any]:
        if isinstance(found, Mapping) and {"preds", "target"} <= found.keys():
            return found["preds"], found["target"]
        if self.source is not None and isinstance(found, (tuple, list)) and len(found) == 2:
            return found[0], found[1]
        has = f"a mapping with {_names(found)}" if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{self.name} needs 'preds' and 'target', and {self._from()} is {has}. Return {{'preds': ..., 'target': ...}}.")

    def _chosen(self, result: Any) -> Any:
        if isinstance(result, Mapping):
            if self.key not in result:
                raise ValueError(
                    f"{self.name} returns {_names(result)}. Choose one: key={next(iter(result), '...')!r}; key is {self.key!r}."
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


def measured(
    objective: Objective, exchange: Exchange, step: int, losses: Sequence[float], samples: Samples, seed: int
) -> tuple[list[float], list[float]]:
    """(value, score) of every point, from the samples that each rank has of each point; what fails on rank 0 fails on all."""
    ranks = exchange.collect(samples)
    outcome: tuple[Any, str] = (None, "")
    failed: Exception | None = None
    if exchange.rank == 0:
        try:
            points = [[sample for own in ranks for sample in own[i]] for i in range(len(losses))]
            if not points[0]:
                raise ValueError("The micro-batches of this step were measured by a run without this objective. Resume between two steps.")
            with host_state(set()) as host:  # metrics that draw (bootstraps) draw the same at every point, and nobody else notices
                outcome = (objective.values(step, losses, points, lambda: host.seed(seed)), "")
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


def without(index: int | None, preds: Any, target: Any) -> tuple[Any, Any]:
    """Predictions and integer targets where the target is not `index`; scores (..., classes) of several dimensions become (n, classes)."""
    both = isinstance(preds, Tensor) and isinstance(target, Tensor)
    if index is None or not both or target.is_floating_point() or not target.dim() or preds.shape[: target.dim()] != target.shape:
        return preds, target
    valid = target != index
    scores = preds.is_floating_point() and preds.dim() == target.dim() + 1
    if bool(valid.all()) and not (scores and target.dim() > 1):
        return preds, target
    return preds[valid], target[valid]


NUMPY = "numpy"
"""The key under which a sample holds an array, as a tensor: checkpoints are read without unpickling objects."""


def kept(value: Any) -> Any:
    """For a sample: tensors and arrays on the CPU, in memory of their own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value).__module__ == "numpy" and hasattr(value, "__array__"):
        return {NUMPY: torch.from_numpy(value.copy())} if value.dtype.kind in "biuf" and value.ndim else value.tolist()
    return value


def restored(sample: Any) -> Any:
    """The arrays of a sample again."""
    return tree_map(lambda part: part[NUMPY].numpy() if _is_array(part) else part, sample, is_leaf=_is_array)


def _is_array(part: Any) -> bool:
    return isinstance(part, dict) and part.keys() == {NUMPY}


def _empty(sample: tuple[Any, Any]) -> bool:
    return isinstance(sample[1], Tensor) and sample[1].numel() == 0


def joined(parts: Sequence[Any]) -> Any:
    """Micro-batches one after the other: tensors along the first dimension, lists as one list, also inside of tuples and mappings."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if first.dim() else torch.stack(list(parts))
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple):
        return tuple(joined(own) for own in zip(*parts, strict=True))
    if isinstance(first, list):
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
