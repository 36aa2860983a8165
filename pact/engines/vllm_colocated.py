"""Generator on a vLLM engine in the trainer's own process, one a process: weights are handed over in memory.

On a GPU the engine sleeps while the model is trained. The only file that imports vLLM.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pact.engines.vllm import Contexts, VllmOptions, check_open, logprobs_modes, ties_head, with_tied_head
from pact.engines.vllm_process import save_shell
from pact.rollout import Completion, Sampling


class ColocatedEngine:
    """Generator on ``vllm.LLM``. See `pact.engines.vllm.make_engine`, which makes it."""

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
        # vLLM reads it at import: the engine in this process, not in a child, so that tensors can be handed to it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError(
                f"vllm_mode colocated needs vLLM in this environment ({error}): pip install 'pact-kernels[vllm]', or "
                "use vllm_mode server"
            ) from error
        self.max_batch, self.vocab_size = max_batch, config.get_text_config(decoder=True).vocab_size
        self.tied = ties_head(config)
        self.logprobs_mode = logprobs_modes(sampling)[0]
        self.sleeps = torch.cuda.is_available()
        process = os.environ.get("RANK", "0")
        with _kept_random_state():
            self.llm = LLM(
                model=str(save_shell(config, tokenizer, folder / "vllm" / f"process-{process}")),
                runner="generate",
                load_format="dummy",
                generation_config="vllm",
                dtype=options.dtype,
                max_model_len=options.max_model_len,
                gpu_memory_utilization=options.gpu_memory_utilization,
                enforce_eager=options.enforce_eager,
                enable_prefix_caching=True,
                enable_sleep_mode=self.sleeps,
                logprobs_mode=self.logprobs_mode,
                max_num_seqs=max_batch,
                # Under torchrun vLLM joins the trainer's processes, each an engine of its own.
                distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
            )
        self.context_length: int | None = self.llm.llm_engine.model_config.max_model_len
        self.version: int | None = None
        self.names = map(str, count())  # of requests
        self._sleep()

    def open(
        self, prompts: Sequence[list[int]], *, stop_id: int, sampling: Sampling, seeds: Sequence[int]
    ) -> ColocatedSession:
        """See `pact.rollout.Generator`. Log-probs that the engine does not report this way are NaN (evaluations).

        Raises ValueError for rows or a stop id that cannot be, RuntimeError before the first ``update``.
        """
        check_open(prompts, stop_id, seeds, self.max_batch, self.vocab_size)
        if self.version is None:
            raise RuntimeError("the vLLM engine has no weights of this run yet: call update before sampling")
        if self.sleeps:
            self.llm.wake_up()
        return ColocatedSession(self, Contexts(prompts, stop_id, sampling, seeds, self.logprobs_mode))

    def update(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Sample with ``weights`` from now on; what was cached with others is dropped."""
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        rest = with_tied_head(weights, self.tied)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": rest})
        for _ in rest:  # vLLM may stop early; gathering them is a joint action of all processes
            pass
        self.llm.reset_prefix_cache()
        self.version = version
        self._sleep()

    def close(self) -> None:
        """Free the engine."""
        self.llm.llm_engine.engine_core.shutdown()

    def _sleep(self) -> None:
        """Give the memory back: weights go to the host, the cache goes away."""
        if self.sleeps:
            self.llm.sleep(level=1)


class ColocatedSession:
    """Contexts of one batch; rows that are going are requests in the engine, stepped here."""

    def __init__(self, engine: ColocatedEngine, contexts: Contexts) -> None:
        self.engine, self.contexts = engine, contexts
        self.row_of: dict[str, int] = {}  # of a request under way

    def generate(self, append: Mapping[int, list[int]], max_new_tokens: Mapping[int, int]) -> dict[int, Completion]:
        """See `pact.rollout.Session`. Raises RuntimeError when vLLM refuses a request or fails."""
        from vllm.exceptions import VLLMError

        started = self.contexts.start(append, max_new_tokens)
        try:
            return self._step_until_one_ends(started)
        except VLLMError as error:
            raise RuntimeError(f"the vLLM engine failed: {error}") from error

    def _step_until_one_ends(self, started: Mapping[int, Mapping[str, Any]]) -> dict[int, Completion]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        core = self.engine.llm.llm_engine
        for row, params in started.items():
            name = next(self.engine.names)
            self.row_of[name] = row
            core.add_request(
                name,
                TokensPrompt(prompt_token_ids=list(self.contexts.ids[row])),
                SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY),
            )
        completions: dict[int, Completion] = {}
        while not completions:
            for output in core.step():
                completions |= self._collect(output)
        return completions

    def close(self) -> None:
        """Stop what is still being sampled and let the engine sleep."""
        self.engine.llm.llm_engine.abort_request(list(self.row_of))
        self.engine._sleep()

    def _collect(self, output: Any) -> dict[int, Completion]:
        if not output.finished:
            return {}
        turn = output.outputs[0]
        ids = list(turn.token_ids)
        logp = [entry[token].logprob for token, entry in zip(ids, turn.logprobs)]
        row = self.row_of.pop(output.request_id)
        return {row: self.contexts.finish(row, ids, logp)}


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """vLLM seeds the global generators of its process; the trainer's must go on as they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
