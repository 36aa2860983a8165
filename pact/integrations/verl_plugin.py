"""What verl 0.9 loads to train with PACT: an agent loop, a training worker, a trainer. Needs verl to be installed.

``VERL_USE_EXTERNAL_MODULES=pact.integrations.verl_plugin`` loads it in every process; see docs/drop_in_verl.md.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache, partial
from typing import Any

import hydra
import ray
import torch
import torch.distributed
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, _agent_loop_registry
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.losses import ppo_loss

from pact.groups import Group, PactConfig, Rollout
from pact.integrations.verl import (
    COLUMNS,
    Z_RL,
    Z_SFT,
    ActorLoss,
    Row,
    actor_loss,
    check_config,
    count_denominators,
    expert_row,
    group_of,
    padded_columns,
    patch_fused_head,
    register,
    rollout_rows,
)
from pact.trace import prepare_tokenizer, render_context, render_prompt, render_trace

MINI_BATCHES = "pact_mini_batches"  # optimiser steps a batch: the trainer's word to its workers

register()


class PactOutput(AgentLoopOutput):
    """One row of verl's batch with PACT's columns beside verl's own."""

    columns: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        """verl's fields, and one float tensor a column."""
        output = super().as_dict()
        columns = output.pop("columns")
        return output | {name: torch.tensor(columns[name], dtype=torch.float32) for name in COLUMNS}


class PactAgentLoop(AgentLoopBase):
    """Rolls out by another agent loop, from the prompt alone; then says which context each rollout is trained in.

    The dataset's column ``expert`` holds the messages of the expert trace, or None. verl computes old and reference
    log-probs and the update on the rows returned here, so all of them see the same context.

    Args:
        inner: name of verl's agent loop that makes the rollouts.
        pact: settings of `PactConfig`; clip, KL, entropy, aggregation and temperature are verl's own settings.
    """

    def __init__(self, *args: Any, inner: str = "tool_agent", pact: Any = None, **kwargs: Any) -> None:
        prepared(kwargs["tokenizer"])  # before either loop renders anything
        super().__init__(*args, **kwargs)
        self.inner = hydra.utils.instantiate(_agent_loop_registry[inner], *args, **kwargs)
        self.pact = PactConfig(**OmegaConf.to_container(OmegaConf.create(pact or {})))
        check_config(self.pact)

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> list[PactOutput]:
        """The rows of one rollout; the first rollout of a prompt also brings the expert trace."""
        if "session_id" not in kwargs:
            raise RuntimeError("PACT's agent loop returns several rows a rollout: train with trainer.use_v1=True")
        output = await self.inner.run(sampling_params, **kwargs)
        if any((output.multi_modal_data or {}).values()) or output.routed_experts is not None:
            raise ValueError("PACT's rows are text without router replay: turn images, videos and routed experts off")
        group = self._group(output, kwargs)
        rows = rollout_rows(group, self.pact, draw_of(str(kwargs["uid"])))
        if kwargs["session_id"] == 0:
            expert = expert_row(group, self.pact, self._progress(int(kwargs["global_steps"])))
            rows = [expert, *rows] if expert is not None else rows
        return [_output(row, output) for row in rows]

    def _group(self, output: AgentLoopOutput, kwargs: dict[str, Any]) -> Group:
        rollout = Rollout(list(output.response_ids), list(output.response_mask), [0.0] * len(output.response_ids))
        expert = kwargs.get("expert")
        if expert is None:
            return Group(list(output.prompt_ids), [], rollouts=[rollout])
        expert, tools = [dict(message) for message in expert], self._tools(kwargs)
        head, suffix = render_prompt([dict(message) for message in kwargs["raw_prompt"]], tools, self.tokenizer)
        return group_of(
            head,
            suffix,
            output.prompt_ids,
            context_ids=render_context(expert, self.tokenizer, observations=self.pact.context_observations),
            trace=render_trace(expert, tools, self.tokenizer),
            rollouts=[rollout],
        )

    def _tools(self, kwargs: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The schemas that the inner loop showed: its own, or those that the sample selects."""
        schemas = getattr(self.inner, "tool_schemas", None) or None
        selected = (kwargs.get("extra_info") or {}).get("tool_selection")
        if schemas and selected:
            by_name = {schema["function"]["name"]: schema for schema in schemas}
            schemas = [by_name[name] for name in selected if name in by_name]
        return schemas

    def _progress(self, step: int) -> float:
        """Share of training done when this batch is used; verl counts steps from 1."""
        total = self.config.actor_rollout_ref.actor.optim.total_training_steps
        if not total or total < 1:
            raise ValueError("annealing needs the length of training: set trainer.total_training_steps")
        return min(max(step - 1, 0) / max(total - 1, 1), 1.0)


@lru_cache(maxsize=4)
def prepared(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """``tokenizer`` with its training template, checked once in each process (verl makes an agent loop a rollout)."""
    return prepare_tokenizer(tokenizer)


def draw_of(uid: str) -> float:
    """A number in [0, 1) from a prompt's uid: all its rollouts, on whatever worker, take the same branch."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=6).digest(), "big") / 2**48


def _output(row: Row, rollout: AgentLoopOutput) -> PactOutput:
    """``row`` with the fields that every row of verl's batch has in common, taken from the rollout."""
    fields = rollout.model_dump(exclude_unset=True)
    fields |= {"prompt_ids": row.prompt_ids, "response_ids": row.response_ids, "response_mask": row.mask}
    fields["extra_fields"] = dict(rollout.extra_fields)
    if rollout.response_logprobs is not None and not any(row.mask):
        fields["response_logprobs"] = [0.0] * len(row.mask)  # an expert row was not sampled
    return PactOutput(**fields, columns=row.columns)


class PactTrainingWorker(TrainingWorker):
    """verl's training worker with PACT's loss and its denominators."""

    def set_loss_fn(self, loss_fn: Any) -> None:
        """Take the actor's settings from verl's loss, and PACT's loss in its place."""
        if not isinstance(loss_fn, partial) or loss_fn.func is not ppo_loss:
            raise ValueError("PACT replaces verl's ppo_loss; another loss is set here: turn distillation off")
        config = loss_fn.keywords["config"]
        mode = config.policy_loss.get("loss_mode", "vanilla")
        if mode not in ("vanilla", "pact"):
            raise ValueError(f"policy_loss.loss_mode={mode!r} would not be used: set it to pact")
        self.settings = ActorLoss.of(config)
        super().set_loss_fn(partial(actor_loss, config=config))

    def train_mini_batch(self, data: Any) -> Any:
        """As many optimiser steps as the trainer said: expert rows make batches longer, not steps more."""
        steps = tu.pop(data, MINI_BATCHES)
        if steps is not None:
            tu.pop(data, "mini_batch_size")
            tu.assign_non_tensor(data, num_mini_batch=steps)
        return super().train_mini_batch(data)

    def train_batch(self, data: Any) -> Any:
        """One optimiser step: count Z and Z_sft over all processes, then verl's own."""
        z = count_denominators(padded_columns(data), self.settings)
        both = torch.tensor([z.rl, z.sft], dtype=torch.float64, device=get_device_id())
        torch.distributed.all_reduce(both, group=self.engine.get_data_parallel_group())
        rl, sft = both.tolist()
        tu.assign_non_tensor(data, **{Z_RL: rl, Z_SFT: sft})
        return super().train_batch(data)


class PactActorRolloutRefWorker(ActorRolloutRefWorker):
    """verl's worker: `PactTrainingWorker` is its actor, PACT's head takes the place of verl's fused torch one."""

    actor_worker_cls = PactTrainingWorker

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        options = config.model.get("fused_kernel_options") or {}
        if config.model.get("use_fused_kernels", False) and options.get("impl_backend") == "torch":
            patch_fused_head()


@register_trainer("pact_sync")
class PactTrainerSync(PPOTrainerSync):
    """verl's synchronous V1 trainer with PACT's worker: ``trainer.v1.trainer_mode=pact_sync``.

    Raises ValueError, before any worker starts, for settings that PACT's rows cannot take.
    """

    def __init__(self, config: Any) -> None:
        check_trainer_config(config)
        super().__init__(config)

    def _build_replay_buffer(self) -> Any:
        self.trainer_mode = "sync"  # verl tells its synchronous trainer by this name, here and later
        return super()._build_replay_buffer()

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(PactActorRolloutRefWorker)

    def _optimiser_steps(self) -> int:
        prompts = self.config.data.train_batch_size // self.parameter_sync_step
        return prompts // self.config.actor_rollout_ref.actor.ppo_mini_batch_size

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        """Rows of a batch divide evenly over processes and optimiser steps, however many rows a prompt has."""
        return dp_size * self._optimiser_steps()

    def _update_actor(self, batch: Any, metrics: dict) -> Any:
        batch.extra_info[MINI_BATCHES] = self._optimiser_steps()
        return super()._update_actor(batch, metrics)


def check_trainer_config(config: Any) -> None:
    """Refuse verl's settings that PACT's rows cannot take; the message names what to set instead."""
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    if algorithm.adv_estimator != "grpo":
        raise ValueError(
            f"algorithm.adv_estimator={algorithm.adv_estimator!r}: only with grpo does verl leave a session's further "
            "rows (expert trace, second branch) out of the baseline; set it to grpo"
        )
    if algorithm.get("use_kl_in_reward", False):
        raise ValueError(
            "algorithm.use_kl_in_reward=True would put the trace's context into rewards: use actor.use_kl_loss"
        )
    if config.data.train_batch_size % actor.ppo_mini_batch_size:
        raise ValueError(
            f"data.train_batch_size={config.data.train_batch_size} is no multiple of "
            f"actor.ppo_mini_batch_size={actor.ppo_mini_batch_size}: make it one"
        )
