"""Small LightningModules, data and trainers for the Lightning tests, in either namespace."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zo_lightning  # noqa: F401  registers "zo" and "zo_ddp"
from zo_lightning.callbacks import Run, ZOCallback
from zo_lightning.engine import StepReport, ZOWarning

NAMES = ("lightning.pytorch", "pytorch_lightning")

HOST_WARNINGS = [
    r"ignore:The '(train|val)_dataloader' does not have many workers",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"ignore:You're resuming from a checkpoint that ended before the epoch ended",
    r"ignore:Checkpoint directory .* exists and is not empty",
    r"ignore:The number of training batches .* is smaller than the logging interval",
    r"ignore:lr=.* SGD's, from configure_optimizers:zo_lightning.engine.messages.ZOWarning",
]
"""What Lightning says about any small run, and what we say of every optimizer whose lr is taken."""

_classes: dict[str, Any] = {}


def lightning(name: str = NAMES[0]) -> Any:
    """The namespace called `name`."""
    return import_module(name)


def wrapped(model: Any, lr: float = 1e-3) -> Any:
    """A LightningModule around a model of transformers, which trains whatever of it is not frozen."""

    class Wrapped(lightning().LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=lr)

    return Wrapped()


def net(dtype: torch.dtype = torch.float32, dropout: float = 0.1) -> nn.Sequential:
    """A network with blocks, a normalisation with buffers, and dropout; equal weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)]
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sequential(*blocks), nn.Linear(8, 1)).to(dtype)


def rows(count: int = 64, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """A regression problem; the first input of a row is its number."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(count, 6, generator=draw, dtype=dtype)
    y = torch.sin(x.sum(1, keepdim=True))
    x[:, 0] = torch.arange(count)
    return TensorDataset(x, y)


def loader(batch_size: int = 8, count: int = 64, dtype: torch.dtype = torch.float32, **options: Any) -> DataLoader[Any]:
    """A plain DataLoader over `rows`."""
    return DataLoader(rows(count, dtype), batch_size, **options)


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Mean squared error; the number of the row is scaled down."""
    x, y = batch
    scale = torch.ones(6, dtype=x.dtype)
    scale[0] = 0.01
    return nn.functional.mse_loss(model(x * scale), y)


def lit(name: str = NAMES[0]) -> Any:
    """The LightningModule of these tests in a namespace."""
    if name not in _classes:
        _classes[name] = _make(lightning(name))
    return _classes[name]


def _make(pl: Any) -> Any:
    class Lit(pl.LightningModule):
        """`configure` makes what configure_optimizers returns from the parameters."""

        def __init__(self, model: nn.Module | None = None, configure: Callable[[Any], Any] | None = None) -> None:
            super().__init__()
            self.net = net() if model is None else model
            self.configure = configure or (lambda module: torch.optim.SGD(module.parameters(), lr=0.01))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss_of(self.net, batch)

        def configure_optimizers(self) -> Any:
            return self.configure(self)

    return Lit


def trainer(tmp_path: Path, name: str = NAMES[0], **options: Any) -> Any:
    """A quiet Trainer with strategy "zo" on one CPU."""
    defaults = {
        "strategy": "zo",
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return lightning(name).Trainer(**{**defaults, **options})


class Recorder(ZOCallback):
    """Keeps the reports of a run, and what was called."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.events: list[str] = []

    def on_run_start(self, run: Run) -> None:
        self.events.append("start")

    def on_zo_step(self, run: Run, report: StepReport) -> None:
        self.reports.append(report)

    def on_run_end(self, run: Run) -> None:
        self.events.append("end")

    _legacy_state_key = "TEMPORARY"

    @property
    def values(self) -> list[tuple[float, ...]]:
        """The losses at the points of every step."""
        return [report.values for report in self.reports]


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def said(record: Any) -> list[str]:
    """The texts of our own warnings in a recording."""
    return [str(entry.message) for entry in record if issubclass(entry.category, ZOWarning)]
