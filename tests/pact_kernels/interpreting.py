"""Triton's interpreter, made faster for tests: it patches its language anew in every nested call, most of its time."""

from __future__ import annotations

import inspect
from typing import Any


def patch_once_a_launch() -> None:
    """From here on each module of the language is patched once in a kernel, and restored when the kernel ends.

    Does nothing where Triton has no such functions (3.6).
    """
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if not hasattr(interpreter, "_LangPatchScope") or hasattr(patch, "once"):
        return
    languages = (interpreter.tl, interpreter.tl.core)
    scopes: list[Any] = []
    patched: set[int] = set()

    class Scope:
        def restore(self) -> None:
            for scope in reversed(scopes):
                scope.restore()
            scopes.clear()
            patched.clear()

    def patch_lang(fn: Any) -> Scope:
        found = {id(x) for x in fn.__globals__.values() if inspect.ismodule(x) and x in languages}
        if not found or not found <= patched:
            scopes.append(patch(fn))
            patched.update(found)
        return Scope()

    patch_lang.once = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_lang
