"""PactTrainer: what one optimiser step is, whatever the split; checkpoints; metrics; bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from trainer_setup import (
    SteeredTrainer,
    WarmStartTrainer,
    arguments,
    largest_difference,
    make_trainer,
    tiny_model,
    toybox,
    weights,
)

from pact.arguments import PactTrainingArguments
from pact.envs.base import Score, Task
from pact.objective import PactConfig, flatten_metrics
from pact.recovery import RunStopped
from pact.reporting import Meter, MetricsWriter, read_metrics
from pact.rollout import Trajectory
from pact.samples import Estimator, load_groups, save_groups
from pact.trace import render_prompt
from pact.trainer import PactTrainer


@pytest.mark.parametrize("kind", [SteeredTrainer, WarmStartTrainer])
def test_accumulation_gives_the_same_weights(tmp_path, kind):
    """4 prompts in one micro-batch, 4 micro-batches of one, and trees cut by a budget: the same weights after SGD."""
    trained = []
    for batch, accumulation, budget in ((4, 1, None), (1, 4, None), (2, 2, 600)):
        trainer = make_trainer(
            tmp_path,
            kind=kind,
            config=PactConfig(anchor_q=0.5, token_budget=budget),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            warm_start_context_share=0.5,
        )
        start = weights(trainer)
        trainer.train()
        trained.append(weights(trainer))
    assert largest_difference(start, trained[0]) > 1e-3
    assert largest_difference(trained[0], trained[1]) < 1e-6
    assert largest_difference(trained[0], trained[2]) < 1e-6


def test_the_gradient_is_that_of_the_whole_objective(tmp_path):
    """One SGD step of the trainer moves the weights by -lr times the gradient of one undivided build and loss."""
    trainer = make_trainer(
        tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.5
    )
    seen = []
    make_groups = trainer.make_groups
    trainer.make_groups = lambda tasks: seen.extend(make_groups(tasks)) or seen
    start = weights(trainer)
    trainer.train()
    model = tiny_model(trainer.processing_class)
    for batch in trainer.objective.build(seen, 0.0):
        trainer.objective.loss(model, batch).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), start[name] - 0.5 * parameter.grad)


@pytest.mark.parametrize(("rollout_steps", "checkpoint"), [(1, 2), (3, 1)])
def test_resume_equals_an_uninterrupted_run(tmp_path, monkeypatch, rollout_steps, checkpoint):
    """Stopped between rollout batches and in the middle of one; Adam state, data order and rollouts all continue."""
    monkeypatch.setattr("pact.reporting.draw_curves", lambda *_: None)
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": checkpoint,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "rollout_batch_steps": rollout_steps,
        "lr_scheduler_type": "linear",
    }
    whole = make_trainer(tmp_path, callbacks=[MetricsWriter(tmp_path, "train")], **settings)
    whole.train()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    part = make_trainer(tmp_path, callbacks=[MetricsWriter(tmp_path, "train")], **settings)
    part.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert largest_difference(weights(whole), weights(part)) == 0.0
    again = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in again] == [line["step"] for line in lines]
    assert [line.get("loss") for line in again] == [line.get("loss") for line in lines]


def test_old_logprobs_stay_through_a_rollout_batch(tmp_path):
    """On the second step on the same rollouts the ratio has left 1; on the first it is 1 up to rounding."""
    trainer = make_trainer(tmp_path, rollout_batch_steps=2, per_device_train_batch_size=4, num_train_epochs=1)
    trainer.train()
    first, second = (line for line in trainer.state.log_history if "reward" in line or "ratio/prompt" in line)
    assert first["ratio/prompt"] == pytest.approx(1.0, abs=1e-5)
    assert abs(second["ratio/prompt"] - 1.0) > 1e-5
    assert "seconds/generate" not in second


def test_behavior_ratios_are_1_on_the_prompt_branch_beside_the_trace_branch(tmp_path):
    trainer = make_trainer(tmp_path, config=PactConfig(anchor_q=0.5, ratio_reference="behavior", kl_coef=0.0))
    groups = trainer.make_groups(list(trainer.train_dataset))
    trainer.attach_logprobs(groups)
    assert {group.branch for group in groups} == {"prompt", "trace"}
    (batch,) = trainer.objective.build(groups, 0.0)  # both branches in one tree
    metrics = flatten_metrics(trainer.objective.loss(trainer.model, batch).metrics, 1)
    assert metrics["ratio/prompt"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["clip_fraction/prompt"] == 0.0
    assert abs(metrics["ratio/trace"] - 1.0) > 1e-5


def test_metrics_lines_are_flat_and_complete(tmp_path):
    writer = MetricsWriter(tmp_path, "train")
    make_trainer(tmp_path, callbacks=[writer], latent_trace_steps=1, config=PactConfig(anchor_mode="mixture")).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    expected = {"phase", "step", "reward", "reward_std", "turns", "grad_norm", "learning_rate", "seconds/generate"}
    expected |= {"loss/rl_prompt", "loss/rl_trace", "loss/sft", "clip_fraction/prompt", "clip_fraction/trace"}
    expected |= {"entropy/prompt", "entropy/trace", "kl/prompt", "tokens/rl_prompt", "tokens/sft_reasoning"}
    expected |= {"tokens/unique_dense_ratio", "latent/gap", "tokens_per_second/train", "tokens_per_second/generate"}
    assert expected <= steps[0].keys()
    for line in lines:
        assert all(isinstance(value, int | float | str | None) for value in line.values())
    assert steps[0]["reward"] == 0.5
    total = sum(steps[0][f"loss/{term}"] for term in ("rl_prompt", "rl_trace", "sft"))
    assert steps[0]["loss"] == pytest.approx(total, abs=1e-5)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_warm_start_has_no_rollouts_and_reads_traces(tmp_path):
    losses = {}
    for share in (0.0, 1.0):
        trainer = make_trainer(
            tmp_path, kind=WarmStartTrainer, warm_start_context_share=share, max_steps=12, learning_rate=0.3
        )
        trainer.generate = None  # a warm start that samples would call it
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        assert {line["trace_in_context"] for line in lines} == {share}
        assert all(line["tokens/sft_answer"] > 0 for line in lines)
        assert lines[0]["loss/rl_prompt"] == 0.0
        losses[share] = [line["loss"] for line in lines]
        unique = [line["tokens/unique"] for line in lines]
        losses[share, "tokens"] = sum(unique)
    assert losses[0.0][-1] < losses[0.0][0] - 0.5
    assert losses[1.0, "tokens"] > losses[0.0, "tokens"]


def test_groups_survive_a_checkpoint_file(tmp_path):
    trainer = make_trainer(tmp_path, rollout_batch_steps=2)
    groups = trainer.make_groups(list(trainer.train_dataset)[:3])
    save_groups(tmp_path / "groups.pt", [[groups[:2], groups[2:]]])
    assert load_groups(tmp_path / "groups.pt") == [[groups[:2], groups[2:]]]


def test_a_reward_that_is_not_finite_names_the_task(tmp_path):
    class Broken(SteeredTrainer):
        reward = math.nan

    with pytest.raises(RunStopped, match=r"task 'train-\d' got the reward"):
        make_trainer(tmp_path, kind=Broken).train()


def test_evaluation_samples_at_its_own_temperature(tmp_path):
    def replies(**settings):
        trainer, seen = make_trainer(tmp_path, kind=PactTrainer, eval_tasks=4, **settings), []
        opened = trainer.engine.open
        trainer.engine.open = lambda *args, **options: seen.append(options["sampling"]) or opened(*args, **options)
        trainer.evaluate()
        return seen

    assert {sampling.temperature for sampling in replies()} == {0.0}
    assert {sampling.temperature for sampling in replies(eval_temperature=0.7)} == {0.7}


def test_evaluation_reports_the_environments_own_score(tmp_path):
    trainer = make_trainer(tmp_path, kind=PactTrainer, eval_tasks=4, reward="toolrl", max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] == -3.0
    assert trainer.state.log_history[0]["env_reward"] == 0.0
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == metrics["eval_success"] == 0.0
    assert "eval_env_reward" not in metrics


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "x", "arguments": {}}]}], "have no result"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "x", "arguments": "{"}]}], "are not JSON"),
        ([{"role": "assistant", "content": "", "reasoning_content": 3}], "reasoning_content is int"),
    ],
)
def test_a_bad_trace_names_its_task_before_any_work(tmp_path, trace, message):
    env = toybox()
    tasks = list(env.tasks("train"))
    tasks[-1] = replace(tasks[-1], expert=trace)
    env._cache["train"] = tasks
    with pytest.raises(ValueError, match=f"task 'train-7': .*{message}"):
        make_trainer(tmp_path, env=env)


def test_equal_rewards_warn_and_train(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("pact.trainer.logger.warning_once", warnings.append)
    trainer = make_trainer(tmp_path, kind=PactTrainer, max_steps=1)
    trainer.train()
    assert "all rollouts of every prompt in a batch have equal rewards" in warnings[0]
    assert trainer.state.log_history[0]["reward_equal"] == 1.0


def test_a_model_that_no_tree_fits_is_refused_before_the_first_step(tmp_path):
    model = tiny_model(toybox().tokenizer(), model_type="mistral", sliding_window=16)
    with pytest.raises(ValueError, match=r"slides over 16 tokens.*PactConfig\(one_pass=False\)"):
        make_trainer(tmp_path, model=model)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    env = toybox()
    tokenizer = env.tokenizer()
    model = tiny_model(tokenizer)
    model.resize_token_embeddings(len(tokenizer) - 1)
    with pytest.raises(ValueError, match="the tokenizer that belongs to the model"):
        PactTrainer(model, arguments(tmp_path), env, tokenizer)


def test_a_prompt_longer_than_the_context_is_an_error_or_left_out(tmp_path):
    with pytest.raises(ValueError, match=r"task 'train-0' has \d+ tokens and at most 50 fit"):
        make_trainer(tmp_path, max_prompt_tokens=50)
    with pytest.raises(ValueError, match="context_length 4096 is over the model's 2048"):
        make_trainer(tmp_path, config=PactConfig(context_length=4096))
    with pytest.raises(ValueError, match="max_turn_tokens 64 leaves no room for a prompt in a context of 60 tokens"):
        make_trainer(tmp_path, config=PactConfig(context_length=60), max_turn_tokens=64)
    lengths = sorted(_prompt_lengths(toybox()))
    trainer = make_trainer(tmp_path, max_prompt_tokens=lengths[3], overlong_prompts="drop")
    assert len(trainer.train_dataset) == sum(length <= lengths[3] for length in lengths)


def _prompt_lengths(env):
    tokenizer = env.tokenizer()
    return [sum(map(len, render_prompt(task.messages, task.tools, tokenizer))) for task in env.tasks("train")]


def test_a_trace_over_the_context_is_dropped_and_counted(tmp_path):
    env = toybox()
    lengths = _prompt_lengths(env)
    config = PactConfig(context_length=max(lengths) + 20)
    trainer = make_trainer(tmp_path, env=env, config=config, max_response_tokens=12)
    trainer.train()
    assert trainer.state.log_history[0]["trace_overflow"] == 1.0
    assert trainer.state.log_history[0]["loss/sft"] == 0.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_rollouts": 1}, "num_rollouts is 1, set it to at least 2 .* or to 0"),
        ({"num_rollouts": -1}, "num_rollouts is -1"),
        ({"format_weight": math.nan}, "format_weight is nan"),
        ({"reward": "praise"}, "unknown reward 'praise': choose one of env"),
        ({"match_assignment": "hungarian"}, "unknown match_assignment"),
        ({"rollout_batch_steps": 0}, "rollout_batch_steps"),
        ({"warm_start_context_share": 1.5}, "between 0 and 1"),
        ({"top_p": 0.0}, "top_p"),
        ({"eval_temperature": -1.0}, "eval_temperature is -1.0"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
    ],
)
def test_settings_out_of_range(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        PactTrainingArguments(output_dir=str(tmp_path), **setting)


def test_advantages_by_turn():
    def episode(reward, turn_rewards):
        turns = [(3 * i, 3 * i + 2) for i in range(len(turn_rewards))]
        score = Score(reward, turn_rewards, {})
        return Trajectory(Task("t", [], []), [], [], [], [], turns, [], score, "answer", [])

    pair = [episode(1.0, [0.5, 0.5]), episode(0.0, [0.0])]
    assert Estimator("dr_grpo").per_turn(pair) == [[0.5, 0.5], [-0.5]]
    dual = Estimator("dual_level", combine="mean").per_turn(pair)
    assert [len(values) for values in dual] == [2, 1]
    assert dual[0][0] > 0 > dual[1][0]
    with pytest.raises(ValueError, match="1 turn rewards for 2 turns"):
        Estimator("dual_level").per_turn([Trajectory(**{**vars(pair[0]), "score": Score(1.0, [1.0], {})}), pair[1]])


def test_meter_merges_means():
    first, second = Meter(), Meter()
    first.add("reward", 1.0)
    second.add("reward", 0.0, 3)
    second.add("empty", 5.0, 0)
    first.merge(second)
    assert first.means() == {"reward": 0.25}
