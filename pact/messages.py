"""What a conversation may look like: the checks every message passes before it is rendered, and the calls it makes.

It knows no tokens and no templates (pact.trace) and parses no sampled text (pact.tools).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]


def calls_of(message: Message) -> list[dict[str, Any]]:
    """The calls of an assistant message as ``{"name": str, "arguments": dict}``, in order.

    Takes OpenAI style ``{"type", "function": {...}}`` and flat entries, arguments as a dict or as a JSON string.
    Raises ValueError for a call without a name and for arguments that are not a JSON object.
    """
    calls = []
    entries = message.get("tool_calls")
    if not isinstance(entries, list | tuple | None):
        raise ValueError(f"tool_calls is {type(entries).__name__}; give a list of calls")
    for place, entry in enumerate(entries or []):
        call = entry.get("function") or entry if isinstance(entry, dict) else {}
        call = call if isinstance(call, dict) else {}
        name, arguments = call.get("name"), call.get("arguments", {})
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"tool call {place} has no name: give {{'function': {{'name': ..., 'arguments': {{...}}}}}}"
            )
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:  # the latter: nested too deeply
                raise ValueError(
                    f"tool call {place} ({name!r}): its arguments are not JSON ({error}); give a dict"
                ) from None
        if not isinstance(arguments, dict):
            raise ValueError(f"tool call {place} ({name!r}): its arguments are {type(arguments).__name__}; give a dict")
        calls.append({"name": name, "arguments": arguments})
    return calls


def check_messages(messages: Sequence[Message], kind: str) -> list[Message]:
    """Copies of ``messages`` with parsed calls; ValueError for what no template can render. The messages of a rollout
    pass, whatever was sampled; what is odd about a turn is an error in a trace only (check_trace)."""
    if not messages:
        raise ValueError(f"empty {kind}: it needs at least one message")
    checked = []
    for place, message in enumerate(messages):
        where = f"{kind} message {place}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"{where}: role {role!r}; use system, user, assistant or tool")
        if role == "system" and place:
            raise ValueError(f"{where}: a system message can only come first; merge it into the first message")
        for key in ("content", "reasoning_content"):
            value = message.get(key)
            optional = role == "assistant" or key == "reasoning_content"
            if not (isinstance(value, str) or (value is None and optional)):
                raise ValueError(f"{where} ({role}): {key} is {type(value).__name__}; give it as text")
        copy = dict(message)
        if role == "assistant":
            renamed = any(message.get(key) is not None for key in ("reasoning", "thinking"))
            if renamed and "reasoning_content" not in message:
                raise ValueError(f"{where}: reasoning belongs under 'reasoning_content'; rename the key")
            try:
                calls = calls_of(message)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            copy["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        checked.append(copy)
    return checked


def check_trace(messages: Sequence[Message]) -> list[Message]:
    """check_messages of a trace, which starts with an assistant turn, has none that is empty or hides its reasoning in
    its content, and gives each call its result, in order."""
    checked = check_messages(messages, "trace")
    if checked[0]["role"] != "assistant":
        raise ValueError(
            f"a trace starts with an assistant turn, this one with role {checked[0]['role']!r}: drop the prompt"
        )
    open_calls, caller = 0, 0
    for place, message in enumerate(checked):
        if message["role"] == "tool":
            if not open_calls:
                raise ValueError(
                    f"trace message {place}: a tool result without a call; give one result a call, in order"
                )
            open_calls -= 1
            continue
        if open_calls:
            raise ValueError(_missing_results(caller, open_calls))
        if message["role"] == "assistant":
            _check_turn(message, f"trace message {place}")
            if place and checked[place - 1]["role"] == "assistant":
                raise ValueError(f"trace message {place}: two assistant turns in a row; merge them into one")
            open_calls, caller = len(message["tool_calls"]), place
    if open_calls:
        raise ValueError(_missing_results(caller, open_calls))
    return checked


def _check_turn(message: Message, where: str) -> None:
    content, reasoning = message.get("content") or "", message.get("reasoning_content") or ""
    if not message["tool_calls"] and not (content.strip() or reasoning.strip()):
        raise ValueError(f"{where}: empty assistant turn; give it reasoning, a call or an answer, or drop it")
    if content.lstrip().startswith("<think>"):  # it would be taken for the answer
        raise ValueError(f"{where}: its content opens with <think>; move the reasoning to 'reasoning_content'")


def _missing_results(caller: int, missing: int) -> str:
    return f"trace message {caller}: {missing} of its calls have no result; add one tool message a call right after it"
