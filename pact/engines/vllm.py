"""Rollouts by vLLM: settings, and the engines for a server over HTTP and for vLLM in the trainer's own process.

Sampling and weights only. What is trained is the trainer's; the difference between the two models' log-probs is
corrected there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pact.rollout import Completion, Generator, Sampling

COLDEST = 0.01  # vLLM raises every temperature between 0 and this to it
ABOVE_ONE = 1e-3  # nats of rounding that a log-prob may be above 0
NO_LOGPROB = -9999.0  # what vLLM's server writes for a log-prob of -inf or less than this


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM is run, in the words of its own flags.

    Args:
        mode: "server": requests go to the servers at ``urls``; "colocated": one engine in every training process.
        urls: servers, one or several; the rollouts of a prompt all go to the same one.
        start: start a server ourselves at the first of ``urls``, and stop it at the end.
        devices: CUDA_VISIBLE_DEVICES of that server; None: those of the trainer.
        sync_folder: where a server finds new weights: a folder that it and the trainer both see. None: in the run's
            folder. One below /dev/shm keeps them in memory.
        timeout: seconds one request may take, weights included.
        retry_seconds: how long a server that is gone is waited for before the run stops with a checkpoint.
        gpu_memory_utilization, tensor_parallel_size, max_model_len, dtype, enforce_eager: vLLM's settings of an engine
            that we start; ``max_model_len`` None: the model's context.

    Raises ValueError for a setting out of range.
    """

    mode: Literal["server", "colocated"] = "server"
    urls: tuple[str, ...] = ("http://127.0.0.1:8000",)
    start: bool = False
    devices: str | None = None
    sync_folder: str | None = None
    timeout: float = 1800.0
    retry_seconds: float = 120.0
    gpu_memory_utilization: float = 0.4
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("server", "colocated"):
            raise ValueError(f"vllm_mode is {self.mode!r}: set it to server or colocated")
        if not self.urls or not all(url.startswith(("http://", "https://")) for url in self.urls):
            raise ValueError(f"vllm_url is {' '.join(self.urls)!r}: give addresses like http://127.0.0.1:8000")
        if self.start and (self.mode != "server" or len(self.urls) != 1):
            raise ValueError("vllm_start starts one server: use it with vllm_mode server and one vllm_url")
        if self.tensor_parallel_size < 1 or (self.mode == "colocated" and self.tensor_parallel_size > 1):
            raise ValueError(
                f"vllm_tensor_parallel_size is {self.tensor_parallel_size}: colocated, every process has its own "
                "engine, so 1; a server takes 1 or more"
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(f"vllm_gpu_memory_utilization is {self.gpu_memory_utilization}, set it in (0, 1]")
        if self.timeout <= 0 or self.retry_seconds < 0:
            raise ValueError("vllm_timeout must be above 0 seconds and vllm_retry_seconds at least 0")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(f"vllm_max_model_len is {self.max_model_len}, set it to at least 2 tokens")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"vllm_dtype is {self.dtype!r}: set it to auto, float32, bfloat16 or float16")


class VllmEngine(Generator, Protocol):
    """A Generator whose weights have to be sent to it, and whose log-probs are not exactly the trainer's."""

    exact: bool

    def update(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Sample with ``weights`` from now on: full tensors under the names of the transformers model's state dict.

        Called in every process at once; every process exhausts the iterator. Raises RuntimeError when vLLM cannot take
        them.
        """
        ...

    def close(self) -> None:
        """End what was started for the run and remove its files."""
        ...


def make_engine(
    options: VllmOptions,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    max_batch: int = 256,
    sampling: Sampling | None = None,
) -> VllmEngine:
    """The engine that ``options`` ask for. Call it in every training process at once.

    Engines have no weights of the run until the first ``update``; sampling before it is a RuntimeError.

    Args:
        config, tokenizer: of the model that is trained. An engine that we start is built from them alone.
        folder: of the run; files for vLLM go to ``folder/vllm``.
        max_batch: rows of one session.
        sampling: of the rollouts that are trained on (None: temperature 1, top_p 1). vLLM reports log-probs in one of
            two ways, chosen when it starts.

    Raises ValueError, before any work, for a server that cannot be reached or used, for vLLM that is not installed
    (colocated), and for a temperature and top_p whose log-probs vLLM cannot report.
    """
    sampling = sampling or Sampling()
    check_temperature(sampling)
    if not logprobs_modes(sampling):
        raise ValueError(
            f"vLLM cannot report the log-probs of temperature {sampling.temperature} with top_p {sampling.top_p}: set "
            "top_p 1 or temperature 1, or use the transformers engine"
        )
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1 row, got {max_batch}")
    if options.mode == "colocated":
        from pact.engines.vllm_colocated import ColocatedEngine

        return ColocatedEngine(options, config, tokenizer, folder, max_batch=max_batch, sampling=sampling)
    from pact.engines.vllm_server import ServerEngine

    return ServerEngine(options, config, tokenizer, folder, max_batch=max_batch, sampling=sampling)


def logprobs_modes(sampling: Sampling) -> tuple[str, ...]:
    """The values of vLLM's ``--logprobs-mode`` under which it reports what `pact.rollout.Completion` asks for.

    Its "processed" log-probs are those after temperature AND top_p, its "raw" ones those before both; ours are after
    temperature and before top_p.
    """
    after_temperature = ("processed_logprobs",) if sampling.top_p == 1.0 else ()
    before_top_p = ("raw_logprobs",) if sampling.temperature in (0.0, 1.0) else ()
    return after_temperature + before_top_p


def check_temperature(sampling: Sampling) -> None:
    """Raises ValueError for a temperature that vLLM would not keep."""
    if 0.0 < sampling.temperature < COLDEST:
        raise ValueError(
            f"vLLM samples at temperatures of {COLDEST} or above, or 0 (greedy), not {sampling.temperature}"
        )


def sampling_params(sampling: Sampling, stop_id: int, max_tokens: int, seed: int, turn: int) -> dict[str, Any]:
    """Arguments of ``vllm.SamplingParams`` for one turn of the row with ``seed``.

    Nothing is left to the server's defaults or to the model's generation_config: the stop id alone ends a turn.
    """
    stream = int(np.random.SeedSequence((seed, turn)).generate_state(1, np.uint64)[0]) >> 1  # a signed 64-bit number
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": stream,
        "max_tokens": max_tokens,
        "stop_token_ids": [stop_id],
        "ignore_eos": True,
        "logprobs": 0,  # that of the sampled token alone
        "detokenize": False,
    }


def check_open(
    prompts: Sequence[list[int]], stop_id: int, seeds: Sequence[int], max_batch: int, vocab_size: int
) -> None:
    """Raises ValueError for what no session can be opened with."""
    if not 1 <= len(prompts) <= max_batch:
        raise ValueError(f"got {len(prompts)} prompts for 1 to max_batch = {max_batch} rows: open fewer at a time")
    if len(seeds) != len(prompts):
        raise ValueError(f"got {len(seeds)} seeds for {len(prompts)} prompts: give one seed a row")
    if not all(prompts):
        raise ValueError("a prompt is empty: give every row at least one token")
    if not 0 <= stop_id < vocab_size:
        raise ValueError(f"stop_id {stop_id} is outside the model's vocabulary of {vocab_size}")


def ties_head(config: PretrainedConfig) -> bool:
    """Whether the output layer of the model is its input embedding."""
    return bool(getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False))


def with_tied_head(weights: Iterable[tuple[str, torch.Tensor]], tied: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """``weights``, and the output layer of a tied model where they leave it out: vLLM's CPU kernels keep a packed copy
    of it, which a reload without that name leaves as it was."""
    embedding, head = None, not tied
    for name, tensor in weights:
        if name.endswith("embed_tokens.weight"):
            embedding = tensor
        head = head or name == "lm_head.weight"
        yield name, tensor
    if not head and embedding is not None:
        yield "lm_head.weight", embedding


class Contexts:
    """The growing ids of a session's rows, and which rows are being sampled; what both kinds of session share.

    ``mode``: how vLLM reports log-probs; where that is not what ``sampling`` needs, they are NaN.
    """

    def __init__(
        self, prompts: Sequence[list[int]], stop_id: int, sampling: Sampling, seeds: Sequence[int], mode: str
    ) -> None:
        check_temperature(sampling)
        self.known = mode in logprobs_modes(sampling)
        self.ids = [list(prompt) for prompt in prompts]
        self.turns = [0] * len(prompts)
        self.limits = [0] * len(prompts)
        self.going: set[int] = set()
        self.stop_id, self.sampling, self.seeds = stop_id, sampling, seeds

    def start(self, append: Mapping[int, list[int]], max_new_tokens: Mapping[int, int]) -> dict[int, dict[str, Any]]:
        """Append, and return the sampling parameters of the rows that begin a turn now."""
        if any(limit < 1 for limit in max_new_tokens.values()):
            raise ValueError("max_new_tokens must be at least 1 for every row that is to be sampled")
        if self.going & (append.keys() | max_new_tokens.keys()):
            raise ValueError("a row is still being sampled: name it again once its completion has been returned")
        if not self.going and not max_new_tokens:
            raise ValueError("no row is being sampled: name at least one in max_new_tokens")
        for row, ids in append.items():
            self.ids[row] += ids
        self.going |= max_new_tokens.keys()
        for row, limit in max_new_tokens.items():
            self.limits[row] = limit
        return {
            row: sampling_params(self.sampling, self.stop_id, limit, self.seeds[row], self.turns[row])
            for row, limit in max_new_tokens.items()
        }

    def finish(self, row: int, ids: list[int], logp: list[float]) -> Completion:
        """Record a sampled turn. Raises RuntimeError for ids and log-probs that cannot be right."""
        if not 1 <= len(ids) <= self.limits[row] or len(ids) != len(logp):
            raise RuntimeError(
                f"vLLM returned {len(ids)} ids and {len(logp)} log-probs for a turn of 1 to {self.limits[row]} tokens: "
                "use vLLM 0.32"
            )
        if not all(type(token) is int and token >= 0 for token in ids) or self.stop_id in ids[:-1]:
            raise RuntimeError("vLLM returned no turn: ids that are none, or tokens behind its end; use vLLM 0.32")
        if max(logp) > ABOVE_ONE:
            raise RuntimeError(f"vLLM reported a log-prob of {max(logp):g}, a probability above 1: use vLLM 0.32")
        if not np.isfinite(logp).all() or min(logp) <= NO_LOGPROB:
            raise RuntimeError("vLLM's log-probs are not finite: its weights have diverged; lower the learning rate")
        self.ids[row] += ids
        self.turns[row] += 1
        self.going.remove(row)
        return Completion(ids, logp if self.known else [math.nan] * len(ids), ids[-1] == self.stop_id)
