"""ZOConfig: TrainingArguments with the forward-only options, for Python and for the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from zo_lightning.hf_integration.optim_name import NAME
from zo_lightning.hf_integration.options import engine_options


@dataclass
class ZOArguments:
    """The forward-only fields, to stand in front of any TrainingArguments class.

    ``ZOConfig`` puts them before ``TrainingArguments``; ``class ZOSFTConfig(ZOArguments, trl.SFTConfig)`` works alike.
    Names and defaults are those of ``ZOOptimizer`` with ``zo_`` in front. A value that is out of range, or a name that
    is not known, raises ``ValueError`` here, before any model is built.
    """

    optim: OptimizerNames | str = field(
        default=NAME, metadata={"help": "The optimizer. 'zo' trains with forward passes only; any other first-order."}
    )
    zo_lr: float | None = field(default=None, metadata={"help": "Learning rate of the forward-only update; None takes learning_rate."})
    zo_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the forward-only update; None takes weight_decay."}
    )
    zo_eps: float | None = field(
        default=None, metadata={"help": "How far the weights are moved to both sides; None is what suits what is trained (LoRA, a prefix)."}
    )
    zo_seed: int = field(default=0, metadata={"help": "Seed of the directions; independent of seed and data_seed."})
    zo_noise: str = field(
        default="rademacher",
        metadata={"help": "Distribution of the directions: rademacher, gaussian, sphere, low_rank(rank=2, refresh=50)."},
    )
    zo_estimator: str = field(
        default="spsa",
        metadata={
            "help": "How the gradient is estimated: spsa, one_sided, curvature, forward_gradient, conservative, svrg, rank_sgd, "
            "coordinatewise."
        },
    )
    zo_queries: int = field(
        default=1, metadata={"help": "Directions measured per step; two forward passes each, one with one_sided, four with svrg."}
    )
    zo_fitness: str = field(
        default="values",
        metadata={"help": "What the losses of a step are made into before the estimate: values (themselves), ranks or z-scores."},
    )
    zo_update: str = field(default="sgd", metadata={"help": "What an estimate does to the weights: sgd, sign, momentum, adam, hizoo."})
    zo_weights: str = field(
        default="auto", metadata={"help": "How perturbed weights come to exist: exact, copy, inplace, batched or auto."}
    )
    zo_dropout: bool = field(default=True, metadata={"help": "False switches the Dropout modules off while the loss is measured."})
    zo_clip: float | None = field(default=None, metadata={"help": "Limit of the projected gradient's absolute value; None does not clip."})
    zo_safeguard: str | None = field(
        default="stop", metadata={"help": "What to do when the loss diverges: stop, halve (the step), or none."}
    )
    zo_parallel: str | None = field(
        default=None,
        metadata={"help": "How processes share the work: data=4, perturbation=2, data=4,perturbation=2 or seeds=4; None is data."},
    )
    zo_backprop: str | None = field(
        default=None,
        metadata={"help": "Patterns of names, with spaces between them ('classifier* *.layer.11.*'): trained by backpropagation."},
    )
    zo_backprop_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of what zo_backprop names, by AdamW; None is 1e-4."}
    )
    zo_max_nonfinite: int = field(default=20, metadata={"help": "Consecutive steps with a non-finite loss, each skipped, before an error."})

    def __post_init__(self) -> None:
        """Validate the forward-only options (ValueError), then everything else."""
        engine_options(self)
        host = getattr(super(), "__post_init__", None)
        if host is not None:
            host()

    def to_dict(self) -> dict[str, Any]:
        """The host's, with options that are objects as their text: what its loggers and model cards write is JSON."""
        found: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        plain = (str, bool, int, float, type(None))
        return {name: repr(value) if name.startswith("zo_") and not isinstance(value, plain) else value for name, value in found.items()}


@dataclass
class ZOConfig(ZOArguments, TrainingArguments):
    """``TrainingArguments`` whose ``optim`` is "zo" by default, with the options of ``ZOArguments``.

    ``ZOConfig(optim="adamw_torch")`` tells a ``ZOTrainer`` to train first-order.
    """
