"""Common random numbers: every evaluation of a micro-batch starts from the same generator states, and the host's come back untouched."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class HostState:
    """The states of torch's, Python's and numpy's global generators, taken once and put back in the end.

    numpy is only looked at where the program has imported it. Of the devices, those in `devices` are looked at.
    """

    def __init__(self, devices: set[torch.device]) -> None:
        self.devices = devices
        self._cuda = sorted({d.index if d.index is not None else torch.cuda.current_device() for d in devices if d.type == "cuda"})
        self._numpy: Any = sys.modules.get("numpy")
        self._saved = (
            torch.random.get_rng_state(),
            [torch.cuda.get_rng_state(index) for index in self._cuda],
            random.getstate(),
            self._numpy.random.get_state() if self._numpy else None,
        )

    def seed(self, seed: int) -> None:
        """Put all of them to a state that depends on `seed` alone."""
        torch.default_generator.manual_seed(seed)
        for index in self._cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        random.seed(seed)
        if self._numpy:
            self._numpy.random.seed(seed % (1 << 32))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HostState):
            return NotImplemented
        (ours, our_cuda, python, numpy), (theirs, their_cuda, other_python, other_numpy) = self._saved, other._saved
        states = [(ours, theirs), *zip(our_cuda, their_cuda, strict=True)]
        same_numpy = numpy is other_numpy if numpy is None or other_numpy is None else _same_numpy(numpy, other_numpy)
        return all(torch.equal(a, b) for a, b in states) and python == other_python and same_numpy

    __hash__ = None  # type: ignore[assignment]

    def restore(self) -> None:
        """Put the host's states back."""
        torch_state, cuda_states, python_state, numpy_state = self._saved
        torch.random.set_rng_state(torch_state)
        for index, state in zip(self._cuda, cuda_states, strict=True):
            torch.cuda.set_rng_state(state, index)
        random.setstate(python_state)
        if self._numpy:
            self._numpy.random.set_state(numpy_state)


def _same_numpy(a: Any, b: Any) -> bool:
    """Of two `numpy.random.get_state()`."""
    return all(bool((x == y).all()) if hasattr(x, "all") else x == y for x, y in zip(a, b, strict=True))


@contextmanager
def host_state(devices: set[torch.device]) -> Iterator[HostState]:
    """The host's generator states, restored on the way out."""
    state = HostState(devices)
    try:
        yield state
    finally:
        state.restore()
