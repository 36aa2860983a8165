"""One process of the runs that test_distributed.py compares: trains each scenario, writes what came out.

    python -m torch.distributed.run --nproc_per_node 2 distributed_worker.py STRATEGY FOLDER

STRATEGY: "ddp" (one process too), "zero3" (DeepSpeed has to be installed) or "fsdp2". accelerate leaves FSDP2 off on a
CPU, so the worker passes gloo off as a backend of accelerators; everything after that is accelerate's own FSDP2.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import yaml
from accelerate import DistributedType, PartialState
from accelerate.utils import gather_object
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from trainer_setup import MODEL, SteeredTrainer, WarmStartTrainer, make_trainer, tiny_model, toybox
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pact import cli
from pact.distributed import policy_weights
from pact.objective import PactConfig

SCENARIOS = {
    "plain": {"config": {"kl_coef": 0.1, "anchor_q": 0.5}, "gradient_accumulation_steps": 2, "max_steps": 3},
    # Several trees a micro-batch, both branches, several steps on the same rollouts, old and reference log-probs.
    "uneven": {
        "config": {"anchor_mode": "mixture", "ratio_reference": "behavior", "token_budget": 420, "kl_coef": 0.1},
        "prompts": 6,
        "env": {"train": 6},
        "gradient_accumulation_steps": 1,
        "rollout_batch_steps": 2,
        "max_steps": 4,
        "latent_trace_steps": 2,
        "gradient_checkpointing": True,
    },
    # In step 1 every group lies with the first process: the other has nothing to do.
    "idle": {"config": {"anchor_q": 0.5, "kl_coef": 0.1}, "idle_step": 1, "max_steps": 2, "untied": True},
    "sft": {"kind": WarmStartTrainer, "max_steps": 2, "warm_start_context_share": 0.5},
    "lora": {"config": {"kl_coef": 0.1, "anchor_q": 0.5}, "lora": True, "max_steps": 3, "rollout_batch_steps": 2},
    "compiled": {
        "torch_compile": True,
        "torch_compile_backend": "aot_eager",
        "gradient_checkpointing": True,
        "max_steps": 2,
    },
    "evaluated": {"eval_tasks": 3, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "offload": True},
}


def pass_gloo_off_as_accelerators():
    start = PartialState.__init__

    def as_accelerators(self, *args, **kwargs):
        first = not PartialState._shared_state
        start(self, *args, **kwargs)
        if first:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_accelerators
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Watch(TrainerCallback):
    """The whole gradients of every optimiser step (but DeepSpeed's), and whether all parameters were sharded."""

    def __init__(self):
        self.gradients, self.sharded = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = dict(model.named_parameters())
        if any(hasattr(p, "ds_id") for p in parameters.values()):
            self.sharded.append(all(p.ds_tensor.numel() < p.ds_numel for p in parameters.values()))
            return
        self.sharded.append(isinstance(model, FSDPModule) and all(isinstance(p, DTensor) for p in parameters.values()))
        self.gradients.append({name: whole(p.grad) for name, p in parameters.items() if p.grad is not None})


class IdleTrainer(SteeredTrainer):
    """At one step all groups are dealt to the first process."""

    idle_step = -1

    def deal(self, step):
        if self.state.global_step != self.idle_step or self.args.world_size == 1:
            return super().deal(step)
        everyone = [group for part in gather_object([step]) for batch in part for group in batch]
        return [everyone if self.args.process_index == 0 else [], *([] for _ in step[1:])]


ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,  # SGD, which shows a gradient that is wrong by a factor
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0,
}


def run(strategy, settings, folder):
    settings = dict(settings)
    unset_hf_deepspeed_config()  # else the next model would be made in shards, and initialised with other numbers
    if strategy == "zero3":
        settings["deepspeed"] = ZERO3
    offload = settings.pop("offload", False)
    os.environ["FSDP_OFFLOAD_PARAMS"] = str(offload).lower()
    env = toybox(**settings.pop("env", {}))
    config = PactConfig(**settings.pop("config", {}))
    idle = settings.pop("idle_step", -1)
    model = tiny_model(env.tokenizer(), tie_word_embeddings=not settings.pop("untied", False), num_hidden_layers=2)
    if settings.pop("lora", False):
        set_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    watch = Watch()
    world = int(os.environ.get("WORLD_SIZE", 1))
    settings = {"kind": IdleTrainer, "per_device_train_batch_size": settings.pop("prompts", 4) // world} | settings
    trainer = make_trainer(
        folder, env=env, config=config, callbacks=[watch], model=model, learning_rate=1.0, **settings
    )
    trainer.idle_step = idle
    if offload and trainer.is_fsdp_enabled:  # pinned memory, the default, needs an accelerator
        trainer.accelerator.state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
    groups, build = [], trainer.objective.build
    trainer.objective.build = lambda of_batch, *args, **options: (
        groups.append(len(of_batch)) or build(of_batch, *args, **options)
    )
    trainer.train()
    return {
        "weights": {key: value.clone() for key, value in policy_weights(trainer.model)},
        "gradients": watch.gradients,
        "sharded": watch.sharded,
        "groups": groups,
        "logs": [line for line in trainer.state.log_history if "loss" in line or "eval_reward" in line],
    }


COMMAND = {
    "env_options": {"train": 8, "test": 4, "hops": [1, 1], "sources": 2, "distractors": 0},
    "model": "toybox",
    "model_config": MODEL,
    "num_rollouts": 2,
    "max_turns": 2,
    "max_turn_tokens": 6,
    "anchor_q": 0.5,
    "kl_coef": 0.1,
    "optim": "adamw_torch",  # has a state to resume with
    "adam_epsilon": 1e-3,  # far above rounding: a gradient of 1e-8 must not be a step of the whole rate
    "learning_rate": 0.05,
    "max_steps": 2,
    "warm_start_steps": 1,
    "warm_start_lr": 0.05,
    "eval_tasks": 3,
    "eval_temperature": 1.0,
    "save_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def command(folder):
    """`pact train` from warm start to model folder, stopped after its first step and resumed."""
    os.chdir(folder)
    os.environ["FSDP_OFFLOAD_PARAMS"] = "false"
    world = int(os.environ.get("WORLD_SIZE", 1))
    size = {"per_device_train_batch_size": 4 // world, "warm_start_batch_size": 4 // world}
    Path("config.yaml").write_text(yaml.safe_dump(COMMAND | size))
    assert cli.main(["train", "config.yaml", "--run_name", "all", "--max_steps", "1"]) == 0
    assert cli.main(["train", "--resume", "all", "--max_steps", "2"]) == 0
    PartialState().wait_for_everyone()
    lines = [json.loads(line) for line in Path("runs/all/metrics.jsonl").read_text().splitlines()]
    return {
        "weights": AutoModelForCausalLM.from_pretrained("runs/all/model").state_dict(),
        "logs": [line for line in lines if "loss" in line or "eval_reward" in line],
    }


def main():
    strategy, folder = sys.argv[1], Path(sys.argv[2])
    if strategy == "fsdp2":
        pass_gloo_off_as_accelerators()
    torch.use_deterministic_algorithms(True, warn_only=True)
    results = {name: run(strategy, settings, folder / "run") for name, settings in SCENARIOS.items()}
    if strategy != "zero3":  # has no warm start
        results["command"] = command(folder)
    torch.save(results, folder / f"{strategy}_{os.environ.get('WORLD_SIZE', 1)}_{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    main()
