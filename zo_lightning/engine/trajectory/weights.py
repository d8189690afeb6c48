"""Base weights as safetensors files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.shards import any_sharded, whole_of
from zo_lightning.engine.trajectory.atomic import replacing
from zo_lightning.engine.trajectory.fingerprint import trained_fingerprint
from zo_lightning.engine.trajectory.frames import LogError
from zo_lightning.engine.trajectory.records import Segment
from zo_lightning.engine.trajectory.targets import match


def save_base(path: str | os.PathLike[str], trained: Sequence[Trained], writing: bool = True) -> None:
    """Write the trained weights under their canonical names, tied ones once. OSError where they can't be written.

    Sharded ones are gathered by all ranks, of which one is `writing`.
    """
    tensors = {}
    for p in trained:
        tensor = whole_of(p)
        if writing:
            tensors[p.name] = tensor.cpu() if any_sharded([p]) else tensor
    if writing:
        save_tensors(path, tensors)


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as one safetensors file, which is there as a whole or not at all. OSError as of `replacing`."""
    with replacing(path) as temporary:
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:  # how it reports a full disk
            raise _system_error(error) from error


def _system_error(error: SafetensorError) -> OSError:
    """What the system said, which safetensors has as text: "... (os error 28)"; numbers of Windows are others than errno's."""
    number = re.search(r"\(os error (\d+)\)", str(error)) if os.name != "nt" else None
    return OSError(str(error)) if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def load_base(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", advice: str = "Give the weights as safetensors."
) -> dict[str, Tensor]:
    """The tensors of a safetensors file. LogError where it is damaged or something else, OSError where it can't be read."""
    try:
        with Path(path).open("rb"):
            return load_file(path, device=str(device))  # views of a private map: writing to them leaves the file alone
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise LogError(f"{path} is not a safetensors file that can be read: {error}. {advice}") from error


def base_of(segment: Segment, folder: Path) -> list[Trained] | None:
    """The weights that a segment begins with; None where their file is not there, or has others. LogError as of `load_base`."""
    path = None if segment.base is None else folder / segment.base
    if path is None or not path.is_file():
        return None
    loaded = match(load_base(path), segment)
    return loaded if trained_fingerprint(loaded) == segment.fingerprint else None
