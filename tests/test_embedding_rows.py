"""Of a plain embedding only the rows that a batch reads are perturbed: the same values, and never where somebody else could read others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_models import Closure, bits, distance, snapshot
from reference import noise as reference
from torch import Tensor, nn

from zo_lightning.engine import Gaussian, Noise, Rademacher, ZOOptimizer
from zo_lightning.engine.noise import Item
from zo_lightning.engine.residency import scratch
from zo_lightning.engine.seeds import stream

NOISES: dict[str, Noise] = {"rademacher": Rademacher(), "gaussian": Gaussian()}
TOKENS = torch.tensor([[1, 4, 299, 9], [4, 0, 150, 1]])


@pytest.mark.parametrize("name", NOISES)
def test_values_at_any_index_are_those_of_the_reference(name: str) -> None:
    index = torch.tensor([[0, 31, 32, 63, 64], [(1 << 18) - 1, 1 << 18, (1 << 19) - 1, 1 << 19, (1 << 25) + 12_345]])
    got = NOISES[name].at(index, torch.tensor(stream(9, 5), dtype=torch.int32)).double()
    expected = torch.from_numpy(reference.NOISES[name](9, 5, np.asarray(index.flatten()))).view(index.shape)
    assert float((got - expected).abs().max()) <= (0.0 if name == "rademacher" else 2e-6)


class Tied(nn.Module):
    """Far more words than a batch has; the head reads all of them, `peek` reads one that the batch has not."""

    def __init__(self, peek: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(300, 128)  # more elements than are done together with other small tensors
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(128, 128), nn.Tanh()) for _ in range(2)])
        if peek:
            self.embed.register_forward_hook(lambda module, args, output: output + self.embed.weight[200])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.embed.weight)


def loss_of(model: nn.Module) -> Closure:
    return lambda: F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1).float(), TOKENS[:, 1:].flatten() % 20)


class Untied(Tied):
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x


MODELS = {"untied": Untied, "tied": Tied}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every weight of 300 rows that was written to scratch: whether only some rows were."""
    seen: list[bool] = []
    plain = scratch.sweep

    def watched(items: list[Item], *rest: object, **more: object) -> None:
        seen.extend(item.rows is not None for item in items if item.base.shape[:1] == (300,))
        plain(items, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(scratch, "sweep", watched)
    return seen


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peek", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_exact_weights_give_the_losses_of_a_copy(kind: str, peek: bool, dtype: torch.dtype, noise: str, rows: list[bool]) -> None:
    models, values = [], []
    for weights in ("exact", "copy"):
        model = MODELS[kind](peek).to(dtype)
        optimizer = ZOOptimizer(model, lr=0.01, eps=0.01, weights=weights, noise=noise)
        for _ in range(3):
            optimizer.step(loss_of(model))
            assert optimizer.report is not None
            values.append(optimizer.report.values)
        models.append(snapshot(model))
        if weights == "exact":
            assert rows[-1] is (kind == "untied" and not peek)  # the watched pass before the first step does not know yet
    assert len({value for row in values for value in row}) > 1
    if noise == "rademacher":
        assert values[:3] == values[3:]
        assert all(torch.equal(bits(models[0][name]), bits(models[1][name])) for name in models[0])
    elif dtype != torch.bfloat16:  # logarithm, sine and cosine of two kernels differ in their last bits, and may round another way
        assert np.array(values[:3]) == pytest.approx(np.array(values[3:]), rel=1e-5)
        assert distance(*models) <= 1e-5
