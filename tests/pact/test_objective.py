"""The one-pass objective against the dense float64 oracle: loss and every parameter gradient, however it is cut up."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from dense_oracle import gradients, loss_and_gradients, prompt_of, token_logprobs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import VOCAB, make_config, make_group, make_groups, make_model, reference_of, with_logprobs
from transformers import MistralConfig, MistralForCausalLM

from pact.groups import branch_weights
from pact.objective import Denominators, Group, PactConfig, PactObjective, Rollout, add_metrics, flatten_metrics
from pact.schedules import REASONING_ANNEALS
from pact.trace import Component, TokenizedTrace
from pact_kernels import linear_logprob
from pact_kernels.terms import PROMPT_BRANCH, RL, SFT, TRACE_BRANCH
from pact_kernels.tree_attention.tiled import PLANS

# The norms of transformers compute in float32 even in a float64 model, hence not tighter.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
EXACT = TOLERANCE[torch.float64]


@pytest.fixture(scope="module")
def models():
    """{(architecture, dtype): (model, float64 twin)}"""
    made = {}
    for architecture in ("qwen3", "llama"):
        for dtype in (torch.float64, torch.float32):
            model = make_model(architecture, dtype)
            made[architecture, dtype] = (model, reference_of(model))
    return made


def run(model, groups, config, progress, **options):
    """(loss, gradients, metrics) of the objective over all its batches."""
    objective = PactObjective(config)
    model.zero_grad(set_to_none=True)
    total, metrics = 0.0, {}
    for batch in objective.build(groups, progress, **options):
        result = objective.loss(model, batch)
        result.loss.backward()
        total += result.loss.item()
        add_metrics(metrics, result.metrics)
    return total, gradients(model), metrics


def assert_same(found, expected, tolerance):
    """Loss and every gradient, relative to the largest entry of each gradient's reference."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance, abs=tolerance)
    largest = max(gradient.abs().max().item() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        error = (found[1][name].double() - gradient.double()).abs().max().item()
        assert error <= tolerance * max(gradient.abs().max().item(), 0.1 * largest), (name, error)


def compare(models, architecture, dtype, config, progress, old=True, groups=None):
    model, twin = models[architecture, dtype]
    groups = with_logprobs(twin, groups or make_groups(config.anchor_mode), config, old)
    expected = loss_and_gradients(twin, groups, config, progress)
    assert_same(run(model, groups, config, progress), expected, TOLERANCE[dtype])


CASES = {
    "paper": (make_config(), 0.3, True),
    "start": (make_config(), 0.0, True),
    "late": (make_config(), 0.7, True),
    "end": (make_config(), 1.0, True),
    "mixture": (make_config(anchor_mode="mixture"), 0.3, True),
    "mixture, behavior": (make_config(anchor_mode="mixture", ratio_reference="behavior"), 0.7, True),
    "behavior": (make_config(ratio_reference="behavior"), 0.0, True),
    "on-policy": (make_config(), 0.3, False),
    "on-policy, mixture": (make_config(anchor_mode="mixture", anchor_q=0.25), 0.3, False),
    "no KL, no entropy": (make_config(kl_coef=0.0, entropy_coef=0.0), 0.3, True),
    "KL only": (make_config(entropy_coef=0.0), 0.3, False),
    "entropy only": (make_config(kl_coef=0.0), 0.3, False),
    "sequence mean": (make_config(loss_norm="sequence", anchor_mode="mixture"), 0.3, True),
    "constant": (make_config(loss_norm="constant", norm_length=7), 0.3, True),
    "uneven clip": (make_config(clip_low=0.05, clip_high=0.4), 0.3, True),
    "dual clip": (make_config(ratio_reference="behavior", clip_high=1.0, clip_dual=1.2), 0.3, True),
    "linear reasoning": (make_config(reasoning_anneal="linear", tool_call_weight=(1.0, 0.0)), 0.3, True),
    "token reasoning": (make_config(reasoning_anneal="token"), 0.3, True),
    "token reasoning, late": (make_config(reasoning_anneal="token", answer_weight=0.5), 0.7, False),
    "token reasoning, end": (make_config(reasoning_anneal="token"), 1.0, True),
    "no reasoning": (make_config(reasoning_anneal="off"), 0.3, True),
    "no reasoning, start": (make_config(reasoning_anneal="off", anchor_mode="mixture"), 0.0, True),
    "answer weight": (make_config(reasoning_anneal="none", answer_weight=0.5), 0.7, True),
    "RL alone": (make_config(sft_coef=0.0), 0.3, True),
    "one branch of two": (make_config(anchor_mode="mixture", anchor_q=1.0), 0.3, True),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(models, case):
    compare(models, "qwen3", torch.float64, *CASES[case])


@pytest.mark.parametrize("case", ["paper", "end", "mixture, behavior", "on-policy", "sequence mean"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_equals_the_oracle_in_float32(models, architecture, case):
    compare(models, architecture, torch.float32, *CASES[case])


@pytest.mark.parametrize("case", ["paper", "mixture, behavior", "on-policy"])
def test_equals_the_oracle_with_the_triton_head(models, case):
    config, progress, old = CASES[case]
    compare(models, "llama", torch.float32, replace(config, head_backend="triton"), progress, old)


@pytest.mark.parametrize("case", ["paper", "mixture, behavior"])
@pytest.mark.parametrize("attention", ["triton", "flash"])
def test_equals_the_oracle_with_every_attention(models, case, attention):
    config, progress, old = CASES[case]
    compare(models, "qwen3", torch.float32, replace(config, attention_backend=attention), progress, old)


def test_log_probs_and_later_steps_reuse_the_tree_and_its_plan(models):
    model, _ = models["qwen3", torch.float32]
    groups = make_groups()
    objective = PactObjective(make_config(sft_coef=0.0, anchor_q=1.0, attention_backend="torch"))
    objective.assign_branches(groups)
    n_plans = len(PLANS)
    objective.attach_logprobs(model, groups, "old_logp")
    objective.attach_logprobs(model, groups, "ref_logp")
    trees = set()
    for progress in (0.0, 0.5):
        for batch in objective.build(groups, progress):
            trees.add(id(batch.tree))
            objective.loss(model, batch).loss.backward()
    assert len(trees) == 1
    assert len(PLANS) == n_plans + 1


@pytest.mark.parametrize("case", ["paper", "mixture"])
def test_equals_the_oracle_with_tied_embeddings(models, case):
    compare(models, "llama", torch.float64, *CASES[case])


def test_temperature_is_the_samplers(models):
    compare(models, "qwen3", torch.float64, make_config(temperature=0.7), 0.3)


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_plain_sft_is_the_models_own_loss(models, progress):
    model, twin = models["qwen3", torch.float64]
    ids = np.random.default_rng(0).integers(0, VOCAB, 12).tolist()
    trace = TokenizedTrace(ids, [1, 1, 2, 2, 2, 1, 2, 4, 4, 4, 4, 4], [0, 1, -1, -1, -1, 0, *[-1] * 6])
    config = PactConfig(answer_weight=1, tool_call_weight=(1, 1), reasoning_anneal="none", kl_coef=0)
    loss, _, _ = run(model, [Group([5, 6], [7], None, trace, [])], config, progress)
    labels = torch.tensor([[-100] * 3 + ids])
    assert loss == pytest.approx(twin(torch.tensor([[5, 6, 7, *ids]]), labels=labels).loss.item(), rel=EXACT)


@pytest.mark.parametrize("anchor_mode", ["sample", "mixture"])
@pytest.mark.parametrize("budget", [45, 64, 100, 10_000])
def test_any_token_budget_gives_the_same_gradient(models, anchor_mode, budget):
    model, twin = models["qwen3", torch.float64]
    config = make_config(anchor_mode=anchor_mode)
    groups = with_logprobs(twin, make_groups(config.anchor_mode), config)
    whole = run(model, groups, config, 0.3)
    cut = replace(config, token_budget=budget)
    batches = PactObjective(cut).build(groups, 0.3)
    assert all(len(batch.tree) <= budget for batch in batches)
    assert (len(batches) > 1) == (budget <= 100)
    found = run(model, groups, cut, 0.3)
    assert_same(found, whole, EXACT)
    for name in ("tokens", "loss", "weight", "clipped", "rl_groups", "prompt_share"):
        torch.testing.assert_close(found[2][name], whole[2][name])


def test_accumulation_gives_the_same_gradient(models):
    model, twin = models["qwen3", torch.float64]
    config = make_config()
    objective = PactObjective(config)
    groups = with_logprobs(twin, make_groups(config.anchor_mode), config)
    whole = run(model, groups, config, 0.3)
    micro = [groups[:2], groups[2:3], groups[3:]]
    denominators = sum((objective.denominators(part) for part in micro), Denominators())
    assert denominators == objective.denominators(groups)
    model.zero_grad(set_to_none=True)
    total = 0.0
    for part in micro:
        for batch in objective.build(part, 0.3, denominators=denominators):
            loss = objective.loss(model, batch).loss
            loss.backward()
            total += loss.item()
    assert_same((total, gradients(model)), whole, EXACT)


@pytest.mark.parametrize("budget", [None, 60])
def test_dense_way_gives_the_same_gradient(models, budget):
    model, twin = models["qwen3", torch.float64]
    config = make_config(anchor_mode="mixture")
    groups = with_logprobs(twin, make_groups(config.anchor_mode), config)
    whole = run(model, groups, config, 0.3)
    found = run(model, groups, replace(config, one_pass=False, token_budget=budget), 0.3)
    assert_same(found, whole, EXACT)
    assert found[2]["unique_tokens"] == found[2]["dense_tokens"] == whole[2]["dense_tokens"] > whole[2]["unique_tokens"]


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0, 1), st.booleans(), st.booleans())
def test_random_groups_equal_the_oracle(models, seed, n_groups, progress, fixed, old):
    rng = np.random.default_rng(seed)
    groups = [
        make_group(
            rng, rollouts=int(rng.integers(0 if trace else 1, 4)), trace=trace, branch=str(branch) if fixed else None
        )
        for trace, branch in zip(rng.random(n_groups) < 0.7, rng.choice(["prompt", "trace"], n_groups))
    ]
    compare(
        models, "qwen3", torch.float64, make_config(anchor_mode="sample" if fixed else "mixture"), progress, old, groups
    )


# -- branches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor_mode", ["sample", "mixture"])
def test_a_model_that_no_tree_fits_has_the_same_loss_the_dense_way(anchor_mode):
    """A window shorter than the sequences."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(vocab_size=VOCAB, **sizes, num_key_value_heads=2, sliding_window=8)
    ).double()
    dense, config = make_config(anchor_mode=anchor_mode, one_pass=False), make_config(anchor_mode=anchor_mode)
    groups = with_logprobs(reference_of(model), make_groups(anchor_mode), dense)
    with pytest.raises(ValueError, match="slides over 8 tokens"):
        run(model, groups, config, 0.3)
    expected = loss_and_gradients(reference_of(model), groups, dense, 0.3)
    assert_same(run(model, groups, dense, 0.3), expected, EXACT)


def test_a_trace_over_the_context_takes_the_prompt_branch(models):
    groups = make_groups()
    group = groups[1]  # asks for the trace-conditioned branch
    rollout = max(len(r.ids) for r in group.rollouts)
    prompt = len(group.head_ids) + len(group.suffix_ids)
    limit = max(prompt + len(group.context_ids) + rollout - 1, prompt + len(group.trace.ids))
    group.context_ids *= 1 + limit // len(group.context_ids)
    limit = max(limit, *(len(g.head_ids) + 2 + len(g.trace.ids) for g in groups if g.trace))
    config = make_config(context_length=limit)
    compare(models, "qwen3", torch.float64, config, 0.3, groups=groups)
    _, _, metrics = run(models["qwen3", torch.float64][0], groups, config, 0.3)
    assert metrics["context_overflow"] == 1
    flat = flatten_metrics(metrics)
    assert flat["context_overflow"] == 1
    assert flat["anchor/prompt_share"] == 0.75  # prompt, overflow, no trace; the fourth is trace-conditioned


def test_branches_are_drawn_with_probability_q():
    rng = np.random.default_rng(0)
    groups = [Group([1], [2], [3], None, [Rollout([4], [1], [1.0])]) for _ in range(2000)]
    PactObjective(PactConfig(anchor_q=0.3)).assign_branches(groups, torch.Generator().manual_seed(0))
    assert np.mean([group.branch == "prompt" for group in groups]) == pytest.approx(0.3, abs=0.04)
    again = [replace(group, branch=None) for group in groups]
    # What the other groups hold does not move a group's draw.
    again[0] = make_group(rng, trace=False)
    PactObjective(PactConfig(anchor_q=0.3)).assign_branches(again, torch.Generator().manual_seed(0))
    assert [group.branch for group in again[1:]] == [group.branch for group in groups[1:]]
    assert again[0].branch == "prompt"


def test_assigned_branches_stay_and_build_draws_the_open_ones():
    config = PactConfig(kl_coef=0)
    objective = PactObjective(config)
    groups = [Group([1], [2], [3], None, [Rollout([4, 5], [1, 1], [1.0, 1.0])], branch="prompt") for _ in range(20)]
    objective.assign_branches(groups, torch.Generator().manual_seed(0))
    assert {group.branch for group in groups} == {"prompt"}
    for group in groups:
        group.branch = None
    drawn = [objective.build(groups, 0.0, torch.Generator().manual_seed(7))[0].terms.branch for _ in range(2)]
    torch.testing.assert_close(*drawn)
    assert set(drawn[0].tolist()) == {PROMPT_BRANCH, TRACE_BRANCH}
    assert all(group.branch is None for group in groups)


def test_mixture_leaves_branches_open():
    groups = [Group([1], [2], [3], None, [Rollout([4], [1], [1.0])])]
    objective = PactObjective(PactConfig(anchor_mode="mixture", anchor_q=0.3))
    objective.assign_branches(groups)
    assert groups[0].branch is None
    assert branch_weights(groups[0], objective.config, 0.9) == {"prompt": 0.3, "trace": 0.7}


# -- log-probs and diagnostics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 40])
def test_attached_logprobs_are_the_models(models, budget):
    model, twin = models["qwen3", torch.float64]
    model.zero_grad(set_to_none=True)
    groups = make_groups()
    PactObjective(make_config(token_budget=budget)).attach_logprobs(
        model, groups, "ref_logp", branches=("prompt", "trace")
    )
    for group in groups:
        branches = {"prompt", "trace"} if group.context_ids else {"prompt"}
        for rollout in group.rollouts:
            assert rollout.ref_logp.keys() == branches
            for branch, values in rollout.ref_logp.items():
                logp, _ = token_logprobs(twin, prompt_of(group, branch), rollout.ids)
                expected = torch.where(torch.tensor(rollout.sampled).bool(), logp, 0.0)
                torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), expected, rtol=EXACT, atol=EXACT)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (make_config(), ["prompt", "trace", "prompt", "trace"]),
        (make_config(anchor_mode="mixture"), ["prompt", "trace", "prompt", "trace"]),
        (make_config(ratio_reference="behavior"), ["prompt"] * 4),
    ],
)
def test_attach_fills_what_build_reads(models, config, expected):
    model, _ = models["qwen3", torch.float64]
    groups = make_groups()
    objective = PactObjective(config)
    objective.attach_logprobs(model, groups, "old_logp")
    objective.attach_logprobs(model, groups, "ref_logp")
    acting = [group for group in groups if group.rollouts]
    assert [next(iter(group.rollouts[0].old_logp)) for group in acting] == expected
    objective.build(groups, 0.5)
    for group in groups:
        group.branch = None
    objective.attach_logprobs(model, groups, "ref_logp")
    objective.attach_logprobs(model, groups, "old_logp")
    for seed in range(4):
        objective.build(groups, 0.5, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head_backend", ["torch", "triton"])
def test_attached_logprobs_take_the_chosen_head(models, head_backend, monkeypatch):
    model, _ = models["qwen3", torch.float32]
    seen = []
    monkeypatch.setattr(
        "pact.objective.linear_logprob", lambda *a, **k: seen.append(k["backend"]) or linear_logprob(*a, **k)
    )
    groups = make_groups()
    PactObjective(make_config(head_backend=head_backend)).attach_logprobs(model, groups, "old_logp")
    assert seen
    assert set(seen) == {head_backend}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attached_old_values_make_the_first_step_on_policy(models, dtype):
    model, _ = models["qwen3", dtype]
    config = make_config(kl_coef=0.0)
    groups = make_groups()
    without = run(model, groups, config, 0.3)
    PactObjective(config).attach_logprobs(model, groups, "old_logp")
    attached = run(model, groups, config, 0.3)
    assert_same(attached, without, TOLERANCE[dtype])
    assert torch.equal(without[2]["ratio"][RL], without[2]["tokens"][RL])  # exactly 1 each
    torch.testing.assert_close(attached[2]["ratio"], without[2]["ratio"], rtol=1e-5, atol=0)


def test_latent_trace_bound(models):
    model, twin = models["qwen3", torch.float64]
    groups = make_groups()
    found = PactObjective(PactConfig(token_budget=60)).latent_trace(model, groups)
    rows = []
    for group in (groups[0], groups[1], groups[4]):
        produced = torch.isin(torch.tensor(group.trace.component), torch.tensor([1, 2, 4]))
        trace, _ = token_logprobs(twin, prompt_of(group, "prompt"), group.trace.ids)
        for rollout in group.rollouts:
            mask = torch.tensor(rollout.sampled).bool()
            alone, given_trace = (
                token_logprobs(twin, prompt_of(group, b), rollout.ids)[0][mask].sum().item()
                for b in ("prompt", "trace")
            )
            rows.append((trace[produced].sum().item(), alone, given_trace))
    trace, alone, given_trace = np.mean(rows, axis=0)
    assert found == pytest.approx(
        {
            "latent/logp_trace": trace,
            "latent/logp_rollout": alone,
            "latent/logp_rollout_given_trace": given_trace,
            "latent/bound": trace + given_trace,
            "latent/gap": trace + given_trace - alone,
            "latent/rollouts": len(rows),
        }
    )
    assert PactObjective().latent_trace(model, groups[2:4]) == {}


# -- metrics and work --------------------------------------------------------------------------------------------------


def test_metrics_add_up(models):
    model, twin = models["qwen3", torch.float64]
    config = make_config()
    groups = with_logprobs(twin, make_groups(config.anchor_mode), config)
    loss, _, metrics = run(model, groups, config, 0.0)
    flat = flatten_metrics(metrics)
    assert flat["loss/rl_prompt"] + flat["loss/rl_trace"] + flat["loss/sft"] == pytest.approx(loss)
    by_branch = {"prompt": (groups[0], groups[2]), "trace": (groups[1], groups[4])}
    for branch, members in by_branch.items():
        assert flat[f"tokens/rl_{branch}"] == sum(sum(r.sampled) for group in members for r in group.rollouts)
        assert 0 < flat[f"clip_fraction/{branch}"] < 1
        assert flat[f"kl/{branch}"] > 0
        assert 0 < flat[f"entropy/{branch}"] < math.log(VOCAB)
        assert {f"entropy/{branch}_{part}" for part in ("reasoning", "tool_call", "answer")} <= flat.keys()
    traces = [group.trace for group in groups if group.trace]
    assert flat["tokens/sft_reasoning"] == sum(t.component.count(Component.REASONING) for t in traces)
    assert flat["tokens/sft_answer"] == 0
    assert "logp/sft_answer" not in flat
    assert flat["logp/sft_reasoning"] < 0
    assert flat["tokens/unique_dense_ratio"] == flat["tokens/unique"] / flat["tokens/dense"] < 1
    assert flatten_metrics(metrics, steps=2)["loss/sft"] == flat["loss/sft"] / 2
    assert flatten_metrics(metrics, steps=2)["kl/trace"] == flat["kl/trace"]


def test_what_is_annealed_out_is_not_computed_unless_monitored(models):
    model, _ = models["qwen3", torch.float64]
    config = make_config(kl_coef=0.0, entropy_coef=0.0, tool_call_weight=(1.0, 0.0))
    groups = make_groups()
    (lean,) = PactObjective(config).build(groups, 1.0)
    assert set(lean.terms.kind.tolist()) == {RL}
    quiet, watched = run(model, groups, config, 1.0), run(model, groups, config, 1.0, monitor=True)
    assert_same(watched, quiet, EXACT)
    flat = flatten_metrics(watched[2])
    assert flat["logp/sft_reasoning"] < 0
    assert flat["loss/sft"] == 0
    assert "entropy/prompt" in flat
    assert "entropy/prompt" not in flatten_metrics(quiet[2])
    assert "kl/prompt" not in flat
    both = dict(watched[2])
    add_metrics(both, quiet[2])
    assert flatten_metrics(both, steps=2)["entropy/prompt"] == flat["entropy/prompt"]


@pytest.mark.parametrize("anneal", REASONING_ANNEALS)
def test_however_reasoning_is_annealed_the_denominator_counts_all_of_it(anneal):
    config = PactConfig(kl_coef=0, reasoning_anneal=anneal)
    trace = TokenizedTrace([3, 4, 5, 6, 7, 8], [1, 1, 1, 1, 2, 4], [0, 0, 0, 1, -1, -1])
    group = Group([1], [2], None, trace, [])
    objective = PactObjective(config)
    assert objective.denominators([group]) == Denominators(0.0, 5.0)
    (batch,) = objective.build([group], 0.5)
    reasoning = {"segment": [1, 1, 1], "token": [1, 1], "linear": [0.5] * 4, "none": [1] * 4, "off": []}[anneal]
    assert (5 * batch.terms.weight).tolist() == pytest.approx([*reasoning, 0.5])


def test_nothing_to_learn_gives_no_batch():
    config = PactConfig(kl_coef=0, tool_call_weight=(1, 0))
    trace = TokenizedTrace([3, 4], [1, 2], [0, -1])
    assert PactObjective(config).build([Group([1], [2], None, trace, [])], 1.0) == []


def test_only_what_predictions_need_is_computed():
    rollout = Rollout([10, 11, 12, 13], [1, 0, 1, 0], [1.0] * 4)
    trace = TokenizedTrace([20, 21, 22, 23], [1, 2, 3, 4], [0, -1, -1, -1])
    (batch,) = PactObjective(PactConfig(kl_coef=0)).build([Group([1, 2], [3], None, trace, [rollout])], 0.0)
    # prompt 1 2 3, then 10 11 (predict 12) and 20 (predicts 21): nothing behind the last prediction
    assert sorted(batch.tree.input_ids.tolist()) == [1, 2, 3, 10, 11, 20]
    assert batch.tokens == 6
    pairs = sorted(zip(batch.tree.input_ids[batch.plan.rows].tolist(), batch.plan.target.tolist()))
    assert pairs == [(3, 10), (3, 20), (11, 12), (20, 21)]
    assert batch.terms.kind.tolist().count(SFT) == 2


# -- bad input at the model --------------------------------------------------------------------------------------------


def test_ids_outside_the_vocabulary(models):
    model, _ = models["qwen3", torch.float32]
    objective = PactObjective(PactConfig(kl_coef=0))
    for bad in (
        Group([VOCAB], [1], rollouts=[Rollout([2], [1], [1.0])]),
        Group([1], [1], rollouts=[Rollout([VOCAB], [1], [1.0])]),
    ):
        (batch,) = objective.build([bad], 0.0)
        with pytest.raises(ValueError, match=f"token id {VOCAB} is outside the model's vocabulary of {VOCAB}"):
            objective.loss(model, batch)


def test_longer_than_the_model(models):
    model, _ = models["qwen3", torch.float32]
    objective = PactObjective(PactConfig(kl_coef=0))
    (batch,) = objective.build([Group([1] * 300, [1], rollouts=[Rollout([2], [1], [1.0])])], 0.0)
    with pytest.raises(ValueError, match="max_position_embeddings is 256"):
        objective.loss(model, batch)


def test_the_model_is_left_as_it_was(models):
    model, twin = models["qwen3", torch.float64]
    fresh = copy.deepcopy(twin)
    run(model, make_groups(), make_config(kl_coef=0.0), 0.3)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(model(ids).logits, fresh(ids).logits, rtol=EXACT, atol=EXACT)
