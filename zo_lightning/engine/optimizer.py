"""ZOOptimizer: forward-only optimization as a torch.optim.Optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.engine import recall, state
from zo_lightning.engine.advice import (
    FORGOTTEN,
    NO_DIFFERENCE,
    NO_LOSS,
    NO_SLOPE,
    NOT_FINITE,
    NOT_TO_EVALUATE_AGAIN,
    NOTHING_TO_TRAIN,
    TOO_FEW_POINTS,
    ZERO_STEPS,
)
from zo_lightning.engine.backprop import NO_GRAPH, Backprop, Tail, as_backprop
from zo_lightning.engine.coordinates import Queries
from zo_lightning.engine.estimators import Estimator, Term
from zo_lightning.engine.evaluation import Closure, Evaluated, Evaluator, Muted, Task, a_loss
from zo_lightning.engine.journal import Journal, StepRecord, Unrecorded
from zo_lightning.engine.kinds import WEIGHTS, by_factor, check_kinds, kind_of, usual_lr
from zo_lightning.engine.line_search import as_now, at_best, candidates, not_tried, tried
from zo_lightning.engine.lockstep import Remember
from zo_lightning.engine.masks import Mask, Masks
from zo_lightning.engine.masks.rules import Chosen
from zo_lightning.engine.messages import say_once, tell_once
from zo_lightning.engine.noise import Noise, as_noise
from zo_lightning.engine.objectives import Objective, measured
from zo_lightning.engine.options import (
    EngineOptions,
    as_estimator,
    as_rule,
    as_safeguard,
    check_estimator,
    check_group,
    check_rule,
)
from zo_lightning.engine.parallel import Exchange
from zo_lightning.engine.parallel.alike import check_mesh, described, digest, sum_of
from zo_lightning.engine.parameters import Trained, collect, every_name_of, names_of, signature, split_input
from zo_lightning.engine.progress import Progress
from zo_lightning.engine.report import Estimate, StepReport, make_report
from zo_lightning.engine.residency import Batched, Masters, Offload, Residency, build_residency
from zo_lightning.engine.safeguard import Safeguard
from zo_lightning.engine.seeds import evaluation_seed, rounding_seed
from zo_lightning.engine.shards import any_sharded
from zo_lightning.engine.signals import held
from zo_lightning.engine.updates import GroupSettings, UpdateRule
from zo_lightning.engine.window import Window


class ZOOptimizer(torch.optim.Optimizer):
    r"""Minimise a loss by forward passes only: theta <- (1 - lr wd) theta - lr g z, g from the losses at theta +- eps z.

    `step(closure)` evaluates the closure at every point of the estimator and updates; `estimate(closure)` (once a micro-batch) and
    `apply()` are its halves. The closure returns the loss: a scalar tensor or a float. It runs under no_grad and must not call backward.
    It must be a function of weights and data: what it counts or collects in Python objects of its own advances at every evaluation.

    Args:
        params: a module, tensors, (name, tensor) pairs, or parameter groups with their own lr, eps and weight_decay. Frozen tensors are
            left alone. Names decide the noise: a module or names make it independent of the order of parameters.
        lr: learning rate. eps: perturbation scale, in the unit of the weights. weight_decay: decoupled. None is what suits most of what is
            trained (kinds.py): lr 1e-6 and eps 1e-3 for weights, 5e-5 and 1e-2 for LoRA, 1e-3 and 1e-1 for prefixes and prompts.
        noise: "rademacher", "gaussian", "sphere", "low_rank", or a `Noise`.
        estimator: an `Estimator`; None is `SPSA(queries=1)`.
        update: "sgd", "sign", "momentum", "adam", "hizoo", or an `UpdateRule`. lr must be given with those that are not SGD or momentum.
        weights: "exact", "copy", "inplace", "batched" or "auto", or an `Offload` or `Batched`: how perturbed weights come to exist
            (docs/architecture.md).
        seed: of the run; perturbations and dropout masks are functions of (seed, step).
        dropout: False switches Dropout modules off during evaluations, as MeZO's eval mode does.
        clip: bound on the absolute projected gradient of each query.
        safeguard: "stop", "halve", "warn", None or a `Safeguard`.
        max_nonfinite: consecutive steps with a non-finite loss before FloatingPointError; such steps are skipped and counted.
        mask: a `masks.Mask`: which weights are trained; None trains all of them.
        objective: an `objectives.Objective`: what is minimised instead of the loss.
        backprop: patterns of the names of the last layers, or a `Backprop`: they are trained by backpropagation, the rest forward-only.
        module: the module whose forward the closure evaluates, where `params` is not one.

    Raises ValueError for options out of range, for tensors that can't be trained, and where nothing is trainable.

    SPSA: Spall 1992. Fine-tuning: MeZO, Malladi et al. 2023, arXiv 2305.17333.
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        *,
        eps: float | None = None,
        weight_decay: float = 0.0,
        noise: str | Noise = "rademacher",
        estimator: str | Estimator | None = None,
        update: str | UpdateRule = "sgd",
        weights: str | Offload | Batched = "auto",
        seed: int = 0,
        dropout: bool = True,
        clip: float | None = None,
        safeguard: str | Safeguard | None = "stop",
        max_nonfinite: int = 20,
        mask: Mask | None = None,
        objective: Objective | None = None,
        backprop: str | Sequence[str] | Backprop | None = None,
        module: nn.Module | None = None,
    ) -> None:
        options = (lr, eps, seed, noise, estimator, update, weights, weight_decay, dropout, clip, safeguard, max_nonfinite, mask, objective)
        EngineOptions(*options, backprop=backprop).validate()
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"module={module!r} is not an nn.Module. Pass the module whose forward the closure evaluates.")
        found, groups, given = split_input(params)
        self.module = module if module is not None else found
        self._names = {**(names_of(self.module) if self.module is not None else {}), **given}
        self.weights, self.seed = weights, seed
        self.rule = as_rule(update, clip)
        self._estimator = self.rule.measured_by(as_estimator(estimator))
        self.noise = self.estimator.noise or as_noise(noise)
        self.progress = Progress(self.estimator, self.rule)
        self.safeguard = as_safeguard(safeguard)
        self.max_nonfinite = max_nonfinite
        self._exchange, self._narrow, self._agreed = Exchange(), self.estimator, True
        self.steps = self.skipped_steps = self.zero_difference_steps = 0
        self._nonfinite_run = self._zero_run = 0
        self._evaluator = Evaluator(self.module, dropout)
        self._window: Window | None = None
        self._residency: Residency | None = None
        self.masters = Masters(every=self.rule.dense)
        self.masks = Masks(mask)
        self.objective = objective
        self.tail = Tail(as_backprop(backprop))
        self._signature: tuple[Any, ...] = ()
        self.report: StepReport | None = None
        self.journal: Journal = Unrecorded()
        self._idle = 0
        self._factors: frozenset[str] = frozenset()
        """Parts of the names of parameters whose noise is smaller (kinds.py)."""
        own = [set(group) for group in groups]
        scales = {"lr": WEIGHTS.lr if lr is None else lr, "eps": WEIGHTS.eps if eps is None else eps}
        super().__init__(groups, {**scales, "weight_decay": weight_decay})
        self._fit({name for name, value in (("lr", lr), ("eps", eps)) if value is None}, own)
        if isinstance(weights, Offload):
            _ = self.residency  # before a checkpoint is loaded into weights that are still in memory

    def _fit(self, left_out: set[str], own: Sequence[set[str]]) -> None:
        """Give groups that have no learning rate or scale of their `own` what suits most of what is trained."""
        trained = self._trained()
        check_kinds(trained)
        kind = kind_of(trained)
        if "lr" in left_out and self.rule.dense:
            raise ValueError(
                f"lr is left out, and there is no usual one with update={self.rule.name!r}, whose steps have another size than SGD's: "
                "about lr for every weight. Give lr, e.g. 1e-4."
            )
        for name in left_out:
            self.defaults[name] = getattr(kind, name)
            for group, given in zip(self.param_groups, own, strict=True):
                if name not in given:
                    group[name] = self.defaults[name]
        if kind.clip is not None and self.rule.clip is None and self.estimator.clips:
            self.rule = replace(self.rule, clip=kind.clip)
            self.progress = Progress(self.estimator, self.rule)
            tell_once(f"clip.{kind.name}", f"clip={kind.clip:g}: the bound on projected gradients that {kind.source} has for {kind.name}.")
        if left_out and kind is not WEIGHTS:
            values = ", ".join(f"{name}={self.defaults[name]:g}" for name in sorted(left_out))
            what = f"{values}: what suits {kind.name} ({kind.source}), of which most trained parameters are."
            tell_once(f"kind.{kind.name}.{values}", what)
        if "eps" in left_out and kind.factors and not any("eps" in given for given in own):
            self._factors = kind.factors
            tell_once(f"factors.{kind.name}", kind.why)

    def _trained(self) -> list[Trained]:
        """What is trained forward-only; the rest is the tail's."""
        if self.tail.recording and self._residency is not None:
            return self._residency.trained
        every = collect(self.param_groups, self._names)
        if not every:
            raise ValueError(NOTHING_TO_TRAIN)
        names = {} if self.tail.backprop is None or self.module is None else every_name_of(self.module)
        return by_factor(self._factors, self.tail.taken_from(every, names))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group (torch.optim) of tensors or (name, tensor) pairs; its lr, eps and weight_decay are checked."""
        check_group({**self.defaults, **param_group})
        _, (group,), names = split_input([param_group])
        self._names.update(names)
        super().add_param_group(group)

    def parameters_replaced(self) -> None:
        """To be called when the groups got other parameters of the same module (accelerate shards it): names are looked up anew."""
        self._names = names_of(self.module) if self.module is not None else {}
        self._residency, self._signature = None, ()

    @property
    def exchange(self) -> Exchange:
        """The processes that train together. Setting it makes the estimator that of all of them; ValueError where it can't be shared."""
        return self._exchange

    @exchange.setter
    def exchange(self, exchange: Exchange) -> None:
        self._estimate_by(exchange.widened(self._narrow))
        self._exchange, self._agreed = exchange, exchange.world_size == 1

    @property
    def estimator(self) -> Estimator:
        """Where the objective is evaluated, of all processes. Setting it begins with another one; ValueError where it can't."""
        return self._estimator

    @estimator.setter
    def estimator(self, estimator: Estimator) -> None:
        narrow = self.rule.measured_by(estimator)
        if narrow.noise is not self._narrow.noise:
            raise ValueError(
                f"Invalid estimator: {estimator!r} in the place of {self._narrow!r}, with other noise. Make a new ZOOptimizer."
            )
        self._estimate_by(self._exchange.widened(narrow))
        self._narrow = narrow

    def _estimate_by(self, estimator: Estimator) -> None:
        self._estimator, self._window = estimator, None
        self.progress.estimate_by(estimator)

    def forget(self) -> None:
        """Begin again from the weights alone, as a replay does: without float32 masters, and without what was remembered of steps."""
        self.masters.clear()
        self.progress.clear()
        self.tail.forget()

    @property
    def differentiates(self) -> bool:
        """Whether it takes derivatives of the loss, which then must come with its graph or tangent."""
        return self.estimator.tangents or self.tail.backprop is not None

    @property
    def moves(self) -> bool:
        """Whether all weights move from point to point in place, which leaves roundings; single weights are written and put back."""
        return self.residency.name == "inplace" and self.estimator.coordinates is None

    @property
    def eps(self) -> float:
        """Perturbation scale of the first group."""
        return float(self.param_groups[0]["eps"])

    @property
    def forward_passes(self) -> int:
        """Evaluations of the closure since the run began."""
        return self._evaluator.count

    @property
    def residency(self) -> Residency:
        """How perturbed weights come to exist; decided at the first step, and again when tensors are added, frozen, moved or replaced."""
        before = self._residency
        if before is not None and (self.tail.recording or (not before.retired and self._is_for_these_tensors(before))):
            return before
        trained = self._trained()
        if any(p.tensor._backward_hooks or p.tensor._post_accumulate_grad_hooks for p in trained):
            say_once("grad_hooks", "Hooks on the gradients of parameters never run: forward-only training computes no gradient.")
        if before is not None and not before.retired:
            before.close()
        self._residency = None
        found = build_residency(self.weights, self.module, trained, self.progress.noise(self.noise), before)
        check_rule(self.rule, found)
        check_estimator(self.estimator, found)
        self.progress.train({p.key for p in trained})
        self._residency = found
        self._residency.masters, self._residency.masks = self.masters, self.masks
        self._signature = self._signature_for(self._residency)
        return self._residency

    def _is_for_these_tensors(self, residency: Residency) -> bool:
        with held(), residency.still():  # while another thread's forward pass runs, weights may be elsewhere
            residency.end_interrupted()
            return self._signature_for(residency) == self._signature

    def _signature_for(self, residency: Residency) -> tuple[Any, ...]:
        return signature(self.param_groups, residency.keeps if residency.places_weights else None)

    @property
    def lockstep(self) -> bool:
        """Whether the evaluations of the last micro-batch took turns at the borders of blocks (weights=Offload())."""
        return self._evaluator.lockstep

    def settled(self) -> AbstractContextManager[None]:
        """For another thread that reads weights (an asynchronous checkpoint): inside it, it finds those before a step or after it.

        It waits for a running evaluation or update, in the order of asking, and holds up the next one. A closure must not wait for a thread
        that wants it.
        """
        return (self._residency or self.residency).settled()  # during an evaluation the tensors look as if they had been replaced

    def usual_lr(self) -> str:
        """The learning rates that usually work for what is trained here, in words."""
        return usual_lr(self._trained())

    def estimate(
        self,
        closure: Closure,
        *,
        weight: float = 1.0,
        muted: Muted = nullcontext,
        loss_of: Callable[[Any], Any] = lambda output: output,
        remember: Remember | None = None,
        batch: Any = None,
        surroundings: Muted = nullcontext,
    ) -> Estimate:
        """Evaluate one micro-batch at all points of this step and add weight * loss of each to the window.

        The weights are unperturbed again on return, also after an exception. Evaluations other than the first run inside `muted()`.
        `loss_of` takes the loss from what the closure returned; None skips the micro-batch. `remember` tells an `Undo` what Python state
        the closure may change, and `muted()` puts back: evaluations that take turns have a version each. `batch` is for an objective that
        asks the module itself, inside `surroundings()` (the host's precision).
        Raises TypeError or ValueError for a loss that is not one real number, RuntimeError where the closure calls backward.
        """
        with self.exchange.together():
            return self._estimate(self.residency, closure, weight, muted, loss_of, remember, batch, surroundings)

    def _estimate(
        self,
        residency: Residency,
        closure: Closure,
        weight: float,
        muted: Muted,
        loss_of: Callable[[Any], Any],
        remember: Remember | None,
        batch: Any = None,
        surroundings: Muted = nullcontext,
    ) -> Estimate:
        began = time.perf_counter()
        if not self._agreed:
            check_mesh(self)
        plan = self.journal.recall(self.steps, updating=False)
        if self._window is None:
            self._begin()
        if plan is None:  # which may forget: the points of the step come behind it
            self.journal.look(self, 0 if self._window is None else self._window.micro_batches, updating=False)
        window = self._window = self._window or self._new_window()
        seed = evaluation_seed(self.seed, self.steps, window.micro_batches, self.exchange.stream)
        observe: Callable[[Any], Any] | None = None
        if (objective := self.objective) is not None:
            loss_of = objective.loss_of

            def observe(output: Any) -> Any:
                with surroundings():
                    return objective.observe(output, self.module, batch)

        task = Task(closure, window.own, residency, [], seed, muted, loss_of, observe, remember, self.estimator.tangents)
        task = task._replace(coordinates=self.estimator.coordinates, graph=self.tail.graph(window, residency, self.module))
        task = task._replace(apart=self.objective is not None and not self.objective.asks_module)
        if plan is not None:
            return recall.estimate(plan, self.estimator, self._evaluator, task, window, weight)
        task = task._replace(eps=self._eps_of(window))
        output, losses, samples, here = self._evaluated(task)
        window.micro_batches += 1
        window.moved = window.moved or self._evaluator.buffers.moved
        if self.exchange.mesh.perturbation > 1:
            window.seen = (31 * window.seen + sum_of(batch)) % (1 << 53)
        window.traces = window.traces or window.moved or not losses
        if losses:
            window.add(losses, weight, samples if observe is not None else [], task.graph.sums)
            if self.estimator.along:
                window.again.append((task._replace(closure=as_now(closure), graph=NO_GRAPH), weight))
        window.seconds += time.perf_counter() - began
        if not losses:
            return Estimate(None, None)
        return Estimate(output, (torch.stack(losses).mean() if here is None else here) * weight)

    def _evaluated(self, task: Task) -> Evaluated:
        evaluated = self._evaluator.evaluate(task)
        self.journal.remember(self)
        return evaluated

    def leaves_traces(self) -> None:
        """Say of the evaluations since the last update that they left something (a logged value) which a resumed run must make again."""
        if self._window is not None:
            self._window.traces = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self) -> StepReport | None:
        """Turn the window's values into terms, once, and make the update; None where nothing was accumulated on any rank.

        A non-finite value skips the update; FloatingPointError after `max_nonfinite` such steps in a row. DivergenceError by the safeguard.
        With several processes, what one of them raises stops all: PeerError on the others.
        """
        with self.exchange.together():
            return self._apply()

    def _apply(self) -> StepReport | None:
        began = time.perf_counter()
        window, self._window = self._window, None
        if not self._agreed:
            self._agree()
        plan = self.journal.recall(self.steps, updating=True)
        values, scores = self._values(window, plan)
        if values is None:
            self._check_no_gradients()
            self._idle += 1
            return None
        if self.exchange.moved if plan is None else plan.traces:
            self.exchange.align(self.module)
        if window is None:  # other ranks had data
            self._begin()
            window = self._new_window()
        residency = self.residency
        finite = all(math.isfinite(value) for value in values)
        gradients = self.tail.gradients(window, self.exchange) if finite else []
        finite = finite and all(bool(gradient.isfinite().all()) for gradient in gradients)
        if not finite:
            residency.restore()
        self.journal.look(self, window.micro_batches, updating=True)
        settings = self._settings(window, plan)
        self.progress.estimator.check(settings)
        if self.estimator.remembers and self._new_window().points != window.points:
            raise RuntimeError(FORGOTTEN)
        terms = self.progress.terms(window.points, values) if finite else []
        lengths = self._along(window, plan, terms, settings) if self.estimator.along else []
        made = at_best(self.estimator.along, terms, lengths)
        record = StepRecord(self.steps, (*values, *lengths), tuple(settings), not finite, max(1, window.micro_batches))
        self._record(plan, record, window, residency)
        self.masks.measure(terms, [group.eps for group in settings])
        if finite:
            with residency.still(), held():
                residency.update(self.progress.change(made, settings, rounding_seed(self.seed, self.steps)))
                if not self.masks.measures(self.steps):
                    self.tail.update(gradients, settings, [_of_schedule(group) for group in self.param_groups])
        residency.ended()
        self._idle = 0
        self.journal.remember(self)
        seconds = window.seconds + time.perf_counter() - began
        self.report = make_report(self, window, values, scores, terms, settings[0].lr, seconds)
        self.steps += 1
        self._keep_count(self.report)
        return self.report

    def step(self, closure: Closure | None = None, *, batch: Any = None) -> Tensor | None:  # type: ignore[override]
        """`estimate(closure)` and `apply()`; the mean of the losses at the points. Without a closure, `apply()` alone.

        Where the objective asks the module itself and no loss counts, the closure is not called.
        """
        if closure is None:
            self.apply()
            return None
        if self.objective is not None and not self.objective.needs_output:
            closure = dict
        residency = self.residency
        # a handler that saves a checkpoint finds the weights before the step or after it
        with self.exchange.together(), held(), residency.fused():
            loss = self._estimate(residency, closure, 1.0, nullcontext, a_loss, None, batch).loss
            self.apply()
        return loss

    def _record(self, plan: StepRecord | None, record: StepRecord, window: Window, residency: Residency) -> None:
        """Tell the journal, before anything is changed; a step that it knows brings the moves that rounded the weights."""
        if plan is not None:
            residency.reenact(plan.passes, recall.points_of(plan, self.estimator, self.rule, window.points), recall.eps_of(plan))
        else:
            passes = residency.take_passes()
            self.journal.append(replace(record, passes=passes, traces=window.traces, idle=self._idle))

    def _begin(self) -> None:
        """A step begins."""
        if self.masks.mask is not None and self.masks.due(self.steps, self.residency.trained):
            chosen = self.journal.chosen(self)
            with self.residency.settled() if chosen is None else nullcontext():
                self._make_masks(chosen)

    def _make_masks(self, chosen: Chosen | None) -> None:
        if self.masks.begin(self.steps, self.residency.trained, self.seed, self.noise, chosen):
            self.progress.clear()
            if not self.masks.reproducible:
                self.masks.take(self.exchange.share(self.masks.chosen))
            self.journal.mask(self)
            if chosen is None:
                self.masks.made(self.residency.trained)

    def _new_window(self, masks: Masks | None = None, progress: Progress | None = None) -> Window:
        trained = [] if self.estimator.coordinates is None else self.residency.trained
        points = (progress or self.progress).points(Queries(self.noise, self.seed, self.steps, trained, masks or self.masks))
        if len(points) < self.exchange.mesh.perturbation:
            raise ValueError(TOO_FEW_POINTS.format(parallel=self.exchange.mesh, points=len(points), estimator=self.estimator))
        return Window(points, [], self.exchange.mine(len(points)))

    def _eps_of(self, window: Window) -> list[float]:
        """One a group, from the beginning of the window on; groups that came later bring their own."""
        for group in self.param_groups:
            check_group(group)
        window.eps.extend(float(group["eps"]) for group in self.param_groups[len(window.eps) :])
        return window.eps

    def discard(self) -> None:
        """Drop what was accumulated since the last update."""
        self._window = None

    def _values(self, window: Window | None, plan: StepRecord | None) -> tuple[list[float] | None, list[float]]:
        """(one value a point, the same on every rank, or None where there is none; the scores of an objective)."""
        if plan is not None:
            return None if self._idle < plan.idle else list(plan.values[: len(plan.values) - len(self.estimator.along)]), []
        if window is None and self.estimator.coordinates is not None:
            self._begin()  # the mask of the step, on which the number of points depends
        return self._measured(window or self._new_window(), searching=False)

    def _along(self, window: Window, plan: StepRecord | None, terms: list[Term], settings: Sequence[GroupSettings]) -> list[float]:
        """The values of the lengths that a line search tries: the micro-batches once more, and nobody notices."""
        count = len(self.estimator.along)
        if not terms or not any(group.lr for group in settings):
            return not_tried(count, skipped=not terms)
        if plan is not None:
            self._evaluator.count += count * plan.micro_batches
            return list(plan.values[-count:])
        if not window.whole:
            raise RuntimeError(NOT_TO_EVALUATE_AGAIN)
        points = candidates(self.estimator.along, terms, self.rule, settings)
        further = Window(points, window.eps, self.exchange.mine(len(points)))
        for task, weight in window.again:
            again = self._evaluated(task._replace(points=further.own, noticed=False))
            further.add(again.losses, weight, again.samples if task.observe is not None else [])
        found, _ = self._measured(further, searching=True)
        return tried(found or [])

    def _measured(self, window: Window, searching: bool) -> tuple[list[float] | None, list[float]]:
        values = self.exchange.values(window.totals, len(window.points), window.moved, window.seen)
        if values is None or self.objective is None:
            return values, []
        seed = evaluation_seed(self.seed, self.steps, 0, 0)
        return measured(self.objective, self.exchange, self.steps, values, window.samples, seed, searching)

    def _agree(self) -> None:
        """Several processes begin: they have to be alike."""
        check_mesh(self)
        self.exchange.agree(described(self))
        if any_sharded(self.residency.trained):  # behind a meeting, for ranks now sum the bits of their shards together
            self.exchange.agree({"what the sharded weights are": digest(p.aliases[0] for p in self.residency.trained)})
        self._agreed = True

    def _check_no_gradients(self) -> None:
        """A loop made for backpropagation, which would go on without ever changing a weight."""
        if any(p.grad is not None for group in self.param_groups for p in group["params"]):
            raise RuntimeError(NO_LOSS)

    def _lr(self, group: dict[str, Any]) -> float:
        return float(group["lr"]) * (self.safeguard.scale if self.safeguard else 1.0)

    def settings(self) -> list[GroupSettings]:
        """Learning rate, scale and decay of each group, as the next step would use them."""
        return self._settings(self._window or Window([], [], range(0)), None)

    def _settings(self, window: Window, plan: StepRecord | None) -> list[GroupSettings]:
        still = self.masks.measures(self.steps) or self.progress.estimator.measures
        own = [
            GroupSettings(0.0 if still else self._lr(g), e, float(g["weight_decay"]))
            for g, e in zip(self.param_groups, self._eps_of(window), strict=True)
        ]
        if plan is None:
            return own
        recall.compare(plan, own)
        return list(plan.settings)

    def _keep_count(self, report: StepReport) -> None:
        self.skipped_steps += report.skipped
        self._nonfinite_run = self._nonfinite_run + 1 if report.skipped else 0
        if self._nonfinite_run >= self.max_nonfinite:
            what = "loss" if self.objective is None else f"loss or {self.objective.name}"
            advice = NOT_FINITE
            if self.estimator.tangents and math.isfinite(self.estimator.loss(report.values)):
                what, advice = "derivative of the loss", NO_SLOPE
            raise FloatingPointError(
                f"The {what} was not finite in {self._nonfinite_run} steps in a row (last: {report.values}); max_nonfinite="
                f"{self.max_nonfinite}. No update was made in them. {advice}"
            )
        self.zero_difference_steps += report.zero_difference
        self._zero_run = self._zero_run + 1 if report.zero_difference else 0
        if self._zero_run == ZERO_STEPS:
            say_once("zero_difference", NO_DIFFERENCE)
        if self.safeguard is not None and not report.skipped:
            if self.objective is not None and self.objective.weights_at(report.step) != self.objective.weights_at(max(0, report.step - 1)):
                self.safeguard.restart()
            self.safeguard.watch(report.loss, float(self.param_groups[0]["lr"]), self.usual_lr)

    def state_dict(self) -> dict[str, Any]:
        """torch's state, and under "zo" what a resumed run needs to continue bit for bit."""
        return {**super().state_dict(), "zo": state.saved(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. ValueError for the state of another optimizer or noise."""
        zo = state.check(self, state_dict)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "zo"})
        state.load(self, zo)

    def __getstate__(self) -> dict[str, Any]:
        """torch's state drops what a subclass has; names are kept by tensor, for a copy has other ones."""
        plain: dict[str, Any] = super().__getstate__()
        named = [(p, self._names[id(p)]) for group in self.param_groups for p in group["params"] if id(p) in self._names]
        more = {"named": named, "dropout": self._evaluator.dropout, "count": self._evaluator.count}
        return {**plain, **{name: vars(self)[name] for name in state.COPIED}, **more}

    def __setstate__(self, plain: dict[str, Any]) -> None:
        named, dropout, count = (plain.pop(name, None) for name in ("named", "dropout", "count"))
        super().__setstate__(plain)
        if named is not None:  # None: torch's own load_state_dict
            self._names = {id(parameter): name for parameter, name in named}
            self._residency, self._signature, self.journal, self._idle = None, (), Unrecorded(), 0
            self._evaluator = Evaluator(self.module, dropout)
            self._evaluator.count = count


def _of_schedule(group: dict[str, Any]) -> float:
    """What a scheduler has made of a group's learning rate, over the one that it began with."""
    initial = float(group.get("initial_lr", 0.0))
    return float(group["lr"]) / initial if initial else 1.0
