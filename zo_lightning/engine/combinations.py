"""Options that can't be used together, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from zo_lightning.engine.backprop import Backprop
from zo_lightning.engine.estimators import Estimator
from zo_lightning.engine.noise import Basis, Noise, Rademacher, Shaped
from zo_lightning.engine.residency import Batched, Offload
from zo_lightning.engine.updates import SGD, GroupSettings, UpdateRule

if TYPE_CHECKING:
    from zo_lightning.engine.options import EngineOptions

Clash = tuple[bool, str]
"""(whether the options are so, what is wrong then)."""


def check_together(options: EngineOptions, rule: UpdateRule, estimator: Estimator, noise: Noise, backprop: Backprop | None) -> None:
    """Raise ValueError for the first clash; the objects are those that the options name."""
    estimator.begin().check([GroupSettings(options.lr or 0.0, options.eps or 1.0, options.weight_decay or 0.0)])
    clashes = [*_of_estimator(options, estimator), *_of_rule(options, rule, estimator, noise)]
    if options.weights == "batched" or isinstance(options.weights, Batched):
        clashes = [*_of_batches(estimator, rule, noise, backprop), *clashes]
    if backprop is not None:
        clashes += _of_backprop(options, estimator)
    for clash, said in clashes:
        if clash:
            raise ValueError(said)


def _of_batches(estimator: Estimator, rule: UpdateRule, noise: Noise, backprop: Backprop | None) -> Iterator[Clash]:
    batched = 'with weights="batched", which evaluates all points in one forward pass'
    yield (
        estimator.tangents or estimator.coordinates is not None,
        f'Invalid estimator: {estimator!r} {batched} of displaced weights. Use SPSA(queries=n), or weights="exact".',
    )
    yield (
        rule.rescales or not (isinstance(noise, Shaped) and noise.factored),
        f"Invalid noise: {noise.text!r}, update={rule.name!r} {batched} by the factors of their noise. Use "
        'noise="low_rank(rank=1, refresh=1)" with an update that leaves it as it is, or weights="exact".',
    )
    yield (backprop is not None, f'Invalid backprop: {backprop!r} {batched} and keeps no graph. Use weights="exact".')


def _of_estimator(options: EngineOptions, estimator: Estimator) -> Iterator[Clash]:
    offloaded, ways = isinstance(options.weights, Offload), estimator.coordinates
    yield (
        estimator.noise is not None and options.noise != "rademacher" and not isinstance(options.noise, Basis),
        f"Invalid noise: {options.noise!r} does nothing with estimator={estimator!r}, whose points are not random. Leave noise out.",
    )
    yield (
        estimator.noise is None and isinstance(options.noise, Basis),
        f"Invalid noise: {options.noise!r} with estimator={estimator!r}. It is for Coordinatewise(), which brings it along.",
    )
    yield (
        ways is not None and offloaded,
        f"Invalid weights: {options.weights!r} with estimator={estimator!r}, which writes single weights in memory. Use "
        'weights="auto", or SPSA() with streamed weights.',
    )
    yield (
        ways is not None and ways.batch > 1 and options.objective is not None,
        f"Invalid batch: {ways and ways.batch} with objective={options.objective!r}, which is observed at one point after another. Use "
        "batch=1.",
    )
    yield (
        estimator.tangents and options.objective is not None,
        f"Invalid estimator: {estimator!r} with objective={options.objective!r}: it differentiates the loss, and others have no "
        "derivative. Use SPSA(), which needs none.",
    )
    yield (
        estimator.tangents and offloaded,
        f"Invalid estimator: {estimator!r} with weights=Offload(...): tangents of all trained weights are in memory at once. Use SPSA().",
    )


def _of_rule(options: EngineOptions, rule: UpdateRule, estimator: Estimator, noise: Noise) -> Iterator[Clash]:
    update = f"Invalid update: {options.update!r} with"
    yield (
        estimator.remembers and rule.dense,
        f"{update} estimator={options.estimator!r}, which finds its anchor behind the steps since: they "
        'have to be sums of perturbations. Use update="sgd" or "momentum", or an estimator without an anchor.',
    )
    yield (
        bool(estimator.along) and not isinstance(rule, SGD),
        f"{update} estimator={options.estimator!r}, which tries steps along the estimate before it makes "
        'one. Use update="sgd", or an estimator without a search.',
    )
    yield (
        rule.dense and isinstance(options.weights, Offload),
        f"{update} weights=Offload(...), whose updates are made while weights are on their way, and it "
        'needs the estimate as a tensor. Use update="sgd" or "momentum", or keep the weights in memory.',
    )
    yield (
        rule.clip is not None and not estimator.clips,
        f"Invalid clip: {rule.clip!r} with estimator={options.estimator!r}, whose terms mean something only together: "
        "a bound on each would spoil that. Leave clip out; a smaller lr makes smaller steps.",
    )
    yield (
        rule.rescales and isinstance(noise, Rademacher),
        f"Invalid noise: {noise.text!r} with update={options.update!r}, which tells weights apart by z^2, and here all are 1. Use "
        'noise="gaussian".',
    )
    yield (
        rule.rescales and options.mask is not None and bool(options.mask.rule.measures),
        f"Invalid mask: {options.mask!r} with update={options.update!r}: the mean of what its steps measure has noise of one size. Use a "
        "mask whose rule measures nothing.",
    )


def _of_backprop(options: EngineOptions, estimator: Estimator) -> Iterator[Clash]:
    objective = options.objective
    found: list[Clash] = [
        (estimator.tangents, f"estimator={estimator!r}, whose evaluations are in forward mode: use SPSA() or OneSided()"),
        (estimator.coordinates is not None, f"estimator={estimator!r}, which evaluates every weight by itself: use SPSA() or OneSided()"),
        (
            estimator.remembers,
            f"estimator={estimator!r}, half of whose points lie at an anchor, which the last layers have none of: use SPSA()",
        ),
        (
            isinstance(options.weights, Offload),
            "weights=Offload(...): a graph would keep weights that are on their way; keep them in memory",
        ),
        (
            objective is not None and not objective.needs_output,
            f"objective={objective!r}, which evaluates no loss whose gradient could be taken; use one that reads the output",
        ),
    ]
    for clash, what in found:
        yield clash, f"Invalid backprop: {options.backprop!r} with {what}, or leave backprop out."
