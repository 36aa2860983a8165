"""Truncated importance weights where engine and trainer differ: numbers, the loss they weigh, what the trainer logs."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny import make_config, make_groups, make_model
from trainer_setup import SteeredTrainer, make_trainer

from pact.correction import correct
from pact.objective import PactConfig, PactObjective, Rollout


def rollout(engine_logp, sampled=(1, 0, 1)):
    return Rollout([5, 6, 7], list(sampled), [1.0, 0.0, 1.0], engine_logp=engine_logp)


def test_weights_are_truncated_ratios_and_sums_describe_the_gap():
    one = rollout([-1.0, 99.0, -3.0])
    sums = correct([one], [[-0.5, 0.0, -3.25]], cap=1.5)
    assert one.correction == pytest.approx([1.5, 1.0, math.exp(-0.25)])  # the observation's number is not read
    gaps = [0.5, -0.25]
    assert sums == pytest.approx(
        {
            "tokens": 2,
            "engine_kl": sum(math.exp(gap) - 1 - gap for gap in gaps),
            "engine_ratio": sum(map(math.exp, gaps)),
            "engine_truncated": 1,
            "engine_gap": 0.75,
            "engine_gap_max": 0.5,
        }
    )


def test_cap_0_measures_only():
    one = rollout([-1.0, 0.0, -3.0])
    assert correct([one], [[-0.5, 0.0, -3.0]], cap=0.0)["engine_gap"] == pytest.approx(0.5)
    assert one.correction is None


@pytest.mark.parametrize(
    ("engine_logp", "ours", "message"),
    [(None, [0.0] * 3, "no engine_logp"), ([math.nan, 0.0, 0.0], [0.0] * 3, "not finite")],
)
def test_missing_and_broken_log_probs_are_refused(engine_logp, ours, message):
    with pytest.raises(ValueError, match=message):
        correct([rollout(engine_logp)], [ours], cap=2.0)


def test_the_loss_is_that_of_weighted_tokens():
    """With corrections c the RL term is sum c w l: the same as advantages times c where nothing else weighs a token."""
    model, config = make_model(), make_config(kl_coef=0.0, entropy_coef=0.0)
    rng = torch.Generator().manual_seed(0)
    corrected, scaled = make_groups(), make_groups()
    for ours, theirs in zip(corrected, scaled):
        for one, other in zip(ours.rollouts, theirs.rollouts):
            one.correction = (2 * torch.rand(len(one.ids), generator=rng, dtype=torch.float64)).tolist()
            other.advantage = [a * c for a, c in zip(other.advantage, one.correction)]
    losses = []
    for groups in (corrected, scaled):
        objective = PactObjective(config)
        model.zero_grad()
        for batch in objective.build(groups, 0.3):
            result = objective.loss(model, batch)
            result.loss.backward()
        losses.append((result.loss.item(), model.lm_head.weight.grad.clone()))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-12)
    assert torch.allclose(losses[0][1], losses[1][1], rtol=1e-10, atol=1e-14)


class OtherEngineTrainer(SteeredTrainer):
    """Samples with the model itself and says that the engine's log-probs were lower by 0.1."""

    def _make_engine(self):
        inner = super()._make_engine()

        class Engine:
            exact, max_batch, context_length = False, inner.max_batch, inner.context_length
            open = staticmethod(inner.open)

        return Engine()

    @contextmanager
    def _sampling(self):
        yield

    def score(self, tasks, episodes):
        lower = [[replace(one, logp=[p - 0.1 for p in one.logp]) for one in attempts] for attempts in episodes]
        return super().score(tasks, lower)


def test_an_engine_with_other_weights_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, kind=OtherEngineTrainer, max_engine_gap=0.09)
    with pytest.raises(RuntimeError, match=r"are 0\.1 nats a token apart, over max_engine_gap 0\.09"):
        trainer.train()
    make_trainer(tmp_path / "off", kind=OtherEngineTrainer, max_engine_gap=0.0, max_steps=1).train()


@pytest.mark.parametrize("settings", [{}, {"rollout_batch_steps": 2, "max_steps": 2}])
@pytest.mark.parametrize("reference", ["trace", "behavior"])
def test_the_trainer_logs_the_mismatch_and_weighs_by_it(tmp_path, settings, reference):
    config = PactConfig(anchor_q=0.5, ratio_reference=reference)
    trainer = make_trainer(tmp_path, kind=OtherEngineTrainer, config=config, engine_correction=1.05, **settings)
    groups = []
    build = trainer.objective.build
    trainer.objective.build = lambda batch, *args, **options: groups.extend(batch) or build(batch, *args, **options)
    trainer.train()
    log = next(line for line in trainer.state.log_history if "engine/gap" in line)
    assert log["engine/gap"] == pytest.approx(0.1, abs=1e-4)
    assert log["engine/ratio"] == pytest.approx(math.exp(0.1), abs=1e-4)
    assert log["engine/kl"] == pytest.approx(math.exp(0.1) - 1.1, abs=1e-4)
    assert log["engine/truncated"] == 1.0
    for one in (one for group in groups for one in group.rollouts):
        assert all(weight == 1.05 for weight, sampled in zip(one.correction, one.sampled) if sampled)
    assert {group.branch for group in groups} == {"prompt", "trace"}
