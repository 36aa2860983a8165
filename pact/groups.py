"""What the objective is given: settings, prompt groups and their checks. Builds no tensors and runs no model."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pact.schedules import REASONING_ANNEALS, warmup_cosine
from pact.trace import Component, TokenizedTrace
from pact_kernels.backend import NAMES

PROMPT, TRACE = "prompt", "trace"  # the two branches: contexts under which a rollout is scored

_CHOICES = {
    "anchor_mode": ("sample", "mixture"),
    "reasoning_anneal": REASONING_ANNEALS,
    "sft_schedule": ("constant", "chord"),
    "sft_token_weight": ("none", "phi"),
    "ratio_reference": ("trace", "behavior"),
    "loss_norm": ("token", "sequence", "constant"),
    "head_backend": ("auto", *NAMES["linear_cotrain_loss"]),
    "attention_backend": ("auto", *NAMES["tree_attention"]),
}


@dataclass(frozen=True)
class PactConfig:
    """Settings of the objective (terms of DESIGN section 1; arXiv 2606.16215).

    Args:
        anchor_q: probability (``anchor_mode="sample"``) or weight (``"mixture"``) of the prompt-only branch.
        anchor_mode: "sample": each prompt takes one branch and only that one is computed (the paper);
            "mixture": both branches, weighted q and 1 - q.
        sft_coef: factor of the supervised term; 0 leaves it out.
        sft_schedule: how the terms are mixed: "constant": L_RL + sft_coef L_SFT; "chord":
            (1 - mu) L_RL + mu sft_coef L_SFT (CHORD, arXiv 2508.11408), KL and entropy belonging to L_RL.
        mu_peak, mu_valley, mu_warmup, mu_decay: of "chord", 0 to 1 each: mu rises to the peak over the share
            ``mu_warmup`` of training and falls to the valley over the share ``mu_decay`` (`schedules.warmup_cosine`).
        sft_token_weight: "phi": a supervised token also weighs p (1 - p), p its present probability, without gradient
            (CHORD-phi): neither what the policy knows nor what it finds absurd pulls hard. "none": 1.
        reasoning_anneal: which reasoning tokens weigh 1 at progress s: "segment": those of the first
            ceil((1 - s) n - 1e-9) of the n segments of each block; "token": that many of its n tokens; "none": all;
            "off": none. "linear": all weigh 1 - s. Z_sft counts all of them whichever is chosen.
        tool_call_weight: weight of tool-call tokens at progress 0 and 1, linear between.
        answer_weight: weight of the answer and other assistant prose. When it is above 0, those tokens also count in
            Z_sft, so that the supervised term stays a mean.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        clip_dual: where the advantage is negative the ratio is clipped to this number, above 1, too (dual-clip PPO,
            arXiv 1912.09729); None: not. With ``ratio_reference="behavior"`` it matters: see docs/method.md.
        kl_coef: factor of the k3 estimate of KL(pi || reference) under the same context; above 0 it needs ``ref_logp``.
        entropy_coef: factor of the entropy bonus.
        ratio_reference: denominator of the trace-conditioned ratio: "trace": old policy under the same context,
            "behavior": the prompt-only old policy that generated the rollout.
        loss_norm: what the RL term is divided by, over the whole optimiser step: "token": all sampled tokens;
            "sequence": mean over rollouts of the mean over their tokens; "constant": rollouts x
            ``norm_length`` (Dr. GRPO).
        norm_length: tokens a rollout counts for under ``loss_norm="constant"``; take the response limit.
        temperature: of the sampler; every log-prob here, supervised ones included, is of softmax(logits / temperature).
        token_budget: most unique tokens in one tree; None: one tree for all groups given.
        context_observations: False leaves the tool observations out of the trace that the trace-conditioned branch
            reads. As targets they have no weight either way.
        one_pass: False computes every sequence on its own (dense), for comparison: same loss, same gradient.
        context_length: most tokens of a sequence (the model's ``max_position_embeddings``). A prompt whose
            trace-conditioned sequence is longer takes the prompt-only branch; any other longer sequence is an error.
        head_backend: backend of the LM-head losses and log-probs: "auto", "triton" or "torch".
        attention_backend: backend of the tree attention: "auto", "triton", "flash" or "torch"; the
            dense way (``one_pass=False``) does not use it.

    Raises:
        ValueError: naming the field that cannot be.
    """

    anchor_q: float = 0.4
    anchor_mode: str = "sample"
    sft_coef: float = 1.0
    reasoning_anneal: str = "segment"
    tool_call_weight: tuple[float, float] = (0.8, 0.2)
    answer_weight: float = 0.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.001
    entropy_coef: float = 0.001
    ratio_reference: str = "trace"
    loss_norm: str = "token"
    temperature: float = 1.0
    token_budget: int | None = None
    context_observations: bool = True
    one_pass: bool = True
    norm_length: float = 1024.0
    context_length: int | None = None
    head_backend: str = "auto"
    attention_backend: str = "auto"
    sft_schedule: str = "constant"
    mu_peak: float = 0.9
    mu_valley: float = 0.05
    mu_warmup: float = 0.0
    mu_decay: float = 1.0
    sft_token_weight: str = "none"
    clip_dual: float | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
        pair = tuple(self.tool_call_weight) if isinstance(self.tool_call_weight, (list, tuple)) else ()
        if len(pair) != 2:
            raise ValueError(f"tool_call_weight={self.tool_call_weight!r} must be two numbers: (at start, at end)")
        object.__setattr__(self, "tool_call_weight", pair)
        for weight in pair:
            _check_number("tool_call_weight", weight)
        for name in ("anchor_q", "clip_low", "mu_peak", "mu_valley", "mu_warmup", "mu_decay"):
            _check_number(name, getattr(self, name), high=1.0)
        for name in ("sft_coef", "answer_weight", "clip_high", "kl_coef"):
            _check_number(name, getattr(self, name))
        _check_number("entropy_coef", self.entropy_coef, low=-math.inf)
        if self.clip_dual is not None:
            _check_number("clip_dual", self.clip_dual, low=1.0, above=True)
        for name in ("temperature", "norm_length"):
            _check_number(name, getattr(self, name), above=True)
        if not isinstance(self.context_observations, bool):
            raise ValueError(f"context_observations={self.context_observations!r} must be true or false")
        for name in ("token_budget", "context_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive number of tokens, or None")


def term_weights(config: PactConfig, progress: float) -> tuple[float, float]:
    """Factors of L_RL and of L_SFT at ``progress``."""
    if config.sft_schedule == "constant":
        return 1.0, config.sft_coef
    mu = warmup_cosine(progress, config.mu_warmup, config.mu_decay, config.mu_peak, config.mu_valley)
    return 1.0 - mu, mu * config.sft_coef


def _check_number(name: str, value: float, low: float = 0.0, high: float = math.inf, above: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if number and low <= value <= high and not (above and value == low):
        return
    expected = f"above {low:g}" if above else "finite" if low == -math.inf else f"{low:g} or more"
    raise ValueError(f"{name}={value!r} must be a number, {expected if high == math.inf else f'{low:g} to {high:g}'}")


@dataclass
class Rollout:
    """One sampled continuation of a prompt. Lists run over the tokens after the prompt, observations included.

    Args:
        ids: token ids as sampled and as appended by the environment.
        sampled: 1 (or True) where the policy sampled the token, 0 where the environment wrote it.
        advantage: ``A`` of each token; not read where ``sampled`` is 0.
        old_logp, ref_logp: per branch ("prompt", "trace") the log-prob (nats) of each token under the old policy and
            the KL reference; not read where ``sampled`` is 0. ``PactObjective.attach_logprobs`` fills them.
            ``old_logp=None``: on-policy, the ratio is exactly 1.
        component: a ``Component`` a token, for metrics only; None: not told apart.
        engine_logp: log-prob (nats) under which the engine sampled each token, where it differs from the trainer's.
        correction: factor of each token's weight, the truncated importance weight of that difference
            (``pact.correction``); not read where ``sampled`` is 0. None: 1.
    """

    ids: list[int]
    sampled: list[int]
    advantage: list[float]
    old_logp: dict[str, list[float]] | None = None
    ref_logp: dict[str, list[float]] | None = None
    component: list[int] | None = None
    engine_logp: list[float] | None = None
    correction: list[float] | None = None


@dataclass
class Group:
    """One prompt with its trace and its rollouts.

    Args:
        head_ids, suffix_ids: the prompt is ``head + suffix``.
        context_ids: the trace as text; the trace-conditioned prompt is ``head + context + suffix``. None: prompt-only.
        trace: the expert trace that follows the prompt, the supervised target. None: no supervised term.
        rollouts: may be empty where there is a trace (plain SFT).
        branch: "prompt" or "trace"; None: drawn at ``build`` ("sample") or both ("mixture").
    """

    head_ids: list[int]
    suffix_ids: list[int]
    context_ids: list[int] | None = None
    trace: TokenizedTrace | None = None
    rollouts: list[Rollout] = field(default_factory=list)
    branch: str | None = None


@dataclass(frozen=True)
class Denominators:
    """Z (``rl``) and Z_sft (``sft``) of DESIGN section 1. Add those of all groups, accumulation steps and processes."""

    rl: float = 0.0
    sft: float = 0.0

    def __add__(self, other: Denominators) -> Denominators:
        return Denominators(self.rl + other.rl, self.sft + other.sft)


def count_denominators(groups: Sequence[Group], config: PactConfig) -> Denominators:
    """Z and Z_sft of these groups: each rollout once whatever its branch, traces before annealing."""
    sampled = [int(np.count_nonzero(rollout.sampled)) for group in groups for rollout in group.rollouts]
    if config.loss_norm == "token":
        rl = float(sum(sampled))
    else:
        rl = sum(n > 0 for n in sampled) * (config.norm_length if config.loss_norm == "constant" else 1.0)
    components = [group.trace.component for group in groups if group.trace is not None]
    supervised = supervised_components(config)
    return Denominators(rl, float(sum(np.isin(component, supervised).sum() for component in components)))


def supervised_components(config: PactConfig) -> list[int]:
    """Components that count in Z_sft."""
    answer = [int(Component.ANSWER)] if config.answer_weight > 0 else []
    return [int(Component.REASONING), int(Component.TOOL_CALL), *answer]


def acting_rollouts(group: Group) -> list[Rollout]:
    """The rollouts that sampled at least one token; the others have nothing to learn from."""
    return [rollout for rollout in group.rollouts if any(rollout.sampled)]


def can_take_trace(group: Group, config: PactConfig) -> bool:
    """Whether the group has a trace in context to condition on, and every trace-conditioned sequence fits."""
    return group.context_ids is not None and not context_overflow(group, config)


def context_overflow(group: Group, config: PactConfig) -> bool:
    """Whether some trace-conditioned sequence of the group is longer than the context."""
    if group.context_ids is None or config.context_length is None or not group.rollouts:
        return False
    prompt = len(group.head_ids) + len(group.context_ids) + len(group.suffix_ids)
    return prompt + max(len(rollout.ids) for rollout in group.rollouts) > config.context_length


def branch_weights(group: Group, config: PactConfig, draw: float) -> dict[str, float]:
    """Branches to compute and their weights; `draw` in [0, 1) decides where it is left to chance."""
    if not can_take_trace(group, config):
        return {PROMPT: 1.0}
    if group.branch is not None:
        return {group.branch: 1.0}
    q = config.anchor_q
    if config.anchor_mode == "sample":
        return {PROMPT if draw < q else TRACE: 1.0}
    return {branch: weight for branch, weight in ((PROMPT, q), (TRACE, 1.0 - q)) if weight > 0.0}


def as_ids(ids: Sequence[int], what: str) -> NDArray[np.int64]:
    """Token ids as an int64 array; ValueError on anything but non-negative integers."""
    try:
        ids_n = np.frombuffer(array("q", ids), dtype=np.int64)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{what} must be a list of token ids: {error}") from None
    if ids_n.size and ids_n.min() < 0:
        raise ValueError(f"{what} holds the negative token id {ids_n.min()}")
    return ids_n


def check_groups(groups: Sequence[Group], config: PactConfig) -> None:
    """Refuse groups that cannot be trained on; the message says which one and what to do."""
    if not groups:
        raise ValueError("there are no groups: pass at least one")
    for g, group in enumerate(groups):
        where = f"group {g}"
        if not group.rollouts and group.trace is None:
            raise ValueError(f"{where} has no rollouts and no trace: nothing to learn from, leave it out")
        prompt = len(group.head_ids) + len(group.suffix_ids)
        if prompt == 0:
            raise ValueError(f"{where} has an empty prompt: head_ids + suffix_ids needs at least one token")
        if group.branch not in (None, PROMPT, TRACE):
            raise ValueError(f"{where}: branch={group.branch!r} is not one of prompt, trace, None")
        if group.branch == TRACE and group.context_ids is None:
            raise ValueError(f"{where} asks for the trace-conditioned branch but has no context_ids")
        for r, rollout in enumerate(group.rollouts):
            _check_rollout(rollout, f"{where}, rollout {r}")
            _check_length(prompt + len(rollout.ids), config, f"{where}, rollout {r}")
        if group.trace is not None:
            _check_trace(group.trace, f"{where}, trace")
            if config.sft_coef > 0:
                _check_length(prompt + len(group.trace.ids), config, f"{where}, trace")


def check_old_logp(groups: Sequence[Group]) -> None:
    """Old values for every rollout of the step or for none: one in between was forgotten, it is not on-policy."""
    given = [rollout.old_logp is not None for group in groups for rollout in acting_rollouts(group)]
    if any(given) and not all(given):
        raise ValueError(
            f"old_logp is set on {sum(given)} of {len(given)} rollouts: attach it to all (attach_logprobs) or to none"
        )


def _check_rollout(rollout: Rollout, where: str) -> None:
    n = len(rollout.ids)
    columns: dict[str, Sequence | None] = {
        "sampled": rollout.sampled,
        "advantage": rollout.advantage,
        "component": rollout.component,
        "engine_logp": rollout.engine_logp,
        "correction": rollout.correction,
    }
    for name in ("old_logp", "ref_logp"):
        for branch, values in (getattr(rollout, name) or {}).items():
            if branch not in (PROMPT, TRACE):
                raise ValueError(f"{where}: {name} has the key {branch!r}; its keys are prompt and trace")
            columns[f"{name}[{branch!r}]"] = values
    for name, values in columns.items():
        if values is not None and len(values) != n:
            raise ValueError(f"{where}: {name} has {len(values)} entries for {n} ids; one each is needed")
    if not np.isfinite(np.asarray(rollout.advantage, dtype=np.float64)).all():
        raise ValueError(f"{where}: advantage holds NaN or infinity; check the reward of this rollout")
    if rollout.component is not None:
        _check_components(rollout.component, where)


def _check_trace(trace: TokenizedTrace, where: str) -> None:
    n = len(trace.ids)
    for name in ("component", "segment"):
        if len(getattr(trace, name)) != n:
            raise ValueError(f"{where}: {name} has {len(getattr(trace, name))} entries for {n} ids; one each is needed")
    _check_components(trace.component, where)
    reasoning = np.asarray(trace.component) == Component.REASONING
    if (np.asarray(trace.segment)[reasoning] < 0).any():
        raise ValueError(f"{where}: a reasoning token has no segment (-1), so it cannot be annealed")


def _check_components(component: Sequence[int], where: str) -> None:
    values = np.asarray(component, dtype=np.int64)
    if values.size and (values.min() < 0 or values.max() >= len(Component)):
        raise ValueError(f"{where}: component must lie in 0..{len(Component) - 1}, got {values.min()}..{values.max()}")


def _check_length(tokens: int, config: PactConfig, where: str) -> None:
    if config.context_length is not None and tokens > config.context_length:
        raise ValueError(
            f"{where}: {tokens} tokens with the prompt exceed context_length={config.context_length}: "
            "shorten the prompt or the response limit, or drop the item"
        )
