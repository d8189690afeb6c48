"""Whether the weights of all ranks still are the same bits, and what to do where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zo_lightning.engine.messages import check_count, say_once
from zo_lightning.engine.parallel.alike import digest
from zo_lightning.engine.shards import any_sharded

if TYPE_CHECKING:
    from zo_lightning.engine.optimizer import ZOOptimizer


class UnequalRanksError(RuntimeError):
    """Ranks that should hold the same weights do not."""


class Equality:
    """Compares a number of the trained weights' bits between ranks, every so many steps; 8 bytes from each.

    Every rank makes the same update from the same scalars, so weights that differ are the work of something else: code that runs on one
    rank alone, memory that flips a bit, kernels that round differently. Ranks that are not as most are called by name. Where as many agree
    with one as with another, none is known to be right.

    Args:
        every: steps from one comparison to the next; it reads all trained weights once.
        heal: give ranks that differ the weights that the step log says they should have, from its base file by replaying the steps since:
            rank 0 sends them the log, they read the base file. Float32 masters of 16-bit vectors and masks come from there as well. Where
            none is known to be right, all do. False raises instead.

    Raises ValueError for options out of range, and for sharded weights.
    """

    def __init__(self, every: int = 100, heal: bool = False) -> None:
        check_count("every", every, "steps from one comparison to the next")
        if not isinstance(heal, bool):
            raise ValueError(f"Invalid heal: {heal!r}. Must be True (from the step log) or False (raise).")
        self.every, self.heal = every, heal
        self.healed: list[tuple[int, list[int]]] = []
        """(step, ranks) of each time."""
        self._equal_at = 0

    def stepped(self, optimizer: ZOOptimizer) -> None:
        """A step was made on all ranks: compare if it is time."""
        if optimizer.steps % self.every == 0:
            self.check(optimizer)

    def check(self, optimizer: ZOOptimizer) -> None:
        """Compare now; all ranks have to. UnequalRanksError, on all of them, where weights differ and are not healed."""
        exchange = optimizer.exchange
        if exchange.world_size == 1:
            return
        if any_sharded(optimizer.residency.trained):
            raise ValueError(
                "RankEquality compares ranks that hold the same weights, and these hold different shards of them. Leave it out: the step "
                "log's fingerprints are those of the whole weights."
            )
        with exchange.together():
            numbers = exchange.everywhere(_number_of(optimizer))
            others = strangers(numbers)
            if others and not self.heal:
                raise UnequalRanksError(self._what(numbers, others, optimizer) + " " + _ADVICE)
            if others:
                self._heal(optimizer, numbers, others)
        self._equal_at = optimizer.steps

    def _heal(self, optimizer: ZOOptimizer, numbers: Sequence[float], others: Sequence[int]) -> None:
        from zo_lightning.engine.trajectory import heal, read_log  # which knows the optimizer

        exchange = optimizer.exchange
        path = getattr(optimizer.journal, "path", None)
        if path is None:
            raise UnequalRanksError(f"{self._what(numbers, others, optimizer)} heal=True needs a step log: add TrajectoryLog.")
        log = exchange.share(read_log(path) if exchange.rank == 0 else None)
        healed: list[int] = []
        for ranks in (others, [rank for rank in range(exchange.world_size) if rank not in others]):  # what most have may not be the log's
            if exchange.rank in ranks:
                heal(optimizer, log)
            healed += ranks
            if not strangers(exchange.everywhere(_number_of(optimizer))):
                break
        else:
            raise UnequalRanksError(
                f"{self._what(numbers, others, optimizer)} Replaying the step log did not make them equal: kernels round differently on "
                'these ranks (noise="rademacher" has the same bits everywhere).'
            )
        self.healed.append((optimizer.steps, sorted(healed)))
        what = f"{self._what(numbers, others, optimizer)} They have been made again from the step log."
        say_once(f"equality.{optimizer.steps}", what)

    def _what(self, numbers: Sequence[float], others: Sequence[int], optimizer: ZOOptimizer) -> str:
        when = f"between steps {self._equal_at} and {optimizer.steps}"
        names = ", ".join(map(str, others))
        if len(others) == len(numbers):
            return f"The weights of ranks {names} came apart {when}, and no more of them agree with one than with another."
        return f"The weights of rank {names} came apart from those of the {len(numbers) - len(others)} others {when}."


_ADVICE = (
    "What changes weights (a callback, a clamp, a reload) has to run on all ranks. Go on from the last checkpoint, or let RankEquality("
    "heal=True) make them again from the step log (TrajectoryLog)."
)


def strangers(numbers: Sequence[float]) -> list[int]:
    """The ranks whose number is not what most have; all where no number has most votes, none where all are equal."""
    votes = sorted({number: numbers.count(number) for number in numbers}.items(), key=lambda item: -item[1])
    if len(votes) == 1:
        return []
    usual = None if votes[0][1] == votes[1][1] else votes[0][0]
    return [rank for rank, number in enumerate(numbers) if number != usual]


def _number_of(optimizer: ZOOptimizer) -> float:
    """Of the bits of trained weights and of float32 masters; below 2**53, so that a float64 holds it."""
    residency = optimizer.residency
    with residency.settled():
        tensors: list[Any] = [p.tensor for p in residency.trained]
        masters = optimizer.masters.state_dict()
        every = [*tensors, *(masters[key] for key in sorted(masters)), *optimizer.tail.tensors()]
        return float(int(digest(every), 16) >> 11)
