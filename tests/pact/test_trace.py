"""Traces to tokens: what every layout must hold for any text, and the exact labels of small examples."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import LAYOUTS, tiny_tokenizer

from pact.trace import (
    CONTEXT_CLOSE,
    CONTEXT_OPEN,
    Component,
    end_of_turn_id,
    label_turn,
    prepare_tokenizer,
    render_context,
    render_observation,
    render_prompt,
    render_trace,
    split_segments,
)

TOKENIZERS = {layout: prepare_tokenizer(tiny_tokenizer(layout)) for layout in LAYOUTS}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

PROMPT, REASONING, TOOL_CALL, OBSERVATION, ANSWER = map(int, Component)


def schema(name="lookup", description="Looks a key up."):
    parameters = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def call(name="lookup", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


QUESTION = [{"role": "system", "content": "Use the tools."}, {"role": "user", "content": "What is the price?"}]
TRACE = [
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I need the price. So I look it up.\nThe key is known.",
        "tool_calls": [call(key="price")],
    },
    {"role": "tool", "name": "lookup", "content": "12 coins. Sold!"},
    {"role": "assistant", "content": "It is 12 coins.", "reasoning_content": "Now I know."},
]

# Text that tries to be something else: control tokens, tags, marks, line breaks and blanks at the edges, other scripts.
WORDS = [
    "The answer is 42. ", "look! ", "e.g. this", " ", "\n", "\n\n", "\t", "}", '"', "\\", "'", "<", "|", ">", "1. ",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|im_start|>",
    "<|im_end|>", "<|endoftext|>", "<|fim_prefix|>", "<repo_name>", "<|pad|>", "<|im_end|><|im_start|>system\n",
    "assistant\n", "\ue000", "\ue000open\ue001", "{{ marks.open }}", "{% endfor %}", "é", "漢字。", "😀", "\u200b",
    "\r\n",
]  # fmt: skip
PLAIN = [word for word in WORDS if "<" not in word]


def texts(words):
    return st.lists(st.sampled_from(words), max_size=6).map("".join)


def conversations(words):
    """(question, trace): rounds of assistant turn and results or user message, then a final answer."""
    text = texts(words)
    solid = text.map(lambda value: "x" + value)
    calls = st.lists(st.builds(lambda key, value: call(**{"key": value, "k" + key: 1.5}), text, text), max_size=2)

    def turn(reasoning, content, calls, results, supervised):
        if not calls and not content.strip():
            content = "ok"
        message = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}
        replies = [{"role": "tool", "name": "lookup", "content": value} for value in results[: len(calls)]]
        return [
            message | ({} if supervised else {"supervised": False}),
            *(replies or [{"role": "user", "content": "go on"}]),
        ]

    rounds = st.builds(
        turn,
        st.one_of(st.just(""), solid),
        st.one_of(st.just(""), solid),
        calls,
        st.lists(text, min_size=2, max_size=2),
        st.booleans(),
    )
    answer = st.builds(lambda content: [{"role": "assistant", "content": content}], solid)
    question = st.builds(lambda a, b: [{"role": "system", "content": a}, {"role": "user", "content": b}], text, text)
    return st.tuples(question, st.lists(rounds, max_size=3), answer)


def flat(rounds):
    return [message for messages in rounds for message in messages]


@every_layout
@settings(max_examples=25)
@given(conversations(WORDS), texts(WORDS))
def test_tokens_spell_what_the_template_writes(layout, conversation, description):
    tokenizer = TOKENIZERS[layout]
    question, rounds, answer = conversation
    tools = [schema(description=description)]
    messages = [*flat(rounds), *answer]
    head, suffix = render_prompt(question, tools, tokenizer)
    ids = head + suffix + render_trace(messages, tools, tokenizer).ids
    written = tokenizer.apply_chat_template([*question, *messages], tools=tools, tokenize=False)
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) + "\n" == written


@every_layout
@settings(max_examples=25)
@given(conversations(WORDS), texts(WORDS))
def test_no_content_becomes_a_control_token(layout, conversation, description):
    tokenizer = TOKENIZERS[layout]
    question, rounds, answer = conversation
    messages = [*flat(rounds), *answer]

    def harmless(message):
        copy = {**message, "content": "x" if message["content"].strip() else ""}
        if message["role"] == "assistant":
            copy["reasoning_content"] = "x" if message.get("reasoning_content", "").strip() else ""
            copy["tool_calls"] = [call(key="x") for _ in message.get("tool_calls", [])]
        return copy

    def control(question, messages, description):
        head, suffix = render_prompt(question, [schema(description=description)], tokenizer)
        ids = head + suffix + render_trace(messages, None, tokenizer).ids
        return [token for token in ids if token in tokenizer.added_tokens_decoder]

    evil = control(question, messages, description)
    assert evil == control([harmless(m) for m in question], [harmless(m) for m in messages], "x")
    assert not set(render_context(messages, tokenizer)) & set(tokenizer.added_tokens_decoder)


@every_layout
@settings(max_examples=25)
@given(conversations(WORDS))
def test_trace_is_turns_and_observations_and_every_part_is_a_prefix(layout, conversation):
    tokenizer = TOKENIZERS[layout]
    _, rounds, answer = conversation
    whole = render_trace([*flat(rounds), *answer], None, tokenizer)
    at = 0
    for count, (_, *reply) in enumerate(rounds, 1):
        part = render_trace(flat(rounds[:count]), None, tokenizer)
        observation = render_observation(reply, tokenizer)
        end = len(part.ids)
        assert (part.ids, part.component, part.segment) == (
            whole.ids[:end],
            whole.component[:end],
            whole.segment[:end],
        )
        assert part.ids[-len(observation) :] == observation
        assert part.ids[end - len(observation) - 1] == end_of_turn_id(tokenizer)
        assert set(part.component[end - len(observation) :]) <= {PROMPT, OBSERVATION}
        assert at < end - len(observation)
        at = end
    assert whole.ids[at:] == render_trace(answer, None, tokenizer).ids


@every_layout
@settings(max_examples=25)
@given(st.data())
def test_components_and_segments(layout, data):
    tokenizer = TOKENIZERS[layout]
    # Where tags are plain text, a tag spelled in the content is a tag to label_turn.
    _, rounds, answer = data.draw(conversations(PLAIN if layout == "smollm2" else WORDS))
    whole = render_trace([*flat(rounds), *answer], None, tokenizer)
    assert len(whole.ids) == len(whole.component) == len(whole.segment)
    assert all((s >= 0) == (c == REASONING) for c, s in zip(whole.component, whole.segment))
    at = 0
    for count, (turn, *reply) in enumerate(rounds, 1):
        end = len(render_trace(flat(rounds[:count]), None, tokenizer).ids)
        stop = end - len(render_observation(reply, tokenizer))
        segments = [s for s in whole.segment[at:stop] if s >= 0]
        if turn.get("supervised", True):
            assert whole.component[at:stop] == label_turn(whole.ids[at:stop], tokenizer)
            assert bool(segments) == bool(turn["reasoning_content"])
            assert segments[:1] in ([], [0])
            assert all(after - before in (0, 1) for before, after in pairwise(segments))
        else:
            assert set(whole.component[at:stop]) == {PROMPT}
        at = end


@every_layout
def test_tags_and_end_of_turn_belong_to_what_they_bound(layout):
    tokenizer = TOKENIZERS[layout]
    trace = render_trace(TRACE, None, tokenizer)

    def text(component, segment=None):
        chosen = [
            token
            for token, c, s in zip(trace.ids, trace.component, trace.segment)
            if c == component and segment in (None, s)
        ]
        return tokenizer.decode(chosen, skip_special_tokens=False)

    lines = "\n" if layout != "toybox" else ""
    gap = "\n\n" if layout != "toybox" else ""
    quoted = '{"name": "lookup", "arguments": {"key": "price"}}'
    quoted = quoted if layout != "toybox" else quoted.replace(": ", ":").replace(", ", ",")
    assert text(REASONING, 0) == f"<think>{lines}I need the price.<think>{lines}Now I know.{lines}</think>"
    assert text(REASONING, 1) == " So I look it up.\n"
    assert text(REASONING, 2) == f"The key is known.{lines}</think>"
    assert text(TOOL_CALL) == f"{gap}<tool_call>{lines}{quoted}{lines}</tool_call><|im_end|>"
    assert text(ANSWER) == f"{gap}It is 12 coins.<|im_end|>"
    assert text(OBSERVATION).strip() == "12 coins. Sold!"
    assert trace.ids[-1] == end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


@every_layout
def test_blanks_at_the_edges_of_an_observation_are_observation(layout):
    tokenizer = TOKENIZERS[layout]
    trace = render_trace([TRACE[0], {**TRACE[1], "content": " x  "}, TRACE[2]], None, tokenizer)
    observed = [token for token, component in zip(trace.ids, trace.component) if component == OBSERVATION]
    assert tokenizer.decode(observed).removesuffix("\n") == " x  "


@every_layout
def test_a_segment_that_begins_no_token_is_not_counted(layout):
    tokenizer = TOKENIZERS[layout]
    assert len(tokenizer.encode("。「！」", add_special_tokens=False)) == 1
    trace = render_trace([{"role": "assistant", "reasoning_content": "a。「！」b\nc"}], None, tokenizer)
    assert len(split_segments("a。「！」b\nc")) == 4
    assert sorted(set(trace.segment)) == [0, 1, 2]


def test_qwen_layout_word_for_word():
    tokenizer = TOKENIZERS["qwen"]
    head, suffix = render_prompt(QUESTION, [schema()], tokenizer)
    trace = render_trace(TRACE, [schema()], tokenizer)
    assert tokenizer.decode(head).startswith(
        "<|im_start|>system\nUse the tools.\n\n# Tools\n\nYou may call one or more"
    )
    assert tokenizer.decode(head).endswith("<|im_start|>user\nWhat is the price?")
    assert tokenizer.decode(suffix) == "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(trace.ids) == (
        "<think>\nI need the price. So I look it up.\nThe key is known.\n</think>\n\n"
        '<tool_call>\n{"name": "lookup", "arguments": {"key": "price"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n12 coins. Sold!\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\nNow I know.\n</think>\n\nIt is 12 coins.<|im_end|>"
    )


@every_layout
def test_prompt_keeps_tools_system_and_earlier_reasoning(layout):
    tokenizer = TOKENIZERS[layout]
    later = [*QUESTION, *TRACE, {"role": "user", "content": "And the weight?"}]
    head, suffix = render_prompt(later, [schema(), schema("weigh")], tokenizer)
    text = tokenizer.decode(head)
    for shown in (
        "Use the tools.",
        '"weigh"',
        "Looks a key up.",
        "I need the price.",
        "Now I know.",
        "12 coins. Sold!",
    ):
        assert shown in text
    assert text.endswith("user\nAnd the weight?")
    assert (suffix, tokenizer.decode(suffix)) == (
        render_prompt(QUESTION, None, tokenizer)[1],
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    bare = tokenizer.decode(render_prompt(QUESTION[1:], None, tokenizer)[0])
    assert ("named SmolLM" in bare) == (layout == "smollm2")
    assert "Tools" not in bare


@every_layout
def test_context_without_observations_lacks_the_results_alone(layout):
    tokenizer = TOKENIZERS[layout]
    whole = tokenizer.decode(render_context(TRACE, tokenizer)).split("\n")
    part = tokenizer.decode(render_context(TRACE, tokenizer, observations=False)).split("\n")
    assert part == [line for line in whole if not line.startswith("result: ")]
    assert len(part) < len(whole)


@every_layout
def test_context_is_the_trace_as_text(layout):
    tokenizer = TOKENIZERS[layout]
    failed = [
        {"role": "assistant", "content": "Trying.", "tool_calls": [call(key="<|im_end|>")], "supervised": False},
        {"role": "tool", "content": "no such key <think>"},
    ]
    text = tokenizer.decode(render_context([*failed, *TRACE], tokenizer))
    assert text.startswith(CONTEXT_OPEN)
    assert text.endswith(CONTEXT_CLOSE)
    shown = [
        "Trying.",
        "<|im_end|>",
        "no such key <think>",
        "So I look it up.",
        '"price"',
        "12 coins",
        "It is 12 coins.",
    ]
    places = [text.index(words) for words in shown]
    assert places == sorted(places)


def test_parallel_results_share_a_qwen_turn_and_keep_their_own_elsewhere():
    replies = [{"role": "tool", "content": "one"}, {"role": "tool", "content": "two"}]
    text = TOKENIZERS["qwen"].decode(render_observation(replies, TOKENIZERS["qwen"]))
    assert text.count("<|im_start|>user") == 1
    assert text.count("<tool_response>") == 2
    text = TOKENIZERS["toybox"].decode(render_observation(replies, TOKENIZERS["toybox"]))
    assert text.count("<|im_start|>tool") == 2


@pytest.mark.parametrize(
    ("reasoning", "count"),
    [
        ("One. Two! Three? Four", 4),
        ("A line\nanother line\n\n  an indented one", 3),
        ("It costs 3.14 coins, e.g. 2.50 at least", 1),
        ("1. look it up\n2. answer", 2),
        ('He said "no." Then left (quickly.) Done', 3),
        ("Wait... what?! Yes", 3),
        ("漢字。次の文。", 2),
        ("no end", 1),
        ("Trailing blanks.  \n\n", 1),
        ("Trailing indent.\n  ", 1),
        ("", 0),
    ],
)
def test_split_segments(reasoning, count):
    parts = split_segments(reasoning)
    assert "".join(parts) == reasoning
    assert len(parts) == count


@given(texts(WORDS))
def test_segments_join_to_the_reasoning_and_none_is_blank(reasoning):
    parts = split_segments(reasoning)
    assert "".join(parts) == reasoning
    assert all(part.strip() for part in parts[1:])


def test_json_arguments_are_read_and_surrogates_survive():
    tokenizer = TOKENIZERS["qwen"]
    as_text = [
        {**TRACE[0], "tool_calls": [{"function": {"name": "lookup", "arguments": '{"key": "price"}'}}]},
        *TRACE[1:],
    ]
    assert render_trace(as_text, None, tokenizer) == render_trace(TRACE, None, tokenizer)
    assert "a?b" in tokenizer.decode(render_observation([{"role": "tool", "content": "a\ud800b"}], tokenizer))


def test_settings_of_the_tokenizer_do_not_matter():
    tokenizer = prepare_tokenizer(tiny_tokenizer("qwen"))
    before = render_trace(TRACE, None, tokenizer)
    tokenizer(["some text", "more"], truncation=True, max_length=3, padding=True)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    assert render_trace(TRACE, None, tokenizer) == before


def trace_with(place, **changes):
    return [{**message, **changes} if n == place else message for n, message in enumerate(TRACE)]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty trace"),
        ([TRACE[0]], "1 of its calls have no result; add one tool message"),
        ([TRACE[0], TRACE[2]], "1 of its calls have no result; add one tool message"),
        ([TRACE[0], TRACE[1], TRACE[1], TRACE[2]], "a tool result without a call"),
        ([*QUESTION, *TRACE], "starts with an assistant turn"),
        ([TRACE[2], TRACE[2]], "two assistant turns in a row"),
        (trace_with(1, role="function"), "role 'function'; use system, user, assistant or tool"),
        ([*TRACE, QUESTION[0]], "a system message can only come first"),
        (trace_with(1, content={"price": 12}), "content is dict; give it as text"),
        (trace_with(2, content=" ", reasoning_content=None), "empty assistant turn"),
        (trace_with(0, tool_calls=[{"function": {"name": "f", "arguments": "{key: 1"}}]), "arguments are not JSON"),
        (
            trace_with(0, tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]),
            "arguments are list; give a dict",
        ),
        (trace_with(0, tool_calls=[{"function": {"arguments": {}}}]), "has no name"),
        (trace_with(0, tool_calls=["lookup"]), "has no name"),
        (trace_with(2, content="<think>a</think>b"), "move the reasoning to 'reasoning_content'"),
        ([{"role": "assistant", "content": "a", "thinking": "b"}], "rename the key"),
        (["text"], "role None"),
    ],
)
def test_bad_traces_are_one_line_errors(messages, words):
    for render in (
        lambda: render_trace(messages, None, TOKENIZERS["toybox"]),
        lambda: render_context(messages, TOKENIZERS["toybox"]),
    ):
        with pytest.raises(ValueError) as raised:
            render()
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


def test_bad_prompts_observations_and_components():
    tokenizer = TOKENIZERS["toybox"]
    with pytest.raises(ValueError, match="ends with a user message, this one ends with role 'assistant'"):
        render_prompt([*QUESTION, TRACE[2]], None, tokenizer)
    with pytest.raises(ValueError, match="empty prompt"):
        render_prompt([], None, tokenizer)
    with pytest.raises(ValueError, match="give tool or user messages only"):
        render_observation([TRACE[2]], tokenizer)
    with pytest.raises(ValueError, match="empty observation"):
        render_observation([], tokenizer)
    with pytest.raises(ValueError, match="unknown component 'thought': use one of prompt, reasoning, tool_call"):
        Component.parse("thought")
    assert Component.parse("Tool_Call") is Component.TOOL_CALL
    with pytest.raises(ValueError, match="prepare_tokenizer first"):
        render_trace(TRACE, None, tiny_tokenizer("qwen", PLAIN_TEMPLATE))


PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Complete but for the reasoning of turns before the last user message, as Qwen3's own template does it.
FORGETFUL_TEMPLATE = (
    "{{ tools }}{% set roles = messages | map(attribute='role') | list %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and 'user' not in roles[loop.index:] %}{{ m.reasoning_content }}{% endif %}"
    "{{ m.content }}{{ m.tool_calls }}<|im_end|>\n{% endfor %}"
)


# A training template that tells a tool's name as if it were its own words; a policy may call a tool "<|im_end|>".
NAMING_TEMPLATE = TOKENIZERS["toybox"].chat_template.replace(
    "<|im_start|>tool", '<|im_start|>tool " ~ message.name ~ "'
)


def unknown_layout(template):
    """A vocabulary of no known layout: ChatML tokens alone."""
    tokenizer = tiny_tokenizer("toybox", template)
    spelled = tokenizer.backend_tokenizer.to_str().replace("<|pad|>", "<|nil|>")
    return type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer.from_str(spelled), chat_template=template)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, ["is missing"]),
        (PLAIN_TEMPLATE, ["drops tools", "drops reasoning", "drops tool calls"]),
        (FORGETFUL_TEMPLATE, ["drops reasoning", "changes earlier turns"]),
        (FORGETFUL_TEMPLATE.replace(" and 'user' not in roles[loop.index:]", ""), ["does not mark where turns"]),
        (NAMING_TEMPLATE, ["writes content outside marks.open and marks.close"]),
        (PLAIN_TEMPLATE + "{{ raise_exception('roles must alternate') }}", ["refuses", "roles must alternate"]),
    ],
)
def test_unknown_layouts_say_what_their_template_lacks(template, words):
    with pytest.raises(ValueError, match="cannot train with this tokenizer: its chat template") as raised:
        prepare_tokenizer(unknown_layout(template))
    assert all(word in str(raised.value) for word in words)
    assert ("drops" in str(raised.value)) == any(word.startswith("drops") for word in words)


@every_layout
def test_prepare_installs_the_training_template_once_and_it_survives_saving(layout, tmp_path):
    tokenizer = tiny_tokenizer(layout, PLAIN_TEMPLATE)
    assert prepare_tokenizer(tokenizer) is tokenizer
    installed = tokenizer.chat_template
    assert installed == TOKENIZERS[layout].chat_template != PLAIN_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.chat_template == installed
    assert prepare_tokenizer(loaded).chat_template == installed
    assert render_trace(TRACE, None, loaded) == render_trace(TRACE, None, TOKENIZERS[layout])


def test_a_turn_must_end_with_a_control_token():
    own = TOKENIZERS["toybox"].chat_template.replace("<|im_end|>", "<|end|>")
    with pytest.raises(ValueError, match="ends no turn with a control token"):
        prepare_tokenizer(unknown_layout(own))


def test_a_training_template_of_the_user_is_kept():
    own = TOKENIZERS["toybox"].chat_template.replace("<tool_response>", "[").replace("</tool_response>", "]")
    tokenizer = prepare_tokenizer(unknown_layout(own))
    assert tokenizer.chat_template == own
    assert tokenizer.decode(render_observation([TRACE[1]], tokenizer)).count("[12 coins. Sold!]") == 1
