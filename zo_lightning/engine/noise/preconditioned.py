"""Noise of another size for every weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from zo_lightning.engine.noise.base import Elementwise, Noise
from zo_lightning.engine.noise.gaussian import Gaussian, exact_normal, normal
from zo_lightning.engine.noise.shaped import Place, Shaped, Where
from zo_lightning.engine.noise.sphere import Scaled
from zo_lightning.engine.seeds import stream


class Preconditioned(Shaped):
    """z[i] / sqrt(h[i]) for the z of another noise, and h > 0 of each parameter's shape, by its key; 1 where there is none.

    `hessian` is looked at whenever noise is asked for. Gaussian z of single elements differ from those of ranges by less than 2e-6.
    """

    def __init__(self, inner: Noise, hessian: Mapping[int, Tensor]) -> None:
        self._inner = inner
        self._hessian = hessian
        self.name = inner.name

    @property
    def text(self) -> str:
        return self._inner.text

    def seed(self, run_seed: int, step: int, query: int) -> int:
        return self._inner.seed(run_seed, step, query)

    def values(self, seed: int, place: Place, where: Where) -> Tensor:
        drawn = self._drawn(seed, place, where)
        h = self._hessian.get(place.key)
        if h is None:
            return drawn
        flat = h.view(-1).to(place.device)
        return drawn / torch.sqrt(flat[where.start : where.stop] if isinstance(where, range) else flat[where])

    def _drawn(self, seed: int, place: Place, where: Where) -> Tensor:
        inner = self._inner
        if isinstance(inner, Shaped):
            return inner.values(seed, place, where)
        scale = 1.0
        if isinstance(inner, Scaled):
            scale, inner = inner.scale(seed, place.key, place.shape, place.device), inner.inner
        key = torch.tensor(stream(seed, place.key), dtype=torch.int32).to(place.device)
        if isinstance(inner, Gaussian):
            if isinstance(where, range):
                return normal(key, where, math.prod(place.shape), fused=True) * scale
            return exact_normal(where, key).float() * scale
        if isinstance(inner, Elementwise):
            index = torch.arange(where.start, where.stop, device=place.device) if isinstance(where, range) else where
            return inner.at(index, key) * scale
        raise TypeError(f"{inner!r} is no Elementwise, Scaled or Shaped noise.")
