"""Every file of examples/ runs as a reader would run it, in a folder of its own, and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# What each prints, line by line in this order, other lines between them. "own_environment.py" is an argument of
# `pact train`, which tests/pact/test_own_environment.py runs; as a script it defines things and prints nothing.
PRINTS = {
    "one_pass_objective.py": [
        r"largest difference from the padded passes' gradient: \d\.\de-\d\d, of \d\.\de-\d\d",
        *(rf"step {step}: loss [+-]\d+\.\d+, \d+ tokens computed in place of \d+, branches .*" for step in range(4)),
    ],
    "own_environment.py": [],
    "plain_padded_loop.py": [
        r"largest difference from the naive gradient: \d\.\de-\d\d, of \d\.\de-\d\d",
        *(rf"step {step}: reward \d\.\d+, loss [+-]\d+\.\d+" for step in range(8)),
    ],
    "trl_grpo.py": [r'\{"reward": \d.*"loss/sft": \d.*"anchor/prompt_share": \d.*\}'] * 3,
    "verl_policy_loss.py": [
        r"registered as vanilla: -?\d\.\d+, clipped \d\.\d+",
        r"registered as pact: -?\d\.\d+, clipped \d\.\d+",
        r"prompt \[1, 2, .*",
        r"RL term -?\d\.\d+, supervised term -?\d\.\d+",
    ],
}


@cache
def output(name: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / name)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not os.listdir(folder)  # nothing is left behind
    return done.stdout


def test_every_example_has_its_entry():
    assert sorted(PRINTS) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(PRINTS))
def test_it_runs(name):
    if name == "verl_policy_loss.py":
        pytest.importorskip("verl", reason="verl needs an environment of its own: `make verl` runs this example there")
    lines = iter(output(name).splitlines())
    for pattern in PRINTS[name]:  # each is looked for after the one before
        assert any(re.fullmatch(pattern, line) for line in lines), pattern


@pytest.mark.parametrize("name", ["one_pass_objective.py", "plain_padded_loop.py"])
def test_the_two_ways_of_an_example_agree(name):
    """Float32: the difference lies far below the gradient, which is not 0."""
    difference, largest = map(float, re.search(r"difference .*: (\S+), of (\S+)", output(name)).groups())
    assert difference < 1e-5 * largest
    assert largest > 1e-3


def test_the_policy_of_the_padded_loop_learns():
    rewards = [float(found) for found in re.findall(r"reward (\S+),", output("plain_padded_loop.py"))]
    assert rewards[-1] > rewards[0] + 0.1
