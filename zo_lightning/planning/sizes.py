"""Sizes as people write them: 8GB, 8GiB, 500MB."""

from __future__ import annotations

import math
import re

_UNITS = {"": 1, "B": 1, **{f"{c}B": 1000**i for i, c in enumerate("KMGT", 1)}, **{f"{c}IB": 1024**i for i, c in enumerate("KMGT", 1)}}


def parse_size(text: str) -> int:
    """Bytes of "8GB" (8e9), "8GiB" (8 * 2**30), "500 MB", "1.5e9". ValueError for another unit, and where it is not above 0."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = _UNITS.get(match[2].upper()) if match else None
    try:
        size = float(match[1]) * unit if match and unit else 0.0
    except ValueError:
        size = 0.0
    if not 1 <= size < math.inf:
        raise ValueError(f"{text!r} is not a size: write a number above 0 and B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB.")
    return round(size)


def gigabytes(nbytes: float) -> str:
    """1e9 bytes with three digits that say something."""
    value = nbytes / 1e9
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
