"""A thousand malformed model outputs, generated and mutated, through the parser and through whole episodes."""

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby

import pytest

import pact.envs
from pact.messages import check_messages
from pact.rollout import CallRules, Completion, RolloutLimits, run_rollouts
from pact.tools import calls_of, parse_turn
from pact.trace import Component, end_of_turn_id, render_observation

OUTPUTS = 1_000
SEED = 2606
LIMITS = RolloutLimits(max_turns=5, max_turn_tokens=1 << 17, max_response_tokens=1 << 18, max_user_turn_steps=4)
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|im_start|>"]
JSON_PARTS = ["{", "}", "[", "]", ",", ":", '"', "\\", '"name"', '"arguments"', "null", "NaN", "1e999", "-0", "\\ud800"]
WORDS = [
    "staff_north",
    "the",
    " ",
    "\n",
    "\x00",
    "\u202e",
    "\ufeff",
    "é",
    "價",
    "👩‍🔧",
    "ｔool_call",
    "```json",
    "user\n",
]


def good_turns(task, rng):
    """Turns as a sound policy samples them: in both forms, with one or two calls, and an answer."""
    names = [tool["function"]["name"] for tool in task.tools]
    calls = [json.dumps({"name": rng.choice(names), "arguments": {"name": "Ada", "n": n}}) for n in range(2)]
    thought = "<think>I ask the first source. Then I stop.</think>"
    return [
        f"{thought}<tool_call>{calls[0]}</tool_call>",
        f"{thought}\n<tool_call>\n{calls[0]}\n</tool_call>\n<tool_call>\n{calls[1]}\n</tool_call>",
        f"{thought}\n```json\n[{calls[0]}, {calls[1]}]\n```",
        f'{thought}{{"tool_calls": [{{"type": "function", "function": {calls[0]}}}]}}',
        f"{thought}The answer is <answer>Rome</answer>.",
    ]


def flipped(text, rng):
    raw = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return raw.decode("utf-8", "replace")


def deep(rng):
    opening = rng.choice(["[", '{"a":', '[{"a":', "<tool_call>", "<think>"])
    return rng.choice(["", "<tool_call>", '<tool_call>{"name":"f","arguments":']) + opening * 100_000


def mutated(text, rng):
    a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    return rng.choice(
        [
            text[:a],
            text[a:],
            text[:a] + text[b:],
            text[:b] + text[a:],
            text[:a] + rng.choice(TAGS + JSON_PARTS + WORDS) + text[a:],
            text[:a] + text[a:b] * rng.randint(2, 9) + text[b:],
            flipped(text, rng),
            text.replace("{", "[", rng.randint(1, 3)),
            text.replace('"arguments": {', '"arguments": ' + rng.choice(["[", '"{', "{{", "null, {", '{"n": 2, '])),
            text.replace('"name"', rng.choice(["name", "'name'", '"Name"', '"name": null, "name"'])),
        ]
    )


def malformed_outputs(tokenizer, task, seed):
    """OUTPUTS lists of ids, none with the stop id; each with the name of its kind."""
    rng = random.Random(seed)
    stop = end_of_turn_id(tokenizer)
    turns = good_turns(task, rng)
    control = [token for token in tokenizer.added_tokens_decoder if token != stop]
    beyond = range(len(tokenizer), len(tokenizer) + 50)  # of a vocabulary padded for speed
    texts = [("truncated", text[:place]) for text in turns for place in range(0, len(text), 3)]
    texts += [("deep", deep(rng)) for _ in range(4)]
    texts += [("mutated", mutated(mutated(rng.choice(turns), rng) or "x", rng)) for _ in range(300)]
    texts += [("soup", "".join(rng.choices(TAGS + JSON_PARTS + WORDS, k=rng.randint(0, 40)))) for _ in range(200)]
    unicode = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts += [("unicode", "".join(rng.choices(unicode, k=rng.randint(1, 60)))) for _ in range(60)]
    outputs = [(kind, tokenizer.encode(text, add_special_tokens=False)) for kind, text in texts]
    while len(outputs) < OUTPUTS:
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(0, 60))]
        for _ in range(rng.randint(0, 6)):
            ids.insert(rng.randint(0, len(ids)), rng.choice([*control, *beyond]))
        outputs.append(("ids", ids))
    rng.shuffle(outputs)
    assert len(outputs) == OUTPUTS
    assert min(Counter(kind for kind, _ in outputs).values()) >= 4
    return [(kind, [token for token in ids if token != stop]) for kind, ids in outputs]


@dataclass
class Recorded:
    """A Generator that emits ``outputs`` one after another, whichever row asks, some of them without a stop id."""

    outputs: list[list[int]]
    max_batch: int = 16
    context_length: int | None = None
    emitted: list[list[int]] = field(default_factory=list)

    def open(self, prompts, *, stop_id, sampling, seeds):
        self.stop_id, self.going = stop_id, {}
        return self

    def generate(self, append, max_new_tokens):
        self.going |= max_new_tokens
        row = next(iter(self.going))
        ids = self.outputs[len(self.emitted) % len(self.outputs)]
        if len(self.emitted) % 50:
            ids = [*ids, self.stop_id]
        ids = ids[: self.going.pop(row)]
        self.emitted.append(ids)
        return {row: Completion(ids, [-0.5] * len(ids), ids[-1:] == [self.stop_id])}

    def close(self):
        self.going.clear()


@pytest.fixture(scope="module")
def env():
    return pact.envs.make("toybox", train=1, test=40)


@pytest.fixture(scope="module")
def outputs(env):
    return malformed_outputs(env.tokenizer(), env.tasks("test")[0], SEED)


@pytest.mark.parametrize("form", ["hermes", "json"])
def test_a_thousand_malformed_outputs_are_parsed(env, outputs, form):
    tokenizer = env.tokenizer()
    for kind, ids in outputs:
        text = tokenizer.decode(ids, skip_special_tokens=False)
        turn = parse_turn(text, form)
        message = f"seed {SEED}, {kind}: {text[:300]!r}"
        assert len(calls_of(turn.message)) == len(turn.message["tool_calls"]), message
        assert all(error.endswith(".") and len(error) < 400 for error in turn.errors), message
        assert len(json.dumps(turn.message)) < 7 * len(text) + 1_000, message


@pytest.mark.parametrize("rules", [CallRules(), CallRules("json"), CallRules(malformed="skip")], ids=str)
def test_a_thousand_malformed_outputs_are_played(env, outputs, rules):
    tokenizer = env.tokenizer()
    tasks = env.tasks("test")
    generator = Recorded([ids for _, ids in outputs])
    trajectories = []
    while len(generator.emitted) < OUTPUTS:
        try:
            done = run_rollouts(env, tasks, generator, tokenizer, n=4, limits=LIMITS, rules=rules)
        except Exception as error:
            error.add_note(f"seed {SEED}, after output {len(generator.emitted) - 1}")
            raise
        trajectories += [trajectory for group in done for trajectory in group]
    for number, trajectory in enumerate(trajectories):
        try:
            check_trajectory(trajectory, tokenizer)
        except Exception as error:
            error.add_note(f"seed {SEED}, episode {number}: {str(trajectory.messages)[:2_000]}")
            raise
    assert sum(len(trajectory.turns) for trajectory in trajectories) == len(generator.emitted)
    sampled = Counter(tuple(t.ids[start:end]) for t in trajectories for start, end in t.turns)
    assert sampled == Counter(map(tuple, generator.emitted))
    assert {"answer", "token_limit"} <= {trajectory.stop_reason for trajectory in trajectories}


def check_trajectory(trajectory, tokenizer):
    """The record is whole, its messages can be rendered again, and what was observed holds no control id of its own."""
    n = len(trajectory.ids)
    assert n == len(trajectory.sampled) == len(trajectory.logp) == len(trajectory.component)
    assert set(trajectory.component) <= set(map(int, Component))
    roles = [message["role"] for message in trajectory.messages]
    assert roles.count("assistant") == len(trajectory.turns) == len(trajectory.score.turn_rewards)
    assert check_messages(trajectory.messages, "rollout")
    tokenizer.apply_chat_template([*trajectory.task.messages, *trajectory.messages], tokenize=False)
    json.dumps(trajectory.messages).encode()
    assert [m.get("cut", False) for m in trajectory.messages if m["role"] == "assistant"][:-1].count(True) == 0
    if trajectory.stop_reason == "answer":
        assert (roles[-1], trajectory.messages[-1].get("cut")) == ("assistant", None)
    frame = control(render_observation([{"role": "tool", "content": "x"}], tokenizer), tokenizer)
    replies = [len(list(group)) for is_reply, group in groupby(roles, lambda role: role == "tool") if is_reply]
    for (_, end), (start, _), n_replies in zip(trajectory.turns, trajectory.turns[1:], replies):
        observed = control(trajectory.ids[end:start], tokenizer)
        assert observed == frame[:-1] * n_replies + frame[-1:]


def control(ids, tokenizer):
    return [token for token in ids if token in tokenizer.added_tokens_decoder]
