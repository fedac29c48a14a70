"""Documents whose outcome flipped, in full: the prompt, the right answer, and both runs' answers."""

from __future__ import annotations

from typing import Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft.evaluation.compare import Comparison
from lm_eval_aft.evaluation.results import AGAIN, ScoredRun, TaskRun, log_likelihood, request_arguments

CONTEXT_CHARACTERS = 1500


def flipped_documents(
    baseline: ScoredRun, run: ScoredRun, comparison: Comparison, limit: int
) -> dict[str, Any]:
    """Up to ``limit`` documents won and as many lost on a comparison's metric, and how many there are."""
    before, after = baseline.tasks[comparison.row.task], run.tasks[comparison.row.task]

    def full(ids: list[int]) -> list[dict[str, Any]]:
        try:
            return [_document(before, after, comparison, i) for i in ids[:limit]]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise AFTError(
                f"{before.samples_file} or {after.samples_file.name} lacks what lm-eval logs of a document "
                f"({error!r}).",
                AGAIN,
            ) from error

    names = {"run": run.name, "task": comparison.row.task, "metric": comparison.row.metric}
    counts = {"won_count": len(comparison.wins), "lost_count": len(comparison.losses)}
    documents = {"won": full(comparison.wins), "lost": full(comparison.losses)}
    return {**names, "filter": comparison.row.filter, **counts, **documents}


def _document(before: TaskRun, after: TaskRun, comparison: Comparison, doc_id: int) -> dict[str, Any]:
    first = before.document(comparison.row.filter, doc_id)
    second = after.document(comparison.row.filter, doc_id)
    arguments = request_arguments(first)
    context = str(arguments[0][0]) if arguments[0] else ""
    found: dict[str, Any] = {
        "doc_id": doc_id,
        "context": context[-CONTEXT_CHARACTERS:],
        "context_cut": max(0, len(context) - CONTEXT_CHARACTERS),
        "target": str(first["target"]),
    }
    if all(len(each) > 1 and isinstance(each[1], str) for each in arguments):
        delimiter = str(before.config.get("target_delimiter", " "))
        return found | {"options": _options(delimiter, comparison.row.metric, arguments, first, second)}
    return found | {"generations": {"before": _generation(first), "after": _generation(second)}}


def _options(
    delimiter: str, metric: str, arguments: list[list[Any]], first: dict[str, Any], second: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each option with its log-likelihoods (nats) and whether either run chose it by this metric."""
    texts = [str(each[1]).removeprefix(delimiter) for each in arguments]
    # Tasks that score mutual information ask every option again without its context.
    half = len(texts) // 2
    if half and texts[:half] == texts[half:] and all(each[0] != arguments[0][0] for each in arguments[half:]):
        texts = texts[:half]
    old, new = ([log_likelihood(each, i) for i in range(len(texts))] for each in (first, second))
    before, after = (_chosen(metric, texts, each) for each in (first, second))
    target = str(first["target"])
    gold = {int(target)} if target.isdecimal() and int(target) < len(texts) else {
        i for i, text in enumerate(texts) if text.strip() == target.strip()
    }  # fmt: skip
    return [
        {"text": text, "gold": i in gold, "before": old[i], "after": new[i]}
        | {"chosen_before": i in before, "chosen_after": i in after}
        for i, text in enumerate(texts)
    ]


def _chosen(metric: str, texts: list[str], sample: dict[str, Any]) -> set[int]:
    """The options that a run chose, as lm-eval's metric of that name does; else the likeliest."""
    if metric == "exact_match":  # those that greedy decoding would have written
        return {i for i in range(len(texts)) if str(sample["resps"][i][0][1]) == "True"}

    def score(i: int) -> float:
        value = log_likelihood(sample, i)
        if value is None:
            return -1e30
        if metric == "acc_mutual_info":
            return value - (log_likelihood(sample, len(texts) + i) or 0.0)
        size = {"acc_norm": len(texts[i]), "acc_bytes": len(texts[i].encode())}.get(metric, 1)
        return value / max(1, size)

    return {max(range(len(texts)), key=score)}


def _generation(sample: dict[str, Any]) -> dict[str, Any]:
    texts = sample["resps"][0] if isinstance(sample["resps"][0], list) else sample["resps"]
    answer = sample["filtered_resps"][0] if sample.get("filtered_resps") else ""
    return {"text": str(texts[0]) if texts else "", "repeats": len(texts), "answer": str(answer)}
