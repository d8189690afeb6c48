"""ZOStrategy for one device and ZODDPStrategy for data parallel processes."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from zo_lightning.engine.backprop import Backprop
from zo_lightning.engine.estimators import Estimator
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.noise import Noise
from zo_lightning.engine.objectives import Objective
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.parallel import UNSET, Exchange, Mesh, Processes, as_mesh, broadcast_parameters
from zo_lightning.engine.residency import Batched
from zo_lightning.engine.safeguard import Safeguard
from zo_lightning.engine.updates import UpdateRule
from zo_lightning.strategy.forward_only import ForwardOnly

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
else:
    DDPStrategy = SingleDeviceStrategy = object  # the Trainer's namespace provides the real one (namespace.py)


class ZOStrategy(ForwardOnly, SingleDeviceStrategy):
    """Forward-only training on one device: `Trainer(strategy="zo")`, in lightning.pytorch and in pytorch_lightning.

    Args:
        lr: learning rate; None takes that of the optimizer of configure_optimizers at each step. A number replaces it, and the user's
            LR scheduler goes on scaling it from its own start (OneCycleLR begins at a 25th of its peak).
        weight_decay: decoupled; None takes the optimizer's.
        eps: perturbation scale; None is what suits what is trained (`ZOOptimizer`). seed: of the run.
        noise: "rademacher", "gaussian", "sphere", "low_rank", or a `Noise`. estimator: an `Estimator`; None is SPSA(queries=1).
        update: "sgd", "sign", "momentum", "adam", or an `UpdateRule`: what the estimate does to the weights.
        weights: "exact", "copy", "inplace", "batched" or "auto", or a `Batched`. dropout: False switches Dropout modules off.
        clip: bound on the absolute projected gradient. safeguard: "stop", "halve", "warn", None or a `Safeguard`.
        max_nonfinite: steps with a non-finite loss in a row before FloatingPointError.
        mask: which weights are trained (`engine.masks.Mask`); the callback SparseMask sets it, too.
        objective: what is minimised instead of the loss (`engine.objectives.Objective`); the callback MetricObjective sets it, too.
        parallel: how several processes share the work; with one device there is nothing to share (strategy="zo_ddp").
        backprop: patterns of the names of the last layers, or an `engine.Backprop`: backpropagation for them, forward-only for the rest.
        device: None takes the Trainer's. accelerator, checkpoint_io, precision_plugin: as for Lightning's own strategies.

    Raises ValueError for options out of range, and Lightning's MisconfigurationException for what can't be trained by forward passes:
    manual optimization, several optimizers, LBFGS, `dataloader_iter`, several devices.
    """

    strategy_name = "zo"
    host_class = "SingleDeviceStrategy"

    def __init__(
        self,
        lr: float | None = None,
        eps: float | None = None,
        seed: int = 0,
        noise: str | Noise = "rademacher",
        estimator: str | Estimator | None = None,
        update: str | UpdateRule = "sgd",
        weights: str | Batched = "auto",
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
        device: torch.device | str | None = None,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        method = (noise, estimator, update, weights)
        given = (lr, eps, seed, *method, weight_decay, dropout, clip, safeguard, max_nonfinite, mask, objective, parallel, backprop)
        options = EngineOptions(*given)
        host = {"accelerator": accelerator, "checkpoint_io": checkpoint_io, "precision_plugin": precision_plugin}
        as_mesh(parallel, 1)
        self._zo_device = None if device is None else torch.device(device)
        super().__init__(options, host if device is None else {**host, "device": self._zo_device})

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The device of the constructor; None lets the Trainer hand over its own (a strategy made by name would stay on the CPU)."""
        return None if self._zo_device is None else [self._zo_device]

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices and len(devices) > 1:
            raise self.namespace.misconfiguration(
                f'strategy="zo" drives one device, and the Trainer has {len(devices)}. Use Trainer(devices=1), or strategy="zo_ddp".'
            )
        if devices:
            self._root_device = devices[0]

    @property
    def num_nodes(self) -> int:
        """One."""
        return 1

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        if num_nodes > 1:
            raise self.namespace.misconfiguration(
                f'strategy="zo" drives one device, and Trainer(num_nodes={num_nodes}). Use num_nodes=1, or strategy="zo_ddp".'
            )


class ZODDPStrategy(ForwardOnly, DDPStrategy):
    """Forward-only training on several processes: `Trainer(strategy="zo_ddp", devices=n)`; ranks exchange losses, never gradients.

    Every rank has the same perturbation and its own data; an update averages the losses over the ranks once, in float64. With
    `parallel="perturbation=2"` (a `Mesh`) ranks share out the points of a step on the same data instead, or have queries of their own.
    There is no DDP wrapper: the weights of rank 0 are broadcast at the start, and its buffers before each validation.

    Args: those of `ZOStrategy`, and of Lightning's DDPStrategy process_group_backend, timeout, start_method and cluster_environment.
    """

    strategy_name = "zo_ddp"
    host_class = "DDPStrategy"

    def __init__(
        self,
        lr: float | None = None,
        eps: float | None = None,
        seed: int = 0,
        noise: str | Noise = "rademacher",
        estimator: str | Estimator | None = None,
        update: str | UpdateRule = "sgd",
        weights: str | Batched = "auto",
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
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: str = "popen",
        cluster_environment: Any = None,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        method = (noise, estimator, update, weights)
        given = (lr, eps, seed, *method, weight_decay, dropout, clip, safeguard, max_nonfinite, mask, objective, parallel, backprop)
        options = EngineOptions(*given)
        self.cluster_environment = cluster_environment
        host = {
            "accelerator": accelerator,
            "cluster_environment": cluster_environment,
            "checkpoint_io": checkpoint_io,
            "precision_plugin": precision_plugin,
            "process_group_backend": process_group_backend,
            "timeout": timeout,
            "start_method": start_method,
        }
        super().__init__(options, host)

    def configure_ddp(self) -> None:
        """Equal weights and buffers on all ranks; the wrapper would hold a full set of gradient buckets."""
        broadcast_parameters([*self.model.parameters(), *self.model.buffers()])

    def on_validation_start(self) -> None:
        """Validate, and save, with the buffers of rank 0."""
        super().on_validation_start()
        if self.zo_optimizer is not None:
            broadcast_parameters(list(self.model.buffers()))

    def _zo_exchange(self) -> Exchange:
        exchange = Processes(self._zo_options.parallel, timeout=self._timeout or timedelta(minutes=30))
        if self._zo_options.parallel is None:
            self._zo_say("lightning.parallel", UNSET.format(world=exchange.world_size, option="ZODDPStrategy(parallel=...)"))
        return exchange

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Processes that share the points of a step have the same data."""
        mesh = as_mesh(self._zo_options.parallel, self.world_size)
        return {"num_replicas": mesh.streams, "rank": mesh.stream(self.global_rank)}

    def _zo_gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values
