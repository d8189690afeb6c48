"""The evaluations of a step: one perturbation a window, the same randomness and buffers on both sides, and nothing left behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from engine_models import (
    RESIDENCIES,
    Images,
    distance,
    mean_square,
    mlp,
    pictures,
    regression,
    same,
    snapshot,
    task,
    train,
)
from torch import Tensor, nn

from zo_lightning.engine import SPSA, Exchange, ZOOptimizer

ROUNDING = {"exact": 0.0, "copy": 0.0, "inplace": 1e-15}


def parts(count: int) -> list[tuple[Tensor, Tensor]]:
    x, y = regression()
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


# ---- one perturbation a window


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_window_of_micro_batches_has_one_perturbation_and_the_next_another(weights: str, queries: int) -> None:
    model, seen = mlp(), []
    start = model[0].weight.detach().clone()
    optimizer = ZOOptimizer(model, lr=0.0, eps=0.5, weights=weights, estimator=SPSA(queries))
    model[0].register_forward_hook(lambda module, *args: seen.append((module.weight.detach() - start).sign()))
    windows = []
    for _ in range(2):
        for part in parts(4):
            seen.clear()
            optimizer.estimate(mean_square(model, part), weight=0.25)
            windows.append(torch.stack(seen[-2 * queries :]))
        optimizer.apply()
    first, second = windows[:4], windows[4:]
    assert all(torch.equal(signs, first[0]) for signs in first)
    assert all(torch.equal(signs, second[0]) for signs in second)
    for signs in (first[0], second[0]):
        assert torch.equal(signs[::2], -signs[1::2])
    every = torch.cat([first[0][::2], second[0][::2]]).flatten(1)
    assert every.abs().min() == 1
    assert every.unique(dim=0).shape[0] == 2 * queries


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_an_accumulated_window_is_one_large_batch(weights: str) -> None:
    models = []
    for count in (1, 4):
        model = mlp()
        optimizer = ZOOptimizer(model, lr=0.1, weights=weights)
        for _ in range(5):
            for part in parts(count):
                optimizer.estimate(mean_square(model, part), weight=1 / count)
            optimizer.apply()
        assert optimizer.steps == 5
        assert optimizer.forward_passes == 10 * count
        models.append(model)
    assert distance(snapshot(models[0]), snapshot(mlp())) > 0
    assert distance(snapshot(models[0]), snapshot(models[1])) < 1e-10


def test_step_is_estimate_and_apply_and_returns_the_mean_loss() -> None:
    model, halves = mlp(), mlp()
    whole, other = ZOOptimizer(model, lr=0.1, weights="copy"), ZOOptimizer(halves, lr=0.1, weights="copy")
    for _ in range(3):
        loss = whole.step(mean_square(model, regression()))
        estimate = other.estimate(mean_square(halves, regression()))
        report = other.apply()
        assert report is not None
        assert loss is not None
        assert loss.dtype == torch.float64
        assert loss.shape == ()
        assert float(loss) == float(estimate.loss) == report.loss == sum(report.values) / 2
    assert same(snapshot(model), snapshot(halves))


def test_a_discarded_window_counts_for_nothing() -> None:
    model, alike = mlp(), mlp()
    optimizer = ZOOptimizer(model, lr=0.1)
    optimizer.estimate(lambda: mean_square(model, regression())() * 100)
    optimizer.discard()
    assert optimizer.apply() is None
    train(optimizer, mean_square(model, regression()))
    train(ZOOptimizer(alike, lr=0.1), mean_square(alike, regression()))
    assert same(snapshot(model), snapshot(alike))


# ---- common random numbers


def masks(optimizer: ZOOptimizer, model: nn.Module, micro_batches: int = 1) -> list[list[Tensor]]:
    """Of each micro-batch, which units each of its evaluations dropped."""
    seen: list[Tensor] = []
    handle = model[2].register_forward_hook(lambda module, args, output: seen.append(output == 0))
    result = []
    for _ in range(micro_batches):
        seen.clear()
        optimizer.estimate(mean_square(model, regression()))
        result.append(list(seen))
    optimizer.apply()
    handle.remove()
    return result


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_dropout_masks_are_equal_at_all_points_and_new_in_every_micro_batch_and_step(weights: str) -> None:
    model = mlp(dropout=0.5)
    optimizer = ZOOptimizer(model, weights=weights, estimator=SPSA(2))
    batches = [batch for _ in range(3) for batch in masks(optimizer, model, 2)]
    for batch in batches:
        assert len(batch) >= 4
        assert all(torch.equal(mask, batch[0]) for mask in batch)
    drawn = torch.stack([batch[0] for batch in batches])
    assert 0.3 < float(drawn.double().mean()) < 0.7
    assert drawn.flatten(1).unique(dim=0).shape[0] == 6


def test_dropout_masks_are_a_function_of_the_run_seed_the_step_and_the_rank() -> None:
    def first_mask(seed: int = 0, steps: int = 0, rank: int = 0, draws: int = 0) -> Tensor:
        model = mlp(dropout=0.5)
        optimizer = ZOOptimizer(model, seed=seed)
        optimizer.steps = steps
        optimizer.exchange = Exchange()
        optimizer.exchange.stream = rank
        torch.rand(draws)
        return masks(optimizer, model)[0][0]

    assert torch.equal(first_mask(), first_mask(draws=7))  # whatever the host drew
    others = torch.stack([first_mask(), first_mask(seed=1), first_mask(steps=1), first_mask(rank=1)])
    assert others.flatten(1).unique(dim=0).shape[0] == 4


GENERATORS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand((), dtype=torch.float64)),
    "numpy": lambda: float(np.random.rand()),
    "random": random.random,
}


@pytest.mark.parametrize("source", GENERATORS)
def test_a_forward_that_draws_random_numbers_draws_the_same_at_both_points(source: str) -> None:
    """The loss is u w with u uniform: the difference is 2 eps u, where independent draws would give about w."""
    weight = nn.Parameter(torch.tensor([100.0], dtype=torch.float64))
    optimizer = ZOOptimizer([weight], lr=0.0, eps=1e-3)
    drawn: list[float] = []

    def closure() -> Tensor:
        drawn.append(GENERATORS[source]())
        return drawn[-1] * weight.sum()

    for _ in range(4):
        optimizer.step(closure)
        assert optimizer.report is not None
        assert abs(optimizer.report.projected_grad) == pytest.approx(drawn[-1], rel=1e-6)
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("fails", [False, True])
def test_the_generators_of_the_host_go_on_as_if_nothing_had_been_drawn(fails: bool) -> None:
    model = mlp(dropout=0.5)

    def closure() -> Tensor:
        for draw in GENERATORS.values():
            draw()
        if fails:
            raise ValueError("bad batch")
        return mean_square(model, regression())()

    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    optimizer = ZOOptimizer(model)
    try:
        optimizer.step(closure)
    except ValueError:
        assert fails
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2]


# ---- buffers


class Counting(nn.Module):
    """Buffers that are written, replaced, of an integer type, constant, absent, and written only after `quiet` forwards."""

    def __init__(self, quiet: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))
        self.register_buffer("written", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("replaced", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("constant", torch.ones(3))
        self.register_buffer("absent", None)
        self.quiet = quiet

    def forward(self) -> Tensor:
        self.calls += 1
        if int(self.calls) > self.quiet:
            self.written.add_(self.weight.detach())
            self.replaced = self.replaced + self.weight.detach()
        return (self.weight - 1).square().sum()


@pytest.mark.parametrize("quiet", [0, 2])
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_buffers_advance_once_a_step_as_the_first_evaluation_leaves_them(weights: str, quiet: int) -> None:
    model = Counting(quiet)
    constant = model.constant
    optimizer = ZOOptimizer(model, lr=0.01, eps=0.25, weights=weights, estimator=SPSA(2))
    total = torch.zeros(2, dtype=torch.float64)
    for step in range(5):
        firsts: list[Tensor] = []

        def closure(firsts: list[Tensor] = firsts) -> Tensor:
            value = model()
            firsts.append(model.replaced.detach().clone())
            return value

        before = model.replaced.clone()
        optimizer.step(closure)
        first = firsts[1 if weights == "exact" and step == 0 else 0]  # the very first forward is a watched one
        total = total + (first - before)
        assert int(model.calls) == step + 1
        assert torch.equal(model.written, model.replaced)
        assert torch.equal(model.replaced, total)
        assert bool(total.any()) == (step >= quiet)
    assert model.constant is constant
    assert model.absent is None


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_running_statistics_are_those_of_forwards_at_the_first_point_alone(weights: str) -> None:
    model, loss = task("BatchNorm and channels-last convolutions")
    optimizer = ZOOptimizer(model, lr=0.01, eps=0.1, weights=weights)
    twin = copy.deepcopy(model)
    for _ in range(3):
        points: list[dict[str, Tensor]] = []
        handle = model.blocks[0][0].register_forward_hook(lambda m, a, o, p=points: p.append({"x": a[0].clone(), "y": o.clone()}))
        optimizer.step(loss)
        handle.remove()
        assert len(points) >= 2
        plus = points[-2]  # the first statistics see the output of this convolution at the first point
        twin.blocks[0][1](plus["y"])
    ours, theirs = model.blocks[0][1], twin.blocks[0][1]
    assert int(ours.num_batches_tracked) == int(model.blocks[1][1].num_batches_tracked) == 3
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("point", [1, 2])
def test_after_an_error_buffers_are_as_the_first_evaluation_left_them_or_as_they_were(point: int) -> None:
    torch.manual_seed(0)
    model = Images().double()
    optimizer, calls = ZOOptimizer(model), []

    def closure() -> Tensor:
        loss = pictures(model)()
        calls.append(loss)
        if len(calls) == point:
            raise ValueError("bad batch")
        return loss

    before = snapshot(model)
    with pytest.raises(ValueError, match="bad batch"):
        optimizer.estimate(closure)
    after = snapshot(model)
    assert int(after["blocks.0.1.num_batches_tracked"]) == point - 1
    assert same(before, after) == (point == 1)


# ---- what the closure returns


@contextmanager
def muting(log: list[str]) -> Iterator[None]:
    log.append("[")
    yield
    log.append("]")


@pytest.mark.parametrize(("weights", "expected"), [("copy", "1[2][3][4]"), ("inplace", "1[2][3][4]"), ("exact", "[1]2[3][4][5]")])
def test_all_evaluations_but_the_first_are_muted_and_its_output_is_returned(weights: str, expected: str) -> None:
    """Before the first, the exact mode watches a forward whose output nobody sees."""
    model, log = mlp(), []

    def closure() -> dict[str, object]:
        log.append(str(1 + sum(entry.isdigit() for entry in log)))
        return {"loss": mean_square(model, regression())(), "call": log[-1]}

    optimizer = ZOOptimizer(model, weights=weights, estimator=SPSA(2))
    estimate = optimizer.estimate(closure, muted=lambda: muting(log), loss_of=lambda output: output["loss"])
    report = optimizer.apply()
    assert "".join(log) == expected
    assert estimate.output["call"] == ("2" if weights == "exact" else "1")
    assert report is not None
    assert float(estimate.output["loss"]) == report.values[0]
    assert optimizer.forward_passes == 4


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_micro_batch_without_a_loss_is_skipped(weights: str) -> None:
    """A training_step may return None."""
    model, alike = mlp(), mlp()
    before = snapshot(model)
    optimizer, other = ZOOptimizer(model, lr=0.1, weights=weights), ZOOptimizer(alike, lr=0.1, weights=weights)
    estimate = optimizer.estimate(lambda: None)
    assert estimate.output is None
    assert estimate.loss is None
    assert optimizer.apply() is None
    assert optimizer.steps == 0
    assert distance(before, snapshot(model)) <= ROUNDING[weights]
    optimizer.estimate(lambda: None)
    optimizer.estimate(mean_square(model, regression()))
    other.estimate(mean_square(alike, regression()))
    mine, theirs = optimizer.apply(), other.apply()
    assert mine is not None
    assert theirs is not None
    assert mine.values == pytest.approx(theirs.values, rel=1e-12)
