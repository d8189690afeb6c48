"""Models that accelerate shards by FSDP2: the engine follows to the sharded parameters, and checkpoints have its plain state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.trainer as upstream
from transformers.trainer import OPTIMIZER_NAME

from zo_lightning.callbacks.base import engine_of
from zo_lightning.engine.messages import say_once
from zo_lightning.engine.undo import undoing


def check_sharding(trainer: Any) -> None:
    """Raise ``ValueError`` for FSDP 1, whose flat parameters are no parts of the model's; say where accelerate shards nothing."""
    if getattr(trainer.args, "fsdp", None) and not trainer.is_fsdp_enabled:
        say_once(
            "hf.fsdp",
            "fsdp is set, but accelerate shards no model here (it does so for several processes with accelerators): every process has all "
            "weights.",
        )
    if trainer.is_fsdp_enabled and not getattr(trainer.accelerator, "is_fsdp2", False):
        raise ValueError(
            "optim='zo' trains models that FSDP2 shards, and this is FSDP 1, which flattens parameters into one. Use "
            "fsdp_config={'version': 2} (or fsdp_version: 2 in accelerate's configuration)."
        )


class ShardedMixin:
    """What the trainer does under FSDP2 beside what it does anyway."""

    accelerator: Any
    is_fsdp_enabled: bool
    _zo: bool

    def _zo_follow(self, prepare: Any, *args: Any, **kwargs: Any) -> Any:
        """accelerate's ``prepare``, which shards the model and gives the optimizer other parameters: they keep their names."""
        result = prepare(*args, **kwargs)
        for one in result if isinstance(result, (tuple, list)) else (result,):
            engine = engine_of(one)
            if engine is not None:
                engine.parameters_replaced()
        return result

    @contextmanager
    def _zo_optimizer_files(self) -> Iterator[None]:
        """Inside it, the host's functions for optimizers under FSDP write and read plain states.

        Its own make a step of the optimizer first, to have moments to shard; there are none.
        """
        if not (self._zo and self.is_fsdp_enabled):
            yield
            return

        def save(plugin: Any, accelerator: Any, optimizer: Any, model: Any, folder: str, *args: Any, **kwargs: Any) -> None:
            state = optimizer.state_dict()  # gathered, by all ranks
            if accelerator.is_main_process:
                torch.save(state, Path(folder) / OPTIMIZER_NAME)
            accelerator.wait_for_everyone()

        def load(plugin: Any, accelerator: Any, optimizer: Any, model: Any, folder: str, *args: Any, **kwargs: Any) -> None:
            optimizer.load_state_dict(torch.load(Path(folder) / OPTIMIZER_NAME, map_location="cpu", weights_only=True))

        with undoing() as undo:
            undo.bind(upstream, save_fsdp_optimizer=save, load_fsdp_optimizer=load)
            yield

    def _save_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        """The host's, with plain states of the optimizer."""
        with self._zo_optimizer_files():
            super()._save_optimizer_and_scheduler(*args, **kwargs)  # type: ignore[misc]  # upstream: of the Trainer
