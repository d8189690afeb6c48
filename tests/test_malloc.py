"""What malloc keeps of freed memory is given back, once it is much."""

from __future__ import annotations

import platform

import pytest
import torch

from zo_lightning.engine import malloc

MB = 1 << 20


def test_only_what_grew_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    size, calls = 500 * MB, []

    def give_back() -> None:
        nonlocal size
        calls.append(size // MB)
        size -= 40 * MB

    monkeypatch.setattr(malloc, "_glibc", lambda: True)
    monkeypatch.setattr(malloc, "_anonymous", lambda: size)
    monkeypatch.setattr(malloc, "give_back", give_back)
    grown = malloc.Grown()

    def at(*sizes: int) -> None:
        nonlocal size
        for megabytes in sizes:
            size = megabytes * MB
            grown.give_back(64 * MB)

    at(500, 560, 565)  # the last one is 65 above the least
    assert calls == [565]
    at(585, 400, 460, 470)  # 60 above what was left, a new least, 60 and 70 above it
    assert calls == [565, 470]
    grown.give_back(0)
    assert calls == [565, 470]  # it has not grown


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_holes_are_given_back() -> None:
    before = malloc._anonymous()
    grown = malloc.Grown()
    grown.give_back(0)
    blocks = [torch.ones(1 << 16) for _ in range(800)]  # 200 MB in pieces that come from the heap
    full = malloc._anonymous()
    assert full - before > 150 * MB
    del blocks[::2], blocks[1::2]  # what is left lies between the holes
    kept = malloc._anonymous()
    grown.give_back(64 * MB)
    assert malloc._anonymous() < kept - 30 * MB or kept - before < 64 * MB
    assert all(float(block.sum()) == 1 << 16 for block in blocks)
