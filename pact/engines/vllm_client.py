"""One vLLM server over HTTP: token ids in, ids and log-probs out, weights from a folder. It decides nothing.

Only routes of vLLM itself are used (0.32): ``/inference/v1/generate`` (needs ``--enable-scale-out``), and the weight
and cache routes of ``VLLM_SERVER_DEV_MODE=1``. vLLM need not be installed here.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

import urllib3

logger = getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds between two attempts: doubled from the first to the longest
FINISH_REASONS = ("stop", "length", "abort")
PROBE_SECONDS = 10.0  # a server that is up answers questions about itself at once
T = TypeVar("T")


class Unreachable(Exception):
    """The server refuses, times out, breaks off or answers 5xx: worth another attempt."""


class Refused(RuntimeError):
    """The server understood and said no (4xx): another attempt would hear the same."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ServerInfo:
    """What a server tells about itself; ``logprobs_mode`` is vLLM's setting of that name."""

    context_length: int
    logprobs_mode: str
    prefix_caching: bool


@dataclass(frozen=True)
class Answer:
    """One sampled turn: its ids, their log-probs, vLLM's finish reason, and the labels of the weights it came from."""

    ids: list[int]
    logp: list[float]
    finish_reason: str
    weight_labels: frozenset[str]


class VllmClient:
    """Requests to the server at ``url``; safe to use from many threads.

    ``timeout``: seconds one request may take, ``retry_seconds``: how long attempts go on once a request has failed for
    want of a server.
    """

    def __init__(self, url: str, *, timeout: float, retry_seconds: float, connections: int = 64) -> None:
        self.url, self.timeout, self.retry_seconds = url.rstrip("/"), timeout, retry_seconds
        self._pool = urllib3.PoolManager(maxsize=connections, retries=False)

    def info(self) -> ServerInfo:
        """Ask once, without retries. Raises ValueError, in one line, for a server that cannot be used."""
        try:
            models = self._call("GET", "/v1/models", timeout=PROBE_SECONDS)
            config = self._call("GET", "/server_info?config_format=json", timeout=4 * PROBE_SECONDS)
            self._call("GET", "/weight_info", timeout=PROBE_SECONDS)
            self._probe("/inference/v1/generate")
            with _expected_form("what it tells about itself"):
                return ServerInfo(
                    context_length=int(models["data"][0]["max_model_len"]),
                    logprobs_mode=config["vllm_config"]["model_config"]["logprobs_mode"],
                    prefix_caching=bool(config["vllm_config"]["cache_config"]["enable_prefix_caching"]),
                )
        except Unreachable as error:
            raise ValueError(f"no vLLM server answers at {self.url} ({error}): start it, or set vllm_url") from error
        except Refused as error:
            raise ValueError(
                f"the server at {self.url} lacks what training needs ({error}): start vLLM 0.32 or later with "
                "VLLM_SERVER_DEV_MODE=1 and --enable-scale-out"
            ) from error

    def generate(self, ids: list[int], sampling_params: Mapping[str, Any], request_id: str) -> Answer:
        """Sample one turn after ``ids``. Raises Unreachable and Refused."""
        body = {"request_id": request_id, "token_ids": ids, "sampling_params": dict(sampling_params)}
        with _expected_form("/inference/v1/generate"):
            choice = self._call("POST", "/inference/v1/generate", body)["choices"][0]
            content = (choice["logprobs"] or {}).get("content") or []
            answer = Answer(
                ids=list(choice["token_ids"] or []),
                logp=[float(token["logprob"]) for token in content],
                finish_reason=choice["finish_reason"],
                weight_labels=frozenset(span["version"] for span in choice["weight_versions"] or []),
            )
        if answer.finish_reason not in FINISH_REASONS:
            raise Refused(f"a turn ended with the finish reason {answer.finish_reason!r}: look into the server's log")
        return answer

    def abort(self, request_ids: list[str]) -> None:
        """Stop requests that nobody waits for any more. Raises Unreachable and Refused."""
        self._call("POST", "/inference/v1/abort_requests", {"request_ids": request_ids}, timeout=PROBE_SECONDS)

    def weight_label(self) -> str:
        """The label of the weights the server holds: "default" for those it started with. Raises Unreachable."""
        with _expected_form("/weight_info"):
            return str(self._call("GET", "/weight_info", timeout=PROBE_SECONDS)["weight_version"])

    def load(self, folder: Path, label: str) -> None:
        """Load the safetensors in ``folder`` and call them ``label``; what was cached with other weights is dropped.

        Requests under way are aborted (finish reason "abort"). The label is set last: a load that was cut short is not
        taken for a whole one. Raises Unreachable and Refused.
        """
        self._call("POST", "/pause?mode=abort")
        # A server may have been started on empty weights (--load-format dummy); these are files.
        self._call("POST", "/collective_rpc", _rpc("update_config", overrides={"load_config": {"load_format": "auto"}}))
        self._call("POST", "/collective_rpc", _rpc("reload_weights", weights_path=str(folder)))
        with _expected_form("/reset_prefix_cache"):
            emptied = self._call("POST", "/reset_prefix_cache")["success"]
        if not emptied:
            raise Unreachable("its prefix cache is in use and could not be emptied")
        self._call("POST", "/update_weight_version", {"new_version": label})
        self._call("POST", "/resume")

    def retry(self, action: Callable[[], T], stopped: threading.Event | None = None) -> T:
        """``action()``, again after growing pauses while it raises Unreachable, until ``retry_seconds`` after its first
        failure or until ``stopped`` is set; then RuntimeError. Refused is not retried."""
        stopped = stopped or threading.Event()
        pause, deadline = FIRST_PAUSE, math.inf
        while True:
            try:
                return action()
            except Unreachable as error:
                deadline = min(deadline, time.monotonic() + self.retry_seconds)
                if time.monotonic() + pause > deadline:
                    raise RuntimeError(
                        f"the vLLM server at {self.url} is gone ({error}; tried for {self.retry_seconds:.0f} s): start "
                        "it again with the same command, then resume the run"
                    ) from error
                logger.warning(f"vLLM server at {self.url}: {error}; trying again in {pause:.1f} s")
                if stopped.wait(pause):
                    raise RuntimeError("the session was closed") from error
                pause = min(2 * pause, LONGEST_PAUSE)

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.clear()

    def _probe(self, path: str) -> None:
        """Raises Refused for a route that is not there or closed; an empty request to an open one is a bad request."""
        try:
            self._call("POST", path, {}, timeout=PROBE_SECONDS)
        except Refused as error:
            if error.status not in (400, 422):
                raise

    def _call(self, method: str, path: str, body: Any = None, *, timeout: float | None = None) -> Any:
        """One request; the JSON of its answer."""
        try:
            response = self._pool.request(
                method,
                self.url + path,
                body=None if body is None else json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
                timeout=urllib3.Timeout(connect=PROBE_SECONDS, read=timeout or self.timeout),
            )
        except urllib3.exceptions.LocationParseError as error:
            raise Refused(f"{self.url} is no URL: write it like http://127.0.0.1:8000") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Unreachable(_short(error)) from error
        if response.status >= 500:
            raise Unreachable(f"{path.partition('?')[0]} answered {response.status}: {_message(response.data)}")
        if response.status != 200:
            message = f"{path.partition('?')[0]} answered {response.status}: {_message(response.data)}"
            raise Refused(message, response.status)
        try:
            return json.loads(response.data or b"null")
        except ValueError as error:
            raise Refused(f"{path.partition('?')[0]} answered with no JSON: {_message(response.data)}") from error


@contextmanager
def _expected_form(what: str) -> Iterator[None]:
    """Refused, in place of the errors of looking into an answer that is not vLLM's."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise Refused(f"{what}: the answer is not of vLLM's form ({type(error).__name__}: {error})") from error


def _rpc(method: str, **kwargs: Any) -> dict[str, Any]:
    return {"method": method, "kwargs": kwargs}


def _short(error: BaseException) -> str:
    """What the exception says after the connection's own description."""
    return str(error).rpartition(": ")[2] or type(error).__name__


def _message(data: bytes) -> str:
    """The message of an error answer, at most 300 characters of it."""
    text = data.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        text = error if isinstance(error, str) else error["message"]
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:300]
