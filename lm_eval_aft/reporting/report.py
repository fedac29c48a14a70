"""The report as plain data: computed once, rendered many ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lm_eval_aft import __version__
from lm_eval_aft.errors import AFTError
from lm_eval_aft.reporting.answer_only import WORDING as ANSWER_ONLY_WORDING
from lm_eval_aft.reporting.answer_only import AnswerOnlyRow, answer_only_rows, apart
from lm_eval_aft.reporting.flips import flipped_documents
from lm_eval_aft.reporting.leaderboard import WORDING, leaderboard_rows
from lm_eval_aft.reporting.notes import corpus_scores, group_scores, over_seeds, warnings
from lm_eval_aft.reporting.pairing import compare_runs, differences, require_comparable
from lm_eval_aft.reporting.reproduce import commands
from lm_eval_aft.reporting.results import Run, discover, read_run
from lm_eval_aft.reporting.routes import route_rows
from lm_eval_aft.reporting.settings import described
from lm_eval_aft.reporting.stats import ALPHA
from lm_eval_aft.reporting.vectors import describe_vector
from lm_eval_aft.reporting.verdicts import Row, judge


@dataclass
class Report:
    """Everything a reader is told, as values that JSON knows.

    Attributes:
        banner: what differs between runs compared by force.
        family: how many comparisons Holm's correction covers.
        corpus: metrics without a score per document: both values, no test.
        groups: lm-eval's group scores: both values, no test.
        seeds: per vector and task scored with >= 3 seeds, mean difference and its interval.
        answer_only: vectors with the questions and without them, outside Holm's family.
        routes: routed runs split by the vector that documents got: means, no test.
        settings: one mapping per run, field -> text.
        datasets: task -> the dataset it reads, by its name on the Hub or its path.
    """

    title: str
    created: str
    version: str
    banner: list[str]
    warnings: list[str]
    family: int
    alpha: float
    runs: list[dict[str, Any]]
    rows: list[Row]
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
    leaderboard_wording: str = WORDING
    answer_only_wording: str = ANSWER_ONLY_WORDING

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare(baseline: str | Path, *steered: str | Path, force: bool = False, flips: int = 20) -> Report:
    """Compare runs that lm-eval wrote with ``--log_samples``, document by document.

    Args:
        baseline: a folder written by ``aft eval`` (then alone), or the baseline's result folder.
        steered: result folders to compare with it.
        force: compare runs that were not asked the same, with a banner.
        flips: how many flipped documents to tell in full, each way.

    Raises:
        AFTError: unreadable folders, or runs that cannot be compared (each difference is named).
    """
    return build_report(read_runs([Path(baseline), *map(Path, steered)]), force=force, flips=flips)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs of one folder that holds several, or of several folders, the baseline first."""
    if len(folders) == 1:
        return discover(folders[0])
    names = _names(folders)
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    runs[0].kind = "baseline"
    for run in runs[1:]:
        run.kind = "steered" if run.kind == "baseline" else run.kind
    return runs


def build_report(runs: Sequence[Run], *, force: bool = False, flips: int = 20, title: str = "") -> Report:
    """Compare every run with the first one.

    Raises:
        AFTError: runs that cannot be compared, unless ``force``.
    """
    shown, (runs, bare) = runs, apart(runs)
    if not runs:
        raise AFTError("There is no baseline that was asked the questions.", "Give its result folder first.")
    baseline, others = runs[0], list(runs[1:])
    if not others:
        raise AFTError("There is nothing to compare with the baseline.", "Give at least one steered run.")
    if len({run.name for run in runs}) < len(runs):
        raise AFTError("Two runs have one name.", "Give every run a folder of its own name.")
    banner = []
    mismatched = set()
    for run in others:
        if not force:
            require_comparable(baseline, run)
        elif found := differences(baseline, run):
            mismatched.add(run.name)
            banner.append(f"{run.name} and {baseline.name} differ in: {'; '.join(found)}")
    vectors = {run.name: describe_vector(run) for run in others}
    comparisons = [(run, each) for run in others for each in compare_runs(baseline, run)]
    if not comparisons:
        raise AFTError("The runs share no metric with a score per document.", "Compare their tables by eye.")
    rows = judge(baseline, comparisons, vectors, mismatched)
    plain = [asdict(row) for row in rows]
    models = sorted({str(run.any.get("model_name")) for run in runs})
    models = [Path(model).name if model.startswith((".", "/")) else model for model in models]
    return Report(
        title=title or f"{', '.join(models)}: {', '.join(baseline.tasks)}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        banner=banner,
        warnings=warnings(baseline, others, list(vectors.values()), rows),
        family=sum(row.family for row in rows),
        alpha=ALPHA,
        runs=[_described(run) for run in shown],
        rows=rows,
        corpus=corpus_scores(baseline, others, rows),
        groups=group_scores(baseline, others),
        seeds=over_seeds(rows),
        answer_only=answer_only_rows(baseline, rows, others, bare, force),
        routes=route_rows(baseline, comparisons),
        flips=[
            flipped_documents(baseline, run, each, flips)
            for run, each in comparisons
            if each.primary and run.kind == "steered"
        ],
        settings=[{"run": run.name, "values": described(run)} for run in shown],
        vectors=[info.to_dict() for info in vectors.values() if info.path],
        commands=[{"run": run.name, "commands": commands(run)} for run in shown],
        leaderboard=leaderboard_rows(baseline, [row for row in plain if row["kind"] == "steered"]),
        datasets={task: str(each.config.get("dataset_path") or "") for task, each in baseline.tasks.items()},
    )


def _described(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "kind": run.kind,
        "tasks": list(run.tasks),
        "vector": run.vector_path,
        "answer_only": run.answer_only,
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest tail of each path that tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise AFTError("The same folder was given twice.", "Give each run once.")
