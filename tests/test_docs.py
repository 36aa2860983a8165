"""What the documentation says holds: examples in docstrings and pages run, names, flags, links and messages exist."""

from __future__ import annotations

import ast
import doctest
import json
import re
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from pact.arguments import EnvArguments, LoraArguments, ModelArguments, PactTrainingArguments
from pact.envs.own_tasks import read_line
from pact.eval import EvalArguments
from pact.groups import PactConfig

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("pact_kernels/*/README.md")])
SOURCES = sorted([*ROOT.glob("pact/**/*.py"), *ROOT.glob("pact_kernels/**/*.py")])
# Pages whose Python blocks are whole programs when they are run one after the other.
EXECUTED = ("custom_environment.md", "custom_reward.md", "data_format.md", "drop_in.md", "method.md", "numerics.md")


def page(path):
    return str(path.relative_to(ROOT))


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def blocks(path, language):
    """The fenced blocks of ``language``, each padded with lines so that errors name the line of the page."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        found.append("\n" * text[: match.start(1)].count("\n") + match[1])
    return found


# -- docstrings --------------------------------------------------------------------------------------------------------

WITH_EXAMPLES = [path for path in SOURCES if re.search(r"^ +>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=page)
def test_examples_in_docstrings(path):
    result = doctest.testmod(import_module(module_name(path)))
    assert result.attempted
    assert not result.failed


def test_the_public_operations_have_examples():
    paths = set(map(page, WITH_EXAMPLES))
    wanted = {"prefix_tree", "terms", "linear_logprob/api", "cotrain_loss/api", "tree_attention/api"}
    assert {f"pact_kernels/{name}.py" for name in wanted} <= paths
    assert {f"pact/{name}.py" for name in ("advantages", "rewards", "schedules")} <= paths


# -- Python in pages ---------------------------------------------------------------------------------------------------


@cache
def top_level(path):
    """Names that a module binds at its top level, without importing it (it may need an optional package)."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def source_of(module):
    base = ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=page)
def test_python_in_pages_compiles_and_imports_what_exists(path):
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block, filename=page(path))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [str(node.module)]
            for module in modules:
                if module.split(".")[0] not in ("pact", "pact_kernels"):
                    continue
                source = source_of(module)
                assert source is not None, f"{page(path)}, line {node.lineno}: there is no module {module}"
                for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                    known = alias.name in top_level(source) or source_of(f"{module}.{alias.name}")
                    assert known, f"{page(path)}, line {node.lineno}: {module} has no {alias.name}"


@pytest.mark.parametrize("name", EXECUTED)
def test_python_in_pages_runs(name, tmp_path, monkeypatch):
    path = ROOT / "docs" / name
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    found = blocks(path, "python")
    assert found
    for block in found:
        exec(compile(block, page(path), "exec"), namespace)


# -- data, settings, links ---------------------------------------------------------------------------------------------


def test_lines_of_the_data_format_are_such_lines():
    lines = [line for block in blocks(ROOT / "docs/data_format.md", "json") for line in block.split("\n") if line]
    assert len(lines) >= 4
    for number, line in enumerate(lines, start=1):
        task = read_line(number, json.loads(line), None).task
        assert task.answer or task.expert


TRAIN = {"resume", "help"} | {
    item.name
    for kind in (ModelArguments, LoraArguments, EnvArguments, PactConfig, PactTrainingArguments)
    for item in fields(kind)
}
EVAL = {"compare", "help"} | {item.name for item in fields(EvalArguments)}
COMMAND = re.compile(r"^.*?(?:pact |-m pact\.)(train|eval)\b((?:[^\n`|#]|\\\n)*)", re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_flags_in_pages_are_settings(path):
    for match in COMMAND.finditer(path.read_text(encoding="utf-8")):
        known = {"train": TRAIN, "eval": EVAL}[match[1]]
        for flag in re.findall(r"(?<!\S)--([a-zA-Z_][\w-]*)", match[2]):
            name = flag.replace("-", "_").removeprefix("no_")
            assert name in known, f"{page(path)}: pact {match[1]} has no --{flag}: {match[0].strip()}"
        for config in re.findall(r"(?<!\S)(configs/\S+\.yaml)", match[2]):
            assert (ROOT / config).is_file(), f"{page(path)}: there is no {config}"


def test_settings_named_beside_the_formulas_exist():
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    named = [name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert len(named) > 20
    assert not set(named) - TRAIN
    missing = {item.name for item in fields(PactConfig)} - set(re.findall(r"`(\w+)`", text))
    assert not missing, "settings of the objective without a word in docs/method.md"


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), f"{page(path)} links to {target}"


# -- messages ----------------------------------------------------------------------------------------------------------


@cache
def texts_of_sources():
    """Every text of the sources, with NUL where a value is put in."""
    texts = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def says(text, parts):
    """Whether ``parts`` stand in ``text`` in this order."""
    place = 0
    for part in parts:
        found = text.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return True


def quoted_messages():
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)


@pytest.mark.parametrize("message", quoted_messages())
def test_messages_of_the_troubleshooting_page_are_raised(message):
    assert any(says(text, message.split("…")) for text in texts_of_sources()), f"nothing says {message!r} any more"


def test_the_troubleshooting_page_quotes_many_messages():
    messages = quoted_messages()
    assert len(messages) > 60
    assert len(set(messages)) == len(messages)
    assert all(len(message.replace("…", "")) >= 12 for message in messages), "too short to find the line by it"
