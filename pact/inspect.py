"""`pact inspect`: tokens by component, weights and tree of tasks, in the terminal and as a page; reports of runs."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from logging import INFO, basicConfig, getLogger
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from pact.arguments import (
    EnvArguments,
    SettingsParser,
    as_arguments,
    as_dict,
    as_flags,
    nearest,
    parse_settings,
    split_dotted,
)
from pact.envs import Task, make
from pact.groups import PactConfig
from pact.report import write_report
from pact.reporting import exit_code
from pact.schedules import check_progress
from pact.trace import prepare_tokenizer
from pact.viewer import display, view_task
from pact.viewer_files import read_attempts, read_tasks
from pact.viewer_html import inspect_page
from pact.viewer_page import write_page
from pact.viewer_text import draw

USAGE = """pact inspect TRACE.jsonl --tokenizer FOLDER|toybox [--html FILE] [--SETTING VALUE ...]
       pact inspect --env NAME --task ID --tokenizer FOLDER|toybox [--html FILE] [--SETTING VALUE ...]
       pact inspect --run runs/NAME"""
TOYBOX = "toybox"
PLAIN_WIDTH = 120  # columns where the output is no terminal


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class InspectArguments:
    """What to look at and how. Settings of the objective (``--reasoning_anneal`` ...) say which weights are shown."""

    tokenizer: str | None = _help(f"folder of a tokenizer, or '{TOYBOX}'", None)
    task: list[str] = field(default_factory=list, metadata={"help": "ids of the tasks to show (default: the first)"})
    limit: int = _help("tasks shown where no ids are given", 1)
    rollouts: list[str] = field(
        default_factory=list, metadata={"help": "JSONL of rollouts: episodes.jsonl, eval_final.jsonl, ..."}
    )
    progress: float = _help("training progress the weights belong to, 0 to 1", 0.0)
    html: str | None = _help("write one self-contained page to this file instead of printing", None)
    no_color: bool = _help("plain text (also: NO_COLOR in the environment, and output that is no terminal)", False)
    config: str | None = _help("YAML of a training run: its settings of objective and environment", None)
    run: str | None = _help("folder of a run: write its report.html anew", None)
    env: str | None = _help("take the tasks from this environment instead of a file", None)
    data: str | None = _help("the environment's items", None)
    traces: str | None = _help("the environment's expert traces", None)
    env_options: dict | str | None = field(
        default=None, metadata={"help": "further options of the environment, JSON; one: --env_options.NAME VALUE"}
    )
    split: str = _help("split of the environment's tasks", "train")

    def __post_init__(self) -> None:
        check_progress(self.progress)
        self.env_options = as_dict("env_options", self.env_options)
        if self.limit < 1:
            raise ValueError(f"limit is {self.limit}, set it to at least 1")


@dataclass(frozen=True)
class Request:
    """The command line: the file of traces (None: an environment or a run), options, and the objective's settings."""

    trace: Path | None
    options: InspectArguments
    config: PactConfig


def parse(argv: Sequence[str]) -> Request:
    """``[TRACE.jsonl] [--setting value ...]``; flags win over the YAML file. Raises ValueError for what cannot be."""
    rest = list(argv)
    trace = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    parser = SettingsParser([InspectArguments, as_flags(PactConfig)], usage=USAGE)
    known = {item.name for kind in parser.dataclass_types for item in fields(kind)}
    flags, options = split_dotted(rest)
    first, _ = parser.parse_known_args(flags)
    values = _of_training(Path(first.config), known, trace is None) if first.config else {}
    arguments = [text for key, value in values.items() for text in as_arguments(key, value)]
    namespace, unknown = parser.parse_known_args(arguments + flags)
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}{nearest(unknown[0].lstrip('-').replace('-', '_'), known)}")
    found = vars(namespace)
    found["env_options"] = as_dict("env_options", found["env_options"]) | options
    own = InspectArguments(**{item.name: found[item.name] for item in fields(InspectArguments)})
    config = PactConfig(**{item.name: found[item.name] for item in fields(PactConfig)})
    if sum(source is not None for source in (trace, own.env, own.run)) != 1:
        raise ValueError("give one thing to look at: a file TRACE.jsonl, --env NAME, or --run runs/NAME")
    if own.run is None and own.tokenizer is None:
        raise ValueError(f"no tokenizer: give --tokenizer FOLDER, or --tokenizer {TOYBOX}")
    read = [path for path in (trace, own.data, own.traces, *own.rollouts) if path is not None]
    if own.html is not None and Path(own.html).resolve() in [Path(path).resolve() for path in read]:
        raise ValueError(f"--html {own.html} is the file that is read: give the page another name")
    return Request(trace, own, config)


def _of_training(path: Path, known: set[str], with_env: bool) -> dict[str, Any]:
    """The settings of a training run that mean something here."""
    wanted = {item.name for item in fields(PactConfig)} | {item.name for item in fields(EnvArguments) if with_env}
    return {key: value for key, value in parse_settings([], path).values.items() if key in wanted & known}


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """A prepared tokenizer. Raises ValueError for a folder that is not there, and as ``prepare_tokenizer``."""
    if source == TOYBOX:
        from pact.envs.toybox_text import build_tokenizer

        return build_tokenizer()
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise ValueError(f"no tokenizer folder {source}: give a folder saved by save_pretrained, or a hub name")
    return prepare_tokenizer(AutoTokenizer.from_pretrained(source))


def load_tasks(request: Request) -> list[Task]:
    """The tasks asked for, in their order. Raises ValueError for an id that is not there."""
    options = request.options
    if request.trace is not None:
        tasks: Sequence[Task] = read_tasks(request.trace)
        source = str(request.trace)
    else:
        env = EnvArguments(str(options.env), options.data, options.traces, options.env_options)
        tasks = make(env.env, **env.options()).tasks(options.split)
        source = f"split {options.split} of {env.env}"
    if not options.task:
        return list(tasks[: options.limit])
    by_id = {task.id: task for task in tasks}
    if missing := [name for name in options.task if name not in by_id]:
        raise ValueError(f"{source} has no task {missing[0]!r}{nearest(missing[0], set(by_id))}")
    return [by_id[name] for name in options.task]


def run(argv: Sequence[str]) -> None:
    """Everything ``pact inspect`` does. Raises ValueError for what the user can mend."""
    logging.disable_progress_bar()
    basicConfig(format="%(message)s")
    getLogger("pact").setLevel(INFO)
    request = parse(argv)
    options = request.options
    if options.run is not None:
        print(f"report: {write_report(Path(options.run), tasks_of_run(Path(options.run)))}")
        return
    tokenizer = load_tokenizer(str(options.tokenizer))
    attempts = read_attempts([Path(path) for path in options.rollouts])
    tasks = load_tasks(request)
    if options.rollouts and not any(task.id in attempts for task in tasks):
        ids = f"their ids are like {next(iter(attempts))!r}, those of the tasks like {tasks[0].id!r}"
        raise ValueError(f"no rollout belongs to a task shown: {ids}; choose tasks with --task")
    seen = request.config.context_observations
    views = [view_task(task, tokenizer, attempts.get(task.id, []), observations=seen) for task in tasks]
    displays = [display(view, tokenizer, request.config, options.progress) for view in views]
    if options.html is not None:
        path = write_page(Path(options.html), inspect_page(displays, request.config, options.progress))
        print(f"page: {path}")
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of another encoding shows what it can
    terminal = sys.stdout.isatty()
    colour = terminal and not options.no_color and not os.environ.get("NO_COLOR")
    width = shutil.get_terminal_size().columns if terminal else PLAIN_WIDTH
    try:
        for number, shown in enumerate(displays):
            print(end="\n" if number else "")
            for line in draw(shown, progress=options.progress, colour=colour, width=width):
                print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough (head, less)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tasks_of_run(folder: Path) -> Sequence[Task]:
    """The tasks a run was evaluated on. Raises ValueError for a folder that is no run's."""
    config = folder / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} is no run: it has no config.yaml; give --run runs/NAME")
    settings = parse_settings([], config)
    count = settings.training.eval_tasks
    return make(settings.env.env, **settings.env.options()).tasks(settings.env.eval_split)[:count] if count else []


def main(argv: Sequence[str] | None = None) -> int:
    """`run`, with the exit codes and one-line errors of ``pact.reporting.exit_code``."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: run(arguments), "nothing is lost: start it again")


if __name__ == "__main__":
    sys.exit(main())
