"""Training every vector of a study into a library, resumably, and scoring every vector on every task."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_aft._util.errors import AFTError
from lm_eval_aft._util.files import JsonLines, canonical_json, exclusive_dir, replacing_dir
from lm_eval_aft._util.pages import json_text, markdown_table, write_formats
from lm_eval_aft.evaluation import formatting
from lm_eval_aft.evaluation.compare import VerdictRow
from lm_eval_aft.evaluation.matrix import Matrix, MatrixCell
from lm_eval_aft.evaluation.report import Report, compare
from lm_eval_aft.evaluation.run import evaluate_pair
from lm_eval_aft.evaluation.stats import holm, verdict
from lm_eval_aft.harness.identity import contents_digest
from lm_eval_aft.library.files import check_name
from lm_eval_aft.library.load import load_vector
from lm_eval_aft.library.store import Library
from lm_eval_aft.lm import AFTLM
from lm_eval_aft.steering.vector import SteeringVector
from lm_eval_aft.steering.vector_file import FILE_NAME
from lm_eval_aft.studies.config import LibraryStudy, VectorEntry, require_plain
from lm_eval_aft.training.run import train_vector
from lm_eval_aft.training.setup import load_model

logger = logging.getLogger(__name__)
# A hidden folder of the library: listings pass it over.
FOLDER = ".train-set"
TRAIN_SET_LEDGER = "ledger.jsonl"
IN_LIBRARY, BEGUN, WAITING = "in the library", "begun", "to do"


@dataclass(frozen=True)
class EntryStatus:
    """The progress of an entry: ``state`` is `IN_LIBRARY`, `BEGUN` or `WAITING`."""

    entry: VectorEntry
    state: str


class TrainSet:
    """A study, and the library that it fills.

    Each vector is trained in a hidden folder of the library and moved to its place when it is finished,
    so a run that was killed resumes where it stopped.
    """

    def __init__(
        self, study: LibraryStudy, library: Library, model: str, model_args: Mapping[str, Any] | None = None
    ) -> None:
        self.study = study
        self.library = library
        self.model = model
        self.model_args = dict(model_args or {})
        self.folder = library.root / FOLDER
        self.ledger = JsonLines(self.folder / TRAIN_SET_LEDGER)

    def statuses(self) -> list[EntryStatus]:
        """The progress of every entry, in the study's order.

        Raises:
            AFTError: the library holds a vector of an entry's name that this study did not train.
        """
        records = {str(record.get("name")): record for record in self.ledger.read()}
        names, found = set(self.library.names()), []
        for entry in self.study.entries:
            state = WAITING
            if entry.name in names:
                self._require_own(entry, records.get(entry.name))
                state = IN_LIBRARY
            elif self._work(entry).exists():
                state = BEGUN
            found.append(EntryStatus(entry, state))
        return found

    def check_fresh(self) -> None:
        """Raise `AFTError` if anything of the study is there already and has to be resumed."""
        begun = [each.entry.name for each in self.statuses() if each.state != WAITING]
        if begun:
            raise AFTError(
                f"The library {self.library.root} already has finished or unfinished {', '.join(begun)}.",
                "Continue with --resume, or choose another library.",
            )

    def train(self, *, say: Callable[[str], None] = logger.info, progress: bool = True) -> dict[str, str]:
        """Train what is not in the library yet; return why entries failed, by name.

        An entry that cannot be trained (no such data, no training split) does not stop the others.
        """
        failed: dict[str, str] = {}
        lm: AFTLM | None = None
        for status in self.statuses():
            entry = status.entry
            if status.state == IN_LIBRARY:
                say(f"{entry.name}: already in the library.")
                continue
            if lm is None:
                lm = load_model(self.model, self.model_args)
            say(f"{entry.name}: training on {entry.task} ...")
            started = time.monotonic()
            try:
                self._train(entry, lm, say, progress)
            except AFTError as error:
                failed[entry.name] = error.one_line
                say(f"{entry.name}: not trained. {failed[entry.name]}")
                continue
            say(f"{entry.name}: trained in {time.monotonic() - started:.0f} s.")
        return failed

    def _train(self, entry: VectorEntry, lm: AFTLM, say: Callable[[str], None], progress: bool) -> None:
        work = self._work(entry)
        asked_file = work.with_name(f"{work.name}.asked.json")
        asked = canonical_json(self._asked(entry))
        if work.exists() and not (asked_file.is_file() and asked_file.read_text(encoding="utf-8") == asked):
            say(f"{entry.name}: was begun with other settings, and is started anew.")
            shutil.rmtree(work)
        if not (work / FILE_NAME).exists():  # finished, if it is there
            work.parent.mkdir(parents=True, exist_ok=True)
            asked_file.write_text(asked, encoding="utf-8")
            train_vector(lm, entry.plan(), work, resume=True, progress=progress)
        vector = SteeringVector.load(work)
        record = {"name": entry.name, "sha256": vector.digest(), "asked": self._asked(entry)}
        # Before the vector moves: without its line it would be taken for a foreign one.
        self.ledger.append(**record)
        self.library.add(work, entry.name)
        shutil.rmtree(work, ignore_errors=True)
        asked_file.unlink(missing_ok=True)

    def _work(self, entry: VectorEntry) -> Path:
        return self.folder / "work" / entry.name.replace("/", ",")

    def _asked(self, entry: VectorEntry) -> dict[str, Any]:
        """What the entry's vector depends on, as JSON would give it back."""
        asked: dict[str, Any] = {"model": self.model, **entry.plan().to_dict()}
        # Device and batch size do not change the vector.
        loaded = {key: value for key, value in self.model_args.items() if key not in ("device", "batch_size")}
        if loaded:
            asked["model_args"] = loaded
        return dict(json.loads(canonical_json(asked)))

    def _require_own(self, entry: VectorEntry, record: dict[str, Any] | None) -> None:
        there = SteeringVector.load(self.library.path(entry.name)).digest()
        if record is None or record.get("sha256") != there:
            raise AFTError(
                f"The library {self.library.root} has a vector {entry.name!r} that this study did not train.",
                "Remove it, rename the entry, or choose another library.",
            )
        asked = self._asked(entry)
        differing = [
            key for key in sorted({*asked, *record["asked"]}) if asked.get(key) != record["asked"].get(key)
        ]
        if differing:
            raise AFTError(
                f"{entry.name} in the library was trained with other settings ({', '.join(differing)}).",
                f"Remove it with `aft vectors remove {entry.name}`, or choose another library.",
            )


# Each vector of a study scored on each of its tasks, kept beside the vectors.

CROSS_SCORES = "cross-scores"
_ASKED = "asked.json"


def cross_score(
    study: LibraryStudy,
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
    require_plain(list(study.scored_tasks()), study.include_path)
    names = [entry.name for entry in entries]
    digests = {name: SteeringVector.load(library.path(name)).digest() for name in names}
    rows: list[dict[str, Any]] = []
    for task, entry in study.scored_tasks().items():
        wanted = limit or (entry.limit if entry else None) or study.scores.limit
        own = [*flags, *(["--limit", str(wanted)] if wanted else [])]
        if entry:
            plan = entry.plan()
            own += plan.prompts.flags()
            own += ["--metadata", json.dumps(plan.task_metadata)] if plan.task_metadata else []
        if study.include_path:
            own += ["--include_path", study.include_path[0]]
        asked = {"model": model, "vectors": digests, "flags": own, "model_args": model_args or {}}
        folder = library.root / FOLDER / "scores" / task
        score_vectors(folder, task, asked, study.include_path, library, say)
        trained_on = {each.name: each.plan().tasks for each in entries}
        report = read_scores(folder, task, say)
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


def cross_score_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the table: a line for the baseline and each vector, a column for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    at = {(row["vector"], row["task"]): row for row in rows}
    first = {row["task"]: row for row in reversed(rows)}
    heads = [
        f"{task} ({formatting.metric_name(row['metric'], row['filter'])}, n = {row['n']})"
        for task, row in ((task, first[task]) for task in tasks)
    ]
    lines = [["baseline", *(formatting.score(first[t]["baseline"], first[t]["share"]) for t in tasks)]]
    for name in dict.fromkeys(row["vector"] for row in rows):
        line = [name]
        for task in tasks:
            row = at.get((name, task))
            if row is None:
                line.append("–")
                continue
            mark = {"better": " ▲", "worse": " ▼"}.get(row["verdict"], "")
            value, change = (row[key] for key in ("steered", "difference"))
            text = f"{formatting.score(value, row['share'])} ({formatting.points(change, row['share'])})"
            line.append(f"{text}{mark}{' *' if row['own'] else ''}")
        lines.append(line)
    return ["vector", *heads], lines


CROSS_SCORES_NOTE = (
    "Score (difference from the baseline) on each task's evaluation split; * the task the vector was "
    "trained on; ▲ ▼ better or worse by a Holm-adjusted exact test over the vectors on that task."
)


def read_scores(folder: Path, task: str, say: Callable[[str], None]) -> Report:
    """The comparison of the runs that `score_vectors` made; ``say`` gets what has no verdict, and why."""
    report = compare(folder)
    for unfit in report.not_finite:
        say(str(unfit))
    if not report.rows and not report.not_finite:
        say(f"{task}: its metrics have no score per document to compare; `aft report {folder}` lists them.")
    return report


def score_vectors(
    folder: Path,
    task: str,
    asked: dict[str, Any],
    include_path: Sequence[str],
    library: Library,
    say: Callable[[str], None],
) -> bool:
    """Score the baseline and vectors on a task, unless the folder has these scores; whether it had not.

    Args:
        asked: ``model``, ``model_args``, ``flags`` of ``lm_eval run``, ``vectors`` (name -> digest), perhaps
            ``placebo``; kept in the folder with a digest of the model and the task.
    """
    text, earlier = (  # version 0.1's digest depends on where the task's Python functions lie
        canonical_json(
            asked
            | {
                "contents": contents_digest(
                    asked["model"], asked["model_args"], task, include_path, absolute=absolute
                )
            }
        )
        for absolute in (False, True)
    )
    with contextlib.suppress(OSError, ValueError):
        if (folder / _ASKED).read_text(encoding="utf-8") in (text, earlier):
            return False
    say(f"{task}: scoring {len(asked['vectors'])} vectors and the baseline ...")
    with replacing_dir(folder) as begun:
        evaluate_pair(
            asked["model"],
            list(asked["vectors"]),
            [task],
            begun,
            placebo=asked.get("placebo", "none"),
            library=library.root,
            model_args=asked["model_args"],
            flags=asked["flags"],
        )
        (begun / _ASKED).write_text(text, encoding="utf-8")
    return True


def _write(root: Path, rows: Sequence[dict[str, Any]]) -> None:
    texts = {
        "md": f"{markdown_table(*cross_score_table(rows))}\n\n{CROSS_SCORES_NOTE}\n",
        "json": json_text(list(rows)),
    }
    write_formats(texts, root, CROSS_SCORES)


# Transfer: does a vector trained on one task help on another?

# What a transfer matrix keeps of a verdict's row.
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
