"""The PACT objective in float64, one sequence and one token at a time, written from the formulas of DESIGN section 1.

Independent on purpose: no kernels, no trees, no shared helpers. Branches are given, not drawn.
"""

import math

import torch

REASONING, TOOL_CALL, ANSWER = 1, 2, 4


def token_logprobs(model, prefix, ids, temperature=1.0):
    """(log-prob, entropy) [len(ids)] of `ids` after `prefix`: a plain forward of this one sequence."""
    full = torch.tensor([list(prefix) + list(ids)])
    logits = model(input_ids=full, use_cache=False).logits[0].double() / temperature
    logp = torch.log_softmax(logits[len(prefix) - 1 : -1], dim=-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp[torch.arange(len(ids)), torch.tensor(list(ids), dtype=torch.int64)], entropy


def prompt_of(group, branch):
    context = group.context_ids if branch == "trace" else []
    return list(group.head_ids) + list(context) + list(group.suffix_ids)


def branches_of(group, config):
    """{branch: weight}. A fixed branch is that of the group alone; an open one is both (mixture mode)."""
    fits = group.context_ids is not None
    if fits and config.context_length is not None:
        fits = all(len(prompt_of(group, "trace")) + len(r.ids) <= config.context_length for r in group.rollouts)
    if not fits:
        return {"prompt": 1.0}
    if group.branch is not None:
        return {group.branch: 1.0}
    assert config.anchor_mode == "mixture"
    return {"prompt": config.anchor_q, "trace": 1.0 - config.anchor_q}


def sft_weight(trace, t, config, progress):
    """w_t(s) of one trace token."""
    kind = trace.component[t]
    if kind == TOOL_CALL:
        start, end = config.tool_call_weight
        return start + (end - start) * progress
    if kind == ANSWER:
        return config.answer_weight
    if kind != REASONING:
        return 0.0
    if config.reasoning_anneal == "none":
        return 1.0
    if config.reasoning_anneal == "linear":
        return 1.0 - progress
    if config.reasoning_anneal == "off":
        return 0.0
    first = last = t  # the block: the reasoning tokens around t
    while first > 0 and trace.component[first - 1] == REASONING:
        first -= 1
    while last + 1 < len(trace.ids) and trace.component[last + 1] == REASONING:
        last += 1
    if config.reasoning_anneal == "token":
        place, n = t - first, last - first + 1
    else:
        place, n = trace.segment[t], trace.segment[last] + 1
    return 1.0 if place < math.ceil((1 - progress) * n - 1e-9) else 0.0


def denominators(groups, config):
    lengths = [sum(bool(x) for x in r.sampled) for g in groups for r in g.rollouts]
    z = {
        "token": sum(lengths),
        "sequence": sum(n > 0 for n in lengths),
        "constant": sum(n > 0 for n in lengths) * config.norm_length,
    }[config.loss_norm]
    counted = {REASONING, TOOL_CALL} | ({ANSWER} if config.answer_weight > 0 else set())
    return z, sum(c in counted for g in groups if g.trace is not None for c in g.trace.component)


def rollout_loss(model, group, rollout, branch, config):
    """Sum over sampled tokens of surrogate, KL and entropy terms, not yet normalised."""
    logp, entropy = token_logprobs(model, prompt_of(group, branch), rollout.ids, config.temperature)
    reference = "prompt" if config.ratio_reference == "behavior" else branch
    total = 0.0
    for t in range(len(rollout.ids)):
        if not rollout.sampled[t]:
            continue
        old = logp[t].detach() if rollout.old_logp is None else rollout.old_logp[reference][t]
        ratio = torch.exp(logp[t] - old)
        clipped = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
        surrogate = torch.minimum(ratio * rollout.advantage[t], clipped * rollout.advantage[t])
        if config.clip_dual is not None and rollout.advantage[t] < 0:
            surrogate = torch.maximum(surrogate, torch.as_tensor(config.clip_dual * rollout.advantage[t]))
        total = total - surrogate
        if config.kl_coef:
            d = rollout.ref_logp[branch][t] - logp[t]
            total = total + config.kl_coef * (torch.exp(d) - d - 1)
        total = total - config.entropy_coef * entropy[t]
    return total


def loss(model, groups, config, progress):
    """L = L_RL + sft_coef L_SFT of a whole optimiser step (float64 scalar with gradient)."""
    z, z_sft = denominators(groups, config)
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        for branch, weight in branches_of(group, config).items():
            for rollout in group.rollouts:
                n = sum(bool(x) for x in rollout.sampled)
                if n and weight:
                    norm = z * n if config.loss_norm == "sequence" else z
                    total = total + weight * rollout_loss(model, group, rollout, branch, config) / norm
        if group.trace is not None and config.sft_coef:
            logp, _ = token_logprobs(model, prompt_of(group, "prompt"), group.trace.ids, config.temperature)
            for t in range(len(group.trace.ids)):
                total = total - config.sft_coef * sft_weight(group.trace, t, config, progress) * logp[t] / z_sft
    return total


def loss_and_gradients(model, groups, config, progress):
    """The loss as a float and {parameter name: gradient} (zeros where the loss does not reach)."""
    model.zero_grad(set_to_none=True)
    value = loss(model, groups, config, progress)
    if value.requires_grad:
        value.backward()
    return value.item(), gradients(model)


def gradients(model):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
