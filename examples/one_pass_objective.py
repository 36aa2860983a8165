"""PACT's whole objective in a loop of your own: the sequences of a prompt group as one tree, one forward, one backward.

Before (`three_passes` below, which the first step is checked against): a padded pass over the rollouts behind the
prompt or behind prompt and trace, one over the traces, and the log-probs gathered from all their logits.

After:

    objective = PactObjective(PactConfig(anchor_q=0.4, sft_coef=0.1))
    groups = [Group(head_ids, suffix_ids, context_ids, trace, rollouts), ...]
    objective.assign_branches(groups)
    objective.attach_logprobs(model, groups)                 # old log-probs, for several updates on one batch
    for batch in objective.build(groups, progress=step / steps):
        objective.loss(model, batch).loss.backward()         # model: a plain transformers causal LM

Runs on a CPU in seconds, with a random model made on the spot and tasks of the embedded environment.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from pact.envs import Task, make
from pact.groups import TRACE
from pact.objective import Group, PactConfig, PactObjective, Rollout
from pact.schedules import reasoning_weights
from pact.trace import Component, prepare_tokenizer, render_context, render_prompt, render_trace

CONFIG = PactConfig(anchor_q=0.4, sft_coef=0.1, kl_coef=0.0, entropy_coef=0.0)
PROMPTS, ROLLOUTS, NEW, STEPS = 4, 4, 24, 4


def tiny_model(vocabulary: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=2048,
        )
    )


@torch.no_grad()
def sampled_group(model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase) -> Group:
    """A prompt, its trace in both roles, and rollouts sampled from the prompt alone; reward: the share of even ids.

    One turn each, to be short. Tokens that an environment writes between turns go into ``ids`` with ``sampled`` 0.
    """
    head_ids, suffix_ids = render_prompt(task.messages, task.tools, tokenizer)
    prompt = torch.tensor([head_ids + suffix_ids] * ROLLOUTS)
    full = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=NEW)
    responses = [ids[: 8 + 4 * i] for i, ids in enumerate(full[:, prompt.shape[1] :].tolist())]
    rewards = torch.tensor([sum(token % 2 == 0 for token in ids) / len(ids) for ids in responses])
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
    return Group(
        head_ids,
        suffix_ids,
        render_context(task.expert, tokenizer),
        render_trace(task.expert, task.tools, tokenizer),
        [Rollout(ids, [1] * len(ids), [a] * len(ids)) for ids, a in zip(responses, advantages, strict=True)],
    )


def logprobs(model: PreTrainedModel, prefixes: list[list[int]], continuations: list[list[int]]) -> list[Tensor]:
    """Log-probs of each continuation, from one padded pass with all its logits."""
    sequences = [torch.tensor(p + c) for p, c in zip(prefixes, continuations, strict=True)]
    input_ids = pad_sequence(sequences, batch_first=True)
    real = pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
    logp = model(input_ids, attention_mask=real).logits[:, :-1].log_softmax(-1)
    logp = logp.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return [row[len(p) - 1 :][: len(c)] for row, p, c in zip(logp, prefixes, continuations, strict=True)]


def three_passes(model: PreTrainedModel, groups: list[Group], progress: float) -> Tensor:
    """The same loss, as it is written first: section 1 of docs/method.md, sequence by sequence."""
    loss = torch.zeros(())
    z = sum(len(rollout.ids) for group in groups for rollout in group.rollouts)
    z_sft = sum(c in (Component.REASONING, Component.TOOL_CALL) for g in groups for c in g.trace.component)
    for group in groups:
        context = group.context_ids if group.branch == TRACE else []
        prefix = group.head_ids + context + group.suffix_ids
        responses = [rollout.ids for rollout in group.rollouts]
        for rollout, logp in zip(group.rollouts, logprobs(model, [prefix] * len(responses), responses), strict=True):
            advantage = torch.tensor(rollout.advantage)
            ratio = (logp - torch.tensor(rollout.old_logp[group.branch])).exp()
            clipped = ratio.clamp(1 - CONFIG.clip_low, 1 + CONFIG.clip_high)
            loss = loss - torch.minimum(ratio * advantage, clipped * advantage).sum() / z
        component = torch.tensor(group.trace.component)
        weight = torch.from_numpy(reasoning_weights(group.trace.segment, progress, CONFIG.reasoning_anneal)).float()
        start, end = CONFIG.tool_call_weight
        weight = weight * (component == Component.REASONING)
        weight = weight + (start + (end - start) * progress) * (component == Component.TOOL_CALL)
        (logp,) = logprobs(model, [group.head_ids + group.suffix_ids], [group.trace.ids])
        loss = loss - CONFIG.sft_coef * (weight * logp).sum() / z_sft
    return loss


def gradients(model: PreTrainedModel) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def main() -> None:
    torch.manual_seed(0)
    env = make("toybox", train=PROMPTS, test=1)
    tokenizer = prepare_tokenizer(env.tokenizer())
    model = tiny_model(len(tokenizer))
    plain = copy.deepcopy(model)  # for the comparison; the objective switches the attention of the model it is given
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    objective = PactObjective(CONFIG)
    for step in range(STEPS):
        groups = [sampled_group(model, task, tokenizer) for task in env.tasks("train")]
        objective.assign_branches(groups)  # prompt-only with probability anchor_q, else behind the trace
        objective.attach_logprobs(model, groups)
        for update in range(2):
            optimizer.zero_grad()
            batches = objective.build(groups, progress=step / STEPS)
            loss = 0.0
            for batch in batches:
                part = objective.loss(model, batch).loss
                part.backward()
                loss += part.item()
            if step == 0 and update == 1:  # off-policy: the ratios are not 1
                plain.load_state_dict(model.state_dict())
                three_passes(plain, groups, progress=0.0).backward()
                ours, padded = gradients(model), gradients(plain)
                largest, difference = padded.abs().max(), (ours - padded).abs().max()
                print(f"largest difference from the padded passes' gradient: {difference:.1e}, of {largest:.1e}")
            optimizer.step()
        tokens, dense = (
            sum(getattr(batch.plan, name) for batch in batches) for name in ("unique_tokens", "dense_tokens")
        )
        branches = " ".join(str(group.branch) for group in groups)
        print(f"step {step}: loss {loss:+.4f}, {tokens} tokens computed in place of {dense}, branches {branches}")


if __name__ == "__main__":
    main()
