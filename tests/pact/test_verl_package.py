"""PACT inside the real verl package, on CPUs: losses, engine, fused head, agent loop. `make verl` runs it."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed here; `make verl` runs these tests in an environment with it")

WORKER = Path(__file__).with_name("verl_cpu.py")


def compare(folder, *names, processes=1):
    """What tests/pact/verl_cpu.py found, in ``processes`` processes of their own."""
    started = []
    for rank in range(processes):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(WORKER), "--folder", str(folder), *names]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=300) for process in started]
    for process, (_, errors) in zip(started, outputs):
        assert process.returncode == 0, errors[-3000:]
    return json.loads(outputs[0][0].splitlines()[-1])


def test_losses_and_steps_in_verls_engine(tmp_path):
    """FSDP2 over gloo, SGD at a large rate. `rl`: verl's loss and PACT's; `pact`: its rows and the one-pass groups."""
    found = compare(tmp_path, "rl", "pact")
    for name in ("rl token-mean", "rl seq-mean-token-mean", "pact"):
        assert found[f"{name}: step"] > 0.05
        assert found[f"{name}: apart"] < 1e-5
    ours, expected = found["pact: loss"]
    assert ours == pytest.approx(expected, rel=1e-5)


def test_two_processes_make_the_same_step(tmp_path):
    found = compare(tmp_path, "pact:packed", processes=2)
    assert found["pact: apart"] < 1e-5 < found["pact: step"]


def test_the_fused_head_in_verls_engine(tmp_path):
    found = compare(tmp_path, "head:packed")
    assert found["head: log-probs apart"] < 1e-5
    assert found["head: entropies apart"] < 1e-5
    assert found["head: step apart"] < 1e-5 < found["head: step"]


@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_policy_loss_is_vanilla(mode):
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    from pact.integrations.verl import register

    register()
    torch.manual_seed(3)
    config = FSDPActorConfig(rollout_n=2, ppo_micro_batch_size_per_gpu=1, clip_ratio_high=0.3, clip_ratio_c=1.5)
    log_prob = torch.randn(5, 7, dtype=torch.float64) - 2
    arguments = {
        "old_log_prob": log_prob + 0.5 * torch.randn(5, 7),
        "advantages": torch.randn(5, 7, dtype=torch.float64),
        "response_mask": torch.rand(5, 7) < 0.7,
        "loss_agg_mode": mode,
        "config": config,
        "rollout_is_weights": torch.rand(5, 7, dtype=torch.float64),
    }
    for info in ({}, {"dp_size": 2, "batch_num_tokens": 60, "global_batch_size": 10, "loss_scale_factor": 9}):
        config.global_batch_info.clear()
        config.global_batch_info.update(info)
        pairs = []
        for name in ("vanilla", "pact"):
            leaf = log_prob.clone().requires_grad_()
            loss, metrics = get_policy_loss_fn(name)(log_prob=leaf, **arguments)
            pairs.append((loss.item(), torch.autograd.grad(loss, leaf)[0], metrics))
        (expected, wanted, theirs), (found, gradient, ours) = pairs
        assert found == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], abs=1e-6)
        assert ours["actor/pg_clipfrac_lower"] > 0


# ---- the agent loop ---------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "What does a call cost?"}]
EXPERT = [
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I need the tool. Look first.",
        "tool_calls": [{"type": "function", "function": {"name": "lookup", "arguments": {"key": "call"}}}],
    },
    {"role": "tool", "name": "lookup", "content": "42"},
    {"role": "assistant", "content": "42", "reasoning_content": "The result says 42."},
]


class Server:
    """Stands for verl's LLM server client: remembers the prompt and answers fixed ids."""

    async def generate(self, prompt_ids, **_):
        from verl.workers.rollout.replica import TokenOutput

        self.prompt_ids = list(prompt_ids)
        return TokenOutput(token_ids=[7, 8, 9], log_probs=[-0.5, -0.6, -0.7], num_preempted=0)


def agent_loop(**pact):
    from omegaconf import OmegaConf
    from tiny_tokenizers import tiny_tokenizer
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from pact.integrations.verl_plugin import PactAgentLoop

    config = OmegaConf.create(
        {
            "actor_rollout_ref": {
                "rollout": {"prompt_length": 512, "response_length": 64, "full_determinism": False},
                "actor": {"optim": {"total_training_steps": 11}},
            },
            "data": {},
        }
    )
    server = Server()
    loop = PactAgentLoop(
        inner="single_turn_agent",
        pact=pact,
        trainer_config=DictConfigWrap(config),
        server_manager=server,
        tokenizer=tiny_tokenizer("qwen"),
        processor=None,
        dataset_cls=RLHFDataset,
        data_config=DictConfigWrap(config.data),
    )
    return loop, server


def play(uid="a", session_id=0, expert=EXPERT, step=6, **pact):
    async def once():
        loop, server = agent_loop(**pact)
        sample = {"raw_prompt": MESSAGES, "expert": expert, "uid": uid, "session_id": session_id, "global_steps": step}
        return await loop.run({}, **sample), server.prompt_ids, loop.tokenizer

    outputs, prompt, tokenizer = asyncio.run(once())
    return [output.as_dict() for output in outputs], prompt, tokenizer


def test_agent_loop_brings_the_expert_row_and_both_branches():
    rows, prompt, tokenizer = play(anchor_mode="mixture", anchor_q=0.3, sft_coef=0.5)
    expert, traced, alone = rows
    assert alone["prompts"].tolist() == prompt  # the sampler saw the prompt alone
    assert "expert_trace" not in tokenizer.decode(prompt)
    assert "result: 42\n" in tokenizer.decode(traced["prompts"])
    for row, share, trace in ((traced, 0.7, 1.0), (alone, 0.3, 0.0)):
        assert row["responses"].tolist() == [7, 8, 9]
        assert row["response_mask"].tolist() == [1, 1, 1]
        assert row["pact_weight"].tolist() == pytest.approx([share] * 3)
        assert row["pact_trace"].tolist() == [trace] * 3
        assert row["rollout_log_probs"].tolist() == pytest.approx([-0.5, -0.6, -0.7])
    assert expert["prompts"].tolist() == prompt
    assert expert["response_mask"].sum() == 0
    assert expert["rollout_log_probs"].sum() == 0
    assert tokenizer.decode(expert["responses"]).startswith("<think>\nI need the tool.")
    weights = sorted(set(expert["pact_weight"].tolist()))
    assert weights == pytest.approx([0.0, 0.25, 0.5])  # progress 0.5: calls at 0.5 of 0.8 -> 0.2, half the segments
    assert expert["pact_supervised"].sum() > (expert["pact_weight"] > 0).sum()
    assert len({frozenset(row) for row in rows}) == 1  # verl stacks rows by the fields of the first


def test_all_rollouts_of_a_prompt_take_one_branch():
    taken = []
    for uid in map(str, range(6)):
        rows = [play(uid, session, anchor_q=0.5)[0] for session in (0, 1)]
        assert [len(of_session) for of_session in rows] == [2, 1]  # the expert comes once
        first, second = (of_session[-1]["pact_trace"][0].item() for of_session in rows)
        assert first == second
        taken.append(first)
    assert 0 < sum(taken) < 6


def test_a_sample_without_a_trace_is_plain_rl():
    (row,), prompt, _ = play(expert=None)
    assert row["prompts"].tolist() == prompt
    assert row["pact_weight"].tolist() == [1, 1, 1]


def test_what_verl_cannot_carry_is_refused():
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1 import get_trainer_cls

    from pact.integrations.verl_plugin import PactTrainerSync, PactTrainingWorker, check_trainer_config

    with pytest.raises(ValueError, match="sft_schedule='chord'"):
        play(sft_schedule="chord")
    assert get_trainer_cls("pact_sync") is PactTrainerSync
    good = {
        "algorithm": {"adv_estimator": "grpo"},
        "data": {"train_batch_size": 8},
        "actor_rollout_ref": {"actor": {"ppo_mini_batch_size": 4}},
    }
    check_trainer_config(OmegaConf.create(good))
    for change, mend in (
        ({"algorithm": {"adv_estimator": "gae"}}, "set it to grpo"),
        ({"algorithm": {"use_kl_in_reward": True}}, "use_kl_loss"),
        ({"data": {"train_batch_size": 6}}, "make it one"),
    ):
        with pytest.raises(ValueError, match=mend):
            check_trainer_config(OmegaConf.merge(good, change))
    with pytest.raises(ValueError, match="turn distillation off"):
        PactTrainingWorker.set_loss_fn(SimpleNamespace(), lambda: None)


def test_trainer_over_verls_own_configuration():
    """Everything up to the workers, which need GPUs: verl's defaults, its synchronous buffer, PACT's worker class."""
    import verl
    from hydra import compose, initialize_config_dir
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    from pact.integrations.verl_plugin import PactTrainerSync

    changes = {
        "trainer.v1.trainer_mode": "pact_sync",
        "algorithm.adv_estimator": "grpo",
        "data.train_batch_size": 8,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
    }
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        config = compose("ppo_trainer", [f"{name}={value}" for name, value in changes.items()])
    trainer = PactTrainerSync(config)
    assert type(trainer.replay_buffer) is ReplayBuffer
    assert trainer.trainer_mode == "sync"
    assert trainer._get_required_batch_multiple(dp_size=3) == 12  # four steps a batch, however many rows there are
    trainer._init_resource_pool_mgr()
    (actor,) = trainer.role_worker_mapping.values()
    assert actor.__ray_metadata__.class_name == "PactActorRolloutRefWorker"
