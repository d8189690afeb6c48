"""weights="exact" leaves every bit: steps without update, errors thrown at every border of every unit, and scratch of one unit's size."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_models import SEQUENCE_MODELS, next_token, sequence_model
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.residency import Exact

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import exact_drift

QUICK = [("opt", "bfloat16"), ("t5", "bfloat16"), ("gpt2", "float16")]
ALL = [(name, dtype) for name in exact_drift.MODELS for dtype in exact_drift.DTYPES]


@pytest.mark.parametrize(("name", "dtype"), [*QUICK, *(pytest.param(*row, marks=pytest.mark.slow) for row in ALL if row not in QUICK)])
def test_steps_without_update_and_errors_at_every_border_leave_every_bit(name: str, dtype: str) -> None:
    row = exact_drift.drift(name, dtype, 30, "exact")
    assert row["steps_with_a_difference"] >= 25  # the weights were perturbed
    assert row["changed_by_steps"] == row["changed"] == 0
    assert row["borders"] >= 60
    assert row["thrown"] == 2 * row["borders"]


def test_the_measurement_sees_the_drift_of_weights_in_place() -> None:
    assert exact_drift.drift("opt", "bfloat16", 5, "inplace")["changed_by_steps"] > 1000


@pytest.mark.parametrize("name", SEQUENCE_MODELS)
def test_errors_at_every_border_of_unusual_models(name: str) -> None:
    model = sequence_model(name)
    optimizer = ZOOptimizer(model, lr=0.0, weights="exact", safeguard=None)
    result = exact_drift.throw_at_borders(optimizer, model, next_token(model), exact_drift.Weights(model))
    assert result["thrown"] == 2 * result["borders"] > 0
    assert result["changed"] == 0


@pytest.mark.parametrize("name", [name for name in exact_drift.MODELS if name != "gpt2"])
def test_scratch_is_the_largest_unit(name: str) -> None:
    row = exact_drift.scratch_memory(name, "float32")
    assert row["largest_unit_bytes"] <= row["scratch_bytes"] <= 1.01 * row["largest_unit_bytes"]  # lines of 64 bytes
    assert row["scratch_bytes"] < row["trained_bytes"] / 3


@pytest.mark.parametrize("name", exact_drift.MODELS)
def test_the_losses_and_updates_are_those_of_a_copy(name: str) -> None:
    results = []
    for weights in ("copy", "exact"):
        model, loss = exact_drift.make(name, torch.float32)
        optimizer = ZOOptimizer(model, lr=1e-3, weights=weights, safeguard=None)
        values = []
        for _ in range(4):
            optimizer.step(loss)
            assert optimizer.report is not None
            values.append(optimizer.report.values)
        results.append((values, [weight.detach().clone() for weight in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_that_the_model_catches_itself_leave_it_on_the_perturbed_weights(error: type[BaseException]) -> None:
    """KeyboardInterrupt skips forward hooks: the unit stays open, and its scratch is not handed to the units that follow."""

    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)])
            self.head = nn.Linear(16, 11)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            try:
                self.blocks[0](x)
            except error:
                x = x * 0.5
            for block in (self.blocks[1], self.blocks[2]):
                x = block(x)
            self.blocks[0].armed = False
            x = self.blocks[0](x)
            self.blocks[0].armed = True
            return self.head(x)

    def throw(module: nn.Module, *args: object) -> None:
        if module.armed:
            raise error

    values = []
    for weights in ("copy", "exact"):
        torch.manual_seed(0)
        model = Catching().double()
        model.blocks[0].armed = True
        model.blocks[0].register_forward_hook(throw)
        start = exact_drift.Weights(model)
        optimizer = ZOOptimizer(model, lr=0.0, eps=0.1, weights=weights)
        rows = []
        for _ in range(3):
            optimizer.step(next_token(model))
            assert optimizer.report is not None
            rows.append(optimizer.report.values)
        values.append(rows)
        assert start.changed() == 0
    assert isinstance(optimizer.residency, Exact)
    assert values[0] == values[1]


def interrupted(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss()
        raise KeyboardInterrupt

    return closure


def test_an_interrupt_during_the_watched_pass_has_it_watched_again() -> None:
    model = sequence_model("nested blocks")
    start = exact_drift.Weights(model)
    optimizer = ZOOptimizer(model, lr=0.0, weights="exact")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(interrupted(model, next_token(model)))
        assert start.changed() == 0
        assert optimizer.residency.needs_probe()
