"""Bad input to the engine: a clear error or the right thing, and the weights untouched."""

from __future__ import annotations

import copy
import math
import random
import re
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import RESIDENCIES, LanguageModel, distance, mean_square, mlp, next_token, regression, same, snapshot
from torch import Tensor, nn

from zo_lightning.engine import SPSA, ZOOptimizer, ZOWarning

NAN, INF = math.nan, math.inf


def untouched(model: nn.Module, before: dict[str, Tensor], weights: str) -> bool:
    """Bit for bit, except that weights which were perturbed in place return up to rounding."""
    return distance(before, snapshot(model)) < 1e-15 if weights == "inplace" else same(before, snapshot(model))


OPTIONS: dict[str, tuple[list[Any], str]] = {
    "eps": ([0.0, -1e-3, NAN, INF, "small", True, 1j, [1e-3]], r"Must be a finite number > 0"),
    "lr": ([-1e-6, NAN, INF, "fast", True, 1j], r"Must be a finite number >= 0"),
    "weight_decay": ([-0.1, NAN, -INF, "much", False, [0.1]], r"Must be a finite number >= 0"),
    "clip": ([0.0, -100, NAN, INF, "tight", True], r"Must be a finite number > 0, or None"),
    "seed": ([-1, 0.5, NAN, "0", None, True], r"Must be an integer >= 0"),
    "max_nonfinite": ([0, -1, 20.0, NAN, "many", None, True], r"Must be an integer >= 1"),
    "queries": ([0, -1, 1.5, NAN, "2", None, True], r"Must be an integer >= 1"),
    "dropout": ([0, 0.1, "off", None], r"Must be True \(as the model is set\) or False"),
    "noise": (["uniform", "Gaussian", "", None, 1], r"Use one of 'rademacher', 'gaussian'"),
    "estimator": (["adam", "SPSA", 2], r"Use one of 'spsa'"),
    "weights": (["offload", "in-place", None, True], r"Use one of 'auto', 'exact', 'copy', 'inplace'"),
    "safeguard": (["explode", "", True, False, 50], r"Use .*'stop', 'halve', 'warn', None, or a Safeguard"),
}
BAD = [(name, value, allowed) for name, (values, allowed) in OPTIONS.items() for value in values]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD, ids=[f"{name}={value!r}" for name, value, _ in BAD])
def test_an_option_that_is_wrong_is_named_with_its_value_and_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{name}(: |=){re.escape(repr(value))}.*\. {allowed}"):
        SPSA(value) if name == "queries" else ZOOptimizer(model, **{name: value})
    assert same(before, snapshot(model))


@pytest.mark.parametrize(("name", "value"), [("lr", -0.1), ("lr", NAN), ("eps", 0.0), ("eps", INF), ("weight_decay", -1.0)])
def test_the_options_of_a_group_are_checked_when_it_is_added(name: str, value: float) -> None:
    model = mlp()
    optimizer = ZOOptimizer(model[0].parameters(), lr=0.1, module=model)
    message = rf"Invalid {name}: {value}\. Must be a finite number >"
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": list(model[3].parameters()), name: value})
    with pytest.raises(ValueError, match=message):
        ZOOptimizer([{"params": model[0].parameters(), name: value}])
    assert len(optimizer.param_groups) == 1


def test_exact_needs_the_model() -> None:
    optimizer = ZOOptimizer(list(mlp().parameters()), weights="exact")
    with pytest.raises(ValueError, match=r'weights="exact" needs the model.*module=model.*weights="copy"'):
        optimizer.step(lambda: torch.ones(()))


ONE, MEMORY = nn.Parameter(torch.ones(3)), torch.ones(10)
NOTHING = r"no trainable parameter.*requires_grad=False.*not floating point.*Unfreeze"
PARAMETERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "all frozen": (lambda: mlp().requires_grad_(False), ValueError, NOTHING),
    "integers alone": (lambda: [nn.Parameter(torch.arange(3), requires_grad=False)], ValueError, NOTHING),
    "tensors without gradient": (lambda: [torch.ones(3)], ValueError, NOTHING),
    "a module without weights": (nn.Tanh, ValueError, NOTHING),
    "an empty group": (lambda: [{"params": []}], ValueError, NOTHING),
    "an empty list": (lambda: [], ValueError, r"params is empty.*Pass a module, its parameters, or parameter groups"),
    "one tensor": (lambda: nn.Parameter(torch.ones(3)), TypeError, r"single tensor. Use \[tensor\]"),
    "no tensors": (lambda: ["weight"], TypeError, r"can only optimize Tensors.*str"),
    "a result": (lambda: [nn.Parameter(torch.ones(3)) * 2], ValueError, r"non-leaf"),
    "in two groups": (lambda: [{"params": [ONE]}, {"params": [ONE]}], ValueError, r"appear in more than one parameter group"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), ValueError, r"'weight' is on the meta device.*load the weights first"),
    "complex": (lambda: [nn.Parameter(torch.ones(3) * 1j)], ValueError, r"'unnamed\.0'.*torch\.complex64.*view_as_real"),
    "sparse": (lambda: [torch.eye(3).to_sparse().requires_grad_()], ValueError, r"'unnamed\.0'.*torch\.sparse_coo; only dense"),
    "float8": (lambda: [nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))], ValueError, r"float8_e4m3fn; float16, bfloat16, float32 and"),
    "overlapping": (
        lambda: [nn.Parameter(MEMORY[:6]), nn.Parameter(MEMORY[3:])],
        ValueError,
        r"'unnamed\.0' and 'unnamed\.1' share a part of their memory.*Train one view",
    ),
    "one name": (lambda: [("a", p) for p in mlp().parameters()], ValueError, r"are called 'a'.*Give them other names"),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_what_cannot_be_trained_says_why_and_what_to_do(case: str) -> None:
    build, error, message = PARAMETERS[case]
    params = build()
    before = snapshot(params) if isinstance(params, nn.Module) and case != "meta" else {}
    with pytest.raises(error, match=message):
        ZOOptimizer(params)
    assert not before or same(before, snapshot(params))


def test_what_changes_later_is_noticed_at_the_next_step() -> None:
    model = LanguageModel().double()
    optimizer, before = ZOOptimizer(model, lr=0.01), snapshot(model)
    model.gain.requires_grad_(False)
    optimizer.step(next_token(model))
    assert torch.equal(model.gain, before["gain"])
    before = snapshot(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.empty(3, device="meta"))]})
    with pytest.raises(ValueError, match=r"'unnamed\.\d+' is on the meta device.*load the weights first"):
        optimizer.step(next_token(model))
    assert same(before, snapshot(model))


def test_a_parameter_that_is_listed_twice_is_trained_once() -> None:
    single, double = mlp(), mlp()
    first = ZOOptimizer(single.parameters(), lr=0.05, weight_decay=0.1, module=single)
    with pytest.warns(UserWarning, match="duplicate parameters"):  # torch's own
        second = ZOOptimizer([*double.parameters(), double[0].weight], lr=0.05, weight_decay=0.1, module=double)
    for optimizer, model in ((first, single), (second, double)):
        optimizer.step(mean_square(model, regression()))
    assert same(snapshot(single), snapshot(double))


LOSSES: dict[str, tuple[Any, type[Exception], str]] = {
    "a vector": (torch.ones(3), ValueError, r"shape \(3,\); it must be a scalar\. Reduce it, e\.g\. loss\.mean\(\)"),
    "an empty tensor": (torch.ones(0), ValueError, r"shape \(0,\); it must be a scalar"),
    "complex": (torch.tensor(1j), ValueError, r"dtype torch\.complex64; it must be real"),
    "a complex number": (1j, TypeError, r"returned complex; it must return the loss, a scalar tensor or a float"),
    "a string": ("0.5", TypeError, r"returned str; it must return the loss"),
    "a bool": (True, TypeError, r"returned bool; it must return the loss"),
    "a dict": ({"loss": torch.ones(())}, TypeError, r"returned dict; it must return the loss"),
    "a tuple": ((torch.ones(()), None), TypeError, r"returned tuple; it must return the loss"),
}


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_that_is_no_real_scalar(case: str, weights: str) -> None:
    loss, error, message = LOSSES[case]
    model = mlp()
    optimizer, closure = ZOOptimizer(model, lr=0.1, weights=weights, estimator=SPSA(2)), mean_square(model, regression())
    optimizer.step(closure)
    before = snapshot(model)
    for good in (0, 1, 3):
        results = iter([*(closure for _ in range(good)), lambda: (closure(), loss)[1]])
        with pytest.raises(error, match=message):
            optimizer.step(lambda results=results: next(results)())
        assert untouched(model, before, weights)
        optimizer.discard()


def test_a_micro_batch_without_a_loss_is_skipped_alone() -> None:
    data, plain, other = regression(), mlp(), mlp()
    first, second = ZOOptimizer(plain, lr=0.05), ZOOptimizer(other, lr=0.05)
    first.step(mean_square(plain, data))
    nothing = second.estimate(lambda: {"loss": None}, loss_of=lambda output: output["loss"])
    second.step(mean_square(other, data))
    assert (nothing.output, nothing.loss) == (None, None)
    assert same(snapshot(plain), snapshot(other))
    second.estimate(lambda: None)
    assert second.apply() is None
    assert (second.steps, second.skipped_steps) == (1, 0)
    assert same(snapshot(plain), snapshot(other))


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("values", [(NAN, NAN), (1.0, NAN), (INF, 1.0), (-INF, INF)], ids=repr)
def test_a_non_finite_loss_skips_the_step_and_too_many_end_the_run(values: tuple[float, float], weights: str) -> None:
    model = mlp()
    good, optimizer = mean_square(model, regression()), ZOOptimizer(model, lr=0.1, weight_decay=0.5, weights=weights, max_nonfinite=3)

    def bad() -> None:
        losses = iter(values)
        optimizer.step(lambda: good() * 0 + next(losses))

    for run in range(2):
        optimizer.step(good)
        before = snapshot(model)
        bad()
        bad()
        assert (optimizer.steps, optimizer.skipped_steps) == (3 * run + 3, 2 * run + 2)
        assert untouched(model, before, weights)
    with pytest.raises(FloatingPointError, match=r"not finite in 3 steps in a row.*max_nonfinite=3.*Lower eps or lr, use bfloat16"):
        bad()
    assert (optimizer.steps, optimizer.skipped_steps) == (7, 5)
    assert untouched(model, before, weights)


def test_an_empty_batch_is_a_skipped_step() -> None:
    model = LanguageModel()
    before, optimizer = snapshot(model), ZOOptimizer(model, lr=0.1, weights="exact")
    optimizer.step(next_token(model, torch.zeros(0, 6, dtype=torch.long)))
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 1)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, GeneratorExit])
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_weights_are_restored_whatever_leaves_the_closure(weights: str, error: type[BaseException]) -> None:
    model = LanguageModel().double()
    optimizer = ZOOptimizer(model, lr=0.1, weights=weights, estimator=SPSA(2))
    optimizer.step(next_token(model))
    for point in range(4):
        before, count = snapshot(model), iter(range(4))

        def closure(point: int = point, count: Any = count) -> Tensor:
            if next(count) == point:
                with model.blocks[1].register_forward_hook(lambda *args: (_ for _ in ()).throw(error("here"))):
                    return next_token(model)()
            return next_token(model)()

        with pytest.raises(error):
            (optimizer.step if point % 2 else optimizer.estimate)(closure)
        assert untouched(model, before, weights)
        optimizer.discard()


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_ctrl_c_between_two_forwards(weights: str) -> None:
    model, point = mlp(), iter(range(2))
    before, loss = snapshot(model), mean_square(model, regression())

    def closure() -> Tensor:
        if next(point) == 1:
            signal.raise_signal(signal.SIGINT)
        return loss()

    with pytest.raises(KeyboardInterrupt):
        ZOOptimizer(model, lr=0.1, weights=weights).step(closure)
    assert untouched(model, before, weights)


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_closure_made_for_lbfgs_says_what_to_remove(weights: str) -> None:
    model = mlp()
    before, optimizer = snapshot(model), ZOOptimizer(model, lr=0.1, weights=weights)

    def closure(enable: bool) -> Tensor:
        with torch.set_grad_enabled(enable):
            optimizer.zero_grad()
            loss = mean_square(model, regression())()
            loss.backward()
        return loss

    for enable in (False, True):
        with pytest.raises(RuntimeError, match=r"closure calls backward\(\).*remove loss\.backward\(\) and optimizer\.zero_grad\(\)"):
            optimizer.step(lambda enable=enable: closure(enable))
        assert untouched(model, before, weights)


def test_a_loop_made_for_backpropagation_is_told_so() -> None:
    model = mlp()
    before, optimizer = snapshot(model), ZOOptimizer(model, lr=0.1)
    mean_square(model, regression())().backward()
    with pytest.raises(RuntimeError, match=r"found gradients and no loss: this loop calls backward\(\).*optimizer\.step\(closure\)"):
        optimizer.step()
    assert same(before, snapshot(model))


def test_hooks_on_gradients_are_said_to_be_idle_once() -> None:
    model = mlp()
    optimizer = ZOOptimizer(model, lr=0.1)
    model[0].weight.register_hook(lambda grad: grad * 2)
    with pytest.warns(ZOWarning, match="Hooks on the gradients of parameters never run") as said:
        optimizer.step(mean_square(model, regression()))
    assert len(said) == 1
    optimizer.step(mean_square(model, regression()))


def test_exact_on_a_compiled_model_says_what_it_costs() -> None:
    model = torch.compile(LanguageModel(), backend="eager")
    with pytest.warns(ZOWarning, match=r'weights="exact" writes .* MB to scratch at once.*Compile the blocks one by one'):
        ZOOptimizer(model, weights="exact").step(next_token(model))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # torch's, about the hooks of the exact mode
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_compiled_version_that_ran_before_is_perturbed_like_the_model(weights: str) -> None:
    """torch.compile may skip hooks that are added after its first call: both losses would be equal, and the gradient zero."""
    torch._dynamo.reset()
    steps = []
    for compiling in (False, True):
        torch.manual_seed(0)
        model = LanguageModel().double()
        runs = torch.compile(model, backend="eager") if compiling else model
        next_token(runs)()
        optimizer = ZOOptimizer(model, lr=0.01, weights=weights)
        steps.append([float(optimizer.step(next_token(runs))) for _ in range(3)])  # type: ignore[arg-type]
        assert optimizer.report is not None
        steps[-1].append(optimizer.report.projected_grad)
    torch._dynamo.reset()
    assert steps[1] == pytest.approx(steps[0], rel=1e-9)


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_copy_that_is_evaluated_instead_of_the_model_is_noticed(weights: str) -> None:
    model = mlp()
    other, before, optimizer = copy.deepcopy(model), snapshot(model), ZOOptimizer(model, lr=0.1, weights=weights)
    if weights == "exact":
        with pytest.raises(RuntimeError, match=r"did not reach the model.*Evaluate the module that was given.*not a copy"):
            optimizer.step(mean_square(other, regression()))
    else:
        for _ in range(19):
            optimizer.step(mean_square(other, regression()))
        with pytest.warns(ZOWarning, match=r"same value at every point in 20 steps in a row.*does not reach the model") as said:
            optimizer.step(mean_square(other, regression()))
        assert len(said) == 1
        assert optimizer.zero_difference_steps == 20
    assert distance(before, snapshot(model)) < 1e-14


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_random_forward_draws_the_same_on_both_sides_and_anew_each_micro_batch(weights: str) -> None:
    model, draws = mlp(dropout=0.5), []
    optimizer, states = ZOOptimizer(model, lr=0.0, weights=weights), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])

    def closure() -> Tensor:
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return mean_square(model, regression())() + sum(draws[-1])

    for _ in range(3):
        optimizer.estimate(closure)
        optimizer.step(closure)
    assert draws[-12::2] == draws[-11::2]
    assert len(set(draws[-12:])) == 6
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize("storage", ["the same storage", "new storage"])
def test_weights_that_others_change_between_steps_are_the_ones_that_train_on(storage: str, weights: str) -> None:
    data, model, fresh = regression(), mlp(), mlp(seed=5)
    optimizer, expected = ZOOptimizer(model, lr=0.05, weights=weights), ZOOptimizer(fresh, lr=0.05, weights=weights)
    optimizer.step(mean_square(model, data))
    for weight, new in zip(model.parameters(), fresh.parameters(), strict=True):
        weight.data = new.detach().clone() if storage == "new storage" else weight.data.copy_(new)
    expected.load_state_dict(optimizer.state_dict())
    for both in ((optimizer, model), (expected, fresh)):
        both[0].step(mean_square(both[1], data))
    assert same(snapshot(model), snapshot(fresh))
