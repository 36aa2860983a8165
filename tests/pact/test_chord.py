"""CHORD's loss, (1 - mu) L_GRPO + mu L_SFT with phi weights, against plain float64 torch written from the paper."""

import math
from dataclasses import replace

import pytest
import torch
from dense_oracle import gradients, prompt_of, token_logprobs
from tiny import VOCAB, make_config, make_groups, make_model, reference_of, with_logprobs

from pact.objective import PactConfig, PactObjective
from pact_kernels import linear_logprob
from pact_kernels.terms import RL, SFT

SUPERVISED = {1, 2, 4}  # reasoning, tool call, answer
CHORD = PactConfig(
    anchor_q=1.0,
    sft_schedule="chord",
    reasoning_anneal="none",
    tool_call_weight=(1.0, 1.0),
    answer_weight=1.0,
    kl_coef=0.0,
    entropy_coef=0.0,
)


@pytest.fixture(scope="module")
def models():
    model = make_model("qwen3", torch.float64)
    return model, reference_of(model)


def chord_loss(model, groups, mu, phi):
    """arXiv 2508.11408: token means over all rollouts and over all expert tokens, no tree, no kernel."""
    surrogate, expert, sampled = [], [], 0
    for group in groups:
        for rollout in group.rollouts:
            logp, _ = token_logprobs(model, prompt_of(group, "prompt"), rollout.ids)
            mask = torch.tensor(rollout.sampled).bool()
            advantage = torch.tensor(rollout.advantage, dtype=torch.float64)[mask]
            ratio = (logp[mask] - torch.tensor(rollout.old_logp["prompt"], dtype=torch.float64)[mask]).exp()
            surrogate.append(torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum())
            sampled += int(mask.sum())
        if group.trace is not None:
            logp, _ = token_logprobs(model, prompt_of(group, "prompt"), group.trace.ids)
            logp = logp[[c in SUPERVISED for c in group.trace.component]]
            p = logp.detach().exp()
            expert.append(-(logp * p * (1 - p) if phi else logp))
    return (1 - mu) * -sum(surrogate) / sampled + mu * torch.cat(expert).mean()


def run(model, groups, config, progress):
    objective, total = PactObjective(config), 0.0
    model.zero_grad(set_to_none=True)
    for batch in objective.build(groups, progress):
        result = objective.loss(model, batch)
        result.loss.backward()
        total += result.loss.item()
    return total, gradients(model)


def prepared(twin):
    groups = with_logprobs(twin, make_groups(), CHORD)
    for group in groups:
        group.branch = None
    return groups


@pytest.mark.parametrize("phi", ["none", "phi"])
@pytest.mark.parametrize("budget", [None, 45])
@pytest.mark.parametrize(("progress", "mu"), [(0.0, 0.9), (0.25, 0.05 + 0.85 * 0.5), (0.5, 0.05), (1.0, 0.05)])
def test_loss_and_gradients_are_those_of_the_formula(models, phi, budget, progress, mu):
    model, twin = models
    groups = prepared(twin)
    loss, found = run(model, groups, replace(CHORD, mu_decay=0.5, sft_token_weight=phi, token_budget=budget), progress)
    twin.zero_grad(set_to_none=True)
    expected = chord_loss(twin, groups, mu, phi == "phi")
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    largest = max(gradient.abs().max().item() for gradient in gradients(twin).values())
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("phi", ["none", "phi"])
def test_mu_0_is_rl_and_mu_1_is_sft(models, phi):
    model, twin = models
    groups = prepared(twin)
    chord = replace(CHORD, sft_token_weight=phi, mu_decay=0.0)
    alone = run(model, groups, replace(CHORD, sft_schedule="constant", sft_coef=0.0), 0.3)
    assert_equal(run(model, groups, replace(chord, mu_valley=0.0), 0.3), alone)
    for group in groups:
        group.rollouts = []
    traces = [group for group in groups if group.trace is not None]
    expert = run(model, traces, replace(CHORD, sft_schedule="constant", sft_token_weight=phi), 0.3)
    assert_equal(run(model, prepared(twin), replace(chord, mu_valley=1.0), 0.3), expert)


def assert_equal(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_off_means_the_fused_operator_and_the_same_bits(models, monkeypatch):
    model, twin = models
    groups = with_logprobs(twin, make_groups(), make_config())
    plain = run(model, groups, make_config(), 0.3)
    composed = []
    monkeypatch.setattr("pact.objective.linear_logprob", lambda *a, **k: composed.append(1) or linear_logprob(*a, **k))
    other = run(model, groups, make_config(mu_peak=0.3, mu_valley=0.2, mu_warmup=0.1, mu_decay=0.2), 0.3)
    assert not composed
    assert other[0] == plain[0]
    assert all(torch.equal(other[1][name], gradient) for name, gradient in plain[1].items())
    (batch,) = PactObjective(make_config(sft_coef=1.0)).build(groups, 0.0)
    z = sum(sum(rollout.sampled) for group in groups for rollout in group.rollouts)
    z_sft = sum(component in (1, 2) for group in groups if group.trace for component in group.trace.component)
    assert set(batch.terms.weight[batch.terms.kind == RL].tolist()) == {1.0 / z}
    assert set(batch.terms.weight[batch.terms.kind == SFT].tolist()) == {1.0 / z_sft, 0.8 / z_sft}
    run(model, groups, make_config(sft_token_weight="phi"), 0.3)
    assert composed


def test_phi_weighs_supervised_rows_alone(models):
    """RL rows with their KL and entropy are as without it; a uniform policy weighs every token p (1 - p), p = 1/V."""
    model, twin = models
    groups = with_logprobs(twin, make_groups(), make_config())
    for group in groups:
        group.trace = None
    acting = [group for group in groups if group.rollouts]
    assert_equal(run(model, acting, make_config(sft_token_weight="phi"), 0.3), run(model, acting, make_config(), 0.3))
    flat = make_model("qwen3", torch.float64)
    with torch.no_grad():
        flat.get_output_embeddings().weight.zero_()
    loss, _ = run(flat, [make_groups()[3]], replace(CHORD, sft_schedule="constant", sft_token_weight="phi"), 0.0)
    assert loss == pytest.approx(math.log(VOCAB) * (1 - 1 / VOCAB) / VOCAB)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sft_schedule": "cosine"}, "sft_schedule='cosine' is not one of constant, chord"),
        ({"sft_token_weight": "p"}, "sft_token_weight='p'"),
        ({"mu_peak": 1.5}, "mu_peak=1.5 must be a number, 0 to 1"),
        ({"mu_warmup": -0.1}, "mu_warmup"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        PactConfig(**setting)
