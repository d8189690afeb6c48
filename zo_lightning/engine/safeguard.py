"""The safeguard: stops a run (or halves its step) when the loss stays well above where it began."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from zo_lightning.engine.messages import say_once

ACTIONS = ("stop", "halve", "warn")


class DivergenceError(RuntimeError):
    """The loss stayed well above its start."""


@dataclass
class Safeguard:
    """Compares the mean loss of the last `window` steps with that of the first `window`.

    Diverging: mean > start + max(tolerance * |start|, 4 * s), with s the standard deviation of the losses of the first window. Judged once
    per window. `action` "stop" raises DivergenceError, "halve" halves the step (its own factor on lr) and says so, "warn" says so once.
    """

    window: int = 50
    tolerance: float = 0.2
    action: str = "stop"
    scale: float = 1.0
    _losses: list[float] = field(default_factory=list, repr=False)
    _start: tuple[float, float] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 2:
            raise ValueError(f"Invalid safeguard window: {self.window!r}. Must be an integer >= 2 (steps).")
        if not self.tolerance > 0:
            raise ValueError(f"Invalid safeguard tolerance: {self.tolerance!r}. Must be > 0 (share of the loss at the start).")
        if self.action not in ACTIONS:
            raise ValueError(
                f"safeguard={self.action!r} is not known. Use one of {', '.join(map(repr, ACTIONS))}, None, or a Safeguard(...)."
            )

    def watch(self, loss: float, lr: float, usual_lr: str) -> None:
        """Take in the loss of one step; `lr` and the usual range are named in the message. Raises DivergenceError with action "stop"."""
        self._losses.append(loss)
        if len(self._losses) < self.window:
            return
        mean = math.fsum(self._losses) / self.window
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in self._losses) / (self.window - 1))
        self._losses = []
        if self._start is None:
            self._start = (mean, spread)
            return
        start, noise = self._start
        if mean > start + max(self.tolerance * abs(start), 4 * noise):
            self._act(start, mean, lr, usual_lr)

    def _act(self, start: float, mean: float, lr: float, usual_lr: str) -> None:
        message = (
            f"The run diverges: the mean loss of the last {self.window} steps is {mean:.4g}, that of the first {self.window} {start:.4g}. "
            f"The learning rate is lr={lr * self.scale:.3g}. Usual is {usual_lr}. "
        )
        if self.action == "stop":
            raise DivergenceError(message + 'Lower lr, or set safeguard="halve" to halve it when this happens, or safeguard=None to go on.')
        if self.action == "halve":
            self.scale /= 2
            say_once(f"diverge.{self.scale}", message + f"The step is halved: lr is multiplied by {self.scale:g} from now on.")
        else:
            say_once("diverge", message)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as the uninterrupted one would."""
        return {"scale": self.scale, "losses": list(self._losses), "start": None if self._start is None else list(self._start)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.scale, self._losses = float(state["scale"]), [float(x) for x in state["losses"]]
        self._start = None if state["start"] is None else (float(state["start"][0]), float(state["start"][1]))
