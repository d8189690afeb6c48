"""The Lightning strategies "zo", "zo_ddp" and "zo_model_parallel": forward-only training of an unchanged LightningModule."""

from importlib.util import find_spec

from zo_lightning.extras import require

if find_spec("pytorch_lightning") is None:
    require("lightning", "lightning")

from zo_lightning.strategy.model_parallel import ZOModelParallelStrategy
from zo_lightning.strategy.namespace import register
from zo_lightning.strategy.strategies import ZODDPStrategy, ZOStrategy

__all__ = ["ZODDPStrategy", "ZOModelParallelStrategy", "ZOStrategy", "register"]
