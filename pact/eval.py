"""One evaluation from settings to tables: ``pact eval``, ``python -m pact.eval``. It plays episodes and trains nothing.

<output>/  settings.json  episodes.jsonl (one line an item)  summary.json  summary.md
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from logging import INFO, basicConfig, getLogger
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from pact import __version__
from pact.arguments import SettingsParser, as_arguments, as_dict, nearest, read_settings, split_dotted
from pact.engines.replay import ReplayEngine, read_scripts
from pact.engines.transformers import TransformersEngine
from pact.envs import Environment, Task, make
from pact.evaluate import (
    EpisodeRecord,
    Play,
    counted,
    differences,
    evaluate_in_batches,
    markdown,
    record_line,
    tabulate,
)
from pact.modeling import check_vocabulary
from pact.reporting import exit_code
from pact.rollout import CallRules, Generator, RolloutLimits, Sampling
from pact.trace import prepare_tokenizer

logger = getLogger("pact.eval")

USAGE = """pact eval [CONFIG.yaml] --env NAME --model FOLDER --output FOLDER [--SETTING VALUE ...]
       pact eval --compare FOLDER FOLDER"""
SETTINGS_FILE, EPISODES_FILE = "settings.json", "episodes.jsonl"
SUMMARY_FILE, TABLE_FILE = "summary.json", "summary.md"
REPLAY = "replay:"
# What may differ when an evaluation is taken up again: where and how fast, not what.
_FREE = ("output", "batch_size", "device", "export_bfcl", "workers")
_MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".jsonl")  # the last: of scripts that are replayed


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class EvalArguments:
    """The settings of one evaluation. Limits left out are the environment's own, as its benchmark has them."""

    env: str | None = _help("environment: ftrl, toolhop, bfcl, toybox", None)
    model: str | None = _help(
        f"folder or hub name of a causal LM, or {REPLAY}FILE.jsonl: given messages or calls", None
    )
    output: str | None = _help("folder of the results; the same command continues there", None)
    data: str | None = _help("file of the items, or a dataset's folder or hub id (the option path)", None)
    env_options: dict | str | None = field(
        default=None,
        metadata={"help": "further options of the environment, JSON; one of them: --env_options.NAME VALUE"},
    )
    split: str = _help("split of the items", "test")
    limit: int | None = _help("items at most, taken from the groups in turn, each from its top (default: all)", None)
    batch_size: int = _help("episodes played together; results are written after each batch", 16)
    temperature: float = _help("0 is greedy", 0.0)
    top_p: float = _help("nucleus of sampled episodes", 1.0)
    seed: int = _help("of sampled episodes and of the bootstrap", 0)
    max_turns: int | None = _help("assistant turns an episode", None)
    max_user_turn_steps: int | None = _help("assistant turns after one user message", None)
    max_turn_tokens: int | None = _help("sampled tokens a turn", None)
    max_response_tokens: int | None = _help("tokens after the prompt, observations included", None)
    context_length: int | None = _help("tokens of a whole episode (default: the model's)", None)
    call_format: Literal["hermes", "json"] = _help("how calls are written", "hermes")
    malformed_calls: Literal["observe", "skip"] = _help("answer a bad call with an error, or drop it", "observe")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _help("of the weights; auto: as stored", "auto")
    device: str | None = _help("default: cuda where there is one, else cpu", None)
    export_bfcl: str | None = _help("folder for the results in BFCL's own layout", None)

    def __post_init__(self) -> None:
        self.env_options = as_dict("env_options", self.env_options)
        for name, what in (("env", "--env NAME"), ("model", "--model FOLDER"), ("output", "--output FOLDER")):
            if not getattr(self, name):
                raise ValueError(f"no {name}: give {what} (pact eval --help lists all settings)")
        for name in ("batch_size", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, set it to at least 1")
        if self.export_bfcl and self.env != "bfcl":
            raise ValueError(f"export_bfcl writes results of the environment bfcl, not of {self.env}: leave it out")
        if self.env in ("ftrl", "toolhop") and not (self.data or dict(self.env_options).get("path")):
            raise ValueError(f"{self.env} needs its items: give --data FILE, or a dataset's folder or hub id")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, set it to 0 or above")
        self.sampling  # noqa: B018 (checks the values)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p)

    def limits(self, env: Environment) -> RolloutLimits:
        """The environment's own limits, each replaced by its setting where that is given."""
        own = dict(getattr(env, "eval_limits", {}))
        given = {item.name: getattr(self, item.name) for item in fields(RolloutLimits)}
        return RolloutLimits(**own | {name: value for name, value in given.items() if value is not None})


def parse(argv: Sequence[str]) -> EvalArguments:
    """``[CONFIG.yaml] [--setting value ...]``; flags win over the file. Raises ValueError for what cannot be."""
    rest = list(argv)
    config = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    parser = SettingsParser([EvalArguments], usage=USAGE)
    known = {item.name for item in fields(EvalArguments)}
    values = read_settings(config, known) if config else {}
    flags, options = split_dotted(rest)
    arguments = [text for key, value in values.items() for text in as_arguments(key, value)]
    namespace, unknown = parser.parse_known_args(arguments + flags)
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}{nearest(unknown[0].lstrip('-').replace('-', '_'), known)}")
    found = vars(namespace)
    found["env_options"] = as_dict("env_options", found["env_options"]) | options
    return EvalArguments(**found)


def choose(tasks: Sequence[Task], limit: int | None) -> list[Task]:
    """At most ``limit`` tasks in their order: one of each group in turn, from its top. Tasks that do not count because
    others have a group and they have none (what later ones are prepared by) all stay."""
    groups: dict[str | None, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.group, []).append(task)
    if limit is None:
        return list(tasks)
    kept = {task.id for task in groups.pop(None)} if None in groups and len(groups) > 1 else set()
    left = limit
    for depth in range(max(map(len, groups.values()), default=0)):
        row = [members[depth] for members in groups.values() if depth < len(members)][:left]
        kept |= {task.id for task in row}
        left -= len(row)
    return [task for task in tasks if task.id in kept]


class Results:
    """The folder of one evaluation: its settings, and a line an episode that is there.

    Opening it anew goes on where the last run stopped; a last line that was cut short is dropped. Raises ValueError for
    a folder of other settings, items or weights, and for one that is no evaluation's.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], tasks: Sequence[Task]) -> None:
        self.folder, self.episodes = folder, folder / EPISODES_FILE
        path = folder / SETTINGS_FILE
        if path.is_file():
            _check_same(json.loads(path.read_text(encoding="utf-8")), settings, folder)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} holds something else than an evaluation: choose another output")
        self.records = {record.id: record for record in read_episodes(self.episodes, mend=True)}
        if strangers := self.records.keys() - {task.id for task in tasks}:
            raise ValueError(
                f"{self.episodes} has an episode of {min(strangers)!r}, which is no item of this evaluation"
            )
        self._settings = settings

    def begin(self) -> None:
        """Make the folder and write down the settings; from here on no other process may write there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / SETTINGS_FILE).with_suffix(".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except OSError:
            raise ValueError(
                f"another evaluation is writing to {self.folder}: wait, or choose another output"
            ) from None
        _write(self.folder / SETTINGS_FILE, json.dumps(self._settings, indent=2) + "\n")

    def append(self, records: Sequence[EpisodeRecord]) -> None:
        """Keep finished episodes: on disk when this returns."""
        with self.episodes.open("a", encoding="utf-8") as file:
            file.write("".join(map(record_line, records)))
            file.flush()
            os.fsync(file.fileno())
        self.records |= {record.id: record for record in records}


def read_episodes(path: Path, *, mend: bool = False) -> list[EpisodeRecord]:
    """The records of an episodes.jsonl; none where there is no file. A last line without its end was cut short by a
    stop: it is left out, and ``mend`` takes it off the file. Raises ValueError for any other line that is no record."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if mend and whole < len(data):
        os.truncate(path, whole)
    records = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            records.append(EpisodeRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no episode ({error}): take that line out") from None
    return records


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    different = [key for key in now if before.get(key) != json.loads(json.dumps(now[key]))]
    if different:
        changes = ", ".join(f"{key} {_short(before.get(key))} and now {_short(now[key])}" for key in different)
        raise ValueError(f"{folder} was begun with other settings: {changes}; set them back or choose another output")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def settings_of(args: EvalArguments, limits: RolloutLimits, tasks: Sequence[Task]) -> dict[str, Any]:
    """What makes two evaluations the same one: settings, limits in force, items, and the model's files."""
    values = {key: value for key, value in asdict(args).items() if key not in _FREE}
    values["env_options"] = {key: value for key, value in values["env_options"].items() if key not in _FREE}
    for key in ("model", "data"):
        if values[key] and Path(values[key]).exists():
            values[key] = str(Path(values[key]).resolve())
    items = hashlib.sha256()
    for task in tasks:
        data = asdict(task.data) if is_dataclass(task.data) and not isinstance(task.data, type) else None
        seen = [task.id, task.group, task.messages, task.tools, task.answer]
        items.update(json.dumps([*seen, data], sort_keys=True, default=_plain).encode())
    model = hashlib.sha256()
    source = Path(str(args.model).removeprefix(REPLAY))
    for path in sorted(source.iterdir()) if source.is_dir() else [source] * source.is_file():
        if path.suffix in _MODEL_SUFFIXES:
            model.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    own = {"items": items.hexdigest()[:16], "n_items": len(tasks), "model_files": model.hexdigest()[:16]}
    return values | asdict(limits) | own | {"pact": __version__}


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else type(value).__name__


def load_agent(
    args: EvalArguments, tasks: Sequence[Task]
) -> tuple[Generator, PreTrainedTokenizerBase, Callable[[Sequence[Task]], None]]:
    """Engine, tokenizer, and what the engine must be told of each batch before it is played.

    Raises ValueError for a model that is not there, scripts of other tasks, and a tokenizer that does not fit.
    """
    source = str(args.model)
    if source.startswith(REPLAY):
        from pact.envs.toybox_text import build_tokenizer  # byte-level: it takes any text

        tokenizer = build_tokenizer()
        engine = ReplayEngine(tokenizer, max_batch=args.batch_size)
        scripts = read_scripts(Path(source.removeprefix(REPLAY)))
        silent = sum(task.id not in scripts for task in tasks)
        if silent == len(tasks):
            ids = f"its ids are like {next(iter(scripts))!r}, those of the items like {tasks[0].id!r}"
            raise ValueError(f"{source} has no script for any item: {ids}")
        if silent:
            logger.warning(f"{silent} of {len(tasks)} items have no script: there the replaying agent answers nothing")

        def teach(batch: Sequence[Task]) -> None:
            for task in batch:
                engine.learn(task, scripts.get(task.id, []))

        return engine, tokenizer, teach
    if not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise ValueError(f"no model folder {source}: give a folder saved by save_pretrained, or a hub name")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(source))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=args.dtype)
    check_vocabulary(model, tokenizer)
    cast(torch.nn.Module, model).to(device)
    return TransformersEngine(model, max_batch=args.batch_size), tokenizer, lambda batch: None


def run(argv: Sequence[str]) -> None:
    """Everything ``pact eval`` does. Raises ValueError or RuntimeError for what the user can mend."""
    if "--compare" in argv:
        print(compare(*_two_folders(argv)))
        return
    logging.disable_progress_bar()
    basicConfig(format="%(message)s")
    getLogger("pact").setLevel(INFO)
    args = parse(argv)
    options = ({"path": args.data} if args.data else {}) | as_dict("env_options", args.env_options)
    env = make(str(args.env), **options)
    try:
        tasks = choose(env.tasks(args.split), args.limit)
        limits = args.limits(env)
        results = Results(Path(str(args.output)), settings_of(args, limits, tasks), tasks)
        play_all(args, env, tasks, limits, results)
        records = [results.records[task.id] for task in tasks]
        print(report(args, records, getattr(env, "averages", {}), results.folder))
        if args.export_bfcl:
            from pact.envs.bfcl_export import export_results

            pairs = [(record.id, record.artifact) for record in records]
            export_results(pairs, Path(args.export_bfcl), _model_name(str(args.model)))
    finally:
        if hasattr(env, "close"):
            env.close()


def play_all(
    args: EvalArguments, env: Environment, tasks: Sequence[Task], limits: RolloutLimits, results: Results
) -> None:
    """Play what is missing, batch by batch, with a bar that shows the running mean of the reward."""
    if not tasks:
        raise ValueError(f"the split {args.split} has no items: there is nothing to evaluate")
    missing = [task for task in tasks if task.id not in results.records]
    if not missing:
        logger.info(f"all {len(tasks)} episodes are in {results.episodes}")
        return
    engine, tokenizer, prepare = load_agent(args, tasks)
    results.begin()
    rules = CallRules(form=args.call_format, malformed=args.malformed_calls)
    play = Play(limits, args.sampling, rules, args.batch_size, args.seed)
    done = dict(results.records)
    scored = {task.id for task in tasks if task.group is not None} or {task.id for task in tasks}
    with tqdm(total=len(tasks), initial=len(done), unit="item", desc=str(args.env)) as bar:
        for records in evaluate_in_batches(engine, env, tokenizer, tasks, play, done=done, prepare=prepare):
            results.append(records)
            rewards = [record.reward for id, record in results.records.items() if id in scored]
            if rewards:
                bar.set_postfix(reward=f"{sum(rewards) / len(rewards):.4f}", refresh=False)
            bar.update(len(records))


def report(
    args: EvalArguments, records: Sequence[EpisodeRecord], averages: Mapping[str, Sequence[str]], folder: Path
) -> str:
    """Write summary.json and summary.md and return the latter."""
    table, scored = tabulate(records, averages, seed=args.seed), counted(records)
    stops: dict[str, int] = {}
    for record in scored:
        stops[record.stop_reason] = stops.get(record.stop_reason, 0) + 1
    counts = {
        "items": len(scored),
        "not_counted": len(records) - len(scored),
        "overlong_prompts": sum(record.overlong for record in scored),
        "stop_reasons": dict(sorted(stops.items())),
        "mean_turns": sum(record.turns for record in scored) / len(scored),
        "mean_prompt_tokens": sum(record.prompt_tokens for record in scored) / len(scored),
        "mean_response_tokens": sum(record.response_tokens for record in scored) / len(scored),
    }
    head = {"pact": __version__, "env": args.env, "model": args.model, "split": args.split, "limit": args.limit}
    rows = {row: {name: asdict(estimate) for name, estimate in metrics.items()} for row, metrics in table.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / SUMMARY_FILE, json.dumps(head | counts | {"rows": rows}, indent=2) + "\n")
    ends = ", ".join(f"{reason} {count}" for reason, count in counts["stop_reasons"].items())  # type: ignore[attr-defined]
    text = (
        f"# {args.env}, {args.split}: {args.model}\n\n{markdown(table)}\nMean and 95% bootstrap interval over items. "
    )
    text += f"Episodes ended by: {ends}. Prompts over the context, scored as failures: {counts['overlong_prompts']}.\n"
    if counts["not_counted"]:
        text += f"Played but not counted (they prepare later items): {counts['not_counted']}.\n"
    _write(folder / TABLE_FILE, text)
    return text


def compare(before: Path, after: Path) -> str:
    """Paired differences, after minus before, of two finished evaluations of the same items, as Markdown.

    Raises ValueError when a folder is no evaluation's or the items differ.
    """
    settings = []
    for folder in (before, after):
        if not (folder / SETTINGS_FILE).is_file():
            raise ValueError(f"{folder} is not the output of an evaluation: there is no {SETTINGS_FILE}")
        settings.append(json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")))
    both = [read_episodes(folder / EPISODES_FILE) for folder in (before, after)]
    for folder, values, records in zip((before, after), settings, both):
        if len(records) != values.get("n_items"):
            there = f"{len(records)} of {values.get('n_items', 'an unknown number of')} episodes"
            raise ValueError(f"{folder} has {there}: finish it with the command it was begun with")
    if settings[0].get("items") != settings[1].get("items"):
        raise ValueError(
            f"{before} and {after} were evaluated on different items: compare runs on the same data and limit"
        )
    table = tabulate(differences(*both))
    different = [
        f"{key} {_short(settings[0].get(key))} and {_short(value)}"
        for key, value in settings[1].items()
        if settings[0].get(key) != value and (key != "model_files" or settings[0].get("model") == settings[1]["model"])
    ]
    return (
        f"# {after} minus {before}\n\n{markdown(table)}\nMean difference and 95% bootstrap interval over paired items. "
        f"Settings that differ: {'; '.join(different) or 'none'}.\n"
    )


def _two_folders(argv: Sequence[str]) -> tuple[Path, Path]:
    if len(argv) != 3 or argv[0] != "--compare":
        raise ValueError(
            "--compare takes the output folders of two evaluations and nothing else: --compare BEFORE AFTER"
        )
    return Path(argv[1]), Path(argv[2])


def _model_name(source: str) -> str:
    """A name fit for a folder."""
    return Path(source.removeprefix(REPLAY)).resolve().name.removesuffix(".jsonl")


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")  # never half a file under the final name
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """`run`, with the exit codes and one-line errors of ``pact.reporting.exit_code``."""
    arguments = sys.argv[1:] if argv is None else argv
    return exit_code(lambda: run(arguments), "the same command continues after the last finished batch")


if __name__ == "__main__":
    sys.exit(main())
