"""Update rules: from the terms of a step to the change that is made of the weights. One file a rule."""

from zo_lightning.engine.updates.base import GroupSettings, RuleState, UpdateRule
from zo_lightning.engine.updates.dense import Dense, DenseState
from zo_lightning.engine.updates.hizoo import HiZOO
from zo_lightning.engine.updates.momentum import Momentum
from zo_lightning.engine.updates.sgd import SGD
from zo_lightning.engine.updates.sign import Sign
from zo_lightning.engine.updates.through_torch import Adam, TorchOptimizer

RULES: dict[str, type[UpdateRule]] = {rule.name: rule for rule in (SGD, Sign, Momentum, Adam, HiZOO, TorchOptimizer)}
"""By the names that step logs use, and `update=` for those that need no options."""

__all__ = [
    "RULES",
    "SGD",
    "Adam",
    "Dense",
    "DenseState",
    "GroupSettings",
    "HiZOO",
    "Momentum",
    "RuleState",
    "Sign",
    "TorchOptimizer",
    "UpdateRule",
]
