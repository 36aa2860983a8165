"""Checkpoint folders: one is whole or does not count, and the last whole one outlives its successor's making.

What is in them is `pact.recovery`'s and transformers'.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pact.files import replace_folder

MARK = "whole.json"  # the last file of a checkpoint: without it the checkpoint does not count
STATE = "trainer_state.json"


@dataclass(frozen=True)
class Mark:
    """What a whole checkpoint says of itself.

    Args:
        world_size, prompts, accumulation: processes, prompts an optimiser step over all of them, micro-batches a step.
        buffered: optimiser steps whose rollouts it holds.
        only_model: saved without optimiser (``save_only_model``).
        evaluate: the evaluation after this step is still to be made.
        size: bytes of its files.
    """

    world_size: int
    prompts: int
    accumulation: int
    buffered: int
    only_model: bool
    evaluate: bool
    size: int


def read_mark(checkpoint: Path) -> Mark | None:
    """The mark of ``checkpoint``; None when it is not whole."""
    path = checkpoint / MARK
    return Mark(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, whole or not, oldest step first."""
    named = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path).isdecimal()]
    return sorted(named, key=lambda path: int(_step(path)))


def _step(checkpoint: Path) -> str:
    return checkpoint.name.rpartition("-")[2]


def last_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``."""
    return next((path for path in reversed(checkpoints(folder)) if read_mark(path)), None)


def last_checkpoint(folder: Path, max_steps: int) -> tuple[Path | None, bool]:
    """The newest whole checkpoint in ``folder`` and whether it is the end of its training.

    ``max_steps`` <= 0: as the checkpoint says.
    """
    path = last_whole(folder)
    if path is None:
        return None, False
    record = json.loads((path / STATE).read_text(encoding="utf-8"))
    return path, record["global_step"] >= (max_steps if max_steps > 0 else record["max_steps"])


def remove(checkpoint: Path) -> None:
    """Delete ``checkpoint``, its mark first: half of one that is being deleted is not whole."""
    (checkpoint / MARK).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Keep ``limit`` (None or 0: all) of the checkpoints beside ``newest``, that one and ``best`` in any case."""
    if not limit or limit < 0:
        return
    there = checkpoints(newest.parent)
    kept = {newest, *([Path(best)] if best else [])}
    excess = len(there) - max(limit, len(kept))
    for path in [path for path in there if path not in kept][: max(excess, 0)]:
        remove(path)


def shortage(folder: Path, needed: int) -> str | None:
    """What to say where fewer than ``needed`` bytes are free in ``folder``; None where there is room."""
    free = shutil.disk_usage(folder).free
    return f"{gigabytes(needed)} are needed and {gigabytes(free)} are free" if free < needed else None


def gigabytes(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def save_whole(save: Callable[[str], None], folder: Path, main: bool, wait: Callable[[], None]) -> None:
    """``save`` a model so that ``folder`` holds all of it or what it held before. Every process must call it.

    Raises RuntimeError, naming the folder and the room there is, when it cannot be written.
    """
    part = folder.with_name(folder.name + ".part")
    if main:
        shutil.rmtree(part, ignore_errors=True)
    wait()
    try:
        save(str(part))
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        raise RuntimeError(
            f"{folder} could not be written ({error}), {gigabytes(shutil.disk_usage(folder.parent).free)} are free: "
            "make room and resume"
        ) from error
    wait()
    if main:
        replace_folder(folder, part)


def check_resumable(mark: Mark, now: Mark, checkpoint: Path) -> None:
    """Raises ValueError where a run laid out as ``now`` cannot continue what ``mark`` says."""
    if mark.only_model:
        raise ValueError(
            f"{checkpoint} was saved with save_only_model and has no optimiser state: begin a new run with "
            f"--model {checkpoint}"
        )
    layout = (mark.world_size, mark.accumulation, mark.prompts)
    if mark.buffered and layout != (now.world_size, now.accumulation, now.prompts):
        raise ValueError(
            f"{checkpoint} holds rollouts for {mark.buffered} steps of {mark.prompts} prompts on {mark.world_size} "
            f"processes with gradient_accumulation_steps {mark.accumulation}: resume with just these, or from a "
            "checkpoint between two batches of rollouts"
        )
    if mark.world_size != now.world_size and mark.prompts != now.prompts:
        raise ValueError(
            f"{checkpoint} is of a run with {mark.prompts} prompts a step ({mark.world_size} processes), this one has "
            f"{now.prompts} ({now.world_size} processes), so the order of the data would change: set "
            "per_device_train_batch_size and gradient_accumulation_steps so that the product with the processes is "
            f"{mark.prompts}"
        )
