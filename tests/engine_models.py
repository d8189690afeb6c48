"""Small models that read their weights in every way, and what the tests of the engine compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Closure = Callable[[], Tensor]
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RESIDENCIES = ("exact", "copy", "inplace")


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
