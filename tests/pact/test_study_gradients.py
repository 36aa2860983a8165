"""How benchmarks/study_gradients.py takes gradients apart and compares them."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import make_groups, make_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import study_gradients
from study_gradients import PLAIN, TRACE, TRUE, compare, gradient, likelihoods

from pact.objective import PactObjective


def whole(model, groups, config):
    """The gradient of all batches after one backward of their sum."""
    objective = PactObjective(config)
    if config.ratio_reference == "behavior":
        objective.attach_logprobs(model, groups, field="old_logp")
    model.zero_grad()
    sum(objective.loss(model, batch).loss for batch in objective.build(groups, 0.0)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "config", [PLAIN, TRACE, replace(TRACE, ratio_reference="behavior"), replace(PLAIN, sft_coef=1.0)]
)
def test_groups_at_once_do_not_change_a_gradient(config, monkeypatch):
    model = make_model("qwen3", torch.float64)
    groups = make_groups("mixture")
    assert len(groups) > 1
    expected = whole(model, groups, config)
    monkeypatch.setattr(study_gradients, "AT_ONCE", 1)
    found = gradient(model, groups, config)
    assert expected.norm() > 0
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_branches_have_gradients_of_their_own():
    model, groups = make_model("qwen3", torch.float64), make_groups("mixture")
    found = [gradient(model, groups, config) for config in (PLAIN, TRACE, replace(TRACE, ratio_reference="behavior"))]
    for i in range(3):
        for j in range(i):
            assert study_gradients.cosine(found[i], found[j]) < 0.999


def test_comparison_sees_through_noise():
    """Halves are a signal plus noise three times as long; the true cosines are 1, 0.6 and 0, the gains 1, 1.2 and 0."""
    torch.manual_seed(0)
    size = 400_000
    signal, other = torch.randn(2, size, dtype=torch.float64)
    signals = {TRUE: signal, "near": 2.0 * (0.6 * signal + 0.8 * other), "apart": other}

    def noisy(vector):
        return vector + 3.0 * vector.norm() / size**0.5 * torch.randn(size, dtype=torch.float64)

    found = compare({name: (noisy(vector), noisy(vector)) for name, vector in signals.items()})
    for name, cosine, gain in ((TRUE, 1.0, 1.0), ("near", 0.6, 1.2), ("apart", 0.0, 0.0)):
        assert found[name]["halves"] == pytest.approx(0.1, abs=0.01)  # 1 / (1 + 9)
        assert found[name]["cosine"] == pytest.approx(cosine, abs=0.05)
        assert found[name]["gain"] == pytest.approx(gain, abs=0.05)


def episode(success, *observations):
    messages = [{"role": "tool", "content": text} for text in observations]
    return SimpleNamespace(score=SimpleNamespace(metrics={"success": success}), messages=messages)


def test_likelihoods_are_those_of_each_kind_of_rollout():
    model, groups = make_model("qwen3", torch.float64), make_groups("mixture")
    endings = [episode(1.0, "{}"), episode(1.0, "error: no", "{}"), episode(0.0, "error: no"), episode(0.0)]
    played = [[endings[(g + r) % 4] for r in range(len(group.rollouts))] for g, group in enumerate(groups)]
    found = likelihoods(model, groups, played)
    expected = {name: [] for name in ("right, no call failed", "right after a failed call", "wrong")}
    PactObjective(TRACE).attach_logprobs(model, groups)
    PactObjective(PLAIN).attach_logprobs(model, groups)
    assert any(group.trace is None for group in groups)  # they have no other likelihood
    for g, group in enumerate(groups):
        if group.trace is None:
            continue
        for r, rollout in enumerate(group.rollouts):
            name = list(expected)[min((g + r) % 4, 2)]
            expected[name].append([sum(rollout.old_logp["prompt"]), sum(rollout.old_logp["trace"])])
    assert set(found) == {name for name, pairs in expected.items() if pairs}
    assert sum(one["share"] for one in found.values()) == pytest.approx(1.0)
    for name, one in found.items():
        alone, given = torch.tensor(expected[name], dtype=torch.float64).mean(0).tolist()
        assert (one["prompt"], one["trace"]) == (pytest.approx(alone), pytest.approx(given))
        assert alone != pytest.approx(given)
