"""16-bit vectors are exact: their float32 values accumulate every update, travel in checkpoints, and follow what others write."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from reference.noise import query_seed, whole
from torch import Tensor, nn

from zo_lightning import ZOOptimizer
from zo_lightning.engine.noise import Rademacher
from zo_lightning.engine.residency import Masters
from zo_lightning.engine.residency.masters import has_master

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


class Scripted:
    """Losses from a list, one a call; the model runs so that it sees its weights."""

    def __init__(self, model: nn.Module, values: list[float]) -> None:
        self.model, self.values = model, iter(values)

    def __call__(self) -> float:
        first = next(iter(self.model.parameters()))
        self.model(torch.ones(4, first.shape[-1], dtype=first.dtype))
        return next(self.values)


def net(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.LayerNorm(50), nn.Linear(50, 7)).to(dtype)


def script(steps: int) -> list[float]:
    return [1.0 + 0.06 * side * (1 if step % 3 else -2) for step in range(steps) for side in (1, 0)]


def by_hand(start: Tensor, name: str, lr: float, steps: int, decay: float = 0.0) -> Tensor:
    """theta in float32, one update after another, with z from the reference."""
    theta, values = start.float(), script(steps)
    for step in range(steps):
        g = (values[2 * step] - values[2 * step + 1]) / 2e-3
        z = torch.from_numpy(whole("rademacher", query_seed(0, step, 0), name, theta.numel())).float()
        c = torch.tensor(-lr * g, dtype=torch.float32)
        theta = theta * torch.tensor(1.0 - lr * decay, dtype=torch.float32) + c * z
    return theta


@each_dtype
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_vectors_accumulate_what_is_far_below_their_spacing(dtype: torch.dtype, decay: float) -> None:
    model, steps, lr = net(dtype), 200, 1e-6
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ZOOptimizer(model, lr=lr, weights="copy", weight_decay=decay)
    closure = Scripted(model, script(steps))
    for _ in range(steps):
        optimizer.step(closure)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, by_hand(start[name], name, lr, steps, decay).to(dtype)), name
    assert [has_master(t) for t in (model[0].weight, model[1].weight, model[0].weight.float())] == [True, False, False]


@each_dtype
def test_in_place_rounds_vectors_stochastically(dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = ZOOptimizer(model, lr=1e-6, weights="inplace")
    optimizer.step(Scripted(model, script(1)))
    assert optimizer.masters.state_dict() == {}


def test_what_others_write_counts() -> None:
    model = net(torch.bfloat16)
    optimizer = ZOOptimizer(model, lr=1e-6, weights="copy")
    optimizer.step(Scripted(model, script(1)))
    with torch.no_grad():
        model[0].weight[:25] = 2.0
    model[1].bias.data.mul_(3)
    third = model[1].bias.detach().clone()
    optimizer.step(Scripted(model, [1.0, 1.0 - 1e-6]))
    assert torch.equal(model[0].weight[:25], torch.full((25,), 2.0).bfloat16())
    assert torch.equal(model[1].bias, third)
    masters = Masters()
    masters.load_state_dict(optimizer.masters.state_dict())
    assert masters.cover(optimizer.residency.trained)
    model[0].weight.data.fill_(1.5)
    assert not masters.cover(optimizer.residency.trained)


@each_dtype
def test_masters_travel_in_checkpoints(dtype: torch.dtype) -> None:
    whole_run, values = net(dtype), script(40)
    optimizer, closure = ZOOptimizer(whole_run, lr=1e-6, weights="copy"), Scripted(whole_run, values)
    file = io.BytesIO()
    for step in range(40):
        if step == 15:
            torch.save({"model": whole_run.state_dict(), "optimizer": optimizer.state_dict()}, file)
        optimizer.step(closure)
    file.seek(0)
    saved: dict[str, Any] = torch.load(file, weights_only=True)
    again = net(dtype)
    again.load_state_dict(saved["model"])
    resumed = ZOOptimizer(again, lr=1e-6, weights="exact")
    resumed.load_state_dict(saved["optimizer"])
    closure = Scripted(again, [0.0, *values[30:]])  # exact watches a forward pass first
    for _ in range(25):
        resumed.step(closure)
    assert all(torch.equal(left, right) for left, right in zip(whole_run.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(saved["model"][name], p) for name, p in again.named_parameters())


def test_a_group_that_rests_keeps_its_masters() -> None:
    model = net(torch.bfloat16)
    groups = [{"params": [("g", model[0].weight)], "lr": 1e-6}, {"params": [("b", model[1].bias)], "lr": 1e-6}]
    optimizer = ZOOptimizer(groups, module=model, weights="copy")
    for lr in (1e-6, 0.0, 1e-6):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(Scripted(model, script(1)))
    values = script(1)
    g = (values[0] - values[1]) / 2e-3
    z = [torch.from_numpy(whole("rademacher", query_seed(0, step, 0), "g", 50)).float() for step in (0, 2)]
    expected = model[0].weight.new_ones(50, dtype=torch.float32)
    for row in z:
        expected = expected + torch.tensor(-1e-6 * g, dtype=torch.float32) * row
    kept = [master for master in optimizer.masters.state_dict().values() if master.numel() == 50]
    assert torch.equal(kept[0], expected)
    assert optimizer.noise.name == Rademacher.name
