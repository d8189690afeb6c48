"""Masked steps against a naive reference with whole masks and whole z, on every residency."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import RESIDENCIES, STEPS, STREAMED, TASKS, by_hand, snapshot, task, train
from reference.masks import BySize
from reference.spsa import Settings

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.masks import LargeWeights, Mask, MaskRule, SmallWeights


@pytest.mark.filterwarnings("ignore:.*run one after another")  # weight norm changes an attribute in every pass
@pytest.mark.parametrize("listed", [False, True], ids=["in the kernel", "lists"])
@pytest.mark.parametrize("weights", [*RESIDENCIES, STREAMED], ids=str)
@pytest.mark.parametrize("refresh", [None, 2])
@pytest.mark.parametrize("rule", [SmallWeights(), LargeWeights()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", TASKS)
def test_a_masked_step_is_the_reference_with_whole_masks(
    name: str, rule: MaskRule, refresh: int | None, weights: Any, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zo_lightning.engine.masks.rules.LIST_BELOW", 0.5 if listed else 0.0)
    model, loss = task(name)
    reference = BySize(0.25, isinstance(rule, LargeWeights), refresh, listed)
    expected, losses = by_hand(model, TASKS[name][1], Settings(0.01, weight_decay=0.1, mask=reference), steps=STEPS + 2)
    before = snapshot(model)
    optimizer = ZOOptimizer(model, lr=0.01, weight_decay=0.1, weights=weights, mask=Mask(rule, 0.25, refresh=refresh))
    got = train(optimizer, loss, STEPS + 2)
    tolerance = 1e-10 if weights == "inplace" else 1e-13
    assert got == [pytest.approx(row, rel=tolerance, abs=tolerance) for row in losses]
    trained = snapshot(model)
    for parameter, weight in expected.items():
        torch.testing.assert_close(trained[parameter], weight, rtol=0, atol=100 * tolerance)
    assert any(not torch.equal(before[parameter], trained[parameter]) for parameter in expected)
    assert min(abs(plus - minus) for plus, minus in losses) > 1e-9
