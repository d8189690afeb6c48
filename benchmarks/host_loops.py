"""Steps inside the loops of Lightning and Hugging Face, timed from one request for a batch to the next."""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping
from typing import Any

import lightning
import torch
import transformers
from measure import Contender
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from workload import Workload

from zo_lightning import ZOStrategy
from zo_lightning.hf_integration import ZOConfig, ZOTrainer

EXTRA = 3
"""Steps at both ends of a run that are not counted: hosts look one batch ahead, and the engine looks at the model first."""


class Clocked(Dataset[dict[str, Tensor]]):
    """The same batch again and again; notes when each was asked for."""

    def __init__(self, inputs: Mapping[str, Tensor], count: int) -> None:
        self.inputs, self.count, self.asked = dict(inputs), count, list[float]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.asked.append(time.perf_counter())
        return self.inputs

    def seconds(self) -> list[float]:
        """Of each step that counts."""
        asked = self.asked[2:-1]
        return [after - before for before, after in itertools.pairwise(asked)]


def first(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The dataset's items are batches already."""
    return batch[0]


class Project(lightning.LightningModule):
    """An ordinary module: the loss of the model, and SGD."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Idle(lightning.LightningModule):
    """The same, doing nothing: what Lightning's own loop costs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class IdleTrainer(transformers.Trainer):
    """Hugging Face's loop around a step that does nothing."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


def lightning_loop(workload: Workload, device: str, noise: str | None) -> Contender:
    """Trainer.fit with strategy "zo", or with an idle module where `noise` is None."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def run(count: int) -> list[float]:
        data = Clocked(workload.inputs, count + EXTRA + 1)
        module = Idle() if noise is None else Project(workload.model)
        strategy: Any = "auto" if noise is None else ZOStrategy(noise=noise, safeguard=None)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                strategy=strategy,
                accelerator="gpu" if device.startswith("cuda") else "cpu",
                devices=1,
                max_epochs=1,
                default_root_dir=folder,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, DataLoader(data, batch_size=1, collate_fn=first))
        return data.seconds()

    return run


def hf_loop(workload: Workload, device: str, noise: str | None) -> Contender:
    """ZOTrainer.train, or a transformers.Trainer with an idle step where `noise` is None."""

    def run(count: int) -> list[float]:
        data = Clocked(workload.inputs, count + EXTRA + 1)
        common: dict[str, Any] = {
            "per_device_train_batch_size": 1,
            "num_train_epochs": 1,
            "learning_rate": 1e-6,
            "weight_decay": 0.0,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": not device.startswith("cuda"),
            "dataloader_pin_memory": False,
        }
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer: transformers.Trainer
            if noise is None:
                args = transformers.TrainingArguments(folder, optim="sgd", **common)
                trainer = IdleTrainer(nn.Linear(1, 1), args, data_collator=first, train_dataset=data)
            else:
                config = ZOConfig(folder, zo_noise=noise, zo_safeguard=None, **common)
                trainer = ZOTrainer(workload.model, config, data_collator=first, train_dataset=data)
            for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
                trainer.remove_callback(callback)
            trainer.train()
        return data.seconds()

    return run
