"""Comparing runs and collecting everything a report shows, as plain data; `render` writes it."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lm_eval_aft import __version__
from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.pages import RenderedTable, html_table
from lm_eval_aft.evaluation import formatting
from lm_eval_aft.evaluation.compare import (
    ANSWER_ONLY,
    AnswerOnlyRow,
    Comparison,
    NotFinite,
    VerdictRow,
    compare_runs,
    described,
    differences,
    fingerprint_text,
    flipped_documents,
    judge,
    not_finite,
    primary_metric,
    require_comparable,
)
from lm_eval_aft.evaluation.provenance import VectorInfo, commands, read_vector_info
from lm_eval_aft.evaluation.results import ScoredRun, discover, model_args, read_run
from lm_eval_aft.evaluation.stats import ALPHA, BETTER, NO_DIFFERENCE, WORSE, seeds_interval

ANSWER_ONLY_WORDING = (
    "The questions were removed and the options scored alone, for the baseline and for the vector. A gain "
    "that stays is answer style: the vector prefers such answers whatever is asked. These rows stand "
    "outside Holm's family; p is not adjusted."
)
LEADERBOARD_WORDING = (
    "Same settings as the Open LLM Leaderboard v1, not the same numbers: it ran an older version of the "
    "harness, so scores may differ by a little even for the same model."
)


@dataclass(kw_only=True)
class Report:
    """Everything a report shows; `to_dict` gives values that JSON can hold.

    Attributes:
        banner: how runs differ that ``--force`` compared all the same.
        family: how many comparisons Holm's correction covers.
        not_finite: runs and tasks without a verdict, as answers there are NaN or infinite.
        corpus: metrics without a score per document: both values, no test.
        groups: lm-eval's group scores: both values, no test.
        seeds: per vector and task scored with >= 3 seeds, the mean difference and its interval.
        answer_only: vectors with and without the questions, outside Holm's family.
        routes: routed runs split by the vector each document got: means, no test.
        flips: per run and task, documents whose outcome changed.
        settings: one mapping per run, field -> text.
        vectors: what is known of each vector (see `VectorInfo`).
        commands: per run, the commands that reproduce it.
        leaderboard: the tasks of the Open LLM Leaderboard v1, and whether its settings were used.
        datasets: task -> its dataset, a Hub name or a path.
        dataset_parts: task -> the dataset's configuration and the split that was scored.
    """

    title: str
    created: str
    version: str
    banner: list[str]
    warnings: list[str]
    family: int
    alpha: float
    runs: list[dict[str, Any]]
    rows: list[VerdictRow]
    not_finite: list[NotFinite] = field(default_factory=list)
    corpus: list[dict[str, Any]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    seeds: list[dict[str, Any]] = field(default_factory=list)
    answer_only: list[AnswerOnlyRow] = field(default_factory=list)
    routes: list[dict[str, Any]] = field(default_factory=list)
    flips: list[dict[str, Any]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    vectors: list[dict[str, Any]] = field(default_factory=list)
    commands: list[dict[str, Any]] = field(default_factory=list)
    leaderboard: list[dict[str, Any]] = field(default_factory=list)
    datasets: dict[str, str] = field(default_factory=dict)
    dataset_parts: dict[str, dict[str, str]] = field(default_factory=dict)
    leaderboard_wording: str = LEADERBOARD_WORDING
    answer_only_wording: str = ANSWER_ONLY_WORDING

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __repr__(self) -> str:
        told = ", ".join(f"{row.task} {row.run}: {row.verdict}" for row in self.rows if row.primary)
        return f"Report({self.title}; {told})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the rows of the primary metrics, and all warnings."""
        columns = ("task", "run", "n", "baseline", "steered", "difference", "95 % interval", "p", "verdict")
        rows = [row for row in self.rows if row.primary]
        lines = [formatting.row_cells(row, columns) for row in rows]
        notes = [*self.banner, *self.warnings]
        return html_table(RenderedTable(self.title, columns, lines, notes=notes))


def compare(baseline: str | Path, *steered: str | Path, force: bool = False, flips: int = 20) -> Report:
    """Compare runs that lm-eval wrote with ``--log_samples``, document by document.

    Args:
        baseline: the baseline's result folder; or, alone, a folder written by ``aft eval``.
        steered: result folders to compare with it.
        force: compare even runs whose settings or documents differ; the report then says so.
        flips: how many documents won and how many lost to show in full, for each task.

    Raises:
        AFTError: unreadable folders, or runs that cannot be compared (each difference is named).

    >>> compare("results/baseline", "results/steered/arc").rows[0].verdict  # doctest: +SKIP
    'better'
    """
    return build_report(read_runs([Path(baseline), *map(Path, steered)]), force=force, flips=flips)


def read_runs(folders: Sequence[Path]) -> list[ScoredRun]:
    """Read the runs in one folder, or one run from each of several folders; the baseline comes first."""
    if len(folders) == 1:
        return discover(folders[0])
    first, *others = [read_run(*each) for each in zip(folders, _names(folders), strict=True)]
    steered = [replace(run, kind="steered") if run.kind == "baseline" else run for run in others]
    return [replace(first, kind="baseline"), *steered]


def build_report(
    runs: Sequence[ScoredRun], *, force: bool = False, flips: int = 20, title: str = ""
) -> Report:
    """Compare every run with the first one; see `compare`.

    Raises:
        AFTError: runs that cannot be compared, unless ``force``.
    """
    shown, answer_only = runs, [run for run in runs if run.kind == "answer-only"]
    runs = [run for run in runs if run.kind != "answer-only"]
    if not runs:
        raise AFTError(
            "There is no baseline that was scored with the questions.", "Give its result folder first."
        )
    baseline, *others = runs
    if not others:
        raise AFTError("There is nothing to compare with the baseline.", "Give at least one steered run.")
    if len({run.name for run in runs}) < len(runs):
        raise AFTError("Two runs have the same name.", "Rename one of their folders.")
    banner = []
    mismatched = set()
    for run in others:
        if not force:
            require_comparable(baseline, run)
        elif found := differences(baseline, run):
            mismatched.add(run.name)
            banner.append(f"{run.name} and {baseline.name} differ in: {'; '.join(found)}")
    vectors = {run.name: read_vector_info(run) for run in others}
    comparisons = [(run, each) for run in others for each in compare_runs(baseline, run)]
    unfit = [each for run in others for each in not_finite(baseline, run)]
    rows = judge(baseline, comparisons, vectors, mismatched)
    corpus = corpus_scores(baseline, others, rows)
    if not comparisons and not unfit and not corpus:
        raise AFTError(
            "The runs have no metric in common that has a score.", "Give runs scored without --predict_only."
        )
    pairs, without = answer_only_rows(baseline, rows, others, answer_only, force)
    models = sorted({str(run.any.get("model_name")) for run in runs})
    models = [Path(model).name if model.startswith((".", "/")) else model for model in models]
    return Report(
        title=title or f"{', '.join(models)}: {', '.join(baseline.tasks)}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        banner=banner,
        warnings=[*warnings(baseline, others, list(vectors.values()), rows), *map(str, without)],
        family=sum(row.family for row in rows),
        alpha=ALPHA,
        runs=[
            {"name": run.name, "kind": run.kind, "tasks": list(run.tasks)}
            | {"vector": run.vector_path, "answer_only": run.answer_only}
            for run in shown
        ],
        rows=rows,
        not_finite=unfit,
        corpus=corpus,
        groups=group_scores(baseline, others),
        seeds=over_seeds(rows),
        answer_only=pairs,
        routes=route_rows(baseline, comparisons),
        flips=[
            flipped_documents(baseline, run, each, flips)
            for run, each in comparisons
            if each.row.primary and run.kind == "steered"
        ],
        settings=[{"run": run.name, "values": described(run)} for run in shown],
        vectors=[info.to_dict() for info in vectors.values() if info.path],
        commands=[{"run": run.name, "commands": commands(run)} for run in shown],
        leaderboard=leaderboard_rows(baseline, [asdict(row) for row in rows if row.kind == "steered"]),
        datasets={task: str(each.config.get("dataset_path") or "") for task, each in baseline.tasks.items()},
        dataset_parts={task: _parts(each.config) for task, each in baseline.tasks.items()},
    )


def _parts(config: dict[str, Any]) -> dict[str, str]:
    split = config.get("test_split") or config.get("validation_split")
    return {"config": str(config.get("dataset_name") or ""), "split": str(split or "")}


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest end of each path that makes them different."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise AFTError("The same folder was given twice.", "Give each run once.")


# Besides verdicts: warnings, scores without a test, intervals over seeds.


def warnings(
    baseline: ScoredRun, others: list[ScoredRun], vectors: list[VectorInfo], rows: list[VerdictRow]
) -> list[str]:
    """What a reader should know before trusting the rows; ``vectors`` in the order of ``others``."""
    found = [note for run in (baseline, *others) for note in run.notes]
    if baseline.answer_only:
        found.append(
            "All of these runs were scored without the questions (answer_only): gains are answer style."
        )
    for run, info in zip(others, vectors, strict=True):
        found += [*info.warnings, *_run_warnings(baseline, run, info)]
    for run in (baseline, *others):
        config = run.any.get("config", {})
        if config.get("use_cache") and config.get("model") != "aft":
            found.append(
                f"{run.name}: scored with --use_cache, which {config.get('model')} does not key by model."
            )
    return list(dict.fromkeys([*found, *(f"{row.task}: {row.clusters}." for row in rows if row.clusters)]))


def _run_warnings(baseline: ScoredRun, run: ScoredRun, info: VectorInfo) -> Iterator[str]:
    """How a run differs from its baseline, or from what its vector was trained for."""
    results, routing = run.any, run.routing or {}
    for name, why in (routing.get("left_out") or {}).items():
        yield (f"{run.name}: {name} was left out of routing ({why}); documents meant for it went elsewhere.")
    theirs, ours = (each.aft.get("fingerprint") for each in (baseline, run))
    names = [each.get("model_name") for each in (baseline.any, results)]
    if theirs and ours:
        settings = [each.get("computation") for each in (ours, theirs)]
        other = None not in settings and settings[0] != settings[1]
        if other or fingerprint_text(ours) != fingerprint_text(theirs):
            yield f"{run.name}: its base model is not the baseline's (fingerprints differ)."
    elif None not in names and names[0] != names[1]:
        yield f"{run.name}: its base model is called {names[1]}, the baseline's {names[0]}."
    vectors = (run.vector or {}, *(routing.get("vectors") or {}).values())
    for logged in (part for each in vectors for part in each.get("tasks") or [each]):
        task, trained = logged.get("task"), logged.get("num_fewshot")
        if trained is None or task not in run.tasks:
            continue
        shots = run.tasks[task].results.get("n-shot", {}).get(task)
        if shots != trained:
            yield f"{run.name}: trained on {trained}-shot prompts of {task}, scored {shots}-shot."
    for trained, scored in _prompts(info, run):
        if trained != scored:
            yield f"{run.name}: trained with {trained}, scored with {scored}."
    for library in ("lm_eval", "transformers"):
        used, old = results.get(f"{library}_version"), baseline.any.get(f"{library}_version")
        if used != old:
            yield f"{run.name}: {library} {used}, baseline {old}."
    unfit = not_finite(baseline, run)
    yield from map(str, unfit)
    yield from _displaced(baseline, run, {each.task for each in unfit})


def _prompts(info: VectorInfo, run: ScoredRun) -> Iterator[tuple[str, str]]:
    """Settings of the prompts, each in words: as the vector was trained, and as it was scored."""
    trained, scored = info.prompts, run.any
    if info.facts:
        template, other = info.facts.get("chat_template"), scored.get("chat_template_sha")
        yield _named("chat template", template and template[:8]), _named("chat template", other and other[:8])
    if not trained:
        return
    system = "system instruction"
    yield _named(system, trained.get("system_instruction")), _named(system, scored.get("system_instruction"))
    if any(scored.get("n-shot", {}).get(task) for task in run.tasks):
        turns, text = "few-shot examples as chat turns", "few-shot examples as one text"
        multiturn = trained.get("fewshot_as_multiturn")
        multiturn = trained.get("apply_chat_template") if multiturn is None else multiturn
        yield turns if multiturn else text, turns if scored.get("fewshot_as_multiturn") else text


def _named(what: str, value: str | None) -> str:
    return f"the {what} {value!r}" if value else f"no {what}"


def _displaced(baseline: ScoredRun, run: ScoredRun, unfit: Container[str]) -> Iterator[str]:
    """Primary metrics that were passed over because some documents have no finite score."""
    for task in (task for task in run.tasks if task not in unfit):
        sides = baseline.tasks[task], run.tasks[task]
        chosen, wanted = primary_metric(*sides), primary_metric(*sides, complete=False)
        if wanted is not None and wanted != chosen:
            name, metric = wanted
            lacking = sum(
                metric not in s.metrics for side in sides for s in side.samples.get(name, {}).values()
            )
            instead = f"the verdict is on {chosen[1]}" if chosen else "there is no verdict"
            yield f"{run.name}: {metric} of {task} is no finite number for {lacking} answers; {instead}."


def corpus_scores(
    baseline: ScoredRun, others: list[ScoredRun], rows: list[VerdictRow]
) -> list[dict[str, Any]]:
    """Scores without a value per document (perplexities, F1 over the corpus, ...): both values, no test."""
    tested = {(row.run, row.task, f"{row.metric},{row.filter}") for row in rows}
    found = []
    for run in others:
        unfit = {each.task for each in not_finite(baseline, run)}
        for task, each in run.tasks.items():
            if task in unfit:
                continue
            sides = (side.results["results"].get(task, {}) for side in (baseline.tasks[task], each))
            found += _both_scores(run.name, task, *sides)
    return [row for row in found if (row["run"], row["task"], row["metric"]) not in tested]


def group_scores(baseline: ScoredRun, others: list[ScoredRun]) -> list[dict[str, Any]]:
    """lm-eval's own scores of groups of tasks: both values, no test."""
    before = _groups(baseline)
    return [
        row
        for run in others
        for group, scores in _groups(run, {each.task for each in not_finite(baseline, run)}).items()
        for row in _both_scores(run.name, group, before.get(group, {}), scores)
    ]


def _both_scores(run: str, task: str, before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores (keys ``metric,filter``) that both results have, without their standard errors."""
    return [
        {"run": run, "task": task, "metric": key, "baseline": before[key], "steered": value}
        for key, value in after.items()
        if "," in key and "_stderr," not in key
        if isinstance(value, int | float) and isinstance(before.get(key), int | float)
    ]


def _groups(run: ScoredRun, unfit: Container[str] = ()) -> dict[str, dict[str, Any]]:
    """A run's group scores, without groups that have an unfit task, or one that was scored again later."""
    found: dict[str, dict[str, Any]] = {}
    for file, results in {each.file: each.results for each in run.tasks.values()}.items():
        below = results.get("group_subtasks") or {}
        for group, scores in results["groups"].items():
            tasks = [group]
            for name in tasks:  # grows as it goes: groups may hold groups
                tasks += [each for each in below.get(name, ()) if each not in tasks]
            if all(run.tasks[t].file == file and t not in unfit for t in tasks if t in run.tasks):
                found[group] = scores
    return found


def over_seeds(rows: list[VerdictRow]) -> list[dict[str, Any]]:
    """The mean difference over the seeds of one vector (runs ``NAME-seed-N``), where there are at least 3."""
    groups: dict[tuple[str, str, bool], list[VerdictRow]] = {}
    for row in rows:
        if row.primary and (match := re.fullmatch(r"(.+)-seed-\d+", row.run)):
            groups.setdefault((match[1], row.task, row.share), []).append(row)
    found: list[dict[str, Any]] = []
    for (run, task, share), own in groups.items():
        if len(own) >= 3:
            documents = sum((row.high or 0.0) - (row.low or 0.0) for row in own) / (2 * len(own))
            values = [row.difference for row in own]
            low, high = seeds_interval(values, documents)
            own_row = {"run": run, "task": task, "share": share, "seeds": len(own)}
            found.append(own_row | {"mean": sum(values) / len(own), "low": low, "high": high})
    return found


# Runs scored without the questions, beside the same vectors' ordinary runs.


def answer_only_rows(
    baseline: ScoredRun,
    rows: Sequence[VerdictRow],
    runs: Sequence[ScoredRun],
    answer_only: Sequence[ScoredRun],
    force: bool = False,
) -> tuple[list[AnswerOnlyRow], list[NotFinite]]:
    """A row for every answer-only run whose vector has an ordinary row on the same task; and what lacks one.

    Args:
        rows: the ordinary rows, with verdicts.
        runs: the ordinary runs, without the baseline.
        answer_only: the answer-only runs, their baseline among them.
        force: compare even runs whose settings or documents differ.

    Raises:
        AFTError: answer-only runs without a baseline of their own, or with other settings.
    """
    if not answer_only:
        return [], []
    bases = [run for run in answer_only if not (run.vector or run.vector_path)]
    if len(bases) != 1:
        raise AFTError(
            f"There are {len(bases)} answer-only runs of the baseline; one is needed.",
            "Score the baseline with answer_only=true too, as `aft eval --answer-only` does.",
        )
    (base,) = bases
    found = [text for text in differences(baseline, base) if not text.startswith(f"{ANSWER_ONLY} ")]
    if found and not force:
        raise AFTError(
            f"{base.name} cannot stand beside {baseline.name}; they differ in: {'; '.join(found)}.",
            "Run both with the same settings, or show them anyway with --force.",
        )
    pairs, unfit = [], []
    for run in (each for each in answer_only if each is not base):
        if not force:
            require_comparable(base, run)
        unfit += not_finite(base, run)
        name = _ordinary_name(run, runs)
        ordinary = {row.task: row for row in rows if row.primary and row.run == name}
        for each in compare_runs(base, run):
            if each.row.primary and (row := ordinary.get(each.row.task)):
                pairs.append(AnswerOnlyRow(row, each.row, meaning(row, each.row)))
    return pairs, unfit


def meaning(with_question: VerdictRow, without_question: VerdictRow) -> str:
    """One sentence on a vector's gain with the questions (by its verdict) and without (by its own p)."""
    ordinary, without = _direction(with_question), _direction(without_question)
    if ordinary > 0 and without > 0:
        share = without_question.difference / with_question.difference
        return (
            f"A gain of {min(share, 9.99):.0%} of the ordinary one survives without the question: that much "
            "may be answer-style bias."
        )
    if ordinary > 0 and without < 0:
        return "Without the question the vector loses: its gain depends on the question, not on answer style."
    if ordinary > 0:
        return (
            "Without the question no gain is detectable: within its interval, answer style does not explain "
            "the ordinary gain."
        )
    if without > 0:
        return (
            "The vector favours right answers by their style alone, which gains nothing once the question "
            "is there."
        )
    return "There is no gain with the question, so there is none for answer style to explain."


def _direction(row: VerdictRow) -> int:
    """1 for better, -1 for worse, 0 for no detectable difference; by the verdict if there is one."""
    if row.verdict in (BETTER, WORSE, NO_DIFFERENCE):
        return (row.verdict == BETTER) - (row.verdict == WORSE)
    if row.p_value >= ALPHA or not row.difference:
        return 0
    return 1 if (row.difference > 0) == row.higher_is_better else -1


def _ordinary_name(run: ScoredRun, runs: Sequence[ScoredRun]) -> str | None:
    """The ordinary run of the same vector; of several, the one with the same name."""
    digest, tail = (run.vector or {}).get("sha256"), run.name.partition("/")[2]
    same = [each.name for each in runs if digest and (each.vector or {}).get("sha256") == digest]
    return min(same, key=lambda name: name.partition("/")[2] != tail, default=None)


# Results of a routed run, split by the vector that each document got.

# For documents that the run's record does not name: another process routed them, or a cache answered.
UNKNOWN = "not recorded"


def route_rows(
    baseline: ScoredRun, comparisons: Sequence[tuple[ScoredRun, Comparison]]
) -> list[dict[str, Any]]:
    """A row for each routed run, task and vector, on the task's primary metric.

    Returns:
        Rows ``{"run", "task", "metric", "filter", "route", "own", "n", "of", "baseline", "steered",
        "difference", "share"}``: ``route`` is a library name or ``none``; ``own`` whether that vector
        was trained on the task; ``n`` of the ``of`` documents went there; scores are means in the
        metric's own unit, ``share`` whether all are between 0 and 1. A description, not a test.
    """
    found = []
    for run, each in comparisons:
        routing = run.routing
        if routing is None or not each.row.primary:
            continue
        before = baseline.tasks[each.row.task].samples[each.row.filter]
        after = run.tasks[each.row.task].samples[each.row.filter]
        logged = (routing.get("routes") or {}).get(each.row.task) or {}
        routed = {int(doc_id): str(name) for name, ids in logged.items() for doc_id in ids}
        groups: dict[str, list[int]] = {}
        for doc_id in each.doc_ids:
            groups.setdefault(routed.get(doc_id, UNKNOWN), []).append(doc_id)
        for name, ids in sorted(groups.items(), key=lambda group: -len(group[1])):
            old = [before[i].metrics[each.row.metric] for i in ids]
            new = [after[i].metrics[each.row.metric] for i in ids]
            vector = (routing.get("vectors") or {}).get(name) or {}
            own = each.row.task in str(vector.get("task")).split(",")
            found.append(
                {"run": run.name, "task": each.row.task, "metric": each.row.metric, "filter": each.row.filter}
                | {"route": name, "own": own, "n": len(ids), "of": len(each.doc_ids)}
                | {"baseline": sum(old) / len(ids), "steered": sum(new) / len(ids)}
                | {"difference": (sum(new) - sum(old)) / len(ids)}
                | {"share": all(0 <= value <= 1 for value in (*old, *new))}
            )
    return found


# The Open LLM Leaderboard v1's settings, and scores published under them.

# task -> (n-shot, metric, filter), as the leaderboard's first version set them.
SETTINGS: dict[str, tuple[int, str, str]] = {
    "arc_challenge": (25, "acc_norm", "none"),
    "hellaswag": (10, "acc_norm", "none"),
    "gsm8k": (5, "exact_match", "strict-match"),
}
# Scores in percent, from the model cards' records of that leaderboard.
PUBLISHED: dict[str, dict[str, float]] = {
    "Qwen/Qwen1.5-0.5B": {"arc_challenge": 31.48, "hellaswag": 49.05},
    "microsoft/phi-1_5": {"arc_challenge": 52.90, "hellaswag": 63.79, "gsm8k": 12.43},
    "stabilityai/stablelm-2-1_6b": {"arc_challenge": 43.43, "hellaswag": 70.49, "gsm8k": 17.82},
}


def leaderboard_rows(baseline: ScoredRun, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The three tasks' rows, whether the leaderboard's settings were used, and the calibration.

    The calibration is the baseline's score minus the published one, in percentage points.

    Args:
        rows: a report's steered rows, as plain values.
    """
    model = str(baseline.any.get("model_name") or model_args(baseline.any).get("pretrained") or "")
    published = next((v for k, v in PUBLISHED.items() if model in (k, k.split("/")[1])), {})
    found = []
    for task, (shots, metric, filter_name) in SETTINGS.items():
        own = [r for r in rows if (r["task"], r["metric"], r["filter"]) == (task, metric, filter_name)]
        if task not in baseline.tasks:
            problems = ["not scored"]
        else:
            problems = _deviations(baseline, task, shots)
            if not own:
                problems.append(f"no {metric} ({filter_name})")
        reference = published.get(task)
        score = 100 * own[0]["baseline"] if own else None
        found.append(
            {
                "task": task,
                "num_fewshot": shots,
                "metric": metric if filter_name == "none" else f"{metric},{filter_name}",
                "same_settings": not problems,
                "deviations": problems,
                "published": reference,
                "calibration": score - reference if score is not None and reference is not None else None,
                "rows": own,
            }
        )
    return found


def _deviations(run: ScoredRun, task: str, shots: int) -> list[str]:
    each = run.tasks[task]
    results, found = each.results, []
    if results.get("n-shot", {}).get(task) != shots:
        found.append(f"{results.get('n-shot', {}).get(task)}-shot")
    counts = results.get("n-samples", {}).get(task, {})
    scored = max(map(len, each.samples.values()))
    if counts.get("original") not in (None, scored):
        found.append(f"{scored} of {counts['original']} documents")
    elif limit := results.get("config", {}).get("limit"):
        found.append(f"limit {limit:g}" if isinstance(limit, int | float) else f"limit {limit}")
    elif "original" not in counts:
        found.append(f"{scored} documents, of how many is not logged")
    if run.answer_only:
        found.append("scored without the questions")
    changed = {
        "chat template": results.get("chat_template_sha"),
        "system instruction": results.get("system_instruction_sha"),
        "gen_kwargs": results.get("config", {}).get("gen_kwargs"),
    }
    found += [name for name, value in changed.items() if value]
    return found
