"""The evaluations of one micro-batch: same randomness, same buffers, fresh autocast cache, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from zo_lightning.engine.backprop.graph import NO_GRAPH, NoGraph
from zo_lightning.engine.buffers import Buffers
from zo_lightning.engine.coordinates import Nudges
from zo_lightning.engine.estimators import Displacement, Ways
from zo_lightning.engine.lockstep import Lockstep, Remember, abreast
from zo_lightning.engine.messages import say_once
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.randomness import HostState, host_state
from zo_lightning.engine.residency import Offloaded, Population, Residency
from zo_lightning.engine.reuse import Reuse, same
from zo_lightning.engine.signals import held, interruptible
from zo_lightning.engine.stacked import Stacked, copies_of
from zo_lightning.engine.tangents import showing, slope_of
from zo_lightning.engine.undo import undoing

Closure = Callable[[], Any]
Muted = Callable[[], AbstractContextManager[Any]]


class Task(NamedTuple):
    """What to evaluate: `loss_of` takes the loss from what the closure returned, every evaluation but the first is inside `muted()`."""

    closure: Closure
    points: Sequence[Displacement]
    residency: Residency
    eps: Sequence[float]
    seed: int
    muted: Muted
    loss_of: Callable[[Any], Any]
    observe: Callable[[Any], Any] | None = None
    """Called with what the closure returned, at the point where it ran; its results are the samples of an objective."""
    remember: Remember | None = None
    """Tells what Python state the closure may change and `muted` puts back; None: it is not put back."""
    tangents: bool = False
    """Whether points are directions along which the loss is differentiated; the loss itself is the value of ()."""
    coordinates: Ways | None = None
    """How points of one weight each are evaluated."""
    apart: bool = False
    """Whether `observe` may be called behind the evaluation, for it asks nothing of the module."""
    noticed: bool = True
    """Whether the first evaluation is outside of `muted` and leaves the buffers as it made them."""
    graph: NoGraph = NO_GRAPH
    """What differentiates the loss with respect to the last layers."""

    @property
    def evaluations(self) -> int:
        """How many the points take."""
        return sum(map(bool, self.points)) or 1 if self.tangents else len(self.points)

    def around(self, index: int) -> AbstractContextManager[Any]:
        """What the evaluation of a point runs in."""
        return self.muted() if index or not self.noticed else nullcontext()


class Evaluated(NamedTuple):
    """`output` is what the closure returned at the first point; a loss (float64 scalar) and, with `observe`, a sample of every point."""

    output: Any
    losses: list[Tensor]
    samples: list[Any]
    here: Tensor | None = None
    """The loss at the weights, where other values are derivatives."""


class Evaluator:
    """Evaluates a closure at displaced points of a module's weights."""

    def __init__(self, module: nn.Module | None, dropout: bool) -> None:
        self.module = module
        self.dropout = dropout
        self.buffers = Buffers(module)
        self.count = 0
        self.lockstep = False
        """Whether the last evaluations took turns."""
        self._lockstep = Lockstep(module)
        self._reuse, self._stacked = Reuse(module), Stacked(module, "batch= of Coordinatewise", loops=False)
        self._batched = Stacked(module, 'weights="batched"', loops=True)

    def evaluate(self, task: Task) -> Evaluated:
        """Evaluate at every point; no losses where the closure gives none.

        Every evaluation starts from generator states that the seed determines and from the same buffers. Those at other points than the
        first run inside `muted()`. Weights, generators and training flags come back as they were; buffers as the first one left them. A
        signal handler (which may save a checkpoint) runs after all that; Ctrl-C inside the closure raises KeyboardInterrupt there.
        """
        devices = task.residency.devices()
        with held(), torch.inference_mode(False), torch.no_grad(), host_state(devices) as host, self._dropout():
            self.buffers.begin()
            try:
                if task.tangents:
                    return self._derivatives(task, host)
                if task.coordinates is not None:
                    return self._coordinates(task, task.coordinates, host)
                if task.residency.needs_probe():
                    self._probe(task, host)
                streamed = self._lockstep.chosen(task.residency, len(task.points))
                self.lockstep = streamed is not None
                return self._points(task, host) if streamed is None else self._abreast(task, streamed, host)
            finally:
                self.buffers.finish()

    def _probe(self, task: Task, host: HostState) -> None:
        with self._lockstep.watched(task.residency, task.remember), task.residency.probe(), task.muted():
            self._one(task, host)
        self.buffers.first_done()
        self.buffers.rewind()

    def _abreast(self, task: Task, residency: Offloaded, host: HostState) -> Evaluated:
        """The same as `_points`, with all points at once."""

        def job(index: int) -> Callable[[], Any]:
            def run() -> Any:
                with residency.at(task.points[index], task.eps), task.around(index):
                    output = self._one(task, host)
                if not residency.reached():
                    raise RuntimeError(_NOT_REACHED)
                return output

            return run

        jobs = [job(index) for index in range(len(task.points))]
        with residency.session():
            world = self._lockstep.world(task.remember)
            world.add(self.buffers.places())
            outputs, moved = abreast(residency, jobs, host.devices, world, self._lockstep.crew(len(jobs) - 1))
        self.count += len(outputs)
        if task.noticed:
            self.buffers.first_done()
        self._lockstep.left_behind(moved if task.remember is None else None, world.shared)
        losses = [task.loss_of(output) for output, _ in outputs]
        if any(loss is None for loss in losses):
            return Evaluated(None, [], [])
        return Evaluated(outputs[0][0], [as_scalar(loss) for loss in losses], [sample for _, sample in outputs])

    def _points(self, task: Task, host: HostState) -> Evaluated:
        first: Any = None
        losses: list[Tensor] = []
        samples: list[Any] = []
        with task.residency.session():
            task.residency.expect(task.points)
            others = self._population(task, host)
            for index, point in enumerate(task.points[:1] if others else task.points):
                unnoticed = index == (0 if task.remember is None else 1)  # all that it left behind is put back, if anything is
                watched = self._lockstep.watched(task.residency, task.remember) if unnoticed else nullcontext()
                with watched, task.residency.at(point, task.eps), task.around(index):
                    output, sample = self._one(task, host, point)
                self.count += 1
                if index == 0:
                    first = output
                    if task.noticed:
                        self.buffers.first_done()
                loss = task.loss_of(output)
                if loss is None:
                    return Evaluated(None, [], [])
                losses.append(as_scalar(loss))
                samples.append(sample)
                if point and not task.residency.reached():
                    raise RuntimeError(_NOT_REACHED)
                if index + 1 < len(task.points):
                    self.buffers.rewind()
        found = others or Evaluated(None, [], [])
        return Evaluated(first, losses + found.losses, samples + found.samples)

    def _population(self, task: Task, host: HostState) -> Evaluated | None:
        """All points but the first in one evaluation, where the residency has batches and the closure too; it comes before the first one.

        What is left behind in Python is then that of the first one, as it always is.
        """
        residency, points, observe = task.residency, task.points[1:], task.observe or _nothing
        if (
            not isinstance(residency, Population)
            or not self._batched.possible
            or len(points) < 2
            or (task.observe is not None and not task.apart)
        ):
            return None
        structure: list[Any] = []

        def evaluate() -> Any:
            output, _ = self._one(task._replace(observe=None), host)
            loss = task.loss_of(output)
            if loss is None:
                return ()
            tensors, spec = tree_flatten(None if task.observe is None else output)
            structure[:] = [spec, [None if isinstance(leaf, Tensor) else leaf for leaf in tensors]]
            return (as_scalar(loss), *(leaf for leaf in tensors if isinstance(leaf, Tensor)))

        losses: list[Tensor] = []
        samples: list[Any] = []
        for begin in range(0, len(points), residency.members or len(points)):
            some = points[begin : begin + (residency.members or len(points))]
            with task.muted(), self._untraced(), residency.together(some, task.eps) as stacks:
                found = self._batched.run(stacks, evaluate, self.buffers.moving())
            self.buffers.rewind()
            if not found:
                return None
            losses += found[0].unbind()
            for i in range(len(some)) if task.observe is not None else ():
                own = (leaf[i] for leaf in found[1:])
                leaves = [next(own) if leaf is None else leaf for leaf in structure[1]]
                samples.append(observe(tree_unflatten(leaves, structure[0])))
        self.count += len(points)
        return Evaluated(None, losses, samples)

    @contextmanager
    def _untraced(self) -> Iterator[None]:
        """Around an evaluation of several values, whose tensors nobody can read afterwards: attributes of modules are put back."""
        with undoing() as undo:
            if self.module is not None:
                undo.modules(self.module)
            yield

    def _derivatives(self, task: Task, host: HostState) -> Evaluated:
        """The loss comes with its first derivative, and is evaluated by itself only where there is none.

        Tangents are those of the largest eps being 1, so that they don't vanish in 16 bits.
        """
        unit = max(task.eps)
        scales = [eps / unit for eps in task.eps]
        first: Any = None
        here: Tensor | None = None
        losses: list[Tensor | None] = []
        for index, point in enumerate(task.points):
            if not point and here is not None:
                losses.append(here)
                continue
            tangents = task.residency.tangents(point, scales) if point else {}
            shown = showing(self.module, task.residency.trained, tangents) if point else nullcontext()
            with task.around(index), shown:
                output, _ = self._one(task, host)
                loss = task.loss_of(output)
                if loss is not None:
                    loss, slope = slope_of(loss) if point else (loss, None)
                    here = as_scalar(loss) if here is None else here
                    losses.append(here if slope is None else as_scalar(slope) * unit)
            self.count += 1
            if index == 0:
                first = output
                if task.noticed:
                    self.buffers.first_done()
            if loss is None:
                return Evaluated(None, [], [])
            if index + 1 < len(task.points):
                self.buffers.rewind()
        return Evaluated(first, [loss for loss in losses if loss is not None], [], here)

    def _coordinates(self, task: Task, ways: Ways, host: HostState) -> Evaluated:
        """Points of one element each, which is written where it lies; several of a parameter at once where that is asked for."""
        first: Any = None
        losses: list[Tensor] = []
        samples: list[Any] = []
        nudges = Nudges(task.residency, task.points, task.eps, task.seed)
        together = self._stacked.alike(task.residency.trained) if ways.batch > 1 else nullcontext()
        with together, self._reuse.session(host.devices) if ways.reuse and len(task.points) > 2 else nullcontext(False) as reuses:
            if reuses:
                with self._reuse.recording(task.residency.trained, nudges.parameters), task.muted():
                    recorded = self._outcome(task, host)
                self.buffers.first_done()
                self.buffers.rewind()
                if (deepest := self._reuse.deepest(nudges.parameters)) is not None:
                    with task.muted(), self._reuse.replaying(deepest):
                        again = self._outcome(task, host)
                    self.buffers.rewind()
                    self._reuse.check(deepest, same(again, recorded))
            for group in nudges.groups(ways.batch):
                found = self._together(task, nudges, group, host) if len(group) > 1 else None
                for index in group if found is None else ():
                    output, loss, sample = self._nudged(task, nudges, index, host)
                    if loss is None:
                        return Evaluated(None, [], [])
                    if index == 0:
                        first = output
                    losses.append(loss)
                    samples.append(sample)
                losses += [] if found is None else found
        return Evaluated(first, losses, samples)

    def _nudged(self, task: Task, nudges: Nudges, index: int, host: HostState) -> tuple[Any, Tensor | None, Any]:
        """(what the closure returned, its loss if it has one, its sample)."""
        p = nudges.parameters[index]
        with nudges.at(index):
            proof = self._proof(task, p, host) if p is not None and self._reuse.unproved(p) else None
            with task.around(index), self._reuse.replaying(p if proof is None else None):
                output, sample = self._one(task, host)
            self.count += 1
            loss = task.loss_of(output)
            found = None if loss is None else as_scalar(loss)
            if index == 0 and task.noticed:
                self.buffers.first_done()
            if p is not None and proof is not None:
                self._reuse.prove(p, same(proof, (found, sample)))
        if index + 1 < len(task.points):
            self.buffers.rewind()
        return output, found, sample

    def _proof(self, task: Task, p: Trained, host: HostState) -> tuple[Any, Any]:
        """(the loss, the sample) with features; before those without, which would renew what the model keeps between calls."""
        with task.muted(), self._reuse.replaying(p):
            found = self._outcome(task, host)
        self.buffers.rewind()
        return found

    def _outcome(self, task: Task, host: HostState) -> tuple[Any, Any]:
        """(the loss, the sample) of an evaluation."""
        output, sample = self._one(task, host)
        loss = task.loss_of(output)
        return (None if loss is None else as_scalar(loss)), sample

    def _together(self, task: Task, nudges: Nudges, group: list[int], host: HostState) -> list[Tensor] | None:
        """The losses of several points of one parameter in one evaluation; None where that can't be done."""
        p = nudges.parameters[group[0]]
        if p is None or not self._stacked.possible:
            return None
        with task.residency.still(), task.muted(), self._untraced(), self._reuse.replaying(p):
            evaluate = lambda: as_scalar(task.loss_of(self._one(task, host)[0]))  # noqa: E731
            found = self._stacked.run([copies_of(p, nudges.stack(group))], evaluate)
        if group[-1] + 1 < len(task.points) or found is None:
            self.buffers.rewind()
        if found is None:
            return None
        self.count += len(group)
        return list(found.unbind())

    def _one(self, task: Task, host: HostState, point: Displacement | None = None) -> tuple[Any, Any]:
        """(what the closure returned, its sample); of a `point` of the estimate, also what `task.graph` asks."""
        host.seed(task.seed)
        torch.clear_autocast_cache()  # autocast keeps cast weights; the second evaluation would see those of the first
        watched = [*task.residency.trained, *task.graph.parameters]
        before = [_grad_of(p.aliases[0]) for p in watched]
        try:
            with interruptible():
                with task.graph.recording(point) as differentiate:
                    output = differentiate(task.closure(), task.loss_of)
                sample = None if task.observe is None or output is None else task.observe(output)
        except RuntimeError as error:
            if "does not require grad and does not have a grad_fn" in str(error):
                raise RuntimeError(_BACKWARD) from error
            raise
        finally:
            torch.clear_autocast_cache()
        if any(_grad_of(p.aliases[0]) not in ((0, 0), old) for p, old in zip(watched, before, strict=True)):
            raise RuntimeError(_BACKWARD)
        return output, sample

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """Shadows the forward of Dropout modules; their training flag would not do, for hosts call train() inside the closure."""
        off: list[nn.Module] = []
        if not self.dropout and self.module is not None:
            off = [m for m in self.module.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and "forward" not in vars(m)]
            if not off:
                say_once("dropout", "dropout=False finds no Dropout module to switch off; functional dropout follows module.training.")
        try:
            for module in off:
                module.forward = _identity
            yield
        finally:
            for module in off:
                vars(module).pop("forward", None)


def _nothing(output: Any) -> None:
    """Nobody asks."""


def _grad_of(tensor: Tensor) -> tuple[int, int]:
    """Changes when a gradient is made or added to; (0, 0) without one."""
    return (0, 0) if tensor.grad is None else (id(tensor.grad), tensor.grad._version)


def _identity(x: Tensor) -> Tensor:
    return x


_BACKWARD = (
    "The closure calls backward(). Forward-only training has no backward pass: return the loss from the closure and remove loss.backward() "
    "and optimizer.zero_grad()."
)


_NOT_REACHED = (
    "The perturbation did not reach the model: no module with trained weights ran in the closure. Evaluate the module that was given to "
    'the optimizer (not a copy, and not through a compiled or exported version of it), or use weights="inplace".'
)


def a_loss(output: Any) -> Any:
    """What a closure returned that has to be the loss itself, as it is. TypeError or ValueError where it is not."""
    as_scalar(output)
    return output


def as_scalar(loss: Any) -> Tensor:
    """`loss` as a detached float64 scalar tensor. TypeError or ValueError for what is not one real number."""
    if isinstance(loss, Real) and not isinstance(loss, bool):
        return torch.tensor(float(loss), dtype=torch.float64)
    if not isinstance(loss, Tensor):
        raise TypeError(f"The closure returned {type(loss).__name__}; it must return the loss, a scalar tensor or a float.")
    if loss.numel() != 1:
        raise ValueError(f"The closure returned a loss of shape {tuple(loss.shape)}; it must be a scalar. Reduce it, e.g. loss.mean().")
    if loss.is_meta or loss.layout != torch.strided:
        raise ValueError(f"The closure returned a loss with layout {loss.layout} on {loss.device}; it must be a dense tensor with a value.")
    if loss.is_complex():
        raise ValueError(f"The closure returned a loss of dtype {loss.dtype}; it must be real.")
    return loss.detach().reshape(()).to(torch.float64)
