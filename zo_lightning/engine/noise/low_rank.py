"""LowRank: noise of matrices as a product of two thin ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zo_lightning.engine.messages import check_count, check_flag
from zo_lightning.engine.noise.base import coefficients_of, compute_dtype
from zo_lightning.engine.noise.compiling import available, kernel
from zo_lightning.engine.noise.gaussian import normal, pairs
from zo_lightning.engine.noise.kept import Kept
from zo_lightning.engine.noise.large import MANY, PACK, SMALL
from zo_lightning.engine.noise.shaped import Place, Shaped, Where
from zo_lightning.engine.seeds import basis_seed, query_seed, stream

_PRODUCTS = 16
"""Products of a column and a row that one pass adds."""
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
    factored = True

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

    def total(self, seeds: Sequence[int], coefficients: Sequence[float], place: Place, where: Where, dtype: torch.dtype) -> Tensor:
        many = isinstance(where, range) and len(seeds) > 1 and len(where) > SMALL and available(place.device.type)
        factors = [self.factors(seed, place) for seed in seeds] if many else [None]
        if isinstance(where, Tensor) or None in factors:
            return super().total(seeds, coefficients, place, where, dtype)
        lefts, rights = (list(sides) for sides in zip(*factors, strict=True))
        width, group = len(rights[0]), max(1, _PRODUCTS // lefts[0].shape[1])
        rows = slice(where.start // width, -(-where.stop // width))
        total = torch.zeros(rows.stop - rows.start, width, dtype=dtype, device=place.device)
        for begin in range(0, len(seeds), group):
            some = slice(begin, begin + group)
            scalars = coefficients_of(tuple(coefficients[some]), dtype, place.device)
            left = torch.cat([left[rows] for left in lefts[some]], 1)
            _accumulate_(total, left, torch.cat(rights[some], 1).t().contiguous(), scalars)
        return total.view(-1)[where.start - rows.start * width : where.stop - rows.start * width]

    def factors(self, seed: int, place: Place) -> tuple[Tensor, Tensor] | None:
        if (sizes := self._sizes(place)) is None:
            return None
        m, n, rank = sizes
        own, basis = self._wanted(seed, place)
        if self.orthogonal:
            u, v = _bases(basis, m, n, rank, place.device)
            core = _drawn(own).view(rank, rank).double()
            return (u @ core * (math.sqrt(m * n) / rank)).float().to(place.device), v
        return _drawn(own).view(m, rank) / math.sqrt(rank), _drawn(basis).view(n, rank)

    def prepare(self, seeds: Sequence[int], places: Sequence[Place]) -> None:
        matrices = [place for place in places if self._sizes(place) is not None]
        vectors = [place for place in places if self._sizes(place) is None]
        wanted = [one for seed in seeds for place in matrices for one in self._wanted(seed, place)]
        wanted += [_Wanted(seed, place.key, math.prod(place.shape), place.device) for seed in seeds for place in vectors]
        for device in {one.device for one in wanted}:
            todo = [one for one in dict.fromkeys(wanted) if one.device == device and one.size <= SMALL and one not in _DRAWN]
            while todo:
                pack, size = list[_Wanted](), 0
                while todo and (not pack or size + todo[-1].size <= PACK):
                    size += todo[-1].size
                    pack.append(todo.pop())
                _draw(pack)

    def _sizes(self, place: Place) -> tuple[int, int, int] | None:
        """(m, n, r) of a matrix."""
        if len(place.shape) < 2 or min(place.shape[0], math.prod(place.shape[1:])) < 2:
            return None
        m, n = place.shape[0], math.prod(place.shape[1:])
        return m, n, min(self.rank, m, n)

    def _wanted(self, seed: int, place: Place) -> tuple[_Wanted, _Wanted]:
        """What is a matrix's own, and what is its basis'."""
        m, n, rank = self._sizes(place) or (0, 0, 0)
        basis = seed if self.refresh == 1 and not self.orthogonal else seed >> _OWN
        if self.orthogonal:
            cpu = torch.device("cpu")
            return _Wanted(seed, place.key, rank * rank, cpu), _Wanted(basis, place.key, (m + n) * rank, cpu, b"zo.basis")
        return _Wanted(seed, place.key, m * rank, place.device), _Wanted(basis, place.key, n * rank, place.device, b"zo.basis")


def _moved(base: Tensor, left: Tensor, right: Tensor, scalars: Tensor) -> Tensor:
    z = left[:, :1] * right[0]
    for k in range(1, left.shape[1]):
        z = z + left[:, k : k + 1] * right[k]
    return base.to(scalars.dtype) * scalars[0] + z.to(scalars.dtype) * scalars[1]


@kernel
def _accumulate_(total: Tensor, left: Tensor, right: Tensor, scalars: Tensor) -> None:
    """total <- (total + c_1 z_1) + c_2 z_2 ..., each z with as many columns of `left` and rows of `right`."""
    rank, result = left.shape[1] // scalars.shape[0], total
    for j in range(scalars.shape[0]):
        z = left[:, j * rank : j * rank + 1] * right[j * rank]
        for k in range(j * rank + 1, (j + 1) * rank):
            z = z + left[:, k : k + 1] * right[k]
        result = result + z.to(scalars.dtype) * scalars[j]
    total.copy_(result)


@kernel
def _add(out: Tensor, base: Tensor, left: Tensor, right: Tensor, scalars: Tensor) -> None:
    out.copy_(_moved(base, left, right, scalars))


@kernel
def _add_(out: Tensor, left: Tensor, right: Tensor, scalars: Tensor) -> None:
    out.copy_(_moved(out, left, right, scalars))


class _Wanted(NamedTuple):
    """`size` standard normal values of the stream of a seed and a key."""

    seed: int
    key: int
    size: int
    device: torch.device
    label: bytes = b"zo.noise"

    @property
    def stream(self) -> tuple[int, int, int]:
        return stream(self.seed, self.key, self.label)


_DRAWN = Kept(1 << 26)
"""By what was wanted: a step and its update ask for the same, and bases last for many steps."""
_BASES = Kept(1 << 25)


def _drawn(wanted: _Wanted) -> Tensor:
    found: Tensor | None = _DRAWN.get(wanted)
    return _draw([wanted])[0] if found is None else found


def _draw(wanted: Sequence[_Wanted]) -> list[Tensor]:
    """Values of one device, drawn together; the same as if each were drawn alone."""
    keys = torch.tensor([one.stream for one in wanted], dtype=torch.int32).to(wanted[0].device)
    fused = sum(one.size for one in wanted) > MANY and available(keys.device.type)
    found = pairs(keys, [one.size for one in wanted], fused)
    for one, values in zip(wanted, found, strict=True):
        _DRAWN.put(one, values)
    return found


def _vector(seed: int, place: Place, where: Where) -> Tensor:
    """What is no matrix has standard normal noise."""
    numel = math.prod(place.shape)
    if numel <= SMALL:
        whole = _drawn(_Wanted(seed, place.key, numel, place.device))
        return whole[where.start : where.stop] if isinstance(where, range) else whole[where]
    keys = torch.tensor(stream(seed, place.key), dtype=torch.int32).to(place.device)
    if isinstance(where, range):
        return normal(keys, where, numel)
    if not where.numel():
        return torch.zeros(where.shape, device=place.device)
    first, last = int(where.min()), int(where.max())
    return normal(keys, range(first, last + 1), numel)[where - first]


def _bases(wanted: _Wanted, m: int, n: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthonormal columns: U in float64 on the CPU, whose bits are those of any device that it is for, and V as it is used."""
    found: tuple[Tensor, Tensor] | None = _BASES.get((wanted, m, n, rank, device))
    if found is None:
        parts = _drawn(wanted).double().split([m * rank, n * rank])
        u, v = (_orthonormal(part.view(-1, rank)) for part in parts)
        found = u, v.float().to(device)
        _BASES.put((wanted, m, n, rank, device), found)
    return found


def _orthonormal(columns: Tensor) -> Tensor:
    q: Tensor
    q, r = torch.linalg.qr(columns)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # the sign that makes it a function of the columns alone


def _summed(products: list[Tensor]) -> Tensor:
    """One after another, each rounded: the same for any part of a matrix, which a matrix product is not."""
    total = products[0]
    for product in products[1:]:
        total.add_(product)
    return total
