"""The scales of packages that CI does not install: each is tested where it is (pip install bitsandbytes optimum-quanto gptqmodel)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import same
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer
from zo_lightning.quantized import load_scales, release_scales, save_scales, train_scales

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(16) % 3


def plain() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 3))


def bits_and_bytes(kind: str, nested: bool = False) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    model = plain()
    for at in (0, 2):
        old: Any = model[at]
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, quant_type=kind, compress_statistics=nested)
        new.load_state_dict(old.state_dict())
        model[at] = new
    return model.to("cpu")


def quanto(bits: str) -> nn.Module:
    package = pytest.importorskip("optimum.quanto")
    model = plain()
    package.quantize(model, weights=getattr(package, bits))
    package.freeze(model)
    return model


def gptq() -> nn.Module:
    package = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    model = plain()
    old: Any = model[0]
    grouped = old.weight.detach().reshape(96, 2, 32)
    most, least = grouped.amax(-1), grouped.amin(-1)
    scale = (most - least) / 15
    layer = package.TorchLinear(bits=4, group_size=32, sym=False, desc_act=False, in_features=64, out_features=96, bias=True)
    layer.pack_original(copy.deepcopy(old), scale.clone(), torch.round(-least / scale), torch.arange(64, dtype=torch.int32) // 32)
    for name, buffer in list(layer._buffers.items()):
        layer._buffers[name] = None if buffer is None else buffer.detach().clone()
    layer._qzeros_format = 2
    model[0] = layer
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes nf4": lambda: bits_and_bytes("nf4"),
    "bitsandbytes fp4": lambda: bits_and_bytes("fp4"),
    "bitsandbytes nf4, doubly": lambda: bits_and_bytes("nf4", nested=True),
    "bitsandbytes int8": lambda: bits_and_bytes("int8"),
    "quanto qint8": lambda: quanto("qint8"),
    "quanto qint4": lambda: quanto("qint4"),
    "gptq": gptq,
}


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: nn.functional.cross_entropy(model(X).float(), CLASSES)


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    """What is stored in integers."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    inner = {f"{name}._data": p._data for name, p in found.items() if hasattr(p, "_data")}
    inner |= {
        f"{name}.{part}": p._data._data for name, p in found.items() for part in ("packed",) if hasattr(getattr(p, "_data", None), "_data")
    }
    return {name: t.clone() for name, t in {**found, **inner}.items() if type(t) in (Tensor, nn.Parameter) and not t.is_floating_point()}


@pytest.mark.parametrize("weights", ["exact", "copy", "inplace"])
@pytest.mark.parametrize("kind", MODELS)
def test_scales_are_trained_saved_and_given_back(kind: str, weights: str, tmp_path: Path) -> None:
    model = MODELS[kind]().train()
    with torch.no_grad():
        before = loss_of(model)()
    names = train_scales(model)
    assert len(names) == (1 if kind == "gptq" else 2)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model)(), before, rtol=1e-5, atol=1e-6)
    kept, began = bytes_of(model), {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = ZOOptimizer(model, lr=0.3, eps=1e-2, weights=weights, safeguard=None)
    losses = [float(optimizer.step(loss_of(model))) for _ in range(60)]  # type: ignore[arg-type]
    assert losses[-1] < losses[0] - 0.01
    assert same(bytes_of(model), kept)
    moved = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert not any(torch.equal(began[name], p) for name, p in moved.items())
    assert all(bool((p > 0).all()) for p in moved.values())
    save_scales(model, tmp_path / "s")
    with torch.no_grad():
        now = loss_of(model)()
        other = MODELS[kind]().train()
        load_scales(other, tmp_path / "s")
        assert torch.equal(loss_of(other)(), now)
        release_scales(model)
        assert torch.equal(loss_of(model)(), now)
    assert not set(names) & {name for name, _ in model.named_parameters()}


def test_zero_points_that_are_floats() -> None:
    model = MODELS["quanto qint4"]()
    names = train_scales(model, zero_points=True)
    assert [name for name in names if "shift" in name] == ["0.weight_shift", "2.weight_shift"]
    began = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = ZOOptimizer(model, lr=0.1, eps=1e-2)
    for _ in range(3):
        optimizer.step(loss_of(model))
    assert not any(torch.equal(began[name], p) for name, p in model.named_parameters() if p.requires_grad)


class Kernel(nn.Module):
    """A layer of a kernel that we do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 4))


def test_kernels_with_scales_of_their_own() -> None:
    with pytest.raises(
        ValueError, match=r"Kernel keeps the scales of its weights in a form of its own. Load the model with backend='torch'"
    ):
        train_scales(nn.Sequential(Kernel()))
