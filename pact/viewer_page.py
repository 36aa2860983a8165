"""One self-contained HTML page from a template: all text escaped, all assets inside. Knows no tasks and no runs."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pact.files import write_whole
from pact.visible import visible

LONGEST = 20_000  # characters of one text that are laid out; the rest is behind a fold
MOST = 1_000_000  # characters of one text that a page holds at all


def page(template: str, script: str, **values: Any) -> str:
    """The page of a template of ``viewer_assets``, which loads nothing.

    Styles and ``script`` stand in it, and its content security policy allows this very script and nothing from outside.
    Every value is made visible (`pact.viewer_text.visible`) and escaped where the template puts it.
    """
    code = _asset(script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    own = {"policy": Markup(policy), "style": Markup(_asset("page.css")), "script": Markup(code)}
    return _templates().get_template(template).render(**own, **values)


def write_page(path: Path, text: str) -> Path:
    """Write a page; there is never half of one under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("pact", "viewer_assets"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    templates.globals |= {"longest": LONGEST, "most": MOST}
    return templates


def _asset(name: str) -> str:
    return (files("pact") / "viewer_assets" / name).read_text(encoding="utf-8")
