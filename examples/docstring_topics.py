"""The demo's data: real text that every Python carries, the docstrings of its standard library, labelled by topic."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

TOPICS: dict[str, tuple[str, ...]] = {
    "networking": tuple(
        "http.client http.server urllib.request urllib.parse socket ssl smtplib ftplib email.message xmlrpc.client ipaddress imaplib "
        "socketserver http.cookiejar".split()
    ),
    "concurrency": tuple(
        "threading multiprocessing.pool asyncio.events asyncio.tasks asyncio.streams concurrent.futures.thread concurrent.futures.process "
        "queue subprocess sched asyncio.locks asyncio.base_events".split()
    ),
    "files and folders": tuple("os os.path shutil pathlib tempfile glob fnmatch zipfile tarfile io fileinput filecmp".split()),
    "mathematics": tuple("math cmath statistics random fractions decimal numbers operator heapq bisect".split()),
    "text": tuple(
        "string textwrap difflib html html.parser re unicodedata json csv gettext xml.etree.ElementTree xml.dom.minidom codecs "
        "locale".split()
    ),
    "dates and times": tuple("datetime calendar time zoneinfo".split()),
    "python code": tuple(
        "ast inspect dis tokenize types importlib pkgutil typing dataclasses abc functools symtable code traceback pdb unittest.case "
        "unittest.mock doctest trace".split()
    ),
}
"""Topic -> the modules whose docstrings it is made of. The name is all that the untrained classifier knows of a topic."""

MIN_CHARACTERS = 30
TRAIN_SHARE = 0.7


@dataclass(frozen=True)
class Example:
    """The first paragraph of one docstring, and the index of its topic."""

    text: str
    label: int


def collect() -> list[Example]:
    """Every different docstring of one topic, the same on every run of the same Python.

    A new interpreter reads them: in this one, libraries may have put functions of their own into the standard library's modules.
    """
    command = [sys.executable, "-I", "-S", __file__]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout)
    return [Example(text, label) for text, label in rows]


def read() -> list[Example]:
    """The same in this interpreter, in the order of a hash of the text.

    A text that stands in modules of two topics is left out: it has no one label, and could be trained on and held out at once.
    """
    labels: dict[str, set[int]] = {}
    for label, modules in enumerate(TOPICS.values()):
        for name in modules:
            for text in docstrings(name):
                labels.setdefault(text, set()).add(label)
    found = [Example(text, next(iter(topics))) for text, topics in labels.items() if len(topics) == 1]
    return sorted(found, key=lambda example: hashlib.sha256(example.text.encode()).digest())


def split(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Those to train on, and those held out."""
    border = round(TRAIN_SHARE * len(examples))
    return examples[:border], examples[border:]


def docstrings(module_name: str) -> list[str]:
    """First paragraphs of what a module defines, each on one line; none for a module that this Python was built without."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # some modules warn when one looks at what they will lose
        return list(_first_paragraphs(module))


def _first_paragraphs(module: ModuleType) -> Iterator[str]:
    package = module.__name__.partition(".")[0]
    for item in _documented(module):
        if not str(getattr(item, "__module__", None) or module.__name__).startswith(package):
            continue  # imported from elsewhere
        paragraph = (inspect.getdoc(item) or "").partition("\n\n")[0]
        text = " ".join(paragraph.split())
        if len(text) >= MIN_CHARACTERS:
            yield text


def _documented(module: ModuleType) -> Iterator[object]:
    for item in list(vars(module).values()):
        if inspect.isclass(item):
            yield item
            yield from (member for member in vars(item).values() if inspect.isroutine(member))
        elif inspect.isroutine(item):
            yield item


if __name__ == "__main__":
    print(json.dumps([(example.text, example.label) for example in read()]))
