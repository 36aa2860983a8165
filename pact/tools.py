"""Tool schemas and tool calls: checks schemas and parses decoded assistant turns. It executes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pact.call_text import THINK_END, CallForm, call_spans, find_reasoning
from pact.messages import Message, calls_of

__all__ = ["ParsedTurn", "calls_of", "parse_turn", "validate_tools"]


@dataclass(frozen=True)
class ParsedTurn:
    """One sampled turn as a message, and what was wrong with it.

    ``message``: role assistant, ``reasoning_content`` and ``content`` (str, maybe empty), ``tool_calls`` (the
    well-formed ones). ``errors``: one sentence a fault, fit to be shown to the policy as an observation.
    """

    message: Message
    errors: list[str]


def parse_turn(text: str, form: CallForm = "hermes") -> ParsedTurn:
    """Parse one decoded assistant turn, without its end-of-turn token. Takes any text, raises nothing.

    Reasoning is what precedes the first ``</think>``, with the blocks right after it; calls are looked for behind it
    only, so a call the policy merely thinks about is never made. ``form``: how calls are spelled; ``pact.call_text``
    describes the two forms and holds the limits. Content is what is neither reasoning nor a call, stripped.
    """
    reasoning = find_reasoning(text)
    errors = [] if reasoning.closed else [f"The reasoning was not closed: {THINK_END} is missing."]
    rest, cursor = text[: reasoning.end], reasoning.start
    calls: list[dict[str, Any]] = []
    content: list[str] = []
    for span in call_spans(rest, form, reasoning.start):
        content.append(rest[cursor : span.start])
        calls += span.calls
        errors += span.errors
        cursor = span.end
    content.append(rest[cursor:])
    message = {
        "role": "assistant",
        "reasoning_content": reasoning.text,
        "content": "\n".join(part for part in map(str.strip, content) if part),  # joined, they could spell a tag
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }
    return ParsedTurn(message, errors)


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
