"""Which checkpoint resume_from_checkpoint=True means: the newest complete one."""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zo_lightning.engine.messages import say_once


def is_complete(folder: Path) -> bool:
    """Whether the trainer finished writing `folder`: it writes ``trainer_state.json`` after everything else."""
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or cut off while it was written
        return False
    return isinstance(state, dict) and "global_step" in state


def newest_complete(output_dir: str) -> str | None:
    """The complete ``checkpoint-N`` of the highest N; None when there is no checkpoint folder at all.

    The host takes the highest N, complete or not. A newer incomplete folder (the process was killed while saving) is
    passed over, and this is said once. Raises ``ValueError`` when none is complete.
    """
    pattern = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
    root = Path(output_dir)
    numbered = [
        (int(match.group(1)), folder)
        for folder in (root.iterdir() if root.is_dir() else ())
        if folder.is_dir() and (match := pattern.match(folder.name))
    ]
    folders = [folder for _, folder in sorted(numbered, reverse=True)]
    complete = next((folder for folder in folders if is_complete(folder)), None)
    if folders and complete is None:
        names = ", ".join(folder.name for folder in folders)
        raise ValueError(
            f"resume_from_checkpoint=True: no checkpoint in {output_dir} is complete ({names} without a readable "
            f"{TRAINER_STATE_NAME}). Start without it, or give the path of another checkpoint."
        )
    if complete is not None and complete != folders[0]:
        say_once(
            f"hf.resume.{folders[0]}",
            f"resume_from_checkpoint=True: {folders[0].name} is incomplete (no readable {TRAINER_STATE_NAME}), "
            f"resuming from {complete.name}.",
        )
    return None if complete is None else str(complete)
