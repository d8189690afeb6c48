"""A model learns colours for words from preferences alone: nobody says how good a palette is, only which of four is better.

python examples/rankings.py                          # a scripted judge: seconds on a CPU
python examples/rankings.py --ask terminal           # you are the judge
python examples/rankings.py --ask files              # questions in questions/, answers from whoever writes them, kill it when you like

The judge sees palettes, never the model, and returns an order of them. ZO-RankSGD (arXiv 2303.03751) makes a step of it.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning import ZOOptimizer
from zo_lightning.engine import RankSGD
from zo_lightning.engine.objectives import FileOracle, Ranking, TerminalOracle

WORDS = {"sky": (0.5, 0.8, 0.9), "grass": (0.3, 0.6, 0.2), "fire": (0.9, 0.4, 0.1)}
"""What the scripted judge has in mind."""
SAMPLES = 4


class Painter(nn.Module):
    """A colour, red, green and blue in [0, 1], for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), 8)
        self.colour = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3), nn.Sigmoid())

    def forward(self) -> Tensor:
        colours: Tensor = self.colour(self.words.weight)
        return colours


def distance(palette: Tensor) -> float:
    """Root mean square from what the judge has in mind."""
    return float((palette.detach() - torch.tensor(list(WORDS.values()))).square().mean().sqrt())


def judge(palettes: list[Tensor]) -> list[int]:
    """The best first."""
    return sorted(range(len(palettes)), key=lambda i: distance(palettes[i]))


def show(palette: Tensor) -> str:
    """For people: hexadecimal colours."""
    codes = ["#" + "".join(f"{round(255 * part):02x}" for part in colour) for colour in palette.tolist()]
    return ", ".join(f"{word} {code}" for word, code in zip(WORDS, codes, strict=True))


def main() -> None:
    """Train and say what was learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ask", choices=["judge", "terminal", "files"], default="judge")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    oracle: Any = {"judge": judge, "terminal": TerminalOracle(show), "files": FileOracle("questions", show=show)}[options.ask]

    torch.manual_seed(0)
    model = Painter()
    optimizer = ZOOptimizer(model, lr=4e-3, eps=0.1, estimator=RankSGD(samples=SAMPLES), objective=Ranking(oracle))
    print(f"Before: {show(model().detach())}, {distance(model()):.3f} from what the judge likes")
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / options.steps)
        optimizer.step(lambda: {"outputs": model()})
    print(f"After {options.steps} orders of {SAMPLES}: {show(model().detach())}, {distance(model()):.3f}")


if __name__ == "__main__":
    main()
