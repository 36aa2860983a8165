"""What the environments over files of items share: reading their rows and running their tools' Python sources.

It knows no benchmark: which columns there must be and what they mean is each environment's own.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pact.envs.base import Task, ToolSchema
from pact.sandbox import Sandbox, ToolResult

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".json")


def default_workers() -> int:
    """Tool calls that may run at once where the user names no number: one a core, at most 8."""
    return min(os.cpu_count() or 1, 8)


def read_rows(source: str | Path, env: str, required: Collection[str], json_columns: Collection[str]) -> list[Row]:
    """The rows of ``source`` in order; those of a dataset have ``split``, its name, unless they have such a column.

    Args:
        source: a .parquet, .jsonl or .json file (the last: one list of objects), a folder ``datasets.load_dataset`` can
            read, or the id of a dataset on the hub, OWNER/NAME. Folders and ids need the package ``datasets``.
        env: name of the environment, for messages.
        required: columns without which no row can be used.
        json_columns: those that hold nested values. A Parquet or Arrow struct gives every object the keys of all
            others, as nulls, so these must be JSON (text) there.

    Raises:
        ValueError: nothing there, nothing readable or no rows; one line that says what to do.
    """
    if not source:
        raise ValueError(f"{env} needs its data: a .parquet, .jsonl or .json file, or a dataset's folder or hub id")
    path = Path(source)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{env}: {path} is none of {', '.join(SUFFIXES)}; convert it to one of them")
        if path.suffix == ".parquet":
            rows = _read_parquet(path, env, required, json_columns)
        else:
            rows = [row for _, row in read_jsonl(path)] if path.suffix == ".jsonl" else _read_json(path, env)
    elif path.is_dir() or _is_hub_id(source):
        rows = _read_dataset(str(source), env, required, json_columns)
    else:
        raise ValueError(f"{env}: there is no file {path}; give a .parquet, .jsonl or .json file of {env} items")
    if not rows:
        raise ValueError(f"{env}: {path} holds no rows")
    return rows


def json_value(place: str, row: Row, column: str) -> Any:
    """The value of ``column``, parsed where it is JSON text. Raises ValueError that begins with ``place``."""
    value = row[column]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: {column} is not valid JSON ({error})") from None


def run_source(
    sandbox: Sandbox, codes: Mapping[str, str], name: str, arguments: dict[str, Any], timeout: float
) -> ToolResult:
    """Call the tool ``name``, whose Python source is ``codes[name]``. An unknown name is a failed result, in FTRL's
    wording; so is whatever else goes wrong."""
    if name not in codes:
        reason = f"there is no tool of this name; the tools are {', '.join(codes) or 'none'}"
        return ToolResult(False, f"an error occured when call {name}: {reason}", reason)
    return sandbox.call(codes[name], name, arguments, timeout)


class SourceEpisode:
    """What the episodes of FTRL and ToolHop share: one user message, and calls that are independent of each other."""

    def __init__(self, task: Task, execute: Callable[[str, dict[str, Any]], str]) -> None:
        self._task, self._execute = task, execute

    @property
    def tools(self) -> list[ToolSchema]:
        return self._task.tools

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Run the tool; any failure, an unknown name included, is a text `an error occured when call NAME: REASON`."""
        return self._execute(name, arguments)

    def user_turn(self) -> None:
        """There is one user message: the episode ends with the assistant's answer."""
        return None

    def close(self) -> None:
        """Nothing to release: the sandbox belongs to the environment."""


def read_jsonl(path: Path) -> list[tuple[int, Row]]:
    """(line number, object) of every line that is not blank. Raises ValueError that names the line."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give a JSONL file, one JSON object a line")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{path}, line {number}"
        if line.startswith(codecs.BOM_UTF8):
            raise ValueError(f"{where}: it begins with a byte order mark; save the file as UTF-8 without BOM")
        try:
            text = line.decode("utf-8")
            if not text.strip():
                continue
            row = json.loads(text, parse_constant=_no_constant)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:  # ValueError: an integer of thousands of digits, too
            raise ValueError(f"{where}: it is not valid JSON ({error}); write one JSON object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: it is {type(row).__name__}; write one JSON object a line")
        rows.append((number, row))
    return rows


def _no_constant(text: str) -> None:
    raise json.JSONDecodeError(f"{text} is no JSON number", text, 0)


def _read_json(path: Path, env: str) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{env}: {path} is not valid JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{env}: {path} is not one list of JSON objects")
    return rows


def _read_parquet(path: Path, env: str, required: Collection[str], json_columns: Collection[str]) -> list[Row]:
    import pyarrow  # here, so that JSON works without it
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{env}: {path} is not a readable Parquet file ({str(error).splitlines()[0]})") from None
    _check_columns(str(path), env, table.column_names, required)
    for column in set(json_columns) & set(table.column_names):
        kind = table.schema.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"{env}: {path}, column {column} has type {kind}; store it as JSON text")
    return table.to_pylist()


def _read_dataset(source: str, env: str, required: Collection[str], json_columns: Collection[str]) -> list[Row]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(
            f"{env}: {source} is no file, and reading a dataset needs the package datasets: "
            "pip install 'pact-kernels[hub]', or give a file"
        ) from None
    try:
        splits = datasets.load_dataset(source)
    except Exception as error:  # whatever datasets, pyarrow and the network raise: the mend is the same
        cause = error.__cause__ or error  # datasets wraps what went wrong in a sentence that does not say it
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise ValueError(
            f"{env}: cannot load the dataset {source} ({reason}); check name and network, or download its file "
            "and give that"
        ) from error
    rows = []
    for name, split in splits.items():
        _check_columns(f"{source}, split {name}", env, split.column_names, required)
        for column in set(json_columns) & set(split.column_names):
            if _holds_struct(split.features[column]):
                raise ValueError(
                    f"{env}: {source}, column {column} was read as a struct, which mixes the keys of all rows; "
                    "update the package datasets, or download the dataset's file and give that"
                )
        rows += [{"split": str(name)} | row for row in split]
    return rows


def _holds_struct(feature: Any) -> bool:
    return isinstance(feature, dict) or (hasattr(feature, "feature") and _holds_struct(feature.feature))


def _check_columns(place: str, env: str, columns: Collection[str], required: Collection[str]) -> None:
    missing = [column for column in required if column not in columns]
    if missing:
        raise ValueError(f"{env}: {place} has no column {', '.join(missing)}; it has {', '.join(columns)}")


def _is_hub_id(source: str | Path) -> bool:
    """OWNER/NAME, as opposed to a mistyped path."""
    text = str(source)
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and Path(text).suffix not in SUFFIXES
