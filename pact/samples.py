"""Tasks and episodes -> the groups that are trained on. Plays no episode and computes no loss."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pact import advantages
from pact.call_text import CallForm, find_reasoning
from pact.envs import Score, Task
from pact.messages import Message, calls_of, check_messages, check_trace
from pact.objective import Group, PactConfig, Rollout
from pact.rewards import Gold, Reward, Turn
from pact.rollout import Trajectory
from pact.tools import parse_turn
from pact.trace import TokenizedTrace, end_of_turn_id, render_context, render_prompt, render_trace

TEMPLATE_BYTES = 1024  # what a chat template adds around messages and schemas, generously

_OUTCOME = {"grpo": advantages.grpo, "dr_grpo": advantages.dr_grpo, "rloo": advantages.rloo}


@dataclass(frozen=True)
class Estimator:
    """Advantage estimator by name (`pact.advantages`), with the settings of the turn-level ones."""

    name: str = "grpo"
    gamma: float = 0.9
    combine: str = "sum"

    def per_turn(self, episodes: Sequence[Trajectory]) -> list[list[float]]:
        """One advantage for each turn of each episode of one prompt.

        Raises ValueError for a reward that is not finite, or turn rewards that do not match the turns.
        """
        for episode in episodes:
            score, turns = episode.score, len(episode.turns)
            if not all(map(math.isfinite, [score.reward, *score.turn_rewards])):
                raise ValueError(
                    f"task {episode.task.id!r} got the reward {score.reward} (turns {score.turn_rewards}): "
                    "the environment's score must be finite"
                )
            if self.name not in _OUTCOME and len(score.turn_rewards) != turns:
                raise ValueError(
                    f"task {episode.task.id!r} has {len(score.turn_rewards)} turn rewards for {turns} turns: "
                    f"advantage={self.name} needs one each, use grpo with this environment"
                )
        if self.name in _OUTCOME:
            values = _OUTCOME[self.name]([episode.score.reward for episode in episodes])
            return [[value] * len(episode.turns) for value, episode in zip(values, episodes, strict=True)]
        rewards = [episode.score.turn_rewards for episode in episodes]
        if self.name == "dual_level":
            return advantages.dual_level(rewards, gamma=self.gamma, combine=self.combine)
        if self.name == "turn_level":
            return advantages.turn_level(rewards, gamma=self.gamma)
        raise ValueError(f"unknown advantage {self.name!r}: choose {', '.join(_OUTCOME)}, dual_level or turn_level")


def gold_of(task: Task) -> Gold:
    """What attempts at ``task`` are compared with.

    Calls: those of the expert's supervised messages. Answer: ``task.answer``, else the expert's last message; tags
    around it are dropped. Expected: ``task.data.unsolved`` where the environment has such a record (FTRL), else what
    the calls above returned to the expert.
    """
    expected = getattr(task.data, "unsolved", None)
    calls, answer = None, task.answer
    if task.expert is not None:
        pairs = [pair for message, pair in _with_observations(task.expert) if message.get("supervised", True)]
        calls = [call for made, _ in pairs for call in made]
        if answer is None and task.expert[-1]["role"] == "assistant" and not task.expert[-1].get("tool_calls"):
            answer = task.expert[-1].get("content")
        if expected is None:
            expected = {}
            for made, seen in pairs:
                for call, observation in zip(made, seen):
                    expected.setdefault(call["name"], []).append(observation)
    if answer is not None:
        answer = answer.strip().removeprefix("<answer>").removesuffix("</answer>").strip()
    return Gold(calls, answer or None, expected or None)


def check_gold(tasks: Sequence[Task], reward: Reward) -> None:
    """Raises ValueError at the first task that lacks what ``reward`` compares attempts with."""
    if reward.is_own:
        return
    says = {
        "calls": "expert trace with calls to match (give traces)",
        "answer": "final answer to compare with (Task.answer, or a trace that ends with one)",
        "expected": "expected answers of its tools (nor a trace with calls that would tell them)",
    }
    for task in tasks:
        lacking = [says[field] for field in reward.missing(gold_of(task))]
        if lacking:
            raise ValueError(
                f"reward {reward.name}: task {task.id!r} has no {' and no '.join(lacking)}; add it, or choose another "
                "reward"
            )


def with_reward(
    task: Task,
    episodes: Sequence[Trajectory],
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    form: CallForm = "hermes",
) -> list[Trajectory]:
    """The episodes of ``task`` with ``reward`` in their score. The environment's metrics stay; its own reward becomes
    the metric ``env_reward``. What is scored is what the policy sampled, its calls spelled in ``form``, never what a
    tool or a user wrote."""
    if reward.is_own:
        return list(episodes)
    gold, scored = gold_of(task), []
    for episode in episodes:
        own = episode.score
        turns, of_env = _turns(episode, tokenizer, form), (own.reward, own.turn_rewards)
        value, turn_rewards = reward.of(turns, gold, of_env, task, episode.messages)
        metrics = {**own.metrics, "env_reward": own.reward}
        scored.append(replace(episode, score=Score(value, turn_rewards, metrics, own.artifact)))
    return scored


def _turns(episode: Trajectory, tokenizer: PreTrainedTokenizerBase, form: CallForm) -> list[Turn]:
    stop, turns = end_of_turn_id(tokenizer), []
    for (start, end), (_, (calls, seen)) in zip(episode.turns, _with_observations(episode.messages), strict=True):
        ids = episode.ids[start:end]
        finished = ids[-1:] == [stop]
        sampled = str(tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False))
        spoken = find_reasoning(sampled)
        text = sampled[spoken.start : spoken.end]
        sound = finished and sampled.count("</think>") == 1 and not parse_turn(sampled, form).errors
        turns.append(Turn(text, calls, seen, sound))
    return turns


def _with_observations(messages: Sequence[Message]) -> list[tuple[Message, tuple[list[dict[str, Any]], list[str]]]]:
    """Each assistant message with its calls and what they returned: the k-th call, the k-th tool message after it."""
    found: list[tuple[Message, tuple[list[dict[str, Any]], list[str]]]] = []
    for message in messages:
        if message["role"] == "assistant":
            found.append((message, (calls_of(message), [])))
        elif message["role"] == "tool" and found and len(found[-1][1][1]) < len(found[-1][1][0]):
            found[-1][1][1].append(message["content"])
    return found


def rl_group(
    task: Task,
    episodes: Sequence[Trajectory],
    tokenizer: PreTrainedTokenizerBase,
    estimator: Estimator,
    config: PactConfig,
) -> Group:
    """The group of one prompt: its rollouts with advantages, and the expert trace where the task has one that fits."""
    head_ids, suffix_ids = render_prompt(task.messages, task.tools, tokenizer)
    group = Group(head_ids, suffix_ids)
    if task.expert is not None:
        group.context_ids = render_context(task.expert, tokenizer, observations=config.context_observations)
        trace = render_trace(task.expert, task.tools, tokenizer)
        if _fits(head_ids, suffix_ids, trace, config):
            group.trace = trace
    for episode, values in zip(episodes, estimator.per_turn(episodes), strict=True):
        advantage = [0.0] * len(episode.ids)
        for (start, end), value in zip(episode.turns, values, strict=True):
            advantage[start:end] = [value] * (end - start)
        sampled = [int(token) for token in episode.sampled]
        group.rollouts.append(Rollout(episode.ids, sampled, advantage, component=episode.component))
    return group


def sft_group(
    task: Task, tokenizer: PreTrainedTokenizerBase, config: PactConfig, *, trace_in_context: bool
) -> Group | None:
    """The expert trace as a target and no rollouts; None where there is none or it does not fit.

    ``trace_in_context``: the prompt also shows the trace, so that the model learns to read one.
    """
    if task.expert is None:
        return None
    head_ids, suffix_ids = render_prompt(task.messages, task.tools, tokenizer)
    if trace_in_context:
        head_ids = head_ids + render_context(task.expert, tokenizer, observations=config.context_observations)
    trace = render_trace(task.expert, task.tools, tokenizer)
    return Group(head_ids, suffix_ids, trace=trace) if _fits(head_ids, suffix_ids, trace, config) else None


def _fits(head_ids: list[int], suffix_ids: list[int], trace: TokenizedTrace, config: PactConfig) -> bool:
    tokens = len(head_ids) + len(suffix_ids) + len(trace.ids)
    return config.context_length is None or tokens <= config.context_length


def with_context(config: PactConfig, model: PreTrainedModel) -> PactConfig:
    """``config`` with the model's context length where it sets none; raises ValueError where it sets a longer one."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if config.context_length is None:
        return replace(config, context_length=longest)
    if longest is not None and config.context_length > longest:
        raise ValueError(f"context_length {config.context_length} is over the model's {longest}: lower it")
    return config


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raises ValueError, naming the task, for messages or an expert trace that no template can render."""
    for task in tasks:
        try:
            check_messages(task.messages, "prompt")
            if task.expert is not None:
                check_trace(task.expert)
        except ValueError as error:
            raise ValueError(f"task {task.id!r}: {error}") from None


def check_prompts(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, limit: int | None, *, drop: bool
) -> list[Task]:
    """The tasks whose prompt has at most ``limit`` tokens. Raises ValueError at the first other one unless ``drop``."""
    kept = []
    for task in tasks:
        if limit is None or surely_within([task.messages, task.tools], limit):
            kept.append(task)
            continue
        tokens = sum(map(len, render_prompt(task.messages, task.tools, tokenizer)))
        if tokens <= limit:
            kept.append(task)
        elif not drop:
            raise ValueError(
                f"the prompt of task {task.id!r} has {tokens} tokens and at most {limit} fit (max_prompt_tokens, "
                "context_length less one turn): raise them, or set overlong_prompts to drop"
            )
    return kept


def with_usable_trace(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, config: PactConfig) -> list[Task]:
    """The tasks that have an expert trace which fits the context. Raises ValueError when there is none."""
    limit = config.context_length
    usable = [
        task
        for task in tasks
        if task.expert is not None
        and (
            limit is None
            or surely_within([task.messages, task.tools, task.expert], limit)
            or sft_group(task, tokenizer, config, trace_in_context=False) is not None
        )
    ]
    if not usable:
        raise ValueError(
            "a warm start needs expert traces that fit the context, as does training without rollouts, and no training "
            "task has one: give traces, or set warm_start_steps to 0 and num_rollouts to at least 2"
        )
    return usable


def surely_within(record: Any, limit: int) -> bool:
    """Whether ``record`` renders to at most ``limit`` tokens, without rendering it: no token is shorter than a byte.

    False says nothing. It spares a start-up the tokenisation of thousands of prompts that are far from the limit.
    """
    return len(json.dumps(record)) + TEMPLATE_BYTES <= limit


def save_groups(path: Path, steps: Sequence[Sequence[Sequence[Group]]]) -> None:
    """Write optimiser steps of micro-batches of groups, as plain data that loads without running code."""
    torch.save([[[asdict(group) for group in batch] for batch in step] for step in steps], path)


def load_groups(path: Path) -> list[list[list[Group]]]:
    """Read what `save_groups` wrote."""
    steps: list[list[list[dict[str, Any]]]] = torch.load(path, weights_only=True)
    return [[[_group(record) for record in batch] for batch in step] for step in steps]


def _group(record: dict[str, Any]) -> Group:
    trace = None if record["trace"] is None else TokenizedTrace(**record["trace"])
    return Group(**{**record, "trace": trace, "rollouts": [Rollout(**rollout) for rollout in record["rollouts"]]})
