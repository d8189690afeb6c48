"""Estimators: where to evaluate the objective in a step, and what the values mean as terms of a gradient estimate. One file a method."""

from zo_lightning.engine.estimators.base import ADDED, Displacement, Estimator, EstimatorState, Term, Ways
from zo_lightning.engine.estimators.conservative import Conservative
from zo_lightning.engine.estimators.coordinatewise import Coordinatewise
from zo_lightning.engine.estimators.curvature import Curvature
from zo_lightning.engine.estimators.fitness import FITNESS, centred_ranks, z_scores
from zo_lightning.engine.estimators.forward_gradient import ForwardGradient
from zo_lightning.engine.estimators.one_sided import OneSided
from zo_lightning.engine.estimators.rank_sgd import RankSGD
from zo_lightning.engine.estimators.spsa import SPSA
from zo_lightning.engine.estimators.svrg import SVRG

ESTIMATORS: dict[str, type[Estimator]] = {
    method.name: method for method in (SPSA, OneSided, Curvature, ForwardGradient, Conservative, RankSGD, SVRG, Coordinatewise)
}
"""By the names that `estimator=` and step logs use."""

__all__ = [
    "ADDED",
    "ESTIMATORS",
    "FITNESS",
    "SPSA",
    "SVRG",
    "Conservative",
    "Coordinatewise",
    "Curvature",
    "Displacement",
    "Estimator",
    "EstimatorState",
    "ForwardGradient",
    "OneSided",
    "RankSGD",
    "Term",
    "Ways",
    "centred_ranks",
    "z_scores",
]
