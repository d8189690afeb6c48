"""Forward-only optimization in plain PyTorch: the mathematics of zo-lightning, without any host."""

from zo_lightning.engine import first_calls
from zo_lightning.engine.backprop import Backprop
from zo_lightning.engine.estimators import (
    SPSA,
    SVRG,
    Conservative,
    Coordinatewise,
    Curvature,
    Estimator,
    ForwardGradient,
    OneSided,
    RankSGD,
    Term,
)
from zo_lightning.engine.messages import ZOWarning
from zo_lightning.engine.noise import Gaussian, LowRank, Noise, Rademacher, Sphere
from zo_lightning.engine.optimizer import ZOOptimizer
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.parallel import DataParallel, Exchange, Mesh, PeerError, Processes
from zo_lightning.engine.report import Estimate, StepReport
from zo_lightning.engine.safeguard import DivergenceError, Safeguard
from zo_lightning.engine.updates import SGD, Adam, HiZOO, Momentum, Sign, TorchOptimizer, UpdateRule

first_calls.make()

__all__ = [
    "SGD",
    "SPSA",
    "SVRG",
    "Adam",
    "Backprop",
    "Conservative",
    "Coordinatewise",
    "Curvature",
    "DataParallel",
    "DivergenceError",
    "EngineOptions",
    "Estimate",
    "Estimator",
    "Exchange",
    "ForwardGradient",
    "Gaussian",
    "HiZOO",
    "LowRank",
    "Mesh",
    "Momentum",
    "Noise",
    "OneSided",
    "PeerError",
    "Processes",
    "Rademacher",
    "RankSGD",
    "Safeguard",
    "Sign",
    "Sphere",
    "StepReport",
    "Term",
    "TorchOptimizer",
    "UpdateRule",
    "ZOOptimizer",
    "ZOWarning",
]
