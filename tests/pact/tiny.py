"""Tiny models and random prompt groups for the objective's tests."""

import copy

import numpy as np
import torch
from dense_oracle import prompt_of, token_logprobs
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pact.objective import Group, PactConfig, Rollout
from pact.trace import Component, TokenizedTrace

VOCAB = 61


def make_model(architecture="qwen3", dtype=torch.float64, seed=0):
    """Two layers, grouped-query attention, weights large enough for peaked distributions. Llama ties its embeddings."""
    kind, settings = {
        "qwen3": (Qwen3ForCausalLM, Qwen3Config),
        "llama": (LlamaForCausalLM, LlamaConfig),
    }[architecture]
    config = settings(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=architecture == "llama",
    )
    torch.manual_seed(seed)
    return kind(config).to(dtype)


def reference_of(model):
    """A float64 copy that no tree attention touches."""
    return copy.deepcopy(model).double()


def make_rollout(rng, length):
    """Sampled turns with observations between them; advantages of both signs and some zeros."""
    ids = rng.integers(0, VOCAB, length)
    sampled = np.ones(length, int)
    if length > 5:
        start = int(rng.integers(1, length - 3))
        sampled[start : start + 3] = 0
    advantage = rng.normal(size=length) * (rng.random(length) < 0.9)
    component = rng.choice([Component.REASONING, Component.TOOL_CALL, Component.ANSWER], length)
    return Rollout(ids.tolist(), sampled.tolist(), advantage.tolist(), component=component.tolist())


def make_trace(rng, turns=2):
    """Turns of reasoning (a few segments), tool call and observation, then an answer."""
    component, segment = [], []

    def add(kind, n, index=-1):
        component.extend([int(kind)] * n)
        segment.extend([index] * n)

    for _ in range(turns):
        for index in range(int(rng.integers(1, 6))):
            add(Component.REASONING, int(rng.integers(1, 3)), index)
        add(Component.TOOL_CALL, int(rng.integers(1, 5)))
        add(Component.OBSERVATION, int(rng.integers(1, 4)))
        add(Component.PROMPT, 1)
    add(Component.ANSWER, int(rng.integers(1, 4)))
    return TokenizedTrace(rng.integers(0, VOCAB, len(component)).tolist(), component, segment)


def make_group(rng, *, rollouts=3, trace=True, branch=None, length=9):
    """A prompt group whose rollouts share a prefix now and then."""
    made = [make_rollout(rng, int(rng.integers(1, length + 1))) for _ in range(rollouts)]
    if rollouts > 1:
        made[1].ids[:3] = made[0].ids[: len(made[1].ids[:3])] + made[1].ids[len(made[0].ids) : 3]
    return Group(
        head_ids=rng.integers(0, VOCAB, int(rng.integers(1, 9))).tolist(),
        suffix_ids=rng.integers(0, VOCAB, 2).tolist(),
        context_ids=rng.integers(0, VOCAB, int(rng.integers(1, 9))).tolist() if trace else None,
        trace=make_trace(rng) if trace else None,
        rollouts=made,
        branch=branch if trace else None,
    )


def make_groups(anchor_mode="sample", seed=0):
    """Prompt-only, trace-conditioned, no trace, SFT alone, trace-conditioned; in mixture mode branches are open."""
    rng = np.random.default_rng(seed)
    prompt, trace = ("prompt", "trace") if anchor_mode == "sample" else (None, None)
    return [
        make_group(rng, branch=prompt),
        make_group(rng, branch=trace),
        make_group(rng, trace=False),
        make_group(rng, rollouts=0, branch=prompt),
        make_group(rng, rollouts=4, branch=trace),
    ]


@torch.no_grad()
def add_logprobs(model, groups, field, noise, seed=1, branches=("prompt", "trace")):
    """Old or reference values near the model's own, off by Gaussian noise, so that some ratios clip."""
    rng = np.random.default_rng(seed)
    for group in groups:
        for rollout in group.rollouts:
            values = {}
            for branch in branches:
                if branch == "trace" and group.context_ids is None:
                    continue
                logp, _ = token_logprobs(model, prompt_of(group, branch), rollout.ids)
                values[branch] = (logp.numpy() + noise * rng.normal(size=len(logp))).tolist()
            setattr(rollout, field, values)


def with_logprobs(model, groups, config, old=True):
    """`groups` with what `config` needs: old values on request, reference values where KL is on."""
    if old:
        add_logprobs(model, groups, "old_logp", noise=0.3, seed=1)
    if config.kl_coef > 0:
        add_logprobs(model, groups, "ref_logp", noise=0.3, seed=2)
    return groups


def make_config(**settings):
    """Defaults with coefficients large enough to be seen in a comparison."""
    return PactConfig(**{"kl_coef": 0.1, "entropy_coef": 0.05, "sft_coef": 0.7} | settings)
