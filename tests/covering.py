"""Covering arrays: few rows in which every allowed pair of choices of two factors appears."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_of(row: Mapping[str, str]) -> set[Pair]:
    """All pairs of (factor, choice) in a row."""
    return set(combinations(sorted(row.items()), 2))


def all_pairs(factors: Mapping[str, Sequence[str]]) -> list[Pair]:
    """Every choice of a factor with every choice of another one."""
    names = sorted(factors)
    return [((a, x), (b, y)) for a, b in combinations(names, 2) for x in factors[a] for y in factors[b]]


def rows(factors: Mapping[str, Sequence[str]], forbidden: Callable[[Mapping[str, str]], bool]) -> list[Row]:
    """Rows without anything forbidden, greedily: each begins with a pair that is missing and takes what covers most.

    `forbidden` tells of a part of a row whether what is there can't go together. ValueError where a pair that is not forbidden by itself
    fits into no row.
    """
    missing = [pair for pair in all_pairs(factors) if not forbidden(dict(pair))]
    found: list[Row] = []
    while missing:
        row: Row | None = dict(missing[0])
        left = set(missing)
        for name in sorted(set(factors) - set(dict(missing[0]))):
            assert row is not None
            fitting = [grown for choice in factors[name] if not forbidden(grown := {**row, name: choice})]
            row = max(fitting, key=lambda grown: len(pairs_of(grown) & left), default=None)
            if row is None:
                raise ValueError(f"{missing[0]} fits into no row.")
        assert row is not None
        found.append(row)
        missing = [pair for pair in missing if pair not in pairs_of(row)]
    return found
