"""RankingObjective: train on which outputs are preferred, by a person or anything else that can compare, under either host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from zo_lightning.callbacks.metric_objective import OfObjective
from zo_lightning.engine.estimators import SPSA, RankSGD
from zo_lightning.engine.objectives import Oracle, Ranking
from zo_lightning.engine.options import EngineOptions, as_estimator


class RankingObjective(OfObjective):
    """ZO-RankSGD (arXiv 2303.03751): every step asks an oracle to rank the outputs at m perturbed points, and moves to the better ones.

    Outputs are, in Hugging Face, the model's predictions; in Lightning, the "outputs" or "preds" of the dict that training_step returns; or
    what `source` returns. No loss counts. It sets the objective and the estimator of the engine.

    Args:
        oracle: a callable (outputs) -> order, best first, or a `TerminalOracle` or `FileOracle` (zo_lightning.engine.objectives).
        samples: m, how many outputs are ranked in a step.
        top: k, how many of the best are told apart (an order may have these alone); None: all.
        search: how many lengths of the step are tried, lr, lr * shrink, ..., with one more question a step; 0: none.
        shrink: of each length to the one before.
        source: the name of a method of the module, called with the batch, or a callable (module, batch).

    Raises ValueError where another objective, estimator or number of queries is set as well.
    """

    def __init__(
        self,
        oracle: Oracle | Callable[[list[Any]], Sequence[int]],
        *,
        samples: int = 5,
        top: int | None = None,
        search: int = 0,
        shrink: float = 0.5,
        source: str | Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.estimator = RankSGD(samples, top, search, shrink)
        self.objective = Ranking(oracle, top=top, source=source)

    def configure(self, options: EngineOptions) -> EngineOptions:
        options = super().configure(options)
        given = as_estimator(options.estimator)
        if given not in (SPSA(), self.estimator):
            raise ValueError(
                f"RankingObjective estimates with {self.estimator}, and the estimator is {given}. Leave the estimator (and queries) out; "
                "samples=, top=, search= and shrink= are those of RankingObjective."
            )
        return dataclasses.replace(options, estimator=self.estimator)
