"""Parsing sampled turns: what is well formed comes back whole, anything else becomes errors and never an exception."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import LAYOUTS, tiny_tokenizer

from pact.tools import calls_of, parse_turn, validate_tools
from pact.trace import prepare_tokenizer, render_trace

GOOD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOKENIZERS = {layout: prepare_tokenizer(tiny_tokenizer(layout)) for layout in LAYOUTS}


def test_a_whole_turn():
    turn = parse_turn(f"<think>\nI add.\nThen I stop.\n</think>\n\nLet me see.\n{GOOD}\n{GOOD.replace('1', '2')}")
    assert turn.errors == []
    assert turn.message == {
        "role": "assistant",
        "reasoning_content": "I add.\nThen I stop.",
        "content": "Let me see.",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
            {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}},
        ],
    }
    assert calls_of(turn.message) == [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}]


def test_plain_answers():
    assert parse_turn("It is 3.").message["content"] == "It is 3."
    assert parse_turn("<think>so</think>It is 3.").message["content"] == "It is 3."
    assert parse_turn("so</think>It is 3.").message["reasoning_content"] == "so"  # the prompt may open the block
    assert parse_turn("").errors == []


def test_arguments_as_a_json_string_and_closing_tags_inside_strings():
    assert calls_of(parse_turn('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>').message) == [
        {"name": "add", "arguments": {"a": 1}}
    ]
    nested = {"name": "echo", "arguments": {"text": "</tool_call><tool_call>{}"}}
    turn = parse_turn(f"<tool_call>{json.dumps(nested)}</tool_call> after")
    assert (calls_of(turn.message), turn.message["content"], turn.errors) == ([nested], "after", [])


def test_a_call_that_is_only_thought_of_is_not_made():
    turn = parse_turn(f"<think>I could say {GOOD}</think>done")
    assert turn.message["tool_calls"] == []
    assert turn.message["content"] == "done"
    assert GOOD in turn.message["reasoning_content"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<tool_call>{'name': 'add'}</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}', "</tool_call> is missing"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}', "</tool_call> is missing"),
        ('<tool_call>{"name": "add"}</tool_call>', '"arguments" is missing'),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', '"arguments" is not a JSON object'),
        ('<tool_call>{"name": "add", "arguments": "[1"}</tool_call>', "not valid JSON"),
        ('<tool_call>{"name": "add", "arguments": "[1]"}</tool_call>', '"arguments" is not a JSON object'),
        ('<tool_call>{"arguments": {}}</tool_call>', '"name" is missing'),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', '"name" is not a string'),
        ("<tool_call>[1, 2]</tool_call>", "not a JSON object"),
        ("<tool_call></tool_call>", "not valid JSON"),
        ("<think>on and on", "</think> is missing"),
        (f"<think>on and on {GOOD}", "</think> is missing"),
        ('<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>", "not valid JSON"),
        ("<tool_call>" + "[" * 200_000 + "</tool_call>", "nested deeper than 64"),
    ],
)
def test_malformed_turns_are_errors(text, words):
    turn = parse_turn(text)
    assert turn.message["tool_calls"] == []
    assert len(turn.errors) == 1
    assert words in turn.errors[0]


def test_good_calls_beside_a_bad_one_stay():
    turn = parse_turn(f"{GOOD}<tool_call>oops</tool_call>{GOOD}")
    assert len(turn.message["tool_calls"]) == 2
    assert len(turn.errors) == 1


FRAGMENTS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "{",
    "}",
    '"name": "f"',
    '"arguments": {}',
    ",",
    " ",
    "é",
]


@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join)
    | st.binary().map(lambda raw: raw.decode("utf-8", "replace"))
)
def test_any_text_parses(text):
    turn = parse_turn(text)
    assert turn.message["role"] == "assistant"
    assert len(calls_of(turn.message)) == len(turn.message["tool_calls"])
    assert all(error.endswith(".") for error in turn.errors)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab<>\"\\é{}/_tolcr\n ", max_size=12),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab\" <", max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
plain = st.text("ab. \n,", max_size=12).map(str.strip)
turns = st.builds(
    lambda reasoning, content, calls: {
        "role": "assistant",
        "reasoning_content": reasoning,
        "content": content if content or reasoning or calls else "ok",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": call}} for call in calls],
    },
    plain,
    plain,
    st.lists(st.dictionaries(st.sampled_from(["key", "</tool_call>"]), json_values, max_size=2), max_size=2),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40)
@given(turns)
def test_a_rendered_turn_parses_back(layout, message):
    tokenizer = TOKENIZERS[layout]
    results = [{"role": "tool", "content": "r"} for _ in message["tool_calls"]]
    ids = render_trace([message, *results], None, tokenizer).ids
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    turn = parse_turn(text.partition("<|im_end|>")[0])
    assert turn.errors == []
    assert turn.message == message


def test_validate_tools():
    good = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    validate_tools([good, good])
    validate_tools([])
    for bad, words in [
        ({"name": "add"}, "tool 1: give"),
        ("add", "tool 1: give"),
        ({"type": "function", "function": {"description": "x"}}, "tool 1: its function has no name"),
        ({"type": "function", "function": {"name": "add", "description": 3}}, "description is not text"),
        ({"type": "function", "function": {"name": "add", "parameters": []}}, "not a JSON schema"),
        ({"type": "function", "function": {"name": "add", "parameters": {"default": {1}}}}, "it is not JSON"),
    ]:
        with pytest.raises(ValueError, match=words):
            validate_tools([good, bad])


def test_calls_of_takes_flat_entries_and_no_calls():
    assert calls_of({"role": "assistant", "content": "hi"}) == []
    assert calls_of({"tool_calls": None}) == []
    assert calls_of({"tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}) == [{"name": "f", "arguments": {"a": 1}}]
    with pytest.raises(ValueError, match="tool call 0 has no name"):
        calls_of({"tool_calls": [{"function": {"arguments": {}}}]})
