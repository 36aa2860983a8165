"""Toybox: seeded multi-hop tool tasks with look-alike sources, real tool errors and privileged expert traces.

Every task has a small world of its own, so facts cannot be memorised: they have to be looked up. It holds no model and
trains nothing; the tokenizer made from its own text is in ``pact.envs.toybox_text``.
"""

from __future__ import annotations

import itertools
import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pact.envs import toybox_text
from pact.envs.base import Message, Score, Task, ToolSchema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("north", "south", "east", "west", "upper", "lower")
# Questions with crc32 % SHARES == 0 belong to the test split, those with 1 to the validation split where there is one,
# so no prompt is ever in two.
SHARES = 5


@dataclass(frozen=True)
class Relation:
    """One kind of fact: ``name`` of a ``subject`` is an ``object``; each of its sources is called ``base_side``."""

    name: str
    subject: str
    object: str
    base: str


RELATIONS = (
    Relation("employer", "person", "company", "staff"),
    Relation("manager", "person", "person", "team"),
    Relation("home town", "person", "city", "address"),
    Relation("founder", "company", "person", "founders"),
    Relation("head office", "company", "city", "offices"),
    Relation("age", "company", "integer", "charter"),
    Relation("mayor", "city", "person", "council"),
    Relation("population", "city", "integer", "census"),
)


@dataclass(frozen=True)
class Hop:
    """One step of a chain: ``relation`` of ``subject`` is ``value``, and the source ``tool`` holds it."""

    relation: Relation
    subject: str
    value: str | int
    tool: str


@dataclass(frozen=True)
class World:
    """What is true in one task: the chain, the facts of every source, and which sources are busy at the first call."""

    hops: tuple[Hop, ...]
    addend: int | None  # the question asks for the last value plus this
    facts: dict[str, dict[str, str | int]]  # tool -> subject -> value; `Hop.tool` and perhaps a second one hold a fact
    relations: dict[str, Relation]  # tool -> its relation
    busy: frozenset[str]

    @property
    def answer(self) -> str:
        last = self.hops[-1].value
        return str(last if self.addend is None else int(last) + self.addend)


@dataclass(frozen=True)
class Toybox:
    """The environment (`pact.envs.base.Environment`). All shares are probabilities in [0, 1].

    Args:
        train, test, validation: tasks in each split; the splits share no prompt.
        hops: smallest and largest number of facts to chain.
        sources: look-alike tools a relation, one of which holds the fact.
        sides: what look-alikes are told apart by: every relation of a task draws ``sources`` of these (of "north",
            "south", "east", "west", "upper", "lower"). None: the first ``sources`` of them, in every task.
        second_source: share of facts that a second look-alike holds too, so that there are several ways to the answer
            of which the trace shows one.
        distractors: tools of relations the question does not need.
        flaky: share of sources that are busy at their first call.
        arithmetic: share of numeric questions that ask for a sum, which takes one more tool.
        recovery_share: share of traces in which one fact is found after failed calls only (from one to all of its wrong
            sources, each once), which are marked ``"supervised": False``.
        trace_share: share of tasks that carry a trace.
        reward: ``"outcome"`` is 1 for the right answer and 0 otherwise; ``"turn"`` the sum of the turn rewards, where
            the chain and the answer weigh one half each.

    Raises:
        ValueError: a setting out of range.
    """

    train: int = 2048
    test: int = 512
    validation: int = 0
    seed: int = 0
    hops: Sequence[int] = (1, 2)
    sources: int = 3
    sides: Sequence[str] | None = None
    second_source: float = 0.0
    distractors: int = 2
    flaky: float = 0.05
    arithmetic: float = 0.5
    recovery_share: float = 0.25
    trace_share: float = 1.0
    reward: Literal["outcome", "turn"] = "outcome"
    _cache: dict[str, list[Task]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("second_source", "flaky", "arithmetic", "recovery_share", "trace_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"toybox: {name} is a share, set it between 0 and 1, not {getattr(self, name)!r}")
        if len(self.hops) != 2 or not 1 <= self.hops[0] <= self.hops[1] <= 4:
            raise ValueError(f"toybox: hops is (smallest, largest) within 1..4, not {self.hops!r}")
        if not 1 <= self.sources <= len(SIDES):
            raise ValueError(f"toybox: sources must be 1..{len(SIDES)}, not {self.sources!r}")
        if self.sides is not None:
            if isinstance(self.sides, str) or set(self.sides) - set(SIDES) or len(set(self.sides)) < len(self.sides):
                raise ValueError(f"toybox: sides is a list of different ones of {', '.join(SIDES)}, not {self.sides!r}")
            if len(self.sides) < self.sources:
                raise ValueError(f"toybox: {self.sources} sources need as many sides, not {len(self.sides)}")
        if min(self.train, self.test, self.validation) < 0 or not 0 <= self.distractors <= 8:
            raise ValueError("toybox: train, test and validation must be at least 0 and distractors within 0..8")
        if self.reward not in ("outcome", "turn"):
            raise ValueError(f"toybox: unknown reward {self.reward!r}: choose outcome or turn")

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of "train", "validation" or "test", made once; task i depends on the seed, the split and i only."""
        sizes = {"train": self.train, "validation": self.validation, "test": self.test}
        if split not in sizes:
            raise ValueError(f"toybox: unknown split {split!r}: choose {', '.join(sizes)}")
        if split not in self._cache:
            self._cache[split] = [self._task(split, i) for i in range(sizes[split])]
        return self._cache[split]

    def start(self, task: Task) -> ToyboxEpisode:
        """A fresh attempt at ``task``."""
        return ToyboxEpisode(task, self.reward)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The toybox tokenizer, ready for training; the same for all settings."""
        return toybox_text.build_tokenizer()

    # -- making tasks ------------------------------------------------------------------------------------------------

    def _task(self, split: str, index: int) -> Task:
        rng = random.Random(f"toybox/{self.seed}/{split}/{index}")
        world = self._world(rng, split)
        tools = [schema(tool, relation) for tool, relation in world.relations.items()]
        if world.hops[-1].relation.object == "integer":
            tools.append(CALC)
        rng.shuffle(tools)
        asked = question([hop.relation for hop in world.hops], world.hops[0].subject, world.addend)
        messages = [{"role": "user", "content": asked}]
        task = Task(f"{split}-{index}", messages, tools, data=world)
        if rng.random() < self.trace_share:
            recover = rng.randrange(len(world.hops)) if rng.random() < self.recovery_share else None
            task = Task(task.id, messages, tools, expert=expert_trace(task, rng, recover), data=world)
        return task

    def _world(self, rng: random.Random, split: str) -> World:
        while True:
            chain = self._chain(rng)
            subject = name(rng, chain[0].subject)
            asked = question(chain, subject)
            if self._split(asked) == split:
                break
        spare = [relation for relation in RELATIONS if relation not in chain]
        relations: dict[str, Relation] = {}
        hops, known = [], {subject}
        sides: Sequence[str]
        for relation in chain:
            sides = SIDES[: self.sources] if self.sides is None else rng.sample(self.sides, self.sources)
            relations |= {f"{relation.base}_{side}": relation for side in sides}
            value = self._value(rng, relation, known)
            hops.append(Hop(relation, subject, value, f"{relation.base}_{rng.choice(sides)}"))
            subject = str(value)
        sides = SIDES[: self.sources] if self.sides is None else self.sides
        for relation in rng.sample(spare, min(self.distractors, len(spare))):
            relations[f"{relation.base}_{rng.choice(sides)}"] = relation
        facts: dict[str, dict[str, str | int]] = {tool: {} for tool in relations}
        for hop in hops:
            facts[hop.tool][hop.subject] = hop.value
            others = [tool for tool, relation in relations.items() if relation is hop.relation and tool != hop.tool]
            if self.second_source and others and rng.random() < self.second_source:
                facts[rng.choice(others)][hop.subject] = hop.value
        for tool, relation in relations.items():  # distractors do answer, off the chain
            if relation in spare:
                facts[tool] = {h.subject: self._value(rng, relation, known) for h in hops}
        numeric = hops[-1].relation.object == "integer"
        addend = rng.randint(2, 50) if numeric and rng.random() < self.arithmetic else None
        busy = frozenset(tool for tool in relations if rng.random() < self.flaky)
        return World(tuple(hops), addend, facts, relations, busy)

    def _split(self, asked: str) -> str:
        share = zlib.crc32(asked.encode()) % SHARES
        return "test" if share == 0 else "validation" if share == 1 and self.validation else "train"

    def _chain(self, rng: random.Random) -> list[Relation]:
        """Relations that fit end to end, none twice: every hop has sources of its own."""
        length = rng.randint(self.hops[0], self.hops[1])
        while True:
            chain = [rng.choice(RELATIONS)]
            while len(chain) < length:
                fits = [r for r in RELATIONS if r.subject == chain[-1].object and r not in chain]
                if not fits:
                    break
                chain.append(rng.choice(fits))
            if len(chain) == length:
                return chain

    @staticmethod
    def _value(rng: random.Random, relation: Relation, known: set[str]) -> str | int:
        if relation.object == "integer":
            return rng.randint(10, 49)
        value = name(rng, relation.object)
        while value in known:
            value = name(rng, relation.object)
        known.add(value)
        return value


CALC: ToolSchema = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "sum of two integers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def schema(tool: str, relation: Relation) -> ToolSchema:
    """The schema of a source. Look-alike sources differ in their name alone."""
    return {
        "type": "function",
        "function": {
            "name": tool,
            "description": f"{relation.name} of a {relation.subject}",
            "parameters": {
                "type": "object",
                "properties": {relation.subject: {"type": "string"}},
                "required": [relation.subject],
            },
        },
    }


def name(rng: random.Random, kind: str) -> str:
    """One of the names of a kind; companies and cities carry an ending of their own."""
    return rng.choice(NAMES[kind])


def _names() -> dict[str, list[str]]:
    """Thirty-two made-up names a kind: few enough for a token each, so that a small model learns to copy them."""
    rng = random.Random("toybox/names")
    syllables = [onset + vowel for onset in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(pair) for pair in itertools.permutations(syllables, 2)]
    endings = {"person": "n", "company": "co", "city": "burg"}
    return {kind: [(word + end).capitalize() for word in rng.sample(words, 32)] for kind, end in endings.items()}


NAMES = _names()


def question(chain: Sequence[Relation], start: str, addend: int | None = None) -> str:
    """The question of a task: it names the chain and the start, never a source."""
    asked = " of ".join(f"the {relation.name}" for relation in reversed(chain))
    tail = "" if addend is None else f", plus {addend}"
    return f"What is {asked} of {start}{tail}?"


class ToyboxEpisode:
    """One attempt. A call is checked as a real service would: known tool, arguments, types, then the entry itself."""

    def __init__(self, task: Task, reward: str = "outcome") -> None:
        self.world: World = task.data
        self.tools = task.tools
        self._reward = reward
        self._called: set[str] = set()

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The observation of one call; errors are texts that start with ``error:``."""
        schemas = {t["function"]["name"]: t["function"]["parameters"]["properties"] for t in self.tools}
        if name not in schemas:
            return f"error: there is no tool {name}"
        problem = _argument_problem(schemas[name], arguments)
        if problem:
            return f"error: {problem}"
        if name == "calc":
            return json.dumps({"sum": arguments["a"] + arguments["b"]})
        first = name not in self._called
        self._called.add(name)
        if first and name in self.world.busy:
            return f"error: {name} is busy, call it again"
        relation = self.world.relations[name]
        subject = arguments[relation.subject]
        value = self.world.facts[name].get(subject)
        if value is None:
            return f"error: {name} has no entry for {subject}"
        return json.dumps({relation.name: value})

    def user_turn(self) -> list[Message] | None:
        """Always None: one question an episode."""
        return None

    def score(self, messages: list[Message]) -> Score:
        """Half for the chain (each needed observation once, in the turn that brought it), half for the right answer.

        ``success`` is 1 when the last message is the assistant's, makes no call and is the answer (any case).
        """
        needed = [json.dumps({hop.relation.name: hop.value}) for hop in self.world.hops]
        if self.world.addend is not None:
            needed.append(json.dumps({"sum": int(self.world.answer)}))
        share = 0.5 / len(needed)
        turn_rewards: list[float] = []
        for message in messages:
            if message["role"] == "assistant":
                turn_rewards.append(0.0)
            elif message["role"] == "tool" and message["content"] in needed and turn_rewards:
                needed.remove(message["content"])
                turn_rewards[-1] += share
        last = messages[-1] if messages else {"role": "none"}
        answered = last["role"] == "assistant" and not last.get("tool_calls")
        success = float(answered and last["content"].strip().lower() == self.world.answer.lower())
        if turn_rewards:
            turn_rewards[-1] += 0.5 * success
        reward = success if self._reward == "outcome" else sum(turn_rewards)
        calls = sum(len(m.get("tool_calls") or ()) for m in messages)
        return Score(reward, turn_rewards, {"success": success, "calls": float(calls)})

    def close(self) -> None:
        """Nothing to release."""


def _argument_problem(properties: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    for key, spec in properties.items():
        if key not in arguments:
            return f"missing argument {key}"
        value = arguments[key]
        good = isinstance(value, str) if spec["type"] == "string" else type(value) is int
        if not good:
            return f"argument {key} must be a {spec['type']}"
    extra = [key for key in arguments if key not in properties]
    return f"unknown argument {extra[0]}" if extra else None


def expert_trace(task: Task, rng: random.Random, recover: int | None) -> list[Message]:
    """The privileged trace: it knows the sources, so it asks the right one at once.

    At hop ``recover`` it first asks wrong look-alikes (those messages are not supervised) and recovers from the errors:
    at least one and at most all of them, none twice. Observations are those of a real episode.
    """
    world: World = task.data
    episode = ToyboxEpisode(task)
    messages: list[Message] = []
    found = f"The question is about {world.hops[0].subject}."

    def step(sentences: list[str], tool: str, arguments: dict[str, Any], supervised: bool = True) -> str:
        call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
        message = {"role": "assistant", "content": "", "reasoning_content": " ".join(sentences), "tool_calls": [call]}
        messages.append(message if supervised else message | {"supervised": False})
        observation = episode.call(tool, arguments)
        messages.append({"role": "tool", "name": tool, "content": observation})
        return observation

    def ask(sentences: list[str], tool: str, arguments: dict[str, Any], supervised: bool = True) -> None:
        busy = step([*sentences, f"I ask {tool}."], tool, arguments, supervised).endswith("call it again")
        if busy:
            step([f"The source {tool} is busy.", f"I ask {tool} again."], tool, arguments, supervised)

    for i, hop in enumerate(world.hops):
        arguments = {hop.relation.subject: hop.subject}
        need = f"I need the {hop.relation.name} of {hop.subject}."
        others = [t for t, r in world.relations.items() if r is hop.relation and hop.subject not in world.facts[t]]
        if i == recover and others:
            for wrong in rng.sample(others, rng.randint(1, len(others))):
                ask([found, need], wrong, arguments, supervised=False)
                found = f"The source {wrong} has no entry for {hop.subject}."
                need = "Another source may have it."
        ask([found, need], hop.tool, arguments)
        found = f"The {hop.relation.name} of {hop.subject} is {hop.value}."
    if world.addend is not None:
        value = int(world.hops[-1].value)
        ask([found, f"I need the sum with {world.addend}."], "calc", {"a": value, "b": world.addend})
        found = f"The sum is {world.answer}."
    thought = f"{found} This answers the question."
    messages.append({"role": "assistant", "content": world.answer, "reasoning_content": thought})
    return messages
