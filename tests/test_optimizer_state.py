"""What a ZOOptimizer refuses to go on with, and copies of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_models import RESIDENCIES, mean_square, mlp, regression, same, snapshot
from torch import nn

from zo_lightning.engine import SPSA, ZOOptimizer


@pytest.mark.parametrize("weights", RESIDENCIES)
@pytest.mark.parametrize(
    ("name", "value"), [("lr", float("nan")), ("lr", -1.0), ("lr", "0.1"), ("weight_decay", float("inf")), ("eps", 0), ("eps", -1e-3)]
)
def test_a_group_that_was_changed_to_nonsense_is_an_error_before_any_weight_moves(name: str, value: object, weights: str) -> None:
    model = mlp()
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.1, weights=weights)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"Invalid {name}: "):
        optimizer.step(mean_square(model, regression()))
    assert same(before, snapshot(model))


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_group_changed_between_estimate_and_apply_is_an_error_before_any_weight_moves(weights: str) -> None:
    model = mlp()
    optimizer = ZOOptimizer(model, lr=0.1, weights=weights)
    optimizer.estimate(mean_square(model, regression()))
    before = snapshot(model)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="Invalid lr"):
        optimizer.apply()
    assert same(before, snapshot(model))


def test_eps_of_a_step_is_that_of_its_beginning() -> None:
    """A schedule of eps between two micro-batches must not change what the losses are divided by."""
    runs = []
    for changed in (False, True):
        model = mlp()
        optimizer = ZOOptimizer(model, lr=0.1, eps=1e-3)
        optimizer.estimate(mean_square(model, regression()), weight=0.5)
        if changed:
            optimizer.param_groups[0]["eps"] = 0.1
        optimizer.estimate(mean_square(model, regression()), weight=0.5)
        optimizer.apply()
        assert optimizer.report is not None
        runs.append((snapshot(model), optimizer.report.projected_grad, optimizer.report.eps))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda pair: pickle.loads(pickle.dumps(pair))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_copy_goes_on_as_the_original_would(weights: str, how: str) -> None:
    """With the model, in the middle of an accumulation window; the copy's tensors have other identities than the names were kept by."""
    data = regression(torch.float32)
    model = nn.Sequential(nn.BatchNorm1d(10), mlp(dropout=0.1, dtype=torch.float32))
    optimizer = ZOOptimizer(model, lr=0.01, weights=weights, estimator=SPSA(2))
    optimizer.step(mean_square(model, data))
    optimizer.estimate(mean_square(model, data))
    other_model, other = COPIES[how]((model, optimizer))
    for _ in range(3):
        optimizer.step(mean_square(model, data))
        other.step(mean_square(other_model, data))
    assert same(snapshot(model), snapshot(other_model))
    assert (other.steps, other.forward_passes) == (optimizer.steps, optimizer.forward_passes) == (4, 20)


def test_a_window_of_another_estimator_is_refused_and_nothing_is_changed() -> None:
    model = mlp()
    saved = ZOOptimizer(model, lr=0.1, estimator=SPSA(2))
    saved.estimate(mean_square(model, regression()))
    optimizer = ZOOptimizer(mlp(), lr=0.5)
    with pytest.raises(ValueError, match=r"window of 4 evaluations.*makes 2\. Resume with the same estimator"):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("damage", [lambda zo: zo.pop("steps"), lambda zo: zo.update(version=0)])
def test_a_damaged_state_is_refused_and_nothing_is_changed(damage: Callable[[dict[str, Any]], object]) -> None:
    optimizer = ZOOptimizer(mlp(), lr=0.5)
    state = ZOOptimizer(mlp(), lr=0.1).state_dict()
    damage(state["zo"])
    with pytest.raises(ValueError, match="incomplete; this release reads version"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_closure_without_a_loss_is_an_error() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(TypeError, match="returned NoneType; it must return the loss"):
        ZOOptimizer(model, lr=0.1).step(lambda: None)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_a_model_that_was_frozen_since_has_nothing_to_train(weights: str) -> None:
    model = mlp()
    optimizer = ZOOptimizer(model, lr=0.1, weights=weights)
    optimizer.step(mean_square(model, regression()))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        optimizer.step(mean_square(model, regression()))


def test_a_group_of_names_and_tensors_can_be_added() -> None:
    model = mlp()
    named = list(model.named_parameters())
    whole, grown = ZOOptimizer(model, lr=0.1), ZOOptimizer(named[:1], lr=0.1)
    grown.add_param_group({"params": named[1:], "lr": 0.2})
    assert [p.key for p in grown.residency.trained] == [p.key for p in whole.residency.trained]
    with pytest.raises(ValueError, match="Invalid eps"):
        grown.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "eps": 0})


def test_expanded_tensors_share_memory_and_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is expanded.*\.contiguous"):
        ZOOptimizer([torch.zeros(1).expand(4).requires_grad_()])


@pytest.mark.parametrize("weights", RESIDENCIES)
def test_steps_inside_inference_mode_are_ordinary_steps(weights: str) -> None:
    model, alike = mlp(), mlp()
    optimizer, other = (ZOOptimizer(each, lr=0.1, weights=weights) for each in (model, alike))
    for _ in range(3):
        with torch.inference_mode():
            optimizer.step(mean_square(model, regression()))
        other.step(mean_square(alike, regression()))
    assert same(snapshot(model), snapshot(alike))


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(ValueError, match=r"was made under torch\.inference_mode"):
        ZOOptimizer(model)


def test_a_weight_decay_that_would_turn_the_weights_round_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid weight_decay: 4\.0 with lr=0\.5"):
        ZOOptimizer(mlp(), lr=0.5, weight_decay=4.0)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("weights", ["exact", "inplace"])
def test_a_penalty_that_reads_every_weight_sees_the_perturbed_ones(weights: str, blocks: bool) -> None:
    """Everything moves to the whole evaluation in exact mode; the units of before are then empty."""
    data, values = regression(), []
    for kind in (weights, "copy"):
        model = nn.Sequential(
            mlp(), nn.Sequential(*[nn.Sequential(nn.Linear(1, 1), nn.Tanh()) for _ in range(3)]).double() if blocks else nn.Tanh()
        )
        torch.manual_seed(3)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)

        def loss(model: nn.Module = model) -> torch.Tensor:
            return mean_square(model, data)() + 0.1 * sum(p.square().sum() for p in model.parameters())

        optimizer = ZOOptimizer(model, lr=0.01, weights=kind)
        for _ in range(3):
            optimizer.step(loss)
        assert optimizer.report is not None
        values.append(optimizer.report.values)
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert values[0][0] != values[0][1]
