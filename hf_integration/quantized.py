"""Checkpoints of models whose scales are trained: what is trained, and not the quantized weights, which nothing changes."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn

from zo_lightning.quantized import has_scales, load_scales, save_scales

if TYPE_CHECKING:
    _Host = transformers.Trainer
else:
    _Host = object

FILE = "scales.safetensors"


class QuantizedMixin(_Host):
    """Writes `scales.safetensors` and the configuration where scales are trained (`zo_lightning.quantized.train_scales`), adapters as well.

    Whether transformers can write the quantized weights depends on who quantized them; a resumed run quantizes them again.
    """

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._zo_claimed: list[Any] = []
        _claim(args[0] if args else kwargs.get("model"), self._zo_claimed)
        try:
            super().__init__(*args, **kwargs)
        finally:
            for model in self._zo_claimed:
                model.is_quantized = True

    def call_model_init(self, trial: Any = None) -> Any:
        """The host's; while it is made, it refuses quantized models without adapters, because no gradient reaches their weights."""
        model = super().call_model_init(trial)
        if not hasattr(self, "model"):
            _claim(model, self._zo_claimed)
        return model

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not has_scales(self.model):
            super()._save(output_dir, state_dict)
            return
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        own = vars(self.model).get("save_pretrained")
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        if not hasattr(self.model, "peft_config"):  # which saves adapters alone
            self.model.save_pretrained = functools.partial(_save_configuration, self.model)
        try:
            super()._save(str(folder), None if hasattr(self.model, "peft_config") else trained)
        finally:
            vars(self.model).pop("save_pretrained", None)
            if own is not None:
                self.model.save_pretrained = own
        if self.args.should_save:
            save_scales(self.model, folder / FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if os.path.isfile(os.path.join(resume_from_checkpoint, FILE)):
            load_scales(self.model if model is None else model, os.path.join(resume_from_checkpoint, FILE))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        path = os.path.join(self.state.best_model_checkpoint or "", FILE)
        if os.path.isfile(path):
            load_scales(self.model, path)
        else:
            super()._load_best_model()


def _claim(model: Any, claimed: list[Any]) -> None:
    """Let the host take a quantized model whose scales are parameters."""
    if isinstance(model, nn.Module) and vars(model).get("is_quantized") and has_scales(model):
        claimed.append(model)
        claimed[-1].is_quantized = False


def _save_configuration(model: Any, folder: str, *, is_main_process: bool = True, **_: Any) -> None:
    if is_main_process and hasattr(model, "config"):
        model.config.save_pretrained(folder)
