"""Results of a routed run, split by the vector that each document got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval_aft.reporting.pairing import Comparison
from lm_eval_aft.reporting.results import Run

# A document that the run's record does not name: another process routed it, or a cache answered.
UNKNOWN = "not recorded"


def route_rows(baseline: Run, comparisons: Sequence[tuple[Run, Comparison]]) -> list[dict[str, Any]]:
    """A row for each routed run, task and vector, on the task's primary metric.

    Returns:
        Rows ``{"run", "task", "metric", "filter", "route", "own", "n", "of", "baseline", "steered",
        "difference", "share"}``: ``route`` is a library name or ``none``; ``own`` whether that vector
        was trained on the task; ``n`` of the ``of`` documents went there; scores are means in the
        metric's own unit, ``share`` whether that is a share. A description, not a test.
    """
    found = []
    for run, each in comparisons:
        routing = run.routing
        if routing is None or not each.primary:
            continue
        before = baseline.tasks[each.task].samples[each.filter]
        after = run.tasks[each.task].samples[each.filter]
        groups: dict[str, list[int]] = {}
        routed = _routed(routing, each.task)
        for doc_id in each.doc_ids:
            groups.setdefault(routed.get(doc_id, UNKNOWN), []).append(doc_id)
        for name, ids in sorted(groups.items(), key=lambda group: -len(group[1])):
            old = [before[i].metrics[each.metric] for i in ids]
            new = [after[i].metrics[each.metric] for i in ids]
            vector = (routing.get("vectors") or {}).get(name) or {}
            found.append(
                {
                    "run": run.name,
                    "task": each.task,
                    "metric": each.metric,
                    "filter": each.filter,
                    "route": name,
                    "own": each.task in str(vector.get("task")).split(","),
                    "n": len(ids),
                    "of": len(each.doc_ids),
                    "baseline": sum(old) / len(ids),
                    "steered": sum(new) / len(ids),
                    "difference": (sum(new) - sum(old)) / len(ids),
                    "share": all(0 <= value <= 1 for value in (*old, *new)),
                }
            )
    return found


def _routed(routing: dict[str, Any], task: str) -> dict[int, str]:
    routes = (routing.get("routes") or {}).get(task) or {}
    return {int(doc_id): str(name) for name, ids in routes.items() for doc_id in ids}
