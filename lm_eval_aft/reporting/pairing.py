"""Joining two runs document by document, and refusing those that were not asked the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lm_eval_aft.errors import AFTError
from lm_eval_aft.reporting.comparison import PairedComparison, compare_paired
from lm_eval_aft.reporting.results import Run, TaskRun
from lm_eval_aft.reporting.samples import Sample, listed_metrics, mean_metrics
from lm_eval_aft.reporting.settings import differing

# Where a task reports several metrics, the verdict is on the first of these that it has.
PRIMARY_METRICS = ("acc_norm", "acc", "exact_match")
PRIMARY_FILTERS = ("strict-match", "none")


@dataclass
class Comparison:
    """One run against the baseline on one task, filter and metric.

    Attributes:
        primary: whether the verdict on the task hangs on this metric.
        doc_ids: documents compared; ``wins`` and ``losses`` are the ids that flipped, wins being
            *improvements* (a lower score where lower is better).
    """

    run: str
    task: str
    filter: str
    metric: str
    primary: bool
    higher_is_better: bool
    paired: PairedComparison
    doc_ids: list[int]
    wins: list[int]
    losses: list[int]
    clusters: str


def differences(baseline: Run, other: Run) -> list[str]:
    """Everything that keeps two runs from being compared, in words; empty when nothing does."""
    tasks = shared_tasks(baseline, other)
    found = differing(baseline, other, tasks)
    for task in tasks:
        found += _questions(task, baseline.tasks[task], other.tasks[task])
    return found


def require_comparable(baseline: Run, other: Run) -> None:
    """Raise `AFTError` naming every field in which the runs differ."""
    found = differences(baseline, other)
    if found:
        raise AFTError(
            f"{other.name} cannot be compared with {baseline.name}; they differ in: {'; '.join(found)}.",
            "Run both with the same settings, or compare anyway with --force (every output will say so).",
        )


def shared_tasks(baseline: Run, other: Run) -> list[str]:
    """Tasks both runs have.

    Raises:
        AFTError: the other run has a task that the baseline has not.
    """
    missing = [task for task in other.tasks if task not in baseline.tasks]
    if missing:
        raise AFTError(
            f"{other.name} has {', '.join(missing)}, {baseline.name} has not.",
            "Score the baseline on it too.",
        )
    return list(other.tasks)


def compare_runs(baseline: Run, other: Run) -> list[Comparison]:
    """Every per-document metric of every shared task, on the documents both runs have."""
    found = []
    for task in shared_tasks(baseline, other):
        before, after = baseline.tasks[task], other.tasks[task]
        chosen = primary_metric(before, after)
        for filter_name in (name for name in before.samples if name in after.samples):
            left, right = before.samples[filter_name], after.samples[filter_name]
            ids = sorted(left.keys() & right.keys())
            for metric in _metrics(left, right, ids):
                found.append(
                    _compare(
                        other.name, task, filter_name, metric, left, right, ids,
                        (filter_name, metric) == chosen, _higher_is_better(before, metric),
                    )
                )  # fmt: skip
    return sorted(found, key=lambda c: (c.task, not c.primary))


def primary_metric(*runs: TaskRun, whole: bool = True) -> tuple[str, str] | None:
    """(filter, metric) of a task's verdict: acc_norm, else acc, else exact match (strict first).

    Of the metrics that all documents of all the runs have; with ``whole`` false, that any has.
    """
    metrics: dict[tuple[str, str], None] = {}
    listed = list(mean_metrics(runs[0].config))
    for filter_name in runs[0].samples:
        rows = [sample.metrics.keys() for run in runs for sample in run.samples.get(filter_name, {}).values()]
        own = set.intersection(*map(set, rows)) if whole and rows else set().union(*rows)
        for metric in sorted(own, key=lambda m: (listed.index(m) if m in listed else len(listed), m)):
            metrics[filter_name, metric] = None

    def rank(pair: tuple[str, str]) -> tuple[int, int]:
        filter_name, metric = pair
        first = PRIMARY_METRICS.index(metric) if metric in PRIMARY_METRICS else len(PRIMARY_METRICS)
        second = PRIMARY_FILTERS.index(filter_name) if filter_name in PRIMARY_FILTERS else 9
        return first, second

    return min(metrics, key=rank, default=None)


def _higher_is_better(run: TaskRun, metric: str) -> bool:
    """As the results' own table says, else the task's list of metrics, else yes."""
    said = run.results.get("higher_is_better", {}).get(run.task, {}).get(metric)
    if said is None:
        said = listed_metrics(run.config).get(metric, {}).get("higher_is_better")
    return said is not False


def _compare(
    run: str,
    task: str,
    filter_name: str,
    metric: str,
    left: dict[int, Sample],
    right: dict[int, Sample],
    ids: list[int],
    primary: bool,
    up: bool,
) -> Comparison:
    before = [left[i].metrics[metric] for i in ids]
    after = [right[i].metrics[metric] for i in ids]
    clusters = [left[i].cluster for i in ids]
    paired = compare_paired(before, after, clusters)
    gained = [i for i, a, b in zip(ids, before, after, strict=True) if b > a]
    lost = [i for i, a, b in zip(ids, before, after, strict=True) if b < a]
    wins, losses = (gained, lost) if up else (lost, gained)
    return Comparison(
        run, task, filter_name, metric, primary, up, paired, ids, wins, losses,
        _cluster_note(clusters, paired),
    )  # fmt: skip


def _cluster_note(clusters: list[str | None], paired: PairedComparison) -> str:
    if paired.clusters is not None:
        return f"documents grouped by source_id: {paired.clusters} clusters are the units of the test"
    count = len(set(clusters))
    if None in clusters:
        return ""
    return f"{count} source_id value(s): too few or too uneven to be units; documents count as independent"


def _metrics(left: dict[int, Sample], right: dict[int, Sample], ids: list[int]) -> Iterator[str]:
    for metric in left[ids[0]].metrics if ids else ():
        if all(metric in left[i].metrics and metric in right[i].metrics for i in ids):
            yield metric


def _questions(task: str, before: TaskRun, after: TaskRun) -> Iterator[str]:
    """What was asked: documents, targets, prompts, options or generation settings."""
    if set(before.samples) != set(after.samples):
        yield f"filters of {task} ({', '.join(before.samples)} against {', '.join(after.samples)})"
    for filter_name in (name for name in before.samples if name in after.samples):
        left, right = before.samples[filter_name], after.samples[filter_name]
        shared = left.keys() & right.keys()
        if len(shared) < max(len(left), len(right)):
            yield f"documents of {task} ({len(left)} against {len(right)}, {len(shared)} in both)"
        counts: dict[str, list[int]] = {}
        for i in sorted(shared):
            a, b = left[i], right[i]
            # A differing document has a differing prompt, of course: name the cause alone.
            if a.doc_hash != b.doc_hash:
                counts.setdefault("document contents", []).append(i)
                continue
            if a.target_hash != b.target_hash:
                counts.setdefault("targets", []).append(i)
            if a.prompts != b.prompts:
                counts.setdefault("prompts", []).append(i)
            if a.options != b.options:
                counts.setdefault("gen_kwargs" if a.generates else "options", []).append(i)
        for what, ids in counts.items():
            yield f"{what} of {task} ({len(ids)} documents, first {ids[0]})"
        return  # other filters hold the same documents
