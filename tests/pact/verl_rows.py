"""Groups as the rows of a verl batch, with the values that verl would have computed for them."""

import math

from pact.integrations.verl import COLUMNS, TRACE_CONTEXT, expert_row, rollout_rows


def all_rows(groups, config, progress):
    """(row, its rollout or None) of every group, expert rows between rollouts as verl mixes them."""
    made = []
    for group in groups:
        expert = expert_row(group, config, progress)
        if expert is not None:
            made.append((expert, None))
        rows = rollout_rows(group, config, draw=0.5)
        per_rollout = len(rows) // max(len(group.rollouts), 1)
        made += [(row, group.rollouts[i // per_rollout]) for i, row in enumerate(rows)]
    return made


def columns_of(rows):
    """{column: one list of values a row}; an expert row holds what nobody may read."""
    made = {name: [row.columns[name] for row, _ in rows] for name in COLUMNS}
    made["response_mask"] = [row.mask for row, _ in rows]
    made["advantages"] = [[7.0] * len(row.mask) if rollout is None else rollout.advantage for row, rollout in rows]
    for name, field in (("old_log_probs", "old_logp"), ("ref_log_prob", "ref_logp")):
        if all(rollout is None or getattr(rollout, field) for _, rollout in rows):
            made[name] = [_log_probs(row, rollout, field) for row, rollout in rows]
    return made


def _log_probs(row, rollout, field):
    if rollout is None:
        return [math.inf] * len(row.response_ids)
    return getattr(rollout, field)["trace" if row.columns[TRACE_CONTEXT][0] else "prompt"]
