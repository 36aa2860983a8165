"""BFCL results in the released layout, for ``bfcl evaluate`` of the official package. It scores nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def export_results(pairs: Iterable[tuple[str, Any]], folder: Path, model_name: str) -> list[Path]:
    """Write ``FOLDER/result/MODEL/GROUP/BFCL_v4_CATEGORY_result.json``, one object ``{"id", "result"}`` a line.

    Steps are text with ``<tool_call>`` blocks, as the released Qwen function-calling handlers write and read them.

    Args:
        pairs: released id and ``Score.artifact`` of each episode, in any order.
        folder: what ``BFCL_PROJECT_ROOT`` is for ``bfcl evaluate``.
        model_name: the name ``bfcl evaluate --model`` will be given; its ``/`` becomes ``_``, as there.

    Returns:
        The files written; files of the same names are replaced.

    Raises:
        ValueError: an episode without an artifact of the environment bfcl.
    """
    files: dict[Path, list[tuple[int, dict[str, Any]]]] = {}
    root = folder / "result" / model_name.replace("/", "_")
    for name, artifact in pairs:
        if not isinstance(artifact, dict) or "result" not in artifact:
            raise ValueError(f"episode {name} holds no BFCL result: export evaluations of --env bfcl")
        category, _, index = name.rpartition("_")
        path = root / _group(category) / f"BFCL_v4_{category}_result.json"
        files.setdefault(path, []).append((int(index.partition("-")[0]), {"id": name, "result": artifact["result"]}))
    for path, entries in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(entry) + "\n" for _, entry in sorted(entries, key=lambda entry: entry[0])]
        path.write_text("".join(lines), encoding="utf-8")
    return list(files)


def _group(category: str) -> Path:
    if category.startswith("memory_"):
        return Path("agentic", "memory", category.removeprefix("memory_").removesuffix("_prereq"))
    return Path("multi_turn")
