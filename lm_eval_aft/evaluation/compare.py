"""Comparing two runs document by document: what they must share, verdicts, and the documents that flipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lm_eval_aft._util.errors import AFTError, not_finite_cause
from lm_eval_aft.evaluation.provenance import HASH_DIGITS, VectorInfo
from lm_eval_aft.evaluation.results import (
    AGAIN,
    ScoredRun,
    TaskRun,
    listed_metrics,
    log_likelihood,
    mean_metrics,
    model_args,
    request_arguments,
)
from lm_eval_aft.evaluation.stats import (
    PairedComparison,
    compare_paired,
    holm,
    mean_interval,
    verdict,
)

# If a task reports several metrics, the verdict is on the first of these that it has.
PRIMARY_METRICS = ("acc_norm", "acc", "exact_match")
PRIMARY_FILTERS = ("strict-match", "none")
# Characters of a flipped document's context that are shown, from its end.
CONTEXT_CHARACTERS = 1500


@dataclass(frozen=True)
class Comparison:
    """One run against the baseline on one task, filter and metric: a row without a verdict yet.

    Attributes:
        doc_ids: the documents compared.
        wins, losses: the documents that got better and worse (lower scores are better for some metrics).
    """

    row: VerdictRow
    doc_ids: list[int]
    wins: list[int]
    losses: list[int]


def differences(baseline: ScoredRun, other: ScoredRun) -> list[str]:
    """Every difference that keeps two runs from being compared, in words; empty if there is none."""
    tasks = shared_tasks(baseline, other)
    found = differing(baseline, other, tasks)
    for task in tasks:
        found += _questions(task, baseline.tasks[task], other.tasks[task])
    return found


def require_comparable(baseline: ScoredRun, other: ScoredRun) -> None:
    """Raise `AFTError` naming every field in which the runs differ."""
    found = differences(baseline, other)
    if found:
        raise AFTError(
            f"{other.name} cannot be compared with {baseline.name}; they differ in: {'; '.join(found)}.",
            "Run both with the same settings, or compare anyway with --force (every output will say so).",
        )


def shared_tasks(baseline: ScoredRun, other: ScoredRun) -> list[str]:
    """The tasks of the other run.

    Raises:
        AFTError: the baseline lacks one of them.
    """
    missing = [task for task in other.tasks if task not in baseline.tasks]
    if missing:
        raise AFTError(
            f"{other.name} has {', '.join(missing)}, {baseline.name} has not.",
            "Score the baseline on it too.",
        )
    return list(other.tasks)


@dataclass(frozen=True)
class NotFinite:
    """A run's task without a verdict: answers of the model are NaN or infinite, so its choices mean nothing.

    Attributes:
        n, of: how many documents, of how many that both runs have; ``n`` of ``None``: not known, of texts
            that were written from such numbers.
        cause: what is to blame, and what to do about it.
    """

    run: str
    task: str
    n: int | None
    of: int
    cause: str

    def __str__(self) -> str:
        some = "some" if self.n is None else f"{self.n} of {self.of}"
        return f"{self.run}: {some} answers of {self.task} are no finite numbers; no verdict. {self.cause}"


def not_finite(baseline: ScoredRun, other: ScoredRun) -> list[NotFinite]:
    """The shared tasks on which either run's answers are not finite numbers."""
    found = []
    for task in shared_tasks(baseline, other):
        sides = baseline.tasks[task], other.tasks[task]
        first, second = (next(iter(side.samples.values())) for side in sides)
        ids = first.keys() & second.keys()
        odd = sum(not first[i].comparable(second[i]) for i in ids)
        written = [any(sample.generates for sample in s.values()) for s in (first, second)]
        texts = [run.texts_not_finite and own for run, own in zip((baseline, other), written, strict=True)]
        if odd or any(texts):
            alone = texts[0] or any(not first[i].comparable(first[i]) for i in ids)
            cause = _cause(baseline if alone else other)
            found.append(NotFinite(other.name, task, odd or None, len(ids), cause))
    return found


def _cause(run: ScoredRun) -> str:
    config = run.any.get("config", {})
    coefficient = (run.vector or {}).get("coefficient")
    coefficient = coefficient if isinstance(coefficient, int | float) else None
    dtype = _dtype(config.get("model_dtype") or model_args(run.any).get("dtype"))
    return not_finite_cause(dtype or "its dtype", coefficient)


def compare_runs(baseline: ScoredRun, other: ScoredRun) -> list[Comparison]:
    """Compare every per-document metric of every shared task, on the documents both runs have.

    Tasks with answers that are `not_finite` are left out.
    """
    found = []
    unfit = {each.task for each in not_finite(baseline, other)}
    for task in (name for name in shared_tasks(baseline, other) if name not in unfit):
        before, after = baseline.tasks[task], other.tasks[task]
        primary = primary_metric(before, after)
        for filter_name in (name for name in before.samples if name in after.samples):
            left, right = before.samples[filter_name], after.samples[filter_name]
            ids = sorted(left.keys() & right.keys())
            for metric in left[ids[0]].metrics if ids else ():
                if all(metric in left[i].metrics and metric in right[i].metrics for i in ids):
                    each = _compare(before, after, filter_name, metric, ids)
                    row = replace(
                        each.row, run=other.name, kind=other.kind, primary=(filter_name, metric) == primary
                    )
                    found.append(replace(each, row=row))
    return sorted(found, key=lambda c: (c.row.task, not c.row.primary))


def _compare(before: TaskRun, after: TaskRun, filter_name: str, metric: str, ids: list[int]) -> Comparison:
    samples = [[side.samples[filter_name][i] for i in ids] for side in (before, after)]
    left, right = ([sample.metrics[metric] for sample in side] for side in samples)
    clusters = [sample.cluster for sample in samples[0]]
    paired = compare_paired(left, right, clusters)
    up = _higher_is_better(before, metric)
    moved = [(i, (new > old) == up) for i, old, new in zip(ids, left, right, strict=True) if new != old]
    wins, losses = ([i for i, won in moved if won is side] for side in (True, False))
    values: dict[str, Any] = asdict(paired) | {"wins": len(wins), "losses": len(losses)}
    for name, scores in (("baseline", left), ("steered", right)):
        values[f"{name}_low"], values[f"{name}_high"] = mean_interval(scores)
    row = VerdictRow(
        task=before.task,
        metric=metric,
        filter=filter_name,
        higher_is_better=up,
        share=all(0 <= score <= 1 for score in (*left, *right)),
        **values | {"clusters": _cluster_note(clusters, paired)},
    )
    return Comparison(row, ids, wins, losses)


def primary_metric(*runs: TaskRun, complete: bool = True) -> tuple[str, str] | None:
    """(filter, metric) of a task's verdict: acc_norm, else acc, else exact match (strict first).

    Among the metrics that all documents of all the runs have; with ``complete`` false, that any has.
    """
    metrics: dict[tuple[str, str], None] = {}
    listed = list(mean_metrics(runs[0].config))
    for filter_name in runs[0].samples:
        rows = [sample.metrics.keys() for run in runs for sample in run.samples.get(filter_name, {}).values()]
        own = set.intersection(*map(set, rows)) if complete and rows else set().union(*rows)
        for metric in sorted(own, key=lambda m: (listed.index(m) if m in listed else len(listed), m)):
            metrics[filter_name, metric] = None

    def rank(pair: tuple[str, str]) -> tuple[int, int]:
        filter_name, metric = pair
        first = PRIMARY_METRICS.index(metric) if metric in PRIMARY_METRICS else len(PRIMARY_METRICS)
        second = PRIMARY_FILTERS.index(filter_name) if filter_name in PRIMARY_FILTERS else 9
        return first, second

    return min(metrics, key=rank, default=None)


def _higher_is_better(run: TaskRun, metric: str) -> bool:
    """As the results state, else the task's list of metrics, else true."""
    stated = run.results.get("higher_is_better", {}).get(run.task, {}).get(metric)
    if stated is None:
        stated = listed_metrics(run.config).get(metric, {}).get("higher_is_better")
    return stated is not False


def _cluster_note(clusters: list[str | None], paired: PairedComparison) -> str:
    if paired.clusters is not None:
        return f"documents grouped by source_id: {paired.clusters} clusters are the units of the test"
    if None in clusters:
        return ""
    count = len(set(clusters))
    return f"{count} source_id value(s): too few or too uneven to be units; documents count as independent"


def _questions(task: str, before: TaskRun, after: TaskRun) -> Iterator[str]:
    """Differences in documents, targets, prompts, options or generation settings."""
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
            # A different document implies a different prompt: name only the cause.
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


# The settings of a run that decide what the model is asked and how its answers are scored.

# Whether the questions were removed: prompts are logged as the task made them, so only this shows it.
ANSWER_ONLY = "answer_only"


def run_settings(results: dict[str, Any]) -> dict[str, Any]:
    """What must be equal between runs, whatever the task: field -> normalized value."""
    config, arguments = results.get("config", {}), model_args(results)
    info = config.get("aft") or {}
    softmax = info.get("softmax_dtype") or arguments.get("softmax_dtype")
    return {
        "tokenizer": {key: results.get(f"tokenizer_{key}") for key in ("pad_token", "eos_token", "bos_token")}
        | {"vocabulary": (info.get("fingerprint") or {}).get("vocabulary")},
        "maximum length": results.get("max_length"),
        "chat template": results.get("chat_template_sha"),
        "system instruction": results.get("system_instruction_sha"),
        "fewshot_as_multiturn": bool(results.get("fewshot_as_multiturn")),
        "limit": config.get("limit"),
        "gen_kwargs": _plain(config.get("gen_kwargs")) or {},
        "dtype": _dtype(config.get("model_dtype") or arguments.get("dtype")),
        "softmax dtype": _dtype(softmax),
        ANSWER_ONLY: bool(info.get("answer_only")),
    }


def task_settings(run: TaskRun) -> dict[str, Any]:
    """What must be equal between runs of one task: field -> value."""
    results, config, task = run.results, run.config, run.task
    shots = results.get("n-shot", {}).get(task)
    generation = _plain(config.get("generation_kwargs")) or {}
    seeds = results.get("config", {})
    sampled = bool(isinstance(generation, dict) and generation.get("do_sample"))
    return {
        "task version": results.get("versions", {}).get(task),
        "n-shot": shots,
        # Without few-shot examples their seed has no effect.
        "few-shot seed": seeds.get("fewshot_seed") if shots != 0 else None,
        "sampling seed": seeds.get("torch_seed") if sampled else None,
        "generation_kwargs": generation,
        "repeats": config.get("repeats") or 1,
        "filters": _plain(config.get("filter_list")),
        "metrics": _plain(config.get("metric_list")),
    }


def differing(first: ScoredRun, second: ScoredRun, tasks: list[str]) -> list[str]:
    """Every setting that differs, with both values; prompts and documents not included."""
    found: dict[str, None] = {}
    for task in tasks:
        before, after = first.tasks[task], second.tasks[task]
        for where, left, right in (
            ("", run_settings(before.results), run_settings(after.results)),
            (f" of {task}", task_settings(before), task_settings(after)),
        ):
            for key in left:
                if _differs(left[key], right[key]):
                    found[f"{key}{where} ({_short(left[key])} against {_short(right[key])})"] = None
    return list(found)


def described(run: ScoredRun) -> dict[str, str]:
    """A run's column in the table of settings: field -> text."""
    results, info, vector, routing = run.any, run.aft, run.vector or {}, run.routing or {}
    config = results.get("config", {})
    rows: dict[str, Any] = {
        "model type": config.get("model"),
        "model": results.get("model_name") or model_args(results).get("pretrained"),
        "model revision": config.get("model_revision"),
        "model parameters": config.get("model_num_parameters"),
        "base model fingerprint": fingerprint_text(info.get("fingerprint") or {}),
        "vector": run.vector_path,
        "library": run.library,
        "router": routing.get("router"),
        "router sha256": routing.get("router_sha256"),
        "routed vectors": list(routing.get("vectors") or {}) or None,
        "vector sha256": vector.get("sha256"),
        "vector layers": vector.get("layers"),
        "vector norm": _norm(vector),
        "coefficient": vector.get("coefficient"),
        "control": vector.get("control"),
        **run_settings(results),
        "batch size": config.get("batch_size"),
        "device": config.get("device"),
        "hardware": _hardware(results.get("pretty_env_info")),
        "world size": info.get("world_size"),
        "scoring path": info.get("scoring_path"),
        "lm-eval": results.get("lm_eval_version"),
        "transformers": results.get("transformers_version"),
        "evaluation seconds": _number(results.get("total_evaluation_time_seconds"), 1),
    }
    rows["tokenizer"] = str(rows["tokenizer"]["vocabulary"] or "")[:16] or rows["tokenizer"]["eos_token"]
    rows[ANSWER_ONLY] = rows[ANSWER_ONLY] or None  # shown only if true
    for task, each in run.tasks.items():
        own = task_settings(each)
        rows[f"{task}: version"] = own["task version"]
        rows[f"{task}: n-shot"] = own["n-shot"]
        rows[f"{task}: few-shot seed"] = own["few-shot seed"]
        # lm-eval's own digest.
        digest = each.results.get("task_hashes", {}).get(task)
        rows[f"{task}: documents, prompts and targets"] = str(digest)[:16] if digest else None
    return {key: _short(value) for key, value in rows.items() if value not in (None, "", {})}


def fingerprint_text(identity: dict[str, Any]) -> str | None:
    """A base model's fingerprint, shortened to three times eight digits."""
    if not identity:
        return None
    return "-".join(str(identity.get(key, ""))[:8] for key in ("config", "parameters", "vocabulary"))


def _differs(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        # A part that only one of them logs (another model type) cannot be compared.
        if set(left) == {"pad_token", "eos_token", "bos_token", "vocabulary"}:
            return any(left[k] != right[k] for k in left if left[k] is not None and right[k] is not None)
        return json.dumps(left, sort_keys=True) != json.dumps(right, sort_keys=True)
    return bool(left != right)


def _dtype(value: Any) -> str | None:
    return None if value in (None, "", "None") else str(value).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """The value as JSON would give it back, so that a tuple equals a list; ``key=value`` text as a dict."""
    if isinstance(value, str) and "=" in value:
        from lm_eval.utils import simple_parse_args_string

        return dict(simple_parse_args_string(value))
    return json.loads(json.dumps(value, default=str))


def _hardware(text: Any) -> str | None:
    """Processor and GPUs, from the environment that lm-eval logs."""
    found = []
    for line in str(text or "").splitlines():
        key, value = (part.strip() for part in line.partition(":")[::2])
        wanted = key in ("Model name", "CPU(s)", "GPU models and configuration")
        if wanted and value and "Could not" not in value:
            found.append(f"{value} CPUs" if key == "CPU(s)" else value)
    return ", ".join(dict.fromkeys(found)) or None


def _number(value: Any, digits: int) -> str | None:
    try:
        return f"{float(value):.{digits}f}"
    except (TypeError, ValueError, OverflowError):
        return None


def _norm(vector: dict[str, Any]) -> str | None:
    norm, share = _number(vector.get("norm"), 4), vector.get("share")
    if norm is None or not isinstance(share, int | float):
        return norm
    return f"{norm} ({100 * share:.3g} % of the residual norm)"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


# Rows with verdicts.

SELECTED = "not assessable: selected on these documents"
DIFFERENT = "not assessable: the runs differ"


@dataclass(frozen=True, kw_only=True)
class VerdictRow:
    """One comparison. Scores, differences and intervals are in the metric's own unit (shares: 0 to 1).

    Attributes:
        kind: ``steered``, ``placebo`` or ``answer-only``.
        family: whether the row counts in Holm's correction; ``p_adjusted`` and ``verdict`` are empty
            for rows outside (secondary metrics, placebos, answer-only runs).
        share: whether all scores are between 0 and 1, shown in percent.
        wins, losses: how many documents got better and worse.
        mde: minimum detectable effect at 80 % power.
        clusters: what to say about clusters of documents, if anything.
    """

    run: str = ""
    kind: str = ""
    task: str
    metric: str
    filter: str
    primary: bool = False
    family: bool = False
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
    p_adjusted: float | None = None
    verdict: str = ""
    mde: float | None
    test: str
    interval: str
    clusters: str


@dataclass
class AnswerOnlyRow:
    """A vector on a task's primary metric, with the questions and without them.

    Attributes:
        with_question: its ordinary row, against the ordinary baseline.
        without_question: the same with the questions removed from both runs; kind ``answer-only``.
        meaning: what the pair shows, in one sentence.
    """

    with_question: VerdictRow
    without_question: VerdictRow
    meaning: str


def judge(
    baseline: ScoredRun,
    comparisons: Sequence[tuple[ScoredRun, Comparison]],
    vectors: dict[str, VectorInfo],
    mismatched: set[str] | frozenset[str] = frozenset(),
) -> list[VerdictRow]:
    """Rows with verdicts: Holm's correction over primary metrics × vectors.

    A vector scored under two names with the same outcome (the chosen seed and the same finalist) counts as
    one comparison.

    Args:
        vectors: run name -> its vector; one selected on these documents gets no verdict.
        mismatched: names of runs that differ from the baseline in more than steering: no verdict either.
    """
    rows = [each.row for _, each in comparisons]
    same: dict[tuple[Any, ...], list[int]] = {}
    for i, (run, each) in enumerate(comparisons):
        if not each.row.primary or run.kind != "steered":
            continue
        if _selected_on(vectors[run.name], baseline, each):
            rows[i] = replace(rows[i], verdict=SELECTED)
        elif run.name in mismatched:
            rows[i] = replace(rows[i], verdict=DIFFERENT)
        else:
            outcome = (*map(tuple, (each.doc_ids, each.wins, each.losses)), each.row.difference)
            vector = (run.vector or {}).get("sha256") or run.name
            same.setdefault((vector, each.row.task, *outcome), []).append(i)
    adjusted = holm([rows[equal[0]].p_value for equal in same.values()])
    for equal, p in zip(same.values(), adjusted, strict=True):
        for i in equal:
            call = verdict(p, rows[i].difference, rows[i].higher_is_better)
            rows[i] = replace(rows[i], p_adjusted=p, verdict=call, family=i == equal[0])
    return rows


def _selected_on(info: VectorInfo, baseline: ScoredRun, each: Comparison) -> bool:
    """Whether the vector was selected on documents of this comparison."""
    if info.biased:
        return True
    known = set(info.selection_documents)
    samples = baseline.tasks[each.row.task].samples[each.row.filter]
    return bool(known) and any(samples[i].doc_hash[:HASH_DIGITS] in known for i in each.doc_ids)


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
    """Each option with its log-likelihoods (nats), what this metric makes of them, and who chose it."""
    texts = [str(each[1]).removeprefix(delimiter) for each in arguments]
    # Tasks that score mutual information ask every option again without its context.
    half = len(texts) // 2
    if half and texts[:half] == texts[half:] and all(each[0] != arguments[0][0] for each in arguments[half:]):
        texts = texts[:half]
    old, new = ([log_likelihood(each, i) for i in range(len(texts))] for each in (first, second))
    scored = [[_option_score(metric, texts, each, i) for i in range(len(texts))] for each in (first, second)]
    before, after = (_chosen(metric, texts, each) for each in (first, second))
    target = str(first["target"])
    gold = {int(target)} if target.isdecimal() and int(target) < len(texts) else {
        i for i, text in enumerate(texts) if text.strip() == target.strip()
    }  # fmt: skip
    return [
        {"text": text, "gold": i in gold, "before": old[i], "after": new[i]}
        | {"score_before": scored[0][i], "score_after": scored[1][i]}
        | {"chosen_before": i in before, "chosen_after": i in after}
        for i, text in enumerate(texts)
    ]


# What options are compared by, of metrics that do not compare log-likelihoods as they are.
OPTION_SCORES = {
    "acc_norm": "log-likelihood per character, nats",
    "acc_bytes": "log-likelihood per byte, nats",
    "acc_mutual_info": "log-likelihood minus that without the question, nats",
}


def _option_score(metric: str, texts: list[str], sample: dict[str, Any], i: int) -> float | None:
    """What lm-eval's metric of that name compares an option by; ``None`` where nothing was logged."""
    value = log_likelihood(sample, i)
    if value is None:
        return None
    if metric == "acc_mutual_info":
        return value - (log_likelihood(sample, len(texts) + i) or 0.0)
    size = {"acc_norm": len(texts[i]), "acc_bytes": len(texts[i].encode())}.get(metric, 1)
    return value / max(1, size)


def _chosen(metric: str, texts: list[str], sample: dict[str, Any]) -> set[int]:
    """The options that a run chose, as lm-eval's metric of that name does; else the likeliest."""
    if metric == "exact_match":  # those that greedy decoding would have written
        return {i for i in range(len(texts)) if str(sample["resps"][i][0][1]) == "True"}
    scores = [_option_score(metric, texts, sample, i) for i in range(len(texts))]
    return {max(range(len(texts)), key=lambda i: -1e30 if (score := scores[i]) is None else score)}


def _generation(sample: dict[str, Any]) -> dict[str, Any]:
    texts = sample["resps"][0] if isinstance(sample["resps"][0], list) else sample["resps"]
    answer = sample["filtered_resps"][0] if sample.get("filtered_resps") else ""
    return {"text": str(texts[0]) if texts else "", "repeats": len(texts), "answer": str(answer)}
