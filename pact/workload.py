"""A run before it begins: the tasks that can be trained on, tokens of prompts, traces and an optimiser step's trees.
Knows no memory and no model.

What rollouts will be is not known. They are taken once as long as the task's trace and once as long as the settings
allow, with nothing in common behind the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from pact.arguments import PactTrainingArguments
from pact.envs import Task
from pact.groups import PROMPT, TRACE, Group, PactConfig, Rollout, context_overflow
from pact.objective import CoTrainBatch, PactObjective
from pact.samples import check_gold, check_prompts, check_tasks, sft_group, with_usable_trace
from pact.trace import render_context, render_prompt

logger = logging.get_logger(__name__)

SAMPLE = 64  # tasks that are rendered


@dataclass(frozen=True)
class StepTokens:
    """What one process computes in an optimiser step.

    ``unique`` tokens in ``trees`` trees, of which the ``largest`` has so many; ``dense``: tokens of the sequences by
    themselves; ``rows``: tokens predicted; ``pairs``: of query and key; ``sampled``: tokens of rollouts.
    """

    unique: float
    dense: float
    trees: float
    largest: int
    rows: float
    pairs: float
    sampled: float


@dataclass(frozen=True)
class Workload:
    """Figures of a sample of the training tasks, in tokens.

    Args:
        tasks, sampled: how many there are and how many were looked at.
        prompt, context, trace: the longest prompt, trace as text in the prompt, trace as target.
        budget: the token budget, as set.
        longest: the longest sequence that can come up; where it is over the budget, trees are cut at it here.
        overlong: sampled prompts that leave no room for a turn; they take no part in the rest.
        unread: sampled traces that do not fit behind the prompt with rollouts of the trace's length.
        typical: a step with rollouts as long as the traces.
        limit: a step of the longest prompts, with rollouts as long as the settings allow.
        warm: a step of the warm start on the longest traces; None where there is none.
    """

    tasks: int
    sampled: int
    prompt: int
    context: int
    trace: int
    budget: int | None
    longest: int
    overlong: int
    unread: int
    typical: StepTokens
    limit: StepTokens
    warm: StepTokens | None

    @property
    def largest_tree(self) -> int:
        """Unique tokens of the largest tree of any phase."""
        return max(step.largest for step in (self.limit, self.warm) if step is not None)

    @property
    def several_trees(self) -> bool:
        """Whether some optimiser step has more than one tree."""
        return any(step.trees > 1 for step in (self.limit, self.warm) if step is not None)


def usable_tasks(
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    config: PactConfig,
    args: PactTrainingArguments,
    plays: bool,
) -> list[Task]:
    """The tasks that can be trained on, all of them checked before any work is done.

    Args:
        config: with the model's context length.
        plays: whether rollouts are generated; without them a task needs a trace that fits.

    Raises:
        ValueError: no task is left, a task is broken or lacks what the reward compares with, a prompt is too long.
    """
    tasks = list(tasks)
    check_tasks(tasks)
    if plays:
        check_gold(tasks, args.reward_options())
    else:
        if config.sft_coef == 0:
            raise ValueError("num_rollouts 0 and sft_coef 0 leave nothing to learn from: set one of them")
        traced = with_usable_trace(tasks, tokenizer, config)
        if len(traced) < len(tasks):
            logger.warning_once(f"{len(tasks) - len(traced)} of {len(tasks)} tasks have no trace that fits: left out")
        tasks = traced
    limit = args.max_prompt_tokens
    if config.context_length is not None:
        room = config.context_length - min(args.max_turn_tokens, args.max_response_tokens)
        if room < 1:
            raise ValueError(
                f"max_turn_tokens {args.max_turn_tokens} leaves no room for a prompt in a context of "
                f"{config.context_length} tokens: lower it"
            )
        limit = room if limit is None else min(limit, room)
    kept = check_prompts(tasks, tokenizer, limit, drop=args.overlong_prompts == "drop")
    if len(kept) < len(tasks):
        logger.warning_once(f"{len(tasks) - len(kept)} of {len(tasks)} prompts are over {limit} tokens and left out")
    if not kept:
        raise ValueError("there are no training tasks: check the data file, the split and overlong_prompts")
    return kept


def workload(
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    config: PactConfig,
    args: PactTrainingArguments,
    sample: int = SAMPLE,
) -> Workload:
    """The figures of ``sample`` tasks drawn with the run's seed, rendered as training renders them.

    Args:
        config: with the model's context length.

    Raises:
        ValueError: no tasks, messages that cannot be rendered, no prompt that leaves room for a turn.
    """
    drawn = random.Random(args.seed).sample(list(tasks), min(sample, len(tasks)))
    check_tasks(drawn)
    every = [group_of(task, tokenizer, config) for task in drawn]
    groups = [group for group in every if room_for_rollouts(group, config, args) > 0]
    if not groups:
        raise ValueError(
            f"none of {len(drawn)} prompts leaves room for a turn in a context of {config.context_length} tokens: "
            "raise context_length and max_prompt_tokens, or shorten the prompts"
        )
    objective = PactObjective(replace(config, kl_coef=0.0, ratio_reference="trace"))
    typical = [with_rollouts(group, len(group.trace.ids) if group.trace else 0, config, args) for group in groups]
    objective.assign_branches(typical, torch.Generator().manual_seed(args.seed))
    longest = max(longest_sequence(group, config, args) for group in groups)
    budget = None if config.token_budget is None else max(config.token_budget, longest)
    unbroken = PactObjective(replace(objective.config, token_budget=budget))
    return Workload(
        tasks=len(tasks),
        sampled=len(drawn),
        prompt=max(_prompt_tokens(group) for group in every),
        context=max(len(group.context_ids or ()) for group in every),
        trace=max(len(group.trace.ids) if group.trace else 0 for group in every),
        budget=config.token_budget,
        longest=longest,
        overlong=len(every) - len(groups),
        unread=sum(context_overflow(group, config) for group in typical),
        typical=_step(unbroken, typical, args.per_device_train_batch_size, args.gradient_accumulation_steps),
        limit=_limit(unbroken, groups, config, args),
        warm=_warm_start(unbroken, groups, args),
    )


def group_of(task: Task, tokenizer: PreTrainedTokenizerBase, config: PactConfig) -> Group:
    """The group of ``task`` without rollouts."""
    group = sft_group(task, tokenizer, config, trace_in_context=False)
    group = group or Group(*render_prompt(task.messages, task.tools, tokenizer))
    if task.expert is not None:
        group.context_ids = render_context(task.expert, tokenizer, observations=config.context_observations)
    return group


def room_for_rollouts(group: Group, config: PactConfig, args: PactTrainingArguments, conditioned: bool = False) -> int:
    """The longest rollout of the group that the settings allow, behind the prompt with or without the trace."""
    prompt = _prompt_tokens(group) + conditioned * len(group.context_ids or ())
    if args.max_prompt_tokens is not None and _prompt_tokens(group) > args.max_prompt_tokens:
        return 0
    room = args.max_response_tokens if config.context_length is None else config.context_length - prompt
    return max(0, min(args.max_response_tokens, room))


def longest_sequence(group: Group, config: PactConfig, args: PactTrainingArguments) -> int:
    """Tokens of the longest sequence that training on the group can compute."""
    prompt, context = _prompt_tokens(group), len(group.context_ids or ())
    lengths = [prompt + (len(group.trace.ids) if group.trace else 0)]
    if args.num_rollouts:
        lengths += [
            prompt + conditioned * context + room
            for conditioned in (False, True)
            if (room := room_for_rollouts(group, config, args, conditioned))
        ]
    if args.warm_start_steps and args.warm_start_context_share and group.trace:
        both = prompt + context + len(group.trace.ids)
        lengths += [both] if config.context_length is None or both <= config.context_length else []
    return max(lengths)


def with_rollouts(group: Group, length: int, config: PactConfig, args: PactTrainingArguments) -> Group:
    """The group with ``num_rollouts`` rollouts of ``length`` tokens, within the room for them; at least one turn."""
    length = min(max(length, args.max_turn_tokens), room_for_rollouts(group, config, args))
    rollouts = [Rollout([r, *[0] * (length - 1)], [1] * length, [1.0] * length) for r in range(args.num_rollouts)]
    return replace(group, rollouts=rollouts)


def _prompt_tokens(group: Group) -> int:
    return len(group.head_ids) + len(group.suffix_ids)


def _limit(
    objective: PactObjective, groups: Sequence[Group], config: PactConfig, args: PactTrainingArguments
) -> StepTokens:
    """One micro-batch of the groups with the longest sequences, rollouts at their limit, on the larger branch."""

    def filled(branch: str) -> list[Group]:
        made = []
        for group in longest:
            conditioned = branch == TRACE and room_for_rollouts(group, config, args, True) > 0
            length = room_for_rollouts(group, config, args, conditioned)
            fixed = (TRACE if conditioned else PROMPT) if config.anchor_mode == "sample" else None
            fixed = fixed if group.context_ids is not None else None
            made.append(replace(with_rollouts(group, length, config, args), branch=fixed))
        return made

    size = args.per_device_train_batch_size
    longest = _largest(groups, [longest_sequence(group, config, args) for group in groups], size)
    steps = [_step(objective, filled(branch), size, args.gradient_accumulation_steps) for branch in (PROMPT, TRACE)]
    return max(steps, key=lambda step: step.largest)


def _warm_start(objective: PactObjective, groups: Sequence[Group], args: PactTrainingArguments) -> StepTokens | None:
    """One step on the longest traces, every token of them a target, in the prompt too where the settings ask for it."""
    config, shown = objective.config, args.warm_start_context_share > 0
    traced: list[tuple[int, Group]] = []
    for group in groups:
        if group.trace is not None and args.warm_start_steps:
            context = group.context_ids or []
            tokens = _prompt_tokens(group) + len(group.trace.ids)
            fits = config.context_length is None or tokens + len(context) <= config.context_length
            head = group.head_ids + context if shown and fits else group.head_ids
            traced.append((tokens, replace(group, head_ids=head, context_ids=None)))
    if not traced:
        return None
    every = replace(config, sft_coef=1.0, sft_schedule="constant", answer_weight=1.0, reasoning_anneal="none")
    longest = _largest([group for _, group in traced], [tokens for tokens, _ in traced], args.warm_start_batch_size)
    return _step(PactObjective(every), longest, len(longest), 1)


def _largest(groups: Sequence[Group], sizes: Sequence[int], count: int) -> list[Group]:
    """``count`` groups, the largest ones; repeated where there are fewer."""
    order = sorted(range(len(groups)), key=lambda i: -sizes[i])
    return [groups[order[i % len(order)]] for i in range(count)]


def _step(objective: PactObjective, groups: Sequence[Group], size: int, micro_batches: int) -> StepTokens:
    """The mean micro-batch of ``size`` groups, times ``micro_batches``."""
    parts = [groups[i : i + size] for i in range(0, len(groups), size)]
    batches = [batch for part in parts for batch in objective.build(part, progress=0.0)]
    scale = micro_batches * size / len(groups)
    return StepTokens(
        unique=scale * sum(batch.tokens for batch in batches),
        dense=scale * sum(batch.plan.dense_tokens for batch in batches),
        trees=scale * len(batches),
        largest=max(batch.tokens for batch in batches),
        rows=scale * sum(batch.terms.target.numel() for batch in batches),
        pairs=scale * sum(map(_pairs, batches)),
        sampled=scale * sum(sum(rollout.sampled) for group in groups for rollout in group.rollouts),
    )


def _pairs(batch: CoTrainBatch) -> int:
    if batch.tree is not None:
        return batch.tree.pairs
    return sum(len(path.ids) * (len(path.ids) + 1) // 2 for path in batch.plan.paths)
