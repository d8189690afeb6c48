"""Who ranks: a function, a person at the terminal, or people who answer through files, perhaps days later."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import Tensor

from zo_lightning.engine.messages import check_number, say_once
from zo_lightning.engine.objectives.samples import short

Show = Callable[[Any], Any]


class Oracle(ABC):
    """Ranks the outputs of one step. A plain callable `oracle(outputs) -> order` does as well, where the step does not matter to it."""

    @abstractmethod
    def ask(self, step: int, outputs: list[Any], top: int, searching: bool = False) -> Sequence[int]:
        """The indices of `outputs`, the best first: all of them, or the best `top`. Called on rank 0 alone, and only there.

        With a line search a step asks twice: `searching` is the second time.
        """


class TerminalOracle(Oracle):
    """A person at the terminal: prints the outputs and reads an order such as "2 0 1"; asks again where that is none.

    Args:
        show: output -> what is printed of it; None prints the output.
    """

    def __init__(self, show: Show | None = None) -> None:
        self.show = checked_show(show)

    def ask(self, step: int, outputs: list[Any], top: int, searching: bool = False) -> list[int]:
        print(f"\nStep {step}{', line search' if searching else ''}: which is better?")
        for index, output in enumerate(outputs):
            print(f"  [{index}] {output if self.show is None else self.show(output)}")
        want = "all of them" if top == len(outputs) else f"at least the best {top}"
        while True:
            typed = input(f"The best first, {want}, such as {' '.join(map(str, reversed(range(len(outputs)))))}: ")
            try:
                return as_order([int(word) for word in typed.replace(",", " ").split()], len(outputs), top, "The answer")
            except ValueError as error:
                print(error)


class FileOracle(Oracle):
    """People who answer through files: writes question-<step>.json into a folder and waits for answer-<step>.json.

    The second question of a step with a line search is question-<step>-search.json, with an answer of that name.

    The question has "id", "step", "top" and "outputs"; the answer is {"id": the same, "order": [2, 0, 1]}, the best first. The id is a
    function of the step and the outputs, so a run that was killed and goes on asks the same question, and takes an answer that has come in
    the meantime, or one that it had before. Every file appears as a whole. With several processes all others wait for the answer: give
    their process group a timeout that is longer.

    Args:
        folder: where the files are; one a run.
        timeout: seconds until TimeoutError; None waits for as long as it takes.
        poll: seconds between two looks at the folder.
        show: output -> what of it is in the question (text, numbers, lists, dicts); None takes tensors and arrays as lists.

    Raises TimeoutError, ValueError for an answer to another question or without an order, TypeError for outputs that JSON does not know.
    """

    def __init__(self, folder: str | os.PathLike[str], timeout: float | None = None, poll: float = 1.0, show: Show | None = None) -> None:
        if timeout is not None:
            check_number("timeout", timeout, "> 0 (seconds), or None", lambda x: x > 0)
        check_number("poll", poll, "> 0 (seconds)", lambda x: x > 0)
        self.folder, self.timeout, self.poll, self.show = Path(folder), timeout, poll, checked_show(show)

    def ask(self, step: int, outputs: list[Any], top: int, searching: bool = False) -> list[int]:
        from zo_lightning.engine.trajectory.atomic import write_bytes

        asked = {"step": step, "top": top, "outputs": [plain(output if self.show is None else self.show(output)) for output in outputs]}
        identity = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        question, answer = (self.folder / f"{what}-{step}{'-search' if searching else ''}.json" for what in ("question", "answer"))
        text = (json.dumps({"id": identity, **asked}, indent=1, ensure_ascii=False) + "\n").encode()
        if not question.exists() or question.read_bytes() != text:
            write_bytes(question, text)
        began = time.monotonic()
        while (found := self._read(answer)) is None:
            if self.timeout is not None and time.monotonic() - began >= self.timeout:
                raise TimeoutError(
                    f"There was no {answer} within timeout={self.timeout:g} seconds. Answer {question.name}, then start again: the same "
                    "question is asked."
                )
            time.sleep(self.poll)
        if not isinstance(found, dict) or not {"id", "order"} <= found.keys():
            raise ValueError(f'{answer} must be {{"id": "{identity}", "order": [...]}}, and is {short(found)}.')
        if found["id"] != identity:
            raise ValueError(
                f"{answer} answers another question: its id is {found['id']!r}, and that of {question.name} is {identity!r}. Remove it and "
                "answer anew, or give this run a folder of its own."
            )
        return as_order(found["order"], len(outputs), top, str(answer))

    def _read(self, answer: Path) -> Any:
        """What the file says; None where it is not there, or still being written."""
        try:
            return json.loads(answer.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            say_once(f"answer.{answer}", f"{answer} is not JSON ({error}); waiting for it to become so.")
            return None


def as_order(order: Any, count: int, top: int, who: str) -> list[int]:
    """The order as a list of ints. ValueError unless it has all of range(count), or `top` of them, each once; `who` begins the message."""
    items = order.tolist() if hasattr(order, "tolist") else order
    allowed = f"all of 0 to {count - 1}" + ("" if top == count else f", or the best {top} of them")
    must = f"{who} must be an order of the {count} outputs: {allowed}, each once, the best first"
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence):
        raise ValueError(f"{must}. It is {type(order).__name__}: {short(order)}.")
    if not all(isinstance(item, Integral) and not isinstance(item, bool) and 0 <= int(item) < count for item in items):
        raise ValueError(f"{must}. It has something else: {short(order)}.")
    if len(items) not in (count, top) or len(set(items)) != len(items):
        raise ValueError(f"{must}. It is {short(order)}.")
    return [int(item) for item in items]


def checked_show(show: Any) -> Show | None:
    """TypeError for what can't be called."""
    if show is not None and not callable(show):
        raise TypeError(f"show={show!r} is not a callable (output) -> what is shown of it.")
    return show  # type: ignore[no-any-return]


def plain(value: Any) -> Any:
    """The same in what JSON knows; numbers that are not finite as text. TypeError for anything else."""
    if isinstance(value, Tensor) or (type(value).__module__ == "numpy" and hasattr(value, "tolist")):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} can't be written into a question: {short(value)}. Give show=function(output) -> text.")
