"""Whether a run fits into memory, and the token budget that fits: tokens (`pact.workload`) and bytes (`pact.memory`).

Everything is decided before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pact.arguments import PactTrainingArguments
from pact.envs import Task
from pact.groups import PactConfig
from pact.memory import GIB, RESERVE, Estimate, Shadow, Strategy, checkpoints, count, estimate, fit_tokens
from pact.workload import Workload, group_of, longest_sequence, room_for_rollouts

MENDS = "train LoRA adapters (lora_r), take dtype bfloat16, an optimiser with smaller states (optim), or shard (FSDP2)"
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser states",
    "reference": "KL reference",
    "communication": "communication",
}


@dataclass(frozen=True)
class Plan:
    """What a run computes and needs. ``free``: bytes, of which the share RESERVE is left alone."""

    workload: Workload
    estimate: Estimate
    strategy: Strategy
    free: int

    def lines(self) -> str:
        """Two lines for the start of a run."""
        need, work = self.estimate, self.workload
        each = f" on each of {self.strategy.processes} processes ({self.strategy.name})" * (self.strategy.processes > 1)
        return (
            f"memory: {gib(need.total)} GiB expected at most{each}, {gib(self.free)} GiB free: {fixed_parts(need)}, "
            f"activations {gib(need.activations)} (a tree of {need.tokens:,} tokens), KV cache {gib(need.rollouts)}\n"
            f"tokens of a step: {work.typical.unique:,.0f} unique of {work.typical.dense:,.0f} with rollouts as long "
            f"as the traces, {work.limit.unique:,.0f} of {work.limit.dense:,.0f} at the limit"
        )

    def warnings(self) -> list[str]:
        """What may run out of memory, or stop the run, and the settings that mend it."""
        found, need, work = [], self.estimate, self.workload
        over = f"and {gib(self.free)} are free, {RESERVE:.0%} of it kept in reserve"
        if need.training > room_in(self.free):
            found.append(
                f"training may need {gib(need.training)} GiB (a tree of {need.tokens:,} tokens), {over}: set "
                "token_budget to auto, or gradient_checkpointing"
            )
        if need.sampling > room_in(self.free):
            found.append(
                f"rollouts may need {gib(need.sampling)} GiB, {over}: lower generation_batch_size or "
                "max_response_tokens"
            )
        if work.budget is not None and work.longest > work.budget:
            found.append(
                f"a sequence may have {work.longest:,} tokens, over token_budget {work.budget:,}, and would stop the "
                "run: raise token_budget, or lower max_response_tokens or context_length"
            )
        return found


class Fit:
    """One run against the memory of its device.

    Args:
        shadow: its model without data.
        config: its objective, with the context length of the model.
        free: bytes that one process may take.
    """

    def __init__(
        self, shadow: Shadow, args: PactTrainingArguments, config: PactConfig, strategy: Strategy, free: int
    ) -> None:
        self.shadow, self.args, self.config, self.strategy, self.free = shadow, args, config, strategy, free
        self._options = {"with_reference": args.num_rollouts > 0 and config.kl_coef > 0}

    def check_fixed(self) -> None:
        """Raises ValueError where weights, gradients and optimiser states alone do not fit."""
        need = estimate(self.shadow, self.args, self.strategy, 0, **self._options)
        if need.fixed > room_in(self.free):
            raise ValueError(
                f"{fixed_parts(need)} take {gib(need.fixed)} GiB ({count(self.shadow.trainable) / 1e6:,.1f} million "
                f"trained parameters) and {gib(self.free)} are free, {RESERVE:.0%} of it kept in reserve: {MENDS}"
            )

    def plan(self, work: Workload) -> Plan:
        """The memory of the largest tree of ``work``."""
        need = estimate(
            self.shadow,
            self.args,
            self.strategy,
            work.largest_tree,
            accumulates=work.several_trees,
            cached_tokens=self._cached_tokens(work),
            **self._options,
        )
        return Plan(work, need, self.strategy, self.free)

    def token_budget(self, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase) -> int:
        """The most unique tokens of a tree that fit: what ``token_budget auto`` stands for.

        No sequence of any task may be longer. Where a whole context fits none is; else every task is rendered.

        Raises:
            ValueError: the longest sequence does not fit; it names the settings to lower.
        """

        def training(tokens: int) -> int:
            return estimate(self.shadow, self.args, self.strategy, tokens, **self._options).training

        room, longest = room_in(self.free), self.config.context_length
        if longest is None or training(longest) > room:
            groups = (group_of(task, tokenizer, self.config) for task in tasks)
            usable = (group for group in groups if room_for_rollouts(group, self.config, self.args))
            longest = max((longest_sequence(group, self.config, self.args) for group in usable), default=3)
        tokens = fit_tokens(training, room, longest)
        if tokens is None:
            less = "lower max_response_tokens or context_length"
            raise ValueError(
                f"token_budget auto: a sequence may have {longest:,} tokens, which take {gib(training(longest))} GiB, "
                f"and {gib(self.free)} are free, {RESERVE:.0%} of it kept in reserve: "
                + (less if checkpoints(self.args) else f"set gradient_checkpointing, or {less}")
            )
        return tokens

    def _cached_tokens(self, work: Workload) -> int:
        """Places in the KV cache: of each prompt once, and of each row as many as the power of two over the longest."""
        args = self.args
        if args.num_rollouts == 0 or args.engine != "transformers":
            return 0
        prompts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.rollout_batch_steps
        rows = min(args.generation_batch_size, prompts * args.num_rollouts)
        longest = min(args.max_response_tokens, self.config.context_length or args.max_response_tokens)
        return -(-rows // args.num_rollouts) * work.prompt + rows * (1 << (longest - 1).bit_length())


def gib(size: int) -> str:
    """Bytes in GiB, three significant digits."""
    return f"{size / GIB:,.3g}" if size < 1000 * GIB else f"{size / GIB:,.0f}"


def room_in(free: int) -> int:
    """What of the free memory is used."""
    return int(free * (1.0 - RESERVE))


def fixed_parts(need: Estimate) -> str:
    """The parts that do not depend on tokens, those that are not 0."""
    return ", ".join(f"{name} {gib(getattr(need, part))}" for part, name in PARTS.items() if getattr(need, part))
