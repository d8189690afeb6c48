"""Small models that read their weights in every way, and what the tests of the engine compare."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference.noise import evaluation_seed
from reference.spsa import Settings, spsa_step
from torch import Tensor, nn

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.residency import Offload

Closure = Callable[[], Tensor]
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RESIDENCIES = ("exact", "copy", "inplace")
STREAMED = Offload()
"""Beside them; not in their tuple, for between two steps it is a state dict that has its weights, and the parameters may lack an update."""
STEPS = 3


def eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of the noise is compiled, wherever it is asked for."""
    for name, module in list(sys.modules.items()):
        if name.startswith("zo_lightning.engine.noise.") and hasattr(module, "available"):
            monkeypatch.setattr(module, "available", lambda device: False)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers: -0 differs from 0, and a NaN equals itself."""
    return tensor.detach().contiguous().view(INTEGER[tensor.element_size()])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(bits(a[name]), bits(b[name])) for name in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest absolute difference."""
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a if a[name].numel())


def mlp(dropout: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """177 weights in three tensors: "0.weight" (16, 10), "3.weight" (1, 16) and "3.bias" (1)."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 16, bias=False), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1)).to(dtype)


def regression(dtype: torch.dtype = torch.float64, rows: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs (rows, 10) and targets (rows, 1)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 10, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.sin(x.sum(1, keepdim=True)).to(dtype)


def mean_square(model: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> Closure:
    """The loss of a regression as a closure."""
    return lambda: F.mse_loss(model(data[0]), data[1])


class Block(nn.Module):
    """Attention and a feed-forward part. MultiheadAttention reads out_proj's weight itself instead of calling it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm(x))))


class LanguageModel(nn.Module):
    """A decoder whose head is its embedding: by functional call on the embedding's weight, or by a tied Linear."""

    def __init__(self, head: str = "functional", blocks: int = 2, calls: int = 1, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.gain = nn.Parameter(torch.tensor(0.9))
        self.calls = calls
        self.head = nn.Linear(width, 11, bias=False) if head == "tied" else None
        if self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.gain
        for _ in range(self.calls):
            for block in self.blocks:
                x = block(x)
        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)


class Recurrent(nn.Module):
    """An LSTM, which keeps its weights in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.core = nn.LSTM(16, 11, num_layers=2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.core(self.embed(tokens))[0]


class Encoder(nn.Module):
    """torch's own TransformerEncoder, whose layers read each other's weights on their fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)))


class Stage(nn.Module):
    """Two blocks and a scale of its own; it reads a bias that belongs to the first block's child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Block(), Block()])
        self.scale = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.inner:
            x = block(x)
        return x * self.scale + self.inner[0].down.bias


class Nested(nn.Module):
    """Blocks inside blocks, and a last norm that reads a bias of the first stage."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.stages = nn.ModuleList([Stage(), Stage()])
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for stage in self.stages:
            x = stage(x)
        return self.head(x + self.stages[0].scale)


TOKENS = torch.tensor([[1, 4, 2, 9, 0, 3], [7, 7, 10, 5, 6, 8]])


def next_token(model: Callable[[Tensor], Tensor], tokens: Tensor = TOKENS) -> Closure:
    """The loss of next-token prediction as a closure, in float32 or wider."""

    def loss() -> Tensor:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1), tokens[:, 1:].flatten())

    return loss


SEQUENCE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "F.linear on the embedding in the parent": LanguageModel,
    "tied head": lambda: LanguageModel("tied"),
    "blocks called twice": lambda: LanguageModel(calls=2),
    "nested blocks": Nested,
    "LSTM": Recurrent,
    "nn.TransformerEncoder": Encoder,
}


def sequence_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """One of SEQUENCE_MODELS, the same each time."""
    torch.manual_seed(seed)
    return SEQUENCE_MODELS[name]().to(dtype)


class Images(nn.Module):
    """Residual convolutions with running statistics, with weights and activations in channels-last layout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)])
        self.head = nn.Linear(8, 4)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Reparametrized(nn.Module):
    """Weights that are functions of the trained ones, by a parametrization and by a hook, in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(10, 16))
        self.blocks = nn.ModuleList([nn.Sequential(nn.utils.spectral_norm(nn.Linear(16, 16)), nn.Tanh()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x.mean(1, keepdim=True)


class Recursive(nn.Module):
    """A block that calls itself, and no other blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 10)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        deeper = self(x * 0.5, depth - 1) if depth else x
        return torch.tanh(self.inner(deeper)) * self.scale if depth < 3 else deeper.mean(1, keepdim=True) * self.scale


class Unusual(nn.Module):
    """Weights with holes, transposed, without dimensions and without elements; read by functions, not by layers."""

    def __init__(self) -> None:
        super().__init__()
        self.holes = nn.Parameter(torch.randn(16, 20)[:, ::2])
        self.turned = nn.Parameter(torch.randn(16, 8).t())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))

    def to(self, *args: object, **kwargs: object) -> Unusual:
        """Casting keeps the strides of a dense tensor only: the holes are made again."""
        super().to(*args, **kwargs)  # type: ignore[call-overload]
        wide = torch.zeros(16, 20, dtype=self.holes.dtype)
        wide[:, ::2] = self.holes.detach()
        self.holes = nn.Parameter(wide[:, ::2])
        return self

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(x @ self.holes.t()) @ self.turned.t()).mean(1, keepdim=True) * self.scale + self.nothing.sum()


def pictures(model: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> Closure:
    """The loss of a classification of images as a closure."""
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    return lambda: F.cross_entropy(model(x.to(memory_format=torch.channels_last)), torch.tensor([0, 1, 2, 3, 0, 1]))


def penalized(model: nn.Module) -> Closure:
    """A loss that reads every weight itself, outside of any forward."""
    loss = next_token(model)
    return lambda: loss() + 0.01 * torch.stack([weight.square().sum() for weight in model.parameters()]).sum()


TASKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Closure]]] = {
    **{name: (make, next_token) for name, make in SEQUENCE_MODELS.items()},
    "BatchNorm and channels-last convolutions": (Images, pictures),
    "weight norm and spectral norm": (Reparametrized, lambda model: mean_square(model, regression())),
    "a module that calls itself": (Recursive, lambda model: mean_square(model, regression())),
    "unusual weights": (Unusual, lambda model: mean_square(model, regression())),
    "a penalty on the weights beside the model": (LanguageModel, penalized),
    "no blocks": (lambda: mlp(dropout=0.2), lambda model: mean_square(model, regression())),
}


def task(name: str) -> tuple[nn.Module, Closure]:
    """A model of TASKS in float64, the same each time, and its loss."""
    torch.manual_seed(0)
    make, loss = TASKS[name]
    model = make().to(torch.float64)
    return model, loss(model)


def by_hand(
    model: nn.Module, loss: Callable[[nn.Module], Closure], settings: Settings, steps: int = STEPS, prefix: str = ""
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """The weights after `steps` steps on deep copies whose weights are overwritten for every evaluation, and the losses.

    Buffers advance as the first evaluation of each step leaves them. `prefix` is no part of the names.
    """
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    theta = {name.removeprefix(prefix): model.get_parameter(name).detach().clone() for name in trained}
    values, twins = [], [model]
    for step in range(steps):
        start = twins[0]
        twins = []

        def evaluate(weights: dict[str, Tensor], step: int = step, start: nn.Module = start, twins: list[nn.Module] = twins) -> float:
            twins.append(copy.deepcopy(start))
            with torch.no_grad():
                for name in trained:
                    twins[-1].get_parameter(name).copy_(weights[name.removeprefix(prefix)])
                torch.manual_seed(evaluation_seed(settings.seed, step, 0))
                return float(loss(twins[-1])())

        theta, losses = spsa_step(theta, evaluate, settings, step)
        values.append(losses)
    return theta, values


def train(optimizer: ZOOptimizer, loss: Closure, steps: int = STEPS) -> list[list[float]]:
    """The losses at every point of every step."""
    values = []
    for _ in range(steps):
        optimizer.step(loss)
        assert optimizer.report is not None
        values.append(list(optimizer.report.values))
    return values


class Spy:
    """Holds the memory of a model's weights and looks at it after each forward of each module.

    It reads through numpy: what torch operations read while a pass is watched counts as a use of the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pointers = [weight.data_ptr() for weight in model.parameters()]
        self.bases = [weight.detach().numpy() for weight in model.parameters()]
        self.start = [base.tobytes() for base in self.bases]
        self.looks: list[bool] = []
        for module in model.modules():
            module.register_forward_hook(lambda *args: self.looks.append(self.unperturbed()))

    def unperturbed(self) -> bool:
        return [base.tobytes() for base in self.bases] == self.start

    def back(self) -> bool:
        """The parameters are on their own memory, and that is unperturbed."""
        return [weight.data_ptr() for weight in self.model.parameters()] == self.pointers and self.unperturbed()
