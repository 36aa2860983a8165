"""PACT in TRL's GRPOTrainer against TRL itself and against the objective, on tiny random models. Needs trl."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
import trl.trainer.grpo_trainer as of_trl
import trl_worker
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl_setup import arguments, largest_difference, make_trainer, rows, tokenizer_and_model, trace, weights

from pact.groups import PROMPT, TRACE
from pact.integrations.trl import PactGRPOTrainer, expert_messages, merged_config
from pact.objective import Group, PactConfig, PactObjective, Rollout
from pact.trace import render_context, render_prompt, render_trace

TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than matrices of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_order(monkeypatch):
    """TRL without its shuffle of samples, so that both trainers cut the same micro-batches."""
    monkeypatch.setattr(of_trl, "shuffle_sequence_dict", lambda batch: batch)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the model, from which TRL loads its reference."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer_and_model(folder)
    return folder


class Recording(PactGRPOTrainer):
    """Keeps what TRL generated, the groups made of it, and the weights at every generation."""

    def _micro_batches(self, inputs, batch):
        made = super()._micro_batches(inputs, batch)
        if not hasattr(self, "record"):
            self.record = []
        self.record.append((inputs, batch, made, copy.deepcopy(self.model)))
        return made


# -- without traces: TRL's own loss ------------------------------------------------------------------------------------

SAME_AS_TRL = {
    "one_step": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "iterations": {"num_iterations": 2, "max_steps": 2, "epsilon": 0.02, "epsilon_high": 0.05},
    "reused": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "max_steps": 4,
        "epsilon": 0.02,
    },
    "two_generations_a_step": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 2,
    },
    "kl": {"beta": 0.3, "use_bias_correction_kl": False, "num_iterations": 2, "max_steps": 2},
    "temperature": {"temperature": 0.7},
    "sequences": {"loss_type": "grpo", "num_iterations": 2, "max_steps": 2},
    "constant": {"loss_type": "dr_grpo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "truncated_masked": {"mask_truncated_completions": True, "max_completion_length": 3},
    "truncated_sequences": {"mask_truncated_completions": True, "max_completion_length": 3, "loss_type": "grpo"},
    "truncated_constant": {"mask_truncated_completions": True, "max_completion_length": 3, "loss_type": "dr_grpo"},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", SAME_AS_TRL)
def test_without_traces_and_terms_it_is_trl(name, tmp_path, in_order, saved):
    """Weights after SGD with rate 1: a gradient that is wrong by a factor is a weight that is wrong."""
    trainers = []
    for kind in (GRPOTrainer, PactGRPOTrainer):
        tokenizer, model = tokenizer_and_model()
        model.config._name_or_path = str(saved)  # equal weights: both are made with one seed
        trainer = make_trainer(tmp_path, kind=kind, model=model, tokenizer=tokenizer, **SAME_AS_TRL[name])
        before = weights(trainer)
        trainer.train()
        trainers.append(trainer)
    expected, found = trainers
    assert largest_difference(before, weights(expected)) > 0.01  # far above the tolerance
    assert largest_difference(weights(expected), weights(found)) < TOLERANCE
    for theirs, ours in zip(expected.state.log_history[:-1], found.state.log_history[:-1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["ratio/prompt"] == pytest.approx(1.0, abs=1e-6) or name in (
            "iterations",
            "reused",
            "kl",
            "sequences",
        )


def test_the_first_pass_is_exactly_on_policy_and_the_next_ones_clip(tmp_path):
    trainer = make_trainer(tmp_path, **SAME_AS_TRL["iterations"])
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["ratio/prompt"] == 1.0
    assert first["clip_fraction/prompt"] == 0.0
    assert second["clip_fraction/prompt"] > 0.0


# -- with traces: the objective on whole groups ------------------------------------------------------------------------


def by_hand(inputs, batch, branches, tokenizer, generations, observations=True):
    """Whole groups, made of TRL's padded batch with nothing of the integration."""
    groups = []
    for start in range(0, len(inputs), generations):
        row = inputs[start]
        head_ids, suffix_ids = render_prompt(row["prompt"], None, tokenizer)
        group = Group(head_ids, suffix_ids, branch=branches[start // generations])
        if row["expert"] is not None:
            group.context_ids = render_context(row["expert"], tokenizer, observations=observations)
            group.trace = render_trace(row["expert"], None, tokenizer)
        for i in range(start, start + generations):
            n = int(batch["completion_mask"][i].sum())
            sampled = batch["tool_mask"][i, :n].tolist() if "tool_mask" in batch else [1] * n
            ids, value = batch["completion_ids"][i, :n].tolist(), float(batch["advantages"][i])
            group.rollouts.append(Rollout(ids, sampled, [value] * n))
        groups.append(group)
    return groups


def branches_of(micro_batches, inputs, generations):
    """The branch of every prompt, which all parts of it must share; prompts are told by their ids."""
    seen = {}
    for group in (group for groups in micro_batches for group in groups):
        seen.setdefault((*group.head_ids,), set()).add(group.branch)
    assert all(len(found) == 1 for found in seen.values())
    assert len(seen) == len(inputs) // generations
    return [found.pop() for found in seen.values()]


def assert_gradient_is(trainer, groups, progress=0.0, reference=None):
    """The first step of SGD with rate 1 moved the weights by the gradient of L on whole ``groups``."""
    model = trainer.record[0][3]
    objective = PactObjective(trainer.pact)
    if reference is not None:
        objective.attach_logprobs(reference, groups, "ref_logp")
    model.zero_grad()
    sum(objective.loss(model, batch).loss for batch in objective.build(groups, progress)).backward()
    after = dict(trainer.model.named_parameters())
    moved = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            moved = max(moved, parameter.grad.abs().max().item())
            assert (parameter.detach() - parameter.grad - after[name].detach()).abs().max() < TOLERANCE, name
    assert moved > 0.01


@pytest.mark.parametrize("mode", ["sample", "mixture"])
def test_a_step_is_the_objective_on_whole_groups(mode, tmp_path, saved):
    """Four micro-batches of three rollouts: every prompt is cut, and so are its branch and its trace."""
    tokenizer, model = tokenizer_and_model(saved)
    observed = mode == "mixture"  # of both ways to show a trace, one here and one there
    trainer = make_trainer(
        tmp_path,
        PactConfig(anchor_q=0.5, anchor_mode=mode, sft_coef=0.6, context_observations=observed),
        kind=Recording,
        model=model,
        tokenizer=tokenizer,
        data=rows(3, without=(1,)),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        beta=0.2,
        use_bias_correction_kl=False,
        entropy_coef=0.05,
        seed=2,
    )
    trainer.train()
    inputs, batch, micro_batches, before = trainer.record[0]
    assert [len(groups) for groups in micro_batches] == [1, 2, 2, 1]
    branches = branches_of(micro_batches, inputs, 4)
    groups = by_hand(inputs, batch, branches, tokenizer, 4, observed)
    if mode == "sample":
        assert set(branches) == {PROMPT, TRACE}
    assert sum(group.trace is not None for part in micro_batches for group in part) == 2
    assert_gradient_is(trainer, groups, reference=copy.deepcopy(before))
    log = trainer.state.log_history[0]
    assert log["tokens/rl_prompt"] + log["tokens/rl_trace"] >= batch["completion_mask"].sum()
    assert log["kl/prompt"] == pytest.approx(0.0, abs=1e-6)  # the reference is the policy that began
    assert log["loss"] == pytest.approx(sum(log[f"loss/{part}"] for part in ("rl_prompt", "rl_trace", "sft")), rel=1e-5)


def test_a_trace_is_supervised_once_in_each_pass(tmp_path):
    """A generation batch of two prompts, used twice, in optimiser steps of one micro-batch."""
    trainer = make_trainer(
        tmp_path,
        PactConfig(anchor_q=1.0, sft_coef=1.0),
        per_device_train_batch_size=2,
        steps_per_generation=4,
        num_iterations=2,
        max_steps=8,
        reward_funcs=lambda completion_ids, **kwargs: [0.0] * len(completion_ids),
    )
    counted = []
    loss_of = trainer.objective.loss
    trainer.objective.loss = lambda model, batch: counted.append(batch.terms.kind.sum().item()) or loss_of(model, batch)
    trainer.train()
    assert len(counted) == 8
    first, second = counted[:4], counted[4:]
    assert sorted(map(bool, first)) == sorted(map(bool, second)) == [False, False, True, True]
    assert [place for place, n in enumerate(first) if n] == [place for place, n in enumerate(second) if n]


def test_supervision_is_annealed_and_everything_is_logged(tmp_path):
    trainer = make_trainer(
        tmp_path, PactConfig(anchor_q=0.5, sft_coef=0.5), max_steps=3, learning_rate=0.1, eval_strategy="no"
    )
    before = weights(trainer)
    trainer.train()
    logs = trainer.state.log_history[:3]
    reasoning = [log["tokens/sft_reasoning"] for log in logs]
    assert reasoning[0] >= reasoning[1] > reasoning[2]
    assert largest_difference(before, weights(trainer)) > 0.01
    for log in logs:
        assert {"loss/rl_prompt", "loss/rl_trace", "loss/sft", "tokens/unique", "anchor/prompt_share", "reward"} < set(
            log
        )
        assert log["loss"] == pytest.approx(sum(log[f"loss/{p}"] for p in ("rl_prompt", "rl_trace", "sft")), abs=1e-5)
        assert log["tokens/unique"] < log["tokens/dense"]


def test_evaluation_logs_the_loss_too(tmp_path):
    tokenizer, model = tokenizer_and_model()
    trainer = PactGRPOTrainer(
        model,
        lambda completion_ids, **kwargs: [float(len(ids)) for ids in completion_ids],
        arguments(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8),
        Dataset.from_list(rows()),
        {"held_out": Dataset.from_list(rows(2))},
        tokenizer,
        pact=PactConfig(anchor_q=0.5),
    )
    trainer.train()
    evaluated = next(log for log in trainer.state.log_history if "eval_held_out_loss" in log)
    parts = sum(evaluated[f"eval_loss/{part}"] for part in ("rl_prompt", "rl_trace", "sft"))
    assert evaluated["eval_held_out_loss"] == pytest.approx(parts, abs=1e-5)


def test_evaluation_batches_draw_their_own_branches_and_the_same_each_time(tmp_path):
    tokenizer, model = tokenizer_and_model()
    seen = []

    class Seen(PactGRPOTrainer):
        def _micro_batches(self, inputs, batch):
            made = super()._micro_batches(inputs, batch)
            if not self.model.training:
                seen.append([group.branch for groups in made for group in groups])
            return made

    trainer = Seen(
        model,
        lambda completion_ids, **kwargs: [float(len(ids)) for ids in completion_ids],
        arguments(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4, max_steps=2),
        Dataset.from_list(rows()),
        Dataset.from_list(rows(6)),
        tokenizer,
        pact=PactConfig(anchor_q=0.5),
    )
    trainer.train()
    assert len(seen) == 12
    assert {branch for branches in seen[:6] for branch in branches} == {PROMPT, TRACE}
    assert seen[:6] == seen[6:]


def test_a_run_resumed_after_an_uneven_epoch(tmp_path):
    """Six micro-batches an epoch, four an optimiser step: TRL's count of them is not a multiple of four at the save."""
    options = {
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 0.1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 1,
        "save_strategy": "steps",
    }
    logs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_trainer(tmp_path, PactConfig(anchor_q=0.5, sft_coef=0.5), data=rows(6), **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        logs.append([log.get("loss") for log in trainer.state.log_history])
    assert logs[0] == logs[1]


def test_the_behavior_ratio_compares_with_the_prompt_only_policy(tmp_path):
    trainer = make_trainer(tmp_path, PactConfig(anchor_q=0.0, ratio_reference="behavior", sft_coef=0.0))
    trainer.train()
    assert trainer.state.log_history[0]["ratio/trace"] != pytest.approx(1.0, abs=1e-3)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Two generation batches an optimiser step: their branches are drawn apart, and again in the resumed run."""
    options = {
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 0.1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 2,
        "save_strategy": "steps",
    }
    logs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        trainer = make_trainer(tmp_path, PactConfig(anchor_q=0.5, sft_coef=0.5), **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        logs.append(
            [{k: v for k, v in log.items() if k.startswith(("loss", "anchor"))} for log in trainer.state.log_history]
        )
    assert logs[0] == logs[1]
    assert {log.get("anchor/prompt_share") for log in logs[0][:6]} > {0.5}


# -- tools -------------------------------------------------------------------------------------------------------------


def lookup(key: str) -> str:
    """Look something up.

    Args:
        key: what to look up.
    """
    return f"The result of {key} is 42."


def test_tools_are_called_and_what_they_return_has_no_weight(tmp_path):
    """The first turn of every rollout is written into TRL's mouth: a call; the second is sampled."""
    tokenizer, model = tokenizer_and_model()
    call = '<tool_call>\n{"name": "lookup", "arguments": {"key": "price"}}\n</tool_call><|im_end|>'

    class Calling(Recording):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            if tokenizer.decode(prompt_ids[0]).count("<|im_start|>assistant") > 1:
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
            return [tokenizer(call)["input_ids"] for _ in prompt_ids], None

    trainer = make_trainer(
        tmp_path,
        PactConfig(anchor_q=0.5, sft_coef=0.3),
        kind=Calling,
        model=model,
        tokenizer=tokenizer,
        tools=[lookup],
        max_completion_length=128,
        seed=3,
    )
    trainer.train()
    inputs, batch, micro_batches, _ = trainer.record[0]
    rollouts = [rollout for groups in micro_batches for group in groups for rollout in group.rollouts]
    observed = [[token for token, mine in zip(rollout.ids, rollout.sampled) if not mine] for rollout in rollouts]
    assert all("The result of price is 42." in tokenizer.decode(ids) for ids in observed)
    assert not any("42" in tokenizer.decode(ids).split("</tool_response>")[-1] for ids in observed)
    log = trainer.state.log_history[0]
    sampled = sum(sum(rollout.sampled) for rollout in rollouts)
    assert log["tools/call_frequency"] == 1.0
    assert log["tokens/rl_prompt"] + log["tokens/rl_trace"] == sampled < sum(len(rollout.ids) for rollout in rollouts)
    branches = [group.branch for groups in micro_batches for group in groups]
    groups = by_hand(inputs, batch, branches, tokenizer, 4)
    for whole, group in zip(groups, micro_batches[0], strict=True):
        # The schemas of the tools stand in the prompt: the head is TRL's.
        assert whole.suffix_ids == group.suffix_ids
        whole.head_ids = group.head_ids
        assert "lookup" in tokenizer.decode(group.head_ids)
    assert_gradient_is(trainer, groups)


class Shelf:
    """An environment that adds to the prompt, in one of two ways: the rollouts of a row do not share all of it."""

    made = 0

    def reset(self, **row):
        Shelf.made += 1
        return f" Look at shelf {Shelf.made % 2}."

    def lookup(self, key: str) -> str:
        """Look something up.

        Args:
            key: what to look up.
        """
        return key

    def get_reward(self):
        Shelf.made += 1
        return float(Shelf.made % 3)


def test_prompts_that_an_environment_completes(tmp_path):
    trainer = make_trainer(
        tmp_path, PactConfig(anchor_q=0.5, sft_coef=0.3), kind=Recording, reward_funcs=None, environment_factory=Shelf
    )
    trainer.train()
    (groups,) = trainer.record[0][2]
    prompts = [trainer._tokenizer.decode(group.head_ids) for group in groups]
    assert [prompt[-len("item 0? Look at shelf 1.") :] for prompt in prompts] == [
        f"item {item}? Look at shelf {shelf}." for item in (0, 1) for shelf in (1, 0)
    ]
    assert [len(group.rollouts) for group in groups] == [2, 2, 2, 2]
    assert [group.trace is not None for group in groups] == [True, False, True, False]
    assert groups[0].branch == groups[1].branch
    assert groups[2].branch == groups[3].branch


# -- LoRA, vLLM's correction -------------------------------------------------------------------------------------------


def test_lora_trains_adapters_against_the_base_model(tmp_path, saved):
    tokenizer, model = tokenizer_and_model(saved)
    trainer = make_trainer(
        tmp_path,
        PactConfig(anchor_q=0.5, sft_coef=0.5),
        model=model,
        tokenizer=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"),
        beta=0.2,
        use_bias_correction_kl=False,
        max_steps=3,
        seed=3,
    )
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {name for name in before if (before[name] - after[name]).abs().max() > 1e-4}
    assert changed
    assert all("lora_" in name for name in changed)
    kl = [max(log.get("kl/prompt", 0.0), log.get("kl/trace", 0.0)) for log in trainer.state.log_history[:3]]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)  # fresh adapters add nothing
    assert kl[-1] > 1e-4


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_mask", "sequence_truncate"])
def test_the_correction_for_vllm_is_trls(mode, tmp_path, in_order):
    """The engine's log-probs are made up; both trainers weigh the same tokens with the same ratios."""
    trainers = []
    for kind in (GRPOTrainer, PactGRPOTrainer):
        trainer = make_trainer(
            tmp_path, kind=kind, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=2.0
        )
        generate = trainer._generate_single_turn

        def sampled(*args, trainer=trainer, generate=generate, **kwargs):
            trainer.use_vllm = False
            ids, _ = generate(*args, **kwargs)
            trainer.use_vllm = True
            return ids, [[-4.0 - 0.5 * (token % 5) for token in row] for row in ids]

        trainer.use_vllm, trainer._generate_single_turn = True, sampled
        trainer.train()
        trainers.append(trainer)
    theirs, ours = trainers
    assert largest_difference(weights(theirs), weights(ours)) < TOLERANCE
    assert ours.state.log_history[0]["sampling/importance_sampling_ratio/max"] > 0.0


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "loss_type": "bnpo",
    "importance_sampling_level": "sequence",
    "delta": 1.1,
    "off_policy_mask_threshold": 0.5,
    "top_entropy_quantile": 0.5,
    "use_adaptive_entropy": True,
    "cast_lm_head_to_fp32": True,
    "use_liger_kernel": True,
    "torch_compile": True,
    "use_transformers_continuous_batching": True,
    "generation_kwargs": {"temperature": 0.5},
}


def settings(folder, **values):
    return GRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **values)


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_honoured_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"cannot honour.*{name}"):
        merged_config(settings(tmp_path, **{name: REFUSED[name]}), PactConfig())


def test_one_message_names_them_all(tmp_path):
    args = settings(tmp_path, delta=1.1, beta=0.1, loss_type="sapo", entropy_coef=0.1)
    with pytest.raises(ValueError) as error:
        merged_config(args, PactConfig(temperature=0.5, kl_coef=0.2, token_budget=4096))
    for name in (
        "delta",
        "loss_type",
        "use_bias_correction_kl",
        "entropy_coef",
        "temperature=0.5",
        "kl_coef=0.2",
        "token_budget",
    ):
        assert name in str(error.value)


def test_settings_are_read_from_trls(tmp_path):
    args = settings(
        tmp_path,
        temperature=0.7,
        epsilon=0.1,
        epsilon_high=0.3,
        delta=2.0,
        loss_type="dr_grpo",
        max_completion_length=64,
    )
    config = merged_config(args, PactConfig(anchor_q=0.3, temperature=0.7))
    assert (config.temperature, config.clip_low, config.clip_high, config.anchor_q) == (0.7, 0.1, 0.3, 0.3)
    assert config.clip_dual == 2.0
    assert (config.kl_coef, config.entropy_coef) == (0.0, 0.0)  # TRL's defaults, not PACT's
    assert (config.loss_norm, config.norm_length) == ("constant", 64.0)


def test_traces_are_checked_before_training(tmp_path):
    broken = rows(3)
    broken[2]["expert"] = trace(2)[1:]
    with pytest.raises(ValueError, match="train_dataset, row 2: a trace starts with an assistant turn"):
        make_trainer(tmp_path, data=broken)
    plain = [{"prompt": "What is the price?", "expert": trace(0)}]
    with pytest.raises(ValueError, match="give it as messages"):
        make_trainer(tmp_path, data=plain).train()
    for end, message in (
        ("assistant", "ends with a user message, this one with role 'assistant'"),
        ("robot", "role 'robot'"),
    ):
        ended = rows(2)
        ended[1] = {**ended[1], "prompt": [*ended[1]["prompt"], {"role": end, "content": "-"}]}
        with pytest.raises(ValueError, match=f"train_dataset, row 1: .*{message}"):
            make_trainer(tmp_path, data=ended)
    text = [{**row, "expert": json.dumps(row["expert"])} for row in rows(2)]
    with pytest.raises(ValueError, match="row 0: the trace is str and no list of messages"):
        make_trainer(tmp_path, data=text)


def test_what_a_script_may_get_wrong(tmp_path, caplog):
    with pytest.raises(TypeError, match=r"pact is dict: give a pact\.objective\.PactConfig"):
        make_trainer(tmp_path, {"anchor_q": 0.5})
    make_trainer(tmp_path, data=[{"prompt": row["prompt"], "trace": row["expert"]} for row in rows(2)])
    assert "train_dataset has no column 'expert', only prompt, trace: there are no traces" in caplog.text


def test_adapters_on_the_embedding(tmp_path):
    lora = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, PactConfig(anchor_q=0.5, sft_coef=0.5), peft_config=lora)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert any("embed_tokens" in name for name in changed)
    assert all("lora_" in name for name in changed)


def test_keys_that_arrow_fills_with_null_are_dropped():
    marked = trace(0)
    marked[0]["supervised"] = False
    row = Dataset.from_list([{"expert": marked}])[0]["expert"]
    assert row[2]["supervised"] is None
    assert expert_messages(row) == marked
    assert expert_messages(None) is None
    call = {"function": {"name": "lookup", "arguments": {"key": "a", "other": None}}}
    with pytest.raises(ValueError, match="as JSON text"):
        expert_messages([{**marked[0], "tool_calls": [call]}, marked[1]])


def test_prompts_that_another_template_rendered_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.chat_template = trainer._tokenizer.chat_template.replace("<|im_start|>assistant\\n", "<|im_start|>model\\n")
    with pytest.raises(ValueError, match="TRL's prompt ends with"):
        trainer.train()


def test_what_does_not_fit_the_context_trains_prompt_only(tmp_path):
    trainer = make_trainer(tmp_path, PactConfig(anchor_q=0.0, sft_coef=1.0, context_length=100))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["trace_overflow"] == 1.0
    assert log["context_overflow"] == 2.0
    assert log["anchor/prompt_share"] == 1.0
    with pytest.raises(ValueError, match="over the model's 1024"):
        make_trainer(tmp_path, PactConfig(context_length=2048))


def test_the_trace_column_survives_remove_unused_columns(tmp_path):
    trainer = make_trainer(tmp_path, PactConfig(anchor_q=0.0), remove_unused_columns=True)
    trainer.train()
    assert trainer.state.log_history[0]["tokens/sft_reasoning"] > 0


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "pact.integrations.trl")
    with pytest.raises(ImportError, match=r"needs TRL: pip install 'pact-kernels\[trl\]'"):
        importlib.import_module("pact.integrations.trl")


# -- processes ---------------------------------------------------------------------------------------------------------


def test_two_processes_are_one(tmp_path):
    """Six rollouts each: the second prompt lies on both, and one of its rollouts is too long beside the trace."""
    trl_worker.run(tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, trl_worker.__file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    one, *both = (torch.load(tmp_path / name, weights_only=True) for name in ("1_0.pt", "2_0.pt", "2_1.pt"))
    assert largest_difference(one["before"], one["after"]) > 0.01
    assert one["branches"] == [[PROMPT, PROMPT, PROMPT], [PROMPT, TRACE, PROMPT]]
    assert [found["branches"] for found in both] == [
        [[PROMPT, PROMPT], [PROMPT, TRACE]],
        [[PROMPT, PROMPT], [TRACE, PROMPT]],
    ]
    for found in both:
        assert largest_difference(one["after"], found["after"]) < TOLERANCE
    names = {name for name in one["log"] if name.startswith(("loss", "tokens/rl", "tokens/sft", "kl/", "trace_"))}
    assert {"loss", "loss/sft", "kl/trace", "trace_overflow"} < names
    for name in names:
        assert both[0]["log"][name] == pytest.approx(one["log"][name], abs=TOLERANCE, rel=TOLERANCE), name
