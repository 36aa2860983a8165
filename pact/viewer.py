"""What `pact inspect` shows, as data: tokens with component, segment and weight, the tree of a group. Draws nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pact.envs.base import Message, Task
from pact.groups import PROMPT, TRACE, Denominators, Group, PactConfig, Rollout
from pact.messages import calls_of, check_messages
from pact.objective import CoTrainBatch, PactObjective
from pact.trace import (
    Component,
    TokenizedTrace,
    end_of_turn_id,
    render_context,
    render_observation,
    render_prompt,
    render_trace,
)
from pact_kernels.prefix_tree import PrefixTree
from pact_kernels.terms import SFT, TRACE_BRANCH

MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most four bytes, so at most as many tokens


@dataclass(frozen=True)
class Attempt:
    """A rollout to look at: a name, the messages after the prompt and the reward, where one is known."""

    name: str
    messages: list[Message]
    reward: float | None = None


@dataclass(frozen=True)
class RolloutView:
    """An attempt as tokens. ``exact``: False where a turn was cut or could not be read whole, so that its messages do
    not hold all that was sampled."""

    attempt: Attempt
    tokens: TokenizedTrace
    sampled: list[int]
    exact: bool


@dataclass(frozen=True)
class TaskView:
    """One task as tokens: prompt (head + suffix), context and trace of the expert (None: the task has none), rollouts.
    Head and suffix are empty where the file gives a trace without its prompt."""

    name: str
    head: list[int]
    suffix: list[int]
    context: list[int] | None
    trace: TokenizedTrace | None
    rollouts: list[RolloutView]

    def group(self, branch: str | None = None) -> Group:
        """What the objective is given for it. Advantages are 0: they change no token."""
        rollouts = [Rollout(r.tokens.ids, r.sampled, [0.0] * len(r.sampled)) for r in self.rollouts]
        return Group(self.head, self.suffix, self.context, self.trace, rollouts, branch)


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one component and, in reasoning, of one segment.

    All of them have one weight, but for ``reasoning_anneal="token"``, which may end within a run (`parts_of`).
    ``segment`` of ``segments`` in its block of reasoning; -1 of 0 elsewhere. ``start``: place of the first token.
    ``before``: tokens of its block of reasoning that stand before it, of ``block`` in all.
    """

    component: Component
    segment: int
    segments: int
    start: int
    ids: list[int]
    texts: list[str]
    before: int = 0
    block: int = 0

    @property
    def text(self) -> str:
        return "".join(self.texts)


@dataclass(frozen=True)
class Section:
    """One sequence of a task to look at: its title, its tokens, the same cut into runs, and a remark."""

    title: str
    tokens: TokenizedTrace
    runs: list[Run]
    note: str = ""


@dataclass(frozen=True)
class Display:
    """All that is shown of one task. ``weight_N``: of the trace's tokens; ``tree``: None where there is no prompt."""

    view: TaskView
    sections: list[Section]
    weight_N: NDArray[np.float64]
    tree: GroupTree | None


@dataclass(frozen=True)
class Node:
    """A stretch of the tree that the same sequences pass through.

    ``parts`` says what it is in them ("prompt", "rollout 1"), ``below`` how many sequences share it, ``parent`` is the
    place of its parent among the nodes (-1: a root).
    """

    depth: int
    tokens: int
    parts: tuple[str, ...]
    below: int
    parent: int


@dataclass(frozen=True)
class Saving:
    """Tokens of one forward: ``dense`` when every sequence is computed by itself, ``unique`` in one tree."""

    dense: int
    unique: int

    @property
    def saved(self) -> int:
        return self.dense - self.unique

    def __str__(self) -> str:
        ratio = f", {self.dense / self.unique:.2f} times fewer" if self.unique else ""
        return f"{self.unique:,} tokens instead of {self.dense:,}: {self.saved:,} saved{ratio}"


@dataclass(frozen=True)
class GroupTree:
    """The tree of a group: nodes in depth-first order, the sequences by name, and what sharing saves.

    ``savings``: by what is computed. With rollouts these are the trainer's own plans: "prompt-only" and
    "trace-conditioned" (``anchor_mode="sample"`` computes one of them) and "both" ("mixture"), each with the SFT
    sequence.
    """

    nodes: list[Node]
    names: list[str]
    savings: dict[str, Saving]


def display(view: TaskView, tokenizer: PreTrainedTokenizerBase, config: PactConfig, progress: float) -> Display:
    """Cut ``view`` into runs, with the weights of its trace at ``progress`` and its tree under ``config``."""

    def section(title: str, tokens: TokenizedTrace, note: str = "") -> Section:
        return Section(title, tokens, runs_of(tokens, tokenizer), note)

    prompt = [*view.head, *view.suffix]
    sections = [section("prompt", _unlabelled(prompt))] if prompt else []
    if view.trace is not None:
        sections.append(section("expert trace", view.trace))
    if view.context is not None:
        sections.append(
            section("trace as context", _unlabelled(view.context), "stands between question and end of prompt")
        )
    for number, rollout in enumerate(view.rollouts, start=1):
        reward = "" if rollout.attempt.reward is None else f", reward {rollout.attempt.reward:g}"
        note = (
            "" if rollout.exact else "a turn was cut or could not be read whole: what it says beyond this is not kept"
        )
        sections.append(section(f"rollout {number}: {rollout.attempt.name}{reward}", rollout.tokens, note))
    weight_N = np.zeros(0) if view.trace is None else supervised_weights(view.trace, config, progress)
    return Display(view, sections, weight_N, group_tree(view, config) if view.head else None)


def _unlabelled(ids: list[int]) -> TokenizedTrace:
    return TokenizedTrace(ids, [int(Component.PROMPT)] * len(ids), [-1] * len(ids))


def view_task(
    task: Task, tokenizer: PreTrainedTokenizerBase, attempts: Sequence[Attempt] = (), *, observations: bool = True
) -> TaskView:
    """Render ``task``, its trace and ``attempts`` as training does, the context with or without ``observations``.

    Raises ValueError, naming task or attempt, for messages that no template can render.
    """
    try:
        head, suffix = render_prompt(task.messages, task.tools, tokenizer) if task.messages else ([], [])
        context = None
        if task.expert is not None:
            context = render_context(task.expert, tokenizer, observations=observations)
        trace = render_trace(task.expert, task.tools, tokenizer) if task.expert is not None else None
    except ValueError as error:
        raise ValueError(f"task {task.id!r}: {error}") from None
    rollouts = []
    for attempt in attempts:
        try:
            rollouts.append(_view_rollout(attempt, tokenizer))
        except ValueError as error:
            raise ValueError(f"task {task.id!r}, rollout {attempt.name}: {error}") from None
    return TaskView(task.id, head, suffix, context, trace, rollouts)


def _view_rollout(attempt: Attempt, tokenizer: PreTrainedTokenizerBase) -> RolloutView:
    """An attempt turn by turn, as the rollout loop records it. A turn that was cut has no end-of-turn token."""
    ids: list[int] = []
    component: list[int] = []
    segment: list[int] = []
    sampled: list[int] = []
    exact = True
    replies: list[Message] = []
    for message in check_messages(attempt.messages, "rollout") if attempt.messages else []:
        if message["role"] != "assistant":
            replies.append(message)  # those after the last turn were never given to the policy
            exact = exact and message.get("name") != "error"
            continue
        if replies:
            seen = render_observation(replies, tokenizer)
            ids += seen
            component += [int(Component.OBSERVATION)] * len(seen)
            segment += [-1] * len(seen)
            sampled += [0] * len(seen)
            replies = []
        turn = _turn(message, tokenizer)
        ids += turn.ids
        component += turn.component
        segment += turn.segment
        sampled += [1] * len(turn.ids)
        exact = exact and not message.get("cut")
    return RolloutView(attempt, TokenizedTrace(ids, component, segment), sampled, exact)


def _turn(message: Message, tokenizer: PreTrainedTokenizerBase) -> TokenizedTrace:
    """One assistant message by itself, up to its end of turn."""
    stop = end_of_turn_id(tokenizer)
    calls = calls_of(message)
    if not calls and not (message.get("content") or message.get("reasoning_content") or "").strip():
        n = 0 if message.get("cut") else 1
        return TokenizedTrace([stop] * n, [int(Component.ANSWER)] * n, [-1] * n)
    results = [{"role": "tool", "name": call["name"], "content": "-"} for call in calls]
    whole = render_trace([{**message, "supervised": True}, *results], None, tokenizer)
    end = whole.ids.index(stop) + (0 if message.get("cut") else 1)
    return TokenizedTrace(whole.ids[:end], whole.component[:end], whole.segment[:end])


def runs_of(tokens: TokenizedTrace, tokenizer: PreTrainedTokenizerBase) -> list[Run]:
    """``tokens`` cut where component, segment or block of reasoning changes."""
    if not tokens.ids:
        return []
    component_N, segment_N = np.asarray(tokens.component), np.asarray(tokens.segment)
    cuts_N = (component_N[1:] != component_N[:-1]) | (segment_N[1:] != segment_N[:-1])
    bounds = [0, *(np.flatnonzero(cuts_N) + 1).tolist(), len(tokens.ids)]
    texts = token_texts(tokens.ids, tokenizer)
    runs = [
        Run(Component(component_N[a]), int(segment_N[a]), 0, a, list(tokens.ids[a:b]), texts[a:b])
        for a, b in pairwise(bounds)
    ]
    blocks: list[list[Run]] = []
    for run in runs:
        if blocks and run.segment > blocks[-1][-1].segment >= 0:
            blocks[-1].append(run)
        else:
            blocks.append([run])
    return [run for block in blocks for run in _with_block(block)]


def _with_block(runs: Sequence[Run]) -> Iterator[Run]:
    """The runs of one block of reasoning, or one run of anything else, with what the block holds."""
    first, segments = runs[0].start, runs[-1].segment + 1
    tokens = sum(len(run.ids) for run in runs) if segments else 0
    for run in runs:
        yield replace(run, segments=segments, before=run.start - first, block=tokens)


def parts_of(run: Run, weight_N: NDArray[np.float64]) -> Iterator[tuple[Run, float]]:
    """``run`` cut where the weight of its tokens changes, with those weights; ``weight_N``: of the whole trace."""
    weights = weight_N[run.start : run.start + len(run.ids)]
    bounds = [0, *(np.flatnonzero(weights[1:] != weights[:-1]) + 1).tolist(), len(run.ids)]
    for a, b in pairwise(bounds):
        part = replace(run, start=run.start + a, ids=run.ids[a:b], texts=run.texts[a:b], before=run.before + a)
        yield part, float(weights[a])


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text each token adds; of tokens that share a character the last one has it and the others have "".

    Each is decoded behind the tokens before it, as some vocabularies drop a blank at the start of what they decode.
    """
    known: dict[tuple[int, ...], str] = {}  # the same few tokens come again and again

    def decode(start: int, end: int) -> str:
        key = tuple(ids[start:end])
        if key not in known:
            known[key] = tokenizer.backend_tokenizer.decode(list(key), skip_special_tokens=False)
        return known[key]

    texts = [""] * len(ids)
    before = start = 0  # of the tokens decoded in front, and of those that have no text yet
    for place in range(len(ids)):
        whole = decode(before, place + 1)
        if whole.endswith("\ufffd") and place + 1 - start < MAX_CHARACTER_TOKENS and place + 1 < len(ids):
            continue
        texts[place] = whole[len(decode(before, start)) :]
        before, start = start, place + 1
    return texts


def supervised_weights(trace: TokenizedTrace, config: PactConfig, progress: float) -> NDArray[np.float64]:
    """The weights w_t(s) of DESIGN section 1, [n]: those of `PactObjective`, before ``sft_coef`` and Z_sft.

    Raises ValueError for progress outside [0, 1].
    """
    alone = replace(config, sft_coef=1.0, sft_schedule="constant", token_budget=None, context_length=None)
    group = Group([0], [], trace=trace)
    weight_N = np.zeros(len(trace.ids))
    for batch in PactObjective(alone).build([group], progress, denominators=Denominators(1.0, 1.0)):
        [path] = batch.plan.paths
        weight_N[path.at - 1] = batch.terms.weight.double().numpy()
    return weight_N


def group_tree(view: TaskView, config: PactConfig) -> GroupTree:
    """The tree of what training computes for ``view``: every rollout on both branches, and the SFT sequence.

    Without rollouts: of prompt, trace-conditioned prompt and SFT sequence. A sequence ends before the last token
    predicted in it, which nothing has to be computed for. Raises ValueError for a view without a prompt.
    """
    if not view.head:
        raise ValueError(f"task {view.name!r} has no prompt, so there is no tree: give the file its prompts")
    if any(any(rollout.sampled) for rollout in view.rollouts):
        both = replace(config, anchor_mode="mixture", anchor_q=0.5)
        savings = {
            "prompt-only": _saving(_plan(view.group(PROMPT), config)),
            **({"trace-conditioned": _saving(_plan(view.group(TRACE), config))} if view.context is not None else {}),
        }
        batch = _plan(view.group(), both)
        savings["both"] = _saving(batch)
        sequences = [path.ids for path in batch.plan.paths]
        acting = [i + 1 for i, rollout in enumerate(view.rollouts) if any(rollout.sampled)]
        parts, names = zip(*_computed(view, batch, acting))
    else:
        whole = view.trace.ids if view.trace is not None else []
        labelled = [("prompt-only", [("prompt", view.head), ("end of prompt", view.suffix)])]
        if view.context is not None:
            middle = [("prompt", view.head), ("trace in context", view.context), ("end of prompt", view.suffix)]
            labelled += [
                ("trace-conditioned", middle),
                ("SFT", [*labelled[0][1], ("expert trace", whole)]),
            ]
        sequences = [np.concatenate([np.asarray(ids, np.int64) for _, ids in of]) for _, of in labelled]
        parts = tuple([(label, len(ids)) for label, ids in of] for _, of in labelled)
        names = tuple(name for name, _ in labelled)
        unique = len(PrefixTree.from_sequences(sequences))
        savings = {"prompts and SFT": Saving(sum(map(len, sequences)), unique)}
    return GroupTree(_nodes(sequences, parts), list(names), savings)


def _plan(group: Group, config: PactConfig) -> CoTrainBatch:
    """The one forward in which ``group`` is computed, as the trainer lays it out."""
    free = replace(config, token_budget=None, context_length=None, kl_coef=0.0, ratio_reference="trace", one_pass=True)
    free = replace(free, sft_coef=1.0, sft_schedule="constant")
    [batch] = PactObjective(free).build([group], 0.0, denominators=Denominators(1.0, 1.0), monitor=True)
    return batch


def _saving(batch: CoTrainBatch) -> Saving:
    return Saving(batch.plan.dense_tokens, batch.plan.unique_tokens)


def _computed(
    view: TaskView, batch: CoTrainBatch, acting: Sequence[int]
) -> Iterator[tuple[list[tuple[str, int]], str]]:
    """Parts and name of each path of ``batch``; ``acting``: numbers of the rollouts that sampled something."""
    head, suffix = ("prompt", len(view.head)), ("end of prompt", len(view.suffix))
    context = ("trace in context", len(view.context or []))
    for place, path in enumerate(batch.plan.paths):
        trace = path.columns["branch"] == TRACE_BRANCH
        if path.columns["kind"] == SFT:
            own = name = "expert trace"
        else:
            own = f"rollout {acting[place % len(acting)]}"
            name = f"{own}, {'trace-conditioned' if trace else 'prompt-only'}"
        fixed = [head, context, suffix] if trace else [head, suffix]
        yield [*fixed, (own, len(path.ids) - sum(n for _, n in fixed))], name


def _nodes(sequences: Sequence[NDArray[np.int64]], parts: Sequence[list[tuple[str, int]]]) -> list[Node]:
    """Stretches of the prefix tree between its branchings and the ends of parts, in depth-first order."""
    tree = PrefixTree.from_sequences(sequences)
    begins = np.zeros(len(tree), bool)
    begins[tree.segments.start.numpy()] = True
    below = np.zeros(len(tree), np.int64)
    for index, of in zip(tree.index, parts):
        below[index.numpy()] += 1
        first = np.cumsum([0, *(n for _, n in of)])[:-1]
        begins[index.numpy()[first[first < len(index)]]] = True
        begins[int(index[-1]) + 1 : int(index[-1]) + 2] = True  # where this sequence has ended
    labels: dict[int, list[str]] = {}  # by the place of a stretch's first token
    for index, of in zip(tree.index, parts):
        ends = np.cumsum([n for _, n in of])
        for at in np.flatnonzero(begins[index.numpy()]):
            label, known = of[int(np.searchsorted(ends, at, side="right"))][0], labels.setdefault(int(index[at]), [])
            known += [label] * (label not in known)
    depth = tree.position_ids.numpy()
    nodes: list[Node] = []
    above: dict[int, int] = {}  # depth -> the node that ends right above it, on the path we are on
    for start, end in pairwise([*np.flatnonzero(begins).tolist(), len(tree)]):
        parent = above.get(int(depth[start]), -1)
        above[int(depth[end - 1]) + 1] = len(nodes)
        nodes.append(Node(int(depth[start]), end - start, tuple(labels[start]), int(below[start]), parent))
    return nodes
