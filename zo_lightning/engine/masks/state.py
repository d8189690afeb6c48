"""The mask of a run: made at the first step, made anew at refreshes, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_lightning.engine.estimators import Term
from zo_lightning.engine.masks.plan import Mask
from zo_lightning.engine.masks.rules import Chosen, Draw, Layer, ShardedLayer
from zo_lightning.engine.noise import Change, Noise, apply_changes
from zo_lightning.engine.noise.members import Band, Bits, Listed, Lot, Members
from zo_lightning.engine.parameters import Trained


class Masks:
    """Which elements of which parameters a step moves. Without a `Mask`: all of them."""

    def __init__(self, mask: Mask | None = None) -> None:
        self.mask = mask
        self.chosen: Chosen | None = None
        self._among: frozenset[int] = frozenset()
        self.before: Masks | None = None
        """The mask before a refresh, while `made` tells of it."""
        self._last: Chosen | None = None
        """The mask before steps that measure, as long as they do."""
        self._measured: list[Change] = []
        """g_j z_j of these steps."""
        self._since: dict[int, int] = {}
        """By the key of a parameter, how many of them were made before it was trained."""
        self.number: int | None = None
        """Of the mask at hand; None before the first one is made."""

        self.listeners: list[Callable[[Masks, Sequence[Trained]], None]] = []
        """Called when a mask was made, before the step that it is for."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no listeners."""
        return {**vars(self), "listeners": []}

    @staticmethod
    def fixed(chosen: Chosen | None) -> Masks:
        """Masks that somebody else has chosen; None trains everything."""
        masks = Masks()
        masks.chosen = chosen
        return masks

    @property
    def measuring(self) -> bool:
        """Whether the steps with the mask at hand measure for the next one, and move nothing (`MaskRule.measures`)."""
        return self.mask is not None and self.number is not None and self.mask.measuring(self.number)

    def measures(self, step: int) -> bool:
        """Whether a step measures, also one that has not begun."""
        return self.mask is not None and self.mask.measuring(self.mask.number(step))

    def measure(self, terms: Sequence[Term], scales: Sequence[float]) -> None:
        """A step's terms, for the perturbation scale of each group, where steps measure; a skipped step has none."""
        if self.measuring and terms:
            steps = tuple((1.0, tuple(term.slope / eps for term in terms)) for eps in scales)
            self._measured.append(Change(tuple(term.seed for term in terms), steps, None))

    def due(self, step: int, trained: Sequence[Trained]) -> bool:
        """Whether a step needs another mask than the one at hand."""
        return self.mask is not None and (self.mask.number(step) != self.number or {p.key for p in trained} != self._among)

    def begin(self, step: int, trained: Sequence[Trained], seed: int, noise: Noise, chosen: Chosen | None = None) -> bool:
        """A step begins, the weights are unperturbed: make the mask if it is due. Whether it was. `chosen` is used instead, if given."""
        if self.mask is None or not self.due(step, trained):
            return False
        number, among = self.mask.number(step), frozenset(p.key for p in trained)
        last = self._last if self.measuring else self.chosen
        layers = [ShardedLayer.of(p) for p in trained]
        with torch.no_grad():
            draw = Draw(seed, number, lambda layer: self._mean(layer, noise))
            self.chosen = self.mask.make(layers, self.mask.counts(layers, step), draw) if chosen is None else chosen
        again, self.number, self._among = number == self.number, number, among
        self._last = last if self.measuring else None
        if self.measuring:
            self._measured = self._measured if again else []
            known = self._since if again else {}
            self._since = {key: known.get(key, len(self._measured)) for key in among}
        self.before = None if last is None or chosen is not None else Masks.fixed(last)
        return True

    def _mean(self, layer: Layer, noise: Noise) -> Tensor:
        """1/n sum_j g_j z_j of a layer over the steps that measured since it was trained: float32, flat."""
        own = self._measured[self._since.get(layer.key, len(self._measured)) :]
        if not own:
            late = (
                "it is trained only since then. Unfreeze it before, give refresh=, or name it in exclude= (trained in full) or in frozen="
            )
            why = late if self._measured else "all losses since the mask was due were not finite"
            raise ValueError(f"No step has measured a gradient of {layer.name!r}: {why}.")
        theta = layer.tensor
        total = torch.zeros(theta.numel(), device=theta.device)
        apply_changes([Layer(layer.name, layer.key, total, layer.group)], own, noise)
        return total.div_(len(own))

    @property
    def reproducible(self) -> bool:
        """Whether an equal run makes equal masks."""
        return self.mask is None or self.mask.rule.reproducible

    def take(self, chosen: Chosen) -> None:
        """Use these instead of what was made."""
        self.chosen = chosen

    def made(self, trained: Sequence[Trained]) -> None:
        """Tell those who want to know."""
        for listener in self.listeners:
            listener(self, trained)
        self.before = None  # its bits would take as much memory as those of the mask at hand

    def trains(self, key: int) -> bool:
        """Whether any element of a parameter is trained."""
        return self.chosen is None or key in self.chosen

    def of(self, key: int) -> Members | None:
        """The mask of a parameter that is trained; None where all of it is."""
        return None if self.chosen is None else self.chosen.get(key)

    # ---- what a checkpoint keeps

    def state_dict(self) -> dict[str, Any]:
        """Numbers and small tensors; bits and lists as they are."""
        chosen, last = (None if some is None else {key: encode(mask) for key, mask in some.items()} for some in (self.chosen, self._last))
        measured = [(list(change.seeds), [list(own) for _, own in change.steps]) for change in self._measured]
        mask = None if self.mask is None else self.mask.described()
        return {
            "mask": mask,
            "number": self.number,
            "among": sorted(self._among),
            "chosen": chosen,
            "last": last,
            "measured": measured,
            "since": dict(self._since),
        }

    def load_state_dict(self, state: dict[str, Any], device_of: dict[int, torch.device]) -> None:
        """Take over what `state_dict` returned."""
        if self.mask is None:
            return
        cpu = torch.device("cpu")
        self.number, self._among = state["number"], frozenset(state["among"])
        self._since = dict(state["since"])
        self._measured = [Change(tuple(seeds), tuple((1.0, tuple(own)) for own in steps), None) for seeds, steps in state["measured"]]
        self.chosen, self._last = (
            None if some is None else {key: decode(mask, device_of.get(key, cpu)) for key, mask in some.items()}
            for some in (state["chosen"], state["last"])
        )


def encode(mask: Members | None) -> dict[str, Any] | None:
    """A mask as plain types and tensors."""
    if mask is None:
        return None
    if isinstance(mask, Band):
        return {"kind": "large" if mask.largest else "small", "bound": mask.bound, "last": mask.last, "dtype": str(mask.dtype)[6:]}
    if isinstance(mask, Lot):
        return {"kind": "lot", "seed": mask.seed, "key": mask.key, "cut": mask.cut}
    if isinstance(mask, Bits):
        return {"kind": "bits", "words": mask.words.cpu()}
    if isinstance(mask, Listed):
        return {"kind": "list", "index": mask.index.cpu()}
    raise TypeError(f"A mask of class {type(mask).__name__} can't be saved.")


def decode(state: dict[str, Any] | None, device: torch.device) -> Members | None:
    """What `encode` returned, as a mask."""
    if state is None:
        return None
    if state["kind"] in ("small", "large"):
        return Band(state["bound"], state["last"], getattr(torch, state["dtype"]), state["kind"] == "large")
    if state["kind"] == "lot":
        return Lot(state["seed"], state["key"], state["cut"])
    if state["kind"] == "bits":
        return Bits(state["words"].to(device))
    return Listed(state["index"].to(device))
