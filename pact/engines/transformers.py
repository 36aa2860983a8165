"""A Generator on a transformers causal LM: batched multi-turn sampling with a KV cache that lives through the episode.

Each distinct prompt is computed and stored once; its rows keep only their own continuation and attend to both parts. It
does not render text, know environments, or train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pact.engines.prompt_cache import ATTENTION_NAME, PromptRowCache
from pact.modeling import attach_tree_attention, causal_lm, evaluating
from pact.rollout import Completion, Sampling

RETURN_SHARE = 1 / 8  # of the rows at work: so many must have ended before they are returned and leave the batch
PREFILL_TOKENS = 16_384  # prompt tokens of one forward
SCORE_ELEMENTS = 1 << 26  # attention scores of one layer when observations are fed


def sample_tokens(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B] drawn by inverting the cumulative distribution at ``uniform_B`` (float64, in (0, 1)), and their log-probs
    [B], float32, under softmax(logits / T) before top_p (T = 1 where greedy)."""
    logits_BV = logits_BV.float()
    if sampling.temperature not in (0.0, 1.0):
        logits_BV = logits_BV / sampling.temperature
    logp_BV = torch.log_softmax(logits_BV, dim=-1)
    if sampling.temperature == 0.0:
        ids = logits_BV.argmax(dim=-1, keepdim=True)
        return ids[:, 0], logp_BV.gather(1, ids)[:, 0]
    probs_BV, order_BV = logp_BV.exp(), None
    if sampling.top_p < 1.0:
        probs_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
        # A token stays when the mass before it has not reached top_p, so the most probable one always stays.
        probs_BV = probs_BV.masked_fill(probs_BV.cumsum(dim=-1) - probs_BV >= sampling.top_p, 0.0)
    cumulative_BV = probs_BV.cumsum(dim=-1)
    total_B1 = cumulative_BV[:, -1:]
    # right=True takes the first entry ABOVE the threshold; with the threshold below the total it is never a token of
    # probability 0. The clamp only matters for NaN.
    threshold = (uniform_B[:, None] * total_B1).float().minimum(total_B1.nextafter(torch.zeros_like(total_B1)))
    ids = torch.searchsorted(cumulative_BV, threshold, right=True).clamp_(max=probs_BV.shape[1] - 1)
    ids = ids if order_BV is None else order_BV.gather(1, ids)
    return ids[:, 0], logp_BV.gather(1, ids)[:, 0]


class TransformersEngine:
    """Generator on ``model``, a causal LM (or a PEFT model around one) that can take prefix trees.

    ``max_batch``: rows that are sampled together. Weights are read at every call, so training between calls is seen.
    The model is in eval mode while it samples; every module gets its own mode back. Raises what
    ``pact.modeling.attach_tree_attention`` raises for a model whose attention is not full softmax attention.
    """

    def __init__(self, model: torch.nn.Module, *, max_batch: int = 256) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1 row, got {max_batch}")
        attach_tree_attention(model)
        self.model, self.max_batch = model, max_batch
        self.config = causal_lm(model).config.get_text_config(decoder=True)

    @property
    def context_length(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    def open(
        self, prompts: Sequence[list[int]], *, stop_id: int, sampling: Sampling, seeds: Sequence[int]
    ) -> TransformersSession:
        """Compute the distinct prompts and return the session. Raises ValueError for an empty prompt, more prompts than
        ``max_batch``, a stop id outside the vocabulary, or a number of seeds that differs from that of prompts."""
        if not 1 <= len(prompts) <= self.max_batch:
            raise ValueError(
                f"got {len(prompts)} prompts for 1 to max_batch = {self.max_batch} rows: open fewer at a time"
            )
        if len(seeds) != len(prompts):
            raise ValueError(f"got {len(seeds)} seeds for {len(prompts)} prompts: give one seed a row")
        if not all(prompts):
            raise ValueError("a prompt is empty: give every row at least one token")
        if not 0 <= stop_id < self.config.vocab_size:
            raise ValueError(f"stop_id {stop_id} is outside the model's vocabulary of {self.config.vocab_size}")
        return TransformersSession(self.model, self.config, prompts, stop_id, sampling, seeds)


class TransformersSession:
    """Contexts of one batch. Slots are places in the cache; the rows at work are moved to the first ones, so that
    what a step reads is a view of the cache and never a copy of it."""

    def __init__(
        self,
        model: torch.nn.Module,
        config: Any,
        prompts: Sequence[list[int]],
        stop_id: int,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> None:
        self.model, self.stop_id, self.sampling = model, stop_id, sampling
        self.n_query_heads = config.num_attention_heads
        lm = causal_lm(model)
        self.device, self.dtype = lm.device, lm.dtype
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self.group_of = np.array([numbers[tuple(prompt)] for prompt in prompts])  # of a row
        # The last token of a context stays out of the cache until its successor is wanted: it is what a step feeds.
        self.pending = [[prompt[-1]] for prompt in prompts]
        self.prompt_length = np.array([len(prompt) - 1 for prompt in numbers])  # of a group, in the cache
        self.length = np.zeros(len(prompts), dtype=np.int64)  # of a row's continuation, in the cache
        self.row_at = np.arange(len(prompts))  # of a slot
        self.group_at = np.arange(len(numbers))  # of a prompt slot
        self.room: dict[int, int] = {}  # of the rows that are being sampled: tokens they may still take
        self.partial: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]  # ids and logp so far
        self.streams = [_UniformStream(seed) for seed in seeds]
        self.cache = PromptRowCache(config.num_hidden_layers, len(numbers), len(prompts), int(self.prompt_length.max()))
        with _generating(self.model):
            self._prefill([prompt[:-1] for prompt in numbers])

    def close(self) -> None:
        """Free the cache."""
        del self.cache

    def generate(self, append: Mapping[int, list[int]], max_new_tokens: Mapping[int, int]) -> dict[int, Completion]:
        """See ``pact.rollout.Session``. Raises RuntimeError when the model's logits are not finite."""
        if any(limit < 1 for limit in max_new_tokens.values()):
            raise ValueError("max_new_tokens must be at least 1 for every row that is to be sampled")
        if self.room.keys() & (append.keys() | max_new_tokens.keys()):
            raise ValueError("a row is still being sampled: name it again once its completion has been returned")
        self.room.update(max_new_tokens)
        if not self.room:
            raise ValueError("no row is being sampled: name at least one in max_new_tokens")
        for row, ids in append.items():
            self.pending[row] = self.pending[row] + ids
        with _generating(self.model), _shared_prompt_attention(self.model):
            fed = np.array([row for row in self.room if len(self.pending[row]) > 1], dtype=np.int64)
            if len(fed):
                self._feed(self._to_front(fed))
            rows = self._to_front(np.array(list(self.room)))
            ids_BT, logp_BT = self._decode(rows)
        return self._collect(rows, ids_BT, logp_BT)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> None:
        """Compute the distinct prompts, right-padded, longest first; causality hides the padding."""
        order = np.argsort(-self.prompt_length, kind="stable")
        order = order[self.prompt_length[order] > 0]
        while len(order):
            width = len(prompts[order[0]])
            groups, order = np.split(order, [max(1, PREFILL_TOKENS // width)])
            ids = np.zeros((len(groups), width), dtype=np.int64)
            for place, group in enumerate(groups):
                ids[place, : len(prompts[group])] = prompts[group]
            self.cache.prefill_groups = self._tensor(groups)
            self._forward(self._tensor(ids), torch.arange(width, device=self.device).expand(len(groups), -1), None)
        self.cache.prefill_groups = None

    def _to_front(self, rows: np.ndarray) -> np.ndarray:
        """Move ``rows`` and their prompts to the first slots of the cache; return the rows in slot order."""
        slots, partners = _swaps(self.row_at, rows)
        if len(slots):
            moved = self._tensor(np.concatenate([slots, partners])), self._tensor(np.concatenate([partners, slots]))
            width = int(self.length.max())
            for layer in self.cache.prompt_layers:
                layer.swap_rows(*moved, width)
        slots, partners = _swaps(self.group_at, np.unique(self.group_of[rows]))
        if len(slots):
            moved = self._tensor(np.concatenate([slots, partners])), self._tensor(np.concatenate([partners, slots]))
            for layer in self.cache.prompt_layers:
                layer.swap_groups(*moved)
        rows = self.row_at[: len(rows)].copy()
        self._plan_prompt(rows)
        return rows

    def _plan_prompt(self, rows: np.ndarray) -> None:
        """Tell the cache which of ``rows`` (slot order) share which prompt; build the mask of the prompt padding."""
        place = np.empty(len(self.group_at), dtype=np.int64)
        place[self.group_at] = np.arange(len(self.group_at))
        slot_group = place[self.group_of[rows]]  # prompt slot of each batch row
        counts = np.bincount(slot_group)
        by_group = np.argsort(slot_group, kind="stable")
        rank = np.empty(len(rows), dtype=np.int64)  # of a batch row among those of its prompt
        rank[by_group] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        members = np.zeros((len(counts), counts.max()), dtype=np.int64)
        members[slot_group, rank] = np.arange(len(rows))
        lengths = self.prompt_length[self.group_of[rows]]
        width = int(lengths.max())
        self.cache.plan_prompt(self._tensor(members), self._tensor(slot_group * counts.max() + rank), width)
        self.prompt_mask_BP = self._additive(torch.arange(width, device=self.device) < self._tensor(lengths)[:, None])

    def _feed(self, rows: np.ndarray) -> None:
        """Put the pending tokens of ``rows`` (slot order), all but the last, into the cache; no logits are kept."""
        tokens = [self.pending[row][:-1] for row in rows]
        counts = np.array([len(ids) for ids in tokens])
        start, prompt = self.length[rows], self.prompt_length[self.group_of[rows]]
        view = self.cache.prompt_width + int((start + counts).max())
        step = max(1, SCORE_ELEMENTS // (len(rows) * self.n_query_heads * view))
        for low in range(0, int(counts.max()), step):
            high = min(low + step, int(counts.max()))
            ids = np.zeros((len(rows), high - low), dtype=np.int64)
            for place, row_ids in enumerate(tokens):
                part = row_ids[low:high]
                ids[place, : len(part)] = part
            places = start[:, None] + np.arange(low, high)
            real = np.nonzero(np.arange(low, high) < counts[:, None])
            width = int(places[real].max()) + 1
            source = real[0] * (high - low) + real[1]
            self.cache.plan_write(self._tensor(real[0]), self._tensor(places[real]), self._tensor(source), width)
            visible = torch.arange(width, device=self.device) <= self._tensor(places)[:, :, None]
            prompt_mask = self.prompt_mask_BP[:, None].expand(-1, high - low, -1)
            mask = torch.cat([prompt_mask, self._additive(visible)], dim=-1)
            self._forward(self._tensor(ids), self._tensor(prompt[:, None] + places), mask[:, None])
        self.length[rows] += counts
        for row in rows:
            del self.pending[row][:-1]

    def _decode(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample ``rows`` (slot order) together until RETURN_SHARE of them have their stop id or no room. Returns ids
        and log-probs [B, T]; what lies behind a row's own end is meaningless."""
        room = np.array([self.room[row] for row in rows])
        uniforms = np.zeros((len(rows), room.max()))
        for place, row in enumerate(rows):
            uniforms[place, : room[place]] = self.streams[row].peek(room[place])
        uniform_BT, room_B = self._tensor(uniforms), self._tensor(room)
        tokens = self._tensor(np.array([self.pending[row][0] for row in rows]))
        length, prompt = self._tensor(self.length[rows]), self._tensor(self.prompt_length[self.group_of[rows]])
        longest, index = int(self.length[rows].max()), torch.arange(len(rows), device=self.device)
        places = torch.arange(longest + int(room.max()), device=self.device)
        alive = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        n_going_on = len(rows) - max(1, int(RETURN_SHARE * len(rows)))
        sampled: list[tuple[torch.Tensor, torch.Tensor]] = []
        while int(alive.sum()) > n_going_on:
            width = longest + len(sampled) + 1
            self.cache.plan_write(index, length, slice(None), width)
            mask_BL = torch.cat([self.prompt_mask_BP, self._additive(places[:width] <= length[:, None])], dim=-1)
            logits = self._forward(tokens[:, None], (prompt + length)[:, None], mask_BL[:, None, None])
            sampled.append(sample_tokens(logits, uniform_BT[:, len(sampled)], self.sampling))
            # A row that has ended computes on with its state frozen: what it writes lies beyond its length.
            length = length + alive
            tokens = torch.where(alive, sampled[-1][0], tokens)
            alive = alive & (tokens != self.stop_id) & (room_B > len(sampled))
        ids, logp = zip(*sampled)
        return torch.stack(ids, dim=1).cpu().numpy(), torch.stack(logp, dim=1).cpu().numpy()

    def _collect(self, rows: np.ndarray, ids_BT: np.ndarray, logp_BT: np.ndarray) -> dict[int, Completion]:
        """Cut each row at its own end, bring the host's record up to date, and return the rows that have ended."""
        n_steps = ids_BT.shape[1]
        is_stop = ids_BT == self.stop_id
        first_stop = np.where(is_stop.any(axis=1), is_stop.argmax(axis=1) + 1, n_steps + 1)
        completions = {}
        for place, row in enumerate(rows.tolist()):
            stop, room = int(first_stop[place]), self.room[row]
            count = min(stop, room, n_steps)
            ids, logp = ids_BT[place, :count].tolist(), logp_BT[place, :count]
            if not np.isfinite(logp).all():
                raise RuntimeError(
                    "the model's logits are not finite: its weights have diverged; lower the learning rate"
                )
            # The step that samples the i-th token stores the one before it: count tokens went in, the last stays out.
            self.length[row] += count
            self.pending[row] = ids[-1:]
            self.streams[row].skip(count)
            partial_ids, partial_logp = self.partial[row]
            partial_ids += ids
            partial_logp += logp.tolist()
            if stop <= count or room <= count:
                completions[row] = Completion(partial_ids, partial_logp, stop <= count)
                self.partial[row] = ([], [])
                del self.room[row]
            else:
                self.room[row] = room - count
        return completions

    def _forward(self, ids_BQ: torch.Tensor, position_BQ: torch.Tensor, mask_B1QL: torch.Tensor | None) -> torch.Tensor:
        """One forward through the cache; logits [B, V] of the last position."""
        shared = {} if mask_B1QL is None else {"rollout_cache": self.cache}
        output = self.model(
            input_ids=ids_BQ,
            position_ids=position_BQ,
            attention_mask=mask_B1QL,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **shared,
        )
        return output.logits[:, -1]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        return torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~visible, -torch.inf)


class _UniformStream:
    """Uniform numbers of one row in [0, 1): number i belongs to the i-th token it samples, whatever the turns are."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.Generator(np.random.Philox(seed))
        self.buffer = np.empty(0)

    def peek(self, count: int) -> np.ndarray:
        if count > len(self.buffer):
            self.buffer = np.concatenate([self.buffer, self.generator.random(count - len(self.buffer))])
        return self.buffer[:count]

    def skip(self, count: int) -> None:
        self.buffer = self.buffer[count:]


def _swaps(held: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slot pairs to exchange so that ``held`` begins with ``wanted`` in some order; ``held`` is updated."""
    keep = np.isin(held, wanted)
    count = len(wanted)
    slots, partners = np.flatnonzero(~keep[:count]), count + np.flatnonzero(keep[count:])
    held[slots], held[partners] = held[partners], held[slots]
    return slots, partners


@contextmanager
def _generating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradient; every module gets its own mode back."""
    with evaluating(model), torch.inference_mode():
        yield


@contextmanager
def _shared_prompt_attention(model: torch.nn.Module) -> Iterator[None]:
    """Let the model's attention read the session's cache; put the former implementation back after."""
    lm = causal_lm(model)
    former = lm.config._attn_implementation
    lm.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        lm.set_attn_implementation(former)
