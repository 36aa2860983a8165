"""Messages to tokens: each token of a trace with its component and reasoning segment, prompts as head and suffix.

It weighs nothing (that is the objective) and parses no sampled text (that is pact.tools).
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from pact.call_text import CALL, CALL_END, THINK, THINK_END, CallForm, call_spans
from pact.messages import Message, check_messages, check_trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_OPEN, CONTEXT_CLOSE = "\n\n<expert_trace>", "</expert_trace>"


class Component(IntEnum):
    """What a token is to the loss. PROMPT: context the model never produces, and turns that are not supervised."""

    PROMPT = 0
    REASONING = 1
    TOOL_CALL = 2
    OBSERVATION = 3
    ANSWER = 4

    @classmethod
    def parse(cls, name: str) -> Component:
        """Component of a name in any case, such as "tool_call". Raises ValueError for any other name."""
        try:
            return cls[name.upper()]
        except (KeyError, AttributeError):
            raise ValueError(
                f"unknown component {name!r}: use one of {', '.join(c.name.lower() for c in cls)}"
            ) from None


@dataclass(frozen=True)
class TokenizedTrace:
    """A trace as tokens; three lists of equal length, one entry a token.

    ``ids``: what follows the prompt's generation prompt. ``component``: a Component as int. ``segment``: index of the
    sentence or line within its block of reasoning, counted from 0 without gaps; -1 outside supervised reasoning.
    """

    ids: list[int]
    component: list[int]
    segment: list[int]


_CONTEXT_LABELS = {
    Component.PROMPT: "user",
    Component.REASONING: "thought",
    Component.TOOL_CALL: "call",
    Component.OBSERVATION: "result",
    Component.ANSWER: "answer",
}

# Training templates write these between the pieces of a conversation. The nonce keeps them out of reach of any content:
# a tool's output cannot forge a mark that was drawn after the process started.
_NONCE = secrets.token_hex(8)
_MARKS = {name: f"\ue000{_NONCE}:{name}\ue001" for name in ("open", "close", "turn", "end")}
_COMPONENT_MARKS = {
    "prompt": Component.PROMPT,
    "reasoning": Component.REASONING,
    "call": Component.TOOL_CALL,
    "observation": Component.OBSERVATION,
    "answer": Component.ANSWER,
}
_MARKS |= {name: f"\ue000{_NONCE}:{name}\ue001" for name in _COMPONENT_MARKS}
_MARK_RE = re.compile(f"\ue000{_NONCE}:([a-z]+)\ue001")


@dataclass
class _Piece:
    """A stretch of rendered text; ``given``: it comes from a message or a schema and must stay ordinary text."""

    text: str
    component: Component
    given: bool


@dataclass
class _Block:
    """Pieces tokenised together: one assistant turn as the model produces it, or all that stands between two turns."""

    turn: bool
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def per_character(self, values: Iterable[int]) -> np.ndarray:
        """One value a piece -> one value a character, int64."""
        return np.repeat(np.fromiter(values, np.int64), [len(piece.text) for piece in self.pieces])


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Install the training template of the tokenizer's layout (in place) and return the tokenizer.

    A tokenizer that already carries a training template, shipped or the user's own, keeps it. A probe conversation
    checks the result: it renders tools, calls, results and every turn's reasoning, and never changes earlier turns.
    Raises ValueError that says what is missing; for an unknown layout, what the tokenizer's own template lacks.
    """
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer gives no character offsets: load the fast one (AutoTokenizer does by default)")
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    lacks = _lacks(tokenizer, own)
    if not lacks:
        return tokenizer
    added = set(tokenizer.added_tokens_encoder)
    layout = next((name for name, tokens in _LAYOUTS.items() if tokens <= added), None)
    if layout is not None:
        template = (Path(__file__).parent / "templates" / f"{layout}.jinja").read_text(encoding="utf-8")
        lacks = _lacks(tokenizer, template)
    if lacks:
        raise ValueError(
            f"cannot train with this tokenizer: its chat template {', '.join(lacks)}; use a known "
            f"layout ({', '.join(_LAYOUTS)}) or set chat_template to a training template like pact/templates/qwen.jinja"
        )
    tokenizer.chat_template = template
    return tokenizer


_TAGS = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
_CHATML = {"<|im_start|>", "<|im_end|>"}
# Layout -> added tokens that give it away, most particular first; each has its template in pact/templates.
_LAYOUTS = {
    "qwen": _CHATML | {"<|endoftext|>", "<|object_ref_start|>"},
    "smollm2": _CHATML | {"<|endoftext|>", "<jupyter_start>"},
    "toybox": _CHATML | _TAGS | {"<|pad|>"},
}

_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe_tool", "description": "probe schema", "parameters": {"type": "object"}},
}
_PROBE: list[Message] = [
    {"role": "system", "content": "probe system"},
    {"role": "user", "content": "probe question"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "probe plan",
        "tool_calls": [
            {"type": "function", "function": {"name": "probe_tool", "arguments": {"key": "probe argument"}}}
        ],
    },
    {"role": "tool", "name": "probe_name", "content": "probe result"},
    {"role": "assistant", "content": "probe answer", "reasoning_content": "probe check"},
    {"role": "user", "content": "probe second question"},
    {"role": "assistant", "content": "probe second answer", "reasoning_content": "probe second check"},
]
_PROBE_SHOWS = {
    "tools": ("probe_tool", "probe schema"),
    "system messages": ("probe system",),
    "reasoning": ("probe plan", "probe check", "probe second check"),
    "tool calls": ("probe argument",),
    "tool results": ("probe result",),
    "answers": ("probe answer", "probe second answer"),
}


def _lacks(tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[str]:
    """What keeps ``template`` from training, in words; empty when nothing does."""
    if not template:
        return ["is missing"]
    ends = [end for end, message in enumerate(_PROBE, 1) if message["role"] == "assistant"]
    try:
        parts = [_render(_PROBE[:end], [_PROBE_TOOL], tokenizer, template=template) for end in ends]
    except (TemplateError, TypeError) as error:
        return [f"refuses a conversation with tool calls ({error})"]
    texts = ["".join(block.text for block in part) for part in parts]
    lacks = [f"drops {what}" for what, shown in _PROBE_SHOWS.items() if any(word not in texts[-1] for word in shown)]
    if not all(texts[-1].startswith(text) for text in texts):
        lacks.append("changes earlier turns as the conversation grows")
    turns = [block for block in parts[-1] if block.turn]
    components = {piece.component for block in parts[-1] for piece in block.pieces if piece.given}
    if len(turns) != len(ends) or components != set(Component):
        return [*lacks, "does not mark where turns and components begin"]
    if any("probe" in piece.text for block in parts[-1] for piece in block.pieces if not piece.given):
        lacks.append("writes content outside marks.open and marks.close, where it could forge control tokens")
    if any(ids[-1] not in tokenizer.added_tokens_decoder for ids, _ in _encode(turns, tokenizer)):
        lacks.append("ends no turn with a control token of this vocabulary")
    return lacks


def render_trace(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase
) -> TokenizedTrace:
    """Tokenise a trace: the assistant, tool and later user messages after a prompt (DESIGN section 1, "Sequences").

    Every assistant turn, with its end-of-turn token, and everything between two turns is tokenised on its own, as in a
    rollout; so the ids of a trace cut after a round of tool or user messages are a prefix of the ids of the whole.
    Raises ValueError for an empty trace, one that does not start with an assistant turn, calls without one result each,
    arguments that are not a JSON object, and a tokenizer that pact.trace.prepare_tokenizer has not prepared.
    """
    checked = check_trace(messages)
    assistants = [message for message in checked if message["role"] == "assistant"]
    blocks = _render(checked, tools, tokenizer, add_generation_prompt=checked[-1]["role"] != "assistant")
    # What stands before the first turn belongs to the prompt, what stands after the last end of turn to nobody.
    blocks = blocks[1:-1]
    ids: list[int] = []
    component: list[int] = []
    segment: list[int] = []
    for place, (block, (block_ids, start_N)) in enumerate(zip(blocks, _encode(blocks, tokenizer))):
        supervised = block.turn and assistants[place // 2].get("supervised", True)
        component_N = block.per_character(piece.component for piece in block.pieces)[start_N]
        if block.turn and not supervised:
            component_N[:] = Component.PROMPT
        ids += block_ids
        component += component_N.tolist()
        segment += _segments(block, component_N, start_N).tolist()
    return TokenizedTrace(ids, component, segment)


def render_prompt(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokenise a prompt into (head_ids, suffix_ids); the prompt itself is ``head_ids + suffix_ids``.

    The head ends inside the last user message, before its end-of-turn; the suffix is end-of-turn and generation prompt.
    Raises ValueError when the last message is not a user message, and for malformed messages.
    """
    checked = check_messages(messages, "prompt")
    if checked[-1]["role"] != "user":
        raise ValueError(f"a prompt ends with a user message, this one ends with role {checked[-1]['role']!r}")
    *blocks, last, _ = _render(checked, tools, tokenizer, add_generation_prompt=True)
    given = max(place for place, piece in enumerate(last.pieces) if piece.given) + 1
    head, suffix = _Block(False, last.pieces[:given]), _Block(False, last.pieces[given:])
    *head_parts, (suffix_ids, _) = _encode([*blocks, head, suffix], tokenizer)
    return [token for part, _ in head_parts for token in part], suffix_ids


def render_context(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, observations: bool = True
) -> list[int]:
    """Tokenise a trace as the plain text that goes between head and suffix (the ``c`` of DESIGN section 1).

    One line each for thought, call, result and answer, without a single control token; unsupervised turns are included.
    ``observations=False`` leaves out the results.
    Raises as render_trace does.
    """
    checked = check_trace(messages)
    given = [piece for block in _render(checked, None, tokenizer)[1:] for piece in block.pieces if piece.given]
    if not observations:
        given = [piece for piece in given if piece.component != Component.OBSERVATION]
    lines = "".join(f"{_CONTEXT_LABELS[piece.component]}: {piece.text}\n" for piece in given)
    text = f"{CONTEXT_OPEN}\n{lines}{CONTEXT_CLOSE}"
    [(ids, _)] = _encode([_Block(False, [_Piece(text, Component.PROMPT, given=True)])], tokenizer)
    return ids


def render_observation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that follow the end-of-turn of an assistant turn: the tool or user ``messages`` and the generation prompt.

    They are the ids that render_trace yields at that place. Raises ValueError for other roles and for no message.
    """
    checked = check_messages(messages, "observation")
    for place, message in enumerate(checked):
        if message["role"] not in ("tool", "user"):
            raise ValueError(f"observation message {place}: role {message['role']!r}; give tool or user messages only")
    before = {"role": "assistant", "content": "-"}
    *_, observation, _ = _render([before, *checked], None, tokenizer, add_generation_prompt=True)
    [(ids, _)] = _encode([observation], tokenizer)
    return ids


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant turn: the stop token of generation."""
    return render_trace([{"role": "assistant", "content": "-"}], None, tokenizer).ids[-1]


def split_segments(reasoning: str) -> list[str]:
    """Cut one block of reasoning into its sentences and lines; their concatenation is ``reasoning``.

    A cut falls after line breaks, and after ``.``, ``!`` or ``?`` (with closing quotes and brackets) when blanks and
    more text follow on the line, but not after a single letter ("e.g. this") or a number that opens a line ("1. this").
    """
    last = len(reasoning.rstrip())
    cuts = [0, *(cut for cut in (m.end() for m in _CUT_RE.finditer(reasoning)) if cut < last), len(reasoning)]
    return [reasoning[a:b] for a, b in pairwise(cuts) if b > a]


_CUT_RE = re.compile(
    r"""\n\s*\n | \n                                          # line breaks, empty lines with them
      | (?<!\b[A-Za-z]\.) (?<!^\d\.) (?<!^\d\d\.)             # not "e.g.", not "1." at the start of a line
        (?<=[.!?]) ["')\]]* (?=[ \t]+\S)                      # the blank opens the next sentence, as in its token
      | (?<=[。！？])(?=[^\s。！？])""",
    re.VERBOSE | re.MULTILINE,
)


def label_turn(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, form: CallForm = "hermes") -> list[int]:
    """Component of each sampled token of one assistant turn, by the rule of render_trace. Takes any ids.

    Reasoning runs to the first ``</think>`` and through the blocks right after it; blanks before a call belong to the
    call, a closing control token to what it ends; the rest is ANSWER. Where the tokenizer has a tag as an added token,
    its mere spelling does not count. ``form``: how calls are spelled (``pact.call_text.call_spans``).
    """
    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    end_N = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    start_N = end_N - np.array([len(piece) for piece in pieces], np.int64)
    added = tokenizer.added_tokens_encoder
    text = "".join(pieces).translate(_BYTE_BLANKS)

    def places(tag: str) -> list[int]:
        if tag in added:
            return [int(start) for start, token in zip(start_N, ids) if token == added[tag]]
        return [match.start() for match in re.finditer(re.escape(tag), text)]

    ends_with_control = bool(ids) and ids[-1] in added.values() and pieces[-1] not in (THINK, THINK_END, CALL, CALL_END)
    body = len(text) - len(pieces[-1]) if ends_with_control else len(text)
    component = np.full(len(text) + 1, Component.ANSWER)
    cursor = _reasoning_end(text[:body], places(THINK), places(THINK_END))
    component[:cursor] = Component.REASONING
    if form == "json":
        calls = [(span.start, span.end) for span in call_spans(text[:body], "json", cursor)]
    else:
        calls = _blocks(places(CALL), places(CALL_END), len(CALL_END), body)
    for opened, closed in calls:
        if opened >= cursor:
            prose = len(text[cursor:opened].rstrip())
            component[cursor + prose : closed] = Component.TOOL_CALL
            cursor = closed
    if cursor and not text[cursor:body].strip():
        component[cursor:body] = component[cursor - 1]
    if body:
        component[body:] = component[body - 1]
    return component[start_N].tolist()


def _reasoning_end(text: str, opens: list[int], closes: list[int]) -> int:
    """Where the reasoning of a turn ends, given the places of its tags."""
    if not closes:
        return len(text) if opens else 0
    end = closes[0] + len(THINK_END)
    for opened in opens:
        if opened >= end:
            if text[end:opened].strip():
                break
            place = bisect_left(closes, opened)
            end = closes[place] + len(THINK_END) if place < len(closes) else len(text)
    return end


def _blocks(opens: list[int], closes: list[int], width: int, end: int) -> list[tuple[int, int]]:
    """From each opening tag to the end of the next closing one, or to ``end``."""
    ends = [*(place + width for place in closes), end]
    return [(opened, ends[bisect_left(closes, opened)]) for opened in opens]


_BYTE_BLANKS = str.maketrans("ĠĉčĊ", " \t\r\n")  # from the byte alphabet of byte-level vocabularies


def _render(
    messages: list[Message],
    tools: Sequence[dict[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase,
    add_generation_prompt: bool = False,
    template: str | None = None,
) -> list[_Block]:
    """Render with the training template and cut at its marks: [before, turn, between, turn, ..., rest].

    Lone surrogates, which a tool may return and no encoding can carry, become question marks.
    """
    rendered = tokenizer.apply_chat_template(
        messages,
        tools=list(tools) if tools else None,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        chat_template=template,
        marks=_MARKS,
    )
    parts = _MARK_RE.split(str(rendered).encode("utf-8", "replace").decode("utf-8"))
    blocks = [_Block(turn=False)]
    component, given = Component.PROMPT, False
    if len(parts) == 1 and template is None:
        raise ValueError("the tokenizer has no training template: pass it through pact.trace.prepare_tokenizer first")
    for text, mark in zip(parts[::2], [*parts[1::2], ""]):
        if text or given:
            blocks[-1].pieces.append(_Piece(text, component, given))
        if mark in ("open", "close"):
            given = mark == "open"
        elif mark in ("turn", "end"):
            blocks.append(_Block(turn=mark == "turn"))
            component = Component.PROMPT
        elif mark:
            component = _COMPONENT_MARKS[mark]
    return blocks


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], np.ndarray, np.ndarray]:
    """ids, first and end character of each token; tokens that share one character share its place."""
    # The backend itself: transformers wraps each call in thread pools and copies that cost more than short texts do.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    encoding = backend.encode(text, add_special_tokens=False)
    offset_N2 = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    start_N, end_N = offset_N2[:, 0], offset_N2[:, 1]
    # Byte-level vocabularies may trim leading blanks off the offsets; a token begins where the one before it ended.
    start_N[1:] = np.minimum(start_N[1:], end_N[:-1])
    start_N[:1] = 0
    return encoding.ids, start_N, end_N


def _encode(blocks: list[_Block], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], np.ndarray]]:
    """ids and first character of each token, a block; added tokens spelled inside given text are cut apart first."""
    control = {token for token, added in tokenizer.added_tokens_decoder.items() if len(added.content) > 1}
    result = []
    for block in blocks:
        text = block.text
        given = block.per_character(piece.given for piece in block.pieces)
        cuts = {0, len(text)}
        ids, start_N, end_N = _tokenize(text, tokenizer)
        while forged := [n for n, token in enumerate(ids) if token in control and given[start_N[n]]]:
            if any(end_N[n] - start_N[n] < 2 for n in forged):
                raise ValueError(
                    "the tokenizer's normaliser makes a control token of one character: no text can be safe"
                )
            cuts.update(int(start_N[n]) + 1 for n in forged)
            bounds = sorted(cuts)
            parts = [_tokenize(text[a:b], tokenizer) for a, b in pairwise(bounds)]
            ids = [token for part in parts for token in part[0]]
            start_N = np.concatenate([part[1] + a for part, a in zip(parts, bounds)])
            end_N = np.concatenate([part[2] + a for part, a in zip(parts, bounds)])
        result.append((ids, start_N))
    return result


def _segments(block: _Block, component_N: np.ndarray, start_N: np.ndarray) -> np.ndarray:
    """Segment of each token: tokens of reasoning count the cuts at or before their first character, gaps closed."""
    reasoning_N = component_N == Component.REASONING
    segment_N = np.full(len(component_N), -1)
    if reasoning_N.any():
        cuts, offset = [], 0
        for piece in block.pieces:
            if piece.given and piece.component == Component.REASONING:
                cuts += (offset + np.cumsum([len(part) for part in split_segments(piece.text)])[:-1]).tolist()
            offset += len(piece.text)
        place_N = np.searchsorted(np.array(cuts, np.int64), start_N[reasoning_N], side="right")
        segment_N[reasoning_N] = np.unique(place_N, return_inverse=True)[1]
    return segment_N
