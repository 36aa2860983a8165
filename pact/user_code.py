"""Objects of the user's own files, named on the command line: ``FILE.py:NAME`` or ``package.module:NAME``.

They run in this process with all its rights; code that is not the user's belongs into ``pact.sandbox``.
"""

from __future__ import annotations

import difflib
import sys
import traceback
from hashlib import sha256
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any


def load_object(reference: str) -> Any:
    """What ``FILE.py:NAME`` or ``package.module:NAME`` stands for. A file runs once, whatever is taken from it.

    The folder of a file becomes importable, as it is for ``python FILE.py``, but after everything installed.
    Raises ValueError, one line, for a reference of another form, a file or name that is not there, and code that
    fails while it is imported (PACT_DEBUG=1 shows its traceback).
    """
    source, _, name = reference.rpartition(":")
    if not source or not name.isidentifier():
        raise ValueError(f"{reference!r} names no object: write FILE.py:NAME or package.module:NAME")
    module = _module_of_file(Path(source)) if source.endswith(".py") else _module_of_name(source)
    if not hasattr(module, name):
        names = [known for known in vars(module) if not known.startswith("_")]
        near = difflib.get_close_matches(name, names, n=1)
        raise ValueError(f"{source} has no {name}{f': did you mean {near[0]}?' if near else ''}; write {source}:NAME")
    return getattr(module, name)


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path} in {Path.cwd()}: write FILE.py:NAME with a path from there")
    path = path.resolve()
    key = f"pact_user_{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if key in sys.modules:
        return sys.modules[key]
    spec = spec_from_file_location(key, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[key] = module  # before it runs: dataclasses look their own module up there
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[key]
        if not isinstance(error, Exception | SystemExit):
            raise
        raise ValueError(_failure(str(path), error)) from error
    return module


def _module_of_name(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"there is no module {name}: install it, or write FILE.py:NAME for a file") from None
        raise ValueError(_failure(name, error)) from error
    except (Exception, SystemExit) as error:
        raise ValueError(_failure(name, error)) from error


def _failure(source: str, error: BaseException) -> str:
    """Where code of the user failed while it was imported."""
    if isinstance(error, SyntaxError):
        place = f"line {error.lineno}"
    else:
        inside = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
        place = f"line {inside[-1].lineno}" if inside else "its imports"
    return f"{source}, {place}: {type(error).__name__}: {error}; mend it so that Python can import it"
