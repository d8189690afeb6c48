"""Templates: fields of an example and literal text, and how much of the fields fits."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any

MASK = "mask"


class Template:
    """A format string over the fields of an example, such as "{text} It was {mask}."; a mask is only allowed, and needed, with `masked`.

    Raises ValueError for one without a field, with unnamed fields, or with the wrong number of masks.
    """

    def __init__(self, text: str, masked: bool) -> None:
        if not isinstance(text, str):
            raise ValueError(f"Invalid template: {text!r}. Must be a text with fields, such as '{{text}} It was'.")
        try:
            self.parts = [
                (literal, field) for literal, field, spec, conversion in string.Formatter().parse(text) if not (spec or conversion)
            ]
        except ValueError as error:
            raise ValueError(f"template={text!r} can't be read: {error}. Double a brace that belongs to the text: {{{{ }}}}.") from error
        fields = [field for _, field in self.parts if field is not None]
        odd = [field for field in fields if not field.isidentifier()]
        if odd or len(self.parts) != len(list(string.Formatter().parse(text))):
            raise ValueError(f"template={text!r} has a field that is not a plain name. Fields are the keys of an example: '{{text}}'.")
        self.text = text
        self.fields = tuple(dict.fromkeys(field for field in fields if field != MASK or not masked))
        masks = fields.count(MASK) if masked else 1
        if masks != 1:
            raise ValueError(f"template={text!r} has {masks} masks. kind='mask' needs one: '{{text}} It was {{mask}}.'")
        if not masked and MASK in fields:
            raise ValueError(f"template={text!r} has a mask, which only kind='mask' fills in. Leave it out, or use kind='mask'.")
        if not self.fields:
            raise ValueError(f"template={text!r} has no field of the example, so that every prompt is the same. Add one: '{{text}}'.")

    def before_slot(self, masked: bool) -> str:
        """The literal text right before what is predicted; empty after a field."""
        if masked:
            return next(literal for literal, field in self.parts if field == MASK)
        literal, field = self.parts[-1]
        return literal if field is None else ""

    def values(self, example: Mapping[str, Any]) -> dict[str, str]:
        """The fields' texts. ValueError where one is missing or no text."""
        for field in self.fields:
            if field not in example:
                raise ValueError(
                    f"template={self.text!r} needs the field {field!r}, and the example has {', '.join(map(repr, example)) or 'nothing'}. "
                    "The Hugging Face Trainer removes columns that the model does not know: say TrainingArguments("
                    "remove_unused_columns=False)."
                )
            if not isinstance(example[field], (str, int, float)):
                raise ValueError(f"The field {field!r} of an example is of type {type(example[field]).__name__}. Must be a text.")
        return {field: str(example[field]) for field in self.fields}

    def render(self, values: Mapping[str, str], mask: str = "") -> tuple[str, str]:
        """What stands before the slot, and behind it (with the mask in front); without a mask all is before."""
        sides, side = ["", ""], 0
        for literal, field in self.parts:
            sides[side] += literal
            if field == MASK and field not in values:
                side = 1
                sides[1] += mask
            elif field is not None:
                sides[side] += values[field]
        return sides[0], sides[1]


def cut(values: Mapping[str, str], fits: Callable[[Mapping[str, str]], bool], left: bool = False) -> dict[str, str] | None:
    """The longest texts that fit: all are cut to one number of characters (whole words where there are any), so the longest first.

    left: the ends are kept, not the beginnings. None where not even empty texts fit.
    """
    if fits(values):
        return dict(values)
    best, low, high = None, 0, max(map(len, values.values()), default=0)
    while low <= high:
        middle = (low + high) // 2
        tried = {field: _shortened(text, middle, left) for field, text in values.items()}
        if fits(tried):
            best, low = tried, middle + 1
        else:
            high = middle - 1
    return best


def _shortened(text: str, length: int, left: bool) -> str:
    if len(text) <= length:
        return text
    if left:
        return _shortened(text[::-1], length, False)[::-1]
    kept = text[:length]
    words = kept.rsplit(maxsplit=1)
    whole = text[length].isspace() or len(words) < 2
    return kept.rstrip() if whole else kept[: kept.rindex(words[1], len(words[0]))].rstrip()
