"""Where the text of a sampled turn spells reasoning and tool calls, in either form. Knows no tokens, executes nothing.

Whatever the text is, reading it raises nothing and takes time linear in its length.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

CallForm = Literal["hermes", "json"]

MAX_CALLS = 128  # calls of one turn, good and bad
MAX_JSON_VALUES = 1_000  # in the text of one turn, calls or not, that the "json" form looks at
MAX_STRAY_CHARS = 1_000  # of broken JSON that is looked at once more, for a call inside it
MAX_CALL_CHARS = 1 << 16  # of the JSON of one call (of one list of calls)
MAX_NAME_CHARS = 256
MAX_NUMBER_CHARS = 1_000  # int() of a million digits takes seconds
MAX_DEPTH = 64  # of one call's JSON: encoders and templates recurse over it later

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class CallSpan:
    """``text[start:end]`` spells ``calls`` (``{"name": str, "arguments": dict}``), and what ``errors`` say is wrong."""

    start: int
    end: int
    calls: tuple[dict[str, Any], ...] = ()
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reasoning:
    """``text``: what was thought. Calls and answer are looked for in ``[start, end)`` of the turn. ``closed``: whether
    every block of it ends."""

    text: str
    start: int
    end: int
    closed: bool


def find_reasoning(text: str) -> Reasoning:
    """Reasoning is what precedes the first ``</think>``, whether or not the prompt opened the block, and further blocks
    that follow it at once; a block that is never closed runs to the end of the turn."""
    first, closed, _ = text.partition(THINK_END)
    if not closed:
        opened = text.find(THINK)
        if opened < 0:
            return Reasoning("", 0, len(text), True)
        return Reasoning(text[opened + len(THINK) :].strip(), 0, opened, False)
    blocks, at = [first.replace(THINK, "", 1)], len(first) + len(THINK_END)
    while again := _ANOTHER_THINK.match(text, at):
        close = text.find(THINK_END, again.end())
        if close < 0:
            return Reasoning(_joined([*blocks, text[again.end() :]]), len(text), len(text), False)
        blocks.append(text[again.end() : close])
        at = close + len(THINK_END)
    return Reasoning(_joined(blocks), at, len(text), True)


_ANOTHER_THINK = re.compile(r"\s*" + THINK)


def _joined(blocks: list[str]) -> str:
    return "\n".join(stripped for block in blocks if (stripped := block.strip()))


def call_spans(text: str, form: CallForm, start: int = 0) -> list[CallSpan]:
    """The calls that ``text`` spells from ``start`` on, in order, without overlap.

    "hermes": blocks ``<tool_call>{"name", "arguments"}</tool_call>``. "json": JSON in the text, bare or fenced, of the
    shape of a call: ``{"name", "arguments" or "parameters"}``, ``{"function": {...}}``, ``{"tool_calls": [...]}`` or a
    list of such; other JSON is prose, a tool's schema too. ``arguments`` may be an object or its JSON text. What is
    meant as a call and cannot be read is a span with errors. Beyond a limit the rest is one span with an error.
    """
    spans: list[CallSpan] = []
    room = MAX_CALLS
    for span in {"hermes": _hermes_spans, "json": _json_spans}[form](text, start):
        room -= len(span.calls) + len(span.errors)
        if room < 0:
            return [*spans, _rest(text, span.start, f"More than {MAX_CALLS} tool calls in one turn.")]
        spans.append(span)
    return spans


def _rest(text: str, start: int, error: str) -> CallSpan:
    """What is not read any further."""
    return CallSpan(start, len(text), (), (error,))


def _hermes_spans(text: str, start: int) -> Iterator[CallSpan]:
    while (opened := text.find(CALL, start)) >= 0:
        span = _hermes_span(text, opened)
        yield span
        start = span.end


def _hermes_span(text: str, opened: int) -> CallSpan:
    inside = opened + len(CALL)
    piece = text[inside : inside + MAX_CALL_CHARS + 1]
    reading = _read(piece, len(piece) - len(piece.lstrip()))
    # A JSON value may spell the closing tag inside a string, so the value says where the block ends.
    if reading.complete and (closing := _CLOSING.match(text, inside + reading.end)):
        return _span(opened, closing.end(), reading, [reading.value], ("arguments",))
    closed = text.find(CALL_END, inside)
    if closed < 0:
        return _rest(text, opened, f"A tool call was not closed: {CALL_END} is missing.")
    if text.find(CALL, inside, closed) >= 0:
        fault = f"another one begins inside it; end each with {CALL_END}"
    elif reading.too_deep:
        fault = _TOO_DEEP
    elif closed - inside > MAX_CALL_CHARS:
        fault = _TOO_LONG
    else:
        fault = f"it is not valid JSON ({reading.fault or _MORE_TEXT})"
    return CallSpan(opened, closed + len(CALL_END), (), (_unread(fault),))


_CLOSING = re.compile(r"\s*" + CALL_END)
_TOO_DEEP = f"its JSON is nested deeper than {MAX_DEPTH} levels"
_TOO_LONG = f"its JSON is longer than {MAX_CALL_CHARS} characters"
_MORE_TEXT = "more text follows the value"


def _unread(fault: str) -> str:
    return f"A tool call could not be read: {fault}."


def _json_spans(text: str, start: int) -> Iterator[CallSpan]:
    at, reads = start, 0
    while opening := _OPENING.search(text, at):
        begin, reads = opening.start(), reads + 1
        if reads > MAX_JSON_VALUES:
            yield _rest(text, begin, f"More than {MAX_JSON_VALUES} pieces of JSON in one turn.")
            return
        reading = _read(text, begin)
        if reading.too_deep:  # nobody can say where it ends
            yield _rest(text, begin, _unread(_TOO_DEEP))
            return
        # What was read once is not read again (but for a little), so that hostile text costs no more than plain text.
        at = max(reading.end, begin + 1)
        if reading.complete:
            entries = _entries(reading.value)
            if entries is not None:
                closing = _FENCE_CLOSES.match(text, at)
                at = closing.end() if closing else at
                yield _span(_fence(text, start, begin), at, reading, entries, ("arguments", "parameters"))
                start = at
        elif _NAMED.match(text, begin, at) or _CALL_KEY.search(text, begin, at):
            fault = _unread(f"it is not valid JSON ({reading.fault})")
            yield CallSpan(_fence(text, start, begin), at, (), (fault,))
            start = at
        elif reading.size <= MAX_STRAY_CHARS:
            at = begin + 1  # a stray quote may have taken the beginning of a call for its end


_OPENING = re.compile(r'\{\s*"|\[\s*\{\s*"')
# What broken JSON must hold to have been meant as a call.
_NAMED = re.compile(r'\[?\s*\{\s*"name"\s*:')
_CALL_KEY = re.compile(r'"(?:arguments|parameters|function|tool_calls)"\s*:')
_FENCE_OPENS = re.compile(rf"(?:```[\w-]*|{CALL})\s*\Z")
_FENCE_CLOSES = re.compile(rf"\s*(?:```|{CALL_END})")


def _fence(text: str, start: int, begin: int) -> int:
    """Where the fence before ``begin`` starts, or ``begin``."""
    low = max(start, begin - 32)
    opening = _FENCE_OPENS.search(text[low:begin])
    return low + opening.start() if opening else begin


def _entries(value: Any) -> list[Any] | None:
    """The calls a JSON value is meant to be, unchecked, or None where it is other data."""
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    if not isinstance(value, list):
        call = _entry(value)
        return None if call is None else [call]
    found = [_entry(item) for item in value]
    if all(call is None for call in found):
        return None
    return [item if call is None else call for item, call in zip(value, found)]


def _entry(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        return None
    call = value["function"] if isinstance(value.get("function"), dict) else value
    # With a description it is the schema of a tool.
    is_call = "name" in call and ("arguments" in call or ("parameters" in call and "description" not in call))
    return call if is_call else None


def _span(start: int, end: int, reading: _Reading, entries: list[Any], keys: tuple[str, ...]) -> CallSpan:
    if reading.fault:
        return CallSpan(start, end, (), (_unread(f"it is not valid JSON ({reading.fault})"),))
    if reading.size > MAX_CALL_CHARS:
        return CallSpan(start, end, (), (_unread(_TOO_LONG),))
    calls, errors = [], []
    for entry in entries:
        try:
            calls.append(_checked(entry, keys))
        except ValueError as error:
            errors.append(_unread(str(error)))
    return CallSpan(start, end, tuple(calls), tuple(errors))


def _checked(entry: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """{"name", "arguments"} of one entry; ValueError says what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError('it is not a JSON object with "name" and "arguments"')
    name, given = entry.get("name"), [entry[key] for key in keys if entry.get(key) is not None]
    if not isinstance(name, str) or not name:
        raise ValueError('"name" is missing' if name in (None, "") else '"name" is not a string')
    if len(name) > MAX_NAME_CHARS:
        raise ValueError(f'"name" is longer than {MAX_NAME_CHARS} characters')
    if len(given) != 1:
        raise ValueError('"arguments" is missing' if not given else 'it has both "arguments" and "parameters"')
    call = {"name": name, "arguments": _arguments(given[0])}
    if _deeper_than(call, MAX_DEPTH):
        raise ValueError(_TOO_DEEP)
    try:
        json.dumps(call, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair, which is no character") from None
    return call


def _arguments(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        reading = _read(given, len(given) - len(given.lstrip()))
        if reading.too_deep:
            raise ValueError(_TOO_DEEP)
        if reading.fault or given[reading.end :].strip():
            raise ValueError(f'"arguments" is not valid JSON ({reading.fault or _MORE_TEXT})')
        given = reading.value
    if not isinstance(given, dict):
        raise ValueError('"arguments" is not a JSON object')
    return given


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        values = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [child for children in values for child in children]
    return any(isinstance(item, (dict, list)) for item in level)


@dataclass
class _Reading:
    """One JSON value read from ``start`` of a text: where reading ended, and why it failed.

    A complete value may have a ``fault``: JSON that Python takes and others do not, or that no call should hold.
    """

    start: int
    end: int
    value: Any = None
    complete: bool = False
    too_deep: bool = False
    fault: str | None = None

    @property
    def size(self) -> int:
        return self.end - self.start

    def object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            self.fault = f"the key {twice[:40]!r} appears twice in one object"
        return found

    def integer(self, digits: str) -> int:
        if len(digits) > MAX_NUMBER_CHARS:
            self.fault = f"a number has {len(digits)} characters"
            return 0
        return int(digits)

    def real(self, digits: str) -> float:
        number = float(digits)
        if len(digits) > MAX_NUMBER_CHARS or math.isinf(number):
            self.fault = f"the number {digits[:40]} is too large"
        return number

    def constant(self, name: str) -> None:
        self.fault = f"{name} is not JSON"


def _read(text: str, start: int) -> _Reading:
    reading = _Reading(start, start)
    decoder = json.JSONDecoder(
        object_pairs_hook=reading.object,
        parse_int=reading.integer,
        parse_float=reading.real,
        parse_constant=reading.constant,
    )
    try:
        reading.value, reading.end = decoder.raw_decode(text, start)
        reading.complete = True
    except json.JSONDecodeError as error:
        reading.fault = f"{error.msg} at character {error.pos - start}"
        # A string without an end takes all that follows; the error names where it begins.
        reading.end = len(text) if error.msg.startswith("Unterminated string") else error.pos
    except RecursionError:
        reading.too_deep = True
    return reading
