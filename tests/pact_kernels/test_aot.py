"""The ahead-of-time report, in a process of its own: interpreted kernels cannot be compiled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pact_kernels

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
HEAD_MATMULS = ("head_forward_kernel", "head_dlogits_kernel")
TREE_MATMULS = ("tree_forward_kernel", "tree_dq_kernel", "tree_dkv_kernel")


def every_kernel() -> set[str]:
    """Names of all kernels in the package, found in its files: a new one must be in the report."""
    files = Path(pact_kernels.__file__).parent.glob("*/triton.py")
    return {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}


@pytest.fixture(scope="module")
def report() -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pact_kernels.aot", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


def test_everything_compiles_for_every_target(report: list[dict]) -> None:
    assert {line["target"] for line in report} == set(SHARED_LIMIT)
    assert {line["kernel"] for line in report} == every_kernel()
    assert [line for line in report if not line["ok"]] == []
    keys = {"kernel", "config", "target", "ok", "registers", "spills", "shared_bytes", "wgmma"}
    assert all(set(line) == keys for line in report)


def test_shared_memory_fits_each_chip(report: list[dict]) -> None:
    assert [line for line in report if line["shared_bytes"] > SHARED_LIMIT[line["target"]]] == []


def test_nothing_spills_on_hopper_and_its_matmuls_are_wgmma(report: list[dict]) -> None:
    hopper = [line for line in report if line["target"] == "sm_90"]
    assert [line for line in hopper if line["spills"] != 0] == []
    half = [line for line in hopper if not line["config"].startswith("fp32")]
    head = [line for line in half if line["kernel"] in HEAD_MATMULS]
    assert len(head) == 26  # bf16 and fp16: forward and backward with 5 sets of options, 3 of them that keep
    assert all(line["wgmma"] for line in head)
    tree = [line for line in half if line["kernel"] in TREE_MATMULS]
    assert len(tree) == 2 * 3 * 4  # head dims 64, 96, 128, 256
    # With 256 channels the sums of dK and dV leave room for 32 keys, too few for wgmma.
    without = {(line["kernel"], line["config"].split("_")[1]) for line in tree if not line["wgmma"]}
    assert without == {("tree_dkv_kernel", "d256")}
