"""Runs scored without their questions, beside the same vectors' ordinary runs: how much is answer style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lm_eval_aft.errors import AFTError
from lm_eval_aft.reporting.pairing import compare_runs, differences, require_comparable
from lm_eval_aft.reporting.results import Run
from lm_eval_aft.reporting.settings import ANSWER_ONLY
from lm_eval_aft.reporting.stats import ALPHA
from lm_eval_aft.reporting.verdicts import Row, make_row

WORDING = (
    "The questions were removed and the options scored alone, for the baseline and for the vector. A gain "
    "that stays is answer style: the vector prefers such answers whatever is asked. These rows stand "
    "outside Holm's family; p is not adjusted."
)


@dataclass
class AnswerOnlyRow:
    """A vector on a task's primary metric, with the questions and without them.

    Attributes:
        with_question: its ordinary row against the ordinary baseline.
        without_question: the same without the questions, baseline and vector alike; kind ``answer-only``.
        meaning: what the pair says, in one sentence.
    """

    with_question: Row
    without_question: Row
    meaning: str


def apart(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The ordinary runs, and the answer-only runs that lie beside them."""
    bare = [run for run in runs if run.kind == "answer-only"]
    return [run for run in runs if run.kind != "answer-only"], bare


def answer_only_rows(
    baseline: Run, rows: Sequence[Row], runs: Sequence[Run], bare: Sequence[Run], force: bool = False
) -> list[AnswerOnlyRow]:
    """Rows for every answer-only run whose vector has an ordinary row on the same task.

    Args:
        rows: ordinary rows, judged.
        runs: ordinary runs, the baseline apart.
        bare: answer-only runs, their baseline among them.
        force: compare runs that were not asked the same.

    Raises:
        AFTError: answer-only runs without a baseline of their own, or that differ in other settings.
    """
    if not bare:
        return []
    bases = [run for run in bare if not (run.vector or run.vector_path)]
    if len(bases) != 1:
        raise AFTError(
            f"There are {len(bases)} answer-only runs of the baseline; one is needed.",
            "Score the baseline with answer_only=true too, as `aft eval --answer-only` does.",
        )
    if not force:
        _require_same_questions(baseline, bases[0])
    found = []
    for run in (each for each in bare if each is not bases[0]):
        if not force:
            require_comparable(bases[0], run)
        name = _ordinary_name(run, runs)
        ordinary = {row.task: row for row in rows if row.primary and row.run == name}
        for each in compare_runs(bases[0], run):
            if each.primary and each.task in ordinary:
                twin, row = ordinary[each.task], make_row(bases[0], run, each, False, "")
                found.append(AnswerOnlyRow(twin, row, meaning(twin, row)))
    return found


def meaning(with_question: Row, without_question: Row) -> str:
    """One sentence on a vector's gain with the questions (by its verdict) and without (by its own p)."""
    ordinary, bare = _direction(with_question), _direction(without_question)
    if ordinary > 0 and bare > 0:
        share = without_question.difference / with_question.difference
        return (
            f"A gain of {min(share, 9.99):.0%} of the ordinary one survives without the question: that much "
            "may be answer-style bias."
        )
    if ordinary > 0 and bare < 0:
        return "Without the question the vector loses: its gain depends on the question, not on answer style."
    if ordinary > 0:
        return (
            "Without the question no gain is detectable: within its interval, answer style does not explain "
            "the ordinary gain."
        )
    if bare > 0:
        return (
            "The vector favours right answers by their style alone, which gains nothing once the question "
            "is there."
        )
    return "There is no gain with the question, so there is none for answer style to explain."


def _direction(row: Row) -> int:
    """1 for better, -1 for worse, 0 for no detectable difference; by the verdict where there is one."""
    if row.verdict in ("better", "worse", "no detectable difference"):
        return {"better": 1, "worse": -1}.get(row.verdict, 0)
    if row.p_value >= ALPHA or not row.difference:
        return 0
    return 1 if (row.difference > 0) == row.higher_is_better else -1


def _ordinary_name(run: Run, runs: Sequence[Run]) -> str | None:
    """The ordinary run of the same vector; of several, the one that is called the same."""
    digest, tail = (run.vector or {}).get("sha256"), run.name.partition("/")[2]
    same = [each.name for each in runs if digest and (each.vector or {}).get("sha256") == digest]
    return min(same, key=lambda name: name.partition("/")[2] != tail, default=None)


def _require_same_questions(baseline: Run, bare: Run) -> None:
    """Raise `AFTError` unless both baselines differ in nothing but the questions' removal."""
    found = [text for text in differences(baseline, bare) if not text.startswith(f"{ANSWER_ONLY} ")]
    if found:
        raise AFTError(
            f"{bare.name} cannot stand beside {baseline.name}; they differ in: {'; '.join(found)}.",
            "Run both with the same settings, or show them anyway with --force.",
        )
