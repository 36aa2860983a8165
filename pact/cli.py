"""The ``pact`` command: hands its arguments to the subcommand's own module."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from pact import __version__

COMMANDS = ("train", "plan", "eval", "inspect")
USAGE = """usage: pact COMMAND ...

  train    warm start, rollouts, PACT updates, evaluation (pact train --help lists all settings):
           pact train [CONFIG.yaml] [--resume [RUN]] [--SETTING VALUE ...]
  plan     what a run would take, before it: memory of each process, tokens, flops; no weights are loaded:
           pact plan [CONFIG.yaml] [--processes N] [--sample N] [--SETTING VALUE ...]
  eval     a benchmark played and scored, with tables (pact eval --help lists all settings):
           pact eval [CONFIG.yaml] --env NAME --model FOLDER --output FOLDER [--SETTING VALUE ...]
           pact eval --compare FOLDER FOLDER
  inspect  tokens of a trace by component, annealed weights, the tree of its group; a run's report:
           pact inspect TRACE.jsonl --tokenizer FOLDER [--rollouts FILE] [--progress S] [--html FILE]
           pact inspect --run runs/NAME

  --version, --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pact`` and return its exit code: 0 done, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "--help"
    if command in COMMANDS:
        try:
            module = import_module(f"pact.{command}")
        except ModuleNotFoundError as error:
            print(f"pact: error: {error}: pip install 'pact-kernels[train]'", file=sys.stderr)
            return 2
        return module.main(arguments)
    if command == "--version":
        print(f"pact {__version__}")
        return 0
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    print(f"pact: error: unknown command {command!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
