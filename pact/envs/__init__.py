"""Environments by name, or the user's own as FILE.py:NAME: a class with ``tasks`` and ``start``."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import Any

from pact.envs.base import Environment, Episode, Score, Task
from pact.user_code import load_object

__all__ = ["Environment", "Episode", "Score", "Task", "make"]

_ENVIRONMENTS = {
    "toybox": ("pact.envs.toybox", "Toybox"),
    "ftrl": ("pact.envs.ftrl", "Ftrl"),
    "toolhop": ("pact.envs.toolhop", "ToolHop"),
    "bfcl": ("pact.envs.bfcl", "Bfcl"),
}


def make(name: str, **options: Any) -> Environment:
    """The environment called ``name``, built with ``options``.

    ``name``: one of ours, or ``FILE.py:NAME`` (``package.module:NAME``) of an own one: a class, or a function that
    returns an environment. See ``pact.envs.own.ToolEnvironment`` for the short way to write one.

    Raises ValueError for an unknown name, an option the environment does not have or one of the wrong type, and an
    object that is no environment.
    """
    own = ":" in name
    if not own and name not in _ENVIRONMENTS:
        raise ValueError(
            f"unknown environment {name!r}: choose one of {', '.join(sorted(_ENVIRONMENTS))}, or FILE.py:NAME of yours"
        )
    kind = load_object(name) if own else _ours(name)
    if not callable(kind):
        raise ValueError(f"{name} is no environment but {type(kind).__name__}: name a class with tasks and start")
    try:
        signature(kind).bind(**options)
    except TypeError as error:
        raise ValueError(_options(name, kind, error)) from error
    try:
        environment = kind(**options)
    except TypeError as error:
        if own:  # a fault of its code, not of the options
            raise
        raise ValueError(_options(name, kind, error)) from error
    if not isinstance(environment, Environment):
        lacks = ", ".join(part for part in ("tasks", "start") if not hasattr(environment, part))
        raise ValueError(f"{name} is no environment: it has no {lacks}; see pact.envs.base.Environment")
    return environment


def _ours(name: str) -> Any:
    module, attribute = _ENVIRONMENTS[name]
    return getattr(import_module(module), attribute)


def _options(name: str, kind: Any, error: TypeError) -> str:
    known = [key for key in signature(kind).parameters if not key.startswith("_")]
    hint = " (--data FILE gives the path)" if "path" in known else ""
    return f"{name}: {error}; its options are {', '.join(known) or 'none'}{hint}"
