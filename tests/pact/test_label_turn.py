"""Components of sampled turns: whatever was sampled is labelled, by the rule of rendered traces, in linear time."""

import time
from itertools import pairwise

import pytest
from tiny_tokenizers import LAYOUTS, tiny_tokenizer

from pact.trace import Component, label_turn, prepare_tokenizer

TOKENIZERS = {layout: prepare_tokenizer(tiny_tokenizer(layout)) for layout in LAYOUTS}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
_, REASONING, TOOL_CALL, _, ANSWER = map(int, Component)


@every_layout
def test_label_turn_takes_whatever_was_sampled(layout):
    tokenizer = TOKENIZERS[layout]

    def labels(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        labelled = label_turn(ids, tokenizer)
        assert len(labelled) == len(ids)
        return labelled

    assert set(labels("<think>never closed <tool_call>{}</tool_call><|im_end|>")) == {REASONING}
    assert set(labels("just an answer<|im_end|>")) == {ANSWER}
    assert set(labels('<tool_call>{"name": "never closed"<|im_end|>')) == {TOOL_CALL}
    both = labels("<think>a</think>Well <tool_call>{}</tool_call> bye<|im_end|>")
    assert [value for value, after in pairwise([*both, -1]) if value != after] == [REASONING, ANSWER, TOOL_CALL, ANSWER]
    assert labels("<think>a</think> <tool_call>{}</tool_call>\n<|im_end|>")[-1] == TOOL_CALL
    assert label_turn([], tokenizer) == []
    assert set(labels("<|im_end|>")) == {ANSWER}
    assert label_turn([10**6], tokenizer) == [ANSWER]  # a padded model vocabulary has ids the tokenizer lacks


@every_layout
def test_label_turn_knows_calls_as_json(layout):
    tokenizer = TOKENIZERS[layout]

    def parts(text, kind):
        ids = tokenizer.encode(text, add_special_tokens=False)
        labelled = label_turn(ids, tokenizer, "json")
        assert len(labelled) == len(ids)
        return tokenizer.decode([token for token, label in zip(ids, labelled) if label == kind])

    spelled = '{"name": "look é up", "arguments": {"key": "價 }"}}'
    turn = f"<think>Or {spelled}?</think>I say \n```json\n{spelled}\n``` so.<|im_end|>"
    assert parts(turn, REASONING) == f"<think>Or {spelled}?</think>"
    assert parts(turn, TOOL_CALL).strip() == f"```json\n{spelled}\n```"
    assert parts(turn, ANSWER).split() == ["I", "say", "so.<|im_end|>"]
    assert parts(f"{spelled}\n[{spelled},\n{spelled}]<|im_end|>", ANSWER) == ""
    assert parts('{"name": "Ada"} <tool_call><|im_end|>', TOOL_CALL) == ""
    assert parts(f"It is: {spelled[:-6]}<|im_end|>", TOOL_CALL).strip() == f"{spelled[:-6]}<|im_end|>"


@every_layout
def test_label_turn_reads_blocks_of_reasoning_in_a_row(layout):
    tokenizer = TOKENIZERS[layout]
    ids = tokenizer.encode("<think>a</think>\n<think>b</think>c<think>d</think>", add_special_tokens=False)
    reasoning = [token for token, label in zip(ids, label_turn(ids, tokenizer)) if label == REASONING]
    assert tokenizer.decode(reasoning) == "<think>a</think>\n<think>b</think>"


@every_layout
def test_labelling_a_long_turn_takes_linear_time(layout):
    tokenizer = TOKENIZERS[layout]
    for unit in ("</tool_call><tool_call>", "<tool_call></tool_call>", "<think></think>", '{"a', "<think>", "x"):
        ids = tokenizer.encode(unit, add_special_tokens=False)
        ids = ids * (50_000 // len(ids))
        for form in ("hermes", "json"):
            started = time.process_time()
            assert len(label_turn(ids, tokenizer, form)) == len(ids)
            assert time.process_time() - started < 1.0, (unit, form)
