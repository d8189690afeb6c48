"""Noise that is another one times a number for each direction; of this kind is Sphere: directions of one length."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod

import torch

from zo_lightning.engine.noise.base import Elementwise, Noise
from zo_lightning.engine.noise.gaussian import HALF, Gaussian, normal
from zo_lightning.engine.seeds import stream


class Scaled(Noise):
    """z = s(seed, parameter key, shape of the parameter) z', for the z' of an elementwise noise, whose kernels then add it."""

    inner: Elementwise

    @abstractmethod
    def scale(self, seed: int, key: int, shape: torch.Size, device: torch.device) -> float:
        """s of one parameter."""


class Sphere(Scaled):
    """z of a parameter of n elements is uniform on the sphere of radius sqrt(n): sqrt(n) x / |x|, x standard normal.

    Each parameter has a sphere of its own, so that its noise does not depend on what else is trained; all together have the length
    sqrt(d), d the number of weights, as uniform noise on one sphere has, and E z z' is the identity as there. Every direction has the same
    length, which Gaussian noise has only on average: SPSA has the variance (d - 1) |grad L|^2 with it, as with Rademacher noise, and
    (d + 1) |grad L|^2 with Gaussian noise. A mask takes elements out of z; it makes no smaller sphere. |x| is that of all of a parameter,
    for which x is drawn once more. An x of 0, which parameters of one element have with a chance of 2^-24, has no direction: z is 0 there.

    Flaxman et al. 2005 (arXiv cs/0408007), Liu et al. 2018 (arXiv 1805.10367).
    """

    name = "sphere"
    inner = Gaussian()

    def scale(self, seed: int, key: int, shape: torch.Size, device: torch.device) -> float:
        return _scale(seed, key, math.prod(shape), device)


@functools.lru_cache(maxsize=1 << 12)
def _scale(seed: int, key: int, count: int, device: torch.device) -> float:
    """sqrt(n) / |x|, from sums in float64."""
    squares = []
    own = torch.tensor(stream(seed, key), dtype=torch.int32).to(device)
    for first in range(0, count, 2 * HALF):
        x = normal(own, range(first, min(first + 2 * HALF, count)), count, fused=True)
        squares.append(torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2)
    total = math.fsum(squares)
    return math.sqrt(count / total) if total else 0.0
