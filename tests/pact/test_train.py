"""pact train: settings from YAML and flags, one whole run with warm start and resume, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trainer_setup import MODEL, tiny_model, toybox

from pact import cli, train
from pact.arguments import parse_settings

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = {
    "env": "toybox",
    "env_options": {"train": 8, "test": 4, "hops": [1, 1], "sources": 2, "distractors": 0},
    "model": "toybox",
    "model_config": MODEL,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "num_rollouts": 2,
    "max_turns": 1,
    "max_turn_tokens": 6,
    "warm_start_steps": 2,
    "warm_start_batch_size": 2,
    "warm_start_lr": "1e-2",
    "learning_rate": "1e-2",
    "eval_tasks": 3,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A quick configuration in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_nothing_to_a_loadable_model(config, capsys, monkeypatch):
    """Warm start, evaluation, training, evaluation; then --resume after a crash gives the same weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert cli.main(["train", str(config), "--run_name", "whole"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("improvement over warm start: ")
    assert "on 3 episodes, 95% lower bound: " in last
    whole = Path("runs/whole")
    lines = lines_of(whole)
    assert [(r["phase"], r["step"]) for r in lines if "loss" in r] == [
        ("warm_start", 1), ("warm_start", 2), ("train", 1), ("train", 2),
    ]  # fmt: skip
    assert [r["step"] for r in lines if "eval_reward" in r] == [0, 1, 2]
    assert (whole / "curves.png").is_file()
    assert "95% interval" in (whole / "report.html").read_text(encoding="utf-8")
    trained = AutoModelForCausalLM.from_pretrained(whole / "model").state_dict()
    assert len(AutoTokenizer.from_pretrained(whole / "model")) == trained["model.embed_tokens.weight"].shape[0]

    evaluate, calls = train.PactTrainer.evaluate, []

    def crash_after_the_first_step(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(train.PactTrainer, "evaluate", crash_after_the_first_step)
    assert cli.main(["train", str(config), "--run_name", "cut"]) == 130
    monkeypatch.setattr(train.PactTrainer, "evaluate", evaluate)
    assert cli.main(["train", "--resume", "cut"]) == 0
    assert calls == [0, 1, 2]  # the evaluation before training is not repeated
    resumed = AutoModelForCausalLM.from_pretrained("runs/cut/model").state_dict()
    assert all((trained[name] == resumed[name]).all() for name in trained)
    assert [(r["phase"], r["step"]) for r in lines_of(Path("runs/cut")) if "loss" in r] == [
        (r["phase"], r["step"]) for r in lines if "loss" in r
    ]

    assert cli.main(["train", "--resume"]) == 0  # the newest run, which is at its end: nothing is trained again
    assert cli.main(["train", str(config), "--run_name", "whole"]) == 2
    assert "run whole exists" in capsys.readouterr().err

    assert cli.main(["train", "--resume", "whole", "--eval_tasks", "2"]) == 2
    assert "resume with the eval_tasks the run began with" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "whole", "--eval_temperature", "0.5"]) == 2
    assert "was evaluated with eval_temperature 0.0, not 0.5" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "elsewhere/runs/whole"]) == 2
    assert "change to the folder where the run was begun" in capsys.readouterr().err
    assert cli.main(["train", "--resume=runs/whole", "--max_steps", "3"]) == 0  # beyond its end: evaluated anew
    assert [r["step"] for r in lines_of(whole) if "eval_reward" in r][-1] == 3


def test_a_warm_start_is_resumed(config, monkeypatch, capsys):
    log = train.WarmStartTrainer.log

    def crash(self, logs, start_time=None):
        log(self, logs, start_time)
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.WarmStartTrainer, "log", crash)
    arguments = ["--eval_tasks", "0", "--eval_strategy", "no", "--max_steps", "1"]
    assert cli.main(["train", str(config), "--run_name", "cut", *arguments]) == 130
    assert not list(Path("runs/cut").glob("checkpoint-*"))
    monkeypatch.setattr(train.WarmStartTrainer, "log", log)
    assert cli.main(["train", "--resume"]) == 0
    capsys.readouterr()
    assert cli.main(["train", "--resume", "cut", "--eval_tasks", "2"]) == 2  # the start is gone
    assert "was not evaluated" in capsys.readouterr().err
    steps = [(r["phase"], r["step"]) for r in lines_of(Path("runs/cut")) if "loss" in r]
    assert steps == [("warm_start", 1), ("warm_start", 2), ("train", 1)]


def test_flags_win_over_yaml_and_yaml_over_defaults(config):
    settings = parse_settings(
        [
            "--max-steps",
            "7",
            "--env_options.hops",
            "[1, 2]",
            "--env_options.train=3",
            "--tool_call_weight",
            "0.7",
            "0.1",
        ],
        config,
    )
    assert settings.training.max_steps == 7
    assert settings.training.learning_rate == 0.01  # YAML 1.1 reads 1e-2 as text
    assert settings.training.warm_start_batch_size == 2
    assert settings.training.num_train_epochs == 3.0
    assert settings.pact.tool_call_weight == (0.7, 0.1)
    assert settings.env.options() == {**TINY["env_options"], "hops": [1, 2], "train": 3}


@pytest.mark.parametrize("written", ["off", "'off'"])
def test_a_bare_off_in_yaml_is_a_way_to_anneal(config, tmp_path, written):
    """YAML 1.1 reads it as false."""
    path = tmp_path / "off.yaml"
    path.write_text(f"extends: {config.name}\nreasoning_anneal: {written}\n")
    assert parse_settings([], path).pact.reasoning_anneal == "off"


def test_the_snapshot_rebuilds_the_settings(config, tmp_path):
    settings = parse_settings(
        ["--anchor_mode", "mixture", "--no_one_pass", "--lr_scheduler_kwargs", '{"a": 1}'], config
    )
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(settings.values))
    again = parse_settings([], copy)
    assert (again.model, again.env, again.pact) == (settings.model, settings.env, settings.pact)
    assert again.training.to_dict() == settings.training.to_dict()
    assert again.values == settings.values


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_parse(path):
    settings = parse_settings(["--use_cpu"], path)
    assert 0.2 <= settings.pact.anchor_q <= 0.5  # where the paper finds it best
    if path.stem.startswith("qwen3"):
        args, pact = settings.training, settings.pact
        assert (args.num_rollouts, args.learning_rate, args.max_prompt_tokens) == (16, 1e-6, 7000)
        assert (args.max_response_tokens, args.max_turns, args.rollout_batch_steps) == (23000, 10, 8)
        assert (pact.kl_coef, pact.entropy_coef, pact.context_length) == (0.001, 0.001, 30000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_stpes", "3"], "unknown argument '--max_stpes': did you mean 'max_steps'?"),
        (["--max_steps", "three"], "invalid int value: 'three'"),
        (["--num_rollouts", "1"], "num_rollouts is 1"),
        (["--anchor_q", "2"], "anchor_q=2.0"),
        (["--env", "toybx"], "unknown environment 'toybx'"),
        (["--env_options.trian", "3"], "trian"),
        (["--env_options", "{"], "env_options is not JSON"),
        (["--env_options.hops", "[1,2"], "is not a YAML value"),
        (["--env_options.hops", "3"], "its options are train, test, validation, seed, hops"),
        (["--model", "./nowhere"], "no model folder ./nowhere"),
        (["--overlong_prompts", "cut"], "invalid choice"),
        (["--output_dir", "elsewhere"], "set run_name instead"),
        (["--resume", "gone"], "leave out"),
        (["--eval_tasks", "0"], "set eval_tasks"),
        (["--resume_from_checkpoint", "x"], "pact train --resume RUN goes on from its last checkpoint"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor must stay 0"),
        (["--env_options.trace_share", "0"], "a warm start needs expert traces"),
        (["--warm_start_lr_scheduler_type", "cosin"], "warm_start_lr_scheduler_type"),
        (["--max_prompt_tokens", "20"], "raise them, or set overlong_prompts to drop"),
        (["--model_config", '{"model_type": "qwen3", "vocab_size": 9}'], "tokens and the model 9"),
        (["--model_config", '{"model_type": "gemma2", "num_hidden_layers": 1}'], "sliding_attention"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_leave_nothing(config, capsys, arguments, message):
    assert cli.main(["train", str(config), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pact: error: ")
    assert message in error
    assert not Path("runs").exists()


def test_an_unknown_key_in_the_file_names_the_file(config, capsys):
    config.write_text("learning_rte: 1.0\n")
    assert cli.main(["train", str(config)]) == 2
    assert f"unknown setting 'learning_rte' in {config}: did you mean 'learning_rate'?" in capsys.readouterr().err


def test_a_configuration_extends_another(config, tmp_path):
    """Paths are relative to the file that names them; the nearer file wins; null is the default again."""
    (tmp_path / "deep").mkdir()
    middle, near = tmp_path / "deep" / "middle.yaml", tmp_path / "near.yaml"
    middle.write_text("extends: ../tiny.yaml\nmax_steps: 5\nreward: answer_f1\nwarm_start_lr: null\n")
    near.write_text("extends: deep/middle.yaml\nmax_steps: 6\n")
    settings = parse_settings(["--num_rollouts", "3"], near)
    training = settings.training
    assert (training.max_steps, training.reward, training.num_rollouts) == (6, "answer_f1", 3)
    assert (training.warm_start_lr, training.learning_rate) == (1e-5, 0.01)
    assert "extends" not in settings.values
    copy = tmp_path / "deep" / "copy.yaml"
    copy.write_text(yaml.safe_dump(settings.values))
    assert parse_settings([], copy).values == settings.values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: tiny.yaml", "tiny.yaml extends itself"),
        ("extends: other.yaml", "tiny.yaml extends itself"),
        ("extends: gone.yaml", "no configuration file gone.yaml"),
        ("extends: [a, b]", "extends must be the path of one YAML file, not ['a', 'b']"),
        ("extends: typo.yaml", "unknown setting 'max_stpes' in typo.yaml: did you mean 'max_steps'?"),
    ],
)
def test_bad_extensions(config, capsys, text, message):
    Path("other.yaml").write_text("extends: tiny.yaml\n")
    Path("typo.yaml").write_text("max_stpes: 3\n")
    config.write_text(text)
    assert cli.main(["train", "tiny.yaml"]) == 2
    assert message in capsys.readouterr().err


def test_a_saved_model_is_trained_with_its_own_tokenizer(config, capsys):
    tokenizer = toybox().tokenizer()
    tiny_model(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    flags = {k: v for k, v in TINY.items() if k not in ("model", "model_config", "env_options")}
    flags |= {"model": "./model", "warm_start_steps": 0, "max_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    text = [f"--{key}={value}" for key, value in flags.items()]
    assert cli.main(["train", *text, "--env_options.train", "4", "--env_options.test", "4"]) == 0
    assert "improvement over start: " in capsys.readouterr().out.strip().splitlines()[-1]
    [run] = Path("runs").iterdir()
    assert run.name.startswith("toybox-")


def test_help_and_unknown_commands(capsys):
    assert cli.main(["--help"]) == 0
    assert cli.main(["--version"]) == 0
    assert cli.main(["fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err


def test_the_module_runs_without_torch_for_help():
    """``pact --help`` answers at once: the heavy imports belong to the subcommands."""
    code = "import sys; from pact import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=CONFIGS.parent)
