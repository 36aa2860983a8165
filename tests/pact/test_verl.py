"""PACT in verl's shapes against the objective, in float64: rows, loss, denominators, fused head. Needs no verl."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import make_config, make_groups, make_model, reference_of, with_logprobs
from verl_rows import all_rows, columns_of

from pact.groups import Denominators
from pact.integrations.verl import (
    COLUMNS,
    SUPERVISED,
    TRACE_CONTEXT,
    WEIGHT,
    ActorLoss,
    check_config,
    count_denominators,
    expert_row,
    group_of,
    head_log_probs,
    padded_columns,
    padded_loss,
    policy_loss,
)
from pact.objective import PactConfig, PactObjective
from pact_kernels.terms import RL, TRACE_BRANCH

AGGREGATION = {"token": "token-mean", "sequence": "seq-mean-token-mean", "constant": "seq-mean-token-sum-norm"}


@pytest.fixture(scope="module")
def model():
    return reference_of(make_model())


def padded(rows):
    """Rows -> the columns that verl would hold, right-padded to the longest response; garbage in the padding."""
    width = max(len(row.response_ids) for row, _ in rows)
    fill = {"old_log_probs": math.nan, "ref_log_prob": math.nan}
    columns = {
        name: torch.tensor([[*row, *[fill.get(name, 0.0)] * (width - len(row))] for row in values]).double()
        for name, values in columns_of(rows).items()
    }
    return columns | {"response_mask": columns["response_mask"].long()}


def dense_log_probs(model, rows, temperature=1.0):
    """Log-probs and entropies [B, T] of every response token, one dense forward a row."""
    width = max(len(row.response_ids) for row, _ in rows)
    found = []
    for row, _ in rows:
        ids = torch.tensor([*row.prompt_ids, *row.response_ids])
        logits = model(ids[None]).logits[0, len(row.prompt_ids) - 1 : -1].double() / temperature
        logp = logits.log_softmax(-1)
        pair = torch.stack([logp.gather(-1, ids[len(row.prompt_ids) :, None])[:, 0], -(logp.exp() * logp).sum(-1)])
        found.append(torch.nn.functional.pad(pair, (0, width - pair.shape[1])))
    return torch.stack(found).unbind(1)


CASES = {
    "paper": ({}, 0.3),
    "last step": ({}, 1.0),
    "mixture": ({"anchor_mode": "mixture", "anchor_q": 0.3}, 0.4),
    "prompt only": ({"anchor_mode": "mixture", "anchor_q": 1.0, "sft_coef": 0.0}, 0.0),
    "sequence": ({"loss_norm": "sequence", "anchor_mode": "mixture"}, 0.2),
    "constant": ({"loss_norm": "constant", "norm_length": 12.0, "answer_weight": 0.5}, 0.2),
    "linear": ({"reasoning_anneal": "linear", "clip_low": 0.1, "clip_high": 0.4}, 0.7),
    "token": ({"reasoning_anneal": "token"}, 0.6),
    "no reasoning": ({"reasoning_anneal": "off"}, 0.3),
    "hot": ({"temperature": 1.3, "kl_coef": 0.0, "entropy_coef": 0.0}, 0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_and_padded_loss_are_the_objective(model, case):
    settings, progress = CASES[case]
    config = make_config(**settings)
    groups = with_logprobs(model, make_groups(config.anchor_mode), config)
    objective = PactObjective(config)
    (batch,) = objective.build(groups, progress)
    expected = objective.loss(model, batch)
    gradients = torch.autograd.grad(expected.loss, list(model.parameters()))

    rows = all_rows(groups, config, progress)
    columns = padded(rows)
    actor = ActorLoss(
        config.clip_low,
        config.clip_high,
        config.kl_coef,
        config.entropy_coef,
        AGGREGATION[config.loss_norm],
        scale=config.norm_length,
    )
    z = count_denominators(columns, actor)
    wanted = objective.denominators(groups)
    assert z.rl == pytest.approx(wanted.rl, rel=1e-6)
    assert z.sft == (wanted.sft if config.sft_coef else 0.0)
    log_prob, entropy = dense_log_probs(model, rows, config.temperature)
    found = padded_loss(log_prob, columns, z, actor, entropy)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found.loss, list(model.parameters())), gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
    trace_tokens = found.metrics["tokens"][RL, TRACE_BRANCH].sum()
    assert (trace_tokens > 0) == (case != "prompt only")


def test_micro_batches_and_processes_add_up(model):
    config = make_config()
    groups = with_logprobs(model, make_groups(), config)
    rows = all_rows(groups, config, 0.2)
    columns = padded(rows)
    actor = ActorLoss(kl_coef=config.kl_coef, entropy_coef=config.entropy_coef)
    with torch.no_grad():
        log_prob, entropy = dense_log_probs(model, rows)
    cuts = [slice(0, 1), slice(1, 6), slice(6, None)]
    parts = [{name: value[cut] for name, value in columns.items()} for cut in cuts]
    z = sum((count_denominators(part, actor) for part in parts), Denominators())
    assert z == count_denominators(columns, actor)
    whole = padded_loss(log_prob, columns, z, actor, entropy)
    losses = [padded_loss(log_prob[cut], part, z, actor, entropy[cut]).loss for cut, part in zip(cuts, parts)]
    assert sum(losses).item() == pytest.approx(whole.loss.item(), rel=1e-12)


def test_a_micro_batch_without_tokens_has_loss_zero_and_a_graph():
    log_prob = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    columns = {name: torch.zeros(2, 3) for name in ("response_mask", "old_log_probs", "advantages", *COLUMNS)}
    padded_loss(log_prob, columns, Denominators(5.0, 2.0), ActorLoss()).loss.backward()
    assert log_prob.grad.abs().max() == 0


def nested(rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def test_rows_copied_to_fill_a_batch_weigh_nothing():
    """verl fills batches with copies of a real row, its response cut to one token, our columns as they were."""
    data = {
        "response_mask": nested([[1, 0, 1], [0, 0], [0]]),
        "old_log_probs": nested([[-1.0, -2.0, -3.0], [-1.0, -1.0], [-9.0]]),
        "advantages": nested([[1.0, 1.0, 1.0], [0.0, 0.0], [5.0]]),
        WEIGHT: nested([[1.0, 0.0, 1.0], [0.5, 0.2], [0.5, 0.2]]),
        SUPERVISED: nested([[0.0, 0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]),
        TRACE_CONTEXT: nested([[1.0, 1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]),
    }
    columns = padded_columns(data)
    assert {tuple(value.shape) for value in columns.values()} == {(3, 3)}
    assert columns[WEIGHT].tolist() == [[1, 0, 1], [0.5, pytest.approx(0.2), 0], [0, 0, 0]]
    z = count_denominators(columns, ActorLoss())
    assert z == Denominators(2.0, 2.0)
    log_prob = torch.full((3, 3), -2.0, dtype=torch.float64, requires_grad=True)
    padded_loss(log_prob, columns, z, ActorLoss(clip_low=1.0, clip_high=9.0)).loss.backward()
    ratio = math.exp(-1.0)
    expected = [[-ratio / 2, 0, -math.e / 2], [-0.25, -0.1, 0], [0, 0, 0]]
    torch.testing.assert_close(log_prob.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_rows_of_one_length_come_stacked():
    data = {name: torch.ones(2, 4) for name in ("old_log_probs", "advantages", *COLUMNS)}
    data["response_mask"] = nested([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert padded_columns(data)[WEIGHT].tolist() == [[1.0] * 4] * 2


def test_expert_rows_carry_no_sampled_token_and_the_annealed_weights():
    (group, *_) = make_groups()
    row = expert_row(group, PactConfig(sft_coef=0.5), 0.0)
    assert row.prompt_ids == [*group.head_ids, *group.suffix_ids]
    assert row.response_ids == group.trace.ids
    assert not any(row.mask)
    weights = {
        component: {w for w, c in zip(row.columns[WEIGHT], group.trace.component) if c == component}
        for component in set(group.trace.component)
    }
    assert weights == {0: {0.0}, 1: {0.5}, 2: {0.4}, 3: {0.0}, 4: {0.0}}
    assert expert_row(group, PactConfig(sft_coef=0.0), 0.0) is None
    assert sum(expert_row(group, PactConfig(), 1.0).columns[SUPERVISED]) == sum(row.columns[SUPERVISED])


@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_policy_loss_is_a_padded_loop(mode):
    torch.manual_seed(0)
    log_prob = (torch.randn(4, 6, dtype=torch.float64) - 2).requires_grad_()
    old, advantage = log_prob.detach() + 0.4 * torch.randn(4, 6), torch.randn(4, 6, dtype=torch.float64)
    mask = torch.tensor([[1] * 6, [1, 0, 1, 1, 0, 0], [0] * 6, [0, 1, 1, 0, 0, 0]])
    correction = torch.rand(4, 6, dtype=torch.float64)
    info = {"dp_size": 2, "batch_num_tokens": 30, "global_batch_size": 8, "loss_scale_factor": None}
    config = actor_config(global_batch_info=info, clip_ratio_c=1.1)
    loss, metrics = policy_loss(old, log_prob, advantage, mask, mode, config, correction)
    total = 0.0
    for b in range(4):
        tokens = [t for t in range(6) if mask[b, t]]
        for t in tokens:
            ratio, a = (log_prob[b, t] - old[b, t]).exp().item(), advantage[b, t].item()
            surrogate = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            value = -(max(surrogate, 1.1 * a) if a < 0 else surrogate) * correction[b, t].item()
            per_sequence = 8 * len(tokens) if mode == "seq-mean-token-mean" else 8
            total += value / {"token-mean": 30, "token-sum": 1}.get(mode, per_sequence)
    assert loss.item() == pytest.approx(2 * total, rel=1e-6)
    assert 0 < metrics["actor/pg_clipfrac"] < 1
    assert metrics["actor/pg_clipfrac_lower"] > 0


def actor_config(**changes):
    """The attributes of verl's ActorConfig that are read, with its defaults."""
    values = {
        "clip_ratio": 0.2,
        "clip_ratio_low": None,
        "clip_ratio_high": None,
        "entropy_coeff": 0.0,
        "loss_agg_mode": "token-mean",
        "kl_loss_type": "low_var_kl",
        "kl_loss_coef": 0.001,
        "use_kl_loss": False,
        "loss_scale_factor": None,
        "global_batch_info": {},
    } | changes
    return SimpleNamespace(**values, get=lambda name, default=None: values.get(name, default))


def test_settings_are_read_and_refused():
    actor = ActorLoss.of(actor_config(clip_ratio_high=0.3, use_kl_loss=True, kl_loss_coef=0.01, entropy_coeff=0.002))
    assert actor == ActorLoss(0.2, 0.3, 0.01, 0.002, clip_dual=3.0)
    assert ActorLoss.of(actor_config(clip_ratio_c=5.0)).clip_dual == 5.0
    with pytest.raises(ValueError, match=r"kl_loss_type='mse'.*low_var_kl"):
        ActorLoss.of(actor_config(use_kl_loss=True, kl_loss_type="mse"))
    with pytest.raises(ValueError, match="loss_agg_mode='mean' is not one of"):
        ActorLoss(aggregation="mean")
    with pytest.raises(ValueError, match=r"needs actor\.loss_scale_factor"):
        ActorLoss.of(actor_config(loss_agg_mode="seq-mean-token-sum-norm"))
    for settings, mend in (
        ({"sft_token_weight": "phi"}, "use none"),
        ({"sft_schedule": "chord"}, "use constant"),
        ({"ratio_reference": "behavior"}, "bypass_mode=True"),
    ):
        with pytest.raises(ValueError, match=mend):
            check_config(PactConfig(**settings))


def test_wrong_batches_are_refused():
    ones = {name: torch.ones(1, 2) for name in ("response_mask", "old_log_probs", "advantages", *COLUMNS)}
    log_prob, z = torch.zeros(1, 2), Denominators(2.0, 0.0)
    with pytest.raises(ValueError, match="rollout_is_weights compare"):
        padded_loss(log_prob, ones | {"rollout_is_weights": torch.ones(1, 2)}, z, ActorLoss())
    with pytest.raises(ValueError, match="use_kl_loss needs ref_log_prob"):
        padded_loss(log_prob, ones, z, ActorLoss(kl_coef=0.1))
    with pytest.raises(ValueError, match=r"denominators\.rl=0\.0 but there are rl tokens"):
        padded_loss(log_prob, ones, Denominators(), ActorLoss())
    config = actor_config(global_batch_info={"dp_size": 2})
    with pytest.raises(ValueError, match="dp_size > 1 needs"):
        policy_loss(*[torch.ones(1, 2)] * 4, config=config)
    with pytest.raises(ValueError, match="a prompt of 3 tokens that PACT's training template renders as 2 others"):
        group_of([1], [2], [1, 2, 3])
    assert group_of([1], [2], [1, 2], context_ids=[5]).context_ids == [5]


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_the_fused_head_is_log_softmax(architecture):
    lm = make_model(architecture)
    hidden = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(61, (2, 5))
    found = head_log_probs(lm, hidden, labels, temperature=0.7)
    logits = (lm.lm_head(hidden) / 0.7).log_softmax(-1)
    expected = logits.gather(-1, labels[..., None])[..., 0], -(logits.exp() * logits).sum(-1)
    parameters = [hidden, lm.lm_head.weight]
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    sums = [logp.sum() - 0.3 * entropy.square().sum() for logp, entropy in (found, expected)]
    for ours, theirs in zip(*(torch.autograd.grad(total, parameters) for total in sums)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
