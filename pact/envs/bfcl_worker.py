"""The side of BFCL that runs inside the sandbox, beside ``bfcl_eval``: data, execution of calls, the released checkers.

A script of its own, on the standard library and bfcl_eval; ``pact.envs.bfcl`` binds it into the sandbox and calls its
functions with JSON. Every call runs in a fresh process, so instances start anew: what an episode has done so far comes
with each call and is executed again. It decides nothing that the released code decides.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import sys
import tempfile
import types
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

# bfcl_eval makes folders on import: these, and not beside itself.
os.environ["BFCL_PROJECT_ROOT"] = tempfile.mkdtemp(prefix="bfcl-")


class _Absent(types.ModuleType):
    """Stands for a module of vendor SDKs or parsers that nothing here calls; bfcl_eval only wants to import it."""

    MODEL_CONFIG_MAPPING: dict[str, Any] = {}  # noqa: RUF012  (a module's attribute)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


for _name in (
    "bfcl_eval.constants.model_config",
    "bfcl_eval.model_handler.parser.java_parser",
    "bfcl_eval.model_handler.parser.js_parser",
    "tenacity",
):
    sys.modules[_name] = _Absent(_name)
# The loaders lock the files they read. Here these are read-only, the process is alone, and the sandbox refuses locks.
sys.modules["filelock"] = types.ModuleType("filelock")
sys.modules["filelock"].FileLock = nullcontext  # type: ignore[attr-defined]

from bfcl_eval.constants.enums import ModelStyle  # noqa: E402
from bfcl_eval.constants.executable_backend_config import CLASS_FILE_PATH_MAPPING  # noqa: E402
from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI  # noqa: E402
from bfcl_eval.eval_checker.agentic_eval.agentic_checker import agentic_checker  # noqa: E402
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker  # noqa: E402
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call  # noqa: E402
from bfcl_eval.model_handler.utils import (  # noqa: E402
    add_memory_instruction_system_prompt,
    convert_to_function_call,
    convert_to_tool,
)
from bfcl_eval.utils import (  # noqa: E402
    extract_test_category_from_id,
    get_directory_structure_by_id,
    load_dataset_entry,
    load_ground_truth_entry,
)

for _module in CLASS_FILE_PATH_MAPPING.values():
    if not _module.endswith(("web_search", "memory_vector")):  # these need what is not here
        import_module(_module)

Call = dict[str, Any]
Entry = dict[str, Any]


def load(category: str) -> dict[str, Any]:
    """``entries`` as the released loaders give them, functions in OpenAI's form, and ``answers``: id -> gold."""
    entries = load_dataset_entry(category)
    for entry in entries:
        entry["function"] = _tools(entry["function"])
        for turn, docs in entry.get("missed_function", {}).items():
            entry["missed_function"][turn] = _tools(docs)
    # Gold answers of memory are stored once for all of its backends, under ids without the backend.
    answers = {
        answer["id"].replace("memory_", f"{category}_", 1) if category.startswith("memory") else answer["id"]: answer[
            "ground_truth"
        ]
        for answer in load_ground_truth_entry(category)
    }
    return {"entries": entries, "answers": answers}


def execute(entry: Entry, done: list[Call], call: Call) -> str:
    """What ``call`` returns after the calls ``done`` of the same episode."""
    fault = _fault(_methods(entry), call)
    if fault:
        return f"Error during execution: {fault}"
    _prepare(entry)
    return _run(entry, _strings(entry, [*done, call]))[0][-1]


def check(entry: Entry, turns: list[list[list[Call]]], gold: list[list[str]]) -> dict[str, Any]:
    """The verdict of the released multi-turn checker on ``turns`` [user turn][step][call].

    ``held``: for each user turn, whether the checks of it and all before it hold. ``error_type`` and ``error`` are the
    checker's own.
    """
    decoded = [[_strings(entry, step) for step in steps if step] for steps in turns]
    held: list[bool] = []
    verdict: dict[str, Any] = {}
    for count in range(1, len(decoded) + 1):
        # Instances are kept under the model's name, so each run over a longer part has a name of its own.
        verdict = multi_turn_checker(decoded[:count], gold[:count], entry, entry["category"], f"part_{count}")
        held.append(bool(verdict["valid"]))
        if not verdict["valid"]:
            break
    held += [False] * (len(decoded) - len(held))
    error = "; ".join(verdict["error_message"]) if isinstance(verdict.get("error_message"), list) else None
    return {
        "held": held,
        "error_type": verdict.get("error_type"),
        "error": (error or verdict.get("error_message") or "")[:500] or None,
    }


def answered(text: str, answers: list[str]) -> dict[str, Any]:
    """The verdict of the released agentic checker on the text of the last message."""
    verdict = agentic_checker(text, answers)
    return {"valid": bool(verdict["valid"]), "error_type": verdict.get("error_type")}


def opening(entry: Entry) -> list[list[dict[str, str]]]:
    """The user turns of a memory entry, its first with the system prompt that shows what is remembered."""
    _prepare(entry)
    [instance] = _run(entry, [])[1].values()
    return add_memory_instruction_system_prompt(entry["question"], entry["category"], entry["scenario"], instance)


def snapshot(entry: Entry, done: list[Call]) -> dict[str, Any]:
    """What the memory holds after the calls ``done``, as its own snapshot file has it."""
    _prepare(entry)
    [instance] = _run(entry, _strings(entry, done))[1].values()
    instance._flush_memory_to_local_file()
    return json.loads(instance.latest_snapshot_file.read_text(encoding="utf-8"))


def gold_calls(entry: Entry, gold: list[list[str]]) -> list[list[Call]]:
    """Gold call strings as calls with named arguments; raises ValueError for one that is not a plain call."""
    calls: list[list[Call]] = []
    for turn in gold:
        calls.append([])
        for text in turn:
            node = ast.parse(text, mode="eval").body
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                raise ValueError(f"{text!r} is not a plain call")
            parameters = list(inspect.signature(_methods(entry)[node.func.id]).parameters)[1:]
            arguments = {name: ast.literal_eval(value) for name, value in zip(parameters, node.args)}
            arguments |= {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
            calls[-1].append({"name": node.func.id, "arguments": arguments})
    return calls


def _tools(docs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tools = convert_to_tool(docs, GORILLA_TO_OPENAPI, ModelStyle.OPENAI_COMPLETIONS)
    for tool in tools:
        tool["function"].pop("response", None)
    return tools


def _methods(entry: Entry) -> dict[str, Any]:
    classes = [getattr(import_module(CLASS_FILE_PATH_MAPPING[name]), name) for name in entry["involved_classes"]]
    return {
        name: method
        for kind in classes
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }


def _strings(entry: Entry, calls: list[Call]) -> list[str]:
    """Calls as the released handlers write them for ``eval``.

    There a policy's text reaches ``eval`` as a name and as argument names, in a namespace that holds the checker. Here
    only methods of the entry's classes and identifiers do; any other call becomes one that is not defined, which is the
    error that an unknown function gives.
    """
    methods = _methods(entry)
    good = [{"_undefined": {}} if _fault(methods, call) else {call["name"]: call["arguments"]} for call in calls]
    return convert_to_function_call(good)


def _fault(methods: dict[str, Any], call: Call) -> str | None:
    """Why a call may not reach ``eval``; of an unknown function in the words that ``eval`` would use."""
    if call["name"] not in methods:
        return f"name {call['name'][:80]!r} is not defined"
    wrong = next((name for name in call["arguments"] if not name.isidentifier()), None)
    return None if wrong is None else f"{wrong[:80]!r} cannot be the name of an argument"


def _run(entry: Entry, strings: list[str]) -> tuple[list[str], dict[str, Any]]:
    long_context = "long_context" in entry["category"]
    return execute_multi_turn_func_call(
        strings, entry["initial_config"], entry["involved_classes"], "policy", entry["id"], long_context=long_context
    )


def _prepare(entry: Entry) -> None:
    """Memory reads what earlier conversations left from a file: put ``entry["memory"]`` there."""
    if "scenario" not in entry:
        return
    folder = Path(tempfile.mkdtemp(prefix="memory-"))
    [kind] = entry["involved_classes"]
    settings = {"model_result_dir": folder, "scenario": entry["scenario"], "test_id": entry["id"]}
    settings["test_category"] = extract_test_category_from_id(entry["id"])
    entry["initial_config"] = {kind: settings}
    if entry["memory"] is not None:
        place = folder / get_directory_structure_by_id(entry["id"]) / "memory_snapshot"
        place.mkdir(parents=True)
        (place / f"{entry['scenario']}_final.json").write_text(json.dumps(entry["memory"]), encoding="utf-8")
