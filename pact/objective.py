"""The PACT objective (DESIGN section 1): prompt groups -> batches (one a tree) -> loss. Neither samples nor steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pact.groups import (
    PROMPT,
    TRACE,
    Denominators,
    Group,
    PactConfig,
    Rollout,
    acting_rollouts,
    as_ids,
    branch_weights,
    can_take_trace,
    check_groups,
    check_old_logp,
    context_overflow,
    count_denominators,
    supervised_components,
    term_weights,
)
from pact.layout import Column, ForwardPlan, Path, Trees, plan_forwards, terms_of
from pact.metrics import add_metrics, flatten_metrics
from pact.modeling import (
    Head,
    attach_tree_attention,
    compute_device,
    dense_hidden,
    inside_forward,
    inside_head,
    tree_hidden,
    unwrapped,
    vocabulary_size,
)
from pact.schedules import check_progress, linear, reasoning_weights
from pact.trace import Component
from pact_kernels import CoTrainResult, PrefixTree, TokenTerms, cotrain_loss, linear_cotrain_loss, linear_logprob
from pact_kernels.terms import PROMPT_BRANCH, RL, SFT, TRACE_BRANCH

_BRANCH_ID = {PROMPT: PROMPT_BRANCH, TRACE: TRACE_BRANCH}
_PRODUCED = (Component.REASONING, Component.TOOL_CALL, Component.ANSWER)  # what the policy writes in a trace
Counts = dict[str, float]


@dataclass(frozen=True)
class CoTrainBatch:
    """One forward and the terms of its loss, on the CPU.

    ``counts``: sums for the metrics, each group counted once. ``entropy``: whether entropies are computed.
    """

    plan: ForwardPlan
    terms: TokenTerms
    counts: Counts
    entropy: bool

    @property
    def tree(self) -> PrefixTree | None:
        """The prefix tree, or None for a dense pass."""
        return self.plan.tree

    @property
    def tokens(self) -> int:
        """Tokens that the forward computes."""
        return self.plan.unique_tokens


class PactObjective:
    """The loss of PACT under one configuration: everything follows from its arguments.

    The trees it made last are kept (up to 2^18 tokens), with what attention planned for them: the same sequences come
    back when old and then reference log-probs are computed, and in several optimiser steps on the same groups.

    Args:
        config: the settings.
        forwards: for sharded weights, where every forward is work of all processes: takes the number of forwards that
            this process needs and returns the number that all of them make (the largest). What is missing here is made
            up with ``idle`` forwards; scoring no groups at all is then allowed. None: each process goes its own way.
    """

    def __init__(self, config: PactConfig | None = None, forwards: Callable[[int], int] | None = None) -> None:
        self.config = config or PactConfig()
        self.forwards = forwards
        self._trees = Trees()

    def denominators(self, groups: Sequence[Group]) -> Denominators:
        """Z and Z_sft of ``groups``. Add them over accumulation steps and processes, then hand the sum to ``build``."""
        return count_denominators(groups, self.config)

    def assign_branches(
        self,
        groups: Sequence[Group],
        generator: torch.Generator | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        """Fix the branch of every group that has none (``anchor_mode="sample"``), for all steps on this rollout batch.

        One number is drawn a group, so a group's branch does not depend on what the others hold. ``places``: which of
        the generator's numbers belongs to each group (None: in order), so that processes that hold parts of one batch
        draw what a single one would. In mixture mode both branches are computed and nothing is assigned.
        """
        if self.config.anchor_mode == "mixture":
            return
        places = range(len(groups)) if places is None else places
        draws = torch.rand(max(places, default=-1) + 1, generator=generator, dtype=torch.float64).tolist()
        for group, draw in zip(groups, (draws[place] for place in places), strict=True):
            if group.branch is None:
                (group.branch,) = branch_weights(group, self.config, draw)

    def build(
        self,
        groups: Sequence[Group],
        progress: float,
        generator: torch.Generator | None = None,
        denominators: Denominators | None = None,
        *,
        monitor: bool = False,
    ) -> list[CoTrainBatch]:
        """Batches, one a tree, whose losses add up to ``L`` of the whole optimiser step.

        Args:
            groups: prompt groups with fixed or open branches.
            progress: share of training done, 0..1; it drives the annealing of the supervised term.
            generator: draws the open branches (None: torch's global generator).
            denominators: those of the whole optimiser step; None: these groups are the whole step.
            monitor: also forward what only the metrics need: supervised tokens annealed to weight 0, and entropies
                when ``entropy_coef`` is 0.

        Returns:
            The batches; none where no token carries weight (everything annealed out).

        Raises:
            ValueError: groups that cannot be trained on, progress outside [0, 1], missing log-probs.
        """
        config = self.config
        check_progress(progress)
        check_groups(groups, config)
        check_old_logp(groups)
        if denominators is None:
            denominators = self.denominators(groups)
        draws = torch.rand(len(groups), generator=generator, dtype=torch.float64).tolist()
        shares = [branch_weights(group, config, draw) for group, draw in zip(groups, draws)]
        rl_weight, _ = term_weights(config, progress)
        paths: list[list[Path]] = []
        for g, group in enumerate(groups):
            paths.append(self._rl_paths(group, shares[g], rl_weight, denominators.rl, f"group {g}"))
            if group.trace is not None and (config.sft_coef > 0 or monitor):
                paths[g] += self._sft_paths(group, progress, denominators.sft, monitor, f"group {g}")
        batches = []
        counted: set[int] = set()
        for plan in plan_forwards(paths, config.token_budget, self._trees if config.one_pass else None):
            here = sorted({g for g, _ in plan.members} - counted)
            counted.update(here)
            counts = _counts(plan, [(groups[g], shares[g]) for g in here], config)
            terms = terms_of(plan)
            entropy = bool((terms.kind == RL).any()) and (monitor or config.entropy_coef != 0)
            batches.append(CoTrainBatch(plan, terms, counts, entropy))
        return batches

    def loss(self, model: nn.Module, batch: CoTrainBatch) -> CoTrainResult:
        """The batch's share of ``L``, differentiable, and its metrics (sums; see `flatten_metrics`).

        Args:
            model: a transformers causal LM, also within DDP, FSDP2 or DeepSpeed. Its attention is switched to the tree
                attention on first use.
            batch: one of those that ``build`` returned; moved to the model's device.

        Raises:
            ValueError: token ids outside the model's vocabulary, positions beyond its context.
        """
        inner = unwrapped(model)
        results: list[CoTrainResult] = []

        def of_head(hidden: Tensor, head: Head) -> Tensor:
            results.append(self._head_loss(hidden, head, batch))
            return results[0].loss

        loss = inside_forward(model, lambda: inside_head(inner, self._hidden(inner, batch.plan), of_head))
        absent = {"kl": batch.terms.ref_logp is None, "entropy": not batch.entropy}
        metrics = {name: value for name, value in results[0].metrics.items() if not absent.get(name, False)}
        if batch.entropy:
            metrics["entropy_tokens"] = metrics["tokens"]  # not every batch computes it
        for name, value in batch.counts.items():
            metrics[name] = torch.tensor(value, dtype=torch.float64, device=loss.device)
        return CoTrainResult(loss, metrics)

    def _head_loss(self, hidden: Tensor, head: Head, batch: CoTrainBatch) -> CoTrainResult:
        """The loss of the last hidden states: fused, or in two steps where weights follow from the log-probs."""
        config, terms = self.config, batch.terms.to(hidden.device)
        rows = batch.plan.rows.to(hidden.device)
        head_options = {**head.options(config.temperature), "backend": config.head_backend}
        options: dict[str, Any] = {
            "clip_low": config.clip_low,
            "clip_high": config.clip_high,
            "clip_dual": config.clip_dual,
            "kl_coef": config.kl_coef,
            "entropy_coef": config.entropy_coef if batch.entropy else 0.0,  # no RL row, no entropy term
        }
        if config.sft_token_weight == "none":
            return linear_cotrain_loss(
                hidden, head.weight, terms, rows=rows, entropy=batch.entropy, **options, **head_options
            )
        out = linear_logprob(hidden, head.weight, terms.target, rows=rows, entropy=batch.entropy, **head_options)
        logp = out.logp.detach()
        phi = logp.exp() * -torch.expm1(logp)  # p (1 - p) without cancellation where p is near 1
        terms = replace(terms, weight=torch.where(terms.kind == SFT, terms.weight * phi, terms.weight))
        return cotrain_loss(out.logp, terms, entropy=out.entropy, **options, backend=config.head_backend)

    def idle(self, made: int) -> list[CoTrainBatch]:
        """Batches without weight for the forwards, after ``made`` of its own, that other processes still make."""
        return self.nothing(0 if self.forwards is None else self.forwards(made) - made)

    def nothing(self, count: int) -> list[CoTrainBatch]:
        """``count`` batches of one token and weight 0: loss 0, gradients 0."""
        one = np.ones(1, np.int64)
        path = Path(0 * one, one, 0 * one, {"kind": SFT, "branch": PROMPT_BRANCH, "weight": 0.0, "component": 0})
        plans = plan_forwards([[path]] if count else [], None, self._trees if self.config.one_pass else None)
        return [CoTrainBatch(plan, terms_of(plan), {}, entropy=False) for plan in plans] * count

    def tokens_of(self, group: Group) -> int:
        """Tokens that a step on ``group`` computes: what processes are balanced by."""
        branches = [group.branch or TRACE] if can_take_trace(group, self.config) else [PROMPT]
        if self.config.anchor_mode == "mixture" and can_take_trace(group, self.config):
            branches = [PROMPT, TRACE]
        paths = [_rollout_path(_prefix(group, b), r) for b in branches for r in acting_rollouts(group)]
        if group.trace is not None and self.config.sft_coef > 0:
            trace = _trace_path(group, np.isin(group.trace.component, _PRODUCED))
            paths += [trace] if trace is not None else []
        plans = plan_forwards([paths], None, self._trees if self.config.one_pass else None) if paths else []
        return sum(plan.unique_tokens for plan in plans)

    @torch.no_grad()
    def attach_logprobs(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        field: str = "old_logp",
        branches: Iterable[str] | None = None,
    ) -> None:
        """Fill ``Rollout.old_logp`` or ``.ref_logp`` with the model's log-probs: the same one pass, without gradient.

        Args:
            field: "old_logp" (when a rollout batch arrives) or "ref_logp" (``model`` is then the reference).
            branches: which contexts; None: those that a later ``build`` of these groups can read.
        """
        if field not in ("old_logp", "ref_logp"):
            raise ValueError(f"field={field!r} is not one of old_logp, ref_logp")
        forced = None if branches is None else list(branches)
        if forced is not None and not {PROMPT, TRACE}.issuperset(forced):
            raise ValueError(f"branches={forced!r} must be among prompt, trace")
        if groups or self.forwards is None:
            check_groups(groups, self.config)
        paths: list[list[Path]] = []
        owners: list[list[tuple[Rollout, str]]] = []
        for group in groups:
            readable = self._readable(group, field, forced)
            pairs = [(rollout, branch) for branch in readable for rollout in acting_rollouts(group)]
            paths.append([_rollout_path(_prefix(group, branch), rollout) for rollout, branch in pairs])
            owners.append(pairs)
        for g, p, logp in self._score(model, paths):
            rollout, branch = owners[g][p]
            full = np.zeros(len(rollout.ids))
            full[np.asarray(rollout.sampled, dtype=bool)] = logp
            setattr(rollout, field, {**(getattr(rollout, field) or {}), branch: full.tolist()})

    @torch.no_grad()
    def latent_trace(self, model: nn.Module, groups: Sequence[Group]) -> dict[str, float]:
        """Diagnostics of the latent-trace view (DESIGN section 1), nats a rollout, mean over the rollouts.

        ``bound`` = log pi(tau|x) + log pi(y|x,tau) beside log pi(y|x), over the tokens that the policy produces.
        Groups without trace and context, or whose trace does not fit, are left out; {} if none is left.
        """
        if groups or self.forwards is None:
            check_groups(groups, self.config)
        paths: list[list[Path]] = []
        for group in groups:
            acting = acting_rollouts(group)
            if group.trace is None:
                continue
            trace = _trace_path(group, np.isin(group.trace.component, _PRODUCED))
            if trace is None or not acting or not can_take_trace(group, self.config):
                continue
            contexts = [_prefix(group, branch) for branch in (PROMPT, TRACE)]
            paths.append([trace, *(_rollout_path(prefix, rollout) for prefix in contexts for rollout in acting)])
        if not paths and self.forwards is None:
            return {}
        sums = [np.zeros(len(group_paths)) for group_paths in paths]
        for g, p, logp in self._score(model, paths):
            sums[g][p] = logp.sum()
        rows = []  # of each rollout: log pi(tau|x), log pi(y|x), log pi(y|x,tau)
        for of_group in sums:
            alone, given_trace = np.split(of_group[1:], 2)
            rows += [(of_group[0], *pair) for pair in zip(alone, given_trace)]
        if not rows:
            return {}
        trace_mean, alone_mean, given_mean = np.mean(rows, axis=0).tolist()
        return {
            "latent/logp_trace": trace_mean,
            "latent/logp_rollout": alone_mean,
            "latent/logp_rollout_given_trace": given_mean,
            "latent/bound": trace_mean + given_mean,
            "latent/gap": trace_mean + given_mean - alone_mean,
            "latent/rollouts": float(len(rows)),
        }

    def _rl_paths(self, group: Group, shares: dict[str, float], term_weight: float, z: float, where: str) -> list[Path]:
        """The rollouts under each branch, with weight = term weight x branch weight / Z on every sampled token."""
        config = self.config
        paths = []
        for branch, share in shares.items():
            prefix = _prefix(group, branch)
            for rollout in acting_rollouts(group):
                if z <= 0:
                    raise ValueError(f"denominators.rl={z} but {where} has sampled tokens: sum it over the whole step")
                path = _rollout_path(prefix, rollout)
                weight: Column = term_weight * share / (z * len(path.at) if config.loss_norm == "sequence" else z)
                if rollout.correction is not None:
                    weight = weight * _sampled(rollout.correction, rollout)
                path.columns = {
                    "kind": RL,
                    "branch": _BRANCH_ID[branch],
                    "weight": weight,
                    "advantage": _sampled(rollout.advantage, rollout),
                    "component": 0 if rollout.component is None else _sampled(rollout.component, rollout),
                }
                reference = PROMPT if config.ratio_reference == "behavior" else branch
                if rollout.old_logp is not None or reference != branch:
                    path.columns["old_logp"] = _logp(rollout, "old_logp", reference, where)
                if config.kl_coef > 0:
                    path.columns["ref_logp"] = _logp(rollout, "ref_logp", branch, where)
                paths.append(path)
        return paths

    def _sft_paths(self, group: Group, progress: float, z: float, monitor: bool, where: str) -> list[Path]:
        """The trace after the prompt, with weight = term weight x w(s) / Z_sft; no path where nothing has weight."""
        config, trace = self.config, group.trace
        assert trace is not None
        component = np.asarray(trace.component, dtype=np.int64)
        segment = np.where(component == Component.REASONING, trace.segment, -1)
        weight = reasoning_weights(segment, progress, config.reasoning_anneal)
        weight[component == Component.TOOL_CALL] = linear(*config.tool_call_weight, progress)
        weight[component == Component.ANSWER] = config.answer_weight
        weight *= term_weights(config, progress)[1]
        wanted = weight > 0
        if monitor:
            wanted |= np.isin(component, supervised_components(config))
        path = _trace_path(group, wanted)
        if path is None:
            return []
        if z <= 0:
            raise ValueError(f"denominators.sft={z} but {where} has supervised tokens: sum it over the whole step")
        path.columns = {
            "kind": SFT,
            "branch": PROMPT_BRANCH,
            "weight": weight[wanted] / z,
            "component": component[wanted],
        }
        return [path]

    def _readable(self, group: Group, field: str, forced: list[str] | None) -> list[str]:
        """Branches whose log-probs a later build of the group can read."""
        if not can_take_trace(group, self.config):
            return [PROMPT]
        if forced is not None:
            return forced
        if field == "old_logp" and self.config.ratio_reference == "behavior":
            return [PROMPT]
        return [PROMPT, TRACE] if group.branch is None else [group.branch]

    def _score(self, model: nn.Module, paths: Sequence[Sequence[Path]]) -> Iterator[tuple[int, int, NDArray]]:
        """(group, path, log-probs of the path's targets) for every path, tree by tree."""
        plans = plan_forwards(paths, self.config.token_budget, self._trees if self.config.one_pass else None)
        idle = self.idle(len(plans))  # agreed on first: what follows is work of all processes too
        for plan in plans:
            logp = self._logprobs(model, plan)
            for (g, p), values in zip(plan.members, plan.per_path(logp)):
                yield g, p, values
        for batch in idle:
            self._logprobs(model, batch.plan)

    def _logprobs(self, model: nn.Module, plan: ForwardPlan) -> Tensor:
        """Log-probs [N] of the plan's targets."""
        inner = unwrapped(model)

        def of_head(hidden: Tensor, head: Head) -> Tensor:
            return linear_logprob(
                hidden,
                head.weight,
                plan.target.to(hidden.device),
                rows=plan.rows.to(hidden.device),
                **head.options(self.config.temperature),
                backend=self.config.head_backend,
            ).logp

        return inside_forward(model, lambda: inside_head(inner, self._hidden(inner, plan), of_head))

    def _hidden(self, model: nn.Module, plan: ForwardPlan) -> Tensor:
        """Last hidden states [R, H] of everything in the plan, on the model's device."""
        _check_vocabulary(model, plan)
        device = compute_device(model)
        if plan.tree is None:
            return torch.cat(dense_hidden(model, [torch.from_numpy(path.ids).to(device) for path in plan.paths]))
        attach_tree_attention(model)
        return tree_hidden(model, plan.tree.to(device), self.config.attention_backend)


def _prefix(group: Group, branch: str) -> NDArray[np.int64]:
    context = group.context_ids if branch == TRACE and group.context_ids is not None else []
    return as_ids([*group.head_ids, *context, *group.suffix_ids], "head_ids, context_ids or suffix_ids")


def _rollout_path(prefix: NDArray[np.int64], rollout: Rollout) -> Path:
    """The path that predicts the sampled tokens of a rollout."""
    return Path.of(prefix, as_ids(rollout.ids, "rollout ids"), np.flatnonzero(rollout.sampled))


def _trace_path(group: Group, wanted: NDArray[np.bool_]) -> Path | None:
    """The path that predicts the wanted tokens of the group's trace after the prompt; None if no token is wanted."""
    if group.trace is None or not wanted.any():
        return None
    return Path.of(_prefix(group, PROMPT), as_ids(group.trace.ids, "trace ids"), np.flatnonzero(wanted))


def _sampled(values: Sequence[float], rollout: Rollout) -> NDArray:
    return np.asarray(values)[np.asarray(rollout.sampled, dtype=bool)]


def _logp(rollout: Rollout, field: str, branch: str, where: str) -> NDArray[np.float64]:
    """Old or reference log-probs of the sampled tokens under ``branch``; ValueError where they are missing."""
    values = (getattr(rollout, field) or {}).get(branch)
    if values is None:
        need = "kl_coef > 0 needs" if field == "ref_logp" else "the ratio needs"
        raise ValueError(
            f"{where}: {need} {field} of the {branch} branch: call attach_logprobs(model, groups, {field!r}) first"
        )
    sampled = np.asarray(_sampled(values, rollout), dtype=np.float64)
    if not np.isfinite(sampled).all():
        raise ValueError(f"{where}: {field}[{branch!r}] holds NaN or infinity on sampled tokens")
    return sampled


def _counts(plan: ForwardPlan, groups: Sequence[tuple[Group, dict[str, float]]], config: PactConfig) -> Counts:
    """Sums for the metrics: tokens of this plan, and of ``groups`` how the branches fell."""
    acting = [(group, shares) for group, shares in groups if acting_rollouts(group)]
    return {
        "unique_tokens": plan.unique_tokens,
        "dense_tokens": plan.dense_tokens,
        "rl_groups": len(acting),
        "prompt_share": sum(shares.get(PROMPT, 0.0) for _, shares in acting),
        "context_overflow": sum(context_overflow(group, config) for group, _ in acting),
    }


def _check_vocabulary(model: nn.Module, plan: ForwardPlan) -> None:
    vocabulary = vocabulary_size(model)
    if plan.largest_id >= vocabulary:
        raise ValueError(
            f"token id {plan.largest_id} is outside the model's vocabulary of {vocabulary}: "
            "tokenizer and model do not belong together, or resize_token_embeddings is missing"
        )


__all__ = [
    "CoTrainBatch",
    "Denominators",
    "ForwardPlan",
    "Group",
    "PactConfig",
    "PactObjective",
    "Rollout",
    "add_metrics",
    "flatten_metrics",
]
