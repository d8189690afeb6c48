"""What a prompt needs of a tokenizer: the special tokens around a text, and the tokens of a word where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Tokens:
    """A tokenizer that gives the tokens of a text, and separately what belongs around it."""

    def __init__(self, tokenizer: Any) -> None:
        if not callable(tokenizer) or not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise TypeError(f"tokenizer={tokenizer!r} is not a tokenizer of transformers.")
        self.tokenizer = tokenizer
        bare, full = self.of("a"), list(tokenizer("a")["input_ids"])
        at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), None)
        if at is None or not bare:
            raise ValueError(
                f"{type(tokenizer).__name__} changes the tokens of a text where it adds special tokens, so a prompt can't tell."
            )
        self.before, self.after = full[:at], full[at + len(bare) :]

    def of(self, text: str) -> list[int]:
        """Its tokens without special ones around."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def shown(self, ids: Sequence[int]) -> str:
        """Tokens for messages."""
        return ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(list(ids))))

    @property
    def pad(self) -> int:
        """What fills rows up; any token would do, for it is never attended to."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in known if token is not None)

    @property
    def limit(self) -> int | None:
        """The tokenizer's own max_length; the number that stands for "unknown" is huge."""
        found = getattr(self.tokenizer, "model_max_length", None)
        return int(found) if found is not None and found < 10**9 else None

    def word(self, word: str, anchor: str, separator: str) -> int:
        """The one token that `word` is behind `anchor + separator`. ValueError where it is several, or unknown."""
        ids = self._behind(word, anchor, separator)
        if len(ids) != 1:
            other = self._behind(word, anchor, "" if separator else " ")
            way = "without a space before it" if separator else "behind a space"
            raise ValueError(
                f"The label word {word!r} is {len(ids)} tokens {'behind ' + repr(separator) if separator else 'here'} ({self.shown(ids)}), "
                f"and {len(other)} {way} ({self.shown(other)}). Choose a word of one token"
                + (
                    f", or change what stands before it to '{'' if separator else ' '}'."
                    if len(other) == 1
                    else ", or score whole options."
                )
            )
        if ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(f"The label word {word!r} is not in the tokenizer's vocabulary. Choose another.")
        return ids[0]

    def _behind(self, word: str, anchor: str, separator: str) -> list[int]:
        """The tokens of a word in its place: tokenizers of words with their spaces have several for it."""
        alone = self.of(word)
        for start in (anchor, "a") if separator else (anchor,):
            known, whole = self.of(start) if start else [], self.of(start + separator + word)
            if known and len(whole) > len(known) and whole[: len(known)] == known:
                return whole[len(known) :]
        return alone


def shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first tokens are the same."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count
