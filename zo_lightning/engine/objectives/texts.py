"""Numbers of answers in words: exact match and F1 of words, as question answering counts them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Reference = str | Sequence[str]
"""An answer, or several that are all right."""


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces (SQuAD: Rajpurkar et al. 2016, arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(preds: Sequence[str], target: Sequence[Reference]) -> float:
    """Share of texts that are one of their references, both normalised; in [0, 1]. ValueError for none."""
    return _mean(preds, target, lambda ours, theirs: float(ours == theirs))


def word_f1(preds: Sequence[str], target: Sequence[Reference]) -> float:
    """Mean over texts of 2 p r / (p + r), with precision p and recall r of words, for the best reference; in [0, 1]."""
    return _mean(preds, target, _f1)


def _f1(ours: str, theirs: str) -> float:
    said, wanted = ours.split(), theirs.split()
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (Counter(said) & Counter(wanted)).total() / (len(said) + len(wanted))


def _mean(preds: Sequence[str], target: Sequence[Reference], of: Callable[[str, str], float]) -> float:
    if not preds:
        raise ValueError("There are no texts to compare.")
    best = [
        max(of(normalised(ours), normalised(one)) for one in ([theirs] if isinstance(theirs, str) else theirs))
        for ours, theirs in zip(preds, target, strict=True)
    ]
    return sum(best) / len(best)


TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[Reference]], float]] = {"exact_match": exact_match, "f1": word_f1}
