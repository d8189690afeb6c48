"""The noise has the moments, the distribution and the independence that SPSA's theory asks for: 4 standard errors at 10 * 2**20 values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from zo_lightning.engine import Gaussian, Noise, Rademacher
from zo_lightning.engine.noise.base import Stretch
from zo_lightning.engine.seeds import parameter_key, query_seed, stream

N = 10 << 20
CHUNK = 1 << 18
NOISES: dict[str, Noise] = {"rademacher": Rademacher(), "gaussian": Gaussian()}
KURTOSIS = {"rademacher": 1.0, "gaussian": 3.0}
EIGHTH = {"rademacher": 1.0, "gaussian": 105.0}

each_noise = pytest.mark.parametrize("name", NOISES)


def draw(name: str, step: int = 0, query: int = 0, parameter: str = "layers.0.weight", count: int = N) -> Tensor:
    """The first `count` values of a parameter at a query of a step, in float32."""
    keys = torch.tensor([stream(query_seed(0, step, query), parameter_key(parameter))], dtype=torch.int32)
    pieces = [NOISES[name].values(keys, [Stretch(0, at, min(CHUNK, count - at))], torch.float32) for at in range(0, count, CHUNK)]
    return torch.cat(pieces)


@pytest.fixture(scope="module")
def samples() -> dict[str, Tensor]:
    return {name: draw(name) for name in NOISES}


def within(mean: float, expected: float, variance: float, count: int) -> bool:
    """Whether a mean over `count` values of that variance is within 4 standard errors; exactly equal where the variance is 0."""
    return abs(mean - expected) <= 4 * math.sqrt(variance / count)


def mean_product(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double())) / a.numel()


@each_noise
def test_mean_is_zero(name: str, samples: dict[str, Tensor]) -> None:
    assert within(float(samples[name].double().mean()), 0.0, 1.0, N)


@each_noise
def test_variance_is_one(name: str, samples: dict[str, Tensor]) -> None:
    assert within(mean_product(samples[name], samples[name]), 1.0, KURTOSIS[name] - 1, N)


@each_noise
def test_fourth_moment_is_that_of_the_distribution(name: str, samples: dict[str, Tensor]) -> None:
    square = samples[name].double().square()
    assert within(mean_product(square, square), KURTOSIS[name], EIGHTH[name] - KURTOSIS[name] ** 2, N)


def below(statistic: float, count: int) -> bool:
    """Kolmogorov's sqrt(n) D has mean 0.8687 and standard deviation 0.2603 where the distribution is right."""
    return math.sqrt(count) * statistic <= 0.8687 + 4 * 0.2603


def test_gaussian_passes_kolmogorov_smirnov(samples: dict[str, Tensor]) -> None:
    ordered = np.sort(samples["gaussian"].double().numpy())
    cdf = stats.norm.cdf(ordered)
    ranks = np.arange(N + 1) / N
    assert below(max(float((cdf - ranks[:-1]).max()), float((ranks[1:] - cdf).max())), N)


def test_rademacher_passes_kolmogorov_smirnov(samples: dict[str, Tensor]) -> None:
    """32 signs in a row, read as the binary digits of a number, are uniform on [0, 1); so is every single sign on {-1, 1}."""
    digits = (samples["rademacher"].view(-1, 32) > 0).double()
    uniform = np.sort((digits @ torch.pow(2.0, -torch.arange(1, 33).double())).numpy())
    ranks = np.arange(uniform.size + 1) / uniform.size
    assert below(max(float((uniform - ranks[:-1]).max()), float((ranks[1:] - uniform).max())), uniform.size)
    assert below(abs(float((samples["rademacher"] < 0).double().mean()) - 0.5), N)


def test_every_one_of_the_64_bits_of_a_hash_is_fair_and_independent_of_the_others(samples: dict[str, Tensor]) -> None:
    """The 64 x 64 second moments of the signs of a word: 2,016 products, so the bound is that of the largest of so many."""
    words = samples["rademacher"].view(-1, 64).double()
    moments = words.T @ words / words.shape[0]
    off = moments[~torch.eye(64, dtype=torch.bool)]
    bound = stats.norm.isf(stats.norm.sf(4.0) / 2016) / math.sqrt(words.shape[0])
    assert float(off.abs().max()) <= bound
    assert float(words.mean(0).abs().max()) <= stats.norm.isf(stats.norm.sf(4.0) / 64) / math.sqrt(words.shape[0])


@each_noise
@pytest.mark.parametrize("lag", [1, 2, 31, 32, 63, 64, 4096, 1 << 18, 1 << 19])
def test_neighbours_are_uncorrelated(name: str, lag: int, samples: dict[str, Tensor]) -> None:
    """Lags of a word, a hash, and of the two values and blocks of Box-Muller."""
    z = samples[name]
    assert within(mean_product(z[lag:], z[:-lag]), 0.0, 1.0, N - lag)


@each_noise
@pytest.mark.parametrize(
    "other",
    [
        {"parameter": "layers.1.weight"},
        {"parameter": "layers.0.bias"},
        {"query": 1},
        {"query": 2},
        {"step": 1},
        {"step": 2},
    ],
    ids=lambda other: " ".join(f"{key} {value}" for key, value in other.items()),
)
def test_parameters_queries_and_consecutive_steps_are_uncorrelated(
    name: str, other: dict[str, int | str], samples: dict[str, Tensor]
) -> None:
    z, second = samples[name], draw(name, **other)  # type: ignore[arg-type]
    assert within(mean_product(z, second), 0.0, 1.0, N)
    assert within(mean_product(z.square() - 1, second.square() - 1), 0.0, (KURTOSIS[name] - 1) ** 2, N)


@each_noise
def test_values_at_the_same_place_of_many_streams_are_fair(name: str) -> None:
    """Short streams, as biases and norms have them: the first 256 values of 210 steps of 200 parameters."""
    rows = [stream(query_seed(0, step, 0), parameter_key(f"layers.{layer}.bias")) for step in range(210) for layer in range(200)]
    keys = torch.tensor(rows, dtype=torch.int32)
    z = NOISES[name].values(keys, [Stretch(row, 0, 256) for row in range(len(rows))], torch.float32).view(210, 200, 256)
    count = z.numel()
    assert count >= 10**7
    assert within(float(z.double().mean()), 0.0, 1.0, count)
    assert within(mean_product(z[1:].reshape(-1), z[:-1].reshape(-1)), 0.0, 1.0, count - 200 * 256)
    assert within(mean_product(z[:, 1:].reshape(-1), z[:, :-1].reshape(-1)), 0.0, 1.0, count - 210 * 256)
