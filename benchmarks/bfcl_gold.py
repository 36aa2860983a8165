"""Does the BFCL environment score as it must? Gold calls are valid on all multi-turn items, on none without the last.

python benchmarks/bfcl_gold.py      all 800 items both ways, a printed table, and results/bfcl_gold.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from measure import save

from pact.envs.base import Message, Score, Task
from pact.envs.bfcl import MULTI_TURN, VERSION, Bfcl


def play_gold(env: Bfcl, task: Task, drop_last: bool = False) -> Score:
    """The score of an episode that makes the gold calls, a step each user turn, but for the last one when dropped."""
    turns = env.gold(task)
    if drop_last:
        [*_, last] = (turn for turn in turns if turn)
        last.pop()
    episode = env.start(task)
    messages: list[Message] = []
    for calls in turns:
        if calls:
            entries = [{"type": "function", "function": call} for call in calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": entries})
            for call in calls:
                observation = episode.call(call["name"], call["arguments"])
                messages.append({"role": "tool", "name": call["name"], "content": observation})
        messages.append({"role": "assistant", "content": "Done."})
        messages += episode.user_turn() or []
    return episode.score(messages)


def measure(env: Bfcl, tasks: Sequence[Task], workers: int) -> list[dict[str, Any]]:
    """For each category: items, and how many are valid with the gold calls and without the last one."""
    cells = []
    for category in env.categories:
        chosen = [task for task in tasks if task.group == category]
        begin = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            valid, dropped = (
                sum(
                    score.metrics["valid"] == 1.0 for score in pool.map(partial(play_gold, env, drop_last=drop), chosen)
                )
                for drop in (False, True)
            )
        seconds = round(time.perf_counter() - begin, 1)
        cells.append({"category": category, "items": len(chosen), "gold": valid, "dropped": dropped, "s": seconds})
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    env = Bfcl(MULTI_TURN, workers=arguments.workers)
    try:
        cells = measure(env, env.tasks("test"), arguments.workers)
    finally:
        env.close()
    print(f"{'category':24} {'items':>6} {'gold valid':>11} {'last dropped':>13} {'seconds':>8}")
    for cell in cells:
        print(f"{cell['category']:24} {cell['items']:6} {cell['gold']:11} {cell['dropped']:13} {cell['s']:8.1f}")
    holds = all(cell["gold"] == cell["items"] and cell["dropped"] == 0 for cell in cells)
    print(f"written to {save('bfcl_gold', {'bfcl-eval': VERSION, 'cells': cells, 'holds': holds})}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
