"""Settings and groups that cannot be trained on: one error each, which names the field or the place."""

import math
from dataclasses import replace

import pytest

from pact.groups import Denominators, Group, PactConfig, Rollout, count_denominators
from pact.objective import PactObjective
from pact.trace import TokenizedTrace

PLAIN = PactConfig(kl_coef=0.0)
ROLLOUT = Rollout([4, 5, 6], [1, 0, 1], [0.5, 0.0, 0.5])
TRACE = TokenizedTrace([7, 8, 9], [1, 2, 4], [0, -1, -1])
GROUP = Group([1, 2], [3], [10, 11], TRACE, [ROLLOUT])


def test_defaults_are_the_papers():
    config = PactConfig()
    assert (config.anchor_q, config.anchor_mode, config.sft_coef) == (0.4, "sample", 1.0)
    assert (config.reasoning_anneal, config.tool_call_weight, config.answer_weight) == ("segment", (0.8, 0.2), 0.0)
    assert (config.clip_low, config.clip_high, config.kl_coef, config.entropy_coef) == (0.2, 0.2, 0.001, 0.001)
    assert (config.ratio_reference, config.loss_norm, config.temperature) == ("trace", "token", 1.0)
    assert (config.token_budget, config.one_pass) == (None, True)
    assert PactConfig(tool_call_weight=[1, 1]).tool_call_weight == (1, 1)


@pytest.mark.parametrize("anneal", ["segment", "token", "linear", "none", "off"])
def test_ways_to_anneal_reasoning_are_settings(anneal):
    assert PactConfig(reasoning_anneal=anneal).reasoning_anneal == anneal


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("anchor_q", 1.5),
        ("anchor_q", math.nan),
        ("anchor_q", "0.4"),
        ("anchor_mode", "both"),
        ("sft_coef", -1.0),
        ("reasoning_anneal", "cosine"),
        ("tool_call_weight", 0.8),
        ("tool_call_weight", (0.8, 0.5, 0.2)),
        ("tool_call_weight", (0.8, -0.2)),
        ("answer_weight", -0.1),
        ("clip_low", 1.2),
        ("clip_high", -0.2),
        ("clip_dual", 1.0),
        ("kl_coef", -0.001),
        ("entropy_coef", math.inf),
        ("ratio_reference", "old"),
        ("loss_norm", "mean"),
        ("norm_length", 0),
        ("temperature", 0.0),
        ("token_budget", 0),
        ("token_budget", 1.5),
        ("context_length", -1),
        ("context_observations", "false"),
    ],
)
def test_bad_settings_name_their_field(name, value):
    with pytest.raises(ValueError, match=f"^{name}=") as error:
        PactConfig(**{name: value})
    assert "\n" not in str(error.value)


def rollout(**changes):
    return replace(GROUP, rollouts=[replace(ROLLOUT, **changes)])


BAD_GROUPS = {
    "no groups": ([], "there are no groups"),
    "nothing in it": ([GROUP, Group([1], [2])], "group 1 has no rollouts and no trace"),
    "empty prompt": ([replace(GROUP, head_ids=[], suffix_ids=[])], "group 0 has an empty prompt"),
    "branch": ([replace(GROUP, branch="both")], "group 0: branch='both'"),
    "branch without context": ([replace(GROUP, context_ids=None, branch="trace")], "group 0 asks for the trace"),
    "ragged sampled": ([rollout(sampled=[1, 1])], "rollout 0: sampled has 2 entries for 3 ids"),
    "ragged advantage": ([rollout(advantage=[1.0])], "rollout 0: advantage has 1 entries for 3 ids"),
    "ragged component": ([rollout(component=[1])], "rollout 0: component has 1 entries"),
    "ragged old": ([rollout(old_logp={"prompt": [0.0]})], r"rollout 0: old_logp\['prompt'\] has 1 entries"),
    "unknown key": ([rollout(ref_logp={"both": [0.0] * 3})], "ref_logp has the key 'both'"),
    "NaN advantage": ([rollout(advantage=[0.0, 0.0, math.nan])], "advantage holds NaN or infinity"),
    "component": ([rollout(component=[1, 9, 1])], r"component must lie in 0..4"),
    "text for ids": ([rollout(ids=["a", "b", "c"])], "rollout ids must be a list of token ids"),
    "float ids": ([replace(GROUP, head_ids=[1.0])], "must be a list of token ids"),
    "negative id": ([rollout(ids=[4, -5, 6])], "negative token id -5"),
    "ragged trace": ([replace(GROUP, trace=replace(TRACE, segment=[0]))], "trace: segment has 1 entries for 3 ids"),
    "no segment": ([replace(GROUP, trace=replace(TRACE, segment=[-1] * 3))], "reasoning token has no segment"),
    "NaN old": ([rollout(old_logp={"prompt": [math.nan] * 3, "trace": [math.nan] * 3})], "holds NaN or infinity on"),
    "old of some": ([GROUP, rollout(old_logp={"prompt": [0.0] * 3, "trace": [0.0] * 3})], "set on 1 of 2 rollouts"),
    "old of the other branch": (
        [replace(rollout(old_logp={"trace": [0.0] * 3}), branch="prompt")],
        "old_logp of the prompt",
    ),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_bad_groups_are_one_clear_error(case):
    groups, message = BAD_GROUPS[case]
    with pytest.raises(ValueError, match=message) as error:
        PactObjective(PLAIN).build(groups, 0.0)
    assert "\n" not in str(error.value)


def test_kl_needs_reference_values():
    with pytest.raises(ValueError, match=r"kl_coef > 0 needs ref_logp of the (prompt|trace) branch"):
        PactObjective(PactConfig()).build([GROUP], 0.0)
    PactObjective(PactConfig()).build([replace(GROUP, rollouts=[])], 0.0)  # plain SFT needs none


def test_behavior_ratio_needs_prompt_only_values():
    objective = PactObjective(replace(PLAIN, ratio_reference="behavior"))
    with pytest.raises(ValueError, match="the ratio needs old_logp of the prompt branch"):
        objective.build([replace(GROUP, branch="trace")], 0.0)
    objective.build([replace(GROUP, branch="prompt")], 0.0)
    objective.build([replace(rollout(old_logp={"prompt": [-1.0] * 3}), branch="trace")], 0.0)


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_outside_the_run(progress):
    with pytest.raises(ValueError, match="progress"):
        PactObjective(PLAIN).build([GROUP], progress)


@pytest.mark.parametrize(("field", "denominators"), [("rl", Denominators(0, 1)), ("sft", Denominators(1, 0))])
def test_denominators_must_cover_the_groups(field, denominators):
    with pytest.raises(ValueError, match=rf"denominators.{field}=0 but group 0"):
        PactObjective(PLAIN).build([GROUP], 0.0, denominators=denominators)


@pytest.mark.parametrize("field", ["prompt", "old"])
def test_attach_knows_two_fields(field):
    with pytest.raises(ValueError, match="is not one of old_logp, ref_logp"):
        PactObjective(PLAIN).attach_logprobs(None, [GROUP], field)


@pytest.mark.parametrize(
    ("limit", "message"), [(5, "group 0, rollout 0: 6 tokens with the prompt exceed"), (6, None), (8, None)]
)
def test_prompts_longer_than_the_context(limit, message):
    config = replace(PLAIN, context_length=limit)
    if message is None:
        PactObjective(config).build([GROUP], 0.0)
        return
    with pytest.raises(ValueError, match=message):
        PactObjective(config).build([GROUP], 0.0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Denominators(4, 2)),
        ({"loss_norm": "sequence"}, Denominators(2, 2)),
        ({"loss_norm": "constant", "norm_length": 10}, Denominators(20, 2)),
        ({"answer_weight": 0.5}, Denominators(4, 3)),
        ({"anchor_mode": "mixture"}, Denominators(4, 2)),
    ],
)
def test_denominators(settings, expected):
    silent = Rollout([1], [0], [0.0])
    groups = [replace(GROUP, rollouts=[ROLLOUT, silent]), Group([1], [2], rollouts=[ROLLOUT])]
    assert count_denominators(groups, replace(PLAIN, **settings)) == expected
    assert Denominators(1, 2) + Denominators(3, 4) == Denominators(4, 6)
