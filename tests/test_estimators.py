"""SPSA: equal to its naive reference step by step, and on average the gradient of autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from engine_models import bits, mean_square, mlp, regression
from reference import noise as reference
from reference.spsa import Settings, noise_like, spsa_step
from torch import Tensor, nn
from torch.func import functional_call

from zo_lightning.engine import SPSA, Coordinatewise, Term, UpdateRule, ZOOptimizer
from zo_lightning.engine.estimators import centred_ranks, z_scores
from zo_lightning.engine.updates import SGD, GroupSettings

STEPS = 100


def reference_run(
    model: nn.Module, settings: Settings, steps: int, data: tuple[Tensor, Tensor]
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """The weights after `steps` steps that materialise every z, and the losses of each."""
    theta = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return float(mean_square(lambda x: functional_call(model, weights, (x,)), data)())

    values = []
    for step in range(steps):
        theta, losses = spsa_step(theta, loss, settings, step)
        values.append(losses)
    return theta, values


CASES = {
    "one query": ({}, {}),
    "four queries": ({"estimator": SPSA(4)}, {"queries": 4}),
    "weight decay": ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "clip": ({"clip": 0.2}, {"clip": 0.2}),
    "clip of four queries": ({"estimator": SPSA(4), "clip": 0.2}, {"queries": 4, "clip": 0.2}),
    "another seed": ({"seed": 7}, {"seed": 7}),
    "a wide perturbation": ({"eps": 0.1}, {"eps": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_rademacher_steps_equal_the_reference_bit_for_bit_in_float64(case: str) -> None:
    """The engine makes the same roundings in the same order: theta + eps z, c_1 z_1 + c_2 z_2 + ..., decay * theta + that sum."""
    ours, theirs = CASES[case]
    data, model = regression(), mlp()
    expected, losses = reference_run(mlp(), Settings(0.02, **theirs), STEPS, data)
    optimizer = ZOOptimizer(model, lr=0.02, weights="copy", **ours)
    for step in range(STEPS):
        optimizer.step(mean_square(model, data))
        assert optimizer.report is not None
        assert list(optimizer.report.values) == losses[step]
    assert all(torch.equal(bits(weight), bits(expected[name])) for name, weight in model.named_parameters())


@pytest.mark.parametrize("weights", ["copy", "exact", "inplace"])
@pytest.mark.parametrize("case", [*CASES, "three queries"])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_steps_equal_the_reference_to_rounding(case: str, noise: str, weights: str) -> None:
    """Gaussian values come from float32 functions, in-place weights return up to rounding: both far below 1e-5 over 100 steps."""
    ours, theirs = {**CASES, "three queries": ({"estimator": SPSA(3)}, {"queries": 3})}[case]
    data, model = regression(), mlp()
    expected, losses = reference_run(mlp(), Settings(0.005, noise=noise, **theirs), STEPS, data)
    optimizer = ZOOptimizer(model, lr=0.005, noise=noise, weights=weights, **ours)
    for step in range(STEPS):
        optimizer.step(mean_square(model, data))
        assert optimizer.report is not None
        assert optimizer.report.values == pytest.approx(losses[step], rel=1e-5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=0, atol=1e-5)


def test_groups_have_their_own_lr_eps_and_decay_as_in_the_reference() -> None:
    data, model = regression(), mlp()
    named = dict(model.named_parameters())
    special = {"lr": 0.01, "eps": 3e-3, "weight_decay": 0.2}
    expected, losses = reference_run(mlp(), Settings(0.02, overrides={"3.weight": special, "3.bias": special}), STEPS, data)
    groups = [{"params": [named["0.weight"]]}, {"params": [named["3.weight"], named["3.bias"]], **special}]
    optimizer = ZOOptimizer(groups, lr=0.02, module=model)
    for step in range(STEPS):
        optimizer.step(mean_square(model, data))
        assert optimizer.report is not None
        if step == 0:
            assert list(optimizer.report.values) == losses[0]
    # the slope is divided by eps where the reference divides by 2 eps: the same rounding only where eps is one for all groups
    assert all(torch.allclose(weight, expected[name], rtol=0, atol=1e-12) for name, weight in named.items())


# ---- unbiasedness


@dataclass(frozen=True)
class Recorder(UpdateRule):
    """Keeps every term and leaves the weights alone."""

    terms: list[Term] = field(default_factory=list)

    def step(self, terms: Sequence[Term], group: GroupSettings) -> tuple[float, tuple[float, ...]]:
        self.terms.extend(Term(term.seed, term.slope / group.eps) for term in terms)
        return 1.0, (0.0,) * len(terms)

    def projected(self, terms: Sequence[Term], eps: float) -> list[float]:
        return [term.slope / eps for term in terms]


def mean_estimate(model: nn.Module, terms: Sequence[Term], noise: str, steps: int) -> Tensor:
    """sum_j g_j z_j / steps with the z of the reference, flat over the parameters."""
    total = []
    for name, weight in model.named_parameters():
        key, index = reference.parameter_key(name), np.arange(weight.numel())
        total.append(sum(term.slope * reference.NOISES[noise](term.seed, key, index) for term in terms))
    return torch.from_numpy(np.concatenate(total)) / steps


def gradients(model: nn.Module, data: tuple[Tensor, Tensor], steps: int) -> tuple[Tensor, float]:
    """(mean gradient over the dropout masks of these steps, mean of their squared lengths), by autograd."""
    total, square = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64), 0.0
    for step in range(steps):
        torch.manual_seed(reference.evaluation_seed(0, step, 0))
        grads = torch.autograd.grad(mean_square(model, data)(), list(model.parameters()))
        flat = torch.cat([g.flatten() for g in grads])
        total += flat
        square += float(flat @ flat)
    return total / steps, square / steps


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_the_mean_of_20000_estimates_with_dropout_is_the_gradient(noise: str, queries: int) -> None:
    """cos(estimate, gradient) = (1 + (d - 1) r / N)^-1/2 for N queries and d weights, within 4 standard errors.

    Every step has a dropout mask of its own, the same on both sides; G_t is the gradient under it. The error of the mean has d - 1
    components across the mean gradient G, each of variance mean |G_t|^2 / N: so r = mean |G_t|^2 / |G|^2, which is 1 without dropout. Its
    square is chi-squared with d - 1 degrees of freedom, so 1 - cos has a relative standard error of sqrt(2 / (d - 1)). Were the masks of
    the two sides different, the cosine would be near 0.
    """
    total = 20_000
    steps, data, model = total // queries, regression(), mlp(dropout=0.1)
    recorder = Recorder()
    optimizer = ZOOptimizer(model, lr=0.0, noise=noise, estimator=SPSA(queries), update=recorder, safeguard=None)
    for _ in range(steps):
        optimizer.step(mean_square(model, data))
    estimate = mean_estimate(model, recorder.terms, noise, steps)
    gradient, square = gradients(model, data, steps)
    d = gradient.numel()
    cosine = float(torch.nn.functional.cosine_similarity(estimate, gradient, dim=0))
    expected = (1 + (d - 1) * square / float(gradient @ gradient) / total) ** -0.5
    assert len(recorder.terms) == total
    assert abs(cosine - expected) <= 4 * (1 - expected) * math.sqrt(2 / (d - 1))
    assert float(estimate.norm() / gradient.norm()) == pytest.approx(1.0, abs=4 * math.sqrt(3 / total) + (1 / expected - 1))


# ---- the pure functions


def test_points_are_plus_and_minus_eps_along_the_seed_of_each_query() -> None:
    assert SPSA(2).points(lambda query: 100 + query) == [((100, 1.0),), ((100, -1.0),), ((101, 1.0),), ((101, -1.0),)]


def test_terms_are_half_the_differences_over_the_number_of_queries() -> None:
    points = SPSA(2).points(lambda query: 100 + query)
    assert SPSA(2).terms(points, [5.0, 1.0, 2.0, 3.0]) == [Term(100, 1.0), Term(101, -0.25)]
    assert SPSA(2).sides([5.0, 1.0, 2.0, 3.0]) == (3.5, 2.0)


@pytest.mark.parametrize(
    ("clip", "coefficients"),
    [(None, (-0.5, 0.25)), (3.0, (-0.15, 0.15)), (10.0, (-0.5, 0.25)), (1e-3, (-5e-5, 5e-5))],
    ids=["no clip", "clips each query", "wide", "narrow"],
)
def test_clip_bounds_the_projected_gradient_of_each_query(clip: float | None, coefficients: tuple[float, float]) -> None:
    """Slopes 0.05 and -0.025 over eps 0.01 are 5 and -2.5, already divided by 2 queries: 10 and -5 before."""
    decay, got = SGD(clip=clip).step([Term(1, 0.05), Term(2, -0.025)], GroupSettings(lr=0.1, eps=0.01, weight_decay=0.5))
    assert decay == 0.95
    assert got == pytest.approx(coefficients)


def test_fitness_written_out() -> None:
    assert centred_ranks([3.0, -1.0, 10.0, 0.0, 1e9]) == [0.0, -0.5, 0.25, -0.25, 0.5]
    assert centred_ranks([2.0, 1.0, 2.0, 3.0]) == [0.0, -0.5, 0.0, 0.5]  # equal ones share the mean of their ranks
    assert centred_ranks([4.0]) == [0.0]
    assert z_scores([1.0, 3.0]) == [-1.0, 1.0]
    assert z_scores([5.0, 5.0]) == [0.0, 0.0]
    assert z_scores([1e200, -1e200]) == pytest.approx([1.0, -1.0])
    drawn = np.random.default_rng(0).normal(size=50)
    assert z_scores(drawn.tolist()) == pytest.approx(((drawn - drawn.mean()) / drawn.std()).tolist())
    assert centred_ranks(drawn.tolist()) == pytest.approx((np.argsort(np.argsort(drawn)) / 49 - 0.5).tolist())


@pytest.mark.parametrize("fitness", ["ranks", "z-scores"])
def test_steps_with_fitness_are_those_of_the_reference_on_shaped_values(fitness: str) -> None:
    """The estimate is of the shaped values; what is reported are the values."""
    data, model = regression(), mlp()
    optimizer = ZOOptimizer(model, lr=1e-4, estimator=SPSA(3, fitness=fitness), weights="copy")
    theta = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    frame = mlp()

    def loss(weights: dict[str, Tensor]) -> float:
        return float(mean_square(lambda x: functional_call(frame, weights, (x,)), data)())

    for step in range(5):
        directions = [noise_like(theta, Settings(1e-4), step, query) for query in range(3)]
        values = [loss({n: w + eps * z[n] for n, w in theta.items()}) for z in directions for eps in (1e-3, -1e-3)]
        spread = np.array(values)
        shaped = (spread - spread.mean()) / spread.std() if fitness == "z-scores" else np.argsort(np.argsort(spread)) / 5 - 0.5
        for i, z in enumerate(directions):
            g = (shaped[2 * i] - shaped[2 * i + 1]) / 2e-3 / 3
            theta = {name: weight - 1e-4 * g * z[name] for name, weight in theta.items()}
        optimizer.step(mean_square(model, data))
        assert optimizer.report is not None
        assert optimizer.report.values == pytest.approx(values, rel=1e-9)
        assert optimizer.report.loss == pytest.approx(spread.mean())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), theta[name], rtol=0, atol=1e-9)


def test_with_one_query_fitness_is_the_sign_whatever_the_unit() -> None:
    for scale in (1e-6, 1.0, 1e6):
        for kind, slope in (("ranks", 0.5), ("z-scores", 1.0)):
            estimator = SPSA(fitness=kind)
            (term,) = estimator.terms(estimator.points(lambda query: 7), [scale * 2, scale * 3])
            assert term == Term(7, pytest.approx(-slope))
            assert estimator.difference([scale * 2, scale * 3]) == scale * 3 - scale * 2


def test_a_fitness_that_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"fitness='rank' is not known\. Use one of 'values', 'ranks', 'z-scores'"):
        SPSA(4, fitness="rank")


def test_an_estimator_that_is_set_later_is_the_one_that_evaluates() -> None:
    model, data = mlp(), regression()
    optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2)
    optimizer.step(mean_square(model, data))
    optimizer.estimator = SPSA(3)
    optimizer.step(mean_square(model, data))
    assert optimizer.report is not None
    assert len(optimizer.report.values) == 6
    with pytest.raises(ValueError, match=r"Invalid estimator: Coordinatewise.* Make a new ZOOptimizer"):
        optimizer.estimator = Coordinatewise()
    assert optimizer.estimator == SPSA(3)
