"""Copies between CPU memory and a device, and who waits for them: streams and events where there are any, nothing at all on the CPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from zo_lightning.engine.offload.transfers import pages

Mark = Any
"""A point in what the device was told to do: an event, or None where everything is done when it is asked for."""


class Lanes:
    """On the CPU: a copy is done when the call returns, and marks are None."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, nbytes: int) -> Tensor:
        """Uninitialised memory of the device (uint8), which copies may use until it is collected."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> Mark:
        """All that was computed so far, by the stream of this thread."""
        return None

    def inward(self, out: Tensor, source: Tensor, after: Iterable[Mark]) -> Mark:
        """Copy from CPU memory to the device once `after` has happened, beside what is computed; the mark of its end."""
        out.copy_(source)
        return None

    def outward(self, out: Tensor, source: Tensor, after: Iterable[Mark]) -> Mark:
        """The same from the device to CPU memory."""
        out.copy_(source)
        return None

    def hold(self, mark: Mark) -> None:
        """What is computed from now on comes after `mark`. The caller does not wait."""

    def join(self, mark: Mark) -> None:
        """Wait until `mark` has happened."""

    def stalled(self) -> float:
        """Seconds since the last call that computing stood still in `hold`, as far as they are known."""
        return 0.0

    def here(self) -> AbstractContextManager[Any]:
        """Around the work of another thread for the device."""
        return nullcontext()

    def pin(self, memory: Tensor) -> Callable[[], None] | None:
        """Make copies of CPU memory asynchronous, and return what ends that; None where there is nothing to do. RuntimeError: can't be."""
        return None


class PageLanes(Lanes):
    """On the CPU, with buffers of whole pages, which files are read into."""

    def empty(self, nbytes: int) -> Tensor:
        return pages(nbytes)


class CudaLanes(Lanes):
    """One stream of copies in each direction beside the stream that computes, which is the current one of whoever asks."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._held: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def empty(self, nbytes: int) -> Tensor:
        memory = super().empty(nbytes)
        for stream in (self._in, self._out):  # if it is collected, the allocator waits for them before it is used again
            memory.record_stream(stream)
        return memory

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def inward(self, out: Tensor, source: Tensor, after: Iterable[Mark]) -> Mark:
        return self._copy(self._in, out, source, after)

    def outward(self, out: Tensor, source: Tensor, after: Iterable[Mark]) -> Mark:
        return self._copy(self._out, out, source, after)

    def _copy(self, stream: torch.cuda.Stream, out: Tensor, source: Tensor, after: Iterable[Mark]) -> Mark:
        with torch.cuda.stream(stream):
            for mark in after:
                if mark is not None:
                    stream.wait_event(mark)
            out.copy_(source, non_blocking=True)
            return stream.record_event()

    def hold(self, mark: Mark) -> None:
        stream = torch.cuda.current_stream(self.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(mark)
        after.record(stream)
        self._held.append((before, after))

    def join(self, mark: Mark) -> None:
        if mark is not None:
            mark.synchronize()

    def stalled(self) -> float:
        found = 0.0
        while self._held and self._held[0][1].query():
            before, after = self._held.popleft()
            found += before.elapsed_time(after) / 1000
        return found

    def here(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device)

    def pin(self, memory: Tensor) -> Callable[[], None] | None:
        """Registered where it is: torch's own pinned memory is rounded up to the next power of two, up to twice the model."""
        cudart, address = torch.cuda.cudart(), memory.data_ptr()
        with torch.cuda.device(self.device):
            code = int(cudart.cudaHostRegister(address, memory.nbytes, 1))  # 1: for every context
            if code:
                with suppress(RuntimeError):
                    torch.zeros(1, device=self.device)  # the first operation after it would report the error once more
                raise RuntimeError(f"cudaHostRegister returned error {code}")

        def end() -> None:
            torch.cuda.synchronize(self.device)
            cudart.cudaHostUnregister(address)

        return end


def lanes_of(device: torch.device) -> Lanes:
    """For the device that computes. ValueError for one of another kind than CPU and CUDA."""
    if device.type == "cpu":
        return Lanes(device)
    if device.type == "cuda":
        return CudaLanes(device)
    raise ValueError(f"weights=Offload(device={str(device)!r}): blocks are streamed to 'cpu' and to 'cuda' devices so far.")
