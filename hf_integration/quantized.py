"""Checkpoints of models whose scales are trained: what is trained, and not the quantized weights, which nothing changes."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Writes `scales.safetensors` and the configuration where `zo_lightning.quantized.train_scales` was called for the model.

    Whether transformers can write the quantized weights depends on who quantized them; a resumed run quantizes them again.
    """

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _trainable(args[0] if args else kwargs.get("model")):
            super().__init__(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not has_scales(self.model):
            super()._save(output_dir, state_dict)
            return
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        own = vars(self.model).get("save_pretrained")
        self.model.save_pretrained = functools.partial(_save_scales, self.model)  # the host calls it, and writes what goes with the model
        try:
            super()._save(str(folder), {})
        finally:
            del self.model.save_pretrained
            if own is not None:
                self.model.save_pretrained = own
        if self.args.should_save and not (folder / FILE).exists():
            save_scales(self.model, folder / FILE)  # of a plain module

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


@contextmanager
def _trainable(model: Any) -> Iterator[None]:
    """The host refuses quantized models without adapters, because no gradient reaches their weights; scales are parameters."""
    refused = isinstance(model, nn.Module) and bool(vars(model).get("is_quantized")) and has_scales(model)
    if refused:
        model.is_quantized = False
    try:
        yield
    finally:
        if refused:
            model.is_quantized = True


def _save_scales(model: Any, folder: str, *, is_main_process: bool = True, **_: Any) -> None:
    if is_main_process:
        save_scales(model, os.path.join(folder, FILE))
        model.config.save_pretrained(folder)
