"""The safeguard: stops a run (or halves its step) when the loss stays well above where it began."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zo_lightning.engine.messages import check_number, say_once

ACTIONS = ("stop", "halve", "warn")
_LEAST = 10
"""Steps in a first window that can be judged by itself."""
_LEAST_SCALE = 2.0**-10


class DivergenceError(RuntimeError):
    """The loss stayed well above its start."""


@dataclass
class Safeguard:
    """Compares the mean loss of the last `window` steps with that of the first `window`; judged once per window.

    Diverging: mean > start + max(tolerance |start|, 4 s, 3 s' / sqrt(window)), with s' the standard deviation of the losses in this window
    and s the largest one of an earlier window below the bound. The first window itself, where it has 10 steps or more, is judged against
    the very first loss l, which no update has touched: every loss of its second half > l + max(tolerance |l|, min(4 s'', 3 |l|)).

    `action` "stop" raises DivergenceError. "halve" halves the step (a factor of its own on lr, which never grows back), does so again only
    while the loss does not fall, and stops after ten times. "warn" says so once.
    """

    window: int = 50
    tolerance: float = 0.2
    action: str = "stop"
    scale: float = 1.0
    _losses: list[float] = field(default_factory=list, repr=False)
    _start: tuple[float, float] | None = field(default=None, repr=False)
    _halved_at: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 2:
            raise ValueError(f"Invalid safeguard window: {self.window!r}. Must be an integer >= 2 (steps).")
        check_number("safeguard tolerance", self.tolerance, "> 0 (share of the loss at the start)", lambda x: x > 0)
        if self.action not in ACTIONS:
            raise ValueError(
                f"safeguard={self.action!r} is not known. Use one of {', '.join(map(repr, ACTIONS))}, None, or a Safeguard(...)."
            )

    def restart(self) -> None:
        """The objective is another one from now on: what was seen of it says nothing."""
        self._losses, self._start = [], None

    def watch(self, loss: float, lr: float, usual_lr: Callable[[], str]) -> None:
        """Take in the loss of one step; `lr` and the usual range are named in the message. Raises DivergenceError with action "stop"."""
        self._losses.append(loss)
        if len(self._losses) < self.window:
            return
        losses, self._losses = self._losses, []
        mean, spread = statistics.fmean(losses), statistics.stdev(losses)
        if self._start is not None:
            start, noise = self._start
            bound = start + max(self.tolerance * abs(start), 4 * noise)
            if mean <= bound:
                self._start = (start, max(noise, spread))
            elif mean > start + 3 * spread / math.sqrt(self.window):  # else a few outliers made it
                self._act(f"that of the first {self.window} {start:.4g}", mean, lr, usual_lr)
        elif self._rose(losses):
            self._start = (losses[0], 0.0)
            self._act(f"the first one was {losses[0]:.4g}", mean, lr, usual_lr)
        else:
            self._start = (mean, spread)

    def _rose(self, losses: list[float]) -> bool:
        """Whether the first window left its first loss behind and never came back."""
        first, rest = losses[0], losses[len(losses) // 2 :]
        if len(losses) < _LEAST:
            return False
        return min(rest) > first + max(self.tolerance * abs(first), min(6 * statistics.stdev(rest), 3 * abs(first)))

    def _act(self, start: str, mean: float, lr: float, usual_lr: Callable[[], str]) -> None:
        message = (
            f"The run diverges: the mean loss of the last {self.window} steps is {mean:.4g}, {start}. "
            f"The learning rate is lr={lr * self.scale:.3g}. Usual is {usual_lr()}. "
        )
        if self.action == "stop":
            raise DivergenceError(message + 'Lower lr, or set safeguard="halve" to halve it when this happens, or safeguard=None to go on.')
        if self.action == "warn":
            say_once("diverge", message)
        elif self._halved_at is None or mean >= self._halved_at:
            if self.scale <= _LEAST_SCALE:
                raise DivergenceError(message + f"It was halved {round(-math.log2(self.scale))} times. Begin again with a lower lr.")
            self.scale /= 2
            self._halved_at = mean
            say_once(f"diverge.{self.scale}", message + f"The step is halved: lr is multiplied by {self.scale:g} from now on.")
        else:
            self._halved_at = mean  # it falls: wait

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as the uninterrupted one would."""
        start = None if self._start is None else list(self._start)
        return {"scale": self.scale, "losses": list(self._losses), "start": start, "halved_at": self._halved_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.scale, self._losses = float(state["scale"]), [float(x) for x in state["losses"]]
        self._start = None if state["start"] is None else (float(state["start"][0]), float(state["start"][1]))
        self._halved_at = state["halved_at"]
