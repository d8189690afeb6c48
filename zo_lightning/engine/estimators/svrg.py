"""SVRG: variance reduced by an anchor, at which the gradient was estimated on more data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zo_lightning.engine.estimators.base import Displacement, Estimator, EstimatorState, Term, split
from zo_lightning.engine.estimators.spsa import SPSA
from zo_lightning.engine.messages import check_count
from zo_lightning.engine.noise import Change

if TYPE_CHECKING:
    from zo_lightning.engine.updates import GroupSettings


@dataclass(frozen=True)
class SVRG(Estimator):
    """ZO-SVRG (Liu et al., arXiv 1805.10367), MeZO-SVRG (arXiv 2404.08080): SPSA's estimate, less that at an anchor, plus a mean there.

    A step takes 4n evaluations. The first A of every K steps measure at the anchor theta~, which is where the weights are then, along the
    same 2n directions w_i, and the weights stay there until the last of them. So A batches are the papers' full one if they make up the
    data:

        mu = 1/(2n) sum_i (1/A sum_a g(theta~, w_i; B_a)) w_i,        theta moves along mu in step A

    The other K - A steps evaluate both places on one batch B with one noise:

        g = 1/n sum_i (g(theta, z_i; B) - g(theta~, z_i; B)) z_i + mu,    g(x, z; B) = (L(x + eps z; B) - L(x - eps z; B)) / (2 eps)

    Without the move in step A the first of them would find no difference. The first A - 1 steps have lr 0 in reports and step logs.

    There is no copy of the anchor: theta~ = theta - sum_j c_j z(s_j), with all that steps have added since then, so that a point there is a
    list of seeds and multiples as any other. It is where theta was then up to the rounding of weights since (16-bit ones are rounded in
    each step: docs/methods.md); where a mask follows the weights, but for those that crossed its threshold; and but for values that a lower
    bound has held. An evaluation there draws the noise of up to (K - A + 1) n + 1 directions, an update that of 3n.

    mu is of one eps, so eps may not change between an anchor and the next; all groups need the same lr / eps**2, and lr may change. Weight
    decay, and rules whose steps are no sums of perturbations (Sign, Adam), can't be taken back. An anchor is given up, and the next step
    measures, where a step log begins, a mask is made anew or other tensors are trained. Skipped steps do not count.

    Args:
        queries: n, the directions of a step between anchors.
        refresh: K >= A, the steps with one anchor. With K = A = 1 it is SPSA(2n).
        anchor: A >= 1, those of them that measure it.

    Raises ValueError for other numbers.
    """

    queries: int = 1
    refresh: int = 10
    anchor: int = 5

    name = "svrg"
    clips = False
    remembers = True

    def __post_init__(self) -> None:
        check_count("queries", self.queries, "the number of perturbations a step")
        check_count("anchor", self.anchor, "the steps that measure the anchor")
        check_count("refresh", self.refresh, f"the steps with one anchor, of which anchor={self.anchor} measure it", least=self.anchor)

    def begin(self) -> EstimatorState:
        return _Anchor(self)

    @property
    def _measuring(self) -> SPSA:
        return SPSA(2 * self.queries)

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        """Those of a step that measures the anchor."""
        return self._measuring.points(seeds)

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        """Those of a step that measures the anchor."""
        return self._measuring.terms(points, values)

    def sides(self, values: Sequence[float]) -> tuple[float, float]:
        """Of the weights and the anchor together."""
        return self._measuring.sides(values)

    def difference(self, values: Sequence[float]) -> float:
        return self._measuring.difference(values)

    def times(self, processes: int) -> SVRG:
        return replace(self, queries=self.queries * processes)


class _Anchor(EstimatorState):
    """Where the anchor is, and what was measured there."""

    _estimator: SVRG

    def __init__(self, estimator: SVRG) -> None:
        super().__init__(estimator)
        self.clear()

    def clear(self) -> None:
        self._steps = 0
        """That were made with this anchor."""
        self._mean: list[Term] = []
        """mu; until it is complete, what the steps that measured have added to it."""
        self._back: dict[int, float] = {}
        """theta~ - theta, as multiples of eps by seed."""
        self._eps: tuple[float, ...] = ()

    @property
    def measures(self) -> bool:
        return self._steps < self._estimator.anchor - 1

    @property
    def _stands(self) -> bool:
        """Whether mu is complete."""
        return self._steps >= self._estimator.anchor

    def check(self, settings: Sequence[GroupSettings]) -> None:
        who, eps = self._estimator, tuple(group.eps for group in settings)
        for group in settings:
            if group.weight_decay:
                raise ValueError(
                    f"Invalid weight_decay: {group.weight_decay!r} with estimator={who}, which finds its anchor behind the steps since: "
                    "decay can't be taken back. Use weight_decay=0, or an estimator without an anchor."
                )
        ratios = [group.lr / group.eps**2 for group in settings]
        if not all(math.isclose(ratio, ratios[0], rel_tol=1e-9) for ratio in ratios):
            raise ValueError(
                f"{who} finds its anchor behind the steps since then, in which all parameter groups have to be moved by one multiple of "
                f"their perturbations, lr / eps**2; it is {', '.join(f'{ratio:g}' for ratio in ratios)} here. Give the groups "
                "lr and eps of the same lr / eps**2."
            )
        if self._eps and eps != self._eps:
            raise ValueError(
                f"eps of the groups was {list(self._eps)} where {who} measured its anchor, and is {list(eps)} now. Keep eps as it is, or "
                "call forget() of the optimizer where it changes, between two steps: the next ones measure an anchor again."
            )

    def points(self, seeds: Callable[[int], int]) -> list[Displacement]:
        if not self._steps:
            return self._estimator.points(seeds)
        if not self._stands:
            return self._estimator.points(lambda i: self._mean[i].seed)
        back = tuple(self._back.items())
        drawn = [seeds(i) for i in range(self._estimator.queries)]
        return [((seed, side), *there) for seed in drawn for there in ((), back) for side in (1.0, -1.0)]

    def terms(self, points: Sequence[Displacement], values: Sequence[float]) -> list[Term]:
        who = self._estimator
        if self._stands:
            rows = zip(split(points, 4), split(values, 4), strict=True)
            fresh = [Term(own[0][0][0], ((v[0] - v[1]) - (v[2] - v[3])) / (2 * who.queries)) for own, v in rows]
            return [*fresh, *self._mean]
        own = who.terms(points, values)
        return own if self.measures else self._with(own)

    def _with(self, own: Sequence[Term]) -> list[Term]:
        """What was measured so far, and these terms."""
        before = self._mean or [Term(term.seed, 0.0) for term in own]
        return [Term(term.seed, so_far.slope + term.slope / self._estimator.anchor) for so_far, term in zip(before, own, strict=True)]

    def remember(self, terms: Sequence[Term], change: Change, settings: Sequence[GroupSettings]) -> None:
        self._eps = tuple(group.eps for group in settings)
        if not self._stands:
            self._mean = self._with(terms) if self.measures else list(terms)
        for seed, c in zip(change.seeds, change.steps[0][1], strict=True):
            if c:
                self._back[seed] = self._back.get(seed, 0.0) - c / self._eps[0]
        self._steps += 1
        if self._steps == self._estimator.refresh:
            self.clear()

    def state_dict(self) -> dict[str, Any]:
        if not self._steps:
            return {}
        pairs = {"mean": [list(term) for term in self._mean], "back": [list(pair) for pair in self._back.items()]}
        return {"steps": self._steps, "eps": list(self._eps), **pairs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clear()
        if state:
            self._steps, self._eps = state["steps"], tuple(state["eps"])
            self._mean, self._back = [Term(*pair) for pair in state["mean"]], dict(state["back"])
