"""Environments by name. A new one is a class with ``tasks`` and ``start`` and one line in ``_ENVIRONMENTS``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pact.envs.base import Environment, Episode, Score, Task

__all__ = ["Environment", "Episode", "Score", "Task", "make"]

_ENVIRONMENTS = {"toybox": ("pact.envs.toybox", "Toybox"), "ftrl": ("pact.envs.ftrl", "Ftrl")}


def make(name: str, **options: Any) -> Environment:
    """The environment called ``name``, built with ``options``.

    Raises ValueError for an unknown name, and TypeError for an option the environment does not have.
    """
    if name not in _ENVIRONMENTS:
        raise ValueError(f"unknown environment {name!r}: choose one of {', '.join(sorted(_ENVIRONMENTS))}")
    module, attribute = _ENVIRONMENTS[name]
    return getattr(import_module(module), attribute)(**options)
