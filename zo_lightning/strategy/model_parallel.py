"""ZOModelParallelStrategy: models that configure_model shards by FSDP2 or tensor parallel, trained by forward passes only."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from zo_lightning.engine.backprop import Backprop
from zo_lightning.engine.estimators import Estimator
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.noise import Noise
from zo_lightning.engine.objectives import Objective
from zo_lightning.engine.optimizer import ZOOptimizer
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.parallel import NOT_SHARDED, Exchange, Mesh, ShardParallel, mesh_of
from zo_lightning.engine.safeguard import Safeguard
from zo_lightning.engine.updates import UpdateRule
from zo_lightning.strategy.forward_only import STATE, ForwardOnly

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ModelParallelStrategy

    class _Host(ModelParallelStrategy):
        pass

else:
    _Host = object

OPTIMIZERS = "optimizers"
"""Where our entry of a sharded checkpoint has the states of the user's optimizers."""


class _PlainStates(_Host):
    """Lightning's checkpoints, with optimizer states as plain as forward-only training leaves them.

    torch.distributed.checkpoint would first make a step of the user's optimizer to have moments, which take twice the memory of the shards.
    """

    _save_distributed_checkpoint: bool

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are restored as with every other strategy."""
        return True

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Parameter groups; there are no moments."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        state: dict[str, Any] = optimizer.state_dict()
        return state if isinstance(optimizer, ZOOptimizer) else {**state, "state": {}}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """The plain states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """The weights in shards, or as a whole; the rest beside them."""
        if self._save_distributed_checkpoint and "optimizer_states" in checkpoint:
            checkpoint.setdefault(STATE, {})[OPTIMIZERS] = checkpoint.pop("optimizer_states")
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The weights go to their shards; returns the rest."""
        from lightning.fabric.strategies.model_parallel import _load_checkpoint

        path = Path(self.broadcast(checkpoint_path))
        module: Any = self.lightning_module
        found = _load_checkpoint(path=path, state={"state_dict": self.model}, strict=module.strict_loading, weights_only=weights_only)
        states = found.get(STATE, {}).pop(OPTIMIZERS, None)
        return found if states is None else {**found, "optimizer_states": states}


class ZOModelParallelStrategy(ForwardOnly, _PlainStates):
    """Forward-only training of a model that configure_model shards: `Trainer(strategy=ZOModelParallelStrategy(...), devices=n)`.

    As with Lightning's ModelParallelStrategy, the LightningModule has a configure_model that calls fully_shard, parallelize_module or both
    with `self.device_mesh["data_parallel"]` and `self.device_mesh["tensor_parallel"]`. Each rank holds and updates its own shards, and
    ranks exchange losses alone beside what the forward passes gather. Steps are those of the whole model, bit for bit where the losses
    are (docs/sharded.md).

    Args: those of `ZOStrategy`, and of Lightning's ModelParallelStrategy data_parallel_size, tensor_parallel_size,
        save_distributed_checkpoint, process_group_backend and timeout.
    """

    strategy_name = "zo_model_parallel"
    host_class = "ModelParallelStrategy"

    def __init__(
        self,
        lr: float | None = None,
        eps: float | None = None,
        seed: int = 0,
        noise: str | Noise = "rademacher",
        estimator: str | Estimator | None = None,
        update: str | UpdateRule = "sgd",
        weights: str = "auto",
        weight_decay: float | None = None,
        dropout: bool = True,
        clip: float | None = None,
        safeguard: str | Safeguard | None = "stop",
        max_nonfinite: int = 20,
        mask: Mask | None = None,
        objective: Objective | None = None,
        parallel: str | Mesh | None = None,
        backprop: str | Backprop | None = None,
        *,
        data_parallel_size: int | str = "auto",
        tensor_parallel_size: int | str = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        method = (noise, estimator, update, weights)
        given = (lr, eps, seed, *method, weight_decay, dropout, clip, safeguard, max_nonfinite, mask, objective, parallel, backprop)
        if parallel is not None and mesh_of(parallel) != Mesh(data=mesh_of(parallel).data):
            raise ValueError(NOT_SHARDED.format(parallel=parallel))
        self.cluster_environment = None
        self.parallel_devices = None
        host = {
            "data_parallel_size": data_parallel_size,
            "tensor_parallel_size": tensor_parallel_size,
            "save_distributed_checkpoint": save_distributed_checkpoint,
            "process_group_backend": process_group_backend,
            "timeout": timeout,
        }
        super().__init__(EngineOptions(*given), host)

    def _zo_exchange(self) -> Exchange:
        return ShardParallel(self.device_mesh["data_parallel"].get_local_rank(), self._timeout or timedelta(minutes=30))

    def _zo_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values
