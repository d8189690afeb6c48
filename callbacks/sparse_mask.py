"""SparseMask: train some of the weights of each layer, chosen by a rule, under either host."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from zo_lightning.callbacks.base import Run, ZOCallback
from zo_lightning.engine.masks import Mask, MaskRule, Masks
from zo_lightning.engine.masks.plan import Density
from zo_lightning.engine.masks.report import MANY, Share, charts, shares, table
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.parameters import Trained


class SparseMask(ZOCallback):
    """Perturbs and updates m z instead of z, with a mask m of every layer: fewer trained weights, less variance of the estimate.

    `SparseMask("small_weights", density=0.25)` is Sparse MeZO (arXiv 2402.15751). docs/masks.md has the rules, their papers and costs. The
    mask is a part of checkpoints and of the step log. Logs the trained share of each layer and its overlap with the previous mask, as
    `zo/mask/...`, after each refresh.

    Args:
        rule: "small_weights", "large_weights", "random", "n_of_m", "sensitive", "principal_weights", "half_layers", "layer_sampling",
            "blockwise", "structured", or a `MaskRule` (`NofM(2, 4)`, `Where(function)`, ...).
        density: share of each layer's weights that is trained, in (0, 1]: a number, a mapping from patterns of layer names to numbers, or
            a function of the step, looked up at each refresh. None for rules with a share of their own.
        budget: "layer"; "global" gives the same total to the smallest or largest weights of all layers.
        refresh: steps between two masks; None keeps the first one. until: from this step on the mask stays as it is.
        include, exclude: patterns of layers that the rule is for, and of those that it is not for; these are trained in full. Biases and
            norms are layers like any other. frozen: patterns of layers that are not trained.
        summary: print a table of layers and trained weights when the first mask is made.
        layers: what to chart beside the density and overlap of all layers: True, those of each; False, nothing; None, of each, or, where
            there are more than 64, of each repeated block and of the layers outside of blocks.

    Raises ValueError for an option out of range; before the first step, for a pattern that fits no layer, a mask that leaves nothing to
    train, and a rule that does not fit a layer.
    """

    def __init__(
        self,
        rule: str | MaskRule,
        density: Density | None = None,
        *,
        budget: str = "layer",
        refresh: int | None = None,
        until: int | None = None,
        include: str | Sequence[str] = ("*",),
        exclude: str | Sequence[str] = (),
        frozen: str | Sequence[str] = (),
        summary: bool = True,
        layers: bool | None = None,
    ) -> None:
        if layers is not None and not isinstance(layers, bool):
            raise ValueError(f"Invalid layers: {layers!r}. Must be True, False, or None (blocks where there are more than {MANY} layers).")
        self.mask = Mask(rule, density, budget, refresh, until, include, exclude, frozen)
        self._summary, self._layers = summary, layers
        self._says = summary
        self._waiting: list[Share] = []

    def configure(self, options: EngineOptions) -> EngineOptions:
        if options.mask not in (None, self.mask):
            raise ValueError(f"There are two masks, {options.mask!r} and {self.mask!r}. Use one; Where(function) can combine rules.")
        return dataclasses.replace(options, mask=self.mask)

    def on_run_start(self, run: Run) -> None:
        self._waiting, self._says = [], self._summary and run.is_rank_zero
        run.optimizer.masks.listeners.append(self._made)

    def _made(self, masks: Masks, trained: Sequence[Trained]) -> None:
        if masks.measuring:  # nothing is trained in these steps, and the mask is yet to come
            return
        self._waiting = shares(masks, trained)
        if self._says:
            print(table(self.mask, self._waiting), file=sys.stderr)
            self._says = False

    def on_run_end(self, run: Run) -> None:
        listeners = run.optimizer.masks.listeners
        if self._made in listeners:  # a run can end before it began for all callbacks, by an error of another one
            listeners.remove(self._made)

    def metrics(self) -> dict[str, float]:
        waiting, self._waiting = self._waiting, []
        return charts(waiting, self._layers)
