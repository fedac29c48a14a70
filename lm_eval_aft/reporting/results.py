"""Reading lm-eval result folders, and pairing two runs document by document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.reporting.stats import PairedComparison, compare_binary

Sample = dict[str, Any]
# What must be equal for two runs to have answered the same questions.
_SAME = ("doc_hash", "target_hash", "arguments")


@dataclass(frozen=True)
class ResultRun:
    """One run in a result folder.

    Attributes:
        name: how the run is called in tables.
        results: the ``results_*.json`` file, decoded.
        samples: task -> (filter, doc_id) -> logged sample.
    """

    name: str
    results: dict[str, Any]
    samples: dict[str, dict[tuple[str, int], Sample]]


@dataclass(frozen=True)
class TaskComparison:
    """A run against the baseline on one task, filter and metric."""

    run: str
    task: str
    metric: str
    paired: PairedComparison


def read_run(folder: str | Path, name: str | None = None) -> ResultRun:
    """Read the newest run that lm-eval wrote below ``folder`` with ``--log_samples``.

    Raises:
        AFTError: no results, no samples, or a damaged line (its number is named).
    """
    root = Path(folder)
    found = sorted(root.rglob("results_*.json"), key=lambda path: path.name)
    if not found:
        raise AFTError(f"No lm-eval results below {root}.", "Give the folder named by --output_path.")
    newest = found[-1]
    stamp = newest.stem.removeprefix("results_")
    results = _decode(newest.read_text(encoding="utf-8"), str(newest))
    samples = {}
    for path in sorted(newest.parent.glob(f"samples_*_{stamp}.jsonl")):
        match = re.fullmatch(rf"samples_(.+)_{re.escape(stamp)}", path.stem)
        if match:
            samples[match[1]] = {(s["filter"], int(s["doc_id"])): s for s in _lines(path)}
    if not samples:
        raise AFTError(f"{newest} has no samples beside it.", "Run lm_eval with --log_samples.")
    return ResultRun(name or root.name, results, samples)


def compare_runs(baseline: ResultRun, others: list[ResultRun]) -> list[TaskComparison]:
    """Every run against the baseline, on each task's right-or-wrong metrics, per filter.

    Raises:
        AFTError: a run did not answer the baseline's questions (the first difference is named).
    """
    found = []
    for other in others:
        for task in other.samples:
            if task not in baseline.samples:
                raise AFTError(
                    f"{other.name} has task {task!r}, {baseline.name} has not.", "Score both on it."
                )
            before, after = baseline.samples[task], other.samples[task]
            _require_same(task, baseline.name, before, other.name, after)
            for filter_name in dict.fromkeys(key[0] for key in after):
                keys = sorted(key for key in after if key[0] == filter_name)
                for metric in after[keys[0]]["metrics"]:
                    pairs: list[tuple[Any, Any]] = [
                        (before[key].get(metric), after[key].get(metric)) for key in keys
                    ]
                    if all(a in (0, 1) and b in (0, 1) for a, b in pairs):
                        label = metric if filter_name == "none" else f"{metric},{filter_name}"
                        paired = compare_binary([float(a) for a, _ in pairs], [float(b) for _, b in pairs])
                        found.append(TaskComparison(other.name, task, label, paired))
    return found


def _require_same(
    task: str,
    first: str,
    before: dict[tuple[str, int], Sample],
    second: str,
    after: dict[tuple[str, int], Sample],
) -> None:
    if set(before) != set(after):
        raise AFTError(
            f"On {task}, {first} answered {len(before)} documents and {second} {len(after)} others.",
            "Run both with the same limit and samples.",
        )
    for key in before:
        for name in _SAME:
            if before[key].get(name) != after[key].get(name):
                raise AFTError(
                    f"On {task}, {first} and {second} differ in {name} at document {key[1]}: "
                    "they were not asked the same.",
                    "Run both with the same task version, prompts and number of examples.",
                )


def _lines(path: Path) -> Iterator[Sample]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            yield _decode(line, f"{path}, line {number}")


def _decode(text: str, where: str) -> Sample:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise AFTError(f"{where} is damaged: {error}.", "Run the evaluation again.") from error
    if not isinstance(value, dict):
        raise AFTError(f"{where} holds no object.", "Run the evaluation again.")
    return value
