"""The routes of vLLM's server that the engine uses, over a table of logits instead of a model; faults on request."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

VOCAB, STOP, CONTEXT = 13, 2, 64


def table(seed):
    """Logits of the next token by the last one, [VOCAB, VOCAB]."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


class FakeVllm:
    """Listens at ``url`` from construction to ``stop``; ``restart`` forgets weights and label, as a new process does.

    ``faults``: what becomes of the next requests for a path: an HTTP status, or "drop" for a broken connection.
    ``calls``: the paths in their order, ``bodies``: of generate requests. ``hold``: generation waits while it is clear.
    """

    def __init__(
        self, port=0, *, logprobs_mode="processed_logprobs", prefix_caching=True, development=True, scale_out=True
    ):
        self.logprobs_mode, self.prefix_caching, self.development = logprobs_mode, prefix_caching, development
        self.scale_out = scale_out
        self.faults, self.calls, self.bodies = {}, [], []
        self.hold, self.aborted = threading.Event(), set()
        self.hold.set()
        self.connections = []
        self.restart()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def restart(self):
        self.logits, self.label = torch.zeros(VOCAB, VOCAB), "default"

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:  # those kept alive would go on being served
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def count(self, path):
        return Counter(self.calls)[path]

    def answer(self, path, body):
        """Status and JSON of one request."""
        if path == "/v1/models":
            return 200, {"data": [{"id": "fake", "max_model_len": CONTEXT}]}
        if path == "/inference/v1/generate":
            return self.generate(body)
        if path == "/inference/v1/abort_requests":
            self.aborted |= set(body["request_ids"])
            self.hold.set()
            return 200, None
        if not self.development:
            return 404, {"error": {"message": "Not Found"}}
        if path == "/server_info":
            caching = {"enable_prefix_caching": self.prefix_caching}
            return 200, {
                "vllm_config": {"model_config": {"logprobs_mode": self.logprobs_mode}, "cache_config": caching}
            }
        if path == "/weight_info":
            return 200, {"weight_version": self.label}
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            found = {}
            for file in sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors")):
                found |= load_file(file)
            self.logits = found["table"].float()
        if path == "/update_weight_version":
            self.label = body["new_version"]
        return 200, {"success": True}

    def generate(self, body):
        """Sample as vLLM does: the stop id is kept, log-probs are of the sampled tokens, labels of the weights."""
        if not self.scale_out:
            return 403, {"error": {"message": "Scale-out endpoints are disabled"}}
        if not body:
            return 400, {"error": {"message": "token_ids is missing"}}
        self.bodies.append(body)
        params, context, ids, logp = body["sampling_params"], list(body["token_ids"]), [], []
        if len(context) >= CONTEXT:
            return 400, {"error": {"message": f"the prompt (length {len(context)}) is too long"}}
        generator = torch.Generator().manual_seed(params["seed"])
        first = self.label
        self.hold.wait()
        if body["request_id"] in self.aborted:
            return 200, _choice([], [], "abort", [])
        while len(ids) < params["max_tokens"] and STOP not in ids:
            row = (self.logits[context[-1]] / (params["temperature"] or 1.0)).log_softmax(-1)
            token = row.argmax() if params["temperature"] == 0 else torch.multinomial(row.exp(), 1, generator=generator)
            context.append(int(token))
            ids.append(int(token))
            logp.append(float(row[int(token)]))
        return 200, _choice(ids, logp, "stop" if ids[-1] == STOP else "length", sorted({first, self.label}))

    def _handler(fake):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                fake.connections.append(self.connection)

            def do_GET(self):
                self.respond(None)

            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                self.respond(json.loads(self.rfile.read(length) or b"null"))

            def respond(self, body):
                path = self.path.partition("?")[0]
                fake.calls.append(path)
                fault = fake.faults[path].pop(0) if fake.faults.get(path) else None
                if fault == "drop":
                    self.close_connection = True
                    return
                status, answer = (fault, {"error": {"message": "a fault"}}) if fault else fake.answer(path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        return Handler


def _choice(ids, logp, reason, labels):
    content = [{"token_id": token, "logprob": value} for token, value in zip(ids, logp)]
    spans = [{"version": label, "start": 0, "end": len(ids)} for label in labels]
    choice = {"token_ids": ids, "logprobs": {"content": content}, "finish_reason": reason, "weight_versions": spans}
    return {"choices": [choice]}


def eventually(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)
