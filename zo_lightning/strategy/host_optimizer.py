"""The optimizer of configure_optimizers: schedulers and groups live on it, the engine takes its lr and weight_decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from zo_lightning.engine.optimizer import ZOOptimizer
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.report import StepReport
from zo_lightning.strategy.namespace import Namespace

_NOT_IDLE = {"params", "lr", "weight_decay", "initial_lr", "decoupled_weight_decay", "maximize"}
_HOW = {"foreach", "fused", "capturable", "differentiable"}
"""Defaults of torch optimizers that say how a step is computed, not what it is."""


class HostOptimizer:
    """Builds the engine from the groups of the user's optimizer and keeps both in step.

    lr of a group: the user's optimizer's at each step, or, where the strategy has `lr=`, that times what the scheduler made of the user's
    (group lr over its initial lr). The user's optimizer itself makes steps without gradients, so that schedulers and step hooks see them.
    """

    def __init__(self, optimizer: Any, options: EngineOptions, module: nn.Module, ns: Namespace) -> None:
        self.optimizer = optimizer
        self._options = options
        self._has_groups = type(optimizer) is not ns.get("core.optimizer", "_MockOptimizer")
        self._base: list[float] = []
        if isinstance(optimizer, ZOOptimizer):
            self._own(optimizer, options, module, ns)
            self.engine = optimizer
            return
        self._check(ns)
        groups = [self._group(group) for group in optimizer.param_groups] if self._has_groups else [{"params": list(module.parameters())}]
        self.engine = options.build(groups, module=module)
        self.sync()

    def _own(self, engine: ZOOptimizer, options: EngineOptions, module: nn.Module, ns: Namespace) -> None:
        """configure_optimizers returned the engine itself; it has its own options."""
        if engine.module is not module:
            raise ns.misconfiguration(
                "configure_optimizers returned a ZOOptimizer that doesn't know the LightningModule. Return ZOOptimizer(self, ...), or "
                "ZOOptimizer(groups, module=self, ...)."
            )
        if options != EngineOptions(seed=options.seed):
            raise ns.misconfiguration(
                "configure_optimizers returned a ZOOptimizer, and the strategy or a callback has options for another one. Set them on the "
                "ZOOptimizer, or return an optimizer of torch.optim."
            )

    def _check(self, ns: Namespace) -> None:
        name = type(self.optimizer).__name__
        if name == "LBFGS":
            raise ns.misconfiguration(
                "LBFGS evaluates the loss several times a step and needs its gradient, which forward-only training does not have. Return "
                "another optimizer (torch.optim.SGD, for its learning rate), or None, from configure_optimizers."
            )
        if any(group.get("maximize") for group in self.optimizer.param_groups):
            raise ns.misconfiguration(f"{name}(maximize=True): forward-only training minimises. Negate the loss in training_step.")

    def _group(self, group: dict[str, Any]) -> dict[str, Any]:
        """The engine's group for one of the user's. Adam's "eps" is not our eps."""
        self._base.append(float(group.get("initial_lr", group.get("lr", 0.0))))
        return {"params": list(group["params"])}

    def sync(self) -> None:
        """Take over parameters, lr and weight decay of the user's groups; those added since the last time too."""
        if not self._has_groups or self.engine is self.optimizer:
            return
        ours = self.engine.param_groups
        for index, group in enumerate(self.optimizer.param_groups):
            if index == len(ours):
                self.engine.add_param_group(self._group(group))
            ours[index]["params"] = group["params"]
            if "lr" in group:
                ours[index]["lr"] = self._lr(float(group["lr"]), self._base[index])
                ours[index]["initial_lr"] = self._lr(self._base[index], self._base[index])
            if self._options.weight_decay is None:
                ours[index]["weight_decay"] = float(group.get("weight_decay", 0.0))

    def _lr(self, now: float, base: float) -> float:
        if self._options.lr is None:
            return now
        return self._options.lr * (now / base if base else 1.0)

    def step(self, **kwargs: Any) -> StepReport | None:
        """One update from what was accumulated; None where that is nothing."""
        self.sync()
        report = self.engine.apply()
        if self.engine is not self.optimizer:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # whatever it is, the user's optimizer must not apply it on top
            self.optimizer.step(**kwargs)
        return report

    def inherited(self) -> str | None:
        """What was taken from the user's optimizer, and what of it does nothing; None where nothing was."""
        name, parts = type(self.optimizer).__name__, []
        groups = self.optimizer.param_groups
        if self.engine is self.optimizer:
            return None
        if not self._has_groups:
            lr = self.engine.param_groups[0]["lr"]
            return f"configure_optimizers returned None: all parameters of the module are trained, with lr={lr:g} (set ZOStrategy(lr=...))."
        if self._options.lr is None:
            parts.append(f"lr={_values(groups, 'lr')}")
        if self._options.weight_decay is None and any(group.get("weight_decay") for group in groups):
            parts.append(f"weight_decay={_values(groups, 'weight_decay')}")
        idle = [key for key in self.optimizer.defaults if key not in _NOT_IDLE | _HOW and any(group.get(key) for group in groups)]
        said = f"{' and '.join(parts)} are {name}'s, from configure_optimizers. " if parts else ""
        if self._options.lr is None:
            said += f"The usual lr of forward-only training is {self.engine.usual_lr()}. ZOStrategy(lr=..., weight_decay=...) sets others. "
        if idle:
            said += f"{name}'s {', '.join(idle)} do nothing: a step is theta - lr * g * z."
        return said.strip() or None


def _values(groups: list[dict[str, Any]], key: str) -> str:
    return ", ".join(dict.fromkeys(f"{float(group.get(key, 0.0)):g}" for group in groups))
