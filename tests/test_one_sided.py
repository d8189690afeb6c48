"""OneSided and Conservative: against naive references that materialise z, their bias and variance, logs, processes."""

from __future__ import annotations

import copy
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import RESIDENCIES, STREAMED, mean_square, mlp, regression, same, snapshot
from reference.spsa import Settings, noise_like
from torch import Tensor
from torch.func import functional_call
from trajectory_tools import Recorder

from zo_lightning.engine import Conservative, Estimator, ForwardGradient, OneSided, Term, ZOOptimizer
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.trajectory import replay

EPS, LR, STEPS = 1e-2, 2e-3, 8
Weights = dict[str, Tensor]


def error(theta: Weights) -> float:
    x, y = regression()
    return float((functional_call(mlp(), theta, (x,)) - y).square().mean())


def moved(theta: Weights, direction: Weights, length: float) -> Weights:
    return {name: w + length * direction[name] for name, w in theta.items()}


def one_sided(theta: Weights, settings: Settings, step: int, normalized: bool) -> tuple[Weights, list[float]]:
    """theta - lr / (n eps) sum_i (l_i - l_0) z_i, over sigma where normalized; and the losses."""
    z = [noise_like(theta, settings, step, i) for i in range(settings.queries)]
    losses = [error(theta), *(error(moved(theta, own, settings.eps)) for own in z)]
    sigma = statistics.stdev(losses[1:]) if normalized else 1.0
    for loss, own in zip(losses[1:], z, strict=True):
        theta = moved(theta, own, -settings.lr * (loss - losses[0]) / (settings.queries * settings.eps * sigma))
    return theta, losses


def conservative(theta: Weights, settings: Settings, step: int) -> tuple[Weights, list[float]]:
    z = noise_like(theta, settings, step, 0)
    losses = [error(moved(theta, z, side * settings.eps)) for side in (1, -1)]
    u = settings.lr * (losses[0] - losses[1]) / (2 * settings.eps)
    return min((moved(theta, z, length) for length in (-u, u, 0.0)), key=error), losses


METHODS: dict[str, tuple[Estimator, Any]] = {
    "one-sided": (OneSided(3), lambda theta, settings, step: one_sided(theta, settings, step, False)),
    "one query": (OneSided(1), lambda theta, settings, step: one_sided(theta, settings, step, False)),
    "normalized": (OneSided(4, normalized=True), lambda theta, settings, step: one_sided(theta, settings, step, True)),
    "conservative": (Conservative(), conservative),
}


@pytest.mark.parametrize("weights", [*RESIDENCIES, STREAMED], ids=str)
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_the_naive_reference(method: str, noise: str, weights: Any) -> None:
    estimator, reference = METHODS[method]
    model, data = mlp(), regression()
    theta = dict(snapshot(model))
    lr = 1e-5 if method == "normalized" else LR
    settings = Settings(lr, eps=EPS, noise=noise, queries=getattr(estimator, "queries", 1))
    optimizer = ZOOptimizer(model, lr=lr, eps=EPS, noise=noise, weights=weights, estimator=estimator)
    for step in range(STEPS):
        theta, losses = reference(theta, settings, step)
        optimizer.step(mean_square(model, data))
        assert optimizer.report is not None
        assert optimizer.report.values == pytest.approx(losses, rel=1e-6)
    with optimizer.settled():
        far = max(float((p - theta[name]).abs().max()) for name, p in model.state_dict().items())
    assert far < (1e-11 if noise == "rademacher" else 1e-6)


@pytest.mark.parametrize("weights", [*RESIDENCIES, STREAMED], ids=str)
@pytest.mark.parametrize("rule", ["random", "small_weights"])
@pytest.mark.parametrize("estimator", [OneSided(3), Conservative()], ids=["one-sided", "conservative"])
def test_masks_and_micro_batches(estimator: Estimator, rule: str, weights: Any) -> None:
    """What a mask leaves out stays, and micro-batches are one batch."""
    ends = []
    for pieces in (1, 4):
        model, (x, y) = mlp(), regression()
        before = snapshot(model)
        mask = Mask(rule, 0.05 if rule == "random" else 0.3)
        optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights=weights, estimator=estimator, mask=mask)
        for _ in range(STEPS):
            for rows in torch.arange(len(x)).chunk(pieces):
                optimizer.estimate(mean_square(model, (x[rows], y[rows])), weight=1 / pieces)
            optimizer.apply()
        with optimizer.settled():
            ends.append(snapshot(model))
        changed = torch.cat([(ends[-1][name] - before[name]).abs().flatten() > 1e-9 for name in before])
        assert 0 < int(changed.sum()) < 0.6 * len(changed)
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_step_log_is_replayed_bit_for_bit(method: str, weights: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, (x, y) = mlp(dtype=dtype), regression(dtype)
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, weights=weights, estimator=METHODS[method][0], safeguard=None)
    recorder = Recorder(optimizer, tmp_path / "run.zolog")
    for _ in range(STEPS):
        optimizer.step(lambda: (model(x) - y).float().square().mean())
    recorder.writer.close()
    again = mlp(dtype=dtype)
    assert replay(again, tmp_path / "run.zolog") == STEPS
    assert same(snapshot(again), snapshot(model))


def test_a_state_goes_on() -> None:
    model, data = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=OneSided(3))
    for _ in range(3):
        optimizer.step(mean_square(model, data))
    again = copy.deepcopy(model)
    second = ZOOptimizer(again, lr=LR, eps=EPS, estimator=OneSided(3))
    second.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        optimizer.step(mean_square(model, data))
        second.step(mean_square(again, data))
    assert same(snapshot(again), snapshot(model))


# ---- what an estimate is on average, and how it varies


def estimates(estimator: Estimator, hessian: np.ndarray, gradient: np.ndarray, eps: float, draws: int) -> np.ndarray:
    """Estimates of the gradient at 0 of L = g'x + x'Hx / 2, with Rademacher noise of numpy; of shape (draws, d)."""
    random = np.random.default_rng(0)
    signs = random.choice([-1.0, 1.0], size=(draws, 8, len(gradient)))
    points = estimator.points(lambda i: i)
    found = []
    for z in signs:
        values = []
        for point in points:
            x = sum((multiple * eps * z[seed] for seed, multiple in point), np.zeros_like(gradient))
            values.append(float(gradient @ x + x @ hessian @ x / 2))
        found.append(sum(term.slope / eps * z[term.seed] for term in estimator.terms(points, values)))
    return np.array(found)


def quadratic(d: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    half = random.normal(size=(d, d))
    return half + half.T, random.normal(size=d)


def test_the_mean_is_the_gradient_within_four_standard_errors() -> None:
    hessian, gradient = quadratic()
    found = estimates(OneSided(2), hessian, gradient, 0.5, 20_000)
    error = found.std(0, ddof=1) / math.sqrt(len(found))
    assert (np.abs(found.mean(0) - gradient) < 4 * error).all()


@pytest.mark.parametrize("queries", [1, 4])
def test_the_variance_on_a_quadratic_is_that_of_theory(queries: int) -> None:
    """With signs z: sum over coordinates = ((d - 1) |g|^2 + d Var(eps/2 z'Hz) + d (eps/2 tr H)^2) / n.

    The last part is of the diagonal, which all signs share, and Var(z'Hz) = 2 sum_{i != j} H_ij^2.
    """
    hessian, gradient = quadratic()
    d, eps = len(gradient), 0.5
    found = estimates(OneSided(queries), hessian, gradient, eps, 20_000)
    off = hessian - np.diag(np.diag(hessian))
    curvature = (eps / 2) ** 2 * (2 * (off**2).sum() + np.trace(hessian) ** 2)
    expected = ((d - 1) * gradient @ gradient + d * curvature) / queries
    assert found.var(0).sum() == pytest.approx(expected, rel=0.05)


def test_the_normalised_step_has_one_size_in_any_unit() -> None:
    """Also: a standard deviation that is zero makes no step, and none is infinite."""
    estimator = OneSided(3, normalized=True)
    points = estimator.points(lambda i: 100 + i)
    assert points == [(), ((100, 1.0),), ((101, 1.0),), ((102, 1.0),)]
    for scale in (1e-6, 1.0, 1e6):
        terms = estimator.terms(points, [scale * value for value in (1.0, 2.0, 4.0, 3.0)])
        assert [term.seed for term in terms] == [100, 101, 102]
        assert [term.slope for term in terms] == pytest.approx([1 / 3, 1.0, 2 / 3])  # sigma is 1
    assert [term.slope for term in estimator.terms(points, [1.0, 2.0, 2.0, 2.0])] == [0.0, 0.0, 0.0]
    x, y = regression()
    model = mlp()
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=estimator, safeguard=None)
    optimizer.step(lambda: (model(x) - y).square().mean() * 0 + 1)
    assert optimizer.report is not None
    assert optimizer.report.zero_difference
    assert same(snapshot(model), before)


def test_values_and_sides() -> None:
    estimator = OneSided(2)
    points = estimator.points(lambda i: 100 + i)
    assert estimator.terms(points, [1.0, 2.0, 0.5]) == [Term(100, 0.5), Term(101, -0.25)]
    assert estimator.sides([1.0, 2.0, 0.5]) == (1.25, 1.0)
    assert estimator.difference([1.0, 2.0, 0.5]) == 1.0


def test_with_processes_of_their_own_data_each_has_its_own_middle() -> None:
    wide = OneSided(2).times(2)
    points = wide.points(lambda i: 100 + i)
    assert points == [(), ((100, 1.0),), ((101, 1.0),), (), ((102, 1.0),), ((103, 1.0),)]
    slopes = [term.slope for term in wide.terms(points, [1.0, 2.0, 0.5, 11.0, 12.0, 10.5])]
    assert slopes == [0.25, -0.125, 0.25, -0.125]
    assert wide.sides([1.0, 2.0, 0.5, 11.0, 12.0, 10.5]) == (6.25, 6.0)
    with pytest.raises(ValueError, match="compares all points of a step with each other"):
        Conservative().times(2)


def test_a_conservative_step_never_makes_the_loss_of_its_data_worse() -> None:
    """Where plain SPSA with the same lr does."""
    data = regression()
    worse = {}
    for estimator in (Conservative(), "spsa"):
        model = mlp()
        optimizer = ZOOptimizer(model, lr=0.5, eps=EPS, estimator=estimator, safeguard=None)
        losses = []
        for _ in range(30):
            losses.append(mean_square(model, data)().item())
            optimizer.step(mean_square(model, data))
        worse[str(estimator)] = sum(later > earlier + 1e-12 for earlier, later in pairwise(losses))
    assert worse[str(Conservative())] == 0
    assert worse["spsa"] > 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: OneSided(0), r"Invalid queries: 0\. Must be an integer >= 1"),
        (lambda: OneSided(1, normalized=True), r"Invalid queries: 1\. Must be an integer >= 2 .*standard deviation"),
        (lambda: OneSided(2, normalized="yes"), r"Invalid normalized: 'yes'\. Must be True or False"),  # type: ignore[arg-type]
        (lambda: ZOOptimizer(mlp(), lr=LR, clip=1.0, estimator=OneSided(2, normalized=True)), "Invalid clip: 1.0"),
    ],
)
def test_what_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("estimator", [OneSided(2), OneSided(3, normalized=True), Conservative(), ForwardGradient(2)], ids=str)
def test_values_of_both_infinities_are_skipped(estimator: Estimator) -> None:
    model = mlp()
    optimizer = ZOOptimizer(model, lr=LR, eps=EPS, estimator=estimator)
    before, signs = snapshot(model), iter([math.inf, -math.inf] * 4)
    optimizer.step(lambda: model(regression()[0]).square().mean() * next(signs))
    assert optimizer.report is not None
    assert optimizer.report.skipped
    assert same(snapshot(model), before)
