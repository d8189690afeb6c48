"""A model's own safetensors files as its weights: opened without being read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Source(NamedTuple):
    """Where the bytes of a tensor are, as long as it lies at `address`."""

    path: str
    offset: int
    address: int


def source_of(tensor: Tensor) -> Source | None:
    """The file of a tensor that `open_weights` gave and nobody has written to or replaced since."""
    found: Source | None = getattr(tensor, "_zo_source", None)
    return found if found is not None and found.address == tensor.data_ptr() and tensor._version == 0 else None


def open_weights(model: nn.Module, files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> None:
    """Give a model that was built on the meta device its weights, from safetensors files that stay on disk.

    `files` is a file, several, or a folder with *.safetensors; names are those of `model.state_dict()`. Parameters become memory maps of
    the files, private ones: the files are never written. Nothing is read until somebody uses a weight; with `weights=Offload()` that is a
    block at a time. Tied weights are tied as the model says (`tie_weights`). What is written to such weights before the first step must
    be written to the parameter (under no_grad), not to its `.data`, where it is not seen.

    Raises ValueError where names, shapes or dtypes do not fit, or where a buffer is on the meta device (build the model with
    `accelerate.init_empty_weights()`, which leaves buffers where they are); OSError where a file can't be read.
    """
    entries = {name: entry for path in _paths(files) for name, entry in _entries(path).items()}
    meta = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if meta:
        raise ValueError(
            f"The buffer {meta[0]!r} is on the meta device, and no file has it. Build the model under accelerate.init_empty_weights(), "
            "which leaves buffers where they are."
        )
    for owner_name, owner in model.named_modules():
        for name, parameter in list(owner._parameters.items()):
            full = f"{owner_name}.{name}" if owner_name else name
            if parameter is not None and full in entries:
                owner._parameters[name] = _opened(full, parameter, entries.pop(full))
    if entries:
        raise ValueError(f"The files have {next(iter(entries))!r}, which the model has not; {len(entries)} names do not fit.")
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"The files do not have {missing[0]!r}; {len(missing)} weights are missing.")


def _paths(files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    if not isinstance(files, (str, os.PathLike)):
        return [Path(file) for file in files]
    path = Path(files)
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not found:
        raise ValueError(f"There is no *.safetensors file in {path}.")
    return found


def _entries(path: Path) -> dict[str, tuple[Path, int, Mapping[str, Any]]]:
    """By name: the file, the place of the first byte, the header's entry."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            raise ValueError(f"{path} is not a safetensors file.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}.") from error
    header.pop("__metadata__", None)
    return {name: (path, 8 + length, entry) for name, entry in header.items()}


def _opened(name: str, parameter: Tensor, entry: tuple[Path, int, Mapping[str, Any]]) -> nn.Parameter:
    path, data, described = entry
    dtype, shape = _DTYPES.get(described["dtype"]), tuple(described["shape"])
    begin, end = described["data_offsets"]
    if dtype != parameter.dtype or shape != tuple(parameter.shape):
        raise ValueError(
            f"{path} has {name!r} as {described['dtype']} of shape {shape}; the model has {parameter.dtype} of {tuple(parameter.shape)}."
        )
    if data + end > path.stat().st_size:
        raise ValueError(f"{path} is cut off: it ends before {name!r} does.")
    whole = torch.from_file(str(path), shared=False, size=data + end, dtype=torch.uint8)
    bytes_ = whole[data + begin :]
    if bytes_.data_ptr() % dtype.itemsize:
        raise ValueError(f"{path}: {name!r} does not begin at a multiple of {dtype.itemsize} bytes. Save the file anew with safetensors.")
    opened = nn.Parameter(bytes_.view(dtype).view(shape), requires_grad=parameter.requires_grad)
    opened._zo_source = Source(str(path), data + begin, opened.data_ptr())  # type: ignore[attr-defined]
    return opened
