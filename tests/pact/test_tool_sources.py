"""Every tool source of the FTRL and ToolHop extracts runs in the sandbox and defines its function; none is called."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet
import pytest

from pact.sandbox import Sandbox

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

# Called in the place of the tool, so that the source runs just as it would before a call of its own.
DEFINED = "\n\ndef is_defined(name):\n    return callable(globals().get(name))\n"


def ftrl_sources() -> list[tuple[str, str]]:
    rows = pyarrow.parquet.read_table(DATA / "ftrl_120.parquet", columns=["codes"]).to_pylist()
    return [pair for row in rows for pair in json.loads(row["codes"]).items()]


def toolhop_sources() -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (DATA / "toolhop_70.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = []
    for row in rows:
        names = {tool["name"] for tool in row["tools"].values()}
        # Sources are in hop order, schemas are not: a source belongs to the name it defines.
        pairs += [(next(name for name in names if f"def {name}(" in source), source) for source in row["functions"]]
    return pairs


@pytest.mark.skipif(not DATA.is_dir(), reason="the data extracts are not here: put them at ../shared/data")
@pytest.mark.parametrize(("read", "count"), [(ftrl_sources, 1089), (toolhop_sources, 320)])
def test_every_source_defines_its_function(read, count):
    pairs = read()
    assert len(pairs) == count
    with Sandbox(workers=2) as sandbox, ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda pair: sandbox.call(pair[1] + DEFINED, "is_defined", {"name": pair[0]}), pairs))
    assert [(name, r.output) for (name, _), r in zip(pairs, results) if r.output != "True"] == []
