"""The trainers themselves, which take `peft_config`: adapters on the model before the host sees it, as trl's trainers have it."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import transformers

from zo_lightning.hf_integration.trainer import ZOTrainerMixin


class AdapterMixin(ZOTrainerMixin):
    """Takes `peft_config`, a configuration of peft, and trains an adapter of that kind on the model.

    Raises ValueError for a model that has adapters already, and where peft finds no module for it; ModuleNotFoundError without peft.
    """

    def __init__(self, *args: Any, peft_config: Any = None, **kwargs: Any) -> None:
        if peft_config is not None:
            if args:
                args = (_adapted(args[0], peft_config), *args[1:])
            elif kwargs.get("model") is not None:
                kwargs["model"] = _adapted(kwargs["model"], peft_config)
            elif kwargs.get("model_init") is not None:
                kwargs["model_init"] = _adapting(kwargs["model_init"], peft_config)
        super().__init__(*args, **kwargs)


class ZOTrainer(AdapterMixin, transformers.Trainer):
    """``transformers.Trainer`` that trains forward-only."""


class ZOSeq2SeqTrainer(AdapterMixin, transformers.Seq2SeqTrainer):
    """``transformers.Seq2SeqTrainer`` that trains forward-only."""


def _adapted(model: Any, config: Any) -> Any:
    if find_spec("peft") is None:
        raise ModuleNotFoundError("peft_config= needs peft: pip install peft", name="peft")
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError(
            f"peft_config={type(config).__name__}(...) for a model that has adapters already ({', '.join(model.peft_config)}): they are "
            "trained as they are. Leave peft_config out, or pass the model without them."
        )
    return get_peft_model(model, config)


def _adapting(model_init: Any, config: Any) -> Any:
    @functools.wraps(model_init)  # the host looks at the signature
    def adapted(*args: Any) -> Any:
        return _adapted(model_init(*args), config)

    return adapted
