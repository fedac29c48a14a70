"""Each vector of a study scored on each of its tasks, kept beside the vectors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.evaluation import evaluate_pair
from lm_eval_aft.identity import contents_digest
from lm_eval_aft.library import Library
from lm_eval_aft.reporting import cells
from lm_eval_aft.reporting.report import compare
from lm_eval_aft.study import Study
from lm_eval_aft.train_set import FOLDER
from lm_eval_aft.vector import canonical_json, replacing

TABLE = "cross-scores"
_ASKED = "asked.json"


def cross_score(
    study: Study,
    library: Library,
    model: str,
    *,
    limit: int | None = None,
    model_args: dict[str, Any] | None = None,
    flags: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Score the baseline and the study's vectors on every task that they were trained on.

    Tasks that were scored before, with these vectors and settings, are not scored again. Writes
    ``cross-scores.json`` and ``.md`` into the library.

    Args:
        limit: documents per task, whatever the study says.
        flags: further flags of ``lm_eval run``.

    Returns:
        Rows ``{"vector", "task", "own", "metric", "filter", "n", "baseline", "steered",
        "difference", "low", "high", "p", "verdict", "share"}``, on each task's primary metric; the
        verdict's Holm family is the vectors on that task.

    Raises:
        AFTError: no vector of the study is in the library, or as `evaluate_pair`.
    """
    there = set(library.names())
    entries = [entry for entry in study.entries if entry.name in there]
    if not entries:
        raise AFTError("No vector of the study is in the library.", "Train them first.")
    names = [entry.name for entry in entries]
    digests = {name: _digest(library, name) for name in names}
    rows: list[dict[str, Any]] = []
    for task, entry in study.scored_tasks().items():
        wanted = limit or (entry.limit if entry else None) or study.limit
        own = [*flags, *(["--limit", str(wanted)] if wanted else [])]
        if entry:
            own += entry.plan().prompts.flags()
        if study.include_path:
            own += ["--include_path", study.include_path[0]]
        contents = contents_digest(model, model_args or {}, task, study.include_path)
        asked = {"model": model, "contents": contents, "vectors": digests}
        asked |= {"flags": own, "model_args": model_args or {}}
        folder = library.root / FOLDER / "scores" / task
        if not is_scored(folder, asked):
            say(f"{task}: scoring {len(names)} vectors and the baseline ...")
            score(folder, asked, model, names, task, library, model_args, own)
        trained_on = {each.name: each.plan().tasks for each in entries}
        report = compare(folder)
        by_run = {each["name"]: each["vector"] for each in report.runs}
        for row in report.rows:
            if row.primary and by_run.get(row.run) in trained_on:
                name = by_run[row.run]
                found = {"vector": name, "task": row.task, "own": row.task in trained_on[name]}
                for key in ("metric", "filter", "n", "baseline", "steered", "difference", "low", "high"):
                    found[key] = getattr(row, key)
                rows.append(found | {"p": row.p_adjusted, "verdict": row.verdict, "share": row.share})
    _write(library.root, rows)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the table: a line for the baseline and each vector, a column for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    at = {(row["vector"], row["task"]): row for row in rows}
    first = {row["task"]: row for row in reversed(rows)}
    heads = [
        f"{task} ({cells.metric_name(first[task]['metric'], first[task]['filter'])}, n = {first[task]['n']})"
        for task in tasks
    ]
    lines = [["baseline", *(cells.score(first[t]["baseline"], first[t]["share"]) for t in tasks)]]
    for name in dict.fromkeys(row["vector"] for row in rows):
        line = [name]
        for task in tasks:
            row = at.get((name, task))
            if row is None:
                line.append("–")
                continue
            mark = {"better": " ▲", "worse": " ▼"}.get(row["verdict"], "")
            value, change = (row[key] for key in ("steered", "difference"))
            text = f"{cells.score(value, row['share'])} ({cells.points(change, row['share'])})"
            line.append(f"{text}{mark}{' *' if row['own'] else ''}")
        lines.append(line)
    return ["vector", *heads], lines


NOTE = (
    "Score (difference from the baseline) on each task's evaluation split; * the task the vector was "
    "trained on; ▲ ▼ better or worse by a Holm-adjusted exact test over the vectors on that task."
)


def score(
    folder: Path,
    asked: dict[str, Any],
    model: str,
    names: Sequence[str],
    task: str,
    library: Library,
    model_args: dict[str, Any] | None,
    flags: Sequence[str],
    placebo: str = "none",
) -> None:
    """Score the baseline and vectors on a task, and note in the folder what was ``asked``.

    Into a folder of another name first: what has its place is whole.
    """
    begun = folder.with_name(f".{folder.name}.begun")
    for old in (begun, folder):
        shutil.rmtree(old, ignore_errors=True)
    begun.mkdir(parents=True)
    evaluate_pair(
        model,
        names,
        [task],
        begun,
        placebo=placebo,
        library=library.root,
        model_args=model_args,
        flags=flags,
    )
    (begun / _ASKED).write_text(canonical_json(asked), encoding="utf-8")
    begun.rename(folder)


def is_scored(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether the folder holds scores that were asked for in just this way."""
    try:
        found = json.loads((folder / _ASKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == json.loads(canonical_json(asked)))


def _digest(library: Library, name: str) -> str:
    from lm_eval_aft.vector import SteeringVector

    return SteeringVector.load(library.path(name)).digest()


def _write(root: Path, rows: Sequence[dict[str, Any]]) -> None:
    columns, lines = table(rows)
    text = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    text += [f"| {' | '.join(line)} |" for line in lines]
    with replacing(root / f"{TABLE}.md") as temporary:
        temporary.write_text("\n".join([*text, "", NOTE, ""]), encoding="utf-8")
    with replacing(root / f"{TABLE}.json") as temporary:
        temporary.write_text(json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
