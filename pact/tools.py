"""Tool schemas and tool calls: checks schemas and parses decoded assistant turns (Hermes form). It executes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pact.messages import Message, calls_of

__all__ = ["ParsedTurn", "calls_of", "parse_turn", "validate_tools"]

_THINK, _THINK_END = "<think>", "</think>"
_CALL, _CALL_END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ParsedTurn:
    """One sampled turn as a message, and what was wrong with it.

    ``message``: role assistant, ``reasoning_content`` and ``content`` (str, maybe empty), ``tool_calls`` (the
    well-formed ones). ``errors``: one sentence a fault, fit to be shown to the policy as an observation.
    """

    message: Message
    errors: list[str]


def parse_turn(text: str) -> ParsedTurn:
    """Parse one decoded assistant turn, without its end-of-turn token. Takes any text, raises nothing.

    Reasoning is what precedes the first ``</think>``; calls are looked for after it only, so a call the policy merely
    thinks about is never made. Content is what is neither reasoning nor a call block, stripped.
    """
    errors: list[str] = []
    reasoning, closed, rest = text.partition(_THINK_END)
    if not closed:
        rest, opened, reasoning = text.partition(_THINK)
        if opened:
            errors.append(f"The reasoning was not closed: {_THINK_END} is missing.")
    reasoning = reasoning.replace(_THINK, "", 1).strip()
    calls: list[dict[str, Any]] = []
    content = []
    prose, opened, rest = rest.partition(_CALL)
    while opened:
        content.append(prose)
        block, rest = _split_call(rest)
        if block is None:
            errors.append(f"A tool call was not closed: {_CALL_END} is missing.")
        else:
            try:
                calls.append(_parse_call(block))
            except ValueError as error:
                errors.append(f"A tool call could not be read: {error}.")
        prose, opened, rest = rest.partition(_CALL)
    content.append(prose)
    message = {
        "role": "assistant",
        "reasoning_content": reasoning,
        "content": "".join(content).strip(),
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }
    return ParsedTurn(message, errors)


def _split_call(text: str) -> tuple[str | None, str]:
    """Text after ``<tool_call>`` -> (inside of the block or None when it is never closed, text after the block)."""
    start = len(text) - len(text.lstrip())
    try:
        # A JSON value may spell the closing tag inside a string, so the value says where the block ends.
        _, end = json.JSONDecoder().raw_decode(text, start)
        after = text[end:].lstrip()
        if after.startswith(_CALL_END):
            return text[start:end], after[len(_CALL_END) :]
    except (ValueError, RecursionError):
        pass
    block, closed, rest = text.partition(_CALL_END)
    return (block, rest) if closed else (None, "")


def _parse_call(block: str) -> dict[str, Any]:
    """{"name", "arguments"} of a call block; ValueError says what is wrong with it."""
    try:
        call = json.loads(block)
        if isinstance(call, dict) and isinstance(call.get("arguments"), str):
            call = {**call, "arguments": json.loads(call["arguments"])}
    except ValueError as error:
        raise ValueError(f"it is not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(call, dict):
        raise ValueError('it is not a JSON object with "name" and "arguments"')
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError('"name" is missing')
    if not isinstance(arguments, dict):
        raise ValueError('"arguments" is missing' if arguments is None else '"arguments" is not a JSON object')
    return {"name": name, "arguments": arguments}


def validate_tools(tools: Sequence[dict[str, Any]]) -> None:
    """Check that every schema is ``{"type": "function", "function": {"name", "description"?, "parameters"?}}``.

    Two tools may share a name (ToolHop has such items). Raises ValueError that names the schema and the mend.
    """
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise ValueError(
                f"tool {place}: give {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}"
            )
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"tool {place}: its function has no name; give it one as text")
        if not isinstance(function.get("description", ""), str):
            raise ValueError(f"tool {place} ({name}): its description is not text")
        if not isinstance(function.get("parameters", {}), dict):
            raise ValueError(f"tool {place} ({name}): its parameters are not a JSON schema; give an object")
        try:
            json.dumps(tool)
        except (TypeError, ValueError) as error:
            raise ValueError(f"tool {place} ({name}): it is not JSON ({error})") from None
