"""Tasks, rollouts and text that does its worst, for the tests of `pact inspect` and of the report."""

from __future__ import annotations

from pact.envs.base import Task

# Ends scripts and attributes, opens elements and templates, reorders, hides, steers a terminal, cannot be encoded.
HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'><svg onload=window.hacked=1>"
    '" onfocus="window.hacked=1" {{ 7*7 }}{% raw %} <!-- ]]> &lt; \u2028\u2029 \u202eevil\u202c \u200b\U000e0041\ufe01 '
    "\x1b[31mred \x1b]0;title\x07 \x9b31m \x00\x08\r\t \ud800 <|im_end|></think>"
)
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "Looks a word up.", "parameters": {"type": "object"}},
}


def call(name="look_up", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def trace(observation="a small house", answer="a cottage"):
    """Two turns: three segments of reasoning and a call, then two segments and the answer."""
    return [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "The word is unusual. I do not know it.\nI look it up.",
            "tool_calls": [call(word="cot")],
        },
        {"role": "tool", "name": "look_up", "content": observation},
        {"role": "assistant", "content": answer, "reasoning_content": "That is clear. I answer."},
    ]


def task(name="words/1", observation="a small house", **fields):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a cot?"}]
    return Task(name, messages, [TOOL], **{"expert": trace(observation)} | fields)


def row(task):
    """A task as a line of a file."""
    return {"id": task.id, "messages": task.messages, "tools": task.tools, "expert": task.expert}


def hostile_task():
    """Every text of it is hostile."""
    tool = {"type": "function", "function": {**TOOL["function"], "name": "look_up" + HOSTILE, "description": HOSTILE}}
    expert = trace(HOSTILE, HOSTILE.replace("<|im_end|></think>", ""))
    expert[0]["reasoning_content"] += " " + HOSTILE
    expert[0]["tool_calls"] = [call(word=HOSTILE)]
    prompt = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE}]
    return Task("words/" + HOSTILE, prompt, [tool], expert=expert)
