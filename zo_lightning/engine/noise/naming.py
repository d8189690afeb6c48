"""Noises by name: "gaussian", "low_rank(rank=4, refresh=100)"."""

from __future__ import annotations

import ast

from zo_lightning.engine.messages import choose
from zo_lightning.engine.noise.base import Noise
from zo_lightning.engine.noise.gaussian import Gaussian
from zo_lightning.engine.noise.low_rank import LowRank
from zo_lightning.engine.noise.rademacher import Rademacher
from zo_lightning.engine.noise.sphere import Sphere

NOISES: dict[str, type[Noise]] = {kind.name: kind for kind in (Rademacher, Gaussian, Sphere, LowRank)}
"""By the names that `noise=` and step logs use."""


def as_noise(noise: str | Noise) -> Noise:
    """The noise object for a name, a name with options (`Noise.text`), or an object. ValueError for what is none."""
    if isinstance(noise, Noise):
        return noise
    name, options = _parsed(noise) if isinstance(noise, str) else (noise, {})
    kind = choose("noise", name, NOISES, "a Noise")
    try:
        return kind(**options)  # type: ignore[no-any-return, operator]
    except TypeError as error:
        raise ValueError(f"Invalid noise: {noise!r}. {error}.") from error


def _parsed(text: str) -> tuple[str, dict[str, object]]:
    """(name, options) of `name(option=value, ...)`; the text itself, without options, where it is no such call."""
    if "(" not in text:
        return text, {}
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError("each option has a name")
        options = {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
        if len(options) < len(call.keywords):
            raise ValueError("each option once")
        return call.func.id, options
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"Invalid noise: {text!r} is no name with options. Write them as in 'low_rank(rank=4, refresh=100)'.") from error
