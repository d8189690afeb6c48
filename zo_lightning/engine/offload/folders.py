"""The folder of a tier: what it says about its parcels, and what an earlier run has left in it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zo_lightning.engine.offload.parcels import Parcel
from zo_lightning.engine.offload.stamps import VERSION

NAME = "tier.json"


def described(parcels: Sequence[Parcel]) -> dict[str, Any]:
    """Names, dtypes, shapes and places of all tensors."""
    entries = [
        {
            "name": parcel.name,
            "bytes": parcel.nbytes,
            "tensors": [
                {"name": p.name, "dtype": str(p.tensor.dtype)[6:], "shape": list(p.tensor.shape), "offset": offset}
                for p, offset in zip(parcel.tensors, parcel.offsets, strict=True)
            ],
        }
        for parcel in parcels
    ]
    return {"version": VERSION, "parcels": entries}


def describe(folder: Path, parcels: Sequence[Parcel]) -> None:
    """Say whose files these are; the description comes after the files, and is there as a whole or not at all."""
    temporary = folder / f".{NAME}.tmp"
    with temporary.open("w") as file:
        json.dump(described(parcels), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / NAME)


def describes(folder: Path, parcels: Sequence[Parcel]) -> bool:
    """Whether an earlier run of the same model has left its files there. ValueError where it was another model."""
    if not (folder / NAME).exists():
        return False
    try:
        problem = _differs(json.loads((folder / NAME).read_text()), described(parcels))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / NAME} is damaged: it does not describe weights. {_ADVICE}") from None
    if problem:
        raise ValueError(f"{folder} has the weights of another run: {problem}. {_ADVICE}")
    return True


def clear(folder: Path) -> None:
    """Remove what an earlier run has left; the description goes first."""
    (folder / NAME).unlink(missing_ok=True)
    for path in folder.glob("slot-*.bin"):
        path.unlink()


_ADVICE = "Give this run another folder, or remove that one if nothing in it is needed."


def _differs(there: Any, here: dict[str, Any]) -> str:
    if not isinstance(there, dict) or there.get("version") != VERSION:
        version = there.get("version") if isinstance(there, dict) else None
        return f"its files are of version {version!r}, and this release reads {VERSION}"
    tensors = [{t["name"]: t for parcel in one.get("parcels", ()) for t in parcel["tensors"]} for one in (there, here)]
    for name in dict.fromkeys([*tensors[1], *tensors[0]]):
        was, now = (_shown(table.get(name)) for table in tensors)
        if was != now:
            return f"{name!r} is {was} there and {now} here"
    return "" if there == here else "its tensors are stored together in another way (others were trained)"


def _shown(tensor: dict[str, Any] | None) -> str:
    return "missing" if tensor is None else f"{tensor['dtype']} of shape {tuple(tensor['shape'])}"
