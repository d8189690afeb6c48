"""Sign: steps of one size for every weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from zo_lightning.engine.updates.dense import Dense, DenseState


@dataclass(frozen=True)
class Sign(Dense):
    """theta <- (1 - lr wd) theta - lr sign(g), element by element: ZO-signSGD (Liu et al., ICLR 2019).

    Every trained weight moves by lr, whatever the size of the estimate. With one query of Rademacher noise that is lr sign(g_1) z_1.
    """

    name = "sign"

    def begin(self) -> DenseState:
        return _State(self)


class _State(DenseState):
    """Nothing is remembered."""

    def move(self, key: int, theta: Tensor, estimate: Tensor, lr: float) -> None:
        theta.add_(estimate.sign_(), alpha=-lr)
