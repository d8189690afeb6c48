"""HiZOO: perturbations and steps scaled by a diagonal of the Hessian that the evaluations show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_lightning.engine.estimators import SPSA, Curvature, Estimator, Term
from zo_lightning.engine.messages import check_number
from zo_lightning.engine.noise import Noise
from zo_lightning.engine.noise.preconditioned import Preconditioned
from zo_lightning.engine.updates.dense import Dense, DenseState


@dataclass(frozen=True)
class HiZOO(Dense):
    r"""Perturb and move by u = z / sqrt(h): theta <- (1 - lr wd) theta - lr g u, g from the losses at theta +- eps u (arXiv 2402.15173).

    h, one float32 number a trained weight, begins at 1 and follows the diagonal of the Hessian up to a common factor:

        h <- (1 - alpha) h + alpha 1/n sum_i |L(theta + eps u_i) + L(theta - eps u_i) - 2 L(theta)| / (2 eps^2) h z_i^2.

    On a quadratic with positive diagonal A and Gaussian z of d elements its mean comes to rest at (1 + d / 2) A. A step moves along the
    directions that were probed, with the h of its evaluations, which is made new behind it: g u is then an estimate of the gradient times
    1 / h. SPSA(n) evaluates the weights themselves, too: 2n + 1 evaluations. Large weights of |L+ + L- - 2 L| / eps^2 are noise where the
    losses are coarse: choose eps and alpha so that alpha times it stays far below 1.

    Args:
        alpha: in (0, 1), smoothing; 1e-8 in the paper's runs of large models, more for small ones.

    z^2 must tell elements apart: with Rademacher noise, where all are 1, h would learn nothing, and ValueError says so. ValueError, too,
    for estimators other than SPSA.
    """

    alpha: float = 1e-8

    name = "hizoo"
    remembers = True
    shards = False
    rescales = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, "> 0 and < 1", lambda x: 0 < x < 1)

    def measured_by(self, estimator: Estimator) -> Estimator:
        if isinstance(estimator, Curvature):
            return estimator
        if type(estimator) is SPSA and estimator.fitness == "values":
            return Curvature(estimator.queries)
        raise ValueError(
            f"Invalid estimator: {estimator!r} with update={self.name!r}, which needs the curvature along each direction. Use "
            "SPSA(queries=n), which evaluates the weights themselves, too, with this rule."
        )

    def state_bytes(self, shape: Sequence[int]) -> int:
        return 4 * math.prod(shape)

    def begin(self) -> DenseState:
        return _State(self)


class _State(DenseState):
    """h of each parameter, by its key."""

    rule: HiZOO

    def __init__(self, rule: HiZOO) -> None:
        super().__init__(rule)
        self._hessian: dict[int, Tensor] = {}

    def noise(self, noise: Noise) -> Noise:
        return Preconditioned(noise, self._hessian)

    def move(self, key: int, theta: Tensor, estimate: Tensor, lr: float) -> None:
        theta.add_(estimate, alpha=-lr)

    def learn(self, key: int, terms: Sequence[Term], eps: float, direction: Callable[[int], Tensor]) -> None:
        h, added, inside = self._hessian.get(key), None, None
        for j, term in enumerate(terms):
            u = direction(j)
            h = torch.ones_like(u) if h is None else h.to(u.device)
            inside = u != 0 if inside is None else inside.logical_or_(u != 0)
            square = u.square_().mul_(h).mul_(h).mul_(abs(term.curvature) / (2 * eps**2))  # h z^2 = h^2 u^2
            added = square if added is None else added.add_(square)
        if h is None or added is None or inside is None:
            return
        self._hessian[key] = torch.where(inside, h * (1 - self.rule.alpha) + self.rule.alpha * added, h)

    def clear(self) -> None:
        self._hessian.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"hessian": {str(key): h.clone() for key, h in self._hessian.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._hessian.clear()
        self._hessian.update({int(key): h.clone() for key, h in state["hessian"].items()})
