"""Environments by name. A new one is a class with ``tasks`` and ``start`` and one line in ``_ENVIRONMENTS``."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import Any

from pact.envs.base import Environment, Episode, Score, Task

__all__ = ["Environment", "Episode", "Score", "Task", "make"]

_ENVIRONMENTS = {
    "toybox": ("pact.envs.toybox", "Toybox"),
    "ftrl": ("pact.envs.ftrl", "Ftrl"),
    "toolhop": ("pact.envs.toolhop", "ToolHop"),
    "bfcl": ("pact.envs.bfcl", "Bfcl"),
}


def make(name: str, **options: Any) -> Environment:
    """The environment called ``name``, built with ``options``.

    Raises ValueError for an unknown name, an option the environment does not have or one of the wrong type.
    """
    if name not in _ENVIRONMENTS:
        raise ValueError(f"unknown environment {name!r}: choose one of {', '.join(sorted(_ENVIRONMENTS))}")
    module, attribute = _ENVIRONMENTS[name]
    environment = getattr(import_module(module), attribute)
    try:
        return environment(**options)
    except TypeError as error:
        known = ", ".join(key for key in signature(environment).parameters if not key.startswith("_"))
        raise ValueError(f"{name}: {error}; its options are {known}") from error
