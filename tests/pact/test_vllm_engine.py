"""The vLLM engine against a small server with vLLM's routes; tests/real_vllm has the real one."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_vllm import CONTEXT, STOP, VOCAB, FakeVllm, eventually, table
from safetensors.torch import load_file
from transformers import Qwen3Config

from pact.arguments import parse_settings
from pact.engines import vllm_client, vllm_server
from pact.engines.vllm import VllmOptions, make_engine, sampling_params, with_tied_head
from pact.engines.vllm_process import server_arguments
from pact.engines.vllm_server import write_weights
from pact.rollout import GREEDY, Sampling

CONFIG = Qwen3Config(vocab_size=VOCAB, tie_word_embeddings=False)


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch):
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.01)


@pytest.fixture
def server():
    fake = FakeVllm()
    yield fake
    fake.hold.set()
    fake.stop()


def connect(server, folder, *, max_batch=32, sampling=None, **options):
    values = VllmOptions(urls=(server.url,), retry_seconds=0.5, timeout=20.0)
    return make_engine(
        replace(values, **options), CONFIG, None, folder, max_batch=max_batch, sampling=sampling or Sampling()
    )


@pytest.fixture
def engine(server, tmp_path):
    engine = connect(server, tmp_path)
    engine.update([("table", table(0))], 0)
    yield engine
    engine.close()


def finish(session, append, limits):
    completions = session.generate(append, limits)
    while len(completions) < len(limits):
        later = session.generate({}, {})
        assert later
        completions |= later
    return completions


def play(engine, prompts, turns=1, *, sampling=Sampling(), seeds=None, limit=6):  # noqa: B008
    """Per row the list of (context before the turn, completion)."""
    seeds = list(range(len(prompts))) if seeds is None else seeds
    session = engine.open(prompts, stop_id=STOP, sampling=sampling, seeds=seeds)
    contexts, history = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    for turn in range(turns):
        append = {row: [5, 6] if turn else [] for row in range(len(prompts))}
        completions = finish(session, append, dict.fromkeys(append, limit))
        for row, completion in completions.items():
            contexts[row] += append[row]
            history[row].append((list(contexts[row]), completion))
            contexts[row] += completion.ids
    session.close()
    return history


def expected_logp(weights, context, ids, temperature=1.0):
    logp = (weights / temperature).log_softmax(-1)
    return [float(logp[last, token]) for last, token in zip([context[-1], *ids], ids)]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), GREEDY])
def test_turns_are_sampled_after_the_whole_context(server, engine, sampling):
    history = play(engine, [[1, 3], [1, 3], [4]], turns=4, sampling=sampling)
    finished = 0
    for turns in history:
        for context, completion in turns:
            expected = expected_logp(table(0), context, completion.ids, sampling.temperature or 1.0)
            np.testing.assert_allclose(completion.logp, expected, atol=1e-6)
            assert completion.finished == (completion.ids[-1] == STOP)
            assert completion.finished or len(completion.ids) == 6
            finished += completion.finished
            assert context in [body["token_ids"] for body in server.bodies]
    assert sampling is GREEDY or 0 < finished < 12  # both ends of a turn were seen


def test_requests_leave_nothing_to_the_servers_defaults(server, engine):
    play(engine, [[1]])
    params = server.bodies[0]["sampling_params"]
    assert params["stop_token_ids"] == [STOP]
    assert params["ignore_eos"]
    assert not params["detokenize"]
    neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert neutral.items() <= params.items()


def test_a_row_depends_on_its_own_seed_only(engine):
    def ids(history):
        return [completion.ids for _, completion in history]

    together = play(engine, [[1], [1], [3]], turns=3, seeds=[7, 8, 2**64 - 1])
    assert ids(together[1]) == ids(play(engine, [[1]], turns=3, seeds=[8])[0])
    assert ids(together[0]) != ids(together[1])
    seeds = {sampling_params(Sampling(), STOP, 1, 8, turn)["seed"] for turn in range(100)}
    assert len(seeds) == 100  # a turn never repeats the draws of another
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_rows_are_returned_as_they_end(server, engine):
    """A row waits for no other: the second can go on while the first is still being sampled."""
    session = engine.open([[1], [3]], stop_id=STOP, sampling=Sampling(), seeds=[0, 1])
    first = finish(session, {}, {1: 1})
    assert first.keys() == {1}
    server.hold.clear()
    results = []
    thread = threading.Thread(target=lambda: results.append(session.generate({1: [4]}, {0: 2, 1: 2})))
    thread.start()
    eventually(lambda: len(server.bodies) == 3)  # both requests are with the server at once
    with pytest.raises(ValueError, match="still being sampled"):
        session.generate({0: [1]}, {0: 1})
    server.hold.set()
    thread.join()
    rest = {} if len(results[0]) == 2 else session.generate({}, {})
    assert (results[0] | rest).keys() == {0, 1}
    session.close()


def test_an_update_is_followed_and_takes_the_old_files_away(server, engine, tmp_path):
    server.calls.clear()
    engine.update([("table", table(1))], 1)
    # The label comes last: a load that was cut short must not look whole.
    assert [path for path in server.calls if path != "/weight_info"] == [
        "/pause",
        "/collective_rpc",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/resume",
    ]
    assert server.label.endswith("-1")
    ((context, completion),) = play(engine, [[1]])[0]
    np.testing.assert_allclose(completion.logp, expected_logp(table(1), context, completion.ids), atol=1e-6)
    folders = [path for path in (tmp_path / "vllm" / "weights").iterdir() if path.is_dir()]
    assert [path.name for path in folders] == [server.label]


def test_a_restarted_server_gets_its_weights_again(server, engine):
    play(engine, [[1]] * 4)
    server.restart()
    for turns in play(engine, [[1]] * 4, seeds=[0, 1, 2, 3]):
        ((context, completion),) = turns
        np.testing.assert_allclose(completion.logp, expected_logp(table(0), context, completion.ids), atol=1e-6)
    assert server.count("/pause") == 2  # once for the update, once for all four rows


def test_a_turn_under_two_weights_does_not_count(server, engine):
    """The server goes away and comes back while a request is under way."""
    session = engine.open([[1]], stop_id=STOP, sampling=Sampling(), seeds=[0])
    server.hold.clear()
    results = []
    thread = threading.Thread(target=lambda: results.append(session.generate({}, {0: 6})))
    thread.start()
    eventually(lambda: server.bodies)
    server.restart()
    server.hold.set()
    thread.join()
    session.close()
    completion = results[0][0]
    np.testing.assert_allclose(completion.logp, expected_logp(table(0), [1], completion.ids), atol=1e-6)
    assert len(server.bodies) == 2


def test_a_server_shared_by_two_runs_is_an_error(server, engine, monkeypatch):
    monkeypatch.setattr(FakeVllm, "restart", lambda self: None)
    original = server.answer
    server.answer = lambda path, body: (  # another trainer renames its weights at once
        (200, {}) if path == "/update_weight_version" else original(path, body)
    )
    server.label = "other-3"
    with pytest.raises(RuntimeError, match="used by two runs"):
        play(engine, [[1]])


@pytest.mark.parametrize("fault", [500, 503, "drop"])
def test_passing_faults_are_retried(server, engine, fault):
    server.faults["/inference/v1/generate"] = [fault, fault]
    ((context, completion),) = play(engine, [[1]])[0]
    np.testing.assert_allclose(completion.logp, expected_logp(table(0), context, completion.ids), atol=1e-6)
    assert len(server.bodies) == 1
    assert server.count("/inference/v1/generate") == 1 + 3  # the first looks whether it is there
    server.faults = {"/collective_rpc": [fault], "/reset_prefix_cache": [fault]}
    engine.update([("table", table(1))], 1)
    assert server.label.endswith("-1")


def test_a_server_that_is_gone_is_one_error_that_names_it(server, engine):
    server.stop()
    with pytest.raises(RuntimeError, match=rf"{server.url} is gone .* start it again .* resume") as error:
        play(engine, [[1], [3]])
    assert "\n" not in str(error.value)
    rest = iter([("table", table(1)), ("more", table(2))])
    with pytest.raises(RuntimeError, match="is gone"):
        engine.update(rest, 1)
    assert next(rest, None) is None  # the other processes need every step of it


def test_a_server_that_comes_back_is_waited_for(tmp_path):
    server = FakeVllm()
    engine = connect(server, tmp_path, retry_seconds=20.0)
    engine.update([("table", table(0))], 0)
    server.stop()
    again = []
    timer = threading.Timer(0.3, lambda: again.append(FakeVllm(server.port)))
    timer.start()
    ((context, completion),) = play(engine, [[1]])[0]
    np.testing.assert_allclose(completion.logp, expected_logp(table(0), context, completion.ids), atol=1e-6)
    engine.close()
    again[0].stop()


def test_a_request_that_timed_out_is_aborted_before_the_next_attempt(server, tmp_path):
    engine = connect(server, tmp_path, timeout=0.2)
    engine.update([("table", table(0))], 0)
    server.hold.clear()  # until the abort
    ((_, completion),) = play(engine, [[3, 4]])[0]
    assert completion.ids
    asked = [body["request_id"] for body in server.bodies]
    assert len(asked) == len(set(asked)) == 2
    assert server.aborted == {asked[0]}
    engine.close()


GOOD = {"token_ids": [1, STOP], "finish_reason": "stop", "weight_versions": [{"version": "LABEL"}]}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (None, "the answer is not of vLLM's form"),
        ({}, "the answer is not of vLLM's form"),
        ({"logprobs": None}, "2 ids and 0 log-probs"),
        ({"finish_reason": "error"}, "a turn ended with the finish reason 'error'"),
        ({"finish_reason": None}, "a turn ended with the finish reason None"),
        ({"token_ids": [STOP, 1]}, "tokens behind its end"),
        ({"token_ids": [-1, STOP]}, "ids that are none"),
        ({"token_ids": [1.5, STOP]}, "ids that are none"),
        ({"logp": [0.5, -1.0]}, "a log-prob of 0.5, a probability above 1"),
        ({"logp": [math.nan, -1.0]}, "log-probs are not finite"),
        ({"token_ids": [1] * 7, "logp": [-1.0] * 7}, "7 ids and 7 log-probs for a turn of 1 to 6 tokens"),
    ],
)
def test_answers_that_are_no_turn(server, engine, monkeypatch, choice, message):
    changed = {} if not choice else GOOD | choice
    if changed:
        logp = changed.pop("logp", [-1.0, -1.0])
        changed.setdefault("logprobs", {"content": [{"logprob": value} for value in logp]})
        changed["weight_versions"] = [{"version": server.label}]
    answer = None if choice is None else {"choices": [changed]}
    monkeypatch.setattr(server, "generate", lambda body: (200, answer))
    with pytest.raises(RuntimeError, match=message):
        play(engine, [[3, 4]])


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v1/models", (200, {})),
        ("/v1/models", (200, {"data": [{"max_model_len": None}]})),
        ("/v1/models", (204, None)),
        ("/server_info", (200, None)),
        ("/server_info", (200, {"vllm_config": {}})),
        ("/inference/v1/generate", (401, {"error": "who are you"})),
        ("/inference/v1/generate", (405, None)),
    ],
)
def test_a_server_that_is_something_else(server, tmp_path, monkeypatch, path, answer):
    real = server.answer
    monkeypatch.setattr(server, "answer", lambda asked, body: answer if asked == path else real(asked, body))
    with pytest.raises(ValueError, match=r"lacks what training needs .*: start vLLM 0.32 or later"):
        connect(server, tmp_path)


def test_a_refusal_is_not_retried(server, engine):
    with pytest.raises(RuntimeError, match=r"answered 400: the prompt \(length 64\) is too long"):
        play(engine, [[1] * CONTEXT])
    assert len(server.bodies) == 1


def test_weights_that_cannot_be_written_are_an_error(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    engine = connect(server, tmp_path, sync_folder=str(tmp_path / "file"))
    rest = iter([("table", table(0)), ("more", table(1))])
    with pytest.raises(RuntimeError, match=r"cannot write the weights to .*Not a directory.* set vllm_sync_folder"):
        engine.update(rest, 0)
    assert next(rest, None) is None
    with pytest.raises(RuntimeError, match="call update before sampling"):
        play(engine, [[1]])


def test_closing_stops_what_is_under_way(server, engine):
    session = engine.open([[1], [3]], stop_id=STOP, sampling=Sampling(), seeds=[0, 1])
    server.hold.clear()

    def generate():
        with pytest.raises((RuntimeError, CancelledError)):
            session.generate({}, {0: 6, 1: 6})

    thread = threading.Thread(target=generate)
    thread.start()
    eventually(lambda: len(server.bodies) == 2)
    session.close()
    eventually(lambda: len(server.aborted) == 2)
    thread.join(5.0)
    assert not thread.is_alive()


def test_rows_of_a_prompt_go_to_one_server(server, tmp_path):
    other = FakeVllm()
    engine = connect(server, tmp_path, urls=(server.url, other.url))
    engine.update([("table", table(0))], 0)
    play(engine, [[1], [3], [1], [4], [3]], turns=2)
    first, second = ({tuple(body["token_ids"][:1]) for body in fake.bodies} for fake in (server, other))
    assert first | second == {(1,), (3,), (4,)}
    assert not first & second
    assert first
    assert second
    engine.close()
    other.stop()


def test_log_probs_nobody_can_know_are_nan(engine):
    """An evaluation may sample as it likes; training may not, see below."""
    ((_, completion),) = play(engine, [[1]], sampling=Sampling(0.7, 0.9))[0]
    assert all(math.isnan(value) for value in completion.logp)
    assert len(completion.logp) == len(completion.ids)


@pytest.mark.parametrize(
    ("options", "sampling", "message"),
    [
        ({"urls": ("http://127.0.0.1:9",)}, Sampling(), r"no vLLM server answers at http://127.0.0.1:9 .*: start it"),
        ({"urls": ("http://no host/",)}, Sampling(), "no URL"),
        ({}, Sampling(0.7, 0.9), "set top_p 1 or temperature 1"),
        ({}, Sampling(1.0, 0.9), "start it with --logprobs-mode raw_logprobs"),
        ({}, Sampling(0.001), "temperatures of 0.01 or above"),
        ({"start": True, "urls": ("http://127.0.0.1:9",)}, Sampling(), "vllm_start needs vLLM here"),
        ({"mode": "colocated"}, Sampling(), "needs vLLM in this environment"),
    ],
)
def test_what_cannot_work_is_said_before_any_work(server, tmp_path, options, sampling, message):
    with pytest.raises(ValueError, match=message) as error:
        connect(server, tmp_path, sampling=sampling, **options)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_out": False}, "VLLM_SERVER_DEV_MODE=1 and --enable-scale-out"),
        ({"development": False}, "VLLM_SERVER_DEV_MODE=1 and --enable-scale-out"),
        ({"prefix_caching": False}, "--enable-prefix-caching"),
        ({"logprobs_mode": "raw_logits"}, "--logprobs-mode processed_logprobs"),
    ],
)
def test_a_server_started_otherwise_is_refused(tmp_path, settings, message):
    fake = FakeVllm(**settings)
    with pytest.raises(ValueError, match=message):
        connect(fake, tmp_path)
    fake.stop()


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "remote"},
        {"urls": ()},
        {"urls": ("localhost:8000",)},
        {"start": True, "mode": "colocated"},
        {"start": True, "urls": ("http://a:1", "http://b:1")},
        {"mode": "colocated", "tensor_parallel_size": 2},
        {"gpu_memory_utilization": 0.0},
        {"timeout": 0.0},
        {"retry_seconds": -1.0},
        {"max_model_len": 1},
        {"dtype": "int8"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="vllm_"):
        VllmOptions(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "1 to max_batch"),
        ({"prompts": [[1]] * 33}, "1 to max_batch"),
        ({"prompts": [[1], []]}, "empty"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"stop_id": VOCAB}, "vocabulary"),
    ],
)
def test_rows_that_cannot_be(engine, change, message):
    values = {"prompts": [[1]], "stop_id": STOP, "sampling": Sampling(), "seeds": [0]} | change
    if "prompts" in change:
        values["seeds"] = [0] * len(values["prompts"])
    with pytest.raises(ValueError, match=message):
        engine.open(values.pop("prompts"), **values)


def test_limits_of_a_turn(engine):
    session = engine.open([[1]], stop_id=STOP, sampling=Sampling(), seeds=[0])
    with pytest.raises(ValueError, match="at least 1"):
        session.generate({}, {0: 0})
    with pytest.raises(ValueError, match="name at least one"):
        session.generate({}, {})
    session.close()
    assert engine.context_length == CONTEXT


def test_weights_come_back_from_the_files(tmp_path, monkeypatch):
    """Tied, transposed, cast and sharded tensors; no shard holds more than one tensor over the size."""
    monkeypatch.setattr(vllm_server, "SHARD_BYTES", 100)
    first, second = torch.randn(4, 4), torch.randn(3, 5)
    weights = {"a": first, "tied": first, "b": second.T, "c": torch.randn(2, requires_grad=True)}
    write_weights(iter(weights.items()), tmp_path / "plain")
    write_weights(iter(weights.items()), tmp_path / "half", torch.bfloat16)
    for folder, dtype in (("plain", torch.float32), ("half", torch.bfloat16)):
        files = sorted((tmp_path / folder).glob("*.safetensors"))
        found = {}
        for file in files:
            found |= load_file(file)
        assert len(files) == (2 if folder == "plain" else 1)
        assert found.keys() == weights.keys()
        for name, value in weights.items():
            assert torch.equal(found[name], value.detach().to(dtype))


def test_a_tied_output_layer_is_sent_by_name():
    weights = [("model.embed_tokens.weight", torch.ones(2, 2)), ("model.norm.weight", torch.ones(2))]
    assert [name for name, _ in with_tied_head(weights, tied=False)] == [name for name, _ in weights]
    *_, (name, head) = with_tied_head(weights, tied=True)
    assert name == "lm_head.weight"
    assert head is weights[0][1]
    whole = [*weights, ("lm_head.weight", torch.zeros(2, 2))]
    assert len(list(with_tied_head(whole, tied=True))) == 3


def test_two_processes_share_weights_rollouts_and_errors(server, tmp_path):
    """Gathering is joint work: it must be finished on every process, and a failure of one is known to both."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    worker = Path(__file__).with_name("vllm_worker.py")
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, worker, server.url, tmp_path],
            env=os.environ | places | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(processes):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert f"rank {rank} of 2: cannot write the weights" in output
    assert server.label.endswith("-1")


def test_settings_reach_the_options(tmp_path):
    flags = {"engine": "vllm", "vllm_url": "http://a:1,http://b:2", "vllm_retry_seconds": 7, "vllm_dtype": "bfloat16"}
    training = parse_settings([f"--{name}={value}" for name, value in flags.items()]).training
    assert training.engine == "vllm"
    assert training.says_vllm() == ["vllm_url", "vllm_retry_seconds", "vllm_dtype"]
    assert parse_settings([]).training.says_vllm() == []
    options = training.vllm_options()
    assert options == VllmOptions(urls=("http://a:1", "http://b:2"), retry_seconds=7.0, dtype="bfloat16")
    assert parse_settings([]).training.engine == "transformers"
    with pytest.raises(ValueError, match="vllm_url"):
        parse_settings(["--vllm_url", "localhost"])


def test_arguments_of_a_server_of_our_own(tmp_path):
    options = VllmOptions(urls=("http://127.0.0.1:8123/",), start=True, max_model_len=99, enforce_eager=True)
    arguments = server_arguments(options, tmp_path, "raw_logprobs")
    text = " ".join(arguments)
    assert f"--model {tmp_path} --load-format dummy --generation-config vllm" in text
    assert "--host 127.0.0.1 --port 8123" in text
    assert "--logprobs-mode raw_logprobs --enable-prefix-caching --enable-scale-out" in text
    assert "--max-model-len 99" in text
    assert arguments[-1] == "--enforce-eager"
    assert json.dumps(arguments)
