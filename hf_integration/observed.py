"""What an objective sees of the Trainer's evaluation: the predictions and labels that compute_metrics would get."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import EvalPrediction
from transformers.models.auto import modeling_auto
from transformers.trainer_pt_utils import nested_concat, nested_numpify

from zo_lightning.engine.objectives import Objective, Score, is_hosts, number, restored
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.undo import undoing

_CAUSAL = frozenset(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_CAUSAL |= frozenset(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()) | {"GPT2DoubleHeadsModel"}
_UNSHIFTED = frozenset(
    "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart speech_to_text_2 trocr whisper xlnet".split()
)
"""model_type of those whose loss takes labels as they are: they belong to the same position."""


@contextmanager
def observed(trainer: Any, inputs: Mapping[str, Any], objective: Objective) -> Iterator[Callable[[Any], dict[str, Any]]]:
    """Inside it, a function from a loss to {"loss", "preds", "target"} of the evaluation that made it.

    The Trainer's compute_loss is asked for its outputs as well, whoever has overridden it. An objective that asks the model itself gets the
    loss alone.
    """
    if getattr(objective, "source", None) is not None:
        yield lambda loss: {"loss": loss}
        return
    seen: list[Any] = []
    compute_loss = trainer.compute_loss

    def asked(model: Any, batch: Any, return_outputs: bool = False, **how: Any) -> Any:
        found = compute_loss(model, batch, return_outputs=True, **how)
        if not (isinstance(found, tuple) and len(found) == 2):
            raise ValueError(
                f"{type(trainer).__name__}.compute_loss(return_outputs=True) returned {type(found).__name__}, not (loss, outputs), which "
                "an objective needs. Let it do so, or give the objective a source=callable(model, batch)."
            )
        seen[:] = [found[1]]
        return found if return_outputs else found[0]

    def read(loss: Any) -> dict[str, Any]:
        if not seen:
            raise ValueError(
                f"{type(trainer).__name__}.training_step did not call compute_loss, from which an objective gets its predictions. Give the "
                "objective a source=callable(model, batch)."
            )
        outputs, labels = seen.pop(), _labels(trainer, inputs)
        if isinstance(objective, TrainerScore):
            return {"loss": loss, "preds": _all(trainer.model, outputs), "target": labels}
        if not objective.needs_target:
            return {"loss": loss, "preds": _predictions(trainer.model, outputs)}
        if labels is None:
            raise ValueError(
                f"{objective.name} needs labels: the batch has {', '.join(map(repr, inputs))}, and label_names={trainer.label_names}. "
                "Say TrainingArguments(label_names=[...]), or give the objective a source=callable(model, batch)."
            )
        return {"loss": loss, **_aligned(trainer.model, _predictions(trainer.model, outputs), labels, getattr(objective, "shift", None))}

    with undoing() as undo:
        undo.bind(trainer, compute_loss=asked)
        yield read


def _predictions(model: Any, outputs: Any) -> Any:
    """The logits where there are any: hidden states and the like are nobody's prediction."""
    if isinstance(outputs, Mapping) and isinstance(outputs.get("logits"), torch.Tensor):
        return outputs["logits"]
    return _all(model, outputs)


def _all(model: Any, outputs: Any) -> Any:
    """As the Trainer's prediction_step has them: everything but the loss and what the configuration leaves out."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        left_out = {"loss", *(getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", None) or ())}
        found = tuple(value for name, value in outputs.items() if name not in left_out)
    else:
        begins_with_loss = isinstance(outputs[0], torch.Tensor) and outputs[0].dim() == 0
        found = tuple(outputs[1:] if begins_with_loss else outputs)
    return found[0] if len(found) == 1 else found


def _labels(trainer: Any, inputs: Mapping[str, Any]) -> Any:
    found = tuple(inputs[name] for name in trainer.label_names if inputs.get(name) is not None)
    return found[0] if len(found) == 1 else found or None


def _aligned(model: Any, preds: Any, labels: Any, shift: bool | None) -> dict[str, Any]:
    """Logits of a causal language model belong to the next token."""
    sequences = isinstance(preds, torch.Tensor) and isinstance(labels, torch.Tensor) and labels.dim() == 2 and preds.dim() == 3
    if sequences and (is_causal(model) if shift is None else shift):
        width = min(preds.shape[1], labels.shape[1])  # virtual tokens come out in front
        preds, labels = preds[:, -width:][:, :-1], labels[:, -width:][:, 1:]
    return {"preds": preds, "target": labels}


def is_causal(model: Any) -> bool:
    """Whether it is a language model whose loss shifts its labels: it, what it is compiled of, or what an adapter is on."""
    base = getattr(model, "_orig_mod", model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    if getattr(getattr(base, "config", None), "model_type", None) in _UNSHIFTED:
        return False
    return any(kind.__name__ in _CAUSAL for kind in type(base).__mro__)


class TrainerScore(Score):
    """The Trainer's own compute_metrics, from the predictions of the whole step, joined as its evaluation joins them."""

    def __init__(self, of: Score, trainer: Any) -> None:
        if trainer.compute_metrics is None:
            raise ValueError('MetricObjective("compute_metrics") takes the Trainer\'s, which has none. Pass Trainer(compute_metrics=...).')
        for option in ("batch_eval_metrics", "include_for_metrics"):
            if getattr(trainer.args, option, None):
                raise ValueError(
                    f"{option}={getattr(trainer.args, option)!r} changes how compute_metrics is called, which MetricObjective("
                    f'"compute_metrics") does not do. Leave {option} out, or give the objective a metric of its own.'
                )
        super().__init__(
            trainer.compute_metrics,
            key=of.key,
            maximize=of.maximize,
            source=of.source,
            preprocess=of.preprocess or _shrunk(trainer),
            ignore_index=None,
            loss_weight=of.loss_weight,
            weight=of.weight,
        )

    def score(self, samples: Sequence[tuple[Any, Any]]) -> float:
        preds, target = restored(samples[0])
        for more, labels in map(restored, samples[1:]):
            preds, target = nested_concat(preds, more), nested_concat(target, labels)
        result = self.metric(EvalPrediction(predictions=nested_numpify(preds), label_ids=nested_numpify(target)))
        return number(self._chosen(result), self.name)


def _shrunk(trainer: Any) -> Callable[[Any, Any], tuple[Any, Any]] | None:
    shrink = trainer.preprocess_logits_for_metrics
    return None if shrink is None else lambda preds, target: (shrink(preds, target), target)


def with_trainers_metrics(options: EngineOptions, trainer: Any) -> EngineOptions:
    """The options with the Trainer's compute_metrics where the objective is to be that."""
    objective = options.objective
    if isinstance(objective, Score) and is_hosts(objective.metric):
        return dataclasses.replace(options, objective=TrainerScore(objective, trainer))
    return options
