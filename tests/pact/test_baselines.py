"""Every shipped recipe parses, and each baseline trains two tiny steps on the toybox with the loss terms of its method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from trainer_setup import MODEL

from pact import cli, train
from pact.arguments import parse_settings
from pact.objective import PactConfig

CONFIGS = Path(__file__).parents[2] / "configs"
BASELINES = sorted((CONFIGS / "baselines").glob("*.yaml"))

# What makes two steps of the recipes for 8 accelerators run in a second; nothing of a method.
SMALL = {
    "env": "toybox",
    "env_options": {"train": 8, "hops": [1, 1], "sources": 2, "distractors": 0},
    "model": "toybox",
    "model_config": MODEL,
    "dtype": "float32",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "rollout_batch_steps": 1,
    "max_turns": 2,
    "max_turn_tokens": 8,
    "max_response_tokens": 200,
    "context_length": 2048,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "learning_rate": 0.01,
}


def steps_of(path, monkeypatch, tmp_path, **overrides):
    """The metrics of the training steps (and of the warm start) of a recipe made small."""
    values = SMALL | overrides
    if parse_settings([], path).training.num_rollouts:
        values["num_rollouts"] = 2
    if parse_settings([], path).training.warm_start_steps:
        values |= {"warm_start_steps": 1, "warm_start_batch_size": 2}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)
    monkeypatch.setattr("pact.reporting.draw_curves", lambda *_: None)
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump({"extends": str(path), **values}))
    assert cli.main(["train", str(small), "--run_name", "small"]) == 0
    lines = [json.loads(line) for line in Path("runs/small/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_baseline(path, monkeypatch, tmp_path):
    steps = steps_of(path, monkeypatch, tmp_path)
    print(json.dumps(steps, indent=1))
