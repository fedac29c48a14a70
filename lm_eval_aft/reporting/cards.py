"""Results of a report, added to the model card of the vector they speak of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.reporting import cells
from lm_eval_aft.reporting.report import Report


def update_cards(report: Report) -> list[Path]:
    """Rewrite ``README.md`` of every vector folder in a report with its results; return the files.

    Runs compared by force, or without the questions, and vectors selected on these documents bring no
    results. A vector that is no longer the one that was scored, was scored at another coefficient or at
    other positions than its own, or is a lone file, has no card to fill.

    Raises:
        AFTError: no vector of the report has a folder, or a card cannot be written.
    """
    from lm_eval_aft.training.card import write_card
    from lm_eval_aft.vector import SteeringVector

    written = []
    for described in report.vectors:
        folder = Path(described["path"])
        # Facts are there only when the vector was read and is the one that was scored.
        if not folder.is_dir() or not described["facts"].get("task"):
            continue
        vector = SteeringVector.load(folder)
        facts = described["facts"]
        if (vector.coefficient, vector.positions) != (facts["coefficient"], facts["positions"]):
            continue
        write_card(folder, vector, card_results(report, described["run"]))
        written.append(folder / "README.md")
    if not written:
        raise AFTError(
            "No vector of these runs lies in a folder written by train-vector.",
            "Run the report where the vectors' paths hold, on scores at their own coefficients, or leave out "
            "--card.",
        )
    return written


def card_results(report: Report, run: str) -> list[dict[str, Any]]:
    """A run's rows as a card shows them: plain values and ready-made cells."""
    bare = any(each["answer_only"] for each in report.runs if each["name"] == run)
    if report.banner or bare:
        return []
    barred = {row.task for row in report.rows if row.run == run and row.verdict.startswith("not assessable")}
    settings: dict[str, str] = next(c["values"] for c in report.settings if c["run"] == run)
    return [
        {
            "task": row.task,
            "dataset": report.datasets.get(row.task),
            "metric": cells.metric_name(row.metric, row.filter),
            "num_fewshot": settings.get(f"{row.task}: n-shot", ""),
            "n": row.n,
            "value": row.steered,
            "baseline": cells.with_error(row.baseline, row.baseline_stderr, row.share),
            "steered": cells.with_error(row.steered, row.steered_stderr, row.share),
            "difference": cells.points(row.difference, row.share),
            "interval": cells.interval(row.low, row.high, row.share),
            "p": cells.p_text(row.p_value if row.p_adjusted is None else row.p_adjusted),
            "verdict": cells.row_cells(row)[-1],
        }
        for row in report.rows
        if row.run == run and row.task not in barred
    ]
