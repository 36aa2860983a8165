"""Files that are there whole or not at all, whenever the process is killed. It knows nothing of runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Put ``text`` under ``path`` in one step: written beside it, flushed to the disk, then renamed."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """``write`` a file beside ``path``, then put it there in one step."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def replace_folder(path: Path, part: Path) -> None:
    """Put the finished folder ``part`` at ``path``, in place of what is there."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Wait until every file in ``folder`` is on the disk; a write that the disk refused is an OSError here."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def folder_bytes(folder: Path) -> int:
    """Size of the files in ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
