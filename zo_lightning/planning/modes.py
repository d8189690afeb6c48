"""Memory, traffic and time of each mode of the engine, out of a model's weights and one traced forward pass.

What is known of the engine by number rather than by its own functions stands at the top of this file.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from zo_lightning.engine.estimators import SPSA
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.offload.buffers import size_class
from zo_lightning.engine.options import as_rule
from zo_lightning.engine.residency.offloaded import KEPT
from zo_lightning.engine.updates import UpdateRule
from zo_lightning.planning.forward import Forward, Pass, trace
from zo_lightning.planning.machine import Machine
from zo_lightning.planning.weights import Weights

LOCKSTEP = True
"""Whether all forward passes of a step visit a block while it is in memory: then each block is read once a step, not once a pass."""
MATRIX_LIBRARY, COMPILER = 25_000_000, 65_000_000
"""Resident bytes of a CPU process that its first step adds, measured with torch 2.13: code of the matrix kernels; torch's compiler and the
noise kernels that it makes."""
CUDA_CONTEXT = 500_000_000
"""Bytes of a GPU that CUDA takes before the first tensor (assumed; torch.cuda.max_memory_allocated does not count them)."""


HOLES, HOLES_OF_ACTIVATIONS = 55_000_000, 0.15
"""What fragmentation adds to a heap where weights are in memory: bytes, and a share of the activations. Not derived: fitted to
the peaks of benchmarks/plan_accuracy.py, beside those with a malloc that gives everything back."""


@dataclass(frozen=True)
class Mode:
    """A mode of the engine for one model, batch and machine. Bytes, and seconds a step.

    `memory` are the parts of the peak on the device; `host` is CPU memory beside a GPU, `disk` the room for files. `read` and `written`
    cross the bus or come from and go to the disk, a step.
    """

    name: str
    weights: str
    memory: dict[str, int]
    host: int
    disk: int
    read: int
    written: int
    compute_seconds: float
    bus_seconds: float
    fits: bool

    @property
    def peak(self) -> int:
        """The most bytes of device memory."""
        return sum(self.memory.values())

    @property
    def bound(self) -> str:
        """What a step waits for: "compute" or "bus"."""
        return "bus" if self.bus_seconds > self.compute_seconds else "compute"

    @property
    def seconds(self) -> float:
        """Of a step, where transfers and computation overlap."""
        return max(self.bus_seconds, self.compute_seconds)


@dataclass(frozen=True)
class Plan:
    """What `plan` found: the modes in the order of preference, the forward pass, and what was assumed, in sentences."""

    modes: tuple[Mode, ...]
    forward_flops: int
    activations: int
    weights: int
    trained: int
    largest_unit: int
    machine: Machine
    assumptions: tuple[str, ...]

    @property
    def recommended(self) -> Mode | None:
        """The first mode that fits; None where there is none."""
        return next((mode for mode in self.modes if mode.fits), None)

    @property
    def smallest(self) -> Mode:
        """The mode that needs the least device memory."""
        return min(self.modes, key=lambda mode: mode.peak)


def plan(
    model: nn.Module,
    inputs: Any,
    forward: Forward,
    machine: Machine,
    queries: int = 1,
    *,
    lockstep: bool = LOCKSTEP,
    update: str | UpdateRule = "sgd",
) -> Plan:
    """Compare the engine's modes for `model`, a module on the meta device in training mode, whose weights have their dtypes.

    `inputs` are tensors on the meta device in any nesting, and `forward(model, inputs)` makes one forward pass of a batch and returns the
    loss: it is run once, without data. A step of SPSA takes `2 * queries` of them, and what the rule `update` keeps of the weights counts;
    with a rule that needs the estimate as a tensor no weights are streamed. ValueError for a model in which nothing is trained, or
    whose forward pass depends on values of tensors.
    """
    weights = Weights(model)
    run = trace(model, inputs, forward, weights.watched, machine.device)
    found = _Planner(weights, run, machine, as_rule(update), queries, lockstep, inputs).modes()
    return Plan(
        modes=tuple(found),
        forward_flops=run.flops,
        activations=run.peak,
        weights=weights.nbytes,
        trained=sum(p.tensor.nbytes for p in weights.trained),
        largest_unit=max(sum(p.tensor.nbytes for p in unit.parameters) for unit in weights.units),
        machine=machine,
        assumptions=_assumptions(machine, lockstep),
    )


class _Planner:
    def __init__(self, weights: Weights, run: Pass, machine: Machine, rule: UpdateRule, queries: int, lockstep: bool, inputs: Any) -> None:
        self.weights, self.run, self.machine, self.rule, self.lockstep = weights, run, machine, rule, lockstep
        self.points = len(rule.measured_by(SPSA(queries)).points(lambda query: query))
        self._scratch = weights.scratch() if machine.on_gpu else weights.touched(inputs)

    def modes(self) -> list[Mode]:
        """In the order of preference: exact weights first, and those that move the fewest bytes."""
        kernels = self.machine.on_gpu or available(self.machine.device)
        copied = self.weights.copied(kernels)
        found = [self._resident("exact", self._scratch), self._resident("copy", copied), self._resident("inplace", 0)]
        if self.weights.parcels and not self.rule.dense:
            found += [self._to_gpu("CPU memory"), self._to_gpu("disk")] if self.machine.on_gpu else [self._from_disk()]
        return found

    def _process(self) -> dict[str, int]:
        if self.machine.on_gpu:
            return {"CUDA context": CUDA_CONTEXT}
        return {"Python and packages": self.machine.process, "matrix library": MATRIX_LIBRARY, "compiler": COMPILER}

    def _resident(self, name: str, scratch: int) -> Mode:
        memory = {"weights": self.weights.nbytes + self.weights.buffers, **self._values(), "scratch": scratch}
        return self._mode(name, f'weights="{name}"', {**memory, **self._rule(scratch), **self._activations(self.run.peak)})

    def _values(self) -> dict[str, int]:
        """Float32 values of 16-bit weights."""
        if not self.rule.dense:
            return {"float32 vectors": self.weights.masters}
        return {"float32 weights": sum(4 * p.tensor.numel() for p in self.weights.trained if p.tensor.element_size() == 2)}

    def _rule(self, scratch: int) -> dict[str, int]:
        """What the rule keeps, and what of its estimate does not fit where activations and scratch were."""
        if not self.rule.dense:
            return {}
        kept = sum(self.rule.state_bytes(p.shape) for p in self.weights.trained)
        estimate = max(4 * p.tensor.numel() for p in self.weights.trained)
        return {"update rule": kept, "estimate": max(0, estimate - scratch - self.run.peak)}

    def _activations(self, nbytes: int) -> dict[str, int]:
        kept = self.run.kept + min(HOLES, nbytes) + int(HOLES_OF_ACTIVATIONS * nbytes)
        return {"activations": nbytes, "kept by malloc": 0 if self.machine.on_gpu else kept}

    def _streamed(self) -> dict[str, int]:
        resident = self.weights.resident() + self.weights.buffers
        return {"resident weights": resident, "float32 vectors": self.weights.masters, "scratch": self._scratch}

    def _from_disk(self) -> Mode:
        nbytes = self._passes_at_once()
        kept = {"kept by malloc": min(KEPT, nbytes)}  # more is given back from one block to the next
        memory = {**self._streamed(), "activations": nbytes, **kept, "blocks": self._buffers()}
        return self._mode("offload (disk)", "Offload()", memory, disk=self.weights.slots(), streams=True)

    def _to_gpu(self, tier: str) -> Mode:
        memory = {**self._streamed(), **self._activations(self._passes_at_once()), "blocks": self._buffers()}
        disk = self.weights.slots() if tier == "disk" else 0
        host = 2 * max(parcel.nbytes for parcel in self.weights.parcels) if disk else self.weights.streamed  # one staged each way
        return self._mode(f"offload ({tier})", "Offload()", memory, host=host, disk=disk, streams=True)

    def _buffers(self) -> int:
        """Of each size one for every parcel that is used at the same moment, and one for the next."""
        parcels = self.weights.parcels
        largest = max(parcel.nbytes for parcel in parcels)
        total = 0
        for size, count in Counter(size_class(parcel, largest) for parcel in parcels).items():
            used = (self.weights.used(stretch.running) for stretch in self.run.stretches)
            at_once = max((sum(size_class(parcel, largest) == size for parcel in here) for here in used), default=1)
            total += size * min(count, max(1, at_once) + 1)
        return total

    def _passes_at_once(self) -> int:
        """Activations: in lockstep all passes but one wait between two blocks while that one runs."""
        waiting = max((s.began for s in self.run.stretches if s.entered is not None), default=0) if self.lockstep else 0
        return self.run.peak + (self.points - 1) * waiting

    def _mode(self, name: str, weights: str, memory: dict[str, int], *, host: int = 0, disk: int = 0, streams: bool = False) -> Mode:
        memory = {part: size for part, size in {**memory, **self._process()}.items() if size}
        visits = 1 if self.lockstep else self.points
        read = visits * self.weights.read(self.run.stretches) if streams else 0
        written = self.weights.written(self.run.stretches) if streams else 0
        bandwidth = self.machine.disk_bandwidth if disk else self.machine.bus_bandwidth
        both_ways = read + written if disk else max(read, written)  # a bus carries both directions at once
        fits = self.machine.memory is None or sum(memory.values()) <= self.machine.memory
        compute = self.points * self.run.flops / self.machine.flops
        return Mode(name, weights, memory, host, disk, read, written, compute, both_ways / bandwidth, fits)


def _assumptions(machine: Machine, lockstep: bool) -> tuple[str, ...]:
    passes = "in lockstep: a block is read once for all forward passes of a step" if lockstep else "a block is read in each forward pass"
    said = [
        f"{machine.flops / 1e9:.0f} GFLOP/s ({machine.flops_source}); matrix products, convolutions and attention are counted, not noise",
        f"disk {machine.disk_bandwidth / 1e9:.1f} GB/s ({machine.disk_source}), reads and writes one after another",
        f"{passes}; all blocks that steps change are written once; transfers and computation overlap",
    ]
    if machine.on_gpu:
        return (
            *said,
            f"bus {machine.bus_bandwidth / 1e9:.1f} GB/s ({machine.bus_source}), both directions at once",
            "attention is a fused kernel",
        )
    return (
        *said,
        f"Python and packages take {machine.process / 1e9:.2f} GB ({machine.process_source}); loading of the model is not included",
        "malloc is glibc's, which keeps the memory of freed tensors up to 32 MiB; attention is the kernel that torch takes on a CPU",
    )
