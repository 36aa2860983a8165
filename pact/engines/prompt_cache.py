"""The KV cache of rollouts and the attention that reads it: a prompt is stored once for all rows that share it.

Knows transformers' cache and attention interfaces; it does not sample, and does not decide which rows are at work.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

ATTENTION_NAME = "pact_shared_prompt"
FIRST_CAPACITY = 64  # continuation tokens a row holds at first; doubles when full


class PromptRowLayer(CacheLayerMixin):
    """One layer's keys and values in two parts: prompts [groups, Hkv, P, D] and continuations [rows, Hkv, capacity, D].

    Prompts are right-padded; each row of the continuations writes at its own length, so there are no holes.
    """

    prompt_keys: torch.Tensor
    prompt_values: torch.Tensor
    row_keys: torch.Tensor
    row_values: torch.Tensor

    def __init__(self, cache: PromptRowCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        cache, (_, heads, _, dim) = self.cache, key_states.shape
        self.prompt_keys = key_states.new_zeros(cache.n_groups, heads, cache.prompt_capacity, dim)
        self.prompt_values = value_states.new_zeros(
            cache.n_groups, heads, cache.prompt_capacity, value_states.shape[-1]
        )
        self.row_keys = key_states.new_zeros(cache.n_rows, heads, cache.capacity, dim)
        self.row_values = value_states.new_zeros(cache.n_rows, heads, cache.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new states where the cache's plan says; return what the queries attend to beside the prompt."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        if cache.prefill_groups is not None:
            length = key_states.shape[2]
            self.prompt_keys[cache.prefill_groups, :, :length] = key_states
            self.prompt_values[cache.prefill_groups, :, :length] = value_states
            return key_states, value_states
        if cache.capacity > self.row_keys.shape[2]:
            self.row_keys, self.row_values = (
                _grown(self.row_keys, cache.capacity),
                _grown(self.row_values, cache.capacity),
            )
        rows, places, source = cache.write_rows, cache.write_places, cache.write_source
        self.row_keys[rows, :, places] = key_states.transpose(1, 2).flatten(0, 1)[source]
        self.row_values[rows, :, places] = value_states.transpose(1, 2).flatten(0, 1)[source]
        n_rows = key_states.shape[0]
        return self.row_keys[:n_rows, :, : cache.width], self.row_values[:n_rows, :, : cache.width]

    def swap_rows(self, rows: torch.Tensor, partners: torch.Tensor, width: int) -> None:
        self.row_keys[rows, :, :width] = self.row_keys[partners, :, :width]
        self.row_values[rows, :, :width] = self.row_values[partners, :, :width]

    def swap_groups(self, groups: torch.Tensor, partners: torch.Tensor) -> None:
        self.prompt_keys[groups] = self.prompt_keys[partners]
        self.prompt_values[groups] = self.prompt_values[partners]

    # What transformers asks of a layer to build a mask; only the prefill, on an empty cache, lets it build one.
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def _grown(states_RKCD: torch.Tensor, capacity: int) -> torch.Tensor:
    rows, heads, old, dim = states_RKCD.shape
    grown = states_RKCD.new_zeros(rows, heads, capacity, dim)
    grown[:, :, :old] = states_RKCD
    return grown


class PromptRowCache(Cache):
    """The layers of a session and the plan of the forward in progress, which all layers share."""

    def __init__(self, n_layers: int, n_groups: int, n_rows: int, prompt_capacity: int) -> None:
        self.n_groups, self.n_rows = n_groups, n_rows
        self.prompt_capacity, self.capacity = prompt_capacity, FIRST_CAPACITY
        self.prefill_groups: torch.Tensor | None = None
        self.width = 0  # continuation tokens in view
        self.prompt_layers = [PromptRowLayer(self) for _ in range(n_layers)]
        super().__init__(layers=list(self.prompt_layers))

    def plan_write(self, rows: torch.Tensor, places: torch.Tensor, source: torch.Tensor | slice, width: int) -> None:
        """Token ``source[i]`` (of B * q) of the next forward goes to ``places[i]`` of continuation ``rows[i]``."""
        self.write_rows, self.write_places, self.write_source, self.width = rows, places, source, width
        while self.capacity < width:
            self.capacity *= 2

    def plan_prompt(self, members: torch.Tensor, back: torch.Tensor, prompt_width: int) -> None:
        """``members`` [groups, m]: batch rows of each prompt, padded; ``back`` [B]: a row's place in it, flattened."""
        self.members, self.back, self.prompt_width = members, back, prompt_width


def shared_prompt_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    rollout_cache: PromptRowCache,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax attention of rows over their shared prompt and their own continuation.

    ``query`` [B, Hq, q, D], ``key``, ``value`` [B, Hkv, S, D] the continuations, ``attention_mask`` [B, 1, q, P + S]
    added to the scores. The prompt's keys and values are read once for all rows of a group: their queries are stacked.
    Scores are computed in the dtype of the query, the softmax in float32. Returns [B, q, Hq, D].
    """
    for feature in ("softcap", "s_aux"):
        if kwargs.get(feature) is not None:
            raise ValueError(f"TransformersEngine cannot sample from a model whose attention uses {feature}")
    layer, members, back = rollout_cache.prompt_layers[module.layer_idx], rollout_cache.members, rollout_cache.back
    (n_rows, n_heads, n_query, dim), n_kv = query.shape, key.shape[1]
    (n_groups, n_members), prompt = members.shape, rollout_cache.prompt_width
    # The query heads of one key head are neighbours, so they fold into M = Hq / Hkv * q queries a row and key head.
    query_BKMD = (query * scaling).reshape(n_rows, n_kv, -1, dim)
    n_fold = query_BKMD.shape[2]
    stacked = query_BKMD[members].transpose(1, 2).reshape(n_groups, n_kv, n_members * n_fold, dim)
    prompt_scores = stacked @ layer.prompt_keys[:n_groups, :, :prompt].transpose(2, 3)
    prompt_scores = prompt_scores.view(n_groups, n_kv, n_members, n_fold, prompt).transpose(1, 2)
    prompt_scores_BKMP = prompt_scores.reshape(n_groups * n_members, n_kv, n_fold, prompt)[back]
    scores_BKML = torch.cat([prompt_scores_BKMP, query_BKMD @ key.transpose(2, 3)], dim=-1)
    scores_BKML.view(n_rows, n_kv, -1, n_query, scores_BKML.shape[-1]).add_(attention_mask[:, :, None])
    probs_BKML = torch.softmax(scores_BKML, dim=-1, dtype=torch.float32).to(value.dtype)
    output_BKMD = probs_BKML[..., prompt:] @ value
    stacked = probs_BKML[..., :prompt][members].transpose(1, 2).reshape(n_groups, n_kv, n_members * n_fold, prompt)
    prompt_output = stacked @ layer.prompt_values[:n_groups, :, :prompt]
    prompt_output = prompt_output.view(n_groups, n_kv, n_members, n_fold, -1).transpose(1, 2)
    output_BKMD += prompt_output.reshape(n_groups * n_members, n_kv, n_fold, -1)[back]
    return output_BKMD.reshape(n_rows, n_heads, n_query, -1).transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, shared_prompt_attention)
