"""Documents whose outcome flipped, told in full: what was asked, what was right, before and after."""

from __future__ import annotations

from typing import Any

from lm_eval_aft.errors import AFTError
from lm_eval_aft.reporting.pairing import Comparison
from lm_eval_aft.reporting.results import Run, TaskRun
from lm_eval_aft.reporting.samples import AGAIN, asked_of

CONTEXT_CHARACTERS = 1500


def flipped_documents(baseline: Run, run: Run, comparison: Comparison, limit: int) -> dict[str, Any]:
    """Up to ``limit`` documents won and as many lost on a comparison's metric, with their counts."""
    before, after = baseline.tasks[comparison.task], run.tasks[comparison.task]

    def tell(ids: list[int]) -> list[dict[str, Any]]:
        try:
            return [_document(before, after, comparison, i) for i in ids[:limit]]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise AFTError(
                f"{before.samples_file} or {after.samples_file.name} lacks what lm-eval logs of a document "
                f"({error!r}).",
                AGAIN,
            ) from error

    return {
        "run": run.name,
        "task": comparison.task,
        "metric": comparison.metric,
        "filter": comparison.filter,
        "won_count": len(comparison.wins),
        "lost_count": len(comparison.losses),
        "won": tell(comparison.wins),
        "lost": tell(comparison.losses),
    }


def _document(before: TaskRun, after: TaskRun, comparison: Comparison, doc_id: int) -> dict[str, Any]:
    first = before.document(comparison.filter, doc_id)
    second = after.document(comparison.filter, doc_id)
    asked = asked_of(first)
    context = str(asked[0][0]) if asked[0] else ""
    found: dict[str, Any] = {
        "doc_id": doc_id,
        "context": context[-CONTEXT_CHARACTERS:],
        "context_cut": max(0, len(context) - CONTEXT_CHARACTERS),
        "target": str(first["target"]),
    }
    if all(len(each) > 1 and isinstance(each[1], str) for each in asked):
        return found | {"options": _options(before, comparison, asked, first, second)}
    return found | {"generations": {"before": _generation(first), "after": _generation(second)}}


def _options(
    run: TaskRun,
    comparison: Comparison,
    asked: list[list[Any]],
    first: dict[str, Any],
    second: dict[str, Any],
) -> list[dict[str, Any]]:
    """Each option with its log-likelihoods (nats) and which one either run preferred by this metric."""
    delimiter = str(run.config.get("target_delimiter", " "))
    texts = [str(each[1]).removeprefix(delimiter) for each in asked]
    # Tasks that score mutual information ask every option again without its context.
    count = (
        len(texts) // 2 if len(texts) % 2 == 0 and texts[: len(texts) // 2] == texts[len(texts) // 2 :] else 0
    )
    if count and all(each[0] != asked[0][0] for each in asked[count:]):
        texts = texts[:count]
    lengths = [max(1, len(text)) if comparison.metric == "acc_norm" else 1 for text in texts]
    columns = []
    for sample in (first, second):
        scores = [_log_likelihood(sample, i) for i in range(len(texts))]
        weighed = [-1e30 if s is None else s / n for s, n in zip(scores, lengths, strict=True)]
        columns.append((scores, weighed.index(max(weighed))))
    target = str(first["target"])
    gold = {int(target)} if target.isdecimal() and int(target) < len(texts) else {
        i for i, text in enumerate(texts) if text.strip() == target.strip()
    }  # fmt: skip
    (old, chosen_before), (new, chosen_after) = columns
    return [
        {
            "text": text,
            "gold": i in gold,
            "before": old[i],
            "after": new[i],
            "chosen_before": i == chosen_before,
            "chosen_after": i == chosen_after,
        }
        for i, text in enumerate(texts)
    ]


def _log_likelihood(sample: dict[str, Any], option: int) -> float | None:
    value = sample["resps"][option]
    while isinstance(value, list):
        value = value[0] if value else None
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def _generation(sample: dict[str, Any]) -> dict[str, Any]:
    texts = sample["resps"][0] if isinstance(sample["resps"][0], list) else sample["resps"]
    answer = sample["filtered_resps"][0] if sample.get("filtered_resps") else ""
    return {"text": str(texts[0]) if texts else "", "repeats": len(texts), "answer": str(answer)}
