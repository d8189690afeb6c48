"""Sphere: directions of one length."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from zo_lightning.engine.noise.gaussian import exact_normal
from zo_lightning.engine.noise.shaped import Place, Shaped, Where
from zo_lightning.engine.seeds import stream

_PIECE = 1 << 18


class Sphere(Shaped):
    """z of a parameter of n elements is uniform on the sphere of radius sqrt(n): sqrt(n) x / |x|, x standard normal.

    Each parameter has a sphere of its own, so that its noise does not depend on what else is trained; all together have the length
    sqrt(d), d the number of weights, as uniform noise on one sphere has, and E z z' is the identity as there. Every direction has the same
    length, which Gaussian noise has only on average: SPSA has the variance (d - 1) |grad L|^2 with it, as with Rademacher noise, and
    (d + 1) |grad L|^2 with Gaussian noise. A mask takes elements out of z; it makes no smaller sphere. x is computed in float64 and rounded
    to float32. Its length is that of all of a parameter, for which it is drawn once more.

    Flaxman et al. 2005 (arXiv cs/0408007), Liu et al. 2018 (arXiv 1805.10367).
    """

    name = "sphere"

    def values(self, seed: int, place: Place, where: Where) -> Tensor:
        index = torch.arange(where.start, where.stop, device=place.device) if isinstance(where, range) else where
        drawn = exact_normal(index, _key(seed, place.key, place.device)).float()
        return drawn * _scale(seed, place.key, math.prod(place.shape), place.device)


@functools.lru_cache(maxsize=256)
def _key(seed: int, key: int, device: torch.device) -> Tensor:
    return torch.tensor(stream(seed, key), dtype=torch.int32).to(device)


@functools.lru_cache(maxsize=1 << 12)
def _scale(seed: int, key: int, count: int, device: torch.device) -> float:
    """sqrt(n) / |x|, from a sum in float64."""
    pieces = [torch.arange(first, min(first + _PIECE, count), device=device) for first in range(0, count, _PIECE)]
    return math.sqrt(count / math.fsum(exact_normal(piece, _key(seed, key, device)).square().sum().item() for piece in pieces))
