"""Multi-turn rollouts over a Generator: token ids in, token ids out. It does not know models, caches or losses.

What a policy sampled is appended to its context as ids and never rendered again, so the ids of a trajectory are exactly
the ids the policy saw and produced, and the log-probs recorded while sampling belong to them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from pact.call_text import CallForm
from pact.envs.base import Environment, Episode, Message, Score, Task
from pact.tools import ParsedTurn, calls_of, parse_turn
from pact.trace import Component, end_of_turn_id, label_turn, render_observation, render_prompt


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: ``temperature`` 0 is greedy, ``top_p`` below 1 keeps the nucleus of that mass."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0 (0 is greedy), got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class RolloutLimits:
    """Limits of one episode, in assistant turns and tokens.

    ``max_response_tokens`` counts everything after the prompt, observations included. ``context_length`` counts the
    prompt too; None takes the generator's own. ``max_user_turn_steps``: assistant turns that may follow one user
    message without answering it; the calls of the last one are still executed, then the episode ends.
    """

    max_turns: int = 10
    max_turn_tokens: int = 256
    max_response_tokens: int = 4096
    context_length: int | None = None
    max_user_turn_steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class CallRules:
    """How calls are read. ``form``: how the policy spells them (see ``pact.call_text.call_spans``). ``malformed``: what
    becomes of a call that cannot be read: "observe" answers it with an error, "skip" drops it, as the released
    evaluations do; a turn that makes no other call is then an answer."""

    form: CallForm = "hermes"
    malformed: Literal["observe", "skip"] = "observe"

    def __post_init__(self) -> None:
        if self.form not in get_args(CallForm):
            raise ValueError(f"unknown form of calls {self.form!r}: use one of {', '.join(get_args(CallForm))}")
        if self.malformed not in ("observe", "skip"):
            raise ValueError(f"malformed calls: {self.malformed!r} is no way to treat them; use observe or skip")


@dataclass(frozen=True)
class Completion:
    """One sampled turn: its ids, the log-prob of each id (nats, under softmax(logits / temperature), before top_p), and
    whether it ended with the stop id (which is then the last id)."""

    ids: list[int]
    logp: list[float]
    finished: bool


class Session(Protocol):
    """Contexts that stay alive between turns, one a row."""

    def generate(self, append: Mapping[int, list[int]], max_new_tokens: Mapping[int, int]) -> dict[int, Completion]:
        """Append ``append[row]`` to each row it names, set the rows named in ``max_new_tokens`` going, and sample all
        that are going together, each until the stop id or its limit. Returns the rows that have ended, at least one;
        the others go on at the next call. Rows that are not going wait."""
        ...

    def close(self) -> None:
        """Release the contexts."""
        ...


class Generator(Protocol):
    """A sampler of token ids. ``max_batch``: rows that fit together; ``context_length``: longest context or None."""

    @property
    def max_batch(self) -> int: ...

    @property
    def context_length(self) -> int | None: ...

    def open(self, prompts: Sequence[list[int]], *, stop_id: int, sampling: Sampling, seeds: Sequence[int]) -> Session:
        """Start one row a prompt. A row's randomness is a function of its own entry of ``seeds`` alone, whatever the
        other rows are."""
        ...


@dataclass(frozen=True)
class Trajectory:
    """One finished episode.

    ``ids``, ``sampled`` (True on tokens the policy produced), ``logp`` (behaviour log-prob, 0.0 where not sampled) and
    ``component`` run over the tokens after the prompt. ``turns`` are the (start, end) of each assistant turn in them.
    ``messages`` follow the prompt. ``stop_reason``: "answer", "turn_limit", "token_limit" or "context_limit". Only
    after "answer" do they end with an assistant message that is whole: a turn that was cut carries ``"cut": True``,
    and an episode that ends before a turn ends with the tool or user messages it did not get to, or with none.
    """

    task: Task
    prompt_ids: list[int]
    ids: list[int]
    sampled: list[bool]
    logp: list[float]
    turns: list[tuple[int, int]]
    messages: list[Message]
    score: Score
    stop_reason: str
    component: list[int]


@dataclass
class _Running:
    """An episode under way: the growing record, and the ids the generator has not been given yet."""

    task: Task
    prompt_ids: list[int]
    seed: int
    episode: Episode
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    component: list[int] = field(default_factory=list)
    turns: list[tuple[int, int]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    append: list[int] = field(default_factory=list)
    steps: int = 0  # assistant turns since the last user message
    stop_reason: str | None = None

    def room(self, limits: RolloutLimits) -> tuple[int, str]:
        """Tokens that may still be added, and the name of the limit that says so."""
        response = limits.max_response_tokens - len(self.ids)
        if limits.context_length is None:
            return response, "token_limit"
        context = limits.context_length - len(self.prompt_ids) - len(self.ids)
        return (context, "context_limit") if context < response else (response, "token_limit")

    def record_turn(self, completion: Completion, component: list[int]) -> None:
        self.steps += 1
        start = len(self.ids)
        self.ids += completion.ids
        self.sampled += [True] * len(completion.ids)
        self.logp += completion.logp
        self.component += component
        self.turns.append((start, len(self.ids)))

    def record_observation(self, ids: list[int]) -> None:
        self.ids += ids
        self.sampled += [False] * len(ids)
        self.logp += [0.0] * len(ids)
        self.component += [int(Component.OBSERVATION)] * len(ids)
        self.append = ids


def run_rollouts(
    env: Environment,
    tasks: Sequence[Task],
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int,
    sampling: Sampling | None = None,
    limits: RolloutLimits | None = None,
    rules: CallRules | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    fail_long_prompts: bool = False,
    places: Sequence[int] | None = None,
) -> list[list[Trajectory]]:
    """Attempt each task ``n`` times and return, per task, its ``n`` trajectories.

    The expert trace is dropped before environment, tokenizer or generator see the task. The random stream of an episode
    depends on (``seed``, place of the task, index of the rollout) only; its place is its index in ``tasks``, or that in
    ``places`` where ``tasks`` are part of a batch that several processes share. ``batch_size`` episodes run together
    (None: what the generator holds). A prompt that leaves no room in the context is a ValueError before anything is
    generated, or with ``fail_long_prompts`` an episode with no turn and stop_reason "context_limit".
    ``rules`` say how calls are read. Where the environment has ``workers`` above 1, the calls of that many episodes run
    at once in threads, and so do their scores; the calls of one episode keep their order, and no result depends on it.

    Raises ValueError for ``n`` < 1 or a prompt that is too long, RuntimeError when the environment's own code raises.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 rollout a task, got {n}")
    sampling, limits, rules = sampling or Sampling(), limits or RolloutLimits(), rules or CallRules()
    lengths = [length for length in (limits.context_length, generator.context_length) if length is not None]
    limits = replace(limits, context_length=min(lengths, default=None))
    tasks = [task.without_expert() for task in tasks]
    prompts = _prompts(tasks, tokenizer, limits, fail_long_prompts)
    attempts = [(index, rollout) for index in range(len(tasks)) for rollout in range(n)]
    places = range(len(tasks)) if places is None else places
    size = min(batch_size or generator.max_batch, generator.max_batch)
    trajectories: list[Trajectory] = []
    with _workers(env) as in_parallel:
        for start in range(0, len(attempts), size):
            chosen = attempts[start : start + size]
            seeds = [_episode_seed(seed, places[index], rollout) for index, rollout in chosen]
            batch = [(tasks[index], prompts[index], seed) for (index, _), seed in zip(chosen, seeds)]
            loop = _Loop(env, generator, tokenizer, sampling, limits, rules, in_parallel)
            trajectories += loop.run(batch)
    return [trajectories[index * n : (index + 1) * n] for index in range(len(tasks))]


_Map = Callable[[Callable[..., Any], Iterable[Any]], Iterable[Any]]


@contextmanager
def _workers(env: Environment) -> Iterator[_Map]:
    """A ``map``, in as many threads as the environment has workers; results and the first exception in order."""
    workers = getattr(env, "workers", 1)
    if workers == 1:
        yield map
    else:
        with ThreadPoolExecutor(workers, thread_name_prefix="pact-env") as pool:
            yield pool.map


def _prompts(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, limits: RolloutLimits, fail_long_prompts: bool
) -> list[list[int]]:
    prompts = []
    for task in tasks:
        head_ids, suffix_ids = render_prompt(task.messages, task.tools, tokenizer)
        prompts.append([*head_ids, *suffix_ids])
        length = len(prompts[-1])
        if limits.context_length is not None and length >= limits.context_length and not fail_long_prompts:
            raise ValueError(
                f"the prompt of task {task.id!r} has {length} tokens and the context holds {limits.context_length}: "
                "drop the task, shorten its tools or messages, or use a model with a longer context"
            )
    return prompts


def _episode_seed(seed: int, task_index: int, rollout_index: int) -> int:
    return int(np.random.SeedSequence((seed, task_index, rollout_index)).generate_state(1, np.uint64)[0])


@dataclass
class _Loop:
    """The loop over one batch of episodes, and what all of them share."""

    env: Environment
    generator: Generator
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    limits: RolloutLimits
    rules: CallRules
    in_parallel: _Map
    rendered: dict[str, list[int]] = field(default_factory=dict)  # rollouts of a task often get the same observation

    def run(self, batch: list[tuple[Task, list[int], int]]) -> list[Trajectory]:
        running: list[_Running] = []
        try:
            for task, prompt_ids, seed in batch:
                running.append(_Running(task, prompt_ids, seed, self.env.start(task)))
            self.play(running)
            return list(self.in_parallel(_finish, running))
        finally:
            for item in running:
                item.episode.close()

    def play(self, running: list[_Running]) -> None:
        """All episodes together, each turn by turn, until every one has its stop_reason."""
        for item in running:
            room, reason = item.room(self.limits)
            item.stop_reason = reason if room < 1 else None
        rows = [item for item in running if item.stop_reason is None]
        if not rows:
            return
        session = self.generator.open(
            [item.prompt_ids for item in rows],
            stop_id=end_of_turn_id(self.tokenizer),
            sampling=self.sampling,
            seeds=[item.seed for item in rows],
        )
        try:
            ready = dict(enumerate(rows))
            going = 0
            while ready or going:
                completions = session.generate(
                    {row: item.append for row, item in ready.items()},
                    {row: min(self.limits.max_turn_tokens, item.room(self.limits)[0]) for row, item in ready.items()},
                )
                going += len(ready) - len(completions)
                self.advance([(rows[row], completion) for row, completion in completions.items()])
                ready = {row: rows[row] for row in completions if rows[row].stop_reason is None}
        finally:
            session.close()

    def advance(self, ended: list[tuple[_Running, Completion]]) -> None:
        """Record the sampled turns and act on them; then each has its stop_reason or queued observation ids."""
        turns = [(item, turn) for item, completion in ended if (turn := self.record(item, completion))]
        acting = [(item, turn) for item, turn in turns if turn.message["tool_calls"]]
        observed = dict(zip((id(item) for item, _ in acting), self.in_parallel(self.call, acting)))
        for item, turn in turns:
            reply = observed.get(id(item), [])
            if self.rules.malformed == "observe":
                reply += [{"role": "tool", "name": "error", "content": f"error: {error}"} for error in turn.errors]
            self.answer(item, reply)

    def record(self, item: _Running, completion: Completion) -> ParsedTurn | None:
        """Record one sampled turn. Returns None for one that was cut, which ends its episode."""
        room, binding = item.room(self.limits)
        item.record_turn(completion, label_turn(completion.ids, self.tokenizer, self.rules.form))
        text_ids = completion.ids[:-1] if completion.finished else completion.ids
        text = self.tokenizer.decode(text_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        turn = parse_turn(str(text), self.rules.form)
        item.messages.append(turn.message)
        if completion.finished:
            return turn
        # Nothing of a turn that was cut is executed, so its message must not claim calls.
        item.messages[-1] = {key: value for key, value in turn.message.items() if key != "tool_calls"} | {"cut": True}
        item.stop_reason = binding if room <= self.limits.max_turn_tokens else "token_limit"
        return None

    def call(self, acting: tuple[_Running, ParsedTurn]) -> list[Message]:
        """Make the calls of one turn, in order, and return their tool messages."""
        item, turn = acting
        return [_call(self.env, item, call["name"], call["arguments"]) for call in calls_of(turn.message)]

    def answer(self, item: _Running, reply: list[Message]) -> None:
        """Queue what follows a whole turn: the ``reply`` to its calls, else the next user messages."""
        if not reply:
            user_messages = item.episode.user_turn()
            if user_messages is None:
                item.stop_reason = "answer"
                return
            reply, item.steps = list(user_messages), 0
        item.messages += reply
        if len(item.turns) >= self.limits.max_turns or item.steps == self.limits.max_user_turn_steps:
            item.stop_reason = "turn_limit"
            return
        ids = self.render(reply)
        room, binding = item.room(self.limits)
        if len(ids) >= room:
            item.stop_reason = binding
            return
        item.record_observation(ids)

    def render(self, reply: list[Message]) -> list[int]:
        """Ids of ``reply``. Of one that fits in no response, only as many are kept: a tool may print megabytes."""
        key = json.dumps(reply)
        if key not in self.rendered:
            self.rendered[key] = render_observation(reply, self.tokenizer)[: self.limits.max_response_tokens]
        return self.rendered[key]


def _call(env: Environment, item: _Running, name: str, arguments: dict[str, Any]) -> Message:
    tool = f"tool {name[:80]!r} of task {item.task.id!r}"
    try:
        observation = item.episode.call(name, arguments)
    except Exception as error:
        raise RuntimeError(
            f"{type(env).__name__} raised {type(error).__name__} in {tool}: {error}. "
            "An environment answers a failing call with an error text; fix its Episode.call"
        ) from error
    if not isinstance(observation, str):
        raise RuntimeError(
            f"{type(env).__name__} answered {type(observation).__name__} in {tool}. An observation is text; "
            "fix its Episode.call"
        )
    return {"role": "tool", "name": name, "content": observation}


def _finish(item: _Running) -> Trajectory:
    assert item.stop_reason is not None
    return Trajectory(
        task=item.task,
        prompt_ids=item.prompt_ids,
        ids=item.ids,
        sampled=item.sampled,
        logp=item.logp,
        turns=item.turns,
        messages=item.messages,
        score=item.episode.score(item.messages),
        stop_reason=item.stop_reason,
        component=item.component,
    )
