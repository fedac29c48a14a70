"""Rows with verdicts: what the statistics allow to be said of each comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_aft.reporting.pairing import Comparison
from lm_eval_aft.reporting.results import Run
from lm_eval_aft.reporting.stats import holm, mean_stderr, verdict, wilson_interval
from lm_eval_aft.reporting.vectors import HASH_DIGITS, VectorInfo

SELECTED = "not assessable: selected on these documents"
DIFFERENT = "not assessable: the runs differ"


@dataclass
class Row:
    """One comparison. Scores, differences and intervals are in the metric's own unit (shares: 0 to 1).

    Attributes:
        kind: ``steered``, ``placebo`` or ``answer-only``.
        family: whether the row counts in Holm's correction; ``p_adjusted`` and ``verdict`` are empty
            for rows outside (secondary metrics, placebos, answer-only runs).
        share: whether the metric is a share, shown in percent.
        wins, losses: documents that got better and worse.
        mde: minimum detectable effect at 80 % power.
    """

    run: str
    kind: str
    task: str
    metric: str
    filter: str
    primary: bool
    family: bool
    higher_is_better: bool
    share: bool
    n: int
    baseline: float
    baseline_stderr: float | None
    baseline_low: float | None
    baseline_high: float | None
    steered: float
    steered_stderr: float | None
    steered_low: float | None
    steered_high: float | None
    difference: float
    low: float | None
    high: float | None
    wins: int
    losses: int
    p_value: float
    p_adjusted: float | None
    verdict: str
    mde: float | None
    test: str
    interval: str
    clusters: str


def judge(
    baseline: Run,
    comparisons: Sequence[tuple[Run, Comparison]],
    vectors: dict[str, VectorInfo],
    mismatched: set[str] | frozenset[str] = frozenset(),
) -> list[Row]:
    """Rows with verdicts: Holm over primary metrics × vectors, and what cannot be assessed.

    A vector scored under two names with one outcome (the chosen seed among the finalists) is one
    comparison.
    """
    rows = []
    same: dict[tuple[Any, ...], list[Row]] = {}
    for run, each in comparisons:
        family = each.primary and run.kind == "steered"
        blocked = ""
        if _selected_on(vectors[run.name], baseline, each):
            blocked = SELECTED
        elif run.name in mismatched:
            blocked = DIFFERENT
        row = make_row(baseline, run, each, family and not blocked, blocked if family else "")
        rows.append(row)
        if row.family:
            outcome = (each.task, tuple(each.doc_ids), tuple(each.wins), tuple(each.losses), row.difference)
            same.setdefault(((run.vector or {}).get("sha256") or run.name, *outcome), []).append(row)
    adjusted = holm([twins[0].p_value for twins in same.values()])
    for twins, p in zip(same.values(), adjusted, strict=True):
        for row in twins:
            row.p_adjusted = p
            row.verdict = verdict(p, row.difference, row.higher_is_better)
            row.family = row is twins[0]
    return rows


def _selected_on(info: VectorInfo, baseline: Run, each: Comparison) -> bool:
    """Whether the vector was chosen on documents that this comparison reports."""
    if info.biased:
        return True
    known = set(info.selection_documents)
    samples = baseline.tasks[each.task].samples[each.filter]
    return bool(known) and any(samples[i].doc_hash[:HASH_DIGITS] in known for i in each.doc_ids)


def make_row(baseline: Run, run: Run, each: Comparison, family: bool, blocked: str) -> Row:
    """A comparison as a row: not yet adjusted, its verdict ``blocked`` or empty."""
    p = each.paired
    columns = []
    for side, mean in ((baseline, p.baseline), (run, p.steered)):
        samples = side.tasks[each.task].samples[each.filter]
        values = [samples[i].metrics[each.metric] for i in each.doc_ids]
        share = all(0 <= value <= 1 for value in values)
        bounds: tuple[float | None, float | None] = (None, None)
        if all(value in (0, 1) for value in values):
            bounds = wilson_interval(sum(values), p.n)
        elif (error := mean_stderr(values)) is not None:
            bounds = (mean - 1.96 * error, mean + 1.96 * error)
        columns.append((share, *bounds))
    (first, low_b, high_b), (second, low_s, high_s) = columns
    return Row(
        run.name, run.kind, each.task, each.metric, each.filter, each.primary, family, each.higher_is_better,
        first and second, p.n, p.baseline, p.baseline_stderr, low_b, high_b, p.steered, p.steered_stderr,
        low_s, high_s, p.difference, p.low, p.high, len(each.wins), len(each.losses), p.p_value, None,
        blocked, p.mde, p.test, p.interval, each.clusters,
    )  # fmt: skip
