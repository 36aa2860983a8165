"""The ahead-of-time report, in a process of its own: interpreted kernels cannot be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MATMUL_KERNELS = ("head_forward_kernel", "head_dlogits_kernel")


@pytest.fixture(scope="module")
def report() -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pact_kernels.aot", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


def test_everything_compiles_for_every_target(report: list[dict]) -> None:
    assert {line["target"] for line in report} == set(SHARED_LIMIT)
    assert {line["kernel"] for line in report} == {*MATMUL_KERNELS, "head_combine_kernel", "gather_sum_kernel"}
    assert [line for line in report if not line["ok"]] == []
    keys = {"kernel", "config", "target", "ok", "registers", "spills", "shared_bytes", "wgmma"}
    assert all(set(line) == keys for line in report)


def test_shared_memory_fits_each_chip(report: list[dict]) -> None:
    assert [line for line in report if line["shared_bytes"] > SHARED_LIMIT[line["target"]]] == []


def test_nothing_spills_on_hopper_and_its_matmuls_are_wgmma(report: list[dict]) -> None:
    hopper = [line for line in report if line["target"] == "sm_90"]
    assert [line for line in hopper if line["spills"] != 0] == []
    half = [line for line in hopper if line["kernel"] in MATMUL_KERNELS and not line["config"].startswith("fp32")]
    assert len(half) == 8
    assert all(line["wgmma"] for line in half)
