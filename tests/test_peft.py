"""Every kind of adapter on five shapes: the derivative that is measured is autograd's, the base never moves, peft saves and merges it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from engine_models import bits, snapshot
from peft_tools import ALL, adapted, base, logits, loss_of
from reference.spsa import Settings, noise_like

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.residency.scratch import Copy

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
MERGES = ("LoRA", "rsLoRA", "DoRA", "IA3", "LoHa", "LoKr", "OFT", "VeRA", "LayerNorm")


def along(model: Any, optimizer: ZOOptimizer, shape: str) -> float:
    """<gradient, z>, from autograd and z as whole tensors."""
    trained = {p.name: p.tensor for p in optimizer.residency.trained}
    noise = noise_like({name: tensor.detach() for name, tensor in trained.items()}, Settings(0.0), 0, 0)
    gradients = torch.autograd.grad(loss_of(model, shape)(), list(trained.values()), allow_unused=True)
    return sum(float((g.double() * noise[name]).sum()) for name, g in zip(trained, gradients, strict=True) if g is not None)


@pytest.mark.parametrize(("shape", "kind"), ALL)
def test_the_derivative_is_that_of_autograd_along_the_same_noise(shape: str, kind: str) -> None:
    model = adapted(shape, kind, torch.float64)
    optimizer = ZOOptimizer(model, lr=0.0, eps=1e-5)
    optimizer.step(loss_of(model, shape))
    assert optimizer.report is not None
    measured, expected = optimizer.report.projected_grad, along(model, optimizer, shape)
    assert isinstance(optimizer.residency, Copy)
    assert abs(expected) > 1e-6
    if kind == "DoRA":
        assert measured != pytest.approx(expected, rel=1e-3)
        with pytest.MonkeyPatch.context() as patch:  # peft detaches the norm of the weights, by which it divides
            patch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
            expected = along(model, optimizer, shape)
    assert measured == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("shape", "kind"), ALL)
def test_the_base_never_moves_and_the_adapter_is_saved_and_loaded(shape: str, kind: str, tmp_path: Path) -> None:
    model = adapted(shape, kind)
    before = snapshot(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = ZOOptimizer(model, lr=1e-2, eps=1e-3)
    for _ in range(5):
        optimizer.step(loss_of(model, shape))
    after = snapshot(model)
    assert trained
    assert all(torch.equal(bits(before[name]), bits(after[name])) for name in before if name not in trained)
    assert all(not torch.equal(before[name], after[name]) for name in trained)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(shape), tmp_path).eval()
    if kind == "prefix, projected":  # what the projection makes of it is saved
        torch.testing.assert_close(logits(loaded, shape), logits(model, shape), rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits(loaded, shape), logits(model, shape))
    if kind in MERGES:
        expected = logits(model, shape)
        torch.testing.assert_close(logits(model.merge_and_unload(), shape), expected, rtol=1e-4, atol=1e-4)
