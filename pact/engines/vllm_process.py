"""A vLLM server of our own: started on the model's config alone, stopped with the process that started it."""

from __future__ import annotations

import atexit
import copy
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import urllib3
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pact.engines.vllm import VllmOptions

STOP_SECONDS = 20.0  # a server has to end by itself
# The child asks the kernel for SIGTERM at its parent's death, however that dies, and becomes the server.
LEASHED = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.executable, sys.argv[1:])"


def save_shell(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """``folder/model`` with what vLLM builds an engine from: config and tokenizer, no weights."""
    model, config = folder / "model", copy.deepcopy(config)
    # A model that was built from its config has no such line, and vLLM would take it for one that embeds.
    config.architectures = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(model)
    tokenizer.save_pretrained(model)
    return model


def server_arguments(options: VllmOptions, model: Path, logprobs_mode: str) -> list[str]:
    """Arguments of vLLM's server as training needs it; docs/vllm.md has the same for a server started by hand."""
    url = urlsplit(options.urls[0])
    arguments = [
        *("--model", str(model), "--load-format", "dummy", "--generation-config", "vllm"),
        *("--runner", "generate"),
        *("--host", url.hostname or "127.0.0.1", "--port", str(url.port or 8000)),
        *("--logprobs-mode", logprobs_mode, "--enable-prefix-caching", "--enable-scale-out"),
        *("--dtype", options.dtype, "--gpu-memory-utilization", str(options.gpu_memory_utilization)),
        *("--tensor-parallel-size", str(options.tensor_parallel_size)),
    ]
    if options.max_model_len is not None:
        arguments += ["--max-model-len", str(options.max_model_len)]
    return [*arguments, "--enforce-eager"] if options.enforce_eager else arguments


class ServerProcess:
    """Starts the server and returns when it answers; its output goes to ``folder/server.log``.

    Raises ValueError when vLLM is not installed, something listens at the address already, or the server ends or stays
    silent for ``options.timeout`` seconds.
    """

    def __init__(
        self,
        options: VllmOptions,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        logprobs_mode: str,
    ) -> None:
        url, self.log = options.urls[0].rstrip("/"), folder / "server.log"
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("vllm_start needs vLLM here: pip install 'pact-kernels[vllm]', or start a server yourself")
        if _healthy(url):
            raise ValueError(f"a server answers at {url} already: leave vllm_start out to use it, or stop it")
        model = save_shell(config, tokenizer, folder)
        command = ["-m", "vllm.entrypoints.openai.api_server", *server_arguments(options, model, logprobs_mode)]
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
        if options.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = options.devices
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)  # the trainer's process group is none of its business
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LEASHED, sys.executable, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        atexit.register(self.stop)
        self._wait(url, options.timeout)

    def _wait(self, url: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not _healthy(url):
            if self.process.poll() is not None:
                raise ValueError(f"the vLLM server ended with code {self.process.returncode}: see {self.log}")
            if time.monotonic() > deadline:
                self.stop()
                raise ValueError(f"the vLLM server did not answer within {seconds:.0f} s: see {self.log}")
            time.sleep(0.5)

    def stop(self) -> None:
        """End the server and its workers."""
        atexit.unregister(self.stop)
        for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
                try:
                    self.process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue


def _healthy(url: str) -> bool:
    try:
        return urllib3.request("GET", f"{url}/health", retries=False, timeout=5.0).status == 200
    except urllib3.exceptions.HTTPError:
        return False
