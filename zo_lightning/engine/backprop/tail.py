"""What of a run is trained by backpropagation: its parameters, their first-order optimizer, and their float32 values."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zo_lightning.engine.backprop.graph import NO_GRAPH, Graph, NoGraph, differentiated, wide
from zo_lightning.engine.backprop.options import Backprop
from zo_lightning.engine.parameters import Scale, Trained
from zo_lightning.engine.residency import Masters, Residency
from zo_lightning.engine.updates import GroupSettings

if TYPE_CHECKING:
    from zo_lightning.engine.parallel import Exchange
    from zo_lightning.engine.window import Window

_EXAMPLES = 4


class Tail:
    """The parameters phi of `Backprop`, empty without one. States are kept by the parameters' keys."""

    def __init__(self, backprop: Backprop | None) -> None:
        self.backprop = backprop
        self.parameters: list[Trained] = []
        self._masters = Masters(every=True)
        self._progress = None if backprop is None else backprop.rule.begin()
        self.reached = False
        """Whether a loss was seen to depend on them."""
        self.recording = False
        """Whether an evaluation runs in which all others are constants (requires_grad=False)."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "parameters": [], "recording": False}  # a copy of the optimizer looks them up among its own

    # ---- which

    def taken_from(self, trained: Sequence[Trained], names: Mapping[int, Sequence[str]]) -> list[Trained]:
        """Keep those whose names fit, return the others. `names` has all of every parameter, trained or not, by id.

        ValueError where a pattern fits nothing that is trained, where nothing else is left, for a parameter that is tied to one that does
        not fit or is a `Scale`, and for sharded models.
        """
        if self.backprop is None:
            return list(trained)
        for pattern in self.backprop.patterns:
            self._check_pattern(pattern, trained, names)
        own = [p for p in trained if any(map(self._fits, _names_of(p, names)))]
        if len(own) == len(trained):
            raise ValueError(
                f"Invalid backprop: {self._said()} fits all that is trained, so that nothing is left to train forward-only. Use fewer "
                "patterns, or a first-order optimizer for everything."
            )
        sharded = next((p.name for p in trained if p.region is not None), None)
        if sharded is not None:
            raise ValueError(
                f"Invalid backprop: {self._said()} with a sharded model ({sharded!r} is in shards), whose gradients are not gathered here. "
                "Leave backprop out, or use processes that have the whole model each."
            )
        for p in own:
            self._check(p, names)
        self.parameters = own
        return [p for p in trained if p not in own]

    def _check_pattern(self, pattern: str, trained: Sequence[Trained], names: Mapping[int, Sequence[str]]) -> None:
        if any(fnmatch.fnmatchcase(name, pattern) for p in trained for name in _names_of(p, names)):
            return
        every = [name for own in names.values() for name in own]
        if any(fnmatch.fnmatchcase(name, pattern) for name in every):
            raise ValueError(f"Invalid backprop: {pattern!r} fits parameters that are all frozen. Set requires_grad=True for them.")
        known = every or [p.name for p in trained]
        raise ValueError(
            f"Invalid backprop: {pattern!r} fits no parameter. Names are without the prefix that all have in common; the last ones are "
            f"{', '.join(map(repr, known[-_EXAMPLES:]))}."
        )

    def _check(self, p: Trained, names: Mapping[int, Sequence[str]]) -> None:
        other = next((name for name in _names_of(p, names) if not self._fits(name)), None)
        if other is not None:
            own = next(name for name in _names_of(p, names) if self._fits(name))
            raise ValueError(
                f"Invalid backprop: {own!r} is tied to {other!r}, which {self._said()} does not fit: they are one parameter. Leave it to "
                "forward-only training (another pattern), untie them (tie_word_embeddings=False), or let patterns fit both: its gradient "
                "then takes the activations of all that is between them."
            )
        if any(isinstance(alias, Scale) for alias in p.aliases):
            raise ValueError(f"Invalid backprop: {p.name!r} is the scale of quantized weights, which is trained forward-only.")

    def _fits(self, name: str) -> bool:
        return self.backprop is not None and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.backprop.patterns)

    def _said(self) -> str:
        return " ".join(() if self.backprop is None else map(repr, self.backprop.patterns))

    # ---- a step

    def graph(self, window: Window, residency: Residency, module: nn.Module | None) -> NoGraph:
        """For the evaluations of a micro-batch."""
        return Graph(self, window.points, residency, module) if self.parameters else NO_GRAPH

    def gradients(self, window: Window, exchange: Exchange) -> list[Tensor]:
        """G of each parameter, the same on every rank: the mean over points, and over ranks as that of the losses is."""
        if not self.parameters:
            return []
        own = window.gradients or [torch.zeros_like(p.tensor, dtype=wide(p.tensor.dtype)) for p in self.parameters]
        return exchange.averaged(own, len(differentiated(window.points)) * exchange.mesh.data)

    def update(self, gradients: Sequence[Tensor], settings: Sequence[GroupSettings], factors: Sequence[float]) -> None:
        """Move the parameters; of each group the weight decay, and what a scheduler has made of its learning rate, as a factor."""
        if self.backprop is None or self._progress is None:
            return
        bound = self._bounded(gradients)
        given = {p.key: gradient for p, gradient in zip(self.parameters, gradients, strict=True)}
        for p in self._masters.instead_of(self.parameters):
            lr = self.backprop.lr * factors[p.group]
            decay = settings[p.group].weight_decay if self.backprop.weight_decay is None else self.backprop.weight_decay
            theta = p.tensor.detach()
            gradient = given[p.key].to(theta)
            if bound < 1.0:
                gradient = gradient * bound
            if decay:
                theta.mul_(1.0 - lr * decay)
            self._progress.move(p.key, theta, gradient, lr)
        self._masters.write_back()

    def _bounded(self, gradients: Sequence[Tensor]) -> float:
        """The factor that keeps the norm of all gradients to `max_norm`."""
        if self.backprop is None or self.backprop.max_norm is None:
            return 1.0
        norm = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
        return self.backprop.max_norm / norm if norm > self.backprop.max_norm else 1.0

    # ---- checkpoints, and ranks

    def tensors(self) -> list[Tensor]:
        """What steps change: the parameters, and float32 values of 16-bit ones."""
        masters = self._masters.state_dict()
        return [*(p.tensor for p in self.parameters), *(masters[key] for key in sorted(masters))]

    def state_dict(self) -> dict[str, Any] | None:
        """None without a `Backprop`."""
        if self.backprop is None or self._progress is None:
            return None
        of = {"patterns": list(self.backprop.patterns), "optimizer": self.backprop.rule.optimizer}
        return {"of": of, "state": self._progress.state_dict(), "masters": self._masters.state_dict(), "reached": self.reached}

    def check_state(self, state: dict[str, Any] | None) -> None:
        """ValueError for the state of others."""
        own = self.state_dict()
        there, here = (None if each is None else each["of"] for each in (state, own))
        if there != here:
            raise ValueError(
                f"The state was saved with backprop={there}, and here it is {here}. Resume with the same patterns and optimizer."
            )

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take over what `state_dict` returned."""
        if state is not None and self._progress is not None:
            self._progress.load_state_dict(state["state"])
            self._masters.load_state_dict(state["masters"])
            self.reached = state["reached"]

    def forget(self) -> None:
        """Begin again from the parameters alone."""
        self._masters.clear()
        if self._progress is not None:
            self._progress.clear()


def _names_of(p: Trained, names: Mapping[int, Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for alias in p.aliases for name in names.get(id(alias), ())) or [p.name])
