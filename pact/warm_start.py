"""Supervised warm start on the expert traces, through the objective and the loop of `pact.trainer`. Samples nothing."""

from __future__ import annotations

from dataclasses import replace

from pact.arguments import PactTrainingArguments
from pact.envs import Task
from pact.objective import Group, PactConfig
from pact.trainer import PactTrainer


class WarmStartTrainer(PactTrainer):
    """Supervised fine-tuning on the expert traces through the same objective: groups with a trace and no rollouts.

    Every token that the model produces is a target with weight 1, whatever the annealing of ``config`` says. A share
    ``warm_start_context_share`` of the examples shows the trace in the prompt too.
    """

    phase = "warm_start"

    def _configure(self, config: PactConfig) -> PactConfig:
        return replace(
            config,
            sft_coef=1.0,
            sft_schedule="constant",
            sft_token_weight="none",
            answer_weight=1.0,
            tool_call_weight=(1.0, 1.0),
            reasoning_anneal="none",
            kl_coef=0.0,
            entropy_coef=0.0,
        )

    def _plays(self, args: PactTrainingArguments) -> bool:
        return False

    def make_groups(self, tasks: list[Task]) -> list[Group]:
        stream, places = self.stream("context"), self.places(len(tasks))
        draws = [stream.random() for _ in range(max(places) + 1)]
        share = self.args.warm_start_context_share
        return [self._example(task, draws[place] < share) for task, place in zip(tasks, places, strict=True)]
