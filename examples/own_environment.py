"""An own environment: own questions with expert traces (a JSONL file) and own Python functions as tools.

pact train --env examples/own_environment.py:Calculator --data examples/calculator_traces.jsonl --model DIR
"""

from pact.envs.own import ToolEnvironment


def add(a: int, b: int) -> int:
    """Add two integers.

    Args:
        a: one of them
        b: the other one
    """
    return a + b


def multiply(a: int, b: int) -> int:
    """Multiply two integers.

    Args:
        a: one of them
        b: the other one
    """
    return a * b


class Calculator(ToolEnvironment):
    tools = (add, multiply)


def right_and_short(messages, env_reward):
    """A reward of one's own, `--reward examples/own_environment.py:right_and_short`: each message costs a little."""
    return env_reward - 0.02 * len(messages)
