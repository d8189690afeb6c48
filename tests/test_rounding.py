"""Stochastic rounding of 16-bit weights: its dither, its arithmetic against float64, its mean, and the same bits on every path."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from reference.noise import query_seed, whole
from reference.rounding import dither, rounded, rounding_seed, unit
from scipy import stats
from torch import Tensor, nn

from zo_lightning import SPSA, ZOOptimizer
from zo_lightning.engine import seeds
from zo_lightning.engine.noise import NOISES, Change, Item, Noise, apply_changes, sweep
from zo_lightning.engine.noise.base import Stretch
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.noise.dither import dither as drawn
from zo_lightning.engine.noise.dither import dither_at
from zo_lightning.engine.noise.rounding import first_by_bits, first_by_rounding, stochastic
from zo_lightning.engine.parameters import Trained, parameter_key

SIXTEEN = [torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", SIXTEEN, ids=["bfloat16", "float16"])
each_noise = pytest.mark.parametrize("name", NOISES)
KEY = 77


def noise_called(name: str) -> Noise:
    return NOISES[name]()  # type: ignore[operator,no-any-return]


def label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def keys(seed: int = 5, key: int = KEY) -> Tensor:
    return torch.tensor([seeds.stream(seed, key, b"zo.round")], dtype=torch.int32)


def weights(dtype: torch.dtype, count: int = 100_000) -> Tensor:
    """Powers of two, their neighbours, zeros, tiny and large values, both signs."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator) * torch.tensor([0.02, 1.0, 1e-5, 8.0]).repeat(-(-count // 4))[:count]
    special = torch.tensor([1.0, -1.0, 0.0, 0.5, -2.0, 2.0**-14, -(2.0**-14), 2.0**-24, 0.0, 1.0 - 2.0**-9])
    values[: special.numel()] = special[:count]
    return values.to(dtype)


def test_dither_is_the_documented_function() -> None:
    assert seeds.rounding_seed(3, 9) == rounding_seed(3, 9)
    every = drawn(keys(), [Stretch(0, 0, 1000)])
    assert np.array_equal(every.numpy(), dither(5, KEY, 1000))
    assert torch.equal(drawn(keys(), [Stretch(0, 130, 70), Stretch(0, 3, 500)]), torch.cat([every[130:200], every[3:503]]))
    if available("cpu"):  # which also takes the warnings of the first compilation
        assert torch.equal(drawn(keys(), [Stretch(0, 0, 1000)], fused=True), every)
    index = torch.tensor([[999, 0], [63, 64]])
    assert torch.equal(dither_at(index, keys()[0]), every[index])


def test_dither_is_uniform_and_uncorrelated() -> None:
    blocks = 40_000
    values = drawn(keys(), [Stretch(0, 0, 64 * blocks)]).double()
    assert abs(float(values.mean())) < 4 / math.sqrt(12 * values.numel())
    assert stats.kstest(values[: 64 * 2000].numpy() + 0.5, "uniform").pvalue > 1e-4
    table = values.view(blocks, 64)
    correlation = torch.corrcoef(table.t()) - torch.eye(64)
    assert float(correlation.abs().max()) < 6 / math.sqrt(blocks)  # 2016 pairs of lanes
    assert float(torch.corrcoef(torch.stack([values[:-64], values[64:]]))[0, 1].abs()) < 4 / math.sqrt(values.numel())
    signs = torch.from_numpy(whole("rademacher", 5, "w", 64 * 1000))
    assert float((signs * values[: 64 * 1000]).mean().abs()) < 4 / math.sqrt(12 * 64_000)


@each_dtype
@pytest.mark.parametrize("scale", [1e-3, 3e-6, 0.3])
def test_rounding_agrees_with_float64(dtype: torch.dtype, scale: float) -> None:
    base = weights(dtype)
    change = torch.randn(base.shape, generator=torch.Generator().manual_seed(1)) * scale
    v = drawn(keys(), [Stretch(0, 0, base.numel())])
    got = stochastic(base.float(), change, v, dtype)
    assert torch.equal(got, got.to(dtype).float())  # on the grid
    want = torch.from_numpy(rounded(base.double().numpy(), change.double().numpy(), v.double().numpy(), label(dtype)))
    differ = got.double() != want
    assert float(differ.double().mean()) < 1e-4  # float32 may decide otherwise within 2**-22 of a tie
    spacing = torch.from_numpy(unit(base.double().numpy() + change.double().numpy(), label(dtype)))
    assert float(((got.double() - (base.double() + change.double())).abs() / spacing).max()) <= 1 + 1e-6


def test_both_ways_to_the_first_place_agree() -> None:
    values = torch.cat([weights(torch.float16).float(), torch.randn(100_000) * 1e-3, 2.0 ** torch.arange(-100, 100).float()])
    values = torch.cat([values, values.nextafter(torch.tensor(torch.inf)), values.nextafter(torch.tensor(-torch.inf))])
    values = values.abs()[values.abs() > 1e-31]
    assert torch.equal(first_by_rounding(values), first_by_bits(values))
    assert torch.equal(first_by_bits(values), 2.0 ** torch.frexp(values).exponent.sub(1).double().float())


@each_dtype
def test_no_change_changes_nothing(dtype: torch.dtype) -> None:
    base = weights(dtype).float()
    for v in (-0.5, -0.4999999, 0.0, 0.4999999, 0.5):
        assert torch.equal(stochastic(base, torch.zeros_like(base), torch.full_like(base, v), dtype), base)


@each_dtype
@pytest.mark.parametrize("theta", [1.0, -1.0, 0.02, 0.9999, 0.25, 3e-5, 0.0])
@pytest.mark.parametrize("c", [1e-7, -3e-6, 1e-3])
def test_the_mean_is_exact_however_small_the_change(dtype: torch.dtype, theta: float, c: float) -> None:
    count = 1 << 20
    base = torch.full((count,), theta, dtype=dtype)
    change = torch.full((count,), c)
    v = drawn(keys(seed=11), [Stretch(0, 0, count)])
    moved = stochastic(base.float(), change, v, dtype).double() - base.double()
    error = float(moved.std()) / math.sqrt(count)
    assert abs(float(moved.mean()) - float(change[0].double())) <= 5 * error + 2e-7 * abs(c)
    assert error > 0 or theta == 0.0


def test_nearest_rounding_would_fail_that_test() -> None:
    base = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    assert torch.equal((base.float() + 1e-4).bfloat16(), base)


def swept(
    name: str, dtype: torch.dtype, some: tuple[int, ...], coefficients: tuple[float, ...], decay: float, rounding: int
) -> list[Tensor]:
    items = []
    for key, shape in enumerate([(70_000,), (333,), (300, 301), (5, 7), (), (0,)]):
        base = weights(dtype, math.prod(shape)).view(shape)
        items.append(Item(base, base, key, decay, coefficients))
    sweep(items, some, noise_called(name), rounding=rounding)
    return [item.out for item in items]


@each_noise
@each_dtype
@pytest.mark.parametrize(("coefficients", "decay"), [((1e-3,), 1.0), ((-3e-6, 2e-5, 1e-3), 0.999)])
def test_a_sweep_rounds_like_the_reference(name: str, dtype: torch.dtype, coefficients: tuple[float, ...], decay: float) -> None:
    some = tuple(range(1, len(coefficients) + 1))
    for key, got in enumerate(swept(name, dtype, some, coefficients, decay, 9)):
        count = got.numel()
        base = weights(dtype, count).double().numpy()
        z = [reference_noise(name, seed, key, tuple(got.shape)) for seed in some]
        change = base * (decay - 1.0) + sum(c * row for c, row in zip(coefficients, z, strict=True))
        want = rounded(base, change, dither(9, key, count).astype(np.float64), label(dtype))
        differ = got.double().view(-1).numpy() != want
        assert differ.sum() <= max(1, 2e-4 * count)


def reference_noise(name: str, seed: int, key: int, shape: tuple[int, ...]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    from reference import noise as reference

    if not math.prod(shape):
        return np.zeros(0)
    return getattr(reference, name)(seed, key, np.arange(math.prod(shape)) if name in reference.NOISES else shape)  # type: ignore[no-any-return]


@each_dtype
def test_every_path_gives_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = swept("rademacher", dtype, (1, 2), (1e-3, 1e-4), 0.99, 4) + swept("rademacher", dtype, (1,), (1e-3,), 1.0, 4)
    for module in ("sweep", "changes", "compiling"):
        monkeypatch.setattr(sys.modules[f"zo_lightning.engine.noise.{module}"], "available", lambda kind: False)
    eager = swept("rademacher", dtype, (1, 2), (1e-3, 1e-4), 0.99, 4) + swept("rademacher", dtype, (1,), (1e-3,), 1.0, 4)
    assert all(map(torch.equal, compiled, eager))


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32, torch.float64], ids=str)
@each_noise
def test_many_changes_at_once_are_one_after_another(name: str, dtype: torch.dtype) -> None:
    def fresh() -> list[Trained]:
        shapes = [(70_000,), (333,), (300, 301), (5, 7), (3, 2_200_001)]
        tensors = [weights(dtype, math.prod(shape)).view(shape) for shape in shapes]
        tensors[2] = tensors[2].t()
        return [Trained(str(i), i, tensor, i % 2, (tensor,)) for i, tensor in enumerate(tensors)]

    changes = []
    for step in range(5):
        groups = ((1.0, (1e-3, 2e-4)), (0.99, (3e-6, 0.0))) if step != 3 else ((1.0, (0.0, 0.0)), (1.0, (1e-3, 1e-3)))
        changes.append(Change((2 * step, 2 * step + 1), groups, step if step != 4 else None))
    at_once, one_by_one = fresh(), fresh()
    apply_changes(at_once, changes, noise_called(name))
    for change in changes:
        items = [Item(p.tensor, p.tensor, p.key, *change.steps[p.group]) for p in one_by_one]
        items = [item for item in items if item.decay != 1.0 or any(item.coefficients)]
        sweep(items, change.seeds, noise_called(name), rounding=change.rounding)
    for left, right, start in zip(at_once, one_by_one, fresh(), strict=True):
        assert torch.equal(left.tensor, right.tensor)
        assert not torch.equal(left.tensor, start.tensor)


@each_dtype
@pytest.mark.parametrize("where", ["exact", "copy", "inplace"])
def test_an_update_of_the_optimizer_rounds_with_the_seed_of_its_step(dtype: torch.dtype, where: str) -> None:
    model = nn.Sequential(nn.Linear(300, 1, bias=False, dtype=dtype))
    before = model[0].weight.detach().clone()
    optimizer = ZOOptimizer(model, lr=1e-5, weights=where, estimator=SPSA(2), weight_decay=0.5, seed=3)
    values = iter([*([0.0] if where == "exact" else []), 1.0, 0.9, 1.0, 1.2])  # exact watches a forward pass first
    optimizer.estimate(lambda: (model(torch.ones(300, dtype=dtype)), next(values))[1])
    held = model[0].weight.detach().clone()
    if where != "inplace":
        assert torch.equal(held, before)
    optimizer.apply()
    base = held.double().view(-1).numpy()
    slopes = [0.1 / 2e-3 / 2, -0.2 / 2e-3 / 2]
    z = [whole("rademacher", query_seed(3, 0, query), "weight", 300) for query in range(2)]
    change = base * (-1e-5 * 0.5) - sum(1e-5 * g * row for g, row in zip(slopes, z, strict=True))
    v = dither(rounding_seed(3, 0), parameter_key("weight"), 300).astype(np.float64)
    got = model[0].weight.detach().double().view(-1).numpy()
    assert (got != rounded(base, change, v, label(dtype))).sum() <= 1
    assert (got != base).any()


@each_dtype
def test_the_probed_direction_is_z_where_eps_is_below_half_a_unit(dtype: torch.dtype) -> None:
    """A gain of 1 has neighbours 2**-7 away in bfloat16: rounded to nearest, eps = 1e-3 would never reach it."""
    gain = nn.Parameter(torch.ones(40_000, dtype=dtype))
    seen: list[Tensor] = []
    optimizer = ZOOptimizer([("gain", gain)], lr=0.0, weights="copy", eps=1e-3)
    optimizer.estimate(lambda: (seen.append(gain.detach().clone()), float(len(seen)))[1])
    z = torch.from_numpy(whole("rademacher", query_seed(0, 0, 0), "gain", 40_000))
    slope = z * (seen[0].double() - seen[1].double()) / 2e-3
    assert abs(float(slope.mean()) - 1.0) < 4 * float(slope.std()) / 200
    assert bool((gain == 1.0).all())
