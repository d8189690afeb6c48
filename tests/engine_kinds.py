"""Models of many kinds with a loss each: what evaluations that leave out or share parts of forward passes have to get right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hf_tools
import torch
import torch.nn.functional as F
from engine_models import LanguageModel, Recurrent
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Dropout(0.3)) for _ in range(3)
        )
        self.head = nn.Linear(2 * 36, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + x
        return self.head(F.dropout(x.flatten(1), 0.2, self.training))


class Shared(nn.Module):
    """One layer three times, and a functional read of another one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.first(x), self.last.weight)
        for _ in range(3):
            x = torch.tanh(self.middle(x))
        return self.last(x)


class InPlace(nn.Module):
    """Changes in place what its layer returned, through a view and in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.relu = nn.Linear(10, 10), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        y = x.view(-1)
        self.relu(x)
        y.add_(0.1)
        return x


class ChangedOutside(nn.Module):
    """Changes the outputs of two of its four blocks in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InPlace() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index % 2:
                x.mul_(0.5)
        return x


class Sidelong(nn.Module):
    """Blocks that leave something for the loss in an attribute, a list, a buffer of their own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.left = way, []
        self.layers = nn.ModuleList(Leaving(way) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        left: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, left)
        if self.way == "buffer":
            left = [layer.kept for layer in self.layers]
        if self.way == "attribute":
            left = [layer.aside for layer in self.layers]
        return x + torch.stack(left).sum()


class Leaving(nn.Module):
    kept: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.linear = way, nn.Linear(10, 10)
        self.register_buffer("kept", torch.zeros(()))

    def forward(self, x: Tensor, left: list[Tensor]) -> Tensor:
        x = torch.tanh(self.linear(x))
        if self.way == "buffer":
            self.kept.copy_(x.mean())
        elif self.way == "attribute":
            self.aside = x.mean()
        else:
            left.append(x.mean())
        return x


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0))


def kinds(dtype: torch.dtype = torch.float32) -> dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    """(module in training mode, loss) by kind."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x, images = torch.randn(6, 10, generator=generator).to(dtype), torch.randn(3, 2, 6, 6, generator=generator).to(dtype)
    ids = torch.arange(24).view(4, 6) % 10 + 1
    text = {"input_ids": ids, "labels": torch.tensor([0, 1, 0, 1])}
    square: Callable[[nn.Module], Tensor] = lambda net: net(x).square().mean()  # noqa: E731
    layers = [part for _ in range(4) for part in (nn.Linear(10, 10), nn.LayerNorm(10), nn.Dropout(0.2), nn.GELU())]
    plain = {
        "mlp": nn.Sequential(*layers),
        "shared": Shared(),
        "in place": ChangedOutside(),
        **{f"left in a {way}": Sidelong(way) for way in ("list", "attribute", "buffer")},
    }
    found: dict[str, Any] = {name: (model, square) for name, model in plain.items()}
    found["convolution"] = Convolutional(), lambda net: net(images).square().mean()
    found["functional head"] = LanguageModel(), lambda net: net(ids).square().mean()
    found["tied head"] = LanguageModel("tied"), lambda net: net(ids).square().mean()
    found["lstm"] = Recurrent(), lambda net: net(ids).square().mean()
    found["gpt2"] = gpt2(), lambda net: net(input_ids=ids, labels=ids).loss
    found["bert"] = hf_tools.bert(), lambda net: net(**text).loss
    layer = nn.TransformerEncoderLayer(10, 2, 12, dropout=0.1, batch_first=True)
    found["transformer"] = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), lambda net: net(x[None]).square().mean()
    found["forwards of two batches"] = nn.Sequential(*copy.deepcopy(layers)), lambda net: square(net) + net(2 * x).square().mean()
    return {name: (model.train().to(dtype), loss) for name, (model, loss) in found.items()}
