"""A tiny model with random weights and real vLLM servers around it. No GPU, no network."""

from __future__ import annotations

import os
import socket
from dataclasses import replace

# Before vLLM is imported, here and in every process started from here.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pact.engines.vllm import VllmOptions
from pact.engines.vllm_process import ServerProcess
from pact.envs import make

CONTEXT = 1024


def randomise(model, seed):
    """Weights large enough for peaked distributions, so that wrong ones show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model


def tiny_model(tokenizer, seed=0):
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    return randomise(Qwen3ForCausalLM(config), seed)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def toybox_tokenizer():
    return make("toybox", train=8, test=4).tokenizer()


class Server:
    """A vLLM server that the test starts, kills and starts again at the same address."""

    def __init__(self, model, tokenizer, folder):
        self.options = VllmOptions(
            urls=(f"http://127.0.0.1:{free_port()}",),
            dtype="float32",
            max_model_len=CONTEXT,
            enforce_eager=True,
            timeout=300.0,
            retry_seconds=10.0,
        )
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.process = None

    @property
    def url(self):
        return self.options.urls[0]

    def start(self):
        if self.process is None:
            start = replace(self.options, start=True)
            self.process = ServerProcess(start, self.model.config, self.tokenizer, self.folder, "processed_logprobs")
        return self

    def kill(self):
        """SIGKILL to the server and its workers."""
        os.killpg(self.process.process.pid, 9)
        self.process.process.wait()
        self.process = None

    def stop(self):
        if self.process is not None:
            self.process.stop()
            self.process = None
