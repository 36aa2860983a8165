"""Views drawn in a terminal. Reads no files and counts no tokens."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from pact.trace import Component, TokenizedTrace
from pact.viewer import Display, Node, Run, parts_of
from pact.visible import visible

NAMES = {
    Component.PROMPT: "prompt",
    Component.REASONING: "reasoning",
    Component.TOOL_CALL: "tool call",
    Component.OBSERVATION: "observation",
    Component.ANSWER: "answer",
}
# Foreground and two backgrounds a component (xterm's 256 colours), taken in turn so that neighbours can be told apart.
_COLOURS = {
    Component.PROMPT: (252, 237, 239),
    Component.REASONING: (231, 24, 25),
    Component.TOOL_CALL: (231, 94, 130),
    Component.OBSERVATION: (231, 22, 28),
    Component.ANSWER: (231, 90, 96),
}
SUPERVISED = (Component.REASONING, Component.TOOL_CALL, Component.ANSWER)  # components that may have weight
NO_ROLLOUTS = "No rollouts were given (--rollouts FILE): prompt, trace-conditioned prompt and SFT sequence only."
_GUTTER = 24  # columns of what is said of a run before its text


def one_line(text: str, width: int = 120) -> str:
    """``text`` visible and on one line of at most ``width`` characters."""
    shown = visible(text).replace("\n", "⏎")
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def draw(shown: Display, *, progress: float, colour: bool, width: int) -> Iterator[str]:
    """The lines of one task: its sequences run by run, the trace's with their weights, then the tree.

    ``colour``: paint each token with ANSI colours; the words are the same without.
    """
    view = shown.view
    yield _bold(f"task {one_line(view.name)}", colour)
    yield _legend(colour)
    for section in shown.sections:
        yield ""
        yield _bold(f"{one_line(section.title)}: {counts(section.tokens)}", colour)
        if section.note:
            yield f"({section.note})"
        for run in section.runs:
            if section.tokens is view.trace and run.component in SUPERVISED:
                for part, weight in parts_of(run, shown.weight_N):
                    yield from _draw_run(part, weight, colour, width)
            else:
                yield from _draw_run(run, None, colour, width)
    if view.trace is not None:
        weight_N = shown.weight_N
        kept = (
            f"{int((weight_N > 0).sum()):,} of {len(weight_N):,} trace tokens have weight, {weight_N.sum():,.2f} in all"
        )
        yield ""
        yield f"at progress {progress:g}: {kept}"
    if shown.tree is not None:
        yield ""
        yield _bold(f"tree of the group: {len(shown.tree.names)} sequences", colour)
        if not view.rollouts:
            yield NO_ROLLOUTS
        yield from tree_lines(shown.tree.nodes)
        yield from (f"{what}: {saving}" for what, saving in shown.tree.savings.items())


def tree_lines(nodes: Sequence[Node]) -> Iterator[str]:
    """One line a node, indented by its depth in nodes."""
    depth: dict[int, int] = {-1: -1}
    for place, node in enumerate(nodes):
        depth[place] = depth[node.parent] + 1
        shared = f", shared by {node.below}" if node.below > 1 else ""
        yield f"{'  ' * depth[place]}└ {' = '.join(node.parts)}: {node.tokens:,} tokens{shared}"


def counts(tokens: TokenizedTrace) -> str:
    """Tokens in all and by component, in words."""
    found = Counter(tokens.component)
    parts = ", ".join(f"{NAMES[kind]} {found[kind]:,}" for kind in Component if found[kind])
    return f"{len(tokens.ids):,} tokens ({parts})" if parts else "no tokens"


def _legend(colour: bool) -> str:
    if not colour:
        return "components: " + ", ".join(NAMES.values())
    return "  ".join(f"{_paint(kind, 0)} {name} \x1b[0m" for kind, name in NAMES.items())


def _bold(text: str, colour: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if colour else text


def _paint(component: int, place: int) -> str:
    foreground, *backgrounds = _COLOURS[Component(component)]
    return f"\x1b[38;5;{foreground};48;5;{backgrounds[place % 2]}m"


def _draw_run(run: Run, weight: float | None, colour: bool, width: int) -> Iterator[str]:
    """What the run is in the gutter and its text beside it, wrapped; line feeds show as ⏎ and break the line."""
    room = max(20, width - _GUTTER)
    lines: list[list[tuple[int, str]]] = [[]]  # pieces (token, character) of each line
    used = 0
    for place, text in enumerate(run.texts):
        for character in visible(text):
            columns = _columns(character)
            if used + columns > room:
                lines.append([])
                used = 0
            lines[-1].append((place, "⏎" if character == "\n" else character))
            used += columns
            if character == "\n":
                lines.append([])
                used = 0
    if len(lines) > 1 and not lines[-1]:
        lines.pop()
    number = f" {run.segment + 1}/{run.segments}" if run.segments else ""
    note = f"{NAMES[run.component]}{number}" + ("" if weight is None else f" w {weight:.2f}")
    for line in lines:
        yield f"{note:<{_GUTTER}}{_paint_line(run.component, line) if colour else ''.join(text for _, text in line)}"
        note = ""


def _paint_line(component: int, line: list[tuple[int, str]]) -> str:
    painted, last = [], None
    for place, text in line:
        if place != last:
            painted.append(_paint(component, place))
            last = place
        painted.append(text)
    return "".join(painted) + "\x1b[0m"


def _columns(character: str) -> int:
    """Columns of one character in a terminal."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
