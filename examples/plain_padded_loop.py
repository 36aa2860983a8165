"""A loop of your own on padded [B, T] tensors: clipped rollouts and supervised traces, without kept logits.

Before (`naive_loss` below, which the first step is checked against):

    logp = model(input_ids, attention_mask=real).logits[:, :-1].log_softmax(-1)  # [B, T, V], kept for the backward
    logp = logp.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    ratio = (logp - old_logp).exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    loss = -(clipped * sampled).sum() / sampled.sum() - 0.1 * (logp * supervised).sum() / supervised.sum()

After (`padded_loss` below):

    hidden = model.model(input_ids, attention_mask=real).last_hidden_state
    terms, rows = TokenTerms.from_padded(
        input_ids, sampled | supervised, advantage, kind=kind, weight=weight, old_logp=old_logp, denominator=(z, z_sft)
    )
    loss = linear_cotrain_loss(hidden.flatten(0, 1), model.lm_head.weight, terms, rows=rows).loss

Runs on a CPU in seconds, with a random model made on the spot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from pact_kernels import TokenTerms, linear_cotrain_loss, linear_logprob
from pact_kernels.terms import RL, SFT

VOCABULARY, PROMPT, NEW, PROMPTS, ROLLOUTS, STEPS = 50, 4, 12, 8, 8, 8
SFT_COEF = 0.1


@dataclass
class Batch:
    """Rollouts, then traces, padded on the right. Masks are aligned with the tokens that they speak of."""

    input_ids: Tensor  # [B, T]
    real: Tensor  # [B, T] bool, not padding
    completion: Tensor  # [B, T] bool: what the policy sampled, or what the trace shows
    advantage: Tensor  # [B], 0 for traces
    kind: Tensor  # [B], RL or SFT
    old_logp: Tensor | None = None  # [B, T - 1], of input_ids[:, 1:]


def tiny_model() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
        )
    )


@torch.no_grad()
def sample(model: Qwen3ForCausalLM) -> tuple[Batch, float]:
    """Rollouts that end where they like, rewarded by their share of even ids; a trace a prompt, all even."""
    prompts = torch.randint(VOCABULARY, (PROMPTS, PROMPT)).repeat_interleave(ROLLOUTS, 0)
    rollouts = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=NEW)
    traces = torch.cat([prompts[::ROLLOUTS], 2 * torch.randint(VOCABULARY // 2, (PROMPTS, NEW))], 1)
    input_ids = torch.cat([rollouts, traces])
    length = PROMPT + torch.cat([torch.randint(2, NEW + 1, (len(rollouts),)), torch.full((PROMPTS,), NEW)])
    column = torch.arange(input_ids.shape[1])
    real = column < length[:, None]
    completion = real & (column >= PROMPT)
    reward = ((input_ids % 2 == 0) & completion).sum(1) / completion.sum(1)
    of_prompt = reward[: len(rollouts)].view(PROMPTS, ROLLOUTS)
    advantage = (of_prompt - of_prompt.mean(1, keepdim=True)) / (of_prompt.std(1, keepdim=True) + 1e-4)
    kind = torch.tensor([RL] * len(rollouts) + [SFT] * PROMPTS)
    batch = Batch(input_ids, real, completion, torch.cat([advantage.flatten(), torch.zeros(PROMPTS)]), kind)
    hidden = model.model(input_ids, attention_mask=real).last_hidden_state[:, :-1]
    batch.old_logp = linear_logprob(hidden.flatten(0, 1), model.lm_head.weight, input_ids[:, 1:].flatten()).logp
    batch.old_logp = batch.old_logp.view(len(input_ids), -1)
    return batch, of_prompt.mean().item()


def padded_loss(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """With the library. One forward here; of several micro-batches each would take the same two denominators."""
    hidden = model.model(batch.input_ids, attention_mask=batch.real).last_hidden_state
    supervised = batch.kind == SFT
    terms, rows = TokenTerms.from_padded(
        batch.input_ids,
        batch.completion,
        batch.advantage,
        kind=batch.kind,
        weight=torch.where(supervised, SFT_COEF, 1.0),
        old_logp=batch.old_logp,
        denominator=(batch.completion[~supervised].sum(), batch.completion[supervised].sum()),
    )
    return linear_cotrain_loss(hidden.flatten(0, 1), model.lm_head.weight, terms, rows=rows).loss


def naive_loss(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Without it: all logits, and their log-softmax, kept for the backward."""
    logp = model(batch.input_ids, attention_mask=batch.real).logits[:, :-1].log_softmax(-1)
    logp = logp.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    counted = batch.completion[:, 1:]
    sampled, supervised = counted & (batch.kind == RL)[:, None], counted & (batch.kind == SFT)[:, None]
    ratio, advantage = (logp - batch.old_logp).exp(), batch.advantage[:, None]
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    rl, sft = -(clipped * sampled).sum() / sampled.sum(), -(logp * supervised).sum() / supervised.sum()
    return rl + SFT_COEF * sft


def gradients(model: Qwen3ForCausalLM, loss: Tensor) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])


def main() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        batch, reward = sample(model)
        for _ in range(2):  # the second update is off-policy: its ratios are not 1
            loss = padded_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step == 0:
            ours, naive = (gradients(model, loss(model, batch)) for loss in (padded_loss, naive_loss))
            largest, difference = naive.abs().max(), (ours - naive).abs().max()
            print(f"largest difference from the naive gradient: {difference:.1e}, of {largest:.1e}")
        print(f"step {step}: reward {reward:.3f}, loss {loss.item():+.4f}")


if __name__ == "__main__":
    main()
