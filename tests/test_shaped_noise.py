"""LowRank and Sphere: against twins that make whole matrices, their statistics, and what a refresh must not do."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import eagerly, mean_square, mlp, regression, same, snapshot
from reference import noise as reference
from torch import Tensor, nn

from zo_lightning.engine import LowRank, Noise, Sphere, ZOOptimizer
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.noise import Change, Item, Place, Shaped, apply_changes, as_noise, sweep
from zo_lightning.engine.noise.kept import Kept
from zo_lightning.engine.parameters import Trained, parameter_key
from zo_lightning.engine.residency import Offload

SHAPED: dict[str, Shaped] = {
    "low rank": LowRank(),
    "fresh": LowRank(3, refresh=1),
    "orthogonal": LowRank(4, refresh=7, orthogonal=True),
}
SHAPES = [(), (1,), (333,), (1, 40), (40, 1), (2, 2), (31, 57), (57, 31), (8, 3, 3, 3), (900, 700), (3, 300_000)]
KINDS: dict[str, Noise] = {"sphere": Sphere(), **SHAPED}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def twin(noise: Noise, seed: int, key: int, shape: tuple[int, ...]) -> Tensor:
    """z in float64, of the shape."""
    if isinstance(noise, LowRank):
        values = reference.low_rank(seed, key, shape, noise.rank, noise.refresh, noise.orthogonal)
    else:
        values = reference.sphere(seed, key, shape)
    return torch.from_numpy(values).view(shape)


def drawn(noise: Noise, seed: int, key: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.zeros(shape, dtype=dtype)
    sweep([Item(out, out, key, 1.0, (1.0,))], [seed], noise)
    return out


# ---- values


@each_kind
@each_shape
def test_values_are_those_of_the_twin(kind: str, shape: tuple[int, ...]) -> None:
    noise = KINDS[kind]
    for seed, key in ((5, 7), (noise.seed(1, 12, 0), parameter_key("layers.0.weight"))):
        z = drawn(noise, seed, key, shape, torch.float64)
        assert float((z - twin(noise, seed, key, shape)).abs().max()) <= 3e-5


@pytest.mark.parametrize("kind", SHAPED)
@each_shape
def test_any_part_has_the_bits_of_the_whole(kind: str, shape: tuple[int, ...]) -> None:
    """Stretches, single elements in any order, tables of elements, tensors in another layout."""
    noise = SHAPED[kind]
    whole = drawn(noise, 5, 7, shape)
    place, count = Place(7, torch.Size(shape), torch.device("cpu")), whole.numel()
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        first, last = sorted(torch.randint(0, count + 1, (2,), generator=generator).tolist())
        assert torch.equal(noise.values(5, place, range(first, last)), whole.view(-1)[first:last])
    index = torch.randint(0, count, (3, 50), generator=generator)
    assert torch.equal(noise.values(5, place, index), whole.view(-1)[index])
    strided = torch.zeros(shape[::-1]).permute(*reversed(range(len(shape)))) if shape else torch.zeros(())
    sweep([Item(strided, strided, 7, 1.0, (1.0,))], [5], noise)
    assert torch.equal(strided, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_compiled_passes_have_the_bits_of_eager_ones(rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(shape, generator=generator).to(dtype) for shape in ((300, 301), (64, 16, 9, 5), (700, 1100))]

    def swept(inside: bool, decay: float, terms: int) -> list[Tensor]:
        outs = [base.clone() if inside else torch.empty_like(base) for base in bases]
        sizes = tuple(1e-3 * (-1.1) ** j for j in range(terms))
        items = [Item(o, o if inside else b, i, decay, sizes) for i, (o, b) in enumerate(zip(outs, bases, strict=True))]
        sweep(items, [5 + (j << 41) for j in range(terms)], LowRank(rank), rounding=3 if terms == 7 else None)
        return outs

    ways = list(itertools.product((True, False), (1.0, 0.97), (1, 2, 7)))
    compiled = [swept(*way) for way in ways]
    eagerly(monkeypatch)
    for way, outs in zip(ways, compiled, strict=True):
        assert all(map(torch.equal, outs, swept(*way)))


@each_kind
def test_sums_and_decay_are_those_of_single_terms(kind: str) -> None:
    noise, shape, seeds, c = KINDS[kind], (31, 57), [3, 2**41 + 3, 9], (0.5, -0.25, 2.0)
    base = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = base.clone()
    sweep([Item(out, out, 7, 0.9, c)], seeds, noise)
    want = 0.9 * base + sum(x * drawn(noise, seed, 7, shape).double() for x, seed in zip(c, seeds, strict=True))
    assert torch.allclose(out, want, rtol=0, atol=1e-6 if kind == "sphere" else 1e-14)  # z in float32, and that of several terms fused
    several = base.clone()
    steps = tuple((1.0, tuple(x if i == j else 0.0 for i in range(3))) for j, x in enumerate(c))
    changes = [Change(tuple(seeds), (step,), None) for step in steps]
    apply_changes([Trained("a", 7, several, 0, (several,))], changes, noise)
    assert torch.allclose(several, base + want - 0.9 * base, rtol=0, atol=1e-6 if kind == "sphere" else 1e-13)


def test_bases_are_kept_for_the_steps_of_a_refresh_and_own_factors_are_not() -> None:
    noise, place = LowRank(2, refresh=5), Place(7, torch.Size((30, 20)), torch.device("cpu"))
    found = [noise.factors(noise.seed(1, step, query), place) for step in range(15) for query in range(2)]
    left, right = ([pair[i] for pair in found if pair is not None] for i in range(2))
    assert all(torch.equal(right[i], right[i - i % 10]) for i in range(30))
    assert not any(torch.equal(right[a], right[b]) for a, b in itertools.combinations((0, 10, 20), 2))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(left, 2))


def test_seeds_with_a_basis_are_as_good_as_others() -> None:
    noise = LowRank(refresh=5)
    seeds = [noise.seed(run, step, query) for run in range(3) for step in range(500) for query in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) > 0
    assert max(seeds) < 2**63
    assert max(seeds) > 2**62
    assert len({seed >> 40 for seed in seeds}) == 3 * 100


def test_orthogonal_bases_are_orthonormal_and_the_directions_lie_in_them() -> None:
    noise, place = LowRank(3, refresh=5, orthogonal=True), Place(7, torch.Size((30, 20)), torch.device("cpu"))
    z = [twin(noise, noise.seed(1, step, 0), 7, (30, 20)) for step in range(4)]
    assert int(torch.linalg.matrix_rank(torch.cat(z, dim=1))) == 3 == int(torch.linalg.matrix_rank(torch.cat(z)))
    _, right = noise.factors(noise.seed(1, 0, 0), place) or (None, torch.zeros(0))
    assert torch.allclose(right.t() @ right, torch.eye(3), atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 5, 100])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_the_rank_is_what_was_asked_for_or_what_is_possible(rank: int, orthogonal: bool) -> None:
    z = drawn(LowRank(rank, orthogonal=orthogonal), 5, 7, (12, 30), torch.float64)
    assert int(torch.linalg.matrix_rank(z, rtol=1e-5)) == min(rank, 12)


# ---- statistics

MOMENTS = {
    "sphere": lambda m, n: 0.0,
    "low rank": lambda m, n: 2 + (m + n + 1),  # rank 2
    "fresh": lambda m, n: 2 + 2 * (m + n + 1) / 3,
}


@pytest.mark.parametrize("kind", MOMENTS)
def test_variance_of_spsa_is_that_of_theory(kind: str) -> None:
    """Of a linear loss, where (z'g) z has E |.|^2 = |g|^2 (d + excess): 0 on a sphere, 2 + 2 (m + n + 1) / r for a product."""
    noise, (m, n), draws = KINDS[kind], (6, 4), 20_000
    g = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = torch.stack([drawn(noise, noise.seed(3, 1000 * i, 0), 7, (m, n)) for i in range(draws)]).double().view(draws, -1)
    estimates = (z @ g.view(-1))[:, None] * z
    error = (estimates.mean(0) - g.view(-1)).abs() / (estimates.std(0) / math.sqrt(draws))
    assert float(error.max()) < 4.5  # the largest of 24
    squares = estimates.square().sum(1)
    expected = float(g.square().sum()) * (m * n + MOMENTS[kind](m, n))
    assert abs(float(squares.mean()) - expected) < 4 * float(squares.std()) / math.sqrt(draws)


@pytest.mark.parametrize("kind", ["orthogonal", "low rank"])
def test_elements_have_mean_zero_and_variance_one_over_bases(kind: str) -> None:
    noise, draws = KINDS[kind], 20_000
    z = torch.stack([drawn(noise, noise.seed(3, 1000 * i, 0), 7, (5, 6)) for i in range(draws)]).double().view(draws, -1)
    assert float((z.mean(0) / (z.std(0) / math.sqrt(draws))).abs().max()) < 4.5
    squares = z.square()
    assert float(((squares.mean(0) - 1) / (squares.std(0) / math.sqrt(draws))).abs().max()) < 4.5
    products = z.t() @ z / draws - torch.eye(30)
    assert float(products.abs().max()) < 0.2


def test_sphere_has_one_length_and_no_preferred_direction() -> None:
    z = torch.stack([drawn(Sphere(), seed, 7, (50,)) for seed in range(2_000)]).double()
    assert float((z.square().sum(1) - 50).abs().max()) < 1e-4
    first = z[:, 0].numpy() / math.sqrt(50)
    beta = np.sort((first + 1) / 2)  # Beta(49/2, 49/2) for a coordinate of a point on the sphere of R^50
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200_000, 50))
    other = np.sort((x[:, 0] / np.linalg.norm(x, axis=1) + 1) / 2)
    gap = np.abs(np.searchsorted(other, beta) / len(other) - np.arange(2_000) / 2_000).max()
    assert gap < 1.95 / math.sqrt(2_000)


@each_kind
def test_estimates_are_unbiased_against_autograd(kind: str) -> None:
    model, noise = mlp(dtype=torch.float64), KINDS[kind]
    x, y = regression(torch.float64)
    loss = (model(x) - y).square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    g = torch.cat([grad.reshape(-1) for grad in grads])
    optimizer = ZOOptimizer(model, lr=0.0, eps=1e-4, noise=noise, weights="copy", safeguard=None)
    parts = [(p.key, tuple(p.tensor.shape)) for p in optimizer.residency.trained]
    estimates = []
    for step in range(1_500):
        optimizer.steps = step * 50  # each has a basis of its own
        optimizer.step(lambda: (model(x) - y).square().mean())
        assert optimizer.report is not None
        seed = noise.seed(0, step * 50, 0)
        z = torch.cat([drawn(noise, seed, key, shape).double().view(-1) for key, shape in parts])
        plus, minus = optimizer.report.values
        estimates.append((plus - minus) / 2e-4 * z)
    found = torch.stack(estimates)
    error = (found.mean(0) - g) / (found.std(0) / math.sqrt(len(found)))
    assert float(error.abs().max()) < 4.5  # the largest of all weights


# ---- in training


@pytest.mark.parametrize("kind", ["low rank", "orthogonal"])
def test_what_was_probed_is_what_is_updated_on_steps_that_refresh(kind: str) -> None:
    """Released code draws the basis anew between perturbation and update, so that a refreshing step goes anywhere."""
    model, noise = mlp(dtype=torch.float64), LowRank(1, refresh=2, orthogonal=kind == "orthogonal")
    x, y = regression(torch.float64)
    optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-3, noise=noise, weights="inplace", safeguard=None)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        return (model(x) - y).square().mean()

    for _ in range(6):
        seen.clear()
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        optimizer.step(closure)
        moved = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - before
        probed = seen[0] - seen[1]
        assert abs(float(torch.nn.functional.cosine_similarity(moved, probed, dim=0))) > 1 - 1e-9


@each_kind
@pytest.mark.parametrize("mask", [None, Mask("random", 0.05), Mask("random", 0.4), Mask("small_weights", 0.3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_kinds_of_weights_end_with_the_same_bits(kind: str, mask: Mask | None, dtype: torch.dtype) -> None:
    x, y = regression(dtype)
    ends = []
    for weights in ("exact", "copy", Offload()):
        model = mlp(dtype=dtype)
        options: dict[str, Any] = {"lr": 1e-4, "eps": 1e-2, "weight_decay": 0.1, "noise": KINDS[kind], "mask": mask}
        optimizer = ZOOptimizer(model, weights=weights, safeguard=None, **options)
        for _ in range(5):
            optimizer.step(mean_square(model, (x, y)))
        ends.append(snapshot(model))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


@each_kind
def test_an_embedding_of_which_some_rows_are_read_is_that_of_the_whole(kind: str) -> None:
    ends = []
    for weights in ("exact", "copy"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9_000, 64), nn.Linear(64, 1))
        optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2, noise=KINDS[kind], weights=weights, safeguard=None)
        tokens = torch.randint(0, 9_000, (4, 7), generator=torch.Generator().manual_seed(1))
        losses = [float(optimizer.step(mean_square(model, (tokens, torch.zeros(4, 7, 1))))) for _ in range(4)]  # type: ignore[arg-type]
        ends.append((losses, snapshot(model)))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])


def test_a_direction_of_length_zero_stays_zero() -> None:
    """x of this one element is exactly 0 at this step: a chance of 2^-24."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

    model = Scale()
    optimizer = ZOOptimizer(model, 1e-3, eps=1e-3, noise=Sphere(), safeguard=None)
    optimizer.steps = 3_228_864
    optimizer.step(lambda: (model.scale - 2).square())
    assert model.scale.item() == 1.0
    optimizer.step(lambda: (model.scale - 2).square())
    assert model.scale.item() > 1.0


# ---- what is kept


def test_what_is_kept_has_a_bound_in_bytes() -> None:
    kept = Kept(1000)
    for name, count in (("a", 100), ("b", 120), ("c", 300)):  # the last one is larger than all that may be kept
        kept.put(name, torch.zeros(count))
    assert kept.get("a") is not None
    kept.put("d", (torch.zeros(25), torch.zeros(25)))  # 400 + 480 + 200 bytes: what was not asked for longest goes
    assert [name in kept for name in "abcd"] == [True, False, False, True]
    assert kept.bytes == 600
    assert len(kept) == 2


@pytest.mark.parametrize("noise", [LowRank(4), LowRank(4, refresh=1), LowRank(4, orthogonal=True)], ids=str)
def test_many_matrices_are_drawn_once_a_step_and_large_vectors_are_not_kept(noise: LowRank, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["zo_lightning.engine.noise.low_rank"]
    monkeypatch.setattr(module, "_DRAWN", Kept(1 << 26))
    drawn: list[int] = []
    real = module.pairs
    monkeypatch.setattr(module, "pairs", lambda keys, sizes, fused: drawn.extend(sizes) or real(keys, sizes, fused))
    model = nn.ParameterList([nn.Parameter(torch.zeros(20, 6)) for _ in range(300)] + [nn.Parameter(torch.zeros(1_000_000))])
    optimizer = ZOOptimizer(model, 1e-3, eps=1e-3, noise=noise, weights="copy")
    optimizer.step(lambda: sum(p.sum() for p in model))
    assert len(drawn) == 600  # of both evaluations and the update
    assert module._DRAWN.bytes < 1 << 18


def test_values_are_the_same_whatever_they_are_drawn_with() -> None:
    noise = LowRank(3, refresh=1)
    places = [
        Place(key, torch.Size(shape), torch.device("cpu")) for key, shape in enumerate([(40, 7), (300, 200), (5,), (9001,), (12_000, 3)])
    ]
    module = sys.modules["zo_lightning.engine.noise.low_rank"]
    found = []
    for together in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_DRAWN", Kept(1 << 26))
            if together:
                noise.prepare([7, 8], places)
            found.append([noise.values(seed, place, range(math.prod(place.shape))) for seed in (8, 7) for place in places])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- names


def test_options_are_part_of_the_name() -> None:
    noise = as_noise("low_rank(rank=4, orthogonal=True)")
    assert noise == LowRank(4, orthogonal=True) == as_noise(noise.text)
    assert as_noise("low_rank") == LowRank()
    assert as_noise("sphere").text == "sphere"
    assert noise.text == "low_rank(rank=4, refresh=50, orthogonal=True)"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("lowrank", "noise='lowrank' is not known. Use one of"),
        ("low_rank(rank=0)", "rank"),
        ("low_rank(rank=2.5)", "rank"),
        ("low_rank(ranks=2)", "Invalid noise: 'low_rank.ranks=2.'. .*unexpected keyword argument 'ranks'"),
        ("low_rank(refresh=0)", "refresh"),
        ("low_rank(orthogonal=1)", "orthogonal"),
        ("low_rank(4", "no name with options"),
        ("low_rank(rank=print())", "no name with options"),
        ("low_rank(4)", "no name with options"),
        ("low_rank(rank=4, rank=5)", "no name with options"),
        ("sphere(rank=2)", "Invalid noise"),
    ],
)
def test_wrong_names_and_options(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ZOOptimizer(mlp(), lr=1e-3, noise=text)


def test_a_state_of_another_rank_is_refused() -> None:
    state = ZOOptimizer(mlp(), lr=1e-3, noise=LowRank(2)).state_dict()
    ZOOptimizer(mlp(), lr=1e-3, noise=LowRank(2)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"noise='low_rank\(rank=3, .*saved with noise='low_rank\(rank=2"):
        ZOOptimizer(mlp(), lr=1e-3, noise=LowRank(3)).load_state_dict(state)
