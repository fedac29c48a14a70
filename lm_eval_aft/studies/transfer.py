"""Does a vector trained on one task help on another? Every vector scored on every task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import exclusive_dir
from lm_eval_aft.evaluation.compare import VerdictRow
from lm_eval_aft.evaluation.matrix import Matrix, MatrixCell
from lm_eval_aft.evaluation.report import Report
from lm_eval_aft.evaluation.stats import holm, verdict
from lm_eval_aft.library.files import check_name
from lm_eval_aft.library.load import load_vector
from lm_eval_aft.library.store import Library
from lm_eval_aft.studies.config import LibraryStudy, VectorEntry, require_plain
from lm_eval_aft.studies.train_set import TrainSet, read_scores, score_vectors

_KEPT = (
    *("metric", "filter", "n", "baseline", "steered", "difference", "low", "high", "wins", "losses"),
    *("higher_is_better", "share"),
)
SHELF = "trained"  # the library's category of vectors trained here


@dataclass(frozen=True)
class Transfer:
    """Vectors and tasks to cross; `run` continues what an earlier call left in ``output``.

    Attributes:
        settings: of the training, as `TrainingPlan.of` takes them.
    """

    model: str
    tasks: tuple[str, ...]  # every vector is scored on all of them
    output: Path
    given: Mapping[str, str] = field(default_factory=dict)  # vectors by name, as `load_vector` takes them
    settings: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    placebo: str = "none"  # ``random:N`` scores N random directions like each vector too
    flags: tuple[str, ...] = ()  # further flags of ``lm_eval run``
    train: bool = True  # whether to train vectors for the tasks that ``given`` has none for

    def run(self, say: Callable[[str], None] = print, progress: bool = True) -> Matrix:
        """Train what is missing, score what is missing, compare.

        Raises:
            AFTError: bad input; the output has vectors of other settings; nothing to score.
        """
        self._check()
        with exclusive_dir(self.output):
            return self._run(say, progress)

    def _run(self, say: Callable[[str], None], progress: bool) -> Matrix:
        library = Library(self.output / "vectors")
        entries = self._entries()
        failed = {}
        if entries:
            study = LibraryStudy.model_construct(vectors=entries)
            failed = TrainSet(study, library, self.model, self.model_args).train(say=say, progress=progress)
        specs = {each.task: name for name, each in entries.items() if name not in failed} | dict(self.given)
        if not specs:
            raise AFTError("No vector could be trained: the reasons are printed above.", "Check --tasks.")
        twice = [name for name, spec in specs.items() if list(specs.values()).count(spec) > 1]
        if twice:
            raise AFTError(f"{' and '.join(twice)} are the same vector.", "Name each vector once.")
        loaded = {name: load_vector(spec, library) for name, spec in specs.items()}
        trained_on = {name: str(v.metadata.get("task", "")).split(",") for name, v in loaded.items()}
        digests = {name: vector.digest() for name, vector in loaded.items()}
        found: list[tuple[str, bool, VerdictRow]] = []
        for task in self.tasks:
            asked = {
                "model": self.model,
                "vectors": {specs[name]: digest for name, digest in digests.items()},
                "flags": list(self.flags),
                "model_args": dict(self.model_args),
                "placebo": self.placebo,
            }
            folder = self.output / "scores" / task
            if not score_vectors(folder, task, asked, self.settings.get("include_path") or (), library, say):
                say(f"{task}: already scored.")
            report = read_scores(folder, task, say)
            found += _rows(report, {spec: name for name, spec in specs.items()})
        if not found:
            raise AFTError(
                "No task has scores that can be compared document by document.",
                f"`aft report {self.output}/scores/TASK` lists what there is.",
            )
        missing = {name.removeprefix(f"{SHELF}/"): why for name, why in failed.items()}
        return _matrix(self.model, self.tasks, found, trained_on, missing)

    def _entries(self) -> dict[str, VectorEntry]:
        """The vectors to train, by name."""
        found = {}
        for task in self.tasks if self.train else ():
            if task not in self.given:
                # Its settings were read from flags already.
                entry = VectorEntry.model_construct(name=f"{SHELF}/{task}", task=task, settings=self.settings)
                entry.plan()
                found[entry.name] = entry
        return found

    def _check(self) -> None:
        if len(set(self.tasks)) < len(self.tasks):
            raise AFTError("A task was named twice.", "Name each task once.")
        require_plain(self.tasks, self.settings.get("include_path") or ())
        for name in self.tasks if self.train else ():
            check_name(f"{SHELF}/{name}")  # by which the library will know its vector


def _rows(report: Report, names: Mapping[str, str]) -> list[tuple[str, bool, VerdictRow]]:
    """A report's rows on primary metrics: the vector's name, whether a placebo, the row."""
    specs = {each["run"]: str(each["values"].get("vector")) for each in report.settings}
    found = []
    for row in report.rows:
        if not row.primary:
            continue
        if row.kind == "placebo":
            label = row.run.removeprefix("placebo/").removeprefix(f"{SHELF}-")
            found.append((label.replace("-random-", ", random "), True, row))
        elif specs.get(row.run) in names:
            found.append((names[specs[row.run]], False, row))
    return found


def _matrix(
    model: str,
    tasks: Sequence[str],
    rows: Sequence[tuple[str, bool, VerdictRow]],
    trained_on: Mapping[str, Sequence[str]],
    failed: dict[str, str],
) -> Matrix:
    """Verdicts Holm-adjusted over the whole matrix, not over one task's vectors as in its own report."""
    counted = [row for _, placebo, row in rows if not placebo and row.p_adjusted is not None]
    adjusted = dict(zip(map(id, counted), holm([row.p_value for row in counted]), strict=True))
    cells = []
    for name, placebo, row in rows:
        p = adjusted.get(id(row))
        judged = row.verdict if p is None else verdict(p, row.difference, row.higher_is_better)
        cells.append(
            MatrixCell(
                vector=name,
                task=row.task,
                own=row.task in trained_on.get(name, ()),
                placebo=placebo,
                p=row.p_value,
                p_adjusted=p,
                verdict=judged,
                **{key: getattr(row, key) for key in _KEPT},
            )
        )
    return Matrix(model, tuple(tasks), tuple(cells), len(counted), failed)
