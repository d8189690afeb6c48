"""Closures that go wrong: what is no loss, not finite, calls backward, evaluates something else. The weights stay as they were."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from engine_models import RESIDENCIES, distance, mean_square, mlp, next_token, regression, same, sequence_model, snapshot, train
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer, ZOWarning

ROUNDING = {"exact": 0.0, "copy": 0.0, "inplace": 1e-15}

NO_LOSS: dict[str, tuple[Callable[[Tensor], object], type[Exception], str]] = {
    "a vector": (lambda loss: loss.expand(4), ValueError, r"a loss of shape \(4,\); it must be a scalar. Reduce it"),
    "nothing": (lambda loss: loss.new_empty(0), ValueError, r"a loss of shape \(0,\)"),
    "complex": (lambda loss: loss.to(torch.complex128), ValueError, "a loss of dtype torch.complex128; it must be real"),
    "complex number": (lambda loss: 1j, TypeError, "The closure returned complex"),
    "a dict": (lambda loss: {"loss": loss}, TypeError, "The closure returned dict; it must return the loss"),
    "a pair": (lambda loss: (loss, loss), TypeError, "The closure returned tuple"),
    "text": (lambda loss: "0.5", TypeError, "The closure returned str"),
    "a truth value": (lambda loss: True, TypeError, "The closure returned bool"),
}


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("kind", NO_LOSS)
def test_what_is_no_real_number_is_an_error_and_leaves_the_weights(kind: str, weights: str) -> None:
    convert, error, message = NO_LOSS[kind]
    model = mlp()
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.1, weights=weights)
    with pytest.raises(error, match=message):
        optimizer.step(lambda: convert(mean_square(model, regression())()))  # type: ignore[arg-type,return-value]
    assert optimizer.steps == 0
    assert distance(before, snapshot(model)) <= ROUNDING[weights]


NUMBERS: dict[str, Callable[[Tensor], object]] = {
    "a float": float,
    "one element": lambda loss: loss.reshape(1, 1),
    "float32": lambda loss: loss.float(),
    "with a graph": lambda loss: loss.detach().requires_grad_(),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_any_real_number_is_a_loss(kind: str) -> None:
    model, alike = mlp(), mlp()
    got = train(ZOOptimizer(model, lr=0.1), lambda: NUMBERS[kind](mean_square(model, regression())()))  # type: ignore[arg-type,return-value]
    expected = train(ZOOptimizer(alike, lr=0.1), mean_square(alike, regression()))
    assert got == [pytest.approx(row, rel=1e-2 if kind == "float32" else 1e-15) for row in expected]


def test_integers_count_as_values() -> None:
    """An objective may be a number of errors."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = ZOOptimizer([weight], lr=0.0, eps=0.5)
    for as_number in (lambda: int(weight > 0), lambda: (weight > 0).sum()):
        optimizer.step(as_number)
        assert optimizer.report is not None
        assert sorted(optimizer.report.values) == [0.0, 1.0]


# ---- backward


def with_grad(model: nn.Module) -> None:
    with torch.enable_grad():
        mean_square(model, regression())().backward()


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("how", ["plainly", "with enable_grad", "after zero_grad"])
def test_a_closure_that_calls_backward_is_told_to_remove_it(how: str, weights: str) -> None:
    model = mlp()
    if how == "after zero_grad":
        with_grad(model)  # an earlier loop left gradients
    before = snapshot(model)

    def closure() -> Tensor:
        loss = mean_square(model, regression())()
        if how == "after zero_grad":
            model.zero_grad()
        if how == "plainly":
            loss.backward()
        else:
            with_grad(model)
        return loss

    with pytest.raises(RuntimeError, match=r"The closure calls backward\(\). Forward-only training has no backward pass"):
        ZOOptimizer(model, lr=0.1, weights=weights).step(closure)
    assert distance(before, snapshot(model)) <= ROUNDING[weights]


def test_another_runtime_error_of_the_closure_is_its_own() -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        ZOOptimizer(model).step(lambda: model(torch.zeros(2, 3, dtype=torch.float64)).sum())


def test_closures_run_without_gradients_and_outside_of_inference_mode() -> None:
    """A tensor made in inference mode could not be written in place afterwards."""
    model, modes = mlp(), []

    def closure() -> Tensor:
        loss = mean_square(model, regression())()
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), loss.requires_grad, loss.is_inference()))
        return loss

    ZOOptimizer(model).step(closure)
    assert modes == [(False, False, False, False)] * 2
    assert torch.is_grad_enabled()


def test_a_loop_that_calls_backward_itself_is_told_so() -> None:
    model = mlp()
    mean_square(model, regression())().backward()
    with pytest.raises(RuntimeError, match="this loop calls backward"):
        ZOOptimizer(model).step()


# ---- values that are not finite

BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("point", [0, 1])
def test_a_step_with_a_value_that_is_not_finite_is_skipped_and_counted(point: int, weights: str, value: float) -> None:
    model, losses = mlp(), []
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.1, weight_decay=0.5, weights=weights)

    def closure() -> float:
        losses.append(float(mean_square(model, regression())()))
        return value if optimizer.forward_passes % 2 == point else losses[-1]

    optimizer.step(closure)  # type: ignore[arg-type]
    report = optimizer.report
    assert report is not None
    assert report.skipped
    assert not report.zero_difference
    assert math.isnan(report.loss)
    assert math.isnan(report.projected_grad)
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 1)
    assert distance(before, snapshot(model)) <= ROUNDING[weights]
    optimizer.step(mean_square(model, regression()))
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 1)
    assert not same(before, snapshot(model))


def test_an_empty_batch_is_a_skipped_step() -> None:
    model = mlp()
    empty = torch.zeros(0, 10, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.float64)
    optimizer = ZOOptimizer(model, lr=0.1)
    optimizer.step(mean_square(model, empty))
    assert optimizer.skipped_steps == 1
    assert same(snapshot(model), snapshot(mlp()))


def test_a_run_of_steps_that_are_not_finite_is_an_error_and_finite_ones_start_it_anew() -> None:
    model = mlp()
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.0, max_nonfinite=3)
    for value in (math.nan, math.inf, 1.0, math.nan, math.nan):
        optimizer.step(lambda value=value: value)
    with pytest.raises(FloatingPointError, match=r"The loss was not finite in 3 steps in a row .*max_nonfinite=3.*Lower eps or lr"):
        optimizer.step(lambda: math.nan)
    assert (optimizer.steps, optimizer.skipped_steps) == (6, 5)
    assert same(before, snapshot(model))


# ---- evaluating something else


def test_exact_says_that_the_perturbation_did_not_reach_the_model() -> None:
    model = sequence_model("tied head")
    optimizer = ZOOptimizer(model, weights="exact")
    with pytest.raises(RuntimeError, match=r'perturbation did not reach the model.*not a copy.*weights="inplace"'):
        optimizer.step(next_token(copy.deepcopy(model)))


@pytest.mark.parametrize("weights", ["copy", "inplace"])
def test_steps_without_any_difference_are_counted_and_said_once(weights: str) -> None:
    model = mlp()
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.1, weights=weights)
    loss = mean_square(copy.deepcopy(model), regression())
    train(optimizer, loss, 19)
    with pytest.warns(ZOWarning, match="The objective had the same value at every point in 20 steps in a row"):
        optimizer.step(loss)
    train(optimizer, loss, 25)  # warnings are errors
    assert optimizer.zero_difference_steps == 45
    assert distance(before, snapshot(model)) <= 45 * ROUNDING[weights]


def test_autocast_does_not_keep_the_weights_of_the_first_evaluation() -> None:
    """Its cache holds cast weights: in one region both losses would be equal, and the gradient zero."""
    model = mlp(dtype=torch.float32)
    values = []
    for enabled in (False, True):
        optimizer = ZOOptimizer(model, lr=0.0, eps=0.1, weights="inplace")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.enable_grad():
            values.append(train(optimizer, lambda: F.mse_loss(model(regression(torch.float32)[0]).float(), torch.ones(16, 1)), 1)[0])
    assert values[1] == pytest.approx(values[0], rel=0.02)
    assert abs(values[1][0] - values[1][1]) == pytest.approx(abs(values[0][0] - values[0][1]), rel=0.3)


# ---- dropout=False


def test_dropout_false_switches_the_modules_off_and_leaves_the_training_mode() -> None:
    """The host sets the training mode, inside the closure too; BatchNorm and the like still follow it."""
    model, plain, modes = mlp(dropout=0.5), mlp(), []

    def closure() -> Tensor:
        model.train()
        modes.append(all(module.training for module in model.modules()))
        return mean_square(model, regression())()

    got = train(ZOOptimizer(model, lr=0.1, dropout=False), closure)
    assert got == train(ZOOptimizer(plain, lr=0.1), mean_square(plain, regression()))
    assert all(modes)
    assert float((model[2](torch.ones(1000)) == 0).double().mean()) > 0.3  # on again outside of evaluations


def test_dropout_is_on_again_after_an_error() -> None:
    model = mlp(dropout=0.5)
    with pytest.raises(ZeroDivisionError):
        ZOOptimizer(model, dropout=False).step(lambda: 1 / 0)
    assert "forward" not in vars(model[2])
    assert bool((model[2](torch.ones(1000)) == 0).any())


def test_dropout_false_says_once_that_it_finds_none() -> None:
    model = nn.Sequential(nn.Linear(10, 1)).double()
    optimizer = ZOOptimizer(model, dropout=False)
    with pytest.warns(ZOWarning, match="dropout=False finds no Dropout module"):
        optimizer.step(mean_square(model, regression()))
    optimizer.step(mean_square(model, regression()))
