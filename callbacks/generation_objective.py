"""GenerationObjective: train on the texts that a model writes, by any metric or reward of them, under either host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zo_lightning.callbacks.metric_objective import OfObjective
from zo_lightning.engine.objectives import Scheduled
from zo_lightning.engine.objectives.generation import Generated, Reward


class GenerationObjective(OfObjective):
    """Maximises a metric, or rewards, of generated texts: value = loss_weight * loss - weight * score, and by default no loss at all.

    At each point of a step the model generates, in one batch, an answer to every prompt; sampling draws the same random numbers at all
    points. The score is computed once a point from the texts of all micro-batches and processes. The training step is only run where the
    loss counts. Logs what `MetricObjective` logs.

    Prompts are the batch's "input_ids" (of a decoder: up to the first token with a label), references its "labels", decoded. Rewards of
    several queries are standardised by `SPSA(queries=8, fitness="z-scores")`, as in evolution strategies and GRPO.

    Args:
        metric: "exact_match", "f1" (of words, as in SQuAD), a callable (completions, references) -> number, or a torchmetrics Metric of
            texts with `key` for an entry of its dict; None with rewards.
        tokenizer: decodes, and pads prompts on the left.
        generation_config: a GenerationConfig or a mapping of its options; greedy unless it says do_sample.
        max_new_tokens: tokens of a completion, where the configuration says nothing of lengths.
        references: the key of the batch that holds them: ids or texts.
        rewards: functions (prompts, completions, batch) -> a number for each completion. reward_weights: of each, 1 by default.
        maximize, loss_weight, weight: as in `MetricObjective`.

    Raises TypeError or ValueError for arguments that are something else, and for a configuration whose draws can't be shared. MeZO on
    SQuAD's F1: arXiv 2305.17333; rewards by evolution strategies: arXiv 2509.24372.
    """

    def __init__(
        self,
        metric: Any = None,
        tokenizer: Any = None,
        generation_config: Any = None,
        *,
        key: str | int | None = None,
        maximize: bool | None = None,
        max_new_tokens: int = 32,
        references: str = "labels",
        rewards: Reward | Sequence[Reward] = (),
        reward_weights: Sequence[float] | None = None,
        loss_weight: Scheduled = 0.0,
        weight: Scheduled = 1.0,
    ) -> None:
        super().__init__()
        self.objective = Generated(
            metric,
            tokenizer,
            generation_config,
            key=key,
            maximize=maximize,
            max_new_tokens=max_new_tokens,
            references=references,
            rewards=rewards,
            reward_weights=reward_weights,
            loss_weight=loss_weight,
            weight=weight,
        )
