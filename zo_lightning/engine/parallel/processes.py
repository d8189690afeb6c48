"""Processes of torch.distributed: a step sends some numbers from each to all, whatever the size of the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zo_lightning.engine.estimators import Estimator
from zo_lightning.engine.parallel.exchange import Exchange
from zo_lightning.engine.parallel.mesh import Mesh, as_mesh
from zo_lightning.engine.parallel.tensors import send

ABSENT, PRESENT, ENDED, FAILED, SHARING, AVERAGING, COMPARING = range(7)
"""What a rank says of itself when ranks meet: it has no values, it has some, its run ended, it raised; or what else it came for."""
_DOING = {
    ABSENT: "is at a step",
    PRESENT: "is at a step",
    SHARING: "shares an object",
    AVERAGING: "averages",
    COMPARING: "compares weights",
}
_PART = 1 << 20
"""Elements of gradients that ranks send each other at once."""
_WORDS = 480
"""Bytes of what a rank that raised tells the others."""


class PeerError(RuntimeError):
    """Another process stopped, or ran out of data."""


class Processes(Exchange):
    """The processes of a group, in a mesh: their losses are gathered and reduced in float64, in the order of ranks, on every rank.

    Ranks meet once a step, and where something is shared. A rank that raises says so at the next meeting, and all others raise PeerError
    with its words; the same where one's run ends before that of others. `sent` counts the bytes that this rank gave to the meetings.

    Args:
        parallel: a `Mesh` or its text; None is data parallel.
        group: of torch.distributed; None is a group of its own of all processes, on gloo where torch has it: losses are on the CPU anyway,
            and nothing else waits there.
        device: of what is exchanged; None is the CPU, or with nccl the current device.
        timeout: of a meeting.

    Raises ValueError where no process group is there, and for a mesh of another size.
    """

    def __init__(
        self,
        parallel: str | Mesh | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"{type(self).__name__} needs an initialized torch.distributed process group; launch with torchrun or a host's launcher."
            )
        self.mesh = as_mesh(parallel, dist.get_world_size(group))
        if group is None:
            group = dist.new_group(backend="gloo" if dist.is_gloo_available() else None, timeout=timeout)
        self.group, self.timeout = group, timeout
        nccl = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        if nccl and device is not None:
            self.device = device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.stream = self.mesh.stream(self.rank)
        self.sent = self.meetings = 0
        self._width = 4
        """Numbers of a message."""
        self._patience = timeout.total_seconds()
        self._longest, self._met = 0.0, time.monotonic()
        """The longest time from one meeting to the next, and when the last one was."""
        self._over = False
        self._neighbours: dist.ProcessGroup | None = group if 1 < self.mesh.perturbation == self.world_size else None
        if 1 < self.mesh.perturbation < self.world_size:
            ranks = dist.get_process_group_ranks(group)
            size = self.mesh.perturbation
            rows = [ranks[begin : begin + size] for begin in range(0, len(ranks), size)]
            self._neighbours, _ = dist.new_subgroups_by_enumeration(rows, timeout=timeout, backend=dist.get_backend(group))

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return self  # there is one of each group

    # ---- who evaluates what

    def widened(self, estimator: Estimator) -> Estimator:
        wide = estimator.times(self.mesh.seeds) if self.mesh.seeds > 1 else estimator
        points = 0 if estimator.coordinates else len(estimator.points(lambda query: query))
        for count, what in ((points, "points"), (len(estimator.along), "lengths of its line search")):
            if count and count < self.mesh.perturbation:
                raise ValueError(
                    f'Invalid parallel: "{self.mesh}" shares the {count} {what} of {estimator} among {self.mesh.perturbation} processes, '
                    "and some would have none. Use more queries, or fewer processes for perturbation and more for data or seeds."
                )
        most = max(len(self.mesh.mine(rank, points * self.mesh.seeds)) for rank in range(self.world_size))
        self._width = 3 + max(1, most, len(estimator.along))
        return wide

    def mine(self, points: int) -> range:
        return self.mesh.mine(self.rank, points)

    # ---- meetings

    def values(self, totals: Sequence[Tensor] | None, points: int, moved: bool = False, seen: int = 0) -> list[float] | None:
        own = [] if totals is None else torch.stack([total.to(totals[0].device) for total in totals]).tolist()
        most = max(len(self.mesh.mine(rank, points)) for rank in range(self.world_size))
        many = 3 + most > self._width  # where a mask tells how many there are
        rows = self._meet(PRESENT if own else ABSENT, [float(moved), float(seen), *([] if many else own)])
        if not any(row[0] == PRESENT for row in rows):
            return None
        if many:
            rows = [[*row[:3], *more] for row, more in zip(rows, self._every([*own, *[0.0] * (most - len(own))]), strict=True)]
        self.moved = any(row[1] for row in rows)
        sums, owners = [0.0] * points, [0] * points
        for rank, row in enumerate(rows):
            self._same_data(rank, row, rows[rank - rank % self.mesh.perturbation])
            for value, point in zip(row[3:], self.mesh.mine(rank, points), strict=False):
                sums[point] += value  # a rank without data counts as one with a loss of 0, as with DDP
                owners[point] += 1
        return [total / count for total, count in zip(sums, owners, strict=True)]

    def _same_data(self, rank: int, row: list[float], first: list[float]) -> None:
        if row[0] != first[0] or row[2] != first[2]:
            raise ValueError(
                f'Rank {rank} had another batch than rank {rank - rank % self.mesh.perturbation}. With parallel="{self.mesh}" they share '
                "the points of a step, which only means something on the same data. Let the host make the sampler, or draw the "
                "batches of a rank, and what augments them, from seeds that depend on exchange.stream."
            )

    def align(self, module: nn.Module | None) -> None:
        if self._neighbours is not None and module is not None:
            send(list(module.buffers()), self._neighbours)

    def mean(self, values: Tensor) -> Tensor:
        rows = self._meet(AVERAGING, values.double().tolist())
        return torch.tensor([row[1 : 1 + len(values)] for row in rows], dtype=torch.float64).sum(0) / self.world_size

    def averaged(self, tensors: Sequence[Tensor], count: int) -> list[Tensor]:
        self._meet(SHARING)
        return [self._averaged(tensor, count) for tensor in tensors]

    def _averaged(self, tensor: Tensor, count: int) -> Tensor:
        flat = tensor.reshape(-1)
        found = torch.empty_like(flat)
        for part, out in zip(flat.split(_PART), found.split(_PART), strict=True):
            mine = part.to(self.device).contiguous()
            every = [torch.empty_like(mine) for _ in range(self.world_size)]
            try:
                self._wait(dist.all_gather(every, mine, group=self.group, async_op=True))
            except RuntimeError as error:
                raise PeerError(f"Rank {self.rank} did not get the gradients of the other {self.world_size - 1}. ({error})") from error
            self.sent += mine.nbytes
            total = every[0].double()
            for other in every[1:]:
                total += other
            out.copy_(total / count)
        return found.view(tensor.shape)

    def everywhere(self, number: float) -> list[float]:
        return [row[1] for row in self._meet(COMPARING, [number])]

    def share(self, value: Any) -> Any:
        self._meet(SHARING)
        values = [value]
        dist.broadcast_object_list(values, group_src=0, group=self.group, device=self.device)
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        self._meet(SHARING)
        return self._gathered(value)

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size if self.rank == 0 else []
        dist.gather_object(value, values if self.rank == 0 else None, group=self.group, group_dst=0)
        return values

    def agree(self, description: dict[str, str]) -> None:
        self._meet(SHARING)
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, description, group=self.group)
        for rank, other in enumerate(values):
            for name in sorted({*values[0], *other}):
                if (here := values[0].get(name)) != (there := other.get(name)):
                    raise ValueError(
                        f"Rank {rank} is not like rank 0: {name} is {there} there, and {here} on rank 0. All processes need the same "
                        "script, options, model, weights (broadcast_parameters) and versions."
                    )

    # ---- ends

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Tell the others at the next meeting, once, unless it was they who told.

        They come within the time of a step, or never: then this process ends, which they notice. So the meeting itself has to end then: one
        that goes on would keep the process alive, and with it the others, who wait for it elsewhere (in a host's own collectives).
        """
        if self._over or isinstance(error, PeerError):
            return
        self._over = True
        self._patience = min(self._patience, max(10.0, 3 * self._longest))
        words = f"{type(error).__name__}: {error}".encode()[:_WORDS]
        try:
            self._limit(timedelta(seconds=self._patience))
            self._meet(FAILED, words=words)
            self._limit(self.timeout)
        except Exception:
            return  # what has to be raised is `error`

    def _limit(self, timeout: timedelta) -> None:
        """How long what is asked of the group from now on may take."""
        set_timeout = getattr(dist.distributed_c10d, "_set_pg_timeout", None)  # torch has no public name for it
        if set_timeout is not None:
            set_timeout(timeout, self.group)

    def leave(self) -> None:
        if not self._over:
            self._over = True
            self._meet(ENDED)

    def _meet(self, state: int, numbers: Sequence[float] = (), words: bytes = b"") -> list[list[float]]:
        """[state, numbers of that rank, filled up with 0] of every rank. PeerError where one of them ended or raised."""
        mine = torch.zeros(self._width, dtype=torch.float64)  # of one size, for ranks may have come for different reasons
        mine[: 1 + len(numbers)] = torch.tensor([state, *numbers], dtype=torch.float64)
        rows = self._every(mine.tolist())
        now = time.monotonic()
        self._longest, self._met = max(self._longest, now - self._met), now
        self._over = self._over and state in (ENDED, FAILED)  # who goes on after an error has not stopped
        self.meetings += 1
        states = [int(row[0]) for row in rows]
        if FAILED in states:
            raise PeerError(f"Rank {states.index(FAILED)} stopped, and so do all: {self._words(states.index(FAILED), words)}")
        if ENDED in states and set(states) != {ENDED}:
            ended = ", ".join(str(rank) for rank, state in enumerate(states) if state == ENDED)
            raise PeerError(
                f"The run of rank {ended} has come to its end, and that of others has not: they have more batches. Give all ranks equally "
                "many (DistributedSampler, drop_last=True, max_steps)."
            )
        doing = [_DOING.get(state) for state in states]
        for rank, what in enumerate(doing):
            if what != doing[0]:
                raise PeerError(
                    f"Rank {rank} {what} where rank 0 {doing[0]}: they run different code, or one has come to the end of its data. Give "
                    "all ranks the same script and callbacks, and equally many batches."
                )
        return rows

    def _every(self, numbers: Sequence[float]) -> list[list[float]]:
        """Equally many numbers of every rank. PeerError where one does not come."""
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        every = [torch.empty_like(mine) for _ in range(self.world_size)]
        try:
            self._wait(dist.all_gather(every, mine, group=self.group, async_op=True))
        except RuntimeError as error:
            raise PeerError(
                f"Rank {self.rank} did not get the losses of the other {self.world_size - 1}: one of them died, or did not come within "
                f"{self.timeout}. ({error})"
            ) from error
        self.sent += mine.numel() * mine.element_size()
        rows: list[list[float]] = torch.stack(every).tolist()
        return rows

    def _words(self, rank: int, mine: bytes) -> str:
        """What a rank that raised tells."""
        told = torch.zeros(_WORDS, dtype=torch.uint8)
        if rank == self.rank:
            told[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        told = told.to(self.device)
        self._wait(dist.broadcast(told, group=self.group, group_src=rank, async_op=True))
        return bytes(told.tolist()).rstrip(b"\0").decode(errors="replace")

    def _wait(self, work: Any) -> None:
        """In Python, so that Ctrl-C ends it; at first without sleeping, for ranks usually come together."""
        began = time.monotonic()
        while not work.is_completed():
            waited = time.monotonic() - began
            if waited > self._patience:
                raise RuntimeError(f"waited {waited:.0f} s")
            if waited > 1e-3:
                time.sleep(min(1e-2, waited / 20))
        work.wait()


class DataParallel(Processes):
    """Ranks see different data and the same z: `Processes` with all of them for data."""

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        super().__init__(None, group, device)
