"""Every baseline parses and trains two tiny steps on the toybox, with the loss terms that it stands for."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import yaml
from trainer_setup import MODEL

from pact import cli
from pact.arguments import parse_settings
from pact.envs import make
from pact.rollout import Completion
from pact.trace import render_prompt

CONFIGS = Path(__file__).parents[2] / "configs"
BASELINES = CONFIGS / "baselines"
TOYBOX = {"train": 8, "hops": [1, 1], "sources": 2, "distractors": 0, "recovery_share": 0.0}

# What makes two steps of a recipe for 8 accelerators run in a second; nothing of a method.
SMALL = {
    "env": "toybox",
    "env_options": TOYBOX,
    "model": "toybox",
    "model_config": MODEL,
    "dtype": "float32",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "rollout_batch_steps": 1,
    "context_length": 2048,
    "max_turn_tokens": 256,
    "gradient_checkpointing": False,
    "answer_tags": False,
    "learning_rate": 0.01,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


class Imitator:
    """An engine that repeats the expert's turns in every other episode and gives up at once in the rest."""

    context_length = None

    def __init__(self, model, max_batch):
        env = make("toybox", **TOYBOX)
        self.max_batch, self.tokenizer = max_batch, env.tokenizer()
        self.turns = {
            tuple(chain(*render_prompt(task.messages, task.tools, self.tokenizer))): [
                self._text(message) for message in task.expert if message["role"] == "assistant"
            ]
            for task in env.tasks("train")
        }

    @staticmethod
    def _text(message):
        calls = [f"<tool_call>{json.dumps(call['function'])}</tool_call>" for call in message.get("tool_calls", ())]
        return f"<think>{message['reasoning_content']}</think>{message['content']}{''.join(calls)}"

    def open(self, prompts, *, stop_id, sampling, seeds):
        scripts = [
            iter(self.turns[tuple(prompt)] if row % 2 else ["<think>I give up.</think>nothing"])
            for row, prompt in enumerate(prompts)
        ]
        return ImitatorSession(self.tokenizer, scripts, stop_id)


class ImitatorSession:
    def __init__(self, tokenizer, scripts, stop_id):
        self.tokenizer, self.scripts, self.stop_id = tokenizer, scripts, stop_id

    def generate(self, append, max_new_tokens):
        done = {}
        for row in max_new_tokens:
            ids = [*self.tokenizer(next(self.scripts[row]), add_special_tokens=False).input_ids, self.stop_id]
            done[row] = Completion(ids, [-1.0] * len(ids), True)
        return done

    def close(self):
        pass


def run_small(name, monkeypatch, tmp_path):
    """Log lines of the optimiser steps of a baseline made small."""
    recipe = parse_settings([], BASELINES / f"{name}.yaml").training
    values = dict(SMALL)
    if recipe.num_rollouts:
        values["num_rollouts"] = 2
    if recipe.warm_start_steps:
        values |= {"warm_start_steps": 1, "warm_start_batch_size": 2}
    monkeypatch.chdir(tmp_path)
    for module in ("train", "reporting"):
        monkeypatch.setattr(f"pact.{module}.draw_curves", lambda *_: None)
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump({"extends": str(BASELINES / f"{name}.yaml"), **values}))
    assert cli.main(["train", str(small), "--run_name", "small"]) == 0
    lines = [json.loads(line) for line in Path("runs/small/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def terms(line):
    """Which of the terms a step trained on: (rollouts from the prompt, rollouts beside the trace, traces)."""
    supervised = sum(line[f"tokens/sft_{part}"] for part in ("reasoning", "tool_call", "answer"))
    return line["tokens/rl_prompt"] > 0, line["tokens/rl_trace"] > 0, supervised > 0


REINFORCED, SUPERVISED, MIXED = (True, False, False), (False, False, True), (True, False, True)

# Baseline -> terms of its loss, mean reward (the expert's episode and the one that gives up, one each), weight of L_RL.
# MatchTIR: one call matched (1) and the answer right (1), against 0. ToolRL: 3 + 1 against -3 + 1.
EXPECTED = {
    "sft": (SUPERVISED, None, 1.0),
    "grpo": (REINFORCED, 0.5, 1.0),
    "ftrl": (REINFORCED, 0.5, 1.0),
    "toolrl": (REINFORCED, 1.0, 1.0),
    "matchtir": (REINFORCED, 1.0, 1.0),
    "matchtir_ot": (REINFORCED, 1.0, 1.0),
    "sft_then_rl": (REINFORCED, 1.0, 1.0),
    "chord_mu": (MIXED, 0.5, 0.1),
    "chord_phi": (MIXED, 0.5, 0.9),
}


def test_every_baseline_is_tried():
    assert {path.stem for path in BASELINES.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_two_steps(name, monkeypatch, tmp_path):
    monkeypatch.setattr("pact.trainer.TransformersEngine", Imitator)
    if name == "sft":
        monkeypatch.setattr("pact.trainer.run_rollouts", None)  # SFT that samples would call it
    lines = run_small(name, monkeypatch, tmp_path)
    steps = [line for line in lines if line["phase"] == "train"]
    warm = [line for line in lines if line["phase"] == "warm_start"]
    expected, reward, rl_weight = EXPECTED[name]
    assert [line["step"] for line in steps] == [1, 2]
    assert [terms(line) for line in steps] == [expected] * 2
    assert [terms(line) for line in warm] == [SUPERVISED] * (name == "sft_then_rl")
    assert steps[0]["weight/rl"] == pytest.approx(rl_weight)
    assert (steps[0]["loss/sft"] > 0) == expected[2]
    assert all(line["grad_norm"] > 0 for line in steps)
    if reward is None:
        assert "reward" not in steps[0]
        return
    assert steps[0]["reward"] == pytest.approx(reward)
    assert steps[0]["success"] == steps[0].get("env_reward", 0.5) == 0.5  # the environment's own stay beside it
    assert ("env_reward" in steps[0]) == (name not in ("grpo", "chord_mu", "chord_phi"))


@pytest.mark.parametrize("name", EXPECTED)
def test_recipes_differ_from_the_paper_only_where_their_method_does(name):
    recipe, paper = (
        parse_settings(["--use_cpu"], path) for path in (BASELINES / f"{name}.yaml", CONFIGS / "qwen3_1.7b.yaml")
    )
    assert (recipe.model, recipe.env) == (paper.model, paper.env)
    assert recipe.pact.context_length == paper.pact.context_length
    for setting in ("max_prompt_tokens", "max_response_tokens", "max_turns", "gradient_accumulation_steps"):
        assert getattr(recipe.training, setting) == getattr(paper.training, setting)
    if recipe.training.num_rollouts:
        assert recipe.pact.anchor_q == 1.0  # no baseline shows the policy the trace
        for setting in ("num_rollouts", "max_steps", "learning_rate", "rollout_batch_steps"):
            assert getattr(recipe.training, setting) == getattr(paper.training, setting)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("matchtir", ["--env_options.trace_share", "0.5"], "has no expert trace with calls to match"),
        ("ftrl", ["--env_options.trace_share", "0"], "no expected answers of its tools"),
        ("sft", ["--env_options.trace_share", "0"], "as does training without rollouts"),
        ("sft", ["--sft_coef", "0"], "leave nothing to learn from"),
    ],
)
def test_what_a_method_needs_and_tasks_lack_is_said_before_any_work(
    name, arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump({"extends": str(BASELINES / f"{name}.yaml"), **SMALL}))
    assert cli.main(["train", str(small), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()
