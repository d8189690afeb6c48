"""Files that exist as a whole or not at all: written under another name in the same folder, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def same_file(left: str | os.PathLike[str], right: str | os.PathLike[str]) -> bool:
    """Whether both paths lead to one file that exists."""
    return os.path.exists(left) and os.path.exists(right) and os.path.samefile(left, right)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of an empty file to write to; it takes the place of `path` in the end, and is removed where anything fails.

    Raises OSError that names `path` where the folder can't be written or the disk is full.
    """
    target = Path(path)
    temporary = temporary_name(target)
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors puts another file there, which nobody else may read
        flush(temporary)
        os.replace(temporary, target)
        flush_folder(target.parent)
    except OSError as error:
        _remove(temporary)
        raise explained(error, f"{target} was not written", target) from error
    except BaseException:
        _remove(temporary)
        raise


def temporary_name(target: Path) -> Path:
    """A name beside `target` that no other process takes."""
    return target.with_name(f".{target.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file. Raises OSError that names it; what was there before is then untouched."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def flush(path: Path) -> None:
    """Wait until the contents of a file are on the disk."""
    number = os.open(path, os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems refuse; the rename itself has succeeded
            os.fsync(number)
    finally:
        os.close(number)


def explained(error: OSError, what: str, path: str | os.PathLike[str]) -> OSError:
    """The same kind of error, with a message that says what did not happen (`what` names the file), why, and what to do."""
    advice = "Make room, or choose a folder that can be written, and try again"
    if not error.errno:
        return OSError(f"{what}: {error}. {advice}")
    return OSError(error.errno, f"{what}: {os.strerror(error.errno)}. {advice}", str(path))


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
