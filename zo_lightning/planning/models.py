"""A model without values, and a batch for it, out of a transformers configuration."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_lightning.extras import require

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
}
_SUFFIXES = {
    "ForConditionalGeneration": "seq2seq-lm",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "masked-lm",
    "ForPreTraining": "masked-lm",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Planned(NamedTuple):
    """A model in training mode and a batch, on the meta device; what was chosen, in words, and what looks wrong."""

    model: nn.Module
    inputs: dict[str, Tensor]
    task: str
    dtype: torch.dtype
    notes: tuple[str, ...]

    @staticmethod
    def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """One forward pass with its loss."""
        return model(**inputs).loss


def configuration(name: str, changes: Sequence[str] = ()) -> Any:
    """The configuration of a folder, a config.json, a model type of transformers (its defaults) or a model of the hub, with `changes`.

    Raises ValueError where there is none, and for a change "key=value" of a key that it does not have.
    """
    require("hf", "transformers")
    path = Path(name)
    if not path.exists() and (name.endswith(".json") or path.is_absolute() or name.startswith(".")):
        raise ValueError(f"There is no {name}. Name a folder with config.json, a config.json, a model type such as 'opt', or a hub model.")
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"There is no config.json in {name}.")
    try:
        config = _named(name, {})
        given = {key: _fitting(config, key, _literal(value)) for key, value in (_change(config, change) for change in changes)}
        return _named(name, given) if given else config
    except ValueError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"{name} has no configuration" if path.exists() else f"{name!r} is no model type, and no model of the hub that was reached,"
        raise ValueError(f"{what} that transformers knows: {first[:200]}") from error


def _named(name: str, changes: Mapping[str, Any]) -> Any:
    """With the changes made before anything is derived from what they change."""
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if Path(name).exists() or name not in CONFIG_MAPPING_NAMES:
        stored, _ = PretrainedConfig.get_config_dict(name)
        if stored.get("model_type") not in CONFIG_MAPPING_NAMES:
            raise KeyError(f"its model_type is {stored.get('model_type')!r}")
        return AutoConfig.for_model(**{**stored, **changes})
    return AutoConfig.for_model(name, **changes)


def _fitting(config: Any, key: str, value: Any) -> Any:
    """A value of the type that is there now."""
    now = getattr(config, key)
    if isinstance(now, int) and not isinstance(now, bool) and not isinstance(value, int):
        raise ValueError(f"--set {key}={value}: it is a whole number, {now} now.")
    if isinstance(now, int) and now > 0 and value < 0:
        raise ValueError(f"--set {key}={value}: it must not be negative; it is {now} now.")
    return value


def _change(config: Any, change: str) -> tuple[str, str]:
    key, _, value = change.partition("=")
    if not value or not hasattr(config, key):
        raise ValueError(f"--set {change}: {type(config).__name__} has no {key!r}, or no value was given; write KEY=VALUE.")
    return key, value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build(config: Any, batch: int, length: int, task: str | None = None, dtype: torch.dtype | None = None, padded: bool = False) -> Planned:
    """The model of a configuration on the meta device, and a batch of `batch` rows of `length` tokens (images have the size of `config`).

    `padded` gives text batches an attention mask. `dtype` None is that of `config`, else float32. Raises ValueError for sizes below 1, and
    where transformers has no model for the task.
    """
    import transformers

    for option, value in (("--batch", batch), ("--length", length)):
        if value < 1:
            raise ValueError(f"{option} {value}: must be at least 1.")
    task = task or _task_of(config)
    dtype = dtype or _dtype_of(config)
    if task == "seq2seq-lm" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0  # checkpoints have one, default configurations may not; its value changes no size
    try:
        with torch.device("meta"):
            model = getattr(transformers, TASKS[task]).from_config(config, dtype=dtype).train()
    except Exception as error:  # whatever a model makes of a configuration that nobody has tried
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"transformers can't make a {task} model of this {type(config).__name__}: {first}. Choose another --task."
        ) from error
    notes = [f"{type(model).__name__} for {task} in {str(dtype)[6:]}, in training mode; vary it with --task, --dtype, --set"]
    longest = getattr(config, "max_position_embeddings", None)
    if task != "image-classification" and isinstance(longest, int) and longest < length:
        notes.append(f"length {length} is above the configuration's max_position_embeddings, {longest}: a run may fail")
    return Planned(model, _batch(model, config, task, batch, length, padded), task, dtype, tuple(notes))


def _task_of(config: Any) -> str:
    """What its architecture is for; without one what models of its type are made for in the first place."""
    from transformers.models.auto import modeling_auto as known

    for architecture in config.architectures or ():
        for suffix, task in _SUFFIXES.items():
            if architecture.endswith(suffix):
                return task if task != "seq2seq-lm" or config.is_encoder_decoder else "causal-lm"
    kind = config.model_type
    if config.is_encoder_decoder and kind in known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "seq2seq-lm"
    if kind in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked-lm"
    if kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal-lm"
    if kind in known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "image-classification"
    return "classification"


def _dtype_of(config: Any) -> torch.dtype:
    found = getattr(config, "dtype", None)
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else torch.float32


def _batch(model: nn.Module, config: Any, task: str, batch: int, length: int, padded: bool) -> dict[str, Tensor]:
    def ids(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.long, device="meta")

    if task == "image-classification":
        side = getattr(config, "image_size", 224)
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        shape = (batch, int(getattr(config, "num_channels", 3)), int(height), int(width))
        return {"pixel_values": torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta"), "labels": ids(batch)}
    inputs = {"input_ids": ids(batch, length)}
    if padded:
        inputs["attention_mask"] = ids(batch, length)
    if task == "question-answering":
        return {**inputs, "start_positions": ids(batch), "end_positions": ids(batch)}
    return {**inputs, "labels": ids(batch) if task == "classification" else ids(batch, length)}


def quiet() -> None:
    """transformers says errors alone. ModuleNotFoundError where it is not installed."""
    require("hf", "transformers")
    from transformers.utils import logging

    logging.set_verbosity_error()
