"""LowRank: noise of matrices as a product of two thin ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_lightning.engine.messages import check_count, check_flag
from zo_lightning.engine.noise.base import coefficients_of, compute_dtype
from zo_lightning.engine.noise.compiling import kernel
from zo_lightning.engine.noise.gaussian import normal
from zo_lightning.engine.noise.kept import kept
from zo_lightning.engine.noise.shaped import Place, Shaped, Where
from zo_lightning.engine.seeds import basis_seed, query_seed, stream

_LIMIT = 1 << 25
"""Bytes that are kept of each kind of factor: a step and its update ask for the same, and bases last for many steps."""
_OWN = 40
"""Bits of a seed that are its own; above them is the number of its basis, which the seeds of some steps share."""


@dataclass(frozen=True)
class LowRank(Shaped):
    r"""Z = U V' / sqrt(r) for a parameter seen as a matrix of shape (m, n), U of shape (m, r) and V (n, r) standard normal.

    V is drawn anew every `refresh` steps and U for every query: LOZO (arXiv 2410.07698, rank 1 to 4, refresh 50 to 100), where Z = U V' has
    an eps smaller by sqrt(r); with refresh=1 both are new, as in EGGROLL (arXiv 2511.16652). With `orthogonal`

        Z = sqrt(m n) / r U S V',   U and V orthonormal and drawn anew every `refresh` steps, S of shape (r, r) standard normal:

    SubZero (arXiv 2410.08989, refresh 1000 to 2000). E Z = 0 and E Z_ij^2 = 1, so that g Z is unbiased: over all of Z, and not between two
    refreshes, within which steps stay in a subspace. Convolutions are matrices of their first dimension by the others; vectors and scalars,
    biases and norms, get standard normal noise. r is at most min(m, n). Values are float32, functions of the seed, which carries the
    number of its basis: a step's update has the bases of its evaluations whenever it is made.

    Args:
        rank: r, at least 1. refresh: steps, at least 1. orthogonal: whether as in SubZero.

    Raises ValueError for others.
    """

    rank: int = 2
    refresh: int = 50
    orthogonal: bool = False

    name = "low_rank"

    def __post_init__(self) -> None:
        check_count("rank", self.rank, "the rank of the noise of a matrix")
        check_count("refresh", self.refresh, "the steps that a basis is kept for")
        check_flag("orthogonal", self.orthogonal)

    def seed(self, run_seed: int, step: int, query: int) -> int:
        own = query_seed(run_seed, step, query) & ((1 << _OWN) - 1)
        return basis_seed(run_seed, step // self.refresh) >> _OWN << _OWN | own

    def values(self, seed: int, place: Place, where: Where) -> Tensor:
        factors = self.factors(seed, place)
        if factors is None:
            return _vector(seed, place, where)
        left, right = factors
        width = len(right)
        if isinstance(where, Tensor):
            row, column = left[where // width], right[where % width]
            return _summed([row[..., k] * column[..., k] for k in range(row.shape[-1])])
        first, last = where.start // width, -(-where.stop // width)
        rows = left[first:last]
        whole = _summed([rows[:, k : k + 1] * right[:, k] for k in range(left.shape[1])]).view(-1)
        return whole[where.start - first * width : where.stop - first * width]

    def add(self, out: Tensor, base: Tensor, seed: int, place: Place, decay: float, c: float) -> bool:
        factors = self.factors(seed, place)
        if factors is None:
            return False
        left, right = factors
        shape = (len(left), len(right))
        scalars = coefficients_of((decay, c), compute_dtype(base.dtype), base.device)
        if out.data_ptr() == base.data_ptr():
            _add_(out.view(shape), left, right.t().contiguous(), scalars)
        else:
            _add(out.view(shape), base.view(shape), left, right.t().contiguous(), scalars)
        return True

    def factors(self, seed: int, place: Place) -> tuple[Tensor, Tensor] | None:
        """(A, B) of shapes (m, r) and (n, r), float32, with Z = A B'; None for what is no matrix."""
        shape = place.shape
        if len(shape) < 2 or min(shape[0], math.prod(shape[1:])) < 2:
            return None
        m, n = shape[0], math.prod(shape[1:])
        rank = min(self.rank, m, n)
        if self.orthogonal:
            return _turned(seed, place.key, m, n, rank, place.device), _bases(seed >> _OWN, place.key, m, n, rank, place.device)[1]
        left = _left(seed, place.key, m, rank, place.device)
        return left, _right(seed if self.refresh == 1 else seed >> _OWN, place.key, n, rank, place.device)


def _moved(base: Tensor, left: Tensor, right: Tensor, scalars: Tensor) -> Tensor:
    z = left[:, :1] * right[0]
    for k in range(1, left.shape[1]):
        z = z + left[:, k : k + 1] * right[k]
    return base.to(scalars.dtype) * scalars[0] + z.to(scalars.dtype) * scalars[1]


@kernel
def _add(out: Tensor, base: Tensor, left: Tensor, right: Tensor, scalars: Tensor) -> None:
    out.copy_(_moved(base, left, right, scalars))


@kernel
def _add_(out: Tensor, left: Tensor, right: Tensor, scalars: Tensor) -> None:
    out.copy_(_moved(out, left, right, scalars))


def _vector(seed: int, place: Place, where: Where) -> Tensor:
    """What is no matrix has standard normal noise."""
    own, numel = _stream(seed, place.key, place.device), math.prod(place.shape)
    if isinstance(where, range):
        return normal(own, where, numel)
    if not where.numel():
        return torch.zeros(where.shape, device=place.device)
    first, last = int(where.min()), int(where.max())
    return normal(own, range(first, last + 1), numel)[where - first]


@kept(_LIMIT)
def _left(seed: int, key: int, m: int, rank: int, device: torch.device) -> Tensor:
    """U / sqrt(r)."""
    return _drawn(seed, key, m * rank, device).view(m, rank) / math.sqrt(rank)


@kept(_LIMIT)
def _right(seed: int, key: int, n: int, rank: int, device: torch.device) -> Tensor:
    """V, of a seed or of a basis."""
    return _drawn(seed, key, n * rank, device, b"zo.basis").view(n, rank)


@kept(_LIMIT)
def _turned(seed: int, key: int, m: int, n: int, rank: int, device: torch.device) -> Tensor:
    """sqrt(m n) / r U S for an orthonormal U."""
    core = _drawn(seed, key, rank * rank, torch.device("cpu")).view(rank, rank).double()
    return (_bases(seed >> _OWN, key, m, n, rank, device)[0] @ core * (math.sqrt(m * n) / rank)).float().to(device)


@kept(_LIMIT)
def _bases(basis: int, key: int, m: int, n: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthonormal columns: U in float64 on the CPU, whose bits are those of any device that it is for, and V as it is used."""
    drawn = _drawn(basis, key, (m + n) * rank, torch.device("cpu"), b"zo.basis").double()
    found = [torch.linalg.qr(part.view(-1, rank)) for part in drawn.split([m * rank, n * rank])]
    u, v = (q * torch.where(r.diagonal() < 0, -1.0, 1.0) for q, r in found)  # the sign that makes it a function of its columns alone
    return u, v.float().to(device)


def _drawn(seed: int, key: int, count: int, device: torch.device, label: bytes = b"zo.noise") -> Tensor:
    return normal(_stream(seed, key, device, label), range(count), count)


def _stream(seed: int, key: int, device: torch.device, label: bytes = b"zo.noise") -> Tensor:
    return torch.tensor(stream(seed, key, label), dtype=torch.int32).to(device)


def _summed(products: list[Tensor]) -> Tensor:
    """One after another, each rounded: the same for any part of a matrix, which a matrix product is not."""
    total = products[0]
    for product in products[1:]:
        total.add_(product)
    return total
