"""An order instead of numbers: somebody says which outputs are better, and nobody how much."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from zo_lightning.engine.messages import check_count
from zo_lightning.engine.objectives.asked import ask_source
from zo_lightning.engine.objectives.base import Objective
from zo_lightning.engine.objectives.oracles import Oracle, as_order
from zo_lightning.engine.objectives.samples import joined, kept, names_in, restored
from zo_lightning.engine.signals import interruptible


class Ranking(Objective):
    """One question a step: which of the outputs at the points of this step are better? The value of a point is its rank, 0 for the best.

    For the estimator `RankSGD(samples=m, top=k)`, with m outputs a question (ZO-RankSGD, arXiv 2303.03751). With any other estimator the
    ranks stand for the values. The micro-batches of all processes are joined along the first dimension before the question is asked.

    Args:
        oracle: a callable (outputs) -> order, or an `Oracle` (`TerminalOracle`, `FileOracle`). The order has the indices of the outputs,
            the best first: all of them, or the best `top`; the rest then share the next rank. In the line search of `RankSGD(search=...)`
            it gets the outputs of steps of several lengths, and the best alone will do. It is called on rank 0 alone.
        top: how many the order may be short to; None: it has all.
        source: where an output comes from. None: what the closure returns, a mapping with "outputs" or "preds". Else the name of a method
            of the module, called with the batch, or a callable (module, batch).

    Raises TypeError or ValueError for other arguments. In a step, what the oracle raises and an order that is none are errors that name the
    oracle: RuntimeError (TimeoutError where it was one) and ValueError. The weights are then those before the step; made again from the
    same data, the step asks the same question.
    """

    needs_target = False

    def __init__(
        self,
        oracle: Oracle | Callable[[list[Any]], Sequence[int]],
        *,
        top: int | None = None,
        source: str | Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        if inspect.isclass(oracle):
            raise TypeError(f"oracle={oracle.__name__} is a class. Give an instance: {oracle.__name__}(...).")
        if not (isinstance(oracle, Oracle) or callable(oracle)):
            raise TypeError(f"oracle={oracle!r} is neither an Oracle nor a callable (outputs) -> order.")
        if top is not None:
            check_count("top", top, "how many of the best an order has at least, or None for all")
        if source is not None and not (isinstance(source, str) or callable(source)):
            raise TypeError(f"source={source!r} is neither the name of a method nor a callable (module, batch).")
        self.oracle, self.top, self.source = oracle, top, source
        self.name = getattr(oracle, "__name__", None) or type(oracle).__name__

    @property
    def asks_module(self) -> bool:
        return self.source is not None

    @property
    def needs_output(self) -> bool:
        return self.source is None

    def observe(self, output: Any, module: nn.Module | None, batch: Any) -> Any:
        if self.source is not None:
            return tree_map(kept, ask_source(self.source, module, batch))
        for name in ("outputs", "preds"):
            if isinstance(output, Mapping) and name in output:
                return tree_map(kept, output[name])
        has = f"a mapping with {names_in(output)}" if isinstance(output, Mapping) else type(output).__name__
        raise ValueError(
            f"{self.name} ranks outputs, and the closure returned {has}. Return {{'outputs': ...}} there (in Lightning, from "
            "training_step), or give source=."
        )

    def score(self, samples: Sequence[Any]) -> float:
        raise TypeError("A point of a ranking has no number of its own: `values` ranks them together.")

    def values(
        self,
        step: int,
        losses: Sequence[float],
        samples: Sequence[Sequence[Any]],
        begin: Callable[[], None] = lambda: None,
        searching: bool = False,
    ) -> tuple[list[float], list[float]]:
        outputs = [restored(own[0] if len(own) == 1 else joined(own)) for own in samples]
        begin()
        order = self._order(step, outputs, searching)
        ranks = [float(len(order))] * len(outputs)
        for rank, index in enumerate(order):
            ranks[index] = float(rank)
        return ranks, []

    def _order(self, step: int, outputs: list[Any], searching: bool) -> list[int]:
        count = len(outputs)
        top = 1 if searching else count if self.top is None else min(self.top, count)
        when = f"step {step}{', line search' if searching else ''}"
        who = f"The oracle {self.name!r}, asked at {when}"
        try:
            with interruptible():  # people take their time
                asked = self.oracle
                order = asked.ask(step, list(outputs), top, searching) if isinstance(asked, Oracle) else asked(list(outputs))
        except TimeoutError as error:
            raise TimeoutError(f"{who}, did not answer: {error}") from error
        except Exception as error:
            raise RuntimeError(f"{who}, failed with {type(error).__name__}: {error}") from error
        return as_order(order, count, top, f"What {self.name!r} returned at {when}")
