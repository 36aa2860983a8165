"""Generator on vLLM servers: rows are HTTP requests in flight at once, weights travel as files both sides see.

The servers' own scheduling and prefix cache do the batching; nothing here knows models.
"""

from __future__ import annotations

import atexit
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pact.engines.vllm import Contexts, VllmOptions, check_open, logprobs_modes, ties_head, with_tied_head
from pact.engines.vllm_client import Answer, Refused, Unreachable, VllmClient
from pact.engines.vllm_process import ServerProcess
from pact.rollout import Completion, Sampling

SHARD_BYTES = 2**30  # of one file of weights, and so of the host memory that writing them takes


class ServerEngine:
    """Generator on the servers of ``options.urls``. See `pact.engines.vllm.make_engine`, which makes it.

    A completion counts only when the server says that all of it was sampled with the weights of the last ``update``. A
    server that was restarted in between gets them again, from the files that are still there.
    """

    exact = False

    def __init__(
        self,
        options: VllmOptions,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        *,
        max_batch: int,
        sampling: Sampling,
    ) -> None:
        self.max_batch, self.vocab_size = max_batch, config.get_text_config(decoder=True).vocab_size
        self.tied = ties_head(config)
        # Named after the run: stable when it is resumed, and apart from other runs in the same sync_folder.
        below = Path(options.sync_folder, folder.name) if options.sync_folder else folder / "vllm"
        self.folder = below.absolute() / "weights"
        self.dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
        self.label: str | None = None  # of the weights to sample with: this run's name and their version
        self.run = uuid.uuid4().hex
        self.process: ServerProcess | None = None
        modes = logprobs_modes(sampling)
        if options.start:
            self._together(lambda: self._start(options, config, tokenizer, folder / "vllm", modes[0]))
        limits: Any = {"timeout": options.timeout, "retry_seconds": options.retry_seconds, "connections": max_batch}
        self.clients = [VllmClient(url, **limits) for url in options.urls]
        infos = [client.info() for client in self.clients]
        for client, info in zip(self.clients, infos):
            if info.logprobs_mode not in modes:
                raise ValueError(
                    f"the server at {client.url} reports {info.logprobs_mode}, not what this run's sampling needs: "
                    f"start it with --logprobs-mode {modes[0]}"
                )
            if not info.prefix_caching:
                raise ValueError(
                    f"the server at {client.url} caches no prefixes, so every rollout and turn would compute its "
                    "prompt again: start it with --enable-prefix-caching"
                )
        self.context_length: int | None = min(info.context_length for info in infos)
        atexit.register(self.close)
        self.logprobs_mode = infos[0].logprobs_mode if len({info.logprobs_mode for info in infos}) == 1 else modes[0]

    def open(
        self, prompts: Sequence[list[int]], *, stop_id: int, sampling: Sampling, seeds: Sequence[int]
    ) -> ServerSession:
        """See `pact.rollout.Generator`. Log-probs that the servers do not report this way are NaN (evaluations).

        Raises ValueError for rows or a stop id that cannot be, RuntimeError before the first ``update``.
        """
        check_open(prompts, stop_id, seeds, self.max_batch, self.vocab_size)
        if self.label is None:
            raise RuntimeError("the vLLM engine has no weights of this run yet: call update before sampling")
        return ServerSession(self, Contexts(prompts, stop_id, sampling, seeds, self.logprobs_mode))

    def update(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Give all servers ``weights``, called version ``version``; every process calls it at once and exhausts them.

        Raises RuntimeError, on every process, when they cannot be written or a server does not take them.
        """
        label, rest = f"{self.run}-{version}", with_tied_head(weights, self.tied)
        path = self.folder / label

        def send() -> str:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_weights(rest, path, self.dtype)
            except (OSError, SafetensorError) as error:
                raise RuntimeError(
                    f"cannot write the weights to {self.folder} ({error}): make room, or set vllm_sync_folder"
                ) from error
            with ThreadPoolExecutor(len(self.clients)) as pool:
                list(pool.map(lambda client: client.retry(lambda: client.load(path, label)), self.clients))
            return label

        self.label = self._together(send, always=lambda: deque(rest, maxlen=0))
        if PartialState().is_main_process:
            for other in self.folder.iterdir():
                if other.is_dir() and other.name != self.label:
                    shutil.rmtree(other, ignore_errors=True)

    def restore(self, client: VllmClient) -> None:
        """Give a server that was restarted the weights again, once, whoever notices it first.

        Raises Unreachable and Refused.
        """
        assert self.label is not None, "a session is open"
        path = self.folder / self.label
        with FileLock(self.folder / f"server-{self.clients.index(client)}.lock"):
            if client.weight_label() != self.label:
                client.load(path, self.label)

    def close(self) -> None:
        """Stop the server that was started here and remove the files of weights; done at exit where nobody calls it."""
        atexit.unregister(self.close)
        for client in self.clients:
            client.close()
        if self.process is not None:
            self.process.stop()
        if PartialState().is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *arguments: Any) -> None:
        self.process = ServerProcess(*arguments)

    def _together(self, action: Any, always: Any = lambda: None) -> Any:
        """``action()`` on the main process and ``always()`` on all; its result, or its error, is that of everyone."""
        outcome: list[Any] = [None, None]
        try:
            if PartialState().is_main_process:
                outcome[0] = action()
        except Exception as error:  # whatever it is: the other processes wait to hear of it
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            outcome[1] = kind(str(error))
        always()
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


class ServerSession:
    """Contexts of one batch; a row that is being sampled is a request in a thread of its own."""

    def __init__(self, engine: ServerEngine, contexts: Contexts) -> None:
        self.engine, self.contexts = engine, contexts
        self.name, self.closed = uuid.uuid4().hex, threading.Event()
        self.pool = ThreadPoolExecutor(len(contexts.ids), thread_name_prefix="pact-vllm")
        self.futures: dict[Future[Answer], int] = {}
        self.ids = [f"{self.name}-{row}" for row in range(len(contexts.ids))]  # of the requests under way
        # All rows of a prompt go to one server, whose cache then holds it; processes begin at different servers.
        place: dict[tuple[int, ...], int] = {}
        first, clients = PartialState().process_index, engine.clients
        self.client_of = [
            clients[(first + place.setdefault(tuple(prompt), len(place))) % len(clients)] for prompt in contexts.ids
        ]

    def generate(self, append: Mapping[int, list[int]], max_new_tokens: Mapping[int, int]) -> dict[int, Completion]:
        """See `pact.rollout.Session`. Raises RuntimeError when a server is gone for good or refuses a request."""
        for row, params in self.contexts.start(append, max_new_tokens).items():
            self.futures[self.pool.submit(self._turn, row, list(self.contexts.ids[row]), params)] = row
        done, _ = wait(self.futures, return_when=FIRST_COMPLETED)
        answers = {self.futures.pop(future): future.result() for future in done}
        return {row: self.contexts.finish(row, answer.ids, answer.logp) for row, answer in answers.items()}

    def close(self) -> None:
        """Stop what is still being sampled."""
        self.closed.set()
        self.pool.shutdown(wait=False, cancel_futures=True)
        for client in self.engine.clients if self.futures else ():
            with suppress(Unreachable, Refused):
                client.abort([self.ids[row] for row in self.futures.values() if self.client_of[row] is client])

    def _turn(self, row: int, ids: list[int], params: dict[str, Any]) -> Answer:
        client, label = self.client_of[row], self.engine.label

        def attempt() -> Answer:
            self.ids[row] = request = f"{self.name}-{row}-{uuid.uuid4().hex[:8]}"
            try:
                answer = client.generate(ids, params, request)
            except Unreachable:  # of a request that timed out the server knows nothing: it would go on sampling
                with suppress(Unreachable, Refused):
                    client.abort([request])
                raise
            if answer.finish_reason != "abort" and answer.weight_labels == {label}:
                return answer
            if not self.closed.is_set():
                self.engine.restore(client)
            raise Unreachable("a turn was cut or sampled with other weights: restarted, or used by two runs")

        return client.retry(attempt, self.closed)


def write_weights(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write ``weights`` to ``folder`` as safetensors of about SHARD_BYTES each, in ``dtype`` (None: their own)."""
    folder.mkdir()
    for number, shard in enumerate(_shards(weights, dtype)):
        save_file(shard, folder / f"model-{number:05d}.safetensors")


def _shards(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None
) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    memory: set[int] = set()  # safetensors writes no two tensors that share theirs
    size = 0
    for name, tensor in weights:
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        shard[name] = tensor.clone() if tensor.data_ptr() in memory else tensor
        memory.add(tensor.data_ptr())
        size += tensor.nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, memory, size = {}, set(), 0
    if shard:
        yield shard
