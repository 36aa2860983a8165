"""verl's own training worker on CPUs, compared with PACT's: python tests/pact/verl_cpu.py rl pact:packed

verl has no CPU platform; its registries take one from outside, which is what `cpu_platform` does. A process of its own
runs this: verl patches model classes.
"""

import argparse
import copy
import datetime
import importlib.metadata
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from tiny import make_config, make_groups, make_model, with_logprobs
from verl_rows import all_rows, columns_of

from pact.integrations.verl import Row, patch_fused_head
from pact.objective import PactObjective

DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
os.environ |= {name: os.environ.get(name, value) for name, value in DEFAULTS.items()}
os.environ |= {"VERL_PLATFORM": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "VERL_LOGGING_LEVEL": "ERROR"}


def cpu_platform():
    """Register the CPU with verl: a platform named cpu, and its FSDP engine for that device."""
    from verl.plugin.platform.platform_base import PlatformBase
    from verl.plugin.platform.platform_manager import PlatformRegistry

    def answer(value):
        return lambda self, *args: value

    counters = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    device = SimpleNamespace(**dict.fromkeys(counters, int), mem_get_info=lambda: (0, 0), get_device_name=lambda: "CPU")
    members = dict.fromkeys(PlatformBase.__abstractmethods__, answer(None))
    members |= {
        "device_name": property(answer("cpu")),
        "vendor_name": property(answer("cpu")),
        "device_module": property(answer(device)),
        "is_available": answer(True),
        "current_device": answer("cpu"),
        "device_count": answer(1),
        "communication_backend_name": answer("gloo"),
        "visible_devices_envvar": answer("CUDA_VISIBLE_DEVICES"),
        "ray_resource_name": answer("CPU"),
        "ray_noset_envvars": answer([]),
    }
    PlatformRegistry.register("cpu")(type("PlatformCPU", (PlatformBase,), members))

    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cpu")(FSDPEngineWithLMHead)


def actor_config(**changes):
    """verl's own configuration of an FSDP2 actor, small and in float32."""
    from verl.workers.config import FSDPActorConfig, FSDPEngineConfig

    engine = FSDPEngineConfig(
        strategy="fsdp2",
        mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        use_torch_compile=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=changes.pop("micro_batch_size", 3),
        infer_micro_batch_size_per_gpu=3,
    )
    return FSDPActorConfig(strategy="fsdp2", rollout_n=2, ppo_micro_batch_size_per_gpu=3, fsdp_config=engine, **changes)


def worker(kind, folder, config, fused=False, remove_padding=False):
    """A training worker of verl (or PACT's) over the model in ``folder``, SGD with a large rate, verl's loss set."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.utils.losses import ppo_loss

    model = HFModelConfig(
        path=str(folder),
        load_tokenizer=False,
        override_config={"attn_implementation": "sdpa"},
        use_remove_padding=remove_padding,
        enable_gradient_checkpointing=False,
        use_fused_kernels=fused,
        fused_kernel_options={"impl_backend": "torch"},
    )
    made = kind(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=config.engine,
            optimizer_config=FSDPOptimizerConfig(
                optimizer="SGD", lr=0.3, weight_decay=0.0, clip_grad=1e9, total_training_steps=10
            ),
            checkpoint_config=CheckpointConfig(),
        )
    )
    made.reset()
    made.set_loss_fn(partial(ppo_loss, config=config))
    return made


def batch_of(rows, **settings):
    """Rows as verl's V1 trainer hands them to a worker: nested tensors, response-length columns, settings beside."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    def nested(values, dtype):
        return torch.nested.as_nested_tensor([torch.tensor(v, dtype=dtype) for v in values], layout=torch.jagged)

    prompts, responses = zip(*((row.prompt_ids, row.response_ids) for row, _ in rows))
    sequences = [p + r for p, r in zip(prompts, responses)]
    columns = columns_of(rows)
    mask = nested(columns.pop("response_mask"), torch.int64)
    fields = {
        "prompts": nested(prompts, torch.int64),
        "responses": nested(responses, torch.int64),
        "input_ids": nested(sequences, torch.int64),
        "position_ids": nested([range(len(ids)) for ids in sequences], torch.int64),
        "response_mask": mask,
        "loss_mask": mask,
        **{name: nested(values, torch.float32) for name, values in columns.items()},
    }
    data = TensorDict(fields, batch_size=[len(rows)])
    return tu.assign_non_tensor(data, temperature=settings.pop("temperature", 1.0), **settings)


def train(made, rows, mini_batches=1, **settings):
    """One pass over ``rows`` -> ({name: weights after it}, verl's metrics)."""
    from verl.utils import tensordict_utils as tu

    size = len(rows) * torch.distributed.get_world_size() // mini_batches  # over all processes
    data = batch_of(rows, mini_batch_size=size, global_batch_size=size, epochs=1, calculate_entropy=True, **settings)
    output = made.train_mini_batch(data)
    weights = {name: value.full_tensor().clone() for name, value in made.engine.module.state_dict().items()}
    return weights, tu.get(output, "metrics")


def infer(made, rows, **settings):
    """Log-probs and entropies of the response tokens, as verl computes old values."""
    from verl.workers.utils.padding import response_from_nested

    data = batch_of(rows, calculate_entropy=True, compute_loss=False, **settings)
    output = made.infer_batch(data.clone())
    return [response_from_nested(output[name], data["response_mask"]).values() for name in ("log_probs", "entropy")]


def apart(found, expected):
    """Largest difference between two models' weights."""
    return max(float((found[name] - value).abs().max()) for name, value in expected.items())


def filled(rows, multiple):
    """Rows up to a multiple, as verl fills a batch: a short row that nobody sampled, with the first one's columns."""
    short = [(Row([1, 2, 3], [4], [0], rows[0][0].columns), None)]
    return rows + short * (-len(rows) % multiple)


SETTINGS = {"use_kl_loss": True, "kl_loss_coef": 0.1, "entropy_coeff": 0.05}


def compare_rl(folder, model):
    """RL alone, two optimiser steps: verl's worker and loss against PACT's. verl's dual clip is put out of reach."""
    from verl.workers.engine_workers import TrainingWorker

    from pact.integrations.verl_plugin import PactTrainingWorker

    config = make_config(anchor_mode="mixture", anchor_q=1.0, sft_coef=0.0)
    rows = all_rows(with_logprobs(model, make_groups("mixture"), config), config, 0.0)[:12]
    for mode in ("token-mean", "seq-mean-token-mean"):
        settings = SETTINGS | {"clip_ratio_c": 1e9, "loss_agg_mode": mode}
        own, _ = train(worker(TrainingWorker, folder, actor_config(**settings)), rows, mini_batches=2)
        ours, metrics = train(worker(PactTrainingWorker, folder, actor_config(**settings)), rows, mini_batches=2)
        yield f"rl {mode}: step", apart(own, model.state_dict())
        yield f"rl {mode}: apart", apart(ours, own)
    yield "rl metrics", sorted(name for name in metrics if name.startswith("pact/"))


def compare_pact(folder, model, remove_padding=False):
    """All of PACT: verl's engine on its rows against the one-pass objective on the groups, after one SGD step."""
    from pact.integrations.verl_plugin import PactTrainingWorker

    config = make_config(anchor_mode="mixture", kl_coef=0.1, entropy_coef=0.05)
    groups = with_logprobs(model, make_groups("mixture"), config)
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    rows = filled(all_rows(groups, config, 0.3), 3 * world)[rank::world]
    made = worker(PactTrainingWorker, folder, actor_config(**SETTINGS), remove_padding=remove_padding)
    ours, metrics = train(made, rows, mini_batches=3, pact_mini_batches=1)  # PACT's number of steps goes before verl's
    objective = PactObjective(config)
    twin = copy.deepcopy(model)
    (batch,) = objective.build(groups, 0.3)
    loss = objective.loss(twin, batch).loss
    loss.backward()
    expected = {name: (value - 0.3 * value.grad).detach() for name, value in twin.named_parameters()}
    yield "pact: step", apart(expected, model.state_dict())
    yield "pact: apart", apart(ours, expected)
    yield "pact: loss", [metrics["loss"][0], float(loss)]


def compare_head(folder, model, remove_padding=False):
    """verl's log-probs and entropies from logits, and from PACT's head; and whether verl's own fused head runs here."""
    from verl.workers.engine_workers import TrainingWorker

    config = make_config(anchor_mode="mixture", anchor_q=1.0, sft_coef=0.0)
    rows = all_rows(with_logprobs(model, make_groups("mixture"), config), config, 0.0)[:12]
    ways = {}
    for way in ("logits", "pact"):
        undo = patch_fused_head() if way == "pact" else None
        made = worker(TrainingWorker, folder, actor_config(**SETTINGS), way != "logits", remove_padding)
        ways[way] = *infer(made, rows, temperature=0.7), train(made, rows, temperature=0.7)[0]
        if undo is not None:
            undo()
    for name, found, expected in zip(("log-probs", "entropies"), ways["pact"], ways["logits"]):
        yield f"head: {name} apart", float((found - expected).abs().max())
    yield "head: step", apart(ways["logits"][2], model.state_dict())
    yield "head: step apart", apart(ways["pact"][2], ways["logits"][2])
    made = worker(TrainingWorker, folder, actor_config(**SETTINGS), True, remove_padding)
    try:
        infer(made, rows, temperature=0.7)
    except RuntimeError as error:
        yield "head: verl's own fused one", str(error).splitlines()[0]
    else:
        yield "head: verl's own fused one", "ran"


COMPARISONS = {"rl": compare_rl, "pact": compare_pact, "head": compare_head}


def main(folder, names):
    """Run the named comparisons in this process, or in as many as RANK and WORLD_SIZE say -> {what: found}."""
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    cpu_platform()
    model = make_model(dtype=torch.float32)
    model.config.architectures = ["Qwen3ForCausalLM"]
    if rank == 0:
        model.save_pretrained(folder)
    torch.distributed.barrier()
    found = {}
    for name in names:
        kind, _, packed = name.partition(":")
        found |= dict(COMPARISONS[kind](folder, model, **({"remove_padding": True} if packed else {})))
    torch.distributed.destroy_process_group()
    return found


def record(found, path):
    """Write ``found`` with versions and date."""
    names = ("verl", "torch", "transformers", "tensordict", "ray")
    versions = {name: importlib.metadata.version(name) for name in names}
    record = {"date": datetime.date.today().isoformat(), "versions": versions, "found": found}
    Path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["rl", "pact", "pact:packed", "head:packed"], help="comparisons")
    parser.add_argument("--folder", help="shared by all processes; default: a temporary one")
    parser.add_argument("--output", help="JSON file to write the result to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = main(options.folder or temporary, options.names)
    if os.environ["RANK"] == "0":
        print(json.dumps(result))
        if options.output:
            record(result, options.output)
