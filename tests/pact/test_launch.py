"""How runs are started on several processes: the shipped accelerate configurations, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import CPUOffloadPolicy
from trainer_setup import make_trainer

from pact import cli, train
from pact.arguments import PactTrainingArguments

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"


def launched(name, monkeypatch):
    """The arguments and the environment that `accelerate launch` makes of a configuration, on a machine with GPUs."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), "-m", "pact.train", "configs/qwen3_1.7b.yaml"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    if name == "zero3":
        args.deepspeed_fields_from_accelerate_config = ""  # as `accelerate launch` does in between
        return args, prepare_deepspeed_cmd_env(args)[1]
    return args, prepare_multi_gpu_env(args)


def test_every_configuration_is_tested():
    assert {path.stem for path in CONFIGS.iterdir()} == {"ddp", "fsdp2", "fsdp2_offload", "zero3"}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_offload", "zero3"])
def test_configurations_launch_the_trainer(name, monkeypatch):
    args, environment = launched(name, monkeypatch)
    assert args.module
    assert (args.training_script, args.training_script_args) == ("pact.train", ["configs/qwen3_1.7b.yaml"])
    assert args.num_processes == 8
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert environment.get("ACCELERATE_USE_FSDP", "false") == str(name.startswith("fsdp2")).lower()
    assert environment.get("ACCELERATE_USE_DEEPSPEED", "false") == str(name == "zero3").lower()


@pytest.mark.parametrize("offload", [False, True])
def test_fsdp_is_that_of_the_second_version(offload, monkeypatch):
    _, environment = launched("fsdp2_offload" if offload else "fsdp2", monkeypatch)
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == offload
    assert not plugin.cpu_ram_efficient_loading
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


def test_zero3_gathers_weights_for_checkpoints(monkeypatch):
    _, environment = launched("zero3", monkeypatch)
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"


def test_more_processes_than_tasks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(PactTrainingArguments, "world_size", property(lambda self: 9))
    with pytest.raises(ValueError, match="9 processes and 8 training tasks: start at most as many processes as"):
        make_trainer(tmp_path)


def test_fsdp_that_accelerate_leaves_off_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for, but accelerate runs NO here"):
        make_trainer(tmp_path)


def test_a_warm_start_under_deepspeed_is_refused_before_it_begins(tmp_path, monkeypatch, capsys):
    class UnderDeepSpeed(train.PactTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.is_deepspeed_enabled = True

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "PactTrainer", UnderDeepSpeed)
    settings = {
        "env_options.train": "4", "env_options.test": "2", "model": "toybox", "warm_start_steps": "1", "max_steps": "1",
    }  # fmt: skip
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    assert cli.main(["train", *flags, "--use_cpu", "--report_to", "none"]) == 2
    assert "DeepSpeed keeps a model for one optimiser: warm-start in a run of its own" in capsys.readouterr().err
    assert not list(Path("runs").glob("*/config.yaml"))
