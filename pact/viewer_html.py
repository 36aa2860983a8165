"""The page of `pact inspect`: tokens by component, weights under a slider, the group's tree. It computes no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pact.groups import PactConfig
from pact.viewer import Display, GroupTree, Node, Run, Section
from pact.viewer_page import page
from pact.viewer_text import NAMES, NO_ROLLOUTS, SUPERVISED, counts, tree_lines

MOST_TOKENS = 5_000  # of one run that are told apart; what comes after is plain text behind a fold
WIDTH, ROW, LETTER = 1000, 30, 6.4  # drawing of a tree: its width, a row's height, about what a letter takes
_PART_COLOURS = {
    "prompt": "prompt",
    "end of prompt": "prompt",
    "trace in context": "tool_call",
    "expert trace": "reasoning",
}


def inspect_page(displays: Sequence[Display], config: PactConfig, progress: float) -> str:
    """The page of these tasks. The weights in it are those at ``progress``; its slider sets others."""
    names = [shown.view.name for shown in displays]
    return page(
        "inspect.html",
        "inspect.js",
        title=f"pact inspect: {names[0] if len(names) == 1 else f'{len(names)} tasks'}",
        components=[(kind.name.lower(), name) for kind, name in NAMES.items()],
        weighed=any(shown.view.trace is not None for shown in displays),
        progress=progress,
        tasks=[_task(number, shown, config) for number, shown in enumerate(displays)],
        data={
            "progress": progress,
            "reasoning_anneal": config.reasoning_anneal,
            "tool_call_weight": list(config.tool_call_weight),
            "answer_weight": config.answer_weight,
        },
    )


def _task(number: int, shown: Display, config: PactConfig) -> dict[str, Any]:
    return {
        "number": number,
        "name": shown.view.name,
        "sections": [_section(section, shown) for section in shown.sections],
        "tree": None if shown.tree is None else _tree(shown.tree, bool(shown.view.rollouts), config),
    }


def _section(section: Section, shown: Display) -> dict[str, Any]:
    trace = section.tokens is shown.view.trace
    return {
        "title": section.title,
        "counts": counts(section.tokens),
        "note": section.note,
        "trace": trace,
        "runs": [
            _run(run, shown.weight_N[run.start :] if trace and run.component in SUPERVISED else None)
            for run in section.runs
        ],
    }


def _run(run: Run, weight_n: NDArray[np.float64] | None) -> dict[str, Any]:
    """A run with the weight its first token has and how many have it: the others, behind them, have none.

    ``weight_n``: of the tokens from its first on; None: no token of it can have weight.
    """
    told_apart = list(zip(run.ids[:MOST_TOKENS], map(_token, run.texts[:MOST_TOKENS])))
    weight = None if weight_n is None else float(weight_n[0])
    kept = len(run.ids) if weight_n is None else int((weight_n[: len(run.ids)] == weight).sum())
    return {
        "component": run.component.name.lower(),
        "name": NAMES[run.component],
        "segment": run.segment,
        "segments": run.segments,
        "start": run.start,
        "before": run.before,
        "block": run.block,
        "count": len(run.ids),
        "weight": weight,
        "kept": kept,
        "tokens": told_apart,
        "rest": "".join(run.texts[MOST_TOKENS:]) if len(run.ids) > MOST_TOKENS else None,
    }


def _token(text: str) -> str:
    """Line feeds are shown and break the line; a token without text of its own is a dot."""
    return text.replace("\n", "⏎\n") or "·"


def _tree(tree: GroupTree, with_rollouts: bool, config: PactConfig) -> dict[str, Any]:
    takes = "both" if config.anchor_mode == "mixture" else f"one: prompt-only with probability {config.anchor_q:g}"
    boxes, rows = _boxes(tree.nodes)
    return {
        "told": f"Both branches of every rollout; with anchor_mode {config.anchor_mode} a prompt takes {takes}."
        if with_rollouts
        else NO_ROLLOUTS,
        "boxes": boxes,
        "width": WIDTH,
        "height": rows * ROW,
        "savings": tree.savings,
        "words": "\n".join(tree_lines(tree.nodes)),
    }


def _boxes(nodes: Sequence[Node]) -> tuple[list[dict[str, Any]], int]:
    """A box a node, from left to right by depth in tokens, each as high as the leaves below it; and the leaves."""
    children: list[list[int]] = [[] for _ in nodes]
    for place, node in enumerate(nodes):
        if node.parent >= 0:
            children[node.parent].append(place)
    top, bottom, leaves = [0] * len(nodes), [0] * len(nodes), 0
    for place in range(len(nodes)):  # depth-first: leaves come in order
        top[place] = leaves
        leaves += not children[place]
    for place in range(len(nodes) - 1, -1, -1):
        bottom[place] = bottom[children[place][-1]] if children[place] else top[place] + 1
    scale = WIDTH / max(node.depth + node.tokens for node in nodes)
    boxes = []
    for place, node in enumerate(nodes):
        name, width = " = ".join(node.parts), node.tokens * scale
        shared = f", shared by {node.below} sequences" if node.below > 1 else ""
        number = f"{node.tokens:,}"
        labels = [f"{name} · {number}", name, number]
        boxes.append(
            {
                "colour": _PART_COLOURS.get(node.parts[0], "observation"),
                "title": f"{name}: {number} tokens{shared}",
                "label": next((text for text in labels if len(text) * LETTER < width - 10), ""),
                "x": round(node.depth * scale, 2),
                "y": top[place] * ROW,
                "width": round(width, 2),
                "height": (bottom[place] - top[place]) * ROW,
            }
        )
    return boxes, leaves
