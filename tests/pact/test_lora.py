"""LoRA through the trainer and the command: the reference is the base, weights merge for other engines, runs resume."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from trainer_setup import make_trainer, tiny_model, toybox
from transformers import AutoModelForCausalLM

from pact import cli
from pact.distributed import Snapshot, policy_weights
from pact.objective import PactConfig


def adapted(noise=0.0, **overrides):
    """A tiny model with adapters on all linear layers but the head; ``noise`` moves them away from 0."""
    model = tiny_model(toybox().tokenizer(), num_hidden_layers=2, **overrides)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=noise) if noise else None
    return model


def test_the_reference_is_the_base_model(tmp_path):
    """Reference log-probs are those with the adapters off, after steps that have moved the adapters."""
    config = PactConfig(anchor_q=0.5, kl_coef=0.1)
    trainer = make_trainer(tmp_path, model=adapted(), config=config, learning_rate=10.0, max_steps=3)
    kept, build = [], trainer.objective.build

    def watched(groups, *args, **options):
        kept.append((trainer.state.global_step, groups))
        return build(groups, *args, **options)

    trainer.objective.build = watched
    trainer.train()
    step, groups = kept[-1]
    assert step == 2
    before = [one.ref_logp for group in groups for one in group.rollouts]
    with trainer.model.disable_adapter():
        trainer.objective.attach_logprobs(trainer.model, groups, field="ref_logp")
    base = [one.ref_logp for group in groups for one in group.rollouts]
    trainer.objective.attach_logprobs(trainer.model, groups, field="ref_logp")
    moved = [one.ref_logp for group in groups for one in group.rollouts]
    for one, other in zip(before, base, strict=True):
        assert one == {branch: pytest.approx(values, abs=1e-6) for branch, values in other.items()}
    assert any(abs(a - b) > 1e-3 for one, other in zip(before, moved) for k in one for a, b in zip(one[k], other[k]))
    assert sum(kept.numel() for kept in trainer.reference.kept) == sum(
        p.numel() for p in trainer.model.parameters() if p.requires_grad
    )


def test_a_snapshot_comes_and_goes():
    model = adapted(noise=0.1)
    snapshot = Snapshot(model)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1.0
    moved = {name: value.clone() for name, value in model.state_dict().items()}
    with snapshot.restored(model):
        assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, moved[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_policy_weights_are_the_merged_model(tied):
    model = adapted(noise=0.1, tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: value.clone() for name, value in policy_weights(model)}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merged = model.merge_and_unload()
    assert weights.keys() == dict(merged.named_parameters()).keys()
    for name, parameter in merged.named_parameters():
        assert torch.allclose(weights[name], parameter, atol=1e-6), name


def test_adapters_of_another_kind_are_refused_for_other_engines():
    from peft import IA3Config

    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    model = get_peft_model(tiny_model(toybox().tokenizer()), config)
    with pytest.raises(ValueError, match="use plain LoRA"):
        dict(policy_weights(model))


SETTINGS = {
    "env": "toybox",
    "env_options": {"train": 8, "test": 4, "hops": [1, 1], "sources": 2, "distractors": 0},
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "num_rollouts": 2,
    "max_turns": 1,
    "max_turn_tokens": 6,
    "warm_start_steps": 2,
    "warm_start_batch_size": 2,
    "warm_start_lr": "1e-1",
    "learning_rate": "1e-1",
    "eval_tasks": 3,
    "save_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "lora_r": 4,
    "gradient_checkpointing": True,
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = toybox().tokenizer()
    tiny_model(tokenizer).save_pretrained("base")
    tokenizer.save_pretrained("base")
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(SETTINGS | {"model": "base"}))
    return tmp_path


def weights_of(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_a_run_with_lora_stops_resumes_and_loads(config, capsys):
    """The run is the same in one piece and resumed after its first step; the saved adapters load by their folder."""
    assert cli.main(["train", "lora.yaml", "--run_name", "whole", "--max_steps", "3"]) == 0
    assert cli.main(["train", "lora.yaml", "--run_name", "parts", "--max_steps", "3", "--save_steps", "1"]) == 0
    for step in (2, 3):
        shutil.rmtree(config / "runs" / "parts" / f"checkpoint-{step}")
    assert cli.main(["train", "--resume", "parts"]) == 0
    whole, parts = (weights_of(config / "runs" / name / "model") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    saved = json.loads((config / "runs" / "whole" / "model" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "base"
    assert saved["r"] == 4
    base = AutoModelForCausalLM.from_pretrained("base")
    trained = PeftModel.from_pretrained(base, str(config / "runs" / "whole" / "model"))
    assert any(p.abs().max() > 0 for name, p in trained.named_parameters() if "lora_B" in name)
    capsys.readouterr()
    assert cli.main(["train", "--resume", "parts", "--lora_r", "8"]) == 2
    assert "begun with lora_r 4, not 8: leave it as it was" in capsys.readouterr().err
    assert cli.main(["train", "--model", "runs/parts/model", "--max_steps", "1"]) == 2
    assert "runs/parts/model holds LoRA adapters alone: give the folder of a whole model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_target_modules", "q_proj,lm_head"], "leave it out of the adapter"),
        (["--lora_target_modules", "nope"], "not found"),
        (["--lora_r", "-1"], "lora_r is -1"),
        (["--lora_alpha", "0"], "lora_alpha is 0"),
        (["--lora_dropout", "1"], "lora_dropout is 1"),
        (["--model", "toybox"], "lora_r is for models that have learned"),
    ],
)
def test_bad_settings_are_one_line_before_any_work(config, capsys, flags, message):
    assert cli.main(["train", "lora.yaml", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("pact: error: ")
    assert message in error[-1]
    assert not (config / "runs").exists()
