"""Parsing sampled turns: what is well formed comes back whole, anything else becomes errors and never an exception."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import LAYOUTS, tiny_tokenizer

from pact.call_text import MAX_CALL_CHARS, MAX_CALLS, MAX_DEPTH, MAX_JSON_VALUES
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


def test_blocks_of_reasoning_in_a_row_are_all_reasoning():
    turn = parse_turn(f"<think>a</think>\n<think>{GOOD}</think>done")
    assert turn.message["reasoning_content"] == f"a\n{GOOD}"
    assert (turn.message["content"], turn.message["tool_calls"], turn.errors) == ("done", [], [])
    turn = parse_turn(f"<think>a</think><think>b {GOOD}")
    assert (turn.message["reasoning_content"], turn.message["content"]) == (f"a\nb {GOOD}", "")
    assert (turn.message["tool_calls"], len(turn.errors)) == ([], 1)


def nested(depth):
    return '{"a": ' * (depth - 1) + "{}" + "}" * (depth - 1)


MALFORMED = [  # the arguments of a call, and what is said about them
    ("[1]", '"arguments" is not a JSON object'),
    ("3", '"arguments" is not a JSON object'),
    ('"[1"', "not valid JSON"),
    ('"[1]"', '"arguments" is not a JSON object'),
    ('"{} {}"', "more text follows"),
    ("null", '"arguments" is missing'),
    ('{"a": 1, "a": 2}', "the key 'a' appears twice"),
    ('{"b": [{"a": 1, "\\u0061": 2}]}', "the key 'a' appears twice"),
    ('"{\\"a\\": 1, \\"a\\": 2}"', "the key 'a' appears twice"),
    ('{"a": NaN}', "NaN is not JSON"),
    ('{"a": [-Infinity]}', "-Infinity is not JSON"),
    ('{"a": 1e999}', "1e999 is too large"),
    ('{"a": ' + "9" * 5_000 + "}", "a number has 5000 characters"),
    ('{"a": "\\ud800"}', "half a surrogate pair"),
    ('{"a": "\ud800"}', "half a surrogate pair"),
    ('{"a": "' + "x" * MAX_CALL_CHARS + '"}', "longer than 65536 characters"),
    (nested(MAX_DEPTH), "nested deeper than 64"),
    (nested(100_000), "nested deeper than 64"),
    (json.dumps(nested(MAX_DEPTH)), "nested deeper than 64"),
    (json.dumps(nested(5_000)), "nested deeper than 64"),
    ('{"a": "line\nbreak"}', "not valid JSON (Invalid control character"),
    ("{'a': 1}", "not valid JSON"),
]
forms = pytest.mark.parametrize("form", ["hermes", "json"])


def wrap(form, text):
    return f"<tool_call>{text}</tool_call>" if form == "hermes" else f"So I say: {text}"


@forms
@pytest.mark.parametrize(("arguments", "words"), MALFORMED)
def test_malformed_arguments_are_errors(form, arguments, words):
    turn = parse_turn(wrap(form, f'{{"name": "add", "arguments": {arguments}}}'), form)
    assert turn.message["tool_calls"] == []
    assert len(turn.errors) == 1
    assert words in turn.errors[0]
    assert len(turn.errors[0]) < 200


@forms
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("3", '"name" is not a string'),
        ('["add"]', '"name" is not a string'),
        ("null", '"name" is missing'),
        ('""', '"name" is missing'),
        ('"' + "x" * 300 + '"', '"name" is longer than 256'),
        ('"\\udfff"', "half a surrogate pair"),
    ],
)
def test_malformed_names_are_errors(form, name, words):
    turn = parse_turn(wrap(form, f'{{"name": {name}, "arguments": {{}}}}'), form)
    assert turn.message["tool_calls"] == []
    assert [words in error for error in turn.errors] == [True]


@forms
def test_what_is_just_within_the_limits_is_a_call(form):
    arguments = {"deep": json.loads(nested(MAX_DEPTH - 2)), "long": int("9" * 1_000), "NaN": "NaN, 😀\x00"}
    call = {"name": "x" * 256, "arguments": arguments}
    call["arguments"]["text"] = "x" * (MAX_CALL_CHARS - len(json.dumps(call)) - len(', "text": ""'))
    turn = parse_turn(wrap(form, json.dumps(call)), form)
    assert (turn.errors, calls_of(turn.message)) == ([], [call])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<tool_call>{'name': 'add'}</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}', "</tool_call> is missing"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}', "</tool_call> is missing"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}} </tool call>', "</tool_call> is missing"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}, {}</tool_call>', "more text follows"),
        ('<tool_call>{"name": "add"}</tool_call>', '"arguments" is missing'),
        ('<tool_call>{"name": "add", "parameters": {}}</tool_call>', '"arguments" is missing'),
        ('<tool_call>{"arguments": {}}</tool_call>', '"name" is missing'),
        ("<tool_call>[1, 2]</tool_call>", "not a JSON object"),
        (f"<tool_call>[{GOOD[11:-12]}]</tool_call>", "not a JSON object"),
        ("<tool_call></tool_call>", "not valid JSON"),
        (f"<tool_call>{GOOD}</tool_call>", "another one begins inside it"),
        ('<tool_call>{"name": "add", ' + GOOD, "another one begins inside it"),
        (f"<tool_call><tool_call>{GOOD}", "another one begins inside it"),
        ("<tool_call>" + "x" * 100_000 + "</tool_call>", "longer than"),
        ("<think>on and on", "</think> is missing"),
        (f"<think>on and on {GOOD}", "</think> is missing"),
        ("<tool_call>" + "[" * 200_000 + "</tool_call>", "nested deeper than 64"),
    ],
)
def test_malformed_turns_are_errors(text, words):
    turn = parse_turn(text)
    assert turn.message["tool_calls"] == []
    assert len(turn.errors) == 1
    assert words in turn.errors[0]


CALL = {"name": "add", "arguments": {"a": 1}}
SPELLED = json.dumps(CALL)


@pytest.mark.parametrize(
    ("text", "count", "content"),
    [
        (SPELLED, 1, ""),
        (f"First I add.\n\n```json\n{SPELLED}\n```\nThen", 1, "First I add.\nThen"),
        (f"<tool_call>\n{SPELLED}\n</tool_call>", 1, ""),
        (f"{SPELLED} and {SPELLED}", 2, "and"),
        (f"{SPELLED}{SPELLED}\n{SPELLED}", 3, ""),
        (f"[{SPELLED}, {SPELLED}]", 2, ""),
        (json.dumps(CALL, indent=4), 1, ""),
        (json.dumps({"name": "add", "parameters": {"a": 1}}), 1, ""),
        (json.dumps({"function": CALL}), 1, ""),
        (json.dumps({"id": "c1", "type": "function", "function": {**CALL, "arguments": '{"a": 1}'}}), 1, ""),
        (json.dumps({"content": None, "tool_calls": [{"type": "function", "function": CALL}] * 2}), 2, ""),
        (json.dumps([{"function": CALL}, CALL]), 2, ""),
        (f"<think>Shall I {SPELLED}?</think>{SPELLED}", 1, ""),
        # An address, a brace, a schema, data, an empty list: none of them is a call.
        ('{"name": "Ada", "age": 36}', 0, '{"name": "Ada", "age": 36}'),
        (f'{{"plan": [{SPELLED}]}}', 0, f'{{"plan": [{SPELLED}]}}'),
        ('{"tool_calls": []} [] {} [{"a": 1}]', 0, '{"tool_calls": []} [] {} [{"a": 1}]'),
        ("f = {x | x > 1}, [1, 2", 0, "f = {x | x > 1}, [1, 2"),
        ('{"city": "Rome", "note": "cut', 0, '{"city": "Rome", "note": "cut'),
        ('{"name": "add", "description": "Adds.", "parameters": {"type": "object"}}', 0, None),
        ('{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}', 0, None),
        ('{"a": NaN} {"a": 1, "a": 2}', 0, '{"a": NaN} {"a": 1, "a": 2}'),
        ("<ｔool_call>｛＂name＂：＂add＂｝</ｔool_call>", 0, "<ｔool_call>｛＂name＂：＂add＂｝</ｔool_call>"),
    ],
)
def test_calls_as_json_in_the_text(text, count, content):
    turn = parse_turn(text, "json")
    assert turn.errors == []
    assert calls_of(turn.message) == [CALL] * count
    assert turn.message["content"] == (text if content is None else content)


@pytest.mark.parametrize("place", range(len(SPELLED) - 1))
def test_a_truncated_json_call_is_an_error_once_it_can_be_told(place):
    for text in (f"I add: {SPELLED[:place]}", f"[{SPELLED}, {SPELLED[:place]}"):
        turn = parse_turn(text, "json")
        assert turn.message["tool_calls"] == []
        assert len(turn.errors) == (text[0] == "[" or ":" in SPELLED[:place])


@pytest.mark.parametrize(
    ("text", "calls", "words"),
    [
        (f"[{SPELLED}, 3, {SPELLED}]", 2, ["not a JSON object"]),
        (f"[{SPELLED}, {SPELLED}", 0, ["not valid JSON"]),
        (f'{{"name": "add", "arguments": {{"a": 1,}}}} {SPELLED}', 1, ["not valid JSON"]),
        ('{"name": "add", "arguments": {}, "parameters": {}}', 0, ["both"]),
        (f'{{"function": {{"name": "add", "arguments": 1}}}}{SPELLED}', 1, ["not a JSON object"]),
        (f'{{"tool_calls": [{SPELLED}, null]}}', 1, ["not a JSON object"]),
        ('{"a": ' * 100_000, 0, ["nested deeper than 64"]),
        ('{"x' * (2 * MAX_JSON_VALUES + 2), 0, ["More than 1000 pieces of JSON"]),
    ],
)
def test_malformed_json_calls_are_errors(text, calls, words):
    turn = parse_turn(text, "json")
    assert len(calls_of(turn.message)) == calls
    assert [word in error for word, error in zip(words, turn.errors, strict=True)] == [True] * len(words)


@forms
@pytest.mark.parametrize("duplicates", [MAX_CALLS, MAX_CALLS + 1, 5_000])
def test_the_number_of_calls_is_limited(form, duplicates):
    turn = parse_turn(wrap(form, SPELLED) * duplicates, form)
    assert len(turn.message["tool_calls"]) == min(duplicates, MAX_CALLS)
    assert turn.errors == ["More than 128 tool calls in one turn."] * (duplicates > MAX_CALLS)
    bad = wrap(form, '{"name": "add", "arguments": }')
    assert len(parse_turn(bad * duplicates, form).errors) == min(duplicates, MAX_CALLS + 1)


HOSTILE = [
    '{"', '{"a":', '{"a":[', '[{"a":', "{ ", '{"a":"', '{"\\"', '{"a":NaN,', '{"a":1},', SPELLED, SPELLED[:-1], "[1,",
    "<tool_call>", "<tool_call>{}</tool_call>", "</tool_call>", '<tool_call>{"a":"', f"<tool_call>{SPELLED}",
    "<think>", "</think>", "<think></think>", "</think><think>", "```json\n", "\n", "9", "\\", '"',
]  # fmt: skip


@forms
@pytest.mark.parametrize(
    "before", ["", '<tool_call>{"name": "f", "arguments": {"a": ', '[{"name": "f", "arguments": "']
)
def test_a_hostile_turn_of_a_megabyte_is_read_in_linear_time(form, before):
    for unit in HOSTILE:
        text = before + unit * (1_000_000 // len(unit))
        started = time.process_time()
        turn = parse_turn(text, form)
        assert time.process_time() - started < 1.0, unit
        assert len(turn.errors) <= MAX_CALLS + 2
        assert sum(map(len, turn.errors)) < 20_000


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


@forms
@given(
    text=st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join)
    | st.binary().map(lambda raw: raw.decode("utf-8", "replace"))
)
def test_any_text_parses(form, text):
    turn = parse_turn(text, form)
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


def test_a_call_after_a_stray_quote_is_found():
    turn = parse_turn('Say {"x and then {"name": "pwd", "arguments": {}}', "json")
    assert calls_of(turn.message) == [{"name": "pwd", "arguments": {}}]
    assert turn.errors == []
