"""PACT's loss with verl's own classes, on a CPU in seconds: python examples/verl_policy_loss.py (verl 0.9 installed).

Before, in a verl run:

    actor_rollout_ref.actor.policy_loss.loss_mode=vanilla

After, the RL term alone; nothing else changes (import pact.integrations.verl_plugin in the workers):

    actor_rollout_ref.actor.policy_loss.loss_mode=pact

After, with trace-conditioned rollouts and the supervised term (docs/drop_in_verl.md has the whole command):

    trainer.v1.trainer_mode=pact_sync actor_rollout_ref.rollout.agent.default_agent_loop=pact ...

Below, step by step, what those two do with the tensors of a batch.
"""

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

from pact.integrations.verl import ActorLoss, count_denominators, expert_row, padded_loss, register, rollout_rows
from pact.objective import Group, PactConfig, Rollout
from pact.trace import Component, TokenizedTrace


def rl_term() -> None:
    """The registered policy loss, called as verl's actor calls it."""
    register()
    torch.manual_seed(0)
    old_log_prob, advantages = -torch.rand(4, 6) - 1, torch.randn(4, 6)
    log_prob = (old_log_prob + 0.1 * torch.randn(4, 6)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    config = FSDPActorConfig(rollout_n=4, ppo_micro_batch_size_per_gpu=4, clip_ratio_high=0.28)
    for name in ("vanilla", "pact"):
        loss, metrics = get_policy_loss_fn(name)(old_log_prob, log_prob, advantages, mask, "token-mean", config)
        print(f"registered as {name}: {loss.item():.6f}, clipped {metrics['actor/pg_clipfrac']:.3f}")


def whole_pact() -> None:
    """One prompt with its trace: what the agent loop makes of it, and the loss of the rows."""
    trace = TokenizedTrace(
        ids=[11, 12, 13, 14, 15, 16],
        component=[Component.REASONING] * 2 + [Component.TOOL_CALL] * 2 + [Component.OBSERVATION, Component.ANSWER],
        segment=[0, 1, -1, -1, -1, -1],
    )
    rollouts = [Rollout(ids=[21, 22, 23], sampled=[1, 1, 1], advantage=[a] * 3) for a in (1.0, -0.5)]
    group = Group(head_ids=[1, 2], suffix_ids=[3], context_ids=[4, 5], trace=trace, rollouts=rollouts)
    config = PactConfig(anchor_mode="mixture", anchor_q=0.4, sft_coef=0.5)
    expert = expert_row(group, config, progress=0.25)
    assert expert is not None
    rows = [expert, *rollout_rows(group, config, draw=0.5)]
    for row in rows:
        print(f"prompt {row.prompt_ids}, response {row.response_ids}, weights {row.columns['pact_weight']}")

    def column(values: list[list[float]]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(v) for v in values], batch_first=True)

    # The model's part is left out: log-probs of -1 throughout, old ones the same, one advantage a rollout.
    mask = column([row.mask for row in rows])
    columns = {name: column([row.columns[name] for row in rows]) for name in rows[0].columns}
    columns |= {"response_mask": mask, "old_log_probs": torch.full(mask.shape, -1.0)}
    columns["advantages"] = torch.tensor([[0.0], [1.0], [1.0], [-0.5], [-0.5]]) * mask
    log_prob = torch.full(mask.shape, -1.0, requires_grad=True)
    settings = ActorLoss(clip_high=0.28)
    result = padded_loss(log_prob, columns, count_denominators(columns, settings), settings)
    result.loss.backward()
    print(f"RL term {result.metrics['loss'][0].sum():.4f}, supervised term {result.metrics['loss'][1].sum():.4f}")


if __name__ == "__main__":
    rl_term()
    whole_pact()
